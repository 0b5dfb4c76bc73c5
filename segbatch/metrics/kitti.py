"""KITTI's pixel-level figures: those of Cityscapes with the mean sizes of KITTI's objects.

Source: the devkit of KITTI semantics 2015 (cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015),
``evaluation/evalPixelLevelSemanticLabeling.py``; it is part of the repository UMich-CURLY/unified_cvo.
"""

from collections.abc import Mapping
from typing import ClassVar

from segbatch.metrics.cityscapes import CityscapesMetric


class KittiMetric(CityscapesMetric):
    """Protocol ``kitti``: all float64 bits of the devkit's script, which prints three decimals.

    Figures and rules are those of ``cityscapes``, and so is the state. Objects are the values of the instance map whose
    number, ``id % 256``, is not 0; their class is ``id // 256``.
    """

    name: ClassVar[str] = "kitti"
    source: ClassVar[str] = "KITTI devkit_semantics, evalPixelLevelSemanticLabeling.py, float64 before it prints"
    sizes: ClassVar[Mapping[int, float]] = {
        24: 1234.262573,
        25: 1318.393921,
        26: 3669.255859,
        27: 1801.103394,
        28: 2761.151611,
        31: 18448.460938,
        32: 695.617676,
        33: 1244.791260,
    }
