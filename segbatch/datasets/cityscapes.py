"""Cityscapes: semantic, instance and panoptic labels of street scenes.

Source: github.com/mcordts/cityscapesScripts, version 2.3.0: README.md (folders, file names, splits),
``preparation/json2instanceImg.py`` (what the values of instanceIds mean), ``preparation/createPanopticImgs.py``
(panoptic labels). M. Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import annotation_json, reading, tables
from segbatch.datasets.annotation_json import PanopticSegment
from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, Instance, Issue, PlanItem, Sample, Segment, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo
    from segbatch.codecs.rle import Segments

CLASSES = tables.load("cityscapes")
THINGS = frozenset(c.label_id for c in CLASSES.classes if c.isthing)
FIRST_INSTANCE = 1000
"""Values of instanceIds below it are label ids; the others are 1000 * label id + number of the object."""

FROM_INSTANCE_IDS = "from-instance-ids"
"""Code of the issue of a good row whose label map follows from its instance map, because there is no other."""
FROM_TRAIN_IDS = "from-train-ids"
"""Code of the issue of a good row whose label map was made of trainIds; all void classes became 0 there."""

_SPLITS = ("train", "val", "test", "train_extra", "demoVideo")
_UNLABELLED = ("test", "demoVideo")
_PHOTOS, _PHOTO = "leftImg8bit", "_leftImg8bit.png"
_FINE, _COARSE = "gtFine", "gtCoarse"
_MAPS = {"labelIds.png": "labels", "instanceIds.png": "instances", "labelTrainIds.png": "train_ids"}
_EXTRAS = {  # attribute: folder, ending
    "vehicle": ("vehicle", "_vehicle.json"),
    "camera": ("camera", "_camera.json"),
    "timestamp": ("timestamp_sequence", "_timestamp.txt"),
}
_IMAGE_ID = re.compile(r"(?P<city>.+)_(?P<seq>\d+)_(?P<frame>\d+)")
_TRAIN_VOID = 255
_IDS = 1 << 16  # that a 16-bit PNG can hold

_KNOWN = reading.known_ids(CLASSES)
_IGNORED = frozenset(CLASSES.ignore_ids)

Files = dict[str, ObjectInfo]


class Cityscapes(Dataset):
    """``leftImg8bit/SPLIT/CITY/CITY_SEQ_FRAME_leftImg8bit.png`` with ``gtFine/`` or ``gtCoarse/`` beside it.

    A label map is labelIds; where there is none it follows from instanceIds, else from labelTrainIds (and an issue
    says so). Fine labels go before coarse ones. Instances are the values >= 1000 of instanceIds; a smaller value of a
    class with instances is a group: one instance with ``iscrowd``. Panoptic labels are read where
    ``gtFine/cityscapes_panoptic_SPLIT.json`` lists them, else derived as the official script does.

    Images of test and demoVideo may lack labels; the labels that are published for test show only ego vehicle,
    rectification border and out of roi, which are void. Vehicle, camera and timestamp files become attributes.
    """

    name: ClassVar[str] = "cityscapes"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic", "instance", "panoptic")
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS
    formats: ClassVar[tuple[str, ...]] = ("cityscapes", "cityscapes-instances", "cityscapes-panoptic")
    grouped: ClassVar[bool] = True

    def recognises(self, tree: Tree) -> bool:
        """Whether there are photos of a split, and ``gtFine/`` or ``gtCoarse/``."""
        return bool(self.splits(tree)) and any(tree.is_folder(kind) for kind in (_FINE, _COARSE))

    def classes(self, tree: Tree) -> ClassTable:
        """The official ids 0..33."""
        return CLASSES

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """The official splits that have a folder of photos."""
        return tuple(s for s in _SPLITS if tree.is_folder(f"{_PHOTOS}/{s}"))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Images by city, sequence and frame; ``group_id`` is CITY_SEQ.

        Labels whose photo is missing stay items, and so does a second photo of the same name. A split is held in
        memory (about 2 kB an image).

        Raises:
            ConfigError: no Cityscapes root, no such split, a panoptic file that cannot be read.
        """
        there = self.splits(tree)
        if not there:
            expected = "leftImg8bit/train/CITY/CITY_SEQ_FRAME_leftImg8bit.png and gtFine/ beside leftImg8bit/"
            raise ConfigError(f"{tree.source} is not Cityscapes", f"expected {expected}")
        seen: dict[str, str] = {}
        for split in reading.choose_splits(self.name, tree.source, there, splits):
            yield from _split_items(tree, split, seen)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its labels.

        Raises:
            DataError: a missing or broken file, a map of another size or with an id that no class has, a second photo
                of the same name, a panoptic annotation that does not fit its PNG.
        """
        detail = reading.detail_of(item)
        if "same_as" in detail:
            problem = f"{item.uri} has the same image id as {detail['same_as']}"
            raise DataError(problem, "remove one of them", "duplicate-id", item.uri)
        data, info = reading.read_photo(item.uri)
        attributes, complaints = _attributes(item.sample_id, detail)
        labels = _labels(item, detail, info)
        yield replace(
            reading.sample_of(item, data, info),
            semantic=labels.semantic,
            instances=labels.instances,
            panoptic=labels.panoptic,
            segments=labels.segments,
            attributes=attributes,
            issues=(*labels.issues, *complaints),
        )


@dataclass(frozen=True, slots=True)
class _Labels:
    semantic: NDArray[Any] | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: NDArray[Any] | None = None
    segments: tuple[Segment, ...] | None = None
    issues: tuple[Issue, ...] = ()


@dataclass(frozen=True, slots=True)
class _Split:
    """What is listed for a split, by image id: its label files (by what they are), and the other files."""

    kind: dict[str, str]
    labels: dict[str, Files]
    extras: dict[str, Files]
    panoptic: dict[str, dict[str, Any]]
    panoptic_tag: dict[str, str]


def _split_items(tree: Tree, split: str, seen: dict[str, str]) -> Iterator[PlanItem]:
    """The items of a split; ``seen``: photos by the image ids that had their turn."""
    photos: dict[str, list[tuple[str, ObjectInfo | None]]] = {}
    for path, info in tree.files(f"{_PHOTOS}/{split}", (".png",)):
        if path.endswith(_PHOTO):
            photos.setdefault(_file_name(path).removesuffix(_PHOTO), []).append((path, info))
    listed = _listed(tree, split)
    for image_id in sorted({*photos, *listed.labels, *listed.panoptic}, key=_place):
        absent = [(f"{_city(image_id)}/{image_id}{_PHOTO}", None)]
        for path, photo in photos.get(image_id, absent):
            uri = photo.uri if photo else tree.uri(f"{_PHOTOS}/{split}/{path}")
            if image_id in seen:
                yield _copy(f"{split}/{path}", uri, photo, seen[image_id], (_group(image_id), split))
            else:
                seen[image_id] = uri
                yield _item(tree, split, image_id, (uri, photo), listed)


def _copy(name: str, uri: str, photo: ObjectInfo | None, first: str, place: tuple[str, str]) -> PlanItem:
    """The item of an image id that had its turn: ``read`` refuses it."""
    size = photo.size if photo else 0
    return PlanItem(name, uri, reading.joint_etag(photo), size, 1, 0, json.dumps({"same_as": first}), *place)


def _listed(tree: Tree, split: str) -> _Split:
    kind: dict[str, str] = {}
    labels: dict[str, Files] = {}
    for name in (_COARSE, _FINE):  # fine ones replace coarse ones
        found = _by_image(tree, f"{name}/{split}", {f"_{name}_{ending}": key for ending, key in _MAPS.items()})
        labels |= found
        kind |= dict.fromkeys(found, name)
    extras: dict[str, Files] = {}
    for attribute, (folder, ending) in _EXTRAS.items():
        for image_id, files in _by_image(tree, f"{folder}/{split}", {ending: attribute}).items():
            extras.setdefault(image_id, {}).update(files)
    return _Split(kind, labels, extras, *_panoptic_files(tree, split))


def _by_image(tree: Tree, folder: str, endings: Mapping[str, str]) -> dict[str, Files]:
    """Files of a folder by image id and by what their ending says."""
    found: dict[str, Files] = {}
    for path, info in tree.files(folder):
        name = _file_name(path)
        for ending, key in endings.items():
            if name.endswith(ending):
                found.setdefault(name.removesuffix(ending), {})[key] = info
    return found


def _panoptic_files(tree: Tree, split: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """By image id: what ``read`` needs of the panoptic labels, and their tag."""
    name = f"{_FINE}/cityscapes_panoptic_{split}"
    info = tree.stat(f"{name}.json")
    if info is None:
        return {}, {}
    document = annotation_json.split_coco(storage.read_bytes(info.uri), info.uri)
    pngs = dict(tree.files(name, (".png",), recursive=False))
    parts, tags = {}, {}
    for image_id, raws in document.annotations.items():
        file = f"{image_id}_{_FINE}_panoptic.png"
        png = pngs.get(file)
        parts[str(image_id)] = {
            "file": info.uri,
            "png": png.uri if png else tree.uri(f"{name}/{file}"),
            "annotations": annotation_json.annotations_text(raws),
        }
        tags[str(image_id)] = f"{reading.joint_etag(png)}+{annotation_json.digest(raws)}"
    return parts, tags


def _item(tree: Tree, split: str, image_id: str, photo: tuple[str, ObjectInfo | None], listed: _Split) -> PlanItem:
    labels, extras = listed.labels.get(image_id, {}), listed.extras.get(image_id, {})
    kind = listed.kind.get(image_id, _COARSE if split == "train_extra" else _FINE)
    detail: dict[str, Any] = {"kind": kind, **{key: info.uri for key, info in labels.items()}}
    files: list[ObjectInfo | None] = [photo[1], *labels.values(), *extras.values()]
    if extras:
        detail["extras"] = {key: info.uri for key, info in extras.items()}
    if image_id in listed.panoptic:
        detail["panoptic"] = listed.panoptic[image_id]
    elif not labels and split not in _UNLABELLED:
        detail["labels"] = tree.uri(f"{kind}/{split}/{_city(image_id)}/{image_id}_{kind}_labelIds.png")
        files.append(None)
    elif listed.panoptic and kind == _FINE:
        detail["not_in"] = f"cityscapes_panoptic_{split}.json"
    return PlanItem(
        sample_id=image_id,
        uri=photo[0],
        etag="+".join(filter(None, (reading.joint_etag(*files), listed.panoptic_tag.get(image_id)))),
        bytes=sum(i.size for i in files if i),
        detail=json.dumps(detail),
        group_id=_group(image_id),
        split=split,
    )


def _file_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _city(image_id: str) -> str:
    return image_id.rsplit("_", 2)[0]


def _group(image_id: str) -> str:
    return image_id.rsplit("_", 1)[0]


def _place(image_id: str) -> tuple[str, str]:
    """The sort key that keeps the frames of a sequence together."""
    group, _, frame = image_id.rpartition("_")
    return group, frame


def _attributes(image_id: str, detail: Mapping[str, Any]) -> tuple[dict[str, Any], list[Issue]]:
    """City, sequence, frame, which labels these are, and what the vehicle, camera and timestamp files say."""
    found = _IMAGE_ID.fullmatch(image_id)
    attributes: dict[str, Any] = found.groupdict() if found else {}
    if {*_MAPS.values()} & detail.keys():
        attributes["annotation"] = detail["kind"]
    complaints = []
    for name, uri in detail.get("extras", {}).items():
        try:
            attributes[name] = json.loads(storage.read_bytes(uri))
        except (ValueError, RecursionError, ObjectMissing) as error:
            complaints.append(Issue("bad-attribute", f"{uri} cannot be read and was left out: {error}"))
    return attributes, complaints


def _labels(item: PlanItem, detail: Mapping[str, Any], info: "PhotoInfo") -> _Labels:
    semantic, ids, issues = _maps(item, detail, info)
    found = _Labels(semantic, issues=issues)
    if ids is not None:
        from segbatch.codecs import rle

        objects = rle.instances_of(ids)
        instances, more = instances_of(objects, label_of, lambda i: i < FIRST_INSTANCE, str(detail["instances"]))
        panoptic, segments = _derived_panoptic(ids, objects)
        found = _Labels(semantic, instances, panoptic, segments, (*issues, *more))
    if "panoptic" in detail:
        panoptic, segments, more = _official_panoptic(item, detail["panoptic"], info)
        return replace(found, panoptic=panoptic, segments=segments, issues=(*found.issues, *more))
    if "not_in" in detail and ids is not None:
        note = f"{detail['not_in']} lists no segments of {item.sample_id}; they were derived from its instanceIds"
        return replace(found, issues=(*found.issues, Issue("panoptic-not-listed", note)))
    return found


def _maps(
    item: PlanItem, detail: Mapping[str, Any], info: "PhotoInfo"
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, tuple[Issue, ...]]:
    """The label map, the map of instanceIds, and what there is to say about them; None where there is none."""
    ids = None
    if "instances" in detail:
        ids = _read_map(str(detail["instances"]), "*_instanceIds.png", item, info)
        reading.check_ids(ids, _known_instance_ids(), str(detail["instances"]))
    if "labels" in detail:
        semantic = _label_ids(str(detail["labels"]), item, info)
        return semantic, ids, () if ids is None else _disagreement(semantic, _labels_by_id()[ids], detail)
    if ids is not None:
        note = f"{item.sample_id} has no labelIds: its label map follows from {detail['instances']}"
        return _labels_by_id()[ids], ids, (Issue(FROM_INSTANCE_IDS, note),)
    if "train_ids" in detail:
        uri = str(detail["train_ids"])
        note = f"{item.sample_id} has no labelIds: its label map was made of {uri}, which tells no void classes apart"
        return (
            _from_train_ids(_read_map(uri, "*_labelTrainIds.png", item, info), uri),
            None,
            (Issue(FROM_TRAIN_IDS, note),),
        )
    return None, None, ()


def _read_map(uri: str, wanted: str, item: PlanItem, info: "PhotoInfo") -> NDArray[Any]:
    found = reading.read_label(uri)
    if found.ndim != 2:
        raise DataError(f"label map {uri} is in colour", f"give the grey {wanted}", "label-type", uri)
    reading.check_size(found, info, uri, item.uri)
    return found


def _label_ids(uri: str, item: PlanItem, info: "PhotoInfo") -> NDArray[Any]:
    found = _read_map(uri, "*_labelIds.png", item, info)
    refuse_train_ids(found, uri)
    reading.check_ids(found, _KNOWN, uri)
    return found


def refuse_train_ids(label: NDArray[Any], uri: str) -> None:
    """Refuse a map that shows the void of trainIds, 255, which is no label id.

    Raises:
        DataError: ``unknown-label``, with the fix.
    """
    if label.max(initial=0) == _TRAIN_VOID:
        fix = "give label ids as in labels.py: the column id, not trainId"
        raise DataError(f"label map {uri} has the id 255: these are trainIds", fix, "unknown-label", uri)


def _from_train_ids(label: NDArray[Any], uri: str) -> NDArray[np.uint8]:
    by_train_id = {c.train_id: c.label_id for c in CLASSES.classes if c.train_id is not None}
    known = np.zeros(_IDS, np.bool_)
    known[[*by_train_id, _TRAIN_VOID]] = True
    reading.check_ids(label, known, uri)
    table = np.zeros(_IDS, np.uint8)
    table[list(by_train_id)] = list(by_train_id.values())
    found: NDArray[np.uint8] = table[label]
    return found


def _disagreement(semantic: NDArray[Any], expected: NDArray[np.uint16], detail: Mapping[str, Any]) -> tuple[Issue, ...]:
    pixels = int((semantic != expected).sum())
    if not pixels:
        return ()
    note = f"{detail['labels']} and {detail['instances']} say different classes at {pixels} pixels"
    return (Issue("labels-disagree", note),)


def label_of(instance_id: int) -> int:
    """The label id that a value of instanceIds stands for."""
    return instance_id if instance_id < FIRST_INSTANCE else instance_id // FIRST_INSTANCE


@cache
def _labels_by_id() -> NDArray[np.uint16]:
    """``label_of`` of every 16-bit value."""
    values = np.arange(_IDS, dtype=np.uint16)
    return np.where(values < FIRST_INSTANCE, values, values // FIRST_INSTANCE)


@cache
def _known_instance_ids() -> NDArray[np.bool_]:
    return _KNOWN[_labels_by_id()]


def instances_of(
    objects: "Segments", category_of: Callable[[int], int], is_group: Callable[[int], bool], uri: str
) -> tuple[tuple[Instance, ...], tuple[Issue, ...]]:
    """The instances among the objects of a map of instance ids, by ascending id, and what is wrong with the others.

    Args:
        objects: of the map.
        category_of: label id of an instance id; those of ``THINGS`` are instances.
        is_group: whether an instance id stands for several objects that were not told apart.
        uri: of the map, for messages.
    """
    instances, issues = [], []
    for i, area, box, counts in zip(*(o.tolist() for o in objects[:3]), objects.counts, strict=True):
        category = category_of(i)
        if category in THINGS:
            instances.append(Instance(i, category, tuple(box), float(area), is_group(i), counts))
        elif not is_group(i):
            note = f"{uri} numbers the object {i} of the class {CLASSES.name_of(category)}, which has no instances"
            issues.append(Issue("not-a-thing", note, i))
    return tuple(instances), tuple(issues)


def _derived_panoptic(ids: NDArray[Any], objects: "Segments") -> tuple[NDArray[Any], tuple[Segment, ...]]:
    """As createPanopticImgs: a segment per value, groups are crowds, ignored classes are void."""
    index = np.zeros(_IDS, np.min_scalar_type(len(objects.ids)))
    segments: list[Segment] = []
    for i, area, box in zip(*(o.tolist() for o in objects[:3]), strict=True):
        category = label_of(i)
        if category not in _IGNORED:
            segments.append(Segment(i, category, float(area), tuple(box), i < FIRST_INSTANCE and category in THINGS))
            index[i] = len(segments)
    return index[ids], tuple(segments)


def _official_panoptic(
    item: PlanItem, part: Mapping[str, Any], info: "PhotoInfo"
) -> tuple[NDArray[Any], tuple[Segment, ...], tuple[Issue, ...]]:
    uri, file = str(part["png"]), str(part["file"])
    annotations = annotation_json.decode_panoptic_annotations(str(part["annotations"]), file)
    if len(annotations) != 1:
        problem = f"{file} has {len(annotations)} annotations of {item.sample_id}"
        raise DataError(problem, "keep one of them", "bad-annotation", file)
    png = reading.read_label(uri)
    if png.ndim != 3:
        fix = "make it with createPanopticImgs: R + 256 G + 65536 B is the segment id"
        raise DataError(f"panoptic map {uri} is not RGB", fix, "label-type", uri)
    reading.check_size(png, info, uri, item.uri)
    ids = segment_ids(png)
    segments, issues = [], []
    for found in annotations[0].segments_info:
        if found.category_id >= _IDS or found.category_id < 0 or not _KNOWN[found.category_id]:
            note = f"the segment {found.id} of {item.sample_id} in {file} has the unknown category {found.category_id}"
            issues.append(Issue("unknown-category", f"{note}; it became void", found.id))
            ids[ids == found.id] = 0
        else:
            segments.append(_segment(found, item.sample_id, file))
    index, kept, empty = reading.panoptic_of(ids, segments, uri)
    return index, kept, (*issues, *empty)


def segment_ids(png: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The segment ids of a panoptic PNG: R + 256 G + 65536 B of uint8 pixels (height, width, 3)."""
    red, green, blue = (png[..., i].astype(np.uint32) for i in range(3))
    ids: NDArray[np.uint32] = red | (green << np.uint32(8)) | (blue << np.uint32(16))
    return ids


def _segment(found: PanopticSegment, image_id: str, uri: str) -> Segment:
    if found.area is None or found.bbox is None:
        problem = f"the segment {found.id} of {image_id} in {uri} has no area or bbox"
        raise DataError(problem, "make the file with createPanopticImgs", "bad-annotation", uri)
    return Segment(found.id, found.category_id, found.area, found.bbox, bool(found.iscrowd))
