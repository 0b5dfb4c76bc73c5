"""A network that classifies the window around each pixel (Ciresan, Giusti, Gambardella, Schmidhuber: Deep Neural
Networks Segment Neuronal Membranes in Electron Microscopy Images, NIPS 2012, section 2 and table 1, network N4).

A 95x95 window goes through four convolutions of 48 maps (4x4, 5x5, 4x4, 4x4), each followed by 2x2 max-pooling, then
a layer of 200 and one of as many as there are classes. At a photo's borders windows are filled by mirroring. Grey and
two classes: 219,290 parameters, .12 G multiply-adds a window.

A photo is not cut into windows: ``dense`` runs every layer once over the whole photo. A pooling of stride 2 becomes
one of stride 1, and all that comes behind it is dilated by 2, so that each pixel sees exactly what its window would
(Giusti et al.: Fast Image Scanning with Deep Max-Pooling Convolutional Neural Networks, ICIP 2013). Training does the
same, so a crop teaches all of its windows at once.

Deviations: ReLU and He initialisation. segbatch weights classes instead of drawing them equally often, mirrors crops
but does not turn them, and borders of a crop are mirrored even where the photo goes on. Foveation, non-uniform
sampling, averaging over networks and calibration are not part of it. Windows, kernels and layer sizes are free.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.models.borders import as_fed, extended
from segbatch.models.config import PatchConfig
from segbatch.models.vgg import initialise


class PatchNet(nn.Module):
    """The network: (n, channels, h, w) float of any size -> logits (n, classes, h, w)."""

    def __init__(self, config: PatchConfig, classes: int) -> None:
        super().__init__()
        self.window, self.channels = config.window, config.channels
        inputs = [config.channels, *[config.maps] * (len(config.kernels) - 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, config.maps, k) for i, k in zip(inputs, config.kernels, strict=True))
        self.hidden = nn.Conv2d(config.maps, config.hidden, config.last_side)
        self.head = nn.Conv2d(config.hidden, classes, 1)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the input's size; pixel (y, x) is the middle of its window, ``window // 2`` from its corner."""
        x = as_fed(x, self.channels)
        around = self.window - 1
        return self.dense(extended(x, self.window // 2, x.shape[-2] + around, x.shape[-1] + around))

    def classify(self, windows: Tensor) -> Tensor:
        """The paper's network: (n, channels, window, window) -> logits (n, classes)."""
        x = windows
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        logits: Tensor = self.head(F.relu(self.hidden(x)))
        return logits.flatten(1)

    def dense(self, x: Tensor) -> Tensor:
        """``classify`` of every window in (n, channels, h + window - 1, w + window - 1): (n, classes, h, w)."""
        dilation = 1
        for conv in self.convs:
            x = F.relu(_dilated(conv, x, dilation))
            x = F.max_pool2d(x, 2, stride=1, dilation=dilation)
            dilation *= 2
        logits: Tensor = self.head(F.relu(_dilated(self.hidden, x, dilation)))
        return logits


def _dilated(conv: nn.Module, x: Tensor, dilation: int) -> Tensor:
    """A convolution whose taps lie further apart."""
    assert isinstance(conv, nn.Conv2d)
    return torch.conv2d(x, conv.weight, conv.bias, dilation=dilation)
