"""U-Net as published (Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, figure 1 and section 3), without padding.

Every 3x3 convolution takes two rows and columns away: 572 pixels give 388. So that any photo gives logits of its own
size, it is extended by mirroring to the smallest size whose output covers it, and the logits are cropped; in one
pass, which gives what the paper's overlapping tiles give. ReLU stands behind the up-convolutions too, and dropout
behind the two deepest levels of the contracting path, as in the authors' Caffe net. He initialisation.
One grey channel and two classes make 31,030,658 parameters; RGB adds 1,152.

Deviations: ``width`` and ``depth`` may be smaller. segbatch trains with its own recipe instead of a momentum of .99
and one tile per batch; neither elastic deformation nor the weight map around touching cells is part of it.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.models.borders import as_fed, cut, extended
from segbatch.models.config import UNetValidConfig


class UNetValid(nn.Module):
    """The network: (n, channels, h, w) float of any size -> logits (n, classes, h, w)."""

    def __init__(self, config: UNetValidConfig, classes: int) -> None:
        super().__init__()
        self.depth, self.channels = config.depth, config.channels
        channels = [config.width << level for level in range(config.depth)]
        self.down = nn.ModuleList(double_conv(i, o) for i, o in pairwise([config.channels, *channels]))
        self.dropout = nn.Dropout(config.dropout)
        pairs = [(channels[level + 1], channels[level]) for level in reversed(range(config.depth - 1))]
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, stride=2) for deep, fine in pairs)
        self.merge = nn.ModuleList(double_conv(2 * fine, fine) for _, fine in pairs)
        self.head = nn.Conv2d(config.width, classes, 1)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the input's size."""
        height, width = x.shape[-2:]
        x = as_fed(x, self.channels)
        margin = (input_side(1, self.depth) - output_side(1, self.depth)) // 2
        padded = extended(x, margin, input_side(height, self.depth), input_side(width, self.depth))
        return cut(self.valid(padded), height, width)

    def valid(self, x: Tensor) -> Tensor:
        """The paper's network: (n, channels, h, w) of sides ``input_side`` -> logits of the smaller ``output_side``."""
        features: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            x = self.dropout(x) if level >= self.depth - 2 else x
            features.append(x)
        for up, block, skip in zip(self.up, self.merge, features[-2::-1], strict=True):
            x = F.relu(up(x))
            x = block(torch.cat([_centre(skip, x.shape[-2], x.shape[-1]), x], 1))
        logits: Tensor = self.head(x)
        return logits


def _bottom_side(side: int, depth: int) -> int:
    """Side of the deepest level's output from which at least ``side`` pixels come: 4 at least."""
    step = 1 << (depth - 1)
    return 4 + max(side - 4 + step - 1, 0) // step


def output_side(side: int, depth: int) -> int:
    """The smallest side of an output that is not below ``side``.

    >>> output_side(388, 5), output_side(380, 5), output_side(373, 5)
    (388, 388, 388)
    """
    return (_bottom_side(side, depth) - 4) * (1 << (depth - 1)) + 4


def input_side(side: int, depth: int) -> int:
    """The side of the input that gives ``output_side``.

    >>> input_side(388, 5), input_side(1, 5)
    (572, 188)
    """
    return (_bottom_side(side, depth) + 8) * (1 << (depth - 1)) - 4


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions without padding, each with ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, channels in ((1, inputs), (2, outputs)):
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, 3)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _centre(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of (n, c, h, w)."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def _initialise(module: nn.Module) -> None:
    """Normal of variance 2 / N, N the inputs of one output value (He et al., ICCV 2015); zero biases."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        seen = module.in_channels * (module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 1)
        nn.init.normal_(module.weight, std=(2 / seen) ** 0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
