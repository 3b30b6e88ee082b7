"""The large-batch recipes of notebook 06: their grid, what each training leaves in it, collapses
and their ensemble, and the tables of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import ConfigError
from chexlib.evaluation.auroc import auroc, mean_auroc, paired_difference
from chexlib.evaluation.ensembles import choose, diversity, save_ensemble, stack
from chexlib.evaluation.intervals import mean_of_seeds, over_seeds, percent_lost
from chexlib.findings import FINDINGS
from chexlib.studies.collapse import collapse, epoch_ends, score_checkpoints
from chexlib.studies.grid import measure_training
from chexlib.studies.judge import judge_scores, recalibrate_on_train
from chexlib.training.config import OPTIMIZERS, TrainConfig
from chexlib.training.fit import Training, fit
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
    peaks = []
    for entry in text.split(","):
        *named, rate = entry.split() or [""]
        optimizer = " ".join(named) or "sgd"
        try:
            highest = float(rate)
        except ValueError:
            highest = np.nan
        if optimizer not in OPTIMIZERS or not 0 < highest < np.inf:
            raise ConfigError(
                f"a highest rate of {entry.strip()!r} is not accepted. Write rates above 0, those "
                "of other optimizers than SGD after their name, as in 0.03,lamb 0.0025. "
                f"Optimizers: {', '.join(OPTIMIZERS)}."
            )
        peak = {"optimizer": optimizer, "peak": highest}
        if peak not in peaks:
            peaks.append(peak)
    if peaks[0]["optimizer"] != "sgd":
        raise ConfigError(
            f"the first highest rate, {text.split(',')[0]!r}, is of the ladder. Begin with one of "
            "SGD."
        )
    return peaks


def recipe_grid(
    *,
    rungs: Sequence[str],
    batches: Sequence[int],
    local_batch: int,
    peak: float,
    rule: str,
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
        A global batch above the local one that is no multiple of it; or too few images.
    """
    for batch in batches:
        if batch > local_batch and batch % local_batch:
            raise ConfigError(
                f"a global batch of {batch} is not accepted with a local batch of {local_batch}. "
                "Use multiples of it, or batches below it."
            )
    points = []
    for batch in sorted(batches, reverse=True):
        if epochs * -(-images // batch) < 4:
            continue
        local = min(local_batch, batch)
        highest = peak * (batch / min(batches)) ** RULES[rule]
        for rung in rungs:
            schedule = {"preset": rung, "peak": highest, "epochs": epochs}
            point = {
                "rung": rung,
                "batch": batch,
                "batch_size": local,
                "accumulation": batch // local,
                "schedule": json.dumps(schedule),
                "epochs": epochs,
                "augment": augment,
            }
            if optimizer != "sgd":
                point["optimizer"] = optimizer
            points += [{**point, "seed": seed} for seed in seeds]
    if not points:
        raise ConfigError(
            f"{images} images in global batches of {min(batches)} leave fewer than 4 updates in "
            f"{epochs} epochs. Use more images, smaller batches or more epochs."
        )
    return points


def measure_recipe(config: TrainConfig, *, reuse: Reuse) -> dict | None:
    """Train, and judge the last weights on the test part.

    Judged by the statistics of the population (`recalibrate`), because after few updates moving
    statistics trail the weights: that loss is not the recipe's, and notebook 05 measures it.

    Returns
    -------
    dict or None
        diverged; auroc (mean) and loss; auroc_<finding>; auroc_moving, by moving statistics;
        validation, mean AUROC there; seconds. None if the training was stopped.
    """

    def columns(training: Training) -> dict:
        labels = training.parts["test"].labels
        moving = mean_auroc(labels, training.score("test"))
        recalibrate_on_train(training)
        validation = training.score("validation")
        scores = training.score("test")
        row = judge_scores(labels, scores)
        for i, finding in enumerate(FINDINGS):
            row[f"auroc_{finding}"] = auroc(labels[:, i], scores[:, i])
        row["auroc_moving"] = moving
        row["validation"] = mean_auroc(training.parts["validation"].labels, validation)
        row["seconds"] = training.seconds
        return row

    return measure_training(config, columns, reuse=reuse)


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
    summary = pd.DataFrame({rung: mean_of_seeds(gains[rung]) for rung in table}).T
    summary = summary.rename(columns={"effect": "gain"}).assign(seeds=table.notna().sum())
    summary.insert(0, "auroc", table.mean())
    return summary.rename_axis("rung")


def batch_losses(rows: pd.DataFrame, *, images: int) -> pd.DataFrame:
    """What each global batch loses against the smallest, in % of that one's skill above chance,
    paired by seed.

    Parameters
    ----------
    rows : of `measure_recipe`
    images : training images, for the updates per epoch

    Returns
    -------
    DataFrame
        A row per rung and batch above the smallest: rung, batch, updates (an epoch); baseline, mean
        AUROC of the smallest batch, loss, low, high, seeds, as of `percent_lost`: NaN where the
        baseline has not learnt.
    """
    table = rows.pivot_table(index="seed", columns=["batch", "rung"], values="auroc")
    smallest = table.columns.levels[0].min()
    losses = []
    for batch, rung in table:
        if batch > smallest and (smallest, rung) in table:
            lost = percent_lost(table[smallest, rung], table[batch, rung])
            updates = -(-images // int(batch))
            losses.append({"rung": rung, "batch": batch, "updates": updates, **lost})
    columns = ["rung", "batch", "updates", "baseline", "loss", "low", "high", "seeds"]
    return pd.DataFrame(losses, columns=columns)


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
    table["chosen"] = table["validation"] == best
    return table[[*by, "validation", "auroc", "low", "high", "seeds", "chosen"]]


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
    smallest, largest = int(table.columns.min()), int(table.columns.max())
    gain = mean_of_seeds(table[smallest] - table[largest])
    used = chosen.set_index("batch")["optimizer"]
    return {
        "batches": [smallest, largest],
        "optimizers": [used[smallest], used[largest]],
        "difference": gain["effect"],
        "low": gain["low"],
        "high": gain["high"],
        "seeds": gain["seeds"],
    }


def _with_peaks(rows: pd.DataFrame) -> pd.DataFrame:
    """With the columns peak, from the schedule, and optimizer."""
    optimizers = rows["optimizer"].fillna("sgd") if "optimizer" in rows else "sgd"
    peaks = [json.loads(schedule)["peak"] for schedule in rows["schedule"]]
    return rows.assign(peak=peaks, optimizer=optimizers)


def measure_collapses(config: TrainConfig, *, ensemble: Path) -> dict | None:
    """Train, collapse from the end of every epoch, and make an ensemble of what comes out.

    Parameters
    ----------
    config : TrainConfig
        With a schedule that does not end in a rate of 0.
    ensemble : path
        Where the ensemble's one file goes.

    Returns
    -------
    dict or None
        before_<epoch> and after_<epoch>, mean test AUROC without and with a collapse;
        validation_<epoch> of the collapsed; chosen, the epochs of the ensemble; best_member, of
        those the best on validation; ensemble and member, their mean test AUROC; gain, gain_low,
        gain_high, and the same for each finding; diversity_<i>_<j> of each two epochs' members on
        validation, and diversity, their mean. None if the training was stopped.

    Raises
    ------
    WeightsError
        The checkpoint of an epoch's end is gone.
    """
    work = Path(config.run_dir)
    keep = 2 * config.epochs  # one an epoch, and a stop leaves one within an epoch too
    config = config.replace(checkpoint_steps=0, keep_checkpoints=keep, resume=True)
    result = fit(config)
    if result.stopped:
        return None
    points = epoch_ends(work / "checkpoints", epochs=len(result.history))
    before = score_checkpoints(list(points.values()))
    collapsed = {}
    for epoch, point in points.items():
        folder = work / f"collapse-{epoch}"
        done = (folder / "predictions.parquet").exists()  # by an earlier start of this row
        if not done and collapse(point, run_dir=folder, epochs=1, keep_checkpoints=0).stopped:
            return None
        collapsed[epoch] = pd.read_parquet(folder / "predictions.parquet")
    validation, labels, _ = stack(collapsed, part="validation")
    test, test_labels, patients = stack(collapsed, part="test")
    chosen = choose(validation, labels)
    together, best = test[chosen].mean(axis=0), chosen[0]
    members = [work / f"collapse-{i + 1}" / "model.keras" for i in chosen]
    ensemble.parent.mkdir(parents=True, exist_ok=True)
    save_ensemble(members, ensemble)
    row = {"chosen": ",".join(str(i + 1) for i in chosen), "best_member": best + 1}
    row |= _aurocs("before", test_labels, before)
    row |= _aurocs("after", test_labels, test)
    row |= _aurocs("validation", labels, validation)
    gains = paired_difference(test_labels, together, test[best], patients)
    for finding, gain in gains.iterrows():
        ending = "" if finding == "mean" else f"_{finding}"
        row[f"gain{ending}"] = gain["difference"]
        row[f"gain_low{ending}"] = gain["low"]
        row[f"gain_high{ending}"] = gain["high"]
    row["ensemble"] = mean_auroc(test_labels, together)
    row["member"] = mean_auroc(test_labels, test[best])
    unlike = diversity(validation, list(collapsed))
    pairs = {f"diversity_{i}_{j}": float(unlike.loc[i, j]) for i, j in combinations(collapsed, 2)}
    mean = float(np.mean(list(pairs.values()))) if pairs else 0.0
    return {**row, **pairs, "diversity": mean}


def _aurocs(name: str, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean AUROC of each epoch's scores, (epochs, n, 14)."""
    epochs = enumerate(scores, start=1)
    return {f"{name}_{epoch}": mean_auroc(labels, of_epoch) for epoch, of_epoch in epochs}


def collapse_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """AUROC before and after a collapse from each epoch, and means over seeds of its gain with
    Student's t intervals.

    Returns
    -------
    DataFrame
        Index the epoch; columns before, after, gain, low, high, seeds. A collapse is one epoch
        more, so the same over what the training itself had reached one epoch later: gain_later,
        low_later, high_later, NaN for the last.
    """
    epochs = sorted(int(name.split("_")[1]) for name in rows if name.startswith("before_"))
    gains = []
    for epoch in epochs:
        before, after = rows[f"before_{epoch}"], rows[f"after_{epoch}"]
        gain = mean_of_seeds(after - before)
        later = mean_of_seeds(after - rows.get(f"before_{epoch + 1}", np.nan))
        row = {
            "before": before.mean(),
            "after": after.mean(),
            "gain": gain["effect"],
            "low": gain["low"],
            "high": gain["high"],
            "seeds": gain["seeds"],
            "gain_later": later["effect"],
            "low_later": later["low"],
            "high_later": later["high"],
        }
        gains.append(row)
    return pd.DataFrame(gains, index=pd.Index(epochs, name="epoch"))
