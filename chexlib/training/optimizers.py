"""Optimizers that follow a schedule: the graph reads learning rate, momentum and weight decay of each
update from a table.

The table is read by the count of updates; that count is all that a checkpoint has to hold besides
the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np

from chexlib.data.pipeline import steps_per_epoch
from chexlib.errors import ConfigError
from chexlib.training.callbacks import Position
from chexlib.training.config import TrainConfig
from chexlib.training.recipes import resolve
from chexlib.training.schedules import Schedule, Values


class TableSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A value for each update, for any Keras optimizer; after the last one the last value stays.

    The table is a variable, so that another one needs no new graph; it is no part of the
    optimizer's state.

    >>> keras.optimizers.SGD(TableSchedule(preset("goyal-2017").compile(steps_per_epoch=157).rate))
    """

    def __init__(self, table):
        import tensorflow as tf

        self.table = tf.Variable(np.asarray(table, np.float32), shape=[None], trainable=False)

    def __call__(self, step):
        import tensorflow as tf

        return tf.gather(
            self.table, tf.minimum(tf.cast(step, tf.int32), tf.shape(self.table)[0] - 1)
        )

    def get_config(self):
        return {"table": self.table.numpy().tolist()}


def is_weight(variable) -> bool:
    """Whether a variable is decayed: kernels are; biases, and batch norm's gamma and beta, which
    have one axis, not.
    """
    return len(variable.shape) > 1


class Scheduled:
    """Mixin for Keras optimizers: schedules of `Values`, and no weight decay of biases and batch norm."""

    # Of rate, momentum, weight decay, and the update that began the stage.
    tables: tuple[TableSchedule, ...] = ()
    # Of the learning rate, by trainable variable in the order of `build`: layer-wise learning-rate
    # decay. None: 1 for all.
    multipliers: Sequence[float] | None = None
    # What the variables of one update share, while it is made.
    _shared: dict | None = None

    def apply(self, gradients, trainable_variables=None):
        self._shared = {}
        try:
            super().apply(gradients, trainable_variables)
        finally:
            self._shared = None

    def _once(self, name, make: Callable):
        """`make()`, in the graph once for each update: a network has hundreds of variables, and
        each op costs microseconds however small it is.
        """
        if self._shared is None:
            return make()
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def follow(self, values: Values):
        """Take rate, momentum and weight decay of each update from `values`, from now on."""
        began = np.maximum.accumulate(np.where(values.fresh, np.arange(len(values)), 0))
        columns = (values.rate, values.momentum, values.weight_decay, began)
        if self.tables:
            for schedule, column in zip(self.tables, columns, strict=True):
                schedule.table.assign(column.astype(np.float32))
        else:
            self.tables = tuple(TableSchedule(column) for column in columns)
            self.learning_rate = self.tables[0]
        return self

    def rate_of(self, variable, rate):
        """The learning rate of one variable: `rate` times its multiplier."""
        if self.multipliers is None:
            return rate
        multiplier = self.multipliers[self._get_variable_index(variable)]
        return rate if multiplier == 1 else rate * multiplier

    def momentum_now(self):
        """Momentum of the current update."""
        return self._of_update("momentum of the table", 1) if self.tables else self.momentum

    def decay_now(self):
        """Weight decay of the current update."""
        return self._of_update("decay", 2) if self.tables else self.decay

    def _of_update(self, name, table):
        return self._once(name, lambda: self.tables[table](self._iterations.value))

    @property
    def iterations(self):
        """Updates since the stage began, all without a schedule: Adam and Lamb correct their young
        moments by them.
        """
        if not self.tables:
            return super().iterations
        import tensorflow as tf

        count, began = self._iterations.value, self._of_update("began", 3)
        return count - tf.cast(began, count.dtype)

    def _backend_update_step(self, gradients, variables, learning_rate):
        import tensorflow as tf

        def forget():
            for slot in self.variables:
                if slot is not self._iterations:
                    slot.assign(tf.zeros(slot.shape))

        # A fresh stage takes over weights only, as a solver of its own that is started with them
        # (`--weights`).
        if self.tables:
            tf.cond(tf.equal(self.iterations, 0), forget, lambda: None)
        super()._backend_update_step(gradients, variables, tf.cast(learning_rate, tf.float32))


class Decoupled(Scheduled):
    """Weight decay apart from the gradient, times the rate (Loshchilov and Hutter 2019), as Keras
    does it.
    """

    def __init__(self, learning_rate=1e-3, *, decay=0.0, **settings):
        super().__init__(learning_rate, **settings)
        self.decay = decay

    def _apply_weight_decay(self, variables):
        if self.decay or self.tables:
            rate = self.learning_rate
            for variable in variables:
                if is_weight(variable):
                    shrink = 1 - self.rate_of(variable, rate) * self.decay_now()
                    variable.assign(variable * shrink)

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


NO_DECAY = ConfigError('optimizer="adam" has no weight decay. Use "adamw", or a weight decay of 0.')
LARS_RATIO = 1e-3  # You et al. 2017, section 5: how much of a layer's norm one update may move it


class FusedAdam(Scheduled, keras.optimizers.Adam):
    """`keras.optimizers.Adam` (Kingma and Ba 2015) through TensorFlow's own Adam kernel.

    Same update, slots and configuration; amsgrad is left to Keras' class.
    """

    def update_step(self, gradient, variable, learning_rate):
        import tensorflow as tf

        if self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)

        def settings():
            step = tf.cast(self.iterations + 1, tf.float32)
            return {
                "beta1_power": tf.pow(self.beta_1, step),
                "beta2_power": tf.pow(self.beta_2, step),
                "beta1": tf.constant(self.beta_1),
                "beta2": tf.constant(self.beta_2),
                "epsilon": tf.constant(self.epsilon),
            }

        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            lr=self.rate_of(variable, learning_rate),
            grad=gradient,
            **self._once("adam", settings),
        )

    def follow(self, values: Values):
        if type(self) is FusedAdam and values.weight_decay.any():
            raise NO_DECAY
        return super().follow(values)


class AdamW(Decoupled, FusedAdam):
    """Adam with decoupled weight decay on weights only.

    Momentum is its beta_1; a schedule's is not read.
    """


class Lamb(Decoupled, keras.optimizers.Lamb):
    """LAMB (You et al. 2020, algorithm 2), its weight decay within the trust ratio, on weights
    only.

    With r = m / (sqrt(v) + epsilon) of the corrected moments, w <- w - rate * |w| / |u| * u for u =
    r + decay * w; the ratio is 1 where a norm is 0. Keras' class has the decay apart, as AdamW.
    Without decay this is Keras'.
    """

    def update_step(self, gradient, variable, learning_rate):
        import tensorflow as tf

        index = self._get_variable_index(variable)
        first, second = self._momentums[index], self._velocities[index]
        first.assign_add((gradient - first) * (1 - self.beta_1))
        second.assign_add((tf.square(gradient) - second) * (1 - self.beta_2))
        step = self._once("step", lambda: tf.cast(self.iterations + 1, tf.float32))
        mean = first / self._once("first", lambda: 1 - tf.pow(self.beta_1, step))
        root = tf.sqrt(second / self._once("second", lambda: 1 - tf.pow(self.beta_2, step)))
        update = mean / (root + self.epsilon)
        if is_weight(variable) and (self.decay or self.tables):
            update = update + self.decay_now() * variable
        weight, length = tf.norm(variable), tf.norm(update)
        trust = tf.where((weight > 0) & (length > 0), tf.math.divide_no_nan(weight, length), 1.0)
        variable.assign_sub(self.rate_of(variable, learning_rate) * trust * update)

    def _apply_weight_decay(self, variables):
        pass  # it is in the update


class Momentum(Scheduled, keras.optimizers.SGD):
    """SGD with momentum, the rate inside the velocity, and L2: the decay is added to the gradient,
    as in Caffe.

    v <- momentum * v - rate * (gradient + decay * weight);  weight <- weight + v, or Nesterov's
    look ahead.
    """

    def __init__(self, learning_rate=0.01, *, momentum=0.9, nesterov=False, decay=0.0, **settings):
        super().__init__(learning_rate, momentum=momentum, nesterov=nesterov, **settings)
        self.decay = decay

    def update_step(self, gradient, variable, learning_rate):
        import tensorflow as tf

        if is_weight(variable) and (self.decay or self.tables):
            gradient = gradient + self.decay_now() * variable
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=self.momentums[self._get_variable_index(variable)].value.handle,
            lr=self.rate_of(variable, learning_rate),
            grad=gradient,
            momentum=self._once("momentum", lambda: tf.cast(self.momentum_now(), tf.float32)),
            use_nesterov=self.nesterov,
        )

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


class LARS(Momentum):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, algorithm 1).

    A kernel's rate is multiplied by ratio * |w| / (|gradient| + decay * |w|), 1 where a norm is 0.
    Biases and batch norm take the rate as it is.
    """

    def __init__(self, learning_rate=0.01, *, ratio=LARS_RATIO, **settings):
        super().__init__(learning_rate, **settings)
        self.ratio = ratio

    def update_step(self, gradient, variable, learning_rate):
        import tensorflow as tf

        if is_weight(variable):
            weight, slope = tf.norm(variable), tf.norm(gradient)
            local = self.ratio * tf.math.divide_no_nan(weight, slope + self.decay_now() * weight)
            learning_rate = learning_rate * tf.where((weight > 0) & (slope > 0), local, 1.0)
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        return {**super().get_config(), "ratio": self.ratio}


MAKERS = {
    "sgd": Momentum,
    "nesterov": lambda rate, decay=0.0: Momentum(rate, nesterov=True, decay=decay),
    "adamw": AdamW,
    "lamb": Lamb,
    "lars": LARS,
}


def create(name: str, rate: float = 0.0, *, decay: float = 0.0, values: Values | None = None):
    """The optimizer of this name, with a constant rate and decay, or following `values`.

    Raises
    ------
    ConfigError
        Weight decay for plain Adam, which has none.
    """
    optimizer = FusedAdam(rate) if name == "adam" else MAKERS[name](rate, decay=decay)
    if name == "adam" and decay:
        raise NO_DECAY
    return optimizer.follow(values) if values else optimizer


def make_optimizer(config: TrainConfig):
    """The optimizer that a config asks for; `guide` gives it its schedule."""
    if has_table(config):
        return create(
            config.optimizer, values=Schedule(phases=[{"kind": "constant", "length": 1}]).compile()
        )
    return create(config.optimizer, config.learning_rate, decay=config.weight_decay)


def has_table(config: TrainConfig) -> bool:
    """Whether rates are read from a table: under any schedule but one that leaves them to the
    validation loss.
    """
    return bool(config.schedule) and not _schedule_of(config, Position(1, 1)).plateau


def guide(optimizer, config: TrainConfig, at: Position, *, anew: bool) -> Values | None:
    """Let the optimizer follow the config's schedule from where the training stands; None where
    there is none.

    Raises
    ------
    ConfigError
        The schedule has fewer steps than phases, or decays weights under plain Adam.
    """
    if not config.schedule:
        return None
    values = values_at(config, at)
    if optimizer.tables:
        optimizer.follow(values)
    elif anew:
        optimizer.learning_rate = values.rate[0]
    return values


def values_at(config: TrainConfig, at: Position) -> Values:
    """The values of a config's schedule for the global batch of `at`, laid so that `at.step` has
    its place's values.
    """
    steps = steps_per_epoch(at.images, global_batch=at.global_batch)
    place = at.epoch * steps + steps_per_epoch(at.image, global_batch=at.global_batch)
    return _schedule_of(config, at).compile(steps_per_epoch=steps).begin(place, at=at.step)


def _schedule_of(config: TrainConfig, at: Position) -> Schedule:
    return resolve(
        config.schedule, images=at.images, global_batch=at.global_batch, epochs=config.epochs
    )
