"""Networks of other libraries: weights put in, semantic scores taken out."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch.errors import ConfigError
from segbatch.models.base import ModelSpec
from segbatch.models.checkpoint import load_state
from segbatch.models.parts import Part
from segbatch.models.state_file import StateFile

ChannelOrder = Literal["rgb", "bgr"]


def put_in(net: nn.Module, file: StateFile) -> None:
    """Put a file's tensors into a network.

    Counters of batches, which only training looks at, may be missing: files of frozen or old normalisation lack them.

    Raises:
        ConfigError: naming the tensors that are missing, too many, or of another shape.
    """
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    load_state(net, {**counters, **file.tensors}, file.uri)


def check_fit(build: Callable[[], nn.Module], file: StateFile) -> nn.Module:
    """Raise what ``put_in`` would; the network has no weights, where it can do without.

    Args:
        build: builds the network.
        file: the weights.

    Returns:
        The network: its modules and shapes, not its weights.
    """
    net = without_weights(build)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        put_in(net, file)
    return net


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """The network on torch's device ``meta``; with random weights where its building computes with tensors."""
    with contextlib.suppress(ConfigError, RuntimeError, NotImplementedError), torch.device("meta"):
        return build()
    return build()


class ForeignSegmenter:
    """A semantic network on the CPU, channels last, in evaluation mode; in fp32 unless its part is replaced.

    Args:
        net: the network, its weights in it.
        spec: of the model.
        channel_order: of the channels that the network is fed.
    """

    def __init__(self, net: nn.Module, spec: ModelSpec, channel_order: ChannelOrder) -> None:
        self.spec = spec
        self.net = net.eval().to(memory_format=torch.channels_last)
        self._flip = channel_order == "bgr"

    def parts(self) -> list[Part]:
        """See ``parts.HasParts``."""
        return [Part(self.spec.digest, self, "net")]

    def scores(self, images: Tensor) -> Tensor:
        """What the network says of (n, 3, h, w): (n, channels, h, w), or (n, h, w) where that is labels."""
        scores: Tensor = self.net(images)
        return scores

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        """See ``Segmenter``; one channel of scores, the foreground's, has become two."""
        with torch.inference_mode():
            out: NDArray[Any] = both_classes(self.scores(fed(batch, self.spec, self._flip)), self.spec).numpy()
        return out


def fed(batch: NDArray[Any], spec: ModelSpec, flip: bool) -> Tensor:
    """A batch as torch networks want it: (n, 3, h, w) float32, channels last in memory; flipped: blue comes first."""
    x = torch.from_numpy(np.ascontiguousarray(batch))
    if spec.input.layout == "nhwc":
        x = x.permute(0, 3, 1, 2)
    return (x.flip(1) if flip else x).contiguous(memory_format=torch.channels_last)


def both_classes(out: Tensor, spec: ModelSpec) -> Tensor:
    """Scores of background and foreground where there are the foreground's alone; any other output as it is.

    The soft-max of (0, x) is the sigmoid of x.
    """
    if spec.output == "labels" or out.shape[1] != 1:
        return out
    background = torch.zeros_like(out) if spec.output == "logits" else 1 - out
    return torch.cat([background, out], 1)
