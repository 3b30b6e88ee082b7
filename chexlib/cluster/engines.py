"""MPI engines of a notebook: started, checked, given work, and ended in one `with` block.

with mpi_engines(2, threads=1) as engines:
    results = engines.run(fit, config, report=LiveLine())
"""

from __future__ import annotations

import contextlib
import html
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipyparallel as ipp
import psutil
from traitlets.config import Config

import chexlib.errors
from chexlib.cluster.profiles import Mpi, cores, find_mpi, thread_environment
from chexlib.cluster.watchdog import end_members
from chexlib.errors import ChexlibError, ClusterError, ConfigError

PREFIX = "chexlib-cluster-"  # begins the name of every cluster's profile folder
log = logging.getLogger(__name__)


class Engines:
    """MPI engines that are one Horovod world: engine id = MPI rank = Horovod rank, checked at the start."""

    def __init__(self, cluster: ipp.Cluster, client: ipp.Client, mpi: Mpi, threads: int, identities: list[dict]):
        self.cluster, self.client, self.mpi, self.threads = cluster, client, mpi, threads
        self.identities = identities

    def __len__(self) -> int:
        return len(self.identities)

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
            Any other failure: the rank, its host, its error and the engines' last lines.
        """
        work = (_call, function, args, kwargs, report is not None)
        pending = [self.client[engine].apply_async(*work) for engine in self.client.ids]
        began, seen = time.monotonic(), None
        while True:
            done = [answer for answer in pending if answer.wait(timeout=0.2 / len(pending))]
            if report and pending[0].data and pending[0].data != seen:
                seen = dict(pending[0].data)
                report(seen)
            for rank, answer in enumerate(pending):
                if answer in done and answer.exception() is not None:
                    raise self._explain(answer.exception(), rank)
            if len(done) == len(pending):
                return [answer.get() for answer in pending]
            if timeout is not None and time.monotonic() - began > timeout:
                name = getattr(function, "__name__", function)
                raise ClusterError(
                    f"{name} did not end within {timeout} s on {len(self)} engines. {self._last_lines()}"
                )

    def _explain(self, error: Exception, rank: int) -> ChexlibError:
        name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        kind = getattr(chexlib.errors, name, None)
        if isinstance(kind, type) and issubclass(kind, ChexlibError):
            return kind(text)
        host = self.identities[rank]["host"]
        return ClusterError(f"rank {rank} on {host} failed with {name}: {text}. {self._last_lines()}")

    def _last_lines(self, n: int = 15) -> str:
        return _engine_output(self.cluster, n)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{i['rank']}</td><td>{html.escape(i['host'])}</td><td>{i['pid']}</td><td>{self.threads}</td></tr>"
            for i in self.identities
        )
        build = html.escape(f"{self.mpi.version}, Horovod {self.identities[0]['horovod']}")
        head = "<tr><th>rank</th><th>host</th><th>process</th><th>threads</th></tr>"
        return f"<table>{head}{rows}</table><p>{len(self)} MPI engines: {build}</p>"


@contextlib.contextmanager
def mpi_engines(n: int, *, threads: int = 0, timeout: int = 120) -> Iterator[Engines]:
    """Start `n` MPI engines on this host, and end them whatever happens inside the block.

    Parameters
    ----------
    n : int
        Number of engines, one MPI rank each.
    threads : int
        Threads of each rank; 0 divides the cores of this machine among the ranks.
    timeout : int
        Seconds to wait for the engines to come up.

    Raises
    ------
    ConfigError
        Fewer than one engine, or negative threads.
    ClusterError
        mpiexec is missing or the engines did not come up; the message has mpiexec's own words.
    """
    if n < 1:
        raise ConfigError(f"engines={n} is not accepted. Use 1 or more MPI engines.")
    threads = threads or max(1, cores() // n)
    if n * threads > cores():
        log.warning("%d engines x %d threads on %d cores: they will wait for each other.", n, threads, cores())
    mpi, environment = find_mpi(), thread_environment(threads)
    profile_dir = tempfile.mkdtemp(prefix=PREFIX)
    watchdog = subprocess.Popen(
        [sys.executable, "-m", "chexlib.cluster.watchdog", profile_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    settings = Config()
    settings.MPIEngineSetLauncher.mpi_cmd = [mpi.command]
    settings.MPIEngineSetLauncher.mpi_args = mpi.flags()
    settings.MPIEngineSetLauncher.environment = environment
    cluster = ipp.Cluster(
        engines="mpi",
        n=n,
        profile_dir=profile_dir,
        config=settings,
        controller_ip="127.0.0.1",
        engine_timeout=timeout,
        shutdown_atexit=False,  # the watchdog does it, also where atexit is never reached
        log_level=logging.ERROR,
    )
    client = None
    try:
        client = _connect(cluster, timeout)
        yield Engines(cluster, client, mpi, threads, _identify(client))
    finally:
        if client is not None:
            client.close()
        end_members(profile_dir)
        watchdog.communicate("done")
        shutil.rmtree(profile_dir, ignore_errors=True)


def _connect(cluster: ipp.Cluster, timeout: int) -> ipp.Client:
    """Start controller and engines; give up when the engines' launcher ends or the time is over."""
    began = time.monotonic()
    try:
        cluster.start_cluster_sync()
        client = cluster.connect_client_sync()
    except Exception as error:
        raise ClusterError(f"the controller of the engines did not start ({type(error).__name__}: {error}).") from error
    (launcher,) = cluster.engines.values()
    while len(client.ids) < cluster.n:
        ended = not psutil.pid_exists(launcher.pid) or psutil.Process(launcher.pid).status() == psutil.STATUS_ZOMBIE
        if ended or time.monotonic() - began > timeout:
            client.close()
            why = "their mpiexec ended" if ended else f"not within {timeout} s"
            raise ClusterError(f"{cluster.n} MPI engines did not come up: {why}. {_engine_output(cluster, 15)}")
        time.sleep(0.1)
    return client


def _identify(client: ipp.Client) -> list[dict]:
    from chexlib.training.collectives import identify

    identities = client[:].apply_async(identify).get(timeout=120)
    for engine, who in zip(client.ids, identities, strict=True):
        if engine != who["rank"] or who["ranks"] != len(client.ids):
            raise ClusterError(
                f"engine {engine} is rank {who['rank']} of {who['ranks']}, expected {engine} of {len(client.ids)}: "
                "the engines are not one MPI world. Is the mpiexec found the one that Horovod was built with?"
            )
    return list(identities)


def _engine_output(cluster: ipp.Cluster, n: int) -> str:
    text = ""
    for engine_set in cluster.engines.values():
        with contextlib.suppress(Exception):
            text = engine_set.get_output()
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # IPython colours its tracebacks
    lines = [line for line in text.splitlines() if line.strip()][-n:]
    return "The engines' last lines:\n" + "\n".join(lines) if lines else "The engines printed nothing."


def _call(function, args, kwargs, live):
    """Runs on an engine."""
    from ipyparallel.datapub import publish_data

    if live:
        kwargs = {**kwargs, "report": publish_data}
    return function(*args, **kwargs)
