"""ADE20K's scene parsing figures, and the usual variation that leaves absent classes out, under a name of its own.

Source: github.com/CSAILVision/sceneparsing (commit e202229): ``demoEvaluation.m``, ``evaluationCode/pixelAccuracy.m``,
``evaluationCode/intersectionAndUnion.m``, ``README.md``.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from segbatch.metrics.semantic import Counts, Rules, SemanticMetric, official_table
from segbatch.records import ClassTable

CLASSES = 150
_FIGURES = ("miou", "global_accuracy", "final_score")


class Ade20kMetric(SemanticMetric):
    """Protocol ``ade20k``: the 150 classes of the scene parsing benchmark; ground truth 0 is not counted.

    ``iou`` by class, ``miou`` (its mean over all 150, with 0 for a class that is in neither ground truth nor
    prediction) and ``global_accuracy`` are what ``demoEvaluation.m`` prints, with four decimals, and two decimals of
    percent: these digits agree. Before rounding they differ by what its ``eps`` adds to each image's union, up to 1e-15
    an image. ``final_score`` is README's: the mean of ``global_accuracy`` and ``miou``. The other figures by class are
    segbatch's and undefined where a class is absent.

    A prediction of 0 is a miss, as there; so is what a class map leaves out. Ids above 150 are refused: MATLAB's
    ``hist`` would count them as class 150, ``utils_eval.py`` not at all. Maps of another size are refused, not
    resized.

    The state holds 12 bytes per pair of ids that meets in a pixel.
    """

    name: ClassVar[str] = "ade20k"
    source: ClassVar[str] = "CSAILVision/sceneparsing demoEvaluation.m, to the four decimals it prints"
    rules: ClassVar[Rules] = Rules(absent_is_zero=("iou",), unknown_predictions="refused", figures=_FIGURES)
    hint: ClassVar[str] = "write 1 (wall) to 150 (flag); where a network counts from 0, add 1"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not the benchmark's: 1..150, and 0 ignored.
        """
        super().__init__(official_table(self.name, classes, set(range(1, CLASSES + 1)), {0}))

    def _whole(self, counts: Counts, per_class: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
        found = super()._whole(counts, per_class)
        accuracy, miou = found["global_accuracy"], found["miou"]
        score = None if accuracy is None or miou is None else (accuracy + miou) / 2
        return {**found, "final_score": score}


class Ade20kPresentMetric(Ade20kMetric):
    """Protocol ``ade20k-present``: as ``ade20k``, but absent classes are left out of the mean IoU.

    A class that is in neither ground truth nor prediction has no IoU, as most training frameworks have it.
    ``mean_class_accuracy`` is over the classes of the ground truth; there is no ``final_score``.
    """

    name: ClassVar[str] = "ade20k-present"
    source: ClassVar[str] = "segbatch: as sceneparsing demoEvaluation.m, but absent classes are left out of the mean"
    rules: ClassVar[Rules] = Rules(
        unknown_predictions="refused", figures=("miou", "mean_class_accuracy", "global_accuracy")
    )
