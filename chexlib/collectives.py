"""Collectives of the ranks: allreduce, broadcast, allgather and barrier; with one rank, nothing.

Horovod carries them where it is built, else mpi4py does. `CHEXLIB_COLLECTIVES=horovod` or `mpi4py`
forces one. Horovod's own Keras classes average nothing under Keras 3 (see the README's FAQ), so the
few collectives that training needs are called here directly. Only this file imports Horovod.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from chexlib.errors import FAULTS, ChexlibError, ClusterError, ConfigError
from chexlib.machine import import_tensorflow
from chexlib.mpi import CARRIED_BY

log = logging.getLogger(__name__)

CARRIERS = ("horovod", "mpi4py")
# Set by mpirun, prterun, srun and hydra for every process of an MPI job.
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class World:
    """The ranks of this training: `rank` of `ranks`. With one rank every method is the identity."""

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """True on the one rank that speaks and writes."""
        return self.rank == 0

    def allreduce(self, tensors: list) -> list:
        """Element-wise sum over ranks of a list of tensors of one type, in one fused allreduce."""
        return list(tensors) if self.ranks == 1 else carrier().allreduce(list(tensors))

    def allgather(self, tensor):
        """The rows of every rank's tensor, one after the other in the order of ranks.

        Gradients do not flow through.
        """
        return tensor if self.ranks == 1 else carrier().allgather(tensor)

    def batches(self, n: int, *, batch: int) -> list:
        """Places of this rank's images among `n`, every ranks-th, cut into batches of nearly equal
        size.

        There are as many batches on every rank, so that what ranks do together in one finds all of
        them; and none of a few images, whose statistics mean nothing.
        """
        most = -(-n // self.ranks)
        return np.array_split(np.arange(self.rank, n, self.ranks), max(1, -(-most // batch)))

    def broadcast(self, variables: list) -> None:
        """Give every rank the values of rank 0, in place. `variables` are Keras variables."""
        if self.ranks > 1:
            carrier().broadcast([v.value for v in variables])

    def average(self, variables: list) -> None:
        """Give every rank the mean over ranks, in place, such as of batch norm's moving statistics."""
        if self.ranks > 1 and variables:
            for variable, total in zip(
                variables, self.allreduce([v.value for v in variables]), strict=True
            ):
                variable.assign(total / self.ranks)

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """What `make()` returns on rank 0, on every rank; an error of ours, of a file or of the
        machine there is raised on every rank.
        """
        if self.ranks == 1:
            return make()
        answer = None
        if self.first:
            try:
                answer = make()
            except (ChexlibError, *FAULTS) as error:
                answer = error
        answer = carrier().broadcast_object(answer)
        if isinstance(answer, (ChexlibError, *FAULTS)):
            raise answer
        return answer

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self.allgather_object(None)

    def allgather_object(self, value: Any) -> list:
        """The picklable `value` of every rank, in the order of ranks, on every rank."""
        return [value] if self.ranks == 1 else carrier().allgather_object(value)


class _Horovod:
    """Collectives of Horovod, which orders them by name and fuses those that come together."""

    why = ""

    def __init__(self):
        import_tensorflow()
        import horovod
        import horovod.tensorflow as hvd

        if not hvd.is_initialized():
            hvd.init()
        self._hvd, self.rank, self.ranks = hvd, hvd.rank(), hvd.size()
        built = [
            name
            for name in ("mpi", "gloo", "nccl", "ddl", "ccl")
            if getattr(hvd, f"{name}_built")()
        ]
        self.name = f"Horovod {horovod.__version__} ({', '.join(built)})"

    def allreduce(self, tensors: list) -> list:
        return self._hvd.grouped_allreduce(tensors, op=self._hvd.Sum)

    def allgather(self, tensor):
        return self._hvd.allgather(tensor)

    def broadcast(self, variables: list) -> None:
        self._hvd.broadcast_variables(variables, root_rank=0)

    def broadcast_object(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, root_rank=0)

    def allgather_object(self, value: Any) -> list:
        return self._hvd.allgather_object(value)


class _Mpi4py:
    """Collectives of MPI, called from TensorFlow's graph through mpi4py.

    MPI takes collectives in the order in which they are called, and does not see a rank that never
    comes. So all collectives of one graph are put into the order in which they were traced, the
    same on every rank; and each begins with a wait for all ranks that names those that stay away,
    with Horovod's settings and in Horovod's words.
    """

    WATCHERS = 2  # the first ranks know who has come; two, since one of them may be who is missing

    def __init__(self, why: str = ""):
        import mpi4py
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise ClusterError(
                "this MPI lets only the main thread send, and TensorFlow computes in others. Use "
                "an MPI built with thread support (MPI_THREAD_SERIALIZED or MULTIPLE), as Open MPI "
                "5 and its wheel are."
            )
        self._mpi, self.why = MPI, why
        self._comm, self._arrivals, self._ends = (MPI.COMM_WORLD.Dup() for _ in range(3))
        self.rank, self.ranks = self._comm.rank, self._comm.size
        self.name = f"mpi4py {mpi4py.__version__}"
        self._given_up = None  # requests of a wait that was given up
        self._warn_after = float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS") or 60)
        self._give_up_after = float(os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or 0)
        atexit.register(self._end)

    def allreduce(self, tensors: list) -> list:
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        buffer = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        parts = tf.split(self._in_order(self._sum, buffer), [tf.size(tensor) for tensor in tensors])
        totals = [
            tf.reshape(part, tf.shape(tensor)) for part, tensor in zip(parts, tensors, strict=True)
        ]
        for total, tensor in zip(totals, tensors, strict=True):
            total.set_shape(tensor.shape)
        return totals

    def allgather(self, tensor):
        import tensorflow as tf

        rows = self._in_order(
            lambda array: np.concatenate(self.allgather_object(array)), tf.convert_to_tensor(tensor)
        )
        rows.set_shape([None, *tensor.shape[1:]])
        return rows

    def broadcast(self, variables: list) -> None:
        for variable in variables:
            values = np.array(variable.numpy(), order="C")
            self._await_all()
            self._comm.Bcast([values, values.nbytes, self._mpi.BYTE], root=0)
            variable.assign(values)

    def broadcast_object(self, value: Any) -> Any:
        self._await_all()
        return self._comm.bcast(value, root=0)

    def allgather_object(self, value: Any) -> list:
        self._await_all()
        return self._comm.allgather(value)

    def _in_order(self, function: Callable, tensor):
        """`function` of the tensor's values, after the collectives that were traced before in this
        graph.
        """
        import tensorflow as tf

        if tf.executing_eagerly():
            return tf.numpy_function(function, [tensor], tensor.dtype)
        graph = tf.compat.v1.get_default_graph()
        before = getattr(graph, "_chexlib_last_collective", None)
        with tf.control_dependencies([] if before is None else [before]):
            result = tf.numpy_function(function, [tensor], tensor.dtype)
        graph._chexlib_last_collective = result.op
        return result

    def _sum(self, values: np.ndarray) -> np.ndarray:
        total = np.empty_like(values)
        self._await_all()
        self._comm.Allreduce(values, total, op=self._mpi.SUM)
        return total

    def _await_all(self) -> None:
        """Return when every rank has come here.

        Raises
        ------
        ClusterError
            A rank did not come within the time to give up.
        """
        comm, nothing, began, warned = self._arrivals, bytearray(1), time.monotonic(), False
        sent = [
            comm.Isend(nothing, dest=w)
            for w in range(min(self.WATCHERS, self.ranks))
            if w != self.rank
        ]
        others = [
            rank for rank in range(self.ranks) if rank != self.rank and self.rank < self.WATCHERS
        ]
        came = {rank: comm.Irecv(bytearray(1), source=rank) for rank in others}
        barrier = comm.Ibarrier()
        while not barrier.Test():
            waited = time.monotonic() - began
            time.sleep(0 if waited < 1e-3 else 2e-4)  # another rank may need this core
            if waited > self._warn_after and not warned and came:
                warned = True
                self._name_missing(came, waited)
            if waited > 1 and self._ends.Iprobe(
                source=self._mpi.ANY_SOURCE, status=(last := self._mpi.Status())
            ):
                self._given_up = (sent, came, barrier)
                raise ClusterError(
                    f"rank {last.source} has ended, while rank {self.rank} waits for it. Look for "
                    "its error above."
                )
            # Who knows the names speaks first.
            if self._give_up_after and waited > self._give_up_after + (not came):
                missing = self._missing(came)
                self._given_up = (sent, came, barrier)  # MPI may still write to what they hold
                raise ClusterError(
                    f"rank {', '.join(map(str, missing)) or 'unknown'} kept the others waiting for "
                    f"more than {self._give_up_after:g} s. Look at what it was doing, and "
                    "continue from the last checkpoint with resume=true."
                )
        self._mpi.Request.Waitall([*sent, *came.values()])

    def _missing(self, came: dict) -> list[int]:
        return [rank for rank, request in came.items() if not request.Test()]

    def _name_missing(self, came: dict, waited: float) -> None:
        lines = [f"Waiting for {waited:.0f} s for a subset of ranks:"]
        lines += [f"{rank}: [a collective]" for rank in self._missing(came)]
        # What Python calls stderr may wait for a thread that waits here.
        os.write(2, "\n".join([*lines, ""]).encode())

    def _end(self) -> None:
        """Tell the others that this process ends: one that waits for it, or comes to wait, ends
        too.
        """
        if self._mpi.Is_finalized():
            return
        if self._given_up:  # a rank that does not answer does not end either
            self._mpi.COMM_WORLD.Abort(1)
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        sent = [self._ends.Isend(bytearray(1), dest=rank) for rank in others]
        together = self._ends.Ibarrier()
        while not together.Test():
            time.sleep(0.01)  # as long as it takes: another may have more to do, alone
        for rank in others:
            self._ends.Recv(bytearray(1), source=rank)
        self._mpi.Request.Waitall(sent)


_CARRIER: list = []  # the one of this process, once it is there


def carrier() -> _Horovod | _Mpi4py:
    """What carries the collectives of this process: Horovod where it is built, else mpi4py.

    Raises
    ------
    ConfigError
        CHEXLIB_COLLECTIVES names none.
    ClusterError
        The one it names is not there, or MPI does not allow threads.
    """
    if not _CARRIER:
        _CARRIER.append(_make_carrier())
        if _CARRIER[0].why and _CARRIER[0].rank == 0:
            log.warning(CARRIED_BY, _CARRIER[0].name, _CARRIER[0].why)
    return _CARRIER[0]


def _wanted_carrier() -> str:
    """What CHEXLIB_COLLECTIVES asks for, "" for nothing; ConfigError for what is none."""
    wanted = os.environ.get("CHEXLIB_COLLECTIVES") or ""
    if wanted not in ("", *CARRIERS):
        raise ConfigError(
            f"CHEXLIB_COLLECTIVES={wanted!r} is not accepted. Use {' or '.join(CARRIERS)}, or "
            "unset it."
        )
    return wanted


def _make_carrier() -> _Horovod | _Mpi4py:
    wanted = _wanted_carrier()
    if wanted == "mpi4py":
        return _Mpi4py("CHEXLIB_COLLECTIVES asks for it")
    try:
        import horovod.tensorflow  # noqa: F401
    # One that was built against another TensorFlow raises what TensorFlow likes.
    except Exception as error:
        reason = str(error).splitlines()[0]
        if wanted:
            raise ClusterError(
                f"CHEXLIB_COLLECTIVES=horovod is set, but Horovod is not built here ({reason}). "
                "Install a C++ compiler, remove .venv/.made and run `make env`. Or unset "
                "CHEXLIB_COLLECTIVES: mpi4py needs no compiler."
            ) from error
        return _Mpi4py(f"Horovod is not built here ({reason})")
    return _Horovod()


def require_agreement(world: World, variables: dict, *, when: str) -> None:
    """Check that every rank holds the same bits: of each variable a CRC-32 is compared over ranks.

    Parameters
    ----------
    variables : dict
        Keras variables by name.
    when : str
        For the message, such as "after epoch 2".

    Raises
    ------
    ClusterError
        On every rank, if one differs; the message names the first such variable and the ranks.
    """
    sums = world.allgather_object([zlib.crc32(v.numpy().tobytes()) for v in variables.values()])
    differing = [
        name
        for name, found in zip(variables, zip(*sums, strict=True), strict=True)
        if len(set(found)) > 1
    ]
    if not differing:
        return
    by_rank = dict(enumerate(found[list(variables).index(differing[0])] for found in sums))
    usual, times = Counter(by_rank.values()).most_common(1)[0]
    odd = [rank for rank, found in by_rank.items() if found != usual or times == 1]
    others = f", and {len(differing) - 1} more variables differ" if len(differing) > 1 else ""
    raise ClusterError(
        f"{when} the ranks no longer agree: {differing[0]} is not the same on rank "
        f"{', '.join(map(str, odd))}{'' if times == 1 else ' as on the others'}{others}. Continue "
        "from the last checkpoint with resume=true. If it happens again, look for a faulty host, or "
        "for a function that is not the same on all ranks."
    )


def expected_carrier() -> tuple[str, str]:
    """Which carrier `carrier` would make, and why it is not Horovod, found without loading
    TensorFlow or MPI.
    """
    wanted = _wanted_carrier()
    if wanted:
        return wanted, "" if wanted == "horovod" else "CHEXLIB_COLLECTIVES asks for it"
    if importlib.util.find_spec("horovod") is None:
        return "mpi4py", "Horovod is not built here"
    return "horovod", ""


def joined_world() -> World:
    """The ranks that this process has joined; one rank where it has joined none."""
    return World(rank=_CARRIER[0].rank, ranks=_CARRIER[0].ranks) if _CARRIER else World()


def join_world() -> World:
    """Find the ranks this process belongs to, and start their collectives if an MPI launcher made
    more than one.

    Raises
    ------
    ConfigError
        CHEXLIB_COLLECTIVES names no carrier.
    ClusterError
        The launcher started more processes than found each other: each would train on its own, and
        write over all.
    """
    _wanted_carrier()
    launched = {int(os.environ.get(name) or 1) for name in _LAUNCHERS}
    if launched == {1}:
        return World()
    ours = carrier()
    if ours.ranks not in launched - {1}:
        raise ClusterError(
            f"{max(launched)} processes were started, but MPI joined {ours.ranks} of them. Start "
            f"them with the MPI that {ours.name} was built with. Under srun, set SLURM_MPI_TYPE to "
            "what `srun --mpi=list` offers (pmix for Open MPI; pmi2 for Intel MPI, with "
            "I_MPI_PMI_LIBRARY naming Slurm's libpmi2.so)."
        )
    return World(rank=ours.rank, ranks=ours.ranks)


def identify() -> dict:
    """Who this rank is: rank, ranks, host, process, and what carries its collectives (and why not
    Horovod).
    """
    world, ours = join_world(), carrier()
    return {
        "rank": world.rank,
        "ranks": world.ranks,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "carrier": ours.name,
        "why": ours.why,
    }
