"""Seeded kills during a run: of actors, of a node of the cluster, of the driver, of the S3 server.

When and whom is drawn from the seed. A kill waits for a share of the rows, or for some seconds of the start, and then
for a moment more, so that it meets planning, loading, reading, committing and finishing alike.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import chaos_store
import doubles
import psutil

KINDS = ("actor", "node", "driver", "store")
IMAGES, SHARD_ROWS = 300, 8
IMAGE_S = 0.02
MOST_RERUNS = 8
LIMIT_S = 300.0
PLAN = {"shard_rows": SHARD_ROWS}
STORE_LIMITS = {"SEGBATCH_STORAGE_CONNECT_S": "2", "SEGBATCH_STORAGE_READ_S": "5", "SEGBATCH_STORAGE_TOTAL_S": "20"}

_TESTS = Path(__file__).parent
_TICK_S = 0.02
_AT_THE_START = 0.15


@dataclass(frozen=True)
class Fault:
    """One kill.

    Attributes:
        kind: of ``KINDS``.
        share: of the rows that must be done first; 0: any time from the start of the driver on.
        delay_s: then, so much later.
        lasts_s: until what was killed is started again, where that is ours to do.
        pick: which of several, 0..1.
    """

    kind: str
    share: float
    delay_s: float
    lasts_s: float
    pick: float


def faults(seed: int) -> tuple[Fault, ...]:
    """The kills of a seed, in order: one of the kind whose turn it is, and up to two more of any kind."""
    chance = random.Random(seed)
    kinds = [KINDS[seed % len(KINDS)], *chance.choices(KINDS, k=chance.randint(0, 2))]
    drawn = [_fault(kind, chance) for kind in kinds]
    return tuple(sorted(drawn, key=lambda fault: fault.share))


def _fault(kind: str, chance: random.Random) -> Fault:
    early = chance.random() < _AT_THE_START
    share = 0.0 if early else chance.uniform(0.02, 0.98)
    delay = chance.uniform(0, 5.0 if early else 0.5)
    return Fault(kind, share, delay, chance.uniform(0.3, 4.0), chance.random())


class Cluster:
    """A head without CPUs and two nodes, which can be killed; drivers find it by ``address``."""

    def __init__(self, environment: dict[str, str]) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        self._environment = environment
        config = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 4,
        }
        with self._set():
            self._cluster: Any = RayCluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": config},
            )
        self.address = str(self._cluster.address)
        self.add()
        self.add()

    def add(self) -> None:
        """One more node."""
        with self._set():
            self._cluster.add_node(num_cpus=2)

    def kill(self, pick: float) -> None:
        """``kill -9`` of everything that Ray runs on a node but the workers, which end by themselves."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        self._cluster.remove_node(nodes[int(pick * len(nodes))], allow_graceful=False)

    def close(self) -> None:
        """Stop it."""
        with self._set():
            self._cluster.shutdown()

    @contextlib.contextmanager
    def _set(self) -> Iterator[None]:
        """What Ray starts inherits the environment of the test."""
        before = dict(os.environ)
        os.environ.update(self._environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@dataclass
class World:
    """What is shared by all runs."""

    cluster: Cluster
    front: chaos_store.Front
    environment: dict[str, str]


@dataclass
class Figures:
    """What a run of a seed took."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    too_late: int = 0
    reruns: int = 0
    redone: int = 0
    seconds: float = 0.0
    ends: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = dict(self.kills)
        return json.dumps({**asdict(replace(self, kills=Counter())), "kills": kinds, "seconds": round(self.seconds, 1)})


class _Driver:
    """``driver.py`` as a process; counts its rows."""

    def __init__(self, command: list[str], environment: dict[str, str], done_before: int) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.since = time.monotonic()
        self.rows = done_before
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        before = self.rows
        for line in self.process.stderr:
            word, _, number = line.strip().partition(" ")
            if word == "begin" and number.isdigit():
                before = self.rows = IMAGES - int(number)
            elif word == "done" and number.isdigit():
                self.rows = before + int(number)
            else:
                self.said.append(line.rstrip())

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


class Chaos:
    """The run of a seed: the same command again and again until it ends well, while things are killed."""

    def __init__(self, world: World, seed: int, source: str, out: str, log: Path) -> None:
        self._world, self._log = world, log
        self._faults = list(faults(seed))
        self.figures = Figures(seed)
        options = {"plan": PLAN, "engine": {"kind": "ray", "max_actors": 2}}
        model = json.dumps({"log": str(log), "seconds": IMAGE_S})
        self._command = [
            sys.executable, str(_TESTS / "driver.py"), "SlowModel", model, source, out, json.dumps(options),
        ]  # fmt: skip
        self._environment = {**os.environ, **world.environment, "RAY_ADDRESS": world.cluster.address}
        self._driver = self._start(0)

    def run(self) -> Figures:
        """Raises AssertionError when it takes too long, or too many re-runs."""
        began = time.monotonic()
        reached: float | None = None
        try:
            while not (self._driver.ended and self._driver.process.returncode == 0):
                assert time.monotonic() - began < LIMIT_S, f"took longer than {LIMIT_S:g} s: {self._tail()}"
                if self._driver.ended:
                    self._again()
                reached = self._strike(reached)
                time.sleep(_TICK_S)
        finally:
            self._driver.close()
        self.figures.too_late = len(self._faults)
        self.figures.redone = doubles.images_seen(self._log) - IMAGES
        self.figures.seconds = time.monotonic() - began
        return self.figures

    def _start(self, rows: int) -> _Driver:
        return _Driver(self._command, self._environment, rows)

    def _again(self) -> None:
        self._driver.close()
        self.figures.ends.append(f"{self._driver.process.returncode}: {(self._driver.said or [''])[-1][:300]}")
        self.figures.reruns += 1
        assert self.figures.reruns <= MOST_RERUNS, f"does not end well: {self.figures.ends}; {self._tail()}"
        self._driver = self._start(self._driver.rows)

    def _tail(self) -> str:
        return "\n".join(self._driver.said[-15:])

    def _strike(self, reached: float | None) -> float | None:
        """Kill what is next, if it is time; gives since when its share of rows is reached."""
        if not self._faults:
            return None
        fault = self._faults[0]
        if fault.share == 0:
            reached = self._driver.since
        elif reached is None and self._driver.rows >= fault.share * IMAGES:
            reached = time.monotonic()
        if reached is None or time.monotonic() < reached + fault.delay_s or not self._kill(fault):
            return reached
        self._faults.pop(0)
        self.figures.kills[fault.kind] += 1
        return None

    def _kill(self, fault: Fault) -> bool:
        """Whether there was something to kill."""
        match fault.kind:
            case "actor":
                return self._kill_actor(fault)
            case "node":
                self._world.cluster.kill(fault.pick)
                time.sleep(fault.lasts_s)
                self._world.cluster.add()
            case "driver":
                self._driver.process.kill()
            case "store":
                self._world.front.kill()
                time.sleep(fault.lasts_s)
                self._world.front.start()
        return True

    def _kill_actor(self, fault: Fault) -> bool:
        alive = [pid for pid in dict.fromkeys(doubles.loads(self._log)) if is_running(pid)]
        if not alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(alive[int(fault.pick * len(alive))], signal.SIGKILL)
        return True


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
