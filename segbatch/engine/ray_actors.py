"""The Ray engine: long-lived actors that hold a worker each, and a driver that owns every decision.

Ray never retries anything here. The driver counts attempts, replaces dead actors, probes the samples that were in
flight at a death in a process of their own, and quarantines the one that kills. Only ShardRefs and Outcomes travel.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segbatch.config import EngineConfig
from segbatch.engine import journal
from segbatch.engine.base import Control
from segbatch.errors import EngineError, SegbatchError, StoppedError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task
from segbatch.version import __version__

log = logging.getLogger(__name__)

_CPUS_PER_ACTOR = 4
_TICK_S = 0.5
_START_ATTEMPTS = 3
_OBJECT_STORE_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an actor lives."""

    node: str
    pid: int
    journal: str


class _Actor:
    """The process that works. Its constructor does nothing, so that errors of ``open`` keep their type."""

    def open(self, task: Task, threads: int) -> None:
        """Open the worker (load the model)."""
        self._worker = task.open(threads, self._journal)

    def place(self) -> _Place:
        """Node, process and journal."""
        self._journal = journal.FileJournal(journal.new_path())
        return _Place(ray.get_runtime_context().get_node_id(), os.getpid(), self._journal.path)

    def run(self, shard: ShardRef, skip: dict[str, str]) -> Outcome:
        """Work on one shard; called from up to ``in_flight`` threads."""
        return self._worker.run(shard, skip)

    def rows_done(self) -> int:
        """Rows finished by this actor so far."""
        return self._worker.rows_done


@ray.remote(max_retries=0)
def _probe(task: Task, threads: int, path: str, suspects: list[tuple[ShardRef, str]]) -> None:
    """Do everything with each suspect, one by one; the journal at ``path`` tells the last one touched."""
    notes = journal.FileJournal(path)
    worker = task.open(threads, journal.NullJournal())
    for shard, sample_id in suspects:
        notes.note("model", shard.number, [sample_id])
        worker.probe(shard, sample_id)
        notes.clear("model")
    worker.close()


@ray.remote(num_cpus=0, max_retries=0)
def _read_journal(path: str) -> list[tuple[int, str]]:
    return journal.read(path)


@ray.remote(num_cpus=0, max_retries=0)
def _new_journal_path() -> str:
    return journal.new_path()


@ray.remote(num_cpus=0, max_retries=0)
def _version() -> str:
    return __version__


@dataclass
class _Slot:
    """The driver's view of one actor."""

    handle: Any
    opening: Any
    place: _Place | None = None
    ready: bool = False
    running: dict[Any, ShardRef] = field(default_factory=dict)
    polling: Any = None
    rows: int = 0
    committed: int = 0

    def partial_rows(self) -> int:
        """Rows of shards that are still in flight."""
        return max(self.rows - self.committed, 0)


class RayEngine:
    """See ``engine.base.Engine``. Uses the Ray that is running, else the one RAY_ADDRESS names, else a local one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._owns_ray = False

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
        ray.init(
            num_cpus=max(os.cpu_count() or 1, 2),  # an actor and one CPU that stays free
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **options,
        )

    def _check_versions(self) -> None:
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                found = ray.get(_version.options(scheduling_strategy=place).remote(), timeout=60)
            except RayError as error:
                raise EngineError(
                    f"node {node['NodeManagerAddress']} cannot import segbatch: {_last_line(error)}",
                    f"install segbatch {__version__} on every node",
                ) from error
            if found != __version__:
                raise EngineError(
                    f"node {node['NodeManagerAddress']} has segbatch {found}, the driver {__version__}",
                    "install the same version everywhere",
                )

    def close(self) -> None:
        """Stop the local Ray, or leave the cluster as it was found."""
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
        self._owns_ray = False

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Iterator[Outcome]:
        """Work on the shards with as many actors as the machines carry."""
        driver = _Driver(self._config, task, shards, control)
        try:
            yield from driver.outcomes()
        finally:
            driver.kill()


class _Driver:
    """One map: what waits, what runs where, what failed."""

    def __init__(self, config: EngineConfig, task: Task, shards: Iterable[ShardRef], control: Control) -> None:
        self._config, self._control = config, control
        self._task = ray.put(task)
        self._fresh = iter(shards)
        self._again: deque[ShardRef] = deque()
        self._attempts: dict[int, int] = {}
        self._failed: dict[int, str] = {}
        self._slots: list[_Slot] = []
        self._bad_starts = 0
        self._rows = 0
        self._progress_at = time.monotonic()
        self._reported = 0
        self._share()

    def _share(self) -> None:
        """How many actors, and the CPUs and threads of each; one CPU of the cluster stays free of actors."""
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self._actors = self._config.actors or max((cpus - 1) // _CPUS_PER_ACTOR, 1)
        self._cpus = max((cpus - 1) // self._actors, 1) if cpus > 1 else 1
        self._threads = self._config.threads or max(cpus // self._actors, 1)

    # -- the loop ----------------------------------------------------------------------------------------------

    def outcomes(self) -> Iterator[Outcome]:
        """Run everything; see ``Engine.map``."""
        while True:
            if self._control.stop.is_set():
                yield from self._drain()
                raise StoppedError("stopped before the end", "run the same command again to go on")
            self._fill()
            if not self._slots:
                break
            yield from self._step(_TICK_S)
            self._check_stalled()
        if self._failed:
            number, reason = next(iter(self._failed.items()))
            raise EngineError(
                f"{len(self._failed)} shards failed {self._config.attempts} times, for example shard {number}: {reason}",
                "everything else is done; run the same command again to retry them",
            )

    def _fill(self) -> None:
        """Give every ready actor work, start actors while there is more, let go of those without."""
        for slot in list(self._slots):
            while slot.ready and len(slot.running) < self._config.in_flight and (shard := self._next()) is not None:
                reference = slot.handle.run.remote(shard, self._control.quarantine)
                slot.running[reference] = shard
            if slot.ready and not slot.running:
                ray.kill(slot.handle)
                self._slots.remove(slot)
        while len(self._slots) < self._actors and (shard := self._next()) is not None:
            self._again.appendleft(shard)
            if len(self._again) <= sum(not s.ready for s in self._slots) * self._config.in_flight:
                break  # actors on their way will take it
            self._slots.append(self._start_actor())

    def _next(self) -> ShardRef | None:
        if self._again:
            return self._again.popleft()
        return next(self._fresh, None)

    def _start_actor(self) -> _Slot:
        options = {"num_cpus": self._cpus, "max_restarts": 0, "max_concurrency": self._config.in_flight + 2}
        handle = ray.remote(_Actor).options(**options).remote()
        return _Slot(handle, handle.place.remote())

    def _step(self, wait_s: float) -> Iterator[Outcome]:
        """Wait for something to happen and deal with it."""
        waiting = [r for s in self._slots for r in (s.opening, s.polling, *s.running) if r is not None]
        done, _ = ray.wait(waiting, num_returns=1, timeout=wait_s)
        for slot in list(self._slots):
            try:
                yield from self._serve(slot, done)
            except RayActorError as error:
                self._bury(slot, error)
        self._report()

    def _serve(self, slot: _Slot, done: list[Any]) -> Iterator[Outcome]:
        if slot.opening in done:
            self._opened(slot)
        if slot.polling in done:
            reference, slot.polling = slot.polling, None
            slot.rows = ray.get(reference)
        elif slot.ready and slot.polling is None and slot.running:
            slot.polling = slot.handle.rows_done.remote()
        for reference in [r for r in slot.running if r in done]:
            shard = slot.running[reference]
            try:
                outcome: Outcome = ray.get(reference)
            except RayTaskError as error:
                del slot.running[reference]
                self._raised(shard, error)
                continue
            del slot.running[reference]
            slot.committed += outcome.rows
            self._rows += outcome.rows
            self._progress_at = time.monotonic()
            yield outcome

    def _opened(self, slot: _Slot) -> None:
        try:
            result = ray.get(slot.opening)
        except RayTaskError as error:
            raise _ours(error) from error
        if isinstance(result, _Place):
            slot.place = result
            slot.opening = slot.handle.open.remote(self._task, self._threads)
            return
        slot.opening, slot.ready = None, True
        self._control.on_ready()
        self._bad_starts = 0
        self._progress_at = time.monotonic()

    def _report(self) -> None:
        rows = self._rows + sum(s.partial_rows() for s in self._slots)
        if rows > self._reported:
            self._reported = rows
            self._progress_at = time.monotonic()
            self._control.on_rows(rows)

    def _check_stalled(self) -> None:
        waited = time.monotonic() - self._progress_at
        if waited > self._config.stall_s:
            busy = sorted(s.number for slot in self._slots for s in slot.running.values())
            raise EngineError(
                f"no row was finished in {waited:.0f} s; in flight: shards {busy or 'none, waiting for actors to start'}",
                "look at the actors' logs and the cluster's free CPUs; --set engine.stall_s=N waits longer",
            )

    # -- failures ----------------------------------------------------------------------------------------------

    def _raised(self, shard: ShardRef, error: RayTaskError) -> None:
        """A worker raised: again if that can help, else the run ends."""
        ours = _ours(error)
        if not ours.retryable and not isinstance(ours, EngineError):
            raise ours from error
        self._requeue(shard, str(ours))

    def _requeue(self, shard: ShardRef, reason: str) -> None:
        count = self._attempts[shard.number] = self._attempts.get(shard.number, 0) + 1
        log.warning("shard %d failed (attempt %d): %s", shard.number, count, reason)
        if count >= self._config.attempts:
            self._failed[shard.number] = reason
        else:
            self._again.append(shard)

    def _bury(self, slot: _Slot, error: RayActorError) -> None:
        """An actor died: find out whether a sample killed it, then put its shards back."""
        self._slots.remove(slot)
        shards = {s.number: s for s in slot.running.values()}
        self._progress_at = time.monotonic()
        log.warning("an actor died with %d shards in flight: %s", len(shards), _last_line(error))
        if not slot.ready:
            self._bad_starts += 1
            if self._bad_starts >= _START_ATTEMPTS:
                raise EngineError(f"actors die while they start: {_last_line(error)}", "is there enough memory?")
            return
        notes = self._journal_of(slot)
        suspects = [(shards[number], sample) for number, sample in notes if number in shards]
        culprit = self._find_culprit(suspects) if suspects else None
        if culprit is not None:
            reason = "processing this image killed its process twice"
            self._control.quarantine[culprit] = reason
            self._control.on_quarantine(culprit, reason)
        for shard in shards.values():
            if culprit is not None and any(s.number == shard.number and i == culprit for s, i in suspects):
                self._again.appendleft(shard)  # the cause is known and will be skipped: no attempt is charged
            else:
                self._requeue(shard, "its actor died")

    def _journal_of(self, slot: _Slot) -> list[tuple[int, str]]:
        """What was in flight; empty when the node has gone too."""
        if slot.place is None:
            return []
        return self._on_node(slot.place.node, _read_journal, slot.place.journal) or []

    def _on_node(self, node: str, function: Any, *arguments: Any) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        try:
            return ray.get(function.options(scheduling_strategy=place).remote(*arguments), timeout=60)
        except RayError as error:
            log.warning("node %s cannot be asked: %s", node, _last_line(error))
            return None

    def _find_culprit(self, suspects: list[tuple[ShardRef, str]]) -> str | None:
        """Run the suspects one by one in a process of their own; the one at which it dies."""
        node = ray.get_runtime_context().get_node_id()
        path = self._on_node(node, _new_journal_path)
        place = NodeAffinitySchedulingStrategy(node, soft=True)
        options = {"num_cpus": self._cpus, "scheduling_strategy": place}
        try:
            ray.get(_probe.options(**options).remote(self._task, self._threads, path, suspects))
            return None
        except WorkerCrashedError:
            notes = self._on_node(node, _read_journal, path) or []
            return notes[0][1] if notes else None
        except RayTaskError as error:
            log.warning("probing raised: %s", _last_line(error))
            return None

    # -- the end -----------------------------------------------------------------------------------------------

    def _drain(self) -> Iterator[Outcome]:
        """Let shards in flight finish, for a while."""
        until = time.monotonic() + self._config.drain_s
        while any(s.running for s in self._slots) and time.monotonic() < until:
            yield from self._step(min(_TICK_S, max(until - time.monotonic(), 0.01)))

    def kill(self) -> None:
        """End every actor; what they had in flight is not lost, only not done."""
        for slot in self._slots:
            ray.kill(slot.handle)
        self._slots = []


def _ours(error: RayTaskError) -> SegbatchError:
    """The worker's own error, or a bug in it as an EngineError with its last line."""
    cause = error.cause
    if isinstance(cause, SegbatchError):
        return cause
    return EngineError(f"a worker raised {type(cause).__name__}: {cause}", "this looks like a bug; see the Ray logs")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
