"""MPI engines of a notebook: started, checked, given work, and ended in one `with` block.

with mpi_engines(2, threads=1) as engines:
    result = await watched(fit, config, engines=engines, restarts=1)
"""

from __future__ import annotations

import contextlib
import html
import logging
import os
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import ipyparallel as ipp
import pandas as pd

from chexlib import stopping
from chexlib.cluster import faults
from chexlib.cluster.cleanup import PREFIX, WAIT, end_members, release_memory, sign, sweep, watchdog
from chexlib.cluster.engine import call
from chexlib.cluster.launch import Launched, launcher_settings, one_world
from chexlib.cluster.sites import Site
from chexlib.errors import ClusterError, ConfigError
from chexlib.files import require_room
from chexlib.machine import cores
from chexlib.mpi import CARRIED_BY, find_mpi

CONTROLLER = [
    "--HeartMonitor.period=2000",
    "--HeartMonitor.max_heartmonitor_misses=5",
    # On one host too: its other users can listen to its loopback.
    "--IPController.enable_curve=True",
]


POLL = 0.2  # seconds between two looks at the tasks of engines
ROOM = 16 * 2**20  # bytes that a cluster's folder may need


class Engines:
    """MPI engines that are one MPI world: engine id = MPI rank, checked at every start.

    Made by `mpi_engines`. After a fault that leaves ranks stuck they are taken down; the next `run`
    starts them again.
    """

    log = logging.getLogger(__name__)

    def __init__(
        self, n: int, site: Site, *, threads: int, timeout: int, stall: int, joined: bool = True
    ):
        self.n, self.site, self.threads, self.timeout, self.stall = n, site, threads, timeout, stall
        self.joined = joined
        self.mpi = find_mpi()
        place = site.shared or tempfile.gettempdir()
        sweep(place)
        require_room(place, ROOM)
        self.folder = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        try:
            os.chmod(self.folder, 0o700)
        except OSError as error:
            os.rmdir(self.folder)
            raise ClusterError(
                f"{place} keeps no permissions of files ({error.strerror}), and others could read "
                "the keys of the engines. Name another folder in the environment variable TMPDIR."
            ) from error
        sign(self.folder)
        self.cluster, self.client, self.launched = None, None, None
        self.identities, self._pending, self._starts = [], [], 0
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(watchdog(self.folder))

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
            Importable on the engines. With `report` it is called with a keyword `report` of its
            own.
        report : callable, optional
            Called here with each dict of numbers that the function on rank 0 reports.
        timeout : float, optional
            Seconds after which the engines are given up.

        Returns
        -------
        list
            What the function returned, in the order of ranks. What chexlib logged on rank 0 is then
            logged here.

        Raises
        ------
        ChexlibError
            What a rank raised of this family.
        ClusterError
            Any other failure: the rank, its host, its error and the engines' last lines. Ranks that
            are stuck because of it are ended.
        """
        if self.client is None:
            self.restart()
        if len(self.client.ids) < self.n:
            lines = faults.last_lines(self)
            self.down()
            raise ClusterError(
                f"engines have died since the last call; the next call starts new ones. {lines}"
            )
        work = (call, function, args, kwargs, report is not None)
        self._pending = pending = [
            self.client[engine].apply_async(*work) for engine in self.client.ids
        ]
        try:
            name = getattr(function, "__name__", str(function))
            answers = faults.follow(self, pending, report, timeout, name)
        except BaseException:
            if not all(answer.ready() for answer in pending) or not self.launcher_runs():
                self.log.info("The engines are taken down.")
                self.down()
            raise
        for name, level, text in answers[0][1]:
            logging.getLogger(name).log(level, text)
        return [value for value, _ in answers]

    def share(self, function: Callable, tasks: deque) -> Iterator[tuple]:
        """Let engines that are not joined take one task after the other, each by itself.

        Parameters
        ----------
        function : callable
            Importable on the engines.
        tasks : deque of tuples
            Arguments of the function, of which the first names the task. More may be added
            meanwhile. A task whose engine has died comes in again, for another one, at most twice.
            After `stopping.request` all are dropped, and trainings end after their current step.

        Yields
        ------
        task, result
            As they end.

        Raises
        ------
        ChexlibError
            What a task raised of this family.
        ClusterError
            Any other failure, and no engine that is left.
        """
        if self.client is None:
            self.restart()
        view, running, lost = self.client.load_balanced_view(), {}, Counter()
        told_to_stop = False
        while tasks or running:
            while tasks and len(running) < len(self.client.ids):
                task = tasks.popleft()
                running[view.apply_async(call, function, task, {}, False)] = task
            time.sleep(POLL)
            self._pending = list(running)
            for answer in [answer for answer in running if answer.ready()]:
                task, error = running.pop(answer), answer.exception()
                if error is None:
                    value, lines = answer.get()
                    for name, level, text in lines:
                        logging.getLogger(name).log(level, text)
                    yield task, value
                elif getattr(error, "ename", "") != "EngineError":
                    raise faults.explain(self, {answer.engine_id: error})
                elif lost[task[0]] < 2:
                    lost[task[0]] += 1
                    self.log.warning("An engine has died: another one does its work again.")
                    tasks.append(task)
                else:
                    raise ClusterError(
                        f"three engines have died of the same work, {task[0]}. Is their memory "
                        f"enough? Start fewer on a host. {faults.last_lines(self)}"
                    )
            faults.require_alive(self)
            if not self.client.ids:
                raise ClusterError(f"no engine is left. {faults.last_lines(self)}")
            if stopping.requested():
                tasks.clear()
                if not told_to_stop:
                    self.stop()
                told_to_stop = True

    def stop(self) -> None:
        """Ask the training on the engines to end after its current step, and to keep a checkpoint."""
        if self.client is not None:
            targets = 0 if self.joined else "all"
            self.client.send_signal(stopping.SIGNAL, targets=targets, block=False)

    def restart(self, n: int | None = None) -> None:
        """End the engines, if they are up, and start `n` new ones, or as many as before."""
        self.down()
        self.n = n or self.n
        self._starts += 1
        if not self.site.shared and self.n * self.threads > cores():
            self.log.warning(
                "%d engines x %d threads are more than %d cores: engines will wait for each other. "
                "Use fewer of either.",
                self.n,
                self.threads,
                cores(),
            )
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    def _up(self) -> None:
        began, site = time.monotonic(), self.site
        self.cluster = ipp.Cluster(
            engines="slurm" if site.slurm else "mpi",
            n=self.n,
            profile_dir=f"{self.folder}/{self._starts}",
            config=launcher_settings(
                site, self.mpi, self.threads, self.stall, self.folder, joined=self.joined
            ),
            controller_ip=site.address,
            controller_args=CONTROLLER,
            # Else it would cross the wire, and the folder has it.
            send_engines_connection_env=not site.shared,
            engine_timeout=self.timeout,
            shutdown_atexit=False,  # the watchdog does it, also where atexit is never reached
            log_level=logging.ERROR,
        )
        try:
            self.cluster.start_cluster_sync()
            self.client = self.cluster.connect_client_sync(timeout=WAIT)
            (launcher,) = self.cluster.engines.values()
            self.launched = Launched(launcher, site, self.folder)
        except Exception as error:
            raise ClusterError(
                f"the controller of the engines did not start ({type(error).__name__}: {error}). "
                "End what is left of others with `python -m chexlib clean`, and start again."
            ) from error
        while len(self.client.ids) < self.n:
            late = time.monotonic() - began > self.timeout
            if late or not self.launcher_runs():
                why = f"they took more than {self.timeout} s" if late else "their launcher ended"
                raise ClusterError(
                    f"{self.n} MPI engines did not start: {why}. {faults.last_lines(self)}"
                )
            time.sleep(0.1)
        try:
            self.identities = one_world(
                self.client, self.cluster.controller, self.n, joined=self.joined
            )
        except (TimeoutError, ipp.error.IPythonError) as error:
            raise ClusterError(
                f"{self.n} MPI engines started, but did not answer ({type(error).__name__}: "
                f"{error}). {faults.last_lines(self)}"
            ) from error
        first = self.identities[0]
        if self._starts == 1 and first["why"]:
            self.log.warning(CARRIED_BY, first["carrier"], first["why"])
        here = socket.gethostname()
        sign(self.folder, [who["pid"] for who in self.identities if who["host"] == here])

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
            release_memory(self.folder)

    def close(self) -> None:
        """End everything that was started, and remove the cluster's folder."""
        self.down()
        self._guard.close()

    def launcher_runs(self) -> bool:
        """Is mpiexec there, or Slurm's job?"""
        return self.launched is not None and self.launched.runs()

    def output(self) -> str:
        """What the launcher of the engines has said, and what each rank has printed in its last
        call.
        """
        text = self.launched.output() if self.launched else ""
        for answer in self._pending:
            text += answer.metadata["stdout"] + answer.metadata["stderr"]
        return text

    def _repr_html_(self) -> str:
        ranks = pd.DataFrame(self.identities, columns=["rank", "host", "pid"])
        table = ranks.rename(columns={"pid": "process"}).assign(threads=self.threads)
        hosts = ranks["host"].nunique()
        plural = "" if hosts == 1 else "s"
        carrier = self.identities[0]["carrier"] if self.identities else ""
        build = html.escape(f"{self.mpi.version}; {carrier}")
        shown = table.to_html(index=False, border=0)
        return f"{shown}<p>{self.n} MPI engines on {hosts} host{plural}: {build}</p>"


@contextlib.contextmanager
def mpi_engines(
    n: int,
    *,
    threads: int = 0,
    site: Site | None = None,
    timeout: int = 120,
    stall: int = 60,
    joined: bool = True,
) -> Iterator[Engines]:
    """Start `n` MPI engines, and end them whatever happens inside the block.

    Parameters
    ----------
    n : int
        Number of engines, one MPI rank each.
    threads : int
        Threads of each rank; 0 divides the cores of this machine among its ranks.
    site : Site, optional
        Other hosts, or Slurm, from `find_site`; without it this host. ipyparallel's traffic is
        encrypted (CurveZMQ); what MPI sends to other hosts is not.
    timeout : int
        Seconds to wait for the engines to come up.
    stall : int
        Seconds for which one rank may keep the others waiting in a collective.
    joined : bool
        One MPI world. Else each engine is by itself, for `Engines.share`, and may end by itself.

    Raises
    ------
    ConfigError
        Fewer than one engine, negative threads, or no time to wait.
    ClusterError
        mpiexec is missing or the engines did not come up; the message has mpiexec's own words.
    """
    for name, value in {"timeout": timeout, "stall": stall}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is not accepted. Use 1 or more.")
    site = site or Site()
    threads = site.threads_of(n, threads)
    engines = Engines(n, site, threads=threads, timeout=timeout, stall=stall, joined=joined)
    try:
        engines.restart()
        yield engines
    finally:
        engines.close()
