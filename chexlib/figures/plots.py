"""Figures of the notebooks.

Each function draws what it is given and returns a closed matplotlib Figure, so that a cell that
ends with it shows it once. Findings are sorted horizontal bars; no reading depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chexlib.findings import FINDINGS

NAMES = tuple(finding.replace("_", " ") for finding in FINDINGS)  # as written on axes
HATCHES = ("", "///", "...", "xxx")  # of bars side by side
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")
SMALL = {"fontsize": "small"}


def set_theme() -> None:
    """Set seaborn's colour-blind palette, cividis for sequences, and sizes that read well in a
    notebook.
    """
    rc = {
        "image.cmap": "cividis",
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "hatch.linewidth": 0.6,
    }
    sns.set_theme(
        context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85, rc=rc
    )


def finding_counts(labels_by_source: Mapping[str, pd.DataFrame | np.ndarray]) -> Figure:
    """Percentage of images with each finding, a bar per source with its count beside it.

    Parameters
    ----------
    labels_by_source : dict
        Of name to (n, 14) labels, 0 or 1, or a table with the columns of FINDINGS. The first source
        gives the order.
    """
    sources = {name: _matrix(labels) for name, labels in labels_by_source.items()}
    order = np.argsort(next(iter(sources.values())).sum(axis=0), kind="stable")
    counts = {
        f"{name} ({len(labels):,} images)": labels.sum(axis=0)[order]
        for name, labels in sources.items()
    }
    fig, ax = plt.subplots(figsize=(8, 3 + 1.6 * len(sources)))
    _bars(ax, counts, np.array(NAMES)[order], totals=[len(labels) for labels in sources.values()])
    ax.set(xlabel="images with the finding (%), and their number")
    return _done(fig)


def cooccurrence(labels: pd.DataFrame | np.ndarray) -> Figure:
    """Of the images with the finding of the row, the percentage that also have the finding of the
    column.
    """
    labels = _matrix(labels)
    counts = labels.sum(axis=0)
    with np.errstate(invalid="ignore"):
        shares = 100 * (labels.T @ labels) / counts[:, None]
    rows = [f"{name} ({n:,.0f})" for name, n in zip(NAMES, counts, strict=True)]
    style = {
        "annot": True,
        "fmt": ".0f",
        "annot_kws": {"size": "small"},
        "cmap": "cividis",
        "linewidths": 0.5,
    }
    bar = {"label": "images of the row's finding that also show the column's (%)"}
    fig, ax = plt.subplots(figsize=(9.5, 7.5))
    hidden = np.eye(len(FINDINGS), dtype=bool)
    sns.heatmap(
        pd.DataFrame(shares, rows, NAMES),
        ax=ax,
        mask=hidden,
        vmin=0,
        square=True,
        cbar_kws=bar,
        **style,
    )
    ax.set(ylabel="finding (images)", xlabel="also shown")
    ax.grid(visible=False)
    return _done(fig)


def images_per_patient(patients: Sequence[int] | pd.Series) -> Figure:
    """Patients with 1, 2, 3 to 4, 5 to 8, ... images, and all images that are theirs; `patients`
    (n,) says whose.
    """
    per_patient = pd.Series(np.asarray(patients)).value_counts().to_numpy()
    place = np.ceil(np.log2(per_patient)).astype(int)
    people, images = np.bincount(place), np.bincount(place, weights=per_patient)
    names = ["1", "2", *(f"{2 ** (k - 1) + 1} to {2**k}" for k in range(2, len(people)))][
        : len(people)
    ]
    counts = {
        f"patients ({people.sum():,})": people[::-1],
        f"images ({images.sum():,.0f})": images[::-1],
    }
    fig, ax = plt.subplots(figsize=(8, 1.5 + 0.5 * len(names)))
    _bars(ax, counts, names[::-1], totals=[people.sum(), images.sum()])
    ax.set(xlabel="share (%), and number", ylabel="images of one patient")
    return _done(fig)


def ages(table: pd.DataFrame) -> Figure:
    """Age distribution (percentage of images per 10 years), a panel per view position, a line per
    sex.
    """
    edges = np.arange(0, np.nan_to_num(table["age"].max()) + 20, 10)
    views = list(table["view"].value_counts().index)
    fig, axs = plt.subplots(
        1, len(views), figsize=(4.6 * len(views), 3.6), sharey=True, squeeze=False
    )
    for ax, view in zip(axs[0], views, strict=True):
        for i, (sex, rows) in enumerate(
            table[table["view"] == view].dropna(subset="age").groupby("sex")
        ):
            share = 100 * np.histogram(rows["age"], edges)[0] / len(rows)
            label = f"{sex or 'unknown'} ({len(rows):,}, median {rows['age'].median():.0f} years)"
            ax.stairs(share, edges, label=label, linestyle=LINES[i % 4], linewidth=2, color=f"C{i}")
        ax.set(title=f"{view or 'unknown'} view", xlabel="age (years)", ylim=(0, None))
        ax.legend(loc="upper left", fontsize="small", title="sex (images)", title_fontsize="small")
    axs[0, 0].set(ylabel="images per 10 years of age (%)", ylim=(0, 1.4 * axs[0, 0].get_ylim()[1]))
    return _done(fig)


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
    """
    columns = max(1, min(columns, len(images)))
    rows, side = max(1, -(-len(images) // columns)), 10 / max(columns, 2.5)
    fig, axs = plt.subplots(
        rows, columns, figsize=(side * columns, (side + 0.4) * rows), squeeze=False
    )
    for ax in axs.flat:
        ax.axis("off")
    for i, (ax, image, title) in enumerate(zip(axs.flat, images, titles, strict=False)):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])  # hidden already, but they would still be laid out
        ax.set_title(title, **SMALL)
        for box in boxes[i].itertuples() if boxes is not None else ():
            _box(ax, box, *image.shape[1::-1])
    return _done(fig)


def prevalence_by_part(audit) -> Figure:
    """Percentage of each part's images with each finding, and the positives; from a
    `chexlib.data.splits.Audit`.
    """
    order = audit.prevalence.mean(axis=1).sort_values(kind="stable").index
    shares, counts = 100 * audit.prevalence.loc[order], audit.positives.loc[order]
    y = np.arange(len(order))
    fig, ax = plt.subplots(figsize=(8.5, 5))
    ax.hlines(y, shares.min(axis=1), shares.max(axis=1), color="0.75", zorder=1)
    for part, marker in zip(shares, MARKERS, strict=False):
        label = f"{part} ({audit.images[part]:,} images, {audit.patients[part]:,} patients)"
        ax.plot(shares[part], y, marker, label=label, markersize=7, alpha=0.85)
    ax.set(
        yticks=y,
        yticklabels=[f.replace("_", " ") for f in order],
        xlabel="images of the part with the finding (%)",
    )
    right = ax.secondary_yaxis("right")
    right.set_yticks(y, [" / ".join(f"{n:,.0f}" for n in row) for row in counts.to_numpy()])
    right.set_ylabel(f"positive images: {' / '.join(counts)}")
    right.tick_params(length=0)
    ax.legend(loc="lower right", **SMALL)
    return _done(fig)


def imbalance(labels: pd.DataFrame | np.ndarray) -> Figure:
    """Negatives for each positive image, per finding, on a logarithmic axis; 1 would be balanced."""
    labels = _matrix(labels)
    positives = labels.sum(axis=0)
    with np.errstate(divide="ignore"):
        ratio = (len(labels) - positives) / positives
    order, y = np.argsort(-ratio, kind="stable"), np.arange(len(FINDINGS))
    ratio, positives = ratio[order], positives[order]
    drawn = np.where(np.isfinite(ratio) & (ratio > 0), ratio, np.nan)
    fig, ax = plt.subplots(figsize=(8, 4.6))
    ax.hlines(y, np.fmin(drawn, 1), np.fmax(drawn, 1), color="C0", linewidth=2)
    ax.plot(drawn, y, "o", color="C0")
    for row, (r, n) in enumerate(zip(ratio, positives, strict=True)):
        text = f"{r:,.{0 if r >= 10 else 1}f} : 1" if n else "no positives"
        at = (np.nan_to_num(drawn[row], nan=1.0), row)
        ax.annotate(text, at, xytext=(8, 0), textcoords="offset points", va="center", **SMALL)
    ax.set(xscale="log", xlim=(np.nanmin([0.9, *drawn / 1.5]), 4 * np.nanmax([2.5, *drawn])))
    names = [f"{NAMES[i]} ({n:,.0f})" for i, n in zip(order, positives, strict=True)]
    ax.set(
        yticks=y,
        yticklabels=names,
        ylabel="finding (positives)",
        xlabel="negatives per positive (log scale)",
    )
    ax.grid(axis="y", visible=False)
    return _done(fig)


def history(rows: Iterable[Mapping] | pd.DataFrame) -> Figure:
    """Loss and mean validation AUROC after each epoch, from rows with loss, val_loss and val_auroc."""
    rows = pd.DataFrame(rows)
    epochs = rows["epoch"] + 1 if "epoch" in rows else pd.Series(np.arange(len(rows)) + 1)
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.2))
    for i, (column, label) in enumerate({"loss": "training", "val_loss": "validation"}.items()):
        axs[0].plot(
            epochs, rows[column].astype(float), MARKERS[i] + LINES[i], label=label, markersize=4
        )
    axs[0].set(xlabel="epochs done", ylabel="binary cross-entropy")
    area = rows["val_auroc"].astype(float)
    axs[1].plot(epochs, area, "o-", markersize=4, color="C2")
    if area.notna().any():
        epoch, best = epochs[area.idxmax()], area.max()
        axs[1].plot(
            epoch,
            best,
            "*",
            markersize=13,
            color="C2",
            label=f"best: {best:.3f}, epoch {epoch:.0f}",
        )
    axs[1].axhline(0.5, color="0.4", linestyle=":", label="chance")
    axs[1].set(xlabel="epochs done", ylabel="mean AUROC, validation")
    for ax in axs:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return _done(fig)


def auroc_bars(
    table: pd.DataFrame, *, title: str = "", published: Mapping[str, Mapping] | None = None
) -> Figure:
    """AUROC of each finding, sorted, with its interval; the mean on top, undefined findings named
    at the bottom.

    Parameters
    ----------
    table : DataFrame
        As `chexlib.evaluation.auroc.bootstrap_auroc` returns it.
    published : dict of source to {finding: AUROC}, optional
        Drawn as open markers, for orientation.
    """
    findings = table.drop(index="mean", errors="ignore").sort_values(
        "auroc", na_position="first", kind="stable"
    )
    rows = pd.concat([findings, table.loc[table.index == "mean"]])
    y, defined = np.arange(len(rows)), rows["auroc"].notna().to_numpy()
    whiskers = np.abs(rows[["low", "high"]].to_numpy().T - rows["auroc"].to_numpy())
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)))
    ax.axvline(0.5, color="0.4", linestyle=":")
    ax.text(0.5, -0.75, "chance ", ha="right", va="center", fontsize="small", color="0.3")
    for which, marker in ((rows.index != "mean", "o"), (rows.index == "mean", "D")):
        keep = which & defined
        ax.errorbar(
            rows["auroc"][keep],
            y[keep],
            xerr=whiskers[:, keep],
            fmt=marker,
            capsize=3,
            markersize=7,
        )
    for i, (source, values) in enumerate((published or {}).items()):
        at = [values.get(finding, np.nan) for finding in rows.index]
        ax.plot(at, y, MARKERS[1 + i % 5], label=source, color=f"C{i + 2}", markerfacecolor="none")
    for row in y[~defined]:
        ax.text(
            0.51,
            row,
            f"undefined ({rows['positives'].iloc[row]:,.0f} positives)",
            va="center",
            **SMALL,
        )
    numbers = [
        f"{name.replace('_', ' ')} ({n:,.0f}{' labels' * (name == 'mean')})"
        for name, n in rows["positives"].items()
    ]
    ax.set(yticks=y, yticklabels=numbers, ylabel="finding (positives)", xlabel="AUROC", title=title)
    ax.set(
        xlim=(max(0, np.nanmin([0.45, rows[["auroc", "low"]].min().min() - 0.03])), 1.01),
        ylim=(-1.1, len(rows) - 0.4),
    )
    if published:
        ax.legend(loc="lower right", **SMALL)
    return _done(fig)


def _matrix(labels: pd.DataFrame | np.ndarray) -> np.ndarray:
    return np.asarray(
        labels[list(FINDINGS)] if isinstance(labels, pd.DataFrame) else labels, np.float64
    )


def _bars(
    ax: Axes, counts: Mapping[str, np.ndarray], names: Sequence[str], *, totals: Sequence[float]
) -> None:
    """Groups of horizontal bars in % of `totals`, the first series on top of its group, counts
    beside the bars.
    """
    height, y = 0.8 / len(counts), np.arange(len(names))
    for i, ((label, values), total) in enumerate(zip(counts.items(), totals, strict=True)):
        at, style = (
            y + 0.4 - (i + 0.5) * height,
            {"hatch": HATCHES[i % 4], "edgecolor": "white", "label": label},
        )
        drawn = ax.barh(at, 100 * values / max(total, 1), height, **style)
        ax.bar_label(drawn, [f"{n:,.0f}" for n in values], padding=3, **SMALL)
    ax.set(yticks=y, yticklabels=names)
    ax.margins(x=0.1, y=0.01)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="best")


def _box(ax: Axes, box, width: int, height: int) -> None:
    x, y = box.x * width - 0.5, box.y * height - 0.5
    ax.add_patch(
        Rectangle(
            (x, y), box.width * width, box.height * height, fill=False, color="C1", linewidth=1.5
        )
    )
    right = box.x > 0.6  # the name grows towards the middle, and downwards at the upper edge
    style = {"facecolor": "black", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    where = {
        "ha": "right" if right else "left",
        "va": "bottom" if box.y > 0.08 else "top",
        "bbox": style,
    }
    name = box.finding.replace("_", " ")
    ax.text(
        x + right * box.width * width,
        y,
        name,
        color="white",
        fontsize="x-small",
        clip_on=True,
        **where,
    )


def _done(fig: Figure) -> Figure:
    plt.close(fig)  # the notebook shows what a cell returns; an open figure would be shown again
    return fig
