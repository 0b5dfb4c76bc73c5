"""Compact: the rows of a run root in fewer, larger files of a new root, in the same order and of the same schema.

A job as any other: each file of the old root is an item, as many as fit a file are a shard, and the run protocol does
the rest. The old root is only read.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from segbatch import schemas, storage, tables
from segbatch.errors import IncompleteRunError, SchemaError
from segbatch.records import Outcome, PlanItem, ShardRef
from segbatch.runs import Journal, Run, commit, items_of
from segbatch.stages.allocator import keep_freed_pages
from segbatch.stages.join import SOURCE_KEY

_BATCH_ROWS = 64
_TURN_S = 1.0


def items(run: Run) -> Iterator[PlanItem]:
    """One item per file of a complete run, in the order of its rows.

    Raises:
        IncompleteRunError: shards or rows lack. Raised at once, not on iteration.
    """
    state = run.state()
    if not state.complete or state.rows != state.rows_done:
        raise IncompleteRunError(
            f"{run.root}: {state.shards_done} of {state.shards} shards and {state.rows_done} of {state.rows} rows are "
            "there; only complete runs are compacted",
            "run the command that began it again",
        )
    return _items(run)


def _items(run: Run) -> Iterator[PlanItem]:
    parts = tables.parts(storage.join(run.root, run.table))
    with ThreadPoolExecutor(8) as pool:
        for part, rows in zip(parts, pool.map(lambda p: tables.count_rows(p.uri, run.table), parts), strict=True):
            name = storage.name_of(part.uri).removesuffix(tables.SUFFIX)
            yield PlanItem(name, part.uri, part.etag, part.size, rows)


@dataclass(frozen=True, slots=True)
class CompactTask:
    """Picklable recipe: copy rows of ``table``."""

    table: str

    def open(self, threads: int, journal: Journal) -> "CompactWorker":
        """See ``runs.Task``; copying is bound by the store, so ``threads`` is not needed."""
        return CompactWorker(self.table, journal)


class CompactWorker:
    """See ``runs.Worker``. One file at a time is put together in memory: 250 MB and about twice its size."""

    def __init__(self, table: str, journal: Journal) -> None:
        keep_freed_pages()
        self._table = table
        self._journal = journal
        self._one_file = threading.Lock()
        self._rows_done = 0

    @property
    def rows_done(self) -> int:
        """Rows copied so far."""
        return self._rows_done

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        """Copy the rows of the shard's files in order; see ``runs.Worker``.

        Raises:
            SchemaError: a file is damaged, or its footer tells another number of bad rows than it holds.
        """
        slot = threading.current_thread().name
        while not self._one_file.acquire(timeout=_TURN_S):
            self._journal.note(slot, shard.number, [])  # it does not hang, it waits for its turn
        try:
            began = time.perf_counter()
            writer = tables.PartWriter(self._table)
            footers = []
            found = items_of(shard)
            try:
                for item in found:
                    self._journal.note(slot, shard.number, [item.sample_id])
                    footers.append(tables.footer(item.uri))
                    self._copy(item, footers[-1], writer)
            finally:
                self._journal.clear(slot)
            seconds = {"total": time.perf_counter() - began}
            return commit(shard, writer, seconds, extra=_sources(found, footers))
        finally:
            self._one_file.release()

    def _copy(self, item: PlanItem, footer: Mapping[str, str], writer: tables.PartWriter) -> None:
        before = (writer.rows, Counter(writer.reasons), Counter(writer.issues))
        for batch in _rows(item.uri, self._table):
            writer.write(batch)
            self._rows_done += batch.num_rows
        counted = {
            "segbatch.rows": writer.rows - before[0],
            "segbatch.reasons": dict(writer.reasons - before[1]),
            "segbatch.issues": dict(writer.issues - before[2]),
        }
        for key, value in counted.items():
            told = json.loads(footer.get(key, "null"))
            if told != value:
                problem = f"{item.uri}: its footer says {key.removeprefix('segbatch.')} = {told}, it holds {value}"
                raise SchemaError(problem, f"segbatch verify {item.uri.rsplit('/', 2)[0]}")

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Read one file without writing; see ``runs.Worker``."""
        for item in items_of(shard):
            if item.sample_id == sample_id:
                for _ in _rows(item.uri, self._table):
                    continue

    def close(self) -> None:
        """Nothing is held that would have to be released."""


def _rows(uri: str, table: str) -> Iterator[pa.RecordBatch]:
    """All rows of a file in today's schema, its pages compared with their checksums.

    Raises:
        SchemaError: it is damaged.
    """
    names = schemas.TABLES[table].names
    try:
        for batch in tables.batches(uri, table, batch_rows=_BATCH_ROWS, check=True):
            yield batch.select(names)
    except (pa.ArrowException, OSError) as error:
        problem = f"{uri} is damaged: {str(error).splitlines()[0]}"
        raise SchemaError(problem, "delete it and run the command that wrote it again") from error


def _sources(items: Sequence[PlanItem], footers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The ranges of samples rows that the rows were made from, in order; nothing where one file lacks them."""
    ranges: list[dict[str, Any]] = []
    for item, footer in zip(items, footers, strict=True):
        found: list[dict[str, Any]] = json.loads(footer.get(SOURCE_KEY, "[]"))
        if sum(r["rows"] for r in found) != item.rows:
            return {}
        for one in found:
            last = ranges[-1] if ranges else None
            if last and last["uri"] == one["uri"] and last["row_start"] + last["rows"] == one["row_start"]:
                last["rows"] += one["rows"]
            else:
                ranges.append(dict(one))
    return {SOURCE_KEY: json.dumps(ranges)}
