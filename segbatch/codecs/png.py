"""PNG files of label maps, as datasets and evaluation servers exchange them."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEVEL = 3


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
