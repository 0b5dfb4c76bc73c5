"""What Prometheus and a collector of OpenTelemetry see of a run."""

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import doubles
import photos
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from segbatch import api, drivers
from segbatch.config import RunOptions

PROJECT = Path(__file__).resolve().parent.parent.parent
PHOTOS = 24

SCRIPT = """
import sys, time, urllib.request
import ray
from doubles import SlowModel, predict
from pathlib import Path

ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
         _system_config={"metrics_report_interval_ms": 500})
predict(SlowModel(seconds=0.3), Path(sys.argv[1]), Path(sys.argv[2]))
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
until = time.monotonic() + 60
found = ""
while "segbatch_rows" not in found and time.monotonic() < until:
    time.sleep(1)
    found = urllib.request.urlopen(url, timeout=10).read().decode()
print(found)
ray.shutdown()
"""


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans as OpenTelemetry's protocol sends them over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.spans: list[Span] = []


class _Taking(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(self.server, Collector)
        self.server.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.ray
def test_prometheus_and_opentelemetry_see_what_was_done(tmp_path: Path, collector: Collector) -> None:
    photos.folder(tmp_path / "in", PHOTOS)
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_TMPDIR": "/tmp", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.server_address[1]}"
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "in"), str(tmp_path / "out")]
    ran = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r'^ray_segbatch_rows_total\{.*status="ok".*\} (\S+)$', ran.stdout, re.MULTILINE)
    assert [float(r) for r in rows] == [PHOTOS]
    shards = re.findall(r"^ray_segbatch_shards_total\{.*\} (\S+)$", ran.stdout, re.MULTILINE)
    assert [float(s) for s in shards] == [PHOTOS / 8]
    took = re.findall(r"^ray_segbatch_shard_seconds_count\{.*\} (\S+)$", ran.stdout, re.MULTILINE)
    assert took and sum(map(float, took)) >= 1, "actors tell, too"
    moved = re.findall(r'^ray_segbatch_moved_total\{.*what="bytes_read".*\} (\S+)$', ran.stdout, re.MULTILINE)
    assert moved and sum(map(float, moved)) > 0
    (verb,) = [s for s in collector.spans if s.name == "segbatch predict"]
    below = [s for s in collector.spans if s.name in ("segbatch worker start", "segbatch shard")]
    assert sorted(s.name for s in below) == ["segbatch shard"] * (PHOTOS // 8) + ["segbatch worker start"]
    assert {(s.trace_id, s.parent_span_id) for s in below} == {(verb.trace_id, verb.span_id)}


@pytest.mark.ray
def test_status_tells_where_the_actors_are(tmp_path: Path, ray_session: Path) -> None:
    """Node, process and log of each; a signal has the process write its stacks there."""
    source, out = photos.folder(tmp_path / "in", 48), tmp_path / "out"
    work = threading.Thread(target=doubles.predict, args=(doubles.SlowModel(seconds=0.3), source, out))
    work.start()
    found: tuple[str, ...] = ()
    until = time.monotonic() + 60
    while not found and work.is_alive() and time.monotonic() < until:
        time.sleep(0.2)
        found = next((d.workers for d in drivers.look([str(out)])[str(out)] if d.workers), ())
    assert found
    said = re.fullmatch(r"on node \S+, process (\d+), log (\S+)", found[0])
    assert said
    os.kill(int(said[1]), signal.SIGUSR1)
    while "Current thread" not in Path(said[2]).read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert "in run" in Path(said[2]).read_text()
    work.join()
    assert drivers.look([str(out)])[str(out)] == []


@pytest.mark.ray
def test_status_tells_where_the_actors_of_several_models_are(tmp_path: Path, ray_session: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 24), tmp_path / "out"
    models = {alias: doubles.SlowModel(seconds=0.3) for alias in ("a", "b")}
    options = RunOptions.model_validate({"plan": {"shard_rows": 8}, "engine": {"kind": "ray"}})
    work = threading.Thread(target=api.predict_many, args=(models, str(source), str(out)), kwargs={"options": options})
    work.start()
    roots = [str(out / alias) for alias in models]
    found: list[tuple[str, ...]] = []
    until = time.monotonic() + 60
    while not (found and all(found)) and work.is_alive() and time.monotonic() < until:
        time.sleep(0.2)
        found = [d.workers for drivers_of in drivers.look(roots).values() for d in drivers_of]
    work.join()
    assert len(found) == 2 and found[0] == found[1] and "on node" in found[0][0]
