"""Tables: part files, versions, footers, SQL."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segbatch import api, schemas, tables
from segbatch.codecs import runlength
from segbatch.codecs.columns import class_pixels_array, runs_array, runs_at
from segbatch.codecs.runlength import Runs
from segbatch.errors import ConfigError, SchemaError


def masks_rows(maps: list[np.ndarray | None], first: int = 0) -> pa.RecordBatch:
    """A masks batch whose rows have these label maps; None is a bad row."""
    runs = [None if m is None else runlength.encode(m) for m in maps]
    count = len(maps)
    columns = {
        "sample_id": [f"photo-{first + i}" for i in range(count)],
        "image_uri": [f"/photos/{first + i}.jpg" for i in range(count)],
        "etag": ["1"] * count,
        "height": [None if m is None else m.shape[0] for m in maps],
        "width": [None if m is None else m.shape[1] for m in maps],
        "status": ["truncated" if m is None else "ok" for m in maps],
        "semantic": runs_array(runs),
        "class_pixels": class_pixels_array(runs),
        "model_digest": ["d"] * count,
    }
    arrays = [
        columns[f.name]
        if isinstance(columns.get(f.name), pa.Array)
        else pa.array(columns.get(f.name, [None] * count), f.type)
        for f in schemas.MASKS
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schemas.MASKS)


def write_masks(root: Path, maps: list[np.ndarray | None], number: int = 0) -> Path:
    """One masks part file of a run root."""
    writer = tables.PartWriter("masks")
    for start in range(0, len(maps), 64):
        writer.write(masks_rows(maps[start : start + 64], start))
    path = root / "masks" / f"part-{number:08d}-{'a' * 12}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(writer.finish({"segbatch.rows": str(writer.rows), "segbatch.bad": str(writer.bad)}))
    return path


@pytest.fixture
def maps() -> list[np.ndarray | None]:
    rng = np.random.default_rng(0)
    return [None if i % 50 == 7 else rng.integers(0, 12, (9, 13)).astype(np.uint8) for i in range(250)]


def test_part_round_trip_keeps_every_map_and_counts_bad_rows(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    path = write_masks(tmp_path, maps)
    found = []
    for batch in tables.batches(str(path), "masks", ["semantic"], batch_rows=33):
        column = batch.column("semantic")
        found += [runs_at(column, i) for i in range(batch.num_rows)]
    assert len(found) == len(maps)
    for original, runs in zip(maps, found, strict=True):
        if original is None:
            assert runs is None
        else:
            assert runs is not None
            assert np.array_equal(runlength.decode(runs, original.shape), original)
    footer = tables.footer(str(path))
    assert (footer["segbatch.rows"], footer["segbatch.bad"]) == ("250", "5")


def test_row_groups_stay_small_and_schema_is_explicit(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    file = pq.ParquetFile(write_masks(tmp_path, maps))
    assert all(file.metadata.row_group(i).num_rows <= schemas.ROW_GROUP_ROWS for i in range(file.num_row_groups))
    assert file.schema_arrow.equals(schemas.MASKS)  # all-null columns included
    assert file.schema_arrow.metadata[schemas.VERSION_KEY] == schemas.SCHEMA_VERSION.encode()


@pytest.mark.parametrize(("start", "stop"), [(0, 250), (99, 101), (0, 1), (249, 250), (64, 64), (120, 230)])
def test_batches_gives_exactly_the_rows_asked_for(
    tmp_path: Path, maps: list[np.ndarray | None], start: int, stop: int
) -> None:
    path = write_masks(tmp_path, maps)
    ids = [i for b in tables.batches(str(path), "masks", ["sample_id"], start, stop) for i in b.column(0).to_pylist()]
    assert ids == [f"photo-{i}" for i in range(start, stop)]


def test_runs_of_a_sliced_column(maps: list[np.ndarray | None]) -> None:
    column = masks_rows(maps).slice(5, 20).column("semantic")
    for i in range(20):
        original, runs = maps[5 + i], runs_at(column, i)
        assert (original is None) == (runs is None)
        if original is not None and runs is not None:
            assert np.array_equal(runlength.decode(runs, original.shape), original)


def test_columns_of_nothing() -> None:
    assert len(runs_array([])) == 0
    assert runs_array([None, None]).null_count == 2
    empty = Runs(np.empty(0, np.uint16), np.empty(0, np.uint32))
    assert runs_array([empty, None]).to_pylist() == [[], None]


def test_another_table_or_version_is_refused(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    path = write_masks(tmp_path, maps)
    with pytest.raises(SchemaError, match="holds masks, not samples"):
        tables.open_part(str(path), "samples")
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, schemas.VERSION_KEY: b"2.0"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(SchemaError, match=r"version 2\.0, this segbatch reads 1\.x"):
        tables.open_part(str(path), "masks")


def test_a_cut_file_is_a_clear_error(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    path = write_masks(tmp_path, maps)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SchemaError, match="not a readable Parquet file"):
        tables.open_part(str(path), "masks")


def test_find_accepts_root_and_folder_and_names_what_is_missing(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    write_masks(tmp_path, maps)
    assert tables.find(str(tmp_path), "masks") == tables.find(str(tmp_path / "masks"), "masks")
    assert tables.root_of(str(tmp_path / "masks"), "masks") == str(tmp_path)
    with pytest.raises(ConfigError, match="has no samples table"):
        tables.find(str(tmp_path), "samples")


def test_find_with_a_root_named_like_the_table(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    root = tmp_path / "masks"
    write_masks(root, maps)
    assert tables.find(str(root), "masks") == str(root / "masks")


def test_query_counts_pixels_without_decoding(tmp_path: Path, maps: list[np.ndarray | None]) -> None:
    write_masks(tmp_path, maps)
    sql = "SELECT r.value, sum(r.length)::BIGINT FROM masks, unnest(semantic) u(r) GROUP BY 1 ORDER BY 1"
    found = {row["value"]: row for row in api.query(str(tmp_path), sql).to_pylist()}
    counts = sum((np.bincount(m.ravel(), minlength=12) for m in maps if m is not None), np.zeros(12, np.int64))
    assert [next(v for k, v in found[i].items() if k != "value") for i in range(12)] == counts.tolist()
    areas = "SELECT sum(c.pixels)::BIGINT AS pixels FROM masks, unnest(class_pixels) u(c)"
    assert api.query(str(tmp_path), areas).to_pylist() == [{"pixels": int(counts.sum())}]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY masks TO '/tmp/segbatch-query-leak.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SET enable_external_access=true",
        "ATTACH '/tmp/segbatch-query-leak.db'",
    ],
)
def test_query_reads_and_writes_nothing_else(tmp_path: Path, maps: list[np.ndarray | None], sql: str) -> None:
    write_masks(tmp_path, maps)
    with pytest.raises(ConfigError, match="SQL"):
        api.query(str(tmp_path), sql)
    assert not Path("/tmp/segbatch-query-leak.csv").exists()
    assert not Path("/tmp/segbatch-query-leak.db").exists()


def test_write_table_replaces_the_whole_table(tmp_path: Path) -> None:
    rows = [{"truth": "a", "predicted": "b", "truth_id": 0, "predicted_id": 1, "pixels": n} for n in range(250)]
    tables.write_table(str(tmp_path), "confusion", pa.Table.from_pylist(rows, schemas.CONFUSION))
    tables.write_table(str(tmp_path), "confusion", pa.Table.from_pylist(rows[:3], schemas.CONFUSION))
    found = [p for b in tables.scan(str(tmp_path), "confusion", ["pixels"]) for p in b.column(0).to_pylist()]
    assert found == [0, 1, 2]
    assert len(tables.parts(str(tmp_path / "confusion"))) == 1


def test_a_batch_of_other_columns_is_refused() -> None:
    with pytest.raises(SchemaError, match="columns"):
        tables.PartWriter("masks").write(pa.RecordBatch.from_pylist([{"x": 1}]))
