"""ipyparallel's launchers as chexlib sets them: mpiexec on this host or several, or a Slurm job."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ipyparallel as ipp
import psutil
from traitlets.config import Config

from chexlib.cluster import engine, faults
from chexlib.cluster.cleanup import JOB, WAIT, memory_variables
from chexlib.cluster.sites import Site
from chexlib.cluster.slurm import ENGINES_SCRIPT
from chexlib.errors import ClusterError
from chexlib.files import read_text
from chexlib.mpi import RECOVERS, Mpi, thread_environment, without_allocation


def launcher_settings(
    site: Site, mpi: Mpi, threads: int, stall: int, folder: str, *, joined: bool
) -> Config:
    """Settings of the engines' launcher: command, environment and, under Slurm, the script.

    Engines that are not `joined` to one world know no MPI, and one may end without the others.
    """
    environment = {
        **thread_environment(threads),
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(faults.STALL_REPORT),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(stall),
    }
    # So that what MPI and TensorFlow leave there when they are killed goes with the folder.
    if not site.shared:
        environment["TMPDIR"] = f"{folder}/tmp"
        os.makedirs(environment["TMPDIR"], exist_ok=True)
        environment |= memory_variables(folder)
    settings = Config()
    settings.ControllerLauncher.controller_cmd = [
        sys.executable,
        "-m",
        "chexlib.cluster.controller",
    ]
    launcher = settings["SlurmEngineSetLauncher" if site.slurm else "MPIEngineSetLauncher"]
    launcher.environment = environment
    if not joined:
        launcher.engine_cmd = [sys.executable, "-m", "chexlib.cluster.engine"]
    if site.slurm:
        options = "\n".join(f"#SBATCH {option}" for option in site.options)
        launcher.batch_template = ENGINES_SCRIPT
        flags = "--kill-on-bad-exit=1" if joined else "--kill-on-bad-exit=0 --mpi=none"
        launcher.namespace = {"threads": threads, "options": options, "flags": flags}
        # What it is given is not of the allocation that this process may be in.
        if words := without_allocation():
            launcher.submit_command = ["env", *words, "sbatch"]
        launcher.batch_file_name = f"{folder}/engines.sbatch"
        # Its mpiexec launcher says --mpi by itself.
        launcher.engine_args = ["--mpi", "--log-level=ERROR"]
    else:
        names = ("PYTHONPATH", "LD_LIBRARY_PATH", "CHEXLIB_COLLECTIVES")
        passed_on = [name for name in names if name in os.environ]
        export = ["IPP_PROFILE_DIR", "IPP_CLUSTER_ID", *environment, *passed_on]
        launcher.mpi_cmd = mpi.start(alone=not site.hosts)
        launcher.mpi_args = [*mpi.flags(site.hosts, site.network, export), *site.options]
        launcher.mpi_args += [] if joined else RECOVERS.get(mpi.family, [])
        launcher.engine_args = ["--log-level=ERROR"]
    return settings


def one_world(client: ipp.Client, controller, n: int, *, joined: bool) -> list[dict]:
    """Let every engine guard itself, and check that engine id = MPI rank where they are joined.

    Gives who each rank is.
    """
    from chexlib.collectives import identify

    address = json.loads(read_text(controller.connection_files["engine"]))
    door = (address["interface"].removeprefix("tcp://"), address["registration"])
    client[:].apply_async(engine.begin, door).get(timeout=WAIT)
    if not joined:
        told = client[:].apply_async(engine.whereabouts).get(timeout=WAIT)
        return [{"rank": number, **who} for number, who in zip(client.ids, told, strict=True)]
    identities = client[:].apply_async(identify).get(timeout=WAIT)
    for number, who in zip(client.ids, identities, strict=True):
        if number != who["rank"] or who["ranks"] != n:
            raise ClusterError(
                f"engine {number} is rank {who['rank']} of {who['ranks']}, expected {number} of "
                f"{n}: the engines are not one MPI world. Is the mpiexec found the one of "
                f"{who['carrier']}? (Slurm may need SLURM_MPI_TYPE=pmix.)"
            )
    return list(identities)


class Launched:
    """The launcher of an engine set after its start: does it live, and what has it said?"""

    PERIOD = 5  # seconds between two questions to Slurm

    def __init__(self, launcher, site: Site, folder: str):
        self.launcher, self.slurm = launcher, site.slurm
        self._asked, self._known = time.monotonic(), True
        if site.slurm:
            (Path(folder) / JOB).write_text(launcher.job_id, encoding="utf-8")

    def runs(self) -> bool:
        """Is mpiexec there, or Slurm's job?"""
        if not self.slurm:
            return faults.status(self.launcher.pid) != psutil.STATUS_ZOMBIE
        if self._known and time.monotonic() - self._asked > self.PERIOD:
            self._asked = time.monotonic()
            command = ["squeue", "--noheader", "--jobs", self.launcher.job_id]
            # Then what was known last counts.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
                unknown = answer.returncode == 0 or "Invalid job id" in answer.stderr
                self._known = bool(answer.stdout.strip()) or not unknown
        return self._known

    def output(self) -> str:
        """All that the launcher has said, engines' own output as far as they do not catch it."""
        with contextlib.suppress(Exception):
            try:  # its get_output keeps for ever what it found the first time
                return Path(self.launcher.output_file).read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # removed by the launcher's end, which kept the whole of it
                return self.launcher.get_output()
        return ""
