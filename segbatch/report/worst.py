"""The images that scored worst, and pictures of them: photo, ground truth, prediction, errors."""

import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.codecs import columns, photo, rle, runlength
from segbatch.errors import ConfigError, DataError, ObjectMissing, SegbatchError, StorageError
from segbatch.metrics import registry
from segbatch.metrics.base import Row
from segbatch.metrics.columns import instances_of, segments_of
from segbatch.records import OK, ClassTable
from segbatch.report import overlay
from segbatch.report.overlay import Rgb

PANEL_WIDTH = 480

MIN_SCORE = 0.5
"""Detections below this are not drawn."""

_NOTHING = (1 << 16) - 1
"""Stands in label maps of objects and segments where there is none."""

_IMAGE_COLUMNS = ("sample_id", "split", "image_uri", "status", "score", "classes")
_SAMPLE_COLUMNS = ("image", "image_uri", "height", "width", "exif_orientation")
_MASK_COLUMNS = ("height", "width")
_TASK_COLUMNS = {"semantic": ("semantic",), "instances": ("instances",), "panoptic": ("panoptic", "segments")}


@dataclass(frozen=True, slots=True)
class Sources:
    """What an evaluation read: roots of masks and samples, and how it compared them."""

    masks: str
    samples: str
    protocol: str


def document_of(root: str) -> dict[str, Any]:
    """The ``.segbatch/config.json`` of a run root; empty where there is none."""
    try:
        document: dict[str, Any] = json.loads(storage.read_bytes(tables.service(root, "config.json")))
    except ObjectMissing:
        return {}
    return document


def sources_of(metrics_root: str) -> Sources:
    """Where the masks and samples of an evaluation lie, from its recorded configuration.

    Raises:
        ConfigError: the root is not the output of an evaluation.
    """
    document = document_of(metrics_root)
    config = document.get("config", {})
    if document.get("verb") != "evaluate" or not {"masks", "samples", "protocol"} <= set(config):
        raise ConfigError(f"{metrics_root} is not the output of segbatch evaluate", "give the OUT of an evaluation")
    return Sources(str(config["masks"]), str(config["samples"]), str(config["protocol"]))


def task_of(protocol: str) -> str:
    """The column that a protocol scores; ``semantic`` where it is not installed any more."""
    try:
        return str(getattr(registry.metric(protocol), "task_column", "semantic"))
    except ConfigError:
        return "semantic"


@dataclass(frozen=True, slots=True)
class ClassIou:
    """One class of one image: pixels (objects, segments) in the ground truth, those predicted, IoU 0..1.

    The IoU of objects is that of the two sets: found / (found + missed + wrong).
    """

    name: str
    label_id: int
    truth_pixels: int
    predicted_pixels: int
    iou: float


@dataclass(frozen=True, slots=True)
class WorstImage:
    """An image with a low score, 0..1; its protocol says what that is."""

    sample_id: str
    split: str
    image_uri: str
    score: float
    classes: tuple[ClassIou, ...]


@dataclass(frozen=True, slots=True)
class Panels:
    """Pictures of one image, upright, all of one size, RGB; None where the tables or the photo are not there.

    ``notes`` says in words what is missing and why.
    """

    photo: Rgb | None = None
    truth: Rgb | None = None
    predicted: Rgb | None = None
    errors: Rgb | None = None
    notes: tuple[str, ...] = ()


def worst_images(metrics_root: str, n: int = 20) -> list[WorstImage]:
    """The ``n`` images with the lowest scores, worst first, ties by sample id; images without a score are left out.

    Streams the images table; memory in proportion to ``n``.
    """
    found = heapq.nsmallest(n, _scored(storage.resolve(metrics_root)), key=lambda row: (row["score"], row["sample_id"]))
    return [_worst(row) for row in found]


def _scored(root: str) -> Iterator[dict[str, Any]]:
    for batch in tables.scan(root, "images", _IMAGE_COLUMNS):
        for i, (status, score) in enumerate(
            zip(*(batch.column(c).to_pylist() for c in ("status", "score")), strict=True)
        ):
            if status == OK and score is not None:
                yield {"score": score, "sample_id": batch.column("sample_id")[i].as_py(), "batch": batch.slice(i, 1)}


def _worst(row: dict[str, Any]) -> WorstImage:
    (full,) = row["batch"].to_pylist()
    classes = sorted((c for c in full["classes"] or [] if c["iou"] is not None), key=lambda c: float(c["iou"]))
    return WorstImage(
        sample_id=full["sample_id"],
        split=full["split"] or "",
        image_uri=full["image_uri"],
        score=full["score"],
        classes=tuple(
            ClassIou(c["class"], c["label_id"], c["tp"] + c["fn"], c["tp"] + c["fp"], c["iou"]) for c in classes
        ),
    )


def panels_of(metrics_root: str, images: Sequence[WorstImage]) -> Iterator[Panels]:
    """Pictures of these images, one after the other. What cannot be found or read is said in ``notes``."""
    root = storage.resolve(metrics_root)
    ids = {i.sample_id for i in images}
    places = []
    problems = []
    for table, where in _roots(root):
        try:
            places.append(_locate(where, table, ids))
        except SegbatchError as error:
            places.append({})
            problems.append(f"{table}: {error}")
    classes, task = classes_of(root), task_of(sources_of(root).protocol)
    for image in images:
        yield _panels(image.sample_id, places, classes, task, problems)


def _roots(root: str) -> list[tuple[str, str]]:
    sources = sources_of(root)
    return [("samples", sources.samples), ("masks", sources.masks)]


def classes_of(root: str) -> ClassTable:
    """The class table of the metrics root, else of its samples; empty where neither is there."""
    for place in (root, sources_of(root).samples):
        if storage.exists(tables.service(place, "dataset.json")):
            return tables.class_table(place)
    return ClassTable(())


def _locate(root: str, table: str, ids: set[str]) -> dict[str, tuple[str, int]]:
    """Part and row of each sample id, from one pass over the id column; stops when all are found."""
    found: dict[str, tuple[str, int]] = {}
    for part in tables.parts(tables.find(root, table)):
        row = 0
        for batch in tables.batches(part.uri, table, ("sample_id",), batch_rows=4096):
            for i, name in enumerate(batch.column("sample_id").to_pylist(), row):
                if name in ids:
                    found[name] = (part.uri, i)
            row += batch.num_rows
        if len(found) == len(ids):
            break
    return found


def _panels(
    name: str, places: Sequence[dict[str, tuple[str, int]]], classes: ClassTable, task: str, problems: Sequence[str]
) -> Panels:
    if any(name not in place for place in places):
        missing = [t for t, place in zip(("samples", "masks"), places, strict=True) if name not in place]
        return Panels(notes=tuple(problems) or (f"The {' and '.join(missing)} table no longer holds this image.",))
    wanted = _TASK_COLUMNS.get(task, ())
    try:
        sample = _row(places[0][name], "samples", (*_SAMPLE_COLUMNS, *wanted))
        mask = _row(places[1][name], "masks", (*_MASK_COLUMNS, *wanted))
        truth, predicted = (_drawing(row, task) for row in (sample, mask))
    except (SegbatchError, ValueError) as error:
        return Panels(notes=(f"The label maps cannot be read: {error}",))
    if truth is None or predicted is None or truth.labels.shape != predicted.labels.shape:
        return Panels(notes=("The tables have changed since the evaluation: evaluate again.",))
    rgb, note = _photo(sample, truth.labels.shape)
    ignored = (*classes.ignore_ids, _NOTHING) if task == "panoptic" else classes.ignore_ids
    orientation = sample.column("exif_orientation")[0].as_py() or 1
    notes = tuple(n for n in (note, predicted.note) if n)
    return _draw(rgb, (truth, predicted), overlay.palette(classes), ignored, orientation, notes)


def _row(place: tuple[str, int], table: str, wanted: Sequence[str]) -> pa.RecordBatch:
    uri, row = place
    for batch in tables.batches(uri, table, wanted, row, row + 1):
        return batch
    raise DataError(f"row {row} of {uri} is gone", "evaluate again", "changed", uri)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What is drawn of a row: label ids, the objects or segments by number (None: no outlines), what is left out."""

    labels: NDArray[np.uint16]
    parts: NDArray[np.uint16] | None = None
    note: str = ""


def _drawing(row: pa.RecordBatch, task: str) -> _Drawing | None:
    """A row's labels of a task; None where they are not there."""
    shape = (int(row.column("height")[0].as_py()), int(row.column("width")[0].as_py()))
    if task not in _TASK_COLUMNS or not row.column(task).is_valid()[0].as_py():
        return None
    if task == "instances":
        return _objects(row, shape)
    runs = columns.runs_at(row.column(task), 0)
    assert runs is not None
    found = np.asarray(runlength.decode(runs, shape), np.uint16)
    if task == "semantic":
        return _Drawing(found)
    return _Drawing(_labels(found, segments_of(Row(row, 0)).category), found)


def _objects(row: pa.RecordBatch, shape: tuple[int, int]) -> _Drawing:
    """Objects as one map, those with high scores on top, crowds at the bottom."""
    found = instances_of(Row(row, 0))
    is_truth = "image_uri" in row.schema.names
    order = np.lexsort((found.score, 1 - found.crowd.astype(np.int8)))
    shown = [int(i) for i in order if is_truth or found.score[i] >= MIN_SCORE]
    parts = rle.paint([found.counts(i) for i in shown], np.arange(1, len(shown) + 1), *shape, np.uint16)
    left_out = len(order) - len(shown)
    note = f"{left_out} detections with scores below {MIN_SCORE} are not drawn." if left_out else ""
    return _Drawing(_labels(parts, found.category[shown]), parts, note)


def _labels(parts: NDArray[np.uint16], category: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Label ids for a map of the places in ``category``, counted from 1."""
    return np.concatenate([[_NOTHING], category]).astype(np.uint16)[parts]


def _photo(row: pa.RecordBatch, shape: tuple[int, ...]) -> tuple[Rgb | None, str]:
    """The photo on its stored grid, and why there is none."""
    uri = str(row.column("image_uri")[0].as_py())
    try:
        data = row.column("image")[0].as_py()
        rgb, _ = photo.decode(data if data is not None else storage.read_bytes(storage.resolve(uri)), uri)
    except (DataError, StorageError) as error:
        return None, f"The photo cannot be shown: {error}"
    if rgb.shape[:2] != shape:
        return None, "The photo cannot be shown: it has another size than its label map."
    return rgb, ""


def _draw(
    rgb: Rgb | None,
    drawings: tuple[_Drawing, _Drawing],
    colors: Rgb,
    ignored: tuple[int, ...],
    orientation: int,
    notes: tuple[str, ...],
) -> Panels:
    truth, predicted = drawings

    def finished(picture: Rgb) -> Rgb:
        return overlay.shrink(photo.upright(picture, orientation), PANEL_WIDTH)

    def colored(drawing: _Drawing) -> Rgb:
        picture = overlay.blend(rgb, overlay.colorize(drawing.labels, colors))
        if drawing.parts is None:
            return finished(picture)
        nothing = drawing.labels == _NOTHING
        picture[nothing] = overlay.pale(rgb, nothing.shape)[nothing]
        return finished(overlay.outlined(picture, drawing.parts))

    return Panels(
        photo=finished(rgb) if rgb is not None else None,
        truth=colored(truth),
        predicted=colored(predicted),
        errors=finished(overlay.error_map(rgb, truth.labels, predicted.labels, ignored)),
        notes=notes,
    )


def worst_overlay_jpeg(metrics_root: str, image: WorstImage) -> bytes | None:
    """Photo, ground truth, prediction and errors side by side as one JPEG; None when nothing can be drawn."""
    return _strip(metrics_root, image, overlay.encode_jpeg)


def worst_overlay_png(metrics_root: str, image: WorstImage) -> bytes | None:
    """Like ``worst_overlay_jpeg``, as PNG."""
    return _strip(metrics_root, image, overlay.encode_png)


def _strip(metrics_root: str, image: WorstImage, encode: Callable[[Rgb], bytes]) -> bytes | None:
    (panels,) = panels_of(metrics_root, [image])
    pictures = [p for p in (panels.photo, panels.truth, panels.predicted, panels.errors) if p is not None]
    return encode(overlay.side_by_side(pictures)) if pictures else None
