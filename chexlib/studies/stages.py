"""What the studies of notebooks 05 to 07 share: trainings in named stages of one grid, learning
rates that are tuned and never at an edge, and what is measured of each training.

Any number of processes share the stages, and what has a row is never trained again. A study is a
module with a subclass of `Study`, and with `ROWS`, `PHANTOM` and `study_on` for the command line.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from chexlib.collectives import join_world
from chexlib.data.nih import data_name
from chexlib.errors import ConfigError
from chexlib.evaluation.auroc import auroc, mean_auroc
from chexlib.evaluation.baseline import ridge_scores
from chexlib.evaluation.intervals import CHANCE
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

if TYPE_CHECKING:  # ipyparallel takes long to import
    from chexlib.cluster.engines import Engines

RIDGE = "ridge"  # in place of a topology: the regression that networks must beat
GATE = 0.88  # mean AUROC at the smallest batch, below which a network is not studied
TRAIN_IMAGES = 4096
MOMENTA = (0.9, 0.999)  # of moving statistics, beside the 0.99 of keras.applications
LEVELS = (0.75, 0.80, 0.85)  # validation AUROC, to which the updates are counted
LOOKS = 16  # at the validation AUROC during a training
TUNING_SEEDS = (100, 101)  # no seed that confirms has tuned

# Learning rates are BASE_RATE x RATE_FACTOR^k. Tuning starts with so many.
BASE_RATE, RATE_FACTOR, RATES_TRIED = 1e-3, 2.5, 6
log = logging.getLogger(__name__)


def rate_of(exponent: int) -> float:
    """The learning rate of one step of the ladder that tuning climbs."""
    return float(f"{BASE_RATE * RATE_FACTOR**exponent:.4g}")


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
    """The grid of a study on one data set. A subclass says what is trained.

    Parameters
    ----------
    base : TrainConfig
        Data and network size of every training, as of `small_config`.
    table : Path
        JSON-lines file of the rows.
    where : dict
        Names data and split in each point.
    """

    base: TrainConfig
    table: Path
    where: dict

    NOTEBOOK: ClassVar[str]  # its number
    CELLS: ClassVar[tuple[Hashable, ...]]  # what has a learning rate of its own
    # Methods that give the points that are needed next; none once the stage is whole.
    STAGES: ClassVar[tuple[str, ...]]

    @classmethod
    def on(cls, data: str | Path, table: str | Path) -> Study:
        """The study on a folder in the NIH layout, with quarter-width networks at 32 px.

        One split and one choice of images for all seeds: a seed draws weights, order and mirroring.
        """
        base = small_config(data, table)
        return cls(base, Path(table), data_of(base))

    @classmethod
    def committed(cls, table: Path) -> Study:
        """The study of rows that come with chexlib, to read them: it needs no images."""
        where = dict.fromkeys(("data", "split_digest"), "")
        if table.exists():
            first = json.loads(table.read_text(encoding="utf-8").partition("\n")[0])
            where = {name: first[name] for name in where}
        return cls(small_config("data", table), table, where)

    # --- what a subclass says

    @abc.abstractmethod
    def point(self, cell: Hashable, rate: float, *, seed: int) -> dict:
        """The point of a cell's training, for `run_grid`. Subclasses have more parameters."""

    @abc.abstractmethod
    def first_exponent(self, cell: Hashable) -> int:
        """Where tuning of a cell starts: the least exponent of its `RATES_TRIED` rates."""

    @abc.abstractmethod
    def seconds_of(self, point: dict) -> float:
        """About how long a training takes on one core."""

    def measure(self, point: dict, folder: Path, *, reuse: Reuse) -> dict | None:
        """Train one point, and measure it, for `run_grid`."""
        return measure_last(self.config_of(point, folder), reuse=reuse)

    def config_of(self, point: dict, folder: Path) -> TrainConfig:
        """The training that a point describes, in a folder of its own."""
        names = {setting.name for setting in dataclasses.fields(TrainConfig)}
        settings = {name: value for name, value in point.items() if name in names}
        return self.base.replace(**settings, run_dir=str(folder))

    # --- trainings and their rows

    def point_of(self, settings: dict) -> dict:
        """The point of a training with these settings of `TrainConfig`."""
        return {**deciding_settings(self.base.replace(**settings)), **self.where}

    def rows(self, points: Iterable[dict]) -> pd.DataFrame:
        """The rows there are of some points, with `batch`, images per update; the AUROC of a
        training that diverged is 0.5.
        """
        points = list(points)
        rows = read_grid(points, self.table)
        settings = [name for point in points for name in point]
        columns = [*rows, *settings, "batch_size", "accumulation", "diverged", "auroc", "val_auroc"]
        rows = rows.reindex(columns=dict.fromkeys(columns))
        rows = rows.assign(batch=rows["batch_size"] * rows["accumulation"])
        rows.loc[rows["diverged"].eq(True), ["auroc", "val_auroc"]] = CHANCE
        return rows

    def run_stages(self, names: Sequence[str], engines: Engines | None = None) -> bool:
        """Train what these stages lack, one after the other, on engines as of `run_grid` or here;
        False if it was stopped.
        """
        if unknown := sorted(set(names) - set(self.STAGES)):
            raise ConfigError(
                f"there is no stage {', '.join(unknown)}. Use some of {', '.join(self.STAGES)}."
            )
        reuse = Reuse(accumulates=True)
        for name in names:
            # Tuning asks for more once it has seen what it asked for.
            while missing := self._without_rows(getattr(self, name)()):
                hours = sum(map(self.seconds_of, missing)) / 3600
                say = "stage %s: %d trainings to go, about %.2f core-hours"
                log.info(say, name, len(missing), hours)
                if not self.run(missing, reuse=reuse, engines=engines):
                    return False
        return True

    def _without_rows(self, points: list[dict]) -> list[dict]:
        measured = set(read_grid(points, self.table)["key"]) if points else set()
        return [point for point in points if point_key(point) not in measured]

    def run(self, points: Sequence[dict], *, reuse: Reuse, engines: Engines | None = None) -> bool:
        """Train what has no row yet; False if it was stopped."""
        train = functools.partial(self._measure_any, reuse=reuse)
        rows = run_grid(points, self.table, train, engines=engines)
        return len(rows) == len({str(point) for point in points})

    def ridge(self) -> dict:
        """The point of the ridge regression on the same images."""
        return {"topology": RIDGE, **self.where}

    def _measure_any(self, point: dict, folder: Path, *, reuse: Reuse) -> dict | None:
        if point.get("topology") == RIDGE:
            return self._measure_ridge()
        return self.measure(point, folder, reuse=reuse)

    def _measure_ridge(self) -> dict:
        _, parts = divide(self.base)
        scores = ridge_scores(parts, size=self.base.size)
        return {"auroc": mean_auroc(parts["test"].labels, scores)}

    def baseline(self) -> float:
        """Mean test AUROC of the ridge regression; NaN where it was not measured."""
        rows = read_grid([self.ridge()], self.table)
        return float(rows["auroc"].iloc[0]) if len(rows) else float("nan")

    def progress(self) -> pd.DataFrame:
        """What is done of each stage, and of how much: trainings, but where rates are tuned cells
        that have their rate. A stage that waits for the rates has NaN.
        """
        counts = dict.fromkeys(self.STAGES, (0, np.nan))
        for name, cells in self.tuned_cells().items():
            tuned = [self.tuning(cell)[1] is not None for cell in cells]
            counts[name] = (sum(tuned), len(tuned))
        for name in set(self.STAGES) - set(self.tuned_cells()):
            with contextlib.suppress(ConfigError):  # not tuned yet
                points = getattr(self, name)()
                counts[name] = (len(read_grid(points, self.table)), len(points))
        return pd.DataFrame(counts, index=["done", "of"]).T

    # --- the rates

    def tuned_cells(self) -> dict[str, tuple[Hashable, ...]]:
        """Stages that tune rates, each with the cells that it tunes."""
        return {"tune": self.CELLS}

    def tune(self, cells: Sequence[Hashable] = ()) -> list[dict]:
        """What these cells, or all of the study's, need next to be tuned."""
        return [point for cell in cells or self.CELLS for point in self.tuning(cell)[0]]

    def tuning(self, cell: Hashable) -> tuple[list[dict], float | None]:
        """What tuning a cell needs next, and the rate that was chosen once nothing is needed.

        Six rates of one seed; one more while the best is at an edge, so no chosen rate is at one;
        then the best two once more with another seed. The best mean validation AUROC wins; a
        training that diverged counts 0.5.
        """
        first, second = TUNING_SEEDS
        start = self.first_exponent(cell)
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

    def _scores(self, cell: Hashable, exponents: Sequence[int], seed: int) -> dict[int, float]:
        """Validation AUROC by exponent of the rate, of the trainings that have a row."""
        points = [self.point(cell, rate_of(k), seed=seed) for k in exponents]
        found = self.rows(points).set_index("learning_rate")["val_auroc"]
        return {k: found[rate_of(k)] for k in exponents if rate_of(k) in found}

    def rates(self, cells: Sequence[Hashable] = ()) -> dict[Hashable, float]:
        """The tuned learning rate of these cells, or of all of the study's.

        Raises
        ------
        ConfigError
            A cell is not tuned yet.
        """
        chosen = {cell: self.tuning(cell)[1] for cell in cells or self.CELLS}
        if untuned := [cell for cell, rate in chosen.items() if rate is None]:
            raise ConfigError(
                f"{', '.join(map(str, untuned))}: no tuned learning rate yet. Run "
                f"`python -m chexlib study tune --notebook {self.NOTEBOOK}` first."
            )
        return chosen

    def tuning_rows(self) -> pd.DataFrame:
        """Every row that tuning has seen, with the columns of `rows`."""
        reach = range(-12, 20)  # steps of the ladder, more than tuning ever climbs
        points = [
            self.point(cell, rate_of(exponent), seed=seed)
            for cell in self.CELLS
            for exponent in reach
            for seed in TUNING_SEEDS
        ]
        return self.rows(points)


def small_config(data: str | Path, table: str | Path) -> TrainConfig:
    """What all trainings of the studies have in common: quarter-width networks at 32 px on
    `TRAIN_IMAGES` images.
    """
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


def data_of(config: TrainConfig) -> dict:
    """Data and split of a config, as points name them."""
    split, _ = divide(config)
    return {"data": data_name(Path(config.data_dir)), "split_digest": split.digest}


def gate_reason(what: str, reached: float, baseline: float, *, gate: float = GATE) -> str:
    """Why a network is not studied, or "" where it is: it reaches `gate` in the mean of seeds, and
    beats the baseline.

    Parameters
    ----------
    what : for the sentence: "vgg16 reaches"
    reached : mean test AUROC at the smallest batch
    baseline : mean test AUROC of the ridge regression
    """
    if reached >= gate and reached > baseline:
        return ""
    return (
        f"not comparable: {what} reaches {reached:.3f}, and is studied from {gate} and above the "
        f"ridge regression's {baseline:.3f} on"
    )


def measure_last(config: TrainConfig, *, reuse: Reuse) -> dict | None:
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
