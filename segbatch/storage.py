"""The only code that touches fsspec: list, read, put-if-absent, atomic replacement, local and remote alike.

A URI is an absolute local path, ``scheme://...``, or a member's: ``ARCHIVE!/path``, a file or folder in a zip or tar
that is itself local or remote (see ``archives``). Members can be listed and read, not written.

Credentials and endpoints come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_ENDPOINT_URL``, ...), never from configuration.
"""

import contextlib
import errno
import fcntl
import functools
import io
import math
import os
import platform
import random
import stat as stat_module
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from segbatch import archives
from segbatch.errors import (
    ConfigError,
    ObjectExists,
    ObjectMissing,
    SegbatchError,
    StorageError,
    TransientStorageError,
)

if TYPE_CHECKING:
    import fsspec

T = TypeVar("T")

ATTEMPTS = 5
"""How often a transient failure is tried before it is an error."""

_BACK_OFF_S = 0.4
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_BLOCK = 4 << 20
_LOOK_AGAIN_S = 5.0
_TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A listed object: its URI, its version tag (store's etag, else size and mtime) and its size in bytes."""

    uri: str
    etag: str
    size: int


def resolve(uri: str) -> str:
    """Absolute form of a URI: local paths become absolute, ``file://`` is dropped, no trailing slash.

    The root of an archive is ``ARCHIVE!/``, with the slash.
    """
    member = archives.split(uri)
    if member:
        return archives.address(resolve(member[0]), archives.normal(member[1]))
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if is_local(uri):
        return str(Path(os.path.abspath(os.path.expanduser(uri))))
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine; what is inside an archive is not."""
    return "://" not in uri and not archives.split(uri)


def is_archive(uri: str) -> bool:
    """Whether the URI names an archive: by its ending, and a local folder is none. Nothing remote is asked.

    Archives of kinds that cannot be read (``.tar.xz``, ``.7z``, ...) count too: opening them says what to do.
    """
    if archives.split(uri) or not archives.is_named_like_one(uri):
        return False
    return not (is_local(uri) and os.path.isdir(uri))


def archive_root(uri: str) -> str:
    """URI of the folder that an archive's content is: ``ARCHIVE!/``."""
    return archives.address(uri)


def join(root: str, *parts: str) -> str:
    """Child of ``root``."""
    return "/".join([root.rstrip("/"), *(p.strip("/") for p in parts)])


def name_of(uri: str) -> str:
    """Last component of a URI; the root of an archive is named like the archive."""
    return uri.rstrip("/").removesuffix("!").rsplit("/", 1)[-1]


def relative(uri: str, root: str) -> str:
    """Path of ``uri`` below ``root``."""
    return uri.removeprefix(root.rstrip("/") + "/")


@functools.cache
def _remote(scheme: str) -> "fsspec.AbstractFileSystem":
    """The process's filesystem for a scheme. Never shared over a fork: actors make their own."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
        }
    try:
        filesystem = fsspec.filesystem(scheme, **options)
        filesystem.retries = 1  # s3fs's own; _attempt repeats, and nothing below it, or the attempts would multiply
        return filesystem
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot use {scheme}:// addresses: {error}", "install the fsspec driver of that store"
        ) from error


def _split(uri: str) -> tuple["fsspec.AbstractFileSystem", str]:
    scheme, _, path = uri.partition("://")
    filesystem = _remote(scheme)
    return filesystem, uri if _is_http(uri) else path


def _translate(error: Exception, uri: str, doing: str) -> SegbatchError:
    """The library's exception as one of ours, with what to do about it."""
    if _is_http(uri) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec calls every failure "not found"
    code, status = getattr(error, "errno", None), _http_status(error)
    if isinstance(error, FileNotFoundError) or (_is_http(uri) and status == 404):
        what = "the bucket" if "bucket does not exist" in str(error) else "it"
        return ObjectMissing(f"cannot {doing} {uri}: {what} does not exist", "check the path or URL")
    name = type(error).__name__
    if name == "FileExpired" or (status == 412 and doing == "read"):
        return _changed(uri)
    if isinstance(error, FileExistsError) or status == 412:
        return ObjectExists(f"{uri} exists already")
    if code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return StorageError(
            f"cannot {doing} {uri}: {os.strerror(code)}",
            "free space or raise the limit, then run the same command again",
        )
    if isinstance(error, PermissionError) or code in (errno.EROFS, errno.EACCES) or status in (401, 403):
        return StorageError(
            f"cannot {doing} {uri}: permission denied", "choose a place you may use, or mend its permissions or keys"
        )
    if isinstance(error, (NotADirectoryError, IsADirectoryError)):
        return StorageError(
            f"cannot {doing} {uri}: {os.strerror(code or errno.ENOTDIR)}", "a file is in the way; choose another path"
        )
    if name == "NoCredentialsError":
        return StorageError(f"cannot {doing} {uri}: no credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, ValueError) and "range requests" in str(error):
        return StorageError(f"cannot {doing} {uri}: the server does not serve parts of a file", "download it first")
    if _is_transient(error):
        return TransientStorageError(
            f"cannot {doing} {uri}: {name}: {error}", "the store may be down; run the same command again later"
        )
    return StorageError(f"cannot {doing} {uri}: {name}: {error}", "see the message of the store")


def _changed(uri: str) -> StorageError:
    """Transient: it is no fault of the samples in it, which the next run lists and reads anew."""
    return TransientStorageError(f"{uri} has changed since it was listed or opened", "run the same command again")


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _http_status(error: BaseException) -> int:
    """Status of the reply behind an exception of botocore, s3fs or aiohttp; 0 where there is none."""
    if isinstance(getattr(error, "status", None), int):
        return int(error.status)  # type: ignore[attr-defined]
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    names = {c.__name__ for c in type(error).__mro__}
    transient = {
        "ClientError",
        "HTTPClientError",
        "ConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "EndpointConnectionError",
        "ClientConnectionError",
        "FSTimeoutError",
    }
    status = _http_status(error)
    if status:
        return status >= 500 or status in (408, 409, 429)
    code = getattr(error, "errno", None)
    return bool(names & transient) or code in (errno.EIO, errno.EBUSY, errno.ESTALE)


def _attempt(call: Callable[[], T], uri: str, doing: str) -> T:
    """Run ``call``; transient failures are repeated with exponential back-off and jitter."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except SegbatchError:
            raise
        except Exception as error:  # botocore and aiohttp raise their own trees
            ours = _translate(error, uri, doing)
            if not ours.retryable or attempt == ATTEMPTS - 1:
                raise ours from error
        time.sleep(random.uniform(0, _BACK_OFF_S * 2**attempt))
    raise AssertionError("unreachable")


def read_bytes(uri: str) -> bytes:
    """The whole object.

    Raises:
        ObjectMissing: it is not there.
        StorageError: it cannot be read.
    """
    if member := archives.split(uri):
        return _archive(member[0]).read(member[1])
    if is_local(uri):
        return _attempt(lambda: Path(uri).read_bytes(), uri, "read")
    filesystem, path = _split(uri)
    return _attempt(lambda: bytes(filesystem.cat_file(path)), uri, "read")


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes ``start <= i < stop`` of an object; fewer, or none, where it ends before.

    Of a compressed member all that stands before them is inflated too.

    Raises:
        ObjectMissing: it is not there.
        StorageError: it cannot be read, or the server does not serve parts.
    """
    if start < 0 or stop < start:
        raise ValueError(f"bytes {start} to {stop} are no range")
    if archives.split(uri):
        with open_input(uri) as file:
            file.seek(start)
            return file.read(stop - start)
    if is_local(uri):
        return _attempt(lambda: _read_range_local(uri, start, stop), uri, "read")
    return _attempt(lambda: _read_range_remote(uri, start, stop), uri, "read")


def _read_range_local(uri: str, start: int, stop: int) -> bytes:
    with open(uri, "rb", buffering=0) as file:
        return _pread(file.fileno(), start, min(stop, os.fstat(file.fileno()).st_size))


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    """Bytes of an open file; the system gives at most 2 GiB at a time."""
    pieces = []
    while start < stop and (data := os.pread(descriptor, stop - start, start)):
        pieces.append(data)
        start += len(data)
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]


def _read_range_remote(uri: str, start: int, stop: int) -> bytes:
    filesystem, path = _split(uri)
    options = {"headers": {"Accept-Encoding": "identity"}} if _is_http(uri) else {}
    try:
        data = bytes(filesystem.cat_file(path, start=start, end=stop, **options)) if start < stop else b""
    except Exception as error:
        if _http_status(error) == 416:  # the object ends before
            return b""
        raise
    if len(data) > stop - start:
        raise ValueError("the reply to one of the range requests was the whole file")
    return data


def open_input(uri: str) -> IO[bytes]:
    """A seekable binary reader, for Parquet footers and row groups. The caller closes it.

    Of a compressed member, reading backwards may begin again at its start.
    """
    if member := archives.split(uri):
        return _archive(member[0]).open(member[1])
    if is_local(uri):
        return _attempt(lambda: open(uri, "rb"), uri, "read")
    filesystem, path = _split(uri)
    return _persistent(_attempt(lambda: filesystem.open(path, "rb", block_size=_BLOCK), uri, "read"), uri)


def open_stream(uri: str) -> IO[bytes]:
    """A binary reader to be read from the beginning to the end in pieces, in bounded memory. The caller closes it."""
    if member := archives.split(uri):
        return _archive(member[0]).stream(member[1])
    return open_input(uri)


def _persistent(file: IO[bytes], uri: str) -> IO[bytes]:
    """An open remote file whose later reads are repeated and translated like every other call."""
    cache = getattr(file, "cache", None)
    if cache is not None and getattr(cache, "fetcher", None) is not None:
        fetch = cache.fetcher
        cache.fetcher = lambda start, stop: _attempt(lambda: fetch(start, stop), uri, "read")
    return file


def stat(uri: str) -> ObjectInfo | None:
    """The object's tag and size, or None when it is not there."""
    try:
        if member := archives.split(uri):
            found = _seen(member[0]).find(member[1])
            return _member_info(member[0], found) if found else None
        if is_local(uri):
            return _attempt(lambda: _local_info(uri, os.stat(uri)), uri, "look at")
        return _remote_info(uri.partition("://")[0], _remote_entry(uri))
    except ObjectMissing:
        return None


def exists(uri: str) -> bool:
    """Whether the object or folder is there."""
    if archives.split(uri):
        return stat(uri) is not None or is_folder(uri)
    if is_local(uri):
        return os.path.exists(uri)
    filesystem, path = _split(uri)
    return bool(_attempt(lambda: filesystem.exists(path), uri, "look at"))


def is_folder(uri: str) -> bool:
    """Whether the URI is a folder, or a prefix with something under it."""
    if member := archives.split(uri):
        try:
            return _seen(member[0]).is_folder(member[1])
        except ObjectMissing:
            return False
    if is_local(uri):
        return os.path.isdir(uri)
    if _is_http(uri) and is_archive(uri):  # else all of it would be fetched, to look for links in it
        return False
    filesystem, path = _split(uri)
    return bool(_attempt(lambda: filesystem.isdir(path), uri, "look at"))


def _remote_entry(uri: str) -> dict[str, Any]:
    filesystem, path = _split(uri)
    entry: dict[str, Any] = _attempt(lambda: filesystem.info(path, **_uncached(uri)), uri, "look at")
    return entry


def _uncached(uri: str) -> dict[str, bool]:
    """Arguments for looking past s3fs's own cache; other filesystems do not know them."""
    return {"refresh": True} if uri.startswith("s3://") else {}


def _local_info(uri: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(uri, f"{found.st_size}-{found.st_mtime_ns}", found.st_size)


def _remote_info(scheme: str, entry: dict[str, Any]) -> ObjectInfo:
    size = int(entry.get("size") or 0)
    times = (entry[k] for k in ("LastModified", "Last-Modified", "mtime") if k in entry)
    tag = entry.get("ETag") or entry.get("etag") or f"{size}-{next(times, '')}"
    return ObjectInfo(_remote_uri(scheme, entry), str(tag).strip('"'), size)


def _remote_uri(scheme: str, entry: dict[str, Any]) -> str:
    name = str(entry["name"])
    return name if "://" in name else f"{scheme}://{name}"


def _member_info(archive: str, member: archives.Member) -> ObjectInfo:
    return ObjectInfo(archives.address(archive, member.name), member.etag, member.size)


def list_files(root: str, suffixes: tuple[str, ...] = (), recursive: bool = True) -> Iterator[ObjectInfo]:
    """Files below ``root`` in path order (by folder), as a stream; hidden files and folders are left out.

    In an archive ``__MACOSX`` is left out too, and so are links.

    Args:
        root: folder or prefix; a root that does not exist lists as empty.
        suffixes: lower-case endings to keep; all when empty.
        recursive: also look into sub-folders.
    """
    keep = (lambda n: n.lower().endswith(suffixes)) if suffixes else (lambda n: True)
    if archives.split(root):
        walk = _walk_archive(root, recursive)
    else:
        walk = _walk_local(root, recursive) if is_local(root) else _walk_remote(root, recursive)
    return (i for i in walk if keep(i.uri))


def list_folders(root: str) -> list[str]:
    """Names of the folders directly in ``root``, sorted; what ``list_files`` leaves out is left out.

    Args:
        root: folder or prefix; one that does not exist has none.
    """
    if member := archives.split(root):
        try:
            return _archive(member[0], 0.0).folders(member[1])
        except ObjectMissing:
            return []
    if is_local(root):
        return [entry.name for entry in _local_entries(root) if entry.is_dir()]
    return [name_of(str(e["name"])) for e in _remote_entries(root) if e["type"] == "directory"]


def _walk_archive(root: str, recursive: bool) -> Iterator[ObjectInfo]:
    member = archives.split(root)
    assert member
    try:
        archive = _archive(member[0], 0.0)
    except ObjectMissing:
        return
    for found in archive.files(member[1], recursive):
        yield _member_info(member[0], found)


def _walk_local(root: str, recursive: bool, above: tuple[tuple[int, int], ...] = ()) -> Iterator[ObjectInfo]:
    try:
        here = os.stat(root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _translate(error, root, "list") from error
    if (here.st_dev, here.st_ino) in above:  # a link back to a folder that we are in
        return
    above = (*above, (here.st_dev, here.st_ino))
    for entry in _local_entries(root):
        try:
            found = entry.stat()
        except FileNotFoundError:  # removed since, or a dangling link: not an input
            continue
        except OSError as error:
            raise _translate(error, entry.path, "look at") from error
        if stat_module.S_ISDIR(found.st_mode):
            if recursive:
                yield from _walk_local(entry.path, recursive, above)
        elif stat_module.S_ISREG(found.st_mode):  # a pipe or a device would be read for ever
            yield _local_info(entry.path, found)


def _local_entries(root: str) -> Iterator["os.DirEntry[str]"]:
    """What is in a folder and not hidden, by name."""
    try:
        entries = sorted(os.scandir(root), key=lambda e: e.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _translate(error, root, "list") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.name.isprintable() and _is_undecodable(entry.name):
            raise StorageError(f"{root} holds a file name that is not UTF-8: {entry.name!r}", "rename that file")
        yield entry


def _is_undecodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _walk_remote(root: str, recursive: bool) -> Iterator[ObjectInfo]:
    scheme = root.partition("://")[0]
    for entry in _remote_entries(root):
        if entry["type"] != "directory":
            yield _remote_info(scheme, entry)
        elif recursive:
            yield from _walk_remote(_remote_uri(scheme, entry), recursive)


def _remote_entries(root: str) -> Iterator[dict[str, Any]]:
    """What is directly under a prefix and not hidden, by name."""
    filesystem, path = _split(root)
    try:
        entries = _attempt(lambda: filesystem.ls(path, detail=True, **_uncached(root)), root, "list")
    except ObjectMissing:
        return
    for entry in sorted(entries, key=lambda e: str(e["name"])):
        if not name_of(str(entry["name"])).startswith(".") and str(entry["name"]).rstrip("/") != path.rstrip("/"):
            yield entry


# -- archives --------------------------------------------------------------------------------------------------------


class _LocalSource:
    """An archive on this machine. A read from it fails once the file at its path is another one, or was written to."""

    block = 256 << 10

    def __init__(self, uri: str) -> None:
        descriptor = os.open(uri, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        self._descriptor, self._found = descriptor, os.fstat(descriptor)
        if not stat_module.S_ISREG(self._found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
        self.uri, self.size, self.etag = uri, self._found.st_size, _local_info(uri, self._found).etag

    def read(self, start: int, stop: int) -> bytes:
        """See ``archives.Readable``."""
        return _attempt(lambda: self._read(start, min(stop, self.size)), self.uri, "read")

    def _read(self, start: int, stop: int) -> bytes:
        data = _pread(self._descriptor, start, stop)
        now = os.stat(self.uri)
        if _version(now) != _version(self._found):
            raise _changed(self.uri)
        return data


def _version(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _RemoteSource:
    """An archive in a store. Requests are conditional on its version; a store that cannot do that is asked before."""

    block = _BLOCK

    def __init__(self, uri: str) -> None:
        entry = _remote_entry(uri)
        if entry.get("size") is None or entry.get("partial") is False:
            raise StorageError(f"cannot read {uri}: the server does not serve parts of a file", "download it first")
        info = _remote_info(uri.partition("://")[0], entry)
        self.uri, self.etag, self.size = uri, info.etag, info.size
        headers = _conditions(entry) if _is_http(uri) else {}
        self._is_conditional = bool(headers) or uri.startswith("s3://")
        self._fetch = self._fetcher({"headers": {**headers, "Accept-Encoding": "identity"}} if _is_http(uri) else {})

    def _fetcher(self, options: dict[str, Any]) -> Callable[[int, int], bytes]:
        filesystem, path = _split(self.uri)
        file = _attempt(lambda: filesystem.open(path, "rb", cache_type="none", **options), self.uri, "read")
        opened = getattr(file, "details", {}).get("ETag") or self.etag
        if str(opened).strip('"') != self.etag:  # s3fs will ask for what it has opened
            raise _changed(self.uri)
        fetch: Callable[[int, int], bytes] | None = getattr(getattr(file, "cache", None), "fetcher", None)
        return fetch or (lambda start, stop: bytes(filesystem.cat_file(path, start=start, end=stop)))

    def read(self, start: int, stop: int) -> bytes:
        """See ``archives.Readable``."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        if not self._is_conditional and _tag(self.uri) != self.etag:
            raise _changed(self.uri)
        data = _attempt(lambda: self._fetch(start, stop), self.uri, "read")
        if len(data) != stop - start:
            raise TransientStorageError(
                f"cannot read {self.uri}: {len(data)} bytes came instead of {stop - start}",
                "run the same command again",
            )
        return data


def _conditions(entry: dict[str, Any]) -> dict[str, str]:
    """Headers that make a server refuse to serve another version (RFC 9110, 13.1)."""
    tag = str(entry.get("ETag", ""))
    if tag and not tag.startswith("W/"):
        return {"If-Match": tag}
    return {"If-Unmodified-Since": str(entry["Last-Modified"])} if "Last-Modified" in entry else {}


def _source(uri: str) -> archives.Source:
    """The archive file as it is now."""
    return _attempt(lambda: _LocalSource(uri), uri, "read") if is_local(uri) else _RemoteSource(uri)


def _tag(uri: str) -> str:
    found = stat(uri)
    if found is None:
        raise ObjectMissing(f"cannot read {uri}: it does not exist", "check the path or URL")
    return found.etag


_archives = archives.Cache(_source, _tag)


def _archive(uri: str, age_s: float = math.inf) -> archives.Archive:
    """The open archive, as it was at most ``age_s`` ago. Reading takes what was listed, and fails if it has changed."""
    return _archives.get(uri, age_s)


def _seen(uri: str) -> archives.Archive:
    """The open archive, for a question about a single member: a store is not asked each time if it has changed."""
    return _archive(uri, 0.0 if is_local(uri) else _LOOK_AGAIN_S)


def _check_is_no_member(uri: str) -> None:
    if archives.split(uri):
        raise StorageError(f"cannot write {uri}: archives are only read", "choose a folder or a bucket")


def create(uri: str, data: bytes) -> None:
    """Put if absent: of any number of writers exactly one succeeds, and no reader ever sees a part of it.

    Raises:
        ObjectExists: the key is taken (perhaps by this very writer, when a reply was lost).
        StorageError: it cannot be written; nothing is left behind.
    """
    _check_is_no_member(uri)
    if is_local(uri):
        _attempt(lambda: _create_local(uri, data), uri, "write")
        return
    filesystem, path = _split(uri)
    _attempt(lambda: filesystem.pipe_file(path, data, mode="create"), uri, "write")


def replace(uri: str, data: bytes, etag: str | None = None) -> None:
    """Overwrite atomically; readers see the old object or the new one.

    Args:
        uri: the object.
        data: its new content.
        etag: when given, only if the object still has this tag.

    Raises:
        ObjectExists: the object has another tag by now.
    """
    _check_is_no_member(uri)
    if is_local(uri):
        _attempt(lambda: _replace_local(uri, data, etag), uri, "write")
        return
    filesystem, path = _split(uri)
    if etag is None or not uri.startswith("s3://"):
        _attempt(lambda: filesystem.pipe_file(path, data), uri, "write")
        return
    bucket, key, _ = filesystem.split_path(path)

    match = {"IfMatch": f'"{etag}"'}
    try:
        _attempt(lambda: filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **match), uri, "write")
    except (ObjectExists, ObjectMissing) as error:
        raise ObjectExists(f"{uri} was changed by another writer") from error


def _write_temporary(uri: str, data: bytes) -> str:
    """Write ``data`` to a temporary file beside ``uri`` and flush it to the disk; on failure nothing is left."""
    folder = os.path.dirname(uri)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:  # would read as "the key is taken"
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from error
    except FileNotFoundError as error:  # a filesystem that takes no new folders, such as /proc
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder) from error
    temporary = os.path.join(folder, f".{platform.node()}.{os.getpid()}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def _create_local(uri: str, data: bytes) -> None:
    temporary = _write_temporary(uri, data)
    try:
        os.link(temporary, uri)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            _rename_noreplace(temporary, uri)
            return
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(uri)


def _rename_noreplace(source: str, target: str) -> None:
    """renameat2(RENAME_NOREPLACE), for filesystems without hard links."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, noreplace = -100, 1
    if libc.renameat2(at_fdcwd, os.fsencode(source), at_fdcwd, os.fsencode(target), noreplace) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        raise FileExistsError(code, os.strerror(code), target)
    raise StorageError(
        f"{os.path.dirname(target)} has neither hard links nor renameat2: {os.strerror(code)}",
        "choose an output folder on another filesystem; without either, two writers could both succeed",
    )


def _replace_local(uri: str, data: bytes, etag: str | None) -> None:
    temporary = _write_temporary(uri, data)
    try:
        with _locked(os.path.dirname(uri)):
            if etag is not None:
                found = stat(uri)
                if found is None or found.etag != etag:
                    raise ObjectExists(f"{uri} was changed by another writer")
            os.replace(temporary, uri)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(uri)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """An exclusive lock on a folder among the processes of this machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync_folder(uri: str) -> None:
    descriptor = os.open(os.path.dirname(uri), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(uri: str) -> None:
    """Remove an object; it is no error when it is not there."""
    _check_is_no_member(uri)
    with contextlib.suppress(ObjectMissing):
        if is_local(uri):
            _attempt(lambda: os.unlink(uri), uri, "delete")
            return
        filesystem, path = _split(uri)
        _attempt(lambda: filesystem.rm_file(path), uri, "delete")


def remove_empty_folder(uri: str) -> None:
    """Remove a local folder if nothing is in it; elsewhere folders do not exist."""
    if is_local(uri):
        with contextlib.suppress(OSError):
            os.rmdir(uri)


def sweep_temporary(root: str, older_than_s: float = 3600.0) -> int:
    """Remove temporary files that killed local writers left behind; returns how many. Remote stores have none.

    A writer on this machine is dead when its process is gone, any other one when its file is ``older_than_s``.
    """
    if not is_local(root):
        return 0
    swept = 0
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith(".") and name.endswith(_TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    if _writer_is_gone(name) or time.time() - os.stat(path).st_mtime > older_than_s:
                        os.unlink(path)
                        swept += 1
    return swept


def _writer_is_gone(name: str) -> bool:
    """Whether a temporary file's writer was a process of this machine that has ended."""
    node, pid, *_ = [*name[1:].rsplit(".", 3), ""]
    return (
        node == platform.node() and pid.isdigit() and os.path.exists("/proc/1") and not os.path.exists(f"/proc/{pid}")
    )


def check_writable(root: str) -> None:
    """Prove before any work that ``root`` can be written and that put-if-absent is honoured there.

    Raises:
        StorageError: it cannot be written, or the store ignores conditional writes.
    """
    probe = join(root, ".segbatch", f"probe-{uuid.uuid4().hex}")
    try:
        with contextlib.suppress(ObjectExists):  # nobody else knows the name: only the reply was lost
            create(probe, b"1")
        try:
            create(probe, b"2")
        except ObjectExists:
            return
        raise StorageError(
            f"{root} ignores put-if-absent (If-None-Match): two writers could both succeed",
            "use a store that honours conditional writes (AWS S3, SeaweedFS, Garage, R2 do)",
        )
    finally:
        with contextlib.suppress(StorageError):
            delete(probe)


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path) for pyarrow.dataset; not for members."""
    import pyarrow.fs

    if archives.split(uri):
        raise StorageError(f"cannot query {uri}: tables in an archive are not read", "unpack the archive")

    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    filesystem, path = _split(uri)
    scheme = uri.partition("://")[0]

    class Handler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
        """Opens files as ``open_input`` does."""

        def open_input_file(self, path: str) -> Any:
            """A seekable file."""
            return pyarrow.PythonFile(open_input(f"{scheme}://{path}"), mode="r")

    return pyarrow.fs.PyFileSystem(Handler(filesystem)), path


def read_lines(uri: str) -> list[str]:
    """Lines of a UTF-8 text object, without line ends.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        return read_bytes(uri).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{uri} is not UTF-8 text: {error.reason} at byte {error.start}", "save it as UTF-8"
        ) from error


def buffer() -> io.BytesIO:
    """Where a result is put together before its one PUT (shards stay well under 1 GB)."""
    return io.BytesIO()


def read_many(uris: Iterable[str]) -> list[bytes]:
    """Several small objects at once, in order; remote reads overlap."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read_bytes, uris))
