"""Files of this machine: atomic, and flushed to the disk before they can be seen."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import stat as stat_module
import tempfile
import uuid
from collections.abc import Iterator

from segbatch.errors import ObjectExists, StorageError
from segbatch.storage import failures, traffic
from segbatch.storage.addresses import ObjectInfo

_TEMPORARY = ".tmp"
_NAME = re.compile(r"\.(?P<machine>.+)\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp")
"""Of a temporary file; nobody else's is ever touched."""


# -- reading ---------------------------------------------------------------------------------------------------------


def info_of(uri: str, found: os.stat_result) -> ObjectInfo:
    """A file's tag is its size and time."""
    return ObjectInfo(uri, f"{found.st_size}-{found.st_mtime_ns}", found.st_size)


def read(uri: str) -> bytes:
    """The whole file."""
    with open(uri, "rb") as file:
        data = file.read()
    traffic.count("bytes_read", len(data))
    return data


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes ``start <= i < stop``; fewer where the file ends."""
    with open(uri, "rb", buffering=0) as file:
        data = pread(file.fileno(), start, min(stop, os.fstat(file.fileno()).st_size))
    traffic.count("bytes_read", len(data))
    return data


def pread(descriptor: int, start: int, stop: int) -> bytes:
    """Bytes of an open file; the system gives at most 2 GiB at a time."""
    pieces = []
    while start < stop and (data := os.pread(descriptor, stop - start, start)):
        pieces.append(data)
        start += len(data)
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]


def walk(root: str, recursive: bool, above: tuple[tuple[int, int], ...] = ()) -> Iterator[ObjectInfo]:
    """Files below a folder by path; hidden ones are left out."""
    try:
        here = os.stat(root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise failures.translate(error, root, "list") from error
    if (here.st_dev, here.st_ino) in above:  # a link back to a folder that we are in
        return
    above = (*above, (here.st_dev, here.st_ino))
    for entry in entries(root):
        try:
            found = entry.stat()
        except FileNotFoundError:  # removed since, or a dangling link: not an input
            continue
        except OSError as error:
            raise failures.translate(error, entry.path, "look at") from error
        if stat_module.S_ISDIR(found.st_mode):
            if recursive:
                yield from walk(entry.path, recursive, above)
        elif stat_module.S_ISREG(found.st_mode):  # a pipe or a device would be read for ever
            yield info_of(entry.path, found)


def entries(root: str) -> Iterator["os.DirEntry[str]"]:
    """What is in a folder and not hidden, by name."""
    try:
        found = sorted(os.scandir(root), key=lambda e: e.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise failures.translate(error, root, "list") from error
    for entry in found:
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


# -- writing ---------------------------------------------------------------------------------------------------------


def write_temporary(uri: str, data: bytes) -> str:
    """Write ``data`` to a temporary file beside ``uri`` and flush it to the disk; on failure nothing is left."""
    folder = os.path.dirname(uri)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:  # would read as "the key is taken"
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from error
    except FileNotFoundError as error:  # a filesystem that takes no new folders, such as /proc
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder) from error
    temporary = os.path.join(folder, f".{machine()}.{os.getpid()}.{uuid.uuid4().hex}{_TEMPORARY}")
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


def create(uri: str, data: bytes) -> None:
    """Put if absent: by a hard link, else by renameat2, else refused."""
    temporary = write_temporary(uri, data)
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


def replace(uri: str, data: bytes, etag: str | None) -> None:
    """Overwrite by a rename; with a tag, under a lock among the processes of this machine."""
    temporary = write_temporary(uri, data)
    try:
        with _locked(os.path.dirname(uri)):
            if etag is not None and _tag(uri) != etag:
                raise ObjectExists(f"{uri} was changed by another writer")
            os.replace(temporary, uri)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(uri)


def _tag(uri: str) -> str | None:
    try:
        return info_of(uri, os.stat(uri)).etag
    except FileNotFoundError:
        return None


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


def left_temporary(root: str, older_than_s: float = 3600.0) -> Iterator[ObjectInfo]:
    """Temporary files that killed writers left behind.

    A writer on this machine is dead when its process is gone, any other one when its file is ``older_than_s``.
    """
    now = functools.cache(lambda: _now_at(root))
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if writer := _NAME.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(path)
                    if _is_gone(writer["machine"], writer["pid"]) or now() - found.st_mtime > older_than_s:
                        yield info_of(path, found)


def _now_at(folder: str) -> float:
    """The time by the clock that stamps files there; 0, nothing is old, where nothing may be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0


def _is_gone(where: str, pid: str) -> bool:
    """Whether a temporary file's writer was a process of this machine that has ended."""
    return where == machine() and os.path.exists("/proc/1") and not os.path.exists(f"/proc/{pid}")


@functools.cache
def machine() -> str:
    """This boot of this machine, as seen from this pid namespace; unlike any other where that is not known.

    Containers may share a host's name, and machines that were cloned.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}-{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    except OSError:
        return uuid.uuid4().hex


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for what does not fit into memory; it is removed afterwards.

    Raises:
        StorageError: its disk is full; says which folder, and how to choose another one.
    """
    with tempfile.TemporaryDirectory(prefix="segbatch-", ignore_cleanup_errors=True) as folder, on_scratch_disk():
        yield folder


@contextlib.contextmanager
def on_scratch_disk() -> Iterator[None]:
    """Temporary files are written within.

    Raises:
        StorageError: their disk is full; says which folder, and how to choose another one.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not failures.is_disk_full(error):
            raise
        raise StorageError(
            f"no space left for temporary files in {tempfile.gettempdir()}",
            "free space there, or set TMPDIR to a folder on another disk",
        ) from error
