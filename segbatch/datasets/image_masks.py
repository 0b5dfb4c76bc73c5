"""Somebody's own dataset: ``images/`` and ``masks/``, and ``instances/`` for objects, with the same file stems."""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.class_file import FILE_NAMES, read_class_file
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, PlanItem, Sample, Segment, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

_SPLITS = ("train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing")
"""Sub-folders of ``images/`` that are splits, and the order of splits; other sub-folders are only part of the path."""

_MASK_SUFFIXES = (".png",)
_FOLDERS = {"images": IMAGE_SUFFIXES, "masks": _MASK_SUFFIXES, "instances": _MASK_SUFFIXES}
_IDS = 1 << 16


class ImageMasks(Dataset):
    """``images/STEM.jpg`` beside ``masks/STEM.png``, sub-folders alike.

    Optional: ``classes.toml``, ``classes.json`` or ``classes.txt`` (see ``class_file``); ``splits/NAME.txt`` with a
    stem a line, or sub-folders ``images/train`` ... Masks are grey (1 to 16 bit) or palette PNG of label ids, or RGB
    when the classes have colours. Without a class file every id is accepted and is named by its number.

    Where there is a folder ``instances/``, every photo has an ``instances/STEM.png``: a grey PNG (1 to 16 bit) with a
    number for every object, 0 where there is none. What class an object has is said by the mask, one class an object;
    pixels of ignored classes belong to none. Instances are these objects; the panoptic segments are these objects and,
    for each class, the pixels that belong to none: stuff, or of a class with ``isthing`` a group (``iscrowd``), which
    is an instance too. Instance and segment ids are the objects' numbers, 65,536 + label id of what has no number.
    """

    name: ClassVar[str] = "image-masks"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic", "instance", "panoptic")

    def recognises(self, tree: Tree) -> bool:
        """Whether ``images/`` and ``masks/`` are there."""
        return all(tree.is_folder(folder) for folder in ("images", "masks"))

    def classes(self, tree: Tree) -> ClassTable:
        """The class file's table; empty without one.

        Raises:
            ConfigError: two class files, or a wrong one.
        """
        found = _class_file(tree)
        return _table(found.uri, found.etag) if found else ClassTable(())

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Names of ``splits/*.txt``, else those sub-folders of ``images/`` that are called like a split."""
        names = [name[: -len(".txt")] for name, _ in tree.files("splits", (".txt",), recursive=False)]
        if names:
            return tuple(sorted(names, key=lambda n: (_SPLITS.index(n) if n in _SPLITS else len(_SPLITS), n)))
        return tuple(s for s in _SPLITS if tree.is_folder(f"images/{s}"))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Pairs in the order of the split files, else of the folder ``images/``; then masks without an image.

        A photo without mask, a mask without photo and a listed stem without either stay items, and end as rows with
        a reason. The listing of both folders is held in memory (some 500 bytes a pair). ``sample_id`` is the stem
        below ``images/``.

        Raises:
            ConfigError: another layout, no such split, two photos of one stem, a stem listed twice, a bad class file.
        """
        if not self.recognises(tree):
            problem = f"{tree.source} has no images/ and masks/"
            raise ConfigError(problem, "expected images/STEM.jpg beside masks/STEM.png")
        self.classes(tree)
        wanted = reading.choose_splits(self.name, tree.source, self.splits(tree), splits)
        listed = {folder: _by_stem(tree, folder, suffixes) for folder, suffixes in _FOLDERS.items()}
        if not listed["images"] and not listed["masks"]:
            raise ConfigError(f"{tree.source}/images holds no image", f"endings that count: {' '.join(IMAGE_SUFFIXES)}")
        class_file = _class_file(tree)
        for stem, split in _members(tree, wanted, bool(splits), listed["images"], listed["masks"]):
            files = _Files(*(listed[folder].get(stem) for folder in _FOLDERS))
            yield _item(tree, stem, split, files, class_file, bool(listed["instances"]))

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo, its mask and its objects.

        Raises:
            DataError: a missing or broken file, a mask of another size, an id or colour that no class has, an object of
                two classes (``mixed-object``).
        """
        detail = reading.detail_of(item)
        data, info = reading.read_photo(item.uri)
        label_uri = str(detail["label"])
        mask = reading.read_label(label_uri)
        reading.check_size(mask, info, label_uri, item.uri)
        semantic = _label_ids(mask, label_uri, *detail["classes"])
        sample = replace(reading.sample_of(item, data, info), semantic=semantic)
        if "objects" not in detail:
            yield sample
        else:
            uri = str(detail["objects"])
            yield _with_objects(sample, _object_map(uri, info, item), _table(*detail["classes"]), uri)


class _Files(NamedTuple):
    """What belongs to a stem; None for what is not there."""

    photo: ObjectInfo | None
    mask: ObjectInfo | None
    objects: ObjectInfo | None


def _class_file(tree: Tree) -> ObjectInfo | None:
    found = [i for i in map(tree.stat, FILE_NAMES) if i]
    if len(found) > 1:
        names = " and ".join(storage.name_of(i.uri) for i in found)
        raise ConfigError(f"{tree.source} has {names}", "keep one of them")
    return found[0] if found else None


@functools.lru_cache(maxsize=8)
def _table(uri: str, etag: str) -> ClassTable:
    return read_class_file(uri) if uri else ClassTable(())


@functools.lru_cache(maxsize=8)
def _known(uri: str, etag: str) -> NDArray[np.bool_]:
    return reading.known_ids(_table(uri, etag))


@functools.lru_cache(maxsize=8)
def _colors(uri: str, etag: str) -> reading.Colors:
    return reading.Colors.of(_table(uri, etag))


def _by_stem(tree: Tree, folder: str, suffixes: tuple[str, ...]) -> dict[str, ObjectInfo]:
    """Files of a folder and its sub-folders by their path below it, without suffix, in listing order."""
    found: dict[str, ObjectInfo] = {}
    for path, info in tree.files(folder, suffixes):
        stem = path.rsplit(".", 1)[0]
        if stem in found:
            raise ConfigError(f"{found[stem].uri} and {info.uri} have the same stem", "rename one of them")
        found[stem] = info
    return found


def _members(
    tree: Tree, splits: Sequence[str], chosen: bool, photos: dict[str, ObjectInfo], masks: dict[str, ObjectInfo]
) -> Iterator[tuple[str, str]]:
    """(stem, split) of every sample; ``chosen``: only these splits were asked for."""
    listed = [s for s in splits if tree.exists(f"splits/{s}.txt")]
    if listed:
        yield from _listed_members(tree, listed)
        return
    for stem in itertools.chain(photos, (s for s in masks if s not in photos)):
        folder = stem.split("/", 1)[0]
        split = folder if folder in splits and "/" in stem else ""
        if split or not chosen:
            yield stem, split


def _listed_members(tree: Tree, splits: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Stems in the order of the split files; a line may also carry the photo's suffix."""
    seen: dict[str, str] = {}
    for split in splits:
        for line in tree.read_lines(f"splits/{split}.txt"):
            text = line.strip()
            stem = text.rsplit(".", 1)[0] if text.lower().endswith(IMAGE_SUFFIXES) else text
            if not stem:
                continue
            if stem in seen:
                where = (
                    f"splits/{seen[stem]}.txt and splits/{split}.txt" if seen[stem] != split else f"splits/{split}.txt"
                )
                raise ConfigError(f"{tree.source}: {stem} is listed twice, in {where}", "list every sample once")
            seen[stem] = split
            yield stem, split


def _item(
    tree: Tree, stem: str, split: str, files: _Files, class_file: ObjectInfo | None, with_objects: bool
) -> PlanItem:
    """The item of a stem; ``with_objects``: the dataset has them."""
    detail: dict[str, Any] = {
        "label": files.mask.uri if files.mask else tree.uri(f"masks/{stem}.png"),
        "classes": (class_file.uri, class_file.etag) if class_file else ("", ""),
    }
    parts = [files.photo, files.mask, *([class_file] if class_file else [])]
    if with_objects:
        detail["objects"] = files.objects.uri if files.objects else tree.uri(f"instances/{stem}.png")
        parts.append(files.objects)
    return PlanItem(
        sample_id=stem,
        uri=files.photo.uri if files.photo else tree.uri(f"images/{stem}"),
        etag=reading.joint_etag(*parts),
        bytes=sum(i.size for i in files if i),
        detail=json.dumps(detail),
        split=split,
    )


def _label_ids(mask: NDArray[Any], uri: str, class_uri: str, class_etag: str) -> NDArray[np.uint16]:
    if mask.ndim == 3:
        return reading.ids_of_colors(mask, _colors(class_uri, class_etag), uri)
    reading.check_ids(mask, _known(class_uri, class_etag), uri)
    return mask.astype(np.uint16)


# -- objects ---------------------------------------------------------------------------------------------------------


def _object_map(uri: str, info: "PhotoInfo", item: PlanItem) -> NDArray[np.uint16]:
    """The objects' numbers (height, width)."""
    found = reading.read_label(uri)
    if found.ndim != 2:
        raise DataError(f"object map {uri} is in colour", "write object numbers as a grey PNG", "label-type", uri)
    reading.check_size(found, info, uri, item.uri)
    return found.astype(np.uint16)


def _with_objects(sample: Sample, objects: NDArray[np.uint16], classes: ClassTable, uri: str) -> Sample:
    """The sample with its instances and panoptic segments."""
    labels = sample.semantic
    assert labels is not None
    ignored = np.zeros(_IDS, np.bool_)
    ignored[list(classes.ignore_ids)] = True
    void = ignored[labels]
    objects[void] = 0
    label_of = _labels_of_objects(objects, labels, uri)
    ids = np.where(objects > 0, objects, labels.astype(np.uint32) + _IDS)
    ids[void] = 0
    things = {c.label_id for c in classes.classes if c.isthing}

    def category_of(number: int) -> int:
        return int(label_of[number]) if number < _IDS else number - _IDS

    def is_group(number: int) -> bool:
        return number >= _IDS and number - _IDS in things

    found = reading.instances_of_map(ids, lambda n: category_of(n) if n else None, is_group)
    segments = [Segment(i.id, i.category_id, i.area, i.bbox_xywh, i.iscrowd) for i in found]
    panoptic, _, _ = reading.panoptic_of(ids, segments, uri)
    instances = tuple(i for i in found if i.id < _IDS or i.iscrowd)
    return replace(sample, instances=instances, panoptic=panoptic, segments=tuple(segments))


def _labels_of_objects(
    objects: NDArray[np.uint16], labels: NDArray[np.uint8] | NDArray[np.uint16], uri: str
) -> NDArray[np.uint16]:
    """Label id by object number.

    Raises:
        DataError: ``mixed-object``.
    """
    label_of = np.zeros(_IDS, np.uint16)
    label_of[objects] = labels
    mixed = (objects > 0) & (label_of[objects] != labels)
    if mixed.any():
        number = int(objects[mixed][0])
        names = np.unique(labels[objects == number]).tolist()
        problem = f"the object {number} of {uri} lies on the label ids {names[:5]}"
        raise DataError(problem, "give every object one class in its mask", "mixed-object", uri)
    return label_of
