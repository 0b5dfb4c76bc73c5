"""Tiles of large photos, and how their results become one without seams in bounded memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Done = Callable[[int, int, NDArray[np.float32]], None]
"""Takes (top, left, scores (h, w, channels)) of a part of the photo to which no other tile will add anything."""


class Span(NamedTuple):
    """Where a tile lies along an axis: pixels ``start .. stop - 1``, and how many its neighbours share with it."""

    start: int
    stop: int
    before: int
    after: int


def spans(length: int, tile: int, overlap: int, grid: int, exact: bool) -> list[Span]:
    """The tiles along an axis.

    Args:
        length: of the photo.
        tile: largest length of a tile.
        overlap: pixels that neighbours share at least.
        grid: tiles begin at multiples of this, as far as the tile's size allows: the stride of the network.
        exact: the last tile too is ``tile`` long, and begins where it must.
    """
    if length <= tile:
        return [Span(0, length, 0, 0)]
    step = max((tile - overlap) // grid * grid, 1) if tile - overlap >= grid else tile - overlap
    starts = list(range(0, length - overlap, step))
    if exact:
        starts[-1] = min(starts[-1], length - tile)
    stops = [min(s + tile, length) for s in starts]
    shared = [0, *(stop - start for stop, start in zip(stops, starts[1:], strict=False)), 0]
    return [Span(*parts) for parts in zip(starts, stops, shared[:-1], shared[1:], strict=True)]


def ramp(pixels: int) -> NDArray[np.float32]:
    """Weight of the later tile over the pixels that it shares with the one before: 0 in the first quarter, rising
    linearly over the middle half, 1 in the last quarter; the earlier tile has the rest.
    """
    margin = pixels // 4
    rising = (np.arange(pixels) - margin + 0.5) / max(pixels - 2 * margin, 1)
    return np.clip(rising, 0, 1).astype(np.float32)


def weights(span: Span) -> NDArray[np.float32]:
    """Weight of each pixel of a tile along an axis."""
    found = np.ones(span.stop - span.start, np.float32)
    if span.before:
        found[: span.before] *= ramp(span.before)
    if span.after:
        found[-span.after :] *= 1 - ramp(span.after)
    return found


def blend(rows: list[Span], columns: list[Span], tile: Callable[[Span, Span], NDArray[np.float32]], done: Done) -> None:
    """Run over all tiles, row by row, and hand on what is finished.

    At any time there is one tile, the part of it that its right neighbour shares, and the part of its row that the
    next row shares: ``tile**2 + tile * overlap + overlap * width`` pixels of scores, whatever the photo's height.

    Args:
        rows, columns: the tiles along both axes.
        tile: scores (h, w, channels) of the tile at these spans, unweighted; may be changed afterwards.
        done: called for disjoint parts that together are the photo.
    """
    below: dict[int, NDArray[np.float32]] = {}
    for row in rows:
        carried: dict[int, NDArray[np.float32]] = {}
        right: NDArray[np.float32] | None = None
        for column in columns:
            scores = tile(row, column)
            scores *= weights(row)[:, None, None]
            scores *= weights(column)[None, :, None]
            if right is not None:
                scores[:, : column.before] += right
            ready = scores.shape[1] - column.after
            right = scores[:, ready:].copy()
            part = scores[:, :ready]
            if row.before:
                part[: row.before] += below[column.start]
            finished = part.shape[0] - row.after
            done(row.start, column.start, part[:finished])
            carried[column.start] = part[finished:].copy()
        below = carried


def corners(rows: list[Span], columns: list[Span]) -> Iterator[tuple[Span, Span]]:
    """All tiles, row by row."""
    for row in rows:
        for column in columns:
            yield row, column
