"""What turns a network's scores into probabilities, in a form that goes with the weights.

Notebook 09 fits it, on the validation part alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from chexlib.errors import ConfigError
from chexlib.findings import FINDINGS

METHODS = ("temperature", "isotonic")
SMALLEST = 1e-7  # probabilities are kept this far from 0 and 1, where logits are infinite


@dataclass(frozen=True)
class Calibration:
    """What turns a network's scores into better probabilities.

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
        if self.method not in METHODS:
            raise ConfigError(
                f"there is no calibration {self.method!r}. Use one of {', '.join(METHODS)}."
            )
        if unknown := sorted(set(self.curves) - set(FINDINGS)):
            raise ConfigError(
                f"the calibration has unknown findings {', '.join(unknown)}. Fit it anew."
            )
        for finding, curve in self.curves.items():
            if not _is_curve(self.method, curve):
                raise ConfigError(
                    f"{finding}: {curve!r:.200} is not a {self.method} calibration. Fit it anew."
                )

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of scores (n, 14) in the order of `FINDINGS`; NaN stays NaN."""
        scores = np.array(scores, np.float64)
        for finding, curve in self.curves.items():
            column = scores[:, FINDINGS.index(finding)]
            if self.method == "temperature":
                column[:] = expit(
                    logit(np.clip(column, SMALLEST, 1 - SMALLEST)) / curve["temperature"]
                )
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
                f"{values!r:.200} is not a calibration ({error}). Use what `Calibration.to_dict` gave."
            ) from error


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
