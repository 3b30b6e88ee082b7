"""The command line: one clear line for what is wrong, exit code 2, nothing half-made; numbers where
they are asked.
"""

import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import click
import numpy as np
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

import chexlib.cluster.cleanup
import chexlib.models.predict
from chexlib.app.cli import main
from chexlib.data.nih import load_radiographs, read_image
from chexlib.errors import ConfigError
from chexlib.files import ROOT
from chexlib.findings import FINDINGS
from chexlib.models.predict import predict
from chexlib.models.weights import extend_card
from chexlib.mpi import LOOPBACK

COMMANDS = ("run", "phantom", "audit", "predict", "evaluate", "card", "train", "clean")


@pytest.fixture(autouse=True)
def as_before():
    """`run` takes SIGINT and SIGTERM over, and commands show the log."""
    logger = logging.getLogger("chexlib")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(*words, naming):
    """Call a command that must end with 2 and one `Error:` line that names these; returns the line."""
    answer = call(*words)
    assert answer.exit_code == 2, answer.output + repr(answer.exception)
    assert answer.stdout == ""
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("Error: ")
    for word in naming:
        assert str(word) in lines[0]
    return lines[0]


# --- as a whole


def test_help_lists_the_commands_and_says_it_is_not_for_the_clinic():
    answer = call("--help")
    assert answer.exit_code == 0
    assert "Not for clinical use" in answer.output
    for command in COMMANDS:
        assert f"\n  {command} " in answer.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_with_a_word_on_every_option(command, flag):
    answer = call(command, flag)
    assert answer.exit_code == 0
    assert answer.output.startswith(f"Usage: main {command}")
    options = [
        option for option in main.commands[command].params if isinstance(option, click.Option)
    ]
    assert {option.name for option in options if not option.help} <= {"seed"}


def test_the_command_line_starts_without_tensorflow():
    heavy = {"tensorflow", "keras", "ipyparallel", "pandas", "papermill"}
    code = f"import sys, chexlib.app.cli; print(sorted({heavy!r} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.strip() == "[]", answer.stderr


def test_an_error_is_one_line_and_exit_code_2_in_a_real_process(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "chexlib", "audit", "--data", str(tmp_path / "none"), "train"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("Error: 'train' is not accepted. Write PART=LIST")
    assert answer.stderr.count("\n") == 1


# What a file or the machine may raise at any place of any command.
MACHINE_FAULTS = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device", "x/y"), "x/y", "Make room"),
    "nameless": (OSError(errno.EIO, "Input/output error"), "Input/output error", "disk"),
    "no number": (OSError("cannot identify"), "cannot identify", "--debug"),
    "another number": (OSError(errno.EXDEV, "Invalid link"), "Invalid link", "--debug"),
    "cut": (EOFError("Compressed file ended"), "ends too early", "Compressed file ended"),
    "memory": (MemoryError("Unable to allocate 9 GiB"), "9 GiB", "more memory"),
    "depth": (RecursionError("maximum depth"), "nested too deeply", "--debug"),
    "escapes": (OSError(errno.EIO, "Input/output error", "a\x1b[2J\nb"), r"a\x1b[2J b"),
    "two lines": (ConfigError("one\n  two."), "one two."),
}


@pytest.mark.parametrize("fault", MACHINE_FAULTS)
def test_whatever_a_file_or_the_machine_raises_is_one_line(monkeypatch, fault):
    error, *naming = MACHINE_FAULTS[fault]
    monkeypatch.setattr(chexlib.cluster.cleanup, "end_members", mock.Mock(side_effect=error))
    refused("clean", naming=naming)


@pytest.mark.parametrize(
    "name", ["a\nError: all is well", "b\x1b]0;owned\a", "c\x1b[2J", "film\udce9", "d\u202egnp"]
)
def test_no_name_of_a_file_forges_a_line_or_steers_the_terminal(tmp_path, name):
    line = refused("evaluate", tmp_path / name, "--data", tmp_path, naming=["Error: "])
    assert line.isprintable() and str(tmp_path) in line


def test_output_in_a_locale_without_some_letters_is_escaped_and_does_not_end_in_an_error(tmp_path):
    name = "fïlm-中-\udce9.csv"
    command = [sys.executable, "-m", "chexlib", "evaluate", os.fsencode(name), "--data", "."]
    own = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, timeout=60)
    assert answer.returncode == 2 and answer.stderr.startswith(b"Error: ")
    assert answer.stderr.count(b"\n") == 1


@pytest.mark.parametrize("words", [("--debug", "clean"), ("clean", "--debug")])
def test_debug_shows_the_traceback_above_the_line(monkeypatch, words):
    error = mock.Mock(side_effect=EOFError("cut"))
    monkeypatch.setattr(chexlib.cluster.cleanup, "end_members", error)
    answer = call(*words)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("Traceback (most recent call last)")
    assert answer.stderr.splitlines()[-1].startswith("Error: a file ends too early (cut)")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(chexlib.cluster.cleanup, "end_members", mock.Mock(side_effect=KeyError))
    assert isinstance(call("clean").exception, KeyError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["clean", "--help"]])
def test_standard_output_on_a_full_disk_is_one_line(words):
    command = [sys.executable, "-m", "chexlib", *words]
    with open("/dev/full", "w") as full:
        answer = subprocess.run(command, stdout=full, stderr=-1, text=True, timeout=60)
    assert answer.returncode == 2
    assert answer.stderr.startswith("Error: ") and "Make room" in answer.stderr
    assert answer.stderr.count("\n") == 1, answer.stderr


def test_a_reader_who_stops_reading_is_no_error():
    command = f"{sys.executable} -m chexlib --help | true"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert answer.stderr == ""


# --- run


@pytest.fixture(autouse=True)
def no_execution(monkeypatch):
    """What is not refused here must not start training."""
    monkeypatch.setattr(
        "papermill.execute_notebook", lambda *args, **kwargs: pytest.fail("a notebook was executed")
    )


def refused_run(tmp_path, *words, naming):
    runs = tmp_path / "runs"
    refused("run", *words, "--runs-dir", runs, naming=naming)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("wrong", "right"), [("epoch", "epochs"), ("batchsize", "batch_size"), ("data-dir", "data_dir")]
)
def test_run_refuses_a_misspelt_parameter_and_suggests_the_right_one(tmp_path, wrong, right):
    refused_run(tmp_path, "03", "-p", wrong, "2", naming=[repr(wrong), f"Did you mean {right!r}"])


def test_run_refuses_a_parameter_of_another_notebook(tmp_path):
    refused_run(
        tmp_path, "00", "-p", "epochs", "2", naming=["'epochs'", "Use one of ", "phantom_images"]
    )


def test_run_refuses_an_unknown_profile_and_lists_the_known(tmp_path):
    refused_run(
        tmp_path, "00", "--profile", "fast", naming=["'fast'", "quick", "standard", "cluster"]
    )


@pytest.mark.parametrize("name", ["99", "train", "../README"])
def test_run_refuses_an_unknown_notebook_and_lists_the_known(tmp_path, name):
    refused_run(tmp_path, name, naming=[repr(name), "00_start_here", "04_train_distributed"])


@pytest.mark.parametrize("engines", ["0", "-1"])
def test_run_refuses_no_engines(tmp_path, engines):
    refused_run(tmp_path, "04", "--engines", engines, naming=[f"engines={engines}", "1 or more"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("engines", "two"), ("epochs", "2.5"), ("seed", "none"), ("learning_rate", "fast")],
)
def test_run_refuses_a_value_of_the_wrong_type(tmp_path, name, value):
    refused_run(tmp_path, "04", "-p", name, value, naming=[name, value])


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (["--hosts", "node1:none"], ["'node1:none'", "'name:4'"]),
        (["--hosts", "a/hostfile"], ["a/hostfile", "cannot be read"]),
        (["--hosts", "node1:2", "--interface", "eth77"], ["'eth77'", "Name the one"]),
        (["--hosts", "node1", "--interface", LOOPBACK], ["engines=2", "1 slots"]),
        (["--hosts", "node1:2", "--interface", LOOPBACK, "--slurm"], ["Use only one of both"]),
        (["--slurm-options", "--time=10"], ["slurm_options='--time=10'", "set slurm"]),
        (["--threads", "-1"], ["threads=-1"]),
    ],
)
def test_run_refuses_engines_where_they_cannot_be(tmp_path, options, naming):
    refused_run(tmp_path, "04", *options, naming=naming)


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (["--hosts", "node1"], ["hosts", "--engines N"]),
        (["--engines", "0"], ["engines=0", "1 or more"]),
        (["--engines", "2", "--hosts", "node1", "--interface", LOOPBACK], ["1 slots"]),
    ],
)
def test_a_study_refuses_engines_that_cannot_be(options, naming):
    refused("study", "gate", *options, naming=naming)


def test_run_refuses_more_engines_of_a_profile_than_cores_unless_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr("chexlib.app.execute.cores", lambda: 3)
    refused_run(
        tmp_path, "04", "--profile", "cluster", naming=["engines=64", "3 cores", "--engines 64"]
    )
    for told in (["--engines", "64"], ["--hosts", "a:32,b:32", "--interface", LOOPBACK]):
        refused_run(
            tmp_path,
            "04",
            "--profile",
            "cluster",
            *told,
            "-p",
            "data_dir",
            "/none",
            naming=["/none"],
        )


def test_run_refuses_more_engines_than_images(tmp_path, tiny_nih):
    refused_run(
        tmp_path, "04", "--data", tiny_nih(), "--engines", 25, naming=["25 engines", "24 images"]
    )


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_run_refuses_a_data_folder_without_csv(tmp_path, kind):
    folder = tmp_path / "data"
    if kind == "empty":
        folder.mkdir()
    refused_run(
        tmp_path,
        "03",
        "--data",
        folder,
        naming=[folder, "Data_Entry_2017" if kind == "empty" else "not exist"],
    )


def test_run_refuses_a_data_folder_without_images(tmp_path, tiny_nih):
    folder = tiny_nih()
    for path in folder.rglob("*.png"):
        path.unlink()
    refused_run(tmp_path, "03", "--data", folder, naming=["24 images"])


def test_run_refuses_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    refused(
        "run",
        "00",
        "--runs-dir",
        tmp_path / "file" / "runs",
        naming=[tmp_path / "file" / "runs", "with --runs-dir"],
    )
    assert (tmp_path / "file").read_text() == "kept"


# --- audit


@pytest.fixture
def lists(tmp_path, tiny_nih):
    """The data folder, and a function that writes a list of images."""
    folder = tiny_nih()

    def write(part, images):
        path = tmp_path / f"{part}.txt"
        path.write_text("\n".join(images) + "\n")
        return f"{part}={path}"

    return folder, write


def names(patient, *follow_ups):
    return [f"{patient:08d}_{i:03d}.png" for i in follow_ups]


def test_audit_of_the_official_lists_ends_with_0(lists):
    folder, _ = lists
    answer = call(
        "audit",
        "--data",
        folder,
        f"train={folder}/train_val_list.txt",
        f"test={folder}/test_list.txt",
    )
    assert answer.exit_code == 0, answer.output
    assert "train: 15 images of 7 patients" in answer.output
    assert "test: 9 images of 3 patients" in answer.output
    assert "LEAK" not in answer.output
    assert "No leak: no patient is in two parts" in answer.output
    (hernia,) = [line for line in answer.output.splitlines() if line.startswith("Hernia")]
    assert hernia.split() == ["Hernia", "0.00", "%", "33.33", "%"]


def test_audit_ends_with_1_on_a_leak_with_the_numbers(lists):
    folder, write = lists
    # Patients 1 and 3 are in train and test: 3 of train's 4 images, 4 of test's 5. Validation
    # shares nobody.
    train = write("train", [*names(1, 0, 1), *names(3, 0), *names(2, 0)])
    test = write("test", [*names(1, 2), *names(3, 1, 2, 3), *names(7, 0)])
    validation = write("validation", names(4, 0, 1))
    answer = call("audit", "--data", folder, train, validation, test)
    assert answer.exit_code == 1, answer.output
    leaks = [line for line in answer.output.splitlines() if line.startswith("LEAK")]
    assert leaks == [
        "LEAK: train and test share 2 patients (3 of 4 images in train, 4 of 5 in test)"
    ]
    assert "no patient is in two parts" not in answer.output


def test_audit_names_an_image_that_is_listed_twice(lists):
    folder, write = lists
    answer = call(
        "audit", "--data", folder, write("train", names(1, 0, 1, 1)), write("test", names(2, 0))
    )
    assert answer.exit_code == 1
    assert "00000001_001.png" in answer.output


def test_audit_counts_images_that_the_labels_do_not_have(lists):
    """The release's lists beside a subset's labels; with labels beside the names, as many lists
    have them.
    """
    folder, write = lists
    train = write(
        "train", [f"images/{name} 0 1 0" for name in [*names(1, 0, 1), *names(99, 0, 1, 2)]]
    )
    answer = call("audit", "--data", folder, train, write("test", names(2, 0)))
    assert answer.exit_code == 0, answer.output
    assert "train: 2 images of 1 patients\n" in answer.output
    assert "not checked, as the label file does not have them: 3 in train" in answer.output
    assert "test: 1 images of 1 patients\n" in answer.output
    answer = call(
        "audit", "--data", folder, write("train", names(99, 0, 1)), write("test", names(2, 0))
    )
    assert (
        answer.exit_code == 2
        and "train.txt: none of its 2 images is in the label file" in answer.stderr
    )


def test_audit_needs_labels_alone(lists):
    folder, write = lists
    for path in folder.rglob("*.png"):
        path.unlink()
    answer = call(
        "audit", "--data", folder, write("train", names(1, 0)), write("test", names(2, 0))
    )
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize("part", ["train", "train=", "=train.txt"])
def test_audit_refuses_what_is_no_part_and_list(lists, part):
    refused("audit", "--data", lists[0], part, naming=[repr(part), "PART=LIST"])


def test_audit_refuses_a_part_that_is_given_twice(lists):
    folder, write = lists
    first = write("train", names(1, 0))
    (folder / "other.txt").write_text("\n".join(names(1, 1)))
    refused("audit", "--data", folder, first, f"train={folder}/other.txt", naming=["train"])


def test_audit_refuses_a_missing_list_and_unknown_images(lists):
    folder, write = lists
    refused("audit", "--data", folder, f"train={folder}/none.txt", naming=["none.txt"])
    refused("audit", "--data", folder, write("train", ["strange.png"]), naming=["strange.png"])


# --- phantom


def test_phantom_writes_a_folder_that_can_be_loaded_and_audited(tmp_path):
    folder = tmp_path / "made"
    answer = call(
        "phantom", folder, "--images", 12, "--size", 32, "--workers", 1, "--min-prevalence", 0.04
    )
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.strip() == str(folder)
    radiographs = load_radiographs(folder)
    assert len(radiographs) == 12
    assert read_image(radiographs.table["path"][0]).shape == (32, 32)
    again = call(
        "phantom", folder, "--images", 12, "--size", 32, "--workers", 1, "--min-prevalence", 0.04
    )
    assert again.exit_code == 0


def test_phantom_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("kept")
    refused(
        "phantom", tmp_path / "photos", "--images", 5, "--size", 32, naming=[tmp_path / "photos"]
    )
    assert os.listdir(tmp_path / "photos") == ["holiday.jpg"]
    assert os.listdir(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--images", 0), ("--size", 16), ("--difficulty", "nasty"), ("--seed", -1)],
)
def test_phantom_refuses_what_is_not_accepted(tmp_path, option, value):
    refused("phantom", tmp_path / "made", option, value, naming=[value])
    assert not (tmp_path / "made").exists()


# --- predict


@pytest.fixture
def images(tiny_nih):
    return [str(path) for path in sorted(tiny_nih().rglob("*.png"))[:3]]


def test_predict_prints_json_of_every_image_and_finding(images, vgg_file):
    answer = call("predict", *images, "--weights", vgg_file, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["weights"] == str(vgg_file)
    assert list(found["probabilities"]) == images
    expected = predict(images, weights=vgg_file)
    for image in images:
        assert list(found["probabilities"][image]) == list(FINDINGS)
        np.testing.assert_allclose(
            list(found["probabilities"][image].values()), expected.loc[image], atol=1e-6
        )


@pytest.mark.parametrize("form", ["--csv", "--json", "table"])
def test_names_that_are_no_utf8_or_hold_escapes_cost_no_image_its_row(
    images, vgg_file, tmp_path, form
):
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = [os.fsdecode(b"film\xe9.png"), "=cmd.png", "c\x1b[2Jd.png"]
    for name in odd:
        shutil.copyfile(images[0], folder / name)
    (folder / "a\nError: well.png").write_text("x")
    words = [] if form == "table" else [form]
    answer = call("predict", folder, "--weights", vgg_file, *words)
    assert answer.exit_code == 1
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("Error: ")]
    assert "Error: well.png" in line
    assert "\x1b" not in answer.output
    if form == "--json":
        found = json.loads(answer.stdout)["probabilities"]
        assert set(found) == {str(folder / name) for name in odd}  # as they are
    else:
        told = [r"film\udce9.png", "=cmd.png", r"c\x1b[2Jd.png"]
        assert all(name in answer.stdout for name in told)


def test_predict_prints_a_table_of_every_finding(images, vgg_file):
    answer = call("predict", *images, "--weights", vgg_file)
    assert answer.exit_code == 0, answer.output
    assert str(vgg_file) in answer.stdout
    expected = predict(images, weights=vgg_file)
    rows = {
        line.split()[0]: line.split()[1:]
        for line in answer.stdout.splitlines()
        if line.split()[0] in FINDINGS
    }
    assert list(rows) == list(FINDINGS)
    for finding, cells in rows.items():
        assert cells == [f"{p:.3f}" for p in expected[finding]]


def test_predict_takes_the_newest_runs_weights(images, vgg_file, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(vgg_file.parents[1])
    monkeypatch.setattr("chexlib.files.ROOT", tmp_path)
    answer = call("predict", images[0], "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["weights"] == str(vgg_file)


def test_predict_refuses_missing_images_missing_weights_and_no_run(
    images, vgg_file, monkeypatch, tmp_path
):
    refused("predict", tmp_path / "none.png", "--weights", vgg_file, naming=["none.png"])
    refused("predict", images[0], "--weights", tmp_path / "none.keras", naming=["none.keras"])
    refused("predict", images[0], "--weights", images[0], naming=[images[0]])
    monkeypatch.setattr("chexlib.files.ROOT", tmp_path)
    refused("predict", images[0], naming=["make run", "--weights"])


def test_predict_goes_on_after_a_bad_image_and_says_so(images, vgg_file, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    answer = call(
        "predict",
        images[0],
        tmp_path / "bad.png",
        tmp_path / "none.png",
        "--weights",
        vgg_file,
        "--json",
    )
    assert answer.exit_code == 1
    found = json.loads(answer.stdout)
    assert list(found["probabilities"]) == images[:1]
    assert list(found["errors"]) == [str(tmp_path / "bad.png"), str(tmp_path / "none.png")]
    assert list(found["doubts"]) == images[:1]  # noise
    lines = answer.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Error", "Error", "Doubtful"]
    assert "unlike a frontal chest radiograph" in lines[2]


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_predict_lists_the_errors_also_where_no_image_could_be_read(vgg_file, tmp_path, form):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    answer = call("predict", bad, tmp_path / "none.png", "--weights", vgg_file, form)
    assert answer.exit_code == 2, answer.output + repr(answer.exception)
    names = [str(bad), str(tmp_path / "none.png")]
    if form == "--json":
        found = json.loads(answer.stdout)
        assert list(found["errors"]) == names and found["probabilities"] == found["called"] == {}
    else:
        rows = pd.read_csv(io.StringIO(answer.stdout))
        assert rows["image"].tolist() == names and rows["error"].notna().all()
        assert rows[list(FINDINGS)].isna().all(axis=None)
    assert [line.split(":")[0] for line in answer.stderr.splitlines()] == ["Error", "Error"]


def test_predict_names_the_split_of_the_weights_and_takes_a_runs_folder(images, vgg_file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(vgg_file.parent, run)
    split = {"name": "patient", "digest": "70e7a9376113", "images": {"test": 5}}
    extend_card(run / "model.keras", split=split)
    answer = call("predict", images[0], "--weights", run, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["split"] == split and found["weights"] == str(run / "model.keras")
    answer = call("predict", images[0], "--weights", run)
    assert (
        f"{run / 'model.keras'} (trained on the patient split 70e7a9376113; not calibrated)"
        in answer.stdout
    )
    for none in (None, "x", {}):
        extend_card(run / "model.keras", split=none)
        answer = call("predict", images[0], "--weights", run)
        assert "trained on the unknown split without digest" in answer.stdout


def test_predict_refuses_a_calibration_that_is_none_before_it_scores(
    images, vgg_file, tmp_path, monkeypatch
):
    path = shutil.copy(vgg_file, tmp_path / "model.keras")
    monkeypatch.setattr(
        "chexlib.models.predict.predict_all", lambda *_, **__: pytest.fail("it has scored")
    )
    for facts in ({"calibration": "temperature"}, {"operating_points": [0.5]}):
        extend_card(path, **{"calibration": None, "operating_points": None, **facts})
        refused(
            "predict", images[0], "--weights", path, naming=[path, next(iter(facts)).split("_")[0]]
        )


def test_predict_refuses_a_folder_that_takes_no_heat_maps_before_it_scores(
    images, vgg_file, monkeypatch
):
    monkeypatch.setattr(
        "chexlib.models.predict.predict_all", lambda *_, **__: pytest.fail("it has scored")
    )
    refused(
        "predict",
        images[0],
        "--weights",
        vgg_file,
        "--heatmaps",
        images[1],
        naming=[images[1], "another folder"],
    )


def test_predict_writes_csv_and_heat_maps_of_a_folder(images, vgg_file, tmp_path):
    folder, maps = os.path.dirname(images[0]), tmp_path / "maps"
    answer = call(
        "predict",
        os.path.join(folder, "0000000[14]*.png"),
        "--csv",
        "--heatmaps",
        maps,
        "--weights",
        vgg_file,
    )
    assert answer.exit_code == 0, answer.output
    rows = pd.read_csv(io.StringIO(answer.stdout))
    assert rows.columns.tolist() == ["image", "doubt", "error", *FINDINGS]
    assert [os.path.basename(image)[:8] for image in rows["image"]] == ["00000001"] * 3 + [
        "00000004"
    ] * 2
    expected = predict(rows["image"], weights=vgg_file)
    np.testing.assert_allclose(rows[list(FINDINGS)], expected, atol=1e-5)
    assert sorted(os.listdir(maps)) == [os.path.basename(image) for image in rows["image"]]


# --- card


def test_card_is_written_from_the_runs_files(vgg_file, tmp_path, phantom):
    """The AUROCs are those of the run's own predictions; calibration is told where the weights
    carry it.
    """
    run = tmp_path / "one" / "03_train_baseline"
    shutil.copytree(vgg_file.parent, run)
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (200, 14)), rng.random((200, 14))
    labels[:, FINDINGS.index("Hernia")] = 0
    columns = {f"label_{f}": labels[:, i] for i, f in enumerate(FINDINGS)}
    columns |= {f"score_{f}": scores[:, i] for i, f in enumerate(FINDINGS)}
    parts = {
        "image": [f"{i}.png" for i in range(200)],
        "patient": np.arange(200) // 2,
        "part": ["test"] * 200,
    }
    pd.DataFrame({**parts, **columns}).to_parquet(run / "predictions.parquet")
    split = {"name": "image", "digest": "abc123", "images": {"train": 1234, "test": 200}}
    config = {
        "data_dir": str(phantom),
        "run_dir": str(run),
        "seed": 5,
        "epochs": 7,
        "weights": str(tmp_path / "w.keras"),
    }
    extend_card(run / "model.keras", split=split, config=config, best_epoch=2, ranks=1)
    answer = call("card", tmp_path / "one")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.strip() == str(run / "MODEL_CARD.md")
    text = (run / "MODEL_CARD.md").read_text()
    for finding, y, s in zip(FINDINGS, labels.T, scores.T, strict=True):
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {finding.replace('_', ' ')} |")
        )
        wanted = "undefined" if finding == "Hernia" else f"{roc_auc_score(y, s):.3f} ("
        assert wanted in row and row.endswith(f"| {y.sum()} |")
    for words in (
        "Not for clinical use",
        "vgg16",
        "abc123",
        "train 1,234",
        "3 of 7",
        "may leak",
        "not calibrated",
    ):
        assert words in text, words
    assert "synthetic" in text and str(tmp_path) not in text and str(phantom) not in text
    extend_card(
        run / "model.keras",
        calibration={"method": "temperature", "Mass": {"temperature": 1.25}},
        operating_points={"Mass": {"youden": {"threshold": 0.125}}},
    )
    call("card", run)
    text = (run / "MODEL_CARD.md").read_text()
    assert "not calibrated" not in text
    for line in (
        "## Calibration",
        "- Mass, temperature: 1.25",
        "## Operating points",
        "- Mass, youden, threshold: 0.125",
    ):
        assert line in text.splitlines()


def test_card_refuses_a_folder_without_one_model(vgg_file, tmp_path):
    refused("card", tmp_path, naming=[tmp_path, "model.keras"])
    for name in ("03_a", "04_b"):
        shutil.copytree(vgg_file.parent, tmp_path / name)
    refused("card", tmp_path, naming=["03_a", "04_b"])
    refused("card", tmp_path / "03_a", naming=["predictions.parquet"])


def test_card_says_what_the_card_of_the_weights_lacks(vgg_file, tmp_path):
    """An ensemble's has no split or settings of a training, if nobody has added them."""
    run = tmp_path / "run"
    shutil.copytree(vgg_file.parent, run)
    values = {"image": ["a.png", "b.png"], "patient": [1, 2], "part": ["test"] * 2}
    values |= {f"{kind}_{f}": [0, 1] for kind in ("label", "score") for f in FINDINGS}
    pd.DataFrame(values).to_parquet(run / "predictions.parquet")
    for facts in ({}, {"split": None}):
        extend_card(run / "model.keras", **facts)
        refused("card", run, naming=[run / "model.keras", "lacks something", "extend_card"])
    assert not (run / "MODEL_CARD.md").exists()


@pytest.mark.parametrize(
    "damage", ["another table", "text", "labels alone", "cut", "empty", "gone"]
)
def test_card_refuses_predictions_that_are_none(vgg_file, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(vgg_file.parent, run)
    file, values = run / "predictions.parquet", {"image": ["a"], "patient": [1], "part": ["test"]}
    values |= {f"label_{f}": [0.0] for f in FINDINGS}
    scores = {f"score_{f}": ["high"] for f in FINDINGS}
    tables = {"another table": {"a": [1]}, "text": {**values, **scores}, "labels alone": values}
    if damage in tables:
        pd.DataFrame(tables[damage]).to_parquet(file)
    elif damage != "gone":
        file.write_bytes(b"PAR1 and no more" if damage == "cut" else b"")
    refused("card", run, naming=[file, "Name the folder of a run"])
    assert not (run / "MODEL_CARD.md").exists()


def test_evaluate_says_what_is_no_file_of_scores_in_one_line(phantom, tmp_path):
    (tmp_path / "README.md").write_text("# A text\n\nof words,\nwith commas, here, and, there\n")
    refused("evaluate", tmp_path, "--data", phantom, naming=[f"{tmp_path} is a folder"])
    refused("evaluate", tmp_path / "none", "--data", phantom, naming=["there is no file"])
    refused("evaluate", tmp_path / "README.md", "--data", phantom, naming=["README.md cannot be"])


def test_a_broken_image_is_told_without_a_call_that_predict_does_not_have(vgg_file, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nabc")
    line = refused(
        "predict", tmp_path / "broken.png", "--weights", vgg_file, naming=["it is neither"]
    )
    assert "check_images" not in line and "object at" not in line


def test_whatever_a_file_brings_about_is_its_own_error(images, vgg_file, monkeypatch):
    read = chexlib.models.predict.read_picture

    def spoilt(path):
        if path == images[0]:
            raise MemoryError("9 GiB")
        return read(path)

    monkeypatch.setattr(chexlib.models.predict, "read_picture", spoilt)
    answer = call("predict", *images[:2], "--weights", vgg_file, "--json")
    assert answer.exit_code == 1, answer.output
    found = json.loads(answer.stdout)
    assert list(found["probabilities"]) == images[1:2] and "9 GiB" in found["errors"][images[0]]


# --- train


@pytest.mark.parametrize(
    ("text", "naming"),
    [
        ('{"data_dir": "d", "run_dir": "r", "epoch": 3}', ["epoch", "Did you mean 'epochs'?"]),
        ('{"data_dir": "d", "run_dir": "r", "size": 8}', ["size=8"]),
        ('{"run_dir": "r"}', ["data_dir"]),
        ("[1, 2]", ["names with values"]),
        ('{"data_dir": ', ["config.json", "JSON"]),
        (None, ["config.json"]),
    ],
)
def test_train_refuses_a_config_that_cannot_be_used(tmp_path, text, naming):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    before = sorted(tmp_path.iterdir())
    refused("train", "--config", tmp_path / "config.json", naming=naming)
    assert sorted(tmp_path.iterdir()) == before


def test_train_refuses_a_data_folder_without_csv_and_makes_no_run_folder(tmp_path):
    config = {"data_dir": str(tmp_path / "none"), "run_dir": str(tmp_path / "run"), "size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("train", "--config", tmp_path / "config.json", naming=[tmp_path / "none"])
    assert not (tmp_path / "run").exists()


# --- clean


def test_clean_ends_what_a_notebook_left_behind_and_says_how_many(tmp_path, monkeypatch):
    mark = (
        f"test-cluster-{os.getpid()}-"  # never the real prefix: clusters of others may be running
    )
    monkeypatch.setattr(chexlib.cluster.cleanup, "PREFIX", mark)
    assert call("clean").output == "0 processes ended\n"
    left = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); import time; time.sleep(120)"],
        env={**os.environ, "IPP_PROFILE_DIR": str(tmp_path / f"{mark}abc")},
        stdout=subprocess.PIPE,
    )
    try:
        left.stdout.readline()
        answer = call("clean")
        assert answer.exit_code == 0
        assert answer.output == "1 processes ended\n"
        assert not psutil.pid_exists(left.pid)
    finally:
        left.kill()
        left.wait()
        left.stdout.close()
