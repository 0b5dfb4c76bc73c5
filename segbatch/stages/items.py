"""The worker of verbs that read files item by item and write rows for each: ingest and import."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import pyarrow as pa

from segbatch import schemas, storage, tables
from segbatch.errors import DataError, EngineError, SegbatchError, StorageError
from segbatch.records import OK, Outcome, PlanItem, ShardRef
from segbatch.runs import Journal, commit, items_of
from segbatch.stages.allocator import keep_freed_pages
from segbatch.stages.stopwatch import Stopwatch

QUARANTINED = "quarantined"
"""Status of a sample that killed its process."""

UNREADABLE = "unreadable"
"""Status of a sample whose files the store does not give."""

_BATCH_ROWS = 64
_BATCH_BYTES = 32 << 20
_AHEAD_PER_THREAD = 2
_AHEAD_BYTES = 32 << 20

R = TypeVar("R")


class Rows(Protocol[R]):
    """How items become rows ``R`` of a table."""

    def read(self, item: PlanItem) -> Iterator[R]:
        """The ``item.rows`` rows of an item, one after the other.

        Raises:
            DataError: it cannot be read from here on.
        """
        ...

    def bad(self, item: PlanItem, error: DataError, index: int) -> R:
        """The row ``index`` of an item, with the reason why it could not be read."""
        ...

    def batch(self, rows: Sequence[R]) -> pa.RecordBatch:
        """Rows as a record batch of the table."""
        ...

    def weight(self, row: R) -> int:
        """Bytes that a row holds, about."""
        ...


class ItemWorker(Generic[R]):
    """Reads with ``threads`` threads, a few items ahead, and writes in plan order. See ``runs.Worker``."""

    def __init__(self, source: Rows[R], threads: int, journal: Journal) -> None:
        keep_freed_pages()
        self._source = source
        self._journal = journal
        self._ahead = max(threads, 1) * _AHEAD_PER_THREAD
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="read")
        self._lock = threading.Lock()
        self._rows_done = 0

    @property
    def rows_done(self) -> int:
        """Rows finished so far, over all shards."""
        return self._rows_done

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        """Read every item of the shard and commit its part file; see ``runs.Worker``.

        With mode ``retry`` good rows of the part that is there are copied, so that only bad items are read again.
        """
        watch = Stopwatch()
        writer = tables.PartWriter(shard.table)
        items = items_of(shard)
        there = storage.stat(shard.uri) if shard.mode == "retry" else None
        copied: list[int] = []
        arguments = shard, items, skip, watch
        for batch in self._fresh(*arguments) if there is None else self._redone(*arguments, copied):
            with watch.measured("encode"):
                writer.write(batch)
        basis = there.etag if there is not None else ""
        return commit(shard, writer, watch.seconds(), basis=basis, copied=sum(copied))

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Read one item and make its rows, without writing; see ``runs.Worker``."""
        for item in items_of(shard):
            if item.sample_id == sample_id:
                for row in self._rows_of(shard, item, {}):
                    self._source.batch([row])

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _fresh(
        self, shard: ShardRef, items: Iterable[PlanItem], skip: Mapping[str, str], watch: Stopwatch
    ) -> Iterator[pa.RecordBatch]:
        for group in grouped(self._rows(shard, items, skip, watch), self._source.weight):
            with watch.measured("encode"):
                batch = self._source.batch(group)
            with self._lock:
                self._rows_done += batch.num_rows
            yield batch

    def _redone(
        self,
        shard: ShardRef,
        items: Sequence[PlanItem],
        skip: Mapping[str, str],
        watch: Stopwatch,
        copied: list[int],
    ) -> Iterator[pa.RecordBatch]:
        """The part that is there, its bad items read again: all rows of a volume where one is bad.

        ``copied`` takes the counts of the other rows.
        """
        batches = tables.batches(shard.uri, shard.table, ("status",))
        status = [s for batch in batches for s in batch.column("status").to_pylist()]
        there = tables.batches(shard.uri, shard.table, batch_rows=_BATCH_ROWS)
        for members, is_good, rows in _stretches(_judged(items, status), there):
            if is_good:
                copied.append(rows.num_rows)
                yield rows.select(schemas.TABLES[shard.table].names)
            elif members:
                yield from self._fresh(shard, members, skip, watch)

    def _rows(
        self, shard: ShardRef, items: Iterable[PlanItem], skip: Mapping[str, str], watch: Stopwatch
    ) -> Iterator[R]:
        """Rows in the order of ``items``.

        Read ahead are 32 MB, but at least two items a thread; of a volume there is one slice at a time.
        """
        waiting: deque[tuple[Future[list[R]], int]] = deque()
        held = 0
        try:
            for item in items:
                while waiting and (item.rows > 1 or (len(waiting) >= self._ahead and held >= _AHEAD_BYTES)):
                    rows, size = waiting.popleft()
                    held -= size
                    yield from rows.result()
                if item.rows > 1:
                    yield from watch.each("read", self._rows_of(shard, item, skip))
                else:
                    waiting.append((self._pool.submit(self._row_list, shard, item, skip, watch), item.bytes))
                    held += item.bytes
            while waiting:
                yield from waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()

    def _row_list(self, shard: ShardRef, item: PlanItem, skip: Mapping[str, str], watch: Stopwatch) -> list[R]:
        with watch.measured("read"):
            return list(self._rows_of(shard, item, skip))

    def _rows_of(self, shard: ShardRef, item: PlanItem, skip: Mapping[str, str]) -> Iterator[R]:
        """The ``item.rows`` rows of an item, those that cannot be read with a reason."""
        if item.sample_id in skip:
            killer = DataError(skip[item.sample_id], code=QUARANTINED)
            yield from (self._source.bad(item, killer, i) for i in range(item.rows))
            return
        slot = threading.current_thread().name
        self._journal.note(slot, shard.number, [item.sample_id])
        done = 0
        try:
            for row in self._source.read(item):
                yield row
                done += 1
        except DataError as error:
            yield from (self._source.bad(item, error, i) for i in range(done, item.rows))
        except StorageError as error:
            if error.retryable:
                raise
            unreadable = DataError(error.problem, error.fix, UNREADABLE)
            yield from (self._source.bad(item, unreadable, i) for i in range(done, item.rows))
        except SegbatchError:
            raise
        except Exception as error:
            problem = f"{item.sample_id} ({item.uri}): {type(error).__name__}: {error}"
            raise EngineError(problem, "this looks like a bug, please report it") from error
        finally:
            self._journal.clear(slot)


def _stretches(
    judged: Iterable[tuple[list[PlanItem], bool]], batches: Iterator[pa.RecordBatch]
) -> Iterator[tuple[list[PlanItem], bool, pa.RecordBatch]]:
    """Stretches of items with their rows of the part, which is read once; a bad stretch's items come with its first."""
    batch, used = next(batches), 0
    for members, is_good in judged:
        left = sum(i.rows for i in members)
        while left:
            if used == batch.num_rows:
                batch, used = next(batches), 0
            count = min(left, batch.num_rows - used)
            yield members, is_good, batch.slice(used, count)
            members, left, used = [], left - count, used + count


def _judged(items: Sequence[PlanItem], status: Sequence[str]) -> Iterator[tuple[list[PlanItem], bool]]:
    """Neighbours that are all good, or all have a bad row, in order."""
    stop = itertools.accumulate(i.rows for i in items)
    good = [all(s == OK for s in status[last - i.rows : last]) for i, last in zip(items, stop, strict=True)]
    for is_good, members in itertools.groupby(zip(items, good, strict=True), key=lambda pair: pair[1]):
        yield [item for item, _ in members], is_good


def grouped(rows: Iterable[R], weight: Callable[[R], int]) -> Iterator[list[R]]:
    """Rows in lists of at most 64 rows that are closed as soon as they hold 32 MB."""
    group: list[R] = []
    held = 0
    for row in rows:
        group.append(row)
        held += weight(row)
        if len(group) >= _BATCH_ROWS or held >= _BATCH_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group
