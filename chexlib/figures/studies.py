"""Figures of the studies: batch norm, large-batch recipes, transfer learning."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.judgement import forest
from chexlib.figures.style import (
    LINE_STYLES,
    REFERENCE,
    SMALL,
    log_ticks,
    subplots,
    whiskers,
)


def along(table: pd.DataFrame, scratch: float) -> Figure:
    """Test AUROC after fine-tuning, over where in the pre-training it began; a line a rate and
    warm-up.

    `scratch` is that of the same training from random weights.
    """
    fig, ax = subplots(figsize=(8, 3.8))
    table.plot(ax=ax, style=LINE_STYLES)
    ax.axhline(scratch, label="from random weights, the default rate, warm-up", **REFERENCE)
    ax.set_xlabel("images seen in pre-training when the snapshot was taken")
    ax.set_ylabel("mean test AUROC, fine-tuned")
    ax.legend(**SMALL)
    return fig


def rules(effects: pd.DataFrame) -> Figure:
    """What following each rule gains, with its interval over seeds."""
    rows = effects.set_axis(effects["rule"] + ": " + effects["verdict"])
    return forest(
        rows, "effect", xlabel="gain in mean test AUROC", line=0, missing="no interval of one seed"
    )


def updates(table: pd.DataFrame) -> Figure:
    """Test AUROC over updates per epoch, the batch beside each point, with the interval of what it
    lost to the first.
    """
    fig, ax = subplots(figsize=(7, 3.4))
    edges = whiskers(table, "effect")
    ax.errorbar(table["updates"], table["auroc"], yerr=edges, fmt="o-", capsize=3)
    below = {"xytext": (7, -12), "textcoords": "offset points", **SMALL}
    for batch, row in table.iterrows():
        ax.annotate(f"{batch:,}", (row["updates"], row["auroc"]), **below)
    ax.set_xlabel("updates per epoch (beside each point the global batch)")
    ax.set_ylabel("mean test AUROC")
    log_ticks(ax, table["updates"])
    return fig
