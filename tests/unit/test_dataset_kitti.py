"""KITTI semantics 2015: ids and order, both label maps against an independent reading, and what can be wrong."""

from collections.abc import Callable
from pathlib import Path

import generators
import numpy as np
import pytest
import trees_cityscapes as trees
from PIL import Image
from pycocotools import mask as coco_mask

from segbatch.datasets import registry
from segbatch.datasets.cityscapes import FROM_INSTANCE_IDS
from segbatch.datasets.kitti import Kitti
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

SharedData = Callable[[str], Path]
FIRST = "training/000000_10"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.kitti(tmp_path / "tree")


def items(root: Path, *splits: str) -> dict[str, PlanItem]:
    return {i.sample_id: i for i in Kitti().items(Tree.of(str(root)), splits)}


def sample(root: Path, sample_id: str = FIRST) -> Sample:
    (found,) = Kitti().read(items(root)[sample_id])
    return found


def problem(root: Path, sample_id: str = FIRST) -> DataError:
    with pytest.raises(DataError) as caught:
        sample(root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def check_instances(found: Sample, ids: trees.Map) -> None:
    """One instance per value of a class with instances, with that value's pixels; number 0 is a crowd."""
    wanted = [v for v in np.unique(ids).tolist() if v // 256 in trees.THINGS]
    assert [i.id for i in found.instances or ()] == wanted
    for instance in found.instances or ():
        mask = coco_mask.decode({"size": list(ids.shape), "counts": instance.counts})
        assert np.array_equal(mask, ids == instance.id) and instance.area == mask.sum()
        assert (instance.category_id, instance.iscrowd) == (instance.id // 256, instance.id % 256 == 0)
        assert (
            list(instance.bbox_xywh) == coco_mask.toBbox({"size": list(ids.shape), "counts": instance.counts}).tolist()
        )


def test_ids_order_groups_and_splits(root: Path) -> None:
    found = items(root)
    assert list(found) == [f"training/00000{i}_10" for i in range(3)] + [f"testing/00000{i}_10" for i in range(2)]
    assert [i.split for i in found.values()] == ["training"] * 3 + ["testing"] * 2
    assert found[FIRST].group_id == "training/000000"
    assert list(items(root, "testing")) == ["testing/000000_10", "testing/000001_10"]


def test_labels_are_those_of_the_files(root: Path) -> None:
    for i in range(3):
        found = sample(root, f"training/00000{i}_10")
        wanted = np.array(Image.open(root / "training" / "semantic" / f"00000{i}_10.png"))
        assert np.array_equal(np.asarray(found.semantic), wanted) and not found.issues
        ids = np.array(Image.open(root / "training" / "instance" / f"00000{i}_10.png"))
        check_instances(found, ids)
        assert any(i.iscrowd for i in found.instances or ()) and found.panoptic is None


def test_testing_has_no_labels(root: Path) -> None:
    found = sample(root, "testing/000001_10")
    assert found.image and found.semantic is None and found.instances is None and not found.issues


def test_the_label_map_follows_from_instances_where_there_is_none(root: Path) -> None:
    whole = sample(root)
    (root / "training" / "semantic" / "000000_10.png").unlink()
    found = sample(root)
    assert np.array_equal(np.asarray(found.semantic), np.asarray(whole.semantic)) and found.instances == whole.instances
    assert [i.code for i in found.issues] == [FROM_INSTANCE_IDS] and FIRST in found.issues[0].message


def test_semantic_alone_gives_no_instances(root: Path) -> None:
    (root / "training" / "instance" / "000000_10.png").unlink()
    found = sample(root)
    assert found.semantic is not None and found.instances is None and not found.issues


def test_numbered_stuff_is_no_instance(root: Path) -> None:
    path = root / "training" / "instance" / "000000_10.png"
    ids = np.array(Image.open(path)).astype(np.uint16)
    ids[ids == 11 * 256] += 1
    generators.save(path, ids)
    found = sample(root)
    check_instances(found, ids)
    assert [(i.code, i.annotation_id) for i in found.issues] == [("not-a-thing", 11 * 256 + 1)]


def test_missing_files_end_as_rows_with_a_reason(root: Path) -> None:
    label = root / "training" / "semantic" / "000000_10.png"
    photo = root / "training" / "image_2" / "000001_10.png"
    for path in (label, label.parents[1] / "instance" / label.name, photo):
        path.unlink()
    error = problem(root)
    assert (error.code, error.uri) == ("missing-label", str(label))
    error = problem(root, "training/000001_10")
    assert (error.code, error.uri) == ("missing-image", str(photo))
    assert len(items(root)) == 5


@pytest.mark.parametrize("folder", ["semantic", "instance"])
def test_maps_of_another_size_kind_or_class_are_refused(root: Path, folder: str) -> None:
    path = root / "training" / folder / "000000_10.png"
    wrong = np.zeros(trees.SIZE, np.uint16)
    wrong[3, 5] = 34 if folder == "semantic" else 34 * 256
    for pixels, code in (
        (np.zeros((48, 40), np.uint8), "size-mismatch"),
        (generators.photo(1, trees.SIZE), "label-type"),
        (wrong, "unknown-label"),
    ):
        generators.save(path, pixels)
        error = problem(root)
        assert (error.code, error.uri) == (code, str(path)) and str(path) in error.problem


def test_train_ids_are_refused_with_the_fix(root: Path) -> None:
    generators.save(root / "training" / "semantic" / "000000_10.png", np.full(trees.SIZE, 255, np.uint8))
    assert "trainIds" in problem(root).problem and "labels.py" in problem(root).fix


def test_a_changed_label_is_a_changed_item(root: Path) -> None:
    for folder in ("semantic", "instance"):
        before = items(root)
        path = root / "training" / folder / "000001_10.png"
        path.write_bytes(path.read_bytes() + b" ")
        after = items(root)
        assert [i for i in before if before[i].etag != after[i].etag] == ["training/000001_10"]


def test_detection_and_photos_are_not_taken_for_it(root: Path, tmp_path: Path) -> None:
    generators.save(tmp_path / "detection" / "training" / "image_2" / "000000.png", generators.photo(0))
    (tmp_path / "detection" / "training" / "label_2").mkdir()
    assert not Kitti().recognises(Tree.of(str(tmp_path / "detection"))) and Kitti().recognises(Tree.of(str(root)))
    with pytest.raises(ConfigError, match=r"is not KITTI semantics 2015.*training/image_2"):
        items(tmp_path)


def test_the_real_few_pixel_layout(shared_data: SharedData) -> None:
    root = shared_data("data/layouts/kitti_dataset/kitti_segmentation")
    found = registry.dataset("kitti")
    assert found.recognises(Tree.of(str(root))) and list(items(root)) == ["training/000030_10", "training/000030_11"]
    for sample_id in items(root):
        image = sample(root, sample_id)
        ids = np.array(Image.open(root / "training" / "instance" / f"{sample_id.split('/')[1]}.png"))
        assert np.array_equal(np.asarray(image.semantic), ids // 256)
        check_instances(image, ids)
    assert {i.group_id for i in items(root).values()} == {"training/000030"}


def test_other_real_folders_are_not_taken_for_it(shared_data: SharedData) -> None:
    others = ("data/kitti_lidar", "data/layouts/kitti_dataset/kitti_detection", "data/layouts/kitti_dataset/kitti_raw")
    for name in (*others, "data/camvid", "data/cityscapes_mini"):
        assert not Kitti().recognises(Tree.of(str(shared_data(name))))
