"""Figures of judgement: values with their intervals, and how far scores are probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from chexlib.figures.plots import LINES, MARKERS, SMALL


def forest(
    table: pd.DataFrame,
    value: str,
    *,
    xlabel: str,
    line: float,
    title: str = "",
    filled: pd.Series | None = None,
) -> Figure:
    """A row a value, with its interval; where there is none, the row says so.

    Findings, which have a mean, are sorted.

    Parameters
    ----------
    table : DataFrame
        Its index has the names of the rows; columns `value`, low and high.
    line : float
        Where nothing is to be seen: 0 of differences, 0.5 of AUROC.
    filled : Series of bool, optional
        Indexed as the table: whose marker is filled, as what is claimed; all if not given.
    """
    if "mean" in table.index:
        table = pd.concat(
            [table.loc[["mean"]], table.drop(index="mean").sort_values(value, ascending=False)]
        )
    y, at = np.arange(len(table)), table[value].to_numpy(float)
    known = table[["low", "high"]].notna().all(axis=1).to_numpy() & ~np.isnan(at)
    filled = np.ones(len(table), bool) if filled is None else filled[table.index].to_numpy(bool)
    fig, ax = plt.subplots(figsize=(8, 1.1 + 0.3 * len(table)))
    ax.axvline(line, color="0.4", linestyle=":")
    ax.hlines(y[known], table["low"][known], table["high"][known], color="C0")
    for which, face in ((known & filled, "C0"), (known & ~filled, "white")):
        ax.plot(at[which], y[which], "o", color="C0", markerfacecolor=face, markersize=7)
    for row in y[~known]:
        point = "" if np.isnan(at[row]) else f"{at[row]:.3f}, "
        ax.text(line, row, f" {point}too small to speak", va="center", color="0.3", **SMALL)
    ax.set(
        yticks=y,
        yticklabels=[str(name).replace("_", " ") for name in table.index],
        xlabel=xlabel,
        title=title,
    )
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.margins(x=0.08)
    plt.close(fig)
    return fig


def reliability(curves: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """Share of positives against mean score, on logarithmic axes: most scores are small.

    Parameters
    ----------
    curves : dict of name to table
        As `chexlib.evaluation.calibration.reliability_curve` returns it.
    """
    fig, ax = plt.subplots(figsize=(6, 5))
    drawn = [
        c
        for c in pd.concat([t[["predicted", "observed"]] for t in curves.values()])
        .to_numpy()
        .ravel()
        if c > 0
    ]
    least = min([*drawn, 0.1]) / 2
    ax.plot([least, 1], [least, 1], color="0.4", linestyle=":", label="predicted as observed")
    for i, (name, table) in enumerate(curves.items()):
        style = {"marker": MARKERS[i], "linestyle": LINES[i % len(LINES)], "alpha": 0.85}
        ax.plot(table["predicted"].clip(least), table["observed"].clip(least), label=name, **style)
    ax.set(xscale="log", yscale="log", xlim=(least, 1.1), ylim=(least * 0.9, 1.1), title=title)
    ax.set(
        xlabel="mean score of the bin (log scale)",
        ylabel="share of positives in the bin (log scale)",
    )
    ax.legend(loc="upper left", **SMALL)
    plt.close(fig)
    return fig
