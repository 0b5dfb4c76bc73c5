"""PNG files of label maps, as datasets and evaluation servers exchange them."""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs._photo_headers import png_chunks

_LEVEL = 3
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3


def decode_labels(data: bytes) -> NDArray[Any] | None:
    """The numbers of a grey PNG of 8 or 16 bits, or the indices of a palette PNG of 8 bits; faster than libraries.

    Three times as fast as Pillow on label maps, and the GIL is released for most of it.

    Returns:
        uint8 or uint16 of shape (height, width); None for any other PNG, and for one that is broken in any way:
        a library then tells how.
    """
    if data[:8] != _SIGNATURE or len(data) < 33:
        return None
    width, height, bits, kind, method, filtering, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if (kind, bits) not in ((_GREY, 8), (_GREY, 16), (_PALETTE, 8)) or method or filtering or interlaced:
        return None
    packed = _pixel_data(data)
    stride = width * bits // 8
    if packed is None or not height * stride or height * stride > 1 << 30:
        return None
    return _unpacked(packed, height, stride, bits)


def _pixel_data(data: bytes) -> bytes | None:
    """The joined IDAT chunks; None where a checksum is wrong or the end is missing."""
    parts = []
    for name, start, stop in png_chunks(data):
        if stop + 4 > len(data) or zlib.crc32(data[start - 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            return None
        if name == b"IDAT":
            parts.append(data[start:stop])
        if name == b"IEND":
            return parts[0] if len(parts) == 1 else b"".join(parts)
    return None


def _unpacked(packed: bytes, height: int, stride: int, bits: int) -> NDArray[Any] | None:
    from zlib_ng import zlib_ng

    from segbatch.codecs import _png_kernels

    wanted = height * (1 + stride)
    inflater = zlib_ng.decompressobj()
    try:
        raw = inflater.decompress(packed, wanted)
    except zlib_ng.error:  # type: ignore[misc]  # its stub says it is any object
        return None
    if len(raw) != wanted:
        return None
    out = np.empty((height, stride), np.uint8)
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + stride)
    if _png_kernels.kernel(_png_kernels.unfilter)(rows, bits // 8, out) >= 0:
        return None
    return out if bits == 8 else out.view(">u2").astype(np.uint16)


def encode_grey(label_map: NDArray[Any], bits: int = 0) -> bytes:
    """A grey PNG of label ids.

    Args:
        label_map: integers of shape (height, width), values 0..65535.
        bits: 8 or 16; 0 takes 8 where every id fits.

    Raises:
        ValueError: an id that does not fit.
    """
    import cv2

    greatest = int(label_map.max(initial=0))
    bits = bits or (8 if greatest < 256 else 16)
    if greatest >= 1 << bits or int(label_map.min(initial=0)) < 0:
        raise ValueError(f"label ids up to {greatest} do not fit a PNG of {bits} bits")
    pixels: NDArray[Any] = np.ascontiguousarray(label_map, np.uint8 if bits == 8 else np.uint16)
    return _written(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, _LEVEL]))


def encode_rgb(pixels: NDArray[np.uint8]) -> bytes:
    """An RGB PNG of uint8 pixels of shape (height, width, 3), or RGBA of (height, width, 4)."""
    import cv2

    order = cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
    return _written(cv2.imencode(".png", cv2.cvtColor(pixels, order), [cv2.IMWRITE_PNG_COMPRESSION, _LEVEL]))


def encode_palette(label_map: NDArray[Any], colors: Mapping[int, tuple[int, int, int]]) -> bytes:
    """A palette PNG: indices are label ids 0..255, shown in ``colors`` (black where a class has none).

    Raises:
        ValueError: an id over 255.
    """
    from PIL import Image

    if int(label_map.max(initial=0)) > 255:
        raise ValueError(f"label ids up to {int(label_map.max())} do not fit a palette")
    palette = bytearray(768)
    for label_id, color in colors.items():
        if 0 <= label_id < 256:
            palette[3 * label_id : 3 * label_id + 3] = bytes(color)
    image = Image.fromarray(np.ascontiguousarray(label_map, np.uint8))
    image.putpalette(bytes(palette))
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=_LEVEL)
    return out.getvalue()


def _written(result: tuple[bool, Any]) -> bytes:
    good, data = result
    if not good:
        raise ValueError("the PNG encoder failed")
    return bytes(data.tobytes())
