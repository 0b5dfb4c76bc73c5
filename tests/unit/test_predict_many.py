"""Several models in one pass: each root is as if its model had run alone, and every photo is decoded once."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import photos
import pytest
from doubles import FailingModel, FreeModel, images_seen, predict
from numpy.typing import NDArray

from segbatch import api, cli, schemas, storage, tables
from segbatch.codecs import photo
from segbatch.config import RunOptions
from segbatch.errors import BadItemsError, ConfigError
from segbatch.jobs import BadRunError, Limits, RunResult, Selection, predict_job
from segbatch.models.base import InputSpec
from segbatch.one_pass import Together
from segbatch.records import ClassInfo, ClassTable
from segbatch.runs import Run
from segbatch.stages import inputs
from segbatch.stages.inputs import Input, fed_of
from segbatch.stages.predict import PredictTask
from segbatch.stages.predict_many import DecodedOnce, PredictManyTask, PredictManyWorker

INLINE = RunOptions.model_validate({"plan": {"shard_rows": 8}, "engine": {"kind": "inline", "threads": 2}})


def together(models: Mapping[str, Any], source: Path, out: Path, bad: float = 1.0) -> dict[str, RunResult]:
    """All models in one pass, in this process."""
    return api.predict_many(models, str(source), str(out), batch_size=2, limits=Limits(bad), options=INLINE)


def alone(model: FreeModel, source: Path, out: Path) -> RunResult:
    """One model with the same options."""
    return predict(model, source, out, kind="inline", threads=2)


def content(out: Path) -> list[dict[str, Any]]:
    """The masks table without times."""
    columns = [c for c in schemas.MASKS.names if not c.startswith("seconds")]
    return [row for batch in tables.scan(str(out), "masks", columns) for row in batch.to_pylist()]


def marked_folder(root: Path) -> Path:
    """20 photos and odd ones, the fifth one of the marker's colour."""
    photos.folder(root, 20)
    photos.odd_ones(root)
    (root / "photo-0004.jpg").write_bytes(photos.jpeg(4, photos.MARKER))
    return root


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is decoded, by its name."""
    seen: Counter[str] = Counter()
    decode = photo.decode

    def counted(data: bytes, uri: str, *arguments: Any) -> Any:
        seen[storage.name_of(uri)] += 1
        return decode(data, uri, *arguments)

    monkeypatch.setattr(photo, "decode", counted)
    return seen


def test_rows_are_those_of_separate_runs(tmp_path: Path) -> None:
    source = marked_folder(tmp_path / "photos")
    models = {"free": FreeModel(), "failing": FailingModel()}
    results = together(models, source, tmp_path / "out")
    for alias, model in models.items():
        result = alone(model, source, tmp_path / alias)
        assert content(tmp_path / "out" / alias) == content(tmp_path / alias)
        assert results[alias].state.reasons == result.state.reasons
        assert (results[alias].rows, results[alias].state.shards) == (result.rows, result.state.shards)
        assert results[alias].seconds > 0
    parts = [sorted(p.name for p in (tmp_path / "out" / a / "masks").iterdir()) for a in models]
    assert parts[0] == parts[1]


def test_a_photo_that_one_model_cannot_bear_is_good_for_the_other(tmp_path: Path) -> None:
    source = marked_folder(tmp_path / "photos")
    together({"free": FreeModel(), "failing": FailingModel()}, source, tmp_path / "out")
    rows = {alias: photos.rows(tmp_path / "out" / alias) for alias in ("free", "failing")}
    differing = {i for i in rows["free"] if rows["free"][i] != rows["failing"][i]}
    assert differing == {"photo-0004.jpg"}
    assert rows["failing"]["photo-0004.jpg"]["status"] == "model-error"
    assert rows["free"]["truncated.jpg"]["status"] == rows["failing"]["truncated.jpg"]["status"] == "truncated"


def test_photos_are_read_and_decoded_once(
    tmp_path: Path, decodes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photos.folder(tmp_path / "photos", 20)
    reads: Counter[str] = Counter()
    read = storage.read_bytes

    def counted(uri: str) -> bytes:
        reads[storage.name_of(uri)] += 1
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", counted)
    logs = {alias: tmp_path / f"{alias}.log" for alias in "abc"}
    together({alias: FreeModel(str(log)) for alias, log in logs.items()}, source, tmp_path / "out")
    names = [p.name for p in source.iterdir()]
    assert decodes == Counter(names)
    assert {n: reads[n] for n in names} == Counter(names)
    assert [images_seen(log) for log in logs.values()] == [20, 20, 20]


def test_only_what_a_root_lacks_is_made(tmp_path: Path, decodes: Counter[str]) -> None:
    source, out = photos.folder(tmp_path / "photos", 24), tmp_path / "out"
    models = {"a": FreeModel(str(tmp_path / "a.log")), "b": FreeModel(str(tmp_path / "b.log"))}
    together(models, source, out)
    parts = sorted((out / "b" / "masks").iterdir())
    before = content(out / "b")
    parts[1].unlink()
    decodes.clear()
    results = together(models, source, out)
    assert (results["a"].rows, results["b"].rows) == (0, 8)
    assert (images_seen(tmp_path / "a.log"), images_seen(tmp_path / "b.log")) == (24, 32)
    assert decodes.total() == 8
    assert content(out / "b") == before


def test_parts_that_several_roots_lack_are_made_together(tmp_path: Path, decodes: Counter[str]) -> None:
    source, out = photos.folder(tmp_path / "photos", 32), tmp_path / "out"
    models = {a: FreeModel(str(tmp_path / f"{a}.log")) for a in "abc"}
    together(models, source, out)
    before = {a: content(out / a) for a in models}
    lost = {"a": (0, 1), "b": (1, 2), "c": (1, 2, 3)}
    for alias, places in lost.items():
        parts = sorted((out / alias / "masks").iterdir())
        for place in places:
            parts[place].unlink()
    decodes.clear()
    results = together(models, source, out)
    assert {a: r.rows for a, r in results.items()} == {"a": 16, "b": 16, "c": 24}
    assert decodes.total() == 32  # parts 0 and 3 for one root each, 1 for three and 2 for two at a time
    assert {a: content(out / a) for a in models} == before


def test_a_model_that_has_run_alone_is_not_run_again(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "photos", 12), tmp_path / "out"
    log = tmp_path / "a.log"
    api.predict(FreeModel(str(log)), str(source), str(out / "a"), options=INLINE)
    together({"a": FreeModel(str(log)), "b": FreeModel()}, source, out)
    assert images_seen(log) == 12
    assert api.status(str(out / "b")).complete
    photos.folder(source, 4, first=20)
    results = together({"a": FreeModel(str(log)), "b": FreeModel()}, source, out)
    assert {a: r.rows for a, r in results.items()} == {"a": 4, "b": 4}
    assert images_seen(log) == 16


def test_a_changed_photo_is_made_anew_for_every_model(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "photos", 12), tmp_path / "out"
    models = {"a": FreeModel(), "b": FreeModel()}
    together(models, source, out)
    (source / "photo-0003.jpg").write_bytes(photos.encoded(photos.two_colors(), "JPEG", quality=90))
    results = together(models, source, out)
    assert {a: (r.rows, r.state.rows) for a, r in results.items()} == {"a": (1, 12), "b": (1, 12)}
    assert content(out / "a") == content(out / "b")


def test_every_root_has_a_record_of_the_pass(tmp_path: Path) -> None:
    photos.folder(tmp_path / "in", 6)
    results = together({"a": FreeModel(), "b": FreeModel()}, tmp_path / "in", tmp_path / "out")
    for alias, result in results.items():
        (path,) = (tmp_path / "out" / alias / ".segbatch" / "runs").glob("*.json")
        assert json.loads(path.read_text()) == result.record
        assert (result.record["images"], result.record["ended"]) == (6, "done")
        assert result.record["seconds"] > 0 and result.record["codec_threads"] >= 1
        assert {"decode", "model", "encode"} <= set(result.record["stage_seconds"])
    again = together({"a": FreeModel(), "b": FreeModel()}, tmp_path / "in", tmp_path / "out")
    assert [r.record for r in again.values()] == [{}, {}]


def test_every_root_is_a_run_root_of_its_own(tmp_path: Path) -> None:
    source, out = marked_folder(tmp_path / "photos"), tmp_path / "out"
    with pytest.raises(BadRunError, match="images are bad"):
        together({"failing": FailingModel(), "free": FreeModel()}, source, out, bad=0.11)
    assert api.status(str(out / "free")).complete
    assert api.status(str(out / "failing")).reasons["model-error"] == 1
    retried = api.retry(str(out / "failing"), model=FreeModel(), limits=Limits(1.0), options=INLINE)
    assert "model-error" not in retried.state.reasons
    assert content(out / "failing") == content(out / "free")
    with pytest.raises(ConfigError, match="is not a run root"):
        api.status(str(out))


class Notes:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """See ``runs.Journal``."""
        self.ids.update(sample_ids)

    def clear(self, slot: str) -> None:
        """See ``runs.Journal``."""


def opened(source: Path, out: Path, journal: Notes, *aliases: str) -> tuple[PredictManyWorker, Together]:
    """A worker, and planned shards of a root for each alias."""
    todo = {}
    tasks = {}
    for alias in aliases:
        job = predict_job(FreeModel(), str(source), str(out / alias), "", Selection(), 2, api.MAX_PIXELS)
        run = Run.open(job.out, job.table, job.verb, job.config)
        run.plan(job.listing, INLINE.plan)
        assert isinstance(job.task, PredictTask)
        todo[alias], tasks[alias] = run.lacking(), job.task
    return PredictManyTask(tasks).open(2, journal), Together(str(out), todo)


def test_a_quarantined_sample_is_kept_from_its_model_alone(tmp_path: Path) -> None:
    source, notes = photos.folder(tmp_path / "photos", 6), Notes()
    worker, shards = opened(source, tmp_path / "out", notes, "a", "b")
    skip = {"b:photo-0001.jpg": "it killed", "a:photo-0002.jpg": "that, too", "b:photo-0002.jpg": "and here"}
    outcomes = [worker.run(shard, skip) for shard in shards]
    assert sum(o.rows for o in outcomes) == 12
    assert sum(o.bad for o in outcomes) == 3
    for alias in "ab":
        found = {i: row["error"] for i, row in photos.rows(tmp_path / "out" / alias).items() if row["status"] != "ok"}
        assert found == {i.partition(":")[2]: why for i, why in skip.items() if i.startswith(alias)}
    assert {i for i in notes.ids if i.endswith(("0000.jpg", "0002.jpg"))} == {"a:photo-0000.jpg", "b:photo-0000.jpg"}
    worker.close()


def test_a_probe_touches_the_model_of_its_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    worker, shards = opened(photos.folder(tmp_path / "photos", 3), tmp_path / "out", notes, "a", "b")
    worker.probe(next(iter(shards)), "b:photo-0001.jpg")
    assert notes.ids == {"b:photo-0001.jpg"}
    assert not tables.parts(storage.join(str(tmp_path / "out" / "b"), "masks"))
    worker.close()


def test_a_shard_that_one_root_has_by_now_is_made_for_the_others(tmp_path: Path) -> None:
    worker, shards = opened(photos.folder(tmp_path / "photos", 3), tmp_path / "out", Notes(), "a", "b")
    shard = next(iter(shards))
    worker.run(shard, {})
    (tmp_path / "out" / "b" / "masks" / shard.key).unlink()
    outcome = worker.run(shard, {})
    assert {a: o.committed_by_other for a, o in outcome.members} == {"a": True, "b": False}
    assert not outcome.committed_by_other
    assert worker.rows_done == 9
    worker.close()


def test_each_size_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def decoded(item: Input, data: bytes, max_pixels: int, fed: Any = None) -> tuple[NDArray[Any], int, int, int]:
        asked.append(fed and fed(480, 640))
        return np.zeros((4, 4, 3), np.uint8), 4, 4, 1

    monkeypatch.setattr(inputs, "decoded", decoded)
    sizes = ((64, 0.0), (64, 0.5), (128, 0.5))
    small = [fed_of(InputSpec(height=s, width=s, resize="stretch", mean=(m, m, m))) for s, m in sizes]
    once, item = DecodedOnce(), Input("a", None, "a.jpg", "")
    for fed in (*small, None, None):
        once(item, b"", 100, fed)
    assert asked == [(64, 64), (128, 128), None]
    once.forget([item])
    once(item, b"", 100)
    assert len(asked) == 4


@dataclass(frozen=True)
class SliceModel(FreeModel):
    """A model of CT slices."""

    def describe(self) -> Any:
        spec = super().describe()
        classes = ClassTable((ClassInfo(0, "nothing"),))
        return replace(spec, classes=classes, input=InputSpec(slices=3, window=(-200.0, 200.0)))

    def load(self, threads: int) -> Any:
        found: Any = super().load(threads)
        found.spec = self.describe()
        return found


def test_what_cannot_go_together_is_refused(tmp_path: Path) -> None:
    source = photos.folder(tmp_path / "photos", 3)
    with pytest.raises(ConfigError, match="CT slices, not both"):
        together({"a": FreeModel(), "b": SliceModel()}, source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model alias '\.\./a'"):
        together({"../a": FreeModel()}, source, tmp_path / "other")
    with pytest.raises(ConfigError, match="another configuration: limit"):
        api.predict_many({"a": FreeModel()}, str(source), str(tmp_path / "out"), limit=1, options=INLINE)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["litert:m.tflite", "b=litert:n.tflite"], "litert:m.tflite has no alias"),
        (["a=litert:m.tflite", "hf:folder?task=semantic"], "has no alias"),
        (["a=litert:m.tflite", "a=litert:n.tflite"], "two models are called a"),
        (["a=litert:m.tflite", "b="], "model b= has no alias"),
        (["a/b=litert:m.tflite", "b=litert:m.tflite"], "model alias 'a/b'"),
    ],
)
def test_aliases_of_the_command_line(
    tmp_path: Path, models: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *others = models
    also = [word for other in others for word in ("--also", other)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", model, str(tmp_path), str(tmp_path / "out"), *also])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_pass_that_ends_early_leaves_its_records(tmp_path: Path) -> None:
    source = photos.folder(tmp_path / "in", 12)
    (source / "odd.jpg").write_bytes(b"no photo")
    models = {"one": FreeModel(), "two": FreeModel()}
    with pytest.raises(BadItemsError, match="not-an-image"):
        api.predict_many(models, str(source), str(tmp_path / "out"), limits=Limits(fail_fast=True), options=INLINE)
    for alias in models:
        (record,) = (tmp_path / "out" / alias / ".segbatch" / "runs").glob("*.json")
        assert json.loads(record.read_text())["ended"].startswith("BadItemsError: ")
