"""What a shard of ``predict`` reads: photos and CT slices, from files or from a samples table, and how they decode."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch import tables
from segbatch.codecs import photo, volume
from segbatch.records import OK, PlanItem

_COLUMNS = ["sample_id", "group_id", "image", "image_format", "image_uri", "etag", "status", "height", "width"]
_VOLUME = ["index", "dtype", "slope", "intercept"]


@dataclass(frozen=True, slots=True)
class Slice:
    """A CT slice as it stands in a samples table: encoded pixels and how to read them."""

    data: bytes
    format: str
    height: int
    width: int
    index: int
    dtype: str
    slope: float
    intercept: float

    def hounsfield(self, uri: str) -> NDArray[np.float32]:
        """Its values (height, width).

        Raises:
            DataError: see ``volume.decode_slice``.
        """
        pixels = volume.decode_slice(self.data, self.format, self.height, self.width, self.dtype, uri)
        return volume.to_hounsfield(pixels, self.slope, self.intercept)


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its bytes, or (None) where to read them; with a ``status`` that is not ok there is none, ``why``.

    Attributes:
        slices: of a CT slice: itself in the middle, its neighbours around it.
    """

    sample_id: str
    group_id: str | None
    uri: str
    etag: str
    data: bytes | None = None
    status: str = OK
    why: str = "rejected at ingest; see the sample's issues"
    slices: tuple[Slice, ...] = ()


def inputs(items: Sequence[PlanItem], slices: int) -> Iterator[Input]:
    """The inputs of a shard in order; a samples table is streamed.

    Args:
        items: of the shard.
        slices: how many neighbouring CT slices the model sees; 0: it reads photos.
    """
    for item in items:
        if item.sample_id:
            found = Input(item.sample_id, None, item.uri, item.etag)
            yield replace(found, status="photo", why="a photo: the model reads CT slices") if slices else found
        elif slices:
            yield from _with_neighbours(item, slices)
        else:
            for batch in tables.batches(item.uri, "samples", [*_COLUMNS, "volume.index"], *_rows(item)):
                yield from map(_photo, batch.to_pylist())


def _rows(item: PlanItem) -> tuple[int, int]:
    return item.row_start, item.row_start + item.rows


def _input(row: Mapping[str, Any]) -> Input:
    return Input(row["sample_id"], row["group_id"], row["image_uri"], row["etag"], row["image"], row["status"])


def _photo(row: Mapping[str, Any]) -> Input:
    """The photo of a samples row."""
    found = _input(row)
    if found.status == OK and row["volume"] is not None:
        return replace(
            found, status="volume", why="a slice of a CT volume; models of CT slices have model.hounsfield set"
        )
    if found.status == OK and row["image_format"] is None:
        return replace(found, status="labels-only", why="its labels were ingested without their photo")
    return found


def _with_neighbours(item: PlanItem, count: int) -> Iterator[Input]:
    """The slices of a range of rows, each with its neighbours; those of other rows of the part are read as well.

    Where a volume ends (or its part), the outermost slice stands for those beyond.
    """
    first, last = _rows(item)
    half = count // 2
    columns = [*_COLUMNS, *(f"volume.{name}" for name in _VOLUME)]
    window: deque[tuple[Input, Slice | None]] = deque(maxlen=count)
    start = max(first - half, 0)
    window.extend([(_NOTHING, None)] * (half - (first - start)))
    rows = _slices(item.uri, columns, start, last + half)
    missing = last + half - start
    for entry in rows:
        missing -= 1
        window.append(entry)
        if len(window) == count:
            yield _middle(window, half)
    for _ in range(missing):
        window.append((_NOTHING, None))
        if len(window) == count:
            yield _middle(window, half)


_NOTHING = Input("", None, "", "")


def _slices(uri: str, columns: Sequence[str], start: int, stop: int) -> Iterator[tuple[Input, Slice | None]]:
    for batch in tables.batches(uri, "samples", columns, start, stop):
        for row in batch.to_pylist():
            yield _input(row), _slice(row)


def _slice(row: Mapping[str, Any]) -> Slice | None:
    at = row["volume"]
    if at is None or row["image"] is None or row["status"] != OK:
        return None
    size = row["height"], row["width"]
    return Slice(row["image"], row["image_format"], *size, at["index"], at["dtype"], at["slope"], at["intercept"])


def _middle(window: Sequence[tuple[Input, Slice | None]], half: int) -> Input:
    """The middle slice with its neighbours."""
    found, own = window[half]
    if own is None:
        if found.status != OK:
            return found
        return replace(found, status="photo", why="a photo, or a slice without pixels: the model reads CT slices")
    near: list[Slice] = [own]
    for step in (-1, 1):
        last = own
        for distance in range(1, half + 1):
            other, there = window[half + step * distance]
            fits = there is not None and other.group_id == found.group_id
            if fits and there is not None and there.index == own.index + step * distance:
                last = there
            near.insert(0, last) if step < 0 else near.append(last)
    return replace(found, slices=tuple(near))


def decoded(item: Input, data: bytes, max_pixels: int) -> tuple[NDArray[Any], int, int, int]:
    """The upright photo (h, w, 3) uint8, or the slices (h, w, slices) float32, and stored height, width, orientation.

    Raises:
        DataError: it is broken or too large.
    """
    if item.slices:
        stack = np.stack([one.hounsfield(item.uri) for one in item.slices], -1)
        return stack, stack.shape[0], stack.shape[1], 1
    rgb, info = photo.decode(data, item.uri, max_pixels)
    return photo.upright(rgb, info.exif_orientation), info.height, info.width, info.exif_orientation
