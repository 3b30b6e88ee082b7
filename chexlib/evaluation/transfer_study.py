"""The study's three rules of fine-tuning, tested for notebook 07: its grid, and what the rows say of each rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError, DivergedError
from chexlib.evaluation.batch_norm import judge_scores
from chexlib.evaluation.student import mean_of_seeds
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.monitor import pooled_scorer
from chexlib.training.reuse import Reuse
from chexlib.training.transfer import WARMUP_BATCH, fine_schedule, finetune

OWN, DEFAULT = "the checkpoint's", "the default"
RULES = {
    "earlier": "do not take the last checkpoint",
    "rate": "start at the rate it was being trained at",
    "warm-up": "warm up in proportion to the global batch",
}


def transfer_grid(snapshots: int, *, seeds: Sequence[int], batch: int, warmup_epochs: float) -> list[dict]:
    """Fine-tunings from each snapshot at both rates, with and without a warm-up, for each seed.

    Parameters
    ----------
    snapshots : how many there are
    batch : images an update
    warmup_epochs : of those with a warm-up, at this batch; at others in proportion
    """
    return [
        {"snapshot": snapshot, "rate": rate, "warmup": warmup, "batch": batch, "seed": seed}
        for snapshot in range(1, snapshots + 1)
        for rate in (OWN, DEFAULT)
        for warmup in (warmup_epochs * WARMUP_BATCH / batch, 0.0)
        for seed in seeds
    ]


def scratch_grid(*, seeds: Sequence[int], batch: int, warmup_epochs: float) -> list[dict]:
    """Trainings from random weights, snapshot 0, otherwise as `transfer_grid` has them at the default rate."""
    start = {"snapshot": 0, "rate": DEFAULT, "batch": batch}
    return [{**start, "warmup": warmup_epochs * WARMUP_BATCH / batch, "seed": seed} for seed in seeds]


def batch_grid(batches: Sequence[int], *, like: dict, seeds: Sequence[int]) -> list[dict]:
    """Fine-tunings like a point of the grid that differ in the global batch alone, and so in updates an epoch."""
    return [{**like, "rate_batch": like["batch"], "batch": b, "seed": seed} for b in batches for seed in seeds]


def measure_transfer(
    config: TrainConfig, point: dict, snapshots: pd.DataFrame, *, default: float, reuse: Reuse | None = None
) -> dict | None:
    """Fine-tune as a point of the grid says, and judge the last weights on the test part.

    From snapshot 0, random weights, all else is the same: epochs, schedule, images whose statistics batch norm takes.
    At another batch than the grid's own the rate follows its square root, as suits Adam (Malladi et al. 2022).

    Parameters
    ----------
    config : TrainConfig
        What all points have in common.
    snapshots : table of `snapshots_of`
    default : the default rate

    Returns
    -------
    dict or None
        diverged; auroc (mean) and loss; highest (rate), images (of pre-training), updates (an epoch), seconds. None if
        the training was stopped.
    """
    start = snapshots.iloc[point["snapshot"] - 1] if point["snapshot"] else {"images": 0}
    rate = float(start["learning_rate"]) if point["rate"] == OWN else default
    local = min(point["batch"], config.batch_size)
    if point["batch"] % local:
        raise ConfigError(f"a global batch of {point['batch']} is no multiple of {local}. Use multiples of it.")
    rate *= np.sqrt(point["batch"] / point.get("rate_batch", point["batch"]))
    known = {"highest": float(rate), "images": int(start["images"])}
    config = config.replace(batch_size=local, accumulation=point["batch"] // local, seed=point["seed"])

    def look(trainer, parts, world):
        scores = pooled_scorer(trainer.infer, parts, world, size=config.size)("test")
        return judge_scores(parts["test"].labels, scores)

    try:
        if point["snapshot"]:
            own = {"rate": float(rate), "warmup": point["warmup"], "measure": look, "reuse": reuse}
            result = finetune(start["path"], config, **own)
        else:
            warmup = point["warmup"] * point["batch"] / WARMUP_BATCH
            alone = fine_schedule(float(rate), epochs=config.epochs, warmup=warmup)
            result = fit(config.replace(schedule=alone), measure=look, reuse=reuse)
    except DivergedError:
        return {"diverged": True, **known}
    if result.stopped:
        return None
    updates = -(-result.split["images"]["train"] // point["batch"])
    return {"diverged": False, **result.measured, **known, "updates": updates, "seconds": result.seconds}


def earlier_gains(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """What each earlier snapshot gains over the last one at the default rate, paired by seed and warm-up.

    The intervals hold together: each is at 1 - (1 - level) / (number of earlier snapshots), after Bonferroni.

    Returns
    -------
    DataFrame
        Index the snapshot; columns images, effect, low, high, seeds.
    """
    own = rows[rows["rate"] == DEFAULT]
    by_seed = own.pivot_table(index="seed", columns="snapshot", values="auroc")
    last = by_seed.pop(by_seed.columns.max())
    return _gains_over(last, by_seed, rows, level)


def pretraining_gains(rows: pd.DataFrame, scratch: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """What each snapshot gains over random weights, both at the default rate with a warm-up, paired by seed.

    The intervals hold together, as those of `earlier_gains` do.

    Parameters
    ----------
    rows : of `transfer_grid`
    scratch : rows of `scratch_grid`

    Returns
    -------
    DataFrame
        Index the snapshot; columns images, effect, low, high, seeds.
    """
    own = rows[(rows["rate"] == DEFAULT) & (rows["warmup"] > 0)]
    by_seed = own.pivot_table(index="seed", columns="snapshot", values="auroc")
    return _gains_over(scratch.set_index("seed")["auroc"], by_seed, rows, level)


def _gains_over(other: pd.Series, by_seed: pd.DataFrame, rows: pd.DataFrame, level: float) -> pd.DataFrame:
    """What each snapshot, a column of `by_seed`, gains over `other`; intervals that hold together, after Bonferroni."""
    apart = 1 - (1 - level) / max(by_seed.shape[1], 1)
    images = rows.groupby("snapshot")["images"].first()
    found = [{"images": images[s], **mean_of_seeds(by_seed[s] - other, level=apart)} for s in by_seed]
    return pd.DataFrame(found, index=pd.Index(by_seed.columns, name="snapshot"))


def rule_effects(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """The three rules: what following each gains in test AUROC, with an interval over seeds, and a verdict.

    "earlier" is the earlier snapshot that gains most over the last, with the interval that holds for all of them
    together; "rate" and "warm-up" are means over all snapshots, paired by seed.

    Returns
    -------
    DataFrame
        Index `RULES`; columns rule, effect, low, high, seeds, verdict: confirmed, contradicted, or open where the
        interval holds 0 or there is none.
    """
    gains = earlier_gains(rows, level=level)
    best = gains["effect"].idxmax() if len(gains) else None
    found = {"earlier": gains.loc[best].drop("images").to_dict() if best else mean_of_seeds(pd.Series(dtype=float))}
    found["rate"] = _rate_gain(rows, level)
    by_warmup = rows.assign(warm=rows["warmup"] > 0).pivot_table(index="seed", columns="warm", values="auroc")
    found["warm-up"] = mean_of_seeds(by_warmup[True] - by_warmup[False], level=level)
    table = pd.DataFrame(found).T
    table.insert(0, "rule", pd.Series(RULES))
    against = table["high"] < 0
    if len(gains):  # this rule is contradicted where the last is better than every earlier one
        against["earlier"] = bool((gains["high"] < 0).all())
    table["verdict"] = np.where(table["low"] > 0, "confirmed", np.where(against, "contradicted", "open"))
    return table.astype({"seeds": int})


def rate_gains(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """What each snapshot's own rate gains over the default: index the snapshot; columns effect, low, high, seeds."""
    found = {snapshot: _rate_gain(own, level) for snapshot, own in rows.groupby("snapshot")}
    return pd.DataFrame(found).T.rename_axis("snapshot")


def _rate_gain(rows: pd.DataFrame, level: float) -> dict:
    by_rate = rows.pivot_table(index="seed", columns="rate", values="auroc")
    return mean_of_seeds(by_rate[OWN] - by_rate[DEFAULT], level=level)


def along(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean test AUROC over seeds: a row a snapshot, by images seen in pre-training; a column a rate and warm-up."""
    start = rows["warmup"].gt(0).map({True: "warm-up", False: "no warm-up"})
    return rows.assign(arm=rows["rate"] + " rate, " + start).pivot_table(index="images", columns="arm", values="auroc")


def by_updates(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean test AUROC by updates an epoch, and what each batch loses against the smallest, paired by seed.

    Returns
    -------
    DataFrame
        Index the batch; columns updates, auroc, effect (over the smallest batch), low, high, seeds.
    """
    table = rows.pivot_table(index="seed", columns="batch", values="auroc")
    smallest = table.columns.min()
    updates = rows.groupby("batch")["updates"].first()
    found = [
        {"updates": int(updates[b]), "auroc": table[b].mean(), **mean_of_seeds(table[b] - table[smallest])}
        for b in table
    ]
    return pd.DataFrame(found, index=pd.Index(table.columns, name="batch"))
