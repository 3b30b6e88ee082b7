"""Ends a cluster whose notebook is gone: `python -m chexlib.cluster.watchdog PROFILE_DIR`, started
by `mpi_engines`.

It reads standard input, a pipe that only the notebook's process holds. The word `done` there means
a normal end. End of file without it means that the process died, however it died; then every
process of the cluster is ended, and its profile folder is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def members(marker: str) -> list[psutil.Process]:
    """This user's processes of the clusters whose profile folder has `marker` in its path.

    ipyparallel gives every process that it starts the folder's path in the variable
    IPP_PROFILE_DIR.
    """
    found = []
    for process in psutil.process_iter(["environ"]):  # None for the processes of others
        if marker in (process.info["environ"] or {}).get("IPP_PROFILE_DIR", ""):
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def end_members(marker: str, *, patience: float = 5.0) -> int:
    """End `members(marker)`: SIGTERM, then SIGKILL after `patience` seconds.

    Returns how many there were.
    """
    doomed = members(marker)
    for process in doomed:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(doomed, timeout=patience)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=patience)
    return len(doomed)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def main(profile_dir: str) -> None:
    """Wait for the notebook's word or its death."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends by the pipe alone
    if sys.stdin.read().strip() == "done":
        return
    with contextlib.suppress(OSError):  # a Slurm job, which may still wait for its hosts
        subprocess.run(["scancel", (Path(profile_dir) / "slurm-job").read_text()], timeout=60)
    for _ in range(3):  # again, for what was just being started
        end_members(profile_dir)
        time.sleep(1)
    shutil.rmtree(profile_dir, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
