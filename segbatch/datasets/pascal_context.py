"""PASCAL-Context: the 10,103 images of VOC2010 trainval with a class for every pixel.

Source: cs.stanford.edu/~roozbeh/pascal-context, ``trainval.tar.gz`` (a MATLAB file per image with ``LabelMap``),
``labels.txt``, ``59_labels.txt``; images and splits (``ImageSets/Main``: 4,998 train, 5,105 val) of VOC2010.
R. Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR 2014.
From 459 ids to 59: github.com/shelhamer/fcn.berkeleyvision.org, ``pascalcontext_layers.py``. PNG files:
github.com/open-mmlab/mmsegmentation, ``tools/dataset_converters/pascal_context.py``.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import mat
from segbatch.datasets import pairing, reading, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.pascal_voc import PHOTOS, find_root, listed, photos_of, years
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

CLASSES = tables.load("pascal-context-60")

LABELS_459 = "pascal-context-459"
"""Name of the label map (and class table) of the official 459 ids."""

PNGS = "SegmentationClassContext"
"""Folder of PNG files as mmsegmentation makes them, and name of the label map of their own values."""

_VARIABLE = "LabelMap"
_MATS = "trainval"
_LISTS = ("ImageSets/SegmentationContext", "ImageSets/Main")
_SPLITS = ("train", "val", "trainval")


class PascalContext(Dataset):
    """VOC2010 with ``trainval/*.mat`` (at the root, in ``VOCdevkit/`` or in VOC2010), or with PNG files.

    The label map always has the ids of the class table ``pascal-context-60``: 0, background, for what is none of the 59
    classes, then these in the order of ``59_labels.txt``. That is the 60-class task of FCN; in the 59-class task
    pixels of truth 0 are not scored. What the file says stays beside it in ``label_maps``: ``pascal-context-459`` holds
    the ids 0..459 of ``labels.txt``; for the PNG files of mmsegmentation, ``SegmentationClassContext`` holds their own
    numbers of the 59 classes, which follow the order of the 459 ids. Where there are both, the MATLAB files are read.

    Splits are ``ImageSets/SegmentationContext/{train,val}.txt``, else ``ImageSets/Main/{train,val}.txt``; without lists
    all labelled images are listed, and there are no splits.
    """

    name: ClassVar[str] = "pascal-context"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS
    formats: ClassVar[tuple[str, ...]] = ("pascal",)

    def recognises(self, tree: Tree) -> bool:
        """Whether there are VOC's photos and one of the two kinds of labels."""
        return find_root(tree) is not None and _labels_folder(tree) is not None

    def classes(self, tree: Tree) -> ClassTable:
        """Background and the 59 classes."""
        return CLASSES

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those that have a list; trainval only where it lists further images.

        Raises:
            ConfigError: as ``pascal_voc.listed``.
        """
        return tuple(_lists(tree))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The images in the order of the lists.

        Raises:
            ConfigError: another layout, several years, no such split, an image that is listed twice.
        """
        found = _labels_folder(tree)
        root = find_root(tree)
        if found is None or root is None:
            expected = f"expected VOC2010 with {PHOTOS}/, and {_MATS}/*.mat or {PNGS}/*.png"
            raise ConfigError(f"{tree.source} is not PASCAL-Context{years(tree)}", expected)
        folder, suffix = found
        lists = _lists(tree)
        wanted = reading.choose_splits(self.name, tree.source, lists, splits)
        photos, twins = photos_of(tree, root)
        labels, _ = pairing.by_stem(tree.files(folder, (suffix,), recursive=False))
        for split, ids in [(s, lists[s]) for s in wanted] or [("", sorted(labels))]:
            for image_id in ids:
                uri = photos[image_id].uri if image_id in photos else tree.uri(f"{root}{PHOTOS}/{image_id}.jpg")
                label = labels.get(image_id)
                label_uri = label.uri if label else tree.uri(f"{folder}/{image_id}{suffix}")
                yield _item(split, image_id, uri, label_uri, photos.get(image_id), label)
                yield from (replace(t, split=split) for t in twins.get(image_id, ()))

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its label map in 60 classes, and as the file has it.

        Raises:
            DataError: a missing or broken file, no ``LabelMap``, a map of another size, an unknown id.
        """
        pairing.check(item)
        data, info = reading.read_photo(item.uri)
        uri = str(reading.detail_of(item)["label"])
        name, read = (LABELS_459, _read_mat) if uri.endswith(".mat") else (PNGS, _read_png)
        found = read(uri)
        reading.check_size(found, info, uri, item.uri)
        table = _to_60(name)
        reading.check_ids(found, _known(name), uri)
        yield replace(reading.sample_of(item, data, info), semantic=table[found], label_maps={name: found})


def _labels_folder(tree: Tree) -> tuple[str, str] | None:
    """The folder of the label files, and their ending."""
    root = find_root(tree) or ""
    for folder in dict.fromkeys((_MATS, f"VOCdevkit/{_MATS}", f"{root}{_MATS}")):
        if next(tree.files(folder, (".mat",), recursive=False), None) is not None:
            return folder, ".mat"
    return (f"{root}{PNGS}", ".png") if tree.is_folder(f"{root}{PNGS}") else None


def _lists(tree: Tree) -> dict[str, list[str]]:
    root = find_root(tree) or ""
    return next((found for folder in _LISTS if (found := listed(tree, f"{root}{folder}", _SPLITS))), {})


def _item(
    split: str, image_id: str, uri: str, label_uri: str, photo: ObjectInfo | None, label: ObjectInfo | None
) -> PlanItem:
    return PlanItem(
        sample_id=image_id,
        uri=uri,
        etag=reading.joint_etag(photo, label),
        bytes=sum(i.size for i in (photo, label) if i),
        detail=json.dumps({"label": label_uri}),
        split=split,
    )


def _read_mat(uri: str) -> NDArray[np.uint16]:
    try:
        found = mat.read(storage.read_bytes(uri), _VARIABLE, uri)
    except ObjectMissing as error:
        raise DataError(f"label map {uri} is not there", "add it or unlist the image", "missing-label", uri) from error
    whole = found.dtype.kind in "iu" and found.ndim == 2 and found.size
    if not whole or int(found.min()) < 0 or int(found.max()) > np.iinfo(np.uint16).max:
        problem = f"{_VARIABLE} of {uri} is {found.dtype} of shape {found.shape}, not a matrix of ids 0..459"
        raise DataError(problem, "restore the file of the release", "bad-label", uri)
    return np.ascontiguousarray(found, np.uint16)


def _read_png(uri: str) -> NDArray[Any]:
    found = reading.read_label(uri)
    if found.ndim != 2:
        raise DataError(f"label map {uri} is in colour", "write indices 0..59", "label-type", uri)
    return found


@cache
def _to_60(name: str) -> NDArray[np.uint8]:
    """Id of ``pascal-context-60`` by the value in the file, uint8 of shape (65536,)."""
    table = np.zeros(1 << 16, np.uint8)
    for number, (label_id, new) in enumerate(sorted(tables.from_459().items()), 1):
        table[label_id if name == LABELS_459 else number] = new
    return table


@cache
def _known(name: str) -> NDArray[np.bool_]:
    return reading.known_ids(tables.load(LABELS_459) if name == LABELS_459 else CLASSES)
