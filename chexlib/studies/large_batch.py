"""The study of notebook 05: what large batches cost each topology, and whether batch norm is why.

The study of 2018 claims that DenseNet-121 (121 batch-norm layers) loses accuracy by large batches,
and that ResNet-50 (53) and VGG-16 (none) do not. Asked here, and fixed before anything was run,
with A the mean test AUROC by the population's statistics, every cell at its own learning rate,
tuned on validation, at equal passes over the images:

- L(topology) = A(batch 32) - A(batch 512);
- D1 = L(DenseNet) - L(ResNet) and D2 = L(DenseNet) - L(VGG), which the claim says are above 0;
- a topology is studied only where its A(batch 32) is at least `GATE` and above the ridge
  regression's.

The trainings are stages of one grid: `STAGES`. Each is a list of points for `run_grid`, so any
number of processes share them, and what is measured is never measured again.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import pandas as pd

from chexlib.evaluation.verdicts import Verdict, judge
from chexlib.files import ROOT
from chexlib.studies.stages import (
    RATES_TRIED,
    TUNING_SEEDS,
    Study,
    gate_reason,
    rate_of,
)

ROWS = ROOT / "data" / "reference" / "rows" / "05_large_batch.jsonl"
PHANTOM = {"images": 10_000, "difficulty": "easy", "seed": 0}  # of which these rows are

TOPOLOGIES = ("densenet121", "resnet50", "vgg16")
BATCHES = (32, 128, 512, 2048)  # images per update
SMALL, LARGE = 32, 512  # the two that are compared
LOCAL_BATCH = 32  # images that are normalised together
PASSES = 8
WARMUP = 0.1  # share of the updates
SEEDS = tuple(range(10))

# Where tuning starts: the least exponent of its rates.
FIRST_RATE = {
    "densenet121": {32: -2, 128: -2, 512: -1, 2048: -1},
    "resnet50": {32: -2, 128: -2, 512: -1, 2048: -1},
    "vgg16": {32: -4, 128: -4, 512: -3, 2048: -3},
}
SECONDS = {"densenet121": 93, "resnet50": 60, "vgg16": 33}  # of a training, mean of the batches


class Cell(NamedTuple):
    """What has a learning rate of its own."""

    topology: str
    batch: int
    norm: str = "batch"

    def __str__(self) -> str:
        """For a sentence."""
        return f"{self.topology} at batch {self.batch}"


CELLS = tuple(Cell(topology, batch) for topology in TOPOLOGIES for batch in BATCHES)


def settings_of(
    cell: Cell, rate: float, *, seed: int, passes: int = PASSES, local_batch: int = LOCAL_BATCH
) -> dict:
    """A cell's training as settings of `TrainConfig`: Adam, a warm-up, then a rate that falls to 0
    by a cosine, so that moving statistics settle.
    """
    local_batch = min(local_batch, cell.batch)
    warmup = {"kind": "warmup", "length": WARMUP * passes, "rate": rate, "start": rate / 10}
    decay = {"kind": "cosine", "length": (1 - WARMUP) * passes, "rate": rate}
    return {
        "topology": cell.topology,
        "norm": cell.norm,
        "batch_size": local_batch,
        "accumulation": cell.batch // local_batch,
        "epochs": passes,
        "learning_rate": rate,
        "schedule": {"unit": "epochs", "phases": [warmup, decay]},
        "seed": seed,
    }


class LargeBatchStudy(Study):
    """The grid of the study on one data set."""

    NOTEBOOK = "05"
    CELLS: ClassVar = CELLS
    STAGES: ClassVar = ("gate", "tune", "confirm", "fixed")

    def settings_of(self, cell: Cell, rate: float, **how) -> dict:
        return settings_of(cell, rate, **how)

    def first_exponent(self, cell: Cell) -> int:
        return FIRST_RATE[cell.topology][cell.batch]

    def seconds_of(self, point: dict) -> float:
        return SECONDS.get(point["topology"], 0)

    def gate(self) -> list[dict]:
        """The ridge regression, and each topology at the smallest batch, at rates around the middle
        of its ladder.
        """
        points = [self.ridge()]
        for topology in TOPOLOGIES:
            middle = FIRST_RATE[topology][SMALL] + RATES_TRIED // 2
            for exponent in (middle - 2, middle - 1, middle):
                rate = rate_of(exponent)
                points.append(self.point(Cell(topology, SMALL), rate, seed=TUNING_SEEDS[0]))
        return points

    def confirm(self) -> list[dict]:
        """Every cell at its tuned rate, `SEEDS`; a seed of all cells is whole before the next."""
        rates = self.rates()
        return [self.point(cell, rates[cell], seed=seed) for seed in SEEDS for cell in self.CELLS]

    def fixed(self) -> list[dict]:
        """The study's way: the rate of the smallest batch is kept at every larger one."""
        rates = self.rates()
        larger = [cell for cell in self.CELLS if cell.batch > SMALL]
        return [
            self.point(cell, rates[cell._replace(batch=SMALL)], seed=seed)
            for seed in SEEDS
            for cell in larger
        ]

    def scores(self, stage: str = "confirm") -> pd.DataFrame:
        """Test AUROC of a stage's rows: index seed, columns (topology, batch)."""
        rows = self.rows(getattr(self, stage)())
        return rows.pivot_table(index="seed", columns=["topology", "batch"], values="auroc")


def losses_of(scores: pd.DataFrame) -> pd.DataFrame:
    """L, the AUROC lost from `SMALL` to `LARGE`, of scores as of `LargeBatchStudy.scores`: index
    seed, columns topology.
    """
    by_batch = scores.swaplevel(axis="columns")
    return by_batch[SMALL] - by_batch[LARGE]


def answers_of(scores: pd.DataFrame, *, baseline: float) -> dict[str, Verdict | str]:
    """D1 and D2, which the claim of 2018 says are above 0, each judged by itself.

    Where a topology has not passed the gate there is no verdict, but the reason why.

    Parameters
    ----------
    scores : as of `LargeBatchStudy.scores`
    baseline : mean test AUROC of the ridge regression
    """
    lost = losses_of(scores)
    answers = {}
    for claim, other in (("D1", "resnet50"), ("D2", "vgg16")):
        reasons = [
            gate_reason(f"{name} at batch {SMALL}", scores[(name, SMALL)].mean(), baseline)
            for name in ("densenet121", other)
        ]
        differences = lost["densenet121"] - lost[other]
        answers[claim] = "; ".join(filter(None, reasons)) or judge(differences)
    return answers


def study_on(data: str | Path, *, table: str | Path = ROWS) -> LargeBatchStudy:
    """`Study.on` of this study."""
    return LargeBatchStudy.on(data, table)


def committed_study() -> LargeBatchStudy:
    """`Study.committed` of this study."""
    return LargeBatchStudy.committed(ROWS)
