"""The Ray engine: long-lived actors that hold a worker each, and a driver that owns every decision.

Ray never retries anything here. The driver counts attempts, replaces dead actors, probes the samples that were in
flight at a death in a process of their own, and quarantines the one that kills. Only ShardRefs and Outcomes travel.
"""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import OutOfMemoryError, RayError, RaySystemError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segbatch.config import EngineConfig
from segbatch.engine import journal
from segbatch.engine.base import Control, Failures, as_ours, worth_repeating
from segbatch.errors import ConfigError, EngineError, SegbatchError, StoppedError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task, committed
from segbatch.version import __version__

log = logging.getLogger(__name__)

_CPUS_PER_ACTOR = 4
_TICK_S = 0.5
_START_ATTEMPTS = 3
_SPARE_SLOTS = 8
_PARTING_S = 5.0
_OBJECT_STORE_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an actor lives."""

    node: str
    pid: int
    journal: str


class _Actor:
    """The process that works. Its constructor opens nothing, so that errors of ``open`` keep their type."""

    def __init__(self) -> None:
        self._leaving = threading.Lock()
        self._forgotten = False

    def open(self, task: Task, threads: int) -> None:
        """Open the journal and the worker (load the model), unless the actor is no longer needed."""
        with self._leaving:
            if self._forgotten:
                return
            notes = journal.FileJournal(self._path, 2 * threads + _SPARE_SLOTS)
        try:
            self._worker = task.open(threads, notes)
        except BaseException:
            self.forget()
            raise

    def place(self) -> _Place:
        """Node, process and where the journal will be; the driver knows it before it is written."""
        self._path = journal.new_path()
        return _Place(ray.get_runtime_context().get_node_id(), os.getpid(), self._path)

    def run(self, shard: ShardRef, skip: dict[str, str]) -> Outcome:
        """Work on one shard, unless it is finished already; called from up to ``in_flight`` threads."""
        return committed(shard) or self._worker.run(shard, skip)

    def rows_done(self) -> int:
        """Rows finished by this actor so far."""
        return self._worker.rows_done

    def forget(self) -> None:
        """Remove the journal: this actor is no longer needed."""
        with self._leaving:
            self._forgotten = True
            journal.remove(self._path)


@ray.remote(max_retries=0)
def _probe(task: Task, threads: int, path: str, suspects: list[tuple[ShardRef, str]]) -> None:
    """Do everything with each suspect, one by one; the journal at ``path`` tells the last one touched."""
    notes = journal.FileJournal(path, 1)
    worker = task.open(threads, journal.NullJournal())
    try:
        for shard, sample_id in suspects:
            notes.note("model", shard.number, [sample_id])
            worker.probe(shard, sample_id)
            notes.clear("model")
    finally:
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
        for node in _nodes():
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
        if self._guard is not None:
            self._guard.kill()  # before the process ids may belong to others
            self._guard.communicate()
            self._guard = None
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
        self._owns_ray = False

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
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
        self._waiting: deque[ShardRef] = deque()
        self._failures = Failures(config.attempts)
        self._slots: list[_Slot] = []
        self._bad_starts = 0
        self._rows = self._seen_rows = self._reported = 0
        self._progress_at = time.monotonic()
        nodes = [_cpus(n) for n in _nodes()]
        self._actors, self._cpus = layout(nodes, config.actors)
        self._threads = config.threads or max(sum(nodes) // self._actors, 1)

    # -- the loop ----------------------------------------------------------------------------------------------

    def outcomes(self) -> Iterator[Outcome]:
        """Run everything; see ``Engine.map``."""
        while self._has_work():
            if self._control.stop.is_set():
                yield from self._drain()
                break
            self._fill()
            yield from self._step(_TICK_S)
            self._check_stalled()
        if self._has_work():
            raise StoppedError("stopped before the end", "run the same command again to go on")
        self._failures.check()

    def _has_work(self) -> bool:
        return any(s.running for s in self._slots) or self._queued(1) > 0

    def _queued(self, wanted: int) -> int:
        """How many shards wait, counted up to ``wanted``: the rest of them stay in their stream."""
        while len(self._waiting) < wanted and (shard := next(self._fresh, None)) is not None:
            self._waiting.append(shard)
        return len(self._waiting)

    def _fill(self) -> None:
        """Give ready actors work, the idle ones first; start actors while there is more.

        An actor without work stays: what is in flight elsewhere may come back.
        """
        for depth in range(self._config.in_flight):
            for slot in self._slots:
                if slot.ready and len(slot.running) <= depth and self._queued(1):
                    shard = self._waiting.popleft()
                    slot.running[slot.handle.run.remote(shard, self._control.quarantine)] = shard
        coming = sum(not s.ready for s in self._slots)
        while len(self._slots) < self._actors and self._queued(coming + 1) > coming:
            self._slots.append(self._start_actor())
            coming += 1

    def _start_actor(self) -> _Slot:
        options = {"num_cpus": self._cpus, "max_restarts": 0, "max_concurrency": self._config.in_flight + 2}
        handle: Any = ray.remote(_Actor).options(**options).remote()
        return _Slot(handle, handle.place.remote())

    def _step(self, wait_s: float) -> Iterator[Outcome]:
        """Wait for something to happen and deal with it."""
        waiting = [r for s in self._slots for r in (s.opening, s.polling, *s.running) if r is not None]
        done, _ = ray.wait(waiting, num_returns=1, timeout=wait_s)
        for slot in list(self._slots):
            try:
                yield from self._serve(slot, done)
            except RayError as error:  # not what a worker raised: that is a RayTaskError and dealt with
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
            worked = outcome.rows - outcome.copied
            if not outcome.committed_by_other:
                slot.committed += worked
            self._rows += worked
            self._progress_at = time.monotonic()
            yield outcome

    def _opened(self, slot: _Slot) -> None:
        try:
            result = ray.get(slot.opening)
        except RayTaskError as error:
            self._slots.remove(slot)
            ray.kill(slot.handle)
            self._bad_start(_cause(error))
            return
        self._progress_at = time.monotonic()
        if isinstance(result, _Place):
            slot.place = result
            slot.opening = slot.handle.open.remote(self._task, self._threads)
            return
        slot.opening, slot.ready = None, True
        self._control.on_ready()
        self._bad_starts = 0

    def _bad_start(self, error: SegbatchError) -> None:
        """Another actor is started in its place, unless that cannot help."""
        self._bad_starts += 1
        if not worth_repeating(error) or self._bad_starts >= _START_ATTEMPTS:
            raise error
        log.warning("an actor could not start (attempt %d of %d): %s", self._bad_starts, _START_ATTEMPTS, error)

    def _report(self) -> None:
        rows = self._rows + sum(s.partial_rows() for s in self._slots)
        if rows != self._seen_rows:  # fewer after a death
            self._seen_rows = rows
            self._progress_at = time.monotonic()
        if rows > self._reported:
            self._reported = rows
            self._control.on_rows(rows)

    def _check_stalled(self) -> None:
        waited = time.monotonic() - self._progress_at
        if waited <= self._config.stall_s:
            return
        busy = sorted(s.number for slot in self._slots for s in slot.running.values())
        longer = "--set engine.stall_s=N waits longer"
        if busy:
            raise EngineError(
                f"no row was finished in {waited:.0f} s; in flight: shards {', '.join(map(str, busy))}",
                f"look at the actors' logs; {longer}",
            )
        if any(s.place for s in self._slots):
            raise EngineError(f"the model was not loaded in {waited:.0f} s", f"look at the actors' logs; {longer}")
        free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
        total = sum(_cpus(n) for n in _nodes())
        raise EngineError(
            f"no actor could start in {waited:.0f} s: one needs {self._cpus} CPUs, {free:g} of the cluster's "
            f"{total:g} are free",
            f"wait until others are done; {longer}",
        )

    # -- failures ----------------------------------------------------------------------------------------------

    def _raised(self, shard: ShardRef, error: RayTaskError) -> None:
        """A worker raised: again if that can help, else the run ends."""
        ours = _cause(error)
        if not worth_repeating(ours):
            raise ours from error
        self._requeue(shard, str(ours))

    def _requeue(self, shard: ShardRef, reason: str) -> None:
        if self._failures.again(shard, reason):
            self._waiting.append(shard)

    def _bury(self, slot: _Slot, error: RayError) -> None:
        """An actor died: find out whether a sample killed it, then put its shards back."""
        self._slots.remove(slot)
        ray.kill(slot.handle)  # it may only be out of reach
        log.warning("an actor died with %d shards in flight: %s", len(slot.running), _last_line(error))
        if not slot.ready:
            self._journal_of(slot)
            fix = "look at the actors' logs; is there enough memory?"
            self._bad_start(EngineError(f"actors die while they start: {_last_line(error)}", fix))
            return
        shards = {s.number: s for s in slot.running.values()}
        suspects = [(shards[number], sample) for number, sample in self._journal_of(slot) if number in shards]
        culprit = self._find_culprit(slot, suspects) if suspects and not self._control.stop.is_set() else None
        self._progress_at = time.monotonic()
        if culprit is None:
            for shard in shards.values():
                self._requeue(shard, "its actor died")
            return
        shard, sample_id = culprit
        reason = "processing this image killed its process twice"
        log.warning("image %s of shard %d is quarantined: %s", sample_id, shard.number, reason)
        self._control.quarantine[sample_id] = reason
        self._control.on_quarantine(shard, sample_id, reason)
        self._waiting.extendleft(shards.values())  # the cause is known and will be skipped: no attempt is charged

    def _journal_of(self, slot: _Slot) -> list[tuple[int, str]]:
        """What was in flight; empty when the node has gone too. The file is removed."""
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

    def _find_culprit(self, slot: _Slot, suspects: list[tuple[ShardRef, str]]) -> tuple[ShardRef, str] | None:
        """Run the suspects one by one in a process of their own, on the same node; the one at which it dies."""
        assert slot.place is not None
        node = slot.place.node
        path = self._on_node(node, _new_journal_path)
        if path is None:
            return None
        options = {"num_cpus": self._cpus, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        probing = _probe.options(**options).remote(self._task, self._threads, path, suspects)
        died = self._dies(probing)
        notes = self._on_node(node, _read_journal, path) or []
        return next((s for s in suspects if died and (s[0].number, s[1]) in notes[:1]), None)

    def _dies(self, probing: Any) -> bool:
        """Whether a probe ends in the death of its process; False too when it takes too long or the run is stopped."""
        until = time.monotonic() + self._config.stall_s
        while not ray.wait([probing], timeout=_TICK_S)[0]:
            if self._control.stop.is_set() or time.monotonic() > until:
                ray.cancel(probing, force=True)
                log.warning("probing was given up")
                return False
        try:
            ray.get(probing)
        except (WorkerCrashedError, OutOfMemoryError):
            return True
        except RayError as error:
            log.warning("probing raised: %s", _last_line(error))
        return False

    # -- the end -----------------------------------------------------------------------------------------------

    def _drain(self) -> Iterator[Outcome]:
        """Let shards in flight finish, for a while."""
        until = time.monotonic() + self._config.drain_s
        while any(s.running for s in self._slots) and time.monotonic() < until:
            yield from self._step(min(_TICK_S, max(until - time.monotonic(), 0.01)))

    def kill(self) -> None:
        """End every actor; what they had in flight is not lost, only not done."""
        if not ray.is_initialized():
            return
        parting = [s.handle.forget.remote() for s in self._slots if s.place is not None]
        if parting:
            ray.wait(parting, num_returns=len(parting), timeout=_PARTING_S)
        for slot in self._slots:
            ray.kill(slot.handle)
        here = ray.get_runtime_context().get_node_id()
        pids = [s.place.pid for s in self._slots if s.place is not None and s.place.node == here]
        until = time.monotonic() + _PARTING_S
        while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < until:
            time.sleep(0.01)
        self._slots = []


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


def layout(node_cpus: Sequence[int], wanted: int = 0) -> tuple[int, int]:
    """How many actors, and how many CPUs each; one CPU of the largest node stays free of actors.

    Args:
        node_cpus: CPUs of each node; at least one has some.
        wanted: number of actors; 0 picks it.

    >>> layout([2]), layout([16]), layout([16], wanted=5), layout([4, 4, 4, 4])
    ((1, 1), (3, 5), (5, 3), (4, 3))
    """
    largest, *others = sorted(node_cpus, reverse=True)
    usable = [max(largest - 1, 1), *others]
    actors = wanted or sum(max(n // _CPUS_PER_ACTOR, 1) for n in usable if n)
    fitting = (c for c in range(max(usable), 0, -1) if sum(n // c for n in usable) >= actors)
    return actors, next(fitting, 1)


def _nodes() -> list[dict[str, Any]]:
    return [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def _cpus(node: dict[str, Any]) -> int:
    return int(node["Resources"].get("CPU", 0))


def _cause(error: RayTaskError) -> SegbatchError:
    if isinstance(error.cause, RaySystemError) and "No module named" in str(error.cause):
        return ConfigError(
            f"the workers cannot use this model: {_last_line(error.cause)}",
            "install its package on every node, or use --engine inline",
        )
    return as_ours(error.cause)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(" Some common causes")[0] if lines else type(error).__name__
