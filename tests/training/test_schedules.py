"""Schedules are what the authors' solvers compute, at every iteration, and scale to any training."""

import json

import numpy as np
import pytest

from chexlib.errors import ConfigError
from chexlib.training.recipes import LADDER, PRESETS, preset, resolve, scale
from chexlib.training.schedules import Schedule

# The solver files, read again: base_lr, power, iterations, where the polynomial is 0 as coded and
# as meant, weight decay, warm-up iterations and its first rate, augmentation.
SOLVERS = {
    "448-nodes": [
        (4.8, 1, 7638, 8040, 7594, 5e-5, 446, 0.1, True),
        (0.254, 2, 402, 402, 402, 1e-4, 0, None, False),
    ],
    "64-nodes": [
        (1.6, 1, 7800, 18720, 18720 - 1560, 5e-5, 1560, 0.1, True),
        (1.02, 2, 3750, 7500, 7500, 5e-5, 0, None, True),
        (0.764, 2, 4750, 7500, 7500, 5e-5, 1000, 0.255, True),
        (0.572, 2, 4750, 7500, 7500, 5e-5, 1000, 0.19, True),
        (0.143, 2, 1560, 1560, 1560, 2e-4, 0, None, False),
    ],
}


def evaluate(solvers, kind):
    """Rate, momentum, weight decay, augmentation and "is the first iteration" of every iteration,
    in plain Python.
    """
    rows = []
    for base, power, iterations, coded, meant, decay, warm, start, augment in solvers:

        def warming(i, base=base, warm=warm, start=start):
            i = max(i, 0)
            return (i * base + (warm - i) * start) / warm

        for i in range(iterations):
            if i < warm:
                rate, momentum = warming(i), 0.9 * warming(i) / warming(i - 1)
            elif kind == "coded":
                rate, momentum = base * (1 - i / coded) ** power, 0.9
            else:
                rate, momentum = base * (1 - (i - warm) / meant) ** power, 0.9
                if (
                    i == warm > 0
                ):  # the step that comes to the full rate (Goyal et al. 2017, remark 2)
                    momentum *= rate / warming(i - 1)
            rows.append((rate, momentum, decay, augment, i == 0 and bool(rows)))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("kind", ["coded", "meant"])
@pytest.mark.parametrize("family", SOLVERS)
def test_every_iteration_has_the_rate_momentum_and_decay_of_the_solver(family, kind):
    rate, momentum, decay, augment, fresh = evaluate(SOLVERS[family], kind)
    values = preset(f"{family}-{kind}").compile()
    assert len(values) == len(rate) == {"448-nodes": 8040, "64-nodes": 22610}[family]
    np.testing.assert_allclose(values.rate, rate, rtol=0, atol=1e-9)
    np.testing.assert_allclose(values.momentum, momentum, rtol=0, atol=1e-9)
    np.testing.assert_allclose(values.weight_decay, decay, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(values.augment, augment)
    np.testing.assert_array_equal(values.fresh, fresh)


def test_the_rate_steps_down_where_the_warm_up_ends_as_coded_and_not_as_meant():
    for family, end, peak, after in (
        ("448-nodes", 446, 4.8, 4.534),
        ("64-nodes", 1560, 1.6, 1.467),
    ):
        coded, meant = (preset(f"{family}-{kind}").compile().rate for kind in ("coded", "meant"))
        assert coded[end] == pytest.approx(after, abs=5e-4) and meant[end] == pytest.approx(
            peak, abs=1e-12
        )
        assert coded[end - 1] == meant[end - 1] == pytest.approx(peak - (peak - 0.1) / end)


def test_as_meant_each_stage_ends_at_the_rate_that_the_next_file_starts_from():
    meant = preset("64-nodes-meant").compile().rate
    ends = np.cumsum([7800, 3750, 4750, 4750])
    np.testing.assert_allclose(meant[ends - 1], [1.018, 0.255, 0.191, 0.143], atol=6e-4)
    assert preset("448-nodes-meant").compile().rate[7637] == pytest.approx(0.254, abs=1e-3)


@pytest.mark.parametrize("name", [*PRESETS, *LADDER])
def test_a_preset_scales_to_2000_images_batch_64_6_epochs(name):
    own = PRESETS.get(name) or LADDER[name]
    made = scale(own, images=2000, global_batch=64, epochs=6)
    values = made.compile()
    assert len(values) == 6 * 32
    assert values.rate.max() == pytest.approx(
        own.compile(steps_per_epoch=500).rate.max() * 64 / own.global_batch, rel=0.1
    )
    assert [n for n in made.notes if "6 of 32 steps, 192 in all" in n] and [
        n for n in made.notes if "linear rule" in n
    ]
    first_steps = np.unique(values.phase, return_index=True)[1]
    assert len(first_steps) == len(values.names)  # no phase is lost
    shares = np.append(first_steps, 192) / 192
    own_values = own.compile(steps_per_epoch=500)
    own_shares = np.append(
        np.unique(own_values.phase, return_index=True)[1], len(own_values)
    ) / len(own_values)
    np.testing.assert_allclose(shares, own_shares, atol=1.01 / 192)
    assert Schedule.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_64k_recipe_has_2100_iterations():
    values = preset("64k").compile()
    assert len(values) == 2100 and values.augment.sum() == 2100 - 105


def test_goyals_recipe_is_his():
    values = preset("goyal-2017").compile(steps_per_epoch=100)
    epoch = np.arange(9000) / 100
    rise = 0.1 + (3.2 - 0.1) * epoch / 5
    fall = 3.2 * 0.1 ** ((epoch >= 30).astype(float) + (epoch >= 60) + (epoch >= 80))
    np.testing.assert_allclose(values.rate, np.where(epoch < 5, rise, fall), atol=1e-12)
    assert set(values.weight_decay) == {1e-4}


@pytest.mark.parametrize(("rule", "peak"), [("linear", 4.8 / 16), ("sqrt", 1.2), ("none", 4.8)])
def test_rates_follow_the_global_batch_by_the_rule(rule, peak):
    made = preset("448-nodes-meant", images=28672, global_batch=896, epochs=90, rule=rule)
    assert made.compile().rate[160] == pytest.approx(peak)
    assert (
        preset("448-nodes-meant", images=9, global_batch=1, epochs=90, peak=0.5)
        .compile()
        .rate.max()
        == 0.5
    )


def test_warm_up_by_the_batch_is_in_proportion_to_it():
    images = 14336 * 20
    for batch, length in (
        (14336, 100),
        (14336 // 4, 100),
    ):  # a quarter of the batch: 4 x the steps, 1/4 of the epochs
        made = preset(
            "448-nodes-meant", images=images, global_batch=batch, epochs=90, warmup="batch"
        )
        values = made.compile()
        assert len(values) == 90 * 20 * 14336 // batch
        assert (values.phase == 0).sum() == pytest.approx(length, abs=1)


def test_the_decay_follows_its_own_places_whatever_the_rate_does():
    values = LADDER["+ weight-decay scaling"].compile(steps_per_epoch=10)
    epoch = np.arange(900) / 10
    expected = np.select([epoch < 22.5, epoch < 45, epoch < 58.5], [5e-5, 1e-4, 2e-4], 4e-4)
    np.testing.assert_array_equal(values.weight_decay, expected)


def test_velocity_is_that_of_a_constant_rate_through_the_whole_warm_up():
    """Goyal et al. 2017, remark 2: v = m * v - rate * g is then rate * u, of u = m * u - g that
    knows no rate.
    """
    phases = [
        {"kind": "warmup", "length": 4, "start": 0.1, "rate": 0.5},
        {"kind": "constant", "length": 3},
    ]
    values, v, u = Schedule(phases=phases).compile(), 0.0, 0.0
    assert values.rate.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    for rate, momentum in zip(values.rate, values.momentum, strict=True):
        v, u = momentum * v - rate, 0.9 * u - 1
        assert v == pytest.approx(rate * u)


def test_a_fresh_stage_after_a_warm_up_has_nothing_to_correct():
    phases = [{"kind": "warmup", "length": 2, "start": 0.1, "rate": 0.5}]
    phases.append({"kind": "constant", "length": 2, "rate": 0.5, "fresh": True})
    assert Schedule(phases=phases).compile().momentum.tolist() == pytest.approx(
        [0.9, 2.7, 0.9, 0.9]
    )


def test_phases_that_name_no_rate_go_on_where_the_one_before_ended():
    phases = [
        {"kind": "constant", "length": 4, "rate": 0.8},
        {"kind": "cosine", "length": 4, "end": 0.2},
        {"kind": "collapse", "length": 4},
        {"kind": "warmup", "length": 2, "rate": 1.0},
        {"kind": "constant", "length": 1},
    ]
    values = Schedule(phases=phases).compile()
    cosine = 0.2 + 0.6 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    floor = cosine[-1]
    collapse = floor * (1 - np.arange(4) / 4) ** 2
    rise = [collapse[-1], (collapse[-1] + 1) / 2]
    np.testing.assert_allclose(values.rate, [0.8] * 4 + [*cosine, *collapse, *rise, 1.0])
    assert values.augment.tolist() == [True] * 8 + [False] * 4 + [True] * 3


def test_values_can_begin_later_or_earlier_in_the_count_of_an_optimizer():
    values = Schedule(phases=[{"kind": "polynomial", "length": 10, "rate": 1}]).compile()
    later, earlier = values.begin(4, at=7), values.begin(7, at=4)
    assert (
        later.rate[7] == values.rate[4] and later.rate[-1] == values.rate[-1] and len(later) == 13
    )
    assert (
        earlier.rate[4] == values.rate[7]
        and earlier.rate[-1] == values.rate[-1]
        and len(earlier) == 7
    )


ONE = [{"kind": "constant", "length": 1, "rate": 1}]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("448", "no preset '448'. Use one of 448-nodes-coded"),
        ({"preset": "64k", "peaks": 1}, "no setting peaks"),
        ({"preset": "64k", "rule": "cubic"}, "rule='cubic' is not known"),
        ({"phases": [{"kind": "warm", "length": 1}]}, "kind='warm' is not known"),
        ({"phases": [{"kind": "constant", "length": -1}]}, "length=-1 is not accepted"),
        ({"phases": [{"kind": "constant", "len": 1}]}, "A phase has kind, length"),
        ({"phases": [{"kind": "constant", "length": None}]}, "length=None is not accepted"),
        (
            {"phases": [{"kind": "step", "length": 90, "at": (60, 30)}]},
            r"at=\(60, 30\) is not accepted.*each above",
        ),
        (
            {"phases": [{"kind": "step", "length": 90, "at": (30, 30)}]},
            r"at=\(30, 30\) is not accepted",
        ),
        (
            {"phases": [{"kind": "step", "length": 90, "at": ("early",)}]},
            r"at=\('early',\) is not accepted",
        ),
        ({"phases": [{"kind": "step", "length": 90, "at": 30}]}, "at=30 is not accepted"),
        (
            {"phases": [{"kind": "constant", "length": 1, "augment": "no"}]},
            "augment='no' is not known",
        ),
        (
            {"phases": [{"kind": "constant", "length": 1, "fresh": "yes"}]},
            "fresh='yes' is not known",
        ),
        (
            {"phases": ONE, "decay": [[0, 0.1], [60, 0.2], [30, 0.3]]},
            r"decay=\[0, 60, 30\] is not accepted",
        ),
        ({"phases": ONE, "decay": [[0, "low"]]}, "decay of 'low' is not accepted"),
        ({"phases": ONE, "decay": [[0, -1e-4]]}, "decay of -0.0001 is not accepted"),
        ({"phases": ONE, "decay": 1e-4}, "cannot be read"),
        ({"phases": ONE, "momentum": "high"}, "momentum='high' is not accepted. Use a number"),
        ({"phases": ONE, "momentum": 1}, "momentum=1 is not accepted"),
        ({"phases": ONE, "images": "all"}, "images='all' is not accepted"),
        ({"phases": ONE, "global_batch": None}, "global_batch=None is not accepted"),
        ({"phases": ONE, "plateau": "no"}, "plateau='no' is not known"),
        ({"phases": []}, "one phase or more"),
        ({"stages": []}, "is not a schedule"),
        ({"preset": "64-nodes-coded", "epochs": 0.1}, "steps are too few for 8 phases"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_words(asked, said):
    with pytest.raises(ConfigError, match=said):
        made = resolve(asked, images=100, global_batch=10, epochs=5)
        assert (
            "too few" in said and made.compile()
        )  # whatever else is wrong is said when it is made
