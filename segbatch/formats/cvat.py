"""CVAT for images 1.1: ``annotations.xml`` with a mask for every region, and ``labels.json`` to make the task with.

An image is named by the end of its photo's address, with as many folders as its sample id has: upload the photos with
these folders. ``<mask>`` has the box ``left``, ``top``, ``width`` and ``height`` in pixels, and ``rle``: the lengths of
the runs in the box, row by row, background first. CVAT takes classes from its task, not from the file; paste
``labels.json`` into the raw view of the task's labels.

Read are masks, polygons and boxes; tags, points and polylines mark no area. Polygons and boxes are drawn as COCO draws
polygons. A document type declaration is refused, so no entity is ever expanded.

Lost are: ids (numbered from 1), crowds (they become plain instances), instances without a pixel, scores, and areas
and boxes that are not those of the mask.

Source: docs.cvat.ai/docs/manual/advanced/xml_format (version 1.1); github.com/cvat-ai/cvat,
``cvat/apps/dataset_manager/formats/cvat.py`` (``dump_as_cvat_annotation``, ``load_anno``) and issue 6487.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats import regions
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import PhotoNames, item_of, missing, photo_path, refuse_unknown, size_of
from segbatch.formats.regions import Region
from segbatch.records import ClassTable, PlanItem, Prediction, Task

_FILE = "annotations.xml"
_AREAS = ("mask", "polygon", "box", "ellipse", "cuboid", "skeleton")
"""Shapes that mark an area; the last three cannot be read."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DIGEST_BYTES = 8


class Cvat(Format):
    """``annotations.xml`` of CVAT for images 1.1 with a mask for every instance, and the task's labels."""

    name: ClassVar[str] = "cvat"
    task: ClassVar[Task] = "instance"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """``annotations.xml`` and ``labels.json``; the document is held in memory.

        Raises:
            DataError: ``unknown-label``: a label id that no class has; ``bad-name``: a name that XML cannot hold.
        """
        shapes = output.map(functools.partial(_shapes, classes=classes, task=self.task), rows)
        images = [f"  <image id={quoteattr(str(n))} {attributes}\n" for n, attributes in enumerate(shapes)]
        output.put(_FILE, "".join([_head(len(images), classes), *images, "</annotations>\n"]).encode())
        labels = [{"name": c.name, **_color(c.color), "type": "any", "attributes": []} for c in classes.classes]
        output.put("labels.json", json.dumps(labels, indent=1, ensure_ascii=False).encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; images are found by as much of the end of the photo's address as tells them apart.

        Raises:
            ConfigError: also XML of another kind, and two images of one sample.
        """
        photos = PhotoNames(samples)
        images = _images_by_sample(files, photos)
        for place, sample in enumerate(photos.samples):
            image = images.get(place)
            uri = f"{image.uri if image else files.uri(_FILE)}#{sample.sample_id}"
            if image is None:
                yield item_of(sample, uri, reading.MISSING, 0, {"shapes": None})
                continue
            labels = [shape.get("label", "") for _, shape in image.shapes]
            detail = {"size": image.size, "shapes": image.shapes, **regions.detail_of(labels, classes)}
            text = json.dumps(detail).encode()
            yield item_of(sample, uri, hashlib.blake2b(text, digest_size=_DIGEST_BYTES).hexdigest(), len(text), detail)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The regions of an image.

        Raises:
            DataError: ``missing-prediction``: the document does not name the image; ``size-mismatch``,
                ``bad-prediction``, ``unknown-label``, ``unlabelled``.
        """
        detail = reading.detail_of(item)
        if detail["shapes"] is None:
            raise missing(item)
        height, width = size_of(item)
        if detail["size"] != [str(width), str(height)]:
            problem = f"{item.uri} is {' x '.join(detail['size'])}, its photo is {width} x {height}"
            raise DataError(problem, "export the task of that photo", "size-mismatch", item.uri)
        found = [_region(kind, shape, item) for kind, shape in detail["shapes"]]
        yield regions.prediction_of(found, item, self.task)


class CvatSemantic(Cvat):
    """``annotations.xml`` of CVAT for images 1.1 with a mask for every class of the label map; bare pixels are void."""

    name: ClassVar[str] = "cvat-semantic"
    task: ClassVar[Task] = "semantic"


# -- writing ---------------------------------------------------------------------------------------------------------


def _head(images: int, classes: ClassTable) -> str:
    labels = "".join(
        f"        <label><name>{escape(_xml(c.name))}</name>"
        + "".join(f"<color>{color}</color>" for color in _color(c.color).values())
        + "<type>any</type><attributes></attributes></label>\n"
        for c in classes.classes
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>\n'
        f"      <size>{images}</size>\n      <mode>annotation</mode>\n"
        f"      <labels>\n{labels}      </labels>\n    </task>\n  </meta>\n"
    )


def _color(color: tuple[int, int, int] | None) -> dict[str, str]:
    return {} if color is None else {"color": f"#{bytes(color).hex()}"}


def _xml(text: str) -> str:
    """``text``, which XML can hold.

    Raises:
        DataError: it cannot hold some of the characters.
    """
    if _NOT_XML.search(text):
        raise DataError(f"XML cannot hold the name {text!r}", "rename it", "bad-name")
    return text


def _shapes(row: Labels, classes: ClassTable, task: Task) -> str:
    """The rest of an ``<image>`` element after its id."""
    source = "manual" if row.is_truth else "auto"
    masks = [
        f"    <mask label={quoteattr(_xml(r.label))} source={quoteattr(source)} occluded={quoteattr('0')} "
        f"{_rle(r.counts, row.height, row.width)} z_order={quoteattr('0')}></mask>\n"
        for r in regions.regions_of(row, classes, task)
    ]
    size = f"width={quoteattr(str(row.width))} height={quoteattr(str(row.height))}"
    return f"name={quoteattr(_xml(photo_path(row)))} {size}>\n{''.join(masks)}  </image>"


def _rle(counts: bytes, height: int, width: int) -> str:
    """The attributes of a mask that has a pixel."""
    from segbatch.codecs import rle, runlength

    left, top, across, down = (int(v) for v in rle.bbox(counts, height, width))
    runs = runlength.encode(rle.decode(counts, height, width)[top : top + down, left : left + across])
    lengths = ([0] if runs.values[0] else []) + runs.lengths.tolist()
    box = f"left={quoteattr(str(left))} top={quoteattr(str(top))}"
    text = quoteattr(", ".join(map(str, lengths)))
    return f"rle={text} {box} width={quoteattr(str(across))} height={quoteattr(str(down))}"


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Image:
    """An ``<image>``: the document, name, width and height as they stand there, and its areas by tag and attributes."""

    uri: str
    name: str
    size: tuple[str, str]
    shapes: list[tuple[str, dict[str, str]]] = field(default_factory=list)


def _images_by_sample(files: Tree, photos: PhotoNames) -> dict[int, _Image]:
    """Images by the place of their sample."""
    paths = {photo_path(s): i for i, s in enumerate(photos.samples)}
    documents = [info.uri for _, info in files.files("", (".xml",))]
    if not documents:
        raise ConfigError(f"{files.source} holds no XML file", f"give the {_FILE} of a CVAT export")
    found: dict[int, _Image] = {}
    unknown = []
    for uri in documents:
        for image in _images(uri):
            place = paths.get(image.name)
            place = photos.find(image.name) if place is None else place
            if place is None:
                unknown.append(f"{uri}#{image.name}")
            elif place in found:
                first, sample = found[place].name, photos.samples[place].sample_id
                raise ConfigError(f"{uri}: {first} and {image.name} are both the sample {sample}", "keep one of them")
            else:
                found[place] = image
    refuse_unknown(unknown, files.source)
    return found


def _images(uri: str) -> list[_Image]:
    """The images of a document.

    Raises:
        ConfigError: not XML, with a document type, or not CVAT for images.
    """
    handler = _Handler(uri)
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = handler.doctype
    parser.StartElementHandler = handler.start
    parser.EndElementHandler = handler.end
    try:
        parser.Parse(storage.read_bytes(uri), True)
    except expat.ExpatError as error:
        raise ConfigError(f"{uri} is not well-formed XML: {error}", "export it again") from error
    return handler.images


class _Handler:
    """Takes the parts of a document as the parser meets them."""

    def __init__(self, uri: str) -> None:
        self.images: list[_Image] = []
        self._uri = uri
        self._depth = 0
        self._image: _Image | None = None

    def doctype(self, name: str, system_id: str | None, public_id: str | None, has_subset: bool) -> None:
        """A document type declaration begins."""
        raise ConfigError(f"{self._uri} has a document type declaration", "CVAT writes none; remove it")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        if (self._depth == 0) != (tag == "annotations") or tag == "track":
            what = "a task of a video" if tag == "track" else f"an element <{tag}> at depth {self._depth}"
            raise ConfigError(f"{self._uri} has {what}", "export it as CVAT for images 1.1")
        self._depth += 1
        if tag == "image":
            size = (attributes.get("width", ""), attributes.get("height", ""))
            self._image = _Image(self._uri, attributes.get("name", ""), size)
            self.images.append(self._image)
        elif tag in _AREAS and self._image is not None:
            self._image.shapes.append((tag, dict(attributes)))

    def end(self, tag: str) -> None:
        """An element ends."""
        self._depth -= 1
        if tag == "image":
            self._image = None


def _region(kind: str, shape: Mapping[str, str], item: PlanItem) -> Region:
    """The region of a shape.

    Raises:
        DataError: it cannot be read, or does not fit the photo.
    """
    from segbatch.codecs import polygon

    height, width = size_of(item)
    try:
        if kind == "mask":
            counts = _counts(shape, height, width)
        elif kind == "polygon":
            points = [float(c) for pair in shape["points"].split(";") for c in pair.split(",")]
            counts = polygon.rasterize([points], height, width)
        elif kind == "box":
            counts = polygon.rasterize([_corners(shape)], height, width)
        else:
            raise ValueError("only masks, polygons and boxes can be read")
    except (ValueError, KeyError) as error:
        problem = f"a <{kind}> of {item.uri} is wrong: {error}"
        raise DataError(problem, "correct it in CVAT and export again", "bad-prediction", item.uri) from error
    return Region(shape.get("label", ""), counts)


def _counts(shape: Mapping[str, str], height: int, width: int) -> bytes:
    """COCO's counts of a mask.

    Raises:
        ValueError: the runs do not fill the box, or the box does not lie in the photo.
        KeyError: an attribute is missing.
    """
    from segbatch.codecs import rle

    left, top, across, down = (int(shape[key]) for key in ("left", "top", "width", "height"))
    if min(left, top) < 0 or min(across, down) < 1 or left + across > width or top + down > height:
        raise ValueError(f"its box {across} x {down} at {left}, {top} does not lie in a photo of {width} x {height}")
    lengths = [int(n) for n in shape["rle"].split(",")]
    if min(lengths) < 0 or sum(lengths) != across * down:
        raise ValueError(f"its runs cover {sum(lengths)} pixels, its box has {across * down}")
    mask = np.zeros((height, width), bool)
    runs = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    mask[top : top + down, left : left + across] = runs.reshape(down, across)
    return rle.encode(mask)


def _corners(shape: Mapping[str, str]) -> Sequence[float]:
    """Flat corners of a box, which is turned clockwise around its middle."""
    left, top, right, bottom = (float(shape[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
    angle = math.radians(float(shape.get("rotation", "0")))
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = (left + right) / 2, (top + bottom) / 2
    across, down = (right - left) / 2, (bottom - top) / 2
    sides = ((-across, -down), (across, -down), (across, down), (-across, down))
    return [c for a, b in sides for c in (x + a * cos - b * sin, y + a * sin + b * cos)]
