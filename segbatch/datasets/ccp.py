"""Clothing Co-Parsing: photos of people with a label for every pixel (1,004) or tags for the whole image (1,094).

``photos/NNNN.jpg``, ``annotations/pixel-level/NNNN.mat`` (variable ``groundtruth``),
``annotations/image-level/NNNN.mat`` (variable ``tags``) and ``label_list.mat``; the owners name no splits.

Source: W. Yang, P. Luo, L. Lin, "Clothing Co-Parsing by Joint Image Segmentation and Labeling", CVPR 2014;
github.com/bearpaw/clothing-co-parsing, ``README.md``, ``show_pixel_anno.m``, ``show_image_anno.m``.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import mat
from segbatch.datasets import pairing, reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, Issue, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

PIXELS = "annotations/pixel-level"
GROUNDTRUTH = "groundtruth"
"""The variable of a pixel-level annotation: label ids, uint8 of shape (height, width)."""

_PHOTOS, _IMAGES, _TAGS = "photos", "annotations/image-level", "tags"
_MAT = (".mat",)


class Ccp(Dataset):
    """``photos/``, ``annotations/pixel-level/`` and ``annotations/image-level/``.

    Photos with tags alone have no label map; their tags (label ids) stand in ``attributes["tags"]``.
    """

    name: ClassVar[str] = "ccp"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    formats: ClassVar[tuple[str, ...]] = ("ccp",)

    def recognises(self, tree: Tree) -> bool:
        """Whether photos and one of the two kinds of annotation are here."""
        return tree.is_folder(_PHOTOS) and any(tree.is_folder(folder) for folder in (PIXELS, _IMAGES))

    def classes(self, tree: Tree) -> ClassTable:
        """The 59 tags of ``label_list.mat``; 0, ``null``, is the background."""
        return load(self.name)

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """None."""
        return ()

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The photos by number, then annotations without a photo.

        Raises:
            ConfigError: not this layout, or any split.
        """
        if not self.recognises(tree):
            expected = f"expected folders {_PHOTOS}/, {PIXELS}/ and {_IMAGES}/"
            raise ConfigError(f"{tree.source} is not Clothing Co-Parsing", expected)
        reading.choose_splits(self.name, tree.source, (), splits)
        photos, twins = pairing.by_stem(tree.files(_PHOTOS, reading.IMAGE_SUFFIXES, recursive=False))
        pixels, tags = (pairing.by_stem(tree.files(f, _MAT, recursive=False))[0] for f in (PIXELS, _IMAGES))
        orphans = sorted({*pixels, *tags} - {*photos})
        for stem in itertools.chain(photos, orphans):
            yield _item(tree, stem, photos.get(stem), pixels.get(stem), tags.get(stem))
        yield from (pairing.twin(path, info, photos[path.rsplit(".", 1)[0]].uri) for path, info in twins)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo with its label map, its tags, or both.

        Raises:
            DataError: a missing or broken file, no annotation, ``size-mismatch``, ``unknown-label``.
        """
        pairing.check(item)
        data, info = reading.read_photo(item.uri)
        detail = reading.detail_of(item)
        pixels, tags = str(detail["pixels"]), str(detail["tags"])
        if not pixels and not tags:
            problem = f"photo {item.uri} has neither {PIXELS}/{item.sample_id}.mat nor {_IMAGES}/{item.sample_id}.mat"
            raise DataError(problem, "add one or remove the photo", "missing-label", item.uri)
        found, issues = _tags(tags) if tags else (None, ())
        yield replace(
            reading.sample_of(item, data, info),
            semantic=_label_map(pixels, item.uri, info) if pixels else None,
            attributes={} if found is None else {"tags": found},
            issues=issues,
        )


def label_map(uri: str) -> NDArray[np.uint16]:
    """The label ids of a pixel-level annotation, uint16 of shape (height, width).

    Raises:
        ObjectMissing: the file is not there.
        DataError: ``bad-mat`` (see ``codecs.mat``); ``bad-label``: not a matrix of whole numbers in 0..65535.
    """
    found = mat.read(storage.read_bytes(uri), GROUNDTRUTH, uri)
    if found.ndim != 2 or found.dtype.kind not in "iu" or found.size == 0:
        problem = f"{GROUNDTRUTH} of {uri} is {found.dtype} of shape {found.shape}, not a matrix of label ids"
        raise DataError(problem, "write uint8 of height x width", "bad-label", uri)
    if int(found.min()) < 0 or int(found.max()) > np.iinfo(np.uint16).max:
        problem = f"{GROUNDTRUTH} of {uri} has values from {found.min()} to {found.max()}"
        raise DataError(problem, "write label ids as uint8", "bad-label", uri)
    return np.ascontiguousarray(found, np.uint16)


def _label_map(uri: str, photo_uri: str, info: "PhotoInfo") -> NDArray[np.uint16]:
    try:
        label = label_map(uri)
    except ObjectMissing as error:
        raise DataError(f"label map {uri} is not there", "run again", "missing-label", uri) from error
    reading.check_size(label, info, uri, photo_uri)
    reading.check_ids(label, reading.known_ids(load(Ccp.name)), uri)
    return label


def _tags(uri: str) -> tuple[list[int], tuple[Issue, ...]]:
    """The tags of an image-level annotation as they stand there, and an issue for every unknown one."""
    try:
        found = mat.read(storage.read_bytes(uri), _TAGS, uri).ravel().tolist()
    except ObjectMissing as error:
        raise DataError(f"the tags {uri} are not there", "run again", "missing-label", uri) from error
    known = {c.label_id for c in load(Ccp.name).classes}
    strange = [t for t in found if t not in known]
    return (
        [int(t) for t in found if t in known],
        tuple(Issue("unknown-tag", f"the tag {t} of {uri} is none of {len(known)}; left out") for t in strange),
    )


def _item(
    tree: Tree, stem: str, photo: ObjectInfo | None, pixels: ObjectInfo | None, tags: ObjectInfo | None
) -> PlanItem:
    annotations = [a for a in (pixels, tags) if a]
    return PlanItem(
        sample_id=stem,
        uri=photo.uri if photo else tree.uri(f"{_PHOTOS}/{stem}.jpg"),
        etag=reading.joint_etag(photo, *annotations),
        bytes=sum(i.size for i in (photo, *annotations) if i),
        detail=json.dumps({"pixels": pixels.uri if pixels else "", "tags": tags.uri if tags else ""}),
    )
