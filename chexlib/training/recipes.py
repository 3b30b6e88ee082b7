"""The published recipes as schedules, and how they are scaled to another data set, batch and
budget.

Both families of the study are in its authors' solver files (sara-nl/caffe,
models/intel_optimized_models/multinode, resnet50_448nodes and resnet50_custom_lr) and in
src/caffe/solvers/sgd_solver.cpp there. "coded" is what those compute: the polynomial counts its
solver's iterations with the warm-up's, so the rate drops where the warm-up ends, 4.8 to 4.534 and
1.6 to 1.467. "meant" counts from the end of the warm-up. That this was meant is seen in the rate
that each next file starts from: 4.8 x 402 / 7594 = 0.254, 1.6 x 10920 / 17160 = 1.02, 0.764 / 4 =
0.19, 0.572 / 4 = 0.143.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from chexlib.errors import ConfigError
from chexlib.training.schedules import RULES, Schedule

RECIPES = Path(__file__).with_name("recipes.json")  # as published


def _read(group: str) -> dict[str, Schedule]:
    """The schedules of one group of `RECIPES`, by name."""
    recipes = json.loads(RECIPES.read_text(encoding="utf-8"))[group]
    for recipe in recipes.values():
        recipe.pop("source", None)  # where it is published: for readers of the file
    return {name: Schedule.from_dict(recipe) for name, recipe in recipes.items()}


def _stretch(schedule: Schedule, steps: int) -> Schedule:
    """The same shape in so many steps."""
    factor = steps / schedule.length

    def times(value):
        return value if value is None else value * factor

    phases = [
        dataclasses.replace(
            phase,
            at=tuple(place * factor for place in phase.at),
            **{name: times(getattr(phase, name)) for name in ("length", "warmup", "zero")},
        )
        for phase in schedule.phases
    ]
    decay = tuple((place * factor, value) for place, value in schedule.decay)
    return dataclasses.replace(schedule, phases=tuple(phases), decay=decay, unit="steps")


# The study's ladder, rung by rung, at equal epochs and one peak. Each has what the one before has,
# and one part more.
LADDER = _read("ladder")
PRESETS = _read("presets")
# Without its end: for an ensemble of collapses from each part of it.
PRESETS["64-nodes-cycles"] = dataclasses.replace(
    PRESETS["64-nodes-meant"], phases=PRESETS["64-nodes-meant"].phases[:-1]
)
# Published are batch, 2,100 iterations and accuracy (about 74 %): the shape of the 448 nodes, its
# peak by the square root.
_OF_448 = dataclasses.replace(PRESETS["448-nodes-meant"], global_batch=65536)
PRESETS["64k"] = _stretch(_OF_448, 2100).multiply(math.sqrt(65536 / 14336))
PRESETS = {name: dataclasses.replace(made, name=name) for name, made in PRESETS.items()}


def preset(name: str, **scaling) -> Schedule:
    """A published recipe: as it is, or with `scaling` as by `scale`.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}. Use one of {', '.join(PRESETS)}.")
    return scale(PRESETS[name], **scaling) if scaling else PRESETS[name]


def scale(
    schedule: Schedule,
    *,
    images: int,
    global_batch: int,
    epochs: float | None = None,
    rule: str = "linear",
    peak: float | None = None,
    warmup: str = "epochs",
) -> Schedule:
    """Fit a schedule to another data set, global batch and budget; `notes` of the result say what
    was scaled.

    Parameters
    ----------
    images : int
        Of an epoch; an epoch is as many steps as they fill batches, the last one included.
    global_batch : int
    epochs : float, optional
        The budget, over which all phases are stretched alike. None keeps the schedule's own epochs.
    rule : {"linear", "sqrt", "none"}
        How rates follow the global batch (Goyal et al. 2017, section 2.1; Krizhevsky 2014, section
        5).
    peak : float, optional
        The highest rate, instead of what the rule gives.
    warmup : {"epochs", "batch"}
        Warm-ups keep their share of the epochs, or follow the global batch too, taking from, or
        leaving to, the phase that follows.

    Raises
    ------
    ConfigError
        A setting that is not accepted.
    """
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r} is not known. Use one of {', '.join(RULES)}.")
    if warmup not in ("epochs", "batch"):
        raise ConfigError(f"warmup={warmup!r} is not known. Use 'epochs' or 'batch'.")
    for name, value in (
        ("images", images),
        ("global_batch", global_batch),
        ("epochs", epochs),
        ("peak", peak),
    ):
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ConfigError(f"{name}={value!r} is not accepted. Use a number above 0.")
    own_batch, notes = schedule.global_batch or global_batch, list(schedule.notes)
    own_epoch = 1.0 if schedule.unit == "epochs" else (schedule.images or images) / own_batch
    own_epochs, steps_an_epoch = schedule.length / own_epoch, -(-images // global_batch)
    epochs = own_epochs if epochs is None else epochs
    if warmup == "batch" and global_batch != own_batch:
        schedule = _warm_up_by(schedule, global_batch / own_batch)
        notes.append(f"warm-ups: x {global_batch / own_batch:.4g}, as the global batch")
    steps = round(epochs * steps_an_epoch)
    scaled = _stretch(schedule, steps)
    notes.append(
        f"length: {own_epochs:.4g} epochs -> {epochs:.4g} of {steps_an_epoch:,} steps, {steps:,} "
        "in all"
    )
    highest = max(r for p in schedule.phases for r in (p.rate, p.start) if r is not None)
    factor = peak / highest if peak else (global_batch / own_batch) ** RULES[rule]
    why = "as asked" if peak else f"{rule} rule, global batch {own_batch:,} -> {global_batch:,}"
    notes.append(f"rates: x {factor:.4g} ({why}), peak {highest:.4g} -> {highest * factor:.4g}")
    notes.append(
        "weight decay and momentum: as they were; in a warm-up momentum is multiplied by the "
        "growth of the rate (Goyal et al. 2017, remark 2)"
    )
    scaled = scaled.multiply(factor)
    return dataclasses.replace(scaled, images=images, global_batch=global_batch, notes=tuple(notes))


def resolve(asked: str | dict, *, images: int, global_batch: int, epochs: float) -> Schedule:
    """The schedule that `TrainConfig.schedule` asks for, for a training of this size.

    Parameters
    ----------
    asked : str or dict
        Name of a preset or of a rung of `LADDER`; or {"preset": name} with settings of `scale`; or
        a schedule's own values, which are taken as they are but for what differs from their own
        `global_batch`, if they name one.
    """
    asked = {"preset": asked} if isinstance(asked, str) else dict(asked)
    if "preset" not in asked:
        made = Schedule.from_dict(asked)
        return made.multiply(global_batch / made.global_batch) if made.global_batch else made
    name = asked.pop("preset")
    if unknown := sorted(set(asked) - {"epochs", "rule", "peak", "warmup"}):
        raise ConfigError(
            f"a preset has no setting {', '.join(unknown)}. Use epochs, rule, peak and warmup."
        )
    made = LADDER[name] if name in LADDER else preset(name)
    return scale(
        made, **{"images": images, "global_batch": global_batch, "epochs": epochs, **asked}
    )


def _warm_up_by(schedule: Schedule, factor: float) -> Schedule:
    """Warm-ups `factor` as long, at most nine tenths of what they and the phase after them take."""
    phases = list(schedule.phases)
    for i, phase in enumerate(phases):
        if phase.kind == "cycle":
            phases[i] = dataclasses.replace(
                phase, warmup=min(phase.warmup * factor, 0.9 * phase.length)
            )
        elif phase.kind == "warmup" and i + 1 < len(phases):
            both = phase.length + phases[i + 1].length
            length = min(phase.length * factor, 0.9 * both)
            phases[i] = dataclasses.replace(phase, length=length)
            phases[i + 1] = dataclasses.replace(phases[i + 1], length=both - length)
    return dataclasses.replace(schedule, phases=tuple(phases))
