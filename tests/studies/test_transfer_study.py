"""The grid of notebook 07 names every fine-tuning once, and its rules are judged by snapshot, of
complete pairs.
"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from small_training import config_for

from chexlib.errors import ConfigError
from chexlib.models.weights import read_card
from chexlib.studies import transfer
from chexlib.studies.grid import point_key
from chexlib.studies.transfer import (
    COLD,
    DEFAULT,
    OWN,
    PRETRAINING,
    SCRATCH,
    TransferStudy,
    answers_of,
    rule_differences,
)
from chexlib.training.trainer import Reuse

EASY, STANDARD = ({"data": name, "split_digest": "0"} for name in ("easy", "standard"))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study with a file of its own, of three seeds; nothing is trained."""
    monkeypatch.setattr(transfer, "SEEDS", (0, 1, 2))
    base, source = transfer._configs("nowhere", "elsewhere", tmp_path / "rows.jsonl")
    return TransferStudy(base, tmp_path / "rows.jsonl", STANDARD, source, EASY)


def quality(point):
    """What a training scores: best at a rate of 0.0025, and from snapshot 4 of 6."""
    auroc = 0.8 - 0.01 * abs(np.log(point["learning_rate"] / 2.5e-3))
    return auroc - 0.02 * abs(point["snapshot"] - 4) if point.get("snapshot") else auroc


def answer(study, points, *, without=lambda point: False):
    """Give points rows, as if they had been trained; `without` says which diverged."""
    with study.table.open("a") as table:
        for point in points:
            auroc = 0.7 if point["topology"] == "ridge" else quality(point)
            found = {"diverged": False, "val_auroc": auroc, "auroc": auroc}
            found = {"diverged": True} if without(point) else found
            table.write(json.dumps({"key": point_key(point), **point, **found}) + "\n")


@pytest.fixture
def tuned(study):
    while points := study.tune():
        answer(study, points)
    return study


@pytest.fixture
def trained(tuned):
    answer(tuned, tuned.pretrain() + tuned.rules())
    return tuned


def test_rates_are_tuned_for_the_pretraining_and_for_random_weights(tuned):
    assert tuned.rates() == {PRETRAINING: 2.5e-3, SCRATCH: 2.5e-3}


def test_a_stage_asks_for_the_one_before_it(study, tuned):
    with pytest.raises(ConfigError, match="study rules --notebook 07"):
        tuned.batches()
    empty = tuned.progress()
    assert empty.loc["tune", "done"] == 2 and np.isnan(empty.loc["batches", "of"])


def test_each_seed_has_its_own_pretraining_and_every_arm_of_every_snapshot(tuned):
    first, points = tuned.pretrain(), tuned.rules()
    assert len({point_key(p) for p in [*first, *points]}) == 3 + len(points)
    keys = {p["seed"]: point_key(p) for p in first}
    fine = [p for p in points if p.get("snapshot")]
    assert {(p["seed"], p["start"]) for p in fine} == set(keys.items())
    arms = pd.DataFrame(fine).groupby("snapshot")["arm"].agg(set).to_dict()
    # The rate of the last two has fallen below a tenth of the highest.
    assert arms == {k: {DEFAULT, COLD} | ({OWN} if k <= 4 else set()) for k in range(1, 7)}
    assert all("weights" in p and p["weights"] is None for p in fine)  # a path decides nothing
    assert len(points) == 1 + 3 * (1 + 6 * 2 + 4)


def test_a_snapshots_rate_is_that_of_its_last_update(tuned):
    rates = tuned.snapshot_rates()
    assert rates.is_monotonic_decreasing and rates.max() < 2.5e-3
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * (12 * 32 - 1 - 32) / (23 * 32))) / 2
    assert rates[3] == pytest.approx(2.5e-3 * cosine, rel=1e-2)


def test_the_warmup_is_in_proportion_to_the_global_batch_and_the_rate_to_its_root(trained):
    points = trained.batches()
    assert len(points) == 3 * 6 and {p["snapshot"] for p in points} == {4}
    for point in points:
        batch = point["batch_size"] * point["accumulation"]
        phases = json.loads(point["schedule"])["phases"]
        warm = [phase["length"] for phase in phases if phase["kind"] == "warmup"]
        assert warm == ([] if point["arm"] == COLD else [batch / 128])
        assert point["learning_rate"] == pytest.approx(2.5e-3 * np.sqrt(batch / 64), rel=1e-3)


def test_all_stages_of_ten_seeds_take_less_than_three_core_hours(trained):
    tuning = 8 * [trained.point(cell, 1e-3, seed=100) for cell in trained.CELLS]
    of_three = trained.pretrain() + trained.rules()[1:] + trained.batches()
    tuned, rest = (sum(map(trained.seconds_of, points)) for points in (tuning, of_three))
    assert len(of_three) * 10 / 3 == 240 and 1.5 * 3600 < tuned + rest * 10 / 3 < 3 * 3600


def test_validation_chooses_the_snapshot(trained):
    assert trained.chosen() == trained.chosen(earlier=True) == 4
    scores = trained.scores("rules")[64]
    gains = rule_differences(scores)
    assert gains["earlier"].mean().round(3).to_dict() == {1: -0.02, 2: 0, 3: 0.02, 4: 0.04, 5: 0.02}
    assert set(gains["rate"]) == {1, 2, 3, 4} and set(gains["warm-up"]) == set(range(1, 7))
    answers = answers_of(scores, earlier=4, baseline=0.7)
    assert answers["earlier"].word == "supported" and answers["rate"].word == "contradicted"
    assert answers["warm-up"].word == "equivalent"


def test_a_training_that_diverged_counts_half_and_one_that_is_missing_leaves_its_pair_out(tuned):
    def diverges(point):
        return point.get("arm") == COLD and point["snapshot"] == 2 and point["seed"] == 1

    points = [p for p in tuned.rules() if not (p.get("snapshot") == 5 and p["seed"] == 2)]
    answer(tuned, tuned.pretrain() + points, without=diverges)
    gains = rule_differences(tuned.scores("rules")[64])
    half = quality({"learning_rate": 2.5e-3, "snapshot": 2}) - 0.5
    assert gains["warm-up"][2].tolist() == pytest.approx([0, half, 0])
    assert gains["earlier"][5].isna().tolist() == [False, False, True]
    assert gains["warm-up"][5].count() == 2 and gains["rate"].notna().all(axis=None)


def test_no_rule_has_a_verdict_where_fine_tuning_does_not_beat_the_ridge_regression(trained):
    answers = answers_of(trained.scores("rules")[64], earlier=4, baseline=0.9)
    assert all(isinstance(reason, str) and "0.900" in reason for reason in answers.values())


def test_without_rows_the_committed_study_waits_for_its_rates(tmp_path):
    progress = TransferStudy.committed(tmp_path / "none.jsonl").progress()
    assert progress["done"].sum() == 0 and progress["of"].tolist()[0] == 2


def test_a_chain_is_trained_and_a_lost_snapshot_is_trained_again(phantom, tmp_path, monkeypatch):
    """The smallest study there is: VGG-16 on the phantom of the tests, one pass each."""
    for name, value in (
        *(("SNAPSHOTS", (1, 2)), ("SOURCE_PASSES", 2), ("TARGET_PASSES", 1)),
        *(("SOURCE_IMAGES", 32), ("BATCH", 16), ("LOCAL_BATCH", 16), ("SEEDS", (0,))),
    ):
        monkeypatch.setattr(transfer, name, value)
    monkeypatch.setenv("CHEXLIB_CACHE", str(tmp_path / "cache"))
    small = config_for(phantom, tmp_path, train_images=32)
    study = TransferStudy(
        small.replace(fresh_head=True), tmp_path / "rows.jsonl", STANDARD,
        small.replace(snapshots=True), EASY,
    )  # fmt: skip
    monkeypatch.setattr(TransferStudy, "rates", lambda self: {PRETRAINING: 1e-4, SCRATCH: 1e-4})
    (start,) = study.pretrain()
    fine = study.fine_tuning(2, point_key(start), 1e-4, seed=0, batch=16)
    assert study.run([start, fine], reuse=Reuse(accumulates=True))
    kept = sorted((tmp_path / "cache").glob("pretrained/*/*.keras"))
    assert [path.name for path in kept] == ["pass-1.keras", "pass-2.keras"]
    assert read_card(kept[1])["topology"] == "vgg16"
    rows = study.rows([start, fine])
    assert rows["auroc"].between(0, 1).all() and np.isfinite(rows.loc[0, "val_loss_1"])

    shutil.rmtree(tmp_path / "cache" / "pretrained")
    study.table.unlink()
    assert study.run([fine], reuse=Reuse(accumulates=True)) and kept[1].exists()
    pd.testing.assert_frame_equal(
        study.rows([fine])[["auroc", "loss"]],
        rows.loc[[1], ["auroc", "loss"]].reset_index(drop=True),
    )
