"""BDD100K: semantic, instance, panoptic, drivable-area and lane labels of street scenes.

Source: doc.bdd100k.com, which is github.com/bdd100k/bdd100k (commit 9ac17c6), doc/source: ``download.rst`` (folders,
file names), ``format.rst`` (masks, bitmasks, lane bytes, classes). F. Yu et al., "BDD100K: A Diverse Driving Dataset
for Heterogeneous Multitask Learning", CVPR 2020.

``images/10k`` belongs to ``sem_seg``, ``ins_seg`` and ``pan_seg``, ``images/100k`` to ``drivable`` and ``lane``,
``images/seg_track_20`` (frames of videos) to ``seg_track_20``. Labels of a split are read from its PNGs where there are
any (``masks/`` or ``bitmasks/``), else from ``rles/``, else from ``polygons/``.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec

from segbatch import storage
from segbatch.datasets import annotation_json, bdd100k_frames, bdd100k_masks, pairing, reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.bdd100k_masks import Found
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

if TYPE_CHECKING:
    from segbatch.codecs.photo import PhotoInfo

_SPLITS = ("train", "val", "test")
_UNLABELLED = "test"
_RLES, _POLYGONS = "rles", "polygons"
_DETECTION = "labels/det_20/det_{split}.json"
_TELLING = "weather"  # frames of files that know the scene have it
_VIDEOS = "seg_track_20"


class _Part(NamedTuple):
    """A split of one kind of images: what it is called here, the folders of its photos and labels, its folder there."""

    name: str
    photos: str
    labels: str
    split: str

    @property
    def photo_folder(self) -> str:
        return f"images/{self.photos}/{self.split}"

    @property
    def in_videos(self) -> bool:
        return self.photos == _VIDEOS


class Layout(NamedTuple):
    """Where the files of a task lie, and what reads them.

    Attributes:
        classes: the class table.
        folders: of each kind of images: what its splits begin with here, the folders of photos and of labels.
        png_folder: ``masks`` or ``bitmasks``.
        read_png: of the address of a PNG.
        read_frame: of a frame, the photo's size and the JSON file's address; None where only PNGs are read.
    """

    classes: ClassTable
    folders: tuple[tuple[str, str, str], ...]
    png_folder: str
    read_png: Callable[[str], Found]
    read_frame: Callable[..., Found] | None


class _Label(NamedTuple):
    """The label of one image: what ``read`` needs of it, its tag, its size in bytes."""

    detail: dict[str, Any]
    etag: str
    size: int


class _Facts(msgspec.Struct, frozen=True):
    """What a frame says of its image."""

    attributes: Any = None
    timestamp: Any = None
    videoName: Any = None  # noqa: N815 as in the files
    frameIndex: Any = None  # noqa: N815


_FACTS = msgspec.json.Decoder(_Facts)

Frames = dict[str, list[tuple[str, annotation_json.RawFrame]]]
"""Frames by image, each with the address of its file; more than one where a file lists an image twice."""


class _Bdd100k(Dataset):
    """What the five tasks share.

    Where a split's folder of photos is empty or missing, its labels are read without them. Frames of JSON files also
    give weather, scene, time of day and timestamp of the image, else ``labels/det_20`` does. The ``test`` images have
    no public labels.
    """

    official_splits: ClassVar[tuple[str, ...]] = _SPLITS
    layout: ClassVar[Layout]

    def recognises(self, tree: Tree) -> bool:
        """Whether a split has labels of this task."""
        return any(self._source(tree, part) for part in self._parts())

    def classes(self, tree: Tree) -> ClassTable:
        """The official classes; see ``tables``."""
        return self.layout.classes

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Those that have labels here, and ``test`` where its photos are."""
        return tuple(part.name for part in self._there(tree))

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Images by name, videos by name and frame; ``group_id`` is the video, or the image itself.

        ``sample_id`` is the image's name without suffix. Labels without a photo stay items, and so do photos without a
        label. A split is held in memory, and its JSON files.

        Raises:
            ConfigError: no BDD100K with this task, no such split, a JSON file that cannot be read.
        """
        there = self._there(tree)
        if not there:
            _, photos, labels = self.layout.folders[0]
            png = f"labels/{labels}/{self.layout.png_folder}/train/NAME.png"
            expected = f"expected {png} and images/{photos}/train/NAME.jpg"
            raise ConfigError(f"{tree.source} is not BDD100K with labels of {labels}", expected)
        names = reading.choose_splits(self.name, tree.source, [p.name for p in there], splits)
        seen: dict[str, str] = {}
        for part in there:
            if part.name in names:
                yield from self._part_items(tree, part, seen)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One image with its labels, or the labels alone.

        Raises:
            DataError: a missing or broken file, labels of another size, a label map with an id that no class has, an
                image that is listed twice.
        """
        pairing.check(item)
        detail = reading.detail_of(item)
        photo = reading.read_photo(item.uri) if detail["photo"] else None
        found = self._labels(item, detail, photo[1] if photo else None)
        if found is None:
            found = Found((photo[1].height, photo[1].width) if photo else bdd100k_frames.SIZE)
        sample = reading.sample_of(item, *photo) if photo else reading.labels_only(item, *found.size)
        yield replace(
            sample,
            semantic=found.semantic,
            instances=found.instances,
            panoptic=found.panoptic,
            segments=found.segments,
            label_maps=found.label_maps,
            attributes={**detail["facts"], **found.attributes},
            issues=(*sample.issues, *found.issues),
        )

    def _parts(self) -> list[_Part]:
        return [
            _Part(f"{prefix}{s}", photos, labels, s) for prefix, photos, labels in self.layout.folders for s in _SPLITS
        ]

    def _there(self, tree: Tree) -> list[_Part]:
        def is_there(part: _Part) -> bool:
            return bool(self._source(tree, part)) or (part.split == _UNLABELLED and tree.is_folder(part.photo_folder))

        return [part for part in self._parts() if is_there(part)]

    def _source(self, tree: Tree, part: _Part) -> str:
        """The folder below ``labels/TASK`` that the labels of a part are read from; empty when there is none."""
        if next(tree.files(f"labels/{part.labels}/{self.layout.png_folder}/{part.split}", (".png",)), None):
            return self.layout.png_folder
        kinds = (_RLES, _POLYGONS) if self.layout.read_frame else ()
        return next((kind for kind in kinds if next(_json_files(tree, part, kind), None)), "")

    def _part_items(self, tree: Tree, part: _Part, seen: dict[str, str]) -> Iterator[PlanItem]:
        """The items of a part; ``seen``: photos by the sample ids that had their turn."""
        listed = tree.files(part.photo_folder, reading.IMAGE_SUFFIXES, recursive=part.in_videos)
        photos, twins = pairing.by_stem(listed)
        source = self._source(tree, part)
        frames = _frames(tree, part, source) if source in (_RLES, _POLYGONS) else {}
        labels = _from_frames(frames, part) if frames else _from_files(tree, part, self.layout.png_folder)
        missing = self._missing(tree, part, source)
        keys = sorted({*photos, *labels})
        facts = _facts(tree, part, keys, frames)
        for key in keys:
            label = labels.get(key) or missing(key)
            item = _item(tree, part, key, photos, label, facts.get(key, {}))
            if item.sample_id in seen:
                yield _second(part, key, item, seen[item.sample_id])
            else:
                seen[item.sample_id] = item.uri
                yield item
        for path, info in twins:
            yield pairing.twin(f"{part.name}/{path}", info, photos[path.rsplit(".", 1)[0]].uri, part.name)

    def _missing(self, tree: Tree, part: _Part, source: str) -> Callable[[str], _Label]:
        """What stands for the label of an image that has none."""
        if source == self.layout.png_folder:
            folder = f"labels/{part.labels}/{source}/{part.split}"
            return lambda key: _Label({"png": tree.uri(f"{folder}/{key}.png")}, reading.MISSING, 0)
        if source:
            uri = next(_json_files(tree, part, source)).uri
            return lambda key: _Label({"file": uri, "frame": None}, reading.MISSING, 0)
        return lambda key: _Label({}, "", 0)

    def _labels(self, item: PlanItem, detail: Mapping[str, Any], info: "PhotoInfo | None") -> Found | None:
        size = (info.height, info.width) if info else None
        if "png" in detail:
            found = self.layout.read_png(detail["png"])
            if size and found.size != size:
                problem = (
                    f"label map {detail['png']} is {found.size[1]} x {found.size[0]}, "
                    f"its photo {item.uri} is {size[1]} x {size[0]}"
                )
                raise DataError(problem, "make it on the photo's own grid", "size-mismatch", detail["png"])
            return found
        if "frame" not in detail or self.layout.read_frame is None:
            return None
        if detail["frame"] is None:
            problem = f"{detail['file']} has no frame {item.sample_id}"
            raise DataError(problem, "add it or unlist the image", "missing-label", detail["file"])
        frame = bdd100k_frames.decode(detail["frame"], detail["file"])
        more = {"numbers": detail["numbers"]} if "numbers" in detail else {}
        return self.layout.read_frame(frame, size, detail["file"], **more)


class SemanticSegmentation(_Bdd100k):
    """``labels/sem_seg`` of ``images/10k``: label maps of trainIds, 255 is unknown."""

    name: ClassVar[str] = "bdd100k-sem"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    formats: ClassVar[tuple[str, ...]] = ("bdd100k-sem",)
    layout: ClassVar[Layout] = Layout(
        bdd100k_masks.SEMANTIC,
        (("", "10k", "sem_seg"),),
        "masks",
        bdd100k_masks.read_semantic,
        bdd100k_frames.semantic,
    )


class InstanceSegmentation(_Bdd100k):
    """``labels/ins_seg`` of ``images/10k``, and ``seg_track_20``: objects of 8 classes.

    The splits of ``seg_track_20`` are ``seg_track_train``, ``seg_track_val`` and ``seg_track_test``; an object has the
    same id in all frames of a video. ``iscrowd`` is the attribute "crowd"; truncated, occluded, crowd and ignored of
    each object stand under ``attributes["instances"]``.
    """

    name: ClassVar[str] = "bdd100k-ins"
    tasks: ClassVar[tuple[Task, ...]] = ("instance",)
    official_splits: ClassVar[tuple[str, ...]] = (*_SPLITS, *(f"seg_track_{s}" for s in _SPLITS))
    formats: ClassVar[tuple[str, ...]] = ("bdd100k-ins",)
    grouped: ClassVar[bool] = True
    layout: ClassVar[Layout] = Layout(
        bdd100k_masks.INSTANCE,
        (("", "10k", "ins_seg"), ("seg_track_", _VIDEOS, _VIDEOS)),
        "bitmasks",
        bdd100k_masks.read_instances,
        bdd100k_frames.instances,
    )


class PanopticSegmentation(_Bdd100k):
    """``labels/pan_seg`` of ``images/10k``: segments of 40 classes; 0 is unlabeled.

    ``iscrowd`` is the attribute "crowd"; all four attributes stand under ``attributes["segments"]``.
    """

    name: ClassVar[str] = "bdd100k-pan"
    tasks: ClassVar[tuple[Task, ...]] = ("panoptic",)
    formats: ClassVar[tuple[str, ...]] = ("bdd100k-pan",)
    layout: ClassVar[Layout] = Layout(
        bdd100k_masks.PANOPTIC,
        (("", "10k", "pan_seg"),),
        "bitmasks",
        bdd100k_masks.read_panoptic,
        bdd100k_frames.panoptic,
    )


class Drivable(_Bdd100k):
    """``labels/drivable`` of ``images/100k``: direct, alternative, background."""

    name: ClassVar[str] = "bdd100k-drivable"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    formats: ClassVar[tuple[str, ...]] = ("bdd100k-drivable",)
    layout: ClassVar[Layout] = Layout(
        bdd100k_masks.DRIVABLE,
        (("", "100k", "drivable"),),
        "masks",
        bdd100k_masks.read_drivable,
        bdd100k_frames.drivable,
    )


class Lane(_Bdd100k):
    """``labels/lane`` of ``images/100k``: categories of lane marks, with label maps ``direction`` and ``style``.

    Only ``masks/`` are read: ``polygons/`` holds lines, which the official converter draws 1.4 pixels wide.
    """

    name: ClassVar[str] = "bdd100k-lane"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    formats: ClassVar[tuple[str, ...]] = ("bdd100k-lane",)
    layout: ClassVar[Layout] = Layout(
        bdd100k_masks.LANE,
        (("", "100k", "lane"),),
        "masks",
        bdd100k_masks.read_lanes,
        None,
    )


def _json_files(tree: Tree, part: _Part, kind: str) -> Iterator[ObjectInfo]:
    """``TASK_SPLIT.json``, then what lies in the folder ``SPLIT/``: a file per video."""
    folder = f"labels/{part.labels}/{kind}"
    one = tree.stat(f"{folder}/{part.labels}_{part.split}.json")
    if one:
        yield one
    yield from (info for _, info in tree.files(f"{folder}/{part.split}", (".json",)))


def _frames(tree: Tree, part: _Part, kind: str) -> Frames:
    return _by_image(_json_files(tree, part, kind), part)


def _by_image(files: Iterable[ObjectInfo], part: _Part) -> Frames:
    found: Frames = {}
    for info in files:
        for frame in annotation_json.split_frames(storage.read_bytes(info.uri), info.uri):
            stem = frame.name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
            video = frame.video_name or storage.name_of(info.uri).rsplit(".", 1)[0]
            found.setdefault(f"{video}/{stem}" if part.in_videos else stem, []).append((info.uri, frame))
    return found


def _from_files(tree: Tree, part: _Part, folder: str) -> dict[str, _Label]:
    listed = tree.files(f"labels/{part.labels}/{folder}/{part.split}", (".png",), recursive=part.in_videos)
    return {path.rsplit(".", 1)[0]: _Label({"png": i.uri}, i.etag, i.size) for path, i in listed}


def _from_frames(frames: Frames, part: _Part) -> dict[str, _Label]:
    numbers = _numbers(frames) if part.in_videos else {}
    labels: dict[str, _Label] = {}
    for key, found in frames.items():
        uri, frame = found[0]
        detail: dict[str, Any] = {"file": uri, "frame": annotation_json.annotations_text([frame.raw])[1:-1]}
        if key in numbers:
            detail["numbers"] = numbers[key]
        if len(found) > 1:
            detail["twice"] = f"{uri} and {found[1][0]}" if found[1][0] != uri else uri
        labels[key] = _Label(detail, annotation_json.digest([f.raw for _, f in found]), len(frame.raw))
    return labels


def _numbers(frames: Frames) -> dict[str, list[int]]:
    """Ids of the objects of every frame of the videos."""
    videos: dict[str, list[tuple[str, bdd100k_frames.Frame]]] = {}
    for key, found in frames.items():
        videos.setdefault(key.split("/", 1)[0], []).append((key, _decoded(*found[0])))
    numbers: dict[str, list[int]] = {}
    for video in videos.values():
        keys, decoded = zip(*sorted(video, key=lambda pair: pair[1].frame_index or 0), strict=True)
        numbers.update(zip(keys, bdd100k_frames.numbers_of(decoded), strict=True))
    return numbers


def _decoded(uri: str, frame: annotation_json.RawFrame) -> bdd100k_frames.Frame:
    """The frame; without labels where they cannot be read, which ``read`` says then."""
    try:
        return bdd100k_frames.decode(bytes(frame.raw).decode(), uri)
    except DataError:
        return bdd100k_frames.Frame(frame.name)


def _facts(tree: Tree, part: _Part, keys: Sequence[str], frames: Frames) -> dict[str, dict[str, Any]]:
    """What is known of the images: by the frames of their labels, by the task's polygons, by the detection labels."""
    facts: dict[str, dict[str, Any]] = {}
    wanted = set(keys)
    detection = tree.stat(_DETECTION.format(split=part.split))
    sources: list[Callable[[], Frames]] = [
        lambda: frames,
        lambda: _frames(tree, part, _POLYGONS),
        lambda: _by_image([detection] if detection else [], part),
    ]
    for source in sources:
        if all(_TELLING in facts.get(key, {}) for key in keys):
            break
        for key, found in source().items():
            if key in wanted:
                facts[key] = {**_said(*found[0]), **facts.get(key, {})}
    return facts


def _said(uri: str, frame: annotation_json.RawFrame) -> dict[str, Any]:
    try:
        facts = _FACTS.decode(frame.raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"frame {frame.name} of {uri} cannot be read: {error}", "correct the file") from error
    own = {"timestamp": facts.timestamp, "videoName": facts.videoName, "frameIndex": facts.frameIndex}
    attributes = facts.attributes if isinstance(facts.attributes, dict) else {}
    return {**attributes, **{name: value for name, value in own.items() if value is not None}}


def _item(
    tree: Tree, part: _Part, key: str, photos: Mapping[str, ObjectInfo], label: _Label, facts: dict[str, Any]
) -> PlanItem:
    photo = photos.get(key)
    uri = photo.uri if photo else tree.uri(f"{part.photo_folder}/{key}.jpg")
    detail = {"photo": bool(photos), "facts": facts, **label.detail}
    size = label.size + (photo.size if photo else 0)
    known = annotation_json.digest([json.dumps(facts, sort_keys=True).encode()]) if facts else ""
    etag = "+".join(filter(None, (reading.joint_etag(photo), label.etag, known)))
    sample_id = key.rsplit("/", 1)[-1]
    group = key.rsplit("/", 1)[0] if part.in_videos else sample_id
    if "twice" in detail:
        error = DataError(f"{key} is listed twice in {detail['twice']}", "list it once", pairing.DUPLICATE, uri)
        return replace(pairing.refused(sample_id, uri, etag, size, error, part.name), group_id=group)
    return PlanItem(sample_id, uri, etag, size, detail=json.dumps(detail), group_id=group, split=part.name)


def _second(part: _Part, key: str, item: PlanItem, first: str) -> PlanItem:
    """The item of an image whose id another one has."""
    problem = f"{item.uri} has the sample id of {first}"
    error = DataError(problem, "rename or remove one of them", pairing.DUPLICATE, item.uri)
    return pairing.refused(f"{part.name}/{key}", item.uri, item.etag, item.bytes, error, part.name)
