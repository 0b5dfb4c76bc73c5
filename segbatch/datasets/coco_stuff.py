"""COCO-Stuff 164K: a label for every pixel of COCO's photos, of 80 things and 91 stuff classes.

Label maps: ``annotations/{train,val}2017/*.png`` with photos in ``images/{train,val}2017/``; also in
``stuffthingmaps/``, or as ``stuffthingmaps_trainval2017.zip`` unpacks (``train2017/*.png``), beside the photos or
among them. Values are 0..181, and 255 where nothing is labelled. What other tools leave there (``*_labelTrainIds.png``)
is left out.

Where there are no label maps: ``annotations/stuff_SPLIT.json`` of ``stuff_annotations_trainval2017.zip``, masks by
class. The label map is painted from them with the ids that stand there (officially 92..182 for stuff, 183 for all
things), 0 where there is none, as ``cocostuffeval`` does. Things are told apart only by the label maps, so where both
are there the maps are read.

Source: github.com/nightrome/cocostuff, ``README.md``; github.com/nightrome/cocostuffapi,
``PythonAPI/pycocotools/cocostuffhelper.py`` (cocoSegmentationToSegmentationMap), ``annotations/stuff_examples.json``;
the folders are those of mmsegmentation, ``docs/en/user_guides/2_dataset_prepare.md``.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.datasets import annotation_json, coco_form, pairing, reading
from segbatch.datasets.annotation_json import CocoAnnotation
from segbatch.datasets.base import Dataset
from segbatch.datasets.coco_form import Detail, Planned
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassInfo, ClassTable, Issue, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

UNLABELED = 0
"""Label id of pixels that no annotation of a ``stuff_SPLIT.json`` covers."""

CLASSES = load("coco-stuff")
"""The label ids of the PNG label maps."""

_SPLITS = ("train2017", "val2017")
_STUFF = "stuff"
_DERIVED = re.compile(r"_(?:labelTrainIds|instanceTrainIds|labelIds)\.png", re.IGNORECASE)
_KNOWN = reading.known_ids(CLASSES)
_MAX_LABEL = 2**16 - 1
_LOOK_AT = 4


@dataclass(frozen=True, slots=True)
class _Folders:
    """Where the photos and label maps of a split lie."""

    photos: str
    maps: str


class CocoStuff(Dataset):
    """``annotations/{train,val}2017/*.png`` and ``images/{train,val}2017/*.jpg``; or ``annotations/stuff_SPLIT.json``.

    A sample id is COCO's image id: the number in the file's name, without leading zeros.
    """

    name: ClassVar[str] = "coco-stuff"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS
    formats: ClassVar[tuple[str, ...]] = ("coco-stuff",)

    def recognises(self, tree: Tree) -> bool:
        """Whether a split's folder of label maps is here, or a ``stuff_SPLIT.json``.

        Label maps in ``train2017/`` itself count only where there are JPEGs too: else they may be somebody's photos.
        """
        folders = _with_maps(tree).values()
        certain = any(f.photos != f.maps or _holds(tree, f.maps, (".jpg", ".jpeg")) for f in folders)
        return certain or bool(coco_form.documents(tree, _STUFF))

    def classes(self, tree: Tree) -> ClassTable:
        """The 171 classes and ``unlabeled`` (255); of JSON files their own categories and ``unlabeled`` (0).

        Raises:
            ConfigError: a JSON file that cannot be read, without categories or with ids outside 1..65535, or two that
                disagree.
        """
        if _with_maps(tree):
            return CLASSES
        found = coco_form.class_table(coco_form.documents(tree, _STUFF), ClassTable(()), is_thing=False)
        bad = [c.label_id for c in found.classes if not UNLABELED < c.label_id <= _MAX_LABEL]
        if bad or not found.classes:
            problem = f"has the category id {bad[0]}" if bad else "has no categories"
            raise ConfigError(f"stuff JSON at {tree.source} {problem}", "number categories from 1 to 65535")
        return ClassTable((ClassInfo(UNLABELED, "unlabeled", ignore=True), *found.classes))

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those that have a folder of label maps; else those of the JSON files."""
        return tuple(_with_maps(tree)) or tuple(d.split for d in coco_form.documents(tree, _STUFF))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The images of each split by file name (of a JSON file in its order), then labels without a photo.

        Raises:
            ConfigError: not COCO-Stuff, no such split, or a broken JSON file.
        """
        folders = _with_maps(tree)
        documents = coco_form.documents(tree, _STUFF)
        if folders:
            for split in reading.choose_splits(self.name, tree.source, folders, splits):
                yield from _map_items(tree, split, folders[split])
        elif documents:
            classes, taken = self.classes(tree), Planned()
            for document in coco_form.choose(self.name, tree.source, documents, splits):
                yield from coco_form.planned(tree, document, classes, taken)
        else:
            expected = (
                "expected annotations/train2017/*.png and images/train2017/*.jpg, or annotations/stuff_SPLIT.json"
            )
            raise ConfigError(f"{tree.source} is not COCO-Stuff", expected)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo and its label map.

        Raises:
            DataError: a missing or broken photo or label map, ``size-mismatch``, ``unknown-label``,
                ``bad-annotation``, and what ``coco_form.planned`` refuses.
        """
        pairing.check(item)
        label = reading.detail_of(item).get("map")
        yield _from_json(item) if label is None else _from_map(item, str(label))


# -- label maps ------------------------------------------------------------------------------------------------------


def _with_maps(tree: Tree) -> dict[str, _Folders]:
    """The splits that have label maps."""
    found = {split: _folders(tree, split) for split in _SPLITS}
    return {split: folders for split, folders in found.items() if folders}


def _folders(tree: Tree, split: str) -> _Folders | None:
    """The first folder that holds PNG files; the photos lie in ``images/SPLIT`` or ``SPLIT``."""
    photos = next((f for f in (f"images/{split}", split) if tree.is_folder(f)), split)
    for maps in (f"annotations/{split}", f"stuffthingmaps/{split}", split):
        if _holds(tree, maps, (".png",)):
            return _Folders(photos, maps)
    return None


def _holds(tree: Tree, folder: str, suffixes: tuple[str, ...]) -> bool:
    """Whether such files are among the first of a folder: photo and label map of one image are neighbours."""
    parts = (Tree(tree.source, (root,)).files(folder, recursive=False) for root in tree.roots)
    return any(name.lower().endswith(suffixes) for files in parts for name, _ in itertools.islice(files, _LOOK_AT))


def _maps(tree: Tree, folder: str) -> Iterator[tuple[str, ObjectInfo]]:
    found = tree.files(folder, (".png",), recursive=False)
    return ((name, info) for name, info in found if not _DERIVED.search(name))


def _map_items(tree: Tree, split: str, folders: _Folders) -> Iterator[PlanItem]:
    suffixes = tuple(s for s in reading.IMAGE_SUFFIXES if folders.photos != folders.maps or s != ".png")
    photos, twins = pairing.by_stem(tree.files(folders.photos, suffixes, recursive=False))
    maps = dict(pairing.by_stem(_maps(tree, folders.maps))[0])
    photo_base, map_base = tree.uri(folders.photos), tree.uri(folders.maps)
    for stem in sorted({*photos, *maps}):
        photo, label = photos.get(stem), maps.get(stem)
        detail = {"map": label.uri if label else f"{map_base}/{stem}.png", "labels_only": not photos}
        yield PlanItem(
            sample_id=_sample_id(stem),
            uri=photo.uri if photo else f"{photo_base}/{stem}.jpg",
            etag=reading.joint_etag(photo, label),
            bytes=sum(i.size for i in (photo, label) if i),
            detail=json.dumps(detail),
            split=split,
        )
    for path, info in twins:
        yield pairing.twin(f"{folders.photos}#{path}", info, photos[path.rsplit(".", 1)[0]].uri, split)


def _sample_id(stem: str) -> str:
    number = coco_form.official_id(stem)
    return stem if number is None else str(number)


def _from_map(item: PlanItem, label_uri: str) -> Sample:
    if reading.detail_of(item)["labels_only"]:
        label = _label_map(label_uri)
        return replace(reading.labels_only(item, *label.shape), semantic=label)
    data, info = reading.read_photo(item.uri)
    label = _label_map(label_uri)
    reading.check_size(label, info, label_uri, item.uri)
    return replace(reading.sample_of(item, data, info), semantic=label)


def _label_map(uri: str) -> NDArray[Any]:
    label = reading.read_label(uri)
    if label.ndim != 2 or label.dtype != np.uint8:
        kind = "in colour" if label.ndim == 3 else "16 bit"
        fix = "COCO-Stuff's label maps are 8-bit PNG of class numbers"
        raise DataError(f"label map {uri} is {kind}", fix, "label-type", uri)
    reading.check_ids(label, _KNOWN, uri)
    return label


# -- JSON ------------------------------------------------------------------------------------------------------------


def _from_json(item: PlanItem) -> Sample:
    detail = coco_form.detail_of(item)
    sample = coco_form.sample_of(item, detail)
    annotations = annotation_json.decode_annotations(detail.text, detail.document)
    label, issues = painted(annotations, sample.height, sample.width, detail)
    return replace(sample, semantic=label, issues=(*sample.issues, *issues))


def painted(
    annotations: Sequence[CocoAnnotation], height: int, width: int, detail: Detail
) -> tuple[NDArray[np.uint16], list[Issue]]:
    """The label map that masks by class make, later ones over earlier ones.

    Crowds are painted like the rest. ``cocostuffeval`` leaves them out, and refuses pixels of two classes; the official
    files have neither. Both are issues: ``crowd-mask`` and ``overlap``.

    Returns:
        uint16 of shape (height, width), ``UNLABELED`` where there is no mask; and issues, those of ``coco_form.masks``
        and ``unknown-category`` among them.

    Raises:
        DataError: as ``coco_form.masks``.
    """
    from segbatch.codecs import rle

    known = [a for a in annotations if a.category_id not in detail.unknown]
    shapes = [(f"annotation {a.id!r}", a.segmentation) for a in known]
    counts, complaints = coco_form.masks(shapes, height, width, detail.document)
    label = rle.paint(counts, [a.category_id for a in known], height, width, np.uint16)
    covered = sum(rle.area(c) for c in counts) - int(np.count_nonzero(label))
    numbers = [a.id if isinstance(a.id, int) else None for a in known]
    issues = [Issue(c.code, c.text, numbers[c.place]) for c in complaints]
    where = f"of image {detail.image.id!r} in {detail.document}"
    for a in annotations:
        if a.category_id in detail.unknown:
            text = f"annotation {a.id!r} {where} is of the category {a.category_id}, which is none; left out"
            issues.append(Issue("unknown-category", text, a.id if isinstance(a.id, int) else None))
    if covered:
        issues.append(Issue("overlap", f"masks {where} overlap in {covered} pixels; the last one counts"))
    crowds = sum(bool(a.iscrowd) for a in known)
    if crowds:
        issues.append(Issue("crowd-mask", f"{crowds} masks {where} are crowds, which cocostuffeval leaves out"))
    return label, issues
