"""How ranks sit on a machine: which MPI is here, the flags it wants, and threads for each rank."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chexlib.errors import ClusterError, ConfigError

# What each MPI prints for `mpiexec --version`.
_SIGNATURES = (
    (r"Intel\(R\) MPI", "Intel MPI"),
    (r"(?:Open MPI\)?|OpenRTE\)?) *v?(\d+)", "Open MPI"),
    (r"PRRTE", "Open MPI 5"),  # its runtime, numbered on its own
    (r"HYDRA|MPICH", "MPICH"),
)

# How Open MPI brings messages over TCP. With "put", which it prefers, two ranks that send to each
# other at once, as in an allreduce, often have 0.65 of the cable, and 0.94 without: under Horovod
# on emulated hosts, 100 and 400 Mbit/s.
TCP_FLAGS = "send"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface of this host alone


@dataclass(frozen=True)
class Mpi:
    """The MPI launcher of this environment."""

    command: str  # path of mpiexec
    family: str  # "Open MPI", "MPICH" or "Intel MPI"
    major: int  # 0 where the family's flags do not depend on it
    version: str  # first line of `mpiexec --version`

    def flags(
        self, hosts: Sequence[tuple[str, int]] = (), network: str = "", export: Sequence[str] = ()
    ) -> list[str]:
        """Flags for ranks on this host or on several: unbound, and yielding while they wait.

        Ranks are left unbound because Horovod's background thread otherwise spins on the core that
        computes. Open MPI 5's runtime cannot be confined to an interface yet (openpmix/prrte pull
        request 2788).

        Parameters
        ----------
        hosts : sequence of (name, slots)
            None for this host alone; ranks then speak through shared memory.
        network : str
            What Open MPI's ranks on several hosts speak over, such as "10.0.0.0/24"; MPICH and
            Intel MPI choose.
        export : sequence of str
            Environment variables that ranks on other hosts need.
        """
        places = ",".join(f"{name}:{slots}" for name, slots in hosts)
        if self.family == "Open MPI":
            root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
            five = self.major >= 5
            common = ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
            common += ["--map-by", ":OVERSUBSCRIBE"] if five else ["--oversubscribe"]
            through = "self,sm" if five else "self,vader"
            if not hosts:
                local = [] if five else ["--mca", "oob_tcp_if_include", LOOPBACK]
                return [*root, *common, *local, "--mca", "btl", through]
            runtime = ["--prtemca", "prte_if_include"] if five else ["--mca", "oob_tcp_if_include"]
            wire = [
                *runtime,
                network,
                "--mca",
                "btl",
                f"{through},tcp",
                "--mca",
                "btl_tcp_flags",
                TCP_FLAGS,
            ]
            wire += ["--mca", "btl_tcp_if_include", network]
            return [
                *root,
                *common,
                "--host",
                places,
                *wire,
                *(word for name in export for word in ("-x", name)),
            ]
        if self.family == "Intel MPI":
            settings = {
                "I_MPI_PIN": "0",
                "I_MPI_FABRICS": "shm:ofi" if hosts else "shm",
                "I_MPI_WAIT_MODE": "1",
            }
            flags = [word for name, value in settings.items() for word in ("-genv", name, value)]
            return [*flags, *(("-hosts", places) if hosts else ())]
        return ["-bind-to", "none", *(("-hosts", places) if hosts else ("-iface", LOOPBACK))]


@functools.cache
def find_mpi() -> Mpi:
    """Find mpiexec in this Python's environment, else on the PATH, and recognise it.

    Raises
    ------
    ClusterError
        There is none, or it is of no known family.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    if command is None:
        raise ClusterError(
            "there is no mpiexec in this environment or on the PATH. Run `make env`."
        )
    answer = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    return recognise_mpi(command, answer.stdout + answer.stderr)


def recognise_mpi(command: str, text: str) -> Mpi:
    """Tell the MPI family from what `command --version` printed."""
    version = next((line.strip() for line in text.splitlines() if line.strip()), "")
    for pattern, family in _SIGNATURES:
        if match := re.search(pattern, text):
            major = int(match.group(1)) if match.groups() else 0
            if family == "Open MPI 5":
                family, major = "Open MPI", 5
            return Mpi(command=command, family=family, major=major, version=version)
    raise ClusterError(
        f"{command} is no MPI that chexlib knows: it says {version!r}. Known: Open MPI 4 and 5, "
        "MPICH, Intel MPI."
    )


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a rank that computes with `threads` threads.

    Raises
    ------
    ConfigError
        Fewer than one thread.
    """
    if threads < 1:
        raise ConfigError(f"threads={threads} is not accepted. Use at least 1 thread a rank.")
    return {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "2" if threads > 1 else "1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
