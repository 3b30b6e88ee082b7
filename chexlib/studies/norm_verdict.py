"""What the study of batch norm says: the loss of a large batch split into its causes, and what mends it."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from chexlib.evaluation.verdicts import CHANCE, NOT_MEASURED, has_learnt, nothing_learnt, over_seeds, verdict_on_gain

TERMS = ("total", "updates", "lag", "local batch", "rest")
log = logging.getLogger(__name__)


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
        Columns topology, seed, `TERMS`, and start, A(smallest) at equal epochs. A topology without batch norm has no
        lag and no local batch. A seed of which a training is missing, since it diverged, is left out, and told in the
        log.
    """
    rows = rows.assign(batch=rows["batch_size"] * rows["accumulation"])
    epochs = rows[rows["part"] == "equal epochs"]
    smallest, largest = epochs["batch"].min(), epochs["batch"].max()
    found = []
    for (topology, seed), own in rows.groupby(["topology", "seed"], sort=False):
        own = own.set_index(["part", "batch"])
        normed = (rows["part"] == "local batch") & (rows["topology"] == topology)
        needed = [("equal epochs", smallest), ("equal epochs", largest), ("equal updates", smallest)]
        needed += [("local batch", largest)] if normed.any() else []
        if missing := [key for key in needed if key not in own.index]:
            log.warning("%s, seed %d: %s at batch %d diverged, so its loss has no causes", topology, seed, *missing[0])
            continue
        first, last, few = (own.loc[[key]].iloc[0] for key in needed[:3])
        whole = own.loc[[needed[3]]].sort_values("batch_size").iloc[-1] if needed[3:] else last
        lag = [row["auroc_recalibrated"] - row["auroc_moving"] for row in (last, first)]
        costs = [
            first["auroc_moving"] - last["auroc_moving"],
            first["auroc_recalibrated"] - few["auroc_recalibrated"],
            lag[0] - lag[1],
            whole["auroc_recalibrated"] - last["auroc_recalibrated"],
            few["auroc_recalibrated"] - whole["auroc_recalibrated"],
        ]
        found.append((topology, seed, *costs, first["auroc_recalibrated"]))
    return pd.DataFrame(found, columns=["topology", "seed", *TERMS, "start"])


def remedies(rows: pd.DataFrame) -> pd.DataFrame:
    """What AUROC by moving statistics gains at the largest global batch by what might mend it, by topology and seed.

    Parameters
    ----------
    rows : DataFrame
        Of the part "momentum", whose first momentum is the one that all else is trained with.

    Returns
    -------
    DataFrame
        Columns topology, seed, recalibration, and "momentum 0.9" for each other momentum; NaN where one diverged.
    """
    rows = rows[(batch := rows["batch_size"] * rows["accumulation"]) == batch.max()]
    first, *others = rows["norm_momentum"].unique()
    table = rows.set_index(["topology", "seed"])
    by_momentum = {momentum: table[table["norm_momentum"] == momentum] for momentum in (first, *others)}
    usual = by_momentum[first]["auroc_moving"]
    found = {"recalibration": by_momentum[first]["auroc_recalibrated"] - usual}
    found |= {f"momentum {momentum:g}": by_momentum[momentum]["auroc_moving"] - usual for momentum in others}
    return pd.DataFrame(found).reset_index()


def verdict(terms: pd.DataFrame, mended: pd.DataFrame | None = None) -> str:
    """What the decomposition says, in sentences that follow the numbers, one paragraph a topology and one of the study.

    Parameters
    ----------
    terms : of `decompose`
    mended : of `remedies`, optional
    """
    said, learnt = [], {}
    for topology, own in terms.groupby("topology", sort=False):
        own = own.assign(**{"updates and rest": own["updates"] + own["rest"]})
        table = over_seeds(own, ["topology"], [*TERMS, "updates and rest", "start"]).set_index("value")
        causes, loss, start = table.loc[list(TERMS[1:4])], table.loc["total"], table.loc["start"]
        learnt[topology] = has_learnt(start["mean"]) and not start["low"] <= CHANCE
        parts = "; ".join(f"{name} {_with_interval(row)}" for name, row in table.loc[list(TERMS[1:])].iterrows())
        clear = [name for name, row in causes.iterrows() if row["low"] > 0]
        ending = f"Apart from 0 with 95 % confidence: {', '.join(clear) or 'none of the three'}."
        if loss["low"] > 0:
            ending = f"The largest of the three causes is {causes['mean'].idxmax()}. {ending}"
        so = ", so it gains" if loss["mean"] < 0 else ""
        if loss["seeds"] < 2:
            ending = "One seed: no interval, and no conclusion."
        elif not learnt[topology]:
            ending = f"At the smallest batch {nothing_learnt(start['mean'])}: no conclusion."
        net = _with_interval(table.loc["updates and rest"])
        said.append(
            f"**{topology}** loses {_with_interval(loss)} AUROC at the largest global batch{so}: "
            f"{parts}. Updates and rest together, fewer but larger steps through the same images: {net}. {ending}"
        )
    totals = terms.pivot_table(index="seed", columns="topology", values="total")
    if {"densenet121", "resnet50"} <= set(totals):
        more = (totals["densenet121"] - totals["resnet50"]).rename("more").to_frame().assign(topology="")
        row = over_seeds(more, ["topology"], ["more"]).iloc[0]
        untrained = [name for name in ("densenet121", "resnet50") if not learnt[name]]
        judged = f"is {verdict_on_gain(row['low'], row['high'])}"
        if untrained:
            judged = f"is {NOT_MEASURED}, since {' and '.join(untrained)} learnt nothing at the smallest batch"
        said.append(
            f"**The study's claim.** The loss of densenet121 less that of resnet50 is {_with_interval(row)}: that "
            f"ResNet-50 bears large batches better {judged}."
        )
    for topology, own in () if mended is None else mended.groupby("topology", sort=False):
        table = over_seeds(own, ["topology"], [name for name in own if name not in ("topology", "seed")])
        gains = "; ".join(f"{row['value']} {_with_interval(row)}" for _, row in table.iterrows())
        one = " One seed: no interval, and no conclusion." if table["seeds"].max() < 2 else ""
        said.append(f"**Remedies** for {topology} at the largest batch, AUROC that each adds: {gains}.{one}")
    return "\n\n".join(said)


def _with_interval(row) -> str:
    if not np.isfinite(row["low"]):
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
