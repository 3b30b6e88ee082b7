"""What normalises in training: the layers against references, and models whose norm is another than
batch norm.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from chexlib.collectives import World
from chexlib.errors import ConfigError, WeightsError
from chexlib.models.layers import FusedBatchNormalization
from chexlib.models.statistics import (
    kept_statistics,
    norm_layers,
    population_statistics,
    recalibrate,
)
from chexlib.models.topologies import build_model, redraw
from chexlib.models.weights import create_model, load_model, save_model

QUARTER = {
    "topology": "resnet50",
    "size": 32,
    "width": 0.25,
}  # a norm does not depend on the channels' number


@pytest.fixture(scope="module")
def models():
    """A function that builds a quarter ResNet-50 of 32 pixels with a norm, once."""
    made = {}

    def get(norm):
        if norm not in made:
            made[norm] = build_model(
                **QUARTER, norm=norm, ghost_size=4 if norm == "ghost" else 0, seed=1
            )
        return made[norm]

    return get


def images(n=10, channels=5, seed=0):
    return np.random.default_rng(seed).normal(2, 3, (n, 4, 3, channels)).astype(np.float32)


def a_layer(channels=5, **settings):
    layer = FusedBatchNormalization(momentum=0.8, **settings)
    layer.build((None, 4, 3, channels))
    rng = np.random.default_rng(3)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(np.float32) for w in layer.weights])
    return layer


def outcome(layer, x, weigh):
    inputs = tf.Variable(x)
    with tf.GradientTape() as tape:
        outputs = layer(inputs, training=True)
        loss = tf.reduce_sum(weigh * outputs**2)
    return [
        outputs.numpy(),
        *(g.numpy() for g in tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])),
    ]


@pytest.mark.parametrize(
    ("n", "size", "parts"), [(8, 4, [4, 4]), (10, 4, [4, 3, 3]), (3, 4, [3]), (5, 2, [2, 2, 1])]
)
def test_ghost_norm_is_batch_norm_of_each_part_by_itself(n, size, parts):
    """In float64 by Keras, which is given each part alone; moving statistics are the mean over the
    parts'.
    """
    x, weigh = images(n), images(n, seed=1)
    ghost, alone, start = a_layer(statistics="ghost", ghost_size=size), [], np.cumsum([0, *parts])
    for first, last in itertools.pairwise(start):
        layer = keras.layers.BatchNormalization(momentum=0.8, dtype="float64")
        layer.build(x.shape)
        layer.set_weights([w.astype(float) for w in a_layer().get_weights()])
        found = outcome(layer, x[first:last].astype(float), weigh[first:last].astype(float))
        alone.append((found, layer.get_weights()))
    found = outcome(ghost, x, weigh)
    for i, join in enumerate((np.concatenate, np.concatenate, sum, sum)):
        np.testing.assert_allclose(
            found[i], join([part[i] for part, _ in alone]), rtol=1e-4, atol=2e-4
        )
    for i in (2, 3):
        expected = np.mean([weights[i] for _, weights in alone], axis=0)
        np.testing.assert_allclose(ghost.get_weights()[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_sync_norm_on_one_rank_is_batch_norm(dtype):
    x, weigh = images(), images(seed=1)
    found = [outcome(a_layer(statistics=kind, dtype=dtype), x, weigh) for kind in ("sync", "batch")]
    tolerance = 2e-4 if dtype == "float32" else 0.2
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_mean_far_from_0_loses_no_digits():
    """A variance of 1 beside a mean of 1,000: squares summed in float32 would keep one digit of it."""
    x = images() + 1000
    layer = a_layer(statistics="ghost", ghost_size=10)
    outputs = layer(x, training=True).numpy()
    gamma, beta = (v.numpy() for v in (layer.gamma, layer.beta))
    deviation = np.sqrt(x.astype(float).var((0, 1, 2)) + layer.epsilon)
    expected = (x - x.mean((0, 1, 2), dtype=float)) / deviation * gamma + beta
    np.testing.assert_allclose(outputs, expected, atol=2e-3)


def test_frozen_norm_keeps_its_statistics_and_trains_scale_and_offset():
    layer, x = a_layer(statistics="frozen"), images()
    before = layer.get_weights()
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))
    assert len(layer.trainable_variables) == 2


def test_a_layer_keeps_its_statistics_when_it_is_saved():
    layer = FusedBatchNormalization.from_config(
        a_layer(statistics="ghost", ghost_size=3).get_config()
    )
    assert (layer.statistics, layer.ghost_size) == ("ghost", 3)
    with pytest.raises(ValueError, match="ghost_size=0"):
        FusedBatchNormalization(statistics="ghost")


@pytest.mark.parametrize("norm", ["group", "none", "frozen", "sync", "ghost"])
def test_every_norm_gives_probabilities_and_gradients_for_all_weights(models, norm):
    model = models(norm)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 1)).astype(np.float32)
    with tf.GradientTape() as tape:
        scores = model(pixels, training=True)
        loss = tf.reduce_mean(scores[:, ::2])
    assert (
        scores.shape == (6, 14)
        and np.isfinite(scores).all()
        and np.std(scores, axis=0).max() > 1e-4
    )
    assert all(
        g is not None and np.isfinite(g).all()
        for g in tape.gradient(loss, model.trainable_variables)
    )
    kinds = [type(layer).__name__ for layer in model._flatten_layers()]
    assert kinds.count("GroupNormalization") == (53 if norm == "group" else 0)
    assert len(norm_layers(model)) == (0 if norm in ("group", "none") else 53)
    if norm == "none":
        assert all(
            layer.use_bias
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.Conv2D)
        )


def test_batch_norm_weights_fill_the_norms_that_have_statistics_and_no_other(models, tmp_path):
    source = models("ghost")
    card = {**QUARTER, "config": {"norm": "ghost", "ghost_size": 4}}
    whole, bare = save_model(source, tmp_path / "m.keras", card=card), tmp_path / "m.weights.h5"
    source.save_weights(bare)
    for path in (whole, bare):
        filled = create_model(**QUARTER, norm="frozen", weights=str(path), seed=5)
        for a, b in zip(filled.get_weights(), source.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(WeightsError, match="do not fit resnet50"):
            create_model(**QUARTER, norm="none" if path == bare else "group", weights=str(path))
    with pytest.raises(WeightsError, match="mean nothing with norm='group'"):
        create_model("resnet50", size=32, norm="group", weights="imagenet")
    with pytest.raises(ConfigError, match="norm='layer'"):
        build_model("resnet50", size=32, norm="layer")
    again, _ = load_model(whole)
    assert {(layer.statistics, layer.ghost_size) for layer in norm_layers(again)} == {("ghost", 4)}


def test_a_redrawn_model_is_a_new_one_of_that_seed(models):
    model = build_model(**QUARTER, norm="none", seed=7)
    redraw(model, 1)
    for a, b in zip(model.get_weights(), models("none").get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- population statistics


class Halves(World):
    """Two ranks in one process: what the other one gave is added."""

    def __init__(self, other):
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def allreduce(self, tensors):
        object.__setattr__(self, "gave", tensors)
        return [a + b for a, b in zip(tensors, self.other or tensors, strict=True)]


def one_norm_layer(kind, momentum=0.99):
    model = keras.Sequential([keras.Input((4, 3, 5)), kind(momentum=momentum)])
    model.layers[0].set_weights(a_layer().get_weights())
    return model


@pytest.mark.parametrize("kind", [FusedBatchNormalization, keras.layers.BatchNormalization])
def test_population_statistics_are_those_of_all_images_of_all_ranks(kind):
    x = np.concatenate([images(8), 3 * images(8, seed=1) - 2, images(8, seed=2)]).astype(np.float32)
    model = one_norm_layer(kind)
    before = model.get_weights()
    other = Halves(None)
    population_statistics(model, [x[16:]], other)
    (found,) = population_statistics(model, [x[:8], x[8:16]], Halves(other.gave))
    np.testing.assert_allclose(found.mean, x.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.variance, x.var((0, 1, 2)), rtol=1e-4)
    means = [part.mean((0, 1, 2)) for part in np.split(x, 3)]
    np.testing.assert_allclose(found.between, np.var(means, axis=0), rtol=1e-3, atol=1e-4)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert recalibrate(model, np.split(x, 3)) == 1
    np.testing.assert_allclose(model.get_weights()[3], x.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_population_statistics_of_virtual_batches_are_those_of_all_their_images():
    """The layer itself tells the mean over virtual batches, which says nothing of what differs
    between them.
    """
    x = np.concatenate([images(4), 3 * images(4, seed=1) - 2, images(5, seed=2)]).astype(np.float32)
    model = one_norm_layer(
        lambda momentum: FusedBatchNormalization(
            statistics="ghost", ghost_size=4, momentum=momentum
        )
    )
    (found,) = population_statistics(model, [x[:8], x[8:]])
    np.testing.assert_allclose(found.mean, x.mean((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.variance, x.var((0, 1, 2)), rtol=1e-4)


def test_without_images_there_is_nothing_to_recalibrate_from():
    model = one_norm_layer(FusedBatchNormalization)
    before = model.get_weights()
    with pytest.raises(ConfigError, match="no images"):
        recalibrate(model, [])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("n", "ranks", "batch"), [(65, 2, 64), (129, 2, 64), (33, 2, 16), (7, 3, 2), (1, 2, 8)]
)
def test_ranks_share_images_in_as_many_batches_each(n, ranks, batch):
    shares = [World(rank, ranks).batches(n, batch=batch) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate([np.concatenate(share) for share in shares])) == list(range(n))
    assert all(len(part) <= batch for share in shares for part in share)
    assert all(
        list(np.concatenate(share)) == list(range(rank, n, ranks))
        for rank, share in enumerate(shares)
    )


def test_statistics_are_put_back_after_an_error():
    model = one_norm_layer(FusedBatchNormalization)
    before = model.get_weights()
    with pytest.raises(ZeroDivisionError), kept_statistics(model):
        model(images(), training=True)
        raise ZeroDivisionError
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
