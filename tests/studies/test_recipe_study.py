"""The study of recipes asks for the trainings it says, at the cost it says, and a collapse is
judged against one more epoch of the same training.
"""

import importlib
import json
import logging
from itertools import takewhile
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from small_training import config_for, with_a_tiny_network

from chexlib.app.cli import STUDIES
from chexlib.evaluation.intervals import percent_lost
from chexlib.models.weights import load_model
from chexlib.studies import recipes
from chexlib.studies.grid import run_grid
from chexlib.studies.recipes import (
    BATCHES,
    CLIMBED,
    CYCLES,
    RUNGS,
    Cell,
    RecipeStudy,
    collapse_gains,
    collapse_of,
    committed_study,
    measure_collapses,
    schedule_of,
)
from chexlib.training.callbacks import snapshots_of
from chexlib.training.fit import learn
from chexlib.training.schedules import Schedule
from chexlib.training.trainer import Reuse

matplotlib.use("Agg")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_large_batch_recipes.ipynb"
BEST = {"sgd": 0.1, "lars": 8, "lamb": 0.02}  # rates of the pretended trainings
NOISE = dict(enumerate([-0.001, 0.001, 0.002, -0.002, 0.003, -0.003])) | {100: 0, 101: 0}


def answer(study, points):
    """Give points rows, as if they had been trained: AUROC falls from its best rate on."""

    def pretend(point, folder):
        if "rung" not in point:
            return {"auroc": 0.8}
        if point["rung"] == CYCLES:  # a collapse is worth what one more epoch is
            row = {f"before_{i}": 0.8 + 0.01 * i for i in range(1, 9)}
            row |= {f"after_{i}": 0.81 + 0.01 * i + NOISE[point["seed"]] for i in range(1, 8)}
            return {"diverged": False, "ensemble": 0.9, "greedy": 0.89, "member": 0.88, **row}
        off = abs(np.log(point["learning_rate"] / BEST[point["optimizer"]]))
        auroc = 0.92 - 0.01 * off + 0.001 * point["seed"]
        if point["rung"] == "+ weight decay":
            auroc += 0.03 + NOISE[point["seed"]]
        return {"diverged": False, "val_auroc": auroc, "auroc": auroc}

    run_grid(points, study.table, pretend)


@pytest.mark.parametrize("name", STUDIES.values())
def test_a_study_that_the_command_line_names_has_what_it_needs(name):
    module = importlib.import_module(f"chexlib.studies.{name}")
    study = module.committed_study()
    assert study.table == module.ROWS and module.PHANTOM["images"] and callable(module.study_on)
    assert all(callable(getattr(study, stage)) for stage in study.STAGES)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The study with rows of its tuning, and the seconds that those are said to take."""
    folder = tmp_path_factory.mktemp("rows")
    base = committed_study().base
    study = RecipeStudy(base, folder / "rows.jsonl", {"data": "none", "split_digest": "0"})
    seconds = 0
    while needed := study.tune():
        seconds += sum(map(study.seconds_of, needed))
        answer(study, needed)
    return study, seconds


def test_every_rung_is_trained_at_every_batch_with_as_many_passes_and_six_seeds(tuned):
    study, _ = tuned
    rates = study.rates()
    ridge, *points = study.ladder()
    assert ridge == study.ridge() and len(points) == 6 * sum(map(len, CLIMBED.values()))
    for point in points:
        batch = point["batch_size"] * point["accumulation"]
        kept = 32 if point["rung"] == "plain" else batch
        assert point["learning_rate"] == rates[Cell("sgd", kept)]
        assert point["epochs"] == 8 and point["topology"] == "resnet50"
        values = Schedule.from_dict(json.loads(point["schedule"])).compile(
            steps_per_epoch=4096 / batch
        )
        assert len(values) == 8 * 4096 // batch
        assert values.rate.max() == pytest.approx(point["learning_rate"])
    others = study.optimizers()
    assert {(p["optimizer"], p["learning_rate"]) for p in others} == {
        ("lars", rates["lars", 512]),
        ("lamb", rates["lamb", 512]),
    }


def test_the_whole_study_is_said_to_cost_at_most_three_core_hours(tuned, caplog, monkeypatch):
    study, seconds = tuned
    for stage in ("ladder", "optimizers", "collapse"):
        seconds += sum(map(study.seconds_of, getattr(study, stage)()))
    assert 2.5 < seconds / 3600 < 3
    monkeypatch.setattr(RecipeStudy, "run", lambda *_, **__: False)
    with caplog.at_level(logging.INFO, "chexlib"):
        assert not study.run_stages(["collapse"])
    assert "stage collapse: 6 trainings to go, about 0.32 core-hours" in caplog.text


@pytest.mark.parametrize("batch", BATCHES)
def test_only_the_last_rung_and_the_cycles_have_a_weight_decay_and_one_that_can_act(batch):
    sums = {}
    for rung in (*RUNGS, CYCLES):
        values = schedule_of(rung, 0.3, batch=batch).compile(steps_per_epoch=4096 / batch)
        sums[rung] = float(values.rate @ values.weight_decay)
    acting = {rung: total for rung, total in sums.items() if total}
    assert acting == pytest.approx({"+ weight decay": 0.8, CYCLES: 0.8})


def test_scores_have_a_column_a_rung_and_one_for_each_other_optimizer(tuned):
    study, _ = tuned
    answer(study, [*study.ladder(), *study.optimizers()])
    table = study.scores()
    assert list(table[128]) == list(RUNGS) and list(table[512]) == [*RUNGS, "lars", "lamb"]
    assert len(table) == 6 and table.notna().all(axis=None)
    assert study.baseline() == 0.8
    assert table[512]["lars"].iloc[5] - table[512]["lars"].iloc[0] == pytest.approx(0.005)


def test_a_collapse_is_judged_against_one_more_epoch_of_the_same_training():
    """By hand: the training gains 0.05 an epoch by itself, and so does the first collapse; the
    second gains 0.01 more.
    """
    rows = pd.DataFrame(
        {
            "seed": [0, 1],
            "before_1": [0.60, 0.70],
            "after_1": [0.65, 0.75],
            "before_2": [0.65, 0.75],
            "after_2": [0.71, 0.81],
            "before_3": [0.70, 0.80],
        }
    )
    table = collapse_gains(rows).set_index(["epoch", "seed"])
    assert table.loc[1, "gain_later"].tolist() == pytest.approx([0, 0])
    assert table.loc[1, "collapse"].tolist() == pytest.approx([0.05, 0.05])
    assert table.loc[2, "gain_later"].tolist() == pytest.approx([0.01, 0.01])
    assert table.loc[2, "later"].tolist() == pytest.approx([0.05, 0.05])


def run_cells(cells, space):
    for cell in cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []):
                space |= {"data_dir": space["phantom"], "run_dir": space["folder"]}
    return space


@pytest.mark.parametrize("baseline", [0.8, 0.95])
def test_the_notebook_shows_the_answer_of_the_rows_that_there_are(
    tuned, baseline, phantom, tmp_path, monkeypatch, capsys
):
    study, _ = tuned
    answer(study, [*study.ladder(), *study.optimizers(), *study.collapse()])
    monkeypatch.setattr(recipes, "ROWS", study.table)
    monkeypatch.setattr(RecipeStudy, "baseline", lambda self: baseline)
    cells = nbformat.read(NOTEBOOK, 4).cells
    answering = takewhile(lambda cell: not cell.source.startswith("## A schedule"), cells)
    (record,) = (cell for cell in cells if cell.source.startswith("def of_batch"))
    space = {"phantom": str(phantom), "folder": str(tmp_path)}
    space = run_cells([*answering, record], space)
    assert (tmp_path / "figures" / "ladder.png").exists()
    told = {name: verdict.word for name, verdict in space["verdicts"].items()}
    assert len(space["looks"]) == 3 + 4 + 4 + 1 + 2 + 3
    if baseline > 0.9:  # the network has not passed the gate
        assert told == {} and "no result" in capsys.readouterr().out
        return
    assert told["batch 512: + weight decay"] == "supported"
    assert told["batch 512: + polynomial decay"] == "equivalent"
    assert told["collapse over one more epoch"] == "equivalent"
    assert told["mean of all collapses over the best"] == "supported"

    table = study.scores()
    _, rungs = space["by_batch"][128]
    assert list(rungs.index) == ["step decay", *list(RUNGS)[2:-1], "+ weight-decay scaling"]
    gains = table[128, "+ weight decay"] - table[128, "+ polynomial decay"]
    assert rungs.loc["+ weight-decay scaling", "gain"] == pytest.approx(gains.mean())
    (lost,) = (row for row in space["losses"] if (row["batch"], row["rung"]) == (128, "+ warm-up"))
    assert lost["updates"] == 32
    expected = percent_lost(table[32, "+ warm-up"], table[128, "+ warm-up"])
    assert lost["loss"] == pytest.approx(expected["loss"])
    assert space["by_epoch"][1]["gain_later"] == pytest.approx(0, abs=1e-9)
    assert space["together"][0] == pytest.approx({"gain": 0.02, "member": 0.88})


CYCLE = {
    "unit": "epochs",
    "phases": [{"kind": "constant", "length": 3, "rate": 0.1, "weight_decay": 0.01}],
}
TRAINING = {"optimizer": "sgd", "schedule": CYCLE, "epochs": 3, "keep_checkpoints": 0}


def test_collapses_and_their_ensembles_are_measured(phantom, tmp_path, monkeypatch):
    with_a_tiny_network(monkeypatch)
    config = config_for(phantom, tmp_path, norm_momentum=0.99, **TRAINING)
    row = measure_collapses(config, reuse=Reuse(accumulates=True))
    names = {"before_1", "before_2", "before_3", "after_1", "after_2"}
    assert {name for name in row if name[-1].isdigit()} == names
    assert all(0 <= row[name] <= 1 for name in (*names, "ensemble", "greedy", "member"))
    assert set(row["chosen"].split(",")) <= {"1", "2"} and not row["diverged"]
    assert len(collapse_gains(pd.DataFrame([{**row, "seed": 0}]))) == 2


def test_a_collapse_starts_from_the_weights_of_the_snapshot_and_ends_at_a_rate_of_0(
    phantom, tmp_path, monkeypatch
):
    with_a_tiny_network(monkeypatch)
    config = config_for(phantom, tmp_path, snapshots=True, **TRAINING)
    learn(config)
    start = snapshots_of(tmp_path).iloc[1]
    collapse = collapse_of(config, start)
    values = Schedule.from_dict(collapse.schedule).compile(steps_per_epoch=10)
    np.testing.assert_allclose(values.rate, 0.1 * (1 - np.arange(10) / 10) ** 2)
    assert set(values.weight_decay) == {0.02} and not values.augment.any()
    # Nothing moves that one could see.
    phase = {**collapse.schedule["phases"][0], "rate": 1e-30}
    still = collapse.replace(
        schedule={"unit": "epochs", "phases": [phase]}, norm_momentum=1 - 1e-9, epochs=1
    )
    ended = learn(still).model.get_weights()
    for ours, theirs in zip(ended, load_model(start["path"])[0].get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
