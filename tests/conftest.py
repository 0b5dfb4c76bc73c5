"""Fixtures that every test may use."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3
from hypothesis import settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
for _name in ("OMP_NUM_THREADS",):
    os.environ.setdefault(_name, "2")

settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.register_profile("quick", deadline=None, max_examples=25)
settings.load_profile("default")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs Ray goes to one process, what needs Prefect or S3 alone to another (``--dist loadgroup``)."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"ray", "flows", "s3"}:
            if item.path.parent.name not in ("flows", "integration", "contract"):
                raise pytest.UsageError(f"{item.nodeid} needs a server: make test looks for such tests elsewhere")
            group = "prefect" if "flows" in marks or "ray" not in marks else "ray"
            item.add_marker(pytest.mark.xdist_group(group))


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    """A real S3 server on a free port, and the environment that leads to it; skips where it is not installed."""
    from segbatch import storage

    program = s3.program(PROJECT)
    with (
        s3.server(program, tmp_path_factory.mktemp("s3") / "server.log") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        storage._remote.cache_clear()
        yield server
    storage._remote.cache_clear()


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One local Ray for all tests, which runs find and use; gives the folder of the temporary files of its workers."""
    import ray

    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]))
        patch.setenv("RAY_TMPDIR", "/tmp")  # paths of sockets must be short
        patch.setenv("TMPDIR", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 << 20}
        ray.init(address="local", num_cpus=3, **options)
    yield folder
    ray.shutdown()
