"""A training that was ended in any way goes on from its newest sound checkpoint, to the bit."""

import errno
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from small_training import config_for

from chexlib import stopping
from chexlib.collectives import World, require_agreement
from chexlib.errors import ChexlibError, ClusterError, ConfigError, WeightsError
from chexlib.files import atomic_write
from chexlib.models.weights import load_model
from chexlib.phantom.write import write_phantom
from chexlib.training.callbacks import Position
from chexlib.training.fit import fit
from chexlib.training.state import (
    Saver,
    checkpoint_files,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("tiny_network")
TIMED = ("images_per_second", "skew")


@pytest.fixture(scope="module")
def undisturbed(phantom, tmp_path_factory):
    return fit(config_for(phantom, tmp_path_factory.mktemp("run")))


def untimed(result):
    return [
        {name: value for name, value in row.items() if name not in TIMED} for row in result.history
    ]


def assert_same_model(a, b):
    for x, y in zip(
        load_model(a.model)[0].get_weights(), load_model(b.model)[0].get_weights(), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def ask_at(epoch, step):
    return lambda told: (
        stopping.request() if (told["epoch"], told["step"]) >= (epoch, step) else None
    )


def test_a_stop_keeps_a_checkpoint_and_resuming_ends_as_if_undisturbed(
    phantom, undisturbed, tmp_path
):
    stopped = fit(config_for(phantom, tmp_path), report=ask_at(1, 1))
    assert stopped.stopped and len(stopped.history) == 1 and stopped.resumed_from is None
    facts = newest_checkpoint(tmp_path / "checkpoints")[2]
    assert (
        facts["position"]["epoch"] == 0
        and 0 < facts["position"]["image"] < facts["position"]["images"]
    )
    resumed = fit(config_for(phantom, tmp_path, resume=True))
    assert resumed.resumed_from and not resumed.stopped
    assert untimed(resumed) == untimed(undisturbed) and resumed.best_epoch == undisturbed.best_epoch
    assert_same_model(resumed, undisturbed)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    phantom, undisturbed, tmp_path, caplog
):
    class CrashError(Exception):
        pass

    def crash(told):
        if told["epoch"] == 2:
            raise CrashError

    with pytest.raises(CrashError):
        fit(config_for(phantom, tmp_path, checkpoint_steps=3), report=crash)
    newest, before = checkpoint_files(tmp_path / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        resumed = fit(config_for(phantom, tmp_path, checkpoint_steps=3, resume=True))
    assert (
        str(newest) in caplog.text
        and "damaged" in caplog.text
        and resumed.resumed_from == before.name
    )
    assert untimed(resumed) == untimed(undisturbed)
    assert_same_model(resumed, undisturbed)


def test_a_finished_training_can_go_on_for_more_epochs(phantom, undisturbed, tmp_path):
    first = fit(config_for(phantom, tmp_path, epochs=1))
    more = fit(config_for(phantom, tmp_path, resume=True))
    assert len(first.history) == 1 and untimed(more) == untimed(undisturbed)
    again = fit(config_for(phantom, tmp_path, resume=True))  # nothing is left to do
    assert untimed(again) == untimed(undisturbed)
    assert_same_model(again, undisturbed)


def test_resuming_another_training_is_refused_with_both_values(phantom, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(os.path.dirname(undisturbed.model), run)
    with pytest.raises(ConfigError, match=r"learning_rate=0.0001 there and 0.01 now"):
        fit(config_for(phantom, run, resume=True, learning_rate=0.01))
    with pytest.raises(ConfigError, match="is of another training: split"):
        fit(
            config_for(
                write_phantom(tmp_path / "other", n_images=60, size=32, workers=1), run, resume=True
            )
        )
    started = fit(config_for(phantom, run, epochs=1, max_steps=1))  # without resume: anew
    assert [facts for facts in checkpoint_files(run / "checkpoints")] and len(started.history) == 1
    assert newest_checkpoint(run / "checkpoints")[2]["position"]["step"] == 1


@pytest.mark.parametrize(
    "lacking", ["config", "split", "ranks", "best", "plateau", "history", "position", "steps"]
)
def test_a_sound_checkpoint_that_lacks_something_is_refused_in_one_line(tmp_path, lacking):
    config = config_for("data", tmp_path, resume=True)
    facts = {"config": config.to_dict(), "split": "abc", "ranks": 1, "best": [0, 0]}
    facts |= {"plateau": [0, 0], "history": [], "position": {"global_batch": 8}}
    facts.pop(lacking, None)
    arrays = {} if lacking == "steps" else {"steps": np.zeros((0, 5))}
    save_checkpoint(tmp_path / "checkpoints", 1, arrays, facts, keep=1)
    watchers = [SimpleNamespace(STEP_COLUMNS=()) for _ in range(3)]
    saver = Saver(config, World(), Position(8, 16), watchers, facts={"split": "abc"})
    nothing = SimpleNamespace(trainable_variables=[], non_trainable_variables=[], weights=[])
    trainer = SimpleNamespace(model=nothing, optimizer=SimpleNamespace(variables=[]))
    with pytest.raises(WeightsError, match=r"000000001\.npz .* lacks something.*resume=false\."):
        saver.restore(trainer)


def test_no_room_for_the_checkpoint_is_an_error_that_says_so(phantom, tmp_path, monkeypatch):
    def full(*args, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("chexlib.training.state.np.savez", full)
    with pytest.raises(
        WeightsError, match=r"checkpoint .* MB cannot be written \(No space left on device\)"
    ):
        fit(config_for(phantom, tmp_path, epochs=1, max_steps=1))
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "refused",
    [
        {"weights": "none.keras"},
        {"split": "official", "max_images": 1},
        {"resume": True, "seed": 3},
    ],
)
def test_a_training_that_is_refused_loses_nothing_of_the_one_before(phantom, tmp_path, refused):
    def left():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    settings = {"epochs": 1, "max_steps": 1}
    fit(config_for(phantom, tmp_path, **settings))
    before = left()
    with pytest.raises(ChexlibError):
        fit(config_for(phantom, tmp_path, **{**settings, **refused}))
    assert left() == before and len(before) > 4


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_training_anew_keeps_no_checkpoint_of_the_one_before(phantom, tmp_path, keep):
    fit(config_for(phantom, tmp_path, epochs=2, max_steps=2))
    fit(config_for(phantom, tmp_path, epochs=1, max_steps=1, keep_checkpoints=keep))
    names = [path.name for path in checkpoint_files(tmp_path / "checkpoints")]
    assert names == ["step-000000001.npz"][:keep]


def test_resume_without_a_checkpoint_starts_from_the_beginning(phantom, tmp_path):
    result = fit(
        config_for(phantom, tmp_path, epochs=1, max_steps=1, resume=True, keep_checkpoints=0)
    )
    assert result.resumed_from is None and not checkpoint_files(tmp_path / "checkpoints")


@pytest.mark.parametrize(("keeps", "rate"), [("global_batch", 1e-4), ("rank_batch", 2e-4)])
def test_with_another_batch_the_global_batch_or_the_rate_is_kept_as_asked(
    phantom, tmp_path, keeps, rate
):
    first = fit(config_for(phantom, tmp_path, epochs=1, keep_checkpoints=1))
    changes = dict(resume=True, batch_size=16, resume_keeps=keeps)
    more = fit(config_for(phantom, tmp_path, **changes))
    assert first.history == more.history[:1]
    assert more.history[1]["learning_rate"] == pytest.approx(rate)
    taken = pd.read_parquet(tmp_path / "steps.parquet").groupby("epoch")["step"].count()
    images = first.split["images"]["train"]
    assert list(taken) == [-(-images // 8), -(-images // (8 if keeps == "global_batch" else 16))]


def test_a_larger_batch_takes_no_more_than_the_images_of_a_shortened_epoch(phantom, tmp_path):
    """24 of the images, 8 of them in batches of 8: what is left goes in 10 and 6."""
    settings = dict(epochs=1, max_steps=3, optimizer="sgd")
    fit(config_for(phantom, tmp_path, **settings), report=ask_at(1, 1))
    more = dict(resume=True, batch_size=10, resume_keeps="rank_batch")
    fit(config_for(phantom, tmp_path, **settings, **more))
    _, arrays, facts = newest_checkpoint(tmp_path / "checkpoints")
    assert facts["position"]["image"] == 0 and facts["position"]["step"] == 3
    assert arrays["tracker"][1] == 24  # images in the mean of the epoch's loss


def test_ranks_that_do_not_agree_are_named_with_the_variable():
    class OtherRanks(World):
        def allgather_object(self, value):
            return [value, value, [value[0], value[1] ^ 1]]

    variables = {"conv/kernel": tf.Variable([1.0, 2.0]), "conv/moving_mean": tf.Variable([0.0])}
    named = r"after epoch 2 .* conv/moving_mean is not the same on rank 2 as on the others"
    with pytest.raises(ClusterError, match=named):
        require_agreement(OtherRanks(0, 3), variables, when="after epoch 2")
    require_agreement(World(), variables, when="after epoch 2")


ARRAYS = {
    "weights/0": np.arange(12, dtype=np.float32).reshape(3, 4),
    "tracker": np.zeros(2),
    "none": np.zeros((0, 3)),
}


def test_a_checkpoint_comes_back_as_it_was_and_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, ARRAYS, {"epoch": step, "best": float("-inf")}, keep=2)
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "step-000000010.npz",
        "step-000000002.npz",
    ]
    path, arrays, facts = newest_checkpoint(tmp_path)
    assert (
        path.name == "step-000000010.npz"
        and facts["epoch"] == 10
        and facts["best"] == float("-inf")
    )
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_no_flipped_bit_and_no_cut_goes_unnoticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, ARRAYS, {"epoch": 1}, keep=1)
    whole, (arrays, facts) = path.read_bytes(), load_checkpoint(path)
    noticed = 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found, said = load_checkpoint(path)
        except WeightsError as error:
            noticed += str(path) in str(error)
            continue
        assert said == facts and all(
            np.array_equal(found[n], arrays[n]) for n in arrays
        )  # a date in the archive, say
    assert noticed > len(whole) / 2
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="damaged"):
            load_checkpoint(path)
    with pytest.raises(WeightsError, match=r"all 1 checkpoints .* resume=false"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["here", "NFS", "macOS", "a chroot without /proc"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, where):
    anonymous = where == "here" and sys.platform == "linux"
    if where == "NFS":  # which refuses it
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY, raising=False)
    if where == "macOS":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if where == "a chroot without /proc":
        monkeypatch.setattr("chexlib.files._OPEN_FILES", str(tmp_path / "none"))
    path = tmp_path / "file.bin"
    for content in (b"old", b"new"):
        with atomic_write(path) as file:
            file.write(content)
            assert not anonymous or [p.name for p in tmp_path.iterdir()] in ([], ["file.bin"])
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644
