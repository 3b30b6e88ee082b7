"""Code that runs on an MPI engine: the calls of `Engines.run`, and a thread that ends orphans.

An engine that sits in a collective never looks at its heartbeat again, so a thread of its own
watches: when the launcher that started it is gone, or nobody answers at the controller's port, the
process ends, on whatever host it is.

`python -m chexlib.cluster.engine` is an engine that is no rank, though MPI's launcher started it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from chexlib import stopping
from chexlib.mpi import without_allocation

PERIOD, PATIENCE = 1.0, 3  # seconds between looks; failed looks in a row before the end


def begin(controller: tuple[str, int]) -> None:
    """Listen for a stop, and start the thread that ends this process when it is orphaned.

    Parameters
    ----------
    controller : (str, int)
        Address of the controller's registration port.
    """
    stopping.listen()
    if not any(thread.name == "chexlib-guard" for thread in threading.enumerate()):
        watching = (os.getppid(), controller)
        threading.Thread(target=_watch, args=watching, name="chexlib-guard", daemon=True).start()


def _watch(parent: int, controller: tuple[str, int]) -> None:
    failed = 0
    while failed < PATIENCE and os.getppid() == parent:
        time.sleep(PERIOD)
        try:
            socket.create_connection(controller, timeout=5).close()
            failed = 0
        except OSError:
            failed += 1
    # A thread cannot end the main one otherwise, least of all inside MPI.
    os.kill(os.getpid(), signal.SIGKILL)


def whereabouts() -> dict:
    """Host and process of an engine that is no rank."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "carrier": "no world", "why": ""}


class _LinesKept(logging.StreamHandler):
    """Prints what chexlib logs, and keeps it."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.name, record.levelno, record.getMessage()))
        super().emit(record)


def call(function: Callable, args: tuple, kwargs: dict, live: bool) -> tuple:
    """Call a function: gives its result, and (logger, level, text) of each line that chexlib logged.

    With `live` the function gets a keyword `report`, which sends numbers to the notebook.
    """
    from ipyparallel.datapub import publish_data

    if live:
        kwargs = {**kwargs, "report": publish_data}
    logger, handler = logging.getLogger("chexlib"), _LinesKept()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return function(*args, **kwargs), handler.lines
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    from ipyparallel.engine.app import main

    for name in without_allocation()[1::2]:
        del os.environ[name]
    # ipyparallel's launcher with mpiexec says so of every engine.
    main([word for word in sys.argv[1:] if word != "--mpi"])
