"""Somebody's own dataset: ``images/`` and ``masks/`` with the same file stems."""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.class_file import FILE_NAMES, read_class_file
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError
from segbatch.records import ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

_SPLITS = ("train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing")
"""Sub-folders of ``images/`` that are splits, and the order of splits; other sub-folders are only part of the path."""

_MASK_SUFFIXES = (".png",)


class ImageMasks(Dataset):
    """``images/STEM.jpg`` beside ``masks/STEM.png``, sub-folders alike.

    Optional: ``classes.toml``, ``classes.json`` or ``classes.txt`` (see ``class_file``); ``splits/NAME.txt`` with a
    stem a line, or sub-folders ``images/train`` ... Masks are grey (1 to 16 bit) or palette PNG of label ids, or RGB
    when the classes have colours. Without a class file every id is accepted and is named by its number.
    """

    name: ClassVar[str] = "image-masks"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)

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
        photos = _by_stem(tree, "images", IMAGE_SUFFIXES)
        masks = _by_stem(tree, "masks", _MASK_SUFFIXES)
        if not photos and not masks:
            raise ConfigError(f"{tree.source}/images holds no image", f"endings that count: {' '.join(IMAGE_SUFFIXES)}")
        class_file = _class_file(tree)
        for stem, split in _members(tree, wanted, bool(splits), photos, masks):
            yield _pair(tree, stem, split, (photos.get(stem), masks.get(stem)), class_file)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo and its mask.

        Raises:
            DataError: a missing or broken file, a mask of another size, an id or colour that no class has.
        """
        detail = reading.detail_of(item)
        data, info = reading.read_photo(item.uri)
        label_uri = str(detail["label"])
        mask = reading.read_label(label_uri)
        reading.check_size(mask, info, label_uri, item.uri)
        yield replace(reading.sample_of(item, data, info), semantic=_label_ids(mask, label_uri, *detail["classes"]))


def _class_file(tree: Tree) -> ObjectInfo | None:
    found = [i for i in map(tree.stat, FILE_NAMES) if i]
    if len(found) > 1:
        names = " and ".join(storage.name_of(i.uri) for i in found)
        raise ConfigError(f"{tree.source} has {names}", "keep one of them")
    return found[0] if found else None


@functools.lru_cache(maxsize=8)
def _table(uri: str, etag: str) -> ClassTable:
    return read_class_file(uri)


@functools.lru_cache(maxsize=8)
def _known(uri: str, etag: str) -> NDArray[np.bool_]:
    return reading.known_ids(_table(uri, etag) if uri else ClassTable(()))


@functools.lru_cache(maxsize=8)
def _colors(uri: str, etag: str) -> reading.Colors:
    return reading.Colors.of(_table(uri, etag) if uri else ClassTable(()))


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


def _pair(
    tree: Tree,
    stem: str,
    split: str,
    files: tuple[ObjectInfo | None, ObjectInfo | None],
    class_file: ObjectInfo | None,
) -> PlanItem:
    photo, mask = files
    classes = (class_file.uri, class_file.etag) if class_file else ("", "")
    label_uri = mask.uri if mask else tree.uri(f"masks/{stem}.png")
    return PlanItem(
        sample_id=stem,
        uri=photo.uri if photo else tree.uri(f"images/{stem}"),
        etag=reading.joint_etag(photo, mask, *([class_file] if class_file else [])),
        bytes=sum(i.size for i in (photo, mask) if i),
        detail=json.dumps({"label": label_uri, "classes": classes}),
        split=split,
    )


def _label_ids(mask: NDArray[Any], uri: str, class_uri: str, class_etag: str) -> NDArray[np.uint16]:
    if mask.ndim == 3:
        return reading.ids_of_colors(mask, _colors(class_uri, class_etag), uri)
    reading.check_ids(mask, _known(class_uri, class_etag), uri)
    return mask.astype(np.uint16)
