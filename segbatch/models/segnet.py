"""SegNet and SegNet-Basic (Badrinarayanan, Kendall, Cipolla: SegNet, TPAMI 2017, figure 2 and sections 3 and 3.1).

SegNet: the 13 convolutions of VGG-16 with batch normalisation, max-pooling that remembers where each maximum lay, and
a mirrored decoder that puts values back to those places, zeros elsewhere, and convolves. No ReLU and no
normalisation after the last convolution. SegNet-Basic: four 7x7 convolutions of 64 channels each way, without biases,
no ReLU in the decoder, a 1x1 classifier. With 11 classes: 29,449,355 and 1,416,075 parameters.

Deviations: He initialisation for SegNet's encoder too (the paper: ImageNet weights); RGB is normalised as everywhere
in segbatch instead of by local contrast; ``width < 1`` takes that fraction of the hidden channels. The authors'
``segnet_basic_train.prototxt`` has biases, the paper has none: 512 parameters less here. Poolings round up, as in
Caffe, and a decoder level takes the size of the encoder's, so any size from 1x1 on gives logits of the input's size.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.models.borders import as_fed
from segbatch.models.config import SegNetConfig
from segbatch.models.vgg import STAGES, conv_stage, conv_stages, initialise, scaled

BASIC_CHANNELS, BASIC_LEVELS = 64, 4


class SegNet(nn.Module):
    """The network: (n, channels, h, w) float of any size -> logits (n, classes, h, w)."""

    def __init__(self, config: SegNetConfig, classes: int) -> None:
        super().__init__()
        self.channels = config.channels
        if config.variant == "basic":
            channels = scaled(BASIC_CHANNELS, config.width)
            inputs = [config.channels, *[channels] * (BASIC_LEVELS - 1)]
            self.encoder = nn.ModuleList(_basic_stage(i, channels, relu=True) for i in inputs)
            self.decoder = nn.ModuleList(_basic_stage(channels, channels, relu=False) for _ in inputs)
            self.head: nn.Module = nn.Conv2d(channels, classes, 1)
        else:
            self.encoder = conv_stages(config.width, norm=True, inputs=config.channels)
            self.decoder = nn.ModuleList(_mirrored(level, config.width) for level in reversed(range(len(STAGES))))
            self.head = nn.Conv2d(scaled(STAGES[0][0], config.width), classes, 3, padding=1)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the input's size."""
        x = as_fed(x, self.channels)
        places, sizes = [], []
        for stage in self.encoder:
            x = stage(x)
            sizes.append(x.shape[-2:])
            x, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            places.append(indices)
        for stage, indices, size in zip(self.decoder, reversed(places), reversed(sizes), strict=True):
            x = stage(unpooled(x, indices, size[0], size[1]))
        logits: Tensor = self.head(x)
        return logits


def unpooled(x: Tensor, indices: Tensor, height: int, width: int) -> Tensor:
    """Put pooled values back to where they came from, zeros elsewhere.

    The same as ``nn.MaxUnpool2d`` with that output size, which cannot be traced for free sizes.

    Args:
        x: (n, c, h, w).
        indices: (n, c, h, w) int64, row * width + column of each value's place.
        height, width: of the output.
    """
    count, channels = x.shape[:2]
    flat = x.new_zeros(count, channels, height * width)
    return flat.scatter(2, indices.flatten(2), x.flatten(2)).view(count, channels, height, width)


def _mirrored(level: int, width: float) -> nn.Sequential:
    """The decoder of an encoder's stage: as many convolutions, the last one to the channels of the stage before.

    At the finest level the last one is the classifier, which is not part of it.
    """
    channels = STAGES[level]
    coarser = [STAGES[level - 1][-1]] if level else []
    return conv_stage(scaled(channels[-1], width), [scaled(c, width) for c in (*channels[1:], *coarser)], norm=True)


def _basic_stage(inputs: int, outputs: int, relu: bool) -> nn.Sequential:
    """7x7 convolution without bias and batch normalisation, then ReLU in the encoder."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(inputs, outputs, 7, padding=3, bias=False)
    layers["bn"] = nn.BatchNorm2d(outputs)
    if relu:
        layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)
