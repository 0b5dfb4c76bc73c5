"""TIDE: what the errors of a detector cost in AP.

Source: tidecv 1.0.1 (github.com/dbolya/tide, commit 49a5d2a), ``quantify.py``, ``ap.py``, ``errors/main_errors.py``.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import ClassCount, Confusion, ImageScore, Row, same_size
from segbatch.metrics.coco_matching import Places, check, overlaps_of, scored_classes
from segbatch.metrics.columns import NO_INSTANCES, Instances, instances_of
from segbatch.records import ClassInfo, ClassTable, Figure

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

LEAST = 0.5
"""IoU from which on a detection is right (``pos_threshold``)."""

BACKGROUND = 0.1
"""IoU up to which a detection lies on background (``background_threshold``)."""

MOST = 100
"""Detections of an image that count, whatever their class (``max_dets``)."""

KINDS = ("segm", "bbox")
"""What overlaps are taken of: masks, boxes."""

ERRORS = ("cls", "loc", "both", "dupe", "bkg")
"""Errors of detections by their number in a state, from 1 on; 0 is a right detection."""

FOUND, CORRECTABLE, MISSED = range(3)
"""What becomes of an object."""

_ERROR_BITS, _IGNORED = 7, 8
"""Parts of a detection's word; above them stands the label id + 1 of the object that it would find once fixed."""


class _Detections(NamedTuple):
    """Of any number of images, with one kind of overlap, in ``image_order`` and then the best first.

    Attributes:
        score: float64.
        label: label ids, int64.
        error: 0 for right ones, else 1 + place in ``ERRORS``; int64.
        ignored: bool; neither right nor wrong.
        fixed: label id of the object that each would find if its error were fixed, else -1; int64.
    """

    score: NDArray[np.float64]
    label: Integers
    error: Integers
    ignored: Flags
    fixed: Integers


class TideMetric(ArrayMetric):
    """Protocol ``tide``: the errors of tidecv 1.0.1, for masks and for boxes.

    ``segm_ap50``: TIDE's AP at the IoU .5, over all classes and by class. ``segm_dap_cls`` (right place, another
    class), ``_loc`` (right class, IoU .1 to .5), ``_both`` (neither), ``_dupe`` (a second one), ``_bkg`` (on
    background), ``_miss`` (an object that no fixed detection would find): by how much that AP rises if all errors of
    the type, and they alone, are fixed; never below 0. ``segm_dap_fp`` and ``_fn``: the same for all wrong detections
    and for all objects not found; the latter can be below 0. All of these are there as ``bbox_...`` too.

    TIDE prints them times 100. They equal its own within 1e-12: it adds up classes in the order in which it meets them.
    The ``support`` of a dAP is the number of such errors, that of an AP the number of objects.

    TIDE's AP is not that of ``coco-instance``: the best 100 detections of an image count, not of each class in it; a
    class with detections but without objects has the AP 0, which counts in the mean; of equal IoUs the first object is
    taken, not the last. Crowds are its ignore regions, of their own class.

    What TIDE leaves to its input is fixed here: images come in the order of their ids (as numbers where all of them
    are, else as text), which decides between equal scores. Detections and objects of ignored classes are left out.
    Images without a row of masks count as images without detections.

    State: 32 bytes per detection (the best 100 of an image), 24 per object. 118,000 images with 94 detections each take
    375 MB.
    """

    name: ClassVar[str] = "tide"
    source: ClassVar[str] = "tidecv 1.0.1, evaluate at IoU .5 with background .1, mask and bbox, within 1e-12"
    headline: ClassVar[str] = "segm_ap50"
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    unbounded: ClassVar[frozenset[str]] = frozenset({f"{kind}_dap_fn" for kind in KINDS})
    fields: ClassVar[Mapping[str, Field]] = {
        "scores": Field(real=True),
        "detections": Field(width=3),  # label id, words of masks and of boxes
        "objects": Field(width=3),  # label id, fates by masks and by boxes
    }

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: no class is scored.
        """
        self.scored: tuple[ClassInfo, ...] = scored_classes(classes, self.name)
        self._places = Places(classes)
        self._order: list[int] = np.searchsorted(self._places.ids, [c.label_id for c in self.scored]).tolist()

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Match the detections of one image with its objects, and say what is wrong with those that are wrong.

        Raises:
            DataError: ``size-mismatch``, ``bad-mask``, ``bad-score`` (outside 0..1), ``duplicate-id``,
                ``unknown-class``.
        """
        same_size(truth, predicted)
        found = instances_of(predicted)
        check(found, truth)
        return self._state(truth, found)

    def empty(self, truth: Row) -> Arrays:
        """The same for an image that no row of masks is there for: nothing was found.

        Raises:
            DataError: ``unknown-class``, ``bad-mask``.
        """
        return self._state(truth, NO_INSTANCES)

    def _state(self, row: Row, found: Instances) -> Arrays:
        objects = instances_of(row)
        best = np.argsort(-found.score, kind="stable")
        best = best[self._places.of(found, row)[best] >= 0][:MOST]
        targets = np.flatnonzero(self._places.of(objects, row) >= 0)
        labels, crowd = (found.category[best], objects.category[targets]), objects.crowd[targets]
        words, fates = np.empty((2, len(best)), np.int64), np.empty((2, len(targets)), np.int64)
        for place, kind in enumerate(KINDS):
            overlaps = overlaps_of(kind, row, objects, found, BACKGROUND)
            ious = np.ascontiguousarray(overlaps.ious[np.ix_(best, targets)])
            words[place], fates[place] = _classified(ious, *labels, crowd)
        kept = crowd == 0
        values = {
            "scores": found.score[best],
            "detections": np.column_stack([labels[0], *words]),
            "objects": np.column_stack([labels[1], *fates])[kept],
        }
        return self.state(row.text("sample_id") or "", None, values)

    def image(self, state: Arrays) -> ImageScore:
        """AP50 of masks as if this were the only image; counts of masks at the IoU .5, without what is ignored."""
        found, labels, fates = _detections(state, 0), state.values["objects"][:, 0], state.values["objects"][:, 1]
        sides = (
            found.label[found.error == 0],
            found.label[(found.error > 0) & ~found.ignored],
            labels[fates != FOUND],
        )
        tp, fp, fn = (self._counts(side).tolist() for side in sides)
        counts = tuple(
            ClassCount(c.name, c.label_id, tp[place], fp[place], fn[place])
            for c, place in zip(self.scored, self._order, strict=True)
            if tp[place] or fp[place] or fn[place]
        )
        return ImageScore(_mean(*self._plain(found, self._counts(labels))), counts)

    def confusion(self, total: Arrays) -> Confusion | None:
        """None: of detections of a wrong class only some are told from other errors."""
        return None

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Arrays) -> list[Figure]:
        """Of masks, then of boxes: the AP, what each error costs; at last the AP by class."""
        ordered = total.in_order()
        labels = ordered.values["objects"][:, 0]
        objects = self._counts(labels)
        figures: list[Figure] = []
        by_class: list[Figure] = []
        for place, kind in enumerate(KINDS):
            found, fates = _detections(ordered, place), ordered.values["objects"][:, 1 + place]
            aps, there = self._plain(found, objects)
            base = _mean(aps, there)
            figures.append(Figure(f"{kind}_ap50", base, support=len(labels)))
            for name, fixed, errors in self._fixed(found, labels, fates, objects):
                value = None if base is None or fixed is None else fixed - base
                if value is not None and name != "fn":
                    value = max(value, 0.0)
                figures.append(Figure(f"{kind}_dap_{name}", value, support=errors))
            for c, at in zip(self.scored, self._order, strict=True):
                value = float(aps[at]) if there[at] else None
                by_class.append(Figure(f"{kind}_ap50", value, c.name, support=int(objects[at])))
        return [*figures, *by_class]

    def _fixed(
        self, found: _Detections, labels: Integers, fates: Integers, objects: Integers
    ) -> Iterator[tuple[str, float | None, int]]:
        """Name of every type of error, AP without errors of the type, and how many there are (fix_errors)."""
        wrong = found.error > 0
        order = np.concatenate([np.flatnonzero(wrong), np.flatnonzero(~wrong)])  # as fix_errors puts them: it matters
        order = order[np.argsort(-found.score[order], kind="stable")]  # where scores are equal
        kept = ~found.ignored
        for number, name in enumerate(ERRORS, 1):
            mine = found.error == number
            mended = mine & (found.fixed >= 0)
            label = np.where(mended, found.fixed, found.label)
            aps = self._aps(label, ~wrong | mended, order[((kept & ~mine) | mended)[order]], objects)
            yield name, _mean(*aps), int(mine.sum())
        missed, right = fates == MISSED, ~wrong
        aps = self._aps(found.label, right, order[kept[order]], objects - self._counts(labels[missed]))
        yield "miss", _mean(*aps), int(missed.sum())
        first = np.concatenate([np.flatnonzero(right), np.flatnonzero(wrong & kept)])
        yield "fp", _mean(*self._aps(found.label, right, first, objects)), int((wrong & kept).sum())
        lost = fates != FOUND
        aps = self._aps(found.label, right, order[kept[order]], objects - self._counts(labels[lost]))
        yield "fn", _mean(*aps), int(lost.sum())

    def _plain(self, found: _Detections, objects: Integers) -> tuple[NDArray[np.float64], Flags]:
        """AP of every class as it is, and which classes count."""
        order = np.argsort(-found.score, kind="stable")
        return self._aps(found.label, found.error == 0, order[~found.ignored[order]], objects)

    def _aps(
        self, labels: Integers, right: Flags, order: Integers, objects: Integers
    ) -> tuple[NDArray[np.float64], Flags]:
        """AP of every class, 0 without objects, and which classes have objects or detections.

        Args:
            labels: label id of each detection.
            right: which are right.
            order: places of those that count, the best first.
            objects: of each class, int64 of shape (classes,).
        """
        classes = np.searchsorted(self._places.ids, labels[order]).astype(np.uint16)
        by_class = np.argsort(classes, kind="stable")
        starts = np.searchsorted(classes[by_class], np.arange(len(objects) + 1))
        found = np.empty(len(objects))
        _compiled("average_precisions")(right[order[by_class]].view(np.uint8), starts, objects, found)
        return found, (np.diff(starts) > 0) | (objects > 0)

    def _counts(self, labels: Integers) -> Integers:
        """How often each class occurs."""
        return np.bincount(np.searchsorted(self._places.ids, labels), minlength=len(self._places.ids))


def _classified(
    ious: NDArray[np.float64], labels: Integers, object_labels: Integers, crowd: NDArray[np.uint8]
) -> tuple[Integers, Integers]:
    """The word of every detection, and the fate of every object."""
    errors, fixed, fates = (np.empty(n, np.int64) for n in (len(labels), len(labels), len(object_labels)))
    ignored = np.empty(len(labels), np.uint8)
    _compiled("classify")(ious, labels, object_labels, crowd, LEAST, BACKGROUND, errors, ignored, fixed, fates)
    targets = np.append(object_labels, -1)[fixed]
    return errors + _IGNORED * ignored + 2 * _IGNORED * (targets + 1), fates


def _detections(state: Arrays, place: int) -> _Detections:
    """Of the kind at ``place`` in ``KINDS``."""
    labels, words = state.values["detections"][:, 0], state.values["detections"][:, 1 + place]
    ignored = (words & _IGNORED) != 0
    return _Detections(state.flat("scores"), labels, words & _ERROR_BITS, ignored, words // (2 * _IGNORED) - 1)


def _mean(values: NDArray[np.float64], there: Flags) -> float | None:
    """Of those that are there."""
    return float(np.mean(values[there])) if there.any() else None


@functools.cache
def _compiled(name: str) -> Callable[..., Any]:
    from segbatch.metrics import _tide_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(getattr(kernels, name))
