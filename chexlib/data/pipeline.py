"""Cached pixels -> batches: one shuffle an epoch divided among ranks, tf.data.

The order of images is a pure function of (seed, epoch): every rank computes the same permutation and takes its own
part of each global batch, so each image is seen once an epoch whatever the number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from chexlib.data.cache import ImageStore
from chexlib.errors import ConfigError


class Share(NamedTuple):
    """What one rank does in one step: image indices, their weights in the loss, and which are mirrored."""

    indices: np.ndarray  # (k,) int64
    weights: np.ndarray  # (k,) float32, 0 for the stand-in of a rank that has no image left
    mirrored: np.ndarray  # (k,) bool


def steps_per_epoch(n: int, *, global_batch: int) -> int:
    """Number of steps in which `n` images are seen once, the last global batch being smaller."""
    return -(-n // global_batch)


def partition(
    n: int,
    *,
    global_batch: int,
    epoch: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    mirror: bool = False,
    first_image: int = 0,
) -> Iterator[Share]:
    """Yield a rank's share of every step of an epoch, or of what is left of it after its `first_image` images.

    All ranks take equally many steps. The union of their shares over an epoch is each of the `n` images exactly
    once; the images of step s, and their mirroring, do not depend on the number of ranks. In the last step a rank
    may hold fewer images than others, or one stand-in of weight 0. With `accumulation` a rank stands for as many
    virtual ranks: its share is theirs, one after the other.

    A stand-in has no part in loss and gradients, but a batch norm that sees it counts it as an image: of itself alone
    on its rank, and as one among all where statistics are of all ranks. That happens where the last global batch has
    fewer images than there are (virtual) ranks, once an epoch.

    Raises
    ------
    ConfigError
        There are fewer images than ranks, or the global batch does not reach every rank.
    """
    ranks, first = ranks * accumulation, rank * accumulation
    if n < ranks:
        raise ConfigError(f"{ranks} ranks cannot share {n} images. Use at most {n} engines, or more images.")
    if global_batch < ranks:
        raise ConfigError(f"a global batch of {global_batch} leaves some of {ranks} ranks without an image.")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(n)
    flips = generator.random(n) < 0.5 if mirror else np.zeros(n, bool)
    for start in range(first_image, n, global_batch):
        parts = np.array_split(order[start : start + global_batch], ranks)[first : first + accumulation]
        weights = np.concatenate([np.full(max(1, len(part)), min(1, len(part)), np.float32) for part in parts])
        mine = np.concatenate([part if len(part) else order[:1] for part in parts])
        yield Share(mine, weights, flips[mine])


def training_batches(
    store: ImageStore,
    labels: np.ndarray,
    *,
    global_batch: int,
    seed: int,
    first_epoch: int = 0,
    first_image: int = 0,
    rank: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    mirror: bool = True,
    images: int = 0,
):
    """Endless tf.data of a rank's training batches, epoch after epoch.

    Parameters
    ----------
    labels : (n, 14) float32
    first_epoch, first_image : int
        Where to begin: the epoch, counted from 0, and how many of its images have been used.
    images : int
        Of an epoch: after so many the next epoch's shuffle begins; 0 means all.

    Returns
    -------
    tf.data.Dataset
        Of (pixels float32 (k, size, size, 1) in 0..255, labels float32 (k, 14), weights float32 (k,)).
    """
    import tensorflow as tf

    shares = {"global_batch": global_batch, "seed": seed, "rank": rank, "ranks": ranks, "mirror": mirror}
    shares["accumulation"] = accumulation

    def draw():
        used = first_image
        for epoch in itertools.count(first_epoch):
            steps = steps_per_epoch((images or len(store)) - used, global_batch=global_batch)
            yield from itertools.islice(partition(len(store), epoch=epoch, first_image=used, **shares), steps)
            used = 0

    def load(indices, weights, mirrored):
        pixels = tf.numpy_function(store.take, [indices], tf.uint8)
        pixels = tf.ensure_shape(pixels, [None, store.size, store.size])
        pixels = tf.where(mirrored[:, None, None], pixels[:, :, ::-1], pixels)
        return tf.cast(pixels[..., None], tf.float32), tf.gather(table, indices), weights

    table = tf.constant(labels, tf.float32)
    signature = tuple(tf.TensorSpec([None], kind) for kind in (tf.int64, tf.float32, tf.bool))
    batches = tf.data.Dataset.from_generator(draw, output_signature=signature)
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.map(load, num_parallel_calls=2, deterministic=True).prefetch(2).with_options(options)
