"""Label maps as row-major runs: the form of the ``semantic`` column.

The compiled loops live in ``_runlength_kernels`` and are loaded by the first call; importing this module is cheap.
All functions may be called from several threads at once and release the GIL while they work.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAX_ID = 2**16 - 1
"""Greatest label id that a run can hold."""

LONGEST_RUN = 2**32 - 1

DENSE_PAIRS = 2**18
"""Up to this many possible (truth, predicted) pairs are counted in a table (2 MB), more by sorting."""


class Runs(NamedTuple):
    """A label map as runs in row-major order.

    Attributes:
        values: label id of each run, uint16 of shape (runs,).
        lengths: its length in pixels, uint32 of shape (runs,); the lengths add up to the map's pixels.

    An empty map has no runs. ``encode`` never gives two neighbouring runs the same value (except beyond 2**32 - 1
    pixels); readers of runs accept that, and runs of length zero, all the same.
    """

    values: NDArray[np.uint16]
    lengths: NDArray[np.uint32]


def encode(label_map: NDArray[Any]) -> Runs:
    """Encode a label map.

    uint8, bool and uint16 maps are read as they lie; other integers cost a range check, maps that are not row-major
    in memory a copy.

    >>> encode(np.array([[7, 7], [7, 2]]))
    Runs(values=array([7, 2], dtype=uint16), lengths=array([3, 1], dtype=uint32))

    Args:
        label_map: integers or bools of any shape and memory order, values 0..65535; may be empty.

    Raises:
        ValueError: a value outside 0..65535 (named), or an array of another kind.
    """
    flat = _as_unsigned(np.asarray(label_map)).reshape(-1)
    if flat.size <= LONGEST_RUN:
        return _encode_flat(flat)
    pieces = [_encode_flat(flat[i : i + LONGEST_RUN]) for i in range(0, flat.size, LONGEST_RUN)]
    return Runs(np.concatenate([p.values for p in pieces]), np.concatenate([p.lengths for p in pieces]))


def decode(runs: Runs, shape: tuple[int, ...], dtype: DTypeLike = np.uint16) -> NDArray[Any]:
    """Decode runs to a label map; the exact inverse of ``encode``.

    Args:
        runs: any runs that cover ``shape`` exactly.
        shape: of the map, usually (height, width).
        dtype: integer or bool type of the result; uint8 and uint16 are the fast ones.

    Returns:
        Array of ``shape`` and ``dtype``, C-contiguous.

    Raises:
        ValueError: the lengths do not add up to ``shape``, or a value does not fit ``dtype``.
    """
    wanted = np.dtype(dtype)
    values, lengths, pixels, greatest = _checked(runs)
    if min(shape, default=0) < 0 or pixels != math.prod(shape):
        raise ValueError(f"runs cover {pixels} pixels, shape {tuple(shape)} needs {math.prod(shape)}")
    if greatest > _greatest_of(wanted):
        raise ValueError(f"label id {greatest} does not fit {wanted}")
    pixel = np.dtype(np.uint8 if wanted.itemsize == 1 else np.uint16)
    label_map = np.empty(shape, pixel)
    _compiled("fill_pixels", pixel.itemsize)(values, lengths, label_map.reshape(-1))
    if wanted == pixel:
        return label_map
    return label_map.view(wanted) if wanted.itemsize == 1 else label_map.astype(wanted)


def class_pixels(runs: Runs) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """Pixels per label id.

    Returns:
        The ids that have pixels, uint16 and sorted, and their pixels, uint64 of the same length; empty for no runs.
    """
    values, lengths, _, greatest = _checked(runs)
    table = np.zeros(greatest + 1, np.uint64)
    _compiled("add_pixels")(values, lengths, table)
    present = np.flatnonzero(table)
    return present.astype(np.uint16), table[present]


def joint_counts(truth: Runs, predicted: Runs) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint64]]:
    """Sparse joint histogram of two label maps, by merging their runs: no pixel is decoded.

    Returns:
        (truth_ids, predicted_ids, pixels): uint16, uint16 and uint64 of shape (pairs,), one entry per pair of ids
        that meets in at least one pixel, sorted by truth id, then predicted id.

    Raises:
        ValueError: the two cover different numbers of pixels.
    """
    truth_values, truth_lengths, pixels, greatest_truth = _checked(truth)
    values, lengths, predicted_pixels, greatest = _checked(predicted)
    if pixels != predicted_pixels:
        raise ValueError(f"ground truth covers {pixels} pixels, prediction {predicted_pixels}")
    if not pixels:
        return np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.uint64)
    columns = greatest + 1
    if (greatest_truth + 1) * columns > DENSE_PAIRS:
        return _joint_by_sorting(truth_values, truth_lengths, values, lengths, pixels)
    table = np.zeros((greatest_truth + 1) * columns, np.uint64)
    _compiled("add_joint")(truth_values, truth_lengths, values, lengths, pixels, table, columns)
    present = np.flatnonzero(table)
    truth_ids, predicted_ids = np.divmod(present, columns)
    return truth_ids.astype(np.uint16), predicted_ids.astype(np.uint16), table[present]


def _joint_by_sorting(
    truth_values: NDArray[np.uint16],
    truth_lengths: NDArray[np.uint32],
    values: NDArray[np.uint16],
    lengths: NDArray[np.uint32],
    pixels: int,
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint64]]:
    room = len(truth_values) + len(values)
    keys, overlaps = np.empty(room, np.uint32), np.empty(room, np.uint64)
    steps = _compiled("list_joint")(truth_values, truth_lengths, values, lengths, pixels, keys, overlaps)
    keys, overlaps = keys[:steps], overlaps[:steps]
    keys, overlaps = keys[overlaps > 0], overlaps[overlaps > 0]
    order = np.argsort(keys)
    pairs, first = np.unique(keys[order], return_index=True)
    counts: NDArray[np.uint64] = np.add.reduceat(overlaps[order], first)
    return (pairs >> 16).astype(np.uint16), (pairs & MAX_ID).astype(np.uint16), counts


@functools.cache
def _kernels() -> ModuleType:
    from segbatch.codecs import _runlength_kernels  # slow to import, so not before it is needed

    return _runlength_kernels


def _compiled(name: str, itemsize: int = 1) -> Callable[..., Any]:
    kernels = _kernels()
    return kernels.kernel(getattr(kernels, name), itemsize)  # type: ignore[no-any-return]


def _encode_flat(flat: NDArray[Any]) -> Runs:
    runs = _compiled("count_runs", flat.itemsize)(flat)
    values, lengths = np.empty(runs, np.uint16), np.empty(runs, np.uint32)
    if runs:
        _compiled("fill_runs", flat.itemsize)(flat, values, lengths)
    return Runs(values, lengths)


def _as_unsigned(label_map: NDArray[Any]) -> NDArray[Any]:
    """The same values as a row-major uint8 or uint16 array; no copy where none is needed."""
    dtype = label_map.dtype
    if dtype.kind not in "uib":
        raise ValueError(f"a label map holds integers, not {dtype}")
    if dtype.kind == "i" or dtype.itemsize > 2:
        _check_range(label_map)
    if dtype.itemsize == 1:
        return np.ascontiguousarray(label_map).view(np.uint8)
    return np.ascontiguousarray(label_map, np.uint16)


def _check_range(label_map: NDArray[Any]) -> None:
    if label_map.size:
        for value in (int(label_map.min()), int(label_map.max())):
            if not 0 <= value <= MAX_ID:
                raise ValueError(f"label id {value} is outside 0..{MAX_ID}")


def _greatest_of(dtype: np.dtype[Any]) -> int:
    if dtype.kind == "b":
        return 1
    if dtype.kind in "ui":
        return int(2 ** (8 * dtype.itemsize - (dtype.kind == "i")) - 1)
    raise ValueError(f"a label map holds integers, not {dtype}")


def _checked(runs: Runs) -> tuple[NDArray[np.uint16], NDArray[np.uint32], int, int]:
    """Contiguous values and lengths, the pixels they cover and their greatest value.

    Raises:
        ValueError: other dtypes than ``Runs`` has, or not as many values as lengths.
    """
    values, lengths = np.ascontiguousarray(runs[0]), np.ascontiguousarray(runs[1])
    if values.dtype != np.uint16 or lengths.dtype != np.uint32:
        raise ValueError(f"runs are uint16 values and uint32 lengths, not {values.dtype} and {lengths.dtype}")
    if values.ndim != 1 or values.shape != lengths.shape:
        raise ValueError(f"values of shape {values.shape} do not match lengths of shape {lengths.shape}")
    pixels, greatest = _compiled("span")(values, lengths)
    return values, lengths, int(pixels), int(greatest)
