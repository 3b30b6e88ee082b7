"""Figures of scaling: layouts, parts of a step, network, projections."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from chexlib.figures.style import LINES, MARKERS, SMALL, bar_style, log_ticks, spaced, subplots

PARTS = ("compute", "skew", "input_wait", "allreduce", "copy", "rest")  # of a step, from `observe`


def layouts(table: pd.DataFrame) -> Figure:
    """Images/s by ranks and threads of each, from `tune`; layouts of more threads than processors
    are empty.
    """
    cells = table.pivot_table(index="ranks", columns="threads", values="images_per_second")
    fig, ax = subplots(figsize=(2.5 + len(cells.columns), 1.4 + 0.6 * len(cells)))
    bar = {"label": "images/s"}
    sns.heatmap(cells, ax=ax, annot=True, fmt=".1f", cmap="cividis", cbar_kws=bar, linewidths=0.5)
    ax.set(xlabel="threads of each rank", ylabel="ranks")
    return fig


def step_parts(observed: pd.DataFrame) -> Figure:
    """Milliseconds of a step by what they go to, a bar a row of `observe`; the index names the
    bars.
    """
    fig, ax = subplots(figsize=(8.5, 1.2 + 0.5 * len(observed)))
    rows = observed[::-1]
    left = np.zeros(len(rows))
    for i, part in enumerate(PARTS):
        width = 1000 * rows[part].clip(lower=0).to_numpy()
        ax.barh(rows.index, width, left=left, label=spaced(part), height=0.6, **bar_style(i))
        left = left + width
    ax.set(xlabel="milliseconds of a step")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(PARTS), **SMALL)
    return fig


def wires(predicted: pd.DataFrame) -> Figure:
    """Predicted against measured seconds of a step, from `fit_wires`, with bands of 10 and 25 %."""
    fig, ax = subplots(figsize=(5.6, 4.6))
    ends = np.array([predicted["seconds"].min() / 1.4, predicted["seconds"].max() * 1.4])
    for share, grey in ((0.25, "0.92"), (0.1, "0.82")):
        low, high = ends * (1 - share), ends * (1 + share)
        ax.fill_between(ends, low, high, color=grey, label=f"within {share:.0%}")
    for fitted, color, fill in ((False, "C0", "full"), (True, "C1", "none")):
        how = "fitted" if fitted else "predicted"
        by_topology = predicted[predicted["fitted"] == fitted].groupby("topology")
        for marker, (topology, rows) in zip(MARKERS, by_topology, strict=False):
            style = {"color": color, "marker": marker, "linestyle": "", "fillstyle": fill}
            ax.plot(rows["seconds"], rows["predicted"], label=f"{topology}, {how}", **style)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set(xlabel="measured (s a step)", ylabel="model (s a step)")
    ax.legend(**SMALL)
    return fig


def projection(tables: Mapping[str, pd.DataFrame], published: pd.DataFrame) -> Figure:
    """Efficiency against nodes, a line a system, from `project`; published points beside it.

    Parameters
    ----------
    published : DataFrame
        system, nodes, efficiency (share, not percent), how; what is "at least" so much has an arrow
        upwards.
    """
    fig, ax = subplots(figsize=(7.5, 3.8))
    for i, (name, table) in enumerate(tables.items()):
        color, efficiency = f"C{i}", 100 * table["efficiency"]
        ax.plot(table.index, efficiency, LINES[i] + color, marker=".", label=f"model, {name}")
        points = published[published["system"] == name]
        y = 100 * points["efficiency"]
        edge = {"markersize": 9, "markeredgecolor": "0.1"}
        ax.plot(points["nodes"], y, MARKERS[i] + color, label=f"published, {name}", **edge)
        bounds = points["how"].str.startswith("at least")
        for end in zip(points["nodes"][bounds], y[bounds], strict=True):
            arrow = {"arrowstyle": "->", "color": color}
            ax.annotate("", (end[0], end[1] + 13), end, arrowprops=arrow)
    log_ticks(ax, sorted({n for table in tables.values() for n in table.index}))
    ax.set(xlabel="nodes", ylabel="efficiency (%)", ylim=(0, 105))
    ax.legend(loc="lower left", **SMALL)
    return fig


def time_and_cost(table: pd.DataFrame) -> Figure:
    """Hours to the solution and core-hours against nodes, from `project`."""
    fig, (hours, cost) = subplots(1, 2, figsize=(9, 3.2))
    hours.plot(table.index, table["solution_hours"], "o-", color="C0")
    hours.set(yscale="log", ylabel="hours to the end")
    cost.plot(table.index, table["core_hours"], "o-", color="C1")
    cost.set(ylabel="core-hours", ylim=(0, 1.1 * table["core_hours"].max()))
    for ax in (hours, cost):
        ax.set_xlabel("nodes")
        log_ticks(ax, list(table.index))
    return fig
