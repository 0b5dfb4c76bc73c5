"""The only code that touches fsspec: list, read, put-if-absent, atomic replacement, local and remote alike.

A URI is an absolute local path, ``scheme://...`` (``remote.SCHEMES``), or a member's: ``ARCHIVE!/path``, a file or
folder in a zip or tar that is itself local or remote (see ``archives``). Members can be listed and read, not written.

Credentials come from the environment and the files that the stores' own programs use, never from configuration, and
are never shown. What S3 needs beyond AWS's own settings is in ``s3``; limits of time are in ``patience``.
"""

import contextlib
import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from segbatch import archives
from segbatch.errors import ConfigError, ObjectExists, ObjectMissing, StorageError
from segbatch.storage import local, members, probe, traffic
from segbatch.storage.addresses import (
    ObjectInfo,
    archive_root,
    check_is_no_member,
    is_archive,
    is_local,
    is_private,
    join,
    name_of,
    relative,
    resolve,
)
from segbatch.storage.local import create as _create_local
from segbatch.storage.local import machine, on_scratch_disk, scratch_folder
from segbatch.storage.local import replace as _replace_local
from segbatch.storage.patience import ATTEMPTS, attempt
from segbatch.storage.probe import Guarantee
from segbatch.storage.remote import SCHEMES, _remote, drivers, store

__all__ = [
    "ATTEMPTS",
    "SCHEMES",
    "Guarantee",
    "ObjectInfo",
    "_remote",
    "archive_root",
    "arrow_filesystem",
    "buffer",
    "check_writable",
    "create",
    "delete",
    "drivers",
    "exists",
    "is_archive",
    "is_folder",
    "is_local",
    "is_private",
    "join",
    "left_temporary",
    "list_files",
    "list_folders",
    "machine",
    "name_of",
    "on_scratch_disk",
    "open_input",
    "open_stream",
    "read_ahead",
    "read_bytes",
    "read_lines",
    "read_many",
    "read_range",
    "relative",
    "remove_empty_folder",
    "replace",
    "resolve",
    "scratch_folder",
    "stat",
    "sweep_temporary",
    "traffic",
]

AT_A_TIME = 32
"""How many objects are on their way at a time when many are read."""


# -- reading ---------------------------------------------------------------------------------------------------------


def read_bytes(uri: str) -> bytes:
    """The whole object.

    Raises:
        ObjectMissing: it is not there.
        StorageError: it cannot be read.
    """
    if member := archives.split(uri):
        return members.archive(member[0]).read(member[1])
    if is_local(uri):
        return attempt(lambda: local.read(uri), uri, "read")
    return store(uri).read(uri)


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
        return attempt(lambda: local.read_range(uri, start, stop), uri, "read")
    return store(uri).read_range(uri, start, stop)


def read_ahead(uris: Iterable[str], at_a_time: int = AT_A_TIME) -> Iterator[bytes]:
    """Objects in order, as a stream; the next ones are on their way while one is used.

    Args:
        uris: what to read.
        at_a_time: how many are on their way, or wait to be used.

    Raises:
        StorageError: when an object that cannot be read is next.
    """
    waiting = iter(uris)
    with ThreadPoolExecutor(min(at_a_time, 16)) as pool:
        coming = deque(_begin_read(uri, pool) for uri in itertools.islice(waiting, at_a_time))
        try:
            while coming:
                data = coming.popleft().result()
                coming.extend(_begin_read(uri, pool) for uri in itertools.islice(waiting, 1))
                yield data
        finally:
            for future in coming:
                future.cancel()


def _begin_read(uri: str, pool: ThreadPoolExecutor) -> "Future[bytes]":
    """Remote objects come through the event loop, all others by a thread."""
    begun = None if is_local(uri) or archives.split(uri) else store(uri).begin_read(uri)
    return begun or pool.submit(read_bytes, uri)


def read_many(uris: Iterable[str]) -> list[bytes]:
    """Several small objects at once, in order; remote reads overlap."""
    return list(read_ahead(uris))


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


def open_input(uri: str) -> IO[bytes]:
    """A seekable binary reader, for Parquet footers and row groups. The caller closes it.

    Of a compressed member, reading backwards may begin again at its start.
    """
    if member := archives.split(uri):
        return members.archive(member[0]).open(member[1])
    if is_local(uri):
        return attempt(lambda: io.BufferedReader(traffic.File(uri)), uri, "read")
    return store(uri).open(uri)


def open_stream(uri: str) -> IO[bytes]:
    """A binary reader to be read from the beginning to the end in pieces, in bounded memory. The caller closes it."""
    if member := archives.split(uri):
        return members.archive(member[0]).stream(member[1])
    return open_input(uri)


# -- looking ---------------------------------------------------------------------------------------------------------


def stat(uri: str) -> ObjectInfo | None:
    """The object's tag and size, or None when it is not there."""
    try:
        if member := archives.split(uri):
            found = members.seen(member[0]).find(member[1])
            return members.info_of(member[0], found) if found else None
        if is_local(uri):
            return attempt(lambda: local.info_of(uri, os.stat(uri)), uri, "look at")
        return store(uri).stat(uri)
    except ObjectMissing:
        return None


def exists(uri: str) -> bool:
    """Whether the object or folder is there."""
    if archives.split(uri):
        return stat(uri) is not None or is_folder(uri)
    if is_local(uri):
        return os.path.exists(uri)
    return store(uri).exists(uri)


def is_folder(uri: str) -> bool:
    """Whether the URI is a folder, or a prefix with something under it."""
    if member := archives.split(uri):
        try:
            return members.seen(member[0]).is_folder(member[1])
        except ObjectMissing:
            return False
    if is_local(uri):
        return os.path.isdir(uri)
    return store(uri).is_folder(uri)


def list_files(root: str, suffixes: tuple[str, ...] = (), recursive: bool = True) -> Iterator[ObjectInfo]:
    """Files below ``root`` in path order (by folder), as a stream; hidden files and folders are left out.

    In an archive ``__MACOSX`` is left out too, and so are links.

    Args:
        root: folder or prefix; a root that does not exist lists as empty.
        suffixes: lower-case endings to keep; all when empty.
        recursive: also look into sub-folders.
    """
    keep = (lambda n: n.lower().endswith(suffixes)) if suffixes else (lambda n: True)
    if member := archives.split(root):
        walk = members.walk(member[0], member[1], recursive)
    else:
        walk = local.walk(root, recursive) if is_local(root) else store(root).walk(root, recursive)
    return (i for i in walk if keep(i.uri))


def list_folders(root: str) -> list[str]:
    """Names of the folders directly in ``root``, sorted; what ``list_files`` leaves out is left out.

    Args:
        root: folder or prefix; one that does not exist has none.
    """
    if member := archives.split(root):
        try:
            return members.archive(member[0], 0.0).folders(member[1])
        except ObjectMissing:
            return []
    if is_local(root):
        return [entry.name for entry in local.entries(root) if entry.is_dir()]
    return store(root).folders(root)


# -- writing ---------------------------------------------------------------------------------------------------------


def create(uri: str, data: bytes) -> None:
    """Put if absent: of any number of writers exactly one succeeds, and no reader ever sees a part of it.

    Where a store has no such thing (see ``check_writable``) the last writer wins; who looks first sees that it is late.

    Raises:
        ObjectExists: the key is taken (perhaps by this very writer, when a reply was lost).
        StorageError: it cannot be written; nothing is left behind.
    """
    check_is_no_member(uri)
    if is_local(uri):
        attempt(lambda: _create_local(uri, data), uri, "write")
    elif (guarantee := probe.of(uri)).put_if_absent:
        store(uri).create(uri, data, guarantee.in_parts)
    elif stat(uri) is not None:
        raise ObjectExists(f"{uri} exists already")
    else:
        store(uri).replace(uri, data, None)
    traffic.count("bytes_written", len(data))


def replace(uri: str, data: bytes, etag: str | None = None) -> None:
    """Overwrite atomically; readers see the old object or the new one.

    Args:
        uri: the object.
        data: its new content.
        etag: when given, only if the object still has this tag.

    Raises:
        ObjectExists: the object has another tag by now.
    """
    check_is_no_member(uri)
    if is_local(uri):
        attempt(lambda: _replace_local(uri, data, etag), uri, "write")
    else:
        store(uri).replace(uri, data, etag)
    traffic.count("bytes_written", len(data))


def delete(uri: str) -> None:
    """Remove an object; it is no error when it is not there."""
    check_is_no_member(uri)
    with contextlib.suppress(ObjectMissing):
        if is_local(uri):
            attempt(lambda: os.unlink(uri), uri, "delete")
        else:
            store(uri).delete(uri)


def remove_empty_folder(uri: str) -> None:
    """Remove a local folder if nothing is in it; elsewhere folders do not exist."""
    if is_local(uri):
        with contextlib.suppress(OSError):
            os.rmdir(uri)


def left_temporary(root: str, older_than_s: float = 3600.0) -> Iterator[ObjectInfo]:
    """Temporary files that killed local writers left behind. Remote stores have none.

    A writer on this machine is dead when its process is gone, any other one when its file is ``older_than_s``.
    """
    return local.left_temporary(root, older_than_s) if is_local(root) else iter(())


def sweep_temporary(root: str, older_than_s: float = 3600.0) -> int:
    """Remove ``left_temporary``; returns how many there were."""
    swept = 0
    for found in left_temporary(root, older_than_s):
        delete(found.uri)
        swept += 1
    return swept


def check_writable(root: str, keep: bool = True) -> Guarantee:
    """Prove before any work that ``root`` can be written, and find out whether put-if-absent is honoured there.

    A store that ignores it is used all the same, and a warning says in one line what is weaker.

    Args:
        root: root of a run, local or remote.
        keep: note the result in the root, so that no other process of the run has to try (remote roots).

    Raises:
        StorageError: it cannot be written, or is a local folder that has no put-if-absent.
    """
    found = probe.probe(root)
    if keep and not is_local(root):
        probe.keep(root, found)
    return found


def buffer() -> io.BytesIO:
    """Where a result is put together before its one PUT (shards stay well under 1 GB)."""
    return io.BytesIO()


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path) for pyarrow.dataset; not for members."""
    import pyarrow.fs

    if archives.split(uri):
        raise StorageError(f"cannot query {uri}: tables in an archive are not read", "unpack the archive")

    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    found = store(uri)

    class Handler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
        """Opens files as ``open_input`` does."""

        def open_input_file(self, path: str) -> Any:
            """A seekable file."""
            return pyarrow.PythonFile(open_input(f"{found.scheme}://{path}"), mode="r")

    return pyarrow.fs.PyFileSystem(Handler(found.filesystem)), found.path(uri)
