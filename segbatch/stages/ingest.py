"""Ingest: read a dataset's samples and write them as rows of the samples table, original bytes untouched."""

import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from segbatch import schemas, storage, tables
from segbatch.codecs import columns, photo, runlength
from segbatch.codecs.runlength import Runs
from segbatch.datasets.base import Dataset
from segbatch.datasets.reading import detail_of
from segbatch.datasets.registry import dataset
from segbatch.errors import DataError, SchemaError, StorageError
from segbatch.records import OK, Instance, Issue, Outcome, PlanItem, Sample, Segment, ShardRef
from segbatch.runs import Journal, commit, items_of

QUARANTINED = "quarantined"
"""Status of a sample that killed its process."""

_BATCH_ROWS = 64
_BATCH_BYTES = 32 << 20
_IN_FLIGHT_PER_THREAD = 2


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the samples table before it is Arrow: as ``Sample``, with the label map as runs, nulls where bad."""

    item: PlanItem
    status: str = OK
    group_id: str = ""
    split: str = ""
    image: bytes | None = None
    image_format: str | None = None
    height: int | None = None
    width: int | None = None
    channels: int | None = None
    exif_orientation: int | None = None
    semantic: Runs | None = None
    instances: tuple[Instance, ...] | None = None
    segments: tuple[Segment, ...] | None = None
    attributes: Mapping[str, Any] | None = None
    issues: tuple[Issue, ...] = ()


def row_of(item: PlanItem, sample: Sample) -> Row:
    """The row of a sample that could be read.

    Raises:
        DataError: ``size-mismatch``: the label map does not lie on the photo's grid.
        SchemaError: the dataset gives panoptic maps, which the samples table cannot take yet.
    """
    if sample.panoptic is not None:
        raise SchemaError(f"{item.sample_id}: panoptic label maps cannot be ingested yet", "ingest another task")
    if sample.semantic is not None and sample.semantic.shape != (sample.height, sample.width):
        found, size = sample.semantic.shape, (sample.height, sample.width)
        problem = f"{item.sample_id}: the label map is {found}, the photo {size} (height, width)"
        raise DataError(problem, "make the label map on the photo's own grid", "size-mismatch", item.uri)
    return Row(
        item=item,
        group_id=sample.group_id,
        split=sample.split,
        image=sample.image,
        image_format=sample.image_format,
        height=sample.height,
        width=sample.width,
        channels=sample.channels,
        exif_orientation=sample.exif_orientation,
        semantic=runlength.encode(sample.semantic) if sample.semantic is not None else None,
        instances=sample.instances,
        segments=sample.segments,
        attributes=sample.attributes,
        issues=sample.issues,
    )


def failed_row(item: PlanItem, status: str, message: str) -> Row:
    """A row without content that says why; split and group as planned."""
    detail = detail_of(item)
    return Row(
        item=item,
        status=status,
        group_id=str(detail.get("group", "")),
        split=str(detail.get("split", "")),
        issues=(Issue(status, message),),
    )


def bad_row(item: PlanItem, error: DataError) -> Row:
    """The row of a sample whose labels or photo are bad; a photo that is itself good is kept."""
    row = failed_row(item, error.code, str(error))
    try:
        data = storage.read_bytes(item.uri)
        info = photo.probe(data, item.uri)
    except (DataError, StorageError) as second:
        if second.retryable:
            raise
        return row  # the photo is at fault too: ``error`` says how
    return replace(
        row,
        image=data,
        image_format=info.format,
        height=info.height,
        width=info.width,
        channels=info.channels,
        exif_orientation=info.exif_orientation,
    )


def samples_batch(rows: Sequence[Row], by_reference: bool = False) -> pa.RecordBatch:
    """Rows as one record batch of ``schemas.SAMPLES``.

    Args:
        rows: in order; none gives an empty batch.
        by_reference: leave the ``image`` column null; ``image_uri`` says where the photo is.
    """
    runs = [r.semantic for r in rows]
    cells: dict[str, Any] = {
        "sample_id": [r.item.sample_id for r in rows],
        "group_id": [r.group_id or None for r in rows],
        "split": [r.split or None for r in rows],
        "image": [None if by_reference else r.image for r in rows],
        "image_format": [r.image_format for r in rows],
        "image_uri": [r.item.uri for r in rows],
        "etag": [r.item.etag for r in rows],
        "bytes": [len(r.image) if r.image is not None else None for r in rows],
        "height": [r.height for r in rows],
        "width": [r.width for r in rows],
        "channels": [r.channels for r in rows],
        "exif_orientation": [r.exif_orientation for r in rows],
        "semantic": columns.runs_array(runs),
        "class_pixels": columns.class_pixels_array(runs),
        "instances": [_instances(r.instances) for r in rows],
        "panoptic": [None] * len(rows),
        "segments": [_segments(r.segments) for r in rows],
        "volume": [None] * len(rows),
        "attributes": [_json(r.attributes) for r in rows],
        "status": [r.status for r in rows],
        "issues": [_issues(r.issues) for r in rows],
    }
    arrays = [_array(cells[field.name], field.type) for field in schemas.SAMPLES]
    return pa.RecordBatch.from_arrays(arrays, schema=schemas.SAMPLES)


def _array(cells: Any, kind: pa.DataType) -> pa.Array:
    return cells if isinstance(cells, pa.Array) else pa.array(cells, kind)


def _instances(instances: Sequence[Instance] | None) -> list[dict[str, Any]] | None:
    if instances is None:
        return None
    return [
        {
            "id": i.id,
            "category_id": i.category_id,
            "bbox_xywh": i.bbox_xywh,
            "area": i.area,
            "iscrowd": i.iscrowd,
            "counts": i.counts,
        }
        for i in instances
    ]


def _segments(segments: Sequence[Segment] | None) -> list[dict[str, Any]] | None:
    if segments is None:
        return None
    return [
        {"id": s.id, "category_id": s.category_id, "area": s.area, "bbox_xywh": s.bbox_xywh, "iscrowd": s.iscrowd}
        for s in segments
    ]


def _issues(issues: Sequence[Issue]) -> list[dict[str, Any]]:
    return [{"code": i.code, "message": i.message, "annotation_id": i.annotation_id} for i in issues]


def _json(attributes: Mapping[str, Any] | None) -> str | None:
    return None if attributes is None else json.dumps(dict(attributes), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True, slots=True)
class IngestTask:
    """The recipe for an ingest worker.

    Attributes:
        dataset_name: name in the registry (never ``auto``: that is resolved when the run is planned).
        source: the dataset's root, as given by the user.
        by_reference: store where the photos are, not their bytes.
    """

    dataset_name: str
    source: str
    by_reference: bool = False

    def open(self, threads: int, journal: Journal) -> "IngestWorker":
        """See ``runs.Task``."""
        return IngestWorker(dataset(self.dataset_name), self.by_reference, threads, journal)


class IngestWorker:
    """Reads with ``threads`` threads, a few samples ahead, and writes in plan order. See ``runs.Worker``."""

    def __init__(self, source: Dataset, by_reference: bool, threads: int, journal: Journal) -> None:
        self._dataset = source
        self._by_reference = by_reference
        self._journal = journal
        self._ahead = max(threads, 1) * _IN_FLIGHT_PER_THREAD
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="ingest")
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
        started = time.perf_counter()
        writer = tables.PartWriter(shard.table)
        seconds = {"decode": 0.0, "encode": 0.0}
        items = items_of(shard)
        there = storage.stat(shard.uri) if shard.mode == "retry" else None
        source = self._redone(shard, items, skip) if shard.mode == "retry" else self._fresh(shard, items, skip, seconds)
        for batch in source:
            began = time.perf_counter()
            writer.write(batch)
            seconds["encode"] += time.perf_counter() - began
            with self._lock:
                self._rows_done += batch.num_rows
        basis = there.etag if there is not None else ""
        return commit(shard, writer, {**seconds, "total": time.perf_counter() - started}, basis=basis)

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Read one sample and make its row, without writing; see ``runs.Worker``."""
        for item in items_of(shard):
            if item.sample_id == sample_id:
                samples_batch([self._row(shard, item, {})], self._by_reference)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _fresh(
        self, shard: ShardRef, items: Sequence[PlanItem], skip: Mapping[str, str], seconds: dict[str, float]
    ) -> Iterator[pa.RecordBatch]:
        rows = self._rows(shard, items, skip)
        began = time.perf_counter()
        for group in _grouped(rows):
            read = time.perf_counter()
            batch = samples_batch(group, self._by_reference)
            seconds["decode"] += read - began
            seconds["encode"] += time.perf_counter() - read
            yield batch
            began = time.perf_counter()

    def _redone(self, shard: ShardRef, items: Sequence[PlanItem], skip: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        """The part that is there, its bad rows read again."""
        first = 0
        for batch in tables.batches(shard.uri, shard.table, batch_rows=_BATCH_ROWS):
            status = batch.column("status").to_pylist()
            again = [i for i, s in enumerate(status) if s != OK]
            planned = items[first : first + batch.num_rows]
            first += batch.num_rows
            rows = list(self._rows(shard, [planned[i] for i in again], skip))
            yield _replaced(batch, again, samples_batch(rows, self._by_reference))

    def _rows(self, shard: ShardRef, items: Iterable[PlanItem], skip: Mapping[str, str]) -> Iterator[Row]:
        """Rows in the order of ``items``; never more than a few samples are held."""
        waiting: deque[Future[Row]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(self._row, shard, item, skip))
                if len(waiting) >= self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _row(self, shard: ShardRef, item: PlanItem, skip: Mapping[str, str]) -> Row:
        if item.sample_id in skip:
            return failed_row(item, QUARANTINED, skip[item.sample_id])
        slot = threading.current_thread().name
        self._journal.note(slot, shard.number, [item.sample_id])
        try:
            return row_of(item, self._dataset.read(item))
        except DataError as error:
            return bad_row(item, error)
        except StorageError as error:
            if error.retryable:
                raise
            return failed_row(item, "unreadable", str(error))
        finally:
            self._journal.clear(slot)


def _grouped(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of at most 64 rows that are closed as soon as they hold 32 MB."""
    group: list[Row] = []
    held = 0
    for row in rows:
        group.append(row)
        held += _row_bytes(row)
        if len(group) >= _BATCH_ROWS or held >= _BATCH_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _row_bytes(row: Row) -> int:
    runs = row.semantic
    return len(row.image or b"") + (runs.values.nbytes + runs.lengths.nbytes if runs is not None else 0)


def _replaced(batch: pa.RecordBatch, places: Sequence[int], rows: pa.RecordBatch) -> pa.RecordBatch:
    """``batch`` with the rows at ``places`` replaced by ``rows``, in that order."""
    if not places:
        return batch
    order = list(range(batch.num_rows))
    for i, place in enumerate(places):
        order[place] = batch.num_rows + i
    both = pa.Table.from_batches([batch.cast(rows.schema), rows])
    return both.take(pa.array(order)).combine_chunks().to_batches()[0]
