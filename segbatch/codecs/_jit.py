"""How compiled loops are made: once a process, kept on disk where that is possible. Importing this imports numba."""

import logging
import pickle
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.sigutils import normalize_signature

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

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


class _Kept(FunctionCache):
    """numba's machine code on disk, done without where the disk does not play along: full, read-only, a broken file.

    numba numbers the signatures of a function; two processes that add different ones at the same time give both the
    same number. So what is found is taken only if it is for the arguments at hand.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """See ``FunctionCache``; None where nothing that can be read is kept."""
        try:
            found: Any = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            log.debug("compiled code is not read: %s", error)
            return None
        wanted = normalize_signature(sig)[0]  # type: ignore[no-untyped-call]
        if found is None or tuple(found.signature.args) == tuple(wanted):
            return found
        log.debug("compiled code is for other arguments: %s", found.signature)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """See ``FunctionCache``."""
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            log.debug("compiled code is not kept: %s", error)


def part(function: F) -> F:
    """A function that kernels call; it is compiled with them."""
    return njit(function)  # type: ignore[no-any-return]


def kept(function: F) -> F:
    """A kernel that is compiled at its first call for each kind of arguments; it divides by 0 as numpy does."""
    return _with_cache(njit(nogil=True, error_model="numpy")(function))  # type: ignore[no-any-return]


def _with_cache(dispatcher: Any) -> Any:
    try:
        dispatcher._cache = _Kept(dispatcher.py_func)  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # no folder that can be written to
        log.debug("compiled code is not kept: %s", error)
    return dispatcher


def _compile(function: FunctionType, signature: Any, suffix: str) -> Callable[..., Any]:
    """Every signature gets a name, so a cache file, of its own; see ``_Kept``."""
    named = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    named.__qualname__ = f"{function.__name__}_{suffix}"
    named.__module__ = function.__module__
    found: Any = _with_cache(njit(nogil=True)(named))
    found.compile(signature)
    found.disable_compile()
    return found  # type: ignore[no-any-return]
