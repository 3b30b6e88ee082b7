"""FusedAdam is Keras' Adam; the others are what their papers say, under one schedule."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from chexlib.errors import ConfigError
from chexlib.training.optimizers import FusedAdam, TableSchedule, create
from chexlib.training.schedules import Schedule

SHAPES = ((3, 4), (4,), ())
VARIANTS = {
    "defaults": {},
    "chosen": {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3},
    "amsgrad": {"amsgrad": True, "learning_rate": 0.01},
    "decay and clipping": {"weight_decay": 0.01, "clipnorm": 0.5, "learning_rate": 0.01},
    "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)},
}


# Keras takes 1 - beta_2 in float64 here and in float32 there, the kernel in float32 throughout:
# 2.4e-5 of each update.
APART = 5e-5


def descend(kind, *, graph, steps=20, rates=None, **settings):
    """Variables and optimizer after `steps` updates with noisy gradients."""
    rng = np.random.default_rng(0)
    variables = [
        keras.Variable(rng.normal(size=s).astype(np.float32), name=f"v{i}")
        for i, s in enumerate(SHAPES)
    ]
    optimizer = kind(**settings)
    optimizer.build(variables)
    step = tf.function(lambda gradients: optimizer.apply(gradients, variables), autograph=False)
    for i in range(steps):
        if rates is not None:
            optimizer.learning_rate = rates[i]
        gradients = [
            tf.constant(2 * v.numpy() + rng.normal(size=v.shape), tf.float32) for v in variables
        ]
        step(gradients) if graph else optimizer.apply(gradients, variables)
    return [v.numpy() for v in variables], optimizer


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", VARIANTS)
def test_updates_are_keras_adams(name, graph):
    (ours, mine), (theirs, reference) = (
        descend(kind, graph=graph, **VARIANTS[name]) for kind in (FusedAdam, keras.optimizers.Adam)
    )
    rate = VARIANTS[name].get("learning_rate", 1e-3)
    far = 20 * (0.1 if not isinstance(rate, float) else rate)  # no variable moves further than this
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-6, APART * far))
    start, _ = descend(FusedAdam, graph=False, steps=0)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(ours, start, strict=True))
    assert int(mine.iterations) == int(reference.iterations) == 20
    assert len(mine.variables) == len(reference.variables)
    for a, b in zip(mine.variables, reference.variables, strict=True):
        assert a.path.split("/")[-1] == b.path.split("/")[-1]
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-5)


def test_a_rate_changed_in_between_takes_effect_in_a_compiled_step():
    rates = [0.1] * 10 + [0.0] * 10
    after, _ = descend(FusedAdam, graph=True, rates=rates)
    reference, _ = descend(keras.optimizers.Adam, graph=True, rates=rates)
    for a, b in zip(after, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=APART)


def test_state_moves_between_the_two():
    _, reference = descend(keras.optimizers.Adam, graph=False)
    variables = [keras.Variable(np.zeros(shape, np.float32)) for shape in SHAPES]
    mine = FusedAdam()
    mine.build(variables)
    for own, theirs in zip(mine.variables, reference.variables, strict=True):
        own.assign(theirs)
    assert int(mine.iterations) == 20
    assert FusedAdam.from_config(reference.get_config()).get_config() == reference.get_config()


# What follows is held against NumPy in float64, written from the papers: a small net with kernels,
# a bias and a gamma.

VALUES = Schedule(
    decay=((0, 0.05), (7, 0.2), (13, 0.0), (16, 0.4)),  # changes where the rate does not
    phases=[
        {"kind": "warmup", "length": 5, "start": 0.02, "rate": 0.1},
        {"kind": "polynomial", "length": 7, "rate": 0.1, "power": 2, "zero": 20},
        {"kind": "collapse", "length": 8, "rate": 0.05, "fresh": True},
    ],
).compile()


def small_net(seed=0):
    """Shapes of a dense net with batch norm, and a loss: (w0, gamma, beta, w1, bias) and its
    gradients in float64.
    """
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))
    start = [rng.normal(size=s) * 0.5 for s in ((3, 4), (4,), (4,), (4, 2), (2,))]

    def gradients(parameters):
        w0, gamma, beta, w1, bias = parameters
        h = x @ w0
        z = np.tanh(h * gamma + beta)
        out = 2 * (z @ w1 + bias - y) / len(x)
        back = (out @ w1.T) * (1 - z**2)
        return [x.T @ (back * gamma), (back * h).sum(0), back.sum(0), z.T @ out, out.sum(0)]

    return start, gradients


def take_20_steps(optimizer):
    """The parameters after 20 compiled updates; the net computes its gradients in TensorFlow."""
    start, _ = small_net()
    rng = np.random.default_rng(0)
    x, y = (tf.constant(rng.normal(size=s), tf.float32) for s in ((16, 3), (16, 2)))
    variables = [keras.Variable(v.astype(np.float32)) for v in start]
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step():
        w0, gamma, beta, w1, bias = (v.value for v in variables)
        with tf.GradientTape() as tape:
            out = tf.matmul(tf.tanh(tf.matmul(x, w0) * gamma + beta), w1) + bias - y
            loss = tf.reduce_sum(out**2) / len(x)
        optimizer.apply(tape.gradient(loss, [w0, gamma, beta, w1, bias]), variables)

    for _ in range(20):
        step()
    return [v.numpy() for v in variables]


def reference(kind):
    """The same 20 updates in NumPy float64."""
    parameters, gradients = small_net()
    velocity = [np.zeros_like(p) for p in parameters]
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    for i in range(20):
        rate, decay, momentum = VALUES.rate[i], VALUES.weight_decay[i], VALUES.momentum[i]
        if i == 12:  # the collapse is a solver of its own, which takes over the weights only
            velocity, first, second = ([np.zeros_like(p) for p in parameters] for _ in range(3))
        t = i - 12 if i >= 12 else i
        for n, (w, g) in enumerate(zip(parameters, gradients(parameters), strict=True)):
            own = decay if w.ndim == 2 else 0.0
            if kind in ("sgd", "nesterov", "lars"):
                trust = 1.0
                if kind == "lars" and w.ndim == 2:
                    norm = np.sqrt((w**2).sum())
                    trust = 0.001 * norm / (np.sqrt((g**2).sum()) + decay * norm)
                step = rate * trust * (g + own * w)
                velocity[n] = momentum * velocity[n] - step
                parameters[n] = w + (
                    momentum * velocity[n] - step if kind == "nesterov" else velocity[n]
                )
                continue
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g**2
            update, root = first[n] / (1 - 0.9 ** (t + 1)), np.sqrt(1 - 0.999 ** (t + 1))
            # Adam's epsilon is outside of the bias correction (Kingma and Ba 2015, end of section
            # 2), Lamb's within.
            epsilon = 1e-7 / root if kind == "adamw" else 1e-7
            update = update / (np.sqrt(second[n]) / root + epsilon)
            update = update + own * w
            # You et al. 2020, algorithm 2: the ratio is of the update with its decay.
            trust = np.sqrt((w**2).sum()) / np.sqrt((update**2).sum()) if kind == "lamb" else 1.0
            parameters[n] = w - rate * trust * update
    return parameters


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "lars", "adamw", "lamb"])
def test_20_steps_under_a_schedule_equal_a_float64_reference(kind):
    found = take_20_steps(create(kind, 0.0, values=VALUES))
    # Weights of about 1 in float32, 20 times rounded; the last step of the warm-up has momentum
    # 1.125.
    atol = 1.5e-6 if kind in ("sgd", "nesterov", "lars") else 20 * 0.1 * APART
    for ours, theirs, start in zip(found, reference(kind), small_net()[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
        assert np.abs(theirs - start).max() > 100 * atol


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "lars", "adamw", "lamb"])
def test_batch_norm_and_bias_are_never_decayed_and_kernels_are(kind):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(3, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
        ]
    )
    model.add(keras.layers.Dense(2))
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 0.5, np.float32))
    optimizer = create(kind, 0.1, decay=0.3)
    optimizer.build(model.trainable_variables)
    optimizer.apply(
        [tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables
    )
    changed = {
        v.path.split("/")[-1] for v in model.trainable_variables if not np.all(v.numpy() == 0.5)
    }
    assert changed == {"kernel"} and {v.path.split("/")[-1] for v in model.trainable_variables} > {
        "gamma",
        "bias",
    }
    for variable in model.trainable_variables:
        if variable.path.endswith("kernel"):
            ahead = 1.9 if kind == "nesterov" else 1  # the step, and momentum times it
            # Lamb's update is as long as the weights times the rate, whatever it is made of.
            moved = 0.1 if kind == "lamb" else ahead * 0.1 * 0.3
            np.testing.assert_allclose(variable.numpy(), 0.5 * (1 - moved), rtol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adamw", "lamb"])
def test_an_optimizer_without_decay_is_keras_own(kind):
    theirs = {
        "sgd": keras.optimizers.SGD(0.05, momentum=0.9),
        "nesterov": keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        "adamw": keras.optimizers.Adam(0.05),
        "lamb": keras.optimizers.Lamb(0.05),
    }[kind]
    for a, b in zip(take_20_steps(create(kind, 0.05)), take_20_steps(theirs), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=20 * 0.05 * APART if kind == "adamw" else 1e-6
        )


def test_plain_adam_refuses_weight_decay():
    with pytest.raises(ConfigError, match="adamw"):
        create("adam", 0.1, decay=0.1)


def test_a_table_is_a_plain_keras_schedule():
    table = TableSchedule([0.5, 0.25, 0.125])
    optimizer = keras.optimizers.SGD(table)
    variable = keras.Variable(np.zeros(1, np.float32))
    for rate in (0.5, 0.25, 0.125, 0.125):
        assert float(optimizer.learning_rate) == rate
        optimizer.apply([tf.ones(1)], [variable])
    assert float(variable.numpy()[0]) == -1.0
    assert TableSchedule.from_config(table.get_config()).get_config() == table.get_config()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "nesterov"])
def test_what_all_variables_share_is_in_the_graph_once(name):
    """A network has hundreds of variables: what each adds to the step's graph is its own update."""

    def nodes(count):
        variables = [keras.Variable(np.ones((2, 2), np.float32)) for _ in range(count)]
        values = Schedule(phases=[{"kind": "constant", "length": 1}]).compile()
        optimizer = create(name, values=values)
        optimizer.build(variables)
        step = tf.function(lambda: optimizer.apply([tf.ones((2, 2))] * count, variables))
        operations = step.get_concrete_function().graph.get_operations()
        return sum(o.type not in ("Placeholder", "Const") for o in operations)

    assert (nodes(12) - nodes(2)) / 10 <= 8
