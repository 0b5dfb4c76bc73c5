"""What this process has moved from and to stores so far, counted where the bytes pass.

Bytes of a member are those that its archive's store gave. What pyarrow reads of a query is not seen from here.
"""

import io
import threading
from collections import Counter
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from typing_extensions import Buffer

Moved = Literal["bytes_read", "bytes_written", "requests_repeated", "requests_throttled"]

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def count(what: Moved, number: int = 1) -> None:
    """So much more of it."""
    with _lock:
        _counts[what] += number


def so_far() -> dict[str, int]:
    """Every count since the process began."""
    with _lock:
        return dict(_counts)


class File(io.FileIO):
    """A local file that is read; what is read of it counts."""

    def readinto(self, buffer: "Buffer", /) -> int:
        """See ``io.FileIO``."""
        found = super().readinto(buffer)
        count("bytes_read", found)
        return found

    def readall(self) -> bytes:
        """See ``io.FileIO``."""
        found = super().readall()
        count("bytes_read", len(found))
        return found
