"""Figures of the batch-norm study.

As in `chexlib.figures.plots`, each function returns a closed matplotlib Figure.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.plots import HATCHES, LINES, MARKERS, SMALL


def norm_report(report) -> Figure:
    """Of a `chexlib.studies.judge.NormReport`: AUROC by statistics, drift and disagreement by
    depth.
    """
    fig, (area, drift) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[1, 2])
    scores = report.scores[::-1]
    area.barh(scores.index, scores["auroc"], color=["C2", "C1", "C0"], height=0.6)
    for y, value in enumerate(scores["auroc"]):
        area.text(0.02, y, f"{value:.3f}", va="center", color="white", **SMALL)
    area.axvline(0.5, color="0.2", linestyle=":")
    area.set(xlim=(0.0, 1.0), xlabel="mean AUROC, by statistics (dotted: chance)")
    depth = np.arange(1, len(report.layers) + 1)
    named = {
        "drift_mean": "drift of the mean (SD)",
        "drift_variance": "drift of the variance (|ln|)",
    }
    named["disagreement"] = "disagreement of batches (SD)"
    for i, (column, label) in enumerate(named.items()):
        drift.plot(
            depth,
            report.layers[column],
            LINES[i],
            marker=MARKERS[i],
            markersize=3,
            lw=1,
            label=label,
        )
    drift.set(
        xlabel="batch-norm layer, from input to output", ylabel="mean over channels", yscale="log"
    )
    drift.legend(**SMALL)
    plt.close(fig)
    return fig


def by_setting(
    table: pd.DataFrame, x: str, *, line: str, label: str, judged: str, panel: str | None = None
) -> Figure:
    """Mean AUROC with its interval against a setting on a logarithmic axis, from `over_seeds`.

    Parameters
    ----------
    x, line, panel : columns of the table: of the axis, of one line each, of one panel each
    label : what the axis says
    judged : by which statistics of batch norm
    """
    panels = dict(tuple(table.groupby(panel, sort=False))) if panel else {"": table}
    fig, axs = plt.subplots(
        1, len(panels), figsize=(4.8 * len(panels), 3.4), sharey=True, squeeze=False
    )
    for ax, (title, own) in zip(axs[0], panels.items(), strict=True):
        for i, (name, rows) in enumerate(own.groupby(line, sort=False)):
            rows = rows.sort_values(x)
            half = rows["high"] - rows["mean"]  # NaN of one seed: no bar is drawn
            style = {
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": LINES[i % len(LINES)],
                "capsize": 3,
            }
            ax.errorbar(rows[x], rows["mean"], yerr=half, label=str(name), **style)
        ax.axhline(0.5, color="0.4", linestyle=":", label="chance")
        ax.set(xscale="log", xlabel=label, title=title)
        ax.set_xticks(sorted(own[x].unique()), [f"{value:g}" for value in sorted(own[x].unique())])
        ax.minorticks_off()
    axs[0, 0].set(ylabel=f"mean test AUROC,\nby {judged} statistics")
    axs[0, -1].legend(**SMALL)
    plt.close(fig)
    return fig


def decomposition(table: pd.DataFrame) -> Figure:
    """What each cause costs in AUROC, a bar a topology, from `over_seeds` of the terms of
    `decompose`.
    """
    terms, topologies = list(dict.fromkeys(table["value"])), list(dict.fromkeys(table["topology"]))
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.28 * len(table)))
    height = 0.8 / len(topologies)
    for i, topology in enumerate(topologies):
        rows = table[table["topology"] == topology].set_index("value").loc[terms]
        y = np.arange(len(terms))[::-1] + (len(topologies) / 2 - i - 0.5) * height
        half = rows["high"] - rows["mean"]
        style = {"hatch": HATCHES[i % len(HATCHES)], "color": f"C{i}", "edgecolor": "white"}
        ax.barh(y, rows["mean"], height, xerr=half, capsize=3, label=topology, **style)
    ax.axvline(0, color="0.2", lw=1)
    ax.set(
        yticks=np.arange(len(terms))[::-1],
        yticklabels=terms,
        xlabel="AUROC lost from the smallest to the largest batch",
    )
    ax.legend(**SMALL)
    plt.close(fig)
    return fig
