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
import math

from chexlib.errors import ConfigError
from chexlib.training.schedules import RULES, Schedule

IMAGENET = 1_281_167  # images of ImageNet-1K's training part
LOW, MIDDLE = 5e-5, 1e-4  # weight decay of the study's solver files


def _nodes_448(count: str, zero: int) -> list[dict]:
    return [
        {"kind": "warmup", "length": 446, "start": 0.1, "rate": 4.8, "weight_decay": LOW},
        {
            "kind": "polynomial",
            "length": 7192,
            "rate": 4.8,
            "zero": zero,
            "count": count,
            "weight_decay": LOW,
        },
        {"kind": "collapse", "length": 402, "rate": 0.254, "weight_decay": MIDDLE, "fresh": True},
    ]


def _nodes_64(count: str, zero: int) -> list[dict]:
    again = {
        "kind": "cycle",
        "length": 4750,
        "warmup": 1000,
        "power": 2,
        "zero": 7500,
        "count": count,
        "fresh": True,
    }
    first = {
        "kind": "cycle",
        "length": 3750,
        "power": 2,
        "zero": 7500,
        "count": count,
        "fresh": True,
    }
    phases = [
        {"kind": "warmup", "length": 1560, "start": 0.1, "rate": 1.6},
        {"kind": "polynomial", "length": 6240, "rate": 1.6, "zero": zero, "count": count},
        {**first, "rate": 1.02, "name": "cycle 1"},
        {**again, "start": 0.255, "rate": 0.764, "name": "cycle 2"},
        {**again, "start": 0.19, "rate": 0.572, "name": "cycle 3"},
    ]
    collapse = {
        "kind": "collapse",
        "length": 1560,
        "rate": 0.143,
        "weight_decay": 2e-4,
        "fresh": True,
    }
    return [*({**phase, "weight_decay": LOW} for phase in phases), collapse]


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


def _large(batch: int, **settings) -> Schedule:
    return Schedule(images=IMAGENET, global_batch=batch, **settings)


_WARMUP = {"kind": "warmup", "length": 5, "start": 0.1, "rate": 4.8}
_DECAYED = {"kind": "polynomial", "length": 85, "rate": 4.8}
_STEPS = {"kind": "step", "length": 90, "rate": 4.8, "at": (30, 60, 80)}
# At 0, 1/4, 1/2 and 0.65 of all epochs.
_SCALED = ((0, 5e-5), (22.5, 1e-4), (45, 2e-4), (58.5, 4e-4))

# The study's ladder, rung by rung, at equal epochs and one peak. Each has what the one before has,
# and one part more.
LADDER = {
    "step decay": _large(14336, unit="epochs", decay=((0, LOW),), phases=[_STEPS]),
    "+ warm-up": _large(
        14336, unit="epochs", decay=((0, LOW),), phases=[_WARMUP, {**_STEPS, "length": 85}]
    ),
    "+ polynomial decay": _large(
        14336, unit="epochs", decay=((0, LOW),), phases=[_WARMUP, _DECAYED]
    ),
    "+ weight-decay scaling": _large(
        14336, unit="epochs", decay=_SCALED, phases=[_WARMUP, _DECAYED]
    ),
    "+ collapse": _large(
        14336,
        unit="epochs",
        decay=_SCALED,
        phases=[
            _WARMUP,
            {**_DECAYED, "length": 80.5, "zero": 85},
            {"kind": "collapse", "length": 4.5, "weight_decay": 8e-4, "fresh": True},
        ],
    ),
}

PRESETS = {
    # Solver files resnet50_448nodes: batch 14,336, 76.1 % with the collapse.
    "448-nodes-coded": _large(14336, phases=_nodes_448("stage", 8040)),
    "448-nodes-meant": _large(14336, phases=_nodes_448("phase", 7594)),
    # Solver files resnet50_custom_lr: batch 4,096, 72 epochs, 76.3 %.
    "64-nodes-coded": _large(4096, phases=_nodes_64("stage", 18720)),
    "64-nodes-meant": _large(4096, phases=_nodes_64("phase", 17160)),
    # The same without its end: for an ensemble of collapses from each part of it.
    "64-nodes-cycles": _large(4096, phases=_nodes_64("phase", 17160)[:-1]),
    # Published are batch, 2,100 iterations and accuracy (about 74 %): shape of the 448 nodes, peak
    # by the square root.
    "64k": _stretch(_large(65536, phases=_nodes_448("phase", 7594)), 2100).multiply(
        math.sqrt(65536 / 14336)
    ),
    # Goyal et al. 2017, sections 2 and 5.1: 0.1 for 256 images, 5 epochs of warm-up, a tenth at 30,
    # 60 and 80 of 90.
    "goyal-2017": _large(
        8192,
        unit="epochs",
        decay=((0, 1e-4),),
        phases=[
            {"kind": "warmup", "length": 5, "start": 0.1, "rate": 3.2},
            {"kind": "step", "length": 85, "rate": 3.2, "at": (30, 60, 80)},
        ],
    ),
    # Rajpurkar et al. 2017, section 3.1: constant for Adam; a tenth on each plateau of the
    # validation loss.
    "chexnet": Schedule(
        unit="epochs",
        phases=[{"kind": "constant", "length": 10, "rate": 1e-3, "augment": False}],
        images=78_468,
        global_batch=16,
        plateau=True,
    ),
}
PRESETS = {name: dataclasses.replace(made, name=name) for name, made in PRESETS.items()}


def preset(name: str, **scaling) -> Schedule:
    """A published recipe: as it is, or with `scaling` as by `scale`.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}. There are: {', '.join(PRESETS)}.")
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
