"""Where the arrays of an HDF5 file lie.

A file of a few kB can make HDF5 run for ever, take all memory or crash. So a file of others is
looked at by a process of its own, with limits: `python hdf5.py FILE` prints the places as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys

MEMORY = 2**30  # bytes; a file of hundreds of arrays takes a third
SECONDS = 8  # of processor, as many as a hundred times what it takes


def find_arrays(path) -> dict[str, list]:
    """Name of each array -> its NumPy type, shape, and offset in the file; None for an array that
    is packed, never written, or kept in another file.
    """
    import h5py

    found = {}

    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = [item.dtype.str, item.shape, item.id.get_offset()]

    with h5py.File(path, "r") as file:
        file.visititems(collect)
    return found


def find_arrays_apart(path) -> dict[str, list]:
    """`find_arrays` by a process of its own.

    Raises
    ------
    ValueError
        It ended without an answer.
    """
    command = [sys.executable, "-P", __file__, str(path)]  # -P: no module of this folder
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # each thread has memory of its own
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout)
    reason = f"HDF5 took too long, or crashed (signal {-done.returncode})"
    if done.returncode > 0:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
    raise ValueError(reason)


if __name__ == "__main__":
    with contextlib.suppress(OSError, ValueError):  # a system that has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(find_arrays(sys.argv[1]), sys.stdout)
