"""Time to solution, from a training's history."""

from __future__ import annotations

from collections.abc import Sequence


def time_to(history: Sequence[dict], *, images: int, auroc: float) -> dict:
    """Epochs and seconds of training after which validation first reached an AUROC; None if it never did.

    Parameters
    ----------
    history : of `TrainResult`, a row an epoch, with val_auroc and images_per_second
    images : of an epoch
    """
    seconds = 0.0
    for epoch, row in enumerate(history, start=1):
        seconds += images / row["images_per_second"]
        if row["val_auroc"] >= auroc:
            return {"epochs": epoch, "seconds": seconds}
    return {"epochs": None, "seconds": None}
