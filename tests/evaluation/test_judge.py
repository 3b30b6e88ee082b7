"""A verdict on a difference is right as often as it says, and an undecided one says what it could
have seen.
"""

import numpy as np
import pytest
from scipy import stats

from chexlib.evaluation.verdicts import judge, judge_many, power, smallest_effect

LOSSES = {  # differences by seed, and what must be said of them, by hand
    "supported": [0.03, 0.05, 0.04, 0.06],
    "contradicted": [-0.03, -0.05, -0.04, -0.06],
    "equivalent": [0.001, -0.002, 0.002, -0.001],
    "undecided": [0.05, -0.04, 0.06, -0.03],
}


@pytest.mark.parametrize("word", LOSSES)
def test_each_verdict_is_reached(word):
    assert judge(LOSSES[word]).word == word


def test_supported_comes_before_equivalent():
    """A small effect that is certain is told as an effect."""
    assert judge([0.010, 0.011, 0.012, 0.011]).word == "supported"


def test_one_seed_or_none_is_undecided():
    assert judge([0.3]).word == judge([]).word == judge([np.nan]).word == "undecided"
    assert "no interval" in str(judge([0.3]))


def test_interval_and_p_are_those_of_a_t_test():
    values = np.array([0.01, 0.03, 0.02, 0.05, 0.00])
    test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    verdict = judge([*values, np.nan])
    assert [verdict.low, verdict.high, verdict.p] == pytest.approx([low, high, test.pvalue])
    assert verdict.seeds == 5


@pytest.mark.parametrize("effect", [0.0, 0.02, 0.05])
def test_power_is_how_often_a_simulated_effect_is_called_supported(effect):
    rng = np.random.default_rng(0)
    drawn = rng.normal(effect, 0.016, (4000, 10))
    half = stats.t.ppf(0.975, 9) * drawn.std(axis=1, ddof=1) / np.sqrt(10)
    share = np.mean(drawn.mean(axis=1) - half > 0)
    assert power(effect, 0.016, 10) == pytest.approx(share, abs=0.02)


def test_the_smallest_effect_is_seen_in_four_of_five():
    found = smallest_effect(0.016, 10)
    assert power(found, 0.016, 10) == pytest.approx(0.8)
    rng = np.random.default_rng(1)
    seen = [judge(values).word for values in rng.normal(found, 0.016, (1000, 10))]
    assert np.mean(np.array(seen) == "supported") == pytest.approx(0.8, abs=0.05)


def test_effects_beyond_the_margin_are_called_equivalent_in_at_most_one_of_twenty():
    rng = np.random.default_rng(2)
    words = [judge(values).word for values in rng.normal(0.02, 0.016, (1000, 10))]
    assert np.mean(np.array(words) == "equivalent") < 0.05


def test_an_undecided_verdict_tells_what_could_have_been_seen():
    verdict = judge(LOSSES["undecided"])
    assert f"could have seen {verdict.smallest:.3f} with 80%" in str(verdict)


def test_of_many_looks_at_nothing_one_in_twenty_families_claims_anything():
    rng = np.random.default_rng(5)
    families = rng.normal(0, 0.016, (1000, 10, 6))
    claims = [
        {v.word for v in judge_many(dict(enumerate(looks))).values()}
        & {"supported", "contradicted"}
        for looks in families
    ]
    assert 0.03 < np.mean([bool(words) for words in claims]) < 0.07


def test_a_look_that_does_not_outlive_the_correction_is_judged_for_equivalence():
    """p of 0.04 alone is supported, and of two looks it is not; a clear one stays."""
    small = stats.norm.ppf((np.arange(10) + 0.5) / 10)
    small = 0.01 * (small / small.std(ddof=1) + stats.t.ppf(0.98, 9) / np.sqrt(10))
    found = judge_many({"small": small, "clear": small + 0.1, "none": small - small.mean()})
    assert judge(small).word == "supported"
    assert [verdict.word for verdict in found.values()] == ["equivalent", "supported", "equivalent"]
    assert judge_many({"one seed": [0.3]})["one seed"].word == "undecided"
