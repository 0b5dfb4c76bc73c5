"""A torch network as a ``Segmenter``: numpy in, numpy out."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segbatch.models.base import ModelSpec
from segbatch.models.parts import Part


class TorchSegmenter:
    """Inference on the CPU, channels last, in evaluation mode; in fp32 unless its part is replaced."""

    def __init__(self, net: torch.nn.Module, spec: ModelSpec) -> None:
        self.spec = spec
        self._net = net.eval().to(memory_format=torch.channels_last)

    def parts(self) -> list[Part]:
        """See ``HasParts``."""
        return [Part(self.spec.digest, self, "_net")]

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        """Logits (n, classes, h, w) float32 of a batch (n, h, w, 3) or (n, 3, h, w) float32, as the spec says."""
        x = torch.from_numpy(batch)
        if self.spec.input.layout == "nhwc":
            x = x.permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._net(x.contiguous(memory_format=torch.channels_last)).numpy()
        return logits
