"""KITTI semantics 2015: 200 training and 200 test images with semantic and instance labels.

Source: cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015, data_semantics.zip and the README of its
devkit. H. Abu Alhaija et al., "Augmented Reality Meets Computer Vision", IJCV 2018.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.datasets import reading, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.cityscapes import FROM_INSTANCE_IDS, instances_of, refuse_train_ids
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, Instance, Issue, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

CLASSES = tables.load("kitti")

_TRAINING, _TESTING = "training", "testing"
_PHOTOS = "image_2"
_MAPS = {"semantic": "labels", "instance": "instances"}
_PER_CLASS = 256

_KNOWN = reading.known_ids(CLASSES)


class Kitti(Dataset):
    """``training/{image_2,semantic,instance}/NNNNNN_10.png`` and ``testing/image_2/``.

    Files of training and testing have the same names, so a sample id is SPLIT/NNNNNN_10; ``group_id`` is SPLIT/NNNNNN.
    Classes are those of Cityscapes. A value of an instance map is 256 * label id + number of the object, and stays
    the instance's id; number 0 of a class with instances means that its objects were not told apart: one instance with
    ``iscrowd``. Without ``semantic/`` the label map follows from the instance map, and an issue says so.
    """

    name: ClassVar[str] = "kitti"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic", "instance")
    official_splits: ClassVar[tuple[str, ...]] = (_TRAINING, _TESTING)
    formats: ClassVar[tuple[str, ...]] = ("kitti", "kitti-instances")

    def recognises(self, tree: Tree) -> bool:
        """Whether training has its photos, and semantic or instance maps."""
        folders = [tree.is_folder(f"{_TRAINING}/{folder}") for folder in (_PHOTOS, *_MAPS)]
        return folders[0] and any(folders[1:])

    def classes(self, tree: Tree) -> ClassTable:
        """The ids 0..33 of Cityscapes."""
        return CLASSES

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those of training and testing that have photos."""
        return tuple(s for s in self.official_splits if tree.is_folder(f"{s}/{_PHOTOS}"))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Images by name; labels whose photo is missing stay items.

        Raises:
            ConfigError: no KITTI root, no such split.
        """
        there = self.splits(tree)
        if not there:
            expected = "training/image_2/NNNNNN_10.png with training/semantic/ and training/instance/"
            raise ConfigError(f"{tree.source} is not KITTI semantics 2015", f"expected {expected}")
        for split in reading.choose_splits(self.name, tree.source, there, splits):
            photos = _pngs(tree, f"{split}/{_PHOTOS}")
            maps = {key: _pngs(tree, f"{split}/{folder}") for folder, key in _MAPS.items()}
            for name in sorted({*photos, *(n for found in maps.values() for n in found)}):
                labels = {key: found[name] for key, found in maps.items() if name in found}
                yield _item(tree, split, name, photos.get(name), labels)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its labels; those of testing are not public.

        Raises:
            DataError: a missing or broken file, a map of another size, an id that no class has.
        """
        detail = reading.detail_of(item)
        data, info = reading.read_photo(item.uri)
        semantic, ids, issues = _maps(item, detail, info)
        instances, more = _instances(ids, str(detail.get("instances", "")))
        yield replace(
            reading.sample_of(item, data, info), semantic=semantic, instances=instances, issues=(*issues, *more)
        )


def _pngs(tree: Tree, folder: str) -> dict[str, ObjectInfo]:
    return {path.rsplit(".", 1)[0]: info for path, info in tree.files(folder, (".png",), recursive=False)}


def _item(tree: Tree, split: str, name: str, photo: ObjectInfo | None, labels: Mapping[str, ObjectInfo]) -> PlanItem:
    uris = {key: info.uri for key, info in labels.items()}
    if not uris and split == _TRAINING:
        uris = {"labels": tree.uri(f"{split}/semantic/{name}.png")}
    files = labels.values() if labels or split != _TRAINING else (None,)
    sample_id = f"{split}/{name}"
    return PlanItem(
        sample_id=sample_id,
        uri=photo.uri if photo else tree.uri(f"{split}/{_PHOTOS}/{name}.png"),
        etag=reading.joint_etag(photo, *files),
        bytes=sum(i.size for i in (photo, *files) if i),
        detail=json.dumps(uris),
        group_id=sample_id.rsplit("_", 1)[0],
        split=split,
    )


def _maps(
    item: PlanItem, detail: Mapping[str, Any], info: "PhotoInfo"
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, tuple[Issue, ...]]:
    """The label map, the instance map, and what there is to say about them; None where there is none."""
    ids = None
    if "instances" in detail:
        ids = _read_map(str(detail["instances"]), item, info)
        reading.check_ids(ids, _known_instance_ids(), str(detail["instances"]))
    if "labels" in detail:
        uri = str(detail["labels"])
        label = _read_map(uri, item, info)
        refuse_train_ids(label, uri)
        reading.check_ids(label, _KNOWN, uri)
        return label, ids, ()
    if ids is None:
        return None, None, ()
    note = f"{item.sample_id} has no semantic map: its labels follow from {detail['instances']}"
    return (ids // _PER_CLASS).astype(np.uint8), ids, (Issue(FROM_INSTANCE_IDS, note),)


def _read_map(uri: str, item: PlanItem, info: "PhotoInfo") -> NDArray[Any]:
    found = reading.read_label(uri)
    if found.ndim != 2:
        fix = "give the grey maps of semantic/ and instance/, not semantic_rgb/"
        raise DataError(f"label map {uri} is in colour", fix, "label-type", uri)
    reading.check_size(found, info, uri, item.uri)
    return found


@cache
def _known_instance_ids() -> NDArray[np.bool_]:
    return _KNOWN[np.arange(len(_KNOWN)) // _PER_CLASS]


def _instances(ids: NDArray[Any] | None, uri: str) -> tuple[tuple[Instance, ...] | None, tuple[Issue, ...]]:
    if ids is None:
        return None, ()
    from segbatch.codecs import rle

    return instances_of(rle.instances_of(ids), lambda i: i // _PER_CLASS, lambda i: i % _PER_CLASS == 0, uri)
