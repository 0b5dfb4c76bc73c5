"""What the loaders of finished graphs (``onnx:``, ``torchscript:``, ``pt2:``) have in common.

A graph says its shapes but seldom how photos are prepared. That comes from its metadata (see ``side_car.embedded``) or
from its side-car; where neither says ``mean`` and ``std`` for a float input, the error shows what to write.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.config import digest_of
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.models.classes import ClassesFile, class_table
from segbatch.models.graph_outputs import UNDERSTOOD, Declared, Outputs, Reading, Scores, reading
from segbatch.models.side_car import (
    SideCar,
    check_keys,
    choice_of,
    class_table_for,
    input_spec_of,
    merged,
    own_table,
    read_side_car,
    side_car_uri,
)
from segbatch.records import ClassTable

Layout = Literal["nchw", "nhwc"]
Run = Callable[[NDArray[Any]], Outputs]
"""Runs a graph on a batch; raises ``NotRunnable``."""

_INPUT_KEYS = ("resize", "longest", "divisor", "layout", "dtype", "mean", "std", "align_corners", "height", "width")
_KEYS = (*_INPUT_KEYS, "channel_order", "fill", "task", "things")
_CHOICE_KEYS = ("min_score", "nms_iou", "top_k", "mask_threshold")
_TRIAL = (64, 96)
"""(height, width) that a graph of any size is tried with."""
_FOREGROUND = class_table(ClassesFile(classes=("background", "foreground")), "")
_NORMALISATION = (
    "mean = [0.485, 0.456, 0.406] and std = [0.229, 0.224, 0.225] (ImageNet's), or mean = [0, 0, 0] and "
    "std = [1, 1, 1] (pixels as 0..1), or mean = [0, 0, 0] and std = [0.00392156862745098, 0.00392156862745098, "
    "0.00392156862745098] (0..255)"
)


class NotRunnable(Exception):
    """A run failed; the message is one line."""


@dataclass(frozen=True, slots=True)
class GraphInput:
    """The photo input of a graph.

    Attributes:
        layout, dtype: None where the graph does not say.
        height, width: None where it takes any.
        batch: images of a run; None where it takes any number.
        most: images of a run at most; None for no limit.
        divisor: of height and width.
    """

    layout: Layout | None = None
    dtype: Literal["uint8", "float32"] | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    most: int | None = None
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph that can be run.

    Attributes:
        reference: what the user gave.
        uri: the file.
        digest: of the file.
        input: what it wants.
        outputs: what it declares; empty where it does not.
        own: what it says of itself.
        run: runs it.
    """

    reference: str
    uri: str
    digest: str
    input: GraphInput
    outputs: Sequence[Declared]
    own: SideCar
    run: Run


def read_file(reference: str, uri: str) -> bytes:
    """The file that a reference names.

    Raises:
        ConfigError: it does not exist.
        StorageError: it cannot be read.
    """
    try:
        return storage.read_bytes(uri)
    except ObjectMissing as error:
        raise ConfigError(f"model {reference}: {error.problem}", error.fix) from error


def one_line(error: BaseException) -> str:
    """The last line of an error's message that says something: where torch puts its reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def input_of(
    where: str, shape: Sequence[int | None], dtype: str, most: int | None = None, divisor: int = 1
) -> GraphInput:
    """The input of a graph that declares it.

    Args:
        where: the model, for messages.
        shape: four sizes; None where it takes any.
        dtype: numpy's name.
        most, divisor: see ``GraphInput``.

    Raises:
        ConfigError: not a batch of RGB photos, or of one fixed and one free side.
    """
    sizes = ", ".join("?" if s is None else str(s) for s in shape)
    layout = _layout(shape)
    if layout is None or dtype not in ("float32", "uint8"):
        raise ConfigError(
            f"{where}: its input is {dtype} of shape ({sizes})",
            "an RGB input (n, 3, height, width) or (n, height, width, 3), float32 or uint8, is understood",
        )
    height, width = (shape[2], shape[3]) if layout == "nchw" else (shape[1], shape[2])
    if (height is None) != (width is None):
        raise ConfigError(
            f"{where}: its input ({sizes}) has one side of any size and one that is fixed",
            "export it with both sides free, or both fixed",
        )
    dtypes = cast(Literal["uint8", "float32"], dtype)
    return GraphInput(layout, dtypes, height, width, shape[0], most, divisor)


def _layout(shape: Sequence[int | None]) -> Layout | None:
    if len(shape) != 4:
        return None
    if shape[1] == 3 or (shape[1] is None and shape[3] != 3):
        return "nchw"
    return "nhwc" if shape[3] == 3 else None


def observed(graph_run: Run, graph_input: GraphInput, said: SideCar, where: str) -> list[Declared]:
    """Its outputs, seen by running it on a black photo.

    Raises:
        ConfigError: it cannot be run.
    """
    height, width = trial_size(graph_input, said)
    layout, dtype = graph_input.layout or said.layout or "nchw", graph_input.dtype or said.dtype or "float32"
    shape = (3, height, width) if layout == "nchw" else (height, width, 3)
    try:
        outputs = graph_run(np.zeros((graph_input.batch or 1, *shape), dtype))
    except NotRunnable as error:
        raise ConfigError(
            f"{where} cannot be run on an input of {height} x {width}: {error}",
            f"write the size that it wants into {where}.toml: height = ... and width = ..., or divisor = ...",
        ) from error
    return [Declared(name, tuple(v.shape), v.dtype.kind) for name, v in outputs.items()]


def trial_size(graph_input: GraphInput, said: SideCar) -> tuple[int, int]:
    """(height, width) that a graph can be tried with."""
    divisor = max(said.divisor or 1, graph_input.divisor)
    height = graph_input.height or said.height or -(-_TRIAL[0] // divisor) * divisor
    width = graph_input.width or said.width or -(-_TRIAL[1] // divisor) * divisor
    return height, width


def segmenter(graph: Graph, classes_uri: str) -> "GraphSegmenter":
    """The graph as a model.

    Raises:
        ConfigError: outputs that are not understood, a side-car that does not fit, or pre-processing, classes that
            nobody names.
    """
    side_car = read_side_car(graph.uri)
    said = merged(graph.own, side_car)
    found = _reading(graph, said)
    keys = (*_KEYS, *(_CHOICE_KEYS if found.task == "instance" else ("output",)))
    check_keys(side_car, graph.uri, keys)
    if said.task not in (None, found.task):
        raise ConfigError(
            f"{side_car_uri(graph.uri)}: task is {said.task}, but {graph.uri} gives {found.output}: {found.task}",
            UNDERSTOOD,
        )
    spec = ModelSpec(
        name=graph.reference,
        task=found.task,
        classes=_classes(graph, side_car, found, classes_uri),
        input=_input_spec(graph, found, said),
        output=found.output,
        digest="",
        licence=said.licence,
        source=said.source,
        choice=choice_of(said, found.choice),
    )
    decides = {
        "file": graph.digest,
        "input": asdict(spec.input),
        "channel_order": said.channel_order or "rgb",
        "fill": said.fill,
        "meaning": said.output,
        "choice": asdict(spec.choice),
        "label_ids": [c.label_id for c in spec.classes.classes],
    }
    return GraphSegmenter(graph, found, replace(spec, digest=digest_of(decides)), said)


def _reading(graph: Graph, said: SideCar) -> Reading:
    layout = graph.input.layout or said.layout or "nchw"
    found = reading(graph.outputs, layout, said.output)
    if found is None:
        seen = observed(graph.run, graph.input, said, graph.uri)
        found = reading(seen, layout, said.output)
        if found is None:
            shapes = "; ".join(str(o) for o in seen)
            meant = f', which cannot be output = "{said.output}"' if said.output else ""
            raise ConfigError(f"model {graph.reference}: its outputs are {shapes}{meant}", UNDERSTOOD)
    return found


def _classes(graph: Graph, side_car: SideCar, found: Reading, classes_uri: str) -> ClassTable:
    own = own_table(graph.own, graph.uri)
    if isinstance(found, Scores) and found.outputs == 1 and not own.classes:
        own = _FOREGROUND
    table = class_table_for(graph.uri, found.channels, classes_uri, side_car, own)
    if found.task == "semantic" or any(c.isthing for c in table.classes):
        return table
    if not table.classes:
        count = f"{found.channels} names" if found.channels else "names"
        raise ConfigError(
            f"model {graph.reference} does not name its classes",
            f"give {count} with --classes, or as classes = [...] in {side_car_uri(graph.uri)}",
        )
    return ClassTable(tuple(replace(c, isthing=True) for c in table.classes))


def _input_spec(graph: Graph, found: Reading, said: SideCar) -> InputSpec:
    given, where = graph.input, side_car_uri(graph.uri)
    fits: Literal["letterbox", "stretch"] = "letterbox" if found.task == "instance" else "stretch"
    default = InputSpec(
        height=given.height,
        width=given.width,
        resize=fits if given.height else "none",
        divisor=given.divisor,
        layout=given.layout or "nchw",
        dtype=given.dtype or "float32",
    )
    spec = input_spec_of(said, default)
    for key in ("layout", "dtype", "height", "width"):
        fixed = getattr(given, key)
        if fixed is not None and getattr(spec, key) != fixed:
            raise ConfigError(f"{where}: {key} is {getattr(spec, key)}, but {graph.uri} wants {fixed}", "leave it out")
    if given.height and spec.resize not in ("stretch", "letterbox"):
        raise ConfigError(
            f"{where}: resize is {spec.resize}, but {graph.uri} wants {given.height} x {given.width}",
            "stretch or letterbox lead to a fixed size",
        )
    if given.height and given.width and (given.height % spec.divisor or given.width % spec.divisor):
        raise ConfigError(
            f"{where}: divisor is {spec.divisor}, but {graph.uri} wants {given.height} x {given.width}", "leave it out"
        )
    if spec.dtype == "float32" and (said.mean is None or said.std is None):
        raise ConfigError(
            f"model {graph.reference} does not say how photos are normalised",
            f"write two lines into {where}: {_NORMALISATION}",
        )
    return spec if said.fill is None else replace(spec, mean=(said.fill / 255,) * 3)


class GraphSegmenter:
    """A graph as a ``Segmenter``."""

    def __init__(self, graph: Graph, found: Reading, spec: ModelSpec, said: SideCar) -> None:
        self.spec = spec
        self._graph = graph
        self._reading = found
        self._reversed = said.channel_order == "bgr"
        self._shift = _shift(spec.input, said)

    def forward(self, batch: NDArray[Any]) -> NDArray[Any] | Sequence[Any]:
        """What ``spec.output`` says, of each image.

        Raises:
            DataError: the graph cannot be run on this size, or its output is unusable.
        """
        step = self._graph.input.batch or self._graph.input.most or len(batch)
        parts = [self._run(batch[at : at + step]) for at in range(0, len(batch), step)]
        if self.spec.output == "detections":
            return [d for part in parts for d in part]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, batch: NDArray[Any]) -> Any:
        given = self._graph.input
        size = batch.shape[2:] if self.spec.input.layout == "nchw" else batch.shape[1:3]
        missing = (given.batch or 0) - len(batch)
        fed = self._fed(batch)
        if missing > 0:
            fed = np.concatenate([fed, np.zeros((missing, *fed.shape[1:]), fed.dtype)])
        try:
            outputs = self._graph.run(np.ascontiguousarray(fed))
        except NotRunnable as error:
            raise DataError(
                f"the model cannot be run on an input of {size[0]} x {size[1]}: {error}",
                f"write divisor = ..., or height = ... and width = ..., into {side_car_uri(self._graph.uri)}",
                "not-runnable",
            ) from error
        kept = {name: values[: len(batch)] for name, values in outputs.items()} if missing > 0 else outputs
        try:
            return self._reading.read(kept, (int(size[0]), int(size[1])), self.spec.choice)
        except (ValueError, IndexError) as error:
            raise DataError(
                f"the model's outputs are not shaped as it declares them: {error}", "export it again", "wrong-shape"
            ) from error

    def _fed(self, batch: NDArray[Any]) -> NDArray[Any]:
        """The batch with its channels in the graph's order, normalised as the graph wants it."""
        axis = 1 if self.spec.input.layout == "nchw" else 3
        if self._shift is not None:
            batch = batch + self._shift.reshape([3 if a == axis else 1 for a in range(4)])
        return np.flip(batch, axis) if self._reversed else batch


def _shift(spec: InputSpec, said: SideCar) -> NDArray[np.float32] | None:
    """What is to be added, per channel, where padding has a colour of its own.

    Padding is 0 in a normalised photo, so ``InputSpec.mean`` is the padding's colour, and the true mean is made up for.
    """
    if said.fill is None or spec.dtype == "uint8":
        return None
    shift: NDArray[np.float32] = ((np.array(spec.mean) - np.array(said.mean)) / np.array(spec.std)).astype(np.float32)
    return shift
