"""The data-parallel training step: a network whose gradients are summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from chexlib.collectives import World


class DataParallelTrainer(keras.Model):
    """Data-parallel training of a model, for `keras.Model.fit`: gradients are summed over ranks.

    With `accumulation` above 1 a rank takes its part of the global batch in as many *micro-batches*,
    one after the other in one graph. Each is normalised by itself, as on a rank of its own;
    gradients are added up, and moving statistics averaged. `accumulates` asks for that graph also
    with 1, where it may become another number.

    The loss is binary cross-entropy, averaged over findings and over all images of the global
    batch. A rank with fewer images, or with padding of weight 0, counts for the images it holds.
    No gradient is taken of variables whose learning-rate multiplier is 0 (`trained` is False).

    Every step's allreduce also carries a few numbers, so that all ranks know them at the same step:
    `step_loss`, the loss of that step alone; `asked`, above 0 if a rank has set `asking`; `busy`,
    the seconds that each rank computed before it was ready for the others; and `squares`, of which
    `chexlib.training.noise` makes the gradient noise scale.
    """

    def __init__(
        self,
        model: keras.Model,
        world: World,
        *,
        accumulation: int = 1,
        accumulates: bool = False,
        trained: Sequence[bool] = (),
    ):
        super().__init__()
        # Grappler's rewriting takes seconds of every start and makes no step of these graphs faster
        # (measured).
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        self.model, self.world = model, world
        self.trained = tuple(trained) or (True,) * len(model.trainable_variables)
        # Another number needs no new graph.
        self.accumulation = tf.Variable(accumulation, trainable=False)
        self.accumulates = accumulates or accumulation > 1
        self.loss_tracker = keras.metrics.Mean("loss")
        spec = [tf.TensorSpec(model.input_shape, tf.float32)]
        self.infer = tf.function(lambda pixels: model(pixels, training=False), input_signature=spec)
        self.infer_by_batch = tf.function(
            lambda pixels: model(pixels, training=True), input_signature=spec
        )
        self.asking = tf.Variable(0.0, trainable=False)
        self._told = tf.Variable(tf.zeros([6 + world.ranks]), trainable=False)

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
        with tf.control_dependencies([pixels]):
            began = tf.timestamp()
        with tf.control_dependencies([began]):  # else a rank with one thread notes it at its end
            pixels = tf.identity(pixels)
        if self.accumulates:
            loss, gradients, squares = self._accumulate(pixels, labels, weights)
        else:
            loss, gradients = self._loss_and_gradients(pixels, labels, weights)
            squares = self._squares(gradients, weights)
        with tf.control_dependencies(gradients):
            busy = tf.cast(tf.timestamp() - began, tf.float32)
        busy_by_rank = busy * tf.one_hot(self.world.rank, self.world.ranks)
        sums = tf.stack([loss, tf.reduce_sum(weights), self.asking])
        numbers = tf.concat([sums, squares, busy_by_rank], axis=0)
        *gradients, numbers = self.world.allreduce([*gradients, numbers])
        loss, images = numbers[0], numbers[1]
        self.optimizer.apply([g / images for g in gradients], self.model.trainable_variables)
        self.loss_tracker.update_state(loss / images, sample_weight=images)
        of_sum = self._squares(gradients, images)[:1]
        self._told.assign(tf.concat([of_sum, numbers], axis=0))
        return {"loss": self.loss_tracker.result()}

    def _loss_and_gradients(self, pixels, labels, weights):
        """Sums over the images of a batch: the loss, and a gradient per trainable variable."""
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            scores = self.model(pixels, training=True)
            losses = keras.losses.binary_crossentropy(labels, scores)
            loss = tf.reduce_sum(weights * losses)
        sources = [v for v, trained in zip(variables, self.trained, strict=True) if trained]
        gradients = iter(tape.gradient(loss, sources))
        return loss, [
            next(gradients) if trained else tf.zeros(v.shape)
            for v, trained in zip(variables, self.trained, strict=True)
        ]

    def _squares(self, gradients, weights) -> tf.Tensor:
        """Of one part of the global batch: |gradient|^2 / images, and 1; of no images 0 and 0."""
        images = tf.reduce_sum(weights)
        square = 2 * tf.add_n([tf.nn.l2_loss(g) for g in gradients])
        return tf.stack([tf.math.divide_no_nan(square, images), tf.cast(images > 0, tf.float32)])

    def _accumulate(self, pixels, labels, weights):
        """Loss, gradients and `_squares` summed over this rank's micro-batches.

        Each begins with the same moving statistics; the mean of what they become is left.
        """
        model, parts = self.model, self.accumulation
        images = tf.shape(pixels)[0]
        statistics = model.non_trainable_variables
        before = [tf.identity(v.value) for v in statistics]

        def take(part, start, loss, squares, gradients, totals):
            stop = start + images // parts + tf.cast(part < images % parts, tf.int32)
            for variable, value in zip(statistics, before, strict=True):
                variable.assign(value)
            micro_batch = pixels[start:stop], labels[start:stop], weights[start:stop]
            more, of_part = self._loss_and_gradients(*micro_batch)
            squares += self._squares(of_part, micro_batch[2])
            gradients = [
                total + tf.convert_to_tensor(g) for total, g in zip(gradients, of_part, strict=True)
            ]
            totals = [total + v.value for total, v in zip(totals, statistics, strict=True)]
            return part + 1, stop, loss + more, squares, gradients, totals

        no_gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
        no_statistics = [tf.zeros(v.shape) for v in statistics]
        *_, loss, squares, gradients, totals = tf.while_loop(
            lambda part, *_: part < parts,
            take,
            (0, 0, tf.constant(0.0), tf.zeros([2]), no_gradients, no_statistics),
            parallel_iterations=1,
        )
        for variable, total in zip(statistics, totals, strict=True):
            variable.assign(total / tf.cast(parts, tf.float32))
        return loss, gradients, squares

    def told(self) -> dict:
        """Numbers of the last step: `step_loss`, `asked`, `busy`, a list of seconds by rank, and
        `squares`, what `noise_and_signal` takes.
        """
        of_sum, loss, images, asked, of_parts, parts, *busy = self._told.numpy().tolist()
        return {
            "step_loss": loss / images if images else float("nan"),
            "asked": asked > 0,
            "busy": busy,
            "squares": (of_parts, of_sum, parts, images),
        }
