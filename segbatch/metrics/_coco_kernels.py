"""Compiled loops of the ``coco_`` modules for instances; imported on first use, because importing numba takes long.

IoUs stand in a matrix (detections, objects). Those below the least threshold decide nothing, so they may be left 0.

Source: common/maskApi.c (rleIou, bbIou) and pycocotools/cocoeval.py (evaluateImg, accumulate) of pycocotools 2.0.11.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part
from segbatch.codecs._rle_kernels import LONGEST_NUMBER, _shared

Text = NDArray[np.uint8]
Offsets = NDArray[np.int64]
Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
Flags = NDArray[np.uint8]

_EPSILON = 2.0**-52
"""np.spacing(1)"""

# ------------------------------------------------------------------------------------------------ overlaps


@part
def _foreground(text: Text, begin: Any, end: Any, bounds: Offsets, size: Any) -> tuple[Any, Any, Any]:
    """Begin and end of every run of the foreground, in pairs, into ``bounds[size:]``, from a string from anywhere.

    Gives where they end (below 0 for a malformed string), and the pixels and foreground pixels of the mask.
    """
    earlier = latest = position = area = np.int64(0)
    at, runs = begin, 0
    while at < end:
        value, bits, digit = np.int64(0), np.int64(0), np.int64(32)
        while digit & 32:
            digit = np.int64(text[at]) - 48 if at < end else np.int64(-1)
            if digit < 0 or digit > 63 or bits == 5 * LONGEST_NUMBER:
                return -1, position, area
            value |= (digit & 31) << bits
            bits += 5
            at += 1
        if digit & 16:
            value -= 1 << bits
        if runs > 2:
            value += earlier
        if value < 0 or value > 0xFFFFFFFF:
            return -1, position, area
        if runs & 1:
            bounds[size], bounds[size + 1] = position, position + value
            size += 2
            area += value
        earlier, latest = latest, value
        position += value
        runs += 1
    return size, position, area


@part
def _intervals(text: Text, starts: Offsets, pixels: Any, areas: Offsets) -> tuple[Offsets, Offsets, Any]:
    """The foreground of every mask and its area: (bounds, where those of each mask start, bad).

    ``bad`` is the first mask that is malformed or covers another number of pixels, else -1.
    """
    bounds = np.empty(text.size + 1, np.int64)  # a run has one character or more
    first = np.zeros(starts.size, np.int64)
    for i in range(starts.size - 1):
        first[i + 1], covered, areas[i] = _foreground(text, starts[i], starts[i + 1], bounds, first[i])
        if first[i + 1] < 0 or covered != pixels:
            return bounds, first, i
    return bounds, first, -1


@part
def _corners(bounds: Offsets, first: Offsets, height: Any, corners: Offsets) -> None:
    """Left, top, right and bottom (exclusive) of every mask; all 0 for one without pixels.

    Runs move on by a column or two at most, so columns are counted on rather than divided out.
    """
    for i in range(first.size - 1):
        is_empty = True
        left = top = right = bottom = np.int64(0)
        column = start = np.int64(0)  # the column that ``start`` is the first pixel of
        for at in range(first[i], first[i + 1], 2):
            begin, last = bounds[at], bounds[at + 1] - 1
            if last < begin:
                continue
            if begin - start >= 4 * height:
                column = begin // height
                start = column * height
            while begin - start >= height:
                column, start = column + 1, start + height
            above, below = begin - start, last - start
            if is_empty:
                left, top, is_empty = column, above, False
            if below >= height:
                top, bottom = np.int64(0), height - 1
                column = last // height
                start = column * height
            else:
                top, bottom = min(top, above), max(bottom, below)
            right = column
        corners[4 * i], corners[4 * i + 1] = left, top
        corners[4 * i + 2], corners[4 * i + 3] = (left, top) if is_empty else (right + 1, bottom + 1)


def mask_overlaps(
    text: Text,
    starts: Offsets,
    object_text: Text,
    object_starts: Offsets,
    crowd: Flags,
    height: Any,
    pixels: Any,
    least: Any,
    areas: Offsets,
    ious: Floats,
) -> Any:
    """rleIou of every detection and object, and the detections' ``areas`` in pixels; ``ious`` comes as zeros.

    Gives the first mask that is malformed or of another size (detections first, then objects), else -1. A pair whose
    boxes and areas leave no room for an IoU of ``least`` is passed over: the bound is rounded like the IoU itself.
    """
    object_areas = np.empty(object_starts.size - 1, np.int64)
    a, first_a, bad = _intervals(text, starts, pixels, areas)
    if bad >= 0:
        return bad
    b, first_b, bad = _intervals(object_text, object_starts, pixels, object_areas)
    if bad >= 0:
        return areas.size + bad
    _overlap_all((a, first_a, areas), (b, first_b, object_areas), crowd, height, least, ious)
    return -1


@part
def _overlap_all(masks: Any, objects: Any, crowd: Flags, height: Any, least: Any, ious: Floats) -> None:
    """``mask_overlaps`` of masks that are known to be good: each side their bounds, where they start, and areas."""
    if ious.size == 0:
        return
    (a, first_a, areas), (b, first_b, object_areas) = masks, objects
    box_a, box_b = np.empty(4 * areas.size, np.int64), np.empty(4 * object_areas.size, np.int64)
    _corners(a, first_a, height, box_a)
    _corners(b, first_b, height, box_b)
    for i in range(areas.size):
        for j in range(object_areas.size):
            wide = min(box_a[4 * i + 2], box_b[4 * j + 2]) - max(box_a[4 * i], box_b[4 * j])
            high = min(box_a[4 * i + 3], box_b[4 * j + 3]) - max(box_a[4 * i + 1], box_b[4 * j + 1])
            if wide <= 0 or high <= 0:
                continue
            most = min(wide * high, areas[i], object_areas[j])
            if most / _union(areas[i], object_areas[j], most, crowd[j]) >= least:
                shared = _shared(a, first_a[i], first_a[i + 1], b, first_b[j], first_b[j + 1])
                ious[i, j] = shared / _union(areas[i], object_areas[j], shared, crowd[j])


@part
def _union(area: Any, object_area: Any, shared: Any, crowd: Any) -> Any:
    """What the shared pixels are divided by; of a crowd only the detection counts."""
    return area if crowd else area + object_area - shared


def box_overlaps(boxes: Floats, object_boxes: Floats, crowd: Flags, ious: Floats) -> None:
    """bbIou: boxes are x, y, width, height, one after the other; ``ious`` comes as zeros."""
    for i in range(ious.shape[0]):
        x, y, width, height = boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]
        for j in range(ious.shape[1]):
            left, top = object_boxes[4 * j], object_boxes[4 * j + 1]
            object_width, object_height = object_boxes[4 * j + 2], object_boxes[4 * j + 3]
            wide = min(width + x, object_width + left) - max(x, left)
            high = min(height + y, object_height + top) - max(y, top)
            if wide > 0 and high > 0:
                shared = wide * high
                union = _union(width * height, object_width * object_height, shared, crowd[j])
                ious[i, j] = shared / union if union > 0 else 0.0  # boxes too thin for floats


# ------------------------------------------------------------------------------------------------ matching


@part
def _outside(area: Any, ranges: Floats, place: Any) -> Any:
    return area < ranges[2 * place] or area > ranges[2 * place + 1]


@part
def _candidates(ious: Floats, order: Offsets, objects: Offsets, least: Any) -> tuple[Offsets, Floats, Offsets, Floats]:
    """What may be matched: (places, tops, found, overlap).

    Of every such detection its place in ``order`` and where its objects end, in pairs, and its greatest IoU; of these
    objects, one detection after the other, the place in ``objects`` and the IoU.
    """
    places, tops = np.empty(2 * order.size, np.int64), np.empty(order.size, np.float64)
    found = np.empty(order.size * objects.size, np.int64)
    overlap = np.empty(order.size * objects.size, np.float64)
    size = number = 0
    for i in range(order.size):
        before, top = size, 0.0
        for j in range(objects.size):
            if ious[order[i], objects[j]] >= least:
                found[size], overlap[size] = j, ious[order[i], objects[j]]
                top = max(top, overlap[size])
                size += 1
        if size > before:
            places[2 * number], places[2 * number + 1], tops[number] = i, size, top
            number += 1
    return places, tops[:number], found, overlap


@part
def _best(found: Offsets, overlap: Floats, first: Any, past: Any, threshold: Any, taken: Flags, ignore: Flags) -> Any:
    """The object that a detection is matched with, of ``found[first:past]``; -1 for none.

    Objects that count come before those that are ignored; of equal ones the last wins. A crowd may be found twice:
    ``taken`` is never set for it.
    """
    best = threshold
    chosen = -1
    for ignored in range(2):
        for i in range(first, past):
            if overlap[i] >= best and ignore[found[i]] == ignored and not taken[found[i]]:
                best = overlap[i]
                chosen = found[i]
        if chosen >= 0:
            break
    return chosen


@part
def _match_class(
    ious: Floats,
    order: Offsets,
    objects: Offsets,
    areas: Floats,
    object_areas: Floats,
    crowd: Flags,
    thresholds: Floats,
    ranges: Floats,
    matched: Words,
    ignored: Words,
    partners: Offsets,
    shares: Floats,
    before: Any,
) -> None:
    """evaluateImg for every range of size and threshold: bit ``range * thresholds + threshold`` of each word.

    ``before`` objects are of earlier classes; else as in ``match``.
    """
    places, tops, found, overlap = _candidates(ious, order, objects, thresholds.min())
    ignore, taken = np.empty(objects.size, np.uint8), np.empty(objects.size, np.uint8)
    every = (np.uint64(1) << np.uint64(thresholds.size)) - np.uint64(1)
    for size in range(ranges.size // 2):
        for i in range(order.size):  # as if none were matched; those that are take their bits back
            if _outside(areas[order[i]], ranges, size):
                ignored[i] |= every << np.uint64(size * thresholds.size)
        if not tops.size:
            continue
        for j in range(objects.size):
            ignore[j] = crowd[objects[j]] or _outside(object_areas[objects[j]], ranges, size)
        for t in range(thresholds.size):
            bit = np.uint64(1) << np.uint64(size * thresholds.size + t)
            taken[:] = 0
            for n in range(tops.size):
                if tops[n] < thresholds[t]:
                    continue
                first, i = places[2 * n - 1] if n else 0, places[2 * n]
                best = _best(found, overlap, first, places[2 * n + 1], thresholds[t], taken, ignore)
                if best >= 0:
                    taken[best] = not crowd[objects[best]]
                    if size == 0 and t == 0 and partners.size:
                        partners[i], shares[i] = before + best, ious[order[i], objects[best]]
                    if ignore[best]:
                        ignored[i] |= bit
                    else:
                        matched[i] |= bit
                        ignored[i] &= ~bit


@part
def _match_classes(
    ious: Floats,
    order: Offsets,
    classes: Offsets,
    objects: Offsets,
    object_classes: Offsets,
    areas: Floats,
    object_areas: Floats,
    crowd: Flags,
    thresholds: Floats,
    ranges: Floats,
    most: Any,
    matched: Words,
    ignored: Words,
    partners: Offsets,
    shares: Floats,
) -> None:
    """See ``match``."""
    begin = first = 0
    while begin < order.size:
        end = begin
        while end < order.size and classes[end] == classes[begin]:
            end += 1
        while first < objects.size and object_classes[first] < classes[begin]:
            first += 1
        past = first
        while past < objects.size and object_classes[past] == classes[begin]:
            past += 1
        stop = min(end, begin + most)
        _match_class(
            ious,
            order[begin:stop],
            objects[first:past],
            areas,
            object_areas,
            crowd,
            thresholds,
            ranges,
            matched[begin:stop],
            ignored[begin:stop],
            partners[begin:stop],
            shares[begin:stop],
            first,
        )
        begin, first = end, past


def match(
    ious: Floats,
    order: Offsets,
    classes: Offsets,
    objects: Offsets,
    object_classes: Offsets,
    areas: Floats,
    object_areas: Floats,
    crowd: Flags,
    thresholds: Floats,
    ranges: Floats,
    most: Any,
    matched: Words,
    ignored: Words,
    partners: Offsets,
    shares: Floats,
) -> None:
    """Match the detections of one image with its objects, class by class.

    Args:
        ious: (detections, objects).
        order: detections by class, the best first.
        classes: of the detections in this order.
        objects, object_classes: likewise, in the order of the file.
        areas, object_areas, crowd: of all detections and objects, in the order of ``ious``.
        thresholds: of the IoU, at most 1 - 1e-10.
        ranges: least and greatest area, in pairs.
        most: detections that count, of each class.
        matched, ignored: zeros, as many as ``order``; those beyond ``most`` stay 0.
        partners: place in ``objects`` of what each is matched with in the first range at the first threshold; stays as
            it is where there is none. Empty where nobody asks.
        shares: IoUs with these, likewise.
    """
    sizes = (areas, object_areas, crowd)
    outputs: Any = (matched, ignored, partners, shares)
    _match_classes(ious, order, classes, objects, object_classes, *sizes, thresholds, ranges, most, *outputs)


def match_image(
    ious: Floats,
    order: Offsets,
    classes: Offsets,
    objects: Offsets,
    object_classes: Offsets,
    by_score: Offsets,
    areas: Floats,
    object_areas: Floats,
    crowd: Flags,
    thresholds: Floats,
    ranges: Floats,
    most: Any,
    numbers: Offsets,
    matched: Words,
    ignored: Words,
    partners: Offsets,
    shares: Floats,
    counts: NDArray[np.uint16],
) -> None:
    """``match``, and whatever the class: how often each bit is set among the best ``numbers[i]``, into ``counts[i]``.

    Args:
        by_score: places in ``order``, the best first.
        numbers: ascending.
        counts: zeros of shape (numbers, bits).

    The others are as in ``match``.
    """
    sizes = (areas, object_areas, crowd)
    outputs: Any = (matched, ignored, partners, shares)
    _match_classes(ious, order, classes, objects, object_classes, *sizes, thresholds, ranges, most, *outputs)
    best = order[by_score[: numbers[-1]]]
    hits, none = np.zeros(best.size, np.uint64), np.zeros(best.size, np.uint64)
    _match_class(ious, best, objects, *sizes, thresholds, ranges, hits, none, partners[:0], shares[:0], 0)
    for place in range(best.size):
        if hits[place]:
            for i in range(numbers.size):
                if place < numbers[i]:
                    for bit in range(counts.shape[1]):
                        counts[i, bit] += (hits[place] >> np.uint64(bit)) & np.uint64(1)


def ranges_of(areas: Floats, crowd: Flags, ranges: Floats, words: Words) -> None:
    """Bits of the ranges of size in which each object counts; ``words`` comes as zeros."""
    for i in range(areas.size):
        for size in range(ranges.size // 2):
            if not crowd[i] and not _outside(areas[i], ranges, size):
                words[i] |= np.uint64(1) << np.uint64(size)


# ------------------------------------------------------------------------------------------------ figures


def accumulate(
    matched: Words,
    ignored: Words,
    ranks: NDArray[np.int32],
    objects: Offsets,
    most: Offsets,
    recalls: Floats,
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
) -> None:
    """Precision at every recall, and greatest recall, of one class over all images (accumulate).

    Only where a detection is matched can the precision rise, so only these places are kept.

    Args:
        matched, ignored: words of the detections, the best first.
        ranks: place of each among those of its class in its image, from 0.
        objects: that count, by area range.
        most: detections per image and class that count, ascending.
        recalls: at which the precision is wanted, ascending.
        precision: (ranges, most, thresholds, recalls); left as it is where no object counts.
        recall: (ranges, most, thresholds), likewise.
    """
    thresholds = recall.shape[2]
    found = np.empty(matched.size, np.float64)
    for place in range(objects.size):
        if objects[place] == 0:
            continue
        for m in range(most.size):
            for t in range(thresholds):
                shift = np.uint64(place * thresholds + t)
                hits = misses = 0
                for i in range(matched.size):
                    if ranks[i] < most[m]:
                        if (matched[i] >> shift) & np.uint64(1):
                            hits += 1
                            found[hits - 1] = hits / (np.float64(misses + hits) + _EPSILON)
                        elif not (ignored[i] >> shift) & np.uint64(1):
                            misses += 1
                recall[place, m, t] = hits / objects[place]
                _sample(found[:hits], objects[place], recalls, precision[place, m, t])


def average_precisions(
    matched: Words,
    ignored: Words,
    starts: Offsets,
    stops: Offsets,
    objects: Offsets,
    recalls: Floats,
    precision: NDArray[np.float64],
) -> None:
    """Precision at every recall of many groups of detections at once, objects of any size: bit t is threshold t.

    Args:
        matched, ignored: words of the detections, those of a group the best first.
        starts, stops: where those of each group begin and end.
        objects: of each group, at least 1.
        recalls: at which the precision is wanted, ascending.
        precision: (groups, thresholds, recalls).
    """
    found = np.empty(matched.size, np.float64)
    for group in range(starts.size):
        for t in range(precision.shape[1]):
            hits = misses = 0
            for i in range(starts[group], stops[group]):
                if (matched[i] >> np.uint64(t)) & np.uint64(1):
                    hits += 1
                    found[hits - 1] = hits / (np.float64(misses + hits) + _EPSILON)
                elif not (ignored[i] >> np.uint64(t)) & np.uint64(1):
                    misses += 1
            _sample(found[:hits], objects[group], recalls, precision[group, t])


@part
def _sample(found: NDArray[np.float64], objects: int, recalls: Floats, precision: NDArray[np.float64]) -> None:
    """The greatest precision at or behind each recall; ``found`` has that of each hit, and is overwritten."""
    for i in range(found.size - 1, 0, -1):
        found[i - 1] = max(found[i - 1], found[i])
    i = 0
    for r in range(recalls.size):
        while i < found.size and (i + 1) / objects < recalls[r]:
            i += 1
        precision[r] = found[i] if i < found.size else 0.0


# ------------------------------------------------------------------------------------------------ compiling


def _read(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C", readonly=True)  # takes writable arrays too; Arrow's are read-only


def _write(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C")


_NUMBER, _FLOAT, _WORD, _FLAG = types.int64, types.float64, types.uint64, types.uint8
_STRINGS = (_read(types.uint8), _read(_NUMBER))
_ORDER = (_read(_NUMBER), _read(_NUMBER))


def _signature(function: Callable[..., Any], _: Any) -> Any:
    signatures: dict[Callable[..., Any], Any] = {
        mask_overlaps: _NUMBER(
            *_STRINGS, *_STRINGS, _read(_FLAG), _NUMBER, _NUMBER, _FLOAT, _write(_NUMBER), _write(_FLOAT, 2)
        ),
        box_overlaps: types.void(_read(_FLOAT), _read(_FLOAT), _read(_FLAG), _write(_FLOAT, 2)),
        match: types.void(
            _read(_FLOAT, 2),
            *_ORDER,
            *_ORDER,
            _read(_FLOAT),
            _read(_FLOAT),
            _read(_FLAG),
            _read(_FLOAT),
            _read(_FLOAT),
            _NUMBER,
            _write(_WORD),
            _write(_WORD),
            _write(_NUMBER),
            _write(_FLOAT),
        ),
        ranges_of: types.void(_read(_FLOAT), _read(_FLAG), _read(_FLOAT), _write(_WORD)),
        match_image: types.void(
            _read(_FLOAT, 2),
            *_ORDER,
            *_ORDER,
            _read(_NUMBER),
            _read(_FLOAT),
            _read(_FLOAT),
            _read(_FLAG),
            _read(_FLOAT),
            _read(_FLOAT),
            _NUMBER,
            _read(_NUMBER),
            _write(_WORD),
            _write(_WORD),
            _write(_NUMBER),
            _write(_FLOAT),
            _write(types.uint16, 2),
        ),
        accumulate: types.void(
            _read(_WORD),
            _read(_WORD),
            _read(types.int32),
            _read(_NUMBER),
            _read(_NUMBER),
            _read(_FLOAT),
            _write(_FLOAT, 4),
            _write(_FLOAT, 3),
        ),
        average_precisions: types.void(
            _read(_WORD),
            _read(_WORD),
            _read(_NUMBER),
            _read(_NUMBER),
            _read(_NUMBER),
            _read(_FLOAT),
            _write(_FLOAT, 3),
        ),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
