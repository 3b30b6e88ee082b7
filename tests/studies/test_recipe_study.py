"""The grid of notebook 06 names every training once, and its tables are what the rows say."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from small_training import config_for, with_a_tiny_network

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from chexlib import figures
from chexlib.errors import ConfigError, WeightsError
from chexlib.ledger.published import published_collapses, published_ladder
from chexlib.machine import BATCH
from chexlib.studies.grid import point_key
from chexlib.studies.recipes import (
    batch_losses,
    best_peak_loss,
    collapse_gains,
    ladder_gains,
    measure_collapses,
    peaks_tried,
    read_peaks,
    recipe_grid,
)
from chexlib.training.fit import fit
from chexlib.training.recipes import LADDER, PRESETS, preset, resolve

GRID = dict(
    rungs=list(LADDER),
    batches=[16, 128, 1024],
    local_batch=16,
    peak=0.05,
    rule="sqrt",
    seeds=[0, 1, 2],
    images=2000,
    epochs=6,
)


def test_the_grid_has_each_rung_at_each_batch_and_seed_with_equal_epochs():
    points = recipe_grid(**GRID)
    assert len(points) == 5 * 3 * 3 == len({point_key(point) for point in points})
    for point in points:
        assert (
            point["batch_size"] * point["accumulation"] == point["batch"] and point["epochs"] == 6
        )
        schedule = json.loads(point["schedule"])
        values = resolve(schedule, images=2000, global_batch=point["batch"], epochs=6).compile()
        assert len(values) == 6 * -(-2000 // point["batch"])
        assert schedule["peak"] == pytest.approx(0.05 * np.sqrt(point["batch"] / 16))
        assert values.rate.max() == pytest.approx(
            schedule["peak"], rel=0.2
        )  # a short warm-up ends below its peak
    tiny = recipe_grid(**{**GRID, "images": 50, "epochs": 2})
    assert {point["batch"] for point in tiny} == {16}  # 128 and 1,024 would make 2 updates
    with pytest.raises(ConfigError, match="13 images in global batches of 16 leave fewer than 4"):
        recipe_grid(**{**GRID, "images": 13, "epochs": 2})


@pytest.mark.parametrize("batches", [[16, 100], [16, 24, 128]])
def test_a_batch_that_local_batches_cannot_fill_is_refused(batches):
    with pytest.raises(
        ConfigError,
        match=rf"a global batch of {batches[1]} is not accepted with a local batch of 16",
    ):
        recipe_grid(**{**GRID, "batches": batches})
    below = recipe_grid(**{**GRID, "batches": [4, 16]})
    assert {(point["batch"], point["batch_size"], point["accumulation"]) for point in below} == {
        (4, 4, 1),
        (16, 16, 1),
    }


def test_gains_of_rungs_are_paired_by_seed():
    rng = np.random.default_rng(0)
    areas = {rung: 0.6 + 0.01 * i + rng.normal(0, 0.02, 3) for i, rung in enumerate(LADDER)}
    rows = pd.DataFrame(
        [
            {"rung": r, "seed": s, "auroc": a}
            for r, of in reversed(areas.items())
            for s, a in enumerate(of)
        ]
    )
    table = ladder_gains(rows)
    assert list(table.index) == list(LADDER)
    apart = areas["+ warm-up"] - areas["step decay"]
    row = table.loc["+ warm-up"]
    low, high = stats.ttest_1samp(apart, 0).confidence_interval()
    assert (row["gain"], row["low"], row["high"]) == pytest.approx((apart.mean(), low, high))
    assert row["auroc"] == pytest.approx(areas["+ warm-up"].mean()) and row["seeds"] == 3
    assert np.isnan(table.loc["step decay", "gain"])
    assert np.isnan(ladder_gains(rows[rows["seed"] == 0])["low"]).all()


def test_what_a_batch_loses_is_in_percent_of_the_skill_of_the_smallest_paired_by_seed():
    smallest, large = np.array([0.80, 0.70, 0.75]), np.array([0.76, 0.68, 0.70])
    rows = [
        {"rung": "+ collapse", "seed": seed, "batch": batch, "auroc": area}
        for batch, areas in ((1024, large), (16, smallest))
        for seed, area in enumerate(areas)
    ]
    table = batch_losses(pd.DataFrame(rows), images=2000)
    (row,) = table.to_dict("records")
    assert (row["rung"], row["batch"], row["updates"], row["seeds"]) == ("+ collapse", 1024, 2, 3)
    assert row["baseline"] == pytest.approx(0.75)
    assert row["loss"] == pytest.approx(
        100 * 0.11 / 0.75
    )  # 0.11 lost in three seeds, of 0.75 above chance
    for end in ("low", "high"):  # where a paired t test begins to refuse the ratio
        rest = (smallest - large) - row[end] / 100 * (smallest - 0.5)
        assert stats.ttest_1samp(rest, 0).pvalue == pytest.approx(0.05)
    assert batch_losses(
        pd.DataFrame(rows[3:]), images=2000
    ).empty  # the smallest alone loses nothing
    untrained = pd.DataFrame(rows).assign(auroc=lambda own: own["auroc"] - 0.15)
    (row,) = batch_losses(untrained, images=2000).to_dict("records")
    assert np.isnan([row["loss"], row["low"], row["high"]]).all()


def test_each_rung_and_batch_has_its_loss_and_a_rung_without_its_smallest_batch_has_none():
    areas = {
        ("a", 16): 0.8,
        ("a", 64): 0.77,
        ("a", 256): 0.74,
        ("b", 16): 0.9,
        ("b", 64): 0.8,
        ("c", 64): 0.9,
    }
    rows = pd.DataFrame(
        [{"rung": r, "batch": b, "seed": 0, "auroc": a} for (r, b), a in areas.items()]
    )
    table = batch_losses(rows, images=1000).set_index(["rung", "batch"])
    assert table["loss"].round(6).to_dict() == {("a", 64): 10, ("a", 256): 20, ("b", 64): 25}
    assert table["updates"].to_dict() == {("a", 64): 16, ("a", 256): 4, ("b", 64): 16}


def test_the_best_rate_is_chosen_on_validation_and_judged_on_test():
    validation = {(16, 0.05): 0.70, (16, 0.15): 0.71, (1024, 0.4): 0.60, (1024, 1.2): 0.55}
    test = {(16, 0.05): 0.90, (16, 0.15): 0.72, (1024, 0.4): 0.66, (1024, 1.2): 0.99}
    rows = pd.DataFrame(
        [
            {
                "batch": b,
                "schedule": json.dumps({"peak": p}),
                "seed": s,
                "validation": v,
                "auroc": test[b, p] + s / 100,
            }
            for (b, p), v in validation.items()
            for s in range(3)
        ]
    )
    table = peaks_tried(rows)
    assert table.query("chosen")[["batch", "peak"]].to_numpy().tolist() == [[16, 0.15], [1024, 0.4]]
    low, high = stats.ttest_1samp([0.72, 0.73, 0.74], 0).confidence_interval()
    assert table.loc[1, ["auroc", "low", "high"]].tolist() == pytest.approx([0.73, low, high])
    found = best_peak_loss(rows)
    assert (found["batches"], found["optimizers"], found["seeds"]) == (
        [16, 1024],
        ["sgd", "sgd"],
        3,
    )
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0.06, 0.06, 0.06))
    lamb = rows[rows["batch"] == 1024].assign(
        optimizer="lamb", validation=0.65, auroc=lambda of: of["auroc"] + 0.05
    )
    both = pd.concat([rows, lamb], ignore_index=True)
    assert best_peak_loss(both, optimizer="sgd") == found
    assert len(peaks_tried(both)) == 6
    with_both = best_peak_loss(both[both["schedule"] != json.dumps({"peak": 1.2})])
    assert with_both["optimizers"] == ["sgd", "lamb"] and with_both["difference"] == pytest.approx(
        0.01
    )


def test_highest_rates_name_their_optimizer_and_a_wrong_one_is_refused():
    tried = read_peaks("0.03, 0.1,lamb 0.0025,0.03")
    assert tried == [
        {"optimizer": name, "peak": p}
        for name, p in (("sgd", 0.03), ("sgd", 0.1), ("lamb", 0.0025))
    ]
    (point,) = recipe_grid(
        **{**GRID, "rungs": ["+ collapse"], "batches": [16], "seeds": [0], **tried[2]}
    )
    assert point["optimizer"] == "lamb" and json.loads(point["schedule"])["peak"] == 0.0025
    (plain,) = recipe_grid(
        **{**GRID, "rungs": ["+ collapse"], "batches": [16], "seeds": [0], **tried[0]}
    )
    assert "optimizer" not in plain  # as in tables written before
    for wrong in ("", "fast", "0", "-1", "inf", "0.1,lamb", "0.1,lion 0.1", "0.1,,0.2"):
        with pytest.raises(ConfigError, match=r"highest rate of .* is not accepted"):
            read_peaks(wrong)
    with pytest.raises(ConfigError, match="first highest rate"):
        read_peaks("lamb 0.1,0.2")


def test_collapse_gains_are_paired_by_seed():
    rows = pd.DataFrame(
        {
            "before_1": [0.5, 0.6],
            "after_1": [0.7, 0.7],
            "before_2": [0.6, 0.6],
            "after_2": [0.65, 0.6],
            "seed": [0, 1],
        }
    )
    table = collapse_gains(rows)
    low, high = stats.ttest_1samp([0.2, 0.1], 0).confidence_interval()
    assert table.loc[1].tolist()[:6] == pytest.approx([0.55, 0.7, 0.15, low, high, 2])
    assert table.loc[1, "gain_later"] == pytest.approx(0.1) and table.loc[
        2, "gain"
    ] == pytest.approx(0.025)
    assert table.loc[2, ["gain_later", "low_later", "high_later"]].isna().all()


@pytest.mark.parametrize("batch", [4, 16, 48])
def test_the_workbench_opens_at_any_batch(batch, monkeypatch):
    monkeypatch.delenv(BATCH, raising=False)
    bench = figures.workbench([*PRESETS, *LADDER], images=2000, batch=batch, epochs=6)
    (slider,) = (
        child for child in bench.children if getattr(child, "description", "") == "global_batch"
    )
    assert (
        slider.value == batch
        and {16, 1024} <= set(slider.options)
        and list(slider.options) == sorted(slider.options)
    )


def test_the_figures_name_phases_rungs_and_batches():
    def words(figure):
        return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))

    drawn = figures.schedule(preset("64-nodes-coded").compile(), title="64 nodes")
    for word in (
        "learning rate",
        "momentum",
        "weight decay",
        "cycle 2: re-warm-up",
        "collapse",
        "step",
    ):
        assert word in words(drawn)
    rate = drawn.axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(rate, preset("64-nodes-coded").compile().rate)
    rows = pd.DataFrame(
        [{"rung": r, "seed": s, "auroc": 0.6 + 0.01 * s} for r in LADDER for s in (0, 1)]
    )
    ladder = figures.ladder(ladder_gains(rows), pd.Series(published_ladder()).diff())
    assert all(rung in words(ladder) for rung in list(LADDER)[1:])
    collapses = figures.collapse_curve(published_collapses(), published_collapses())
    assert "before the collapse" in words(collapses)
    assert published_collapses()["gain"].iloc[[0, -1]].tolist() == [7.17, 2.32]
    assert plt.get_fignums() == []


def test_collapses_are_from_the_ends_of_epochs_and_each_two_have_a_diversity(
    phantom, tmp_path, monkeypatch
):
    with_a_tiny_network(monkeypatch)
    constant = {"unit": "epochs", "phases": [{"kind": "constant", "length": 3, "rate": 0.01}]}
    own = {
        "optimizer": "sgd",
        "schedule": constant,
        "epochs": 3,
        "max_steps": 3,
        "keep_checkpoints": 9,
    }
    config = config_for(phantom, tmp_path / "run", checkpoint_steps=2, **own)
    fit(config)  # leaves checkpoints within epochs, as a stop does
    found = measure_collapses(config, ensemble=tmp_path / "ensemble.keras")
    assert {f"{name}_{i}" for name in ("before", "after", "validation") for i in (1, 2, 3)} <= set(
        found
    )
    pairs = [found[f"diversity_{pair}"] for pair in ("1_2", "1_3", "2_3")]
    assert found["diversity"] == pytest.approx(np.mean(pairs))
    (tmp_path / "run" / "checkpoints" / "step-000000006.npz").unlink()
    with pytest.raises(WeightsError, match="epoch 2"):
        measure_collapses(config, ensemble=tmp_path / "ensemble.keras")
