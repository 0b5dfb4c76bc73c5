"""The compiled loop of RoIAlign; imported on first use, because importing numba takes long.

Source: ``roi_align_forward_kernel_impl`` of torchvision, torchvision/csrc/ops/cpu/roi_align_kernel.cpp and
roi_align_common.h, whose result is the same to the bit on x86-64. That goes through one channel at a time, a number
after the other; here the channels lie together, and the compiler uses vectors.
"""

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs._jit import kept, part

Floats = NDArray[np.float32]


@part
def _samples_along(
    start: np.float32,
    step: np.float32,
    count: int,
    length: int,
    near: NDArray[np.int64],
    far: NDArray[np.int64],
    weight: Floats,
    inside: NDArray[np.bool_],
) -> None:
    """Between which rows (or columns) the sampling points of a region lie, and how near to the far one.

    Args:
        start: where the region begins, in rows.
        step: length of a cell.
        count: sampling points in a cell.
        length: rows of the map.
        near, far, weight: filled, a value for each sampling point.
        inside: filled: whether the point counts; more than a row beyond the map it is 0, and so is not-a-number.
    """
    for i in range(near.size):
        at = start + np.float32(i // count) * step + np.float32(i % count + 0.5) * step / np.float32(count)
        inside[i] = at >= np.float32(-1) and at <= np.float32(length)
        if not inside[i]:
            continue
        at = max(at, np.float32(0))
        near[i] = int(at)
        if near[i] >= length - 1:
            near[i] = far[i] = length - 1
            weight[i] = np.float32(0)
        else:
            far[i] = near[i] + 1
            weight[i] = at - np.float32(near[i])


@kept
def pool(
    features: Floats, regions: Floats, which: NDArray[np.int64], scale: float, samples: int, side: int, out: Floats
) -> None:
    """RoIAlign of some regions of one image on one map, not shifted by half a pixel (``aligned=False``).

    Args:
        features: (rows, columns, channels) of a map.
        regions: (n, 4) x0, y0, x1, y1 in pixels of the image.
        which: indices of the regions that are to be pooled.
        scale: rows of the map for a pixel of the image.
        samples: sampling points along each side of a cell; 0: one for every row (column) of the map that it is high.
        side: cells along each side of what comes out.
        out: (n, channels, side * side); those of ``which`` are filled.
    """
    height, width, channels = features.shape
    one, factor = np.float32(1), np.float32(scale)
    cells = np.empty((side * side, channels), np.float32)
    for region in which:
        left, top = regions[region, 0] * factor, regions[region, 1] * factor
        down = max(regions[region, 3] * factor - top, one)
        across = max(regions[region, 2] * factor - left, one)
        rows = samples if samples > 0 else int(np.ceil(down / np.float32(side)))
        columns = samples if samples > 0 else int(np.ceil(across / np.float32(side)))
        upper, lower = np.empty(side * rows, np.int64), np.empty(side * rows, np.int64)
        y, inside_y = np.empty(side * rows, np.float32), np.empty(side * rows, np.bool_)
        _samples_along(top, down / np.float32(side), rows, height, upper, lower, y, inside_y)
        before, behind = np.empty(side * columns, np.int64), np.empty(side * columns, np.int64)
        x, inside_x = np.empty(side * columns, np.float32), np.empty(side * columns, np.bool_)
        _samples_along(left, across / np.float32(side), columns, width, before, behind, x, inside_x)
        for cell in range(side * side):
            total = cells[cell]
            total[:] = 0
            row, column = cell // side, cell % side
            for i in range(row * rows, (row + 1) * rows):
                if not inside_y[i]:
                    continue
                for j in range(column * columns, (column + 1) * columns):
                    if not inside_x[j]:
                        continue
                    w00, w01 = (one - y[i]) * (one - x[j]), (one - y[i]) * x[j]
                    w10, w11 = y[i] * (one - x[j]), y[i] * x[j]
                    a, b = features[upper[i], before[j]], features[upper[i], behind[j]]
                    c, d = features[lower[i], before[j]], features[lower[i], behind[j]]
                    for k in range(channels):
                        total[k] += w00 * a[k] + w01 * b[k] + w10 * c[k] + w11 * d[k]
            for k in range(channels):
                total[k] /= np.float32(rows * columns)
        for k in range(channels):
            for cell in range(side * side):
                out[region, k, cell] = cells[cell, k]
