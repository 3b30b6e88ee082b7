"""FusedAdam is Keras' Adam."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from chexlib.training.optimizers import FusedAdam

SHAPES = ((3, 4), (4,), ())
VARIANTS = {
    "defaults": {},
    "chosen": {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3},
    "amsgrad": {"amsgrad": True, "learning_rate": 0.01},
    "decay and clipping": {"weight_decay": 0.01, "clipnorm": 0.5, "learning_rate": 0.01},
    "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)},
}


# Keras takes 1 - beta_2 in float64 here and in float32 there, the kernel in float32 throughout: 2.4e-5 of each update.
APART = 5e-5


def descend(kind, *, graph, steps=20, rates=None, **settings):
    """Variables and optimizer after `steps` updates with noisy gradients."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=s).astype(np.float32), name=f"v{i}") for i, s in enumerate(SHAPES)]
    optimizer = kind(**settings)
    optimizer.build(variables)
    step = tf.function(lambda gradients: optimizer.apply(gradients, variables), autograph=False)
    for i in range(steps):
        if rates is not None:
            optimizer.learning_rate = rates[i]
        gradients = [tf.constant(2 * v.numpy() + rng.normal(size=v.shape), tf.float32) for v in variables]
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
