"""One training, described before it is run: frozen, validated when made, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from chexlib.data.pipeline import AUGMENTATIONS
from chexlib.data.splits import fold_of
from chexlib.errors import ConfigError
from chexlib.machine import native_precision
from chexlib.models.topologies import NORMS, STEMS, TOPOLOGIES, WIDTHS
from chexlib.training.recipes import resolve

SPLITS = ("auto", "official", "patient", "image")
OPTIMIZERS = ("adam", "sgd", "nesterov", "adamw", "lamb", "lars")
PRECISIONS = ("float32", "mixed_bfloat16")
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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `fit`. The defaults are CheXNet's recipe (Rajpurkar et al. 2017, section 3.1)."""

    data_dir: str  # folder in the NIH layout
    run_dir: str  # where model, history and predictions go
    topology: str = "densenet121"
    size: int = 224  # side of the input in pixels
    width: float = 1.0  # share of the published channels, see models/topologies.py
    stem: str = "full"  # the published one, or "small", for images of 32 pixels
    weights: str | None = None  # None, "imagenet", or a file
    # Images normalised together; the global batch is ranks x accumulation x batch_size.
    batch_size: int = 16
    accumulation: int = 1  # virtual ranks that a rank stands for, one after the other
    epochs: int = 10
    max_steps: int = 0  # steps an epoch at most; 0 means every image once
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    plateau_factor: float = 0.1  # the rate is multiplied by this when validation stops improving
    plateau_patience: int = 1  # epochs without improvement before that
    weight_decay: float = (
        # Of kernels only: L2 in sgd, nesterov and lars, apart from the gradient in adamw and lamb.
        0.0
    )
    # A preset's name, or a spec (chexlib.training.recipes.resolve): rate, momentum and decay.
    schedule: str | dict = ""
    # Random area and aspect: "none", "study" (0.08 to 1, 3/4), "radiograph" (0.7 to 1, 9/10).
    augment: str = "none"
    mirror: bool = True  # random horizontal flip
    precision: str = "auto"  # "float32", "mixed_bfloat16", or what this processor is made for
    norm: str = "batch"  # whose statistics normalise in training, see models/topologies.py
    ghost_size: int = 0  # images of a virtual batch, for norm="ghost"
    # Of batch norm's moving statistics; PyTorch, and so CheXNet, calls this 0.1.
    norm_momentum: float = 0.9
    # Each stage's rate over that of the stage after it, the head being last; 0: the head alone.
    stage_rate: float = 1.0
    fresh_head: bool = False  # draw the head anew, whatever the weights hold
    # Training images whose statistics take the place of the weights' own before the first step.
    recalibrate: int = 0
    early_stop: int = 0  # end after so many epochs without a better validation; 0: never
    # An epoch is so many new images like data_dir's phantom, instead of its training part.
    stream_images: int = 0
    snapshots: bool = False  # keep the model of each epoch's end in run_dir/snapshots
    split: str = "auto"  # or "fold-1-of-5" and so on: a cross-validation's
    allow_leak: bool = False  # go on although patients are shared between parts
    # Control: training labels dealt anew, so that there is nothing to learn.
    shuffle_labels: bool = False
    max_images: int = 0  # use about so many images, whole patients; 0 means all
    skip_broken: bool = False  # leave out images that cannot be decoded
    # Of weights, order, mirroring and crops; and of the data, unless split_seed says another.
    seed: int = 0
    # Of the split and of the choice of max_images: the same data for several seeds.
    split_seed: int | None = None
    checkpoint_steps: int = 0  # write a checkpoint every so many steps, besides one an epoch
    keep_checkpoints: int = 2  # the newest so many stay in run_dir/checkpoints; 0 writes none
    resume: bool = False  # go on from the newest checkpoint in run_dir, if there is one
    # At another number of ranks: "global_batch", or "rank_batch" and scale the rate.
    resume_keeps: str = "global_batch"

    def __post_init__(self):
        if self.precision == "auto":
            object.__setattr__(self, "precision", native_precision())
        for name, accepted in (
            ("topology", TOPOLOGIES),
            ("width", WIDTHS),
            ("stem", STEMS),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("augment", AUGMENTATIONS),
            ("norm", NORMS),
            ("resume_keeps", KEEPS),
        ):
            if (value := getattr(self, name)) not in accepted:
                raise ConfigError(
                    f"{name}={value!r} is not known. Use one of {', '.join(map(str, accepted))}."
                )
        if self.split not in SPLITS and not fold_of(str(self.split)):
            raise ConfigError(
                f"split={self.split!r} is not known. Use one of {', '.join(SPLITS)}, or a fold: "
                "fold-1-of-5."
            )
        for name, least in (
            ("size", 32),
            ("batch_size", 1),
            ("accumulation", 1),
            ("ghost_size", 0),
            ("epochs", 1),
            ("max_steps", 0),
            ("max_images", 0),
            ("plateau_patience", 0),
            ("seed", 0),
            ("split_seed", 0),
            ("recalibrate", 0),
            ("early_stop", 0),
            ("stream_images", 0),
            ("checkpoint_steps", 0),
            ("keep_checkpoints", 0),
        ):
            value = getattr(self, name)
            if name == "split_seed" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{name}={value!r} is not accepted. Use a whole number of {least} or more."
                )
        for name in (
            "mirror",
            "allow_leak",
            "shuffle_labels",
            "skip_broken",
            "resume",
            "fresh_head",
            "snapshots",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r} is not accepted. Use true or false.")
        for name in (
            "learning_rate",
            "norm_momentum",
            "plateau_factor",
            "weight_decay",
            "stage_rate",
            "width",
        ):
            value = getattr(self, name)
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not math.isfinite(value)
            ):
                raise ConfigError(f"{name}={value!r} is not accepted. Use a number.")
        object.__setattr__(self, "width", float(self.width))
        for name in ("data_dir", "run_dir", "weights"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike) and (
                name != "weights" or value is not None
            ):
                raise ConfigError(f"{name}={value!r} is not accepted. Use a path.")
        if not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate={self.learning_rate!r} is not accepted. Use a number above 0."
            )
        if not self.weight_decay >= 0:
            raise ConfigError(
                f"weight_decay={self.weight_decay!r} is not accepted. Use a number of 0 or more."
            )
        if not 0 <= self.stage_rate <= 1:
            raise ConfigError(
                f"stage_rate={self.stage_rate!r} is not accepted. Use 0 <= rate <= 1."
            )
        if self.stream_images and (
            self.augment != "none" or self.shuffle_labels or self.accumulation > 1
        ):
            raise ConfigError(
                f"stream_images={self.stream_images} goes with augment='none', accumulation=1 and "
                "labels as they are: the stream draws every image anew. Change these, or train on "
                "data_dir's own images."
            )
        self._check_schedule()
        if not 0 <= self.norm_momentum < 1:
            raise ConfigError(
                f"norm_momentum={self.norm_momentum!r} is not accepted. Use 0 <= momentum < 1."
            )
        if (self.norm == "ghost") != (self.ghost_size > 0):
            raise ConfigError(
                f"ghost_size={self.ghost_size!r} is not accepted with norm={self.norm!r}. Use 1 or "
                "more for ghost."
            )
        if self.norm == "sync" and self.accumulation > 1:
            raise ConfigError(
                f'accumulation={self.accumulation!r} is not accepted with norm="sync": virtual '
                "ranks are taken one "
                "after the other, and cannot share their statistics. Use more ranks, or a larger "
                "batch_size."
            )
        if not 0 < self.plateau_factor <= 1:
            raise ConfigError(
                f"plateau_factor={self.plateau_factor!r} is not accepted. Use 0 < factor <= 1."
            )
        # Engines may start in another folder than the notebook.
        for name in ("data_dir", "run_dir"):
            object.__setattr__(self, name, str(Path(getattr(self, name)).absolute()))
        if self.weights not in (None, "", "imagenet"):
            object.__setattr__(self, "weights", str(Path(self.weights).absolute()))
        elif not self.weights:
            object.__setattr__(self, "weights", None)

    def _check_schedule(self) -> None:
        asked = self.schedule
        try:
            if isinstance(asked, str) and asked.startswith("{"):
                asked = json.loads(asked)
            if not isinstance(asked, str | dict):
                raise ConfigError("Use a preset's name or a JSON object.")
            if asked:
                resolve(asked, images=10**6, global_batch=1, epochs=self.epochs)
        except ValueError as error:  # a ConfigError is one, as is what JSON says
            raise ConfigError(f"schedule={self.schedule!r} is not accepted. {error}") from error
        # As a checkpoint gives it back.
        object.__setattr__(self, "schedule", json.loads(json.dumps(asked)))
        if asked and self.weight_decay:
            raise ConfigError(
                f"weight_decay={self.weight_decay!r} beside a schedule, which has its own. Use 0."
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
        other = {"width": 1.0, "stem": "full", **other}  # chexlib 0.1 had these networks only
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
                f"{values!r} is no set of settings. Use an object of names and values."
            )
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            accepted = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ConfigError(f"unknown settings {', '.join(unknown)}. Accepted: {accepted}.")
        needed = ("data_dir", "run_dir")
        if missing := [name for name in needed if name not in values]:
            raise ConfigError(
                f"the settings lack {', '.join(missing)}. Needed: {', '.join(needed)}."
            )
        return cls(**values)
