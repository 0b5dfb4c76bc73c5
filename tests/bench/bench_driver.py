"""What a shard costs the driver: shards that do nothing, by as many actors as the machine carries.

CPU seconds of the driver's process alone, Ray's threads in it included, without Ray's start and the actors' own.

    python tests/bench/bench_driver.py [--shards 2000] [--actors 2] [--profile]
"""

import argparse
import cProfile
import pstats
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

from segbatch.config import EngineConfig
from segbatch.engine import Control, make
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Journal


@dataclass(frozen=True)
class Idle:
    """A task that does nothing."""

    def open(self, threads: int, journal: Journal) -> "IdleWorker":
        return IdleWorker()


class IdleWorker:
    def __init__(self) -> None:
        self.rows_done = 0

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        self.rows_done += shard.rows
        return Outcome(shard.number, shard.plan, shard.rows, 0)

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        raise AssertionError("nothing dies")

    def close(self) -> None:
        """Nothing to release."""


def cpu_seconds() -> float:
    """Of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    count = arguments.shards
    shards = [ShardRef("/nowhere", "masks", 0, i, f"part-{i:08d}-x.parquet", "", 0, 9, 9, 90) for i in range(count)]
    engine = make(EngineConfig(kind="ray", actors=arguments.actors))
    engine.start()
    profile = cProfile.Profile()
    began: list[tuple[float, float]] = []

    def ready() -> None:
        if not began:
            began.append((cpu_seconds(), time.perf_counter()))
            if arguments.profile:
                profile.enable()

    try:
        done = sum(1 for _ in engine.map(Idle(), shards, Control(on_ready=ready)))
        cpu, wall = cpu_seconds() - began[0][0], time.perf_counter() - began[0][1]
        profile.disable()
    finally:
        engine.close()
    assert done == count
    each = f"{1e3 * cpu / count:.2f} ms of the driver's CPU a shard"
    print(f"{count} shards, {arguments.actors} actors: {each}, {count / wall:.0f} shards/s")
    if arguments.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
