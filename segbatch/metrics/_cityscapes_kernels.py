"""Compiled loops of the Cityscapes evaluators; imported on first use, because importing numba takes long.

Masks are COCO strings, so runs down the columns; label maps are runs along the rows. Where the two meet, a mask is
turned into runs along the rows on the way, at the cost of its outline, not of its area.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part
from segbatch.codecs._rle_kernels import _shared
from segbatch.metrics._coco_kernels import Offsets, Text, _corners, _intervals, _read, _write

Ids = NDArray[np.uint16]
Lengths = NDArray[np.uint32]

# ------------------------------------------------------------------------------------------------ masks on label maps


@part
def _rows(lengths: Lengths, height: Any, width: Any) -> tuple[Offsets, Offsets]:
    """Where each run ends, and for each row (and past the last one) the run that its first pixel lies in."""
    ends, rows = np.empty(lengths.size, np.int64), np.empty(height + 1, np.int64)
    row, end = 0, np.int64(0)
    for run in range(lengths.size):
        end += np.int64(lengths[run])
        ends[run] = end
        while row < height and row * width < end:
            rows[row] = run
            row += 1
    rows[height] = lengths.size - 1
    return ends, rows


@part
def _count(begin: Any, end: Any, run: Any, last: Any, ends: Offsets, values: Ids, counts: Offsets) -> None:
    """Add pixels ``begin`` to ``end`` of one row to ``counts`` by label; they lie in runs ``run`` to ``last``."""
    while run < last:  # the first run that ends after begin
        middle = (run + last) >> 1
        if ends[middle] > begin:
            last = middle
        else:
            run = middle + 1
    while begin < end:
        stop = min(ends[run], end)
        label: Any = min(np.int64(values[run]), counts.size - 1)
        counts[label] += stop - begin
        begin = stop
        run += 1


@part
def _column(bounds: Offsets, at: Any, last: Any, start: Any, height: Any, cuts: Offsets) -> tuple[Any, Any]:
    """Rows at which the mask begins and ends in the column from pixel ``start`` on: how many, and the next bound."""
    size = 0
    while at < last and bounds[at] < start + height:
        cuts[size] = max(bounds[at] - start, 0)
        cuts[size + 1] = min(bounds[at + 1] - start, height)
        size += 2
        if bounds[at + 1] > start + height:
            break
        at += 2
    return size, at


@part
def _add_mask(
    bounds: Offsets, at: Any, last: Any, size: Any, runs: Any, cuts: Any, opened: Offsets, counts: Offsets
) -> None:
    """``label_pixels`` of the mask whose foreground is ``bounds[at:last]``.

    From column to column only the rows change in which the mask begins or ends, so these are looked at alone.
    """
    (height, width), (ends, rows, values), (older, newer) = size, runs, cuts
    before, x = 0, np.int64(0)
    while at < last or before:
        if not before:
            x = bounds[at] // height
        now, at = _column(bounds, at, last, x * height, height, newer)
        i = j = 0
        row = np.int64(0)
        was = shows = False
        while i < before or j < now:
            cut = min(older[i] if i < before else height, newer[j] if j < now else height)
            if was != shows:
                for y in range(row, cut):
                    if shows:
                        opened[y] = x
                    else:
                        _count(y * width + opened[y], y * width + x, rows[y], rows[y + 1], ends, values, counts)
            row = cut
            if i < before and older[i] == cut:
                was = not was
                i += 1
            if j < now and newer[j] == cut:
                shows = not shows
                j += 1
        older, newer = newer, older
        before = now
        x += 1


def label_pixels(
    text: Text, starts: Offsets, height: Any, width: Any, values: Ids, lengths: Lengths, counts: NDArray[np.int64]
) -> Any:
    """``counts[i, label]``: pixels of mask ``i`` where the label map shows ``label``; ``counts`` comes as zeros.

    Args:
        text, starts: of the masks.
        height, width: of the image.
        values, lengths: runs of the label map, which fill the image.
        counts: (masks, labels); labels that it has no column for are added to the last one.

    Gives the first mask that is malformed or of another size, else -1.
    """
    areas = np.empty(starts.size - 1, np.int64)
    bounds, first, bad = _intervals(text, starts, height * width, areas)
    if bad >= 0 or areas.size == 0:
        return bad
    ends, rows = _rows(lengths, height, width)
    cuts = (np.empty(bounds.size + 2, np.int64), np.empty(bounds.size + 2, np.int64))
    opened = np.empty(height, np.int64)
    for i in range(areas.size):
        if areas[i]:
            runs = (ends, rows, values)
            _add_mask(bounds, first[i], first[i + 1], (height, width), runs, cuts, opened, counts[i])
    return -1


# ------------------------------------------------------------------------------------------------ masks on masks


def shared_pixels(
    text: Text,
    starts: Offsets,
    classes: Offsets,
    object_text: Text,
    object_starts: Offsets,
    object_classes: Offsets,
    height: Any,
    pixels: Any,
    areas: Offsets,
    object_areas: Offsets,
    shared: NDArray[np.int64],
) -> Any:
    """Areas of detections and objects, and the pixels that those of one class share; ``shared`` comes as zeros.

    Detections of class -1 meet no object, objects of class -1 no detection, objects of class -2 every other detection.

    Gives the first mask that is malformed or of another size (detections first, then objects), else -1.
    """
    a, first_a, bad = _intervals(text, starts, pixels, areas)
    if bad >= 0:
        return bad
    b, first_b, bad = _intervals(object_text, object_starts, pixels, object_areas)
    if bad >= 0:
        return areas.size + bad
    box_a, box_b = np.empty(4 * areas.size, np.int64), np.empty(4 * object_areas.size, np.int64)
    _corners(a, first_a, height, box_a)
    _corners(b, first_b, height, box_b)
    for i in range(areas.size):
        for j in range(object_areas.size):
            if classes[i] == -1 or (object_classes[j] != classes[i] and object_classes[j] != -2):
                continue
            wide = min(box_a[4 * i + 2], box_b[4 * j + 2]) - max(box_a[4 * i], box_b[4 * j])
            high = min(box_a[4 * i + 3], box_b[4 * j + 3]) - max(box_a[4 * i + 1], box_b[4 * j + 1])
            if wide > 0 and high > 0:
                shared[i, j] = _shared(a, first_a[i], first_a[i + 1], b, first_b[j], first_b[j + 1])
    return -1


_NUMBER = types.int64
_STRINGS = (_read(types.uint8), _read(_NUMBER))
_RUNS = (_read(types.uint16), _read(types.uint32))


def _signature(function: Callable[..., Any], _: Any) -> Any:
    signatures: dict[Callable[..., Any], Any] = {
        label_pixels: _NUMBER(*_STRINGS, _NUMBER, _NUMBER, *_RUNS, _write(_NUMBER, 2)),
        shared_pixels: _NUMBER(
            *(*_STRINGS, _read(_NUMBER)),
            *(*_STRINGS, _read(_NUMBER)),
            *(_NUMBER, _NUMBER, _write(_NUMBER), _write(_NUMBER), _write(_NUMBER, 2)),
        ),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
