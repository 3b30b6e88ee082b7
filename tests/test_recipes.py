"""Trainings under a schedule: what they follow, that they go on from any place in it, and the collapse."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from small_training import config_for

from chexlib.cluster.profiles import find_mpi, thread_environment
from chexlib.errors import ConfigError, WeightsError
from chexlib.models.predict import predict
from chexlib.models.weights import load_model
from chexlib.training.checkpoints import checkpoint_files, load_checkpoint
from chexlib.training.collapse import collapse
from chexlib.training.fit import fit
from chexlib.training.monitor import Position
from chexlib.training.optimizers import values_at

# As coded: the polynomial counts from the start of the stage.
PHASES = [
    {"kind": "warmup", "length": 1, "start": 0.001, "rate": 0.02},
    {"kind": "polynomial", "length": 1, "rate": 0.02, "zero": 2.5, "count": "stage"},
    {"kind": "collapse", "length": 1, "rate": 0.01, "weight_decay": 0.02, "fresh": True},
]
SPEC = {"unit": "epochs", "decay": [[0, 0.001], [0.7, 0.01]], "phases": PHASES}
SETTINGS = {"schedule": SPEC, "optimizer": "sgd", "augment": "radiograph", "epochs": 3, "max_steps": 4}
QUIET = {"checkpoint_steps": 0, "keep_checkpoints": 0}  # of a network of 59 MB


@pytest.fixture(scope="module")
def undisturbed(phantom, tmp_path_factory):
    """Three epochs, one a phase, with checkpoints in the middle and at the end of each."""
    config = config_for(phantom, tmp_path_factory.mktemp("run"), checkpoint_steps=2, keep_checkpoints=9, **SETTINGS)
    return config, fit(config)


def checkpoints_of(config):
    return checkpoint_files(os.path.join(config.run_dir, "checkpoints"))[::-1]


def only(file, folder):
    """A run's folder with this checkpoint alone."""
    (folder / "checkpoints").mkdir(parents=True)
    os.link(file, folder / "checkpoints" / file.name)
    return str(folder)


def weights_of(path):
    return load_model(path)[0].get_weights()


def test_the_training_follows_the_schedule(undisturbed):
    config, result = undisturbed
    steps, values = 4, values_at(config, Position(8, 32))
    assert len(values) == 3 * steps and values.names == ("warmup", "polynomial", "collapse")
    told = [row["learning_rate"] for row in result.history]  # of the step to come, after each epoch
    np.testing.assert_allclose(told, values.rate[[steps, 2 * steps, -1]], rtol=1e-6)


@pytest.mark.parametrize("phase", ["warmup", "polynomial", "collapse"])
def test_resuming_in_the_middle_of_a_phase_continues_exactly(undisturbed, tmp_path, phase):
    config, result = undisturbed
    values = values_at(config, Position(8, 32))
    first = int(np.argmax(values.phase == values.names.index(phase)))
    file = next(f for f in checkpoints_of(config) if int(f.stem.split("-")[1]) > first)
    assert values.names[values.phase[int(file.stem.split("-")[1])]] == phase
    resumed = fit(config.replace(run_dir=only(file, tmp_path), resume=True, **QUIET))
    assert resumed.resumed_from == file.name
    for name in ("loss", "val_loss", "val_auroc", "learning_rate"):
        assert [row[name] for row in resumed.history] == [row[name] for row in result.history]
    for ours, theirs in zip(weights_of(resumed.model), weights_of(result.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_all_phases_of_a_preset_fit_into_a_short_training(phantom, tmp_path):
    preset = {"preset": "64-nodes-coded", "peak": 0.02}
    config = config_for(phantom, tmp_path, schedule=preset, optimizer="lars", epochs=2, max_steps=4, **QUIET)
    result = fit(config)
    values = values_at(config, Position(8, 32))
    assert len(set(values.phase)) == 8 and np.isfinite([row["loss"] for row in result.history]).all()
    assert [row["learning_rate"] for row in result.history] == pytest.approx(values.rate[[4, -1]])


@pytest.mark.parametrize("name", ["448-nodes-coded", "64-nodes-meant", "64k", "goyal-2017", "+ collapse"])
def test_from_any_step_the_rest_of_the_schedule_is_the_same(phantom, tmp_path, name):
    config = config_for(phantom, tmp_path, schedule=name, optimizer="sgd", epochs=6)
    whole = values_at(config, Position(64, 2000))
    for step in range(6 * 32):
        at = Position(64, 2000, epoch=step // 32, image=min(step % 32 * 64, 2000), step=step)
        rest = values_at(config, at)
        for column in ("rate", "momentum", "weight_decay", "augment"):
            np.testing.assert_array_equal(getattr(rest, column)[step:], getattr(whole, column)[step:])


def test_with_another_global_batch_the_schedule_goes_on_at_the_same_epoch_with_the_rates_of_that_batch(
    phantom, tmp_path
):
    config = config_for(phantom, tmp_path, schedule="448-nodes-meant", optimizer="sgd", epochs=6)
    whole, after = values_at(config, Position(64, 2048)), values_at(config, Position(128, 2048, 2, 1024, 80))
    np.testing.assert_allclose(
        after.rate[80:], 2 * whole.rate[80::2], rtol=0, atol=0.02 * whole.rate.max()
    )  # warm-up in whole steps
    assert len(after) - 80 == (len(whole) - 80) // 2


def test_a_training_goes_on_with_its_schedule_on_two_ranks(undisturbed, phantom, tmp_path):
    config, result = undisturbed
    only(checkpoints_of(config)[-2], tmp_path)
    settings = config.replace(run_dir=str(tmp_path), batch_size=4, **QUIET).to_dict()
    (tmp_path / "two.json").write_text(json.dumps(settings))
    mpi = find_mpi()
    command = [mpi.command, "-n", "2", *mpi.flags(), sys.executable, "-m", "chexlib", "train"]
    command += ["--config", str(tmp_path / "two.json"), "--resume"]
    done = subprocess.run(
        command, env={**os.environ, **thread_environment(1)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    history = pd.read_parquet(tmp_path / "history.parquet")
    alone = pd.DataFrame(result.history)
    np.testing.assert_array_equal(history["learning_rate"], alone["learning_rate"])
    np.testing.assert_allclose(history["loss"], alone["loss"], rtol=1e-4)
    for ours, theirs in zip(weights_of(tmp_path / "model.keras"), weights_of(result.model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_without_a_schedule_the_rate_is_constant_until_the_plateau_and_chexnet_is_the_same(phantom, tmp_path):
    changes = dict(epochs=1, max_steps=2, optimizer="adam", **QUIET)
    plain = fit(config_for(phantom, tmp_path / "plain", learning_rate=5e-4, **changes))
    chexnet = fit(config_for(phantom, tmp_path / "chexnet", schedule="chexnet", **changes))  # 1e-3 for 16, 8 here
    assert chexnet.history[0]["learning_rate"] == plain.history[0]["learning_rate"] == pytest.approx(5e-4)
    assert chexnet.history[0]["loss"] == plain.history[0]["loss"]


def test_any_checkpoint_collapses_by_one_call(undisturbed, phantom, tmp_path):
    config, _ = undisturbed
    file = checkpoints_of(config)[2]
    arrays, facts = load_checkpoint(file)
    collapsed = collapse(file, run_dir=tmp_path, epochs=1, **QUIET)
    now = values_at(config, Position(**facts["position"]))
    phase = collapsed.config["schedule"]["phases"][0]
    assert phase["rate"] == pytest.approx(now.rate[facts["position"]["step"]])
    assert phase["weight_decay"] == pytest.approx(2 * now.weight_decay[facts["position"]["step"]])
    start = load_model(tmp_path / "start.keras")[0]
    for i, variable in enumerate(start.trainable_variables):
        np.testing.assert_array_equal(variable.numpy(), arrays[f"weights/{i}"])
    own = collapsed.config["schedule"]
    values = values_at(config.replace(schedule=own), Position(8, facts["position"]["images"]))
    steps = np.arange(len(values))
    np.testing.assert_allclose(values.rate, phase["rate"] * (1 - steps / len(steps)) ** 2)
    assert not values.augment.any() and set(values.weight_decay) == {phase["weight_decay"]}
    moved = [np.abs(a - b).max() for a, b in zip(weights_of(collapsed.model), start.get_weights(), strict=True)]
    assert max(moved) > 0
    rows = pd.read_parquet(collapsed.predictions).query("part == 'test'").head(3)
    scores = predict([phantom / "images_001" / "images" / n for n in rows["image"]], weights=collapsed.model)
    np.testing.assert_allclose(scores, rows[[c for c in rows if c.startswith("score_")]], atol=1e-5)


def test_a_collapse_from_nothing_or_from_a_rate_of_0_says_so(undisturbed, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="no checkpoint"):
        collapse(tmp_path, run_dir=tmp_path / "run")
    config, _ = undisturbed
    zero = {"unit": "epochs", "phases": [{"kind": "constant", "length": 1, "rate": 0}]}
    monkeypatch.setattr(
        "chexlib.training.collapse.load_checkpoint",
        lambda path: _with_schedule(load_checkpoint(path), config.replace(schedule=zero)),
    )
    with pytest.raises(ConfigError, match=r"has come to 0"):
        collapse(checkpoints_of(config)[0], run_dir=tmp_path / "run")


def _with_schedule(loaded, config):
    arrays, facts = loaded
    return arrays, {**facts, "config": config.to_dict()}
