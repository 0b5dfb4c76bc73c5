"""LiteRT (TensorFlow Lite) files: ``litert:path-or-uri``.

The file's own input says size and type. Its output is one of: label maps (n, h, w) of integers; scores (n, h, w, C),
float or quantised; one score (n, h, w, 1), the probability of the foreground, which becomes two classes.

Classes come from, in this order: the list the user gives (``--classes``); a side-car ``<file>.toml`` (see ``side_car``;
of its other keys, ``mean``, ``std`` and ``output`` count); the only ``*labels*.txt`` of the same folder; the label file
packed into the model. With none of these the label maps are written as they come.
"""

import functools
import io
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.config import digest_of
from segbatch.errors import ConfigError, ObjectMissing
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.checkpoint import weights_digest
from segbatch.models.classes import ClassesFile, class_table, names_in, read_class_table
from segbatch.models.side_car import SideCar, check_keys, class_table_for, input_spec_of, read_side_car, side_car_uri
from segbatch.records import ClassTable

_EXTRA = "pip install 'segbatch[litert]'"
_TINY = 1e-6
"""Probabilities are kept this far from 0 and 1 before their logarithm is taken."""

_AS_IT_IS = InputSpec(resize="stretch", layout="nhwc", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Pixels are fed as 0..1 where nobody says otherwise."""
_FOREGROUND = class_table(ClassesFile(classes=("background", "foreground")), "")


@dataclass(frozen=True, slots=True)
class LiteRtSource:
    """A LiteRT file and, optionally, a class list."""

    uri: str
    classes_uri: str = ""

    @property
    def reference(self) -> str:
        """``litert:uri``."""
        return f"litert:{self.uri}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; the file is read and parsed, no tensors are allocated."""
        return self._open(threads=1).spec

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        segmenter = self._open(threads)
        segmenter.allocate()
        return segmenter

    def _open(self, threads: int) -> "LiteRtSegmenter":
        uri = storage.resolve(self.uri)
        try:
            data = storage.read_bytes(uri)
        except ObjectMissing as error:
            raise ConfigError(f"model {self.reference}: {error.problem}", error.fix) from error
        side_car = read_side_car(uri)
        check_keys(side_car, uri, ("mean", "std", "output"))
        make = functools.partial(_interpreter, data, threads, self.reference)
        interpreter = make()
        tensors = _tensors(interpreter, self.reference)
        if side_car.output == "labels" and not tensors.labels:
            raise ConfigError(
                f"{side_car_uri(uri)}: the outputs of {uri} are no labels", "write logits or probabilities"
            )
        classes = _classes(uri, data, side_car, self.classes_uri, tensors.channels)
        spec = _spec(self.reference, data, tensors, side_car, classes)
        return LiteRtSegmenter(make, interpreter, spec, tensors, side_car)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The only input and output of a file.

    Attributes:
        input, output: their indices.
        height, width: of the input.
        input_type: ``uint8``, ``int8`` or ``float32``.
        labels: the output is a label map.
        channels: score channels; 0 for a label map.
        scale, zero_point: how scores are quantised; scale 0 when they are not.
    """

    input: int
    output: int
    height: int
    width: int
    input_type: str
    labels: bool
    channels: int
    scale: float
    zero_point: int


def _interpreter(data: bytes, threads: int, reference: str) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ConfigError(f"model {reference} needs the package ai-edge-litert", _EXTRA) from error
    try:
        return Interpreter(model_content=data, num_threads=threads)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model {reference} is not a LiteRT file: {str(error).splitlines()[0]}", "check the path"
        ) from error


def _tensors(interpreter: Any, reference: str) -> _Tensors:
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConfigError(
            f"model {reference} has {len(inputs)} inputs and {len(outputs)} outputs",
            "only files with one of each are understood",
        )
    into, out = inputs[0], outputs[0]
    shape, kind = [int(s) for s in into["shape_signature"]], np.dtype(into["dtype"]).name
    if len(shape) != 4 or shape[3] != 3 or min(shape[1:]) < 1 or kind not in ("uint8", "int8", "float32"):
        raise ConfigError(
            f"model {reference}: its input is {kind} of shape {shape}",
            "an RGB input (n, height, width, 3) of fixed size, uint8, int8 or float32, is understood",
        )
    out_shape, out_kind = [int(s) for s in out["shape"]], np.dtype(out["dtype"])
    scale, zero_point = (float(v) for v in out["quantization"])
    wide = len(out_shape) == 4
    single_labels = wide and out_shape[3] == 1 and out_kind.kind in "iu" and scale == 0.0
    if not wide and not (len(out_shape) == 3 and out_kind.kind in "iu"):
        raise ConfigError(
            f"model {reference}: its output is {out_kind.name} of shape {out_shape}",
            "label maps (n, h, w) or scores (n, h, w, C) are understood",
        )
    labels = not wide or single_labels
    return _Tensors(
        into["index"],
        out["index"],
        shape[1],
        shape[2],
        kind,
        labels,
        0 if labels else out_shape[3],
        scale,
        int(zero_point),
    )


def _classes(uri: str, data: bytes, side_car: SideCar, classes_uri: str, channels: int) -> ClassTable:
    """The class table; see the module's docstring for the order."""
    wanted = max(channels, 2) if channels else 0
    named = classes_uri or side_car.classes
    own = [] if named else [t for t in _own_lists(uri, data) if not wanted or len(t.classes) == wanted]
    if channels == 1:
        own.append(_FOREGROUND)
    return class_table_for(uri, wanted, classes_uri, side_car, own[0] if own else None)


def _own_lists(uri: str, data: bytes) -> list[ClassTable]:
    """The lists beside the file and in it, the strongest first."""
    folder = uri.rsplit("/", 1)[0]
    beside = [
        f.uri
        for f in storage.list_files(folder, (".txt",), recursive=False)
        if "labels" in storage.name_of(f.uri).lower()
    ]
    found = [read_class_table(beside[0])] if len(beside) == 1 else []
    packed = _packed_labels(data)
    return found + ([class_table(packed, uri)] if packed else [])


def _packed_labels(data: bytes) -> ClassesFile | None:
    """The label file of a model with TFLite metadata: a zip archive behind the network."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith(".txt")]
        return names_in(archive.read(names[0]).decode("utf-8")) if len(names) == 1 else None


def _spec(reference: str, data: bytes, tensors: _Tensors, side_car: SideCar, classes: ClassTable) -> ModelSpec:
    floats = tensors.input_type == "float32"
    own = replace(_AS_IT_IS, height=tensors.height, width=tensors.width, dtype="float32" if floats else "uint8")
    spec = input_spec_of(side_car, own)
    decides = {
        "file": weights_digest(data),
        "mean": spec.mean if floats else None,
        "std": spec.std if floats else None,
        "scores": side_car.output,
        "label_ids": [c.label_id for c in classes.classes],
    }
    return ModelSpec(
        name=reference,
        task="semantic",
        classes=classes,
        input=spec,
        output="labels" if tensors.labels else "logits",
        digest=digest_of(decides),
        licence=side_car.licence,
        source=side_car.source,
    )


class LiteRtSegmenter:
    """A LiteRT file as a ``Segmenter``; images of a batch run one after the other.

    An interpreter serves one thread at a time, so every thread that calls ``forward`` gets its own.
    """

    def __init__(
        self, make: Callable[[], Any], first: Any, spec: ModelSpec, tensors: _Tensors, side_car: SideCar
    ) -> None:
        self.spec = spec
        self._make = make
        self._unused = [first]
        self._own = threading.local()
        self._tensors = tensors
        self._scores = side_car.output or ("probabilities" if tensors.channels == 1 else "logits")

    def allocate(self) -> None:
        """Make room for a batch of one, in the first interpreter.

        Raises:
            ConfigError: the network uses operations that this runtime lacks.
        """
        self._allocate(self._unused[0])

    def _allocate(self, interpreter: Any) -> None:
        try:
            interpreter.resize_tensor_input(self._tensors.input, (1, self._tensors.height, self._tensors.width, 3))
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model {self.spec.name} cannot be run: {str(error).splitlines()[0]}",
                "use a file without custom operations",
            ) from error

    def _interpreter(self) -> Any:
        """This thread's interpreter."""
        found = getattr(self._own, "interpreter", None)
        if found is None:
            try:
                found = self._unused.pop()
            except IndexError:
                found = self._make()
            self._allocate(found)
            self._own.interpreter = found
        return found

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        """(n, height, width, 3) -> labels (n, h, w), or logits (n, classes, h, w) float32."""
        return np.stack([self._one(image[None]) for image in batch])

    def _one(self, image: NDArray[Any]) -> NDArray[Any]:
        if self._tensors.input_type == "int8":
            image = (image ^ np.uint8(128)).view(np.int8)
        interpreter = self._interpreter()
        interpreter.set_tensor(self._tensors.input, image)
        interpreter.invoke()
        out = interpreter.get_tensor(self._tensors.output)[0]
        if self._tensors.labels:
            labels: NDArray[Any] = out[..., 0] if out.ndim == 3 else out
            return labels
        return np.moveaxis(self._logits(out), -1, 0)

    def _logits(self, out: NDArray[Any]) -> NDArray[np.float32]:
        """Scores (h, w, C) as logits whose soft-max is the probabilities; one channel becomes two."""
        scores = out.astype(np.float32)
        if self._tensors.scale:
            scores = (scores - np.float32(self._tensors.zero_point)) * np.float32(self._tensors.scale)
        if self._scores == "probabilities":
            self._check_probabilities(scores)
            scores = np.clip(scores, _TINY, 1 - _TINY)
            scores = np.log(scores / (1 - scores)) if scores.shape[-1] == 1 else np.log(scores)
        if scores.shape[-1] == 1:
            scores = np.concatenate([np.zeros_like(scores), scores], -1)
        return scores

    def _check_probabilities(self, scores: NDArray[np.float32]) -> None:
        low, high = float(scores.min()), float(scores.max())
        if low < -0.01 or high > 1.01:
            raise ConfigError(
                f"model {self.spec.name}: its outputs reach from {low:.3g} to {high:.3g}, so they are no probabilities",
                f'write scores = "logits" into {self.spec.name.removeprefix("litert:")}.toml',
            )
