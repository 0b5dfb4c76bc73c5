"""Photos, or CT slices with their neighbours, and labels of single rows of a samples table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.codecs import photo
from segbatch.errors import DataError
from segbatch.inference import volumes
from segbatch.training.truth import Labelled, Truth

_ROW = ["sample_id", "image_uri", "height", "width", "exif_orientation"]
_PHOTO = ["image", *_ROW]
_SLICE = list(dict.fromkeys(name.partition(".")[0] for name in volumes.COLUMNS))
"""The columns that ``volumes.COLUMNS`` are parts of."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies, and its upright size."""

    sample_id: str
    etag: str
    part: str
    row: int
    height: int
    width: int


class Content(Protocol):
    """What the samples of a table look like, read by random access. ``get`` may be called by several threads."""

    def get(self, place: Place) -> Labelled:
        """A sample; what is read is kept if there is room.

        Raises:
            DataError: it is broken or not there, its labels are, or their sizes differ.
        """
        ...

    def preload(self, places: Iterable[Place]) -> None:
        """Read the samples in table order, once through each part, until the cache is full."""
        ...


class Photos:
    """Photos, kept decoded.

    Args:
        truth: reads the labels.
        room: bytes that may be kept.
    """

    def __init__(self, truth: Truth, room: int) -> None:
        self._truth = truth
        self._room = room
        self._columns = (*_PHOTO, *truth.columns)
        self._kept: dict[tuple[str, int], Labelled] = {}

    def get(self, place: Place) -> Labelled:
        """One upright photo; see ``Content``."""
        key = place.part, place.row
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        found = self._decode(next(tables.batches(place.part, "samples", self._columns, place.row, place.row + 1, 1)))
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._kept[key] = found
        return found

    def preload(self, places: Iterable[Place]) -> None:
        """See ``Content``."""
        for part, rows in _by_part(places, 0).items():
            for row, batch in enumerate(tables.batches(part, "samples", self._columns, batch_rows=1)):
                if row not in rows:
                    continue
                found = self._decode(batch)
                self._room -= found.nbytes
                if self._room < 0:
                    return
                self._kept[part, row] = found

    def _decode(self, batch: pa.RecordBatch) -> Labelled:
        row = batch.select(_PHOTO).to_pylist()[0]
        rgb, found = _photo(row)
        size = row["height"], row["width"]
        if rgb.shape[:2] != size:
            raise DataError(
                f"sample {row['sample_id']}: photo {found.width}x{found.height}, table {size[1]}x{size[0]}",
                "photo and label map must have one size; ingest the sample anew",
                "size-mismatch",
                row["image_uri"],
            )
        classes, things = self._truth.read(batch, row, size)
        return Labelled(photo.upright(rgb, row["exif_orientation"] or 1), classes, things)


class Slices:
    """CT slices with their neighbours, which are other rows of the same part; kept as they are stored.

    Decoding the slices of a sample takes milliseconds, and each of them is kept once, not once for each neighbour.

    Args:
        truth: reads the labels.
        room: bytes that may be kept.
        count: slices that the network sees, an odd number.
    """

    def __init__(self, truth: Truth, room: int, count: int) -> None:
        self._truth = truth
        self._room = room
        self._half = count // 2
        self._columns = tuple(dict.fromkeys((*_ROW, *volumes.COLUMNS, *truth.columns)))
        self._kept: dict[tuple[str, int], pa.RecordBatch | None] = {}

    def get(self, place: Place) -> Labelled:
        """One slice with its neighbours; see ``Content``."""
        around = range(place.row - self._half, place.row + self._half + 1)
        batches = self._rows(place.part, around)
        own = batches[self._half]
        window = [_slice(b) for b in batches]
        middle = window[self._half]
        assert own is not None
        row = own.select(_ROW).to_pylist()[0]
        if middle is None:
            problem = f"sample {place.sample_id} has no pixels in the samples table"
            raise DataError(problem, "ingest the volume again", "missing-image", row["image_uri"])
        try:
            image = volumes.stack(volumes.with_neighbours(middle, window), row["image_uri"])
        except DataError as error:
            raise _named(error, row) from error
        return Labelled(image, *self._truth.read(own, row, (middle.height, middle.width)))

    def preload(self, places: Iterable[Place]) -> None:
        """See ``Content``."""
        for part, rows in _by_part(places, self._half).items():
            for row, batch in enumerate(tables.batches(part, "samples", self._columns, batch_rows=1)):
                if row in rows and not self._keep((part, row), batch):
                    return

    def _rows(self, part: str, around: range) -> list[pa.RecordBatch | None]:
        """The rows, None for those that the part does not have; what is not kept is read in one go."""
        found = {r: self._kept[part, r] for r in around if (part, r) in self._kept}
        missing = [r for r in around if r >= 0 and r not in found]
        if missing:
            read = tables.batches(part, "samples", self._columns, missing[0], missing[-1] + 1, 1)
            found |= dict(enumerate(read, missing[0]))
            for row in missing:
                self._keep((part, row), found.get(row))
        return [found.get(r) for r in around]

    def _keep(self, key: tuple[str, int], batch: pa.RecordBatch | None) -> bool:
        """Keep a row, or that there is none, if there is room for it."""
        needed = 0 if batch is None or key in self._kept else batch.nbytes
        if needed > self._room:
            return False
        self._room -= needed
        self._kept[key] = batch
        return True


def _by_part(places: Iterable[Place], half: int) -> Mapping[str, set[int]]:
    """The rows of each part that the samples and ``half`` neighbours on both sides take up."""
    rows: dict[str, set[int]] = {}
    for place in places:
        rows.setdefault(place.part, set()).update(range(place.row - half, place.row + half + 1))
    return rows


def _slice(batch: pa.RecordBatch | None) -> volumes.Slice | None:
    return None if batch is None else volumes.slice_of(batch.select(_SLICE).to_pylist()[0])


def _photo(row: dict[str, Any]) -> tuple[NDArray[np.uint8], photo.PhotoInfo]:
    """The decoded photo of a row, from the table or, where that holds none, from its own place."""
    data = row["image"] if row["image"] is not None else storage.read_bytes(row["image_uri"])
    try:
        return photo.decode(data, row["image_uri"])
    except DataError as error:
        raise _named(error, row) from error


def _named(error: DataError, row: Mapping[str, Any]) -> DataError:
    """The same error, naming the sample."""
    problem = f"sample {row['sample_id']}: {error.problem}"
    return DataError(problem, "ingest the samples anew", error.code, row["image_uri"])
