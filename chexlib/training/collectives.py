"""What ranks do together, under Keras 3, and nothing when there is only one.

Horovod's own Keras classes average nothing under Keras 3 (see the README's FAQ), so the few collectives that
training needs are called here directly.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from chexlib.errors import ChexlibError, ClusterError

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

    def sum(self, tensors: list) -> list:
        """Element-wise sum over ranks of a list of tensors, in one fused allreduce."""
        if self.ranks == 1:
            return list(tensors)
        import horovod.tensorflow as hvd

        return hvd.grouped_allreduce(list(tensors), op=hvd.Sum)

    def batches(self, n: int, *, batch: int) -> list:
        """Places of this rank's images among `n`, every ranks-th, cut into batches of nearly equal size.

        There are as many batches on every rank, so that what ranks do together in one finds all of them; and none of a
        few images, whose statistics mean nothing.
        """
        most = -(-n // self.ranks)
        return np.array_split(np.arange(self.rank, n, self.ranks), max(1, -(-most // batch)))

    def broadcast(self, variables: list) -> None:
        """Give every rank the values of rank 0, in place. `variables` are Keras variables."""
        if self.ranks > 1:
            import horovod.tensorflow as hvd

            hvd.broadcast_variables([v.value for v in variables], root_rank=0)

    def average(self, variables: list) -> None:
        """Give every rank the mean over ranks, in place, such as of batch norm's moving statistics."""
        if self.ranks > 1 and variables:
            for variable, total in zip(variables, self.sum([v.value for v in variables]), strict=True):
                variable.assign(total / self.ranks)

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make()` returns on rank 0, on every rank; an error of ours there is raised on every rank."""
        if self.ranks == 1:
            return make()
        import horovod.tensorflow as hvd

        answer = None
        if self.first:
            try:
                answer = make()
            except ChexlibError as error:
                answer = error
        answer = hvd.broadcast_object(answer, root_rank=0)
        if isinstance(answer, ChexlibError):
            raise answer
        return answer

    def meet(self) -> None:
        """Return when every rank has called this."""
        self.gather(None)

    def gather(self, value: Any) -> list:
        """The picklable `value` of every rank, in the order of ranks, on every rank."""
        if self.ranks == 1:
            return [value]
        import horovod.tensorflow as hvd

        return hvd.allgather_object(value)


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
    sums = world.gather([zlib.crc32(v.numpy().tobytes()) for v in variables.values()])
    differing = [name for name, found in zip(variables, zip(*sums, strict=True), strict=True) if len(set(found)) > 1]
    if not differing:
        return
    by_rank = dict(enumerate(found[list(variables).index(differing[0])] for found in sums))
    usual, times = Counter(by_rank.values()).most_common(1)[0]
    odd = [rank for rank, found in by_rank.items() if found != usual or times == 1]
    others = f", and {len(differing) - 1} more variables differ" if len(differing) > 1 else ""
    raise ClusterError(
        f"{when} the ranks no longer agree: {differing[0]} is not the same on rank {', '.join(map(str, odd))}"
        f"{'' if times == 1 else ' as on the others'}{others}. Training was stopped: go on from the last checkpoint "
        "with resume=true; if it happens again, look for a faulty host or a function that is not the same on all ranks."
    )


def join_world() -> World:
    """Find the ranks this process belongs to, and start Horovod if an MPI launcher made more than one.

    Raises
    ------
    ClusterError
        The launcher started more processes than found each other: each would train on its own, and write over all.
    """
    launched = {int(os.environ.get(name) or 1) for name in _LAUNCHERS}
    if launched == {1}:
        return World()
    import horovod.tensorflow as hvd

    if not hvd.is_initialized():
        hvd.init()
    if hvd.size() not in launched - {1}:
        raise ClusterError(
            f"{max(launched)} processes were started, but MPI joined {hvd.size()} of them. Start them with the "
            "MPI that Horovod was built with; under srun set SLURM_MPI_TYPE to what `srun --mpi=list` offers (pmix for "
            "Open MPI; pmi2 for Intel MPI, with I_MPI_PMI_LIBRARY naming Slurm's libpmi2.so)."
        )
    return World(rank=hvd.rank(), ranks=hvd.size())


def identify() -> dict:
    """Who this rank is: rank, size, host, process and the Horovod build. Used to check engines before work."""
    import horovod
    import horovod.tensorflow as hvd

    world = join_world()
    if not hvd.is_initialized():
        hvd.init()
    return {
        "rank": world.rank,
        "ranks": world.ranks,
        "local_rank": hvd.local_rank(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "horovod": horovod.__version__,
        "built": ", ".join(name for name in ("mpi", "gloo", "nccl", "ddl", "ccl") if getattr(hvd, f"{name}_built")()),
    }
