"""ADE20K with all its classes, parts and instances: the releases of 2016/17 and of 2021.

Source: groups.csail.mit.edu/vision/datasets/ADE20K ("Description", ``loadAde20K.m``), ``ADE20K_2016_07_26.zip``;
github.com/CSAILVision/ADE20K, ``README.md``, ``utils/utils_ade20k.py``, ``notebooks/ade20k_starter.ipynb`` and
``dataset/ADE20K_2021_17_01``. B. Zhou et al., "Semantic Understanding of Scenes through the ADE20K Dataset", IJCV 2019.
The scene parsing benchmark with its 150 classes is ``ade20k``.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import ade20k_index, pairing, reading
from segbatch.datasets.ade20k_objects import (
    OBJECTS,
    class_codes,
    codes_by_number,
    described_objects,
    encoded_objects,
    parse_annotation,
    parse_lines,
    read_rgb,
    whole_number,
)
from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassInfo, ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

_SPLITS = ("training", "validation")
_RELEASE = "ADE20K_"
_PLACES = ("images/ADE/", "images/", "")
_INDEX = "index_ade20k.mat"
_NEWER = b"MATLAB 7.3"
_PARTS = "parts_"
_MAX_DEPTH = 8
_CHUNK = 256

_FILE = re.compile(
    r"(?P<stem>.+?)(?:(?P<photo>\.jpe?g)|(?P<seg>_seg\.png)|_parts_(?P<level>[1-9]\d?)\.png"
    r"|(?P<json>\.json)|(?P<atr>_atr\.txt)|/(?P<mask>instance_[^/]*\.png))",
    re.IGNORECASE,
)


class Ade20kFull(Dataset):
    """``images/SPLIT/SCENE/ADE_*.jpg`` (2016/17) or ``images/ADE/SPLIT/SCENE/ADE_*.jpg`` (2021), with labels beside it.

    The folders ``training`` and ``validation`` may also lie at the root. Beside ``X.jpg`` lie ``X_seg.png`` and
    ``X_parts_1.png``, ``X_parts_2.png`` ..., RGB: the class is R // 10 * 256 + G, the n-th object is the n-th smallest
    value of B above 0. A class is the number of its name in the release's index, from 1; 0 is what nobody labelled.
    The label map shows objects; the label maps ``parts_1`` ... their parts, and parts of those.

    2021 has ``X.json`` and a mask for every object, ``X/instance_*.png``. Instances are these objects, parts too: the
    visible pixels of their masks, with 1 + ``id`` as id (the file's ids start at 0, and an instance's may not). Under
    ``attributes["instances"]`` stand name, raw name, part level, ``ispartof`` and ``hasparts`` (as instance ids),
    occlusion, crop, attributes, depth order, polygon, and ``amodal``: COCO RLE of visible and hidden pixels, where
    some are hidden.

    2016/17 has ``X_atr.txt``, a line per object: its number, part level, whether it is occluded, name, raw name,
    attributes. Instances come from B, level after level: an object has its number as id, parts go on after those. The
    files do not say which object a part belongs to.
    """

    name: ClassVar[str] = "ade20k-full"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic", "instance")
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS

    def recognises(self, tree: Tree) -> bool:
        """Whether a split's first folder of files holds an ``_seg.png``."""
        return _find(tree) is not None

    def classes(self, tree: Tree) -> ClassTable:
        """All classes by their official numbers; 0 is ``unlabeled``, void.

        The names come from ``index_ade20k.mat``, one file. Without it (or where it is of version 7.3) the annotations
        of all images are read: every ``X.json``, which is a GB for the release of 2021; else every ``X_atr.txt``, and
        the label maps where a name is new. ``index_ade20k.pkl`` is never opened, because unpickling runs code, nor is
        ``objects.txt``, which names no numbers.

        Raises:
            ConfigError: another layout, or an index that is damaged.
        """
        release, base = _located(tree)
        index = tree.stat(f"{release}{_INDEX}")
        data = storage.read_bytes(index.uri) if index else b""
        if index and not data.startswith(_NEWER):
            return _class_table(ade20k_index.class_names(data, index.uri))
        return _class_table(_gathered_names(tree, base))

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those of training and validation that are there."""
        found = _find(tree)
        return () if found is None else tuple(s for s in _SPLITS if tree.is_folder(f"{found[1]}{s}"))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The images folder by folder, by name; labels whose image is missing stay items.

        Raises:
            ConfigError: another layout, no such split.
        """
        _, base = _located(tree)
        taken: dict[str, str] = {}
        for split in reading.choose_splits(self.name, tree.source, self.splits(tree), splits):
            for stem, files in _groups(tree, f"{base}{split}"):
                item = _item(tree, f"{base}{split}", split, stem, files)
                if item.sample_id in taken:
                    info = ObjectInfo(item.uri, item.etag, item.bytes)
                    yield pairing.twin(f"{split}/{stem}", info, taken[item.sample_id], split)
                else:
                    taken[item.sample_id] = item.uri
                    yield item

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its label map, its parts and its instances.

        Raises:
            DataError: a missing or broken image, map or annotation, a map that is not RGB or of another size.
        """
        pairing.check(item)
        detail = reading.detail_of(item)
        data, info = reading.read_photo(item.uri)
        maps = {OBJECTS: str(detail["seg"]), **{int(level): str(uri) for level, uri in detail["parts"].items()}}
        levels = {level: _encoded(uri, item.uri, info) for level, uri in maps.items()}
        labels = {level: class_codes(rgb) for level, rgb in levels.items()}
        if detail["json"]:
            found = described_objects(str(detail["json"]), str(detail["masks"]), item.uri, info)
        else:
            found = encoded_objects(levels, str(detail["atr"]))
            found.attributes["scene"] = detail["scene"]
        if not detail["json"] and not detail["atr"]:
            note = f"{item.sample_id} has neither .json nor _atr.txt: its instances have no attributes"
            found.say("missing-annotation", note)
        yield replace(
            reading.sample_of(item, data, info),
            semantic=labels[OBJECTS],
            label_maps={f"{_PARTS}{level}": label for level, label in labels.items() if level != OBJECTS},
            instances=tuple(found.instances),
            attributes=found.attributes,
            issues=tuple(found.issues),
        )


def _encoded(uri: str, photo_uri: str, info: "PhotoInfo") -> NDArray[np.uint8]:
    rgb = read_rgb(uri)
    reading.check_size(rgb, info, uri, photo_uri)
    return rgb


@dataclass
class _Files:
    """The files of one image."""

    photo: ObjectInfo | None = None
    seg: ObjectInfo | None = None
    json: ObjectInfo | None = None
    atr: ObjectInfo | None = None
    parts: dict[int, ObjectInfo] = field(default_factory=dict)
    masks: list[ObjectInfo] = field(default_factory=list)


# Layout


def _find(tree: Tree) -> tuple[str, str] | None:
    """Paths of the release and of the folder that has the splits, each empty or with a slash at its end."""
    releases = ["", *(f"{f}/" for f in tree.folders() if f.startswith(_RELEASE))]
    for release, place in itertools.product(releases, _PLACES):
        if any(_has_labels(tree, f"{release}{place}{split}") for split in _SPLITS):
            return release, f"{release}{place}"
    return None


def _located(tree: Tree) -> tuple[str, str]:
    found = _find(tree)
    if found is None:
        expected = "images/training/SCENE/ADE_*.jpg (2021: images/ADE/training/...) with ADE_*_seg.png beside it"
        raise ConfigError(f"{tree.source} is not the full ADE20K", f"expected {expected}")
    return found


def _has_labels(tree: Tree, folder: str) -> bool:
    """Whether the first folder of files, going down by the first names, holds label maps."""
    for _ in range(_MAX_DEPTH):
        if next(tree.files(folder, ("_seg.png",), recursive=False), None) is not None:
            return True
        below = tree.folders(folder)
        if not below:
            return False
        folder = f"{folder}/{below[0]}"
    return False


def _groups(tree: Tree, folder: str) -> Iterator[tuple[str, _Files]]:
    """The files below a folder by image (its path without suffix), scene by scene, so that one is held in memory."""
    for place in _scene_folders(tree, folder, _MAX_DEPTH):
        groups: dict[str, _Files] = {}
        above = f"{place}/".removeprefix(f"{folder}/")
        for path, info in tree.files(place):
            found = _FILE.fullmatch(path)
            if found:
                files = groups.setdefault(f"{above}{found['stem']}", _Files())
                if found["level"]:
                    files.parts[int(found["level"])] = info
                elif found["mask"]:
                    files.masks.append(info)
                else:
                    setattr(files, str(found.lastgroup), info)
        yield from sorted(groups.items())


def _scene_folders(tree: Tree, folder: str, depth: int) -> Iterator[str]:
    """The topmost folders that hold files."""
    if depth == 0 or next(tree.files(folder, recursive=False), None) is not None:
        yield folder
        return
    for name in tree.folders(folder):
        yield from _scene_folders(tree, f"{folder}/{name}", depth - 1)


def _item(tree: Tree, folder: str, split: str, stem: str, files: _Files) -> PlanItem:
    annotation = [files.json] if files.json else [files.atr] if files.atr else []
    labels = [files.seg, *annotation, *(files.parts[level] for level in sorted(files.parts))]
    masks = hashlib.sha256("+".join(m.etag for m in files.masks).encode()).hexdigest()[:16] if files.masks else ""
    scene = [part for part in stem.split("/")[:-1] if len(part) > 1]  # 2016/17: a letter, then the scene's name
    detail = {
        "seg": files.seg.uri if files.seg else tree.uri(f"{folder}/{stem}_seg.png"),
        "json": files.json.uri if files.json else "",
        "atr": files.atr.uri if files.atr else "",
        "parts": {level: files.parts[level].uri for level in sorted(files.parts)},
        "masks": files.masks[0].uri.rsplit("/", 1)[0] if files.masks else "",
        "scene": "/".join(scene),
    }
    return PlanItem(
        sample_id=stem.rsplit("/", 1)[-1],
        uri=files.photo.uri if files.photo else tree.uri(f"{folder}/{stem}.jpg"),
        etag=f"{reading.joint_etag(files.photo, *labels)}+{masks}",
        bytes=sum(i.size for i in (files.photo, *labels, *files.masks) if i),
        detail=json.dumps(detail),
        split=split,
    )


# Class names


def _class_table(names: Mapping[int, str]) -> ClassTable:
    """The table of official names; a name that an earlier class has, or that is blank, gets its number."""
    classes, taken = [ClassInfo(0, "unlabeled", ignore=True)], {"unlabeled"}
    for code in sorted(names):
        name = names[code].strip()
        name = f"{name} ({code})".strip() if name in taken or not name else name
        taken.add(name)
        classes.append(ClassInfo(code, name))
    return ClassTable(tuple(classes))


def _gathered_names(tree: Tree, base: str) -> dict[int, str]:
    """Names by class, from the annotations of all images. One that is broken makes its own row bad, nothing else."""
    names: dict[int, str] = {}
    groups = (files for split in _SPLITS for _, files in _groups(tree, f"{base}{split}"))
    while chunk := list(itertools.islice(groups, _CHUNK)):
        uris = [f.json.uri for f in chunk if f.json]
        for uri, data in zip(uris, storage.read_many(uris), strict=True):
            _add_described(names, data, uri)
        for files in chunk:
            if files.atr and not files.json:
                _add_encoded(names, files.atr.uri, {OBJECTS: files.seg, **files.parts})
    return names


def _add_described(names: dict[int, str], data: bytes, uri: str) -> None:
    try:
        _, objects = parse_annotation(data, uri)
    except DataError:
        return
    for entry in objects:
        code = whole_number(entry.get("name_ndx"))
        if code and code > 0:
            names.setdefault(code, str(entry.get("name", "")))


def _add_encoded(names: dict[int, str], atr: str, maps: Mapping[int, ObjectInfo | None]) -> None:
    """Add the names of an ``X_atr.txt``; its maps tell their classes, and are read for new names only."""
    lines, _ = parse_lines(storage.read_bytes(atr), atr)
    for level, info in maps.items():
        wanted = {number: str(line["name"]) for (at, number), line in lines.items() if at == level}
        if info is None or set(names.values()).issuperset(wanted.values()):
            continue
        try:
            codes = codes_by_number(read_rgb(info.uri))
        except DataError:
            continue
        for number, code in codes.items():
            if code and number in wanted:
                names.setdefault(code, wanted[number])
