"""Candidates for wrong labels: where a model is confident of something else than the ground truth says.

Not errors, but a list to look through, the most severe first. The idea that confident disagreement points to wrong
labels is that of C. Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021; the
rules for regions and objects are segbatch's own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import DEFAULTS, Detail, ImageScore, MetricOptions, Row, same_size
from segbatch.metrics.boundaries import boundary_part, boundary_width
from segbatch.metrics.calibration import TOP, confidence_of
from segbatch.metrics.coco_matching import Places, check, overlaps_of, scored_classes
from segbatch.metrics.columns import NO_INSTANCES, Instances, instances_of
from segbatch.metrics.semantic import IDS, ratio
from segbatch.metrics.semantic_errors import (
    BOUNDARY,
    Numbers,
    Stretches,
    added,
    compiled,
    interior_of,
    size_of,
    stretches_of,
    sums_of,
)
from segbatch.records import ClassInfo, ClassTable, Figure

CONFIDENT = 0.9
"""Least confidence of what contradicts the ground truth."""

REGION_SHARE = 0.0005
"""Least size of a region, as a part of the image's pixels."""

REGION_PIXELS = 100
"""Least size of a region in pixels."""

APART = 0.1
"""Below this IoU a detection and an object have nothing to do with each other."""

SAME = 0.75
"""From this IoU on a detection and an object are the same thing."""

PER_IMAGE = 20
"""The most severe so many candidates of a kind are kept of each image."""

_CLEAN = "clean_images"


# -- label maps --------------------------------------------------------------------------------------------------------


class Regions(NamedTuple):
    """Regions of an image where prediction and ground truth disagree; int64 of shape (n,).

    Attributes:
        truth, predicted: label ids.
        pixels: size.
        core: pixels that see nothing but the region within the width of a boundary.
        x, y, width, height: the box around it, in pixels.
        levels: sum of its confidences times 255; -1 where there are none.
    """

    truth: Numbers
    predicted: Numbers
    pixels: Numbers
    core: Numbers
    x: Numbers
    y: Numbers
    width: Numbers
    height: Numbers
    levels: Numbers

    def at(self, chosen: NDArray[Any]) -> "Regions":
        """Those that are chosen, by places or flags."""
        return Regions(*(numbers[chosen] for numbers in self))

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Mean confidence; NaN where there is none."""
        found: NDArray[np.float64] = np.where(self.levels < 0, np.nan, self.levels / (self.pixels * TOP))
        return found

    @property
    def severity(self) -> NDArray[np.float64]:
        """What regions are ranked by: ``core`` times mean confidence, or ``core`` where there is none."""
        certainty: NDArray[np.float64] = np.nan_to_num(self.confidence, nan=1.0)
        return certainty * self.core


class LabelErrorsMetric(ArrayMetric):
    """Protocol ``label-errors``: regions of label maps whose ground truth may be wrong.

    A candidate is a region, 4-connected, of one ground-truth class that is predicted as one other class throughout

    - of 0.05 % of the image's pixels or more, at least 100;
    - that is no band along an outline: some pixel of it has no other pair of classes within d pixels in a square (as
      far as it lies in the image), d = max(1, round(0.005 * diagonal)); the option ``boundary`` sets the 0.005;
    - with a mean confidence of .9 or more, where the masks hold confidence maps (`segbatch predict --confidence`).

    Void and labels that the class table lacks make no candidates, neither as ground truth nor as prediction.

    ``label_errors`` counts the candidates, ``label_error_pixels`` is their part of the pixels whose ground truth
    counts; both over all classes and by ground-truth class. ``clean_images`` is the part of the images without any.

    ``details`` has a row of kind ``label-error:region`` for each of the 20 most severe candidates of an image, all
    images together, the most severe first: ``rank`` (from 1), ``severity`` (pixels that have no other pair of classes
    within d pixels, times the mean confidence), ``pixels``, the box ``x``, ``y``, ``width``, ``height``, ``confidence``
    (null where the masks have none), ``truth_label`` and ``predicted_label`` (label ids). The class is that of the
    ground truth.

    ``ImageScore.score`` is the part of the image's pixels outside of candidates.

    State: 72 bytes per candidate that is kept; 24 per class.
    """

    name: ClassVar[str] = "label-errors"
    source: ClassVar[str] = "segbatch: large regions of one wrong class, confident where confidence is known"
    headline: ClassVar[str] = _CLEAN
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic", "confidence")
    accepts: ClassVar[frozenset[str]] = frozenset({"boundary"})
    unbounded: ClassVar[frozenset[str]] = frozenset({"label_errors"})

    def __init__(self, classes: ClassTable, options: MetricOptions = DEFAULTS) -> None:
        """
        Raises:
            ConfigError: the boundary's width is not above 0 and at most 1.
        """
        self._classes = classes
        self._scored: tuple[ClassInfo, ...] = classes.scored
        self._part = boundary_part(options, BOUNDARY)
        self._place = np.full(IDS, len(self._scored), np.intp)
        self._place[[c.label_id for c in self._scored]] = np.arange(len(self._scored))
        self.fields = {  # type: ignore[misc]  # as many rows as there are classes
            "regions": Field(len(Regions._fields)),
            "classes": Field(3, merge="add", rows=len(self._scored)),
            "images": Field(2, merge="add"),
        }

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Candidates of one image, found on the runs; pixels are looked at only where there are large regions.

        Raises:
            DataError: ``size-mismatch``, ``bad-runs``, ``bad-confidence``.
        """
        every, size = stretches_of(truth, predicted), size_of(truth)
        regions = self._candidates(every, size, confidence_of(truth, predicted))
        n = len(self._scored)
        place = self._place[regions.truth]
        of_class = [np.bincount(place, minlength=n + 1), added(place, regions.pixels, n + 1)]
        of_class.append(added(self._place[every.truth], every.pixels, n + 1))
        classes = np.stack(of_class, axis=1)
        kept = regions.at(np.argsort(-regions.severity, kind="stable")[:PER_IMAGE])
        images = np.array([1, not len(regions.truth)])
        values = {"regions": np.stack(kept, axis=1), "classes": classes[:n], "images": images}
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    def _candidates(self, every: Stretches, size: tuple[int, int], confidence: NDArray[np.uint8] | None) -> Regions:
        n = len(self._scored)
        known = (self._place[every.truth] < n) & (self._place[every.predicted] < n)
        wrong = every.at(known & (every.truth != every.predicted))
        roots = _components(wrong, size)
        least = max(REGION_PIXELS, REGION_SHARE * size[0] * size[1])
        large = added(roots, wrong.pixels)[roots] >= least
        found, places = wrong.at(large), np.unique(roots[large], return_inverse=True)[1]
        if not len(places):
            return Regions(*(np.empty(0, np.int64) for _ in Regions._fields))
        inside = interior_of(every, every.pairs, size, boundary_width(*size, self._part))
        regions = _regions(found, places, size, inside, confidence)
        unsure = regions.confidence < CONFIDENT
        return regions.at((regions.core > 0) & ~unsure)

    def compute(self, total: Arrays) -> list[Figure]:
        """Over all classes, then by ground-truth class; support is the ground truth's pixels, or the images."""
        rows = total.values["classes"].tolist()
        images, clean = total.values["images"][0].tolist()
        whole = [sum(column) for column in zip(*rows, strict=True)] if rows else [0, 0, 0]
        found = _pixel_figures(whole, "")
        found.append(Figure(_CLEAN, ratio(clean, images), support=images))
        by_class = [_pixel_figures(row, c.name) for c, row in zip(self._scored, rows, strict=True)]
        return [*found, *(pair[i] for i in range(2) for pair in by_class)]

    def image(self, state: Arrays) -> ImageScore:
        """Part of the pixels that lie outside of candidates; None where none counts."""
        _, inside, pixels = state.values["classes"].sum(axis=0).tolist()
        return ImageScore(ratio(pixels - inside, pixels), ())

    def confusion(self, total: Arrays) -> None:
        """None: see protocol ``semantic-errors``."""

    def details(self, total: Arrays) -> Iterable[Detail]:
        """The candidates, the most severe first; between equal ones the order of the images decides."""
        ordered = total.in_order()
        regions, images = Regions(*ordered.values["regions"].T), ordered.of_images("regions")
        severity, confidence = regions.severity, regions.confidence
        for rank, i in enumerate(np.argsort(-severity, kind="stable").tolist(), 1):
            values: dict[str, float | None] = {"rank": float(rank), "severity": float(severity[i])}
            values |= {name: float(getattr(regions, name)[i]) for name in ("pixels", "x", "y", "width", "height")}
            values["confidence"] = None if np.isnan(confidence[i]) else float(confidence[i])
            label = int(regions.truth[i])
            values |= {"truth_label": float(label), "predicted_label": float(regions.predicted[i])}
            place = images[i]
            yield Detail(
                "label-error:region",
                values,
                group_id=ordered.groups[place] or None,
                sample_id=ordered.images[place],
                class_name=self._scored[self._place[label]].name,
                predicted_class=self._classes.name_of(int(regions.predicted[i])),
            )


def _pixel_figures(counts: Sequence[int], class_name: str) -> list[Figure]:
    number, inside, pixels = counts
    return [
        Figure("label_errors", float(number), class_name, support=pixels),
        Figure("label_error_pixels", ratio(inside, pixels), class_name, support=pixels),
    ]


def _components(found: Stretches, size: tuple[int, int]) -> Numbers:
    """For each stretch the first one of its region: 4-connected, of one pair of labels."""
    rows = np.arange(size[0] + 1) * size[1]
    firsts = np.searchsorted(found.begins, rows)
    parents = np.arange(len(found.begins))
    compiled("components")(found.begins, found.ends, found.pairs, firsts, size[1], parents)
    return parents


def _regions(
    found: Stretches,
    places: Numbers,
    size: tuple[int, int],
    inside: NDArray[np.uint8],
    confidence: NDArray[np.uint8] | None,
) -> Regions:
    """The regions that stretches make up, each of them the region at its place."""
    number = int(places.max()) + 1
    first = np.unique(places, return_index=True)[1]
    top, left = np.divmod(found.begins, size[1])
    boxes = [_least(places, values, number) for values in (left, top, -(left + found.pixels), -(top + 1))]
    levels = np.full(number, -1) if confidence is None else added(places, sums_of(found, confidence), number)
    return Regions(
        truth=found.truth[first],
        predicted=found.predicted[first],
        pixels=added(places, found.pixels, number),
        core=added(places, sums_of(found, inside), number),
        x=boxes[0],
        y=boxes[1],
        width=-boxes[2] - boxes[0],
        height=-boxes[3] - boxes[1],
        levels=levels,
    )


def _least(places: Numbers, values: Numbers, number: int) -> Numbers:
    found = np.full(number, np.iinfo(np.int64).max)
    np.minimum.at(found, places, values)
    return found


# -- instances ---------------------------------------------------------------------------------------------------------

KINDS = ("class", "missing", "spurious")
"""Kinds of candidates among objects, in the order of ``details``."""

_CLASS, _MISSING, _SPURIOUS = range(len(KINDS))
_INTEGERS = ("kind", "label", "truth_id", "predicted_id", "truth_label", "predicted_label")
_REALS = ("severity", "pixels", "x", "y", "width", "height", "score", "iou")
_NONE = -1

Candidates = list[tuple[tuple[int, ...], tuple[float, ...]]]
"""Entries of ``_INTEGERS`` and ``_REALS`` for each candidate; ``_NONE`` for what it has not."""


class LabelErrorsInstanceMetric(ArrayMetric):
    """Protocol ``label-errors-instance``: objects whose label may be wrong, and some that may lack one.

    - ``class``: an object that is the best match, of all classes, of a detection with score .9 or more, at IoU .75 or
      more, whose class is another one; unless a detection of the object's own class with at least that score has IoU
      .75 or more with it. Of several such detections the one with the greatest score counts. Severity: score * IoU.
    - ``missing``: a detection with score .9 or more with no object, of any class, at IoU .1 or more. Severity: its
      score.
    - ``spurious``: an object with no detection, of any class and score, at IoU .1 or more. Severity: its area, because
      models overlook what is small.

    IoUs are those of masks. Crowds and objects of ignored classes are never candidates, but what lies on them (of a
    crowd the part of the detection that it covers) is not missing. Detections of ignored classes are not looked at.
    Which objects are found spurious depends on the least score that ``predict`` keeps.

    ``label_errors`` counts the candidates, ``label_errors_class``, ``label_errors_missing``, ``label_errors_spurious``
    those of a kind, each over all classes and by the object's class (of missing ones: the detection's).
    ``clean_images`` is the part of the images without any.

    ``details`` has rows of kind ``label-error:class``, ``label-error:missing``, ``label-error:spurious``, in this
    order: of each image the 20 most severe ones of a kind; of each kind the most severe first, those with equal
    severity by size. ``rank`` (from 1, within the kind), ``severity``, ``pixels``, the box ``x``, ``y``, ``width``,
    ``height`` (of the object; of what is missing: of the detection), ``score``, ``iou``, ``truth_label``,
    ``predicted_label`` (label ids); null where there is none. ``truth_id`` is the object, ``predicted_id`` the
    detection.

    ``ImageScore.score``: the part of objects and missing objects that are no candidates.

    State: 112 bytes per candidate that is kept, 32 per class.
    """

    name: ClassVar[str] = "label-errors-instance"
    source: ClassVar[str] = "segbatch: confident detections that contradict objects, objects that nothing overlaps"
    headline: ClassVar[str] = _CLEAN
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    unbounded: ClassVar[frozenset[str]] = frozenset({"label_errors", *(f"label_errors_{kind}" for kind in KINDS)})

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: no class is scored.
        """
        self._scored = scored_classes(classes, self.name)
        self._places = Places(classes)
        self._names = {c.label_id: c.name for c in self._scored}
        self.fields = {  # type: ignore[misc]  # as many rows as there are classes
            "integers": Field(len(_INTEGERS)),
            "reals": Field(len(_REALS), real=True),
            "classes": Field(len(KINDS) + 1, merge="add", rows=len(self._scored)),
            "images": Field(2, merge="add"),
        }

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Candidates of one image.

        Raises:
            DataError: ``size-mismatch``, ``bad-mask``, ``bad-score`` (outside 0..1), ``duplicate-id``,
                ``unknown-class``.
        """
        same_size(truth, predicted)
        found = instances_of(predicted)
        check(found, truth)
        return self._compared(truth, found)

    def empty(self, truth: Row) -> Arrays:
        """An image without a row of masks: nothing was found.

        Raises:
            DataError: ``unknown-class``, ``bad-mask``.
        """
        return self._compared(truth, NO_INSTANCES)

    def _compared(self, truth: Row, found: Instances) -> Arrays:
        objects = instances_of(truth)
        scored, target = self._places.of(found, truth) >= 0, self._places.of(objects, truth) >= 0
        overlaps = overlaps_of("segm", truth, objects, found, APART)
        ious = overlaps.ious * scored[:, None]
        target &= objects.crowd == 0
        sure = scored & (found.score >= CONFIDENT)
        candidates = [
            *_of_class(ious, sure, target, found, objects),
            *_missing(ious, sure, found, overlaps.areas),
            *_spurious(ious, target, objects),
        ]
        classes = np.zeros((len(self._scored), len(KINDS) + 1), np.int64)
        place = {c.label_id: i for i, c in enumerate(self._scored)}
        for ids, _ in candidates:
            classes[place[ids[1]], ids[0]] += 1
        for label in objects.category[target].tolist():
            classes[place[label], -1] += 1
        kept = _most_severe(candidates)
        values = {
            "integers": np.array([ids for ids, _ in kept], np.int64),
            "reals": np.array([numbers for _, numbers in kept], np.float64),
            "classes": classes,
            "images": np.array([1, not candidates]),
        }
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    def compute(self, total: Arrays) -> list[Figure]:
        """Over all classes, then by class; support is the objects, or the images."""
        rows = total.values["classes"]
        images, clean = total.values["images"][0].tolist()
        whole = _count_figures(rows.sum(axis=0).tolist(), "")
        whole.append(Figure(_CLEAN, ratio(clean, images), support=images))
        by_class = [_count_figures(row, c.name) for c, row in zip(self._scored, rows.tolist(), strict=True)]
        return [*whole, *(figure for same in zip(*by_class, strict=True) for figure in same)]

    def image(self, state: Arrays) -> ImageScore:
        """See above; None where there is neither an object nor a candidate."""
        wrong_class, missing, spurious, objects = state.values["classes"].sum(axis=0).tolist()
        return ImageScore(ratio(objects - wrong_class - spurious, objects + missing), ())

    def confusion(self, total: Arrays) -> None:
        """None: see ``details``."""

    def details(self, total: Arrays) -> Iterable[Detail]:
        """The candidates of each kind, the most severe first; at last the order of the images decides."""
        ordered = total.in_order()
        ids, numbers, images = ordered.values["integers"], ordered.values["reals"], ordered.of_images("integers")
        for kind, name in enumerate(KINDS):
            mine = np.flatnonzero(ids[:, 0] == kind)
            order = mine[np.lexsort((-numbers[mine, 1], -numbers[mine, 0]))]
            for rank, i in enumerate(order.tolist(), 1):
                _, label, truth_id, predicted_id, *labels = ids[i].tolist()
                known = dict(zip(_REALS, numbers[i].tolist(), strict=True))
                missing = {n: None for n in ("score", "iou") if known[n] == _NONE}
                named = zip(("truth_label", "predicted_label"), labels, strict=True)
                yield Detail(
                    f"label-error:{name}",
                    {
                        "rank": float(rank),
                        **known,
                        **missing,
                        **{n: None if v == _NONE else float(v) for n, v in named},
                    },
                    group_id=ordered.groups[images[i]] or None,
                    sample_id=ordered.images[images[i]],
                    class_name=self._names[label],
                    predicted_class=None if labels[1] == _NONE else self._names[labels[1]],
                    truth_id=None if truth_id == _NONE else truth_id,
                    predicted_id=None if predicted_id == _NONE else predicted_id,
                )


def _count_figures(counts: Sequence[int], class_name: str) -> list[Figure]:
    *of_kind, objects = counts
    numbers: Mapping[str, int] = {
        "label_errors": sum(of_kind),
        **{f"label_errors_{kind}": n for kind, n in zip(KINDS, of_kind, strict=True)},
    }
    return [Figure(name, float(n), class_name, support=objects) for name, n in numbers.items()]


def _of_class(
    ious: NDArray[np.float64],
    sure: NDArray[np.bool_],
    target: NDArray[np.bool_],
    found: Instances,
    objects: Instances,
) -> Candidates:
    """Objects under another class than a confident detection says; ``target``: those that may be candidates."""
    if not ious.size:
        return []
    own = found.category[:, None] == objects.category
    real = np.where(objects.crowd == 0, ious, 0.0)
    greatest = real == real.max(axis=1, keepdims=True)
    best = np.argmax(greatest.astype(np.int64) + (greatest & own), axis=1)  # between equal IoUs the own class
    same = real >= SAME
    backing = np.where(same & own, found.score[:, None], -1.0).max(axis=0)
    worst: dict[int, int] = {}
    for d in np.flatnonzero(sure).tolist():
        o = int(best[d])
        is_other = target[o] and same[d, o] and not own[d, o] and backing[o] < found.score[d]
        if is_other and (o not in worst or found.score[d] > found.score[worst[o]]):
            worst[o] = d
    candidates: Candidates = []
    for o, d in sorted(worst.items()):
        score, iou = float(found.score[d]), float(ious[d, o])
        labels = int(objects.category[o]), int(found.category[d])
        ids = (_CLASS, labels[0], int(objects.ids[o]), int(found.ids[d]), *labels)
        candidates.append((ids, (score * iou, float(objects.area[o]), *_box(objects, o), score, iou)))
    return candidates


def _missing(
    ious: NDArray[np.float64], sure: NDArray[np.bool_], found: Instances, areas: NDArray[np.float64]
) -> Candidates:
    """Confident detections of what is no object."""
    candidates: Candidates = []
    for d in np.flatnonzero(sure & (ious < APART).all(axis=1)).tolist():
        label, score = int(found.category[d]), float(found.score[d])
        ids = (_MISSING, label, _NONE, int(found.ids[d]), _NONE, label)
        candidates.append((ids, (score, float(areas[d]), *_box(found, d), score, _NONE)))
    return candidates


def _spurious(ious: NDArray[np.float64], target: NDArray[np.bool_], objects: Instances) -> Candidates:
    """Objects that nothing was found at."""
    candidates: Candidates = []
    for o in np.flatnonzero(target & (ious < APART).all(axis=0)).tolist():
        label, area = int(objects.category[o]), float(objects.area[o])
        ids = (_SPURIOUS, label, int(objects.ids[o]), _NONE, label, _NONE)
        candidates.append((ids, (area, area, *_box(objects, o), _NONE, _NONE)))
    return candidates


def _box(instances: Instances, place: int) -> tuple[float, ...]:
    return tuple(instances.boxes[4 * place : 4 * place + 4].tolist())


def _most_severe(candidates: Candidates) -> Candidates:
    """The first few of each kind; see ``PER_IMAGE``."""
    ordered = sorted(candidates, key=lambda c: (c[0][0], -c[1][0], -c[1][1]))
    firsts = [c for kind in range(len(KINDS)) for c in [o for o in ordered if o[0][0] == kind][:PER_IMAGE]]
    return firsts
