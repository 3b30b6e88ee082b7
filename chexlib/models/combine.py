"""Several models as one: the same radiograph to all of them, one probability out of theirs."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from chexlib.errors import ConfigError

WAYS = ("probability", "logit", "rank")
MEMBER = "member_"  # a model in a model of models is called so, and numbered
QUANTILES = 101  # of the reference scores, between which ranks are interpolated


@keras.saving.register_keras_serializable("chexlib")
class Combine(keras.layers.Layer):
    """(batch, members, findings) probabilities to (batch, findings): their mean, that of their
    logits, or of ranks.

    A rank is the share of reference images, such as those of validation, with a lower score of this
    member: it has no scale of its own, so a member that is surer than the others weighs no more
    than they.
    """

    def __init__(self, how: str = "probability", **settings):
        super().__init__(**settings)
        if how not in WAYS:
            raise ConfigError(f"how={how!r} is not known. Use one of {', '.join(WAYS)}.")
        self.how = how

    def build(self, shape):
        if self.how == "rank":
            self.table = self.add_weight(
                shape=(QUANTILES, *shape[1:]), trainable=False, name="quantiles"
            )

    def call(self, scores):
        if self.how == "logit":
            scores = ops.clip(scores, 1e-7, 1 - 1e-7)
            return ops.sigmoid(ops.mean(ops.log(scores) - ops.log(1 - scores), axis=1))
        if self.how == "rank":
            low, high = self.table[:-1], self.table[1:]
            steps = ops.clip((scores[:, None] - low) / ops.maximum(high - low, 1e-9), 0, 1)
            scores = ops.mean(steps, axis=1)
        return ops.mean(scores, axis=1)

    def get_config(self):
        return {**super().get_config(), "how": self.how}


def quantiles(reference: np.ndarray) -> np.ndarray:
    """The table of ranks, (QUANTILES, members, findings), from (members, n, findings) scores of
    reference images.
    """
    return np.quantile(reference, np.linspace(0, 1, QUANTILES), axis=1)


def combine(
    scores: np.ndarray, *, how: str = "probability", reference: np.ndarray | None = None
) -> np.ndarray:
    """One set of scores from those of several members.

    Parameters
    ----------
    scores : (members, n, findings) probabilities
    how : {"probability", "logit", "rank"}
    reference : (members, m, findings), optional
        The scores among which ranks are counted; `scores` themselves without.

    Returns
    -------
    (n, findings) float32
    """
    scores = np.asarray(scores, np.float32)
    layer = Combine(how)
    layer.build((None, len(scores), scores.shape[-1]))
    if how == "rank":
        layer.table.assign(quantiles(scores if reference is None else reference))
    return np.asarray(layer(scores.transpose(1, 0, 2)))


def combine_models(
    models: list, *, how: str = "probability", reference: np.ndarray | None = None
) -> keras.Model:
    """A model of models: pixels (batch, size, size, 1) to the (batch, findings) that `combine`
    makes of their scores.

    Raises
    ------
    ConfigError
        No models, models of different sizes, or ranks without a reference.
    """
    if len({model.input_shape for model in models}) != 1:
        raise ConfigError(
            f"{len(models)} models of sizes {sorted({m.input_shape[1] for m in models})} are no "
            "ensemble."
        )
    if how == "rank" and reference is None:
        raise ConfigError(
            'how="rank" needs reference scores. Give those of validation, (members, images, '
            "findings)."
        )
    pixels = keras.Input(models[0].input_shape[1:], name="radiograph")
    members = [
        keras.Model(m.inputs[0], m.outputs[0], name=f"{MEMBER}{i}") for i, m in enumerate(models)
    ]
    layer = Combine(how, dtype="float32", name="combine")
    together = keras.Model(
        pixels, layer(ops.stack([member(pixels) for member in members], axis=1)), name="ensemble"
    )
    if how == "rank":
        layer.table.assign(quantiles(reference))
    return together
