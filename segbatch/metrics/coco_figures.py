"""Precision and recall of matched detections as pycocotools sums them up.

Source: pycocotools 2.0.11, ``cocoeval.py`` (github.com/ppwwyyxx/cocoapi): ``Params.setDetParams``, ``accumulate``,
``summarize``.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.arrays import Arrays
from segbatch.metrics.base import image_order

Words = NDArray[np.uint64]

_LARGEST = 1e5**2


def _grid(low: float, high: float, step: float) -> tuple[float, ...]:
    """As pycocotools makes it: the bits of ``linspace``, which are not those of ``arange``."""
    return tuple(np.linspace(low, high, round((high - low) / step) + 1).tolist())


@dataclass(frozen=True, slots=True)
class Rules:
    """Parameters of an evaluation; COCO's by default.

    Attributes:
        thresholds: IoUs from which on a detection may be matched; with ``ranges`` at most 64 combinations.
        recalls: where the precision is sampled.
        detections: the best so many of each image and class count, ascending.
        proposals: the same for recall whatever the class.
        ranges: least and greatest area in square pixels (both are inside), by name; the first is the whole.
    """

    thresholds: tuple[float, ...] = _grid(0.5, 0.95, 0.05)
    recalls: tuple[float, ...] = _grid(0.0, 1.0, 0.01)
    detections: tuple[int, ...] = (1, 10, 100)
    proposals: tuple[int, ...] = (10, 100, 1000)
    ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "all": (0.0, _LARGEST),
            "small": (0.0, 32.0**2),
            "medium": (32.0**2, 96.0**2),
            "large": (96.0**2, _LARGEST),
        }
    )

    @property
    def bits(self) -> int:
        """Combinations of range and threshold; number ``range * len(thresholds) + threshold`` is a bit of a word."""
        return len(self.ranges) * len(self.thresholds)


@dataclass(frozen=True, slots=True)
class Matches:
    """What became of the detections and objects of any number of images.

    One entry per image, the images in any order:
        images: sample ids.
        detections, objects: how many of the entries below are the image's, int64 of shape (images,).
        proposals: how many of the best detections of all classes together are matched; by kind of overlap, uint16 of
            shape (images, rules.proposals, rules.bits).

    One entry per detection that may count, by label id and then the best first:
        category: label id, int32.
        score: float64.
        matched, ignored: by kind of overlap, uint64. A bit of ``matched`` says that the detection has an object that
            counts, a bit of ``ignored`` that it is neither right nor wrong. With neither bit it is wrong.

    One entry per object:
        object_category: label id, int32.
        object_ranges: uint64 whose bit ``range`` says that the object counts there: no bit for a crowd.

    Of one image alone; None where several are merged, and in states that were written before there were any:
        partners: of which objects the detections were found at the least threshold, regardless of size, with overlaps
            of the first kind: ``detection_ids`` and ``object_ids`` as the tables have them, int64; ``partners``, for
            each detection the place of its object or -1, int64; ``ious`` with these, float64, 0 for those without.
    """

    images: tuple[str, ...]
    detections: NDArray[np.int64]
    objects: NDArray[np.int64]
    category: NDArray[np.int32]
    score: NDArray[np.float64]
    matched: Mapping[str, Words]
    ignored: Mapping[str, Words]
    object_category: NDArray[np.int32]
    object_ranges: Words
    proposals: Mapping[str, NDArray[np.uint16]]
    partners: Arrays | None = None


class Part(NamedTuple):
    """What a figure is the mean of: places in the axes of ``Curves``; no threshold means all of them."""

    is_precision: bool
    threshold: int | None
    range: int
    detections: int


def parts(rules: Rules) -> dict[str, Part]:
    """The figures of ``summarize`` by name: ``ap``, ``ap50``, ``ap75``, ``ap_small`` ..., ``ar_1`` ... ``ar_large``.

    ``ap50`` and ``ap75`` are there where the IoUs .5 and .75 are, to the bit.
    """
    most = len(rules.detections) - 1
    sizes = {name: place for place, name in enumerate(rules.ranges) if place}
    wanted = {"ap50": 0.5, "ap75": 0.75}
    found = {"ap": Part(True, None, 0, most)}
    found |= {n: Part(True, rules.thresholds.index(t), 0, most) for n, t in wanted.items() if t in rules.thresholds}
    found |= {f"ap_{name}": Part(True, None, place, most) for name, place in sizes.items()}
    found |= {f"ar_{n}": Part(False, None, 0, place) for place, n in enumerate(rules.detections)}
    found |= {f"ar_{name}": Part(False, None, place, most) for name, place in sizes.items()}
    return found


class Curves(NamedTuple):
    """Precision and recall of one kind of overlap; -1 where no object counts.

    Attributes:
        precision: float64 of shape (classes, ranges, detections, thresholds, recalls).
        recall: the greatest, float64 of shape (classes, ranges, detections, thresholds).
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def mean(self, part: Part, place: int | None = None) -> float | None:
        """A figure over all classes, or of the class at ``place``; None where it is undefined.

        The values are summed in the order of pycocotools: thresholds, recalls, classes.
        """
        curve = self.precision if part.is_precision else self.recall
        values = np.moveaxis(curve[:, part.range, part.detections], 0, -1)
        if part.threshold is not None:
            values = values[part.threshold]
        return mean(values if place is None else values[..., place])


def mean(values: NDArray[np.float64]) -> float | None:
    """Mean of those that are defined."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else None


class Ranking(NamedTuple):
    """All detections by class and the best first; between equal scores the image decides, then the order in it.

    Attributes:
        places: of the detections in ``Matches``, int64.
        starts: where those of each class begin, and the last one's end, int64 of shape (classes + 1,).
        ranks: place of each among those of its class in its image, from 0; int32.
    """

    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    ranks: NDArray[np.int32]


def ranking(total: Matches, label_ids: NDArray[np.int64]) -> Ranking:
    """The order in which ``accumulate`` takes the detections; ``label_ids`` ascending."""
    order = image_order(total.images)
    counts = total.detections[order]
    ends = np.cumsum(counts)
    firsts = np.cumsum(total.detections) - total.detections
    by_image = np.repeat(firsts[order] - (ends - counts), counts) + np.arange(len(total.category))
    classes = np.searchsorted(label_ids, total.category[by_image]).astype(np.uint16)
    changes = np.repeat(np.arange(len(counts)), counts) * len(label_ids) + classes
    ranks = ranks_of(changes)
    by_class = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[by_class], np.arange(len(label_ids) + 1))
    for begin, end in itertools.pairwise(starts):
        mine = by_class[begin:end]
        by_class[begin:end] = mine[np.argsort(-total.score[by_image[mine]], kind="stable")]
    return Ranking(by_image[by_class], starts, ranks[by_class])


def ranks_of(groups: NDArray[np.int64]) -> NDArray[np.int32]:
    """Place of each entry among the equal ones that stand beside it, from 0."""
    if not len(groups):
        return np.empty(0, np.int32)
    begins = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    sizes = np.diff(np.append(begins, len(groups)))
    return (np.arange(len(groups)) - np.repeat(begins, sizes)).astype(np.int32)


def counted(total: Matches, label_ids: NDArray[np.int64], ranges: int) -> NDArray[np.int64]:
    """Objects that count, int64 of shape (classes, ranges)."""
    found = np.zeros((len(label_ids), ranges), np.int64)
    classes = np.searchsorted(label_ids, total.object_category)
    for place in range(ranges):
        inside = (total.object_ranges >> np.uint64(place)) & np.uint64(1)
        found[:, place] = np.bincount(classes[inside.astype(bool)], minlength=len(label_ids))
    return found


def curves(total: Matches, kind: str, ranked: Ranking, objects: NDArray[np.int64], rules: Rules) -> Curves:
    """Precision and recall of every class; ``objects`` as ``counted`` gives them."""
    shape = (len(objects), len(rules.ranges), len(rules.detections), len(rules.thresholds))
    found = Curves(np.full((*shape, len(rules.recalls)), -1.0), np.full(shape, -1.0))
    most, recalls = np.array(rules.detections), np.array(rules.recalls)
    for place, (begin, end) in enumerate(itertools.pairwise(ranked.starts)):
        if objects[place].any():
            mine = ranked.places[begin:end]
            words = (total.matched[kind][mine], total.ignored[kind][mine], ranked.ranks[begin:end])
            outputs = (found.precision[place], found.recall[place])
            compiled("accumulate")(*words, objects[place], most, recalls, *outputs)
    return found


class ImageCounts(NamedTuple):
    """Images on their own, by class; int64 of shape (images, classes) each, classes in the order of their label ids.

    Attributes:
        objects: that count, of any size.
        hits, misses: detections that are right, and wrong, at the least threshold.
    """

    objects: NDArray[np.int64]
    hits: NDArray[np.int64]
    misses: NDArray[np.int64]


_FIRST = np.uint64(1)
"""The bit of the first range (all sizes) and the first threshold."""


def image_counts(total: Matches, kind: str, label_ids: NDArray[np.int64]) -> ImageCounts:
    """What the images show and what was found in them, with overlaps of ``kind``."""
    shape = (len(total.images), len(label_ids))
    matched, ignored = total.matched[kind], total.ignored[kind]
    keys = image_classes(total.detections, total.category, label_ids)
    owners = image_classes(total.objects, total.object_category, label_ids)
    chosen = (
        owners[(total.object_ranges & _FIRST) != 0],
        keys[(matched & _FIRST) != 0],
        keys[((matched | ignored) & _FIRST) == 0],
    )
    return ImageCounts(*(np.bincount(k, minlength=shape[0] * shape[1]).reshape(shape) for k in chosen))


def image_classes(
    sizes: NDArray[np.int64], category: NDArray[np.int32], label_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number ``image * classes + class`` of each detection or object; ``sizes``: how many each image has."""
    images: NDArray[np.int64] = np.repeat(np.arange(len(sizes)), sizes) * len(label_ids)
    return images + np.searchsorted(label_ids, category)


def image_precisions(
    total: Matches, kind: str, label_ids: NDArray[np.int64], objects: NDArray[np.int64], rules: Rules
) -> NDArray[np.float64]:
    """Mean AP, in any size, over the classes that an image shows, as if it were the only one; NaN where it shows none.

    Args:
        total: the images.
        kind: of overlap.
        label_ids: ascending.
        objects: as in ``ImageCounts``.
        rules: thresholds and recalls.

    Returns:
        float64 of shape (images,).
    """
    groups = np.flatnonzero(objects)
    keys = image_classes(total.detections, total.category, label_ids)
    precision = np.empty((len(groups), len(rules.thresholds), len(rules.recalls)))
    spans = np.searchsorted(keys, groups), np.searchsorted(keys, groups, "right")
    words = total.matched[kind], total.ignored[kind]
    compiled("average_precisions")(*words, *spans, objects.ravel()[groups], np.array(rules.recalls), precision)
    means = precision.mean(axis=(1, 2)) if len(groups) else np.empty(0)
    ends = np.cumsum(np.count_nonzero(objects, axis=1))
    parts = np.split(means, ends[:-1])
    return np.array([float(np.mean(p)) if len(p) else np.nan for p in parts])


def proposal_recall(hits: NDArray[np.int64], objects: NDArray[np.int64], part: Part) -> float | None:
    """Mean greatest recall of the best detections whatever their class.

    Args:
        hits: matched detections of all images, int64 of shape (rules.proposals, ranges, thresholds).
        objects: that count, int64 of shape (ranges,).
        part: the range, and the place in ``rules.proposals``.
    """
    if not objects[part.range]:
        return None
    return float(np.mean(hits[part.detections, part.range] / objects[part.range]))


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """A loop of ``_coco_kernels``."""
    from segbatch.metrics import _coco_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(getattr(kernels, name))


@functools.cache
def boundary_overlaps() -> Callable[..., Any]:
    """The loop of ``_coco_boundary_kernels``."""
    from segbatch.metrics import _coco_boundary_kernels as kernels

    return kernels.kernel(kernels.boundary_overlaps)
