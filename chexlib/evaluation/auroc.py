"""AUROC per finding, with intervals that respect that a patient's images are not independent."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from chexlib.errors import DataError
from chexlib.findings import FINDINGS

FEWEST_PATIENTS = 5  # of each class, below which resampling says nothing about how uncertain an AUROC is
log = logging.getLogger(__name__)


def auroc(labels: np.ndarray, scores: np.ndarray, *, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve of one finding, for one or many sets of image weights.

    The Mann-Whitney form, ties counted half (Hanley and McNeil 1982).

    Parameters
    ----------
    labels : (n,) 0 or 1
    scores : (n,) float, higher means more likely
    weights : (n,) or (resamples, n) float, optional
        How often each image counts; 1 if not given.

    Returns
    -------
    float or (resamples,) float64
        NaN where one class has no weight: AUROC is not defined there.
    """
    scores = np.asarray(scores)
    if not np.isfinite(scores).all():
        raise DataError(f"{(~np.isfinite(scores)).sum()} scores are not finite. Did the training diverge?")
    order = np.argsort(scores, kind="stable")
    positive = np.asarray(labels)[order] == 1
    weights = np.ones(len(order)) if weights is None else np.asarray(weights, np.float64)
    one, weights = weights.ndim == 1, np.atleast_2d(weights)[:, order]
    ties = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    up = np.add.reduceat(weights * positive, ties, axis=1)
    down = np.add.reduceat(weights * ~positive, ties, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    pairs = up.sum(1) * down.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = np.where(pairs > 0, (up * below).sum(1) / pairs, np.nan)
    return float(area[0]) if one else area


def bootstrap_auroc(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of each finding and their mean, with percentile intervals from resampling patients.

    Parameters
    ----------
    labels, scores : (n, 14), in the order of `FINDINGS`
    patients : (n,)
        Whose image each row is; patients, not images, are drawn with replacement (Field and Welsh 2007).
    resamples : int
    level : float
        Coverage of the interval.

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns auroc, low, high, positives, negatives. A finding with one class
        only has NaN and stays in the table; the mean is over the others. Below `FEWEST_PATIENTS` patients with, or
        without, a finding its interval is NaN: resampling one positive again and again looks certain, and is not.
        The mean has an interval if a finding has one.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    codes, names = pd.factorize(np.asarray(patients))
    generator = np.random.default_rng(seed)
    rows, chunk = [], 100
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    points = np.array([auroc(y, s) for y, s in zip(labels.T, scores.T, strict=True)])
    samples = np.stack(
        [
            np.concatenate([auroc(y, s, weights=drawn[i : i + chunk][:, codes]) for i in range(0, resamples, chunk)])
            for y, s in zip(labels.T, scores.T, strict=True)
        ]
    )
    defined = ~np.isnan(points)
    edges = [(1 - level) / 2, (1 + level) / 2]
    for name, point, sample, y in zip(FINDINGS, points, samples, labels.T, strict=True):
        patients_of = [len(np.unique(codes[y == value])) for value in (0, 1)]
        low, high = np.nanquantile(sample, edges) if min(patients_of) >= FEWEST_PATIENTS else (np.nan, np.nan)
        rows.append((name, point, low, high, int((y == 1).sum()), int((y == 0).sum())))
    means = np.array([_mean(column) for column in samples[defined].T]) if defined.any() else np.array([np.nan])
    low, high = np.nanquantile(means, edges) if any(np.isfinite(row[2]) for row in rows) else (np.nan, np.nan)
    rows.append(("mean", _mean(points), low, high, int((labels == 1).sum()), int((labels == 0).sum())))
    table = pd.DataFrame(rows, columns=["finding", "auroc", "low", "high", "positives", "negatives"])
    if not defined.all():
        missing = ", ".join(np.array(FINDINGS)[~defined])
        log.info("AUROC is undefined, one class only, for: %s", missing)
    return table.set_index("finding")


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def in_words(row) -> str:
    """ "0.842 (0.830 to 0.853)": a row of `bootstrap_auroc`, or of a `metrics.json`, for a sentence."""
    area, low, high = (np.nan if row[name] is None else row[name] for name in ("auroc", "low", "high"))
    if np.isnan(area):
        return "undefined"
    return f"{area:.3f} " + ("(too few patients for an interval)" if np.isnan(low) else f"({low:.3f} to {high:.3f})")


def judge(predictions: pd.DataFrame, *, part: str = "test", resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """`bootstrap_auroc` of one part of a `predictions.parquet` table (columns patient, part, label_*, score_*)."""
    rows = predictions[predictions["part"] == part]
    if rows.empty:
        raise DataError(f"the predictions have no part {part!r} (parts: {', '.join(predictions['part'].unique())}).")
    labels, scores = (rows[[f"{kind}_{f}" for f in FINDINGS]].to_numpy() for kind in ("label", "score"))
    return bootstrap_auroc(labels, scores, rows["patient"].to_numpy(), resamples=resamples, seed=seed)
