"""Trainings that take seconds."""

import keras
import numpy as np

from chexlib.studies.grid import run_grid
from chexlib.training.config import TrainConfig
from chexlib.training.fit import learn
from chexlib.training.trainer import Reuse


def config_for(data_dir, run_dir, **changes):
    """Of VGG-16 of a quarter's width on 32-pixel radiographs, as `changes` ask for."""
    settings = dict(topology="vgg16", width=0.25, stem="small", size=32, epochs=2, batch_size=8)
    settings |= dict(learning_rate=1e-4, split="patient")
    settings["precision"] = "float32"  # whatever the processor is made for
    return TrainConfig(data_dir=str(data_dir), run_dir=str(run_dir), **{**settings, **changes})


def grid_of_three(data_dir, table):
    """A table of three trainings, which a later call with the same table goes on with."""
    reuse = Reuse()

    def row(point, folder):
        training = learn(
            config_for(data_dir, folder, resume=True, optimizer="sgd", **point), reuse=reuse
        )
        norm = float(sum(abs(w).sum() for w in training.model.get_weights()))
        last = training.history[-1]
        return {"norm": norm, "loss": last["loss"], "auroc": last["val_auroc"]}

    run_grid(
        [{"seed": seed, "accumulation": a} for a, seed in ((1, 0), (1, 1), (2, 0))], table, row
    )


def with_a_tiny_network(patch):
    """Let every topology be one convolution with batch norm, for tests of what happens around a
    network.
    """

    def build(topology, *, size, seed=0, momentum=0.9, **_):
        draw = keras.initializers.GlorotUniform
        grey = keras.Input((size, size, 1), name="radiograph")
        scaled = keras.layers.Rescaling(1 / 255)(grey)
        features = keras.layers.Conv2D(4, 5, 4, kernel_initializer=draw(seed), name="conv1_conv")(
            scaled
        )
        features = keras.layers.BatchNormalization(momentum=momentum, name="conv1_bn")(features)
        pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(features))
        head = keras.layers.Dense(
            14, activation="sigmoid", kernel_initializer=draw(seed + 1), name="findings"
        )
        return keras.Model(grey, head(pooled), name=topology)

    patch.setattr("chexlib.models.weights.build_model", build)


class Places:
    """Stands for an `ImageStore` of so many images, and gives their places for their pixels."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def take(self, places):
        return np.asarray(places)
