"""Means over seeds with Student's t interval: how another start of the same training would have ended.

They say nothing of other patients: for that see `chexlib.evaluation.resampling`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def half_width(deviation, n, *, level: float = 0.95):
    """Half of Student's interval of a mean of n values with this standard deviation, NaN where n is 1."""
    return stats.t.ppf((1 + level) / 2, np.maximum(n - 1, 1)) * deviation / np.sqrt(n)


def mean_of_seeds(values: pd.Series, *, level: float = 0.95) -> dict:
    """Mean of a value a seed: effect, low, high, seeds. The interval is NaN for one seed."""
    values = values.dropna()
    n, mean = len(values), values.mean()
    half = half_width(values.std(), n, level=level) if n else np.nan
    return {"effect": mean, "low": mean - half, "high": mean + half, "seeds": n}


def over_seeds(rows: pd.DataFrame, by: Sequence[str], values: Sequence[str], *, level: float = 0.95) -> pd.DataFrame:
    """Mean of `values` over the rows of each group, with its interval: NaN where there is one seed.

    Returns
    -------
    DataFrame
        Columns `by`, value, mean, low, high, seeds.
    """
    long = rows.melt(id_vars=list(by), value_vars=list(values), var_name="value", value_name="x")
    groups = long.dropna(subset="x").groupby([*by, "value"], sort=False)["x"]
    table = groups.agg(mean="mean", sd="std", seeds="count").reset_index()
    half = half_width(table.pop("sd"), table["seeds"], level=level)
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    return table
