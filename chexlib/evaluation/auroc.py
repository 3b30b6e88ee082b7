"""AUROC and average precision per finding, with intervals that respect that a patient's images are
not independent.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from chexlib.errors import DataError
from chexlib.evaluation.resampling import (
    FEWEST_PATIENTS,
    draw_patients,
    interval_of,
    mean_of,
    patients_behind,
    with_interval,
)
from chexlib.findings import FINDINGS
from chexlib.machine import cores

CHUNK = 125  # resamples at a time: their patients' weights stay in the processor's cache
COLUMNS = ["auroc", "low", "high", "ap", "ap_low", "ap_high", "positives", "negatives"]
log = logging.getLogger(__name__)


class Ranking:
    """How the images of one finding are ordered by their scores: all that AUROC and average
    precision need of it.

    Of the negatives it matters only how many lie between two positives. These counts are sums over
    patients, so that any weights of patients take one sparse product.

    Parameters
    ----------
    labels : (n,) 1, 0, or NaN where it is not known: such an image counts in neither class
    scores : (n,) float, integer or bool, higher means more likely
    owners : (n,) int, optional
        Whose weight each image has; its own if not given.

    Raises
    ------
    DataError
        Scores that are not finite, or other labels.
    """

    def __init__(self, labels: np.ndarray, scores: np.ndarray, owners: np.ndarray | None = None):
        labels, scores = np.asarray(labels, np.float64), np.asarray(scores)
        if not np.isfinite(scores).all():
            raise DataError(
                f"{(~np.isfinite(scores)).sum()} scores are not finite. Did the training diverge?"
            )
        if len(strange := np.unique(labels[~np.isin(labels, (0, 1)) & ~np.isnan(labels)])):
            raise DataError(
                f"labels are {', '.join(map(str, strange[:5]))}. Accepted: 1, 0, and NaN for "
                "unknown."
            )
        if scores.dtype.kind in "biu":  # ranks, which unlike these can be negated
            scores = np.unique(scores, return_inverse=True)[1]
        owners = np.arange(len(labels)) if owners is None else np.asarray(owners)
        order = np.argsort(-scores, kind="stable")  # the highest first
        up, down = order[labels[order] == 1], order[labels[order] == 0]
        above, through = (
            np.searchsorted(-scores[down], -scores[up], side) for side in ("left", "right")
        )
        edges, place = np.unique(np.r_[above, through], return_inverse=True)
        # The last is below every positive.
        segment = np.searchsorted(edges, np.arange(len(down)), side="right")
        shape = (len(edges) + 1, owners.max(initial=-1) + 1)
        # Of equal positives.
        self.up, self.last = owners[up], np.searchsorted(-scores[up], -scores[up], "right") - 1
        self.above, self.through = place[: len(up)], place[len(up) :]
        self.between = csr_array((np.ones(len(down)), (segment, owners[down])), shape=shape)
        self.tied = bool((above != through).any()), bool((self.last != np.arange(len(up))).any())

    def measure(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision for each column of `weights` (owners, resamples); NaN where a
        class has none.

        AUROC in the Mann-Whitney form, ties counted half (Hanley and McNeil 1982). Average
        precision is the precision at each positive's score, averaged over positives, without
        interpolation.
        """
        up = weights[self.up]
        down = np.cumsum(self.between @ weights, axis=0)
        hits, false = np.cumsum(up, axis=0), down[self.through]
        all_up, all_down = up.sum(axis=0), down[-1]
        lost = np.einsum("ij,ij->j", up, (false + down[self.above]) / 2 if self.tied[0] else false)
        hits = hits[self.last] if self.tied[1] else hits
        predicted = hits + false
        precision = np.divide(hits, predicted, out=hits, where=predicted > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            area, average = (
                1 - lost / (all_up * all_down),
                np.einsum("ij,ij->j", up, precision) / all_up,
            )
        defined = (all_up > 0) & (all_down > 0)
        return np.where(defined, area, np.nan), np.where(defined, average, np.nan)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of one finding; `labels` and `scores` (n,) as for `Ranking`.

    NaN where there is one class only: AUROC is not defined there.
    """
    area, _ = Ranking(labels, scores).measure(np.ones((len(labels), 1)))
    return float(area[0])


def resample(labels, scores, drawn: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of all findings: (2, findings), and of each resample: (2,
    findings, resamples).

    `drawn` and `codes` are those of `draw_patients`; two sets of scores with the same ones can be
    subtracted.
    """
    everybody = np.ones((len(drawn), 1))
    chunks = [everybody, *(drawn[:, i : i + CHUNK] for i in range(0, drawn.shape[1], CHUNK))]

    def one(finding):
        ranking = Ranking(*finding, codes)
        return np.hstack([ranking.measure(chunk) for chunk in chunks])

    with ThreadPoolExecutor(cores()) as pool:  # NumPy and SciPy let go of the interpreter
        found = np.stack(
            list(pool.map(one, zip(np.asarray(labels).T, np.asarray(scores).T, strict=True))),
            axis=1,
        )
    return found[..., 0], found[..., 1:]


def bootstrap_auroc(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC and average precision of each finding and their means, with intervals from resampling
    patients.

    Parameters
    ----------
    labels, scores : (n, 14), in the order of `FINDINGS`; a label may be NaN
    patients : (n,)
        Whose image each row is; patients, not images, are drawn with replacement.
    resamples : int

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns auroc, low, high, ap (average precision), ap_low,
        ap_high, positives, negatives. A finding with one class only has NaN and stays in the table;
        the mean is over the others. Below `FEWEST_PATIENTS` patients with, or without, a finding
        its interval is NaN: resampling one positive again and again looks certain, and is not. The
        mean AUROC has an interval if a finding has one. The log names these findings. Average
        precision is too high with few positives: of one finding by less than its interval is wide,
        but an interval of the mean would hold the truth in about 0.9 of trials, so it has none.
    """
    table = auroc_table(labels, scores, patients, resamples=resamples, seed=seed)
    findings = table.drop(index="mean")
    undefined = findings["auroc"].isna()
    if undefined.any():
        log.info(
            "AUROC is undefined, one class only, for: %s", ", ".join(findings.index[undefined])
        )
    if (alone := ~undefined & findings["low"].isna()).any():
        log.info(
            "no interval, under %d patients a class, for: %s",
            FEWEST_PATIENTS,
            ", ".join(findings.index[alone]),
        )
    return table


def auroc_table(labels, scores, patients, *, resamples: int, seed: int) -> pd.DataFrame:
    """`bootstrap_auroc` without a word in the log."""
    labels = np.asarray(labels)
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)
    points, samples = resample(labels, scores, drawn, codes)
    points, samples = (
        np.c_[points, mean_of(points)],
        np.concatenate([samples, mean_of(samples)[:, None]], axis=1),
    )
    low, high = interval_of(points, samples, patients_behind(labels, codes), share=True)
    # Of 14 findings the bias of each adds up, and chance does not.
    low[1, -1] = high[1, -1] = np.nan
    counts = [np.append(n, n.sum()) for n in ((labels == 1).sum(0), (labels == 0).sum(0))]
    columns = (points[0], low[0], high[0], points[1], low[1], high[1], *counts)
    return pd.DataFrame(
        dict(zip(COLUMNS, columns, strict=True)),
        index=pd.Index([*FINDINGS, "mean"], name="finding"),
    )


def in_words(row) -> str:
    """ "0.842 (0.830 to 0.853)": a row of `bootstrap_auroc`, or of a `metrics.json`, for a sentence."""
    area, low, high = (
        np.nan if row[name] is None else row[name] for name in ("auroc", "low", "high")
    )
    return with_interval(area, low, high, without="too few patients for an interval")


def split_in_words(split) -> str:
    """ "official split 70e7a9376113, 2,280 test images": the split of a training, beside any AUROC
    of it.
    """
    return f"{split['name']} split {split['digest']}, {split['images']['test']:,} test images"


def part_of(predictions: pd.DataFrame, part: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Rows, labels and scores of one part of a `predictions.parquet` table (image, patient, part,
    label_*, score_*).
    """
    rows = predictions[predictions["part"] == part]
    if rows.empty:
        raise DataError(
            f"the predictions have no part {part!r} (parts: "
            f"{', '.join(predictions['part'].unique())})."
        )
    return rows, *(
        rows[[f"{kind}_{f}" for f in FINDINGS]].to_numpy(np.float64) for kind in ("label", "score")
    )


def judge(
    predictions: pd.DataFrame, *, part: str = "test", resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """`bootstrap_auroc` of one part of a `predictions.parquet` table."""
    rows, labels, scores = part_of(predictions, part)
    return bootstrap_auroc(
        labels, scores, rows["patient"].to_numpy(), resamples=resamples, seed=seed
    )
