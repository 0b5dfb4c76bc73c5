"""KITTI's instance-level figures: those of Cityscapes' script on instance maps of another encoding.

Source: the devkit of KITTI semantics 2015 (cvlibs.net/datasets/kitti/eval_instance_seg.php?benchmark=instanceSeg2015),
``evaluation/evalInstanceLevelSemanticLabeling.py``, ``instances2dict.py``, ``instance.py`` and its README; it is part
of the repository UMich-CURLY/unified_cvo.
"""

from typing import ClassVar

from segbatch.metrics.cityscapes_instance import CityscapesInstanceMetric, Rules


class KittiInstanceMetric(CityscapesInstanceMetric):
    """Protocol ``kitti-instance``: all float64 bits of the devkit's script, which prints three decimals.

    As ``cityscapes-instance`` but for what follows from the instance maps, 256 * label id + number. The devkit changed
    ``Instance.getLabelID``, and left the tests for groups (values below 1000) and for void (values that are ids of
    ignored classes) as they were. So:

    - Number 0 of a class, which by its README is to be ignored, is an object like any other.
    - Void is the label 0 (unlabeled) alone. (Numbered pixels of it would be void by their number; there are none.)
    """

    name: ClassVar[str] = "kitti-instance"
    source: ClassVar[str] = "KITTI devkit_semantics, evalInstanceLevelSemanticLabeling.py, float64 before it prints"
    rules: ClassVar[Rules] = Rules(groups="objects", void=frozenset({0}))
