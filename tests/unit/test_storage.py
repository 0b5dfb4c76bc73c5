"""Local storage: put-if-absent, replacement, listing, what is left behind; and what all stores have in common."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segbatch import storage
from segbatch.errors import ConfigError, ObjectExists, ObjectMissing, StorageError, TransientStorageError
from segbatch.storage import ObjectInfo, local, patience, remote, s3


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
        (errno.ENOSPC, "No space left on device in {folder} (free space or raise the limit"),
        (errno.EFBIG, "File too large in {folder} (free space or raise the limit"),
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
        assert says.format(folder=tmp_path) in str(caught.value)
        assert not caught.value.retryable
    assert os.listdir(tmp_path) == []


def test_transient_failures_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_BACK_OFF_S", 0.001)
    tries: list[int] = []

    def flaky() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EIO, "input/output error")
        return "done"

    assert patience.attempt(flaky, "x", "read") == "done"

    def down() -> None:
        tries.append(1)
        raise TimeoutError("timed out")

    tries.clear()
    with pytest.raises(TransientStorageError, match="run the same command again later"):
        patience.attempt(down, "x", "read")
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
    mine = Path(local.write_temporary(str(tmp_path / "mine"), b""))
    other = tmp_path / f".other-machine.1.{'0' * 32}.tmp"
    other.write_text("")
    assert storage.sweep_temporary(str(tmp_path)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {mine.name, other.name}
    os.utime(other, (0, 0))
    assert storage.sweep_temporary(str(tmp_path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == [mine.name]


def test_sweep_spares_what_others_call_temporary(tmp_path: Path) -> None:
    draft = tmp_path / ".draft.tmp"
    draft.write_text("mine")
    os.utime(draft, (0, 0))
    boot, namespace = storage.machine().rsplit("-", 1)
    container = tmp_path / f".{boot}-{int(namespace) + 1}.{2**22 + 1}.{'0' * 32}.tmp"  # its process is not seen here
    container.write_text("half a file")
    assert storage.sweep_temporary(str(tmp_path)) == 0
    assert draft.exists() and container.exists()


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_writable(str(tmp_path))
    assert list((tmp_path / ".segbatch").iterdir()) == []
    monkeypatch.setattr(local, "create", lambda uri, data: Path(uri).write_bytes(data))
    with pytest.raises(StorageError, match="ignores put-if-absent"):
        storage.check_writable(str(tmp_path))
    assert list((tmp_path / ".segbatch").iterdir()) == []


# -- disks that are full ---------------------------------------------------------------------------------------------


def test_a_full_disk_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB's own words when what it spills does not fit."""
    import duckdb

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    with storage.scratch_folder() as folder:
        assert folder.startswith(str(tmp_path)) and os.path.isdir(folder)
    says = rf"no space left for temporary files in {tmp_path} \(free space there, or set TMPDIR"
    with pytest.raises(StorageError, match=says), storage.scratch_folder():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=says), storage.on_scratch_disk():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def spill(folder: str) -> None:
        with duckdb.connect() as db:
            db.execute(f"SET memory_limit='30MB'; SET threads=1; SET temp_directory='{folder}/spill'")
            db.execute("SET max_temp_directory_size='1MB'")
            db.execute("CREATE TABLE t AS SELECT md5(i::VARCHAR) a, md5((i + 1)::VARCHAR) b FROM range(900000) t(i)")
            db.execute("SELECT * FROM t ORDER BY a").fetchall()

    with pytest.raises(StorageError, match=says), storage.scratch_folder() as folder:
        spill(folder)
    with pytest.raises(ZeroDivisionError), storage.scratch_folder():
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


# -- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    remote._remote.cache_clear()
    for call in (storage.read_bytes, storage.check_writable, storage.stat):
        with pytest.raises(ConfigError) as caught:
            call(f"{scheme}://bucket/x")
        says = f"cannot use {scheme}:// addresses: the package {package} is missing (pip install 'segbatch[{scheme}]')"
        assert str(caught.value) == says


def test_schemes() -> None:
    assert list(storage.drivers()) == [f"{scheme}://" for scheme in storage.SCHEMES]
    with pytest.raises(ConfigError, match=r"cannot use s4:// addresses.*known are s3://, gs://, az://, https://"):
        storage.exists("s4://bucket/x")
    for write in (storage.create, storage.replace):
        with pytest.raises(StorageError, match="web addresses are only read"):
            write("https://example.invalid/x", b"")
    assert storage.is_private("memory://a/x.zip!/b") and not storage.is_private("s3://a/b")


def test_memory() -> None:
    root = "memory://test-memory/out"
    assert storage.check_writable(root, keep=False) == storage.Guarantee(True, True)
    won: list[int] = []

    def write(i: int) -> None:
        try:
            storage.create(f"{root}/a/object", bytes([i]))
            won.append(i)
        except ObjectExists:
            pass

    in_threads(8, write)
    assert len(won) == 1 and storage.read_bytes(f"{root}/a/object") == bytes(won)
    storage.replace(f"{root}/.hidden/x", b"")
    (found,) = storage.list_files(root)
    assert found == storage.stat(f"{root}/a/object") and found.uri == f"{root}/a/object" and found.size == 1
    assert storage.list_folders(root) == ["a"] and storage.is_folder(f"{root}/a")
    storage.replace(found.uri, b"x" * 9, found.etag)
    with pytest.raises(ObjectExists, match="changed by another writer"):
        storage.replace(found.uri, b"y", found.etag)
    readers = [storage.open_input(found.uri) for _ in range(2)]
    assert [r.read(3) for r in readers] == [b"xxx", b"xxx"]
    assert storage.read_range(found.uri, 7, 20) == b"xx"
    storage.delete(found.uri)
    storage.delete(found.uri)
    assert storage.stat(found.uri) is None and list(storage.list_files(root)) == []


def test_read_ahead_is_bounded_and_in_order(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02d}").write_bytes(bytes([i]))
    taken: list[str] = []

    def uris() -> Iterator[str]:
        for info in storage.list_files(str(tmp_path)):
            taken.append(info.uri)
            yield info.uri

    reading = storage.read_ahead(uris(), at_a_time=4)
    assert next(reading) == b"\0" and len(taken) == 5
    assert b"".join(reading) == bytes(range(1, 50))
    with pytest.raises(ObjectMissing):
        storage.read_many([str(tmp_path / "00"), str(tmp_path / "nothing")])


@given(
    st.sets(st.lists(st.text("ab-./", min_size=1, max_size=6), min_size=1, max_size=3).map("/".join), max_size=30),
    st.integers(1, 5),
)
def test_order_of_listings(keys: set[str], most: int) -> None:
    """S3's order of keys becomes that of a walk through folders, whatever is held back or asked for."""
    found = [ObjectInfo(f"s3://b/{key}", "", 0) for key in sorted(keys)]
    ordered = s3.by_path(found, len("s3://b/"), lambda p: any(i.uri.startswith(p) for i in found), most)
    assert [i.uri for i in ordered] == [f"s3://b/{key}" for key in sorted(keys, key=lambda k: k.split("/"))]


def test_listings_hold_little_back() -> None:
    """Names with hyphens are not held until the end where no folder can come before them."""
    asked: list[str] = []
    given_out = 0

    def listing() -> Iterator[ObjectInfo]:
        for i in range(1000):
            yield ObjectInfo(f"s3://b/img-{i:04d}.jpg", "", 0)
            assert i + 1 - given_out <= 20

    def has(prefix: str) -> bool:
        asked.append(prefix)
        return False

    for _ in s3.by_path(listing(), len("s3://b/"), has, most=10):
        given_out += 1
    assert given_out == 1000 and set(asked) <= {"s3://b/img/", "s3://b/img-0009/"}


class Bytes:
    """Stands for an object in S3."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.asked = data, len(data), 0

    def read(self, start: int, stop: int) -> bytes:
        self.asked += stop - start
        return self.data[start:stop]

    def begin(self, start: int, stop: int) -> "Future[list[bytes]]":
        future: Future[list[bytes]] = Future()
        future.set_result([self.read(start, stop)])
        return future


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 90), st.booleans()), max_size=20), st.integers(1, 70))
def test_read_ahead_gives_what_is_there(reads: list[tuple[int, int, bool]], ahead: int) -> None:
    """Whatever is read before, and however much is on its way."""
    source, end = Bytes(bytes(range(256))), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "_PIECE", ahead)
        file = s3._ReadAhead(source)
        for start, size, follows in reads:
            start = end if follows else start
            assert file.read(start, start + size) == source.data[start : start + size]
            end = min(start + size, 256)


def test_read_ahead_asks_once_for_each_byte() -> None:
    source = Bytes(os.urandom(40 << 20))
    file = s3._ReadAhead(source)
    for start in range(0, source.size, 1 << 20):
        assert file.read(start, start + (1 << 20)) == source.data[start : start + (1 << 20)]
    assert source.asked == source.size


# -- patience --------------------------------------------------------------------------------------------------------


def test_limits_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience.Limits.from_environment() == patience.Limits(10, 60, 120, 64)
    monkeypatch.setenv("SEGBATCH_STORAGE_READ_S", "2.5")
    monkeypatch.setenv("SEGBATCH_STORAGE_CONNECTIONS", "8")
    assert patience.Limits.from_environment() == patience.Limits(10, 2.5, 120, 8)
    for value in ("-1", "0", "soon", "nan"):
        monkeypatch.setenv("SEGBATCH_STORAGE_TOTAL_S", value)
        with pytest.raises(ConfigError, match=f"SEGBATCH_STORAGE_TOTAL_S={value} is no positive number"):
            patience.Limits.from_environment()


def test_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    breaker = patience.Breaker("s3://b")
    for _ in range(patience._TRIP_AFTER - 1):
        breaker.failed(False, "x")
    breaker.answered()
    for _ in range(patience._TRIP_AFTER - 1):
        breaker.failed(False, "x")
    assert breaker.admit() == "yes"
    breaker.failed(False, "x")
    assert breaker.admit() == "wait"
    breaker.failed(False, "x")  # one that was on its way
    now[0] += 1.1
    assert [breaker.admit() for _ in range(3)] == ["probe", "wait", "wait"]
    breaker.failed(True, "x")
    now[0] += 1.1
    assert breaker.admit() == "wait"  # rests double
    now[0] += 1.0
    assert breaker.admit() == "probe"
    now[0] += 60
    assert breaker.admit() == "no"  # the probe is still out, and the store has been away for long
    breaker.answered()
    assert breaker.admit() == "yes"


def test_attempts_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_BACK_OFF_S", 0.01)
    tries = patience.Tries("s3://b/x", "read", None, total_s=0.2)
    began = time.monotonic()
    with pytest.raises(TransientStorageError):
        list(iter(lambda: time.sleep(tries.failed(Throttled())), "never"))
    assert 0.01 < time.monotonic() - began < 2


def test_standing_in_line_costs_no_time_and_large_objects_get_more() -> None:
    tries = patience.Tries("s3://b/x", "read", None, total_s=1)
    tries.stood_in_line(100)
    assert 100 < tries.left_s() <= 101
    limits = patience.Limits(total_s=120)
    assert limits.call_s(0) == 120 and limits.call_s(1 << 30) > 2 * limits.request_s(1 << 30) - limits.request_s(0) * 2


def test_a_request_that_stood_in_line_asks_again_when_the_store_has_gone() -> None:
    breaker = patience.Breaker("s3://b")
    tries = patience.Tries("s3://b/x", "read", breaker)
    assert tries.hold_s() == 0 and not tries.is_overtaken
    for _ in range(10):
        breaker.failed(False, "TimeoutError")
    assert tries.is_overtaken and tries.hold_s() > 0


class Throttled(Exception):
    response: ClassVar = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}


@pytest.mark.parametrize(
    ("name", "value"),
    [("SSE", "rot13"), ("SSE_KMS_KEY_ID", "k"), ("PATH_STYLE", "maybe"), ("SSE_C_KEY", "c2VjcmV0LXNlY3JldA==")],
)
def test_wrong_settings_of_s3(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SEGBATCH_S3_{name}", value)
    with pytest.raises(ConfigError, match="SEGBATCH_S3_") as caught:
        s3.S3Store()
    assert "c2VjcmV0" not in str(caught.value)


def test_doctor_tells_of_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    from segbatch import api

    def last(root: str) -> api.Check:
        checks = api.doctor(root)
        assert {f"{scheme}://" for scheme in storage.SCHEMES} <= {c.name for c in checks}
        return checks[-1]

    root = "memory://doctor/out"
    assert last(root) == api.Check(f"put-if-absent in {root}", True, "one of two writers wins")
    ignoring = remote.store(root)
    monkeypatch.setattr(ignoring, "create", lambda uri, data: ignoring.replace(uri, data, None))
    found = last(root)
    assert not found.good and "run one at a time" in found.found
    assert list(storage.list_files(f"{root}/.segbatch")) == []
