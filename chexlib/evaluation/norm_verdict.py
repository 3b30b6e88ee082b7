"""What the study of batch norm says: means with intervals, and the loss of a large batch split into its causes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

TERMS = ("total", "updates", "lag", "local batch", "rest")


def over_seeds(rows: pd.DataFrame, by: Sequence[str], values: Sequence[str], *, level: float = 0.95) -> pd.DataFrame:
    """Mean of `values` over the rows of each group, with Student's t interval: NaN where there is one seed.

    Returns
    -------
    DataFrame
        Columns `by`, value, mean, low, high, seeds.
    """
    long = rows.melt(id_vars=list(by), value_vars=list(values), var_name="value", value_name="x")
    groups = long.dropna(subset="x").groupby([*by, "value"], sort=False)["x"]
    table = groups.agg(mean="mean", sd="std", seeds="count").reset_index()
    half = stats.t.ppf((1 + level) / 2, np.maximum(table["seeds"] - 1, 1)) * table.pop("sd") / np.sqrt(table["seeds"])
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    return table


def decompose(rows: pd.DataFrame) -> pd.DataFrame:
    """Split what the largest global batch costs in AUROC, by topology and seed, into causes that add up to it.

    With A the test AUROC, by moving statistics in `total` and by the population's in all but `lag`:

    - total: A(smallest batch) - A(largest), at equal epochs;
    - updates: A(smallest) - A(smallest with as few updates as the largest had);
    - lag: what moving statistics cost against the population's at the largest batch, less the same at the smallest;
    - local batch: A(largest, normalised by the largest of the local batches) - A(largest, by those used throughout);
    - rest: A(smallest with few updates) - A(largest, by the largest local batches): below 0 where averaging more images
      an update gives back some of what their small number costs.

    Parameters
    ----------
    rows : DataFrame
        Of the parts "equal epochs", "equal updates" and "local batch", with a column part.

    Returns
    -------
    DataFrame
        Columns topology, seed and `TERMS`. A topology without batch norm has no lag and no local batch.
    """
    rows = rows.assign(batch=rows["batch_size"] * rows["accumulation"])
    found = []
    for (topology, seed), own in rows.groupby(["topology", "seed"], sort=False):
        own = {part: of_part.sort_values("batch") for part, of_part in own.groupby("part")}
        first, last = (own["equal epochs"].iloc[place] for place in (0, -1))
        few = own["equal updates"].iloc[0]["auroc_recalibrated"]
        whole = own["local batch"].sort_values("batch_size").iloc[-1] if "local batch" in own else last
        lag = [row["auroc_recalibrated"] - row["auroc_moving"] for row in (last, first)]
        costs = [
            first["auroc_moving"] - last["auroc_moving"],
            first["auroc_recalibrated"] - few,
            lag[0] - lag[1],
            whole["auroc_recalibrated"] - last["auroc_recalibrated"],
            few - whole["auroc_recalibrated"],
        ]
        found.append((topology, seed, *costs))
    return pd.DataFrame(found, columns=["topology", "seed", *TERMS])


def verdict(terms: pd.DataFrame) -> str:
    """What the decomposition says, in sentences that follow the numbers, one paragraph a topology."""
    said = []
    for topology, own in terms.groupby("topology", sort=False):
        table = over_seeds(own, ["topology"], TERMS).set_index("value")
        causes = table.loc[list(TERMS[1:4])]
        worst = causes["mean"].idxmax()
        parts = "; ".join(f"{name} {_with_interval(row)}" for name, row in table.iloc[1:].iterrows())
        clear = [name for name, row in causes.iterrows() if row["low"] > 0]
        certain = f"Apart from 0 with 95 % confidence: {', '.join(clear) or 'none of the three'}."
        if int(table["seeds"].min()) < 2:
            certain = "One seed: no interval, and no conclusion."
        said.append(
            f"**{topology}** loses {_with_interval(table.loc['total'])} AUROC at the largest global batch: {parts}. "
            f"The largest of the three causes is {worst}. {certain}"
        )
    return "\n\n".join(said)


def _with_interval(row) -> str:
    if not np.isfinite(row["low"]):
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
