"""Compiled loops of ``bdd100k_instance`` and ``bdd100k_lane``; imported on first use: importing numba takes long.

Source: ``bdd100k/eval/ins_seg.py`` (compute_match) and ``bdd100k/eval/lane.py`` (eval_lane_per_threshold); see
``bdd100k``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
Words = NDArray[np.uint64]
Flags = NDArray[np.uint8]
Values = NDArray[np.uint16]
Lengths = NDArray[np.uint32]

# ------------------------------------------------------------------------------------------------ instances


def match(
    ious: Floats,
    classes: Numbers,
    object_classes: Numbers,
    crowd: Flags,
    counts: Flags,
    inside: Flags,
    thresholds: Floats,
    matched: Words,
    ignored: Words,
    partners: Numbers,
) -> None:
    """Match the detections of one image with its objects of the same class.

    Every detection, the best first, takes the object of greatest IoU (the first of several), whatever its size and
    whether it counts or not; a crowd can be taken again and again.

    Args:
        ious: (detections, objects), detections the best first, objects by id.
        classes, object_classes: of both.
        crowd: of the objects.
        counts: (objects, ranges), whether an object counts in a range of sizes.
        inside: (detections, ranges), whether a detection is of a size in a range.
        thresholds: of the IoU, above 0.
        matched, ignored: zeros; bit ``range * thresholds + threshold`` of each detection.
        partners: the object that each is matched with at the first threshold; stays as it is where there is none.
    """
    for t in range(thresholds.size):
        taken = np.zeros(object_classes.size, np.uint8)
        for d in range(classes.size):
            best, greatest = -1, 0.0
            for g in range(object_classes.size):
                if object_classes[g] == classes[d] and not taken[g] and ious[d, g] > greatest:
                    best, greatest = g, ious[d, g]
            found = best >= 0 and greatest >= thresholds[t]
            if found:
                taken[best] = not crowd[best]
                if t == 0:
                    partners[d] = best
            for size in range(inside.shape[1]):
                bit = np.uint64(1) << np.uint64(size * thresholds.size + t)
                if found and counts[best, size]:
                    matched[d] |= bit
                elif found or not inside[d, size]:
                    ignored[d] |= bit


# ------------------------------------------------------------------------------------------------ lanes

LANES = 8
"""Categories of lanes."""

NO_LANE = 255
TOLERANCES = 3
_FAR, _NEAR, _NEXT = np.uint8(1), np.uint8(2), np.uint8(4)  # within 5, 2 and 1 pixels
_REACH = 5
_WIDE = np.array([5, 4, 4, 4, 3, 0])  # half widths of disk(5) by distance of rows; of disk(2) and disk(1) below
_MIDDLE = np.array([2, 1, 0])
_NARROW = np.array([1, 0])

DIRECTION_SHIFT, STYLE_SHIFT, CATEGORY_BITS = 5, 4, 7
"""A lane's code is its byte in BDD100K's masks: bits 0-2 category, 4 style, 5 direction."""


def spans(
    category: Values,
    category_lengths: Lengths,
    direction: Values,
    direction_lengths: Lengths,
    style: Values,
    style_lengths: Lengths,
    width: Any,
    found: NDArray[np.int32],
) -> Any:
    """Lanes as parts of rows: row, first column, column after the last, code; into ``found``, of shape (n, 4).

    All runs cover the same pixels, whole rows; n is their number and that of the rows, at least. Gives how many parts
    there are; below 0 where a pixel of the background's complement has a category (-1), direction (-2) or style (-3)
    that does not exist; ``found[0]`` then holds its row, column and value.
    """
    count = at = 0
    places = np.zeros(3, np.int64)
    ends = np.zeros(3, np.int64)
    all_runs = category.size + direction.size + style.size
    for _ in range(all_runs + 1):
        while places[0] < category.size and ends[0] + category_lengths[places[0]] <= at:
            ends[0] += category_lengths[places[0]]
            places[0] += 1
        while places[1] < direction.size and ends[1] + direction_lengths[places[1]] <= at:
            ends[1] += direction_lengths[places[1]]
            places[1] += 1
        while places[2] < style.size and ends[2] + style_lengths[places[2]] <= at:
            ends[2] += style_lengths[places[2]]
            places[2] += 1
        if places[0] == category.size:
            break
        kind = category[places[0]]
        stop = ends[0] + category_lengths[places[0]]
        if kind == NO_LANE:
            at = stop
            continue
        stop = min(stop, ends[1] + direction_lengths[places[1]], ends[2] + style_lengths[places[2]])
        way, look = direction[places[1]], style[places[2]]
        if kind >= LANES or way > 1 or look > 1:
            found[0, 0], found[0, 1] = at // width, at % width
            found[0, 2] = kind if kind >= LANES else way if way > 1 else look
            return -1 if kind >= LANES else -2 if way > 1 else -3
        code = np.int64(way) << DIRECTION_SHIFT | np.int64(look) << STYLE_SHIFT | np.int64(kind)
        while at < stop:
            row = at // width
            end = min(stop, (row + 1) * width)
            found[count, 0], found[count, 1], found[count, 2], found[count, 3] = (
                row,
                at % width,
                end - row * width,
                code,
            )
            count += 1
            at = end
    return count


@part
def _is(code: Any, kind: Any) -> Any:
    """Whether a lane belongs to a kind: 0, 1 directions, 2, 3 styles, 4 ... categories."""
    if kind < 2:
        return code >> DIRECTION_SHIFT & 1 == kind
    if kind < 4:
        return code >> STYLE_SHIFT & 1 == kind - 2
    return code & CATEGORY_BITS == kind - 4


@part
def _paint(plane: Flags, width: Any, row: Any, first: Any, end: Any, bit: Any) -> None:
    """Set a bit in part of a row; what lies outside the image is cut off."""
    for x in range(row * width + max(first, 0), row * width + min(end, width)):
        plane[x] |= bit


@part
def _surround(parts: NDArray[np.int32], kind: Any, height: Any, width: Any, plane: Flags) -> None:
    """Mark what lies within 1, 2 and 5 pixels of a kind of lanes."""
    for i in range(parts.shape[0]):
        if _is(parts[i, 3], kind):
            first, end = parts[i, 1], parts[i, 2]
            for row in range(max(parts[i, 0] - _REACH, 0), min(parts[i, 0] + _REACH + 1, height)):
                off = abs(row - parts[i, 0])
                _paint(plane, width, row, first - _WIDE[off], end + _WIDE[off], _FAR)
                if off < _MIDDLE.size:
                    _paint(plane, width, row, first - _MIDDLE[off], end + _MIDDLE[off], _NEAR)
                if off < _NARROW.size:
                    _paint(plane, width, row, first - _NARROW[off], end + _NARROW[off], _NEXT)


@part
def _near(parts: NDArray[np.int32], kind: Any, width: Any, plane: Flags, counts: Numbers) -> None:
    """Add the pixels of a kind of lanes that lie within 1, 2 and 5 pixels of what was marked."""
    for i in range(parts.shape[0]):
        if _is(parts[i, 3], kind):
            start = parts[i, 0] * width
            for x in range(start + parts[i, 1], start + parts[i, 2]):
                counts[0] += (plane[x] >> 2) & 1
                counts[1] += (plane[x] >> 1) & 1
                counts[2] += plane[x] & 1


@part
def _compare(
    one: NDArray[np.int32], other: NDArray[np.int32], kind: Any, size: tuple[Any, Any], plane: Flags, counts: Numbers
) -> None:
    """``_near`` of the lanes ``one`` to the lanes ``other``; ``plane`` comes and goes as zeros."""
    height, width = size
    low, high = height, 0
    for i in range(other.shape[0]):
        if _is(other[i, 3], kind):
            low, high = min(low, other[i, 0]), max(high, other[i, 0] + 1)
    _surround(other, kind, height, width, plane)
    _near(one, kind, width, plane, counts)
    plane[max(low - _REACH, 0) * width : min(high + _REACH, height) * width] = 0


def lane_counts(
    truth: NDArray[np.int32], predicted: NDArray[np.int32], height: Any, width: Any, counts: NDArray[np.int64]
) -> None:
    """Pixels of lanes, and how many lie near lanes of the same kind of the other map.

    Args:
        truth, predicted: see ``spans``.
        height, width: of the image.
        counts: zeros of shape (kinds, 2 + 2 * TOLERANCES), kinds as in ``_is``: true pixels, predicted pixels; true
            ones within 1, 2 and 5 pixels of predicted ones; predicted ones within 1, 2 and 5 pixels of true ones.
    """
    plane = np.zeros(height * width, np.uint8)
    for kind in range(counts.shape[0]):
        for i in range(truth.shape[0]):
            if _is(truth[i, 3], kind):
                counts[kind, 0] += truth[i, 2] - truth[i, 1]
        for i in range(predicted.shape[0]):
            if _is(predicted[i, 3], kind):
                counts[kind, 1] += predicted[i, 2] - predicted[i, 1]
        if counts[kind, 0] and counts[kind, 1]:
            _compare(truth, predicted, kind, (height, width), plane, counts[kind, 2:5])
            _compare(predicted, truth, kind, (height, width), plane, counts[kind, 5:8])


# ------------------------------------------------------------------------------------------------ compiling


def _read(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C", readonly=True)  # takes writable arrays too; Arrow's are read-only


def _write(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C")


_NUMBER, _FLOAT, _WORD, _FLAG = types.int64, types.float64, types.uint64, types.uint8
_RUNS = (_read(types.uint16), _read(types.uint32))
_PARTS = _read(types.int32, 2)


def _signature(function: Callable[..., Any], _: Any) -> Any:
    signatures: dict[Callable[..., Any], Any] = {
        match: types.void(
            _read(_FLOAT, 2),
            _read(_NUMBER),
            _read(_NUMBER),
            _read(_FLAG),
            _read(_FLAG, 2),
            _read(_FLAG, 2),
            _read(_FLOAT),
            _write(_WORD),
            _write(_WORD),
            _write(_NUMBER),
        ),
        spans: _NUMBER(*_RUNS, *_RUNS, *_RUNS, _NUMBER, _write(types.int32, 2)),
        lane_counts: types.void(_PARTS, _PARTS, _NUMBER, _NUMBER, _write(_NUMBER, 2)),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
