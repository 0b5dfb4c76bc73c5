"""KITTI's result formats: the devkit's folders and names, round trips, and files that could be of two samples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import generators
import numpy as np
import pytest
import trees_cityscapes as trees
from PIL import Image

from segbatch.codecs import rle
from segbatch.datasets.camvid import CLASSES as CAMVID
from segbatch.datasets.kitti import Kitti as KittiData
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels
from segbatch.formats.kitti import Kitti, KittiInstances
from segbatch.formats.registry import format_of
from segbatch.records import PlanItem, Prediction
from segbatch.stages.exporting import Folder

SharedData = Callable[[str], Path]
FORMATS: tuple[Format, ...] = (Kitti(), KittiInstances())


@pytest.fixture
def rows(tmp_path: Path) -> list[Labels]:
    return trees.truth(KittiData(), trees.kitti(tmp_path / "tree"), "training")


@pytest.fixture
def both(rows: list[Labels]) -> list[Labels]:
    """The images of training, and predictions of the images of testing, which have the same names."""
    return [
        *rows,
        *(replace(r, sample_id=r.sample_id.replace("training", "testing"), split="testing") for r in rows[::-1]),
    ]


def read(form: Format, item: PlanItem) -> Prediction:
    (found,) = form.read(item)
    return found


def imported(form: Format, folder: Path, rows: list[Labels]) -> list[Prediction]:
    return [read(form, i) for i in trees.planned(form, folder, rows)]


def check(form: Format, again: list[Prediction], rows: list[Labels]) -> None:
    for found, row in zip(again, rows, strict=True):
        if form.task == "semantic":
            assert found.semantic is not None and np.array_equal(found.semantic, np.asarray(row.semantic))
        else:
            wanted = [(i.category_id, i.counts) for i in row.instances or () if not i.iscrowd]
            assert [(i.category_id, i.counts) for i in found.instances or ()] == wanted and wanted


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
class TestEveryFormat:
    def test_it_is_registered(self, form: Format) -> None:
        assert type(format_of(form.name)) is type(form) and form.name in KittiData.formats

    def test_ground_truth_comes_back_as_it_was(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        check(form, imported(form, trees.write(form, rows, tmp_path / "out"), rows), rows)

    def test_the_real_layout_comes_back_as_it_was(self, form: Format, shared_data: SharedData, tmp_path: Path) -> None:
        rows = trees.truth(KittiData(), shared_data("data/layouts/kitti_dataset/kitti_segmentation"))
        check(form, imported(form, trees.write(form, rows, tmp_path / "out"), rows), rows)

    def test_training_and_testing_are_told_apart(self, form: Format, both: list[Labels], tmp_path: Path) -> None:
        check(form, imported(form, trees.write(form, both, tmp_path / "out"), both), both)

    def test_names_that_two_samples_share_are_refused(self, form: Format, both: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(form, both[3:], tmp_path / "out")
        (folder / "testing").rename(folder / "results")
        with pytest.raises(ConfigError, match=r"cannot be told to be of training/.*put the result of .* at training/"):
            trees.planned(form, folder, both)
        check(form, imported(form, folder, both[3:]), both[3:])

    def test_results_for_one_split_leave_the_other_missing(
        self, form: Format, both: list[Labels], tmp_path: Path
    ) -> None:
        folder = trees.write(form, both[3:], tmp_path / "out")
        items = trees.planned(form, folder, both)
        check(form, [read(form, i) for i in items[3:]], both[3:])
        for item in items[:3]:
            with pytest.raises(DataError, match=item.sample_id.rpartition("/")[2]) as caught:
                read(form, item)
            assert caught.value.code == "missing-prediction"

    def test_two_files_of_one_sample_are_refused(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        for name in ("a", "b"):
            trees.write(form, rows[:1], tmp_path / "out" / name)
        with pytest.raises(ConfigError, match="cannot be told"):
            trees.planned(form, tmp_path / "out", rows)

    def test_unknown_images_and_wrong_folders_are_refused(
        self, form: Format, rows: list[Labels], tmp_path: Path
    ) -> None:
        folder = trees.write(form, rows, tmp_path / "out")
        with pytest.raises(ConfigError, match=r"1 predictions for images .*000000_10"):
            trees.planned(form, folder, rows[1:])
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="holds no file that ends in"):
            trees.planned(form, tmp_path / "empty", rows)

    def test_classes_of_another_dataset_are_refused(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="0 is 'Sky'"):
            form.write(iter(rows), CAMVID, Folder(str(tmp_path), 1))

    def test_a_changed_result_is_a_changed_item(self, form: Format, rows: list[Labels], tmp_path: Path) -> None:
        folder = trees.write(form, rows, tmp_path / "out")
        before = trees.planned(form, folder, rows)
        path = min(p for p in folder.rglob("000001_10*.png"))
        path.write_bytes(path.read_bytes() + b" ")
        after = trees.planned(form, folder, rows)
        assert [a.sample_id for a, b in zip(before, after, strict=True) if a.etag != b.etag] == ["training/000001_10"]


def test_label_maps_are_8_bit_and_named_like_the_photos(rows: list[Labels], tmp_path: Path) -> None:
    folder = trees.write(Kitti(), rows, tmp_path / "out") / "training" / "semantic"
    assert sorted(p.name for p in folder.iterdir()) == ["000000_10.png", "000001_10.png", "000002_10.png"]
    with Image.open(folder / "000000_10.png") as image:
        assert image.mode == "L" and np.array_equal(np.array(image), np.asarray(rows[0].semantic))


def test_the_official_tree_is_read_as_results(rows: list[Labels], tmp_path: Path) -> None:
    check(Kitti(), imported(Kitti(), tmp_path / "tree", rows), rows)


def test_flat_results_are_found_by_name(rows: list[Labels], tmp_path: Path) -> None:
    folder = trees.write(Kitti(), rows, tmp_path / "out") / "training" / "semantic"
    check(Kitti(), imported(Kitti(), folder, rows), rows)


@pytest.mark.parametrize(("value", "words"), [(34, "the id 34"), (255, "trainIds")])
def test_wrong_label_ids_are_neither_written_nor_read(
    rows: list[Labels], tmp_path: Path, value: int, words: str
) -> None:
    wrong = np.full(trees.SIZE, value, np.uint8)
    with pytest.raises(DataError, match=words):
        trees.write(Kitti(), [replace(rows[0], semantic=wrong.astype(np.uint16))], tmp_path / "out")
    generators.save(tmp_path / "in" / "000000_10.png", wrong)
    (item,) = trees.planned(Kitti(), tmp_path / "in", rows[:1])
    with pytest.raises(DataError, match=words):
        read(Kitti(), item)


def test_lists_and_masks_are_where_the_devkit_has_them(rows: list[Labels], tmp_path: Path) -> None:
    scored = tuple(replace(i, score=0.976347) for i in rows[0].instances or ())
    folder = trees.write(KittiInstances(), [replace(rows[0], instances=scored)], tmp_path) / "training" / "instance"
    lines = (folder / "pred_list" / "000000_10.txt").read_text().splitlines()
    wanted = [i for i in scored if not i.iscrowd]
    assert lines == [f"../pred_img/000000_10_{n:03d}.png {i.category_id:03d} 0.976347" for n, i in enumerate(wanted)]
    for n, instance in enumerate(wanted):
        with Image.open(folder / "pred_img" / f"000000_10_{n:03d}.png") as image:
            assert image.mode == "L" and np.array_equal(np.array(image) > 0, rle.decode(instance.counts, *trees.SIZE))
