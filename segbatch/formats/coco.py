"""COCO's JSON of instances: results as its server takes them (``coco``), and a whole dataset (``coco-dataset``).

Results: ``detections_SPLIT_segbatch_results.json``, a list of ``image_id``, ``category_id``, ``segmentation`` (``size``
and compressed ``counts``) and ``score``; for the server it goes alone into a zip archive of its name. There is no
``bbox``: where results have one, pycocotools takes its area for that of the object, which moves the figures by size. An
image without objects has no entry.

Dataset: ``annotations/instances_SPLIT.json`` with ``info``, ``licenses``, ``categories``, ``images`` and
``annotations``, all masks as runs; pycocotools, FiftyOne (``COCODetectionDataset``) and ``coco-instances`` read it.
Rows without a split are those of ``default``. Predictions also have a ``score``.

``image_id`` is the sample id, as a number where it is one; see ``coco_form.image_id_of``.

Source: cocodataset.org/#format-results, #upload and #format-data; pycocotools 2.0.11, ``coco.py`` (loadRes).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import msgspec

from segbatch import storage
from segbatch.datasets import annotation_json, coco_form, reading
from segbatch.datasets.annotation_json import CocoImage, ImageId
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import instance_of, item_of, missing, photo_path, refuse_unknown, safe_name, size_of
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Task
from segbatch.storage import ObjectInfo

DEFAULT_SPLIT = "default"

Groups = Mapping[ImageId, list[memoryview]]
"""Raw annotations by image."""

_RESULTS = "_results.json"
_INFO = {"description": "exported by segbatch"}


class CocoResults(Format):
    """``detections_SPLIT_segbatch_results.json``: a list of objects with masks and scores, without boxes.

    Ground truth has the score 1.
    """

    name: ClassVar[str] = "coco"
    task: ClassVar[Task] = "instance"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One file per split.

        Raises:
            ConfigError: two samples have the same image id.
        """
        write_results("detections", output.map(_results, rows), output)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; a sample without results has no objects, and is not missing.

        Raises:
            ConfigError: no JSON file, one that cannot be read, results without masks or scores, of categories that are
                no classes or of images that are no samples, or results of one image in two files.
        """
        documents = [(f, annotation_json.split_results(storage.read_bytes(f.uri), f.uri)) for f in json_files(files)]
        for file, groups in documents:
            _refuse_others(file, groups)
        return items_by_image(files, samples, classes, documents)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The objects of one image, numbered from 1 in the order of the file.

        Masks may be polygons or runs of either kind. A box that the file gives is kept; the area is the mask's.

        Raises:
            DataError: ``bad-annotation``, ``size-mismatch``.
        """
        text, uri, (height, width) = raw_text(item), document_uri(item), size_of(item)
        results = annotation_json.decode_results(text, uri)
        shapes = []
        for number, result in enumerate(results, 1):
            if result.segmentation is None:
                problem = f"result {number} of image {item.sample_id} in {uri} is a box without a mask"
                raise DataError(problem, "give its segmentation", "bad-annotation", uri)
            shapes.append((f"result {number} of image {item.sample_id}", result.segmentation))
        counts, _ = coco_form.masks(shapes, height, width, uri)
        instances = []
        for number, (result, mask) in enumerate(zip(results, counts, strict=True), 1):
            found = instance_of(number, result.category_id, mask, (height, width), result.score)
            instances.append(found if result.bbox is None else replace(found, bbox_xywh=result.bbox))
        yield Prediction(instances=tuple(instances))


def _results(row: Labels) -> "Entries":
    image_id = coco_form.image_id_of(row.sample_id)
    entries = (
        {
            "image_id": image_id,
            "category_id": i.category_id,
            "segmentation": runs(i.counts, row.height, row.width),
            "score": 1.0 if i.score is None else i.score,
        }
        for i in row.instances or ()
    )
    return Entries(row.sample_id, row.split, [msgspec.json.encode(e) for e in entries])


# -- datasets --------------------------------------------------------------------------------------------------------


class CocoDataset(Format):
    """``annotations/instances_SPLIT.json``: a COCO dataset without its photos.

    Ids of annotations are kept; where one occurs in several images, all but the first get new ones, because they are
    unique in COCO's files.
    """

    name: ClassVar[str] = "coco-dataset"
    task: ClassVar[Task] = "instance"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One file per split.

        Raises:
            ConfigError: two samples have the same image id.
        """
        names: dict[ImageId, str] = {}
        files: dict[str, _File] = {}
        for row, image, annotations in output.map(_described, rows):
            unique_image_id(row.sample_id, names)
            files.setdefault(row.split or DEFAULT_SPLIT, _File()).add(row, image, annotations)
        for split, file in (files or {DEFAULT_SPLIT: _File()}).items():
            output.put(f"annotations/instances_{safe_name(split)}.json", file.encoded(classes))

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; a sample that no file lists among its images is missing.

        Raises:
            ConfigError: no JSON file, one that cannot be read, annotations of categories that are no classes or of
                images that are no samples, or one image in two files.
        """
        found = [(f, annotation_json.split_coco(storage.read_bytes(f.uri), f.uri)) for f in json_files(files)]
        listed: dict[ImageId, CocoImage | None] = {i.id: i for _, document in found for i in document.images}
        return items_by_image(files, samples, classes, [(f, _all_images(d)) for f, d in found], listed)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The objects of one image with their ids, boxes and areas, and their scores where they have any.

        Raises:
            DataError: ``missing-prediction``, ``bad-annotation``, ``size-mismatch``.
        """
        from segbatch.codecs import rle

        text, uri, size = raw_text(item), document_uri(item), size_of(item)
        annotations = annotation_json.decode_annotations(text, uri)
        scores = msgspec.json.decode(text, type=list[_Score])
        ids, _ = coco_form.unique_ids([a.id for a in annotations], uri)
        counts, _ = coco_form.masks([(f"annotation {a.id!r}", a.segmentation) for a in annotations], *size, uri)
        instances = (
            Instance(
                id=number,
                category_id=a.category_id,
                bbox_xywh=a.bbox,
                area=float(rle.area(mask)) if a.area is None else a.area,
                iscrowd=bool(a.iscrowd),
                counts=mask,
                score=scored.score,
            )
            for number, a, mask, scored in zip(ids, annotations, counts, scores, strict=True)
        )
        yield Prediction(instances=tuple(instances))


class _Score(msgspec.Struct, frozen=True):
    score: float | None = None


def _all_images(document: annotation_json.CocoDocument) -> Groups:
    """Annotations by image, images without any among them."""
    return {**{image.id: [] for image in document.images}, **document.annotations}


def _described(row: Labels) -> tuple[Labels, bytes, list[tuple[int, bytes]]]:
    """The entry of ``images``, and those of ``annotations`` by id, encoded without it."""
    image_id = coco_form.image_id_of(row.sample_id)
    annotations = []
    for i in row.instances or ():
        entry: dict[str, Any] = {
            "image_id": image_id,
            "category_id": i.category_id,
            "segmentation": runs(i.counts, row.height, row.width),
            "area": i.area,
            "bbox": i.bbox_xywh,
            "iscrowd": int(i.iscrowd),
        }
        if i.score is not None and not row.is_truth:
            entry["score"] = i.score
        annotations.append((i.id, msgspec.json.encode(entry)))
    return row, msgspec.json.encode(image_entry(row)), annotations


def image_entry(row: Labels) -> dict[str, Any]:
    """A row's entry of ``images``, with what is known of it."""
    known = row.attributes
    license_ = known.get("license")
    optional = {
        "license": license_.get("id") if isinstance(license_, dict) else None,
        **{key: known.get(key) for key in ("coco_url", "flickr_url", "date_captured")},
    }
    return {
        "id": coco_form.image_id_of(row.sample_id),
        "file_name": str(known.get("file_name") or photo_path(row)),
        "height": row.height,
        "width": row.width,
        **{key: value for key, value in optional.items() if value is not None},
    }


def runs(counts: bytes, height: int, width: int) -> dict[str, Any]:
    """A mask as COCO's files hold it."""
    return {"size": [height, width], "counts": counts.decode("ascii")}


class Head:
    """``info``, ``licenses`` and ``images`` of a file, gathered row by row."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self._info: Any = None
        self._licenses: dict[Any, Any] = {}

    def add(self, row: Labels, image: bytes) -> None:
        """A row and its entry."""
        self.images.append(image)
        self._info = self._info or row.attributes.get("info")
        license_ = row.attributes.get("license")
        if isinstance(license_, dict) and "id" in license_:
            self._licenses.setdefault(license_["id"], license_)

    def encoded(self, categories: Sequence[Mapping[str, Any]], annotations: Iterable[bytes]) -> bytes:
        """The whole file."""
        licenses = sorted(self._licenses.values(), key=lambda entry: str(entry["id"]))
        parts = (
            b'{"info":' + msgspec.json.encode(self._info or _INFO),
            b'"licenses":' + msgspec.json.encode(licenses),
            b'"categories":' + msgspec.json.encode(categories),
            b'"images":[' + b",\n".join(self.images) + b"]",
            b'"annotations":[' + b",\n".join(annotations) + b"]}\n",
        )
        return b",\n".join(parts)


@dataclass(slots=True)
class _File:
    """One ``instances_SPLIT.json`` in the making."""

    head: Head = field(default_factory=Head)
    annotations: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, row: Labels, image: bytes, annotations: Iterable[tuple[int, bytes]]) -> None:
        """A row with its entries."""
        self.head.add(row, image)
        self.annotations += annotations

    def encoded(self, classes: ClassTable) -> bytes:
        """The whole file."""
        categories = [{"supercategory": c.supercategory, "id": c.label_id, "name": c.name} for c in classes.classes]
        return self.head.encoded(categories, self._numbered())

    def _numbered(self) -> Iterator[bytes]:
        taken: set[int] = set()
        free = max((number for number, _ in self.annotations), default=0) + 1
        for given, entry in self.annotations:
            number, free = (free, free + 1) if given in taken else (given, free)
            taken.add(number)
            yield b'{"id":%d,' % number + entry[1:]


# -- what the formats of COCO share ----------------------------------------------------------------------------------


class Entries(NamedTuple):
    """What results say of one row, as encoded JSON objects."""

    sample_id: str
    split: str
    encoded: list[bytes]


def write_results(kind: str, rows: Iterable[Entries], output: Output) -> None:
    """One ``KIND_SPLIT_segbatch_results.json`` per split.

    Raises:
        ConfigError: two samples have the same image id.
    """
    names: dict[ImageId, str] = {}
    files: dict[str, list[bytes]] = {}
    for row in rows:
        unique_image_id(row.sample_id, names)
        files.setdefault(row.split, []).extend(row.encoded)
    for split, entries in (files or {"": []}).items():
        output.put(f"{results_name(kind, split)}.json", b"[" + b",\n".join(entries) + b"]\n")


def results_name(kind: str, split: str) -> str:
    """The name that the server asks for, without suffix."""
    return "_".join(part for part in (kind, safe_name(split) if split else "", "segbatch", "results") if part)


def unique_image_id(sample_id: str, names: dict[ImageId, str]) -> ImageId:
    """The image id of a sample, which is added to ``names``.

    Raises:
        ConfigError: a sample before has the same.
    """
    image_id = coco_form.image_id_of(sample_id)
    if image_id in names:
        problem = f"the samples {names[image_id]} and {sample_id} both have COCO's image id {image_id!r}"
        raise ConfigError(problem, "handle them one by one")
    names[image_id] = sample_id
    return image_id


def json_files(files: Tree) -> list[ObjectInfo]:
    """The JSON files of an import: those called ``*_results.json`` where there are any, else all.

    Raises:
        ConfigError: none.
    """
    listed = files.files("", (".json",))
    found = [info for path, info in listed if path.rsplit("/", 1)[-1] not in coco_form.NO_ANNOTATIONS]
    if not found:
        raise ConfigError(f"{files.source} holds no JSON file", "give the file of the results, or its folder")
    return [i for i in found if i.uri.endswith(_RESULTS)] or found


def items_by_image(
    files: Tree,
    samples: Iterable[SampleRef],
    classes: ClassTable,
    documents: Sequence[tuple[ObjectInfo, Groups]],
    listed: Mapping[ImageId, CocoImage | None] | None = None,
) -> Iterator[PlanItem]:
    """One item per sample with its raw annotations.

    Args:
        files: for messages.
        samples: in the order of the items.
        classes: categories that annotations may have; all when empty.
        documents: the files and what they hold.
        listed: the images that they have, with their entries where there are any: samples that are not among them are
            missing; None where an image without annotations is one without objects.

    Raises:
        ConfigError: see ``CocoResults.items``.
    """
    owner: dict[ImageId, tuple[ObjectInfo, Groups]] = {}
    for file, groups in documents:
        _refuse_categories(file, groups, classes)
        for image_id in groups:
            if image_id in owner:
                problem = f"{owner[image_id][0].uri} and {file.uri} both say what is in image {image_id!r}"
                raise ConfigError(problem, "give the one file that you mean")
            owner[image_id] = file, groups
    names: dict[ImageId, str] = {}
    for sample in samples:
        image_id = unique_image_id(sample.sample_id, names)
        file, groups = owner.get(image_id, (documents[0][0], {}))
        raws = groups.get(image_id, [])
        detail: dict[str, Any] = {"document": file.uri, "raw": annotation_json.annotations_text(raws)}
        if listed is not None and image_id not in listed:
            detail["raw"] = None
        elif listed is not None and (image := listed[image_id]):
            detail["listed"] = [image.height, image.width]
        tag = reading.MISSING if detail["raw"] is None else annotation_json.digest(raws)
        yield item_of(sample, f"{file.uri}#{sample.sample_id}", tag, sum(map(len, raws)), detail)
    refuse_unknown([str(i) for i in owner if i not in names], files.source)


def _refuse_categories(file: ObjectInfo, groups: Groups, classes: ClassTable) -> None:
    known = {c.label_id for c in classes.classes}
    for image_id in groups if known else ():
        strange = {c for raw in groups[image_id] for c in coco_form.categories_in(raw)} - known
        if strange:
            problem = (
                f"{file.uri} has the category {min(strange)} (image {image_id!r}), which no class of the samples has"
            )
            raise ConfigError(problem, "give the results the samples' own category ids")


def _refuse_others(file: ObjectInfo, groups: Groups) -> None:
    """Look at the first result: files of boxes or of ground truth would fail on every image."""
    first: dict[str, Any] = next((msgspec.json.decode(groups[image_id][0]) for image_id in groups), {})
    if first and "segmentation" not in first:
        raise ConfigError(f"{file.uri} holds boxes without masks", "give results of segmentation")
    if first and "score" not in first:
        raise ConfigError(f"{file.uri} holds no scores", "import a whole dataset as coco-dataset")


def raw_text(item: PlanItem) -> str:
    """The annotations of an item of ``items_by_image``, as one JSON array.

    Raises:
        DataError: ``missing-prediction``; ``size-mismatch``: the file says that the image is of another size.
    """
    detail, size = reading.detail_of(item), size_of(item)
    if detail["raw"] is None:
        raise missing(item)
    said = tuple(detail.get("listed", size))
    if None not in said and said != size:
        problem = f"{detail['document']} says that image {item.sample_id} is {said[1]} x {said[0]}"
        fix = f"its photo is {size[1]} x {size[0]}: make the masks on the photo's own grid"
        raise DataError(problem, fix, "size-mismatch", str(detail["document"]))
    return str(detail["raw"])


def document_uri(item: PlanItem) -> str:
    """The file that an item of ``items_by_image`` comes from."""
    return str(reading.detail_of(item)["document"])
