"""Everything against a real S3 server in a process of its own: the whole line, races, lost replies, bad endpoints."""

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import generators
import numpy as np
import pytest
import s3
import s3_proxy

from segbatch import api, storage, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import (
    ConfigError,
    ObjectExists,
    ObjectMissing,
    SegbatchError,
    StorageError,
    TransientStorageError,
)
from segbatch.records import Figure
from segbatch.runs import Run

pytestmark = pytest.mark.s3

OPTIONS = RunOptions(plan=PlanConfig(shard_rows=3), engine=EngineConfig(kind="inline", threads=2))
SEGBATCH = Path(sys.executable).with_name("segbatch")


@pytest.fixture
def root(s3_server: s3.S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    return s3_server.root(request.node.name.replace("[", "-").replace("]", ""))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos with label maps in each of two splits."""
    return generators.image_masks(tmp_path_factory.mktemp("tree"), 6)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sends this process to another endpoint, until the test ends."""

    def change(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        storage._remote.cache_clear()

    yield change
    monkeypatch.undo()
    storage._remote.cache_clear()


def save_color_model(uri: str, tree: Path) -> str:
    """A colour classifier that has seen the tree; returns its reference."""
    from PIL import Image

    from segbatch.datasets.class_file import read_class_file
    from segbatch.models import checkpoint
    from segbatch.models.color import ColorTable
    from segbatch.models.config import ColorConfig
    from segbatch.records import ClassTable

    classes = ClassTable(read_class_file(str(tree / "classes.toml")).scored)
    config = ColorConfig(bits=4)
    net = ColorTable(config, len(classes.classes))
    for path in sorted((tree / "images").rglob("*.png")):
        labels = np.asarray(Image.open(tree / "masks" / path.relative_to(tree / "images")))
        indices = np.full(labels.shape, -1, np.int16)
        for i, c in enumerate(classes.classes):
            indices[labels == c.label_id] = i
        net.observe(np.asarray(Image.open(path)), indices)
    net.settle()
    checkpoint.write(uri, net, "color", config, classes, {})
    return f"color@{uri}"


def whole_line(source: str, out: str, model: str) -> tuple[Figure, ...]:
    """Ingest, predict, evaluate, report; returns the figures."""
    api.ingest("image-masks", source, f"{out}/samples", options=OPTIONS)
    api.predict(model, f"{out}/samples", f"{out}/masks", options=OPTIONS)
    result = api.evaluate(f"{out}/masks", f"{out}/samples", f"{out}/metrics", protocol="semantic", options=OPTIONS)
    api.report(f"{out}/metrics", f"{out}/report.html", 3)
    return result.figures


@pytest.fixture(scope="module")
def line(s3_server: s3.S3Server, tree: Path) -> str:
    """Root of a whole line on S3, which tests may read."""
    out = s3_server.root("line")
    s3.upload(tree, f"{out}/source")
    save_color_model(f"{out}/model", tree)
    whole_line(f"{out}/source", out, f"color@{out}/model")
    return out


# -- the line --------------------------------------------------------------------------------------------------------


def test_the_whole_line_gives_the_figures_of_local_files(line: str, tree: Path, tmp_path: Path) -> None:
    model = save_color_model(str(tmp_path / "model"), tree)
    local = whole_line(str(tree), str(tmp_path), model)
    remote = api.evaluate(
        f"{line}/masks", f"{line}/samples", f"{line}/metrics", protocol="semantic", options=OPTIONS
    ).figures
    assert remote == local
    (miou,) = [f.value for f in remote if f.metric == "miou" and not f.class_name]
    assert miou is not None and 0.5 < miou < 1
    assert storage.read_bytes(f"{line}/report.html").startswith(b"<!")


def test_a_plain_folder_of_photos(line: str, tree: Path, root: str) -> None:
    s3.upload(tree / "images", f"{root}/photos")
    result = api.predict(f"color@{line}/model", f"{root}/photos", f"{root}/masks", options=OPTIONS)
    assert (result.state.rows_done, result.state.bad) == (12, 0)
    columns = "sample_id, class_pixels"
    from_folder = api.query(f"{root}/masks", f"SELECT {columns} FROM masks ORDER BY 1").to_pylist()
    assert from_folder[0]["sample_id"] == "train/item_0.png"
    from_samples = api.query(f"{line}/masks", f"SELECT {columns} FROM masks ORDER BY 1").to_pylist()
    assert [r["class_pixels"] for r in from_folder] == [r["class_pixels"] for r in from_samples]


def test_a_second_run_does_nothing(line: str, tree: Path) -> None:
    before = {i.uri: i.etag for t in ("samples", "masks") for i in tables.parts(f"{line}/{t}/{t}")}
    again = [
        api.ingest("image-masks", f"{line}/source", f"{line}/samples", options=OPTIONS),
        api.predict(f"color@{line}/model", f"{line}/samples", f"{line}/masks", options=OPTIONS),
    ]
    assert [r.rows for r in again] == [0, 0]
    assert {i.uri: i.etag for t in ("samples", "masks") for i in tables.parts(f"{line}/{t}/{t}")} == before
    assert len(before) == 8


def test_a_lost_shard_is_done_again_and_nothing_else(line: str, root: str) -> None:
    model = f"color@{line}/model"
    api.predict(model, f"{line}/samples", f"{root}/masks", options=OPTIONS)
    parts = tables.parts(f"{root}/masks/masks")
    storage.delete(parts[1].uri)
    result = api.predict(model, f"{line}/samples", f"{root}/masks", options=OPTIONS)
    assert result.rows == 3
    assert [p.uri for p in tables.parts(f"{root}/masks/masks")] == [p.uri for p in parts]


def test_a_changed_photo_rewrites_its_shard_in_place(line: str, tree: Path, root: str) -> None:
    s3.upload(tree / "images" / "val", f"{root}/photos")
    model = f"color@{line}/model"
    api.predict(model, f"{root}/photos", f"{root}/masks", options=OPTIONS)
    before = tables.parts(f"{root}/masks/masks")
    storage.replace(f"{root}/photos/item_4.png", (tree / "images" / "train" / "item_1.png").read_bytes())
    result = api.predict(model, f"{root}/photos", f"{root}/masks", options=OPTIONS)
    after = tables.parts(f"{root}/masks/masks")
    assert (result.rows, result.copied, result.state.rows) == (1, 2, 6)
    assert [p.uri for p in after] == [p.uri for p in before]
    assert [a.etag == b.etag for a, b in zip(after, before, strict=True)] == [True, False]


def test_query_reads_through_our_storage_and_nothing_else(line: str) -> None:
    found = api.query(f"{line}/masks", "SELECT status, count(*) AS n FROM masks GROUP BY 1").to_pylist()
    assert found == [{"status": "ok", "n": 12}]
    for sql in (f"SELECT * FROM '{line}/samples/samples/*.parquet'", "COPY masks TO '/tmp/stolen.parquet'"):
        with pytest.raises(ConfigError, match=r"SQL: .*disabled"):
            api.query(f"{line}/masks", sql)


def test_where_selects_rows_of_a_samples_table(line: str, root: str) -> None:
    result = api.predict(
        f"color@{line}/model", f"{line}/samples", f"{root}/masks", where="split = 'val'", options=OPTIONS
    )
    assert result.state.rows_done == 6


@pytest.mark.ray
def test_ray_actors_see_the_environment(line: str, root: str) -> None:
    command = [SEGBATCH, "predict", f"color@{line}/model", f"{line}/samples", f"{root}/masks", "--engine", "ray"]
    more = ["--set", "plan.shard_rows=3", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert (state["rows_done"], state["bad"], state["shards_done"]) == (12, 0, 4)
    sql = "SELECT sample_id, class_pixels FROM masks ORDER BY 1"
    assert api.query(f"{root}/masks", sql).equals(api.query(f"{line}/masks", sql))


# -- put-if-absent, replacement, listing -----------------------------------------------------------------------------


def test_of_many_threads_one_creates(root: str) -> None:
    def create(number: int, key: str) -> bool:
        try:
            storage.create(key, str(number).encode() * 20_000)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            key = f"{root}/{i}"
            winners = [n for n, won in enumerate(pool.map(create, range(8), [key] * 8)) if won]
            assert len(winners) == 1
            assert storage.read_bytes(key) == str(winners[0]).encode() * 20_000


RACER = """
import sys, time
from segbatch import storage
from segbatch.errors import ObjectExists
root, me, start = sys.argv[1], sys.argv[2], float(sys.argv[3])
storage.exists(root)
time.sleep(max(start - time.time(), 0))
for i in range(20):
    try:
        storage.create(f"{root}/{i}", me.encode() * 20_000)
        print(i)
    except ObjectExists:
        pass
"""


def test_of_many_processes_one_creates(root: str) -> None:
    start = time.time() + 6
    command = [sys.executable, "-c", RACER, root]
    racers = [
        subprocess.Popen([*command, str(n), str(start)], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for n in range(4)
    ]
    wins = [r.communicate(timeout=120)[0].split() for r in racers]
    assert [r.returncode for r in racers] == [0] * 4
    assert sorted(int(i) for won in wins for i in won) == list(range(20))
    for number, won in enumerate(wins):
        for i in won:
            assert storage.read_bytes(f"{root}/{i}") == str(number).encode() * 20_000


def test_replace_only_what_has_the_tag(root: str) -> None:
    key = f"{root}/object"
    storage.create(key, b"one")
    before = storage.stat(key)
    assert before is not None
    storage.replace(key, b"two", before.etag)
    with pytest.raises(ObjectExists, match="changed by another writer"):
        storage.replace(key, b"three", before.etag)
    assert storage.read_bytes(key) == b"two"
    storage.replace(key, b"four")
    assert storage.read_bytes(key) == b"four"


def test_of_many_replacements_of_one_tag_one_succeeds(root: str) -> None:
    key = f"{root}/object"
    storage.create(key, b"old")
    tag = storage.stat(key)
    assert tag is not None

    def replace(number: int) -> bool:
        try:
            storage.replace(key, str(number).encode(), tag.etag)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [n for n, won in enumerate(pool.map(replace, range(8))) if won]
    assert len(winners) == 1
    assert storage.read_bytes(key) == str(winners[0]).encode()


def test_listing_has_every_key_of_many_pages(root: str) -> None:
    names = [f"folder/{i:05d}.jpg" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: storage.replace(f"{root}/{n}", n.encode()), [*names, "other/x.txt", ".hidden/y.jpg"]))
    found = list(storage.list_files(root, (".jpg",)))
    assert [storage.relative(i.uri, root) for i in found] == names
    assert all(i.size == 16 and i.etag for i in found)
    assert list(storage.list_files(f"{root}/nothing-here")) == []


def test_listing_has_the_order_of_a_walk_through_folders(root: str, tmp_path: Path) -> None:
    names = ["a-1/x", "a.txt", "a/b/c", "a/b.png", "a/.hidden/x", "ab", "z/1", "z/10", "z/1-2"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    s3.upload(tmp_path, root)
    for recursive in (True, False):
        here = [storage.relative(i.uri, str(tmp_path)) for i in storage.list_files(str(tmp_path), (), recursive)]
        assert [storage.relative(i.uri, root) for i in storage.list_files(root, (), recursive)] == here
    assert storage.list_folders(root) == storage.list_folders(str(tmp_path)) == ["a", "a-1", "z"]
    assert storage.list_folders(f"{root}/a") == ["b"]


def test_looking_at_what_is_and_is_not_there(root: str) -> None:
    storage.create(f"{root}/a/b", b"123")
    assert storage.exists(f"{root}/a/b") and storage.exists(f"{root}/a") and not storage.exists(f"{root}/a/c")
    assert storage.is_folder(f"{root}/a") and not storage.is_folder(f"{root}/a/b")
    assert storage.stat(f"{root}/a/c") is None
    with pytest.raises(ObjectMissing, match="it does not exist"):
        storage.read_bytes(f"{root}/a/c")
    storage.delete(f"{root}/a/b")
    storage.delete(f"{root}/a/b")
    assert not storage.exists(f"{root}/a")


def test_an_output_is_checked_before_any_work(root: str) -> None:
    assert storage.check_writable(root, keep=False) == storage.Guarantee(put_if_absent=True, in_parts=True)
    assert list(storage.list_files(f"{root}/.segbatch")) == []
    storage.check_writable(root)
    assert [storage.name_of(i.uri) for i in storage.list_files(f"{root}/.segbatch")] == ["store.json"]
    with pytest.raises(ObjectMissing, match="the bucket does not exist"):
        storage.check_writable("s3://no-such-bucket/out")


# -- lost replies ----------------------------------------------------------------------------------------------------


def test_a_lost_reply_tells_the_writer_that_the_key_is_taken(
    root: str, s3_server: s3.S3Server, endpoint: Callable[[str], None]
) -> None:
    with s3_proxy.proxy(s3_server.url) as proxy:
        endpoint(proxy.url)
        proxy.rules = [s3_proxy.Rule(s3_proxy.Lose(), "PUT", "/mine")]
        with pytest.raises(ObjectExists):
            storage.create(f"{root}/mine", b"1")
        assert len(proxy.hit) == 1
        assert storage.read_bytes(f"{root}/mine") == b"1"
        proxy.rules = [s3_proxy.Rule(s3_proxy.Lose(), "PUT", "/probe-")]
        storage.check_writable(root)
        assert len(proxy.hit) == 2


@pytest.mark.parametrize("word", ["part-00000001", "config.json", "plans/0.json", "outcomes/", "SUCCESS"])
def test_a_run_outlives_a_lost_reply(
    word: str, line: str, root: str, s3_server: s3.S3Server, endpoint: Callable[[str], None]
) -> None:
    root = f"{root}-{word.strip('/').replace('/', '-')}"
    with s3_proxy.proxy(s3_server.url) as proxy:
        endpoint(proxy.url)
        proxy.rules = [s3_proxy.Rule(s3_proxy.Lose(), "PUT", word)]
        result = api.predict(f"color@{line}/model", f"{line}/samples", f"{root}/masks", options=OPTIONS)
        assert len(proxy.hit) == 1
    assert (result.state.rows_done, result.state.shards_done, result.state.plans) == (12, 4, 1)
    assert not any(o.committed_by_other for o in Run(f"{root}/masks", "masks").outcomes().values())


def test_reads_of_an_open_file_are_repeated(root: str, s3_server: s3.S3Server, endpoint: Callable[[str], None]) -> None:
    storage.create(f"{root}/large", bytes(range(256)) * 40_000)
    with s3_proxy.proxy(s3_server.url) as proxy:
        endpoint(proxy.url)
        with storage.open_input(f"{root}/large") as file:
            proxy.rules = [s3_proxy.Rule(s3_proxy.Lose(), "GET", "large")]
            file.seek(9_000_001)
            assert file.read(3) == bytes([(9_000_001 + i) % 256 for i in range(3)])
        assert len(proxy.hit) == 1


# -- no store, no key ------------------------------------------------------------------------------------------------


def test_an_unreachable_endpoint_is_tried_again_and_then_said(
    s3_server: s3.S3Server, endpoint: Callable[[str], None]
) -> None:
    endpoint(f"http://127.0.0.1:{s3.free_port()}")
    began = time.monotonic()
    with pytest.raises(TransientStorageError) as caught:
        storage.read_bytes("s3://bucket/key")
    assert time.monotonic() - began < 20
    message = str(caught.value)
    assert "s3://bucket/key" in message and "Could not connect" in message
    assert s3.SECRET not in message and "\n" not in message


def test_no_credentials(
    s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: Callable[[str], None]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    endpoint(s3_server.url)
    with pytest.raises(StorageError, match=r"no credentials \(set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://bucket/key")


@pytest.mark.parametrize("what", ["endpoint", "bucket"])
def test_the_command_line_says_it_in_one_line(what: str, s3_server: s3.S3Server, tree: Path) -> None:
    environment = dict(os.environ)
    if what == "endpoint":
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{s3.free_port()}"
    command = [SEGBATCH, "ingest", "image-masks", str(tree), "s3://no-such-bucket/out", "--engine", "inline"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1
    words = {"endpoint": "Could not connect to the endpoint", "bucket": "the bucket does not exist"}[what]
    (line,) = done.stderr.splitlines()
    assert line.startswith("segbatch: cannot") and words in line
    assert s3.SECRET not in done.stdout + done.stderr


def test_another_store_is_named(s3_server: s3.S3Server) -> None:
    with pytest.raises(SegbatchError, match="cannot use nonsense://"):
        storage.read_bytes("nonsense://bucket/key")


# -- archives --------------------------------------------------------------------------------------------------------


def pack(tree: Path, path: Path) -> bytes:
    """The tree as an archive of the kind that its name says."""
    files = [(p, p.relative_to(tree).as_posix()) for p in sorted(tree.rglob("*")) if p.is_file()]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for file, name in files:
                made.write(file, name)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for file, name in files:
                tar.add(file, name)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["source.zip", "source.tar.gz"])
def test_an_archive_reads_like_the_folder(
    name: str, root: str, tree: Path, tmp_path: Path, s3_server: s3.S3Server, endpoint: Callable[[str], None]
) -> None:
    storage.create(f"{root}/{name}", pack(tree, tmp_path / name))
    inside = storage.archive_root(f"{root}/{name}")
    names = [storage.relative(i.uri, str(tree)) for i in storage.list_files(str(tree))]
    with s3_proxy.proxy(s3_server.url) as proxy:
        endpoint(proxy.url)
        proxy.rules = [s3_proxy.Rule(s3_proxy.Lose(), "GET", name)]
        assert [storage.relative(i.uri, inside) for i in storage.list_files(inside)] == names
        assert len(proxy.hit) == 1
        assert storage.read_many(storage.join(inside, n) for n in names) == [(tree / n).read_bytes() for n in names]
        assert storage.list_folders(inside) == storage.list_folders(str(tree)) == ["images", "masks"]
        assert storage.is_archive(f"{root}/{name}") and storage.is_folder(f"{inside}images")
        first = (tree / names[0]).read_bytes()
        with storage.open_stream(storage.join(inside, names[0])) as file:
            assert file.read() == first
        assert storage.read_range(storage.join(inside, names[0]), 2, 9) == first[2:9]
        assert storage.stat(f"{inside}nothing") is None and not storage.exists(f"{root}/no.zip!/")


@pytest.mark.parametrize("name", ["source.zip", "source.tar.gz"])
def test_an_archive_that_changes_is_not_read_on(name: str, root: str, tree: Path, tmp_path: Path) -> None:
    """Requests say which version they want, so that no read has to look first."""
    storage.create(f"{root}/{name}", pack(tree, tmp_path / name))
    inside = storage.archive_root(f"{root}/{name}")
    first, *_, last = storage.list_files(inside)
    storage.replace(f"{root}/{name}", pack(tree / "images", tmp_path / name))
    with pytest.raises(StorageError, match=r"has changed since it was listed or opened \(run the same command again"):
        storage.read_bytes(first.uri)
    assert storage.list_folders(inside) == ["train", "val"]
    with pytest.raises(ObjectMissing, match="the archive has no such file"):
        storage.read_bytes(last.uri)


def test_parts_and_folders(root: str) -> None:
    storage.create(f"{root}/a/b/object", b"0123456789")
    storage.create(f"{root}/a/.hidden/object", b"")
    assert storage.list_folders(f"{root}/a") == ["b"] and storage.list_folders(f"{root}/nothing") == []
    for start, stop in ((0, 4), (3, 3), (8, 100), (10, 12), (50, 60)):
        assert storage.read_range(f"{root}/a/b/object", start, stop) == b"0123456789"[start:stop]
    with pytest.raises(ObjectMissing):
        storage.read_range(f"{root}/a/b/nothing", 0, 1)
