"""Skin detection on Pratheepan: three F1s, each under its own name, because papers do not say which is theirs.

The dataset has no official evaluator. Its paper (W. R. Tan et al., IEEE T-II 8(1), 2012) reports accuracy, precision,
recall and F-score.
"""

from typing import ClassVar

from segbatch.metrics.arrays import Arrays
from segbatch.metrics.binary import BinaryMetric, figures_of, image_mean
from segbatch.metrics.semantic import official_table
from segbatch.records import ClassTable, Figure


class PratheepanMetric(BinaryMetric):
    """Protocol ``pratheepan``: skin (1) against non-skin (0).

    ``pooled_f1`` (with ``pooled_precision``, ``pooled_recall``, ``pooled_accuracy``) counts the pixels of all images
    together. ``image_mean_f1`` is the mean of each image's F1. ``f1_of_means`` is 2 P R / (P + R) of the means over
    images of precision and of recall (``image_mean_precision``, ``image_mean_recall``). An image without predicted skin
    has no precision and is left out of that mean; its F1 is 0.

    Skin is where the ground truth's grey value is above 128 (see the dataset). A prediction must be 0 or 1. Counts and
    state as in ``binary``.
    """

    name: ClassVar[str] = "pratheepan"
    source: ClassVar[str] = "no official evaluator: F1 pooled, as mean over images, and of mean precision and recall"
    headline: ClassVar[str] = "pooled_f1"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not 0, non-skin, and 1, skin.
        """
        super().__init__(official_table(self.name, classes, {0, 1}, set()))

    def compute(self, total: Arrays) -> list[Figure]:
        """The F1s, then precision, recall and accuracy."""
        counts = total.in_order().values["counts"]
        whole, pixels = figures_of(counts.sum(axis=0).tolist()), int(counts.sum())
        means = {name: image_mean(name, counts) for name in ("precision", "recall", "dice")}
        precision, recall, f1 = means.values()
        return [
            Figure("pooled_f1", whole["dice"], support=pixels),
            Figure("image_mean_f1", f1.value, support=f1.support),
            Figure("f1_of_means", _harmonic(precision.value, recall.value), support=len(counts)),
            *(Figure(f"pooled_{name}", whole[name], support=pixels) for name in ("precision", "recall", "accuracy")),
            precision,
            recall,
        ]


def _harmonic(precision: float | None, recall: float | None) -> float | None:
    """0 where both are 0: nothing was hit."""
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
