"""BDD100K: what its evaluation server takes, and what its toolkit takes besides.

* ``bdd100k-sem``, ``bdd100k-drivable``, ``bdd100k-lane``: ``NAME.png`` of 8 bits for every image.
* ``bdd100k-pan``: ``NAME.png``, an RGBA bitmask.
* ``bdd100k-ins``: ``bitmasks/NAME.png`` and ``scores.json`` (``-r bitmasks --score-file scores.json`` of
  ``bdd100k.eval.run``), a list of ``{"name": "NAME.jpg", "labels": [{"id", "index", "score"}]}``; ``index`` is the
  object's id in the bitmask. Frames of a video lie in ``bitmasks/VIDEO/``.

The server takes a zip of such a folder. Imported are the same files, and Scalabel JSON of frames with ``rle``, which
the toolkit takes too (not for lanes).

Source: github.com/bdd100k/bdd100k (commit 9ac17c6), doc/source/evaluate.rst (submission formats), doc/source/format.rst
(masks and bitmasks), bdd100k/eval/run.py, bdd100k/eval/ins_seg.py (names, scores).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import png
from segbatch.datasets import annotation_json, bdd100k, bdd100k_frames, bdd100k_masks, reading
from segbatch.datasets.annotation_json import RawFrame
from segbatch.datasets.bdd100k_masks import MOST_OBJECTS, Marked
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import item_of, label_path, match_files, missing, refuse_unknown, size_of, stem_of
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Task

SCORES = "scores.json"
BITMASKS = "bitmasks"

_PNG, _JSON = (".png",), (".json",)


class _Score(msgspec.Struct, frozen=True):
    index: int
    score: float


class _Scores(msgspec.Struct, frozen=True):
    labels: list[_Score] | None = None


_SCORES = msgspec.json.Decoder(_Scores)


class _Bdd100k(Format):
    """What the five share."""

    layout: ClassVar[bdd100k.Layout]

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """A PNG for every row.

        Raises:
            ConfigError: the samples have other classes than the official ones.
            DataError: ``unknown-label``: an id that no class has.
        """
        self._check_classes(classes)
        for path, data in output.map(self._file, rows):
            output.put(path, data)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``: PNGs where there are any, else the frames of all JSON files, which are held in memory.

        Raises:
            ConfigError: neither PNGs nor JSON files, an image that is listed twice, images that are no samples.
        """
        if next(files.files("", _PNG), None) is None and self.layout.read_frame:
            yield from _frame_items(files, samples)
        else:
            yield from map(_with_file, match_files(files, samples, self._path, _PNG))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One prediction.

        Raises:
            DataError: missing, broken, of another size (in RLE), an id that no class has.
        """
        detail = reading.detail_of(item)
        if detail.get("missing"):
            raise missing(item)
        if "frame" in detail and self.layout.read_frame:
            frame = bdd100k_frames.decode(detail["frame"], detail["file"])
            found = self.layout.read_frame(frame, size_of(item), detail["file"])
        else:
            found = self.layout.read_png(item.uri)
        yield Prediction(
            semantic=None if found.semantic is None else found.semantic.astype(np.uint16),
            instances=found.instances,
            panoptic=found.panoptic,
            segments=found.segments,
            label_maps=found.label_maps,
        )

    def _path(self, row: Labels | SampleRef) -> str:
        return label_path(row.sample_id, ".png")

    def _file(self, row: Labels) -> tuple[str, bytes]:
        """Path and bytes of a row's PNG."""
        assert row.semantic is not None
        self._check_map(row.semantic, row)
        return self._path(row), png.encode_grey(row.semantic, bits=8)

    def _check_classes(self, classes: ClassTable) -> None:
        """Samples without a class table are taken as they are."""
        have = {(c.label_id, c.name) for c in classes.classes}
        strange = have - {(c.label_id, c.name) for c in self.layout.classes.classes}
        if strange:
            shown = ", ".join(f"{label_id} {name}" for label_id, name in sorted(strange)[:3])
            fix = "export samples of that dataset, or choose the format of theirs"
            raise ConfigError(f"{self.name} has no classes {shown}", fix)

    def _check_map(self, label: NDArray[Any], row: Labels) -> None:
        known = reading.known_ids(self.layout.classes)[label]
        if not known.all():
            self._check_ids(label[~known][:1].tolist(), row)

    def _check_ids(self, ids: Iterable[int], row: Labels) -> None:
        known = {c.label_id for c in self.layout.classes.classes}
        strange = sorted(set(ids) - known)
        if strange:
            problem = f"{row.sample_id} has the label id {strange[0]}, which {self.name} has not"
            raise DataError(problem, "map the labels to the official ids", "unknown-label", row.image_uri)


class SemanticSegmentation(_Bdd100k):
    """Label maps of trainIds 0..18; 255 is unknown."""

    name: ClassVar[str] = "bdd100k-sem"
    task: ClassVar[Task] = "semantic"
    layout: ClassVar[bdd100k.Layout] = bdd100k.SemanticSegmentation.layout


class Drivable(_Bdd100k):
    """Label maps of direct (0), alternative (1) and background (2)."""

    name: ClassVar[str] = "bdd100k-drivable"
    task: ClassVar[Task] = "semantic"
    layout: ClassVar[bdd100k.Layout] = bdd100k.Drivable.layout


class Lane(_Bdd100k):
    """Lane bytes of category, direction and style; where the latter two are missing: parallel and solid."""

    name: ClassVar[str] = "bdd100k-lane"
    task: ClassVar[Task] = "semantic"
    layout: ClassVar[bdd100k.Layout] = bdd100k.Lane.layout

    def _file(self, row: Labels) -> tuple[str, bytes]:
        assert row.semantic is not None
        self._check_map(row.semantic, row)
        try:
            return self._path(row), bdd100k_masks.write_lanes(row.semantic, row.label_maps)
        except ValueError as error:
            problem = f"{row.sample_id} cannot be written as lane bytes: {error}"
            raise DataError(problem, "correct the label maps", "unknown-label", row.image_uri) from error


class PanopticSegmentation(_Bdd100k):
    """Bitmasks of segments. Ids stay where they are 1..65,535, else segments are counted from 1.

    Truncated, occluded and ignored are written for ground truth; crowd is ``iscrowd``.
    """

    name: ClassVar[str] = "bdd100k-pan"
    task: ClassVar[Task] = "panoptic"
    layout: ClassVar[bdd100k.Layout] = bdd100k.PanopticSegmentation.layout

    def _file(self, row: Labels) -> tuple[str, bytes]:
        assert row.panoptic is not None and row.segments is not None
        self._check_ids((s.category_id for s in row.segments), row)
        flags = _flags(row, "segments")
        ids = _ids_for_file([s.id for s in row.segments])
        marked = [Marked(i, s.category_id, flags(s.id, s.iscrowd)) for i, s in zip(ids, row.segments, strict=True)]
        return self._path(row), bdd100k_masks.write_bitmask(row.panoptic, marked)


class InstanceSegmentation(_Bdd100k):
    """Bitmasks of objects, and their scores. Where objects overlap, the higher score covers the lower; an object of
    which nothing is left, or that has no pixels, is in neither file. Ground truth gets the score 1.

    Ids and attributes as of ``bdd100k-pan``. Imported are the objects that have a score, in the order of the file;
    frames of videos may do without, as segmentation tracking does.
    """

    name: ClassVar[str] = "bdd100k-ins"
    task: ClassVar[Task] = "instance"
    layout: ClassVar[bdd100k.Layout] = bdd100k.InstanceSegmentation.layout

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """See ``_Bdd100k.write``; and ``scores.json``."""
        self._check_classes(classes)
        entries = []
        for path, data, entry in output.map(self._scored_file, rows):
            output.put(path, data)
            entries.append(entry)
        output.put(SCORES, b"[\n" + b",\n".join(entries) + b"\n]\n")

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``_Bdd100k.items``.

        Raises:
            ConfigError: also where several JSON files lie beside the bitmasks, or none although images need scores.
        """
        if next(files.files("", _PNG), None) is None:
            yield from _frame_items(files, samples)
            return
        uris = [info.uri for _, info in files.files("", _JSON)]
        if len(uris) > 1:
            raise ConfigError(f"{files.source} has {len(uris)} JSON files: {', '.join(uris[:3])}", f"keep {SCORES}")
        scores = _frames_by_stem(files) if uris else {}
        for item in map(_with_file, match_files(files, samples, self._path, _PNG)):
            if uris:
                yield _with_scores(item, uris[0], scores.get(_name(item.sample_id)))
            elif _in_video(item):
                yield item
            else:
                raise ConfigError(f"{files.source} has no {SCORES}", "put the JSON of scores beside the bitmasks")

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The objects of one image.

        Raises:
            DataError: as ``_Bdd100k.read``; ``bad-annotation``: no scores of the image, or an index listed twice.
        """
        for prediction in super().read(item):
            detail = reading.detail_of(item)
            if "scores" in detail:
                yield Prediction(instances=_scored(prediction.instances or (), detail, item))
            else:
                yield prediction

    def _path(self, row: Labels | SampleRef) -> str:
        folder = f"{BITMASKS}/{row.group_id}" if _in_video(row) else BITMASKS
        return f"{folder}/{label_path(row.sample_id, '.png')}"

    def _scored_file(self, row: Labels) -> tuple[str, bytes, bytes]:
        """Path and bytes of a row's PNG, and its entry of the scores."""
        from segbatch.codecs import rle

        assert row.instances is not None
        self._check_ids((i.category_id for i in row.instances), row)
        flags = _flags(row, "instances")
        ids = _ids_for_file([i.id for i in row.instances])
        marked = [Marked(i, o.category_id, flags(o.id, o.iscrowd)) for i, o in zip(ids, row.instances, strict=True)]
        layers = sorted(enumerate(row.instances, 1), key=lambda layer: _score(layer[1]))
        index = rle.paint([o.counts for _, o in layers], [n for n, _ in layers], row.height, row.width, np.uint16)
        shown = np.bincount(index.ravel(), minlength=len(ids) + 1) > 0
        labels = [
            {"id": str(i), "index": i, "score": _score(o)}
            for n, (i, o) in enumerate(zip(ids, row.instances, strict=True), 1)
            if shown[n]
        ]
        entry = {"name": f"{_name(row.sample_id)}.jpg", "labels": labels}
        return self._path(row), bdd100k_masks.write_bitmask(index, marked), json.dumps(entry).encode()


def _score(instance: Instance) -> float:
    return 1.0 if instance.score is None else instance.score


def _in_video(row: Labels | SampleRef | PlanItem) -> bool:
    return row.group_id not in ("", row.sample_id)


def _name(sample_id: str) -> str:
    """The image's name without suffix, by which frames are known."""
    return stem_of(sample_id).rsplit("/", 1)[-1]


def _ids_for_file(ids: Sequence[int]) -> Sequence[int]:
    """The ids that a bitmask gets."""
    if len(ids) > MOST_OBJECTS:
        raise DataError(f"{len(ids)} objects are more than a bitmask can hold", "drop some", "bad-annotation")
    return ids if all(1 <= i <= MOST_OBJECTS for i in ids) else range(1, len(ids) + 1)


def _flags(row: Labels, kind: str) -> Callable[[int, bool], int]:
    """Attributes as bits by id; those of the sample belong to its ground truth alone."""
    known: dict[str, Any] = row.attributes.get(kind) or {} if row.is_truth else {}
    return lambda i, iscrowd: bdd100k_masks.flags_of({**known.get(str(i), {}), "crowd": iscrowd})


def _with_file(item: PlanItem) -> PlanItem:
    """An item of ``match_files``, marked where there is no file."""
    if not item.etag.endswith(f"+{reading.MISSING}"):
        return item
    return _with(item, missing=True)


def _with(item: PlanItem, tag: str = "", **detail: Any) -> PlanItem:
    etag = f"{item.etag}+{tag}" if tag else item.etag
    return replace(item, etag=etag, detail=json.dumps({**reading.detail_of(item), **detail}))


def _with_scores(item: PlanItem, uri: str, frame: tuple[str, RawFrame] | None) -> PlanItem:
    if frame is None:
        return _with(item, reading.MISSING, scores=None, file=uri)
    raw = [frame[1].raw]
    return _with(item, annotation_json.digest(raw), scores=bytes(raw[0]).decode(), file=uri)


def _scored(instances: Sequence[Instance], detail: Mapping[str, Any], item: PlanItem) -> tuple[Instance, ...]:
    """The objects that have a score, in the order of the scores."""
    uri = detail["file"]
    if detail["scores"] is None:
        raise DataError(f"{uri} has no scores of {item.sample_id}", "add them", "bad-annotation", uri)
    try:
        scores = _SCORES.decode(detail["scores"]).labels or []
    except (msgspec.DecodeError, RecursionError) as error:
        problem = f"the scores of {item.sample_id} in {uri} cannot be read: {error}"
        raise DataError(problem, "give an index and a score for every object", "bad-annotation", uri) from error
    if len({s.index for s in scores}) < len(scores):
        problem = f"the scores of {item.sample_id} in {uri} list an index twice"
        raise DataError(problem, "list every object once", "bad-annotation", uri)
    by_id = {i.id: i for i in instances}
    return tuple(replace(by_id[s.index], score=s.score) for s in scores if s.index in by_id)


def _frame_items(files: Tree, samples: Iterable[SampleRef]) -> Iterator[PlanItem]:
    """One item per sample: its frame in the JSON files."""
    frames = _frames_by_stem(files)
    if not frames:
        raise ConfigError(f"{files.source} holds neither PNGs nor JSON files with frames", "check the format")
    used: set[str] = set()
    for sample in samples:
        name = _name(sample.sample_id)
        uri, frame = frames.get(name, ("", None))
        if frame is None:
            first = next(iter(frames.values()))[0]
            yield item_of(sample, f"{first}#{sample.sample_id}", reading.MISSING, 0, {"missing": True})
            continue
        used.add(name)
        text = bytes(frame.raw).decode()
        tag = annotation_json.digest([frame.raw])
        yield item_of(sample, f"{uri}#{sample.sample_id}", tag, len(text), {"frame": text, "file": uri})
    refuse_unknown([frame.name for name, (_, frame) in frames.items() if name not in used], files.source)


def _frames_by_stem(files: Tree) -> dict[str, tuple[str, RawFrame]]:
    """The frames of all JSON files, with the addresses of their files, by the image's name without suffix."""
    found: dict[str, tuple[str, RawFrame]] = {}
    for _, info in files.files("", _JSON):
        for frame in annotation_json.split_frames(storage.read_bytes(info.uri), info.uri):
            name = _name(frame.name)
            if name in found:
                raise ConfigError(f"{info.uri} lists {frame.name} a second time", "list every image once")
            found[name] = (info.uri, frame)
    return found
