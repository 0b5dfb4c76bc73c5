"""Files that earlier versions wrote stay readable: every committed ``schema-*`` folder, every table."""

from pathlib import Path

import pytest

from segbatch import schemas, tables

HERE = Path(__file__).resolve().parent
FILES = sorted(HERE.glob("schema-*/*.parquet"))


def test_the_current_version_has_a_fixture() -> None:
    present = {p.stem for p in (HERE / f"schema-{schemas.SCHEMA_VERSION}").glob("*.parquet")}
    assert present == set(schemas.TABLES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_old_file_is_read(path: Path) -> None:
    rows = list(tables.batches(str(path), path.stem))
    assert sum(b.num_rows for b in rows) >= 1
    known = schemas.TABLES[path.stem]
    for field in rows[0].schema:
        assert known.field(field.name).type == field.type  # a column is never dropped and never changes its type


def test_old_masks_decode() -> None:
    from segbatch.codecs import runlength
    from segbatch.codecs.columns import runs_at

    for path in HERE.glob("schema-*/masks.parquet"):
        for batch in tables.batches(str(path), "masks", ["height", "width", "semantic"]):
            for i, row in enumerate(batch.select(["height", "width"]).to_pylist()):
                runs = runs_at(batch.column("semantic"), i)
                assert runs is not None
                assert runlength.decode(runs, (row["height"], row["width"])).shape == (row["height"], row["width"])
