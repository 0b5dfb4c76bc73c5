"""Archives as sources: they read like the unpacked folder, from any store; bad ones are refused in one line."""

import contextlib
import gzip
import http.server
import io
import os
import random
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segbatch import archives, storage
from segbatch.errors import ObjectMissing, StorageError

Files = dict[str, bytes]

KINDS = ("stored.zip", "deflated.zip", "bzip2.zip", "lzma.zip", "plain.tar", "x.tar.gz", "X.TGZ")
METHODS = {"deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


FILES: Files = {
    "set/train/b.png": noise(1, 70_000),
    "set/train/a.png": b"label " * 30_000,
    "set/train.txt": b"train/a.png\r\ntrain/b.png\n",
    "set/train-2/é ü/c.JPG": noise(2, 300),
    "set/empty.png": b"",
    "readme!/x.md": b"# read me",
    "Z.bin": noise(3, 1000),
}


def zipped(files: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in files.items():
            file.writestr(zipfile.ZipInfo(name, (2024, 1, 2, 3, 4, 6)), data, method)
    return out.getvalue()


def entry(name: str, size: int = 0, mtime: float = 1, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, mtime
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def tarred(files: Files, format: int = tarfile.GNU_FORMAT, mtimes: dict[str, float] | None = None) -> bytes:
    """A tar; times count up unless given."""
    entries = [
        (entry(name, len(data), (mtimes or {}).get(name, 1000.0 + number)), data)
        for number, (name, data) in enumerate(files.items())
    ]
    return tar_of(entries, format)


def tar_of(entries: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as file:
        for info, data in entries:
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def packed(files: Files, kind: str) -> bytes:
    if kind.endswith(".zip"):
        return zipped(files, METHODS.get(kind.removesuffix(".zip"), zipfile.ZIP_STORED))
    return tarred(files) if kind.endswith(".tar") else gzip.compress(tarred(files), 1, mtime=0)


def archive(folder: Path, kind: str, data: bytes) -> str:
    """Write an archive; returns the address of its root."""
    (folder / kind).write_bytes(data)
    return storage.archive_root(str(folder / kind))


def unpacked(folder: Path, files: Files) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def listing(root: str, recursive: bool = True) -> list[tuple[str, int]]:
    return [(storage.relative(i.uri, root), i.size) for i in storage.list_files(root, recursive=recursive)]


def contents(root: str) -> Files:
    return {storage.relative(i.uri, root): storage.read_bytes(i.uri) for i in storage.list_files(root)}


def etags(root: str) -> dict[str, str]:
    return {storage.relative(i.uri, root): i.etag for i in storage.list_files(root)}


def refusal(root: str) -> str:
    """What is said about an archive that cannot be listed: one line that names it."""
    with pytest.raises(StorageError) as caught:
        list(storage.list_files(root))
    assert not caught.value.retryable
    message = str(caught.value)
    assert root.removesuffix("!/") in message and message.endswith(")") and "\n" not in message
    return message


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("/d/a.zip!/", ("/d/a.zip", "")),
        ("/d/a.zip!", ("/d/a.zip", "")),
        ("/d/a.ZIP!/x/y.png", ("/d/a.ZIP", "x/y.png")),
        ("s3://b/a.tar.gz!/x/", ("s3://b/a.tar.gz", "x")),
        ("https://h/a.zip?download=1!/x", ("https://h/a.zip?download=1", "x")),
        ("/d/a.tar!/b.zip!/c", ("/d/a.tar", "b.zip!/c")),
        ("/d/what!/x.png", None),
        ("/d/what!.zip", None),
        ("/d/a.zip!x", None),
        ("/d/a.zip", None),
    ],
)
def test_addresses(uri: str, parts: tuple[str, str] | None) -> None:
    assert archives.split(uri) == parts
    assert storage.is_local(uri) == (parts is None)


def test_addresses_are_put_together_like_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    root = storage.archive_root("s3://b/a.zip")
    assert root == "s3://b/a.zip!/" and storage.name_of(root) == "a.zip"
    inside = storage.join(root, "x", "y.png")
    assert inside == "s3://b/a.zip!/x/y.png" == storage.join(storage.join(root, "x"), "y.png")
    assert (storage.relative(inside, root), storage.name_of(inside)) == ("x/y.png", "y.png")
    for uri in (root, inside):
        assert storage.resolve(uri) == uri
    assert storage.resolve("a/../b.zip!") == f"{tmp_path}/b.zip!/"
    assert storage.resolve("file:///b.zip!/x//./y/") == "/b.zip!/x/y"
    assert storage.resolve("/b.zip!/../../etc/passwd") == "/b.zip!/etc/passwd"


def test_what_is_an_archive(tmp_path: Path) -> None:
    (tmp_path / "folder.zip").mkdir()
    for uri in ("/d/a.zip", "s3://b/a.TAR.GZ", "a.tgz", "a.tar", "a.tar.xz", "https://h/a.zip?x=1"):
        assert storage.is_archive(uri)
    for uri in ("/d/a.nii.gz", "/d/zip", "a.zip!/b.zip", "a.zip!/", str(tmp_path / "folder.zip"), "s3://b/a.zip.txt"):
        assert not storage.is_archive(uri)


# -- an archive reads like a folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reads_like_the_unpacked_folder(kind: str, tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "folder", FILES)
    root = archive(tmp_path, kind, packed(FILES, kind))
    assert contents(root) == FILES
    for below in ("", "set", "set/train", "set/nothing"):
        one, other = storage.join(root, below).rstrip("/"), storage.join(folder, below).rstrip("/")
        for recursive in (True, False):
            assert listing(one, recursive) == listing(other, recursive)
        assert storage.list_folders(one) == storage.list_folders(other)
        assert storage.is_folder(one) == storage.is_folder(other)
        assert storage.exists(one) == storage.exists(other)
    jpegs = storage.list_files(root, (".jpg",))
    assert [i.uri for i in jpegs] == [f"{root}set/train-2/é ü/c.JPG"]
    assert storage.read_lines(f"{root}set/train.txt") == ["train/a.png", "train/b.png"]
    assert storage.read_many(f"{root}{n}" for n in FILES) == list(FILES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_streams(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = archive(tmp_path, kind, packed(FILES, kind))
    for limit in (archives.STREAM_ABOVE, 100):  # inflated beforehand, and as it is read
        monkeypatch.setattr(archives, "STREAM_ABOVE", limit)
        for name, data in FILES.items():
            uri, size = f"{root}{name}", len(data)
            for start, stop in (
                (0, 0),
                (0, 10),
                (size // 2, size // 2 + 700),
                (max(size - 5, 0), size + 5),
                (size, size),
            ):
                assert storage.read_range(uri, start, stop) == data[start:stop]
            with storage.open_input(uri) as file:
                assert file.seek(0, os.SEEK_END) == size
                file.seek(size // 3)
                assert file.read(100) == data[size // 3 :][:100]
                file.seek(1)
                assert file.read() == data[1:]
            with storage.open_stream(uri) as file:
                assert b"".join(iter(lambda f=file: f.read(999), b"")) == data  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_members(kind: str, tmp_path: Path) -> None:
    root = archive(tmp_path, kind, packed(FILES, kind))
    found = storage.stat(f"{root}Z.bin")
    assert found and (found.uri, found.size) == (f"{root}Z.bin", 1000)
    assert found in list(storage.list_files(root))
    assert storage.stat(f"{root}set") is None and storage.stat(f"{root}set/x") is None and storage.stat(root) is None
    with pytest.raises(ObjectMissing, match=r"cannot read .*!/set/x: the archive has no such file \(check the path\)"):
        storage.read_bytes(f"{root}set/x")
    with pytest.raises(ObjectMissing, match="that is a folder"):
        storage.open_input(f"{root}set")
    with pytest.raises(ObjectMissing, match="an archive inside an archive must be unpacked"):
        storage.read_bytes(f"{root}inner.zip!/a")


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    root = storage.archive_root(str(tmp_path / "no.zip"))
    assert list(storage.list_files(root)) == [] == storage.list_folders(root)
    assert not storage.exists(root) and not storage.is_folder(root) and storage.stat(f"{root}a") is None
    with pytest.raises(ObjectMissing, match=r"no\.zip: it does not exist"):
        storage.read_bytes(f"{root}a")


def test_archives_are_not_written(tmp_path: Path) -> None:
    uri = archive(tmp_path, "a.zip", zipped({"a": b"1"})) + "a"
    before = (tmp_path / "a.zip").read_bytes()
    writes: list[Callable[[], object]] = [
        lambda: storage.create(uri, b"2"),
        lambda: storage.replace(uri, b"2"),
        lambda: storage.delete(uri),
        lambda: storage.check_writable(uri),
    ]
    for write in writes:
        with pytest.raises(StorageError, match=r"archives are only read \(choose a folder or a bucket\)"):
            write()
    with pytest.raises(StorageError, match="tables in an archive are not read"):
        storage.arrow_filesystem(uri)
    assert os.listdir(tmp_path) == ["a.zip"] and (tmp_path / "a.zip").read_bytes() == before


HIDDEN: Files = {
    "a.png": b"1",
    ".hidden": b"2",
    ".git/x": b"3",
    "set/._a.png": b"4",
    "__MACOSX/._a.png": b"5",
    "__MACOSX/set/b.png": b"6",
}


@pytest.mark.parametrize("kind", ["stored.zip", "plain.tar"])
def test_hidden_members_are_not_listed(kind: str, tmp_path: Path) -> None:
    root = archive(tmp_path, kind, packed(HIDDEN, kind))
    assert listing(root) == [("a.png", 1)]
    assert storage.list_folders(root) == ["set"]
    assert storage.read_bytes(f"{root}.git/x") == b"3"


@pytest.mark.parametrize("kind", ["stored.zip", "plain.tar"])
def test_loose_names_and_empty_folders(kind: str, tmp_path: Path) -> None:
    if kind.endswith(".zip"):
        data = zipped({"./": b"", "./a//b.png": b"1", "empty/": b""})
    else:
        folders = [(entry(n, type=tarfile.DIRTYPE), b"") for n in ("./", "./empty")]
        data = tar_of([*folders, (entry("./a//b.png", 1), b"1")])
    root = archive(tmp_path, kind, data)
    assert listing(root) == [("a/b.png", 1)]
    assert storage.list_folders(root) == ["a", "empty"] and storage.is_folder(f"{root}empty")


parts = st.text(st.sampled_from("ab-. é!\n"), min_size=1, max_size=3).filter(lambda p: p not in (".", ".."))
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
trees = st.dictionaries(paths, st.binary(max_size=600), max_size=8)


def could_be_unpacked(files: Files) -> bool:
    return not any(other.startswith(f"{name}/") for name in files for other in files)


@given(trees.filter(could_be_unpacked), st.sampled_from(["stored.zip", "deflated.zip", "plain.tar", "x.tar.gz"]))
@example({"a/b": b"1", "a-/b": b"2", "a!": b""}, "plain.tar")
@example({"..\n": b"", ".\n": b"", "a.zip\n": b"1"}, "stored.zip")
@settings(deadline=None, max_examples=50)
def test_any_tree(tmp_path_factory: pytest.TempPathFactory, files: Files, kind: str) -> None:
    tmp_path = tmp_path_factory.mktemp("tree")
    root = archive(tmp_path, kind, packed(files, kind))
    folder = unpacked(tmp_path / "folder", files)
    assert listing(root) == listing(folder)
    assert contents(root) == contents(folder)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_dialects(format: int, tmp_path: Path) -> None:
    files = {"d/" + "long " * 25 + "/é.png": noise(1, 2000), "b": b"2"}
    assert contents(archive(tmp_path, "a.tar", tarred(files, format))) == files


def test_zip64(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file, file.open("a", "w", force_zip64=True) as member:
        member.write(noise(1, 5000))
    assert contents(archive(tmp_path, "a.zip", out.getvalue())) == {"a": noise(1, 5000)}


def test_zip_names_of_macos_and_dos(tmp_path: Path) -> None:
    """macOS writes UTF-8 without the flag that says so; without it, all others mean code page 437."""
    data = zipped({"é.png": b"1"}).replace("é".encode(), "é".encode())
    flagged = struct.pack("<H", 0x800)
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.index(signature) + at
        assert data[place : place + 2] == flagged
        data = data[:place] + b"\0\0" + data[place + 2 :]
    assert contents(archive(tmp_path, "mac.zip", data)) == {"é.png": b"1"}
    dos = data.replace("é".encode(), b"\x82\x82")
    assert contents(archive(tmp_path, "dos.zip", dos)) == {"éé.png": b"1"}


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    """Servers and browsers unpack or rename what they hand out."""
    for kind, data in (("a.zip", tarred(FILES)), ("a.tar", zipped(FILES)), ("a.tar.gz", tarred(FILES))):
        assert contents(archive(tmp_path, kind, data)) == FILES


# -- tags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "plain.tar", "x.tar.gz"])
def test_a_tag_changes_with_its_file_only(kind: str, tmp_path: Path) -> None:
    root = archive(tmp_path, kind, packed(FILES, kind))
    before = etags(root)
    changed = {"new": b"0", **FILES, "Z.bin": noise(9, 1000)}
    data = tarred(changed, mtimes={n: 1000.0 + i for i, n in enumerate(FILES)} | {"Z.bin": 5.0})
    if kind.endswith(".zip"):
        data = packed(changed, kind)
    archive(tmp_path, kind, gzip.compress(data, mtime=0) if kind.endswith(".gz") else data)
    after = etags(root)
    assert len(set(before.values())) == len(before)
    assert {n for n in after if after[n] != before.get(n)} == {"new", "Z.bin"}


def test_tar_whose_times_tell_nothing(tmp_path: Path) -> None:
    """Reproducible tars give all files one time: of two contents of one size nothing shows but the archive's tag."""
    alike = dict.fromkeys(FILES, 0.0)
    root = archive(tmp_path, "a.tar", tarred(FILES, mtimes=alike))
    before = etags(root)
    assert etags(root) == before
    archive(tmp_path, "a.tar", tarred({**FILES, "Z.bin": noise(9, 1000)}, mtimes=alike))
    assert not set(etags(root).values()) & set(before.values())


# -- entries that are refused or left out ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "a\\b", "..\\x", "C:/x", "c:x", "a\0b"])
@pytest.mark.parametrize("kind", ["stored.zip", "plain.tar", "x.tar.gz"])
def test_entries_that_lead_outside(name: str, kind: str, tmp_path: Path) -> None:
    stand_in = "_" * len(name)
    if kind.endswith(".zip"):
        data = zipped({"good": b"1", stand_in: b"2"}).replace(stand_in.encode(), name.encode())
    elif "\0" in name:
        data = tar_of([(entry("good"), b""), (entry("x", pax_headers={"path": name}), b"")], tarfile.PAX_FORMAT)
    else:
        data = tar_of([(entry("good"), b""), (entry(name), b"")])
    root = archive(tmp_path, kind, gzip.compress(data, mtime=0) if kind.endswith(".gz") else data)
    assert f"has an entry that may lead outside of it: {name!r}" in refusal(root)
    with pytest.raises(StorageError, match="may lead outside"):
        storage.read_bytes(f"{root}good")


def test_names_that_are_not_utf8_or_too_deep(tmp_path: Path) -> None:
    data = tarred({"caf_": b""}, tarfile.USTAR_FORMAT)
    header = bytearray(data[:512].replace(b"caf_", b"caf\xe9"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert "not UTF-8: 'caf\\udce9' (rename that file)" in refusal(
        archive(tmp_path, "a.tar", bytes(header) + data[512:])
    )
    assert "more than 100 folders deep" in refusal(archive(tmp_path, "deep.zip", zipped({"a/" * 2000 + "b": b""})))


def test_links_and_devices_of_a_tar(tmp_path: Path) -> None:
    entries = [
        (entry("a", 3), b"abc"),
        (entry("hard", type=tarfile.LNKTYPE, linkname="./a"), b""),
        (entry("a", type=tarfile.LNKTYPE, linkname="a"), b""),  # what GNU tar writes when a file is named twice
        (entry("nowhere", type=tarfile.LNKTYPE, linkname="b"), b""),
        (entry("soft", type=tarfile.SYMTYPE, linkname="../../etc/passwd"), b""),
        (entry("pipe", type=tarfile.FIFOTYPE), b""),
        (entry("device", type=tarfile.CHRTYPE), b""),
        (entry("b", 1), b"b"),
    ]
    for kind, data in (("a.tar", tar_of(entries)), ("a.tgz", gzip.compress(tar_of(entries), mtime=0))):
        assert contents(archive(tmp_path, kind, data)) == {"a": b"abc", "b": b"b", "hard": b"abc"}


def test_links_of_a_zip(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("a", "1")
    assert contents(archive(tmp_path, "a.zip", out.getvalue())) == {"a": b"1"}


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    entries = [(entry("a", 1, 1), b"1"), (entry("b", 1, 2), b"2"), (entry("a", 2, 3), b"33"), (entry("c", 1), b"4")]
    entries.append((entry("c", type=tarfile.SYMTYPE, linkname="a"), b""))
    assert contents(archive(tmp_path, "a.tar", tar_of(entries))) == {"a": b"33", "b": b"2"}
    for second, fine in ((b"1", True), (b"2", False)):
        data = zipped({"a": b"1", "b": second}).replace(b"b", b"a")
        root = archive(tmp_path, "a.zip", data)
        if fine:
            assert contents(root) == {"a": b"1"}
        else:
            assert "has two different files named 'a' (take one of them out)" in refusal(root)


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    info = entry("a", 0, type=tarfile.GNUTYPE_SPARSE)
    assert "holds a sparse file, 'a'" in refusal(archive(tmp_path, "a.tar", tar_of([(info, b"")])))


# -- damaged archives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.zip", b"", "is empty (download it again"),
        (
            "a.zip",
            b"<!DOCTYPE html><title>Log in</title>",
            "is not a zip or tar archive: it begins with b'<!DOCTYPE html",
        ),
        ("a.tar", b"<!DOCTYPE html><title>Log in</title>", "is not a tar archive, or damaged: truncated header"),
        ("a.tar", noise(1, 5000), "is not a tar archive, or damaged"),
        ("a.tar.gz", gzip.compress(noise(1, 5000), mtime=0), "is not a tar archive, or damaged"),
        ("a.tar.gz", gzip.compress(b"short", mtime=0), "is not a tar archive, or damaged"),
        ("a.zip", b"PK" + noise(1, 5000), "is cut off or damaged"),
        ("a.tar.bz2", b"BZh91AY", "is compressed by bzip2, which cannot be read in parts (make a zip or tar.gz"),
        ("a.tar.xz", b"\xfd7zXZ\0\0", "is compressed by xz"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd\0", "is compressed by Zstandard"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c\0", "is compressed by 7-Zip"),
    ],
)
def test_what_is_no_archive(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    assert says in refusal(archive(tmp_path, name, data))


@pytest.mark.parametrize("kind", KINDS)
def test_archives_that_are_cut_off(kind: str, tmp_path: Path) -> None:
    data = packed(FILES, kind)
    end = len(data) - (10_240 if kind.endswith(".tar") else 0)  # a tar may lack a part of its padding
    for size in (1, 100, 512, end // 3, end // 2, 3 * end // 4, end - 1):
        message = refusal(archive(tmp_path, kind, data[:size]))
        assert "damaged" in message or "begins with" in message


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "bzip2.zip", "lzma.zip", "x.tar.gz"])
def test_flipped_bits_never_give_wrong_bytes(kind: str, tmp_path: Path) -> None:
    data = packed(FILES, kind)
    said, draw = [], random.Random(kind)
    for _ in range(40):
        bad = bytearray(data)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        root = archive(tmp_path, kind, bytes(bad))
        try:
            for info in storage.list_files(root):
                with contextlib.suppress(KeyError):  # another name
                    assert storage.read_bytes(info.uri) == FILES[storage.relative(info.uri, root)]
        except StorageError as error:
            said.append(str(error))
    assert len(said) > 20 and all(str(tmp_path) in line and "\n" not in line for line in said)


def test_a_wrong_checksum_behind_the_last_file(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(tarred({"a": b"1"}) + bytes(3 << 20), 1))
    data[-8] ^= 1
    assert "is damaged: incorrect data check" in refusal(archive(tmp_path, "a.tar.gz", bytes(data)))


def test_a_damaged_tar_header(tmp_path: Path) -> None:
    data = bytearray(tarred({"a": b"1", "b": b"2"}))
    data[1024] ^= 1
    assert "is damaged: no header at byte 1024" in refusal(archive(tmp_path, "a.tar", bytes(data)))


@pytest.mark.parametrize(("type", "says"), [(b"0", "a header of a negative size"), (b"x", "a header of -512 bytes")])
def test_tar_headers_with_negative_sizes(type: bytes, says: str, tmp_path: Path) -> None:
    """They would be read again and again."""
    header = bytearray(tarred({"a": b"", "b": b""})[:1024])
    header[512 + 124 : 512 + 136] = b"\xff" * 10 + b"\xfe\0"  # base 256: -512
    header[512 + 156 : 512 + 157] = type
    header[512 + 148 : 512 + 156] = b" " * 8
    header[512 + 148 : 512 + 156] = b"%06o\0 " % sum(header[512:])
    assert says in refusal(archive(tmp_path, "a.tar", bytes(header) + bytes(1024)))


def patched(data: bytes, local: int, central: int, value: int, size: int = 4) -> bytes:
    """A zip of one file with a field of its local and central header replaced."""
    out = bytearray(data)
    for signature, at in ((b"PK\3\4", local), (b"PK\1\2", central)):
        place = data.index(signature) + at
        out[place : place + size] = value.to_bytes(size, "little")
    return bytes(out)


BOMB = zipped({"a": bytes(300_000)}, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("declared", [1, 100_000, 299_999, 300_001, 3_000_000_000])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_declared_size_holds(declared: int, method: int, tmp_path: Path) -> None:
    root = archive(tmp_path, "a.zip", patched(zipped({"a": bytes(300_000)}, method), 22, 24, declared))
    assert listing(root) == [("a", declared)]
    with pytest.raises(StorageError, match=r"a\.zip!/a is .*damaged: .*\(download it again"):
        storage.read_bytes(f"{root}a")
    with storage.open_stream(f"{root}a") as file, pytest.raises(StorageError, match=r"damaged"):
        list(iter(lambda: file.read(1 << 16), b""))


def test_members_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MEMORY_LIMIT", 299_999)
    root = archive(tmp_path, "a.zip", BOMB)
    with pytest.raises(StorageError, match=r"a is 300000 bytes; at most 299999 are read at once \(unpack the archive"):
        storage.read_bytes(f"{root}a")
    with storage.open_stream(f"{root}a") as file:
        assert len(file.read()) == 300_000


def test_encrypted_and_unknown_methods(tmp_path: Path) -> None:
    assert "is encrypted: 'a' needs a password" in refusal(archive(tmp_path, "e.zip", patched(BOMB, 6, 8, 1, 2)))
    root = archive(tmp_path, "d.zip", patched(BOMB, 8, 10, 9, 2))
    with pytest.raises(
        StorageError, match=r"!/a is compressed by Deflate64, which cannot be read \(make the zip again"
    ):
        storage.read_bytes(f"{root}a")


def test_overlapping_entries(tmp_path: Path) -> None:
    data = zipped({"a": noise(1, 900), "b": noise(2, 900)})
    second = data.rindex(b"PK\1\2")
    bad = bytearray(data)
    bad[second + 42 : second + 46] = (40).to_bytes(4, "little")
    assert "its entries 'a' and 'b' overlap" in refusal(archive(tmp_path, "a.zip", bytes(bad)))


# -- gzip ------------------------------------------------------------------------------------------------------------


class Bytes:
    """An archive in memory that counts what is read."""

    uri, etag, block = "x.tar.gz", "1", 4 << 20

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.given = data, len(data), 0

    def read(self, start: int, stop: int) -> bytes:
        self.given += min(stop, self.size) - start
        return self.data[start:stop]


def compressible(size: int) -> bytes:
    draw = random.Random(0)
    return b"".join(draw.randbytes(draw.randrange(9)) * draw.randrange(1, 9) for _ in range(size // 18))[:size]


@pytest.mark.long
@pytest.mark.parametrize("streams", [1, 3, 400])
@pytest.mark.parametrize("points", [4, 2048])
def test_random_access_to_gzip(streams: int, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of several gzip files in one (pigz, bgzip), and when the seek points are thinned out."""
    monkeypatch.setattr(archives.Inflated, "_POINTS", points)
    data = compressible(3_000_000)
    step = -(-len(data) // streams)
    source = Bytes(b"".join(gzip.compress(data[i : i + step], 1) for i in range(0, len(data), step)) + bytes(100))
    inflated = archives.Inflated(source)
    assert inflated.read(0, 1 << 40) == data
    draw = random.Random(1)
    source.given = 0
    places = [draw.randrange(len(data)) for _ in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: inflated.read(p, p + 5000), places))
    assert found == [data[p : p + 5000] for p in places]
    assert inflated.read(len(data) + 5, len(data) + 9) == b""
    assert len(inflated._points) <= points
    if points > 4:
        assert source.given < 60 * 200_000 < 60 * source.size / 4


def test_reading_on_does_not_begin_again() -> None:
    data = compressible(3_000_000)
    source = Bytes(gzip.compress(data, 1))
    inflated = archives.Inflated(source)
    assert b"".join(inflated.read(p, p + 10_000) for p in range(0, len(data), 10_000)) == data
    assert source.given == source.size


# -- memory, threads, changes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "plain.tar", "x.tar.gz"])
def test_streams_take_little_memory(kind: str, tmp_path: Path) -> None:
    root = archive(tmp_path, kind, packed({"a": bytes(32 << 20)}, kind))
    assert listing(root) == [("a", 32 << 20)]
    tracemalloc.start()
    with storage.open_stream(f"{root}a") as file:
        size = sum(len(piece) for piece in iter(lambda: file.read(100_000), b""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 32 << 20 and peak < 8 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads(kind: str, tmp_path: Path) -> None:
    files = {f"{i % 5}/{i}": noise(i, 3000 + i) for i in range(60)}
    root = archive(tmp_path, kind, packed(files, kind))
    uris = [f"{root}{name}" for name in files] * 3
    random.Random(0).shuffle(uris)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(storage.read_bytes, uris))
    assert found == [files[storage.relative(u, root)] for u in uris]


def test_an_archive_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    open_archive = archives.open_archive

    def slow(source: archives.Source) -> archives.Archive:
        opened.append(source.uri)
        time.sleep(0.05)
        return open_archive(source)

    monkeypatch.setattr(archives, "open_archive", slow)
    root = archive(tmp_path, "a.zip", zipped(FILES))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.read_bytes, [f"{root}{n}" for n in FILES] * 4))
    assert contents(root) == FILES
    assert len(opened) == 1


def test_few_archives_stay_open(tmp_path: Path) -> None:
    roots = [archive(tmp_path, f"{i}.zip", zipped({"a": noise(i, 10)})) for i in range(3 * archives.OPEN_ARCHIVES)]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [storage.read_bytes(f"{r}a") for r in roots] == [noise(i, 10) for i in range(len(roots))]
    assert len(os.listdir("/proc/self/fd")) <= before + archives.OPEN_ARCHIVES


@pytest.mark.parametrize("kind", ["stored.zip", "plain.tar", "x.tar.gz"])
@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_an_archive_that_changes_under_a_reader(kind: str, how: str, tmp_path: Path) -> None:
    """Reading fails until the archive is looked at anew: a job never mixes two versions."""
    root = archive(tmp_path, kind, packed(FILES, kind))
    assert storage.read_bytes(f"{root}Z.bin") == FILES["Z.bin"]
    other = packed({"first": b"0", **FILES, "Z.bin": noise(9, 1000)}, kind)
    if how == "replaced":
        (tmp_path / "new").write_bytes(other)
        os.replace(tmp_path / "new", tmp_path / kind)
    else:
        (tmp_path / kind).write_bytes(other)
    for _ in range(2):
        with pytest.raises(
            StorageError, match=r"has changed since it was listed or opened \(run the same command again"
        ):
            storage.read_bytes(f"{root}Z.bin")
    assert listing(root)[0] == ("Z.bin", 1000)
    assert storage.read_bytes(f"{root}Z.bin") == noise(9, 1000)
    (tmp_path / kind).unlink()
    with pytest.raises(ObjectMissing):
        storage.read_bytes(f"{root}Z.bin")
    assert not storage.exists(f"{root}Z.bin")


# -- stores ----------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """What a web server serves, and what it was asked."""

    url: str
    files: Files = field(default_factory=dict)
    with_ranges: bool = True
    with_tags: bool = True
    status: int = 0
    asked: list[str] = field(default_factory=list)
    sent: int = 0

    def replies(self, path: str, headers: Any) -> tuple[int, bytes, dict[str, str]]:
        data = self.files.get(path.partition("?")[0])
        if self.status or data is None:
            return self.status or 404, b"no", {}
        tag = f'"{hash(data)}"'
        told = {"ETag": tag} if self.with_tags else {}
        if headers.get("If-Match", tag) != tag:
            return 412, b"", told
        wanted = headers.get("Range")
        if not (wanted and self.with_ranges):
            return 200, data, told
        start, stop = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        if start >= len(data):
            return 416, b"", told
        told["Content-Range"] = f"bytes {start}-{min(stop, len(data) - 1)}/{len(data)}"
        return 206, data[start : stop + 1], told


@pytest.fixture
def web() -> Iterator[Server]:
    server = Server("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Silence."""

        def do_GET(self) -> None:
            status, data, headers = server.replies(self.path, self.headers)
            server.asked.append(f"{self.command} {status}")
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                server.sent += len(data)
                with contextlib.suppress(OSError):  # the client may have enough
                    self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{service.server_port}"
    threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    service.shutdown()
    service.server_close()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "plain.tar", "x.tar.gz"])
def test_archives_on_the_web(kind: str, web: Server) -> None:
    web.files[f"/{kind}"] = packed(FILES, kind)
    root = storage.archive_root(f"{web.url}/{kind}?download=1")
    assert contents(root) == FILES
    assert storage.list_folders(f"{root}set") == ["train", "train-2"]
    assert not storage.is_folder(f"{web.url}/{kind}")
    with storage.open_stream(f"{root}set/train/a.png") as file:
        assert file.read(7) == b"label l"
    web.files[f"/{kind}"] = packed({**FILES, "Z.bin": noise(9, 1000)}, kind)
    with pytest.raises(StorageError, match="has changed since it was listed or opened"):
        storage.read_bytes(f"{root}set/train/b.png")
    assert contents(root)["Z.bin"] == noise(9, 1000)


def test_a_member_on_the_web_is_one_request(web: Server) -> None:
    web.files["/a.zip"] = zipped({f"{i}.png": noise(i, 20_000) for i in range(50)})
    root = storage.archive_root(f"{web.url}/a.zip")
    assert len(listing(root)) == 50
    assert web.sent < 30_000
    web.asked.clear()
    assert not storage.is_folder(f"{web.url}/a.zip")
    for i in (7, 31):
        assert storage.read_bytes(f"{root}{i}.png") == noise(i, 20_000)
        assert storage.exists(f"{root}{i}.png")
    assert web.asked == ["GET 206", "GET 206"]
    assert web.sent < 80_000


def test_web_servers_without_parts(web: Server) -> None:
    web.files.update({"/a.zip": zipped(FILES), "/x": noise(1, 90_000)})
    web.with_ranges = False
    for read in (
        lambda: list(storage.list_files(f"{web.url}/a.zip!/")),
        lambda: storage.read_range(f"{web.url}/x", 9, 20),
    ):
        with pytest.raises(StorageError, match=r"the server does not serve parts of a file \(download it first\)"):
            read()


def test_web_servers_without_tags(web: Server) -> None:
    """They are asked before every read."""
    web.with_tags = False
    web.files["/a.tar"] = tarred({"a": noise(1, 3000)})
    root = storage.archive_root(f"{web.url}/a.tar")
    assert contents(root) == {"a": noise(1, 3000)}
    web.files["/a.tar"] = tarred({"a": noise(1, 300_000)})
    with pytest.raises(StorageError, match="has changed since it was listed or opened"):
        storage.read_bytes(f"{root}a")


def test_what_web_servers_answer(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.patience, "_BACK_OFF_S", 0.001)
    web.files["/x"] = noise(1, 5000)
    found = storage.stat(f"{web.url}/x")
    assert found and found.size == 5000 and found.etag
    assert storage.read_range(f"{web.url}/x", 100, 200) == noise(1, 5000)[100:200]
    assert storage.read_range(f"{web.url}/x", 4990, 6000) == noise(1, 5000)[4990:]
    assert storage.read_range(f"{web.url}/x", 5000, 6000) == b"" == storage.read_range(f"{web.url}/x", 7, 7)
    assert storage.stat(f"{web.url}/y") is None
    with pytest.raises(ObjectMissing):
        storage.read_bytes(f"{web.url}/a.zip!/y")
    web.status = 403
    with pytest.raises(StorageError, match="permission denied"):
        storage.read_bytes(f"{web.url}/a.zip!/y")
    web.status, web.asked = 503, []
    with pytest.raises(StorageError, match="503") as caught:
        storage.stat(f"{web.url}/x")
    assert caught.value.retryable and len(web.asked) == 2 * storage.ATTEMPTS  # HEAD, then GET


@pytest.mark.parametrize("kind", ["deflated.zip", "plain.tar"])
def test_archives_in_any_other_store(kind: str) -> None:
    uri = f"memory://bucket/{kind}"
    storage.replace(uri, packed(FILES, kind))
    root = storage.archive_root(uri)
    assert contents(root) == FILES
    storage.replace(uri, packed({"a": b"1"}, kind))
    with pytest.raises(StorageError, match="has changed since it was listed or opened"):
        storage.read_bytes(f"{root}Z.bin")
    assert contents(root) == {"a": b"1"}
    assert storage.read_range(uri, 0, 2) == packed({"a": b"1"}, kind)[:2]
