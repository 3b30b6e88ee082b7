"""Figures of judgement: scores with their intervals, heat maps."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from chexlib.data.pictures import read_picture
from chexlib.errors import ConfigError, DataError, first_line
from chexlib.evaluation.explain import heat_maps
from chexlib.evaluation.operating import read_by_card
from chexlib.figures.style import (
    REFERENCE,
    SMALL,
    draw_boxes,
    draw_intervals,
    image_grid,
    spaced,
    subplots,
)
from chexlib.files import atomic_write
from chexlib.findings import FINDINGS

log = logging.getLogger(__name__)
SIDE = 512  # px: more is not seen in a panel
LEVELS = (60 / 255, 180 / 255)  # at which Wang et al. 2017, section 4.2, cut maps of 0..255
LONGEST = 240  # bytes of a file name, of 255, so that an ending fits too


def auroc_bars(table: pd.DataFrame, *, title: str = "") -> Figure:
    """AUROC of each finding, sorted, with its interval; the mean on top, undefined findings named
    at the bottom.

    Parameters
    ----------
    table : DataFrame
        As `chexlib.evaluation.auroc.bootstrap_auroc` returns it.
    """
    findings = table.drop(index="mean", errors="ignore")
    findings = findings.sort_values("auroc", na_position="first", kind="stable")
    rows = pd.concat([findings, table.loc[table.index == "mean"]])
    y, is_mean = np.arange(len(rows)), rows.index == "mean"
    fig, ax = subplots(figsize=(8, 1.2 + 0.3 * len(rows)))
    ax.axvline(0.5, **REFERENCE)
    ax.text(0.5, -0.75, "chance ", ha="right", va="center", color="0.3", **SMALL)
    for shown, marker in ((~is_mean, "o"), (is_mean, "D")):
        draw_intervals(ax, rows[shown], y[shown], "auroc", marker=marker, markersize=7)
    labels = []
    for row, (name, n) in enumerate(rows["positives"].items()):
        labels.append(f"mean ({n:,.0f} labels)" if name == "mean" else f"{spaced(name)} ({n:,.0f})")
        if np.isnan(rows["auroc"].iloc[row]):
            ax.text(0.51, row, f"undefined ({n:,.0f} positives)", va="center", **SMALL)
    least = np.nanmin([0.45, rows[["auroc", "low"]].min().min() - 0.03])
    ax.set(yticks=y, yticklabels=labels, ylabel="finding (positives)", xlabel="AUROC", title=title)
    ax.set(xlim=(max(0, least), 1.01), ylim=(-1.1, len(rows) - 0.4))
    return fig


def forest(
    table: pd.DataFrame,
    value: str,
    *,
    xlabel: str,
    line: float,
    missing: str = "too small to speak",
    filled: pd.Series | None = None,
) -> Figure:
    """Forest plot: a row a value, with its interval; where there is none, the row says so.

    Findings, which have a mean, are sorted.

    Parameters
    ----------
    table : DataFrame
        Its index has the names of the rows; columns `value`, low and high.
    line : float
        Where nothing is to be seen: 0 of differences, 0.5 of AUROC.
    missing : str
        Why a row has no interval.
    filled : Series of bool, optional
        Indexed as the table: whose marker is filled, as what is claimed; all if not given.
    """
    if "mean" in table.index:
        findings = table.drop(index="mean").sort_values(value, ascending=False)
        table = pd.concat([table.loc[["mean"]], findings])
    y, at = np.arange(len(table)), table[value].to_numpy(float)
    drawn = table[[value, "low", "high"]].notna().all(axis=1).to_numpy()
    filled = drawn if filled is None else drawn & filled[table.index].to_numpy(bool)
    fig, ax = subplots(figsize=(8, 1.1 + 0.3 * len(table)))
    ax.axvline(line, **REFERENCE)
    ax.hlines(y[drawn], table["low"][drawn], table["high"][drawn], color="C0")
    ax.plot(at[filled], y[filled], "o", color="C0", markersize=7)
    hollow = drawn & ~filled
    ax.plot(at[hollow], y[hollow], "o", color="C0", markerfacecolor="white", markersize=7)
    for row in y[~drawn]:
        point = "" if np.isnan(at[row]) else f"{at[row]:.3f}, "
        ax.text(line, row, f" {point}{missing}", va="center", color="0.3", **SMALL)
    ax.set(yticks=y, yticklabels=list(map(spaced, table.index)), xlabel=xlabel)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.margins(x=0.08)
    return fig


def heat_figure(
    images: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    boxes=None,
) -> Figure:
    """Heat maps over radiographs in grey: lines around what is hotter than a quarter and than 0.7
    of the hottest place, and a light tint inside.

    Parameters
    ----------
    images : sequence of (h, w) uint8
    maps : sequence of (s, s) float in 0..1, stretched over the images
    titles : sequence of str
    boxes : sequence of DataFrame, optional
        For each image, rows of finding, x, y (upper left), width, height in fractions of the side.
    """
    fig, axs = image_grid(len(images))
    lines = {"colors": "gold", "linestyles": ["dashed", "solid"], "linewidths": [1, 2]}
    # Dark on both sides, so that they are seen on white bone and on black air.
    halo = [withStroke(linewidth=3.5, foreground="black", alpha=0.7)]
    tint = {"cmap": "inferno", "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    for i, (ax, image, heat, title) in enumerate(zip(axs, images, maps, titles, strict=False)):
        small = Image.fromarray(image)
        small.thumbnail((SIDE, SIDE))
        width, height = small.size
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        ax.imshow(small, cmap="gray", vmin=0, vmax=255)
        ax.imshow(heat, alpha=0.35 * heat, extent=extent, **tint)
        if heat.max() > LEVELS[0]:
            drawn = ax.contour(heat, LEVELS, extent=extent, origin="upper", **lines)
            drawn.set_path_effects(halo)
        ax.set_title(title, **SMALL)
        if boxes is not None:
            draw_boxes(ax, boxes[i], width, height)
    keys = [
        Line2D([], [], color="gold", linestyle=style, linewidth=width, path_effects=halo)
        for style, width in zip(lines["linestyles"], lines["linewidths"], strict=True)
    ]
    names = [f"at least {level:.2f} of the hottest place" for level in LEVELS]
    if boxes is not None:
        keys.append(Line2D([], [], color="C1", linewidth=1.5))
        names.append("box that was drawn for the finding")
    fig.legend(keys, names, loc="outside lower center", ncols=len(keys), **SMALL)
    return fig


class HeatMapFiles:
    """Writes `<image>.png` to a folder, the findings with the highest probabilities; for
    `predict_all(each=...)`.

    Parameters
    ----------
    folder : path
    count : int
        Findings an image.
    card : dict, optional
        Of the weights: where it calibrates a finding, the title has the calibrated probability, and
        says so.

    Raises
    ------
    ConfigError
        Nothing can be written to the folder.
    """

    def __init__(self, folder: str | Path, *, count: int = 3, card: Mapping | None = None):
        self.folder, self.count, self.written = Path(folder), count, []
        self.card = card or {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            raise ConfigError(
                f"{folder!s:.300} cannot hold heat maps ({first_line(error)}). Name another folder."
            ) from error

    def __call__(self, model, paths: Sequence[str], pixels: np.ndarray, scores: np.ndarray) -> None:
        table = pd.DataFrame(scores, columns=list(FINDINGS))
        scores = read_by_card(table, self.card)[0].to_numpy()
        top = np.argsort(-scores, axis=1, kind="stable")[:, : self.count]
        findings = [FINDINGS[i] for i in top.ravel()]
        maps = heat_maps(model, np.repeat(pixels, top.shape[1], axis=0), findings)
        maps = maps.reshape(*top.shape, *pixels.shape[1:3])
        for path, row, order, heat in zip(paths, scores, top, maps, strict=True):
            titles = [self._title(FINDINGS[i], row[i]) for i in order]
            try:
                image = read_picture(path)[0]
            except DataError as error:  # it has gone since it was scored
                log.warning("no heat map: %s", error)
                continue
            stem = os.fsdecode(os.fsencode(Path(path).stem)[:LONGEST])
            name, number = f"{stem}.png", 2
            while name in self.written:  # of another folder
                name, number = f"{stem}-{number}.png", number + 1
            with atomic_write(self.folder / name) as file:
                heat_figure([image] * len(heat), heat, titles).savefig(file, format="png", dpi=100)
            self.written.append(name)

    def _title(self, finding: str, score: float) -> str:
        # An isotonic calibration does not have curves of every finding.
        curves = (self.card.get("calibration") or {}).get("curves", ())
        calibrated = ", calibrated" if finding in curves else ""
        return f"{spaced(finding)} {score:.2f}{calibrated}"
