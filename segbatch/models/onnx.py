"""ONNX files: ``onnx:path-or-uri``, run by ONNX Runtime on the CPU.

What the file declares of input and outputs is taken from it (``graph_outputs`` says which outputs are understood); how
photos are prepared comes from its metadata or its side-car (see ``graphs``). Sizes and batch may be free or fixed: a
batch of fixed size is filled up. An ONNX file holds a graph of known operators and no code; operators of other
libraries are not loaded, nor weights that lie in files of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.errors import ConfigError
from segbatch.models.base import ModelSpec
from segbatch.models.checkpoint import weights_digest
from segbatch.models.graph_outputs import Declared, Outputs
from segbatch.models.graphs import Graph, GraphInput, GraphSegmenter, NotRunnable, input_of, read_file, segmenter
from segbatch.models.side_car import embedded

_EXTRA = "pip install 'segbatch[onnx]'"
_NOWHERE = "/dev/null"
"""The folder of weights outside the file: they would not be part of its digest."""
_QUIET = 4
"""Severity from which on ONNX Runtime writes to the terminal: fatal errors; others are raised."""


@dataclass(frozen=True, slots=True)
class OnnxSource:
    """An ONNX file and, optionally, a class list."""

    uri: str
    classes_uri: str = ""

    @property
    def reference(self) -> str:
        """``onnx:uri``."""
        return f"onnx:{self.uri}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; the graph is read, not optimised, and run only where it does not declare its outputs."""
        return self._open(threads=1, optimised=False).spec

    def load(self, threads: int) -> GraphSegmenter:
        """See ``ModelSource``."""
        return self._open(threads, optimised=True)

    def _open(self, threads: int, optimised: bool) -> GraphSegmenter:
        uri = storage.resolve(self.uri)
        data = read_file(self.reference, uri)
        session = _session(data, threads, optimised, self.reference)
        graph = Graph(
            reference=self.reference,
            uri=uri,
            digest=weights_digest(data),
            input=_input(session, self.reference),
            outputs=[_declared(o) for o in session.get_outputs()],
            own=embedded(session.get_modelmeta().custom_metadata_map, uri),
            run=_Runner(session),
        )
        return segmenter(graph, self.classes_uri)


def _session(data: bytes, threads: int, optimised: bool, reference: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"model {reference} needs the package onnxruntime", _EXTRA) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NOWHERE)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        problem = _problem(error)
        fix = "check the path"
        if "xternal data" in problem:
            fix = "write the weights into the file itself: onnx.save(model, path, save_as_external_data=False)"
        raise ConfigError(f"model {reference} cannot be opened by ONNX Runtime: {problem}", fix) from error


def _problem(error: BaseException) -> str:
    """ONNX Runtime's message without its error code, on one line."""
    return " ".join(str(error).split()).rpartition("[ONNXRuntimeError] : ")[2]


def _input(session: Any, reference: str) -> GraphInput:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ConfigError(
            f"model {reference} has {len(inputs)} inputs: {', '.join(i.name for i in inputs)}",
            "only files with one input, the photo, are understood",
        )
    return input_of(f"model {reference}", _shape(inputs[0]), _dtype(inputs[0]))


def _shape(value: Any) -> list[int | None]:
    """Sizes; None for those that have a name instead of a number."""
    return [s if isinstance(s, int) and s > 0 else None for s in value.shape]


def _dtype(value: Any) -> str:
    """numpy's name of ``tensor(float)`` and the like; ``object`` where it has none."""
    name = str(value.type).removeprefix("tensor(").removesuffix(")")
    name = {"float": "float32", "double": "float64"}.get(name, name)
    return name if name in np.sctypeDict else "object"


def _declared(value: Any) -> Declared:
    return Declared(value.name, tuple(_shape(value)), np.dtype(_dtype(value)).kind)


class _Runner:
    """Runs a session, which any number of threads may do at once."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._names = [o.name for o in session.get_outputs()]

    def __call__(self, batch: NDArray[Any]) -> Outputs:
        try:
            values = self._session.run(None, {self._input: batch})
        except Exception as error:
            raise NotRunnable(_problem(error)) from error
        return dict(zip(self._names, values, strict=True))
