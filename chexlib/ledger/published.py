"""Published figures to set beside ours, each once, with its source and setting: `published.csv`.

Wang 2017, Yao 2017 and CheXNet as printed in table 2 of Rajpurkar et al. 2017 (arXiv:1711.05225);
jrzech from reproduce-chexnet's `aucs.csv`; Dell from the README of ai-radiologist-GPU (DenseNet).
All else is of the 2018 deck.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from chexlib.evaluation.auroc import split_in_words
from chexlib.findings import FINDINGS

RELEASE = 112_120  # images of the NIH release


@dataclass(frozen=True)
class Claim:
    """One published figure: a row of `published.csv`."""

    key: str  # its name, such as "auroc/CheXNet/Mass"
    topic: str
    series: str  # whose it is or of what: a paper, a cluster, a run, top-1 or top-5
    item: str  # a finding, a rung of the ladder, a topology, before or after a collapse
    at: int  # images per update, number of nodes, or point of the training; 0 where there is none
    what: str
    bound: str  # ">" or "<" where the source gives a bound
    value: float
    unit: str
    setting: str  # what it holds for: the split, or system, batch and the like
    split: str  # of an AUROC: official, patient, leaks or not printed
    source: str
    kind: str  # by which rule a notebook answers it, see `counterparts`; "" where none can
    reason: str  # why none can


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Every published figure, once, in the order of the ledger."""
    with Path(__file__).with_name("published.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figures = []
    for row in rows:
        numbers = {"value": json.loads(row["value"]), "at": int(row["at"] or 0)}
        figures.append(Claim(**{**row, **numbers}))
    return tuple(figures)


def _table(figures: list[Claim], index: str, columns: str) -> pd.DataFrame:
    """Their values by two of their fields, rows and columns in the order of the ledger."""
    table = pd.DataFrame(figures)
    values = table.pivot_table("value", index, columns).rename_axis(columns=None)
    return values.loc[table[index].unique(), table[columns].unique()]


def published_auroc() -> pd.DataFrame:
    """AUROC per finding, a column a source (those of `published_splits`), and the row "mean"."""
    figures = [claim for claim in claims() if claim.topic == "auroc"]
    table = _table(figures, "item", "series").rename_axis(index="finding")
    table.loc["mean"] = table.mean()
    return table


def published_splits() -> dict[str, str]:
    """The split of each source of AUROCs, in words."""
    return {claim.series: claim.setting for claim in claims() if claim.topic == "auroc"}


def published_ladder() -> dict[str, float]:
    """ResNet-50 on ImageNet-1K: top-1 in % by rung of the study's ladder of recipes.

    "step decay" is the deck's "default augmentation".
    """
    return {claim.item: claim.value for claim in claims() if claim.topic == "ladder"}


def published_collapses() -> pd.DataFrame:
    """Top-1 in % before and after a collapse, from six points of the study's training, and the
    gain.
    """
    kinds = ("before collapse", "after collapse")
    table = _table([claim for claim in claims() if claim.kind in kinds], "at", "item")
    gain = (table["after"] - table["before"]).round(2)
    return table.rename_axis(index="point").assign(gain=gain)


def published_batches() -> pd.DataFrame:
    """Top-1 in % by images per update ("8K" to "64K"), a row a source."""
    figures = [claim for claim in claims() if claim.topic == "large batches" and claim.at]
    table = _table(figures, "series", "at").rename_axis(index=None)
    return table.rename(columns=lambda batch: f"{batch // 1024}K")


def beside_published(judged: Mapping[str, Mapping]) -> pd.DataFrame:
    """AUROCs of ours beside the published ones, each column with its source and its split; a
    leaking one is marked.

    Parameters
    ----------
    judged : dict of name to metrics
        Each with auroc (finding to row) and split, as in a `metrics.json`.
    """
    columns = {}
    for name, metrics in judged.items():
        aurocs = {finding: row["auroc"] for finding, row in metrics["auroc"].items()}
        columns[name, split_in_words(metrics["split"])] = aurocs
    leaking = {claim.series for claim in claims() if claim.split == "leaks"}
    splits = published_splits()
    for source, aurocs in published_auroc().items():
        mark = " (LEAKS)" if source in leaking else ""
        columns[f"{source}{mark}", splits[source]] = aurocs
    index = pd.Index([*FINDINGS, "mean"], name="finding")
    table = pd.DataFrame(columns, index=index, dtype=float)
    return table.rename_axis(columns=["source", "split"])
