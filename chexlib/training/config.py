"""One training, described before it is run: frozen, validated when made, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chexlib.data.pipeline import AUGMENTATIONS
from chexlib.data.splits import fold_of
from chexlib.errors import ConfigError, did_you_mean, one_line
from chexlib.files import is_utf8
from chexlib.machine import native_precision
from chexlib.models.topologies import NORMS, SIZES, STEMS, TOPOLOGIES, WIDTHS
from chexlib.training.recipes import resolve

SPLITS = ("auto", "official", "patient", "image")
OPTIMIZERS = ("adam", "sgd", "nesterov", "adamw", "lamb", "lars")
PRECISIONS = ("float32", "mixed_bfloat16")
MOST = 2**63 - 1  # of whole numbers: what 64 bits hold
KEEPS = ("global_batch", "rank_batch")
# What may be another when a training is resumed: the rest decides what the training is.
FREE = (
    "data_dir",
    "run_dir",
    "epochs",
    "batch_size",
    "accumulation",
    "checkpoint_steps",
    "keep_checkpoints",
    "resume",
    "resume_keeps",
    "skip_broken",
    "allow_leak",
)


def _choice(among: tuple, default: str) -> str:
    """A field that holds one of a few names."""
    return field(
        default=default,
        metadata={"check": lambda value: value in among, "use": "one of " + ", ".join(among)},
    )


def _whole(least: int, default: int | None, most: int = MOST) -> int:
    """A field that holds a whole number, or None where that is its default."""

    def check(value) -> bool:
        if value is None:
            return default is None
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    use = f"a whole number from {least} to {most}"
    return field(default=default, metadata={"check": check, "use": use})


def _is_finite(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # False for NaN too; a whole number may be too long for a float.
    return is_number and abs(value) <= sys.float_info.max


def _number(within: str, check: Callable[[float], bool], default: float) -> float:
    """A field that holds a finite number."""

    def is_accepted(value) -> bool:
        return _is_finite(value) and check(value)

    return field(default=default, metadata={"check": is_accepted, "use": f"a number {within}"})


def _flag(default: bool) -> bool:
    """A field that holds true or false."""
    check = {"check": lambda value: isinstance(value, bool), "use": "true or false"}
    return field(default=default, metadata=check)


def _is_path(value) -> bool:
    named = isinstance(value, str | os.PathLike) and "\0" not in os.fspath(value)
    return named and is_utf8(value)


def _path(**settings) -> str:
    """A field that holds a path."""
    return field(metadata={"check": _is_path, "use": "a path, in UTF-8"}, **settings)


# Settings of older files that are gone, with the values that mean what is done now.
RETIRED = {"plateau_patience": 1, "early_stop": 0, "stream_images": 0}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `fit`. The defaults are CheXNet's recipe (Rajpurkar et al. 2017, section 3.1).

    Every field declares what it accepts; a value that is not accepted is a ConfigError that names
    the field, the value and what to use instead.
    """

    # Data:
    # Folder in the NIH layout.
    data_dir: str = _path()
    # "auto", "official", "patient", "image", or a fold of a cross-validation: "fold-1-of-5".
    split: str = field(
        default="auto",
        metadata={
            "check": lambda value: value in SPLITS or bool(fold_of(str(value))),
            "use": f"one of {', '.join(SPLITS)}, or a fold: fold-1-of-5",
        },
    )
    # Seed of the split and of the choice of max_images. None: `seed`. Set it to compare trainings
    # of several seeds on the same data.
    split_seed: int | None = _whole(0, None)
    # Use about this many images, always whole patients. 0: all.
    max_images: int = _whole(0, 0)
    # Use at most so many images of the training part, drawn by split_seed. 0: all of them.
    train_images: int = _whole(0, 0)
    # Side of the input in pixels.
    size: int = _whole(SIZES[0], 224, SIZES[1])
    # Random area and aspect: "none", "study" (0.08 to 1, 3/4), "radiograph" (0.7 to 1, 9/10).
    augment: str = _choice(tuple(AUGMENTATIONS), "none")
    # Random horizontal flip.
    mirror: bool = _flag(True)
    # Leave out images that cannot be decoded, instead of stopping at the first.
    skip_broken: bool = _flag(False)
    # Go on although patients are shared between the parts of the split.
    allow_leak: bool = _flag(False)
    # Control: the training labels are permuted, so that there is nothing to learn.
    shuffle_labels: bool = _flag(False)

    # Model:
    topology: str = _choice(TOPOLOGIES, "densenet121")
    # Share of the published channels, see models/topologies.py.
    width: float = _number(
        f"among {', '.join(map(str, WIDTHS))}", lambda value: value in WIDTHS, 1.0
    )
    # "full": the published first convolution; "small": one of stride 1, for images of 32 pixels.
    stem: str = _choice(STEMS, "full")
    # Starting weights: None, "imagenet", or a file.
    weights: str | None = field(
        default=None,
        metadata={
            "check": lambda value: value is None or _is_path(value),
            "use": "a path, 'imagenet' or null",
        },
    )
    # Draw the last layer anew, whatever the weights hold.
    fresh_head: bool = _flag(False)
    # Which images give the statistics that normalise in training, see models/topologies.py.
    norm: str = _choice(NORMS, "batch")
    # Images of a virtual batch, for norm="ghost".
    ghost_size: int = _whole(0, 0)
    # Share of the layers of batch norm, spread evenly, that are group norm instead.
    group_share: float = _number("from 0 to 1", lambda value: 0 <= value <= 1, 0.0)
    # Momentum of batch norm's moving statistics; PyTorch, and so CheXNet, calls this 0.1.
    norm_momentum: float = _number("from 0 to below 1", lambda value: 0 <= value < 1, 0.9)
    # Training images that give batch norm its moving statistics before the first step. 0: none.
    recalibrate: int = _whole(0, 0)
    # Where all biases of a fresh head start. None: at the log-odds of each finding.
    head_bias: float | None = field(
        default=None,
        metadata={
            "check": lambda value: value is None or _is_finite(value),
            "use": "a number or null",
        },
    )
    # Type of the backbone's computations; "auto" is what this processor is made for.
    precision: str = _choice((*PRECISIONS, "auto"), "auto")

    # Optimizer:
    optimizer: str = _choice(OPTIMIZERS, "adam")
    learning_rate: float = _number("above 0 and up to 1e30", lambda value: 0 < value <= 1e30, 1e-3)
    # L2 of kernels in sgd, nesterov and lars; apart from the gradient in adamw and lamb.
    weight_decay: float = _number("from 0 to 1e30", lambda value: 0 <= value <= 1e30, 0.0)
    # Layer-wise learning-rate decay: the rate of each stage over that of the stage after it, the
    # head being last. 0: only the head is trained.
    stage_rate: float = _number("from 0 to 1", lambda value: 0 <= value <= 1, 1.0)
    # Images per micro-batch, which are normalised together.
    batch_size: int = _whole(1, 16)
    # Micro-batches per rank and step. The global batch is ranks x accumulation x batch_size.
    accumulation: int = _whole(1, 1)

    # Schedule:
    epochs: int = _whole(1, 10)
    # Steps per epoch at most. 0: every image once.
    max_steps: int = _whole(0, 0)
    # A preset's name, or a description (chexlib.training.recipes.resolve), of rate, momentum and
    # weight decay. "": a constant rate, multiplied by plateau_factor after an epoch in which the
    # validation loss did not fall by more than plateau_delta.
    schedule: str | dict = ""
    plateau_factor: float = _number("above 0 and up to 1", lambda value: 0 < value <= 1, 0.1)
    plateau_delta: float = _number("of 0 or more", lambda value: value >= 0, 0.0)

    # Run:
    # Folder for model, history, predictions and checkpoints.
    run_dir: str = _path()
    # Seed of weights, order, mirroring and crops; and of the split, where split_seed is None.
    seed: int = _whole(0, 0)
    # Write a checkpoint every so many steps, besides the one per epoch. 0: none besides.
    checkpoint_steps: int = _whole(0, 0)
    # The newest so many checkpoints stay in run_dir/checkpoints. 0 writes none.
    keep_checkpoints: int = _whole(0, 2)
    # Keep the model of each epoch's end in run_dir/snapshots.
    snapshots: bool = _flag(False)
    # Go on from the newest checkpoint in run_dir, if there is one.
    resume: bool = _flag(False)
    # Resumed with another number of ranks: keep the "global_batch", or the "rank_batch" and scale
    # the learning rate.
    resume_keeps: str = _choice(KEEPS, "global_batch")

    def __post_init__(self):
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            accepts = setting.metadata.get("check")
            if accepts and not accepts(value):
                use = setting.metadata["use"]
                raise ConfigError(f"{setting.name}={value!r:.80} is not accepted. Use {use}.")
        self._check_schedule()
        self._check_together()
        # Plain values, and absolute paths: engines may start in another folder than the notebook.
        self._set("width", float(self.width))
        self._set("data_dir", str(Path(self.data_dir).absolute()))
        self._set("run_dir", str(Path(self.run_dir).absolute()))
        if self.weights != "imagenet":
            self._set("weights", str(Path(self.weights).absolute()) if self.weights else None)
        if self.precision == "auto":
            self._set("precision", native_precision())

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _check_together(self) -> None:
        """Refuse settings that are accepted one by one, and do not go together."""
        if (self.norm == "ghost") != (self.ghost_size > 0):
            raise ConfigError(
                f"ghost_size={self.ghost_size!r} is not accepted with norm={self.norm!r}. Use 1 or "
                "more for ghost, and 0 for every other norm."
            )
        if self.group_share and self.norm in ("group", "none"):
            raise ConfigError(
                f"group_share={self.group_share!r} is not accepted with norm={self.norm!r}. Use 0, or "
                "a kind of batch norm."
            )
        if self.norm == "sync" and self.accumulation > 1:
            raise ConfigError(
                f'accumulation={self.accumulation!r} is not accepted with norm="sync": a rank takes '
                "its micro-batches one after the other, and they cannot share their statistics. Use "
                "more ranks, or a larger batch_size."
            )

    def _check_schedule(self) -> None:
        asked = self.schedule
        try:
            if isinstance(asked, str) and asked.startswith("{"):
                asked = json.loads(asked)
            if not isinstance(asked, str | dict):
                raise ConfigError("use the name of a preset, or a JSON object.")
            if asked:
                resolve(asked, images=10**6, global_batch=1, epochs=self.epochs)
        except Exception as error:  # JSON of another form makes a schedule raise nearly anything
            raise ConfigError(
                f"schedule={self.schedule!r:.200} is not accepted: {one_line(error)}"
            ) from error
        self._set("schedule", json.loads(json.dumps(asked)))  # as a checkpoint gives it back
        if asked and self.weight_decay:
            raise ConfigError(
                f"weight_decay={self.weight_decay!r} is not accepted with a schedule, which has its own. "
                "Use 0."
            )

    def replace(self, **changes) -> TrainConfig:
        """A copy with `changes`, validated again."""
        return dataclasses.replace(self, **changes)

    def network(self) -> dict:
        """The settings of `build_model` that decide layers and shapes, as the card of a model has
        them.
        """
        return {name: getattr(self, name) for name in ("topology", "width", "stem", "size")}

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def require_same(self, other: dict, *, where: str) -> None:
        """Check that `other`, the settings of a training to be resumed, describe this training.

        Raises
        ------
        ConfigError
            A setting that decides what the training is has another value there; the message has
            both.
        """
        # What chexlib had no setting for then.
        later = {"width": 1.0, "stem": "full", "train_images": 0, "group_share": 0.0}
        later |= {"head_bias": None, "plateau_delta": 0.0}
        other = {**later, **other}
        mine = {name: value for name, value in self.to_dict().items() if name not in FREE}
        asked = (
            {"preset": self.schedule}
            if self.schedule and isinstance(self.schedule, str)
            else self.schedule
        )
        if "preset" in asked and "epochs" not in asked:
            mine["epochs"] = self.epochs  # the preset is stretched over them
        if changed := [name for name, value in mine.items() if other.get(name) != value]:
            pairs = ", ".join(
                f"{name}={other.get(name)!r} there and {mine[name]!r} now" for name in changed
            )
            raise ConfigError(
                f"{where} is of another training: {pairs}. Resume with its settings, or start anew "
                "with resume=false."
            )

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """Make a config from plain values; a name that is no setting is an error."""
        if not isinstance(values, dict):
            raise ConfigError(
                f"settings must be names with values, got {values!r:.80}. Write a JSON object, such as "
                '{"data_dir": "data/nih", "run_dir": "runs/mine"}.'
            )
        values = {name: value for name, value in values.items() if not _is_retired(name, value)}
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            accepted = [field.name for field in dataclasses.fields(cls)]
            raise ConfigError(
                f"there is no setting {', '.join(unknown)}.{did_you_mean(unknown[0], accepted)} Use some "
                f"of {', '.join(accepted)}."
            )
        needed = ("data_dir", "run_dir")
        if missing := [name for name in needed if name not in values]:
            raise ConfigError(
                f"the settings lack {' and '.join(missing)}. Add the path of a folder for each."
            )
        return cls(**values)


def _is_retired(name: str, value) -> bool:
    """Whether a setting of an older file can be left out, as nothing else is done today."""
    return name in RETIRED and value == RETIRED[name]
