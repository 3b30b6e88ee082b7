"""The batch-norm study of notebook 05: its grid, what each training leaves in it, and the verdict.

A large global batch can cost accuracy in three ways that have to do with batch norm or are taken
for it: there are fewer updates in as many epochs; moving statistics trail weights that still move
fast; each rank normalises a small local batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError
from chexlib.evaluation.auroc import auroc
from chexlib.evaluation.intervals import (
    CHANCE,
    NOT_MEASURED,
    has_learnt,
    mean_of_seeds,
    nothing_learnt,
    over_seeds,
    verdict_on_gain,
)
from chexlib.findings import FINDINGS
from chexlib.models.statistics import kept_statistics
from chexlib.studies.grid import measure_training
from chexlib.studies.judge import EVALUATED, judge_scores, recalibrate_on_train
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training
from chexlib.training.trainer import Reuse

# Adam's; without batch norm a network bears less.
RATES = {"densenet121": 1e-3, "resnet50": 1e-3, "vgg16": 1e-4}
# Causes of the AUROC that the largest global batch loses.
CAUSES = ["updates", "lag", "local batch", "rest"]
log = logging.getLogger(__name__)


def norm_grid(
    *,
    topologies: Sequence[str],
    batches: Sequence[int],
    local_batches: Sequence[int],
    momenta: Sequence[float],
    norms: Sequence[str],
    seeds: Sequence[int],
    images: int,
    epochs: int,
) -> dict[str, list[dict]]:
    """The trainings of each part of the study, for `run_grid`; one that serves several parts is the
    same point in each.

    Parameters
    ----------
    batches : global batches, the smallest first
    local_batches : images normalised together; the first in all parts, the others at the largest
        global batch
    momenta : of moving statistics; the first in all parts, the others in their own
    norms : to compare with "batch" at the largest global batch
    images : of the training part; what is left over after whole global batches is not used in an
        epoch

    Returns
    -------
    dict
        Of "equal epochs", "equal updates" (as few as the largest batch has), "local batch",
        "momentum" and "norm", the last three without VGG-16.

    Raises
    ------
    ConfigError
        A global batch that is no multiple of a local one, or has more images than there are.
    """
    if set(topologies) <= {"vgg16"}:
        raise ConfigError(
            f"topologies={list(topologies)!r} have no batch norm to study. Name densenet121 or "
            "resnet50 too."
        )
    for batch in batches:
        if batch > images or any(
            max(batches) % n or batch % local_batches[0] for n in local_batches
        ):
            raise ConfigError(
                f"a global batch of {batch} is not accepted for {images} images in local batches "
                f"of {local_batches}. Use multiples of the first of these, none above the images, "
                "and the largest a multiple of all."
            )

    def point(
        topology,
        seed,
        batch,
        *,
        local=local_batches[0],
        norm="batch",
        momentum=momenta[0],
        updates=0,
    ):
        micro_batches = 1 if norm in ("sync", "ghost") else batch // local
        most = images // batch
        # Equal to the update.
        steps = max(n for n in range(1, most + 1) if updates % n == 0) if updates else most
        return {
            "topology": topology,
            "norm": norm,
            "norm_momentum": momentum,
            "batch_size": batch // micro_batches,
            "accumulation": micro_batches,
            "ghost_size": local if norm == "ghost" else 0,
            "max_steps": steps,
            "epochs": updates // steps if updates else epochs,
            "learning_rate": RATES[topology],
            "seed": seed,
        }

    largest, normed = max(batches), [name for name in topologies if name != "vgg16"]
    fewest = epochs * (images // largest)
    of_each_batch = [dict(batch=batch) for batch in batches]
    few_updates = [dict(batch=batch, updates=fewest) for batch in batches]
    local_sizes = [dict(batch=largest, local=local) for local in local_batches]
    lagging = [dict(batch=batch, momentum=momentum) for momentum in momenta for batch in batches]
    normalisations = [dict(batch=largest, norm=norm) for norm in ("batch", *norms)]
    parts = {
        "equal epochs": (topologies, of_each_batch),
        "equal updates": (topologies, few_updates),
        "local batch": (normed, local_sizes),
        "momentum": (normed, lagging),
        "norm": (normed, normalisations),
    }
    return {
        part: [point(name, seed, **case) for name in names for case in cases for seed in seeds]
        for part, (names, cases) in parts.items()
    }


def training_order(grid: dict[str, list[dict]]) -> list[dict]:
    """All points of `norm_grid` once; those of one graph follow each other, the first topology's
    come last.
    """
    every = [point for part in grid.values() for point in part]
    points = list({tuple(point.values()): point for point in every}.values())
    topologies = list(dict.fromkeys(point["topology"] for point in points))
    first = points[0]["norm_momentum"]

    def graph(point):
        plain = point["norm"] == "batch" and point["norm_momentum"] == first
        return -topologies.index(point["topology"]), plain, point["norm"], point["norm_momentum"]

    return sorted(points, key=graph)


def measure_norms(config: TrainConfig, *, reuse: Reuse) -> dict | None:
    """Train, and judge the last weights on the test part by moving, by batch and by the
    population's statistics.

    Returns
    -------
    dict or None
        updates; auroc_ and loss_ of moving, batch and recalibrated; auroc_<finding> by moving
        statistics; ms_per_image, of compute in a training step; diverged. None if the training was
        stopped.
    """

    def columns(training: Training) -> dict:
        infer, infer_by_batch = training.trainer.infer, training.trainer.infer_by_batch
        scores = {"moving": training.score("test", predict=infer, batch=EVALUATED)}
        with kept_statistics(training.model):
            scores["batch"] = training.score("test", predict=infer_by_batch, batch=EVALUATED)
        recalibrate_on_train(training)
        scores["recalibrated"] = training.score("test", predict=infer, batch=EVALUATED)
        labels = training.parts["test"].labels
        speed = max(epoch["images_per_second"] for epoch in training.history)
        row = {"updates": config.epochs * config.max_steps, "ms_per_image": 1000 / speed}
        for kind, values in scores.items():
            judged = judge_scores(labels, values)
            row |= {f"auroc_{kind}": judged["auroc"], f"loss_{kind}": judged["loss"]}
        for finding, y, p in zip(FINDINGS, labels.T, scores["moving"].T, strict=True):
            row[f"auroc_{finding}"] = auroc(y, p)
        return row

    return measure_training(config, columns, reuse=reuse)


def decompose(rows: pd.DataFrame) -> pd.DataFrame:
    """Split what the largest global batch costs in AUROC, by topology and seed, into causes that
    add up to it.

    With A the test AUROC, by moving statistics in `total` and by the population's in all but `lag`:

    - total: A(smallest batch) - A(largest), at equal epochs;
    - updates: A(smallest) - A(smallest with as few updates as the largest had);
    - lag: what moving statistics cost against the population's at the largest batch, less the same
      at the smallest;
    - local batch: A(largest, normalised by the largest of the local batches) - A(largest, by those
      used throughout);
    - rest: A(smallest with few updates) - A(largest, by the largest local batches): below 0 where
      averaging more images an update gives back some of what their small number costs.

    Parameters
    ----------
    rows : DataFrame
        Of the parts "equal epochs", "equal updates" and "local batch", with a column part.

    Returns
    -------
    DataFrame
        Columns topology, seed, total, `CAUSES`, and start, A(smallest) at equal epochs. A topology
        without batch norm has no lag and no local batch. A seed of which a training is missing,
        since it diverged, is left out, and told in the log.
    """
    by = ["topology", "seed"]
    rows = rows.assign(batch=rows["batch_size"] * rows["accumulation"])
    batches = rows.loc[rows["part"] == "equal epochs", "batch"]
    smallest, largest = batches.min(), batches.max()

    def scores_of(part, batch):
        chosen = rows[(rows["part"] == part) & (rows["batch"] == batch)]
        chosen = chosen.sort_values("batch_size").drop_duplicates(by, keep="last")
        scores = chosen.set_index(by)[["auroc_moving", "auroc_recalibrated"]]
        return scores.set_axis(["moving", "population"], axis=1)

    first = scores_of("equal epochs", smallest)
    last = scores_of("equal epochs", largest)
    few = scores_of("equal updates", smallest)
    whole = scores_of("local batch", largest)
    normed = rows.loc[rows["part"] == "local batch", "topology"].unique()
    whole = pd.concat([whole, last[~last.index.isin(normed, level="topology")]])
    needed = {
        ("equal epochs", smallest): first,
        ("equal epochs", largest): last,
        ("equal updates", smallest): few,
        ("local batch", largest): whole,
    }
    complete = []
    for topology, seed in rows[by].drop_duplicates().itertuples(index=False):
        missing = [key for key, table in needed.items() if (topology, seed) not in table.index]
        if missing:
            log.warning(
                "%s, seed %d: %s at batch %d diverged, so its loss has no causes",
                topology,
                seed,
                *missing[0],
            )
        else:
            complete.append((topology, seed))
    terms = {
        "total": first["moving"] - last["moving"],
        "updates": first["population"] - few["population"],
        "lag": (last["population"] - last["moving"]) - (first["population"] - first["moving"]),
        "local batch": whole["population"] - last["population"],
        "rest": few["population"] - whole["population"],
        "start": first["population"],
    }
    index = pd.MultiIndex.from_tuples(complete, names=by)
    return pd.DataFrame(terms).reindex(index).reset_index()


def remedies(rows: pd.DataFrame) -> pd.DataFrame:
    """What AUROC by moving statistics gains at the largest global batch by what might mend it, by
    topology and seed.

    Parameters
    ----------
    rows : DataFrame
        Of the part "momentum", whose first momentum is the one that all else is trained with.

    Returns
    -------
    DataFrame
        Columns topology, seed, recalibration, and "momentum 0.9" for each other momentum; NaN where
        one diverged.
    """
    batch = rows["batch_size"] * rows["accumulation"]
    table = rows[batch == batch.max()].set_index(["topology", "seed"])
    first, *others = table["norm_momentum"].unique()
    usual = table[table["norm_momentum"] == first]
    gains = {"recalibration": usual["auroc_recalibrated"] - usual["auroc_moving"]}
    for momentum in others:
        changed = table[table["norm_momentum"] == momentum]
        gains[f"momentum {momentum:g}"] = changed["auroc_moving"] - usual["auroc_moving"]
    return pd.DataFrame(gains).reset_index()


def verdict(terms: pd.DataFrame, mended: pd.DataFrame | None = None) -> str:
    """What the decomposition says, in sentences that follow the numbers, one paragraph a topology
    and one of the study.

    Parameters
    ----------
    terms : of `decompose`
    mended : of `remedies`, optional
    """
    paragraphs, learnt = [], {}
    for topology, of_topology in terms.groupby("topology", sort=False):
        both = of_topology.assign(
            **{"updates and rest": of_topology["updates"] + of_topology["rest"]}
        )
        values = ["total", *CAUSES, "updates and rest", "start"]
        table = over_seeds(both, ["topology"], values).set_index("value")
        start = table.loc["start"]
        learnt[topology] = has_learnt(start["mean"]) and not start["low"] <= CHANCE
        paragraphs.append(_loss_in_words(topology, table, learnt[topology]))
    totals = terms.pivot_table(index="seed", columns="topology", values="total")
    if {"densenet121", "resnet50"} <= set(totals):
        paragraphs.append(_claim_in_words(totals["densenet121"] - totals["resnet50"], learnt))
    if mended is not None:
        for topology, of_topology in mended.groupby("topology", sort=False):
            names = of_topology.columns.drop(["topology", "seed"])
            table = over_seeds(of_topology, ["topology"], names)
            gains = [f"{row['value']} {_with_interval(row)}" for _, row in table.iterrows()]
            one = " One seed: no interval, and no conclusion." if table["seeds"].max() < 2 else ""
            paragraphs.append(
                f"**Remedies** for {topology} at the largest batch, AUROC that each adds: "
                f"{'; '.join(gains)}.{one}"
            )
    return "\n\n".join(paragraphs)


def _loss_in_words(topology: str, table: pd.DataFrame, learnt: bool) -> str:
    """What a topology loses, and by what causes; `table` is of `over_seeds`, by value."""
    loss = table.loc["total"]
    if loss["seeds"] < 2:
        ending = "One seed: no interval, and no conclusion."
    elif not learnt:
        reason = nothing_learnt(table.loc["start", "mean"])
        ending = f"At the smallest batch {reason}: no conclusion."
    else:
        causes = table.loc[CAUSES[:3]]
        clear = causes.index[causes["low"] > 0]
        ending = f"Apart from 0 with 95 % confidence: {', '.join(clear) or 'none of the three'}."
        if loss["low"] > 0:
            ending = f"The largest of the three causes is {causes['mean'].idxmax()}. {ending}"
    parts = "; ".join(f"{name} {_with_interval(table.loc[name])}" for name in CAUSES)
    gains = ", so it gains" if loss["mean"] < 0 else ""
    return (
        f"**{topology}** loses {_with_interval(loss)} AUROC at the largest global batch{gains}: "
        f"{parts}. Updates and rest together, fewer but larger steps through the same images: "
        f"{_with_interval(table.loc['updates and rest'])}. {ending}"
    )


def _claim_in_words(more: pd.Series, learnt: dict[str, bool]) -> str:
    """The study's claim, held against what densenet121 loses more than resnet50, by seed."""
    gain = mean_of_seeds(more)
    judged = f"is {verdict_on_gain(gain['low'], gain['high'])}"
    if untrained := [name for name in ("densenet121", "resnet50") if not learnt[name]]:
        names = " and ".join(untrained)
        judged = f"is {NOT_MEASURED}, since {names} learnt nothing at the smallest batch"
    return (
        "**The study's claim.** The loss of densenet121 less that of resnet50 is "
        f"{_with_interval({'mean': gain['effect'], **gain})}: that ResNet-50 bears large batches "
        f"better {judged}."
    )


def _with_interval(row) -> str:
    if not np.isfinite(row["low"]):
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
