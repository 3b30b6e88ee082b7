"""Verdicts on a difference between trainings, from its values by seed.

Every verdict is the first that applies of *supported*, *contradicted*, *equivalent* and
*undecided*. An undecided one tells the smallest effect that would have been seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from chexlib.evaluation.intervals import (
    CONTRADICTED,
    LEVEL,
    REPRODUCED,
    UNDECIDED,
    half_width,
    holm,
)

SUPPORTED, EQUIVALENT = "supported", "equivalent"
NOT_COMPARABLE = "not comparable"  # there is no verdict, but a reason
CHECKED = "checked"  # a count or setting that is equal: no result that could be reproduced
VERDICTS = (  # a figure is reproduced, a claim is supported
    *(REPRODUCED, SUPPORTED, CONTRADICTED, EQUIVALENT, UNDECIDED),
    *(NOT_COMPARABLE, CHECKED),
)
MARGIN = 0.02  # of mean AUROC, within which two trainings are called equivalent
POWER = 0.8  # at which the smallest effect is told


@dataclass(frozen=True)
class Verdict:
    """A difference that is claimed to be above 0, with its 95 % interval over seeds."""

    word: str
    mean: float
    low: float
    high: float
    deviation: float  # standard deviation over seeds
    seeds: int
    p: float  # two-sided, of Student's t test against 0

    @property
    def smallest(self) -> float:
        """The effect that is called supported in `POWER` of all repetitions."""
        return smallest_effect(self.deviation, self.seeds)

    def __str__(self) -> str:
        """For a sentence: "+0.031 (+0.012 to +0.050, 10 seeds): supported"."""
        if self.seeds < 2:
            return f"{self.mean:+.3f} (one seed, no interval): {self.word}"
        ending = ""
        if self.word == UNDECIDED:
            ending = f", could have seen {self.smallest:.3f} with {POWER:.0%}"
        if self.word == EQUIVALENT:
            ending = f" within {MARGIN}"
        interval = f"{self.low:+.3f} to {self.high:+.3f}, {self.seeds} seeds"
        return f"{self.mean:+.3f} ({interval}): {self.word}{ending}"


def judge(differences: Sequence[float], *, apart: bool = True) -> Verdict:
    """The verdict on differences by seed, by Student's t.

    - supported: the 95 % interval is above 0;
    - contradicted: it is below 0;
    - equivalent: the 90 % interval is within +-`MARGIN`, that is, two one-sided tests at 5 % refuse
      both larger effects (Schuirmann 1987);
    - undecided: none of these. One seed has no interval, and is undecided.

    Parameters
    ----------
    differences : (n,)
        One value per seed; NaN is left out.
    apart : bool
        False where one of many looks is not apart from 0 once it is corrected for their number.
    """
    values = np.asarray(differences, float)
    values = values[~np.isnan(values)]
    n = len(values)
    mean = float(values.mean()) if n else np.nan
    if n < 2:
        return Verdict(UNDECIDED, mean, np.nan, np.nan, np.nan, n, np.nan)
    deviation = float(values.std(ddof=1))
    half = half_width(deviation, n)
    half_90 = half_width(deviation, n, level=0.9)
    if apart and mean - half > 0:
        word = SUPPORTED
    elif apart and mean + half < 0:
        word = CONTRADICTED
    elif abs(mean) + half_90 < MARGIN:
        word = EQUIVALENT
    else:
        word = UNDECIDED
    p = float(stats.ttest_1samp(values, 0).pvalue) if deviation else float(mean == 0)
    return Verdict(word, mean, mean - half, mean + half, deviation, n, p)


def judge_many(differences: Mapping[Hashable, Sequence[float]]) -> dict[Hashable, Verdict]:
    """`judge` of several differences, of which one would be apart from 0 by chance.

    Supported and contradicted are only those whose p, corrected for their number (Holm 1979), is
    below 5 %; the others are equivalent or undecided. Intervals stay those of one look.
    """
    corrected = holm(np.array([judge(values).p for values in differences.values()]))
    looks = zip(differences.items(), corrected, strict=True)
    return {name: judge(values, apart=p < 1 - LEVEL) for (name, values), p in looks}


def power(effect: float, deviation: float, n: int) -> float:
    """How often n values with this mean and standard deviation have a 95 % interval above 0.

    By the noncentral t distribution (Cohen 1988, section 2).
    """
    shift = effect * np.sqrt(n) / deviation
    return float(stats.nct.sf(stats.t.ppf((1 + LEVEL) / 2, n - 1), n - 1, shift))


def smallest_effect(deviation: float, n: int) -> float:
    """The effect that n values with this standard deviation show with a power of `POWER`."""
    if not deviation > 0:
        return 0.0

    def lacks(effect):
        return power(effect, deviation, n) - POWER

    return float(brentq(lacks, 0.0, 100 * deviation))
