"""Pictures that explain a mechanism; they show no data."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from chexlib.figures.style import subplots


def ring_allreduce(ranks: int) -> Figure:
    """How many ranks are in the sum of each piece, on each rank, at three moments of a ring
    allreduce.
    """
    rank, piece = np.indices((ranks, ranks))
    moments = {
        "at the start": np.ones((ranks, ranks), int),
        f"added up, after {ranks - 1} rounds": (rank - piece) % ranks + 1,
        f"handed round, after {ranks - 1} more": np.full((ranks, ranks), ranks),
    }
    fig, axs = subplots(1, 3, figsize=(9, 2.8), sharey=True)
    for ax, (title, summed) in zip(axs, moments.items(), strict=True):
        ax.imshow(summed, cmap="Blues", vmin=0, vmax=1.4 * ranks)
        for i, j in np.ndindex(summed.shape):
            complete = summed[i, j] == ranks
            weight = "bold" if complete else "normal"
            ax.text(j, i, summed[i, j], ha="center", va="center", weight=weight)
        ax.set(title=title, xlabel="piece of the vector", xticks=range(ranks), yticks=range(ranks))
        ax.grid(visible=False)
    axs[0].set_ylabel("rank")
    fig.suptitle("Ranks in the sum; in each round every rank passes one piece to the next rank")
    return fig
