"""What every registered format must do, on the samples of a small tree of a dataset that fits it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from generators import TREES

from segbatch import api, schemas, storage, tables
from segbatch.codecs import runlength
from segbatch.config import EngineConfig, RunOptions
from segbatch.errors import BadItemsError, ConfigError, SegbatchError
from segbatch.formats.registry import BUILT_IN, format_of, names
from segbatch.jobs import Limits
from segbatch.records import OK

INLINE = RunOptions(engine=EngineConfig(kind="inline", threads=2))


@dataclass(frozen=True)
class Case:
    """What a format is tried on, and what it documents as lost.

    Attributes:
        dataset: whose tree is ingested.
        keeps: of instances and segments, what comes back beside class and mask.
        no_crowds, no_empty: crowds, or instances without a pixel, are left out.
        says_nothing_of: images without objects have no file or entry, so that none is ever missing.
        no_void: predictions of void are refused.
        sized: a prediction of another size is noticed.
    """

    dataset: str
    keeps: tuple[str, ...] = ()
    no_crowds: bool = False
    no_empty: bool = False
    says_nothing_of: bool = False
    no_void: bool = False
    sized: bool = True


ALL = ("id", "iscrowd", "area", "bbox_xywh")

CASES = {
    "ade20k": Case("ade20k"),
    "bdd100k-drivable": Case("bdd100k-drivable"),
    "bdd100k-ins": Case("bdd100k-ins", ALL),
    "bdd100k-lane": Case("bdd100k-lane"),
    "bdd100k-pan": Case("bdd100k-pan", ALL),
    "bdd100k-sem": Case("bdd100k-sem"),
    "ccp": Case("ccp"),
    "cityscapes": Case("cityscapes"),
    "cityscapes-instances": Case("cityscapes", ("area", "bbox_xywh"), no_crowds=True),
    "cityscapes-panoptic": Case("cityscapes", ALL),
    "coco": Case("coco-instances", says_nothing_of=True),
    "coco-dataset": Case("coco-instances", ALL),
    "coco-panoptic": Case("coco-panoptic", ALL),
    "coco-stuff": Case("coco-stuff"),
    "cvat": Case("coco-instances", no_empty=True),
    "cvat-semantic": Case("image-masks"),
    "fiftyone": Case("image-masks"),
    "kitti": Case("kitti"),
    "kitti-instances": Case("kitti", ("area", "bbox_xywh"), no_crowds=True),
    "label-studio": Case("coco-instances", ("id",), no_empty=True),
    "label-studio-semantic": Case("image-masks"),
    "lits": Case("lits"),
    "pascal": Case("pascal-voc", no_void=True),
    "png": Case("image-masks"),
    "yolo-seg": Case("coco-instances", no_crowds=True, no_empty=True, says_nothing_of=True, sized=False),
}

_TASK_COLUMN = {"semantic": "semantic", "instance": "instances", "panoptic": "panoptic"}

Rows = list[dict[str, Any]]


@pytest.fixture(params=sorted(BUILT_IN))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """Run roots of the samples of a dataset's tree that have a task's column; nobody changes them."""

    @functools.cache
    def ingested(dataset: str) -> str:
        folder = tmp_path_factory.mktemp(dataset)
        tree, root = TREES[dataset](folder / "tree"), str(folder / "samples")
        api.ingest(dataset, str(tree), root, limits=Limits(1.0), options=INLINE)
        return root

    @functools.cache
    def labelled(dataset: str, column: str) -> str:
        out = tmp_path_factory.mktemp(f"{dataset}-{column}")
        return derived(ingested(dataset), out, lambda rows: [r for r in rows if r[column] is not None])

    return labelled


@pytest.fixture
def samples(form: str, roots: Callable[[str, str], str]) -> str:
    """The samples that a format is tried on."""
    return roots(CASES[form].dataset, _TASK_COLUMN[format_of(form).task])


def derived(root: str, out: Path, change: Callable[[Rows], Rows]) -> str:
    """The run root with another samples table."""
    rows = change(read(root, "samples"))
    tables.write_table(str(out), "samples", pa.Table.from_pylist(rows, schema=schemas.SAMPLES))
    info = storage.join(root, ".segbatch", "dataset.json")
    storage.replace(storage.join(str(out), ".segbatch", "dataset.json"), storage.read_bytes(info))
    return str(out)


def read(root: str, table: str) -> Rows:
    return [row for batch in tables.scan(root, table) for row in batch.to_pylist()]


def exported(form: str, samples: str, out: Path) -> Path:
    api.export(form, samples, samples, str(out), options=INLINE)
    return out


def imported(form: str, files: Path, samples: str, out: Path, allowed: float = 0.0) -> Rows:
    api.import_predictions(form, str(files), samples, str(out), limits=Limits(allowed), options=INLINE)
    return read(str(out), "masks")


def error_of(call: Callable[[], object]) -> str | None:
    """What a call says when it refuses to work; None where it works."""
    try:
        call()
    except SegbatchError as error:
        return str(error)
    return None


def needs_import(form: str) -> None:
    if not format_of(form).can_import:
        pytest.skip(f"{form} cannot be imported")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def label_map(row: dict[str, Any], column: str) -> np.ndarray[Any, Any]:
    runs = row[column]
    found = runlength.Runs(
        *(np.array([r[k] for r in runs], t) for k, t in (("value", np.uint16), ("length", np.uint32)))
    )
    return runlength.decode(found, (row["height"], row["width"]))


def objects(case: Case, row: dict[str, Any]) -> list[Any]:
    """The instances of a row, without what the format loses; in no order, as no official tool has one."""
    found = [
        {k: i[k] for k in ("category_id", "counts", *case.keeps)}
        for i in row["instances"]
        if not (case.no_crowds and i["iscrowd"]) and not (case.no_empty and i["area"] == 0)
    ]
    return sorted(found, key=lambda i: (i["category_id"], i["counts"], i.get("id", 0)))


def segments(case: Case, row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The map of segment ids (-1 for void), and what is known of the segments, by id."""
    ids = np.array([-1, *(s["id"] for s in row["segments"])])
    keys = ("category_id", *case.keeps)
    known = sorted(({k: s[k] for k in keys} for s in row["segments"]), key=lambda s: s["id"])
    return ids[label_map(row, "panoptic")].tolist(), known


def same(form: str, truth: dict[str, Any], mask: dict[str, Any]) -> None:
    case, task = CASES[form], format_of(form).task
    assert (mask["status"], mask["error"]) == (OK, None)
    for name in ("sample_id", "group_id", "image_uri", "height", "width"):
        assert mask[name] == truth[name]
    if task == "semantic":
        assert np.array_equal(label_map(mask, "semantic"), label_map(truth, "semantic"))
    elif task == "instance":
        assert objects(case, mask) == objects(case, truth)
    else:
        assert segments(case, mask) == segments(case, truth)


# -- the registry ----------------------------------------------------------------------------------------------------


def test_every_format_is_tried() -> None:
    assert set(CASES) >= set(BUILT_IN)


def test_the_registry_knows_it_by_its_own_name(form: str) -> None:
    assert format_of(form).name == form and form in names() and format_of(form) is format_of(form)


def test_the_owner_of_a_dataset_takes_formats_that_there_are() -> None:
    from segbatch.datasets import registry

    for name in registry.BUILT_IN:
        assert set(registry.dataset(name).formats) <= set(names())


# -- out and in ------------------------------------------------------------------------------------------------------


def test_ground_truth_comes_back(form: str, samples: str, tmp_path: Path) -> None:
    needs_import(form)
    truth = read(samples, "samples")
    assert truth and all(t["status"] == OK for t in truth)
    masks = imported(form, exported(form, samples, tmp_path / "out"), samples, tmp_path / "masks")
    assert len(masks) == len(truth)
    for t, m in zip(truth, masks, strict=True):
        same(form, t, m)


def test_what_was_imported_is_exported_alike(form: str, samples: str, tmp_path: Path) -> None:
    needs_import(form)
    imported(form, exported(form, samples, tmp_path / "out"), samples, tmp_path / "masks")
    said = error_of(lambda: api.export(form, str(tmp_path / "masks"), samples, str(tmp_path / "again"), options=INLINE))
    if CASES[form].no_void:
        assert said is not None and "of void" in said
        return
    assert said is None
    masks = imported(form, tmp_path / "again", samples, tmp_path / "masks2")
    for first, second in zip(read(str(tmp_path / "masks"), "masks"), masks, strict=True):
        same(form, first, second)


def test_a_second_export_writes_the_same_bytes(form: str, samples: str, tmp_path: Path) -> None:
    first = contents(exported(form, samples, tmp_path / "one"))
    assert first and first == contents(exported(form, samples, tmp_path / "two"))
    assert first == contents(exported(form, samples, tmp_path / "one"))


# -- ids -------------------------------------------------------------------------------------------------------------


ODD = ("a b/c.d", "a b/c", "a/x", "a_x", "a x", "ünï-Ω (1)", "x.y.z", "%41", "0", "00", "tr#ain/ü&<i>", "y'\"", "a+b=c")
EVIL = ("../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:\\evil", "nul\0", "a//b", ".")


def renamed(samples: str, out: Path, ids: Sequence[str]) -> str:
    """The samples with other ids, and photos of such names; slices stay slices."""

    def change(rows: Rows) -> Rows:
        new: dict[str, str] = {}
        kept = []
        for row in rows:
            old = (
                row["sample_id"].rsplit("/", 1)[0]
                if row["volume"] and row["volume"]["slices"] > 1
                else row["sample_id"]
            )
            if old not in new and len(new) == len(ids):
                continue
            name = new.setdefault(old, ids[len(new)] if old not in new else "")
            group = name if row["group_id"] == old else row["group_id"]
            photo = f"/photos/{name}{Path(row['image_uri']).suffix}"
            kept.append(row | {"sample_id": name + row["sample_id"][len(old) :], "group_id": group, "image_uri": photo})
        return kept

    return derived(samples, out, change)


@pytest.mark.long
@pytest.mark.parametrize("start", [0, 2, 5, 9], ids=lambda n: f"from-{n}")
def test_odd_ids_come_back_or_are_refused_by_name(form: str, start: int, samples: str, tmp_path: Path) -> None:
    needs_import(form)
    odd = renamed(samples, tmp_path / "odd", ODD[start : start + 4])
    said = error_of(lambda: exported(form, odd, tmp_path / "deep" / "out"))
    if said is not None:
        assert any(i.rsplit("/", 1)[-1] in said for i in ids_of(read(odd, "samples")))
        return
    masks = imported(form, tmp_path / "deep" / "out", odd, tmp_path / "masks")
    for t, m in zip(read(odd, "samples"), masks, strict=True):
        same(form, t, m)


@pytest.mark.long
def test_no_id_leads_out_of_the_folder(form: str, samples: str, tmp_path: Path) -> None:
    for number, name in enumerate(EVIL):
        evil = renamed(samples, tmp_path / "evil", [name])
        out = tmp_path / str(number) / "deep" / "out"
        before = contents(tmp_path)
        error_of(functools.partial(exported, form, evil, out))
        after = contents(tmp_path)
        assert all(after.pop(path) == data for path, data in before.items())
        assert all(path.startswith(f"{number}/deep/out/") for path in after)
    assert not list(Path("/").glob("evil*"))


# -- what is wrong with predictions ----------------------------------------------------------------------------------


def refused(form: str, files: Path, samples: str, out: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        imported(form, files, samples, out)
    assert "\n" not in str(caught.value) and not out.exists()
    return str(caught.value)


def test_an_empty_folder_and_an_absent_one_are_refused(form: str, samples: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused(form, tmp_path / "empty", samples, tmp_path / "masks")
    if format_of(form).can_import:
        assert str(tmp_path / "empty") in said
        assert "does not exist" in refused(form, tmp_path / "none", samples, tmp_path / "masks")


def test_a_foreign_file_is_refused(form: str, samples: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.dat").write_bytes(b"\0\1\2")
    refused(form, tmp_path / "foreign", samples, tmp_path / "masks")
    for suffix in {Path(p).suffix for p in contents(exported(form, samples, tmp_path / "out"))}:
        folder = tmp_path / f"foreign{suffix}"
        folder.mkdir()
        (folder / f"foreign{suffix}").write_bytes(b"{}")
        with pytest.raises((ConfigError, BadItemsError)):
            imported(form, folder, samples, tmp_path / f"masks{suffix}")


def ids_of(rows: Rows) -> list[str]:
    """Ids of samples, of volumes where they are slices."""
    return list(
        dict.fromkeys(r["sample_id"].removesuffix(f"/{r['volume']['index']:04d}" if r["volume"] else "") for r in rows)
    )


def labelled(samples: str, place: int) -> str:
    """The id of the first (0) or last (-1) sample that shows something."""
    return ids_of([r for r in read(samples, "samples") if r["instances"] != []])[place]


def without(samples: str, out: Path, gone: str) -> str:
    """The samples but one; all slices of a volume are one."""
    return derived(samples, out, lambda rows: [r for r in rows if ids_of([r]) != [gone]])


@pytest.mark.long
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_prediction_for_an_unknown_image_is_refused(form: str, place: int, samples: str, tmp_path: Path) -> None:
    needs_import(form)
    fewer = without(samples, tmp_path / "fewer", labelled(samples, place))
    said = refused(form, exported(form, samples, tmp_path / "out"), fewer, tmp_path / "masks")
    assert "not among the samples" in said


@pytest.mark.long
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_missing_prediction_is_a_bad_row(form: str, place: int, samples: str, tmp_path: Path) -> None:
    needs_import(form)
    gone = labelled(samples, place)
    files = exported(form, without(samples, tmp_path / "fewer", gone), tmp_path / "out")
    if CASES[form].says_nothing_of:
        masks = imported(form, files, samples, tmp_path / "masks")
        assert [m["instances"] for m in masks if m["sample_id"] == gone] == [[]]
        return
    with pytest.raises(BadItemsError):
        imported(form, files, samples, tmp_path / "masks")
    truth, masks = read(samples, "samples"), read(str(tmp_path / "masks"), "masks")
    for t, m in zip(truth, masks, strict=True):
        if ids_of([t]) == [gone]:
            assert m["status"] == "missing-prediction" and m["error"]
            assert m["semantic"] is m["instances"] is m["panoptic"] is None
        else:
            same(form, t, m)


def test_a_prediction_of_another_size_is_a_bad_row(form: str, samples: str, tmp_path: Path) -> None:
    needs_import(form)
    if not CASES[form].sized:
        pytest.skip(f"{form} says nothing of sizes")
    target = labelled(samples, 0)

    def wider(rows: Rows) -> Rows:
        return [r | {"width": r["width"] + 1} if ids_of([r]) == [target] else r for r in rows]

    files, other = exported(form, samples, tmp_path / "out"), derived(samples, tmp_path / "wider", wider)
    masks = imported(form, files, other, tmp_path / "masks", allowed=1.0)
    for t, m in zip(read(samples, "samples"), masks, strict=True):
        if ids_of([t]) == [target]:
            assert m["status"] == "size-mismatch" and m["error"]
        else:
            same(form, t, m)
