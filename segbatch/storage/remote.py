"""Stores behind fsspec: one table of schemes, one event loop for all requests, and what every store can do.

``s3.py`` goes further for S3.
"""

import asyncio
import functools
import importlib
import importlib.metadata
import io
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from segbatch.config import nearest
from segbatch.errors import ConfigError, ObjectExists, ObjectMissing, SegbatchError, StorageError
from segbatch.storage import failures, traffic
from segbatch.storage.addresses import ObjectInfo, is_archive, is_http, name_of, scheme_of, store_of
from segbatch.storage.patience import Breaker, Limits, Tries, attempt

T = TypeVar("T")

BLOCK = 4 << 20
_RENEW_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Scheme:
    """A kind of store.

    Attributes:
        module: the driver that fsspec uses.
        package: what to install for it; empty where it comes with segbatch.
        settings: where its credentials and settings come from.
        is_writable: whether results can be written there.
    """

    module: str
    package: str
    settings: str
    is_writable: bool = True


SCHEMES = {
    "s3": Scheme("s3fs", "", "AWS_* and ~/.aws; SEGBATCH_S3_* for what AWS has no name for"),
    "gs": Scheme("gcsfs", "gcsfs", "GOOGLE_APPLICATION_CREDENTIALS or gcloud's login"),
    "az": Scheme("adlfs", "adlfs", "AZURE_STORAGE_CONNECTION_STRING, or _ACCOUNT_NAME and _ACCOUNT_KEY"),
    "https": Scheme("aiohttp", "", "none", is_writable=False),
    "http": Scheme("aiohttp", "", "none", is_writable=False),
    "memory": Scheme("fsspec.implementations.memory", "", "none; of this process alone, for tests"),
}


def check_scheme(scheme: str) -> Scheme:
    """The store's entry in the table.

    Raises:
        ConfigError: no such kind of store, or its package is not installed.
    """
    found = SCHEMES.get(scheme)
    if found is None:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"cannot use {scheme}:// addresses{nearest(scheme, SCHEMES)}", f"known are {known}")
    try:
        importlib.import_module(found.module)
    except ImportError as error:
        package, how = found.package or found.module, f"segbatch[{scheme}]" if found.package else "segbatch"
        raise ConfigError(
            f"cannot use {scheme}:// addresses: the package {package} is missing", f"pip install '{how}'"
        ) from error
    return found


def drivers() -> dict[str, str]:
    """What is installed for each scheme: name and version of its package, or how to install it."""
    found = {}
    for scheme, entry in SCHEMES.items():
        package = entry.package or entry.module.partition(".")[0]
        try:
            found[f"{scheme}://"] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            found[f"{scheme}://"] = f"{package} is not installed; pip install 'segbatch[{scheme}]'"
    return found


class Store:
    """One scheme's filesystem in this process. Never shared over a fork: actors make their own."""

    def __init__(self, scheme: str, options: dict[str, Any]) -> None:
        import fsspec

        self.scheme, self.limits = scheme, Limits.from_environment()
        self.filesystem = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
        self._breakers: dict[str, Breaker] = {}
        self._slots = asyncio.Semaphore(self.limits.connections)
        self._write_lock = threading.Lock()
        self._renewed = time.monotonic()
        self._renewal = asyncio.Lock()

    # -- requests ----------------------------------------------------------------------------------------------

    def breaker(self, uri: str) -> Breaker:
        """The circuit breaker of the bucket or host."""
        name = store_of(uri)
        return self._breakers.setdefault(name, Breaker(name, self.limits.request_s(0)))

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine in the loop that all stores share; the caller does not wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.filesystem.loop)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, and wait for its result."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def ask(self, uri: str, doing: str, call: Callable[[], Awaitable[T]], size: int = 0) -> T:
        """One request, with a time limit, repeated while that may help; ``size`` is how many bytes it moves."""
        tries = Tries(uri, doing, self.breaker(uri), self.limits.call_s(size))
        while True:
            while pause := tries.hold_s():
                await asyncio.sleep(pause)
            asked = time.monotonic()
            try:
                async with self._slots:
                    tries.stood_in_line(time.monotonic() - asked)
                    if tries.is_overtaken:
                        continue
                    result = await asyncio.wait_for(call(), min(self.limits.request_s(size), tries.left_s()))
            except SegbatchError:
                raise
            except Exception as error:  # noqa: BLE001 (the drivers raise their own trees)
                pause = tries.failed(error)
                if failures.may_be_expired(error):
                    await self._renew()
                await asyncio.sleep(pause)
            else:
                tries.answered()
                if isinstance(result, bytes):
                    traffic.count("bytes_read", len(result))
                return result

    async def _renew(self) -> None:
        """Read the keys again: the environment, the credentials file, the machine's role."""
        async with self._renewal:  # whoever comes meanwhile waits for the new keys
            if self.scheme == "s3" and time.monotonic() - self._renewed > _RENEW_AFTER_S:
                await self.filesystem.set_session(refresh=True)
                self._renewed = time.monotonic()

    def call(self, uri: str, doing: str, method: str, *args: Any, size: int = 0, **options: Any) -> Any:
        """A method of the filesystem; ``args`` and ``options`` are its own."""
        if self.filesystem.async_impl:
            asked = getattr(self.filesystem, f"_{method}")
            return self.wait(self.ask(uri, doing, lambda: asked(*args, **options), size))
        return attempt(lambda: getattr(self.filesystem, method)(*args, **options), uri, doing)

    def path(self, uri: str) -> str:
        """The URI as the filesystem wants it."""
        return uri if is_http(uri) else uri.partition("://")[2]

    # -- objects -----------------------------------------------------------------------------------------------

    def read(self, uri: str) -> bytes:
        """The whole object."""
        return bytes(self.call(uri, "read", "cat_file", self.path(uri)))

    def begin_read(self, uri: str) -> "Future[bytes] | None":
        """The whole object, on its way; None where the driver knows no such thing."""
        if not self.filesystem.async_impl:
            return None
        return self.submit(self.ask(uri, "read", lambda: self.filesystem._cat_file(self.path(uri))))

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """The bytes ``start <= i < stop``; fewer where the object ends."""
        if start == stop:
            return b""
        options = {"headers": {"Accept-Encoding": "identity"}} if is_http(uri) else {}
        try:
            path, size = self.path(uri), stop - start
            data = bytes(self.call(uri, "read", "cat_file", path, size=size, start=start, end=stop, **options))
        except StorageError as error:
            if error.__cause__ and failures.http_status(error.__cause__) == 416:  # the object ends before
                return b""
            raise
        if len(data) > stop - start:
            raise failures.no_parts(uri)
        return data

    def open(self, uri: str) -> IO[bytes]:
        """A seekable reader whose reads are repeated and translated like every other call."""
        if not self.filesystem.async_impl:
            return io.BytesIO(self.read(uri))
        file = attempt(lambda: self.filesystem.open(self.path(uri), "rb", block_size=BLOCK), uri, "read")
        cache = getattr(file, "cache", None)
        if cache is not None and getattr(cache, "fetcher", None) is not None:
            cache.fetcher = functools.partial(_fetched, cache.fetcher, uri)
        opened: IO[bytes] = file
        return opened

    def entry(self, uri: str) -> dict[str, Any]:
        """What the store says of an object or folder."""
        found: dict[str, Any] = self.call(uri, "look at", "info", self.path(uri))
        return found

    def stat(self, uri: str) -> ObjectInfo:
        """Tag and size of an object."""
        return info_of(self.scheme, self.entry(uri))

    def exists(self, uri: str) -> bool:
        """Whether the object or folder is there."""
        return bool(self.call(uri, "look at", "exists", self.path(uri)))

    def is_folder(self, uri: str) -> bool:
        """Whether the URI is a prefix with something under it."""
        if is_http(uri) and is_archive(uri):  # else all of it would be fetched, to look for links in it
            return False
        return bool(self.call(uri, "look at", "isdir", self.path(uri)))

    # -- listing -----------------------------------------------------------------------------------------------

    def walk(self, root: str, recursive: bool) -> Iterator[ObjectInfo]:
        """Files below a prefix by path; hidden ones are left out."""
        for entry in self._entries(root):
            if entry["type"] != "directory":
                yield info_of(self.scheme, entry)
            elif recursive:
                yield from self.walk(_uri_of(self.scheme, entry), recursive)

    def folders(self, root: str) -> list[str]:
        """Names of the folders directly in a prefix, sorted."""
        return [name_of(str(e["name"])) for e in self._entries(root) if e["type"] == "directory"]

    def _entries(self, root: str) -> Iterator[dict[str, Any]]:
        """What is directly under a prefix and not hidden, by name."""
        path = self.path(root)
        try:
            entries = self.call(root, "list", "ls", path, detail=True)
        except ObjectMissing:
            return
        for entry in sorted(entries, key=lambda e: str(e["name"])):
            name = str(entry["name"])
            if not name_of(name).startswith(".") and name.strip("/") != path.strip("/"):
                yield entry

    # -- writing -----------------------------------------------------------------------------------------------

    def check_writable(self, uri: str) -> None:
        """Refuse to write where one can only read."""
        if not SCHEMES[self.scheme].is_writable:
            raise StorageError(f"cannot write {uri}: web addresses are only read", "choose a folder or a bucket")

    def create(self, uri: str, data: bytes, in_parts: bool = False) -> None:
        """Put if absent, by the store's own condition. ``in_parts``: it also holds for uploads in parts."""
        del in_parts
        self.check_writable(uri)
        if self.filesystem.async_impl:
            self.call(uri, "write", "pipe_file", self.path(uri), data, size=len(data), mode="create")
            return
        with self._write_lock:  # the memory of this process
            self.call(uri, "write", "pipe_file", self.path(uri), data, mode="create")

    def replace(self, uri: str, data: bytes, etag: str | None) -> None:
        """Overwrite; a tag is compared just before, and by S3 (see ``s3.py``) in the same step."""
        self.check_writable(uri)
        if etag is None:
            self.call(uri, "write", "pipe_file", self.path(uri), data, size=len(data))
            return
        with self._write_lock:  # among the threads of this process it is one step
            if self._tag(uri) != etag:
                raise ObjectExists(f"{uri} was changed by another writer")
            self.call(uri, "write", "pipe_file", self.path(uri), data, size=len(data))

    def _tag(self, uri: str) -> str | None:
        try:
            return self.stat(uri).etag
        except ObjectMissing:
            return None

    def delete(self, uri: str) -> None:
        """Remove an object."""
        self.check_writable(uri)
        self.call(uri, "delete", "rm_file", self.path(uri))


def _fetched(fetch: Callable[[int, int], bytes], uri: str, start: int, stop: int) -> bytes:
    """A block of an open file."""
    block = attempt(lambda: fetch(start, stop), uri, "read")
    traffic.count("bytes_read", len(block))
    return block


def info_of(scheme: str, entry: dict[str, Any]) -> ObjectInfo:
    """An entry of a listing as ours."""
    size = int(entry.get("size") or 0)
    times = (entry[k] for k in ("LastModified", "Last-Modified", "mtime", "last_modified", "created") if entry.get(k))
    tag = entry.get("ETag") or entry.get("etag") or f"{size}-{_seconds(next(times, ''))}"
    return ObjectInfo(_uri_of(scheme, entry), str(tag).strip('"'), size)


def _seconds(when: Any) -> Any:
    """A time in one form: some drivers list seconds and tell of one object in another form."""
    return when.timestamp() if hasattr(when, "timestamp") else when


def _uri_of(scheme: str, entry: dict[str, Any]) -> str:
    name = str(entry["name"])
    return name if "://" in name else f"{scheme}://{name.lstrip('/')}"


_lock = threading.Lock()


def store(uri: str) -> Store:
    """The process's store for a URI.

    Raises:
        ConfigError: no such kind of store, its package is missing, or a setting is wrong.
    """
    with _lock:  # of many threads one makes it
        return _remote(scheme_of(uri))


@functools.cache
def _remote(scheme: str) -> Store:
    check_scheme(scheme)
    if scheme == "s3":
        from segbatch.storage import s3

        return s3.S3Store()
    return Store(scheme, _options(scheme))


def _options(scheme: str) -> dict[str, Any]:
    limits = Limits.from_environment()
    if scheme in ("http", "https"):
        import aiohttp

        seconds = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s, sock_read=limits.read_s)
        return {"client_kwargs": {"timeout": seconds}}
    if scheme == "gs":
        return {"requests_timeout": limits.read_s}
    if scheme == "az":
        return {"connection_timeout": limits.connect_s, "read_timeout": limits.read_s}
    return {}
