"""A GPU that is none: computes on the CPU, notes what is asked of it, and has as little memory as it is told."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class FakeOutOfMemoryError(RuntimeError):
    """The device's memory is full."""


@dataclass
class FakeDevice:
    """See ``inference.gpu.Device``. Streams are numbers.

    Attributes:
        log: (what, stream) of everything that was asked, in order.
        pinned_bytes: sizes of the pinned buffers that were asked for.
    """

    where: torch.device = field(default_factory=lambda: torch.device("cpu"))
    out_of_memory: type[Exception] = FakeOutOfMemoryError
    log: list[tuple[str, int]] = field(default_factory=list)
    pinned_bytes: list[int] = field(default_factory=list)
    launching: int = 0
    most_launching: int = 0
    _lock: Any = field(default_factory=threading.Lock)
    _streams: int = 0

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        buffer = torch.empty(tuple(shape), dtype=dtype)
        self.pinned_bytes.append(buffer.nbytes)
        return buffer

    def stream(self) -> int:
        self._streams += 1
        return self._streams

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        with self._lock:
            self.launching += 1
            self.most_launching = max(self.most_launching, self.launching)
        self.log.append(("on", stream))
        try:
            yield
        finally:
            with self._lock:
                self.launching -= 1

    def finish(self, stream: int) -> None:
        self.log.append(("finish", stream))

    def record(self, stream: int, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.log.append(("record", stream))
        result = work()

        def replay() -> None:
            self.log.append(("replay", stream))
            result.copy_(work())

        return result, replay

    def give_back(self) -> None:
        self.log.append(("give back", 0))

    def count(self, what: str) -> int:
        return sum(said == what for said, _ in self.log)


class Hungry(nn.Module):
    """A network that needs memory for every pixel of its input, and has room for so many."""

    def __init__(self, net: nn.Module, room: int) -> None:
        super().__init__()
        self.net, self.room = net, room
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[2] * x.shape[3] > self.room:
            raise FakeOutOfMemoryError("out of memory")
        self.sizes.append(len(x))
        result: Tensor = self.net(x)
        return result
