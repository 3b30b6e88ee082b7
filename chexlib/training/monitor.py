"""What is watched while training runs: validation over all ranks, and where training stands."""

from __future__ import annotations

import time
from collections.abc import Callable

import keras
import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

from chexlib.data.pipeline import ImageStore
from chexlib.errors import ConfigError
from chexlib.findings import FINDINGS
from chexlib.training.collectives import World


class PooledValidation(keras.callbacks.Callback):
    """At each epoch's end: moving statistics averaged over ranks, every rank scores its part, scores are pooled.

    Adds `val_loss` and `val_auroc` (mean over the findings that have both classes) to the logs of all ranks, and
    keeps the weights of the epoch with the best `val_auroc`, or the lowest `val_loss` where no AUROC is defined.
    """

    def __init__(self, score: Callable, labels: np.ndarray):
        super().__init__()
        self.score, self.labels = score, labels
        self.best, self.best_epoch, self.best_weights = -np.inf, 0, None

    def on_epoch_end(self, epoch, logs):
        model, world = self.model.model, self.model.world
        statistics = model.non_trainable_variables
        if statistics and world.ranks > 1:
            for variable, total in zip(statistics, world.sum([v.value for v in statistics]), strict=True):
                variable.assign(total / world.ranks)
        scores = self.score("validation")
        if not np.isfinite(scores).all():
            rate = float(self.model.optimizer.learning_rate)
            raise ConfigError(f"training diverged in epoch {epoch + 1}: use a learning_rate below {rate:g}.")
        logs["val_loss"] = float(
            np.mean([log_loss(y, p, labels=[0, 1]) for y, p in zip(self.labels.T, scores.T, strict=True)])
        )
        aurocs = [roc_auc_score(y, p) for y, p in zip(self.labels.T, scores.T, strict=True) if 0 < y.sum() < len(y)]
        logs["val_auroc"] = float(np.mean(aurocs)) if aurocs else float("nan")
        quality = logs["val_auroc"] if aurocs else -logs["val_loss"]
        if quality > self.best:
            self.best, self.best_epoch, self.best_weights = quality, epoch, model.get_weights()


class Progress(keras.callbacks.Callback):
    """Times epochs, and tells `report` of the first rank where training stands, at most twice a second."""

    def __init__(self, report: Callable[[dict], None] | None, *, images: int, steps: int, epochs: int):
        super().__init__()
        self.report, self.images, self.steps, self.epochs = report, images, steps, epochs
        self.told, self.rows = 0.0, []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.began = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs):
        now = time.perf_counter()
        self.trained = now
        if self.report and now - self.told > 0.5:
            self.told = now
            self._tell(step=batch + 1, loss=float(logs["loss"]))

    def on_epoch_end(self, epoch, logs):
        logs["images_per_second"] = self.images / (self.trained - self.began)
        self.rows.append({name: float(value) for name, value in logs.items()})
        if self.report:
            self._tell(step=self.steps, loss=float(logs["loss"]))

    def _tell(self, **numbers):
        where = {"epoch": self.epoch + 1, "epochs": self.epochs, "steps": self.steps}
        self.report({**where, **numbers, "history": self.rows})


def pooled_scorer(model, parts: dict, world: World, *, size: int, batch: int = 64) -> Callable[[str], np.ndarray]:
    """Make `score(part) -> (n, 14) float32`: each rank scores every ranks-th image, and all ranks get all scores."""
    import tensorflow as tf

    predict = tf.function(
        lambda pixels: model(pixels, training=False),
        input_signature=[tf.TensorSpec([None, size, size, 1], tf.float32)],
    )
    stores = {}

    def score(part: str) -> np.ndarray:
        paths = parts[part].table["path"]
        if part not in stores:
            stores[part] = ImageStore(paths[world.rank :: world.ranks], size=size)
        store = stores[part]
        pieces = [np.zeros((0, len(FINDINGS)), np.float32)]
        for start in range(0, len(store), batch):
            pixels = store.take(range(start, min(start + batch, len(store))))
            pieces.append(predict(pixels[..., None].astype(np.float32)).numpy())
        scores = np.empty((len(paths), len(FINDINGS)), np.float32)
        for rank, piece in enumerate(world.gather(np.concatenate(pieces))):
            scores[rank :: world.ranks] = piece
        return scores

    return score
