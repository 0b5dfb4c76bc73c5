"""What ``photo`` reads itself from a file's bytes: the format, JPEG and PNG headers, the EXIF orientation.

Errors are ``DataError`` without a URI; ``photo`` adds it.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from segbatch.errors import DataError

_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)
_UNSUPPORTED = (
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"\0\0\x01\0", "icon"),
)
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)

_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}

_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_LONGEST_SIDE = 2**31 - 1  # of ISO/IEC 15948, 7.1
_PNG_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says; ``pixels_at`` is where the entropy-coded data of a JPEG begins, 0 for a PNG."""

    height: int
    width: int
    channels: int
    bit_depth: int
    exif_orientation: int
    pixels_at: int = 0


def truncated(name: str, data: bytes) -> NoReturn:
    """Raise for a file that ends too early."""
    problem = f"the {name} file is cut short, it ends after {len(data)} bytes"
    raise DataError(problem, "copy it again from its source", "truncated")


def corrupt(name: str, reason: object) -> NoReturn:
    """Raise for a file that is all there, but damaged."""
    raise DataError(f"the {name} file is damaged: {reason}", "copy it again from its source", "corrupt")


def unsupported(what: str) -> NoReturn:
    """Raise for an image that is none of ours."""
    raise DataError(f"{what} is not supported", "convert it to 8-bit PNG or JPEG", "unsupported")


def sniff(data: bytes) -> str:
    """The format by the first bytes: ``jpeg``, ``png``, ``bmp``, ``tiff``, ``webp`` or ``gif``.

    Raises:
        DataError: ``empty-file``, ``not-an-image``, ``unsupported``.
    """
    if not data:
        raise DataError("the file is empty (0 bytes)", "copy it again from its source", "empty-file")
    for magic, name in _MAGIC:
        if data.startswith(magic) or magic.startswith(data):
            return name
    if b"RIFF".startswith(data[:4]) and b"WEBP".startswith(data[8:12]):
        return "webp"
    if b"BM".startswith(data[:2]) and (len(data) < 18 or struct.unpack_from("<I", data, 14)[0] in _BMP_HEADER_SIZES):
        return "bmp"
    if data[4:8] == b"ftyp":
        unsupported(f"an {data[8:12].decode('latin-1').strip().upper()} file")
    for magic, name in _UNSUPPORTED:
        if data.startswith(magic):
            unsupported(f"a {name} file")
    problem = f"not an image, the file starts with {_first_bytes(data)}"
    raise DataError(problem, "check what lies at this address", "not-an-image")


def _first_bytes(data: bytes) -> str:
    start = data[:24]
    text = start.decode("ascii", "replace")
    return repr(text) if all(c.isprintable() or c in "\r\n\t" for c in text) else start[:12].hex(" ")


def jpeg_header(data: bytes) -> Header:
    """Read the segments up to the first scan.

    Raises:
        DataError: ``truncated``, ``corrupt``.
    """
    frame: tuple[int, int, int, int] | None = None
    orientation = 1
    try:
        for marker, start, stop in _jpeg_segments(data):
            if marker in _FRAMES:
                frame = struct.unpack_from(">BHHB", data, start)
            elif marker == _APP1 and data[start : start + 6] == b"Exif\0\0":
                orientation = exif_orientation(data[start + 6 : stop])
            elif marker == _START_OF_SCAN:
                if frame is None:
                    corrupt("JPEG", "pixels come before the image size")
                depth, height, width, channels = frame
                return Header(height, width, channels, depth, orientation, stop)
    except (IndexError, struct.error):
        truncated("JPEG", data)
    corrupt("JPEG", "it holds no pixels")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte after the length, end) up to the end of the image; bytes between segments are skipped."""
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0:
            raise IndexError
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker == _END_OF_IMAGE:
            return
        if marker == 0 or marker in _STANDALONE:
            continue
        stop = position + max(struct.unpack_from(">H", data, position)[0], 2)
        if stop > len(data):
            raise IndexError
        yield marker, position + 2, stop
        position = stop


def png_header(data: bytes) -> Header:
    """Read IHDR and, where there is one, the eXIf chunk.

    Raises:
        DataError: ``truncated``, ``corrupt``.
    """
    if len(data) < 33:
        truncated("PNG", data)
    width, height, depth, kind = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR" or kind not in _PNG_CHANNELS:
        corrupt("PNG", "its header makes no sense")
    if max(width, height) > _LONGEST_SIDE:
        corrupt("PNG", f"its header says {width} x {height} pixels")
    orientation = 1
    for name, start, stop in png_chunks(data):
        if name == b"eXIf":
            orientation = exif_orientation(data[start:stop])
    return Header(height, width, _PNG_CHANNELS[kind], depth, orientation)


def checked_png(data: bytes) -> bytes:
    """The file with nothing but the chunks that make the RGB pixels, after checking their checksums.

    Transparency, colour profiles, text and animation are left out: none of them is wanted, and a decoder may stumble
    over them.

    Raises:
        DataError: ``truncated`` when the file does not reach its end, ``corrupt`` when a checksum is wrong.
    """
    parts = [data[:8]]
    name = b""
    for name, start, stop in png_chunks(data):
        if name in _PNG_NEEDED:
            if stop + 4 > len(data):
                break
            if zlib.crc32(data[start - 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
                corrupt("PNG", f"wrong checksum in {name.decode()} at byte {start}")
            parts.append(data[start - 8 : stop + 4])
    if parts[-1][4:8] != b"IEND":
        truncated("PNG", data)
    return b"".join(parts)


def png_is_whole(data: bytes) -> bool:
    """Whether the chunks go on to the last one, within the file; checksums are not looked at."""
    name, stop = b"", 0
    for name, _, stop in png_chunks(data):  # noqa: B007
        pass
    return name == b"IEND" and stop + 4 <= len(data)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, end) of every chunk up to IEND, or up to where the file stops."""
    position = 8
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        yield name, position + 8, position + 8 + length
        if name == b"IEND":
            return
        position += 12 + length


def exif_orientation(exif: bytes) -> int:
    """Orientation 1..8 from a TIFF structure (the payload of EXIF); 1 where there is none or it is broken."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * i)
            if tag == 0x0112 and kind == 3:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def ends_early(kind: str, data: bytes) -> bool:
    """Whether a BMP, WebP, TIFF or GIF file is shorter than it says of itself; for naming a failure, not a check."""
    try:
        if kind == "gif":
            return b";" not in data[-2:]
        if kind == "tiff":
            return len(data) < _tiff_bytes(data)
        start, more = (2, 0) if kind == "bmp" else (4, 8)
        return len(data) < 26 or len(data) < struct.unpack_from("<I", data, start)[0] + more
    except struct.error:
        return True


def _tiff_bytes(data: bytes) -> int:
    """End of the first directory of a TIFF and of everything that it holds (not of the pixels)."""
    order = "<" if data[:1] == b"I" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, directory)
    ends = [directory + 2 + 12 * entries]
    for i in range(entries):
        _, kind, count, offset = struct.unpack_from(order + "HHII", data, directory + 2 + 12 * i)
        size = _TIFF_BYTES.get(kind, 0) * count
        ends.append(offset + size if size > 4 else 0)
    return int(max(ends))
