"""Ingest of whole shards with the inline engine: bytes, label maps, bad rows, retry, order, journal."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from segbatch import schemas, tables
from segbatch.codecs import runlength
from segbatch.codecs.columns import label_maps_at, runs_at
from segbatch.config import EngineConfig, PlanConfig
from segbatch.datasets import registry
from segbatch.datasets.base import Dataset
from segbatch.datasets.camvid import CamVid
from segbatch.datasets.tree import Tree
from segbatch.engine.base import Control
from segbatch.engine.inline import InlineEngine
from segbatch.errors import DataError, EngineError, StorageError, TransientStorageError
from segbatch.records import ClassTable, Instance, Issue, Outcome, PlanItem, Sample, Segment, ShardRef, VolumeSlice
from segbatch.runs import Run
from segbatch.stages import ingest, items
from segbatch.stages.items import grouped
from segbatch.stages.stopwatch import Stopwatch


class Recorder:
    """A journal that remembers who worked on what, and who has not finished."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.open: dict[str, Sequence[str]] = {}
        self._lock = threading.Lock()

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        with self._lock:
            assert slot not in self.open
            self.open[slot] = sample_ids
            self.noted += sample_ids

    def clear(self, slot: str) -> None:
        with self._lock:
            del self.open[slot]


def planned(out: Path, source: Path, name: str = "camvid", shard_rows: int = 2) -> Run:
    run = Run.open(str(out), "samples", "ingest", {"dataset": name})
    run.plan(lambda: registry.dataset(name).items(Tree.of(str(source)), ()), PlanConfig(shard_rows=shard_rows))
    return run


def ingested(run: Run, task: ingest.IngestTask, shards: Sequence[ShardRef] | None = None) -> list[Outcome]:
    engine = InlineEngine(EngineConfig(kind="inline", threads=2))
    return list(engine.map(task, run.missing() if shards is None else shards, Control()))


def rows_of(root: Path) -> list[dict[str, Any]]:
    return [row for batch in tables.scan(str(root), "samples") for row in batch.to_pylist()]


def camvid_task(source: Path, by_reference: bool = False) -> ingest.IngestTask:
    return ingest.IngestTask("camvid", by_reference)


def test_a_dataset_becomes_rows_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    source, out = generators.camvid(tmp_path / "camvid", frames=5), tmp_path / "out"
    run = planned(out, source)
    outcomes = ingested(run, camvid_task(source))
    rows, items = rows_of(out), list(CamVid().items(Tree.of(str(source)), ()))
    assert [o.rows for o in outcomes] == [2] * 5 and not any(o.bad for o in outcomes)
    assert [r["sample_id"] for r in rows] == [i.sample_id for i in items]
    for row, item in zip(rows, items, strict=True):
        truth = np.array(Image.open(json.loads(item.detail)["label"]))
        values, lengths = ([r[k] for r in row["semantic"]] for k in ("value", "length"))
        runs = runlength.Runs(np.array(values, np.uint16), np.array(lengths, np.uint32))
        present, pixels = np.unique(truth, return_counts=True)
        assert row["image"] == Path(item.uri).read_bytes() and row["bytes"] == len(row["image"])
        assert np.array_equal(runlength.decode(runs, truth.shape), truth)
        assert [(c["value"], c["pixels"]) for c in row["class_pixels"]] == list(zip(present, pixels, strict=True))
        assert (row["height"], row["width"], row["channels"], row["image_format"]) == (12, 16, 3, "png")
        assert (row["etag"], row["image_uri"], row["status"], row["issues"]) == (item.etag, item.uri, "ok", [])
        assert row["split"] in ("train", "val") and row["group_id"] == item.sample_id.rsplit("_", 1)[0]
        assert row["attributes"] == "{}" and row["instances"] is None and row["panoptic"] is None
    assert run.finish().complete


def test_by_reference_stores_where_the_photo_is(tmp_path: Path) -> None:
    source, out = generators.camvid(tmp_path / "camvid"), tmp_path / "out"
    ingested(planned(out, source), camvid_task(source, by_reference=True))
    rows = rows_of(out)
    assert all(r["image"] is None and r["height"] == 12 and r["semantic"] for r in rows)
    assert all(r["bytes"] == Path(r["image_uri"]).stat().st_size for r in rows)


def test_photos_without_labels_have_null_label_columns(tmp_path: Path) -> None:
    source, out = generators.images(tmp_path / "photos"), tmp_path / "out"
    ingested(planned(out, source, "images"), ingest.IngestTask("images", str(source)))
    rows = rows_of(out)
    assert len(rows) == 4 and all(r["semantic"] is None and r["class_pixels"] is None for r in rows)
    assert {r["image_format"] for r in rows} == {"png", "jpeg", "bmp"} and {r["split"] for r in rows} == {None}


def broken_camvid(root: Path) -> Path:
    """Six frames: good, bad label, photo gone, photo not an image, photo empty, label gone."""
    generators.camvid(root, frames=6, splits=("train",))
    photos = [Path(i.uri) for i in CamVid().items(Tree.of(str(root)), ())]
    generators.save(root / "trainannot" / photos[1].name, np.full((4, 4), 1, np.uint8))
    photos[2].unlink()
    photos[3].write_bytes(b"not an image at all")
    photos[4].write_bytes(b"")
    (root / "trainannot" / photos[5].name).unlink()
    return root


def test_bad_items_are_rows_with_a_reason_and_a_good_photo_is_kept(tmp_path: Path) -> None:
    source, out = broken_camvid(tmp_path / "camvid"), tmp_path / "out"
    (outcome,) = ingested(planned(out, source, shard_rows=6), camvid_task(source))
    rows = rows_of(out)
    status = ["ok", "size-mismatch", "missing-image", "not-an-image", "empty-file", "missing-label"]
    assert [r["status"] for r in rows] == status and (outcome.rows, outcome.bad) == (6, 5)
    assert outcome.reasons == dict.fromkeys(status[1:], 1)
    assert [r["image"] is not None for r in rows] == [True, True, False, False, False, True]
    assert [r["height"] for r in rows] == [12, 12, None, None, None, 12]
    assert all(r["semantic"] is None and r["issues"][0]["code"] == r["status"] for r in rows[1:])
    assert "4 x 4" in rows[1]["issues"][0]["message"] and "16 x 12" in rows[1]["issues"][0]["message"]
    assert all(r["split"] == "train" and r["group_id"] for r in rows)


def test_retry_reads_only_the_bad_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = broken_camvid(tmp_path / "camvid"), tmp_path / "out"
    run = planned(out, source, shard_rows=6)
    for outcome in ingested(run, camvid_task(source)):
        run.record(outcome)
    before = rows_of(out)
    generators.save(source / "trainannot" / Path(before[1]["image_uri"]).name, np.full((12, 16), 1, np.uint8))
    read: list[str] = []
    original = CamVid.read

    def counted(self: CamVid, item: PlanItem) -> Iterator[Sample]:
        read.append(item.sample_id)
        return original(self, item)

    monkeypatch.setattr(CamVid, "read", counted)
    (outcome,) = ingested(run, camvid_task(source), list(run.failed()))
    after = rows_of(out)
    assert sorted(read) == sorted(r["sample_id"] for r in before[1:]) and outcome.bad == 4
    assert after[0] == before[0] and after[1]["status"] == "ok" and len(after[1]["semantic"]) == 1
    assert [r["sample_id"] for r in after] == [r["sample_id"] for r in before]


def test_quarantined_samples_are_never_touched_and_every_other_is_in_the_journal(tmp_path: Path) -> None:
    source, out, journal = generators.camvid(tmp_path / "camvid"), tmp_path / "out", Recorder()
    (shard,) = planned(out, source, shard_rows=6).missing()
    poison = next(CamVid().items(Tree.of(str(source)), ())).sample_id
    worker = camvid_task(source).open(2, journal)
    outcome = worker.run(shard, {poison: "killed its process twice"})
    worker.close()
    (first, *others) = rows_of(out)
    assert (outcome.bad, outcome.reasons, worker.rows_done) == (1, {"quarantined": 1}, 6)
    assert (first["status"], first["image"]) == ("quarantined", None)
    assert first["issues"][0]["message"] == "killed its process twice"
    assert poison not in journal.noted and set(journal.noted) == {r["sample_id"] for r in others} and not journal.open


def test_probe_reads_one_sample_and_writes_nothing(tmp_path: Path) -> None:
    source, out, journal = generators.camvid(tmp_path / "camvid"), tmp_path / "out", Recorder()
    (shard,) = planned(out, source, shard_rows=6).missing()
    worker = camvid_task(source).open(1, journal)
    wanted = list(CamVid().items(Tree.of(str(source)), ()))[3].sample_id
    worker.probe(shard, wanted)
    worker.close()
    assert journal.noted == [wanted] and not (out / "samples").exists()


class Faulty(Dataset):
    """A dataset whose reads fail as told."""

    name = "faulty"
    tasks = ()

    def __init__(self, error: Exception) -> None:
        self.error = error

    def recognises(self, tree: Tree) -> bool:
        return False

    def classes(self, tree: Tree) -> ClassTable:
        return ClassTable(())

    def splits(self, tree: Tree) -> tuple[str, ...]:
        return ()

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        return iter([PlanItem(f"s{i}", f"{tree.source}/s{i}", "e", 1) for i in range(9)])

    def read(self, item: PlanItem) -> Iterator[Sample]:
        raise self.error


def test_a_store_that_is_down_fails_the_shard_not_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "dataset", lambda name: Faulty(TransientStorageError("timeout")))
    run = planned(tmp_path / "out", tmp_path, "faulty", shard_rows=9)
    with pytest.raises(EngineError, match=r"shard 0.* failed 3 times: timeout"):
        ingested(run, ingest.IngestTask("faulty"))
    assert list(run.missing())


def test_a_photo_that_may_not_be_read_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "dataset", lambda name: Faulty(StorageError("permission denied", "mend it")))
    ingested(planned(tmp_path / "out", tmp_path, "faulty"), ingest.IngestTask("faulty"))
    rows = rows_of(tmp_path / "out")
    assert [r["status"] for r in rows] == ["unreadable"] * 9 and "mend it" in rows[0]["issues"][0]["message"]


ITEM = PlanItem("a", "/photos/a.jpg", "e", 4)
SAMPLE = Sample("a", b"jpeg", "jpeg", "/photos/a.jpg", 2, 3, 3)


def test_the_batch_has_the_schema_also_when_it_is_empty() -> None:
    assert ingest.samples_batch([]).schema == schemas.SAMPLES and ingest.samples_batch([]).num_rows == 0


def test_instances_segments_attributes_and_issues_are_kept() -> None:
    instance = Instance(7, 3, (0.5, 1.0, 2.0, 1.0), 2.5, True, b"\x01b")
    segment = Segment(9, 4, 6.0, (0.0, 0.0, 3.0, 2.0))
    sample = replace(
        SAMPLE,
        semantic=np.array([[1, 1, 2], [2, 2, 65535]], np.uint16),
        instances=(instance,),
        segments=(segment,),
        attributes={"weather": "snow", "note": "ä"},
        issues=(Issue("odd-area", "area is 2.5", 7),),
    )
    plain = ingest.row_of(ITEM, SAMPLE)
    batch = ingest.samples_batch(
        [ingest.row_of(ITEM, sample), plain, ingest.bad_row(ITEM, DataError("y", code="quarantined"))]
    )
    first, second, third = batch.to_pylist()
    assert first["instances"][0] == {
        "id": 7, "category_id": 3, "bbox_xywh": [0.5, 1.0, 2.0, 1.0], "area": 2.5, "iscrowd": True, "counts": b"\x01b",
    }  # fmt: skip
    assert first["segments"][0]["bbox_xywh"] == [0.0, 0.0, 3.0, 2.0] and not first["segments"][0]["iscrowd"]
    assert json.loads(first["attributes"]) == sample.attributes and first["issues"][0]["annotation_id"] == 7
    assert [r["length"] for r in first["semantic"]] == [2, 3, 1]
    assert second["instances"] is None and second["issues"] == [] and third["attributes"] is None
    runs = runs_at(batch.column("semantic"), 0)
    assert runs is not None and runs.values.tolist() == [1, 2, 65535]


def test_a_dataset_that_breaks_its_promises_is_caught() -> None:
    short = replace(SAMPLE, semantic=np.zeros((3, 2), np.uint16))
    with pytest.raises(DataError, match="label map is") as caught:
        ingest.row_of(ITEM, short)
    assert caught.value.code == "size-mismatch"
    unlisted = replace(SAMPLE, panoptic=np.full((2, 3), 2, np.uint16), segments=(Segment(9, 4, 6.0, (0, 0, 3, 2)),))
    with pytest.raises(DataError, match="more segments than are listed"):
        ingest.row_of(ITEM, unlisted)


def test_panoptic_maps_extra_label_maps_and_slices_are_kept() -> None:
    index_map, parts = np.array([[1, 1, 0], [2, 2, 2]], np.uint16), np.array([[5, 0, 0], [0, 0, 9]], np.uint16)
    segments = (Segment(70000, 4, 2.0, (0.0, 0.0, 2.0, 1.0)), Segment(8, 5, 3.0, (0.0, 1.0, 3.0, 1.0)))
    volume = VolumeSlice(3, 30, (3.0, 3.0, 5.0), tuple(float(v) for v in range(16)), 1.0, -1024.0, "int16", b"\x5c\x01")
    sample = replace(SAMPLE, panoptic=index_map, segments=segments, label_maps={"parts_1": parts}, volume=volume)
    batch = ingest.samples_batch([ingest.row_of(ITEM, sample), ingest.row_of(ITEM, SAMPLE)])
    first, second = batch.to_pylist()
    runs = runs_at(batch.column("panoptic"), 0)
    assert runs is not None and np.array_equal(runlength.decode(runs, (2, 3)), index_map)
    assert [s["id"] for s in first["segments"]] == [70000, 8]
    maps = label_maps_at(batch.column("label_maps"), 0)
    assert list(maps) == ["parts_1"] and np.array_equal(runlength.decode(maps["parts_1"], (2, 3)), parts)
    assert first["volume"] == {**asdict(volume), "spacing_mm": [3.0, 3.0, 5.0], "affine": list(volume.affine)}
    assert second["panoptic"] is None and second["label_maps"] is None and second["volume"] is None


class Volumes(Dataset):
    """Volumes of four slices, of which the one named ``bad`` breaks after its second slice until it is mended."""

    name = "volumes"
    tasks = ()
    mended = False

    def recognises(self, tree: Tree) -> bool:
        return False

    def classes(self, tree: Tree) -> ClassTable:
        return ClassTable(())

    def splits(self, tree: Tree) -> tuple[str, ...]:
        return ()

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        return (PlanItem(v, f"/{v}.nii", "e", 1, rows=4, group_id=v) for v in ("first", "bad", "last"))

    def read(self, item: PlanItem) -> Iterator[Sample]:
        for i in range(4):
            if item.sample_id == "bad" and i == 2 and not self.mended:
                raise DataError("the file ends at slice 2", "copy it again", "truncated-volume", item.uri)
            yield replace(SAMPLE, sample_id=item.row_id(i), image_uri=item.uri)


def test_a_broken_volume_has_all_its_rows_and_is_redone_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = Volumes()
    monkeypatch.setattr(registry, "dataset", lambda name: volumes)
    run = planned(tmp_path / "out", tmp_path, "volumes", shard_rows=8)
    for outcome in ingested(run, ingest.IngestTask("volumes")):
        run.record(outcome)
    before = rows_of(tmp_path / "out")
    assert [r["sample_id"] for r in before] == [f"{v}/{i:04d}" for v in ("first", "bad", "last") for i in range(4)]
    assert [r["status"] for r in before] == ["ok"] * 6 + ["truncated-volume"] * 2 + ["ok"] * 4
    assert {r["group_id"] for r in before} == {"first", "bad", "last"}
    volumes.mended = True
    (outcome,) = ingested(run, ingest.IngestTask("volumes"), list(run.failed()))
    assert outcome.bad == 0 and [r["sample_id"] for r in rows_of(tmp_path / "out")] == [r["sample_id"] for r in before]


def test_batches_close_by_rows_and_by_bytes() -> None:
    def sizes(image_bytes: int, count: int) -> list[int]:
        row = ingest.Row("a", ITEM, image=bytes(image_bytes))
        return [len(group) for group in grouped([row] * count, ingest.SampleRows(CamVid(), False).weight)]

    assert sizes(10, 130) == [64, 64, 2] and sizes(20 << 20, 5) == [2, 2, 1] and sizes(1, 0) == []


def test_never_more_than_a_few_samples_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "_AHEAD_BYTES", 1)  # of small photos 32 MB are many
    source = generators.camvid(tmp_path / "camvid", frames=20)
    (shard,) = planned(tmp_path / "out", source, shard_rows=64).missing()
    journal = Recorder()
    worker = camvid_task(source).open(2, journal)
    rows = worker._rows(shard, list(CamVid().items(Tree.of(str(source)), ())), {}, Stopwatch())
    next(rows)
    assert isinstance(rows, Iterator) and len(journal.noted) <= 5
    worker.close()


def test_real_camvid_validation_set(tmp_path: Path, shared_data: Any) -> None:
    source, out = shared_data("data/camvid"), tmp_path / "out"
    run = Run.open(str(out), "samples", "ingest", {})
    run.plan(lambda: CamVid().items(Tree.of(str(source)), ("val",)), PlanConfig(shard_rows=51))
    assert sum(o.rows for o in ingested(run, camvid_task(source))) == 101
    scanned = pa.Table.from_batches(list(tables.scan(str(out), "samples", ["sample_id", "status", "class_pixels"])))
    listed = [Path(line.split()[0]).stem for line in (source / "val.txt").read_text().splitlines()]
    counted = np.zeros(12, np.int64)
    for pixels in scanned["class_pixels"].to_pylist():
        for entry in pixels:
            counted[entry["value"]] += entry["pixels"]
    truth = sum(np.bincount(np.array(Image.open(p)).ravel(), minlength=12) for p in (source / "valannot").iterdir())
    assert scanned["sample_id"].to_pylist() == listed and set(scanned["status"].to_pylist()) == {"ok"}
    assert counted.tolist() == np.asarray(truth).tolist()


def test_a_retry_of_every_other_row_reads_the_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = generators.camvid(tmp_path / "camvid", frames=9, splits=("train",)), tmp_path / "out"
    listed = (source / "train.txt").read_text().splitlines()
    maps = [source / "trainannot" / line.rsplit("/", 1)[1] for line in listed]
    good = {path: path.read_bytes() for path in maps}
    for path in maps[::2]:
        path.unlink()
    run = planned(out, source, shard_rows=9)
    for outcome in ingested(run, camvid_task(source)):
        run.record(outcome)
    before = rows_of(out)
    assert [r["status"] for r in before] == ["missing-label", "ok"] * 4 + ["missing-label"]
    for path, data in good.items():
        path.write_bytes(data)
    opened: list[str] = []
    original = tables.batches

    def counted(uri: str, *arguments: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        opened.append(uri)
        return original(uri, *arguments, **options)

    monkeypatch.setattr(tables, "batches", counted)
    (outcome,) = ingested(run, camvid_task(source), list(run.failed()))
    monkeypatch.undo()
    after = rows_of(out)
    assert outcome.bad == 0 and outcome.copied == 4 and len(opened) == 2  # the statuses, then the rows
    assert [r["sample_id"] for r in after] == [r["sample_id"] for r in before] and after[1] == before[1]


def test_an_exception_that_nobody_expected_names_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "dataset", lambda name: Faulty(IndexError("list index out of range")))
    run = planned(tmp_path / "out", tmp_path, "faulty", shard_rows=9)
    with pytest.raises(EngineError, match=r"s0 \(.*s0\): IndexError: list index out of range"):
        ingested(run, ingest.IngestTask("faulty"))
