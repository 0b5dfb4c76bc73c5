"""SKU-110K: photos of shop shelves with a box around every product.

``images/{train,val,test}_N.jpg`` with ``annotations/annotations_{train,val,test}.csv`` (``SKU110K_fixed``: 11,743
photos, 1.7 million boxes), lines ``image_name,x1,y1,x2,y2,class,image_width,image_height``; or the dataset as a
Supervisely project: ``img/val_0.jpg`` with ``ann/val_0.jpg.json``, perhaps in folders ``train``, ``val`` and ``test``.

There are boxes only. An instance's mask is its box: the pixels x1 <= x < x2, y1 <= y < y2 (fractions as COCO rounds
them); ``boxes_only`` in the attributes says so.

Source: E. Goldman et al., "Precise Detection in Densely Packed Scenes", CVPR 2019; github.com/eg4000/SKU110K_CVPR19;
github.com/dataset-ninja/sku110k, ``src/convert.py``; the Supervisely annotation format (docs.supervisely.com).
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from segbatch import storage
from segbatch.datasets import pairing, reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.records import ClassTable, Instance, Issue, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

_SPLITS = ("train", "val", "test")
_CATEGORY = 1
_CLASSES = ("object", "retail item")
"""What the only class is called in the CSV files and in the Supervisely project."""

_PREFIX = re.compile(rf"({'|'.join(_SPLITS)})_\d+", re.IGNORECASE)
_SUFFIXES = reading.IMAGE_SUFFIXES
_FARTHEST = 1e8


@dataclass(frozen=True, slots=True)
class _Box:
    """One line or object as it stands in the file; ``where`` names it in messages."""

    id: int
    name: str
    corners: tuple[float, float, float, float]
    where: str


class Sku110k(Dataset):
    """``images/`` with ``annotations/annotations_SPLIT.csv``, or ``img/`` with ``ann/`` of Supervisely."""

    name: ClassVar[str] = "sku110k"
    tasks: ClassVar[tuple[Task, ...]] = ("instance",)
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS

    def recognises(self, tree: Tree) -> bool:
        """Whether one of the CSV files is here, or Supervisely annotations of photos that are called like these."""
        if _csv_splits(tree):
            return tree.is_folder("images")
        annotations = (next(tree.files(f"{f}ann", (".json",), recursive=False), None) for f in _projects(tree))
        return any(found and _split_of(found[0]) for found in annotations)

    def classes(self, tree: Tree) -> ClassTable:
        """The only class, ``object``."""
        return load(self.name)

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those that have a CSV file, a folder, or a photo that is called so."""
        there = {*_csv_splits(tree), *(f.rstrip("/") for f in _projects(tree))}
        folders = ("images",) if _csv_splits(tree) else ("img", "ann")  # in folders of their own names do not matter
        there.update(_split_of(name) for f in folders for name, _ in tree.files(f, recursive=False))
        return tuple(s for s in _SPLITS if s in there)

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The photos of each split in the order of its CSV file (Supervisely: by name), then photos without boxes.

        Each CSV file is read once; an item carries the lines of its own photo.

        Raises:
            ConfigError: not this dataset, or no such split.
        """
        if not self.recognises(tree):
            expected = "expected images/ and annotations/annotations_train.csv, or img/ and ann/ of Supervisely"
            raise ConfigError(f"{tree.source} is not SKU-110K", expected)
        chosen = reading.choose_splits(self.name, tree.source, self.splits(tree), splits)
        if not splits:
            chosen = (*chosen, "")  # photos and annotations whose names tell no split
        yield from (_csv_items if _csv_splits(tree) else _project_items)(tree, chosen)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo and its boxes.

        Boxes outside the image are clipped (issue ``outside-image``; bbox and area stay as in the file), boxes without
        area are kept with an empty mask (``zero-area``), lines that are no boxes are left out (``bad-annotation``), and
        so are other classes (``unknown-category``).

        Raises:
            DataError: a missing or broken file, ``missing-label``, ``size-mismatch`` with the annotation's size.
        """
        pairing.check(item)
        data, info = reading.read_photo(item.uri)
        detail = reading.detail_of(item)
        boxes, issues = _csv_boxes(item, info) if "csv" in detail else _project_boxes(str(detail["label"]), item, info)
        instances, more = _instances(boxes, info.height, info.width)
        sample = reading.sample_of(item, data, info)
        yield replace(sample, instances=instances, attributes={"boxes_only": True}, issues=(*issues, *more))


def _split_of(name: str) -> str:
    """The split that a file name like ``val_131.jpg`` tells, or empty."""
    found = _PREFIX.match(name)
    return found[1].lower() if found else ""


def _csv_splits(tree: Tree) -> tuple[str, ...]:
    return tuple(s for s in _SPLITS if tree.exists(_csv_path(s)))


def _csv_path(split: str) -> str:
    return f"annotations/annotations_{split}.csv"


def _projects(tree: Tree) -> tuple[str, ...]:
    """Folders (with a slash, the root is empty) that have ``img/`` and ``ann/``."""
    folders = ("", *(f"{s}/" for s in _SPLITS))
    return tuple(f for f in folders if all(tree.is_folder(f"{f}{kind}") for kind in ("img", "ann")))


# -- CSV -------------------------------------------------------------------------------------------------------------


def _csv_items(tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
    photos, twins = pairing.by_stem(tree.files("images", _SUFFIXES, recursive=False))
    lists = {s: (uri, _lines_by_stem(uri)) for s in _csv_splits(tree) for uri in [tree.uri(_csv_path(s))]}
    owner: dict[str, str] = {}
    for split, (_, lines) in lists.items():
        for stem in lines:
            owner.setdefault(stem, split)
    for split in splits:
        uri, lines = lists.get(split, ("", {}))
        for stem, own in lines.items():
            if owner[stem] == split:
                yield _csv_item(tree, stem, split, uri, own, photos.get(stem))
            else:
                yield _listed_twice(stem, split, uri, own, lists[owner[stem]][0])
        without = ((stem, photo) for stem, photo in photos.items() if stem not in owner and _split_of(stem) == split)
        yield from (_csv_item(tree, stem, split, "", b"", photo) for stem, photo in without)
        yield from (_twin(path, info, photos, split) for path, info in twins if _split_of(path) == split)


def _lines_by_stem(uri: str) -> dict[str, bytearray]:
    """The lines of a CSV file without the image's name, by its name without folder and suffix, in the file's order."""
    found: dict[str, bytearray] = {}
    for number, line in enumerate(io.BytesIO(storage.read_bytes(uri).removeprefix(b"\xef\xbb\xbf")), 1):
        name, _, rest = line.partition(b",")
        if name == b"image_name" or not line.strip():
            continue
        own = found.get(stem := _stem_of(name, uri, number))
        if own is None:
            own = found[stem] = bytearray()
        own += rest.rstrip(b"\r\n") + b"\n"
    return found


def _stem_of(name: bytes, uri: str, line: int) -> str:
    try:
        stem = name.decode().strip(' "\r\n').replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    except UnicodeDecodeError as error:
        raise ConfigError(f"line {line} of {uri} is not UTF-8 text: {error.reason}", "save it as UTF-8") from error
    if not stem:
        raise ConfigError(f"line {line} of {uri} names no image", "expected image_name,x1,y1,x2,y2,class,width,height")
    return stem


def _csv_item(
    tree: Tree, stem: str, split: str, csv_uri: str, lines: bytes | bytearray, photo: ObjectInfo | None
) -> PlanItem:
    digest = hashlib.blake2b(lines, digest_size=8).hexdigest()
    return PlanItem(
        sample_id=stem,
        uri=photo.uri if photo else tree.uri(f"images/{stem}.jpg"),
        etag=f"{reading.joint_etag(photo)}+{digest}",
        bytes=(photo.size if photo else 0) + len(lines),
        detail=json.dumps({"csv": csv_uri, "lines": lines.decode(errors="replace")}),
        split=split,
    )


def _listed_twice(stem: str, split: str, uri: str, lines: bytes | bytearray, other: str) -> PlanItem:
    error = DataError(f"{uri} names {stem}, and so does {other}", "name it in one of them", pairing.DUPLICATE, uri)
    etag = hashlib.blake2b(lines, digest_size=8).hexdigest()
    return pairing.refused(f"{split}/{stem}", f"{uri}#{stem}", etag, len(lines), error, split)


def _twin(path: str, info: ObjectInfo, photos: dict[str, ObjectInfo], split: str) -> PlanItem:
    return pairing.twin(path, info, photos[path.rsplit(".", 1)[0]].uri, split)


def _csv_boxes(item: PlanItem, info: "PhotoInfo") -> tuple[list[_Box], list[Issue]]:
    """The boxes of the lines ``x1,y1,x2,y2,class,image_width,image_height``; ids count the photo's lines from 1."""
    detail = reading.detail_of(item)
    uri = str(detail["csv"])
    if not uri:
        problem = f"photo {item.uri} stands in none of the CSV files"
        raise DataError(problem, "add its boxes or remove the photo", "missing-label", item.uri)
    boxes, issues = [], []
    for number, line in enumerate(str(detail["lines"]).splitlines(), 1):
        where = f"box {number} of {item.sample_id} in {uri} ({line})"
        fields = [f.strip(' "') for f in line.split(",")]
        numbers = [n for i, f in enumerate(fields) if i != 4 and (n := _number(f)) is not None]
        if len(fields) != 7 or len(numbers) != 6:
            issues.append(Issue("bad-annotation", f"{where} is not x1,y1,x2,y2,class,width,height; left out", number))
            continue
        x1, y1, x2, y2, width, height = numbers
        _check_size((width, height), info, where, uri)
        boxes.append(_Box(number, fields[4], (x1, y1, x2, y2), where))
    return boxes, issues


def _number(value: Any) -> float | None:
    """A coordinate of a text or a JSON number; None for what cannot be one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) <= _FARTHEST else None  # also for NaN


def _check_size(size: tuple[Any, Any], info: "PhotoInfo", where: str, uri: str) -> None:
    if size != (info.width, info.height):
        shown = " x ".join(f"{n:g}" if isinstance(n, float) else str(n) for n in size)
        problem = f"{where} is for an image of {shown}, the photo is {info.width} x {info.height}"
        raise DataError(problem, "annotate the photo's own pixel grid", "size-mismatch", uri)


# -- Supervisely -----------------------------------------------------------------------------------------------------


def _project_items(tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
    for split in splits:
        for folder in _projects(tree):
            if folder in ("", f"{split}/"):
                yield from _folder_items(tree, folder, split)


def _folder_items(tree: Tree, folder: str, split: str) -> Iterator[PlanItem]:
    """The photos of a folder that are of this split, then annotations without a photo; in the root names decide."""

    def wanted(name: str) -> bool:
        return bool(folder) or _split_of(name) == split

    found = tree.files(f"{folder}img", _SUFFIXES, recursive=False)
    photos, twins = pairing.by_stem((path, info) for path, info in found if wanted(path))
    names = {storage.name_of(p.uri): p for p in photos.values()}
    annotations = pairing.by_stem(tree.files(f"{folder}ann", (".json",), recursive=False))[0]
    orphans = [name for name in annotations if name not in names and wanted(name)]
    for name in (*names, *orphans):
        yield _project_item(tree, folder, split, name, names.get(name), annotations.get(name))
    yield from (_twin(path, info, photos, split) for path, info in twins)


def _project_item(
    tree: Tree, folder: str, split: str, name: str, photo: ObjectInfo | None, annotation: ObjectInfo | None
) -> PlanItem:
    return PlanItem(
        sample_id=name.rsplit(".", 1)[0],
        uri=photo.uri if photo else tree.uri(f"{folder}img/{name}"),
        etag=reading.joint_etag(photo, annotation),
        bytes=sum(i.size for i in (photo, annotation) if i),
        detail=json.dumps({"label": annotation.uri if annotation else tree.uri(f"{folder}ann/{name}.json")}),
        split=split,
    )


def _project_boxes(uri: str, item: PlanItem, info: "PhotoInfo") -> tuple[list[_Box], list[Issue]]:
    size, objects = _document(uri)
    _check_size(size, info, f"annotation {uri}", uri)
    boxes, issues = [], []
    for number, entry in enumerate(objects, 1):
        where = f"object {number} of {uri}"
        box = _rectangle(entry, where)
        if box is None:
            issues.append(Issue("bad-annotation", f"{where} is not a rectangle of two points; left out"))
        else:
            boxes.append(box)
    return _with_own_ids(boxes, issues), issues


def _document(uri: str) -> tuple[tuple[Any, Any], list[Any]]:
    """Width and height, and the objects, of an annotation file."""
    try:
        found = json.loads(storage.read_bytes(uri))
        return (found["size"]["width"], found["size"]["height"]), list(found["objects"])
    except ObjectMissing as error:
        problem, fix = f"annotation {uri} is not there", "add it or remove the photo"
        raise DataError(problem, fix, "missing-label", uri) from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        problem = f"{uri} is no Supervisely annotation with size and objects ({type(error).__name__}: {error})"
        raise DataError(problem, "download it again", "bad-annotation", uri) from error


def _rectangle(entry: Any, where: str) -> _Box | None:
    try:
        (x1, y1), (x2, y2) = entry["points"]["exterior"]
        kind, name, found_id = entry["geometryType"], str(entry["classTitle"]), entry.get("id")
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    numbers = [number for n in (x1, y1, x2, y2) if (number := _number(n)) is not None]
    if kind != "rectangle" or len(numbers) != 4:
        return None
    (left, right), (top, bottom) = sorted(numbers[::2]), sorted(numbers[1::2])
    own_id = found_id if isinstance(found_id, int) and 0 < found_id < 1 << 63 else 0
    return _Box(own_id, name, (left, top, right, bottom), where)


def _with_own_ids(boxes: Sequence[_Box], issues: list[Issue]) -> list[_Box]:
    """The boxes with ids > 0 that are theirs alone; new ones follow the greatest and become issues."""
    free = max((b.id for b in boxes), default=0) + 1
    seen: set[int] = set()
    kept = []
    for box in boxes:
        if box.id == 0 or box.id in seen:
            code = pairing.DUPLICATE if box.id else "id-renumbered"
            issues.append(Issue(code, f"{box.where} has no id of its own; it is called {free}", free))
            box, free = replace(box, id=free), free + 1
        seen.add(box.id)
        kept.append(box)
    return kept


# -- instances -------------------------------------------------------------------------------------------------------


def _instances(boxes: Sequence[_Box], height: int, width: int) -> tuple[tuple[Instance, ...], list[Issue]]:
    from segbatch.codecs import polygon

    known = [b for b in boxes if b.name in _CLASSES]
    issues = [
        Issue("unknown-category", f"{b.where} is of the class {b.name!r}, which is not SKU-110K's; left out", b.id)
        for b in boxes
        if b.name not in _CLASSES
    ]
    masks = polygon.rasterize_all([_outline(b.corners, height, width) for b in known], height, width)
    found = []
    for box, counts in zip(known, masks, strict=True):
        x1, y1, x2, y2 = box.corners
        if x2 <= x1 or y2 <= y1:
            issues.append(Issue("zero-area", f"{box.where} has no area; kept with an empty mask", box.id))
        elif min(x1, y1) < 0 or x2 > width or y2 > height:
            issues.append(Issue("outside-image", f"{box.where} reaches out of the image; its mask is clipped", box.id))
        area = max(x2 - x1, 0.0) * max(y2 - y1, 0.0)
        found.append(Instance(box.id, _CATEGORY, (x1, y1, x2 - x1, y2 - y1), area, False, counts))
    return tuple(found), issues


def _outline(corners: tuple[float, float, float, float], height: int, width: int) -> list[list[float]]:
    """What is inside the image of a box as a polygon; none without area."""
    x1, x2 = (min(max(x, 0.0), float(width)) for x in corners[::2])
    y1, y2 = (min(max(y, 0.0), float(height)) for y in corners[1::2])
    return [[x1, y1, x1, y2, x2, y2, x2, y1]] if x2 > x1 and y2 > y1 else []
