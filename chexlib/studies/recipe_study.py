"""The study of large-batch recipes of notebook 06: its grid, what each training leaves in it, and
the tables of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError, DivergedError
from chexlib.evaluation.auroc import mean_auroc
from chexlib.evaluation.intervals import mean_of_seeds, over_seeds, percent_lost
from chexlib.findings import FINDINGS
from chexlib.studies.batch_norm import recalibrate_on
from chexlib.studies.population import judge_scores
from chexlib.training.callbacks import pooled_scorer
from chexlib.training.config import OPTIMIZERS, TrainConfig
from chexlib.training.fit import fit
from chexlib.training.recipes import LADDER, RULES
from chexlib.training.trainer import Reuse


def read_peaks(text: str) -> list[dict]:
    """Highest rates as notebook 06 takes them: "0.03,0.1,lamb 0.0025", SGD's where no optimizer is
    named.

    Returns
    -------
    list of dict
        optimizer and peak of each, once.

    Raises
    ------
    ConfigError
        An unknown optimizer, no rate, or one that is not above 0; the first is not SGD's.
    """
    found = []
    for entry in text.split(","):
        *named, rate = entry.split() or [""]
        optimizer = " ".join(named) or "sgd"
        try:
            peak = float(rate)
        except ValueError:
            peak = np.nan
        if optimizer not in OPTIMIZERS or not 0 < peak < np.inf:
            raise ConfigError(
                f"a highest rate of {entry.strip()!r} is not accepted. Write rates above 0, those "
                "of other optimizers than SGD after their name, as in 0.03,lamb 0.0025. "
                f"Optimizers: {', '.join(OPTIMIZERS)}."
            )
        if (known := {"optimizer": optimizer, "peak": peak}) not in found:
            found.append(known)
    if found[0]["optimizer"] != "sgd":
        raise ConfigError(
            f"the first highest rate, {text.split(',')[0]!r}, is of the ladder. Begin with one of "
            "SGD."
        )
    return found


def recipe_grid(
    *,
    rungs: Sequence[str] = tuple(LADDER),
    batches: Sequence[int],
    local_batch: int,
    peak: float,
    rule: str = "linear",
    optimizer: str = "sgd",
    seeds: Sequence[int],
    images: int,
    epochs: int,
    augment: str = "radiograph",
) -> list[dict]:
    """The trainings of the ladder at each global batch, all of equal epochs.

    Batches that leave fewer than 4 updates in all are left out: the longest rung has 3 phases.

    Parameters
    ----------
    rungs : names in `chexlib.training.recipes.LADDER`
    batches : global batches, the smallest first
    local_batch : images normalised together; the rest of a global batch is accumulated
    images : of an epoch
    peak : the highest rate at the smallest global batch
    rule : how it follows the global batch
    optimizer : named in the points unless it is SGD

    Raises
    ------
    ConfigError
        A global batch above the local one that is no multiple of it.
    """
    for batch in batches:
        if batch > local_batch and batch % local_batch:
            raise ConfigError(
                f"a global batch of {batch} is not accepted with a local batch of {local_batch}. "
                "Use multiples of it, or batches below it."
            )
    points = []
    for batch in (b for b in sorted(batches, reverse=True) if epochs * -(-images // b) >= 4):
        for rung in rungs:
            highest = peak * (batch / min(batches)) ** RULES[rule]
            schedule = json.dumps({"preset": rung, "peak": highest, "epochs": epochs})
            local = min(local_batch, batch)
            point = {
                "rung": rung,
                "batch": batch,
                "batch_size": local,
                "accumulation": batch // local,
            }
            point |= {"schedule": schedule, "epochs": epochs, "augment": augment}
            point |= {} if optimizer == "sgd" else {"optimizer": optimizer}
            points += [{**point, "seed": seed} for seed in seeds]
    return points


def measure_recipe(config: TrainConfig, *, reuse: Reuse | None = None) -> dict | None:
    """Train, and judge the last weights on the test part.

    Judged by the statistics of the population (`recalibrate`), because after few updates moving
    statistics trail the weights: that loss is not the recipe's, and notebook 05 measures it.

    Returns
    -------
    dict or None
        diverged; auroc (mean) and loss; auroc_<finding>; auroc_moving, by moving statistics;
        validation, mean AUROC there; seconds. None if the training was stopped.
    """

    def look(trainer, parts, world):
        score = pooled_scorer(trainer.infer, parts, world, size=config.size)
        labels = parts["test"].labels
        known = {"auroc_moving": mean_auroc(labels, score("test"))}
        recalibrate_on(parts["train"], trainer, world, size=config.size)
        known["validation"] = mean_auroc(parts["validation"].labels, score("validation"))
        scores = score("test")
        each = {
            f"auroc_{f}": mean_auroc(labels[:, [i]], scores[:, [i]]) for i, f in enumerate(FINDINGS)
        }
        return {**judge_scores(labels, scores), **each, **known}

    try:
        result = fit(config, reuse=reuse, measure=look)
    except DivergedError:
        return {"diverged": True}
    if result.stopped:
        return None
    return {"diverged": False, **result.measured, "seconds": result.seconds}


def ladder_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean test AUROC of each rung, and what it gains over the rung before, paired by seed, with
    Student's t interval.

    Parameters
    ----------
    rows : of `measure_recipe`, of one global batch

    Returns
    -------
    DataFrame
        Index the rungs in their order; columns auroc, gain, low, high, seeds. The interval is over
        seeds, NaN for one.
    """
    if rows.empty:
        raise ConfigError("there are no rows of this batch. Train the grid first.")
    table = rows.pivot_table(index="seed", columns="rung", values="auroc", dropna=False)
    table = table[[rung for rung in LADDER if rung in table]]
    gains = table.diff(axis=1)
    found = pd.DataFrame({rung: mean_of_seeds(gains[rung]) for rung in table}).T
    found = found.rename(columns={"effect": "gain"}).assign(seeds=table.notna().sum())
    found.insert(0, "auroc", table.mean())
    return found.rename_axis("rung")


def batch_losses(rows: pd.DataFrame, *, images: int) -> pd.DataFrame:
    """What each global batch loses against the smallest, in % of that one's skill above chance,
    paired by seed.

    Parameters
    ----------
    rows : of `measure_recipe`
    images : training images, for the updates an epoch

    Returns
    -------
    DataFrame
        A row a rung and batch above the smallest: rung, batch, updates (an epoch); baseline, mean
        AUROC of the smallest batch, loss, low, high, seeds, as of `percent_lost`: NaN where the
        baseline has not learnt.
    """
    table = rows.pivot_table(index="seed", columns=["batch", "rung"], values="auroc")
    smallest = table.columns.levels[0].min()
    found = []
    for batch, rung in table:
        if batch > smallest and (smallest, rung) in table:
            lost = percent_lost(table[smallest, rung], table[batch, rung])
            updates = -(-images // int(batch))
            found.append({"rung": rung, "batch": batch, "updates": updates, **lost})
    return pd.DataFrame(
        found, columns=["rung", "batch", "updates", "baseline", "loss", "low", "high", "seeds"]
    )


def peaks_tried(rows: pd.DataFrame) -> pd.DataFrame:
    """How a recipe does at each highest rate that was tried, by batch; `chosen` is the best on
    validation.

    Parameters
    ----------
    rows : of `measure_recipe`, of one rung

    Returns
    -------
    DataFrame
        A row a batch, optimizer and peak: batch, optimizer, peak, validation and auroc (means over
        seeds), low, high (Student's interval of auroc over seeds), seeds, chosen.
    """
    by = ["batch", "optimizer", "peak"]
    rows = _with_peaks(rows)
    table = over_seeds(rows, by, ["auroc"]).drop(columns="value").rename(columns={"mean": "auroc"})
    means = rows.groupby(by)["validation"].mean().rename("validation").reset_index()
    table = table.merge(means).sort_values(by, ascending=[True, False, True], ignore_index=True)
    best = table.groupby("batch")["validation"].transform("max")
    return table.assign(chosen=table["validation"] == best)[
        [*by, "validation", "auroc", "low", "high", "seeds", "chosen"]
    ]


def best_peak_loss(rows: pd.DataFrame, *, optimizer: str = "") -> dict:
    """Mean test AUROC of the smallest batch less the largest's, each at its `chosen` peak, paired
    by seed.

    Parameters
    ----------
    rows : of `measure_recipe`, of one rung
    optimizer : of this one only; empty: the best of all that were tried

    Returns
    -------
    dict
        batches, optimizers (of both), difference, low, high (Student's over seeds, NaN for one),
        seeds.
    """
    rows = _with_peaks(rows)
    rows = rows[rows["optimizer"] == optimizer] if optimizer else rows
    chosen = peaks_tried(rows).query("chosen")[["batch", "optimizer", "peak"]]
    table = rows.merge(chosen).pivot_table(index="seed", columns="batch", values="auroc")
    ends = [int(table.columns.min()), int(table.columns.max())]
    apart = mean_of_seeds(table[ends[0]] - table[ends[1]])
    used = chosen.set_index("batch")["optimizer"]
    return {
        "batches": ends,
        "optimizers": [used[end] for end in ends],
        "difference": apart.pop("effect"),
        **apart,
    }


def _with_peaks(rows: pd.DataFrame) -> pd.DataFrame:
    """With the columns peak, from the schedule, and optimizer."""
    named = rows["optimizer"].fillna("sgd") if "optimizer" in rows else "sgd"
    return rows.assign(
        peak=[json.loads(schedule)["peak"] for schedule in rows["schedule"]], optimizer=named
    )
