"""What ranks do together, under Keras 3, and nothing when there is only one.

Horovod's own Keras classes average nothing under Keras 3 (see the README's FAQ), so the few collectives that
training needs are called here directly.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

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

    def broadcast(self, variables: list) -> None:
        """Give every rank the values of rank 0, in place. `variables` are Keras variables."""
        if self.ranks > 1:
            import horovod.tensorflow as hvd

            hvd.broadcast_variables([v.value for v in variables], root_rank=0)

    def gather(self, value: Any) -> list:
        """The picklable `value` of every rank, in the order of ranks, on every rank."""
        if self.ranks == 1:
            return [value]
        import horovod.tensorflow as hvd

        return hvd.allgather_object(value)


def join_world() -> World:
    """Find the ranks this process belongs to, and start Horovod if an MPI launcher made more than one."""
    launched = max((int(os.environ.get(name) or 1) for name in _LAUNCHERS), default=1)
    if launched == 1:
        return World()
    import horovod.tensorflow as hvd

    if not hvd.is_initialized():
        hvd.init()
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
        "mpi_built": hvd.mpi_built(),
    }
