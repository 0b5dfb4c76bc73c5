"""Semantic segmentation from joint pixel counts: one implementation, parametrised by the rules of each evaluator."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns as run_columns
from segbatch.codecs import runlength
from segbatch.errors import ConfigError, DataError
from segbatch.metrics.base import ClassCount, Confusion, ImageScore, Resampler, Row, same_size
from segbatch.records import ClassInfo, ClassTable, Figure

NOTHING = 0xFFFF
"""Label id of a prediction that is no class of the samples: what a class map leaves out."""

IDS = 1 << 16
"""Label ids are smaller than this."""


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


Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rules:
    """What semantic evaluators differ in.

    Attributes:
        absent_is_zero: the figures by class that are 0, not undefined, for a class with nothing to divide by; so they
            count in means.
        present: which classes have an IoU and a Dice: those of the ground truth or the prediction (``either``), or
            those of the ground truth alone (``truth``).
        void_predictions: a scored pixel that is predicted void, or an unknown id: ``error`` makes it a miss of its
            true class; ``dropped`` takes it out of that class's counts. Both leave it wrong in the global accuracy.
        unknown_predictions: ``miss`` takes ids that the class table lacks for void; ``refused`` is an error.
        unknown_truth: pixels whose ground truth the class table lacks are wrong in the global accuracy (``counted``),
            or ``ignored`` like void.
        means: over the classes that have a value (``defined``), or undefined where one has none (``all``).
        sums: in which order floats are added: ``sequential``, ``numpy`` (``np.mean`` of the defined values) or
            ``nanmean`` (``np.nanmean``). They differ in the last bits.
        figures: the figures over all classes that are reported, in order.
    """

    absent_is_zero: tuple[str, ...] = ()
    present: Literal["either", "truth"] = "either"
    void_predictions: Literal["error", "dropped"] = "error"
    unknown_predictions: Literal["miss", "refused"] = "miss"
    unknown_truth: Literal["counted", "ignored"] = "counted"
    means: Literal["defined", "all"] = "defined"
    sums: Literal["sequential", "numpy", "nanmean"] = "sequential"
    figures: tuple[str, ...] = (
        *("miou", "mean_class_accuracy", "global_accuracy", "fwiou"),
        *("mean_dice", "mean_precision", "mean_recall"),
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """What every figure follows from; int64 of shape (classes,) in class order unless said otherwise.

    Attributes:
        tp: right pixels.
        row: ground-truth pixels that count for their class (see ``Rules.void_predictions``).
        column: pixels predicted so, ground truth of a scored class.
        support: all ground-truth pixels of the class.
        total: ground-truth pixels that are not ignored; of whatever id, where ``Rules.unknown_truth`` counts them.
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
    prediction has no value and is left out of the means; likewise accuracy without ground truth, and precision of a
    class that is never predicted. ``fwiou`` weights IoU by ground-truth pixels; ``global_accuracy`` is the pixel
    accuracy: right pixels / pixels not ignored. A ground-truth id that the class table lacks counts in that denominator
    only. ``mean_class_accuracy`` and ``mean_recall`` are the same figure under both its names.

    The state holds 12 bytes per pair of ids that meets in a pixel: at most the square of the number of classes.
    """

    name: ClassVar[str] = "semantic"
    source: ClassVar[str] = "no official evaluator: dataset-level pixel counts, absent classes left out of means"
    headline: ClassVar[str] = "miou"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    state_columns: ClassVar[tuple[str, ...]] = ("joint",)
    rules: ClassVar[Rules] = Rules()
    hint: ClassVar[str] = "predict the samples' label ids, or give a --class-map"
    """What to do about a prediction with ids that the class table lacks."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self.scored: tuple[ClassInfo, ...] = classes.scored
        self._place = np.full(IDS, len(self.scored), np.intp)
        self._place[[c.label_id for c in self.scored]] = np.arange(len(self.scored))
        self._void = among(classes.ignore_ids)
        self._known = among([NOTHING, *(c.label_id for c in classes.classes)])

    def update(self, truth: Row, predicted: Row) -> Joint:
        """Joint histogram of one image, counted on the runs: no mask is decoded.

        Raises:
            DataError: ``size-mismatch``, ``bad-runs`` where runs do not fill their image, or ``unknown-class`` where
                the rules refuse a predicted id.
        """
        joint = joint_of(truth, predicted)
        if self.rules.unknown_predictions == "refused":
            refuse_unknown(self.name, joint, self._known, truth, self.hint)
        return joint

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
        whole = self._whole(counts, per_class)
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
        return ImageScore(plain_sum(values) / len(values) if values else None, classes)

    def confusion(self, total: Joint) -> Confusion:
        """Scored ground-truth classes against all predicted ids: scored ones in class order, then the others."""
        row, column = self._place[total.truth], self._place[total.predicted]
        keep = row < len(self.scored)
        others = sorted({int(i) for i in total.predicted[(column == len(self.scored)) & keep]})
        place = self._place.copy()
        place[others] = len(self.scored) + np.arange(len(others))
        matrix = np.zeros((len(self.scored), len(self.scored) + len(others)), np.uint64)
        np.add.at(matrix, (row[keep], place[total.predicted[keep]]), total.pixels[keep])
        ids, names = tuple(c.label_id for c in self.scored), tuple(c.name for c in self.scored)
        extra = tuple(self.classes.name_of(i) for i in others)
        return Confusion(ids, ids + tuple(others), names, names + extra, matrix)

    def resampler(self, units: Sequence[Joint]) -> Resampler:
        """See ``base.Resamples``."""
        from segbatch.metrics import bootstrap  # it imports this module

        return bootstrap.of_pairs(self, units)

    def _counts(self, joint: Joint, void_predictions: Literal["error", "dropped"]) -> Counts:
        n = len(self.scored)
        keep = ~self._void[joint.truth]
        matrix = np.zeros((n + 1, n + 1), np.int64)
        place = (self._place[joint.truth[keep]], self._place[joint.predicted[keep]])
        np.add.at(matrix, place, joint.pixels[keep].astype(np.int64))
        inner = matrix[:n, :n]
        support = matrix[:n].sum(axis=1)
        row = support if void_predictions == "error" else inner.sum(axis=1)
        total = int(support.sum() if self.rules.unknown_truth == "ignored" else matrix.sum())
        return Counts(np.diagonal(inner).copy(), row, inner.sum(axis=0), support, total)

    def _per_class(self, counts: Counts) -> dict[str, list[float | None]]:
        tp, row, column = counts.tp, counts.row, counts.column
        there = np.ones(len(tp), bool) if self.rules.present == "either" else counts.support > 0
        return {
            "iou": self._ratio("iou", tp, (row + column - tp) * there),
            "accuracy": self._ratio("accuracy", tp, row),
            "precision": self._ratio("precision", tp, column),
            "recall": self._ratio("recall", tp, counts.support),
            "dice": self._ratio("dice", 2 * tp, (row + column) * there),
        }

    def _whole(self, counts: Counts, per_class: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
        """All figures over all classes, of which the rules report some."""
        return {
            "miou": self._mean(per_class["iou"]),
            "mean_class_accuracy": self._mean(per_class["accuracy"]),
            "global_accuracy": ratio(int(counts.tp.sum()), counts.total),
            "fwiou": self._weighted(per_class["iou"], counts.support),
            "mean_dice": self._mean(per_class["dice"]),
            "mean_precision": self._mean(per_class["precision"]),
            "mean_recall": self._mean(per_class["recall"]),
        }

    def _ratio(self, name: str, part: NDArray[np.int64], whole: NDArray[np.int64]) -> list[float | None]:
        empty = 0.0 if name in self.rules.absent_is_zero else None
        return [p / w if w else empty for p, w in zip(part.tolist(), whole.tolist(), strict=True)]

    def _mean(self, values: Sequence[float | None]) -> float | None:
        """Mean in class order; None when nothing is left, or as the rules have it."""
        there = defined(values)
        if not there or (self.rules.means == "all" and len(there) < len(values)):
            return None
        if self.rules.sums == "sequential":
            return plain_sum(there) / len(there)
        if self.rules.sums == "numpy":
            return float(np.mean(there))
        return float(np.nanmean([np.nan if v is None else v for v in values]))

    def _weighted(self, values: Sequence[float | None], weights: NDArray[np.int64]) -> float | None:
        """Sum of value * weight / sum of weights, in class order; None without any weight."""
        whole = int(weights.sum())
        if not whole:
            return None
        terms = [v * (w / whole) for v, w in zip(values, weights.tolist(), strict=True) if v is not None and w]
        return plain_sum(terms) if self.rules.sums == "sequential" else float(np.sum(terms))


def joint_of(truth: Row, predicted: Row) -> Joint:
    """Joint histogram of an image's ``semantic`` columns, counted on the runs.

    Raises:
        DataError: see ``runs_of``.
    """
    return Joint(*runlength.joint_counts(*runs_of(truth, predicted)))


def runs_of(truth: Row, predicted: Row) -> tuple[runlength.Runs, runlength.Runs]:
    """The runs of an image's ``semantic`` columns, which cover the same pixels.

    Raises:
        DataError: ``size-mismatch``, or ``bad-runs`` where runs do not fill their image.
    """
    height, width = same_size(truth, predicted)
    pair = [run_columns.runs_at(row.column("semantic"), row.index) for row in (truth, predicted)]
    for runs, what in zip(pair, ("ground truth", "prediction"), strict=True):
        if runs is None or int(runs.lengths.sum(dtype=np.uint64)) != height * width:
            name, area = truth.text("sample_id"), height * width
            problem = f"sample {name}: the runs of the {what} do not fill its {area} pixels"
            raise DataError(problem, "write that table again", "bad-runs")
    assert pair[0] is not None and pair[1] is not None
    return pair[0], pair[1]


def refuse_unknown(protocol: str, joint: Joint, known: Flags, truth: Row, hint: str) -> None:
    """Refuse predicted label ids that mean nothing.

    Args:
        protocol: its name.
        joint: of the image.
        known: of shape (IDS,): which ids may be predicted.
        truth: the image.
        hint: what to do.

    Raises:
        DataError: ``unknown-class``.
    """
    strange = np.unique(joint.predicted[~known[joint.predicted]]).tolist()
    if strange:
        shown = ", ".join(map(str, strange[:5])) + (" ..." if len(strange) > 5 else "")
        problem = f"sample {truth.text('sample_id')}: the prediction holds label {shown}, no class of {protocol}"
        raise DataError(problem, hint, "unknown-class")


def official_table(
    protocol: str, classes: ClassTable, scored: AbstractSet[int], ignored: AbstractSet[int]
) -> ClassTable:
    """The class table by ascending label id, in which order official evaluators add up.

    Args:
        protocol: its name.
        classes: of the samples.
        scored, ignored: the label ids that the protocol is made for.

    Raises:
        ConfigError: other label ids; says which are wanted, and which are there.
    """
    ours = {c.label_id for c in classes.scored}
    if ours != scored or set(classes.ignore_ids) != ignored:
        wanted = f"{_spans(scored)}{f' with {_spans(ignored)} ignored' if ignored else ', none of them ignored'}"
        found = f"{len(ours)} classes with ids {_spans(ours)}; ignored: {_spans(set(classes.ignore_ids)) or 'none'}"
        problem = f"protocol {protocol} wants the classes {wanted}, the samples have {found}"
        raise ConfigError(problem, "use --protocol semantic")
    return ClassTable(tuple(sorted(classes.classes, key=lambda c: c.label_id)))


def _spans(ids: AbstractSet[int]) -> str:
    """
    >>> _spans({0, 1, 2, 7, 9, 10})
    '0 to 2, 7, 9 to 10'
    """
    begins = sorted(i for i in ids if i - 1 not in ids)
    ends = sorted(i for i in ids if i + 1 not in ids)
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(begins, ends, strict=True))


def among(ids: Iterable[int]) -> Flags:
    """Which label ids are among these, bool of shape (IDS,)."""
    found = np.zeros(IDS, bool)
    found[list(ids)] = True
    return found


def _concatenate(states: Iterable[Joint]) -> Joint:
    joints = list(states)
    if not joints:
        return Joint(np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.uint64))
    return Joint(
        np.concatenate([j.truth for j in joints]),
        np.concatenate([j.predicted for j in joints]),
        np.concatenate([j.pixels for j in joints]),
    )


def plain_sum(values: Iterable[float]) -> float:
    """Plain left-to-right float64 sum: ``sum`` compensates since Python 3.12 and numpy adds pairwise."""
    total = 0.0
    for value in values:
        total += value
    return total


def defined(values: Sequence[float | None]) -> list[float]:
    """Those that have a value."""
    return [v for v in values if v is not None]


def plain_mean(values: Sequence[float | None]) -> float | None:
    """Mean in their order of those that have a value; None when there is none."""
    there = defined(values)
    return plain_sum(there) / len(there) if there else None


def ratio(part: int, whole: int) -> float | None:
    """Part of a whole; None where that is nothing."""
    return part / whole if whole else None
