"""Figures of the large-batch recipes; each function returns a closed matplotlib Figure."""

from __future__ import annotations

import os
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.plots import LINES, MARKERS, SMALL
from chexlib.machine import BATCH


def schedule(values, *, steps_per_epoch: float = 1.0, title: str = "") -> Figure:
    """Rate, momentum and weight decay of every step of a `chexlib.training.schedules.Values`, its
    phases named.

    Where images are cropped the background is white; where they are not, grey.
    """
    at = np.arange(len(values)) / steps_per_epoch
    fig, axs = plt.subplots(3, 1, figsize=(9, 7), sharex=True, height_ratios=[5, 2, 2])
    panels = {
        "learning rate": values.rate,
        "momentum": values.momentum,
        "weight decay": values.weight_decay,
    }
    starts = np.flatnonzero(np.diff(values.phase, prepend=-1))
    ends = np.append(starts[1:], len(values))
    for ax, (label, column) in zip(axs, panels.items(), strict=True):
        ax.plot(at, column, lw=1.5)
        ax.set(ylabel=label)
        for start, end in zip(starts, ends, strict=True):
            ax.axvline(at[start], color="0.6", linestyle=":", lw=0.8)
            if not values.augment[start]:
                ax.axvspan(at[start], at[end - 1], color="0.9")
    for start in starts:
        text = values.names[values.phase[start]]
        axs[0].text(
            at[start],
            1.01,
            f" {text}",
            transform=axs[0].get_xaxis_transform(),
            rotation=45,
            **SMALL,
        )
    axs[0].set_ylim(bottom=0)
    axs[-1].set(xlabel="epoch" if steps_per_epoch != 1 else "step", ylim=(0, None))
    fig.suptitle(title)
    plt.close(fig)
    return fig


def ladder(gains: pd.DataFrame, published: Mapping[str, float]) -> Figure:
    """What each rung gains over the one before, ours with its interval and the study's, each in its
    own unit.
    """
    fig, (ours, theirs) = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    rows = gains.iloc[:0:-1]
    y = np.arange(len(rows))
    whiskers = np.abs(rows[["low", "high"]].to_numpy().T - rows["gain"].to_numpy())
    ours.errorbar(rows["gain"], y, xerr=whiskers, fmt="o", capsize=3)
    theirs.plot([published.get(rung, np.nan) for rung in rows.index], y, "D", color="C1")
    for ax, label in (
        (ours, "gain in mean test AUROC, ours"),
        (theirs, "gain in ImageNet top-1 (%), the study"),
    ):
        ax.axvline(0, color="0.4", linestyle=":")
        ax.set(xlabel=label, yticks=y, yticklabels=rows.index, ylim=(-0.5, len(rows) - 0.5))
    plt.close(fig)
    return fig


def collapse_curve(gains: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """What a collapse gains from each point of a training: ours in AUROC, the study's in top-1."""
    fig, axs = plt.subplots(1, 2, figsize=(10, 3.4))
    labels = ("mean test AUROC", "ImageNet top-1 (%), the study")
    for ax, table, label in zip(axs, (gains, published), labels, strict=True):
        at = np.arange(1, len(table) + 1)
        ax.vlines(at, table["before"], table["after"], color="0.75")
        for i, column in enumerate(("before", "after")):
            ax.plot(at, table[column], MARKERS[i] + LINES[i], label=f"{column} the collapse")
        if "low" in table:
            edges = np.abs(table[["low", "high"]].to_numpy(float).T - table["gain"].to_numpy(float))
            label_of = "interval of the gain, over seeds" if np.isfinite(edges).any() else None
            ax.errorbar(
                at, table["after"], yerr=edges, fmt="none", ecolor="C1", capsize=3, label=label_of
            )
        ax.set(ylabel=label, xlabel="point of the training", xticks=at)
    axs[0].set_xlabel("epoch from which it collapses")
    axs[0].legend(**SMALL)
    plt.close(fig)
    return fig


def workbench(presets: Mapping, resolve, *, images: int, batch: int, epochs: int):
    """Sliders over `schedule`: a preset, its global batch, epochs and rule, drawn before anything
    is trained.

    Parameters
    ----------
    presets : names
    resolve : callable
        `chexlib.training.recipes.resolve`.
    images : of an epoch
    batch, epochs : where the sliders begin

    Returns
    -------
    ipywidgets.Widget, or what says that there is none, as in a notebook that runs headless nobody
    moves sliders
    """
    import ipywidgets as widgets
    from IPython.display import Markdown, display

    if os.environ.get(BATCH):
        return Markdown("The sliders are not shown headless.")

    def draw(preset, global_batch, epochs, rule, warmup):
        asked = {"preset": preset, "rule": rule, "warmup": warmup}
        made = resolve(asked, images=images, global_batch=global_batch, epochs=epochs)
        display(widgets.HTML("<br>".join(made.notes)))
        display(schedule(made.compile(), steps_per_epoch=-(-images // global_batch), title=preset))

    return widgets.interactive(
        draw,
        preset=list(presets),
        global_batch=widgets.SelectionSlider(
            options=sorted({batch, *(2**i for i in range(3, 13))}), value=batch
        ),
        epochs=widgets.IntSlider(epochs, 1, 90),
        rule=["linear", "sqrt", "none"],
        warmup=["epochs", "batch"],
    )
