"""Pictures that explain a mechanism; they show no data."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from chexlib.figures.style import SMALL, subplots

BOLD = {"fontweight": "bold", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}


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


def data_parallel_step(ranks: int) -> Figure:
    """One step of data-parallel training: what is each rank's own, and what is equal on all."""
    parts = ("own\nimages", "own loss\n(forward)", "own gradient\n(back)", "mean of all\ngradients")
    parts += ("same update,\nequal weights",)
    fig, ax = subplots(figsize=(9, 0.9 * ranks + 0.6))
    box = {"boxstyle": "round,pad=0.5", "edgecolor": "0.3"}
    arrow = {"arrowstyle": "->", "color": "0.3", "shrinkA": 44, "shrinkB": 44}
    middle = (ranks - 1) / 2
    for rank in range(ranks):
        heights = [rank, rank, rank, middle, rank]
        ax.text(-0.75, rank, f"rank {rank}", ha="center", va="center", weight="bold")
        for at, (text, y) in enumerate(zip(parts, heights, strict=True)):
            common = {"facecolor": "#cfe3f5", "linewidth": 2} if at > 2 else {"facecolor": "white"}
            if at != 3 or rank == 0:
                ax.text(at, y, text, ha="center", va="center", bbox=box | common)
            if at:
                ends = {"xy": (at, y), "xytext": (at - 1, heights[at - 1])}
                ax.annotate("", **ends, arrowprops=arrow)
    ax.set(xlim=(-1.1, len(parts) - 0.4), ylim=(ranks - 0.4, -0.6))
    ax.axis("off")
    fig.suptitle("White: each rank's own. Blue, thick: equal on all ranks after the allreduce")
    return fig


def batch_norm_statistics(ranks: int, images: int = 4) -> Figure:
    """Which images share a mean and a variance, by norm, where each rank has so many images."""
    rank, image = np.indices((ranks, images))
    half = images // 2
    shared = {
        "batch: a rank's images": rank,
        "sync: all images": 0 * rank,
        "ghost: part of a rank's": 2 * rank + image // half,
        "group: each image alone": images * rank + image,
    }
    fig, axs = subplots(1, len(shared), figsize=(10, 0.55 * ranks + 1.3), sharey=True)
    for ax, (title, groups) in zip(axs, shared.items(), strict=True):
        ax.imshow(groups % 3, cmap="Blues", vmin=0, vmax=6)
        for i, j in np.ndindex(groups.shape):
            ax.text(j, i, chr(ord("A") + groups[i, j]), ha="center", va="center")
        ax.set(title=title, xlabel="image", xticks=range(images), yticks=range(ranks))
        ax.grid(visible=False)
    axs[0].set_ylabel("rank")
    fig.suptitle("Images with the same letter are normalised by the same mean and variance")
    return fig


def leaking_split() -> Figure:
    """Seven patients and their images, divided by image and by patient: whoever is in both parts
    has leaked.
    """
    films = (3, 1, 4, 2, 1, 3, 2)
    tested = {  # images of the test part, counted over all patients
        "by image: the test part knows its patients": {1, 4, 6, 9, 13, 15},
        "by patient: nobody is in both parts": {4, 5, 6, 7, 10},
    }
    fig, axs = subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, (title, test) in zip(axs, tested.items(), strict=True):
        for patient, count in enumerate(films):
            first = sum(films[:patient])
            parts = ["test" if i in test else "train" for i in range(first, first + count)]
            for place, part in enumerate(parts):
                style = {"color": "C1", "hatch": "///"} if part == "test" else {"color": "C0"}
                ax.barh(patient, 0.9, left=place, alpha=0.5, edgecolor="black", **style)
                ax.text(place + 0.45, patient, part, ha="center", va="center", **BOLD)
            if len(set(parts)) > 1:
                ax.text(count + 0.05, patient, "in both", va="center", **SMALL)
        ax.set(title=title, xlabel="image of the patient", xlim=(-0.1, 5), ylim=(6.6, -0.6))
        ax.set_xticks(np.arange(4) + 0.45, ["1", "2", "3", "4"])
        ax.grid(visible=False)
    axs[0].set(ylabel="patient", yticks=range(len(films)), yticklabels="ABCDEFG")
    return fig
