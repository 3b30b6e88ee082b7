"""Are the scores probabilities? Reliability, calibration error and Brier score, and what makes them
better.

A calibration is fitted on the validation part alone; the test part says what it was worth. Like
operating points it goes with the weights, as a plain dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import GroupKFold

from chexlib.errors import ConfigError
from chexlib.evaluation.intervals import (
    FEWEST_PATIENTS,
    LEVEL,
    draw_patients,
    enough_patients,
    interval_of,
    paired_bootstrap,
    patients_behind,
    table_of_findings,
    with_mean,
)
from chexlib.findings import FINDINGS

METHODS = ("temperature", "isotonic")
BINS = 10
SMALLEST = 1e-7  # probabilities are kept this far from 0 and 1, where logits are infinite
RANGE = (0.05, 20.0)  # of temperatures
ISOTONIC_PATIENTS = 20  # of each class, below which a curve of one finding fits noise


def reliability_curve(labels: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    """What was predicted and what was so, in bins of equally many images of one finding, or of
    several pooled.

    Parameters
    ----------
    labels, scores : arrays of one shape; labels 1, 0 or NaN, which are left out; scores in 0..1

    Returns
    -------
    DataFrame
        A row a bin, from low scores to high: predicted (mean score), observed (share of positives),
        images, positives. Equal scores may fall into two bins, as equally many images are wanted in
        each (Nguyen and O'Connor 2015).
    """
    labels, scores = np.ravel(labels).astype(float), np.ravel(scores)
    told = ~np.isnan(labels)
    table = pd.DataFrame({"predicted": scores[told], "observed": labels[told]})
    bins = table.groupby(_bin(scores[told]))
    counts = bins["observed"].agg(images="size", positives="sum")
    return pd.concat([bins.mean(), counts], axis=1).rename_axis("bin")


def calibration_error(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the scores are from probabilities: calibration error and Brier score of each finding
    and their means.

    Parameters
    ----------
    labels, scores : (n, 14) in the order of `FINDINGS`; a label may be NaN
    patients : (n,)

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns rms, rms_low, rms_high, ece, ece_chance, brier,
        brier_low, brier_high, positives, images. Findings without `FEWEST_PATIENTS` patients of
        each class have no interval.

        All are of the distances of predicted and observed in the bins of `reliability_curve`. `ece`
        is their mean without sign. Perfect probabilities have one above 0 too, about `ece_chance`,
        from the standard error of each bin: it is biased, and so has no interval. `rms` is the root
        of their mean square, less what chance adds to that (Broecker 2012; Kumar, Liang and Ma
        2019); 0 where chance explains it all. Its interval holds the mean squares q that the one
        found does not contradict: (found - q)^2 <= z^2 variance(q) (Wilson 1927), where variance(q)
        = 2 trace(S^2) + 4 q s, S is the covariance of the bins over patients and s the variance
        along the distances found. It begins at 0 where the scores may be perfect.
    """
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)
    behind = patients_behind(labels, codes)
    told = ~np.isnan(labels)
    gaps = [_gaps(y, s, codes, len(drawn)) for y, s in zip(labels.T, scores.T, strict=True)]
    # A finding without labels has no part in the mean.
    judged = [gaps[k] for k in np.flatnonzero(told.any(axis=0))]
    together = np.hstack(judged) / np.sqrt(len(judged)) if judged else gaps[0]
    squares = np.array([_mean_square(own) for own in (*gaps, together)])
    squares[behind < FEWEST_PATIENTS, 1:] = np.nan
    squares[squares <= 0] = 0.0  # chance explains it all
    rms, rms_low, rms_high = np.sqrt(squares).T
    distances = np.array([np.abs(own.sum(axis=0)).sum() / np.sqrt(BINS) for own in gaps])
    # The mean of |x| of a normal x around 0 is sqrt(2 / pi) of its standard deviation.
    chance = np.array([np.sqrt(2 / np.pi / BINS * np.diag(_covariance(own))).sum() for own in gaps])
    points, samples = map(with_mean, brier_scores(labels, scores, drawn, codes))
    brier_low, brier_high = interval_of(points, samples, behind)
    positives, images = (labels == 1).sum(axis=0), told.sum(axis=0)
    return table_of_findings(
        {
            "rms": rms,
            "rms_low": rms_low,
            "rms_high": rms_high,
            "ece": with_mean(distances),
            "ece_chance": with_mean(chance),
            "brier": points,
            "brier_low": np.maximum(brier_low, 0),
            "brier_high": brier_high,
            "positives": np.append(positives, positives.sum()),
            "images": np.append(images, images.sum()),
        }
    )


def brier_difference(
    labels: np.ndarray,
    scores: np.ndarray,
    others: np.ndarray,
    patients: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Brier score of `scores` minus that of `others` on the same images: below 0 where `scores` are
    better.

    The Brier score is proper: no scores have a lower one, on average, than the true probabilities.

    Parameters
    ----------
    labels, scores, others : (n, 14), in the order of `FINDINGS`; a label may be NaN
    patients : (n,)

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns difference, low, high, p and p_holm, as of
        `paired_bootstrap`.
    """
    labels, scores, others = (np.asarray(a, np.float64) for a in (labels, scores, others))
    table = paired_bootstrap(
        brier_scores, labels, scores, others, patients, resamples=resamples, seed=seed
    )
    return table.drop(columns=["value", "other"])


def brier_scores(
    labels: np.ndarray, scores: np.ndarray, drawn: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared distance of score and label of all findings, (14,), and of each resample, (14,
    resamples).

    `drawn` and `codes` are those of `draw_patients`.
    """
    told = ~np.isnan(labels)
    squares = np.where(told, (labels - scores) ** 2, 0.0)
    lost, images = np.zeros((2, len(drawn), labels.shape[1]))  # of each patient
    np.add.at(lost, codes, squares)
    np.add.at(images, codes, told)
    with np.errstate(invalid="ignore", divide="ignore"):
        return lost.sum(axis=0) / images.sum(axis=0), (lost.T @ drawn) / (images.T @ drawn)


@dataclass(frozen=True)
class Calibration:
    """What turns a network's scores into better probabilities; `fit_calibration` makes it.

    Attributes
    ----------
    method : {"temperature", "isotonic"}
    curves : dict
        Finding to {"temperature": T}, or to {"scores": [...], "probabilities": [...]}, a broken
        line. A finding that is not in it is left as it is: the validation part had too few
        patients.
    """

    method: str
    curves: dict[str, dict]

    def __post_init__(self):
        _require(self.method)
        if unknown := sorted(set(self.curves) - set(FINDINGS)):
            raise ConfigError(
                f"the calibration has unknown findings {', '.join(unknown)}. Fit it anew."
            )
        for finding, curve in self.curves.items():
            if not _is_curve(self.method, curve):
                raise ConfigError(
                    f"{finding}: {curve!r:.200} is no {self.method} calibration. Fit it anew."
                )

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of scores (n, 14) in the order of `FINDINGS`; NaN stays NaN."""
        scores = np.array(scores, np.float64)
        for finding, curve in self.curves.items():
            column = scores[:, FINDINGS.index(finding)]
            if self.method == "temperature":
                column[:] = expit(_logit(column) / curve["temperature"])
            else:
                column[:] = np.interp(column, curve["scores"], curve["probabilities"])
        return scores

    def to_dict(self) -> dict:
        """Plain values, for JSON and the weights' card."""
        return {"method": self.method, "curves": self.curves}

    @classmethod
    def from_dict(cls, values: Mapping) -> Calibration:
        """What `to_dict` gave; anything else is a ConfigError."""
        try:
            return cls(values["method"], dict(values["curves"]))
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{values!r:.200} is no calibration ({error}). Use what `Calibration.to_dict` gave."
            ) from error


def fit_calibration(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, *, method: str = "temperature"
) -> Calibration:
    """Fit a calibration to the validation part.

    Parameters
    ----------
    labels, scores : (n, 14) of the validation part, never of the test part; a label may be NaN
    patients : (n,)
    method : {"temperature", "isotonic"}
        "temperature": the logits of all findings divided by one T, of maximum likelihood (Guo et
        al. 2017, 4.2). "isotonic": for each finding the rising step curve that fits best (Zadrozny
        and Elkan 2002). That is many numbers, so findings with fewer than `ISOTONIC_PATIENTS`
        patients of a class are left as they are.
    """
    _require(method)
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    told = ~np.isnan(labels)
    if method == "temperature":
        temperature = _temperature(labels[told], scores[told])
        return Calibration(method, {finding: temperature for finding in FINDINGS})
    curves = {}
    for k in np.flatnonzero(enough_patients(labels, patients, ISOTONIC_PATIENTS)):
        rows = told[:, k]
        curves[FINDINGS[k]] = _isotonic(labels[rows, k], scores[rows, k])
    return Calibration(method, curves)


def compare_calibrations(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> pd.Series:
    """Which calibration to carry, by the validation part alone: each is judged on patients it was
    not fitted to.

    Parameters
    ----------
    labels, scores, patients : as of `fit_calibration`

    Returns
    -------
    Series
        The Brier score over all labels of "as trained" and each of `METHODS`; the least is the one
        to use. Of equal ones the first, which changes less. Of a single patient nothing can be held
        out: only "as trained" has a score then, the others NaN. Brier and not ECE, which scores
        without any skill can have as low.
    """
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    patients = np.asarray(patients)
    judged = {"as trained": scores} | {method: np.full_like(scores, np.nan) for method in METHODS}
    folds = min(5, len(np.unique(patients)))
    for kept, held in GroupKFold(folds).split(scores, groups=patients) if folds > 1 else ():
        for method in METHODS:
            fitted = fit_calibration(labels[kept], scores[kept], patients[kept], method=method)
            judged[method][held] = fitted(scores[held])
    squares = pd.DataFrame({name: np.ravel((labels - own) ** 2) for name, own in judged.items()})
    return squares.mean().rename("brier")


def _require(method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"there is no calibration {method!r}. Use one of {', '.join(METHODS)}.")


def _is_curve(method: str, curve) -> bool:
    """A temperature above 0; or scores that rise, and to each of them a probability that does not
    fall.
    """
    needed = ("temperature",) if method == "temperature" else ("scores", "probabilities")
    if not isinstance(curve, Mapping) or set(curve) != set(needed):
        return False
    try:
        values = [np.asarray(curve[name]) for name in needed]
    except ValueError:  # lists of different lengths in it
        return False
    if not all(array.dtype.kind in "if" and np.isfinite(array).all() for array in values):
        return False
    if method == "temperature":
        return values[0].ndim == 0 and values[0] > 0
    scores, probabilities = values
    rising = scores.ndim == 1 and scores.shape == probabilities.shape and scores.size > 0
    rising = rising and (np.diff(scores) >= 0).all() and (np.diff(probabilities) >= 0).all()
    return bool(rising and probabilities[0] >= 0 and probabilities[-1] <= 1)


def _temperature(labels: np.ndarray, scores: np.ndarray) -> dict:
    sign, logits = 2 * labels - 1, _logit(scores)

    def loss(log_temperature):
        return np.logaddexp(0, -sign * logits * np.exp(-log_temperature)).mean()

    best = minimize_scalar(loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-6})
    return {"temperature": float(np.exp(best.x))}


def _isotonic(labels: np.ndarray, scores: np.ndarray) -> dict:
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
    return {"scores": fitted.X_thresholds_.tolist(), "probabilities": fitted.y_thresholds_.tolist()}


def _logit(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(scores, SMALLEST, 1 - SMALLEST))


def _bin(scores: np.ndarray) -> np.ndarray:
    """The bin of each image: as many images in each as can be."""
    n = len(scores)
    bins = np.empty(n, int)
    bins[np.argsort(scores, kind="stable")] = np.arange(n) * BINS // max(n, 1)
    return bins


def _gaps(labels, scores, codes, patients: int) -> np.ndarray:
    """What each patient adds to the distance of observed and predicted in each bin of a finding,
    (patients, bins).

    In such units that the squares of the bins' sums add up to the mean square over the bins.
    """
    told = ~np.isnan(labels)
    labels, scores, codes = labels[told], scores[told], codes[told]
    gaps = np.zeros((patients, BINS))
    np.add.at(gaps, (codes, _bin(scores)), labels - scores)
    return gaps * np.sqrt(BINS) / len(labels) if len(labels) else np.full_like(gaps, np.nan)


def _covariance(gaps: np.ndarray) -> np.ndarray:
    """Of the sums over patients of `_gaps`, (bins, bins)."""
    patients, bins = gaps.shape
    if patients < 2:
        return np.zeros((bins, bins))
    return np.cov(gaps, rowvar=False) * patients


def _mean_square(gaps: np.ndarray) -> tuple[float, float, float]:
    """Mean squared distance of predicted and observed less what chance adds, low and high: see
    `calibration_error`.
    """
    distances, covariance = gaps.sum(axis=0), _covariance(gaps)
    z2 = norm.ppf((1 + LEVEL) / 2) ** 2
    total = distances @ distances
    excess = total - np.trace(covariance)
    along = distances @ covariance @ distances / total if total > 0 else 0.0
    middle = excess + 2 * z2 * along
    spread = middle**2 - excess**2 + 2 * z2 * (covariance**2).sum()
    reach = np.sqrt(np.maximum(spread, 0))
    return excess, middle - reach, middle + reach
