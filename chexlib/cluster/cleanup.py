"""Ending clusters whose notebook is gone, and removing what they leave.

`python -m chexlib.cluster.cleanup FOLDER` is the watchdog that `mpi_engines` starts. It reads
standard input, a pipe that only the notebook's process holds. The word `done` there means a normal
end. End of file without it means that the process died, however it died; then every process of the
cluster is ended, and its folder is removed.

Where the watchdog was killed as well, the controller does the same (`controller.py`). Where every
process was killed, the next cluster finds the folder by `sweep`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from chexlib.files import atomic_write, read_text

PREFIX = "chexlib-cluster-"  # begins the name of every cluster's folder
PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL
WAIT = 120  # seconds for any single answer of the cluster itself
# In the folder: the number of the cluster's Slurm job, for whoever has to cancel it.
JOB = "slurm-job"
# In the folder: the notebook's host, process and its start, and the ranks' shared memory.
OWNER = "owner.json"
SHARED_MEMORY = "/dev/shm"  # of Linux: files of this folder are memory


def members(marker: str) -> list[psutil.Process]:
    """This user's processes of the clusters whose folder has `marker` in its path.

    ipyparallel gives every process that it starts the folder's path in the variable
    IPP_PROFILE_DIR. Root could see those of other users too; they are not counted.
    """
    processes = []
    for process in psutil.process_iter(["environ", "uids"]):
        environment, users = process.info["environ"] or {}, process.info["uids"]
        mine = users is not None and users.effective == os.geteuid()
        marked = marker in environment.get("IPP_PROFILE_DIR", "")
        if mine and marked and process.pid != os.getpid():
            processes.append(process)
    return processes


def end_members(marker: str) -> int:
    """End `members(marker)`: SIGTERM, then SIGKILL after `PATIENCE` seconds.

    Returns how many there were.
    """
    processes = members(marker)
    alive = processes
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, alive = psutil.wait_procs(alive, timeout=PATIENCE)
    return len(processes)


def sign(folder: str | Path, ranks: Sequence[int] = ()) -> None:
    """Note in a cluster's folder whose it is, and which shared memory its ranks have open.

    Parameters
    ----------
    folder : path
    ranks : sequence of int
        Processes of the ranks on this host.
    """
    shared = set()
    for rank in ranks:
        # It has just died, or this is macOS, where MPI's files lie in the folder.
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{rank}/maps").read_text(encoding="utf-8", errors="replace")
            shared.update(re.findall(rf"{SHARED_MEMORY}/\S+", maps))
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "shared": sorted(shared),
    }
    with atomic_write(Path(folder) / OWNER) as file:
        file.write(json.dumps(owner).encode())


def sweep(folder: str | Path) -> None:
    """Remove what is left of this user's clusters of this host of which every process was killed."""
    for path in Path(folder).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
            if {path.parent.lstat().st_uid, path.lstat().st_uid} != {os.geteuid()}:
                continue  # what another user wrote is not to be believed
            owner = json.loads(read_text(path))
            if owner["host"] != socket.gethostname() or _runs(owner) or members(str(path.parent)):
                continue
            remove(path.parent)


def memory_folder(folder: str | Path) -> Path:
    """The folder for what the ranks of a cluster share in memory: what they leave goes with it."""
    return Path(SHARED_MEMORY) / Path(folder).name


def memory_variables(folder: str | Path) -> dict[str, str]:
    """What tells Open MPI's ranks of this host to use `memory_folder`, which is made here."""
    with contextlib.suppress(OSError):  # there is no such memory, as on macOS: Open MPI uses TMPDIR
        memory_folder(folder).mkdir(mode=0o700, exist_ok=True)
        if _is_mine(memory_folder(folder)):
            return {"OMPI_MCA_btl_sm_backing_directory": str(memory_folder(folder))}
    return {}


def _is_mine(path: Path) -> bool:
    """Is it this user's? All users can make a folder, or a link, in the shared memory."""
    return path.lstat().st_uid == os.geteuid()


def release_memory(folder: str | Path) -> None:
    """Remove the shared memory of ranks that have ended, however they did."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for name in json.loads(read_text(Path(folder) / OWNER))["shared"]:
            if str(Path(name).parent) == SHARED_MEMORY:
                Path(name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        if _is_mine(memory_folder(folder)):
            shutil.rmtree(memory_folder(folder))


def remove(folder: str | Path) -> None:
    """Remove a cluster's folder, and the shared memory of its ranks."""
    release_memory(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _runs(owner: dict) -> bool:
    """Does the process that signed still run, and not another one of its number?"""
    if not psutil.pid_exists(owner["pid"]):
        return False
    return psutil.Process(owner["pid"]).create_time() == owner["born"]


@contextlib.contextmanager
def watchdog(folder: str) -> Iterator[None]:
    """Let the processes of `folder` be ended when this one dies in the block, however it dies."""
    process = subprocess.Popen(
        [sys.executable, "-m", "chexlib.cluster.cleanup", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate("done", timeout=WAIT)
        remove(folder)


@contextlib.contextmanager
def no_longer_than_this() -> Iterator[dict[str, str]]:
    """Variables of ranks on this host that must not outlive the block, nor this process."""
    folder = tempfile.mkdtemp(prefix=PREFIX)
    sign(folder)
    with watchdog(folder):
        try:
            yield {"IPP_PROFILE_DIR": folder, **memory_variables(folder)}
        finally:
            end_members(folder)


def watch(folder: str) -> None:
    """Wait for the notebook's word or its death; then end the cluster, and remove its folder."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends by the pipe alone
    if sys.stdin.read().strip() != "done":
        end(folder)


def end(folder: str) -> None:
    """End the cluster of a notebook that has died, and remove what it leaves."""
    with contextlib.suppress(OSError):  # a Slurm job, which may still wait for its hosts
        subprocess.run(["scancel", read_text(Path(folder) / JOB)], timeout=60)
    for _ in range(3):  # again, for what was just being started
        end_members(folder)
        time.sleep(1)
    remove(folder)


if __name__ == "__main__":
    watch(sys.argv[1])
