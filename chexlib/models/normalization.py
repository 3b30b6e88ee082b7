"""Batch normalisation that runs fused on CPUs, over the images that one asks for.

Keras 3 computes batch norm on CPU from separate moments, in float32; TensorFlow's fused kernel does it in one
pass and takes bfloat16 with float32 statistics. The layer here is Keras' own in weights, configuration and
results, so weights move freely between the two.

Keras' own `BatchNormalization(synchronized=True)` asks TensorFlow's replica context for the other replicas. MPI ranks
are no replicas of that context, so under Horovod it silently normalises each rank by itself.
"""

from __future__ import annotations

import keras

from chexlib.models.topologies import STATISTICS


@keras.saving.register_keras_serializable("chexlib")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Drop-in for `keras.layers.BatchNormalization` on NHWC images that calls `FusedBatchNormV3`.

    Inputs that the kernel does not take (not 4-D, another axis, a mask) go to Keras' implementation.

    Parameters
    ----------
    statistics : {"batch", "sync", "ghost", "frozen"}
        What normalises in training. "sync": moments over all Horovod ranks, each image counting once however the ranks'
        parts differ. "ghost": over virtual batches of `ghost_size` images of this rank, in their order (Hoffer et al.
        2017); the moving statistics move once a step, by the mean over virtual batches, as those of real ranks do when
        they are averaged. "frozen": the moving statistics, which stay as they are; scale and offset are trained.
    ghost_size : int
        A batch that is no multiple of it is cut into as few, nearly equal parts of at most so many images.
    """

    def __init__(self, *, statistics: str = "batch", ghost_size: int = 0, **settings):
        super().__init__(**settings)
        if statistics not in STATISTICS or (statistics == "ghost") != (ghost_size > 0):
            raise ValueError(f"statistics={statistics!r} with ghost_size={ghost_size} is not accepted.")
        self.statistics, self.ghost_size = statistics, ghost_size

    def get_config(self):
        own = {} if self.statistics == "batch" else {"statistics": self.statistics, "ghost_size": self.ghost_size}
        return {**super().get_config(), **own}

    def call(self, inputs, training=None, mask=None):
        import tensorflow as tf

        training = bool(training) and self.statistics != "frozen"
        if mask is not None or len(inputs.shape) != 4 or self.axis not in (-1, 3) or inputs.dtype == "float64":
            if training and self.statistics != "batch":
                raise ValueError(f"statistics={self.statistics!r} needs images of 4 axes, channels last.")
            return super().call(inputs, training=training, mask=mask)
        # The kernel takes its statistics and scale in float32 whatever the type of the images is.
        channels = inputs.shape[-1]
        mean, variance = tf.cast(self.moving_mean, "float32"), tf.cast(self.moving_variance, "float32")
        gamma = tf.cast(self.gamma, "float32") if self.scale else tf.ones([channels])
        beta = tf.cast(self.beta, "float32") if self.center else tf.zeros([channels])
        use_batch = training and self.trainable
        if use_batch and self.statistics != "batch":
            sync = self.statistics == "sync"
            parts = _whole(inputs) if sync else _virtual_batches(inputs, self.ghost_size)
            total = _sum_over_ranks if sync else tf.identity
            outputs, means, variances = normalise_by_parts(inputs, gamma, beta, mean, parts, total, self.epsilon)
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
            # The kernel reports the unbiased variance; Keras' moving statistics hold the biased one.
            count = tf.cast(tf.size(inputs) // channels, "float32")
            batch_variance = batch_variance * (count - 1.0) / count
        if use_batch:
            keep = self.momentum
            self.moving_mean.assign(mean * keep + batch_mean * (1.0 - keep))
            self.moving_variance.assign(variance * keep + batch_variance * (1.0 - keep))
        return outputs


def normalise_by_parts(x, gamma, beta, shift, parts, total, epsilon):
    """Batch norm of parts of a batch, each by its own moments, and exact gradients through these.

    Moments are float32. Each rank takes the deviations from its own mean; `shift`, equal on all ranks and near that
    mean, keeps the digits of what is then summed over ranks.

    Parameters
    ----------
    x : (n, h, w, c) images
    gamma, beta, shift : (c,) float32
    parts : (n,) int32, ascending
        The part that each image belongs to, counted from 0.
    total : callable
        Sums a tensor over ranks; the identity where each rank stands alone.

    Returns
    -------
    outputs : (n, h, w, c), of the type of x
    mean, variance : (parts, c) float32
        Biased, as they were used.
    """
    import tensorflow as tf

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
        away = own_mean - shift
        sums = total(tf.concat([own * away, own_squares + own * away**2, own], axis=1))
        channels, count = x.shape[-1], sums[:, -1:]
        away = sums[:, :channels] / count
        mean, variance = shift + away, sums[:, channels:-1] / count - away**2
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = gamma * inverse
        outputs = images * to_images(scale) + to_images(beta - mean * scale)

        def gradient(upstream, *_):
            upstream = tf.cast(upstream, tf.float32)
            slope = tf.cast(x, tf.float32) - to_images(mean)
            of_beta, of_gamma = of_parts(upstream), of_parts(upstream * slope) * inverse
            sums = total(tf.concat([of_beta, of_gamma], axis=1)) / count
            along = scale * inverse * sums[:, channels:]
            inwards = to_images(scale) * upstream - slope * to_images(along) - to_images(scale * sums[:, :channels])
            return tf.cast(inwards, x.dtype), tf.reduce_sum(of_gamma, 0), tf.reduce_sum(of_beta, 0)

        return (tf.cast(outputs, x.dtype), mean, variance), gradient

    return run(x, gamma, beta)


def _whole(inputs):
    import tensorflow as tf

    return tf.zeros(tf.shape(inputs)[:1], tf.int32)


def _virtual_batches(inputs, size: int):
    """The virtual batch of each image: as `numpy.array_split` cuts, so that parts differ by one image at most."""
    import tensorflow as tf

    images = tf.shape(inputs)[0]
    parts = (images + size - 1) // size
    large, more = images // parts + 1, images % parts  # the first `more` parts have one image more
    places = tf.range(images)
    return tf.where(places < more * large, places // large, (places - more) // (large - 1))


def _sum_over_ranks(tensor):
    import horovod.tensorflow as hvd

    return hvd.allreduce(tensor, op=hvd.Sum) if hvd.is_initialized() and hvd.size() > 1 else tensor
