"""One Prefect server for all flow tests, with a home of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a fresh Prefect server, which flows of this process use; nothing of the user's Prefect is touched."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with temporary_settings({PREFECT_HOME: home}), prefect_test_harness(server_startup_timeout=180):
            yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen drawn shelves, three of them of split val."""
    from segbatch.datasets import drawn_shelves

    root = tmp_path_factory.mktemp("shelves")
    drawn_shelves.draw(str(root), 15, height=64, width=96)
    return root
