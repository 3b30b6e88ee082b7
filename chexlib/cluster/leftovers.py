"""What a cluster may leave when every process of it is killed at once, and how the next one finds
and removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from chexlib.cluster.watchdog import members
from chexlib.files import replacing

PREFIX = "chexlib-cluster-"  # begins the name of every cluster's folder
# In it: the notebook's host, process and its start, and the ranks' shared memory.
OWNER = "owner.json"
SHARED_MEMORY = "/dev/shm"


def sign(folder: str | Path, ranks: Sequence[int] = ()) -> None:
    """Note in a cluster's folder whose it is, and the shared memory that these ranks of this host
    have open.
    """
    shared = set()
    for rank in ranks:
        # It has just died, or this is macOS, where MPI's files lie in the folder.
        with contextlib.suppress(OSError):
            shared |= set(
                re.findall(rf"{SHARED_MEMORY}/\S+", Path(f"/proc/{rank}/maps").read_text())
            )
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
    }
    with replacing(Path(folder) / OWNER) as file:
        file.write(json.dumps({**owner, "shared": sorted(shared)}).encode())


def sweep(folder: str | Path) -> None:
    """Remove what is left of this user's clusters of this host of which every process was killed."""
    for path in Path(folder).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
            if {path.parent.lstat().st_uid, path.lstat().st_uid} != {os.geteuid()}:
                continue  # what another user wrote is not to be believed
            owner = json.loads(path.read_text())
            alive = (
                psutil.pid_exists(owner["pid"])
                and psutil.Process(owner["pid"]).create_time() == owner["born"]
            )
            if (
                owner["host"] == socket.gethostname()
                and not alive
                and not members(str(path.parent))
            ):
                for name in owner["shared"]:
                    if str(Path(name).parent) == SHARED_MEMORY:
                        Path(name).unlink(missing_ok=True)
                shutil.rmtree(path.parent, ignore_errors=True)
