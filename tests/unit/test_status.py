"""Who is at work: heartbeats, which of them are of drivers that live, and what status makes of them."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import photos
import pytest
from doubles import FreeModel, SlowModel

import segbatch
from segbatch import api, cli, drivers, storage
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.drivers import Heartbeat, beating, look
from segbatch.errors import StorageError

SMALL = RunOptions(engine=EngineConfig(kind="inline", threads=1), plan=PlanConfig(shard_rows=1))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "BEAT_S", 0.05)
    monkeypatch.setattr(drivers, "_LOOK_EVERY_S", 0.02)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Heartbeat]:
    """A driver on another machine, whose clock is wrong by years."""
    heartbeat = Heartbeat(str(tmp_path), "predict")
    heartbeat._said = replace(heartbeat._said, machine="another boot", host="far", started="1999-01-01T00:00:00+00:00")
    yield heartbeat
    heartbeat.close()


def files(root: Path) -> list[Path]:
    return sorted((root / ".segbatch" / "drivers").glob("*.json"))


def test_a_heartbeat_beats_and_goes(tmp_path: Path) -> None:
    with beating(str(tmp_path), "predict") as heartbeat:
        (file,) = files(tmp_path)
        first = json.loads(file.read_text())
        assert (first["verb"], first["pid"], first["phase"], first["beat"]) == ("predict", os.getpid(), "planning", 1)
        heartbeat.begin(100)
        heartbeat.advance(40, 3)
        until = time.monotonic() + 5
        while json.loads(file.read_text())["beat"] < 3 and time.monotonic() < until:
            time.sleep(0.01)
        later = json.loads(file.read_text())
        assert later["beat"] >= 3 and (later["rows"], later["bad"], later["total"]) == (40, 3, 100)
        assert later["phase"] == "working" and later["per_s"] > 0
        assert look([str(tmp_path)], 0.0)[str(tmp_path)][0].alive  # on its own machine at once
    assert files(tmp_path) == []


def test_the_rate_is_that_of_the_last_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(drivers.time, "monotonic", lambda: now)
    monkeypatch.setattr(drivers, "_LOOK_EVERY_S", 1.0)
    heartbeat = Heartbeat(str(tmp_path), "predict")
    heartbeat.begin(10_000)
    for second in range(1, 1001):  # 2 a second for 500 s, then 8 a second
        now = 1000.0 + second
        heartbeat.advance(2 * min(second, 500) + 8 * max(second - 500, 0), 0)
    assert heartbeat._speed() == (1000.0, 8.0)


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    heartbeat = Heartbeat(str(tmp_path), "predict")
    heartbeat._said = replace(heartbeat._said, process="1")  # the number is another process's by now
    heartbeat._put()
    began = time.monotonic()
    (found,) = look([str(tmp_path)], 60.0)[str(tmp_path)]
    assert not found.alive and time.monotonic() - began < 5


def test_a_driver_elsewhere_lives_while_its_file_changes(tmp_path: Path, elsewhere: Heartbeat) -> None:
    elsewhere.start()
    (found,) = look([str(tmp_path)], 20.0)[str(tmp_path)]
    assert (found.alive, found.host) == (True, "far") and found.beat > 1


def test_a_driver_elsewhere_that_died_is_told_by_patience_alone(tmp_path: Path, elsewhere: Heartbeat) -> None:
    elsewhere._put()
    (file,) = files(tmp_path)
    os.utime(file, (time.time() + 10**6,) * 2)  # its store's clock is ahead
    began = time.monotonic()
    (found,) = look([str(tmp_path)], 0.3)[str(tmp_path)]
    assert not found.alive and time.monotonic() - began >= 0.3


def test_a_driver_that_ends_meanwhile_is_no_longer_there(tmp_path: Path, elsewhere: Heartbeat) -> None:
    elsewhere._put()
    threading.Timer(0.2, elsewhere.close).start()
    assert look([str(tmp_path)], 20.0)[str(tmp_path)] == []


def test_a_store_that_refuses_the_heartbeat_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Semaphore(0)

    def refuse(uri: str, data: bytes) -> None:
        refused.release()
        raise StorageError("no space left")

    with beating(str(tmp_path), "predict"):
        monkeypatch.setattr(storage, "replace", refuse)
        assert all(refused.acquire(timeout=20) for _ in range(3))  # it goes on trying
        monkeypatch.undo()
    assert files(tmp_path) == []


@pytest.mark.long
def test_status_of_a_run_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photos.folder(tmp_path / "in", 8), tmp_path / "out"
    arguments = (SlowModel(seconds=0.3), str(source), str(out))
    work = threading.Thread(target=segbatch.predict, args=arguments, kwargs={"options": SMALL})
    work.start()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = api.status(str(out)) if files(out) else None
        if found is not None and found.is_live and 0 < found.drivers[0].rows < 8 and found.per_s:
            break
        time.sleep(0.05)
    cli.main(["status", str(out)])
    text = capsys.readouterr().out
    cli.main(["status", str(out), "--json"])
    document = json.loads(capsys.readouterr().out)
    work.join()
    assert found is not None and found.is_live and not found.complete
    assert found.rows == 8 and 0 < found.per_s < 20 and found.eta_s is not None and found.eta_s > 0
    assert "segbatch predict on" in text and "of 8 images" in text and "images/s, ETA" in text
    assert document["drivers"][0]["alive"] and document["shards"] == 8 and document["eta_s"] > 0
    done = api.status(str(out))
    assert done.complete and done.drivers == () and done.eta_s is None


def test_status_of_a_run_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photos.folder(tmp_path / "in", 3), tmp_path / "out"
    segbatch.predict(FreeModel(), str(source), str(out), options=SMALL)
    next((out / "masks").iterdir()).unlink()
    dead = Heartbeat(str(out), "predict")
    dead._said = replace(dead._said, process="1", pid=2**22 + 1)
    dead._put()
    cli.main(["status", str(out), "--watch"])
    text = capsys.readouterr().out
    assert f"{out}: 2 of 3 rows, 2 of 3 shards, 0 bad" in text
    assert f"process {2**22 + 1}: died; began" in text and "nobody is at work" in text


def test_what_others_did_is_no_part_of_a_drivers_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    beat = Heartbeat(str(tmp_path), "predict")
    beat.begin(1000)
    for _ in range(10):
        now[0] += 10
        beat.others_did(90)
        beat.advance(beat._done[0] + 100, 0)
    assert beat._done == (1000, 0)
    assert beat._speed() == (100.0, 1.0)
