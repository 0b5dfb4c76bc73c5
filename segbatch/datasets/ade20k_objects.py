"""Label maps and objects of the full ADE20K, as its two releases encode and describe them.

Source: groups.csail.mit.edu/vision/datasets/ADE20K ("Description", ``loadAde20K.m``) for 2016/17;
github.com/CSAILVision/ADE20K, ``README.md`` and ``utils/utils_ade20k.py``, for 2021.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading
from segbatch.errors import DataError, ObjectMissing
from segbatch.records import Instance, Issue

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

OBJECTS = 0
"""Part level of whole objects."""

HIDDEN = 128
"""Value of an instance's mask where another object hides it; 0 is outside, anything else (255) is visible."""

_COLUMNS = 6


@dataclass
class Found:
    """Instances of an image, its attributes, and issues.

    Attributes:
        attributes: of the image; ``instances`` holds those of the instances by their id as text.
    """

    instances: list[Instance] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=lambda: {"instances": {}})
    issues: list[Issue] = field(default_factory=list)

    def add(self, instance: Instance, attributes: Mapping[str, Any]) -> None:
        """Add an instance and what is known of it."""
        self.instances.append(instance)
        self.attributes["instances"][str(instance.id)] = dict(attributes)

    def say(self, code: str, message: str, instance_id: int | None = None) -> None:
        """Add an issue."""
        self.issues.append(Issue(code, message, instance_id))


def read_rgb(uri: str) -> NDArray[np.uint8]:
    """A map of classes and instances, uint8 of shape (height, width, 3).

    Raises:
        DataError: as ``reading.read_label``; ``label-type`` where it is not RGB.
    """
    found = reading.read_label(uri)
    if found.ndim != 3:
        raise DataError(f"label map {uri} is not in colour", "restore the RGB file of the release", "label-type", uri)
    return found


def class_codes(rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The classes of such a map, R // 10 * 256 + G: uint16 of shape (height, width), 0 where nothing is labelled."""
    return (rgb[..., 0] // 10).astype(np.uint16) * 256 + rgb[..., 1]


def codes_by_number(rgb: NDArray[np.uint8]) -> dict[int, int]:
    """Class by the number of the object in such a map: the rank, from 1, of its value of B above 0."""
    table, _ = _codes_by_value(rgb[..., 2], class_codes(rgb))
    values = np.unique(rgb[..., 2])
    return {number: int(table[value]) for number, value in enumerate(values[values > 0], 1)}


def _codes_by_value(blue: NDArray[np.uint8], codes: NDArray[np.uint16]) -> tuple[NDArray[np.uint16], list[int]]:
    """The class of most pixels by value of B, uint16 of shape (256,), and the values above 0 with several classes."""
    table = np.zeros(256, np.uint16)
    table[blue] = codes
    mixed = np.unique(blue[table[blue] != codes])
    for value in mixed:
        found, counts = np.unique(codes[blue == value], return_counts=True)
        table[value] = found[counts.argmax()]
    return table, mixed[mixed > 0].tolist()


# 2016/17: X_atr.txt and the channel B


def parse_lines(data: bytes, uri: str) -> tuple[dict[tuple[int, int], dict[str, Any]], list[Issue]]:
    """What ``X_atr.txt`` says, by (part level, number) of the object; broken and doubled lines are issues."""
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    issues = []
    for row, text in enumerate(_text(data).splitlines(), 1):
        columns = [c.strip() for c in text.split("#")]
        if columns == [""]:
            continue
        try:
            number, level, occluded = (int(c) for c in columns[:3])
            name, raw_name, attributes = columns[3:_COLUMNS]
        except ValueError:
            wanted = "number # level # occluded # name # raw name # attributes"
            issues.append(Issue("bad-annotation", f"line {row} of {uri} is {text!r}, not {wanted}; left out"))
            continue
        if (level, number) in lines:
            note = f"line {row} of {uri} is object {number} of level {level} again; left out"
            issues.append(Issue("duplicate-id", note))
            continue
        lines[level, number] = {
            "name": name,
            "raw_name": raw_name,
            "occluded": bool(occluded),
            "attributes": [a.strip() for a in attributes.strip('"').split(",") if a.strip()],
        }
    return lines, issues


def _text(data: bytes) -> str:
    """UTF-8, else Latin-1: some names have accents."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def encoded_objects(levels: Mapping[int, NDArray[np.uint8]], atr: str) -> Found:
    """Instances from B of every level, with what ``X_atr.txt`` says of them.

    Args:
        levels: by part level, the map of ``read_rgb``.
        atr: address of ``X_atr.txt``, or empty.
    """
    found = Found()
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    if atr:
        lines, found.issues = parse_lines(_read(atr), atr)
    before = 0
    for level in sorted({*levels, *(level for level, _ in lines)}):
        listed = {number: line for (at, number), line in lines.items() if at == level}
        numbers = _add_level(found, levels[level], level, listed, before) if level in levels else 0
        for number in sorted(n for n in listed if not 1 <= n <= numbers):
            note = f"object {number} of level {level} in {atr} has no pixels; left out"
            found.say("empty-instance", note, before + number)
        before += max([numbers, *listed])
    return found


def _add_level(
    found: Found, rgb: NDArray[np.uint8], level: int, listed: Mapping[int, Mapping[str, Any]], before: int
) -> int:
    """Add the instances of a level, the first with the id ``before`` + 1; gives how many there are."""
    from segbatch.codecs import rle

    blue = np.ascontiguousarray(rgb[..., 2])
    table, mixed = _codes_by_value(blue, class_codes(rgb))
    segments = rle.instances_of(blue, background=(0,))
    for i, value in enumerate(segments.ids.tolist()):
        number, code = i + 1, int(table[value])
        instance_id, where = before + number, f"object {number} of level {level}"
        if not code:
            found.say("no-class", f"{where} has the class 0; left out", instance_id)
            continue
        if value in mixed:
            found.say("mixed-classes", f"{where} has several classes; that of most pixels counts", instance_id)
        if listed and number not in listed:
            found.say("unlisted-instance", f"{where} is not in _atr.txt", instance_id)
        left, top, width, height = (float(v) for v in segments.boxes_xywh[i])
        area = float(segments.areas[i])
        instance = Instance(instance_id, code, (left, top, width, height), area, False, segments.counts[i])
        found.add(instance, {"part_level": level, "number": number, **listed.get(number, {})})
    return len(segments.ids)


# 2021: X.json and X/instance_*.png


def parse_annotation(data: bytes, uri: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``annotation`` of an ``X.json``, and its objects.

    Raises:
        DataError: ``bad-annotation``.
    """
    try:
        found = json.loads(_text(data), parse_constant=_refuse_constant)["annotation"]
        objects = _as_list(found.get("object", []))
        if all(isinstance(entry, dict) for entry in objects):
            return found, objects
        problem = "an object is no JSON object"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DataError(f"{uri} is no annotation of ADE20K: {problem}", "restore the file", "bad-annotation", uri)


def whole_number(value: Any) -> int | None:
    """A whole number, or a text of one; None for anything else."""
    try:
        return int(value)
    except (ValueError, TypeError, OverflowError):
        return None


def described_objects(uri: str, masks: str, photo_uri: str, info: "PhotoInfo") -> Found:
    """Instances from ``X.json`` and their masks; what is wrong with one of them is an issue.

    Args:
        uri: of the JSON file.
        masks: the folder of the masks, or empty.
        photo_uri: of the photo, whose grid the masks have to have.
        info: of the photo.

    Raises:
        DataError: ``missing-label``, ``bad-annotation``; ``size-mismatch`` of the annotation or of a mask.
    """
    annotation, objects = parse_annotation(_read(uri), uri)
    size = _as_list(annotation.get("imsize", []))[:2]
    if size and size != [info.height, info.width]:
        problem = f"{uri} is of an image of height and width {size}, {photo_uri} is {info.width} x {info.height}"
        raise DataError(problem, "put the right annotation there", "size-mismatch", uri)
    found = Found()
    found.attributes["scene"] = "/".join(str(s) for s in _as_list(annotation.get("scene", [])))
    if isinstance(annotation.get("source"), dict):
        found.attributes["source"] = {str(k): str(v) for k, v in annotation["source"].items()}
    if objects and not masks:
        note = f"{uri} lists {len(objects)} objects, but the folder of their masks is missing; all left out"
        found.say("missing-mask", note)
        return found
    for number, (entry, instance_id) in enumerate(zip(objects, _instance_ids(objects, uri, found), strict=True)):
        where = f"object {number} of {uri}"
        try:
            code, attributes = int(entry["name_ndx"]), _attributes_of(entry)
            mask_uri = storage.join(masks, str(entry["instance_mask"]).rsplit("/", 1)[-1])
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            found.say("bad-annotation", f"{where} is left out: {type(error).__name__}: {error}", instance_id)
            continue
        mask = _mask(found, mask_uri, where, instance_id) if code > 0 else None
        if code <= 0:
            found.say("unknown-category", f"{where} has the class {code}; left out", instance_id)
        if mask is not None:
            reading.check_size(mask, info, mask_uri, photo_uri)
            _add_object(found, instance_id, code, mask, attributes, where)
    return found


def _instance_ids(objects: Sequence[Mapping[str, Any]], uri: str, found: Found) -> list[int]:
    """1 + ``id`` of every object; one that is missing or was there before becomes the next free one, which is said."""
    given = [whole_number(entry.get("id")) for entry in objects]
    free = itertools.count(max([-1, *(i for i in given if i is not None)]) + 2)
    ids: list[int] = []
    taken: set[int] = set()
    for number, official in enumerate(given):
        instance_id = -1 if official is None else official + 1
        if instance_id < 1 or instance_id in taken:
            instance_id = next(free)
            note = f"object {number} of {uri} has no id of its own; it becomes instance {instance_id}"
            found.say("duplicate-id", note, instance_id)
        taken.add(instance_id)
        ids.append(instance_id)
    return ids


def _attributes_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an object beside its class and mask."""
    parts, polygon = entry["parts"], entry.get("polygon") or {}
    above = [int(i) + 1 for i in _as_list(parts.get("ispartof", []))]
    return {
        "name": str(entry.get("name", "")),
        "raw_name": str(entry.get("raw_name", "")),
        "part_level": int(parts["part_level"]),
        "ispartof": above[0] if above else None,
        "hasparts": [int(i) + 1 for i in _as_list(parts.get("hasparts", []))],
        "occluded": {"yes": True, "no": False}.get(str(entry.get("occluded"))),
        "crop": bool(int(entry.get("crop", 0))),
        "attributes": [str(a) for a in _as_list(entry.get("attributes", []))],
        "depth_ordering_rank": whole_number(entry.get("depth_ordering_rank")),
        "polygon": {axis: _coordinates(polygon.get(axis, [])) for axis in ("x", "y")},
    }


def _coordinates(values: Any) -> list[float]:
    found = [float(v) for v in _as_list(values)]
    if not all(map(math.isfinite, found)):
        raise ValueError("a coordinate is not finite")
    return found


def _mask(found: Found, uri: str, where: str, instance_id: int) -> NDArray[Any] | None:
    """The mask of an object, integers of shape (height, width); None where it cannot be read, which is said."""
    try:
        mask = reading.read_label(uri)
    except DataError as error:
        code = "missing-mask" if error.code == "missing-label" else error.code
        found.say(code, f"{where} is left out: {error.problem}", instance_id)
        return None
    return mask.max(axis=2) if mask.ndim == 3 else mask


def _add_object(
    found: Found, instance_id: int, code: int, mask: NDArray[Any], attributes: dict[str, Any], where: str
) -> None:
    from segbatch.codecs import rle

    counts = rle.encode((mask != 0) & (mask != HIDDEN))
    if (mask == HIDDEN).any():
        attributes["amodal"] = rle.encode(mask != 0).decode("ascii")
    area = float(rle.area(counts))
    if not area:
        found.say("empty-instance", f"{where} has no visible pixel", instance_id)
    found.add(Instance(instance_id, code, rle.bbox(counts, *mask.shape), area, False, counts), attributes)


def _as_list(value: Any) -> list[Any]:
    """MATLAB wrote lists of one element as that element."""
    return value if isinstance(value, list) else [value]


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except ObjectMissing as error:
        raise DataError(f"annotation {uri} is not there", "run again", "missing-label", uri) from error
