"""Clothing Co-Parsing: figures over its 59 tags; the dataset has no official evaluator."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from segbatch.metrics.semantic import Counts, Rules, SemanticMetric, official_table, ratio
from segbatch.records import ClassTable

TAGS = 59


class CcpMetric(SemanticMetric):
    """Protocol ``ccp``: the figures of protocol ``semantic`` over the 59 tags, background (0, ``null``) included.

    Over all pixels of the data set; tags that are absent have no value and are left out of the means. Beside these:
    ``foreground_accuracy``, the right pixels among those that are not background; and ``miou_foreground``, the mean IoU
    without background (hair, skin and accessories are tags like any other). A predicted id that is no tag is a miss.

    The state holds 12 bytes per pair of ids that meets in a pixel.
    """

    name: ClassVar[str] = "ccp"
    source: ClassVar[str] = "no official evaluator: pooled pixel counts over 59 tags, absent ones left out of means"
    rules: ClassVar[Rules] = Rules(
        figures=(
            *("miou", "miou_foreground", "global_accuracy", "foreground_accuracy", "mean_class_accuracy", "fwiou"),
            *("mean_precision", "mean_recall", "mean_dice"),
        )
    )

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not the 59 tags, 0..58.
        """
        super().__init__(official_table(self.name, classes, set(range(TAGS)), set()))

    def _whole(self, counts: Counts, per_class: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
        return {
            **super()._whole(counts, per_class),
            "miou_foreground": self._mean(per_class["iou"][1:]),
            "foreground_accuracy": ratio(int(counts.tp[1:].sum()), int(counts.support[1:].sum())),
        }
