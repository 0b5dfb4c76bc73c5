"""PASCAL's figures: VOC by its development kit, Context by the formula of the FCN code.

Source: ``VOCcode/VOCevalseg.m`` of the VOC development kit (2011; copy: github.com/npinto/VOCdevkit, commit 89f2ff3);
``score.py`` of github.com/shelhamer/fcn.berkeleyvision.org (commit 1305c73).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from segbatch.errors import ConfigError
from segbatch.metrics.semantic import Counts, Rules, SemanticMetric, official_table, plain_mean
from segbatch.records import ClassTable

_VOID = 255
_FCN = Rules(
    unknown_predictions="refused",
    unknown_truth="ignored",
    sums="nanmean",
    figures=("miou", "mean_class_accuracy", "global_accuracy", "fwiou"),
)


class PascalVocMetric(SemanticMetric):
    """Protocol ``pascal-voc``: the 20 classes and background; ground truth 255 is not counted.

    ``iou`` by class is ``accuracies`` of ``VOCevalseg``, ``miou`` its ``avacc``, over all images together; it prints
    both in percent with three decimals, and these digits agree. It prints NaN for a class that is in neither the ground
    truth nor the prediction, and then for the mean: here both have no value, and ``miou_present`` is the mean over the
    others. ``accuracy`` by class is the diagonal of its ``conf`` (0 there for a class without ground truth, undefined
    here), ``global_accuracy`` the "percentage of pixels correctly labelled overall" that it no longer prints; the other
    figures are segbatch's.

    As there, a prediction of 21..254 is refused. The kit refuses 255 too; here it, and what a class map leaves out, is
    a miss of the true class.

    The state holds 12 bytes per pair of ids that meets in a pixel.
    """

    name: ClassVar[str] = "pascal-voc"
    source: ClassVar[str] = "VOCdevkit VOCcode/VOCevalseg.m (M. Everingham et al.), to the three decimals it prints"
    rules: ClassVar[Rules] = Rules(
        means="all",
        unknown_predictions="refused",
        figures=("miou", "miou_present", "mean_class_accuracy", "global_accuracy"),
    )
    hint: ClassVar[str] = "write 0 (background) to 20 (tvmonitor)"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not VOC's: 0..20, and 255 ignored.
        """
        super().__init__(official_table(self.name, classes, set(range(21)), {_VOID}))

    def _whole(self, counts: Counts, per_class: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
        return {**super()._whole(counts, per_class), "miou_present": plain_mean(per_class["iou"])}


class _PascalContext(SemanticMetric):
    """``score.py`` over a class table of label ids."""

    rules: ClassVar[Rules] = _FCN
    hint: ClassVar[str] = "write 0..59 in the order of 59_labels.txt, not the ids of labels.txt (1..459)"


class PascalContext60Metric(_PascalContext):
    """Protocol ``pascal-context-60``: background (0), which is a class, and the 59 classes.

    Figures and decisions: see ``pascal-context-59``; the same formula. What a class map leaves out is a miss.
    The state holds 12 bytes per pair of ids that meets in a pixel.
    """

    name: ClassVar[str] = "pascal-context-60"
    source: ClassVar[str] = "fcn.berkeleyvision.org score.py (E. Shelhamer), 60 classes with background, float64"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not 0..59, all scored.
        """
        if set(classes.ignore_ids) == {0}:
            problem = f"protocol {self.name} scores background (0), which the samples ignore"
            raise ConfigError(problem, "use --protocol pascal-context-59")
        super().__init__(official_table(self.name, classes, set(range(60)), set()))


class PascalContext59Metric(_PascalContext):
    """Protocol ``pascal-context-59``: the 59 classes; ground truth 0 stands for all other labels and is not counted.

    ``miou``, ``mean_class_accuracy``, ``global_accuracy`` and ``fwiou`` equal ``mean IU``, ``mean accuracy``, ``overall
    accuracy`` and ``fwavacc`` of ``score.py`` in every bit. The means leave out classes that have no value: accuracy
    without ground truth, IoU without ground truth and prediction. Samples may have 0 as background or ignored. A
    prediction of 0, which a network of 59 classes cannot make, is a miss, and so is what a class map leaves out; ids
    beyond 59 are refused. The state holds 12 bytes per pair of ids that meets in a pixel.
    """

    name: ClassVar[str] = "pascal-context-59"
    source: ClassVar[str] = "fcn.berkeleyvision.org score.py (E. Shelhamer), 59 classes without background, float64"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not 1..59, and 0 as background or ignored.
        """
        without = ClassTable(tuple(replace(c, ignore=c.ignore or c.label_id == 0) for c in classes.classes))
        super().__init__(official_table(self.name, without, set(range(1, 60)), {0}))


class PascalContextMetric(_PascalContext):
    """Protocol ``pascal-context``: ``pascal-context-59`` where the samples ignore 0, else ``pascal-context-60``."""

    name: ClassVar[str] = "pascal-context"
    source: ClassVar[str] = "fcn.berkeleyvision.org score.py (E. Shelhamer), with or without background, float64"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not PASCAL-Context's.
        """
        ignored = {0} & set(classes.ignore_ids)
        super().__init__(official_table(self.name, classes, set(range(60)) - ignored, ignored))
