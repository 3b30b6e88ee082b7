"""A request to stop after the current step: SIGUSR1, from the Stop button, `mpiexec` or a batch
system.

Slurm sends it ahead of the time limit with `sbatch --signal=USR1@120`; Open MPI's `mpiexec` passes
it on to the ranks.

And `end_with_parent`, for workers whose process is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator

SIGNAL = signal.SIGUSR1
_requested = threading.Event()


def listen() -> None:
    """Let the signal request a stop. Outside the main thread, only `request` can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(SIGNAL, lambda number, frame: _requested.set())


def request() -> None:
    """Request that the training in this process stops after its current step."""
    _requested.set()


def requested() -> bool:
    """Whether a stop was requested since the last training ended."""
    return _requested.is_set()


def end_with_parent() -> None:
    """Let this worker of a pool end with the process that started it, even by SIGKILL.

    An interrupt is left to that process to handle.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def follow():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listen for the time of a training; the request is cleared when it has ended.

    A stop that was requested before, while the training was prepared, holds.
    """
    listen()
    try:
        yield
    finally:
        _requested.clear()
