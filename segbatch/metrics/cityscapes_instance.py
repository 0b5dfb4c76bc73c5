"""Cityscapes' instance-level figures: AP and AP50%.

Source: github.com/mcordts/cityscapesScripts, version 2.3.0: ``evaluation/evalInstanceLevelSemanticLabeling.py``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import columns as run_columns
from segbatch.codecs.runlength import Runs
from segbatch.errors import DataError
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import OUTCOMES, ClassCount, Confusion, ImageScore, Match, Row, same_size
from segbatch.metrics.cityscapes import HINT, IGNORED, LABELS, OBJECTS, SCORED, compiled, official_classes
from segbatch.metrics.coco_matching import bad_mask, check
from segbatch.metrics.columns import Instances, instances_of
from segbatch.records import ClassInfo, ClassTable, Figure

THRESHOLDS: NDArray[np.float64] = np.arange(0.5, 1.0, 0.05)
"""An overlap counts where it is greater."""

_ALL = (1 << len(THRESHOLDS)) - 1
_SMALLEST = 100
"""Pixels of an object that counts."""

_NEVER, _ALWAYS = -1, -2
"""In place of the class of an object that no detection can meet, or every one."""

_TP, _FP, _FN, _OTHER = range(4)

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the two evaluators differ in.

    Attributes:
        groups: objects that were not told apart (crowds): ``ignored``, or ``objects`` like any other.
        void: label ids whose pixels are void.
    """

    groups: Literal["ignored", "objects"]
    void: frozenset[int]


class _Image(NamedTuple):
    """Detections and objects of one image.

    Attributes:
        found, objects: as the tables have them.
        classes, object_classes: places in ``OBJECTS``; ``_NEVER`` for classes that do not count, ``_ALWAYS`` for
            numbered objects of ignored classes.
        areas, object_areas: pixels.
        shared: pixels that a detection shares with an object of its class, (detections, objects).
        overlaps: IoU likewise.
        counts: objects that count.
        ignored: share of each detection on void, groups and small objects, as the official script adds them up.
    """

    found: Instances
    objects: Instances
    classes: Numbers
    object_classes: Numbers
    areas: Numbers
    object_areas: Numbers
    shared: Numbers
    overlaps: Floats
    counts: NDArray[np.bool_]
    ignored: Floats


class _Outcomes(NamedTuple):
    """What becomes of detections: rows of ``outcomes`` and ``scores``, and of ``matches`` and ``overlaps``."""

    outcomes: list[tuple[int, int, int]]
    scores: list[float]
    matches: list[tuple[int, int, int, int]]
    overlaps: list[tuple[float, float]]


class CityscapesInstanceMetric(ArrayMetric):
    """Protocol ``cityscapes-instance``: all float64 bits of the official script, which prints three decimals.

    ``ap`` (mean over the overlaps .50:.05:.95) and ``ap50`` over all classes are its allAp and allAp50%; by class they
    are its ap and ap50%. NaN, of a class without objects, is no value.

    A detection meets objects of its class where IoU is greater than the overlap asked for. The best one of an object is
    right, the others are wrong. One that meets nothing is wrong too, unless a greater part of it than that overlap lies
    on void, groups and objects of less than 100 pixels, of which a small group counts twice. One that meets a group or
    a small object is neither. Detections without pixels, and those of other classes, are left out.

    - Void are the ignored classes of the label map, but not the numbered objects of caravan and trailer. The official
      script takes all of that from instanceIds; where labelIds disagree, ingest says so.
    - Where all detections of a class are ignored its AP is 0; the official script stops with an IndexError.
    - Distances, for AP50m and AP100m, are not in the ground truth that is published.
    - Scores are 0..1. Detections of 11 to 18 alone are refused: these are trainIds.

    ``ImageScore.matches`` tells what became of detections and objects at the overlap .50; groups and small objects that
    nothing meets are ``ignored``.

    State: 32 bytes per detection, twice that where the overlap decides, and 64 in all; 48 bytes more per detection or
    object in the state table.
    """

    name: ClassVar[str] = "cityscapes-instance"
    source: ClassVar[str] = "cityscapesscripts 2.3.0, evalInstanceLevelSemanticLabeling.py, float64 before it prints"
    headline: ClassVar[str] = "ap"
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances", "semantic")
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    fields: ClassVar[Mapping[str, Field]] = {
        "outcomes": Field(3),
        "scores": Field(real=True),
        "objects": Field(merge="add", rows=len(OBJECTS)),
        "matches": Field(4, merge="drop"),
        "overlaps": Field(2, real=True, merge="drop"),
    }
    """Place in ``OBJECTS``, bits of the overlaps at which a detection is right, bits of those at which it is wrong; its
    score; objects that count, by class; place, id of the object and of the detection (-1 for none), place of the
    outcome; IoU and score (-1 for none)."""

    rules: ClassVar[Rules] = Rules(groups="ignored", void=IGNORED)

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: these are not the classes of Cityscapes.
        """
        table = official_classes(self.name, classes)
        self.scored: tuple[ClassInfo, ...] = tuple(c for c in table.scored if c.label_id in OBJECTS)

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Match the detections of one image; counted on the runs, no mask is decoded.

        Raises:
            DataError: ``size-mismatch``; ``no-semantic`` where the image has no label map, which tells void;
                ``bad-runs``; ``bad-mask``; ``bad-score``; ``duplicate-id``; ``unknown-class`` for ids that are no
                label ids, trainIds among them.
        """
        image = self._image(truth, predicted)
        made = _Outcomes([], [], [], [])
        met = _meet_objects(image, made)
        _add_wrong(image, met, made)
        for j in np.flatnonzero((image.object_classes >= 0) & ~image.counts).tolist():
            _say(image, made, _OTHER, None, j)
        values = {
            "outcomes": np.array(made.outcomes, np.int64),
            "scores": np.array(made.scores),
            "objects": _by_class(image.object_classes[image.counts]),
            "matches": np.array(made.matches, np.int64),
            "overlaps": np.array(made.overlaps),
        }
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    def _image(self, truth: Row, predicted: Row) -> _Image:
        height, width = same_size(truth, predicted)
        found, objects = instances_of(predicted), instances_of(truth)
        check(found, truth)
        _check_classes(objects, truth, "an object")
        _check_classes(found, truth, "a detection")
        _refuse_train_ids(found, truth)
        groups = (objects.crowd > 0) & (self.rules.groups == "ignored")
        classes, object_classes = _places(found.category), _places(objects.category)
        numbered = np.isin(objects.category, list(self.rules.void)) & ~groups
        sides = classes, np.where(numbered, _ALWAYS, object_classes)
        areas, object_areas = np.empty(len(classes), np.int64), np.empty(len(object_classes), np.int64)
        shared = np.zeros((len(classes), len(object_classes)), np.int64)
        masks = (found.text, found.starts, sides[0]), (objects.text, objects.starts, sides[1])
        outputs = (areas, object_areas, shared)
        bad = compiled("shared_pixels")(*masks[0], *masks[1], height, height * width, *outputs)
        if bad >= 0:
            raise bad_mask(truth, objects, found, bad)
        void = self._void(truth, found, height, width) - shared[:, numbered].sum(axis=1)
        shared[:, numbered] = 0
        small = object_areas < _SMALLEST
        ignored = void + shared @ (groups.astype(np.int64) + small)
        counts = (object_classes >= 0) & ~groups & ~small & ~numbered
        union = areas[:, None] + object_areas - shared
        return _Image(
            *(found, objects, *sides, areas, object_areas, shared),
            overlaps=shared / np.maximum(union, 1),
            counts=counts,
            ignored=ignored / np.maximum(areas, 1),
        )

    def _void(self, truth: Row, found: Instances, height: int, width: int) -> Numbers:
        """Pixels of each detection on void, numbered objects among them."""
        runs = _runs(truth, height * width)
        counts = np.zeros((len(found.ids), LABELS + 1), np.int64)
        compiled("label_pixels")(found.text, found.starts, height, width, *runs, counts)
        pixels: Numbers = counts[:, sorted(self.rules.void)].sum(axis=1)
        return pixels

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Arrays) -> list[Figure]:
        """``ap`` and ``ap50`` over all classes, then by class. Support is objects that count."""
        precision = _precisions(total)
        objects = total.flat("objects").tolist()
        whole = sum(objects)
        defined = not np.isnan(precision).all()
        figures = [
            Figure("ap", float(np.nanmean(precision)) if defined else None, support=whole),
            Figure("ap50", float(np.nanmean(precision[:, 0])) if defined else None, support=whole),
        ]
        values = {"ap": [float(np.mean(p)) for p in precision], "ap50": precision[:, 0].tolist()}
        for name, by_class in values.items():
            for c, value, number in zip(self.scored, by_class, objects, strict=True):
                figures.append(Figure(name, None if np.isnan(value) else value, c.name, support=number))
        return figures

    def image(self, state: Arrays) -> ImageScore:
        """Mean AP over the classes with objects that count, as if it were the only image; counts are those at .50."""
        precision = _precisions(state)
        score = None if np.isnan(precision).all() else float(np.nanmean(precision))
        places, right, wrong = state.values["outcomes"].T
        tp, fp = (_by_class(places[(bits & 1) > 0]).tolist() for bits in (right, wrong))
        objects = state.flat("objects").tolist()
        classes = tuple(
            ClassCount(c.name, c.label_id, tp[i], fp[i], objects[i] - tp[i])
            for i, c in enumerate(self.scored)
            if objects[i] or fp[i]
        )
        return ImageScore(score, classes, tuple(self._matches(state)))

    def _matches(self, state: Arrays) -> Iterable[Match]:
        rows = zip(state.values["matches"].tolist(), state.values["overlaps"].tolist(), strict=True)
        for (place, truth, predicted, outcome), (iou, score) in rows:
            c = self.scored[place]
            ids = [None if i < 0 else i for i in (truth, predicted)]
            values = [None if v < 0 else v for v in (iou, score)]
            yield Match(c.name, c.label_id, ids[0], ids[1], values[0], values[1], OUTCOMES[outcome])

    def confusion(self, total: Arrays) -> Confusion | None:
        """None: objects are matched with detections of their own class only."""
        return None


def _meet_objects(image: _Image, made: _Outcomes) -> Numbers:
    """Match detections with objects that count; gives the bits of the overlaps at which each one meets anything."""
    order = np.argsort(-image.found.score, kind="stable")
    for j in np.flatnonzero(image.counts).tolist():
        taken = 0
        for i in order[image.overlaps[order, j] > THRESHOLDS[0]].tolist():
            bits = int(_bits_below(image.overlaps[i, j]))
            _add(image, made, i, bits & ~taken, bits & taken)
            _say(image, made, _FP if taken else _TP, i, j)
            taken |= bits
        if not taken:
            _say(image, made, _FN, None, j)
    return _bits_below(image.overlaps.max(axis=1, initial=0.0))


def _add_wrong(image: _Image, met: Numbers, made: _Outcomes) -> None:
    """Detections that meet nothing and are not ignored."""
    wrong = ~met & ~_bits_below(image.ignored) & _ALL
    told = {match[2] for match in made.matches}
    for i in np.flatnonzero((image.classes >= 0) & (image.areas > 0)).tolist():
        if wrong[i]:
            _add(image, made, i, 0, int(wrong[i]))
        if int(image.found.ids[i]) not in told:
            _say(image, made, _FP if wrong[i] & 1 else _OTHER, i, None)


def _add(image: _Image, made: _Outcomes, detection: int, right: int, wrong: int) -> None:
    """A row of ``outcomes`` and of ``scores``."""
    made.outcomes.append((int(image.classes[detection]), right, wrong))
    made.scores.append(float(image.found.score[detection]))


def _say(image: _Image, made: _Outcomes, outcome: int, detection: int | None, obj: int | None) -> None:
    """A row of ``matches`` and of ``overlaps``."""
    place, truth_id, predicted_id, iou, score = -1, -1, -1, -1.0, -1.0
    if obj is not None:
        place, truth_id = int(image.object_classes[obj]), int(image.objects.ids[obj])
    if detection is not None:
        place, predicted_id = int(image.classes[detection]), int(image.found.ids[detection])
        score = float(image.found.score[detection])
    if obj is not None and detection is not None:
        iou = float(image.overlaps[detection, obj])
    made.matches.append((place, truth_id, predicted_id, outcome))
    made.overlaps.append((iou, score))


def _bits_below(values: Any) -> Numbers:
    """Bits of the thresholds that are less than each value."""
    found: Numbers = (np.int64(1) << np.searchsorted(THRESHOLDS, values).astype(np.int64)) - 1
    return found


def _places(category: Numbers) -> Numbers:
    """Places of label ids in ``OBJECTS``, ``_NEVER`` for others."""
    table = np.full(LABELS, _NEVER)
    table[list(OBJECTS)] = np.arange(len(OBJECTS))
    found: Numbers = table[category]
    return found


def _by_class(places: Numbers) -> Numbers:
    return np.bincount(places, minlength=len(OBJECTS))


def _check_classes(instances: Instances, row: Row, what: str) -> None:
    strange = instances.category[(instances.category < 0) | (instances.category >= LABELS)]
    if len(strange):
        problem = f"sample {row.text('sample_id')} has {what} of class {strange[0]}"
        raise DataError(problem, HINT, "unknown-class")


def _refuse_train_ids(found: Instances, row: Row) -> None:
    """Refuse detections of which all are of classes 11 to 18: trainIds of things, and label ids of stuff."""
    first = SCORED.index(OBJECTS[0])
    if len(found.category) and np.isin(found.category, range(first, len(SCORED))).all():
        problem = f"sample {row.text('sample_id')}: the detections hold trainIds, {first} to {len(SCORED) - 1}"
        raise DataError(problem, HINT, "unknown-class")


def _runs(truth: Row, area: int) -> Runs:
    runs = run_columns.runs_at(truth.column("semantic"), truth.index)
    name = truth.text("sample_id")
    if runs is None:
        raise DataError(f"sample {name} has no label map, which tells void", "ingest it with its labels", "no-semantic")
    if int(runs.lengths.sum(dtype=np.uint64)) != area:
        problem = f"sample {name}: the runs of the ground truth do not fill its {area} pixels"
        raise DataError(problem, "write that table again", "bad-runs")
    return runs


def _precisions(total: Arrays) -> Floats:
    """AP by class and overlap, float64 of shape (OBJECTS, THRESHOLDS); NaN for a class without objects."""
    found = np.full((len(OBJECTS), len(THRESHOLDS)), np.nan)
    places, right, wrong = total.values["outcomes"].T
    scores, objects = total.flat("scores"), total.flat("objects")
    for place in np.flatnonzero(objects).tolist():
        mine = np.flatnonzero(places == place)
        mine = mine[np.argsort(scores[mine], kind="stable")]
        for bit in range(len(THRESHOLDS)):
            hit = (right[mine] >> bit) & 1
            counts = (hit | ((wrong[mine] >> bit) & 1)) > 0
            found[place, bit] = _average_precision(scores[mine][counts], hit[counts], int(objects[place]))
    return found


def _average_precision(scores: Floats, hit: Numbers, objects: int) -> float:
    """The area below the steps of precision and recall.

    Sums are NumPy's ``convolve`` and ``dot``, as in the official script: their bits are those of the machine.

    Args:
        scores: of the detections that count, ascending.
        hit: 1 for those that are right.
        objects: that count.
    """
    if not len(scores):
        return 0.0
    firsts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    before = np.concatenate([[0], np.cumsum(hit)])
    tp = before[-1] - before[firsts]
    precision = np.append(tp / (len(scores) - firsts), 1.0)
    recall = np.append(tp / objects, 0.0)
    widths = np.convolve(np.concatenate([recall[:1], recall, [0.0]]), [-0.5, 0, 0.5], "valid")
    return float(np.dot(precision, widths))
