"""Seconds of work by stage, added up over the threads that work on a shard."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Starts at once. Threads may share it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """What is done within is part of a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            with self._lock:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

    def each(self, stage: str, things: Iterable[T]) -> Iterator[T]:
        """The same things; getting each of them is part of a stage, using it is not."""
        iterator = iter(things)
        end = object()
        while True:
            with self.measured(stage):
                thing = next(iterator, end)
            if thing is end:
                return
            yield thing  # type: ignore[misc]

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and ``total``: wall time since the start."""
        with self._lock:
            return {**self._seconds, "total": time.perf_counter() - self._began}
