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

from chexlib.data.cache import ImageStore
from chexlib.data.pipeline import generator_for
from chexlib.errors import ConfigError, DivergedError
from chexlib.evaluation.auroc import auroc
from chexlib.evaluation.intervals import (
    CHANCE,
    NOT_MEASURED,
    has_learnt,
    nothing_learnt,
    over_seeds,
    verdict_on_gain,
)
from chexlib.findings import FINDINGS
from chexlib.models.statistics import kept_statistics, recalibrate
from chexlib.studies.population import NormReport, bn_report, judge_scores
from chexlib.training.callbacks import pooled_scorer
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.trainer import Reuse

# Adam's; without batch norm a network bears less.
RATES = {"densenet121": 1e-3, "resnet50": 1e-3, "vgg16": 1e-4}
POPULATION = 1024  # training images, at most, for the statistics of the population
EVALUATED = 64  # images normalised together where a model is judged by batch statistics


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
        virtual = 1 if norm in ("sync", "ghost") else batch // local
        most = images // batch
        # Equal to the update.
        steps = max(n for n in range(1, most + 1) if updates % n == 0) if updates else most
        return {
            "topology": topology,
            "norm": norm,
            "norm_momentum": momentum,
            "batch_size": batch // virtual,
            "accumulation": virtual,
            "ghost_size": local if norm == "ghost" else 0,
            "max_steps": steps,
            "epochs": updates // steps if updates else epochs,
            "learning_rate": RATES[topology],
            "seed": seed,
        }

    largest, normed = max(batches), [name for name in topologies if name != "vgg16"]
    fewest = epochs * (images // largest)
    cases = {
        "equal epochs": (topologies, [dict(batch=batch) for batch in batches]),
        "equal updates": (topologies, [dict(batch=batch, updates=fewest) for batch in batches]),
        "local batch": (normed, [dict(batch=largest, local=local) for local in local_batches]),
        "momentum": (
            normed,
            [dict(batch=batch, momentum=momentum) for momentum in momenta for batch in batches],
        ),
        "norm": (normed, [dict(batch=largest, norm=norm) for norm in ("batch", *norms)]),
    }
    return {
        part: [
            point(topology, seed, **case) for topology in names for case in chosen for seed in seeds
        ]
        for part, (names, chosen) in cases.items()
    }


def training_order(grid: dict[str, list[dict]]) -> list[dict]:
    """All points of `norm_grid` once; those of one graph follow each other, the first topology's
    come last.
    """
    points = list(
        {tuple(point.values()): point for part in grid.values() for point in part}.values()
    )
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

    def look(trainer, parts, world):
        model, labels = trainer.model, parts["test"].labels

        def score(predict, batch=EVALUATED):
            return pooled_scorer(predict, parts, world, size=config.size, batch=batch)("test")

        scores = {"moving": score(trainer.infer)}
        with kept_statistics(model):
            scores["batch"] = score(trainer.infer_by_batch)
        recalibrate_on(parts["train"], trainer, world, size=config.size, images=POPULATION)
        scores["recalibrated"] = score(trainer.infer)
        judged = {kind: judge_scores(labels, values) for kind, values in scores.items()}
        found = {
            f"{name}_{kind}": value for kind, both in judged.items() for name, value in both.items()
        }
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


def recalibrate_on(part, trainer, world, *, size: int, images: int = 1024) -> None:
    """`recalibrate` a trainer's model on so many images of a part, each rank on its share of them.

    They are drawn at random, the same ones for every training on this part.
    """
    store = ImageStore(part.table["path"], size=size, gather=world.allgather_object)
    chosen = _drawn(len(store), images)
    cuts = world.batches(len(chosen), batch=EVALUATED)
    batches = (store.take(chosen[cut])[..., None].astype(np.float32) for cut in cuts)
    recalibrate(trainer.model, batches, world, forward=trainer.infer_by_batch)


def _drawn(n: int, images: int) -> np.ndarray:
    """Places of so many of n images, or of all: a table is in the order of its patients' numbers."""
    return generator_for("recalibration", seed=0).permutation(n)[:images]


def report_after(config: TrainConfig, *, reuse: Reuse) -> NormReport:
    """Train, and look at the batch norm of the last weights: `bn_report` on the test part, by local
    batches.
    """
    reports = []

    def look(trainer, parts, world):
        paths = parts["train"].table["path"]
        chosen = {
            "test": parts["test"].table["path"],
            "train": paths.iloc[_drawn(len(paths), POPULATION)],
        }
        stores = {
            part: ImageStore(paths, size=config.size, gather=world.allgather_object)
            for part, paths in chosen.items()
        }
        pixels = {
            part: store.take(range(len(store)))[..., None].astype(np.float32)
            for part, store in stores.items()
        }
        given = {"population": pixels["train"], "batch": config.batch_size, "world": world}
        given |= {"infer": trainer.infer, "forward": trainer.infer_by_batch}
        reports.append(bn_report(trainer.model, pixels["test"], parts["test"].labels, **given))
        return {}

    fit(config, reuse=reuse, measure=look)
    return reports[0]


TERMS = ("total", "updates", "lag", "local batch", "rest")
log = logging.getLogger(__name__)


def decompose(rows: pd.DataFrame) -> pd.DataFrame:
    """Split what the largest global batch costs in AUROC, by topology and seed, into causes that
    add up to it.

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
        Columns topology, seed, `TERMS`, and start, A(smallest) at equal epochs. A topology without
        batch norm has no lag and no local batch. A seed of which a training is missing, since it
        diverged, is left out, and told in the log.
    """
    rows = rows.assign(batch=rows["batch_size"] * rows["accumulation"])
    epochs = rows[rows["part"] == "equal epochs"]
    smallest, largest = epochs["batch"].min(), epochs["batch"].max()
    found = []
    for (topology, seed), own in rows.groupby(["topology", "seed"], sort=False):
        own = own.set_index(["part", "batch"])
        normed = (rows["part"] == "local batch") & (rows["topology"] == topology)
        needed = [
            ("equal epochs", smallest),
            ("equal epochs", largest),
            ("equal updates", smallest),
        ]
        needed += [("local batch", largest)] if normed.any() else []
        if missing := [key for key in needed if key not in own.index]:
            log.warning(
                "%s, seed %d: %s at batch %d diverged, so its loss has no causes",
                topology,
                seed,
                *missing[0],
            )
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
    rows = rows[(batch := rows["batch_size"] * rows["accumulation"]) == batch.max()]
    first, *others = rows["norm_momentum"].unique()
    table = rows.set_index(["topology", "seed"])
    by_momentum = {
        momentum: table[table["norm_momentum"] == momentum] for momentum in (first, *others)
    }
    usual = by_momentum[first]["auroc_moving"]
    found = {"recalibration": by_momentum[first]["auroc_recalibrated"] - usual}
    found |= {
        f"momentum {momentum:g}": by_momentum[momentum]["auroc_moving"] - usual
        for momentum in others
    }
    return pd.DataFrame(found).reset_index()


def verdict(terms: pd.DataFrame, mended: pd.DataFrame | None = None) -> str:
    """What the decomposition says, in sentences that follow the numbers, one paragraph a topology
    and one of the study.

    Parameters
    ----------
    terms : of `decompose`
    mended : of `remedies`, optional
    """
    said, learnt = [], {}
    for topology, own in terms.groupby("topology", sort=False):
        own = own.assign(**{"updates and rest": own["updates"] + own["rest"]})
        table = over_seeds(own, ["topology"], [*TERMS, "updates and rest", "start"]).set_index(
            "value"
        )
        causes, loss, start = table.loc[list(TERMS[1:4])], table.loc["total"], table.loc["start"]
        learnt[topology] = has_learnt(start["mean"]) and not start["low"] <= CHANCE
        parts = "; ".join(
            f"{name} {_with_interval(row)}" for name, row in table.loc[list(TERMS[1:])].iterrows()
        )
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
            f"{parts}. Updates and rest together, fewer but larger steps through the same images: "
            f"{net}. {ending}"
        )
    totals = terms.pivot_table(index="seed", columns="topology", values="total")
    if {"densenet121", "resnet50"} <= set(totals):
        more = (
            (totals["densenet121"] - totals["resnet50"])
            .rename("more")
            .to_frame()
            .assign(topology="")
        )
        row = over_seeds(more, ["topology"], ["more"]).iloc[0]
        untrained = [name for name in ("densenet121", "resnet50") if not learnt[name]]
        judged = f"is {verdict_on_gain(row['low'], row['high'])}"
        if untrained:
            judged = f"is {NOT_MEASURED}, since {' and '.join(untrained)} learnt nothing at the smallest batch"
        said.append(
            "**The study's claim.** The loss of densenet121 less that of resnet50 is "
            f"{_with_interval(row)}: that ResNet-50 bears large batches better {judged}."
        )
    for topology, own in () if mended is None else mended.groupby("topology", sort=False):
        table = over_seeds(
            own, ["topology"], [name for name in own if name not in ("topology", "seed")]
        )
        gains = "; ".join(f"{row['value']} {_with_interval(row)}" for _, row in table.iterrows())
        one = " One seed: no interval, and no conclusion." if table["seeds"].max() < 2 else ""
        said.append(
            f"**Remedies** for {topology} at the largest batch, AUROC that each adds: {gains}.{one}"
        )
    return "\n\n".join(said)


def _with_interval(row) -> str:
    if not np.isfinite(row["low"]):
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
