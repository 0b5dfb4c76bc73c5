"""One fault each: memory that runs out, a model or a decoder that hangs, a full scratch disk, clocks that are wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos_doubles
import doubles
import photos
import pytest

from segbatch import api
from segbatch.errors import ConfigError

PROJECT = Path(__file__).resolve().parent.parent.parent

TESTS = PROJECT / "tests"
POISON = "photo-0013.jpg"
HANG_S = 5.0
HOUR = 3600


def poisoned(root: Path, count: int = 24) -> Path:
    """Photos of which one is marked."""
    source = photos.folder(root, count)
    (source / POISON).write_bytes(photos.jpeg(13, photos.MARKER))
    return source


def python(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a process of its own."""
    paths = os.pathsep.join([str(PROJECT), str(TESTS)])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_all_but_the_poison(source: Path, out: Path, status: str, said: str) -> None:
    found = photos.rows(out)
    assert found.keys() == photos.sample_ids(source)
    assert {k: r["status"] for k, r in found.items() if r["status"] != "ok"} == {POISON: status}
    assert said in found[POISON]["error"]
    photos.assert_clean(out)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_model_that_asks_for_too_much_memory(tmp_path: Path) -> None:
    """A limit of the process' memory: the one photo is a bad row, the others are done."""
    source, out = poisoned(tmp_path / "in"), tmp_path / "out"
    code = (
        "import chaos_doubles, doubles, pathlib, sys\n"
        "source, out = map(pathlib.Path, sys.argv[1:])\n"
        "doubles.predict(chaos_doubles.GreedyModel(), source, out, 'inline', batch_size=4)\n"
    )
    done = python(code, source, out)
    assert done.returncode == 0, done.stderr
    assert_all_but_the_poison(source, out, "model-error", "MemoryError: Unable to allocate 64.0 GiB")


@pytest.mark.ray
def test_process_that_is_killed_for_memory_once(tmp_path: Path, ray_session: Path) -> None:
    """What the kernel does where memory is short for a while: nobody is blamed, and everything is done."""
    source, out, log = poisoned(tmp_path / "in"), tmp_path / "out", tmp_path / "log"
    model = chaos_doubles.OomKilledModel(str(log), once=str(tmp_path / "once"))
    result = doubles.predict(model, source, out)
    assert (tmp_path / "once").exists()
    assert (result.state.rows_done, result.state.bad) == (24, 0)
    assert photos.rows(out).keys() == photos.sample_ids(source)
    assert doubles.images_seen(log) <= 24 + 2 * 8 + 8  # the shards in flight again, and the probed images


@pytest.mark.parametrize("says", ["CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory"])
def test_gpu_whose_memory_is_too_small_for_the_batch(tmp_path: Path, says: str) -> None:
    """The batch is halved until it fits; no row is bad and no process ends."""
    source, out, log = photos.folder(tmp_path / "in", 24), tmp_path / "out", tmp_path / "log"
    code = (
        "import chaos_doubles, doubles, pathlib, sys\n"
        "source, out, log = map(pathlib.Path, sys.argv[1:4])\n"
        "model = chaos_doubles.SmallGpuModel(str(log), says=sys.argv[4])\n"
        "doubles.predict(model, source, out, 'inline', batch_size=8)\n"
    )
    done = python(code, source, out, log, says)
    assert done.returncode == 0, done.stderr
    assert {r["status"] for r in photos.rows(out).values()} == {"ok"}
    assert photos.rows(out).keys() == photos.sample_ids(source)
    sizes = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("forward")]
    assert max(sizes) == 8 and sum(size for size in sizes if size <= 2) == 24


# -- what hangs ------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("double", [chaos_doubles.HangingModel, chaos_doubles.HangingDecoder])
def test_one_photo_that_hangs(tmp_path: Path, ray_session: Path, double: type[doubles.FreeModel]) -> None:
    source, out = poisoned(tmp_path / "in"), tmp_path / "out"
    result = doubles.predict(double(), source, out, hang_s=HANG_S)
    assert result.state.reasons == {"quarantined": 1}
    assert_all_but_the_poison(source, out, "quarantined", f"processing this image took longer than {HANG_S:g} s")
    assert doubles.predict(double(), source, out).rows == 0  # it does not hang the next run


# -- a full scratch disk ---------------------------------------------------------------------------------------------


def test_full_disk_where_plans_are_compared(tmp_path: Path) -> None:
    """New photos are sought with a temporary file; its folder is full, the output's is not."""
    source, out, scratch = photos.folder(tmp_path / "in", 8), tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    before = photos.part_times(out)
    photos.folder(source, 120, first=8)
    code = (
        "import doubles, pathlib, sys; doubles.limit_files(1500)\n"
        "doubles.predict(doubles.FreeModel(), *map(pathlib.Path, sys.argv[1:]), 'inline')\n"
    )
    done = python(code, source, out, TMPDIR=str(scratch))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("segbatch.errors.StorageError: ")
    assert str(scratch) in last and "TMPDIR" in last
    assert list(scratch.iterdir()) == []
    assert photos.part_times(out) == before
    photos.assert_clean(out)
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").rows == 120
    assert photos.rows(out).keys() == photos.sample_ids(source)


# -- clocks that are wrong -------------------------------------------------------------------------------------------


def driver(skew_s: int, double: str, arguments: dict[str, object], source: Path, out: Path) -> "subprocess.Popen[str]":
    """A driver by whose clock it is so many seconds later."""
    options = {"plan": {"shard_rows": 8}, "engine": {"kind": "inline"}}
    texts = [json.dumps(arguments), str(source), str(out), json.dumps(options)]
    return subprocess.Popen(
        [sys.executable, str(TESTS / "chaos_clock.py"), str(skew_s), str(TESTS / "driver.py"), double, *texts],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(TESTS)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_parts(out: Path, count: int, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while not (out / "masks").exists() or len(photos.part_times(out)) < count:
        assert process.poll() is None and time.monotonic() < until, process.stderr and process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize("first", [HOUR, -HOUR])
def test_drivers_whose_clocks_differ(tmp_path: Path, first: int) -> None:
    """One driver an hour ahead, the next an hour behind: status and gc see who lives, and nothing is done twice."""
    source, out, log = photos.folder(tmp_path / "in", 48), tmp_path / "out", tmp_path / "log"
    process = driver(first, "SlowModel", {"log": str(tmp_path / "early"), "seconds": 0.3}, source, out)
    wait_for_parts(out, 2, process)
    assert api.status(str(out)).is_live
    with pytest.raises(ConfigError, match="is in use by segbatch predict"):
        api.gc([str(out)])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not api.status(str(out)).is_live
    before = photos.part_times(out)
    assert 2 <= len(before) < 6

    second = driver(-first, "FreeModel", {"log": str(log)}, source, out)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 0, said
    after = photos.part_times(out)
    assert {name: after[name] for name in before} == before
    assert doubles.images_seen(log) == 48 - 8 * len(before)
    assert photos.rows(out).keys() == photos.sample_ids(source)
    state = api.status(str(out))
    assert (state.rows_done, state.plans, state.complete) == (48, 1, True)
    assert {g.kind for g in api.gc([str(out)], dry_run=True).garbage} <= {"driver"}  # of the one that was killed
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").rows == 0


def test_changed_photos_under_wrong_clocks(tmp_path: Path) -> None:
    """A file changes when its tag does, whether it seems older or newer than the plan."""
    source, out, log = photos.folder(tmp_path / "in", 16), tmp_path / "out", tmp_path / "log"
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    for number, away in ((1, -2 * HOUR), (9, 2 * HOUR)):
        path = source / f"photo-{number:04d}.jpg"
        path.write_bytes(photos.jpeg(number + 100))
        os.utime(path, (time.time() + away,) * 2)
    process = driver(HOUR, "FreeModel", {"log": str(log)}, source, out)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert doubles.images_seen(log) == 2
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").rows == 0


@pytest.mark.parametrize("ahead", [HOUR + 60, -HOUR - 60])
def test_what_another_machine_writes_now_is_not_swept(tmp_path: Path, ahead: int) -> None:
    """A temporary file of a writer elsewhere is as old as the store says, not as our clock says."""
    source, out = photos.folder(tmp_path / "in", 8), tmp_path / "out"
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    being_written = out / "masks" / f".elsewhere.77.{'0' * 32}.tmp"
    being_written.write_bytes(b"half of a part")
    photos.folder(source, 8, first=8)
    process = driver(ahead, "FreeModel", {}, source, out)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert being_written.exists()
