"""The full state of a training in one file: written atomically, checked when read, the newest few
kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

import keras
import numpy as np

from chexlib import stopping
from chexlib.collectives import World, require_agreement
from chexlib.errors import ConfigError, WeightsError
from chexlib.files import atomic_write, require_plain_zip, writing_to
from chexlib.training.callbacks import Plateau, PooledValidation, Position, Progress
from chexlib.training.config import TrainConfig

VERSION = 1  # of the file's layout
_NAME = re.compile(r"step-(\d{9})\.npz")
_EARLIER = "Use an earlier one."
log = logging.getLogger(__name__)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    folder = Path(folder)
    names = (
        [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    )
    return sorted(names, reverse=True)


def remove_checkpoints(folder: str | Path) -> None:
    """Remove all checkpoints in `folder`."""
    for path in checkpoint_files(folder):
        path.unlink(missing_ok=True)


def save_checkpoint(
    folder: str | Path,
    step: int,
    arrays: dict[str, np.ndarray],
    facts: dict,
    *,
    keep: int,
    alone: bool = False,
) -> Path:
    """Write `step-<step>.npz`, and remove all but the newest `keep` checkpoints.

    Parameters
    ----------
    arrays : dict of arrays
        Weights, optimizer slots, statistics: whatever is large.
    facts : dict
        Plain values for JSON.
    alone : bool
        Remove all others: they are of another training.

    Raises
    ------
    WeightsError
        The file cannot be written. What was there before is untouched.
    """
    folder = Path(folder)
    path = folder / f"step-{step:09d}.npz"
    content = {
        **arrays,
        "facts": np.frombuffer(json.dumps({"version": VERSION, **facts}).encode(), np.uint8),
    }
    size = sum(array.nbytes for array in content.values()) / 1e6
    step = "Earlier ones are untouched. Make room, or set another run_dir, and repeat the training "
    step += "with resume=true."
    with writing_to(f"the checkpoint {path} of {size:.1f} MB", step, kind=WeightsError):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **content, digest=np.frombuffer(_digest(content), np.uint8))
        files = checkpoint_files(folder)
        for old in [other for other in files if other != path] if alone else files[keep:]:
            old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Read a checkpoint: its arrays and its facts.

    Raises
    ------
    WeightsError
        It is cut short, a bit of it has changed, or it is of another version.
    """
    try:
        require_plain_zip(path)  # as `save_checkpoint` writes them
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        digest = content.pop("digest").tobytes()
        facts = json.loads(content["facts"].tobytes()) if digest == _digest(content) else None
        version = facts["version"] if facts else None
    except Exception as error:  # whatever a damaged archive makes zipfile and NumPy say
        raise WeightsError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {error}). {_EARLIER}"
        ) from error
    if facts is None:
        raise WeightsError(f"the checkpoint {path} is damaged (its checksum differs). {_EARLIER}")
    if version != VERSION:
        raise WeightsError(
            f"the checkpoint {path} is of version {version!r:.80}, and this chexlib reads version "
            f"{VERSION}. {_EARLIER}"
        )
    del content["facts"]
    return content, facts


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, np.ndarray], dict] | None:
    """The newest sound checkpoint in `folder`, its arrays and facts; None where there is no
    checkpoint.

    Damaged ones are named in the log, and passed over.

    Raises
    ------
    WeightsError
        There are checkpoints, and all are damaged.
    """
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, *load_checkpoint(path)
        except WeightsError as error:
            log.warning("%s The one before is tried.", error)
    if files:
        raise WeightsError(
            f"all {len(files)} checkpoints in {folder} are damaged. Train anew with resume=false."
        )
    return None


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    """SHA-256 of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.data if array.size else b"")
    return sha.digest()


class Saver(keras.callbacks.Callback):
    """Saves the full state, and ends the training after a step when asked to.

    The state is saved at the end of an epoch, after the ranks were found to agree; every
    `config.checkpoint_steps` steps; and when a stop was asked for. Moving statistics are kept for
    each rank, as each has its own within an epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        at: Position,
        watchers: tuple[PooledValidation, Plateau, Progress],
        *,
        facts: dict,
    ):
        super().__init__()
        self.config, self.world, self.at, self.facts = config, world, at, facts
        self.validation, self.plateau, self.progress = watchers
        self.folder = Path(config.run_dir) / "checkpoints"
        self.stopped, self._tracker = False, None
        # What lies in the folder is of another training, and stays until this one has a state.
        self._anew = not config.resume

    def on_epoch_begin(self, epoch, logs=None):
        if self._tracker is not None:  # Keras has just reset it; half of this epoch was done before
            for variable, value in zip(
                self.model.loss_tracker.variables, self._tracker, strict=True
            ):
                variable.assign(value)
            self._tracker = None

    def on_train_batch_begin(self, batch, logs=None):
        if stopping.requested():
            self.model.asking.assign(1.0)

    def on_train_batch_end(self, batch, logs=None):
        self.stopped = self.model.told()["asked"]
        within = self.at.image < self.at.images
        every = self.config.checkpoint_steps
        if within and (self.stopped or (every and self.at.step % every == 0)):
            self.save()
        self.model.stop_training = self.stopped

    def on_epoch_end(self, epoch, logs=None):
        if self.at.image < self.at.images:
            return  # stopped within the epoch, and saved
        self.at.epoch, self.at.image = epoch + 1, 0
        require_agreement(self.world, self._variables(), when=f"after epoch {epoch + 1}")
        self.save()

    def _variables(self) -> dict:
        return {v.path: v for v in (*self.model.model.variables, *self.model.optimizer.variables)}

    def save(self) -> None:
        """Write a checkpoint, on rank 0; all ranks wait until it is safe, and all learn if it is
        not.
        """
        keep, alone, self._anew = self.config.keep_checkpoints, self._anew, False
        if not keep:
            if alone:
                self.world.broadcast_object(lambda: remove_checkpoints(self.folder))
            return
        model, optimizer = self.model.model, self.model.optimizer
        statistics = self.world.allgather_object([v.numpy() for v in model.non_trainable_variables])

        def write():
            arrays = {f"weights/{i}": v.numpy() for i, v in enumerate(model.trainable_variables)}
            arrays |= {f"optimizer/{i}": v.numpy() for i, v in enumerate(optimizer.variables)}
            arrays |= {
                f"statistics/{i}": np.stack(ranks)
                for i, ranks in enumerate(zip(*statistics, strict=True))
            }
            arrays |= {f"best/{i}": w for i, w in enumerate(self.validation.best_weights or [])}
            arrays["tracker"] = np.array([v.numpy() for v in self.model.loss_tracker.variables])
            arrays["steps"] = np.array(self.progress.step_rows, float).reshape(
                -1, len(self.progress.STEP_COLUMNS)
            )
            facts = {
                **self.facts,
                "config": self.config.to_dict(),
                "ranks": self.world.ranks,
                "position": vars(self.at),
                "history": self.progress.rows,
                "best": [self.validation.best, self.validation.best_epoch],
                "plateau": [self.plateau.best, self.plateau.wait],
            }
            save_checkpoint(self.folder, self.at.step, arrays, facts, keep=keep, alone=alone)

        self.world.broadcast_object(write)

    def restore(self, trainer) -> str | None:
        """Take up the newest sound checkpoint, if there is one.

        Returns its name, equal on all ranks.

        Raises
        ------
        ConfigError
            It is of another training.
        WeightsError
            There are checkpoints, and none is sound; or the newest lacks what this training needs.
        """
        found = self.world.broadcast_object(lambda: newest_checkpoint(self.folder))
        if found is None:
            log.info("no checkpoint in %s: the training starts from the beginning", self.folder)
            return None
        try:
            self._take_up(trainer, *found)
        except ConfigError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{found[0]} is not a checkpoint of this training: it lacks something, or holds it in "
                f"another form ({error!r}). Train anew with resume=false."
            ) from error
        log.info("resumed from %s: epoch %d, step %d", found[0], self.at.epoch + 1, self.at.step)
        return found[0].name

    def _take_up(self, trainer, path: Path, arrays: dict, facts: dict) -> None:
        self.config.require_same(facts["config"], where=str(path))
        for name, value in self.facts.items():
            if facts[name] != value:
                raise ConfigError(
                    f"{path} is of another training: {name} {facts[name]} there and {value} now. Resume "
                    "with its data, or train anew with resume=false."
                )
        model, ranks = trainer.model, facts["ranks"]
        for i, variable in enumerate(model.trainable_variables):
            variable.assign(arrays[f"weights/{i}"])
        for i, variable in enumerate(model.non_trainable_variables):
            each = arrays[f"statistics/{i}"]
            variable.assign(
                each[self.world.rank] if ranks == self.world.ranks else each.mean(axis=0)
            )
        for i, variable in enumerate(trainer.optimizer.variables):
            variable.assign(arrays[f"optimizer/{i}"])
        best = [arrays[f"best/{i}"] for i in range(len(model.weights)) if f"best/{i}" in arrays]
        self.validation.best_weights = best or None
        self.validation.best, self.validation.best_epoch = facts["best"]
        self.plateau.best, self.plateau.wait = facts["plateau"]
        self.progress.rows, steps = facts["history"], arrays["steps"]
        lacking = len(self.progress.STEP_COLUMNS) - steps.shape[1]  # of an older checkpoint
        self.progress.step_rows = np.pad(
            steps, ((0, 0), (0, max(lacking, 0))), constant_values=np.nan
        ).tolist()
        self._move_to(facts["position"], ranks, trainer)
        if self.at.image:
            self._tracker = arrays["tracker"]

    def _move_to(self, position: dict, ranks: int, trainer) -> None:
        now, then = self.at.global_batch, position["global_batch"]
        if self.config.resume_keeps == "global_batch":
            if then < (parts := self.world.ranks * self.config.accumulation):
                raise ConfigError(
                    f"the global batch of {then} leaves some of {parts} ranks without an image. "
                    f'Use at most {then} ranks, or resume_keeps="rank_batch".'
                )
            self.at.global_batch = then
        elif now != then and not trainer.optimizer.tables:
            rate = float(trainer.optimizer.learning_rate)
            log.info(
                "global batch %d -> %d: learning rate %g -> %g", then, now, rate, rate * now / then
            )
            trainer.optimizer.learning_rate = rate * now / then
        for name in ("images", "epoch", "image", "step"):
            setattr(self.at, name, position[name])
