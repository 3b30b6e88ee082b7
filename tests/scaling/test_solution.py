"""Time to solution: summed over a history's epochs, and measured through a grid as notebook 08
does.
"""

import functools

import pytest
from small_training import with_a_tiny_network

from chexlib.scaling.tune import measure_solution, time_to
from chexlib.studies.grid import run_grid


def test_seconds_are_summed_up_to_the_first_epoch_that_is_good_enough():
    history = [
        {"val_auroc": a, "images_per_second": s} for a, s in ((0.6, 10), (0.71, 20), (0.69, 5))
    ]
    assert time_to(history, images=100, auroc=0.7) == {
        "epochs": 2,
        "seconds": pytest.approx(15),
        "images": 100,
    }
    assert time_to(history, images=100, auroc=0.8) == {
        "epochs": None,
        "seconds": None,
        "images": 100,
    }


def test_a_grid_of_trainings_gives_epochs_and_seconds(phantom, tmp_path, monkeypatch):
    with_a_tiny_network(monkeypatch)
    points = [
        {"topology": "vgg16", "size": 32, "most_epochs": 2, "seed": 0, "auroc": auroc}
        for auroc in (0.01, 0.999)
    ]
    measure = functools.partial(measure_solution, data=phantom)
    rows = run_grid(points, tmp_path / "grid.parquet", measure)
    assert rows["epochs"].iloc[0] == 1 and rows["seconds"].iloc[0] > 0
    assert rows.loc[1, ["epochs", "seconds"]].isna().all()
