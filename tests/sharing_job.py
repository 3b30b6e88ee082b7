"""What tests/cluster/test_sharing.py runs on engines that are not joined."""

import os
import signal
import time
from pathlib import Path

from chexlib import stopping
from chexlib.errors import ConfigError


def work(name, folder):
    """By which process, and what tells it of an MPI world. "fatal" ends the first engine at it."""
    if name == "fatal" and not (died := Path(folder, "died")).exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "wrong":
        raise ConfigError("seed=-1 is not accepted.")
    if name == "broken":
        raise ValueError("no such thing")
    if name == "endless":
        time.sleep(600)
    while name == "patient" and not stopping.requested():
        time.sleep(0.1)
    time.sleep(0.2)
    return os.getpid(), [key for key in os.environ if key.startswith(("PMIX_", "OMPI_COMM_WORLD"))]
