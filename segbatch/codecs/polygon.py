"""COCO polygons: to masks as pycocotools draws them, and from masks along the edges of the pixels.

A polygon is a flat list x0, y0, x1, y1, ... in pixels; it closes by itself. (0, 0) is the upper left corner of the
first pixel and (width, height) the lower right corner of the last.

Source: rleFrPoly in common/maskApi.c of pycocotools 2.0.11 (https://github.com/ppwwyyxx/cocoapi).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segbatch.codecs.rle import pixels_of

ROUNDING = 1e-12
"""Areas below this part of the square around a polygon are what rounding leaves of no area."""


_NOTHING: NDArray[np.float64] = np.empty(0)


class Contours(NamedTuple):
    """The outlines of a mask, each a flat polygon of float64.

    Attributes:
        outers: around each 4-connected region, clockwise on the screen.
        holes: around what the regions enclose, counterclockwise.
    """

    outers: list[NDArray[np.float64]]
    holes: list[NDArray[np.float64]]


def rasterize(polygons: Sequence[ArrayLike], height: int, width: int) -> bytes:
    """Draw the union of polygons as a mask: ``merge(frPyObjects(polygons))``, bit for bit (on x86-64).

    Each polygon is filled by the even-odd rule after its corners have been rounded to fifths of a pixel. What lies
    outside the image is cut off. A polygon of fewer than three points has no pixels (frPyObjects takes four numbers
    for a box), and so has no polygon at all.

    Args:
        polygons: flat x, y lists, each of an even number of coordinates; pixels, may lie outside the image.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        COCO compressed ``counts``.

    Raises:
        ValueError: a polygon that is not flat or has an odd number of coordinates, a coordinate that is not finite or
            beyond 2e8, an outline that crosses pixel columns more than 2**24 times, or an impossible size.
    """
    return rasterize_all([polygons], height, width)[0]


def rasterize_all(masks: Sequence[Sequence[ArrayLike]], height: int, width: int) -> list[bytes]:
    """``rasterize`` for all masks of one image: faster than one by one.

    The GIL is handed over once per call; so more threads help with hundreds of masks, hardly with ten.

    Args:
        masks: the polygons of each.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        As many ``counts``.

    Raises:
        ValueError: as ``rasterize``; says which mask.
    """
    pixels_of(height, width)
    polygons, starts, firsts = [_NOTHING], [0], [0]
    for i, mask in enumerate(masks):
        for polygon in mask:
            flat = _flat(polygon)
            if flat.size % 2:
                raise ValueError(f"a polygon of mask {i} has {flat.size} coordinates; x and y need an even number")
            polygons.append(flat)
            starts.append(starts[-1] + flat.size)
        firsts.append(len(starts) - 1)
    offsets = np.array(starts + firsts)
    sections = (offsets[: len(starts)], offsets[len(starts) :])
    strings: list[bytes] = _compiled("rasterize")(np.concatenate(polygons), *sections, height, width).tobytes().split()
    if len(strings) < len(masks):
        raise ValueError(f"mask {len(strings)} cannot be drawn: {_refusal()}")
    return strings


def area_of(polygon: ArrayLike) -> float:
    """Area of a polygon by the shoelace formula, in pixels; 0 for fewer than three points.

    Parts that the polygon encloses the other way round count against the rest.

    Raises:
        ValueError: the polygon is not flat or has an odd number of coordinates.
    """
    flat = _flat(polygon)
    if flat.size % 2:
        raise ValueError(f"the polygon has {flat.size} coordinates; x and y need an even number")
    if flat.size < 6:
        return 0.0
    x, y = flat[::2] - flat[0], flat[1::2] - flat[1]  # so the side that closes it adds nothing
    return abs(float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))) / 2


def problems(polygon: ArrayLike, height: int, width: int) -> list[str]:
    """What is wrong with a polygon, as codes; nothing for a good one.

    * ``empty-polygon``: fewer than three points, an odd number of coordinates, or one that is not finite or beyond 2e8;
      nothing else is looked at then.
    * ``zero-area``: the shoelace formula gives nothing but rounding errors.
    * ``outside-image``: a point lies outside 0..width or 0..height.

    Raises:
        ValueError: the polygon is not flat.
    """
    from segbatch.codecs._rle_kernels import LARGEST_COORDINATE

    flat = _flat(polygon)
    if flat.size < 6 or flat.size % 2 or not (np.abs(flat) <= LARGEST_COORDINATE).all():
        return ["empty-polygon"]
    x, y = flat[::2], flat[1::2]
    found = []
    left, right, top, bottom = float(x.min()), float(x.max()), float(y.min()), float(y.max())
    if area_of(flat) <= ROUNDING * max(right - left, bottom - top) ** 2:
        found.append("zero-area")
    if min(left, top) < 0 or right > width or bottom > height:
        found.append("outside-image")
    return found


def contours(mask: NDArray[Any]) -> Contours:
    """The outlines of a mask along the edges of its pixels, corners only, all coordinates whole.

    ``rasterize`` of all outlines together gives the mask back exactly when there are no holes. A COCO polygon list is a
    union and cannot say "hole": ``rasterize(outers)`` fills the holes, and nothing else changes. Drawing each outline,
    outer or hole, by itself and combining them by exclusive or gives every mask back exactly.

    Pixels that touch only in a corner belong to different regions, so an outline may touch itself but never cross.

    Args:
        mask: bool or uint8 of shape (height, width); what is not 0 is foreground.

    Returns:
        The outlines, in the order of their first upper side, row by row; none for a mask without foreground.

    Raises:
        ValueError: another dtype or shape.
    """
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"a mask is bool or uint8 of two dimensions, not {mask.dtype} of shape {mask.shape}")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return Contours([], [])
    top, left = int(rows[0]), int(columns[0])
    framed = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1] != 0, 1).view(np.uint8)
    corners = _compiled("count_corners")(framed)
    xy = np.empty(2 * corners)
    ends, outer = np.empty(corners // 4, np.int64), np.empty(corners // 4, np.uint8)
    rings = _compiled("trace")(framed, xy, ends, outer)
    xy[::2] += left - 1
    xy[1::2] += top - 1
    polygons = np.split(xy, ends[: rings - 1])
    found = Contours([], [])
    for polygon, is_outer in zip(polygons, outer[:rings], strict=True):
        (found.outers if is_outer else found.holes).append(polygon)
    return found


@functools.cache
def _compiled(name: str) -> Callable[..., Any]:
    from segbatch.codecs import _rle_kernels  # slow to import, so not before it is needed

    return _rle_kernels.kernel(getattr(_rle_kernels, name))


def _flat(polygon: ArrayLike) -> NDArray[np.float64]:
    flat = np.asarray(polygon, np.float64)
    if flat.ndim != 1:
        raise ValueError(f"a polygon is a flat list x0, y0, x1, y1, ..., not an array of shape {flat.shape}")
    return flat


def _refusal() -> str:
    from segbatch.codecs._rle_kernels import LARGEST_COORDINATE, MOST_CROSSINGS

    return (
        f"a coordinate is not finite or beyond {LARGEST_COORDINATE:g}, "
        f"or an outline crosses pixel columns more than {MOST_CROSSINGS} times"
    )
