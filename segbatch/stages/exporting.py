"""Export: rows of a masks table (or of a samples table: its ground truth) as files of somebody else's format."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from segbatch import storage, tables
from segbatch.codecs import columns, rle, runlength
from segbatch.errors import ConfigError, DataError, IncompleteRunError
from segbatch.formats.base import Format, Labels
from segbatch.metrics.base import Row
from segbatch.records import OK, Instance, PlanItem, Segment, VolumeSlice
from segbatch.stages.join import Join

T = TypeVar("T")

_SAMPLE = ("sample_id", "group_id", "split", "image_uri", "height", "width", "attributes", "volume", "status")
_LABELS = ("semantic", "instances", "panoptic", "segments", "label_maps")
_TASK_COLUMN = {"semantic": "semantic", "instance": "instances", "panoptic": "panoptic"}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: rows, files and their bytes; bad rows that were left out; good samples without any row."""

    rows: int
    files: int
    bytes: int
    skipped: int
    lacking: int = 0


class Folder:
    """See ``formats.base.Output``: a folder or bucket prefix that paths cannot leave."""

    def __init__(self, root: str, threads: int) -> None:
        self._root = root
        self._threads = threads
        self._seen: set[str] = set()
        self.files = self.bytes = 0

    def put(self, path: str, data: bytes) -> None:
        """See ``formats.base.Output``."""
        parts = path.split("/")
        if path.startswith("/") or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in parts):
            raise DataError(f"{path!r} is no path below the output", "rename the sample", "bad-path")
        if path in self._seen:
            raise DataError(f"two rows would be written to {path}", "rename one of the samples", "duplicate-path")
        self._seen.add(path)
        storage.replace(storage.join(self._root, path), data)
        self.files, self.bytes = self.files + 1, self.bytes + len(data)

    def map(self, function: Callable[[Labels], T], rows: Iterable[Labels]) -> Iterator[T]:
        """See ``formats.base.Output``."""
        waiting: deque[Future[T]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="export") as pool:
            for row in rows:
                waiting.append(pool.submit(function, row))
                if len(waiting) > 2 * self._threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def export(form: Format, masks: str, samples: str, out: str, threads: int, skip_bad: bool) -> Exported:
    """Write every row of a masks table; with ``masks`` a samples root, its ground truth.

    Raises:
        ConfigError: the tables do not have what the format needs.
        IncompleteRunError: bad rows, and not ``skip_bad``.
        DataError: a row that the format cannot hold.
    """
    source = _Source(form, masks, samples, skip_bad)
    folder = Folder(out, threads)
    form.write(source.rows(), tables.class_table(tables.root_of(samples, "samples")), folder)
    if source.skipped and not source.written:
        raise ConfigError(f"{masks} has no row that format {form.name} can hold", f"the first: {source.first_skipped}")
    return Exported(source.written, folder.files, folder.bytes, source.skipped, source.lacking())


class _Source:
    """The rows to export, in the order of the table."""

    def __init__(self, form: Format, masks: str, samples: str, skip_bad: bool) -> None:
        self._column = _TASK_COLUMN[form.task]
        self._name = form.name
        self._samples = tables.find(samples, "samples")
        self._masks = tables.find(masks, "masks") if tables.has(masks, "masks") else ""
        if not self._masks and tables.find(masks, "samples") != self._samples:
            raise ConfigError(f"{masks} has no masks table", "give masks, or the samples twice for their ground truth")
        self._skip_bad = skip_bad
        self.written = self.skipped = 0
        self.first_skipped = ""

    def rows(self) -> Iterator[Labels]:
        """Good rows, decoded."""
        for labels, sample in self._pairs():
            reason = self._reason(labels, sample)
            if not reason and sample is not None:
                try:
                    found = labels_of(labels, sample, is_truth=not self._masks)
                except ValueError as error:
                    reason = f"its mask is not of the photo's size: {error}"
                else:
                    self.written += 1
                    yield found
                    continue
            self._skip(labels.text("sample_id") or "", reason)

    def _reason(self, labels: Row, sample: Row | None) -> str:
        """Why a row is bad; empty for a good one.

        Raises:
            ConfigError: a prediction of another task.
        """
        if sample is None:
            return "there is no such sample"
        status = next((s for s in (labels.text("status"), sample.text("status")) if s != OK), None)
        if status is not None:
            return status
        if labels.column(self._column)[labels.index].is_valid:
            return ""
        if self._masks:
            raise ConfigError(f"{labels.text('sample_id')} has no {self._column}", f"format {self._name} needs them")
        return f"it has no {self._column}"

    def lacking(self) -> int:
        """Good samples that the masks table has no row for: perhaps they were not selected."""
        if not self._masks:
            return 0
        status = (b.column("status").to_pylist() for b in tables.scan(self._samples, "samples", ("status",)))
        good: int = sum(s == OK for batch in status for s in batch)
        return max(good - self.written - self.skipped, 0)

    def _skip(self, sample_id: str, reason: str) -> None:
        if not self._skip_bad:
            raise IncompleteRunError(f"{sample_id} cannot be exported: {reason}", "mend it, or say --missing skip")
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{sample_id}: {reason}"

    def _pairs(self) -> Iterator[tuple[Row, Row | None]]:
        """Every row with its sample; None where there is none."""
        parts = tables.parts(self._samples)
        if not self._masks:
            for part in parts:
                for batch in tables.batches(part.uri, "samples", [*_SAMPLE, *_LABELS]):
                    yield from ((Row(batch, i), Row(batch, i)) for i in range(batch.num_rows))
            return
        join = Join(parts, _SAMPLE, ("sample_id", "status", *_LABELS))
        for part in tables.parts(self._masks):
            item = PlanItem("", part.uri, part.etag, part.size, tables.count_rows(part.uri, "masks"))
            for batch, samples in join.matched(item):
                yield from ((Row(batch, i), sample) for i, sample in enumerate(samples))


def labels_of(labels: Row, sample: Row, is_truth: bool) -> Labels:
    """A row of masks (or samples) with its sample, decoded.

    Raises:
        ValueError: a map or mask is not of the sample's size.
    """
    height, width = sample.number("height") or 0, sample.number("width") or 0
    maps = columns.label_maps_at(labels.column("label_maps"), labels.index)
    segments = _value(labels, "segments")
    instances = _value(labels, "instances")
    volume = _value(sample, "volume")
    semantic = columns.runs_at(labels.column("semantic"), labels.index)
    panoptic = columns.runs_at(labels.column("panoptic"), labels.index)
    for instance in instances or ():
        rle.check(instance["counts"], height, width)
    return Labels(
        sample_id=sample.text("sample_id") or "",
        image_uri=sample.text("image_uri") or "",
        height=height,
        width=width,
        group_id=sample.text("group_id") or "",
        split=sample.text("split") or "",
        attributes=json.loads(sample.text("attributes") or "{}"),
        semantic=None if semantic is None else runlength.decode(semantic, (height, width)),
        instances=None if instances is None else tuple(_instance(i) for i in instances),
        panoptic=None if panoptic is None else runlength.decode(panoptic, (height, width)),
        segments=None if segments is None else tuple(_segment(s) for s in segments),
        label_maps={name: runlength.decode(m, (height, width)) for name, m in maps.items()},
        volume=None if volume is None else _volume(volume),
        is_truth=is_truth,
    )


def _value(row: Row, name: str) -> Any:
    return row.column(name)[row.index].as_py()


def _instance(entry: dict[str, Any]) -> Instance:
    return Instance(**{"score": None, **entry, "bbox_xywh": tuple(entry["bbox_xywh"])})


def _segment(entry: dict[str, Any]) -> Segment:
    return Segment(**{**entry, "bbox_xywh": tuple(entry["bbox_xywh"])})


def _volume(entry: dict[str, Any]) -> VolumeSlice:
    return VolumeSlice(**{**entry, "spacing_mm": tuple(entry["spacing_mm"]), "affine": tuple(entry["affine"])})
