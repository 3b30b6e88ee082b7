"""Operating points: from which score on a finding is called, chosen on validation; what that means
on the test part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm, t
from sklearn.metrics import roc_curve

from chexlib.errors import ConfigError, WeightsError
from chexlib.evaluation.calibration import Calibration
from chexlib.evaluation.intervals import FEWEST_PATIENTS, LEVEL, enough_patients, wilson
from chexlib.findings import FINDINGS

RULES = ("youden", "sensitivity", "specificity")
RATES = {  # the cell of the confusion that is a success, and the one that is not
    "sensitivity": ("tp", "fn"),
    "specificity": ("tn", "fp"),
    "ppv": ("tp", "fp"),
    "npv": ("tn", "fn"),
}


@dataclass(frozen=True)
class OperatingPoints:
    """Thresholds on the network's own scores, before any calibration: positive is a score of at
    least so much.

    Attributes
    ----------
    sensitivity, specificity : float
        What the rules of these names ask for.
    thresholds : dict
        Finding to {"youden": t, "sensitivity": t, "specificity": t}. A finding that is not in it
        has none: the validation part had too few patients of it.
    """

    sensitivity: float
    specificity: float
    thresholds: dict[str, dict[str, float]]

    def __post_init__(self):
        for name in ("sensitivity", "specificity"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(
                    f"{name}={value!r} is not accepted. Use a number between 0 and 1."
                )
        for finding, points in self.thresholds.items():
            complete = isinstance(points, Mapping) and set(points) == set(RULES)
            if finding not in FINDINGS or not complete or not all(map(_is_number, points.values())):
                raise ConfigError(
                    f"{finding!s:.80}: {points!r:.200} are no operating points. Needed, as "
                    f"numbers: {', '.join(RULES)}."
                )

    def to_dict(self) -> dict:
        """Plain values, for JSON and the weights' card."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> OperatingPoints:
        """What `to_dict` gave; anything else is a ConfigError."""
        try:
            return cls(values["sensitivity"], values["specificity"], dict(values["thresholds"]))
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{values!r:.200} are no operating points ({error}). Use what "
                "`OperatingPoints.to_dict` gave."
            ) from error


def _is_number(value) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def choose_points(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    sensitivity: float = 0.9,
    specificity: float = 0.9,
) -> OperatingPoints:
    """Choose the thresholds of each finding on the validation part.

    Parameters
    ----------
    labels, scores : (n, 14) of the validation part, never of the test part; a label may be NaN
    patients : (n,)
        Findings without `FEWEST_PATIENTS` patients of each class get no threshold.
    sensitivity, specificity : float
        The rule "sensitivity" takes the highest threshold with at least this sensitivity,
        "specificity" the lowest with at least this specificity; "youden" the one with the largest
        sum of both (Youden 1950).
    """
    OperatingPoints(sensitivity, specificity, {})  # refuses what is no rate
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    thresholds = {}
    for k in np.flatnonzero(enough_patients(labels, patients)):
        told = ~np.isnan(labels[:, k])
        false, true, at = roc_curve(labels[told, k], scores[told, k], drop_intermediate=False)
        # Above every score; scikit-learn has infinity, which is no JSON.
        at[0] = np.nextafter(at[1], np.inf)
        sensitive, specific = true >= sensitivity - 1e-12, 1 - false >= specificity - 1e-12
        thresholds[FINDINGS[k]] = {
            "youden": float(at[np.argmax(true - false)]),
            "sensitivity": float(at[sensitive][0]),  # thresholds fall: the highest one
            "specificity": float(at[specific][-1]),
        }
    return OperatingPoints(sensitivity, specificity, thresholds)


def rates_at(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, points: OperatingPoints
) -> pd.DataFrame:
    """Sensitivity, specificity, PPV and NPV of chosen points on other images, with intervals and
    counts.

    Parameters
    ----------
    labels, scores : (n, 14), of the test part; a label may be NaN
    patients : (n,)

    Returns
    -------
    DataFrame
        A row per finding and rule (those of `points`): threshold, tp, fp, fn, tn (images), and for
        each rate its value, _low and _high, as of `share`. NaN where nothing is counted. The PPV
        and NPV hold for this part's share of positives alone.
    """
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    codes, rows = pd.factorize(np.asarray(patients))[0], []
    for finding, chosen in points.thresholds.items():
        k = FINDINGS.index(finding)
        positive, negative = labels[:, k] == 1, labels[:, k] == 0
        for rule, threshold in chosen.items():
            called = scores[:, k] >= threshold
            confusion = {
                "tp": positive & called,
                "fp": negative & called,
                "fn": positive & ~called,
                "tn": negative & ~called,
            }
            row = {"finding": finding, "rule": rule, "threshold": threshold}
            row |= {cell: images.sum() for cell, images in confusion.items()}
            for rate, (success, other) in RATES.items():
                counted = confusion[success] | confusion[other]
                value, low, high = share(confusion[success][counted], codes[counted])
                row |= {rate: value, f"{rate}_low": low, f"{rate}_high": high}
            rows.append(row)
    names = [f"{rate}{edge}" for rate in RATES for edge in ("", "_low", "_high")]
    columns = ["finding", "rule", "threshold", "tp", "fp", "fn", "tn", *names]
    return pd.DataFrame(rows, columns=columns).set_index(["finding", "rule"])


def share(successes: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """A share of images, and Wilson's interval with as many independent images as the patients are
    worth.

    Parameters
    ----------
    successes : (images,) bool
    codes : (images,) int
        Says whose each image is.

    Returns
    -------
    share, low, high : float
        NaN without images; no interval below `FEWEST_PATIENTS` patients. The images are worth share
        (1 - share) / variance (Korn and Graubard 1998), and never more than there are; the variance
        is that of leaving out one patient at a time (Tukey 1958). At a share of 0 or 1, where that
        says nothing, they are worth the patients. The reach is Student's, with the effective number
        of patients (Kish 1965); with one image a patient the variance is that of the share itself,
        and the interval the plain Wilson's.
    """
    n = len(codes)
    if not n:
        return np.nan, np.nan, np.nan
    counts = pd.Series(successes).groupby(codes).agg(["sum", "size"])
    hits, images = counts["sum"].to_numpy(), counts["size"].to_numpy()
    patients, p = len(images), hits.sum() / n
    if patients < FEWEST_PATIENTS:
        return float(p), np.nan, np.nan
    worth, end = n, (1 + LEVEL) / 2
    reach = norm.ppf(end)
    if n > patients:
        without = (hits.sum() - hits) / (n - images)
        variance = ((without - p) ** 2).sum() * (patients - 1) / patients
        worth = min(n, p * (1 - p) / variance) if variance > 0 else patients
        reach = t.ppf(end, max(n**2 / (images**2).sum() - 1, 1))
    low, high = wilson(p, worth, reach)
    return float(p), float(low), float(high)


def read_by_card(
    scores: pd.DataFrame, card: Mapping, *, weights: str | Path = "the card of the weights"
) -> tuple[pd.DataFrame, dict[str, dict[str, list[str]]]]:
    """What the card of the weights makes of the network's scores.

    Parameters
    ----------
    scores : DataFrame
        (images, 14), one column a finding, as the network gives them.
    card : dict
        With "calibration" and "operating_points", or without: `models.weights.extend_card` puts
        them there.
    weights : path, optional
        For messages.

    Returns
    -------
    probabilities : DataFrame
        Calibrated if the card knows how, else the scores.
    called : dict
        Image to rule to the findings whose score reaches the rule's threshold; empty without
        operating points.

    Raises
    ------
    WeightsError
        The card has something else in their places.
    """
    calibration, points = card.get("calibration"), card.get("operating_points")
    try:
        calibration = calibration and Calibration.from_dict(calibration)
        points = points and OperatingPoints.from_dict(points)
    except ConfigError as error:
        raise WeightsError(f"{weights} cannot be followed: {error}") from error
    probabilities, called = scores, {}
    if calibration:
        findings = list(FINDINGS)
        calibrated = calibration(scores[findings].to_numpy())
        probabilities = pd.DataFrame(calibrated, index=scores.index, columns=findings)
    if points:
        for image, row in scores.iterrows():
            called[image] = {rule: [] for rule in RULES}
            for finding, thresholds in points.thresholds.items():
                for rule in RULES:
                    if float(row[finding]) >= thresholds[rule]:
                        called[image][rule].append(finding)
    return probabilities, called
