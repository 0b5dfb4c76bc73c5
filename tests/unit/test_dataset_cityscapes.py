"""Cityscapes: ids and order, every kind of label against an independent reading, and every way a tree can be wrong."""

import itertools
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pytest
import trees_cityscapes as trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco_mask

from segbatch.datasets import registry
from segbatch.datasets.camvid import CamVid
from segbatch.datasets.cityscapes import FROM_INSTANCE_IDS, FROM_TRAIN_IDS, Cityscapes
from segbatch.datasets.kitti import Kitti
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

SharedData = Callable[[str], Path]
AACHEN, FRANKFURT = trees.IMAGES["train"][0], trees.IMAGES["val"][0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.cityscapes(tmp_path / "tree")


def items(root: Path, *splits: str) -> dict[str, PlanItem]:
    return {i.sample_id: i for i in Cityscapes().items(Tree.of(str(root)), splits)}


def sample(root: Path, sample_id: str) -> Sample:
    (found,) = Cityscapes().read(items(root)[sample_id])
    return found


def problem(root: Path, sample_id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        sample(root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def file(root: Path, sample_id: str, ending: str) -> Path:
    (found,) = root.glob(f"*/*/*/{sample_id}_{ending}")
    return found


def codes(found: Sample) -> list[str]:
    return [i.code for i in found.issues]


def masks(found: Sample) -> dict[int, Any]:
    size = [found.height, found.width]
    return {i.id: coco_mask.decode({"size": size, "counts": i.counts}) for i in found.instances or ()}


class TestItems:
    def test_order_ids_splits_and_groups(self, root: Path) -> None:
        found = items(root)
        assert list(found) == [i for ids in trees.IMAGES.values() for i in ids]
        assert [found[i].split for i in found] == [s for s, ids in trees.IMAGES.items() for _ in ids]
        assert found[AACHEN].group_id == "aachen_000000"
        assert found["stuttgart_00_000000_000001"].group_id == "stuttgart_00_000000"
        assert list(items(root, "demoVideo", "val")) == [*trees.IMAGES["val"], *trees.IMAGES["demoVideo"]]
        assert Cityscapes().splits(Tree.of(str(root))) == tuple(trees.IMAGES)

    def test_frames_of_a_sequence_are_neighbours_whatever_the_folders(self, root: Path) -> None:
        names = ["a_2_10", "a_10_1", "a_2_9", "a_10_2"]
        for number, name in enumerate(names):
            path = root / "leftImg8bit" / "demoVideo" / f"part{number % 2}" / f"{name}_leftImg8bit.png"
            generators.save(path, generators.photo(number))
        groups = [i.group_id for i in items(root, "demoVideo").values()]
        assert sorted(set(groups)) == ["a_10", "a_2", "stuttgart_00_000000"]
        assert sum(a != b for a, b in itertools.pairwise(groups)) == len(set(groups)) - 1

    def test_other_files_are_no_photos(self, root: Path) -> None:
        for name in ("README", "thumbs.png", f"{AACHEN}_leftImg16bit.png"):
            (root / "leftImg8bit" / "train" / "aachen" / name).write_bytes(b"x")
        assert len(items(root)) == 9

    def test_it_is_told_from_other_datasets(self, tmp_path: Path, root: Path) -> None:
        kitti, camvid = trees.kitti(tmp_path / "kitti"), generators.camvid(tmp_path / "camvid")
        for dataset, there in ((Cityscapes(), root), (Kitti(), kitti), (CamVid(), camvid)):
            assert [dataset.recognises(Tree.of(str(r))) for r in (root, kitti, camvid)] == [
                r is there for r in (root, kitti, camvid)
            ]
        for kind in ("gtFine", "gtCoarse"):
            shutil.rmtree(root / kind)
        assert not Cityscapes().recognises(Tree.of(str(root)))

    def test_a_root_of_another_layout_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"is not Cityscapes.*leftImg8bit/train/CITY"):
            items(generators.camvid(tmp_path))

    def test_archives_as_downloaded_lie_over_each_other(self, root: Path, tmp_path: Path) -> None:
        downloads = tmp_path / "downloads"
        downloads.mkdir()
        for name, folders in (
            ("leftImg8bit_trainvaltest.zip", ("leftImg8bit",)),
            ("gtFine_trainvaltest.zip", ("gtFine",)),
            ("gtCoarse.zip", ("gtCoarse",)),
            ("vehicle_trainvaltest.zip", ("vehicle", "camera")),
        ):
            with zipfile.ZipFile(downloads / name, "w") as out:
                out.writestr("README", "as downloaded")
                for path in (p for folder in folders for p in sorted((root / folder).rglob("*"))):
                    out.write(path, path.relative_to(root))
        dataset, tree = registry.find("cityscapes", str(downloads))
        packed = [s for i in dataset.items(tree, ()) for s in dataset.read(i)]
        plain = [s for i in items(root).values() for s in Cityscapes().read(i)]
        assert dataset.recognises(tree) and len(packed) == 9
        for mine, theirs in zip(plain, packed, strict=True):
            assert (mine.sample_id, mine.instances, mine.segments) == (
                theirs.sample_id,
                theirs.instances,
                theirs.segments,
            )
            assert (mine.attributes, mine.image) == (theirs.attributes, theirs.image)
            assert (mine.semantic is None) == (theirs.semantic is None)
            if mine.semantic is not None and theirs.semantic is not None:
                assert np.array_equal(mine.semantic, theirs.semantic)

    def test_every_file_that_is_read_is_part_of_the_tag(self, root: Path) -> None:
        for ending in ("gtFine_labelIds.png", "gtFine_instanceIds.png", "vehicle.json", "camera.json"):
            before = items(root)
            path = file(root, AACHEN, ending)
            path.write_bytes(path.read_bytes() + b" ")
            assert changed(before, items(root)) == [AACHEN], ending
        document = root / "gtFine" / "cityscapes_panoptic_val.json"
        before = items(root)
        document.write_text(document.read_text().replace('"category_id": 7', '"category_id": 8', 1))
        assert changed(before, items(root)) == [FRANKFURT]
        before = items(root)
        path = document.with_suffix("") / f"{FRANKFURT}_gtFine_panoptic.png"
        path.write_bytes(path.read_bytes() + b" ")
        assert changed(before, items(root)) == [FRANKFURT]


def changed(before: dict[str, PlanItem], after: dict[str, PlanItem]) -> list[str]:
    assert before.keys() == after.keys()
    return [i for i in before if before[i].etag != after[i].etag]


class TestLabels:
    def test_label_maps_are_those_of_the_files(self, root: Path) -> None:
        for sample_id in (*trees.IMAGES["train"], *trees.IMAGES["val"]):
            found = sample(root, sample_id)
            wanted = np.array(Image.open(file(root, sample_id, "gtFine_labelIds.png")))
            assert found.semantic is not None and found.semantic.dtype == np.uint8
            assert np.array_equal(found.semantic, wanted) and not found.issues

    def test_instances_are_the_numbered_objects_and_groups_are_crowds(self, root: Path) -> None:
        found = sample(root, FRANKFURT)
        ids = np.array(Image.open(file(root, FRANKFURT, "gtFine_instanceIds.png")))
        wanted = [v for v in np.unique(ids).tolist() if v >= 1000 or v in trees.THINGS]
        assert [i.id for i in found.instances or ()] == wanted and 26 in wanted and 29000 in wanted
        for instance in found.instances or ():
            mask = ids == instance.id
            assert np.array_equal(masks(found)[instance.id], mask) and instance.area == mask.sum()
            assert instance.category_id == (instance.id if instance.id < 1000 else instance.id // 1000)
            assert instance.iscrowd == (instance.id < 1000) and instance.score is None
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
            assert instance.bbox_xywh == box

    def test_panoptic_labels_are_the_official_files_and_derived_ones_are_equal(self, root: Path) -> None:
        official = sample(root, FRANKFURT)
        rgb, segments = trees.panoptic(trees.scene(10))
        assert_panoptic(official, rgb, segments)
        (root / "gtFine" / "cityscapes_panoptic_val.json").unlink()
        assert_panoptic(sample(root, FRANKFURT), rgb, segments)

    def test_official_panoptic_labels_go_before_derived_ones(self, root: Path) -> None:
        trees.panoptic_files(root, "val", {FRANKFURT: trees.scene(12)})
        assert_panoptic(sample(root, FRANKFURT), *trees.panoptic(trees.scene(12)))
        other = sample(root, trees.IMAGES["val"][1])
        assert codes(other) == ["panoptic-not-listed"]
        assert_panoptic(other, *trees.panoptic(trees.scene(11)))

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        ids=arrays.arrays(
            np.uint16,
            trees.SIZE,
            elements=st.sampled_from([0, 1, 7, 9, 18, 24, 26, 29, 24000, 26000, 26999, 29001, 33007]),
        )
    )
    def test_any_map_gives_the_official_segments(self, tmp_path: Path, ids: trees.Map) -> None:
        root = tmp_path / "any"
        generators.save(
            root / "leftImg8bit" / "val" / "a" / "a_000000_000001_leftImg8bit.png", generators.photo(0, trees.SIZE)
        )
        trees.labelled(root, "gtFine", "val", "a_000000_000001", ids)
        found = sample(root, "a_000000_000001")
        assert_panoptic(found, *trees.panoptic(ids))
        assert np.array_equal(np.asarray(found.semantic), trees.label_ids(ids))

    def test_fine_labels_go_before_coarse_ones(self, root: Path) -> None:
        assert sample(root, AACHEN).attributes["annotation"] == "gtFine"
        for path in (root / "gtFine" / "train").rglob(f"{AACHEN}*"):
            path.unlink()
        coarse = sample(root, AACHEN)
        assert coarse.attributes["annotation"] == "gtCoarse" and not np.asarray(coarse.semantic).any()
        augsburg = sample(root, trees.IMAGES["train_extra"][0])
        assert np.array_equal(np.asarray(augsburg.semantic), trees.label_ids(trees.scene(30)))

    def test_images_of_test_and_videos_may_have_no_labels(self, root: Path) -> None:
        for sample_id in (trees.IMAGES["test"][1], trees.IMAGES["demoVideo"][0]):
            found = sample(root, sample_id)
            assert (found.semantic, found.instances, found.panoptic, found.segments) == (None,) * 4
            assert found.image and not found.issues and "annotation" not in found.attributes
        dummy = sample(root, trees.IMAGES["test"][0])
        assert set(np.unique(np.asarray(dummy.semantic)).tolist()) == {0, 1}
        assert dummy.instances == () and dummy.segments == () and not np.asarray(dummy.panoptic).any()

    def test_attributes(self, root: Path) -> None:
        assert sample(root, AACHEN).attributes == {
            "city": "aachen",
            "seq": "000000",
            "frame": "000019",
            "annotation": "gtFine",
            "vehicle": {"speed": 7.5, "outsideTemperature": 18},
            "camera": {"extrinsic": {"z": 1.2}},
        }
        stamp = root / "timestamp_sequence" / "demoVideo" / "stuttgart_00" / "stuttgart_00_000000_000001_timestamp.txt"
        stamp.parent.mkdir(parents=True)
        stamp.write_text("59000000\n")
        attributes = sample(root, "stuttgart_00_000000_000001").attributes
        assert (attributes["city"], attributes["timestamp"]) == ("stuttgart_00", 59000000)

    def test_without_label_ids_they_follow_from_instance_ids(self, root: Path) -> None:
        whole = sample(root, AACHEN)
        path = file(root, AACHEN, "gtFine_labelIds.png")
        generators.save(
            path.with_name(f"{AACHEN}_gtFine_labelTrainIds.png"), trees.train_ids(np.zeros(trees.SIZE, np.uint8))
        )
        path.unlink()
        found = sample(root, AACHEN)
        assert codes(found) == [FROM_INSTANCE_IDS] and AACHEN in found.issues[0].message
        assert np.array_equal(np.asarray(found.semantic), np.asarray(whole.semantic))
        assert (found.instances, found.segments) == (whole.instances, whole.segments)

    def test_train_ids_alone_are_turned_back(self, root: Path) -> None:
        labels = trees.label_ids(trees.scene(0))
        path = file(root, AACHEN, "gtFine_labelIds.png")
        train_ids = path.with_name(f"{AACHEN}_gtFine_labelTrainIds.png")
        generators.save(train_ids, trees.train_ids(labels))
        path.unlink()
        file(root, AACHEN, "gtFine_instanceIds.png").unlink()
        found = sample(root, AACHEN)
        assert codes(found) == [FROM_TRAIN_IDS] and str(train_ids) in found.issues[0].message
        scored = ~np.isin(labels, list(trees.VOID))
        assert np.array_equal(np.asarray(found.semantic), np.where(scored, labels, 0)) and scored.any()
        assert found.instances is None and found.panoptic is None
        generators.save(train_ids, np.full(trees.SIZE, 19, np.uint8))
        error = problem(root, AACHEN)
        assert error.code == "unknown-label" and "id 19" in error.problem and error.uri == str(train_ids)

    def test_label_ids_alone_give_no_instances(self, root: Path) -> None:
        file(root, AACHEN, "gtFine_instanceIds.png").unlink()
        found = sample(root, AACHEN)
        assert found.semantic is not None and found.instances is None and found.segments is None and not found.issues


def assert_panoptic(found: Sample, rgb: Any, segments: list[dict[str, Any]]) -> None:
    """The index map shows the official segments, in the file's order with the file's figures."""
    assert found.panoptic is not None and found.segments is not None
    ids = rgb.astype(np.int64) @ [1, 256, 65536]
    shown = np.array([0, *(s.id for s in found.segments)])[found.panoptic]
    assert np.array_equal(shown, ids)
    assert [
        {"id": s.id, "category_id": s.category_id, "area": s.area, "bbox": list(s.bbox_xywh), "iscrowd": s.iscrowd}
        for s in found.segments
    ] == segments


class TestTrouble:
    def test_missing_files_end_as_rows_with_a_reason(self, root: Path) -> None:
        label = file(root, AACHEN, "gtFine_labelIds.png")
        photo = file(root, FRANKFURT, "leftImg8bit.png")
        for path in root.glob(f"gt*/train/aachen/{AACHEN}*Ids.png"):
            path.unlink()
        photo.unlink()
        error = problem(root, AACHEN)
        assert (error.code, error.uri) == ("missing-label", str(label))
        error = problem(root, FRANKFURT)
        assert (error.code, error.uri) == ("missing-image", str(photo))
        assert len(items(root)) == 9 and items(root)[FRANKFURT].etag.startswith("missing+")

    def test_colour_maps_and_polygons_alone_are_no_labels(self, root: Path) -> None:
        for kind in ("labelIds", "instanceIds"):
            file(root, FRANKFURT, f"gtFine_{kind}.png").unlink()
        (root / "gtFine" / "cityscapes_panoptic_val.json").unlink()
        assert problem(root, FRANKFURT).code == "missing-label"

    @pytest.mark.parametrize("kind", ["labelIds", "instanceIds"])
    def test_maps_of_another_size_kind_or_class_are_refused(self, root: Path, kind: str) -> None:
        path = file(root, AACHEN, f"gtFine_{kind}.png")
        wrong = np.full(trees.SIZE, 7, np.uint16)
        wrong[3, 5] = 34 if kind == "labelIds" else 34001
        for pixels, code, words in (
            (np.zeros((48, 40), np.uint8), "size-mismatch", "40 x 48"),
            (generators.photo(1, trees.SIZE), "label-type", f"*_{kind}.png"),
            (wrong, "unknown-label", "row 3, column 5"),
        ):
            generators.save(path, pixels)
            error = problem(root, AACHEN)
            assert (error.code, error.uri) == (code, str(path)) and str(path) in error.problem and words in str(error)
        path.write_bytes(b"")
        assert problem(root, AACHEN).code == "empty-label"
        path.write_bytes(b"no image")
        assert problem(root, AACHEN).code == "bad-label"

    def test_train_ids_called_label_ids_are_refused_with_the_fix(self, root: Path) -> None:
        path = file(root, AACHEN, "gtFine_labelIds.png")
        generators.save(path, trees.train_ids(trees.label_ids(trees.scene(0))))
        error = problem(root, AACHEN)
        assert error.code == "unknown-label" and "trainIds" in error.problem and "labels.py" in error.fix

    def test_one_image_id_twice(self, root: Path) -> None:
        photo = file(root, AACHEN, "leftImg8bit.png")
        copies = [photo.parent.with_name("zurich") / photo.name, root / "leftImg8bit" / "val" / "aachen" / photo.name]
        for copy in copies:
            copy.parent.mkdir()
            shutil.copy(photo, copy)
        found = items(root)
        assert len(found) == 11 and len({i.uri for i in found.values()}) == 11
        assert sample(root, AACHEN).image == photo.read_bytes()
        for name in (f"train/zurich/{photo.name}", f"val/aachen/{photo.name}"):
            error = problem(root, name)
            assert (
                error.code == "duplicate-id" and str(photo) in error.problem and found[name].group_id == "aachen_000000"
            )

    def test_labels_of_an_image_that_another_split_has(self, root: Path) -> None:
        trees.labelled(root, "gtFine", "val", AACHEN, trees.scene(0))
        assert problem(root, f"val/aachen/{AACHEN}_leftImg8bit.png").code == "duplicate-id"

    def test_maps_that_disagree_are_told(self, root: Path) -> None:
        path = file(root, AACHEN, "gtFine_labelIds.png")
        labels = np.array(Image.open(path))
        labels[0, 4:7] = 17
        generators.save(path, labels)
        found = sample(root, AACHEN)
        assert codes(found) == ["labels-disagree"] and "at 3 pixels" in found.issues[0].message
        assert np.array_equal(np.asarray(found.semantic), labels)

    def test_numbered_stuff_is_no_instance_but_a_segment(self, root: Path) -> None:
        ids = trees.scene(0)
        ids[ids == 11] = 11003
        trees.labelled(root, "gtFine", "train", AACHEN, ids)
        found = sample(root, AACHEN)
        assert codes(found) == ["not-a-thing"] and found.issues[0].annotation_id == 11003
        assert "building" in found.issues[0].message and 11003 not in {i.id for i in found.instances or ()}
        assert_panoptic(found, *trees.panoptic(ids))

    def test_broken_attributes_are_told(self, root: Path) -> None:
        path = file(root, AACHEN, "vehicle.json")
        path.write_text('{"speed": ')
        found = sample(root, AACHEN)
        assert codes(found) == ["bad-attribute"] and str(path) in found.issues[0].message
        assert "vehicle" not in found.attributes and "camera" in found.attributes

    @pytest.mark.parametrize(
        ("change", "code", "words"),
        [
            (lambda a: a["segments_info"].pop(0), "unknown-segment", "shows the segment 7"),
            (lambda a: a["segments_info"].append(a["segments_info"][0]), "duplicate-segment", "segment 7 "),
            (lambda a: a["segments_info"][0].pop("id"), "bad-annotation", FRANKFURT),
            (lambda a: a["segments_info"][0].pop("area"), "bad-annotation", "segment 7 "),
        ],
    )
    def test_panoptic_annotations_that_do_not_fit(
        self, root: Path, change: Callable[[Any], None], code: str, words: str
    ) -> None:
        edit_panoptic(root, lambda d: change(d["annotations"][0]))
        error = problem(root, FRANKFURT)
        assert error.code == code and words in error.problem and "cityscapes_panoptic_val" in error.problem

    def test_panoptic_annotations_twice_elsewhere_or_unreadable(self, root: Path) -> None:
        document = root / "gtFine" / "cityscapes_panoptic_val.json"
        edit_panoptic(root, lambda d: d["annotations"].append(d["annotations"][0]))
        assert problem(root, FRANKFURT).code == "bad-annotation"
        edit_panoptic(
            root, lambda d: d["annotations"].__setitem__(0, {**d["annotations"][0], "image_id": "nowhere_0_1"})
        )
        assert problem(root, "nowhere_0_1").code == "missing-image"
        document.write_text(document.read_text()[:-40])
        with pytest.raises(ConfigError, match="cut short"):
            items(root)

    def test_panoptic_maps_missing_or_of_another_kind(self, root: Path) -> None:
        path = root / "gtFine" / "cityscapes_panoptic_val" / f"{FRANKFURT}_gtFine_panoptic.png"
        for pixels, code in ((np.zeros(trees.SIZE, np.uint8), "label-type"), (generators.photo(0), "size-mismatch")):
            generators.save(path, pixels)
            assert (problem(root, FRANKFURT).code, problem(root, FRANKFURT).uri) == (code, str(path))
        path.unlink()
        assert (problem(root, FRANKFURT).code, problem(root, FRANKFURT).uri) == ("missing-label", str(path))

    def test_a_segment_of_an_unknown_category_becomes_void(self, root: Path) -> None:
        edit_panoptic(root, lambda d: d["annotations"][0]["segments_info"][0].update(category_id=99))
        found = sample(root, FRANKFURT)
        rgb, segments = trees.panoptic(trees.scene(10))
        rgb[rgb.astype(np.int64) @ [1, 256, 65536] == 7] = 0
        assert codes(found) == ["unknown-category"] and found.issues[0].annotation_id == 7
        assert_panoptic(found, rgb, segments[1:])

    def test_a_segment_without_pixels_is_told(self, root: Path) -> None:
        extra = {"id": 28000, "category_id": 28, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0}
        edit_panoptic(root, lambda d: d["annotations"][0]["segments_info"].append(extra))
        assert codes(sample(root, FRANKFURT)) == ["empty-segment"]


def edit_panoptic(root: Path, change: Callable[[Any], None]) -> None:
    path = root / "gtFine" / "cityscapes_panoptic_val.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


class TestRealData:
    def test_the_frankfurt_frame(self, shared_data: SharedData) -> None:
        root = shared_data("data/cityscapes_mini")
        found = sample(root, "frankfurt_000000_000294")
        folder = root / "gtFine" / "val" / "frankfurt"
        ids, labels = (
            np.array(Image.open(folder / f"frankfurt_000000_000294_gtFine_{kind}.png"))
            for kind in ("instanceIds", "labelIds")
        )
        assert np.array_equal(np.asarray(found.semantic), labels) and not found.issues
        assert {i: int(m.sum()) for i, m in masks(found).items()} == {
            int(v): int((ids == v).sum()) for v in np.unique(ids) if v >= 1000
        }
        assert [i.id for i in found.instances or ()] == [24000, 24001, 24002, 24003, 26000, 26001, 26002]
        assert_panoptic(found, *trees.panoptic(ids))

    def test_its_train_ids_alone(self, shared_data: SharedData, tmp_path: Path) -> None:
        real = shared_data("data/cityscapes_mini")
        for path in (*real.rglob("*_leftImg8bit.png"), *real.rglob("*_labelTrainIds.png")):
            (tmp_path / path.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(real))
        found = np.asarray(sample(tmp_path, "frankfurt_000000_000294").semantic)
        train_ids = np.array(Image.open(next(tmp_path.rglob("*_labelTrainIds.png"))))
        wanted = {n: trees.TRAIN_IDS[n] if n < 19 else 0 for n in np.unique(train_ids).tolist()}
        assert len(wanted) == 11 and all(np.all(found[train_ids == n] == i) for n, i in wanted.items())

    @pytest.mark.parametrize(("name", "numbered"), [("dataset", False), ("train_dataset", True)])
    def test_few_pixel_trees_without_label_ids(self, shared_data: SharedData, name: str, numbered: bool) -> None:
        root = shared_data(f"data/layouts/cityscapes_dataset/{name}")
        assert registry.dataset("cityscapes").recognises(Tree.of(str(root)))
        found = items(root)
        assert {i.split for i in found.values()} == {"train", "val", "test"} and len(found) == 4
        for sample_id in found:
            image = sample(root, sample_id)
            ids = np.array(Image.open(file(root, sample_id, "gtFine_instanceIds.png")))
            assert np.array_equal(np.asarray(image.semantic), trees.label_ids(ids))
            assert FROM_INSTANCE_IDS in codes(image)
            things = [v for v in np.unique(ids).tolist() if (v if v < 1000 else v // 1000) in trees.THINGS]
            assert [i.id for i in image.instances or ()] == things
            assert all(i.iscrowd != numbered for i in image.instances or ())

    def test_frames_without_labels_are_not_taken_for_it(self, shared_data: SharedData) -> None:
        for name in ("cityscapes_frames", "kitti_lidar", "camvid"):
            assert not Cityscapes().recognises(Tree.of(str(shared_data(f"data/{name}"))))
