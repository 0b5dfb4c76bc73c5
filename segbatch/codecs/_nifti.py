"""What ``volume`` reads of a NIfTI file itself: the header, and its bytes in one pass, plain or gzipped.

Header fields are parsed by nibabel, which is imported by the first call that needs it. Errors are ``DataError``.

Source: the NIfTI-1.1 and NIfTI-2 definitions, ``nifti1.h`` and ``nifti2.h`` (https://nifti.nimh.nih.gov).
"""

import itertools
import logging
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs.photo import MAX_PIXELS
from segbatch.errors import DataError

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
"""Voxel types that are read and written, by numpy's names."""

MAX_HEADER_BYTES = 16 << 20
"""Greatest offset of the voxels: what stands before them is kept with every slice."""

GZIP = 31
"""zlib's window bits for a gzip wrapper with its checksum."""

_GZIP_MAGIC = b"\x1f\x8b"
_STEP = 1 << 18
_HEADER_STEP = 1 << 12
_STEPS_BEHIND = 16

_HEADER_BYTES = {b"n+1\0": 348, b"n+2\0": 540}
_LONGEST = max(_HEADER_BYTES.values())
_SIZES = tuple(struct.pack(f"{order}i", n) for n in _HEADER_BYTES.values() for order in "<>")

_MM = {1: 1000.0, 3: 0.001}  # by the code of the spatial unit; 2 is mm, 0 unknown
_ERROR_LEVEL = 40  # of nibabel: what it cannot repair

COPY_AGAIN = "copy it again from its source"


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a volume says.

    Attributes:
        raw: the file's bytes before its first voxel, extensions and padding included; they decide all the rest.
        version: 1 or 2.
        byte_order: of the file, ``<`` or ``>``.
        shape: voxels along the three axes (i, j, k).
        dtype: stored type, in this machine's byte order.
        spacing_mm: voxel size along the three axes, from ``pixdim``.
        affine: voxel indices (i, j, k, 1) to world (mm, RAS+), float64 of shape (4, 4): the sform, else the qform,
            else the voxel sizes alone, as nibabel chooses. A header in metres or microns is converted.
        slope, intercept: value = slope * stored + intercept; 1 and 0 where the header has no scaling.
    """

    raw: bytes = field(repr=False)
    version: int
    byte_order: Literal["<", ">"]
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64] = field(compare=False)
    slope: float
    intercept: float


class Reader:
    """The bytes of a file in order, gunzipped where it is gzip (by its first bytes, not its name).

    Holds no more than two steps (256 kB each) of the file.

    Attributes:
        cut_short: whether gzipped data have been found to end before their end marker.
    """

    def __init__(self, stream: IO[bytes], uri: str, step: int = _STEP) -> None:
        self._uri = uri
        self._blocks = _blocks(stream, step, uri)
        self._left = memoryview(b"")
        self.cut_short = False

    def fill(self, target: memoryview) -> int:
        """Fill ``target`` with the next bytes; returns how many there were, fewer only at the file's end."""
        done = 0
        while done < len(target):
            if not self._left and not self._advance():
                break
            size = min(len(self._left), len(target) - done)
            target[done : done + size] = self._left[:size]
            self._left = self._left[size:]
            done += size
        return done

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the file's end."""
        room = bytearray(size)
        return bytes(room[: self.fill(memoryview(room))])

    def check_end(self) -> None:
        """Read on to the checksum of a gzip file (through at most 4 MB behind the voxels), which zlib then checks.

        Raises:
            DataError: ``truncated-volume`` when it is not there, ``corrupt-volume`` when it is wrong.
        """
        try:
            for _ in itertools.islice(self._blocks, _STEPS_BEHIND):
                pass
        except EOFError as error:
            problem = f"{named(self._uri)} is cut short: the checksum behind its voxels is missing"
            raise DataError(problem, COPY_AGAIN, "truncated-volume", self._uri) from error

    def _advance(self) -> bool:
        try:
            self._left = memoryview(next(self._blocks, b""))
        except EOFError:
            self.cut_short = True
            return False
        return bool(self._left)


def _blocks(stream: IO[bytes], step: int, uri: str) -> Iterator[bytes]:
    """The file's content in pieces of at most ``step`` bytes.

    Raises:
        EOFError: gzipped data end before their end marker.
    """
    chunk = _read(stream, step)
    if chunk.startswith(_GZIP_MAGIC):
        try:
            yield from _inflated(chunk, stream, step)
        except zlib.error as error:
            raise DataError(f"{named(uri)} is damaged: {error}", COPY_AGAIN, "corrupt-volume", uri) from error
        return
    while chunk:
        yield chunk
        chunk = _read(stream, step)


def _inflated(chunk: bytes, stream: IO[bytes], step: int) -> Iterator[bytes]:
    """All members of a gzip file; zeros and foreign bytes behind the last are left alone."""
    while chunk.startswith(_GZIP_MAGIC):
        decoder = zlib.decompressobj(GZIP)
        while not decoder.eof:
            if block := decoder.decompress(chunk, step):
                yield block
            chunk = decoder.unconsumed_tail
            if not chunk and not decoder.eof and not (chunk := _read(stream, step)):
                if block := decoder.flush():
                    yield block
                raise EOFError
        chunk = decoder.unused_data
        chunk = (chunk + _read(stream, step - len(chunk))).lstrip(b"\0")


def _read(stream: IO[bytes], size: int) -> bytes:
    """``size`` bytes, fewer only at the end: a raw stream may give less at a time."""
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def named(uri: str) -> str:
    """How errors call a volume."""
    return f"volume {uri}" if uri else "the volume"


def read_header(stream: IO[bytes], uri: str) -> Header:
    """See ``volume.read_header``."""
    reader = Reader(stream, uri, _HEADER_STEP)
    head = reader.read(_LONGEST)
    if reader.cut_short and len(head) < min(_HEADER_BYTES.values()):
        raise _ends_in_header(head, uri)
    nifti = _fields(head, uri)
    offset = _voxel_offset(nifti, uri)
    raw = (head + reader.read(offset - len(head)))[:offset] if offset > len(head) else head[:offset]
    if len(raw) < offset:
        problem = f"{named(uri)} is cut short: {len(raw)} of the {offset} bytes before its voxels are there"
        raise DataError(problem, COPY_AGAIN, "truncated-volume", uri)
    return _header(nifti, raw, uri)


def parse_header(raw: bytes, uri: str) -> Header:
    """See ``volume.parse_header``."""
    nifti = _fields(raw[:_LONGEST], uri)
    offset = _voxel_offset(nifti, uri)
    if len(raw) != offset:
        raise _bad(f"it has {len(raw)} bytes, its voxels begin at {offset}", uri)
    return _header(nifti, raw, uri)


def with_dtype(header: Header, dtype: np.dtype[Any]) -> bytes:
    """``header.raw`` for voxels of another type that are not scaled; everything else stays as it is."""
    size = _HEADER_BYTES[_magic(header.raw)]
    nifti = _header_class(size)(header.raw[:size], check=False)
    nifti.set_data_dtype(dtype)
    for name, value in (("scl_slope", 1), ("scl_inter", 0), ("cal_min", 0), ("cal_max", 0)):
        nifti[name] = value
    patched: bytes = nifti.binaryblock
    return patched + header.raw[size:]


def _magic(head: bytes) -> bytes:
    """The magic of a file with header and voxels in one; empty where it has none."""
    found = (head[344:348], head[4:8])
    return next((m for m, where in zip(_HEADER_BYTES, found, strict=True) if m == where), b"")


def _header_class(size: int) -> Any:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    return Nifti1Header if size == _HEADER_BYTES[b"n+1\0"] else Nifti2Header


def _fields(head: bytes, uri: str) -> Any:
    """nibabel's view of the header's fields, with its repairs (negative voxel sizes, unknown codes)."""
    from nibabel.spatialimages import HeaderDataError

    if not head:
        raise DataError(f"{named(uri)} is an empty file", COPY_AGAIN, "empty-file", uri)
    magic = _magic(head)
    size = _HEADER_BYTES.get(magic, min(_HEADER_BYTES.values()))
    if len(head) < size and (magic or head[:4] in _SIZES):
        raise _ends_in_header(head, uri)
    if not magic:
        fix = "convert it to one .nii or .nii.gz file"
        kind = "is the header of a NIfTI pair" if head[344:348] == b"ni1\0" else "is not a NIfTI file"
        raise DataError(f"{named(uri)} {kind}", fix, "not-nifti", uri)
    nifti = _header_class(size)(head[:size], check=False)
    try:
        nifti.check_fix(_silent(), _ERROR_LEVEL)
    except HeaderDataError as error:
        raise _bad(str(error), uri) from error
    return nifti


def _silent() -> logging.Logger:
    """A logger of nobody's: what nibabel repairs is no news."""
    logger = logging.Logger("nifti", logging.CRITICAL + 1)
    logger.addHandler(logging.NullHandler())
    return logger


def _bad(reason: str, uri: str) -> DataError:
    return DataError(f"{named(uri)} has a bad header: {reason}", "write it again", "bad-volume-header", uri)


def _ends_in_header(head: bytes, uri: str) -> DataError:
    problem = f"{named(uri)} is cut short: it ends after {len(head)} bytes, within its header"
    return DataError(problem, COPY_AGAIN, "truncated-volume", uri)


def _voxel_offset(nifti: Any, uri: str) -> int:
    offset = float(nifti["vox_offset"])
    if not nifti.single_vox_offset <= offset <= MAX_HEADER_BYTES:
        raise _bad(f"its voxels cannot begin at byte {offset:g}", uri)
    return int(offset)


def _header(nifti: Any, raw: bytes, uri: str) -> Header:
    from nibabel.spatialimages import HeaderDataError

    shape = _shape(nifti, uri)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            slope, intercept = nifti.get_slope_inter()
            affine = np.array(nifti.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:  # ValueError: a quaternion longer than 1
        raise _bad(str(error), uri) from error
    mm = _MM.get(int(nifti["xyzt_units"]) & 7, 1.0)
    if mm != 1.0:
        affine[:3] *= mm
    spacing = tuple(float(v) * mm for v in nifti["pixdim"][1:4])
    if not np.isfinite(affine).all() or not all(math.isfinite(v) and v > 0 for v in spacing):
        raise _bad(f"voxels of {spacing} mm at {affine[:3].tolist()}", uri)
    return Header(
        raw=raw,
        version=1 if len(nifti.binaryblock) == _HEADER_BYTES[b"n+1\0"] else 2,
        byte_order=nifti.endianness,
        shape=shape,
        dtype=_dtype(nifti, uri),
        spacing_mm=spacing,  # type: ignore[arg-type]
        affine=affine,
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
    )


def _shape(nifti: Any, uri: str) -> tuple[int, int, int]:
    dims = [int(n) for n in nifti["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise _bad(f"its dimensions are {dims}", uri)
    shape = dims[1 : dims[0] + 1]
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        problem = f"{named(uri)} has the shape {' x '.join(map(str, shape))}, not three dimensions"
        raise DataError(problem, "split it into volumes", "unsupported-volume", uri)
    if shape[0] * shape[1] > MAX_PIXELS or shape[2] >= 1 << 31:
        problem = f"{named(uri)} has {shape[2]:,} slices of {shape[0]} x {shape[1]}, too many pixels"
        raise DataError(problem, f"cut it: a slice may have {MAX_PIXELS:,}", "too-large", uri)
    return shape[0], shape[1], shape[2]


def _dtype(nifti: Any, uri: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = nifti.get_data_dtype().newbyteorder("=")
    if dtype.name not in DTYPES:
        kind = "colours" if dtype.kind == "V" else dtype.name
        fix = "convert it to " + ", ".join(DTYPES)
        raise DataError(f"{named(uri)} has voxels of {kind}", fix, "unsupported-volume", uri)
    return dtype
