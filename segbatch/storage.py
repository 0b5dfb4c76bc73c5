"""The only code that touches fsspec: list, read, put-if-absent, atomic replacement, local and remote alike.

A URI is an absolute local path or ``scheme://...``. Credentials and endpoints come from the environment
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, ...), never from configuration.
"""

import contextlib
import errno
import fcntl
import functools
import io
import os
import platform
import random
import stat as stat_module
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

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
_TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A listed object: its URI, its version tag (store's etag, else size and mtime) and its size in bytes."""

    uri: str
    etag: str
    size: int


def resolve(uri: str) -> str:
    """Absolute form of a URI: local paths become absolute, ``file://`` is dropped, no trailing slash."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if is_local(uri):
        return str(Path(os.path.abspath(os.path.expanduser(uri))))
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return "://" not in uri


def join(root: str, *parts: str) -> str:
    """Child of ``root``."""
    return "/".join([root.rstrip("/"), *(p.strip("/") for p in parts)])


def name_of(uri: str) -> str:
    """Last component of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


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
    return filesystem, path if scheme not in ("http", "https") else uri


def _translate(error: Exception, uri: str, doing: str) -> SegbatchError:
    """The library's exception as one of ours, with what to do about it."""
    code = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        what = "the bucket" if "bucket does not exist" in str(error) else "it"
        return ObjectMissing(f"cannot {doing} {uri}: {what} does not exist", "check the path or URL")
    if isinstance(error, FileExistsError) or _http_status(error) == 412:
        return ObjectExists(f"{uri} exists already")
    if code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return StorageError(
            f"cannot {doing} {uri}: {os.strerror(code)}",
            "free space or raise the limit, then run the same command again",
        )
    if isinstance(error, PermissionError) or code in (errno.EROFS, errno.EACCES):
        return StorageError(
            f"cannot {doing} {uri}: permission denied", "choose a place you may use, or mend its permissions or keys"
        )
    if isinstance(error, (NotADirectoryError, IsADirectoryError)):
        return StorageError(
            f"cannot {doing} {uri}: {os.strerror(code or errno.ENOTDIR)}", "a file is in the way; choose another path"
        )
    name = type(error).__name__
    if name == "NoCredentialsError":
        return StorageError(f"cannot {doing} {uri}: no credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if _is_transient(error):
        return TransientStorageError(
            f"cannot {doing} {uri}: {name}: {error}", "the store may be down; run the same command again later"
        )
    return StorageError(f"cannot {doing} {uri}: {name}: {error}", "see the message of the store")


def _http_status(error: BaseException) -> int:
    """Status of the S3 reply behind an exception of botocore or s3fs; 0 where there is none."""
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
    if is_local(uri):
        return _attempt(lambda: Path(uri).read_bytes(), uri, "read")
    filesystem, path = _split(uri)
    return _attempt(lambda: bytes(filesystem.cat_file(path)), uri, "read")


def open_input(uri: str) -> IO[bytes]:
    """A seekable binary reader, for Parquet footers and row groups. The caller closes it."""
    if is_local(uri):
        return _attempt(lambda: open(uri, "rb"), uri, "read")
    filesystem, path = _split(uri)
    return _persistent(_attempt(lambda: filesystem.open(path, "rb", block_size=4 << 20), uri, "read"), uri)


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
        if is_local(uri):
            return _attempt(lambda: _local_info(uri, os.stat(uri)), uri, "look at")
        filesystem, path = _split(uri)
        entry = _attempt(lambda: filesystem.info(path, refresh=True), uri, "look at")
        return _remote_info(uri.partition("://")[0], entry)
    except ObjectMissing:
        return None


def exists(uri: str) -> bool:
    """Whether the object or folder is there."""
    if is_local(uri):
        return os.path.exists(uri)
    filesystem, path = _split(uri)
    return bool(_attempt(lambda: filesystem.exists(path), uri, "look at"))


def is_folder(uri: str) -> bool:
    """Whether the URI is a folder, or a prefix with something under it."""
    if is_local(uri):
        return os.path.isdir(uri)
    filesystem, path = _split(uri)
    return bool(_attempt(lambda: filesystem.isdir(path), uri, "look at"))


def _local_info(uri: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(uri, f"{found.st_size}-{found.st_mtime_ns}", found.st_size)


def _remote_info(scheme: str, entry: dict[str, Any]) -> ObjectInfo:
    size = int(entry.get("size") or 0)
    tag = entry.get("ETag") or entry.get("etag") or f"{size}-{entry.get('LastModified', entry.get('mtime', ''))}"
    name = str(entry["name"])
    return ObjectInfo(name if "://" in name else f"{scheme}://{name}", str(tag).strip('"'), size)


def list_files(root: str, suffixes: tuple[str, ...] = (), recursive: bool = True) -> Iterator[ObjectInfo]:
    """Files below ``root`` in path order (by folder), as a stream; hidden files and folders are left out.

    Args:
        root: folder or prefix; a root that does not exist lists as empty.
        suffixes: lower-case endings to keep; all when empty.
        recursive: also look into sub-folders.
    """
    keep = (lambda n: n.lower().endswith(suffixes)) if suffixes else (lambda n: True)
    walk = _walk_local(root, recursive) if is_local(root) else _walk_remote(root, recursive)
    return (i for i in walk if keep(i.uri))


def _walk_local(root: str, recursive: bool, above: tuple[tuple[int, int], ...] = ()) -> Iterator[ObjectInfo]:
    try:
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in above:  # a link back to a folder that we are in
            return
        above = (*above, (here.st_dev, here.st_ino))
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


def _is_undecodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _walk_remote(root: str, recursive: bool) -> Iterator[ObjectInfo]:
    filesystem, path = _split(root)
    scheme = root.partition("://")[0]
    try:
        entries = _attempt(lambda: filesystem.ls(path, detail=True, refresh=True), root, "list")
    except ObjectMissing:
        return
    for entry in sorted(entries, key=lambda e: str(e["name"])):
        name = name_of(str(entry["name"]))
        if name.startswith(".") or str(entry["name"]).rstrip("/") == path.rstrip("/"):
            continue
        if entry["type"] == "directory":
            if recursive:
                yield from _walk_remote(f"{scheme}://{entry['name']}", recursive)
            continue
        yield _remote_info(scheme, entry)


def create(uri: str, data: bytes) -> None:
    """Put if absent: of any number of writers exactly one succeeds, and no reader ever sees a part of it.

    Raises:
        ObjectExists: the key is taken (perhaps by this very writer, when a reply was lost).
        StorageError: it cannot be written; nothing is left behind.
    """
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
    """(pyarrow filesystem, path) for pyarrow.dataset."""
    import pyarrow.fs

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
