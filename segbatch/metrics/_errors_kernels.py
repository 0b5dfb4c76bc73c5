"""Compiled loops of the error analyses of label maps; imported on first use, because importing numba takes long.

A pair of label maps stands as its stretches: pixels ``begins[s]`` to ``ends[s] - 1`` of one row, counted row-major over
the whole image, where neither map changes its label.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part

Numbers = NDArray[np.int64]
Pixels = NDArray[np.uint8]


def stretches(
    truth_values: NDArray[np.uint16],
    truth_lengths: NDArray[np.uint32],
    values: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    columns: Any,
    pixels: Any,
    begins: Numbers,
    ends: Numbers,
    truth: Numbers,
    predicted: Numbers,
) -> Any:
    """The stretches of two maps, as long as they can be.

    Args:
        truth_values, truth_lengths, values, lengths: runs of both maps, which cover ``pixels`` pixels each.
        columns: of the image.
        begins, ends, truth, predicted: room for as many stretches as there are runs and rows.

    Gives how many there are.
    """
    count = i = j = 0
    position: Any = np.int64(0)
    end_truth: Any = np.int64(0)
    end_predicted: Any = np.int64(0)
    row_end: Any = np.int64(0)
    while position < pixels:
        is_new_row = position == row_end
        if is_new_row:
            row_end += columns
        while end_truth <= position:
            end_truth += np.int64(truth_lengths[i])
            i += 1
        while end_predicted <= position:
            end_predicted += np.int64(lengths[j])
            j += 1
        end = min(end_truth, end_predicted, row_end)
        of_truth, of_prediction = np.int64(truth_values[i - 1]), np.int64(values[j - 1])
        if not is_new_row and truth[count - 1] == of_truth and predicted[count - 1] == of_prediction:
            ends[count - 1] = end
        else:
            begins[count], ends[count] = position, end
            truth[count], predicted[count] = of_truth, of_prediction
            count += 1
        position = end
    return count


@part
def _lengthen(streak: NDArray[np.int32], last: Numbers, first: Any, end: Any, code: Any, depth: Any) -> None:
    """A row holds ``code`` from ``first`` to ``end - 1``: count the rows whose pieces of ``2 depth + 1`` are of it."""
    columns = streak.size
    low = first + depth if first else 0
    high = end - depth if end < columns else columns
    streak[first : min(low, end)] = 0
    streak[max(high, first) : end] = 0
    for x in range(low, high):
        streak[x] = streak[x] + 1 if last[x] == code else 1
        last[x] = code


def interior(begins: Numbers, ends: Numbers, codes: Numbers, depth: Any, inside: NDArray[np.uint8]) -> None:
    """Which pixels see their own code alone in the square of ``2 depth + 1`` pixels around them, as far as it lies in
    the image.

    Args:
        begins, ends: stretches that cover the image.
        codes: what each of them shows; neighbours may show the same.
        depth: at least 0.
        inside: the output, 0 or 1, of shape (height, columns).
    """
    height, columns = inside.shape
    streak, last = np.zeros(columns, np.int32), np.zeros(columns, np.int64)
    at = 0
    for y in range(height):
        start = y * columns
        x: Any = np.int64(0)
        while x < columns:
            code, first = codes[at], x
            while x < columns and codes[at] == code:
                x = ends[at] - start
                at += 1
            _lengthen(streak, last, first, x, code, depth)
        middle = y - depth
        if middle >= 0:
            rows = np.int32(y - max(middle - depth, 0) + 1)
            for x in range(columns):
                inside[middle, x] = streak[x] >= rows
    for middle in range(max(height - depth, 0), height):
        rows = np.int32(height - max(middle - depth, 0))
        for x in range(columns):
            inside[middle, x] = streak[x] >= rows


def sums(begins: Numbers, ends: Numbers, pixels: Pixels, found: Numbers) -> None:
    """Sum of a map's flat ``pixels`` over each stretch, into ``found``."""
    for s in range(begins.size):
        total: Any = np.int64(0)
        for at in range(begins[s], ends[s]):
            total += np.int64(pixels[at])
        found[s] = total


def tally(begins: Numbers, ends: Numbers, right: Numbers, pixels: Pixels, table: NDArray[np.int64]) -> None:
    """Add 1 to the first number of row ``pixels[at]`` of ``table`` (256, 2), and ``right[s]`` to the second."""
    for s in range(begins.size):
        for at in range(begins[s], ends[s]):
            level = pixels[at]
            table[level, 0] += 1
            table[level, 1] += right[s]


@part
def _root(parents: Numbers, place: Any) -> Any:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


def components(begins: Numbers, ends: Numbers, codes: Numbers, firsts: Numbers, columns: Any, parents: Numbers) -> None:
    """Give every stretch the first one of its component: 4-connected, of one code.

    Args:
        begins, ends, codes: of the stretches, in order; those of one code do not touch within a row.
        firsts: where those of each row begin, and where the last row's end.
        columns: of the image.
        parents: the output; 0, 1, 2 ... before.
    """
    for row in range(1, firsts.size - 1):
        a, b = firsts[row - 1], firsts[row]
        while a < firsts[row] and b < firsts[row + 1]:
            above, below = ends[a] + columns, ends[b]
            if codes[a] == codes[b] and begins[a] + columns < below and begins[b] < above:
                one, other = _root(parents, a), _root(parents, b)
                if one < other:
                    parents[other] = one
                else:
                    parents[one] = other
            if above <= below:
                a += 1
            else:
                b += 1
    for place in range(parents.size):
        parents[place] = _root(parents, place)


def _read(item: Any) -> Any:
    return types.Array(item, 1, "C", readonly=True)


def _write(item: Any, dimensions: int = 1) -> Any:
    return types.Array(item, dimensions, "C")


def _signature(function: Callable[..., Any], _: Any) -> Any:
    number, pixel = types.int64, types.uint8
    numbers, out = _read(number), _write(number)
    runs = (_read(types.uint16), _read(types.uint32))
    signatures: dict[Callable[..., Any], Any] = {
        stretches: number(*runs, *runs, number, number, out, out, out, out),
        interior: types.void(numbers, numbers, numbers, number, _write(pixel, 2)),
        sums: types.void(numbers, numbers, _read(pixel), out),
        tally: types.void(numbers, numbers, numbers, _read(pixel), _write(number, 2)),
        components: types.void(numbers, numbers, numbers, numbers, number, out),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
