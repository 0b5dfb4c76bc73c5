"""Instances, segments and states of evaluators as views on Arrow columns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.metrics.base import Row


class Instances(NamedTuple):
    """The instances of one image, n of them.

    Attributes:
        ids: int64 of shape (n,).
        category: label ids, int64 of shape (n,).
        boxes: left, top, width, height of each, one after the other, float64 of shape (4 n,).
        area: as the table gives it, float64 of shape (n,).
        crowd: 0 or 1, uint8 of shape (n,).
        text: all masks' COCO counts, one after the other, uint8.
        starts: where each one's begin in ``text``, and where the last one's end, int64 of shape (n + 1,).
        score: float64 of shape (n,); zeros for ground truth.
    """

    ids: NDArray[np.int64]
    category: NDArray[np.int64]
    boxes: NDArray[np.float64]
    area: NDArray[np.float64]
    crowd: NDArray[np.uint8]
    text: NDArray[np.uint8]
    starts: NDArray[np.int64]
    score: NDArray[np.float64]

    def counts(self, place: int) -> bytes:
        """COCO counts of one of them."""
        return self.text[self.starts[place] : self.starts[place + 1]].tobytes()


class Segments(NamedTuple):
    """The entries of ``segments`` of one image, n of them.

    Attributes:
        ids, category: int64 of shape (n,).
        area: as the table gives it, float64 of shape (n,).
        crowd: bool of shape (n,).
    """

    ids: NDArray[np.int64]
    category: NDArray[np.int64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]


_NONE = np.empty(0, np.int64)
NO_INSTANCES = Instances(
    _NONE,
    _NONE,
    np.empty(0),
    np.empty(0),
    np.empty(0, np.uint8),
    np.empty(0, np.uint8),
    np.zeros(1, np.int64),
    np.empty(0),
)
"""Of an image in which nothing was found."""


def instances_of(row: Row) -> Instances:
    """A row's ``instances``, which is not null."""
    items = _items(row, "instances")
    text, starts = _binary(items.field("counts"))
    return Instances(
        ids=_numbers(items, "id"),
        category=_numbers(items, "category_id"),
        boxes=_boxes(items.field("bbox_xywh")),
        area=_numbers(items, "area"),
        crowd=_flags(items, "iscrowd").view(np.uint8),
        text=text,
        starts=starts,
        score=_numbers(items, "score") if items.type.get_field_index("score") >= 0 else np.zeros(len(items)),
    )


def segments_of(row: Row) -> Segments:
    """A row's ``segments``, which is not null."""
    items = _items(row, "segments")
    ids, category, area = (_numbers(items, name) for name in ("id", "category_id", "area"))
    return Segments(ids, category, area, _flags(items, "iscrowd"))


def _items(row: Row, name: str) -> pa.StructArray:
    column = row.column(name)
    start, stop = column.offsets[row.index].as_py(), column.offsets[row.index + 1].as_py()
    return column.values.slice(start, stop - start)


def _numbers(items: pa.StructArray, name: str) -> NDArray[Any]:
    found: NDArray[Any] = items.field(name).to_numpy()
    return found


def _flags(items: pa.StructArray, name: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = items.field(name).to_numpy(zero_copy_only=False)
    return found


def _boxes(array: pa.FixedSizeListArray) -> NDArray[np.float64]:
    """Four numbers an entry; ``flatten`` would look for nulls, of which there are none."""
    found: NDArray[np.float64] = array.values.slice(4 * array.offset, 4 * len(array)).to_numpy()
    return found


def _binary(array: pa.LargeBinaryArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All bytes of the array's buffer, and where those of each entry begin (and the last one's end)."""
    _, offsets, data = array.buffers()
    if offsets is None or not len(array):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    starts = np.frombuffer(offsets, np.int64, len(array) + 1, 8 * array.offset)
    text = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return text[: starts[-1]], starts


# -- columns of the state table --------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """A list column of the state table.

    Attributes:
        fields: of all rows' items, one array for each field of the struct (one in all where the items are none).
        offsets: where each row's begin, and the last one's end.
    """

    fields: list[NDArray[Any]]
    offsets: NDArray[np.int32]

    def row(self, place: int) -> list[NDArray[Any]]:
        """The fields of one row, as views."""
        return [f[self.offsets[place] : self.offsets[place + 1]] for f in self.fields]


def lists_of(batch: pa.RecordBatch, name: str) -> Lists:
    """A column of the state table as views on its buffers."""
    column = batch.column(name)
    parts = column.values.flatten() if pa.types.is_struct(column.values.type) else [column.values]
    return Lists([p.to_numpy(zero_copy_only=True) for p in parts], column.offsets.to_numpy())


def list_array(name: str, fields: Sequence[NDArray[Any]], sizes: Sequence[int | None]) -> pa.ListArray:
    """A column of the state table; the inverse of ``lists_of``.

    Args:
        name: of the column.
        fields: see ``Lists``.
        sizes: how many items each row has; None for null.
    """
    kind = schemas.STATE.field(name).type
    arrays = [pa.array(f) for f in fields]
    items = arrays[0]
    if pa.types.is_struct(kind.value_type):
        items = pa.StructArray.from_arrays(arrays, fields=list(kind.value_type))
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum([s or 0 for s in sizes], out=offsets[1:])
    missing = pa.array([s is None for s in sizes], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind, mask=missing)
