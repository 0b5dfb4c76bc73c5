"""Other people's weights in one file: a state dict that ``torch.save`` wrote, or a safetensors file.

Only tensors are ever unpickled. What training code likes to wrap around a state dict is taken off: an outer dictionary
(``{"state_dict": ...}``, ``{"model": ...}``) and prefixes that every name has (``module.`` of DataParallel,
``_orig_mod.`` of torch.compile, ``model.`` of Lightning).
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segbatch import storage
from segbatch.errors import ConfigError, ObjectMissing
from segbatch.models.checkpoint import read_state

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_FIX = "save the tensors alone, with torch.save(net.state_dict(), FILE) or as safetensors"


@dataclass(frozen=True, slots=True)
class StateFile:
    """A file of weights.

    Attributes:
        uri: where it lies.
        tensors: by name.
        sha256: hex digest of the file; torchvision names its files by the first digits.
    """

    uri: str
    tensors: "dict[str, torch.Tensor]"
    sha256: str

    def without(self, prefix: str) -> "StateFile":
        """The file without the tensors of a part that is not needed."""
        return dataclasses.replace(self, tensors={k: v for k, v in self.tensors.items() if not k.startswith(prefix)})


def read(uri: str, reference: str) -> StateFile:
    """Read a file of weights, local or remote; which of the two kinds it is follows from its content.

    Args:
        uri: the file.
        reference: of the model, for error messages.

    Raises:
        ConfigError: there is no such file, or it holds other things than tensors.
        StorageError: it cannot be read.
    """
    uri = storage.resolve(uri)
    try:
        data = storage.read_bytes(uri)
    except ObjectMissing as error:
        raise ConfigError(f"model {reference}: {error.problem}", error.fix) from error
    return StateFile(uri, tensors_in(data, uri), hashlib.sha256(data).hexdigest())


def tensors_in(data: bytes, where: str) -> "dict[str, torch.Tensor]":
    """The tensors of a file's bytes by name, what was wrapped around them taken off.

    Raises:
        ConfigError: it is no such file, or holds other things than tensors.
    """
    return unwrapped(_safetensors(data, where) if _is_safetensors(data) else _pickled(data, where), where)


def _is_safetensors(data: bytes) -> bool:
    """A header of JSON behind its length in 8 bytes. Source: safetensors' README, Format."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _safetensors(data: bytes, where: str) -> Mapping[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ConfigError(f"{where} needs the package safetensors", "pip install safetensors") from error
    try:
        return load(data)
    except SafetensorError as error:
        raise ConfigError(f"{where} is not a readable safetensors file: {error}", "copy it anew") from error


def _pickled(data: bytes, where: str) -> Mapping[str, Any]:
    try:
        return read_state(data, where)
    except ConfigError as error:
        raise ConfigError(error.problem, f"copy it anew, or {_FIX}") from error


def unwrapped(content: Mapping[str, Any], where: str) -> "dict[str, torch.Tensor]":
    """The state dict in what a file holds.

    Raises:
        ConfigError: there are other things than tensors, or none.
    """
    import torch

    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    others = [f"{k} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, torch.Tensor)]
    if others or not content:
        problem = f"{', '.join(others[:3])} among its tensors" if content else "no tensors"
        raise ConfigError(f"{where} holds {problem}", _FIX)
    found = dict(content)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in found)), ""):
        found = {k.removeprefix(prefix): v for k, v in found.items()}
    return found
