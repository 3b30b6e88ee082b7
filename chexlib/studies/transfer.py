"""Transfer learning, for notebook 07: `pretrain` on a stream of phantoms, the schedule of a
fine-tuning from any snapshot of it, and the grid that tests the study's three rules.

The rules (published.md, "Transfer learning"): do not take the last pre-trained checkpoint; start at
the rate it was being trained at; warm up in proportion to the global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError
from chexlib.evaluation.intervals import (
    CONTRADICTED,
    LEVEL,
    UNDECIDED,
    has_learnt,
    mean_of_seeds,
    nothing_learnt,
    percent_lost,
    verdict_on_gain,
)
from chexlib.evaluation.verdicts import NOT_COMPARABLE
from chexlib.studies.grid import measure_training
from chexlib.studies.judge import judge_scores
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training, TrainResult, fit
from chexlib.training.trainer import Reuse

WARMUP_BATCH = 256  # images of the global batch for which a warm-up is given in epochs
LONGEST = 0.5  # share of the epochs that a warm-up may take
FLOOR = 0.01  # of the highest rate, where the cosine ends
OWN, DEFAULT = "the checkpoint's", "the default"  # rates that a fine-tuning starts at
RULES = {
    "earlier": "do not take the last checkpoint",
    "rate": "start at the rate it was being trained at",
    "warm-up": "warm up in proportion to the global batch",
}


def pretrain(config: TrainConfig, *, images: int, snapshots: int) -> TrainResult:
    """Train on phantom radiographs none of which is seen twice, and keep a model now and then.

    Parameters
    ----------
    config : TrainConfig
        Its `data_dir` is a phantom: the stream draws others like it, and the phantom itself
        validates. A training that was stopped goes on with `resume`.
    images : int
        Of the stream, in all.
    snapshots : int
        Models kept, evenly along the way, with rate, step and images seen (`snapshots_of`).

    Raises
    ------
    ConfigError
        Fewer images than snapshots, or settings that a stream does not go with.

    Examples
    --------
    >>> config = TrainConfig(data_dir="data/phantom/p", run_dir="runs/pre", size=64)
    >>> result = pretrain(config, images=100_000, snapshots=8)
    >>> snapshots_of("runs/pre")[["path", "learning_rate", "images"]]
    """
    if not 1 <= snapshots <= images:
        raise ConfigError(
            f"{images} images cannot give {snapshots} snapshots. Use at most one snapshot an image."
        )
    each = images // snapshots
    return fit(config.replace(stream_images=each, epochs=snapshots, snapshots=True))


def fine_schedule(rate: float, *, epochs: int, warmup: float) -> dict:
    """A linear warm-up of so many epochs from a hundredth of `rate`, and a cosine down to a
    hundredth.
    """
    warmup = min(warmup, LONGEST * epochs)
    rise = {"kind": "warmup", "length": warmup, "start": FLOOR * rate, "rate": rate}
    fall = {"kind": "cosine", "length": epochs - warmup, "rate": rate, "end": FLOOR * rate}
    return {"unit": "epochs", "phases": [rise, fall] if warmup else [fall]}


def transfer_grid(
    snapshots: int, *, seeds: Sequence[int], batch: int, warmup_epochs: float
) -> list[dict]:
    """Fine-tunings from each snapshot at both rates, with and without a warm-up, for each seed.

    Parameters
    ----------
    snapshots : how many there are
    batch : images per update
    warmup_epochs : of those with a warm-up, at this batch; at others in proportion
    """
    warmups = [warmup_epochs * WARMUP_BATCH / batch, 0.0]
    names = ("snapshot", "rate", "warmup", "seed")
    settings = itertools.product(range(1, snapshots + 1), (OWN, DEFAULT), warmups, seeds)
    return [{**dict(zip(names, values, strict=True)), "batch": batch} for values in settings]


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
    local = min(point["batch"], config.batch_size)
    if point["batch"] % local:
        raise ConfigError(
            f"a global batch of {point['batch']} is no multiple of {local}. Use multiples of it."
        )
    rate, images = default, 0
    if point["snapshot"]:
        start = snapshots.iloc[point["snapshot"] - 1]
        config, images = config.replace(weights=start["path"]), int(start["images"])
        if point["rate"] == OWN:
            rate = start["learning_rate"]
    rate = float(rate * np.sqrt(point["batch"] / point.get("rate_batch", point["batch"])))
    warmup = point["warmup"] * point["batch"] / WARMUP_BATCH
    config = config.replace(
        schedule=fine_schedule(rate, epochs=config.epochs, warmup=warmup),
        batch_size=local,
        accumulation=point["batch"] // local,
        seed=point["seed"],
    )

    def columns(training: Training) -> dict:
        judged = judge_scores(training.parts["test"].labels, training.score("test"))
        updates = -(-len(training.parts["train"]) // point["batch"])
        return {**judged, "updates": updates, "seconds": training.seconds}

    row = measure_training(config, columns, reuse=reuse)
    return row and {**row, "highest": rate, "images": images}


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
    table = _areas(rows[rows["rate"] == DEFAULT], ["warmup", "seed"], "snapshot")
    last = table.pop(table.columns.max())
    return _gains_over(last, table, rows)


def pretraining_gains(rows: pd.DataFrame, scratch: pd.DataFrame) -> pd.DataFrame:
    """What each snapshot gains over random weights, both at the default rate with a warm-up, paired
    by seed.

    The pairs are complete and the intervals hold together, as those of `earlier_gains`.

    Parameters
    ----------
    rows : of `transfer_grid`
    scratch : the same from random weights, with columns seed and auroc

    Returns
    -------
    DataFrame
        Index the snapshot; columns as those of `earlier_gains`.
    """
    warm = rows[(rows["rate"] == DEFAULT) & (rows["warmup"] > 0)]
    table = _areas(warm, ["seed"], "snapshot")
    return _gains_over(scratch.set_index("seed")["auroc"], table, rows)


def _gains_over(other: pd.Series, table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """What each snapshot, a column of `table`, gains over `other`, with simultaneous intervals."""
    level = 1 - (1 - LEVEL) / max(table.shape[1], 1)
    images = rows.groupby("snapshot")["images"].first()
    gains = []
    for snapshot in table:
        pairs = pd.DataFrame({"one": table[snapshot], "other": other})
        gains.append({"images": images[snapshot], **_mean_of_pairs(pairs, level)})
    return pd.DataFrame(gains, index=pd.Index(table.columns, name="snapshot"))


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
    warm = rows.assign(start=rows["warmup"].gt(0).map({True: "warm-up", False: "none"}))
    by_warmup = _areas(warm, ["snapshot", "rate", "seed"], "start")
    warmup = _mean_of_pairs(by_warmup[["warm-up", "none"]])
    table = pd.DataFrame({"earlier": earlier, "rate": _rate_gain(rows), "warm-up": warmup}).T
    table.insert(0, "rule", pd.Series(RULES))
    intervals = zip(table["low"], table["high"], strict=True)
    table["verdict"] = [verdict_on_gain(low, high) for low, high in intervals]
    if table.loc["earlier", "verdict"] == CONTRADICTED and not (gains["high"] < 0).all():
        # Contradicted only where the last beats every earlier one.
        table.loc["earlier", "verdict"] = UNDECIDED
    highest = rows.groupby(["images", "rate", "warmup"])["auroc"].mean().max()
    if not has_learnt(highest):
        table["verdict"] = NOT_COMPARABLE
    table["why"] = [_why(row, highest) for row in table.to_dict("records")]
    return table.astype({"seeds": int, "pairs": int, "diverged": int})


def _why(rule: dict, highest: float) -> str:
    """What a reader of a verdict must know besides the interval."""
    if not has_learnt(highest):
        return nothing_learnt(highest)
    reasons = ["one seed: there is no interval"] if rule["seeds"] == 1 else []
    if rule["diverged"]:
        count = f"{rule['diverged']:.0f}"
        reasons.append(f"trainings that diverged, left out with their pairs: {count}")
    return "; ".join(reasons)


def rate_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What each snapshot's own rate gains over the default.

    Returns
    -------
    DataFrame
        Index the snapshot; columns effect, low, high, seeds, pairs, diverged.
    """
    gains = {snapshot: _rate_gain(fine) for snapshot, fine in rows.groupby("snapshot")}
    return pd.DataFrame(gains).T.rename_axis("snapshot")


def _rate_gain(rows: pd.DataFrame) -> dict:
    by_rate = _areas(rows, ["snapshot", "warmup", "seed"], "rate")
    return _mean_of_pairs(by_rate[[OWN, DEFAULT]])


def by_updates(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean test AUROC by updates per epoch, and what each batch loses against the smallest, paired
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
    losses = []
    for batch in table:
        gain = mean_of_seeds(table[batch] - smallest)
        lost = percent_lost(smallest, table[batch])
        row = {
            "updates": int(updates[batch]),
            "auroc": table[batch].mean(),
            **gain,
            "loss": lost["loss"],
            "loss_low": lost["low"],
            "loss_high": lost["high"],
        }
        losses.append(row)
    return pd.DataFrame(losses, index=pd.Index(table.columns, name="batch"))
