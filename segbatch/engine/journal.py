"""The journal of an actor: which samples are in flight, on the node's own disk, so that it outlives the process."""

import contextlib
import json
import mmap
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from segbatch.errors import StorageError

_SLOT_BYTES = 1 << 16  # a batch of 64 with ids of 1,000 characters
_PREFIX = "segbatch-journal-"
_STALE_S = 24 * 3600.0


class NullJournal:
    """For engines whose death nobody survives."""

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """Nothing."""

    def clear(self, slot: str) -> None:
        """Nothing."""


class FileJournal:
    """A memory-mapped file of fixed slots; a note costs microseconds and survives ``kill -9``.

    Args:
        path: from ``new_path``.
        slots: how many threads and stages may note something.

    Raises:
        StorageError: the disk has no room. Its blocks are taken here: a map without them ends the process later on.
    """

    def __init__(self, path: str, slots: int) -> None:
        self.path = path
        self._count = slots
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(handle, "w+b") as file:
                os.posix_fallocate(file.fileno(), 0, _SLOT_BYTES * slots)
                self._map = mmap.mmap(file.fileno(), _SLOT_BYTES * slots)
        except OSError as error:
            remove(path)
            raise StorageError(
                f"cannot write a journal at {path}: {os.strerror(error.errno or 0)}",
                "free space there or raise the limit, or set TMPDIR to another folder",
            ) from error
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
        if index >= self._count:
            raise ValueError(f"journal has {self._count} slots, {slot} is one too many")
        start = index * _SLOT_BYTES
        self._map[start : start + len(text) + 1] = text + b"\0"


def new_path() -> str:
    """A path for a new journal on this node, not created yet; what dead drivers left a day ago is removed."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone already, or another user's
            if time.time() - old.stat().st_mtime > _STALE_S:
                old.unlink()
    return os.path.join(tempfile.gettempdir(), f"{_PREFIX}{uuid.uuid4().hex}")


def remove(path: str) -> None:
    """Forget a journal."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def read(path: str) -> list[tuple[int, str]]:
    """(shard, sample id) of everything in flight, what the model had first; the file is removed.

    A note that was being written at the moment of death is left out.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    remove(path)
    entries = []
    for start in range(0, len(data), _SLOT_BYTES):
        text = data[start : start + _SLOT_BYTES].split(b"\0", 1)[0]
        with contextlib.suppress(ValueError):
            entries += [json.loads(text)] if text else []
    entries.sort(key=lambda e: not str(e[0]).startswith("model"))
    return list(dict.fromkeys((int(shard), str(i)) for _, shard, ids in entries for i in ids))
