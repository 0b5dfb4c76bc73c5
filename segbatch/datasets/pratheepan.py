"""Pratheepan: 32 portraits and 46 family photos with their skin painted white.

``Pratheepan_Dataset/FacePhoto/NAME.jpg`` and ``Pratheepan_Dataset/FamilyPhoto/NAME.jpg`` (some ``.png`` and ``.jpeg``)
with ``Ground_Truth/GroundT_FacePhoto/NAME.png`` and ``Ground_Truth/GroundT_FamilyPhoto/NAME.png``; the owners name no
splits.

Source: W. R. Tan, C. S. Chan, P. Yogarajah, J. Condell, "A Fusion Approach for Efficient Human Skin Detection", IEEE
T-II 8(1), 2012; cs-chan.com/downloads_skin_dataset.html (``Face_Dataset``).
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import pairing, reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

THRESHOLD = 128
"""Pixels of the ground truth are skin where they are brighter than this, 0..255."""

_SUBSETS = {"face": "FacePhoto", "family": "FamilyPhoto"}
_PHOTOS, _LABELS = ("Pratheepan_Dataset/", ""), ("Ground_Truth/", "Pratheepan_Dataset/", "")
"""Where the folders of the two downloads are found: as they come, or moved together."""

_LUMA = np.array([299, 587, 114], np.uint32)  # ITU-R BT.601, in thousandths


class Pratheepan(Dataset):
    """``FacePhoto/``, ``FamilyPhoto/`` and their ``GroundT_`` folders; sample ids: ``face/NAME``, ``family/NAME``."""

    name: ClassVar[str] = "pratheepan"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)

    def recognises(self, tree: Tree) -> bool:
        """Whether a subset has its photos and its ground truth here."""
        return any(_folder(tree, _PHOTOS, n) and _folder(tree, _LABELS, f"GroundT_{n}") for n in _SUBSETS.values())

    def classes(self, tree: Tree) -> ClassTable:
        """0 non-skin, 1 skin."""
        return load(self.name)

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """None."""
        return ()

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The portraits, then the family photos, by name; in each, ground truth without a photo comes last.

        Raises:
            ConfigError: not this layout, or any split.
        """
        if not self.recognises(tree):
            expected = (
                "expected Pratheepan_Dataset/FacePhoto/ and Ground_Truth/GroundT_FacePhoto/ (likewise FamilyPhoto)"
            )
            raise ConfigError(f"{tree.source} is not the Pratheepan dataset", expected)
        reading.choose_splits(self.name, tree.source, (), splits)
        for subset in _SUBSETS:
            yield from _subset_items(tree, subset)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo and its skin.

        Raises:
            DataError: a missing or broken file, ``size-mismatch``.
        """
        pairing.check(item)
        data, info = reading.read_photo(item.uri)
        subset = item.sample_id.split("/", 1)[0]
        label = _skin(str(reading.detail_of(item)["label"]), item.uri, info)
        yield replace(reading.sample_of(item, data, info), semantic=label, attributes={"subset": subset})


def _folder(tree: Tree, above: Sequence[str], name: str) -> str:
    """Path of a folder below the first of ``above`` that has it, or empty."""
    return next((f"{a}{name}" for a in above if tree.is_folder(f"{a}{name}")), "")


def _subset_items(tree: Tree, subset: str) -> Iterator[PlanItem]:
    name = _SUBSETS[subset]
    photo_folder = _folder(tree, _PHOTOS, name) or f"{_PHOTOS[0]}{name}"
    label_folder = _folder(tree, _LABELS, f"GroundT_{name}") or f"{_LABELS[0]}GroundT_{name}"
    photos, twins = pairing.by_stem(tree.files(photo_folder, reading.IMAGE_SUFFIXES, recursive=False))
    labels, more = pairing.by_stem(tree.files(label_folder, reading.IMAGE_SUFFIXES, recursive=False))
    for stem in itertools.chain(photos, (s for s in labels if s not in photos)):
        photo, label = photos.get(stem), labels.get(stem)
        yield _item(tree, f"{subset}/{stem}", (photo_folder, label_folder), photo, label)
    yield from (_twin(subset, path, info, photos) for path, info in twins)
    yield from (_twin(f"{subset}/{label_folder}", path, info, labels) for path, info in more)


def _twin(prefix: str, path: str, info: ObjectInfo, first: dict[str, ObjectInfo]) -> PlanItem:
    return pairing.twin(f"{prefix}/{path}", info, first[path.rsplit(".", 1)[0]].uri)


def _item(
    tree: Tree, sample_id: str, folders: tuple[str, str], photo: ObjectInfo | None, label: ObjectInfo | None
) -> PlanItem:
    stem = sample_id.split("/", 1)[1]
    return PlanItem(
        sample_id=sample_id,
        uri=photo.uri if photo else tree.uri(f"{folders[0]}/{stem}.jpg"),
        etag=reading.joint_etag(photo, label),
        bytes=sum(i.size for i in (photo, label) if i),
        detail=json.dumps({"label": label.uri if label else tree.uri(f"{folders[1]}/{stem}.png")}),
    )


def _skin(uri: str, photo_uri: str, info: "PhotoInfo") -> NDArray[np.uint16]:
    """1 where the ground truth is bright; it may be grey, in colour or of a palette."""
    from segbatch.codecs import photo

    try:
        data = storage.read_bytes(uri)
    except ObjectMissing as error:
        problem, fix = f"ground truth {uri} is not there", "add it or remove the photo"
        raise DataError(problem, fix, "missing-label", uri) from error
    try:
        rgb, _ = photo.decode(data, uri)
    except DataError as error:
        raise DataError(f"ground truth {uri}: {error.problem}", error.fix, "bad-label", uri) from error
    reading.check_size(rgb, info, uri, photo_uri)
    return (rgb @ _LUMA > THRESHOLD * 1000).astype(np.uint16)
