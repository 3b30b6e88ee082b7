"""Operating points: from which score on a finding is called; and the interval of a share of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from chexlib.errors import ConfigError, WeightsError
from chexlib.evaluation.calibration import Calibration
from chexlib.evaluation.intervals import FEWEST_PATIENTS, LEVEL, wilson
from chexlib.findings import FINDINGS

RULES = ("youden", "sensitivity", "specificity")


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
                f"{values!r:.200} are not operating points ({error}). Use what "
                "`OperatingPoints.to_dict` gave."
            ) from error


def _is_number(value) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def share(successes: np.ndarray, patients: np.ndarray) -> tuple[float, float, float]:
    """A share of images, and Wilson's interval with as many independent images as the patients are
    worth.

    Parameters
    ----------
    successes : (images,) bool
    patients : (images,)
        Whose each image is.

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
    n = len(patients)
    if not n:
        return np.nan, np.nan, np.nan
    counts = pd.Series(successes).groupby(patients).agg(["sum", "size"])
    hits, images = counts["sum"].to_numpy(), counts["size"].to_numpy()
    people, p = len(images), hits.sum() / n
    if people < FEWEST_PATIENTS:
        return float(p), np.nan, np.nan
    worth, end = n, (1 + LEVEL) / 2
    reach = norm.ppf(end)
    if n > people:
        without = (hits.sum() - hits) / (n - images)
        variance = ((without - p) ** 2).sum() * (people - 1) / people
        worth = min(n, p * (1 - p) / variance) if variance > 0 else people
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
