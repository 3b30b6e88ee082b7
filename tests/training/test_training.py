"""`fit` in one process, whole, on a small phantom."""

from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from small_training import config_for, with_a_tiny_network

from chexlib.collectives import World
from chexlib.errors import ConfigError, DataError, WeightsError
from chexlib.findings import FINDINGS
from chexlib.models.predict import predict
from chexlib.models.weights import load_model
from chexlib.training.callbacks import Plateau, PooledValidation
from chexlib.training.fit import fit
from chexlib.training.input import start_head


@pytest.fixture(scope="module")
def trained(phantom, tmp_path_factory):
    told = []
    result = fit(config_for(phantom, tmp_path_factory.mktemp("run")), report=told.append)
    return result, told


def test_fit_leaves_model_history_and_predictions(trained):
    result, told = trained
    history = pd.read_parquet(result.model.replace("model.keras", "history.parquet"))
    assert list(history["loss"]) == [row["loss"] for row in result.history]
    assert {"val_loss", "val_auroc", "learning_rate", "images_per_second"} <= set(history)
    predictions = pd.read_parquet(result.predictions)
    assert predictions["part"].value_counts().to_dict() == {
        k: v for k, v in result.split["images"].items() if k != "train"
    }
    assert told[-1]["history"] == result.history


def test_the_saved_model_is_the_best_epoch_and_scores_as_the_predictions_say(trained, phantom):
    result, _ = trained
    assert result.best_epoch == int(np.argmax([row["val_auroc"] for row in result.history]))
    rows = pd.read_parquet(result.predictions).query("part == 'test'").head(5)
    paths = [phantom / "images_001" / "images" / name for name in rows["image"]]
    scores = predict(paths, weights=result.model)
    np.testing.assert_allclose(scores, rows[[f"score_{f}" for f in FINDINGS]], atol=1e-5)
    card = load_model(result.model)[1]
    assert card["split"]["digest"] == result.split["digest"] and card["config"] == result.config


def test_validation_auroc_is_the_mean_over_findings_of_scikit_learns(trained):
    result, _ = trained
    rows = pd.read_parquet(result.predictions).query("part == 'validation'")
    pairs = [(rows[f"label_{f}"], rows[f"score_{f}"]) for f in FINDINGS]
    expected = np.mean([roc_auc_score(y, p) for y, p in pairs if 0 < y.sum() < len(y)])
    assert result.history[result.best_epoch]["val_auroc"] == pytest.approx(expected, abs=1e-6)


def test_the_same_config_gives_the_same_history(trained, phantom, tmp_path):
    result, _ = trained
    again = fit(config_for(phantom, tmp_path))
    for a, b in zip(result.history, again.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_training_lowers_the_loss_unless_the_labels_are_shuffled(phantom, tmp_path):
    real = fit(config_for(phantom, tmp_path / "real", epochs=6, learning_rate=1e-3, mirror=False))
    assert real.history[-1]["loss"] < real.history[0]["loss"]
    control = fit(config_for(phantom, tmp_path / "control", epochs=1, shuffle_labels=True))
    assert control.history[0]["loss"] != pytest.approx(real.history[0]["loss"], rel=1e-6)


def test_a_control_keeps_its_last_epoch_whatever_the_true_validation_labels_say(monkeypatch):
    now = {}  # the score of the one positive among three images; the others have 0.4 and 0.6

    def score(part):
        return np.array([[now["score"]], [0.4], [0.6]])

    labels = np.array([[1], [0], [0]])
    chosen, control = PooledValidation(score, labels), PooledValidation(score, labels, choose=False)
    network = SimpleNamespace(get_weights=lambda: [now["score"]], non_trainable_variables=[])
    for epoch, now["score"] in enumerate([0.1, 0.9, 0.5]):
        for validation in (chosen, control):
            validation.set_model(SimpleNamespace(model=network, world=World()))
            validation.on_epoch_end(epoch, {})
    assert (chosen.best_epoch, chosen.best_weights) == (1, [0.9])
    assert (control.best_epoch, control.best_weights) == (2, [0.5])


def test_a_leaking_split_is_refused_unless_allowed(phantom, tmp_path):
    with pytest.raises(DataError, match="patients"):
        fit(config_for(phantom, tmp_path, split="image"))
    assert not list(tmp_path.iterdir())
    assert fit(
        config_for(phantom, tmp_path, split="image", allow_leak=True, epochs=1, max_steps=1)
    ).split["name"]


def test_a_truncated_image_is_named_and_skipped_only_on_request(phantom, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(phantom, broken)
    victim = sorted((broken / "images_001" / "images").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=victim.name):
        fit(config_for(broken, tmp_path / "run", epochs=1, max_steps=1))
    result = fit(config_for(broken, tmp_path / "run", epochs=1, max_steps=1, skip_broken=True))
    assert sum(result.split["images"].values()) == 89


def test_weights_of_another_topology_are_refused(trained, phantom, tmp_path):
    result, _ = trained
    with pytest.raises(WeightsError, match="vgg16"):
        fit(config_for(phantom, tmp_path, topology="resnet50", weights=result.model))
    again = fit(config_for(phantom, tmp_path, weights=result.model, epochs=1, max_steps=1))
    assert again.config["weights"] == result.model


def test_more_ranks_than_images_is_one_clear_error(phantom, tmp_path, monkeypatch):
    from chexlib.collectives import World

    monkeypatch.setattr("chexlib.training.fit.join_world", lambda: World(rank=0, ranks=1000))
    with pytest.raises(ConfigError, match="1000 ranks cannot share"):
        fit(config_for(phantom, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_training_that_diverges_says_so(phantom, tmp_path):
    with pytest.raises(
        ConfigError, match=r"diverged in epoch 1: .* rate was 1e\+30. Use a lower one"
    ):
        fit(config_for(phantom, tmp_path, optimizer="sgd", learning_rate=1e30, epochs=1))


def test_labels_of_the_control_are_not_dealt_in_the_order_of_an_epoch(
    phantom, tmp_path, monkeypatch
):
    class DealtError(Exception):
        pass

    def look(config, world, train, labels):
        order = np.random.default_rng([config.seed, 0]).permutation(len(labels))
        assert sorted(labels.tolist()) == sorted(train.labels.tolist())
        assert not np.array_equal(labels, train.labels[order]) and not np.array_equal(
            labels, train.labels
        )
        raise DealtError

    with_a_tiny_network(monkeypatch)
    monkeypatch.setattr("chexlib.training.fit.Feed", look)
    with pytest.raises(DealtError):
        fit(config_for(phantom, tmp_path, shuffle_labels=True, seed=3))


def test_a_plateau_asks_for_a_fall_of_more_than_delta():
    """The 2018 script divided the rate after each epoch that gained less than 0.01 of loss."""
    optimizer = keras.optimizers.SGD(0.1)
    plateau = Plateau(0.1, delta=0.01)
    plateau.set_model(SimpleNamespace(optimizer=optimizer))
    rates = []
    for epoch, loss in enumerate([0.500, 0.480, 0.475, 0.460]):
        plateau.on_epoch_end(epoch, {"val_loss": loss})
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("bias", [None, 1.0])
def test_a_fresh_head_starts_at_the_log_odds_or_where_it_is_told_to(bias):
    head = keras.Sequential([keras.Input((3,)), keras.layers.Dense(14, name="findings")])
    labels = np.zeros((98, 14), np.float32)
    labels[:9, 0] = 1
    start_head(head, labels, bias=bias)
    biases = head.get_layer("findings").bias.numpy()
    expected = [np.log(10 / 90), np.log(1 / 99)] if bias is None else [1.0, 1.0]
    np.testing.assert_allclose(biases[:2], expected, rtol=1e-6)
    start_head(head, labels, bias=5.0)  # no fresh one any more
    np.testing.assert_array_equal(head.get_layer("findings").bias, biases)


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.51, 0.8, 0.99, 1])
def test_a_plateau_multiplies_the_rate_by_the_factor_that_was_asked_for(factor):
    optimizer = keras.optimizers.SGD(0.1)
    plateau = Plateau(factor, delta=0.0)
    plateau.set_model(SimpleNamespace(optimizer=optimizer))
    rates = []
    for epoch, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0]):
        plateau.on_epoch_end(epoch, {"val_loss": loss})
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([0.1, 0.1, 0.1 * factor, 0.1 * factor**2, 0.1 * factor**2])
