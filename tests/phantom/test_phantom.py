"""The phantom data set: the NIH layout, the NIH statistics, and signs where the boxes say."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from chexlib.errors import ConfigError, DataError
from chexlib.findings import FINDINGS
from chexlib.phantom import anatomy as thorax
from chexlib.phantom import signs
from chexlib.phantom import write as phantom
from chexlib.phantom.film import render
from chexlib.phantom.population import DIFFICULTIES, Description, sample_patient, stream
from chexlib.phantom.write import phantom_images, write_phantom

# Films with each finding among the 112,120 of the NIH release (v2020 table), in the order of
# FINDINGS.
NIH_POSITIVES = (
    11559,
    2776,
    13317,
    19894,
    5782,
    6331,
    1431,
    5302,
    4667,
    2303,
    2516,
    1686,
    3385,
    227,
)
PLAIN = replace(DIFFICULTIES["easy"], strength=1.0, spread=0.0)


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def film(patient, shown=(), *, view="PA", sex="M", follow_up=0, seed=3):
    return Description(seed, patient, follow_up, sex, 50, view, tuple(shown), tuple(shown))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_phantom(
        tmp_path_factory.mktemp("phantom") / "set",
        n_images=40,
        size=32,
        min_prevalence=0.1,
        workers=1,
    )


@pytest.fixture(scope="module")
def population():
    return [d for patient in range(1, 12001) for d in sample_patient(11, patient)]


def test_bytes_do_not_depend_on_workers(small, tmp_path):
    again = write_phantom(tmp_path / "again", n_images=40, size=32, min_prevalence=0.1, workers=2)
    assert digest(again) == digest(small)


def test_it_is_drawn_in_this_process_where_none_can_be_started(small, tmp_path, monkeypatch):
    def broken(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(phantom, "_draw_in_processes", broken)
    alone = write_phantom(tmp_path / "alone", n_images=40, size=32, min_prevalence=0.1, workers=2)
    assert digest(alone) == digest(small)


def test_another_seed_gives_other_pictures(small, tmp_path):
    other = write_phantom(
        tmp_path / "other", n_images=40, size=32, min_prevalence=0.1, seed=1, workers=1
    )
    name = "images_001/images/00000001_000.png"
    assert digest(other)[name] != digest(small)[name]


def test_layout_is_that_of_the_nih_release(small):
    assert (small / "Data_Entry_2017_v2020.csv").read_text().splitlines()[0] == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View "
        "Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    assert (small / "BBox_List_2017.csv").read_text().splitlines()[0] == (
        "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    )
    table = pd.read_csv(small / "Data_Entry_2017_v2020.csv")
    assert len(table) == 40
    assert set(table["View Position"]) <= {"PA", "AP"} and set(table["Patient Gender"]) <= {
        "M",
        "F",
    }
    assert table["Patient Age"].between(1, 95).all()
    known = {*FINDINGS, "No Finding"}
    assert all(set(labels.split("|")) <= known for labels in table["Finding Labels"])
    pictures = sorted((small / "images_001" / "images").iterdir())
    assert [path.name for path in pictures] == sorted(table["Image Index"])
    with Image.open(pictures[0]) as image:
        assert (image.mode, image.size) == ("L", (32, 32))
    assert "Infiltration" not in (small / "BBox_List_2017.csv").read_text()
    about = json.loads((small / "phantom.json").read_text())
    assert about["parameters"]["min_prevalence"] == 0.1 and "Synthetic" in about["what"]


def test_lists_cut_the_films_by_patient(small):
    train, test = (
        (small / name).read_text().split() for name in ("train_val_list.txt", "test_list.txt")
    )
    assert sorted(train + test) == sorted(
        pd.read_csv(small / "Data_Entry_2017_v2020.csv")["Image Index"]
    )
    assert not {name[:8] for name in train} & {name[:8] for name in test}
    assert abs(len(test) / 40 - 0.228) < 0.05


def test_boxes_lie_inside_the_picture(small):
    boxes = (
        pd.read_csv(small / "BBox_List_2017.csv", header=None, skiprows=1)
        .iloc[:, 2:6]
        .to_numpy(float)
    )
    assert len(boxes) > 10
    assert (boxes[:, 2:] > 0).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 1024 + 1e-6).all()


def test_prevalence_is_that_of_the_nih_table(population):
    labels = np.array([[f in d.findings for f in FINDINGS] for d in population])
    expected = np.array(NIH_POSITIVES) / 112_120
    # Repeats between follow-ups widen the sampling error by about sqrt((1 + 0.16) / (1 - 0.16)).
    error = 1.2 * np.sqrt(expected * (1 - expected) / len(labels))
    assert (np.abs(labels.mean(0) - expected) < 4 * error).all()
    assert abs(np.mean([not d.findings for d in population]) - 60_361 / 112_120) < 0.015
    assert abs(np.mean([d.view == "PA" for d in population]) - 67_310 / 112_120) < 0.015


def test_findings_occur_together_as_in_the_nih_table(population):
    # 4,000 films of the table show effusion with infiltration, 3,275 effusion with atelectasis.
    for pair, films in ((("Effusion", "Infiltration"), 4000), (("Atelectasis", "Effusion"), 3275)):
        share = np.mean([set(pair) <= set(d.findings) for d in population])
        assert abs(share - films / 112_120) < 4 * 1.2 * np.sqrt(films / 112_120 / len(population))


def test_follow_ups_repeat_findings_more_often_than_chance(population):
    pairs = [(a, b) for a, b in pairwise(population) if a.patient == b.patient]
    same = np.mean([(a.findings, a.view) == (b.findings, b.view) for a, b in pairs])
    counts = pd.Series([(d.findings, d.view) for d in population]).value_counts(normalize=True)
    chance = float((counts**2).sum())
    assert abs((same - chance) / (1 - chance) - 0.16) < 0.025
    assert all(a.sex == b.sex and 0 <= b.age - a.age <= 40 for a, b in pairs)


@pytest.mark.parametrize(("min_prevalence", "share"), [(0, 0.40), (0.04, 0.34)])
def test_34_to_40_percent_of_follow_ups_have_the_findings_before(min_prevalence, share):
    films = [
        d
        for patient in range(1, 6001)
        for d in sample_patient(0, patient, min_prevalence=min_prevalence)
    ]
    pairs = [(a, b) for a, b in pairwise(films) if a.patient == b.patient]
    same = [a.findings == b.findings for a, b in pairs]
    assert np.mean(same) == pytest.approx(share, abs=0.01)
    found = [agree for agree, (before, _) in zip(same, pairs, strict=True) if before.findings]
    assert np.mean(found) == pytest.approx(1 / 6, abs=0.015)


@pytest.mark.parametrize("repeat", [0.0, 0.9, 1.0])
def test_follow_ups_repeat_as_often_as_is_asked(repeat, small, tmp_path):
    films = [sample_patient(0, patient, repeat=repeat) for patient in range(1, 800)]
    pairs = [pair for own in films for pair in pairwise(own)]
    same = np.mean([before.findings == after.findings for before, after in pairs])
    assert (
        same == 1 if repeat == 1 else same == pytest.approx(repeat + 0.3 * (1 - repeat), abs=0.05)
    )
    firsts = [sample_patient(0, patient)[0] for patient in range(1, 800)]
    assert [own[0] for own in films] == firsts  # who is on them is not touched
    folder = write_phantom(tmp_path / "made", n_images=4, size=32, repeat=repeat, workers=1)
    about = json.loads((folder / "phantom.json").read_text())
    assert about["repeat"] == about["parameters"]["repeat"] == repeat
    # A phantom of before, which knew no such parameter, is still known for what it is.
    assert "repeat" not in json.loads((small / "phantom.json").read_text())["parameters"]


def test_min_prevalence_is_reached_by_every_finding():
    films = [
        d for patient in range(1, 3001) for d in sample_patient(2, patient, min_prevalence=0.08)
    ]
    share = np.array([[f in d.findings for f in FINDINGS] for d in films]).mean(0)
    assert (share > 0.08 - 4 * 1.2 * np.sqrt(0.08 * 0.92 / len(films))).all()


def test_labels_err_in_proportion_to_prevalence(population):
    missing = [f not in d.shown for d in population for f in d.findings]
    assert abs(np.mean(missing) - DIFFICULTIES["standard"].absent) < 0.01
    extra = [f for d in population for f in d.shown if f not in d.findings]
    assert 0 < extra.count("Hernia") + extra.count("Pneumonia") < 0.2 * extra.count("Infiltration")


def test_films_of_one_patient_share_their_anatomy():
    def vectors(follow_up):
        films = [
            render(film(p, follow_up=follow_up), size=48, difficulty="easy")[0]
            for p in range(1, 17)
        ]
        return np.array(films, float).reshape(16, -1)

    first, second = vectors(0), vectors(1)
    first, second = first - first.mean(0), second - second.mean(0)
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    similar = first @ second.T
    within, between = np.diag(similar).mean(), similar[~np.eye(16, dtype=bool)].mean()
    assert within > between + 0.15


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("view", ["PA", "AP"])
def test_each_finding_changes_the_picture_inside_its_box(finding, view):
    size = 96
    for patient in (1, 2, 3):
        normal, none = render(film(patient, view=view), size=size, difficulty=PLAIN)
        image, boxes = render(film(patient, [finding], view=view), size=size, difficulty=PLAIN)
        change = np.abs(image.astype(float) - normal)
        inside = np.zeros((size, size), bool)
        for name, x, y, width, height in boxes:
            assert name == finding
            rows = slice(round(y * size), round((y + height) * size))
            inside[rows, round(x * size) : round((x + width) * size)] = True
        assert none == [] and inside.any()
        assert change[inside].mean() > 1.5
        if finding not in (
            "Cardiomegaly",
            "Emphysema",
            "Fibrosis",
            "Atelectasis",
            "Edema",
        ):  # these deform the chest
            assert change[inside].mean() > 5 * change[~inside].mean()


def test_a_sign_that_is_not_labelled_has_no_box():
    hidden = replace(film(1, ["Mass"]), findings=())
    assert render(hidden, size=48)[1] == []


def test_heart_is_wider_than_half_the_chest_only_with_cardiomegaly():
    def ratio(patient, enlarged):
        g, rng = thorax.anatomy(film(patient), stream(3, patient, 0)), stream(3, patient, 1)
        thorax.posture(g, film(patient), rng, 1.0)
        if enlarged:
            signs.deform(g, "Cardiomegaly", rng, 0.1)
        g.tilt, g.zoom, g.shift, g.bend = 0.0, 1.0, np.zeros(2), 0.0
        drawn = thorax.Film(g, 256)
        width = [np.flatnonzero((mask > 0.5).any(0)) for mask in (drawn.heart, drawn.wall)]
        return np.ptp(width[0]) / np.ptp(width[1])

    assert max(ratio(patient, False) for patient in range(1, 30)) <= 0.51  # one pixel of 160
    assert min(ratio(patient, True) for patient in range(1, 30)) >= 0.49


def test_stream_matches_the_written_files(small):
    pictures = phantom_images(0, size=32, min_prevalence=0.1)
    for image, d in [next(pictures) for _ in range(3)]:
        with Image.open(small / "images_001" / "images" / d.image) as written:
            assert np.array_equal(np.asarray(written), image)


def test_same_phantom_is_returned_without_being_made_again(small, monkeypatch):
    monkeypatch.setattr(phantom, "_draw_all", None)  # would fail if called
    assert write_phantom(small, n_images=40, size=32, min_prevalence=0.1) == small


def test_other_contents_are_refused_by_name(small, tmp_path):
    with pytest.raises(DataError, match=r"with n_images=40, and n_images=41 .*another folder"):
        write_phantom(small, n_images=41, size=32, min_prevalence=0.1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(DataError, match="mine"):
        write_phantom(tmp_path / "mine", n_images=2, size=32)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt, KeyboardInterrupt), (OSError, DataError), (ValueError, ValueError)],
)
def test_interrupt_or_error_leaves_nothing_behind(tmp_path, monkeypatch, error, told):
    def fail(*args, **kwargs):
        raise error("in the middle")

    monkeypatch.setattr(phantom, "_write_tables", fail)
    with pytest.raises(told):
        write_phantom(tmp_path / "broken", n_images=3, size=32, workers=1)
    assert list(tmp_path.iterdir()) == []


def begun(folder, images=4000):
    """A process that draws a phantom of so many images into this folder, once it does, and its own
    processes.
    """
    command = [sys.executable, "-m", "chexlib", "phantom", folder, "--workers", "2"]
    process = subprocess.Popen([*map(str, command), "--images", str(images), "--size", "32"])
    until = time.monotonic() + 60
    while not list(folder.parent.glob(".*.partial/*/*/*.png")) and time.monotonic() < until:
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_of_a_killed_process_end_and_the_next_one_removes_its_draft(tmp_path, number):
    process, workers = begun(tmp_path / "set")
    process.send_signal(number)
    process.wait()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and list(tmp_path.glob(".*.partial"))
    (tmp_path / ".set.of-mine.partial").mkdir()
    write_phantom(tmp_path / "other", n_images=2, size=32)
    assert {path.name for path in tmp_path.iterdir()} == {"other", ".set.of-mine.partial"}


def test_two_processes_draw_one_phantom_once(tmp_path):
    process, _ = begun(tmp_path / "set", 200)
    assert write_phantom(tmp_path / "set", n_images=200, size=32) == tmp_path / "set"
    made = (tmp_path / "set").stat().st_ino
    assert process.wait() == 0 and (tmp_path / "set").stat().st_ino == made
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_images": 0},
        {"n_images": 2.5},
        {"size": 31},
        {"size": 2048},
        {"seed": -1},
        {"difficulty": "brutal"},
        {"min_prevalence": 0.5},
        {"min_prevalence": -0.1},
        {"min_prevalence": float("nan")},
        {"repeat": 1.1},
        {"repeat": "often"},
        {"workers": 0},
    ],
)
def test_parameters_outside_their_range_are_named(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_phantom(tmp_path / "x", **wrong)
    assert list(tmp_path.iterdir()) == []
