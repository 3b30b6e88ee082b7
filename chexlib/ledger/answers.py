"""The ledger: every published figure beside what a run found, with a verdict by one rule.

No figure of ours is typed.

Published figures are in `published.csv`, what of a run answers them in `counterparts`. A verdict is
the first that applies:

- *not comparable*: it cannot be measured here, it was not measured (no results of the notebook,
  none at a setting that answers it, a record that lacks a field), it was measured under other
  conditions, its network learnt nothing (`chexlib.evaluation.intervals.LEARNT`), or the comparison
  is no test, such as a projection far above a lower bound, or one number told twice. The reason is
  given;
- *checked*: a count or a setting that is equal. That is no result, so it is not reproduced;
- a claim without a figure, such as "batch norm is the cause", has the verdict of its notebook:
  *supported*, *contradicted*, *equivalent* or *undecided* (`chexlib.evaluation.verdicts`);
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

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from chexlib.errors import DataError
from chexlib.evaluation.intervals import (
    CONTRADICTED,
    REPRODUCED,
    UNDECIDED,
    verdict_on_gain,
)
from chexlib.evaluation.verdicts import CHECKED, NOT_COMPARABLE, VERDICTS
from chexlib.files import ROOT, read_json
from chexlib.ledger.counterparts import COUNTERPARTS, ITSELF
from chexlib.ledger.published import Claim, claims
from chexlib.ledger.records import Measured, Results

PARTS = ("metrics", "params", "environment")  # files of a notebook's results
log = logging.getLogger(__name__)
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


def build_ledger(run: str | Path) -> pd.DataFrame:
    """Set every published figure beside what a run found; where it found nothing, beside the
    reference results.

    Parameters
    ----------
    run : folder of a run, with one folder per notebook

    Returns
    -------
    DataFrame
        A row per figure, index its key. Columns `COLUMNS`: published in `unit`; ours with its 95 %
        interval, or what a projection spans, the unknown being another (NaN where there is none),
        in `our unit`, in which the published figure comes to `compared with`; origin: "this run",
        "reference results" or ""; verdict: one of `VERDICTS`; why.
    """
    return ledger(find_results(run))


def find_results(run: str | Path) -> dict[str, Results]:
    """What each notebook found, by its number: in this run, or else when the reference results were
    made.
    """
    results = {}
    for file in sorted((ROOT / "data" / "reference").glob("[0-9]*.json")):
        kept = read_json(file)
        parts = (kept["metrics"], kept["params"], kept["environment"])
        results[file.stem[:2]] = Results(file.stem, *parts, origin="reference results")
    for file in sorted(Path(run).glob("[0-9]*/metrics.json")):
        name = file.parent.name
        try:
            parts = [read_json(file.with_name(f"{part}.json")) for part in PARTS]
        except DataError as error:
            log.warning("the ledger leaves out notebook %s: %s", name[:2], error)
            continue
        results[name[:2]] = Results(name, *parts, reference=results.get(name[:2]))
    return results


def ledger(results: Mapping[str, Results]) -> pd.DataFrame:
    """`build_ledger` of results in hand, by the number of the notebook."""
    rows = [_row(claim, results) for claim in claims()]
    return pd.DataFrame(rows, index=[claim.key for claim in claims()], columns=COLUMNS)


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
    if ours.word:
        return ours.word, ours.why
    if ours.tolerance is None and ours.low is None:
        return NOT_COMPARABLE, "one training, so that there is no interval"
    low, high = (ours.value, ours.value) if ours.low is None else (ours.low, ours.high)
    if ours.tolerance:
        return _projected(ours, low, high)
    if ours.rule == "equal":
        question = "is it within our interval" if low < high else "is it equal"
        equal = CHECKED if ours.tolerance == 0 else REPRODUCED
        word = equal if low <= ours.published <= high else CONTRADICTED
    elif ours.rule == "side of 0":
        question = "is our interval on its side of 0"
        word = verdict_on_gain(low, high) if ours.published > 0 else verdict_on_gain(-high, -low)
    else:
        strict = ours.rule == "<"
        figure = "interval" if low < high else "figure"
        question = f"is our {figure} {'below' if strict else 'no more than'} it"
        if high < ours.published or (high == ours.published and not strict):
            word = REPRODUCED
        elif low > ours.published or (low == ours.published and strict):
            word = CONTRADICTED
        else:
            word = UNDECIDED
    answers = {REPRODUCED: "yes", CHECKED: "yes", CONTRADICTED: "no"}
    answers[UNDECIDED] = "it holds both sides"
    return word, f"{question}: {answers[word]}"


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


def _row(claim: Claim, results: Mapping[str, Results]) -> dict:
    row = {
        "topic": claim.topic,
        "claim": claim.what,
        "bound": claim.bound,
        "published": claim.value,
        "unit": claim.unit,
        "setting": claim.setting,
        "source": claim.source,
        **dict.fromkeys(("notebook", "origin", "scale", "our unit"), ""),
    }
    if not claim.kind:
        return {**row, "verdict": NOT_COMPARABLE, "why": claim.reason}
    number, find = COUNTERPARTS[claim.kind]
    if number == ITSELF:
        return _filled(row, find(claim), scale="the source's own figures")
    if number not in results:
        why = f"notebook {number} has no results in this run or among the reference results"
        return {**row, "notebook": number, "verdict": NOT_COMPARABLE, "why": why}
    answering = results[number]
    try:
        ours = _answer(find, claim, answering)
    except DataError as error:
        ours = str(error)
    else:
        if isinstance(ours, str) and answering.reference:
            with contextlib.suppress(DataError):
                kept = _answer(find, claim, answering.reference)
                if isinstance(kept, Measured):
                    answering, ours = answering.reference, kept
    row |= {"notebook": answering.notebook, "origin": answering.origin, "scale": answering.scale}
    if isinstance(ours, str):
        return {**row, "verdict": NOT_COMPARABLE, "why": ours}
    return _filled(row, ours, scale=ours.scale or answering.scale)


def _filled(row: Mapping, ours: Measured, *, scale: str) -> dict:
    word, why = verdict(ours)
    return {
        **row,
        "scale": scale,
        "ours": ours.value,
        "low": ours.low,
        "high": ours.high,
        "our unit": ours.unit,
        "compared with": ours.published,
        "verdict": word,
        "why": why,
    }


def _answer(
    find: Callable[[Claim, Results], Measured | str], claim: Claim, results: Results
) -> Measured | str:
    """What a notebook found for a published figure, or why nothing.

    Raises
    ------
    DataError
        Its record lacks a field, as where another version of the notebook wrote it.
    """
    try:
        ours = find(claim, results)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"its metrics.json lacks what is needed ({error!r})") from error
    return ours if isinstance(ours, str) or math.isfinite(ours.value) else "undefined"
