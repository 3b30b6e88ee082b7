"""What runs on an engine before it is given work: it listens for a stop, and ends itself when it is
orphaned.

An engine that sits in a collective never looks at its heartbeat again, so a thread of its own
watches: when the launcher that started it is gone, or nobody answers at the controller's port, the
process ends, on whatever host it is.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from chexlib import stopping

PERIOD, PATIENCE = 1.0, 3  # seconds between looks; failed looks in a row before the end


def begin(controller: tuple[str, int]) -> None:
    """Start guarding this process; `controller` is the address of the controller's registration
    port.
    """
    stopping.listen()
    if not any(thread.name == "chexlib-guard" for thread in threading.enumerate()):
        parent = os.getppid()
        threading.Thread(
            target=_watch, args=(parent, controller), name="chexlib-guard", daemon=True
        ).start()


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
