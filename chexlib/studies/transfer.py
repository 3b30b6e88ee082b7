"""The study of notebook 07: which snapshot of a pre-training to fine-tune, and how.

The study of 2018 left three rules without a measurement of them. Asked here, and fixed before
anything was run, with A the mean test AUROC of a fine-tuning by the population's statistics, and
all else equal:

- earlier: A from an earlier snapshot less A from the last one;
- rate: A at the rate at which the snapshot was being trained less A at the highest rate of the
  pre-training, for snapshots whose rate has not run out;
- warm-up: A with a warm-up in proportion to the global batch less A without one.

Each is judged by snapshot, of complete pairs of one seed. A seed draws a whole chain: its own
pre-training, and the fine-tunings that start from it. A training that diverged counts 0.5.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from chexlib.data.cache import cache_folder
from chexlib.errors import ConfigError
from chexlib.evaluation.intervals import LEARNT
from chexlib.evaluation.verdicts import Verdict, judge
from chexlib.files import ROOT, file_lock
from chexlib.phantom.write import kept_phantom
from chexlib.studies.grid import deciding_settings, measure_training, point_key
from chexlib.studies.judge import judge_scores, recalibrate_on_train
from chexlib.studies.stages import Study, data_of, gate_reason, small_config
from chexlib.training.callbacks import snapshots_of
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training
from chexlib.training.schedules import Schedule
from chexlib.training.trainer import Reuse

ROWS = ROOT / "data" / "reference" / "rows" / "07_transfer.jsonl"
SOURCE = {"images": 10_000, "difficulty": "easy", "seed": 0}  # the phantom of the pre-training
PHANTOM = {"images": 5_000, "difficulty": "standard", "seed": 1}  # that is fine-tuned on

TOPOLOGY = "resnet50"
SOURCE_IMAGES, SOURCE_PASSES = 2_000, 24  # so many passes over few images can over-specialise
SNAPSHOTS = (4, 8, 12, 16, 20, 24)  # passes after which one is kept
TARGET_IMAGES, TARGET_PASSES = 1_024, 8
LOCAL_BATCH = 32  # images that are normalised together
BATCH = 64  # images per update, but where batches are compared
BATCHES = (64, 128, 256, 512)  # 16, 8, 4 and 2 updates a pass; the study had about 10
WARMUP_BATCH = 128  # images of a global batch whose warm-up takes one pass
LONGEST = 0.5  # share of the passes that a warm-up may take
FLOOR = 0.01  # of the highest rate, where the cosine ends
RUN_OUT = 0.1  # of the highest rate: below it, a snapshot's rate has run out
SEEDS = tuple(range(10))
SECONDS = 0.0022  # of a training, per image and pass, evaluation included

PRETRAINING, SCRATCH = "pre-training", "random weights"  # what has a learning rate of its own
# How a fine-tuning differs from the first of these.
DEFAULT, OWN, COLD = "default", "checkpoint's rate", "no warm-up"


def fine_schedule(rate: float, *, epochs: int, warmup: float) -> dict:
    """A linear warm-up of so many epochs from a hundredth of `rate`, and a cosine down to a
    hundredth.
    """
    warmup = min(warmup, LONGEST * epochs)
    rise = {"kind": "warmup", "length": warmup, "start": FLOOR * rate, "rate": rate}
    fall = {"kind": "cosine", "length": epochs - warmup, "rate": rate, "end": FLOOR * rate}
    return {"unit": "epochs", "phases": [rise, fall] if warmup else [fall]}


def settings_of(rate: float, *, seed: int, batch: int, passes: int, warmup: float) -> dict:
    """Settings of `TrainConfig` of one training."""
    return {
        "batch_size": min(batch, LOCAL_BATCH),
        "accumulation": -(-batch // LOCAL_BATCH),
        "epochs": passes,
        "learning_rate": rate,
        "schedule": fine_schedule(rate, epochs=passes, warmup=warmup),
        "seed": seed,
    }


@dataclasses.dataclass(frozen=True)
class TransferStudy(Study):
    """The grid of the study: `base` and `where` are of the images that are fine-tuned on, `source`
    and `source_where` of those of the pre-training.
    """

    source: TrainConfig
    source_where: dict

    NOTEBOOK = "07"
    CELLS: ClassVar = (PRETRAINING, SCRATCH)
    STAGES: ClassVar = ("tune", "pretrain", "rules", "batches")

    @classmethod
    def on(cls, data: str | Path, table: str | Path) -> TransferStudy:
        """The study on a folder in the NIH layout; what is pre-trained on is always a phantom."""
        base, source = _configs(data, kept_phantom(**SOURCE), table)
        return cls(base, Path(table), data_of(base), source, data_of(source))

    @classmethod
    def committed(cls, table: Path) -> TransferStudy:
        """The study of rows that come with chexlib, to read them: it needs no images."""
        lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
        rows, found = [json.loads(line) for line in lines], []
        for fine in (True, False):
            first = next((row for row in rows if ("snapshot" in row) == fine), {})
            found.append({name: first.get(name, "") for name in ("data", "split_digest")})
        base, source = _configs("data", "data", table)
        return cls(base, table, found[0], source, found[1])

    # --- trainings

    def point(self, cell: str, rate: float, *, seed: int) -> dict:
        """Of what has a rate of its own."""
        if cell == SCRATCH:
            return self.fine_tuning(0, "", rate, seed=seed)
        config = self.source.replace(
            **settings_of(rate, seed=seed, batch=BATCH, passes=SOURCE_PASSES, warmup=1)
        )
        return {**deciding_settings(config), **self.source_where}

    def fine_tuning(
        self, snapshot: int, start: str, rate: float, *, seed: int, batch=BATCH, arm=DEFAULT
    ) -> dict:
        """From a snapshot, counted from 1, of the pre-training whose key is `start`, or from random
        weights: snapshot 0.
        """
        warmup = 0 if arm == COLD else batch / WARMUP_BATCH
        how = settings_of(rate, seed=seed, batch=batch, passes=TARGET_PASSES, warmup=warmup)
        told = {"snapshot": snapshot, "start": start, "arm": arm}
        return {**deciding_settings(self.base.replace(**how)), **self.where, **told}

    def first_exponent(self, cell: str) -> int:
        return -2

    def seconds_of(self, point: dict) -> float:
        return SECONDS * point.get("train_images", 0) * point.get("epochs", 0)

    def measure(self, point: dict, folder: Path, *, reuse: Reuse) -> dict | None:
        config = self.config_of(point, folder)
        if "snapshot" not in point:
            config = config.replace(data_dir=self.source.data_dir)
            return self._pretrain(config, point_key(point), reuse)
        if point["snapshot"]:
            path = _kept(point["start"]) / f"pass-{SNAPSHOTS[point['snapshot'] - 1]}.keras"
            with file_lock(path.parent.with_suffix(".lock")):
                if not path.exists():  # the rows came from another machine
                    rate = self.rates()[PRETRAINING]
                    start = self.point(PRETRAINING, rate, seed=point["seed"])
                    row = self.measure(start, folder, reuse=Reuse(accumulates=True))
                    if row is None or row["diverged"]:
                        return row
            config = config.replace(weights=str(path))
        return measure_training(config, _judged, reuse=reuse)

    def _pretrain(self, config: TrainConfig, key: str, reuse: Reuse) -> dict | None:
        """A row, with the learning curve at each snapshot; and the snapshots, for fine-tuning."""

        def columns(training: Training) -> dict:
            curve, taken = {}, snapshots_of(config.run_dir)
            for passes in SNAPSHOTS:
                epoch = training.history[passes - 1]
                curve |= {
                    f"{name}_{passes}": epoch[name] for name in ("loss", "val_loss", "val_auroc")
                }
                if config.seed in SEEDS:
                    path = taken["path"][passes - 1]
                    shutil.move(path, _kept(key) / f"pass-{passes}.keras")
            return curve | _judged(training)

        return measure_training(config, columns, reuse=reuse)

    # --- the stages

    def pretrain(self) -> list[dict]:
        """The pre-trainings, one a seed, at the tuned rate."""
        rate = self.rates()[PRETRAINING]
        return [self.point(PRETRAINING, rate, seed=seed) for seed in SEEDS]

    def rules(self) -> list[dict]:
        """Ridge regression, and for each seed: random weights; each snapshot at the highest rate of
        the pre-training, with a warm-up and without; and at its own rate, where it has not run out.
        """
        rates, own = self.rates(), self.snapshot_rates()
        points = [self.ridge()]
        for start in self.pretrain():
            seed, key = start["seed"], point_key(start)
            points.append(self.point(SCRATCH, rates[SCRATCH], seed=seed))
            for snapshot, rate in own.items():
                arms = {DEFAULT: rates[PRETRAINING], COLD: rates[PRETRAINING]}
                if rate >= RUN_OUT * rates[PRETRAINING]:
                    arms[OWN] = rate
                points += [
                    self.fine_tuning(snapshot, key, rate, seed=seed, arm=arm)
                    for arm, rate in arms.items()
                ]
        return points

    def batches(self) -> list[dict]:
        """Each larger batch from the chosen snapshot, with a warm-up and without. The rate follows
        the square root of the batch, as suits Adam (Malladi et al. 2022).
        """
        rate, snapshot = self.rates()[PRETRAINING], self.chosen()
        return [
            self.fine_tuning(
                snapshot,
                point_key(start),
                float(f"{rate * np.sqrt(batch / BATCH):.4g}"),
                seed=start["seed"],
                batch=batch,
                arm=arm,
            )
            for start in self.pretrain()
            for batch in BATCHES[1:]
            for arm in (DEFAULT, COLD)
        ]

    # --- what there is

    def snapshot_rates(self) -> pd.Series:
        """The learning rate of the last update before each snapshot, by its number."""
        phases = self.pretrain()[0]["schedule"]
        updates = -(-SOURCE_IMAGES // BATCH)
        rates = Schedule.from_dict(json.loads(phases)).compile(steps_per_epoch=updates).rate
        found = [float(f"{rates[passes * updates - 1]:.4g}") for passes in SNAPSHOTS]
        return pd.Series(found, index=range(1, len(SNAPSHOTS) + 1), name="learning_rate")

    def scores(self, stage: str) -> pd.DataFrame:
        """Test AUROC of a stage's fine-tunings: index seed, columns (batch, arm, snapshot)."""
        rows = self.rows(point for point in getattr(self, stage)() if "snapshot" in point)
        return rows.pivot_table(index="seed", columns=["batch", "arm", "snapshot"], values="auroc")

    def chosen(self, *, earlier: bool = False) -> int:
        """The snapshot of the best mean *validation* AUROC after fine-tuning; with `earlier`, of
        all but the last.

        Raises
        ------
        ConfigError
            The fine-tunings from them have not all been run.
        """
        beyond = len(SNAPSHOTS) if earlier else len(SNAPSHOTS) + 1
        points = [
            point
            for point in self.rules()
            if point.get("arm") == DEFAULT and 0 < point["snapshot"] < beyond
        ]
        rows = self.rows(points)
        if len(rows) < len(points):
            raise ConfigError(
                "no snapshot is chosen yet. Run `python -m chexlib study rules --notebook 07` first."
            )
        return int(rows.groupby("snapshot")["val_auroc"].mean().idxmax())


def rule_differences(scores: pd.DataFrame) -> pd.DataFrame:
    """What following each rule gains at each snapshot, NaN where one of a pair is missing: index
    seed, columns (rule, snapshot).

    Parameters
    ----------
    scores : as of `TransferStudy.scores` for "rules", those of `BATCH`: columns (arm, snapshot)
    """
    default = scores[DEFAULT].drop(columns=0, errors="ignore")
    last = len(SNAPSHOTS)
    rules = {
        "earlier": default.drop(columns=last).sub(default[last], axis="index"),
        "rate": scores[OWN] - default[scores[OWN].columns],
        "warm-up": default - scores[COLD],
    }
    return pd.concat(rules, axis="columns", names=["rule", "snapshot"])


def answers_of(scores: pd.DataFrame, *, earlier: int, baseline: float) -> dict[str, Verdict | str]:
    """One verdict a rule; where fine-tuning has not passed the gate, the reason why there is none.

    Parameters
    ----------
    scores : as for `rule_differences`
    earlier : the earlier snapshot that validation chose, of which the first rule is judged
    baseline : mean test AUROC of the ridge regression
    """
    reached = scores[DEFAULT][earlier].mean()
    reason = gate_reason("fine-tuning", reached, baseline, gate=LEARNT)
    gains = rule_differences(scores)
    values = {"earlier": gains["earlier"][earlier]}
    values |= {rule: gains[rule].mean(axis="columns", skipna=False) for rule in ("rate", "warm-up")}
    return {rule: reason or judge(gain) for rule, gain in values.items()}


def _configs(data, source, table) -> tuple[TrainConfig, TrainConfig]:
    """What all fine-tunings have in common, and what all pre-trainings have."""
    common = {"topology": TOPOLOGY, "norm_momentum": 0.9}
    target = {"train_images": TARGET_IMAGES, "fresh_head": True, "recalibrate": 256}
    base = small_config(data, table).replace(**common, **target)
    own = {"train_images": SOURCE_IMAGES, "snapshots": True}
    return base, small_config(source, table).replace(**common, **own)


def _kept(key: str) -> Path:
    """The folder of a pre-training's snapshots, made if missing."""
    folder = cache_folder(32).with_name("pretrained") / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _judged(training: Training) -> dict:
    """Of the last weights, by the population's statistics: auroc and loss of the test part,
    val_auroc; seconds.
    """
    recalibrate_on_train(training)
    validation, test = (
        judge_scores(training.parts[part].labels, training.score(part))
        for part in ("validation", "test")
    )
    return {**test, "val_auroc": validation["auroc"], "seconds": round(training.seconds, 1)}


def study_on(data: str | Path, *, table: str | Path = ROWS) -> TransferStudy:
    """`TransferStudy.on`."""
    return TransferStudy.on(data, table)


def committed_study() -> TransferStudy:
    """`TransferStudy.committed` of this study."""
    return TransferStudy.committed(ROWS)
