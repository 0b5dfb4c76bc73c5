"""PASCAL VOC segmentation: 20 classes of objects and background, class and object maps (VOC2007 to VOC2012).

Source: host.robots.ox.ac.uk/pascal/VOC/voc2012, ``VOCtrainval_11-May-2012.tar``; ``devkit_doc.pdf`` of the development
kit (2.2 image sets, 2.5 annotation, 2.6 segmentation ground truth), ``VOCcode/VOCinit.m``, ``VOCcode/VOCevalseg.m``,
``VOCcode/VOClabelcolormap.m``. M. Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import pairing, reading, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, Instance, Issue, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from segbatch.codecs.photo import PhotoInfo

CLASSES = tables.load("pascal-voc")
VOID = 255
"""Value of both maps for borders and for what is too hard to tell."""

PHOTOS = "JPEGImages"

_CLASS_MAPS, _OBJECT_MAPS, _ANNOTATIONS = "SegmentationClass", "SegmentationObject", "Annotations"
_LABELS = {_CLASS_MAPS: (".png",), _OBJECT_MAPS: (".png",), _ANNOTATIONS: (".xml",)}
_LISTS = "ImageSets/Segmentation"
_TEST = "test"
_FLAGS = ("truncated", "difficult", "occluded")

_KNOWN = reading.known_ids(CLASSES)


class PascalVoc(Dataset):
    """``VOCdevkit/VOC2012`` with ``JPEGImages``, ``SegmentationClass``, ``SegmentationObject``, ``ImageSets``.

    The root may be ``VOCdevkit``, its parent, or the folder of a year; it must hold one year. ``trainval.txt`` is the
    union of ``train.txt`` and ``val.txt``: it makes a split of images that neither of them lists. Images of test need
    no labels. The label map keeps 255, void. An instance is a value 1..254 of the object map, which stays its id; its
    class is that of most of its pixels. ``Annotations/*.xml`` are optional: the n-th object there is instance n, whose
    ``pose``, ``truncated``, ``difficult``, ``occluded`` and ``bndbox`` stand under ``attributes["instances"]``.
    Maps may also be RGB in the colours of VOC's colour map.
    """

    name: ClassVar[str] = "pascal-voc"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic", "instance")
    official_splits: ClassVar[tuple[str, ...]] = ("train", "val", "trainval", _TEST)
    formats: ClassVar[tuple[str, ...]] = ("pascal",)

    def recognises(self, tree: Tree) -> bool:
        """Whether there are photos and a list of ``ImageSets/Segmentation``."""
        root = find_root(tree)
        return root is not None and any(tree.exists(f"{root}{_LISTS}/{s}.txt") for s in self.official_splits)

    def classes(self, tree: Tree) -> ClassTable:
        """Background, the 20 classes, and void."""
        return CLASSES

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those that have a list; trainval only where it lists further images.

        Raises:
            ConfigError: as ``listed``.
        """
        root = find_root(tree)
        return () if root is None else tuple(listed(tree, f"{root}{_LISTS}", self.official_splits))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The images in the order of the lists; what is not listed is no part of the segmentation dataset.

        Raises:
            ConfigError: another layout, several years, no such split, an image that is listed twice.
        """
        if not self.recognises(tree):
            expected = f"expected {PHOTOS}/, {_CLASS_MAPS}/ and {_LISTS}/train.txt, in VOCdevkit/VOC2012 or at the root"
            raise ConfigError(f"{tree.source} is not PASCAL VOC with segmentations{years(tree)}", expected)
        root = find_root(tree) or ""
        lists = listed(tree, f"{root}{_LISTS}", self.official_splits)
        wanted = reading.choose_splits(self.name, tree.source, lists, splits)
        photos, twins = photos_of(tree, root)
        labels = {f: _stems(tree, f"{root}{f}", end) for f, end in _LABELS.items()}
        for split in wanted:
            for image_id in lists[split]:
                yield _item(tree, root, split, image_id, photos.get(image_id), labels)
                yield from (replace(t, split=split) for t in twins.get(image_id, ()))

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its maps.

        Raises:
            DataError: a missing or broken file, a map or annotation of another size, an id or colour that VOC lacks.
        """
        pairing.check(item)
        detail = reading.detail_of(item)
        data, info = reading.read_photo(item.uri)
        objects, issues = _objects(str(detail["xml"]), item.uri, info)
        sample = replace(reading.sample_of(item, data, info), issues=issues)
        if detail["class"]:
            semantic = read_map(str(detail["class"]), item.uri, info)
            reading.check_ids(semantic, _KNOWN, str(detail["class"]))
            sample = replace(sample, semantic=semantic)
            if detail["object"]:
                sample = _with_instances(sample, read_map(str(detail["object"]), item.uri, info), objects, detail)
            elif detail["objects"]:
                note = f"{item.sample_id} has no map in {_OBJECT_MAPS}/, so no instances"
                sample = replace(sample, issues=(*issues, Issue("missing-instances", note)))
        yield sample


def find_root(tree: Tree) -> str | None:
    """Path of the folder that holds ``JPEGImages``, empty or with a slash at its end; None without exactly one."""
    if tree.is_folder(PHOTOS):
        return ""
    found = _years(tree)
    return found[0] if len(found) == 1 else None


def years(tree: Tree) -> str:
    """What to say of a tree with several years; empty where there are fewer."""
    found = [f.rstrip("/").rsplit("/", 1)[-1] for f in _years(tree)]
    return f": it holds {' and '.join(found)}, give the folder of one" if len(found) > 1 else ""


def _years(tree: Tree) -> list[str]:
    found = [f"{above}{name}/" for above in ("", "VOCdevkit/") for name in tree.folders(above.rstrip("/"))]
    return [f for f in found if f.removeprefix("VOCdevkit/").startswith("VOC20") and tree.is_folder(f"{f}{PHOTOS}")]


def listed(tree: Tree, folder: str, splits: Sequence[str]) -> dict[str, list[str]]:
    """Image ids of every split that has a list, in the lists' order.

    Args:
        tree: of the dataset.
        folder: of ``train.txt``, ``val.txt``, ``trainval.txt``, ``test.txt``; only the first column of a line counts.
        splits: the lists to look for, trainval after train and val.

    Raises:
        ConfigError: an image that is listed twice (but for trainval), or a line that is no image id.
    """
    found: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for split in splits:
        if not tree.exists(f"{folder}/{split}.txt"):
            continue
        ids = list(_image_ids(tree, f"{folder}/{split}.txt"))
        if split == "trainval":
            ids = [i for i in ids if i not in seen]
        if ids or split != "trainval":
            found[split] = ids
        for image_id in ids:
            if image_id in seen:
                where = f"{tree.uri(folder)}: {image_id} is listed twice, in {seen[image_id]}.txt and {split}.txt"
                raise ConfigError(where, "remove one of the lines")
            seen[image_id] = split
    return found


def _image_ids(tree: Tree, path: str) -> Iterator[str]:
    for number, line in enumerate(tree.read_lines(path), 1):
        columns = line.split()
        if columns and ("/" in columns[0] or "\\" in columns[0] or columns[0].startswith(".")):
            problem = f"line {number} of {tree.uri(path)} is {line!r}, which is no image id"
            raise ConfigError(problem, "give file names without folder and suffix")
        if columns:
            yield columns[0]


def photos_of(tree: Tree, root: str) -> tuple[dict[str, ObjectInfo], dict[str, list[PlanItem]]]:
    """The files of ``JPEGImages`` by image id, and the items of further files of the same id."""
    photos, later = pairing.by_stem(tree.files(f"{root}{PHOTOS}", IMAGE_SUFFIXES, recursive=False))
    twins: dict[str, list[PlanItem]] = {}
    for name, info in later:
        stem = name.rsplit(".", 1)[0]
        twins.setdefault(stem, []).append(pairing.twin(name, info, photos[stem].uri))
    return photos, twins


def _stems(tree: Tree, folder: str, suffixes: tuple[str, ...]) -> dict[str, ObjectInfo]:
    return pairing.by_stem(tree.files(folder, suffixes, recursive=False))[0]


def _item(
    tree: Tree,
    root: str,
    split: str,
    image_id: str,
    photo: ObjectInfo | None,
    labels: Mapping[str, Mapping[str, ObjectInfo]],
) -> PlanItem:
    class_map, object_map, xml = (labels[folder].get(image_id) for folder in _LABELS)
    needed = [] if class_map is None and split == _TEST else [class_map]
    extras = [i for i in (object_map, xml) if i]
    expected = tree.uri(f"{root}{_CLASS_MAPS}/{image_id}.png") if needed and not class_map else ""
    detail = {
        "class": class_map.uri if class_map else expected,
        "object": object_map.uri if object_map else "",
        "objects": bool(labels[_OBJECT_MAPS]),
        "xml": xml.uri if xml else "",
    }
    return PlanItem(
        sample_id=image_id,
        uri=photo.uri if photo else tree.uri(f"{root}{PHOTOS}/{image_id}.jpg"),
        etag=reading.joint_etag(photo, *needed, *extras),
        bytes=sum(i.size for i in (photo, class_map, *extras) if i),
        detail=json.dumps(detail),
        split=split,
    )


@cache
def color_map() -> NDArray[np.uint8]:
    """VOC's 256 colours (VOClabelcolormap.m), uint8 of shape (256, 3)."""
    ids = np.arange(256)[:, None, None] >> 3 * np.arange(8)[:, None]  # 3 bits a step: one for each channel
    bits = ids >> np.arange(3) & 1
    colors: NDArray[np.uint8] = (bits << (7 - np.arange(8))[:, None]).sum(axis=1).astype(np.uint8)
    return colors


def indices(label: NDArray[Any], uri: str) -> NDArray[Any]:
    """A map's values; RGB (height, width, 3) in the colours of VOC's colour map become their indices 0..255.

    Raises:
        DataError: ``unknown-color``.
    """
    if label.ndim == 2:
        return label
    return reading.ids_of_colors(label, _colors(), uri).astype(np.uint8)


@cache
def _colors() -> reading.Colors:
    packed = color_map().astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    order = np.argsort(packed)
    return reading.Colors(packed[order], order.astype(np.uint16))


def read_map(uri: str, photo_uri: str, info: "PhotoInfo") -> NDArray[Any]:
    """A class or object map on the photo's grid, integers of shape (height, width).

    Raises:
        DataError: a missing or broken file, a colour that VOC lacks, another size.
    """
    label = reading.read_label(uri)
    reading.check_size(label, info, uri, photo_uri)
    return indices(label, uri)


def _with_instances(
    sample: Sample, id_map: NDArray[Any], objects: Mapping[int, Mapping[str, Any]], detail: Mapping[str, Any]
) -> Sample:
    assert sample.semantic is not None
    uri = str(detail["object"])
    if int(id_map.max(initial=0)) > VOID:
        raise DataError(f"{uri} has the value {int(id_map.max())}, above 255", "write 8 bits", "unknown-label", uri)
    counts = np.bincount(id_map.ravel().astype(np.int64) * 256 + sample.semantic.ravel(), minlength=1 << 16)
    counts = counts.reshape(256, 256)
    counts[:, [0, VOID]] = 0
    instances = reading.instances_of_map(
        id_map, lambda i: int(counts[i].argmax()) if 0 < i < VOID and counts[i].any() else None
    )
    known = {i.id: i for i in instances}
    issues = [*_class_issues(id_map, counts, uri), *_name_issues(known, objects, str(detail["xml"]))]
    named = {str(i): dict(objects[i]) for i in known if i in objects}
    return replace(
        sample,
        instances=instances,
        attributes={"instances": named} if named else {},
        issues=(*sample.issues, *issues),
    )


def _class_issues(id_map: NDArray[Any], counts: NDArray[np.int64], uri: str) -> Iterator[Issue]:
    """Objects whose pixels show no class, or several."""
    for i in np.flatnonzero(np.bincount(id_map.ravel(), minlength=256)[:256]).tolist():
        classes = np.flatnonzero(counts[i]).tolist()
        if 0 < i < VOID and not classes:
            yield Issue("no-class", f"object {i} of {uri} lies on background or void only; left out", i)
        elif 0 < i < VOID and len(classes) > 1:
            names = " and ".join(CLASSES.name_of(c) for c in classes)
            yield Issue("mixed-classes", f"object {i} of {uri} lies on {names}; most of its pixels count", i)


def _name_issues(known: Mapping[int, Instance], objects: Mapping[int, Mapping[str, Any]], uri: str) -> Iterator[Issue]:
    """Objects whose annotation names another class than the maps show."""
    for i, instance in known.items():
        name, said = CLASSES.name_of(instance.category_id), objects.get(i, {}).get("name", "")
        if said and said != name:
            yield Issue("class-mismatch", f"object {i} is called {said} in {uri} and is {name} in the maps", i)


def _objects(uri: str, photo_uri: str, info: "PhotoInfo") -> tuple[dict[int, dict[str, Any]], tuple[Issue, ...]]:
    """What an annotation says of its objects, by their number from 1; a broken annotation is an issue.

    Raises:
        DataError: ``size-mismatch``: it is of an image of another size.
    """
    if not uri:
        return {}, ()
    from xml.etree.ElementTree import ParseError

    try:
        annotation = _parse(storage.read_bytes(uri))
        size = tuple(int(annotation.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        objects = {n: _object(element) for n, element in enumerate(annotation.iterfind("object"), 1)}
    except (ParseError, ValueError, LookupError, ObjectMissing) as error:
        return {}, (Issue("bad-annotation", f"{uri} cannot be read: {error}; its objects have no attributes"),)
    if all(size) and size != (info.width, info.height):
        problem = f"{uri} is of an image of {size[0]} x {size[1]}, {photo_uri} is {info.width} x {info.height}"
        raise DataError(problem, "put the right annotation there", "size-mismatch", uri)
    return objects, ()


def _parse(data: bytes) -> "Element":
    """The root of an XML document; one with a DOCTYPE, which could define entities, is refused.

    Raises:
        ValueError: a DOCTYPE.
        ParseError: no XML.
    """
    from xml.etree import ElementTree

    class Builder(ElementTree.TreeBuilder):
        def doctype(self, name: str, public: str | None, system: str | None) -> None:
            raise ValueError("it has a DOCTYPE")

    parser = ElementTree.XMLParser(target=Builder())  # noqa: S314 - entities need a DOCTYPE
    parser.feed(data)
    root: Element = parser.close()
    return root


def _object(element: "Element") -> dict[str, Any]:
    found: dict[str, Any] = {key: element.findtext(key) for key in ("name", "pose") if element.findtext(key)}
    found |= {key: bool(int(element.findtext(key) or 0)) for key in _FLAGS if element.find(key) is not None}
    box = element.find("bndbox")
    if box is not None:
        found["bndbox"] = [_number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")]
    return found


def _number(text: str | None) -> float:
    value = float(text or "")
    if not math.isfinite(value):
        raise ValueError(f"{text} is no coordinate")
    return value
