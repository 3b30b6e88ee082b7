"""What of notebook 08 answers a published figure: the model's projections, the formula, and what is
measured here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from chexlib.ledger.measured import Found, Measured
from chexlib.ledger.published import Claim, claims
from chexlib.scaling.clusters import IMAGENET, study_speed

POINTS = 5  # by which a projected efficiency may be off
PERCENT = 5  # by which a projected speed may be
SYSTEMS = {"caffe": "MareNostrum 4", "tensorflow": "Stampede2"}
RUNS = {
    "caffe-448": "the study, SKX 8160",
    "facebook-32": "Facebook, P100",
    "you-1024": "You et al., SKX 8160",
}


def _system(claim: Claim) -> str:
    """The system of a key such as "scale/caffe-256/time"."""
    return SYSTEMS[claim.key.split("/")[1].split("-")[0]]


def _projected(claim: Claim, found: Found) -> dict[int, dict]:
    """The projection of the claim's system, by number of nodes."""
    table = found.metrics["projection"][_system(claim)]
    return {int(nodes): row for nodes, row in table.items()}


def _span(claim: Claim, found: Found, value: str, times: float = 1.0) -> dict:
    """Least and most that the model says where what is not known of the system is another:
    `study_sensitivity`.
    """
    own = [
        times * row[value]
        for row in found.metrics["sensitivity"]
        if row["system"] == _system(claim)
    ]
    return {"low": min(own), "high": max(own)}


def _modelled(claim: Claim) -> str:
    """At which scale: the model with the study's hardware in, nothing measured here."""
    return f"the model: ResNet-50 on {_system(claim)}"


def _nodes(claim: Claim) -> int:
    return int(claim.key.split("/")[1].split("-")[1])


def _speed(claim: Claim, found: Found) -> Measured:
    speed = _projected(claim, found)[_nodes(claim)]["images_per_second"]
    how = {"tolerance": PERCENT / 100 * claim.value, "scale": _modelled(claim)}
    how |= _span(claim, found, f"images_per_second_{_nodes(claim)}")
    return Measured(speed, claim.unit, claim.value, **how)


def _time(claim: Claim, found: Found) -> Measured:
    """Hours or minutes for 90 epochs: of the model they are its speed again, so they get no verdict
    of their own.
    """
    hours = _projected(claim, found)[_nodes(claim)]["solution_hours"]
    minutes = {"min": 1, "h": 60}[claim.unit]
    needed = 90 * IMAGENET / (60 * minutes * claim.value) / _nodes(claim)
    differs = f"the model's time is 90 epochs at its speed on {_nodes(claim)} nodes: one number is tested once, there"
    if needed > study_speed():
        differs = (
            f"90 epochs in that time are {needed:.0f} images/s a node, where the deck's own node "
            f"has {study_speed():.0f}: it is another number of epochs"
        )
    span = _span(claim, found, f"solution_hours_{_nodes(claim)}", 60 / minutes)
    return Measured(
        60 * hours / minutes,
        claim.unit,
        claim.value,
        differs=differs,
        scale=_modelled(claim),
        **span,
    )


def _efficiency(claim: Claim, found: Found) -> Measured:
    """Over one node, or on 512 over 256 nodes."""
    table, nodes = _projected(claim, found), _nodes(claim)
    if nodes == 256:
        own, rule, value = table[nodes]["efficiency"], "equal", "efficiency_256"
    else:
        own, rule = (
            table[512]["images_per_second"] / table[256]["images_per_second"] / 2,
            claim.bound or "equal",
        )
        value = "further"
    how = {
        "rule": rule,
        "tolerance": POINTS,
        "scale": _modelled(claim),
        **_span(claim, found, value, 100),
    }
    return Measured(100 * own, claim.unit, claim.value, **how)


def _peak_share(claim: Claim, found: Found) -> Measured:
    """By the formula, from minutes that were rounded to whole ones: the interval is what that
    leaves open.
    """
    row = found.metrics["peak_percent"][RUNS[claim.key.split("/")[1]]]
    differs = (
        "nothing is measured: the deck's own operations, minutes and peak, put into its formula"
    )
    own = (row["formula"], claim.unit, claim.value, row["low"], row["high"])
    return Measured(*own, differs=differs, scale="the deck's formula")


def _solution(claim: Claim, found: Found) -> Measured | str:
    row = found.metrics["solution"].get("densenet121")
    if row is None or row["seconds"] is None:
        return "DenseNet-121 was not trained to a solution in this profile"
    differs = (
        "this machine, to an AUROC on radiographs; there 64 or 128 nodes, to a top-1 on ImageNet"
    )
    return Measured(row["seconds"] / 60, claim.unit, claim.value, differs=differs)


def _ratio(claim: Claim, found: Found) -> Measured | str:
    if "ratio" not in found.metrics["ratio"]:
        return "stock Keras was not measured in this profile"
    keras, tensorflow = (own.value for own in claims() if own.topic == "fine-tuning")
    differs = "one machine, stock Keras against ours; there 128 nodes, Keras against TensorFlow"
    return Measured(found.metrics["ratio"]["ratio"], "times", keras / tensorflow, differs=differs)


def _ranks(claim: Claim, found: Found) -> Measured:
    """Of the fastest layout; these are named "(ranks, threads)"."""
    speeds = {
        layout: speed for layout, speed in found.metrics["layouts"].items() if speed is not None
    }
    ranks, _ = ast.literal_eval(max(speeds, key=speeds.get))
    return Measured(ranks, claim.unit, claim.value, differs="the fastest layout of another machine")


COUNTERPARTS: dict[str, Callable[[Claim, Found], Measured | str]] = {
    "scale/caffe-256/speed": _speed,
    "scale/caffe-256/efficiency": _efficiency,
    "scale/caffe-256/time": _time,
    "scale/caffe-512/time": _time,
    "scale/caffe-512/efficiency": _efficiency,
    "scale/tensorflow-256/speed": _speed,
    "scale/tensorflow-512/speed": _speed,
    "scale/tensorflow-512/efficiency": _efficiency,
    "scale/tensorflow-256/time": _time,
    "hardware/caffe-448/efficiency": _peak_share,
    "hardware/facebook-32/efficiency": _peak_share,
    "hardware/you-1024/efficiency": _peak_share,
    "densenet/64/time": _solution,
    "densenet/128/time": _solution,
    "fine-tuning/": _ratio,
    "settings/ranks a node": _ranks,
}
