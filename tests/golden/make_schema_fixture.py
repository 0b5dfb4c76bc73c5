"""Writes ``schema-<version>/``: one small part of every table, as this version writes them.

Run it once when the schema's version changes, and commit the new folder beside the old ones, which are read for ever:

    python tests/golden/make_schema_fixture.py
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generators
import pyarrow as pa

import segbatch
from segbatch import schemas, tables
from segbatch.api import load_train_config
from segbatch.config import EngineConfig, RunOptions

HERE = Path(__file__).resolve().parent


def write(target: Path) -> None:
    """Every table of a three-photo run."""
    options = RunOptions(engine=EngineConfig(kind="inline"))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        generators.image_masks(root / "tree")
        segbatch.ingest("image-masks", str(root / "tree"), str(root / "samples"), options=options)
        (root / "train.toml").write_text(f'samples = "{root}/samples"\n[model]\nkind = "color"\n')
        segbatch.train(load_train_config(str(root / "train.toml"), str(root / "model")))
        segbatch.predict(f"color@{root}/model", str(root / "samples"), str(root / "masks"), options=options)
        segbatch.evaluate(str(root / "masks"), str(root / "samples"), str(root / "metrics"), options=options)
        row = {"kind": "case", "group_id": "v", "values": [("dice", 0.5), ("voe", None)]}
        tables.write_table(str(root / "metrics"), "details", pa.Table.from_pylist([row], schema=schemas.DETAILS))
        found = {p.parent.name: p for p in sorted(root.rglob("part-*.parquet"), reverse=True)}
        target.mkdir(parents=True, exist_ok=True)
        for table in schemas.TABLES:
            shutil.copy(found[table], target / f"{table}.parquet")


if __name__ == "__main__":
    write(HERE / f"schema-{schemas.SCHEMA_VERSION}")
