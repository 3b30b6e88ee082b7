"""Figures of trainings: live progress and histories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.style import LINES, REFERENCE, SMALL, subplots


def history(rows: Iterable[Mapping] | pd.DataFrame) -> Figure:
    """Loss and mean validation AUROC after each epoch, from rows with epoch, loss, val_loss and
    val_auroc.
    """
    rows = pd.DataFrame(rows).astype({"loss": float, "val_loss": float, "val_auroc": float})
    epochs, area = rows["epoch"] + 1, rows["val_auroc"]
    fig, (losses, areas) = subplots(1, 2, figsize=(9, 3.2))
    losses.plot(epochs, rows["loss"], "o-", label="training", markersize=4)
    losses.plot(epochs, rows["val_loss"], "s--", label="validation", markersize=4)
    losses.set(xlabel="epochs done", ylabel="binary cross-entropy")
    areas.plot(epochs, area, "o-", markersize=4, color="C2")
    if area.notna().any():
        epoch, best = epochs[area.idxmax()], area.max()
        label = f"best: {best:.3f}, epoch {epoch:.0f}"
        areas.plot(epoch, best, "*", markersize=13, color="C2", label=label)
    areas.axhline(0.5, label="chance", **REFERENCE)
    areas.set(xlabel="epochs done", ylabel="mean AUROC, validation")
    for ax in (losses, areas):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return fig


def progress(points: Sequence[Mapping]) -> Figure:
    """Live progress of a training: loss, AUROC, images/s and the compute of each rank, side by side.

    Parameters
    ----------
    points : sequence of dict
        The reports of `fit`, each with `epoch` as a fraction, step_loss, images_per_second, busy
        and history.
    """
    # Not pyplot's: this is drawn from a thread.
    fig = Figure(figsize=(12, 2.6), layout="constrained")
    axs = loss, area, speed, ranks = fig.subplots(1, 4)
    steps, epochs = pd.DataFrame(list(points)), pd.DataFrame(points[-1]["history"])
    epochs = epochs.reindex(columns=["epoch", "val_loss", "val_auroc"])
    at, ends = steps["epoch"], epochs["epoch"] + 1
    loss.plot(at, steps["step_loss"], lw=1, alpha=0.6, label="step")
    loss.plot(ends, epochs["val_loss"], "o--", label="validation")
    loss.legend(**SMALL)
    area.plot(ends, epochs["val_auroc"], "o-")
    if epochs.empty:
        area.set_ylim(0.4, 1)
    speed.plot(at, steps["images_per_second"])
    speed.set_ylim(bottom=0)
    busy = np.array(list(steps["busy"]))
    for rank, seconds in enumerate(busy.T):
        ranks.plot(at, 1e3 * seconds, LINES[rank % len(LINES)], lw=1, label=f"rank {rank}")
    ranks.set_ylim(bottom=0)
    if busy.shape[1] <= 8:
        ranks.legend(**SMALL)
    titles = ("loss", "validation AUROC, mean", "images/s", "compute of a step (ms)")
    for ax, title in zip(axs, titles, strict=True):
        ax.set_title(title, **SMALL)
        ax.set(xlim=(0, np.nanmax([at.iloc[-1], ends.max()]) * 1.02), xlabel="epoch")
        ax.tick_params(labelsize="small")
    return fig
