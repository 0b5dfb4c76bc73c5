"""COCO-Stuff: label maps, and the results that ``cocostuffeval`` and the stuff challenge take.

- ``annotations/SPLIT/NAME.png``: 8-bit label maps of the values 0..181, 255 for nothing, named like the photo. They
  hold all 171 classes, and are what evaluations of 171 classes read.
- ``stuff_SPLIT_segbatch_results.json``: a list of ``image_id``, ``category_id`` and ``segmentation``, one mask per
  class and image. ``cocostuffeval`` knows 92..182 (stuff) and 183 (all things together), so things become 183; pixels
  without label are in no mask. It refuses results that lack an image, so every image needs a label somewhere.

Samples that were read from ``stuff_SPLIT.json`` have these ids already: then there are no label maps, and results are
imported from the JSON file.

Source: github.com/nightrome/cocostuffapi, ``PythonAPI/pycocotools/cocostuffeval.py`` and ``cocostuffhelper.py``
(segmentationToCocoResult); cocodataset.org/#upload; github.com/nightrome/cocostuff, ``README.md``.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import png
from segbatch.datasets import annotation_json, coco_form, reading
from segbatch.datasets.annotation_json import ImageId
from segbatch.datasets.coco_form import Segmentation
from segbatch.datasets.coco_stuff import CLASSES, UNLABELED
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.coco import Entries, document_uri, items_by_image, json_files, raw_text, runs, write_results
from segbatch.formats.files import file_name, label_map, match_files, safe_name, size_of
from segbatch.records import ClassTable, PlanItem, Prediction, Task

OTHER = 183
"""What ``cocostuffeval`` calls all things."""

_FIRST_STUFF = 91
_VOID = 255
_KNOWN = reading.known_ids(CLASSES)


class CocoStuff(Format):
    """``annotations/SPLIT/NAME.png`` and ``stuff_SPLIT_segbatch_results.json``."""

    name: ClassVar[str] = "coco-stuff"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """Label maps (not for samples of ``stuff_SPLIT.json``), and a file of results per split.

        Raises:
            ConfigError: other classes than COCO-Stuff's, or two samples have the same image id.
            DataError: ``value-range``: a value that no class has.
        """
        if _has_json_ids(classes):
            write_results("stuff", output.map(_results, rows), output)
        else:
            write_results("stuff", _with_maps(output.map(_map_and_results, rows), output), output)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``: label maps; for samples of ``stuff_SPLIT.json``, results.

        Raises:
            ConfigError: other classes than COCO-Stuff's, no such file, or results of images that are no samples.
        """
        if not _has_json_ids(classes):
            return match_files(files, samples, _path, (".png",))
        documents = [(f, annotation_json.split_results(storage.read_bytes(f.uri), f.uri)) for f in json_files(files)]
        listed: set[ImageId] = {image_id for _, groups in documents for image_id in groups}
        return items_by_image(files, samples, classes, documents, dict.fromkeys(listed))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: a missing or broken file, ``unknown-label``, ``size-mismatch``, or ``overlap``: results with
                pixels of two classes, which ``cocostuffeval`` refuses.
        """
        yield Prediction(semantic=_from_results(item) if "raw" in reading.detail_of(item) else _from_map(item))


def _has_json_ids(classes: ClassTable) -> bool:
    """Whether the samples have the ids of ``stuff_SPLIT.json``, not those of label maps.

    Raises:
        ConfigError: neither.
    """
    if UNLABELED in classes.ignore_ids:
        return True
    official = {c.label_id: c.name for c in CLASSES.classes}
    strange = next((c for c in classes.classes if official.get(c.label_id) != c.name), None)
    if strange or not classes.classes:
        said = f"class {strange.label_id} is {strange.name!r}" if strange else "there are no classes"
        raise ConfigError(f"these samples are not of COCO-Stuff: {said}", "export png instead")
    return False


def _path(row: Labels | SampleRef) -> str:
    folder = f"annotations/{safe_name(row.split)}/" if row.split else ""
    return f"{folder}{file_name(row, '.png')}"


def _stuff_ids() -> NDArray[np.uint16]:
    """``cocostuffeval``'s category ids by the values of label maps, 0 for nothing."""
    values = np.arange(_VOID + 1)
    return np.where(values == _VOID, 0, np.where(values < _FIRST_STUFF, OTHER, values + 1)).astype(np.uint16)


def _with_maps(rows: Iterable[tuple[str, bytes, Entries]], output: Output) -> Iterator[Entries]:
    """The results of rows whose label maps are written on the way."""
    for path, data, entries in rows:
        output.put(path, data)
        yield entries


def _map_and_results(row: Labels) -> tuple[str, bytes, Entries]:
    assert row.semantic is not None
    if not _KNOWN[row.semantic].all():
        bad = int(row.semantic[~_KNOWN[row.semantic]][0])
        raise DataError(f"{row.sample_id} has the label id {bad}, which no class has", "correct it", "value-range")
    return _path(row), png.encode_grey(row.semantic, 8), _entries(row, _stuff_ids()[row.semantic])


def _results(row: Labels) -> Entries:
    assert row.semantic is not None
    return _entries(row, row.semantic)


def _entries(row: Labels, category_ids: NDArray[np.uint16]) -> Entries:
    from segbatch.codecs import rle

    image_id = coco_form.image_id_of(row.sample_id)
    found = rle.instances_of(category_ids, background=(UNLABELED,))
    entries = [
        {"image_id": image_id, "category_id": category, "segmentation": runs(counts, row.height, row.width)}
        for category, counts in zip(found.ids.tolist(), found.counts, strict=True)
    ]
    return Entries(row.sample_id, row.split, [msgspec.json.encode(e) for e in entries])


def _from_map(item: PlanItem) -> NDArray[np.uint16]:
    found = label_map(item)
    reading.check_ids(found, _KNOWN, item.uri)
    return found


class _Result(msgspec.Struct, frozen=True):
    category_id: int
    segmentation: Segmentation


def _from_results(item: PlanItem) -> NDArray[np.uint16]:
    from segbatch.codecs import rle

    uri, (height, width) = document_uri(item), size_of(item)
    where = f"results of image {item.sample_id} in {uri}"
    try:
        results = msgspec.json.decode(raw_text(item), type=list[_Result])
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}", "give category_id and segmentation", "bad-annotation", uri) from error
    shapes = [(f"the mask of category {r.category_id} of image {item.sample_id}", r.segmentation) for r in results]
    counts, _ = coco_form.masks(shapes, height, width, uri)
    label = rle.paint(counts, [r.category_id for r in results], height, width, np.uint16)
    double = sum(map(rle.area, counts)) - int(np.count_nonzero(label))
    if double:
        raise DataError(f"{where} have {double} pixels of two classes", "give every pixel one class", "overlap", uri)
    return np.asarray(label, np.uint16)
