"""Batch normalisation that runs fused on CPUs.

Keras 3 computes batch norm on CPU from separate moments, in float32; TensorFlow's fused kernel does it in one
pass and takes bfloat16 with float32 statistics. The layer here is Keras' own in weights, configuration and
results, so weights move freely between the two.
"""

from __future__ import annotations

import keras


@keras.saving.register_keras_serializable("chexlib")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Drop-in for `keras.layers.BatchNormalization` on NHWC images that calls `FusedBatchNormV3`.

    Inputs that the kernel does not take (not 4-D, another axis, a mask) go to Keras' implementation.
    """

    def call(self, inputs, training=None, mask=None):
        import tensorflow as tf

        if mask is not None or len(inputs.shape) != 4 or self.axis not in (-1, 3) or inputs.dtype == "float64":
            return super().call(inputs, training=training, mask=mask)
        # The kernel takes its statistics and scale in float32 whatever the type of the images is.
        channels = inputs.shape[-1]
        mean, variance = tf.cast(self.moving_mean, "float32"), tf.cast(self.moving_variance, "float32")
        gamma = tf.cast(self.gamma, "float32") if self.scale else tf.ones([channels])
        beta = tf.cast(self.beta, "float32") if self.center else tf.zeros([channels])
        use_batch = bool(training) and self.trainable
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
        if use_batch:
            # The kernel reports the unbiased variance; Keras' moving statistics hold the biased one.
            count = tf.cast(tf.size(inputs) // channels, "float32")
            batch_variance = batch_variance * (count - 1.0) / count
            keep = self.momentum
            self.moving_mean.assign(mean * keep + batch_mean * (1.0 - keep))
            self.moving_variance.assign(variance * keep + batch_variance * (1.0 - keep))
        return outputs
