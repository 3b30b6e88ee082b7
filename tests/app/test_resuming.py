"""A run that was killed goes on in its folder, where nothing is done twice; runs are compared with
the reference.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import MappingProxyType

import nbformat
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from damage import DAMAGE
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from scipy import stats
from scipy.special import expit, logit

import chexlib.app.execute
from chexlib.app.cli import main
from chexlib.app.reference import (
    ALIKE,
    APART,
    UNKNOWN,
    Estimate,
    compare_run,
    difference_p,
    estimates,
    keep_reference,
)
from chexlib.app.runs import finished, run_folder, start
from chexlib.errors import ConfigError
from chexlib.files import ROOT, write_json

BODY = """\
from pathlib import Path
from chexlib.app import runs
run = runs.start("NAME", run_dir=run_dir, parameters=dict(seed=seed))
log = Path(run_dir).parents[2] / "log"
with log.open("a") as file: file.write("NAME began, interrupted %s\\n" % run.interrupted)
"""
SLEEP = "import os, time\n(log.parent / 'kernel').write_text(str(os.getpid()))\nif not run.interrupted: time.sleep(600)"
EXECUTE = """\
import sys, pathlib, chexlib.app.execute
chexlib.app.execute.ROOT = pathlib.Path(sys.argv[1])
failed, report = chexlib.app.execute.execute(runs_dir=sys.argv[1] + "/runs", resume=True)
print("failed:", failed)
"""


def project(root, notebooks=MappingProxyType({"03_done": "pass", "04_killed": SLEEP})):
    for name, last in notebooks.items():
        cells = [BODY.replace("NAME", name), last, "run.finish(answer=1)"]
        first = new_code_cell(
            "seed: int = 0  # seed\nrun_dir: str = ''  # folder", metadata={"tags": ["parameters"]}
        )
        book = new_notebook(
            cells=[new_markdown_cell(f"# {name}"), first, *map(new_code_cell, cells)]
        )
        book.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        book.metadata["language_info"] = {"name": "python"}
        (root / "notebooks" / "profiles").mkdir(parents=True, exist_ok=True)
        nbformat.write(book, root / "notebooks" / f"{name}.ipynb")
    (root / "notebooks" / "profiles" / "quick.yaml").write_text("seed: 1\n")


def test_a_run_that_is_killed_goes_on_in_its_folder_with_what_is_not_finished(tmp_path):
    project(tmp_path)
    command = [sys.executable, "-c", EXECUTE, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "kernel").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    told = subprocess.run(command, capture_output=True, text=True)
    assert "another process is executing" in told.stderr and told.returncode
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kernel = int((tmp_path / "kernel").read_text())
    while psutil.pid_exists(kernel):  # it ends with its parent
        assert time.monotonic() < end
        time.sleep(0.1)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "failed: []" in again.stdout and "03_done: done before" in again.stdout, again.stderr
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "latest")
    assert {path.name for path in run.iterdir() if finished(path)} == {"03_done", "04_killed"}
    assert (run / "index.html").exists()
    began = (tmp_path / "log").read_text().splitlines()
    assert began == [
        "03_done began, interrupted False",
        "04_killed began, interrupted False",
        "04_killed began, interrupted True",
    ]


def test_an_interrupt_ends_both_of_two_notebooks_that_run_at_the_same_time(tmp_path):
    asleep = "import os, time\n(log.parent / f'kernel-{os.getpid()}').touch()\ntime.sleep(600)"
    project(tmp_path, {"05_one": asleep, "06_two": asleep, "07_three": asleep})
    script = f"import chexlib.app.execute\nchexlib.app.execute.end_when_told()\n{EXECUTE}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("kernel-*"))) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) != 0  # in less than the 20 s after which force is used
    kernels = [int(file.name.split("-")[1]) for file in tmp_path.glob("kernel-*")]
    assert len(kernels) == 2  # the third did not begin
    while any(psutil.pid_exists(kernel) for kernel in kernels):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_report_of_a_resumed_run_has_what_was_done_before_and_comes_later(
    tmp_path, monkeypatch
):
    project(tmp_path, {"03_first": "pass", "05_later": "pass"})
    monkeypatch.setattr(chexlib.app.execute, "ROOT", tmp_path)
    broken = ["03_first"]

    def pretend(path, output, parameters, **settings):
        book = nbformat.read(path, as_version=4)
        book.metadata["papermill"] = {"end_time": "2026", "exception": path.stem in broken or None}
        nbformat.write(book, output)
        for name in ("metrics", "params", "environment"):
            write_json(output.parent / f"{name}.json", {})

    monkeypatch.setattr("papermill.execute_notebook", pretend)
    chexlib.app.execute.execute(runs_dir=str(tmp_path / "runs"), resume=True)
    broken.clear()
    _, report = chexlib.app.execute.execute(runs_dir=str(tmp_path / "runs"), resume=True)
    text = report.read_text()
    assert (
        "03_first/notebook.html" in text
        and "05_later/notebook.html" in text
        and "Still to come" not in text
    )


ASKED = {
    "notebooks": ["03_train", "05_compare"],
    "profile": "standard",
    "settings": {"seed": 1, "rate": 0.5},
}


ENDED = {"metadata": {"papermill": {"end_time": "2026-11-26T10:00:00", "exception": None}}}


def finish(run, *names):
    for name in names:
        (run / name).mkdir()
        write_json(run / name / "metrics.json", {})
        (run / name / "notebook.ipynb").write_text(json.dumps(ENDED))


def test_a_run_goes_on_only_if_it_was_asked_for_the_same_and_is_not_finished(tmp_path):
    def folder(asked=ASKED, resume=True):
        with run_folder(asked, runs_dir=tmp_path, resume=resume) as run:
            return run

    first = folder()
    finish(first, "03_train")
    assert folder() == first
    assert folder({**ASKED, "settings": {"rate": 0.5, "seed": 1}}) == first
    others = [
        folder({**ASKED, "profile": "quick"}),
        folder({**ASKED, "settings": {"seed": 2, "rate": 0.5}}),
    ]
    assert len({first, *others, folder({**ASKED, "notebooks": ["03_train"]})}) == 4
    assert folder() == first  # and not the newest, which is another's
    finish(first, "05_compare")
    newer = folder()
    assert newer != first and folder() == newer
    assert folder(resume=False) not in (first, newer)


@pytest.mark.parametrize("spoilt", [{"end_time": None}, {"exception": True}, None])
def test_a_notebook_that_was_killed_while_it_was_written_is_not_finished(tmp_path, spoilt):
    finish(tmp_path, "03_train")
    assert finished(tmp_path / "03_train")
    text = json.dumps(
        {"metadata": {"papermill": {**ENDED["metadata"]["papermill"], **(spoilt or {})}}}
    )
    (tmp_path / "03_train" / "notebook.ipynb").write_text(text if spoilt else text[:-9])
    assert not finished(tmp_path / "03_train")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_passed_over_by_resume_and_its_notebooks_are_not_finished(
    tmp_path, damage
):
    with run_folder(ASKED, runs_dir=tmp_path / "runs") as whole:
        pass
    damaged = tmp_path / "runs" / "29990101-000000"
    damaged.mkdir()
    (damaged / "run.json").write_bytes(DAMAGE[damage])
    with run_folder(ASKED, runs_dir=tmp_path / "runs", resume=True) as run:
        assert run == whole
    finish(tmp_path, "03_train")
    (tmp_path / "03_train" / "notebook.ipynb").write_bytes(DAMAGE[damage])
    assert not finished(tmp_path / "03_train")
    (tmp_path / "params.json").write_bytes(DAMAGE[damage])
    assert not start("03_train", run_dir=str(tmp_path), parameters={"seed": 0}).interrupted


@pytest.mark.parametrize("noted", [{"papermill": {}}, {"papermill": None}, None, {"papermill": []}])
def test_a_notebook_without_papermills_note_is_not_finished(tmp_path, noted):
    finish(tmp_path, "03_train")
    write_json(tmp_path / "03_train" / "notebook.ipynb", {"metadata": noted})
    assert not finished(tmp_path / "03_train")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "notebook.ipynb"),
        MemoryError(),
        nbformat.reader.NotJSONError("half a notebook"),
    ],
)
def test_a_notebook_that_cannot_be_saved_does_not_end_the_others(
    tmp_path, monkeypatch, error, capsys
):
    project(tmp_path, {"03_train": "pass", "05_other": "pass"})
    monkeypatch.setattr(chexlib.app.execute, "ROOT", tmp_path)

    def pretend(path, output, parameters, **settings):
        if path.stem == "03_train":
            output.write_text('{"cells": [')  # what had room of it
            raise error
        book = nbformat.read(path, as_version=4)
        book.metadata.update(ENDED["metadata"])
        nbformat.write(book, output)

    monkeypatch.setattr("papermill.execute_notebook", pretend)
    failed, report = chexlib.app.execute.execute(runs_dir=str(tmp_path / "runs"))
    assert failed == ["03_train"]
    assert "05_other" in report.read_text()
    assert "03_train failed: " in capsys.readouterr().out


def test_papermill_saves_a_notebook_whole_or_not_at_all(tmp_path, monkeypatch):
    from papermill.iorw import papermill_io

    chexlib.app.execute._save_whole(tmp_path)
    file = tmp_path / "notebook.ipynb"
    papermill_io.write("before", str(file))

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*notebook\.ipynb'"):
        papermill_io.write("after", str(file))
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_a_run_that_finds_no_room_for_what_it_was_asked_leaves_no_folder(tmp_path, monkeypatch):
    def full(path, values):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(chexlib.app.runs, "write_json", full)
    with (
        pytest.raises(ConfigError, match="No space left on device"),
        run_folder(ASKED, runs_dir=tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", [b"a:\tb\n\t- c", b"- a\n- b", b"hello", b"\xff\xfe\x00", b"a: [", b"[" * 10_000]
)
def test_a_damaged_profile_is_refused_by_name(tmp_path, monkeypatch, text):
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "mine.yaml").write_bytes(text)
    monkeypatch.setattr(chexlib.app.execute, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be read as a profile"):
        chexlib.app.execute._profile("mine")


def test_a_kernel_that_does_not_start_fails_alone_and_what_reads_its_notebook_is_done_again(
    tmp_path, monkeypatch
):
    project(tmp_path, {"03_train": "pass", "05_other": "pass", "10_report": "pass"})
    monkeypatch.setattr(chexlib.app.execute, "ROOT", tmp_path)
    done, broken = [], ["03_train"]

    def pretend(path, output, parameters, **settings):
        done.append(path.stem)
        if path.stem in broken:
            raise RuntimeError("Kernel died before replying to kernel_info")
        book = nbformat.read(path, as_version=4)
        book.metadata.update(ENDED["metadata"])
        nbformat.write(book, output)
        for name in ("metrics", "params", "environment"):
            write_json(output.with_name(f"{name}.json"), {})

    monkeypatch.setattr("papermill.execute_notebook", pretend)
    failed, report = chexlib.app.execute.execute(runs_dir=str(tmp_path / "runs"))
    assert failed == ["03_train"] and done == ["03_train", "05_other", "10_report"]
    assert "Kernel died before replying" in report.read_text()
    done.clear()
    broken.clear()
    assert chexlib.app.execute.execute(runs_dir=str(tmp_path / "runs"), resume=True) == ([], report)
    assert done == ["03_train", "10_report"]


def test_two_processes_do_not_work_in_one_run(tmp_path):
    with (
        run_folder(ASKED, runs_dir=tmp_path) as run,
        pytest.raises(ConfigError, match="another process is executing"),
    ):
        run_folder(ASKED, runs_dir=tmp_path, resume=True).__enter__()
    with run_folder(ASKED, runs_dir=tmp_path, resume=True) as again:
        assert again == run


def test_a_notebook_knows_whether_it_was_interrupted_here(tmp_path):
    def begin(**parameters):
        return start("03_train", run_dir=str(tmp_path / "03"), parameters=parameters)

    assert not begin(seed=0).interrupted
    assert begin(seed=0).interrupted
    other = begin(seed=1)
    assert not other.interrupted  # checkpoints of other settings are of no use
    other.finish()
    assert not begin(seed=1).interrupted


@pytest.mark.parametrize(
    "name", ["03_train_baseline", "04_train_distributed", "09_evaluate_and_explain"]
)
def test_an_interrupted_notebook_takes_its_trainings_up(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    assert sum("resume=run.interrupted" in cell.source for cell in cells) == 1


# --- comparison with reference results


def results(mean, *, epochs=3, low=0.1, high=0.1):
    row = {"auroc": mean, "low": mean - low, "high": mean + high, "positives": 9}
    gains = [
        {"topology": t, "batch": 16, "mean": mean, "low": None, "high": None, "seeds": 1}
        for t in "ab"
    ]
    metrics = {
        "auroc": {"Mass": row},
        "gains": gains,
        "e": {"0": {"gain": 0.1, "gain_low": 0, "gain_high": 0.2}},
    }
    return {
        "metrics": metrics,
        "params": {"epochs": epochs, "seed": 0},
        "environment": {},
        "profile": "standard",
    }


def kept(root, **notebooks):
    for name, (before, now) in notebooks.items():
        (root / "reference").mkdir(exist_ok=True)
        write_json(root / "reference" / f"{name}.json", before)
        (root / "run" / name).mkdir(parents=True)
        for part in ("metrics", "params", "environment"):
            write_json(root / "run" / name / f"{part}.json", now[part])
    return root / "run"


def test_each_figure_with_an_interval_is_compared_and_other_parameters_are_told(tmp_path):
    run = kept(
        tmp_path,
        **{
            "03_train": (results(0.5), results(0.8, epochs=1)),
            "05_x": (results(0.5), results(0.6)),
        },
    )
    found = compare_run(run, reference=tmp_path / "reference")
    assert (
        found["03_train"]["parameters"] == {"epochs": (3, 1)} and found["05_x"]["parameters"] == {}
    )
    table = found["03_train"]["estimates"]
    row = table.loc["auroc / Mass / auroc"]
    assert (
        row.tolist()[:6] == [0.5, 0.4, 0.6, 0.8, pytest.approx(0.7), 0.9]
        and row["verdict"] == APART
    )
    assert found["05_x"]["estimates"]["verdict"].to_dict() == {
        "auroc / Mass / auroc": ALIKE,
        "gains / topology a, batch 16 / mean": UNKNOWN,
        "gains / topology b, batch 16 / mean": UNKNOWN,
        "e / 0 / gain": ALIKE,
    }


def test_compare_on_the_command_line_shows_what_is_apart_and_exits_with_1(tmp_path, monkeypatch):
    run = kept(
        tmp_path, **{"03_train": (results(0.5), results(0.8)), "05_x": (results(0.5), results(0.6))}
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "reference").rename(tmp_path / "data" / "reference")
    monkeypatch.setattr("chexlib.app.reference.ROOT", tmp_path)
    answer = CliRunner().invoke(main, ["compare", str(run)])
    assert answer.exit_code == 1 and answer.output.count("auroc / Mass / auroc") == 1
    assert (
        "03_train, reference of profile standard: 1 no difference shown, 1 DIFFERENT, 2 no interval"
        in answer.output
    )
    (run / "03_train" / "metrics.json").unlink()
    answer = CliRunner().invoke(main, ["compare", str(run), "--all"])
    assert answer.exit_code == 0 and answer.output.count("auroc / Mass / auroc") == 1


def test_a_figure_is_found_by_its_interval_whatever_it_is_named():
    rows = [
        {
            "finding": "all",
            "measure": "iou",
            "threshold": t,
            "share": 0.5,
            "low": 0.4,
            "high": 0.6,
            "cases": n,
        }
        for n, t in enumerate((0.1, 0.2))
    ]
    later = {
        "gain": 0.2,
        "low": 0.1,
        "high": 0.3,
        "seeds": 3,
        "gain_later": -0.1,
        "low_later": -0.2,
        "high_later": 0.0,
    }
    last = {
        "gain": 0.2,
        "low": 0.1,
        "high": 0.3,
        "seeds": 3,
        "gain_later": None,
        "low_later": None,
        "high_later": None,
    }
    metrics = {
        "pointing": rows,
        "weak": {
            "ranks": 2,
            "images_per_second": 99.7,
            "efficiency": 0.9,
            "low": 0.8,
            "high": 1.0,
            "rounds": 3.0,
        },
        "rule": {"effect": 0.1, "low": 0.0, "high": 0.2, "seeds": 3},
        "means": [{"batch": 16, "mean": 0.6, "seeds": 1, "low": None, "high": None}],
        "difference": {
            "auroc": 0.9,
            "other": 0.8,
            "difference": 0.1,
            "low": 0.0,
            "high": 0.2,
            "p": 0.05,
        },
        "error": {"rms": 0.1, "rms_low": 0.0, "rms_high": 0.2, "ece": 0.1, "ece_chance": 0.1},
        "member": {
            "gain": 0.0,
            "gain_low": 0.0,
            "gain_high": 0.0,
            "gain_Mass": 1,
            "gain_low_Mass": 0,
            "gain_high_Mass": 2,
        },
        "collapse": {"5": later, "6": last},
    }
    assert {name: (found.value, found.count) for name, found in estimates(metrics)} == {
        "pointing / finding all, measure iou, threshold 0.1 / share": (0.5, None),
        "pointing / finding all, measure iou, threshold 0.2 / share": (0.5, None),
        "weak / efficiency": (0.9, 3),
        "rule / effect": (0.1, 3),
        "means / batch 16 / mean": (0.6, 1),
        "difference / difference": (0.1, None),
        "error / rms": (0.1, None),
        "member / gain": (0.0, None),
        "member / gain_Mass": (1, None),
        "collapse / 5 / gain": (0.2, 3),
        "collapse / 5 / gain_later": (-0.1, 3),
        "collapse / 6 / gain": (0.2, 3),
    }


def test_two_means_over_seeds_differ_as_by_welchs_test():
    one, other = np.array([0.70, 0.73, 0.71]), np.array([0.76, 0.75, 0.79, 0.80])
    means = []
    for values in (one, other):
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        means.append(
            Estimate(values.mean(), values.mean() - half, values.mean() + half, len(values), True)
        )
    assert difference_p(*means, []) == pytest.approx(
        stats.ttest_ind(one, other, equal_var=False).pvalue
    )


def test_the_sides_of_two_intervals_that_face_each_other_decide():
    """By hand: 0.15 apart, standard errors 0.1 / 1.96 and 0.05 / 1.96, hence z = 2.63."""
    one, other = Estimate(0.8, 0.5, 0.9, None, True), Estimate(0.95, 0.9, 0.99, None, True)
    assert difference_p(one, other, []) == pytest.approx(
        2 * stats.norm.sf(0.15 * 1.96 / np.hypot(0.1, 0.05)), rel=1e-3
    )
    assert difference_p(one, other, []) == difference_p(other, one, [])
    assert np.isnan(
        difference_p(one, Estimate(0.9, 0.9, 0.9), [])
    )  # one member was chosen: no interval


BASELINE = json.loads((ROOT / "data" / "reference" / "03_train_baseline.json").read_text())
BASELINE["metrics"] = {
    name: BASELINE["metrics"][name] for name in ("auroc", "control_auroc", "best_epoch")
}


def honest_run(rng, *, training=0.0):
    """Metrics of notebook 03, as another draw of patients and another training give them, on the
    scale of logits.
    """

    def drawn(value):
        if not isinstance(value, dict):
            return value
        found = {name: drawn(own) for name, own in value.items()}
        for name, low, high in (("auroc", "low", "high"), ("ap", "ap_low", "ap_high")):
            if low in value:
                low_end, high_end = logit([value[low], value[high]])
                reach = (high_end - low_end) / 2
                at = logit(value[name]) + reach / 1.96 * np.hypot(1, training) * rng.normal()
                found |= {name: expit(at), low: expit(at - reach), high: expit(at + reach)}
        return found

    return drawn(BASELINE["metrics"])


def called_different(tmp_path, before, now):
    write_json(tmp_path / "reference" / "03_train_baseline.json", before)
    write_json(tmp_path / "run" / "03_train_baseline" / "metrics.json", now)
    table = compare_run(tmp_path / "run", reference=tmp_path / "reference")["03_train_baseline"][
        "estimates"
    ]
    return set(table.index[table["verdict"] == APART])


@pytest.mark.parametrize(("training", "seeds"), [(1.4, 0), (2.0, 3)])
def test_two_honest_runs_are_rarely_called_different_over_all_figures(tmp_path, training, seeds):
    """500 pairs, 32 figures each. With 5 % expected at most, 38 or more have a chance of 1 %.

    `training` is the error of another seed, in standard errors over patients. Where it is larger
    than is known of our trainings, the reference's other seeds have to say so.
    """
    (tmp_path / "reference").mkdir()
    (tmp_path / "run" / "03_train_baseline").mkdir(parents=True)
    write_json(tmp_path / "run" / "03_train_baseline" / "params.json", BASELINE["params"])
    rng, called = np.random.default_rng(0), 0
    for _ in range(500):
        before = {**BASELINE, "metrics": honest_run(rng, training=training)}
        others = [dict(estimates(honest_run(rng, training=training))) for _ in range(seeds)]
        before["seeds"] = {
            str(i + 1): {n: e.value for n, e in own.items()} for i, own in enumerate(others)
        }
        called += bool(called_different(tmp_path, before, honest_run(rng, training=training)))
    assert called < 38


@pytest.mark.parametrize("seeds", [0, 3])
def test_a_finding_whose_labels_were_swapped_is_found(tmp_path, seeds):
    (tmp_path / "reference").mkdir()
    (tmp_path / "run" / "03_train_baseline").mkdir(parents=True)
    write_json(tmp_path / "run" / "03_train_baseline" / "params.json", BASELINE["params"])
    rng, found = np.random.default_rng(1), 0
    for _ in range(20):
        before, now = {**BASELINE, "metrics": honest_run(rng)}, honest_run(rng)
        others = [dict(estimates(honest_run(rng))) for _ in range(seeds)]
        before["seeds"] = {
            str(i + 1): {n: e.value for n, e in own.items()} for i, own in enumerate(others)
        }
        row = now["auroc"]["Fibrosis"]  # the least sure but one
        row |= {"auroc": 1 - row["auroc"], "low": 1 - row["high"], "high": 1 - row["low"]}
        found += "auroc / Fibrosis / auroc" in called_different(tmp_path, before, now)
    assert found >= 19


def test_a_run_of_another_seed_is_added_to_the_reference_and_any_other_replaces_it(tmp_path):
    def run(seed, mean, commit="abc", **other):
        folder = tmp_path / "run" / "03_train"
        folder.mkdir(parents=True, exist_ok=True)
        found = results(mean)
        params = {"epochs": 3, "seed": seed, "phantom": {"images": 9, "seed": seed}, **other}
        for name, part in {**found, "params": params, "environment": {"commit": commit}}.items():
            write_json(folder / f"{name}.json", part)
        keep_reference(folder, "standard", root=tmp_path)
        return json.loads((tmp_path / "data" / "reference" / "03_train.json").read_text())

    assert "seeds" not in run(0, 0.5)
    run(1, 0.6)
    kept = run(2, 0.7)
    assert kept["metrics"]["auroc"]["Mass"]["auroc"] == 0.5 and kept["params"]["seed"] == 0
    assert {seed: own["auroc / Mass / auroc"] for seed, own in kept["seeds"].items()} == {
        "1": 0.6,
        "2": 0.7,
    }
    again = run(0, 0.55)
    assert again["metrics"]["auroc"]["Mass"]["auroc"] == 0.55 and again["seeds"] == kept["seeds"]
    for other in ({"seed": 3, "epochs": 4}, {"seed": 5, "epochs": 4, "commit": "abc-dirty"}):
        fresh = run(mean=0.8, **other)
        assert "seeds" not in fresh and fresh["metrics"]["auroc"]["Mass"]["auroc"] == 0.8


def test_a_run_without_anything_to_compare_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no results that can be compared"):
        compare_run(tmp_path, reference=tmp_path)
    (tmp_path / "03_train.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="03_train"):
        compare_run(tmp_path, reference=tmp_path)
