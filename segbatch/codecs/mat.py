"""Arrays of numbers in MATLAB 5 files (``save -v6`` and ``-v7``): the labels of several datasets.

Only what such a file needs is read, so that a damaged one is an error and nothing worse (scipy 1.17.1 can crash).
Source: "MAT-File Format", R2024a, chapter 1, level 5 (mathworks.com/help/pdf_doc/matlab/matfile_format.pdf).
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.errors import DataError

MAX_BYTES = 1 << 28
"""Greatest size of a variable, against decompression bombs."""

_HEADER = struct.Struct("116s8sH2s")
_TEXT = b"MATLAB 5.0 MAT-file, written by segbatch"
_VERSION_5 = 0x0100
_ORDER = {b"IM": "<", b"MI": ">"}

_MATRIX, _COMPRESSED = 14, 15
_INT8, _INT32, _UINT32 = 1, 5, 6
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Types of stored numbers."""

_CLASSES = {"f8": 6, "f4": 7, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13, "i8": 14, "u8": 15}
"""Types of arrays."""

_COMPLEX = 0x0800


class _Element(NamedTuple):
    kind: int
    data: memoryview


def read(data: bytes, name: str, uri: str = "") -> NDArray[Any]:
    """An array by its name.

    Args:
        data: the file.
        name: of the variable.
        uri: named in errors.

    Returns:
        Array of the variable's shape (at least two dimensions), of the type that its numbers are stored in: MATLAB
        keeps whole numbers of a ``double`` array in the smallest integer type that holds them.

    Raises:
        DataError: ``bad-mat``: not a MATLAB 5 file, cut off, damaged, without such a variable, or that is no array
            of real numbers.
    """
    try:
        found = _find(data, name)
    except (ValueError, struct.error, zlib.error) as error:
        fix = f"write it again as a MATLAB 5 file (save -v7) with the variable {name}"
        raise DataError(f"{uri or 'the file'} cannot be read: {error}", fix, "bad-mat", uri) from error
    return found


def write(name: str, array: NDArray[Any], as_double: bool = False) -> bytes:
    """A MATLAB 5 file of one array, compressed; the same array always gives the same bytes.

    Args:
        name: of the variable.
        array: at least two dimensions.
        as_double: in MATLAB it is a ``double`` array, though its numbers are stored in their own type.

    Raises:
        ValueError: an array that is not of real numbers, has fewer than two dimensions, or 2**31 bytes or more.
    """
    kind = array.dtype.newbyteorder("<").str[1:]
    if kind not in _CLASSES or array.ndim < 2 or array.nbytes >= 1 << 31:
        raise ValueError(f"an array of real numbers and two dimensions is needed, not {array.dtype} {array.shape}")
    parts = (
        _packed(_UINT32, struct.pack("<II", _CLASSES["f8" if as_double else kind], 0)),
        _packed(_INT32, np.array(array.shape, "<i4").tobytes()),
        _packed(_INT8, name.encode("ascii")),
        _packed(next(n for n, t in _STORED.items() if t == kind), array.astype(f"<{kind}").tobytes(order="F")),
    )
    content = zlib.compress(_packed(_MATRIX, b"".join(parts)))
    header = _HEADER.pack(_TEXT.ljust(116), bytes(8), _VERSION_5, b"IM")
    return header + struct.pack("<II", _COMPRESSED, len(content)) + content


def _packed(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _find(data: bytes, name: str) -> NDArray[Any]:
    order = _byte_order(data)
    names = []
    for element in _elements(memoryview(data)[_HEADER.size :], order):
        if element.kind == _COMPRESSED:
            element = next(_elements(memoryview(_inflated(element.data)), order), element)
        if element.kind != _MATRIX:
            continue
        parts = list(_elements(element.data, order))
        if len(parts) < 3:
            raise ValueError("a variable has neither type, size nor name")
        names.append(bytes(parts[2].data).decode("latin-1"))
        if names[-1] == name:
            return _array(parts, order)
    raise ValueError(f"it has no variable {name}, only {', '.join(names) or 'none at all'}")


def _byte_order(data: bytes) -> str:
    if len(data) < _HEADER.size:
        raise ValueError(f"it has {len(data)} bytes, less than the header of a MATLAB file")
    if data.startswith(b"MATLAB 7.3"):
        raise ValueError("it is a MATLAB 7.3 (HDF5) file")
    order = _ORDER.get(data[126:128])
    if order is None or struct.unpack_from(f"{order}H", data, 124)[0] != _VERSION_5:
        raise ValueError("it is not a MATLAB 5 file")
    return order


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    """The data elements one after the other; a small one has its size in the upper half of its type."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        begin = at + 8
        if kind >> 16:
            kind, size, begin = kind & 0xFFFF, kind >> 16, at + 4
        if begin + size > len(data) or (begin == at + 4 and size > 4):
            raise ValueError(f"it is cut short or damaged: {size} bytes should follow at byte {begin}")
        yield _Element(kind, data[begin : begin + size])
        at = begin + size
        if kind != _COMPRESSED:
            at += -at % 8


def _inflated(data: memoryview) -> bytes:
    decoder = zlib.decompressobj()
    found = decoder.decompress(data, MAX_BYTES)
    if not decoder.eof:
        raise ValueError(f"a variable is cut short, or has more than {MAX_BYTES:,} bytes")
    return found


def _array(parts: list[_Element], order: str) -> NDArray[Any]:
    flags, dims = parts[0].data, np.frombuffer(parts[1].data, f"{order}i4")
    if len(flags) != 8 or parts[1].kind != _INT32 or len(dims) < 2 or dims.min() < 0:
        raise ValueError("the type or the size of the variable is damaged")
    word = struct.unpack_from(f"{order}I", flags)[0]
    if word & 0xFF not in _CLASSES.values() or word & _COMPLEX or len(parts) != 4 or parts[3].kind not in _STORED:
        raise ValueError("the variable is no array of real numbers")
    values = np.frombuffer(parts[3].data, f"{order}{_STORED[parts[3].kind]}")
    if math.prod(dims.tolist()) != len(values):
        raise ValueError(f"{len(values)} numbers do not make an array of {' x '.join(map(str, dims))}")
    return values.astype(values.dtype.newbyteorder("=")).reshape(dims.tolist(), order="F")
