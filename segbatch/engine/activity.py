"""Which of an actor's shards still get on: a journal that remembers when each of them last did something."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from segbatch.runs import Journal


class Activity:
    """See ``runs.Journal``; notes are handed on to ``journal``.

    A shard does something when a sample of it begins or ends. One that waits for the store, in a read or in a commit,
    does nothing; nor does one of whose samples one hangs, as soon as those around it are done.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._journal, self._clock = journal, clock
        self._lock = threading.Lock()
        self._latest: dict[int, float] = {}
        self._slots: dict[str, int] = {}

    @contextmanager
    def of(self, shard: int) -> Iterator[None]:
        """While the shard with this number is in flight."""
        with self._lock:
            self._latest[shard] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                del self._latest[shard]

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """See ``runs.Journal``."""
        with self._lock:
            self._slots[slot] = shard
            self._touch(shard)
        self._journal.note(slot, shard, sample_ids)

    def clear(self, slot: str) -> None:
        """See ``runs.Journal``."""
        with self._lock:
            self._touch(self._slots.pop(slot, None))
        self._journal.clear(slot)

    def idle_s(self) -> dict[int, float]:
        """Seconds since each shard in flight did something, by number."""
        now = self._clock()
        with self._lock:
            return {shard: now - latest for shard, latest in self._latest.items()}

    def _touch(self, shard: int | None) -> None:
        if shard in self._latest:
            self._latest[shard] = self._clock()
