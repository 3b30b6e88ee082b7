"""What the card of the weights has: calibration and operating points, checked when they are read; and
the interval of a share. Notebook 09 fits them: test_cells_of_09.py.
"""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest, norm

from chexlib.errors import ChexlibError, ConfigError, WeightsError
from chexlib.evaluation.calibration import Calibration
from chexlib.evaluation.operating import RULES, OperatingPoints, read_by_card, share
from chexlib.findings import FINDINGS

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


@pytest.mark.parametrize("wrong", [90, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_a_rate_that_is_none_is_refused(name, wrong):
    with pytest.raises(ChexlibError, match=f"{name}={wrong!r}"):
        OperatingPoints(**{"sensitivity": 0.9, "specificity": 0.9, name: wrong}, thresholds={})


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
    scores = expit(np.random.default_rng(0).normal(-1.5, 1.5, (5, 14)))
    given = pd.DataFrame(scores, index=list("abcde"), columns=list(FINDINGS))
    falls = {"Mass": {"scores": [0, 1], "probabilities": [0, 0.5]}}
    chosen = {finding: dict(zip(RULES, (0.3, 0.1, 0.6), strict=True)) for finding in FINDINGS[3:]}
    points = OperatingPoints(0.9, 0.8, chosen)
    for calibration, expected in (
        (
            Calibration("temperature", {f: {"temperature": 2.0} for f in FINDINGS}),
            logit(scores) / 2,
        ),
        (Calibration("isotonic", falls), logit(np.where(np.arange(14) == 4, scores / 2, scores))),
    ):
        card = {"calibration": calibration.to_dict(), "operating_points": points.to_dict()}
        probabilities, called = read_by_card(given, json.loads(json.dumps(card)))
        np.testing.assert_allclose(probabilities, expit(expected), atol=1e-9)
        for image, row in given.iterrows():  # by the network's own scores
            for rule, names in called[image].items():
                assert names == [f for f in chosen if row[f] >= chosen[f][rule]]
    assert read_by_card(given, {})[0] is given and read_by_card(given, {})[1] == {}
