"""A dataset that somebody else's package brings: installed by pip, found by its entry point, used like a built-in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import generators
import numpy as np
import pytest

PLUGIN = Path(__file__).resolve().parent.parent / "plugin"


def pets(root: Path) -> Path:
    """A small tree in the layout of the Oxford-IIIT Pet download, one photo without its trimap."""
    for i, name in enumerate(("Abyssinian_1", "beagle_7", "pug_12")):
        generators.save(root / "images" / f"{name}.jpg", generators.photo(i))
        if name != "pug_12":
            generators.save(
                root / "annotations" / "trimaps" / f"{name}.png", generators.labels(i, (1, 2, 3)).astype(np.uint8)
            )
    (root / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_7 5 2 1\n")
    (root / "annotations" / "test.txt").write_text("pug_12 26 2 19\n")
    return root


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that sees the installed plugin."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("installed")
    shutil.copytree(PLUGIN, source)
    arguments = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(target)}


def segbatch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segbatch.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_is_listed_recognised_and_ingested(environment: dict[str, str], tmp_path: Path) -> None:
    listed = json.loads(segbatch(environment, "datasets", "--json").stdout)
    summary = next(d["summary"] for d in listed if d["name"] == "oxford-pets")
    assert summary.startswith("Oxford-IIIT Pet: images/")
    done = segbatch(environment, "ingest", "auto", str(pets(tmp_path / "pets")), str(tmp_path / "out"))
    assert done.returncode == 3 and "looks like oxford-pets" in done.stderr and "missing-label" in done.stderr
    sql = "SELECT sample_id, split, status, len(semantic) > 0 AS labelled FROM samples ORDER BY 1"
    rows = json.loads(segbatch(environment, "query", str(tmp_path / "out"), sql, "--json").stdout)
    assert [(r["sample_id"], r["split"], r["status"]) for r in rows] == [
        ("Abyssinian_1", "trainval", "ok"),
        ("beagle_7", "trainval", "ok"),
        ("pug_12", "test", "missing-label"),
    ]


def test_it_takes_no_more_than_forty_lines() -> None:
    text = (PLUGIN / "oxford_pets.py").read_text()
    assert len(text[text.index("class OxfordPets") :].splitlines()) <= 40
