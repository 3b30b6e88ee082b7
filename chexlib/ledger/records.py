"""What notebooks hand to the ledger, and one figure of theirs, to be set beside a published one.

A notebook saves its record by `run.finish(records.Recipes(...), ...)`, so that nothing the ledger
reads can be left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from chexlib.evaluation.verdicts import NOT_COMPARABLE, Verdict

# Of a notebook's parameters.
SHOWN = ("topology", "topologies", "size", "epochs", "seeds", "engines")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Record of notebook 02: what a split by image leaks."""

    test_images_seen_in_training: Mapping[str, float]  # share by split; "image": one by image


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Record of notebook 03: AUROC and speed of the baseline network."""

    data: str  # name of the data; "synthetic" is in that of a phantom
    split: Mapping[str, Any]  # name, and images by part
    auroc: Any  # by finding and "mean": auroc, low, high
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class Topologies:
    """Record of notebook 05: batch norm by topology, and the answers on large batches."""

    counts: Mapping[str, int]  # batch-norm layers by topology
    answers: Mapping[str, Mapping[str, Any]]  # `judged`, by question


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Record of notebook 06: what large-batch recipes, collapse and ensembles gain."""

    ladder: Mapping[int, Any]  # by batch, then by rung: auroc, gain, low, high
    auroc_by_batch: Mapping[int, Mapping[str, float]]  # then by rung
    losses: Sequence[Mapping[str, Any]]  # rung, batch, updates, baseline; loss, low, high in %
    collapse: Any  # by epoch: before, after, gain, low, high, gain_later, low_later, high_later
    ensemble: Any  # by seed: gain, member


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Record of notebook 07: AUROC of fine-tuning by updates per epoch."""

    updates: Any  # by batch: updates per epoch, auroc; loss, loss_low, loss_high in %
    answers: Mapping[str, Mapping[str, Any]]  # `judged`, by rule


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Record of notebook 08: measured speeds, and the projection to many nodes."""

    layouts: Any  # images/s by (ranks, threads)


@dataclass(frozen=True, kw_only=True)
class Appendix:
    """Of notebook 11."""

    # By system and nodes: images_per_second, efficiency, solution_hours.
    projection: Mapping[str, Any]
    # A row per combination of what is not known: system, those three as efficiency_256, and further.
    sensitivity: Sequence[Mapping[str, Any]]
    peak_percent: Any  # by run: formula, low, high
    solution: Any  # seconds by topology; empty where nothing was trained
    ratio: Mapping[str, float]  # ours over stock Keras; empty where it was not measured


RECORDS = {
    "02": Preparation,
    "03": Baseline,
    "05": Topologies,
    "06": Recipes,
    "07": Transfer,
    "08": Scaling,
    "11": Appendix,
}


@dataclass(frozen=True)
class Results:
    """Results of one notebook, and how it found them."""

    notebook: str
    metrics: Mapping
    params: Mapping = field(default_factory=dict)
    environment: Mapping = field(default_factory=dict)
    origin: str = "this run"
    # The reference results of the same notebook, for what this run did not measure.
    reference: Results | None = None

    @functools.cached_property
    def record(self) -> Any:
        """The notebook's record, one of `RECORDS`. Raises KeyError if a field is missing."""
        record = RECORDS[self.notebook[:2]]
        return record(**{field.name: self.metrics[field.name] for field in fields(record)})

    @property
    def scale(self) -> str:
        """At which scale: the data, and those of `SHOWN` that the notebook has."""
        words = [str(self.metrics["data"])] if "data" in self.metrics else []
        for name in SHOWN:
            if name in self.params:
                value = self.params[name]
                text = " ".join(map(str, value)) if isinstance(value, list) else value
                words.append(f"{name} {text}")
        return ", ".join(words)


@dataclass(frozen=True)
class Measured:
    """A figure of ours, to be set beside a published one that comes to `published` in the same
    unit.
    """

    value: float
    unit: str
    published: float | None = None
    # Of the 95 % interval; of a projection what it spans, the unknown being another.
    low: float | None = None
    high: float | None = None
    rule: str = "equal"  # or "side of 0", "<", "<=", of a projection ">": see `ledger`
    tolerance: float | None = None  # 0 of a count, more of a projection
    differs: str = ""  # why the two cannot be compared
    scale: str = ""  # at which ours was found, where that is not the notebook's
    word: str = ""  # the verdict, where the notebook has judged by seeds, and in `why` how
    why: str = ""


def judged(answer: Verdict | str, *, scale: str = "") -> dict:
    """A notebook's answer to a claim for its record: `word`, `why`, `mean`, `low`, `high`, `scale`.

    Where there is no verdict, `answer` is the reason.
    """
    if isinstance(answer, str):
        found = {"word": NOT_COMPARABLE, "why": answer, "mean": None, "low": None, "high": None}
    else:
        found = {"word": answer.word, "why": str(answer)}
        found |= {name: getattr(answer, name) for name in ("mean", "low", "high")}
    return found | {"scale": scale}


def between(row: Mapping, name: str, times: float = 1.0, *, suffix: str = "") -> dict:
    """Value and interval of an estimate: the columns `name`, "low" and "high", with `suffix`."""
    estimate = {"value": row[name + suffix]}
    for end in ("low", "high"):
        estimate[end] = row[end + suffix]
    scaled = {key: None if value is None else times * value for key, value in estimate.items()}
    if scaled["value"] is None:
        scaled["value"] = math.nan
    return scaled
