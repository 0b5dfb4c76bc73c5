"""An S3 server of the tests' own, as a separate process on a free port, and a proxy before it that loses replies."""

import contextlib
import http.client
import http.server
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

BUCKET = "segbatch-tests"
SECRET = "wJalrXUtnFEMI-this-must-never-be-printed"
_START_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server: its endpoint, and the environment that leads to it."""

    url: str
    environment: dict[str, str]

    def root(self, name: str) -> str:
        """A prefix of its own in the bucket."""
        return f"s3://{BUCKET}/{name}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(program: Path, log: Path) -> Iterator[S3Server]:
    """Start ``moto_server``, wait until it answers, make the bucket; stop it at the end."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output)
    try:
        _wait(port, process, log)
        _request(port, "PUT", f"/{BUCKET}")
        url = f"http://127.0.0.1:{port}"
        environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield S3Server(url, environment)
    finally:
        process.terminate()
        process.wait(10)


def _wait(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            _request(port, "GET", "/")
            return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")


def _request(port: int, method: str, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    authorization = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
    connection.request(method, path, headers=authorization)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status >= 400:
        raise RuntimeError(f"the S3 server answers {method} {path} with {answer.status}")


@dataclass
class Proxy:
    """Passes requests on. ``lose`` decides, by method and path, whether the server's reply is thrown away."""

    url: str
    lose: Callable[[str, str], bool] = lambda method, path: False
    lost: list[str] = field(default_factory=list)


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy before ``upstream`` on a port of its own."""
    found = Proxy(f"http://127.0.0.1:{free_port()}")
    port = urlsplit(upstream).port

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Silence."""

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection("127.0.0.1", port or 0, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if found.lose(self.command, self.path):
                found.lost.append(f"{self.command} {self.path}")
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    service = http.server.ThreadingHTTPServer(("127.0.0.1", urlsplit(found.url).port or 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        service.shutdown()
        service.server_close()


def upload(folder: Path, root: str) -> None:
    """Copy a folder's files below ``root``."""
    from segbatch import storage

    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.replace(storage.join(root, path.relative_to(folder).as_posix()), path.read_bytes())


def program(project: Path) -> Path:
    """The server's executable; skips, by name, where it is absent."""
    path = project / ".venv-s3" / "bin" / "moto_server"
    if not path.exists():
        pytest.skip("the S3 test server is absent: make .venv-s3/.installed")
    return path
