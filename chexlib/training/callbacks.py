"""Keras callbacks of a training: validation over all ranks, learning-rate plateau, progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score

from chexlib.collectives import World
from chexlib.data.cache import ImageStore
from chexlib.data.pipeline import steps_per_epoch
from chexlib.errors import DivergedError, WeightsError
from chexlib.files import writing_to
from chexlib.findings import FINDINGS
from chexlib.models.topologies import NORMALIZATION
from chexlib.models.weights import read_card, save_model
from chexlib.training.config import TrainConfig
from chexlib.training.noise import noise_and_signal


@dataclass
class Position:
    """Training progress: epoch, image and step counters."""

    global_batch: int
    images: int  # of an epoch
    epoch: int = 0  # counted from 0
    image: int = 0  # images of this epoch that have been used
    step: int = 0  # since the start of the training

    @property
    def steps_left(self) -> int:
        """Steps to the end of this epoch."""
        return steps_per_epoch(self.images - self.image, global_batch=self.global_batch)


class PooledValidation(keras.callbacks.Callback):
    """At each epoch's end: moving statistics averaged over ranks, every rank scores its part,
    scores are pooled.

    Adds `val_loss` and `val_auroc` (mean over the findings that have both classes) to the logs of
    all ranks, and keeps the weights of the epoch with the best `val_auroc`, or the lowest
    `val_loss` where no AUROC is defined. With `choose` False it keeps those of the last epoch: a
    control whose training labels are shuffled must not be helped by validation labels that are not.
    """

    def __init__(self, score: Callable, labels: np.ndarray, *, choose: bool = True):
        super().__init__()
        self.score, self.labels, self.choose = score, labels, choose
        self.best, self.best_epoch, self.best_weights = -np.inf, 0, None

    def on_epoch_end(self, epoch, logs):
        model = self.model.model
        self.model.world.average(model.non_trainable_variables)
        scores = self.score("validation")
        if not np.isfinite(scores).all():
            rate = float(self.model.optimizer.learning_rate)
            raise DivergedError(
                f"training diverged in epoch {epoch + 1}: its scores are not finite. The learning rate "
                f"was {rate:g}. Use a lower one."
            )
        logs["val_loss"] = float(
            np.mean(
                [
                    log_loss(y, p, labels=[0, 1])
                    for y, p in zip(self.labels.T, scores.T, strict=True)
                ]
            )
        )
        aurocs = [
            roc_auc_score(y, p)
            for y, p in zip(self.labels.T, scores.T, strict=True)
            if 0 < y.sum() < len(y)
        ]
        logs["val_auroc"] = float(np.mean(aurocs)) if aurocs else float("nan")
        quality = logs["val_auroc"] if aurocs else -logs["val_loss"]
        if quality > self.best or not self.choose:
            self.best, self.best_epoch, self.best_weights = quality, epoch, model.get_weights()


class Plateau(keras.callbacks.ReduceLROnPlateau):
    """Multiplies the learning rate by `factor` after an epoch whose `val_loss` is not lower by more
    than `delta`.

    Keras' own, but one that can be resumed in the middle of a training; 1 leaves the rate alone.
    """

    def __init__(self, factor: float, *, delta: float):
        self.idle = factor == 1
        accepted = 0.5 if self.idle else factor  # Keras refuses 1
        super().__init__("val_loss", accepted, patience=1, min_delta=delta)
        self.best = None

    def on_train_begin(self, logs=None):
        pass  # keep what is known

    def on_epoch_end(self, epoch, logs=None):
        if self.idle:
            logs["learning_rate"] = float(self.model.optimizer.learning_rate)
        else:
            super().on_epoch_end(epoch, logs)


class Progress(keras.callbacks.Callback):
    """Keeps a row per epoch and a row per step, and tells `report` where training stands, at most
    twice a second.

    Skew is by how much of the slowest rank's time the fastest rank is ahead, before they wait for
    each other.
    """

    # Loss of that step alone, seconds of compute, and of the gradient, see `noise_and_signal`.
    STEP_COLUMNS = ("epoch", "step", "loss", "slowest", "fastest", "noise", "signal")

    def __init__(self, report: Callable[[dict], None] | None, at: Position, *, epochs: int):
        super().__init__()
        self.report, self.epochs, self.at = report, epochs, at
        self.last_told, self.rows, self.step_rows = 0.0, [], []
        self.traced = False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.began, self.first_image = epoch, time.perf_counter(), self.at.image

    def on_train_batch_end(self, batch, logs):
        self.trained = now = time.perf_counter()
        self.at.step += 1
        self.at.image = min(self.at.image + self.at.global_batch, self.at.images)
        if not self.traced and self.at.steps_left:
            # The first step is traced: speed is that of the steps after it, if there are any.
            self.began, self.first_image = now, self.at.image
        self.traced = True
        told = self.model.told()
        seconds = [max(told["busy"]), min(told["busy"])]
        gradient = noise_and_signal(*told["squares"])
        self.step_rows.append([self.epoch, self.at.step, told["step_loss"], *seconds, *gradient])
        if self.report and now - self.last_told > 0.5:
            self.last_told = now
            self._tell(float(logs["loss"]))

    def on_epoch_end(self, epoch, logs):
        logs["images_per_second"] = (self.at.image - self.first_image) / (self.trained - self.began)
        slowest, fastest = np.array([row[3:5] for row in self.step_rows if row[0] == epoch]).T
        # A clock that is too coarse for a tiny network sees no time at all.
        share = np.divide(fastest, slowest, out=np.ones_like(fastest), where=slowest > 0)
        logs["skew"] = float(np.mean(1 - share))
        self.rows.append({"epoch": epoch, **{name: float(value) for name, value in logs.items()}})
        if self.report:
            self._tell(float(logs["loss"]))

    def _tell(self, loss: float):
        steps = steps_per_epoch(self.at.images, global_batch=self.at.global_batch)
        where = {
            "epoch": self.epoch + 1,
            "epochs": self.epochs,
            "step": steps - self.at.steps_left,
            "steps": steps,
        }
        speed = (self.at.image - self.first_image) / (time.perf_counter() - self.began)
        numbers = {"loss": loss, "images_per_second": speed, "history": self.rows}
        self.report({**where, **self.model.told(), **numbers})


class PooledScorer:
    """Scores parts of the data over all ranks: each rank takes every ranks-th image.

    Parameters
    ----------
    parts : dict of name to Radiographs
    world : World
    size : int
        Side of the network's input in pixels.
    """

    def __init__(self, parts: dict, world: World, *, size: int):
        self.parts, self.world, self.size = parts, world, size
        self._stores = {}  # each part's images, opened once

    def __call__(self, part: str, predict: Callable, *, batch: int = 64) -> np.ndarray:
        """Probabilities of a part's images, (n, 14) float32, the same on every rank.

        `predict` takes (k, size, size, 1) float32 pixels, at most `batch` images at once.
        """
        world = self.world
        if part not in self._stores:
            paths = self.parts[part].table["path"]
            store = ImageStore(paths, size=self.size, gather=world.allgather_object)
            self._stores[part] = store
        store = self._stores[part]
        pieces = [np.zeros((0, len(FINDINGS)), np.float32)]
        for chosen in world.batches(len(store), batch=batch):
            if len(chosen):
                pixels = store.take(chosen)[..., None].astype(np.float32)
                pieces.append(predict(pixels).numpy())
        scores = np.empty((len(store), len(FINDINGS)), np.float32)
        for rank, piece in enumerate(world.allgather_object(np.concatenate(pieces))):
            scores[rank :: world.ranks] = piece
        return scores


FACTS = ("step", "images", "learning_rate", "global_batch", "epoch", "epochs", "optimizer")


class Snapshots(keras.callbacks.Callback):
    """At each epoch's end, after its checkpoint, writes `run_dir/snapshots/step-<step>.keras`.

    Its card's `snapshot` has step, images (seen until then), learning_rate (of the last update),
    global_batch, epoch, epochs, optimizer, val_loss and val_auroc.
    """

    def __init__(self, config: TrainConfig, at: Position):
        super().__init__()
        self.config, self.at = config, at

    def on_epoch_end(self, epoch, logs):
        if self.at.epoch == epoch:
            return  # stopped within the epoch
        config, at = self.config, self.at
        rate = float(logs["learning_rate"])
        values = (at.step, at.epoch * at.images, rate, at.global_batch, at.epoch, config.epochs)
        facts = dict(zip(FACTS, (*values, config.optimizer), strict=True))
        facts |= {name: float(logs[name]) for name in ("val_loss", "val_auroc")}
        card = {**config.network(), "normalization": NORMALIZATION[config.topology]}
        folder = Path(config.run_dir) / "snapshots"
        step = "Make room, and repeat the training with resume=true."
        with writing_to(f"the snapshot of step {at.step} in {folder}", step, kind=WeightsError):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{at.step:09d}.keras"
            save_model(
                self.model.model, path, card={**card, "config": config.to_dict(), "snapshot": facts}
            )


def snapshots_of(run: str | Path) -> pd.DataFrame:
    """The snapshots of a run, in the order in which they were taken: path, and what the card of
    each says.

    Raises
    ------
    WeightsError
        There is none.
    """
    files = sorted(Path(run).glob("snapshots/step-*.keras"))
    if not files:
        raise WeightsError(f"{run} has no snapshots. Train with snapshots=true.")
    return pd.DataFrame(
        [{"path": str(path), **read_card(path).get("snapshot", {})} for path in files]
    )
