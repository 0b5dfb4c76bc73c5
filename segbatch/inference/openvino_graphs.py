"""Parts of a network as OpenVINO graphs (extra ``cpu``), converted once and kept in a cache.

The cache is ``$SEGBATCH_CACHE``, else ``segbatch`` below ``$XDG_CACHE_HOME`` or ``~/.cache``. A graph lies in a folder
of its own, named by what it follows from: the model's digest, the part, the versions of OpenVINO, torch and segbatch.
The folder is written under another name and then renamed, so any number of processes may convert at once. What cannot
be written there is converted by each process for itself.

Weights are kept as float32; in which format a graph computes is decided when it is loaded. The axes along which the
inputs of two trial runs differ, and the first one, may have any size; a graph for exactly the sizes of the photos is
compiled besides where they all have the same: it is up to 1.7 times as fast.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segbatch.errors import DataError
from segbatch.inference.engines import Call, Flat, Form, flattened, listening, rebuilt
from segbatch.models.parts import Part
from segbatch.version import __version__

_FORMAT = 1
_GRAPH, _FORMS = "graph.xml", "forms.json"
_TOLERANCE = 1e-2
"""Of the largest number that comes out: how far a float32 graph may be off on other sizes than it was traced with."""
_FEW_ROWS = 4


class CannotConvertError(Exception):
    """Why a network is not run by OpenVINO, in one line."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """How graphs compute.

    Attributes:
        dtype: ``float32`` or ``bfloat16``.
        threads: how many calls run at once, each on one thread of its own.
    """

    dtype: str
    threads: int


def available() -> bool:
    """Whether the package is there."""
    import importlib.util

    return importlib.util.find_spec("openvino") is not None


def cache_folder() -> Path:
    """Where graphs are kept; may not exist yet."""
    own = os.environ.get("SEGBATCH_CACHE")
    if own:
        return Path(own) / "openvino"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segbatch" / "openvino"


class Graph:
    """A converted part: the model as OpenVINO reads it, and how its tensors lie in arguments and results."""

    def __init__(self, model: Any, given: Form, result: Form) -> None:
        self.model, self.given, self.result = model, given, result

    @property
    def any_size(self) -> bool:
        """Whether height and width of maps are free; vectors have none."""
        return all(d.is_dynamic for i in self.model.inputs for d in list(i.get_partial_shape())[2:])

    def fits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether inputs of these shapes can be fed."""
        wanted = [i.get_partial_shape() for i in self.model.inputs]
        return len(wanted) == len(shapes) and all(
            len(w) == len(s) and all(d.is_dynamic or d.get_length() == n for d, n in zip(w, s, strict=True))
            for w, s in zip(wanted, shapes, strict=True)
        )


class OpenVinoPart(nn.Module):
    """A graph in the place of a torch module; any number of threads may call it at once.

    Args:
        graph: the graph.
        numbers: how it computes.
        usual: shapes of the inputs for which a graph of its own is compiled; None for none.
        otherwise: runs inputs that do not fit the graph; None where all fit.
    """

    def __init__(
        self,
        graph: Graph,
        numbers: Numbers,
        usual: Sequence[Sequence[int]] | None,
        otherwise: nn.Module | None,
    ) -> None:
        super().__init__()
        self._graph, self._numbers = graph, numbers
        self._usual = None if usual is None else [list(s) for s in usual]
        self._otherwise = otherwise
        self._compiled: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def forward(self, *args: Any, **named: Any) -> Any:
        """What the module would give, in float32."""
        tensors, _ = flattened((args, named))
        shapes = [list(t.shape) for t in tensors]
        if self._otherwise is not None and not self._graph.fits(shapes):
            return self._otherwise(*args, **named)
        request = self._request(shapes == self._usual)
        request.infer([t.contiguous().numpy() for t in tensors], share_inputs=True)
        found = [torch.from_numpy(np.array(o.data)) for o in request.output_tensors]
        return rebuilt(self._graph.result, iter(found))

    def _request(self, usual: bool) -> Any:
        """This thread's own request to the graph for the usual or for any shapes."""
        name = "usual" if usual else "other"
        found = getattr(self._own, name, None)
        if found is None:
            with self._lock:
                if usual not in self._compiled:
                    self._compiled[usual] = self._compile(usual)
                found = self._compiled[usual].create_infer_request()
            setattr(self._own, name, found)
        return found

    def _compile(self, usual: bool) -> Any:
        model = self._graph.model
        if usual and self._usual is not None:
            model = model.clone()
            model.reshape(dict(zip(model.inputs, self._usual, strict=True)))
        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self._numbers.dtype],
            "NUM_STREAMS": self._numbers.threads,
            "INFERENCE_NUM_THREADS": self._numbers.threads,
            "ENABLE_CPU_PINNING": False,  # several workers of one machine would all sit on its first cores
        }
        return _core().compile_model(model, "CPU", settings)


def graphs_of(parts: Sequence[Part], runs: Iterable[Callable[[], None]]) -> dict[str, Graph]:
    """The graphs of all parts by key, from the cache or converted now.

    Args:
        parts: of one ``Segmenter``, in torch's hands.
        runs: run the ``Segmenter`` on some inputs; the first one that it does not refuse counts. Asked for only where
            some graph is not in the cache.

    Raises:
        CannotConvertError: OpenVINO is missing or cannot express one of them.
    """
    if not available():
        raise CannotConvertError("the package openvino is missing: pip install 'segbatch[cpu]'")
    found = {p.key: _kept(p.key) for p in parts}
    if any(g is None for g in found.values()):
        if not all(p.convertible for p in parts):
            raise CannotConvertError("its arguments differ from photo to photo")
        calls = _calls(parts, runs)
        for part in parts:
            if found[part.key] is None:
                found[part.key] = _converted(part, calls.get(part.key, []))
    return {key: graph for key, graph in found.items() if graph is not None}


def _calls(parts: Sequence[Part], runs: Iterable[Callable[[], None]]) -> dict[str, list[Call]]:
    refused = "nothing to try it on"
    for run in runs:
        try:
            with listening(parts, lambda call: call) as calls:
                run()
        except (RuntimeError, ValueError, TypeError, IndexError, DataError) as error:
            refused = _one_line(error)
            continue
        return calls
    raise CannotConvertError(f"torch cannot run it on a trial photo: {refused}")


def _core() -> Any:
    """OpenVINO's, which costs some tens of milliseconds: one of a process."""
    import openvino

    with _CORE_LOCK:
        if not _CORES:
            _CORES.append(openvino.Core())
        return _CORES[0]


_CORES: list[Any] = []
_CORE_LOCK = threading.Lock()


# -- conversion ------------------------------------------------------------------------------------------------------


def _converted(part: Part, calls: Sequence[Call]) -> Graph:
    """Convert, check against torch on every trial call, and keep.

    Raises:
        CannotConvertError: it is not possible, or the graph computes something else.
    """
    try:
        examples = [flattened((c.args, dict(c.named))) for c in calls]
    except TypeError as error:
        raise CannotConvertError(f"{error}") from error
    if not examples or any(form != examples[0][1] for _, form in examples):
        raise CannotConvertError("a trial photo does not reach every part of it")
    form = examples[0][1]
    inputs = [[_filled(t) for t in tensors] for tensors, _ in examples]
    with torch.inference_mode():
        args, named = rebuilt(form, iter(inputs[0]))
        result = flattened(part.module(*args, **named))[1]
        graph = Graph(_model(Flat(part.module, form), inputs), form, result)
        for tensors in inputs:
            _check(part, graph, tensors)
    _keep(part.key, graph)
    return graph


def _filled(tensor: Tensor) -> Tensor:
    """The tensor, or a few rows of noise where it has none: a trial photo need not hold an object."""
    if tensor.shape[0] == 0:
        shape = (_FEW_ROWS, *tensor.shape[1:])
        tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    return tensor.detach().contiguous()


def _model(flat: Flat, inputs: Sequence[Sequence[Tensor]]) -> Any:
    """The graph, by the frontend behind ``openvino.convert_model``, which reports its use over the network."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example, shapes = tuple(inputs[0]), []
    for position, tensor in enumerate(inputs[0]):
        others = [tensors[position].shape for tensors in inputs]
        shapes.append([-1 if a == 0 or len({s[a] for s in others}) > 1 else n for a, n in enumerate(tensor.shape)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about Python values: what comes out is checked
            traced = torch.jit.trace(flat.eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
            frontend = FrontEndManager().load_by_framework("pytorch")
            decoder = TorchScriptPythonDecoder(traced, example_input=example)  # has to outlive the conversion
            model = frontend.convert(frontend.load(decoder))
            model.reshape({i: openvino.PartialShape(s) for i, s in zip(model.inputs, shapes, strict=True)})
    except Exception as error:  # converters raise whatever they like
        raise CannotConvertError(f"OpenVINO cannot convert it: {_one_line(error)}") from error
    return model


def _check(part: Part, graph: Graph, tensors: Sequence[Tensor]) -> None:
    """Hold the graph in float32 against torch.

    Raises:
        CannotConvertError: it cannot be run on this size, or is off.
    """
    args, named = rebuilt(graph.given, iter(tensors))
    wanted = flattened(part.module(*args, **named))[0]
    try:
        found = flattened(OpenVinoPart(graph, Numbers("float32", 1), None, None)(*args, **named))[0]
    except RuntimeError as error:
        raise CannotConvertError(f"OpenVINO cannot run it: {_one_line(error)}") from error
    for theirs, ours in zip(found, wanted, strict=True):
        limit = _TOLERANCE * max(float(ours.abs().max()), 1e-6) if ours.numel() else 0.0
        if theirs.shape != ours.shape or not bool((theirs - ours).abs().le(limit).all()):
            sizes = [list(t.shape) for t in tensors]
            raise CannotConvertError(f"OpenVINO computes something else on inputs of {sizes}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


# -- cache -----------------------------------------------------------------------------------------------------------


def _place(key: str) -> Path:
    import openvino

    follows = json.dumps([_FORMAT, key, openvino.__version__, torch.__version__, __version__])
    return cache_folder() / hashlib.blake2b(follows.encode(), digest_size=16).hexdigest()


def _kept(key: str) -> Graph | None:
    """The graph from the cache; None where it is not there. What is there but cannot be read is thrown away."""
    place = _place(key)
    if not place.exists():
        return None
    try:
        forms = json.loads((place / _FORMS).read_text())
        return Graph(_core().read_model(str(place / _GRAPH)), _form(forms["given"]), _form(forms["result"]))
    except (OSError, ValueError, KeyError, RuntimeError):
        shutil.rmtree(place, ignore_errors=True)
        return None


def _form(value: Any) -> Form:
    """A form that has been through JSON, which makes lists of tuples."""
    if value is None:
        return None
    kind, members = value
    if kind == "dict":
        return kind, {k: _form(v) for k, v in members.items()}
    return kind, [_form(v) for v in members]


def _keep(key: str, graph: Graph) -> None:
    """Put a graph into the cache, unless somebody else has, or it cannot be written."""
    import openvino

    place = _place(key)
    with contextlib.suppress(OSError, RuntimeError):
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
        try:
            openvino.save_model(graph.model, str(scratch / _GRAPH), compress_to_fp16=False)
            (scratch / _FORMS).write_text(json.dumps({"given": graph.given, "result": graph.result}))
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
