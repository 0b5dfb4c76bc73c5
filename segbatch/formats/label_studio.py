"""Label Studio: tasks with brush regions as JSON to import, and the labeling configuration that they need.

``tasks-0001.json``, ... are lists of tasks in Label Studio's basic format: ``data.image`` is the photo's address, which
Label Studio must be able to open. Predictions stand under ``predictions``, ground truth under ``annotations``. A region
is a mask of the whole photo, ``value.rle``: the bytes of @thi.ng/rle-pack over its RGBA pixels, row by row, as a list.
``labeling-config.xml`` names the classes.

Read are brush, polygon and rectangle regions. Where a task has annotations, its predictions do not count. A pixel is
part of a brush region where it is not wholly transparent. Polygons and rectangles are drawn as COCO draws polygons.

Lost are: crowds (they become plain instances), instances without a pixel, and areas and boxes that are not those of
the mask.

Source: labelstud.io/guide/predictions, /guide/task_format and /tags/brushlabels; label-studio-sdk 2.1.2,
``converter/brush.py`` (``encode_rle``, ``decode_rle``, ``mask2rle``) and ``converter/imports/coco.py``.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats import regions
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import PhotoNames, item_of, missing, refuse_unknown, size_of
from segbatch.formats.regions import Region
from segbatch.records import ClassTable, PlanItem, Prediction, Task

_CONTROL, _OBJECT = "label", "image"
"""Names of the tags in the labeling configuration that regions refer to."""

_FILE_BYTES = 200_000_000
"""Label Studio takes files of up to 250 MB."""

_CHANNELS = 4
_OPAQUE = 255
_WORD_BITS = 8
_SIZE_BITS = (3, 4, 8, 16)
"""Bits of the four sizes in which rle-pack writes the length of a run."""

_HEADER_BITS = 32 + 5 + 4 * 4
_DIGEST_BYTES = 8
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of a file that is uploaded."""


class LabelStudio(Format):
    """Tasks for Label Studio with a brush region for every instance, and their labeling configuration."""

    name: ClassVar[str] = "label-studio"
    task: ClassVar[Task] = "instance"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """``tasks-0001.json`` and so on, each below 200 MB unless a task is larger, and ``labeling-config.xml``.

        Raises:
            DataError: ``unknown-label``: a label id that no class has; ``bad-size``: a photo of 2**30 pixels or more.
        """
        tasks = output.map(functools.partial(_task, classes=classes, task=self.task), rows)
        for number, part in enumerate(_parts(tasks), 1):
            output.put(f"tasks-{number:04d}.json", b"[\n" + b",\n".join(part) + b"\n]\n")
        output.put("labeling-config.xml", _config(classes).encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``. A task belongs to the sample ``data.sample_id``, else to the photo ``data.image``.

        Raises:
            ConfigError: also JSON of another kind, or two tasks of one sample.
        """
        photos = PhotoNames(samples)
        tasks = _tasks_by_sample(files, photos)
        for place, sample in enumerate(photos.samples):
            found = tasks.get(place)
            uri = f"{found.uri if found else files.uri('tasks-0001.json')}#{sample.sample_id}"
            if found is None:
                yield item_of(sample, uri, reading.MISSING, 0, {"answers": None})
                continue
            labels = [label for answer in found.answers for region in answer for label in _labels(region)]
            detail = {"answers": found.answers, **regions.detail_of(labels, classes)}
            text = json.dumps(detail).encode()
            yield item_of(sample, uri, hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest(), len(text), detail)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The regions of a task.

        Raises:
            DataError: ``missing-prediction``: neither an annotation nor a prediction; ``ambiguous``: several of them;
                ``size-mismatch``, ``bad-prediction``, ``unknown-label``, ``unlabelled``.
        """
        answers = reading.detail_of(item)["answers"]
        if not answers:
            raise missing(item)
        if len(answers) > 1:
            problem = f"{item.uri} has {len(answers)} answers"
            raise DataError(problem, "keep one, or mark one annotation as ground truth", "ambiguous", item.uri)
        found = [region for text in answers[0] for region in _region(text, item)]
        yield regions.prediction_of(found, item, self.task)


class LabelStudioSemantic(LabelStudio):
    """Tasks for Label Studio with a brush region for every class of the label map; unmarked pixels are void."""

    name: ClassVar[str] = "label-studio-semantic"
    task: ClassVar[Task] = "semantic"


# -- writing ---------------------------------------------------------------------------------------------------------


def _task(row: Labels, classes: ClassTable, task: Task) -> bytes:
    size = {"original_width": row.width, "original_height": row.height, "image_rotation": 0}
    result = []
    for number, region in enumerate(regions.regions_of(row, classes, task), 1):
        value = {
            "format": "rle",
            "rle": list(pack(region.counts, row.height, row.width)),
            "brushlabels": [region.label],
        }
        score = {} if region.score is None else {"score": region.score}
        tags = {"from_name": _CONTROL, "to_name": _OBJECT, "type": "brushlabels"}
        result.append({"id": str(region.number or number), **tags, **size, **score, "value": value})
    answer: dict[str, Any] = {"result": result, **({"ground_truth": True} if row.is_truth else {})}
    data = {"image": row.image_uri, "sample_id": row.sample_id}
    return msgspec.json.encode({"data": data, "annotations" if row.is_truth else "predictions": [answer]})


def _parts(tasks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Tasks in lists of at most ``_FILE_BYTES``; at least one list."""
    part: list[bytes] = []
    size = 0
    for task in tasks:
        if part and size + len(task) > _FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(task)
        size += len(task)
    yield part


def _config(classes: ClassTable) -> str:
    labels = "".join(f"    <Label value={quoteattr(c.name)}{_background(c.color)}/>\n" for c in classes.classes)
    return (
        f'<View>\n  <Image name="{_OBJECT}" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="{_CONTROL}" toName="{_OBJECT}">\n{labels}  </BrushLabels>\n</View>\n'
    )


def _background(color: tuple[int, int, int] | None) -> str:
    return "" if color is None else f' background="#{bytes(color).hex()}"'


def pack(counts: bytes, height: int, width: int) -> bytes:
    """A mask as Label Studio's RLE, bit for bit as its ``mask2rle(255 * mask)``.

    All four channels of a pixel of the mask are 255. After the number of bytes (32 bits), the bits of a byte less one
    (5) and those of the four sizes less one (4 each), every run is: 1, the size's index (2 bits), the length less one,
    the byte. Runs of more than 65,536 bytes are cut. Zeros fill the last byte; they fill one more where it is full.

    Args:
        counts: COCO compressed RLE.
        height: of the photo, pixels.
        width: of the photo, pixels.

    Raises:
        DataError: ``bad-size``: the length does not fit 32 bits.
    """
    from segbatch.codecs import rle, runlength

    size = _CHANNELS * height * width
    if size >= 1 << 32:
        raise DataError(f"a photo of {width} x {height} is too large for Label Studio's RLE", "cut it", "bad-size")
    runs = runlength.encode(rle.decode(counts, height, width))
    numbers, bits = _words(runs.values.astype(np.int64) * _OPAQUE, runs.lengths.astype(np.int64) * _CHANNELS)
    header = size
    for number, length in ((_WORD_BITS, 5), *((b, 4) for b in _SIZE_BITS)):
        header = header << length | (number - 1)
    return _written(np.append(header, numbers), np.append(_HEADER_BITS, bits))


def _words(values: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs as numbers to write, and the bits of each; the rest of a run that is cut has the largest size too."""
    sizes = np.searchsorted([1 << b for b in _SIZE_BITS[:-1]], lengths)
    longest = 1 << _SIZE_BITS[-1]
    pieces = -(-lengths // longest)
    cut = np.full(int(pieces.sum()), longest, np.int64)
    cut[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest
    values, sizes = np.repeat(values, pieces), np.repeat(sizes, pieces)
    bits = np.array(_SIZE_BITS)[sizes]
    return (((4 | sizes) << bits | (cut - 1)) << _WORD_BITS) | values, 3 + bits + _WORD_BITS


def _written(numbers: NDArray[np.int64], bits: NDArray[np.int64]) -> bytes:
    """The last ``bits`` of every number, one after the other."""
    places = np.unpackbits(numbers.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    data = np.packbits(places[np.arange(64) >= 64 - bits[:, None]]).tobytes()
    return data + (b"" if int(bits.sum()) % 8 else b"\0")


# -- reading ---------------------------------------------------------------------------------------------------------


def unpack(data: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """The mask of Label Studio's RLE: what is not wholly transparent; as its ``decode_rle`` and channel 3.

    Args:
        data: any rle-pack of bytes: also runs that are written out, and other sizes than ``pack`` uses.
        height: of the photo, pixels.
        width: of the photo, pixels.

    Returns:
        bool of shape (height, width).

    Raises:
        ValueError: it ends early, holds no bytes, or is of another size.
    """
    bits = _Bits(data)
    size, word = bits.read(32), bits.read(5) + 1
    sizes = [bits.read(4) + 1 for _ in range(4)]
    if size != _CHANNELS * height * width:
        raise ValueError(f"it has {size} bytes, a photo of {width} x {height} has {_CHANNELS * height * width}")
    if word != _WORD_BITS:
        raise ValueError(f"its words have {word} bits instead of {_WORD_BITS}")
    pieces: list[NDArray[np.uint8]] = []
    done = 0
    while done < size:
        is_run, length = bits.read(1), bits.read(sizes[bits.read(2)]) + 1
        if is_run:
            pieces.append(np.full(length, bits.read(_WORD_BITS), np.uint8))
        else:
            pieces.append(np.frombuffer(bits.read(length * _WORD_BITS).to_bytes(length, "big"), np.uint8))
        done += length
    if done > size:
        raise ValueError(f"its runs make {done} bytes instead of {size}")
    found: NDArray[np.bool_] = np.concatenate([np.empty(0, np.uint8), *pieces])[_CHANNELS - 1 :: _CHANNELS] > 0
    return found.reshape(height, width)


class _Bits:
    """Reads numbers from bytes, the highest bit first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def read(self, bits: int) -> int:
        """The next number.

        Raises:
            ValueError: there are not so many bits left.
        """
        start, stop = self._place, self._place + bits
        if stop > 8 * len(self._data):
            raise ValueError("it ends early")
        self._place = stop
        covering = self._data[start // 8 : -(-stop // 8)]
        return int.from_bytes(covering, "big") >> (-stop % 8) & ((1 << bits) - 1)


class _Answer(msgspec.Struct):
    """An annotation or a prediction of a task."""

    result: list[msgspec.Raw]
    ground_truth: bool | None = False
    was_cancelled: bool | None = False


class _TaskJson(msgspec.Struct):
    """A task; exports name predictions by their numbers unless told to write them out."""

    data: dict[str, Any]
    annotations: list[_Answer | int] | None = None
    predictions: list[_Answer | int] | None = None


class _Head(msgspec.Struct):
    """What a region says of its kind and class."""

    type: str
    value: dict[str, msgspec.Raw] = {}


class _Found(NamedTuple):
    """The answers of a task that count, each a list of regions as text, and the file that has it."""

    uri: str
    answers: list[list[str]]


def _tasks_by_sample(files: Tree, photos: PhotoNames) -> dict[int, _Found]:
    """Tasks by the place of their sample."""
    places = {s.sample_id: i for i, s in enumerate(photos.samples)}
    addresses = {s.image_uri: i for i, s in enumerate(photos.samples)}
    documents = [info.uri for _, info in files.files("", (".json",))]
    if not documents:
        raise ConfigError(f"{files.source} holds no JSON file", "check the format")
    found: dict[int, _Found] = {}
    unknown = []
    for uri in documents:
        for task in _tasks(uri):
            image = str(task.data.get("image", ""))
            place = places.get(str(task.data.get("sample_id", "")), addresses.get(image))
            place = _place_of(image, photos) if place is None else place
            if place is None:
                unknown.append(f"{uri}#{image}")
            elif place in found:
                problem = f"{found[place].uri} and {uri} have a task for the sample {photos.samples[place].sample_id}"
                raise ConfigError(problem, "keep one of them")
            else:
                found[place] = _Found(uri, _answers(task))
    refuse_unknown(unknown, files.source)
    return found


def _tasks(uri: str) -> list[_TaskJson]:
    try:
        return msgspec.json.decode(storage.read_bytes(uri), type=list[_TaskJson])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = f"{uri} is no list of Label Studio's tasks: {error}"
        raise ConfigError(problem, "export it as JSON, not as JSON-MIN or another format") from error


def _place_of(image: str, photos: PhotoNames) -> int | None:
    """The sample of a photo that Label Studio opens by its URL, serves from a folder, or has uploaded."""
    address = urlsplit(image)
    path = parse_qs(address.query).get("d", [unquote(address.path)])[0]
    if path.startswith("/data/upload/"):
        path = _UPLOADED.sub("", path.rsplit("/", 1)[-1], count=1)
    return photos.find(path) if path else None


def _answers(task: _TaskJson) -> list[list[str]]:
    """The annotation that is ground truth, else all that were not cancelled, else the predictions."""
    good = [a for a in task.annotations or () if isinstance(a, _Answer) and not a.was_cancelled]
    good = [a for a in good if a.ground_truth] or good
    good = good or [a for a in task.predictions or () if isinstance(a, _Answer)]
    return [[bytes(region).decode() for region in answer.result] for answer in good]


def _labels(region: str) -> list[str]:
    """Names of a region's classes; none where it has no class, or is no region at all."""
    try:
        head = msgspec.json.decode(region, type=_Head)
        named = head.value.get(head.type, head.value.get("labels"))
        return [] if named is None else msgspec.json.decode(named, type=list[str])
    except msgspec.DecodeError:
        return []  # ``read`` says what is wrong with it


class _Value(msgspec.Struct):
    """The shape of a region: a mask, or a polygon or rectangle in percent of the photo's sides."""

    rle: list[int] | None = None
    points: list[tuple[float, float]] | None = None
    x: float = 0
    y: float = 0
    width: float | None = None
    height: float | None = None
    rotation: float = 0


class _RegionJson(msgspec.Struct):
    """A region, or another result such as a choice."""

    type: str
    value: _Value
    id: str | int = ""
    score: float | None = None
    original_width: int | None = None
    original_height: int | None = None
    image_rotation: float = 0


_AREAS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")
"""Types of the results that mark an area and have a class; others (choices, keypoints, texts) do not count."""


def _region(text: str, item: PlanItem) -> Iterator[Region]:
    """The region that a result is; nothing for results that mark no area.

    Raises:
        DataError: it cannot be read, or does not fit the photo.
    """
    from segbatch.codecs import polygon, rle

    height, width = size_of(item)
    try:
        head = msgspec.json.decode(text, type=_Head)
        if head.type not in _AREAS:
            return
        region = msgspec.json.decode(text, type=_RegionJson)
        _check(region, (height, width), item)
        if region.value.rle is not None:
            counts = rle.encode(unpack(bytes(region.value.rle), height, width))
        else:
            counts = polygon.rasterize([_outline(region, height, width)], height, width)
    except (msgspec.DecodeError, ValueError) as error:
        raise DataError(f"a region of {item.uri}: {error}", "correct it", "bad-prediction", item.uri) from error
    labels = _labels(text)
    if len(labels) != 1:
        problem = f"the region {region.id} of {item.uri} has {len(labels)} classes"
        raise DataError(problem, "give it one", "bad-prediction", item.uri)
    number = int(region.id) if str(region.id).isascii() and str(region.id).isdigit() else 0
    yield Region(labels[0], counts, number, region.score)


def _check(region: _RegionJson, size: tuple[int, int], item: PlanItem) -> None:
    given = (region.original_height or size[0], region.original_width or size[1])
    if given != size:
        problem = f"the region {region.id} of {item.uri} is for a photo of {given[1]} x {given[0]}"
        fix = f"the sample is {size[1]} x {size[0]}; label that photo"
        raise DataError(problem, fix, "size-mismatch", item.uri)
    if region.image_rotation % 360:
        problem = f"the region {region.id} of {item.uri} was drawn on a rotated photo"
        raise DataError(problem, "turn it back in Label Studio and export again", "bad-prediction", item.uri)


def _outline(region: _RegionJson, height: int, width: int) -> list[float]:
    """Flat corners in pixels; rectangles are turned clockwise around their upper left corner.

    Raises:
        ValueError: a shape of another kind.
    """
    value = region.value
    if value.points is not None:
        corners = value.points
        return [c for x, y in corners for c in (x / 100 * width, y / 100 * height)]
    if value.width is None or value.height is None:
        raise ValueError(f"a shape of the type {region.type} cannot be read")
    left, top = value.x / 100 * width, value.y / 100 * height
    across, down = value.width / 100 * width, value.height / 100 * height
    cos, sin = math.cos(math.radians(value.rotation)), math.sin(math.radians(value.rotation))
    sides = ((0.0, 0.0), (across, 0.0), (across, down), (0.0, down))
    return [c for x, y in sides for c in (left + x * cos - y * sin, top + x * sin + y * cos)]
