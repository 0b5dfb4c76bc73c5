"""Where label maps are wrong: at the outlines of classes or away from them, and what is taken for what.

The split of an IoU's loss into missed pixels and false alarms, each at the boundary and inside, is segbatch's own. The
boundary is the band that Boundary IoU looks at (B. Cheng et al., CVPR 2021), but without the image's border.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.metrics.arrays import ArrayStates, Field
from segbatch.metrics.base import DEFAULTS, Confusion, Detail, ImageScore, MetricOptions, Row
from segbatch.metrics.boundaries import boundary_part, boundary_width
from segbatch.metrics.semantic import IDS, Joint, SemanticMetric, plain_mean, ratio, runs_of
from segbatch.records import ClassTable, Figure

BOUNDARY = 0.005
"""Width of the boundary as a part of the image's diagonal."""

_LOSSES = ("missed_boundary", "missed_interior", "false_boundary", "false_interior")

Numbers = NDArray[np.int64]


# -- two label maps ----------------------------------------------------------------------------------------------------


class Stretches(NamedTuple):
    """Pieces of an image's rows within which neither label map changes; int64 of shape (n,), in row-major order.

    Attributes:
        begins, ends: first pixel and the one after the last, counted row-major over the image.
        truth, predicted: label ids.
    """

    begins: Numbers
    ends: Numbers
    truth: Numbers
    predicted: Numbers

    def at(self, chosen: NDArray[np.bool_]) -> "Stretches":
        """Those that are chosen."""
        return Stretches(*(numbers[chosen] for numbers in self))

    @property
    def pixels(self) -> Numbers:
        """How long each one is."""
        return self.ends - self.begins

    @property
    def pairs(self) -> Numbers:
        """One number for each pair of label ids."""
        return self.truth << 16 | self.predicted


def stretches_of(truth: Row, predicted: Row) -> Stretches:
    """The stretches of an image's ``semantic`` columns, found on the runs.

    Raises:
        DataError: ``size-mismatch``, or ``bad-runs`` where runs do not fill their image.
    """
    ours, theirs = runs_of(truth, predicted)
    height, width = size_of(truth)
    room = len(ours.values) + len(theirs.values) + height
    begins, ends, labels, predictions = (np.empty(room, np.int64) for _ in range(4))
    count = compiled("stretches")(*ours, *theirs, width, height * width, begins, ends, labels, predictions)
    return Stretches(begins[:count], ends[:count], labels[:count], predictions[:count])


def size_of(row: Row) -> tuple[int, int]:
    """Height and width."""
    return row.number("height") or 0, row.number("width") or 0


def interior_of(found: Stretches, codes: Numbers, size: tuple[int, int], depth: int) -> NDArray[np.uint8]:
    """Which pixels have no other code within ``depth`` pixels, in a square: 0 or 1, of shape (height, width)."""
    inside = np.empty(size, np.uint8)
    compiled("interior")(found.begins, found.ends, codes, depth, inside)
    return inside


def sums_of(found: Stretches, pixels: NDArray[np.uint8]) -> Numbers:
    """Sum of a map of shape (height, width) over each stretch."""
    sums = np.empty(len(found.begins), np.int64)
    compiled("sums")(found.begins, found.ends, pixels.reshape(-1), sums)
    return sums


def added(places: Numbers, values: Numbers, number: int = 0) -> Numbers:
    """Sums of the values at equal places, int64; of ``number`` places, or more where there are such.

    They are added as float64, which is exact up to 2**53.
    """
    return np.bincount(places, values, number).astype(np.int64)


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """A loop of ``_errors_kernels``."""
    from segbatch.metrics import _errors_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(getattr(kernels, name))


# -- the protocol ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Joint histograms of the pixels at the boundaries of the ground truth, and of the others."""

    boundary: Joint
    interior: Joint


class _Stored(ArrayStates):
    """The two histograms in the column ``arrays``: ground truth, prediction, pixels."""

    fields: ClassVar[Mapping[str, Field]] = {"boundary": Field(3, merge="drop"), "interior": Field(3, merge="drop")}


_STORED = _Stored()


class SemanticErrorsMetric:
    """Protocol ``semantic-errors``: what the IoU of label maps is lost to, at boundaries and away from them.

    A pixel is at the boundary if another ground-truth label, void included, lies within d pixels of it in a square (so
    also diagonally), d = max(1, round(0.005 * diagonal)) for each image; the option ``boundary`` sets the 0.005. The
    border of the image is no boundary. All other pixels are interior.

    By class, as shares of its TP + FP + FN, so that they and ``iou`` add up to 1: ``missed_boundary`` and
    ``missed_interior`` (pixels of the class that are predicted otherwise), ``false_boundary`` and ``false_interior``
    (pixels of other classes that are predicted so). ``mean_...`` are the means over the classes that have an IoU; with
    ``miou`` they add up to 1, too. ``boundary_accuracy`` and ``interior_accuracy`` are the share of right pixels there:
    by class of those of the class, over all classes of all. ``boundary_share`` is the part of the pixels that lie at
    boundaries, ``boundary_error_share`` the part of the wrong ones; pixels of unknown ground truth are in neither.

    ``miou``, ``iou``, ``global_accuracy``, the confusion matrix, and what counts as void are those of protocol
    ``semantic``, all bits.

    ``details`` has a row of kind ``pair`` for every pair of a ground-truth class and another label that is predicted
    there, the most pixels first: ``truth_label`` and ``predicted_label`` (label ids), ``pixels``, ``share`` (of the
    pixels of the ground-truth class) and ``boundary_share`` (the part of the pair's pixels that lies at boundaries).

    State: 48 bytes per pair of label ids that meets in a pixel.
    """

    name: ClassVar[str] = "semantic-errors"
    source: ClassVar[str] = "segbatch: IoU as in protocol semantic, its losses at and away from ground-truth boundaries"
    headline: ClassVar[str] = "miou"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    state_columns: ClassVar[tuple[str, ...]] = ("arrays",)
    accepts: ClassVar[frozenset[str]] = frozenset({"boundary"})

    def __init__(self, classes: ClassTable, options: MetricOptions = DEFAULTS) -> None:
        """
        Raises:
            ConfigError: the boundary's width is not above 0 and at most 1.
        """
        self._semantic = SemanticMetric(classes)
        self._part = boundary_part(options, BOUNDARY)

    # -- states --------------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Split:
        """Histograms of one image: labels are compared on the runs, pixels are looked at for their boundaries alone.

        Raises:
            DataError: ``size-mismatch``, or ``bad-runs`` where runs do not fill their image.
        """
        found, size = stretches_of(truth, predicted), size_of(truth)
        inside = sums_of(found, interior_of(found, found.truth, size, boundary_width(*size, self._part)))
        return Split(_joint(found, found.pixels - inside), _joint(found, inside))

    def columns(self, states: Sequence[Split | None]) -> Mapping[str, pa.Array]:
        """``arrays``; see ``schemas.STATE``."""
        return _STORED.columns([None if s is None else _STORED.state("", None, _rows(s)) for s in states])

    def states(self, batch: pa.RecordBatch) -> list[Split | None]:
        """Inverse of ``columns``.

        Raises:
            SchemaError: another version of the protocol wrote them.
        """
        read = _STORED.states(batch)
        return [None if s is None else Split(*(_read(s.values[name]) for name in _STORED.fields)) for s in read]

    def merge(self, states: Iterable[Split]) -> Split:
        """Every pair once, in ascending order."""
        found = list(states)
        return Split(self._semantic.merge(s.boundary for s in found), self._semantic.merge(s.interior for s in found))

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Split) -> list[Figure]:
        """Over all classes, then by class; support is as in protocol ``semantic``, and pixels for the two shares."""
        known = {(f.metric, f.class_name): f for f in self._semantic.compute(self._whole(total))}
        losses = self._losses(total)
        by_class = self._accuracies(total)
        accuracy = [f for f in by_class if not f.class_name]
        means = [Figure(f"mean_{name}", plain_mean(losses[name])) for name in _LOSSES]
        found = [known["miou", ""], known["global_accuracy", ""], *accuracy, *self._shares(total), *means]
        scored = self._semantic.scored
        for name in ("iou", *_LOSSES):
            for place, c in enumerate(scored):
                iou = known["iou", c.name]
                found.append(iou if name == "iou" else Figure(name, losses[name][place], c.name, support=iou.support))
        return [*found, *(f for f in by_class if f.class_name)]

    def _whole(self, total: Split) -> Joint:
        return self._semantic.merge([total.boundary, total.interior])

    def _accuracies(self, total: Split) -> list[Figure]:
        found = []
        for name, joint in (("boundary_accuracy", total.boundary), ("interior_accuracy", total.interior)):
            for f in self._semantic.compute(joint):
                if f.metric == ("accuracy" if f.class_name else "global_accuracy"):
                    found.append(Figure(name, f.value, f.class_name, support=f.support))
        return found

    def _shares(self, total: Split) -> list[Figure]:
        matrices = [self._semantic.confusion(joint).pixels for joint in (total.boundary, total.interior)]
        pixels = [int(m.sum()) for m in matrices]
        wrong = [n - int(np.trace(m)) for n, m in zip(pixels, matrices, strict=True)]
        return [
            Figure(name, ratio(counts[0], sum(counts)), support=sum(counts))
            for name, counts in (("boundary_share", pixels), ("boundary_error_share", wrong))
        ]

    def _losses(self, total: Split) -> dict[str, list[float | None]]:
        """``_LOSSES`` of every class, in class order."""
        found: dict[str, Numbers] = {}
        n = len(self._semantic.scored)
        union = np.zeros(n, np.int64)
        for where, joint in (("boundary", total.boundary), ("interior", total.interior)):
            matrix = self._semantic.confusion(joint).pixels.astype(np.int64)
            right = np.diagonal(matrix)
            found[f"missed_{where}"] = matrix.sum(axis=1) - right
            found[f"false_{where}"] = matrix[:, :n].sum(axis=0) - right
            union += right + found[f"missed_{where}"] + found[f"false_{where}"]
        whole = union.tolist()
        return {name: [ratio(k, w) for k, w in zip(found[name].tolist(), whole, strict=True)] for name in _LOSSES}

    def image(self, state: Split) -> ImageScore:
        """As in protocol ``semantic``: mean IoU over the classes that the image shows or predicts."""
        return self._semantic.image(self._whole(state))

    def confusion(self, total: Split) -> Confusion:
        """As in protocol ``semantic``."""
        return self._semantic.confusion(self._whole(total))

    def details(self, total: Split) -> Iterable[Detail]:
        """Pairs, the most pixels first; those with equally many in class order."""
        found = self.confusion(total)
        near, rows = self._at_boundary(total), found.pixels.sum(axis=1).tolist()
        pixels = np.where(np.equal.outer(found.truth_ids, found.predicted_ids), 0, found.pixels).astype(np.int64)
        for place in np.argsort(-pixels, axis=None, kind="stable")[: np.count_nonzero(pixels)].tolist():
            i, j = divmod(place, pixels.shape[1])
            pair, n = (found.truth_ids[i], found.predicted_ids[j]), int(pixels[i, j])
            values = {
                "truth_label": float(pair[0]),
                "predicted_label": float(pair[1]),
                "pixels": float(n),
                "share": n / rows[i],
                "boundary_share": near.get(pair, 0) / n,
            }
            yield Detail("pair", values, class_name=found.truth_names[i], predicted_class=found.predicted_names[j])

    def _at_boundary(self, total: Split) -> dict[tuple[int, int], int]:
        """Pixels at boundaries by label ids."""
        joint = self._semantic.merge([total.boundary])
        return dict(
            zip(zip(joint.truth.tolist(), joint.predicted.tolist(), strict=True), joint.pixels.tolist(), strict=True)
        )


def _joint(found: Stretches, pixels: Numbers) -> Joint:
    """Histogram of so many pixels of each stretch."""
    rows, columns = (np.flatnonzero(np.bincount(ids)) for ids in (found.truth, found.predicted))
    counts = added(_place(rows)[found.truth] * len(columns) + _place(columns)[found.predicted], pixels)
    pairs = np.flatnonzero(counts)
    truth, predicted = np.divmod(pairs, len(columns))
    return Joint(rows[truth].astype(np.uint16), columns[predicted].astype(np.uint16), counts[pairs].astype(np.uint64))


def _place(ids: Numbers) -> Numbers:
    """Place of each id among these; 0 for others."""
    found = np.zeros(IDS, np.int64)
    found[ids] = np.arange(len(ids))
    return found


def _rows(state: Split) -> dict[str, Numbers]:
    parts = {"boundary": state.boundary, "interior": state.interior}
    return {n: np.stack([j.truth, j.predicted, j.pixels], 1).astype(np.int64) for n, j in parts.items()}


def _read(rows: Numbers) -> Joint:
    return Joint(rows[:, 0].astype(np.uint16), rows[:, 1].astype(np.uint16), rows[:, 2].astype(np.uint64))
