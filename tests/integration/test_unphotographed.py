"""Samples without a photo that a model could read: slices of volumes, and labels that came without their photos."""

from pathlib import Path

import generators
from doubles import FreeModel

import segbatch
from segbatch import api
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.jobs import Limits

INLINE = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=4))


def statuses(root: str) -> dict[str, int]:
    rows = api.query(root, "SELECT status, count(*) AS n FROM masks GROUP BY 1").to_pylist()
    return {r["status"]: r["n"] for r in rows}


def predicted(dataset: str, tree: Path, out: Path, by_reference: bool = False) -> dict[str, int]:
    samples, masks = str(out / "samples"), str(out / "masks")
    segbatch.ingest(dataset, str(tree), samples, by_reference=by_reference, limits=Limits(1.0), options=INLINE)
    segbatch.predict(FreeModel(), samples, masks, limits=Limits(1.0), options=INLINE)
    return statuses(masks)


def test_slices_of_volumes_are_refused_by_name(tmp_path: Path) -> None:
    tree = generators.TREES["lits"](tmp_path / "tree")
    found = predicted("lits", tree, tmp_path / "out")
    assert set(found) == {"volume"} and found["volume"] > 3
    assert predicted("lits", tree, tmp_path / "again", by_reference=True) == found
    kept = api.query(str(tmp_path / "again" / "samples"), "SELECT count(image) AS n FROM samples").to_pylist()
    assert kept == [{"n": found["volume"]}]  # slices have no address of their own


def test_labels_without_their_photos_are_told_from_photos_that_are_gone(tmp_path: Path) -> None:
    tree = generators.TREES["coco-instances"](tmp_path / "tree")
    for photo in list(tree.rglob("*.jpg")):
        photo.unlink()
    found = predicted("coco-instances", tree, tmp_path / "out")
    assert found.pop("labels-only") > 0 and "ok" not in found
