"""Runs a script under a clock that is wrong: ``chaos_clock.py SECONDS SCRIPT ARGUMENTS...``."""

import datetime
import runpy
import sys
import time
from typing import Any


def shift(seconds: float) -> None:
    """Set what this process takes for the time of day ahead by so many seconds."""
    right = time.time

    class Shifted(datetime.datetime):
        """Whose now is wrong."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromtimestamp(right() + seconds, tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    time.time = lambda: right() + seconds
    datetime.datetime = Shifted  # type: ignore[misc]


if __name__ == "__main__":
    shift(float(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
