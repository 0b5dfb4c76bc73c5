"""The built-in architectures, one explicit entry each; nothing heavy is imported until a network is built."""

import functools
from typing import TYPE_CHECKING, Any, Literal, Protocol

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.config import (
    ColorConfig,
    DeepLabConfig,
    FCNConfig,
    PatchConfig,
    SegNetConfig,
    UNetConfig,
    UNetValidConfig,
)

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

    def begin(self, net: "torch.nn.Module", config: Any) -> None:
        """Put the weights that its training begins with into a fresh network, where the configuration names some.

        Raises:
            ConfigError: they are not there, or do not fit.
        """
        ...

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """The network ready for inference."""
        ...


class _Network:
    """What the torch networks have in common: float RGB of any size in, logits out, trained from scratch."""

    output: Literal["logits", "labels"] = "logits"

    def input_spec(self, config: Any) -> InputSpec:
        """Float RGB of any size, channels last."""
        return InputSpec(layout="nhwc")

    def begin(self, net: "torch.nn.Module", config: Any) -> None:
        """Nothing: training begins with random weights."""

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """Evaluation mode, channels last."""
        from segbatch.models.network import TorchSegmenter

        return TorchSegmenter(net, spec)


class UNetArchitecture(_Network):
    """See ``segbatch.models.unet``."""

    summary = "padded U-Net with batch normalisation; own encoder, or EfficientNet-Lite0 with ImageNet weights"
    config = UNetConfig

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

    def begin(self, net: "torch.nn.Module", config: UNetConfig) -> None:
        """The encoder's ImageNet weights."""
        from segbatch.models.unet import UNet, load_pretrained

        assert isinstance(net, UNet)
        if config.encoder and config.pretrained:
            load_pretrained(net)


class FCNArchitecture(_Network):
    """See ``segbatch.models.fcn``."""

    summary = "FCN-32s, FCN-16s, FCN-8s on VGG-16: scores of three depths, up-sampled and added"
    config = FCNConfig

    def build(self, config: FCNConfig, classes: int) -> "torch.nn.Module":
        """A ``fcn.FCN``: He initialisation, zero scores, bilinear up-sampling."""
        from segbatch.models.fcn import FCN

        return FCN(config, classes)

    def begin(self, net: "torch.nn.Module", config: FCNConfig) -> None:
        """The weights of the coarser FCN that ``config.warm_start`` names."""
        if not config.warm_start:
            return
        from segbatch.models import checkpoint
        from segbatch.models.fcn import FCN, warm_start

        assert isinstance(net, FCN)
        found = checkpoint.read(config.warm_start)
        warm_start(net, checkpoint.read_state(found.weights, found.uri), found.uri)


class SegNetArchitecture(_Network):
    """See ``segbatch.models.segnet``."""

    summary = "SegNet on VGG-16, and SegNet-Basic: the decoder unpools by the encoder's pooling indices"
    config = SegNetConfig

    def build(self, config: SegNetConfig, classes: int) -> "torch.nn.Module":
        """A ``segnet.SegNet`` with He initialisation."""
        from segbatch.models.segnet import SegNet

        return SegNet(config, classes)


class DeepLabArchitecture(_Network):
    """See ``segbatch.models.deeplab``."""

    summary = "DeepLab v3+ on Aligned Xception-65, ResNet-50 or ResNet-101: atrous pyramid and decoder"
    config = DeepLabConfig

    def build(self, config: DeepLabConfig, classes: int) -> "torch.nn.Module":
        """A ``deeplab.DeepLab`` with random weights."""
        from segbatch.models.deeplab import DeepLab

        return DeepLab(config, classes)


class _Microscopy(_Network):
    """Networks that may be fed grey photos, which they make themselves."""

    def input_spec(self, config: UNetValidConfig | PatchConfig) -> InputSpec:
        """Float RGB of any size; in -1..1 when the network makes it grey."""
        if config.channels == 1:
            return InputSpec(layout="nhwc", mean=_IMAGENET_HALF, std=_IMAGENET_HALF)
        return InputSpec(layout="nhwc")


class UNetValidArchitecture(_Microscopy):
    """See ``segbatch.models.unet_valid``."""

    summary = "U-Net as published: convolutions that are not padded, mirrored borders, dropout"
    config = UNetValidConfig

    def build(self, config: UNetValidConfig, classes: int) -> "torch.nn.Module":
        """A ``unet_valid.UNetValid`` with He initialisation."""
        from segbatch.models.unet_valid import UNetValid

        return UNetValid(config, classes)


class PatchArchitecture(_Microscopy):
    """See ``segbatch.models.patch``."""

    summary = "classifier of the window around each pixel, run over the whole photo at once"
    config = PatchConfig

    def build(self, config: PatchConfig, classes: int) -> "torch.nn.Module":
        """A ``patch.PatchNet`` with He initialisation."""
        from segbatch.models.patch import PatchNet

        return PatchNet(config, classes)


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

    def begin(self, net: "torch.nn.Module", config: ColorConfig) -> None:
        """Nothing: it counts from zero."""

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """A table look-up."""
        from segbatch.models.color import ColorSegmenter, ColorTable

        assert isinstance(net, ColorTable)
        return ColorSegmenter(net, spec)


ARCHITECTURES: "Mapping[str, Architecture]" = {
    "unet": UNetArchitecture(),
    "fcn": FCNArchitecture(),
    "segnet": SegNetArchitecture(),
    "unet_valid": UNetValidArchitecture(),
    "deeplab": DeepLabArchitecture(),
    "patch": PatchArchitecture(),
    "color": ColorArchitecture(),
}
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
