"""Local storage: put-if-absent, replacement, listing, what is left behind."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from segbatch import storage
from segbatch.errors import ObjectExists, ObjectMissing, StorageError, TransientStorageError


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("a/../b/") == f"{tmp_path}/b"
    assert storage.resolve("file:///x/y/") == "/x/y"
    assert storage.resolve("s3://bucket/a/") == "s3://bucket/a"
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert storage.relative("s3://bucket/a/b.jpg", "s3://bucket/a") == "b.jpg"


@pytest.mark.parametrize("turn", range(5))
def test_one_of_many_writers_wins(tmp_path: Path, turn: int) -> None:
    target, won, lost = str(tmp_path / "new" / "object"), [], []

    def write(i: int) -> None:
        try:
            storage.create(target, bytes([i]) * 100_000)
            won.append(i)
        except ObjectExists:
            lost.append(i)

    in_threads(8, write)
    assert (len(won), len(lost)) == (1, 7)
    assert storage.read_bytes(target) == bytes([won[0]]) * 100_000
    assert os.listdir(tmp_path / "new") == ["object"]


def test_readers_see_whole_objects_only(tmp_path: Path) -> None:
    target, stop = str(tmp_path / "object"), threading.Event()
    storage.create(target, b"0" * 300_000)
    seen: set[tuple[int, int]] = set()

    def work(i: int) -> None:
        if i == 0:
            for turn in range(60):
                storage.replace(target, bytes([48 + turn % 10]) * 300_000)
            stop.set()
        while not stop.is_set():
            data = storage.read_bytes(target)
            seen.add((len(data), len(set(data))))

    in_threads(3, work)
    assert seen <= {(300_000, 1)}


def test_replace_with_a_tag(tmp_path: Path) -> None:
    target = str(tmp_path / "object")
    storage.create(target, b"first")
    tag = storage.stat(target)
    assert tag is not None
    storage.replace(target, b"second!", tag.etag)
    with pytest.raises(ObjectExists, match="changed by another writer"):
        storage.replace(target, b"third", tag.etag)
    assert storage.read_bytes(target) == b"second!"
    os.unlink(target)
    with pytest.raises(ObjectExists):
        storage.replace(target, b"third", tag.etag)
    assert os.listdir(tmp_path) == []


def test_tags_of_many_replacers(tmp_path: Path) -> None:
    """Of writers that hold the same tag one succeeds."""
    target = str(tmp_path / "object")
    storage.create(target, b"")
    found = storage.stat(target)
    assert found is not None
    etag, won = found.etag, []

    def write(i: int) -> None:
        try:
            storage.replace(target, b"x" * (i + 1), etag)
            won.append(i)
        except ObjectExists:
            pass

    in_threads(8, write)
    assert len(won) == 1
    assert storage.read_bytes(target) == b"x" * (won[0] + 1)


def test_filesystem_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    target, won = str(tmp_path / "object"), []

    def write(i: int) -> None:
        try:
            storage.create(target, b"x" * i)
            won.append(i)
        except ObjectExists:
            pass

    in_threads(8, write)
    assert len(won) == 1
    assert os.listdir(tmp_path) == ["object"]


def test_missing(tmp_path: Path) -> None:
    target = str(tmp_path / "no" / "object")
    assert storage.stat(target) is None
    assert not storage.exists(target)
    with pytest.raises(ObjectMissing, match=r"cannot read .*/no/object: it does not exist"):
        storage.read_bytes(target)
    with pytest.raises(ObjectMissing):
        storage.open_input(target)
    storage.delete(target)
    assert list(storage.list_files(target)) == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "No space left on device (free space or raise the limit"),
        (errno.EFBIG, "File too large (free space or raise the limit"),
        (errno.EROFS, "permission denied (choose a place"),
        (errno.EACCES, "permission denied (choose a place"),
        (errno.EISDIR, "Is a directory (a file is in the way"),
    ],
)
def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    for write in (storage.create, storage.replace):
        with pytest.raises(StorageError) as caught:
            write(str(tmp_path / "object"), b"data")
        assert says in str(caught.value)
        assert not caught.value.retryable
    assert os.listdir(tmp_path) == []


def test_transient_failures_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BACK_OFF_S", 0.001)
    tries: list[int] = []

    def flaky() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EIO, "input/output error")
        return "done"

    assert storage._attempt(flaky, "x", "read") == "done"

    def down() -> None:
        tries.append(1)
        raise TimeoutError("timed out")

    tries.clear()
    with pytest.raises(TransientStorageError, match="run the same command again later"):
        storage._attempt(down, "x", "read")
    assert len(tries) == storage.ATTEMPTS


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in ("file/object", "file/below/object"):
        with pytest.raises(StorageError, match="a file is in the way"):
            storage.create(str(tmp_path / target), b"")


def test_list_files(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/2.jpg", "a/1.jpg", ".hidden/x.jpg", "a/.x.jpg", "a/notes.txt", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    found = [storage.relative(i.uri, str(tmp_path)) for i in storage.list_files(str(tmp_path), (".jpg",))]
    assert found == ["a/1.jpg", "a/2.jpg", "b.JPG", "c.jpg"]
    flat = [storage.name_of(i.uri) for i in storage.list_files(str(tmp_path), recursive=False)]
    assert flat == ["b.JPG", "c.jpg"]


def test_list_folders(tmp_path: Path) -> None:
    for name in ("b/x", "a", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert storage.list_folders(str(tmp_path)) == ["a", "b", "link"]
    assert storage.list_folders(str(tmp_path / "nothing")) == []
    with pytest.raises(StorageError, match="a file is in the way"):
        storage.list_folders(str(tmp_path / "file"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    for look in (storage.list_folders, lambda root: list(storage.list_files(root))):
        with pytest.raises(StorageError, match=r"not UTF-8.*\(rename that file\)"):
            look(str(tmp_path))


def test_read_range(tmp_path: Path) -> None:
    target = str(tmp_path / "object")
    storage.create(target, b"0123456789")
    for start, stop in ((0, 4), (3, 3), (8, 100), (10, 12), (50, 60)):
        assert storage.read_range(target, start, stop) == b"0123456789"[start:stop]
    for start, stop in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="are no range"):
            storage.read_range(target, start, stop)
    with pytest.raises(ObjectMissing):
        storage.read_range(str(tmp_path / "nothing"), 0, 1)


def test_streams_of_plain_files(tmp_path: Path) -> None:
    target = str(tmp_path / "object")
    storage.create(target, b"0123456789")
    with storage.open_stream(target) as file:
        assert list(iter(lambda: file.read(4), b"")) == [b"0123", b"4567", b"89"]
    with pytest.raises(ObjectMissing):
        storage.open_stream(str(tmp_path / "nothing"))


def test_sweep_spares_the_living(tmp_path: Path) -> None:
    """Temporary files of ended processes go at once; of living ones, or of other machines, after an hour."""
    code = (
        "import os, sys; from segbatch import storage\n"
        "os.link = lambda *_: os._exit(1)\n"
        "storage.create(sys.argv[1], b'data')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "object"], check=False)
    assert killed.returncode == 1
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].endswith(".tmp")
    mine = Path(storage._write_temporary(str(tmp_path / "mine"), b""))
    other = tmp_path / ".other-machine.1.abc.tmp"
    other.write_text("")
    assert storage.sweep_temporary(str(tmp_path)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {mine.name, other.name}
    os.utime(other, (0, 0))
    assert storage.sweep_temporary(str(tmp_path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == [mine.name]


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_writable(str(tmp_path))
    assert list((tmp_path / ".segbatch").iterdir()) == []
    monkeypatch.setattr(storage, "_create_local", lambda uri, data: Path(uri).write_bytes(data))
    with pytest.raises(StorageError, match="ignores put-if-absent"):
        storage.check_writable(str(tmp_path))
    assert list((tmp_path / ".segbatch").iterdir()) == []
