"""Models that run out of memory, hang, or make the decoder hang; see ``doubles``."""

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from doubles import Color, DoubleSegmenter, FreeModel, marked
from numpy.typing import NDArray

_TOO_MUCH = 64 << 30
_FOR_EVER_S = 3600.0


@dataclass(frozen=True)
class GreedyModel(FreeModel):
    """At a marked image it asks for more memory than the process may have, ``room`` bytes from its load on."""

    room: int = 1 << 30
    marker: Color = (255, 0, 255)

    def load(self, threads: int) -> DoubleSegmenter:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + self.room, resource.RLIM_INFINITY))
        return super().load(threads)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if marked(batch, self.marker):
            np.ones(_TOO_MUCH, np.uint8)


@dataclass(frozen=True)
class OomKilledModel(FreeModel):
    """Its process is killed at a marked image, once: what the kernel does where memory is short for a while."""

    once: str = ""
    marker: Color = (255, 0, 255)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if marked(batch, self.marker) and not os.path.exists(self.once):
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class SmallGpuModel(FreeModel):
    """A GPU whose memory holds ``most`` photos; ``says`` is what torch says then."""

    most: int = 2
    says: str = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def act(self, batch: NDArray[np.uint8]) -> None:
        if len(batch) > self.most:
            raise RuntimeError(self.says)


@dataclass(frozen=True)
class HangingModel(FreeModel):
    """Never comes back from a marked image."""

    marker: Color = (255, 0, 255)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if marked(batch, self.marker):
            time.sleep(_FOR_EVER_S)


@dataclass(frozen=True)
class HangingDecoder(FreeModel):
    """From its load on, the process that holds it decodes a marked image for ever."""

    marker: Color = (255, 0, 255)

    def load(self, threads: int) -> DoubleSegmenter:
        from segbatch.codecs import photo

        decode = photo.decode

        def hanging(*arguments: Any, **options: Any) -> Any:
            found = decode(*arguments, **options)
            if marked(found[0][None], self.marker):
                time.sleep(_FOR_EVER_S)
            return found

        photo.decode = hanging
        return super().load(threads)
