"""Configurations of the built-in architectures: what ``[model]`` in a training file and ``model.json`` hold."""

from typing import Literal

from pydantic import Field

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


ModelConfig = UNetConfig | ColorConfig
