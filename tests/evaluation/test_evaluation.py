"""AUROC as scikit-learn computes it; intervals that count patients, not images."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import norm
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score

from chexlib.errors import DataError
from chexlib.evaluation.auroc import Ranking, auroc, bootstrap_auroc, in_words, judge
from chexlib.evaluation.intervals import with_interval
from chexlib.files import ROOT
from chexlib.findings import FINDINGS


def case(n_patients, *, images_each=1, seed=0, defined=14, signal=1.0):
    """Labels, scores and patients; findings from `defined` on have no positive."""
    rng = np.random.default_rng(seed)
    n = n_patients * images_each
    labels = (rng.random((n, len(FINDINGS))) < 0.3).astype(np.int8)
    labels[0], labels[1] = 1, 0
    labels[:, defined:] = 0
    scores = rng.normal(size=labels.shape) + signal * labels
    return labels, scores, np.repeat(np.arange(n_patients), images_each)


def width(table):
    return float((table["high"] - table["low"]).mean())


@pytest.mark.parametrize("seed", range(200))
def test_auroc_and_average_precision_are_scikit_learns_with_ties_weights_and_missing_labels(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    labels = rng.integers(0, 2, n)
    labels[:2] = 0, 1
    scores = (
        rng.integers(0, rng.integers(1, 30), n) / 7
    )  # few values: many ties; one value: all tied
    if seed % 3 == 0:
        scores = rng.normal(size=n).astype(np.float32)
    weights = rng.integers(0, 4, (3, n)).astype(float) if seed % 2 else rng.random((3, n))
    weights[:, :2] += 0.5  # both classes weigh something
    known = rng.random(n) < 0.8
    known[:2] = True
    given = np.where(known, labels, np.nan) if seed % 4 else labels  # NaN: nobody knows
    y, s, w = (
        (labels, scores, weights)
        if seed % 4 == 0
        else (labels[known], scores[known], weights[:, known])
    )
    assert auroc(given, scores) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    found = Ranking(given, scores).measure(weights.T)
    for ours, theirs in zip(found, (roc_auc_score, average_precision_score), strict=True):
        expected = [theirs(y, s, sample_weight=one) for one in w]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_auroc_of_a_hand_worked_case():
    # Pairs (positive, negative): 3>1, 3=3 counts half, 2>1, 2<3: (1 + 0.5 + 1 + 0) / 4
    assert auroc([1, 1, 0, 0], [3, 2, 1, 3]) == 0.625
    assert auroc([0, 1], [0.1, 0.9]) == 1
    assert auroc([0, 1], [0.9, 0.1]) == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint64, np.int8, np.int64, bool])
def test_scores_may_be_whole_numbers_or_calls(kind):
    rng, ends = (
        np.random.default_rng(0),
        (0, 1) if kind is bool else (np.iinfo(kind).min, np.iinfo(kind).max),
    )
    labels, scores = rng.integers(0, 2, 200), np.array(ends, kind)[rng.integers(0, 2, 200)]
    if kind is not bool:
        scores[:100] = rng.integers(0, 100, 100)
    order = np.unique(scores, return_inverse=True)[1].astype(float)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, order), abs=1e-12)
    _, precision = Ranking(labels, scores).measure(np.ones((len(labels), 1)))
    assert precision == pytest.approx(average_precision_score(labels, order), abs=1e-12)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_one_class_only_is_undefined(labels):
    assert np.isnan(auroc(labels, [0.1, 0.2, 0.3]))


def test_a_class_without_weight_is_undefined_in_that_resample_alone():
    weights = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0]], float)
    values, _ = Ranking([1, 0, 0], [0.5, 0.2, 0.3]).measure(weights.T)
    np.testing.assert_array_equal(values, [1, np.nan, np.nan])


def test_a_label_that_is_neither_known_nor_unknown_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"-1\.0.*Accepted: 1, 0, and NaN"):
        auroc([0, 1, -1], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_an_error_with_their_number(bad):
    with pytest.raises(DataError, match=r"\b2 scores"):
        auroc([0, 1, 1], [bad, 0.5, bad])


def test_table_has_every_finding_and_their_mean_with_positives_and_negatives():
    labels, scores, patients = case(60)
    table = bootstrap_auroc(labels, scores, patients, resamples=50)
    assert table.index.tolist() == [*FINDINGS, "mean"]
    assert table.columns.tolist() == [
        "auroc",
        "low",
        "high",
        "ap",
        "ap_low",
        "ap_high",
        "positives",
        "negatives",
    ]
    expected = [roc_auc_score(y, s) for y, s in zip(labels.T, scores.T, strict=True)]
    np.testing.assert_allclose(table["auroc"], [*expected, np.mean(expected)], atol=1e-12)
    assert table["positives"].tolist()[:-1] == labels.sum(0).tolist()
    assert (table["positives"] + table["negatives"]).tolist()[:-1] == [60] * 14
    assert (table["low"] <= table["auroc"]).all()
    assert (table["auroc"] <= table["high"]).all()
    assert (table["low"] < table["high"]).all()
    assert (table["ap_low"] <= table["ap"]).iloc[:14].all() and (
        table["ap"] <= table["ap_high"]
    ).iloc[:14].all()
    assert (
        table.loc["mean", ["ap_low", "ap_high"]].isna().all()
    )  # its bias is larger than they would be wide


def test_undefined_findings_stay_in_the_table_with_their_counts_and_out_of_the_mean():
    labels, scores, patients = case(50, defined=12)
    labels[:, 13] = 1
    table = bootstrap_auroc(labels, scores, patients, resamples=30)
    assert table.loc[[FINDINGS[12], FINDINGS[13]], ["auroc", "low", "high"]].isna().all(axis=None)
    assert table.loc[FINDINGS[12], ["positives", "negatives"]].tolist() == [0, 50]
    assert table.loc[FINDINGS[13], ["positives", "negatives"]].tolist() == [50, 0]
    assert table.loc["mean", "auroc"] == pytest.approx(table["auroc"].iloc[:12].mean(), abs=1e-12)
    assert table.loc["mean", ["low", "high"]].notna().all()


def test_no_finding_defined_gives_a_table_of_undefined_values():
    table = bootstrap_auroc(
        np.zeros((4, 14)), np.random.default_rng(0).random((4, 14)), np.arange(4), resamples=5
    )
    assert table[["auroc", "low", "high"]].isna().all(axis=None)
    assert len(table) == 15


def test_interval_narrows_with_more_patients():
    few, many = (bootstrap_auroc(*case(n, seed=1), resamples=200) for n in (50, 800))
    assert width(many) < 0.5 * width(few)


def effective(patients):
    """Kish's number of equally large patients, written out."""
    images = np.bincount(patients)
    return images.sum() ** 2 / (images**2).sum()


def test_interval_has_the_error_of_the_logit_of_auroc_over_resampled_patients():
    labels, scores, patients = case(40, images_each=3)
    table = bootstrap_auroc(labels, scores, patients, resamples=10000, seed=1)
    rng, values = np.random.default_rng(7), []
    rows = [np.flatnonzero(patients == patient) for patient in range(40)]
    for _ in range(10000):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, 40, 40)])
        y, s = labels[drawn, 0], scores[drawn, 0]
        values.append((s[y == 1][:, None] > s[y == 0]).mean())  # no ties
    area, n = (
        table["auroc"].iloc[0],
        min(effective(patients[labels[:, 0] == value]) for value in (0, 1)),
    )
    error = np.std(logit(values)) * np.sqrt(n / (n - 1))
    reach = student.ppf(0.975, n - 1) * error
    # Two independent bootstraps of 10,000: their standard errors differ by about 1 %.
    assert table.loc[FINDINGS[0], "low"] == pytest.approx(expit(logit(area) - reach), abs=0.004)
    assert table.loc[FINDINGS[0], "high"] == pytest.approx(expit(logit(area) + reach), abs=0.004)


def test_an_auroc_at_its_end_or_near_it_has_an_interval_that_few_patients_deserve():
    labels, scores, patients = case(60)
    scores[:, 0] = labels[:, 0]  # perfect
    scores[:, 1] = np.arange(60) + 100 * labels[:, 1]
    scores[np.flatnonzero(labels[:, 1] == 0)[0], 1] = 130.5  # one negative is above some positives
    table = bootstrap_auroc(labels, scores, patients, resamples=200)
    perfect, near = table.iloc[0], table.iloc[1]
    n = min(labels[:, 0].sum(), 60 - labels[:, 0].sum())
    assert perfect["auroc"] == perfect["high"] == 1
    assert perfect["low"] == pytest.approx(n / (n + student.ppf(0.975, n - 1) ** 2))
    assert perfect["low"] < near["auroc"] and near["low"] < near["auroc"] < near["high"] < 1


def few_positives(seed, *, auroc=0.97, n_patients=200):
    """One to three images per patient, alike within one; about 12 patients with the finding; scores
    of a known AUROC.
    """
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), rng.integers(1, 4, n_patients))

    def errors():
        own = rng.normal(size=(n_patients, 14))[patients]
        return np.sqrt(0.5) * (own + rng.normal(size=(len(patients), 14)))

    labels = (errors() < norm.ppf(0.04)).astype(float)
    return labels, np.sqrt(2) * norm.ppf(auroc) * labels + errors(), patients


def test_a_high_auroc_of_few_patients_lies_in_its_interval():
    """Of 40 x 14 intervals at a true AUROC of 0.97 at least 93 %: Wilson's with the bootstrap's
    error held 92.
    """
    held = []
    for seed in range(40):
        table = (
            bootstrap_auroc(*few_positives(seed), resamples=150, seed=seed)
            .iloc[:14]
            .dropna(subset="low")
        )
        held += list((table["low"] <= 0.97) & (table["high"] >= 0.97))
    assert np.mean(held) >= 0.93 and len(held) > 400


def test_patients_are_drawn_not_images():
    labels, scores, patients = case(60)
    once = bootstrap_auroc(labels, scores, patients, resamples=200, seed=4)
    twice = [np.tile(labels, (2, 1)), np.tile(scores, (2, 1))]
    same = bootstrap_auroc(*twice, np.tile(patients, 2), resamples=200, seed=4)
    other = bootstrap_auroc(*twice, np.r_[patients, patients + 60], resamples=200, seed=4)
    columns = ["auroc", "low", "high"]
    pd.testing.assert_frame_equal(same[columns], once[columns], atol=1e-12, rtol=0)
    assert width(other) < 0.85 * width(once)


def test_images_without_a_label_count_in_neither_class_nor_in_any_resample():
    labels, scores, patients = case(60, images_each=2)
    known = np.random.default_rng(3).random(len(labels)) < 0.7
    given = np.where(known[:, None], labels, np.nan)
    table = bootstrap_auroc(given, scores, patients, resamples=50)
    fewer = bootstrap_auroc(labels[known], scores[known], patients[known], resamples=50)
    points = ["auroc", "ap", "positives", "negatives"]
    pd.testing.assert_frame_equal(table[points], fewer[points], atol=1e-12, rtol=0)
    everything = bootstrap_auroc(
        np.where(known[:, None], labels, 1 - labels), scores, patients, resamples=50
    )
    assert not np.allclose(table["low"], everything["low"])


def test_the_log_names_findings_without_auroc_and_without_interval(caplog):
    labels, scores, patients = case(60, defined=13)
    labels[:, 12] = 0
    labels[:3, 12] = 1
    with caplog.at_level("INFO", logger="chexlib"):
        bootstrap_auroc(labels, scores, patients, resamples=5)
    undefined, rare = caplog.messages
    assert (
        "one class only" in undefined
        and FINDINGS[13] in undefined
        and FINDINGS[12] not in undefined
    )
    assert "no interval" in rare and FINDINGS[12] in rare


def test_names_of_patients_do_not_matter():
    labels, scores, patients = case(30, images_each=2)
    numbers = bootstrap_auroc(labels, scores, patients, resamples=20)
    names = bootstrap_auroc(labels, scores, np.array([f"p{p}" for p in patients]), resamples=20)
    pd.testing.assert_frame_equal(numbers, names)


def test_seed_decides_the_interval():
    labels, scores, patients = case(40)
    tables = [
        bootstrap_auroc(labels, scores, patients, resamples=50, seed=seed) for seed in (1, 1, 2)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not np.allclose(tables[0]["low"], tables[2]["low"])


@pytest.mark.parametrize("resamples", [1, 99, 100, 101])
def test_any_number_of_resamples_works(resamples):
    table = bootstrap_auroc(*case(200), resamples=resamples)
    assert table[["low", "high"]].notna().all(axis=None)


def predictions_table():
    labels, scores, patients = case(80)
    frame = pd.DataFrame({"image": [f"{i}.png" for i in range(80)], "patient": patients})
    frame["part"] = np.where(np.arange(80) < 30, "validation", "test")
    frame[[f"label_{f}" for f in FINDINGS]] = labels
    frame[[f"score_{f}" for f in reversed(FINDINGS)]] = scores[:, ::-1]  # columns are found by name
    return frame, labels, scores, patients


@pytest.mark.parametrize(
    ("part", "rows"), [("test", slice(30, None)), ("validation", slice(0, 30))]
)
def test_judging_predictions_looks_at_one_part_alone(part, rows):
    frame, labels, scores, patients = predictions_table()
    expected = bootstrap_auroc(labels[rows], scores[rows], patients[rows], resamples=25, seed=3)
    pd.testing.assert_frame_equal(judge(frame, part=part, resamples=25, seed=3), expected)


def test_an_unknown_part_is_an_error_that_lists_the_parts():
    with pytest.raises(DataError, match=r"'train'.*validation.*test"):
        judge(predictions_table()[0], part="train")


def test_an_interval_that_is_not_there_is_said_in_words():
    assert with_interval(0.25, 0.125, 0.5) == "0.250 (0.125 to 0.500)"
    assert with_interval(0.25, -0.125, 0.5, "+.2f") == "+0.25 (-0.12 to +0.50)"
    assert with_interval(0.25, np.nan, np.nan) == "0.250 (no interval)"
    assert with_interval(np.nan, np.nan, np.nan, ".2f") == "undefined"
    row = {"auroc": 0.9, "low": None, "high": None}
    assert in_words(row) == "0.900 (too few patients for an interval)"


def test_no_interval_is_made_of_percentiles():
    """They held 88 to 91 % where few patients have a finding."""
    for path in sorted((ROOT / "chexlib").rglob("*.py")):
        assert not re.search(r"(quantile|percentile)\(", path.read_text()), path
