"""Semantic segmentation from joint pixel counts: one implementation, parametrised by the rules of each evaluator."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns as run_columns
from segbatch.codecs import runlength
from segbatch.errors import DataError
from segbatch.metrics.base import ClassCount, Confusion, ImageScore, Row
from segbatch.records import ClassInfo, ClassTable, Figure


@dataclass(frozen=True, slots=True)
class Joint:
    """Sparse joint histogram: how many pixels have this label in the ground truth and that one in the prediction.

    Attributes:
        truth, predicted: label ids, uint16 of shape (n,).
        pixels: uint64 of shape (n,). A pair may stand there more than once until ``merge``; n is 0 for no image.
    """

    truth: NDArray[np.uint16]
    predicted: NDArray[np.uint16]
    pixels: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Rules:
    """What semantic evaluators differ in.

    Attributes:
        absent: IoU, accuracy, precision ... of a class with nothing to divide by: ``undefined`` (left out of means)
            or ``zero`` (counts as 0 in means over all classes).
        void_predictions: a scored pixel that is predicted void, or an unknown id: ``error`` makes it a miss of its
            true class; ``dropped`` takes it out of that class's counts. Both leave it wrong in the global accuracy.
        figures: the figures over all classes that are reported, in order.
    """

    absent: Literal["undefined", "zero"] = "undefined"
    void_predictions: Literal["error", "dropped"] = "error"
    figures: tuple[str, ...] = ("miou", "mean_class_accuracy", "global_accuracy", "fwiou", "mean_dice")


@dataclass(frozen=True, slots=True)
class Counts:
    """What every figure follows from; int64 of shape (classes,) in class order unless said otherwise.

    Attributes:
        tp: right pixels.
        row: ground-truth pixels that count for their class (see ``Rules.void_predictions``).
        column: pixels predicted so, ground truth of a scored class.
        support: all ground-truth pixels of the class.
        total: ground-truth pixels that are not ignored, of whatever id.
    """

    tp: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    support: NDArray[np.int64]
    total: int


class SemanticMetric:
    """Protocol ``semantic``: figures over all pixels of the data set (not means over images).

    Pixels whose ground truth is an ignored class are never counted. A predicted void or unknown id is a miss of the
    true class. Per class ``iou`` = TP / (TP + FP + FN), ``accuracy`` = ``recall`` = TP / ground truth,
    ``precision`` = TP / predicted, ``dice`` = 2 TP / (2 TP + FP + FN). A class that is in neither ground truth nor
    prediction has no value and is left out of the means; likewise accuracy without ground truth. ``fwiou`` weights
    IoU by ground-truth pixels; ``global_accuracy`` is the pixel accuracy: right pixels / pixels not ignored.
    A ground-truth id that the class table lacks counts in that denominator only.
    """

    name: ClassVar[str] = "semantic"
    source: ClassVar[str] = "no official evaluator: dataset-level pixel counts, absent classes left out of means"
    headline: ClassVar[str] = "miou"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    state_columns: ClassVar[tuple[str, ...]] = ("joint",)
    rules: ClassVar[Rules] = Rules()

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self.scored: tuple[ClassInfo, ...] = classes.scored
        self.ignored = np.array(sorted(classes.ignore_ids), np.uint16)
        self._place = np.full(1 << 16, len(self.scored), np.intp)
        self._place[[c.label_id for c in self.scored]] = np.arange(len(self.scored))

    def update(self, truth: Row, predicted: Row) -> Joint:
        """Joint histogram of one image, counted on the runs: no mask is decoded.

        Raises:
            DataError: ``size-mismatch``, or ``bad-runs`` where runs do not fill their image.
        """
        sizes = [(row.number("height"), row.number("width")) for row in (truth, predicted)]
        if sizes[0] != sizes[1]:
            name, words = truth.text("sample_id"), [f"{w} x {h}" for h, w in sizes]
            problem = f"sample {name}: ground truth is {words[0]} pixels, the prediction {words[1]}"
            raise DataError(problem, "predict on the photo that was ingested", "size-mismatch")
        pair = [run_columns.runs_at(row.column("semantic"), row.index) for row in (truth, predicted)]
        area = (sizes[0][0] or 0) * (sizes[0][1] or 0)
        for runs, what in zip(pair, ("ground truth", "prediction"), strict=True):
            if runs is None or int(runs.lengths.sum(dtype=np.uint64)) != area:
                problem = f"sample {truth.text('sample_id')}: the runs of the {what} do not fill its {area} pixels"
                raise DataError(problem, "write that table again", "bad-runs")
        assert pair[0] is not None and pair[1] is not None
        return Joint(*runlength.joint_counts(pair[0], pair[1]))

    def columns(self, states: Sequence[Joint | None]) -> Mapping[str, pa.Array]:
        """``joint``; see ``schemas.STATE``."""
        kind = schemas.STATE.field("joint").type
        whole = _concatenate(s for s in states if s is not None)
        struct = kind.value_type
        items = pa.StructArray.from_arrays(
            [pa.array(whole.truth), pa.array(whole.predicted), pa.array(whole.pixels)], fields=list(struct)
        )
        offsets = np.zeros(len(states) + 1, np.int32)
        np.cumsum([0 if s is None else len(s.truth) for s in states], out=offsets[1:])
        missing = pa.array([s is None for s in states], pa.bool_())
        return {"joint": pa.ListArray.from_arrays(pa.array(offsets), items, type=kind, mask=missing)}

    def states(self, batch: pa.RecordBatch) -> list[Joint | None]:
        """Views on the batch's buffers."""
        column = batch.column("joint")
        fields = [f.to_numpy(zero_copy_only=True) for f in column.values.flatten()]
        offsets = column.offsets.to_numpy()
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        spans = zip(offsets[:-1], offsets[1:], valid, strict=True)
        return [Joint(*(f[start:stop] for f in fields)) if there else None for start, stop, there in spans]

    def merge(self, states: Iterable[Joint]) -> Joint:
        """Every pair once, in ascending order."""
        whole = _concatenate(states)
        keys = whole.truth.astype(np.uint32) << 16 | whole.predicted
        order = np.argsort(keys, kind="stable")
        pairs, first = np.unique(keys[order], return_index=True)
        pixels = np.add.reduceat(whole.pixels[order], first) if len(pairs) else whole.pixels
        return Joint((pairs >> 16).astype(np.uint16), (pairs & 0xFFFF).astype(np.uint16), pixels)

    def compute(self, total: Joint) -> list[Figure]:
        """Figures over all classes as the rules list them, then iou, accuracy, precision, recall, dice by class."""
        counts = self._counts(total, self.rules.void_predictions)
        per_class = self._per_class(counts)
        whole = {
            "miou": _mean(per_class["iou"]),
            "mean_class_accuracy": _mean(per_class["accuracy"]),
            "global_accuracy": int(counts.tp.sum()) / counts.total if counts.total else None,
            "fwiou": _weighted(per_class["iou"], counts.support),
            "mean_dice": _mean(per_class["dice"]),
        }
        figures = [Figure(name, whole[name], support=counts.total) for name in self.rules.figures]
        for name, values in per_class.items():
            for c, value, support in zip(self.scored, values, counts.support.tolist(), strict=True):
                figures.append(Figure(name, value, c.name, support=support))
        return figures

    def image(self, state: Joint) -> ImageScore:
        """Mean IoU over the classes that this image shows or predicts; void predictions count as misses."""
        counts = self._counts(state, "error")
        rows = zip(self.scored, counts.tp.tolist(), counts.row.tolist(), counts.column.tolist(), strict=True)
        classes = tuple(
            ClassCount(c.name, c.label_id, tp, col - tp, row - tp) for c, tp, row, col in rows if row or col
        )
        values = [c.iou for c in classes if c.iou is not None]
        return ImageScore(_sum(values) / len(values) if values else None, classes)

    def confusion(self, total: Joint) -> Confusion:
        """Scored ground-truth classes against all predicted ids: scored ones in class order, then the others."""
        row, column = self._place[total.truth], self._place[total.predicted]
        others = sorted({int(i) for i in total.predicted[(column == len(self.scored)) & (row < len(self.scored))]})
        place = self._place.copy()
        place[others] = len(self.scored) + np.arange(len(others))
        matrix = np.zeros((len(self.scored), len(self.scored) + len(others)), np.uint64)
        keep = row < len(self.scored)
        np.add.at(matrix, (row[keep], place[total.predicted[keep]]), total.pixels[keep])
        ids, names = tuple(c.label_id for c in self.scored), tuple(c.name for c in self.scored)
        extra = tuple(self.classes.name_of(i) for i in others)
        return Confusion(ids, ids + tuple(others), names, names + extra, matrix)

    def _counts(self, joint: Joint, void_predictions: Literal["error", "dropped"]) -> Counts:
        n = len(self.scored)
        keep = ~np.isin(joint.truth, self.ignored)
        matrix = np.zeros((n + 1, n + 1), np.int64)
        place = (self._place[joint.truth[keep]], self._place[joint.predicted[keep]])
        np.add.at(matrix, place, joint.pixels[keep].astype(np.int64))
        inner = matrix[:n, :n]
        support = matrix[:n].sum(axis=1)
        row = support if void_predictions == "error" else inner.sum(axis=1)
        return Counts(np.diagonal(inner).copy(), row, inner.sum(axis=0), support, int(matrix.sum()))

    def _per_class(self, counts: Counts) -> dict[str, list[float | None]]:
        tp, row, column = counts.tp, counts.row, counts.column
        return {
            "iou": self._ratio(tp, row + column - tp),
            "accuracy": self._ratio(tp, row),
            "precision": self._ratio(tp, column),
            "recall": self._ratio(tp, counts.support),
            "dice": self._ratio(2 * tp, row + column),
        }

    def _ratio(self, part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
        empty = 0.0 if self.rules.absent == "zero" else None
        return [p / w if w else empty for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


def _concatenate(states: Iterable[Joint]) -> Joint:
    joints = list(states)
    if not joints:
        return Joint(np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.uint64))
    return Joint(
        np.concatenate([j.truth for j in joints]),
        np.concatenate([j.predicted for j in joints]),
        np.concatenate([j.pixels for j in joints]),
    )


def _sum(values: Iterable[float]) -> float:
    """Plain left-to-right float64 sum: ``sum`` compensates since Python 3.12 and numpy adds pairwise."""
    total = 0.0
    for value in values:
        total += value
    return total


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean in class order. Undefined ones are left out; None when nothing is left."""
    there = [v for v in values if v is not None]
    return _sum(there) / len(there) if there else None


def _weighted(values: Sequence[float | None], weights: NDArray[np.int64]) -> float | None:
    """Sum of value * weight / sum of weights, in class order; None without any weight."""
    whole = int(weights.sum())
    terms = (v * (w / whole) for v, w in zip(values, weights.tolist(), strict=True) if v is not None and w)
    return _sum(terms) if whole else None
