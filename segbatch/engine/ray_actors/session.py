"""Ray itself: connected to, or started and stopped with the run."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segbatch.config import EngineConfig
from segbatch.engine.base import Control
from segbatch.engine.ray_actors import nodes
from segbatch.engine.ray_actors.actor import version
from segbatch.engine.ray_actors.driver import Driver
from segbatch.engine.ray_actors.errors import last_line
from segbatch.errors import EngineError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task
from segbatch.version import __version__

_OBJECT_STORE_BYTES = 100 << 20


class RayEngine:
    """See ``engine.base.Engine``. Uses the Ray that is running, else the one RAY_ADDRESS names, else a local one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._owns_ray = False
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Connect to Ray or start a local one.

        Raises:
            EngineError: Ray cannot be reached or started, or a node has another segbatch version.
        """
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM) if in_main else None
        try:
            self._connect(address)
        except (RayError, ConnectionError, RuntimeError, OSError, ValueError) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            raise EngineError(f"cannot use {where}: {error}", "check RAY_ADDRESS, or use --engine inline") from error
        finally:
            if handler is not None:  # Ray's own handler would exit at once instead of draining
                signal.signal(signal.SIGTERM, handler)
        self._owns_ray = True
        if address:
            self._check_versions()

    def _connect(self, address: str | None) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if address:
            ray.init(address=address, **options)
            return
        with _sessions_of_their_own() as leaders:
            ray.init(
                address="local",  # never somebody else's that happens to run on this machine
                num_cpus=max(os.cpu_count() or 1, 2),  # an actor and one CPU that stays free
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **options,
            )
        self._guard = _guard(leaders)

    def _check_versions(self) -> None:
        for node in nodes.alive():
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                found = ray.get(version.options(scheduling_strategy=place).remote(), timeout=60)
            except RayError as error:
                raise EngineError(
                    f"node {node['NodeManagerAddress']} cannot import segbatch: {last_line(error)}",
                    f"install segbatch {__version__} on every node",
                ) from error
            if found != __version__:
                raise EngineError(
                    f"node {node['NodeManagerAddress']} has segbatch {found}, the driver {__version__}",
                    "install the same version everywhere",
                )

    def close(self) -> None:
        """Stop the local Ray, or leave the cluster as it was found."""
        if self._guard is not None:
            self._guard.kill()  # before the process ids may belong to others
            self._guard.communicate()
            self._guard = None
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
        self._owns_ray = False

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
        """Work on the shards with as many actors as the machines carry."""
        driver = Driver(self._config, task, shards, control)
        try:
            yield from driver.outcomes()
        finally:
            driver.close()


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
