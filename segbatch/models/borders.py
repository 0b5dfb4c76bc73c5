"""What is done to a photo inside a network before its first layer, and undone behind its last."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mirrored(size: int, before: int, total: int) -> Tensor:
    """(total,) int64 indices into ``size`` pixels that extend them at both ends by mirroring about the outermost.

    Args:
        size: pixels there are, 1 or more.
        before: indices that come before the first pixel.
        total: indices altogether.
    """
    period = max(2 * size - 2, 1)
    positions = (torch.arange(total) - before) % period
    return torch.minimum(positions, period - positions)


def extended(x: Tensor, before: int, height: int, width: int) -> Tensor:
    """(n, c, h, w) mirrored at its borders to (n, c, height, width), ``before`` rows and columns of that in front."""
    rows = mirrored(x.shape[-2], before, height).to(x.device)
    columns = mirrored(x.shape[-1], before, width).to(x.device)
    return x.index_select(2, rows).index_select(3, columns)


def cut(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of (n, c, h, w): a padding below zero, which unlike a slice is traced for any size."""
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


def as_fed(x: Tensor, channels: int) -> Tensor:
    """(n, channels, h, w) of a batch: the mean of red, green and blue where the network sees one channel of photos."""
    return x.mean(1, keepdim=True) if channels == 1 and x.shape[1] == 3 else x
