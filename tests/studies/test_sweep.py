"""A grid's rows are each measured once, whatever ends the process, and one table serves several
grids.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from small_training import grid_of_three

from chexlib import stopping
from chexlib.errors import ConfigError
from chexlib.files import file_lock
from chexlib.studies import grid as sweep
from chexlib.studies.grid import MADE_BY, deciding_settings, point_key, run_grid
from chexlib.training.config import TrainConfig
from chexlib.training.trainer import Reuse

POINTS = [{"batch": batch, "seed": seed} for batch in (16, 64) for seed in (0, 1, 2)]


def counted(calls):
    def measure(point, folder):
        calls.append(point)
        return {"auroc": point["batch"] / 100 + point["seed"]}

    return measure


def test_a_row_is_measured_once_and_rows_come_in_the_order_asked_for(tmp_path):
    calls, table = [], tmp_path / "made" / "grid.jsonl"
    first = run_grid(POINTS[3:], table, counted(calls))
    rows = run_grid([*POINTS, {"seed": 0, "batch": 16}], table, counted(calls))
    assert calls == POINTS[3:] + POINTS[:3] and len(first) == 3
    assert rows[["batch", "seed"]].to_dict("records") == POINTS
    assert list(rows["auroc"]) == [p["batch"] / 100 + p["seed"] for p in POINTS]
    assert len(pd.read_json(table, lines=True)) == 6 and [
        p.name for p in table.parent.iterdir() if p.is_file()
    ] == [table.name]


def test_grids_with_other_settings_share_a_table_and_keep_their_types(tmp_path):
    table = tmp_path / "grid.jsonl"
    ours = run_grid([{"seed": 1}], table, lambda point, folder: {"steps": 7})
    theirs = run_grid([{"rate": 0.1, "norm": None}], table, lambda point, folder: {"auroc": 0.5})
    again = run_grid([{"seed": 1}], table, None)
    pd.testing.assert_frame_equal(ours, again)
    assert list(theirs) == ["key", "rate", "norm", "auroc", *MADE_BY]
    assert list(again) == ["key", "seed", "steps", *MADE_BY]
    assert again["steps"].dtype == int


def test_a_row_that_was_stopped_is_not_kept_and_ends_the_grid(tmp_path):
    table, calls = tmp_path / "grid.jsonl", []

    def stopped_at_the_third(point, folder):
        calls.append(point)
        (folder / "checkpoint").touch()
        return None if len(calls) == 3 else {"auroc": 0.5}

    rows = run_grid(POINTS, table, stopped_at_the_third)
    assert len(rows) == 2 and len(calls) == 3
    found = []
    run_grid(
        POINTS,
        table,
        lambda point, folder: {"there": found.append(os.listdir(folder))},
    )
    assert (
        found[0] == ["checkpoint"] and found[1:] == [[]] * 3
    )  # only the stopped one left something
    assert list((tmp_path / ".grid-work").iterdir()) == []


def test_results_that_hide_a_setting_and_files_that_are_no_grid_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="seed"):
        run_grid(POINTS, tmp_path / "grid.jsonl", lambda point, folder: {"seed": 3})
    with pytest.raises(ConfigError, match="commit"):
        run_grid(POINTS, tmp_path / "grid.jsonl", lambda point, folder: {"commit": "a"})
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    for text in ('{"a": 1}', '"key"', "[]", "{", "null"):
        (tmp_path / f"other.{text.count(chr(34))}").write_text(text)
    for table in tmp_path.glob("other*"):
        with pytest.raises(ConfigError, match=rf"{table.name} is not a table of a grid"):
            run_grid(POINTS, table, counted([]))
    with pytest.raises(ConfigError, match="the grid has no training"):
        run_grid([], tmp_path / "grid.jsonl", counted([]))


@pytest.mark.parametrize("line", ["{", "5", "[]", "[" * 100_000, '{"seed": 0}'])
def test_a_table_with_a_line_that_is_no_row_is_refused_and_kept(tmp_path, line):
    table = tmp_path / "grid.jsonl"
    table.write_text('{"key": "a"}\n' + line + "\n")
    before = table.read_bytes()
    with pytest.raises(ConfigError, match=r"grid\.jsonl is not a table of a grid") as told:
        run_grid(POINTS, table, counted([]))
    assert "\n" not in str(told.value) and table.read_bytes() == before


def test_a_row_of_another_training_version_or_precision_is_trained_anew_and_told_in_one_line(
    tmp_path, monkeypatch, caplog
):
    calls, table = [], tmp_path / "grid.jsonl"
    caplog.set_level("INFO", logger="chexlib")
    monkeypatch.setattr(sweep, "native_precision", lambda: "float32")
    first = run_grid(POINTS, table, counted(calls))
    assert set(first["training_version"]) == {sweep.TRAINING_VERSION} and set(
        first["precision"]
    ) == {"float32"}
    named = [
        {**point, "precision": "float32"} for point in POINTS
    ]  # what they were trained in, by name
    assert list(run_grid(named, table, counted(calls))["key"]) == list(first["key"])
    assert len(calls) == 6 and "not of training version" not in caplog.text
    monkeypatch.setattr(sweep, "native_precision", lambda: "mixed_bfloat16")  # another processor
    assert set(run_grid(POINTS, table, counted(calls))["precision"]) == {"mixed_bfloat16"}
    assert len(calls) == 12
    monkeypatch.setattr(sweep, "TRAINING_VERSION", 99)
    caplog.clear()
    again = run_grid(POINTS[:2], table, counted(calls))
    assert len(calls) == 14 and set(again["training_version"]) == {99}
    told = [message for message in caplog.messages if "not of training version" in message]
    assert told == [
        "grid: 12 of 12 rows are not of training version 99 and are not used; 2 to be trained"
    ]
    assert len(pd.read_json(table, lines=True)) == 14


def test_rows_that_name_no_version_are_stale(tmp_path, caplog):
    """The key of such a row is the hash of the settings alone."""
    calls, table = [], tmp_path / "grid.jsonl"
    caplog.set_level("INFO", logger="chexlib")
    old = [
        {"key": hashlib.sha256(json.dumps(p, sort_keys=True).encode()).hexdigest()[:16], **p}
        for p in POINTS
    ]
    table.write_text("".join(json.dumps({**row, "auroc": 0.1}) + "\n" for row in old))
    rows = run_grid(POINTS, table, counted(calls))
    assert len(calls) == 6 and (rows["auroc"] != 0.1).all()
    assert (
        sum("6 of 6 rows are not of training version" in message for message in caplog.messages)
        == 1
    )


def test_commit_and_machine_are_told_in_a_row_and_are_no_part_of_its_key(tmp_path, monkeypatch):
    calls, table, about = (
        [],
        tmp_path / "grid.jsonl",
        {"processor": "A", "cores": 2, "commit": "abc"},
    )
    monkeypatch.setattr("chexlib.studies.grid.environment", lambda: about)
    (row,) = run_grid(POINTS[:1], table, counted(calls)).to_dict("records")
    assert (row["commit"], row["machine"]) == ("abc", "A, 2 cores")
    about.update(commit="def", processor="B")
    (again,) = run_grid(POINTS[:1], table, counted(calls)).to_dict("records")
    assert again == row and len(calls) == 1


def test_every_setting_that_decides_a_training_is_in_its_key_and_no_folder_is(tmp_path):
    base = TrainConfig(data_dir=str(tmp_path), run_dir=str(tmp_path))
    free = {
        "data_dir": "/a",
        "run_dir": "/b",
        "checkpoint_steps": 5,
        "keep_checkpoints": 1,
        "resume": True,
    }
    free |= {"resume_keeps": "rank_batch", "skip_broken": True, "allow_leak": True}
    key = point_key(deciding_settings(base))
    for name, value in free.items():
        assert point_key(deciding_settings(base.replace(**{name: value}))) == key, name
    schedule = {"preset": "step decay", "peak": 0.1, "epochs": 10}
    numbers = dict.fromkeys(("size", "batch_size", "accumulation", "epochs", "max_steps"), 48)
    numbers |= dict.fromkeys(
        ("recalibrate", "max_images", "train_images", "seed", "split_seed"), 48
    )
    numbers |= dict.fromkeys(
        ("learning_rate", "plateau_factor", "weight_decay", "norm_momentum", "stage_rate"), 0.5
    )
    numbers |= {"width": 0.25, "group_share": 0.5, "head_bias": 1.0, "plateau_delta": 0.01}
    words = {
        "topology": "vgg16",
        "stem": "small",
        "weights": "w",
        "optimizer": "sgd",
        "augment": "study",
        "split": "patient",
    }
    words |= {
        "precision": "mixed_bfloat16" if base.precision == "float32" else "float32",
        "schedule": schedule,
    }
    flags = {"mirror": False, "fresh_head": True, "snapshots": True, "shuffle_labels": True}
    norms = {"norm": "ghost", "ghost_size": 4}  # which go together
    assert {*free, *numbers, *words, *flags, *norms} == set(base.to_dict())
    keys = {point_key(deciding_settings(base.replace(**norms)))}
    for name, value in {**numbers, **words, **flags}.items():
        keys.add(point_key(deciding_settings(base.replace(**{name: value}))))
    assert len(keys - {key}) == len(numbers) + len(words) + len(flags) + 1
    flat = deciding_settings(base.replace(schedule=schedule))
    assert not [value for value in flat.values() if isinstance(value, dict | list)]


class InLine:
    """Stands for engines: what is sent to them is done here. `then(result)` is called after each."""

    def __init__(self, then=lambda result: None):
        self.then = then

    def share(self, function, tasks):
        while tasks and not stopping.requested():
            task = tasks.popleft()
            result = function(*pickle.loads(pickle.dumps(task)))
            self.then(result)
            yield task, result


def measured(point, folder):
    return {"auroc": point["batch"] / 100 + point["seed"]}


def stopped_at_large_batches(point, folder):
    return None if point["batch"] == 64 else measured(point, folder)


def test_engines_write_the_rows_of_one_process(tmp_path):
    run_grid(POINTS[2:3], tmp_path / "shared.jsonl", measured)  # one is there before
    shared = run_grid(POINTS, tmp_path / "shared.jsonl", measured, engines=InLine())
    pd.testing.assert_frame_equal(shared, run_grid(POINTS, tmp_path / "alone.jsonl", measured))
    assert list((tmp_path / ".shared-work").iterdir()) == []


def test_a_point_in_other_hands_is_left_to_them_and_taken_over_if_they_end_without_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    (work := tmp_path / ".grid-work").mkdir()
    seen = []

    def then(result):
        seen.append(result)
        if len(seen) == len(POINTS):
            others.close()  # as by the end of the other process

    with contextlib.ExitStack() as others:
        others.enter_context(file_lock(work / f"{point_key(POINTS[0])}.lock"))
        rows = run_grid(POINTS, tmp_path / "grid.jsonl", measured, engines=InLine(then))
    assert seen == [None, *[True] * len(POINTS)] and len(rows) == len(POINTS)


def test_one_stop_ends_the_grid_on_all_engines(tmp_path, caplog):
    caplog.set_level("INFO", logger="chexlib")
    table = tmp_path / "grid.jsonl"
    rows = run_grid(POINTS, table, stopped_at_large_batches, engines=InLine())
    assert len(rows) == 3 and "stopped with 3 rows to go" in caplog.text
    assert not stopping.requested()  # the next grid is not stopped
    assert len(run_grid(POINTS, table, measured, engines=InLine())) == len(POINTS)


def test_what_cannot_be_sent_to_engines_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Use a function of a module"):
        run_grid(POINTS, tmp_path / "grid.jsonl", lambda point, folder: {}, engines=InLine())


def test_a_trainer_that_is_used_again_stays_in_its_process():
    reuse = Reuse(accumulates=True)
    reuse._key, reuse._trainer = {}, lambda: "a graph"
    sent = pickle.loads(pickle.dumps(reuse))
    assert vars(sent) == vars(Reuse(accumulates=True)) and reuse._trainer() == "a graph"


def test_a_grid_of_trainings_killed_three_times_gives_the_table_of_an_undisturbed_one(
    phantom, tmp_path, monkeypatch
):
    """Killed in the first, the second and the third training; each of them goes on from that of its
    first epoch.
    """
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(paths)
    )  # up to 3.12.7 nothing else is passed on
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["small_training"])  # TensorFlow is imported once for all

    def start(table):
        process = processes.Process(target=grid_of_three, args=(str(phantom), str(table)))
        process.start()
        return process

    calm, killed = tmp_path / "calm.jsonl", tmp_path / "killed.jsonl"
    whole = start(calm)
    whole.join()
    assert whole.exitcode == 0
    for times in range(1, 4):
        work = tmp_path / ".killed-work"
        process = start(killed)
        while process.is_alive():
            done = len(pd.read_json(killed, lines=True)) if killed.exists() else 0
            if done == times - 1 and list(work.glob("*/checkpoints/step*")):
                process.kill()
                break
            time.sleep(0.02)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert (len(pd.read_json(killed, lines=True)) if killed.exists() else 0) == times - 1
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    tables = [pd.read_json(table, lines=True) for table in (calm, killed)]
    # Of other commits, where somebody works meanwhile.
    pd.testing.assert_frame_equal(*(table.drop(columns="commit") for table in tables))
    assert tables[0]["seed"][0] == 0


def test_two_processes_share_a_grid_and_one_that_is_killed_leaves_its_row_to_the_other(tmp_path):
    """Each row is measured once; that of the process which sleeps over it and is killed is taken
    over.
    """
    table, log = tmp_path / "grid.jsonl", tmp_path / "log"
    code = """
import json, os, sys, time
from pathlib import Path
from chexlib.studies.grid import run_grid

table, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def measure(point, folder):
    with log.open("a") as file:
        file.write(json.dumps([os.getpid(), point["seed"]]) + chr(10))
    time.sleep(pause)
    return {"auroc": point["seed"] / 10}

print(len(run_grid([{"seed": seed} for seed in range(12)], table, measure)))
"""

    def start(pause):
        return subprocess.Popen(
            [sys.executable, "-c", code, table, log, str(pause)], stdout=subprocess.PIPE, text=True
        )

    def begun():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    with start(600) as asleep:
        while not begun():
            time.sleep(0.02)
        with start(0.2) as first, start(0.2) as second:
            while len(begun()) < 8:
                time.sleep(0.02)
            asleep.kill()
            told = [process.communicate()[0].strip() for process in (first, second)]
    assert told == ["12", "12"] and len(pd.read_json(table, lines=True)) == 12
    lost = [seed for pid, seed in begun() if pid == asleep.pid]
    by_others = [seed for pid, seed in begun() if pid != asleep.pid]
    assert lost == [0] and sorted(by_others) == list(range(12))
    assert len({pid for pid, _ in begun()}) == 3  # both of the others did some
    assert list((tmp_path / ".grid-work").iterdir()) == []


def test_a_table_that_another_process_replaces_again_and_again_is_read_whole(tmp_path):
    table, points = tmp_path / "grid.jsonl", [{"name": "a"}, {"name": "b"}]
    run_grid(points, table, lambda point, folder: {"value": 1})
    shutil.copy(table, tmp_path / "short")
    run_grid([{"name": 99 * "long"}], table, lambda point, folder: {"value": 1})
    shutil.copy(table, tmp_path / "long")
    code = """
import os, shutil, sys
while True:
    for name in ("short", "long"):
        shutil.copy(name, "spare")
        os.replace("spare", "grid.jsonl")
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        for _ in range(300):
            assert list(run_grid(points, table, None)["name"]) == ["a", "b"]
    finally:
        other.kill()
        other.wait()
