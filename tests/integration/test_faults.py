"""What happens when something dies or is full: on a real local Ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import doubles
import engine_doubles
import photos
import pytest

from segbatch import api, tables
from segbatch.config import EngineConfig
from segbatch.engine import Control, make
from segbatch.errors import EngineError, StorageError
from segbatch.planning import published
from segbatch.runs import Run


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def journals(ray_session: Path) -> list[Path]:
    return list(ray_session.glob("segbatch-journal-*"))


@pytest.mark.ray
def test_killed_actor_loses_nothing(tmp_path: Path, ray_session: Path) -> None:
    source, out, log = photos.folder(tmp_path / "in", 48), tmp_path / "out", tmp_path / "log"
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: len(photos.part_times(out)) >= 2)
        killed.append(doubles.loads(log)[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = doubles.predict(doubles.SlowModel(str(log), 0.1), source, out)
    killer.join()
    assert (result.state.rows, result.state.rows_done, result.state.bad) == (48, 48, 0)
    assert photos.rows(out).keys() == photos.sample_ids(source)
    assert len(doubles.loads(log)) <= 3  # at first, for the probe, in the actor's place
    assert doubles.by_process(log)[killed[0]] < 48
    assert doubles.images_seen(log) <= 48 + 2 * 8 + 8  # the two shards in flight again, and the probed images
    photos.assert_clean(out)
    assert journals(ray_session) == []


@pytest.mark.ray
def test_poison_is_quarantined(tmp_path: Path, ray_session: Path) -> None:
    source, out, log = photos.folder(tmp_path / "in", 40), tmp_path / "out", tmp_path / "log"
    (source / "photo-0013.jpg").write_bytes(photos.jpeg(13, photos.MARKER))
    result = doubles.predict(doubles.KillerModel(str(log)), source, out)
    found = photos.rows(out)
    assert found.keys() == photos.sample_ids(source)
    bad = {k: r for k, r in found.items() if r["status"] != "ok"}
    assert {k: r["status"] for k, r in bad.items()} == {"photo-0013.jpg": "quarantined"}
    assert bad["photo-0013.jpg"]["error"] == "processing this image killed its process twice"
    assert result.state.reasons == {"quarantined": 1}
    assert len(doubles.loads(log)) - 1 <= 3
    assert journals(ray_session) == []

    # neither another run nor other photos wake it up
    photos.folder(source, 4, first=100)
    assert doubles.predict(doubles.KillerModel(str(log)), source, out).rows == 4
    assert len(doubles.loads(log)) <= 5

    # another file does
    (source / "photo-0013.jpg").write_bytes(photos.jpeg(1013))
    result = doubles.predict(doubles.KillerModel(str(log)), source, out)
    assert photos.rows(out)["photo-0013.jpg"]["status"] == "ok"
    assert (result.state.rows, result.state.bad) == (44, 0)


@pytest.mark.ray
def test_two_poisons_in_two_shards(tmp_path: Path, ray_session: Path) -> None:
    source, out, log = photos.folder(tmp_path / "in", 32), tmp_path / "out", tmp_path / "log"
    for i in (3, 12):
        (source / f"photo-{i:04d}.jpg").write_bytes(photos.jpeg(i, photos.MARKER))
    doubles.predict(doubles.KillerModel(str(log)), source, out, attempts=2)
    found = photos.rows(out)
    assert found.keys() == photos.sample_ids(source)
    quarantined = [k for k, r in found.items() if r["status"] == "quarantined"]
    assert quarantined == ["photo-0003.jpg", "photo-0012.jpg"]
    assert sum(r["status"] == "ok" for r in found.values()) == 30
    assert len(doubles.loads(log)) - 1 <= 2 * 3


@pytest.mark.ray
def test_model_that_kills_at_load_stops_the_run(tmp_path: Path, ray_session: Path) -> None:
    source, log = photos.folder(tmp_path / "in", 4), tmp_path / "log"
    with pytest.raises(EngineError, match="actors die while they start"):
        doubles.predict(doubles.BrokenModel(str(log)), source, tmp_path / "out")
    assert len(doubles.loads(log)) == 3
    assert journals(ray_session) == []


@pytest.mark.ray
def test_full_cluster_is_told(tmp_path: Path, ray_session: Path) -> None:
    import ray

    class Squatter:
        def sit(self) -> None:
            pass

    source, out = photos.folder(tmp_path / "in", 4), tmp_path / "out"
    squatter = ray.remote(Squatter).options(num_cpus=3).remote()
    ray.get(squatter.sit.remote())
    try:
        with pytest.raises(EngineError, match=r"no actor could start in \d+ s: one needs 2 CPUs, 0 of .* 3 are free"):
            doubles.predict(doubles.FreeModel(), source, out, stall_s=3)
    finally:
        ray.kill(squatter)
    assert doubles.predict(doubles.FreeModel(), source, out).state.rows_done == 4


@pytest.mark.ray
def test_no_progress_is_told(tmp_path: Path, ray_session: Path) -> None:
    source = photos.folder(tmp_path / "in", 2)
    with pytest.raises(EngineError, match=r"no row was finished in \d+ s; in flight: shards 0"):
        doubles.predict(doubles.SlowModel(seconds=600), source, tmp_path / "out", stall_s=8)


@pytest.mark.ray
def test_full_disk_in_an_actor(tmp_path: Path, ray_session: Path) -> None:
    source, out, log = photos.folder(tmp_path / "in", 24), tmp_path / "out", tmp_path / "log"
    with pytest.raises(StorageError) as caught:
        doubles.predict(doubles.FullDisk(limit=2000), source, out)
    assert "File too large" in caught.value.problem and "run the same command again" in caught.value.fix
    assert "\n" not in str(caught.value)
    assert photos.part_times(out) == {}
    photos.assert_clean(out)
    assert doubles.predict(doubles.FreeModel(str(log)), source, out).state.rows_done == 24
    assert doubles.images_seen(log) == 24
    assert journals(ray_session) == []


@pytest.mark.parametrize("limit", [100, 400, 1500])
def test_full_disk_in_the_driver(tmp_path: Path, limit: int) -> None:
    """The disk fills up at the probe, the config, the plan or the first part, by ``limit``."""
    source, out = photos.folder(tmp_path / "in", 8), tmp_path / "out"
    code = (
        "import doubles, pathlib, sys; doubles.limit_files(int(sys.argv[3]))\n"
        "doubles.predict(doubles.FreeModel(), pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 'inline')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, out, str(limit)],
        env={**os.environ, "PYTHONPATH": str(Path(doubles.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "segbatch.errors.StorageError: " in done.stderr and "File too large" in done.stderr
    photos.assert_clean(out)
    assert photos.part_times(out) == {}
    assert len(list((out / ".segbatch" / "plans").glob("*/*"))) in (0, 2)  # all of a plan, or nothing of it
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").state.rows_done == 8


# -- what hangs, and what actors say --------------------------------------------------------------------------------


@pytest.mark.ray
def test_hanging_image_is_quarantined(tmp_path: Path, ray_session: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out, log = photos.folder(tmp_path / "in", 32), tmp_path / "out", tmp_path / "log"
    (source / "photo-0013.jpg").write_bytes(photos.jpeg(13, photos.MARKER))
    result = doubles.predict(engine_doubles.HangingModel(str(log)), source, out, hang_s=4)
    found = photos.rows(out)
    assert found.keys() == photos.sample_ids(source)
    bad = {k: (r["status"], r["error"]) for k, r in found.items() if r["status"] != "ok"}
    assert bad == {"photo-0013.jpg": ("quarantined", "processing this image took longer than 4 s")}
    assert result.state.reasons == {"quarantined": 1}
    assert len(doubles.loads(log)) <= 3  # at first, for the probe, in the actor's place
    assert journals(ray_session) == []
    (said,) = [r.getMessage() for r in caplog.records if " hangs " in r.getMessage()]
    stacks = Path(said.split(", log ")[1].split(" hangs ")[0]).read_text()
    assert "engine_doubles.py" in stacks and " in act\n" in stacks


@pytest.mark.ray
@pytest.mark.parametrize("how", ["waits", "holds", "dies", "raises"])
def test_stuck_shard_is_done_again(
    tmp_path: Path, ray_session: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A shard that blocks outside of any image (a commit, a read), in Python or in C code; or dies; or raises."""
    log, rows = tmp_path / "log", list[int]()
    engine = make(EngineConfig(kind="ray", hang_s=3, attempts=2))
    engine.start()
    control = Control(on_rows=rows.append)
    outcomes = list(engine.map(engine_doubles.Stuck(str(log), 1, how), engine_doubles.shards(tmp_path, 6), control))
    engine.close()
    assert sorted(o.shard for o in outcomes) == list(range(6)) and rows[-1] == 18
    assert engine_doubles.runs_of(log).count(1) == 2
    assert control.quarantine == {} and journals(ray_session) == []
    pid = next(line.split()[2] for line in log.read_text().splitlines() if line.startswith("run 1 "))
    said = [r.getMessage() for r in caplog.records if f", process {pid}, log /" in r.getMessage()]
    path = Path(said[0].split(", log ")[1].split(" ")[0])
    assert "the last word" in path.read_text()
    if how == "dies":
        assert "its log ends:" in said[0] and "    the last word" in said[0]
    elif how == "raises":
        assert "KeyError: 'colour'" in path.read_text()
    else:
        assert " hangs (the stacks of its threads are in its log)" in said[0] and " in get_stuck\n" in path.read_text()


@pytest.mark.ray
def test_shard_that_always_hangs_stops_the_run(tmp_path: Path, ray_session: Path) -> None:
    log = tmp_path / "log"
    engine = make(EngineConfig(kind="ray", hang_s=2, attempts=2))
    engine.start()
    task = engine_doubles.Sleeping(str(log), 0.0, {2: 600.0}, first_only=False)
    with pytest.raises(
        EngineError, match=r"shard 2 failed 2 times: nothing was done for 2 s .* waits longer"
    ) as caught:
        list(engine.map(task, engine_doubles.shards(tmp_path, 4), Control()))
    engine.close()
    done = {int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("done ")}
    assert done == {0, 1, 3}, "what was in flight beside it is no victim"
    assert ", log /" in caught.value.fix


@pytest.mark.ray
def test_straggler_is_begun_again_elsewhere(tmp_path: Path, ray_session: Path) -> None:
    """Shard 5 would take ten minutes where it is; the actor that has nothing to do finishes it."""
    log, rows, count = tmp_path / "log", list[int](), 8
    engine = make(EngineConfig(kind="ray", actors=2, in_flight=1))
    engine.start()
    control, task = Control(on_rows=rows.append), engine_doubles.Sleeping(str(log), 0.2, {5: 600.0})
    outcomes = list(engine.map(task, engine_doubles.shards(tmp_path, count), control))
    engine.close()
    assert sorted(o.shard for o in outcomes) == list(range(count))
    assert not any(o.committed_by_other for o in outcomes)
    begun = engine_doubles.runs_of(log)
    assert begun.count(5) == 2 and len(begun) == count + 1
    pids = {line.split()[2] for line in log.read_text().splitlines() if line.startswith("run 5 ")}
    assert len(pids) == 2
    assert rows[-1] == 3 * count and rows == sorted(rows)


# -- a PUT whose reply is lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["inline"])
@pytest.mark.parametrize(
    "which", [".segbatch/config.json", ".segbatch/plans/0.json", "masks/part-00000001", "outcomes/"]
)
@pytest.mark.parametrize("failure", [TimeoutError, FileExistsError])
def test_lost_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, which: str, failure: type[OSError]
) -> None:
    """The write was done, the answer did not come (and is asked for again), or came as "exists already"."""
    from segbatch import storage

    source, out, log = photos.folder(tmp_path / "in", 24), tmp_path / "out", tmp_path / "log"
    lost = []
    write = {name: getattr(storage, name) for name in ("_create_local", "_replace_local")}

    def losing(name: str) -> Callable[..., None]:
        def call(uri: str, *arguments: object) -> None:
            write[name](uri, *arguments)
            if which in uri and not lost:
                lost.append(uri)
                raise failure("the reply was lost")

        return call

    for name in write:
        if name == "_create_local" or failure is TimeoutError:  # a plain PUT never says that the key is taken
            monkeypatch.setattr(storage, name, losing(name))
    result = doubles.predict(doubles.FreeModel(str(log)), source, out, engine)
    assert lost or (which == "outcomes/" and failure is FileExistsError)
    assert result.state.rows_done == result.rows == 24
    assert photos.rows(out).keys() == photos.sample_ids(source)
    assert doubles.images_seen(log) == 24
    assert len(published(str(out))) == 1
    assert sorted(p.suffix for p in (out / ".segbatch" / "plans").iterdir()) == ["", ".json"]


@pytest.mark.parametrize("which", [".segbatch/plans/0.json", "masks/part-00000001"])
def test_store_that_fails_after_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Every attempt fails though the first has written: the run goes on or stops, and the next one completes it."""
    from segbatch import storage
    from segbatch.errors import TransientStorageError

    source, out, log = photos.folder(tmp_path / "in", 24), tmp_path / "out", tmp_path / "log"
    create, failed = storage.create, []

    def failing(uri: str, data: bytes) -> None:
        create(uri, data)
        if which in uri and not failed:
            failed.append(uri)
            raise TransientStorageError(f"cannot write {uri}: timeout")

    monkeypatch.setattr(storage, "create", failing)
    try:
        doubles.predict(doubles.FreeModel(str(log)), source, out, "inline")
    except TransientStorageError:
        doubles.predict(doubles.FreeModel(str(log)), source, out, "inline")
    assert failed
    assert photos.rows(out).keys() == photos.sample_ids(source)
    assert doubles.images_seen(log) == 24
    assert len(published(str(out))) == 1
    assert Run(str(out), "masks").state().complete


def test_foreign_file_in_place_of_a_part(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 16), tmp_path / "out"
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    first, second = tables.parts(str(out / "masks"))
    Path(first.uri).write_bytes(Path(second.uri).read_bytes())
    (source / "photo-0000.jpg").write_bytes(photos.jpeg(99))
    with pytest.raises(EngineError, match="is not the result of shard 0"):
        doubles.predict(doubles.FreeModel(), source, out, "inline")


def test_status_of_a_run_that_was_cut_short(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 16), tmp_path / "out"
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    os.unlink(tables.parts(str(out / "masks"))[0].uri)
    state = api.status(str(out))
    assert (state.shards_done, state.shards, state.rows_done, state.complete) == (1, 2, 8, False)
