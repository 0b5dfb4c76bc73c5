"""One behaviour suite for every engine: what ``engine.base.Engine`` promises."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import doubles
import pytest

from segbatch.config import EngineConfig
from segbatch.engine import Control, Engine, make
from segbatch.errors import ConfigError, DataError, EngineError, StoppedError
from segbatch.records import Outcome, ShardRef


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    engine = make(EngineConfig(kind=request.param))
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def shards(root: Path, count: int) -> list[ShardRef]:
    return [ShardRef(str(root), "masks", 0, i, f"part-{i:08d}-x.parquet", "", 0, 3, 3, 30) for i in range(count)]


def runs_of(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("run")]


def test_every_shard_once(engine: Engine, tmp_path: Path, log: Path) -> None:
    ready: list[int] = []
    rows: list[int] = []
    control = Control(quarantine={"x.jpg": "it kills"}, on_ready=lambda: ready.append(1), on_rows=rows.append)
    outcomes = list(engine.map(doubles.EchoTask(str(log), {}), iter(shards(tmp_path, 7)), control))
    assert sorted(o.shard for o in outcomes) == sorted(runs_of(log)) == list(range(7))
    assert all((o.rows, o.bad) == (3, 1) for o in outcomes)
    assert ready and rows[-1] == 21 and rows == sorted(rows)


def test_no_shards_no_work(engine: Engine, log: Path) -> None:
    assert list(engine.map(doubles.EchoTask(str(log), {}), [], Control())) == []
    assert not log.exists()


def test_several_maps(engine: Engine, tmp_path: Path, log: Path) -> None:
    for _ in range(2):
        assert len(list(engine.map(doubles.EchoTask(str(log), {}), shards(tmp_path, 2), Control()))) == 2


def test_transient_failures_are_repeated(engine: Engine, tmp_path: Path, log: Path) -> None:
    task = doubles.EchoTask(str(log), {1: "transient once"})
    outcomes = list(engine.map(task, shards(tmp_path, 3), Control()))
    assert sorted(o.shard for o in outcomes) == [0, 1, 2]
    assert sorted(runs_of(log)) == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("trouble", "says"),
    [("transient", "the store is down (wait)"), ("bug", "a worker raised KeyError: 'colour' (this looks like a bug)")],
)
def test_everything_else_is_done_first(engine: Engine, tmp_path: Path, log: Path, trouble: str, says: str) -> None:
    outcomes = engine.map(doubles.EchoTask(str(log), {0: trouble}), shards(tmp_path, 4), Control())
    assert sorted(o.shard for o in itertools.islice(outcomes, 3)) == [1, 2, 3]
    with pytest.raises(EngineError) as caught:
        next(outcomes)
    assert runs_of(log).count(0) == EngineConfig().attempts
    assert caught.value.problem == f"shard 0 failed 3 times: {says}"
    assert "run the same command again" in caught.value.fix


def test_hopeless_failures_end_the_run_with_their_own_error(engine: Engine, tmp_path: Path, log: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(engine.map(doubles.EchoTask(str(log), {2: "fatal"}), shards(tmp_path, 4), Control()))
    error = caught.value
    assert (error.problem, error.fix, error.code, error.uri) == ("the file is cut", "copy it", "truncated", "/a.jpg")
    assert runs_of(log).count(2) == 1


def test_error_of_open_keeps_its_type(engine: Engine, tmp_path: Path, log: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such model .use another."):
        list(engine.map(doubles.EchoTask(str(log), {-1: "config"}), shards(tmp_path, 2), Control()))
    assert log.read_text().count("open") == 1


def test_stop_drains(engine: Engine, tmp_path: Path, log: Path) -> None:
    control, done = Control(), []

    def first_of(outcomes: Iterator[Outcome]) -> None:
        for outcome in outcomes:
            done.append(outcome.shard)
            control.stop.set()

    with pytest.raises(StoppedError, match="run the same command again to go on"):
        first_of(engine.map(doubles.EchoTask(str(log), {}, seconds=0.05), shards(tmp_path, 50), control))
    assert sorted(done) == sorted(runs_of(log))
    assert 1 <= len(done) < 10


def test_stop_before_the_start(engine: Engine, tmp_path: Path, log: Path) -> None:
    control = Control()
    control.stop.set()
    with pytest.raises(StoppedError):
        list(engine.map(doubles.EchoTask(str(log), {}), shards(tmp_path, 3), control))
    assert not log.exists() or runs_of(log) == []


def test_closing_the_generator_ends_the_work(engine: Engine, tmp_path: Path, log: Path) -> None:
    with closing(engine.map(doubles.EchoTask(str(log), {}, seconds=0.05), shards(tmp_path, 50), Control())) as outcomes:
        next(outcomes)
    seen = len(runs_of(log))
    time.sleep(0.3)
    assert len(runs_of(log)) == seen < 50


def test_stop_from_another_thread(engine: Engine, tmp_path: Path, log: Path) -> None:
    control = Control()

    def stop() -> None:
        until = time.monotonic() + 120
        while (not log.exists() or len(runs_of(log)) < 2) and time.monotonic() < until:
            time.sleep(0.01)
        control.stop.set()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(StoppedError):
        list(engine.map(doubles.EchoTask(str(log), {}, seconds=0.05), shards(tmp_path, 200), control))
    thread.join()
