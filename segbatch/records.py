"""Frozen records that cross layers. Only these, plain numbers and strings travel between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Task = Literal["semantic", "instance", "panoptic"]

OK = "ok"
"""Status of a good row; any other status names the reason (see ``DataError.code``)."""


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One class of a dataset's own class table.

    Attributes:
        label_id: the dataset's own id as it stands in its label maps.
        name: the official name.
        color: official RGB colour, 0..255, or None where the dataset has none.
        isthing: countable objects (COCO's ``isthing``).
        ignore: void: never scored.
        train_id: the dataset's official training id, where it has one.
        supercategory: the parent in the official hierarchy.
    """

    label_id: int
    name: str
    color: tuple[int, int, int] | None = None
    isthing: bool = False
    ignore: bool = False
    train_id: int | None = None
    supercategory: str = ""


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of a dataset or model, in their official order, void classes included."""

    classes: tuple[ClassInfo, ...]

    @property
    def scored(self) -> tuple[ClassInfo, ...]:
        """The classes that count, without void, in order."""
        return tuple(c for c in self.classes if not c.ignore)

    @property
    def ignore_ids(self) -> tuple[int, ...]:
        """Label ids that are never scored."""
        return tuple(c.label_id for c in self.classes if c.ignore)

    def name_of(self, label_id: int) -> str:
        """Name of a label id; ids that the table lacks are named by their number."""
        return next((c.name for c in self.classes if c.label_id == label_id), str(label_id))

    def to_json(self) -> list[dict[str, Any]]:
        """The form kept in ``.segbatch/dataset.json`` and in model files."""
        return [
            {
                "label_id": c.label_id,
                "name": c.name,
                "color": list(c.color) if c.color else None,
                "isthing": c.isthing,
                "ignore": c.ignore,
                "train_id": c.train_id,
                "supercategory": c.supercategory,
            }
            for c in self.classes
        ]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> "ClassTable":
        """Inverse of ``to_json``."""
        return cls(tuple(ClassInfo(**{**r, "color": tuple(r["color"]) if r.get("color") else None}) for r in rows))


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One planned input: an image file, or a range of rows of a samples Parquet file.

    Attributes:
        sample_id: the official id, else the path below the input's root; empty for a range of rows.
        uri: the file that is read.
        etag: the store's etag, else size and mtime; another etag means the item has changed.
        bytes: size to read, the measure of work.
        rows: output rows that come of it: 1 for an image, the slices of a volume.
        row_start: first row in the Parquet file; 0 for an image.
        detail: what the dataset needs to read it (label URIs, annotations), as JSON.
        group_id: what must stay together: a volume, a video.
        split: the official split, or the one that ``--split-by`` gave.
    """

    sample_id: str
    uri: str
    etag: str
    bytes: int
    rows: int = 1
    row_start: int = 0
    detail: str = ""
    group_id: str = ""
    split: str = ""

    def row_id(self, index: int) -> str:
        """Sample id of an output row: the item's own, or that of a volume's slice ``index``."""
        return self.sample_id if self.rows == 1 else f"{self.sample_id}/{index:04d}"


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A unit of work and of retry: rows ``[start, stop)`` of a plan part; its result is one file ``key``.

    Attributes:
        root: the run root (URI).
        table: the table folder that the result goes to.
        plan: number of the plan.
        number: number of the shard in the whole run.
        key: file name of the result, ``part-<8 digits>-<hash>.parquet``.
        part: URI of the plan part.
        start, stop: rows of the plan part.
        rows: output rows expected.
        bytes: input bytes.
        mode: ``create`` (new), ``rewrite`` (inputs changed) or ``retry`` (redo failed rows, copy the others).
    """

    root: str
    table: str
    plan: int
    number: int
    key: str
    part: str
    start: int
    stop: int
    rows: int
    bytes: int
    mode: Literal["create", "rewrite", "retry"] = "create"

    @property
    def uri(self) -> str:
        """Where the result lies."""
        return f"{self.root}/{self.table}/{self.key}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a shard: small, and the only thing that travels back to the driver.

    Attributes:
        shard: number of the shard.
        plan: number of the plan.
        rows: rows in the result file.
        bad: rows whose status is not ok.
        reasons: bad rows by status.
        issues: complaints about annotations of rows that are good all the same, by code.
        copied: good rows that were taken over from the result that was there.
        bytes_out: size of the result file.
        seconds: by stage, over all threads (``read``, ``decode``, ``model``, ``count``, ``encode``, ``write``), and
            ``total`` wall time.
        committed_by_other: another driver had committed the same shard first.
        etag: version tag of the result file, so that a later overwrite makes this outcome void.
    """

    shard: int
    plan: int
    rows: int
    bad: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    bytes_out: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    committed_by_other: bool = False
    etag: str = ""
    issues: Mapping[str, int] = field(default_factory=dict)
    copied: int = 0


@dataclass(frozen=True, slots=True)
class Issue:
    """One complaint about a sample: row's ``issues`` column."""

    code: str
    message: str
    annotation_id: int | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """One object: COCO's form.

    Attributes:
        id: instance id, > 0 and unique in its image.
        category_id: the dataset's label id.
        bbox_xywh: left, top, width, height in pixels of the stored grid.
        area: pixels (ground truth: the official file's figure).
        iscrowd: COCO's flag.
        counts: COCO compressed RLE of the mask, column-major over (height, width).
        score: confidence 0..1; None for ground truth.
    """

    id: int
    category_id: int
    bbox_xywh: tuple[float, float, float, float]
    area: float
    iscrowd: bool
    counts: bytes
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One panoptic segment with its official id.

    Pixels of the n-th segment of an image (from 0) have the value n + 1 in its panoptic index map; 0 is void.
    """

    id: int
    category_id: int
    area: float
    bbox_xywh: tuple[float, float, float, float]
    iscrowd: bool = False


@dataclass(frozen=True, slots=True)
class VolumeSlice:
    """Where a slice lies in its volume, and what the volume's file needs to be written again.

    Attributes:
        index: 0-based, in the order of the file.
        slices: how many the volume has.
        spacing_mm: voxel size along the three axes of the file.
        affine: 4 x 4 voxel-to-world matrix (mm, RAS+), row-major.
        slope, intercept: physical value = slope * stored + intercept.
        dtype: stored type, numpy's name.
        header: the file's bytes before its voxels.
    """

    index: int
    slices: int
    spacing_mm: tuple[float, float, float]
    affine: tuple[float, ...]
    slope: float
    intercept: float
    dtype: str
    header: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """One image (or CT slice) with every label there is, as read by a dataset.

    Attributes:
        image: the original bytes, untouched; None where a dataset gives labels without their photos.
        image_format: ``jpeg``, ``png``, ``bmp``, ...; None without image, as ``channels``.
        height, width: of the stored pixel grid (before EXIF rotation).
        exif_orientation: 1..8; 1 when there is none.
        semantic: label map of the dataset's own ids, uint8 or uint16 of shape (height, width), or None.
        instances: None when the dataset has no such task; empty when nothing was found.
        panoptic: index map, uint8 or uint16 of shape (height, width): n + 1 for ``segments[n]``, 0 for void; or None.
        segments: what the index map shows; None exactly where ``panoptic`` is.
        label_maps: further label maps by name (ADE20K's parts), uint8 or uint16 of shape (height, width).
        volume: of a CT slice.
        attributes: whatever else the dataset knows, JSON values. What is known of single instances stands under
            ``instances`` by their id as text, of segments under ``segments``.
        issues: complaints about annotations that do not make the sample bad.
    """

    sample_id: str
    image: bytes | None
    image_format: str | None
    image_uri: str
    height: int
    width: int
    channels: int | None
    exif_orientation: int = 1
    semantic: NDArray[np.uint8] | NDArray[np.uint16] | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: NDArray[np.uint8] | NDArray[np.uint16] | None = None
    segments: tuple[Segment, ...] | None = None
    label_maps: Mapping[str, NDArray[np.uint8] | NDArray[np.uint16]] = field(default_factory=dict)
    volume: VolumeSlice | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    issues: tuple[Issue, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one image, on its stored pixel grid (height, width).

    Attributes:
        semantic: label map of label ids, uint16, or None when the model has no such task.
        instances, panoptic, segments: likewise.
        label_maps: further label maps by name (BDD100K's lane directions), uint8 or uint16 of shape (height, width).
        class_confidence: mean probability of the winning class, by label id; None when the model gives none.
        confidence: probability of the winning class at every pixel times 255, uint8; None where it was not asked for.
    """

    semantic: NDArray[np.uint16] | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: NDArray[np.uint16] | None = None
    segments: tuple[Segment, ...] | None = None
    class_confidence: Mapping[int, float] | None = None
    label_maps: Mapping[str, NDArray[np.uint8] | NDArray[np.uint16]] = field(default_factory=dict)
    confidence: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the summary table.

    Attributes:
        metric: name, e.g. ``miou``; an official name only where the figure equals the official evaluator's.
        value: None where it is undefined (an absent class), never 0 instead.
        class_name: the class, or empty for a figure over all classes.
        slice: which part of the data, empty for all.
        support: ground-truth pixels or objects behind the figure.
        ci_low, ci_high: 95 % interval, None where none was computed.
    """

    metric: str
    value: float | None
    class_name: str = ""
    slice: str = ""
    support: int | None = None
    ci_low: float | None = None
    ci_high: float | None = None
