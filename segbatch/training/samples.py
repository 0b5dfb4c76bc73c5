"""Photos and label maps of a samples table, by random access, decoded ones kept while there is room."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.codecs import photo
from segbatch.codecs.columns import runs_at
from segbatch.codecs.runlength import decode
from segbatch.config import digest_of
from segbatch.errors import ConfigError, DataError
from segbatch.records import OK, ClassTable

_INDEX = ("sample_id", "split", "etag", "status", "height", "width", "exif_orientation", "class_pixels")
_CONTENT = ("sample_id", "image", "image_uri", "height", "width", "exif_orientation", "semantic")

VOID = -1
"""Class index of pixels that are not scored and not learned from."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One upright photo (h, w, 3) uint8 and its class indices (h, w) int16, ``VOID`` where there is none."""

    rgb: NDArray[np.uint8]
    classes: NDArray[np.int16]


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
        cache_mb: decoded photos kept, in MB.

    Raises:
        ConfigError: no such table, no class table, no such split, no row to use.
        DataError: a row that is ok but has no label map.
    """

    def __init__(self, root: str, split: str, cache_mb: int) -> None:
        self.table = tables.class_table(tables.root_of(root, "samples"))
        self.classes = ClassTable(self.table.scored)
        if not self.classes.classes:
            raise ConfigError(f"{root} has no classes", "ingest the dataset with its class table")
        self.skipped: Counter[str] = Counter()
        self.pixels = np.zeros(len(self.classes.classes), np.int64)
        self.pixels_where_present = np.zeros(len(self.classes.classes), np.int64)
        self._indices = self._index_table()
        self._places: list[_Place] = []
        splits: set[str] = set()
        for part in tables.parts(tables.find(root, "samples")):
            row = 0
            for batch in tables.batches(part.uri, "samples", _INDEX):
                splits |= set(batch.column("split").to_pylist())
                self._index(batch, split, (part.uri, row))
                row += batch.num_rows
        if not self._places:
            there = ", ".join(sorted(s for s in splits if s)) or "none"
            what = f"split {split}" if split else "usable row"
            raise ConfigError(f"{root} has no {what} with ok rows", f"splits there: {there}; see its status column")
        self._room = cache_mb << 20
        self._kept: dict[int, Pair] = {}

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

    def get(self, index: int) -> Pair:
        """One photo with its classes; keeps it if there is room. May be called by several threads.

        Raises:
            DataError: the photo or the label map is broken, or their sizes differ.
        """
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        place = self._places[index]
        batch = next(tables.batches(place.part, "samples", _CONTENT, place.row, place.row + 1, 1))
        pair = self._decode(batch)
        size = pair.rgb.nbytes + pair.classes.nbytes
        if size <= self._room:
            self._room -= size
            self._kept[index] = pair
        return pair

    def preload(self) -> None:
        """Read the samples in table order, once through each part, until the cache is full."""
        where = {(p.part, p.row): i for i, p in enumerate(self._places)}
        for part in dict.fromkeys(p.part for p in self._places):
            for row, batch in enumerate(tables.batches(part, "samples", _CONTENT, batch_rows=1)):
                index = where.get((part, row))
                if index is None:
                    continue
                pair = self._decode(batch)
                self._room -= pair.rgb.nbytes + pair.classes.nbytes
                if self._room < 0:
                    return
                self._kept[index] = pair

    def _index_table(self) -> NDArray[np.int32]:
        """Class index of every label id: void for ignored ids, -2 for unknown ones."""
        found = np.full(1 << 16, VOID - 1, np.int32)
        found[list(self.table.ignore_ids)] = VOID
        for index, info in enumerate(self.classes.classes):
            found[info.label_id] = index
        return found

    def _index(self, batch: pa.RecordBatch, split: str, first: tuple[str, int]) -> None:
        """Note where the ok rows of a batch lie and which classes they show."""
        for row, entry in enumerate(batch.to_pylist()):
            if split and entry["split"] != split:
                continue
            if entry["status"] != OK:
                self.skipped[entry["status"]] += 1
                continue
            if entry["class_pixels"] is None:
                raise DataError(
                    f"sample {entry['sample_id']} has no label map",
                    "train on a table whose ok rows are all labelled",
                    "missing-label",
                )
            self._count(entry["class_pixels"])
            size = entry["height"], entry["width"]
            height, width = size[::-1] if (entry["exif_orientation"] or 1) >= 5 else size
            self._places.append(_Place(entry["sample_id"], entry["etag"], first[0], first[1] + row, height, width))

    def _count(self, class_pixels: Sequence[dict[str, Any]]) -> None:
        shown = [(int(self._indices[e["value"]]), int(e["pixels"])) for e in class_pixels]
        scored = sum(n for i, n in shown if i >= 0)
        for index, count in shown:
            if index >= 0:
                self.pixels[index] += count
                self.pixels_where_present[index] += scored

    def _decode(self, batch: pa.RecordBatch) -> Pair:
        row = batch.drop_columns(["semantic"]).to_pylist()[0]
        rgb, found = _photo(row)
        runs = runs_at(batch.column("semantic"), 0)
        size = row["height"], row["width"]
        labelled = int(runs.lengths.sum(dtype=np.int64)) if runs is not None else 0
        if runs is None or rgb.shape[:2] != size or labelled != size[0] * size[1]:
            raise DataError(
                f"sample {row['sample_id']}: photo {found.width}x{found.height}, label map of {labelled} pixels, "
                f"table {size[1]}x{size[0]}",
                "photo and label map must have one size; ingest the sample anew",
                "size-mismatch",
                row["image_uri"],
            )
        classes = self._indices[decode(runs, size)]
        if classes.min() < VOID:
            unknown = sorted(set(np.unique(runs.values).tolist()) - {c.label_id for c in self.table.classes})
            raise DataError(
                f"sample {row['sample_id']} has label ids {unknown[:5]} that the class table lacks",
                "add them to the class table, as ignored if they are not to be learned",
                "unknown-id",
                row["image_uri"],
            )
        turn = row["exif_orientation"] or 1
        return Pair(photo.upright(rgb, turn), np.ascontiguousarray(photo.upright(classes.astype(np.int16), turn)))


def _photo(row: dict[str, Any]) -> tuple[NDArray[np.uint8], photo.PhotoInfo]:
    """The decoded photo of a row, from the table or, where that holds none, from its own place."""
    data = row["image"] if row["image"] is not None else storage.read_bytes(row["image_uri"])
    try:
        return photo.decode(data, row["image_uri"])
    except DataError as error:
        problem = f"sample {row['sample_id']}: {error.problem}"
        raise DataError(problem, "ingest the samples anew", error.code, row["image_uri"]) from error
