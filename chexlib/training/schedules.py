"""Learning-rate schedules: phases of rate, momentum and weight decay, as one value per update.

A phase or schedule is checked when it is made: a ConfigError names the field and its value.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from chexlib.errors import ConfigError


def is_amount(value) -> bool:
    """Whether a value is a finite number of 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def require_known(thing, **known) -> None:
    """Refuse a field whose value is not among those that are known for it."""
    for name, accepted in known.items():
        if (value := getattr(thing, name)) not in accepted:
            whose, these = type(thing).__name__.lower(), ", ".join(map(str, accepted))
            raise ConfigError(f"a {whose}'s {name}={value!r} is not known. Use {these}.")


def require_amounts(thing, *names: str) -> None:
    """Refuse a field that is no finite number of 0 or more."""
    for name in names:
        if not is_amount(value := getattr(thing, name)):
            whose = type(thing).__name__.lower()
            raise ConfigError(
                f"a {whose}'s {name}={value!r} is not accepted. Use a number of 0 or more."
            )


def rising(name: str, places) -> tuple[float, ...]:
    """The places as a tuple; a search among them is silently wrong where one does not lie above the
    one before.
    """
    found = tuple(places) if isinstance(places, Iterable) else (None,)
    if not all(map(is_amount, found)) or list(found) != sorted(set(found)):
        raise ConfigError(
            f"{name}={places!r} is not accepted. Use numbers of 0 or more, each above the one "
            "before."
        )
    return found


KINDS = ("warmup", "constant", "step", "polynomial", "cosine", "cycle", "collapse")
UNITS = ("steps", "epochs")
COUNTS = ("stage", "phase")
RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}  # exponent of the global batch in the rate


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of a schedule. Lengths are in the schedule's unit."""

    kind: str
    length: float
    # At its first step; of a warm-up or a cycle, the peak. None: where the one before ended.
    rate: float | None = None
    # Of a warm-up or a cycle: the rate it rises from. None: where the one before ended.
    start: float | None = None
    warmup: float = 0.0  # of a cycle: how much of its length is re-warm-up
    power: float | None = None  # of the polynomial; None: 1, or 2 in a collapse
    zero: float | None = None  # where the polynomial would reach 0; None: at the phase's end
    # From where that is counted: "phase", or "stage", the solver's own start, warm-up included.
    count: str = "phase"
    end: float = 0.0  # of a cosine: the rate that it falls to
    # Of a step: where the rate is multiplied by `factor`, from the stage's start.
    at: tuple[float, ...] = ()
    factor: float = 0.1
    weight_decay: float | None = None  # None: what `Schedule.decay` says
    augment: bool | None = None  # random area and aspect; None: on, but in a collapse off
    # Begins a stage: only weights are taken over, all history of the optimizer is forgotten.
    fresh: bool = False
    name: str = ""

    def __post_init__(self):
        require_known(
            self, kind=KINDS, count=COUNTS, augment=(None, True, False), fresh=(True, False)
        )
        object.__setattr__(self, "at", rising("a phase's at", self.at))
        optional = ("rate", "start", "power", "zero", "weight_decay")
        given = [name for name in optional if getattr(self, name) is not None]
        require_amounts(self, "length", "warmup", "end", "factor", *given)
        for name in ("length", "power", "zero"):
            if getattr(self, name) == 0:
                raise ConfigError(f"a phase's {name}=0 is not accepted. Use a number above 0.")
        if self.kind == "cycle" and not self.warmup < self.length:
            raise ConfigError(
                f"a cycle's warmup={self.warmup:g} fills its length={self.length:g}. Make it "
                "shorter."
            )
        collapse = self.kind == "collapse"
        defaults = {"power": 2 if collapse else 1, "augment": not collapse, "name": self.kind}
        for name, default in defaults.items():
            if getattr(self, name) in (None, ""):
                object.__setattr__(self, name, default)


@dataclass(frozen=True)
class Values:
    """A schedule step by step, all of shape (steps,): float64 rate, momentum, weight_decay; bool
    augment, fresh.

    `phase` (steps,) int numbers the phases, named in `names`. Momentum is that of Keras' and
    Caffe's form, in which the velocity holds the rate; in a warm-up, and in the step after it that
    has the full rate, it is multiplied by rate(i) / rate(i - 1) (Goyal et al. 2017, remark 2). A
    phase with count="stage" is one of the authors' solver as coded, which stops a step earlier:
    there the step after the warm-up is not corrected.
    """

    rate: np.ndarray
    momentum: np.ndarray
    weight_decay: np.ndarray
    augment: np.ndarray
    fresh: np.ndarray
    phase: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rate)

    def begin(self, index: int, *, at: int) -> Values:
        """The same values laid so that `index` comes at step `at`: for an optimizer that has
        counted otherwise.
        """
        places = np.maximum(np.arange(at - index + len(self)) - (at - index), 0)
        arrays = {
            f.name: getattr(self, f.name)[places]
            for f in dataclasses.fields(self)
            if f.name != "names"
        }
        return Values(**arrays, names=self.names)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases one after another.

    Compile it to values, or scale it first to another data set, batch and budget.
    """

    phases: tuple[Phase, ...]
    unit: str = "steps"
    momentum: float = 0.9
    # Weight decay from a place on, independent of the phases.
    decay: tuple[tuple[float, float], ...] = ((0, 0.0),)
    # What it was made for: images per epoch, and the global batch; 0: whatever it is used with.
    images: int = 0
    global_batch: int = 0
    plateau: bool = False  # the rate is also divided when validation stops improving
    name: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was scaled, in words

    def __post_init__(self):
        require_known(self, unit=UNITS, plateau=(True, False))
        require_amounts(self, "momentum", "images", "global_batch")
        if self.momentum >= 1:
            raise ConfigError(
                f"a schedule's momentum={self.momentum:g} is not accepted. Use a number below 1."
            )
        try:
            phases = tuple(p if isinstance(p, Phase) else Phase(**p) for p in self.phases)
            decay = tuple((place, value) for place, value in self.decay)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            known = ", ".join(f.name for f in dataclasses.fields(Phase))
            raise ConfigError(
                f"the schedule cannot be read ({error}). A phase has {known}."
            ) from error
        if not phases or not decay or decay[0][0] != 0:
            raise ConfigError("a schedule needs one phase or more, and a weight decay from 0 on.")
        rising("the places of a schedule's decay", [place for place, _ in decay])
        if wrong := [value for _, value in decay if not is_amount(value)]:
            raise ConfigError(
                f"a schedule's decay of {wrong[0]!r} is not accepted. Use numbers of 0 or more."
            )
        object.__setattr__(self, "phases", phases)
        object.__setattr__(self, "decay", decay)

    @property
    def length(self) -> float:
        """Length of all phases together, in the schedule's unit."""
        return sum(phase.length for phase in self.phases)

    def to_dict(self) -> dict:
        """Plain values for JSON, without what is at its default."""
        return _changed(self) | {"phases": [_changed(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, values: dict) -> Schedule:
        """Make a schedule from plain values; a name that it does not have is an error."""
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or "phases" not in values or set(values) - known:
            raise ConfigError(
                f"{values!r:.200} is not a schedule. Use an object with phases; it may have "
                f"{', '.join(known)}."
            )
        return cls(**values)

    def multiply(self, factor: float) -> Schedule:
        """The same with every rate multiplied by `factor`."""

        def times(rate):
            return rate if rate is None else rate * factor

        rates = ("rate", "start", "end")
        phases = [
            dataclasses.replace(p, **{n: times(getattr(p, n)) for n in rates}) for p in self.phases
        ]
        return dataclasses.replace(self, phases=tuple(phases))

    def compile(self, *, steps_per_epoch: float = 1.0) -> Values:
        """Values for every step.

        Parameters
        ----------
        steps_per_epoch : float
            What an epoch is, for a schedule in epochs.

        Raises
        ------
        ConfigError
            There are fewer steps than phases.
        """
        scale = steps_per_epoch if self.unit == "epochs" else 1.0
        parts = [part for phase in self.phases for part in _parts(phase)]
        ends = _ends_of(parts, scale)
        starts = [0, *ends[:-1]]
        steps = ends[-1]
        rates, momenta = [], []
        fresh = np.zeros(steps, bool)
        stage = 0  # the step at which the stage began
        last = 0.0  # the rate that the next phase goes on from
        risen = 0.0  # rate of the last step of a warm-up that has just ended
        for part, first, after in zip(parts, starts, ends, strict=True):
            if part.fresh:
                stage, fresh[first] = first, True
            rate = _rate(part, after - first, first - stage, scale, last)
            momentum = np.full(len(rate), self.momentum)
            if risen and not part.fresh and part.count != "stage":
                momentum[0] *= rate[0] / risen
            risen = 0.0
            last = rate[-1]
            if part.kind == "warmup":
                growth = np.ones(len(rate) - 1)
                np.divide(rate[1:], rate[:-1], out=growth, where=rate[:-1] > 0)
                momentum[1:] *= growth
                risen = rate[-1]
                # A warm-up ends one step short of its peak, from where the next phase goes on.
                last = rate[-1] if part.rate is None else part.rate
            rates.append(rate)
            momenta.append(momentum)
        phase = np.repeat(np.arange(len(parts)), np.subtract(ends, starts))
        return Values(
            rate=np.concatenate(rates),
            momentum=np.concatenate(momenta),
            weight_decay=self._weight_decay(parts, phase, scale),
            augment=np.array([part.augment for part in parts])[phase],
            fresh=fresh,
            phase=phase,
            names=tuple(part.name for part in parts),
        )

    def _weight_decay(self, parts: list[Phase], phase: np.ndarray, scale: float) -> np.ndarray:
        """Weight decay of each step: that of its phase, or else what `decay` says of its place."""
        places = np.round([place * scale for place, _ in self.decay])
        values = np.array([value for _, value in self.decay])
        latest = np.searchsorted(places, np.arange(len(phase)), side="right") - 1
        of_parts = [np.nan if part.weight_decay is None else part.weight_decay for part in parts]
        of_phase = np.array(of_parts)[phase]
        return np.where(np.isnan(of_phase), values[latest], of_phase)


def _ends_of(parts: list[Phase], scale: float) -> list[int]:
    """The step after the last one of each phase; every phase has at least one.

    Raises
    ------
    ConfigError
        There are fewer steps than phases.
    """
    lengths = np.cumsum([part.length for part in parts])
    ends = np.round(lengths * scale).astype(int)
    steps = ends[-1]
    if steps < len(parts):
        raise ConfigError(
            f"{steps} steps are too few for {len(parts)} phases. Train longer, or in smaller "
            "batches."
        )
    before = 0
    for i, end in enumerate(ends):
        left = len(ends) - 1 - i  # phases that follow
        ends[i] = before = min(max(end, before + 1), steps - left)
    return ends.tolist()


def _parts(phase: Phase) -> tuple[Phase, ...]:
    """A cycle is a re-warm-up and a polynomial; every other phase is itself."""
    if phase.kind != "cycle":
        return (phase,)
    rest = {"length": phase.length - phase.warmup, "kind": "polynomial"}
    if not phase.warmup:
        return (dataclasses.replace(phase, **rest),)
    rise = {"kind": "warmup", "length": phase.warmup, "name": f"{phase.name}: re-warm-up"}
    return (dataclasses.replace(phase, **rise), dataclasses.replace(phase, **rest, fresh=False))


def _rate(phase: Phase, n: int, before: int, scale: float, last: float) -> np.ndarray:
    """Rates of the n steps of a phase that has `before` steps of its stage before it; `last` is the
    rate until then.
    """
    step = np.arange(n, dtype=np.float64)
    base = last if phase.rate is None else phase.rate
    if phase.kind == "warmup":  # Caffe's GetWarmUpLR
        start = last if phase.start is None else phase.start
        return (step * base + (n - step) * start) / n
    if phase.kind == "step":
        places = np.round(np.array(phase.at) * scale)
        passed = np.searchsorted(places, step + before, side="right")
        return base * phase.factor**passed
    if phase.kind == "cosine":
        return phase.end + (base - phase.end) * (1 + np.cos(np.pi * step / n)) / 2
    if phase.kind == "constant":
        return np.full(n, float(base))
    counted = step + before if phase.count == "stage" else step
    zero = n if phase.zero is None else phase.zero * scale
    return base * np.maximum(1 - counted / zero, 0) ** phase.power


def _changed(thing) -> dict:
    """The fields of a dataclass that are not at their default, as JSON gives them back."""
    named = {
        f.name: getattr(thing, f.name)
        for f in dataclasses.fields(thing)
        if f.name not in ("phases", "notes")
    }
    default = {f.name: f.default for f in dataclasses.fields(thing)}
    return json.loads(
        json.dumps({name: value for name, value in named.items() if value != default[name]})
    )
