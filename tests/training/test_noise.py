"""The gradient noise scale is that of a quadratic whose noise is known, and says when it knows
nothing.
"""

import numpy as np
import pandas as pd
import pytest

from chexlib.training.noise import noise_and_signal, noise_scale


def updates_of(rng, *, weights, deviation, images, parts, updates):
    """Gradients of 1/2 |w - x|^2 over examples x that are normal around 0: w plus noise."""
    rows = []
    for _ in range(updates):
        noise = rng.normal(0, deviation, (images, len(weights)))
        of_parts = [part.sum(axis=0) for part in np.array_split(weights + noise, parts)]
        counts = [len(part) for part in np.array_split(noise, parts)]
        squares = sum(g @ g / n for g, n in zip(of_parts, counts, strict=True))
        total = np.sum(of_parts, axis=0)
        rows.append(noise_and_signal(squares, total @ total / images, parts, images))
    return pd.DataFrame(rows, columns=["noise", "signal"])


@pytest.mark.parametrize(("images", "parts"), [(64, 2), (60, 4), (70, 4)])
def test_of_a_quadratic_with_known_noise(images, parts):
    """|G|^2 = 100 x 0.1^2 = 1 and S = 100 x 1^2 = 100, so 100 images, also of uneven parts."""
    rng = np.random.default_rng(0)
    weights = np.full(100, 0.1)
    steps = updates_of(rng, weights=weights, deviation=1.0, images=images, parts=parts, updates=600)
    found = noise_scale(steps)
    assert steps["noise"].mean() == pytest.approx(100, rel=0.02)
    assert found.images == pytest.approx(100, rel=0.10)
    assert found.low < 100 < found.high
    assert found.updates == 600 and f"{found.images:,.0f} images per update" in str(found)


def test_the_interval_holds_the_truth_in_about_95_of_100():
    rng = np.random.default_rng(1)
    found = [
        noise_scale(
            updates_of(
                rng, weights=np.full(50, 0.2), deviation=1.0, images=32, parts=2, updates=100
            )
        )
        for _ in range(200)
    ]
    held = [scale.low < 25 < scale.high for scale in found]
    assert 0.90 <= np.mean(held) <= 0.99


def test_nothing_is_said_of_one_part_of_few_updates_or_where_no_signal_is_seen():
    assert np.isnan(noise_and_signal(1.0, 1.0, 1, 8)).all()
    assert noise_scale(pd.DataFrame({"noise": [1.0] * 10, "signal": [1.0] * 10})) is None
    assert noise_scale(pd.DataFrame({"noise": [1.0] * 50, "signal": [-1.0] * 50})) is None
    nothing = pd.DataFrame({"noise": [np.nan] * 50, "signal": [np.nan] * 50})
    assert noise_scale(nothing) is None


def test_an_interval_without_an_end_says_so():
    rng = np.random.default_rng(2)
    steps = pd.DataFrame({"noise": np.full(100, 50.0), "signal": rng.normal(0.05, 1.0, 100)})
    found = noise_scale(steps)
    assert found is None or (np.isinf(found.high) and "no end" in str(found))
