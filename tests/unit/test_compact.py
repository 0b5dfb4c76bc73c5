"""Compaction: the same rows in fewer files, under the run protocol; the old root is only read."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import generators
import photos
import pyarrow.parquet as pq
import pytest
from doubles import FreeModel

import segbatch
from segbatch import api, jobs, schemas, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.engine.activity import Activity
from segbatch.engine.journal import NullJournal
from segbatch.errors import ConfigError, IncompleteRunError, SchemaError
from segbatch.jobs import Limits
from segbatch.runs import Run, items_of
from segbatch.stages import compact, join
from segbatch.stages.join import SOURCE_KEY

SMALL = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=2))
INLINE = RunOptions(engine=EngineConfig(kind="inline"))


def rows_of(root: Path, table: str) -> list[dict[str, Any]]:
    return [row for batch in tables.scan(str(root), table) for row in batch.to_pylist()]


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a root."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def of_three(source: Path, table: str) -> int:
    """A size that three files of a root fit in."""
    sizes = [p.size for p in tables.parts(str(source / table))]
    return max(sum(sizes[i : i + 3]) for i in range(len(sizes)))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Six samples, one of them bad, in three files."""
    tree = generators.camvid(tmp_path / "tree", frames=6)
    sorted((tree / "trainannot").iterdir())[3].write_bytes(b"no image")
    segbatch.ingest("camvid", str(tree), str(tmp_path / "samples"), limits=Limits(1.0), options=SMALL)
    return tmp_path / "samples"


def test_same_rows_in_the_same_order_and_nothing_is_touched(tmp_path: Path, samples: Path) -> None:
    before = files(samples)
    result = api.compact(str(samples), str(tmp_path / "new"), file_bytes=of_three(samples, "samples"), options=INLINE)
    old, new = tables.parts(str(samples / "samples")), tables.parts(str(tmp_path / "new" / "samples"))
    assert (len(old), len(new)) == (6, 2)
    assert rows_of(tmp_path / "new", "samples") == rows_of(samples, "samples")
    assert (result.rows, result.state.bad, result.state.reasons) == (12, 1, {"bad-label": 1})
    assert files(samples) == before
    assert tables.dataset_info(str(tmp_path / "new")) == tables.dataset_info(str(samples))
    with pq.ParquetFile(new[0].uri) as file:
        assert file.schema_arrow.remove_metadata() == schemas.SAMPLES
    again = api.compact(str(samples), str(tmp_path / "new"), file_bytes=of_three(samples, "samples"), options=INLINE)
    assert (again.rows, again.state.rows_done) == (0, 12)
    assert api.verify(str(tmp_path / "new"), options=INLINE).is_good


def test_masks_are_still_zipped_with_their_samples(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, new, model = tmp_path / "masks", tmp_path / "new", FreeModel()
    segbatch.predict(model, str(samples), str(masks), where="status = 'ok'", options=SMALL)
    api.compact(str(masks), str(new), options=INLINE)
    (part,) = tables.parts(str(new / "masks"))
    ranges = json.loads(tables.footer(part.uri)[SOURCE_KEY])
    assert len(tables.parts(str(masks / "masks"))) == 6
    assert [r["rows"] for r in ranges] == [1, 2, 2, 2, 2, 2]  # of six samples files; the bad one is left out
    names = {"dark": "sky", "red": "building", "blue": "road", "both": "car"}
    choice: dict[str, Any] = {"protocol": "semantic", "class_map": names, "options": INLINE}
    monkeypatch.setattr(join.Join, "_joined", None)  # the two are zipped, not joined
    results = [
        segbatch.evaluate(str(m), str(samples), str(tmp_path / f"m{i}"), **choice) for i, m in enumerate((masks, new))
    ]
    assert results[0].figures == results[1].figures and results[0].rows == results[1].rows == 11


def test_neighbouring_ranges_of_one_file_become_one(tmp_path: Path) -> None:
    generators.camvid(tmp_path / "tree", frames=6)
    segbatch.ingest("camvid", str(tmp_path / "tree"), str(tmp_path / "samples"), options=INLINE)
    segbatch.predict(FreeModel(), str(tmp_path / "samples"), str(tmp_path / "masks"), options=SMALL)
    api.compact(str(tmp_path / "masks"), str(tmp_path / "new"), options=INLINE)
    (part,) = tables.parts(str(tmp_path / "new" / "masks"))
    (found,) = json.loads(tables.footer(part.uri)[SOURCE_KEY])
    assert (found["row_start"], found["rows"]) == (0, 12)


def test_masks_of_plain_photos_have_no_source(tmp_path: Path) -> None:
    segbatch.predict(FreeModel(), str(photos.folder(tmp_path / "in", 5)), str(tmp_path / "masks"), options=SMALL)
    api.compact(str(tmp_path / "masks"), str(tmp_path / "new"), options=INLINE)
    (part,) = tables.parts(str(tmp_path / "new" / "masks"))
    assert SOURCE_KEY not in tables.footer(part.uri)
    assert [r["sample_id"] for r in rows_of(tmp_path / "new", "masks")] == sorted(photos.sample_ids(tmp_path / "in"))


def test_an_interrupted_compaction_goes_on(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.compact_job(str(samples), str(tmp_path / "new"), 1)
    run = Run.open(job.out, job.table, job.verb, job.config)
    run.plan(job.listing, PlanConfig(shard_rows=2**31, shard_bytes=1))
    first, *others = run.missing()
    api.compact(str(samples), str(tmp_path / "new"), file_bytes=1, options=INLINE)
    assert len(others) == 5 and len(items_of(first)) == 1
    written = part_times(tmp_path / "new")
    (Path(run.root) / "samples" / others[2].key).unlink()
    result = api.compact(str(samples), str(tmp_path / "new"), file_bytes=1, options=INLINE)
    now = part_times(tmp_path / "new")
    assert result.rows == 2 and sum(now[k] != written[k] for k in written) == 1
    assert rows_of(tmp_path / "new", "samples") == rows_of(samples, "samples")


def part_times(root: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (root / "samples").iterdir()}


def test_a_changed_source_is_compacted_again_where_it_changed(tmp_path: Path, samples: Path) -> None:
    size = of_three(samples, "samples")
    api.compact(str(samples), str(tmp_path / "new"), file_bytes=size, options=INLINE)
    before = part_times(tmp_path / "new")
    label = sorted((tmp_path / "tree" / "trainannot").iterdir())[3]
    generators.save(label, generators.labels(1, (0, 3)).astype("uint8"))
    assert segbatch.retry(str(samples), options=INLINE).state.bad == 0
    result = api.compact(str(samples), str(tmp_path / "new"), file_bytes=size, options=INLINE)
    after = part_times(tmp_path / "new")
    assert result.state.bad == 0 and sum(after[k] != before[k] for k in before) == 1
    assert rows_of(tmp_path / "new", "samples") == rows_of(samples, "samples")


def test_a_damaged_file_of_the_source_is_named(tmp_path: Path, samples: Path) -> None:
    part = Path(tables.parts(str(samples / "samples"))[2].uri)
    damage(part, "image")
    with pytest.raises(SchemaError, match=rf"{part.name} is damaged: .*CRC"):
        api.compact(str(samples), str(tmp_path / "new"), options=INLINE)


def damage(part: Path, column: str) -> None:
    """Change a byte in the middle of a column."""
    with pq.ParquetFile(part) as file:
        group = file.metadata.row_group(0)
        (chunk,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
        place = chunk.data_page_offset + chunk.total_compressed_size // 2
    data = bytearray(part.read_bytes())
    data[place] ^= 1
    part.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda s: tables.parts(str(s / "samples"))[1].uri, IncompleteRunError, "5 of 6 shards and 10 of 12 rows"),
        (lambda s: "", ConfigError, "lies in the run root that is compacted"),
    ],
)
def test_what_is_refused(samples: Path, spoil: Callable[[Path], str], error: type[Exception], said: str) -> None:
    out = samples / "new"
    if gone := spoil(samples):
        Path(gone).unlink()
        out = samples.parent / "new"
    with pytest.raises(error, match=said):
        api.compact(str(samples), str(out), options=INLINE)
    assert not out.exists()


def test_a_copy_is_not_retried(tmp_path: Path, samples: Path) -> None:
    api.compact(str(samples), str(tmp_path / "new"), options=INLINE)
    with pytest.raises(ConfigError, match=rf"compacted copy .segbatch retry {samples} --failed"):
        segbatch.retry(str(tmp_path / "new"), options=INLINE)
    with pytest.raises(ConfigError, match="another configuration: file_bytes"):
        api.compact(str(samples), str(tmp_path / "new"), file_bytes=1 << 20, options=INLINE)


def test_a_file_that_waits_for_its_turn_does_not_look_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "_TURN_S", 0.01)
    source = tmp_path / "samples"
    segbatch.ingest("images", str(photos.folder(tmp_path / "in", 4)), str(source), options=INLINE)
    job = jobs.compact_job(str(source), str(tmp_path / "new"), 1 << 20)
    run, listing = jobs.opened(job)
    run.plan(listing, PlanConfig(shard_rows=2**31))
    (shard,) = run.shards()
    activity = Activity(NullJournal())
    worker = compact.CompactTask("samples").open(1, activity)
    with activity.of(shard.number), ThreadPoolExecutor(1) as pool:
        with worker._one_file:
            waiting = pool.submit(worker.run, shard, {})
            began = activity._latest[shard.number]
            until = time.monotonic() + 20
            while activity._latest[shard.number] < began + 0.1 and time.monotonic() < until:
                time.sleep(0.01)
            assert activity._latest[shard.number] >= began + 0.1 and not waiting.done()
        assert waiting.result(timeout=20).rows == 4
