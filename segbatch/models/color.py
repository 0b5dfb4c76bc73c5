"""The per-pixel colour classifier: every colour gets the class that it most often showed. A baseline.

A colour's class frequencies are smoothed with those of the coarser colour around it (one bit less per channel), and
so on down to the class frequencies over everything; so a colour never seen in training falls back on its
neighbourhood. One table look-up a pixel.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch.models.base import ModelSpec
from segbatch.models.config import ColorConfig


def color_codes(rgb: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Number of each pixel's quantised colour: (..., 3) -> (...), red in the highest bits, 0 .. 2**(3 * bits) - 1."""
    shift = 8 - bits
    code = (rgb[..., 0] >> shift).astype(np.uint32) << (2 * bits)
    code |= (rgb[..., 1] >> shift).astype(np.uint32) << bits
    code |= (rgb[..., 2] >> shift).astype(np.uint32)
    return code.astype(np.uint32, copy=False)


def smoothed_frequencies(counts: NDArray[np.int64], bits: int, smoothing: float) -> NDArray[np.float64]:
    """Class frequencies of every colour: (2**(3 * bits), classes) counts -> probabilities of the same shape.

    ``p(class | colour) = (count + smoothing * p(class | coarser colour)) / (total + smoothing)``, down to one colour,
    where every class starts with one pixel.
    """
    if bits == 0:
        prior: NDArray[np.float64] = (counts + 1.0) / (counts.sum() + counts.shape[1])
        return prior
    side = 1 << (bits - 1)
    cube = counts.reshape(side, 2, side, 2, side, 2, -1)
    coarse = smoothed_frequencies(cube.sum((1, 3, 5)).reshape(side**3, -1), bits - 1, smoothing)
    spread = np.broadcast_to(coarse.reshape(side, 1, side, 1, side, 1, -1), cube.shape).reshape(counts.shape)
    smoothed: NDArray[np.float64] = (counts + smoothing * spread) / (counts.sum(1, keepdims=True) + smoothing)
    return smoothed


class ColorTable(nn.Module):
    """Counts of (colour, class) and the winning class of each colour; both go into the checkpoint."""

    counts: Tensor
    winners: Tensor

    def __init__(self, config: ColorConfig, classes: int) -> None:
        super().__init__()
        self.settings = config
        self.register_buffer("counts", torch.zeros(1 << (3 * config.bits), classes, dtype=torch.int64))
        self.register_buffer("winners", torch.zeros(1 << (3 * config.bits), dtype=torch.int32))

    def observe(self, rgb: NDArray[np.uint8], classes: NDArray[np.int16]) -> None:
        """Count the pixels of one image: (h, w, 3) and (h, w) class indices; negative ones are left out."""
        flat, seen = self.counts.numpy().reshape(-1), classes >= 0
        width = self.counts.shape[1]
        index = color_codes(rgb[seen], self.settings.bits).astype(np.int64) * width + classes[seen]
        flat += np.bincount(index, minlength=len(flat))

    def settle(self) -> None:
        """Work out the winners from the counts; ties go to the class listed first."""
        frequencies = smoothed_frequencies(self.counts.numpy(), self.settings.bits, self.settings.smoothing)
        self.winners.copy_(torch.from_numpy(frequencies.argmax(1).astype(np.int32)))


class ColorSegmenter:
    """A ``ColorTable`` at work: (n, h, w, 3) uint8 -> class indices (n, h, w) uint16."""

    def __init__(self, table: ColorTable, spec: ModelSpec) -> None:
        self.spec = spec
        self._bits = table.settings.bits
        self._winners = table.winners.numpy().astype(np.uint16)

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        """One look-up a pixel."""
        labels: NDArray[np.uint16] = self._winners[color_codes(batch, self._bits)]
        return labels
