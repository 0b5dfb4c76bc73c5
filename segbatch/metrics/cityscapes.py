"""Cityscapes' pixel-level figures: IoU and instance-weighted IoU of classes and of categories.

Source: github.com/mcordts/cityscapesScripts, version 2.3.0: ``evaluation/evalPixelLevelSemanticLabeling.py`` and
``helpers/labels.py``.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import runlength
from segbatch.codecs.runlength import Runs
from segbatch.errors import DataError
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import Confusion, ImageScore, Row
from segbatch.metrics.coco_matching import bad_mask
from segbatch.metrics.columns import NO_INSTANCES, instances_of
from segbatch.metrics.semantic import (
    NOTHING,
    Joint,
    SemanticMetric,
    among,
    official_table,
    plain_mean,
    ratio,
    refuse_unknown,
    runs_of,
)
from segbatch.records import ClassInfo, ClassTable, Figure

LABELS = 34
"""Label ids are 0 to 33."""

SCORED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids that count, by trainId."""

IGNORED = frozenset(range(LABELS)) - set(SCORED)

OBJECTS = (24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids that count and have instances: person, rider, car, truck, bus, train, motorcycle, bicycle."""

_CATEGORIES: Mapping[str, range] = {
    "flat": range(7, 11),
    "construction": range(11, 17),
    "object": range(17, 21),
    "nature": range(21, 23),
    "sky": range(23, 24),
    "human": range(24, 26),
    "vehicle": range(26, 34),
}
"""Label ids of every category but void, in the official order; the ignored ones among them count for iIoU alone."""

_WITH_OBJECTS = ("human", "vehicle")
"""Categories all of whose labels have instances."""

_TRAIN_VOID = 255
HINT = "give label ids as in labels.py: the column id, not trainId"

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def official_classes(protocol: str, classes: ClassTable) -> ClassTable:
    """The class table by ascending label id.

    Raises:
        ConfigError: these are not the classes of Cityscapes.
    """
    return official_table(protocol, classes, set(SCORED), IGNORED)


class CityscapesMetric(ArrayMetric):
    """Protocol ``cityscapes``: all float64 bits of the official script, which prints three decimals.

    ``miou`` and ``miiou`` are its averageScoreClasses and averageScoreInstClasses, ``category_miou`` and
    ``category_miiou`` those of categories; ``iou``, ``iiou``, ``category_iou`` and ``category_iiou`` the same by class
    or category. iIoU weights the pixels of each object by the mean size of its class over its own; false positives are
    not weighted. Classes without objects have none, nor have categories other than human and vehicle. NaN is no value.

    - Pixels whose ground truth is ignored are no false positives; predicting an ignored class is a miss. So is what a
      class map leaves out.
    - Objects are the samples' ``instances`` that are no crowds, of classes that count. The official sums of floats run
      in the order of its file list, which is that of the file system; here it is that of the image ids, and in an image
      that of the instance ids, as with a sorted list.
    - Without ``instances`` of every image there is no iIoU; the official script stops.
    - A predicted id that is no label id is refused. The official script stops there too, or with its C extension counts
      it elsewhere. Predictions that agree with the trainIds of the ground truth are refused with a hint.

    State: 9.5 kB whatever the number of images, 32 bytes per object, 8 bytes per image; 9.5 kB per image in the state
    table before compression.
    """

    name: ClassVar[str] = "cityscapes"
    source: ClassVar[str] = "cityscapesscripts 2.3.0, evalPixelLevelSemanticLabeling.py, float64 before it prints"
    headline: ClassVar[str] = "miou"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic", "instances")
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    fields: ClassVar[Mapping[str, Field]] = {
        "confusion": Field(LABELS + 1, merge="add", rows=LABELS),
        "objects": Field(4),
        "unnumbered": Field(merge="add"),
    }
    """Pixels by true and predicted label id (the last column: no class); label id, pixels, pixels that are predicted as
    that class and as its category, of every object; images without instances."""

    sizes: ClassVar[Mapping[int, float]] = {
        24: 3462.4756337644,
        25: 3930.4788056518,
        26: 12794.0202738185,
        27: 27855.1264367816,
        28: 35732.1511111111,
        31: 67583.7075812274,
        32: 6298.7200839748,
        33: 4672.3249222261,
    }
    """``avgClassSize``: mean pixels of an object, by label id."""

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: these are not the classes of Cityscapes.
        """
        table = official_classes(self.name, classes)
        self.scored: tuple[ClassInfo, ...] = table.scored
        self._plain = SemanticMetric(table)
        self._known = among([*range(LABELS), NOTHING])

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Counted on the runs: no mask is decoded.

        Raises:
            DataError: ``size-mismatch``; ``bad-runs``; ``bad-mask``; ``unknown-class`` for ids that are no label ids,
                trainIds among them.
        """
        runs = runs_of(truth, predicted)
        joint = Joint(*runlength.joint_counts(*runs))
        refuse_train_ids(joint, truth)
        refuse_unknown(self.name, joint, self._known, truth, HINT)
        if int(joint.truth.max(initial=0)) >= LABELS:
            problem = f"sample {truth.text('sample_id')}: the ground truth holds label {int(joint.truth.max())}"
            raise DataError(problem, HINT, "unknown-class")
        confusion = np.zeros((LABELS, LABELS + 1), np.int64)
        confusion[joint.truth, np.minimum(joint.predicted, LABELS)] = joint.pixels
        numbered = truth.column("instances")[truth.index].is_valid
        values = {
            "confusion": confusion,
            "objects": _objects(truth, runs[1]) if numbered else np.empty((0, 4), np.int64),
            "unnumbered": np.array([not numbered]),
        }
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Arrays) -> list[Figure]:
        """The four means, then by class, then by category. Support is pixels, of iIoU objects."""
        confusion = total.values["confusion"][:, :LABELS]
        misses = total.values["confusion"].sum(axis=1)
        labels, weighted = self._weighted(total)
        numbered = not int(total.values["unnumbered"].sum())
        classes = {c.name: (c.label_id,) for c in self.scored}
        categories = {name: tuple(ids) for name, ids in _CATEGORIES.items()}
        found = [
            *_ious("iou", classes, confusion, misses),
            *_weighted_ious("iiou", classes, confusion, labels, weighted[:2], numbered),
            *_ious("category_iou", categories, confusion, misses),
            *_weighted_ious("category_iiou", categories, confusion, labels, weighted[2:], numbered),
        ]
        objects, pixels = len(labels), int(misses[list(SCORED)].sum())
        names = {"miou": "iou", "miiou": "iiou", "category_miou": "category_iou", "category_miiou": "category_iiou"}
        means = [
            Figure(
                name,
                plain_mean([f.value for f in found if f.metric == part]),
                support=objects if part.endswith("iiou") else pixels,
            )
            for name, part in names.items()
        ]
        return [*means, *found]

    def _weighted(self, total: Arrays) -> tuple[Counts, tuple[Floats, ...]]:
        """Labels of all objects in the official order, and tpWeighted, fnWeighted, catTpWeighted, catFnWeighted."""
        labels, pixels, right, alike = total.in_order().values["objects"].T
        weights = np.array([self.sizes.get(i, 0.0) for i in range(LABELS)])[labels] / pixels
        return labels, tuple(part * weights for part in (right, pixels - right, alike, pixels - alike))

    def image(self, state: Arrays) -> ImageScore:
        """Mean IoU over the classes that this image shows or predicts; void predictions count as misses."""
        return self._plain.image(_joint(state))

    def confusion(self, total: Arrays) -> Confusion:
        """Scored ground-truth classes against all predicted ids: scored ones in class order, then the others."""
        return self._plain.confusion(_joint(total))


def _objects(truth: Row, predicted: Runs) -> Counts:
    """Rows of ``CityscapesMetric.fields["objects"]``, by instance id.

    Raises:
        DataError: ``bad-mask``.
    """
    found = instances_of(truth)
    height, width = truth.number("height") or 0, truth.number("width") or 0
    counts = np.zeros((len(found.ids), LABELS + 1), np.int64)
    bad = compiled("label_pixels")(found.text, found.starts, height, width, *predicted, counts)
    if bad >= 0:
        raise bad_mask(truth, found, NO_INSTANCES, bad)
    order = np.argsort(found.ids, kind="stable")
    order = order[np.isin(found.category, OBJECTS)[order] & (found.crowd[order] == 0)]
    counts, labels = counts[order], found.category[order]
    pixels = counts.sum(axis=1)
    right = np.take_along_axis(counts, labels[:, None], axis=1)[:, 0]
    human, vehicle = (counts[:, list(_CATEGORIES[name])].sum(axis=1) for name in _WITH_OBJECTS)
    alike = np.where(np.isin(labels, _CATEGORIES["human"]), human, vehicle)
    rows: Counts = np.stack([labels, pixels, right, alike], axis=1)[pixels > 0]
    return rows


def _joint(state: Arrays) -> Joint:
    """The confusion matrix as a sparse histogram."""
    confusion = state.values["confusion"]
    truth, predicted = (i.astype(np.uint16) for i in np.nonzero(confusion))
    return Joint(truth, np.where(predicted == LABELS, NOTHING, predicted).astype(np.uint16), confusion[confusion > 0])


def _ious(name: str, groups: Mapping[str, Sequence[int]], confusion: Counts, support: Counts) -> Iterable[Figure]:
    """getIouScoreForLabel and getIouScoreForCategory: TP / (TP + FP + FN) of groups of label ids."""
    for group, ids in groups.items():
        mine = [i for i in ids if i in SCORED]
        tp, row = int(confusion[np.ix_(mine, mine)].sum()), int(support[mine].sum())
        yield Figure(name, ratio(tp, row + _false(confusion, ids, mine)), group, support=row)


def _weighted_ious(
    name: str,
    groups: Mapping[str, Sequence[int]],
    confusion: Counts,
    labels: Counts,
    weighted: tuple[Floats, ...],
    numbered: bool,
) -> Iterable[Figure]:
    """getInstanceIouScoreForLabel and getInstanceIouScoreForCategory; no values unless objects are ``numbered``."""
    for group, ids in groups.items():
        has_objects = group in _WITH_OBJECTS or set(ids) <= set(OBJECTS)
        mine = np.isin(labels, ids)
        tp, fn = (_in_order(part[mine]) for part in weighted)
        whole = tp + _false(confusion, ids, ids) + fn
        value = tp / whole if whole and numbered and has_objects else None
        yield Figure(name, value, group, support=int(mine.sum()))


def _false(confusion: Counts, ids: Sequence[int], columns: Sequence[int]) -> int:
    """False positives: pixels predicted as ``columns`` whose ground truth counts and is none of ``ids``."""
    others = [i for i in SCORED if i not in ids]
    return int(confusion[np.ix_(others, columns)].sum())


def _in_order(values: Floats) -> float:
    """Sum from the first to the last, one by one."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0


def refuse_train_ids(joint: Joint, truth: Row) -> None:
    """Refuse a prediction of trainIds: 0 to 18 and 255, and right as such for most pixels, of two classes or more.

    Raises:
        DataError: ``unknown-class``, with the fix.
    """
    seen = joint.predicted
    if not np.all((seen < len(SCORED)) | (seen == _TRAIN_VOID)):
        return
    train_ids = np.full(1 << 16, NOTHING, np.uint16)
    train_ids[list(SCORED)] = np.arange(len(SCORED))
    counts = np.isin(joint.truth, SCORED)
    right = counts & (train_ids[joint.truth] == seen)
    if np.count_nonzero(right) > 1 and 2 * int(joint.pixels[right].sum()) > int(joint.pixels[counts].sum()):
        problem = f"sample {truth.text('sample_id')}: the prediction holds trainIds, 0 to 18"
        raise DataError(problem, HINT, "unknown-class")


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """A loop of ``_cityscapes_kernels``."""
    from segbatch.metrics import _cityscapes_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(getattr(kernels, name))
