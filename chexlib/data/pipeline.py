"""Training batches: each epoch's shuffle, divided among ranks, augmented and read by tf.data.

The order of images is a pure function of (seed, epoch): every rank computes the same permutation
and takes its own part of each global batch, so each image is seen once an epoch whatever the number
of ranks.
"""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from chexlib.data.cache import ImageStore
from chexlib.errors import ConfigError

# Area and aspect of random crops: (least area, its share of the whole, and the narrowest aspect);
# None: no crops.
AUGMENTATIONS = {
    "none": None,
    # Of ImageNet photographs (Szegedy et al. 2015; train_val.prototxt of the solver files).
    "study": (0.08, 3 / 4),
    # Most of the chest stays in view: a sign that is cut off would leave a false label.
    "radiograph": (0.7, 9 / 10),
}
WHOLE = (0.0, 0.0, 1.0, 1.0)
# What is drawn at random from one seed, each from a generator of its own.
PURPOSES = ("order", "crops", "recalibration", "control", "train images")


class Share(NamedTuple):
    """Images of one rank in one step, with loss weights, mirroring and crops."""

    indices: np.ndarray  # (k,) int64
    weights: np.ndarray  # (k,) float32, 0 for the padding of a rank that has no image left
    mirrored: np.ndarray  # (k,) bool
    # (k, 4) float32: top, left, bottom, right of the crop, in fractions of the side.
    boxes: np.ndarray


def steps_per_epoch(n: int, *, global_batch: int) -> int:
    """Number of steps in which `n` images are seen once, the last global batch being smaller."""
    return -(-n // global_batch)


def generator_for(purpose: str, *, seed: int, epoch: int = 0) -> np.random.Generator:
    """A generator for one of `PURPOSES` in one epoch.

    NumPy fills a short list of seeds up with zeros: `default_rng(seed)`, `default_rng([seed, 0])`
    and `default_rng([seed, 0, 0])` draw the same numbers, which here are the order of epoch 0.
    """
    return np.random.default_rng([seed, epoch, PURPOSES.index(purpose)])


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
    augment: str = "none",
    first_image: int = 0,
    images: int = 0,
) -> Iterator[Share]:
    """Yield a rank's share of every step of an epoch, or of what is left after its first images.

    `first_image` images were used already; the epoch ends after `images` images, all `n` for 0.

    All ranks take equally many steps. The union of their shares over an epoch is each of the `n`
    images exactly once (the first `images` of its order, where asked for); the images of step s,
    their mirroring and crops, do not depend on the number of ranks. In the last step a rank may
    hold fewer images than others, or one image of weight 0 as padding. With `accumulation` a rank
    has as many micro-batches: its share is theirs, one after the other, as if each were a rank.

    Padding has no part in loss and gradients, but a batch norm that sees it counts it as an image:
    of itself alone on its rank, and as one among all where statistics are of all ranks. That
    happens where the last global batch has fewer images than there are micro-batches, once an
    epoch.

    Raises
    ------
    ConfigError
        There are fewer images than ranks, or the global batch does not reach every rank.
    """
    parts, first = ranks * accumulation, rank * accumulation
    if n < parts:
        raise ConfigError(
            f"{parts} ranks cannot share {n} images. Use at most {n} ranks, or more images."
        )
    if global_batch < parts:
        raise ConfigError(
            f"a global batch of {global_batch} leaves some of {parts} ranks without an image. Use a "
            f"global batch of {parts} or more, or fewer ranks."
        )
    generator = generator_for("order", seed=seed, epoch=epoch)
    order = generator.permutation(n)
    flips = generator.random(n) < 0.5 if mirror else np.zeros(n, bool)
    generator = generator_for("crops", seed=seed, epoch=epoch)
    boxes = random_boxes(n, augment=augment, generator=generator)
    order = order[: images or n]
    for start in range(first_image, len(order), global_batch):
        batch = order[start : start + global_batch]
        indices, weights = [], []
        for part in np.array_split(batch, parts)[first : first + accumulation]:
            indices.append(part if len(part) else order[:1])
            weights.append(np.full(max(1, len(part)), min(1, len(part)), np.float32))
        chosen = np.concatenate(indices)
        yield Share(chosen, np.concatenate(weights), flips[chosen], boxes[chosen])


def random_boxes(n: int, *, augment: str, generator: np.random.Generator) -> np.ndarray:
    """Crops of `n` images, (n, 4) float32: area uniform from the least to the whole, aspect
    log-uniform, any place.

    A side that would be longer than the image is as long as the image.
    """
    if AUGMENTATIONS[augment] is None:
        return np.tile(np.float32(WHOLE), (n, 1))
    least, narrowest = AUGMENTATIONS[augment]
    drawn = generator.random((4, n))
    area = least + (1 - least) * drawn[0]
    aspect = narrowest ** (2 * drawn[1] - 1)
    sides = np.minimum(np.sqrt([area * aspect, area / aspect]), 1)
    corner = drawn[2:] * (1 - sides)
    # TensorFlow fills with black what rounding puts beyond the edge.
    ends = np.minimum(corner + sides, 1 - 1e-6)
    return np.concatenate([corner, ends]).T.astype(np.float32)


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
    augment: str = "none",
    when: np.ndarray | None = None,
    images: int = 0,
):
    """Endless tf.data of a rank's training batches, epoch after epoch.

    Parameters
    ----------
    labels : (n, 14) float32
    first_epoch, first_image : int
        Where to begin: the epoch, counted from 0, and how many of its images have been used.
    augment : str
        Random crops: a name in `AUGMENTATIONS`.
    when : (steps,) bool, optional
        In which of the steps to come images are cropped, the last value holding on; in all without
        it.
    images : int
        Of an epoch: after so many the next epoch's shuffle begins; 0 means all.

    Returns
    -------
    tf.data.Dataset
        Of (pixels float32 (k, size, size, 1) in 0..255, labels float32 (k, 14), weights float32
        (k,)).
    """
    import tensorflow as tf

    epoch_of = functools.partial(
        partition,
        len(store),
        global_batch=global_batch,
        seed=seed,
        rank=rank,
        ranks=ranks,
        accumulation=accumulation,
        mirror=mirror,
        augment=augment,
        images=images,
    )

    def draw():
        step, used = 0, first_image
        for epoch in itertools.count(first_epoch):
            for share in epoch_of(epoch=epoch, first_image=used):
                if when is not None and not when[min(step, len(when) - 1)]:
                    share = share._replace(boxes=np.tile(np.float32(WHOLE), (len(share.boxes), 1)))
                yield share
                step += 1
            used = 0

    def load(indices, weights, mirrored, boxes):
        pixels = tf.numpy_function(store.take, [indices], tf.uint8)
        pixels = tf.ensure_shape(pixels, [None, store.size, store.size])
        pixels = tf.where(mirrored[:, None, None], pixels[:, :, ::-1], pixels)
        pixels = tf.cast(pixels[..., None], tf.float32)
        if augment != "none":
            cropped = tf.reduce_any(boxes != tf.constant(WHOLE))
            pixels = tf.cond(cropped, lambda: _crop(pixels, boxes), lambda: pixels)
        return pixels, tf.gather(table, indices), weights

    table = tf.constant(labels, tf.float32)
    signature = (
        tf.TensorSpec([None], tf.int64),
        tf.TensorSpec([None], tf.float32),
        tf.TensorSpec([None], tf.bool),
        tf.TensorSpec([None, 4], tf.float32),
    )
    return dataset_from(draw, signature, load)


def dataset_from(draw: Callable[[], Iterator], signature: tuple, load: Callable):
    """A tf.data.Dataset of what a generator yields, each item turned into a batch by `load`.

    Every one of chexlib is made here, see the function below.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    items = tf.data.Dataset.from_generator(draw, output_signature=signature)
    batches = items.map(load, num_parallel_calls=2, deterministic=True)
    return batches.prefetch(2).with_options(options)


@atexit.register
def _let_go_of_the_last_error() -> None:
    """End iterators that an uncaught exception holds, while Python's other threads still run.

    The end of an iterator over a generator waits for a thread of TensorFlow that takes Python's
    lock. Once Python has begun to end itself no thread gets that lock, and the process would wait
    for ever (seen with Python 3.13).
    """
    for name in ("last_exc", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)
    gc.collect()


def _crop(pixels, boxes):
    """Crops (k, size, size, 1) at the images' size, bilinear, the corner pixels on the boxes'
    corners.

    Not by `tf.image.crop_and_resize`: for each of its graphs TensorFlow writes a screen of "Error
    in PredictCost()".
    """
    import keras
    import tensorflow as tf

    top, left, bottom, right = tf.unstack(boxes, axis=1)
    last, none = pixels.shape[1] - 1.0, tf.zeros_like(top)
    transform = [right - left, none, left * last, none, bottom - top, top * last, none, none]
    return keras.ops.image.affine_transform(
        pixels, tf.stack(transform, axis=1), fill_mode="nearest", data_format="channels_last"
    )
