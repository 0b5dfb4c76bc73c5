"""BDD100K's result formats: files as the official toolkit reads them, round trips, RLE JSON, wrong files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees_bdd100k as trees
from generators import photo, save
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import rle
from segbatch.datasets import tables
from segbatch.datasets.camvid import CLASSES as CAMVID
from segbatch.datasets.registry import dataset
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels
from segbatch.formats.bdd100k import (
    Drivable,
    InstanceSegmentation,
    Lane,
    PanopticSegmentation,
    SemanticSegmentation,
)
from segbatch.formats.registry import format_of
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Segment
from segbatch.stages.exporting import Folder

SEM, INS, PAN = SemanticSegmentation(), InstanceSegmentation(), PanopticSegmentation()
FORMATS: tuple[Format, ...] = (SEM, INS, PAN, Drivable(), Lane())
FIRST = trees.IMAGES["train"][0]
VIDEO = trees.VIDEOS["val"][0]
H, W = trees.SIZE


@pytest.fixture(params=FORMATS, ids=lambda f: f.name)
def form(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


def truth(form: Format, root: Path) -> list[Labels]:
    """The ground truth of the labelled images of the format's own dataset."""
    rows = trees.truth(dataset(form.name), trees.TREES[form.name](root))
    return [r for r in rows if r.split != "test"]


def read(form: Format, item: PlanItem) -> Prediction:
    (found,) = form.read(item)
    return found


def imported(form: Format, source: Path, rows: list[Labels]) -> list[Prediction]:
    return [read(form, i) for i in trees.planned(form, source, rows)]


def problem(form: Format, item: PlanItem) -> DataError:
    with pytest.raises(DataError) as caught:
        read(form, item)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def predicted(*objects: Instance, sample_id: str = FIRST, group_id: str = FIRST) -> Labels:
    return Labels(sample_id, f"/data/{sample_id}.jpg", H, W, group_id=group_id, instances=objects)


def box(number: int, category: int, where: tuple[slice, slice], score: float | None, crowd: bool = False) -> Instance:
    mask = np.zeros((H, W), bool)
    mask[where] = True
    counts = rle.encode(mask)
    return Instance(number, category, rle.bbox(counts, H, W), float(mask.sum()), crowd, counts, score)


class TestEveryFormat:
    def test_it_is_registered_and_its_dataset_names_it(self, form: Format) -> None:
        assert type(format_of(form.name)) is type(form) and form.name in dataset(form.name).formats

    def test_ground_truth_comes_back_as_it_was(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")
        again = imported(form, trees.exported(form, rows, tmp_path / "out"), rows)
        for row, found in zip(rows, again, strict=True):
            if form.task == "semantic":
                assert found.semantic is not None and np.array_equal(found.semantic, np.asarray(row.semantic))
            elif form.task == "instance":
                assert found.instances == tuple(replace(i, score=1.0) for i in row.instances or ())
            else:
                assert found.panoptic is not None and np.array_equal(found.panoptic, np.asarray(row.panoptic))
                assert found.segments == row.segments

    def test_files_are_the_official_label_files_pixel_by_pixel(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")
        out = trees.exported(form, rows, tmp_path / "out")
        written = {p.name: p for p in out.rglob("*.png")}
        official = list(tmp_path.glob("tree/labels/*/*masks/**/*.png"))
        assert len(official) == len(written) == len(rows)
        for path in official:
            with Image.open(path) as a, Image.open(written[path.name]) as b:
                assert a.mode == b.mode in ("L", "RGBA") and np.array_equal(np.array(a), np.array(b))

    def test_the_official_folders_can_be_imported(self, form: Format, tmp_path: Path) -> None:
        rows = [r for r in truth(form, tmp_path / "tree") if r.split == "val"]
        (labels,) = [p for p in tmp_path.glob("tree/labels/*/*masks/val") if "seg_track" not in str(p)]
        if form.name == INS.name:
            trees.write(labels / "scores.json", [{"name": f"{r.sample_id}.jpg", "labels": None} for r in rows])
            assert [p.instances for p in imported(form, labels, rows)] == [(), ()]
        else:
            assert len(imported(form, labels, rows)) == 2

    def test_a_missing_prediction_is_named(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")
        first, *others = trees.planned(form, trees.exported(form, rows[1:], tmp_path / "out"), rows)
        error = problem(form, first)
        assert error.code == "missing-prediction" and FIRST in error.problem
        assert len([read(form, i) for i in others]) == len(rows) - 1

    def test_predictions_of_other_images_are_refused(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")
        out = trees.exported(form, rows, tmp_path / "out")
        with pytest.raises(ConfigError, match=rf"1 predictions for images .*{FIRST}"):
            trees.planned(form, out, rows[1:])

    def test_a_folder_of_something_else_is_refused(self, form: Format, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "readme.md").write_text("nothing")
        with pytest.raises(ConfigError, match="holds n"):
            trees.planned(form, tmp_path / "other", [])

    def test_classes_of_another_dataset_are_refused(self, form: Format, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"{form.name} has no classes 0 Sky"):
            form.write(iter([]), CAMVID, Folder(str(tmp_path), 1))
        form.write(iter([]), ClassTable(()), Folder(str(tmp_path), 1))

    def test_ids_that_no_class_has_are_refused(self, form: Format, tmp_path: Path) -> None:
        row = truth(form, tmp_path / "tree")[0]
        bad = {
            "semantic": replace(row, semantic=np.full((H, W), 77, np.uint16)),
            "instance": replace(row, instances=(box(1, 77, trees.grid(1), 0.5),)),
            "panoptic": replace(row, segments=tuple(replace(s, category_id=77) for s in row.segments or ())),
        }[form.task]
        with pytest.raises(DataError, match=f"{FIRST} has the label id 77") as caught:
            trees.exported(form, [bad], tmp_path / "out")
        assert caught.value.code == "unknown-label"

    def test_ids_that_leave_the_folder_are_refused(self, form: Format, tmp_path: Path) -> None:
        row = replace(truth(form, tmp_path / "tree")[0], sample_id="../../outside", group_id="../..")
        with pytest.raises(DataError) as caught:
            trees.exported(form, [row], tmp_path / "out")
        assert caught.value.code == "bad-path" and not list(tmp_path.rglob("outside*"))

    def test_a_changed_prediction_is_a_changed_item(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")
        out = trees.exported(form, rows, tmp_path / "out")
        before = trees.planned(form, out, rows)
        (path,) = out.rglob(f"{FIRST}.png")
        path.write_bytes(path.read_bytes() + b" ")
        after = trees.planned(form, out, rows)
        assert [a.sample_id for a, b in zip(before, after, strict=True) if a.etag != b.etag] == [FIRST]

    def test_a_broken_file_is_a_bad_row(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")
        out = trees.exported(form, rows, tmp_path / "out")
        (path,) = out.rglob(f"{FIRST}.png")
        path.write_bytes(b"nothing")
        assert problem(form, trees.planned(form, out, rows)[0]).code == "bad-label"
        save(path, photo(1, (H, W)))
        assert problem(form, trees.planned(form, out, rows)[0]).code == "label-type"


class TestLanes:
    def test_predictions_without_direction_and_style_are_parallel_and_solid(self, tmp_path: Path) -> None:
        row = replace(truth(Lane(), tmp_path / "tree")[0], label_maps={}, is_truth=False)
        out = trees.exported(Lane(), [row], tmp_path / "out")
        with Image.open(out / f"{FIRST}.png") as image:
            assert np.array_equal(np.array(image), np.asarray(row.semantic))

    def test_a_direction_that_is_none_is_refused(self, tmp_path: Path) -> None:
        row = truth(Lane(), tmp_path / "tree")[0]
        maps = {**row.label_maps, "direction": np.full((H, W), 2, np.uint16)}
        with pytest.raises(DataError, match=f"{FIRST} cannot be written as lane bytes: direction is 2"):
            trees.exported(Lane(), [replace(row, label_maps=maps)], tmp_path / "out")


class TestInstances:
    def test_scores_are_those_of_the_official_file(self, tmp_path: Path) -> None:
        objects = (box(1, 3, trees.grid(0), 0.5), box(2, 4, trees.grid(1), 0.75))
        out = trees.exported(INS, [predicted(*objects)], tmp_path)
        assert json.loads((out / "scores.json").read_text()) == [
            {
                "name": f"{FIRST}.jpg",
                "labels": [{"id": "1", "index": 1, "score": 0.5}, {"id": "2", "index": 2, "score": 0.75}],
            }
        ]
        assert np.array_equal(
            trees.read_rgba(out / "bitmasks" / f"{FIRST}.png"),
            trees.bitmask([(1, 3, 0, trees.grid(0)), (2, 4, 0, trees.grid(1))]),
        )
        assert imported(INS, out, [predicted()])[0].instances == objects

    def test_higher_scores_cover_lower_ones_and_the_hidden_are_left_out(self, tmp_path: Path) -> None:
        left, right = (slice(0, H), slice(0, 20)), (slice(0, H), slice(12, W))
        objects = (
            box(8, 1, right, 0.9),
            box(5, 2, left, 0.4),
            box(6, 3, trees.grid(0), 0.1),
            box(7, 3, trees.grid(3), 1),
        )
        out = trees.exported(INS, [predicted(*objects)], tmp_path)
        (found,) = imported(INS, out, [predicted()])
        assert [(i.id, i.score, i.bbox_xywh) for i in found.instances or ()] == [
            (8, 0.9, (12, 0, 20, H)),
            (5, 0.4, (0, 0, 12, H)),
            (7, 1.0, (24, 0, 8, 8)),
        ]

    def test_ids_that_do_not_fit_are_counted(self, tmp_path: Path) -> None:
        objects = (box(70_000, 3, trees.grid(0), 0.5), box(9, 4, trees.grid(1), 0.75))
        (found,) = imported(INS, trees.exported(INS, [predicted(*objects)], tmp_path), [predicted()])
        assert [(i.id, i.category_id) for i in found.instances or ()] == [(1, 3), (2, 4)]

    def test_attributes_of_the_truth_are_not_given_to_predictions(self, tmp_path: Path) -> None:
        row = truth(INS, tmp_path / "tree")[0]
        out = trees.exported(INS, [replace(row, is_truth=False)], tmp_path / "out")
        flags = {*trees.read_rgba(out / "bitmasks" / f"{FIRST}.png")[..., 1].ravel().tolist()}
        assert flags == {0, 2}  # nothing, and crowd, which is the objects' own

    def test_frames_of_videos_lie_in_folders_and_need_no_scores(self, tmp_path: Path) -> None:
        rows = [r for r in truth(INS, tmp_path / "tree") if r.split == "seg_track_val"]
        out = trees.exported(INS, rows, tmp_path / "out")
        assert sorted(p.name for p in (out / "bitmasks" / VIDEO).iterdir()) == [f"{r.sample_id}.png" for r in rows]
        (out / "scores.json").unlink()
        for folder in (out, out / "bitmasks"):
            again = imported(INS, folder, rows)
            assert [p.instances for p in again] == [r.instances for r in rows]

    def test_images_need_scores(self, tmp_path: Path) -> None:
        rows = truth(INS, tmp_path / "tree")
        out = trees.exported(INS, rows, tmp_path / "out")
        scores = json.loads((out / "scores.json").read_text())
        trees.write(out / "scores.json", scores[1:])
        error = problem(INS, trees.planned(INS, out, rows)[0])
        assert error.code == "bad-annotation" and f"has no scores of {FIRST}" in error.problem
        trees.write(out / "more.json", scores)
        with pytest.raises(ConfigError, match="has 2 JSON files"):
            trees.planned(INS, out, rows)
        for name in ("scores.json", "more.json"):
            (out / name).unlink()
        with pytest.raises(ConfigError, match=r"has no scores\.json"):
            trees.planned(INS, out, rows)

    def test_scores_without_pixels_are_left_out_and_their_order_is_kept(self, tmp_path: Path) -> None:
        objects = (box(1, 3, trees.grid(0), 0.5), box(2, 4, trees.grid(1), 0.5))
        out = trees.exported(INS, [predicted(*objects)], tmp_path)
        labels = [{"id": "", "index": i, "score": 0.5} for i in (9, 2, 1)]
        trees.write(out / "scores.json", [{"name": f"{FIRST}.png", "labels": labels}])
        assert imported(INS, out, [predicted()])[0].instances == objects[::-1]

    @pytest.mark.parametrize(
        "labels", [[{"index": 1, "score": 0.5}] * 2, [{"index": 1}], [{"index": "1", "score": 1}], "?"]
    )
    def test_wrong_scores_are_a_bad_row(self, labels: object, tmp_path: Path) -> None:
        out = trees.exported(INS, [predicted(box(1, 3, trees.grid(0), 0.5))], tmp_path)
        before = trees.planned(INS, out, [predicted()])[0].etag
        trees.write(out / "scores.json", [{"name": f"{FIRST}.jpg", "labels": labels}])
        (item,) = trees.planned(INS, out, [predicted()])
        error = problem(INS, item)
        assert error.code == "bad-annotation" and FIRST in error.problem and item.etag != before


class TestPanoptic:
    def test_segment_ids_that_do_not_fit_are_counted(self, tmp_path: Path) -> None:
        index = np.zeros((H, W), np.uint16)
        index[trees.grid(0)], index[trees.grid(1)] = 2, 1
        segments = (Segment(0, 35, 64, (8, 0, 8, 8)), Segment(8_000_000, 7, 64, (0, 0, 8, 8)))
        row = Labels(FIRST, "/data/a.jpg", H, W, panoptic=index, segments=segments)
        out = trees.exported(PAN, [row], tmp_path)
        expected = trees.bitmask([(1, 35, 0, trees.grid(1)), (2, 7, 0, trees.grid(0))])
        assert np.array_equal(trees.read_rgba(out / f"{FIRST}.png"), expected)


class TestJson:
    def frames(self, path: Path, labels: Mapping[str, list[dict[str, Any]] | None]) -> Path:
        return trees.write(path, [{"name": f"{name}.jpg", "labels": found} for name, found in labels.items()])

    def half(self) -> NDArray[np.bool_]:
        return np.arange(W)[None, :].repeat(H, axis=0) < 9

    def test_rle_is_read_for_all_tasks_but_lanes(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")[:2]
        category = {"bdd100k-drivable": "alternative"}.get(form.name, "car")
        label = trees.rle_label("4", category, self.half(), score=0.5)
        source = self.frames(tmp_path / "preds" / "a.json", {rows[0].sample_id: [label], rows[1].sample_id: None})
        if form.name == "bdd100k-lane":
            with pytest.raises(ConfigError, match=r"no file that ends in \.png"):
                trees.planned(form, source.parent, rows)
            return
        for place in (source, source.parent):
            found, nothing = imported(form, place, rows)
            if form.task == "semantic":
                ids = {c.name: c.label_id for c in tables.load(form.name).classes}
                void = ids.get("background", 255)
                assert np.array_equal(np.asarray(found.semantic), np.where(self.half(), ids[category], void))
                assert (np.asarray(nothing.semantic) == void).all()
            elif form.task == "instance":
                (one,) = found.instances or ()
                assert (one.id, one.category_id, one.score, one.area) == (4, 3, 0.5, 9 * H) and nothing.instances == ()
            else:
                assert [(s.id, s.category_id) for s in found.segments or ()] == [(31, 35)] and nothing.segments == ()

    @pytest.mark.parametrize("form", [SEM, INS, PAN], ids=lambda f: f.name)
    def test_what_can_be_wrong(self, form: Format, tmp_path: Path) -> None:
        rows = truth(form, tmp_path / "tree")[:3]
        names = [r.sample_id for r in rows]
        small = trees.rle_label("1", "car", np.zeros((H, 5), bool))
        broken = {"id": "2", "category": "car", "rle": {"counts": "!", "size": [H, W]}}
        source = self.frames(tmp_path / "preds" / "a.json", {names[0]: [small], names[1]: [broken]})
        errors = [problem(form, i) for i in trees.planned(form, source, rows)]
        assert [e.code for e in errors] == ["size-mismatch", "bad-annotation", "missing-prediction"]
        assert all(str(source) in e.problem for e in errors)
        self.frames(tmp_path / "preds" / "b.json", {names[1]: []})
        with pytest.raises(ConfigError, match=f"{names[1]}.jpg a second time"):
            trees.planned(form, source.parent, rows)
        with pytest.raises(ConfigError, match=rf"1 predictions for images .*{names[1]}"):
            trees.planned(form, source, rows[:1])

    def test_a_changed_frame_is_a_changed_item(self, tmp_path: Path) -> None:
        rows = truth(SEM, tmp_path / "tree")[:2]

        def tags(category: str) -> list[str]:
            label = trees.rle_label("1", category, self.half())
            frames = {rows[0].sample_id: [label], rows[1].sample_id: []}
            return [i.etag for i in trees.planned(SEM, self.frames(tmp_path / "a.json", frames), rows)]

        before, after = tags("car"), tags("bus")
        assert before[0] != after[0] and before[1] == after[1]
