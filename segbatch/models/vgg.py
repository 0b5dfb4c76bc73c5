"""The convolutions of VGG-16 (Simonyan and Zisserman, ICLR 2015, configuration D), shared by FCN and SegNet."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 13 convolutions; a 2x2 max-pooling follows each stage."""


def scaled(channels: int, width: float) -> int:
    """That fraction of the paper's channels, at least one.

    >>> scaled(64, 0.25), scaled(64, 0.001)
    (16, 1)
    """
    return max(1, round(channels * width))


def conv_stage(inputs: int, outputs: Sequence[int], norm: bool, padding: int = 1) -> nn.Sequential:
    """3x3 convolutions with bias, each with ReLU and, where ``norm``, batch normalisation before it.

    Args:
        inputs: channels that come in.
        outputs: channels of each convolution.
        norm: with batch normalisation.
        padding: of the first convolution; the others keep the size.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, channels in enumerate(outputs, 1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, channels, 3, padding=padding)
        if norm:
            layers[f"bn{number}"] = nn.BatchNorm2d(channels)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        inputs, padding = channels, 1
    return nn.Sequential(layers)


def conv_stages(width: float, norm: bool, padding: int = 1, inputs: int = 3) -> nn.ModuleList:
    """The five stages, without the pooling: ``inputs`` channels in, ``scaled(512, width)`` out.

    Args:
        width: fraction of the channels.
        norm: with batch normalisation.
        padding: of the very first convolution.
        inputs: channels of the photo.
    """
    stages = []
    for number, channels in enumerate(STAGES):
        outputs = [scaled(c, width) for c in channels]
        stages.append(conv_stage(inputs, outputs, norm, 1 if number else padding))
        inputs = outputs[-1]
    return nn.ModuleList(stages)


def initialise(module: nn.Module) -> None:
    """He initialisation of a convolution, zero biases; for ``nn.Module.apply``."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
