"""What of a run answers a published figure: from a notebook's record, in the figure's unit."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from chexlib.evaluation.intervals import (
    CONTRADICTED,
    UNDECIDED,
    has_learnt,
    nothing_learnt,
    over_seeds,
)
from chexlib.ledger.published import (
    RELEASE,
    Claim,
    claims,
    published_batches,
    published_collapses,
    published_ladder,
)
from chexlib.ledger.records import Measured, Results, between

TOP_1 = "top-1 of 1,000 classes of photographs there, mean AUROC of 14 findings here"
IMAGENET = 1_281_167  # images of ImageNet-1K's training part
# Whose batches are answered by which rung of our ladder.
RUNGS = {"the study": "+ weight-decay scaling", "Facebook": "+ warm-up"}
POINTS = 5  # by which a projected efficiency may be off
PERCENT = 5  # by which a projected speed may be
NOT_RUN = "the trainings that answer it have not been run"
ITSELF = "itself"  # in place of a notebook: the source's own figures answer


def _beside(claim: Claim, value: float, **how) -> Measured:
    """A figure of ours in the unit of the published one."""
    return Measured(value, claim.unit, claim.value, **how)


# Notebooks 02, 03 and 05: data, baseline and batch-norm layers


def _auroc(claim: Claim, results: Results) -> Measured | str:
    row = results.record.auroc[claim.item]
    if row["auroc"] is None:
        return "the test part has images of one class only"
    estimate = between(row, "auroc", 100.0 if claim.unit == "%" else 1.0)
    return _beside(claim, **estimate, differs=_other_images(claim, results))


def _other_images(claim: Claim, results: Results) -> str:
    """Why the images behind two AUROCs cannot be compared, "" where they can."""
    split = results.record.split
    images = sum(split["images"].values())
    if "synthetic" in results.record.data:
        return "our images are synthetic"
    if claim.split == "leaks":
        return "its split leaks patients"
    if claim.split == "not printed":
        return "its split is not printed"
    if images < 0.99 * RELEASE:
        return f"{images:,} of the release's {RELEASE:,} images"
    if split["name"] != claim.split:
        return f"another split: ours is {split['name']}"
    return ""


def _speed(claim: Claim, results: Results) -> Measured:
    machine = results.environment.get("processor") or "another processor"
    cores = results.environment.get("cores")
    differs = f"{results.params['size']} px on {machine}, {cores} cores"
    return _beside(claim, results.record.images_per_second, differs=differs)


def _epoch(claim: Claim, results: Results) -> Measured:
    """Hours for the release's training part (70 %) at the speed of `_speed`."""
    speed = _speed(claim, results)
    return _beside(claim, 0.7 * RELEASE / speed.value / 3600, differs=speed.differs)


def _leak(claim: Claim, results: Results) -> Measured:
    share = results.record.test_images_seen_in_training["image"]
    return _beside(claim, 100 * share, differs="our split by image, of our images")


def _layers(claim: Claim, results: Results) -> Measured:
    return _beside(claim, results.record.counts[claim.item], tolerance=0)


def _answer_of(claim: Claim, results: Results) -> Measured | str:
    """A claim that its notebook has judged."""
    answers = results.record.answers
    if claim.item not in answers:
        return NOT_RUN
    answer = answers[claim.item]
    if answer["mean"] is None:
        return answer["why"]
    ends = {name: answer[name] for name in ("low", "high", "word", "why", "scale")}
    return Measured(answer["mean"], claim.unit, claim.value, **ends)


# What a source says of itself, from its own figures


def _by_own_figures(claim: Claim) -> Measured:
    """Two figures of one source that cannot both be right, or are no loss by its own words.

    The interval is what rounding to the printed digits leaves open.
    """
    values = {other.key: other.value for other in claims()}
    if claim.item == "512 nodes":  # minutes were rounded to whole ones
        minutes_256, minutes_512 = values["scale/caffe-256/time"], values["scale/caffe-512/time"]
        share, low, high = (
            100 * 256 * (minutes_256 + half) / (512 * (minutes_512 - half))
            for half in (0.0, -0.5, 0.5)
        )
        word = CONTRADICTED if high < claim.value else UNDECIDED
        why = "its minutes on 256 and on 512 nodes are less than it says"
        return Measured(share, claim.unit, claim.value, low, high, word=word, why=why)
    if claim.item == "an epoch":
        epochs = [
            values[f"CheXNet on V100/{end}"] / values["CheXNet on V100/training images"]
            for end in ("fewest images", "most images")
        ]
        word = CONTRADICTED if min(epochs) > 1.5 else UNDECIDED
        why = "seconds x images/s of its seven rows are that many passes over its training images"
        return Measured(np.mean(epochs), claim.unit, claim.value, *epochs, word=word, why=why)
    lost = 100 * (1 - values["densenet/64/top-1"] / values["densenet/authors/top-1"])
    word = CONTRADICTED if lost < values["rules/scratch/loss"] else UNDECIDED
    why = "its own DenseNet-121 at batch 8,192 lost less than the 2 % that it calls no loss"
    return Measured(lost, claim.unit, claim.value, word=word, why=why)


# Notebook 06: recipes for large batches


def _gain(row: Mapping, published: float, *, suffix: str = "", **how) -> Measured:
    """A gain in mean AUROC, in % as the published one in top-1."""
    estimate = between(row, "gain", 100, suffix=suffix)
    return Measured(**estimate, unit="% AUROC", published=published, **how)


def _level(claim: Claim, auroc: float) -> Measured:
    """A mean AUROC beside a top-1, which cannot be compared."""
    return Measured(100 * auroc, "% AUROC", claim.value, differs=TOP_1)


def _highest(aurocs: Sequence[float | None]) -> float | None:
    return max(aurocs, key=lambda auroc: auroc or 0.0)


def _rung(claim: Claim, results: Results) -> Measured | str:
    """On our smallest batch: the study's ladder ends at its figure for 8K, which has as many
    updates per epoch.
    """
    by_batch, ladder = results.record.ladder, published_ladder()
    if not by_batch:
        return NOT_RUN
    rows = by_batch[min(by_batch, key=int)]
    trained = [rung for rung in ladder if rung in rows]
    if claim.item not in trained:
        return "this rung was not trained"
    position = trained.index(claim.item)
    row = rows[claim.item]
    if position == 0:
        return _level(claim, row["auroc"])
    before = trained[position - 1]
    highest = _highest([rows[before]["auroc"], row["auroc"]])
    if not has_learnt(highest):
        return nothing_learnt(highest)
    return _gain(row, ladder[claim.item] - ladder[before], rule="side of 0")


def _ensemble(claim: Claim, results: Results) -> Measured | str:
    """The gain over the best member, its interval over seeds; of one seed there is none, as of any
    one training.
    """
    seeds = pd.DataFrame(results.record.ensemble.values())
    if seeds.empty:
        return NOT_RUN
    member = seeds["member"].mean()
    if not has_learnt(member):
        return nothing_learnt(member)
    row = {"gain": seeds["gain"][0], "low": None, "high": None}
    if len(seeds) > 1:
        means = over_seeds(seeds.assign(all=0), ["all"], ["gain"])
        row = means.rename(columns={"mean": "gain"}).iloc[0]
    return _gain(row, claim.value - published_ladder()["+ collapse"], rule="side of 0")


def _collapse_row(claim: Claim, results: Results) -> Mapping:
    """The epoch that is as far into our training as the claim's point is into theirs."""
    rows = results.record.collapse
    epochs = sorted(rows, key=int)
    reached = math.ceil(claim.at / len(published_collapses()) * len(epochs))
    return rows[epochs[reached - 1]]


def _before_collapse(claim: Claim, results: Results) -> Measured | str:
    if not results.record.collapse:
        return NOT_RUN
    return _level(claim, _collapse_row(claim, results)["before"])


def _after_collapse(claim: Claim, results: Results) -> Measured | str:
    """A collapse is one epoch more, so it is judged over what the training itself had reached by
    then (`gain_later`), and the study's over what it had reached at its next point. Neither is
    known of the end of a training.
    """
    if not results.record.collapse:
        return NOT_RUN
    row = _collapse_row(claim, results)
    before = published_collapses()["before"]
    if row["gain_later"] is None or claim.at == before.index[-1]:
        differs = (
            "what one more epoch without a collapse had given is not known of the end of a training"
        )
        return _gain(row, claim.value - before[claim.at], differs=differs)
    highest = _highest([epoch["after"] for epoch in results.record.collapse.values()])
    if not has_learnt(highest):
        return nothing_learnt(highest)
    return _gain(row, claim.value - before[claim.at + 1], suffix="_later", rule="side of 0")


def _losses(results: Results, rung: str) -> list[Mapping]:
    """What each batch above the smallest loses, in % of the smallest's skill above chance, the
    smallest batch first.
    """
    return [row for row in results.record.losses if row["rung"] == rung]


def _at_updates(rows: Sequence[Mapping], updates: float) -> Mapping | str:
    """The row with about as many updates per epoch: at most twice or half as many."""
    if not rows:
        return NOT_RUN
    near = [row for row in rows if 0.5 <= row["updates"] / updates <= 2]
    if not near:
        return f"no batch of ours has about {updates:.0f} updates per epoch"
    return min(near, key=lambda row: abs(math.log(row["updates"] / updates)))


def _lost(row: Mapping | str, published: float, rule: str) -> Measured | str:
    """A loss in % of the smallest batch's skill, where that had learnt what can be lost."""
    if isinstance(row, str):
        return row
    if row["loss"] is None or not has_learnt(row["baseline"]):
        return nothing_learnt(row["baseline"])
    return Measured(**between(row, "loss"), unit="% of skill lost", published=published, rule=rule)


def _large_batch(claim: Claim, results: Results) -> Measured | str:
    rung, published = RUNGS[claim.series], published_batches()
    if claim.at == 8192:
        by_batch = results.record.auroc_by_batch
        if not by_batch:
            return NOT_RUN
        smallest = by_batch[min(by_batch, key=int)].get(rung)
        return "this rung was not trained" if smallest is None else _level(claim, smallest)
    row = _at_updates(_losses(results, rung), IMAGENET / claim.at)
    # Chance is 0.1 % of top-1.
    lost = 100 * (1 - claim.value / published.loc[claim.series, "8K"])
    # The point of the study's figure is how little is lost, that of the others that something is.
    return _lost(row, lost, "<" if claim.series == "the study" else "side of 0")


def _scratch_loss(claim: Claim, results: Results) -> Measured | str:
    return _lost(_at_updates(_losses(results, RUNGS["the study"]), 40), claim.value, "<")


def _kept_batches(results: Results) -> list[Mapping] | str:
    """The batches that lose less than 2 % with their whole interval."""
    losses = _losses(results, RUNGS["the study"])
    if not losses:
        return NOT_RUN
    learnt = [row for row in losses if row["loss"] is not None and has_learnt(row["baseline"])]
    if not learnt:
        return nothing_learnt(losses[0]["baseline"])
    kept = [row for row in learnt if row["high"] is not None and row["high"] < 2]
    return kept or "no batch of ours is known to lose less than 2 % of the skill above chance"


def _fewest_updates(claim: Claim, results: Results) -> Measured | str:
    kept = _kept_batches(results)
    if isinstance(kept, str):
        return kept
    return _beside(claim, min(row["updates"] for row in kept), rule="<=", tolerance=0)


def _largest_batch(claim: Claim, results: Results) -> Measured | str:
    kept = _kept_batches(results)
    if isinstance(kept, str):
        return kept
    differs = "fewer images: what makes a batch large is how few updates are left"
    return _beside(claim, max(row["batch"] for row in kept), differs=differs)


# Notebook 07: fine-tuning


def _tuned_loss(claim: Claim, results: Results) -> Measured | str:
    """Of fine-tuning, at about ten updates per epoch."""
    if not results.record.updates:
        return "the trainings that compare batches have not been run"
    rows = sorted(results.record.updates.values(), key=lambda row: -row["updates"])
    row = _at_updates(rows[1:], 10)
    if isinstance(row, str):
        return row
    estimate = {"loss": row["loss"], "low": row["loss_low"], "high": row["loss_high"]}
    return _lost({**estimate, "baseline": rows[0]["auroc"]}, claim.value, "<")


def _tuned_updates(claim: Claim, results: Results) -> Measured | str:
    """The updates per epoch nearest to the claim's at which fine-tuning was measured."""
    if not results.record.updates:
        return "the trainings that compare batches have not been run"
    row = _at_updates(list(results.record.updates.values()), claim.value)
    if isinstance(row, str):
        return row
    return _beside(claim, row["updates"], differs="chosen, not found: the loss there is the result")


# Notebooks 11, the model's projections and the formula, and 08, what is measured here


def _projection(claim: Claim, results: Results) -> dict[int, Mapping]:
    """The projection of the claim's system, by number of nodes."""
    table = results.record.projection[claim.series]
    return {int(nodes): row for nodes, row in table.items()}


def _projected(
    claim: Claim, results: Results, value: float, name: str, times: float = 1.0, **how
) -> Measured:
    """A projection, with least and most that the model says where what is not known of the system
    is another: `name` in the rows of `sensitivity`.
    """
    rows = [row for row in results.record.sensitivity if row["system"] == claim.series]
    span = [times * row[name] for row in rows]
    scale = f"the model: ResNet-50 on {claim.series}"
    return _beside(claim, value, low=min(span), high=max(span), scale=scale, **how)


def _projected_speed(claim: Claim, results: Results) -> Measured:
    speed = _projection(claim, results)[claim.at]["images_per_second"]
    tolerance = PERCENT / 100 * claim.value
    return _projected(claim, results, speed, f"images_per_second_{claim.at}", tolerance=tolerance)


def _projected_time(claim: Claim, results: Results) -> Measured:
    """Hours or minutes for 90 epochs: of the model they are its speed again, so they get no verdict
    of their own.
    """
    hours = _projection(claim, results)[claim.at]["solution_hours"]
    minutes = {"min": 1, "h": 60}[claim.unit]
    needed = 90 * IMAGENET / (60 * minutes * claim.value) / claim.at
    differs = (
        f"the model's time is 90 epochs at its speed on {claim.at} nodes: one number is tested "
        "once, there"
    )
    (run,) = (other for other in claims() if other.key == "hardware/caffe-448/time")
    node = 90 * IMAGENET / (60 * run.value) / run.at
    if needed > node:
        differs = (
            f"90 epochs in that time are {needed:.0f} images/s a node, where the deck's own node "
            f"has {node:.0f}: it is another number of epochs"
        )
    name = f"solution_hours_{claim.at}"
    return _projected(claim, results, 60 * hours / minutes, name, 60 / minutes, differs=differs)


def _projected_efficiency(claim: Claim, results: Results) -> Measured:
    """Over as many times one node."""
    share = _projection(claim, results)[claim.at]["efficiency"]
    name = f"efficiency_{claim.at}"
    return _projected(claim, results, 100 * share, name, 100, tolerance=POINTS)


def _projected_from_256(claim: Claim, results: Results) -> Measured:
    """Speed on 512 over twice that on 256 nodes."""
    table, speed = _projection(claim, results), "images_per_second"
    share = table[512][speed] / table[256][speed] / 2
    how = {"rule": claim.bound or "equal", "tolerance": POINTS}
    return _projected(claim, results, 100 * share, "further", 100, **how)


def _peak_share(claim: Claim, results: Results) -> Measured:
    """By the formula, from minutes that were rounded to whole ones: the interval is what that
    leaves open.
    """
    row = results.record.peak_percent[claim.series]
    differs = (
        "nothing is measured: the deck's own operations, minutes and peak, put into its formula"
    )
    ends = {"low": row["low"], "high": row["high"]}
    return _beside(claim, row["formula"], **ends, differs=differs, scale="the deck's formula")


def _solution(claim: Claim, results: Results) -> Measured | str:
    row = results.record.solution.get("densenet121")
    if row is None or row["seconds"] is None:
        return "DenseNet-121 was not trained to a solution in this profile"
    differs = (
        "this machine, to an AUROC on radiographs; there 64 or 128 nodes, to a top-1 on ImageNet"
    )
    return _beside(claim, row["seconds"] / 60, differs=differs)


def _keras_ratio(claim: Claim, results: Results) -> Measured | str:
    if "ratio" not in results.record.ratio:
        return "stock Keras was not measured in this profile"
    keras, tensorflow = (other.value for other in claims() if other.kind == claim.kind)
    differs = "one machine, stock Keras against ours; there 128 nodes, Keras against TensorFlow"
    return Measured(results.record.ratio["ratio"], "times", keras / tensorflow, differs=differs)


def _ranks(claim: Claim, results: Results) -> Measured:
    """Of the fastest layout; these are named "(ranks, threads)"."""
    layouts = results.record.layouts
    measured = [layout for layout, speed in layouts.items() if speed is not None]
    ranks, _ = ast.literal_eval(max(measured, key=layouts.get))
    return _beside(claim, ranks, differs="the fastest layout of another machine")


# By a claim's kind: the notebook that answers it, and how.
COUNTERPARTS: dict[str, tuple[str, Callable[..., Measured | str]]] = {
    "leaking share": ("02", _leak),
    "auroc": ("03", _auroc),
    "speed": ("03", _speed),
    "epoch": ("03", _epoch),
    "batch-norm layers": ("05", _layers),
    "claim of 05": ("05", _answer_of),
    "own figures": (ITSELF, _by_own_figures),
    "rung": ("06", _rung),
    "ensemble": ("06", _ensemble),
    "before collapse": ("06", _before_collapse),
    "after collapse": ("06", _after_collapse),
    "large batch": ("06", _large_batch),
    "loss from scratch": ("06", _scratch_loss),
    "largest batch": ("06", _largest_batch),
    "fewest updates": ("06", _fewest_updates),
    "claim of 07": ("07", _answer_of),
    "loss of fine-tuning": ("07", _tuned_loss),
    "updates of fine-tuning": ("07", _tuned_updates),
    "projected speed": ("11", _projected_speed),
    "projected time": ("11", _projected_time),
    "projected efficiency": ("11", _projected_efficiency),
    "projected efficiency from 256 nodes": ("11", _projected_from_256),
    "share of peak": ("11", _peak_share),
    "time to solution": ("11", _solution),
    "keras ratio": ("11", _keras_ratio),
    "ranks": ("08", _ranks),
}
