"""The large-batch study asks for the trainings it says, tunes without an edge, and its verdicts find
a planted effect as often as they promise.
"""

import contextlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from small_training import Places, config_for

from chexlib.collectives import World
from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.verdicts import power
from chexlib.models.weights import load_model
from chexlib.studies import judge, large_batch
from chexlib.studies.grid import point_key, run_grid
from chexlib.studies.large_batch import (
    CELLS,
    SWAPS,
    Cell,
    LargeBatchStudy,
    Switches,
    answers_of,
    committed_study,
    losses_of,
    recipe_effects,
    recipe_of,
    settings_of,
    swap_effects,
)
from chexlib.studies.stages import TUNING_SEEDS, rate_of
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.recipes import resolve
from chexlib.training.trainer import Reuse

DEVIATION = 0.016  # of D1 over seeds, as the plan of the study takes it


@pytest.fixture
def study(tmp_path):
    """The study with a file of its own; nothing is trained."""
    base = config_for("nowhere", tmp_path, epochs=1, train_images=4096)
    return LargeBatchStudy(base, tmp_path / "rows.jsonl", {"data": "none", "split_digest": "0"})


def answer(study, points, quality):
    """Give points rows, as if they had been trained."""

    def pretend(point, folder):
        batch = point["batch_size"] * point["accumulation"]
        auroc = quality(point["topology"], batch, point["learning_rate"], point["seed"])
        return {"diverged": False, "val_auroc": auroc, "auroc": auroc}

    run_grid(points, study.table, pretend)


def peaked(best):
    """AUROC that falls from its best rate on."""
    return lambda topology, batch, rate, seed: 0.9 - 0.01 * abs(np.log(rate / best))


def tuned(study, cell, quality):
    """Tune a cell to its end: the points it asked for, and the rate."""
    asked = []
    while (needed := study.tuning(cell))[0]:
        asked += needed[0]
        answer(study, needed[0], quality)
    return asked, needed[1]


@pytest.mark.parametrize("best", [1e-3, 1e-5, 0.3])
def test_tuning_finds_the_best_rate_and_never_chooses_one_at_an_edge(study, best):
    asked, rate = tuned(study, Cell("densenet121", 32), peaked(best))
    assert abs(np.log(rate / best)) <= np.log(2.5) / 2 + 0.01
    first = sorted(p["learning_rate"] for p in asked if p["seed"] == 100)
    assert first[0] < rate < first[-1]
    assert sorted(p["seed"] for p in asked)[-2:] == [101, 101] and len(asked) >= 8


def test_committed_rows_are_of_points_that_the_study_asks_for():
    """A key that changed would throw hours of trainings away."""
    study = committed_study()
    points = study.gate()
    with contextlib.suppress(ConfigError):
        points += study.pair()
    with contextlib.suppress(ConfigError):  # while cells have no rate
        points += study.confirm() + study.fixed()
    asked = {*map(point_key, points), *study.tuning_rows()["key"]}
    rows = map(json.loads, large_batch.ROWS.read_text().splitlines())
    assert {row["key"] for row in rows} <= asked


def test_a_cell_that_is_not_tuned_has_no_rate_and_the_error_says_what_to_run(study):
    with pytest.raises(ConfigError, match=r"densenet121 at batch 32.*chexlib study tune"):
        study.rates()


def test_a_stage_that_is_not_there_is_refused(study):
    with pytest.raises(ConfigError, match=r"no stage warp\. Use some of gate, tune"):
        study.run_stages(["gate", "warp"])


def test_confirming_asks_for_every_cell_and_ten_new_seeds(study):
    while needed := study.tune():
        answer(study, needed, peaked(2e-3))
    points = study.confirm()
    cells = {(p["topology"], p["batch_size"] * p["accumulation"], p["seed"]) for p in points}
    assert len(points) == len(cells) == 12 * 10
    assert {p["seed"] for p in points}.isdisjoint(TUNING_SEEDS)
    # The study's way keeps the rate of the smallest batch.
    kept = {p["topology"]: p["learning_rate"] for p in points if p["accumulation"] == 1}
    fixed = study.fixed()
    assert len(fixed) == 9 * 10
    assert all(p["learning_rate"] == kept[p["topology"]] for p in fixed)


def test_the_pair_that_answers_is_a_part_of_what_confirms(study):
    while needed := study.tune_pair():
        answer(study, needed, peaked(2e-3))
    keys = set(map(point_key, study.pair()))
    assert len(keys) == 6 * 10
    with pytest.raises(ConfigError, match="batch 128"):
        study.confirm()
    while needed := study.tune():
        answer(study, needed, peaked(2e-3))
    assert keys < set(map(point_key, study.confirm()))


@pytest.mark.parametrize(("deviation", "seeds"), [(0.002, 10), (0.05, 20)])
def test_there_are_twenty_seeds_where_five_show_that_ten_are_too_few(study, deviation, seeds):
    while needed := study.tune_pair():
        answer(study, needed, peaked(2e-3))
    assert len(study.pair()) == 6 * 10
    rng = np.random.default_rng(3)
    first = [point for point in study.pair() if point["seed"] < 5]
    answer(study, first[:-1], lambda *of: 0.9 + rng.normal(0, deviation))
    assert len(study.pair()) == 6 * 10  # five are not whole
    answer(study, first, lambda *of: 0.9 + rng.normal(0, deviation))
    assert len(study.pair()) == 6 * seeds


def test_answers_of_a_stage_that_has_just_begun_are_undecided(study):
    while needed := study.tune_pair():
        answer(study, needed, peaked(2e-3))
    answer(study, study.pair()[:7], lambda *of: 0.9)
    answers = answers_of(study.scores("pair"), baseline=0.8)
    assert {found.word for found in answers.values()} == {"undecided"}


def test_each_stage_that_explains_asks_for_what_it_says(study):
    while needed := study.tune_pair() + study.tune_swap():
        answer(study, needed, peaked(2e-3))
    points = {
        name: getattr(study, name)() for name in ("swap", "recipe", "dose", "updates", "local")
    }
    assert {name: len(set(map(point_key, of))) for name, of in points.items()} == {
        "swap": 60,
        "recipe": 60,
        "dose": 36,
        "updates": 54,
        "local": 36,
    }
    swapped = {(p["topology"], p["norm"]) for p in points["swap"]}
    assert swapped == {("densenet121", "group"), ("resnet50", "group"), ("vgg16_bn", "batch")}
    assert {p["group_share"] for p in points["dose"]} == {0.25, 0.5, 0.75}
    few = [p for p in points["updates"] if p["max_steps"]]
    assert {(p["batch_size"] * p["accumulation"], p["max_steps"]) for p in few} == {
        (32, 64),
        (32, 16),
    }
    assert {p["epochs"] for p in points["updates"] if not p["max_steps"]} == {32}
    assert {p["batch_size"] * p["accumulation"] for p in points["local"]} == {512}


def test_the_recipe_of_2018_is_a_plateau_rule_a_fixed_rate_and_a_head_at_one(study):
    whole = recipe_of("densenet121", Switches(), seed=0)
    assert (whole["schedule"], whole["plateau_delta"]) == ("", 0.01)
    assert (whole["learning_rate"], whole["head_bias"]) == (1e-3, 1.0)
    mended = recipe_of("densenet121", Switches(False, False, False), seed=0)
    assert mended["learning_rate"] == pytest.approx(4e-3) and mended["head_bias"] is None
    assert [phase["kind"] for phase in mended["schedule"]["phases"]] == ["warmup", "cosine"]
    # Planted: the plateau rule costs 0.1, the rate 0.02, the head nothing.
    rng = np.random.default_rng(0)

    def pretend(point, folder):
        cost = 0.1 * (point["schedule"] == "") + 0.02 * (point["learning_rate"] == 1e-3)
        auroc = 0.9 - cost + rng.normal(0, 0.002)
        return {"diverged": False, "val_auroc": auroc, "auroc": auroc}

    run_grid(study.recipe(), study.table, pretend)
    effects = recipe_effects(study.recipe_scores())
    assert effects["plateau"].mean == pytest.approx(0.1, abs=0.005)
    assert effects["plateau"].word == effects["fixed_rate"].word == "supported"
    assert effects["head_at_one"].word == "equivalent"


def test_the_swap_finds_a_planted_cause():
    rng = np.random.default_rng(1)
    confirmed = scores_with(0.05, rng)
    columns = pd.MultiIndex.from_tuples([(cell.topology, cell.batch) for cell in SWAPS])
    swapped = pd.DataFrame(0.92 + rng.normal(0, 0.004, (10, 6)), confirmed.index, columns)
    swapped[("vgg16_bn", 512)] -= 0.05
    effects = swap_effects(confirmed, swapped)
    assert effects["densenet121"].word == effects["vgg16"].word == "supported"
    assert effects["resnet50"].word in ("equivalent", "undecided")


@pytest.mark.parametrize("batch", [32, 2048])
def test_a_rate_warms_up_and_falls_to_0_in_as_many_updates_as_the_batch_leaves(batch):
    made = settings_of(Cell("vgg16", batch), 0.01, seed=0)
    assert made["batch_size"] * made["accumulation"] == batch
    schedule = resolve(made["schedule"], images=4096, global_batch=batch, epochs=8)
    rates = schedule.compile(steps_per_epoch=4096 / batch).rate
    assert len(rates) == 8 * 4096 // batch
    assert rates.argmax() == round(0.1 * len(rates)) and rates.max() == pytest.approx(0.01)
    assert rates[-1] < 0.0002 and rates[0] == pytest.approx(0.001)


def scores_with(effect, rng, *, start=0.92):
    """Scores of ten seeds, with D1 and D2 of this size and `DEVIATION` over seeds."""
    noise = rng.normal(0, DEVIATION / 2, (10, len(CELLS)))
    scores = pd.DataFrame(
        start + noise,
        index=pd.Index(range(10), name="seed"),
        columns=pd.MultiIndex.from_tuples([(c.topology, c.batch) for c in CELLS]),
    )
    scores[("densenet121", 512)] -= effect
    return scores


def test_a_planted_effect_is_found_and_none_is_seldom_seen():
    """500 simulated studies each: power and false alarms are as `power` says."""
    rng = np.random.default_rng(0)
    for effect in (0.05, 0.0):
        answers = [answers_of(scores_with(effect, rng), baseline=0.8) for _ in range(500)]
        share = np.mean([a["D1"].word == "supported" for a in answers])
        assert share == pytest.approx(power(effect, DEVIATION, 10), abs=0.05)
    assert power(0.05, DEVIATION, 10) > 0.99 and power(0.0, DEVIATION, 10) < 0.03


def test_losses_are_those_planted():
    lost = losses_of(scores_with(0.05, np.random.default_rng(1))).mean()
    assert lost["densenet121"] == pytest.approx(0.05, abs=0.02)
    assert lost["vgg16"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("start", "baseline", "says"),
    [(0.85, 0.80, "reaches 0.85"), (0.92, 0.95, "ridge regression's 0.950")],
)
def test_a_network_that_has_not_passed_the_gate_has_no_verdict(start, baseline, says):
    scores = scores_with(0.05, np.random.default_rng(2), start=start)
    found = answers_of(scores, baseline=baseline)
    assert all(says in text and text.startswith("not comparable") for text in found.values())


def test_what_is_measured_of_a_training(phantom, tmp_path):
    base = config_for(phantom, tmp_path, norm_momentum=0.99, train_images=64)
    study = LargeBatchStudy(base, tmp_path / "rows.jsonl", {"data": "d", "split_digest": "s"})
    cell = Cell("vgg16", 32)
    point = study.point(cell, rate_of(0), seed=0, passes=2)
    assert study.run([point], reuse=Reuse(accumulates=True))
    row = json.loads(study.table.read_text())
    assert row["updates"] == 4 and not row["diverged"]
    assert 0 <= row["auroc"] <= 1 and 0 <= row["val_auroc"] <= 1
    assert row["updates_to_0.75"] is None or row["updates_to_0.75"] <= 4
    assert json.loads(row["schedule"])["phases"][0]["kind"] == "warmup"
    assert study.run([point], reuse=None)  # nothing is trained again


def test_a_trainer_used_again_gives_what_a_new_one_would(phantom, tmp_path):
    """After a training with another seed, rate and number of virtual ranks, all state must be as
    new.
    """
    reuse = Reuse()
    first = dict(epochs=1, accumulation=3, batch_size=4, seed=5, learning_rate=1e-3)
    fit(config_for(phantom, tmp_path / "before", **first), reuse=reuse)
    second = dict(epochs=1, accumulation=2)
    used = fit(config_for(phantom, tmp_path / "used", **second), reuse=reuse)
    new = fit(config_for(phantom, tmp_path / "new", **second))
    for a, b in zip(
        load_model(used.model)[0].get_weights(), load_model(new.model)[0].get_weights(), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert used.history[0]["loss"] == new.history[0]["loss"]


def test_the_population_is_a_random_part_of_the_images_and_not_the_lowest_patient_numbers(
    monkeypatch,
):
    seen = []
    monkeypatch.setattr(judge, "POPULATION", 1000)
    monkeypatch.setattr(judge, "ImageStore", lambda paths, **_: Places(len(paths)))
    monkeypatch.setattr(
        judge, "recalibrate", lambda model, batches, *_, **__: seen.append(list(batches))
    )
    part = SimpleNamespace(table=pd.DataFrame({"path": range(4000)}))
    training = SimpleNamespace(
        model=None,
        parts={"train": part},
        config=SimpleNamespace(size=32),
        trainer=SimpleNamespace(infer_by_batch=None),
    )
    for world in (World(), World(), World(0, 2), World(1, 2)):
        training.world = world
        judge.recalibrate_on_train(training)
    whole, again, *halves = [np.concatenate(batches).ravel() for batches in seen]
    assert len(set(whole)) == 1000
    assert stats.kstest(whole / 4000, "uniform").pvalue > 0.001
    np.testing.assert_array_equal(whole, again)
    assert set(whole) == set(np.concatenate(halves))


def test_a_test_part_without_any_auroc_is_told_before_something_is_trained(tiny_nih, tmp_path):
    root = tiny_nih()
    config = TrainConfig(data_dir=str(root), run_dir=str(tmp_path / "run"))
    judge.divide_to_judge(config)
    csv = root / "Data_Entry_2017_v2020.csv"
    csv.write_text(re.sub(r"(\.png),[^,]+,", r"\1,Mass,", csv.read_text()))
    with pytest.raises(
        DataError, match="both positives and negatives among the 5 images of the te"
    ):
        judge.divide_to_judge(config)
