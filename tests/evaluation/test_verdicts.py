"""A percentage lost is of the skill above chance, its interval covers, and nothing follows where
nothing was learnt.
"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from chexlib.evaluation.intervals import over_seeds, percent_lost, verdict_on_gain


def test_a_loss_is_a_share_of_the_skill_above_chance():
    """By hand: from 0.80 to 0.74 a fifth of the 0.30 above chance is lost, where it would be 7.5 %
    of the AUROC.
    """
    found = percent_lost(pd.Series([0.81, 0.79]), pd.Series([0.75, 0.73]))
    assert found["loss"] == pytest.approx(20) and found["baseline"] == pytest.approx(0.8)
    assert found["low"] < 20 < found["high"] and found["seeds"] == 2


def test_the_interval_holds_the_ratios_that_a_paired_t_test_does_not_refuse():
    rng = np.random.default_rng(0)
    first, other = rng.normal(0.78, 0.02, 5), rng.normal(0.74, 0.03, 5)
    found = percent_lost(pd.Series(first), pd.Series(other))
    for end in ("low", "high"):
        rest = (first - other) - found[end] / 100 * (first - 0.5)
        assert stats.ttest_1samp(rest, 0).pvalue == pytest.approx(0.05)
    assert found["low"] < found["loss"] < found["high"]


def test_the_interval_covers_the_true_loss_in_95_of_100():
    rng = np.random.default_rng(1)
    held = known = 0
    for _ in range(1500):
        own = rng.normal(0, 0.03, (2, 3))
        first, other = 0.80 + own[0], 0.77 + 0.5 * own[0] + own[1]  # three seeds, correlated
        found = percent_lost(pd.Series(first), pd.Series(other))
        known += np.isfinite(found["low"])
        held += found["low"] <= 10 <= found["high"]
    assert known > 1450 and abs(held / known - 0.95) < 0.02


@pytest.mark.parametrize(
    "first",
    [
        [0.60, 0.61, 0.62],  # apart from chance, but below 0.7
        [0.99, 0.55, 0.70],  # above 0.7, but its interval holds 0.5
        [0.51, 0.49, 0.50],
    ],
)
def test_there_is_no_loss_where_nothing_was_learnt(first):
    found = percent_lost(pd.Series(first), pd.Series(first) - 0.05)
    assert np.isnan([found["loss"], found["low"], found["high"]]).all()
    assert found["baseline"] == pytest.approx(np.mean(first))


def test_one_seed_has_a_loss_and_no_interval_and_a_seed_without_a_pair_is_left_out():
    found = percent_lost(pd.Series([0.8, 0.9]), pd.Series([0.74, np.nan]))
    assert found["loss"] == pytest.approx(20) and found["seeds"] == 1 and np.isnan(found["low"])


def test_an_interval_that_holds_0_or_that_is_not_there_is_undecided():
    told = [
        verdict_on_gain(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (np.nan, np.nan))
    ]
    assert told == ["reproduced", "contradicted", "undecided", "undecided"]


def test_intervals_over_seeds_are_students_t():
    rows = pd.DataFrame({"topology": "vgg16", "auroc": [0.81, 0.79, 0.84, np.nan]})
    found = over_seeds(rows, ["topology"], ["auroc"]).iloc[0]
    expected = stats.ttest_1samp(rows["auroc"][:3], 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["seeds"] == 3
