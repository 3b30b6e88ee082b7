"""Published figures to set beside ours, each once, with its source and setting.

An AUROC has its split, always.

Wang 2017, Yao 2017 and CheXNet as printed in table 2 of Rajpurkar et al. 2017 (arXiv:1711.05225);
jrzech from reproduce-chexnet's `aucs.csv`; Dell from the README of ai-radiologist-GPU (DenseNet).
All else is of the 2018 deck.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    "Wang 2017": (
        0.716,
        0.807,
        0.784,
        0.609,
        0.706,
        0.671,
        0.633,
        0.806,
        0.708,
        0.835,
        0.815,
        0.769,
        0.708,
        0.767,
    ),
    "Yao 2017": (
        0.772,
        0.904,
        0.859,
        0.695,
        0.792,
        0.717,
        0.713,
        0.841,
        0.788,
        0.882,
        0.829,
        0.767,
        0.765,
        0.914,
    ),
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
    """AUROC per finding, one column a source (the keys of `SPLITS`), and their means in the row
    "mean".
    """
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
COLLAPSES = (
    (68.33, 75.50),
    (71.54, 76.15),
    (73.28, 76.50),
    (73.31, 76.57),
    (73.89, 76.83),
    (74.49, 76.81),
)
COLLAPSES_TOP_5 = (
    (88.71, 92.83),
    (90.78, 93.17),
    (91.58, 93.24),
    (91.53, 93.24),
    (91.97, 93.32),
    (92.13, 93.32),
)
SEVENTH_COLLAPSED = (76.70, 93.32)  # top-1 and top-5; from what, is not printed
LARGE_BATCHES = {  # at 8K, 16K, 32K and 64K images an update
    "IBM": (75, None, None, None),
    "Facebook": (76.2, 75.2, 72.4, 66),
    "You et al.": (75.3, 75.3, 74.7, 72),
    "the study": (76.6, 76.3, 75.3, 74),
}


def published_collapses() -> pd.DataFrame:
    """Top-1 in % before and after a collapse, from six points of the study's training, and the
    gain.
    """
    table = pd.DataFrame(
        COLLAPSES, columns=["before", "after"], index=pd.RangeIndex(1, 7, name="point")
    )
    return table.assign(gain=(table["after"] - table["before"]).round(2))


def published_batches() -> pd.DataFrame:
    """Top-1 in % by images an update, a row a source."""
    return pd.DataFrame(LARGE_BATCHES, index=["8K", "16K", "32K", "64K"]).T


def beside_published(judged: Mapping[str, Mapping]) -> pd.DataFrame:
    """AUROCs of ours beside the published ones, each column with its source and its split; a
    leaking one is marked.

    Parameters
    ----------
    judged : dict of name to metrics
        Each with auroc (finding to row) and split, as in a `metrics.json`.
    """
    ours = {
        (name, split_in_words(found["split"])): {
            finding: row["auroc"] for finding, row in found["auroc"].items()
        }
        for name, found in judged.items()
    }
    theirs = {
        (f"{source} (LEAKS)" if split.startswith("leaks") else source, split): published_auroc()[
            source
        ]
        for source, split in SPLITS.items()
    }
    table = pd.DataFrame(
        {**ours, **theirs}, index=pd.Index([*FINDINGS, "mean"], name="finding"), dtype=float
    )
    return table.rename_axis(columns=["source", "split"])


@dataclass(frozen=True)
class Claim:
    """One published figure."""

    key: str  # such as "auroc/CheXNet/Mass": the topic first
    what: str
    value: float
    unit: str
    setting: str  # what it holds for: the split, or system, batch and the like
    source: str = "2018 deck"
    bound: str = ""  # ">" or "<" where the source gives a bound

    @property
    def topic(self) -> str:
        """The first part of the key."""
        return self.key.split("/")[0]


SOURCES = {
    "Wang 2017": "Wang et al. 2017, in CheXNet's table 2",
    "Yao 2017": "Yao et al. 2017, in CheXNet's table 2",
    "CheXNet": "Rajpurkar et al. 2017, table 2",
    "jrzech": "reproduce-chexnet, aucs.csv",
    "Dell DenseNet": "ai-radiologist-GPU, README",
}
IMAGENET = 1_281_167  # training images of ImageNet-1K: what turns a batch into updates an epoch
BATCHES = {"8K": 8192, "16K": 16384, "32K": 32768, "64K": 65536}

_CAFFE, _SKX = "Intel Caffe, ResNet-50, MareNostrum 4", "ResNet-50, SKX 8160"
_TENSORFLOW, _DENSENET = "TensorFlow + Horovod, ResNet-50, Stampede2", "DenseNet-121, ImageNet"
_SCRATCH, _TUNED = "from scratch, ImageNet", "fine-tuning, ChestX-ray14"
_COMMAND, _PRINTED = "printed command of the 256-node run", "printed run settings"
_OTHERS = (  # key, what, value, unit, setting, and ">" or "<" of a bound
    (
        "baseline/pneumonia",
        "AUROC of Pneumonia",
        84,
        "%",
        "single process, batch 8; split not printed",
    ),
    (
        "baseline/emphysema",
        "AUROC of Emphysema",
        89,
        "%",
        "single process, batch 8; split not printed",
    ),
    ("baseline/speed", "speed", 4, "images/s", "single process, batch 8, 2 x Xeon Gold 6148"),
    ("baseline/epoch", "time of an epoch", 5, "h", "single process, batch 8, 2 x Xeon Gold 6148"),
    (
        "large batches/iterations",
        "iterations to converge at 64K",
        2100,
        "iterations",
        "ResNet-50 on ImageNet-1K",
    ),
    ("scale/caffe-256/speed", "speed on 256 nodes", 15170, "images/s", f"{_CAFFE}, batch 8192"),
    ("scale/caffe-256/efficiency", "efficiency on 256 nodes", 90, "%", f"{_CAFFE}, batch 8192"),
    ("scale/caffe-256/time", "time to solution on 256 nodes", 70, "min", f"{_CAFFE}, batch 8192"),
    ("scale/caffe-256/top-1", "top-1 on 256 nodes", 74, "%", f"{_CAFFE}, batch 8192", ">"),
    ("scale/caffe-256/top-5", "top-5 on 256 nodes", 92, "%", f"{_CAFFE}, batch 8192", ">"),
    ("scale/caffe-512/time", "time to solution on 512 nodes", 44, "min", _CAFFE),
    ("scale/caffe-512/efficiency", "efficiency from 256 to 512 nodes", 85, "%", _CAFFE, ">"),
    ("scale/caffe-512/top-1", "top-1 on 512 nodes", 76.5, "%", _CAFFE),
    ("scale/tensorflow-256/speed", "speed on 256 nodes", 16400, "images/s", _TENSORFLOW),
    ("scale/tensorflow-512/speed", "speed on 512 nodes", 26700, "images/s", _TENSORFLOW),
    ("scale/tensorflow-512/efficiency", "efficiency from 256 to 512 nodes", 81, "%", _TENSORFLOW),
    ("scale/tensorflow-256/time", "time to solution on 256 nodes, about", 2, "h", _TENSORFLOW),
    ("hardware/caffe-448/peak", "peak of 448 nodes", 2682, "TFLOP/s", f"the study, {_SKX}"),
    ("hardware/caffe-448/time", "time to solution on 448 nodes", 58, "min", f"the study, {_SKX}"),
    (
        "hardware/caffe-448/efficiency",
        "share of peak on 448 nodes",
        12.36,
        "%",
        f"the study, {_SKX}",
    ),
    (
        "hardware/facebook-32/peak",
        "peak of 32 nodes",
        2658,
        "TFLOP/s",
        "Facebook, ResNet-50, P100, 256 GPUs",
    ),
    (
        "hardware/facebook-32/time",
        "time to solution on 32 nodes",
        60,
        "min",
        "Facebook, ResNet-50, P100, 256 GPUs",
    ),
    (
        "hardware/facebook-32/efficiency",
        "share of peak on 32 nodes",
        12.03,
        "%",
        "Facebook, ResNet-50, P100, 256 GPUs",
    ),
    ("hardware/you-1024/peak", "peak of 1024 nodes", 6144, "TFLOP/s", f"You et al., {_SKX}"),
    ("hardware/you-1024/time", "time to solution on 1024 nodes", 48, "min", f"You et al., {_SKX}"),
    (
        "hardware/you-1024/efficiency",
        "share of peak on 1024 nodes",
        6.51,
        "%",
        f"You et al., {_SKX}",
    ),
    ("densenet/64/epoch", "time of an epoch on 64 nodes", 346, "s", f"{_DENSENET}, batch 8192"),
    ("densenet/64/epochs", "epochs on 64 nodes", 90, "epochs", f"{_DENSENET}, batch 8192"),
    (
        "densenet/64/time",
        "time to solution on 64 nodes (8 h 40)",
        520,
        "min",
        f"{_DENSENET}, batch 8192",
    ),
    ("densenet/64/top-1", "top-1 on 64 nodes", 74.9, "%", f"{_DENSENET}, batch 8192"),
    (
        "densenet/128/epoch",
        "time of an epoch on 128 nodes",
        187.5,
        "s",
        f"{_DENSENET}, batch 16384",
    ),
    ("densenet/128/epochs", "epochs on 128 nodes", 64, "epochs", f"{_DENSENET}, batch 16384"),
    (
        "densenet/128/time",
        "time to solution on 128 nodes (3 h 20)",
        200,
        "min",
        f"{_DENSENET}, batch 16384",
    ),
    ("densenet/128/top-1", "top-1 on 128 nodes", 74.5, "%", f"{_DENSENET}, batch 16384"),
    (
        "fine-tuning/keras",
        "time of an epoch with Keras",
        85,
        "s",
        "ResNet-50, batch 4096, 128 nodes",
    ),
    (
        "fine-tuning/tensorflow",
        "time of an epoch with TensorFlow",
        18,
        "s",
        "ResNet-50, batch 4096, 128 nodes",
    ),
    ("rules/scratch/batch", "largest batch (32K)", 32768, "images", _SCRATCH),
    ("rules/scratch/updates", "updates an epoch, about", 40, "updates", _SCRATCH),
    ("rules/scratch/loss", "accuracy lost", 2, "%", _SCRATCH, "<"),
    ("rules/fine-tuning/batch", "largest batch (8K)", 8192, "images", _TUNED),
    ("rules/fine-tuning/updates", "updates an epoch, about", 10, "updates", _TUNED),
    ("rules/fine-tuning/fewest epochs", "epochs, at least", 70, "epochs", _TUNED),
    ("rules/fine-tuning/most epochs", "epochs, at most", 90, "epochs", _TUNED),
    ("rules/fine-tuning/loss", "accuracy lost", 2, "%", _TUNED, "<"),
    (
        "batch norm/densenet121",
        "batch-norm layers of DenseNet-121",
        121,
        "layers",
        "keras.applications, no top",
    ),
    (
        "batch norm/resnet50",
        "batch-norm layers of ResNet-50",
        53,
        "layers",
        "keras.applications, no top",
    ),
    ("batch norm/vgg16", "batch-norm layers of VGG-16", 0, "layers", "keras.applications, no top"),
    ("settings/chart/local batch", "images a worker", 64, "images", "chart of the 256-node run"),
    (
        "settings/chart/global batch",
        "images an update (64K)",
        65536,
        "images",
        "chart of the 256-node run",
    ),
    ("settings/command/global batch", "images an update", 8192, "images", _COMMAND),
    ("settings/command/ranks", "ranks", 512, "ranks", _COMMAND),
    (
        "settings/caffe-256/epochs",
        "epochs of the 256-node run, as told (about 50 by its speed)",
        90,
        "epochs",
        _CAFFE,
    ),
    ("settings/second/cores", "cores a socket", 20, "cores", "second cluster"),
    ("settings/OMP_NUM_THREADS", "OMP_NUM_THREADS", 24, "threads", _PRINTED),
    ("settings/HOROVOD_FUSION_THRESHOLD", "HOROVOD_FUSION_THRESHOLD", 134217728, "bytes", _PRINTED),
    ("settings/ranks a node", "ranks a node", 2, "ranks", _PRINTED),
    ("settings/intra-op", "intra-op threads", 24, "threads", _PRINTED),
    ("settings/inter-op", "inter-op threads", 2, "threads", _PRINTED),
    ("settings/kmp_blocktime", "kmp_blocktime", 1, "ms", _PRINTED),
    (
        "settings/caffe/compute",
        "cores of 48 that compute",
        44,
        "cores",
        "Intel Caffe, KMP_AFFINITY=proclist=[0-87]",
    ),
    (
        "settings/caffe/communicate",
        "cores of 48 that drive communication",
        4,
        "cores",
        "Intel Caffe",
    ),
)


def claims() -> list[Claim]:
    """Every published figure, once, in the order of the ledger."""
    return [
        *_aurocs(),
        *_accuracies(),
        *(Claim(*figure[:5], bound="".join(figure[5:])) for figure in _OTHERS),
    ]


def _aurocs() -> Iterator[Claim]:
    for source, values in _AUROC.items():
        for finding, value in zip(FINDINGS, values, strict=True):
            what = f"{source}, {finding.replace('_', ' ')}"
            yield Claim(
                f"auroc/{source}/{finding}", what, value, "AUROC", SPLITS[source], SOURCES[source]
            )
    yield Claim(
        "leaking split/share",
        "validation images whose patients have images outside it",
        *(80, "%", "split of ai-radiologist-GPU", SOURCES["Dell DenseNet"]),
    )


def _accuracies() -> Iterator[Claim]:
    where = "ResNet-50 on ImageNet-1K"
    for source, row in LARGE_BATCHES.items():
        for batch, value in zip(BATCHES, row, strict=True):
            if value is not None:
                yield Claim(
                    f"large batches/{source}/{batch}",
                    f"top-1 at {batch}, {source}",
                    value,
                    "%",
                    where,
                )
    for rung, value in LADDER.items():
        yield Claim(f"ladder/{rung}", f"top-1 with {rung.removeprefix('+ ')}", value, "%", where)
    for kind, points in (("top-1", COLLAPSES), ("top-5", COLLAPSES_TOP_5)):
        for point, pair in enumerate(points, 1):
            for when, value in zip(("before", "after"), pair, strict=True):
                key, what = (
                    f"collapse/{kind}/{point}/{when}",
                    f"{kind} {when} collapse, point {point}",
                )
                yield Claim(key, what, value, "%", where)
    for kind, value in zip(("top-1", "top-5"), SEVENTH_COLLAPSED, strict=True):
        yield Claim(
            f"collapse/{kind}/7/after", f"{kind} after collapse, point 7", value, "%", where
        )
