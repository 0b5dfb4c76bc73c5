"""Cityscapes' result formats: file names and contents as the official tools read them, round trips, wrong files."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pytest
import trees_cityscapes as trees
from PIL import Image

from segbatch.codecs import rle
from segbatch.datasets import tables
from segbatch.datasets.camvid import CLASSES as CAMVID
from segbatch.datasets.cityscapes import Cityscapes as CityscapesData
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels
from segbatch.formats.cityscapes import Cityscapes, CityscapesInstances, CityscapesPanoptic
from segbatch.formats.registry import format_of
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Segment
from segbatch.stages.exporting import Folder

SharedData = Callable[[str], Path]
FORMATS: tuple[Format, ...] = (Cityscapes(), CityscapesInstances(), CityscapesPanoptic())
FRANKFURT = trees.IMAGES["val"][0]


@pytest.fixture
def rows(tmp_path: Path) -> list[Labels]:
    return trees.truth(CityscapesData(), trees.cityscapes(tmp_path / "tree"), "train", "val")


def read(form: Format, item: PlanItem) -> Prediction:
    (found,) = form.read(item)
    return found


def imported(form: Format, folder: Path, rows: list[Labels]) -> list[Prediction]:
    return [read(form, i) for i in trees.planned(form, folder, rows)]


def problem(form: Format, item: PlanItem) -> DataError:
    with pytest.raises(DataError) as caught:
        read(form, item)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def objects(instances: tuple[Instance, ...] | None) -> list[tuple[int, bytes, tuple[float, ...], float]]:
    return [(i.category_id, i.counts, i.bbox_xywh, i.area) for i in instances or () if not i.iscrowd]


def check_round_trip(form: Format, rows: list[Labels], folder: Path) -> None:
    again = imported(form, trees.write(form, rows, folder), rows)
    for row, found in zip(rows, again, strict=True):
        if form.task == "semantic":
            assert found.semantic is not None and np.array_equal(found.semantic, np.asarray(row.semantic))
        elif form.task == "instance":
            assert objects(found.instances) == objects(row.instances)
            assert all(i.score == 1.0 and not i.iscrowd for i in found.instances or ())
        else:
            assert found.panoptic is not None and np.array_equal(found.panoptic, np.asarray(row.panoptic))
            assert found.segments == row.segments


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
class TestEveryFormat:
    def test_it_is_registered(self, form: Format) -> None:
        assert type(format_of(form.name)) is type(form) and form.name in CityscapesData.formats

    def test_ground_truth_comes_back_as_it_was(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        check_round_trip(form, rows, tmp_path / "out")

    def test_real_ground_truth_comes_back_as_it_was(
        self, form: Format, shared_data: SharedData, tmp_path: Path
    ) -> None:
        check_round_trip(form, trees.truth(CityscapesData(), shared_data("data/cityscapes_mini")), tmp_path / "out")

    def test_results_in_folders_of_cities_are_found(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(form, rows, tmp_path / "out")
        (tmp_path / "all").mkdir()
        folder.rename(tmp_path / "all" / "munster")
        assert [i.etag for i in trees.planned(form, tmp_path / "all", rows)]
        assert len(imported(form, tmp_path / "all", rows)) == len(rows)

    def test_a_missing_result_is_named(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(form, rows[1:], tmp_path / "out")
        first, *others = trees.planned(form, folder, rows)
        error = problem(form, first)
        assert error.code == "missing-prediction" and rows[0].sample_id in error.problem
        assert [read(form, i) for i in others]

    def test_results_of_other_images_are_refused(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(form, rows, tmp_path / "out")
        with pytest.raises(ConfigError, match=rf"1 predictions for images .*{rows[0].sample_id}"):
            trees.planned(form, folder, rows[1:])

    def test_a_folder_of_something_else_is_refused(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "readme.md").write_text("nothing")
        with pytest.raises(ConfigError, match="holds no"):
            trees.planned(form, tmp_path / "other", rows)

    def test_classes_of_another_dataset_are_refused(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        for classes, words in (
            (CAMVID, "0 is 'Sky'"),
            (tables.load("coco-panoptic"), "no class of Cityscapes|in Cityscapes"),
        ):
            with pytest.raises(ConfigError, match=words):
                form.write(iter(rows), classes, Folder(str(tmp_path), 1))
        form.write(iter(rows), tables.load("kitti"), Folder(str(tmp_path / "kitti"), 1))
        form.write(iter(rows), ClassTable(()), Folder(str(tmp_path / "unnamed"), 1))

    def test_ids_that_leave_the_folder_are_refused(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            trees.write(form, [replace(rows[0], sample_id="../../outside")], tmp_path / "out")
        assert caught.value.code == "bad-path" and not list(tmp_path.rglob("outside*"))

    def test_a_changed_result_is_a_changed_item(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(form, rows, tmp_path / "out")
        before = trees.planned(form, folder, rows)
        path = sorted(p for p in folder.rglob(f"{FRANKFURT}*") if p.suffix == ".png")[0]
        path.write_bytes(path.read_bytes() + b" ")
        changed = [
            a.sample_id for a, b in zip(before, trees.planned(form, folder, rows), strict=True) if a.etag != b.etag
        ]
        assert changed == [FRANKFURT]


class TestSemantic:
    def test_files_are_8_bit_label_ids(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(Cityscapes(), rows, tmp_path / "out")
        assert sorted(p.name for p in folder.iterdir()) == sorted(f"{r.sample_id}_pred_labelIds.png" for r in rows)
        for row in rows:
            with Image.open(folder / f"{row.sample_id}_pred_labelIds.png") as image:
                assert image.mode == "L" and np.array_equal(np.array(image), np.asarray(row.semantic))

    def test_other_names_and_official_label_files_are_read(self, rows: list[Labels], tmp_path: Path) -> None:
        val = rows[3:]
        for row in val:
            generators.save(tmp_path / "plain" / f"{row.sample_id}.png", np.asarray(row.semantic).astype(np.uint8))
        for folder in (tmp_path / "plain", tmp_path / "tree" / "gtFine" / "val"):
            again = imported(Cityscapes(), folder, val)
            assert all(
                np.array_equal(np.asarray(a.semantic), np.asarray(r.semantic)) for a, r in zip(again, val, strict=True)
            )

    def test_two_results_of_one_image_are_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            generators.save(tmp_path / "out" / f"{FRANKFURT}_{name}", np.zeros(trees.SIZE, np.uint8))
        with pytest.raises(ConfigError, match=r"_a.png and .*_b.png are results of one image"):
            trees.planned(Cityscapes(), tmp_path / "out", rows)

    @pytest.mark.parametrize(
        ("pixels", "code", "words"),
        [
            (np.full(trees.SIZE, 255, np.uint8), "unknown-label", "trainIds"),
            (np.full(trees.SIZE, 34, np.uint8), "unknown-label", "id 34 at row 0"),
            (generators.photo(0, trees.SIZE), "label-type", "in colour"),
        ],
    )
    def test_wrong_results_are_named(
        self, rows: list[Labels], tmp_path: Path, pixels: Any, code: str, words: str
    ) -> None:
        generators.save(tmp_path / "out" / f"{FRANKFURT}.png", pixels)
        (item,) = trees.planned(Cityscapes(), tmp_path / "out", rows[3:4])
        error = problem(Cityscapes(), item)
        assert error.code == code and words in error.problem and f"{FRANKFURT}.png" in error.problem

    def test_label_ids_that_the_evaluator_cannot_count_are_not_written(
        self, rows: list[Labels], tmp_path: Path
    ) -> None:
        for value in (34, 255):
            row = replace(rows[0], semantic=np.full(trees.SIZE, value, np.uint16))
            with pytest.raises(DataError, match=rf"{row.sample_id} has the id {value}"):
                trees.write(Cityscapes(), [row], tmp_path / str(value))


class TestInstances:
    def test_lists_and_masks_are_as_the_evaluator_reads_them(self, rows: list[Labels], tmp_path: Path) -> None:
        row = with_scores(rows[3])
        folder = trees.write(CityscapesInstances(), [row], tmp_path / "out")
        lines = [line.split(" ") for line in (folder / f"{FRANKFURT}_pred.txt").read_text().splitlines()]
        wanted = [i for i in row.instances or () if not i.iscrowd]
        assert len(lines) == len(wanted) == 5
        for line, instance in zip(lines, wanted, strict=True):
            with Image.open(folder / line[0]) as image:
                assert image.mode == "L" and set(np.unique(np.array(image)).tolist()) == {0, 255}
                assert np.array_equal(np.array(image) > 0, rle.decode(instance.counts, *trees.SIZE))
            assert (int(line[1]), float(line[2])) == (instance.category_id, instance.score)

    def test_scores_come_back_to_the_last_digit(self, rows: list[Labels], tmp_path: Path) -> None:
        row = with_scores(rows[3])
        (again,) = imported(CityscapesInstances(), trees.write(CityscapesInstances(), [row], tmp_path), [row])
        assert [i.score for i in again.instances or ()] == [i.score for i in row.instances or () if not i.iscrowd]
        assert [i.id for i in again.instances or ()] == [1, 2, 3, 4, 5]

    def test_an_image_without_instances_has_an_empty_list(self, rows: list[Labels], tmp_path: Path) -> None:
        row = replace(rows[0], instances=())
        folder = trees.write(CityscapesInstances(), [row], tmp_path)
        assert [p.name for p in folder.iterdir() if p.is_file()] == [f"{row.sample_id}_pred.txt"]
        assert imported(CityscapesInstances(), folder, [row])[0].instances == ()

    def test_categories_and_ids_that_cannot_be_written_are_named(self, rows: list[Labels], tmp_path: Path) -> None:
        first = (rows[0].instances or ())[0]
        for row, code in (
            (replace(rows[0], instances=(replace(first, category_id=90, iscrowd=False),)), "unknown-category"),
            (replace(rows[0], sample_id="my photo"), "bad-path"),
        ):
            with pytest.raises(DataError) as caught:
                trees.write(CityscapesInstances(), [row], tmp_path / code)
            assert caught.value.code == code

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("masks/a.png 24", "bad-annotation"),
            ("masks/a b.png 24 0.5", "bad-annotation"),
            ("masks/a.png car 0.5", "bad-annotation"),
            ("masks/a.png 24 nan", "bad-annotation"),
            ("masks/a.png 24 0.5\nmasks/a.png 24 0.4", "bad-annotation"),
            ("masks/a.png 90 0.5", "unknown-category"),
            ("/etc/a.png 24 0.5", "bad-path"),
            ("../secret.png 24 0.5", "bad-path"),
            ("masks/../../secret.png 24 0.5", "bad-path"),
            ("masks\\a.png 24 0.5", "bad-path"),
            ("masks/\0.png 24 0.5", "bad-path"),
            ("masks/gone.png 24 0.5", "missing-label"),
            ("masks/small.png 24 0.5", "size-mismatch"),
            ("masks/colour.png 24 0.5", "label-type"),
            ("\xff", "bad-annotation"),
        ],
    )
    def test_wrong_lists_are_named(self, rows: list[Labels], tmp_path: Path, text: str, code: str) -> None:
        folder = tmp_path / "out"
        generators.save(tmp_path / "secret.png", np.ones(trees.SIZE, np.uint8))
        generators.save(folder / "masks" / "a.png", np.ones(trees.SIZE, np.uint8))
        generators.save(folder / "masks" / "small.png", np.ones((4, 4), np.uint8))
        generators.save(folder / "masks" / "colour.png", generators.photo(0, trees.SIZE))
        (folder / f"{FRANKFURT}.txt").write_bytes(text.encode("latin-1"))
        (item,) = trees.planned(CityscapesInstances(), folder, rows[3:4])
        error = problem(CityscapesInstances(), item)
        assert error.code == code and str(folder) in error.problem

    def test_paths_may_go_up_within_the_folder(self, rows: list[Labels], tmp_path: Path) -> None:
        generators.save(tmp_path / "pred_img" / "a.png", np.eye(*trees.SIZE, dtype=np.uint8))
        (tmp_path / "pred_list").mkdir()
        (tmp_path / "pred_list" / f"{FRANKFURT}.txt").write_text("../pred_img/a.png 026 0.25\n")
        (found,) = imported(CityscapesInstances(), tmp_path, rows[3:4])
        (only,) = found.instances or ()
        assert (only.category_id, only.score, only.area) == (26, 0.25, 40)


def with_scores(row: Labels) -> Labels:
    instances = (replace(i, score=1 / (3 + n)) for n, i in enumerate(row.instances or ()))
    return replace(row, instances=tuple(instances), is_truth=False)


class TestPanoptic:
    def test_ground_truth_is_written_as_the_official_files(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(CityscapesPanoptic(), rows, tmp_path / "out")
        official = tmp_path / "tree" / "gtFine"
        assert sorted(p.name for p in folder.iterdir()) == [
            f"cityscapes_panoptic_{s}{e}" for s in ("train", "val") for e in ("", ".json")
        ]
        mine, theirs = (json.loads((f / "cityscapes_panoptic_val.json").read_text()) for f in (folder, official))
        assert mine["annotations"] == theirs["annotations"]
        assert [i["id"] for i in mine["images"]] == [i["id"] for i in theirs["images"]]
        assert len(mine["categories"]) == 19
        for path in (official / "cityscapes_panoptic_val").iterdir():
            with Image.open(path) as a, Image.open(folder / "cityscapes_panoptic_val" / path.name) as b:
                assert b.mode == "RGB" and np.array_equal(np.array(a), np.array(b))

    def test_what_stops_the_evaluator_is_not_written(self, rows: list[Labels], tmp_path: Path) -> None:
        index = np.zeros(trees.SIZE, np.uint16)
        index[:10], index[10:20] = 1, 2
        box = (0.0, 0.0, 48.0, 10.0)
        segments = (Segment(70000, 7, 480, box), Segment(5, 29, 480, box), Segment(6, 26, 0, (0, 0, 0, 0)))
        row = replace(rows[3], panoptic=index, segments=segments, is_truth=False)
        folder = trees.write(CityscapesPanoptic(), [row], tmp_path / "out")
        document = json.loads((folder / "cityscapes_panoptic_val.json").read_text())
        assert [s["id"] for s in document["annotations"][0]["segments_info"]] == [70000]
        pixels = np.array(Image.open(folder / "cityscapes_panoptic_val" / f"{FRANKFURT}_panoptic.png"))
        assert set(map(tuple, pixels.reshape(-1, 3).tolist())) == {(0, 0, 0), (112, 17, 1)}
        (again,) = imported(CityscapesPanoptic(), folder, [row])
        assert again.segments == segments[:1] and np.array_equal(np.asarray(again.panoptic), index == 1)

    @pytest.mark.parametrize(
        ("segment", "code"),
        [
            (Segment(0, 7, 1, (0, 0, 1, 1)), "bad-panoptic"),
            (Segment(1 << 24, 7, 1, (0, 0, 1, 1)), "bad-panoptic"),
            (Segment(3, 77, 1, (0, 0, 1, 1)), "unknown-category"),
        ],
    )
    def test_segments_that_cannot_be_written_are_named(
        self, rows: list[Labels], tmp_path: Path, segment: Segment, code: str
    ) -> None:
        row = replace(rows[0], panoptic=np.ones(trees.SIZE, np.uint16), segments=(segment,))
        with pytest.raises(DataError, match=rows[0].sample_id) as caught:
            trees.write(CityscapesPanoptic(), [row], tmp_path / "out")
        assert caught.value.code == code

    def test_rows_without_split_share_one_file(self, rows: list[Labels], tmp_path: Path) -> None:
        some = [replace(r, split="") for r in rows[:2]]
        folder = trees.write(CityscapesPanoptic(), some, tmp_path / "out")
        assert sorted(p.name for p in folder.iterdir()) == ["cityscapes_panoptic", "cityscapes_panoptic.json"]
        assert len(imported(CityscapesPanoptic(), folder, some)) == 2

    @pytest.mark.parametrize(
        ("change", "code", "words"),
        [
            (lambda a: a["segments_info"].pop(), "unknown-segment", "not listed"),
            (lambda a: a["segments_info"].append({"id": 3, "category_id": 7}), "empty-segment", "does not show"),
            (lambda a: a["segments_info"][0].update(category_id=99), "unknown-category", "category 99"),
            (lambda a: a.update(file_name="../../secret.png"), "missing-label", "is not there"),
            (lambda a: a["segments_info"][0].pop("id"), "bad-annotation", "id"),
        ],
    )
    def test_wrong_results_are_named(
        self, rows: list[Labels], tmp_path: Path, change: Callable[[Any], None], code: str, words: str
    ) -> None:
        generators.save(tmp_path / "secret.png", np.zeros((*trees.SIZE, 3), np.uint8))
        folder = trees.write(CityscapesPanoptic(), rows[3:], tmp_path / "out")
        path = folder / "cityscapes_panoptic_val.json"
        document = json.loads(path.read_text())
        change(document["annotations"][0])
        path.write_text(json.dumps(document))
        first, second = trees.planned(CityscapesPanoptic(), folder, rows[3:])
        error = problem(CityscapesPanoptic(), first)
        assert error.code == code and words in error.problem and read(CityscapesPanoptic(), second).segments

    def test_maps_of_another_size_or_kind_are_named(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(CityscapesPanoptic(), rows[3:4], tmp_path / "out")
        (item,) = trees.planned(CityscapesPanoptic(), folder, rows[3:4])
        for pixels in (generators.photo(0), np.zeros(trees.SIZE, np.uint8)):
            generators.save(Path(item.uri), pixels)
            error = problem(CityscapesPanoptic(), item)
            assert error.code == "size-mismatch" and item.uri in error.problem

    def test_two_annotations_of_one_image_are_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(CityscapesPanoptic(), rows[3:4], tmp_path / "out")
        path = folder / "cityscapes_panoptic_val.json"
        path.with_name("other.json").write_text(path.read_text())
        with pytest.raises(ConfigError, match=f"other.json annotate {FRANKFURT} twice"):
            trees.planned(CityscapesPanoptic(), folder, rows[3:4])


def test_writing_holds_few_rows(rows: list[Labels], tmp_path: Path) -> None:
    """Rows are taken one by one, not listed first."""
    taken = 0

    def stream() -> Iterator[Labels]:
        nonlocal taken
        for n in range(60):
            taken += 1
            yield replace(rows[0], sample_id=f"a_000000_{n:06d}")
            written = len(list(tmp_path.glob("*.png")))
            assert taken - written < 10

    Cityscapes().write(stream(), ClassTable(()), Folder(str(tmp_path), 2))
    assert taken == len(list(tmp_path.glob("*.png"))) == 60
