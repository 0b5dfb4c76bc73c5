"""Compiled loops of ``lits_volume``; imported on first use, because importing numba takes long.

A mask stands as its segments: stretches of columns ``begins[s]`` to ``ends[s] - 1`` of one row, sorted by row and then
by column, none touching the next. ``firsts`` (rows + 1,) says where the segments of each row begin, and where the last
row's end. Row ``k * height + j`` is row j of slice k.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part

Numbers = NDArray[np.int64]


# ------------------------------------------------------------------------------------------------ components


@part
def _root(parents: Numbers, place: Any) -> Any:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


@part
def _join_rows(firsts: Numbers, begins: Numbers, ends: Numbers, one: Any, other: Any, parents: Numbers) -> None:
    """Join the segments of two rows that have a column in common."""
    a, b = firsts[one], firsts[other]
    while a < firsts[one + 1] and b < firsts[other + 1]:
        if begins[a] < ends[b] and begins[b] < ends[a]:
            root, root_b = _root(parents, a), _root(parents, b)
            if root < root_b:
                parents[root_b] = root
            else:
                parents[root] = root_b
        if ends[a] <= ends[b]:
            a += 1
        else:
            b += 1


def components(firsts: Numbers, begins: Numbers, ends: Numbers, height: Any, parents: Numbers) -> None:
    """Give every segment one segment of its component (6-connected) in ``parents``, which is 0, 1, 2 ... before."""
    for row in range(len(firsts) - 1):
        if firsts[row] == firsts[row + 1]:
            continue
        if row % height:
            _join_rows(firsts, begins, ends, row, row - 1, parents)
        if row >= height:
            _join_rows(firsts, begins, ends, row, row - height, parents)
    for place in range(len(parents)):
        parents[place] = _root(parents, place)


def overlaps(
    firsts: Numbers,
    begins: Numbers,
    ends: Numbers,
    other_firsts: Numbers,
    other_begins: Numbers,
    other_ends: Numbers,
    found: Numbers,
) -> int:
    """Stretches that two masks share: places of the two segments and voxels, into rows of ``found``.

    Gives how many there are: at most as many as the masks have segments, less one.
    """
    count = 0
    for row in range(len(firsts) - 1):
        a, b = firsts[row], other_firsts[row]
        while a < firsts[row + 1] and b < other_firsts[row + 1]:
            voxels = min(ends[a], other_ends[b]) - max(begins[a], other_begins[b])
            if voxels > 0:
                found[count, 0], found[count, 1], found[count, 2] = a, b, voxels
                count += 1
            if ends[a] <= other_ends[b]:
                a += 1
            else:
                b += 1
    return count


# ------------------------------------------------------------------------------------------------ surfaces


@part
def _intersect(
    inside: Numbers, size: Any, begins: Numbers, ends: Numbers, first: Any, last: Any, margin: Any, into: Numbers
) -> Any:
    """What stretches ``inside[:size]`` share with segments shortened by ``margin`` at both ends; gives how many."""
    count, a, b = 0, 0, first
    while a < size and b < last:
        low = max(inside[a, 0], begins[b] + margin)
        high = min(inside[a, 1], ends[b] - margin)
        if low < high:
            into[count, 0], into[count, 1] = low, high
            count += 1
        if inside[a, 1] <= ends[b] - margin:
            a += 1
        else:
            b += 1
    return count


@part
def _inner(
    firsts: Numbers, begins: Numbers, ends: Numbers, row: Any, height: Any, slices: Any, one: Numbers, two: Numbers
) -> Any:
    """Stretches of a row whose voxels have all 18 neighbours, into ``one``; gives how many."""
    j, k = row % height, row // height
    if j == 0 or k == 0 or j == height - 1 or k == slices - 1:
        return 0
    count = 0
    for s in range(firsts[row], firsts[row + 1]):
        if ends[s] - begins[s] > 2:
            one[count, 0], one[count, 1] = begins[s] + 1, ends[s] - 1
            count += 1
    for dk in range(-1, 2):
        for dj in range(-1, 2):
            if count and (dk or dj):
                near = row + dk * height + dj
                margin = 0 if dk and dj else 1
                count = _intersect(one, count, begins, ends, firsts[near], firsts[near + 1], margin, two)
                one[:count] = two[:count]
    return count


def surface(
    firsts: Numbers,
    begins: Numbers,
    ends: Numbers,
    height: Any,
    slices: Any,
    one: Numbers,
    two: Numbers,
    found: Numbers,
) -> int:
    """Voxels of a mask that lack one of their 18 neighbours: ``(column * height + row) * slices + slice``, unsorted.

    Args:
        firsts, begins, ends: segments within a box of that height and so many slices; nothing lies beyond it.
        one, two: room for as many stretches as can stand in a row, (n, 2).
        found: room for every voxel of the mask.

    Gives how many there are.
    """
    count = 0
    for row in range(len(firsts) - 1):
        if firsts[row] == firsts[row + 1]:
            continue
        size = _inner(firsts, begins, ends, row, height, slices, one, two)
        base, step, at = (row % height) * slices + row // height, height * slices, 0
        for s in range(firsts[row], firsts[row + 1]):
            column = begins[s]
            while column < ends[s]:
                while at < size and one[at, 1] <= column:
                    at += 1
                if at < size and one[at, 0] <= column:
                    column = one[at, 1]
                    continue
                found[count] = column * step + base
                count += 1
                column += 1
    return count


def _read(dimensions: int = 1) -> Any:
    return types.Array(types.int64, dimensions, "C", readonly=True)


def _write(dimensions: int = 1) -> Any:
    return types.Array(types.int64, dimensions, "C")


_MASK = (_read(), _read(), _read())


def _signature(function: Callable[..., Any], _: Any) -> Any:
    signatures: dict[Callable[..., Any], Any] = {
        components: types.void(*_MASK, types.int64, _write()),
        overlaps: types.int64(*_MASK, *_MASK, _write(2)),
        surface: types.int64(*_MASK, types.int64, types.int64, _write(2), _write(2), _write()),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
