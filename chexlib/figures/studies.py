"""Figures of the studies: batch norm, large-batch recipes, transfer learning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.judgement import forest
from chexlib.figures.style import (
    LINE_STYLES,
    REFERENCE,
    SMALL,
    draw_intervals,
    line_style,
    log_ticks,
    subplots,
    whiskers,
)


def by_setting(
    table: pd.DataFrame, x: str, *, line: str, label: str, panel: str | None = None
) -> Figure:
    """Mean AUROC by the population's statistics, with its interval, against a setting on a
    logarithmic axis.

    Parameters
    ----------
    table : DataFrame
        As `over_seeds` returns it.
    x, line, panel : str
        Columns of the table: of the axis, of one line each, of one panel each.
    label : str
        Of the axis.
    """
    panels = dict(list(table.groupby(panel, sort=False))) if panel else {"": table}
    size = (4.8 * len(panels), 3.4)
    fig, axs = subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, (title, shown) in zip(axs[0], panels.items(), strict=True):
        for i, (name, rows) in enumerate(shown.groupby(line, sort=False)):
            rows = rows.sort_values(x)
            half = rows["high"] - rows["mean"]  # NaN of one seed: no bar is drawn
            style = {"label": str(name), "capsize": 3, **line_style(i)}
            ax.errorbar(rows[x], rows["mean"], yerr=half, **style)
        ax.axhline(0.5, label="chance", **REFERENCE)
        ax.set(xlabel=label, title=title)
        log_ticks(ax, sorted(shown[x].unique()))
    axs[0, 0].set(ylabel="mean test AUROC,\nby the population's statistics")
    axs[0, -1].legend(**SMALL)
    return fig


def ladder(gains: pd.DataFrame, published: Mapping[str, float]) -> Figure:
    """What each rung gains over the one before: here with its interval, and in the study, each in
    its own unit.
    """
    fig, (here, study) = subplots(1, 2, figsize=(10, 3), sharey=True)
    rows = gains.iloc[:0:-1]
    y = np.arange(len(rows))
    draw_intervals(here, rows, y, "gain")
    study.plot([published.get(rung, np.nan) for rung in rows.index], y, "D", color="C1")
    here.set(xlabel="gain in mean test AUROC, ours")
    study.set(xlabel="gain in ImageNet top-1 (%), the study")
    for ax in (here, study):
        ax.axvline(0, **REFERENCE)
        ax.set(yticks=y, yticklabels=rows.index, ylim=(-0.5, len(rows) - 0.5))
    return fig


def collapse_curve(gains: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """What a collapse gains from each point of a training: here in AUROC, in the study in top-1."""
    fig, axs = subplots(1, 2, figsize=(10, 3.4))
    labels = ("mean test AUROC", "ImageNet top-1 (%), the study")
    for ax, table, label in zip(axs, (gains, published), labels, strict=True):
        at = np.arange(1, len(table) + 1)
        ax.vlines(at, table["before"], table["after"], color="0.75")
        ax.plot(at, table["before"], label="before the collapse", **line_style(0))
        ax.plot(at, table["after"], label="after the collapse", **line_style(1))
        ax.set(ylabel=label, xlabel="point of the training", xticks=at)
    here = axs[0]
    if "low" in gains:
        edges = whiskers(gains, "gain")
        style = {"fmt": "none", "ecolor": "C1", "capsize": 3}
        if np.isfinite(edges).any():
            style["label"] = "interval of the gain, over seeds"
        here.errorbar(np.arange(1, len(gains) + 1), gains["after"], yerr=edges, **style)
    here.set_xlabel("epoch from which it collapses")
    here.legend(**SMALL)
    return fig


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
