"""Bring masks and samples together: zip where the order is known, else join by sample id.

Masks that segbatch predicted over a samples table keep its rows' order and say so in their footer
(``segbatch.source``), so both are read once, front to back. Other masks are joined in blocks: an index of the samples
(26 bytes each, three times that while it is built) tells where a sample lies, and each block reads its samples in file
order. Masks in about the order of the samples then read them about once; in random order every sample costs a row
group (at most 100 rows).
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.errors import SchemaError
from segbatch.metrics.base import Row
from segbatch.records import OK, PlanItem
from segbatch.storage import ObjectInfo

SOURCE_KEY = "segbatch.source"
"""Footer key of a masks part: JSON list of {uri, row_start, rows}, the ranges of samples rows that it was made from."""

PREDICTION_FAILED = "prediction-failed"
NO_LABEL = "no-label"
UNKNOWN_SAMPLE = "unknown-sample"
QUARANTINED = "quarantined"
"""Statuses of state rows, beside ``ok`` and the codes of the DataErrors that a metric raises."""

_INDEX_BATCH = 8192
_BLOCK_ROWS = 512
_BLOCK_BYTES = 64 << 20
_NEAR_ROWS = 64


@dataclass(frozen=True, slots=True)
class SourceRange:
    """Rows ``[row_start, row_start + rows)`` of a samples part."""

    uri: str
    row_start: int
    rows: int


def source_ranges(masks_part: str, samples: Sequence[ObjectInfo], row_start: int) -> list[SourceRange] | None:
    """What a masks part was made from, from its row ``row_start`` on.

    None unless its footer says so and all of it is in this samples table.
    """
    text = tables.footer(masks_part).get(SOURCE_KEY)
    if text is None:
        return None
    known = {p.uri for p in samples}
    ranges = []
    for entry in json.loads(text):
        uri, start, rows = storage.resolve(entry["uri"]), int(entry["row_start"]), int(entry["rows"])
        if uri not in known:
            return None
        passed = min(row_start, rows)
        row_start -= passed
        ranges.append(SourceRange(uri, start + passed, rows - passed))
    return [r for r in ranges if r.rows] or None


def walk(ranges: Iterable[SourceRange], columns: Sequence[str]) -> Iterator[Row]:
    """The samples rows of the ranges, one after the other."""
    for r in ranges:
        for batch in tables.batches(r.uri, "samples", columns, r.row_start, r.row_start + r.rows):
            yield from (Row(batch, i) for i in range(batch.num_rows))


class SampleIndex:
    """Where every sample lies: sample id -> position, the row number over all parts in order.

    Ids are kept as 128-bit BLAKE2b digests. Also knows each sample's split, and whether it is good.
    """

    def __init__(self, parts: Sequence[ObjectInfo]) -> None:
        """Read the id, split and status columns of all parts.

        Raises:
            SchemaError: an id stands in the table twice.
        """
        self._parts = list(parts)
        self.splits: list[str] = []
        digests, codes, good, sizes = [], [], [], []
        for part in parts:
            rows = 0
            for batch in tables.batches(part.uri, "samples", ("sample_id", "split", "status"), batch_rows=_INDEX_BATCH):
                digests.append(_digests(batch.column("sample_id").to_pylist()))
                codes.append(self._codes(batch.column("split").to_pylist()))
                good.append(np.array([s == OK for s in batch.column("status").to_pylist()], bool))
                rows += batch.num_rows
            sizes.append(rows)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        keys = np.concatenate(digests) if digests else np.empty((0, 2), np.uint64)
        self.split_code: NDArray[np.uint16] = np.concatenate([np.empty(0, np.uint16), *codes])
        self.good: NDArray[np.bool_] = np.concatenate([np.empty(0, bool), *good])
        self._position = np.lexsort((keys[:, 1], keys[:, 0]))
        self._high, self._low = keys[self._position, 0], keys[self._position, 1]
        self._refuse_duplicates()

    def __len__(self) -> int:
        return len(self._position)

    def _codes(self, splits: list[str | None]) -> NDArray[np.uint16]:
        for name in dict.fromkeys(s or "" for s in splits):
            if name not in self.splits:
                self.splits.append(name)
        place = {name: i for i, name in enumerate(self.splits)}
        return np.array([place[s or ""] for s in splits], np.uint16)

    def _refuse_duplicates(self) -> None:
        same = (self._high[1:] == self._high[:-1]) & (self._low[1:] == self._low[:-1])
        if same.any():
            first = self.id_at(int(self._position[1:][same][0]))
            raise SchemaError(f"the samples table holds sample {first} more than once", "ingest it again")

    def positions(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """Position of every id, -1 for ids that are not there; shape (n,)."""
        found = np.full(len(sample_ids), -1, np.int64)
        keys = _digests(sample_ids)
        first = np.searchsorted(self._high, keys[:, 0], side="left")
        last = np.searchsorted(self._high, keys[:, 0], side="right")
        for i in np.flatnonzero(first < last):
            span = slice(first[i], last[i])
            hits = np.flatnonzero(self._low[span] == keys[i, 1])
            if len(hits):
                found[i] = self._position[span][hits[0]]
        return found

    def id_at(self, position: int) -> str:
        """The sample id at a position."""
        row = next(iter(self.rows(np.array([position]), ("sample_id",)).values()))
        return row.text("sample_id") or ""

    def rows(self, positions: NDArray[np.int64], columns: Sequence[str]) -> dict[int, Row]:
        """Read the samples at these positions, in file order; only they stay in memory."""
        wanted = np.unique(positions[positions >= 0])
        part_of = np.searchsorted(self._starts, wanted, side="right") - 1
        cuts = np.flatnonzero((np.diff(wanted) > _NEAR_ROWS) | (np.diff(part_of) != 0)) + 1
        found: dict[int, Row] = {}
        for span, part in zip(np.split(wanted, cuts), np.split(part_of, cuts), strict=True):
            if len(span):
                found.update(self._read_span(span, int(part[0]), columns))
        return found

    def _read_span(self, span: NDArray[np.int64], part: int, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        offset = int(self._starts[part])
        position, stop = int(span[0]), int(span[-1]) + 1
        for batch in tables.batches(self._parts[part].uri, "samples", columns, position - offset, stop - offset):
            inside = span[(span >= position) & (span < position + batch.num_rows)]
            picked = batch.take(pa.array(inside - position))
            yield from ((int(p), Row(picked, i)) for i, p in enumerate(inside))
            position += batch.num_rows


def _digests(sample_ids: Sequence[str]) -> NDArray[np.uint64]:
    """128-bit digests as uint64 of shape (n, 2)."""
    data = b"".join(hashlib.blake2b(s.encode(), digest_size=16).digest() for s in sample_ids)
    return np.frombuffer(data, np.uint64).reshape(-1, 2)


def blocks(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer, larger batches of bounded size, for the join."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(b.num_rows for b in waiting) >= _BLOCK_ROWS or sum(b.nbytes for b in waiting) >= _BLOCK_BYTES:
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def zipped(batch: pa.RecordBatch, rows: Iterator[Row]) -> list[Row] | None:
    """The next samples rows, one for each masks row; None when they are not the same samples in the same order."""
    taken = list(islice(rows, batch.num_rows))
    same = [r.text("sample_id") for r in taken] == batch.column("sample_id").to_pylist()
    return taken if same else None


class Join:
    """Masks with their samples, part by part; several threads may share it."""

    def __init__(
        self, samples: Sequence[ObjectInfo], sample_columns: Sequence[str], mask_columns: Sequence[str]
    ) -> None:
        """Remember the parts of the samples table; nothing is read yet."""
        self._samples = list(samples)
        self._sample_columns, self._mask_columns = sample_columns, mask_columns
        self._lock = threading.Lock()
        self._index: SampleIndex | None = None

    def matched(self, item: PlanItem) -> Iterator[tuple[pa.RecordBatch, Sequence[Row | None]]]:
        """Batches of an item's rows of a masks part, each row with its sample; None where the table lacks it."""
        stop = item.row_start + item.rows
        masks = tables.batches(item.uri, "masks", self._mask_columns, item.row_start, stop)
        ranges = source_ranges(item.uri, self._samples, item.row_start)
        if ranges is not None:
            rows = walk(ranges, self._sample_columns)
            for batch in masks:
                together = zipped(batch, rows)
                if together is None:  # the samples were written again in another order
                    yield batch, self._joined(batch)
                    break
                yield batch, together
        for block in blocks(masks):
            yield block, self._joined(block)

    def _joined(self, masks: pa.RecordBatch) -> list[Row | None]:
        with self._lock:
            if self._index is None:
                self._index = SampleIndex(self._samples)
            index = self._index
        positions = index.positions(masks.column("sample_id").to_pylist())
        found = index.rows(positions, self._sample_columns)
        return [found.get(int(p)) for p in positions]
