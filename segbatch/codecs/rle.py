"""Instance masks as COCO's compressed ``counts``: the form of the ``instances`` column.

A mask is the list of its run lengths in column-major order, background first, written as a string of 6 bits per
character. The strings are those of pycocotools 2.0.11, byte for byte.

The compiled loops live in ``_rle_kernels`` and are loaded by the first call; importing this module is cheap.
All functions may be called from several threads at once and release the GIL while they work. Strings may come from
anywhere: every function looks at a string in full before it uses it.

Source: common/maskApi.c of pycocotools 2.0.11 (https://github.com/ppwwyyxx/cocoapi).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

LONGEST_RUN = 2**32 - 1
"""Greatest run length, so greatest number of pixels of a mask."""

MAX_ID = 2**32 - 1
"""Greatest id in a map that ``instances_of`` takes."""


class Segments(NamedTuple):
    """The masks of a map of ids, one entry per id, sorted by id.

    Attributes:
        ids: uint32 of shape (n,).
        areas: pixels, int64 of shape (n,).
        boxes_xywh: left, top, width, height in pixels, float64 of shape (n, 4).
        counts: n strings.
    """

    ids: NDArray[np.uint32]
    areas: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    counts: list[bytes]


def to_string(counts: NDArray[np.uint32]) -> bytes:
    """Write run lengths as a string (rleToString).

    >>> to_string(np.array([2, 3, 1, 1], np.uint32))
    b'231N'

    Args:
        counts: uint32 of shape (runs,), background first.

    Raises:
        ValueError: another dtype or shape.
    """
    if counts.dtype != np.uint32 or counts.ndim != 1:
        raise ValueError(f"run lengths are uint32 of one dimension, not {counts.dtype} of shape {counts.shape}")
    string: bytes = _compiled("to_string")(np.ascontiguousarray(counts)).tobytes()
    return string


def from_string(counts: bytes) -> NDArray[np.uint32]:
    """Read the run lengths of a string (rleFrString); the inverse of ``to_string``.

    Returns:
        uint32 of shape (runs,), background first; empty for an empty string.

    Raises:
        ValueError: the string is malformed; says how.
    """
    text, _, _ = _measured(counts)
    lengths: NDArray[np.uint32] = _compiled("from_string")(text)
    return lengths


def from_uncompressed(counts: Sequence[int]) -> bytes:
    """The string for the plain list of run lengths that COCO's files hold for crowds; ``check`` compares the size.

    Raises:
        ValueError: an item is no integer in 0..2**32 - 1 (named).
    """
    lengths = np.asarray(counts)
    if lengths.size == 0:
        return b""
    if lengths.ndim != 1 or lengths.dtype.kind not in "ui":
        raise ValueError(f"run lengths are a list of integers, not {lengths.dtype} of shape {lengths.shape}")
    for length in (int(lengths.min()), int(lengths.max())):
        if not 0 <= length <= LONGEST_RUN:
            raise ValueError(f"run length {length} is outside 0..{LONGEST_RUN}")
    return to_string(lengths.astype(np.uint32))


def check(counts: bytes, height: int, width: int) -> None:
    """Make sure that a string is a mask of this size.

    Raises:
        ValueError: the string is malformed (says how), or covers another number of pixels (says both).
    """
    _fitting(counts, height, width)


def pixels_of(height: int, width: int) -> int:
    """Pixels of a mask of this size.

    Raises:
        ValueError: a negative side, or 2**32 pixels or more.
    """
    pixels = int(height) * int(width)
    if min(height, width) < 0 or pixels > LONGEST_RUN:
        raise ValueError(f"a mask of {height} x {width} pixels cannot be: 0 to {LONGEST_RUN} are possible")
    return pixels


def encode(mask: NDArray[Any]) -> bytes:
    """Encode a mask.

    Args:
        mask: bool or uint8 of shape (height, width), any memory order; what is not 0 is foreground. May be empty.

    Raises:
        ValueError: another dtype or shape, or 2**32 pixels or more.
    """
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"a mask is bool or uint8 of two dimensions, not {mask.dtype} of shape {mask.shape}")
    pixels_of(*mask.shape)
    foreground = mask if mask.dtype == np.bool_ else mask != 0
    string: bytes = _compiled("encode")(_column_major(foreground.view(np.uint8))).tobytes()
    return string


def decode(counts: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """Decode a mask; the inverse of ``encode``.

    Returns:
        bool of shape (height, width), C-contiguous.

    Raises:
        ValueError: as ``check``.
    """
    return paint([counts], [True], height, width, np.bool_)


def area(counts: bytes) -> int:
    """Foreground pixels of a mask.

    Raises:
        ValueError: the string is malformed; says how.
    """
    return _measured(counts)[2]


def bbox(counts: bytes, height: int, width: int) -> tuple[float, float, float, float]:
    """Smallest box around a mask, as toBbox gives it: left, top, width and height in pixels.

    All zero for a mask without foreground; where that is told by a run of length 0, toBbox wraps around instead.

    Raises:
        ValueError: as ``check``.
    """
    x, y, box_width, box_height = _compiled("bounding_box")(_fitting(counts, height, width), height)
    return float(x), float(y), float(box_width), float(box_height)


def merge(counts: Sequence[bytes], intersect: bool = False) -> bytes:
    """Union, or intersection, of masks of one size (rleMerge).

    Equal to pycocotools wherever that result covers the whole mask: it breaks off where empty runs of two masks meet.

    Raises:
        ValueError: no mask at all, a malformed string (says which and how), or masks of different sizes.
    """
    if not counts:
        raise ValueError("no masks to merge")
    text, starts, pixels = _measured_together(counts)
    if not pixels:
        return to_string(np.zeros(1, np.uint32))
    string: bytes = _compiled("merge")(text, starts, pixels, intersect).tobytes()
    return string


def intersection_areas(a: Sequence[bytes], b: Sequence[bytes]) -> NDArray[np.int64]:
    """Pixels that each mask of ``a`` shares with each of ``b``, without decoding any.

    Returns:
        int64 of shape (len(a), len(b)).

    Raises:
        ValueError: a malformed string (says which and how), or masks of different sizes.
    """
    areas = np.zeros((len(a), len(b)), np.int64)
    if areas.size:
        text, starts, _ = _measured_together([*a, *b])
        between = starts[len(a)]
        second = (text[between:], starts[len(a) :] - between)
        _compiled("intersections")(text[:between], starts[: len(a) + 1], *second, areas)
    return areas


def instances_of(id_map: NDArray[Any], background: Iterable[int] = ()) -> Segments:
    """The mask, box and area of every id of a label, instance or panoptic map, in one pass over it.

    uint8, uint16 and uint32 maps are read as they lie; other integers cost a range check and a copy. The time follows
    from the pixels and the runs, not from the number of ids.

    Args:
        id_map: integers of shape (height, width), any memory order, values 0..2**32 - 1; may be empty.
        background: ids to leave out.

    Raises:
        ValueError: another dtype or shape, a value out of range (named), or 2**32 pixels or more.
    """
    if id_map.ndim != 2:
        raise ValueError(f"a map of ids has two dimensions, not shape {id_map.shape}")
    pixels_of(*id_map.shape)
    flat = _column_major(_as_unsigned(id_map))
    skipped = np.array([i for i in background if 0 <= i <= MAX_ID], np.uint32)
    ids, areas, boxes, lines = _compiled("instances", flat.itemsize)(flat, id_map.shape[0], skipped)
    return Segments(ids, areas, boxes.astype(np.float64), lines.tobytes().split())


def paint(counts: Sequence[bytes], values: ArrayLike, height: int, width: int, dtype: DTypeLike) -> NDArray[Any]:
    """Draw masks into one map, later ones over earlier ones; 0 where there is none. The inverse of ``instances_of``.

    Args:
        counts: n masks of shape (height, width).
        values: what to write for each, n integers (bools for a bool map).
        dtype: of the result: bool or an integer type of up to 4 bytes.

    Returns:
        Array of shape (height, width), C-contiguous.

    Raises:
        ValueError: a malformed string or one of another size (says which and how), not as many values as masks,
            a value that does not fit ``dtype`` (named), or another ``dtype``.
    """
    wanted = np.dtype(dtype)
    pixels = pixels_of(height, width)
    written = _fitting_values(values, wanted)
    if written.shape != (len(counts),):
        raise ValueError(f"{len(counts)} masks need as many values, not an array of shape {written.shape}")
    flat = np.zeros(pixels, written.dtype)
    if counts:
        text, starts, covered = _measured_together(counts)
        _same_pixels(covered, height, width)
        _compiled("paint", wanted.itemsize)(text, starts, written, flat)
    return _transposed(flat.reshape(width, height)).view(wanted)


@functools.cache
def _compiled(name: str, itemsize: int = 1) -> Callable[..., Any]:
    from segbatch.codecs import _rle_kernels  # slow to import, so not before it is needed

    return _rle_kernels.kernel(getattr(_rle_kernels, name), itemsize)


def _measured(counts: bytes) -> tuple[NDArray[np.uint8], int, int]:
    """The string as an array, its pixels and foreground pixels."""
    text = np.frombuffer(counts, np.uint8)
    runs, pixels, foreground = _compiled("measure")(text)
    if runs < 0:
        raise ValueError(f"COCO counts {_mistake(runs)}")
    return text, pixels, foreground


def _measured_together(counts: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """All strings in one array, where each starts (and the last one ends), and the pixels that each covers."""
    text = np.frombuffer(b"".join(counts), np.uint8)
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum([len(string) for string in counts], out=starts[1:])
    found = np.empty((len(counts), 3), np.int64)
    _compiled("measure_all")(text, starts, found)
    for i in np.flatnonzero(found[:, 0] < 0):
        raise ValueError(f"COCO counts of mask {i} {_mistake(found[i, 0])}")
    for i in np.flatnonzero(found[:, 1] != found[0, 1]):
        raise ValueError(f"mask 0 covers {found[0, 1]} pixels, mask {i} covers {found[i, 1]}")
    return text, starts, int(found[0, 1])


def _mistake(code: int) -> str:
    from segbatch.codecs import _rle_kernels as kernels

    return {
        kernels.ENDS_EARLY: "end within a number",
        kernels.BAD_CHARACTER: "hold a character outside '0'..'o'",
        kernels.TOO_LONG: f"hold a number of more than {kernels.LONGEST_NUMBER} characters",
        kernels.OUT_OF_RANGE: f"hold a run length outside 0..{LONGEST_RUN}",
    }[code]


def _fitting(counts: bytes, height: int, width: int) -> NDArray[np.uint8]:
    text, pixels, _ = _measured(counts)
    _same_pixels(pixels, height, width)
    return text


def _same_pixels(pixels: int, height: int, width: int) -> None:
    needed = pixels_of(height, width)
    if pixels != needed:
        raise ValueError(f"COCO counts cover {pixels} pixels, {height} x {width} needs {needed}")


def _column_major(image: NDArray[Any]) -> NDArray[Any]:
    """The pixels column by column, flat; a copy only where they do not lie like that."""
    return (image.T if image.flags.f_contiguous else _transposed(np.ascontiguousarray(image))).reshape(-1)


def _transposed(image: NDArray[Any]) -> NDArray[Any]:
    """``image.T``, C-contiguous; ten times faster than NumPy's copy."""
    import cv2

    if not image.size:
        return np.empty(image.shape[::-1], image.dtype)
    signed = {1: np.uint8, 2: np.uint16, 4: np.int32}[image.itemsize]
    return np.asarray(cv2.transpose(image.view(signed))).view(image.dtype)


def _as_unsigned(id_map: NDArray[Any]) -> NDArray[Any]:
    """The same ids as uint8, uint16 or uint32 in the machine's byte order; no copy where none is needed."""
    dtype = id_map.dtype
    if dtype.kind not in "uib":
        raise ValueError(f"a map of ids holds integers, not {dtype}")
    if id_map.size and (dtype.kind == "i" or dtype.itemsize > 4):
        for value in (int(id_map.min()), int(id_map.max())):
            if not 0 <= value <= MAX_ID:
                raise ValueError(f"id {value} is outside 0..{MAX_ID}")
    return id_map.astype({1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32), copy=False)


def _fitting_values(values: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """``values`` with the bytes that they have in ``dtype``, as an unsigned type."""
    if dtype.kind not in "uib" or dtype.itemsize > 4 or not dtype.isnative:
        raise ValueError(f"a map of ids is bool or an integer type of up to 4 bytes, not {dtype}")
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "uib":
        raise ValueError(f"values are integers, not {given.dtype}")
    least, greatest = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    for value in (int(given.min()), int(given.max())) if given.size else ():
        if not least <= value <= greatest:
            raise ValueError(f"value {value} does not fit {dtype}")
    return given.astype(dtype).view(f"u{dtype.itemsize}")
