"""AUROC and average precision per finding, in subgroups and against another model, with intervals
that respect that a patient's images are not independent.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from chexlib.errors import DataError
from chexlib.evaluation.intervals import (
    FEWEST_PATIENTS,
    draw_patients,
    enough_patients,
    interval_of,
    paired_bootstrap,
    patients_behind,
    table_of_findings,
    with_interval,
    with_mean,
)
from chexlib.findings import FINDINGS
from chexlib.machine import cores

CHUNK = 125  # resamples at a time: their patients' weights stay in the processor's cache
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
                f"{(~np.isfinite(scores)).sum()} scores are not finite: the training may have diverged. "
                "Train again with a lower learning rate."
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
        falling_up, falling_down = -scores[up], -scores[down]
        # How many negatives lie above each positive, without those of its score and with them.
        above = np.searchsorted(falling_down, falling_up, "left")
        through = np.searchsorted(falling_down, falling_up, "right")
        edges, segment_of = np.unique(np.r_[above, through], return_inverse=True)
        self.above, self.through = segment_of[: len(up)], segment_of[len(up) :]
        # The last segment is below every positive.
        segment = np.searchsorted(edges, np.arange(len(down)), "right")
        cells = np.ones(len(down)), (segment, owners[down])
        self.between = csr_array(cells, shape=(len(edges) + 1, owners.max(initial=-1) + 1))
        self.up = owners[up]
        self.last = np.searchsorted(falling_up, falling_up, "right") - 1  # of equal positives

    def measure(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision for each column of `weights` (owners, resamples); NaN where a
        class has none.

        AUROC in the Mann-Whitney form, ties counted half (Hanley and McNeil 1982). Average
        precision is the precision at each positive's score, averaged over positives, without
        interpolation.
        """
        up = weights[self.up]
        down = np.cumsum(self.between @ weights, axis=0)
        hits, false = np.cumsum(up, axis=0)[self.last], down[self.through]
        all_up, all_down = up.sum(axis=0), down[-1]
        lost = np.einsum("ij,ij->j", up, (false + down[self.above]) / 2)  # ties count half
        called = hits + false
        precision = np.divide(hits, called, out=hits, where=called > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            area = 1 - lost / (all_up * all_down)
            average = np.einsum("ij,ij->j", up, precision) / all_up
        defined = (all_up > 0) & (all_down > 0)
        return np.where(defined, area, np.nan), np.where(defined, average, np.nan)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of one finding; `labels` and `scores` (n,) as for `Ranking`.

    NaN where there is one class only: AUROC is not defined there.
    """
    area, _ = Ranking(labels, scores).measure(np.ones((len(labels), 1)))
    return float(area[0])


def mean_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean AUROC over the findings that have both classes, of (n, k) labels and scores; NaN if none
    has.
    """
    areas = [auroc(y, s) for y, s in zip(np.asarray(labels).T, np.asarray(scores).T, strict=True)]
    return float(with_mean(np.array(areas))[-1])


def resample(labels, scores, drawn: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of all findings: (2, findings), and of each resample: (2,
    findings, resamples).

    `drawn` and `codes` are those of `draw_patients`; two sets of scores with the same ones can be
    subtracted.
    """
    everybody = np.ones((len(drawn), 1))
    chunks = [everybody, *(drawn[:, i : i + CHUNK] for i in range(0, drawn.shape[1], CHUNK))]

    def measure(of_finding, its_scores):
        ranking = Ranking(of_finding, its_scores, codes)
        return np.hstack([ranking.measure(chunk) for chunk in chunks])

    columns = zip(np.asarray(labels).T, np.asarray(scores).T, strict=True)
    with ThreadPoolExecutor(cores()) as pool:  # NumPy and SciPy let go of the interpreter
        jobs = [pool.submit(measure, *pair) for pair in columns]
        measured = np.stack([job.result() for job in jobs], axis=1)
    return measured[..., 0], measured[..., 1:]


def auroc_samples(labels, scores, drawn, codes) -> tuple[np.ndarray, np.ndarray]:
    """The AUROC of `resample` alone: (14,) and (14, resamples)."""
    points, samples = resample(labels, scores, drawn, codes)
    return points[0], samples[0]


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
    labels = np.asarray(labels)
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)
    points, samples = resample(labels, scores, drawn, codes)
    behind = patients_behind(labels, codes)
    columns = {}
    for name, prefix, values, resampled in zip(
        ("auroc", "ap"), ("", "ap_"), points, samples, strict=True
    ):
        values = with_mean(values)
        low, high = interval_of(values, with_mean(resampled), behind, share=True)
        columns |= {name: values, f"{prefix}low": low, f"{prefix}high": high}
    for name, value in (("positives", 1), ("negatives", 0)):
        counts = (labels == value).sum(axis=0)
        columns[name] = np.append(counts, counts.sum())
    table = table_of_findings(columns)
    # Of 14 findings the bias of each adds up, and chance does not.
    table.loc["mean", ["ap_low", "ap_high"]] = np.nan
    findings = table.drop(index="mean")
    undefined = findings["auroc"].isna()
    if undefined.any():
        names = ", ".join(findings.index[undefined])
        log.info("AUROC is undefined, one class only, for: %s", names)
    if (too_few := ~undefined & findings["low"].isna()).any():
        names = ", ".join(findings.index[too_few])
        log.info("no interval, under %d patients a class, for: %s", FEWEST_PATIENTS, names)
    return table


def in_words(row) -> str:
    """ "0.842 (0.830 to 0.853)": a row of `bootstrap_auroc`, or of a `metrics.json`, for a sentence."""
    values = [np.nan if row[name] is None else row[name] for name in ("auroc", "low", "high")]
    return with_interval(*values, without="too few patients for an interval")


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
        parts = ", ".join(predictions["part"].unique())
        raise DataError(f"the predictions have no part {part!r}. Name one of their parts: {parts}.")
    return rows, *_matrices(rows)


def judge(
    predictions: pd.DataFrame, *, part: str = "test", resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """`bootstrap_auroc` of one part of a `predictions.parquet` table."""
    rows, labels, scores = part_of(predictions, part)
    patients = rows["patient"].to_numpy()
    return bootstrap_auroc(labels, scores, patients, resamples=resamples, seed=seed)


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
        As of `paired_bootstrap`, with the columns auroc, other, difference, low, high, p and
        p_holm. NaN as in `bootstrap_auroc`.
    """
    table = paired_bootstrap(
        auroc_samples, labels, scores, others, patients, resamples=resamples, seed=seed
    )
    return table.rename(columns={"value": "auroc"})


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
    images, other_images = pd.Index(rows["image"]), pd.Index(other_rows["image"])
    if len(only := images.symmetric_difference(other_images)):
        raise DataError(
            f"{len(only)} images of part {part!r} are in one of the two tables only, for instance "
            f"{only[0]!r}. A paired comparison needs scores of the same images: score those that "
            "are missing."
        )
    order = other_images.get_indexer(images)
    if not np.array_equal(labels, other_labels[order], equal_nan=True):
        raise DataError(
            "the two tables have other labels for the same images. Judge both against one data "
            "folder."
        )
    patients, others = rows["patient"].to_numpy(), other_scores[order]
    return paired_difference(labels, scores, others, patients, resamples=resamples, seed=seed)


def subgroup_auroc(predictions: pd.DataFrame, groups: np.ndarray, *, seed: int = 0) -> pd.DataFrame:
    """Mean AUROC in each group of images, over the same findings, with intervals over patients.

    Parameters
    ----------
    predictions : DataFrame, as rows of `predictions.parquet`
    groups : (n,)
        Name of the group of each row.

    Returns
    -------
    DataFrame
        Index group; columns images, patients, findings, auroc, low, high. The mean is over the
        `findings` that have `FEWEST_PATIENTS` patients of each class in every group that has any
        such finding. A group without one is too small to speak: NaN.
    """
    labels, scores = _matrices(predictions)
    patients, names = predictions["patient"].to_numpy(), pd.Series(np.asarray(groups))
    inside = {name: (names == name).to_numpy() for name in sorted(names.unique())}
    enough = {name: enough_patients(labels[own], patients[own]) for name, own in inside.items()}
    speaking = [findings for findings in enough.values() if findings.any()]
    common = np.all(speaking, axis=0) if speaking else np.zeros(len(FINDINGS), bool)
    table = {}
    for name, own in inside.items():
        shared = common & enough[name]
        its_labels = np.where(shared, labels[own], np.nan)
        drawn, codes = draw_patients(patients[own], resamples=1000, seed=seed)
        points, samples = map(with_mean, auroc_samples(its_labels, scores[own], drawn, codes))
        low, high = interval_of(points, samples, patients_behind(its_labels, codes), share=True)
        counts = {"images": own.sum(), "patients": len(drawn), "findings": shared.sum()}
        table[name] = counts | {"auroc": points[-1], "low": low[-1], "high": high[-1]}
    whole = dict.fromkeys(("images", "patients", "findings"), int)
    return pd.DataFrame.from_dict(table, orient="index").astype(whole).rename_axis("group")


def _matrices(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores (n, 14) of rows of `predictions.parquet`."""
    kinds = ([f"{kind}_{finding}" for finding in FINDINGS] for kind in ("label", "score"))
    labels, scores = (rows[columns].to_numpy(np.float64) for columns in kinds)
    return labels, scores
