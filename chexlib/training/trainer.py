"""Keras' own training loop around a model whose gradients are averaged over ranks."""

from __future__ import annotations

import keras
import tensorflow as tf

from chexlib.training.collectives import World


class DataParallelTrainer(keras.Model):
    """A model, its loss and its ranks, for `keras.Model.fit`.

    The loss is binary cross-entropy, averaged over findings and over all images of the global batch; a rank with
    fewer images, or with a stand-in of weight 0, counts for what it holds.

    Every step's allreduce also carries a few numbers, so that all ranks know them at the same step: `step_loss`, the
    loss of that step alone; `asked`, above 0 if a rank has set `asking`; and `busy`, the seconds that each rank
    computed before it was ready for the others.
    """

    def __init__(self, model: keras.Model, world: World):
        super().__init__()
        # Grappler's rewriting takes seconds of every start and makes no step of these graphs faster (measured).
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        self.model, self.world = model, world
        self.loss_tracker = keras.metrics.Mean("loss")
        self.asking = tf.Variable(0.0, trainable=False)
        self._told = tf.Variable(tf.zeros([3 + world.ranks]), trainable=False)

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def train_step(self, data):
        pixels, labels, weights = data
        variables = self.model.trainable_variables
        with tf.control_dependencies([pixels]):
            began = tf.timestamp()
        with tf.GradientTape() as tape:
            scores = self.model(pixels, training=True)
            loss = tf.reduce_sum(weights * keras.losses.binary_crossentropy(labels, scores))
        gradients = tape.gradient(loss, variables)
        with tf.control_dependencies(gradients):
            busy = tf.cast(tf.timestamp() - began, tf.float32)
        numbers = tf.concat(
            [
                tf.stack([loss, tf.reduce_sum(weights), self.asking]),
                busy * tf.one_hot(self.world.rank, self.world.ranks),
            ],
            axis=0,
        )
        *gradients, numbers = self.world.sum([*gradients, numbers])
        loss, images = numbers[0], numbers[1]
        self.optimizer.apply([g / images for g in gradients], variables)
        self.loss_tracker.update_state(loss / images, sample_weight=images)
        self._told.assign(numbers)
        return {"loss": self.loss_tracker.result()}

    def told(self) -> dict:
        """Of the last step: `step_loss`, `asked`, and `busy`, a list of seconds by rank."""
        loss, images, asked, *busy = self._told.numpy().tolist()
        return {"step_loss": loss / images if images else float("nan"), "asked": asked > 0, "busy": busy}
