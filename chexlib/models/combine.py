"""Several models as one: the mean of their probabilities."""

from __future__ import annotations

import keras

from chexlib.errors import ConfigError

MEMBER = "member_"  # a model in a model of models is called so, and numbered


def combine_models(models: list) -> keras.Model:
    """Ensemble of models: the mean of their probabilities.

    Parameters
    ----------
    models : list of keras.Model
        Each from pixels (batch, size, size, 1) to probabilities (batch, findings), as the ensemble.

    Raises
    ------
    ConfigError
        No models, or models of different sizes.
    """
    if len({model.input_shape for model in models}) != 1:
        sizes = sorted({model.input_shape[1] for model in models})
        raise ConfigError(f"{len(models)} models of sizes {sizes} are no ensemble.")
    pixels = keras.Input(models[0].input_shape[1:], name="radiograph")
    members = [
        keras.Model(model.inputs[0], model.outputs[0], name=f"{MEMBER}{i}")
        for i, model in enumerate(models)
    ]
    mean = keras.layers.Average(dtype="float32", name="mean")
    return keras.Model(pixels, mean([member(pixels) for member in members]), name="ensemble")
