"""Cityscapes' panoptic quality: COCO's, of the 19 classes that count.

Source: github.com/mcordts/cityscapesScripts, version 2.3.0: ``evaluation/evalPanopticSemanticLabeling.py``.
"""

from typing import ClassVar

from segbatch.metrics.cityscapes import HINT, official_classes
from segbatch.metrics.coco_panoptic import CocoPanopticMetric, Rules
from segbatch.records import ClassTable


class CityscapesPanopticMetric(CocoPanopticMetric):
    """Protocol ``cityscapes-panoptic``: all float64 bits of the official script in one process.

    ``pq``, ``sq`` and ``rq`` over all classes, ``..._things``, ``..._stuff`` and by class. The rule is that of
    ``coco-panoptic``, and what it says of values, sums and the state holds here too. The official script prints per
    cent with one decimal. It stops where no class, no thing or no stuff occurs; here there is no value then.

    A predicted segment of an ignored class is refused, as there; trainIds show as such. Leave void pixels to no
    segment.
    """

    name: ClassVar[str] = "cityscapes-panoptic"
    source: ClassVar[str] = "cityscapesscripts 2.3.0, evalPanopticSemanticLabeling.py in one process, float64"
    rules: ClassVar[Rules] = Rules(ignored_predictions="refused", hint=f"{HINT}; leave void to no segment")

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: these are not the classes of Cityscapes.
        """
        super().__init__(official_classes(self.name, classes))
