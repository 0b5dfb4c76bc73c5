"""What Prometheus sees of a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import photos
import pytest

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


@pytest.mark.ray
def test_prometheus_reads_the_rows_that_are_done(tmp_path: Path) -> None:
    photos.folder(tmp_path / "in", PHOTOS)
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_TMPDIR": "/tmp", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
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
