"""Foreground against background: the usual figures, pooled over all pixels and as means over images, named so."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import ClassCount, Confusion, ImageScore, Row
from segbatch.metrics.semantic import among, joint_of, plain_mean, ratio, refuse_unknown
from segbatch.records import ClassInfo, ClassTable, Figure

Counts = NDArray[np.int64]
"""TP, FP, FN, TN of an image, or of many."""

_FIGURES = ("iou", "dice", "precision", "recall", "accuracy", "specificity")


class BinaryMetric(ArrayMetric):
    """Protocol ``binary``: two classes, of which the one with the greater label id is the foreground.

    ``pooled_...`` counts the pixels of all images together; ``image_mean_...`` is the mean over images of each image's
    own figure, leaving out images where it is undefined (its support says how many are left). IoU = TP / (TP + FP +
    FN), Dice (F1) = 2 TP / (2 TP + FP + FN), precision = TP / (TP + FP), recall = TP / (TP + FN), accuracy = (TP + TN)
    / pixels, specificity = TN / (TN + FP). So an image without foreground that is predicted without any has no IoU,
    Dice, precision and recall, and one that lacks only a prediction has no precision and a Dice of 0.

    Ground truth that is void or unknown is not counted. A prediction must be one of the two.

    The state holds 32 bytes an image, beside its id. Means are summed in the order of image ids.
    """

    name: ClassVar[str] = "binary"
    source: ClassVar[str] = "no official evaluator: pixel counts of two classes, pooled and by image"
    headline: ClassVar[str] = "pooled_iou"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    fields: ClassVar[Mapping[str, Field]] = {"counts": Field(width=4)}

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: there are not two scored classes.
        """
        ordered = sorted(classes.scored, key=lambda c: c.label_id)
        if len(ordered) != 2:
            problem = f"protocol {self.name} wants background and foreground, the samples have {len(ordered)} classes"
            raise ConfigError(problem, "use --protocol semantic")
        self.background: ClassInfo = ordered[0]
        self.foreground: ClassInfo = ordered[1]
        self._known = among([c.label_id for c in ordered])

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """TP, FP, FN and TN of one image, counted on the runs: no mask is decoded.

        Raises:
            DataError: ``size-mismatch``, ``bad-runs``, or ``unknown-class`` where a prediction is neither of the two.
        """
        joint = joint_of(truth, predicted)
        back, front = self.background.label_id, self.foreground.label_id
        hint = f"write {back} for {self.background.name} and {front} for {self.foreground.name}, not 0 and 255"
        refuse_unknown(self.name, joint, self._known, truth, hint)
        cells = ((front, front), (back, front), (front, back), (back, back))
        counts = [int(joint.pixels[(joint.truth == t) & (joint.predicted == p)].sum()) for t, p in cells]
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), {"counts": np.array(counts)})

    def compute(self, total: Arrays) -> list[Figure]:
        """The pooled figures, then the means over images."""
        counts = total.in_order().values["counts"]
        whole = figures_of(_total(counts))
        pixels = int(counts.sum())
        found = [Figure(f"pooled_{name}", whole[name], support=pixels) for name in _FIGURES]
        return [*found, *(image_mean(name, counts) for name in _FIGURES)]

    def image(self, state: Arrays) -> ImageScore:
        """IoU of the foreground."""
        tp, fp, fn, tn = _total(state.values["counts"])
        pairs = ((self.background, (tn, fn, fp)), (self.foreground, (tp, fp, fn)))
        classes = tuple(ClassCount(c.name, c.label_id, *three) for c, three in pairs if any(three))
        return ImageScore(ratio(tp, tp + fp + fn), classes)

    def confusion(self, total: Arrays) -> Confusion:
        """Background and foreground."""
        tp, fp, fn, tn = _total(total.values["counts"])
        ids = (self.background.label_id, self.foreground.label_id)
        names = (self.background.name, self.foreground.name)
        return Confusion(ids, ids, names, names, np.array([[tn, fp], [fn, tp]], np.uint64))


def image_mean(name: str, counts: Counts) -> Figure:
    """A figure's mean over images where it is defined.

    Args:
        name: as in ``figures_of``.
        counts: int64 of shape (images, 4), in the order in which they are summed.
    """
    values = [figures_of(row)[name] for row in counts.tolist()]
    return Figure(f"image_mean_{name}", plain_mean(values), support=sum(v is not None for v in values))


def figures_of(counts: Sequence[int]) -> dict[str, float | None]:
    """The figures of TP, FP, FN, TN by name."""
    tp, fp, fn, tn = counts
    return {
        "iou": ratio(tp, tp + fp + fn),
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
        "specificity": ratio(tn, tn + fp),
    }


def _total(counts: Counts) -> tuple[int, int, int, int]:
    tp, fp, fn, tn = (int(n) for n in counts.sum(axis=0))
    return tp, fp, fn, tn
