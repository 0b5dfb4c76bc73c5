"""ADE20K as the scene parsing benchmark releases it: 150 classes, 20,210 training and 2,000 validation images.

Source: sceneparsing.csail.mit.edu, ``ADEChallengeData2016.zip`` and ``release_test.zip``;
github.com/CSAILVision/sceneparsing, ``README.md``, ``sceneCategories.txt``, ``sampleData/``. B. Zhou et al., "Scene
Parsing through ADE20K Dataset", CVPR 2017. The dataset with all its classes, parts and instances is ``ade20k_full``.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from segbatch.datasets import pairing, reading, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

CLASSES = tables.load("ade20k")

_PREFIX = {"training": "ADE_train_", "validation": "ADE_val_", "testing": "ADE_test_"}
"""What the file names of a split begin with."""

_TESTING = "testing"
_ROOTS = ("", "ADEChallengeData2016/")
_RELEASE_TEST = "release_test"
_SCENES = "sceneCategories.txt"

_KNOWN = reading.known_ids(CLASSES)


class Ade20k(Dataset):
    """``images/SPLIT/ADE_*.jpg`` with ``annotations/SPLIT/ADE_*.png`` for training and validation.

    Also ``images/`` and ``annotations/`` without sub-folders, as in the benchmark's ``sampleData``: the names tell the
    split. Images of testing lie in ``images/testing/`` or ``release_test/``; their labels are not public. Files that
    are not called ``ADE_train_``, ``ADE_val_`` or ``ADE_test_`` are no part of the dataset. Label maps hold 1..150, and
    0 for all other objects, which is never scored. ``attributes["scene"]`` comes from ``sceneCategories.txt``.
    """

    name: ClassVar[str] = "ade20k"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    official_splits: ClassVar[tuple[str, ...]] = tuple(_PREFIX)
    formats: ClassVar[tuple[str, ...]] = ("ade20k",)

    def recognises(self, tree: Tree) -> bool:
        """Whether ``images/`` and ``annotations/`` hold files with the benchmark's names."""
        return _root(tree) is not None

    def classes(self, tree: Tree) -> ClassTable:
        """``other objects`` (0, void) and the 150 classes."""
        return CLASSES

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those of training, validation and testing that have an image or a label map."""
        root = _root(tree)
        return () if root is None else tuple(s for s in _PREFIX if _has(tree, root, s))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Images by number; label maps whose image is missing stay items.

        Raises:
            ConfigError: another layout, no such split.
        """
        root = _root(tree)
        if root is None:
            expected = "images/training/ADE_train_00000001.jpg beside annotations/training/ADE_train_00000001.png"
            raise ConfigError(f"{tree.source} is not ADE20K of the scene parsing benchmark", f"expected {expected}")
        scenes = _scenes(tree, root)
        for split in reading.choose_splits(self.name, tree.source, self.splits(tree), splits):
            photos, twins = pairing.by_stem(_photos(tree, root, split))
            labels, _ = pairing.by_stem(_listed(tree, f"{root}annotations", split, (".png",)))
            for stem in sorted({*photos, *labels}):
                yield _item(tree, root, split, stem, photos.get(stem), labels.get(stem), scenes.get(stem, ""))
            yield from (pairing.twin(name, info, photos[name.rsplit(".", 1)[0]].uri, split) for name, info in twins)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its label map; images of testing have none.

        Raises:
            DataError: a missing or broken file, a label map in colour or of another size, an id above 150.
        """
        pairing.check(item)
        detail = reading.detail_of(item)
        data, info = reading.read_photo(item.uri)
        sample = reading.sample_of(item, data, info)
        if detail["scene"]:
            sample = replace(sample, attributes={"scene": detail["scene"]})
        if detail["label"]:
            label_uri = str(detail["label"])
            label = reading.read_label(label_uri)
            if label.ndim != 2:
                fix = "give the grey maps of annotations/, with 0..150"
                raise DataError(f"label map {label_uri} is in colour", fix, "label-type", label_uri)
            reading.check_size(label, info, label_uri, item.uri)
            reading.check_ids(label, _KNOWN, label_uri)
            sample = replace(sample, semantic=label)
        yield sample


def _root(tree: Tree) -> str | None:
    """Path of the folder that has ``images/`` and ``annotations/``, empty or with a slash at its end."""
    for root in _ROOTS:
        folders = (f"{root}images", f"{root}annotations")
        if all(tree.is_folder(f) for f in folders) and any(_has(tree, root, s) for s in _PREFIX):
            return root
    return None


def _has(tree: Tree, root: str, split: str) -> bool:
    labels = _listed(tree, f"{root}annotations", split, (".png",))
    return next(_photos(tree, root, split), None) is not None or next(labels, None) is not None


def _photos(tree: Tree, root: str, split: str) -> Iterator[tuple[str, ObjectInfo]]:
    yield from _listed(tree, f"{root}images", split, IMAGE_SUFFIXES)
    if split == _TESTING:
        for folder in dict.fromkeys((_RELEASE_TEST, f"{root}{_RELEASE_TEST}")):
            found = ((path.rsplit("/", 1)[-1], info) for path, info in tree.files(folder, IMAGE_SUFFIXES))
            yield from ((name, info) for name, info in found if name.startswith(_PREFIX[split]))


def _listed(tree: Tree, folder: str, split: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, ObjectInfo]]:
    """Files of a split by their names, from its own sub-folder or from the one for all."""
    place = f"{folder}/{split}" if tree.is_folder(f"{folder}/{split}") else folder
    for name, info in tree.files(place, suffixes, recursive=False):
        if name.startswith(_PREFIX[split]):
            yield name, info


def _scenes(tree: Tree, root: str) -> dict[str, str]:
    """Scene category by image, from lines like ``ADE_train_00000001 airport_terminal``; empty without that file."""
    if tree.stat(f"{root}{_SCENES}") is None:
        return {}
    columns = (line.split(maxsplit=1) for line in tree.read_lines(f"{root}{_SCENES}"))
    return {c[0]: c[1].strip() for c in columns if len(c) == 2}


def _item(
    tree: Tree, root: str, split: str, stem: str, photo: ObjectInfo | None, label: ObjectInfo | None, scene: str
) -> PlanItem:
    expected = () if label is None and split == _TESTING else (label,)
    label_uri = label.uri if label else tree.uri(f"{root}annotations/{split}/{stem}.png") if expected else ""
    return PlanItem(
        sample_id=stem,
        uri=photo.uri if photo else tree.uri(f"{root}images/{split}/{stem}.jpg"),
        etag=f"{reading.joint_etag(photo, *expected)}+{scene}",
        bytes=sum(i.size for i in (photo, label) if i),
        detail=json.dumps({"label": label_uri, "scene": scene}),
        split=split,
    )
