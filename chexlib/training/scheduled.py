"""What lets any Keras optimizer follow a schedule: rate, momentum and weight decay read in the graph from a table.

The table is read by the count of updates; that count is all that a checkpoint has to hold besides the slots.
"""

from __future__ import annotations

import keras
import numpy as np

from chexlib.training.schedules import Values


class TableSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A value for each update, for any Keras optimizer; after the last one the last value stays.

    The table is a variable, so that another one needs no new graph; it is no part of the optimizer's state.

    >>> keras.optimizers.SGD(TableSchedule(preset("goyal-2017").compile(steps_per_epoch=157).rate))
    """

    def __init__(self, table):
        import tensorflow as tf

        self.table = tf.Variable(np.asarray(table, np.float32), shape=[None], trainable=False)

    def __call__(self, step):
        import tensorflow as tf

        return tf.gather(self.table, tf.minimum(tf.cast(step, tf.int32), tf.shape(self.table)[0] - 1))

    def get_config(self):
        return {"table": self.table.numpy().tolist()}


def is_weight(variable) -> bool:
    """Whether a variable is decayed: kernels are; biases, and batch norm's gamma and beta, which have one axis, not."""
    return len(variable.shape) > 1


class Scheduled:
    """What a Keras optimizer needs to follow `Values`, and to leave biases and batch norm undecayed."""

    tables: tuple[TableSchedule, ...] = ()  # of rate, momentum, weight decay, and the update that began the stage

    def follow(self, values: Values):
        """Take rate, momentum and weight decay of each update from `values`, from now on."""
        began = np.maximum.accumulate(np.where(values.fresh, np.arange(len(values)), 0))
        columns = (values.rate, values.momentum, values.weight_decay, began)
        if self.tables:
            for known, column in zip(self.tables, columns, strict=True):
                known.table.assign(column.astype(np.float32))
        else:
            self.tables = tuple(TableSchedule(column) for column in columns)
            self.learning_rate = self.tables[0]
        return self

    def momentum_now(self):
        """Of the update that is being made."""
        return self.tables[1](self._iterations.value) if self.tables else self.momentum

    def decay_now(self):
        """Of the update that is being made."""
        return self.tables[2](self._iterations.value) if self.tables else self.decay

    @property
    def iterations(self):
        """Updates since the stage began, all without a schedule: Adam and Lamb correct their young moments by them."""
        if not self.tables:
            return super().iterations
        import tensorflow as tf

        count = self._iterations.value
        return count - tf.cast(self.tables[3](count), count.dtype)

    def _backend_update_step(self, gradients, variables, learning_rate):
        import tensorflow as tf

        def forget():
            for slot in self.variables:
                if slot is not self._iterations:
                    slot.assign(tf.zeros(slot.shape))

        # A fresh stage takes over weights only, as a solver of its own that is started with them (`--weights`).
        if self.tables:
            tf.cond(tf.equal(self.iterations, 0), forget, lambda: None)
        super()._backend_update_step(gradients, variables, learning_rate)


class Decoupled(Scheduled):
    """Weight decay apart from the gradient, times the rate (Loshchilov and Hutter 2019), as Keras does it."""

    def __init__(self, learning_rate=1e-3, *, decay=0.0, **settings):
        super().__init__(learning_rate, **settings)
        self.decay = decay

    def _apply_weight_decay(self, variables):
        if self.decay or self.tables:
            share = 1 - self.learning_rate * self.decay_now()
            for variable in variables:
                if is_weight(variable):
                    variable.assign(variable * share)

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}
