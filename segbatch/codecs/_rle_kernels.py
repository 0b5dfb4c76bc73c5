"""Compiled loops of ``rle`` and ``polygon``; imported on first use, because importing numba takes long.

Maps are column-major and flat (``flat[x * height + y]``), as COCO's run lengths are. ``text`` is a COCO ``counts``
string as uint8. What ``measure`` or ``measure_all`` has not passed must not reach another kernel: the others read
strings without looking for mistakes.

Source: common/maskApi.c of pycocotools 2.0.11 (https://github.com/ppwwyyxx/cocoapi).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part
from segbatch.codecs._runlength_kernels import BLOCK, boundaries, count_runs, lowest_bit

Text = NDArray[np.uint8]
Counts = NDArray[np.uint32]
Offsets = NDArray[np.int64]
Keys = NDArray[np.uint64]
Flat = NDArray[Any]

LONGEST_NUMBER = 7
"""Characters, of 5 bits each, that the difference of two uint32 needs."""

ENDS_EARLY, BAD_CHARACTER, TOO_LONG, OUT_OF_RANGE = -1, -2, -3, -4
"""What ``measure`` says instead of a number of runs."""

MOST_CROSSINGS = 2**24
"""Of the outline of one polygon with the pixel columns; they take 20 bytes each."""

LARGEST_COORDINATE = 2e8
"""Five times twice this is the largest C int, in which the official code computes."""

NEW_LINE = 10

EAST, SOUTH, WEST, NORTH = 0, 1, 2, 3

_count_runs = part(count_runs)


# ------------------------------------------------------------------------------------------------ strings


@part
def _measure(text: Text, begin: Any, end: Any) -> tuple[Any, Any, Any]:
    """(runs or a mistake, pixels, pixels of the foreground) of ``text[begin:end]``."""
    runs = at = pixels = area = latest = earlier = np.int64(0)
    at = begin
    while at < end:
        value, bits, digit = np.int64(0), np.int64(0), np.int64(32)
        while digit & 32:
            if at == end:
                return ENDS_EARLY, pixels, area
            digit = np.int64(text[at]) - 48
            if digit < 0 or digit > 63:
                return BAD_CHARACTER, pixels, area
            if bits == 5 * LONGEST_NUMBER:
                return TOO_LONG, pixels, area
            value |= (digit & 31) << bits
            bits += 5
            at += 1
        if digit & 16:
            value -= 1 << bits
        if runs > 2:
            value += earlier
        if value < 0 or value > 0xFFFFFFFF:
            return OUT_OF_RANGE, pixels, area
        earlier, latest = latest, value
        pixels += value
        area += value * (runs & 1)
        runs += 1
    return runs, pixels, area


def measure(text: Text) -> tuple[Any, Any, Any]:
    """(runs, pixels, pixels of the foreground) of a string from anywhere; instead of runs a mistake, below 0."""
    return _measure(text, 0, text.size)


def measure_all(text: Text, starts: Offsets, found: NDArray[np.int64]) -> None:
    """``measure`` of every ``text[starts[i] : starts[i + 1]]``, into the rows of ``found``."""
    for i in range(starts.size - 1):
        found[i, 0], found[i, 1], found[i, 2] = _measure(text, starts[i], starts[i + 1])


@part
def _read_number(text: Text, at: Any) -> tuple[Any, Any]:
    """The number at ``at`` and where the next one begins."""
    value, bits, digit = np.int64(0), np.int64(0), np.int64(32)
    while digit & 32:
        digit = np.int64(text[at]) - 48
        value |= (digit & 31) << bits
        bits += 5
        at += 1
    if digit & 16:
        value -= 1 << bits
    return value, at


@part
def _read_counts(text: Text, begin: Any, end: Any) -> Counts:
    counts = np.empty(end - begin, np.uint32)  # a count has one character or more
    runs = 0
    at = begin
    while at < end:
        value, at = _read_number(text, at)
        if runs > 2:
            value += np.int64(counts[runs - 2])
        counts[runs] = value
        runs += 1
    return counts[:runs]


@part
def _write_number(text: Text, at: Any, value: Any) -> Any:
    """Write ``value`` at ``at``; gives where the next one goes."""
    more = True
    while more:
        digit = value & 31
        value >>= 5
        more = value != -1 if digit & 16 else value != 0
        text[at] = digit + 48 + 32 * np.int64(more)
        at += 1
    return at


@part
def _write_counts(counts: Counts) -> Text:
    text = np.empty(LONGEST_NUMBER * counts.size, np.uint8)
    at = np.int64(0)
    for i in range(counts.size):
        before = np.int64(counts[i - 2]) if i > 2 else np.int64(0)
        at = _write_number(text, at, np.int64(counts[i]) - before)
    return text[:at]


def to_string(counts: Counts) -> Text:
    """rleToString."""
    return _write_counts(counts)


def from_string(text: Text) -> Counts:
    """rleFrString."""
    return _read_counts(text, 0, text.size)


# ------------------------------------------------------------------------------------------------ masks


@part
def _run_ends(flat: Flat) -> Offsets:
    """Where each run of equal items ends."""
    ends = np.empty(_count_runs(flat), np.int64)
    if not flat.size:
        return ends
    run = 0
    last = flat.size - 1
    blocks = last // BLOCK * BLOCK
    for start in range(0, blocks, BLOCK):
        word = boundaries(flat, start)
        while word:
            ends[run] = start + lowest_bit(word) + 1
            word &= word - np.uint64(1)
            run += 1
    for i in range(blocks, last):
        if flat[i] != flat[i + 1]:
            ends[run] = i + 1
            run += 1
    ends[run] = flat.size
    return ends


def encode(flat: Flat) -> Text:
    """rleEncode and rleToString of a mask of 0 and 1."""
    ends = _run_ends(flat)
    first = 1 if flat.size == 0 or flat[0] else 0  # a run of no background; an empty mask has nothing else
    counts = np.zeros(ends.size + first, np.uint32)
    begin = np.int64(0)
    for run in range(ends.size):
        counts[first + run] = ends[run] - begin
        begin = ends[run]
    return _write_counts(counts)


def paint(text: Text, starts: Offsets, values: Flat, flat: Flat) -> None:
    """Write ``values[i]`` where mask ``i`` is, one mask after the other."""
    for i in range(values.size):
        counts = _read_counts(text, starts[i], starts[i + 1])
        end = np.int64(0)
        for run in range(counts.size):
            begin = end
            end += np.int64(counts[run])
            if run & 1:
                flat[begin:end] = values[i]


@part
def _grow_rows(begin: Any, end: Any, height: Any, top: Any, bottom: Any) -> tuple[Any, Any]:
    """First and last row seen, with those of the run ``begin..end``."""
    first, last = begin // height, (end - 1) // height
    if first != last:
        return np.int64(0), height - 1
    return min(top, begin - first * height), max(bottom, end - 1 - last * height)


def bounding_box(text: Text, height: Any) -> tuple[Any, Any, Any, Any]:
    """rleToBbox: (x, y, width, height); zeros for a mask without a pixel."""
    counts = _read_counts(text, 0, text.size)
    end = np.int64(0)
    first, last, top, bottom = np.int64(-1), np.int64(-1), height, np.int64(-1)
    for run in range(counts.size):
        begin = end
        end += np.int64(counts[run])
        if run & 1 and end > begin:
            top, bottom = _grow_rows(begin, end, height, top, bottom)
            first = begin if first < 0 else first
            last = end - 1
    if first < 0:
        zero = np.int64(0)
        return zero, zero, zero, zero
    left = first // height
    return left, top, last // height - left + 1, bottom - top + 1


# ------------------------------------------------------------------------------------------------ several masks


@part
def _merge_two(a: Counts, b: Counts, pixels: Any, intersect: Any) -> Counts:
    """The loop of rleMerge; it ends with the last pixel, not at two empty runs that meet."""
    merged = np.empty(a.size + b.size + 1, np.uint32)
    left_a, left_b = np.int64(a[0]), np.int64(b[0])
    next_a = next_b = 1
    in_a = in_b = inside = False
    runs = 0
    length = position = np.int64(0)
    while True:
        step = min(left_a, left_b)
        length += step
        position += step
        left_a -= step
        if left_a == 0 and next_a < a.size:
            left_a = np.int64(a[next_a])
            next_a += 1
            in_a = not in_a
        left_b -= step
        if left_b == 0 and next_b < b.size:
            left_b = np.int64(b[next_b])
            next_b += 1
            in_b = not in_b
        before = inside
        inside = (in_a and in_b) if intersect else (in_a or in_b)
        if inside != before or position == pixels:
            merged[runs] = length
            runs += 1
            length = np.int64(0)
        if position == pixels:
            return merged[:runs]


def merge(text: Text, starts: Offsets, pixels: Any, intersect: Any) -> Text:
    """rleMerge of one mask or more, none of them without runs."""
    merged = _read_counts(text, starts[0], starts[1])
    for i in range(1, starts.size - 1):
        merged = _merge_two(merged, _read_counts(text, starts[i], starts[i + 1]), pixels, intersect)
    return _write_counts(merged)


@part
def _intervals(text: Text, starts: Offsets) -> tuple[Offsets, Offsets]:
    """Begin and end of every foreground run, in pairs, and where those of each mask start."""
    bounds = np.empty(text.size + 1, np.int64)
    first = np.zeros(starts.size, np.int64)
    size = 0
    for i in range(starts.size - 1):
        counts = _read_counts(text, starts[i], starts[i + 1])
        end = np.int64(0)
        for run in range(counts.size):
            begin = end
            end += np.int64(counts[run])
            if run & 1:
                bounds[size], bounds[size + 1] = begin, end
                size += 2
        first[i + 1] = size
    return bounds, first


@part
def _shared(a: Offsets, i: Any, end_a: Any, b: Offsets, j: Any, end_b: Any) -> Any:
    """Pixels in both lists of intervals, ``a[i:end_a]`` and ``b[j:end_b]``."""
    pixels = np.int64(0)
    while i < end_a and j < end_b:
        pixels += max(min(a[i + 1], b[j + 1]) - max(a[i], b[j]), 0)
        if a[i + 1] < b[j + 1]:
            i += 2
        else:
            j += 2
    return pixels


def intersections(text_a: Text, starts_a: Offsets, text_b: Text, starts_b: Offsets, areas: NDArray[np.int64]) -> None:
    """``areas[i, j]``: pixels that mask ``i`` of the first list shares with mask ``j`` of the second."""
    a, first_a = _intervals(text_a, starts_a)
    b, first_b = _intervals(text_b, starts_b)
    for i in range(areas.shape[0]):
        for j in range(areas.shape[1]):
            areas[i, j] = _shared(a, first_a[i], first_a[i + 1], b, first_b[j], first_b[j + 1])


# ------------------------------------------------------------------------------------------------ maps of ids


@part
def _byte(key: Any, shift: Any) -> Any:
    return np.int64((key >> np.uint64(shift)) & np.uint64(255))


@part
def _sorted(keys: Keys, low_bit: Any) -> Keys:
    """``keys`` sorted by their bits from ``low_bit`` on; equal ones keep their order. Byte by byte, in linear time."""
    different = np.uint64(0)
    for i in range(keys.size):
        different |= keys[i] ^ keys[0]
    other = np.empty_like(keys)
    places = np.empty(257, np.int64)
    for shift in range(low_bit, 64, 8):
        if not _byte(different, shift):
            continue
        places[:] = 0
        for i in range(keys.size):
            places[_byte(keys[i], shift) + 1] += 1
        for value in range(1, 256):
            places[value] += places[value - 1]
        for i in range(keys.size):
            value = _byte(keys[i], shift)
            other[places[value]] = keys[i]
            places[value] += 1
        keys, other = other, keys
    return keys


@part
def _characters(pixels: Any) -> Any:
    """Most characters of a number between -pixels and pixels."""
    characters = 1
    while pixels >> (5 * characters - 1):
        characters += 1
    return characters


@part
def _runs_by_id(flat: Flat, ends: Offsets) -> Keys:
    """``id << 32 | run``, sorted."""
    keys = np.empty(ends.size, np.uint64)
    for run in range(ends.size):
        keys[run] = np.uint64(flat[ends[run] - 1]) << np.uint64(32) | np.uint64(run)
    return _sorted(keys, 32)


@part
def _groups(keys: Keys, skipped: Counts) -> Offsets:
    """First and past-the-last place in ``keys`` of every id that is not skipped, in pairs."""
    groups = np.empty(2 * keys.size, np.int64)
    size = begin = 0
    for i in range(1, keys.size + 1):
        if i < keys.size and (keys[i] ^ keys[begin]) >> np.uint64(32) == 0:
            continue
        if not (skipped == np.uint32(keys[begin] >> np.uint64(32))).any():
            groups[size], groups[size + 1] = begin, i
            size += 2
        begin = i
    return groups[:size]


@part
def _run(keys: Keys, place: Any, ends: Offsets) -> tuple[Any, Any]:
    """Begin and end of the run that ``keys[place]`` names."""
    run = np.int64(keys[place] & np.uint64(0xFFFFFFFF))
    return ends[run - 1] if run else np.int64(0), ends[run]


@part
def _write_instance(
    keys: Keys, first: Any, past: Any, ends: Offsets, height: Any, box: NDArray[np.int64], text: Text, at: Any
) -> tuple[Any, Any]:
    """Box and string of the mask whose runs are ``keys[first:past]``; gives its area and where the string ends."""
    pixels = ends[-1]
    area = end = gap = length = np.int64(0)
    top, bottom = height, np.int64(-1)
    for place in range(first, past):
        begin, next_end = _run(keys, place, ends)
        at = _write_number(text, at, begin - end - (gap if place > first + 1 else 0))
        at = _write_number(text, at, next_end - begin - length)
        gap, length, end = begin - end, next_end - begin, next_end
        area += length
        top, bottom = _grow_rows(begin, end, height, top, bottom)
    if end < pixels:
        at = _write_number(text, at, pixels - end - (gap if past > first + 1 else 0))
    left = _run(keys, first, ends)[0] // height
    box[0], box[1], box[2], box[3] = left, top, (end - 1) // height - left + 1, bottom - top + 1
    return area, at


def instances(flat: Flat, height: Any, skipped: Counts) -> tuple[Counts, Offsets, NDArray[np.int64], Text]:
    """(ids, areas, boxes (n, 4), strings, each on a line) of every id that is not skipped."""
    ends = _run_ends(flat)
    keys = _runs_by_id(flat, ends)
    groups = _groups(keys, skipped)
    number = groups.size // 2
    ids, areas = np.empty(number, np.uint32), np.empty(number, np.int64)
    boxes = np.empty((number, 4), np.int64)
    runs = (groups[1::2] - groups[::2]).sum()
    text = np.empty(_characters(flat.size) * (2 * runs + number) + number, np.uint8)
    at = np.int64(0)
    for i in range(number):
        first, past = groups[2 * i], groups[2 * i + 1]
        ids[i] = keys[first] >> np.uint64(32)
        areas[i], at = _write_instance(keys, first, past, ends, height, boxes[i], text, at)
        text[at] = NEW_LINE
        at += 1
    return ids, areas, boxes, text[:at]


# ------------------------------------------------------------------------------------------------ polygons


@part
def _columns_crossed(x: Any, next_x: Any, width: Any) -> tuple[Any, Any]:
    """First and past-the-last pixel column whose middle line an edge crosses, of those in the image.

    Coordinates count fifths of a pixel. Column c is crossed between 5c + 2 and 5c + 3.
    """
    return max((min(x, next_x) + 2) // 5, 0), min((max(x, next_x) + 2) // 5, width)


@part
def _row_of(v: Any, height: Any) -> Any:
    """The first pixel row below a crossing ``v`` fifths of a pixel down: ceil((v + 0.5) / 5 - 0.5), in the image."""
    return min((max(v, 0) + 2) // 5, height)


@part
def _cross_flat_edge(x: Any, y: Any, dx: Any, dy: Any, columns: Any, height: Any, places: Any) -> None:
    """Where an edge that is wider than high, or square, crosses ``columns``; it runs to the right."""
    slope = np.float64(dy) / np.float64(dx)
    for column in range(columns[0], columns[1]):
        step = 5 * column + 2 - x + (slope < 0)  # of the two ends of the crossing step the upper one
        row = _row_of(np.int64(y + slope * step + 0.5), height)
        places[column - columns[0]] = column * height + row


@part
def _cross_steep_edge(x: Any, y: Any, dx: Any, dy: Any, columns: Any, height: Any, places: Any) -> None:
    """Where an edge that is higher than wide crosses ``columns``; it runs down.

    The step that crosses is guessed from the slope, then found with the very sums that the official code rounds.
    """
    slope = np.float64(dx) / np.float64(dy)
    right = dx > 0
    for column in range(columns[0], columns[1]):
        border = 5 * column + 3
        step = min(max(np.int64((border - 0.5 - x) / slope), 1), dy)
        while step > 1 and (np.int64(x + slope * (step - 1) + 0.5) >= border) == right:
            step -= 1
        while step < dy and (np.int64(x + slope * step + 0.5) >= border) != right:
            step += 1
        places[column - columns[0]] = column * height + _row_of(y + step - 1, height)


@part
def _crossings(x: Offsets, y: Offsets, height: Any, width: Any, total: Any) -> Keys:
    """``column * height + row`` of every place where the closed outline crosses the middle line of a column."""
    places = np.empty(total, np.uint64)
    size = 0
    for i in range(x.size - 1):
        columns = _columns_crossed(x[i], x[i + 1], width)
        if columns[0] >= columns[1]:
            continue
        dx, dy = x[i + 1] - x[i], y[i + 1] - y[i]
        flat = abs(dx) >= abs(dy)
        start = i
        if (dx if flat else dy) < 0:
            start, dx, dy = i + 1, -dx, -dy
        if flat:
            _cross_flat_edge(x[start], y[start], dx, dy, columns, height, places[size:])
        else:
            _cross_steep_edge(x[start], y[start], dx, dy, columns, height, places[size:])
        size += columns[1] - columns[0]
    return places


@part
def _counts_between(places: Keys, pixels: Any) -> Counts:
    """Run lengths that change at every one of the sorted places which is there an odd number of times."""
    counts = np.empty(places.size + 1, np.uint32)
    runs = i = 0
    end = np.int64(0)
    while i < places.size:
        place = np.int64(places[i])
        odd = False
        while i < places.size and np.int64(places[i]) == place:
            odd = not odd
            i += 1
        if odd and place < pixels:
            counts[runs] = place - end
            runs += 1
            end = place
    if runs == 0 or end < pixels:
        counts[runs] = pixels - end
        runs += 1
    return counts[:runs]


@part
def _fifths(xy: NDArray[np.float64]) -> tuple[Offsets, Offsets]:
    """The closed outline in fifths of a pixel, rounded as C does."""
    points = xy.size // 2
    x, y = np.empty(points + 1, np.int64), np.empty(points + 1, np.int64)
    for i in range(points):
        x[i] = np.int64(5.0 * xy[2 * i] + 0.5)
        y[i] = np.int64(5.0 * xy[2 * i + 1] + 0.5)
    x[points], y[points] = x[0], y[0]
    return x, y


@part
def _union(xy: NDArray[np.float64], starts: Offsets, height: Any, width: Any) -> Counts:
    """rleFrPoly of every ``xy[starts[i] : starts[i + 1]]``, and rleMerge; no runs for polygons too long to draw."""
    merged = np.full(1, height * width, np.uint32)
    for i in range(starts.size - 1):
        if starts[i + 1] - starts[i] < 6:
            continue  # two points or fewer: no area
        x, y = _fifths(xy[starts[i] : starts[i + 1]])
        total = np.int64(0)
        for j in range(x.size - 1):
            first, end = _columns_crossed(x[j], x[j + 1], width)
            total += max(end - first, 0)
        if total > MOST_CROSSINGS:
            return merged[:0]
        counts = _counts_between(_sorted(_crossings(x, y, height, width, total), 0), height * width)
        merged = counts if merged.size == 1 else _merge_two(merged, counts, height * width, False)
    return merged


def rasterize(xy: NDArray[np.float64], starts: Offsets, firsts: Offsets, height: Any, width: Any) -> Text:
    """The masks ``i``, each the union of the polygons ``firsts[i]`` to ``firsts[i + 1]``.

    Gives their strings, each on a line; fewer than asked for where the next one cannot be drawn.
    """
    text = np.empty(256 * firsts.size, np.uint8)
    size = np.int64(0)
    for i in range(firsts.size - 1):
        own = starts[firsts[i] : firsts[i + 1] + 1]
        for at in range(own[0], own[-1]):
            if not abs(xy[at]) <= LARGEST_COORDINATE:
                return text[:size]
        counts = _union(xy, own, height, width)
        if not counts.size:
            return text[:size]
        string = _write_counts(counts)
        if size + string.size >= text.size:
            longer = np.empty(2 * (size + string.size + 1), np.uint8)
            longer[:size] = text[:size]
            text = longer
        text[size : size + string.size] = string
        text[size + string.size] = NEW_LINE
        size += string.size + 1
    return text[:size]


# ------------------------------------------------------------------------------------------------ outlines


def count_corners(mask: NDArray[np.uint8]) -> int:
    """Corners of all outlines of a mask of 0 and 1 whose border is 0."""
    corners = 0
    for y in range(1, mask.shape[0]):
        for x in range(1, mask.shape[1]):
            a, b, c, d = mask[y - 1, x - 1], mask[y - 1, x], mask[y, x - 1], mask[y, x]
            corners += (a ^ b ^ c ^ d) + 2 * ((a ^ b) & (a ^ c) & (c ^ d))
    return corners


@part
def _sides(mask: NDArray[np.uint8], x: Any, y: Any, heading: Any) -> tuple[Any, Any]:
    """The pixels ahead, left and right of who stands at the corner (x, y) of pixel [y, x]."""
    if heading == EAST:
        return mask[y - 1, x], mask[y, x]
    if heading == SOUTH:
        return mask[y, x], mask[y, x - 1]
    if heading == WEST:
        return mask[y, x - 1], mask[y - 1, x - 1]
    return mask[y - 1, x - 1], mask[y - 1, x]


@part
def _follow(mask: NDArray[np.uint8], seen: NDArray[np.uint8], x: Any, y: Any, xy: Any, size: Any) -> tuple[Any, Any]:
    """Walk the outline with the mask on the right, from the left end of an upper side of pixel [y, x] back to it.

    Gives where the corners written to ``xy`` end, and twice the area that they enclose: below 0 for a hole.
    """
    heading, at_x, at_y = EAST, x, y
    before_x, before_y = x, y
    area = np.int64(0)
    while True:
        if heading == EAST:
            seen[at_y, at_x] = 1
        at_x += (heading == EAST) - np.int64(heading == WEST)
        at_y += (heading == SOUTH) - np.int64(heading == NORTH)
        left, right = _sides(mask, at_x, at_y, heading)
        turn = 0
        if not right:
            turn = 1
        elif left:
            turn = 3
        heading = (heading + turn) & 3
        if turn:
            xy[size], xy[size + 1] = at_x, at_y
            size += 2
            area += before_x * at_y - at_x * before_y
            before_x, before_y = at_x, at_y
        if at_x == x and at_y == y and heading == EAST:
            return size, area


def trace(mask: NDArray[np.uint8], xy: Any, ends: Offsets, outer: NDArray[np.uint8]) -> int:
    """Corners of every outline into ``xy``, where each ends into ``ends``, whether it is no hole into ``outer``.

    The border of the mask is 0. Returns the number of outlines. They come in the order of their first upper side.
    """
    seen = np.zeros(mask.shape, np.uint8)
    rings = 0
    size = np.int64(0)
    for y in range(1, mask.shape[0]):
        for x in range(1, mask.shape[1]):
            if mask[y, x] and not mask[y - 1, x] and not seen[y, x]:
                size, area = _follow(mask, seen, x, y, xy, size)
                ends[rings], outer[rings] = size, area > 0
                rings += 1
    return rings


# ------------------------------------------------------------------------------------------------ compiling


def _read(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C", readonly=True)  # takes writable arrays too


def _write(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C")


_NUMBER, _TEXT, _COUNT, _OFFSET = types.int64, types.uint8, types.uint32, types.int64
_STRINGS = (_read(_TEXT), _read(_OFFSET))


def _tuple(*items: Any) -> Any:
    return types.Tuple(items)  # type: ignore[no-untyped-call]


def _signature(function: Callable[..., Any], item: Any) -> Any:
    signatures: dict[Callable[..., Any], Any] = {
        measure: _tuple(_NUMBER, _NUMBER, _NUMBER)(_read(_TEXT)),
        measure_all: types.void(*_STRINGS, _write(_NUMBER, 2)),
        to_string: _write(_TEXT)(_read(_COUNT)),
        from_string: _write(_COUNT)(_read(_TEXT)),
        encode: _write(_TEXT)(_read(item)),
        paint: types.void(*_STRINGS, _read(item), _write(item)),
        bounding_box: _tuple(_NUMBER, _NUMBER, _NUMBER, _NUMBER)(_read(_TEXT), _NUMBER),
        merge: _write(_TEXT)(*_STRINGS, _NUMBER, types.boolean),
        intersections: types.void(*_STRINGS, *_STRINGS, _write(_NUMBER, 2)),
        instances: _tuple(_write(_COUNT), _write(_NUMBER), _write(_NUMBER, 2), _write(_TEXT))(
            _read(item), _NUMBER, _read(_COUNT)
        ),
        rasterize: _write(_TEXT)(_read(types.float64), _read(_OFFSET), _read(_OFFSET), _NUMBER, _NUMBER),
        count_corners: _NUMBER(_read(types.uint8, 2)),
        trace: _NUMBER(_read(types.uint8, 2), _write(types.float64), _write(_OFFSET), _write(types.uint8)),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
