"""Heat maps are what their papers define, point where the signal is, and are held against boxes as
worked by hand.
"""

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import norm

from benchmarks.localization import judge_boxes, localize, score_boxes
from chexlib.data.nih import load_radiographs
from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.explain import METHODS, heat_maps
from chexlib.figures.judgement import HeatMapFiles, heat_figure
from chexlib.findings import FINDINGS
from chexlib.models.topologies import TOPOLOGIES, build_model
from chexlib.models.weights import combine_models, load_model

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (3, 64, 64, 1)).astype(np.float32)
ASKED = ["Mass", "Hernia", "Mass"]


def enlarged(maps, size):
    """Bilinear, half-pixel centres, as 0..1."""
    maps = [
        np.asarray(
            Image.fromarray(m.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
        )
        for m in maps
    ]
    return np.stack([m / max(m.max(), 1e-30) for m in maps])


@pytest.fixture(scope="module", params=TOPOLOGIES)
def model(request):
    model = build_model(request.param, size=64, width=0.25, blocks=2, seed=2)
    kernel, bias = model.get_layer("findings").get_weights()
    model.get_layer("findings").set_weights([RNG.normal(size=kernel.shape), bias])  # of both signs
    return model


def test_on_the_last_layer_grad_cam_is_features_times_the_outputs_weights(model):
    features = keras.Model(model.input, model.get_layer("pool").input)
    features = features(PIXELS, training=False).numpy().astype(np.float64)
    kernel = model.get_layer("findings").get_weights()[0]
    expected = [
        np.maximum(f @ kernel[:, FINDINGS.index(name)], 0)
        for f, name in zip(features, ASKED, strict=True)
    ]
    found = heat_maps(model, PIXELS, ASKED, method="grad_cam", cells=1)
    assert found.shape == (3, 64, 64) and found.dtype == np.float32
    np.testing.assert_allclose(found, enlarged(expected, 64), atol=2e-3)


def test_each_method_gives_maps_of_every_topology_from_0_to_1(model):
    for method in METHODS:
        maps = heat_maps(model, PIXELS, ASKED, method=method)
        assert np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1
    mass, hernia = (heat_maps(model, PIXELS[:1], [name])[0] for name in ("Mass", "Hernia"))
    assert np.ptp(mass) > 0 and not np.allclose(mass, hernia)


def toy(size=32):
    """A network of the same form: brightness, smoothed and made positive, and darkness; Mass likes
    the first.
    """
    inputs = keras.Input((size, size, 3))
    layers = [
        keras.layers.Conv2D(2, 4, strides=4, name="early"),
        keras.layers.ReLU(name="positive"),
        keras.layers.Conv2D(2, 2, strides=2, activation="relu", name="late"),
    ]
    x = inputs
    for layer in layers:
        x = layer(x)
    backbone = keras.Model(inputs, x, name="toy")
    grey = keras.Input((size, size, 1))
    rgb = keras.layers.Concatenate(name="grey_to_rgb")([grey] * 3)
    rgb = keras.layers.Rescaling(1 / 255, offset=-0.5, name="imagenet_normalization")(rgb)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(backbone(rgb))
    model = keras.Model(grey, keras.layers.Dense(14, activation="sigmoid", name="findings")(pooled))
    early = np.ones((4, 4, 3, 2), np.float32) / 48 * [1, -1]
    late = np.abs(RNG.normal(size=(2, 2, 2, 2))).astype(np.float32) * [[1, -0.3], [-0.3, 1]]
    kernel = np.zeros((2, 14), np.float32)
    kernel[:, FINDINGS.index("Mass")], kernel[:, FINDINGS.index("Emphysema")] = (1, -0.5), (-0.5, 1)
    backbone.get_layer("early").set_weights([early, np.zeros(2)])
    backbone.get_layer("late").set_weights([late, np.zeros(2)])
    model.get_layer("findings").set_weights([kernel, np.zeros(14)])
    return model


def test_at_an_inner_layer_the_gradients_are_those_worked_out_by_hand():
    model = toy()
    pixels = RNG.integers(0, 256, (4, 32, 32, 1)).astype(np.float32)
    backbone = model.get_layer("toy")
    late, _ = backbone.get_layer("late").get_weights()
    kernel = model.get_layer("findings").get_weights()[0][:, FINDINGS.index("Mass")]
    means = (pixels[..., 0] / 255 - 0.5).reshape(4, 8, 4, 8, 4).mean((2, 4))
    active = np.maximum(np.stack([means, -means], -1), 0)  # (n, 8, 8, 2)
    blocks = active.reshape(4, 4, 2, 4, 2, 2).transpose(
        0, 1, 3, 2, 4, 5
    )  # (n, row, column, in-row, in-column, channel)
    before = np.einsum("nrcijk,ijko->nrco", blocks, late)
    gradient = np.einsum("nrco,o,ijko->nrcijk", before > 0, kernel / 16, late)
    gradient = gradient.transpose(0, 1, 3, 2, 4, 5).reshape(active.shape)
    expected = {
        "grad_cam": np.maximum((active * gradient.mean((1, 2), keepdims=True)).sum(-1), 0),
        "layer_cam": (active * np.maximum(gradient, 0)).sum(-1),
    }
    for method, maps in expected.items():
        found = heat_maps(model, pixels, ["Mass"] * 4, method=method, cells=8)
        np.testing.assert_allclose(found, enlarged(maps, 32), atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_hottest_place_is_where_the_signal_is(method):
    pixels, boxes = np.full((40, 64, 64, 1), 110, np.float32), []
    for image in pixels:
        x, y = RNG.integers(0, 48, 2)
        image[y : y + 16, x : x + 16] = 250
        boxes.append([[x / 64, y / 64, 16 / 64, 16 / 64]])
    scored = score_boxes(heat_maps(toy(64), pixels, ["Mass"] * 40, method=method, cells=4), boxes)
    assert scored["hit"].mean() >= 0.9
    assert scored["chance"].mean() == pytest.approx(1 / 16)


def test_the_map_of_an_ensemble_is_the_mean_of_its_members(tmp_path):
    members, pixels = (
        [build_model("vgg16", size=32, width=0.25, seed=seed) for seed in (0, 1)],
        PIXELS[:, :32, :32],
    )
    together = combine_models(members)
    each = np.stack([heat_maps(member, pixels, ASKED) for member in members])
    assert np.abs(each[0] - each[1]).max() > 0.1
    mean = each.mean(axis=0)
    np.testing.assert_allclose(
        heat_maps(together, pixels, ASKED), mean / mean.max((1, 2), keepdims=True), atol=1e-5
    )


def test_maps_come_in_batches_that_stay_small(monkeypatch):
    model, pixels = toy(), PIXELS[:, :32, :32]
    whole = heat_maps(model, pixels, ASKED, cells=4)
    monkeypatch.setattr("chexlib.evaluation.explain.batch_of", lambda size: 2)
    np.testing.assert_allclose(heat_maps(model, pixels, ASKED, cells=4), whole, atol=1e-6)
    assert heat_maps(model, pixels[:0], [], cells=4).shape == (0, 32, 32)


@pytest.mark.parametrize(
    "wrong", [{"method": "saliency"}, {"findings": ["mass"] * 3}, {"cells": 500}]
)
def test_what_cannot_be_explained_is_refused(wrong):
    with pytest.raises(ConfigError, match=str(*wrong.values()).strip("[]").split(",")[0]):
        heat_maps(toy(), PIXELS[:, :32, :32], **{"findings": ASKED, **wrong})


# --- boxes


def test_boxes_are_scored_as_by_hand():
    maps = np.zeros((4, 20, 20), np.float32)
    maps[0, 5:10, 5:15] = 0.5  # 10 x 5 around the level of 60
    maps[0, 6, 7] = 1.0  # 1 x 1 around the level of 180
    maps[1, 0, 0] = 1.0
    maps[3, 15:, 15:] = 0.9
    boxes = [
        [[0.25, 0.25, 0.25, 0.5]],
        [[0.5, 0.5, 0.25, 0.25]],
        [[0, 0, 1, 1]],
        [[0, 0, 0.1, 0.1], [0.75, 0.75, 0.5, 0.5]],
    ]
    found = score_boxes(maps, boxes)
    assert found["hit"].tolist() == [True, False, False, True]  # an empty map points nowhere
    np.testing.assert_allclose(found["chance"], [0.125, 0.0625, 1, 0.01 + 0.0625])
    # 5 x 5 shared of 50 + 50 - 25; the single pixel lies inside the box as a whole
    np.testing.assert_allclose(found["iou"], [25 / 75, 0, 0, 1])
    np.testing.assert_allclose(found["iobb"], [1, 0, 0, 1])
    assert found["stray"].tolist() == [0, 2, 0, 0]


def scored(n=300, patients=60):
    rng = np.random.default_rng(1)
    patient = rng.integers(0, patients, n)
    luck = rng.random(patients)[patient]  # a patient's images are alike
    values = {
        "hit": rng.random(n) < luck,
        "chance": rng.random(n) / 5,
        "iou": rng.random(n),
        "iobb": rng.random(n),
    }
    return pd.DataFrame(
        {"patient": patient, "finding": rng.choice(["Mass", "Nodule"], n), **values}
    )


def test_shares_are_means_and_intervals_are_those_of_patients():
    table = scored()
    judged = judge_boxes(table).set_index(["finding", "measure", "threshold"])
    pointing = judged.xs("pointing", level="measure").droplevel("threshold")
    assert pointing["share"]["all"] == pytest.approx(table["hit"].mean())
    assert pointing["share"]["Mass"] == pytest.approx(
        table["hit"][table["finding"] == "Mass"].mean()
    )
    assert pointing["chance"]["all"] == pytest.approx(table["chance"].mean())
    assert pointing["cases"]["all"] == 300
    for threshold in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert judged.loc[("Nodule", "iobb", threshold), "share"] == pytest.approx(
            (table["iobb"][table["finding"] == "Nodule"] > threshold).mean()
        )
    assert [t for f, m, t in judged.index if (f, m) == ("all", "iou")] == [
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
    ]
    # The standard error of a ratio of sums over patients, by linearisation (Cochran 1977, section
    # 6.4).
    sums = table.groupby("patient")["hit"].agg(["sum", "size"])
    left = sums["sum"] - table["hit"].mean() * sums["size"]
    error = np.sqrt((left**2).sum()) / 300
    row = pointing.loc["all"]
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert row["low"] < row["share"] < row["high"]


def test_intervals_of_boxes_hold_the_share_of_few_patients():
    """8 patients with 1 to 10 images that are alike; percentiles of resampled patients held 0.84."""
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        patient = np.repeat(np.arange(8), rng.integers(1, 11, 8))
        noise = np.sqrt(0.5) * (rng.normal(size=8)[patient] + rng.normal(size=len(patient)))
        table = pd.DataFrame(
            {"patient": patient, "finding": "Mass", "hit": noise < 0.5, "chance": 0.1}
        )
        row = judge_boxes(table.assign(iou=noise, iobb=noise)).iloc[0]
        held.append(row["low"] <= norm.cdf(0.5) <= row["high"])
    assert np.mean(held) >= 0.93


def test_of_fewer_than_five_patients_no_interval_is_given():
    table = scored()
    table.loc[table["finding"] == "Mass", "patient"] %= 4
    judged = judge_boxes(table).set_index("finding")
    assert judged.loc["Mass", "low"].isna().all() and judged.loc["Mass", "share"].notna().all()
    assert judged.loc["all", "low"].notna().all()


def test_every_image_and_finding_with_a_box_is_scored_once(phantom, vgg_file, tiny_nih):
    radiographs, model = load_radiographs(phantom), load_model(vgg_file)[0]
    table = localize(model, radiographs, cells=4)
    pairs = radiographs.boxes[["image", "finding"]].drop_duplicates()
    pd.testing.assert_frame_equal(table[["image", "finding"]], pairs.reset_index(drop=True))
    owner = radiographs.table.set_index("image")["patient"]
    assert (table["patient"].to_numpy() == owner[table["image"]].to_numpy()).all()
    alone = localize(model, radiographs.select(table["image"].iloc[-1:]), cells=4)
    pd.testing.assert_frame_equal(
        alone, table[table["image"] == table["image"].iloc[-1]].reset_index(drop=True)
    )
    radiographs = load_radiographs(tiny_nih())
    with pytest.raises(DataError, match="box"):
        localize(model, radiographs.select(["00000002_000.png"]))


# --- pictures


def test_an_overlay_leaves_the_radiograph_readable():
    image = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    heat = np.zeros((32, 32), np.float32)
    heat[4:12, 4:12] = 1
    boxes = pd.DataFrame(
        {"finding": ["Mass"], "x": [0.1], "y": [0.1], "width": [0.2], "height": [0.2]}
    )
    figure = heat_figure(
        [image, image], [heat, heat * 0], ["Mass 0.9", "Hernia 0.1"], boxes=[boxes, boxes.iloc[:0]]
    )
    assert [ax.get_title() for ax in figure.axes] == ["Mass 0.9", "Hernia 0.1"]
    assert "Mass" in [text.get_text() for text in figure.axes[0].texts]
    tint = figure.axes[0].images[1]
    assert tint.get_alpha().max() <= 0.35 and (tint.get_alpha()[heat == 0] == 0).all()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == 3 and "0.24" in legend[0] and "0.71" in legend[1] and "box" in legend[2]
    assert not plt.get_fignums()


def test_a_heat_map_file_is_written_for_each_image_also_of_one_name(tmp_path, vgg_file):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(PIXELS[0, ..., 0].astype(np.uint8)).save(tmp_path / folder / "film.png")
    write = HeatMapFiles(tmp_path / "maps")
    model, _ = load_model(vgg_file)
    paths = [str(tmp_path / folder / "film.png") for folder in ("a", "b")]
    write(model, paths, PIXELS[:2, :32, :32], RNG.random((2, 14)).astype(np.float32))
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["film-2.png", "film.png"]
    assert all(Image.open(path).size[0] > 500 for path in (tmp_path / "maps").iterdir())


def test_titles_of_heat_maps_have_the_calibrated_probabilities_and_say_so(
    tmp_path, vgg_file, monkeypatch
):
    Image.fromarray(PIXELS[0, ..., 0].astype(np.uint8)).save(tmp_path / "film.png")
    scores, titles = np.full((1, 14), 0.1, np.float32), []
    scores[0, FINDINGS.index("Mass")], scores[0, FINDINGS.index("Hernia")] = 0.9, 0.8
    draw = lambda images, maps, names: titles.append(names) or heat_figure(images, maps, names)  # noqa: E731
    monkeypatch.setattr("chexlib.figures.judgement.heat_figure", draw)
    falls = {"Mass": {"scores": [0, 1], "probabilities": [0, 0.2]}}  # 0.9 becomes 0.18
    for card in ({}, {"calibration": {"method": "isotonic", "curves": falls}}):
        write = HeatMapFiles(tmp_path / "maps", count=2, card=card)
        write(load_model(vgg_file)[0], [str(tmp_path / "film.png")], PIXELS[:1, :32, :32], scores)
    assert titles == [["Mass 0.90", "Hernia 0.80"], ["Hernia 0.80", "Mass 0.18, calibrated"]]


@pytest.mark.parametrize("reason", ["a file", "below a file", "no name", "no right"])
def test_a_folder_that_takes_no_heat_maps_is_told_at_once(reason, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    names = {"a file": "file", "below a file": "file/maps", "no name": "a\0b", "no right": "locked"}
    if reason == "no right":

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"cannot hold heat maps .*Name another folder") as error:
        HeatMapFiles(tmp_path / names[reason])
    assert "\n" not in str(error.value)


def test_a_box_narrower_than_a_pixel_is_scored(tmp_path):
    heat = np.zeros((1, 16, 16), np.float32)
    heat[0, 4, 4] = 1
    middle, side = [4.5 / 16, 4.5 / 16], 1 / 1024
    for box, hit in (
        ([*middle, side, side], True),  # starts in the middle of the hottest pixel
        ([4.6 / 16, 4.6 / 16, side, side], True),  # lies within it beside the middle
        ([4.6 / 16, 4.6 / 16, 0, 0], True),
        ([5.1 / 16, 4.6 / 16, side, side], False),
        ([0.9, 0.9, 0, side], False),
        ([1, 1, 0, 0], False),
    ):
        (row,) = score_boxes(heat, [[box]]).to_dict("records")
        assert row["hit"] == hit, box
        assert row["chance"] == pytest.approx(1 / 256 if box[0] < 1 else 0)
        assert 0 <= row["iou"] <= 1 / 100 and 0 <= row["iobb"] <= 1 / 100
        assert row["stray"] in (0, 2)
