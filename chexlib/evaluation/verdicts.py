"""Means over seeds with Student's t interval: how another start of the same training would have
ended.

They say nothing of other patients: for that see `chexlib.evaluation.resampling`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from chexlib.evaluation.resampling import LEVEL


def half_width(deviation, n, *, level: float = LEVEL):
    """Half of Student's interval of a mean of n values with this standard deviation, NaN where n is
    1.
    """
    return stats.t.ppf((1 + level) / 2, np.maximum(n - 1, 1)) * deviation / np.sqrt(n)


def mean_of_seeds(values: pd.Series, *, level: float = LEVEL) -> dict:
    """Mean of a value a seed: effect, low, high, seeds. The interval is NaN for one seed."""
    values = values.dropna()
    n, mean = len(values), values.mean()
    half = half_width(values.std(), n, level=level) if n else np.nan
    return {"effect": mean, "low": mean - half, "high": mean + half, "seeds": n}


def over_seeds(rows: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Mean of `values` over the rows of each group, with its interval: NaN where there is one seed.

    Returns
    -------
    DataFrame
        Columns `by`, value, mean, low, high, seeds.
    """
    long = rows.melt(id_vars=list(by), value_vars=list(values), var_name="value", value_name="x")
    groups = long.dropna(subset="x").groupby([*by, "value"], sort=False)["x"]
    table = groups.agg(mean="mean", sd="std", seeds="count").reset_index()
    half = half_width(table.pop("sd"), table["seeds"])
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    return table


REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"
NOT_COMPARABLE, NOT_MEASURED = "not comparable", "not measured"
VERDICTS = (REPRODUCED, CONTRADICTED, UNDECIDED, NOT_COMPARABLE, NOT_MEASURED)

CHANCE = 0.5  # AUROC of scores that know nothing of the labels
# Least mean AUROC of a baseline of which something is concluded. From 0.7 discrimination is called
# acceptable (Hosmer and Lemeshow, Applied Logistic Regression, 2nd edition, 2000, section 5.2.4).
# There 0.01 of AUROC are 5 % of the skill; nearer to chance the noise of seeds is most of a loss.
LEARNT = 0.7


def has_learnt(auroc: float | None) -> bool:
    """Whether a mean AUROC is high enough for a gain or a loss to mean something: `LEARNT`.

    None is not.
    """
    return auroc is not None and bool(auroc >= LEARNT)


def nothing_learnt(auroc: float | None) -> str:
    """The reason for no verdict, where `has_learnt` is false or the interval of the AUROC holds
    chance.

    None, as JSON has NaN: no seed has all the trainings that are compared.
    """
    if auroc is None or auroc != auroc:
        return "no seed has all of the trainings that are compared"
    return f"nothing was learnt: a mean AUROC of {auroc:.3f} is below {LEARNT} or not apart from chance"


def verdict_on_gain(low: float, high: float) -> str:
    """The verdict on a gain that is claimed to be above 0, from its interval.

    NaN, as of one seed, leaves it open.
    """
    if low > 0:
        return REPRODUCED
    return CONTRADICTED if high < 0 else UNDECIDED


def percent_lost(baseline: pd.Series, other: pd.Series) -> dict:
    """How much of the skill above chance is lost: 100 (A0 - A) / (A0 - 0.5), with A0 the baseline's
    AUROC.

    The ratio of the two means over seeds. Its interval is Fieller's (1954), for paired normal
    values: every ratio r for which Student's t test finds the mean of (A0 - A) - r (A0 - 0.5) not
    apart from 0. It is finite exactly where the interval of A0 does not hold 0.5.

    Parameters
    ----------
    baseline, other : Series
        AUROC by seed. A seed that one of them lacks is left out of both.

    Returns
    -------
    dict
        baseline, its mean AUROC; loss, low, high (in %), seeds. The loss is NaN where nothing was
        learnt: the baseline is below `LEARNT`, or its interval holds 0.5. The interval is NaN for
        one seed too.
    """
    pairs = pd.DataFrame({"baseline": baseline, "other": other}).dropna()
    n, mean = len(pairs), pairs["baseline"].mean()
    found = {"baseline": mean, "loss": np.nan, "low": np.nan, "high": np.nan, "seeds": n}
    skill, lost = pairs["baseline"] - CHANCE, pairs["baseline"] - pairs["other"]
    if not has_learnt(mean) or (n > 1 and skill.mean() <= half_width(skill.std(), n)):
        return found
    found["loss"] = 100 * lost.mean() / skill.mean()
    if n == 1:
        return found
    # The ends solve a r^2 - 2 h r + c = 0.
    squared = half_width(1.0, n) ** 2
    covariance = squared * np.cov(skill, lost)
    a = skill.mean() ** 2 - covariance[0, 0]
    h = skill.mean() * lost.mean() - covariance[0, 1]
    c = lost.mean() ** 2 - covariance[1, 1]
    root = np.sqrt(max(h**2 - a * c, 0.0))
    return found | {"low": 100 * (h - root) / a, "high": 100 * (h + root) / a}
