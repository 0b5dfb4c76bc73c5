"""Predict: one shard of photos through a model into one masks Parquet file.

Reader threads fetch bytes ahead. Each codec thread takes a chunk of photos through decoding, the model and encoding, so
the stages of different chunks overlap. Measured on two cores, this is faster than one model call with all threads:
LiteRT DeepLab 31 images/s instead of 25, U-Net with EfficientNet-Lite0 23 instead of 13. Windows are bounded, so memory
is flat whatever the size of the shard.
"""

import bisect
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas, storage, tables
from segbatch.codecs import png, runlength
from segbatch.codecs.runlength import Runs
from segbatch.config import ExecutionConfig
from segbatch.errors import ConfigError, DataError, ObjectMissing, StorageError
from segbatch.inference.execution import Execution, apply
from segbatch.inference.pipeline import Predictor, Prepared, Raw, auto_batch_size
from segbatch.inference.turning import turn_back
from segbatch.models.registry import ModelSource
from segbatch.records import OK, Outcome, PlanItem, Prediction, ShardRef
from segbatch.runs import Journal, Run, commit, items_of
from segbatch.shards import Shards
from segbatch.stages.allocator import keep_freed_pages
from segbatch.stages.batches import Kind, Room, gathered, in_order
from segbatch.stages.calibrate import Machines, settled
from segbatch.stages.inputs import Decoder, Input, decoded, fed_of, inputs, on_the_photo
from segbatch.stages.mask_rows import MaskRow, masks_batch

log = logging.getLogger(__name__)

_MODEL_ERRORS = (RuntimeError, ValueError, MemoryError, ArithmeticError, LookupError, TypeError, AttributeError)
T = TypeVar("T")

ROWS_PER_BATCH = 64
READERS = 8  # reads in flight: a store answers in tens of milliseconds, a local disk in one
PHOTOS_AHEAD = 32  # whose bytes wait for a codec thread, or two batches if those are more
_CHUNK = 4  # photos that go through the threads together: fewer hand-overs, while little waits
_ONE_SIZE = ("stretch", "letterbox")  # ways of resizing after which all photos have one shape
_SPAN = 32  # batches' worth of photos among which others of the same shape are sought; COCO's sizes fill 4 of 5 places
_WAITING_BYTES = 256 << 20  # of decoded photos that wait for others of their shape


@dataclass(slots=True)
class PhotoRow:
    """One output row in the making; ``prepared`` is dropped as soon as the model has seen it."""

    photo: Input
    status: str = OK
    error: str | None = None
    height: int | None = None
    width: int | None = None
    orientation: int = 1
    data: bytes | None = None
    prepared: Prepared | None = None
    raw: Raw | None = None
    prediction: Prediction | None = None
    semantic: Runs | None = None
    panoptic: Runs | None = None
    confidence: bytes | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def fail(self, status: str, error: str) -> None:
        """Turn into a bad row."""
        self.status, self.error = status, error
        self.data = self.prepared = self.raw = self.prediction = None


def _shape(row: PhotoRow) -> tuple[int, ...] | None:
    """What a batch has in common; None for a row that the model will not see."""
    return None if row.prepared is None else row.prepared.tensor.shape


_KIND: Kind[PhotoRow] = Kind(_shape, lambda row: row.prepared.tensor.nbytes if row.prepared else 0)


@dataclass(frozen=True, slots=True)
class PredictTask:
    """Recipe of a ``PredictWorker``.

    Attributes:
        model: where the model comes from.
        digest: of the model that the run was planned with; another one is refused.
        batch_size: photos per call of the model; 0 picks it.
        max_pixels: larger photos are rejected before decoding.
        wanted: number format and engine, as the user said.
        execution: how the model computes; None: as it is loaded.
    """

    model: ModelSource
    digest: str
    batch_size: int
    max_pixels: int
    wanted: ExecutionConfig = field(default_factory=ExecutionConfig)
    execution: Execution | None = None

    def settled(self, run: Run, todo: Shards, say: Callable[[str], None], machines: Machines) -> "PredictTask":
        """The task with its ``execution``, which is decided once for each run root; see ``stages.calibrate``."""
        if self.execution is not None:
            return self
        decided = settled(run, todo, self.model, self.wanted, self.max_pixels, say, machines)
        return replace(self, execution=decided)

    @property
    def uses_gpu(self) -> bool:
        """Whether the model computes on a GPU."""
        return self.execution is not None and self.execution.device == "cuda"

    def open(self, threads: int, journal: Journal) -> "PredictWorker":
        """Load the model."""
        return PredictWorker(self, threads, journal)


class PredictWorker:
    """Holds the model and the threads; see ``runs.Worker``."""

    def __init__(self, task: PredictTask, threads: int, journal: Journal) -> None:
        keep_freed_pages()
        segmenter = task.model.load(1)
        if segmenter.spec.digest != task.digest:
            raise ConfigError(
                f"model {task.model.reference} has changed since the run began: digest {task.digest} -> "
                f"{segmenter.spec.digest}",
                "choose another output for the new model",
            )
        decided = task.execution or Execution(batch_size=0)
        batch_size = task.batch_size or decided.batch_size or auto_batch_size(segmenter.spec)
        segmenter = apply(segmenter, replace(decided, batch_size=batch_size), threads)
        self._predictor = Predictor(segmenter, batch_size)
        # a pass of several models (``predict_many``) reads these, and gives them all one decoder
        self.slices = segmenter.spec.input.slices
        self.chunk = max(batch_size, _CHUNK)
        self.digest = segmenter.spec.digest
        self._max_pixels = task.max_pixels
        self._fed = fed_of(segmenter.spec.input) if task.wanted.decode == "scaled" else None
        self.decoder: Decoder = decoded
        self._journal = journal
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="codec")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._window = threads + 1
        self._rows_done = 0
        self._count_lock = threading.Lock()
        runlength.class_pixels(runlength.encode(np.zeros((8, 8), np.uint16)))  # compiled before the clock runs

    @property
    def rows_done(self) -> int:
        """Rows finished so far."""
        return self._rows_done

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._readers, self._pool):
            pool.shutdown(cancel_futures=True)

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        """Predict a shard; see ``runs.Worker.run``."""
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        writer = tables.PartWriter("masks")
        items = items_of(shard)
        there = storage.stat(shard.uri) if shard.mode != "create" else None
        copied: list[int] = []
        arguments = shard, inputs(items, self.slices), skip, seconds
        for batch in self._batches(*arguments) if there is None else self._renew(*arguments, copied):
            writer.write(batch)
        seconds["total"] = time.perf_counter() - started
        basis = there.etag if there is not None else ""
        source = {"segbatch.source": source_of(items)}
        return commit(shard, writer, seconds, source, basis, sum(copied))

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Decode, predict and encode one sample, without writing."""
        wanted = (p for p in inputs(items_of(shard), self.slices) if p.sample_id == sample_id)
        for _ in self._batches(shard, wanted, {}, {}):
            continue

    # -- the pipeline ------------------------------------------------------------------------------------------

    def _batches(
        self, shard: ShardRef, photos: Iterable[Input], skip: Mapping[str, str], seconds: dict[str, float]
    ) -> Iterator[pa.RecordBatch]:
        """Rows of ``photos`` in order, as record batches; adds up wall time by stage."""
        pending: list[PhotoRow] = []
        for row in self._rows(shard.number, photos, skip):
            for stage, spent in row.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            pending.append(row)
            if len(pending) >= ROWS_PER_BATCH:
                yield masks_batch(list(map(mask_row, pending)), self.digest)
                pending = []
        if pending:
            yield masks_batch(list(map(mask_row, pending)), self.digest)

    def _rows(self, shard: int, photos: Iterable[Input], skip: Mapping[str, str]) -> Iterator[PhotoRow]:
        """Rows in the order of their photos, which are read ahead and then worked on by codec threads."""
        mixed = self._predictor.batch_size > 1 and self._predictor.spec.input.resize not in _ONE_SIZE
        read = read_ahead(self._readers, partial(self.read, skip=skip), photos, _CHUNK if mixed else self.chunk)
        chunks = (list(itertools.chain.from_iterable(parts)) for parts in read)
        counted = 0
        try:
            for row in (self._in_batches if mixed else self._in_chunks)(shard, chunks):
                self._count(1)
                counted += 1
                yield row
        except BaseException:
            self._count(-counted)  # the shard begins anew
            raise

    def _in_chunks(self, shard: int, chunks: Iterable[list[PhotoRow]]) -> Iterator[PhotoRow]:
        """Each chunk goes through all stages in one codec thread."""
        working = (self._pool.submit(self.work, shard, rows) for rows in chunks)
        for done in ahead(working, self._window):
            yield from done.result()

    def _in_batches(self, shard: int, chunks: Iterable[list[PhotoRow]]) -> Iterator[PhotoRow]:
        """Photos are decoded in chunks, then wait until a batch of one shape is full: photos of many shapes."""
        decoding = (self._pool.submit(self._decode_all, shard, rows) for rows in chunks)
        decoded_rows = itertools.chain.from_iterable(d.result() for d in ahead(decoding, self._window))
        size = self._predictor.batch_size
        batches = gathered(decoded_rows, _KIND, Room(size, _SPAN * size, _WAITING_BYTES))
        working = (self._pool.submit(self._work_numbered, shard, batch) for batch in batches)
        return in_order(done.result() for done in ahead(working, self._window))

    def _decode_all(self, shard: int, rows: list[PhotoRow]) -> list[PhotoRow]:
        """The chunk decoded, in one codec thread."""
        slot = threading.current_thread().name
        self._journal.note(slot, shard, [r.photo.sample_id for r in rows if r.status == OK])
        try:
            for row in rows:
                if row.data is not None:
                    self._decode(row, row.data)
        finally:
            self._journal.clear(slot)
        return rows

    def _work_numbered(self, shard: int, batch: list[tuple[int, PhotoRow]]) -> list[tuple[int, PhotoRow]]:
        self.work(shard, [row for _, row in batch])
        return batch

    def _count(self, rows: int) -> None:
        with self._count_lock:
            self._rows_done += rows

    def read(self, photos: Sequence[Input], skip: Mapping[str, str]) -> list[PhotoRow]:
        """Fetch the bytes, in a reader thread: many wait for a store at once while few decode."""
        rows = [PhotoRow(item) for item in photos]
        for row in rows:
            started = time.perf_counter()
            if row.photo.sample_id in skip:
                row.fail("quarantined", skip[row.photo.sample_id])
            elif row.photo.status != OK:
                row.fail(row.photo.status, row.photo.why)
            else:
                self._read_one(row)
            row.seconds["read"] = time.perf_counter() - started
        return rows

    def _read_one(self, row: PhotoRow) -> None:
        try:
            row.data = row.photo.data if row.photo.data is not None else storage.read_bytes(row.photo.uri)
        except ObjectMissing:
            row.fail("missing", f"{row.photo.uri} was listed but is not there any more")
        except StorageError as error:
            if error.retryable:
                raise
            row.fail("unreadable", str(error))

    def work(self, shard: int, rows: list[PhotoRow]) -> list[PhotoRow]:
        """Decode, predict and encode a chunk in one codec thread, while its pixels are still in the cache."""
        slot = threading.current_thread().name
        self._journal.note(slot, shard, [r.photo.sample_id for r in rows if r.status == OK])
        try:
            self._through(f"model-{slot}", shard, rows)
        finally:
            self._journal.clear(slot)
        return rows

    def _through(self, model_slot: str, shard: int, rows: list[PhotoRow]) -> None:
        for row in rows:
            if row.data is not None:
                self._decode(row, row.data)
        good = [r for r in rows if r.status == OK]
        if good:
            self._journal.note(model_slot, shard, [r.photo.sample_id for r in good])
            try:
                self._predict(good)
            finally:
                self._journal.clear(model_slot)
        for row in rows:
            if row.raw is not None:
                self._encode(row, row.raw)

    def _decode(self, row: PhotoRow, data: bytes) -> None:
        """The upright photo as the model wants it."""
        started = time.perf_counter()
        try:
            image, *stored = self.decoder(row.photo, data, self._max_pixels, self._fed)
            row.height, row.width, row.orientation = stored
            row.prepared = on_the_photo(self._predictor.prepare(image), *stored)
        except DataError as error:
            row.fail(error.code, str(error))
        row.data = None
        row.seconds["decode"] = time.perf_counter() - started

    def _predict(self, rows: list[PhotoRow]) -> None:
        """One call of the model; a failing batch is split until the culprit is alone (out of memory: halved)."""
        started = time.perf_counter()
        try:
            raws = self._predictor.forward([r.prepared for r in rows if r.prepared is not None])
        except _MODEL_ERRORS as error:
            if _is_lost(error):
                log.critical("the GPU's context is lost, this process ends: %s", error)
                os._exit(70)  # only a new process helps, and it is no row's fault
            lines = str(error).strip().splitlines()
            raws, said = None, f"the model raised {type(error).__name__}: {lines[0] if lines else ''}"
        if raws is None:  # out here the traceback does not hold the batch any more
            if len(rows) == 1:
                rows[0].fail("model-error", said)
                return
            half = len(rows) // 2
            self._predict(rows[:half])
            self._predict(rows[half:])
            return
        share = (time.perf_counter() - started) / len(rows)
        for row, raw in zip(rows, raws, strict=True):
            row.raw, row.prepared, row.seconds["model"] = raw, None, share

    def _encode(self, row: PhotoRow, raw: Raw) -> None:
        """The prediction on the stored grid, label maps as runs."""
        started = time.perf_counter()
        try:
            row.prediction = _stored(self._predictor.finish(raw), row)
            row.semantic, row.panoptic = (_runs(m) for m in (row.prediction.semantic, row.prediction.panoptic))
            if row.prediction.confidence is not None:
                row.confidence = png.encode_grey(row.prediction.confidence, 8)
            row.prediction = replace(row.prediction, semantic=None, panoptic=None, confidence=None)
        except DataError as error:
            row.fail(error.code, str(error))
        row.raw = None
        row.seconds["encode"] = time.perf_counter() - started

    # -- rows that are there already --------------------------------------------------------------------------

    def _renew(
        self,
        shard: ShardRef,
        photos: Iterable[Input],
        skip: Mapping[str, str],
        seconds: dict[str, float],
        copied: list[int],
    ) -> Iterator[pa.RecordBatch]:
        """Rows of ``photos`` in order: good rows of the result that is there are copied, the others predicted.

        A retry copies every good row; a rewrite only those whose file is as it was. ``copied`` takes their counts.
        """
        with _Present(shard.uri) as present:
            for is_there, group in itertools.groupby(photos, lambda p: present.position(p, shard.mode) is not None):
                if not is_there:
                    chosen = (_as_it_is(p) if shard.mode == "retry" else p for p in group)
                    yield from self._batches(shard, chosen, skip, seconds)
                    continue
                for chunk in chunks_of(group, ROWS_PER_BATCH):
                    yield present.rows([p for p in (present.position(c, shard.mode) for c in chunk) if p is not None])
                    copied.append(len(chunk))


class _Present:
    """Good rows of a shard's result; a context manager. Rows are asked for in about the order of the file."""

    def __init__(self, uri: str) -> None:
        self._file = tables.open_part(uri, "masks")
        self._positions: dict[tuple[str, str], tuple[int, str]] = {}
        self._group = -1
        self._rows: pa.Table | None = None
        self._first: list[int] = [0]
        for group in range(self._file.num_row_groups):
            self._first.append(self._first[-1] + self._file.metadata.row_group(group).num_rows)
        columns = self._file.read(["sample_id", "image_uri", "etag", "status"], use_threads=False).to_pylist()
        for position, row in enumerate(columns):
            if row["status"] == OK:
                self._positions[row["sample_id"], row["image_uri"]] = (position, row["etag"])

    def __enter__(self) -> "_Present":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def position(self, photo: Input, mode: str) -> int | None:
        """Where the row is that can stand for ``photo``; None when there is none."""
        position, etag = self._positions.get((photo.sample_id, photo.uri), (None, ""))
        return position if mode == "retry" or etag == photo.etag else None

    def rows(self, positions: Sequence[int]) -> pa.RecordBatch:
        """The rows at ``positions``."""
        pieces = []
        for group, members in itertools.groupby(positions, lambda p: bisect.bisect_right(self._first, p) - 1):
            if group != self._group or self._rows is None:
                self._rows = self._file.read_row_group(group, columns=schemas.MASKS.names, use_threads=False)
                self._group = group
            pieces.append(self._rows.take(pa.array([p - self._first[group] for p in members])))
        rows = tables.with_new_columns(pa.concat_tables(pieces), "masks")
        rows = rows.select(schemas.MASKS.names).cast(schemas.MASKS)
        return rows.combine_chunks().to_batches()[0]


def _as_it_is(item: Input) -> Input:
    """The photo with the tag of its file as it is now: it may have been mended since it was planned."""
    if item.data is not None:
        return item
    found = storage.stat(item.uri)
    return item if found is None else replace(item, etag=found.etag)


def _is_lost(error: BaseException) -> bool:
    """Whether a GPU can no longer be used by this process."""
    said = str(error)
    room = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED when calling `cublasCreate")
    return "CUDA error" in said and not any(r in said for r in room)


def _stored(prediction: Prediction, row: PhotoRow) -> Prediction:
    """The prediction turned back onto the photo's stored grid, and its maps checked against it."""
    turned = turn_back(prediction, row.orientation, row.height or 0, row.width or 0)
    for label_map in (turned.semantic, turned.panoptic):
        if label_map is not None and label_map.shape != (row.height, row.width):
            raise DataError(
                f"the model's mask is {label_map.shape[1]}x{label_map.shape[0]}, the photo {row.width}x{row.height}",
                "mend the model's post-processing",
                "size-mismatch",
                row.photo.uri,
            )
    return turned


def _runs(label_map: NDArray[np.uint16] | None) -> Runs | None:
    return None if label_map is None else runlength.encode(label_map)


def ahead(futures: Iterable[Future[T]], window: int) -> Iterator[Future[T]]:
    """The same futures in order, each handed on only when ``window`` more have been started."""
    started: deque[Future[T]] = deque()
    try:
        for future in futures:
            started.append(future)
            if len(started) > window:
                yield started.popleft()
        while started:
            yield started.popleft()
    finally:  # when a shard fails, what it has not begun must not run beside its next attempt
        for future in started:
            future.cancel()


def read_ahead(
    readers: ThreadPoolExecutor, read: Callable[[list[Input]], T], photos: Iterable[Input], size: int
) -> Iterator[list[T]]:
    """What ``read`` gives for photos in order, called for a few at a time, a list for each chunk of ``size`` photos.

    However large the chunks are, all readers have something to do.
    """
    parts = itertools.chain.from_iterable(chunks_of(c, _CHUNK) for c in chunks_of(photos, size))
    reading = (readers.submit(read, part) for part in parts)
    done = (r.result() for r in ahead(reading, max(PHOTOS_AHEAD, 2 * size) // _CHUNK))
    return chunks_of(done, -(-size // _CHUNK))


def chunks_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in order, in lists of ``size``; the last one may be shorter."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def source_of(items: Sequence[PlanItem]) -> str:
    """Footer entry by which evaluation zips masks and samples: the ranges of samples rows, as JSON."""
    import json

    return json.dumps([{"uri": i.uri, "row_start": i.row_start, "rows": i.rows} for i in items if not i.sample_id])


def mask_row(row: PhotoRow) -> MaskRow:
    """The finished row as the table takes it."""
    found = row.prediction or Prediction()
    return MaskRow(
        sample_id=row.photo.sample_id,
        group_id=row.photo.group_id,
        image_uri=row.photo.uri,
        etag=row.photo.etag,
        height=row.height,
        width=row.width,
        status=row.status,
        error=row.error,
        semantic=row.semantic,
        instances=found.instances,
        panoptic=row.panoptic,
        segments=found.segments,
        class_confidence=found.class_confidence,
        confidence=row.confidence,
        seconds=row.seconds,
    )
