"""What notebook 09 writes in its cells: its functions, held against scikit-learn and cases by hand."""

import ast
import json

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from chexlib.app.execute import find_notebooks
from chexlib.data.nih import load_radiographs
from chexlib.data.splits import audit
from chexlib.evaluation.calibration import Calibration
from chexlib.evaluation.operating import OperatingPoints
from chexlib.findings import FINDINGS

LIBRARIES = {"numpy", "pandas", "scipy", "sklearn", "chexlib.evaluation.calibration"}


@pytest.fixture(scope="module")
def cells():
    """The functions of notebook 09 by name, and what they read of its other cells."""
    (path,) = find_notebooks(["09"])
    names = {"findings": list(FINDINGS), "seed": 0, "sensitivity": 0.9, "specificity": 0.9}
    for cell in nbformat.read(path, as_version=4).cells:
        for node in ast.parse(cell.source).body if cell.cell_type == "code" else ():
            modules = [alias.name for alias in getattr(node, "names", [])]
            modules = [getattr(node, "module", None) or name for name in modules]
            ours = any(m in LIBRARIES or m.split(".")[0] in LIBRARIES for m in modules)
            if isinstance(node, ast.FunctionDef) or ours:
                exec(compile(ast.Module([node], []), path.stem, "exec"), names)
    return names


def forecast(n=3000, *, temperature=1.0, seed=0):
    """Labels drawn from probabilities; scores whose logits are too large by `temperature`; a
    patient an image.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.5, 1.5, (n, 14))
    labels = (rng.random((n, 14)) < expit(logits)).astype(float)
    return labels, expit(logits * temperature), np.arange(n)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_temperature_that_spoiled_the_scores_is_found(cells, true):
    labels, scores, patients = forecast(20000, temperature=true)
    fitted = cells["fit_temperature"](labels, scores, patients)
    temperatures = [fitted.curves[finding]["temperature"] for finding in FINDINGS]
    np.testing.assert_allclose(temperatures, true, rtol=0.02)
    middle = np.abs(scores[:, 5] - 0.5) < 0.4  # far from where logits are cut off
    expected = expit(logit(scores[middle, 5]) / temperatures[5])
    np.testing.assert_allclose(fitted(scores)[middle, 5], expected, atol=1e-12)


@pytest.mark.parametrize("method", ["fit_temperature", "fit_isotonic"])
def test_calibration_fitted_on_one_half_betters_the_other_in_four_of_five_seeds(cells, method):
    better = 0
    for seed in range(5):
        labels, scores, patients = forecast(temperature=2.5, seed=seed)
        fitted = cells[method](labels[:1500], scores[:1500], patients[:1500])
        before, after = (
            cells["calibration_error"](labels[1500:].ravel(), own.ravel())
            for own in (scores[1500:], fitted(scores[1500:]))
        )
        better += after < before
    assert better >= 4


@pytest.mark.parametrize("method", ["fit_temperature", "fit_isotonic"])
def test_a_calibration_goes_through_json_and_keeps_its_order_of_images(cells, method):
    labels, scores, patients = forecast(600, temperature=2)
    fitted = cells[method](labels, scores, patients)
    again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again(scores), fitted(scores))
    order = np.argsort(scores[:, 0])
    assert (np.diff(fitted(scores)[order, 0]) >= 0).all()
    assert np.isfinite(fitted(np.array([np.zeros(14), np.ones(14)]))).all()


def test_findings_with_too_few_patients_are_left_as_they_are(cells):
    labels, scores, patients = forecast(300, temperature=2)
    labels[:, 12:] = 0
    labels[:19, 12] = labels[:1, 13] = 1
    fitted = cells["fit_isotonic"](labels, scores, patients)
    assert set(fitted.curves) == set(FINDINGS[:12])
    np.testing.assert_array_equal(fitted(scores)[:, 12:], scores[:, 12:])
    # Twenty images of one patient are one patient.
    patients[labels[:, 3] == 1] = 0
    assert FINDINGS[3] not in cells["fit_isotonic"](labels, scores, patients).curves


def test_calibration_error_is_the_mean_distance_of_scikit_learns_bins(cells):
    labels, scores, _ = forecast(500, temperature=2)
    y, p = labels[:, 0], scores[:, 0]
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy="quantile")
    expected = np.mean(np.abs(observed - predicted))  # 50 images in each
    assert cells["calibration_error"](y, p) == pytest.approx(expected, abs=1e-12)
    two = cells["calibration_error"](np.array([0, 1]), np.array([0.2, 0.6]), bins=2)
    assert two == pytest.approx(0.3)


def test_change_of_the_brier_score_is_scikit_learns_with_the_error_over_patients(cells):
    labels, scores, patients = forecast(1500, temperature=2)
    better = expit(logit(scores) / 2)
    cells |= {"labels": labels, "scores": scores, "patients": patients}
    change, low, high = cells["change_of_brier"](better)
    flat = [brier_score_loss(labels.ravel(), own.ravel()) for own in (better, scores)]
    assert change == pytest.approx(flat[0] - flat[1], abs=1e-12)
    apart = ((labels - better) ** 2 - (labels - scores) ** 2).mean(axis=1)
    half = 1.96 * apart.std() / np.sqrt(len(apart))
    assert (low, high) == pytest.approx((change - half, change + half), abs=0.1 * half)
    # Each image twice, of the same patients: no evidence is added.
    twice = {"labels": labels, "scores": scores, "patients": patients}
    cells |= {name: np.concatenate([own, own]) for name, own in twice.items()}
    again = cells["change_of_brier"](np.concatenate([better, better]))
    assert again == pytest.approx([change, low, high], abs=1e-9)


def test_the_bootstrap_draws_patients_with_all_of_their_images(cells):
    rng = np.random.default_rng(0)
    y = np.repeat(rng.integers(0, 2, 80), 4)
    s = y + np.repeat(rng.normal(size=80), 4)
    patients = np.repeat(np.arange(80), 4)
    one = cells["bootstrap_auroc"](y[::4], s[::4], patients[::4])
    four = cells["bootstrap_auroc"](y, s, patients)
    np.testing.assert_allclose(four, one, atol=1e-12)
    by_image = cells["bootstrap_auroc"](y, s, np.arange(320))
    assert by_image.std() < 0.65 * four.std()
    assert four.mean() == pytest.approx(roc_auc_score(y, s), abs=3 * four.std() / np.sqrt(300))


def test_thresholds_of_a_hand_worked_case(cells):
    """Of scores 0.1 to 1.0 with positives at 3, 7, 8, 9 and 10: from 0.7 on 4 of 5 positives and no
    negative; from 0.6 on one negative of 5; from 0.3 on all positives.
    """
    s, y = np.arange(1, 11) / 10, np.isin(np.arange(1, 11), [3, 7, 8, 9, 10]).astype(float)
    found = cells["thresholds_of"](y, s)
    assert found == {"youden": 0.7, "sensitivity": 0.3, "specificity": 0.7}
    found = cells["thresholds_of"](1 - y, s)  # the highest scores are all negative
    assert 1 < found["specificity"] < 1 + 1e-9  # so nobody is called
    points = OperatingPoints(0.9, 0.9, {"Mass": found})
    plain = json.dumps(points.to_dict(), allow_nan=False)
    assert OperatingPoints.from_dict(json.loads(plain)) == points


def test_thresholds_hold_on_validation_what_they_ask_for(cells):
    labels, scores, _ = forecast(1000)
    for y, s in zip(labels.T, scores.T, strict=True):
        found = cells["thresholds_of"](y, s)
        assert (s[y == 1] >= found["sensitivity"]).mean() >= 0.9
        assert (s[y == 0] < found["specificity"]).mean() >= 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_leaking_lists_share_test_images_and_size_but_not_patients(cells, phantom, seed):
    data = load_radiographs(phantom)
    train, tested = cells["leaking_lists"](data.table, seed)
    assert list(train) == ["by image", "by patient"]
    assert len(train["by image"]) == len(train["by patient"]) == len(set(train["by image"]))
    assert not audit({"train": train["by patient"], "test": tested}, data).leaks
    leaking = {"train": train["by image"], "test": tested}
    found = audit(leaking, data, allow_leak=True)
    assert found.shared["patients"].item() == found.patients["test"] and not found.duplicates


def test_the_hottest_place_lies_in_a_box_or_not(cells):
    boxes = pd.DataFrame({"x": [0.5], "y": [0.0], "width": [0.25], "height": [0.5]})
    heat = np.zeros((4, 4))
    assert not cells["in_box"](heat, boxes)  # it points nowhere
    for row, column, inside in ((0, 2, True), (1, 2, True), (2, 2, False), (0, 3, False)):
        one = heat.copy()
        one[row, column] = 1
        assert cells["in_box"](one, boxes) == inside
