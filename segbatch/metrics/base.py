"""What every evaluator is to the rest of segbatch: counts per image, merged in any order, computed once.

``update`` sees one ground-truth row and one prediction row and returns a state; ``columns`` turns states into columns
of the state table and ``states`` reads them back; ``merge`` adds states; ``compute`` makes figures of the total.
States hold integers, which merging adds, or what is known of single objects, which merging puts one after the other. So
any partition of the images, merged in any order, gives the same bits: floats are summed in ``compute`` alone, in class
order or in ``image_order``.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.errors import DataError
from segbatch.records import Figure

if TYPE_CHECKING:
    from segbatch.metrics.image_table import ImageTable

S = TypeVar("S")
State = TypeVar("State", covariant=True)
S_contra = TypeVar("S_contra", contravariant=True)

_NUMBER = re.compile(r"-?[0-9]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a record batch, without copying it."""

    batch: pa.RecordBatch
    index: int

    def column(self, name: str) -> pa.Array:
        """The whole column that the row is part of."""
        return self.batch.column(name)

    def text(self, name: str) -> str | None:
        """The row's value in a string column; None for null."""
        value: str | None = self.batch.column(name)[self.index].as_py()
        return value

    def number(self, name: str) -> int | None:
        """The row's value in an integer column; None for null."""
        value: int | None = self.batch.column(name)[self.index].as_py()
        return value


def texts(rows: Sequence[Row | None], name: str) -> list[str | None]:
    """``Row.text`` of many rows, most of them neighbours; None where there is no row."""
    return _values(rows, lambda batch: batch.column(name).to_pylist())


def present(rows: Sequence[Row | None], name: str) -> list[bool | None]:
    """Whether each row has something in a column; None where there is no row."""
    return _values(rows, lambda batch: batch.column(name).is_valid().to_pylist())


def _values(rows: Sequence[Row | None], of: Callable[[pa.RecordBatch], list[Any]]) -> list[Any]:
    """What ``of`` gives for each row's batch, at the row's place."""
    batches: dict[int, list[Any]] = {}
    found: list[Any] = []
    for row in rows:
        if row is None:
            found.append(None)
            continue
        if id(row.batch) not in batches:
            batches[id(row.batch)] = of(row.batch)
        found.append(batches[id(row.batch)][row.index])
    return found


def same_size(truth: Row, predicted: Row) -> tuple[int, int]:
    """Height and width of an image.

    Raises:
        DataError: ``size-mismatch``: its prediction has other ones.
    """
    sizes = [(row.number("height") or 0, row.number("width") or 0) for row in (truth, predicted)]
    if sizes[0] != sizes[1]:
        name, words = truth.text("sample_id"), [f"{w} x {h}" for h, w in sizes]
        problem = f"sample {name}: ground truth is {words[0]} pixels, the prediction {words[1]}"
        raise DataError(problem, "predict on the photo that was ingested", "size-mismatch")
    return sizes[0]


def image_order(sample_ids: Sequence[str]) -> NDArray[np.int64]:
    """Places of images in the order of their ids: as numbers where all of them are, else as text.

    Evaluators of files with numbers for ids sort them, so this order, not that of shards, decides about ties and sums.

    >>> image_order(["12", "9", "100"]).tolist(), image_order(["12", "9", "a"]).tolist()
    ([1, 0, 2], [0, 1, 2])
    """
    keys: Sequence[tuple[int, str]] = [(0, s) for s in sample_ids]
    if all(map(_NUMBER.fullmatch, sample_ids)):
        keys = [(int(s), s) for s in sample_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


@dataclass(frozen=True, slots=True)
class ClassCount:
    """Pixels (or objects) of one class in one image: hits, false alarms, misses."""

    class_name: str
    label_id: int
    tp: int
    fp: int
    fn: int

    @property
    def iou(self) -> float | None:
        """Intersection over union, 0..1; None when the image neither shows nor predicts the class."""
        union = self.tp + self.fp + self.fn
        return self.tp / union if union else None


Outcome = Literal["tp", "fp", "fn", "ignored"]


@dataclass(frozen=True, slots=True)
class Match:
    """What became of one object, or of one detection.

    Attributes:
        class_name, label_id: of the detection; of the object where there is none.
        truth_id, predicted_id: ids of the object and of the detection; None where there is none.
        iou: of the two, 0..1; None where either is missing.
        score: of the detection; None where there is none.
        outcome: ``tp``, ``fp``, ``fn``, or ``ignored`` (neither right nor wrong).
    """

    class_name: str
    label_id: int
    truth_id: int | None
    predicted_id: int | None
    iou: float | None
    score: float | None
    outcome: Outcome


OUTCOMES: tuple[Outcome, ...] = ("tp", "fp", "fn", "ignored")


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image on its own.

    Attributes:
        score: what images are ranked by, 0..1; None where it is undefined (nothing to score).
        classes: every class that the image shows or predicts, in class order.
        matches: of objects with detections; None where the protocol matches none.
    """

    score: float | None
    classes: tuple[ClassCount, ...]
    matches: Sequence[Match] | None = None


@dataclass(frozen=True, slots=True)
class Detail:
    """A row of the ``details`` table: something smaller than a class of an image, or larger than an image.

    Attributes:
        kind: what it is: ``case``, ``lesion`` ...
        values: figures by name; None where undefined.
        group_id, sample_id, class_name, truth_id, predicted_id: what it belongs to; None where that says nothing.
        predicted_class: name of the class that was predicted where ``class_name`` is the true one.
    """

    kind: str
    values: Mapping[str, float | None]
    group_id: str | None = None
    sample_id: str | None = None
    class_name: str | None = None
    truth_id: int | None = None
    predicted_id: int | None = None
    predicted_class: str | None = None


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of ground truth against prediction.

    Attributes:
        truth_ids, predicted_ids: label ids of rows and columns, in class order; columns may hold more (void).
        truth_names, predicted_names: their names.
        pixels: uint64 of shape (rows, columns).
    """

    truth_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    truth_names: tuple[str, ...]
    predicted_names: tuple[str, ...]
    pixels: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class MetricOptions:
    """What a caller may set of a protocol; empty, None and False leave it as its official evaluator has it.

    Figures under other settings than the official ones carry the same names: the summary's reader must know. So the
    evaluation's record holds what was set, and the report shows it.

    Attributes:
        ious: IoUs from which on a detection may be matched with an object, ascending, 0 < IoU <= 1.
        max_detections: the best so many detections of each image and class count, ascending.
        boundary: width of the boundary, as a part of the image's diagonal.
        upstream_bugs: reproduce known defects of the official evaluator.
    """

    ious: tuple[float, ...] = ()
    max_detections: tuple[int, ...] = ()
    boundary: float | None = None
    upstream_bugs: bool = False

    @classmethod
    def of(cls, chosen: Mapping[str, Any]) -> "MetricOptions":
        """Inverse of ``chosen``."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}
        return cls(**values)

    def chosen(self) -> dict[str, Any]:
        """What is set, as JSON knows it."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items() if v not in ((), None, False)}


DEFAULTS = MetricOptions()


class Metric(Protocol[S]):
    """One evaluator, made for a class table. Holds no counts itself, so threads may share it.

    ``S`` is its state: of one image, or of any number of images merged. A class that takes ``MetricOptions`` as its
    second argument names those that it heeds in a class variable ``accepts``; one with figures outside 0..1 (mm,
    signed differences) names those in ``unbounded``.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """The official evaluator that the figures equal, or how they are defined where there is none."""

    headline: ClassVar[str]
    """Metric name of the figure that sums it all up."""

    task_column: ClassVar[str]
    """The column (of samples and masks) that is null where the task was not run: ``semantic``, ``instances`` ..."""

    truth_columns: ClassVar[tuple[str, ...]]
    """Columns of the samples table that ``update`` reads, beside ids, sizes and status."""

    prediction_columns: ClassVar[tuple[str, ...]]
    """Columns of the masks table that ``update`` reads."""

    state_columns: ClassVar[tuple[str, ...]]
    """Columns of the state table that ``columns`` fills."""

    def update(self, truth: Row, predicted: Row) -> S:
        """State of one image.

        Args:
            truth: a row of samples with ``truth_columns``, its label not null.
            predicted: the row of masks for the same sample, its mask not null.

        Raises:
            DataError: the two cannot be compared; the row then gets the error's code as its status.
        """
        ...

    def columns(self, states: Sequence[S | None]) -> Mapping[str, pa.Array]:
        """``state_columns`` with one entry per state; None becomes null."""
        ...

    def states(self, batch: pa.RecordBatch) -> list[S | None]:
        """Inverse of ``columns``: the state of every row, None where it is null.

        Args:
            batch: rows of the state table: ``sample_id``, ``group_id`` and ``state_columns``.
        """
        ...

    def merge(self, states: Iterable[S]) -> S:
        """Sum of any number of states (none: the empty state); the order does not matter."""
        ...

    def compute(self, total: S) -> list[Figure]:
        """The figures: those over all classes first, then by class; undefined values are None."""
        ...

    def image(self, state: S) -> ImageScore:
        """One image's own score and counts."""
        ...

    def confusion(self, total: S) -> Confusion | None:
        """The confusion matrix, or None where the metric has none."""
        ...


@runtime_checkable
class FoldsGroups(Protocol[S]):
    """A metric of groups (volumes): the state of a whole one is much smaller than those of its images.

    Rows of a group that lie together are folded before they are written: the last one holds the state, those before it
    none. ``merge`` folds groups whose images come from several parts.
    """

    def folded(self, states: Sequence[S]) -> S | None:
        """State of a whole group; None where images of it are missing.

        Raises:
            DataError: the group cannot be scored; all of its rows then get the error's code as their status.
        """
        ...

    def complete(self, total: S) -> S:
        """The state without groups of which images are missing, for evaluations that leave those out."""
        ...


@runtime_checkable
class ScoresBatches(Protocol[S_contra]):
    """A metric that knows a fast way to ``image`` for many images at once."""

    def images(self, states: Sequence[S_contra]) -> "ImageTable":
        """What ``Metric.image`` says of each."""
        ...


Key = tuple[str, str]
"""Metric and class name of a figure; the class is empty for a figure over all classes."""

Resampler = Callable[[NDArray[np.int64]], Mapping[Key, NDArray[np.float64]]]
"""See ``Resamples``."""


@runtime_checkable
class Resamples(Protocol[S_contra]):
    """A metric that knows a fast way to its figures for many resamples of the data."""

    def resampler(self, units: Sequence[S_contra]) -> "Resampler":
        """What gives the figures of ``compute`` for resamples of ``units``: images, or groups of them merged.

        It takes how often each unit is drawn, int64 of shape (resamples, units), and gives float64 of shape
        (resamples,) by figure; NaN where a figure is undefined.
        """
        ...


@runtime_checkable
class HasDetails(Protocol[S_contra]):
    """A metric that fills the ``details`` table."""

    def details(self, total: S_contra) -> Iterable[Detail]:
        """Rows, in an order that does not depend on how the states were merged."""
        ...


@runtime_checkable
class CountsMissing(Protocol[State]):
    """A metric whose official evaluator takes an image without any prediction for one where nothing was found.

    Other evaluators refuse such images, and so does segbatch.
    """

    def empty(self, truth: Row) -> State:
        """State of an image that no row of masks is there for; ``truth`` as in ``Metric.update``."""
        ...
