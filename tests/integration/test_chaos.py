"""Whatever is killed, and whenever: after re-runs every image is there once, with the rows of an undisturbed run."""

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import chaos
import chaos_store
import doubles
import photos
import pyarrow as pa
import pytest
import s3

from segbatch import api, schemas, storage, tables
from segbatch.config import RunOptions

PROJECT = Path(__file__).resolve().parent.parent.parent

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.long]

SEEDS = 30
QUICK_SEEDS = (0, 6, 24)  # together they kill everything that can be killed
COLUMNS = tuple(name for name in schemas.MASKS.names if not name.startswith("seconds_"))


@pytest.fixture(scope="module")
def world(s3_server: s3.S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos.World]:
    """A cluster and an S3 server for all runs."""
    front = chaos_store.Front(s3_server.url, s3.free_port())
    ray_folder = tempfile.mkdtemp(prefix="sb", dir="/tmp")  # paths of sockets must be short; not where others find it
    environment = {
        **s3_server.environment,
        **chaos.STORE_LIMITS,
        "AWS_ENDPOINT_URL": front.url,
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
        "TMPDIR": str(tmp_path_factory.mktemp("temporary")),
        "RAY_TMPDIR": ray_folder,
    }
    with contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        ends.callback(front.kill)
        front.start()
        cluster = chaos.Cluster(environment)
        ends.callback(cluster.close)
        yield chaos.World(cluster, front, environment)


@pytest.fixture(scope="module")
def sources(s3_server: s3.S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """The photos, on disk (False) and on S3 (True)."""
    local = photos.folder(tmp_path_factory.mktemp("chaos") / "in", chaos.IMAGES)
    remote = s3_server.root("chaos-in")
    s3.upload(local, remote)
    return {False: str(local), True: remote}


@pytest.fixture(scope="module")
def expected(sources: dict[bool, str], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, pa.Table]:
    """The rows of an inline run of each source."""
    options = RunOptions.model_validate({"plan": chaos.PLAN, "engine": {"kind": "inline"}})
    found = {}
    for remote, source in sources.items():
        out = tmp_path_factory.mktemp("inline") / "out"
        api.predict(doubles.FreeModel(), source, str(out), options=options)
        found[remote] = rows(str(out))
    return found


def rows(out: str) -> pa.Table:
    """All rows in the order of the parts, without the timing columns."""
    return pa.Table.from_batches(list(tables.scan(out, "masks", COLUMNS))).combine_chunks()


def assert_only_parts(out: str) -> None:
    """The table's folder holds one file for each shard, and nothing else."""
    folder = storage.join(out, "masks")
    shards = -(-chaos.IMAGES // chaos.SHARD_ROWS)
    parts = [storage.name_of(p.uri) for p in tables.parts(folder)]
    is_local = storage.is_local(out)
    names = (
        [p.name for p in Path(folder).iterdir()]
        if is_local
        else [storage.name_of(f.uri) for f in storage.list_files(folder)]
    )
    assert Counter(names) == Counter(parts)
    assert [int(name.split("-")[1]) for name in sorted(parts)] == list(range(shards))


@pytest.mark.parametrize(
    "seed",
    [s if s in QUICK_SEEDS else pytest.param(s, marks=pytest.mark.slow) for s in range(SEEDS)],
)
def test_every_image_once(
    seed: int,
    world: chaos.World,
    sources: dict[bool, str],
    expected: dict[bool, pa.Table],
    s3_server: s3.S3Server,
    tmp_path: Path,
) -> None:
    remote = any(fault.kind == "store" for fault in chaos.faults(seed))
    out = s3_server.root(f"chaos-{seed}") if remote else str(tmp_path / "out")
    run = chaos.Chaos(world, seed, sources[remote], out, tmp_path / "log")
    print(f"chaos seed {seed}: {chaos.faults(seed)}")
    try:
        figures = run.run()
    finally:
        print(f"chaos seed {seed}: {run.figures}")
    assert_only_parts(out)
    found = rows(out)
    ids = Counter(found["sample_id"].to_pylist())
    assert len(ids) == found.num_rows == chaos.IMAGES
    assert found.equals(expected[remote])
    state = api.status(out)
    assert (state.rows, state.rows_done, state.bad, state.complete) == (chaos.IMAGES, chaos.IMAGES, 0, True)
    if figures.kills.keys() <= {"actor"}:
        assert figures.reruns == 0, "a death of an actor is no reason to end"
    assert json.loads(str(figures))["seed"] == seed


def test_the_seeds_of_make_test_kill_everything() -> None:
    assert {fault.kind for seed in QUICK_SEEDS for fault in chaos.faults(seed)} == set(chaos.KINDS)
