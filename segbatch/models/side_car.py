"""What stands beside a checkpoint: ``<file-or-folder>.toml``.

It says what a checkpoint of somebody else's does not say itself: names of classes, pre-processing, what comes out.

    classes = ["background", "road", "car"]
    things = ["car"]
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    divisor = 32
"""

import ast
import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segbatch import storage
from segbatch.config import parse
from segbatch.errors import ConfigError, ObjectMissing
from segbatch.models.base import Choice, InputSpec
from segbatch.models.classes import ClassesFile, class_table, read_class_table, toml_content
from segbatch.records import ClassTable, Task

Side = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Mean = Annotated[float, Field(ge=-1, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]

_INPUT = ("height", "width", "resize", "longest", "divisor", "layout", "dtype", "mean", "std", "align_corners")
_CHOICE = ("min_score", "nms_iou", "top_k", "mask_threshold", "overlap", "stuff_area")
OWN_METADATA = "segbatch.json"
"""Name of the metadata entry (ONNX) or extra file (TorchScript, pt2) that holds a side-car as JSON."""
_ULTRALYTICS_FILL = 114
"""Source: LetterBox in ultralytics/data/augment.py."""
_ALWAYS = {*ClassesFile.model_fields, "licence", "source"}
_SCORES = "scores"
"""Another name of ``output``, as side-cars of LiteRT files have it."""


class SideCar(ClassesFile):
    """Content of a side-car; None where it says nothing.

    Attributes:
        classes, label_ids, colors: see ``ClassesFile``; in the order of the network's outputs.
        things: names of the classes that are countable objects.
        task: what the network predicts.
        output: what its maps are; ``scores`` is another name of this key.
        height, width, resize, longest, divisor, layout, dtype, align_corners: see ``InputSpec``. With a height and a
            width but no ``resize``, photos are stretched to that size.
        mean, std: per channel, red, green, blue, in units of 0..1 (those of 0..255 divided by 255). A network that is
            fed 0..255 has ``std = [0.00392156862745098, ...]``, that is 1/255.
        channel_order: of the channels that the network is fed; OpenCV's is ``bgr``.
        fill: grey level 0..255 of the padding, where it is not the mean colour.
        min_score, nms_iou, top_k, mask_threshold, overlap, stuff_area: see ``Choice``.
        licence, source: of the weights.
    """

    things: tuple[str, ...] | None = None
    task: Task | None = None
    output: Literal["logits", "probabilities", "labels"] | None = None
    height: Side | None = None
    width: Side | None = None
    resize: Literal["none", "stretch", "letterbox", "short-side"] | None = None
    longest: Side | None = None
    divisor: Side | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    channel_order: Literal["rgb", "bgr"] | None = None
    dtype: Literal["uint8", "float32"] | None = None
    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    align_corners: bool | None = None
    fill: Annotated[int, Field(ge=0, le=255)] | None = None
    min_score: Share | None = None
    nms_iou: Share | None = None
    top_k: Side | None = None
    mask_threshold: Share | None = None
    overlap: Share | None = None
    stuff_area: Annotated[int, Field(ge=0)] | None = None
    licence: str = ""
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        """``scores`` becomes ``output``; with both, the former is an unknown key."""
        if isinstance(data, dict) and _SCORES in data and "output" not in data:
            return {("output" if k == _SCORES else k): v for k, v in data.items()}
        return data


def side_car_uri(uri: str) -> str:
    """Where the side-car of a file or folder lies."""
    return f"{storage.resolve(uri).rstrip('/')}.toml"


def read_side_car(uri: str) -> SideCar:
    """The side-car of a file or folder; an empty one where there is none.

    Raises:
        ConfigError: it is not TOML, has an unknown key or a wrong value.
        StorageError: it cannot be read.
    """
    where = side_car_uri(uri)
    try:
        text = storage.read_bytes(where).decode("utf-8-sig")
    except ObjectMissing:
        return SideCar()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text") from error
    return parse(SideCar, toml_content(text, where), where)


def embedded(texts: Mapping[str, str], where: str) -> SideCar:
    """What a file says of itself in its metadata, as a side-car.

    Args:
        texts: by name. ``segbatch.json`` holds a side-car's keys as JSON. Without it, ``names`` (of classes: a list,
            or a dictionary by index) and what Ultralytics writes beside it (``imgsz``, ``license``) are understood:
            JSON, or Python literals, which are parsed and never run. With ``imgsz``, photos are fed as Ultralytics
            does: scaled to fit, grey 114 beside them, values 0..1.
        where: the file, for messages.

    Raises:
        ConfigError: it is not readable, has an unknown key or a wrong value.
    """
    if OWN_METADATA in texts:
        return parse(SideCar, _literal(texts[OWN_METADATA], f"{where}: {OWN_METADATA}"), f"{where}: {OWN_METADATA}")
    said: dict[str, Any] = {}
    if "names" in texts:
        said["classes"] = _names(_literal(texts["names"], f"{where}: names"))
    if "license" in texts:
        said["licence"] = texts["license"]
    if "imgsz" in texts:
        size = _literal(texts["imgsz"], f"{where}: imgsz")
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        said |= {"height": height, "width": width, "resize": "letterbox", "fill": _ULTRALYTICS_FILL}
        said |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return parse(SideCar, said, where)


def _literal(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where} is neither JSON nor a literal: {text[:60]}") from error


def _names(found: Any) -> Any:
    """Names in the order of their indices."""
    if isinstance(found, dict):
        indices = sorted(found, key=lambda k: int(k) if str(k).isdecimal() else -1)
        if [str(i) for i in indices] == [str(n) for n in range(len(indices))]:
            return tuple(found[i] for i in indices)
    return found


def merged(own: SideCar, side_car: SideCar) -> SideCar:
    """What a file says of itself, with what its side-car says in its place."""
    return own.model_copy(update={k: getattr(side_car, k) for k in side_car.model_fields_set})


def check_keys(side_car: SideCar, uri: str, understood: Collection[str]) -> None:
    """Refuse what a loader does not act upon.

    Args:
        side_car: of ``uri``.
        uri: of the checkpoint.
        understood: keys besides classes, label_ids, colors, licence, source.

    Raises:
        ConfigError: naming the other keys.
    """
    other = sorted(side_car.model_fields_set - _ALWAYS - set(understood))
    if other:
        raise ConfigError(
            f"{side_car_uri(uri)}: {', '.join(other)} cannot be chosen for this kind of file",
            f"understood here: {', '.join(sorted({*_ALWAYS, *understood}))}",
        )


def own_table(own: SideCar, uri: str) -> ClassTable:
    """The classes that a file itself names; empty where it names none."""
    table = class_table(own, uri)
    return _with_things(uri, table, own, table)


def class_table_for(
    uri: str, channels: int | None, classes_uri: str, side_car: SideCar, own: ClassTable | None
) -> ClassTable:
    """The classes of a checkpoint: those of ``--classes``, else the side-car's, else its own.

    Which of them are things: those that the side-car calls so, else those that are things in ``own`` at their place.

    Args:
        uri: of the checkpoint.
        channels: how many classes the network has; None (or 0) where that is not known.
        classes_uri: the list that the user gave, or empty.
        side_car: see ``read_side_car``.
        own: what the checkpoint itself says; None or empty where it says nothing.

    Returns:
        An empty table where nobody says.

    Raises:
        ConfigError: another number of names than the network has classes; a thing that is no class.
    """
    own = own or ClassTable(())
    where, table = uri, own
    if classes_uri:
        where, table = classes_uri, read_class_table(classes_uri)
    elif side_car.classes:
        where = side_car_uri(uri)
        table = class_table(side_car, where)
    if table.classes and channels and len(table.classes) != channels:
        raise ConfigError(
            f"{where} names {len(table.classes)} classes, {uri} has {channels} outputs",
            "give one name for each output",
        )
    return _with_things(uri, table, side_car, own)


def _with_things(uri: str, table: ClassTable, side_car: SideCar, own: ClassTable) -> ClassTable:
    names = [c.name for c in table.classes]
    if side_car.things is not None:
        unknown = [n for n in side_car.things if n not in names]
        if unknown:
            raise ConfigError(
                f"{side_car_uri(uri)}: things names {', '.join(unknown)}, which are no classes",
                f"the classes are {', '.join(names) or 'not known'}",
            )
        countable = [n in side_car.things for n in names]
    elif len(own.classes) == len(names):
        countable = [c.isthing for c in own.classes]
    else:
        return table
    pairs = zip(table.classes, countable, strict=True)
    return ClassTable(tuple(dataclasses.replace(c, isthing=thing) for c, thing in pairs))


def input_spec_of(side_car: SideCar, default: InputSpec) -> InputSpec:
    """``default`` with what the side-car says in its place."""
    said = _said(side_car, _INPUT)
    if default.resize == "none" and "resize" not in said and {"height", "width"} <= set(said):
        said["resize"] = "stretch"
    return dataclasses.replace(default, **said)


def choice_of(side_car: SideCar, default: Choice) -> Choice:
    """``default`` with what the side-car says in its place."""
    return dataclasses.replace(default, **_said(side_car, _CHOICE))


def _said(side_car: SideCar, keys: tuple[str, ...]) -> dict[str, Any]:
    return {k: getattr(side_car, k) for k in keys if getattr(side_car, k) is not None}
