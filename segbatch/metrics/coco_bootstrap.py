"""COCO's figures for many resamples of the images: the detections are ranked once, and counted as often as drawn."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.base import Key, Resampler
from segbatch.metrics.coco_figures import Matches, Part, Rules, parts, ranking

Values = NDArray[np.float64]


def resampler(
    total: Matches, units: NDArray[np.int64], kinds: Sequence[str], rules: Rules, classes: Mapping[int, str]
) -> Resampler:
    """Figures over all classes and by class as in ``CocoInstanceMetric.compute``, without those of proposals by class.

    As ``compute`` has them but for the order of sums, and for equal scores within one image that is drawn more than
    once.

    Args:
        total: all images.
        units: the unit that each image of ``total`` belongs to, int64 of shape (images,).
        kinds: of overlap.
        rules: parameters.
        classes: names of the scored classes by label id.
    """
    ids = np.array(sorted(classes), np.int64)
    ranked = ranking(total, ids)
    unit_of = np.repeat(units, total.detections)[ranked.places]
    words = {kind: (total.matched[kind][ranked.places], total.ignored[kind][ranked.places]) for kind in kinds}

    def figures(times: NDArray[np.int64]) -> dict[Key, Values]:
        objects = _objects(total, ids, units, times, len(rules.ranges))
        found: dict[Key, Values] = {}
        for kind in kinds:
            precision, recall = _by_class(words[kind], ranked.starts, unit_of, ranked.ranks, times, objects, rules)
            for name, part in parts(rules).items():
                values = _picked(precision, recall, part)
                found[f"{kind}_{name}", ""] = _mean(values)
                for place, label_id in enumerate(ids.tolist()):
                    found[f"{kind}_{name}", classes[label_id]] = values[:, place].mean(axis=1)
            found |= _proposals(kind, total, units, times, objects.sum(axis=1), rules)
        return found

    return figures


def _objects(
    total: Matches, ids: NDArray[np.int64], units: NDArray[np.int64], times: NDArray[np.int64], ranges: int
) -> NDArray[np.int64]:
    """Objects that count in each resample, int64 of shape (resamples, classes, ranges)."""
    classes, owners = np.searchsorted(ids, total.object_category), np.repeat(units, total.objects)
    found = np.zeros((len(times), len(ids), ranges), np.int64)
    for place in range(ranges):
        inside = ((total.object_ranges >> np.uint64(place)) & np.uint64(1)).astype(bool)
        counts = np.zeros((times.shape[1], len(ids)), np.int64)
        np.add.at(counts, (owners[inside], classes[inside]), 1)
        found[:, :, place] = times.astype(np.float64) @ counts.astype(np.float64)  # exact: far below 2^53
    return found


def _by_class(
    words: tuple[NDArray[np.uint64], NDArray[np.uint64]],
    starts: NDArray[np.int64],
    unit_of: NDArray[np.int64],
    ranks: NDArray[np.int32],
    times: NDArray[np.int64],
    objects: NDArray[np.int64],
    rules: Rules,
) -> tuple[Values, Values]:
    """Precision (resamples, classes, ranges, thresholds) and recall (the same, detections); NaN where undefined."""
    from segbatch.metrics import _bootstrap_kernels as kernels

    accumulate = kernels.kernel(kernels.accumulate)
    shape = (len(times), len(starts) - 1, len(rules.ranges), len(rules.thresholds))
    precision, recall = np.full(shape, np.nan), np.full((*shape, len(rules.detections)), np.nan)
    most, recalls = np.array(rules.detections, np.int64), np.array(rules.recalls)
    for place, (begin, end) in enumerate(itertools.pairwise(starts)):
        which = np.flatnonzero(ranks[begin:end] < most[-1]) + begin
        owners, rank = unit_of[which], ranks[which].astype(np.int64)
        drawn = np.ascontiguousarray(times[:, owners])
        for size in range(shape[2]):
            bits = np.uint64(size * shape[3]) + np.arange(shape[3], dtype=np.uint64)[:, None]
            hit, out = ((w[which] >> bits) & np.uint64(1) != 0 for w in words)
            kept = hit | ~out
            before = np.ascontiguousarray(np.cumsum(drawn * kept[0], axis=1))
            for level in range(shape[3]):
                change = kept[level].astype(np.int64) - kept[0]
                at = np.flatnonzero(hit[level] | (change != 0))
                one, more = np.full(len(times), np.nan), np.full((len(times), len(most)), np.nan)
                events = (hit[level, at].astype(np.uint8), change[at], at, owners[at], rank[at])
                counted = np.ascontiguousarray(objects[:, place, size])
                accumulate(*events, before, times, counted, most, recalls, one, more)
                precision[:, place, size, level], recall[:, place, size, level] = one, more
    return precision, recall


def _picked(precision: Values, recall: Values, part: Part) -> Values:
    """What a figure is the mean of: (resamples, classes, thresholds)."""
    values = precision[:, :, part.range] if part.is_precision else recall[:, :, part.range, :, part.detections]
    return values if part.threshold is None else values[:, :, part.threshold : part.threshold + 1]


def _mean(values: Values) -> Values:
    """Over the classes that are defined."""
    by_class = values.mean(axis=2)
    defined = np.isfinite(by_class)
    count = defined.sum(axis=1)
    total = np.where(defined, by_class, 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _proposals(
    kind: str,
    total: Matches,
    units: NDArray[np.int64],
    times: NDArray[np.int64],
    objects: NDArray[np.int64],
    rules: Rules,
) -> dict[Key, Values]:
    hits = total.proposals[kind].reshape(len(total.images), len(rules.proposals), len(rules.ranges), -1)
    drawn = times[:, units].astype(np.float64) @ hits.reshape(len(hits), -1).astype(np.float64)
    shaped = drawn.reshape(len(times), *hits.shape[1:])
    most = len(rules.proposals) - 1
    wanted = {str(n): (place, 0) for place, n in enumerate(rules.proposals)}
    wanted |= {name: (most, place) for place, name in enumerate(rules.ranges) if place}
    found: dict[Key, Values] = {}
    for name, (detections, size) in wanted.items():
        share = shaped[:, detections, size].mean(axis=1) / np.maximum(objects[:, size], 1)
        found[f"{kind}_proposal_ar_{name}", ""] = np.where(objects[:, size] > 0, share, np.nan)
    return found
