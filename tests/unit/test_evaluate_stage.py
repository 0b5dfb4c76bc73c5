"""Evaluate shards of small masks and samples tables, then finish."""

import json
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import schemas, storage, tables
from segbatch.codecs import columns, runlength
from segbatch.config import PlanConfig
from segbatch.errors import ConfigError, IncompleteRunError, SchemaError
from segbatch.records import ClassInfo, ClassTable, Outcome
from segbatch.runs import Run
from segbatch.stages import evaluate, join

Map = NDArray[np.uint16]

CLASSES = ClassTable((*(ClassInfo(i, f"class{i}") for i in range(3)), ClassInfo(9, "void", ignore=True)))


@dataclass
class Item:
    """A row of either table."""

    name: str
    semantic: Map | None
    status: str = "ok"
    split: str = "val"
    more: dict[str, Any] = field(default_factory=dict)


class Notes:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.open: set[str] = set()

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        self.noted += sample_ids
        self.open.add(slot)

    def clear(self, slot: str) -> None:
        self.open.discard(slot)


def batch_of(rows: Sequence[Item], table: str) -> pa.RecordBatch:
    schema = schemas.TABLES[table]
    values: dict[str, list[Any]] = {
        "sample_id": [r.name for r in rows],
        "split": [r.split for r in rows],
        "status": [r.status for r in rows],
        "image_uri": [f"/photos/{r.name}.png" for r in rows],
        "height": [r.semantic.shape[0] if r.semantic is not None else None for r in rows],
        "width": [r.semantic.shape[1] if r.semantic is not None else None for r in rows],
        "attributes": ['{"weather": "rain"}'] * len(rows),
        "etag": ["1"] * len(rows),
        "model_digest": ["m"] * len(rows),
    }
    runs = columns.runs_array([runlength.encode(r.semantic) if r.semantic is not None else None for r in rows])
    arrays = [
        runs if f.name == "semantic" else pa.array(values.get(f.name, [None] * len(rows)), f.type) for f in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def write_part(root: Path, table: str, number: int, rows: Sequence[Item], footer: dict[str, str] | None = None) -> str:
    writer = tables.PartWriter(table)
    for start in range(0, len(rows), 64):
        writer.write(batch_of(rows[start : start + 64], table))
    uri = f"{root}/{table}/part-{number:08d}-{'a' * 12}.parquet"
    storage.replace(uri, writer.finish(footer or {}))
    return uri


def write_samples(root: Path, parts: Sequence[Sequence[Item]]) -> list[str]:
    tables.write_dataset_info(str(root), {"name": "toy", "classes": CLASSES.to_json()})
    return [write_part(root, "samples", i, rows) for i, rows in enumerate(parts)]


def random_items(count: int, seed: int, prefix: str = "s") -> list[Item]:
    generator = np.random.default_rng(seed)
    ids = np.array([0, 1, 2, 9], np.uint16)
    return [Item(f"{prefix}{i}", generator.choice(ids, (2 + i % 3, 5))) for i in range(count)]


def run_all(tmp: Path, shard_rows: int = 0, skip: dict[str, str] | None = None) -> list[Outcome]:
    """Plan and count everything in a fresh or old ``tmp/out``, shards in random order."""
    masks, samples = str(tmp / "masks"), str(tmp / "samples")
    run = Run.open(str(tmp / "out"), "state", "evaluate", {"protocol": "semantic"})
    run.plan(lambda: evaluate.items(masks, samples), PlanConfig(shard_rows=shard_rows))
    task = pickle.loads(pickle.dumps(evaluate.EvaluateTask(masks, samples, "semantic")))
    notes = Notes()
    worker = task.open(1, notes)
    shards = list(run.missing())
    random.Random(0).shuffle(shards)
    outcomes = [worker.run(s, skip or {}) for s in shards]
    assert worker.rows_done == sum(o.rows for o in outcomes) == len(notes.noted)
    assert not notes.open
    worker.close()
    return outcomes


def finish(tmp: Path, **options: Any) -> evaluate.Summary:
    return evaluate.finish(str(tmp / "out"), str(tmp / "masks"), str(tmp / "samples"), "semantic", **options)


def column(tmp: Path, table: str, name: str) -> list[Any]:
    return [v for b in tables.scan(str(tmp / "out"), table) for v in b.column(name).to_pylist()]


def value_of(summary: evaluate.Summary, metric: str, class_name: str = "") -> float | None:
    return next(f.value for f in summary.figures if (f.metric, f.class_name) == (metric, class_name))


def shifted(items: Sequence[Item], seed: int = 7) -> list[Item]:
    """Predictions that are partly wrong."""
    generator = np.random.default_rng(seed)
    out = []
    for item in items:
        assert item.semantic is not None
        wrong = generator.random(item.semantic.shape) < 0.3
        out.append(Item(item.name, np.where(wrong, (item.semantic + 1) % 3, item.semantic).astype(np.uint16)))
    return out


def expected_confusion(truth: Sequence[Item], predicted: Sequence[Item]) -> dict[tuple[int, int], int]:
    by_name, found = {p.name: p.semantic for p in predicted}, dict[tuple[int, int], int]()
    for item in truth:
        prediction = by_name[item.name]
        assert item.semantic is not None
        assert prediction is not None
        for pair in zip(item.semantic.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if pair[0] != 9:
                found[pair] = found.get(pair, 0) + 1
    return found


def confusion_of(tmp: Path) -> dict[tuple[int, int], int]:
    keys = zip(column(tmp, "confusion", "truth_id"), column(tmp, "confusion", "predicted_id"), strict=True)
    return dict(zip(keys, column(tmp, "confusion", "pixels"), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("order", ["zip", "zip-small-shards", "footer-but-shuffled", "join", "join-sorted"])
def test_counts_are_the_same_however_masks_and_samples_meet(tmp_path: Path, order: str) -> None:
    truth = random_items(150, 0)
    uris = write_samples(tmp_path / "samples", [truth[:90], truth[90:]])
    predicted = shifted(truth)
    source = [{"uri": uris[0], "row_start": 10, "rows": 80}, {"uri": uris[1], "row_start": 0, "rows": 60}]
    footer = {join.SOURCE_KEY: json.dumps(source)} if "join" not in order else {}
    rows = predicted[10:]
    if order in ("footer-but-shuffled", "join"):
        random.Random(3).shuffle(rows)
    write_part(tmp_path / "masks", "masks", 0, rows, footer)
    write_part(tmp_path / "masks", "masks", 1, predicted[:10])
    outcomes = run_all(tmp_path, shard_rows=7 if order == "zip-small-shards" else 0)
    assert sum(o.rows for o in outcomes) == 150
    assert sum(o.bad for o in outcomes) == 0
    finish(tmp_path)
    assert confusion_of(tmp_path) == expected_confusion(truth, predicted)
    assert sorted(column(tmp_path, "images", "sample_id")) == sorted(t.name for t in truth)


def test_zip_never_builds_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = random_items(30, 0)
    (uri,) = write_samples(tmp_path / "samples", [truth])
    footer = {join.SOURCE_KEY: json.dumps([{"uri": uri, "row_start": 0, "rows": 30}])}
    write_part(tmp_path / "masks", "masks", 0, shifted(truth), footer)

    def refuse(*_: object) -> None:
        raise AssertionError("joined")

    monkeypatch.setattr(join, "SampleIndex", refuse)
    assert sum(o.rows for o in run_all(tmp_path)) == 30


def test_every_odd_row_has_a_status_of_its_own(tmp_path: Path) -> None:
    one = np.zeros((2, 2), np.uint16)
    truth = [Item("good", one), Item("failed", one), Item("bare", None), Item("broken", None, "truncated")]
    truth += [Item("small", one), Item("killer", one), Item("void", one + 9)]
    write_samples(tmp_path / "samples", [truth])
    masks = [Item("good", one), Item("failed", None, "out-of-memory"), Item("bare", one), Item("broken", None, "x")]
    masks += [Item("small", np.zeros((2, 3), np.uint16)), Item("killer", one), Item("void", one), Item("alien", one)]
    write_part(tmp_path / "masks", "masks", 0, masks)
    (outcome,) = run_all(tmp_path, skip={"killer": "died 2 times"})
    assert (outcome.rows, outcome.bad) == (8, 6)
    statuses = dict(zip(column(tmp_path, "state", "sample_id"), column(tmp_path, "state", "status"), strict=True))
    assert statuses == {
        "good": "ok",
        "failed": "prediction-failed",
        "bare": "no-label",
        "broken": "no-label",
        "small": "size-mismatch",
        "killer": "quarantined",
        "void": "ok",
        "alien": "unknown-sample",
    }
    errors = dict(zip(column(tmp_path, "state", "sample_id"), column(tmp_path, "state", "error"), strict=True))
    assert "small: ground truth is 2 x 2 pixels, the prediction 3 x 2" in errors["small"]
    with pytest.raises(
        IncompleteRunError, match=r"3 of 7 samples.*1 quarantined, 1 size-mismatch.*retry.*--missing skip"
    ):
        finish(tmp_path)
    assert not tables.has(str(tmp_path / "out"), "summary")
    summary = finish(tmp_path, missing="skip")
    counts = {f.metric: f.value for f in summary.figures if f.metric.startswith("images_")}
    wanted = {"images_scored": 2, "images_skipped": 3, "images_without_label": 2, "images_unknown": 1}
    assert counts == wanted
    assert value_of(summary, "miou") == 1.0
    scores = dict(zip(column(tmp_path, "images", "sample_id"), column(tmp_path, "images", "score"), strict=True))
    assert scores == {**dict.fromkeys(statuses), "good": 1.0}


def test_a_missing_prediction_is_an_error_that_names_it(tmp_path: Path) -> None:
    truth = random_items(10, 0)
    write_samples(tmp_path / "samples", [truth])
    write_part(tmp_path / "masks", "masks", 0, shifted(truth)[:6])
    run_all(tmp_path)
    with pytest.raises(
        IncompleteRunError, match=r"4 of 10 samples.*4 missing.*e.g. s6, s7, s8 .*run the predict command"
    ):
        finish(tmp_path)
    assert value_of(finish(tmp_path, missing="skip"), "images_skipped") == 4.0


def test_only_the_splits_that_the_masks_cover_are_expected(tmp_path: Path) -> None:
    truth = random_items(10, 0)
    for item in truth[4:]:
        item.split = "train"
    write_samples(tmp_path / "samples", [truth])
    write_part(tmp_path / "masks", "masks", 0, shifted(truth)[:4])
    run_all(tmp_path)
    summary = finish(tmp_path)
    assert summary.splits == ("val",)
    assert set(column(tmp_path, "summary", "split")) == {"val"}
    with pytest.raises(IncompleteRunError, match="6 of 6 samples"):
        finish(tmp_path, splits=("train",))
    with pytest.raises(ConfigError, match="no split vall; did you mean val"):
        finish(tmp_path, splits=("vall",))


def test_a_chosen_split_leaves_the_others_out(tmp_path: Path) -> None:
    truth = random_items(10, 0)
    for item in truth[4:]:
        item.split = "train"
    write_samples(tmp_path / "samples", [truth])
    predicted = shifted(truth)
    write_part(tmp_path / "masks", "masks", 0, predicted)
    run_all(tmp_path)
    assert finish(tmp_path).splits == ("val", "train")
    summary = finish(tmp_path, splits=("val",))
    assert summary.images == {"ok": 4, "missing": 0}
    assert confusion_of(tmp_path) == expected_confusion(truth[:4], predicted)
    assert column(tmp_path, "images", "sample_id") == ["s0", "s1", "s2", "s3"]


def test_a_sample_with_two_masks_is_refused(tmp_path: Path) -> None:
    truth = random_items(4, 0)
    write_samples(tmp_path / "samples", [truth])
    write_part(tmp_path / "masks", "masks", 0, shifted(truth))
    write_part(tmp_path / "masks", "masks", 1, shifted(truth)[2:3])
    run_all(tmp_path)
    with pytest.raises(IncompleteRunError, match="s2 has more than one row in the masks"):
        finish(tmp_path)


def test_a_sample_that_stands_twice_in_the_samples_is_refused(tmp_path: Path) -> None:
    truth = random_items(4, 0)
    write_samples(tmp_path / "samples", [truth, truth[1:2]])
    with pytest.raises(SchemaError, match="sample s1 more than once"):
        join.SampleIndex(tables.parts(str(tmp_path / "samples" / "samples")))


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", [random_items(3, 0)])
    write_part(tmp_path / "masks", "masks", 0, random_items(3, 0, "other"))
    run_all(tmp_path)
    with pytest.raises(IncompleteRunError, match="3 of 3 samples have no usable prediction"):
        finish(tmp_path)
    with pytest.raises(IncompleteRunError, match="no image could be scored: 3 missing, 3 unknown-sample"):
        finish(tmp_path, missing="skip")


def test_masks_of_other_classes_are_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", [random_items(3, 0)])
    write_part(tmp_path / "masks", "masks", 0, random_items(3, 0))
    other = ClassTable((ClassInfo(0, "CLASS0"), ClassInfo(1, "aeroplane")))
    tables.write_dataset_info(str(tmp_path / "masks"), {"name": "model", "classes": other.to_json()})
    with pytest.raises(ConfigError, match="label 1 is 'aeroplane' in the masks, and 'class1' in the samples"):
        evaluate.label_ids(str(tmp_path / "masks"), str(tmp_path / "samples"), {})


def test_changed_masks_or_labels_are_counted_anew(tmp_path: Path) -> None:
    truth = random_items(40, 0)
    write_samples(tmp_path / "samples", [truth])
    write_part(tmp_path / "masks", "masks", 0, shifted(truth)[:20])
    write_part(tmp_path / "masks", "masks", 1, shifted(truth)[20:])
    assert sum(o.rows for o in run_all(tmp_path)) == 40
    assert run_all(tmp_path) == []
    write_part(tmp_path / "masks", "masks", 1, truth[20:], {"changed": "yes"})
    assert sum(o.rows for o in run_all(tmp_path)) == 20
    finish(tmp_path)
    assert confusion_of(tmp_path) == expected_confusion(truth, shifted(truth)[:20] + truth[20:])
    relabelled = shifted(truth, 5)
    write_samples(tmp_path / "samples", [relabelled])
    assert sum(o.rows for o in run_all(tmp_path)) == 40
    finish(tmp_path)
    assert confusion_of(tmp_path) == expected_confusion(relabelled, shifted(truth)[:20] + truth[20:])


def test_images_carry_what_slices_need(tmp_path: Path) -> None:
    truth = [Item("a", np.array([[0, 0, 1, 9]], np.uint16))]
    write_samples(tmp_path / "samples", [truth])
    write_part(tmp_path / "masks", "masks", 0, [Item("a", np.array([[0, 1, 1, 1]], np.uint16))])
    run_all(tmp_path)
    finish(tmp_path)
    assert column(tmp_path, "images", "attributes") == ['{"weather": "rain"}']
    assert column(tmp_path, "images", "score") == [0.5]
    assert column(tmp_path, "images", "classes") == [
        [
            {"class": "class0", "label_id": 0, "tp": 1, "fp": 0, "fn": 1, "iou": 0.5},
            {"class": "class1", "label_id": 1, "tp": 1, "fp": 1, "fn": 0, "iou": 0.5},
        ]
    ]


def test_probe_counts_one_sample_and_writes_nothing(tmp_path: Path) -> None:
    truth = random_items(5, 0)
    write_samples(tmp_path / "samples", [truth])
    write_part(tmp_path / "masks", "masks", 0, shifted(truth))
    masks, samples = str(tmp_path / "masks"), str(tmp_path / "samples")
    run = Run.open(str(tmp_path / "out"), "state", "evaluate", {})
    run.plan(lambda: evaluate.items(masks, samples), PlanConfig())
    worker = evaluate.EvaluateTask(masks, samples, "semantic").open(1, Notes())
    worker.probe(next(run.missing()), "s3")
    assert not tables.has(str(tmp_path / "out"), "state")
