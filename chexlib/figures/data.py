"""Figures of the data: radiographs, findings, patients, parts of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chexlib.figures.style import (
    HATCHES,
    LINES,
    MARKERS,
    NAMES,
    SMALL,
    draw_boxes,
    image_grid,
    spaced,
    subplots,
)
from chexlib.findings import FINDINGS


def finding_counts(labels_by_source: Mapping[str, pd.DataFrame | np.ndarray]) -> Figure:
    """Percentage of images with each finding, a bar per source with its count beside it.

    Parameters
    ----------
    labels_by_source : dict
        Of name to (n, 14) labels, 0 or 1, or a table with the columns of FINDINGS. The first source
        gives the order.
    """
    sources = {name: _matrix(labels) for name, labels in labels_by_source.items()}
    first = next(iter(sources.values()))
    order = np.argsort(first.sum(axis=0), kind="stable")
    counts = {}
    for name, labels in sources.items():
        counts[f"{name} ({len(labels):,} images)"] = labels.sum(axis=0)[order]
    fig, ax = subplots(figsize=(8, 3 + 1.6 * len(sources)))
    _bars(ax, counts, np.array(NAMES)[order], totals=list(map(len, sources.values())))
    ax.set(xlabel="images with the finding (%), and their number")
    return fig


def cooccurrence(labels: pd.DataFrame | np.ndarray) -> Figure:
    """Of the images with the finding of the row, the percentage that also have the finding of the
    column.
    """
    labels = _matrix(labels)
    counts = labels.sum(axis=0)
    with np.errstate(invalid="ignore"):
        shares = 100 * (labels.T @ labels) / counts[:, None]
    rows = [f"{name} ({n:,.0f})" for name, n in zip(NAMES, counts, strict=True)]
    fig, ax = subplots(figsize=(9.5, 7.5))
    sns.heatmap(
        pd.DataFrame(shares, rows, NAMES),
        ax=ax,
        mask=np.eye(len(FINDINGS), dtype=bool),
        vmin=0,
        square=True,
        annot=True,
        fmt=".0f",
        annot_kws={"size": "small"},
        cmap="cividis",
        linewidths=0.5,
        cbar_kws={"label": "images of the row's finding that also show the column's (%)"},
    )
    ax.set(ylabel="finding (images)", xlabel="also shown")
    ax.grid(visible=False)
    return fig


def images_per_patient(patients: Sequence[int] | pd.Series) -> Figure:
    """Patients with 1, 2, 3 to 4, 5 to 8, ... images, and the sum of their images.

    Parameters
    ----------
    patients : (n,) int
        Patient of each image.
    """
    per_patient = pd.Series(np.asarray(patients)).value_counts().to_numpy()
    bins = np.ceil(np.log2(per_patient)).astype(int)
    people, images = np.bincount(bins), np.bincount(bins, weights=per_patient)
    wider = [f"{2 ** (k - 1) + 1} to {2**k}" for k in range(2, len(people))]
    names = ["1", "2", *wider][: len(people)]
    counts = {
        f"patients ({people.sum():,})": people[::-1],
        f"images ({images.sum():,.0f})": images[::-1],
    }
    fig, ax = subplots(figsize=(8, 1.5 + 0.5 * len(names)))
    _bars(ax, counts, names[::-1], totals=[people.sum(), images.sum()])
    ax.set(xlabel="share (%), and number", ylabel="images of one patient")
    return fig


def ages(table: pd.DataFrame) -> Figure:
    """Age distribution (percentage of images per 10 years), a panel per view position, a line per
    sex.
    """
    edges = np.arange(0, np.nan_to_num(table["age"].max()) + 20, 10)
    views = list(table["view"].value_counts().index)
    size = (4.6 * len(views), 3.6)
    fig, axs = subplots(1, len(views), figsize=size, sharey=True, squeeze=False)
    for ax, view in zip(axs[0], views, strict=True):
        by_sex = table[table["view"] == view].dropna(subset="age").groupby("sex")
        for i, (sex, rows) in enumerate(by_sex):
            share = 100 * np.histogram(rows["age"], edges)[0] / len(rows)
            label = f"{sex or 'unknown'} ({len(rows):,}, median {rows['age'].median():.0f} years)"
            ax.stairs(share, edges, label=label, linestyle=LINES[i % 4], linewidth=2, color=f"C{i}")
        ax.set(title=f"{view or 'unknown'} view", xlabel="age (years)", ylim=(0, None))
        if len(by_sex):
            ax.legend(loc="upper left", title="sex (images)", title_fontsize="small", **SMALL)
    highest = axs[0, 0].get_ylim()[1]
    axs[0, 0].set(ylabel="images per 10 years of age (%)", ylim=(0, 1.4 * highest))
    return fig


def radiographs(
    images: Sequence[np.ndarray], titles: Sequence[str], *, boxes=None, columns: int = 4
) -> Figure:
    """Grey images in a grid, black 0 and white 255, with boxes and their findings' names drawn on
    them.

    Parameters
    ----------
    images : sequence of (h, w) uint8
    titles : sequence of str
    boxes : sequence of DataFrame, optional
        For each image, rows of finding, x, y (upper left), width, height in fractions of the side.
    columns : int
        Images side by side, at most.
    """
    fig, axs = image_grid(len(images), columns)
    for i, (ax, image, title) in enumerate(zip(axs, images, titles, strict=False)):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_title(title, **SMALL)
        if boxes is not None:
            draw_boxes(ax, boxes[i], *image.shape[1::-1])
    return fig


def prevalence_by_part(audit) -> Figure:
    """Percentage of each part's images with each finding, and the positives; from a
    `chexlib.data.splits.Audit`.
    """
    order = audit.prevalence.mean(axis=1).sort_values(kind="stable").index
    shares, counts = 100 * audit.prevalence.loc[order], audit.positives.loc[order]
    y = np.arange(len(order))
    fig, ax = subplots(figsize=(8.5, 5))
    ax.hlines(y, shares.min(axis=1), shares.max(axis=1), color="0.75", zorder=1)
    for part, marker in zip(shares, MARKERS, strict=False):
        label = f"{part} ({audit.images[part]:,} images, {audit.patients[part]:,} patients)"
        ax.plot(shares[part], y, marker, label=label, markersize=7, alpha=0.85)
    ax.set_yticks(y, list(map(spaced, order)))
    ax.set_xlabel("images of the part with the finding (%)")
    right = ax.secondary_yaxis("right")
    right.set_yticks(y, [" / ".join(f"{n:,.0f}" for n in row) for row in counts.to_numpy()])
    right.set_ylabel(f"positive images: {' / '.join(counts)}")
    right.tick_params(length=0)
    ax.legend(loc="lower right", **SMALL)
    return fig


def imbalance(labels: pd.DataFrame | np.ndarray) -> Figure:
    """Negatives for each positive image, per finding, on a logarithmic axis; 1 would be balanced."""
    labels = _matrix(labels)
    positives = labels.sum(axis=0)
    with np.errstate(divide="ignore"):
        ratio = (len(labels) - positives) / positives
    order, y = np.argsort(-ratio, kind="stable"), np.arange(len(FINDINGS))
    ratio, positives = ratio[order], positives[order]
    drawn = np.where(np.isfinite(ratio) & (ratio > 0), ratio, np.nan)
    fig, ax = subplots(figsize=(8, 4.6))
    ax.hlines(y, np.fmin(drawn, 1), np.fmax(drawn, 1), color="C0", linewidth=2)
    ax.plot(drawn, y, "o", color="C0")
    beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", **SMALL}
    for row, (negatives, count) in enumerate(zip(ratio, positives, strict=True)):
        digits = 0 if negatives >= 10 else 1
        text = f"{negatives:,.{digits}f} : 1" if count else "no positives"
        ax.annotate(text, (np.nan_to_num(drawn[row], nan=1.0), row), **beside)
    least, most = np.nanmin([0.9, *drawn / 1.5]), np.nanmax([2.5, *drawn])
    ax.set(xscale="log", xlim=(least, 4 * most), xlabel="negatives per positive (log scale)")
    ax.set_yticks(y, [f"{NAMES[i]} ({n:,.0f})" for i, n in zip(order, positives, strict=True)])
    ax.set_ylabel("finding (positives)")
    ax.grid(axis="y", visible=False)
    return fig


def _matrix(labels: pd.DataFrame | np.ndarray) -> np.ndarray:
    if isinstance(labels, pd.DataFrame):
        labels = labels[list(FINDINGS)]
    return np.asarray(labels, np.float64)


def _bars(
    ax: Axes, counts: Mapping[str, np.ndarray], names: Sequence[str], *, totals: Sequence[float]
) -> None:
    """Groups of horizontal bars in % of `totals`, the first series on top of its group, counts
    beside the bars.
    """
    height, y = 0.8 / len(counts), np.arange(len(names))
    for i, ((label, values), total) in enumerate(zip(counts.items(), totals, strict=True)):
        at, shares = y + 0.4 - (i + 0.5) * height, 100 * values / max(total, 1)
        style = {"hatch": HATCHES[i % 4], "edgecolor": "white", "label": label}
        drawn = ax.barh(at, shares, height, **style)
        ax.bar_label(drawn, [f"{n:,.0f}" for n in values], padding=3, **SMALL)
    ax.set(yticks=y, yticklabels=names)
    ax.margins(x=0.1, y=0.01)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="best")
