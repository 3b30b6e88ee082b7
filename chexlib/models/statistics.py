"""Batch norm's statistics, of any Keras model: what they are for the population, and setting them
to that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from chexlib.errors import ConfigError


class Population(NamedTuple):
    """Mean and variance of a batch-norm layer's inputs over all batches: (channels,) float64 each."""

    mean: np.ndarray
    variance: np.ndarray  # over images and pixels of all batches
    between: np.ndarray  # of that, the variance of the batches' means: by how much batches disagree


def norm_layers(model) -> list:
    """The batch-norm layers of a model and of the models inside it, from input to output."""
    import keras

    nested = [norm_layers(layer) if hasattr(layer, "layers") else [layer] for layer in model.layers]
    return [
        layer
        for inside in nested
        for layer in inside
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def moving_layers(model) -> list:
    """Those of `norm_layers` that learn their statistics: not the frozen ones."""
    return [
        n
        for n in norm_layers(model)
        if n.trainable and getattr(n, "statistics", "batch") != "frozen"
    ]


@contextlib.contextmanager
def kept_statistics(model) -> Iterator[None]:
    """Within the block a model may be called as in training; then its moving statistics are what
    they were.
    """
    before = [v.numpy() for v in model.non_trainable_variables]
    try:
        yield
    finally:
        for variable, value in zip(model.non_trainable_variables, before, strict=True):
            variable.assign(value)


def population_statistics(
    model, batches: Iterable, world=None, *, forward: Callable | None = None
) -> list[Population]:
    """What the layers' inputs look like over all batches, each batch being normalised by its own
    statistics.

    Parameters
    ----------
    model : keras.Model
        Left as it is. Dropout is active, as in training.
    batches : iterable of (n, ...) float32 arrays
        Of this rank; each image counts once. With norm="sync", as many batches on every rank.
    world : chexlib.collectives.World, optional
        The ranks whose batches are taken together, on all of them.
    forward : callable, optional
        `model(images, training=True)`, compiled.

    Returns
    -------
    list of Population
        One for each of `moving_layers(model)`.

    Raises
    ------
    ConfigError
        There are no images.
    """
    import tensorflow as tf

    forward = forward or (lambda images: model(images, training=True))
    if not (layers := moving_layers(model)):
        return []
    sums = [np.zeros((3, layer.moving_mean.shape[0])) for layer in layers]
    # A layer tells the mean over its virtual batches: what differs between these is seen if each
    # comes by itself.
    ghost, images = max((getattr(layer, "ghost_size", 0) for layer in layers), default=0), 0
    parts = (
        part
        for batch in batches
        for part in (np.array_split(batch, -(-len(batch) // ghost)) if ghost else [batch])
    )
    with kept_statistics(model):
        for batch in parts:
            # From nothing, one call moves them by 1 - momentum of the batch's own.
            for layer in layers:
                layer.moving_mean.assign(np.zeros(layer.moving_mean.shape, np.float32))
                layer.moving_variance.assign(np.zeros(layer.moving_mean.shape, np.float32))
            forward(batch)
            images += len(batch)
            for total, layer in zip(sums, layers, strict=True):
                mean, variance = (
                    v.numpy() / (1 - layer.momentum)
                    for v in (layer.moving_mean, layer.moving_variance)
                )
                total += len(batch) * np.stack([mean, mean.astype(float) ** 2, variance])
    if world:
        # Of one type, as Horovod needs.
        everything = [*map(tf.constant, sums), tf.constant(images, tf.float64)]
        *sums, images = (total.numpy() for total in world.allreduce(everything))
    if not images:
        raise ConfigError("there are no images to take statistics of. Give at least one batch.")
    found = []
    for mean, square, within in (total / images for total in sums):
        between = np.maximum(square - mean**2, 0)
        found.append(Population(mean, within + between, between))
    return found


def recalibrate(model, batches: Iterable, world=None, *, forward: Callable | None = None) -> int:
    """Replace moving statistics by the population's, for the weights as they are now: precise batch
    norm.

    Moving statistics are a memory of weights that have moved on; after few updates, or with a high
    momentum, also of their initial 0 and 1. Here all batches are seen by the same weights (Wu and
    Johnson 2021, section 3).

    Parameters
    ----------
    model, batches, world, forward
        As for `population_statistics`. Some thousand training images are enough.

    Returns
    -------
    int
        The number of layers that were recalibrated.
    """
    population = population_statistics(model, batches, world, forward=forward)
    for layer, found in zip(moving_layers(model), population, strict=True):
        layer.moving_mean.assign(found.mean.astype(np.float32))
        layer.moving_variance.assign(found.variance.astype(np.float32))
    return len(population)
