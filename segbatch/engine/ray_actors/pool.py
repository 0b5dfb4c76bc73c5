"""The actors that there are, from the driver's side: started, let go and replaced as machines come and go."""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

from segbatch.config import EngineConfig
from segbatch.engine.base import uses_gpu
from segbatch.engine.layout import Share, layout, places, threads, within
from segbatch.engine.ray_actors import cluster
from segbatch.engine.ray_actors.actor import Actor, Place
from segbatch.engine.ray_actors.cluster import RayError, last_line
from segbatch.errors import ConfigError
from segbatch.records import ShardRef
from segbatch.runs import Task

log = logging.getLogger(__name__)

_LOOK_S = 5.0
_IDLE_S = 10.0
_PARTING_S = 5.0

Events = SimpleQueue[Callable[[], None]]
"""What has happened, to be dealt with in the driver's thread."""


@dataclass(slots=True)
class Running:
    """A copy of a shard at work; ``since`` is of the monotonic clock."""

    shard: ShardRef
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False, slots=True)
class Slot:
    """The driver's view of one actor.

    Attributes:
        handle: Ray's.
        place: None until the process is up.
        ready: its model is loaded.
        gone: it is dead or let go; what is still heard of it means nothing.
        running: by the number of the shard.
        asked: since when an answer about its figures is due; None when none is.
        told: when the last one came.
        idle_since: when it ran out of work.
        rows: rows that it has finished, by its own count.
        counted: rows among them that belong to shards whose outcome is known.
    """

    handle: Any
    place: Place | None = None
    ready: bool = False
    gone: bool = False
    running: dict[int, Running] = field(default_factory=dict)
    asked: float | None = None
    told: float = 0.0
    idle_since: float = 0.0
    rows: int = 0
    counted: int = 0

    @property
    def name(self) -> str:
        """Node and process."""
        return f"{self.place.address}/{self.place.pid}" if self.place else ""

    @property
    def where(self) -> str:
        """Node, process and log."""
        return str(self.place) if self.place else "before its process was up"


def when_done(reference: Any, events: Events, deal: Callable[["Future[Any]"], None]) -> None:
    """Have ``deal`` called in the driver's thread when what Ray promised is there."""
    reference.future().add_done_callback(lambda future: events.put(lambda: deal(future)))


class Pool:
    """As many actors as the cluster carries and the configuration allows, all with the same share of a node."""

    def __init__(self, config: EngineConfig, task: Task, events: Events) -> None:
        self._events = events
        self._leaving: list[Any] = []
        self._most = config.actors or config.max_actors
        self._least = config.actors or config.min_actors
        self._concurrency = config.in_flight + 2  # while shards run, it tells its figures and may be told to leave
        found = cluster.nodes()
        self._seen = {n["NodeID"] for n in found}
        self._looked = time.monotonic()
        sizes = cluster.sizes(found)
        gpus = config.gpus_per_actor or float(uses_gpu(task) and any(n.gpus >= 1 for n in sizes))
        if gpus and not any(places([n], Share(1, gpus)) for n in sizes):
            raise ConfigError(
                f"no node of the cluster has {gpus:g} GPUs for an actor", "set engine.gpus_per_actor to 0 or to less"
            )
        self.wanted, self.share = layout(sizes, self._least, self._most, gpus)
        self.threads = config.threads or threads(sizes, self.wanted, self.share)
        self.slots: list[Slot] = []

    def start(self) -> Slot:
        """One more actor; it opens nothing before it is told to."""
        slot = Slot(cluster.start_actor(Actor, self.resources(), calls=self._concurrency))
        self.slots.append(slot)
        return slot

    def resources(self) -> dict[str, float]:
        """An actor's share, as Ray takes it."""
        return {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus}

    def remove(self, slot: Slot) -> None:
        """It is no longer one of them."""
        slot.gone = True
        self.slots.remove(slot)

    def stop_growing(self) -> None:
        """Those that there are must do, until a machine joins."""
        self.wanted = len(self.slots)

    def follow_nodes(self) -> None:
        """See now and then whether machines have joined or left, and want as many actors as those there carry."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            found = cluster.nodes()
        except (RayError, RuntimeError) as error:  # its head may be restarting
            log.warning("the cluster's nodes cannot be listed: %s", last_line(error))
            return
        ids = {n["NodeID"] for n in found}
        if ids != self._seen:
            before, self._seen = self.wanted, ids
            self.wanted = within(places(cluster.sizes(found), self.share), self._least, self._most)
            log.info("the cluster has %d nodes: %d actors instead of %d", len(ids), self.wanted, before)

    def let_idle_go(self) -> None:
        """End actors that have had no work for a while, for others to have their share of the cluster.

        One without work stays as long as others work: what they have in flight may come back, or take too long.
        """
        now = time.monotonic()
        idle = [s for s in self.slots if s.ready and not s.running and now - s.idle_since > _IDLE_S]
        least = max(self._least, sum(bool(s.running) for s in self.slots) + 1)
        for slot in idle[: max(len(self.slots) - least, 0)]:
            self.remove(slot)
            self._leaving.append(slot.handle)
            when_done(slot.handle.forget.remote(), self._events, partial(_kill, slot.handle))

    def kill(self) -> None:
        """End every actor; what they had in flight is not lost, only not done."""
        parting = [s.handle.forget.remote() for s in self.slots if s.place is not None]
        if parting:
            cluster.wait(parting, _PARTING_S)
        for handle in [*self._leaving, *(s.handle for s in self.slots)]:
            cluster.kill(handle)
        for slot in self.slots:
            slot.gone = True
        here = cluster.this_node()
        pids = [s.place.pid for s in self.slots if s.place is not None and s.place.node == here]
        until = time.monotonic() + _PARTING_S
        while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < until:
            time.sleep(0.01)
        self.slots = []


def _kill(handle: Any, _: "Future[Any]") -> None:
    cluster.kill(handle)
