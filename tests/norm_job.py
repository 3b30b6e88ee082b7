"""A part of rank_job.py: one layer, on each rank a part of 16 images, the outcome to a file a rank."""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from chexlib.models.layers import FusedBatchNormalization
from chexlib.models.statistics import population_statistics

KINDS = {
    "sync": lambda: FusedBatchNormalization(statistics="sync"),
    "synchronized": lambda: keras.layers.BatchNormalization(synchronized=True),
    "plain": keras.layers.BatchNormalization,
}


def outcomes(x, weigh):
    """Of each kind of layer: outputs, gradients of inputs, scale and offset, and moving statistics
    after a step.
    """
    found = {}
    for name, make in KINDS.items():
        layer, inputs = make(), tf.Variable(x)
        layer.build(x.shape)
        with tf.GradientTape() as tape:
            outputs = tf.function(lambda v, layer=layer: layer(v, training=True))(inputs)
            loss = tf.reduce_sum(weigh * outputs**2)
        gradients = tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])
        arrays = [outputs, *gradients, layer.moving_mean, layer.moving_variance]
        names = ("outputs", "inputs", "gamma", "beta", "mean", "variance")
        found |= {f"{name}/{of}": np.asarray(a) for of, a in zip(names, arrays, strict=True)}
    return found


def data():
    """16 images and the weights of their outputs in the loss."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(2, 3, (16, 5, 4, 6)).astype(np.float32),
        rng.normal(size=(16, 5, 4, 6)).astype(np.float32),
    )


def save(world, folder, parts):
    """The outcomes on this rank of `world`, with so many images on each."""
    ends = np.cumsum([0, *parts])
    mine = slice(ends[world.rank], ends[world.rank + 1])
    images, weigh = (whole[mine] for whole in data())
    model = keras.Sequential(
        [keras.Input(images.shape[1:]), FusedBatchNormalization(statistics="sync")]
    )
    (population,) = population_statistics(model, [images[:2], images[2:]], world)
    found = {"population/mean": population.mean, "population/variance": population.variance}
    np.savez(Path(folder) / f"layer-{world.rank}.npz", **found, **outcomes(images, weigh))
