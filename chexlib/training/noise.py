"""Gradient noise scale: beyond how many images per update a training gains little.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1. The gradient of
one image is the true gradient G plus noise, whose covariance has the trace S. The noise scale is
S / |G|^2, in images: an update of so many images makes half of the progress of one of endlessly
many. It is measured at no cost where a global batch is made of several parts, ranks or
micro-batches: parts differ by more noise than their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95  # of the interval
BLOCKS = 10  # of consecutive updates, taken as independent
FEWEST_UPDATES = 2 * BLOCKS  # below which nothing is said


@dataclass(frozen=True)
class NoiseScale:
    """A noise scale in images, with its 95 % interval; `high` is infinite where it has no end."""

    images: float
    low: float
    high: float
    updates: int  # that it was measured in

    def __str__(self) -> str:
        """For a sentence of its own."""
        end = f"{self.high:,.0f}" if np.isfinite(self.high) else "no end"
        return (
            f"Beyond about {self.images:,.0f} images per update ({self.low:,.0f} to {end}) this "
            "training gains little."
        )


def noise_and_signal(
    of_parts: float, of_sum: float, parts: float, images: float
) -> tuple[float, float]:
    """Unbiased estimates of S and |G|^2 by one update; NaN of fewer than two parts.

    With g_p the gradient summed over the n_p images of part p, and N images in all,
    E |g_p|^2 / n_p = n_p |G|^2 + S.

    Parameters
    ----------
    of_parts : sum over parts of |g_p|^2 / n_p
    of_sum : |sum of g_p|^2 / N
    parts, images : how many
    """
    if parts < 2:
        return np.nan, np.nan
    noise = (of_parts - of_sum) / (parts - 1)
    return noise, (of_sum - noise) / images


def noise_scale(steps: pd.DataFrame) -> NoiseScale | None:
    """The noise scale over some updates; None of too few, or where no signal is seen.

    Its interval is a jackknife's over `BLOCKS` blocks of updates (Quenouille 1956), of the inverse,
    |G|^2 / S, whose denominator is far from 0.

    Parameters
    ----------
    steps : DataFrame
        Columns noise and signal, of `noise_and_signal`, in the order of updates.
    """
    values = steps[["noise", "signal"]].dropna().to_numpy(float)
    if len(values) < FEWEST_UPDATES:
        return None
    sums = np.array([block.sum(axis=0) for block in np.array_split(values, BLOCKS)])
    noise, signal = sums.sum(axis=0)
    if noise <= 0 or signal <= 0:
        return None
    inverse = signal / noise
    left = sums.sum(axis=0) - sums  # without one block each
    without = left[:, 1] / left[:, 0]
    error = np.sqrt((BLOCKS - 1) / BLOCKS * np.sum((without - without.mean()) ** 2))
    reach = stats.t.ppf((1 + LEVEL) / 2, BLOCKS - 1) * error
    high = 1 / (inverse - reach) if inverse > reach else np.inf
    return NoiseScale(1 / inverse, 1 / (inverse + reach), high, len(values))
