"""The loss and its class weights."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from segbatch.training.samples import VOID


def sqrt_median_weights(pixels: NDArray[np.int64], pixels_where_present: NDArray[np.int64]) -> NDArray[np.float32]:
    """Square root of median-frequency class weights.

    A class's frequency is its pixels over all scored pixels of the photos that show it; its weight is the median of
    all frequencies over its own. Source: Eigen and Fergus, ICCV 2015, as in SegNet; the square root is ours.

    Args:
        pixels: (classes,) pixels of each class.
        pixels_where_present: (classes,) scored pixels of the photos that show the class.

    Returns:
        (classes,); 1 for a class that no photo shows.
    """
    weights = np.ones(len(pixels), np.float32)
    present = pixels > 0
    frequencies = pixels[present] / pixels_where_present[present]
    if present.any():
        weights[present] = np.sqrt(np.median(frequencies) / frequencies)
    return weights


def cross_entropy(logits: Tensor, classes: Tensor, weights: Tensor, borders: Tensor | None = None) -> Tensor:
    """Weighted mean cross-entropy of (n, classes, h, w) logits over the pixels that are not void; 0 if all are.

    Args:
        logits: of the network.
        classes: (n, h, w) int64.
        weights: of the classes.
        borders: (n, h, w), added to the weight of a pixel's class; None for none.
    """
    if borders is not None:
        each = (weights[classes.clamp_min(0)] + borders) * (classes != VOID)
        losses = F.cross_entropy(logits.float(), classes, ignore_index=VOID, reduction="none")
        return (losses * each).sum() / each.sum().clamp_min(torch.finfo(torch.float32).tiny)
    total = F.cross_entropy(logits.float(), classes, weights, ignore_index=VOID, reduction="sum")
    seen = weights[classes[classes != VOID]].sum()
    return total / seen.clamp_min(torch.finfo(torch.float32).tiny)
