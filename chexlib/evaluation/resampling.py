"""Resampling patients, not images: how uncertain a value is that was measured on images of the same people."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import t

FEWEST_PATIENTS = 5  # of each class, below which resampling says nothing about how uncertain an AUROC is


def draw_patients(patients: np.ndarray, *, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient is drawn in each resample, (patients, resamples), and the row of each image's patient.

    Patients, not images, are drawn with replacement (Field and Welsh 2007).
    """
    codes, names = pd.factorize(np.asarray(patients))
    n = len(names)
    drawn = np.random.default_rng(seed).integers(0, n, (n, resamples))
    cells = drawn * resamples + np.arange(resamples)
    times = np.bincount(cells.ravel(), minlength=n * resamples).reshape(n, resamples)
    return times.astype(np.float64), codes


def patients_behind(labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Patients of the smaller class of each finding, and for their mean the median of those with enough: (15,) int."""
    fewer = np.array([min(len(np.unique(codes[y == value])) for value in (0, 1)) for y in np.asarray(labels).T])
    enough = fewer[fewer >= FEWEST_PATIENTS]
    return np.append(fewer, int(np.median(enough)) if len(enough) else 0)


def interval_of(
    points: np.ndarray, samples: np.ndarray, patients: np.ndarray, level: float, *, share: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval with the standard error of resamples, NaN below `FEWEST_PATIENTS` patients.

    Percentiles of resamples hold the truth in 88 % instead of 95 % of trials where 16 patients have a finding. What
    helps is Student's t for the few patients, and for what lies between 0 and 1, a `share`, Wilson's interval with as
    many images as its standard error is worth (benchmarks/coverage.py). At an AUROC of 0.95 with some 15 patients the
    truth is still held in about 89 % only.

    Parameters
    ----------
    points : (..., rows)
    samples : (..., rows, resamples)
    patients : (rows,), as `patients_behind` counts them
    """
    quantile, error = t.ppf((1 + level) / 2, np.maximum(patients, 2) - 1), standard_error(samples, patients)
    if share:
        with np.errstate(invalid="ignore", divide="ignore"):
            worth = points * (1 - points) / error**2
        edges = wilson(points, np.where(error > 0, worth, np.maximum(patients, 1)), quantile)
    else:
        edges = points - quantile * error, points + quantile * error
    return tuple(np.where(patients >= FEWEST_PATIENTS, edge, np.nan) for edge in edges)


def with_interval(value: float, low: float, high: float, form: str = ".3f", *, without: str = "no interval") -> str:
    """ "0.842 (0.830 to 0.853)", for a sentence; in words where there is no interval, or no value."""
    if np.isnan(value):
        return "undefined"
    return f"{value:{form}} ({without if np.isnan([low, high]).any() else f'{low:{form}} to {high:{form}}'})"


def wilson(share, n, quantile) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval (1927) of a share of `n` independent things; its end is the share itself at 0 and 1."""
    centre = (share + quantile**2 / (2 * n)) / (1 + quantile**2 / n)
    half = quantile / (1 + quantile**2 / n) * np.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2))
    return np.where(share == 0, 0.0, centre - half), np.where(share == 1, 1.0, centre + half)


def standard_error(samples: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Standard deviation over resamples, (..., rows), made larger for few patients as that of a sample is."""
    n = np.maximum(patients, 2)
    kept = np.where((patients >= FEWEST_PATIENTS)[:, None], samples, 0.0)  # no warning where all are NaN
    return np.nanstd(kept, axis=-1) * np.sqrt(n / (n - 1))


def mean_of(values: np.ndarray) -> np.ndarray:
    """The mean over the findings, axis 1, that are defined: NaN if none is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)
