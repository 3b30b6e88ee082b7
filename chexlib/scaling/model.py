"""Seconds of a data-parallel training step on 1 to 1,024 nodes, and what follows from them.

A step is the compute of the slowest rank, and what is left of Horovod's allreduces when it ends.
Horovod (Sergeev and Del Balso 2018) looks every cycle for gradients that all ranks have, packs them
into its fusion buffer and reduces one buffer after the other, beside the backward pass that makes
the next ones. Which gradients all ranks have is negotiated at rank 0; since Horovod 0.16 an answer
is kept and costs a few small messages, before that rank 0 went through a request of every rank for
every gradient (Kurth et al. 2018; Romero et al. 2022).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import integrate, stats

from chexlib.errors import ConfigError
from chexlib.scaling.network import Fabric, allreduce_seconds, hierarchical_seconds
from chexlib.scaling.workload import Workload

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Horovod:
    """How gradients are brought together.

    The defaults are those of Horovod 0.28 under this project's training.
    """

    fusion: float = 128 * 2**20  # bytes of the fusion buffer, HOROVOD_FUSION_THRESHOLD
    cycle: float = 1e-3  # seconds, HOROVOD_CYCLE_TIME
    # Beside the backward pass; a grouped allreduce waits for the last gradient.
    overlap: bool = False
    # Seconds that rank 0 takes for one gradient of one rank; 0: answers are kept.
    request: float = 0.0
    algorithm: str = "ring"
    hierarchical: bool = False  # first inside each node


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind, and what joins them."""

    name: str
    cores: int  # of a node
    peak: float  # FLOP/s of a node
    watts: float  # of a node's processors
    fabric: Fabric
    spread: float = 0.0  # standard deviation of the processors' speeds over their mean
    processors: int = 2  # of a node, each with a speed of its own
    source: str = ""


@dataclass(frozen=True)
class Job:
    """What is trained, and how a node takes its part."""

    workload: Workload
    speed: float  # images/s that a node computes, nothing being communicated
    per_node: int  # ranks
    batch: int  # images a rank
    images: int  # of an epoch
    epochs: float
    fixed: float = 0.0  # seconds of a step's compute that do not depend on the batch


def hardware_efficiency(images: float, flop_per_image: float, seconds: float, peak: float) -> float:
    """Share of the peak that a training used: images x FLOP an image / (seconds x peak in FLOP/s)."""
    return images * flop_per_image / (seconds * peak)


@functools.cache
def expected_slowest(n: int) -> float:
    """Mean of the largest of `n` standard normal numbers: by so many deviations the slowest of `n`
    is behind.
    """
    density = stats.norm.pdf
    return integrate.quad(
        lambda z: n * z * density(z) * stats.norm.cdf(z) ** (n - 1), -8, 10, limit=200
    )[0]


def communication_left(
    workload: Workload,
    compute: float,
    *,
    nodes: int,
    per_node: int,
    fabric: Fabric,
    horovod: Horovod,
) -> float:
    """Seconds from the end of a step's compute to the end of its last allreduce.

    Parameters
    ----------
    compute : float
        Seconds of the step's compute, the same on all ranks.
    """
    ranks, n = nodes * per_node, len(workload.sizes)
    if ranks == 1:
        return 0.0
    place = {"nodes": nodes, "per_node": per_node, "fabric": fabric, "algorithm": horovod.algorithm}
    reduce = functools.partial(
        hierarchical_seconds if horovod.hierarchical else allreduce_seconds, **place
    )
    latency = (fabric.between if nodes > 1 else fabric.inside).latency
    asking = ranks * latency if horovod.request else 2 * math.ceil(math.log2(ranks)) * latency
    ready = np.array(workload.ready) * compute if horovod.overlap else np.full(n, compute)
    clock, looked, i = 0.0, -math.inf, 0
    while i < n:
        # Horovod sleeps for what is left of the cycle since it looked last: half of one in the mean
        # after idling.
        idle = ready[i] > max(clock, looked + horovod.cycle)
        clock = looked = (
            ready[i] + horovod.cycle / 2 if idle else max(clock, looked + horovod.cycle)
        )
        until = int(np.searchsorted(ready, clock, side="right"))
        clock += asking + horovod.request * ranks * (until - i)
        clock += sum(map(reduce, _buffers(workload.sizes[i:until], horovod)))
        i = until
    return clock - compute


def _buffers(sizes: Sequence[float], horovod: Horovod) -> list[float]:
    """Bytes of each allreduce: gradients are packed in their order; a group stays together."""
    if not horovod.overlap:
        return [sum(sizes)]
    filled = [0.0]
    for size in sizes:
        if filled[-1] and filled[-1] + size > horovod.fusion:
            filled.append(0.0)
        filled[-1] += size
    return filled


def project(
    job: Job,
    cluster: Cluster,
    *,
    horovod: Horovod,
    nodes: Sequence[int] = NODES,
) -> pd.DataFrame:
    """What a training would take on each number of nodes, each rank having its own batch (weak
    scaling).

    Returns
    -------
    DataFrame
        A row a number of nodes: ranks, batch (a rank's), global_batch, step_seconds and its parts
        compute, waiting (for the slowest) and communication; images_per_second, efficiency (over as
        many times one node), epoch_seconds, solution_hours (of all epochs), hardware_efficiency,
        core_hours, kwh (of processors).

    Raises
    ------
    ConfigError
        A number of nodes or of ranks a node below 1.
    """
    if min([*nodes, job.per_node]) < 1:
        raise ConfigError(
            f"{min(nodes)} nodes of {job.per_node} ranks are not accepted. Use at least 1 of each."
        )
    rows = [_row(job, cluster, horovod, n) for n in nodes]
    alone = _row(job, cluster, horovod, 1)["images_per_second"]
    table = pd.DataFrame(rows)
    table.insert(9, "efficiency", table["images_per_second"] / table["nodes"] / alone)
    return table.set_index("nodes")


def _row(job: Job, cluster: Cluster, horovod: Horovod, nodes: int) -> dict:
    ranks = nodes * job.per_node
    batch = job.batch
    compute = job.fixed + batch * job.per_node / job.speed
    waiting = compute * cluster.spread * expected_slowest(nodes * cluster.processors)
    place = {"nodes": nodes, "per_node": job.per_node, "fabric": cluster.fabric, "horovod": horovod}
    left = communication_left(job.workload, compute + waiting, **place)
    step = compute + waiting + left
    speed = ranks * batch / step
    seconds = job.images / speed * job.epochs
    return {
        "nodes": nodes,
        "ranks": ranks,
        "batch": batch,
        "global_batch": ranks * batch,
        "step_seconds": step,
        "compute": compute,
        "waiting": waiting,
        "communication": left,
        "images_per_second": speed,
        "epoch_seconds": job.images / speed,
        "solution_hours": seconds / 3600,
        "hardware_efficiency": hardware_efficiency(
            job.images * job.epochs, job.workload.gflop * 1e9, seconds, nodes * cluster.peak
        ),
        "core_hours": nodes * cluster.cores * seconds / 3600,
        "kwh": nodes * cluster.watts * seconds / 3.6e6,
    }
