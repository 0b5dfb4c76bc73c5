"""A run on a cluster that grows, shrinks and ends with one long shard: ``elastic.py FOLDER``, prints JSON.

A process of its own, because a test session has a Ray of its own. The nodes are raylets on this machine.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import engine_doubles
import ray
from ray.cluster_utils import Cluster

from segbatch.config import EngineConfig
from segbatch.engine import Control, make
from segbatch.engine.ray_actors import pool
from segbatch.records import ShardRef

NODE_CPUS = 2
LONG_S = 8.0
SHARDS = 2000


@dataclass
class Seen:
    """What happened.

    Attributes:
        actors: CPUs that actors held when the first machine was alone, when another had joined, after that had
            left, when a third had joined, and at the end, while one shard was still at work.
        shards: every outcome's.
        rows: as they were reported.
    """

    actors: list[float] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def actors_up(log: Path) -> int:
    """How many actors were opened so far."""
    return log.read_text().count("open") if log.exists() else 0


def wait_for_actors(log: Path, count: int) -> None:
    until = time.monotonic() + 120
    while actors_up(log) < count:
        assert time.monotonic() < until, f"{actors_up(log)} actors of {count}"
        time.sleep(0.1)


def cpus_in_use() -> float:
    """Of all nodes."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return float(total.get("CPU", 0) - free.get("CPU", 0))


def wait_for_use(*cpus: float) -> float:
    """CPUs in use: as soon as they are one of ``cpus``, or after a while."""
    until = time.monotonic() + 60
    while (used := cpus_in_use()) not in cpus and time.monotonic() < until:
        time.sleep(0.1)
    return used


def main() -> None:
    folder = Path(sys.argv[1])
    log, seen = folder / "log", Seen()
    pool._LOOK_S, pool._IDLE_S = 0.5, 1.0
    options = {"num_cpus": NODE_CPUS, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    ray.init(address=cluster.address, log_to_driver=False)
    changed = threading.Event()

    def shards() -> Iterator[ShardRef]:
        """As many as it takes until the nodes have changed, and a long one."""
        for shard in engine_doubles.shards(folder, SHARDS):
            if changed.is_set():
                break
            yield shard
        yield engine_doubles.shards(folder, SHARDS + 1)[-1]

    def work() -> None:
        task = engine_doubles.Sleeping(str(log), 0.5, {SHARDS: LONG_S})
        engine = make(EngineConfig(kind="ray", in_flight=1, threads=1, speculate=0))
        engine.start()
        for outcome in engine.map(task, shards(), Control(on_rows=seen.rows.append)):
            seen.shards.append(outcome.shard)
        engine.close()

    working = threading.Thread(target=work)
    working.start()
    try:  # here, for only the main thread may start nodes
        wait_for_actors(log, 1)
        seen.actors.append(wait_for_use(1))
        node: Any = cluster.add_node(**options)
        wait_for_actors(log, 3)  # Ray chooses where they are
        seen.actors.append(wait_for_use(3))
        cluster.remove_node(node, allow_graceful=False)
        seen.actors.append(wait_for_use(1, 2))
        cluster.add_node(**options)
        seen.actors.append(wait_for_use(3))
    finally:
        changed.set()
    seen.actors.append(wait_for_use(2))
    working.join()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main()
