"""Trainings under a schedule: what they follow, that they go on from any place in it, and the
collapse.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from small_training import config_for, with_a_tiny_network

from chexlib.models.weights import load_model
from chexlib.mpi import find_mpi, thread_environment
from chexlib.phantom.write import write_phantom
from chexlib.training.callbacks import Position
from chexlib.training.fit import fit, learn
from chexlib.training.optimizers import values_at
from chexlib.training.state import checkpoint_files, load_checkpoint
from chexlib.training.trainer import Reuse

# As coded: the polynomial counts from the start of the stage.
PHASES = [
    {"kind": "warmup", "length": 1, "start": 0.001, "rate": 0.02},
    {"kind": "polynomial", "length": 1, "rate": 0.02, "zero": 2.5, "count": "stage"},
    {"kind": "collapse", "length": 1, "rate": 0.01, "weight_decay": 0.02, "fresh": True},
]
SPEC = {"unit": "epochs", "decay": [[0, 0.001], [0.7, 0.01]], "phases": PHASES}
SETTINGS = {
    "schedule": SPEC,
    "optimizer": "sgd",
    "augment": "radiograph",
    "epochs": 3,
    "max_steps": 4,
}
QUIET = {"checkpoint_steps": 0, "keep_checkpoints": 0}  # of a network of 59 MB


@pytest.fixture(scope="module")
def undisturbed(phantom, tmp_path_factory):
    """Three epochs, one a phase, with checkpoints in the middle and at the end of each."""
    config = config_for(
        phantom, tmp_path_factory.mktemp("run"), checkpoint_steps=2, keep_checkpoints=9, **SETTINGS
    )
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


KINDS = {
    "warmup": {"start": 0.001, "rate": 0.02},
    "polynomial": {"rate": 0.02, "zero": 10, "count": "stage"},
    "step": {"rate": 0.02, "at": (8,), "factor": 0.5},
    "cosine": {"end": 0.005},
    "constant": {"rate": 0.01},
    "cycle": {
        "length": 6,
        "warmup": 3,
        "start": 0.004,
        "rate": 0.02,
        "power": 2,
        "zero": 6,
        "fresh": True,
    },
    "collapse": {"weight_decay": 0.02, "fresh": True},
}
PARTS = [
    name
    for kind in KINDS
    for name in (["cycle: re-warm-up", "cycle"] if kind == "cycle" else [kind])
]


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def through_all_phases(request, phantom, tmp_path_factory):
    """Six epochs of four steps, three steps a phase, with a checkpoint at each; and what keeps the
    compiled graph.
    """
    phases = [{"kind": kind, "length": 3, **settings} for kind, settings in KINDS.items()]
    schedule = {"decay": [[0, 0.001], [7, 0.01]], "phases": phases}
    settings = {**SETTINGS, "schedule": schedule, "optimizer": request.param, "epochs": 6}
    folder = tmp_path_factory.mktemp("run")
    config = config_for(phantom, folder, checkpoint_steps=1, keep_checkpoints=24, **settings)
    reuse = Reuse()
    with pytest.MonkeyPatch.context() as patch:
        with_a_tiny_network(patch)
        return config, learn(config, reuse=reuse), reuse


def state_at_the_end(config):
    """All arrays of the newest checkpoint, without the seconds of the steps."""
    arrays = load_checkpoint(checkpoints_of(config)[-1])[0]
    return {**arrays, "steps": arrays["steps"][:, :3]}


@pytest.mark.parametrize("part", PARTS)
def test_resuming_in_the_middle_of_any_phase_continues_exactly(
    through_all_phases, tmp_path, monkeypatch, part
):
    with_a_tiny_network(monkeypatch)
    config, result, reuse = through_all_phases
    values = values_at(config, Position(8, 32))
    assert list(values.names) == PARTS and len(values) == len(checkpoints_of(config)) == 24
    middle = int(np.argmax(values.phase == PARTS.index(part))) + 1
    file = checkpoints_of(config)[middle - 1]  # the first is of the state after one step
    again = config.replace(run_dir=only(file, tmp_path), resume=True)
    resumed = learn(again, reuse=reuse)
    assert resumed.resumed_from == file.name == f"step-{middle:09d}.npz"
    for name in ("loss", "val_loss", "val_auroc", "learning_rate"):
        assert [row[name] for row in resumed.history] == [row[name] for row in result.history]
    ours, theirs = state_at_the_end(again), state_at_the_end(config)
    assert ours.keys() == theirs.keys() and len(theirs["steps"]) == 24
    for (
        name,
        array,
    ) in theirs.items():  # weights, slots, statistics, the best so far, and the loss of each step
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(90, 8, 4), pytest.param(2860, 64, 32, marks=pytest.mark.long)]
)
def test_a_preset_scaled_to_the_data_trains_through_all_its_phases(images, batch, steps, tmp_path):
    """The whole: 2,000 images to train on, batch 64, 6 epochs."""
    data = write_phantom(
        tmp_path / "phantom", n_images=images, size=32, min_prevalence=0.1, workers=2
    )
    changes = dict(
        epochs=6, batch_size=batch, max_steps=steps, augment="radiograph", optimizer="sgd", **QUIET
    )
    config = config_for(data, tmp_path / "run", schedule="64-nodes-coded", **changes)
    result = fit(config)
    values = values_at(config, Position(batch, min(result.split["images"]["train"], batch * steps)))
    assert len(values) == 6 * steps and len(set(values.phase)) == 8
    told = [row["learning_rate"] for row in result.history]
    assert told == pytest.approx(values.rate[[*range(steps, 6 * steps, steps), -1]])
    assert np.isfinite([row["loss"] for row in result.history]).all()
    if batch == 64:  # 24 steps at batch 8 teach nothing yet
        assert (
            result.split["images"]["train"] == 2000
            and result.history[-1]["loss"] < result.history[0]["loss"]
        )


@pytest.mark.parametrize(
    "name", ["448-nodes-coded", "64-nodes-meant", "64k", "goyal-2017", "+ collapse"]
)
def test_from_any_step_the_rest_of_the_schedule_is_the_same(phantom, tmp_path, name):
    config = config_for(phantom, tmp_path, schedule=name, optimizer="sgd", epochs=6)
    whole = values_at(config, Position(64, 2000))
    for step in range(6 * 32):
        at = Position(64, 2000, epoch=step // 32, image=min(step % 32 * 64, 2000), step=step)
        rest = values_at(config, at)
        for column in ("rate", "momentum", "weight_decay", "augment"):
            np.testing.assert_array_equal(
                getattr(rest, column)[step:], getattr(whole, column)[step:]
            )


def test_with_another_global_batch_the_schedule_goes_on_at_the_same_epoch_with_the_rates_of_that_batch(
    phantom, tmp_path
):
    config = config_for(phantom, tmp_path, schedule="448-nodes-meant", optimizer="sgd", epochs=6)
    whole, after = (
        values_at(config, Position(64, 2048)),
        values_at(config, Position(128, 2048, 2, 1024, 80)),
    )
    np.testing.assert_allclose(
        after.rate[80:], 2 * whole.rate[80::2], rtol=0, atol=0.02 * whole.rate.max()
    )  # warm-up in whole steps
    assert len(after) - 80 == (len(whole) - 80) // 2


@pytest.mark.cores
def test_a_training_goes_on_with_its_schedule_on_two_ranks(undisturbed, phantom, tmp_path):
    config, result = undisturbed
    only(checkpoints_of(config)[-2], tmp_path)
    settings = config.replace(run_dir=str(tmp_path), batch_size=4, **QUIET).to_dict()
    (tmp_path / "two.json").write_text(json.dumps(settings))
    mpi = find_mpi()
    command = [mpi.command, "-n", "2", *mpi.flags(), sys.executable, "-m", "chexlib", "train"]
    command += ["--config", str(tmp_path / "two.json"), "--resume"]
    done = subprocess.run(
        command,
        env={**os.environ, **thread_environment(1)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    history = pd.read_parquet(tmp_path / "history.parquet")
    alone = pd.DataFrame(result.history)
    np.testing.assert_array_equal(history["learning_rate"], alone["learning_rate"])
    np.testing.assert_allclose(history["loss"], alone["loss"], rtol=1e-4)
    for ours, theirs in zip(
        weights_of(tmp_path / "model.keras"), weights_of(result.model), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_without_a_schedule_the_rate_is_constant_until_the_plateau_and_chexnet_is_the_same(
    phantom, tmp_path
):
    changes = dict(epochs=1, max_steps=2, optimizer="adam", **QUIET)
    plain = fit(config_for(phantom, tmp_path / "plain", learning_rate=5e-4, **changes))
    chexnet = fit(
        config_for(phantom, tmp_path / "chexnet", schedule="chexnet", **changes)
    )  # 1e-3 for 16, 8 here
    assert (
        chexnet.history[0]["learning_rate"]
        == plain.history[0]["learning_rate"]
        == pytest.approx(5e-4)
    )
    assert chexnet.history[0]["loss"] == plain.history[0]["loss"]
