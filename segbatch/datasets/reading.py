"""What every dataset does when it reads: a photo's bytes, a PNG label map, and the check that the two agree."""

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import png
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, Instance, Issue, PlanItem, Sample, Segment

if TYPE_CHECKING:
    from PIL import Image

    from segbatch.codecs.photo import PhotoInfo

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
"""File name endings (lower case) that are taken for photos."""

MISSING = "missing"
"""The etag of a listed file that is not there; when it comes, the item has changed."""

LABELS_ONLY = "labels-only"
"""Code of the issue of a good row without its photo."""

_GREY, _GREY_SCALED = 0, {2: 85, 4: 17}


def sample_of(item: PlanItem, data: bytes, info: "PhotoInfo") -> Sample:
    """The photo's part of a sample; a dataset adds its labels with ``dataclasses.replace``."""
    return Sample(
        sample_id=item.sample_id,
        image=data,
        image_format=info.format,
        image_uri=item.uri,
        height=info.height,
        width=info.width,
        channels=info.channels,
        exif_orientation=info.exif_orientation,
    )


def labels_only(item: PlanItem, height: int, width: int) -> Sample:
    """The sample of a photo that is not distributed with its labels; its image is null, its size the labels'."""
    note = Issue(LABELS_ONLY, f"the photo {item.uri} is not there; only its labels were read")
    return Sample(item.sample_id, None, None, item.uri, height, width, None, issues=(note,))


def joint_etag(*parts: storage.ObjectInfo | None) -> str:
    """One tag over all files of a sample, so that a change in any of them is a change of the item."""
    return "+".join(part.etag if part else MISSING for part in parts)


def choose_splits(dataset: str, source: str, there: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """The splits to list, in the dataset's order: all when ``wanted`` is empty.

    Raises:
        ConfigError: a wanted split is not there.
    """
    known, asked = tuple(there), tuple(wanted)
    for split in asked:
        if split not in known:
            have = ", ".join(known) or "none"
            raise ConfigError(f"{dataset} at {source} has no split {split!r}", f"splits that are there: {have}")
    return tuple(s for s in known if s in asked) if asked else known


def detail_of(item: PlanItem) -> Mapping[str, Any]:
    """The item's ``detail`` as a mapping; empty where it has none."""
    found: Mapping[str, Any] = json.loads(item.detail) if item.detail else {}
    return found


def read_photo(uri: str) -> tuple[bytes, "PhotoInfo"]:
    """A photo's original bytes and what its header says.

    Raises:
        DataError: ``missing-image``, or what ``codecs.photo.inspect`` finds wrong.
        TransientStorageError: the store failed in a way that may pass.
    """
    from segbatch.codecs.photo import inspect

    try:
        data = storage.read_bytes(uri)
    except ObjectMissing as error:
        raise DataError(f"image {uri} is not there", "restore the file or unlist it", "missing-image", uri) from error
    return data, inspect(data, uri)


def read_label(uri: str) -> NDArray[Any]:
    """A PNG label map with the values that stand in the file.

    Palette images give their indices; grey images of 1, 2, 4, 8 and 16 bits give their numbers (decoders of photos
    would stretch 2 and 4 bits to 0..255).

    Returns:
        uint8 or uint16 of shape (height, width), or uint8 (height, width, 3) of a colour-coded mask.

    Raises:
        DataError: ``missing-label``, ``empty-label``, ``bad-label`` (not an image, or cut off), ``label-type``,
            ``label-too-large``.
    """
    from PIL import Image

    try:
        data = storage.read_bytes(uri)
    except ObjectMissing as error:
        raise DataError(f"label map {uri} is not there", "add it or unlist the image", "missing-label", uri) from error
    if not data:
        raise DataError(f"label map {uri} is an empty file", "write it again", "empty-label", uri)
    quick = png.decode_labels(data)
    if quick is not None:
        return quick
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _label_values(image, data, uri)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"label map {uri} cannot be decoded: {error}", "write it again", "bad-label", uri) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, 178 megapixels
        raise DataError(f"label map {uri} is too large: {error}", "cut it", "label-too-large", uri) from error


def _label_values(image: "Image.Image", data: bytes, uri: str) -> NDArray[Any]:
    if image.format != "PNG":
        fix = "label maps must be PNG; lossy formats change labels"
        raise DataError(f"label map {uri} is {image.format}", fix, "label-type", uri)
    if image.mode in ("1", "P"):
        return np.array(image, dtype=np.uint8)
    if image.mode == "L":
        scale = _grey_scale(data)
        return np.array(image) if scale == 1 else np.array(image) // np.uint8(scale)
    if image.mode in ("I;16", "I;16B", "I"):
        return np.array(image).astype(np.uint16)
    if image.mode in ("RGB", "RGBA"):
        return np.array(image)[..., :3]
    fix = "use a grey, palette or RGB PNG"
    raise DataError(f"label map {uri} is a PNG of mode {image.mode}", fix, "label-type", uri)


def _grey_scale(png: bytes) -> int:
    """By what PIL has multiplied the values of a grey PNG: its header's bit depth decides."""
    bit_depth, color_type = png[24], png[25]
    return _GREY_SCALED.get(bit_depth, 1) if color_type == _GREY else 1


def check_size(label: NDArray[Any], info: "PhotoInfo", label_uri: str, image_uri: str) -> None:
    """Refuse a label map that does not lie on the photo's stored pixel grid.

    Raises:
        DataError: ``size-mismatch`` with both sizes.
    """
    height, width = label.shape[:2]
    if (height, width) != (info.height, info.width):
        problem = f"label map {label_uri} is {width} x {height}, its photo {image_uri} is {info.width} x {info.height}"
        raise DataError(problem, "make the label map on the photo's own grid", "size-mismatch", label_uri)


def check_ids(label: NDArray[Any], known: NDArray[np.bool_], uri: str) -> None:
    """Refuse label ids that the class table lacks.

    Args:
        label: integers of shape (height, width).
        known: by label id, whether the table has it; 65,536 entries.
        uri: of the label map.

    Raises:
        DataError: ``unknown-label`` with the first such id, where it stands and how many pixels there are.
    """
    if known[: int(label.max(initial=0)) + 1].all():
        return
    good = known[label]
    if good.all():
        return
    row, column = np.argwhere(~good)[0]
    problem = (
        f"label map {uri} has the id {label[row, column]} at row {row}, column {column}, which no class has "
        f"({int((~good).sum())} such pixels)"
    )
    raise DataError(problem, "correct the label map or add the class", "unknown-label", uri)


def known_ids(classes: ClassTable) -> NDArray[np.bool_]:
    """By label id 0..65535, whether the class table has it; all true for an empty table (no names are known)."""
    known = np.full(1 << 16, not classes.classes)
    known[[c.label_id for c in classes.classes]] = True
    return known


def instances_of_map(
    id_map: NDArray[Any], category_of: Callable[[int], int | None], crowd: Callable[[int], bool] = lambda _: False
) -> tuple[Instance, ...]:
    """The objects of an instance-id map, by ascending id.

    Args:
        id_map: integers of shape (height, width).
        category_of: label id of an instance id; None for what is no object.
        crowd: whether an instance id marks a group.
    """
    from segbatch.codecs import rle

    found = rle.instances_of(id_map)
    kept = []
    for i, instance_id in enumerate(found.ids.tolist()):
        category = category_of(instance_id)
        if category is not None:
            box = tuple(float(v) for v in found.boxes_xywh[i])
            area = float(found.areas[i])
            kept.append(Instance(instance_id, category, box, area, crowd(instance_id), found.counts[i]))  # type: ignore[arg-type]
    return tuple(kept)


def panoptic_of(
    id_map: NDArray[Any], segments: Sequence[Segment], uri: str, void: int = 0
) -> tuple[NDArray[np.uint16], tuple[Segment, ...], tuple[Issue, ...]]:
    """The index map of a segment-id map.

    Args:
        id_map: unsigned integers below 2^24 of shape (height, width): the official segment ids.
        segments: as listed by the annotation, in its order.
        uri: of the map, for messages.
        void: the id of pixels without segment.

    Returns:
        The index map (uint16, n + 1 for ``segments[n]``, 0 for void), the segments, and an issue for every segment
        without pixels.

    Raises:
        DataError: ``unknown-segment``: pixels of an id that is not listed; ``duplicate-segment``; more segments than
            an index map can hold (65,535).
    """
    listed = np.array([s.id for s in segments], np.int64)
    if len(listed) > np.iinfo(np.uint16).max:
        raise DataError(f"{uri} lists {len(listed)} segments, more than 65,535", "merge some", "bad-panoptic", uri)
    ids, times = np.unique(listed, return_counts=True)
    if (times > 1).any():
        problem = f"the segment {ids[times > 1][0]} of {uri} is listed twice"
        raise DataError(problem, "list it once", "duplicate-segment", uri)
    greatest = int(id_map.max(initial=0))  # RGB maps: below 2**24, so that the tables stay small
    shown = np.zeros(greatest + 1, np.bool_)
    shown[id_map] = True
    index = np.zeros(greatest + 1, np.uint16)
    inside = (listed >= 0) & (listed <= greatest) & (listed != void)
    index[listed[inside]] = np.flatnonzero(inside) + 1
    strange = np.flatnonzero(shown & (index == 0))
    strange = strange[strange != void]
    if len(strange):
        pixels = int((id_map == strange[0]).sum())
        problem = f"{uri} shows the segment {strange[0]} ({pixels} pixels), which is not listed"
        raise DataError(problem, "list it in segments_info, or paint it void", "unknown-segment", uri)
    empty = [s.id for s in segments if not 0 <= s.id <= greatest or not shown[s.id]]
    issues = tuple(Issue("empty-segment", f"the segment {i} of {uri} has no pixels", i) for i in empty)
    return index[id_map], tuple(segments), issues


@dataclass(frozen=True, slots=True)
class Colors:
    """The colours of a class table, ready for look-up.

    Attributes:
        packed: as 0xRRGGBB in ascending order; empty when no class has a colour.
        ids: their label ids.
    """

    packed: NDArray[np.uint32]
    ids: NDArray[np.uint16]

    @classmethod
    def of(cls, classes: ClassTable) -> "Colors":
        """The colours of those classes that have one."""
        pairs = sorted(
            ((r << 16) | (g << 8) | b, c.label_id) for c in classes.classes if c.color for r, g, b in (c.color,)
        )
        return cls(np.array([p for p, _ in pairs], np.uint32), np.array([i for _, i in pairs], np.uint16))


def ids_of_colors(mask: NDArray[np.uint8], colors: Colors, uri: str) -> NDArray[np.uint16]:
    """Label ids of a colour-coded mask, uint8 of shape (height, width, 3).

    Raises:
        DataError: ``unknown-color`` with the first such colour and where it stands; ``label-type`` without colours.
    """
    if not len(colors.packed):
        fix = "give the classes their colours in classes.toml, or write label ids"
        raise DataError(f"mask {uri} is in colour but no class has a colour", fix, "label-type", uri)
    packed = mask.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    place = np.minimum(np.searchsorted(colors.packed, packed), len(colors.packed) - 1)
    good = colors.packed[place] == packed
    if not good.all():
        row, column = np.argwhere(~good)[0]
        red, green, blue = (int(v) for v in mask[row, column])
        raise DataError(
            f"mask {uri} has the colour ({red}, {green}, {blue}) at row {row}, column {column}, which no class has "
            f"({int((~good).sum())} such pixels)",
            "correct the mask (anti-aliased edges?) or add the class",
            "unknown-color",
            uri,
        )
    return colors.ids[place]
