"""Files inside zip and tar archives, read where they lie: nothing is unpacked to the disk.

The address of a file in an archive is ``ARCHIVE!/path/inside``: ``/data/camvid.zip!/CamVid/train/a.png``,
``s3://bucket/x.tar.gz!/a/b.png``. The root is ``ARCHIVE!/``. What stands before the first ``!/`` must end like an
archive; a query is part of the archive's address: ``https://host/x.zip?download=1!/a.png``.

- **zip** (APPNOTE.TXT 6.3): the directory at its end is read once; a file is one positioned read, so that any number
  of threads read at the same time. Stored and deflated files; bzip2 and LZMA through ``zipfile``.
- **tar** (POSIX ustar and pax, GNU): all headers are read once, in order; a file is one positioned read.
- **tar.gz** (RFC 1952): is inflated once to find the headers; seek points remember the inflater's state on the way.

Entries are checked before the first is read: one that leads outside the archive (absolute, ``..``, backslash, drive
letter, NUL) refuses the archive, although nothing is ever written. Links and devices are no inputs and are left out,
but a tar's hard link to a file before it is that file. In a tar the last entry of a name holds, as tar defines it; a
zip with two different files of one name is refused, because programs disagree on which of them counts.
"""

import bisect
import io
import itertools
import lzma
import math
import os
import posixpath
import re
import stat
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

from segbatch.errors import ObjectMissing, StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

MEMORY_LIMIT = 8 << 30
"""Largest file, in bytes, that is read out of an archive into memory at once."""

STREAM_ABOVE = 64 << 20
"""A compressed file in a zip that is larger than this many bytes is inflated as it is read, not beforehand."""

OPEN_ARCHIVES = 8
"""How many archives a process keeps open."""

_SUFFIX = r"\.(?:zip|tar|tar\.gz|tgz|tar\.(?:bz2|xz|zst|lz4|Z)|tbz2?|txz|tzst|7z|rar)"
_IS_ARCHIVE = re.compile(rf"{_SUFFIX}(?:\?[^!]*)?\Z", re.IGNORECASE)
_MEMBER = re.compile(rf"(?P<archive>.+?{_SUFFIX}(?:\?[^!]*)?)!(?:/(?P<path>.*))?\Z", re.IGNORECASE | re.DOTALL)

_REFUSED = (
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"\x04\x22\x4d\x18", "LZ4"),
    (b"\x1f\x9d", "compress"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"),
)
_OUTSIDE = re.compile(r"[\\\x00]|^/|^[A-Za-z]:|(?:^|/)\.\.(?:/|\Z)")
_LOOSE = re.compile(r"//|(?:^|/)\.(?:/|\Z)|/\Z")
_MAX_DEPTH = 100

_DOWNLOAD_AGAIN = "download it again, and compare its size or checksum with the publisher's"
_UNPACK = "unpack the archive, and name the folder"

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_EXTRA = 64  # the usual extra field of a local header fits, and is read together with the content
_ONE_READ = 4 << 20
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_ZIP_METHOD_NAMES = {9: "Deflate64", 93: "Zstandard", 95: "xz", 98: "PPMd"}
_ENCRYPTED, _UTF8_NAME = 0x1, 0x800
_ZIP_ERRORS: tuple[type[Exception], ...] = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, OverflowError, RuntimeError, ValueError),
)
_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, OverflowError, RecursionError, ValueError)
_MAX_TAR_HEADER = 16 << 20


class Readable(Protocol):
    """Bytes that can be read at any place, from several threads at once."""

    block: int
    """How many bytes are worth asking for at once."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start <= i < stop``; fewer only where the data end.

        Raises:
            StorageError: they cannot be read, or are not those of the version that was opened.
        """
        ...


class Source(Readable, Protocol):
    """The bytes of one version of an archive file."""

    uri: str
    etag: str
    size: int


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: its path in the archive, in the canonical form: no leading slash, no ``.``, single slashes.
        size: bytes of its content.
        etag: changes when the content does. CRC-32 and size (zip, tar.gz); size and time (tar, where the content is not
            read to list it), and the tag of the whole archive if all its files bear the same time.
        start: where its local header (zip) or content (tar) begins; in a tar.gz, of the inflated tar.
        crc: CRC-32 of the content; None in a tar, which has none.
        stored: bytes of the compressed content (zip).
        method: zip's compression method.
        raw: the name as it stands in the zip.
        flags: zip's general purpose flags.
    """

    name: str
    size: int
    etag: str
    start: int
    crc: int | None = None
    stored: int = 0
    method: int = zipfile.ZIP_STORED
    raw: str = ""
    flags: int = 0


# -- addresses -------------------------------------------------------------------------------------------------------


def is_named_like_one(uri: str) -> bool:
    """Whether a file's name ends like an archive's."""
    return _IS_ARCHIVE.search(uri) is not None


def split(uri: str) -> tuple[str, str] | None:
    """(archive, path inside without slashes at its ends) of a file or folder in an archive; None for anything else."""
    if "!" not in uri:
        return None
    found = _MEMBER.match(uri)
    return (found["archive"], (found["path"] or "").strip("/")) if found else None


def address(archive: str, path: str = "") -> str:
    """Address of a path in an archive, which is canonical if the path is; ``ARCHIVE!/`` for the root."""
    return f"{archive}!/{path}"


def normal(path: str) -> str:
    """A path inside an archive without ``.`` and double slashes; ``..`` does not lead out of the root."""
    return posixpath.normpath(f"/{path}").lstrip("/")


# -- readers ---------------------------------------------------------------------------------------------------------


class Window(io.RawIOBase):
    """A part of a ``Readable`` as a seekable file."""

    def __init__(self, source: Readable, start: int, stop: int) -> None:
        self._source, self._start, self._size, self._at = source, start, stop - start, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; it may lie behind the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, "a position before the beginning")
        self._at = base + offset
        return self._at

    def _next(self, count: int) -> bytes:
        count = min(count, self._size - self._at)
        data = self._source.read(self._start + self._at, self._start + self._at + count) if count > 0 else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill the buffer; fewer bytes only at the end."""
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """The rest, in one request."""
        return self._next(self._size)

    def buffered(self) -> IO[bytes]:
        """The same file, read in blocks."""
        return io.BufferedReader(self, self._source.block)


class _Guarded(io.RawIOBase):
    """A file of ``zipfile`` whose errors are ours, and which may not end early."""

    def __init__(self, inner: IO[bytes], uri: str, size: int) -> None:
        self._inner, self._uri, self._size = inner, uri, size

    def _guard(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except StorageError:
            raise
        except _ZIP_ERRORS as error:
            raise _damaged(self._uri, str(error)) from error

    def _next(self, count: int) -> bytes:
        data = self._guard(lambda: self._inner.read(count))
        if (count < 0 or len(data) < count) and self._inner.tell() < self._size:
            raise _cut_off(self._uri, f"{self._inner.tell()} bytes instead of {self._size}")
        return data

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes; going back begins again at the start."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._inner.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position by inflating up to it."""
        return self._guard(lambda: self._inner.seek(offset, whence))

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill the buffer; fewer bytes only at the end."""
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """The rest."""
        return self._next(-1)

    def close(self) -> None:
        """Let go of the file."""
        self._inner.close()
        super().close()


# -- random access to gzip -------------------------------------------------------------------------------------------


class _Inflater:
    """Inflates a gzip file from a place on.

    Attributes:
        out: position in the inflated data.
        at: position in the gzip file up to which it has been fetched.
        enough: position in the gzip file behind which nothing is worth fetching.
    """

    _PIECE = 128 << 10

    def __init__(self, source: Source, out: int = 0, at: int = 0, state: "zlib._Decompress | None" = None) -> None:
        self._source, self.out, self.at, self.enough = source, out, at, sys.maxsize
        self._fetched, self._used = b"", 0
        self._zlib = state or zlib.decompressobj(31)

    def fork(self) -> "_Inflater | None":
        """Another one at the same place, which holds no data; None at the end, and between two such places."""
        if self._zlib.eof and not self._begin_next():
            return None
        if self._zlib.unconsumed_tail:
            return None
        return _Inflater(self._source, self.out, self.at - len(self._fetched) + self._used, self._zlib.copy())

    def next(self, count: int) -> bytes:
        """The next bytes, at most ``count``; none at the end."""
        while True:
            if self._zlib.eof and not self._begin_next():
                return b""
            piece = self._peek(self._PIECE)
            try:
                data = self._zlib.decompress(piece, count)
            except zlib.error as error:
                raise _damaged(self._source.uri, _zlib_says(error)) from error
            left = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
            self._used += len(piece) - len(left)
            self.out += len(data)
            if data:
                return data
            if not piece and not self._zlib.eof:
                raise _cut_off(self._source.uri, "the compressed data end too early")

    def _begin_next(self) -> bool:
        """Go over to the next of several gzip files in one; what else may follow is ignored, as gzip does."""
        if self._peek(2) != b"\x1f\x8b":
            return False
        self._zlib = zlib.decompressobj(31)
        return True

    def _peek(self, count: int) -> bytes:
        """The next compressed bytes, of which there may be fewer."""
        if len(self._fetched) - self._used < 2:
            size = min(self._source.block, max(self.enough - self.at, self._PIECE))
            more = self._source.read(self.at, self.at + size)
            self._fetched, self._used = self._fetched[self._used :] + more, 0
            self.at += len(more)
        return self._fetched[self._used : self._used + count]


class Inflated:
    """A gzip file, read as if it were not compressed: at any place, from several threads.

    Seek points are copies of the inflater's state, 40 KB each. Where a read ended, the next one goes on.
    """

    block = 1 << 20
    _POINTS, _RECENT = 2048, 8

    def __init__(self, source: Source) -> None:
        self._source = source
        self._spacing = 128 << 10
        self._points = [_Inflater(source)]
        self._recent: OrderedDict[int, _Inflater] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """See ``Readable``."""
        inflater = self._nearest(start)
        inflater.enough = self._behind(stop)
        pieces = []
        while inflater.out < stop:
            skip = inflater.out < start
            data = inflater.next(min((start if skip else stop) - inflater.out, self.block))
            if not data:
                break
            if not skip:
                pieces.append(data)
            self._add_point(inflater)
        with self._lock:
            self._recent[inflater.out] = inflater
            if len(self._recent) > self._RECENT:
                self._recent.popitem(last=False)
        return b"".join(pieces)

    def _nearest(self, start: int) -> _Inflater:
        with self._lock:
            point = self._points[bisect.bisect_right(self._points, start, key=lambda p: p.out) - 1]
            recent = max((out for out in self._recent if point.out <= out <= start), default=None)
            if recent is not None:
                return self._recent.pop(recent)
        fork = point.fork()
        assert fork is not None  # a point is such a place
        return fork

    def _behind(self, stop: int) -> int:
        """Where in the gzip file the data before ``stop`` have ended for certain."""
        with self._lock:
            number = bisect.bisect_left(self._points, stop, key=lambda p: p.out)
            return self._points[number].at if number < len(self._points) else sys.maxsize

    def _add_point(self, inflater: _Inflater) -> None:
        if inflater.out < self._points[-1].out + self._spacing:
            return
        fork = inflater.fork()
        with self._lock:
            if fork is not None and fork.out >= self._points[-1].out + self._spacing:
                self._points.append(fork)
            if len(self._points) >= self._POINTS:  # bounded memory, however much a file inflates to
                del self._points[1::2]
                self._spacing *= 2


# -- archives --------------------------------------------------------------------------------------------------------


class Archive:
    """An archive's table of contents, and the way to its files. May be used from several threads.

    Attributes:
        uri: address of the archive.
        etag: its version.
    """

    def __init__(self, source: Source, members: dict[str, Member], folders: Iterable[str]) -> None:
        self.uri, self.etag, self._source = source.uri, source.etag, source
        self._members = members
        self._children = _tree(members, folders)

    def find(self, path: str) -> Member | None:
        """The file at a path, if there is one."""
        return self._members.get(path)

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder; the root is the empty path."""
        return path in self._children

    def files(self, folder: str, recursive: bool) -> Iterator[Member]:
        """Files below a folder in path order (by folder); hidden ones and ``__MACOSX`` are left out."""
        for name in self._visible(folder):
            path = f"{folder}/{name}" if folder else name
            member = self._members.get(path)
            if member is not None:
                yield member
            if recursive and path in self._children:
                yield from self.files(path, recursive)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted; hidden ones and ``__MACOSX`` are left out."""
        return [n for n in self._visible(folder) if (f"{folder}/{n}" if folder else n) in self._children]

    def _visible(self, folder: str) -> Iterator[str]:
        return (n for n in self._children.get(folder, ()) if not n.startswith(".") and n != "__MACOSX")

    def read(self, path: str) -> bytes:
        """The whole file.

        Raises:
            ObjectMissing: there is no such file.
            StorageError: it is damaged, or larger than ``MEMORY_LIMIT``.
        """
        member = self._member(path)
        if max(member.size, member.stored) > MEMORY_LIMIT:
            raise StorageError(
                f"{self._where(path)} is {member.size} bytes; at most {MEMORY_LIMIT} are read at once", _UNPACK
            )
        data = self._content(member)
        if len(data) != member.size:
            raise _cut_off(self._where(path), f"it does not have the {member.size} bytes it declares")
        if member.crc is not None and zlib.crc32(data) != member.crc:
            raise _damaged(self._where(path), "its checksum (CRC-32) is wrong")
        return data

    def open(self, path: str) -> IO[bytes]:
        """A seekable reader. A compressed file in a zip is inflated: beforehand, or as it is read when it is large.

        No checksum is compared where parts are read: of a stored file in a zip, and in a tar.gz.
        """
        return self._open(self._member(path))

    def stream(self, path: str) -> IO[bytes]:
        """A reader to be read from the beginning to the end; memory is bounded."""
        return self._stream(self._member(path))

    def _member(self, path: str) -> Member:
        member = self._members.get(path)
        if member is None:
            what = "that is a folder" if self.is_folder(path) else "the archive has no such file"
            fix = "an archive inside an archive must be unpacked" if "!/" in path else "check the path"
            raise ObjectMissing(f"cannot read {self._where(path)}: {what}", fix)
        return member

    def _where(self, path: str) -> str:
        """A member's address for messages, in one line."""
        return address(self.uri, path if path.isprintable() else repr(path)[1:-1])

    def _content(self, member: Member) -> bytes:
        """The content, not yet checked; of a file that is larger than it declares, one byte more than that."""
        raise NotImplementedError

    def _open(self, member: Member) -> IO[bytes]:
        raise NotImplementedError

    def _stream(self, member: Member) -> IO[bytes]:
        return self._open(member)


class _Zip(Archive):
    def __init__(
        self, source: Source, members: dict[str, Member], folders: Iterable[str], file: zipfile.ZipFile
    ) -> None:
        super().__init__(source, members, folders)
        self._file = file

    def _content(self, member: Member) -> bytes:
        if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with self._stream(member) as file:
                return file.read()
        data = self._compressed(member)
        if member.method == zipfile.ZIP_STORED:
            return data
        try:
            return zlib.decompressobj(-15).decompress(data, member.size + 1)
        except zlib.error as error:
            raise _damaged(self._where(member.name), _zlib_says(error)) from error

    def _compressed(self, member: Member) -> bytes:
        """The compressed bytes, with the local header before them in one read unless they are many."""
        head = _LOCAL_HEADER.size + len(member.raw) + _EXTRA
        data = self._source.read(
            member.start, member.start + head + (member.stored if member.stored <= _ONE_READ else 0)
        )
        start = self._content_start(member, data)
        content = data[start : start + member.stored]
        if len(content) == member.stored:
            return content
        return self._source.read(member.start + start, member.start + start + member.stored)

    def _content_start(self, member: Member, header: bytes) -> int:
        """Where the content begins, from the beginning of its local header."""
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise _damaged(self._where(member.name), f"no local header at byte {member.start}")
        _, name, extra = _LOCAL_HEADER.unpack_from(header)
        return _LOCAL_HEADER.size + int(name) + int(extra)

    def _open(self, member: Member) -> IO[bytes]:
        if member.method == zipfile.ZIP_STORED:
            header = self._source.read(member.start, member.start + _LOCAL_HEADER.size)
            start = member.start + self._content_start(member, header)
            return Window(self._source, start, start + member.stored).buffered()
        if member.size <= STREAM_ABOVE:
            return io.BytesIO(self.read(member.name))
        return self._stream(member)

    def _stream(self, member: Member) -> IO[bytes]:
        uri = self._where(member.name)
        if member.method not in _ZIP_METHODS:
            method = _ZIP_METHOD_NAMES.get(member.method, f"method {member.method}")
            raise StorageError(
                f"{uri} is compressed by {method}, which cannot be read", "make the zip again with deflate"
            )
        info = zipfile.ZipInfo(member.raw)
        info.orig_filename, info.header_offset, info.flag_bits = member.raw, member.start, member.flags
        info.compress_type, info.compress_size, info.file_size = member.method, member.stored, member.size
        info.CRC = member.crc or 0
        try:
            inner = self._file.open(info)
        except _ZIP_ERRORS as error:
            raise _damaged(uri, str(error)) from error
        return io.BufferedReader(_Guarded(inner, uri, member.size), 1 << 20)


class _Tar(Archive):
    def __init__(self, source: Source, members: dict[str, Member], folders: Iterable[str], data: Readable) -> None:
        super().__init__(source, members, folders)
        self._data = data

    def _content(self, member: Member) -> bytes:
        return self._data.read(member.start, member.start + member.size)

    def _open(self, member: Member) -> IO[bytes]:
        return Window(self._data, member.start, member.start + member.size).buffered()


def open_archive(source: Source) -> Archive:
    """Read an archive's table of contents. What it is follows from its content, not from its name.

    Raises:
        StorageError: it is no zip or tar, is damaged or encrypted, or has an entry that leads outside of it.
    """
    head = source.read(0, 512)
    if not head:
        raise StorageError(f"{source.uri} is empty", _DOWNLOAD_AGAIN)
    for magic, name in _REFUSED:
        if head.startswith(magic):
            raise StorageError(
                f"{source.uri} is compressed by {name}, which cannot be read in parts",
                "make a zip or tar.gz of its content, or unpack it and name the folder",
            )
    if head.startswith(b"PK"):
        return _open_zip(source)
    if head.startswith(b"\x1f\x8b"):
        return _open_tar(source, Inflated(source))
    if head[257:262] == b"ustar" or re.search(r"\.tar(\?|\Z)", source.uri, re.IGNORECASE):
        return _open_tar(source, source)
    raise StorageError(
        f"{source.uri} is not a zip or tar archive: it begins with {head[:16]!r}",
        f"it may be a server's message in place of the file; {_DOWNLOAD_AGAIN}",
    )


# -- zip -------------------------------------------------------------------------------------------------------------


def _open_zip(source: Source) -> Archive:
    try:
        file = zipfile.ZipFile(cast(IO[bytes], Window(source, 0, source.size)))
    except StorageError:
        raise
    except _ZIP_ERRORS as error:
        raise _cut_off(source.uri, f"{error}; a zip's directory is at its end") from error
    infos = file.infolist()
    _check_places(source, infos)
    members: dict[str, Member] = {}
    folders = []
    for info in infos:
        name = canonical(_zip_name(info), source.uri)
        if info.orig_filename.endswith("/"):
            folders.append(name)
        elif not _is_link(info):
            member = _zip_member(info, name, source.uri)
            if members.setdefault(name, member).etag != member.etag:
                raise StorageError(f"{source.uri} has two different files named {name!r}", "take one of them out")
    file.filelist.clear()  # the members say all that is needed
    file.NameToInfo.clear()
    return _Zip(source, members, folders, file)


def _check_places(source: Source, infos: list[zipfile.ZipInfo]) -> None:
    """No file lies in another one, or behind the end."""
    order = sorted(infos, key=lambda i: i.header_offset)
    ends = [i.header_offset + _LOCAL_HEADER.size + i.compress_size for i in order]
    for end, (info, following) in zip(ends, itertools.pairwise(order), strict=False):
        if end > following.header_offset:
            raise _damaged(source.uri, f"its entries {info.filename!r} and {following.filename!r} overlap")
    if order and (order[0].header_offset < 0 or ends[-1] > source.size):
        raise _cut_off(source.uri, f"its entry {order[-1].filename!r} lies outside of it")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name; macOS writes UTF-8 without saying so."""
    name = info.orig_filename
    if name.isascii() or info.flag_bits & _UTF8_NAME:
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _is_link(info: zipfile.ZipInfo) -> bool:
    unix = 3
    return info.create_system == unix and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)


def _zip_member(info: zipfile.ZipInfo, name: str, uri: str) -> Member:
    if info.flag_bits & _ENCRYPTED:
        raise StorageError(
            f"{uri} is encrypted: {name!r} needs a password", "unpack it with the password, and name the folder"
        )
    etag = f"{info.CRC:08x}-{info.file_size}"
    start, stored, method = info.header_offset, info.compress_size, info.compress_type
    return Member(name, info.file_size, etag, start, info.CRC, stored, method, info.orig_filename, info.flag_bits)


# -- tar -------------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Place and size of a file in a tar, and what its tag is made of."""

    start: int
    size: int
    stamp: str
    crc: int | None


class _TarFile(io.BufferedReader):
    """What ``tarfile`` reads headers from."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Bytes of a header, of which a damaged archive may declare any number."""
        if size is None or not 0 <= size <= _MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _open_tar(source: Source, data: Readable) -> Archive:
    with _TarFile(Window(data, 0, sys.maxsize), data.block) as file:
        try:
            found, folders = _scan_tar(source.uri, file, with_crc=data is not source)
        except StorageError:
            raise
        except _TAR_ERRORS as error:
            raise _damaged(source.uri, str(error), "a tar archive") from error
    alike = len({f.stamp for f in found.values() if f.crc is None}) == 1  # the times tell nothing
    members = {}
    for name, f in found.items():
        if f.crc is not None:
            etag = f"{f.crc:08x}-{f.size}"
        else:
            etag = f"{f.size}-{f.stamp}" + (f"-{source.etag}" if alike else "")
        members[name] = Member(name, f.size, etag, f.start, f.crc)
    return _Tar(source, members, folders, data)


def _scan_tar(uri: str, file: IO[bytes], with_crc: bool) -> tuple[dict[str, _Found], list[str]]:
    """Files and folders of a tar from its headers; with checksums, all of it is read."""
    found: dict[str, _Found] = {}
    folders = []
    with tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape") as tar:
        end = 0
        while (info := tar.next()) is not None:
            if info.size < 0 or tar.offset <= end:
                raise _damaged(uri, f"a header of a negative size at byte {info.offset}")
            end = tar.offset
            tar.members.clear()  # type: ignore[attr-defined]  # else all of them would be kept
            name = canonical(info.name, uri)
            target = found.get(canonical(info.linkname, uri)) if info.islnk() else None
            found.pop(name, None)  # the last entry of a name holds
            if info.isdir():
                folders.append(name)
            elif target is not None:
                found[name] = target
            elif info.issparse():
                raise StorageError(f"{uri} holds a sparse file, {name!r}", "make the archive again without --sparse")
            elif info.isreg():
                crc = _crc(file, info.offset_data, info.size, uri) if with_crc else None
                found[name] = _Found(info.offset_data, info.size, str(info.mtime), crc)
        _check_end(uri, file, end)
    while with_crc and file.read(1 << 20):  # to gzip's own checksum, which is at the end
        pass
    return found, folders


def _crc(file: IO[bytes], start: int, size: int, uri: str) -> int:
    file.seek(start)
    crc = 0
    while size:
        data = file.read(min(size, 1 << 20))
        if not data:
            raise _cut_off(uri, "its last file is incomplete")
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _check_end(uri: str, file: IO[bytes], end: int) -> None:
    """A tar ends with a block of zeros; ``tarfile`` also stops, without a word, where it is cut off or damaged."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _cut_off(uri, "the block that marks its end is missing")
    if any(block):
        raise _damaged(uri, f"no header at byte {end}")


# -- entries ---------------------------------------------------------------------------------------------------------


def canonical(name: str, uri: str) -> str:
    """An entry's name as a path in the archive; the empty path is the root.

    Raises:
        StorageError: it leads outside of the archive, or is not UTF-8.
    """
    if _OUTSIDE.search(name):
        raise StorageError(
            f"{uri} has an entry that may lead outside of it: {name!r}",
            "make it again from inside its folder, with relative names and forward slashes",
        )
    if not name.isascii() and not _is_utf8(name):
        raise StorageError(f"{uri} has an entry whose name is not UTF-8: {name!r}", "rename that file")
    if name.count("/") > _MAX_DEPTH:
        raise StorageError(f"{uri} has an entry more than {_MAX_DEPTH} folders deep: {name[:80]!r}", _UNPACK)
    if _LOOSE.search(name):
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tree(names: Iterable[str], folders: Iterable[str]) -> dict[str, list[str]]:
    """Sorted names in each folder."""
    children: dict[str, set[str]] = {"": set()}

    def folder(path: str) -> set[str]:
        found = children.get(path)
        if found is None:
            found = children[path] = set()
            above, _, name = path.rpartition("/")
            folder(above).add(name)
        return found

    for path in folders:
        folder(path)
    for path in names:
        above, _, name = path.rpartition("/")
        folder(above).add(name)
    return {path: sorted(inside) for path, inside in children.items()}


def _zlib_says(error: zlib.error) -> str:
    return str(error).rpartition(": ")[2]


def _damaged(uri: str, what: str, kind: str = "") -> StorageError:
    return StorageError(f"{uri} is {f'not {kind}, or ' if kind else ''}damaged: {what}", _DOWNLOAD_AGAIN)


def _cut_off(uri: str, what: str) -> StorageError:
    return StorageError(f"{uri} is cut off or damaged: {what}", _DOWNLOAD_AGAIN)


# -- open archives ---------------------------------------------------------------------------------------------------


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.archive: Archive | None = None
        self.looked = 0.0


class Cache:
    """The archives that this process has open; the one not used for longest is let go first.

    Args:
        open_source: opens an archive file as it is now.
        look: tag of an archive file as it is now.
    """

    def __init__(self, open_source: Callable[[str], Source], look: Callable[[str], str]) -> None:
        self._open_source, self._look = open_source, look
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str, age_s: float = math.inf) -> Archive:
        """The archive, as it was at most ``age_s`` seconds ago; opened if it is not open, or has changed."""
        with self._lock:
            slot = self._slots.setdefault(uri, _Slot())
            self._slots.move_to_end(uri)
            if len(self._slots) > OPEN_ARCHIVES:
                self._slots.popitem(last=False)
        with slot.lock:
            now = time.monotonic()
            if slot.archive is not None and now - slot.looked > age_s:
                slot.looked = now
                if self._look(uri) != slot.archive.etag:
                    slot.archive = None
            if slot.archive is None:
                slot.looked = now
                slot.archive = open_archive(self._open_source(uri))
            return slot.archive
