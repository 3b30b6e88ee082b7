"""MPI engines of a notebook: started, checked, given work, and ended in one `with` block.

with mpi_engines(2, threads=1) as engines:
    result = fit(config, engines=engines, restarts=1, report=LiveView(stop=engines.stop))
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ipyparallel as ipp
import psutil
from traitlets.config import Config

from chexlib.cluster import faults, guard
from chexlib.cluster.profiles import cores, find_mpi, thread_environment
from chexlib.cluster.sites import SLURM_SCRIPT, Site
from chexlib.cluster.watchdog import end_members, members
from chexlib.errors import ClusterError, ConfigError
from chexlib.files import replacing
from chexlib.training import stopping

PREFIX = "chexlib-cluster-"  # begins the name of every cluster's folder
OWNER = "owner.json"  # in it: the notebook's host, process and its start, and the ranks' shared memory
WAIT = 120  # seconds for any single answer of the cluster itself


class Engines:
    """MPI engines that are one Horovod world: engine id = MPI rank = Horovod rank, checked at every start.

    Made by `mpi_engines`. After a fault that leaves ranks stuck they are taken down, and the next `run` starts them
    again.
    """

    log = logging.getLogger(__name__)

    def __init__(self, n: int, site: Site, *, threads: int, timeout: int, stall: int):
        self.n, self.site, self.threads, self.timeout, self.stall = n, site, threads, timeout, stall
        self.mpi = find_mpi()
        sweep(site.shared or tempfile.gettempdir())
        self.folder = tempfile.mkdtemp(prefix=PREFIX, dir=site.shared)
        self._sign()
        self.cluster, self.client, self.identities, self._pending, self._starts = None, None, [], [], 0
        self._asked_slurm, self._job_known = 0.0, True
        self._watchdog = subprocess.Popen(
            [sys.executable, "-m", "chexlib.cluster.watchdog", self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def __len__(self) -> int:
        return self.n

    def run(
        self,
        function: Callable,
        *args: Any,
        report: Callable[[dict], None] | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list:
        """Call an imported function on every engine, and wait for all.

        Parameters
        ----------
        function : callable
            Importable on the engines. With `report` it is called with a keyword `report` of its own.
        report : callable, optional
            Called here with each dict of numbers that the function on rank 0 reports.
        timeout : float, optional
            Seconds after which the engines are given up.

        Returns
        -------
        list
            What the function returned, in the order of ranks.

        Raises
        ------
        ChexlibError
            What a rank raised of this family.
        ClusterError
            Any other failure: the rank, its host, its error and the engines' last lines. Ranks that are stuck because
            of it are ended.
        """
        if self.client is None:
            self.restart()
        work = (_call, function, args, kwargs, report is not None)
        self._pending = pending = [self.client[engine].apply_async(*work) for engine in self.client.ids]
        try:
            return faults.follow(self, pending, report, timeout, getattr(function, "__name__", str(function)))
        except BaseException:
            if not all(answer.ready() for answer in pending) or not self.launcher_runs():
                self.log.info("The engines are taken down.")
                self.down()
            raise

    def stop(self) -> None:
        """Ask the training on the engines to end after its current step, and to keep a checkpoint."""
        if self.client is not None:
            self.client.send_signal(stopping.SIGNAL, targets=0, block=False)

    def restart(self, n: int | None = None) -> None:
        """End the engines, if they are up, and start `n` new ones, or as many as before."""
        self.down()
        self.n = n or self.n
        self._starts += 1
        if not self.site.shared and self.n * self.threads > cores():
            self.log.warning(
                "%d engines x %d threads on %d cores: they will wait for each other.", self.n, self.threads, cores()
            )
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    def _up(self) -> None:
        began, site = time.monotonic(), self.site
        self._asked_slurm, self._job_known = 0.0, True  # of the job before, if there was one
        encrypt = ["--IPController.enable_curve=True"] if site.beyond_loopback else []
        self.cluster = ipp.Cluster(
            engines="slurm" if site.slurm else "mpi",
            n=self.n,
            profile_dir=f"{self.folder}/{self._starts}",
            config=self._settings(),
            controller_ip=site.address,
            controller_args=["--HeartMonitor.period=2000", "--HeartMonitor.max_heartmonitor_misses=5", *encrypt],
            send_engines_connection_env=not site.shared,  # else it would cross the wire, and the folder has it
            engine_timeout=self.timeout,
            shutdown_atexit=False,  # the watchdog does it, also where atexit is never reached
            log_level=logging.ERROR,
        )
        try:
            self.cluster.start_cluster_sync()
            self.client = self.cluster.connect_client_sync(timeout=WAIT)
        except Exception as error:
            raise ClusterError(
                f"the controller of the engines did not start ({type(error).__name__}: {error})."
            ) from error
        while len(self.client.ids) < self.n:
            late = time.monotonic() - began > self.timeout
            if late or not self.launcher_runs():
                why = f"not within {self.timeout} s" if late else "their launcher ended"
                raise ClusterError(f"{self.n} MPI engines did not come up: {why}. {faults.last_lines(self)}")
            time.sleep(0.1)
        self.identities = self._identify()

    def _settings(self) -> Config:
        environment = {
            **thread_environment(self.threads),
            "HOROVOD_STALL_CHECK_TIME_SECONDS": str(faults.STALL_REPORT),
            "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(self.stall),
        }
        site, settings = self.site, Config()
        if not site.shared:  # so that what MPI and TensorFlow leave there when they are killed goes with the folder
            environment["TMPDIR"] = f"{self.folder}/tmp"
            os.makedirs(environment["TMPDIR"], exist_ok=True)
        name = "SlurmEngineSetLauncher" if site.slurm else "MPIEngineSetLauncher"
        launcher = settings[name]
        launcher.engine_args, launcher.environment = ["--log-level=ERROR"], environment
        if site.slurm:
            options = "\n".join(f"#SBATCH {option}" for option in site.options)
            launcher.batch_template, launcher.namespace = SLURM_SCRIPT, {"threads": self.threads, "options": options}
            launcher.batch_file_name = f"{self.folder}/engines.sbatch"
            launcher.engine_args = ["--mpi", "--log-level=ERROR"]  # its mpiexec launcher says --mpi by itself
        else:
            passed_on = [name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ]
            export = ["IPP_PROFILE_DIR", "IPP_CLUSTER_ID", *environment, *passed_on]
            launcher.mpi_cmd = [self.mpi.command]
            launcher.mpi_args = [*self.mpi.flags(site.hosts, site.network, export), *site.options]
        return settings

    def _identify(self) -> list[dict]:
        from chexlib.training.collectives import identify

        address = json.loads(Path(self.cluster.controller.connection_files["engine"]).read_text())
        controller = (address["interface"].removeprefix("tcp://"), address["registration"])
        self.client[:].apply_async(guard.begin, controller).get(timeout=WAIT)
        identities = self.client[:].apply_async(identify).get(timeout=WAIT)
        for engine, who in zip(self.client.ids, identities, strict=True):
            if engine != who["rank"] or who["ranks"] != self.n:
                raise ClusterError(
                    f"engine {engine} is rank {who['rank']} of {who['ranks']}, expected {engine} of {self.n}: the "
                    "engines are not one MPI world. Is the mpiexec found the one that Horovod was built with?"
                )
        self._sign([who["pid"] for who in identities if who["host"] == socket.gethostname()])
        return list(identities)

    def _sign(self, ranks: Sequence[int] = ()) -> None:
        shared = set()
        for rank in ranks:
            with contextlib.suppress(OSError):  # it has just died
                shared |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{rank}/maps").read_text()))
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time()}
        with replacing(Path(self.folder) / OWNER) as file:
            file.write(json.dumps({**owner, "shared": sorted(shared)}).encode())

    def down(self) -> None:
        """End the engines and their controller."""
        if self.client is not None:
            self.client.close()
        self.client = None
        if self.cluster is not None:
            if self.site.slurm:
                with contextlib.suppress(Exception):  # a job that has ended by itself
                    self.cluster.stop_engines_sync()
            end_members(self.folder)

    def close(self) -> None:
        """End everything that was started, and remove the cluster's folder."""
        self.down()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.communicate("done", timeout=WAIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def launcher_runs(self) -> bool:
        """Is mpiexec there, or Slurm's job?"""
        (launcher,) = self.cluster.engines.values()
        if self.site.slurm:
            return self._job_is_known(launcher.job_id)
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(launcher.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def _job_is_known(self, job: str) -> bool:
        if time.monotonic() - self._asked_slurm > 5:
            answer = subprocess.run(
                ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=WAIT
            )
            self._asked_slurm, self._job_known = time.monotonic(), bool(answer.stdout.strip())
        return self._job_known

    def output(self) -> str:
        """What the launcher of the engines has said, and what each rank has printed in its last call."""
        text = ""
        with contextlib.suppress(Exception):
            (launcher,) = self.cluster.engines.values()
            try:  # its get_output keeps for ever what it found the first time
                text = Path(launcher.output_file).read_text(errors="replace")
            except FileNotFoundError:  # removed by the launcher's end, which kept the whole of it
                text = launcher.get_output()
        for answer in self._pending:
            said = answer.metadata
            text += said["stdout"] + said["stderr"]
        return text

    def _repr_html_(self) -> str:
        cells = [(w["rank"], html.escape(w["host"]), w["pid"], self.threads) for w in self.identities]
        rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        hosts = len({w["host"] for w in self.identities})
        who = self.identities[0] if self.identities else {"horovod": "", "built": ""}
        build = html.escape(f"{self.mpi.version}; Horovod {who['horovod']} ({who['built']})")
        head = "<tr><th>rank</th><th>host</th><th>process</th><th>threads</th></tr>"
        return f"<table>{head}{rows}</table><p>{self.n} MPI engines on {hosts} host{'s'[: hosts > 1]}: {build}</p>"


def sweep(folder: str | Path) -> None:
    """Remove what is left of clusters of this host of which every process was killed, the watchdog too."""
    for path in Path(folder).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            owner = json.loads(path.read_text())
            alive = psutil.pid_exists(owner["pid"]) and psutil.Process(owner["pid"]).create_time() == owner["born"]
            if owner["host"] == socket.gethostname() and not alive and not members(str(path.parent)):
                for name in owner["shared"]:
                    Path(name).unlink(missing_ok=True)
                shutil.rmtree(path.parent, ignore_errors=True)


@contextlib.contextmanager
def mpi_engines(
    n: int, *, threads: int = 0, site: Site | None = None, timeout: int = 120, stall: int = 60
) -> Iterator[Engines]:
    """Start `n` MPI engines, and end them whatever happens inside the block.

    Parameters
    ----------
    n : int
        Number of engines, one MPI rank each.
    threads : int
        Threads of each rank; 0 divides the cores of this machine among its ranks.
    site : Site, optional
        Other hosts, or Slurm, from `find_site`; without it this host. Beyond this host ipyparallel's traffic is
        encrypted (CurveZMQ); what MPI sends is not.
    timeout : int
        Seconds to wait for the engines to come up.
    stall : int
        Seconds for which one rank may keep the others waiting in a collective.

    Raises
    ------
    ConfigError
        Fewer than one engine, negative threads, or no time to wait.
    ClusterError
        mpiexec is missing or the engines did not come up; the message has mpiexec's own words.
    """
    for name, value in {"engines": n, "timeout": timeout, "stall": stall}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is not accepted. Use 1 or more.")
    site = site or Site()
    slots = sum(slots for _, slots in site.hosts)
    if site.hosts and slots < n:
        raise ConfigError(f"engines={n}, but the hosts have {slots} slots. Name more hosts, or more slots of each.")
    threads = threads or max(1, cores() // max([n] if not site.hosts else [slots for _, slots in site.hosts]))
    thread_environment(threads)  # refuses impossible numbers before anything is started
    engines = Engines(n, site, threads=threads, timeout=timeout, stall=stall)
    try:
        engines.restart()
        yield engines
    finally:
        engines.close()


def _call(function, args, kwargs, live):
    """Runs on an engine."""
    from ipyparallel.datapub import publish_data

    stopping.forget()
    if live:
        kwargs = {**kwargs, "report": publish_data}
    return function(*args, **kwargs)
