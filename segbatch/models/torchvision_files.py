"""What a reference to a network of torchvision's names: the network, its weights, what stands beside them.

Official code: ``pytorch/vision``, torchvision/models/_api.py; ``torch.hub`` for the cache and the names of its files.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.models import state_file
from segbatch.models.base import InputSpec
from segbatch.models.side_car import SideCar, read_side_car, side_car_uri
from segbatch.models.state_file import StateFile

_EXTRA = "pip install 'segbatch[pretrained]'"
INPUT_KEYS = ("height", "width", "longest", "resize", "mean", "std", "channel_order", "things")
"""What torchvision's networks heed of a side-car, besides names."""

_SIZES = {"none": set[str](), "short-side": {"height", "longest"}, "stretch": {"height", "width"}}
"""Keys that may stand beside each value of ``resize``."""

_REFERENCE = re.compile(r"(?P<name>[^=@]+)(?P<kind>[=@]?)(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Given:
    """A reference whose files are read.

    Attributes:
        reference: what the user gave.
        name: of torchvision's network.
        file: its weights.
        trained: the member of torchvision's enumeration of trained weights that the file is; None for another file.
        side_car: what stands beside the file.
        classes_uri: a class list, or empty.
    """

    reference: str
    name: str
    file: StateFile
    trained: Any
    side_car: SideCar
    classes_uri: str

    @property
    def source(self) -> str:
        """Where the weights come from, if that is known."""
        return self.side_car.source or (str(self.trained.url) if self.trained else "")

    def outputs(self, tensor: str) -> int:
        """How many outputs the network has: the length of one of the file's tensors.

        Raises:
            ConfigError: the file lacks it.
        """
        if tensor not in self.file.tensors:
            raise ConfigError(f"{self.file.uri} is no {self.name}: it lacks the tensor {tensor}", "check the name")
        return int(self.file.tensors[tensor].shape[0])

    def input_spec(self, default: InputSpec, sizes: set[str]) -> InputSpec:
        """``default`` with what the side-car says; ``resize`` stays ``own``.

        Args:
            default: of the network; its ``height`` is the length of a photo's shorter side.
            sizes: understood values of ``resize``.

        Returns:
            With a height alone: the shorter side's; with a width too: photos are stretched to it; with neither: photos
            are fed at their own size.

        Raises:
            ConfigError: a size that is not understood.
        """
        said, where = self.side_car, side_car_uri(self.file.uri)
        resize = said.resize or ("stretch" if said.width else "short-side")
        if resize not in sizes:
            some = ", ".join(sorted(sizes))
            raise ConfigError(f'{where}: {self.name} knows no resize = "{resize}"', f"known: {some}")
        named = {k for k in ("height", "width", "longest") if getattr(said, k)}
        if named - _SIZES[resize] or (resize == "stretch" and named != _SIZES[resize]):
            some = " and ".join(sorted(_SIZES[resize])) or "no size"
            raise ConfigError(f'{where}: resize = "{resize}" goes with {some}', f"found {', '.join(sorted(named))}")
        height = None if resize == "none" else said.height or default.height
        longest = said.longest or default.longest if resize == "short-side" else None
        if longest and height and longest <= height:
            raise ConfigError(f"{where}: longest = {longest} is not more than height = {height}", "swap them")
        return InputSpec(
            height=height,
            width=said.width,
            resize="own",
            longest=longest,
            divisor=default.divisor,
            mean=said.mean or default.mean,
            std=said.std or default.std,
        )


def names() -> list[str]:
    """torchvision's networks for segmentation.

    Raises:
        ConfigError: torchvision is missing.
    """
    try:
        from torchvision.models import detection, list_models, segmentation
    except ImportError as error:
        raise ConfigError("torchvision:NAME needs the package torchvision", _EXTRA) from error
    return [*list_models(module=segmentation), *list_models(module=detection, include="maskrcnn*")]


def opened(what: str, classes_uri: str) -> Given:
    """Read the files of ``NAME=WEIGHTS`` or ``NAME@FILE``.

    Raises:
        ConfigError: no such network or weights, or a file that cannot be used.
        StorageError: a file cannot be read.
    """
    reference = f"torchvision:{what}"
    match, known = _REFERENCE.fullmatch(what), names()
    from torchvision.models import get_model_weights

    name = match["name"] if match else what
    if match is None or name not in known:
        raise ConfigError(f"model {reference}: unknown name {name}{nearest(name, known)}", f"known: {', '.join(known)}")
    kinds = get_model_weights(name)
    if not match["rest"]:
        raise ConfigError(
            f"model {reference}: {name} has no weights of its own",
            f"give torchvision:{name}={kinds.DEFAULT.name} (a download) or torchvision:{name}@FILE, a state dict",
        )
    if match["kind"] == "@":
        file = state_file.read(match["rest"], reference)
        trained = next((w for w in kinds if file.sha256.startswith(_sha256_of(w))), None)
        return Given(reference, name, file, trained, read_side_car(file.uri), classes_uri)
    wanted = match["rest"].removeprefix(f"{kinds.__name__}.")
    if wanted not in kinds.__members__:
        some = ", ".join(kinds.__members__)
        raise ConfigError(
            f"model {reference}: {name} has no weights {wanted}{nearest(wanted, kinds.__members__)}", f"known: {some}"
        )
    return Given(reference, name, _downloaded(kinds[wanted], reference), kinds[wanted], SideCar(), classes_uri)


def _sha256_of(trained: Any) -> str:
    """First digits of the file's SHA-256, which stand in its name."""
    return str(trained.url).rsplit("-", 1)[-1].split(".")[0]


def _downloaded(trained: Any, reference: str) -> StateFile:
    """The file of trained weights in torch's cache, which is filled if it is not there."""
    import torch

    url, expected = str(trained.url), _sha256_of(trained)
    path = os.path.join(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, expected, progress=False)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"model {reference}: {url} cannot be downloaded: {error}",
                f"put the file at {path}, or give it as torchvision:NAME@FILE",
            ) from error
    file = state_file.read(path, reference)
    if not file.sha256.startswith(expected):
        raise ConfigError(f"{path} is damaged: its SHA-256 does not begin with {expected}", "delete it")
    return file
