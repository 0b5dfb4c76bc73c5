"""BDD100K's JSON labels (Scalabel frames with ``rle`` or ``poly2d``) as label maps, instances and panoptic segments.

What the official converter does with polygons is done here: later labels cover earlier ones, ids follow the order of
the labels. (It paints labels as colours that run out at 255 labels of an image; ids here do not.)

Sources: doc.scalabel.com/format.html (frames); github.com/bdd100k/bdd100k, bdd100k/label/to_mask.py (categories, ids,
order), bdd100k/configs/ins_seg.toml (other names of categories); github.com/scalabel/scalabel,
scalabel/eval/sem_seg.py (frame_to_mask).
"""

import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from segbatch.datasets import bdd100k_polygons as polygons
from segbatch.datasets.annotation_json import Rle
from segbatch.datasets.bdd100k_masks import (
    DRIVABLE,
    FLAGS,
    INSTANCE,
    MOST_OBJECTS,
    PANOPTIC,
    SEMANTIC,
    Found,
    Marked,
    extras_of,
    flags_of,
    parts_of,
    segments_of,
    spelled_out,
)
from segbatch.errors import DataError
from segbatch.records import ClassTable, Instance, Issue

SIZE = (720, 1280)
"""Height and width of every image of BDD100K, in pixels: ``imageSize`` of the official configuration."""

_UNTRACKED = "-1"  # the id of all labels in a video that belong to no track
_LAST_STUFF = 30
_NUMBER = re.compile(r"[1-9][0-9]{0,4}")
_VOID = 255
_MOST_PIXELS = 1 << 30
_OTHER_NAMES = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
_IGNORED_NAMES = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}


class Poly2d(msgspec.Struct, frozen=True):
    """One polygon; see ``bdd100k_polygons.points_of``."""

    vertices: list[tuple[float, float]]
    types: str


class Label(msgspec.Struct, frozen=True):
    """One label of a frame; labels with neither ``rle`` nor ``poly2d`` are boxes or tags."""

    id: str | int = ""
    category: str | None = None
    score: float | None = None
    attributes: dict[str, Any] | None = None
    rle: Rle | None = None
    poly2d: list[Poly2d] | None = None


class ImageSize(msgspec.Struct, frozen=True):
    """In pixels."""

    height: int
    width: int


class Frame(msgspec.Struct, frozen=True):
    """What is read of a frame."""

    name: str
    size: ImageSize | None = None
    labels: list[Label] | None = None
    frame_index: int | None = msgspec.field(name="frameIndex", default=None)


_FRAME = msgspec.json.Decoder(Frame)


def decode(text: str, uri: str) -> Frame:
    """One frame of the file ``uri``.

    Raises:
        DataError: ``bad-annotation``: a field of a wrong type.
    """
    try:
        return _FRAME.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        problem = f"a frame of {uri} cannot be read: {error}"
        raise DataError(problem, "correct the label file", "bad-annotation", uri) from error


def semantic(frame: Frame, size: tuple[int, int] | None, uri: str) -> Found:
    """A label map of trainIds; 255 where no label lies. Labels of classes without a trainId are left out, and what
    their polygons cover shows.

    Args:
        frame: one frame.
        size: height and width of the photo; None where there is none.
        uri: of the label file, for messages.

    Raises:
        DataError: ``size-mismatch``: labels of several sizes, or of another size than the photo; ``bad-annotation``:
            an RLE that cannot be decoded.
    """
    return _map(frame, size, uri, SEMANTIC, _VOID)


def drivable(frame: Frame, size: tuple[int, int] | None, uri: str) -> Found:
    """A label map of direct (0), alternative (1) and background (2); else as ``semantic``."""
    return _map(frame, size, uri, DRIVABLE, _ids(DRIVABLE)["background"])


def instances(frame: Frame, size: tuple[int, int] | None, uri: str, numbers: Sequence[int] | None = None) -> Found:
    """The objects of the 8 classes: masks in RLE as they are, polygons without what later ones cover.

    Categories may have the other names of ``ins_seg.toml``; "other person", "other vehicle" and "trailer" become
    ``ignored`` objects of the class that they are like. The id is the label's where all labels have RLE and whole
    numbers for ids, else it counts them. ``attributes["instances"]`` also has the ``scalabel_id`` of a label whose id
    is another here. Labels of one id are one object.

    Args:
        frame: one frame.
        size: height and width of the photo; None where there is none.
        uri: of the label file, for messages.
        numbers: ids of the frame's objects in a video, from ``numbers_of``.

    Raises:
        DataError: as ``semantic``.
    """
    wanted, issues = _wanted(frame, instance_category, (), uri)
    labels = [label for label, _ in wanted]
    size = _size(frame, size, uri)
    masks, more = _masks(labels, frame, size, uri)
    ids = numbers if numbers is not None else _own_ids(labels) or range(1, len(labels) + 1)
    of_id: dict[int, tuple[Label, int]] = {}
    for i, one in zip(ids, wanted, strict=True):
        of_id.setdefault(i, one)
    if all(label.rle is not None for label in labels) and len(of_id) == len(ids):
        shown = dict(zip(ids, masks, strict=True))
    else:
        shown = _uncovered(masks, ids, size)
    found = tuple(_instance(i, *one, shown[i], size) for i, one in of_id.items() if i in shown)
    empty = of_id.keys() - {i.id for i in found if i.area}
    return Found(
        size,
        instances=found,
        attributes={"instances": {str(i): _extra(i, label) for i, (label, _) in of_id.items() if i in shown}},
        issues=(*issues, *more, *(_no_pixels("object", i, frame, uri) for i in sorted(empty))),
    )


def panoptic(frame: Frame, size: tuple[int, int] | None, uri: str) -> Found:
    """The 40 classes as segments: all labels of a stuff class are one, whose id is the category's; things count from
    31. Later labels cover earlier ones.

    Raises:
        DataError: as ``semantic``.
    """
    from segbatch.codecs import rle

    ids = _ids(PANOPTIC)
    wanted, issues = _wanted(frame, lambda name: ids.get(name) or None, {"unlabeled"}, uri)
    size = _size(frame, size, uri)
    counts, more = _masks([label for label, _ in wanted], frame, size, uri)
    marks: dict[int, Marked] = {}
    segments, things = [], _LAST_STUFF
    for label, category in wanted:
        things += category > _LAST_STUFF
        segment = category if category <= _LAST_STUFF else things
        known = marks.get(segment, Marked(segment, category, 0))
        marks[segment] = known._replace(flags=known.flags | flags_of(label.attributes))
        segments.append(segment)
    shown = rle.instances_of(rle.paint(counts, segments, *size, np.uint16), background=(0,))
    hidden = [_no_pixels("segment", i, frame, uri) for i in sorted({*marks} - {*shown.ids.tolist()})]
    marked = [marks[i] for i in shown.ids.tolist()]
    return Found(
        size,
        panoptic=rle.paint(shown.counts, range(1, len(marked) + 1), *size, np.uint16),
        segments=segments_of(marked, parts_of(shown)),
        attributes=extras_of(marked),
        issues=(*issues, *more, *hidden),
    )


def instance_category(name: str) -> int | None:
    """Label id of a class of objects by any of its names; None for others."""
    return _ids(INSTANCE).get(_IGNORED_NAMES.get(name, _OTHER_NAMES.get(name, name)))


def numbers_of(frames: Sequence[Frame]) -> list[list[int]]:
    """Ids of the objects of a video, frame by frame, in the order of their labels: those of the labels where all have
    RLE and whole numbers for ids, else the tracks in order of occurrence (segtrack_to_bitmasks).

    Args:
        frames: of one video, in their order.
    """
    labels = [[label for label, _ in _wanted(frame, instance_category, (), "")[0]] for frame in frames]
    own = [_own_ids(found) for found in labels]
    if all(ids is not None for ids in own):
        return [ids or [] for ids in own]
    tracks: dict[str, int] = {}
    numbers: list[list[int]] = []
    following = 1
    for found in labels:
        numbers.append([])
        for label in found:
            number = tracks.get(str(label.id), following)
            following += number == following
            if str(label.id) != _UNTRACKED:
                tracks[str(label.id)] = number
            numbers[-1].append(number)
    return numbers


def _map(frame: Frame, size: tuple[int, int] | None, uri: str, classes: ClassTable, background: int) -> Found:
    from segbatch.codecs import rle

    ids = _ids(classes)
    wanted, issues = _wanted(frame, ids.get, _ids(PANOPTIC).keys() if classes is SEMANTIC else (), uri)
    size = _size(frame, size, uri)
    counts, more = _masks([label for label, _ in wanted], frame, size, uri)
    painted = rle.paint(counts, [category + 1 for _, category in wanted], *size, np.uint8)
    return Found(size, semantic=np.where(painted, painted - 1, np.uint8(background)), issues=(*issues, *more))


@functools.cache
def _ids(classes: ClassTable) -> dict[str, int]:
    return {c.name: c.label_id for c in classes.classes}


def _wanted(
    frame: Frame, category_of: Callable[[str], int | None], silent: Collection[str], uri: str
) -> tuple[list[tuple[Label, int]], list[Issue]]:
    """The labels that have a shape and a category, and an issue for each other category that is not ``silent``."""
    wanted, issues = [], []
    for label in frame.labels or ():
        if label.rle is None and label.poly2d is None:
            continue
        name = label.category or ""
        category = category_of(name)
        if category is not None:
            wanted.append((label, category))
        elif name not in silent:
            note = f"label {label.id} of {frame.name} in {uri} has the unknown category {name!r} and was left out"
            issues.append(Issue("unknown-category", note))
    return wanted, issues


def _size(frame: Frame, size: tuple[int, int] | None, uri: str) -> tuple[int, int]:
    """Height and width: the photo's, else what the labels say, else that of all of BDD100K."""
    said = list(dict.fromkeys(label.rle.size for label in frame.labels or () if label.rle is not None))
    if size is None and not said and frame.size is not None:
        said = [(frame.size.height, frame.size.width)]
    expected = size or (said[0] if said else SIZE)
    if min(expected) < 1 or expected[0] * expected[1] > _MOST_PIXELS:
        problem = f"{frame.name} in {uri} says that it is {expected[1]} x {expected[0]}"
        raise DataError(problem, "correct the label file", "bad-annotation", uri)
    for height, width in said:
        if (height, width) != expected:
            other = f"the photo is {expected[1]} x {expected[0]}" if size else f"others {expected[1]} x {expected[0]}"
            problem = f"a label of {frame.name} in {uri} is {width} x {height}, {other}"
            raise DataError(problem, "make the labels on the photo's own grid", "size-mismatch", uri)
    return expected


def _masks(labels: Sequence[Label], frame: Frame, size: tuple[int, int], uri: str) -> tuple[list[bytes], list[Issue]]:
    """The mask of every label, whole, as COCO counts."""
    from segbatch.codecs import rle

    masks, issues = [], []
    for label in labels:
        where = f"label {label.id} of {frame.name} in {uri}"
        if label.rle is not None:
            masks.append(_checked(label.rle, size, where, uri))
        else:
            mask = np.zeros(size, np.uint8)
            issues += [issue for poly in label.poly2d or () for issue in _draw(poly, mask, where)]
            masks.append(rle.encode(mask))
    return masks, issues


def _checked(found: Rle, size: tuple[int, int], where: str, uri: str) -> bytes:
    from segbatch.codecs import rle

    try:
        counts = found.counts.encode() if isinstance(found.counts, str) else rle.from_uncompressed(found.counts)
        rle.check(counts, *size)
    except ValueError as error:
        raise DataError(f"the rle of {where}: {error}", "correct the label file", "bad-annotation", uri) from error
    return counts


def _draw(poly: Poly2d, mask: NDArray[np.uint8], where: str) -> list[Issue]:
    """Draw a polygon; gives what is wrong with it."""
    try:
        points = polygons.points_of(poly.vertices, poly.types)
    except ValueError as error:
        return [Issue("bad-polygon", f"a polygon of {where} was left out: {error}")]
    polygons.fill(points, mask)
    height, width = mask.shape
    if (points >= 0).all() and (points <= (width, height)).all():
        return []
    return [Issue("outside-image", f"a polygon of {where} goes beyond the image and was clipped")]


def _own_ids(labels: Sequence[Label]) -> list[int] | None:
    """The labels' ids where they can be those of a bitmask."""
    texts = [str(label.id) for label in labels]
    if len(set(texts)) < len(texts) or any(label.rle is None for label in labels):
        return None
    if not all(_NUMBER.fullmatch(text) and int(text) <= MOST_OBJECTS for text in texts):
        return None
    return [int(text) for text in texts]


def _uncovered(masks: Sequence[bytes], ids: Sequence[int], size: tuple[int, int]) -> dict[int, bytes]:
    """What is to be seen of each id when the masks are painted one after the other."""
    from segbatch.codecs import rle

    shown = rle.instances_of(rle.paint(masks, ids, *size, np.uint16), background=(0,))
    return dict(zip(shown.ids.tolist(), shown.counts, strict=True))


def _flags(label: Label) -> int:
    return flags_of(label.attributes) | (FLAGS["ignored"] if label.category in _IGNORED_NAMES else 0)


def _instance(i: int, label: Label, category: int, mask: bytes, size: tuple[int, int]) -> Instance:
    from segbatch.codecs import rle

    crowd = bool(_flags(label) & FLAGS["crowd"])
    return Instance(i, category, rle.bbox(mask, *size), float(rle.area(mask)), crowd, mask, label.score)


def _extra(i: int, label: Label) -> dict[str, Any]:
    own_id = {} if str(label.id) == str(i) else {"scalabel_id": label.id}
    return {**spelled_out(_flags(label)), **own_id}


def _no_pixels(what: str, i: int, frame: Frame, uri: str) -> Issue:
    return Issue("zero-area", f"{what} {i} of {frame.name} in {uri} shows no pixel", i)
