"""Three topologies with one contract, batch norm that is Keras' own but faster, weights that fit or
are refused.
"""

import json
import os
import random
import re
import subprocess
import sys
import zipfile
import zlib

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from chexlib.data.cache import resize_area
from chexlib.data.nih import read_image
from chexlib.errors import ConfigError, DataError, WeightsError
from chexlib.findings import FINDINGS
from chexlib.models.layers import FusedBatchNormalization
from chexlib.models.predict import newest_weights, predict
from chexlib.models.statistics import norm_layers
from chexlib.models.topologies import build_model
from chexlib.models.weights import CARD, create_model, load_model, save_model

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1)).astype(np.float32)
PREPROCESS = {
    "densenet121": keras.applications.densenet.preprocess_input,
    "resnet50": keras.applications.resnet.preprocess_input,
    "vgg16": keras.applications.vgg16.preprocess_input,
}
TOPOLOGIES = tuple(PREPROCESS)  # of the study; VGG-16 with batch norm has tests of its own


@pytest.fixture(scope="module")
def models():
    """A function that builds a topology at 32 pixels once: building DenseNet takes seconds."""
    made = {}

    def get(topology):
        if topology not in made:
            made[topology] = build_model(topology, size=32, seed=1)
        return made[topology]

    return get


def norms(model):
    """All batch-norm layers, also of nested models."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def weights_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


# --- topologies


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_model_gives_14_probabilities_for_each_grey_radiograph(models, topology):
    model = models(topology)
    assert model.input_shape == (None, 32, 32, 1)
    for pixels in (
        PIXELS,
        np.zeros((2, 32, 32, 1), np.float32),
        np.full((1, 32, 32, 1), 255, np.float32),
    ):
        scores = model(pixels, training=False).numpy()
        assert scores.shape == (len(pixels), 14)
        assert scores.dtype == np.float32
        assert ((scores >= 0) & (scores <= 1)).all()
    scores = model(PIXELS, training=False).numpy()
    assert np.ptp(scores, axis=0).min() > 0  # every output depends on the pixels
    assert np.ptp(scores, axis=1).min() > 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_normalisation_is_the_one_of_keras_applications(models, topology):
    model = models(topology)
    normalised = keras.Model(model.input, model.get_layer("imagenet_normalization").output)
    pixels = np.arange(256, dtype=np.float32).repeat(4).reshape(1, 32, 32, 1)
    expected = PREPROCESS[topology](np.repeat(pixels, 3, axis=-1).copy())
    np.testing.assert_allclose(normalised(pixels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_backbone_is_fed_with_normalised_pixels_and_its_features_are_pooled(models, topology):
    model = models(topology)
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    normalised = PREPROCESS[topology](np.repeat(PIXELS, 3, axis=-1).copy())
    features = backbone(normalised, training=False).numpy().mean((1, 2))
    kernel, bias = model.get_layer("findings").get_weights()
    expected = 1 / (1 + np.exp(-(features.astype(np.float64) @ kernel + bias)))
    np.testing.assert_allclose(model(PIXELS, training=False), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("topology", "count"), [("densenet121", 121), ("resnet50", 53), ("vgg16", 0)]
)
def test_all_batch_norm_layers_are_there_and_fused(models, topology, count):
    layers = norms(models(topology))
    assert len(layers) == len(norm_layers(models(topology))) == count
    assert {type(layer) for layer in layers} <= {FusedBatchNormalization}


@pytest.mark.parametrize(
    ("topology", "millions"), [("densenet121", 7.05), ("resnet50", 23.6), ("vgg16", 14.7)]
)
def test_parameters_are_those_of_the_published_networks(models, topology, millions):
    assert models(topology).count_params() / 1e6 == pytest.approx(millions, abs=0.06)


def test_seed_decides_every_weight_that_is_drawn(models):
    first, again, other = (
        models("vgg16"),
        build_model("vgg16", size=32, seed=1),
        build_model("vgg16", size=32, seed=2),
    )
    assert weights_equal(first, again)
    for name, a, b in zip(
        (w.path for w in first.weights), first.get_weights(), other.get_weights(), strict=True
    ):
        assert np.array_equal(a, b) == ("bias" in name), name


def test_layers_of_one_shape_start_with_different_weights(models):
    kernels = [w.numpy() for w in models("resnet50").weights if w.path.endswith("kernel")]
    for i, a in enumerate(kernels):
        assert not any(a.shape == b.shape and np.array_equal(a, b) for b in kernels[:i])


def test_building_touches_no_global_generator():
    tf.random.set_seed(5)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002  the global one is meant
    drawn = tf.random.uniform([4]).numpy()
    tf.random.set_seed(5)
    build_model("vgg16", size=32, seed=3)
    assert np.array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002
    assert np.array_equal(tf.random.uniform([4]).numpy(), drawn)
    assert random.getstate() == python


def test_another_input_size_has_the_same_weights(models):
    assert weights_equal(models("vgg16"), build_model("vgg16", size=48, seed=1))


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_and_probabilities_in_float32(models):
    model = build_model("vgg16", size=32, precision="mixed_bfloat16", seed=1)
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    assert backbone(PIXELS.repeat(3, -1)).dtype == tf.bfloat16
    assert {w.dtype for w in model.weights} == {"float32"}
    scores = model(PIXELS, training=False)
    assert scores.dtype == tf.float32
    np.testing.assert_allclose(scores, models("vgg16")(PIXELS, training=False), atol=0.05)


def test_batch_norm_momentum_is_as_asked(models):
    assert {layer.momentum for layer in norms(models("resnet50"))} == {0.9}


@pytest.mark.parametrize(
    ("settings", "named"), [({"topology": "alexnet"}, "alexnet"), ({"size": 31}, "31")]
)
@pytest.mark.parametrize("weights", [None, "imagenet"])
def test_an_impossible_model_is_refused_with_the_value(settings, named, weights):
    with pytest.raises(ConfigError, match=named):
        create_model(**{"topology": "vgg16", "size": 32, "weights": weights, **settings})


# --- small networks

# CRC-32 of all weights in their order, and of their names, of size=32 and seed=1 as chexlib 0.1
# built them.
VERSION_0_1 = {
    "densenet121": (378831982, 1353684931),
    "resnet50": (261973801, 4190800738),
    "vgg16": (2110973382, 1291771785),
}
COUNTS = {"densenet121": 121, "resnet50": 53, "vgg16": 0}


@pytest.fixture(scope="module")
def small_models():
    """A function that builds a topology of a quarter's width with the small stem once."""
    made = {}

    def get(topology):
        if topology not in made:
            made[topology] = build_model(topology, size=32, width=0.25, stem="small", seed=1)
        return made[topology]

    return get


def backbone_of(model):
    return next(layer for layer in model.layers if isinstance(layer, keras.Model))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_published_width_and_stem_give_the_weights_of_version_0_1_to_the_bit(models, topology):
    values = names = 0
    for variable in models(topology).weights:
        values = zlib.crc32(np.ascontiguousarray(variable.numpy()).tobytes(), values)
        names = zlib.crc32(variable.path.encode(), names)
    assert (values, names) == VERSION_0_1[topology]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_quarter_network_has_the_same_layers_and_a_quarter_of_the_channels_in_each(
    models, small_models, topology
):
    whole, small = backbone_of(models(topology)), backbone_of(small_models(topology))
    named = [
        [layer.name for layer in network.layers if layer.weights] for network in (small, whole)
    ]
    assert named[0] == named[1]
    assert [type(layer) for layer in small.layers] == [type(layer) for layer in whole.layers]
    assert len(norms(small)) == COUNTS[topology]
    for ours, theirs in zip(small.layers, whole.layers, strict=True):
        if ours.weights:  # not the input, nor the padding of three colours
            assert 4 * ours.output.shape[-1] == theirs.output.shape[-1], ours.name
    share = small_models(topology).count_params() / models(topology).count_params()
    assert share == pytest.approx(1 / 16, rel=0.09)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_small_stem_keeps_maps_of_2_by_2_where_the_last_convolution_works(
    small_models, topology
):
    convolutions = [
        layer
        for layer in backbone_of(small_models(topology)).layers
        if hasattr(layer, "kernel_size")
    ]
    assert convolutions[0].output.shape[1:3] == (32, 32)
    assert convolutions[-1].output.shape[1:3] == (2, 2)
    assert small_models(topology).input_shape == (None, 32, 32, 1)


def test_vgg16_bn_is_vgg16_with_batch_norm_between_each_convolution_and_its_relu(small_models):
    """As torchvision's vgg16_bn, whose layers are Conv2d, BatchNorm2d, ReLU, thirteen times."""
    plain, normalised = small_models("vgg16"), small_models("vgg16_bn")
    layers = [layer for layer in backbone_of(normalised).layers if hasattr(layer, "activation")]
    convolutions = [layer for layer in layers if hasattr(layer, "kernel_size")]
    assert len(convolutions) == len(norms(normalised)) == 13
    assert {layer.activation.__name__ for layer in convolutions} == {"linear"}
    kernels = [layer.kernel for layer in backbone_of(plain).layers if hasattr(layer, "kernel_size")]
    for layer, kernel in zip(convolutions, kernels, strict=True):
        np.testing.assert_array_equal(layer.kernel, kernel)
        assert layer.bias is not None
    names = [layer.name for layer in backbone_of(normalised).layers]
    first = names.index("block1_conv1")
    assert names[first : first + 3] == ["block1_conv1", "block1_conv1_bn", "block1_conv1_relu"]
    # With statistics of mean 0 and variance 1 it computes what VGG-16 does, but for the epsilon.
    np.testing.assert_allclose(normalised(PIXELS), plain(PIXELS), atol=0.01)


def test_vgg16_bn_is_saved_and_loaded(small_models, tmp_path):
    model = small_models("vgg16_bn")
    card = {"topology": "vgg16_bn", "width": 0.25, "stem": "small", "size": 32}
    save_model(model, tmp_path / "model.keras", card=card)
    loaded, read = load_model(tmp_path / "model.keras")
    assert read["topology"] == "vgg16_bn" and weights_equal(loaded, model)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_the_layers_is_group_norm_spread_evenly(share):
    model = build_model(
        "densenet121", size=32, width=0.25, stem="small", blocks=1, group_share=share
    )
    kinds = [
        type(layer)
        for layer in backbone_of(model).layers
        if isinstance(layer, keras.layers.GroupNormalization | keras.layers.BatchNormalization)
    ]
    by_group = np.array([kind is keras.layers.GroupNormalization for kind in kinds])
    assert 0 < by_group.sum() < len(by_group)
    whole = build_model("densenet121", size=32, width=0.25, stem="small", group_share=share)
    grouped = sum(
        isinstance(layer, keras.layers.GroupNormalization) for layer in whole._flatten_layers()
    )
    assert grouped == int(121 * share)


@pytest.mark.parametrize("settings", [{"group_share": 1.5}, {"group_share": 0.5, "norm": "none"}])
def test_a_share_that_is_none_or_that_has_no_batch_norm_to_share_with_is_refused(settings):
    with pytest.raises(ConfigError, match="group_share"):
        build_model("densenet121", size=32, **settings)


def test_keras_has_no_imagenet_weights_for_a_network_that_it_does_not_have():
    for topology, share in (("vgg16_bn", 0.0), ("densenet121", 0.5)):
        with pytest.raises(WeightsError, match="ImageNet weights"):
            build_model(topology, imagenet=True, group_share=share)


def test_each_residual_branch_of_a_small_resnet_starts_as_nothing(models, small_models):
    last = [layer for layer in norms(small_models("resnet50")) if layer.name.endswith("_3_bn")]
    assert len(last) == 16 and not any(layer.gamma.numpy().any() for layer in last)
    others = [layer for layer in norms(small_models("resnet50")) if layer not in last]
    assert all((layer.gamma.numpy() == 1).all() for layer in [*others, *norms(models("resnet50"))])
    assert all((layer.gamma.numpy() == 1).all() for layer in norms(small_models("densenet121")))


def test_a_small_network_with_group_norm_has_groups_of_as_many_channels():
    def sizes(**settings):
        model = build_model("resnet50", size=32, norm="group", **settings)
        layers = [
            layer
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.GroupNormalization)
        ]
        assert (
            not any(layer.gamma.numpy().any() for layer in layers if layer.name.endswith("_3_bn"))
            or not settings
        )
        return [layer.gamma.shape[0] // layer.groups for layer in layers]

    assert sizes(width=0.25, stem="small") == sizes()


# The stem, so many norms per block, one or no norm at the end of each stage, and one more.
@pytest.mark.parametrize(
    ("topology", "blocks", "norms_left"),
    [
        ("resnet50", 1, 1 + 4 * 4),
        ("resnet50", 2, 1 + 4 * 7),
        ("densenet121", 2, 1 + 4 * 2 * 2 + 3 + 1),
    ],
)
def test_blocks_left_out_leave_the_weights_of_the_others_as_they_are(
    small_models, topology, blocks, norms_left
):
    short = build_model(topology, size=32, width=0.25, stem="small", blocks=blocks, seed=1)
    assert len(norms(short)) == norms_left
    whole = {v.path: v.numpy() for v in small_models(topology).weights}
    for (
        v
    ) in short.weights:  # those of DenseNet's transitions and of what follows have fewer channels
        if v.shape == whole[v.path].shape:
            np.testing.assert_array_equal(v.numpy(), whole[v.path])
    assert all(
        int(place[1]) <= blocks
        for v in short.weights
        if (place := re.search(r"_block(\d+)_", v.path))
    )
    assert short(np.zeros((2, 32, 32, 1))).shape == (2, 14)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"width": 0.3}, "0.3"), ({"stem": "tiny"}, "tiny"), ({"blocks": -1}, "-1")],
)
def test_another_width_stem_or_number_of_blocks_is_refused_with_the_value(settings, named):
    with pytest.raises(ConfigError, match=named):
        build_model("vgg16", size=32, **settings)


@pytest.mark.parametrize("settings", [{"width": 0.25}, {"stem": "small"}, {"blocks": 1}])
def test_imagenet_weights_are_for_the_published_networks_only(settings):
    with pytest.raises(WeightsError, match="published network"):
        create_model("resnet50", size=32, weights="imagenet", **settings)


def test_weights_load_into_the_width_and_stem_that_their_card_names(small_models, tmp_path):
    network = {"topology": "vgg16", "size": 32, "width": 0.25, "stem": "small"}
    path = save_model(small_models("vgg16"), tmp_path / "model.keras", card=network)
    loaded, card = load_model(path)
    assert card["width"] == 0.25 and card["stem"] == "small"
    assert weights_equal(loaded, small_models("vgg16"))
    assert weights_equal(create_model(**network, weights=str(path), seed=9), small_models("vgg16"))
    for changes, named in (
        ({"width": 1.0}, r"width=0\.25, not 1\.0"),
        ({"stem": "full"}, "stem='small', not 'full'"),
    ):
        with pytest.raises(WeightsError, match=named):
            create_model(**{**network, **changes}, weights=str(path))


# --- ImageNet weights


def offline(*args, **kwargs):
    raise Exception(
        "URL fetch failure on https://storage.googleapis.com/vgg16.h5: None -- [Errno "
        "-2]\nmore\nlines"
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_a_network_imagenet_weights_are_an_error_that_says_what_to_do(
    monkeypatch, topology
):
    name = {"densenet121": "DenseNet121", "resnet50": "ResNet50", "vgg16": "VGG16"}[topology]
    monkeypatch.setattr(keras.applications, name, offline)
    with pytest.raises(WeightsError) as error:
        create_model(topology, size=32, weights="imagenet")
    text = str(error.value)
    assert "\n" not in text
    for word in (topology, "URL fetch failure", "random weights", "~/.keras/models"):
        assert word in text


def test_keras_own_download_path_is_taken_and_its_failure_told(monkeypatch):
    asked = []

    def get_file(name, origin=None, **kwargs):
        asked.append(origin)
        offline()

    module = sys.modules[keras.applications.VGG16.__module__]
    monkeypatch.setattr(module.file_utils, "get_file", get_file)
    with pytest.raises(WeightsError, match="URL fetch failure"):
        create_model("vgg16", size=32, weights="imagenet")
    assert asked[0].startswith(
        "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"
    )


def test_imagenet_weights_reach_every_layer_and_give_the_stock_networks_features(monkeypatch):
    """A small network in place of the download, with batch norm whose statistics are not the
    initial ones.
    """
    made = []

    def stock(include_top, weights, input_shape):
        assert (include_top, weights) == (False, "imagenet")
        inputs = keras.Input(input_shape)
        x = keras.layers.Conv2D(6, 3, strides=2, name="c1")(inputs)
        x = keras.layers.BatchNormalization(epsilon=1.001e-5, name="n1")(x)
        x = keras.layers.Add(name="add")([keras.layers.ReLU(name="r")(x), x])
        network = keras.Model(inputs, keras.layers.Conv2D(5, 3, name="c2")(x))
        rng = np.random.default_rng(0)
        network.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in network.get_weights()])
        made.append(network)
        return network

    monkeypatch.setattr(keras.applications, "ResNet50", stock)
    model = create_model("resnet50", size=32, weights="imagenet")
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    rgb = np.repeat(PIXELS, 3, -1)
    assert len(norms(model)) == 1
    assert type(norms(model)[0]) is FusedBatchNormalization
    np.testing.assert_allclose(
        backbone(rgb, training=False), made[0](rgb, training=False), rtol=1e-4
    )


# --- fused batch norm


def norm_pair(shape=(None, 4, 4, 5), **settings):
    """The same layer twice: ours, and Keras'; weights and statistics away from their initial
    values.
    """
    pair = [kind(**settings) for kind in (FusedBatchNormalization, keras.layers.BatchNormalization)]
    rng = np.random.default_rng(3)
    for layer in pair:
        layer.build(shape)
    values = [rng.uniform(0.5, 1.5, w.shape).astype(np.float32) for w in pair[0].weights]
    for layer in pair:
        layer.set_weights(values)
    return pair


def images(channels=5, shape=(4, 6, 3), seed=0):
    return np.random.default_rng(seed).normal(2, 3, (*shape, channels)).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": False},
        {"center": False},
        {"momentum": 0.5, "epsilon": 1e-2},
        {"axis": 3},
        {"axis": 1},
    ],
)
@pytest.mark.parametrize("training", [True, False, None])
def test_fused_batch_norm_gives_keras_outputs_gradients_and_statistics(settings, training):
    x, found = images(), []
    for layer in norm_pair(x.shape, **settings):
        weigh = tf.constant(images(seed=1, shape=x.shape[:3]))
        inputs = tf.Variable(x)
        with tf.GradientTape() as tape:
            outputs = layer(inputs, training=training)
            loss = tf.reduce_sum(weigh * outputs**2)
        gradients = tape.gradient(loss, [inputs, *(v.value for v in layer.trainable_variables)])
        found.append([outputs, *gradients, *layer.get_weights()])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        scale = max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def test_fused_batch_norm_moves_its_statistics_in_training_alone_and_inside_a_compiled_function():
    ours, theirs = norm_pair(momentum=0.9)
    before = ours.get_weights()
    ours(images(), training=False)
    assert all(np.array_equal(a, b) for a, b in zip(before, ours.get_weights(), strict=True))
    for layer in (ours, theirs):
        step = tf.function(lambda x, layer=layer: layer(x, training=True))
        for i in range(5):
            step(images(seed=i))
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.allclose(before[2], ours.get_weights()[2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_fused_batch_norm_agrees_on_very_few_pixels(shape):
    x = images(shape=shape)
    ours, theirs = ((layer(x, training=True), *layer.get_weights()) for layer in norm_pair())
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_frozen_fused_batch_norm_uses_and_keeps_its_moving_statistics():
    ours, theirs = norm_pair()
    ours.trainable = theirs.trainable = False
    before = ours.get_weights()
    np.testing.assert_allclose(
        ours(images(), training=True), theirs(images(), training=True), atol=1e-5
    )
    np.testing.assert_allclose(
        ours(images(), training=True), ours(images(), training=False), atol=1e-6
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, ours.get_weights(), strict=True))


@pytest.mark.parametrize("shape", [(8,), (4, 3), (2, 3, 4, 2)])
def test_inputs_that_are_no_images_are_normalised_as_by_keras(shape):
    x = images(shape=shape)
    ours, theirs = ((layer(x, training=True), *layer.get_weights()) for layer in norm_pair(x.shape))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_float64_images_are_normalised_as_by_keras():
    ours, theirs = (
        layer(images().astype(np.float64), training=True) for layer in norm_pair(dtype="float64")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_images_are_normalised_with_float32_statistics():
    ours, _ = norm_pair(dtype="mixed_bfloat16", momentum=0.5)
    _, theirs = norm_pair(momentum=0.5)
    x = tf.cast(images(shape=(16, 8, 8)), tf.bfloat16)
    for training in (True, False):
        outputs = ours(x, training=training)
        assert outputs.dtype == tf.bfloat16
        expected = theirs(tf.cast(x, tf.float32), training=training)
        np.testing.assert_allclose(tf.cast(outputs, tf.float32), expected, rtol=0.01, atol=0.03)
    assert {w.dtype for w in ours.weights} == {"float32"}
    # Sums in bfloat16 would be off by a hundredth.
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_weights_and_configuration_move_between_fused_and_stock_batch_norm():
    ours, theirs = norm_pair(momentum=0.7, epsilon=1e-2, name="n")
    assert ours.get_config() == theirs.get_config()
    assert [w.path for w in ours.weights] == [w.path for w in theirs.weights]
    for source, kind in (
        (ours, keras.layers.BatchNormalization),
        (theirs, FusedBatchNormalization),
    ):
        copy = kind.from_config(source.get_config())
        copy.build((None, 4, 4, 5))
        copy.set_weights(source.get_weights())
        np.testing.assert_allclose(
            copy(images(), training=False), source(images(), training=False), atol=1e-5
        )


# --- weights in files


RESNET_CARD = {"topology": "resnet50", "size": 32, "split": {"images": {"train": 3}}}


@pytest.fixture(scope="module")
def resnet_file(models, tmp_path_factory):
    return save_model(
        models("resnet50"), tmp_path_factory.mktemp("resnet") / "model.keras", card=RESNET_CARD
    )


def test_a_saved_model_gives_the_same_scores_and_card(models, resnet_file):
    loaded, card = load_model(resnet_file)
    assert card == {**RESNET_CARD, "findings": list(FINDINGS)}
    assert {type(layer) for layer in norms(loaded)} == {FusedBatchNormalization}
    np.testing.assert_allclose(
        loaded(PIXELS, training=False), models("resnet50")(PIXELS, training=False), atol=1e-6
    )
    assert os.listdir(resnet_file.parent) == ["model.keras"]


def test_a_save_that_fails_leaves_the_old_file_and_no_other(models, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save_model(models("vgg16"), path, card={"impossible": object()})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.keras"]


def test_weights_of_a_model_file_fill_a_model_of_another_input_size(vgg_file):
    network = {"topology": "vgg16", "width": 0.25, "stem": "small"}
    model = create_model(**network, size=64, weights=str(vgg_file), seed=7)
    assert model.input_shape == (None, 64, 64, 1)
    assert weights_equal(model, build_model(**network, size=32, seed=1))


def small(findings=14):
    inputs = keras.Input((32, 32, 1))
    return keras.Model(inputs, keras.layers.Dense(findings)(keras.layers.Flatten()(inputs)))


def refused(tmp_path, kind):
    path = tmp_path / f"{kind}.keras"
    if kind == "text":
        path.write_text("not a model")
    elif kind == "empty":
        path.touch()
    elif kind == "stock":
        small().save(path)
    elif kind == "other findings":
        save_model(
            small(), path, card={"topology": "vgg16", "size": 32, "findings": ["Mass", "Hernia"]}
        )
    elif kind in ("card without findings", "card that is a list", "card that is no JSON"):
        small().save(path)
        text = {
            "card without findings": '{"size": 32}',
            "card that is a list": "[]",
            "card that is no JSON": "{",
        }[kind]
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(CARD, text)
    elif kind == "card alone":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(CARD, json.dumps({"findings": list(FINDINGS), "size": 32}))
    elif kind == "folder":
        path.mkdir()
    elif kind == "code":
        inputs = keras.Input((32, 32, 1))
        save_model(
            keras.Model(inputs, keras.layers.Lambda(lambda x: x + 1)(inputs)),
            path,
            card={"size": 32},
        )
    elif kind == "cut":
        save_model(small(), path, card={"size": 32})
        path.write_bytes(path.read_bytes()[:-200])
    return path  # "missing" is not made


KINDS = (
    "text",
    "empty",
    "stock",
    "other findings",
    "card without findings",
    "card that is a list",
    "folder",
)
KINDS = (*KINDS, "card that is no JSON", "card alone", "code", "cut", "missing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_model_of_ours_is_refused_by_name(tmp_path, kind):
    path = refused(tmp_path, kind)
    with pytest.raises(WeightsError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_topology_are_refused_naming_both(resnet_file):
    with pytest.raises(WeightsError, match="vgg16") as error:
        create_model("vgg16", size=32, weights=str(resnet_file))
    assert "resnet50" in str(error.value)
    assert str(resnet_file) in str(error.value)


@pytest.mark.parametrize("card", [{"topology": "vgg16", "size": 32}, {"size": 32}])
def test_weights_that_do_not_fit_every_layer_are_refused_whatever_their_card_says(tmp_path, card):
    path = save_model(small(), tmp_path / "model.keras", card=card)
    with pytest.raises(WeightsError, match="do not fit vgg16") as error:
        create_model("vgg16", size=32, weights=str(path))
    assert str(path) in str(error.value)


def test_bare_weights_fill_every_layer(models, tmp_path):
    path = tmp_path / "all.weights.h5"
    models("vgg16").save_weights(path)
    assert weights_equal(create_model("vgg16", size=32, weights=str(path), seed=9), models("vgg16"))


@pytest.mark.parametrize("kind", ["of another network", "text", "missing"])
def test_bare_weights_that_do_not_fit_are_refused(tmp_path, kind):
    path = tmp_path / f"{kind}.weights.h5"
    if kind == "text":
        path.write_text("no HDF5")
    elif kind != "missing":
        small().save_weights(path)
    with pytest.raises(WeightsError) as error:
        create_model("vgg16", size=32, weights=str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert kind == "missing" or "vgg16" in str(error.value)


# --- predictions


@pytest.fixture
def radiographs(tmp_path):
    """Five images: grey of two sizes, oblong, RGB, 16-bit."""
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 256, shape, np.uint8)
        for shape in ((32, 32), (64, 64), (50, 70), (40, 40, 3))
    ]
    pictures.append(rng.integers(0, 65536, (33, 33), np.uint16))
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def test_predictions_are_the_models_probabilities_image_by_image(radiographs, vgg_file):
    model, _ = load_model(vgg_file)
    table = predict(radiographs, weights=vgg_file, batch=2)
    assert table.index.tolist() == [str(path) for path in radiographs]
    assert table.columns.tolist() == list(FINDINGS)
    for path in radiographs:
        pixels = resize_area(read_image(path), 32)[None, ..., None].astype(np.float32)
        np.testing.assert_allclose(
            table.loc[str(path)], model(pixels, training=False)[0], atol=1e-5
        )
    turned = predict([str(path) for path in reversed(radiographs)], weights=str(vgg_file))
    pd.testing.assert_frame_equal(turned, table.iloc[::-1], atol=1e-5)


@pytest.mark.parametrize("bad", ["missing.png", "text.png"])
def test_an_image_that_cannot_be_read_is_named_before_tensorflow_is_needed(
    radiographs, vgg_file, tmp_path, bad
):
    (tmp_path / "text.png").write_text("no image")
    code = f"""
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = None
from chexlib.errors import DataError
from chexlib.models.predict import predict
try:
    predict([{str(radiographs[0])!r}, {str(tmp_path / bad)!r}], weights={str(vgg_file)!r})
except DataError as error:
    print(error)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert str(tmp_path / bad) in answer.stdout, answer.stderr


def test_broken_images_and_weights_are_errors_of_ours(radiographs, tmp_path):
    with pytest.raises(DataError, match=r"none\.png"):
        predict([tmp_path / "none.png"], weights="w.keras")
    with pytest.raises(WeightsError, match=r"w\.keras"):
        predict(radiographs, weights="w.keras")


def test_the_weights_written_last_are_the_newest(tmp_path):
    for i, name in enumerate(
        ("20250101-000000/03_train", "20240101-000000/04_train", "20260101-000000/05_train")
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.keras").touch()
        os.utime(tmp_path / name / "model.keras", (1000 + (i % 2), 1000 + (i % 2)))
    (tmp_path / "latest").symlink_to("20260101-000000")
    assert newest_weights(tmp_path) == tmp_path / "20240101-000000" / "04_train" / "model.keras"


@pytest.mark.parametrize("made", [False, True])
def test_no_weights_at_all_are_an_error_with_the_next_step(tmp_path, made):
    folder = tmp_path / "runs"
    if made:
        (folder / "20250101-000000" / "00_start_here").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"make run.*--weights"):
        newest_weights(folder)
