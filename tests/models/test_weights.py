"""Each way of weights into a model: what fits is loaded and accounted for, what does not is an
error that names it.
"""

import re
import shutil

import h5py
import keras
import numpy as np
import pytest

from chexlib.errors import WeightsError
from chexlib.findings import FINDINGS
from chexlib.models.topologies import build_model
from chexlib.models.weights import create_model, load_weights, save_model

STEM, HEAD = "block1_conv1", "findings"
QUARTER = {"topology": "vgg16", "width": 0.25, "stem": "small"}


def weight(model, layer, name="kernel"):
    return next(v.numpy() for v in model.variables if v.path.endswith(f"{layer}/{name}"))


@pytest.fixture(scope="module")
def trained():
    """A quarter VGG-16 none of whose weights is as it was drawn."""
    model = build_model(**QUARTER, size=32, seed=1)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def bare(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "all.weights.h5"
    trained.save_weights(path)
    return path


def name_in(path, shape):
    """The one array of this shape in a file."""
    found = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.append(name) if getattr(item, "shape", None) == shape else None
        )
    assert len(found) == 1
    return found[0]


def changed(path, folder, *, drop=(), put=None):
    """A copy of a weights file without some arrays, and with others."""
    copy = folder / "changed.weights.h5"
    shutil.copy(path, copy)
    with h5py.File(copy, "a") as file:
        for name in (*drop, *(put or {})):
            if name in file:
                del file[name]
        for name, array in (put or {}).items():
            file[name] = array
    return copy


def test_every_weight_and_where_it_came_from_is_in_the_report(trained, bare):
    model = build_model(**QUARTER, size=64, seed=2)
    report = load_weights(model, bare)
    assert set(report["fate"]) == {"loaded"} and len(report) == len(model.weights) == 28
    assert (
        not report.duplicated(["layer", "weight"]).any() and not report["tensor"].duplicated().any()
    )
    with h5py.File(bare) as file:
        for row in report.itertuples():
            np.testing.assert_array_equal(
                weight(model, row.layer, row.weight), file[row.tensor][()]
            )
            np.testing.assert_array_equal(
                weight(model, row.layer, row.weight), weight(trained, row.layer, row.weight)
            )


def test_a_head_for_other_findings_is_drawn_anew_and_the_rest_loaded(trained, tmp_path):
    inputs = trained.input
    other = keras.Model(
        inputs,
        keras.layers.Dense(3, name="findings")(trained.get_layer("pool").output),
        name="vgg16",
    )
    card = {**QUARTER, "size": 32, "findings": ["Mass", "Cough", "Hernia"]}
    files = [save_model(other, tmp_path / "other.keras", card=card), tmp_path / "other.weights.h5"]
    other.save_weights(files[1])
    for file in files:
        model = create_model(**QUARTER, size=32, weights=str(file), seed=5)
        np.testing.assert_array_equal(weight(model, STEM), weight(trained, STEM))
        np.testing.assert_array_equal(
            weight(model, HEAD), weight(build_model(**QUARTER, size=32, seed=5), HEAD)
        )
        report = load_weights(model, file)
        assert report.loc[report["layer"] == HEAD, "fate"].tolist() == ["kept as it was"] * 2


def test_findings_in_another_order_do_not_pass_for_ours(trained, tmp_path):
    card = {**QUARTER, "size": 32, "findings": list(FINDINGS[::-1])}
    path = save_model(trained, tmp_path / "turned.keras", card=card)
    model = create_model(**QUARTER, size=32, weights=str(path), seed=5)
    assert not np.array_equal(weight(model, HEAD), weight(trained, HEAD))
    np.testing.assert_array_equal(weight(model, STEM), weight(trained, STEM))


def test_a_fresh_head_is_one_that_no_file_has_filled(trained, bare):
    model = create_model(**QUARTER, size=32, weights=str(bare), fresh_head=True, seed=5)
    assert not weight(model, HEAD, "bias").any()
    np.testing.assert_array_equal(weight(model, "block5_conv3"), weight(trained, "block5_conv3"))


def test_a_kernel_for_one_grey_channel_gives_the_same_response_to_a_grey_image(bare, tmp_path):
    grey = np.random.default_rng(1).normal(size=(3, 3, 1, 16)).astype(np.float32)
    path = changed(bare, tmp_path, put={name_in(bare, (3, 3, 3, 16)): grey})
    model = create_model(**QUARTER, size=32, weights=str(path))
    image = np.random.default_rng(2).normal(size=(1, 8, 8, 1)).astype(np.float32)
    ours = keras.ops.conv(np.repeat(image, 3, axis=-1), weight(model, STEM), padding="same")
    np.testing.assert_allclose(ours, keras.ops.conv(image, grey, padding="same"), atol=1e-4)
    report = load_weights(model, path)
    assert report.loc[report["layer"] == STEM, "fate"].str.contains("grey").sum() == 1


def test_what_is_left_over_is_an_error_unless_named(bare, tmp_path):
    path = changed(bare, tmp_path, put={"optimizer/vars/0": np.ones((2, 3))})
    model = build_model(**QUARTER, size=32)
    before = model.get_weights()
    with pytest.raises(
        WeightsError, match=re.escape("optimizer/vars/0 of shape (2, 3) is left over")
    ):
        load_weights(model, path)
    for ours, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, then)
    report = load_weights(model, path, unused=["optimizer/*"])
    assert report.iloc[-1][["tensor", "fate"]].tolist() == ["optimizer/vars/0", "left out"]


def test_what_is_missing_is_an_error_and_changes_nothing(bare, tmp_path):
    lost = name_in(bare, (3, 3, 3, 16))
    path = changed(bare, tmp_path, drop=[lost])
    model = build_model(**QUARTER, size=32, seed=3)
    with pytest.raises(
        WeightsError, match=rf"{STEM}/kernel needs \(3, 3, 3, 16\) and the file has nothing"
    ):
        load_weights(model, path)
    for kept, drawn in zip(
        model.get_weights(), build_model(**QUARTER, size=32, seed=3).get_weights(), strict=True
    ):
        np.testing.assert_array_equal(kept, drawn)


def test_weights_that_are_not_finite_are_refused(bare, tmp_path):
    path = changed(
        bare, tmp_path, put={name_in(bare, (3, 3, 3, 16)): np.full((3, 3, 3, 16), np.nan)}
    )
    with pytest.raises(WeightsError, match=f"{STEM}/kernel is not finite"):
        create_model(**QUARTER, size=32, weights=str(path))


def test_a_runs_folder_stands_for_its_model(vgg_file, tmp_path):
    own = build_model(**QUARTER, size=32, seed=1)
    for folder in (vgg_file.parent, vgg_file.parent.parent):
        model = create_model(**QUARTER, size=32, weights=str(folder), seed=4)
        np.testing.assert_array_equal(weight(model, HEAD), weight(own, HEAD))
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        shutil.copy(vgg_file, tmp_path / "two" / name / "model.keras")
    with pytest.raises(WeightsError, match=r"a/model\.keras, b/model\.keras"):
        create_model(**QUARTER, size=32, weights=str(tmp_path / "two"))
    (tmp_path / "pre" / "snapshots").mkdir(parents=True)
    shutil.copy(vgg_file, tmp_path / "pre" / "snapshots" / "step-000000004.keras")
    with pytest.raises(WeightsError, match=r"snapshots/step-000000004\.keras"):
        create_model(**QUARTER, size=32, weights=str(tmp_path / "pre"))
    with pytest.raises(WeightsError, match=r"has no model\.keras"):
        create_model(**QUARTER, size=32, weights=str(tmp_path))
