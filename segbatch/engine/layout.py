"""How many actors a cluster carries, and what share of a node each of them gets."""

from collections.abc import Sequence
from dataclasses import dataclass

_CPUS_PER_ACTOR = 4
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Node:
    """What a machine of the cluster has."""

    cpus: int
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """What one actor gets; ``gpus`` may be a fraction."""

    cpus: int
    gpus: float = 0.0


def layout(nodes: Sequence[Node], least: int = 0, most: int = 0, gpus: float = 0.0) -> tuple[int, Share]:
    """How many actors, and the share of each: one for every four CPUs, or for every ``gpus`` GPUs.

    Args:
        nodes: at least one has CPUs.
        least, most: bounds of the number of actors; 0 is none.
        gpus: GPUs of one actor.

    >>> layout([Node(2)]), layout([Node(16)])
    ((1, Share(cpus=1, gpus=0.0)), (3, Share(cpus=5, gpus=0.0)))
    >>> layout([Node(16)], least=5, most=5), layout([Node(4)] * 4)
    ((5, Share(cpus=3, gpus=0.0)), (4, Share(cpus=3, gpus=0.0)))
    >>> layout([Node(16, 2), Node(16, 2)], gpus=0.5)
    (8, Share(cpus=3, gpus=0.5))
    """
    if gpus:
        carried = sum(_by_gpu(node, gpus) for node in nodes if node.cpus)
    else:
        carried = sum(max(cpus // _CPUS_PER_ACTOR, 1) for cpus in _usable(nodes) if cpus)
    actors = within(carried, max(least, 1), most)
    shares = (Share(cpus, gpus) for cpus in range(max(n.cpus for n in nodes), 0, -1))
    return actors, next((s for s in shares if places(nodes, s) >= actors), Share(1, gpus))


def threads(nodes: Sequence[Node], actors: int, share: Share) -> int:
    """Threads of each actor: all CPUs of the cluster divided by the actors, but no more than its own node has for it.

    >>> threads([Node(2)], 1, Share(1)), threads([Node(64), Node(64), Node(16, 1)], 1, Share(15, 1.0))
    (2, 16)
    """
    carriers = [n for n in nodes if not share.gpus or _by_gpu(n, share.gpus)] or nodes
    here = max(n.cpus // max(places([n], share), 1) for n in carriers)
    return max(min(sum(n.cpus for n in nodes) // actors, here), 1)


def places(nodes: Sequence[Node], share: Share) -> int:
    """How many actors of a share the nodes carry.

    >>> places([Node(4), Node(4)], Share(2)), places([Node(8, 1), Node(8)], Share(1, 0.25))
    (3, 4)
    """
    by_cpu = [cpus // share.cpus for cpus in _usable(nodes)]
    if not share.gpus:
        return sum(by_cpu)
    return sum(min(n, _by_gpu(node, share.gpus)) for n, node in zip(by_cpu, nodes, strict=True))


def within(actors: int, least: int, most: int) -> int:
    """``actors``, but not fewer than ``least`` and not more than ``most``, 0 being no bound.

    >>> within(3, 1, 2), within(3, 5, 0), within(0, 1, 0)
    (2, 5, 1)
    """
    return max(min(actors, most) if most else actors, least)


def _usable(nodes: Sequence[Node]) -> list[int]:
    """CPUs for actors; one CPU of the largest node stays free, unless it is its only one."""
    cpus = [n.cpus for n in nodes]
    if cpus:
        largest = cpus.index(max(cpus))
        cpus[largest] = max(cpus[largest] - 1, 1)
    return cpus


def _by_gpu(node: Node, gpus: float) -> int:
    """Actors that a node's GPUs carry; one that takes a part of a GPU never lies across two."""
    if gpus >= 1:
        return int(node.gpus / gpus + _ROUNDING)
    return int(node.gpus) * int(1 / gpus + _ROUNDING)
