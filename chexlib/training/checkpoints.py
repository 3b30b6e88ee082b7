"""The full state of a training in one file: written atomically, checked when read, the newest few kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

import numpy as np

from chexlib.errors import WeightsError
from chexlib.files import replacing

VERSION = 1  # of the file's layout
_NAME = re.compile(r"step-(\d{9})\.npz")
log = logging.getLogger(__name__)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first."""
    folder = Path(folder)
    names = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(names, reverse=True)


def save_checkpoint(folder: str | Path, step: int, arrays: dict[str, np.ndarray], facts: dict, *, keep: int) -> Path:
    """Write `step-<step>.npz`, and remove all but the newest `keep` checkpoints.

    Parameters
    ----------
    arrays : dict of arrays
        Weights, optimizer slots, statistics: whatever is large.
    facts : dict
        Plain values for JSON.

    Raises
    ------
    WeightsError
        The file cannot be written. What was there before is untouched.
    """
    folder = Path(folder)
    path = folder / f"step-{step:09d}.npz"
    content = {**arrays, "facts": np.frombuffer(json.dumps({"version": VERSION, **facts}).encode(), np.uint8)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **content, digest=np.frombuffer(_digest(content), np.uint8))
    except OSError as error:
        size = sum(array.nbytes for array in content.values()) / 1e6
        raise WeightsError(
            f"the checkpoint {path} of {size:.1f} MB could not be written ({error.strerror or error}). The ones before "
            "it are untouched: make room, or set another run_dir, and go on with resume=true."
        ) from error
    for old in checkpoint_files(folder)[keep:]:
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
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        digest = content.pop("digest").tobytes()
        facts = json.loads(content["facts"].tobytes()) if digest == _digest(content) else None
    except Exception as error:  # whatever a damaged archive makes zipfile and NumPy say
        raise WeightsError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    if facts is None:
        raise WeightsError(f"{path} is damaged (its checksum is another).")
    if facts["version"] != VERSION:
        raise WeightsError(f"{path} is of version {facts['version']}, this chexlib reads {VERSION}.")
    del content["facts"]
    return content, facts


def newest_checkpoint(folder: str | Path) -> tuple[Path, dict[str, np.ndarray], dict] | None:
    """The newest sound checkpoint in `folder`, its arrays and facts; None where there is no checkpoint.

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
            log.warning("%s The one before is used.", error)
    if files:
        raise WeightsError(f"all {len(files)} checkpoints in {folder} are damaged. Start anew with resume=false.")
    return None


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    """SHA-256 of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.data if array.size else b"")
    return sha.digest()
