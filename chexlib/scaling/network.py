"""Seconds that an allreduce takes, by the alpha-beta model, on nodes of several ranks.

A message of m bytes takes alpha + m/bandwidth (Hockney 1994; for collectives Thakur, Rabenseifner
and Gropp 2005). A fabric has two levels: ranks of one node speak through its memory, and all ranks
of a node share its network card. In each round of an algorithm all ranks wait for the slowest
message.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from chexlib.errors import ConfigError


@dataclass(frozen=True)
class Link:
    """What a message crosses."""

    latency: float  # seconds a message, alpha
    bandwidth: float  # bytes a second, each way


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
    for i in range(int(math.log2(power))):
        yield _round(
            size, per_node, [(rank, active[place ^ 2**i]) for place, rank in enumerate(active)]
        )


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


def hierarchical_seconds(
    size: float, *, nodes: int, per_node: int, fabric: Fabric, algorithm: str = "ring"
) -> float:
    """Seconds of an allreduce in three: added up inside each node, between the nodes, and handed
    out inside.

    Open MPI's module han works so (Horovod's HOROVOD_HIERARCHICAL_ALLREDUCE is for GPUs): between
    the nodes each rank carries its own part of the gradients, and all share the card, so that the
    card carries them once.
    """
    if nodes == 1:
        return allreduce_seconds(
            size, nodes=1, per_node=per_node, fabric=fabric, algorithm=algorithm
        )
    within = allreduce_seconds(
        size, nodes=1, per_node=per_node, fabric=replace(fabric, copying=0.0)
    )
    return within + allreduce_seconds(
        size, nodes=nodes, per_node=1, fabric=fabric, algorithm=algorithm
    )
