"""The MPI of this environment: its launcher, the launcher's flags, and threads per rank."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from chexlib.errors import ClusterError, ConfigError

# What each MPI prints for `mpiexec --version`.
_SIGNATURES = (
    (r"Intel\(R\) MPI", "Intel MPI"),
    (r"(?:Open MPI\)?|OpenRTE\)?) *v?(\d+)", "Open MPI"),
    (r"PRRTE", "Open MPI 5"),  # its runtime, numbered on its own
    (r"HYDRA|MPICH", "MPICH"),
)

# Variables of a rank, which would tie a new job to the one that this process is in. MCA settings are
# the user's own.
_RANK = r"(PMI|PMIX|HYDI)_(?!MCA_)|OMPI_COMM_WORLD_|OMPI_UNIVERSE_SIZE|PRTE_LAUNCHED|MPI_LOCAL"
# Of an allocation too, from which mpiexec would take other hosts or a number of ranks, and sbatch
# what it has of memory and tasks. What says where Slurm is stays.
_ALLOCATION = re.compile(
    rf"(SLURM|PBS|LSB|SGE|FLUX|COBALT|LOADL|PALS|OAR)_(?!CONF$|CLUSTERS$|MPI_TYPE$)|PE_HOSTFILE|{_RANK}"
)
# So that mpiexec lets the others live when a process ends that is no rank of a world.
RECOVERS = {"Open MPI": ["--enable-recovery"], "MPICH": ["-disable-auto-cleanup"]}

# How Open MPI brings messages over TCP. With "put", which it prefers, two ranks that send to each
# other at once, as in an allreduce, often have 0.65 of the cable, and 0.94 without: under Horovod
# on emulated hosts, 100 and 400 Mbit/s.
TCP_FLAGS = "send"
CARRIED_BY = "Ranks communicate through %s: %s."  # a carrier, and why it is not Horovod
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface of this host alone


@dataclass(frozen=True)
class Mpi:
    """The MPI launcher of this environment."""

    command: str  # path of mpiexec
    family: str  # "Open MPI", "MPICH" or "Intel MPI"
    major: int  # 0 where the family's flags do not depend on it
    version: str  # first line of `mpiexec --version`

    def start(self, *, alone: bool = True) -> list[str]:
        """Words that begin a command of mpiexec. What killed launchers have left is removed first.

        Open MPI needs a HOME, which services and containers may not have.

        Parameters
        ----------
        alone : bool
            Ranks are on this host alone: an allocation of a batch system is not looked at. Ranks
            on hosts that were named use it.
        """
        _remove_dead_sessions(Path(tempfile.gettempdir()))
        home = os.path.expanduser("~")
        home = home if os.path.isabs(home) else tempfile.gettempdir()  # a user that no list knows
        words = without_allocation() if alone else without_allocation(_RANK)
        words += [] if os.environ.get("HOME") else [f"HOME={home}"]
        return ["env", *words, self.command] if words else [self.command]

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
        slots = ",".join(f"{name}:{count}" for name, count in hosts)
        if self.family == "Open MPI":
            return self._open_mpi_flags(slots, network, export)
        if self.family == "Intel MPI":
            fabrics = "shm:ofi" if hosts else "shm"
            flags = ["-genv", "I_MPI_PIN", "0", "-genv", "I_MPI_FABRICS", fabrics]
            flags += ["-genv", "I_MPI_WAIT_MODE", "1"]
            return [*flags, "-hosts", slots] if hosts else flags
        flags = ["-bind-to", "none"]
        return [*flags, "-hosts", slots] if hosts else [*flags, "-iface", LOOPBACK]

    def _open_mpi_flags(self, slots: str, network: str, export: Sequence[str]) -> list[str]:
        since_5 = self.major >= 5
        shared_memory = "self,sm" if since_5 else "self,vader"
        flags = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        flags += ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        flags += ["--map-by", ":OVERSUBSCRIBE"] if since_5 else ["--oversubscribe"]
        if not slots:
            if not since_5:
                flags += ["--mca", "oob_tcp_if_include", LOOPBACK]
            return [*flags, "--mca", "btl", shared_memory]
        flags += ["--host", slots]
        flags += ["--prtemca", "prte_if_include"] if since_5 else ["--mca", "oob_tcp_if_include"]
        flags += [network, "--mca", "btl", f"{shared_memory},tcp"]
        flags += ["--mca", "btl_tcp_flags", TCP_FLAGS, "--mca", "btl_tcp_if_include", network]
        for name in export:
            flags += ["-x", name]
        return flags


def _remove_dead_sessions(folder: Path) -> None:
    """Remove what launchers of Open MPI 5 that were killed on this host have left in `folder`.

    A launcher whose process has the number of a dead one finds its `ompi.<number>`, and fails: "The
    PMIx server's listener thread failed to start".
    """
    for mark in folder.glob(f"ompi.*/pmix.{socket.gethostname()}.tool.*"):
        session, number = mark.parent, mark.name.rpartition(".")[2]
        named = session.name == f"ompi.{number}" and number.isdecimal() and not session.is_symlink()
        with contextlib.suppress(OSError):  # another launch has removed it
            own = named and session.stat().st_uid == os.geteuid()
            if own and not psutil.pid_exists(int(number)):
                shutil.rmtree(session)


def without_allocation(pattern: str | re.Pattern = _ALLOCATION) -> list[str]:
    """Flags of `env` that take from a command what batch systems and MPI left in the environment."""
    names = sorted(filter(re.compile(pattern).match, os.environ))
    return [word for name in names for word in ("-u", name)]


@functools.cache
def find_mpi() -> Mpi:
    """Find mpiexec in this Python's environment, else on the PATH, and recognise it.

    Raises
    ------
    ClusterError
        There is none, or it is of another family.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    if command is None:
        raise ClusterError(
            "there is no mpiexec in this environment or on the PATH. Run `make env` to install one."
        )
    words = [*Mpi(command, "", 0, "").start(), "--version"]
    answer = subprocess.run(
        words, capture_output=True, encoding="utf-8", errors="replace", timeout=60
    )
    return recognise_mpi(command, answer.stdout + answer.stderr)


def recognise_mpi(command: str, text: str) -> Mpi:
    """Tell the MPI family from what `command --version` printed."""
    version = text.strip().partition("\n")[0].strip()
    for pattern, family in _SIGNATURES:
        match = re.search(pattern, text)
        if match and family == "Open MPI 5":
            return Mpi(command, "Open MPI", 5, version)
        if match:
            major = int(match[1]) if match.groups() else 0
            return Mpi(command, family, major, version)
    raise ClusterError(
        f"{command} is of an MPI that chexlib does not know: it says {version!r}. Put one of these "
        "first on the PATH: Open MPI 4 and 5, MPICH, Intel MPI."
    )


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a rank that computes with `threads` threads.

    Raises
    ------
    ConfigError
        Fewer than one thread.
    """
    if threads < 1:
        raise ConfigError(f"threads={threads} is not accepted. Use at least 1 thread per rank.")
    return {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "2" if threads > 1 else "1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
