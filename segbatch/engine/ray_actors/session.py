"""Ray itself: connected to, or started and stopped with the run."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from segbatch.config import EngineConfig
from segbatch.engine.base import Control
from segbatch.engine.ray_actors import cluster
from segbatch.engine.ray_actors.actor import said, version
from segbatch.engine.ray_actors.cluster import RayError, last_line
from segbatch.engine.ray_actors.driver import Driver
from segbatch.errors import EngineError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task
from segbatch.version import __version__

T = TypeVar("T")

_GPU_ANSWER_S = 1800.0
"""For a GPU to come free, and to measure three number formats on it."""


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
        if cluster.is_up():
            return
        address = os.environ.get("RAY_ADDRESS")
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM) if in_main else None
        try:
            if address:
                cluster.connect(address)
            else:
                self._guard = cluster.start_local()
        except (RayError, ConnectionError, RuntimeError, OSError, ValueError) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray"
            raise EngineError(f"cannot use {where}: {error}", "check RAY_ADDRESS, or use --engine inline") from error
        finally:
            if handler is not None:  # Ray's own handler would exit at once instead of draining
                signal.signal(signal.SIGTERM, handler)
        self._owns_ray = True
        if address:
            self._check_versions()

    def _check_versions(self) -> None:
        for node in cluster.nodes():
            try:
                found = cluster.get(cluster.ask_node(version, node["NodeID"]), timeout_s=60)
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
        if self._owns_ray and cluster.is_up():
            cluster.disconnect()
        self._owns_ray = False

    def has_gpus(self) -> bool:
        """Whether a node has one."""
        return any(node.gpus > 0 for node in cluster.sizes(cluster.nodes()))

    def on_gpu(self, ask: Callable[[], T]) -> T:
        """Asked on a node with a GPU, in a process that ends afterwards and leaves the GPU's memory to the actors.

        The driver may be on a machine without one.
        """
        gpus = self._config.gpus_per_actor or 1.0
        try:
            found: T = cluster.get(cluster.ask_gpu(said, gpus, ask), _GPU_ANSWER_S)
        except cluster.GetTimeoutError as error:
            raise EngineError(
                f"no node had {gpus:g} GPUs to spare for {_GPU_ANSWER_S:.0f} s", "wait for other jobs to end"
            ) from error
        except cluster.RayTaskError as error:
            raise cluster.cause(error) from error
        except RayError as error:
            raise EngineError(
                f"the process that was to measure on a GPU died: {last_line(error)}", "run the same command again"
            ) from error
        return found

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
        """Work on the shards with as many actors as the machines carry."""
        driver = Driver(self._config, task, shards, control)
        try:
            yield from driver.outcomes()
        finally:
            driver.close()
