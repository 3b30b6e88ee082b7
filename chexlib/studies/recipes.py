"""The study of notebook 06: what each part of a large-batch recipe gives back, on ResNet-50 of
quarter width, the study's network.

Every rate is tuned at its batch, and none is at an edge. The same passes over the same images mean
fewer updates for a larger batch; at batch 128 there are 32 an epoch, about the 40 that the study
names. Fixed before anything was run:

- *ladder*: each part is judged by what it adds to the ones before it, at the batch's own rate;
- *optimizers*: LARS and LAMB against SGD at batch 512, with as many rates tried for each;
- *collapse*: from the end of each epoch but the last, judged against one more epoch of the same
  training. The ensemble is the mean of all collapses, as the study made it; a greedy choice on
  validation stands beside it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd

from chexlib.errors import DivergedError
from chexlib.evaluation.auroc import mean_auroc
from chexlib.evaluation.ensembles import choose
from chexlib.files import ROOT
from chexlib.models.weights import load_weights
from chexlib.studies.judge import recalibrate_on_train
from chexlib.studies.large_batch import PHANTOM as PHANTOM
from chexlib.studies.stages import TRAIN_IMAGES, Study
from chexlib.training.callbacks import snapshots_of
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training, learn
from chexlib.training.recipes import LADDER, PRESETS, scale
from chexlib.training.schedules import Schedule
from chexlib.training.trainer import Reuse

ROWS = ROOT / "data" / "reference" / "rows" / "06_recipes.jsonl"

TOPOLOGY = "resnet50"
BATCHES = (32, 128, 512, 2048)  # images per update
SMALL = 32  # whose rate the plain training keeps at every batch
LOCAL_BATCH = 32  # images that are normalised together
PASSES = 8
SEEDS = tuple(range(6))
DECAYED = 0.8  # sum of rate x weight decay over a training; 0.7 to 0.9 in the study's solver
RAISED = 2.0  # weight decay of a collapse over that before it (solver_collapse.prototxt, 448 nodes)

# Each rung has what the one before has, and one part more. Beside it the published schedule.
PLAIN, OWN_RATE, POLYNOMIAL = "plain", "+ own rate", "+ polynomial decay"
RUNGS = {
    PLAIN: "step decay",
    OWN_RATE: "step decay",
    "+ warm-up": "+ warm-up",
    POLYNOMIAL: "+ polynomial decay",
    "+ weight decay": "+ weight-decay scaling",
}
# At the smallest batch the plain training has its own rate. The largest makes 16 updates, too few
# for a warm-up.
CLIMBED = {
    32: list(RUNGS)[1:],
    128: list(RUNGS),
    512: list(RUNGS),
    2048: [POLYNOMIAL, "+ weight decay"],
}
CYCLES = "cycles"  # in place of a rung: the training that collapses
COLLAPSING = 128  # its batch

# Where tuning starts: the least exponent of its rates.
FIRST_RATE = {
    ("sgd", 32): 2,
    ("sgd", 128): 3,
    ("sgd", 512): 4,
    ("sgd", 2048): 4,
    ("lars", 512): 7,  # times 0.001 x weight / gradient in each layer
    ("lamb", 512): 1,
}
SECONDS = {32: 71, 128: 60, 512: 54, 2048: 53}  # of a training
SECONDS_OF_COLLAPSES = 190


class Cell(NamedTuple):
    """What has a learning rate of its own."""

    optimizer: str
    batch: int

    def __str__(self) -> str:
        """For a sentence."""
        return f"{self.optimizer} at batch {self.batch}"


class RecipeStudy(Study):
    """The grid of the study on one data set."""

    NOTEBOOK = "06"
    CELLS: ClassVar = tuple(Cell(*cell) for cell in FIRST_RATE)
    STAGES: ClassVar = ("tune", "ladder", "optimizers", "collapse")

    def point(self, cell: Cell, rate: float, *, seed: int, rung: str = POLYNOMIAL) -> dict:
        local_batch = min(LOCAL_BATCH, cell.batch)
        settings = {
            "topology": TOPOLOGY,
            "optimizer": cell.optimizer,
            "batch_size": local_batch,
            "accumulation": cell.batch // local_batch,
            "epochs": PASSES,
            "learning_rate": rate,
            "schedule": schedule_of(rung, rate, batch=cell.batch).to_dict(),
            "seed": seed,
        }
        return {**self.point_of(settings), "rung": rung}

    def first_exponent(self, cell: Cell) -> int:
        return FIRST_RATE[cell]

    def seconds_of(self, point: dict) -> float:
        if "rung" not in point:  # the ridge regression
            return 0
        batch = point["batch_size"] * point["accumulation"]
        return SECONDS_OF_COLLAPSES if point["rung"] == CYCLES else SECONDS[batch]

    def measure(self, point: dict, folder: Path, *, reuse: Reuse) -> dict | None:
        if point["rung"] != CYCLES:
            return super().measure(point, folder, reuse=reuse)
        return measure_collapses(self.config_of(point, folder), reuse=reuse)

    # --- the stages

    def ladder(self) -> list[dict]:
        """The ridge regression, and every rung at every batch; a seed is whole before the next."""
        rates, points = self.rates(), [self.ridge()]
        for seed in SEEDS:
            for batch, rungs in CLIMBED.items():
                for rung in rungs:
                    rate = rates["sgd", SMALL if rung == PLAIN else batch]
                    points.append(self.point(Cell("sgd", batch), rate, seed=seed, rung=rung))
        return points

    def optimizers(self) -> list[dict]:
        """The other optimizers; SGD at their batch is in the ladder."""
        rates = self.rates()
        others = [cell for cell in self.CELLS if cell.optimizer != "sgd"]
        return [self.point(cell, rates[cell], seed=seed) for seed in SEEDS for cell in others]

    def collapse(self) -> list[dict]:
        """A training in the study's cycles, collapsed from the end of its epochs."""
        cell = Cell("sgd", COLLAPSING)
        rate = self.rates()[cell]
        return [self.point(cell, rate, seed=seed, rung=CYCLES) for seed in SEEDS]

    def scores(self) -> pd.DataFrame:
        """Test AUROC of what was trained: index seed, columns (batch, rung); of the other
        optimizers the rung is their name.
        """
        rows = self.rows([*self.ladder(), *self.optimizers()])
        rows = rows.dropna(subset="batch").astype({"batch": int})  # without the ridge regression
        other = rows["optimizer"] != "sgd"
        rows["rung"] = rows["rung"].mask(other, rows["optimizer"])
        table = rows.pivot_table(index="seed", columns=["batch", "rung"], values="auroc")
        columns = [(batch, rung) for batch in BATCHES for rung in (*RUNGS, "lars", "lamb")]
        return table[[column for column in columns if column in table]]


def schedule_of(rung: str, rate: float, *, batch: int) -> Schedule:
    """The schedule of a rung, in epochs, with this highest rate; one that has a weight decay has
    one that sums to `DECAYED`.
    """
    published = PRESETS["64-nodes-cycles"] if rung == CYCLES else LADDER[RUNGS[rung]]
    made = scale(published, images=1, global_batch=1, epochs=PASSES, peak=rate)
    made = dataclasses.replace(made, unit="epochs", images=0, global_batch=0, name="")
    if rung in (CYCLES, "+ weight decay"):
        values = made.compile(steps_per_epoch=TRAIN_IMAGES / batch)
        factor = DECAYED / float(values.rate @ values.weight_decay)
    else:
        factor = 0.0
    phases = [
        dataclasses.replace(phase, weight_decay=phase.weight_decay and factor * phase.weight_decay)
        for phase in made.phases
    ]
    decay = [(place, factor * value) for place, value in made.decay]
    return dataclasses.replace(made, phases=tuple(phases), decay=tuple(decay))


def collapse_of(config: TrainConfig, start: pd.Series) -> TrainConfig:
    """One more epoch from a snapshot, in which the rate falls to 0 with power 2.

    Weights and moving statistics are taken over, the optimizer's slots are not, as in the study
    (`solver_collapse.prototxt` is started with `--weights`). Its weight decay is `RAISED`.

    Parameters
    ----------
    config : of the training
    start : a row of `snapshots_of`
    """
    decay = Schedule.from_dict(config.schedule).phases[-1].weight_decay or 0.0
    phase = {"kind": "collapse", "length": 1, "rate": start["learning_rate"]}
    phase["weight_decay"] = RAISED * decay
    return config.replace(
        weights=start["path"],
        epochs=1,
        schedule={"unit": "epochs", "phases": [phase]},
        snapshots=False,
    )


def measure_collapses(config: TrainConfig, *, reuse: Reuse) -> dict | None:
    """Train, collapse from the end of each epoch but the last, and average what comes out.

    Returns
    -------
    dict or None
        diverged; before_<epoch> of all epochs and after_<epoch>, mean test AUROC without and with a
        collapse, by the population's statistics; ensemble, of the mean of all collapses; greedy, of
        the mean of those `chosen` on validation; member, of the best on validation; seconds. None
        if the training was stopped.
    """
    collapsing = Reuse(accumulates=True)  # the graph of a training that begins with weights
    before, after, validation, row = [], [], [], {"diverged": False}
    try:
        training = learn(config.replace(snapshots=True), reuse=reuse)
        if training.stopped:
            return None
        for _, start in snapshots_of(config.run_dir).iterrows():
            load_weights(training.model, start["path"])
            before.append(_score_population(training, "test"))
            if start["epoch"] == config.epochs:
                break
            collapsed = learn(collapse_of(config, start), reuse=collapsing)
            if collapsed.stopped:
                return None
            after.append(_score_population(collapsed, "test"))
            validation.append(collapsed.score("validation"))
    except DivergedError:
        return {"diverged": True}
    labels = {name: part.labels for name, part in training.parts.items()}
    for name, scores in (("before", before), ("after", after)):
        for epoch, own in enumerate(scores, start=1):
            row[f"{name}_{epoch}"] = mean_auroc(labels["test"], own)
    chosen = choose(np.array(validation), labels["validation"])
    after = np.array(after)
    row |= {
        "ensemble": mean_auroc(labels["test"], after.mean(axis=0)),
        "greedy": mean_auroc(labels["test"], after[chosen].mean(axis=0)),
        "member": mean_auroc(labels["test"], after[chosen[0]]),
        "chosen": ",".join(str(i + 1) for i in chosen),
    }
    return row | {"seconds": round(training.seconds, 1)}


def _score_population(training: Training, part: str) -> np.ndarray:
    recalibrate_on_train(training)
    return training.score(part)


def collapse_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What a collapse gains, by the epoch from which it begins.

    Parameters
    ----------
    rows : of `measure_collapses`, a row a seed

    Returns
    -------
    DataFrame
        Columns epoch, seed; later, what one more epoch of the training gains; collapse, what the
        collapse gains in as much time; gain_later, the difference of the two.
    """
    epochs = [int(name.removeprefix("after_")) for name in rows if name.startswith("after_")]
    tables = []
    for epoch in epochs:
        start = rows[f"before_{epoch}"]
        later, collapse = rows[f"before_{epoch + 1}"] - start, rows[f"after_{epoch}"] - start
        own = {"epoch": epoch, "seed": rows["seed"], "later": later, "collapse": collapse}
        tables.append(pd.DataFrame({**own, "gain_later": collapse - later}))
    return pd.concat(tables, ignore_index=True)


def study_on(data: str | Path, *, table: str | Path = ROWS) -> RecipeStudy:
    """`Study.on` of this study."""
    return RecipeStudy.on(data, table)


def committed_study() -> RecipeStudy:
    """`Study.committed` of this study."""
    return RecipeStudy.committed(ROWS)
