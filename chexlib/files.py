"""Writing files so that a reader finds the old one or the new one, never half of one, however the writer ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for bytes that takes the place of `path` if the block succeeds.

    It is synchronised to disk before. Where the file system can (Linux' O_TMPFILE) it has no name until it is whole,
    so that not even SIGKILL leaves a draft; elsewhere, as on NFS, the draft lies beside `path` and is removed if the
    block fails.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        number, named = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o644), False
    except OSError:
        number, named = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644), True
    try:
        with os.fdopen(number, "w+b") as file:
            yield file
            file.flush()
            os.fsync(number)
            if not named:
                folder = os.open(path.parent, os.O_RDONLY)
                try:  # the folder's number makes Python call linkat, which follows the link in /proc
                    os.link(f"/proc/self/fd/{number}", draft.name, dst_dir_fd=folder, follow_symlinks=True)
                finally:
                    os.close(folder)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
