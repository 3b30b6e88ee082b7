"""Time to solution: summed over a history's epochs, and measured through a grid as notebook 11
does.
"""

from datetime import UTC, datetime
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from small_training import with_a_tiny_network

from chexlib.app.execute import find_notebooks
from chexlib.studies.grid import run_grid
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.input import divide

POINT = {"topology": "vgg16", "size": 32, "most_epochs": 2, "seed": 0, "learning_rate": 1e-4}


def train_to(**names):
    """The function of notebook 11 that trains to an AUROC."""
    (path,) = find_notebooks(["11"])
    (source,) = (
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if "def train_to(" in cell.source
    )
    names |= {"pd": pd, "datetime": datetime, "UTC": UTC, "TrainConfig": TrainConfig}
    exec(source, {**names, "reference": {}, "solution_topologies": ""}, found := {})
    found["train_to"].__globals__.update(found)
    return found["train_to"]


def test_seconds_are_summed_up_to_the_first_epoch_that_is_good_enough():
    history = [
        {"val_auroc": a, "images_per_second": s} for a, s in ((0.6, 10), (0.71, 20), (0.69, 5))
    ]
    measure = train_to(
        data="data",
        fit=lambda config: SimpleNamespace(history=history),
        divide=lambda config: (None, {"train": range(100)}),
    )
    found = measure({**POINT, "auroc": 0.7}, "folder")
    assert (found["epochs"], found["images"]) == (2, 100)
    assert found["seconds"] == pytest.approx(15)
    found = measure({**POINT, "auroc": 0.8}, "folder")
    assert found["epochs"] is None and found["seconds"] is None


def test_a_grid_of_trainings_gives_epochs_and_seconds(phantom, tmp_path, monkeypatch):
    with_a_tiny_network(monkeypatch)
    points = [{**POINT, "auroc": auroc} for auroc in (0.01, 0.999)]
    measure = train_to(data=phantom, fit=fit, divide=divide)
    rows = run_grid(points, tmp_path / "grid.jsonl", measure)
    assert rows["epochs"].iloc[0] == 1 and rows["seconds"].iloc[0] > 0
    assert rows.loc[1, ["epochs", "seconds"]].isna().all()
