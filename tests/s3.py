"""An S3 server of the tests' own, as a separate process on a free port; see ``s3_proxy`` for bad days."""

import contextlib
import http.client
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
