"""What became of an actor that died or hangs: its log, its stacks, and the sample that is to blame."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from segbatch.config import EngineConfig
from segbatch.engine.ray_actors import actor, cluster
from segbatch.engine.ray_actors.actor import Place, Remains
from segbatch.engine.ray_actors.cluster import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    last_line,
)
from segbatch.engine.ray_actors.pool import Slot
from segbatch.records import ShardRef

log = logging.getLogger(__name__)

_TICK_S = 0.5
_NODE_S = 60.0
_QUOTED = 8


@dataclass(frozen=True, slots=True)
class Death:
    """An actor that is to be looked into.

    Attributes:
        slot: it.
        said: what is known so far, one line.
        shards: what it had in flight and is not finished elsewhere, by number.
        stuck: numbers of those that got nowhere; empty when the process is dead already.
        blameless: it has to go for a reason that is known, and nobody is to blame.
    """

    slot: Slot
    said: str
    shards: Mapping[int, ShardRef]
    stuck: frozenset[int] = frozenset()
    blameless: bool = False


@dataclass(frozen=True, slots=True)
class Culprit:
    """The sample that ends or hangs every process which touches it."""

    shard: ShardRef
    sample_id: str
    reason: str


class _GivenUp(Exception):
    """Nothing can be found out."""


class Autopsies:
    """One at a time, in a thread of its own, while the other actors work on.

    Args:
        config: with its time limits.
        task: reference of the task.
        threads: of a worker.
        resources: what an actor gets; its death has set them free.
        stop: nothing more is probed once it is set.
        quarantine: samples that need no probing any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        task: Any,
        threads: int,
        resources: Mapping[str, float],
        stop: threading.Event,
        quarantine: Mapping[str, str],
    ) -> None:
        self._hang_s, self._stall_s = config.hang_s, config.stall_s
        self._task, self._threads, self._resources = task, threads, resources
        self._stop, self._closing, self._quarantine = stop, threading.Event(), quarantine
        self._thread = ThreadPoolExecutor(1, "autopsy")

    def begin(self, death: Death) -> "Future[Culprit | None]":
        """Say what the actor's log says, and find the sample to blame; None when there is none."""
        return self._thread.submit(self._examine, death)

    def close(self) -> None:
        """Give up what is going on."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def _examine(self, death: Death) -> Culprit | None:
        place = death.slot.place
        if death.stuck and place is not None:
            self._on_node(place.node, actor.write_stacks, place)
        cluster.kill(death.slot.handle)  # a dead one may only be out of reach
        remains = self._remains(place)
        _tell(death, remains)
        suspects = [
            (death.shards[number], sample)
            for number, sample in remains.in_flight
            if number in death.shards and sample not in self._quarantine
        ]
        suspects.sort(key=lambda s: s[0].number not in death.stuck)
        if place is None or not suspects or death.blameless or self._stop.is_set():
            return None
        try:
            return self._find(place.node, suspects)
        except (_GivenUp, RayError, RuntimeError) as error:  # the latter when the cluster's head is restarting
            log.warning("probing was given up: %s", last_line(error))
            return None

    def _remains(self, place: Place | None) -> Remains:
        """Empty when the node has gone too."""
        found = self._on_node(place.node, actor.remains_of, place, _QUOTED) if place else None
        return found or Remains([], [])

    def _on_node(self, node: str, function: Any, *arguments: Any) -> Any:
        try:
            if all(n["NodeID"] != node for n in cluster.nodes()):
                raise _GivenUp("it has left the cluster")
            asked = cluster.ask_node(function, node, *arguments)
            self._wait(asked, _NODE_S, self._closing)
            return cluster.get(asked, timeout_s=0)
        except (_GivenUp, RayError, RuntimeError) as error:
            log.warning("node %s cannot be asked: %s", node, last_line(error))
            return None

    def _find(self, node: str, suspects: Sequence[tuple[ShardRef, str]]) -> Culprit | None:
        """Run the suspects one by one in a process of their own, on the same node; the one that ends or hangs it."""
        with self._prober(node) as prober:
            opening = prober.open.remote(self._task, self._threads)
            self._wait(opening, self._stall_s, self._stop, self._closing)
            cluster.get(opening, timeout_s=0)
            for shard, sample_id in suspects:
                probing = prober.probe.remote(shard, sample_id)
                try:
                    self._wait(probing, self._hang_s, self._stop, self._closing)
                    cluster.get(probing, timeout_s=0)
                except GetTimeoutError:
                    return Culprit(shard, sample_id, f"processing this image took longer than {self._hang_s:g} s")
                except (RayActorError, OutOfMemoryError):
                    if self._on_node(node, actor.version) is None:
                        raise _GivenUp("its node is gone") from None
                    return Culprit(shard, sample_id, "processing this image killed its process twice")
                except RayTaskError as error:
                    log.warning("probing image %s raised: %s", sample_id, last_line(error))
        return None

    @contextlib.contextmanager
    def _prober(self, node: str) -> Iterator[Any]:
        prober = cluster.start_actor(actor.Prober, self._resources, node)
        try:
            yield prober
        finally:
            cluster.kill(prober)

    def _wait(self, reference: Any, seconds: float, *until: threading.Event) -> None:
        """Wait for so long at most, and not when it is time to end."""
        end = time.monotonic() + seconds
        while not cluster.wait([reference], max(min(_TICK_S, end - time.monotonic()), 0)):
            if any(event.is_set() for event in until):
                raise _GivenUp("the run is stopped")
            if time.monotonic() > end:
                return


def _tell(death: Death, remains: Remains) -> None:
    """What a person needs to look further."""
    quoted = "".join(f"\n    {line}" for line in remains.last_lines)
    ends = f"; its log ends:{quoted}" if quoted else ""
    what = "hangs (the stacks of its threads are in its log)" if death.stuck else "died"
    what = "is ended" if death.blameless else what
    count = len(death.shards)
    log.warning("an actor %s %s with %d shards in flight: %s%s", death.slot.where, what, count, death.said, ends)
