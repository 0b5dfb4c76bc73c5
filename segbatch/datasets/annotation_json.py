"""Large annotation files (COCO, COCO results, BDD100K): parsed once, cut into raw slices image by image.

A file is read when a run is planned. Its annotations stay slices of the file's own bytes (msgspec's ``Raw``); only the
image records and the ids that group them become Python objects. An item's slices travel as text in its ``detail``, and
are decoded where the image is read.

Sources: cocodataset.org/#format-data and #format-results (instances, stuff, panoptic); doc.scalabel.com/format.html
(frames of BDD100K).
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError, DataError

ImageId: TypeAlias = int | str
"""As in the file: 1 and "1" are different ids."""

RawJson: TypeAlias = bytes | memoryview
"""One JSON value as it stands in its file: UTF-8, without the blanks around it."""

_Record = TypeVar("_Record")

_UNREADABLE = (msgspec.DecodeError, RecursionError)
_UTF8_CHUNK = 1 << 24
_SHOWN = 24  # bytes of a broken file in a message
_DIGEST_BYTES = 8


class CocoImage(msgspec.Struct, frozen=True, gc=False):
    """One entry of ``images``. Sizes in pixels; None where the file does not say."""

    id: ImageId
    file_name: str
    height: int | None = None
    width: int | None = None
    license: ImageId | None = None
    coco_url: str | None = None
    flickr_url: str | None = None
    date_captured: str | int | float | None = None


class CocoCategory(msgspec.Struct, frozen=True):
    """One entry of ``categories``; ``isthing`` and ``color`` (r, g, b) only in panoptic files."""

    id: int
    name: str
    supercategory: str | None = None
    isthing: Literal[0, 1] | bool | None = None
    color: tuple[int, int, int] | None = None


class Rle(msgspec.Struct, frozen=True):
    """A mask as runs down the columns, background first.

    Attributes:
        size: (height, width) in pixels.
        counts: run lengths in pixels, or COCO's compressed string of them.
    """

    size: tuple[int, int]
    counts: str | list[int]


class CocoAnnotation(msgspec.Struct, frozen=True):
    """One object of an instances or stuff file.

    Attributes:
        bbox: (x, y, width, height) in pixels.
        segmentation: polygons [x0, y0, x1, y1, ...] in pixels, or runs.
        area: in pixels, as the file says.
    """

    id: ImageId
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: list[list[float]] | Rle
    area: float | None = None
    iscrowd: Literal[0, 1] | bool = 0


class PanopticSegment(msgspec.Struct, frozen=True):
    """One segment of a panoptic annotation; ``id`` is R + 256 G + 256^2 B of its pixels in the PNG."""

    id: int
    category_id: int
    area: float | None = None
    bbox: tuple[float, float, float, float] | None = None
    iscrowd: Literal[0, 1] | bool = 0


class PanopticAnnotation(msgspec.Struct, frozen=True):
    """The one annotation of an image in a panoptic file; ``file_name`` is its PNG."""

    image_id: ImageId
    file_name: str
    segments_info: list[PanopticSegment]


class CocoResult(msgspec.Struct, frozen=True):
    """One predicted object; fields as in ``CocoAnnotation``. A file of boxes has no ``segmentation``."""

    image_id: ImageId
    category_id: int
    score: float
    segmentation: list[list[float]] | Rle | None = None
    bbox: tuple[float, float, float, float] | None = None


class CocoFile(msgspec.Struct, frozen=True):
    """The top level of a COCO file, its parts not decoded yet."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw] = []
    info: msgspec.Raw = msgspec.Raw(b"null")
    licenses: msgspec.Raw = msgspec.Raw(b"null")


class _Results(msgspec.Struct, frozen=True):
    annotations: list[msgspec.Raw]


class _Frames(msgspec.Struct, frozen=True):
    frames: list[msgspec.Raw]


class _ImageOf(msgspec.Struct, frozen=True, gc=False):
    image_id: ImageId


class _Frame(msgspec.Struct, frozen=True, gc=False):
    name: str
    video_name: str | None = msgspec.field(name="videoName", default=None)


class _Named(msgspec.Struct, frozen=True):
    id: Any = None
    image_id: Any = None


_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_COCO_FILE = msgspec.json.Decoder(CocoFile)
_RESULTS: msgspec.json.Decoder[list[msgspec.Raw] | _Results] = msgspec.json.Decoder(list[msgspec.Raw] | _Results)
_FRAMES: msgspec.json.Decoder[list[msgspec.Raw] | _Frames] = msgspec.json.Decoder(list[msgspec.Raw] | _Frames)
_IMAGE = msgspec.json.Decoder(CocoImage)
_CATEGORY = msgspec.json.Decoder(CocoCategory)
_IMAGE_OF = msgspec.json.Decoder(_ImageOf)
_FRAME = msgspec.json.Decoder(_Frame)
_NAMED = msgspec.json.Decoder(_Named)
_ANNOTATION = msgspec.json.Decoder(CocoAnnotation)
_PANOPTIC = msgspec.json.Decoder(PanopticAnnotation)
_RESULT = msgspec.json.Decoder(CocoResult)


class RawGroups(Mapping[ImageId, list[memoryview]]):
    """Raw slices by image id: ids in order of first occurrence, the slices of each in file order.

    Slices are made when asked for; what is kept is one ``Raw`` (56 bytes) and one index per slice.
    """

    def __init__(self, slices: list[msgspec.Raw], image_ids: Iterable[ImageId]) -> None:
        self._slices = slices
        self._group_of: dict[ImageId, int] = {}
        numbers = (self._group_of.setdefault(i, len(self._group_of)) for i in image_ids)
        groups = np.fromiter(numbers, np.int64, len(slices))
        self._order: NDArray[np.intp] = np.argsort(groups, kind="stable")
        self._ends: NDArray[np.intp] = np.cumsum(np.bincount(groups, minlength=len(self._group_of)))

    def __getitem__(self, image_id: ImageId) -> list[memoryview]:
        group = self._group_of[image_id]
        start = self._ends[group - 1] if group else 0
        return [memoryview(self._slices[i]) for i in self._order[start : self._ends[group]].tolist()]

    def __iter__(self) -> Iterator[ImageId]:
        return iter(self._group_of)

    def __len__(self) -> int:
        return len(self._group_of)


@dataclass(frozen=True, slots=True)
class CocoDocument:
    """A COCO file, image by image. Keeps the file's bytes alive.

    Attributes:
        info, licenses: decoded as they stand; None where the file has none.
        categories: in file order; empty where the file has none.
        images: in file order.
        annotations: raw slices by image id, orphans included.
    """

    info: Any
    licenses: Any
    categories: tuple[CocoCategory, ...]
    images: tuple[CocoImage, ...]
    annotations: RawGroups = field(repr=False)

    def items(self) -> Iterator[tuple[CocoImage, list[memoryview]]]:
        """Every image with its annotations, both in file order; none is normal.

        Images that share an id get the same annotations (see ``duplicate_ids``).
        """
        for image in self.images:
            yield image, self.annotations.get(image.id, [])

    def orphans(self) -> dict[ImageId, list[memoryview]]:
        """Annotations by image id, where no image has that id."""
        known = {image.id for image in self.images}
        return {image_id: self.annotations[image_id] for image_id in self.annotations if image_id not in known}

    def duplicate_ids(self) -> tuple[ImageId, ...]:
        """The ids that several images have, in order of their second occurrence."""
        seen: set[ImageId] = set()
        twice: dict[ImageId, None] = {}
        for image in self.images:
            if image.id in seen:
                twice[image.id] = None
            seen.add(image.id)
        return tuple(twice)


class RawFrame(NamedTuple):
    """One frame of a BDD100K file: its photo's name, its video (None without), and its JSON."""

    name: str
    video_name: str | None
    raw: memoryview


def split_coco(data: bytes, uri: str) -> CocoDocument:
    """Cut a COCO file (instances, stuff, panoptic, keypoints) into its images and their raw annotations.

    Takes about 80 bytes per annotation and 0.9 kB per image, beside ``data`` itself.

    Args:
        data: the whole file.
        uri: where it lies, for messages.

    Raises:
        ConfigError: cut short, not JSON, not UTF-8 (with the byte position and the size); no object with ``images`` and
            ``annotations``; an image without id or file name, an annotation without ``image_id`` (with its index and
            byte position).
    """
    fix = "give a COCO file with images and annotations; files of test images have none: take the photos as images"
    file = _top_level(_COCO_FILE, data, uri, "a COCO annotation file", fix)
    images = _records(_IMAGE, file.images, "images", data, uri)
    categories = _records(_CATEGORY, file.categories, "categories", data, uri)
    return CocoDocument(
        info=_free_part(file.info, "info", data, uri),
        licenses=_free_part(file.licenses, "licenses", data, uri),
        categories=tuple(categories),
        images=tuple(images),
        annotations=_grouped(file.annotations, "annotations", data, uri),
    )


def split_results(data: bytes, uri: str) -> RawGroups:
    """Cut a COCO results file (a list of predictions, or ``{"annotations": [...]}`` of panoptic ones) by image id.

    Raises:
        ConfigError: as ``split_coco``; a prediction without ``image_id`` (with its index).
    """
    fix = "give a list of predictions, each with image_id, category_id, segmentation and score"
    found = _top_level(_RESULTS, data, uri, "a COCO results file", fix)
    return _grouped(found.annotations if isinstance(found, _Results) else found, "results", data, uri)


def split_frames(data: bytes, uri: str) -> list[RawFrame]:
    """Cut a BDD100K (Scalabel) file, a list of frames or ``{"frames": [...]}``, into its frames, in file order.

    Raises:
        ConfigError: as ``split_coco``; a frame without ``name`` (with its index).
    """
    fix = 'give a list of frames, or an object with "frames"'
    found = _top_level(_FRAMES, data, uri, "a file of frames", fix)
    slices = found.frames if isinstance(found, _Frames) else found
    frames = _records(_FRAME, slices, "frames", data, uri)
    return [RawFrame(f.name, f.video_name, memoryview(raw)) for f, raw in zip(frames, slices, strict=True)]


def annotations_text(raws: Iterable[RawJson]) -> str:
    """One JSON array of the slices as they stand; nothing is serialised again."""
    return (b"[" + b",".join(raws) + b"]").decode("utf-8")


def digest(raws: Iterable[RawJson]) -> str:
    """BLAKE2b over the slices and their order, 16 hex digits.

    Where they stand in the file does not matter, nor does white space: a file that a tool has written anew with another
    indentation has not changed.
    """
    return hashlib.blake2b(b",".join(raws).translate(None, b" \t\r\n"), digest_size=_DIGEST_BYTES).hexdigest()


def decode_annotations(text: str, uri: str = "") -> tuple[CocoAnnotation, ...]:
    """The annotations of one image of an instances or stuff file.

    Args:
        text: from ``annotations_text``.
        uri: the annotation file, for messages.

    Raises:
        DataError: ``bad-annotation``: no JSON array, or an annotation (named by its id) with a field that is missing
            (``id``, ``category_id``, ``bbox``, ``segmentation``) or of a wrong type.
    """
    return _decoded(_ANNOTATION, text, uri)


def decode_panoptic_annotations(text: str, uri: str = "") -> tuple[PanopticAnnotation, ...]:
    """As ``decode_annotations``, for a panoptic file; annotations are named by their image."""
    return _decoded(_PANOPTIC, text, uri)


def decode_results(text: str, uri: str = "") -> tuple[CocoResult, ...]:
    """As ``decode_annotations``, for a results file; predictions are named by their image."""
    return _decoded(_RESULT, text, uri)


def _top_level(decoder: msgspec.json.Decoder[_Record], data: bytes, uri: str, expected: str, fix: str) -> _Record:
    again = f"download or unpack it again, and compare its size with the source's; it has {len(data):,} bytes here"
    _check_utf8(data, uri, again)
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{uri} ({len(data):,} bytes) is not {expected}: {error}", fix) from error
    except RecursionError as error:
        raise ConfigError(f"{uri} ({len(data):,} bytes) is nested too deep for {expected}", again) from error
    except msgspec.DecodeError as error:
        position = _position(error)
        if position is None or (position == len(data) and "trailing" not in str(error)):
            raise ConfigError(f"{uri} is cut short: it ends at byte {len(data)}, inside its JSON", again) from error
        raise ConfigError(f"{uri} cannot be read: {error}, near {_excerpt(data, position)}", again) from error


def _position(error: msgspec.DecodeError) -> int | None:
    """Where the parser stopped; it does not say where the data end too soon."""
    found = re.search(r"\(byte (\d+)\)", str(error))
    return int(found[1]) if found else None


def _excerpt(data: bytes, position: int) -> str:
    return repr(data[max(0, position - _SHOWN // 2) : position + _SHOWN])


def _check_utf8(data: bytes, uri: str, fix: str) -> None:
    """Refuse other encodings; a character cut off at the end is left to the parser."""
    if data.isascii():
        return
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(data)
    for start in range(0, len(data), _UTF8_CHUNK):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(view[start : start + _UTF8_CHUNK])
        except UnicodeDecodeError as error:
            position = start - pending + error.start
            problem = f"{uri} is not UTF-8 (byte {position}), near {_excerpt(data, position)}"
            raise ConfigError(problem, fix) from error


def _grouped(slices: list[msgspec.Raw], what: str, data: bytes, uri: str) -> RawGroups:
    return RawGroups(slices, (found.image_id for found in _records(_IMAGE_OF, slices, what, data, uri)))


def _records(
    decoder: msgspec.json.Decoder[_Record], slices: Iterable[msgspec.Raw], what: str, data: bytes, uri: str
) -> Iterator[_Record]:
    for index, raw in enumerate(slices):
        try:
            record = decoder.decode(raw)
        except _UNREADABLE as error:
            raise _bad_part(error, f"{what}[{index}]", raw, data, uri) from error
        yield record


def _free_part(raw: msgspec.Raw, name: str, data: bytes, uri: str) -> Any:
    """``info`` and ``licenses``, of which nothing is expected but JSON."""
    try:
        return msgspec.json.decode(raw)
    except _UNREADABLE as error:
        raise _bad_part(error, name, raw, data, uri) from error


def _bad_part(error: Exception, name: str, raw: bytes, data: bytes, uri: str) -> ConfigError:
    problem = f"{name} of {uri}, at byte {_address(raw) - _address(data)}: {error}"
    return ConfigError(problem, "correct the file, or download it again")


def _address(buffer: bytes) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def _decoded(decoder: msgspec.json.Decoder[_Record], text: str, uri: str) -> tuple[_Record, ...]:
    try:
        slices = _LIST.decode(text)
    except _UNREADABLE as error:
        raise _bad("annotations", error, uri) from error
    return tuple(_one(decoder, raw, index, uri) for index, raw in enumerate(slices))


def _one(decoder: msgspec.json.Decoder[_Record], raw: msgspec.Raw, index: int, uri: str) -> _Record:
    try:
        return decoder.decode(raw)
    except _UNREADABLE as error:
        raise _bad(_name(raw, index), error, uri) from error


def _name(raw: msgspec.Raw, index: int) -> str:
    """What to call an annotation that cannot be decoded: by its id, else by its image and place."""
    try:
        found = _NAMED.decode(raw)
    except _UNREADABLE:
        found = _Named()
    if found.id is not None:
        return f"annotation {found.id!r}"
    image = "" if found.image_id is None else f" of image {found.image_id!r}"
    return f"annotation at index {index}{image}"


def _bad(name: str, error: Exception, uri: str) -> DataError:
    where = f"{name} of {uri}" if uri else name
    return DataError(f"{where}: {error}", "correct the annotation file", "bad-annotation", uri)
