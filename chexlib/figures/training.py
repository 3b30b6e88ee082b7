"""Figures of trainings: live progress, histories, schedules of the learning rate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.style import LINES, REFERENCE, SMALL, subplots
from chexlib.machine import BATCH
from chexlib.training.recipes import resolve


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


def pretraining(snapshots: pd.DataFrame) -> Figure:
    """Validation AUROC and learning rate at each snapshot of a pre-training, over images seen."""
    fig, (quality, rate) = subplots(2, 1, figsize=(7, 4), sharex=True, height_ratios=[2, 1])
    quality.plot(snapshots["images"], snapshots["val_auroc"], "o-")
    rate.plot(snapshots["images"], snapshots["learning_rate"], "s-", color="C1")
    quality.set(ylabel="mean validation AUROC")
    rate.set(xlabel="images of the stream, each seen once", ylabel="learning rate", yscale="log")
    return fig


def schedule(values, *, steps_per_epoch: float = 1.0, title: str = "") -> Figure:
    """Learning rate, momentum and weight decay of every step, with the names of the phases.

    Where images are cropped the background is white; where they are not, grey.

    Parameters
    ----------
    values : chexlib.training.schedules.Values
    steps_per_epoch : float
        If not 1, the axis has epochs.
    """
    at = np.arange(len(values)) / steps_per_epoch
    fig, axs = subplots(3, 1, figsize=(9, 7), sharex=True, height_ratios=[5, 2, 2])
    rate, momentum, decay = axs
    rate.plot(at, values.rate, lw=1.5)
    momentum.plot(at, values.momentum, lw=1.5)
    decay.plot(at, values.weight_decay, lw=1.5)
    starts = np.flatnonzero(np.diff(values.phase, prepend=-1))
    ends = np.append(starts[1:], len(values))
    for start, end in zip(starts, ends, strict=True):
        for ax in axs:
            ax.axvline(at[start], color="0.6", linestyle=":", lw=0.8)
            if not values.augment[start]:
                ax.axvspan(at[start], at[end - 1], color="0.9")
        above = {"transform": rate.get_xaxis_transform(), "rotation": 45, **SMALL}
        rate.text(at[start], 1.01, f" {values.names[values.phase[start]]}", **above)
    rate.set(ylabel="learning rate")
    momentum.set(ylabel="momentum")
    unit = "epoch" if steps_per_epoch != 1 else "step"
    decay.set(ylabel="weight decay", xlabel=unit, ylim=(0, None))
    rate.set_ylim(bottom=0)
    fig.suptitle(title)
    return fig


def workbench(presets: Sequence[str], *, images: int, batch: int, epochs: int):
    """Sliders over `schedule`: a preset, its global batch, epochs and rule, drawn before anything
    is trained.

    Parameters
    ----------
    presets : sequence of str
        Names that `chexlib.training.recipes.resolve` takes.
    images : int
        Of an epoch.
    batch, epochs : int
        Where the sliders begin.

    Returns
    -------
    ipywidgets.Widget, or a text where a notebook runs headless and nobody moves sliders
    """
    import ipywidgets as widgets
    from IPython.display import display

    from chexlib.markup import Markdown, escaped

    if os.environ.get(BATCH):
        return Markdown("The sliders are not shown headless.")

    def draw(preset, global_batch, epochs, rule, warmup):
        recipe = {"preset": preset, "rule": rule, "warmup": warmup}
        made = resolve(recipe, images=images, global_batch=global_batch, epochs=epochs)
        display(widgets.HTML("<br>".join(map(escaped, made.notes))))
        display(schedule(made.compile(), steps_per_epoch=-(-images // global_batch), title=preset))

    batches = sorted({batch, *(2**i for i in range(3, 13))})
    return widgets.interactive(
        draw,
        preset=list(presets),
        global_batch=widgets.SelectionSlider(options=batches, value=batch),
        epochs=widgets.IntSlider(epochs, 1, 90),
        rule=["linear", "sqrt", "none"],
        warmup=["epochs", "batch"],
    )
