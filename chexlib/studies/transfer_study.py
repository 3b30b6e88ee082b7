"""The study's three rules of fine-tuning, tested for notebook 07: its grid, and what the rows say
of each rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError, DivergedError
from chexlib.evaluation.intervals import (
    CONTRADICTED,
    LEVEL,
    NOT_MEASURED,
    UNDECIDED,
    has_learnt,
    mean_of_seeds,
    nothing_learnt,
    percent_lost,
    verdict_on_gain,
)
from chexlib.studies.population import judge_scores
from chexlib.studies.transfer import WARMUP_BATCH, fine_schedule, finetune
from chexlib.training.callbacks import pooled_scorer
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.trainer import Reuse

OWN, DEFAULT = "the checkpoint's", "the default"
RULES = {
    "earlier": "do not take the last checkpoint",
    "rate": "start at the rate it was being trained at",
    "warm-up": "warm up in proportion to the global batch",
}


def transfer_grid(
    snapshots: int, *, seeds: Sequence[int], batch: int, warmup_epochs: float
) -> list[dict]:
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
    """Trainings from random weights, snapshot 0, otherwise as `transfer_grid` has them at the
    default rate.
    """
    start = {"snapshot": 0, "rate": DEFAULT, "batch": batch}
    return [
        {**start, "warmup": warmup_epochs * WARMUP_BATCH / batch, "seed": seed} for seed in seeds
    ]


def batch_grid(batches: Sequence[int], *, like: dict, seeds: Sequence[int]) -> list[dict]:
    """Fine-tunings like a point of the grid that differ in the global batch alone, and so in
    updates an epoch.
    """
    return [
        {**like, "rate_batch": like["batch"], "batch": b, "seed": seed}
        for b in batches
        for seed in seeds
    ]


def measure_transfer(
    config: TrainConfig,
    point: dict,
    snapshots: pd.DataFrame,
    *,
    default: float,
    reuse: Reuse | None = None,
) -> dict | None:
    """Fine-tune as a point of the grid says, and judge the last weights on the test part.

    From snapshot 0, random weights, all else is the same: epochs, schedule, images whose statistics
    batch norm takes. At another batch than the grid's own the rate follows its square root, as
    suits Adam (Malladi et al. 2022).

    Parameters
    ----------
    config : TrainConfig
        What all points have in common.
    snapshots : table of `snapshots_of`
    default : the default rate

    Returns
    -------
    dict or None
        diverged; auroc (mean) and loss; highest (rate), images (of pre-training), updates (an
        epoch), seconds. None if the training was stopped.
    """
    start = snapshots.iloc[point["snapshot"] - 1] if point["snapshot"] else {"images": 0}
    rate = float(start["learning_rate"]) if point["rate"] == OWN else default
    local = min(point["batch"], config.batch_size)
    if point["batch"] % local:
        raise ConfigError(
            f"a global batch of {point['batch']} is no multiple of {local}. Use multiples of it."
        )
    rate *= np.sqrt(point["batch"] / point.get("rate_batch", point["batch"]))
    known = {"highest": float(rate), "images": int(start["images"])}
    config = config.replace(
        batch_size=local, accumulation=point["batch"] // local, seed=point["seed"]
    )

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
    return {
        "diverged": False,
        **result.measured,
        **known,
        "updates": updates,
        "seconds": result.seconds,
    }


def earlier_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What each earlier snapshot gains over the last one at the default rate, paired by seed and
    warm-up.

    Complete pairs only: where one of the two trainings diverged, the other is left out too. The
    intervals hold together: each is at 1 - (1 - 0.95) / (number of earlier snapshots), after
    Bonferroni.

    Parameters
    ----------
    rows : of `transfer_grid`, those of trainings that diverged too: their AUROC is NaN

    Returns
    -------
    DataFrame
        Index the snapshot; columns images, effect, low, high, seeds, pairs (complete ones),
        diverged (trainings).
    """
    own = rows[rows["rate"] == DEFAULT]
    table = _areas(own, ["warmup", "seed"], "snapshot")
    last = table.pop(table.columns.max())
    return _gains_over(last, table, rows)


def pretraining_gains(rows: pd.DataFrame, scratch: pd.DataFrame) -> pd.DataFrame:
    """What each snapshot gains over random weights, both at the default rate with a warm-up, paired
    by seed.

    The pairs are complete and the intervals hold together, as those of `earlier_gains`.

    Parameters
    ----------
    rows : of `transfer_grid`
    scratch : rows of `scratch_grid`

    Returns
    -------
    DataFrame
        Index the snapshot; columns as those of `earlier_gains`.
    """
    own = rows[(rows["rate"] == DEFAULT) & (rows["warmup"] > 0)]
    table = _areas(own, ["seed"], "snapshot")
    return _gains_over(scratch.set_index("seed")["auroc"], table, rows)


def _gains_over(other: pd.Series, table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """What each snapshot, a column of `table`, gains over `other`, with simultaneous intervals."""
    apart = 1 - (1 - LEVEL) / max(table.shape[1], 1)
    images = rows.groupby("snapshot")["images"].first()
    found = []
    for snapshot in table:
        pairs = pd.DataFrame({"one": table[snapshot], "other": other})
        found.append({"images": images[snapshot], **_mean_of_pairs(pairs, apart)})
    return pd.DataFrame(found, index=pd.Index(table.columns, name="snapshot"))


def _areas(rows: pd.DataFrame, index: Sequence[str], columns: str) -> pd.DataFrame:
    """AUROC of each training, NaN where it diverged: a pivot table would leave rows of these out."""
    return rows.pivot(index=list(index), columns=columns, values="auroc")  # noqa: PD010


def _mean_of_pairs(pairs: pd.DataFrame, level: float = LEVEL) -> dict:
    """The mean gain of the first column over the second: of the pairs of a seed first, then over
    seeds.

    Parameters
    ----------
    pairs : two columns of AUROC, NaN where a training diverged; the index has the seed

    Returns
    -------
    dict
        effect, low, high, seeds; pairs, the complete ones; diverged, the trainings that did.
    """
    gains = (pairs.iloc[:, 0] - pairs.iloc[:, 1]).dropna()
    counts = {"pairs": len(gains), "diverged": int(pairs.isna().sum().sum())}
    return {**mean_of_seeds(gains.groupby(level="seed").mean(), level=level), **counts}


def rule_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """The three rules: what following each gains in test AUROC, with an interval over seeds, and a
    verdict.

    "earlier" is the earlier snapshot that gains most over the last, with the interval that holds
    for all of them together; "rate" and "warm-up" are means over all snapshots. Complete pairs
    only, as in `earlier_gains`: a mean of what is left after a cell of the grid diverged would
    compare other snapshots on either side.

    Returns
    -------
    DataFrame
        Index `RULES`; columns rule, effect, low, high, seeds, pairs, diverged, verdict, why. The
        verdict is one of `chexlib.evaluation.intervals`: undecided where the interval holds 0 or
        there is none, and not measured where no fine-tuning has learnt.
    """
    gains = earlier_gains(rows)
    if len(gains):
        best = gains["effect"].fillna(-np.inf).idxmax()
        earlier = gains.loc[best].drop("images").to_dict()
    else:
        none = pd.Index([], name="seed")
        earlier = _mean_of_pairs(pd.DataFrame({"one": [], "other": []}, none, dtype=float))
    found = {"earlier": earlier}
    found["rate"] = _rate_gain(rows)
    warm = rows.assign(start=rows["warmup"].gt(0).map({True: "warm-up", False: "none"}))
    by_warmup = _areas(warm, ["snapshot", "rate", "seed"], "start")
    found["warm-up"] = _mean_of_pairs(by_warmup[["warm-up", "none"]])
    table = pd.DataFrame(found).T
    table.insert(0, "rule", pd.Series(RULES))
    table["verdict"] = [
        verdict_on_gain(low, high) for low, high in zip(table["low"], table["high"], strict=True)
    ]
    if table.loc["earlier", "verdict"] == CONTRADICTED and not (gains["high"] < 0).all():
        # Contradicted only where the last beats every earlier one.
        table.loc["earlier", "verdict"] = UNDECIDED
    highest = float(along(rows).max(axis=None))
    if not has_learnt(highest):
        table["verdict"] = NOT_MEASURED
    table["why"] = [_why(row, highest) for row in table.to_dict("records")]
    return table.astype({"seeds": int, "pairs": int, "diverged": int})


def _why(rule: dict, highest: float) -> str:
    """What a reader of a verdict must know besides the interval."""
    if not has_learnt(highest):
        return nothing_learnt(highest)
    said = ["one seed: there is no interval"] if rule["seeds"] == 1 else []
    if rule["diverged"]:
        said.append(f"trainings that diverged, left out with their pairs: {rule['diverged']:.0f}")
    return "; ".join(said)


def rate_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What each snapshot's own rate gains over the default.

    Returns
    -------
    DataFrame
        Index the snapshot; columns effect, low, high, seeds, pairs, diverged.
    """
    found = {snapshot: _rate_gain(own) for snapshot, own in rows.groupby("snapshot")}
    return pd.DataFrame(found).T.rename_axis("snapshot")


def _rate_gain(rows: pd.DataFrame) -> dict:
    by_rate = _areas(rows, ["snapshot", "warmup", "seed"], "rate")
    return _mean_of_pairs(by_rate[[OWN, DEFAULT]])


def along(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean test AUROC over seeds: a row a snapshot, by images seen in pre-training; a column a rate
    and warm-up.
    """
    start = rows["warmup"].gt(0).map({True: "warm-up", False: "no warm-up"})
    return rows.assign(arm=rows["rate"] + " rate, " + start).pivot_table(
        index="images", columns="arm", values="auroc"
    )


def by_updates(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean test AUROC by updates an epoch, and what each batch loses against the smallest, paired
    by seed.

    Returns
    -------
    DataFrame
        Index the batch; columns updates, auroc, effect (over the smallest batch), low, high, seeds;
        loss, loss_low, loss_high: `percent_lost` of the smallest batch's skill above chance, NaN
        where that has not learnt.
    """
    table = rows.pivot_table(index="seed", columns="batch", values="auroc")
    smallest = table[table.columns.min()]
    updates = rows.groupby("batch")["updates"].first()
    found = []
    for batch in table:
        lost = percent_lost(smallest, table[batch])
        row = {"updates": int(updates[batch]), "auroc": table[batch].mean()}
        row |= mean_of_seeds(table[batch] - smallest)
        found.append(
            row | {"loss": lost["loss"], "loss_low": lost["low"], "loss_high": lost["high"]}
        )
    return pd.DataFrame(found, index=pd.Index(table.columns, name="batch"))
