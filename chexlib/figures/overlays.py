"""Heat maps drawn over radiographs so that both can be read, and how often they point into a box."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from chexlib.figures.plots import SMALL, _box

SIDE = 512  # px: more is not seen in a panel


def heat_figure(
    images: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    boxes=None,
) -> Figure:
    """Radiographs in grey, with lines around what is hotter than 60 and 180 of 255, and a light
    tint inside.

    Parameters
    ----------
    images : sequence of (h, w) uint8
    maps : sequence of (s, s) float in 0..1, stretched over the images
    titles : sequence of str
    boxes : sequence of DataFrame, optional
        For each image, rows of finding, x, y (upper left), width, height in fractions of the side.
    """
    columns = max(1, min(4, len(images)))
    rows, side = -(-len(images) // columns), 10 / max(columns, 2.5)
    fig, axs = plt.subplots(
        rows,
        columns,
        figsize=(side * columns, (side + 0.4) * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axs.flat:
        ax.axis("off")
    for i, (ax, image, heat, title) in enumerate(zip(axs.flat, images, maps, titles, strict=False)):
        small = Image.fromarray(image)
        small.thumbnail((SIDE, SIDE))
        width, height = small.size
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        ax.imshow(small, cmap="gray", vmin=0, vmax=255)
        ax.imshow(
            heat,
            cmap="cividis",
            vmin=0,
            vmax=1,
            alpha=0.35 * heat,
            extent=extent,
            interpolation="bilinear",
        )
        if heat.max() > 60 / 255:
            lines = {
                "levels": [60 / 255, 180 / 255],
                "linewidths": [0.8, 1.6],
                "linestyles": ["dashed", "solid"],
            }
            ax.contour(heat, colors="gold", extent=extent, origin="upper", **lines)
        ax.set_title(title, **SMALL)
        for box in boxes[i].itertuples() if boxes is not None else ():
            _box(ax, box, width, height)
    plt.close(fig)
    return fig


def pointing_bars(judged: pd.DataFrame) -> Figure:
    """Share of cases whose hottest place lies in the box, with intervals, and what a blind guess
    would hit.

    Parameters
    ----------
    judged : DataFrame
        As `chexlib.evaluation.explain.judge_boxes` returns it.
    """
    rows = judged[judged["measure"] == "pointing"].set_index("finding")
    rows = pd.concat(
        [rows.drop(index="all").sort_values("share", kind="stable"), rows.loc[["all"]]]
    )
    y = np.arange(len(rows))
    whiskers = np.abs(rows[["low", "high"]].to_numpy().T - rows["share"].to_numpy())
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    ax.errorbar(
        rows["share"],
        y,
        xerr=whiskers,
        fmt="o",
        capsize=3,
        markersize=7,
        label="heat map, 95 % interval",
    )
    ax.plot(
        rows["chance"],
        y,
        "|",
        color="C1",
        markersize=12,
        markeredgewidth=2,
        label="blind guess: area of the boxes",
    )
    names = [f"{name.replace('_', ' ')} ({n})" for name, n in rows["cases"].items()]
    ax.set(yticks=y, yticklabels=names, ylabel="finding (cases)", xlim=(-0.02, 1.02))
    ax.set(xlabel="hottest place lies in the box (share of cases)")
    # Beside no point, wherever the points are.
    fig.legend(loc="outside upper right", ncols=2, **SMALL)
    plt.close(fig)
    return fig
