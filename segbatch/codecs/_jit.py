"""How compiled loops are made: once a process, kept on disk where that is possible. Importing this imports numba."""

import pickle
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

from numba import njit, types

ITEMS = {1: types.uint8, 2: types.uint16, 4: types.uint32}
"""Pixel types by their size in bytes."""


class Kernels:
    """The compiled loops of a module; they release the GIL, and may be asked for from any thread."""

    def __init__(self, signature: Callable[[Callable[..., Any], Any], Any]) -> None:
        """``signature`` gives a function's signature for a pixel type of ``ITEMS``."""
        self._signature = signature
        self._lock = threading.Lock()
        self._built: dict[tuple[Callable[..., Any], int], Callable[..., Any]] = {}

    def kernel(self, function: Any, itemsize: int = 1) -> Callable[..., Any]:
        """``function`` compiled for maps of pixels of ``itemsize`` bytes."""
        found = self._built.get((function, itemsize))
        if found is None:
            with self._lock:
                found = self._built.get((function, itemsize))
                if found is None:
                    item = ITEMS[itemsize]
                    found = _compile(function, self._signature(function, item), str(item))
                    self._built[function, itemsize] = found
        return found


def _compile(function: FunctionType, signature: Any, suffix: str) -> Callable[..., Any]:
    """Compile, or load the machine code kept on disk; in memory only where the disk does not play along.

    Every signature gets a name, so a cache file, of its own: numba numbers the signatures that share one, and two
    processes that add different ones at the same time would give both the same number.
    """
    named = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    named.__qualname__ = f"{function.__name__}_{suffix}"
    named.__module__ = function.__module__
    try:
        return njit([signature], nogil=True, cache=True)(named)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):  # no folder to write to, disk full, broken file
        return njit([signature], nogil=True)(named)
