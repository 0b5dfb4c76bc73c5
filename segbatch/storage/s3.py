"""S3 and what speaks its protocol: no HEAD before a GET, large objects in pieces at once, conditional writes.

Endpoint, region, keys, session token and profile are AWS's own settings, from the environment or ``~/.aws``
(``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_PROFILE``, ...).
What AWS has no variable for:

| variable | meaning |
|---|---|
| ``SEGBATCH_S3_PATH_STYLE=1`` | ``https://host/bucket/key`` rather than ``https://bucket.host/key`` |
| ``SEGBATCH_S3_REQUESTER_PAYS=1`` | whoever asks pays |
| ``SEGBATCH_S3_ANONYMOUS=1`` | public buckets, without keys |
| ``SEGBATCH_S3_SSE=AES256`` or ``aws:kms`` | encryption by the server |
| ``SEGBATCH_S3_SSE_KMS_KEY_ID=...`` | with this key of KMS |
| ``SEGBATCH_S3_SSE_C_KEY=...`` | with this key of your own: 32 bytes in base64; needed to read as well |
"""

import asyncio
import base64
import binascii
import heapq
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import IO, Any

from segbatch import archives
from segbatch.errors import ConfigError, ObjectExists, ObjectMissing, StorageError, TransientStorageError
from segbatch.storage import failures, traffic
from segbatch.storage.addresses import ObjectInfo, name_of
from segbatch.storage.patience import Limits
from segbatch.storage.remote import BLOCK, Store

_PIECE = 8 << 20
_IN_PARTS_FROM = 96 << 20
_PART = 16 << 20
_PARTS_AT_A_TIME = 4
_TAIL = 64 << 10
_BEFORE_SLASH = re.compile(r"[\x00-.]")  # characters that sort before the slash
_SSE = ("AES256", "aws:kms", "aws:kms:dsse")
_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "": False, "0": False, "false": False, "no": False}


class S3Store(Store):
    """See the module's text; methods as in ``Store``."""

    def __init__(self) -> None:
        limits = Limits.from_environment()
        config: dict[str, Any] = {
            "connect_timeout": limits.connect_s,
            "read_timeout": limits.read_s,
            "retries": {"total_max_attempts": 1},  # Store.ask repeats, and nothing below it, or they would multiply
            "max_pool_connections": limits.connections,
        }
        if _flag("PATH_STYLE"):
            config["s3"] = {"addressing_style": "path"}
        options = {"config_kwargs": config, "anon": _flag("ANONYMOUS"), "s3_additional_kwargs": _request_options()}
        super().__init__("s3", options)
        self.filesystem.retries = 1

    async def _request(self, method: str, uri: str, **options: Any) -> dict[str, Any]:
        bucket, key, _ = self.filesystem.split_path(self.path(uri))
        reply: dict[str, Any] = await self.filesystem._call_s3(method, Bucket=bucket, Key=key, **options)
        return reply

    # -- reading -----------------------------------------------------------------------------------------------

    async def _get(self, uri: str, span: str, size: int, etag: str = "") -> tuple[bytes, dict[str, Any]]:
        """(bytes, reply) of ``Range: bytes=SPAN``; nothing where the object ends before."""
        condition = {"IfMatch": f'"{etag}"'} if etag else {}

        async def once() -> tuple[bytes, dict[str, Any]]:
            try:
                reply = await self._request("get_object", uri, Range=f"bytes={span}", **condition)
            except OSError as error:
                if failures.http_status(error) == 416:
                    return b"", {}
                raise
            async with reply["Body"] as body:
                data: bytes = await body.read()
            traffic.count("bytes_read", len(data))
            if len(data) != reply.get("ContentLength", len(data)):
                raise ConnectionError(f"{len(data)} bytes came instead of {reply['ContentLength']}")
            return data, reply

        return await self.ask(uri, "read", once, size)

    async def _read(self, uri: str) -> bytes:
        first, reply = await self._get(uri, f"0-{_PIECE - 1}", _PIECE)
        size = _size_of(reply, len(first))
        if size <= len(first):
            return first
        rest = await self.pieces(uri, len(first), size, _tag_of(reply))
        return b"".join([first, *rest])

    async def pieces(self, uri: str, start: int, stop: int, etag: str) -> list[bytes]:
        """The bytes ``start <= i < stop`` of a version, in pieces that are read at the same time."""
        spans = [(s, min(s + _PIECE, stop)) for s in range(start, stop, _PIECE)]
        found = await asyncio.gather(*(self._get(uri, f"{a}-{b - 1}", b - a, etag) for a, b in spans))
        for (data, _), (a, b) in zip(found, spans, strict=True):
            if len(data) != b - a:
                raise failures.cut_short(uri, len(data), b - a)
        return [data for data, _ in found]

    def read(self, uri: str) -> bytes:
        """In pieces at once where it is large; no HEAD before."""
        return self.wait(self._read(uri))

    def begin_read(self, uri: str) -> "Future[bytes]":
        """See ``Store``."""
        return self.submit(self._read(uri))

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """See ``Store``."""
        if start == stop:
            return b""
        data, _ = self.wait(self._get(uri, f"{start}-{stop - 1}", stop - start))
        if len(data) > stop - start:
            raise failures.no_parts(uri)
        return data

    def open(self, uri: str) -> IO[bytes]:
        """Reads ahead where reads follow each other."""
        source = S3Source(self, uri, tail=True)
        return archives.Window(_ReadAhead(source), 0, source.size).buffered()

    def stat(self, uri: str) -> ObjectInfo:
        """One HEAD; a prefix is no object."""
        reply = self.wait(self.ask(uri, "look at", lambda: self._request("head_object", uri)))
        return ObjectInfo(uri, _tag_of(reply), int(reply["ContentLength"]))

    def is_folder(self, uri: str) -> bool:
        """One key below it is enough."""
        bucket, prefix = self._prefix(uri)

        async def look() -> dict[str, Any]:
            reply: dict[str, Any] = await self.filesystem._call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1
            )
            return reply

        try:
            return bool(self.wait(self.ask(uri, "look at", look)).get("Contents"))
        except ObjectMissing:
            return False

    # -- listing -----------------------------------------------------------------------------------------------

    def _prefix(self, root: str) -> tuple[str, str]:
        bucket, _, key = self.path(root).partition("/")
        return bucket, f"{key.strip('/')}/" if key.strip("/") else ""

    def walk(self, root: str, recursive: bool) -> Iterator[ObjectInfo]:
        """One request for each thousand keys, however many folders they lie in."""
        bucket, prefix = self._prefix(root)
        entries = (e for page in self._pages(root, bucket, prefix, not recursive) for e in page.get("Contents", ()))
        shown = (e for e in entries if _is_shown(e["Key"][len(prefix) :]))
        found = (ObjectInfo(f"s3://{bucket}/{e['Key']}", e["ETag"].strip('"'), int(e["Size"])) for e in shown)
        start = len(f"s3://{bucket}/{prefix}")
        return by_path(found, start, self.is_folder) if recursive else found

    def folders(self, root: str) -> list[str]:
        """One request for each thousand entries."""
        bucket, prefix = self._prefix(root)
        pages = self._pages(root, bucket, prefix, True)
        names = (name_of(str(found["Prefix"])) for page in pages for found in page.get("CommonPrefixes", ()))
        return sorted(name for name in names if not name.startswith("."))

    def _pages(self, root: str, bucket: str, prefix: str, flat: bool) -> Iterator[dict[str, Any]]:
        """The pages of a listing; the next one is on its way while one is used."""
        options = {"Bucket": bucket, "Prefix": prefix, **({"Delimiter": "/"} if flat else {})}

        async def page(more: dict[str, str]) -> dict[str, Any]:
            reply: dict[str, Any] = await self.ask(
                root, "list", lambda: self.filesystem._call_s3("list_objects_v2", **options, **more)
            )
            return reply

        coming: Future[dict[str, Any]] | None = self.submit(page({}))
        try:
            while coming:
                found = coming.result()
                token = found.get("NextContinuationToken") if found.get("IsTruncated") else None
                coming = self.submit(page({"ContinuationToken": token})) if token else None
                yield found
        except ObjectMissing:
            return
        finally:
            if coming:
                coming.cancel()

    # -- writing -----------------------------------------------------------------------------------------------

    def create(self, uri: str, data: bytes, in_parts: bool = False) -> None:
        """If-None-Match."""
        self.wait(self._put(uri, data, {"IfNoneMatch": "*"}, in_parts))

    def replace(self, uri: str, data: bytes, etag: str | None) -> None:
        """If-Match where there is a tag."""
        try:
            self.wait(self._put(uri, data, {"IfMatch": f'"{etag}"'} if etag else {}, etag is None))
        except (ObjectExists, ObjectMissing) as error:
            if etag is None:
                raise
            raise ObjectExists(f"{uri} was changed by another writer") from error

    async def _put(self, uri: str, data: bytes, condition: dict[str, str], in_parts: bool) -> None:
        """One PUT; above a size an upload in parts, if its completion takes the condition."""
        if in_parts and len(data) >= _IN_PARTS_FROM:
            await self.put_in_parts(uri, data, condition)
            return
        await self.ask(uri, "write", lambda: self._request("put_object", uri, Body=data, **condition), len(data))

    async def put_in_parts(self, uri: str, data: bytes, condition: dict[str, str]) -> None:
        """An upload in parts that becomes the object in its last request; nothing of a failed one is left.

        Raises:
            ObjectExists: the condition does not hold, or the reply to the last request was lost.
        """
        begun = await self.ask(uri, "write", lambda: self._request("create_multipart_upload", uri))
        upload = {"UploadId": begun["UploadId"]}
        at_a_time = asyncio.Semaphore(_PARTS_AT_A_TIME)

        async def part(number: int) -> dict[str, Any]:
            async with at_a_time:
                body = data[(number - 1) * _PART : number * _PART]
                sent = {"Body": body, "PartNumber": number, **upload}
                reply = await self.ask(uri, "write", lambda: self._request("upload_part", uri, **sent), len(body))
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            count = max(-(-len(data) // _PART), 1)
            parts = {"Parts": await asyncio.gather(*(part(n) for n in range(1, count + 1)))}
            last = {"MultipartUpload": parts, **upload, **condition}
            attempts = 0

            def complete() -> Awaitable[Any]:
                nonlocal attempts
                attempts += 1
                return self._request("complete_multipart_upload", uri, **last)

            try:
                await self.ask(uri, "write", complete, len(data))
            except ObjectMissing as error:  # NoSuchUpload: an attempt before this one has completed it
                if condition:
                    raise ObjectExists(f"{uri} exists already") from error
                if attempts == 1 or await self._size_there(uri) != len(data):
                    raise TransientStorageError(
                        f"the upload of {uri} was ended by somebody else", "run the same command again"
                    ) from error
        except BaseException:
            await self._abort(uri, upload)
            raise

    async def _size_there(self, uri: str) -> int | None:
        try:
            found = await self.ask(uri, "look at", lambda: self._request("head_object", uri))
        except ObjectMissing:
            return None
        return int(found["ContentLength"])

    async def _abort(self, uri: str, upload: dict[str, str]) -> None:
        """Discard the parts of an upload; what cannot be discarded is left to the bucket's life-cycle rule."""
        try:
            await self.ask(uri, "delete", lambda: self._request("abort_multipart_upload", uri, **upload))
        except StorageError:
            return


class S3Source:
    """An object in S3 that is read in pieces; every request says which version it wants.

    Opening is one request, and with ``tail`` brings the end of the object as well: the footer of a Parquet file.
    """

    block = BLOCK

    def __init__(self, store: S3Store, uri: str, tail: bool) -> None:
        self._store, self.uri = store, uri
        self._tail, reply = store.wait(store._get(uri, f"-{_TAIL}", _TAIL)) if tail else (b"", {})
        if reply:
            self.etag, self.size = _tag_of(reply), _size_of(reply, len(self._tail))
        else:  # not asked for, or there is no last byte
            found = store.stat(uri)
            self.etag, self.size = found.etag, found.size

    def read(self, start: int, stop: int) -> bytes:
        """See ``archives.Readable``."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        split = min(max(self.size - len(self._tail), start), stop)
        tail = self._tail[split - self.size + len(self._tail) : stop - self.size + len(self._tail)]
        if split == start:
            return tail
        return b"".join([*self.begin(start, split).result(), tail])

    def begin(self, start: int, stop: int) -> "Future[list[bytes]]":
        """The same, on its way, in pieces."""
        return self._store.submit(self._store.pieces(self.uri, start, stop, self.etag))


class _ReadAhead:
    """A source of which the next bytes are on their way once two reads have followed each other."""

    block = 1 << 20

    def __init__(self, source: S3Source) -> None:
        self._source = source
        self._end = -1
        self._here = (0, b"")
        self._coming: tuple[int, int, Future[list[bytes]]] | None = None

    def read(self, start: int, stop: int) -> bytes:
        """See ``archives.Readable``."""
        stop = min(stop, self._source.size)
        follows, self._end = start == self._end, stop
        if not follows:
            self._drop()
        pieces = []
        while start < stop:
            data = self._had(start, stop)
            if not data:
                data = self._source.read(start, stop)
            pieces.append(data)
            start += len(data)
        if follows and self._coming is None and stop < self._source.size:
            until = min(stop + _PIECE, self._source.size)
            first = max(stop, self._here[0] + len(self._here[1]))
            if first < until:
                self._coming = (first, until, self._source.begin(first, until))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _had(self, start: int, stop: int) -> bytes:
        """What is there, or on its way, of the bytes at ``start``."""
        if self._coming and self._coming[0] <= start < self._coming[1]:
            (first, _, future), self._coming = self._coming, None
            self._here = (first, b"".join(future.result()))
        first, data = self._here
        return data[start - first : stop - first] if first <= start < first + len(data) else b""

    def _drop(self) -> None:
        if self._coming:
            self._coming[2].cancel()
        self._here, self._coming = (0, b""), None


def by_path(
    found: Iterable[ObjectInfo], start: int, has: Callable[[str], bool], most: int = 10_000
) -> Iterator[ObjectInfo]:
    """Objects in S3's order, put in the order of a walk through folders: ``a/b`` before ``a.txt``.

    One is held back while another that belongs before it may still come: for ``a-1/x`` until ``a/`` is passed.

    Args:
        found: objects by URI.
        start: how many characters of the URIs are the root's.
        has: whether there is anything under a prefix (a URI with a slash at its end); asked where ``most`` are held.
        most: how many objects are held without asking.
    """
    held: list[tuple[list[str], ObjectInfo]] = []
    known: dict[str, bool] = {}
    ask_at = most
    for info in found:
        while held and not any(known.get(p, True) for p in _may_precede(held[0][1].uri, info.uri, start)):
            yield heapq.heappop(held)[1]
        heapq.heappush(held, (info.uri[start:].split("/"), info))
        if len(held) >= ask_at:
            ask_at = 2 * len(held)
            open_ = _may_precede(held[0][1].uri, info.uri, start)
            known = {p: known[p] if p in known else has(p) for p in open_}
            if not any(known.values()):
                ask_at = most
    while held:
        yield heapq.heappop(held)[1]


def _may_precede(held: str, now: str, start: int) -> list[str]:
    """Prefixes that belong before ``held`` and come after it in S3's order, where the listing has not passed them."""
    prefixes = (held[: m.start()] for m in _BEFORE_SLASH.finditer(held, start))
    return [f"{p}/" for p in prefixes if now < f"{p}0"]


def _is_shown(path: str) -> bool:
    """Whether a key is a file and no part of its path is hidden."""
    return bool(path) and not path.endswith("/") and not path.startswith(".") and "/." not in path


def _size_of(reply: dict[str, Any], received: int) -> int:
    """Size of the whole object; a server that ignores ranges sends all of it."""
    total = str(reply.get("ContentRange", "")).rpartition("/")[2]
    return int(total) if total.isdigit() else received


def _tag_of(reply: dict[str, Any]) -> str:
    return str(reply.get("ETag", "")).strip('"')


def _flag(name: str) -> bool:
    text = os.environ.get(f"SEGBATCH_S3_{name}", "")
    if text.lower() not in _FLAGS:
        raise ConfigError(f"SEGBATCH_S3_{name}={text} is neither 1 nor 0", "set it to 1, or unset it")
    return _FLAGS[text.lower()]


def _request_options() -> dict[str, str | bytes]:
    """Options of every request that knows them."""
    options: dict[str, str | bytes] = {"RequestPayer": "requester"} if _flag("REQUESTER_PAYS") else {}
    sse, kms, own = (os.environ.get(f"SEGBATCH_S3_{n}", "") for n in ("SSE", "SSE_KMS_KEY_ID", "SSE_C_KEY"))
    if sse and sse not in _SSE:
        raise ConfigError(f"SEGBATCH_S3_SSE={sse} is no encryption of S3", f"known are {', '.join(_SSE)}")
    if (kms and not sse.startswith("aws:")) or (own and (sse or kms)):
        raise ConfigError(
            "SEGBATCH_S3_SSE, _SSE_KMS_KEY_ID and _SSE_C_KEY do not fit together",
            "a key of KMS needs SEGBATCH_S3_SSE=aws:kms; a key of your own stands alone",
        )
    if sse:
        options["ServerSideEncryption"] = sse
    if kms:
        options["SSEKMSKeyId"] = kms
    if own:
        options |= {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": _own_key(own)}
    return options


def _own_key(text: str) -> bytes:
    """A customer's key as botocore wants it: bytes, since of a text it takes the UTF-8.

    Raises:
        ConfigError: it is not 32 bytes in base64; the key is not shown.
    """
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ConfigError("SEGBATCH_S3_SSE_C_KEY is not 32 bytes in base64", "openssl rand -base64 32 makes one")
    return key
