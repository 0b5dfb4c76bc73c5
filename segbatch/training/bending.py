"""Elastic deformation of training crops, photo and labels alike.

Source: Ronneberger, Fischer, Brox, U-Net, MICCAI 2015, section 3.1: displacements at the nodes of a coarse grid of
3 x 3, drawn from a normal distribution of 10 pixels, interpolated bicubically. Here the outer nodes lie on the crop's
edges, the interpolation is by cubic splines, and what lies beyond an edge is mirrored.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

NODES = 3

N = TypeVar("N", np.int16, np.uint8)


def displaced(size: tuple[int, int], sigma: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Source row and column, (2, height, width), of every pixel of a crop that is bent smoothly.

    Args:
        size: (height, width) of the crop.
        sigma: standard deviation of the displacements in pixels.
        rng: the dice.
    """
    from scipy import ndimage

    nodes = rng.normal(0, sigma, (2, NODES, NODES))
    at = np.meshgrid(*(np.linspace(0, NODES - 1, n) for n in size), indexing="ij")
    moved = [ndimage.map_coordinates(n, at, order=3, mode="nearest") for n in nodes]
    source: NDArray[np.float64] = np.indices(size) + np.stack(moved)
    return source


def bent_photo(crop: NDArray[np.float32], source: NDArray[np.float64]) -> NDArray[np.float32]:
    """The crop (h, w, 3) with every pixel taken from its source, bilinearly; beyond the edges it is mirrored.

    OpenCV's ``remap`` rounds floats differently from one memory address to another.
    """
    first = np.floor(source).astype(np.intp)
    down, across = (source - first).astype(np.float32)[..., None]
    rows, columns = ([_mirrored(i + step, n) for step in (0, 1)] for i, n in zip(first, crop.shape[:2], strict=True))
    upper, lower = (crop[r, columns[0]] * (1 - across) + crop[r, columns[1]] * across for r in rows)
    bent: NDArray[np.float32] = upper * (1 - down) + lower * down
    return bent


def bent_labels(crop: NDArray[N], source: NDArray[np.float64]) -> NDArray[N]:
    """The same for a map (h, w), by the nearest neighbour."""
    rows, columns = (_mirrored(i, n) for i, n in zip(np.rint(source).astype(np.intp), crop.shape, strict=True))
    return crop[rows, columns]


def _mirrored(index: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Indices inside 0 .. size - 1: those beyond an edge are reflected at the edge pixel."""
    period = max(2 * (size - 1), 1)
    inside = index % period
    return np.minimum(inside, period - inside) if size > 1 else np.zeros_like(index)
