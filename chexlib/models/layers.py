"""Convolution and batch norm as drop-ins for Keras' own: the same weights and results, faster on CPUs.

Convolution: without AVX-512, oneDNN's kernels for the gradient of weights reach a third to a
seventh of what its forward convolution and its matrix product do (`benchmarks/train_step.py`): of
VGG-16's step they are more than half. With AVX-512 that holds for kernels of 1 x 1 in float32 (64
to 150 GFLOP/s per core where a product has 180 to 220), and for small images in bfloat16. There the
gradient is computed as matrix products.

Batch norm: Keras 3 computes it on CPU from separate moments, in float32; TensorFlow's fused kernel
does it in one pass and takes bfloat16 with float32 statistics. Keras' own
`BatchNormalization(synchronized=True)` asks TensorFlow's replica context for the other replicas.
MPI ranks are no replicas of that context, so between ranks it silently normalises each rank by
itself; here `statistics="sync"` sums over ranks.
"""

from __future__ import annotations

import keras

from chexlib.collectives import World, joined_world
from chexlib.machine import processor_flags

# Those that are batch norm, with its four weights a channel.
STATISTICS = ("batch", "sync", "ghost", "frozen")


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

        if small:
            flat = tf.matmul(tf.reshape(images, [-1, inputs]), kernel[0, 0])
            return tf.reshape(flat, [-1, height, width, outputs]), gradient
        return tf.nn.conv2d(images, kernel, 1, "SAME"), gradient

    side, _, inputs, outputs = kernel.shape
    height, width = images.shape[1:3]
    # As measured: of no published network at 224 px.
    small = side == 1 and height * width <= 16 * 16 and inputs * outputs < 2**15
    small = small and images.dtype == "float32"
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


@keras.saving.register_keras_serializable("chexlib")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Drop-in for `keras.layers.BatchNormalization` on NHWC images that calls `FusedBatchNormV3`.

    Inputs that the kernel does not take (not 4-D, another axis, a mask) go to Keras'
    implementation.

    Parameters
    ----------
    statistics : {"batch", "sync", "ghost", "frozen"}
        What normalises in training. "sync": moments over all ranks, each image counting once
        however the ranks' parts differ. "ghost": over virtual batches of `ghost_size` images of
        this rank, in their order (Hoffer et al. 2017); the moving statistics move once a step, by
        the mean over virtual batches, as those of real ranks do when they are averaged. "frozen":
        the moving statistics, which stay as they are; scale and offset are trained.
    ghost_size : int
        A batch that is no multiple of it is cut into as few, nearly equal parts of at most so many
        images.
    """

    def __init__(self, *, statistics: str = "batch", ghost_size: int = 0, **settings):
        super().__init__(**settings)
        if statistics not in STATISTICS or (statistics == "ghost") != (ghost_size > 0):
            raise ValueError(
                f"statistics={statistics!r} with ghost_size={ghost_size} is not accepted."
            )
        self.statistics, self.ghost_size = statistics, ghost_size

    def get_config(self):
        own = (
            {}
            if self.statistics == "batch"
            else {"statistics": self.statistics, "ghost_size": self.ghost_size}
        )
        return {**super().get_config(), **own}

    def call(self, inputs, training=None, mask=None):
        import tensorflow as tf

        training = bool(training) and self.statistics != "frozen"
        if (
            mask is not None
            or len(inputs.shape) != 4
            or self.axis not in (-1, 3)
            or inputs.dtype == "float64"
        ):
            if training and self.statistics != "batch":
                raise ValueError(
                    f"statistics={self.statistics!r} needs images of 4 axes, channels last."
                )
            return super().call(inputs, training=training, mask=mask)
        # The kernel takes its statistics and scale in float32 whatever the type of the images is.
        channels = inputs.shape[-1]
        mean, variance = (
            tf.cast(self.moving_mean, "float32"),
            tf.cast(self.moving_variance, "float32"),
        )
        gamma = tf.cast(self.gamma, "float32") if self.scale else tf.ones([channels])
        beta = tf.cast(self.beta, "float32") if self.center else tf.zeros([channels])
        use_batch = training and self.trainable
        if use_batch and self.statistics != "batch":
            sync = self.statistics == "sync"
            parts = _whole(inputs) if sync else _virtual_batches(inputs, self.ghost_size)
            outputs, means, variances = normalise_by_parts(
                inputs, gamma, beta, parts, self.epsilon, ranks=sync
            )
            batch_mean, batch_variance = tf.reduce_mean(means, 0), tf.reduce_mean(variances, 0)
        else:
            empty = tf.zeros([0])
            outputs, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=inputs,
                scale=gamma,
                offset=beta,
                mean=empty if use_batch else mean,
                variance=empty if use_batch else variance,
                epsilon=self.epsilon,
                is_training=use_batch,
            )
        if use_batch and self.statistics == "batch":
            # The kernel reports the unbiased variance; Keras' moving statistics hold the biased
            # one.
            count = tf.cast(tf.size(inputs) // channels, "float32")
            batch_variance = batch_variance * (count - 1.0) / count
        if use_batch:
            keep = self.momentum
            self.moving_mean.assign(mean * keep + batch_mean * (1.0 - keep))
            self.moving_variance.assign(variance * keep + batch_variance * (1.0 - keep))
        return outputs


def normalise_by_parts(x, gamma, beta, parts, epsilon, *, ranks: bool = False):
    """Batch norm of parts of a batch, each by its own moments, and exact gradients through these.

    Moments are float32, taken in two passes, so that a mean far from 0 costs no digits; those of
    ranks are combined as by Chan et al. (1979), from one message forward and one back.

    Parameters
    ----------
    x : (n, h, w, c) images
    gamma, beta : (c,) float32
    parts : (n,) int32, ascending
        The part that each image belongs to, counted from 0.
    ranks : bool
        The parts of all ranks are taken together, part by part.

    Returns
    -------
    outputs : (n, h, w, c), of the type of x
    mean, variance : (parts, c) float32
        Biased, as they were used.
    """
    import tensorflow as tf

    world = joined_world() if ranks else World()

    def total(values):
        return world.allreduce([values])[0]

    def of_parts(values):  # sum over the pixels and images of each part
        return tf.math.segment_sum(tf.reduce_sum(values, [1, 2]), parts)

    def to_images(values):
        return tf.gather(values, parts)[:, None, None]

    @tf.custom_gradient
    def run(x, gamma, beta):
        images = tf.cast(x, tf.float32)
        pixels = tf.cast(tf.shape(x)[1] * tf.shape(x)[2], tf.float32)
        own = pixels * tf.math.segment_sum(tf.ones_like(parts, tf.float32), parts)[:, None]
        own_mean = of_parts(images) / own
        own_squares = of_parts(tf.math.squared_difference(images, to_images(own_mean)))
        channels = x.shape[-1]
        each = world.allgather(tf.concat([own, own_mean, own_squares], axis=1)[None])
        pixels_of, mean_of, squares_of = tf.split(each, [1, channels, channels], axis=2)
        count = tf.reduce_sum(pixels_of, 0)
        mean = tf.reduce_sum(pixels_of * mean_of, 0) / count
        variance = (
            tf.reduce_sum(squares_of + pixels_of * tf.math.squared_difference(mean_of, mean), 0)
            / count
        )
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = gamma * inverse
        outputs = (images - to_images(mean)) * to_images(scale) + beta

        def gradient(upstream, *_):
            upstream = tf.cast(upstream, tf.float32)
            slope = tf.cast(x, tf.float32) - to_images(mean)
            of_beta, of_gamma = of_parts(upstream), of_parts(upstream * slope) * inverse
            sums = total(tf.concat([of_beta, of_gamma], axis=1)) / count
            along = scale * inverse * sums[:, channels:]
            inwards = (
                to_images(scale) * upstream
                - slope * to_images(along)
                - to_images(scale * sums[:, :channels])
            )
            return tf.cast(inwards, x.dtype), tf.reduce_sum(of_gamma, 0), tf.reduce_sum(of_beta, 0)

        return (tf.cast(outputs, x.dtype), mean, variance), gradient

    return run(x, gamma, beta)


def _whole(inputs):
    import tensorflow as tf

    return tf.zeros(tf.shape(inputs)[:1], tf.int32)


def _virtual_batches(inputs, size: int):
    """The virtual batch of each image: as `numpy.array_split` cuts, so that parts differ by one
    image at most.
    """
    import tensorflow as tf

    images = tf.shape(inputs)[0]
    parts = (images + size - 1) // size
    large, more = images // parts + 1, images % parts  # the first `more` parts have one image more
    places = tf.range(images)
    return tf.where(places < more * large, places // large, (places - more) // (large - 1))
