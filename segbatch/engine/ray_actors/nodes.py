"""The machines of the cluster."""

from typing import Any

import ray

from segbatch.engine.layout import Node


def alive() -> list[dict[str, Any]]:
    """The nodes that are up, as Ray describes them."""
    return [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def sizes(nodes: list[dict[str, Any]]) -> list[Node]:
    """What each of them has."""
    return [Node(int(n["Resources"].get("CPU", 0)), float(n["Resources"].get("GPU", 0))) for n in nodes]
