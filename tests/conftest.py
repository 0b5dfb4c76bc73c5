"""Fixtures that every test may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
for _name in ("OMP_NUM_THREADS",):
    os.environ.setdefault(_name, "2")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a real dataset or weights: from $SEGBATCH_TEST_DATA or ../shared; skips, by name, where absent."""
    root = Path(os.environ.get("SEGBATCH_TEST_DATA", PROJECT.parent / "shared"))

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            pytest.skip(f"real data {relative} is absent: put it into {root} or set SEGBATCH_TEST_DATA")
        return path

    return find
