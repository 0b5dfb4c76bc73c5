"""CamVid's official figures, and a stricter reading of them under a name of its own.

Source: ``Scripts/compute_test_results.m`` of github.com/alexgkendall/SegNet-Tutorial (commit cf9ad7d, numClasses = 11,
unknown_class = 12 counted from 1). It prints with ``num2str``, that is five significant digits; the figures
here are the float64 values before that rounding.
"""

from typing import ClassVar

from segbatch.metrics.semantic import Rules, SemanticMetric, official_table
from segbatch.records import ClassTable

CLASSES = 11
_VOID = 11
_ABSENT = ("iou", "accuracy")
_FIGURES = ("miou", "mean_class_accuracy", "global_accuracy")


class CamVidMetric(SemanticMetric):
    """Protocol ``camvid``: what the script computes over all test images together.

    Ground truth 11 is ignored. A prediction that is none of the 11 classes is wrong in the global accuracy, whose
    denominator is every pixel that is not ignored, but its pixel leaves the confusion matrix, and so class accuracy and
    IoU. A class without pixels in that matrix's row has accuracy and IoU 0, also when it is predicted somewhere; both
    means divide by 11. Beside these, ``recall`` is over all pixels of the class, those predicted void included.
    """

    name: ClassVar[str] = "camvid"
    source: ClassVar[str] = "SegNet-Tutorial Scripts/compute_test_results.m (A. Kendall), float64 before num2str"
    rules: ClassVar[Rules] = Rules(absent_is_zero=_ABSENT, void_predictions="dropped", figures=_FIGURES)

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not CamVid's: ids 0..10, and 11 ignored.
        """
        super().__init__(official_table(self.name, classes, set(range(CLASSES)), {_VOID}))


class CamVidStrictMetric(CamVidMetric):
    """Protocol ``camvid-strict``: as ``camvid``, but a void prediction is a miss of the true class in its accuracy and
    IoU too, so that predicting void never pays."""

    name: ClassVar[str] = "camvid-strict"
    source: ClassVar[str] = "segbatch: as SegNet-Tutorial compute_test_results.m, but void predictions are misses"
    rules: ClassVar[Rules] = Rules(absent_is_zero=_ABSENT, void_predictions="error", figures=_FIGURES)
