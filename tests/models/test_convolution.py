"""The convolution whose gradients are matrix products, against Keras' own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from chexlib.models import layers


@pytest.mark.parametrize("side, inputs, outputs", [(1, 5, 3), (3, 4, 6), (5, 2, 3), (7, 3, 2)])
@pytest.mark.parametrize("height, width", [(6, 9), (7, 7), (2, 3)])
def test_convolutions_have_keras_outputs_and_gradients_without_avx512(
    side, inputs, outputs, height, width, monkeypatch
):
    monkeypatch.setattr(layers, "processor_flags", lambda: frozenset({"avx2"}))
    rng = np.random.default_rng(side)
    images = rng.normal(size=(3, height, width, inputs)).astype("float32")
    upstream = rng.normal(size=(3, height, width, outputs)).astype("float32")
    ours, keras_own = [
        kind(outputs, side, padding="same", activation="relu")
        for kind in (layers.Conv2D, keras.layers.Conv2D)
    ]
    for layer in (ours, keras_own):
        layer.build(images.shape)
    keras_own.set_weights([rng.normal(size=w.shape) for w in keras_own.weights])
    ours.set_weights(keras_own.get_weights())
    found = []
    for layer in (ours, keras_own):
        pixels = tf.Variable(images)
        with tf.GradientTape() as tape:
            outcome = layer(pixels)
            loss = tf.reduce_sum(outcome * upstream)
        found.append(
            [outcome, *tape.gradient(loss, [pixels, *[w.value for w in layer.trainable_weights]])]
        )
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("side", [1, 3])
def test_channels_first_is_convolved_along_rows_and_columns(side, monkeypatch):
    """Also where an image is as wide as it has channels."""
    monkeypatch.setattr(layers, "processor_flags", lambda: frozenset({"avx2"}))
    rng = np.random.default_rng(side)
    images, kernel = rng.normal(size=(2, 4, 6, 4)), rng.normal(size=(side, side, 4, 3))
    layer = layers.Conv2D(3, side, padding="same", data_format="channels_first", use_bias=False)
    layer.build(images.shape)
    layer.kernel.assign(kernel)
    pad = side // 2
    padded = np.pad(images, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    expected = sum(
        np.einsum("nchw,co->nohw", padded[:, :, i : i + 6, j : j + 4], kernel[i, j])
        for i in range(side)
        for j in range(side)
    )
    np.testing.assert_allclose(layer(images.astype("float32")), expected, rtol=1e-4, atol=1e-4)


def test_products_take_the_place_of_onednns_kernel_where_it_is_slow_and_only_there(monkeypatch):
    def operations(flags, size=8, **settings):
        monkeypatch.setattr(layers, "processor_flags", lambda: frozenset(flags))
        layer = layers.Conv2D(4, **{"kernel_size": 3, "padding": "same", **settings})
        layer.build((2, size, size, 3))

        @tf.function
        def gradient(images):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(images))
            return tape.gradient(loss, layer.kernel.value)

        graph = gradient.get_concrete_function(tf.TensorSpec((2, size, size, 3))).graph
        return {operation.type for operation in graph.get_operations()} & {
            "MatMul",
            "Conv2DBackpropFilter",
        }

    product, convolution_kernel = {"MatMul"}, {"Conv2DBackpropFilter"}
    assert operations({"avx2"}) == product
    assert operations({"avx2", "avx512f"}) == convolution_kernel
    assert operations({"avx2", "avx512f"}, kernel_size=1) == product
    for other in (
        {"strides": 2},
        {"padding": "valid"},
        {"dilation_rate": 2},
        {"dtype": "mixed_bfloat16"},
    ):
        assert operations({"avx2"}, **other) == convolution_kernel
    zen, half = {"avx512f", "avx512_bf16"}, {"dtype": "mixed_bfloat16"}
    assert (
        operations(zen, kernel_size=1, size=28, **half)
        == operations(zen, size=7, **half)
        == product
    )
    assert (
        operations(zen, kernel_size=1, size=56, **half)
        == operations(zen, size=8, **half)
        == convolution_kernel
    )
    assert operations({*zen, "amx_bf16"}, kernel_size=1, **half) == convolution_kernel


def test_products_in_bfloat16_have_the_gradients_of_float32_to_its_rounding():
    rng = np.random.default_rng(0)
    images, upstream = rng.normal(size=(4, 7, 7, 8)), rng.normal(size=(4, 7, 7, 6))
    for side in (1, 3):
        ours = layers.kernel_gradient(
            tf.cast(images, tf.bfloat16), tf.cast(upstream, tf.bfloat16), side
        )
        exact = tf.raw_ops.Conv2DBackpropFilter(
            input=tf.cast(images, tf.float32),
            filter_sizes=(side, side, 8, 6),
            out_backprop=tf.cast(upstream, tf.float32),
            strides=[1, 1, 1, 1],
            padding="SAME",
        )
        assert ours.dtype == "bfloat16"
        np.testing.assert_allclose(
            tf.cast(ours, tf.float32), exact, rtol=0.02, atol=0.02 * np.abs(exact).max()
        )
