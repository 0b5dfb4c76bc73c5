"""Restarts, several drivers, and inputs that change: every image once, and nothing done twice."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import photos
import psutil
import pytest
from numpy.typing import NDArray

from segbatch import api
from segbatch.planning import published

TESTS = Path(doubles.__file__).parent
SHARD = 8


def wait_for(condition: Callable[[], object], seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def driver(double: doubles.FreeModel, source: Path, out: Path, kind: str = "ray") -> subprocess.Popen[str]:
    """``driver.py`` in a process, and a local Ray, of its own."""
    arguments = {name: getattr(double, name) for name in double.__dataclass_fields__}
    options = {"plan": {"shard_rows": SHARD}, "engine": {"kind": kind}}
    return subprocess.Popen(
        [
            sys.executable,
            TESTS / "driver.py",
            type(double).__name__,
            json.dumps(arguments),
            source,
            out,
            json.dumps(options),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "TMPDIR": str(out.parent),
            "RAY_TMPDIR": "/tmp",  # paths of sockets must be short
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more; one whose parent does not ask for its end counts as gone."""
    running = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            running += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return running == []


def assert_every_image_once(source: Path, out: Path) -> None:
    assert photos.rows(out).keys() == photos.sample_ids(source)
    photos.assert_clean(out)


def parts_of(out: Path) -> int:
    return len(photos.part_times(out))


@pytest.mark.ray
@pytest.mark.parametrize("group", [False, True])
def test_killed_driver(tmp_path: Path, ray_session: Path, group: bool) -> None:
    source, out, log, later = photos.folder(tmp_path / "in", 96), tmp_path / "out", tmp_path / "log", tmp_path / "later"
    process = driver(doubles.SlowModel(str(log), 0.1), source, out)
    wait_for(lambda: parts_of(out) >= 2 or process.poll() is not None)
    started = psutil.Process(process.pid).children(recursive=True)
    assert "raylet" in {p.name() for p in started}
    os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    process.communicate()
    wait_for(lambda: gone(started), 30.0)
    before = photos.part_times(out)
    assert 2 <= len(before) < 12

    result = doubles.predict(doubles.FreeModel(str(later)), source, out)
    assert_every_image_once(source, out)
    assert doubles.images_seen(later) == result.rows == 96 - SHARD * len(before)
    after = photos.part_times(out)
    assert {name: after[name] for name in before} == before
    assert len(published(str(out))) == 1


@pytest.mark.ray
@pytest.mark.parametrize("group", [False, True])
def test_terminated_driver_drains(tmp_path: Path, ray_session: Path, group: bool) -> None:
    """Prefect and ``timeout`` signal the whole process group: Ray's daemons must not die before the driver."""
    source, out, log, later = photos.folder(tmp_path / "in", 64), tmp_path / "out", tmp_path / "log", tmp_path / "later"
    process = driver(doubles.SlowModel(str(log), 0.4), source, out)
    wait_for(lambda: parts_of(out) >= 1 or process.poll() is not None)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM) if group else process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert time.time() - max(photos.part_times(out).values()) / 1e9 < 10.0  # 13 s where nobody is left to be waited for
    assert process.returncode == 1, said
    assert "segbatch: stopped before the end (run the same command again to go on)" in said
    assert "Traceback" not in said and "died" not in said
    before = parts_of(out)
    assert 1 <= before < 8
    assert doubles.images_seen(log) == SHARD * before  # what was in flight is there, not only begun
    photos.assert_clean(out)
    wait_for(lambda: gone(started), 30.0)

    assert doubles.predict(doubles.FreeModel(str(later)), source, out).rows == 64 - SHARD * before
    assert doubles.images_seen(later) == 64 - SHARD * before
    assert_every_image_once(source, out)


@pytest.mark.ray
def test_two_drivers_while_photos_arrive(tmp_path: Path, ray_session: Path) -> None:
    source, out, log = photos.folder(tmp_path / "in", 48), tmp_path / "out", tmp_path / "log"
    drivers = [driver(doubles.SlowModel(str(log), 0.05), source, out, kind) for kind in ("ray", "inline", "inline")]
    arrived = 48
    while any(d.poll() is None for d in drivers) and arrived < 72:
        photos.folder(tmp_path, 1, arrived)
        (tmp_path / f"photo-{arrived:04d}.jpg").rename(source / f"photo-{arrived:04d}.jpg")
        arrived += 1
        time.sleep(0.3)
    for process in drivers:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    seen = photos.rows(out).keys()
    assert photos.sample_ids(photos.folder(tmp_path / "first", 48)) <= seen <= photos.sample_ids(source)
    photos.assert_clean(out)

    doubles.predict(doubles.FreeModel(), source, out)
    assert_every_image_once(source, out)
    again = doubles.predict(doubles.FreeModel(str(tmp_path / "again")), source, out)
    assert (again.rows, doubles.loads(tmp_path / "again")) == (0, [])


@dataclass(frozen=True)
class Intruder(doubles.FreeModel):
    """While it works for the first time, another driver finds one more photo and does everything."""

    source: str = ""
    out: str = ""

    def act(self, batch: NDArray[np.uint8]) -> None:
        source, out = Path(self.source), Path(self.out)
        with doubles.ONE_AT_A_TIME:
            if len(published(self.out)) == 1:
                photos.folder(source, 4, first=50)
                doubles.predict(doubles.FreeModel(), source, out, "inline")
                (source / "photo-0000.jpg").write_bytes(photos.jpeg(77))
                doubles.predict(doubles.FreeModel(), source, out, "inline")


def test_another_driver_plans_and_rewrites_meanwhile(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 24), tmp_path / "out"
    result = doubles.predict(Intruder("", str(source), str(out)), source, out, "inline")
    assert (result.rows, result.state.rows, result.state.plans) == (0, 28, 3)
    assert_every_image_once(source, out)
    changed = photos.rows(out)["photo-0000.jpg"]["etag"]
    assert changed.startswith(str((source / "photo-0000.jpg").stat().st_size))
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").rows == 0


@pytest.mark.parametrize("kind", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_plans_of_others_are_adopted(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_session")
    source, out = photos.folder(tmp_path / "in", 24), tmp_path / "out"
    result = doubles.predict(doubles.Planner("", str(source), str(out)), source, out, kind)
    assert (result.rows, result.state.rows_done, result.state.plans) == (28, 28, 2)
    assert_every_image_once(source, out)


def test_drivers_in_threads(tmp_path: Path) -> None:
    """Four drivers race for the config, the plan and every shard."""
    source, out, log = photos.folder(tmp_path / "in", 40), tmp_path / "out", tmp_path / "log"
    results: list[api.RunResult] = []

    def work() -> None:
        results.append(doubles.predict(doubles.SlowModel(str(log), 0.01), source, out, "inline"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.state.rows_done for r in results] == [40] * 4
    assert sum(r.rows for r in results) == 40
    assert_every_image_once(source, out)
    assert len(published(str(out))) == 1


# -- inputs that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_changed_vanished_and_new(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_session")
    source, out, log = photos.folder(tmp_path / "in", 40), tmp_path / "out", tmp_path / "log"
    doubles.predict(doubles.FreeModel(), source, out, kind)
    before, times = photos.rows(out), photos.part_times(out)

    (source / "photo-0003.jpg").write_bytes(photos.jpeg(103))
    (source / "photo-0012.jpg").unlink()
    photos.folder(source, 2, first=90)
    result = doubles.predict(doubles.FreeModel(str(log)), source, out, kind)
    after = photos.rows(out)
    assert after.keys() == photos.sample_ids(source)
    assert after["photo-0003.jpg"]["etag"] != before["photo-0003.jpg"]["etag"]
    assert (result.state.rows, result.state.rows_done, result.state.shards) == (41, 41, 6)
    assert doubles.images_seen(log) == 3  # the changed and the new ones; good rows are copied
    kept = {name: t for name, t in photos.part_times(out).items() if times.get(name) == t}
    assert len(kept) == 3 and len(times.keys() - photos.part_times(out).keys()) == 0
    assert doubles.predict(doubles.FreeModel(), source, out, kind).rows == 0


def test_all_of_a_shard_vanishes_and_returns(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 24), tmp_path / "out"
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    for i in range(8):
        (source / f"photo-{i:04d}.jpg").unlink()
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").state.rows == 16
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").state.plans == 2  # nothing new to plan
    assert_every_image_once(source, out)
    photos.folder(source, 8)
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").state.rows == 24
    assert_every_image_once(source, out)


def test_changes_before_the_first_plan_is_done(tmp_path: Path) -> None:
    """A shard that no one has written yet is rewritten by a later plan."""
    source, out = photos.folder(tmp_path / "in", 24), tmp_path / "out"
    for i in (9, 20):  # of the second and third shard
        (source / f"photo-{i:04d}.jpg").write_bytes(photos.jpeg(i, photos.MARKER))
    with pytest.raises(doubles.Stop):
        doubles.predict(doubles.StopLater(out=str(out)), source, out, "inline")
    assert parts_of(out) == 1
    for i in (2, 9):
        (source / f"photo-{i:04d}.jpg").write_bytes(photos.jpeg(i + 100))
    (source / "photo-0020.jpg").unlink()
    log = tmp_path / "log"
    result = doubles.predict(doubles.FreeModel(str(log)), source, out, "inline")
    assert (result.state.rows_done, result.state.shards, doubles.images_seen(log)) == (23, 3, 1 + 8 + 7)
    assert_every_image_once(source, out)


def test_list_whose_common_folder_changes(tmp_path: Path) -> None:
    """Ids follow the list as it is now; they stay unique."""
    photos.folder(tmp_path / "a" / "b", 2)
    photos.folder(tmp_path / "a", 2)
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    listed.write_text("a/b/photo-0000.jpg\na/b/photo-0001.jpg\n")
    doubles.predict(doubles.FreeModel(), listed, out, "inline")
    assert photos.rows(out).keys() == {"photo-0000.jpg", "photo-0001.jpg"}
    listed.write_text("a/b/photo-0000.jpg\na/b/photo-0001.jpg\na/photo-0000.jpg\n")
    doubles.predict(doubles.FreeModel(), listed, out, "inline")
    assert photos.rows(out).keys() == {"b/photo-0000.jpg", "b/photo-0001.jpg", "photo-0000.jpg"}


def test_growing_samples_table(tmp_path: Path) -> None:
    """Predict follows a samples table that is ingested further."""
    source, samples, out, log = (
        photos.folder(tmp_path / "in", 20),
        tmp_path / "samples",
        tmp_path / "out",
        tmp_path / "log",
    )

    def ingest() -> None:
        api.ingest("images", str(source), str(samples), options=options(shard_rows=8), limits=api.Limits(1.0))

    ingest()
    doubles.predict(doubles.FreeModel(), samples, out, "inline", shard_rows=4)
    photos.folder(source, 3, first=60)
    (source / "photo-0001.jpg").write_bytes(photos.jpeg(101))
    (source / "photo-0019.jpg").unlink()
    ingest()
    doubles.predict(doubles.FreeModel(str(log)), samples, out, "inline", shard_rows=4)
    assert_every_image_once(source, out)
    assert doubles.images_seen(log) == 4
    assert doubles.predict(doubles.FreeModel(), samples, out, "inline", shard_rows=4).rows == 0


def options(**plan: Any) -> Any:
    from segbatch.config import RunOptions

    return RunOptions.model_validate({"plan": plan, "engine": {"kind": "inline"}})
