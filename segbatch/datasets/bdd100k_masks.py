"""BDD100K's label files in PNG: grey masks, lane bytes, and RGBA bitmasks of objects. Reading and writing.

Source: github.com/bdd100k/bdd100k, doc/source/format.rst (Segmentation Formats), bdd100k/common/bitmask.py
(parse_bitmask), bdd100k/label/to_mask.py (set_lane_color, set_instance_color, what the background is).
"""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import png
from segbatch.datasets import reading, tables
from segbatch.errors import DataError, ObjectMissing
from segbatch.records import ClassTable, Instance, Issue, Segment

if TYPE_CHECKING:
    from segbatch.codecs.rle import Segments

SEMANTIC = tables.load("bdd100k-sem")
DRIVABLE = tables.load("bdd100k-drivable")
LANE = tables.load("bdd100k-lane")
INSTANCE = tables.load("bdd100k-ins")
PANOPTIC = tables.load("bdd100k-pan")

FLAGS = {"truncated": 8, "occluded": 4, "crowd": 2, "ignored": 1}
"""Bits of a bitmask's green channel."""
MOST_OBJECTS = 65_535
"""Greatest instance id of a bitmask."""
DIRECTION, STYLE = "direction", "style"
"""Label maps of lanes: 0 parallel or 1 vertical; 0 solid or 1 dashed; 255 where there is no lane."""
NO_LANE = 255

_CATEGORY_BITS, _BACKGROUND_BIT, _STYLE_SHIFT, _DIRECTION_SHIFT, _LANE_BITS = 0b111, 0b1000, 4, 5, 0b110111


@dataclass(frozen=True, slots=True)
class Found:
    """The labels of one image as a label file has them; the fields are those of ``records.Sample``.

    Attributes:
        size: height and width in pixels.
        attributes: what is known of single instances or segments, under ``instances`` or ``segments``.
    """

    size: tuple[int, int]
    semantic: NDArray[np.uint8] | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: NDArray[np.uint16] | None = None
    segments: tuple[Segment, ...] | None = None
    label_maps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    issues: tuple[Issue, ...] = ()


class Marked(NamedTuple):
    """One object of a bitmask: instance id 1..65535, category id, and attributes as bits (see ``FLAGS``)."""

    id: int
    category_id: int
    flags: int


def read_semantic(uri: str) -> Found:
    """A mask of trainIds; 255 is unknown.

    Raises:
        DataError: as ``reading.read_label``; in colour, or an id that no class has.
    """
    return _read_classes(uri, SEMANTIC)


def read_drivable(uri: str) -> Found:
    """A mask of direct (0), alternative (1) and background (2).

    Raises:
        DataError: as ``read_semantic``.
    """
    return _read_classes(uri, DRIVABLE)


def read_lanes(uri: str) -> Found:
    """A mask of lane bytes: bits 0-2 category, 3 background, 4 style, 5 direction.

    Gives categories (255: background), and the label maps ``direction`` and ``style``.

    Raises:
        DataError: as ``reading.read_label``; in colour or of 16 bits.
    """
    value = _read_grey(uri)
    lane = (value & _BACKGROUND_BIT) == 0
    semantic, direction, style = (
        np.where(lane, part, np.uint8(NO_LANE))
        for part in (value & _CATEGORY_BITS, value >> _DIRECTION_SHIFT & 1, value >> _STYLE_SHIFT & 1)
    )
    strange = int(np.where(lane, value & ~np.uint8(_LANE_BITS) != 0, value != NO_LANE).sum())
    note = f"{strange} pixels of {uri} have bits that say nothing (6 and 7, or any in the background); left out"
    return Found(
        size=_size(value),
        semantic=semantic,
        label_maps={DIRECTION: direction, STYLE: style},
        issues=(Issue("lane-bits", note),) if strange else (),
    )


def write_lanes(semantic: NDArray[Any], label_maps: Mapping[str, NDArray[Any]]) -> bytes:
    """The inverse of ``read_lanes``; without label maps every lane is parallel and solid, as in to_mask.py.

    Raises:
        ValueError: a category that is not in 0..7 or 255, a direction or style that is not 0 or 1.
    """
    lane = semantic != NO_LANE
    value = semantic.copy()
    for name, shift in ((DIRECTION, _DIRECTION_SHIFT), (STYLE, _STYLE_SHIFT)):
        if name in label_maps:
            bit = np.where(lane, label_maps[name], 0)
            if bit.max(initial=0) > 1:
                raise ValueError(f"{name} is {bit.max()}, which is neither 0 nor 1")
            value |= bit << shift
    if semantic[lane].max(initial=0) > _CATEGORY_BITS:
        raise ValueError(f"lane category {semantic[lane].max()} is not in 0..{_CATEGORY_BITS}")
    return png.encode_grey(np.where(lane, value, NO_LANE), bits=8)


def read_instances(uri: str) -> Found:
    """The objects of a bitmask by ascending instance id; their attributes under ``instances``.

    Raises:
        DataError: see ``read_panoptic``.
    """
    marked, parts, size, issues = _read_bitmask(uri, INSTANCE)
    instances = tuple(
        Instance(o.id, o.category_id, part.box_xywh, part.area, bool(o.flags & FLAGS["crowd"]), part.counts)
        for o, part in zip(marked, parts, strict=True)
    )
    extras = {"instances": {str(o.id): spelled_out(o.flags) for o in marked}}
    return Found(size, instances=instances, attributes=extras, issues=issues)


def read_panoptic(uri: str) -> Found:
    """The segments of a bitmask by ascending id; their attributes under ``segments``.

    Raises:
        DataError: ``missing-label``, ``empty-label``, ``bad-label`` (not an image, cut off, or an object of several
            categories or attributes), ``label-type`` (not RGBA).
    """
    marked, parts, size, issues = _read_bitmask(uri, PANOPTIC)
    from segbatch.codecs import rle

    index = rle.paint([p.counts for p in parts], range(1, len(parts) + 1), *size, np.uint16)
    return Found(size, panoptic=index, segments=segments_of(marked, parts), attributes=extras_of(marked), issues=issues)


class Part(NamedTuple):
    """Where an object lies: COCO counts, box in pixels, pixels."""

    counts: bytes
    box_xywh: tuple[float, float, float, float]
    area: float


def parts_of(found: "Segments") -> list[Part]:
    """The masks of a map of ids, one by one."""
    boxes, areas = found.boxes_xywh.tolist(), found.areas.tolist()
    return [Part(c, tuple(b), float(a)) for c, b, a in zip(found.counts, boxes, areas, strict=True)]


def segments_of(marked: Sequence[Marked], parts: Sequence[Part]) -> tuple[Segment, ...]:
    """Objects as panoptic segments."""
    return tuple(
        Segment(o.id, o.category_id, part.area, part.box_xywh, bool(o.flags & FLAGS["crowd"]))
        for o, part in zip(marked, parts, strict=True)
    )


def extras_of(marked: Sequence[Marked]) -> dict[str, Any]:
    """Attributes of panoptic segments as they stand in a sample's attributes."""
    return {"segments": {str(o.id): spelled_out(o.flags) for o in marked}}


def write_bitmask(index: NDArray[Any], marked: Sequence[Marked]) -> bytes:
    """The RGBA PNG of ``index``, a map of n + 1 for ``marked[n]`` and 0 for none."""
    colors = np.zeros((len(marked) + 1, 4), np.uint8)
    for n, o in enumerate(marked, 1):
        colors[n] = o.category_id, o.flags, o.id >> 8, o.id & 255
    return png.encode_rgb(colors[index])


def spelled_out(flags: int) -> dict[str, bool]:
    """Bits of attributes by name."""
    return {name: bool(flags & bit) for name, bit in FLAGS.items()}


def flags_of(attributes: Mapping[str, Any] | None) -> int:
    """The inverse of ``spelled_out``; names that are missing are false."""
    return sum(bit for name, bit in FLAGS.items() if (attributes or {}).get(name))


def _read_classes(uri: str, classes: ClassTable) -> Found:
    label = _read_grey(uri)
    reading.check_ids(label, reading.known_ids(classes), uri)
    return Found(_size(label), semantic=label)


def _read_grey(uri: str) -> NDArray[np.uint8]:
    label = reading.read_label(uri)
    if label.ndim != 2 or label.dtype != np.uint8:
        kind = "in colour" if label.ndim == 3 else "16 bit"
        raise DataError(f"label map {uri} is {kind}", "give the 8-bit PNG of masks/", "label-type", uri)
    return label


def _read_bitmask(uri: str, classes: ClassTable) -> tuple[list[Marked], list[Part], tuple[int, int], tuple[Issue, ...]]:
    """The objects, where they lie, the size, and what there is to say."""
    from segbatch.codecs import rle

    red, green, blue, alpha = np.moveaxis(_read_rgba(uri).astype(np.uint32), 2, 0)
    found = rle.instances_of((blue << 24) | (alpha << 16) | (red << 8) | green)
    known = {c.label_id for c in classes.classes}
    marked, parts, issues, last = [], [], [], Marked(0, 0, 0)
    for packed, part in zip(found.ids.tolist(), parts_of(found), strict=True):
        o = Marked(packed >> 16, packed >> 8 & 255, packed & 255)
        if o.id and o.id == last.id:
            problem = f"object {o.id} of bitmask {uri} has several categories or attributes: {last[1:]} and {o[1:]}"
            raise DataError(problem, "give every object an id of its own (B, A)", "bad-label", uri)
        last = o
        if o.id == 0 or o.category_id not in known:
            issues += _complaint(o, int(part.area), uri)
        else:
            marked.append(o)
            parts.append(part)
    return marked, parts, (int(red.shape[0]), int(red.shape[1])), tuple(issues)


def _complaint(o: Marked, pixels: int, uri: str) -> list[Issue]:
    if o.id:
        note = f"object {o.id} of {uri} ({pixels} pixels) has the unknown category {o.category_id} and was left out"
        return [Issue("unknown-category", note, o.id)]
    if not o.category_id:
        return []
    note = f"{pixels} pixels of category {o.category_id} in {uri} have no object id and count as background"
    return [Issue("no-object-id", note)]


def _read_rgba(uri: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        data = storage.read_bytes(uri)
    except ObjectMissing as error:
        raise DataError(f"bitmask {uri} is not there", "add it or unlist the image", "missing-label", uri) from error
    if not data:
        raise DataError(f"bitmask {uri} is an empty file", "write it again", "empty-label", uri)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "PNG" or image.mode != "RGBA":
                kind = f"{image.format} of mode {image.mode}"
                raise DataError(f"bitmask {uri} is {kind}", "give the RGBA PNG of bitmasks/", "label-type", uri)
            return np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"bitmask {uri} cannot be decoded: {error}", "write it again", "bad-label", uri) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, 178 megapixels
        raise DataError(f"bitmask {uri} is too large: {error}", "cut it", "label-too-large", uri) from error


def _size(label: NDArray[Any]) -> tuple[int, int]:
    return int(label.shape[0]), int(label.shape[1])
