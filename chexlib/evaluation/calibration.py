"""Are the scores probabilities? Reliability, calibration error and Brier score, and what makes them better.

A calibration is fitted on the validation part alone; the test part says what it was worth. Like operating points it
goes with the weights, as a plain dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import GroupKFold

from chexlib.errors import ConfigError
from chexlib.evaluation.resampling import draw_patients, interval_of, mean_of, patients_behind
from chexlib.findings import FINDINGS

METHODS = ("temperature", "isotonic")
BINS = 10
SMALLEST = 1e-7  # probabilities are kept this far from 0 and 1, where logits are infinite
RANGE = (0.05, 20.0)  # of temperatures
ISOTONIC_PATIENTS = 20  # of each class, below which a curve of one finding fits noise


def reliability_curve(labels: np.ndarray, scores: np.ndarray, *, bins: int = BINS) -> pd.DataFrame:
    """What was predicted and what was so, in bins of equally many images of one finding, or of several pooled.

    Parameters
    ----------
    labels, scores : arrays of one shape; labels 1, 0 or NaN, which are left out; scores in 0..1

    Returns
    -------
    DataFrame
        A row a bin, from low scores to high: predicted (mean score), observed (share of positives), images, positives.
        Equal scores may fall into two bins, as equally many images are wanted in each (Nguyen and O'Connor 2015).
    """
    labels, scores = np.ravel(labels).astype(float), np.ravel(scores)
    known = ~np.isnan(labels)
    labels, scores = labels[known], scores[known]
    table = pd.DataFrame({"predicted": scores, "observed": labels, "positives": labels, "images": 1})
    means = {"predicted": "mean", "observed": "mean", "images": "sum", "positives": "sum"}
    return table.groupby(_bin(scores, bins)).agg(means).rename_axis("bin")


def calibration_error(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    bins: int = BINS,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Expected calibration error and Brier score of each finding and their means, with intervals over patients.

    Parameters
    ----------
    labels, scores : (n, 14) in the order of `FINDINGS`; a label may be NaN
    patients : (n,)

    Returns
    -------
    DataFrame
        Index the findings and "mean"; columns ece, ece_low, ece_high, ece_chance, brier, brier_low, brier_high,
        positives, images. ECE is the mean distance of predicted and observed over the bins of `reliability_curve`.
        Even perfect probabilities have one above 0 in a finite sample: `ece_chance` is what is to be expected of them,
        from the standard error of each bin. Findings without `FEWEST_PATIENTS` patients of each class have no interval.
    """
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    drawn, codes = draw_patients(patients, resamples=resamples, seed=seed)
    weights = np.hstack([np.ones((len(drawn), 1)), drawn])
    found = [_errors(y, s, codes, weights, bins) for y, s in zip(labels.T, scores.T, strict=True)]
    values = np.stack([errors for errors, _ in found], axis=1)
    chance = np.array([chance for _, chance in found])
    values = np.concatenate([values, mean_of(values)[:, None]], axis=1)
    points, samples = values[..., 0], values[..., 1:]
    low, high = interval_of(points, samples, patients_behind(labels, codes), level)
    chance = np.append(chance, mean_of(chance[None])[0])
    counts = [np.append(n, n.sum()).astype(int) for n in ((labels == 1).sum(0), (~np.isnan(labels)).sum(0))]
    low = np.maximum(low, 0)
    columns = [points[0], low[0], high[0], chance, points[1], low[1], high[1], *counts]
    names = ["ece", "ece_low", "ece_high", "ece_chance", "brier", "brier_low", "brier_high", "positives", "images"]
    return pd.DataFrame(dict(zip(names, columns, strict=True)), index=pd.Index([*FINDINGS, "mean"], name="finding"))


@dataclass(frozen=True)
class Calibration:
    """What turns a network's scores into better probabilities; `fit_calibration` makes it.

    Attributes
    ----------
    method : {"temperature", "isotonic"}
    curves : dict
        Finding to {"temperature": T}, or to {"scores": [...], "probabilities": [...]}, a broken line. A finding that
        is not in it is left as it is: the validation part had too few patients.
    """

    method: str
    curves: dict[str, dict]

    def __post_init__(self):
        _require(self.method)
        if unknown := sorted(set(self.curves) - set(FINDINGS)):
            raise ConfigError(f"the calibration has unknown findings {', '.join(unknown)}. Fit it anew.")
        for finding, curve in self.curves.items():
            if not _is_curve(self.method, curve):
                raise ConfigError(f"{finding}: {curve!r:.200} is no {self.method} calibration. Fit it anew.")

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
        "temperature": the logits of all findings divided by one T, of maximum likelihood (Guo et al. 2017, 4.2).
        "isotonic": for each finding the rising step curve that fits best (Zadrozny and Elkan 2002). That is many
        numbers, so findings with fewer than `ISOTONIC_PATIENTS` patients of a class are left as they are.
    """
    _require(method)
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    known = ~np.isnan(labels)
    if method == "temperature":
        fitted = _temperature(labels[known], scores[known])
        return Calibration(method, {finding: fitted for finding in FINDINGS})
    enough = patients_behind(labels, pd.factorize(np.asarray(patients))[0])[:-1] >= ISOTONIC_PATIENTS
    chosen = np.flatnonzero(enough)
    curves = {FINDINGS[i]: _isotonic(labels[known[:, i], i], scores[known[:, i], i]) for i in chosen}
    return Calibration(method, curves)


def compare_calibrations(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, *, folds: int = 5) -> pd.Series:
    """Which calibration to carry, by the validation part alone: each is judged on patients it was not fitted to.

    Parameters
    ----------
    labels, scores, patients : as of `fit_calibration`
    folds : int
        The patients are dealt into so many; each fold is calibrated by what was fitted to the others.

    Returns
    -------
    Series
        The Brier score over all labels of "as trained" and each of `METHODS`; the least is the one to use. Of
        equal ones the first, which changes less. Of a single patient nothing can be held out: only "as trained" has a
        score then, the others NaN. Brier and not ECE, which scores without any skill can have as low.
    """
    labels, scores, patients = np.asarray(labels, np.float64), np.asarray(scores, np.float64), np.asarray(patients)
    judged = {"as trained": scores} | {method: np.full_like(scores, np.nan) for method in METHODS}
    folds = min(folds, len(np.unique(patients)))
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
    """A temperature above 0; or scores that rise, and to each of them a probability that does not fall."""
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


def _bin(scores: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each image: as many images in each as can be."""
    place = np.empty(len(scores), int)
    place[np.argsort(scores, kind="stable")] = np.arange(len(scores)) * bins // max(len(scores), 1)
    return place


def _errors(labels, scores, codes, weights, bins) -> tuple[np.ndarray, float]:
    """ECE and Brier score of one finding for each column of weights, (2, columns), and the ECE of perfect scores."""
    known = ~np.isnan(labels)
    labels, scores, codes = labels[known], scores[known], codes[known]
    gaps, squares = np.zeros((len(weights), bins)), np.zeros((len(weights), 2))
    np.add.at(gaps, (codes, _bin(scores, bins)), labels - scores)
    np.add.at(squares, codes, np.column_stack([(labels - scores) ** 2, np.ones(len(labels))]))
    total, images = squares.T @ weights
    with np.errstate(invalid="ignore", divide="ignore"):
        gaps = gaps.T @ weights / images
        chance = np.sqrt(2 / np.pi) * gaps[:, 1:].std(axis=1).sum()  # the mean of |x| of a normal x around 0
        return np.stack([np.abs(gaps).sum(axis=0), total / images]), float(chance)
