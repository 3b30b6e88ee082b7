"""The ledger: every published figure beside what a run found, with a verdict by one rule.

No figure of ours is typed.

Published figures are in `published`, what of a run answers them in `counterparts`. A verdict is the
first that applies:

- *not measured*: the notebook that measures it has no results, neither in this run nor among the reference results, or
  none at a setting that answers it, or its network learnt nothing
  (`chexlib.evaluation.verdicts.LEARNT`);
- *not comparable*: it cannot be measured here, it was measured under other conditions, or the comparison is no test,
  such as a projection far above a lower bound, or one number told twice. The reason is given;
- *undecided*: what is known of ours allows both answers: an interval holds both sides of a bound or of 0, or a
  projection depends on what the study does not tell;
- *reproduced* or *contradicted*, for a figure: the published one lies in our interval (95 %, or what rounding leaves
  open), or does not; a count is equal, or not; a projection of the model is within 5 points of an
  efficiency and 5 % of a speed, or not; for a bound ("less than 2 %", or what the study's recipe
  still lost): our whole interval keeps it, or breaks it; for a gain that was published in another
  measure, such as top-1 on ImageNet: our whole interval is on its side of 0, or on the other. What
  is lost is in % of the skill above chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from chexlib.evaluation.verdicts import (
    CONTRADICTED,
    NOT_COMPARABLE,
    NOT_MEASURED,
    REPRODUCED,
    UNDECIDED,
    VERDICTS,
    verdict_on_gain,
)
from chexlib.files import ROOT
from chexlib.ledger.counterparts import COUNTERPARTS, NO_COUNTERPART
from chexlib.ledger.measured import Found, Measured
from chexlib.ledger.published import Claim, claims

COLUMNS = [
    "topic",
    "claim",
    "bound",
    "published",
    "unit",
    "setting",
    "source",
    "notebook",
    "origin",
    "scale",
    "ours",
    "low",
    "high",
    "our unit",
    "compared with",
    "verdict",
    "why",
]


def build_ledger(run: str | Path, *, reference: str | Path = "") -> pd.DataFrame:
    """Set every published figure beside what a run found; where it found nothing, beside the
    reference results.

    Parameters
    ----------
    run : folder of a run, with one folder a notebook
    reference : folder of the reference results; empty for `data/reference` of the project

    Returns
    -------
    DataFrame
        A row a figure, index its key. Columns `COLUMNS`: published in `unit`; ours with its 95 %
        interval, or what a projection spans, the unknown being another (NaN where there is none),
        in `our unit`, in which the published figure comes to `compared with`; origin: "this run",
        "reference results" or ""; verdict: one of `VERDICTS`; why.
    """
    return ledger(find_results(run, reference=reference))


def find_results(run: str | Path, *, reference: str | Path = "") -> dict[str, Found]:
    """What each notebook found, by its number: in this run, or else when the reference results were
    made.
    """
    found = {}
    for file in sorted(Path(reference or ROOT / "data" / "reference").glob("[0-9]*.json")):
        kept = json.loads(file.read_text())
        parts = (kept["metrics"], kept["params"], kept["environment"])
        found[file.stem[:2]] = Found(file.stem, *parts, origin="reference results")
    for file in sorted(Path(run).glob("[0-9]*/metrics.json")):
        parts = (
            json.loads((file.parent / f"{name}.json").read_text()) for name in ("metrics", "params")
        )
        environment = file.parent / "environment.json"
        about = json.loads(environment.read_text()) if environment.exists() else {}
        number = file.parent.name[:2]
        found[number] = Found(
            file.parent.name, *parts, about, origin="this run", reference=found.get(number)
        )
    return found


def ledger(found: Mapping[str, Found]) -> pd.DataFrame:
    """`build_ledger` of results in hand, by the number of the notebook."""
    rows = {claim.key: _row(claim, found) for claim in claims()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)


def count_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """How many figures of each topic have which verdict, and how many of them have a figure of ours
    beside them.
    """
    counts = pd.crosstab(table["topic"], table["verdict"]).reindex(
        columns=list(VERDICTS), fill_value=0
    )
    counts = counts.loc[list(dict.fromkeys(table["topic"]))]
    counts["with ours"] = table["ours"].notna().groupby(table["topic"]).sum()
    counts.loc["all"] = counts.sum()
    return counts.rename_axis(columns=None)


def verdict(ours: Measured) -> tuple[str, str]:
    """The verdict on a figure that was measured, and why, by the rule at the head of this file."""
    if ours.differs:
        return NOT_COMPARABLE, ours.differs
    if ours.tolerance is None and ours.low is None:
        return NOT_COMPARABLE, "one training, so that there is no interval"
    low, high = (ours.value, ours.value) if ours.low is None else (ours.low, ours.high)
    if ours.tolerance:
        return _projected(ours, low, high)
    if ours.rule == "equal":
        rule = "is it within our interval" if low < high else "is it equal"
        word = REPRODUCED if low <= ours.published <= high else CONTRADICTED
    elif ours.rule == "side of 0":
        rule = "is our interval on its side of 0"
        word = verdict_on_gain(low, high) if ours.published > 0 else verdict_on_gain(-high, -low)
    else:
        strict = ours.rule == "<"
        rule = f"is our {'interval' if low < high else 'figure'} {'below' if strict else 'no more than'} it"
        kept = high < ours.published if strict else high <= ours.published
        broken = low >= ours.published if strict else low > ours.published
        word = REPRODUCED if kept else CONTRADICTED if broken else UNDECIDED
    answers = {REPRODUCED: "yes", CONTRADICTED: "no", UNDECIDED: "it holds both sides"}
    return word, f"{rule}: {answers[word]}"


def _projected(ours: Measured, low: float, high: float) -> tuple[str, str]:
    """On a projection: where its span lies on both sides of what decides, the study does not tell
    enough.
    """
    digits = 0 if high >= 100 else 1
    span = f"{low:,.{digits}f} to {high:,.{digits}f} {ours.unit}"
    if ours.rule == ">":
        rule = "is the projection above it"
        if low > ours.published:  # the bound can be broken, but keeping it says little of a model
            says = f"no test of a model that says {ours.value:,.0f} {ours.unit}"
            return NOT_COMPARABLE, f"{says}: anything above {ours.published:g} would do"
        reproduced, contradicted = False, high <= ours.published
    else:
        unit = "points" if ours.unit == "%" else ours.unit
        rule = f"is it within {ours.tolerance:,.4g} {unit} of the projection"
        edges = (ours.published - ours.tolerance, ours.published + ours.tolerance)
        reproduced = edges[0] <= low and high <= edges[1]
        contradicted = high < edges[0] or edges[1] < low
    if reproduced:
        return REPRODUCED, f"{rule}: yes"
    if contradicted:
        return CONTRADICTED, f"{rule}: no"
    return UNDECIDED, f"{rule}: what the study does not tell leaves {span} open"


def _row(claim: Claim, found: Mapping[str, Found]) -> list:
    head = [
        claim.topic,
        claim.what,
        claim.bound,
        claim.value,
        claim.unit,
        claim.setting,
        claim.source,
    ]
    reason = next(
        (why for prefix, why in NO_COUNTERPART.items() if claim.key.startswith(prefix)), None
    )
    if reason:
        return [*head, "", "", "", None, None, None, "", None, NOT_COMPARABLE, reason]
    number, find = next(
        (own for prefix, own in COUNTERPARTS.items() if claim.key.startswith(prefix))
    )
    if number not in found:
        why = f"notebook {number} has no results in this run or among the reference results"
        return [*head, number, "", "", None, None, None, "", None, NOT_MEASURED, why]
    own = found[number]
    ours = _answer(find, claim, own)
    if (
        isinstance(ours, str)
        and own.reference
        and not isinstance(kept := _answer(find, claim, own.reference), str)
    ):
        own, ours = own.reference, kept
    where = [own.notebook, own.origin]
    if isinstance(ours, str):
        return [*head, *where, own.scale, None, None, None, "", None, NOT_MEASURED, ours]
    numbers = [ours.value, ours.low, ours.high, ours.unit, ours.published]
    return [*head, *where, ours.scale or own.scale, *numbers, *verdict(ours)]


def _answer(
    find: Callable[[Claim, Found], Measured | str], claim: Claim, own: Found
) -> Measured | str:
    """What a notebook found for a published figure, or why nothing."""
    try:
        ours = find(claim, own)
    except (KeyError, TypeError) as error:  # written by another version of the notebook
        return f"its metrics.json lacks what is needed ({error!r})"
    return ours if isinstance(ours, str) or math.isfinite(ours.value) else "undefined"
