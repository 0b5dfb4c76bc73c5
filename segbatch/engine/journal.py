"""The journal of an actor: which samples are in flight, on the node's own disk, so that it outlives the process."""

import json
import mmap
import os
import tempfile
import threading
from collections.abc import Sequence

_SLOT_BYTES = 8192
_SLOTS = 64


class NullJournal:
    """For engines whose death nobody survives."""

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """Nothing."""

    def clear(self, slot: str) -> None:
        """Nothing."""


class FileJournal:
    """A memory-mapped file of fixed slots; a note costs microseconds and survives ``kill -9``."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "w+b") as file:
            file.truncate(_SLOT_BYTES * _SLOTS)
            self._map = mmap.mmap(file.fileno(), _SLOT_BYTES * _SLOTS)
        self._slots: dict[str, int] = {}
        self._lock = threading.Lock()

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """Write what ``slot`` is working on; ids beyond the slot's size are left out, the first ones stay."""
        ids = list(sample_ids)
        text = json.dumps([slot, shard, ids]).encode()
        while len(text) >= _SLOT_BYTES and ids:
            ids = ids[: len(ids) // 2]
            text = json.dumps([slot, shard, ids]).encode()
        self._put(slot, text)

    def clear(self, slot: str) -> None:
        """``slot`` is idle."""
        self._put(slot, b"")

    def _put(self, slot: str, text: bytes) -> None:
        index = self._slots.get(slot)
        if index is None:
            with self._lock:
                index = self._slots.setdefault(slot, len(self._slots))
        if index >= _SLOTS:
            raise ValueError(f"journal has {_SLOTS} slots, {slot} is one too many")
        start = index * _SLOT_BYTES
        self._map[start : start + len(text) + 1] = text + b"\0"


def new_path() -> str:
    """A fresh path for a journal on this node."""
    handle, path = tempfile.mkstemp(prefix="segbatch-journal-")
    os.close(handle)
    return path


def read(path: str) -> list[tuple[int, str]]:
    """(shard, sample id) of everything in flight, what the model had first; the file is removed.

    An empty list when the journal is gone with its node.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        os.unlink(path)
    except FileNotFoundError:
        return []
    entries = []
    for start in range(0, len(data), _SLOT_BYTES):
        text = data[start : start + _SLOT_BYTES].split(b"\0", 1)[0]
        if text:
            entries.append(json.loads(text))
    entries.sort(key=lambda e: not str(e[0]).startswith("model"))
    return [(int(shard), str(i)) for _, shard, ids in entries for i in ids]
