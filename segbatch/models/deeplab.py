"""DeepLab v3+ (Chen, Zhu, Papandreou, Schroff, Adam: Encoder-Decoder with Atrous Separable Convolution, ECCV 2018,
sections 3.1 and 3.2, figures 2 and 4; details as in ``tensorflow/models/research/deeplab``).

Backbone: Modified Aligned Xception-65, or ResNet-50 or -101, from timm, at output stride 16 or 8. Atrous spatial
pyramid pooling: 1x1, three separable 3x3 of rates 6, 12, 18 (doubled at stride 8), image pooling, 256 channels each,
joined by 1x1. Decoder: that, enlarged fourfold, beside 48 channels of the stride-4 features; two separable 3x3 of 256;
1x1; enlarged fourfold. Batch normalisation and ReLU stand behind every convolution, depthwise ones too. Xception-65
with 21 classes: 41,055,413 parameters, 54.04 G multiply-adds at 513x513 (published: 54.17).

Sides of 16 m + 1 pixels, as the paper's 513 and 1025x2049, put every feature on a pixel, and enlarging with
``align_corners`` is exact. So the input is padded (bottom, right, mean colour) to such sides, and the logits are
cropped.

Deviations: random weights, He initialisation of the head; the stride-4 features of Xception come from behind the ReLU
that follows the original's tap; the ResNets are timm's (stride in the 3x3, no multi-grid); the decay of batch
normalisation's averages is .9 instead of .9997. ``width < 1`` takes that fraction of the channels of head and
backbone; the stems keep theirs.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.errors import ConfigError
from segbatch.models.borders import as_fed, cut
from segbatch.models.config import DeepLabConfig
from segbatch.models.vgg import initialise, scaled

RATES = (6, 12, 18)
"""Of the pyramid at output stride 16."""
PYRAMID_CHANNELS, LOW_CHANNELS = 256, 48
_GRID = 16
_EXTRA = "pip install 'segbatch[pretrained]'"


class DeepLab(nn.Module):
    """The network: (n, channels, h, w) float of any size -> logits (n, classes, h, w)."""

    def __init__(self, config: DeepLabConfig, classes: int) -> None:
        super().__init__()
        self.channels = config.channels
        self.backbone = backbone(config)
        low, high = (int(c) for c in self.backbone.feature_info.channels())  # type: ignore[union-attr, operator]
        channels, skip = scaled(PYRAMID_CHANNELS, config.width), scaled(LOW_CHANNELS, config.width)
        rates = [r * 16 // config.output_stride for r in RATES]
        self.pyramid = Pyramid(high, channels, rates, config.dropout)
        self.low = convolution(low, skip)
        self.decoder = nn.Sequential(separable(channels + skip, channels), separable(channels, channels))
        self.head = nn.Conv2d(channels, classes, 1)
        for part in (self.pyramid, self.low, self.decoder, self.head):
            part.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the input's size."""
        height, width = x.shape[-2:]
        x = as_fed(x, self.channels)
        x = F.pad(x, (0, -(width - 1) % _GRID, 0, -(height - 1) % _GRID))
        low, high = self.backbone(x)
        skip = self.low(low)
        high = enlarged(self.pyramid(high), skip.shape[-2], skip.shape[-1])
        logits = self.head(self.decoder(torch.cat([high, skip], 1)))
        return cut(enlarged(logits, x.shape[-2], x.shape[-1]), height, width)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: (n, inputs, h, w) -> (n, channels, h, w)."""

    def __init__(self, inputs: int, channels: int, rates: list[int], dropout: float) -> None:
        super().__init__()
        self.pooling = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(inputs, channels, 1, bias=False), bn=PooledBatchNorm(channels), relu=nn.ReLU())
        )
        self.branches = nn.ModuleList([convolution(inputs, channels), *(separable(inputs, channels, r) for r in rates)])
        self.project = convolution(channels * (2 + len(rates)), channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The branches side by side, joined."""
        pooled = self.pooling(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[-2], x.shape[-1])
        joined: Tensor = self.dropout(self.project(torch.cat([pooled, *(b(x) for b in self.branches)], 1)))
        return joined


class PooledBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of one value per image; a batch of one image has no statistics and takes the running ones."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, 1, 1) normalised."""
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """1x1 convolution, batch normalisation, ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(inputs, outputs, 1, bias=False)
    layers["bn"] = nn.BatchNorm2d(outputs)
    layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def separable(inputs: int, outputs: int, rate: int = 1) -> nn.Sequential:
    """Depthwise 3x3 convolution of that atrous rate, then 1x1, each with batch normalisation and ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["depthwise"] = nn.Conv2d(inputs, inputs, 3, padding=rate, dilation=rate, groups=inputs, bias=False)
    layers["bn"] = nn.BatchNorm2d(inputs)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["pointwise"] = convolution(inputs, outputs)
    return nn.Sequential(layers)


def enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation; first and last pixels keep their places."""
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=True)


def backbone(config: DeepLabConfig) -> nn.Module:
    """timm's network without its head, random weights: features of stride 4 and of the output stride.

    ``feature_cls="getter"``: timm's default for Xception keeps features in the module between hooks, which several
    threads at once would mix up.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"the backbone {config.backbone} needs the package timm", _EXTRA) from error
    xception = config.backbone == "xception65"
    net: nn.Module = timm.create_model(
        config.backbone,
        pretrained=False,
        in_chans=config.channels,
        features_only=True,
        feature_cls="getter",
        out_indices=(1, 4),
        output_stride=config.output_stride,
        **(_xception65(config.width) if xception else _resnet(config.width)),
    )
    return net


def _xception65(width: float) -> dict[str, Any]:
    """Entry flow behind the stem, 16 blocks of the middle flow, exit flow (figure 4 of the paper)."""
    entry, middle = [64, *(scaled(c, width) for c in (128, 256, 728))], scaled(728, width)
    exit1, exit2, last = (scaled(c, width) for c in (1024, 1536, 2048))
    return {
        "block_cfg": [
            *({"in_chs": i, "out_chs": o, "stride": 2} for i, o in pairwise(entry)),
            *({"in_chs": middle, "out_chs": middle, "stride": 1} for _ in range(16)),
            {"in_chs": middle, "out_chs": (middle, exit1, exit1), "stride": 2},
            {"in_chs": exit1, "out_chs": (exit2, exit2, last), "stride": 1, "no_skip": True, "start_with_relu": False},
        ]
    }


def _resnet(width: float) -> dict[str, Any]:
    return {"channels": tuple(scaled(c, width) for c in (64, 128, 256, 512))}
