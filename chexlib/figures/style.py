"""Style of all figures, and the parts that several of them draw: intervals, ticks, boxes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

LINES = ("-", "--", ":", "-.")
SMALL = {"fontsize": "small"}
REFERENCE = {"color": "0.4", "linestyle": ":"}  # a line to compare with: chance, no difference


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


def spaced(name: object) -> str:
    """A name as it is written on axes: "Pleural_Thickening" as "Pleural Thickening"."""
    return str(name).replace("_", " ")


def subplots(*shape: int, **settings):
    """matplotlib's `subplots`, closed at once: a notebook would show an open figure a second time.

    Titles are names of files and folders: a dollar in them begins no formula.
    """
    fig, axs = plt.subplots(*shape, **settings)
    plt.close(fig)
    for ax in fig.axes:
        ax.title.set_parse_math(False)
    return fig, axs


def draw_intervals(
    ax: Axes, rows: pd.DataFrame, y: np.ndarray, value: str, *, marker: str = "o", **style
) -> None:
    """Points of the column `value` at heights y, with horizontal intervals from low to high."""
    ends = rows[["low", "high"]].to_numpy(float).T
    lengths = np.abs(ends - rows[value].to_numpy(float))
    ax.errorbar(rows[value], y, xerr=lengths, fmt=marker, capsize=3, **style)


def image_grid(count: int, columns: int = 4) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels or a few more, without axes; the panels as (n,) array."""
    columns = max(1, min(columns, count))
    rows, side = max(1, -(-count // columns)), 10 / max(columns, 2.5)
    size = (side * columns, (side + 0.4) * rows)
    fig, axs = subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axs.flat:
        ax.axis("off")
        ax.set(xticks=[], yticks=[])  # hidden already, but they would still be laid out
    return fig, axs.ravel()


def draw_boxes(ax: Axes, boxes: pd.DataFrame, width: int, height: int) -> None:
    """Boxes with their findings' names on an image of width x height px.

    `boxes` has finding, x, y (upper left), width and height in fractions of the side.
    """
    background = {"facecolor": "black", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    text = {"color": "white", "fontsize": "x-small", "clip_on": True, "bbox": background}
    for box in boxes.itertuples():
        x, y = box.x * width - 0.5, box.y * height - 0.5
        box_width = box.width * width
        frame = Rectangle((x, y), box_width, box.height * height, fill=False, color="C1", lw=1.5)
        ax.add_patch(frame)
        # The name grows towards the middle, and downwards at the upper edge.
        vertical = "bottom" if box.y > 0.08 else "top"
        if box.x > 0.6:
            ax.text(x + box_width, y, spaced(box.finding), ha="right", va=vertical, **text)
        else:
            ax.text(x, y, spaced(box.finding), ha="left", va=vertical, **text)
