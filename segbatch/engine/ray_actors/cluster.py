"""Everything that the driver asks of Ray."""

import contextlib
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RaySystemError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segbatch.engine.base import as_ours
from segbatch.engine.layout import Node
from segbatch.errors import ConfigError, SegbatchError

__all__ = ["GetTimeoutError", "OutOfMemoryError", "RayActorError", "RayError", "RayTaskError"]

_OBJECT_STORE_BYTES = 100 << 20
_OPTIONS: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


# -- the connection --------------------------------------------------------------------------------------------------


def is_up() -> bool:
    """Whether this process is connected."""
    return ray.is_initialized()


def connect(address: str) -> None:
    """Use the cluster at an address."""
    ray.init(address=address, **_OPTIONS)


def start_local() -> "subprocess.Popen[bytes]":
    """Start a Ray of one's own on this machine; gives its guard: however this process ends, Ray's are killed."""
    with _sessions_of_their_own() as leaders:
        ray.init(
            address="local",  # never somebody else's that happens to run on this machine
            num_cpus=max(os.cpu_count() or 1, 2),  # an actor and one CPU that stays free
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **_OPTIONS,
        )
    return _guard(leaders)


def disconnect() -> None:
    """Leave the cluster, or stop a local Ray."""
    ray.shutdown()


@contextlib.contextmanager
def _sessions_of_their_own() -> Iterator[list[int]]:
    """Ray's processes that start meanwhile lead sessions of their own; gives their process ids.

    A signal to the driver's process group, which is how Prefect cancels a run, then reaches the driver alone, and the
    actors live on while it drains.
    """
    from ray._private import services

    popen, leaders = services.ConsolePopen, []

    def start(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, start_new_session=True, **options)
        leaders.append(process.pid)
        return process

    services.ConsolePopen = start  # type: ignore[assignment,misc]
    try:
        yield leaders
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def _guard(leaders: Sequence[int]) -> "subprocess.Popen[bytes]":
    """A process that outlives the driver by a moment: however that ends, the groups of ``leaders`` are killed.

    Ray ties its daemons to the driver's life, but their own children linger for a minute.
    """
    groups = [f"-{pid}" for pid in leaders]
    command = ["sh", "-c", 'read _; kill -KILL "$@"', "guard", *groups]  # ``read`` ends with the driver's pipe
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


# -- machines --------------------------------------------------------------------------------------------------------


def nodes() -> list[dict[str, Any]]:
    """The nodes that are up, as Ray describes them."""
    return [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def sizes(found: Sequence[Mapping[str, Any]]) -> list[Node]:
    """What each of them has."""
    return [Node(int(n["Resources"].get("CPU", 0)), float(n["Resources"].get("GPU", 0))) for n in found]


def free() -> dict[str, float]:
    """What nobody has of the whole cluster, by the name of the resource."""
    found: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return found


def this_node() -> str:
    """Id of the node that the driver is on."""
    return ray.get_runtime_context().get_node_id()


# -- actors and calls ------------------------------------------------------------------------------------------------


def start_actor(kind: type, resources: Mapping[str, float], node: str = "", calls: int = 1) -> Any:
    """The handle of a new actor, which Ray never restarts.

    Args:
        kind: its class.
        resources: what it gets, by the names of Ray's options.
        node: the only one it may live on; empty: any.
        calls: how many are answered at once.
    """
    options: dict[str, Any] = {**resources, "max_restarts": 0, "max_concurrency": calls}
    if node:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(kind).options(**options).remote()


def ask_node(function: Any, node: str, *arguments: Any) -> Any:
    """The reference of what a remote function will say there."""
    return function.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)


def ask_gpu(function: Any, gpus: float, *arguments: Any) -> Any:
    """The reference of what a remote function will say once, in a process of its own that has so many GPUs."""
    return function.options(num_gpus=gpus).remote(*arguments)


def put(value: Any) -> Any:
    """A reference that every node can follow."""
    return ray.put(value)


def get(reference: Any, timeout_s: float) -> Any:
    """What a reference stands for.

    Raises:
        GetTimeoutError: it is not there in time.
        RayError: what made it has failed.
    """
    return ray.get(reference, timeout=timeout_s)


def wait(references: Sequence[Any], timeout_s: float) -> bool:
    """Whether all of them are there, or have failed, in time."""
    return not ray.wait(list(references), num_returns=len(references), timeout=timeout_s)[1]


def kill(handle: Any) -> None:
    """End an actor at once; one that is dead already is no error."""
    ray.kill(handle)


# -- errors ----------------------------------------------------------------------------------------------------------


def cause(error: RayTaskError) -> SegbatchError:
    """What a worker raised."""
    if isinstance(error.cause, RaySystemError) and "No module named" in str(error.cause):
        return ConfigError(
            f"the workers cannot use this model: {last_line(error.cause)}",
            "install its package on every node, or use --engine inline",
        )
    return as_ours(error.cause)


def last_line(error: BaseException) -> str:
    """The line of a long message that says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(" Some common causes")[0] if lines else type(error).__name__
