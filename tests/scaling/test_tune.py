"""The sweep over layouts: what it measures, keeps, takes up again and makes of it."""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import chexlib.app.execute
from chexlib.app.cli import main
from chexlib.errors import ClusterError, ConfigError, DataError
from chexlib.files import ROOT
from chexlib.scaling import throughput
from chexlib.scaling import tune as module
from chexlib.scaling.throughput import measure
from chexlib.scaling.tune import layouts, save_winner, tune


@pytest.mark.parametrize(
    ("processors", "expected"),
    [
        (1, [(1, 1)]),
        (2, [(1, 1), (1, 2), (2, 1)]),
        (6, [(1, 1), (1, 2), (1, 4), (1, 6), (2, 1), (2, 2), (4, 1), (6, 1)]),
    ],
)
def test_layouts_use_no_more_processors_than_there_are(monkeypatch, processors, expected):
    monkeypatch.setattr(module, "cores", lambda: processors)
    assert layouts() == expected


@pytest.fixture
def measured(monkeypatch):
    """Two processors, and speeds that are made up: the calls that were made."""
    calls = []

    def pretend(settings, *, ranks, threads, steps):
        calls.append((settings["batch_per_rank"], settings["precision"], ranks, threads))
        return {
            "images_per_second": 10.0 * ranks + threads + settings["batch_per_rank"],
            "gflop_per_image": 2.0,
        }

    monkeypatch.setattr(module, "measure", pretend)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    return calls


SWEEPER = """
import sys
from chexlib.scaling import tune
tune.measure = lambda settings, **layout: {"images_per_second": 1.0, "gflop_per_image": 2.0}
tune.layouts = lambda: [(1, threads) for threads in range(1, 31)]
tune.tune(sweep=sys.argv[1], batches=(int(sys.argv[2]),))
"""


def test_every_layout_is_measured_once_and_the_fastest_comes_first(measured, tmp_path):
    table = tune(sweep=tmp_path / "sweep.json")
    assert len(measured) == 3
    assert table[["ranks", "threads"]].to_numpy().tolist() == [[2, 1], [1, 2], [1, 1]]
    assert table["images_per_second"].tolist() == [37, 28, 27]
    assert table["gflops"].tolist() == [74, 56, 54]
    again = tune(sweep=tmp_path / "sweep.json")
    assert len(measured) == 3 and again.equals(table)
    tune(sweep=tmp_path / "sweep.json", batches=(16, 8))
    assert len(measured) == 6 and {call[0] for call in measured[3:]} == {8}


def test_an_interrupted_sweep_goes_on_where_it_was(measured, tmp_path, monkeypatch):
    whole, sweep = module.measure, tmp_path / "new" / "sweep.json"

    def interrupted(settings, **layout):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(settings, **layout)

    monkeypatch.setattr(module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(sweep=sweep)
    assert len(json.loads(sweep.read_text())) == 2
    monkeypatch.setattr(module, "measure", whole)
    assert len(tune(sweep=sweep)) == 3 == len(measured)


def test_sweeps_at_the_same_time_keep_each_others_points(tmp_path):
    """Four processes, each with a batch of its own, write to one file 30 times."""
    command = [sys.executable, "-c", SWEEPER, str(tmp_path / "sweep.json")]
    sweepers = [subprocess.Popen([*command, str(batch)], cwd=ROOT) for batch in (1, 2, 3, 4)]
    assert [sweeper.wait(120) for sweeper in sweepers] == [0] * 4
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert Counter(row["batch_per_rank"] for row in rows) == {batch: 30 for batch in (1, 2, 3, 4)}
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_points_of_fewer_steps_do_not_count(measured, tmp_path):
    for steps, calls in [(2, 3), (6, 6), (2, 6)]:
        tune(sweep=tmp_path / "sweep.json", steps=steps)
        assert len(measured) == calls


def test_points_of_another_machine_do_not_count(measured, tmp_path):
    tune(sweep=tmp_path / "sweep.json")
    rows = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(
        json.dumps([{**row, "processor": "another"} for row in rows])
    )
    tune(sweep=tmp_path / "sweep.json")
    assert len(measured) == 6


def test_a_layout_that_fails_is_left_out_and_said(measured, tmp_path, monkeypatch, caplog):
    whole = module.measure

    def failing(settings, *, ranks, threads, steps):
        if ranks == 2:
            raise ClusterError("no memory for two")
        return whole(settings, ranks=ranks, threads=threads, steps=steps)

    monkeypatch.setattr(module, "measure", failing)
    table = tune(sweep=tmp_path / "sweep.json")
    assert "no memory for two" in caplog.text
    assert table["images_per_second"].isna().tolist() == [False, False, True]
    assert save_winner(table, tmp_path / "tuned.yaml") == {"engines": 1, "threads": 2}
    monkeypatch.setattr(
        module, "measure", whole
    )  # it was a bad hour: what failed is measured again, no more
    assert tune(sweep=tmp_path / "sweep.json")["images_per_second"].notna().all()
    assert len(measured) == 3
    with pytest.raises(ConfigError, match="no number of ranks"):
        save_winner(table[2:], tmp_path / "other.yaml")


def test_the_winner_is_a_profile_of_what_was_compared(measured, tmp_path):
    table = tune(
        sweep=tmp_path / "sweep.json",
        batches=(8, 32),
        precisions=("float32", "mixed_bfloat16"),
    )
    assert len(table) == 12
    save_winner(table, tmp_path / "tuned.yaml")
    text = (tmp_path / "tuned.yaml").read_text()
    assert yaml.safe_load(text) == {
        "engines": 2,
        "threads": 1,
        "batch_size": 32,
        "precision": "float32",
    }
    assert "53.00 images/s, the fastest of 12" in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"topology": "lenet"},
        {"size": 8},
        {"batches": (0,)},
        {"precisions": ("fp8",)},
        {"steps": 0},
        {"steps": -1},
    ],
)
def test_impossible_settings_are_refused_before_anything_is_measured(measured, tmp_path, wrong):
    with pytest.raises(ConfigError):
        tune(sweep=tmp_path / "sweep.json", **wrong)
    assert not measured


@pytest.mark.parametrize("text", [b'[{"a', b"{}", b"[{}]", b"5", b"[5]", b"\xff", b"[" * 100_000])
def test_damaged_measurements_are_refused_by_name(measured, tmp_path, text):
    (tmp_path / "sweep.json").write_bytes(text)
    with pytest.raises(DataError, match=r"sweep\.json"):
        tune(sweep=tmp_path / "sweep.json")
    assert not measured


def test_the_command_makes_a_profile_that_run_takes_after_another(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(chexlib.app.execute, "ROOT", tmp_path)
    profiles = tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "quick.yaml").write_text("engines: 1\nepochs: 3\n")
    with pytest.raises(ConfigError, match="chexlib tune"):
        chexlib.app.execute._profile("quick,tuned")
    monkeypatch.setattr(module, "PROFILE", profiles / "tuned.yaml")
    monkeypatch.setattr(module, "SWEEP", tmp_path / "sweep.json")
    result = CliRunner().invoke(main, ["tune", "--topology", "vgg16", "--size", "64"])
    assert result.exit_code == 0 and str(profiles / "tuned.yaml") in result.output, result.output
    assert chexlib.app.execute._profile("quick,tuned") == {"engines": 2, "epochs": 3, "threads": 1}


@pytest.mark.cores
@pytest.mark.long  # notebook 08 does it in the whole run
def test_two_ranks_are_really_measured():
    settings = {"topology": "vgg16", "size": 32, "batch_per_rank": 2, "detail": True}
    found = measure(settings, ranks=2, threads=1, steps=3)
    assert len(found["seconds"]) == 3 and found["images_per_second"] > 0
    assert found["gflop_per_image"] > 1 and found["gradient_bytes"] == 4 * 14_721_870
    parts = {name: np.array(found[name]) for name in ("input_wait", "compute", "sum")}
    assert all(part.shape == (2, 3) and (part >= 0).all() for part in parts.values())
    # Pixels are ready at once, so it is the network that takes its time.
    assert np.median(parts["compute"]) > np.median(parts["input_wait"])
    assert (sum(parts.values())[0] <= found["seconds"]).all()


def test_ranks_that_end_or_are_too_slow_are_reported_with_their_words(monkeypatch):
    with pytest.raises(ClusterError, match="lenet"):
        measure({"topology": "lenet", "size": 32, "batch_per_rank": 2}, ranks=1, threads=1)
    monkeypatch.setattr(throughput, "TIMEOUT", 0.1)
    with pytest.raises(ClusterError, match=r"within 0\.1 s"):
        measure({"topology": "vgg16", "size": 32, "batch_per_rank": 2}, ranks=1, threads=1)
