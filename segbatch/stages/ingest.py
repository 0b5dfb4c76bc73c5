"""Ingest: read a dataset's samples and write them as rows of the samples table, original bytes untouched."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.codecs.runlength import Runs
from segbatch.datasets import reading, registry
from segbatch.datasets.base import Dataset
from segbatch.errors import DataError, StorageError
from segbatch.records import OK, Instance, Issue, PlanItem, Sample, Segment, VolumeSlice
from segbatch.runs import Journal
from segbatch.stages.items import QUARANTINED, UNREADABLE, ItemWorker
from segbatch.stages.mask_rows import batch_of, instance_cells, segment_cells


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the samples table before it is Arrow: as ``Sample``, with label maps as runs, nulls where bad."""

    sample_id: str
    item: PlanItem
    status: str = OK
    image: bytes | None = None
    image_format: str | None = None
    height: int | None = None
    width: int | None = None
    channels: int | None = None
    exif_orientation: int | None = None
    semantic: Runs | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: Runs | None = None
    segments: tuple[Segment, ...] | None = None
    label_maps: Mapping[str, Runs] | None = None
    volume: VolumeSlice | None = None
    attributes: Mapping[str, Any] | None = None
    issues: tuple[Issue, ...] = ()


def row_of(item: PlanItem, sample: Sample) -> Row:
    """The row of a sample that could be read.

    Raises:
        DataError: ``size-mismatch``: a label map does not lie on the photo's grid; ``bad-panoptic``: a panoptic map
            with more values than segments.
    """
    _check_grid(sample, item.uri)
    return Row(
        sample_id=sample.sample_id,
        item=item,
        image=sample.image,
        image_format=sample.image_format,
        height=sample.height,
        width=sample.width,
        channels=sample.channels,
        exif_orientation=sample.exif_orientation,
        semantic=_runs(sample.semantic),
        instances=sample.instances,
        panoptic=_runs(sample.panoptic),
        segments=sample.segments,
        label_maps={name: runlength.encode(m) for name, m in sample.label_maps.items()},
        volume=sample.volume,
        attributes=sample.attributes,
        issues=sample.issues,
    )


def _runs(label_map: NDArray[Any] | None) -> Runs | None:
    return None if label_map is None else runlength.encode(label_map)


def _check_grid(sample: Sample, uri: str) -> None:
    size = (sample.height, sample.width)
    maps: dict[str, NDArray[Any] | None] = {
        "label map": sample.semantic,
        "panoptic map": sample.panoptic,
        **sample.label_maps,
    }
    for name, found in maps.items():
        if found is not None and found.shape != size:
            problem = f"{sample.sample_id}: the {name} is {found.shape}, the photo {size} (height, width)"
            raise DataError(problem, "make the label map on the photo's own grid", "size-mismatch", uri)
    if sample.panoptic is not None and sample.panoptic.max(initial=0) > len(sample.segments or ()):
        problem = f"{sample.sample_id}: the panoptic map shows more segments than are listed"
        raise DataError(problem, "list every segment", "bad-panoptic", uri)


def bad_row(item: PlanItem, error: DataError, index: int = 0) -> Row:
    """The row of a sample that cannot be used, with the reason; a photo that is itself good is kept."""
    row = Row(item.row_id(index), item, error.code, issues=(Issue(error.code, str(error)),))
    if item.rows > 1 or error.code in (QUARANTINED, UNREADABLE):
        return row
    try:
        kept = row_of(item, reading.sample_of(item, *reading.read_photo(item.uri)))
    except (DataError, StorageError) as second:
        if second.retryable:
            raise
        return row  # the photo is at fault too: ``error`` says how
    return replace(kept, status=row.status, attributes=None, issues=row.issues, label_maps=None)


def samples_batch(rows: Sequence[Row], by_reference: bool = False) -> pa.RecordBatch:
    """Rows as one record batch of ``schemas.SAMPLES``.

    Args:
        rows: in order; none gives an empty batch.
        by_reference: leave the ``image`` column null; ``image_uri`` says where the photo is. Slices of volumes, which
            have no address of their own, are kept all the same.
    """
    runs = [r.semantic for r in rows]
    cells: dict[str, Any] = {
        "sample_id": [r.sample_id for r in rows],
        "group_id": [r.item.group_id or None for r in rows],
        "split": [r.item.split or None for r in rows],
        "image": [None if by_reference and r.volume is None else r.image for r in rows],
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
        "instances": [instance_cells(r.instances) for r in rows],
        "panoptic": columns.panoptic_array([r.panoptic for r in rows]),
        "segments": [segment_cells(r.segments) for r in rows],
        "volume": [asdict(r.volume) if r.volume is not None else None for r in rows],
        "attributes": [_json(r.attributes) for r in rows],
        "status": [r.status for r in rows],
        "issues": [_issues(r.issues) for r in rows],
        "label_maps": columns.label_maps_array([r.label_maps for r in rows]),
    }
    return batch_of(cells, schemas.SAMPLES, len(rows))


def _issues(issues: Sequence[Issue]) -> list[dict[str, Any]]:
    return [{"code": i.code, "message": i.message, "annotation_id": i.annotation_id} for i in issues]


def _json(attributes: Mapping[str, Any] | None) -> str | None:
    return None if attributes is None else json.dumps(dict(attributes), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True, slots=True)
class IngestTask:
    """The recipe for an ingest worker.

    Attributes:
        dataset_name: name in the registry (never ``auto``: that is resolved when the run is planned).
        by_reference: store where the photos are, not their bytes.
    """

    dataset_name: str
    by_reference: bool = False

    def open(self, threads: int, journal: Journal) -> ItemWorker[Row]:
        """See ``runs.Task``."""
        return ItemWorker(SampleRows(registry.dataset(self.dataset_name), self.by_reference), threads, journal)


class SampleRows:
    """See ``items.Rows``."""

    def __init__(self, source: Dataset, by_reference: bool) -> None:
        self._dataset = source
        self._by_reference = by_reference

    def read(self, item: PlanItem) -> Iterator[Row]:
        """See ``items.Rows``."""
        for sample in self._dataset.read(item):
            yield row_of(item, sample)

    def bad(self, item: PlanItem, error: DataError, index: int) -> Row:
        """See ``items.Rows``."""
        return bad_row(item, error, index)

    def batch(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """See ``items.Rows``."""
        return samples_batch(rows, self._by_reference)

    def weight(self, row: Row) -> int:
        """See ``items.Rows``."""
        maps = [row.semantic, row.panoptic, *(row.label_maps or {}).values()]
        runs = sum(m.values.nbytes + m.lengths.nbytes for m in maps if m is not None)
        return len(row.image or b"") + runs + sum(len(i.counts) for i in row.instances or ())
