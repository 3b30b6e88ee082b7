"""Time to solution: a training, timed until it is as good as was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit
from chexlib.training.input import divide

RATES = {"vgg16": 1e-4}  # Adam's; a VGG does not start at CheXNet's 1e-3


def measure_solution(point: Mapping, folder: Path, *, data: Path) -> dict:
    """Train as one point of a grid says, for `chexlib.studies.grid.run_grid`: `time_to`, and the
    day of it.

    Parameters
    ----------
    point : with topology, size, most_epochs, seed and auroc, the mean validation AUROC that counts
        as the solution
    folder : of checkpoints: a killed training goes on from them
    data : folder in the NIH layout
    """
    config = TrainConfig(
        data_dir=str(data),
        run_dir=str(folder),
        topology=point["topology"],
        size=point["size"],
        epochs=point["most_epochs"],
        seed=point["seed"],
        learning_rate=RATES.get(point["topology"], 1e-3),
        resume=True,
    )
    images = len(divide(config)[1]["train"])
    found = time_to(fit(config).history, images=images, auroc=point["auroc"])
    return {**found, "measured": f"{datetime.now(UTC):%Y-%m-%d}"}


def time_to(history: Sequence[dict], *, images: int, auroc: float) -> dict:
    """Epochs and seconds of training after which validation first reached an AUROC, or None; and
    images of an epoch.

    Parameters
    ----------
    history : of `TrainResult`, a row an epoch, with val_auroc and images_per_second
    images : of an epoch
    """
    seconds = 0.0
    for epoch, row in enumerate(history, start=1):
        seconds += images / row["images_per_second"]
        if row["val_auroc"] >= auroc:
            return {"epochs": epoch, "seconds": seconds, "images": images}
    return {"epochs": None, "seconds": None, "images": images}
