"""A proxy before an S3 server that does to chosen requests what networks and stores do on bad days."""

import contextlib
import http.client
import http.server
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Lose:
    """The server does it; the connection ends before the reply."""


@dataclass(frozen=True)
class Reset:
    """The connection is reset before the server hears of it."""


@dataclass(frozen=True)
class Refuse:
    """An error reply of S3; ``away_s`` is how far the server's clock is ahead."""

    status: int = 503
    code: str = "SlowDown"
    away_s: float = 0.0


@dataclass(frozen=True)
class Truncate:
    """Half of the body, though the reply announces all of it."""


@dataclass(frozen=True)
class Silence:
    """No reply for so many seconds, then the end of the connection."""

    seconds: float = 60.0


@dataclass(frozen=True)
class Slow:
    """The right reply, after a while."""

    seconds: float


@dataclass(frozen=True)
class Hide:
    """A listing without the keys that contain a word."""

    key: str


Fault = Lose | Reset | Refuse | Truncate | Silence | Slow | Hide


@dataclass
class Rule:
    """Which requests a fault happens to.

    Attributes:
        fault: what happens.
        method: only to these requests; all when empty.
        word: only where it is in the path or query.
        times: to so many of them.
        share: to this share of them, by chance.
        key_id: only to requests signed with this access key.
    """

    fault: Fault
    method: str = ""
    word: str = ""
    times: int = 1
    share: float = 1.0
    key_id: str = ""
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def applies(self, method: str, target: str, authorization: str) -> bool:
        """Whether it happens to this request; counts it if so."""
        fits = self.method in ("", method) and self.word in target and f"Credential={self.key_id}" in authorization
        if not fits or self.times <= 0 or (self.share < 1 and self.chance.random() >= self.share):
            return False
        self.times -= 1
        return True


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        url: its address.
        rules: the first that applies to a request holds.
        hit: the requests that something happened to, in order.
        asked: all requests.
        headers: the headers of the last request by method.
        completing: held while an upload in parts is completed: the test server looks and writes in two steps.
        ignored: headers, in lower case, that the server behind it does not understand, by method.
    """

    url: str
    rules: list[Rule] = field(default_factory=list)
    hit: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    completing: threading.Lock = field(default_factory=threading.Lock)

    def fault_of(self, method: str, target: str, headers: dict[str, str]) -> Fault | None:
        """What happens to a request, which is noted."""
        with self.lock:
            self.asked.append(f"{method} {target}")
            self.headers[method] = headers
            for rule in self.rules:
                if rule.applies(method, target, headers.get("Authorization", "")):
                    self.hit.append(f"{method} {target}")
                    return rule.fault
        return None


@contextlib.contextmanager
def proxy(upstream: str, *rules: Rule) -> Iterator[Proxy]:
    """A proxy before ``upstream`` on a port of its own."""
    port = urlsplit(upstream).port or 0
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    service.daemon_threads = True
    found = Proxy(f"http://127.0.0.1:{service.server_port}", list(rules))
    service.proxy, service.upstream = found, port  # type: ignore[attr-defined]
    threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield found
    finally:
        service.shutdown()
        service.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        fault = proxy.fault_of(self.command, self.path, dict(self.headers))
        match fault:
            case Reset():
                self._cut(abruptly=True)
                return
            case Silence(seconds):
                time.sleep(seconds)
                self._cut()
                return
            case Refuse():
                self._refuse(fault)
                return
            case Slow(seconds):
                time.sleep(seconds)
        try:
            status, reason, headers, data = self._ask(body, proxy)
        except OSError:  # the server is gone
            self._cut(abruptly=True)
            return
        match fault:
            case Lose():
                self._cut()
                return
            case Hide(key):
                data = re.sub(rb"<Contents>(?:(?!</Contents>).)*</Contents>", _Hider(key.encode()), data, flags=re.S)
        self._reply(status, reason, headers, data, truncate=isinstance(fault, Truncate))

    def _ask(self, body: bytes, proxy: Proxy) -> tuple[int, str, list[tuple[str, str]], bytes]:
        ignored = proxy.ignored.get(self.command, ())
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ignored}
        with proxy.completing if self.command == "POST" else contextlib.nullcontext():
            return self._pass_on(self.command, self.path, body, headers)

    def _pass_on(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)  # type: ignore[attr-defined]
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.reason, answer.getheaders(), data

    def _reply(
        self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, truncate: bool = False
    ) -> None:
        self.send_response_only(status, reason)
        told = {name.lower(): value for name, value in headers}
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = told.get("content-length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have given up
            self.wfile.write(data[: len(data) // 2] if truncate else data)
        if truncate:
            self._cut()

    def _refuse(self, fault: Refuse) -> None:
        date = [("Date", formatdate(time.time() + fault.away_s, usegmt=True)), ("Content-Type", "application/xml")]
        self._reply(fault.status, fault.code, date, b"" if self.command == "HEAD" else _error(fault.code))

    def _cut(self, abruptly: bool = False) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if abruptly:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815


def _error(code: str) -> bytes:
    text = f"<Error><Code>{code}</Code><Message>{code}, says the proxy</Message><RequestId>1</RequestId></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()


@dataclass(frozen=True)
class _Hider:
    word: bytes

    def __call__(self, found: "re.Match[bytes]") -> bytes:
        return b"" if self.word in found.group() else found.group()
