"""Predict with several models in one pass: every photo is read and decoded once, every model has its own masks table.

The work on a photo is that of ``stages.predict``: each model has a ``PredictWorker`` of its own here, which prepares,
predicts and encodes as it does alone; only the threads, the bytes and the decoded pixels are shared. A chunk of photos
goes through all models in one codec thread and is then forgotten, so memory grows by the models alone. Batches are
filled from one chunk. Photos that models want decoded at different sizes are decoded once for each size.
"""

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from segbatch import tables
from segbatch.errors import ConfigError, DataError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Journal, commit, committed, items_of
from segbatch.stages import inputs as reading
from segbatch.stages.inputs import Fed, Input
from segbatch.stages.mask_rows import masks_batch
from segbatch.stages.predict import (
    READERS,
    ROWS_PER_BATCH,
    PhotoRow,
    PredictTask,
    PredictWorker,
    ahead,
    mask_row,
    read_ahead,
    source_of,
)

Pixels = tuple[NDArray[Any], int, int, int]
"""What ``inputs.decoded`` gives."""


@dataclass(frozen=True, slots=True)
class ManyShard(ShardRef):
    """Shards of several run roots over the same photos; ``number`` counts them in one pass.

    Attributes:
        members: (alias of the model, the shard of its root).
    """

    members: tuple[tuple[str, ShardRef], ...] = ()


@dataclass(frozen=True, slots=True)
class ManyOutcome(Outcome):
    """Sums over ``members``: (alias of the model, what became of its shard)."""

    members: tuple[tuple[str, Outcome], ...] = ()


def tagged(alias: str, sample_id: str) -> str:
    """A sample as one model sees it: what one model cannot bear is kept from that model alone."""
    return f"{alias}:{sample_id}"


def untagged(tag: str) -> tuple[str, str]:
    """Alias and sample id; an alias holds no colon."""
    alias, _, sample_id = tag.partition(":")
    return alias, sample_id


@dataclass(frozen=True, slots=True)
class _TaggedJournal:
    """Notes what one of the models is at; see ``runs.Journal``."""

    inner: Journal
    alias: str

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """See ``Journal``."""
        self.inner.note(slot, shard, [tagged(self.alias, i) for i in sample_ids])

    def clear(self, slot: str) -> None:
        """See ``Journal``."""
        self.inner.clear(slot)


class DecodedOnce:
    """``inputs.decoded``, which decodes a photo once for all that ask with the same arguments, until it is forgotten.

    One thread works on a photo at a time; different photos may come from different threads.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[object, Pixels | DataError]] = {}

    def __call__(self, item: Input, data: bytes, max_pixels: int, fed: Fed | None = None) -> Pixels:
        """See ``inputs.decoded``."""
        kept = self._kept.setdefault(id(item), {})
        asked = (max_pixels, _size_of(fed))
        if asked not in kept:
            try:
                kept[asked] = reading.decoded(item, data, max_pixels, fed)
            except DataError as error:
                kept[asked] = error
        found = kept[asked]
        if isinstance(found, DataError):
            raise found
        return found

    def forget(self, items: Iterable[Input]) -> None:
        """No model will ask for these again."""
        for item in items:
            self._kept.pop(id(item), None)


def _size_of(fed: Fed | None) -> object:
    """Equal for two that want a photo at the same size."""
    if isinstance(fed, functools.partial):
        spec = fed.args[0]
        return spec.resize, spec.height, spec.width, spec.longest
    return fed


@dataclass(frozen=True, slots=True)
class PredictManyTask:
    """Recipe of a ``PredictManyWorker``: each model's task by its alias."""

    tasks: Mapping[str, PredictTask]

    @property
    def uses_gpu(self) -> bool:
        """Whether one of the models computes on a GPU."""
        return any(task.uses_gpu for task in self.tasks.values())

    def open(self, threads: int, journal: Journal) -> "PredictManyWorker":
        """Load the models."""
        return PredictManyWorker(self.tasks, threads, journal)


class PredictManyWorker:
    """Holds the models and the threads; see ``runs.Worker``.

    Raises:
        ConfigError: a model of CT slices together with one of photos.
    """

    def __init__(self, tasks: Mapping[str, PredictTask], threads: int, journal: Journal) -> None:
        self._decoded = DecodedOnce()
        self._workers = {a: PredictWorker(t, threads, _TaggedJournal(journal, a)) for a, t in tasks.items()}
        for worker in self._workers.values():
            worker.decoder = self._decoded
        slices = {w.slices for w in self._workers.values()}
        if len(slices) > 1:
            raise ConfigError("one pass reads photos or CT slices, not both", "predict with each model in its own run")
        self._slices = slices.pop()
        self._chunk = max(w.chunk for w in self._workers.values())
        self._window = threads + 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="codec")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._rows_done = 0
        self._count_lock = threading.Lock()

    @property
    def rows_done(self) -> int:
        """Rows finished so far, those of all models."""
        return self._rows_done

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._readers, self._pool):
            pool.shutdown(cancel_futures=True)
        for worker in self._workers.values():
            worker.close()

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> ManyOutcome:
        """Predict what each model lacks of a shard; see ``runs.Worker.run``. ``skip`` holds tagged sample ids."""
        members = _members(shard)
        done = {alias: found for alias, member in members.items() if (found := committed(member)) is not None}
        lacking = {alias: member for alias, member in members.items() if alias not in done}
        if lacking:
            done |= self._worked(shard.number, lacking, skip)
        return _summed(shard, [(alias, done[alias]) for alias in members])

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Decode, predict and encode one sample by the model that its tag names, without writing."""
        alias, own_id = untagged(sample_id)
        self._workers[alias].probe(_members(shard)[alias], own_id)

    def _worked(self, number: int, lacking: Mapping[str, ShardRef], skip: Mapping[str, str]) -> dict[str, Outcome]:
        started = time.perf_counter()
        items = items_of(next(iter(lacking.values())))
        sheets = {alias: _Sheet(self._workers[alias].digest) for alias in lacking}
        photos = reading.inputs(items, self._slices)
        counted = 0
        try:
            for rows_of in self._rows(number, photos, tuple(lacking), skip):
                for alias, rows in rows_of.items():
                    sheets[alias].add(rows)
                    counted += len(rows)
                    self._count(len(rows))
        except BaseException:
            self._count(-counted)  # the shard begins anew
            raise
        source = {"segbatch.source": source_of(items)}
        total = time.perf_counter() - started
        return {a: commit(member, *sheets[a].finished(total), source) for a, member in lacking.items()}

    def _rows(
        self, number: int, photos: Iterable[Input], aliases: tuple[str, ...], skip: Mapping[str, str]
    ) -> Iterator[dict[str, list[PhotoRow]]]:
        """Rows of every model, in the order of their photos, a chunk at a time."""
        read = functools.partial(self._read, aliases=aliases, skip=skip)
        chunks = read_ahead(self._readers, read, photos, self._chunk)
        working = (self._pool.submit(self._work, number, _joined(parts)) for parts in chunks)
        for done in ahead(working, self._window):
            yield done.result()

    def _read(
        self, photos: Sequence[Input], aliases: tuple[str, ...], skip: Mapping[str, str]
    ) -> dict[str, list[PhotoRow]]:
        """A row of each photo for every model, with the bytes, which are fetched once."""
        hopeless = {p.sample_id: skip[tagged(aliases[0], p.sample_id)] for p in photos if _all_skip(p, aliases, skip)}
        rows = self._workers[aliases[0]].read(photos, hopeless)
        copies = {alias: [replace(r, seconds={"read": 0.0}) for r in rows] for alias in aliases[1:]}
        found = {aliases[0]: rows, **copies}
        for alias, own in found.items():
            for row in own:
                if (tag := tagged(alias, row.photo.sample_id)) in skip:
                    row.fail("quarantined", skip[tag])
        return found

    def _work(self, number: int, rows_of: dict[str, list[PhotoRow]]) -> dict[str, list[PhotoRow]]:
        """A chunk through every model, in one codec thread."""
        try:
            return {alias: self._workers[alias].work(number, rows) for alias, rows in rows_of.items()}
        finally:
            self._decoded.forget(r.photo for rows in rows_of.values() for r in rows)

    def _count(self, rows: int) -> None:
        with self._count_lock:
            self._rows_done += rows


class _Sheet:
    """One model's result of a shard in the making."""

    def __init__(self, digest: str) -> None:
        self._digest = digest
        self._writer = tables.PartWriter("masks")
        self._pending: list[PhotoRow] = []
        self._seconds: dict[str, float] = {}

    def add(self, rows: Iterable[PhotoRow]) -> None:
        """More rows, in order."""
        for row in rows:
            for stage, spent in row.seconds.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + spent
            self._pending.append(row)
            if len(self._pending) >= ROWS_PER_BATCH:
                self._write()

    def finished(self, total_s: float) -> tuple[tables.PartWriter, dict[str, float]]:
        """All rows, and wall time by stage."""
        if self._pending:
            self._write()
        return self._writer, {**self._seconds, "total": total_s}

    def _write(self) -> None:
        self._writer.write(masks_batch(list(map(mask_row, self._pending)), self._digest))
        self._pending = []


def _joined(parts: Sequence[Mapping[str, list[PhotoRow]]]) -> dict[str, list[PhotoRow]]:
    return {alias: [row for part in parts for row in part[alias]] for alias in parts[0]}


def _all_skip(photo: Input, aliases: Sequence[str], skip: Mapping[str, str]) -> bool:
    return all(tagged(alias, photo.sample_id) in skip for alias in aliases)


def _members(shard: ShardRef) -> dict[str, ShardRef]:
    assert isinstance(shard, ManyShard)
    return dict(shard.members)


def _summed(shard: ShardRef, members: Sequence[tuple[str, Outcome]]) -> ManyOutcome:
    outcomes = [outcome for _, outcome in members]
    reasons: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for outcome in outcomes:
        for reason, count in outcome.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        for stage, spent in outcome.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return ManyOutcome(
        shard=shard.number,
        plan=shard.plan,
        rows=sum(o.rows for o in outcomes),
        bad=sum(o.bad for o in outcomes),
        reasons=reasons,
        bytes_out=sum(o.bytes_out for o in outcomes),
        seconds=seconds,
        committed_by_other=all(o.committed_by_other for o in outcomes),
        members=tuple(members),
    )
