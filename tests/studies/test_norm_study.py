"""The batch-norm study: which trainings it asks for, and that its verdict adds up and follows the
numbers.
"""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from small_training import Places, config_for

from chexlib.collectives import World
from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.intervals import over_seeds
from chexlib.models.weights import load_model
from chexlib.studies import judge
from chexlib.studies.batch_norm import (
    CAUSES,
    decompose,
    norm_grid,
    remedies,
    training_order,
    verdict,
)
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.trainer import Reuse

ASKED = dict(
    topologies=["densenet121", "vgg16"],
    batches=[16, 64, 256],
    local_batches=[16, 64],
    momenta=[0.99, 0.9],
    norms=["ghost", "group"],
    seeds=[0, 1, 2],
    images=600,
    epochs=3,
)


def updates(point):
    return point["epochs"] * point["max_steps"]


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


def test_each_part_varies_what_it_says_and_nothing_else():
    grid = norm_grid(**ASKED)
    for part, points in grid.items():
        assert len({tuple(p.values()) for p in points}) == len(points), part
        assert {p["seed"] for p in points} == {0, 1, 2}
        assert all(p["batch_size"] * p["accumulation"] * p["max_steps"] <= 600 for p in points)
    assert [updates(p) for p in grid["equal epochs"][::3]] == [111, 27, 6] * 2
    assert {updates(p) for p in grid["equal updates"]} == {6}
    assert {p["batch_size"] for p in grid["equal updates"]} == {16}
    assert {(p["batch_size"], p["accumulation"]) for p in grid["local batch"]} == {
        (16, 16),
        (64, 4),
    }
    assert {p["norm_momentum"] for p in grid["momentum"]} == {0.99, 0.9}
    assert {(p["norm"], p["batch_size"], p["ghost_size"]) for p in grid["norm"]} == {
        ("batch", 16, 0),
        ("ghost", 256, 16),
        ("group", 16, 0),
    }
    for part in ("local batch", "momentum", "norm"):
        assert {p["topology"] for p in grid[part]} == {"densenet121"}
    shared = [p for p in grid["equal epochs"] if p["batch_size"] * p["accumulation"] == 256]
    for part in ("equal updates", "norm", "momentum", "local batch"):
        assert [p for p in shared if p["topology"] == "densenet121"] == [
            p for p in grid[part] if p in shared
        ][:3]


@pytest.mark.parametrize(
    "changes",
    [
        {"topologies": ["vgg16"]},
        {"batches": [16, 1024]},
        {"batches": [24, 256]},
        {"local_batches": [16, 48]},
    ],
)
def test_a_study_that_cannot_be_made_is_refused(changes):
    with pytest.raises(ConfigError, match=r"global batch of|no batch norm"):
        norm_grid(**{**ASKED, **changes})


def row(part, topology, seed, batch, local, moving, recalibrated):
    names = (
        "part",
        "topology",
        "seed",
        "accumulation",
        "batch_size",
        "auroc_moving",
        "auroc_recalibrated",
    )
    return dict(
        zip(names, (part, topology, seed, batch // local, local, moving, recalibrated), strict=True)
    )


def study(topology, few, whole, large, seeds=3):
    """Rows in which the smallest batch reaches 0.80 by both statistics, a seed 0.01 more than the
    one before.
    """
    rows = []
    for seed in range(seeds):
        rows += [
            row("equal epochs", topology, seed, 16, 16, 0.80 + 0.01 * seed, 0.80),
            row("equal epochs", topology, seed, 256, 16, *large),
            row("equal updates", topology, seed, 16, 16, 0.5, few),
            row("equal updates", topology, seed, 256, 16, *large),
        ]
        if whole:
            rows += [
                row("local batch", topology, seed, 256, n, 0.5, r)
                for n, r in ((16, large[1]), (64, whole))
            ]
    return rows


def test_the_causes_are_those_built_in_and_add_up_to_the_loss():
    rows = study("densenet121", 0.70, 0.76, (0.60, 0.73)) + study("vgg16", 0.70, None, (0.65, 0.65))
    terms = decompose(pd.DataFrame(rows))
    assert len(terms) == 6
    np.testing.assert_allclose(terms["total"], terms[CAUSES].sum(axis=1), atol=1e-12)
    first = terms.iloc[0]
    assert first["topology"] == "densenet121"
    expected = {"total": 0.20, "updates": 0.10, "lag": 0.13, "local batch": 0.03, "rest": -0.06}
    assert first[["total", *CAUSES]].to_dict() == pytest.approx(expected)
    vgg = terms[terms["topology"] == "vgg16"].iloc[0]
    assert (
        vgg["local batch"] == 0
        and vgg["updates"] == pytest.approx(0.10)
        and vgg["lag"] == pytest.approx(0)
    )


def test_intervals_over_seeds_are_students_t():
    terms = decompose(pd.DataFrame(study("resnet50", 0.7, 0.76, (0.6, 0.73))))
    found = over_seeds(terms, ["topology"], ["total"]).iloc[0]
    expected = stats.ttest_1samp(terms["total"], 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["seeds"] == 3


def test_the_verdict_names_the_largest_cause_and_admits_one_seed():
    said = verdict(decompose(pd.DataFrame(study("densenet121", 0.70, 0.76, (0.60, 0.73)))))
    assert "**densenet121** loses +0.210 (+0.185 to +0.235)" in said
    assert "largest of the three causes is lag" in said
    other = verdict(
        decompose(pd.DataFrame(study("densenet121", 0.60, 0.76, (0.70, 0.73), seeds=1)))
    )
    assert "updates +0.200;" in other and "no conclusion" in other and "largest of" not in other


def test_the_verdict_says_nothing_of_a_network_that_has_not_learned():
    rows = pd.DataFrame(study("densenet121", 0.70, 0.76, (0.60, 0.73)))
    scores = rows.filter(like="auroc").columns
    rows[scores] -= 0.3
    rows["auroc_recalibrated"] += 0.01 * (rows["seed"] - 1)
    said = verdict(decompose(rows))
    assert "At the smallest batch nothing was learnt: a mean AUROC of 0.500 is below 0.7" in said
    assert said.count("no conclusion") == 1 and "largest of" not in said.split("no conclusion")[1]


def test_the_studys_claim_has_no_verdict_where_one_of_its_networks_learnt_nothing():
    rows = pd.DataFrame(
        study("densenet121", 0.70, 0.76, (0.60, 0.73)) + study("resnet50", 0.7, 0.76, (0.65, 0.7))
    )
    scores = rows.filter(like="auroc").columns
    rows.loc[rows["topology"] == "resnet50", scores] -= 0.2  # learnt a little, to 0.6
    said = verdict(decompose(rows))
    assert "bears large batches better is not measured, since resnet50 learnt nothing" in said


def test_a_training_that_diverged_takes_its_seed_out_of_the_causes_and_no_other_batch_takes_its_place(
    caplog,
):
    rows = pd.DataFrame(study("densenet121", 0.70, 0.76, (0.60, 0.73)))
    more = pd.DataFrame(
        [row("equal epochs", "densenet121", seed, 64, 16, 0.79, 0.79) for seed in range(3)]
    )
    rows = pd.concat([rows, more])
    large = (rows["accumulation"] == 16) & (rows["part"] == "equal epochs")
    terms = decompose(rows[~(large & (rows["seed"] == 1))])
    assert terms["seed"].tolist() == [0, 2] and "seed 1" in caplog.text
    pd.testing.assert_frame_equal(terms, decompose(rows).query("seed != 1").reset_index(drop=True))


def test_the_verdict_holds_the_studys_claim_against_paired_seeds_and_says_what_mends_it():
    rows = pd.DataFrame(
        study("densenet121", 0.70, 0.76, (0.60, 0.73)) + study("resnet50", 0.7, 0.76, (0.65, 0.7))
    )
    largest = rows[(rows["part"] == "equal epochs") & (rows["accumulation"] == 16)]
    slower = largest.assign(norm_momentum=0.9, auroc_moving=0.64)
    mended = remedies(pd.concat([largest.assign(norm_momentum=0.99), slower]))
    own = mended[mended["topology"] == "densenet121"]
    assert own["recalibration"].tolist() == pytest.approx([0.13] * 3)
    assert own["momentum 0.9"].tolist() == pytest.approx([0.04] * 3)
    said = verdict(decompose(rows), mended)
    assert (
        "densenet121 less that of resnet50 is +0.050 (+0.050 to +0.050)" in said
        and "better is reproduced" in said
    )
    assert (
        "for resnet50 at the largest batch, AUROC that each adds: recalibration +0.050 (+0.050 to "
        "+0.050)" in said
    )
    assert "momentum 0.9 -0.010" in said
    other = verdict(decompose(rows.replace({"resnet50": "densenet121", "densenet121": "resnet50"})))
    assert "better is contradicted" in other


@pytest.mark.parametrize(("images", "epochs"), [(75_700, 10), (384, 10), (256, 3)])
def test_equal_updates_are_equal_to_the_update(images, epochs):
    grid = norm_grid(**{**ASKED, "images": images, "epochs": epochs})
    assert len({point["max_steps"] * point["epochs"] for point in grid["equal updates"]}) == 1


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


def test_the_order_of_training_has_each_point_once_and_each_graph_in_one_go():
    grid = norm_grid(**ASKED)
    order = training_order(grid)
    assert len(order) == len({tuple(p.values()) for points in grid.values() for p in points})
    graphs = [(p["topology"], p["norm"], p["norm_momentum"]) for p in order]
    changes = [a for a, b in zip(graphs, [*graphs[1:], None], strict=True) if a != b]
    assert len(changes) == len(set(graphs)) and changes[-1] == ("densenet121", "batch", 0.99)


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
