"""Cityscapes' result formats, as its evaluation scripts and server take them.

Source: github.com/mcordts/cityscapesScripts, version 2.3.0: the heads of
``evaluation/evalPixelLevelSemanticLabeling.py``, ``evaluation/evalInstanceLevelSemanticLabeling.py`` and
``evaluation/evalPanopticSemanticLabeling.py``; ``preparation/createPanopticImgs.py``.
"""

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import png, rle
from segbatch.datasets import annotation_json, reading
from segbatch.datasets.annotation_json import PanopticAnnotation, PanopticSegment, RawGroups
from segbatch.datasets.cityscapes import CLASSES, refuse_train_ids, segment_ids
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import (
    MISSING_PREDICTION,
    item_of,
    label_path,
    missing,
    refuse_unknown,
    safe_name,
    size_of,
    stem_of,
)
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Segment, Task
from segbatch.storage import ObjectInfo

_KNOWN = reading.known_ids(CLASSES)
_NAMES = {c.label_id: c.name for c in CLASSES.classes}
_SCORED = frozenset(c.label_id for c in CLASSES.scored)
_IMAGE = re.compile(r"(.+?_\d{6}_\d{6})(?!\d)")
_LABEL_IDS = "_labelIds.png"
_MAX_SEGMENT_ID = (1 << 24) - 1


def check_classes(classes: ClassTable, form: str) -> None:
    """Make sure that the label ids of the rows mean what they mean in Cityscapes.

    Raises:
        ConfigError: a class that Cityscapes calls otherwise, named.
    """
    for found in classes.classes:
        official = _NAMES.get(found.label_id)
        if found.name != official:
            there = f"{official!r} in Cityscapes" if official else "no class of Cityscapes"
            problem = f"format {form} needs Cityscapes' label ids, but {found.label_id} is {found.name!r} here, {there}"
            raise ConfigError(problem, "export masks of samples of cityscapes or kitti")


def check_semantic(label: NDArray[Any], uri: str) -> None:
    """Make sure that a label map is grey and shows label ids of Cityscapes only.

    Raises:
        DataError: ``label-type``, ``unknown-label``.
    """
    if label.ndim != 2:
        raise DataError(f"{uri} is in colour", "write label ids", "label-type", uri)
    refuse_train_ids(label, uri)
    reading.check_ids(label, _KNOWN, uri)


class Cityscapes(Format):
    """Pixel-level results: ``ID_pred_labelIds.png``, 8-bit grey PNG of label ids (not trainIds).

    The evaluator looks for ``ID*.png`` in all folders, and so does the import; of several files of an image the one
    that ends in ``_labelIds.png`` counts.
    """

    name: ClassVar[str] = "cityscapes"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One PNG a row.

        Raises:
            ConfigError: classes that are not Cityscapes'.
            DataError: a label id that Cityscapes lacks.
        """
        check_classes(classes, self.name)
        for path, data in output.map(_semantic_file, rows):
            output.put(path, data)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; two label maps of one image are a ConfigError."""
        found = _by_image(files, ".png")
        for sample in samples:
            info = found.pop(stem_of(sample.sample_id), None)
            yield _item(files, sample, label_path(sample.sample_id, f"_pred{_LABEL_IDS}"), info)
        refuse_unknown([i.uri for i in found.values()], files.source)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: missing, broken, in colour, or with an id that Cityscapes lacks.
        """
        found = reading.read_label(_present(item))
        check_semantic(found, item.uri)
        yield Prediction(semantic=found.astype(np.uint16))


def _semantic_file(row: Labels) -> tuple[str, bytes]:
    assert row.semantic is not None
    check_semantic(row.semantic, row.sample_id)
    return label_path(row.sample_id, f"_pred{_LABEL_IDS}"), png.encode_grey(row.semantic, 8)


def _image_of(name: str) -> str:
    """The image id that a file name begins with: CITY_SEQ_FRAME, else the name without suffix and what we append."""
    found = _IMAGE.match(name)
    if found:
        return found[1]
    return name.rsplit(".", 1)[0].removesuffix("_labelIds").removesuffix("_panoptic").removesuffix("_pred")


def _by_image(files: Tree, suffix: str) -> dict[str, ObjectInfo]:
    """Result files by image id.

    Raises:
        ConfigError: no such file at all, or two of one image.
    """
    found: dict[str, list[ObjectInfo]] = {}
    for path, info in files.files("", (suffix,)):
        folder, _, name = path.rpartition("/")
        own = _IMAGE.match(name) or not folder
        found.setdefault(_image_of(name) if own else f"{folder}/{_image_of(name)}", []).append(info)
    if not found:
        raise ConfigError(f"{files.source} holds no file that ends in {suffix}", "check the format")
    return {image: _only(infos) for image, infos in found.items()}


def _only(infos: Sequence[ObjectInfo]) -> ObjectInfo:
    first, *others = [i for i in infos if i.uri.endswith(_LABEL_IDS)] or infos
    if others:
        raise ConfigError(f"{first.uri} and {others[0].uri} are results of one image", "keep one of them")
    return first


def _item(files: Tree, sample: SampleRef, path: str, info: ObjectInfo | None) -> PlanItem:
    if info is None:
        return item_of(sample, files.uri(path), reading.MISSING, 0)
    return item_of(sample, info.uri, info.etag, info.size, {"found": True})


def _present(item: PlanItem) -> str:
    """The address of the prediction.

    Raises:
        DataError: there was none when the import was planned.
    """
    if not reading.detail_of(item).get("found"):
        raise missing(item)
    return item.uri


class MaskLists(Format):
    """Instances as a list and masks: what the results of Cityscapes and KITTI have in common.

    A line of a list is ``PATH LABEL_ID CONFIDENCE`` with the path of a mask relative to the list; masks are grey
    8-bit PNG, 0 and 255. An image without instances has an empty list. Groups (``iscrowd``) are no results and are
    left out; ground truth has the confidence 1.
    """

    task: ClassVar[Task] = "instance"
    image_id: ClassVar[re.Pattern[str]]
    """What file names of the dataset's own images begin with."""

    def list_path(self, sample_id: str) -> str:
        """Where the list of a sample lies."""
        raise NotImplementedError

    def mask_path(self, sample_id: str, number: int) -> str:
        """Where the mask of its object ``number`` (from 0) lies."""
        raise NotImplementedError

    def label_text(self, label_id: int) -> str:
        """How a list says a label id."""
        return str(label_id)

    def lists(self, files: Tree, samples: Iterable[SampleRef]) -> Iterator[tuple[SampleRef, ObjectInfo | None]]:
        """Every sample with its list.

        Raises:
            ConfigError: no list at all, lists of images that are no samples, two lists of one image.
        """
        raise NotImplementedError

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """A list and its masks for every row.

        Raises:
            ConfigError: classes that are not Cityscapes'.
            DataError: a category that Cityscapes lacks, a sample id with a blank.
        """
        check_classes(classes, self.name)
        for files in output.map(self._files, rows):
            for path, data in files:
                output.put(path, data)

    def _files(self, row: Labels) -> list[tuple[str, bytes]]:
        own = self.list_path(row.sample_id)
        if re.search(r"\s", own):
            raise DataError(f"{own!r} has a blank, which separates columns here", "rename the sample", "bad-path")
        lines, masks = [], []
        for number, found in enumerate(i for i in row.instances or () if not i.iscrowd):
            if found.category_id not in _NAMES:
                problem = f"instance {found.id} of {row.sample_id} has the category {found.category_id}"
                raise DataError(problem, "use label ids of Cityscapes", "unknown-category", row.image_uri)
            path = self.mask_path(row.sample_id, number)
            mask = rle.decode(found.counts, row.height, row.width)
            masks.append((path, png.encode_grey(mask.astype(np.uint8) * np.uint8(255), 8)))
            score = 1.0 if found.score is None else found.score
            relative = posixpath.relpath(path, posixpath.dirname(own) or ".")
            lines.append(f"{relative} {self.label_text(found.category_id)} {score!r}\n")
        return [(own, "".join(lines).encode()), *masks]

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``. The tag covers the list and the masks that are named after the image."""
        masks: dict[str, list[ObjectInfo]] = {}
        for path, mask in files.files("", (".png",)):
            masks.setdefault(self._image_of(path), []).append(mask)
        for sample, info in self.lists(files, samples):
            if info is None:
                yield _item(files, sample, self.list_path(sample.sample_id), None)
                continue
            own = masks.get(self._image_of(info.uri), [])
            tag = hashlib.blake2b("\n".join(i.etag for i in own).encode(), digest_size=8).hexdigest()
            root = max((r for r in files.roots if info.uri.startswith(f"{r.rstrip('/')}/")), key=len)
            size = info.size + sum(i.size for i in own)
            yield item_of(sample, info.uri, f"{info.etag}+{tag}", size, {"found": True, "root": root})

    def _image_of(self, path: str) -> str:
        """The image that a list or mask is named after."""
        name = path.rsplit("/", 1)[-1]
        official = self.image_id.match(name)
        stem = name.rsplit(".", 1)[0]
        if official:
            return official[1]
        return re.sub(r"_\d+$", "", stem) if name.endswith(".png") else stem.removesuffix("_pred")

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The instances of a list, numbered from 1 in its order.

        Raises:
            DataError: a missing list or mask, a line of another form, a path that leaves the folder, a category that
                Cityscapes lacks, a mask of another size or in colour.
        """
        uri = _present(item)
        lines = _lines(uri)
        seen: set[str] = set()
        for path, _, _ in lines:
            if path in seen:
                problem = f"{uri} lists {path} twice, and the official tool would count the last line only"
                raise DataError(problem, "list every mask once", "bad-annotation", uri)
            seen.add(path)
        root = str(reading.detail_of(item)["root"])
        found = (_instance(n, line, (item, root)) for n, line in enumerate(lines, 1))
        yield Prediction(instances=tuple(found))


def _lines(uri: str) -> list[tuple[str, int, float]]:
    """The lines of a list: path, label id and confidence."""
    try:
        text = storage.read_bytes(uri).decode()
    except ObjectMissing as error:
        raise DataError(f"no prediction at {uri}", "add the file", MISSING_PREDICTION, uri) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is no text: {error}", "write it as UTF-8", "bad-annotation", uri) from error
    return [_line(number, line, uri) for number, line in enumerate(text.splitlines(), 1)]


def _line(number: int, line: str, uri: str) -> tuple[str, int, float]:
    try:
        path, label, confidence = line.split(" ")
        category, score = int(float(label)), float(confidence)
    except (ValueError, OverflowError) as error:
        problem = f"line {number} of {uri} is {line!r}"
        raise DataError(problem, "expected: MASK_PATH LABEL_ID CONFIDENCE", "bad-annotation", uri) from error
    if category not in _NAMES:
        problem = f"line {number} of {uri} has the label id {category}"
        raise DataError(problem, "use label ids of Cityscapes (not trainIds)", "unknown-category", uri)
    if not math.isfinite(score):
        raise DataError(f"line {number} of {uri} has the confidence {score}", "give a number", "bad-annotation", uri)
    return path, category, score


def _instance(number: int, line: tuple[str, int, float], place: tuple[PlanItem, str]) -> Instance:
    path, category, score = line
    item, root = place
    folder = posixpath.dirname(storage.relative(item.uri, root))
    below = posixpath.normpath(posixpath.join(folder, path))
    if re.search(r"^/|[\\\0]", path) or below.split("/")[0] == "..":
        problem = f"{item.uri} names the mask {path!r}, which is not below {root}"
        raise DataError(
            problem, "give paths relative to the list, within the folder of the results", "bad-path", item.uri
        )
    uri = storage.join(root, below)
    mask = reading.read_label(uri)
    if mask.ndim != 2:
        raise DataError(f"mask {uri} is in colour", "write a grey mask", "label-type", uri)
    height, width = size_of(item)
    if mask.shape != (height, width):
        problem = f"mask {uri} is {mask.shape[1]} x {mask.shape[0]}, its photo is {width} x {height}"
        raise DataError(problem, "write masks on the photo's own grid", "size-mismatch", uri)
    counts = rle.encode(mask != 0)
    return Instance(number, category, rle.bbox(counts, height, width), float(rle.area(counts)), False, counts, score)


class CityscapesInstances(MaskLists):
    """Instance-level results: ``ID_pred.txt`` and ``masks/ID_NNN.png``; see ``MaskLists``.

    The evaluator looks for ``ID*.txt`` in all folders, and so does the import.
    """

    name: ClassVar[str] = "cityscapes-instances"
    image_id: ClassVar[re.Pattern[str]] = _IMAGE

    def list_path(self, sample_id: str) -> str:
        """See ``MaskLists``."""
        return label_path(sample_id, "_pred.txt")

    def mask_path(self, sample_id: str, number: int) -> str:
        """See ``MaskLists``."""
        return f"masks/{label_path(sample_id, f'_{number:03d}.png')}"

    def lists(self, files: Tree, samples: Iterable[SampleRef]) -> Iterator[tuple[SampleRef, ObjectInfo | None]]:
        """See ``MaskLists``."""
        found = _by_image(files, ".txt")
        for sample in samples:
            yield sample, found.pop(stem_of(sample.sample_id), None)
        refuse_unknown([i.uri for i in found.values()], files.source)


@dataclass(slots=True)
class _Document:
    """The parts of a panoptic JSON file, each already text."""

    images: list[str] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The whole file."""
        categories = [
            {
                "id": c.label_id,
                "name": c.name,
                "color": c.color,
                "supercategory": c.supercategory,
                "isthing": int(c.isthing),
            }
            for c in CLASSES.scored
        ]
        parts = {
            "annotations": ",\n".join(self.annotations),
            "categories": ",\n".join(json.dumps(c, sort_keys=True) for c in categories),
            "images": ",\n".join(self.images),
        }
        return "{" + ",\n".join(f'"{key}": [\n{text}\n]' for key, text in parts.items()) + "}\n"


class CityscapesPanoptic(Format):
    """Panoptic results: ``cityscapes_panoptic_SPLIT.json`` and ``cityscapes_panoptic_SPLIT/ID_panoptic.png``.

    The form of COCO with image ids CITY_SEQ_FRAME and label ids as categories; in the RGB PNG R + 256 G + 65536 B is
    the segment id and 0 is void. Ground truth is written as createPanopticImgs does (``ID_gtFine_panoptic.png``). The
    evaluator stops at segments of ignored classes and at listed segments without pixels: neither is written.
    """

    name: ClassVar[str] = "cityscapes-panoptic"
    task: ClassVar[Task] = "panoptic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One PNG a row, and a JSON file for every split.

        Raises:
            ConfigError: classes that are not Cityscapes'.
            DataError: a category that Cityscapes lacks, a segment id that is no 24-bit number over 0.
        """
        check_classes(classes, self.name)
        documents: dict[str, _Document] = {}
        for stem, image, annotation, (path, data) in output.map(_panoptic_parts, rows):
            output.put(path, data)
            document = documents.setdefault(stem, _Document())
            document.images.append(image)
            document.annotations.append(annotation)
        for stem, document in documents.items():
            output.put(f"{stem}.json", document.text().encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; reads every JSON file, whose PNGs lie in the folder of its name, or anywhere.

        Raises:
            ConfigError: no JSON file, one that is no panoptic result, two results of one image, unknown images.
        """
        documents = dict(files.files("", (".json",)))
        if not documents:
            raise ConfigError(f"{files.source} holds no .json file", "give the JSON file and its folder of PNGs")
        found = _annotations(documents)
        pngs = dict(files.files("", (".png",)))
        for sample in samples:
            entry = found.pop(stem_of(sample.sample_id), None)
            if entry is None:
                document = next(iter(documents.values())).uri
                yield item_of(sample, f"{document}#{sample.sample_id}", reading.MISSING, 0)
            else:
                yield _panoptic_item(files, sample, entry, pngs)
        refuse_unknown([f"{entry.info.uri}#{image_id}" for image_id, entry in found.items()], files.source)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One panoptic map; areas and boxes are those of the PNG.

        Raises:
            DataError: missing, broken, of another size; segments that are not listed, or listed and not there.
        """
        uri = _present(item)
        detail = reading.detail_of(item)
        (annotation,) = annotation_json.decode_panoptic_annotations(str(detail["annotation"]), str(detail["file"]))
        pixels = reading.read_label(uri)
        height, width = size_of(item)
        if pixels.ndim != 3 or pixels.shape[:2] != (height, width):
            problem = f"panoptic map {uri} is {pixels.shape}, its photo is {width} x {height}"
            raise DataError(problem, "write an RGB PNG on the photo's own grid", "size-mismatch", uri)
        panoptic, segments = _panoptic(annotation, segment_ids(pixels), uri)
        yield Prediction(panoptic=panoptic, segments=segments)


def _panoptic_parts(row: Labels) -> tuple[str, str, str, tuple[str, bytes]]:
    """Name of the JSON file without suffix, the image's entries in it, and the PNG with its path."""
    assert row.panoptic is not None
    stem = f"cityscapes_panoptic_{safe_name(row.split)}" if row.split else "cityscapes_panoptic"
    image_id = stem_of(row.sample_id)
    pixels = np.bincount(row.panoptic.ravel(), minlength=len(row.segments or ()) + 1)
    colors = np.zeros((len(pixels), 3), np.uint8)
    kept = []
    for index, segment in enumerate(row.segments or (), 1):
        _check_segment(segment, row)
        if pixels[index] and segment.category_id in _SCORED:
            colors[index] = segment.id & 255, segment.id >> 8 & 255, segment.id >> 16
            kept.append(
                {
                    "id": segment.id,
                    "category_id": segment.category_id,
                    "area": int(pixels[index]),
                    "bbox": [int(v) for v in segment.bbox_xywh],
                    "iscrowd": int(segment.iscrowd),
                }
            )
    name = label_path(row.sample_id, "_gtFine_panoptic.png" if row.is_truth else "_panoptic.png")
    photo = f"{image_id}_gtFine_leftImg8bit.png"  # as the official script writes it
    image = {"id": image_id, "width": row.width, "height": row.height, "file_name": photo}
    annotation = {"image_id": image_id, "file_name": name, "segments_info": kept}
    data = png.encode_rgb(colors[row.panoptic])
    return stem, json.dumps(image), json.dumps(annotation), (f"{stem}/{name}", data)


def _check_segment(segment: Segment, row: Labels) -> None:
    where = f"the segment {segment.id} of {row.sample_id}"
    if segment.category_id not in _NAMES:
        problem = f"{where} has the category {segment.category_id}"
        raise DataError(problem, "use label ids of Cityscapes", "unknown-category", row.image_uri)
    if not 0 < segment.id <= _MAX_SEGMENT_ID:
        problem = f"{where} cannot be painted: ids are 1..{_MAX_SEGMENT_ID}, 0 is void"
        raise DataError(problem, "renumber it", "bad-panoptic", row.image_uri)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The annotation of an image: its text, the file's path and address."""

    raw: memoryview
    path: str
    info: ObjectInfo


def _annotations(documents: Mapping[str, ObjectInfo]) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for path, info in documents.items():
        groups: RawGroups = annotation_json.split_results(storage.read_bytes(info.uri), info.uri)
        for image_id, raws in groups.items():
            image = str(image_id)
            if image in found or len(raws) > 1:
                others = {info.uri, found[image].info.uri} if image in found else {info.uri}
                raise ConfigError(f"{' and '.join(sorted(others))} annotate {image} twice", "keep one annotation")
            found[image] = _Entry(raws[0], path, info)
    return found


def _panoptic_item(files: Tree, sample: SampleRef, entry: _Entry, pngs: Mapping[str, ObjectInfo]) -> PlanItem:
    text = annotation_json.annotations_text([entry.raw])
    folder = entry.path.removesuffix(".json")
    name = str(json.loads(text)[0].get("file_name", ""))
    info = pngs.get(f"{folder}/{name}")
    digest = annotation_json.digest([entry.raw])
    detail = {"found": True, "annotation": text, "file": entry.info.uri}
    uri = info.uri if info else files.uri(f"{folder}/{safe_name(name)}")
    return item_of(sample, uri, f"{reading.joint_etag(info)}+{digest}", info.size if info else 0, detail)


def _panoptic(
    annotation: PanopticAnnotation, ids: NDArray[np.uint32], uri: str
) -> tuple[NDArray[np.uint16], tuple[Segment, ...]]:
    shown = rle.instances_of(ids, background=(0,))
    boxes = {i: (float(a), tuple(b)) for i, a, b in zip(*(v.tolist() for v in shown[:3]), strict=True)}
    segments = [_segment(found, boxes, uri) for found in annotation.segments_info]
    index, kept, _ = reading.panoptic_of(ids, segments, uri)
    return index, kept


def _segment(found: PanopticSegment, boxes: Mapping[int, tuple[float, Sequence[float]]], uri: str) -> Segment:
    if found.category_id not in _NAMES:
        problem = f"the segment {found.id} of {uri} has the category {found.category_id}"
        raise DataError(problem, "use label ids of Cityscapes", "unknown-category", uri)
    if found.id not in boxes:
        problem = f"the segment {found.id} is listed for {uri}, which does not show it"
        raise DataError(problem, "list only segments with pixels", "empty-segment", uri)
    area, (x, y, width, height) = boxes[found.id]
    return Segment(found.id, found.category_id, area, (x, y, width, height), bool(found.iscrowd))
