"""Compiled loop of ``boundary_iou``; imported on first use, because importing numba takes long.

Source: ``mask_to_boundary`` of github.com/bowenc0221/boundary-iou-api: a pixel of a mask is boundary unless the square
of ``2 width + 1`` pixels around it lies in the image and in the mask.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part


@part
def _cut(since: NDArray[np.int32], begin: Any, end: Any, width: Any, y: Any) -> None:
    """Where the row's square is cut by an end of its run, no square can begin before the next row."""
    for x in range(begin, min(begin + width, end)):
        since[x] = y + 1
    for x in range(max(end - width, begin), end):
        since[x] = y + 1


def boundary_labels(
    values: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    width: int,
    interior: int,
    labels: NDArray[np.uint16],
    since: NDArray[np.int32],
) -> None:
    """The label of every pixel within ``width`` of another label or of the image's border, ``interior`` elsewhere.

    One pass over the rows. The square around a pixel is of one label if each of its rows is, from end to end, and they
    are of the same. ``since`` tells for each column from which row on the rows are alike there and none is cut: the
    pixel in the middle of the last ``2 width + 1`` rows is interior if they all are.

    Args:
        values, lengths: runs, which cover ``labels`` exactly.
        width: of the boundary in pixels, at least 1.
        interior: an id, which labels may have too.
        labels: the output, of shape (height, columns), at least one pixel.
        since: zeros of shape (columns,), a scratch pad.
    """
    height, columns = labels.shape
    run = 0
    left = np.int64(lengths[0])
    for y in range(height):
        line = labels[y]
        x = first = 0
        while x < columns:
            while left == 0:
                run += 1
                left = np.int64(lengths[run])
            if x > first and values[run] != line[first]:
                _cut(since, first, x, width, y)
                first = x
            end = min(columns, x + left)
            left -= end - x
            line[x:end] = values[run]
            x = end
        _cut(since, first, columns, width, y)
        row = np.int32(y)
        if y:
            above = labels[y - 1]
            for x in range(columns):
                since[x] = row if line[x] != above[x] and since[x] < row else since[x]
        top = row - np.int32(2 * width)
        if top >= 0:
            middle = labels[y - width]
            for x in range(columns):
                middle[x] = np.uint16(interior) if since[x] <= top else middle[x]


def _signature(function: Callable[..., Any], _: Any) -> Any:
    read_ids = types.Array(types.uint16, 1, "C", readonly=True)
    read_lengths = types.Array(types.uint32, 1, "C", readonly=True)
    labels, since = types.Array(types.uint16, 2, "C"), types.Array(types.int32, 1, "C")
    signatures: dict[Callable[..., Any], Any] = {
        boundary_labels: types.void(read_ids, read_lengths, types.int64, types.int64, labels, since),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
