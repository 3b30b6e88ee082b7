"""Curves of a training, drawn while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from chexlib.figures.plots import LINES, SMALL


def strip(points: Sequence[Mapping]) -> Figure:
    """What `fit` has reported so far: loss, AUROC, images/s and the compute of each rank, in a
    strip of four panels.

    Parameters
    ----------
    points : sequence of dict
        The reports, each with `epoch` as a fraction, step_loss, images_per_second, busy and
        history.
    """
    # Not pyplot's: this is drawn from a thread.
    fig = Figure(figsize=(12, 2.6), layout="constrained")
    loss, area, speed, ranks = fig.subplots(1, 4)
    epochs, rows = [p["epoch"] for p in points], points[-1]["history"]
    ends = [row["epoch"] + 1 for row in rows]
    loss.plot(epochs, [p["step_loss"] for p in points], lw=1, alpha=0.6, label="step")
    loss.plot(ends, [row["val_loss"] for row in rows], "o--", label="validation")
    loss.legend(**SMALL)
    area.plot(ends, [row["val_auroc"] for row in rows], "o-")
    if not rows:
        area.set_ylim(0.4, 1)
    speed.plot(epochs, [p["images_per_second"] for p in points])
    speed.set_ylim(bottom=0)
    busy = np.array([p["busy"] for p in points])
    for rank, seconds in enumerate(busy.T):
        ranks.plot(epochs, 1e3 * seconds, LINES[rank % len(LINES)], lw=1, label=f"rank {rank}")
    ranks.set_ylim(bottom=0)
    if busy.shape[1] <= 8:
        ranks.legend(**SMALL)
    titles = ("loss", "validation AUROC, mean", "images/s", "compute of a step (ms)")
    for ax, title in zip((loss, area, speed, ranks), titles, strict=True):
        ax.set_title(title, **SMALL)
        ax.set(xlim=(0, max(ends[-1:] + epochs[-1:]) * 1.02), xlabel="epoch")
        ax.tick_params(labelsize="small")
    return fig
