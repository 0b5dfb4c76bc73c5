"""How the engine scales: a model that sleeps, on a cluster of four nodes with more CPUs than the machine has.

The rate is taken from the moment that all actors are ready until the queue is empty: what an actor costs to start (an
interpreter of 200 MB and its imports, on the cores that there really are) is not part of it.

    python tests/bench/bench_scaling.py [--actors 1,2,4,8,16] [--seconds 1] [--shards 12]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import engine_doubles

NODES = 4


def rate(actors: int, seconds: float, per_actor: int, folder: Path) -> float:
    """Shards a second of ``actors`` actors, each of which sleeps ``seconds`` for a shard, one at a time.

    The sum of the actors' own rates, each from the end of one shard to the end of another: no edges to count.
    """
    from segbatch.config import EngineConfig
    from segbatch.engine import Control, make

    ready: list[float] = []
    empty: list[float] = []

    def shards() -> Iterator[engine_doubles.ShardRef]:
        """Without end until all actors are ready, then so many for each."""
        left = per_actor * actors
        for shard in engine_doubles.shards(folder, 100_000):
            left -= len(ready) >= actors
            if left < 0:
                break
            yield shard
        empty.append(time.monotonic())

    log = folder / "log"
    task = engine_doubles.Sleeping(str(log), seconds)
    engine = make(EngineConfig(kind="ray", actors=actors, threads=1, speculate=0))
    engine.start()
    control = Control(on_ready=lambda: ready.append(time.monotonic()))
    for _ in engine.map(task, shards(), control):
        continue
    engine.close()
    times: dict[str, list[float]] = {}
    for line in log.read_text().splitlines():
        kind, _, *rest = line.split()
        if kind == "done" and ready[actors - 1] <= float(rest[1]) <= empty[0]:
            times.setdefault(rest[0], []).append(float(rest[1]))
    return sum((len(t) - 1) / (max(t) - min(t)) for t in times.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--actors", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=12, help="for each actor, once all are ready")
    arguments = parser.parse_args()
    counts = [int(n) for n in arguments.actors.split(",")]
    here = Path(__file__).resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parents[2]), str(here.parents[1])])
    import ray
    from ray.cluster_utils import Cluster

    cpus = max(counts) // NODES + 2
    options = {"num_cpus": cpus, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    for _ in range(NODES - 1):
        cluster.add_node(**options)
    ray.init(address=cluster.address, log_to_driver=False)
    print(f"{NODES} nodes of {cpus} CPUs on {os.cpu_count()} cores; a shard takes {arguments.seconds:g} s")
    try:
        for actors in counts:
            with tempfile.TemporaryDirectory() as folder:
                found = rate(actors, arguments.seconds, arguments.shards, Path(folder))
            linear = actors / arguments.seconds
            print(f"{actors:3d} actors: {found:6.2f} shards/s, {100 * found / linear:5.1f} % of linear", flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
