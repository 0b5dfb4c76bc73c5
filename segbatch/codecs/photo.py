"""Photos: file bytes to RGB, and between the stored pixel grid and the upright view.

Masks lie on the stored grid, the pixels as the file holds them; models see the photo upright, as its EXIF orientation
says. ``decode`` gives the stored grid, ``upright`` turns it for the model, ``stored`` turns the mask back.

Rules, the same for every format: alpha and transparency are dropped, never blended (as ``Image.convert("RGB")`` of
Pillow does); grey becomes R = G = B; palettes are looked up; 16-bit samples become ``round(v / 257)`` (RGB TIFF: the
high byte); colour profiles are not applied; of several frames or pages the first counts. Bytes behind the end of the
image are fine; a JPEG without its end marker is cut short, and is an error, because what is missing would be grey.

A JPEG that is much larger than what is wanted of it may be decoded at 1/2, 1/4 or 1/8 of its size: the decoder then
leaves high frequencies out of each 8 x 8 block before it transforms it, which costs less and does not alias.

Safe from several threads. The decoding libraries are imported by the first call that needs them.
"""

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import _photo_headers as headers
from segbatch.codecs import png
from segbatch.errors import DataError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 200_000_000
"""Default limit on height * width, against decompression bombs."""

_NAMES = {"jpeg": "JPEG", "png": "PNG", "bmp": "BMP", "tiff": "TIFF", "webp": "WebP", "gif": "GIF"}
_REDUCTIONS = (8, 4, 2)
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # frames of ITU-T T.81, table B.1
_BACK = {6: 8, 8: 6}  # every other orientation is its own inverse
_PILLOW_WARNINGS = r"PIL\."
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class PhotoInfo:
    """What an image file's header says.

    Attributes:
        format: ``jpeg``, ``png``, ``bmp``, ``tiff``, ``webp`` or ``gif``.
        height, width: of the stored grid, before EXIF rotation.
        channels: samples per pixel as stored; 1 for grey and palette.
        bit_depth: bits per sample as stored.
        exif_orientation: 1..8, 1 where there is none.
    """

    format: str
    height: int
    width: int
    channels: int
    bit_depth: int
    exif_orientation: int


Least = Callable[[PhotoInfo], tuple[int, int]]
"""The (height, width) on the stored grid that decoded pixels of a photo must have at least."""


def probe(data: bytes, uri: str = "") -> PhotoInfo:
    """Read the header only.

    Raises:
        DataError: ``empty-file``, ``not-an-image``, ``truncated``, ``corrupt`` or ``unsupported``, with ``uri``.
    """
    with _naming(uri):
        kind = headers.sniff(data)
        return _info(kind, data) if kind in ("jpeg", "png") else _pillow_info(kind, _open(kind, data))


def inspect(data: bytes, uri: str = "") -> PhotoInfo:
    """Read the header, and look whether a JPEG or PNG reaches its end; the pixels are not decoded.

    Raises:
        DataError: as ``probe``; ``truncated`` also where the end is missing.
    """
    info = probe(data, uri)
    with _naming(uri):
        if info.format == "jpeg" and data.rfind(b"\xff\xd9", headers.jpeg_header(data).pixels_at) < 0:
            headers.truncated("JPEG", data)
        if info.format == "png" and not headers.png_is_whole(data):
            headers.truncated("PNG", data)
    return info


def decode(
    data: bytes, uri: str = "", max_pixels: int = MAX_PIXELS, least: Least | None = None
) -> tuple[NDArray[np.uint8], PhotoInfo]:
    """Decode a photo on its stored grid; ``upright`` turns it as the EXIF orientation wants.

    Args:
        data: the file.
        uri: named in errors.
        max_pixels: greatest height * width of the file, checked before anything is decoded.
        least: allows fewer pixels than the file has: see ``reduction``. None for all.

    Returns:
        RGB of shape (height, width, 3), uint8, C-contiguous, its sides divided by the reduction and rounded up; and the
        header, which gives the file's own sides.

    Raises:
        DataError: ``empty-file``, ``not-an-image``, ``truncated``, ``corrupt``, ``too-large`` or ``unsupported``.
    """
    with _naming(uri):
        kind = headers.sniff(data)
        if kind in ("jpeg", "png"):
            info = _info(kind, data)
            _check_size(info, max_pixels)
            if kind == "png":
                return _decode_png(data, info), info
            return _decode_jpeg(data, info, reduction(data, info, least(info)) if least else 1), info
        image = _open(kind, data)
        info = _pillow_info(kind, image)
        _check_size(info, max_pixels)
        return _decode_pillow(image, data, info), info


def reduction(data: bytes, info: PhotoInfo, least: tuple[int, int]) -> int:
    """By how much a photo may be reduced while it is decoded: 8, 4, 2 or 1.

    Anything but 1 is for sequential JPEGs of 8 bits, grey or in colour. A progressive one is decoded whole: most of its
    time goes into reading its scans.

    Args:
        data: the file.
        info: its header.
        least: (height, width) on the stored grid that must remain.
    """
    if info.format != "jpeg" or info.bit_depth != 8 or info.channels not in (1, 3) or _is_progressive(data):
        return 1
    return next((n for n in _REDUCTIONS if all(s >= w for s, w in zip(_reduced(info, n), least, strict=True))), 1)


def _reduced(info: PhotoInfo, by: int) -> tuple[int, int]:
    """(height, width) at a reduction; libjpeg rounds up."""
    return -(-info.height // by), -(-info.width // by)


def _is_progressive(data: bytes) -> bool:
    """Whether the frame of a JPEG whose header is sound comes in scans of rising quality."""
    return next(m for m, _, _ in headers._jpeg_segments(data) if m in headers._FRAMES) in _PROGRESSIVE


def upright(rgb: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an array from the stored grid to the upright view.

    Args:
        rgb: (height, width) or (height, width, channels), any dtype.
        orientation: EXIF's 1..8; 5..8 swap height and width.

    Returns:
        A C-contiguous array; the same one where there is nothing to do.

    Raises:
        ValueError: an orientation outside 1..8.
    """
    if not 1 <= orientation <= 8:
        raise ValueError(f"EXIF orientation {orientation} is outside 1..8")
    if orientation == 1:
        return np.ascontiguousarray(rgb)
    if rgb.dtype in (np.uint8, np.uint16) and rgb.size and rgb.ndim in (2, 3) and rgb.shape[2:] in ((), (3,)):
        return _turn_fast(np.ascontiguousarray(rgb), orientation)
    turned = rgb.swapaxes(0, 1) if orientation >= 5 else rgb
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def stored(label_map: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an upright array back to the stored grid: the exact inverse of ``upright``."""
    return upright(label_map, _BACK.get(orientation, orientation))


def _turn_fast(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """OpenCV's turns, four times as fast as NumPy's strided copies."""
    import cv2

    if orientation in (6, 8):
        code = cv2.ROTATE_90_CLOCKWISE if orientation == 6 else cv2.ROTATE_90_COUNTERCLOCKWISE
        return cv2.rotate(array, code)
    if orientation >= 5:
        array = cv2.transpose(array)
    axis = {2: 1, 3: -1, 4: 0, 7: -1}.get(orientation)
    return array if axis is None else cv2.flip(array, axis)


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(error.problem, error.fix, error.code, uri) from error.__cause__


def _info(kind: str, data: bytes) -> PhotoInfo:
    header = headers.jpeg_header(data) if kind == "jpeg" else headers.png_header(data)
    return PhotoInfo(kind, header.height, header.width, header.channels, header.bit_depth, header.exif_orientation)


def _check_size(info: PhotoInfo, max_pixels: int) -> None:
    pixels = info.height * info.width
    if not pixels:
        headers.corrupt(_NAMES[info.format], f"its size is {info.width} x {info.height} pixels")
    if pixels > max_pixels:
        problem = f"{info.width} x {info.height} = {pixels:,} pixels, more than the limit of {max_pixels:,}"
        raise DataError(problem, "shrink the image or raise --max-pixels", "too-large")


def _decode_jpeg(data: bytes, info: PhotoInfo, by: int) -> NDArray[np.uint8]:
    import simplejpeg

    if info.bit_depth != 8 or info.channels not in (1, 3, 4):
        headers.unsupported(f"a JPEG of {info.channels} channels with {info.bit_depth} bits")
    scan = headers.jpeg_header(data).pixels_at
    end = data.find(b"\xff\xd9", scan)
    if end < 0:
        headers.truncated("JPEG", data)
    colors = "CMYK" if info.channels == 4 else "RGB"
    height, width = _reduced(info, by)
    options = {"colorspace": colors, "min_height": height, "min_width": width, "min_factor": by}
    try:
        pixels = simplejpeg.decode_jpeg(data, **options)
    except ValueError as error:
        if str(error).startswith("Premature end of JPEG file"):
            headers.truncated("JPEG", data)
        if not _only_padding(str(error), data[:end]):
            headers.corrupt("JPEG", error)
        pixels = simplejpeg.decode_jpeg(data, **options, strict=False)
    return _from_inverted_cmyk(pixels) if colors == "CMYK" else pixels


def _only_padding(message: str, data: bytes) -> bool:
    """Whether all that the decoder complains of is zeros or 0xFF before the end marker, as some cameras write."""
    found = re.search(r"(\d+) extraneous bytes before marker 0xd9", message)
    return found is not None and not data[len(data) - int(found[1]) :].strip(b"\0\xff")


def _from_inverted_cmyk(cmyk: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of the CMYK that JPEG files hold: 255 means no ink (Adobe's convention), as Pillow reads it."""
    from PIL import Image

    height, width = cmyk.shape[:2]
    image = Image.frombuffer("CMYK", (width, height), np.ascontiguousarray(cmyk), "raw", "CMYK;I", 0, 1)
    return np.array(image.convert("RGB"))


def _decode_png(data: bytes, info: PhotoInfo) -> NDArray[np.uint8]:
    import cv2

    fast = png.decode_rgb(data)
    if fast is not None:
        return fast
    clean = np.frombuffer(headers.checked_png(data), np.uint8)
    try:
        pixels = cv2.imdecode(clean, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        headers.corrupt("PNG", error)
    if pixels is None or pixels.shape != (info.height, info.width, 3):
        headers.corrupt("PNG", "its pixels cannot be decoded")
    return _as_8_bit(pixels)


def _as_8_bit(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _open(kind: str, data: bytes) -> "ImageFile":
    """Pillow's reader for ``kind``, without the search through all formats and its bomb check (ours is exact)."""
    from PIL import BmpImagePlugin, GifImagePlugin, TiffImagePlugin, WebPImagePlugin

    _hush_pillow()
    readers: dict[str, Callable[[io.BytesIO], ImageFile]] = {
        "bmp": BmpImagePlugin.BmpImageFile,
        "gif": GifImagePlugin.GifImageFile,
        "tiff": TiffImagePlugin.TiffImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }
    try:
        return readers[kind](io.BytesIO(data))
    except _pillow_errors() as error:
        _raise_pillow(kind, data, error)


def _pillow_errors() -> tuple[type[Exception], ...]:
    from PIL.Image import DecompressionBombError  # a GIF frame far larger than the GIF

    return (*_PILLOW_ERRORS, DecompressionBombError)


def _hush_pillow() -> None:
    """Let Pillow's warnings (odd metadata) pass in silence; process-wide, since Python's filters know no threads."""
    ours = ("ignore", None, Warning, re.compile(_PILLOW_WARNINGS), 0)
    if ours not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_WARNINGS)


def _pillow_info(kind: str, image: "ImageFile") -> PhotoInfo:
    width, height = image.size
    depth = 16 if image.mode.startswith("I;16") else 1 if image.mode == "1" else 8
    orientation = 1
    if kind == "tiff":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        orientation = tags.get(0x0112, 1)
        depth = max(tags.get(258, (depth,)))
        if orientation in (5, 6, 7, 8):  # Pillow turns TIFFs, and TIFFs only, by itself
            width, height = height, width
    elif kind == "webp":
        orientation = headers.exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    if orientation not in range(1, 9):
        orientation = 1
    return PhotoInfo(kind, height, width, len(image.getbands()), depth, orientation)


def _decode_pillow(image: "ImageFile", data: bytes, info: PhotoInfo) -> NDArray[np.uint8]:
    try:
        image.load()
        pixels = _pillow_rgb(image)
    except _pillow_errors() as error:
        _raise_pillow(info.format, data, error)
    if info.format == "tiff":
        pixels = stored(pixels, info.exif_orientation)
    if pixels.shape != (info.height, info.width, 3):
        headers.corrupt(_NAMES[info.format], f"its pixels have the shape {pixels.shape}")
    return pixels


def _pillow_rgb(image: "ImageFile") -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        grey = _as_8_bit(np.asarray(image).astype(np.uint16))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F", "LAB", "HSV"):
        headers.unsupported(f"an image of {image.mode} pixels")
    return np.array(image.convert("RGB"))


def _raise_pillow(kind: str, data: bytes, error: BaseException) -> NoReturn:
    """Pillow's failure as ours; a file shorter than it says of itself is cut short."""
    said = str(error).lower()
    if "decompression bomb" in said:
        raise DataError(f"a frame of the {_NAMES[kind]} file is too large: {error}", "shrink the image", "too-large")
    if isinstance(error, EOFError | struct.error) or "truncat" in said or headers.ends_early(kind, data):
        headers.truncated(_NAMES[kind], data)
    if "support" in said or "unknown" in said or "not available" in said:
        headers.unsupported(f"this kind of {_NAMES[kind]} file ({error})")
    headers.corrupt(_NAMES[kind], error)
