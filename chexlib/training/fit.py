"""`fit(config)`: one training, the same function in a notebook, under `mpiexec -n N` and on MPI
engines.

python -m chexlib train --config config.json                 # 1 process
mpiexec -n 2 python -m chexlib train --config config.json    # 2 ranks
fit(config, engines=engines, restarts=1)                     # on a notebook's engines
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from chexlib import stopping
from chexlib.collectives import join_world
from chexlib.data.nih import data_name
from chexlib.data.pipeline import generator_for
from chexlib.errors import ClusterError, ConfigError, WeightsError
from chexlib.files import atomic_write
from chexlib.models.statistics import recalibrate
from chexlib.models.topologies import NORMALIZATION
from chexlib.models.weights import save_model
from chexlib.training.callbacks import (
    Plateau,
    PooledValidation,
    Position,
    Progress,
    Snapshots,
    pooled_scorer,
)
from chexlib.training.config import TrainConfig
from chexlib.training.input import Feed, divide, predictions_of, start_head_at_prevalence
from chexlib.training.optimizers import guide
from chexlib.training.state import Saver, checkpoint_files
from chexlib.training.trainer import Reuse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training left: its history, and where model and predictions lie.

    Equal on every rank.
    """

    config: dict
    ranks: int
    split: dict  # name, digest, images per part
    # A row an epoch: epoch, loss, val_loss, val_auroc, learning_rate, images_per_second, skew.
    history: list[dict]
    best_epoch: int  # counted from 0; the saved weights are of this epoch
    seconds: float
    model: str
    predictions: str
    resumed_from: str | None = None  # name of the checkpoint
    stopped: bool = False  # ended early because it was asked to; the checkpoint is of the very step
    measured: dict | None = None  # what `measure` found, where it was asked for

    def to_dict(self) -> dict:
        """Plain values, for `metrics.json`."""
        return asdict(self)


def fit(
    config: TrainConfig,
    *,
    engines=None,
    restarts: int = 0,
    report: Callable[[dict], None] | None = None,
    verbose: int | str = 0,
    reuse: Reuse | None = None,
    measure: Callable[..., dict] | None = None,
) -> TrainResult:
    """Train on the train part, choose by the validation part, score validation and test with the
    best weights.

    Parameters
    ----------
    config : TrainConfig
    engines : chexlib.cluster.engines.Engines, optional
        Train on these engines instead of in this process.
    restarts : int
        How often engines may be started again after a fault; the training goes on from its last
        checkpoint.
    report : callable, optional
        Called on the first rank, or here if there are engines, with a dict of live numbers: epoch,
        epochs, step, steps, loss (of the epoch so far), step_loss, images_per_second, busy (seconds
        of compute by rank), and history (a dict for each epoch that has ended).
    verbose : 0, 1, 2 or "auto"
        Keras' progress bar, on the first rank.
    reuse : Reuse, optional
        Of one process: takes over what an earlier training built, and keeps it for the next.
    measure : callable, optional
        Called on every rank as `measure(trainer, parts, world)` with the weights of the last epoch,
        instead of scoring and writing the best ones: for grids of trainings that leave numbers
        only. Not with engines.

    Returns
    -------
    TrainResult
        The first rank has written `model.keras`, `history.parquet` and `predictions.parquet` to
        `run_dir`.

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
    stopping.listen()
    try:
        return _fit_here(config, report, verbose, reuse or Reuse(), measure)
    finally:
        stopping.clear()  # not at the start: a stop may be asked for while everything is got ready


def _fit_here(
    config: TrainConfig, report, verbose: int | str, reuse: Reuse, measure
) -> TrainResult:
    began = time.perf_counter()
    world = join_world()
    split, parts = divide(config)
    train = parts["train"]
    if (ranks := world.ranks * config.accumulation) > len(train):
        raise ConfigError(
            f"{ranks} ranks cannot share {len(train)} images. Use at most {len(train)} engines."
        )
    if world.first:  # above the lines of the epochs, which have an AUROC
        counts = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
        log.info("%s split %s: %s images", split.name, split.digest, counts)
    world.broadcast_object(lambda: _prepare(config))

    trainer = reuse.trainer(config, world)
    model = trainer.model
    labels = train.labels
    start_head_at_prevalence(model, labels)
    if config.shuffle_labels:
        labels = generator_for("control", seed=config.seed).permutation(labels)
    world.broadcast([*model.variables, *trainer.optimizer.variables])

    global_batch = config.batch_size * ranks
    images = config.stream_images or len(train)
    at = Position(global_batch, min(images, config.max_steps * global_batch or images))
    score = pooled_scorer(trainer.infer, parts, world, size=config.size)
    validation = PooledValidation(
        score, parts["validation"].labels, choose=not config.shuffle_labels
    )
    plateau = Plateau(1 if trainer.optimizer.tables else config.plateau_factor)
    progress = Progress(report if world.first else None, at, epochs=config.epochs)
    saver = Saver(config, world, at, (validation, plateau, progress), facts={"split": split.digest})
    resumed = saver.restore(trainer) if config.resume else None
    values = guide(trainer.optimizer, config, at, anew=resumed is None)
    feed = Feed(config, world, train, labels)
    if config.recalibrate and resumed is None:
        recalibrate(model, feed.first(config.recalibrate), world, forward=trainer.infer_by_batch)
    callbacks = [validation, plateau, progress, saver]
    if config.snapshots and world.first:
        callbacks.append(Snapshots(config, at))
    # Once, or twice if resumed within an epoch.
    while at.epoch < config.epochs and not saver.stopped:
        batches = feed.batches(at, when=values and values.augment[at.step :])
        trainer.fit(
            batches,
            initial_epoch=at.epoch,
            epochs=at.epoch + 1 if at.image else config.epochs,
            steps_per_epoch=at.steps_left,
            callbacks=callbacks,
            verbose=verbose if world.first else 0,
            shuffle=False,
        )
    world.average(model.non_trainable_variables)  # stopped within an epoch, each rank has its own
    if measure is None and validation.best_weights is not None:
        model.set_weights(validation.best_weights)
    result = TrainResult(
        config=config.to_dict(),
        ranks=world.ranks,
        split={
            "name": split.name,
            "digest": split.digest,
            "images": {name: len(part) for name, part in parts.items()},
        },
        history=progress.rows,
        best_epoch=validation.best_epoch,
        seconds=time.perf_counter() - began,
        model=str(Path(config.run_dir) / "model.keras"),
        predictions=str(Path(config.run_dir) / "predictions.parquet"),
        resumed_from=resumed,
        stopped=saver.stopped,
        measured=measure(trainer, parts, world) if measure and not saver.stopped else None,
    )
    if measure is None:
        predictions = pd.concat(
            [predictions_of(parts[part], score(part), part) for part in ("validation", "test")]
        )
        world.broadcast_object(lambda: _write(result, model, predictions, progress.step_rows))
    return result


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


def _prepare(config: TrainConfig) -> None:
    """The run's folder with the config in it, ready for `python -m chexlib train --config`."""
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "config.json") as file:
            file.write(json.dumps(config.to_dict(), indent=1).encode())
        if not config.resume:
            for path in checkpoint_files(run_dir / "checkpoints"):
                path.unlink()
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir!r} cannot be written ({error}). Name another folder."
        ) from error


def _write(result: TrainResult, model, predictions: pd.DataFrame, steps: list) -> None:
    card = {**TrainConfig.from_dict(result.config).network(), "split": result.split}
    facts = {"ranks": result.ranks, "config": result.config, "best_epoch": result.best_epoch}
    facts |= {
        "normalization": NORMALIZATION[card["topology"]],
        "data": data_name(Path(result.config["data_dir"])),
    }
    run_dir = Path(result.config["run_dir"])
    facts |= {
        "run": "/".join(run_dir.absolute().parts[-2:]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    tables = {
        "history": pd.DataFrame(result.history),
        "steps": pd.DataFrame(steps, columns=Progress.STEP_COLUMNS).astype(
            {"epoch": int, "step": int}
        ),
        "predictions": predictions,
    }
    try:
        save_model(model, result.model, card={**card, **facts})
        for name, table in tables.items():
            with atomic_write(run_dir / f"{name}.parquet") as file:
                table.to_parquet(file, index=False)
    except OSError as error:
        raise WeightsError(
            f"the results could not be written to {run_dir} ({error.strerror or error}). Make "
            "room, and run again with resume=true: what was trained is in its checkpoints."
        ) from error
