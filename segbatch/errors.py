"""The exception tree.

Every error says what was wrong, which value, and what to do about it; every one can be pickled, because
errors travel from Ray actors to the driver. All arguments are positional strings for that reason.
"""

from typing import ClassVar


class SegbatchError(Exception):
    """Root of all errors that segbatch raises on purpose.

    Args:
        problem: what is wrong and with which value, one line.
        fix: what the user can do about it, one line; empty when nothing sensible can be said.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem} ({self.fix})" if self.fix else self.problem


class ConfigError(SegbatchError):
    """Wrong usage or configuration; raised before any work is done."""

    exit_code = 2


class SchemaError(SegbatchError):
    """A table has another schema than the reader understands."""


class StorageError(SegbatchError):
    """Reading or writing an object failed for good (full disk, no permission, no such bucket)."""


class TransientStorageError(StorageError):
    """Reading or writing an object failed in a way that may pass (timeout, throttling, lost connection)."""

    retryable = True


class ObjectExists(StorageError):
    """A put-if-absent found the key taken."""


class ObjectMissing(StorageError):
    """The object to read is not there."""


class DataError(SegbatchError):
    """One input item (image, label map, volume) cannot be used. Becomes a row's status, never a crash.

    Args:
        problem: what is wrong with the item.
        fix: what to do.
        code: short machine-readable reason, e.g. ``truncated``, ``empty-file``, ``size-mismatch``.
        uri: the file that is at fault.
    """

    def __init__(self, problem: str, fix: str = "", code: str = "unreadable", uri: str = "") -> None:
        super().__init__(problem, fix)
        self.args = (problem, fix, code, uri)
        self.code = code
        self.uri = uri


class EngineError(SegbatchError):
    """The engine cannot go on: no actor starts, a shard failed too often, no progress."""


class IncompleteRunError(SegbatchError):
    """Not every planned row is there; the message says what is missing and how to go on."""


class StoppedError(SegbatchError):
    """The run was asked to stop (SIGTERM or Ctrl-C) and has drained; the same command goes on."""


class BadItemsError(SegbatchError):
    """Every row is there, but more of them are bad than ``--max-bad-fraction`` allows (or ``--fail-fast`` met one)."""

    exit_code = 3
