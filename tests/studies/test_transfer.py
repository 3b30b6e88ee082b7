"""Pre-training and fine-tuning from its snapshots: what is kept, where it goes on, and what each
setting does.
"""

import shutil

import numpy as np
import pytest
from small_training import Places, config_for, with_a_tiny_network

from chexlib.collectives import World
from chexlib.errors import WeightsError
from chexlib.models.weights import load_model
from chexlib.studies.transfer import fine_schedule
from chexlib.training.callbacks import snapshots_of
from chexlib.training.fit import fit, learn
from chexlib.training.input import Feed, divide
from chexlib.training.schedules import Schedule
from chexlib.training.trainer import Reuse

FALL = {"unit": "epochs", "phases": [{"kind": "polynomial", "length": 3, "rate": 1e-4}]}


def weights_of(path):
    model, _ = load_model(path)
    return {v.path.split("vgg16/")[-1]: v.numpy() for v in model.variables}


def differ(one, other):
    return [name for name in one if not np.array_equal(one[name], other[name])]


def asked(phantom, run_dir, **changes):
    """16 images in batches of 8, three times, and as many snapshots."""
    how = dict(schedule=FALL, epochs=3, train_images=16, snapshots=True, keep_checkpoints=2)
    return config_for(phantom, run_dir, **how, **changes)


def test_a_trainer_that_is_used_again_starts_as_a_new_one_does(
    pretrained, vgg_file, phantom, tmp_path
):
    """From other weights, with a head of its own: nothing of the training before is left."""
    common = {"epochs": 1, "max_steps": 1, "optimizer": "sgd", "fresh_head": True}
    last, reuse = snapshots_of(pretrained)["path"].iloc[-1], Reuse()
    fit(config_for(phantom, tmp_path / "before", weights=str(vgg_file), **common), reuse=reuse)
    for name, own in (("again", reuse), ("new", Reuse())):
        fit(config_for(phantom, tmp_path / name, weights=last, seed=3, **common), reuse=own)
    assert differ(*(weights_of(tmp_path / name / "model.keras") for name in ("again", "new"))) == []


@pytest.fixture(scope="module")
def pretrained(phantom, tmp_path_factory):
    run = tmp_path_factory.mktemp("pre")
    fit(asked(phantom, run))
    return run


def test_snapshots_record_where_they_were_taken(pretrained):
    table = snapshots_of(pretrained)
    assert table["step"].tolist() == [2, 4, 6] and table["images"].tolist() == [16, 32, 48]
    rates = Schedule.from_dict(FALL).compile(steps_per_epoch=2).rate
    assert table["learning_rate"].tolist() == pytest.approx([rates[2], rates[4], rates[5]])
    assert set(table["global_batch"]) == {8} and set(table["optimizer"]) == {"adam"}
    assert len(differ(weights_of(table["path"][0]), weights_of(table["path"][2]))) == 28
    with pytest.raises(WeightsError, match="has no snapshots"):
        snapshots_of(pretrained / "snapshots")


def test_a_pretraining_that_was_ended_goes_on_to_the_same_weights(pretrained, phantom, tmp_path):
    run = tmp_path / "again"
    shutil.copytree(pretrained, run)
    for path in (
        run / "checkpoints" / "step-000000006.npz",
        run / "snapshots" / "step-000000006.keras",
    ):
        path.unlink()
    result = fit(asked(phantom, run, resume=True))
    assert result.resumed_from == "step-000000004.npz"
    last = snapshots_of(run)["path"].iloc[-1]
    assert differ(weights_of(last), weights_of(snapshots_of(pretrained)["path"].iloc[-1])) == []


def test_a_warmup_takes_half_of_the_epochs_at_most():
    values = Schedule.from_dict(fine_schedule(0.1, epochs=4, warmup=99)).compile(steps_per_epoch=10)
    assert (
        values.rate.argmax() == 20
        and values.rate.max() == 0.1
        and values.rate[0] == pytest.approx(0.001)
    )


def test_each_stage_moves_by_its_share(vgg_file, phantom, tmp_path):
    start = weights_of(vgg_file)
    common = {
        "weights": str(vgg_file),
        "epochs": 1,
        "max_steps": 1,
        "optimizer": "sgd",
        "learning_rate": 0.1,
    }

    def moved(stage_rate):
        result = fit(config_for(phantom, tmp_path, stage_rate=stage_rate, **common))
        return {name: value - start[name] for name, value in weights_of(result.model).items()}

    whole, half, head = moved(1.0), moved(0.5), moved(0.0)
    for name, above in (
        ("findings/kernel", 0),
        ("block5_conv1/kernel", 1),
        ("block1_conv1/kernel", 5),
    ):
        largest = np.abs(whole[name]).max()
        assert largest > 0
        np.testing.assert_allclose(half[name], 0.5**above * whole[name], atol=1e-3 * largest + 1e-7)
    assert [name for name in head if head[name].any()] == ["findings/kernel", "findings/bias"]
    np.testing.assert_allclose(head["findings/kernel"], whole["findings/kernel"], atol=1e-6)


def test_recalibration_gives_the_statistics_of_the_new_images_before_the_first_step(
    phantom, tmp_path, monkeypatch
):
    """With one batch of all images after it, which moves statistics towards themselves."""
    import keras

    with_a_tiny_network(monkeypatch)
    config = config_for(phantom, tmp_path, epochs=1, batch_size=128, learning_rate=1e-12)
    train = divide(config)[1]["train"]
    seen = {}
    for images in (0, 10**6):
        training = learn(config.replace(mirror=False, recalibrate=images))
        model = training.model
        norm = next(layer for layer in model._flatten_layers() if layer.name == "conv1_bn")
        seen[images > 0] = norm.moving_mean.numpy()
    stem = keras.Model(model.input, model.get_layer("conv1_conv").output)
    pixels = Feed(config, World(), train, train.labels).store.take(range(len(train)))
    seen["mean"] = np.mean(stem(pixels[..., None].astype(np.float32)), axis=(0, 1, 2))
    np.testing.assert_allclose(seen[False], 0.1 * seen["mean"], rtol=1e-3, atol=1e-3)
    # Batches of 128 are more images than there are: the population is the one batch.
    np.testing.assert_allclose(seen[True], seen["mean"], rtol=1e-3, atol=1e-3)


def test_recalibration_does_not_look_at_the_images_that_the_training_begins_with(phantom, tmp_path):
    config = config_for(phantom, tmp_path, seed=3)
    train = divide(config)[1]["train"]
    feed = Feed(config, World(), train, train.labels)
    feed.store = Places(1000)
    seen = np.concatenate([batch.ravel() for batch in feed.first(100)]).astype(int)
    epoch = np.random.default_rng([3, 0]).permutation(1000)
    assert len(set(seen)) == 100 and len(set(seen) & set(epoch[:100])) < 30  # 10 by chance
