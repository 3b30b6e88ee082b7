"""Figures of transfer learning.

As in `chexlib.figures.plots`, each function returns a closed matplotlib Figure.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.plots import LINES, MARKERS, SMALL


def pretraining(snapshots: pd.DataFrame) -> Figure:
    """Validation AUROC and rate at each snapshot of a pre-training, over images seen."""
    fig, (quality, rate) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, height_ratios=[2, 1])
    quality.plot(snapshots["images"], snapshots["val_auroc"], "o-")
    rate.plot(snapshots["images"], snapshots["learning_rate"], "s-", color="C1")
    quality.set(ylabel="mean validation AUROC")
    rate.set(xlabel="images of the stream, each seen once", ylabel="learning rate", yscale="log")
    plt.close(fig)
    return fig


def along(table: pd.DataFrame, scratch: float | None = None) -> Figure:
    """Test AUROC after fine-tuning, over where in the pre-training it began; a line a rate and
    warm-up.

    `scratch` is that of the same training from random weights.
    """
    fig, ax = plt.subplots(figsize=(8, 3.8))
    for i, (name, column) in enumerate(table.items()):
        ax.plot(
            table.index, column, LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], label=name
        )
    if scratch is not None:
        ax.axhline(
            scratch,
            color="0.4",
            linestyle=":",
            label="from random weights, the default rate, warm-up",
        )
    ax.set(
        xlabel="images seen in pre-training when the snapshot was taken",
        ylabel="mean test AUROC, fine-tuned",
    )
    ax.legend(**SMALL)
    plt.close(fig)
    return fig


def rules(effects: pd.DataFrame) -> Figure:
    """What following each rule gains, with its interval over seeds."""
    rows = effects.iloc[::-1]
    fig, ax = plt.subplots(figsize=(8, 2.2))
    whiskers = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["effect"].to_numpy(float))
    ax.errorbar(
        rows["effect"].astype(float), np.arange(len(rows)), xerr=whiskers, fmt="o", capsize=3
    )
    ax.axvline(0, color="0.4", linestyle=":")
    labels = rows["rule"] + ": " + rows["verdict"]
    ax.set(
        xlabel="gain in mean test AUROC",
        yticks=range(len(rows)),
        yticklabels=labels,
        ylim=(-0.5, len(rows) - 0.5),
    )
    plt.close(fig)
    return fig


def updates(table: pd.DataFrame) -> Figure:
    """Test AUROC over updates an epoch, the batch beside each point, with the interval of what it
    lost to the first.
    """
    fig, ax = plt.subplots(figsize=(7, 3.4))
    whiskers = np.abs(table[["low", "high"]].to_numpy(float).T - table["effect"].to_numpy(float))
    ax.errorbar(table["updates"], table["auroc"], yerr=whiskers, fmt="o-", capsize=3)
    for batch, row in table.iterrows():
        place = {"xytext": (7, -12), "textcoords": "offset points"}
        ax.annotate(f"{batch:,}", (row["updates"], row["auroc"]), **place, **SMALL)
    ax.set(
        xscale="log",
        xlabel="updates an epoch (beside each point the global batch)",
        ylabel="mean test AUROC",
    )
    ax.set_xticks(table["updates"], [f"{n:g}" for n in table["updates"]])
    ax.minorticks_off()
    plt.close(fig)
    return fig
