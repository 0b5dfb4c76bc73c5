"""Verification: every kind of damage is found, named with its file, and nothing else."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generators
import numpy as np
import photos
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doubles import FreeModel

import segbatch
from segbatch import api, cli, schemas, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import BadItemsError, SchemaError, SegbatchError
from segbatch.stages.verify import Problem

SMALL = RunOptions(engine=EngineConfig(kind="inline", threads=2), plan=PlanConfig(shard_rows=2))


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Six photos in three files."""
    out = tmp_path / "masks"
    segbatch.predict(FreeModel(), str(photos.folder(tmp_path / "in", 6)), str(out), options=SMALL)
    return out


def parts(root: Path, table: str = "masks") -> list[Path]:
    return [Path(p.uri) for p in tables.parts(str(root / table))]


def problems(root: Path) -> list[Problem]:
    return list(api.verify(str(root), options=SMALL).problems)


def rewrite(part: Path, change: Callable[[pa.Table], pa.Table], footer: dict[str, str] | None = None) -> None:
    """Write a part file anew with other rows, as a faulty writer would."""
    with pq.ParquetFile(part) as file:
        rows, told = change(file.read().cast(schemas.MASKS)), tables.footer(str(part)) | (footer or {})
    writer = tables.PartWriter("masks")
    for batch in rows.cast(schemas.MASKS).combine_chunks().to_batches():
        writer.write(batch)
    part.write_bytes(writer.finish(told))


def replaced(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """A table with other values in a column."""

    def changed(rows: pa.Table) -> pa.Table:
        place = schemas.MASKS.get_field_index(name)
        column = pa.array(change(rows.column(name).to_pylist()), schemas.MASKS.field(name).type)
        return rows.set_column(place, schemas.MASKS.field(name), column)

    return changed


def test_a_good_run_is_good(masks: Path) -> None:
    found = api.verify(str(masks), options=SMALL)
    size = sum(p.stat().st_size for p in parts(masks))
    assert (found.is_good, found.files, found.rows, found.bytes, found.without_checksums) == (True, 3, 6, size, 0)


def test_every_task_and_an_evaluation_are_good(tmp_path: Path) -> None:
    for kind, make in (("camvid", generators.camvid), ("image-masks", generators.image_masks)):
        segbatch.ingest(kind, str(make(tmp_path / kind)), str(tmp_path / f"{kind}-out"), options=SMALL)
        assert problems(tmp_path / f"{kind}-out") == []
    samples, masks, metrics = (str(tmp_path / n) for n in ("camvid-out", "masks", "metrics"))
    segbatch.predict(FreeModel(), samples, masks, options=SMALL)
    names = {"dark": "sky", "red": "building", "blue": "road", "both": "car"}
    segbatch.evaluate(masks, samples, metrics, options=SMALL, protocol="semantic", class_map=names)
    found = api.verify(metrics, options=SMALL)
    assert found.is_good and found.files == 6 + 3  # state; summary, images and confusion
    Path(tables.parts(f"{metrics}/summary")[0].uri).write_bytes(b"PAR1")
    (problem,) = problems(tmp_path / "metrics")
    assert problem.code == "unreadable" and "/summary/part-" in problem.uri


def test_a_changed_byte_anywhere_in_the_pages(masks: Path) -> None:
    part = parts(masks)[1]
    good = part.read_bytes()
    with pq.ParquetFile(part) as file:
        group = file.metadata.row_group(0)
        chunks = {c.path_in_schema: c for c in map(group.column, range(group.num_columns))}
    for name in ("sample_id", "semantic.list.element.length", "seconds_model"):
        chunk = chunks[name]
        data = bytearray(good)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start + chunk.total_compressed_size - 1] ^= 4
        part.write_bytes(data)
        (problem,) = problems(masks)
        assert (problem.code, problem.uri) == ("unreadable", str(part)), name
        assert problem.fix == f"delete it and run the command that made {masks} again"
    part.write_bytes(good)
    assert problems(masks) == []


def test_a_changed_byte_anywhere_in_the_footer(masks: Path) -> None:
    """It is found, or changes nothing that is read; and no verb says what is wrong without saying of which file."""
    part = parts(masks)[0]
    good, rows = part.read_bytes(), [b.to_pylist() for b in tables.batches(str(part), "masks")]
    length = int.from_bytes(good[-8:-4], "little")
    random = np.random.default_rng(0)
    found = 0
    for at in [*random.integers(len(good) - 8 - length, len(good), 150).tolist(), good.rindex(b"image_uri")]:
        damaged = bytearray(good)
        damaged[at] ^= 1 << int(random.integers(0, 8))
        part.write_bytes(damaged)
        if problems(masks):
            found += 1
            with contextlib.suppress(SegbatchError):
                api.status(str(masks))
        else:
            assert [b.to_pylist() for b in tables.batches(str(part), "masks")] == rows
    assert found > 50


def test_a_damaged_column_name(masks: Path) -> None:
    part = parts(masks)[0]
    good = part.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    part.write_bytes(good[:footer] + good[footer:].replace(b"image_uri", b"image_urj"))
    (problem,) = [p for p in problems(masks) if p.code == "schema"]
    assert problem.uri == str(part) and "image_uri" in problem.said and "image_urj" in problem.said


def test_a_damaged_footer_is_told_with_its_file(masks: Path) -> None:
    part = parts(masks)[0]
    good = bytearray(part.read_bytes())
    good[len(good) - 8 - int.from_bytes(good[-8:-4], "little")] ^= 0x80
    part.write_bytes(good)
    for verb in (api.status, lambda out: list(tables.scan(out, "masks"))):
        with pytest.raises(SchemaError, match=rf"{part.name} is not a readable Parquet file"):
            verb(str(masks))


def test_deleting_what_is_broken_and_running_again_mends_it(tmp_path: Path, masks: Path) -> None:
    part = parts(masks)[2]
    part.write_bytes(part.read_bytes()[:-100])
    (problem,) = problems(masks)
    assert problem.code == "unreadable" and "not a readable Parquet file" in problem.said
    part.unlink()
    (problem,) = problems(masks)
    said = "1 planned shards with 2 rows are not there, for example 2"
    assert (problem.code, problem.said, problem.fix) == ("missing", said, "run the same command again")
    segbatch.predict(FreeModel(), str(tmp_path / "in"), str(masks), options=SMALL)
    assert problems(masks) == []


def test_files_in_the_wrong_place(masks: Path) -> None:
    first, second, third = parts(masks)
    second.write_bytes(first.read_bytes())
    third.rename(third.with_name("part-00000009-aaaaaaaaaaaa.parquet"))
    found = {p.code: p for p in problems(masks)}
    assert set(found) == {"missing", "stray", "footer", "duplicates"}
    assert found["stray"].uri.endswith("/part-00000009-aaaaaaaaaaaa.parquet")
    assert (found["footer"].uri, found["footer"].said) == (str(second), "it is the result of shard 0, not 1")
    twice = f"2 sample ids occur twice: photo-0000.jpg in {first.name} and {second.name}"
    assert found["duplicates"].said.startswith(twice)


@pytest.mark.parametrize(
    ("change", "footer", "code", "said"),
    [
        (lambda t: t.slice(1), {}, "rows", "1 rows, 2 were planned"),
        (lambda t: t, {"segbatch.bad": "2"}, "counts", "2 rows with 0 bad ones, its footer says 2 with 2"),
        (replaced("height", lambda v: [v[0], v[1] + 1]), {}, "runs", "photo-0003.jpg: semantic covers 768 pixels"),
        (
            replaced("semantic", lambda v: [v[0], [{"value": 9, "length": 768}]]),
            {},
            "classes",
            "photo-0003.jpg: semantic holds label 9, which is no class",
        ),
        (
            replaced("label_maps", lambda v: [[{"name": "x", "runs": [{"value": 0, "length": 7}]}], v[1]]),
            {},
            "runs",
            "photo-0002.jpg: label_maps covers 7 pixels, the image has 768",
        ),
    ],
)
def test_rows_that_cannot_be(
    masks: Path, change: Callable[[pa.Table], pa.Table], footer: dict[str, str], code: str, said: str
) -> None:
    part = parts(masks)[1]
    rewrite(part, change, footer)
    (problem,) = problems(masks)
    assert (problem.code, problem.uri) == (code, str(part)) and problem.said.startswith(said)


def test_bad_rows_are_no_problem(tmp_path: Path) -> None:
    source = photos.folder(tmp_path / "in", 4)
    (source / "empty.jpg").touch()
    with pytest.raises(BadItemsError):
        segbatch.predict(FreeModel(), str(source), str(tmp_path / "out"), options=SMALL)
    assert problems(tmp_path / "out") == []


def test_files_without_checksums_are_counted(masks: Path) -> None:
    """As an older segbatch wrote them."""
    part = parts(masks)[0]
    with pq.ParquetFile(part) as file:
        rows, told = file.read(), dict(file.metadata.metadata)
    del told[tables.CHECKSUMS_KEY.encode()], told[b"ARROW:schema"]
    pq.write_table(rows.replace_schema_metadata(told), part)
    found = api.verify(str(masks), options=SMALL)
    assert (found.is_good, found.files, found.without_checksums) == (True, 3, 1)


def test_command_line(masks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["verify", str(masks)])
    assert f"{masks}: 3 files, 6 rows" in capsys.readouterr().out
    parts(masks)[0].unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(masks), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and not document["good"]
    assert [p["code"] for p in document["problems"]] == ["missing"]
