"""Resampling patients, not images: how uncertain a value is that was measured on images of the same
people.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import t

# Of each class, below which resampling says nothing about how uncertain an AUROC is.
FEWEST_PATIENTS = 5
LEVEL = 0.95  # of every interval: how often it is to hold the truth
EDGE = 1e-4  # shares of resamples are kept this far from 0 and 1, where logits are infinite


def draw_patients(
    patients: np.ndarray, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient is drawn in each resample, (patients, resamples), and the row of each
    image's patient.

    Patients, not images, are drawn with replacement (Field and Welsh 2007).
    """
    codes, names = pd.factorize(np.asarray(patients))
    n = len(names)
    drawn = np.random.default_rng(seed).integers(0, n, (n, resamples))
    cells = drawn * resamples + np.arange(resamples)
    times = np.bincount(cells.ravel(), minlength=n * resamples).reshape(n, resamples)
    return times.astype(np.float64), codes


def patients_behind(labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How many patients speak for each finding, and for the mean the median of those with enough:
    (15,) float.

    Of the smaller class, and as `effective_number` counts them: one patient with most of the
    positive images is worth little more than one patient.
    """
    fewer = [
        min(effective_number(codes[y == value]) for value in (0, 1)) for y in np.asarray(labels).T
    ]
    enough = [patients for patients in fewer if patients >= FEWEST_PATIENTS]
    return np.append(fewer, np.median(enough) if enough else 0.0)


def effective_number(codes: np.ndarray) -> float:
    """Patients with equally many images that are worth as much as these (Kish 1965); 0 without
    images.

    `codes` (images,) says whose each image is.
    """
    images = np.unique(codes, return_counts=True)[1].astype(float)
    return float(images.sum() ** 2 / (images**2).sum()) if len(images) else 0.0


def interval_of(
    points: np.ndarray, samples: np.ndarray, patients: np.ndarray, *, share: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval with the standard error of resamples, NaN below `FEWEST_PATIENTS`
    patients.

    What lies between 0 and 1, a `share`, has it on the scale of logits: an AUROC that is high by
    luck seems more certain than it is, and the logit undoes that. At 0 or 1, where no resample
    differs, it is Wilson's with as many cases as there are patients. `benchmarks/coverage.py`
    measures how often these intervals hold the truth.

    Parameters
    ----------
    points : (..., rows)
    samples : (..., rows, resamples)
    patients : (rows,), as `patients_behind` counts them
    """
    reach = t.ppf((1 + LEVEL) / 2, np.maximum(patients, 2) - 1)
    if share:
        logits, centre = (logit(np.clip(x, EDGE, 1 - EDGE)) for x in (samples, points))
        error = standard_error(logits, patients)
        edges = expit(centre - reach * error), expit(centre + reach * error)
        flat = wilson(points, np.maximum(patients, 1), reach)
        edges = [np.where(error > 1e-9, edge, end) for edge, end in zip(edges, flat, strict=True)]
        edges = np.fmin(edges[0], points), np.fmax(edges[1], points)
    else:
        error = standard_error(samples, patients)
        edges = points - reach * error, points + reach * error
    known = (patients >= FEWEST_PATIENTS) & ~np.isnan(points)
    return tuple(np.where(known, edge, np.nan) for edge in edges)


def with_interval(
    value: float, low: float, high: float, form: str = ".3f", *, without: str = "no interval"
) -> str:
    """ "0.842 (0.830 to 0.853)", for a sentence; in words where there is no interval, or no value."""
    if np.isnan(value):
        return "undefined"
    return f"{value:{form}} ({without if np.isnan([low, high]).any() else f'{low:{form}} to {high:{form}}'})"


def wilson(share, n, reach) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval (1927) of a share of `n` independent things; its end is the share itself at
    0 and 1.

    `reach` is the quantile of the normal distribution, or of Student's, at the interval's end.
    """
    centre = (share + reach**2 / (2 * n)) / (1 + reach**2 / n)
    half = reach / (1 + reach**2 / n) * np.sqrt(share * (1 - share) / n + reach**2 / (4 * n**2))
    return np.where(share == 0, 0.0, centre - half), np.where(share == 1, 1.0, centre + half)


def standard_error(samples: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Standard deviation over resamples, (..., rows), made larger for few patients as that of a
    sample is.
    """
    n = np.maximum(patients, 2)
    # No warning where all are NaN.
    kept = np.where((patients >= FEWEST_PATIENTS)[:, None], samples, 0.0)
    return np.nanstd(kept, axis=-1) * np.sqrt(n / (n - 1))


def mean_of(values: np.ndarray) -> np.ndarray:
    """The mean over the findings, axis 1, that are defined: NaN if none is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1)
