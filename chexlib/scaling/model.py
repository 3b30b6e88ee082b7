"""Seconds of a data-parallel training step on 1 to 1,024 nodes, and what follows from them.

A message of m bytes takes alpha + m/bandwidth (Hockney 1994; for collectives Thakur, Rabenseifner
and Gropp 2005). A fabric has two levels: ranks of one node speak through its memory, and all ranks
of a node share its network card. In each round of an allreduce all ranks wait for the slowest
message.

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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import integrate, stats

from chexlib.errors import ConfigError
from chexlib.scaling.workload import Workload

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _check_above_zero(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}={value!r} is not accepted. Use a number above 0.")


@dataclass(frozen=True)
class Link:
    """What a message crosses."""

    latency: float  # seconds a message, alpha
    bandwidth: float  # bytes a second, each way

    def __post_init__(self):
        _check_above_zero(bandwidth=self.bandwidth)
        if not self.latency >= 0:
            raise ConfigError(f"latency={self.latency!r} is not accepted. Use seconds, 0 or more.")


@dataclass(frozen=True)
class Fabric:
    """Two levels, and what the processor does for each byte: `handling` beside the wire, `copying`
    after it.
    """

    inside: Link  # between ranks of a node
    between: Link  # a node's network card
    # Processor's seconds a byte sent, for the network protocol, while the wire is busy.
    handling: float = 0.0
    # Processor's seconds a byte of an allreduce, for fusion buffer and addition.
    copying: float = 0.0


@dataclass(frozen=True)
class Round:
    """Messages that are sent at once: `inside` a node, and by how many ranks of a node, at most, to
    `outside`.
    """

    size: float  # bytes of each message
    inside: bool
    outside: int
    times: int = 1


def ring(size: float, nodes: int, per_node: int) -> Iterator[Round]:
    """Each rank sends a P-th to its neighbour, P-1 times to add up, P-1 times to hand round
    (Patarasuk, Yuan 2009).
    """
    ranks = nodes * per_node
    if ranks > 1:
        yield Round(size / ranks, per_node > 1, int(nodes > 1), 2 * (ranks - 1))


def recursive_doubling(size: float, nodes: int, per_node: int) -> Iterator[Round]:
    """Pairs at distances 1, 2, 4, ... exchange all they have; ranks beyond a power of two hand in
    and get back.
    """
    ranks = nodes * per_node
    power = 2 ** int(math.log2(ranks))
    extra = ranks - power
    active = [*range(1, 2 * extra, 2), *range(2 * extra, ranks)]
    if extra:
        yield _round(size, per_node, [(2 * i, 2 * i + 1) for i in range(extra)], times=2)
    for bit in range(int(math.log2(power))):
        pairs = [(rank, active[i ^ 2**bit]) for i, rank in enumerate(active)]
        yield _round(size, per_node, pairs)


def _round(size: float, per_node: int, pairs: Sequence[tuple[int, int]], times: int = 1) -> Round:
    """Of messages from one rank to another, ranks being numbered node by node."""
    nodes = [(a // per_node, b // per_node) for a, b in pairs]
    leaving = Counter(a for a, b in nodes if a != b)
    return Round(size, any(a == b for a, b in nodes), max(leaving.values(), default=0), times)


ALGORITHMS = {"ring": ring, "recursive doubling": recursive_doubling}


def allreduce_seconds(
    size: float, *, nodes: int, per_node: int, fabric: Fabric, algorithm: str = "ring"
) -> float:
    """Seconds of one allreduce.

    Parameters
    ----------
    size : float
        Bytes that each rank holds.
    nodes, per_node : int
        Nodes, and ranks on each; ranks are numbered node by node.
    algorithm : "ring" or "recursive doubling"

    Examples
    --------
    >>> wire = Link(latency=0.001, bandwidth=1e6)
    >>> allreduce_seconds(4e6, nodes=4, per_node=1, fabric=Fabric(wire, wire))  # 6 rounds of 1 ms + 1 MB / 1 MB/s
    6.006
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            f"algorithm={algorithm!r} is not known. Use one of {', '.join(ALGORITHMS)}."
        )
    if nodes < 1 or per_node < 1:
        raise ConfigError(
            f"{nodes} nodes of {per_node} ranks are not accepted. Use at least 1 of each."
        )
    if nodes * per_node == 1:
        return 0.0
    total = fabric.copying * size
    for step in ALGORITHMS[algorithm](size, nodes, per_node):
        seconds = 0.0
        if step.inside:
            seconds = fabric.inside.latency + step.size / fabric.inside.bandwidth
        if step.outside:
            wire = step.outside * step.size / fabric.between.bandwidth
            seconds = max(seconds, fabric.between.latency + max(wire, fabric.handling * step.size))
        total += step.times * seconds
    return total


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

    def __post_init__(self):
        _check_above_zero(cores=self.cores, peak=self.peak, watts=self.watts)


@dataclass(frozen=True)
class Job:
    """What is trained, and how a node takes its part."""

    workload: Workload
    speed: float  # images/s that a node computes, nothing being communicated
    per_node: int  # ranks
    batch: int  # images per rank
    images: int  # of an epoch
    epochs: float

    def __post_init__(self):
        _check_above_zero(speed=self.speed, batch=self.batch)


def hardware_efficiency(images: float, flop_per_image: float, seconds: float, peak: float) -> float:
    """Share of the peak that a training used: images x FLOP an image / (seconds x peak in FLOP/s)."""
    return images * flop_per_image / (seconds * peak)


@functools.cache
def expected_slowest(n: int) -> float:
    """Mean of the largest of `n` standard normal numbers: by so many deviations the slowest of `n`
    is behind.
    """

    def weighted(z: float) -> float:
        return n * z * stats.norm.pdf(z) * stats.norm.cdf(z) ** (n - 1)

    mean, _ = integrate.quad(weighted, -8, 10, limit=200)
    return mean


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
    ranks, gradients = nodes * per_node, len(workload.sizes)
    if ranks == 1:
        return 0.0
    latency = (fabric.between if nodes > 1 else fabric.inside).latency
    asking = ranks * latency if horovod.request else 2 * math.ceil(math.log2(ranks)) * latency
    ready = np.full(gradients, compute)
    if horovod.overlap:
        ready = np.array(workload.ready) * compute
    clock, looked, done = 0.0, -math.inf, 0
    while done < gradients:
        # Horovod sleeps for what is left of the cycle since it looked last: half of one in the mean
        # after idling.
        clock = max(clock, looked + horovod.cycle)
        if ready[done] > clock:
            clock = ready[done] + horovod.cycle / 2
        looked = clock
        until = int(np.searchsorted(ready, clock, side="right"))
        clock += asking + horovod.request * ranks * (until - done)
        clock += sum(
            allreduce_seconds(
                size,
                nodes=nodes,
                per_node=per_node,
                fabric=fabric,
                algorithm=horovod.algorithm,
            )
            for size in _buffers(workload.sizes[done:until], horovod)
        )
        done = until
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
        A number of nodes or of ranks per node below 1.
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
    compute = job.batch * job.per_node / job.speed
    waiting = compute * cluster.spread * expected_slowest(nodes * cluster.processors)
    left = communication_left(
        job.workload,
        compute + waiting,
        nodes=nodes,
        per_node=job.per_node,
        fabric=cluster.fabric,
        horovod=horovod,
    )
    step = compute + waiting + left
    speed = ranks * job.batch / step
    seconds = job.images / speed * job.epochs
    images, flop = job.images * job.epochs, job.workload.gflop * 1e9
    return {
        "nodes": nodes,
        "ranks": ranks,
        "batch": job.batch,
        "global_batch": ranks * job.batch,
        "step_seconds": step,
        "compute": compute,
        "waiting": waiting,
        "communication": left,
        "images_per_second": speed,
        "epoch_seconds": job.images / speed,
        "solution_hours": seconds / 3600,
        "hardware_efficiency": hardware_efficiency(images, flop, seconds, nodes * cluster.peak),
        "core_hours": nodes * cluster.cores * seconds / 3600,
        "kwh": nodes * cluster.watts * seconds / 3.6e6,
    }


def deal_out(cores: int, ranks: int) -> tuple[int, int]:
    """Threads of each rank of a node, and cores that it leaves to its communication: two, as the
    study did, or fewer.

    Raises
    ------
    ConfigError
        More ranks than cores, or no whole number of them.
    """
    if ranks % 1 or not 1 <= ranks <= cores:
        raise ConfigError(
            f"{ranks:g} ranks on a node of {cores:g} cores are not accepted. Use 1 to {cores:g}."
        )
    each = int(cores // ranks)
    spare = min(2, each - 1)
    return each - spare, spare
