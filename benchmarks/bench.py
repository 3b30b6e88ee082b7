"""Shared by the benchmarks: workers that take turns, so that what is compared is measured in the
same minutes.

A worker is a process, or an MPI job, that has everything ready. It reads a number of steps, takes
them and answers with the seconds of each, and may tell facts of itself before; while others work it
is frozen (SIGSTOP), so that nothing spins beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from chexlib.cluster.cleanup import no_longer_than_this

WORKERS = Path(__file__).parent / "workers"


class Worker:
    """One of the peers. `images` is what a step of it processes; with `sign` -1 it is asked for
    steps below 0.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], images: float, sign: int = 1
    ):
        self.images, self.sign, self.facts = images, sign, {}
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            encoding="utf-8",
            start_new_session=True,
        )

    def _members(self) -> list[psutil.Process]:
        """The processes that compute: the leaves below mpiexec, or the process itself."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def _signal(self, number: int) -> None:
        for member in self._members():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    def steps(self, n: int) -> list[float]:
        """Take `n` steps now: the seconds of each. The worker is frozen afterwards."""
        if self.process.poll() is None:
            self._signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{self.sign * n}\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith("{"):
                    self.facts |= json.loads(line)
                elif line.startswith("["):
                    self._signal(signal.SIGSTOP)
                    return json.loads(line)
        self.said.seek(0)
        sys.exit(f"{' '.join(self.process.args[:6])} ... has ended.\n{self.said.read()[-3000:]}")

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def frozen_workers(commands: dict[str, tuple]) -> Iterator[dict[str, Worker]]:
    """Start the workers one after another, each frozen as soon as it has taken two steps.

    SIGTERM ends them too, and so does whatever kills this process: a frozen worker would not notice.
    """
    workers = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with no_longer_than_this() as guarded:
        try:
            for name, (command, environment, *about) in commands.items():
                workers[name] = Worker(command, {**environment, **guarded}, *about)
                workers[name].steps(2)
            yield workers
        finally:
            for worker in workers.values():
                worker.close()


def peak_memory(who: int) -> int:
    """Bytes that this process (resource.RUSAGE_SELF) or its children had at most."""
    counted = resource.getrusage(who).ru_maxrss
    return counted if sys.platform == "darwin" else counted * 1024  # elsewhere it is in KiB


def take_turns(
    workers: dict[str, Worker], *, rounds: int, steps: int, of=statistics.median
) -> dict[str, list[float]]:
    """Images per second of each worker in each round, by the median over its steps or what else
    `of` is.
    """
    speeds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            speeds[name].append(worker.images / of(worker.steps(steps)))
    return speeds
