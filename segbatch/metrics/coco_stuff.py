"""COCO-Stuff's figures: all 171 classes of the label maps, or the 91 stuff classes and ``other``.

Source: github.com/nightrome/cocostuff, ``models/deeplab/evaluate_performance.py`` (171 classes);
github.com/nightrome/cocostuffapi (commit 675ff38), ``PythonAPI/pycocotools/cocostuffeval.py`` (91 and ``other``). Both
have the same ``_computeMetrics``, in float64; they print two decimals of percent, and four decimals.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError
from segbatch.metrics.base import Row
from segbatch.metrics.semantic import IDS, NOTHING, Joint, Rules, SemanticMetric, among, official_table
from segbatch.records import ClassInfo, ClassTable, Figure

_REMOVED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
"""Values of the label maps that no class has: things that were taken out of COCO."""

_MAP_IDS, _MAP_VOID = set(range(182)) - _REMOVED, 255
_STUFF_IDS, _OTHER, _UNLABELED = set(range(92, 184)), 183, 0
"""Of the JSON files, whose ids are those of the label maps plus one; ``other`` is all things together."""

_THINGS = 91
"""Values of the label maps below this are things."""

_FIGURES = ("miou", "fwiou", "mean_class_accuracy", "global_accuracy")
_RULES = Rules(present="truth", unknown_truth="ignored", unknown_predictions="refused", sums="numpy", figures=_FIGURES)
_BY_SUPERCATEGORY = ("iou", "accuracy")
_SUFFIX = "_supercategory"


class _Supercategories(SemanticMetric):
    rules: ClassVar[Rules] = _RULES


class _CocoStuff(SemanticMetric):
    """``_computeMetrics`` of classes and of their supercategories."""

    rules: ClassVar[Rules] = _RULES

    def __init__(self, classes: ClassTable) -> None:
        super().__init__(classes)
        names = sorted({c.supercategory for c in classes.scored})
        self._parents = _Supercategories(ClassTable(tuple(ClassInfo(i, name) for i, name in enumerate(names))))
        self._parent_of = _lookup({c.label_id: names.index(c.supercategory) for c in classes.scored})

    def compute(self, total: Joint) -> list[Figure]:
        """Figures over all classes, of supercategories, by class, by supercategory."""
        above = self._parents.compute(_relabelled(total, self._parent_of, self._parent_of))
        kept = (f for f in above if not f.class_name or f.metric in _BY_SUPERCATEGORY)
        parents = [Figure(f.metric + _SUFFIX, f.value, f.class_name, support=f.support) for f in kept]
        return sorted([*super().compute(total), *parents], key=lambda f: bool(f.class_name))


class CocoStuffMetric(_CocoStuff):
    """Protocol ``coco-stuff``: the 171 classes, things and stuff, of the PNG label maps (0..181; 255 is unlabeled).

    Equal to ``_computeMetrics`` in every bit: IoU, accuracy, and their means over the classes that the ground truth
    shows (a class that is only predicted has no IoU); ``fwiou``; ``global_accuracy``, its pixel accuracy. Figures
    named ``..._supercategory`` are the same of the 27 supercategories, as ``cocostuffeval`` merges them:
    ``evaluate_performance.py`` has none. Precision, recall and Dice by class are segbatch's.

    Pixels of unlabeled ground truth are not counted. One of the eleven ids that no class has is a miss of the true
    class. The official code breaks off over a prediction above 181; segbatch refuses it too, but takes 255, and what a
    class map leaves out, for a miss.

    The state holds 12 bytes per pair of ids that meets in a pixel.
    """

    name: ClassVar[str] = "coco-stuff"
    source: ClassVar[str] = "cocostuff models/deeplab/evaluate_performance.py and cocostuffeval (H. Caesar), float64"
    hint: ClassVar[str] = "write the values of the label maps, 0..181: labels.txt and the JSON files have them plus 1"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are not those of the label maps.
        """
        if {c.label_id for c in classes.scored} == _STUFF_IDS:
            problem = f"protocol {self.name} wants label maps of 171 classes, the samples are of a stuff_SPLIT.json"
            raise ConfigError(problem, "use --protocol coco-stuff-91")
        super().__init__(official_table(self.name, classes, _MAP_IDS, {_MAP_VOID}))
        self._known |= among(_REMOVED)


class CocoStuff91Metric(_CocoStuff):
    """Protocol ``coco-stuff-91``: the stuff classes 92..182 and ``other`` (183), which is all things together.

    Equal to ``COCOStuffeval.summarize`` in every bit: ``miou``, ``fwiou``, ``mean_class_accuracy`` and
    ``global_accuracy`` are those of its ``leaves``, ``..._supercategory`` those of its ``supercats``, over the classes
    that the ground truth shows; by class its ``ious`` and ``maccs``. Precision, recall and Dice are segbatch's.

    The samples may come from ``stuff_SPLIT.json`` (92..183, 0 is unlabeled) or from the label maps (0..181, 255 is
    unlabeled): then 0..90 become ``other``, and the others get 1 added, as ``stuff_SPLIT.json`` was made. Unlabeled
    ground truth is not counted. As there, an unlabeled prediction counts as ``other`` (the official code looks up
    column -1, the last); so does what a class map leaves out, and any other id is refused.

    The state holds 12 bytes per pair of classes that meets in a pixel, at most 92 x 93 of them.
    """

    name: ClassVar[str] = "coco-stuff-91"
    source: ClassVar[str] = "cocostuffapi PythonAPI/pycocotools/cocostuffeval.py (H. Caesar), float64"
    hint: ClassVar[str] = "write 92..182 for stuff and 183 for things over a stuff_SPLIT.json, 0..181 over label maps"

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the classes are neither those of the label maps nor of ``stuff_SPLIT.json``.
        """
        if {c.label_id for c in classes.scored} == _MAP_IDS:
            found = official_table(self.name, classes, _MAP_IDS, {_MAP_VOID})
            known = {*range(182)}
            ids = {i: _OTHER if i < _THINGS else i + 1 for i in known}
            stuff = (ClassInfo(c.label_id + 1, c.name, supercategory=c.supercategory) for c in found.scored)
            other = ClassInfo(_OTHER, "other", supercategory="other")
            void, leaves = _MAP_VOID, (*(c for c in stuff if c.label_id > _THINGS), other)
        else:
            known, void = _STUFF_IDS, _UNLABELED
            leaves = official_table(self.name, classes, _STUFF_IDS, {void}).scored
            ids = {i: i for i in known}
        super().__init__(ClassTable((*leaves, ClassInfo(_UNLABELED, "unlabeled", ignore=True))))
        self._known = among([*known, void, NOTHING])
        self._truth_id = _lookup({**ids, void: _UNLABELED})
        self._predicted_id = _lookup({**ids, void: _OTHER, NOTHING: _OTHER})

    def update(self, truth: Row, predicted: Row) -> Joint:
        """Joint histogram of 92..183 and unlabeled ground truth (0).

        Raises:
            DataError: as ``SemanticMetric.update``.
        """
        return _relabelled(super().update(truth, predicted), self._truth_id, self._predicted_id)


def _lookup(ids: Mapping[int, int]) -> NDArray[np.uint16]:
    """New label ids by old ones; ``NOTHING`` for all others."""
    table = np.full(IDS, NOTHING, np.uint16)
    table[list(ids)] = list(ids.values())
    return table


def _relabelled(joint: Joint, truth: NDArray[np.uint16], predicted: NDArray[np.uint16]) -> Joint:
    return Joint(truth[joint.truth], predicted[joint.predicted], joint.pixels)
