"""Convolutions whose gradients are matrix products, where oneDNN computes the gradient of weights
slowly.

Without AVX-512, oneDNN's kernels for that gradient reach a third to a seventh of what its forward
convolution and its matrix product do (`benchmarks/train_step.py`): of VGG-16's step they are more
than half. With AVX-512 that holds for kernels of 1 x 1 in float32 (64 to 150 GFLOP/s a core where a
product has 180 to 220), and for small images in bfloat16.
"""

from __future__ import annotations

import keras

from chexlib.machine import processor_flags


@keras.saving.register_keras_serializable("chexlib")
class Conv2D(keras.layers.Conv2D):
    """Drop-in for `keras.layers.Conv2D`: the same outputs, and the same gradients to rounding.

    Only convolutions with stride 1, channels last, that keep the size of their images differ, where
    a product is faster.
    """

    def convolution_op(self, inputs, kernel):
        side, other, channels, _ = kernel.shape
        keeps_size = (
            self.strides == (1, 1)
            and side == other
            and side % 2
            and (side == 1 or self.padding == "same")
        )
        plain = self.dilation_rate == (1, 1) and self.data_format == "channels_last"
        plain = plain and inputs.shape[-1] == channels and None not in inputs.shape[1:]
        if (
            keeps_size
            and plain
            and _product_is_faster(side, inputs.shape[1] * inputs.shape[2], inputs.dtype)
        ):
            return _convolve(inputs, kernel)
        return super().convolution_op(inputs, kernel)


def _product_is_faster(side: int, places: int, dtype: str) -> bool:
    """Whether `kernel_gradient` beats oneDNN's kernel on this CPU for images of so many places, as
    measured.
    """
    flags = processor_flags()
    if dtype == "float32":
        return side == 1 or "avx512f" not in flags
    native = "avx512_bf16" in flags and "amx_bf16" not in flags  # AMX was not measured
    return dtype == "bfloat16" and native and places <= {1: 28 * 28, 3: 7 * 7}.get(side, 0)


def _convolve(images, kernel):
    """Convolution with stride 1 that keeps the size of `images`, (n, h, w, c_in) by (k, k, c_in,
    c_out).
    """
    import tensorflow as tf

    @tf.custom_gradient
    def convolve(images, kernel):
        def gradient(upstream):
            return _image_gradient(tf.shape(images), kernel, upstream), kernel_gradient(
                images, upstream, side
            )

        return tf.nn.conv2d(images, kernel, 1, "SAME"), gradient

    side = kernel.shape[0]
    return convolve(tf.convert_to_tensor(images), tf.convert_to_tensor(kernel))


def _image_gradient(shape, kernel, upstream):
    import tensorflow as tf

    if kernel.shape[0] == 1:
        flat = tf.reshape(upstream, [-1, upstream.shape[-1]])
        return tf.reshape(tf.matmul(flat, kernel[0, 0], transpose_b=True), shape)
    return tf.raw_ops.Conv2DBackpropInput(
        input_sizes=shape,
        filter=kernel,
        out_backprop=upstream,
        strides=[1, 1, 1, 1],
        padding="SAME",
    )


def kernel_gradient(images, upstream, side: int):
    """Gradient of the kernel of a convolution with stride 1 that keeps the size of its images.

    For each row i of the kernel it is one matrix product, over all places of all images, of the
    images moved by i rows and of `upstream` moved by 0 to side - 1 columns, side by side. Images
    padded by rows of zeros lie in memory such that moving them by rows takes another slice and no
    copy.

    Parameters
    ----------
    images : (n, h, w, c_in) float32 or bfloat16
    upstream : (n, h, w, c_out), of the same type
        Gradient of the outputs.
    side : int
        Of the kernel: odd.

    Returns
    -------
    (side, side, c_in, c_out), of the same type
    """
    import tensorflow as tf

    count, (_, height, width, inputs), outputs = (
        tf.shape(images)[0],
        images.shape,
        upstream.shape[-1],
    )
    if side == 1:
        flat = tf.reshape(images, [-1, inputs]), tf.reshape(upstream, [-1, outputs])
        return tf.matmul(*flat, transpose_a=True)[None, None]
    pad = side // 2
    rows = tf.reshape(tf.pad(images, [[0, 0], [pad, pad], [0, 0], [0, 0]]), [-1, inputs])
    wide = tf.pad(upstream, [[0, 0], [0, 2 * pad], [pad, pad], [0, 0]])
    moved = [wide[:, :, side - 1 - j : side - 1 - j + width] for j in range(side)]
    columns = tf.reshape(tf.concat(moved, axis=-1), [-1, side * outputs])
    places = count * (height + 2 * pad) * width - 2 * pad * width
    products = [
        tf.matmul(rows[i * width : i * width + places], columns[:places], transpose_a=True)
        for i in range(side)
    ]
    return tf.transpose(tf.reshape(tf.stack(products), [side, inputs, side, outputs]), [0, 2, 1, 3])
