"""Configurations of the built-in architectures: what ``[model]`` in a training file and ``model.json`` hold."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from segbatch.config import Config

Size = tuple[int, int]
"""(height, width) in pixels."""


class UNetConfig(Config):
    """The padded, batch-normalised U-Net.

    Attributes:
        width: channels of the first level of its own encoder; every level doubles them (the paper: 64).
        depth: levels of its own encoder, pooling steps + 1 (the paper: 5).
        encoder: empty for the paper's own encoder, or ``efficientnet_lite0`` (needs the extra ``pretrained``).
        pretrained: begin training from the encoder's ImageNet weights.
        decoder: channels of the decoder behind a foreign encoder, from stride 16 upwards; five entries give
            logits at the input's size, four at half of it.
        input_size: (height, width) that photos are stretched to; None feeds them at their own size.
    """

    kind: Literal["unet"] = "unet"
    width: int = Field(default=32, ge=1, le=256)
    depth: int = Field(default=5, ge=2, le=7)
    encoder: Literal["", "efficientnet_lite0"] = ""
    pretrained: bool = True
    decoder: tuple[int, ...] = Field(default=(256, 128, 64, 32, 16), min_length=1, max_length=5)
    input_size: Size | None = None


class ColorConfig(Config):
    """The per-pixel colour classifier.

    Attributes:
        bits: bits of each colour channel that are told apart (5: 32 x 32 x 32 colours).
        smoothing: pixels that the next coarser colour's class frequencies count for in a colour's own count.
    """

    kind: Literal["color"] = "color"
    bits: int = Field(default=5, ge=1, le=6)
    smoothing: float = Field(default=16.0, gt=0)


class FCNConfig(Config):
    """FCN-32s, FCN-16s or FCN-8s on VGG-16.

    Attributes:
        stride: of the finest scores: 32, 16 or 8.
        width: fraction of the paper's channels in every hidden layer.
        dropout: after fc6 and fc7.
        warm_start: URI of a trained FCN's folder whose weights training begins with: 16s from 32s, 8s from 16s;
            empty for a training from scratch.
    """

    kind: Literal["fcn"] = "fcn"
    stride: Literal[32, 16, 8] = 8
    width: float = Field(default=1.0, gt=0, le=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    warm_start: str = ""


class SegNetConfig(Config):
    """SegNet or SegNet-Basic.

    Attributes:
        variant: ``vgg16``: 13 convolutions each way; ``basic``: four 7x7 convolutions each way.
        width: fraction of the paper's channels in every hidden layer.
    """

    kind: Literal["segnet"] = "segnet"
    variant: Literal["vgg16", "basic"] = "vgg16"
    width: float = Field(default=1.0, gt=0, le=1)


class DeepLabConfig(Config):
    """DeepLab v3+; needs the extra ``pretrained`` for its backbone.

    Attributes:
        backbone: Modified Aligned Xception-65, or a ResNet.
        output_stride: of the features that the pyramid sees; 8 costs about three times the work of 16.
        width: fraction of the paper's channels in head and backbone.
        dropout: behind the pyramid.
    """

    kind: Literal["deeplab"] = "deeplab"
    backbone: Literal["xception65", "resnet50", "resnet101"] = "xception65"
    output_stride: Literal[16, 8] = 16
    width: float = Field(default=1.0, gt=0, le=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class UNetValidConfig(Config):
    """The U-Net of the paper, with convolutions that are not padded.

    Attributes:
        width: channels of the first level; every level doubles them.
        depth: levels, pooling steps + 1.
        channels: 1 feeds the mean of red, green and blue, as for microscopes; 3 feeds RGB.
        dropout: behind the two deepest levels.
    """

    kind: Literal["unet_valid"] = "unet_valid"
    width: int = Field(default=64, ge=1, le=256)
    depth: int = Field(default=5, ge=2, le=7)
    channels: Literal[1, 3] = 3
    dropout: float = Field(default=0.5, ge=0, lt=1)


class PatchConfig(Config):
    """The network that classifies the window around each pixel.

    Attributes:
        window: side of the window in pixels; every pooling must halve a whole number (63, 79, 95, 111, ... with the
            kernels of the paper).
        kernels: side of each convolution's kernel; a 2x2 pooling follows each.
        maps: channels of the convolutions.
        hidden: units of the layer before the last.
        channels: 1 feeds the mean of red, green and blue, as for microscopes; 3 feeds RGB.
    """

    kind: Literal["patch"] = "patch"
    window: int = Field(default=95, ge=1, le=511)
    kernels: tuple[Annotated[int, Field(ge=1, le=15)], ...] = Field(default=(4, 5, 4, 4), min_length=1, max_length=5)
    maps: int = Field(default=48, ge=1)
    hidden: int = Field(default=200, ge=1)
    channels: Literal[1, 3] = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        smallest, step = self._window_of(1), 1 << len(self.kernels)
        if self.window < smallest or (self.window - smallest) % step:
            near = smallest + step * max(round((self.window - smallest) / step), 0)
            raise ValueError(f"window {self.window} does not fit the kernels {list(self.kernels)}: take {near}")
        return self

    def _window_of(self, side: int) -> int:
        """The window of which the last pooling leaves that side."""
        for kernel in reversed(self.kernels):
            side = 2 * side + kernel - 1
        return side

    @property
    def last_side(self) -> int:
        """Side of the maps behind the last pooling."""
        return 1 + (self.window - self._window_of(1)) // (1 << len(self.kernels))


ModelConfig = UNetConfig | ColorConfig | FCNConfig | SegNetConfig | DeepLabConfig | UNetValidConfig | PatchConfig
"""What ``[model]`` may be, told apart by ``kind``."""
