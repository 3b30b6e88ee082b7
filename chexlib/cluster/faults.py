"""Waiting for ranks that may never answer: what went wrong, on which rank and host, within seconds."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

import psutil

import chexlib.errors
from chexlib.errors import ChexlibError, ClusterError

LINES = 15  # of the engines' output in a message
LAUNCHER_GRACE = 5.0  # seconds in which the launcher says which rank died, where all look alike
GRACE = 2.0  # seconds in which other ranks may report the same failure before they count as stuck
STALL_REPORT = 5  # seconds after which Horovod names a rank that keeps the others waiting
_PRESENTLY = 0.2


def follow(
    engines, pending: list, report: Callable[[dict], None] | None, timeout: float | None, name: str
) -> list:
    """Wait for the answers of all ranks, passing on what rank 0 tells; raise as soon as something
    is wrong.

    Parameters
    ----------
    engines : Engines
    pending : list of AsyncResult
        One a rank.

    Raises
    ------
    ChexlibError
        What a rank raised of this family.
    ClusterError
        Any other failure; the message names rank and host, and has the engines' last lines.
    """
    began, seen, suspicion = time.monotonic(), None, {}
    while True:
        done = [answer for answer in pending if answer.wait(timeout=_PRESENTLY / len(pending))]
        if report and pending[0].data and pending[0].data != seen:
            seen = dict(pending[0].data)
            report(seen)
        if any(answer.exception() is not None for answer in done):
            raise explain(engines, _settle(pending))
        if len(done) == len(pending):
            return [answer.get() for answer in pending]
        require_alive(engines)  # seen before the ranks' own end, where the machine is busy
        if frozen := [who for who in engines.identities if _stopped(who)]:
            since = suspicion.setdefault("frozen", time.monotonic())
            if time.monotonic() - since > STALL_REPORT:
                raise ClusterError(
                    f"{_names(frozen)} does not run: it was stopped by a signal. "
                    f"{last_lines(engines)}"
                )
        else:
            suspicion.pop("frozen", None)
        for rank in stalled_ranks(engines.output()):
            if rank not in suspicion:
                suspicion[rank] = time.monotonic()
                engines.log.warning(
                    "%s has kept the other ranks waiting for %d s.",
                    _names([engines.identities[rank]]),
                    STALL_REPORT,
                )
        if timeout is not None and time.monotonic() - began > timeout:
            raise ClusterError(
                f"{name} did not end within {timeout} s on {len(pending)} engines. "
                f"{last_lines(engines)}"
            )


def require_alive(engines) -> None:
    """ClusterError if the engines' controller or their launcher has ended."""
    if status(engines.cluster.controller.process.pid) == psutil.STATUS_ZOMBIE:
        raise ClusterError(
            f"the engines' controller on {socket.gethostname()} has ended. {last_lines(engines)}"
        )
    if not engines.launcher_runs():
        raise _death(engines) or ClusterError(
            f"the launcher of the engines has ended. {last_lines(engines)}"
        )


def explain(engines, failed: dict[int, BaseException]) -> ChexlibError:
    """The error to raise for what some ranks raised: the cause rather than its consequences on
    other ranks.
    """
    kinds = {rank: getattr(error, "ename", type(error).__name__) for rank, error in failed.items()}
    texts = {rank: getattr(error, "evalue", str(error)) for rank, error in failed.items()}
    for rank, kind in kinds.items():
        error_type = getattr(chexlib.errors, kind, None)
        if isinstance(error_type, type) and issubclass(error_type, ChexlibError):
            return error_type(texts[rank])
    if stalled := stalled_ranks(engines.output()):
        who = _names([engines.identities[rank] for rank in stalled])
        return ClusterError(
            f"{who} kept the other ranks waiting for more than {engines.stall} s. "
            f"{last_lines(engines)}"
        )
    # A rank that dies takes the others with it, and they all look alike: the launcher knows which
    # one it was.
    until = time.monotonic() + LAUNCHER_GRACE
    while (
        set(kinds.values()) == {"EngineError"}
        and engines.launcher_runs()
        and time.monotonic() < until
    ):
        time.sleep(_PRESENTLY)
    if death := _death(engines):
        return death
    consequences = ("EngineError", "HorovodInternalError")
    causes = [rank for rank, kind in kinds.items() if kind not in consequences]
    rank = min(causes or failed)
    who = _names([engines.identities[rank]])
    return ClusterError(f"{who} failed with {kinds[rank]}: {texts[rank]}. {last_lines(engines)}")


def _death(engines) -> ClusterError | None:
    """The error for a rank that died of a signal, if the launcher has said so."""
    died = re.search(
        r"process rank (\d+) with PID \d+ on node \S+ exited on\s+(signal \d+ \([^)]*\))",
        engines.output(),
    )
    if not died:
        return None
    who = _names([engines.identities[int(died.group(1))]])
    return ClusterError(f"{who} died of {died.group(2)}. {last_lines(engines)}")


def stalled_ranks(output: str) -> list[int]:
    """The ranks that Horovod's stall inspector names in the engines' output."""
    if "subset of ranks" not in output:
        return []
    named = re.findall(r"^(\d+)!?: \[", output, re.MULTILINE)
    return sorted({int(rank) for rank in named})


def last_lines(engines) -> str:
    """The end of what the engines printed, for a message."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", engines.output())  # IPython colours its tracebacks
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "The engines printed nothing. Start them again, and fewer of them if that does not help."
    return "\n".join(["Look for the cause in the engines' last lines:", *lines[-LINES:]])


def _settle(pending: list) -> dict[int, BaseException]:
    """Exceptions by rank, once all ranks have ended or the time of grace is over."""
    until = time.monotonic() + GRACE
    for answer in pending:
        answer.wait(timeout=max(0.0, until - time.monotonic()))
    errors = {}
    for rank, answer in enumerate(pending):
        if answer.ready() and answer.exception() is not None:
            errors[rank] = answer.exception()
    return errors


def _names(identities: list[dict]) -> str:
    return " and ".join(f"rank {who['rank']} on {who['host']}" for who in identities)


def status(pid: int) -> str:
    """Status of a process of this host as psutil names it, zombie if it is gone."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def _stopped(who: dict) -> bool:
    """Is this rank, if it is on this host, frozen by SIGSTOP? Elsewhere the controller misses its
    heartbeat.
    """
    if who["host"] != socket.gethostname():
        return False
    return status(who["pid"]) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
