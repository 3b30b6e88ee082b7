"""The seven steps of data-parallel training, one at a time and in the open, for notebook 04."""

from __future__ import annotations

import zlib

import numpy as np

from chexlib.collectives import join_world
from chexlib.data.cache import ImageStore
from chexlib.data.pipeline import partition
from chexlib.models.weights import create_model
from chexlib.training.config import TrainConfig
from chexlib.training.input import divide


def seven_steps(config: TrainConfig) -> dict:
    """Take the first steps of a training by hand on this rank, and keep what each step saw.

    What `fit` does in a compiled loop, here in plain eager calls: broadcast, distribute, shuffle,
    forward, aggregate, update, repeat. To show that the broadcast matters, each rank starts from a
    seed of its own.

    Returns
    -------
    dict
        rank and ranks, then one dict a step, of small lists and numbers; equal keys on every rank.
    """
    import keras
    import tensorflow as tf

    world = join_world()
    model = create_model(**config.network(), weights=config.weights, seed=config.seed + world.rank)
    head = model.get_layer("findings")
    optimizer = keras.optimizers.SGD(config.learning_rate)
    optimizer.build(model.trainable_variables)
    seen = {"rank": world.rank, "ranks": world.ranks}

    before = _sample(head.kernel)
    world.broadcast(model.variables)
    seen["broadcast"] = {
        "before": before,
        "after": _sample(head.kernel),
        "checksum": checksum(model),
    }

    train = divide(config)[1]["train"]
    order = {
        "global_batch": config.batch_size * world.ranks,
        "seed": config.seed,
        "rank": world.rank,
        "ranks": world.ranks,
    }
    epoch = list(partition(len(train), epoch=0, **order))
    mine = np.concatenate([share.indices[share.weights > 0] for share in epoch])
    seen["distribute"] = {
        "images": len(train),
        "mine": len(mine),
        "steps": len(epoch),
        "indices": mine.tolist(),
    }
    following = next(partition(len(train), epoch=1, **order))
    names = train.table["image"].to_numpy()
    seen["shuffle"] = {
        "first_batch": names[epoch[0].indices].tolist(),
        "next_epoch": names[following.indices].tolist(),
    }

    store = ImageStore(train.table["path"], size=config.size, gather=world.allgather_object)
    seen["repeat"] = {"loss": [], "checksum": []}
    for step, share in enumerate(epoch[:3]):
        pixels = tf.constant(store.take(share.indices)[..., None], tf.float32)
        labels = tf.constant(train.labels[share.indices])
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(
                keras.losses.binary_crossentropy(labels, model(pixels, training=True))
            )
        gradients = tape.gradient(loss, model.trainable_variables)
        *totals, images, loss_sum = world.allreduce(
            [*gradients, tf.constant(float(len(pixels))), loss]
        )
        averaged = [total / images for total in totals]
        if step == 0:
            seen["forward"] = {"images": len(pixels), "loss": float(loss) / len(pixels)}
            own = gradients[-1].numpy() / len(pixels)
            seen["aggregate"] = {"own": own.tolist(), "averaged": averaged[-1].numpy().tolist()}
            seen["update"] = {"before": _sample(head.bias, 14)}
        optimizer.apply(averaged, model.trainable_variables)
        if step == 0:
            seen["update"]["after"] = _sample(head.bias, 14)
        seen["repeat"]["loss"].append(float(loss_sum / images))
        seen["repeat"]["checksum"].append(checksum(model))
    return seen


def checksum(model) -> str:
    """Hexadecimal CRC-32 of all trainable weights: two ranks with the same one hold the same bits."""
    return f"{zlib.crc32(b''.join(v.numpy().tobytes() for v in model.trainable_variables)):08x}"


def _sample(variable, n: int = 4) -> list[float]:
    return np.asarray(variable.numpy()).ravel()[:n].tolist()
