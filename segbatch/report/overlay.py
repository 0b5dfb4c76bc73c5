"""Draw label maps for people to look at: colours, overlays on photos, error maps. For viewing only."""

import colorsys

import numpy as np
from numpy.typing import NDArray

from segbatch.records import ClassTable

Rgb = NDArray[np.uint8]

UNKNOWN_COLOR = (255, 0, 255)
"""Colour of ids that the class table lacks."""

WRONG_COLOR = (230, 30, 60)
IGNORED_COLOR = (70, 90, 140)

_GOLDEN = 0.618034
_JPEG_QUALITY = 82


def colors_of(classes: ClassTable) -> dict[int, tuple[int, int, int]]:
    """RGB of every label id: the official colour, else one that differs well from its neighbours'."""
    generated = (_hue(i) for i in range(len(classes.classes)))
    return {c.label_id: c.color or color for c, color in zip(classes.classes, generated, strict=True)}


def _hue(number: int) -> tuple[int, int, int]:
    """The n-th of an endless row of distinct colours."""
    rgb = colorsys.hls_to_rgb(number * _GOLDEN % 1, (0.42, 0.6)[number % 2], 0.7)
    return (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))


def palette(classes: ClassTable) -> Rgb:
    """Colour by label id, uint8 of shape (65536, 3)."""
    table = np.empty((1 << 16, 3), np.uint8)
    table[:] = UNKNOWN_COLOR
    for label_id, color in colors_of(classes).items():
        table[label_id] = color
    return table


def colorize(label_map: NDArray[np.uint16], colors: Rgb) -> Rgb:
    """RGB picture (height, width, 3) of a label map (height, width)."""
    return colors[label_map]


def blend(photo: Rgb | None, picture: Rgb, strength: float = 0.6) -> Rgb:
    """``picture`` over the photo's grey values; the picture itself where there is no photo.

    Args:
        photo: RGB of the picture's shape, or None.
        picture: RGB (height, width, 3).
        strength: share of the picture, 0..1.
    """
    if photo is None:
        return picture
    grey = _grey(photo)[..., None]
    return np.clip(np.rint(picture * strength + grey * (1 - strength)), 0, 255).astype(np.uint8)


def error_map(
    photo: Rgb | None, truth: NDArray[np.uint16], predicted: NDArray[np.uint16], ignored: tuple[int, ...]
) -> Rgb:
    """Wrong pixels in red, ignored ones in slate, right ones as the pale photo (or light grey).

    Args:
        photo: RGB (height, width, 3) or None.
        truth, predicted: label maps (height, width).
        ignored: ids that are not scored.
    """
    picture = pale(photo, truth.shape)
    skipped = np.isin(truth, ignored)
    for where, color in ((skipped, IGNORED_COLOR), (~skipped & (truth != predicted), WRONG_COLOR)):
        picture[where] = np.rint(0.2 * picture[where] + 0.8 * np.array(color)).astype(np.uint8)
    return picture


def pale(photo: Rgb | None, shape: tuple[int, ...]) -> Rgb:
    """The photo in pale grey, or light grey of that shape, as RGB (height, width, 3)."""
    grey = 255 - (255 - _grey(photo)) * 0.45 if photo is not None else np.full(shape, 225.0)
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


def outlined(picture: Rgb, parts: NDArray[np.uint16]) -> Rgb:
    """``picture`` with a white line along every border between parts.

    Args:
        picture: RGB (height, width, 3).
        parts: number of the object or segment of every pixel (height, width).
    """
    border = np.zeros(parts.shape, bool)
    border[:, :-1] |= parts[:, 1:] != parts[:, :-1]
    border[:-1] |= parts[1:] != parts[:-1]
    return np.where(border[..., None], np.uint8(255), picture)


def _grey(photo: Rgb) -> NDArray[np.float64]:
    return np.asarray(photo @ np.array([0.299, 0.587, 0.114]), np.float64)


def shrink(picture: Rgb, max_width: int) -> Rgb:
    """Scaled down (by area) to at most ``max_width`` pixels wide; smaller pictures stay as they are."""
    import cv2

    height, width = picture.shape[:2]
    if width <= max_width:
        return np.ascontiguousarray(picture)
    size = (max_width, max(1, round(height * max_width / width)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def side_by_side(pictures: list[Rgb], gap: int = 6) -> Rgb:
    """Pictures of one height in a row, white between them."""
    height = pictures[0].shape[0]
    spacer = np.full((height, gap, 3), 255, np.uint8)
    pieces = [p for picture in pictures for p in (spacer, picture)][1:]
    return np.concatenate(pieces, axis=1)


def encode_jpeg(picture: Rgb) -> bytes:
    """A JPEG file."""
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture), quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )
    return data


def encode_png(picture: Rgb) -> bytes:
    """A PNG file."""
    import cv2

    _, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    return bytes(data)
