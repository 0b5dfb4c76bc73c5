"""Configurations of the built-in architectures: what ``[model]`` in a training file and ``model.json`` hold."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from segbatch.config import Config

Size = tuple[int, int]
"""(height, width) in pixels."""
_PYRAMID_LEVELS = 5


class NetworkConfig(Config):
    """What the semantic networks have in common: what they are fed.

    Attributes:
        channels: of a photo: 3 feeds RGB, 1 the mean of red, green and blue, as for microscopes. Of a CT volume: how
            many neighbouring slices are fed together, an odd number, the middle one being the one that is labelled.
        hounsfield: for CT volumes: the lowest and the highest value in Hounsfield units that are told apart, e.g.
            [-160, 240] for abdominal organs; None for photos.
    """

    channels: int = Field(default=3, ge=1, le=63)
    hounsfield: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if self.hounsfield is None and self.channels not in (1, 3):
            raise ValueError(
                f"channels {self.channels}: photos have 3, or 1 for grey; CT slices need hounsfield as well"
            )
        if self.hounsfield is not None and (self.channels % 2 == 0 or self.hounsfield[0] >= self.hounsfield[1]):
            raise ValueError(
                f"channels {self.channels}, hounsfield {list(self.hounsfield)}: CT slices need an odd number of "
                "neighbours, and values from low to high"
            )
        return self


class UNetConfig(NetworkConfig):
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


class FCNConfig(NetworkConfig):
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


class SegNetConfig(NetworkConfig):
    """SegNet or SegNet-Basic.

    Attributes:
        variant: ``vgg16``: 13 convolutions each way; ``basic``: four 7x7 convolutions each way.
        width: fraction of the paper's channels in every hidden layer.
    """

    kind: Literal["segnet"] = "segnet"
    variant: Literal["vgg16", "basic"] = "vgg16"
    width: float = Field(default=1.0, gt=0, le=1)


class DeepLabConfig(NetworkConfig):
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


class UNetValidConfig(NetworkConfig):
    """The U-Net of the paper, with convolutions that are not padded.

    Attributes:
        width: channels of the first level; every level doubles them.
        depth: levels, pooling steps + 1.
        dropout: behind the two deepest levels.
    """

    kind: Literal["unet_valid"] = "unet_valid"
    width: int = Field(default=64, ge=1, le=256)
    depth: int = Field(default=5, ge=2, le=7)
    dropout: float = Field(default=0.5, ge=0, lt=1)


class PatchConfig(NetworkConfig):
    """The network that classifies the window around each pixel.

    Attributes:
        window: side of the window in pixels; every pooling must halve a whole number (63, 79, 95, 111, ... with the
            kernels of the paper).
        kernels: side of each convolution's kernel; a 2x2 pooling follows each.
        maps: channels of the convolutions.
        hidden: units of the layer before the last.
    """

    kind: Literal["patch"] = "patch"
    window: int = Field(default=95, ge=1, le=511)
    kernels: tuple[Annotated[int, Field(ge=1, le=15)], ...] = Field(default=(4, 5, 4, 4), min_length=1, max_length=5)
    maps: int = Field(default=48, ge=1)
    hidden: int = Field(default=200, ge=1)

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


class RegionConfig(Config):
    """What Mask R-CNN and Panoptic FPN have in common.

    Attributes:
        width: fraction of the paper's channels in backbone and heads.
        norm: ``batch``: batch normalisation; ``group``: group normalisation, in pyramid and mask head too, for
            training from scratch with few photos a step; ``frozen``: a fixed scale and shift.
        channels: of the input.
        anchor_sizes: side of the anchors in pixels of the network's input; of a pyramid: one for each of its levels.
        anchor_ratios: height / width of the anchors.
        min_box: proposals with a shorter side are dropped, in pixels of the network's input.
        candidates: so many boxes of each map, the best ones, become proposals or are suppressed by better ones, which
            takes most of the time on small photos; 0: 2000 in training and 1000 in inference, or 12000 and 6000 on
            the fourth stage (detectron2's).
        regions: sampled for training the heads, of each photo; 0: the paper's 512, or 64 on the fourth stage.
        short_side, longest: photos are resized so that their shorter side has so many pixels, their longer one at most
            ``longest``.
    """

    width: float = Field(default=1.0, gt=0, le=1)
    norm: Literal["batch", "group", "frozen"] = "batch"
    channels: int = Field(default=3, ge=1)
    anchor_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(32, 64, 128, 256, 512), min_length=1)
    anchor_ratios: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    min_box: float = Field(default=0.001, gt=0)
    candidates: int = Field(default=0, ge=0)
    regions: int = Field(default=0, ge=0)
    short_side: int = Field(default=800, ge=32)
    longest: int = Field(default=1333, ge=32)


class MaskRCNNConfig(RegionConfig):
    """Mask R-CNN on ResNet-50; needs the extra ``pretrained``.

    Attributes:
        head: ``fpn``: feature pyramid, two fully connected layers, masks of 28x28; ``c4``: the fifth stage of the
            ResNet run on each region, masks of 14x14.
    """

    kind: Literal["maskrcnn"] = "maskrcnn"
    head: Literal["fpn", "c4"] = "fpn"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head == "fpn" and len(self.anchor_sizes) != _PYRAMID_LEVELS:
            raise ValueError(f"anchor_sizes {list(self.anchor_sizes)}: the pyramid wants {_PYRAMID_LEVELS}")
        return self


class InstanceFCNConfig(Config):
    """InstanceFCN on VGG-16, with a category head of ours.

    Attributes:
        width: fraction of the paper's channels in every hidden layer.
        norm: batch normalisation in VGG-16, for a training from scratch.
        window: side of the sliding window in score cells (8 pixels each), odd. Objects are found whose longer side is
            about 4/7 of it at one of the scales (96 pixels with 21 cells).
        parts: the window is cut into parts x parts, with a score map for each.
        scales: factors by which the fed image is resized; all are searched, and each training step draws one.
        proposals: windows that are looked at more closely: so many of each scale, and so many go on to be chosen from.
        short_side, longest: see ``MaskRCNNConfig``.
    """

    kind: Literal["instancefcn"] = "instancefcn"
    width: float = Field(default=1.0, gt=0, le=1)
    norm: bool = False
    window: int = Field(default=21, ge=3)
    parts: int = Field(default=5, ge=1)
    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] = Field(
        default=tuple(1.5**k for k in range(-4, 2)), min_length=1
    )
    proposals: int = Field(default=1000, ge=1)
    short_side: int = Field(default=600, ge=32)
    longest: int = Field(default=1000, ge=32)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} has no cell in its middle: take {self.window + 1}")
        if self.parts > self.window:
            raise ValueError(f"a window of {self.window} cells cannot be cut into {self.parts} x {self.parts} parts")
        return self


class PanopticFPNConfig(RegionConfig):
    """Panoptic FPN on ResNet-50; needs the extra ``pretrained``.

    Attributes:
        semantic_weight: of the semantic branch's loss; that of the instances counts once.
    """

    kind: Literal["panoptic_fpn"] = "panoptic_fpn"
    semantic_weight: float = Field(default=0.5, ge=0)

    @property
    def instances(self) -> MaskRCNNConfig:
        """Its Mask R-CNN."""
        return MaskRCNNConfig(**{name: getattr(self, name) for name in RegionConfig.model_fields})

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.instances
        return self


ModelConfig = (
    UNetConfig
    | ColorConfig
    | FCNConfig
    | SegNetConfig
    | DeepLabConfig
    | UNetValidConfig
    | PatchConfig
    | MaskRCNNConfig
    | InstanceFCNConfig
    | PanopticFPNConfig
)
"""What ``[model]`` may be, told apart by ``kind``."""
