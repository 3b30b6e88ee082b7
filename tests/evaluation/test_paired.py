"""Two models on the same images: the difference, its interval, and how often chance alone is called
a difference.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from chexlib.errors import DataError
from chexlib.evaluation.auroc import compare, paired_difference
from chexlib.evaluation.intervals import holm
from chexlib.findings import FINDINGS


def two_models(n_patients=80, *, better=0.0, seed=0, images_each=2):
    """Labels, scores of a model and of another with noise of its own, and patients."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), images_each)
    labels = (rng.random((len(patients), 14)) < 0.3).astype(float)
    shared = labels + rng.normal(size=labels.shape)
    one, other = (shared + rng.normal(scale=0.5, size=labels.shape) for _ in range(2))
    return labels, one + better * labels, other, patients


def test_difference_is_that_of_scikit_learns_aurocs():
    labels, one, other, patients = two_models(better=0.3)
    labels[::7, 2] = np.nan
    table = paired_difference(labels, one, other, patients, resamples=50)
    assert table.index.tolist() == [*FINDINGS, "mean"]
    expected = []
    for y, a, b in zip(labels.T, one.T, other.T, strict=True):
        known = ~np.isnan(y)
        expected.append(roc_auc_score(y[known], a[known]) - roc_auc_score(y[known], b[known]))
    np.testing.assert_allclose(table["difference"], [*expected, np.mean(expected)], atol=1e-12)
    np.testing.assert_allclose(table["auroc"] - table["other"], table["difference"], atol=1e-12)


def test_both_models_are_judged_in_the_same_resamples():
    """The interval of the difference is that over one draw of patients for both, written out."""
    labels, one, other, patients = two_models(40, better=0.3)
    table = paired_difference(labels, one, other, patients, resamples=2000)
    rng, apart = np.random.default_rng(9), []
    rows = [np.flatnonzero(patients == patient) for patient in range(40)]
    for _ in range(2000):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, 40, 40)])
        y, pair = labels[drawn, 0] == 1, (one[drawn, 0], other[drawn, 0])
        won = [(scores[y][:, None] > scores[~y]).mean() for scores in pair]  # no ties
        apart.append(won[0] - won[1])
    n = min(len(np.unique(patients[labels[:, 0] == value])) for value in (0, 1))
    half = student.ppf(0.975, n - 1) * np.std(apart) * np.sqrt(n / (n - 1))
    row = table.iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(
        (row["difference"] - half, row["difference"] + half), abs=0.005
    )
    assert row["low"] == pytest.approx(np.quantile(apart, 0.025), abs=0.015)
    assert ((table["p"] < 0.05) == ((table["low"] > 0) | (table["high"] < 0))).all()
    own = paired_difference(
        labels, one, np.random.default_rng(1).permutation(other), patients, resamples=200
    )
    assert (table["high"] - table["low"]).mean() < 0.8 * (own["high"] - own["low"]).mean()


def test_the_order_of_the_two_models_changes_the_sign_alone():
    labels, one, other, patients = two_models(better=0.2)
    there, back = (
        paired_difference(labels, *pair, patients, resamples=100)
        for pair in ((one, other), (other, one))
    )
    np.testing.assert_allclose(there["difference"], -back["difference"], atol=1e-12)
    np.testing.assert_allclose(there["low"], -back["high"], atol=1e-12)
    np.testing.assert_allclose(there["p"], back["p"], atol=1e-9)


def test_a_model_does_not_differ_from_itself():
    labels, one, _, patients = two_models()
    table = paired_difference(labels, one, one, patients, resamples=50)
    assert (table[["difference", "low", "high"]] == 0).all(axis=None)
    assert (table[["p", "p_holm"]] == 1).all(axis=None)


def test_a_real_difference_is_found():
    table = paired_difference(*two_models(200, better=1.0), resamples=200)
    assert (table["p_holm"] < 0.05).all() and (table["low"] > 0).all()


def test_models_that_differ_by_chance_are_rarely_called_different():
    """100 trials; the benchmark coverage.py has 500.

    With 5 % expected at most, 12 or more have a chance of 0.4 %.
    """
    called = 0
    for seed in range(100):
        table = paired_difference(*two_models(60, seed=seed), resamples=200, seed=seed)
        called += bool((table["p_holm"] < 0.05).any())
    assert called < 12


def test_holm_is_a_hand_worked_case():
    """0.01 x 4, 0.02 x 3, 0.03 x 2, then 0.04 x 1 raised to its predecessor; NaN is not counted."""
    np.testing.assert_allclose(
        holm([0.03, 0.01, np.nan, 0.04, 0.02]), [0.06, 0.04, np.nan, 0.06, 0.06]
    )
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])


def test_findings_with_too_few_patients_are_not_tested_and_do_not_weigh_on_the_others():
    labels, one, other, patients = two_models()
    labels[:, 13], labels[:, 12] = 0, 0
    labels[:3, 12] = 1
    table = paired_difference(labels, one, other, patients, resamples=50)
    columns = ["low", "high", "p", "p_holm"]
    assert table.loc[list(FINDINGS[12:]), columns].isna().all(axis=None)
    assert np.isnan(table.loc[FINDINGS[13], "difference"]) and np.isfinite(
        table.loc[FINDINGS[12], "difference"]
    )
    assert table["p_holm"].min() == pytest.approx(min(1, 13 * table["p"].min()))


def table_of(labels, scores, patients, *, order=slice(None)):
    frame = pd.DataFrame(
        {"image": [f"{i}.png" for i in range(len(labels))], "patient": patients, "part": "test"}
    )
    frame[[f"label_{f}" for f in FINDINGS]] = labels
    frame[[f"score_{f}" for f in FINDINGS]] = scores
    return frame.iloc[order]


def test_tables_are_matched_by_image_whatever_their_order():
    labels, one, other, patients = two_models(30)
    ours, theirs = (
        table_of(labels, one, patients),
        table_of(labels, other, patients, order=slice(None, None, -1)),
    )
    expected = paired_difference(labels, one, other, patients, resamples=20)
    pd.testing.assert_frame_equal(compare(ours, theirs, resamples=20), expected)


def test_tables_of_other_images_or_other_labels_are_refused():
    labels, one, other, patients = two_models(30)
    ours = table_of(labels, one, patients)
    with pytest.raises(DataError, match=r"1 images.*'0.png'"):
        compare(ours, table_of(labels, other, patients, order=slice(1, None)))
    with pytest.raises(DataError, match="other labels"):
        compare(ours, table_of(1 - labels, other, patients))
