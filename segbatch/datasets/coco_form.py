"""What datasets and formats in COCO's form share: annotation files and their photos, cut into items; masks; ids.

A root holds ``annotations/KIND_SPLIT.json`` (or ``KIND_SPLIT.json``) and the photos in ``SPLIT/`` or ``images/SPLIT/``;
without such a folder they are looked for everywhere. COCO's downloads (``train2017.zip``, ``val2017.zip``,
``annotations_trainval2017.zip``) may lie packed in one folder.

Source: cocodataset.org/#download, #format-data and #format-results; pycocotools/coco.py of pycocotools 2.0.11.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from segbatch import storage
from segbatch.datasets import annotation_json, pairing, reading
from segbatch.datasets.annotation_json import CocoCategory, CocoDocument, CocoImage, ImageId, Rle
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassInfo, ClassTable, Issue, PlanItem, Sample
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

SPLITS = ("train2017", "val2017", "train2014", "val2014")
"""The official splits that have annotations."""

ANNOTATIONS = "annotations"
IMAGES = "images"

Segmentation: TypeAlias = list[list[float]] | Rle

NO_ANNOTATIONS = ("panoptic_coco_categories.json",)
"""JSON files that lie among the official annotations and are none."""

_RESULTS = "_results"
_OFFICIAL_NAME = re.compile(r"(?:COCO_\w+?_)?(\d{12})")
_MAX_ID = 2**63 - 1
_TURNED = 5  # EXIF orientations from here on swap height and width


@dataclass(frozen=True, slots=True)
class Document:
    """One annotation file.

    Attributes:
        split: what its name says behind the kind.
        path: in the tree, without ``.json``.
        file: address, tag and size.
    """

    split: str
    path: str
    file: ObjectInfo

    @property
    def name(self) -> str:
        """File name without ``.json``."""
        return self.path.rsplit("/", 1)[-1]


def documents(tree: Tree, kind: str) -> list[Document]:
    """``KIND_SPLIT.json`` in ``annotations/`` and in the root, official splits first; files of results are left out."""
    pattern = re.compile(rf"{kind}_(?P<split>.+)\.json")
    found: dict[str, Document] = {}
    for folder in (ANNOTATIONS, ""):
        for name, info in tree.files(folder, (".json",), recursive=False):
            match = pattern.fullmatch(name)
            if match and name not in NO_ANNOTATIONS and not match["split"].endswith(_RESULTS):
                path = f"{folder}/{name}".lstrip("/").removesuffix(".json")
                found.setdefault(match["split"], Document(match["split"], path, info))
    return sorted(found.values(), key=lambda d: (SPLITS.index(d.split) if d.split in SPLITS else len(SPLITS), d.split))


def choose(dataset: str, source: str, there: Sequence[Document], splits: Sequence[str]) -> list[Document]:
    """The documents of ``splits``, all when empty.

    Raises:
        ConfigError: a split that is not there.
    """
    chosen = reading.choose_splits(dataset, source, [d.split for d in there], splits)
    return [d for d in there if d.split in chosen]


# -- classes ---------------------------------------------------------------------------------------------------------


class _CategoriesOnly(msgspec.Struct, frozen=True):
    categories: list[CocoCategory] = []


_CATEGORIES = msgspec.json.Decoder(_CategoriesOnly)


def class_table(there: Iterable[Document], official: ClassTable, is_thing: bool) -> ClassTable:
    """The files' own categories in their order, with the colours of the official ones; else the official table.

    A category is taken for the official one of its id where the names agree. A file of other categories keeps its own
    names, although official classes have the same ids.

    Args:
        there: the annotation files; categories of all of them are joined.
        official: of the dataset.
        is_thing: what categories are that do not say it themselves.

    Raises:
        ConfigError: no annotation file, or one id with two names.
    """
    by_id = {c.label_id: c for c in official.classes}
    found: dict[int, tuple[str, str]] = {}
    classes: list[ClassInfo] = []
    for document in there:
        for category in categories_of(document.file.uri, document.file.etag):
            if category.id not in found:
                found[category.id] = category.name, document.file.uri
                classes.append(_class_of(category, by_id.get(category.id), is_thing))
            elif found[category.id][0] != category.name:
                name, uri = found[category.id]
                problem = f"category {category.id} is {name!r} in {uri} and {category.name!r} in {document.file.uri}"
                raise ConfigError(problem, "ingest the splits one by one, or give every category an id of its own")
    return ClassTable(tuple(classes)) if classes else official


@functools.lru_cache(maxsize=32)
def categories_of(uri: str, etag: str) -> tuple[CocoCategory, ...]:
    """The categories of an annotation file, in file order; the rest of it is not decoded.

    Args:
        uri: the file.
        etag: its tag; another version is read again.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = tuple(_CATEGORIES.decode(storage.read_bytes(uri)).categories)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{uri} is no COCO annotation file: {error}", "download or unpack it again") from error
    seen: set[int] = set()
    for category in found:
        if category.id in seen:
            raise ConfigError(f"{uri} lists the category {category.id} twice", "give every category an id of its own")
        seen.add(category.id)
    return found


def _class_of(category: CocoCategory, official: ClassInfo | None, is_thing: bool) -> ClassInfo:
    known = official if official and official.name == category.name else ClassInfo(category.id, category.name)
    says = category.isthing if category.isthing is not None else known.isthing if known is official else is_thing
    parent = category.supercategory if category.supercategory is not None else known.supercategory
    return replace(known, color=category.color or known.color, isthing=bool(says), supercategory=parent)


# -- photos ----------------------------------------------------------------------------------------------------------


def safe_path(file_name: str) -> str:
    """A file name of an annotation file as a relative path; empty where it would lead out of the dataset."""
    parts = [p for p in file_name.split("/") if p != "."]
    unsafe = any(p in ("", "..") or "\\" in p or "\0" in p for p in parts)
    return "" if unsafe else "/".join(parts)


class Photos:
    """The photos of a split: its own folders, else those whose name is part of the split's (``val2014`` of
    ``minival2014``), else all images of the tree but label maps."""

    def __init__(self, tree: Tree, split: str, label_folders: Sequence[str] = ()) -> None:
        tops = [f for f in tree.folders() if f not in (ANNOTATIONS, *label_folders)]
        tops += [f"{IMAGES}/{f}" for f in tree.folders(IMAGES)]
        self._own = [f for f in tops if f.rsplit("/", 1)[-1] == split]
        within = [f for f in tops if f.rsplit("/", 1)[-1] in split]
        self._named = self._own or sorted(within, key=lambda f: -len(f.rsplit("/", 1)[-1]))
        self._files: dict[str, list[tuple[str, ObjectInfo]]] = {}
        for folder in (*self._named, IMAGES, "") if self._named else ("",):
            for below, info in tree.files(folder, reading.IMAGE_SUFFIXES, folder in self._named or not self._named):
                path = f"{folder}/{below}".lstrip("/")
                if not path.startswith(tuple(f"{f}/" for f in (ANNOTATIONS, *label_folders))):
                    self._files.setdefault(path.rsplit("/", 1)[-1], []).append((path, info))
        self._base = tree.uri(self._named[0] if self._named else IMAGES if tree.is_folder(IMAGES) else split)

    def find(self, file_name: str) -> ObjectInfo | None:
        """The photo of that name, perhaps some folders down; None when it is not there or not the only one."""
        path = safe_path(file_name)
        same_name = self._files.get(path.rsplit("/", 1)[-1], [])
        found = {info.uri: info for at, info in same_name if at == path or at.endswith(f"/{path}")}
        return next(iter(found.values())) if len(found) == 1 or (found and self._named) else None

    def address(self, file_name: str) -> str:
        """Where a photo that is not there would lie; empty for a name that leads out of the dataset."""
        path = safe_path(file_name)
        return storage.join(self._base, path) if path else ""

    def others(self, suffixes: tuple[str, ...], used: Iterable[str]) -> Iterator[tuple[str, ObjectInfo]]:
        """Photos in the split's own folders that are not ``used`` (addresses), in listing order."""
        taken, own = set(used), tuple(f"{f}/" for f in self._own)
        for path, info in (pair for pairs in self._files.values() for pair in pairs):
            if own and path.startswith(own) and path.lower().endswith(suffixes) and info.uri not in taken:
                yield path, info


# -- items -----------------------------------------------------------------------------------------------------------


class Detail(msgspec.Struct, frozen=True, omit_defaults=True):
    """``PlanItem.detail``: what the annotation file says of one image.

    Attributes:
        document: address of the annotation file.
        image: its entry there.
        annotations: the annotations of this image as they stand there, as one JSON array.
        unknown: category ids of these annotations that the file's categories lack.
        labels_only: no photo of the split is there.
        label: address of the image's label map (panoptic).
        license, info: as they stand there.
    """

    document: str
    image: CocoImage
    annotations: msgspec.Raw = msgspec.Raw(b"[]")
    unknown: tuple[int, ...] = ()
    labels_only: bool = False
    label: str = ""
    license: Any = None
    info: Any = None

    @property
    def text(self) -> str:
        """``annotations`` as ``annotation_json`` decodes them."""
        return bytes(self.annotations).decode()


class _CategoryOf(msgspec.Struct, frozen=True):
    category_id: int | None = None
    segments_info: "list[_CategoryOf]" = []


_DETAIL = msgspec.json.Decoder(Detail)
_CATEGORY_OF = msgspec.json.Decoder(_CategoryOf)

LabelOf: TypeAlias = Callable[[Sequence[memoryview]], tuple[str, ObjectInfo | None]]
"""Address and file of an image's label map by its annotations."""


@dataclass(slots=True)
class Planned:
    """What earlier images of a listing have taken: sample ids and photos, each with the file that lists it."""

    ids: dict[str, str] = field(default_factory=dict)
    photos: dict[str, str] = field(default_factory=dict)

    def refusal(self, image: CocoImage, photo_uri: str, document: str) -> DataError | None:
        """What makes an entry of ``images`` unusable; else its id and photo are taken.

        Raises:
            ConfigError: another annotation file has an image of that id.
        """
        sample_id, named = str(image.id), f"image {image.id!r} of {document}"
        if not sample_id:
            return DataError(f"an image of {document} has an empty id", "give it one", "bad-annotation", document)
        if not photo_uri:
            problem = f"the file name {image.file_name!r} of {named} is no path below the dataset"
            return DataError(problem, "give the path below the folder of photos", "bad-path", document)
        if self.ids.get(sample_id, document) != document:
            problem = f"{self.ids[sample_id]} and {document} both have an image {image.id!r}"
            raise ConfigError(problem, "ingest the splits one by one (--split), each into a root of its own")
        if sample_id in self.ids:
            return DataError(f"{document} lists the id {image.id!r} twice", "remove one", pairing.DUPLICATE, document)
        if photo_uri in self.photos:
            problem = f"{named} is the photo {photo_uri}, which {self.photos[photo_uri]} lists already"
            return DataError(problem, "list it once", "duplicate-photo", document)
        self.ids[sample_id] = self.photos[photo_uri] = document
        return None


def planned(
    tree: Tree, document: Document, official: ClassTable, taken: Planned, label_of: LabelOf | None = None
) -> Iterator[PlanItem]:
    """The images of an annotation file in its order, orphaned annotations, then photos that it does not list.

    Images of which nothing can be read become items that ``detail_of`` refuses: duplicate ids, photos listed twice,
    file names that lead out of the dataset, annotations of images that are not listed (``unlisted-image``), photos that
    are not listed (``missing-label``).

    Args:
        tree: the root.
        document: what to list.
        official: the categories of a file that names none.
        taken: by the documents before; is added to.
        label_of: finds label maps.

    Raises:
        ConfigError: the file cannot be read, or shares an image id with one before.
    """
    uri, split = document.file.uri, document.split
    coco = annotation_json.split_coco(storage.read_bytes(uri), uri)
    photos = Photos(tree, split, (document.path, document.name))
    found = [photos.find(image.file_name) for image in coco.images]
    describe = _Describer(uri, coco, official, labels_only=not any(found))
    for place, (image, photo) in enumerate(zip(coco.images, found, strict=True)):
        photo_uri = photo.uri if photo else photos.address(image.file_name)
        error = taken.refusal(image, photo_uri, uri)
        if error:
            where = f"#images[{place}]"
            yield pairing.refused(f"{document.name}{where}", f"{uri}{where}", document.file.etag, 0, error, split)
        else:
            raws = coco.annotations.get(image.id, [])
            label_uri, label = label_of(raws) if label_of else ("", None)
            detail = describe(image, raws, label_uri)
            files = [photo, label] if label_uri else [photo]
            yield PlanItem(
                sample_id=str(image.id),
                uri=photo_uri,
                etag=f"{reading.joint_etag(*files)}+{annotation_json.digest([detail])}",
                bytes=sum(f.size for f in files if f) + sum(map(len, raws)),
                detail=detail.decode(),
                split=split,
            )
    yield from _orphans(document, coco)
    yield from _unlisted(document, coco, photos, taken)


def _orphans(document: Document, coco: CocoDocument) -> Iterator[PlanItem]:
    """An item for every image that has annotations and is not listed."""
    uri = document.file.uri
    for image_id, raws in coco.orphans().items():
        problem = f"{uri} has {len(raws)} annotations of the image {image_id!r}, which it does not list"
        error = DataError(problem, "list the image, or remove them", "unlisted-image", uri)
        where, tag, size = f"#{image_id}", annotation_json.digest(raws), sum(map(len, raws))
        yield pairing.refused(f"{document.name}{where}", f"{uri}{where}", tag, size, error, document.split)


def _unlisted(document: Document, coco: CocoDocument, photos: Photos, taken: Planned) -> Iterator[PlanItem]:
    """An item for every photo that is not listed; files of other suffixes than the listed ones are none of them."""
    suffixes = tuple({f".{i.file_name.rsplit('.', 1)[-1].lower()}" for i in coco.images})
    for path, info in photos.others(suffixes, taken.photos):
        problem = f"photo {info.uri} is not listed by {document.file.uri}"
        error = DataError(problem, "list or remove it", "missing-label", info.uri)
        yield pairing.refused(f"{document.name}#{path}", info.uri, info.etag, info.size, error, document.split)


class _Describer:
    """Makes the ``Detail`` of every image of a file, encoded."""

    def __init__(self, uri: str, coco: CocoDocument, official: ClassTable, labels_only: bool) -> None:
        self._uri, self._info, self._labels_only = uri, coco.info, labels_only
        self._known = {c.id for c in coco.categories} or {c.label_id for c in official.classes}
        entries = coco.licenses if isinstance(coco.licenses, list) else []
        self._licenses = {e["id"]: e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), int | str)}

    def __call__(self, image: CocoImage, raws: Sequence[memoryview], label_uri: str) -> bytes:
        detail = Detail(
            document=self._uri,
            image=image,
            annotations=msgspec.Raw(annotation_json.annotations_text(raws).encode()),
            unknown=tuple(sorted({c for raw in raws for c in categories_in(raw)} - self._known)),
            labels_only=self._labels_only,
            label=label_uri,
            license=None if image.license is None else self._licenses.get(image.license, {"id": image.license}),
            info=self._info,
        )
        return msgspec.json.encode(detail)


def categories_in(raw: memoryview) -> set[int]:
    """Category ids of an annotation, a result or the segments of an image; none of one that ``read`` will refuse."""
    try:
        found = _CATEGORY_OF.decode(raw)
    except msgspec.DecodeError:
        return set()
    return {c.category_id for c in (found, *found.segments_info) if c.category_id is not None}


def detail_of(item: PlanItem) -> Detail:
    """The detail of an item of ``planned``.

    Raises:
        DataError: the item is one of those of which nothing can be read.
    """
    try:
        return _DETAIL.decode(item.detail)
    except msgspec.ValidationError:
        pairing.check(item)  # says why
        raise


# -- samples ---------------------------------------------------------------------------------------------------------


def sample_of(item: PlanItem, detail: Detail) -> Sample:
    """The photo's part of a sample, with the image's attributes; without image where no photo of the split is there.

    Raises:
        DataError: a missing or broken photo, ``size-mismatch`` with the size in the annotation file, ``missing-size``.
    """
    if detail.labels_only:
        height, width = detail.image.height, detail.image.width
        if not height or not width or min(height, width) < 0:
            problem = f"{detail.document} gives no size for the image {item.sample_id}, and its photo is not there"
            raise DataError(problem, "add height and width, or the photo", "missing-size", detail.document)
        sample = reading.labels_only(item, height, width)
    else:
        data, info = reading.read_photo(item.uri)
        _check_size(detail, item.uri, info)
        sample = reading.sample_of(item, data, info)
    return replace(sample, attributes=_attributes(detail))


def _check_size(detail: Detail, uri: str, info: "PhotoInfo") -> None:
    said = detail.image.height, detail.image.width
    if None in said or said == (info.height, info.width):
        return
    problem = f"photo {uri} is {info.width} x {info.height}, {detail.document} says {said[1]} x {said[0]}"
    fix = "give the annotations the photo's own size"
    if said == (info.width, info.height) and info.exif_orientation >= _TURNED:
        fix = "the annotations are of the photo as its EXIF orientation turns it: turn its pixels and drop the tag"
    raise DataError(problem, fix, "size-mismatch", uri)


def _attributes(detail: Detail) -> dict[str, Any]:
    image = detail.image
    found = {
        "file_name": image.file_name,
        "license": detail.license,
        "coco_url": image.coco_url,
        "flickr_url": image.flickr_url,
        "date_captured": image.date_captured,
        "info": detail.info,
    }
    return {key: value for key, value in found.items() if value is not None}


class Complaint(NamedTuple):
    """What is wrong with the ``place``-th shape; it can be used all the same."""

    place: int
    code: str
    text: str


def masks(
    shapes: Sequence[tuple[str, Segmentation]], height: int, width: int, uri: str
) -> tuple[list[bytes], list[Complaint]]:
    """Polygons and runs as masks, each as ``COCO.annToRLE`` of pycocotools draws it.

    A polygon that is no polygon (fewer than three points, an odd number of coordinates) draws nothing.

    Args:
        shapes: of each its name for messages, and its segmentation.
        height, width: of the image.
        uri: the annotation file.

    Returns:
        COCO counts by shape; and complaints: ``empty-polygon``, ``zero-area``, ``outside-image``, ``empty-mask``.

    Raises:
        DataError: ``size-mismatch``: runs of another size; ``bad-annotation``: broken runs.
    """
    from segbatch.codecs import polygon, rle

    counts, complaints = [b""] * len(shapes), []
    drawn: dict[int, list[list[float]]] = {}
    for place, (name, shape) in enumerate(shapes):
        if isinstance(shape, Rle):
            counts[place] = _runs(name, shape, height, width, uri)
        else:
            codes = [polygon.problems(p, height, width) for p in shape]
            drawn[place] = [p for p, wrong in zip(shape, codes, strict=True) if "empty-polygon" not in wrong]
            for code in dict.fromkeys(code for wrong in codes for code in wrong):
                complaints.append(Complaint(place, code, f"{name} of {uri} {_SAID[code]}"))
    try:
        strings = polygon.rasterize_all(list(drawn.values()), height, width)
    except ValueError as error:
        raise DataError(f"polygons in {uri}: {error}", "correct them", "bad-annotation", uri) from error
    for place, string in zip(drawn, strings, strict=True):
        counts[place] = string
    told = {c.place for c in complaints}
    for place, string in enumerate(counts):
        if place not in told and not rle.area(string):
            complaints.append(Complaint(place, "empty-mask", f"{shapes[place][0]} of {uri} has no pixels"))
    return counts, complaints


_SAID = {
    "empty-polygon": "has a polygon of fewer than three points, or with an odd number of coordinates; it draws nothing",
    "zero-area": "has a polygon without area",
    "outside-image": "has a polygon that reaches out of the image; its mask is cut off there",
}


def _runs(name: str, shape: Rle, height: int, width: int, uri: str) -> bytes:
    from segbatch.codecs import rle

    if shape.size != (height, width):
        problem = f"{name} of {uri} is a mask of {shape.size[1]} x {shape.size[0]}, its image is {width} x {height}"
        raise DataError(problem, "make the mask on the photo's own grid", "size-mismatch", uri)
    try:
        string = shape.counts.encode() if isinstance(shape.counts, str) else rle.from_uncompressed(shape.counts)
        rle.check(string, height, width)
    except ValueError as error:
        problem = f"{name} of {uri}: {error}"
        raise DataError(problem, "write the mask again", "bad-annotation", uri) from error
    return string


def unique_ids(given: Sequence[ImageId], uri: str) -> tuple[list[int], list[Issue]]:
    """The annotations' own ids; those that are not integers above 0, or taken by one before, become free ones.

    Evaluators take an object of id 0 for one that was not found, so no instance has it.

    Returns:
        The ids, and an issue for each new one: ``id-renumbered`` or ``duplicate-id``.
    """
    free = max((i for i in given if isinstance(i, int) and 0 < i < _MAX_ID), default=0) + 1
    ids: list[int] = []
    taken: set[int] = set()
    issues = []
    for number in given:
        if isinstance(number, int) and 0 < number <= _MAX_ID and number not in taken:
            ids.append(number)
        else:
            while free in taken:
                free += 1
            is_twin = number in taken
            why = "is there twice in one image" if is_twin else "is no number above 0"
            code = pairing.DUPLICATE if is_twin else "id-renumbered"
            told = number if isinstance(number, int) and abs(number) <= _MAX_ID else None
            issues.append(Issue(code, f"the annotation id {number!r} of {uri} {why}; it is {free} here", told))
            ids.append(free)
        taken.add(ids[-1])
    return ids, issues


# -- ids of images ---------------------------------------------------------------------------------------------------


def official_id(stem: str) -> int | None:
    """The image id in COCO's file names (without suffix): ``000000000139``, ``COCO_val2014_000000000042``."""
    found = _OFFICIAL_NAME.fullmatch(stem)
    return int(found[1]) if found else None


def image_id_of(sample_id: str) -> ImageId:
    """The ``image_id`` that a sample has in COCO's files: a number where its id is one or its file is called by one.

    Ids with ``#`` are those of items that could not be read.

    >>> image_id_of("139"), image_id_of("test2017/000000000001.jpg"), image_id_of("aachen_000000_000019")
    (139, 1, 'aachen_000000_000019')
    """
    if sample_id.isascii() and sample_id.isdecimal() and str(int(sample_id)) == sample_id:
        return int(sample_id)
    number = None if "#" in sample_id else official_id(sample_id.rsplit("/", 1)[-1].split(".", 1)[0])
    return sample_id if number is None else number
