"""`fit(config)`: one training, in a notebook, under `mpiexec -n N` and on MPI engines alike.

python -m chexlib train --config config.json                 # 1 process
mpiexec -n 2 python -m chexlib train --config config.json    # 2 ranks
fit(config, engines=engines, restarts=1)                     # on a notebook's engines
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from chexlib import stopping
from chexlib.collectives import World, join_world
from chexlib.data.nih import Radiographs, data_name
from chexlib.data.pipeline import generator_for
from chexlib.data.splits import Split
from chexlib.errors import ClusterError, ConfigError, WeightsError
from chexlib.files import atomic_write, require_writable, write_json, writing_to
from chexlib.models.data_parallel import DataParallelTrainer
from chexlib.models.statistics import recalibrate
from chexlib.models.topologies import NORMALIZATION
from chexlib.models.weights import save_model
from chexlib.training.callbacks import (
    Plateau,
    PooledScorer,
    PooledValidation,
    Position,
    Progress,
    Snapshots,
)
from chexlib.training.config import TrainConfig
from chexlib.training.input import Feed, divide, predictions_of, start_head
from chexlib.training.noise import NoiseScale, noise_scale
from chexlib.training.optimizers import guide
from chexlib.training.state import Saver
from chexlib.training.trainer import Reuse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Result of a training: its history, and the paths of model and predictions.

    Equal on every rank.
    """

    config: dict
    ranks: int
    split: dict  # name, digest, images per part
    # A row per epoch: epoch, loss, val_loss, val_auroc, learning_rate, images_per_second, skew.
    history: list[dict]
    best_epoch: int  # counted from 0; the saved weights are of this epoch
    seconds: float
    model: str
    predictions: str
    # images, low, high, updates: gradient noise scale of the last half of the updates, see
    # training/noise.py. None of one rank without micro-batches, or of few updates.
    noise_scale: dict | None = None
    resumed_from: str | None = None  # name of the checkpoint
    stopped: bool = False  # ended early because it was asked to; the checkpoint is of the very step

    def to_dict(self) -> dict:
        """Plain values, for `metrics.json`."""
        return asdict(self)


@dataclass
class Training:
    """A training that has ended, in memory on every rank: the network has its last weights."""

    config: TrainConfig
    world: World
    trainer: DataParallelTrainer
    split: Split
    parts: dict[str, Radiographs]  # train, validation, test
    scorer: PooledScorer
    history: list[dict]  # as in `TrainResult`
    steps: list[list]  # a row per step, see `Progress.STEP_COLUMNS`
    best_epoch: int
    best_weights: list | None  # None where no epoch was validated
    seconds: float
    resumed_from: str | None
    stopped: bool

    @property
    def model(self):
        """The network, a keras.Model."""
        return self.trainer.model

    def noise_scale(self) -> NoiseScale | None:
        """Gradient noise scale of the last half of the updates; the first is all warm-up and start."""
        steps = pd.DataFrame(self.steps, columns=Progress.STEP_COLUMNS)
        return noise_scale(steps.iloc[len(steps) // 2 :])

    def score(self, part: str, *, predict: Callable | None = None, batch: int = 64) -> np.ndarray:
        """Probabilities of a part's images, (n, 14) float32, the same on every rank.

        `predict` is `trainer.infer`, or another function from pixels to probabilities.
        """
        return self.scorer(part, predict or self.trainer.infer, batch=batch)


def fit(
    config: TrainConfig,
    *,
    engines=None,
    restarts: int = 0,
    report: Callable[[dict], None] | None = None,
    verbose: int | str = 0,
    reuse: Reuse | None = None,
) -> TrainResult:
    """Train on the train part, choose the epoch by the validation part, and write the results.

    Parameters
    ----------
    config : TrainConfig
    engines : chexlib.cluster.engines.Engines, optional
        Train on these engines instead of in this process.
    restarts : int
        How often engines may be started again after a fault; the training goes on from its last
        checkpoint.
    report, verbose, reuse
        As for `learn`; `report` is called here if there are engines, and `reuse` is of one process.

    Returns
    -------
    TrainResult
        The first rank has written `model.keras`, `history.parquet`, `steps.parquet` and
        `predictions.parquet` (validation and test) to `run_dir`, all by the best epoch's weights.

    Raises
    ------
    DataError
        The data cannot be read, or the split leaks patients.
    ConfigError
        More ranks than training images.
    WeightsError
        The starting weights do not fit, or a checkpoint can be neither read nor written.
    ClusterError
        Ranks no longer agree, or engines failed more than `restarts` times.
    """
    if engines is not None:
        return _fit_on(engines, config, restarts=restarts, report=report)
    with stopping.listening():
        training = learn(config, report=report, verbose=verbose, reuse=reuse)
        if training.best_weights is not None:
            training.model.set_weights(training.best_weights)
        predictions = pd.concat(
            predictions_of(training.parts[part], training.score(part), part)
            for part in ("validation", "test")
        )
        result = _result_of(training)
        training.world.broadcast_object(lambda: _write(result, training, predictions))
        return result


def learn(
    config: TrainConfig,
    *,
    report: Callable[[dict], None] | None = None,
    verbose: int | str = 0,
    reuse: Reuse | None = None,
    watch: Sequence[keras.callbacks.Callback] = (),
) -> Training:
    """Train a network on the ranks of this process' world, and write nothing but checkpoints.

    Parameters
    ----------
    config : TrainConfig
    report : callable, optional
        Called on the first rank with a dict of live numbers: epoch, epochs, step, steps, loss (of
        the epoch so far), step_loss, images_per_second, busy (seconds of compute by rank), and
        history (a dict per epoch that has ended).
    verbose : 0, 1, 2 or "auto"
        Keras' progress bar, on the first rank.
    reuse : Reuse, optional
        Takes over what an earlier training of this process built, and keeps it for the next.
    watch : sequence of keras.callbacks.Callback
        Called after the training's own, with its `DataParallelTrainer` as their model.

    Raises
    ------
    DataError, ConfigError, WeightsError, ClusterError
        As `fit`.
    """
    began = time.perf_counter()
    with stopping.listening():
        world = join_world()
        split, parts = divide(config)
        train, ranks = parts["train"], world.ranks * config.accumulation
        if ranks > len(train):
            raise ConfigError(
                f"{ranks} ranks cannot share {len(train)} training images. Use at most {len(train)} "
                "ranks."
            )
        if world.first:  # above the lines of the epochs, which have an AUROC
            counts = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
            log.info("%s split %s: %s images", split.name, split.digest, counts)
        world.broadcast_object(
            lambda: require_writable(config.run_dir, "Name another folder as run_dir.")
        )

        trainer = (reuse or Reuse()).trainer(config, world)
        model, labels = trainer.model, train.labels
        start_head(model, labels, bias=config.head_bias)
        if config.shuffle_labels:
            labels = generator_for("control", seed=config.seed).permutation(labels)
        world.broadcast([*model.variables, *trainer.optimizer.variables])

        global_batch = config.batch_size * ranks
        at = Position(global_batch, min(len(train), config.max_steps * global_batch or len(train)))
        scorer = PooledScorer(parts, world, size=config.size)
        validation = PooledValidation(
            lambda part: scorer(part, trainer.infer),
            parts["validation"].labels,
            choose=not config.shuffle_labels,
        )
        plateau = Plateau(
            1 if trainer.optimizer.tables else config.plateau_factor, delta=config.plateau_delta
        )
        progress = Progress(report if world.first else None, at, epochs=config.epochs)
        watchers = (validation, plateau, progress)
        saver = Saver(config, world, at, watchers, facts={"split": split.digest})
        resumed = saver.restore(trainer) if config.resume else None
        values = guide(trainer.optimizer, config, at, anew=resumed is None)
        feed = Feed(config, world, train, labels)
        if config.recalibrate and resumed is None:
            sample = feed.first(config.recalibrate)
            recalibrate(model, sample, world, forward=trainer.infer_by_batch)
        callbacks = [*watchers, saver]
        if config.snapshots and world.first:
            callbacks.append(Snapshots(config, at))
        world.broadcast_object(lambda: _keep_config(config))  # now that it can train
        callbacks += watch
        # Once, or twice if resumed within an epoch.
        while at.epoch < config.epochs and not saver.stopped:
            trainer.fit(
                feed.batches(at, when=values and values.augment[at.step :]),
                initial_epoch=at.epoch,
                epochs=at.epoch + 1 if at.image else config.epochs,
                steps_per_epoch=at.steps_left,
                callbacks=callbacks,
                verbose=verbose if world.first else 0,
                shuffle=False,
            )
        # Stopped within an epoch, each rank has moving statistics of its own.
        world.average(model.non_trainable_variables)
    return Training(
        config=config,
        world=world,
        trainer=trainer,
        split=split,
        parts=parts,
        scorer=scorer,
        history=progress.rows,
        steps=progress.step_rows,
        best_epoch=validation.best_epoch,
        best_weights=validation.best_weights,
        seconds=time.perf_counter() - began,
        resumed_from=resumed,
        stopped=saver.stopped,
    )


def _fit_on(engines, config: TrainConfig, *, restarts: int, report) -> TrainResult:
    for left in range(restarts, -1, -1):
        try:
            return engines.run(fit, config, report=report)[0]
        except ClusterError as error:
            if not left:
                raise
            log.warning(
                "%s\nTrying again from the last checkpoint; %d restarts are left.", error, left - 1
            )
            engines.restart()
            config = config.replace(resume=True)


def _keep_config(config: TrainConfig) -> None:
    """The config in the run's folder, ready for `python -m chexlib train --config`."""
    write_json(Path(config.run_dir) / "config.json", config.to_dict())


def _result_of(training: Training) -> TrainResult:
    run_dir = Path(training.config.run_dir)
    images = {name: len(part) for name, part in training.parts.items()}
    noise = training.noise_scale()
    return TrainResult(
        config=training.config.to_dict(),
        ranks=training.world.ranks,
        split={"name": training.split.name, "digest": training.split.digest, "images": images},
        history=training.history,
        best_epoch=training.best_epoch,
        seconds=training.seconds,
        model=str(run_dir / "model.keras"),
        predictions=str(run_dir / "predictions.parquet"),
        noise_scale=asdict(noise) if noise else None,
        resumed_from=training.resumed_from,
        stopped=training.stopped,
    )


def _write(result: TrainResult, training: Training, predictions: pd.DataFrame) -> None:
    config = training.config
    run_dir = Path(config.run_dir)
    card = {
        **config.network(),
        "split": result.split,
        "ranks": result.ranks,
        "config": result.config,
        "best_epoch": result.best_epoch,
        "normalization": NORMALIZATION[config.topology],
        "data": data_name(Path(config.data_dir)),
        "run": "/".join(run_dir.parts[-2:]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    steps = pd.DataFrame(training.steps, columns=Progress.STEP_COLUMNS)
    tables = {
        "history": pd.DataFrame(result.history),
        "steps": steps.astype({"epoch": int, "step": int}),
        "predictions": predictions,
    }
    step = "The training is in its checkpoints. Make room, and repeat it with resume=true."
    with writing_to(f"the results in {run_dir}", step, kind=WeightsError):
        save_model(training.model, result.model, card=card)
        for name, table in tables.items():
            with atomic_write(run_dir / f"{name}.parquet") as file:
                table.to_parquet(file, index=False)
