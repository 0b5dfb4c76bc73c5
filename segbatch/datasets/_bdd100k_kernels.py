"""Compiled filling of polygons as matplotlib's Agg backend does it without anti-aliasing; imported on first use.

Coordinates are whole numbers of 1/256 pixel. For every cell (pixel) that an outline passes, ``cover`` sums the height
that it rises in the cell, and ``area`` twice the surface between it and the cell's left edge. The kernels divide
rounding down, as the C++ does after its corrections.

Source: agg_rasterizer_cells_aa.h, agg_rasterizer_sl_clip.h and agg_rasterizer_scanline_aa.h of Anti-Grain Geometry
2.4, in github.com/matplotlib/matplotlib, extern/agg24-svn.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part

SCALE = 256
"""Steps of a pixel."""

Cells = NDArray[np.int32]

_ABOVE, _BELOW = 8, 2


@part
def _steps(value: float) -> int:
    """Pixels as steps, half a step away from 0."""
    return int(value * SCALE - 0.5) if value < 0 else int(value * SCALE + 0.5)


@part
def _add(cover: Cells, area: Cells, row: int, column: int, rise: int, sides: int) -> None:
    cover[row, column] += rise
    area[row, column] += sides * rise


@part
def _within_row(cover: Cells, area: Cells, row: int, x1: int, y1: int, x2: int, y2: int) -> None:
    """render_hline: a piece of outline within a row of cells; ``y1`` and ``y2`` count from the row's top."""
    if y1 == y2:
        return
    cell, last = x1 >> 8, x2 >> 8
    if cell == last:
        _add(cover, area, row, cell, y2 - y1, (x1 & 255) + (x2 & 255))
        return
    dx, onward, exit_side, way = x2 - x1, 1, SCALE, SCALE - (x1 & 255)
    if dx < 0:
        dx, onward, exit_side, way = -dx, -1, 0, x1 & 255
    rise, rest = way * (y2 - y1) // dx, way * (y2 - y1) % dx
    _add(cover, area, row, cell, rise, (x1 & 255) + exit_side)
    cell += onward
    y1 += rise
    if cell != last:
        lift, more = SCALE * (y2 - y1 + rise) // dx, SCALE * (y2 - y1 + rise) % dx
        rest -= dx
        while cell != last:
            rise = lift
            rest += more
            if rest >= 0:
                rest -= dx
                rise += 1
            _add(cover, area, row, cell, rise, SCALE)
            cell += onward
            y1 += rise
    _add(cover, area, row, cell, y2 - y1, (x2 & 255) + SCALE - exit_side)


@part
def _line(cover: Cells, area: Cells, x1: int, y1: int, x2: int, y2: int) -> None:
    """rasterizer_cells_aa::line: a piece of outline, row by row."""
    row, last = y1 >> 8, y2 >> 8
    if row == last:
        _within_row(cover, area, row, x1, y1 & 255, x2, y2 & 255)
        return
    dx, dy, onward, exit_side, way = x2 - x1, y2 - y1, 1, SCALE, SCALE - (y1 & 255)
    if dy < 0:
        dy, onward, exit_side, way = -dy, -1, 0, y1 & 255
    x, rest = x1 + way * dx // dy, way * dx % dy
    _within_row(cover, area, row, x1, y1 & 255, x, exit_side)
    row += onward
    if row != last:
        lift, more = SCALE * dx // dy, SCALE * dx % dy
        rest -= dy
        while row != last:
            step = lift
            rest += more
            if rest >= 0:
                rest -= dy
                step += 1
            _within_row(cover, area, row, x, SCALE - exit_side, x + step, exit_side)
            x += step
            row += onward
    _within_row(cover, area, row, x, SCALE - exit_side, x2, y2 & 255)


@part
def _beyond(y: float, height: float) -> int:
    return (_BELOW if y > height else 0) | (_ABOVE if y < 0 else 0)


@part
def _clipped_in_y(
    cover: Cells, area: Cells, box: tuple[float, float, float, float], x1: float, y1: float, x2: float, y2: float
) -> None:
    """line_clip_y: the part of a line that is no higher and no lower than the image."""
    height, left, top = box[1], box[2], box[3]
    first, second = _beyond(y1, height), _beyond(y2, height)
    if first and first == second:
        return
    xa, ya, xb, yb = x1, y1, x2, y2
    if first:
        ya = 0.0 if first == _ABOVE else height
        xa = x1 + (ya - y1) * (x2 - x1) / (y2 - y1)
    if second:
        yb = 0.0 if second == _ABOVE else height
        xb = x1 + (yb - y1) * (x2 - x1) / (y2 - y1)
    dx, dy = int(left) * SCALE, int(top) * SCALE
    _line(cover, area, _steps(xa) - dx, _steps(ya) - dy, _steps(xb) - dx, _steps(yb) - dy)


@part
def _clipped(
    cover: Cells, area: Cells, box: tuple[float, float, float, float], x1: float, y1: float, x2: float, y2: float
) -> None:
    """rasterizer_sl_clip::line_to: what lies left or right of the image is moved to its edge."""
    width, height = box[0], box[1]
    first, second = _beyond(y1, height), _beyond(y2, height)
    if first and first == second:
        return
    a = min(max(x1, 0.0), width)
    b = min(max(x2, 0.0), width)
    if (x1 < 0 and x2 < 0) or (x1 > width and x2 > width):
        _clipped_in_y(cover, area, box, a, y1, a, y2)
        return
    ya, yb = y1, y2
    if a != x1:
        ya = y1 + (a - x1) * (y2 - y1) / (x2 - x1)
        _clipped_in_y(cover, area, box, a, y1, a, ya)
    if b != x2:
        yb = y1 + (b - x1) * (y2 - y1) / (x2 - x1)
    _clipped_in_y(cover, area, box, a, ya, b, yb)
    if b != x2:
        _clipped_in_y(cover, area, box, b, yb, b, y2)


def fill(points: NDArray[np.float64], mask: NDArray[np.uint8]) -> None:
    """Set the pixels of a polygon by the non-zero rule: those of which it covers 1/256 or more, and traces of less
    where it turns counterclockwise.

    Args:
        points: x and y in pixels, shape (n, 2); the polygon closes by itself.
        mask: of shape (height, width); other pixels are left as they are.
    """
    height, width = mask.shape
    left = int(min(max(points[:, 0].min(), 0.0), width))
    right = int(min(max(points[:, 0].max(), 0.0), width))
    top = int(min(max(points[:, 1].min(), 0.0), height))
    bottom = int(min(max(points[:, 1].max(), 0.0), height))
    cover = np.zeros((bottom - top + 1, right - left + 1), np.int32)
    area = np.zeros_like(cover)
    box = (float(width), float(height), float(left), float(top))
    for i in range(len(points)):
        x, y = points[i - 1, 0], points[i - 1, 1]
        _clipped(cover, area, box, x, y, points[i, 0], points[i, 1])
    for row in range(min(cover.shape[0], height - top)):
        covered = 0
        for column in range(min(cover.shape[1], width - left)):
            covered += cover[row, column]
            if (covered * 2 * SCALE - area[row, column]) >> 9:
                mask[top + row, left + column] = 1


def _signature(function: Callable[..., Any], item: Any) -> Any:
    return types.void(types.Array(types.float64, 2, "C"), types.Array(item, 2, "C"))


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
