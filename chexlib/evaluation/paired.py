"""Is one model better than another on the same images? Paired differences, with correction for
looking 15 times.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import t

from chexlib.errors import DataError
from chexlib.evaluation.auroc import part_of, resample
from chexlib.evaluation.resampling import (
    draw_patients,
    interval_of,
    mean_of,
    patients_behind,
    standard_error,
)
from chexlib.findings import FINDINGS


def paired_difference(
    labels: np.ndarray,
    scores: np.ndarray,
    others: np.ndarray,
    patients: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of `scores` minus that of `others` on the same images, both judged in the same
    resamples of patients.

    Parameters
    ----------
    labels, scores, others : (n, 14), in the order of `FINDINGS`; a label may be NaN
    patients : (n,)
    resamples, seed
        As for `bootstrap_auroc`.

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns auroc, other, difference, low, high (of the
        difference), p and p_holm. p is of the difference over its bootstrap standard error,
        two-sided, by Student's t: below 0.05 where the 95 % interval leaves 0 out. p_holm is
        corrected over all rows that have a p (Holm 1979), so that of models that differ by chance
        only 5 % show any p_holm below 0.05. NaN as in `bootstrap_auroc`.
    """
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)
    (points, samples), (other_points, other_samples) = (
        resample(labels, s, drawn, codes) for s in (scores, others)
    )
    behind = patients_behind(labels, codes)
    table = difference_table(points[0] - other_points[0], samples[0] - other_samples[0], behind)
    for place, (name, found) in enumerate({"auroc": points, "other": other_points}.items()):
        table.insert(place, name, np.append(found[0], mean_of(found)[0]))
    return table


def difference_table(points: np.ndarray, samples: np.ndarray, patients: np.ndarray) -> pd.DataFrame:
    """Differences with interval and p, as `paired_difference` has them, from those of resamples.

    Parameters
    ----------
    points : (14,), difference of each finding
    samples : (14, resamples)
    patients : (15,), as `patients_behind` counts them

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns difference, low, high, p and p_holm.
    """
    points, samples = (
        np.append(points, mean_of(points[None])),
        np.vstack([samples, mean_of(samples[None])]),
    )
    low, high = interval_of(points, samples, patients)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(points == 0, 0.0, np.abs(points) / standard_error(samples, patients))
    p = np.where(np.isnan(low), np.nan, 2 * t.sf(ratio, np.maximum(patients, 2) - 1))
    columns = {"difference": points, "low": low, "high": high, "p": p, "p_holm": holm(p)}
    return pd.DataFrame(columns, index=pd.Index([*FINDINGS, "mean"], name="finding"))


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number, step down (Holm 1979). NaN is no test."""
    p = np.asarray(p, np.float64)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def compare(
    predictions: pd.DataFrame,
    others: pd.DataFrame,
    *,
    part: str = "test",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """`paired_difference` of one part of two `predictions.parquet` tables, matched by image.

    Raises
    ------
    DataError
        Their images, or the labels of them, are not the same.
    """
    rows, labels, scores = part_of(predictions, part)
    other_rows, other_labels, other_scores = part_of(others, part)
    mine, theirs = pd.Index(rows["image"]), pd.Index(other_rows["image"])
    if len(only := mine.symmetric_difference(theirs)):
        raise DataError(
            f"{len(only)} images of part {part!r} are in one of the two tables only, for instance "
            f"{only[0]!r}. A paired comparison needs scores of the same images: score those that "
            "are missing."
        )
    place = theirs.get_indexer(mine)
    if not np.array_equal(labels, other_labels[place], equal_nan=True):
        raise DataError(
            "the two tables have other labels for the same images. Judge both against one data "
            "folder."
        )
    patients = rows["patient"].to_numpy()
    return paired_difference(
        labels, scores, other_scores[place], patients, resamples=resamples, seed=seed
    )
