"""Calibration error, what mends it, and operating points: against other people's code and
hand-worked cases.
"""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest, norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix

from chexlib.errors import ChexlibError, ConfigError, WeightsError
from chexlib.evaluation.calibration import (
    Calibration,
    brier_difference,
    calibration_error,
    compare_calibrations,
    fit_calibration,
    reliability_curve,
)
from chexlib.evaluation.operating import (
    RULES,
    OperatingPoints,
    choose_points,
    rates_at,
    read_by_card,
    share,
)
from chexlib.findings import FINDINGS


def forecast(n=3000, *, temperature=1.0, seed=0):
    """Labels drawn from probabilities; scores whose logits are too large by `temperature`; a
    patient an image.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.5, 1.5, (n, 14))
    labels = (rng.random((n, 14)) < expit(logits)).astype(float)
    return labels, expit(logits * temperature), np.arange(n)


def test_reliability_curve_is_scikit_learns_over_quantiles():
    labels, scores, _ = forecast()
    ours = reliability_curve(labels[:, 0], scores[:, 0])
    observed, predicted = calibration_curve(
        labels[:, 0], scores[:, 0], n_bins=10, strategy="quantile"
    )
    np.testing.assert_allclose(ours["observed"], observed, atol=1e-12)
    np.testing.assert_allclose(ours["predicted"], predicted, atol=1e-12)
    assert ours["images"].tolist() == [300] * 10 and ours["positives"].sum() == labels[:, 0].sum()


def test_calibration_error_is_the_mean_distance_over_bins_and_brier_is_scikit_learns():
    labels, scores, patients = forecast(500, temperature=2)
    labels[:50, 3] = np.nan
    table = calibration_error(labels, scores, patients, resamples=20)
    for i, finding in enumerate(FINDINGS):
        known = ~np.isnan(labels[:, i])
        curve = reliability_curve(labels[:, i], scores[:, i])
        gap = (curve["observed"] - curve["predicted"]).abs()
        assert table.loc[finding, "ece"] == pytest.approx(
            (gap * curve["images"]).sum() / known.sum(), abs=1e-12
        )
        expected = brier_score_loss(labels[known, i], scores[known, i])
        assert table.loc[finding, "brier"] == pytest.approx(expected, abs=1e-12)
    assert table.loc["mean", "ece"] == pytest.approx(table["ece"].iloc[:14].mean())
    assert table.loc[FINDINGS[3], "images"] == 450


def test_interval_of_the_brier_score_is_that_of_its_mean_over_patients():
    labels, scores, patients = forecast(2000)
    table = calibration_error(labels, scores, patients, resamples=1000)
    squares = (labels[:, 0] - scores[:, 0]) ** 2
    half = 1.96 * squares.std() / np.sqrt(len(squares))
    assert table["brier_high"].iloc[0] - table["brier_low"].iloc[0] == pytest.approx(
        2 * half, rel=0.1
    )
    assert table["brier_low"].iloc[0] == pytest.approx(squares.mean() - half, rel=0.02)


def test_the_calibration_error_of_perfect_probabilities_is_the_one_that_chance_is_said_to_give():
    tables = [calibration_error(*forecast(1000, seed=seed), resamples=20) for seed in range(4)]
    found, expected = (
        np.mean([table.loc["mean", column] for table in tables]) for column in ("ece", "ece_chance")
    )
    assert found == pytest.approx(expected, rel=0.12)


def test_intervals_of_the_calibration_error_of_perfect_probabilities_hold_zero():
    """The plain error's held it in 0 of 100; here 14 findings and their mean in 20 samples."""
    tables = [calibration_error(*forecast(300, seed=seed), resamples=2) for seed in range(20)]
    begins = pd.concat([table["rms_low"] for table in tables], axis=1)
    assert (begins == 0).mean(axis=None) >= 0.93
    assert (begins.loc["mean"] == 0).sum() >= 17  # of 20; at 95 % fewer have a chance of 2 %


@pytest.mark.parametrize("temperature", [1.3, 3.0])
def test_intervals_of_the_calibration_error_hold_the_true_one(temperature):
    """True: the root mean square over bins of 200,000 images, where chance adds nothing."""
    labels, scores, _ = forecast(200_000, temperature=temperature, seed=99)
    curve = reliability_curve(labels[:, 0], scores[:, 0])
    true = np.sqrt(((curve["observed"] - curve["predicted"]) ** 2).mean())
    tables = [
        calibration_error(*forecast(500, temperature=temperature, seed=s), resamples=2)
        for s in range(15)
    ]
    held = [(table["rms_low"] <= true) & (true <= table["rms_high"]) for table in tables]
    assert (
        np.mean([one.iloc[:14] for one in held]) >= 0.93
        and np.mean([one["mean"] for one in held]) >= 0.8
    )
    squares = np.mean([np.square(table["rms"].iloc[:14]) for table in tables])
    assert (
        squares == pytest.approx(true**2, rel=0.2) or temperature < 2
    )  # 0 where it would be below


def test_the_brier_difference_is_that_of_scikit_learn_with_the_error_over_patients():
    labels, scores, patients = forecast(1500, temperature=2)
    labels[:100, 3] = np.nan
    better = expit(logit(scores) / 2)
    table = brier_difference(labels, better, scores, patients, resamples=1000)
    known = ~np.isnan(labels[:, 3])
    expected = [brier_score_loss(labels[known, 3], own[known, 3]) for own in (better, scores)]
    assert table.loc[FINDINGS[3], "difference"] == pytest.approx(
        expected[0] - expected[1], abs=1e-12
    )
    apart = (labels[known, 3] - better[known, 3]) ** 2 - (labels[known, 3] - scores[known, 3]) ** 2
    half = 1.96 * apart.std() / np.sqrt(known.sum())
    assert table.loc[FINDINGS[3], "high"] - table.loc[FINDINGS[3], "low"] == pytest.approx(
        2 * half, rel=0.1
    )
    assert table.loc["mean", "high"] < 0 and table.loc["mean", "p_holm"] < 0.001
    assert (brier_difference(labels, scores, scores, patients, resamples=20)["p"] == 1).all()


def test_a_calibration_that_changes_nothing_true_is_rarely_called_better():
    """Perfect probabilities and the same with noise that is as often up as down on the logits are
    told apart late.
    """
    called = 0
    for seed in range(60):
        labels, scores, patients = forecast(200, seed=seed)
        noise = np.random.default_rng(seed).normal(scale=0.02, size=(2, *scores.shape))
        one, other = (expit(logit(scores) + own) for own in noise)
        called += (
            brier_difference(labels, one, other, patients, resamples=100)["p_holm"] < 0.05
        ).any()
    assert called <= 8  # at 5 % of 60 more have a chance of 0.4 %


def test_patients_are_resampled_not_images():
    labels, scores, patients = forecast(400, temperature=2)
    once = calibration_error(labels, scores, patients, resamples=200)
    twice = [np.tile(labels, (2, 1)), np.tile(scores, (2, 1))]
    same = calibration_error(*twice, np.tile(patients, 2), resamples=200)
    columns = ["brier", "brier_low", "brier_high"]
    pd.testing.assert_frame_equal(same[columns], once[columns], atol=1e-12, rtol=0)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_temperature_that_spoiled_the_scores_is_found(true):
    labels, scores, patients = forecast(20000, temperature=true)
    found = fit_calibration(labels, scores, patients, method="temperature")
    temperatures = [found.curves[finding]["temperature"] for finding in FINDINGS]
    np.testing.assert_allclose(temperatures, true, rtol=0.02)
    middle = np.abs(scores[:, 5] - 0.5) < 0.4  # far from where logits are cut off
    expected = expit(logit(scores[middle, 5]) / temperatures[5])
    np.testing.assert_allclose(found(scores)[middle, 5], expected, atol=1e-12)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_fitted_on_one_half_betters_the_other_in_four_of_five_seeds(method):
    better = 0
    for seed in range(5):
        labels, scores, patients = forecast(temperature=2.5, seed=seed)
        half = len(labels) // 2
        fitted = fit_calibration(labels[:half], scores[:half], patients[:half], method=method)
        before, after = (
            calibration_error(labels[half:], s, patients[half:], resamples=2).loc["mean", "ece"]
            for s in (scores[half:], fitted(scores[half:]))
        )
        better += after < before
    assert better >= 4


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_calibration_goes_through_json_and_keeps_its_order_of_images(method):
    labels, scores, patients = forecast(600, temperature=2)
    fitted = fit_calibration(labels, scores, patients, method=method)
    again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again(scores), fitted(scores))
    order = np.argsort(scores[:, 0])
    assert (np.diff(fitted(scores)[order, 0]) >= 0).all()
    assert np.isfinite(fitted(np.array([np.zeros(14), np.ones(14)]))).all()


def test_the_calibration_to_carry_is_the_one_that_mends_what_is_wrong():
    labels, scores, patients = forecast(1000, temperature=2.5)
    chosen = compare_calibrations(labels, scores, patients).idxmin()
    assert chosen == "temperature"  # one number, learnt with less noise
    labels, scores, patients = forecast(3000)
    shifted = expit(logit(scores) + np.linspace(-2, 2, 14))  # which no temperature mends
    tried = compare_calibrations(labels, shifted, patients)
    assert tried.idxmin() == "isotonic"
    assert tried["as trained"] == pytest.approx(np.mean((labels - shifted) ** 2))


def test_calibrations_are_compared_on_patients_that_they_were_not_fitted_to():
    rng = np.random.default_rng(0)
    patients, scores = (
        np.repeat(np.arange(100), 20),
        np.tile(np.linspace(0.45, 0.55, 100).repeat(20)[:, None], 14),
    )
    labels = (
        rng.integers(0, 2, (100, 14)).repeat(20, axis=0).astype(float)
    )  # nothing to learn but who is who
    tried = compare_calibrations(labels, scores, patients)
    assert tried["isotonic"] > tried["as trained"]


def test_a_single_patient_leaves_the_scores_as_trained():
    labels, scores, _ = forecast(30)
    tried = compare_calibrations(labels, scores, np.zeros(30))
    assert tried.idxmin() == "as trained" and tried.isna().tolist() == [False, True, True]


def test_findings_with_too_few_patients_are_left_as_they_are():
    labels, scores, patients = forecast(300, temperature=2)
    labels[:, 13] = 0
    labels[:4, 13] = 1
    labels[:, 12] = 0
    labels[:10, 12] = 1
    fitted, points = (
        fit_calibration(labels, scores, patients, method="isotonic"),
        choose_points(labels, scores, patients),
    )
    assert set(points.thresholds) == set(FINDINGS[:13]) and set(fitted.curves) == set(FINDINGS[:12])
    np.testing.assert_array_equal(fitted(scores)[:, 12:], scores[:, 12:])
    assert set(fit_calibration(labels, scores, patients).curves) == set(FINDINGS)


BAD_TEMPERATURES = (0, -1, np.inf, np.nan, "2", None, True, [1.0], {"a": 1})
BAD_CURVES = (
    ([], []),
    ([0.1, 0.2], [0.1]),
    ([0.2, 0.1], [0.1, 0.2]),
    ([0.1, 0.2], [0.2, 0.1]),
    ([0.1, 0.2], [0.1, 1.1]),
    ([0.1, 0.2], [-0.1, 0.2]),
    ([0.1, np.nan], [0.1, 0.2]),
    ([0.1, [0.2]], [0.1, 0.2]),
    ([[0.1]], [[0.1]]),
    (0.1, 0.1),
    ("ab", "cd"),
    ([0.1, 0.2] * 5000, [0.2, 0.1] * 5000),
)


@pytest.mark.parametrize(
    "values",
    [
        {},
        None,
        {"method": "magic", "curves": {}},
        {"method": "temperature", "curves": {"Cold": {"temperature": 1}}},
        {"method": "temperature", "curves": {"Mass": {"scores": [0, 1]}}},
        {"method": "temperature", "curves": {"Mass": {"temperature": "nan"}}},
        *(
            {"method": "temperature", "curves": {"Mass": {"temperature": t}}}
            for t in BAD_TEMPERATURES
        ),
        *(
            {"method": "isotonic", "curves": {"Mass": {"scores": s, "probabilities": p}}}
            for s, p in BAD_CURVES
        ),
        {"method": "isotonic", "curves": {"Mass": [0, 1]}},
        {"method": "isotonic", "curves": {"Mass": None}},
        {"method": "isotonic", "curves": "Mass"},
        {"method": ["isotonic"], "curves": {}},
        "temperature",
        [1.5],
    ],
)
def test_what_is_no_calibration_is_refused(values):
    with pytest.raises(ConfigError, match="calibration"):
        Calibration.from_dict(values)
    card = {"calibration": values or "none"}
    with pytest.raises(WeightsError, match=r"m\.keras cannot be followed: .*calibration") as error:
        read_by_card(pd.DataFrame(columns=list(FINDINGS)), card, weights="m.keras")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match=r"'platt'.*temperature, isotonic"):
        fit_calibration(*forecast(50), method="platt")


def by_hand():
    """One finding with scores 1 to 10 tenths, positives at 3, 7, 8, 9, 10; the other 13 alike."""
    scores = np.tile(np.arange(1, 11)[:, None] / 10, (1, 14))
    labels = np.isin(np.arange(1, 11), [3, 7, 8, 9, 10]).astype(float)[:, None].repeat(14, axis=1)
    return labels, scores, np.arange(10)


@pytest.mark.parametrize("wrong", [90, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_a_rate_that_is_none_is_refused(name, wrong):
    with pytest.raises(ChexlibError, match=f"{name}={wrong!r}"):
        choose_points(*by_hand(), **{name: wrong})


def test_operating_points_of_a_hand_worked_case():
    """From 0.7 on 4 of 5 positives and no negative; from 0.6 on one negative of 5; from 0.3 on all
    positives.
    """
    chosen = choose_points(*by_hand(), sensitivity=0.9, specificity=0.9).thresholds["Mass"]
    assert chosen == {"youden": 0.7, "sensitivity": 0.3, "specificity": 0.7}
    chosen = choose_points(*by_hand(), sensitivity=0.8, specificity=0.8).thresholds["Mass"]
    assert chosen == {"youden": 0.7, "sensitivity": 0.7, "specificity": 0.6}


def test_operating_points_hold_on_validation_what_they_ask_for():
    labels, scores, patients = forecast(1000)
    table = rates_at(
        labels,
        scores,
        patients,
        choose_points(labels, scores, patients, sensitivity=0.85, specificity=0.95),
    )
    assert (table.xs("sensitivity", level="rule")["sensitivity"] >= 0.85).all()
    assert (table.xs("specificity", level="rule")["specificity"] >= 0.95).all()
    youden = table["sensitivity"] + table["specificity"]
    assert (youden.xs("youden", level="rule") >= youden.xs("sensitivity", level="rule")).all()


def test_a_specificity_that_no_score_reaches_calls_nobody_and_is_plain_json():
    labels, scores, patients = by_hand()
    points = choose_points(1 - labels, scores, patients)  # the highest scores are all negative
    table = rates_at(1 - labels, scores, patients, points).loc[("Mass", "specificity")]
    assert table["tp"] == table["fp"] == 0 and np.isnan(table["ppv"])
    assert (
        OperatingPoints.from_dict(json.loads(json.dumps(points.to_dict(), allow_nan=False)))
        == points
    )


def test_rates_are_scikit_learns_confusion():
    labels, scores, patients = forecast(400)
    labels[:40, 0] = np.nan
    points = choose_points(labels, scores, patients)
    row = rates_at(labels, scores, patients, points).loc[(FINDINGS[0], "youden")]
    known = ~np.isnan(labels[:, 0])
    called = scores[known, 0] >= row["threshold"]
    tn, fp, fn, tp = confusion_matrix(labels[known, 0], called).ravel()
    assert row[["tn", "fp", "fn", "tp"]].tolist() == [tn, fp, fn, tp]
    expected = [tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn)]
    np.testing.assert_allclose(
        row[["sensitivity", "specificity", "ppv", "npv"]].astype(float), expected
    )


@pytest.mark.parametrize(("k", "n"), [(0, 12), (12, 12), (5, 40), (90, 300)])
def test_interval_of_a_share_is_wilsons_when_each_patient_has_one_image(k, n):
    successes = np.r_[np.ones(k, int), np.zeros(n - k, int)]
    p, low, high = share(successes, np.arange(n))
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert p == k / n
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_interval_of_a_share_counts_patients_not_images():
    """30 patients with 10 images each that all agree are worth 30 images."""
    patients = np.arange(30)
    many = share(np.repeat(patients < 12, 10), np.repeat(patients, 10))
    one = share(patients < 12, patients)
    assert many == pytest.approx(one, abs=0.02)
    assert many[1] < one[1] and many[2] > one[2]  # their variance had to be estimated
    assert np.isnan(share(np.zeros(0, bool), np.zeros(0, int))).all()


def test_a_share_of_four_patients_has_no_interval():
    successes = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    p, low, high = share(successes, np.repeat(np.arange(4), [1, 2, 3, 4]))
    assert p == 0.6 and np.isnan([low, high]).all()


@pytest.mark.parametrize("true", [0.5, 0.8])
def test_a_share_lies_in_its_interval_however_unequal_the_patients_are(true):
    """12 patients with 1 to 20 images that are alike; Wilson's with the plain variance held 0.88 to
    0.91.
    """
    rng, held = np.random.default_rng(0), []
    for _ in range(600):
        images = np.ceil(20 ** rng.random(12)).astype(int)
        patients = np.repeat(np.arange(12), images)
        noise = np.sqrt(0.5) * (rng.normal(size=12)[patients] + rng.normal(size=len(patients)))
        _, low, high = share(noise < norm.ppf(true), patients)
        held.append(low <= true <= high)
    assert np.mean(held) >= 0.93


@pytest.mark.parametrize(
    "values",
    [
        {"sensitivity": 2, "specificity": 0.9, "thresholds": {}},
        {"sensitivity": 0.9, "specificity": 0.9, "thresholds": {"Cold": {}}},
        {"sensitivity": 0.9, "specificity": 0.9, "thresholds": {"Mass": {"youden": 0.1}}},
        {"sensitivity": 0.9, "specificity": 0.9, "thresholds": {"Mass": dict.fromkeys(RULES, "x")}},
        {"sensitivity": 0.9, "specificity": 0.9, "thresholds": {"Mass": [0.1, 0.2, 0.3]}},
        {"sensitivity": "0.9", "specificity": 0.9, "thresholds": {}},
        {"thresholds": {}},
        [0.9],
    ],
)
def test_what_are_no_operating_points_is_refused(values):
    with pytest.raises(ConfigError, match=r"operating points|sensitivity"):
        OperatingPoints.from_dict(values)
    with pytest.raises(WeightsError, match=r"m\.keras cannot be followed"):
        read_by_card(
            pd.DataFrame(columns=list(FINDINGS)), {"operating_points": values}, weights="m.keras"
        )


def test_a_card_calibrates_scores_and_says_which_findings_are_called():
    labels, scores, patients = forecast(temperature=2.0)
    fitted, points = (
        fit_calibration(labels, scores, patients),
        choose_points(labels, scores, patients),
    )
    sharp = fitted.curves["Mass"]["temperature"]
    card = json.loads(
        json.dumps({"calibration": fitted.to_dict(), "operating_points": points.to_dict()})
    )
    given = pd.DataFrame(scores[:5], index=list("abcde"), columns=list(FINDINGS))
    probabilities, called = read_by_card(given, card)
    np.testing.assert_allclose(probabilities, expit(logit(scores[:5]) / sharp), atol=1e-9)
    for image, row in given.iterrows():
        for rule, names in called[image].items():
            assert names == [
                f
                for f in FINDINGS
                if f in points.thresholds and row[f] >= points.thresholds[f][rule]
            ]
    assert read_by_card(given, {})[0] is given and read_by_card(given, {})[1] == {}
