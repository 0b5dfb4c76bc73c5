"""One map over Ray actors: what waits, what runs where, what has failed."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from segbatch.config import EngineConfig
from segbatch.engine.base import Control, worth_repeating
from segbatch.engine.ray_actors import cluster
from segbatch.engine.ray_actors.actor import Figures, Place
from segbatch.engine.ray_actors.autopsy import Autopsies, Culprit, Death
from segbatch.engine.ray_actors.cluster import RayTaskError, cause, last_line
from segbatch.engine.ray_actors.exported import Exported
from segbatch.engine.ray_actors.pool import Events, Pool, Running, Slot, when_done
from segbatch.engine.schedule import Schedule
from segbatch.errors import EngineError, SegbatchError, StoppedError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task
from segbatch.telemetry import Usage
from segbatch.version import __version__

log = logging.getLogger(__name__)

_TICK_S = 0.5
_POLL_S = 1.0
_POLLS_PER_S = 100
_START_ATTEMPTS = 3


class Driver:
    """Everything happens in the thread that iterates: Ray's answers wait in ``_events`` until it takes them."""

    def __init__(self, config: EngineConfig, task: Task, shards: Iterable[ShardRef], control: Control) -> None:
        self._config, self._control = config, control
        self._events: Events = SimpleQueue()
        self._pool = Pool(config, task, self._events)
        self._task = cluster.put(task)
        self._schedule = Schedule(shards, config.attempts, config.speculate)
        resources, threads = self._pool.resources(), self._pool.threads
        self._autopsies = Autopsies(config, self._task, threads, resources, control.stop, control.quarantine)
        self._outcomes: deque[Outcome] = deque()
        self._examined = self._bad_starts = 0
        self._rows = self._seen_rows = self._reported = 0
        self._tended = 0.0
        self._progress_at = time.monotonic()
        self._skip: tuple[int, Any] = (0, {})
        self._exported = Exported()
        self._places: tuple[str, ...] = ()

    # -- the loop ----------------------------------------------------------------------------------------------

    def outcomes(self) -> Iterator[Outcome]:
        """Run everything; see ``Engine.map``."""
        while self._schedule.has_work():
            if self._control.stop.is_set():
                yield from self._drain()
                break
            self._tend()
            yield from self._step(_TICK_S)
        self._report()
        if self._schedule.has_work():
            raise StoppedError("stopped before the end", "run the same command again to go on")
        self._schedule.check()

    def close(self) -> None:
        """End every actor."""
        if not cluster.is_up():
            return
        self._autopsies.close()
        self._pool.kill()

    def _step(self, wait_s: float) -> Iterator[Outcome]:
        """Wait for something to happen, and deal with everything that has."""
        with contextlib.suppress(Empty):
            self._events.get(timeout=wait_s)()
            while True:
                self._events.get_nowait()()
        while self._outcomes:
            yield self._outcomes.popleft()

    def _drain(self) -> Iterator[Outcome]:
        """Let shards in flight finish, for a while."""
        until = time.monotonic() + self._config.drain_s
        while any(self._open_on(s) for s in self._pool.slots) and time.monotonic() < until:
            yield from self._step(min(_TICK_S, max(until - time.monotonic(), 0.01)))

    def _tend(self) -> None:
        """What is looked at now and then, not at every event."""
        now = time.monotonic()
        if now - self._tended < _TICK_S:
            return
        self._tended = now
        self._tell_workers()
        in_flight = sum(len(s.running) for s in self._pool.slots)
        self._exported.state(len(self._pool.slots), in_flight, self._control.meter.events)
        self._pool.follow_nodes()
        self._start_actors()
        self._ask_figures(now)
        self._speculate(now)
        if not self._schedule.queued(1):
            self._pool.let_idle_go()
        self._report()
        self._check_stalled(now)

    def _tell_workers(self) -> None:
        places = tuple(s.where for s in self._pool.slots if s.ready)
        if places != self._places:
            self._places = places
            self._control.on_workers(places)

    # -- giving work -------------------------------------------------------------------------------------------

    def _start_actors(self) -> None:
        """As many as are wanted while there is more work than those that come will take."""
        coming = sum(not s.ready for s in self._pool.slots)
        there = len(self._pool.slots) + self._examined  # a probe needs the place of the one that died
        while there < self._pool.wanted and self._schedule.queued(coming + 1) > coming:
            slot = self._pool.start()
            self._when_done(slot.handle.place.remote(), slot, self._placed)
            coming, there = coming + 1, there + 1

    def _feed_all(self) -> None:
        """Give ready actors work, the idle ones first."""
        for depth in range(self._config.in_flight):
            for slot in self._pool.slots:
                self._feed(slot, depth + 1)

    def _feed(self, slot: Slot, depth: int) -> None:
        if not slot.ready or self._control.stop.is_set():
            return
        while len(slot.running) < depth and (shard := self._schedule.take(slot.running)) is not None:
            self._run(slot, shard)

    def _run(self, slot: Slot, shard: ShardRef) -> None:
        running = slot.running[shard.number] = Running(shard)
        reference = slot.handle.run.remote(shard, self._skips())
        when_done(reference, self._events, lambda future: self._ran(slot, running, future))

    def _skips(self) -> Any:
        """The quarantine, put where actors find it once for each time that it grows."""
        count, reference = self._skip
        if count != len(self._control.quarantine):
            count, reference = len(self._control.quarantine), cluster.put(dict(self._control.quarantine))
            self._skip = count, reference
        return reference

    def _speculate(self, now: float) -> None:
        """Begin the shards that take too long a second time, where an actor has nothing else to do."""
        if self._schedule.queued(1):
            return
        for slot in [s for s in self._pool.slots if s.ready and not s.running]:
            in_flight = [(r.shard, now - r.since) for s in self._pool.slots for r in s.running.values()]
            shard = self._schedule.straggler(in_flight)
            if shard is None:
                return
            log.warning("shard %d takes long and is begun a second time, %s", shard.number, slot.where)
            self._control.meter.count("shards begun twice")
            self._run(slot, self._schedule.copy(shard))

    # -- what actors answer ------------------------------------------------------------------------------------

    def _when_done(self, reference: Any, slot: Slot, deal: Any) -> None:
        when_done(reference, self._events, lambda future: self._answered(slot, future, deal))

    def _answered(self, slot: Slot, future: "Future[Any]", deal: Any) -> None:
        """Hand on what an actor answered, unless it is dead or raised."""
        if slot.gone:
            return
        error = future.exception()
        if error is None:
            self._progress_at = time.monotonic() if not slot.ready else self._progress_at
            deal(slot, future.result())
        elif isinstance(error, RayTaskError):
            self._pool.remove(slot)
            cluster.kill(slot.handle)
            self._bad_start(cause(error))
        else:
            self._bury(slot, last_line(error))

    def _placed(self, slot: Slot, place: Place) -> None:
        slot.place = place
        if place.version != __version__:
            what = f"node {place.address} has segbatch {place.version}, the driver {__version__}"
            raise EngineError(what, "install the same version everywhere")
        at_once, trace = self._config.in_flight, self._control.trace
        opening = slot.handle.open.remote(self._task, self._pool.threads, at_once, trace)
        self._when_done(opening, slot, self._opened)

    def _opened(self, slot: Slot, used: Usage) -> None:
        slot.ready = True
        self._control.meter.used(slot.name, used)
        slot.told = slot.idle_since = time.monotonic()
        self._control.on_ready()
        self._control.meter.count("actors started")
        self._control.meter.opened(sum(s.ready for s in self._pool.slots) * self._pool.threads)
        self._bad_starts = 0
        self._feed(slot, self._config.in_flight)

    def _bad_start(self, error: SegbatchError) -> None:
        """Another actor is started in its place, unless that cannot help."""
        self._bad_starts += 1
        if not worth_repeating(error):
            raise error
        if self._bad_starts < _START_ATTEMPTS:
            log.warning("an actor could not start (attempt %d of %d): %s", self._bad_starts, _START_ATTEMPTS, error)
        elif any(s.ready for s in self._pool.slots):
            log.warning("no more actors are started: %s", error)
            self._pool.stop_growing()
        else:
            raise error

    def _ran(self, slot: Slot, running: Running, future: "Future[Any]") -> None:
        if slot.gone:
            return
        error, shard = future.exception(), running.shard
        if error is not None and not isinstance(error, RayTaskError):
            self._bury(slot, last_line(error))
            return
        del slot.running[shard.number]
        slot.idle_since = time.monotonic()
        if error is not None:
            ours = cause(error)
            if self._schedule.is_open(shard.number) and not worth_repeating(ours):
                raise ours from error
            self._control.meter.count("attempts failed")
            self._schedule.failed(shard, str(ours), slot.where)
            self._feed_all()
            return
        self._count(slot, shard, running.since, *future.result())
        self._feed(slot, self._config.in_flight)

    def _count(
        self, slot: Slot, shard: ShardRef, since: float, outcome: Outcome, was_worked_on: bool, used: Usage
    ) -> None:
        """Yield the outcome, unless another copy of the shard was faster."""
        self._control.meter.used(slot.name, used)
        now = time.monotonic()
        worked = outcome.rows - outcome.copied
        if was_worked_on:
            slot.counted += worked
        had_others = self._schedule.copies(shard.number) > 1
        if not self._schedule.finished(shard, now - since):
            return
        if had_others and outcome.committed_by_other:  # the other is our own copy
            outcome = replace(outcome, committed_by_other=False)
        self._rows += worked
        self._progress_at = now
        self._outcomes.append(outcome)
        self._exported.add(outcome)

    # -- how actors get on -------------------------------------------------------------------------------------

    def _ask_figures(self, now: float) -> None:
        """Poll those that work, each about once a second, more seldom where they are many."""
        every = max(_POLL_S, len(self._pool.slots) / _POLLS_PER_S)
        for slot in list(self._pool.slots):
            if slot.asked is not None:
                if now - slot.asked > self._config.hang_s:  # something holds the whole process
                    self._hung(slot, slot.running)
            elif slot.ready and slot.running and now - slot.told >= every:
                slot.asked = now
                self._when_done(slot.handle.figures.remote(), slot, self._told)

    def _told(self, slot: Slot, figures: Figures) -> None:
        slot.asked, slot.told, slot.rows = None, time.monotonic(), figures.rows_done
        self._control.meter.used(slot.name, figures.used)
        self._hung(slot, [n for n, idle in figures.idle_s.items() if idle > self._config.hang_s])

    def _open_on(self, slot: Slot) -> dict[int, ShardRef]:
        """Shards on an actor that are not finished elsewhere."""
        return {number: r.shard for number, r in slot.running.items() if self._schedule.is_open(number)}

    def _report(self) -> None:
        """Rows of finished shards, and those of shards in flight; never more than those have."""
        open_rows = {n: s.rows for slot in self._pool.slots for n, s in self._open_on(slot).items()}
        partial = 0
        for slot in self._pool.slots:
            mine = sum(open_rows[n] for n in slot.running if n in open_rows)
            partial += min(max(slot.rows - slot.counted, 0), mine)
        rows = self._rows + min(partial, sum(open_rows.values()))
        if rows != self._seen_rows:  # fewer after a death
            self._seen_rows = rows
            self._progress_at = time.monotonic()
        if rows > self._reported:
            self._reported = rows
            self._control.on_rows(rows)

    def _check_stalled(self, now: float) -> None:
        waited = now - self._progress_at
        if waited <= self._config.stall_s or self._examined:
            return
        slots = self._pool.slots
        busy = sorted({n for slot in slots for n in self._open_on(slot)})
        longer = "--set engine.stall_s=N waits longer"
        logs = "; ".join(sorted({f"look at the log of the actor {s.where}" for s in slots if s.place})[:2])
        if busy:
            raise EngineError(
                f"no row was finished in {waited:.0f} s; in flight: shards {', '.join(map(str, busy))}",
                f"{logs}; {longer}",
            )
        if logs:
            raise EngineError(f"the model was not loaded in {waited:.0f} s", f"{logs}; {longer}")
        free = cluster.free()
        sizes, share = cluster.sizes(cluster.nodes()), self._pool.share
        gpus = f" and {share.gpus:g} GPUs ({free.get('GPU', 0):g} are free)" if share.gpus else ""
        raise EngineError(
            f"no actor could start in {waited:.0f} s: one needs {share.cpus} CPUs{gpus}, {free.get('CPU', 0):g} of "
            f"the cluster's {sum(n.cpus for n in sizes):g} are free",
            f"wait until others are done; {longer}",
        )

    # -- deaths ------------------------------------------------------------------------------------------------

    def _hung(self, slot: Slot, numbers: Iterable[int]) -> None:
        """End an actor that gets nowhere with some shards, unless they are finished elsewhere."""
        stuck = frozenset(numbers) & self._open_on(slot).keys()
        if stuck:
            which = ", ".join(map(str, sorted(stuck)))
            self._bury(slot, f"nothing was done for {self._config.hang_s:g} s for shard {which}", stuck)

    def _bury(self, slot: Slot, said: str, stuck: frozenset[int] = frozenset(), blameless: bool = False) -> None:
        """An actor died or is to be ended: find out why; until that is known its shards count as in flight."""
        self._pool.remove(slot)
        self._control.meter.count("actors died")
        death = Death(slot, said, self._open_on(slot), stuck, blameless)
        for number, running in slot.running.items():
            if number not in death.shards:
                self._schedule.put_back(running.shard)  # finished: only this copy is forgotten
        self._examined += 1
        self._autopsies.begin(death).add_done_callback(
            lambda future: self._events.put(lambda: self._explained(death, future))
        )

    def _explained(self, death: Death, found: "Future[Culprit | None]") -> None:
        """Put the shards of a dead actor back."""
        self._examined -= 1
        self._progress_at = time.monotonic()
        culprit = found.result()
        if not death.slot.ready:
            where = f"look at the actors' logs; is there enough memory? The last one was {death.slot.where}"
            self._bad_start(EngineError(f"actors die while they start: {death.said}", where))
        elif culprit is not None or death.blameless:
            if culprit is not None:
                self._quarantine(culprit)
            for shard in death.shards.values():
                self._schedule.put_back(shard)  # the cause is known and will be skipped: no attempt is charged
        else:
            longer = f"nothing was done for {self._config.hang_s:g} s (--set engine.hang_s=N waits longer)"
            for number, shard in death.shards.items():
                if death.stuck and number not in death.stuck:
                    self._schedule.put_back(shard)
                else:
                    self._schedule.failed(shard, longer if death.stuck else "its actor died", death.slot.where)
        self._feed_all()

    def _quarantine(self, culprit: Culprit) -> None:
        shard, sample_id, reason = culprit.shard, culprit.sample_id, culprit.reason
        log.warning("image %s of shard %d is quarantined: %s", sample_id, shard.number, reason)
        self._control.quarantine[sample_id] = reason
        self._control.on_quarantine(shard, sample_id, reason)
        for slot in [s for s in self._pool.slots if shard.number in s.running]:  # a second copy is as doomed
            self._bury(slot, f"image {sample_id} of its shard {shard.number} is quarantined", blameless=True)
