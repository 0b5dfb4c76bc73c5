"""Archives that lie on this machine or in a store: their bytes for ``archives``, and the ones that are open."""

import errno
import math
import os
import stat as stat_module
import weakref
from collections.abc import Iterator
from typing import Any

from segbatch import archives
from segbatch.errors import ObjectMissing
from segbatch.storage import failures, local, remote
from segbatch.storage.addresses import ObjectInfo, is_http, is_local
from segbatch.storage.patience import attempt
from segbatch.storage.s3 import S3Source, S3Store

_LOOK_AGAIN_S = 5.0


class _LocalSource:
    """An archive on this machine. A read from it fails once the file at its path is another one, or was written to."""

    block = 256 << 10

    def __init__(self, uri: str) -> None:
        descriptor = os.open(uri, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        self._descriptor, self._found = descriptor, os.fstat(descriptor)
        if not stat_module.S_ISREG(self._found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
        self.uri, self.size, self.etag = uri, self._found.st_size, local.info_of(uri, self._found).etag

    def read(self, start: int, stop: int) -> bytes:
        """See ``archives.Readable``."""
        return attempt(lambda: self._read(start, min(stop, self.size)), self.uri, "read")

    def _read(self, start: int, stop: int) -> bytes:
        data = local.pread(self._descriptor, start, stop)
        now = os.stat(self.uri)
        if _version(now) != _version(self._found):
            raise failures.changed(self.uri)
        return data


def _version(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _RemoteSource:
    """An archive on the web or in a store other than S3.

    Requests are conditional on its version; a store that cannot do that is asked before.
    """

    block = remote.BLOCK

    def __init__(self, uri: str) -> None:
        self._store = remote.store(uri)
        entry = self._store.entry(uri)
        if entry.get("size") is None or entry.get("partial") is False:
            raise failures.no_parts(uri)
        info = remote.info_of(self._store.scheme, entry)
        self.uri, self.etag, self.size = uri, info.etag, info.size
        headers = _conditions(entry) if is_http(uri) else {}
        self._is_conditional = bool(headers)
        self._options: dict[str, Any] = {"headers": {**headers, "Accept-Encoding": "identity"}} if is_http(uri) else {}

    def read(self, start: int, stop: int) -> bytes:
        """See ``archives.Readable``."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        if not self._is_conditional and tag_of(self.uri) != self.etag:
            raise failures.changed(self.uri)
        path, size = self._store.path(self.uri), stop - start
        found = self._store.call(self.uri, "read", "cat_file", path, size=size, start=start, end=stop, **self._options)
        if len(found) > size:
            raise failures.no_parts(self.uri)
        if len(found) < size:
            raise failures.cut_short(self.uri, len(found), size)
        return bytes(found)


def _conditions(entry: dict[str, Any]) -> dict[str, str]:
    """Headers that make a server refuse to serve another version (RFC 9110, 13.1)."""
    tag = str(entry.get("ETag", ""))
    if tag and not tag.startswith("W/"):
        return {"If-Match": tag}
    return {"If-Unmodified-Since": str(entry["Last-Modified"])} if "Last-Modified" in entry else {}


def _source(uri: str) -> archives.Source:
    """The archive file as it is now."""
    if is_local(uri):
        return attempt(lambda: _LocalSource(uri), uri, "read")
    store = remote.store(uri)
    return S3Source(store, uri, tail=False) if isinstance(store, S3Store) else _RemoteSource(uri)


def tag_of(uri: str) -> str:
    """Tag of an archive file as it is now."""
    if is_local(uri):
        return attempt(lambda: local.info_of(uri, os.stat(uri)), uri, "read").etag
    return remote.store(uri).stat(uri).etag


_archives = archives.Cache(_source, tag_of)


def archive(uri: str, age_s: float = math.inf) -> archives.Archive:
    """The open archive, as it was at most ``age_s`` ago. Reading takes what was listed, and fails if it has changed."""
    return _archives.get(uri, age_s)


def seen(uri: str) -> archives.Archive:
    """The open archive, for a question about a single member: a store is not asked each time if it has changed."""
    return archive(uri, 0.0 if is_local(uri) else _LOOK_AGAIN_S)


def info_of(uri: str, member: archives.Member) -> ObjectInfo:
    """A member as a listed object."""
    return ObjectInfo(archives.address(uri, member.name), member.etag, member.size)


def walk(uri: str, folder: str, recursive: bool) -> Iterator[ObjectInfo]:
    """Files below a folder of an archive."""
    try:
        opened = archive(uri, 0.0)
    except ObjectMissing:
        return
    for found in opened.files(folder, recursive):
        yield info_of(uri, found)
