"""A front of an S3 server, as a process that may be killed and started again: ``chaos_store.py UPSTREAM PORT``.

The test server keeps its objects in memory, so killing it would lose them, as no store does. Killed, the front cuts
every connection at whatever point it is, and refuses new ones; the objects stay.
"""

import http.server
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import s3_proxy

_START_S = 60.0


class Front:
    """The front as a process.

    Args:
        upstream: address of the server behind it.
        port: its own, the same after every start.
    """

    def __init__(self, upstream: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._command = [sys.executable, __file__, upstream, str(port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        until = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the front of the S3 server did not start at {self.url}")
            time.sleep(0.05)

    def kill(self) -> None:
        """``kill -9``."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


def main() -> None:
    """Serve for ever."""
    upstream, port = sys.argv[1], int(sys.argv[2])
    service = http.server.ThreadingHTTPServer(("127.0.0.1", port), s3_proxy._Handler)
    service.daemon_threads = True
    service.proxy = s3_proxy.Proxy(f"http://127.0.0.1:{port}")  # type: ignore[attr-defined]
    service.upstream = urlsplit(upstream).port  # type: ignore[attr-defined]
    service.serve_forever()


if __name__ == "__main__":
    main()
