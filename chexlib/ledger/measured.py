"""What a notebook found, and one figure of it, to be set beside a published one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Of a notebook's parameters.
SHOWN = ("topology", "topologies", "size", "epochs", "seeds", "engines")


@dataclass(frozen=True)
class Found:
    """What one notebook found, and how."""

    notebook: str
    metrics: Mapping
    params: Mapping = field(default_factory=dict)
    environment: Mapping = field(default_factory=dict)
    origin: str = "this run"
    # The reference results of the same notebook, for what this run did not measure.
    reference: Found | None = None

    @property
    def scale(self) -> str:
        """At which scale: the data, and those of `SHOWN` that the notebook has."""
        words = [str(self.metrics["data"])] if "data" in self.metrics else []
        own = {name: self.params[name] for name in SHOWN if name in self.params}
        lists = {
            name: " ".join(map(str, value))
            for name, value in own.items()
            if isinstance(value, list)
        }
        return ", ".join(words + [f"{name} {value}" for name, value in {**own, **lists}.items()])


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


def between(
    row: Mapping, name: str, times: float = 1.0, *, ends: tuple[str, str] = ("low", "high")
) -> dict:
    """Value and interval of an estimate in `metrics.json`, whose ends are in the columns `ends`."""
    found = {
        end: None if row[own] is None else times * row[own]
        for end, own in zip(("low", "high"), ends, strict=True)
    }
    return {"value": math.nan if row[name] is None else times * row[name], **found}
