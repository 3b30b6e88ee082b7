"""The batch-norm study of notebook 05: its grid, what each training leaves in it, and the verdict.

A large global batch can cost accuracy in three ways that have to do with batch norm or are taken for it: there are fewer
updates in as many epochs; moving statistics trail weights that still move fast; each rank normalises a small local batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from chexlib.data.cache import ImageStore
from chexlib.errors import DivergedError
from chexlib.evaluation.auroc import auroc
from chexlib.evaluation.batch_norm import judge_scores
from chexlib.findings import FINDINGS
from chexlib.models.statistics import kept_statistics, recalibrate
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.monitor import pooled_scorer
from chexlib.training.reuse import Reuse

TERMS = ("total", "updates", "lag", "local batch", "rest")
EVALUATED = 64  # images normalised together where a model is judged by batch statistics


def norm_grid(
    *,
    topologies: Sequence[str],
    batches: Sequence[int],
    local_batch: int,
    local_batches: Sequence[int],
    momenta: Sequence[float],
    norms: Sequence[str],
    seeds: Sequence[int],
    images: int,
    epochs: int,
    rates: Mapping[str, float],
) -> list[dict]:
    """The points of the study, ordered so that those which share a graph follow each other; some serve several parts.

    Parameters
    ----------
    batches : global batches, the smallest first; each a multiple of `local_batch`
    local_batches : others to try at the largest global batch, besides that batch as a whole
    momenta : the first is that of all parts but the comparison of momenta
    norms : to compare with "batch" at the largest global batch, of topologies that have batch norm
    images : of the training part; what is left over after whole global batches is not used in an epoch
    epochs : of every training but those with equal updates
    rates : learning rate by topology
    """
    largest = batches[-1]
    points = []

    def add(topology, seed, batch, *, local=local_batch, norm="batch", momentum=momenta[0], updates=0):
        virtual = 1 if norm in ("sync", "ghost") else batch // local
        an_epoch = max(1, min(images // batch, updates or images))
        points.append(
            {
                "topology": topology,
                "norm": norm,
                "norm_momentum": momentum,
                "batch_size": batch // virtual,
                "accumulation": virtual,
                "ghost_size": local if norm == "ghost" else 0,
                "max_steps": an_epoch,
                "epochs": max(1, updates // an_epoch) if updates else epochs,
                "learning_rate": rates[topology],
                "seed": seed,
            }
        )

    fewest = epochs * max(1, images // largest)
    for topology in topologies:
        normed = topology != "vgg16"
        for seed in seeds:
            for batch in batches:
                add(topology, seed, batch)
                add(topology, seed, batch, updates=fewest)
                for momentum in momenta[1:] if normed else ():
                    add(topology, seed, batch, momentum=momentum)
            for local in (*local_batches, largest) if normed else ():
                add(topology, seed, largest, local=local)
            for norm in norms if normed else ():
                add(topology, seed, largest, norm=norm)
    order = ["topology", "norm", "norm_momentum", "accumulation"]
    unique = {tuple(point.values()): point for point in points}
    return sorted(
        unique.values(), key=lambda point: [-min(2, point[n]) if n == "accumulation" else point[n] for n in order]
    )


def measure_norms(config: TrainConfig, *, reuse: Reuse, population: int = 1024) -> dict | None:
    """Train, and judge the last weights on the test part by moving, by batch and by the population's statistics.

    Parameters
    ----------
    population : int
        Training images, at most, for the population's statistics.

    Returns
    -------
    dict or None
        updates; auroc_ and loss_ of moving, batch and recalibrated; auroc_<finding> by moving statistics;
        ms_per_image, of compute in a training step; diverged. None if the training was stopped.
    """

    def look(trainer, parts, world):
        model, labels = trainer.model, parts["test"].labels

        def score(predict, batch=EVALUATED):
            return pooled_scorer(predict, parts, world, size=config.size, batch=batch)("test")

        scores = {"moving": score(trainer.infer)}
        with kept_statistics(model):
            scores["batch"] = score(trainer.infer_by_batch)
        train = ImageStore(parts["train"].table["path"], size=config.size, gather=world.gather)
        mine = np.arange(min(population, len(train)))[world.rank :: world.ranks]
        cuts = np.array_split(mine, -(-len(mine) // EVALUATED))
        batches = (train.take(cut)[..., None].astype(np.float32) for cut in cuts)
        recalibrate(model, batches, world, forward=trainer.infer_by_batch)
        scores["recalibrated"] = score(trainer.infer)
        judged = {kind: judge_scores(labels, values) for kind, values in scores.items()}
        found = {f"{name}_{kind}": value for kind, both in judged.items() for name, value in both.items()}
        columns = zip(FINDINGS, labels.T, scores["moving"].T, strict=True)
        return found | {f"auroc_{finding}": auroc(y, p) for finding, y, p in columns}

    try:
        result = fit(config, reuse=reuse, measure=look)
    except DivergedError:
        return {"diverged": True}
    if result.stopped:
        return None
    speed = max(row["images_per_second"] for row in result.history)
    updates = config.epochs * config.max_steps
    return {"diverged": False, "updates": updates, "ms_per_image": 1000 / speed, **result.measured}


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


def decompose(rows: pd.DataFrame, *, smallest: int, largest: int, momentum: float, local_batch: int) -> pd.DataFrame:
    """Split what the largest global batch costs in AUROC, by topology and seed, into causes that add up to it.

    With A the test AUROC, by moving statistics in `total` and by the population's in all but `lag`:

    - total: A(smallest batch) - A(largest), at equal epochs;
    - updates: A(smallest) - A(smallest with as few updates as the largest had);
    - lag: what moving statistics cost against the population's at the largest batch, less the same at the smallest;
    - local batch: A(largest, normalised as one batch) - A(largest, normalised by local batches);
    - rest: A(smallest with few updates) - A(largest, normalised as one batch): below 0 where averaging more images an
      update gives back some of what their small number costs.

    Returns
    -------
    DataFrame
        Columns topology, seed and `TERMS`. A topology without batch norm has no lag and no local batch.
    """
    rows = rows.assign(batch=rows["batch_size"] * rows["accumulation"])
    base = rows[(rows["norm"] == "batch") & (rows["norm_momentum"] == momentum)]
    found = []
    for (topology, seed), own in base.groupby(["topology", "seed"], sort=False):
        local = own[own["batch_size"] == local_batch]
        small = local[local["batch"] == smallest].sort_values("updates")
        large = local[local["batch"] == largest].sort_values("updates")
        whole = own[(own["batch"] == largest) & (own["batch_size"] == largest)]
        if small.empty or large.empty:
            continue
        first, last, few = small.iloc[-1], large.iloc[-1], small.iloc[0]
        whole = whole.iloc[0] if len(whole) else last
        lag = [row["auroc_recalibrated"] - row["auroc_moving"] for row in (last, first)]
        found.append(
            {
                "topology": topology,
                "seed": seed,
                "total": first["auroc_moving"] - last["auroc_moving"],
                "updates": first["auroc_recalibrated"] - few["auroc_recalibrated"],
                "lag": lag[0] - lag[1],
                "local batch": whole["auroc_recalibrated"] - last["auroc_recalibrated"],
                "rest": few["auroc_recalibrated"] - whole["auroc_recalibrated"],
            }
        )
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
