"""The truth of one photo as a network learns it: class indices, and things as masks within their boxes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.codecs import photo, rle
from segbatch.codecs.columns import runs_at
from segbatch.codecs.runlength import Runs, decode
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, Task

VOID = -1
"""Class index of pixels that are not scored and not learned from."""

_UNKNOWN, _LEFT_OUT = -2, -3
_IDS = 1 << 16

COLUMNS: dict[Task, tuple[str, ...]] = {
    "semantic": ("semantic",),
    "instance": ("instances",),
    "panoptic": ("panoptic", "segments"),
}
"""The columns of the samples table that hold the labels of a task."""

_MISSING = {"semantic": "label map", "instance": "instances", "panoptic": "panoptic map"}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a photo.

    Attributes:
        label: class index.
        iscrowd: a region of many objects, or of a class that is ignored: neither to be found nor background. Its
            ``label`` says nothing in the second case.
        top, left: of its box, pixels of the upright photo.
        mask: bool, as large as the box; every side of it touches the object.
    """

    label: int
    iscrowd: bool
    top: int
    left: int
    mask: NDArray[np.bool_]

    @property
    def area(self) -> int:
        """Pixels."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True, slots=True)
class Labelled:
    """One upright photo, or a CT slice with its neighbours, and its truth.

    Attributes:
        image: (h, w, 3) uint8 RGB; or (h, w, slices) float32 in Hounsfield units, the labelled slice in the middle.
        classes: class indices (h, w) int16, ``VOID`` where there is none; None where the task is instances.
        things: in the order of the table; None where they are not known.
    """

    image: NDArray[Any]
    classes: NDArray[np.int16] | None
    things: tuple[Thing, ...] | None

    @property
    def nbytes(self) -> int:
        """Memory that the pixels take."""
        maps = self.image.nbytes + (0 if self.classes is None else self.classes.nbytes)
        return maps + sum(t.mask.nbytes for t in self.things or ())


class Truth:
    """Reads the labels of a task from rows of the samples table.

    Instance networks learn the classes that are things; panoptic and semantic networks learn all that are scored.

    Args:
        table: class table of the samples.
        task: what is learned.
        with_things: semantic: read the instances as well, where the table has them.
        where: the table's root, for messages.

    Raises:
        ConfigError: no class that could be learned.
    """

    def __init__(self, table: ClassTable, task: Task, with_things: bool, where: str) -> None:
        self.table = table
        self.task = task
        self.classes = ClassTable(tuple(c for c in table.scored if c.isthing or task != "instance"))
        if not table.scored:
            raise ConfigError(f"{where} has no classes", "ingest the dataset with its class table")
        if task != "semantic" and not any(c.isthing for c in self.classes.classes):
            raise ConfigError(
                f"no class of {where} is a thing, so there are no objects to learn",
                "mark the classes that are counted with isthing in the class table",
            )
        self._with_things = with_things
        self._index = {c.label_id: VOID if c.ignore else _LEFT_OUT for c in table.classes}
        self._index |= {c.label_id: i for i, c in enumerate(self.classes.classes)}
        self._things = {c.label_id for c in table.classes if c.isthing}
        self._any_thing = next((i for i, c in enumerate(self.classes.classes) if c.isthing), 0)
        self._by_id = np.full(_IDS, _UNKNOWN, np.int16)
        known = [i for i in self._index if 0 <= i < _IDS]
        self._by_id[known] = [self._index[i] for i in known]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``read`` looks at."""
        return (*COLUMNS[self.task], "instances") if self._with_things else COLUMNS[self.task]

    def check_labelled(self, sample_id: str, found: bool) -> None:
        """Refuse a row without labels of the task.

        Raises:
            DataError: ``missing-label``.
        """
        if not found:
            raise DataError(
                f"sample {sample_id} has no {_MISSING[self.task]}",
                "train on a table whose ok rows are all labelled",
                "missing-label",
            )

    def index_of(self, label_id: int) -> int:
        """Class index; negative for ids that are ignored, unknown or not learned."""
        return self._index.get(label_id, _UNKNOWN)

    def read(
        self, batch: pa.RecordBatch, row: dict[str, Any], size: tuple[int, int]
    ) -> tuple[NDArray[np.int16] | None, tuple[Thing, ...] | None]:
        """Upright class indices and things of a row; each None where the task has none.

        Args:
            batch: the row alone, with ``columns``.
            row: its ``sample_id``, ``image_uri`` and ``exif_orientation``.
            size: (height, width) of the stored photo.

        Raises:
            DataError: ``missing-label``, ``size-mismatch``, ``unknown-id``.
        """
        turn = row["exif_orientation"] or 1
        if self.task == "panoptic":
            return self._panoptic(batch, row, size, turn)
        cell = batch.column("instances")[0].as_py() if "instances" in self.columns else None
        things = None if cell is None else tuple(self._instances(cell, row, size, turn))
        if self.task == "instance":
            self.check_labelled(row["sample_id"], things is not None)
            return None, things
        labels = _map(runs_at(batch.column("semantic"), 0), row, size, "label map")
        classes = self._by_id[labels]
        if classes.min() < VOID:
            self._refuse(np.unique(labels).tolist(), row)
        return np.ascontiguousarray(photo.upright(classes, turn)), things

    def _panoptic(
        self, batch: pa.RecordBatch, row: dict[str, Any], size: tuple[int, int], turn: int
    ) -> tuple[NDArray[np.int16], tuple[Thing, ...]]:
        segments = batch.column("segments")[0].as_py()
        self.check_labelled(row["sample_id"], segments is not None)
        stored = _map(runs_at(batch.column("panoptic"), 0), row, size, "panoptic map")
        if stored.max(initial=0) > len(segments):
            problem = f"sample {row['sample_id']}: its panoptic map shows more than its {len(segments)} segments"
            raise DataError(problem, "ingest the sample anew", "bad-panoptic", row["image_uri"])
        index_map = photo.upright(stored, turn)
        ids = [s["category_id"] for s in segments]
        indices = [self.index_of(i) for i in ids]
        if _UNKNOWN in indices:
            self._refuse(ids, row)
        by_value = np.array([VOID, *indices], np.int16)
        found = rle.instances_of(index_map, background=(0,))
        things = []
        for value, box in zip(found.ids.tolist(), found.boxes_xywh.astype(int).tolist(), strict=True):
            segment = segments[value - 1]
            if segment["category_id"] in self._things:
                left, top, width, height = box
                mask = index_map[top : top + height, left : left + width] == value
                things.append(self._thing(indices[value - 1], segment["iscrowd"], (top, left), mask))
        return np.ascontiguousarray(by_value[index_map]), tuple(things)

    def _instances(
        self, instances: Sequence[dict[str, Any]], row: dict[str, Any], size: tuple[int, int], turn: int
    ) -> Iterator[Thing]:
        """The things among the instances; those of classes that are not learned are left out, empty ones too."""
        indices = [self.index_of(i["category_id"]) for i in instances]
        if _UNKNOWN in indices:
            self._refuse([i["category_id"] for i in instances], row)
        for instance, index in zip(instances, indices, strict=True):
            if index == _LEFT_OUT:
                continue
            try:
                mask = photo.upright(rle.decode(instance["counts"], *size).view(np.uint8), turn).view(np.bool_)
            except ValueError as error:
                problem = f"sample {row['sample_id']}: the mask of instance {instance['id']}: {error}"
                raise DataError(problem, "ingest the sample anew", "size-mismatch", row["image_uri"]) from error
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            if len(rows):
                inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
                yield self._thing(index, instance["iscrowd"], (int(rows[0]), int(columns[0])), inside)

    def _thing(self, index: int, iscrowd: bool, corner: tuple[int, int], mask: NDArray[np.bool_]) -> Thing:
        ignored = index < 0
        return Thing(self._any_thing if ignored else index, iscrowd or ignored, *corner, mask)

    def _refuse(self, ids: Sequence[int], row: dict[str, Any]) -> None:
        unknown = sorted({i for i in ids if self.index_of(i) == _UNKNOWN})
        raise DataError(
            f"sample {row['sample_id']} has label ids {unknown[:5]} that the class table lacks",
            "add them to the class table, as ignored if they are not to be learned",
            "unknown-id",
            row["image_uri"],
        )


def _map(runs: Runs | None, row: dict[str, Any], size: tuple[int, int], what: str) -> NDArray[np.uint16]:
    """The decoded map.

    Raises:
        DataError: ``size-mismatch``.
    """
    labelled = int(runs.lengths.sum(dtype=np.int64)) if runs is not None else 0
    if runs is None or labelled != size[0] * size[1]:
        raise DataError(
            f"sample {row['sample_id']}: {what} of {labelled} pixels, table {size[1]}x{size[0]}",
            "photo and label map must have one size; ingest the sample anew",
            "size-mismatch",
            row["image_uri"],
        )
    found: NDArray[np.uint16] = decode(runs, size)
    return found
