"""Published AUROCs to set beside ours. A number is shown with its split, always.

Wang 2017, Yao 2017 and CheXNet as printed in table 2 of Rajpurkar et al. 2017 (arXiv:1711.05225); jrzech from
reproduce-chexnet's `aucs.csv`; Dell from the README of ai-radiologist-GPU (DenseNet).
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from chexlib.evaluation.auroc import split_in_words
from chexlib.findings import FINDINGS

SPLITS = {
    "Wang 2017": "official, by patient",
    "Yao 2017": "random 70/10/20, by patient",
    "CheXNet": "random 70/10/20, by patient",
    "jrzech": "random 70/10/20, by patient",
    "Dell DenseNet": "leaks patients between training and validation: not comparable",
}

_AUROC = {
    "Wang 2017": (0.716, 0.807, 0.784, 0.609, 0.706, 0.671, 0.633, 0.806, 0.708, 0.835, 0.815, 0.769, 0.708, 0.767),
    "Yao 2017": (0.772, 0.904, 0.859, 0.695, 0.792, 0.717, 0.713, 0.841, 0.788, 0.882, 0.829, 0.767, 0.765, 0.914),
    "CheXNet": (
        *(0.8094, 0.9248, 0.8638, 0.7345, 0.8676, 0.7802, 0.7680),
        *(0.8887, 0.7901, 0.8878, 0.9371, 0.8047, 0.8062, 0.9164),
    ),
    "jrzech": (
        *(0.8180, 0.9090, 0.8827, 0.7156, 0.8377, 0.7756, 0.7617),
        *(0.8776, 0.8002, 0.8945, 0.9316, 0.8251, 0.7889, 0.9175),
    ),
    "Dell DenseNet": (
        *(0.8162, 0.8757, 0.8900, 0.6733, 0.8231, 0.7156, 0.8328),
        *(0.6950, 0.7986, 0.8714, 0.8929, 0.7847, 0.7513, 0.8331),
    ),
}


def published_auroc() -> pd.DataFrame:
    """AUROC per finding, one column a source (the keys of `SPLITS`), and their means in the row "mean"."""
    table = pd.DataFrame(_AUROC, index=pd.Index(FINDINGS, name="finding"))
    table.loc["mean"] = table.mean()
    return table


# ResNet-50 on ImageNet-1K, top-1 in %, as printed in the 2018 deck.
LADDER = {
    "step decay": 74.0,  # the deck's "default augmentation"
    "+ warm-up": 75.4,
    "+ polynomial decay": 75.7,
    "+ weight-decay scaling": 76.2,
    "+ collapse": 76.6,
    "+ collapsed ensembles": 77.5,
}
COLLAPSES = ((68.33, 75.50), (71.54, 76.15), (73.28, 76.50), (73.31, 76.57), (73.89, 76.83), (74.49, 76.81))
LARGE_BATCHES = {  # at 8K, 16K, 32K and 64K images an update
    "IBM": (75, None, None, None),
    "Facebook": (76.2, 75.2, 72.4, 66),
    "You et al.": (75.3, 75.3, 74.7, 72),
    "the study": (76.6, 76.3, 75.3, 74),
}


def published_collapses() -> pd.DataFrame:
    """Top-1 in % before and after a collapse, from six points of the study's training, and the gain."""
    table = pd.DataFrame(COLLAPSES, columns=["before", "after"], index=pd.RangeIndex(1, 7, name="point"))
    return table.assign(gain=(table["after"] - table["before"]).round(2))


def published_batches() -> pd.DataFrame:
    """Top-1 in % by images an update, a row a source."""
    return pd.DataFrame(LARGE_BATCHES, index=["8K", "16K", "32K", "64K"]).T


def beside_published(judged: Mapping[str, Mapping]) -> pd.DataFrame:
    """AUROCs of ours beside the published ones, each column with its source and its split; a leaking one is marked.

    Parameters
    ----------
    judged : dict of name to metrics
        Each with auroc (finding to row) and split, as in a `metrics.json`.
    """
    ours = {
        (name, split_in_words(found["split"])): {finding: row["auroc"] for finding, row in found["auroc"].items()}
        for name, found in judged.items()
    }
    theirs = {
        (f"{source} (LEAKS)" if split.startswith("leaks") else source, split): published_auroc()[source]
        for source, split in SPLITS.items()
    }
    table = pd.DataFrame({**ours, **theirs}, index=pd.Index([*FINDINGS, "mean"], name="finding"), dtype=float)
    return table.rename_axis(columns=["source", "split"])
