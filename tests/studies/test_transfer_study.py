"""The grid of notebook 07 names every fine-tuning once, and its verdicts are what the rows say."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from chexlib import figures
from chexlib.errors import DivergedError
from chexlib.studies import transfer as study
from chexlib.studies.grid import point_key
from chexlib.training.config import TrainConfig

GRID = dict(seeds=[0, 1, 2], batch=64, warmup_epochs=1.0)


def rows_of(auroc, *, snapshots=6):
    """Rows of the whole grid, whose AUROC is `auroc(point)` and a bit of noise."""
    rng = np.random.default_rng(0)
    points = study.transfer_grid(snapshots, **GRID)
    extra = [
        {"images": 100 * p["snapshot"], "updates": 10, "auroc": auroc(p) + rng.normal(0, 1e-4)}
        for p in points
    ]
    return pd.DataFrame([{**point, **more} for point, more in zip(points, extra, strict=True)])


def test_the_grid_has_each_snapshot_at_both_rates_with_and_without_warmup():
    points = study.transfer_grid(6, **GRID)
    assert len(points) == 6 * 2 * 2 * 3 == len({point_key(point) for point in points})
    assert {p["warmup"] * p["batch"] / 256 for p in points} == {1.0, 0.0}  # epochs at this batch


def test_a_finetuning_starts_at_its_rate_and_warms_up_in_proportion_to_the_batch(monkeypatch):
    asked = []

    def diverge(config, **_):
        asked.append(config)
        raise DivergedError("for this test")

    monkeypatch.setattr("chexlib.studies.grid.learn", diverge)
    snapshots = pd.DataFrame({"path": ["a", "b"], "learning_rate": [3e-4, 1e-4], "images": [8, 16]})
    base = TrainConfig(data_dir="d", run_dir="r", epochs=4, batch_size=8)
    point = {"snapshot": 2, "rate": study.OWN, "warmup": 8.0, "batch": 8, "seed": 3}
    changes = [{}, {"batch": 32, "rate_batch": 8}, {"snapshot": 0, "rate": study.DEFAULT}]
    rows = [
        study.measure_transfer(base, {**point, **change}, snapshots, default=1e-3)
        for change in changes
    ]
    assert rows[0] == {"diverged": True, "highest": 1e-4, "images": 16}
    assert [row["highest"] for row in rows] == pytest.approx([1e-4, 2e-4, 1e-3])
    names = [Path(config.weights).name if config.weights else "" for config in asked]
    assert names == ["b", "b", ""]
    assert [config.batch_size * config.accumulation for config in asked] == [8, 32, 8]
    for config, row, warmup in zip(asked, rows, (0.25, 1.0, 0.25), strict=True):
        rise, fall = config.schedule["phases"]
        assert (rise["kind"], fall["kind"]) == ("warmup", "cosine")
        assert rise["length"] == warmup and rise["length"] + fall["length"] == 4
        assert rise["rate"] == fall["rate"] == row["highest"]


def test_a_rule_is_reproduced_contradicted_or_undecided_as_its_interval_lies():
    def as_the_study_says(p):
        return (
            0.8
            - 0.05 * (p["snapshot"] == 6)
            + 0.02 * (p["rate"] == study.OWN)
            + 0.01 * (p["warmup"] > 0)
        )

    found = study.rule_effects(rows_of(as_the_study_says))
    assert found["verdict"].tolist() == ["reproduced"] * 3 and found["why"].tolist() == [""] * 3
    assert found["effect"].astype(float).tolist() == pytest.approx([0.05, 0.02, 0.01], abs=1e-3)
    assert found["pairs"].tolist() == [6, 36, 36] and found["diverged"].tolist() == [0, 0, 0]
    other_way = study.rule_effects(rows_of(lambda p: 1.6 - as_the_study_says(p)))
    assert other_way["verdict"].tolist() == ["contradicted"] * 3
    noise = np.random.default_rng(1)
    by_chance = study.rule_effects(rows_of(lambda p: noise.normal(0.8, 0.1)))
    assert by_chance["verdict"].tolist() == ["undecided"] * 3
    one = study.rule_effects(rows_of(as_the_study_says).query("seed == 0"))
    assert (
        one["verdict"].tolist() == ["undecided"] * 3 and one["why"].str.contains("one seed").all()
    )


@pytest.mark.parametrize("snapshot", [1, 6])
@pytest.mark.parametrize("rate", [study.OWN, study.DEFAULT])
@pytest.mark.parametrize("warmup", [4.0, 0.0])
def test_a_cell_that_diverged_makes_no_rule_contradicted_and_is_told(snapshot, rate, warmup):
    """Snapshots differ by far; rates and warm-ups differ by nothing: no cell that is missing may
    change that.
    """
    rows = rows_of(lambda p: 0.75 + 0.01 * p["snapshot"])
    gone = (rows["snapshot"] == snapshot) & (rows["rate"] == rate) & (rows["warmup"] == warmup)
    assert gone.sum() == 3  # of each seed
    rows.loc[gone, "auroc"] = np.nan
    found = study.rule_effects(rows)
    assert found.loc[["rate", "warm-up"], "effect"].abs().max() < 2e-4
    assert found.loc[["rate", "warm-up"], "pairs"].tolist() == [33, 33]
    assert found.loc[["rate", "warm-up"], "diverged"].tolist() == [3, 3]
    assert found.loc["rate", "why"] == "trainings that diverged, left out with their pairs: 3"
    assert found.loc["earlier", "effect"] == pytest.approx(
        -0.01, abs=2e-4
    )  # snapshot 5 is next to the last
    by_rate = study.rate_gains(rows)
    assert by_rate.loc[snapshot, ["pairs", "diverged"]].tolist() == [3, 3]
    assert by_rate["effect"].abs().max() < 2e-4


def test_earlier_snapshots_are_compared_with_the_last_at_the_same_warmup():
    """A warm-up is worth 0.1, and no snapshot anything: without its partner a training has no part
    in the mean.
    """
    rows = rows_of(lambda p: 0.75 + 0.1 * (p["warmup"] > 0))
    gone = (rows["snapshot"] == 6) & (rows["rate"] == study.DEFAULT) & (rows["warmup"] > 0)
    rows.loc[gone & (rows["seed"] < 2), "auroc"] = np.nan
    gains = study.earlier_gains(rows)
    assert gains["effect"].abs().max() < 5e-4 and gains["pairs"].tolist() == [4] * 5
    assert gains["diverged"].tolist() == [2] * 5


def test_one_snapshot_or_a_last_one_that_diverged_leaves_the_rule_of_earlier_ones_undecided():
    one = study.rule_effects(rows_of(lambda p: 0.8 + 0.02 * (p["rate"] == study.OWN), snapshots=1))
    assert (
        one["verdict"].tolist() == ["undecided", "reproduced", "undecided"]
        and one.loc["earlier", "seeds"] == 0
    )
    rows = rows_of(lambda p: 0.8 + 0.02 * (p["rate"] == study.OWN))
    rows.loc[rows["snapshot"] == 6, "auroc"] = np.nan
    without = study.rule_effects(rows)
    assert without["verdict"].tolist() == ["undecided", "reproduced", "undecided"]
    assert without["pairs"].tolist() == [0, 30, 30] and without["diverged"].tolist() == [6, 12, 12]


def test_no_rule_has_a_verdict_where_nothing_was_learnt():
    found = study.rule_effects(rows_of(lambda p: 0.6 + 0.02 * (p["rate"] == study.OWN)))
    assert found["verdict"].tolist() == ["not comparable"] * 3
    assert (
        found.loc["rate", "why"]
        == "nothing was learnt: a mean AUROC of 0.620 is below 0.7 or not apart from chance"
    )


def test_intervals_are_students_over_seeds_and_hold_for_all_snapshots_together():
    rows = rows_of(lambda p: 0.6 + 0.01 * p["snapshot"] * (p["seed"] + 1))
    default = rows[rows["rate"] == study.DEFAULT].pivot_table(
        index="snapshot", columns="seed", values="auroc"
    )
    gains = study.earlier_gains(rows)
    assert gains.index.tolist() == [1, 2, 3, 4, 5] and gains["images"].tolist() == [
        100,
        200,
        300,
        400,
        500,
    ]
    low, high = stats.ttest_1samp(default.loc[2] - default.loc[6], 0).confidence_interval(
        1 - 0.05 / 5
    )
    assert gains.loc[2, ["low", "high"]].tolist() == pytest.approx([low, high])
    by_seed = rows.groupby(["rate", "seed"])["auroc"].mean()
    low, high = stats.ttest_1samp(
        by_seed[study.OWN] - by_seed[study.DEFAULT], 0
    ).confidence_interval()
    found = study.rule_effects(rows).loc["rate"]
    assert [found["low"], found["high"]] == pytest.approx([low, high])


def test_a_pretraining_is_compared_with_random_weights_by_seed():
    rows = rows_of(
        lambda p: 0.6 + 0.01 * p["snapshot"] * (p["seed"] + 1) + 0.1 * (p["rate"] == study.OWN)
    )
    scratch = pd.DataFrame({"seed": [2, 1, 0], "auroc": [0.62, 0.61, 0.6]})
    found = study.pretraining_gains(rows, scratch)
    assert found.index.tolist() == [1, 2, 3, 4, 5, 6] and found["images"].tolist() == [
        100,
        200,
        300,
        400,
        500,
        600,
    ]
    own = rows[
        (rows["rate"] == study.DEFAULT) & (rows["warmup"] > 0) & (rows["snapshot"] == 3)
    ].set_index("seed")["auroc"]
    low, high = stats.ttest_1samp(own - [0.6, 0.61, 0.62], 0).confidence_interval(1 - 0.05 / 6)
    assert found.loc[3, ["low", "high"]].tolist() == pytest.approx([low, high])
    assert found.loc[3, "effect"] == pytest.approx(0.05, abs=1e-3)


def test_batches_are_compared_with_the_smallest_by_seed():
    rows = pd.DataFrame(
        {
            "batch": [16, 16, 64, 64],
            "seed": [0, 1, 0, 1],
            "updates": [40, 40, 10, 10],
            "auroc": [0.7, 0.6, 0.65, 0.53],
        }
    )
    found = study.by_updates(rows)
    assert found["updates"].tolist() == [40, 10]
    low, high = stats.ttest_1samp([-0.05, -0.07], 0).confidence_interval()
    assert found.loc[64, ["auroc", "effect", "low", "high"]].tolist() == pytest.approx(
        [0.59, -0.06, low, high]
    )
    assert found["loss"].isna().all()  # at 0.65 the smallest batch has learnt too little


def test_what_a_batch_loses_of_the_skill_is_told_beside_its_auroc():
    """By hand: from 0.80 to 0.74 a fifth of the 0.30 above chance is lost."""
    rows = pd.DataFrame(
        {
            "batch": [16, 16, 64, 64],
            "seed": [0, 1, 0, 1],
            "updates": [40, 40, 10, 10],
            "auroc": [0.81, 0.79, 0.75, 0.73],
        }
    )
    found = study.by_updates(rows)
    assert found["loss"].tolist() == pytest.approx([0, 20]) and found.loc[16, "loss_high"] == 0
    for end in ("loss_low", "loss_high"):  # the paired t test does not refuse what lies between
        rest = np.array([0.06, 0.06]) - found.loc[64, end] / 100 * np.array([0.31, 0.29])
        assert stats.ttest_1samp(rest, 0).pvalue == pytest.approx(0.05)


def test_the_figures_show_the_rows():
    rows = rows_of(lambda p: 0.7 + 0.01 * p["snapshot"])
    arm = rows["rate"] + rows["warmup"].gt(0).map({True: ", warm-up", False: ""})
    curve = rows.assign(arm=arm).pivot_table(index="images", columns="arm", values="auroc")
    drawn = figures.along(curve, 0.55)
    assert any(
        line.get_ydata()[0] == 0.55 and "random" in line.get_label() for line in drawn.axes[0].lines
    )
    np.testing.assert_allclose(drawn.axes[0].lines[0].get_ydata(), curve.iloc[:, 0])
    words = " ".join(
        t.get_text() for t in figures.rules(study.rule_effects(rows)).findobj(matplotlib.text.Text)
    )
    assert "do not take the last checkpoint: contradicted" in words
    lost = {"effect": [0.0, -0.1], "low": [0.0, -0.3], "high": [0.0, 0.1]}
    table = pd.DataFrame({"updates": [40, 10], "auroc": [0.7, 0.6]} | lost, index=[16, 1024])
    drawn = figures.updates(table)
    texts = [t.get_text() for t in drawn.findobj(matplotlib.text.Text)]
    assert {"1,024", "40", "10"} <= set(texts)
    bars = drawn.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(bars[1][:, 1], [0.4, 0.8])  # around 0.6
    kept = pd.DataFrame(
        {"images": [10, 20], "val_auroc": [0.5, 0.6], "learning_rate": [1e-3, 1e-4]}
    )
    assert figures.pretraining(kept).axes[1].get_yscale() == "log"
    assert plt.get_fignums() == []
