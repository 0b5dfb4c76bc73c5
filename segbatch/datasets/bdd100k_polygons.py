"""BDD100K's ``poly2d``: polygons with straight and Bezier edges, drawn as the official converter draws them.

The official converter draws with matplotlib, not anti-aliased: corners and control points are rounded to whole pixels,
curves become lines as Anti-Grain Geometry's curve4_div makes them, and every pixel counts that the polygon touches.
For pictures of 1280 x 720 the masks are matplotlib's, pixel by pixel.

Sources: github.com/bdd100k/bdd100k, bdd100k/label/to_mask.py (frame_to_mask); github.com/scalabel/scalabel,
scalabel/label/transforms.py (poly_to_patch); agg_curves.cpp of Anti-Grain Geometry 2.4 in matplotlib.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]

LARGEST_COORDINATE = 2e8
"""In pixels; polygons that go further are refused."""

_DEEPEST = 32
_COLLINEAR = 1e-30
_TOLERANCE = 0.25  # square of half a pixel


def points_of(vertices: Sequence[Point], types: str) -> NDArray[np.float64]:
    """The outline of a polygon as straight lines.

    Args:
        vertices: x and y in pixels.
        types: a letter per vertex: L for a corner; C for a point of a cubic curve from the point before, which takes
            three of them, the last being its end (or the first vertex, where the polygon closes).

    Returns:
        float64 of shape (n, 2); it closes by itself.

    Raises:
        ValueError: not a letter per vertex, another letter, a curve without its three points, less than three
            vertices, or a coordinate beyond 2e8.
    """
    if len(vertices) != len(types) or set(types) - {"L", "C"}:
        raise ValueError(f"{len(vertices)} vertices need as many letters L or C, not {types[:40]!r}")
    if len(vertices) < 3:
        raise ValueError(f"{len(vertices)} vertices enclose nothing")
    if not (np.abs(np.asarray(vertices, np.float64)) <= LARGEST_COORDINATE).all():
        raise ValueError(f"a coordinate is beyond {LARGEST_COORDINATE:g}")
    rounded: list[Point] = [(x, y) for x, y in np.floor(np.asarray(vertices, np.float64) + 0.5).tolist()]
    rounded.append(rounded[0])
    outline, at = [rounded[0]], 1
    while at < len(rounded):
        if at == len(types) or types[at] == "L":
            outline.append(rounded[at])
            at += 1
            continue
        if at + 3 > len(rounded):
            raise ValueError("the last curve lacks points: it takes three")
        outline += [*_curve(outline[-1], rounded[at], rounded[at + 1], rounded[at + 2]), rounded[at + 2]]
        at += 3
    return np.array(outline)


def fill(points: NDArray[np.float64], mask: NDArray[np.uint8]) -> None:
    """Set what ``points`` (see ``points_of``) enclose in ``mask``, uint8 of shape (height, width), to 1."""
    from segbatch.datasets import _bdd100k_kernels as kernels  # slow to import, so not before it is needed

    kernels.kernel(kernels.fill)(np.ascontiguousarray(points, np.float64), mask)


def _middle(a: Point, b: Point) -> Point:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def _curve(start: Point, first: Point, second: Point, end: Point, level: int = 0) -> Iterator[Point]:
    """recursive_bezier: the points between the ends of a cubic curve with two control points."""
    if level > _DEEPEST:
        return
    between = _middle(first, second)
    found = _flat(start, first, second, end, between)
    if found is not None:
        yield from found
        return
    near, far = _middle(start, first), _middle(second, end)
    near_between, between_far = _middle(near, between), _middle(between, far)
    middle = _middle(near_between, between_far)
    yield from _curve(start, near, near_between, middle, level + 1)
    yield from _curve(middle, between_far, far, end, level + 1)


def _flat(start: Point, first: Point, second: Point, end: Point, between: Point) -> tuple[Point, ...] | None:
    """The points that stand for a curve that is nearly a line; None where it bends too much."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    off_first = abs((first[0] - end[0]) * dy - (first[1] - end[1]) * dx)
    off_second = abs((second[0] - end[0]) * dy - (second[1] - end[1]) * dx)
    if off_first <= _COLLINEAR and off_second <= _COLLINEAR:
        return _on_a_line(start, first, second, end)
    off = (off_first if off_first > _COLLINEAR else 0.0) + (off_second if off_second > _COLLINEAR else 0.0)
    return (between,) if off * off <= _TOLERANCE * (dx * dx + dy * dy) else None


def _on_a_line(start: Point, first: Point, second: Point, end: Point) -> tuple[Point, ...] | None:
    """The same where all four points lie on a line, or the ends coincide."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    if length == 0:
        distances = [_squared(start, first), _squared(end, second)]
    else:
        scale = 1 / length
        places = [scale * ((p[0] - start[0]) * dx + (p[1] - start[1]) * dy) for p in (first, second)]
        if all(0 < place < 1 for place in places):
            return ()
        distances = [
            _squared(p, start if place <= 0 else end if place >= 1 else (start[0] + place * dx, start[1] + place * dy))
            for p, place in zip((first, second), places, strict=True)
        ]
    farthest = first if distances[0] > distances[1] else second
    return (farthest,) if max(distances) < _TOLERANCE else None


def _squared(a: Point, b: Point) -> float:
    return (b[0] - a[0]) * (b[0] - a[0]) + (b[1] - a[1]) * (b[1] - a[1])
