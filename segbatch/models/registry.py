"""From a model reference to a ``ModelSource``: ``name@checkpoint-uri`` or ``loader:reference``.

A package of someone else's can add to both through the entry point group ``segbatch.models``: an entry point that is
an ``Architecture`` object adds an architecture, one that is a function ``(reference, classes_uri) -> ModelSource``
adds a loader.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.models.architectures import ARCHITECTURES, architectures, entry_points
from segbatch.models.base import ModelSpec, Segmenter

__all__ = ["ARCHITECTURES", "LOADERS", "CheckpointSource", "ModelSource", "architectures", "loaders", "source"]

_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)(?P<kind>[@:])(?P<rest>.+)", re.DOTALL)


class ModelSource(Protocol):
    """Where a model comes from: small and picklable, sent to the actors, which load it themselves."""

    @property
    def reference(self) -> str:
        """What the user gave."""
        ...

    def describe(self) -> ModelSpec:
        """Read what is needed to know the spec and the digest; the network is not built.

        Raises:
            ConfigError: not such a model, or a package is missing.
        """
        ...

    def load(self, threads: int) -> Segmenter:
        """Build the network and load the weights, for ``threads`` compute threads per call of ``forward``."""
        ...


Loader = Callable[[str, str], ModelSource]
"""(reference behind the colon, URI of a class list or empty) -> source."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A built-in architecture with trained weights: ``name@uri``."""

    architecture: str
    uri: str
    classes_uri: str = ""
    has_parts: ClassVar[bool] = True

    @property
    def reference(self) -> str:
        """``name@uri``."""
        return f"{self.architecture}@{self.uri}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``."""
        return self._open()[1]

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        checkpoint, spec = self._open()
        return cast(Segmenter, checkpoint.segmenter(spec, threads))

    def _open(self) -> tuple[Any, ModelSpec]:
        from segbatch.models import checkpoint
        from segbatch.models.classes import read_class_table

        found = checkpoint.read(self.uri)
        if found.file.architecture != self.architecture:
            raise ConfigError(
                f"{self.uri} holds a {found.file.architecture}, not a {self.architecture}",
                f"use {found.file.architecture}@{self.uri}",
            )
        return found, found.spec(self.reference, read_class_table(self.classes_uri) if self.classes_uri else None)


def _litert(reference: str, classes_uri: str) -> ModelSource:
    """A LiteRT (TFLite) file, local or remote; needs the extra ``litert``."""
    from segbatch.models.litert import LiteRtSource

    return LiteRtSource(reference, classes_uri)


def _torchvision(reference: str, classes_uri: str) -> ModelSource:
    """A segmentation or Mask R-CNN model of torchvision: ``name=WEIGHTS`` or ``name@file``; extra ``pretrained``."""
    from segbatch.models.torchvision_zoo import TorchvisionSource

    return TorchvisionSource(reference, classes_uri)


def _hf(reference: str, classes_uri: str) -> ModelSource:
    """A transformers model for semantic, instance or panoptic segmentation: a folder or an id; extra ``hf``."""
    from segbatch.models.hf import HfSource

    return HfSource(reference, classes_uri)


def _smp(reference: str, classes_uri: str) -> ModelSource:
    """A folder or hub id that smp's ``save_pretrained`` wrote, or ``architecture/encoder@file``; extra ``smp``."""
    from segbatch.models.smp import SmpSource

    return SmpSource(reference, classes_uri)


def _timm(reference: str, classes_uri: str) -> ModelSource:
    """A U-Net (or another of smp's decoders) on a timm encoder, ``encoder@file``; extra ``smp``."""
    from segbatch.models.timm_unet import TimmSource

    return TimmSource(reference, classes_uri)


def _onnx(reference: str, classes_uri: str) -> ModelSource:
    """An ONNX file; extra ``onnx``."""
    from segbatch.models.onnx import OnnxSource

    return OnnxSource(reference, classes_uri)


def _torchscript(reference: str, classes_uri: str) -> ModelSource:
    """A TorchScript file."""
    from segbatch.models.exported import TorchScriptSource

    return TorchScriptSource(reference, classes_uri)


def _pt2(reference: str, classes_uri: str) -> ModelSource:
    """A program that ``torch.export.save`` wrote (.pt2)."""
    from segbatch.models.exported import Pt2Source

    return Pt2Source(reference, classes_uri)


LOADERS: Mapping[str, Loader] = {
    "torchvision": _torchvision,
    "hf": _hf,
    "smp": _smp,
    "timm": _timm,
    "onnx": _onnx,
    "torchscript": _torchscript,
    "pt2": _pt2,
    "litert": _litert,
}
"""Loaders of other people's files by the name in ``loader:reference``."""

_LOADER_OF = {"onnx": "onnx", "pt2": "pt2", "tflite": "litert"}
"""Endings of file names that say which loader is meant."""


def loaders() -> dict[str, Loader]:
    """All loaders by name, those of other packages included."""
    return {**{k: v for k, v in entry_points().items() if not hasattr(v, "input_spec")}, **LOADERS}


def source(reference: str, classes_uri: str = "") -> ModelSource:
    """The source that a reference names; reads nothing yet.

    Args:
        reference: ``name@checkpoint-uri`` or ``loader:reference``.
        classes_uri: a class list (see ``classes.read_class_table``) that takes the place of the checkpoint's own.

    Raises:
        ConfigError: no such name; lists the known ones and the nearest.
    """
    from segbatch import storage

    match = _REFERENCE.fullmatch(reference)
    name = match["name"] if match else reference
    nets, others = architectures(), loaders()
    if match and match["kind"] == "@" and name in nets:
        return CheckpointSource(name, storage.resolve(match["rest"]), classes_uri)
    if match and match["kind"] == ":" and name in others:
        return others[name](match["rest"], classes_uri)
    raise _unknown(reference, name.rstrip("@:"), nets, others)


def _unknown(reference: str, name: str, nets: Mapping[str, Any], others: Mapping[str, Any]) -> ConfigError:
    if name in nets:
        return ConfigError(
            f"model {reference}: {name} has no trained weights of its own",
            f'give a checkpoint as {name}@OUT; `segbatch train CONFIG.toml OUT` with model.kind = "{name}" makes one',
        )
    if name in others:
        return ConfigError(f"model {reference}: {name} is a loader", f"give what it should load, as {name}:path-or-uri")
    if loader := _LOADER_OF.get(reference.rpartition(".")[2]):
        return ConfigError(f"model {reference} names no loader", f"give it as {loader}:{reference}")
    known = [*(f"{n}@checkpoint" for n in sorted(nets)), *(f"{n}:reference" for n in sorted(others))]
    return ConfigError(f"unknown model {reference}{nearest(name, [*nets, *others])}", f"known: {', '.join(known)}")
