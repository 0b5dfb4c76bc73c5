"""FCN-32s, FCN-16s, FCN-8s on VGG-16 (Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic
Segmentation, CVPR 2015, section 4 and table 2; layers, paddings and crops as in the authors' ``voc-fcn*s/net.py``).

The first convolution is padded by 100, fc6 (7x7) and fc7 (1x1) are convolutions with dropout, 1x1 scores are
up-sampled by transposed convolutions (every class from every class, initialised to bilinear interpolation), skips
are cropped and added. Poolings round up, as in Caffe; so any size from 1x1 on gives logits of the input's size.
With 21 classes: 136,152,917 (32s), 134,815,994 (16s) and 134,489,759 (8s) parameters, the bilinear filters counted.

Deviations: convolutions begin with He initialisation instead of ImageNet weights, and with ``width < 1`` all hidden
layers have that fraction of their channels. The last transposed convolution is fixed and the others are learned, as
the paper says; the authors' nets fix all of them. RGB is normalised as everywhere in segbatch, not BGR minus the mean.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.errors import ConfigError
from segbatch.models.borders import as_fed
from segbatch.models.config import FCNConfig
from segbatch.models.vgg import STAGES, conv_stages, initialise, scaled

if TYPE_CHECKING:
    from collections.abc import Mapping

PADDING = 100
CROPS = {32: 19, 16: 27, 8: 31}
"""First row and column of the last up-sampling that belongs to the image, by stride."""
POOL4_CROP, POOL3_CROP = 5, 9
_OWN = ("upscore", "score_pool")
"""Prefixes of the tensors that only some of the three networks have."""


class FCN(nn.Module):
    """The network: (n, channels, h, w) float of any size -> logits (n, classes, h, w)."""

    def __init__(self, config: FCNConfig, classes: int) -> None:
        super().__init__()
        self.channels = config.channels
        self.stride = config.stride
        hidden = scaled(4096, config.width)
        pool3, pool4, pool5 = (scaled(stage[-1], config.width) for stage in STAGES[2:])
        self.stages = conv_stages(config.width, norm=False, padding=PADDING, inputs=config.channels)
        self.fc6 = nn.Conv2d(pool5, hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(initialise)
        self.score = _zero(nn.Conv2d(hidden, classes, 1))
        if config.stride <= 16:
            self.upscore2 = upsampling(classes, 2)
            self.score_pool4 = _zero(nn.Conv2d(pool4, classes, 1))
        if config.stride == 8:
            self.upscore_pool4 = upsampling(classes, 2)
            self.score_pool3 = _zero(nn.Conv2d(pool3, classes, 1))
        self.upscore = upsampling(classes, config.stride).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the input's size."""
        height, width = x.shape[-2:]
        x = as_fed(x, self.channels)
        pools = []
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2, ceil_mode=True)
            pools.append(x)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.score(self.dropout(F.relu(self.fc7(x))))
        if self.stride <= 16:
            x = self.upscore2(x)
            x = x + cropped(self.score_pool4(pools[3]), POOL4_CROP, x.shape[-2], x.shape[-1])
        if self.stride == 8:
            x = self.upscore_pool4(x)
            x = x + cropped(self.score_pool3(pools[2]), POOL3_CROP, x.shape[-2], x.shape[-1])
        return cropped(self.upscore(x), CROPS[self.stride], height, width)


def cropped(x: Tensor, offset: int, height: int, width: int) -> Tensor:
    """Rows ``offset .. offset + height - 1`` and columns likewise of (n, c, h, w)."""
    return x[:, :, offset : offset + height, offset : offset + width]


def upsampling(classes: int, stride: int) -> nn.ConvTranspose2d:
    """A transposed convolution of kernel ``2 * stride`` that interpolates every class bilinearly, for a start."""
    layer = nn.ConvTranspose2d(classes, classes, 2 * stride, stride=stride, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(classes), range(classes)] = bilinear_kernel(2 * stride)
    return layer


def bilinear_kernel(size: int) -> Tensor:
    """(size, size) weights that up-sample by ``size / 2``, for an even size."""
    centre = (size - 1) / 2
    line = 1 - (torch.arange(size) - centre).abs() / (size / 2)
    return line[:, None] * line[None, :]


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The same layer with all weights zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def warm_start(net: FCN, state: "Mapping[str, Tensor]", where: str) -> list[str]:
    """Begin with another FCN's weights, as the paper trains 32s, then 16s, then 8s.

    Tensors are matched by name; the last transposed convolution always stays as it is.

    Args:
        net: the network that is to be trained.
        state: state dict of an FCN of any stride, with the same width and classes.
        where: names it in errors.

    Returns:
        Names of the network's tensors that keep their first values: the new skip's.

    Raises:
        ConfigError: it is no FCN, or one of another width or with other classes.
    """
    wanted = {k: v for k, v in net.state_dict().items() if k != "upscore.weight"}
    lacking = [k for k in wanted if k not in state and not k.startswith(_OWN)]
    if lacking:
        raise ConfigError(
            f"{where} is no FCN: {lacking[0]} and {len(lacking) - 1} more tensors are missing",
            "let model.warm_start name the folder of a trained FCN",
        )
    for name, tensor in wanted.items():
        if name in state and state[name].shape != tensor.shape:
            raise ConfigError(
                f"{where} has another width or other classes: "
                f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}",
                "train with the same model.width and the same classes",
            )
    net.load_state_dict({k: state[k] for k in wanted if k in state}, strict=False)
    return [k for k in wanted if k not in state]
