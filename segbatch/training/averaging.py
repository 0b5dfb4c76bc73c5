"""Exponentially averaged weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Average:
    """Running average of a network's parameters; young averages follow faster.

    Args:
        net: the network.
        decay: 0 keeps the last weights.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._decay = decay
        self.values = {k: v.detach().clone() for k, v in net.named_parameters()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        names, parameters = zip(*net.named_parameters(), strict=True)
        torch._foreach_lerp_([self.values[n] for n in names], list(parameters), 1 - decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over saved values."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def put_into(self, net: nn.Module) -> None:
        """Overwrite the network's parameters with the average."""
        for name, parameter in net.named_parameters():
            parameter.copy_(self.values[name])


@torch.no_grad()
def settle_batch_norm(net: nn.Module, run: Callable[[T], object], batches: Iterable[T]) -> None:
    """Compute the statistics of all batch normalisations anew, as plain means over ``batches``.

    The ones gathered in training belong to other weights than the averaged ones.

    Args:
        net: the network; left alone where it has no such statistics.
        run: sends a batch through the network.
        batches: what it is run on.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    was_training = net.training
    net.train()
    for batch in batches:
        run(batch)
    net.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
