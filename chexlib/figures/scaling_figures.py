"""Figures of notebook 08.

As in `chexlib.figures.plots`, each function returns a closed matplotlib Figure.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from chexlib.figures.plots import HATCHES, LINES, MARKERS, SMALL

PARTS = ("compute", "skew", "input_wait", "allreduce", "copy", "rest")  # of a step, from `observe`


def layouts(table: pd.DataFrame) -> Figure:
    """Images/s by ranks and threads of each, from `tune`; layouts of more threads than processors
    are empty.
    """
    cells = table.pivot_table(index="ranks", columns="threads", values="images_per_second")
    fig, ax = plt.subplots(figsize=(2.5 + len(cells.columns), 1.4 + 0.6 * len(cells)))
    sns.heatmap(
        cells,
        ax=ax,
        annot=True,
        fmt=".1f",
        cmap="cividis",
        cbar_kws={"label": "images/s"},
        linewidths=0.5,
    )
    ax.set(xlabel="threads of each rank", ylabel="ranks")
    plt.close(fig)
    return fig


def step_parts(observed: pd.DataFrame) -> Figure:
    """Milliseconds of a step by what they go to, a bar a row of `observe`; the index names the
    bars.
    """
    fig, ax = plt.subplots(figsize=(8.5, 1.2 + 0.5 * len(observed)))
    left = np.zeros(len(observed))
    for i, part in enumerate(PARTS):
        width = 1000 * observed[part].clip(lower=0).to_numpy()
        style = {"color": f"C{i}", "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
        ax.barh(
            observed.index[::-1],
            width[::-1],
            left=left[::-1],
            label=part.replace("_", " "),
            height=0.6,
            **style,
        )
        left += width
    ax.set(xlabel="milliseconds of a step")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(PARTS), **SMALL)
    plt.close(fig)
    return fig


def wires(predicted: pd.DataFrame) -> Figure:
    """Predicted against measured seconds of a step, from `fit_wires`, with bands of 10 and 25 %."""
    fig, ax = plt.subplots(figsize=(5.6, 4.6))
    ends = np.array([predicted["seconds"].min() / 1.4, predicted["seconds"].max() * 1.4])
    for share, grey in ((0.25, "0.92"), (0.1, "0.82")):
        ax.fill_between(
            ends, ends * (1 - share), ends * (1 + share), color=grey, label=f"within {share:.0%}"
        )
    for i, (name, fitted) in enumerate((("predicted", False), ("fitted", True))):
        for j, (topology, rows) in enumerate(
            predicted[predicted["fitted"] == fitted].groupby("topology")
        ):
            style = {
                "color": f"C{i}",
                "marker": MARKERS[j],
                "linestyle": "",
                "fillstyle": "none" if fitted else "full",
            }
            ax.plot(rows["seconds"], rows["predicted"], label=f"{topology}, {name}", **style)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="measured (s a step)",
        ylabel="model (s a step)",
    )
    ax.legend(**SMALL)
    plt.close(fig)
    return fig


def projection(tables: Mapping[str, pd.DataFrame], published: pd.DataFrame) -> Figure:
    """Efficiency against nodes, a line a system, from `project`; published points beside it.

    Parameters
    ----------
    published : DataFrame
        system, nodes, efficiency (share, not percent), how; what is "at least" so much has an arrow
        upwards.
    """
    fig, ax = plt.subplots(figsize=(7.5, 3.8))
    for i, (name, table) in enumerate(tables.items()):
        ax.plot(
            table.index,
            100 * table["efficiency"],
            LINES[i],
            marker=".",
            color=f"C{i}",
            label=f"model, {name}",
        )
        points = published[published["system"] == name]
        style = {
            "marker": MARKERS[i],
            "linestyle": "",
            "color": f"C{i}",
            "markersize": 9,
            "markeredgecolor": "0.1",
        }
        ax.plot(points["nodes"], 100 * points["efficiency"], label=f"published, {name}", **style)
        for _, point in points[points["how"].str.startswith("at least")].iterrows():
            end = (point["nodes"], 100 * point["efficiency"])
            ax.annotate(
                "", (end[0], end[1] + 13), end, arrowprops={"arrowstyle": "->", "color": f"C{i}"}
            )
    ax.set(xscale="log", xlabel="nodes", ylabel="efficiency (%)", ylim=(0, 105))
    ticks = sorted({n for table in tables.values() for n in table.index})
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(loc="lower left", **SMALL)
    plt.close(fig)
    return fig


def time_and_cost(table: pd.DataFrame) -> Figure:
    """Hours to the solution and core-hours against nodes, from `project`."""
    fig, (hours, cost) = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, column, label, color, scale in (
        (hours, "solution_hours", "hours to the end", "C0", "log"),
        (cost, "core_hours", "core-hours", "C1", "linear"),
    ):
        ax.plot(table.index, table[column], marker="o", color=color)
        ax.set(xscale="log", yscale=scale, xlabel="nodes", ylabel=label)
        ax.set_xticks(list(table.index), [str(n) for n in table.index])
        ax.minorticks_off()
    cost.set_ylim(0, 1.1 * table["core_hours"].max())
    plt.close(fig)
    return fig
