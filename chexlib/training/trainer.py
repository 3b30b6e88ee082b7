"""Keras' own training loop around a model whose gradients are averaged over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from chexlib.collectives import World


class DataParallelTrainer(keras.Model):
    """A model, its loss and its ranks, for `keras.Model.fit`.

    With `accumulation` above 1 a rank stands for as many *virtual ranks*: it takes their parts of
    the global batch one after the other, in one graph, each normalised by itself, adds up
    gradients, and averages moving statistics. `virtual` asks for that graph also with 1, where it
    may become another number.

    Of each update of trainable variable i only the share `shares[i]` is made, all of it without
    `shares`: as if its rate were so much lower, whatever the optimizer. With a share of 0 no
    gradient is taken.

    The loss is binary cross-entropy, averaged over findings and over all images of the global
    batch; a rank with fewer images, or with a stand-in of weight 0, counts for what it holds.

    Every step's allreduce also carries a few numbers, so that all ranks know them at the same step:
    `step_loss`, the loss of that step alone; `asked`, above 0 if a rank has set `asking`; and
    `busy`, the seconds that each rank computed before it was ready for the others.
    """

    def __init__(
        self,
        model: keras.Model,
        world: World,
        *,
        accumulation: int = 1,
        virtual: bool = False,
        shares: Sequence[float] = (),
    ):
        super().__init__()
        # Grappler's rewriting takes seconds of every start and makes no step of these graphs faster
        # (measured).
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        self.model, self.world = model, world
        self.shares = tuple(shares) or (1.0,) * len(model.trainable_variables)
        # Another number needs no new graph.
        self.accumulation = tf.Variable(accumulation, trainable=False)
        self.virtual = virtual or accumulation > 1
        self.loss_tracker = keras.metrics.Mean("loss")
        spec = [tf.TensorSpec(model.input_shape, tf.float32)]
        self.infer = tf.function(lambda pixels: model(pixels, training=False), input_signature=spec)
        self.infer_by_batch = tf.function(
            lambda pixels: model(pixels, training=True), input_signature=spec
        )
        self.asking = tf.Variable(0.0, trainable=False)
        self._told = tf.Variable(tf.zeros([3 + world.ranks]), trainable=False)

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def make_train_function(self, force=False):
        """One graph per step. Keras' own holds a second one, which takes seconds at every start to
        unfold.
        """
        if self.train_function is None or force:
            self.train_function = tf.function(
                lambda batches: self.train_step(batches.get_next()), autograph=False
            )

    def train_step(self, data):
        pixels, labels, weights = data
        variables = self.model.trainable_variables
        with tf.control_dependencies([pixels]):
            began = tf.timestamp()
        if self.virtual:
            loss, gradients = self._virtual_ranks(pixels, labels, weights)
        else:
            loss, gradients = self._loss_and_gradients(pixels, labels, weights)
        with tf.control_dependencies(gradients):
            busy = tf.cast(tf.timestamp() - began, tf.float32)
        numbers = tf.concat(
            [
                tf.stack([loss, tf.reduce_sum(weights), self.asking]),
                busy * tf.one_hot(self.world.rank, self.world.ranks),
            ],
            axis=0,
        )
        *gradients, numbers = self.world.allreduce([*gradients, numbers])
        loss, images = numbers[0], numbers[1]
        slow = [
            (v, tf.identity(v.value), share)
            for v, share in zip(variables, self.shares, strict=True)
            if share != 1
        ]
        self.optimizer.apply([g / images for g in gradients], variables)
        for variable, before, share in slow:
            variable.assign(before + share * (variable - before))
        self.loss_tracker.update_state(loss / images, sample_weight=images)
        self._told.assign(numbers)
        return {"loss": self.loss_tracker.result()}

    def _loss_and_gradients(self, pixels, labels, weights):
        with tf.GradientTape() as tape:
            scores = self.model(pixels, training=True)
            loss = tf.reduce_sum(weights * keras.losses.binary_crossentropy(labels, scores))
        variables = self.model.trainable_variables
        found = iter(
            tape.gradient(
                loss, [v for v, share in zip(variables, self.shares, strict=True) if share]
            )
        )
        return loss, [
            next(found) if share else tf.zeros(v.shape)
            for v, share in zip(variables, self.shares, strict=True)
        ]

    def _virtual_ranks(self, pixels, labels, weights):
        """Sums over this rank's parts of a batch.

        Each begins with the same moving statistics; their mean is left.
        """
        model, parts = self.model, self.accumulation
        images = tf.shape(pixels)[0]
        statistics = model.non_trainable_variables
        before = [tf.identity(v.value) for v in statistics]

        def take(part, start, loss, gradients, totals):
            # As `partition` has cut.
            stop = start + images // parts + tf.cast(part < images % parts, tf.int32)
            for variable, value in zip(statistics, before, strict=True):
                variable.assign(value)
            more, own = self._loss_and_gradients(
                pixels[start:stop], labels[start:stop], weights[start:stop]
            )
            gradients = [
                total + tf.convert_to_tensor(g) for total, g in zip(gradients, own, strict=True)
            ]
            totals = [total + v.value for total, v in zip(totals, statistics, strict=True)]
            return part + 1, stop, loss + more, gradients, totals

        nothing = (
            [tf.zeros(v.shape) for v in model.trainable_variables],
            [tf.zeros(v.shape) for v in statistics],
        )
        start = (0, 0, tf.constant(0.0), *nothing)
        *_, loss, gradients, totals = tf.while_loop(
            lambda part, *_: part < parts, take, start, parallel_iterations=1
        )
        for variable, total in zip(statistics, totals, strict=True):
            variable.assign(total / tf.cast(parts, tf.float32))
        return loss, gradients

    def told(self) -> dict:
        """Of the last step: `step_loss`, `asked`, and `busy`, a list of seconds by rank."""
        loss, images, asked, *busy = self._told.numpy().tolist()
        return {
            "step_loss": loss / images if images else float("nan"),
            "asked": asked > 0,
            "busy": busy,
        }
