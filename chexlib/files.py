"""What the file system offers: regular files, atomic writes, locks between processes, folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import math
import os
import shutil
import stat
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from chexlib.errors import ChexlibError, DataError, first_line

ROOT = Path(__file__).resolve().parents[1]  # the project's folder
DEEPEST = 50  # levels of a JSON file; ours have ten at most
_OPEN_FILES = "/proc/self/fd"  # Linux' links to what this process has open
log = logging.getLogger(__name__)


def require_file(path: str | Path) -> None:
    """Raise OSError unless there is a regular file: a pipe or a device may never come to an end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, "a pipe, a socket or a device, and no file", str(path))


def is_utf8(path: str | Path) -> bool:
    """Whether a name is text; JSON, tables and notebooks hold no other."""
    return str(path).encode(errors="replace").decode() == str(path)


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a regular file; OSError if there is none, ValueError if it is no such text."""
    require_file(path)
    return Path(path).read_text(encoding=encoding)


def require_room(folder: str | Path, needed: int) -> None:
    """DataError unless a folder for temporary files has room for so many bytes.

    HDF5 and MPI do not survive a disk that fills up while they write.
    """
    if shutil.disk_usage(folder).free < needed:
        raise DataError(
            f"the folder for temporary files, {folder}, has no room for {needed / 1e6:,.0f} MB. Make "
            "room, or name another folder in the environment variable TMPDIR."
        )


@contextlib.contextmanager
def scratch_folder(needed: int) -> Iterator[str]:
    """A temporary folder with room for so many bytes, removed after the block; else DataError."""
    require_room(tempfile.gettempdir(), needed)
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@contextlib.contextmanager
def writing_to(
    place: str | Path, step: str, *, kind: type[ChexlibError] = DataError
) -> Iterator[None]:
    """Let an OSError of the block be an error of `kind` that names the place and the next step."""
    try:
        yield
    except OSError as error:
        raise kind(f"{place} cannot be written ({first_line(error)}). {step}") from error


def require_writable(folder: str | Path, step: str) -> None:
    """Make a folder if need be; DataError with the next step if no file can be made in it."""
    with writing_to(folder, step):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def files_below(*folders: str) -> tuple[list[str], dict[str, str]]:
    """Paths of the files below folders, through links, each folder entered once.

    And what cannot be had, with its reason: a folder that cannot be listed, a link to nowhere.
    """
    lost: dict[str, str] = {}
    return [path for _, files in folders_below(*folders, lost=lost) for path in files], lost


def folders_below(
    *folders: str, lost: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Folders and those below them, through links, each entered once: path, and paths of its files.

    In `lost` is put what cannot be had, with its reason.
    """
    lost = {} if lost is None else lost
    entered, waiting = set(), list(reversed(folders))
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            lost[folder] = error.strerror or str(error)
            continue
        files, below = [], []
        for entry in entries:
            linked = entry.is_symlink()
            if os.path.isdir(entry.path) if linked else entry.is_dir(follow_symlinks=False):
                below.append(entry.path)
            elif linked and not os.path.exists(entry.path):
                lost[entry.path] = "a link to nowhere"
            else:
                files.append(entry.path)
        yield folder, files
        waiting += reversed(below)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for bytes that replaces `path` if the block succeeds.

    A reader finds the old file or the new one, however the writer ends; the new one is synchronised
    to disk first. Where the file system can (Linux' O_TMPFILE) it has no name until it is whole, so
    that SIGKILL leaves no part of one; a whole one it can leave between its first name and its
    last. Elsewhere, as on NFS or on macOS, the draft lies beside `path` and is removed if the block
    fails. An OSError names `path`.
    """
    path = Path(path)
    draft = path.with_name(f".draft.{uuid.uuid4().hex}")  # short, however long the name is
    number = _open_nameless(path.parent)
    named = number is None
    try:
        if named:
            number = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        with os.fdopen(number, "w+b") as file:
            yield file
            file.flush()
            os.fsync(number)
            if not named:
                _name(file, draft)
        os.replace(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        drafts = (None, str(draft), _link_to(number))
        # One without a number would lose its text.
        if isinstance(error, OSError) and error.errno and error.filename in drafts:
            error.filename = str(path)  # what a reader knows
        raise


def _name(file: BinaryIO, path: Path) -> None:
    """Give a name to an open file that has none, or copy it where that is refused."""
    folder = os.open(path.parent, os.O_RDONLY)
    # The folder's number makes Python call linkat, which follows the link in /proc.
    source = _link_to(file.fileno())
    try:
        os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT):
            raise
        file.seek(0)  # no hard links here
        with open(path, "xb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
    finally:
        os.close(folder)


def _link_to(number: int | None) -> str:
    return f"{_OPEN_FILES}/{number}"


def _open_nameless(folder: Path) -> int | None:
    """Number of an open file that has no name yet; None where the system has no such files."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir(_OPEN_FILES):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o644)
    except OSError:
        return None


@contextlib.contextmanager
def file_lock(lock: str | Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes: a file that exists while it is held, released at any exit.

    Yields True; without `wait`, False at once where another process holds it. Where the file system
    has no locks a warning says so once, and the lock counts as held.
    """
    while True:
        # Writable: NFS makes of it a lock for writing. A link is not followed: it would name a file
        # of others.
        number = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(number)
            yield False
            return
        except OSError as error:
            _warn_of_no_locks(os.path.dirname(lock), error.strerror)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), os.stat(lock)):
                break
        os.close(number)  # the holder before has released it, and its file is gone
    try:
        yield True
    finally:
        with contextlib.suppress(FileNotFoundError):  # where there are no locks, or the folder went
            os.unlink(lock)
        os.close(number)


@functools.cache
def _warn_of_no_locks(folder: str, reason: str) -> None:
    log.warning(
        "%s: files cannot be locked here (%s). Let one process at a time work in this folder.",
        folder,
        reason,
    )


def require_plain_zip(path: str | Path) -> None:
    """ValueError unless all members of a zip archive lie in it as they are: then a small file cannot
    hold a large one.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename!r:.200} in it is compressed")
    whole, size = sum(member.file_size for member in members), os.path.getsize(path)
    if whole > size:
        raise ValueError(f"its members say that they have {whole:,} bytes, in {size:,}")


def write_json(path: Path, values) -> None:
    """Write JSON atomically; NaN and infinity become null, NumPy and pandas values plain ones."""
    with atomic_write(path) as file:
        file.write(json.dumps(plain(values), indent=1, allow_nan=False).encode())


def read_json(path: str | Path, kind: type = dict):
    """The values of a JSON file, a dict or what `kind` says; an empty one where there is no file.

    Raises
    ------
    DataError
        The file cannot be read, is damaged, holds anything else, or is nested deeper than
        `DEEPEST`.
    """
    try:
        values = json.loads(read_text(path))
        if not isinstance(values, kind):
            raise ValueError(f"it holds no {'list' if kind is list else 'names with values'}")
        level = [values]
        for _ in range(DEEPEST):
            level = [inner for value in level for inner in _inside(value)]
        if level:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    except (FileNotFoundError, NotADirectoryError):
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({first_line(error)}). Correct it, or move it away."
        ) from error
    return values


def _inside(value):
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def plain(value):
    """Values for JSON: NaN and infinity become null, NumPy and pandas values plain ones, a table a
    row a key.
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if hasattr(value, "to_dict"):  # a data frame, or a result of ours
        return plain(value.to_dict("index") if hasattr(value, "columns") else value.to_dict())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | type(None)) else str(value)
