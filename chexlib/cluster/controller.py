"""ipyparallel's controller, which ends its cluster where notebook and watchdog were killed.

`python -m chexlib.cluster.controller` is what `mpi_engines` starts. Without a controller, engines
end by themselves (`engine.py`).
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from pathlib import Path

from ipyparallel.controller import app
from traitlets.config import Config

from chexlib.cluster.cleanup import end

PERIOD, GRACE = 1.0, 2.0  # seconds between two looks; seconds for the watchdog to end this process


def follow(notebook: int) -> None:
    """Wait until this process has another parent; then end the cluster, if nobody else does."""
    while os.getppid() == notebook:
        time.sleep(PERIOD)
    time.sleep(GRACE)
    end(str(Path(os.environ["IPP_PROFILE_DIR"]).parent))
    os.killpg(0, signal.SIGKILL)  # this process and its schedulers


if __name__ == "__main__":
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    # Messages are signed too: without a key for it, which encryption can do without, every client
    # warns that this is insecure.
    app.main(config=Config({"Session": {"key": secrets.token_hex().encode()}}))
