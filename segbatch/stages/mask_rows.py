"""Rows of the masks table, whoever makes them: a model, or somebody else's files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from segbatch import schemas
from segbatch.codecs import columns
from segbatch.codecs.runlength import Runs
from segbatch.records import OK, Instance, Segment


@dataclass(frozen=True, slots=True)
class MaskRow:
    """A row of the masks table before it is Arrow: label maps as runs, nulls where a task was not run."""

    sample_id: str
    group_id: str | None
    image_uri: str
    etag: str
    height: int | None = None
    width: int | None = None
    status: str = OK
    error: str | None = None
    semantic: Runs | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: Runs | None = None
    segments: tuple[Segment, ...] | None = None
    class_confidence: Mapping[int, float] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    label_maps: Mapping[str, Runs] = field(default_factory=dict)
    confidence: bytes | None = None
    """Of label maps, as a grey PNG of the image's size: probability times 255."""


def masks_batch(rows: Sequence[MaskRow], digest: str) -> pa.RecordBatch:
    """Rows as a record batch of ``schemas.MASKS``; ``digest`` says what made them."""
    cells: dict[str, Any] = {
        "sample_id": [r.sample_id for r in rows],
        "group_id": [r.group_id for r in rows],
        "image_uri": [r.image_uri for r in rows],
        "etag": [r.etag for r in rows],
        "height": [r.height for r in rows],
        "width": [r.width for r in rows],
        "status": [r.status for r in rows],
        "error": [r.error for r in rows],
        "semantic": columns.runs_array([r.semantic for r in rows]),
        "class_pixels": columns.class_pixels_array([r.semantic for r in rows]),
        "instances": [instance_cells(r.instances) for r in rows],
        "panoptic": columns.panoptic_array([r.panoptic for r in rows]),
        "segments": [segment_cells(r.segments) for r in rows],
        "confidence": [
            None if r.confidence is None else {"height": r.height, "width": r.width, "png": r.confidence} for r in rows
        ],
        "class_confidence": [_confidence(r.class_confidence) for r in rows],
        "model_digest": [digest] * len(rows),
        **{f"seconds_{s}": [r.seconds.get(s) for r in rows] for s in ("decode", "model", "encode")},
        "label_maps": columns.label_maps_array([r.label_maps for r in rows]),
    }
    return batch_of(cells, schemas.MASKS, len(rows))


def batch_of(cells: Mapping[str, Any], schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Columns of Arrow arrays or Python values as a record batch; columns that are left out are null."""
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c if c is not None else [None] * rows, f.type)
        for f in schema
        for c in [cells.get(f.name)]
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def instance_cells(instances: Sequence[Instance] | None) -> list[dict[str, Any]] | None:
    """Instances as a cell of a table; ``score`` only where the schema has it."""
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
            "score": 1.0 if i.score is None else i.score,
        }
        for i in instances
    ]


def segment_cells(segments: Sequence[Segment] | None) -> list[dict[str, Any]] | None:
    """Segments as a cell of a table."""
    if segments is None:
        return None
    return [
        {"id": s.id, "category_id": s.category_id, "area": s.area, "bbox_xywh": s.bbox_xywh, "iscrowd": s.iscrowd}
        for s in segments
    ]


def _confidence(means: Mapping[int, float] | None) -> list[dict[str, float]] | None:
    return None if means is None else [{"value": k, "mean": v} for k, v in sorted(means.items())]
