"""Real radiographs: folders collected, folds by patient, two arms compared, and the model that
comes out.
"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import roc_auc_score

from chexlib.data.nih import load_radiographs
from chexlib.data.splits import audit, fold_split, official_split
from chexlib.errors import ConfigError, DataError
from chexlib.findings import FINDINGS
from chexlib.machine import native_precision
from chexlib.models.predict import predict
from examples.real_model.__main__ import main
from examples.real_model.collection import collect
from examples.real_model.cross_validation import arm_gains, pooled


def part_of(folder, copy, keep):
    """A copy of a data folder with some of its images: as after a partial download."""
    shutil.copytree(folder, copy)
    for i, path in enumerate(sorted(copy.glob("images*/**/*.png"))):
        if not keep(i):
            path.unlink()
    return copy


@pytest.fixture(scope="module")
def halves(phantom, tmp_path_factory):
    """Two folders of a phantom that overlap in every third image, which the second has inverted."""
    root = tmp_path_factory.mktemp("halves")
    first = part_of(phantom, root / "first", lambda i: i % 3 != 1)
    second = part_of(phantom, root / "second", lambda i: i % 3 != 2)
    for path in second.glob("images*/**/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return first, second


def test_every_image_is_there_once_and_from_the_first_folder(phantom, halves, tmp_path):
    first, second = halves
    whole = load_radiographs(phantom)
    found = load_radiographs(collect([first, second], tmp_path / "all"))
    pd.testing.assert_frame_equal(
        found.table.drop(columns="path"), whole.table.drop(columns="path")
    )
    pd.testing.assert_frame_equal(
        found.boxes.sort_values(found.boxes.columns.tolist(), ignore_index=True),
        whole.boxes.sort_values(whole.boxes.columns.tolist(), ignore_index=True),
    )
    for i, row in enumerate(found.table.itertuples()):
        here = load_path(first, row.image) if i % 3 != 1 else load_path(second, row.image)
        np.testing.assert_array_equal(Image.open(row.path), Image.open(here))
    assert official_split(found).digest == official_split(whole).digest
    collect([second], tmp_path / "all")
    assert len(load_radiographs(tmp_path / "all")) == len(load_radiographs(second))


def load_path(folder, name):
    return next(folder.glob(f"images*/**/{name}"))


def test_folders_of_two_releases_are_not_mixed(phantom, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(phantom, other)
    file = other / "Data_Entry_2017_v2020.csv"
    table = pd.read_csv(file)
    table["Patient ID"] += 1
    table.to_csv(file, index=False)
    with pytest.raises(DataError, match="of other patients"):
        collect([phantom, other], tmp_path / "all")


def test_folds_test_every_image_once_and_share_no_patient(phantom):
    radiographs = load_radiographs(phantom)
    splits = [fold_split(radiographs, kind=f"fold-{fold}-of-4", seed=3) for fold in range(1, 5)]
    tested = [image for split in splits for image in split.parts["test"]]
    assert sorted(tested) == sorted(radiographs.table["image"])
    for split in splits:
        assert not audit(split, radiographs).leaks  # which looks at every two parts
        assert sorted(image for part in split.parts.values() for image in part) == sorted(tested)
        assert (
            len(split.parts["train"])
            > len(split.parts["test"])
            > len(split.parts["validation"])
            > 0
        )
    others = {
        fold_split(radiographs, kind="fold-2-of-4", seed=seed).digest for seed in range(4, 12)
    }
    assert len(others) > 1  # of few patients some seeds make the same folds
    with pytest.raises(ConfigError, match="fold-5-of-4"):
        fold_split(radiographs, kind="fold-5-of-4")


def tables(labels, patients, scores):
    """Tables of `pooled`, one a seed, from (seeds, n, 14) scores."""
    made = []
    for one in scores:
        table = pd.DataFrame(
            {"image": [f"{i}.png" for i in range(len(labels))], "patient": patients, "part": "test"}
        )
        table[[f"label_{f}" for f in FINDINGS]] = labels
        table[[f"score_{f}" for f in FINDINGS]] = one
        made.append(table)
    return made


def test_arms_are_means_over_seeds_of_findings_with_enough_positives():
    rng = np.random.default_rng(0)
    n = 400
    labels = (rng.random((n, 14)) < 0.2).astype(int)
    labels[:, 13] = np.arange(n) < 19  # one too few
    patients = np.arange(n) // 2
    ours, theirs = (labels * strength + rng.normal(size=(2, n, 14)) for strength in (1.0, 0.3))
    found = arm_gains(
        tables(labels, patients, ours), tables(labels, patients, theirs), resamples=400
    )
    areas = np.array(
        [
            [[roc_auc_score(labels[:, f], s[:, f]) for f in range(13)] for s in arm]
            for arm in (ours, theirs)
        ]
    )
    np.testing.assert_allclose(found["auroc"].iloc[:13], areas[0].mean(axis=0))
    np.testing.assert_allclose(found["other"].iloc[:13], areas[1].mean(axis=0))
    mean = found.loc["mean"]
    assert mean["auroc"] == pytest.approx(areas[0].mean()) and mean["difference"] == pytest.approx(
        areas[0].mean() - areas[1].mean()
    )
    assert 0 < mean["low"] < mean["difference"] < mean["high"]
    assert np.isnan(found.loc["Hernia", "auroc"]) and found.loc["Hernia", "positives"] == 19
    same = arm_gains(tables(labels, patients, ours), tables(labels, patients, ours), resamples=50)
    assert (same.loc["mean", ["difference", "low", "high"]] == 0).all()


def test_pooling_wants_every_fold(tmp_path):
    rows = pd.DataFrame({"key": ["a"], "arm": ["x"], "fold": [1], "folds": [2], "seed": [0]})
    with pytest.raises(DataError, match="only folds"):
        pooled(rows, tmp_path, "x")


@pytest.fixture(scope="module")
def rehearsal(halves, tmp_path_factory):
    """`real-model --quick` on the two folders: its output and folder."""
    out = tmp_path_factory.mktemp("real") / "model"
    command = ["--quick", "--data", f"{halves[0]}:{halves[1]}", "--out", str(out)]
    answer = CliRunner().invoke(main, command, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return command, out


def test_the_real_model_is_the_mean_of_networks_that_were_each_judged_on_others(rehearsal, phantom):
    _, out = rehearsal
    images = load_radiographs(phantom).table
    found = pd.read_parquet(out / "predictions.parquet")
    assert sorted(found["image"]) == sorted(images["image"])
    some = load_radiographs(out / "data").table["path"].iloc[:4]
    members = [predict(some, weights=out / "members" / f"fold-{fold}.keras") for fold in (1, 2)]
    np.testing.assert_allclose(
        predict(some, weights=out / "model.keras"), (members[0] + members[1]) / 2, atol=1e-5
    )
    rows = found.set_index("image")
    # bfloat16 rounds to 3 digits, otherwise in batches of another size
    near = 1e-4 if native_precision() == "float32" else 2e-2
    for i, path in enumerate(some):
        own = rows.loc[path.rsplit("/")[-1], [f"score_{f}" for f in FINDINGS]].to_numpy(float)
        assert any(np.allclose(own, member.iloc[i], atol=near) for member in members)


def test_its_card_states_the_datas_size_and_that_scores_are_out_of_fold(rehearsal):
    _, out = rehearsal
    card, found = (
        (out / "MODEL_CARD.md").read_text(),
        json.loads((out / "metrics.json").read_text()),
    )
    patients = found["data"]["patients"]
    assert f"90 radiographs of {patients} patients, which is very little" in card
    for words in (
        "out of fold",
        "Not for clinical use",
        "128 synthetic radiographs",
        "Positives: Atelectasis",
    ):
        assert words in card
    split = f"2-fold by patient split {found['data']['digest']}"
    assert f"out of fold ({split})" in card and f"means of 1 seeds, {split}" in card
    assert found["data"]["images"] == 90 and set(found["gains"]) == {*FINDINGS, "mean"}
    assert "/tmp" not in card


def test_a_second_call_trains_nothing_anew(rehearsal):
    command, out = rehearsal
    files = [
        *out.glob("cross-validation/scores/*"),
        out / "pretraining" / "model.keras",
        *out.glob("members/*"),
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(before) == 4 + 1 + 2
    answer = CliRunner().invoke(main, command, catch_exceptions=False)
    assert answer.exit_code == 0
    found = json.loads((out / "metrics.json").read_text())
    assert (
        f"AUROC out of fold, 2-fold by patient split {found['data']['digest']}: 90 images"
        in answer.output
    )
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_setting_that_there_is_not_is_refused(halves):
    answer = CliRunner().invoke(main, ["--data", str(halves[0]), "-s", "epoch", "3"])
    assert answer.exit_code == 2 and "'epoch' is no setting" in answer.output
