"""Callbacks of studies: batch norm with other momenta, and validation AUROC by updates.

Neither feeds back into the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from chexlib.evaluation.auroc import mean_auroc
from chexlib.models.statistics import kept_statistics, moving_layers


class ShadowStatistics(keras.callbacks.Callback):
    """Moving statistics of batch norm as they would be with other momenta.

    Training never reads moving statistics, so several momenta can be compared in one training. The
    statistics of each batch are computed back from how far the model's own moved:
    moving' = m x moving + (1 - m) x batch.
    """

    def __init__(self, momenta: Sequence[float]):
        super().__init__()
        self.momenta = tuple(momenta)

    def on_train_begin(self, logs=None):
        layers = moving_layers(self.model.model)
        self.variables = [v for n in layers for v in (n.moving_mean, n.moving_variance)]
        if not self.variables:
            return
        momentum = layers[0].momentum
        before = tf.Variable(self._read())
        self.shadows = {m: tf.Variable(before) for m in self.momenta}

        @tf.function
        def follow():
            now = self._read()
            of_batch = (now - momentum * before) / (1 - momentum)
            for m, shadow in self.shadows.items():
                shadow.assign(m * shadow + (1 - m) * of_batch)
            before.assign(now)

        self.follow = follow

    def on_train_batch_end(self, batch, logs=None):
        if self.variables:
            self.follow()

    def _read(self) -> tf.Tensor:
        return tf.concat([v.value for v in self.variables], axis=0)

    @contextlib.contextmanager
    def applied(self, momentum: float):
        """Within the block the model has the moving statistics of this momentum."""
        with kept_statistics(self.model.model):
            if self.variables:
                sizes = [v.shape[0] for v in self.variables]
                values = tf.split(self.shadows[momentum], sizes)
                for variable, value in zip(self.variables, values, strict=True):
                    variable.assign(value)
            yield


class ValidationCurve(keras.callbacks.Callback):
    """Mean validation AUROC every so many updates, in `points`: a list of (update, AUROC).

    By statistics of batches, as moving statistics trail weights that still move fast.

    Parameters
    ----------
    score : callable
        `score(predict)` gives the scores of the validation part, (n, 14).
    labels : (n, 14)
    every : int
        Updates between two looks.
    """

    def __init__(self, score: Callable, labels: np.ndarray, *, every: int):
        super().__init__()
        self.score, self.labels, self.every = score, labels, every
        self.updates, self.points = 0, []

    def on_train_batch_end(self, batch, logs=None):
        self.updates += 1
        if self.updates % self.every == 0:
            with kept_statistics(self.model.model):
                scores = self.score(self.model.infer_by_batch)
            self.points.append((self.updates, mean_auroc(self.labels, scores)))

    def updates_to(self, auroc: float) -> int | None:
        """Updates after which the AUROC was first seen to be reached, or None."""
        return next((update for update, seen in self.points if seen >= auroc), None)
