"""Detections of one image matched with its objects, as pycocotools matches them.

Source: pycocotools 2.0.11, ``cocoeval.py`` (github.com/ppwwyyxx/cocoapi), ``computeIoU`` and ``evaluateImg``; for
boundaries github.com/bowenc0221/boundary-iou-api, commit 37d2558.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError, DataError
from segbatch.metrics.base import MetricOptions, Row
from segbatch.metrics.boundaries import BOUNDARY, boundary_width
from segbatch.metrics.coco_figures import Matches, Rules, boundary_overlaps, compiled, ranks_of
from segbatch.metrics.coco_states import partners
from segbatch.metrics.columns import Instances, instances_of
from segbatch.records import ClassInfo, ClassTable

WORD = 64
"""Combinations of range and threshold that a state holds."""

_BELOW_ONE = 1 - 1e-10
"""The greatest IoU that is asked for: at a threshold of 1 rounding must not decide."""


def scored_classes(classes: ClassTable, protocol: str) -> tuple[ClassInfo, ...]:
    """The classes that count.

    Raises:
        ConfigError: there is none.
    """
    if not classes.scored:
        raise ConfigError(f"protocol {protocol} needs classes, the samples name none", "name them and ingest again")
    return classes.scored


def rules_of(official: Rules, options: MetricOptions) -> Rules:
    """The official rules, with what the caller has set.

    Raises:
        ConfigError: IoUs that do not ascend or lie outside 0 < IoU <= 1, numbers of detections that do not ascend from
            1 on, or more combinations of IoU and range of size than a state holds.
    """
    ious, most = options.ious or official.thresholds, options.max_detections or official.detections
    if not _ascend([0.0, *ious]) or not ious[-1] <= 1:
        raise ConfigError(f"IoUs are {_words(ious)}", "give them in ascending order, above 0 and at most 1")
    if not _ascend([0, *most]):
        raise ConfigError(f"numbers of detections are {_words(most)}", "give them in ascending order, from 1 on")
    rules = Rules(ious, official.recalls, most, official.proposals, official.ranges)
    if rules.bits > WORD:
        problem = f"{len(ious)} IoUs for {len(rules.ranges)} ranges of size are too many"
        raise ConfigError(problem, f"a state holds {WORD} combinations: give {WORD // len(rules.ranges)} IoUs at most")
    return rules


def _ascend(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _words(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


class _Order(NamedTuple):
    """Detections or objects in the order in which they are matched: their places, and their classes, int64 (n,)."""

    places: NDArray[np.int64]
    classes: NDArray[np.int64]


class _Overlaps(NamedTuple):
    """IoUs, float64 of shape (detections, objects), and areas of the detections, float64 of shape (detections,)."""

    ious: NDArray[np.float64]
    areas: NDArray[np.float64]


class _Partners(NamedTuple):
    """Of detections in their order: place of each one's object in the order of objects, int64, -1 for none; the IoU."""

    places: NDArray[np.int64]
    ious: NDArray[np.float64]


_NOBODY = _Partners(np.empty(0, np.int64), np.empty(0))
"""For who does not ask."""


class Places:
    """Label ids of a class table as places among the scored ones.

    Attributes:
        ids: label ids of the scored classes, ascending, int64.
    """

    def __init__(self, classes: ClassTable) -> None:
        self.ids = np.array(sorted(c.label_id for c in classes.scored), np.int64)
        self._known = np.array([c.label_id for c in classes.classes], np.int64)

    def of(self, instances: Instances, row: Row) -> NDArray[np.int64]:
        """Place of each one's label id in ``ids``, -1 for ignored classes.

        Raises:
            DataError: ``unknown-class``.
        """
        places = np.minimum(np.searchsorted(self.ids, instances.category), len(self.ids) - 1)
        scored = self.ids[places] == instances.category
        if scored.all():
            return places
        unknown = instances.category[~np.isin(instances.category, self._known)]
        if len(unknown):
            problem = f"sample {row.text('sample_id')} has an instance of class {unknown[0]}, which the samples lack"
            raise DataError(problem, "give instances the samples' own label ids", "unknown-class")
        return np.where(scored, places, -1)


class Matcher:
    """Matches images; made for a class table, rules, kinds of overlap, and a width of boundaries."""

    def __init__(self, classes: ClassTable, rules: Rules, kinds: tuple[str, ...], boundary: float) -> None:
        self._places = Places(classes)
        self._rules = rules
        self._kinds = kinds
        self._boundary = boundary
        self._thresholds = np.minimum(rules.thresholds, _BELOW_ONE)
        self._least = float(self._thresholds.min())
        self._ranges = np.array(list(rules.ranges.values()), np.float64).ravel()
        self._proposals = np.array(rules.proposals, np.int64)

    def match(self, row: Row, found: Instances) -> Matches:
        """State of an image: a row of samples, and what was detected in it.

        Raises:
            DataError: ``unknown-class``, ``bad-mask``.
        """
        objects = instances_of(row)
        classes, object_classes = self._places.of(found, row), self._places.of(objects, row)
        best = _scored(np.lexsort((-found.score, classes)), classes)
        targets = _scored(np.argsort(object_classes, kind="stable"), object_classes)
        by_score = np.argsort(-found.score[best.places], kind="stable")
        object_ranges = np.zeros(len(objects.area), np.uint64)
        compiled("ranges_of")(objects.area, objects.crowd, self._ranges, object_ranges)
        kept = _few(best.classes, self._rules.detections[-1])
        places = best.places[kept]
        matched, ignored, proposals = {}, {}, {}
        pairs = _Partners(np.full(len(best.places), -1), np.zeros(len(best.places)))
        for kind in self._kinds:
            overlaps = overlaps_of(kind, row, objects, found, self._least, self._boundary)
            words = np.zeros((2, len(best.places)), np.uint64)
            proposals[kind] = np.zeros((1, len(self._proposals), self._rules.bits), np.uint16)
            compiled("match_image")(
                overlaps.ious,
                *best,
                *targets,
                by_score,
                overlaps.areas,
                objects.area,
                objects.crowd,
                self._thresholds,
                self._ranges,
                self._rules.detections[-1],
                self._proposals,
                *words,
                *(pairs if kind == self._kinds[0] else _NOBODY),
                proposals[kind][0],
            )
            matched[kind], ignored[kind] = (w[kept] for w in words)
        name = row.text("sample_id") or ""
        return Matches(
            images=(name,),
            detections=np.array([len(places)]),
            objects=np.array([len(targets.places)]),
            category=found.category[places].astype(np.int32),
            score=found.score[places],
            matched=matched,
            ignored=ignored,
            object_category=objects.category[targets.places].astype(np.int32),
            object_ranges=object_ranges[targets.places],
            proposals=proposals,
            partners=partners(
                name, found.ids[places], pairs.places[kept], pairs.ious[kept], objects.ids[targets.places]
            ),
        )


def overlaps_of(
    kind: str, row: Row, objects: Instances, found: Instances, least: float, boundary: float = BOUNDARY
) -> _Overlaps:
    """IoU of each detection with each object, of a crowd the part of the detection that it covers; and areas.

    Args:
        kind: ``segm``, ``bbox`` or ``boundary``.
        row: the image's row of samples.
        objects, found: its objects and detections.
        least: IoUs of masks below it may be given as any number below it.
        boundary: width of boundaries, as a part of the image's diagonal.

    Raises:
        DataError: ``bad-mask``.
    """
    ious = np.zeros((len(found.category), len(objects.category)))
    if kind == "bbox":
        compiled("box_overlaps")(found.boxes, objects.boxes, objects.crowd, ious)
        return _Overlaps(ious, found.boxes[2::4] * found.boxes[3::4])
    height, width = row.number("height") or 0, row.number("width") or 0
    areas = np.empty(len(found.category), np.int64)
    masks = (found.text, found.starts, objects.text, objects.starts, objects.crowd, height, height * width, least)
    if kind == "boundary":
        bad = boundary_overlaps()(*masks, boundary_width(height, width, boundary), areas, ious)
    else:
        bad = compiled("mask_overlaps")(*masks, areas, ious)
    if bad >= 0:
        raise bad_mask(row, objects, found, bad)
    return _Overlaps(ious, areas.astype(np.float64))


def _scored(order: NDArray[np.int64], classes: NDArray[np.int64]) -> _Order:
    """An order by class without those of class -1, which stand in front."""
    first = int(np.count_nonzero(classes < 0))
    return _Order(order[first:], classes[order[first:]])


def _few(classes: NDArray[np.int64], most: int) -> NDArray[np.bool_] | slice:
    """The first ``most`` of each class; ``classes`` ascending."""
    return ranks_of(classes) < most if len(classes) > most else slice(None)


def check(found: Instances, row: Row) -> None:
    """Make sure that detections can be evaluated.

    Raises:
        DataError: ``bad-score`` (outside 0..1), ``duplicate-id``.
    """
    wrong = np.flatnonzero(~((found.score >= 0) & (found.score <= 1)))
    if len(wrong):
        score, number = found.score[wrong[0]], found.ids[wrong[0]]
        problem = f"sample {row.text('sample_id')}: detection {number} has the score {score}"
        raise DataError(problem, "give scores from 0 to 1", "bad-score")
    if not (found.ids[1:] > found.ids[:-1]).all() and len(set(found.ids.tolist())) < len(found.ids):
        ids, times = np.unique(found.ids, return_counts=True)
        problem = f"sample {row.text('sample_id')} has {times.max()} detections of id {ids[times.argmax()]}"
        raise DataError(problem, "give each an id of its own", "duplicate-id")


def bad_mask(row: Row, objects: Instances, found: Instances, place: int) -> DataError:
    """What is wrong with the mask of a detection, or of the object at ``place - len(found)``."""
    from segbatch.codecs import rle

    rest = place - len(found.ids)
    what, owner, at = ("object", objects, rest) if rest >= 0 else ("detection", found, place)
    try:
        rle.check(owner.counts(at), row.number("height") or 0, row.number("width") or 0)
        reason = "cannot be read"
    except ValueError as error:
        reason = str(error)
    problem = f"sample {row.text('sample_id')}: the mask of {what} {owner.ids[at]}: {reason}"
    return DataError(problem, "write that table again", "bad-mask")
