"""What of a run answers a published figure: from a notebook's `metrics.json`, converted to the
figure's unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pandas as pd

from chexlib.evaluation.verdicts import has_learnt, nothing_learnt, over_seeds
from chexlib.ledger import projections
from chexlib.ledger.measured import Found, Measured, between
from chexlib.ledger.published import BATCHES, COLLAPSES, IMAGENET, LADDER, LARGE_BATCHES, Claim

RELEASE = 112_120  # images of the NIH release
TOP_1 = "top-1 of 1,000 classes of photographs there, mean AUROC of 14 findings here"
# Whose batches are answered by which rung of our ladder.
RUNGS = {"the study": "+ collapse", "Facebook": "+ warm-up"}


def _auroc(claim: Claim, found: Found, times: float = 1.0) -> Measured | str:
    finding = claim.key.split("/")[-1].capitalize() if times > 1 else claim.key.split("/")[-1]
    row = found.metrics["auroc"][finding]
    if row["auroc"] is None:
        return "the test part has images of one class only"
    own = between(row, "auroc", times)
    return Measured(
        **own, unit=claim.unit, published=claim.value, differs=_other_images(claim, found.metrics)
    )


def _other_images(claim: Claim, metrics: Mapping) -> str:
    images, ours = sum(metrics["split"]["images"].values()), metrics["split"]["name"]
    if "synthetic" in metrics["data"]:
        return "our images are synthetic"
    if claim.setting.startswith("leaks") or "not printed" in claim.setting:
        return (
            "its split leaks patients"
            if claim.setting.startswith("leaks")
            else "its split is not printed"
        )
    if images < 0.99 * RELEASE:
        return f"{images:,} of the release's {RELEASE:,} images"
    if ours != ("official" if claim.setting.startswith("official") else "patient"):
        return f"another split: ours is {ours}"
    return ""


def _percent_auroc(claim: Claim, found: Found) -> Measured | str:
    return _auroc(claim, found, 100.0)


def _speed(claim: Claim, found: Found) -> Measured:
    machine = found.environment.get("processor") or "another processor"
    differs = f"{found.params['size']} px on {machine}, {found.environment.get('cores')} cores"
    return Measured(found.metrics["images_per_second"], claim.unit, claim.value, differs=differs)


def _epoch(claim: Claim, found: Found) -> Measured:
    """Hours for the release's training part (70 %) at the speed of `_speed`."""
    speed = _speed(claim, found)
    return Measured(
        0.7 * RELEASE / speed.value / 3600, claim.unit, claim.value, differs=speed.differs
    )


def _leak(claim: Claim, found: Found) -> Measured:
    share = found.metrics["test_images_seen_in_training"]["image"]
    return Measured(
        100 * share, claim.unit, claim.value, differs="our split by image, of our images"
    )


def _layers(claim: Claim, found: Found) -> Measured:
    count = found.metrics["counts"][claim.key.split("/")[-1]]
    return Measured(count, claim.unit, claim.value, tolerance=0)


def _rung(claim: Claim, found: Found) -> Measured | str:
    """On our smallest batch: the study's ladder ends at its figure for 8K, which has as many
    updates an epoch.
    """
    rungs, name = found.metrics["ladder"], claim.key.split("/")[-1]
    climbed = rungs[min(rungs, key=int)]
    trained = [rung for rung in LADDER if rung in climbed]
    if name not in trained:
        return "this rung was not trained"
    place = trained.index(name)
    if not place:
        return Measured(100 * climbed[name]["auroc"], "% AUROC", claim.value, differs=TOP_1)
    before = trained[place - 1]
    highest = max(
        (climbed[rung]["auroc"] for rung in (before, name)), key=lambda auroc: auroc or 0.0
    )
    if not has_learnt(highest):
        return nothing_learnt(highest)
    gained = LADDER[name] - LADDER[before]
    return Measured(
        **between(climbed[name], "gain", 100), unit="% AUROC", published=gained, rule="side of 0"
    )


def _ensemble(claim: Claim, found: Found) -> Measured | str:
    """The gain over the best member, its interval over seeds; of one seed there is none, as of any
    one training.
    """
    seeds = pd.DataFrame(found.metrics["ensemble"].values())
    if not has_learnt(member := seeds["member"].mean()):
        return nothing_learnt(member)
    row = {"gain": seeds["gain"][0], "low": None, "high": None}
    if len(seeds) > 1:
        row = (
            over_seeds(seeds.assign(all=0), ["all"], ["gain"])
            .rename(columns={"mean": "gain"})
            .iloc[0]
        )
    gained = claim.value - LADDER["+ collapse"]
    return Measured(**between(row, "gain", 100), unit="% AUROC", published=gained, rule="side of 0")


def _collapse(claim: Claim, found: Found) -> Measured | str:
    """From the epoch that is as far into our training as the point is into theirs.

    A collapse is one epoch more, so it is judged over what the training itself had reached by then
    (`gain_later`), and the study's over what it had reached at its next point. Neither is known of
    the end of a training.
    """
    point, when = int(claim.key.split("/")[2]), claim.key.split("/")[3]
    epochs = sorted(found.metrics["collapse"], key=int)
    row = found.metrics["collapse"][epochs[math.ceil(point / len(COLLAPSES) * len(epochs)) - 1]]
    if when == "before":
        return Measured(100 * row["before"], "% AUROC", claim.value, differs=TOP_1)
    before, after = COLLAPSES[point - 1]
    if row["gain_later"] is None or point == len(COLLAPSES):
        differs = (
            "what one more epoch without a collapse had given is not known of the end of a training"
        )
        return Measured(
            **between(row, "gain", 100), unit="% AUROC", published=after - before, differs=differs
        )
    highest = max(
        (own["after"] for own in found.metrics["collapse"].values()), key=lambda auroc: auroc or 0.0
    )
    if not has_learnt(highest):
        return nothing_learnt(highest)
    later = between(row, "gain_later", 100, ends=("low_later", "high_later"))
    return Measured(
        **later, unit="% AUROC", published=after - COLLAPSES[point][0], rule="side of 0"
    )


def _losses(found: Found, rung: str) -> list[dict]:
    """What each batch above the smallest loses, in % of the smallest's skill above chance, the
    smallest batch first.
    """
    return [row for row in found.metrics["losses"] if row["rung"] == rung]


def _at_updates(rows: list[dict], updates: float) -> dict | str:
    """The row with about as many updates an epoch: at most twice or half as many."""
    near = [row for row in rows if 0.5 <= row["updates"] / updates <= 2]
    if not near:
        return f"no batch of ours has about {updates:.0f} updates an epoch"
    return min(near, key=lambda row: abs(math.log(row["updates"] / updates)))


def _lost(row: dict, **how) -> Measured | str:
    """A row of `_losses` beside a published loss, where the smallest batch had learnt something
    that can be lost.
    """
    if row["loss"] is None or not has_learnt(row["baseline"]):
        return nothing_learnt(row["baseline"])
    return Measured(**between(row, "loss"), unit="% of skill lost", **how)


def _large_batch(claim: Claim, found: Found) -> Measured | str:
    _, source, size = claim.key.split("/")
    if size == "8K":
        best = found.metrics["auroc_by_batch"]
        smallest = best[min(best, key=int)].get(RUNGS[source])
        if smallest is None:
            return "this rung was not trained"
        return Measured(100 * smallest, "% AUROC", claim.value, differs=TOP_1)
    row = _at_updates(_losses(found, RUNGS[source]), IMAGENET / BATCHES[size])
    if isinstance(row, str):
        return row
    lost = 100 * (1 - claim.value / LARGE_BATCHES[source][0])  # chance is 0.1 % of top-1
    # The point of the study's figure is how little is lost, that of the others that something is.
    return _lost(row, published=lost, rule="<" if source == "the study" else "side of 0")


def _rule_loss(claim: Claim, found: Found) -> Measured | str:
    row = _at_updates(_losses(found, RUNGS["the study"]), 40)
    return row if isinstance(row, str) else _lost(row, published=claim.value, rule="<")


def _rule_reach(claim: Claim, found: Found) -> Measured | str:
    """The largest batch, or the fewest updates an epoch, that loses less than 2 % with its whole
    interval.
    """
    losses = _losses(found, RUNGS["the study"])
    learnt = [row for row in losses if row["loss"] is not None and has_learnt(row["baseline"])]
    if losses and not learnt:
        return nothing_learnt(losses[0]["baseline"])
    kept = [row for row in learnt if row["high"] is not None and row["high"] < 2]
    if not kept:
        return "no batch of ours is known to lose less than 2 % of the skill above chance"
    if claim.key.endswith("updates"):
        return Measured(
            min(row["updates"] for row in kept), claim.unit, claim.value, rule="<=", tolerance=0
        )
    differs = "fewer images: what makes a batch large is how few updates are left"
    return Measured(max(row["batch"] for row in kept), claim.unit, claim.value, differs=differs)


def _tuned_loss(claim: Claim, found: Found) -> Measured | str:
    """Of fine-tuning, at about ten updates an epoch."""
    if not (table := found.metrics["updates"]):
        return "batches were not compared in this profile"
    rows = sorted(table.values(), key=lambda row: -row["updates"])
    row = _at_updates(rows[1:], 10)
    if isinstance(row, str):
        return row
    own = {"loss": row["loss"], "low": row["loss_low"], "high": row["loss_high"]}
    return _lost({**own, "baseline": rows[0]["auroc"]}, published=claim.value, rule="<")


def _tuned_updates(claim: Claim, found: Found) -> Measured | str:
    """The updates an epoch nearest to the claim's at which fine-tuning was measured."""
    if not (table := found.metrics["updates"]):
        return "batches were not compared in this profile"
    row = _at_updates(list(table.values()), claim.value)
    if isinstance(row, str):
        return row
    return Measured(
        row["updates"],
        claim.unit,
        claim.value,
        differs="chosen, not found: the loss there is the result",
    )


COUNTERPARTS: dict[str, tuple[str, Callable[[Claim, Found], Measured | str]]] = {
    "auroc/": ("03", _auroc),
    "leaking split/": ("02", _leak),
    "large batches/the study/": ("06", _large_batch),
    "large batches/Facebook/": ("06", _large_batch),
    "ladder/+ collapsed ensembles": ("06", _ensemble),
    "ladder/": ("06", _rung),
    "collapse/top-1/": ("06", _collapse),
    "baseline/speed": ("03", _speed),
    "baseline/epoch": ("03", _epoch),
    "baseline/": ("03", _percent_auroc),
    "rules/scratch/loss": ("06", _rule_loss),
    "rules/scratch/": ("06", _rule_reach),
    "rules/fine-tuning/loss": ("07", _tuned_loss),
    "rules/fine-tuning/updates": ("07", _tuned_updates),
    "batch norm/": ("05", _layers),
    **{prefix: ("08", find) for prefix, find in projections.COUNTERPARTS.items()},
}
NO_COUNTERPART = {  # looked at first
    "collapse/top-1/7": "what it was before is not printed",
    "collapse/top-5/": "an image has any number of 14 findings: there is no top-5",
    "large batches/IBM": "their recipe is not published with the figure",
    "large batches/You et al.": "their recipe, LARS without collapse, is no rung of our ladder",
    "large batches/iterations": "until convergence on ImageNet, which is not trained here",
    "scale/caffe-256/top": "ImageNet is not trained here",
    "scale/caffe-512/top": "ImageNet is not trained here",
    "hardware/caffe-448/peak": "a data sheet's, and an input of the share of the peak",
    "hardware/facebook-32/peak": "a data sheet's, and an input of the share of the peak",
    "hardware/you-1024/peak": "a data sheet's, and an input of the share of the peak",
    "hardware/caffe-448/time": "an input of the share of the peak, and of a node's speed in the "
    "model",
    "hardware/facebook-32/time": "an input of the share of the peak; those processors are not "
    "modelled",
    "hardware/you-1024/time": "an input of the share of the peak; that run is not modelled",
    "densenet/64/top-1": "ImageNet is not trained here",
    "densenet/128/top-1": "ImageNet is not trained here",
    "densenet/64/epochs": "a setting, not a result",
    "densenet/128/epochs": "a setting, not a result",
    "densenet/64/epoch": "an input: the speed of a node in notebook 08's plan",
    "densenet/128/epoch": "this run is not modelled",
    "rules/fine-tuning/batch": "fewer images: what makes a batch large is how few updates are left",
    "rules/fine-tuning/fewest": "a setting, not a result",
    "rules/fine-tuning/most": "a setting, not a result",
    "settings/chart": "a setting, not a result",
    "settings/command": "a setting, not a result",
    "settings/caffe": "a setting, not a result",
    "settings/second": "a setting, not a result",
    "settings/OMP": "a setting, not a result",
    "settings/HOROVOD": "a setting, not a result",
    "settings/int": "a setting, not a result",
    "settings/kmp": "a setting, not a result",
}
