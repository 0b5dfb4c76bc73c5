"""The journal outlives its process, and says what was in flight."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from segbatch.engine import journal
from segbatch.errors import StorageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_notes(folder: Path) -> None:
    path = journal.new_path()
    notes = journal.FileJournal(path, 4)
    notes.note("codec_0", 7, ["a", "b"])
    notes.note("codec_1", 8, ["c"])
    notes.note("model", 9, ["d", "ü/é.jpg"])
    notes.clear("codec_0")
    notes.note("codec_1", 8, [])
    assert journal.read(path) == [(9, "d"), (9, "ü/é.jpg")]
    assert list(folder.iterdir()) == []
    assert journal.read(path) == []


def test_survives_kill(folder: Path) -> None:
    path = journal.new_path()
    code = (
        "import os, sys; from segbatch.engine import journal\n"
        "notes = journal.FileJournal(sys.argv[1], 2)\n"
        "notes.note('model', 3, ['x.jpg']); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert journal.read(path) == [(3, "x.jpg")]


def test_long_notes_keep_the_first_ids(folder: Path) -> None:
    path = journal.new_path()
    ids = [f"{'folder/' * 20}{i:06d}.jpg" for i in range(500)]
    journal.FileJournal(path, 2).note("model", 1, ids)
    found = [i for _, i in journal.read(path)]
    assert 10 < len(found) < 500
    assert found == ids[: len(found)]


def test_torn_note_is_left_out(folder: Path) -> None:
    path = journal.new_path()
    notes = journal.FileJournal(path, 3)
    notes.note("a", 1, ["x"])
    notes.note("b", 2, ["y"])
    data = bytearray(Path(path).read_bytes())
    data[3:5] = b"\xff\0"
    Path(path).write_bytes(data)
    assert journal.read(path) == [(2, "y")]


def test_threads_have_slots_of_their_own(folder: Path) -> None:
    path = journal.new_path()
    notes = journal.FileJournal(path, 16)

    def work(i: int) -> None:
        for _ in range(200):
            notes.note(f"codec_{i}", i, [f"{i}.jpg"] * (i + 1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match="one too many"):
        notes.note("another", 0, [])
    found = journal.read(path)
    assert sorted(found) == [(i, f"{i}.jpg") for i in range(16)]


def test_full_disk_is_told_at_once(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = journal.new_path()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=r"File too large .free space there"):
            journal.FileJournal(path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []


def test_stale_journals_go(folder: Path) -> None:
    old, other = folder / "segbatch-journal-old", folder / "somebody-elses"
    for path in (old, other):
        path.write_text("")
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    recent = journal.new_path()
    journal.FileJournal(recent, 1)
    assert sorted(folder.iterdir()) == sorted([other, Path(recent)])
    journal.remove(recent)
    journal.remove(recent)


def test_a_batch_with_long_ids_is_noted_whole(tmp_path: Path) -> None:
    ids = [f"{i:03d}-{'x' * 900}" for i in range(64)]
    notes = journal.FileJournal(str(tmp_path / "journal"), 1)
    notes.note("model", 7, ids)
    assert journal.read(str(tmp_path / "journal")) == [(7, i) for i in ids]
