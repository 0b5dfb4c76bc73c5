"""The built-in architectures, one explicit entry each; nothing heavy is imported until a network is built."""

import functools
from typing import TYPE_CHECKING, Any, Literal, Protocol

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.config import ColorConfig, UNetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_IMAGENET_HALF = (0.5, 0.5, 0.5)


class Architecture(Protocol):
    """A family of networks whose trained weights lie in a checkpoint folder (see ``segbatch.models.checkpoint``)."""

    @property
    def summary(self) -> str:
        """One line for ``segbatch models``."""
        ...

    @property
    def config(self) -> type[Any]:
        """The pydantic model of its configuration, with a literal field ``kind`` equal to its name."""
        ...

    @property
    def output(self) -> Literal["logits", "labels"]:
        """See ``ModelSpec.output``."""
        ...

    def input_spec(self, config: Any) -> InputSpec:
        """What a network of this configuration is fed."""
        ...

    def build(self, config: Any, classes: int) -> "torch.nn.Module":
        """A network with fresh weights; ``state_dict`` is what a checkpoint holds."""
        ...

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """The network ready for inference."""
        ...


class UNetArchitecture:
    """See ``segbatch.models.unet``."""

    summary = "padded U-Net with batch normalisation; own encoder, or EfficientNet-Lite0 with ImageNet weights"
    config = UNetConfig
    output: Literal["logits", "labels"] = "logits"

    def input_spec(self, config: UNetConfig) -> InputSpec:
        """Float RGB, channels last; any size unless ``config.input_size`` fixes it."""
        height, width = config.input_size or (None, None)
        base = InputSpec(
            height=height,
            width=width,
            resize="stretch" if config.input_size else "none",
            divisor=32 if config.encoder else 1 << (config.depth - 1),
            layout="nhwc",
        )
        if config.encoder:  # Lite0 was trained on inputs in -1..1
            return InputSpec(
                height, width, base.resize, base.divisor, "nhwc", "float32", _IMAGENET_HALF, _IMAGENET_HALF
            )
        return base

    def build(self, config: UNetConfig, classes: int) -> "torch.nn.Module":
        """A ``unet.UNet`` with He initialisation; a foreign encoder too has random weights."""
        from segbatch.models.unet import UNet

        return UNet(config, classes)

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """Evaluation mode, channels last."""
        from segbatch.models.network import TorchSegmenter

        return TorchSegmenter(net, spec)


class ColorArchitecture:
    """See ``segbatch.models.color``."""

    summary = "per-pixel colour classifier: the most frequent class of each colour, a baseline"
    config = ColorConfig
    output: Literal["logits", "labels"] = "labels"

    def input_spec(self, config: ColorConfig) -> InputSpec:
        """Raw RGB of any size."""
        return InputSpec(layout="nhwc", dtype="uint8")

    def build(self, config: ColorConfig, classes: int) -> "torch.nn.Module":
        """A ``color.ColorTable`` that has seen nothing yet."""
        from segbatch.models.color import ColorTable

        return ColorTable(config, classes)

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """A table look-up."""
        from segbatch.models.color import ColorSegmenter, ColorTable

        assert isinstance(net, ColorTable)
        return ColorSegmenter(net, spec)


ARCHITECTURES: "Mapping[str, Architecture]" = {"unet": UNetArchitecture(), "color": ColorArchitecture()}
"""Built-in networks by the name in ``name@checkpoint``."""

ENTRY_POINTS = "segbatch.models"
"""Group through which other packages add architectures and loaders."""


@functools.cache
def entry_points() -> "Mapping[str, Any]":
    """Objects that other packages registered, by name."""
    from importlib import metadata

    return {e.name: e.load() for e in metadata.entry_points(group=ENTRY_POINTS)}


def architectures() -> dict[str, Architecture]:
    """All architectures by name, those of other packages included."""
    return {**{k: v for k, v in entry_points().items() if hasattr(v, "input_spec")}, **ARCHITECTURES}


def architecture_of(name: str, where: str) -> Architecture:
    """The architecture called ``name``.

    Raises:
        ConfigError: there is none; names the known ones and the nearest.
    """
    known = architectures()
    if name not in known:
        raise ConfigError(
            f"{where}: unknown architecture {name}{nearest(name, known)}", f"known: {', '.join(sorted(known))}"
        )
    return known[name]
