"""Compiled loops of ``coco-boundary``; imported on first use, because importing numba takes long.

No mask is decoded: a mask is eroded column by column on its runs, where counters say for how many columns in a row a
pixel has foreground far enough above and below. Only masks that a pair's IoU calls for are eroded.

Source: ``mask_to_boundary`` and ``computeBoundaryIoU`` of github.com/bowenc0221/boundary-iou-api, commit 37d2558.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part
from segbatch.codecs._rle_kernels import _shared
from segbatch.metrics._coco_kernels import (
    Flags,
    Floats,
    Offsets,
    Text,
    _corners,
    _intervals,
    _overlap_all,
    _read,
    _union,
    _write,
)

Counters = NDArray[np.int32]


@part
def _joined(bounds: Offsets, begin: Any, end: Any, runs: Offsets) -> Any:
    """Copy a mask's runs without empty ones, and with those that touch made one; gives how many numbers these are."""
    size = 0
    for at in range(begin, end, 2):
        if bounds[at] == bounds[at + 1]:
            continue
        if size and runs[size - 1] == bounds[at]:
            runs[size - 1] = bounds[at + 1]
        else:
            runs[size], runs[size + 1] = bounds[at], bounds[at + 1]
            size += 2
    return size


@part
def _lasting(streak: Counters, upper: Any, lower: Any, least: Any, start: Any, found: Offsets, size: Any) -> Any:
    """Append the runs of rows from ``upper`` to ``lower`` that are ``least`` columns long; gives the new size."""
    row = upper
    while row < lower:
        while row < lower and streak[row] < least:
            row += 1
        if row < lower:
            found[size] = start + row
            while row < lower and streak[row] >= least:
                row += 1
            found[size + 1] = start + row
            size += 2
    return size


@part
def _eroded(runs: Offsets, size: Any, box: Offsets, height: Any, width: Any, streak: Counters, found: Offsets) -> Any:
    """Runs of the pixels whose square of ``2 width + 1`` pixels is foreground throughout; gives how many numbers.

    Args:
        runs: of the mask, as ``_joined`` gives them; ``size`` numbers.
        box: left, top, right and bottom (exclusive) of the mask.
        height: of the image.
        width: of the boundary.
        streak: room for ``height`` numbers.
        found: room for the runs.
    """
    left, top, right, bottom = box
    least = 2 * width + 1
    streak[top:bottom] = 0
    at = number = 0
    for column in range(left, right):
        start, stop = column * height, (column + 1) * height
        row = top
        while at < size and runs[at] < stop:
            upper = max(runs[at], start) - start + width
            lower = min(runs[at + 1], stop) - start - width
            if lower > upper:
                streak[row:upper] = 0
                for r in range(upper, lower):
                    streak[r] += 1
                if column - left >= 2 * width:
                    number = _lasting(streak, upper, lower, least, start - width * height, found, number)
                row = lower
            if runs[at + 1] > stop:
                break
            at += 2
        streak[row:bottom] = 0
    return number


@part
def _without(runs: Offsets, size: Any, inner: Offsets, number: Any, found: Offsets, at: Any) -> tuple[Any, Any]:
    """Append ``runs`` less ``inner``, which lies inside; gives the new size and how many pixels are left."""
    pixels = np.int64(0)
    i = 0
    for run in range(0, size, 2):
        begin, end = runs[run], runs[run + 1]
        while i < number and inner[i] < end:
            if inner[i] > begin:
                found[at], found[at + 1] = begin, inner[i]
                pixels += inner[i] - begin
                at += 2
            begin = inner[i + 1]
            i += 2
        if end > begin:
            found[at], found[at + 1] = begin, end
            pixels += end - begin
            at += 2
    return at, pixels


@part
def _boundaries(
    bounds: Offsets, first: Offsets, wanted: Flags, height: Any, width: Any
) -> tuple[Offsets, Offsets, Offsets]:
    """The boundaries of the masks that are wanted, as ``_intervals`` gives masks: (bounds, first, areas)."""
    masks = first.size - 1
    boxes = np.empty(4 * masks, np.int64)
    _corners(bounds, first, height, boxes)
    found = np.empty(2 * bounds.size, np.int64)
    starts, areas = np.zeros(first.size, np.int64), np.zeros(masks, np.int64)
    streak = np.empty(height, np.int32)
    for i in range(masks):
        starts[i + 1] = starts[i]
        if not wanted[i]:
            continue
        runs = np.empty(first[i + 1] - first[i], np.int64)
        size = _joined(bounds, first[i], first[i + 1], runs)
        box = boxes[4 * i : 4 * i + 4]
        wide, high = box[2] - box[0], box[3] - box[1]
        columns = max(wide - 2 * width, 0) if high > 2 * width else 0
        inner = np.empty(2 * columns * (high // (2 * width + 2) + 1), np.int64)  # dents are as wide as the square
        number = _eroded(runs, size, box, height, width, streak, inner) if columns else 0
        if found.size < starts[i] + size + number:
            more = np.empty(2 * found.size + size + number, np.int64)
            more[: starts[i]] = found[: starts[i]]
            found = more
        starts[i + 1], areas[i] = _without(runs, size, inner, number, found, starts[i])
    return found, starts, areas


def boundary_overlaps(
    text: Text,
    starts: Offsets,
    object_text: Text,
    object_starts: Offsets,
    crowd: Flags,
    height: Any,
    pixels: Any,
    least: Any,
    width: Any,
    areas: Offsets,
    ious: Floats,
) -> Any:
    """The lesser of the IoUs of masks and of their boundaries, ``width`` pixels wide; of a crowd that of the masks.

    All else is as in ``_coco_kernels.mask_overlaps``: an IoU of masks below ``least`` stays as it is.
    """
    object_areas = np.empty(object_starts.size - 1, np.int64)
    a, first_a, bad = _intervals(text, starts, pixels, areas)
    if bad >= 0:
        return bad
    b, first_b, bad = _intervals(object_text, object_starts, pixels, object_areas)
    if bad >= 0:
        return areas.size + bad
    _overlap_all((a, first_a, areas), (b, first_b, object_areas), crowd, height, least, ious)
    wanted, object_wanted = np.zeros(areas.size, np.uint8), np.zeros(object_areas.size, np.uint8)
    for i in range(areas.size):
        for j in range(object_areas.size):
            if ious[i, j] >= least and not crowd[j]:
                wanted[i] = object_wanted[j] = 1
    edges, first, edge_areas = _boundaries(a, first_a, wanted, height, width)
    object_edges, object_first, object_edge_areas = _boundaries(b, first_b, object_wanted, height, width)
    for i in range(areas.size):
        for j in range(object_areas.size):
            if ious[i, j] >= least and not crowd[j]:
                shared = _shared(edges, first[i], first[i + 1], object_edges, object_first[j], object_first[j + 1])
                union = _union(edge_areas[i], object_edge_areas[j], shared, 0)
                ious[i, j] = min(ious[i, j], shared / union)
    return -1


def _signature(_: Callable[..., Any], __: Any) -> Any:
    number, floats, flag = types.int64, types.float64, types.uint8
    strings = (_read(types.uint8), _read(number))
    overlaps = (_read(flag), number, number, floats, number, _write(number), _write(floats, 2))
    return number(*strings, *strings, *overlaps)


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
