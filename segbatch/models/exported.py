"""Networks exported by torch: ``torchscript:path-or-uri`` and ``pt2:path-or-uri``.

A pt2 file (``torch.export.save``) says the sizes and types of its input and outputs. ``pt2_program`` runs it, and says
how that is kept safe. Its extra file ``segbatch.json`` may hold a side-car.

A TorchScript file (``torch.jit.save``) is a program in a small language of its own, run by torch's interpreter; its
data are unpickled by torch's C++ reader, which knows tensors and TorchScript classes only. Python's pickle and Python
code have no part in it. But the language has operators that read and write files, and can name classes and operators
of libraries that happen to be loaded: files that do so are refused before torch sees them. Sizes and types it does not
say: its side-car may say ``layout``, ``dtype``, ``height``, ``width``, ``divisor``; it is run once, on a black photo,
to see what comes out. Its extra file ``segbatch.json`` may hold a side-car; ``config.txt`` is read as Ultralytics
writes it.

Outputs may be a tensor, a tuple or list of them, or a dictionary (torchvision's ``{"out": ...}``).
"""

import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.errors import ConfigError
from segbatch.models.base import ModelSpec
from segbatch.models.checkpoint import weights_digest
from segbatch.models.graph_outputs import Declared, Outputs
from segbatch.models.graphs import (
    Graph,
    GraphInput,
    GraphSegmenter,
    NotRunnable,
    Run,
    input_of,
    observed,
    one_line,
    read_file,
    segmenter,
    trial_size,
)
from segbatch.models.side_car import OWN_METADATA, SideCar, embedded, merged, read_side_car
from segbatch.models.waiting import wait_passively

if TYPE_CHECKING:
    import torch

    from segbatch.models.pt2_program import Archive, Program

_ULTRALYTICS = "config.txt"
_EXTRA_FILES = "extra/"
_TOUCHES_FILES = re.compile(rb"\b(save|from_file)\b|getattr\s*\([^)]*\\")
_LIBRARIES = re.compile(rb"(?<![\w.])ops\s*\.\s*(?!(?:aten|prim|quantized|torchvision)\b)(\w+)", re.ASCII)
_CLASSES = re.compile(rb"__torch__\.torch\.classes\.(?!quantized\b)(\w+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class TorchScriptSource:
    """A TorchScript file and, optionally, a class list."""

    uri: str
    classes_uri: str = ""

    @property
    def reference(self) -> str:
        """``torchscript:uri``."""
        return f"torchscript:{self.uri}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; the network is loaded and run once, for only that shows its outputs."""
        return self._open().spec

    def load(self, threads: int) -> GraphSegmenter:
        """See ``ModelSource``."""
        _use_threads(threads)
        return self._open()

    def _open(self) -> GraphSegmenter:
        wait_passively()
        from segbatch.models.pt2_program import Archive

        uri = storage.resolve(self.uri)
        data = read_file(self.reference, uri)
        archive = Archive(data, f"model {self.reference}")
        _check_code(archive)
        own = embedded(_metadata(archive), uri)
        said = merged(own, read_side_car(uri))
        run = _TorchRunner(_script(data, self.reference))
        given, outputs = _tried(run, said, uri)
        graph = Graph(self.reference, uri, weights_digest(data), given, outputs, own, run)
        return segmenter(graph, self.classes_uri)


@dataclass(frozen=True, slots=True)
class Pt2Source:
    """A file of ``torch.export.save`` and, optionally, a class list."""

    uri: str
    classes_uri: str = ""

    @property
    def reference(self) -> str:
        """``pt2:uri``."""
        return f"pt2:{self.uri}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; no tensor is read."""
        return self._open()[0].spec

    def load(self, threads: int) -> GraphSegmenter:
        """See ``ModelSource``."""
        _use_threads(threads)
        found, program = self._open()
        program.load()
        return found

    def _open(self) -> "tuple[GraphSegmenter, Program]":
        wait_passively()
        from segbatch.models.pt2_program import Archive, Program

        uri = storage.resolve(self.uri)
        data = read_file(self.reference, uri)
        archive = Archive(data, f"model {self.reference}")
        program = Program(archive)
        graph = Graph(
            reference=self.reference,
            uri=uri,
            digest=weights_digest(data),
            input=_pt2_input(program, self.reference),
            outputs=program.outputs,
            own=embedded(_metadata(archive), uri),
            run=_TorchRunner(program),
        )
        return segmenter(graph, self.classes_uri), program


def _use_threads(threads: int) -> None:
    wait_passively()
    import torch

    torch.set_num_threads(threads)


def _metadata(archive: "Archive") -> dict[str, str]:
    """What the extra files say, by name."""
    texts = archive.texts(_EXTRA_FILES)
    if OWN_METADATA in texts:
        return {OWN_METADATA: texts[OWN_METADATA]}
    try:
        found = json.loads(texts.get(_ULTRALYTICS, "{}"))
    except ValueError as error:
        raise ConfigError(f"{archive.where}: {_EXTRA_FILES}{_ULTRALYTICS} is not JSON: {error}") from error
    if not isinstance(found, dict):
        return {}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}


def _pt2_input(program: "Program", reference: str) -> GraphInput:
    sides = program.sides
    if len(sides) != 4:
        raise ConfigError(f"model {reference}: its input has {len(sides)} axes", "a batch of RGB photos is understood")
    divisor = int(np.lcm.reduce([s.divisor for s in sides[1:]]))
    shape = [s.fixed for s in sides]
    return input_of(f"model {reference}", shape, program.dtype, sides[0].high, divisor)


def _check_code(archive: "Archive") -> None:
    """Refuse what can touch files or loads classes of other libraries.

    Raises:
        ConfigError: naming the file in the archive.
    """
    if not any(n.startswith("code/") for n in archive.names):
        raise ConfigError(f"{archive.where} is not a TorchScript file", "pt2: loads what torch.export.save writes")
    for name in archive.names:
        kind = name.lower().rpartition(".")[2]
        if kind not in ("py", "pkl"):
            continue
        content = archive.read(name)
        found = _CLASSES.search(content) or (kind == "py" and _forbidden(content))
        if found:
            word = found[0].decode("ascii", "replace")
            raise ConfigError(f"{archive.where}: {name} says {word}, which is not run here", "give the network as ONNX")


def _forbidden(code: bytes) -> "re.Match[bytes] | None":
    return _TOUCHES_FILES.search(code) or _LIBRARIES.search(code)


def _script(data: bytes, reference: str) -> "torch.jit.ScriptModule":
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is no longer developed; files of it are around
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"model {reference} is not a readable TorchScript file: {one_line(error)}") from error
    return module.eval()


def _tried(run: Run, said: SideCar, uri: str) -> tuple[GraphInput, list[Declared]]:
    """What a network that does not declare its outputs gives, and whether it takes batches."""
    try:
        outputs = observed(run, GraphInput(batch=2), said, uri)
        several = all(o.shape and o.shape[0] == 2 for o in outputs)
    except ConfigError:
        several = False
    if not several:
        outputs = observed(run, GraphInput(batch=1), said, uri)
    if not (said.height and said.width):
        _check_size_follows(outputs, said, uri)
    return GraphInput(batch=None if several else 1), outputs


def _check_size_follows(outputs: Sequence[Declared], said: SideCar, uri: str) -> None:
    """Refuse a network of a fixed input size, which would see photos of any size otherwise.

    Raises:
        ConfigError: its maps are not in proportion to its input.
    """
    height, width = trial_size(GraphInput(), said)
    first = next((o.shape for o in outputs if len(o.shape) in (3, 4)), None)
    if first is None:
        return
    rows, columns = first[1:3] if said.layout == "nhwc" else first[-2:]
    if (rows or 0) * width != (columns or 0) * height:
        raise ConfigError(
            f"{uri} gives maps of {rows} x {columns} for an input of {height} x {width}, which do not follow its size",
            f"write the size that it wants into {uri}.toml: height = ... and width = ...",
        )


class _TorchRunner:
    """A torch function as a ``Run``."""

    def __init__(self, function: Callable[["torch.Tensor"], Any]) -> None:
        self._function = function

    def __call__(self, batch: NDArray[Any]) -> Outputs:
        import torch

        try:
            with torch.inference_mode():
                found = dict(_named(self._function(torch.from_numpy(batch).clone())))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NotRunnable(one_line(error)) from error
        return {name: _array(value) for name, value in found.items()}


def _named(found: Any) -> "Iterable[tuple[str, torch.Tensor]]":
    """Tensors of a tensor, a dictionary, or a tuple or list, whose members may be such themselves."""
    import torch

    if isinstance(found, torch.Tensor):
        yield "0", found
    elif isinstance(found, Mapping):
        yield from ((str(k), v) for k, v in found.items() if isinstance(v, torch.Tensor))
    elif isinstance(found, list | tuple):
        tensors = [t for part in found for _, t in _named(part)]
        yield from ((str(i), t) for i, t in enumerate(tensors))


def _array(value: "torch.Tensor") -> NDArray[Any]:
    import torch

    array: NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
