"""Export and import as stages and verbs: which rows go where, what is refused, and what can be mended."""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import generators
import numpy as np
import pyarrow.parquet as pq
import pytest
from generators import TREES, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segbatch import api, cli, schemas, tables
from segbatch.codecs import rle, runlength
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import BadItemsError, ConfigError, DataError, IncompleteRunError
from segbatch.formats import registry
from segbatch.formats.base import Format, Labels, Output
from segbatch.formats.files import item_of
from segbatch.formats.png import Png
from segbatch.jobs import Limits
from segbatch.records import OK, ClassTable, Instance, PlanItem, Prediction, Segment, Task
from segbatch.stages import importing
from segbatch.stages.exporting import Exported, Folder, export
from segbatch.stages.mask_rows import MaskRow, masks_batch

INLINE = RunOptions(engine=EngineConfig(kind="inline", threads=2), plan=PlanConfig(shard_rows=2))


def ingested(tmp_path: Path, name: str = "camvid", allowed: float = 0.0) -> str:
    """The run root of an ingested tree, which lies at ``tree`` (drawn unless it is there)."""
    if not (tmp_path / "tree").exists():
        TREES[name](tmp_path / "tree")
    out = str(tmp_path / "samples")
    api.ingest(name, str(tmp_path / "tree"), out, limits=Limits(allowed), options=INLINE)
    return out


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run root of the CamVid tree, which lies beside it; nobody changes either."""
    return ingested(tmp_path_factory.mktemp("camvid"))


def exported(samples: str, out: Path, masks: str = "", form: str = "png", **choice: Any) -> Exported:
    return api.export(form, masks or samples, samples, str(out), options=INLINE, **choice)


def imported(files: Path | str, samples: str, out: Path, form: str = "png", allowed: float = 0.0) -> str:
    api.import_predictions(form, str(files), samples, str(out), limits=Limits(allowed), options=INLINE)
    return str(out)


def rows_of(root: str, table: str = "masks") -> list[dict[str, Any]]:
    return [row for batch in tables.scan(root, table) for row in batch.to_pylist()]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def truth(row: Labels) -> np.ndarray[Any, Any]:
    """The label map of a frame of CamVid."""
    folder, name = row.image_uri.rsplit("/", 1)
    return np.array(Image.open(f"{folder}annot/{name}"))


class Keeping(Format):
    """Writes nothing and keeps the rows."""

    name: ClassVar[str] = "keeping"
    task: ClassVar[Task] = "semantic"

    def __init__(self) -> None:
        self.rows: list[Labels] = []

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        self.rows = list(rows)


def kept(masks: str, samples: str, skip_bad: bool = False) -> list[Labels]:
    form = Keeping()
    export(form, masks, samples, "/nowhere", 1, skip_bad)
    return form.rows


# -- which rows are exported -----------------------------------------------------------------------------------------


def test_ground_truth_and_predictions_are_told_apart(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    masks = imported(tmp_path / "png", samples, tmp_path / "masks")
    for root, is_truth in ((samples, True), (masks, False)):
        found = kept(root, samples)
        assert [r.sample_id for r in found] == [r["sample_id"] for r in rows_of(samples, "samples")]
        assert all(r.is_truth is is_truth and r.image_uri.endswith(".png") for r in found)
        assert {r.split for r in found} == {"train", "val"} and {(r.height, r.width) for r in found} == {(12, 16)}
        assert all(np.array_equal(r.semantic, truth(r)) for r in found if r.semantic is not None)


def test_bad_rows_stop_an_export_or_are_counted(tmp_path: Path) -> None:
    generators.camvid(tmp_path / "tree")
    labels = sorted((tmp_path / "tree" / "valannot").iterdir())
    labels[1].write_bytes(labels[1].read_bytes()[:40])
    samples = ingested(tmp_path, allowed=1.0)
    with pytest.raises(IncompleteRunError, match=rf"{labels[1].stem} cannot be exported: bad-label .*--missing skip"):
        exported(samples, tmp_path / "png")
    done = exported(samples, tmp_path / "png", missing="skip")
    assert (done.rows, done.skipped, done.files) == (5, 1, 6)
    assert not any(labels[1].stem in f for f in files(tmp_path / "png"))
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "png").rglob("*") if p.is_file())


def test_bad_predictions_stop_an_export_or_are_counted(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    gone = next(p for p in (tmp_path / "png").rglob("*.png"))
    gone.unlink()
    masks = imported(tmp_path / "png", samples, tmp_path / "masks", allowed=0.5)
    with pytest.raises(IncompleteRunError, match=rf"{gone.stem} cannot be exported: missing-prediction"):
        exported(samples, tmp_path / "again", masks)
    done = exported(samples, tmp_path / "again", masks, missing="skip")
    assert (done.rows, done.skipped) == (5, 1)
    assert files(tmp_path / "again") == files(tmp_path / "png")


def test_an_export_without_a_single_row_is_refused(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    with pytest.raises(IncompleteRunError, match="it has no instances"):
        exported(samples, tmp_path / "out", form="cvat")
    with pytest.raises(ConfigError, match=r"no row that format cvat can hold \(the first: .* it has no instances\)"):
        exported(samples, tmp_path / "out", form="cvat", missing="skip")
    exported(samples, tmp_path / "png")
    masks = imported(tmp_path / "png", samples, tmp_path / "masks")
    with pytest.raises(ConfigError, match=r"has no instances \(format cvat needs them\)"):
        exported(samples, tmp_path / "out", masks, form="cvat", missing="skip")


def test_export_refuses_what_has_no_masks_or_is_unknown(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    other = tmp_path / "other"
    shutil.copytree(samples, other)
    with pytest.raises(ConfigError, match="has no masks table"):
        exported(samples, tmp_path / "out", str(other))
    with pytest.raises(ConfigError, match=r"unknown format 'pnk'; did you mean png\?"):
        exported(samples, tmp_path / "out", form="pnk")
    assert not (tmp_path / "out").exists()


def masks_root(folder: Path, rows: list[MaskRow]) -> str:
    writer = tables.PartWriter("masks")
    writer.write(masks_batch(rows, "test"))
    (folder / "masks").mkdir(parents=True)
    (folder / "masks" / "part-00000000-000000000000.parquet").write_bytes(writer.finish({}))
    return str(folder)


def mask_row(sample_id: str, label: int, size: tuple[int, int] = (12, 16), **more: Any) -> MaskRow:
    semantic = runlength.encode(np.full(size, label, np.uint16))
    return MaskRow(sample_id, None, "elsewhere.png", "e", *size, semantic=semantic, **more)


def test_masks_in_another_order_find_their_samples(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    known = rows_of(samples, "samples")
    ids = [r["sample_id"] for r in known]
    order = [4, 0, 5, 2, 1, 3]
    found = kept(masks_root(tmp_path / "m", [mask_row(ids[i], i) for i in order]), samples)
    assert [r.sample_id for r in found] == [ids[i] for i in order]
    assert [int(r.semantic[0, 0]) for r in found if r.semantic is not None] == order
    assert [r.image_uri for r in found] == [known[i]["image_uri"] for i in order]


def test_masks_of_no_sample_or_of_another_size_are_bad_rows(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    ids = [r["sample_id"] for r in rows_of(samples, "samples")]
    strange = masks_root(tmp_path / "strange", [mask_row(ids[0], 1), mask_row("train/nobody", 1)])
    with pytest.raises(IncompleteRunError, match="train/nobody cannot be exported: there is no such sample"):
        kept(strange, samples)
    assert [r.sample_id for r in kept(strange, samples, skip_bad=True)] == ids[:1]
    large = masks_root(tmp_path / "large", [mask_row(ids[0], 1, (12, 17)), mask_row(ids[1], 1)])
    with pytest.raises(IncompleteRunError, match=rf"{ids[0]} cannot be exported: its mask is not of the photo's size"):
        kept(large, samples)
    thing = Instance(1, 1, (0, 0, 1, 1), 1, False, rle.encode(np.ones((12, 17), bool)), 1.0)
    wide = masks_root(tmp_path / "wide", [mask_row(ids[0], 1, instances=(thing,)), mask_row(ids[1], 1)])
    assert [r.sample_id for r in kept(wide, samples, skip_bad=True)] == ids[1:2]


def test_instances_segments_and_maps_are_exported_as_they_are(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    sample_id = rows_of(samples, "samples")[0]["sample_id"]
    thing = Instance(7, 3, (1.0, 2.0, 3.0, 4.0), 12.5, True, rle.encode(np.eye(12, 16, dtype=bool)), 0.25)
    segment = Segment(5, 3, 192.0, (0.0, 0.0, 16.0, 12.0), True)
    panoptic = runlength.encode(np.ones((12, 16), np.uint16))
    row = mask_row(sample_id, 1, instances=(thing,), panoptic=panoptic, segments=(segment,))
    (found,) = kept(masks_root(tmp_path / "m", [row]), samples)
    assert (found.instances, found.segments) == ((thing,), (segment,))
    assert found.panoptic is not None and found.panoptic.dtype == np.uint16 and (found.panoptic == 1).all()


# -- where files are written -----------------------------------------------------------------------------------------


BAD_PATHS = ["../x", "a/../../x", "/abs", "", ".", "..", "a//b", "a/./b", "a/", "C:\\x", "a\\..\\b", "a\0b"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_leave_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"), 1)
    with pytest.raises(DataError, match="is no path below the output") as caught:
        folder.put(path, b"x")
    assert caught.value.code == "bad-path" and files(tmp_path) == [] and folder.files == 0


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("a.~/\\\0: é-"), max_size=12))
def test_whatever_is_written_lies_below_the_folder(path: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        folder = Folder(f"{root}/a/b/out", 1)
        try:
            folder.put(path, b"x")
        except DataError:
            assert files(Path(root)) == []
        else:
            assert files(Path(root)) == [f"a/b/out/{path}"]


@pytest.mark.parametrize("sample_id", ["../x", "/abs", "C:\\x", "a\0b", "a//b"])
def test_sample_ids_never_leave_the_folder(sample_id: str, tmp_path: Path) -> None:
    row = Labels(sample_id, "/d/photo.jpg", 4, 4, semantic=np.zeros((4, 4), np.uint16), instances=())
    for name in ("png", "yolo-seg", "cvat", "label-studio", "fiftyone"):
        folder = tmp_path / "deep" / "er" / name
        form = registry.format_of(name)
        table = ClassTable.from_json([{"label_id": 0, "name": "a", "color": None}])
        with contextlib.suppress(DataError):
            form.write(iter([row]), table, Folder(str(folder), 1))
        assert all(f.startswith(f"deep/er/{name}/") for f in files(tmp_path))
        shutil.rmtree(folder, ignore_errors=True)


def test_two_rows_of_one_path_are_an_error(tmp_path: Path) -> None:
    rows = [Labels(n, f"/d/{n}", 4, 4, semantic=np.zeros((4, 4), np.uint16)) for n in ("a/x.jpg", "a/x.png")]
    with pytest.raises(DataError, match=r"two rows would be written to a/x.png") as caught:
        Png().write(iter(rows), ClassTable(()), Folder(str(tmp_path), 2))
    assert caught.value.code == "duplicate-path"


def test_rows_are_made_in_threads_and_come_in_order(tmp_path: Path) -> None:
    rows = [Labels(str(n), "", 1, 1) for n in range(50)]
    held = []

    def given_out() -> Iterator[Labels]:
        for number, row in enumerate(rows):
            held.append(number)
            yield row

    found = Folder(str(tmp_path), 3).map(lambda r: r.sample_id, given_out())
    assert next(found) == "0" and len(held) <= 8
    assert ["0", *found] == [str(n) for n in range(50)]


# -- import ----------------------------------------------------------------------------------------------------------


def test_an_import_has_a_row_for_every_good_sample_in_order(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    masks = rows_of(imported(tmp_path / "png", samples, tmp_path / "masks"))
    known = rows_of(samples, "samples")
    for name in ("sample_id", "group_id", "image_uri", "height", "width", "semantic", "class_pixels"):
        assert [m[name] for m in masks] == [s[name] for s in known]
    assert all(m["status"] == OK and m["instances"] is None and m["panoptic"] is None for m in masks)
    assert all(m["model_digest"] == "import:png" for m in masks)


def test_an_imported_ground_truth_scores_one(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    masks = imported(tmp_path / "png", samples, tmp_path / "masks")
    result = api.evaluate(masks, samples, str(tmp_path / "metrics"), protocol="camvid", options=INLINE)
    overall = {f.metric: f.value for f in result.figures if not f.class_name and not f.slice}
    assert overall["miou"] == overall["global_accuracy"] == overall["mean_class_accuracy"] == 1.0


def test_predictions_of_bad_samples_are_passed_over(tmp_path: Path) -> None:
    generators.camvid(tmp_path / "tree")
    samples = ingested(tmp_path)
    exported(samples, tmp_path / "png")
    shutil.rmtree(tmp_path / "samples")
    label = next((tmp_path / "tree" / "valannot").iterdir())
    label.unlink()
    samples = ingested(tmp_path, allowed=1.0)
    masks = rows_of(imported(tmp_path / "png", samples, tmp_path / "masks"))
    assert len(masks) == 5 and all(m["status"] == OK for m in masks)
    assert label.stem not in {m["sample_id"].split("/")[-1] for m in masks}


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda p: p.unlink(), "missing-prediction", "no prediction at"),
        (lambda p: save(p, np.zeros((12, 17), np.uint8)), "size-mismatch", "is 17 x 12, its photo is 16 x 12"),
        (lambda p: p.write_bytes(p.read_bytes()[:50]), "bad-label", "cannot be decoded"),
        (lambda p: save(p, np.zeros((12, 16, 3), np.uint8)), "label-type", "is in colour"),
    ],
)
def test_a_wrong_file_is_a_bad_row_until_it_is_mended(
    change: Any, code: str, says: str, camvid: str, tmp_path: Path
) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    path = sorted((tmp_path / "png").rglob("*.png"))[2]
    good = path.read_bytes()
    change(path)
    with pytest.raises(BadItemsError):
        imported(tmp_path / "png", samples, tmp_path / "masks")
    bad = [r for r in rows_of(str(tmp_path / "masks")) if r["status"] != OK]
    assert [r["status"] for r in bad] == [code] and says in bad[0]["error"] and str(path) in bad[0]["error"]
    assert bad[0]["semantic"] is None and len(rows_of(str(tmp_path / "masks"))) == 6
    path.write_bytes(good)
    state = api.retry(str(tmp_path / "masks"), options=INLINE).state
    assert (state.rows, state.bad) == (6, 0)
    rows = rows_of(str(tmp_path / "masks"))
    assert [r["semantic"] for r in rows] == [r["semantic"] for r in rows_of(samples, "samples")]


def test_the_same_command_takes_files_that_were_mended(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    paths = sorted((tmp_path / "png").rglob("*.png"))
    good = paths[0].read_bytes()
    paths[0].unlink()
    imported(tmp_path / "png", samples, tmp_path / "masks", allowed=0.5)
    paths[0].write_bytes(good)
    result = api.import_predictions("png", str(tmp_path / "png"), samples, str(tmp_path / "masks"), options=INLINE)
    assert (result.state.rows, result.state.bad) == (6, 0) and result.rows < 6
    save(paths[1], np.full((12, 16), 3, np.uint8))
    imported(tmp_path / "png", samples, tmp_path / "masks")
    rows = {r["sample_id"]: r for r in rows_of(str(tmp_path / "masks"))}
    assert rows[paths[1].stem]["class_pixels"] == [{"value": 3, "pixels": 192}]


def test_files_of_unknown_images_are_refused_before_a_run_begins(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    save(tmp_path / "png" / "nobody.png", np.zeros((12, 16), np.uint8))
    with pytest.raises(ConfigError, match=r"1 predictions for images that are not among the samples: .*nobody.png"):
        imported(tmp_path / "png", samples, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()
    (tmp_path / "png" / "nobody.png").unlink()
    (tmp_path / "png").rename(tmp_path / "elsewhere")
    assert len(rows_of(imported(tmp_path / "elsewhere", samples, tmp_path / "masks"))) == 6


@pytest.mark.parametrize(
    ("form", "source", "says"),
    [
        ("png", "none", "none does not exist"),
        ("png", "empty", "empty holds no file that ends in .png"),
        ("png", "foreign.json", "holds no file that ends in .png"),
        ("cvat", "empty", "holds no XML file"),
        ("label-studio", "foreign.json", "foreign.json is no list of Label Studio's tasks"),
        ("pnk", "empty", "unknown format 'pnk'"),
    ],
)
def test_wrong_sources_are_refused(form: str, source: str, says: str, camvid: str, tmp_path: Path) -> None:
    samples = camvid
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=says):
        imported(tmp_path / source, samples, tmp_path / "masks", form)
    assert not (tmp_path / "masks").exists()


def test_formats_that_cannot_be_read_are_refused(camvid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WriteOnly(Keeping):
        can_import: ClassVar[bool] = False

    samples = camvid
    monkeypatch.setattr(registry, "format_of", lambda name: WriteOnly())
    with pytest.raises(ConfigError, match="format keeping cannot be imported"):
        imported(tmp_path, samples, tmp_path / "masks", "keeping")


def test_archives_and_single_files_are_sources(camvid: str, tmp_path: Path) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    with zipfile.ZipFile(tmp_path / "png.zip", "w") as archive:
        for name in files(tmp_path / "png"):
            archive.write(tmp_path / "png" / name, f"predictions/{name}")
    masks = rows_of(imported(tmp_path / "png.zip", samples, tmp_path / "masks"))
    assert [m["semantic"] for m in masks] == [s["semantic"] for s in rows_of(samples, "samples")]


class Answering(Format):
    """Gives each sample the same prediction."""

    name: ClassVar[str] = "answering"
    task: ClassVar[Task] = "semantic"

    def __init__(self, prediction: Prediction) -> None:
        self._prediction = prediction

    def items(self, files: Any, samples: Any, classes: Any) -> Iterator[PlanItem]:
        return (item_of(s, f"/answers#{s.sample_id}", "e", 1) for s in samples)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        yield self._prediction


THING = Instance(1, 1, (0.0, 0.0, 1.0, 1.0), 1.0, False, b"", 0.5)


@pytest.mark.parametrize(
    ("prediction", "code", "says"),
    [
        (Prediction(semantic=np.zeros((16, 12), np.uint16)), "size-mismatch", "is 12 x 16, its photo is 16 x 12"),
        (Prediction(panoptic=np.zeros((1, 1), np.uint16), segments=()), "size-mismatch", "is 1 x 1"),
        (
            Prediction(panoptic=np.ones((12, 16), np.uint16), segments=()),
            "bad-panoptic",
            "more segments than are listed",
        ),
        (Prediction(instances=(THING,)), "size-mismatch", "instance 1 of"),
        (Prediction(instances=(replace(THING, counts=b"\xff"),)), "size-mismatch", "hold a character"),
    ],
)
def test_predictions_that_do_not_fit_are_bad_rows(
    prediction: Prediction, code: str, says: str, camvid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = camvid
    monkeypatch.setattr(registry, "format_of", lambda name: Answering(prediction))
    rows = rows_of(imported(tmp_path, samples, tmp_path / "masks", "answering", allowed=1.0))
    assert {r["status"] for r in rows} == {code} and all(says in r["error"] for r in rows)


# -- volumes ---------------------------------------------------------------------------------------------------------


def test_volumes_go_out_and_in_slice_by_slice(tmp_path: Path) -> None:
    samples = ingested(tmp_path, "lits")
    done = exported(samples, tmp_path / "png", missing="skip")
    known = [r for r in rows_of(samples, "samples") if r["semantic"] is not None]
    assert done.rows == len(known) == 5 + 3 + 4 + 1
    masks = rows_of(imported(tmp_path / "png", samples, tmp_path / "masks", allowed=1.0))
    assert [m["sample_id"] for m in masks] == [r["sample_id"] for r in rows_of(samples, "samples")]
    good = [m for m in masks if m["status"] == OK]
    assert [(m["sample_id"], m["group_id"], m["semantic"]) for m in good] == [
        (r["sample_id"], r["group_id"], r["semantic"]) for r in known
    ]
    assert {m["status"] for m in masks} == {OK, "missing-prediction"}


def test_a_volume_is_one_item_with_as_many_rows_as_slices(tmp_path: Path) -> None:
    refs = list(importing.sample_refs(ingested(tmp_path, "lits")))
    assert all(is_good for _, is_good in refs)
    assert {s.sample_id: s.rows for s, _ in refs} == {
        "volume-0": 5, "volume-1": 3, "volume-28": 4, "volume-29": 1, "test-volume-0": 3, "test-volume-1": 3
    }  # fmt: skip


def test_a_broken_volume_is_one_bad_sample(tmp_path: Path) -> None:
    TREES["lits"](tmp_path / "tree")
    label = next((tmp_path / "tree").rglob("segmentation-0.nii"))
    label.unlink()
    label.with_name("segmentation-0.nii").write_bytes(b"")
    refs = [(s.sample_id, good) for s, good in importing.sample_refs(ingested(tmp_path, "lits", allowed=1.0))]
    assert ("volume-0", False) in refs and len(refs) == 6 and sum(good for _, good in refs) == 5


def test_a_volume_needs_all_its_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = ingested(tmp_path, "lits")
    monkeypatch.setattr(registry, "format_of", lambda name: Answering(Prediction(instances=())))
    rows = rows_of(imported(tmp_path, samples, tmp_path / "masks", "answering", allowed=1.0))
    first = [r for r in rows if r["sample_id"].startswith("volume-0/")]
    assert [r["status"] for r in first] == [OK] + ["missing-prediction"] * 4
    assert "has 1 of the 5 slices of volume-0" in first[1]["error"]


# -- the command line ------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_formats_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "formats", "--json")
    found = json.loads(out)
    assert code == 0 and tuple(e["name"] for e in found) == registry.names()
    assert all(e["summary"] for e in found) and all(n in run(capsys, "formats")[1] for n in ("png", "yolo-seg"))


def test_export_and_import_by_command(camvid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, out = camvid, str(tmp_path / "png")
    code, printed, said = run(capsys, "export", "png", samples, samples, out, "--json")
    document = json.loads(printed)
    assert code == 0 and (document["rows"], document["files"], document["skipped"]) == (6, 7, 0)
    assert "6 images in 7 files" in said
    code, printed, said = run(capsys, "export", "png", samples, samples, out)
    assert (code, printed) == (0, "") and said.count("\n") == 1
    arguments = ["import", "png", out, samples, str(tmp_path / "masks"), "--engine", "inline"]
    code, printed, _ = run(capsys, *arguments, "--json")
    assert code == 0 and (json.loads(printed)["rows"], json.loads(printed)["bad"]) == (6, 0)
    code, printed, _ = run(capsys, *arguments)
    assert code == 0 and "segbatch evaluate" in printed


def test_exit_codes_of_export_and_import(camvid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, out, masks = camvid, str(tmp_path / "png"), str(tmp_path / "masks")
    exported(samples, tmp_path / "png")
    next((tmp_path / "png").rglob("*.png")).unlink()
    arguments = ["import", "png", out, samples, masks, "--engine", "inline"]
    code, _, said = run(capsys, *arguments)
    assert code == 3 and "missing-prediction" in said
    assert run(capsys, *arguments, "--max-bad-fraction", "0.2")[0] == 0
    code, _, said = run(capsys, "export", "png", masks, samples, str(tmp_path / "again"))
    assert code == 1 and said.startswith("segbatch: ") and "--missing skip" in said and said.count("\n") == 1
    code, printed, _ = run(
        capsys, "export", "png", masks, samples, str(tmp_path / "again"), "--missing", "skip", "--json"
    )
    assert code == 0 and json.loads(printed)["skipped"] == 1
    for wrong in (["export", "pnk", samples, samples, out], ["import", "pnk", out, samples, f"{masks}2"]):
        code, printed, said = run(capsys, *wrong)
        assert (code, printed) == (2, "") and "unknown format 'pnk'" in said and said.count("\n") == 1
    code, _, said = run(capsys, "import", "png", str(tmp_path / "none"), samples, f"{masks}3")
    assert code == 2 and "does not exist" in said
    assert not Path(f"{masks}2").exists() and not Path(f"{masks}3").exists()


def test_an_import_into_the_root_of_another_is_refused(
    camvid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = camvid
    exported(samples, tmp_path / "png")
    imported(tmp_path / "png", samples, tmp_path / "masks")
    shutil.copytree(tmp_path / "png", tmp_path / "other")
    code, _, said = run(capsys, "import", "png", str(tmp_path / "other"), samples, str(tmp_path / "masks"))
    assert code == 2 and "files" in said


def test_imports_have_the_schema_of_predictions(camvid: str, tmp_path: Path) -> None:
    exported(camvid, tmp_path / "png")
    root = imported(tmp_path / "png", camvid, tmp_path / "masks")
    for part in sorted(Path(root, "masks").glob("*.parquet")):
        found = pq.read_table(part)
        assert found.schema.remove_metadata().equals(schemas.MASKS.remove_metadata()) and found.num_rows == 2
