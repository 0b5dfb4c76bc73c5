"""Panoptic maps as COCO exchanges them: PNG files whose colours are segment ids, and a JSON file that explains them.

Ids are R + 256 G + 256^2 B (id2rgb), 0 is void; the JSON file has ``annotations`` with ``image_id``, ``file_name`` and
``segments_info`` (``id``, ``category_id``, ``area``, ``bbox``, ``iscrowd``), and ``images`` and ``categories`` besides.

Results are ``panoptic_SPLIT_segbatch_results.json`` and a folder of the same name for the PNG files, which the server
takes together in one zip archive; segments without pixels are left out, because the evaluator refuses them. Ground
truth is ``annotations/panoptic_SPLIT.json`` and ``annotations/panoptic_SPLIT/``, as the dataset ``coco-panoptic`` reads
them.

Source: cocodataset.org/#format-results, #format-data and #upload (panoptic segmentation);
github.com/cocodataset/panopticapi, ``panopticapi/utils.py`` and ``evaluation.py``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np

from segbatch import storage
from segbatch.codecs import png
from segbatch.datasets import annotation_json, coco_form, reading
from segbatch.datasets.annotation_json import ImageId
from segbatch.datasets.coco import segment_ids, segment_of
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.coco import (
    DEFAULT_SPLIT,
    Head,
    document_uri,
    image_entry,
    items_by_image,
    json_files,
    raw_text,
    results_name,
    unique_image_id,
)
from segbatch.formats.files import Listing, OneFile, file_name, missing, safe_name, size_of
from segbatch.records import ClassTable, PlanItem, Prediction, Segment, Task

_MAX_ID = 256**3 - 1


class _Row(NamedTuple):
    """A row as it is written."""

    labels: Labels
    image: bytes
    annotation: bytes
    png: bytes
    name: str


class CocoPanoptic(Format):
    """A PNG of segment ids per image, named like the photo, and ``segments_info`` in one JSON file. Ids are kept."""

    name: ClassVar[str] = "coco-panoptic"
    task: ClassVar[Task] = "panoptic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """A JSON file and a folder per split.

        Raises:
            ConfigError: two samples have the same image id.
            DataError: ``value-range``: a segment id that is not in 1..16,777,215, or that two segments have.
        """
        names: dict[ImageId, str] = {}
        files: dict[str, tuple[Head, list[bytes]]] = {}
        for row in output.map(_encoded, rows):
            unique_image_id(row.labels.sample_id, names)
            path = _path(row.labels)
            output.put(f"{path}/{row.name}", row.png)
            head, annotations = files.setdefault(path, (Head(), []))
            head.add(row.labels, row.image)
            annotations.append(row.annotation)
        categories = [
            {
                "supercategory": c.supercategory,
                "isthing": int(c.isthing),
                "id": c.label_id,
                "name": c.name,
                **({"color": c.color} if c.color else {}),
            }
            for c in classes.classes
        ]
        for path, (head, annotations) in files.items():
            output.put(f"{path}.json", head.encoded(categories, annotations))

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; PNG files are found in the folder that is called like the JSON file, or by their name.

        Raises:
            ConfigError: no JSON file, one that cannot be read, segments of categories that are no classes, annotations
                of images that are no samples, or of one image twice.
        """
        if isinstance(files, OneFile):
            raise ConfigError(f"{files.source} explains PNG files", "give the folder that holds it and them")
        documents = [(f, annotation_json.split_results(storage.read_bytes(f.uri), f.uri)) for f in json_files(files)]
        for file, groups in documents:
            for image_id in groups:
                if len(groups[image_id]) > 1:
                    raise ConfigError(f"{file.uri} has two annotations of image {image_id!r}", "keep one")
        listing = Listing(files, (".png",))
        for item in items_by_image(files, samples, classes, documents):
            yield _with_map(item, listing)
        listing.refuse_rest()

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One map with its segments.

        Raises:
            DataError: ``missing-prediction``, ``bad-annotation``, ``size-mismatch``, ``unknown-segment``, and what is
                wrong with the PNG file.
        """
        annotations = annotation_json.decode_panoptic_annotations(raw_text(item), document_uri(item))
        label = reading.detail_of(item)["map"]
        if not annotations or label is None:
            raise missing(item)
        ids = segment_ids(label, size_of(item))
        segments = [segment_of(s, ids) for s in annotations[0].segments_info]
        panoptic, kept, _ = reading.panoptic_of(ids, segments, label)
        yield Prediction(panoptic=panoptic, segments=kept)


def _path(row: Labels) -> str:
    """Of the folder, and of the JSON file without its suffix."""
    if row.is_truth:
        return f"annotations/panoptic_{safe_name(row.split or DEFAULT_SPLIT)}"
    return results_name("panoptic", row.split)


def _encoded(row: Labels) -> _Row:
    assert row.panoptic is not None
    segments = row.segments or ()
    colors = np.zeros((len(segments) + 1, 3), np.uint8)
    for place, segment_id in enumerate(_checked_ids(row, segments), 1):
        colors[place] = segment_id & 255, segment_id >> 8 & 255, segment_id >> 16
    shown = np.bincount(row.panoptic.ravel(), minlength=len(segments) + 1) > 0
    listed = (s for place, s in enumerate(segments, 1) if row.is_truth or shown[place])
    name = file_name(row, ".png")
    annotation = {
        "image_id": coco_form.image_id_of(row.sample_id),
        "file_name": name,
        "segments_info": [_entry(s) for s in listed],
    }
    image = msgspec.json.encode(image_entry(row))
    return _Row(row, image, msgspec.json.encode(annotation), png.encode_rgb(colors[row.panoptic]), name)


def _checked_ids(row: Labels, segments: Sequence[Segment]) -> list[int]:
    ids = [s.id for s in segments]
    bad = next((i for place, i in enumerate(ids) if not 0 < i <= _MAX_ID or i in ids[:place]), None)
    if bad is not None:
        problem = f"{row.sample_id} has a segment of id {bad}, which is taken or cannot be a colour"
        raise DataError(problem, f"number segments from 1 to {_MAX_ID}", "value-range")
    return ids


def _entry(segment: Segment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "category_id": segment.category_id,
        "area": _plain(segment.area),
        "bbox": [_plain(v) for v in segment.bbox_xywh],
        "iscrowd": int(segment.iscrowd),
    }


def _plain(value: float) -> float:
    """Whole numbers without a point, as in COCO's files."""
    return int(value) if float(value).is_integer() else value


def _with_map(item: PlanItem, listing: Listing) -> PlanItem:
    """The item with the address and tag of its PNG file: beside the JSON file, else the only one of that name."""
    detail = dict(reading.detail_of(item))
    found = msgspec.json.decode(detail["raw"], type=list[_FileName])
    info = (
        listing.take(f"{storage.name_of(detail['document']).removesuffix('.json')}/{found[0].file_name}")
        if found
        else None
    )
    detail["map"] = info.uri if info else None
    tag, size = (info.etag, info.size) if info else (reading.MISSING, 0)
    return replace(
        item,
        uri=info.uri if info else item.uri,
        etag=f"{item.etag}+{tag}",
        bytes=item.bytes + size,
        detail=msgspec.json.encode(detail).decode(),
    )


class _FileName(msgspec.Struct, frozen=True):
    file_name: str = ""
