"""Ultralytics' segmentation labels: ``labels/PHOTO.txt`` with one polygon a line, and ``data.yaml``.

A line is ``class x1 y1 x2 y2 ...``: the index of a class and the corners of one closed polygon, divided by the photo's
width and height. An instance is one line, so its parts and holes are joined: from the outline of one part a cut leads
to the next and back the same way, as ``merge_multi_segment`` does. By the even-odd rule the cut has no width, parts are
filled and holes stay open: what is written here is read back exactly. Ultralytics itself draws polygons with
``cv2.fillPoly``, which also fills the pixels below and right of outlines and cuts.

Lost are: ids (numbered from 1), crowds and instances without a pixel (left out, as ``convert_coco`` does), scores
(a training file has no room for them), and areas and boxes that are not those of the mask. Track ids, which
``predict`` may write behind the confidence, cannot be told from corners and are not read.

Source: docs.ultralytics.com/datasets/segment; ultralytics 8.4.190: ``data/converter.py`` (``convert_coco``,
``merge_multi_segment``), ``data/utils.py`` (``verify_image_label``, ``img2label_paths``, ``check_det_dataset``),
``engine/results.py`` (``save_txt``).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import below, instance_of, label_id_of, match_files, missing, photo_path, size_of, stem_of
from segbatch.records import ClassInfo, ClassTable, Instance, PlanItem, Prediction, Task

_FOLDER = "labels"
_DATA_FILE = "data.yaml"
_SPLITS = ("train", "val", "test")
_TOLERANCE = 0.01
"""How far outside the photo Ultralytics lets a corner lie, as a part of its side."""


class YoloSeg(Format):
    """Polygons for Ultralytics YOLO: ``labels/*.txt`` and ``data.yaml``; photos belong into ``images/`` beside them.

    Class indices count the thing classes in the order of the class table (all scored classes where it has no things).
    """

    name: ClassVar[str] = "yolo-seg"
    task: ClassVar[Task] = "instance"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """Labels beside ``images/PHOTO``, lists of the photos of each split, and ``data.yaml``.

        ``data.yaml`` has no ``path``: Ultralytics then takes its own folder.

        Raises:
            ConfigError: the samples have no classes.
            DataError: ``unknown-label``: an instance of a class that has no index.
        """
        things = _things(classes)
        if not things:
            raise ConfigError(f"format {self.name} needs classes, and the samples have none", "give them a class file")
        indices = {c.label_id: i for i, c in enumerate(things)}
        lists: dict[str, list[str]] = {}
        for photo, split, text in output.map(lambda row: _file(row, indices), rows):
            output.put(f"{_FOLDER}/{stem_of(photo)}.txt", text.encode())
            lists.setdefault(_split_of(split), []).append(f"./images/{photo}\n")
        for split, photos in lists.items():
            output.put(f"{split}.txt", "".join(photos).encode())
        output.put(_DATA_FILE, _data_file(things, list(lists)).encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``. A photo without a file has no instances: ``predict`` writes none where it finds none.

        Class names are those of ``data.yaml`` where there is one, else the order is that of ``write``.

        Raises:
            ConfigError: also a ``data.yaml`` with a class that the samples lack.
        """
        label_ids = _label_ids(files, classes)
        labels = below(files, _FOLDER) if files.is_folder(_FOLDER) else files
        for item in match_files(labels, samples, lambda s: f"{stem_of(photo_path(s))}.txt", (".txt",)):
            detail = {**reading.detail_of(item), "classes": label_ids}
            yield replace(item, detail=json.dumps(detail))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The instances of a file; a number after the last corner is a confidence (``predict save_conf=True``).

        Raises:
            DataError: ``bad-prediction``: a line that is no polygon, named; ``unknown-label``: no such class index.
        """
        if item.etag.endswith(f"+{reading.MISSING}"):
            yield Prediction(instances=())
            return
        try:
            text = storage.read_bytes(item.uri).decode("utf-8-sig")
        except ObjectMissing as error:
            raise missing(item) from error
        except UnicodeDecodeError as error:
            raise _bad(f"{item.uri} is not UTF-8: {error}", item) from error
        lines = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        yield Prediction(instances=_instances(lines, item))


# -- writing ---------------------------------------------------------------------------------------------------------


def _things(classes: ClassTable) -> tuple[ClassInfo, ...]:
    return tuple(c for c in classes.classes if c.isthing) or classes.scored


def _split_of(split: str) -> str:
    """Ultralytics' name of a split; what is no split of it belongs to the training."""
    return next((s for s in _SPLITS if split.lower().startswith(s)), _SPLITS[0])


def _data_file(things: Sequence[ClassInfo], splits: Sequence[str]) -> str:
    """YAML; ``train`` and ``val`` are required, so one that has no photos is given those of another split."""
    first = next((s for s in _SPLITS if s in splits), _SPLITS[0])
    wanted = [s for s in _SPLITS if s in splits or s != "test"]
    lines = [f"{s}: {s if s in splits else first}.txt" for s in wanted] + [f"nc: {len(things)}", "names:"]
    return "\n".join([*lines, *(f"  {i}: {json.dumps(c.name, ensure_ascii=False)}" for i, c in enumerate(things)), ""])


def _file(row: Labels, indices: Mapping[int, int]) -> tuple[str, str, str]:
    """A row's photo, split and label file."""
    lines = [_line(i, row, indices) for i in row.instances or () if not i.iscrowd]
    return photo_path(row), row.split, "".join(lines)


def _line(instance: Instance, row: Labels, indices: Mapping[int, int]) -> str:
    """The line of an instance; empty for one without a pixel.

    Six digits tell corners apart in photos of up to 100,000 pixels a side.
    """
    from segbatch.codecs import rle

    if instance.category_id not in indices:
        problem = f"instance {instance.id} of {row.sample_id} is of the class {instance.category_id}"
        raise DataError(f"{problem}, which has no index", "only things have one", "unknown-label")
    corners = polygon_of(rle.decode(instance.counts, row.height, row.width)) / (row.width, row.height)
    numbers = " ".join(f"{v:.6g}" for v in corners.reshape(-1).tolist())
    return f"{indices[instance.category_id]} {numbers}\n" if numbers else ""


def polygon_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """One polygon that the even-odd rule fills to the mask, parts, holes and all.

    Each outline after the first is reached from the nearest corner so far, gone around, and left the same way.

    Args:
        mask: bool of shape (height, width).

    Returns:
        Corners x, y in pixels, float64 of shape (n, 2); none for a mask without a pixel.
    """
    from segbatch.codecs import polygon

    outlines = polygon.contours(mask)
    path = np.empty((0, 2))
    for outline in (*outlines.outers, *outlines.holes):
        ring = outline.reshape(-1, 2)
        if not len(path):
            path = ring
            continue
        nearest = int(((path - ring[0]) ** 2).sum(axis=1).argmin())
        path = np.concatenate([path[: nearest + 1], ring, ring[:1], path[nearest:]])
    return path


# -- reading ---------------------------------------------------------------------------------------------------------


def _label_ids(files: Tree, classes: ClassTable) -> list[int]:
    """Label ids by class index."""
    if files.stat(_DATA_FILE) is None:
        return [c.label_id for c in _things(classes)]
    found = []
    for name in _names(files):
        label_id = label_id_of(name, classes)
        if label_id is None:
            problem = f"{files.uri(_DATA_FILE)} has a class {name!r}, which the samples lack"
            raise ConfigError(problem, "rename it, or import against the samples they were made for")
        found.append(label_id)
    return found


def _names(files: Tree) -> list[str]:
    """Class names of ``data.yaml`` by index."""
    import yaml

    uri = files.uri(_DATA_FILE)
    try:
        data = yaml.safe_load(files.read_bytes(_DATA_FILE))
        names: Any = data["names"]
        ordered = [names[i] for i in range(len(names))]  # a list, or a mapping from 0, 1, ...
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        problem = f"{uri} has no list of names: {' '.join(str(error).split())}"
        raise ConfigError(problem, "see docs.ultralytics.com/datasets/segment") from error
    return [str(name) for name in ordered]


def _instances(lines: Sequence[tuple[int, list[str]]], item: PlanItem) -> tuple[Instance, ...]:
    from segbatch.codecs import polygon

    height, width = size_of(item)
    label_ids = reading.detail_of(item)["classes"]
    parsed = [_parsed(number, fields, label_ids, item) for number, fields in lines]
    outlines = [[(corners.reshape(-1, 2) * (width, height)).reshape(-1)] for _, corners, _ in parsed]
    try:
        masks = polygon.rasterize_all(outlines, height, width)
    except ValueError as error:
        raise _bad(f"{item.uri}: {error}", item) from error
    found = zip(parsed, masks, strict=True)
    return tuple(
        instance_of(n, label_id, counts, (height, width), score)
        for n, ((label_id, _, score), counts) in enumerate(found, 1)
    )


def _parsed(
    number: int, fields: Sequence[str], label_ids: Sequence[int], item: PlanItem
) -> tuple[int, NDArray[np.float64], float | None]:
    """Label id, flat corners and score of a line."""
    try:
        index, *values = (float(f) for f in fields)
    except ValueError as error:
        raise _bad(f"line {number} of {item.uri} is not numbers", item) from error
    if len(values) < 6:
        raise _bad(f"line {number} of {item.uri} has {len(values)} numbers after the class, no polygon", item)
    score = values.pop() if len(values) % 2 else None
    corners = np.array(values)
    if not (np.abs(corners - 0.5) <= 0.5 + _TOLERANCE).all():
        raise _bad(f"line {number} of {item.uri} has a corner outside 0..1", item)
    if score is not None and not 0 <= score <= 1:
        raise _bad(f"line {number} of {item.uri} has the confidence {score:g}", item)
    if not math.isfinite(index) or index != int(index) or not 0 <= index < len(label_ids):
        problem = f"line {number} of {item.uri} has the class {index:g}, not one of 0 to {len(label_ids) - 1}"
        raise DataError(problem, f"check {_DATA_FILE}", "unknown-label", item.uri)
    return label_ids[int(index)], corners, score


def _bad(problem: str, item: PlanItem) -> DataError:
    fix = "a line is: class x1 y1 x2 y2 x3 y3 ... and perhaps a confidence"
    return DataError(problem, fix, "bad-prediction", item.uri)
