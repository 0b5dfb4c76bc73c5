"""COCO: photos with a mask for every object (instances), or a segment for every pixel (panoptic).

``annotations/instances_SPLIT.json`` with polygons and runs; ``annotations/panoptic_SPLIT.json`` with
``annotations/panoptic_SPLIT/*.png``, whose RGB values are segment ids (R + 256 G + 256^2 B, 0 is void). The photos lie
in ``SPLIT/``. Splits are ``train2017``, ``val2017``, ``train2014``, ``val2014``, or whatever the file name says: other
datasets in COCO's form are read the same way, with the categories of their own files.

``panoptic_annotations_trainval2017.zip`` holds archives of its own: unpack it, and those may stay packed.

Source: cocodataset.org/#download and #format-data; github.com/cocodataset/panopticapi, ``panopticapi/utils.py``
(rgb2id).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import annotation_json, coco_form, pairing, reading
from segbatch.datasets.annotation_json import CocoAnnotation, PanopticAnnotation, PanopticSegment
from segbatch.datasets.base import Dataset
from segbatch.datasets.coco_form import Detail, Document, Planned
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, Instance, Issue, PlanItem, Sample, Segment, Task
from segbatch.storage import ObjectInfo

UNKNOWN_CATEGORY = "unknown-category"
"""Code of the issue of an annotation that is left out because no category has its id."""

_INSTANCES, _PANOPTIC = "instances", "panoptic"


class CocoInstances(Dataset):
    """``annotations/instances_SPLIT.json`` and photos in ``SPLIT/``; also without any photo: labels only.

    A sample id is the image's id. ``attributes`` holds the image's ``file_name``, ``license``, ``coco_url``,
    ``flickr_url``, ``date_captured``, and the file's ``info``. Instances keep the file's ids, boxes and areas.
    """

    name: ClassVar[str] = "coco-instances"
    tasks: ClassVar[tuple[Task, ...]] = ("instance",)
    official_splits: ClassVar[tuple[str, ...]] = coco_form.SPLITS
    formats: ClassVar[tuple[str, ...]] = ("coco",)

    def recognises(self, tree: Tree) -> bool:
        """Whether an ``instances_SPLIT.json`` is here."""
        return bool(coco_form.documents(tree, _INSTANCES))

    def classes(self, tree: Tree) -> ClassTable:
        """The categories of the files; colours from the official table.

        Raises:
            ConfigError: a file that cannot be read, or two that disagree.
        """
        return coco_form.class_table(coco_form.documents(tree, _INSTANCES), load(self.name), is_thing=True)

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """By file name, the official ones first."""
        return tuple(d.split for d in coco_form.documents(tree, _INSTANCES))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The images of each file in its order; see ``coco_form.planned``.

        Raises:
            ConfigError: no such file, no such split, a broken file, or two files that have an image of the same id.
        """
        there = coco_form.documents(tree, _INSTANCES)
        if not there:
            expected = "expected annotations/instances_SPLIT.json and photos in SPLIT/"
            raise ConfigError(f"{tree.source} is not COCO", expected)
        taken = Planned()
        for document in coco_form.choose(self.name, tree.source, there, splits):
            yield from coco_form.planned(tree, document, load(self.name), taken)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo and its instances.

        Raises:
            DataError: a missing or broken photo, ``size-mismatch``, ``bad-annotation``, and what
                ``coco_form.planned`` refuses.
        """
        detail = coco_form.detail_of(item)
        sample = coco_form.sample_of(item, detail)
        annotations = annotation_json.decode_annotations(detail.text, detail.document)
        instances, issues = instances_of(annotations, sample.height, sample.width, detail)
        yield replace(sample, instances=instances, issues=(*sample.issues, *issues))


def instances_of(
    annotations: Sequence[CocoAnnotation], height: int, width: int, detail: Detail
) -> tuple[tuple[Instance, ...], list[Issue]]:
    """The instances of an image in file order; those of unknown categories are left out."""
    from segbatch.codecs import rle

    known = [a for a in annotations if a.category_id not in detail.unknown]
    issues = [_unknown(a.id, a.category_id, detail) for a in annotations if a.category_id in detail.unknown]
    ids, renumbered = coco_form.unique_ids([a.id for a in known], detail.document)
    shapes = [(f"annotation {a.id!r}", a.segmentation) for a in known]
    counts, complaints = coco_form.masks(shapes, height, width, detail.document)
    issues += [*renumbered, *(Issue(c.code, c.text, ids[c.place]) for c in complaints)]
    instances = (
        Instance(
            id=number,
            category_id=a.category_id,
            bbox_xywh=a.bbox,
            area=float(rle.area(mask)) if a.area is None else a.area,
            iscrowd=bool(a.iscrowd),
            counts=mask,
        )
        for number, a, mask in zip(ids, known, counts, strict=True)
    )
    return tuple(instances), issues


def _unknown(number: int | str, category_id: int, detail: Detail) -> Issue:
    problem = f"annotation {number!r} of {detail.document} is of the category {category_id}, which is none; left out"
    return Issue(UNKNOWN_CATEGORY, problem, number if isinstance(number, int) else None)


# -- panoptic --------------------------------------------------------------------------------------------------------


class CocoPanoptic(Dataset):
    """``annotations/panoptic_SPLIT.json``, ``annotations/panoptic_SPLIT/*.png`` (or ``.zip``), photos in ``SPLIT/``.

    Ids and attributes as in ``coco-instances``; segments keep the file's ids, boxes and areas.
    """

    name: ClassVar[str] = "coco-panoptic"
    tasks: ClassVar[tuple[Task, ...]] = ("panoptic",)
    official_splits: ClassVar[tuple[str, ...]] = coco_form.SPLITS
    formats: ClassVar[tuple[str, ...]] = ("coco-panoptic",)

    def recognises(self, tree: Tree) -> bool:
        """Whether a ``panoptic_SPLIT.json`` is here, and a folder or archive that is called like it."""
        return bool(_panoptic_documents(tree))

    def classes(self, tree: Tree) -> ClassTable:
        """The categories of the files, things and stuff.

        Raises:
            ConfigError: a file that cannot be read, or two that disagree.
        """
        return coco_form.class_table(_panoptic_documents(tree), load(self.name), is_thing=False)

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """By file name, the official ones first."""
        return tuple(d.split for d in _panoptic_documents(tree))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The images of each file in its order, see ``coco_form.planned``; then label maps that it does not list.

        Raises:
            ConfigError: no such file, no such split, a broken file, two files that have an image of the same id, or
                label maps in an archive that lies in an archive.
        """
        there = _panoptic_documents(tree)
        if not there:
            expected = "expected annotations/panoptic_SPLIT.json, annotations/panoptic_SPLIT/*.png and photos in SPLIT/"
            raise ConfigError(f"{tree.source} is not COCO panoptic", expected)
        taken = Planned()
        for document in coco_form.choose(self.name, tree.source, there, splits):
            maps = LabelMaps.of(tree, document)
            yield from coco_form.planned(tree, document, load(self.name), taken, maps.find)
            yield from maps.unlisted(document)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo with its index map and segments.

        Segments of unknown categories, and a segment of id 0 (which is void), are left out; pixels of the former become
        void.

        Raises:
            DataError: a missing or broken photo or label map, ``size-mismatch``, ``unknown-segment``,
                ``duplicate-segment``, ``bad-annotation``, and what ``coco_form.planned`` refuses.
        """
        detail = coco_form.detail_of(item)
        sample = coco_form.sample_of(item, detail)
        annotation = _annotation_of(item, detail)
        ids = segment_ids(detail.label, (sample.height, sample.width))
        segments, issues = _segments_of(annotation.segments_info, ids, detail)
        panoptic, kept, more = reading.panoptic_of(ids, segments, detail.label)
        yield replace(sample, panoptic=panoptic, segments=kept, issues=(*sample.issues, *issues, *more))


def segment_ids(uri: str, size: tuple[int, int]) -> NDArray[np.uint32]:
    """The segment ids of a panoptic PNG (rgb2id).

    Args:
        uri: the file.
        size: height and width that it has to have.

    Returns:
        uint32 of shape (height, width), 0 is void.

    Raises:
        DataError: ``missing-label``, ``bad-label``: not RGB, ``size-mismatch``, and what ``read_label`` finds.
    """
    colors = reading.read_label(uri)
    if colors.ndim != 3:
        fix = "write ids as R + 256 G + 256^2 B in an RGB PNG"
        raise DataError(f"panoptic map {uri} is not RGB", fix, "bad-label", uri)
    if colors.shape[:2] != size:
        problem = f"panoptic map {uri} is {colors.shape[1]} x {colors.shape[0]}, its photo is {size[1]} x {size[0]}"
        raise DataError(problem, "make it on the photo's own grid", "size-mismatch", uri)
    red, green, blue = (colors[..., i].astype(np.uint32) for i in range(3))
    return red + 256 * green + 65536 * blue


class _FileName(msgspec.Struct, frozen=True):
    file_name: str = ""


_FILE_NAME = msgspec.json.Decoder(_FileName)


@dataclass(frozen=True, slots=True)
class LabelMaps:
    """The PNG files of a panoptic document, by their path in its folder."""

    base: str
    files: dict[str, ObjectInfo]
    used: set[str]

    @classmethod
    def of(cls, tree: Tree, document: Document) -> "LabelMaps":
        """Those in the folder or archive that is called like the document.

        Raises:
            ConfigError: that archive lies in an archive.
        """
        folder = next((f for f in (document.path, document.name) if tree.is_folder(f)), "")
        if folder:
            return cls(tree.uri(folder), dict(tree.files(folder, (".png",))), set())
        archive = tree.stat(f"{document.path}.zip")
        if archive is None:
            return cls(tree.uri(document.path), {}, set())
        if not storage.is_archive(archive.uri):
            fix = "unpack the outer archive and name the folder; the one inside may stay packed"
            raise ConfigError(f"{archive.uri} is an archive in an archive", fix)
        root = storage.archive_root(archive.uri)
        found = {storage.relative(i.uri, root): i for i in storage.list_files(root, (".png",))}
        return cls(root, {p.removeprefix(f"{document.name}/"): i for p, i in found.items()}, set())

    def find(self, raws: Sequence[memoryview]) -> tuple[str, ObjectInfo | None]:
        """Address and file of an image's label map; nothing where its annotation names none."""
        try:
            name = _FILE_NAME.decode(raws[0]).file_name if raws else ""
        except msgspec.DecodeError:
            return "", None  # ``read`` says what is wrong with the annotation
        path = coco_form.safe_path(name)
        if not path:
            return "", None
        info = self.files.get(path)
        if info:
            self.used.add(path)
        return (info.uri, info) if info else (storage.join(self.base, path), None)

    def unlisted(self, document: Document) -> Iterator[PlanItem]:
        """An item for every label map that no annotation names; ``read`` refuses it."""
        for path, info in self.files.items():
            if path not in self.used:
                problem = f"panoptic map {info.uri} is not listed by {document.file.uri}"
                error = DataError(problem, "list or remove it", "unlisted-label", info.uri)
                sample_id = f"{document.name}#{path}"
                yield pairing.refused(sample_id, info.uri, info.etag, info.size, error, document.split)


def _panoptic_documents(tree: Tree) -> list[Document]:
    """Annotation files that have label maps."""
    found = coco_form.documents(tree, _PANOPTIC)
    return [d for d in found if any(map(tree.is_folder, (d.path, d.name))) or tree.stat(f"{d.path}.zip")]


def _annotation_of(item: PlanItem, detail: Detail) -> PanopticAnnotation:
    """The one annotation of an image."""
    found = annotation_json.decode_panoptic_annotations(detail.text, detail.document)
    if not found:
        problem = f"{detail.document} has no annotation of the image {item.sample_id}"
        raise DataError(problem, "add it or remove the image", "missing-label", detail.document)
    if len(found) > 1:
        problem = f"{detail.document} has {len(found)} annotations of the image {item.sample_id}"
        raise DataError(problem, "keep one", "bad-annotation", detail.document)
    if not detail.label:
        problem = f"{detail.document} gives {found[0].file_name!r} as the map of the image {item.sample_id}"
        raise DataError(problem, "give a file name below the folder of maps", "bad-annotation", detail.document)
    return found[0]


def _segments_of(
    listed: Sequence[PanopticSegment], ids: NDArray[np.uint32], detail: Detail
) -> tuple[list[Segment], list[Issue]]:
    """The segments in file order; pixels of those that are left out become void in ``ids``."""
    segments: list[Segment] = []
    issues: list[Issue] = []
    for segment in listed:
        if segment.id == 0:
            problem = f"a segment of {detail.document} has the id 0, which is void in {detail.label}; left out"
            issues.append(Issue("void-segment", problem, 0))
        elif segment.category_id in detail.unknown:
            ids[ids == segment.id] = 0
            issues.append(_unknown(segment.id, segment.category_id, detail))
        else:
            segments.append(segment_of(segment, ids))
    return segments, issues


def segment_of(segment: PanopticSegment, ids: NDArray[Any]) -> Segment:
    """A segment with the file's area and box, else those of its pixels in the map of ids."""
    area, box = segment.area, segment.bbox
    if area is None or box is None:
        from segbatch.codecs import rle

        mask = rle.encode(ids == segment.id)
        area = float(rle.area(mask)) if area is None else area
        box = rle.bbox(mask, *ids.shape) if box is None else box
    return Segment(segment.id, segment.category_id, area, box, bool(segment.iscrowd))
