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

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from chexlib.collectives import join_world
from chexlib.data.nih import data_name
from chexlib.errors import ConfigError
from chexlib.evaluation.auroc import auroc, mean_auroc
from chexlib.evaluation.baseline import ridge_scores
from chexlib.evaluation.intervals import CHANCE
from chexlib.evaluation.verdicts import Verdict, judge
from chexlib.files import ROOT
from chexlib.findings import FINDINGS
from chexlib.models.statistics import moving_layers
from chexlib.studies.grid import deciding_settings, measure_training, point_key, read_grid, run_grid
from chexlib.studies.judge import judge_scores, recalibrate_on_train
from chexlib.studies.watch import ShadowStatistics, ValidationCurve
from chexlib.training.callbacks import PooledScorer
from chexlib.training.config import TrainConfig
from chexlib.training.fit import Training
from chexlib.training.input import divide
from chexlib.training.trainer import Reuse

ROWS = ROOT / "data" / "reference" / "rows" / "05_large_batch.jsonl"
PHANTOM = {"images": 10_000, "difficulty": "easy", "seed": 0}  # of which these rows are

RIDGE = "ridge"  # in place of a topology: the regression that networks must beat
TOPOLOGIES = ("densenet121", "resnet50", "vgg16")
BATCHES = (32, 128, 512, 2048)  # images per update
SMALL, LARGE = 32, 512  # the two that are compared
LOCAL_BATCH = 32  # images that are normalised together
TRAIN_IMAGES = 4096
PASSES = 8
WARMUP = 0.1  # share of the updates
GATE = 0.88  # mean AUROC at batch 32, below which a topology is not studied
MOMENTA = (0.9, 0.999)  # of moving statistics, beside the 0.99 of keras.applications
LEVELS = (0.75, 0.80, 0.85)  # validation AUROC, to which the updates are counted
LOOKS = 16  # at the validation AUROC during a training
SEEDS = tuple(range(10))
TUNING_SEEDS = (100, 101)  # no seed that confirms has tuned

# Learning rates are BASE_RATE x RATE_FACTOR^k. Where tuning starts: the least k of six.
BASE_RATE, RATE_FACTOR, RATES_TRIED = 1e-3, 2.5, 6
FIRST_RATE = {
    "densenet121": {32: -2, 128: -2, 512: -1, 2048: -1},
    "resnet50": {32: -2, 128: -2, 512: -1, 2048: -1},
    "vgg16": {32: -4, 128: -4, 512: -3, 2048: -3},
}
log = logging.getLogger(__name__)


class Cell(NamedTuple):
    """What has a learning rate of its own."""

    topology: str
    batch: int
    norm: str = "batch"


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


def rate_of(exponent: int) -> float:
    """The learning rate of one step of the ladder that tuning climbs."""
    return float(f"{BASE_RATE * RATE_FACTOR**exponent:.4g}")


@dataclasses.dataclass(frozen=True)
class LargeBatchStudy:
    """The grid of the study on one data set.

    Parameters
    ----------
    base : TrainConfig
        Data and network size of every training, as of `study_on`.
    table : Path
        JSON-lines file of the rows.
    where : dict
        Names data and split in each point.
    cells : sequence of Cell
        What is tuned and confirmed.
    """

    base: TrainConfig
    table: Path
    where: dict
    cells: tuple[Cell, ...] = CELLS

    def point(self, cell: Cell, rate: float, **how) -> dict:
        """The point of one training, for `run_grid`; `how` as for `settings_of`."""
        config = self.base.replace(**settings_of(cell, rate, **how))
        return {**deciding_settings(config), **self.where}

    def rows(self, points: Iterable[dict]) -> pd.DataFrame:
        """The rows there are of some points, with `batch`, images per update."""
        columns = ["topology", "batch_size", "accumulation", "learning_rate", "seed", "diverged"]
        columns += ["auroc", "val_auroc"]
        rows = read_grid(list(points), self.table)
        rows = rows.reindex(columns=dict.fromkeys([*rows.columns, *columns]))
        return rows.assign(batch=rows["batch_size"] * rows["accumulation"])

    def run(self, points: Sequence[dict], *, reuse: Reuse) -> bool:
        """Train what has no row yet; False if it was stopped."""

        def train(point, folder):
            if point.get("topology") == RIDGE:
                return self._measure_ridge()
            names = {setting.name for setting in dataclasses.fields(TrainConfig)}
            settings = {name: value for name, value in point.items() if name in names}
            return measure(self.base.replace(**settings, run_dir=str(folder)), reuse=reuse)

        rows = run_grid(points, self.table, train)
        return len(rows) == len({str(point) for point in points})

    def ridge(self) -> dict:
        """The point of the ridge regression on the same images."""
        return {"topology": RIDGE, **self.where}

    def _measure_ridge(self) -> dict:
        _, parts = divide(self.base)
        scores = ridge_scores(parts, size=self.base.size)
        return {"auroc": mean_auroc(parts["test"].labels, scores)}

    def baseline(self) -> float:
        """Mean test AUROC of the ridge regression; NaN where it was not measured."""
        rows = read_grid([self.ridge()], self.table)
        return float(rows["auroc"].iloc[0]) if len(rows) else float("nan")

    # --- the rates

    def tuning(self, cell: Cell) -> tuple[list[dict], float | None]:
        """What tuning a cell needs next, and the rate that was chosen once nothing is needed.

        Six rates of one seed; one more while the best is at an edge, so no chosen rate is at one;
        then the best two once more with another seed. The best mean validation AUROC wins; a
        training that diverged counts 0.5.
        """
        first, second = TUNING_SEEDS
        start = FIRST_RATE[cell.topology][cell.batch]
        tried = list(range(start, start + RATES_TRIED))
        scores = self._scores(cell, tried, first)
        if missing := [k for k in tried if k not in scores]:
            return [self.point(cell, rate_of(k), seed=first) for k in missing], None
        while (best := max(scores, key=scores.get)) in (min(scores), max(scores)):
            beyond = best - 1 if best == min(scores) else best + 1
            found = self._scores(cell, [beyond], first)
            if not found:
                return [self.point(cell, rate_of(beyond), seed=first)], None
            scores |= found
        two = sorted(scores, key=scores.get)[-2:]
        again = self._scores(cell, two, second)
        if missing := [k for k in two if k not in again]:
            return [self.point(cell, rate_of(k), seed=second) for k in missing], None
        return [], rate_of(max(two, key=lambda k: scores[k] + again[k]))

    def _scores(self, cell: Cell, exponents: Sequence[int], seed: int) -> dict[int, float]:
        """Validation AUROC by exponent of the rate, of the trainings that have a row."""
        scores = {}
        for exponent in exponents:
            rows = self.rows([self.point(cell, rate_of(exponent), seed=seed)])
            if len(rows):
                row = rows.iloc[0]
                scores[exponent] = CHANCE if row["diverged"] else row["val_auroc"]
        return scores

    def rates(self) -> dict[Cell, float]:
        """The tuned learning rate of each cell.

        Raises
        ------
        ConfigError
            A cell is not tuned yet.
        """
        chosen = {cell: self.tuning(cell)[1] for cell in self.cells}
        if untuned := [cell for cell, rate in chosen.items() if rate is None]:
            names = ", ".join(f"{cell.topology} at batch {cell.batch}" for cell in untuned)
            raise ConfigError(
                f"{names}: no tuned learning rate yet. Run `python -m chexlib study tune` first."
            )
        return chosen

    # --- the stages: points that are needed next, none once a stage is whole

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

    def tune(self) -> list[dict]:
        """What all cells need next to be tuned."""
        return [point for cell in self.cells for point in self.tuning(cell)[0]]

    def confirm(self) -> list[dict]:
        """Every cell at its tuned rate, `SEEDS`; a seed of all cells is whole before the next."""
        rates = self.rates()
        return [self.point(cell, rates[cell], seed=seed) for seed in SEEDS for cell in self.cells]

    def fixed(self) -> list[dict]:
        """The study's way: the rate of the smallest batch is kept at every larger one."""
        rates = self.rates()
        larger = [cell for cell in self.cells if cell.batch > SMALL]
        return [
            self.point(cell, rates[cell._replace(batch=SMALL)], seed=seed)
            for seed in SEEDS
            for cell in larger
        ]

    # --- what there is

    def tuning_rows(self) -> pd.DataFrame:
        """Every row that tuning has seen, with the columns of `rows`."""
        reach = range(-12, 13)  # steps of the ladder, more than tuning ever climbs
        points = [
            self.point(cell, rate_of(exponent), seed=seed)
            for cell in self.cells
            for exponent in reach
            for seed in TUNING_SEEDS
        ]
        return self.rows(points)

    def progress(self) -> pd.DataFrame:
        """What is done of each stage, and of how much: trainings, but of "tune" cells that have
        their rate. A stage that waits for the rates has NaN.
        """
        gate, tuned = self.gate(), [self.tuning(cell)[1] is not None for cell in self.cells]
        counts = {
            "gate": (len(self.rows(gate)), len(gate)),
            "tune": (sum(tuned), len(tuned)),
        }
        for name in ("confirm", "fixed"):
            points = STAGES[name](self) if all(tuned) else []
            counts[name] = (len(self.rows(points)), len(points) or np.nan)
        return pd.DataFrame(counts, index=["done", "of"]).T

    def scores(self, stage: str = "confirm") -> pd.DataFrame:
        """Test AUROC of a stage's rows, 0.5 of a training that diverged: index seed, columns
        (topology, batch).
        """
        rows = self.rows(STAGES[stage](self))
        scores = rows["auroc"].where(~rows["diverged"].astype(bool), CHANCE)
        return rows.assign(auroc=scores).pivot_table(
            index="seed", columns=["topology", "batch"], values="auroc"
        )


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
    for name, other in (("D1", "resnet50"), ("D2", "vgg16")):
        reasons = [gate_reason(scores, topology, baseline) for topology in ("densenet121", other)]
        differences = lost["densenet121"] - lost[other]
        answers[name] = "; ".join(filter(None, reasons)) or judge(differences)
    return answers


def gate_reason(scores: pd.DataFrame, topology: str, baseline: float) -> str:
    """Why a topology is not studied, or "" where it is: it reaches `GATE` at `SMALL` in the mean of
    seeds, and beats the baseline.
    """
    reached = scores[(topology, SMALL)].mean()
    if reached >= GATE and reached > baseline:
        return ""
    return (
        f"not comparable: {topology} reaches {reached:.3f} at batch {SMALL}, and is studied from "
        f"{GATE} and above the ridge regression's {baseline:.3f} on"
    )


STAGES: dict[str, Callable[[LargeBatchStudy], list[dict]]] = {
    "gate": LargeBatchStudy.gate,
    "tune": LargeBatchStudy.tune,
    "confirm": LargeBatchStudy.confirm,
    "fixed": LargeBatchStudy.fixed,
}


def study_on(data: str | Path, *, table: str | Path = ROWS) -> LargeBatchStudy:
    """The study on a folder in the NIH layout, with quarter-width networks at 32 px.

    One split and one choice of images for all seeds: a seed draws weights, order and mirroring.
    """
    base = _base(data, table)
    split, _ = divide(base)
    where = {"data": data_name(Path(data)), "split_digest": split.digest}
    return LargeBatchStudy(base, Path(table), where)


def committed_study() -> LargeBatchStudy:
    """The study of the rows that come with chexlib, to read them: it needs no images."""
    first = json.loads(ROWS.read_text(encoding="utf-8").partition("\n")[0])
    where = {name: first[name] for name in ("data", "split_digest")}
    return LargeBatchStudy(_base("data", ROWS), ROWS, where)


def _base(data: str | Path, table: str | Path) -> TrainConfig:
    return TrainConfig(
        data_dir=str(data),
        run_dir=str(Path(table).parent),  # each training gets a folder of its own
        size=32,
        width=0.25,
        stem="small",
        split_seed=0,
        train_images=TRAIN_IMAGES,
        norm_momentum=0.99,
        keep_checkpoints=0,
        precision="float32",
    )


def run_stages(study: LargeBatchStudy, names: Sequence[str]) -> bool:
    """Train what these stages lack, one after the other; False if it was stopped."""
    if unknown := sorted(set(names) - set(STAGES)):
        raise ConfigError(
            f"there is no stage {', '.join(unknown)}. Name some of {', '.join(STAGES)}."
        )
    reuse = Reuse(accumulates=True)
    for name in names:
        # Tuning asks for more once it has seen what it asked for.
        while missing := _without_rows(study, STAGES[name](study)):
            log.info("stage %s: %d trainings to go", name, len(missing))
            if not study.run(missing, reuse=reuse):
                return False
    return True


def _without_rows(study: LargeBatchStudy, points: list[dict]) -> list[dict]:
    measured = set(read_grid(points, study.table)["key"]) if points else set()
    return [point for point in points if point_key(point) not in measured]


def measure(config: TrainConfig, *, reuse: Reuse) -> dict | None:
    """Train, and measure the last weights, for `run_grid`.

    Returns
    -------
    dict or None
        diverged; updates; seconds; val_auroc and auroc, validation and test, by the population's
        statistics; loss; auroc_moving, and auroc_<momentum> of `MOMENTA`; auroc_<finding>;
        updates_to_<AUROC> of `LEVELS`, None where it was not reached; noise_images, noise_low and
        noise_high, where the noise scale could be measured. None if the training was
        stopped.
    """
    _, parts = divide(config)
    scorer = PooledScorer(parts, join_world(), size=config.size)
    updates = config.epochs * -(-len(parts["train"]) // (config.batch_size * config.accumulation))
    curve = ValidationCurve(
        lambda predict: scorer("validation", predict),
        parts["validation"].labels,
        every=max(1, updates // LOOKS),
    )
    shadows = ShadowStatistics(MOMENTA)

    def columns(training: Training) -> dict:
        labels = training.parts["test"].labels
        row = {"updates": updates, "seconds": round(training.seconds, 1)}
        if noise := training.noise_scale():
            row |= {"noise_images": noise.images, "noise_low": noise.low, "noise_high": noise.high}
        if moving_layers(training.model):
            row["auroc_moving"] = judge_scores(labels, training.score("test"))["auroc"]
            for momentum in MOMENTA:
                with shadows.applied(momentum):
                    scores = training.score("test")
                row[f"auroc_{momentum}"] = judge_scores(labels, scores)["auroc"]
            recalibrate_on_train(training)
        validation = training.parts["validation"].labels
        row["val_auroc"] = judge_scores(validation, training.score("validation"))["auroc"]
        scores = training.score("test")
        row |= judge_scores(labels, scores)
        for finding, y, p in zip(FINDINGS, labels.T, scores.T, strict=True):
            row[f"auroc_{finding}"] = auroc(y, p)
        return row | {f"updates_to_{level}": curve.updates_to(level) for level in LEVELS}

    return measure_training(config, columns, reuse=reuse, watch=[curve, shadows])
