"""Radiographs in a grid, with boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from chexlib.figures.style import SMALL, draw_boxes, image_grid


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
