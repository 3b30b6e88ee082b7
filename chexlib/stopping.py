"""A request to stop after the current step: SIGUSR1, from the Stop button, `mpiexec` or a batch
system.

Slurm sends it ahead of the time limit with `sbatch --signal=USR1@120`; Open MPI's `mpiexec` passes
it on to the ranks.
"""

from __future__ import annotations

import signal
import threading

SIGNAL = signal.SIGUSR1
_asked = threading.Event()


def listen() -> None:
    """From now on the signal asks for a stop. Elsewhere than in the main thread, only `ask` can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(SIGNAL, lambda number, frame: _asked.set())


def ask() -> None:
    """Ask the training in this process to stop."""
    _asked.set()


def asked() -> bool:
    """Has somebody asked since `forget`?"""
    return _asked.is_set()


def forget() -> None:
    """The training that was asked has ended."""
    _asked.clear()
