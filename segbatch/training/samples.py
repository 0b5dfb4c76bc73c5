"""The samples of a table to train or to validate on, by random access; what is read is kept while there is room."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from segbatch import tables
from segbatch.config import digest_of
from segbatch.errors import ConfigError
from segbatch.records import OK, Task
from segbatch.training.content import Content, Photos, Place, Slices
from segbatch.training.truth import VOID, Labelled, Truth

__all__ = ["VOID", "Labelled", "SampleSet"]

_INDEX = ("sample_id", "split", "etag", "status", "height", "width", "exif_orientation", "volume.index")
_LABELLED: dict[Task, tuple[str, str]] = {
    "semantic": ("class_pixels", "class_pixels"),
    "instance": ("instances", "instances.list.element.id"),
    "panoptic": ("segments", "segments.list.element.id"),
}
"""A column that is null where the task has no labels, and how little of it tells that."""


class SampleSet:
    """The ok rows of a samples table.

    Args:
        root: samples table, or the root that holds it.
        split: only this split; all when empty.
        cache_mb: photos or CT slices, and labels, kept, in MB.
        task: which labels are read.
        with_things: semantic: read the instances as well, where the table has them.
        slices: see ``InputSpec``.

    Attributes:
        table: all classes of the samples.
        classes: those that are learned, see ``Truth``.
        pixels: pixels of each class; zero where the task is not semantic.
        pixels_where_present: scored pixels of the photos that show the class; likewise.

    Raises:
        ConfigError: no such table, no class table, no class to learn, no such split, no row to use; CT slices where
            the network sees photos, or the other way round.
        DataError: a row that is ok but has no labels of the task.
    """

    def __init__(
        self,
        root: str,
        split: str,
        cache_mb: int,
        task: Task = "semantic",
        with_things: bool = False,
        slices: int = 0,
    ) -> None:
        self.root, self.task = tables.root_of(root, "samples"), task
        self._of_volumes = slices > 0
        self.table = tables.class_table(self.root)
        self._truth = Truth(self.table, task, with_things, root)
        self.classes = self._truth.classes
        self.skipped: Counter[str] = Counter()
        self.pixels = np.zeros(len(self.classes.classes), np.int64)
        self.pixels_where_present = np.zeros(len(self.classes.classes), np.int64)
        self._places: list[Place] = []
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
        room = cache_mb << 20
        self._content: Content = Slices(self._truth, room, slices) if slices else Photos(self._truth, room)

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
        """One sample with its labels; keeps it if there is room. May be called by several threads.

        Raises:
            DataError: the photo, the slices or the labels are broken, or their sizes differ.
        """
        return self._content.get(self._places[index])

    def row(self, index: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Columns of one sample's row in the table."""
        place = self._places[index]
        return next(tables.batches(place.part, "samples", columns, place.row, place.row + 1, 1))

    def preload(self) -> None:
        """Read the samples in table order, once through each part, until the cache is full."""
        self._content.preload(self._places)

    def _index(self, batch: pa.RecordBatch, split: str, first: tuple[str, int]) -> None:
        """Note where the ok rows of a batch lie and which classes they show."""
        for row, entry in enumerate(batch.to_pylist()):
            if split and entry["split"] != split:
                continue
            if entry["status"] != OK:
                self.skipped[entry["status"]] += 1
                continue
            self._check_kind(entry)
            labels = entry[_LABELLED[self.task][0]]
            self._truth.check_labelled(entry["sample_id"], labels is not None)
            if self.task == "semantic":
                self._count(labels)
            size = entry["height"], entry["width"]
            height, width = size[::-1] if (entry["exif_orientation"] or 1) >= 5 else size
            self._places.append(Place(entry["sample_id"], entry["etag"], first[0], first[1] + row, height, width))

    def _check_kind(self, entry: Mapping[str, Any]) -> None:
        """Refuse a slice where the network sees photos, and a photo where it sees slices."""
        is_slice = entry["volume"] is not None
        if is_slice and not self._of_volumes:
            raise ConfigError(
                f"{self.root} holds slices of CT volumes ({entry['sample_id']}), and the model sees photos",
                "give a semantic network model.hounsfield, e.g. [-160, 240], and model.channels, how many "
                "neighbouring slices it sees",
            )
        if self._of_volumes and not is_slice:
            raise ConfigError(
                f"{self.root} holds photos ({entry['sample_id']}), and model.hounsfield is for slices of CT volumes",
                "leave model.hounsfield out",
            )

    def _count(self, class_pixels: Sequence[dict[str, Any]]) -> None:
        shown = [(self._truth.index_of(int(e["value"])), int(e["pixels"])) for e in class_pixels]
        scored = sum(n for i, n in shown if i >= 0)
        for index, count in shown:
            if index >= 0:
                self.pixels[index] += count
                self.pixels_where_present[index] += scored
