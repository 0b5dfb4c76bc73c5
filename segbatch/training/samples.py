"""Photos and labels of a samples table, by random access, decoded ones kept while there is room."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.codecs import photo
from segbatch.config import digest_of
from segbatch.errors import ConfigError, DataError
from segbatch.records import OK, Task
from segbatch.training.truth import VOID, Labelled, Truth

__all__ = ["VOID", "Labelled", "SampleSet"]

_INDEX = ("sample_id", "split", "etag", "status", "height", "width", "exif_orientation")
_CONTENT = ("sample_id", "image", "image_uri", "height", "width", "exif_orientation")
_LABELLED: dict[Task, tuple[str, str]] = {
    "semantic": ("class_pixels", "class_pixels"),
    "instance": ("instances", "instances.list.element.id"),
    "panoptic": ("segments", "segments.list.element.id"),
}
"""A column that is null where the task has no labels, and how little of it tells that."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sample lies, and its upright size."""

    sample_id: str
    etag: str
    part: str
    row: int
    height: int
    width: int


class SampleSet:
    """The ok rows of a samples table.

    Args:
        root: samples table, or the root that holds it.
        split: only this split; all when empty.
        cache_mb: decoded photos and labels kept, in MB.
        task: which labels are read.
        with_things: semantic: read the instances as well, where the table has them.

    Attributes:
        table: all classes of the samples.
        classes: those that are learned, see ``Truth``.
        pixels: pixels of each class; zero where the task is not semantic.
        pixels_where_present: scored pixels of the photos that show the class; likewise.

    Raises:
        ConfigError: no such table, no class table, no class to learn, no such split, no row to use.
        DataError: a row that is ok but has no labels of the task.
    """

    def __init__(
        self, root: str, split: str, cache_mb: int, task: Task = "semantic", with_things: bool = False
    ) -> None:
        self.root, self.task = tables.root_of(root, "samples"), task
        self.table = tables.class_table(self.root)
        self._truth = Truth(self.table, task, with_things, root)
        self.classes = self._truth.classes
        self.skipped: Counter[str] = Counter()
        self.pixels = np.zeros(len(self.classes.classes), np.int64)
        self.pixels_where_present = np.zeros(len(self.classes.classes), np.int64)
        self._places: list[_Place] = []
        splits: set[str] = set()
        for part in tables.parts(tables.find(root, "samples")):
            row = 0
            for batch in tables.batches(part.uri, "samples", (*_INDEX, _LABELLED[task][1])):
                splits |= set(batch.column("split").to_pylist())
                self._index(batch, split, (part.uri, row))
                row += batch.num_rows
        if not self._places:
            there = ", ".join(sorted(s for s in splits if s)) or "none"
            what = f"split {split}" if split else "usable row"
            raise ConfigError(f"{root} has no {what} with ok rows", f"splits there: {there}; see its status column")
        self._room = cache_mb << 20
        self._kept: dict[int, Labelled] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def digest(self) -> str:
        """Changes whenever another sample is in the set or one of them has changed."""
        return digest_of([(p.sample_id, p.etag) for p in self._places])

    @property
    def smallest(self) -> tuple[int, int]:
        """Smallest height and smallest width of all photos."""
        return min(p.height for p in self._places), min(p.width for p in self._places)

    def name(self, index: int) -> str:
        """The sample id."""
        return self._places[index].sample_id

    def get(self, index: int) -> Labelled:
        """One photo with its labels; keeps it if there is room. May be called by several threads.

        Raises:
            DataError: the photo or its labels are broken, or their sizes differ.
        """
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        found = self._decode(self.row(index, self._columns))
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._kept[index] = found
        return found

    def row(self, index: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Columns of one sample's row in the table."""
        place = self._places[index]
        return next(tables.batches(place.part, "samples", columns, place.row, place.row + 1, 1))

    def preload(self) -> None:
        """Read the samples in table order, once through each part, until the cache is full."""
        where = {(p.part, p.row): i for i, p in enumerate(self._places)}
        for part in dict.fromkeys(p.part for p in self._places):
            for row, batch in enumerate(tables.batches(part, "samples", self._columns, batch_rows=1)):
                index = where.get((part, row))
                if index is None:
                    continue
                found = self._decode(batch)
                self._room -= found.nbytes
                if self._room < 0:
                    return
                self._kept[index] = found

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*_CONTENT, *self._truth.columns)

    def _index(self, batch: pa.RecordBatch, split: str, first: tuple[str, int]) -> None:
        """Note where the ok rows of a batch lie and which classes they show."""
        for row, entry in enumerate(batch.to_pylist()):
            if split and entry["split"] != split:
                continue
            if entry["status"] != OK:
                self.skipped[entry["status"]] += 1
                continue
            labels = entry[_LABELLED[self.task][0]]
            self._truth.check_labelled(entry["sample_id"], labels is not None)
            if self.task == "semantic":
                self._count(labels)
            size = entry["height"], entry["width"]
            height, width = size[::-1] if (entry["exif_orientation"] or 1) >= 5 else size
            self._places.append(_Place(entry["sample_id"], entry["etag"], first[0], first[1] + row, height, width))

    def _count(self, class_pixels: Sequence[dict[str, Any]]) -> None:
        shown = [(self._truth.index_of(int(e["value"])), int(e["pixels"])) for e in class_pixels]
        scored = sum(n for i, n in shown if i >= 0)
        for index, count in shown:
            if index >= 0:
                self.pixels[index] += count
                self.pixels_where_present[index] += scored

    def _decode(self, batch: pa.RecordBatch) -> Labelled:
        row = batch.select(list(_CONTENT)).to_pylist()[0]
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


def _photo(row: dict[str, Any]) -> tuple[NDArray[np.uint8], photo.PhotoInfo]:
    """The decoded photo of a row, from the table or, where that holds none, from its own place."""
    data = row["image"] if row["image"] is not None else storage.read_bytes(row["image_uri"])
    try:
        return photo.decode(data, row["image_uri"])
    except DataError as error:
        problem = f"sample {row['sample_id']}: {error.problem}"
        raise DataError(problem, "ingest the samples anew", error.code, row["image_uri"]) from error
