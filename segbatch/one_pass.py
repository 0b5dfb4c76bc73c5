"""Several models over the same photos in one pass: each has a run root of its own, as if it had run alone.

Every root is opened, planned and finished by the run protocol. Plans are cut alike from the same input, so shards of
different roots that hold the same photos have the same key; those that at least two roots lack are worked on together,
the rest by each root alone: after a run that was cut off, a new version of a photo, or another model's head start.
"""

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from segbatch import drivers, storage, tracing
from segbatch.config import RunOptions
from segbatch.drivers import Heartbeat
from segbatch.engine import Engine
from segbatch.errors import ConfigError, SegbatchError
from segbatch.jobs import Beating, Done, Job, Limits, RunResult, Watch, completed, opened, planned, recorded, work
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Run
from segbatch.shards import Shards
from segbatch.stages.predict_many import ManyOutcome, ManyShard, PredictManyTask, tagged, untagged

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Together:
    """Shards of several roots that hold the same photos, as one shard each; as ``Shards``.

    Attributes:
        root: the folder that holds the roots.
        todo: what each root lacks, by alias.
    """

    root: str
    todo: Mapping[str, Shards]
    retry: bool = False

    @property
    def aliases(self) -> frozenset[str]:
        """Models with a part in it."""
        return frozenset(alias for group in self._groups() for alias in group)

    @property
    def rows(self) -> int:
        """Rows that they have together, those of all models."""
        return sum(s.rows for group in self._groups() for s in group.values())

    @property
    def bytes(self) -> int:
        """Bytes that there are to read for them."""
        return sum(next(iter(group.values())).bytes for group in self._groups())

    def __len__(self) -> int:
        return sum(len(next(iter(group.values()))) for group in self._groups())

    def __iter__(self) -> Iterator[ShardRef]:
        numbers = itertools.count()
        for group in self._groups():
            for refs in zip(*group.values(), strict=True):
                first = refs[0]
                yield ManyShard(
                    root=self.root,
                    table=first.table,
                    plan=first.plan,
                    number=next(numbers),
                    key=first.key,
                    part=first.part,
                    start=first.start,
                    stop=first.stop,
                    rows=sum(r.rows for r in refs),
                    bytes=first.bytes,
                    members=tuple(zip(group, refs, strict=True)),
                )

    def _groups(self) -> Iterator[dict[str, Shards]]:
        """Shards that the same two or more roots lack, in the same order for each."""
        aliases = list(self.todo)
        fresh = {a: s.where(~s.numpy("rewrite")) for a, s in self.todo.items()}
        keys = {a: s.columns.column("key").combine_chunks() for a, s in fresh.items()}
        for size in range(len(aliases), 1, -1):
            for members in itertools.combinations(aliases, size):
                shared = keys[members[0]]
                for alias in aliases:
                    has = pc.is_in(shared, value_set=keys[alias])
                    shared = shared.filter(has if alias in members else pc.invert(has))
                if len(shared):
                    yield {a: _in_order_of(fresh[a], keys[a], shared) for a in members}


def _in_order_of(shards: Shards, keys: pa.Array, wanted: pa.Array) -> Shards:
    return replace(shards, columns=shards.columns.take(pc.index_in(wanted, value_set=keys)))


class _Runs(Run):
    """The roots of one pass as one run: what a driver tells it goes to the root that it is about."""

    def __init__(
        self, root: str, runs: Mapping[str, Run], done: Mapping[str, Done], beats: Mapping[str, Heartbeat]
    ) -> None:
        super().__init__(root, "masks")
        self._runs, self._done, self._beats = runs, done, beats
        self._bad = dict.fromkeys(runs, 0)

    @property
    def members(self) -> Mapping[str, Run]:
        """Each root's own run by its alias."""
        return self._runs

    def begin(self, rows: Mapping[str, int]) -> None:
        """Work on so many rows of each begins."""
        for alias, count in rows.items():
            self._beats[alias].begin(count)

    def end(self, total: Done) -> None:
        """It has ended; every model took its time, and the same processes."""
        for alias, done in self._done.items():
            self._beats[alias].end()
            done.seconds, done.start_seconds = total.seconds, total.start_seconds
            done.meter.was_part_of(total.meter)
            done.began = done.meter.shards > 0

    def recorded(self, jobs: Mapping[str, Job], options: RunOptions, error: BaseException) -> None:
        """Each root gets the record of what was done until ``error`` ended the pass."""
        for alias, run in self._runs.items():
            recorded(run, jobs[alias], options, self._done[alias], error)

    def record(self, outcome: Outcome) -> None:
        """See ``Run``."""
        for alias, member in cast(ManyOutcome, outcome).members:
            if not member.committed_by_other:
                self._done[alias].rows += member.rows
            self._done[alias].meter.add(member)
            self._bad[alias] += member.bad
            self._beats[alias].advance(self._done[alias].rows, self._bad[alias])
            self._runs[alias].record(member)

    def flush(self) -> None:
        """See ``Run``."""
        for run in self._runs.values():
            storage.sweep_temporary(run.root)
            run.flush()

    def quarantine(self) -> dict[str, str]:
        """See ``Run``; by the tagged sample id."""
        return {tagged(a, i): reason for a, run in self._runs.items() for i, reason in run.quarantine().items()}

    def add_quarantine(self, shard: ShardRef, sample_id: str, reason: str) -> None:
        """See ``Run``."""
        alias, own_id = untagged(sample_id)
        self._runs[alias].add_quarantine(dict(cast(ManyShard, shard).members)[alias], own_id, reason)

    def complaints(self, shard: int, with_issues: bool) -> Iterator[str]:
        """None: the number is that of the pass."""
        return iter(())


class _Watched:
    """A Watch of the pass that tells each root's heartbeat where the actors are."""

    def __init__(self, watch: Watch, beats: Iterable[Heartbeat]) -> None:
        self._beats = tuple(beats)
        self.say, self.begin, self.advance, self.end = watch.say, watch.begin, watch.advance, watch.end

    def work_at(self, places: Sequence[str]) -> None:
        """See ``SeesWorkers``."""
        for beat in self._beats:
            beat.work_at(places)


def check_aliases(aliases: Iterable[str]) -> None:
    """Raises ConfigError where one cannot be the name of a folder, or stands twice."""
    given = list(aliases)
    for alias in given:
        if not _ALIAS.fullmatch(alias):
            raise ConfigError(f"model alias {alias!r} is not letters, digits, _ and -", "e.g. fcn=fcn@CHECKPOINT")
        if given.count(alias) > 1:
            raise ConfigError(f"two models are called {alias}", "every model has a folder of its own in OUT")


def carry_out_together(
    root: str, jobs: Mapping[str, Job], limits: Limits, options: RunOptions, watch: Watch
) -> dict[str, RunResult]:
    """Carry out jobs of ``predict`` over one input, whose outputs lie below ``root``.

    Returns:
        What became of each, by alias.

    Raises:
        BadItemsError: of the first model with more bad rows than allowed; every model is finished.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing.span("segbatch predict", attributes={"root": root, "models": len(jobs)}))
        runs: dict[str, Run] = {}
        rounds: dict[str, Iterator[Shards]] = {}
        beats: dict[str, Heartbeat] = {}
        done = {alias: Done() for alias in jobs}
        for alias, job in jobs.items():
            runs[alias], listing = opened(job)
            beats[alias] = stack.enter_context(drivers.beating(runs[alias].root, job.verb))
            rounds[alias] = planned(runs[alias], job, listing, options)
        _shared(jobs, _Runs(root, runs, done, beats), limits, options, _Watched(watch, beats.values()))
        watches = {alias: Beating(watch, beat) for alias, beat in beats.items()}
        return _finished(jobs, runs, rounds, limits, options, watches, done)


def _shared(jobs: Mapping[str, Job], runs: "_Runs", limits: Limits, options: RunOptions, watch: Watch) -> None:
    """What several roots lack, worked on together."""
    lacking = {alias: shards for alias, run in runs.members.items() if (shards := run.lacking())}
    together = Together(runs.root, lacking)
    if not len(together):
        return

    def settle(_: Any, shards: Shards, say: Callable[[str], None], engine: Engine) -> PredictManyTask:
        tasks: dict[str, Any] = {}
        for alias in sorted(together.aliases):
            one = jobs[alias]
            tasks[alias] = one.settle(runs.members[alias], lacking[alias], say, engine) if one.settle else one.task
        return PredictManyTask(tasks)

    job = replace(next(iter(jobs.values())), out=runs.root, task=PredictManyTask({}), settle=settle)
    runs.begin({alias: lacking[alias].rows for alias in together.aliases})
    total = Done()
    try:
        work(runs, job, cast(Shards, together), limits, options.engine, watch, threading.Event(), total)
    except BaseException as error:
        runs.end(total)
        with contextlib.suppress(SegbatchError):  # a store that is gone must not hide why
            runs.recorded(jobs, options, error)
        raise
    runs.end(total)


def _finished(
    jobs: Mapping[str, Job],
    runs: Mapping[str, Run],
    rounds: Mapping[str, Iterator[Shards]],
    limits: Limits,
    options: RunOptions,
    watches: Mapping[str, Watch],
    done: Mapping[str, Done],
) -> dict[str, RunResult]:
    """What is left of each root, then its end; an error of one waits until all are finished."""
    results: dict[str, RunResult] = {}
    errors: list[SegbatchError] = []
    for alias, job in jobs.items():
        watches[alias].say(f"{alias}:")
        try:
            results[alias] = completed(runs[alias], job, rounds[alias], limits, options, watches[alias], done[alias])
        except SegbatchError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results
