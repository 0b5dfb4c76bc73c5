"""COCO instances, panoptic, stuff: ids and order, labels against pycocotools and NumPy, and all that can be wrong."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pytest
import trees_coco as trees
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from segbatch.codecs import rle
from segbatch.datasets import coco_form, registry, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.coco import CocoInstances, CocoPanoptic
from segbatch.datasets.coco_stuff import CocoStuff
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample
from segbatch.stages.ingest import bad_row, row_of, samples_batch

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

SharedData = Callable[[str], Path]
Edit = Callable[[dict[str, Any]], Any]
SEGMENT = {"id": 2, "category_id": 1, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0}
TRAIN, VAL = trees.IMAGES["train2017"], trees.IMAGES["val2017"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.coco_instances(tmp_path / "tree")


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    return trees.coco_panoptic(tmp_path / "tree")


@pytest.fixture
def stuff(tmp_path: Path) -> Path:
    return trees.coco_stuff(tmp_path / "tree")


def items(root: Path, *splits: str, dataset: Dataset | None = None) -> dict[str, PlanItem]:
    return {i.sample_id: i for i in (dataset or CocoInstances()).items(Tree.of(str(root)), splits)}


def sample(root: Path, sample_id: str, dataset: Dataset | None = None) -> Sample:
    dataset = dataset or CocoInstances()
    (found,) = dataset.read(items(root, dataset=dataset)[sample_id])
    row_of(items(root, dataset=dataset)[sample_id], found)
    return found


def problem(root: Path, sample_id: str, dataset: Dataset | None = None) -> DataError:
    """The error of an item; its row can be written."""
    dataset = dataset or CocoInstances()
    item = items(root, dataset=dataset)[sample_id]
    with pytest.raises(DataError) as caught:
        list(dataset.read(item))
    assert caught.value.fix and "\n" not in str(caught.value)
    assert samples_batch([bad_row(item, caught.value)]).column("status").to_pylist() == [caught.value.code]
    return caught.value


def codes(found: Sample) -> list[str]:
    return [i.code for i in found.issues]


def edited(path: Path, edit: Edit) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def train(root: Path, kind: str = "instances") -> Path:
    return root / "annotations" / f"{kind}_train2017.json"


def with_objects(root: Path, *objects: dict[str, Any]) -> Sample:
    """Image 9 of train with these annotations alone."""

    def replaced(content: dict[str, Any]) -> None:
        others = [a for a in content["annotations"] if a["image_id"] != 9]
        content["annotations"] = [*others, *objects]

    edited(train(root), replaced)
    return sample(root, "9")


def square(number: Any, category: int = 1, segmentation: Any = None) -> dict[str, Any]:
    polygon = [[2, 2, 8, 2, 8, 8, 2, 8]] if segmentation is None else segmentation
    return (
        trees.annotation(number, 9, category, polygon)
        if segmentation is None
        else {
            "id": number,
            "image_id": 9,
            "category_id": category,
            "segmentation": polygon,
            "bbox": [1, 2, 3, 4],
        }
    )


def reference(api: COCO, entry: dict[str, Any]) -> bytes:
    """What pycocotools makes of an annotation."""
    counts = api.annToRLE(entry)["counts"]
    return counts if isinstance(counts, bytes) else str(counts).encode()


class TestInstances:
    def test_order_ids_and_splits_are_the_files(self, root: Path) -> None:
        dataset, tree = CocoInstances(), Tree.of(str(root))
        assert dataset.splits(tree) == ("train2017", "val2017")
        assert list(items(root)) == [str(i) for i in (*TRAIN, *VAL)]
        assert list(items(root, "val2017")) == [str(i) for i in VAL]
        assert {i.split for i in items(root, "val2017").values()} == {"val2017"}

    def test_every_field_and_mask_is_that_of_pycocotools(self, root: Path) -> None:
        for split, image_ids in trees.IMAGES.items():
            api = COCO(str(root / "annotations" / f"instances_{split}.json"))
            for image_id in image_ids:
                found = sample(root, str(image_id))
                expected = api.loadAnns(api.getAnnIds(image_id))
                assert len(found.instances or ()) == len(expected) == (0 if image_id == image_ids[-1] else 4)
                for mine, theirs in zip(found.instances or (), expected, strict=True):
                    assert (mine.id, mine.category_id, mine.area) == (
                        theirs["id"],
                        theirs["category_id"],
                        theirs["area"],
                    )
                    assert (mine.bbox_xywh, mine.iscrowd) == (tuple(theirs["bbox"]), bool(theirs["iscrowd"]))
                    assert mine.counts == reference(api, theirs)
                    assert np.array_equal(rle.decode(mine.counts, *trees.SIZE), api.annToMask(theirs))
                assert found.issues == () and found.semantic is None and found.panoptic is None

    def test_attributes_are_what_the_file_knows_of_the_image(self, root: Path) -> None:
        assert sample(root, "9").attributes == {
            "file_name": "000000000009.jpg",
            "license": trees.LICENSES[0],
            "coco_url": "http://images.cocodataset.org/train2017/000000000009.jpg",
            "flickr_url": "http://farm1.staticflickr.com/1/9_z.jpg",
            "date_captured": "2013-11-14 17:02:52",
            "info": trees.INFO,
        }

    def test_classes_are_the_files_with_official_colours(self, root: Path) -> None:
        classes = CocoInstances().classes(Tree.of(str(root))).classes
        official = {c.label_id: c for c in tables.load("coco-instances").classes}
        assert classes == tuple(official[i] for i in (1, 3, 90))

    def test_other_datasets_keep_their_own_names(self, root: Path) -> None:
        own = [{"id": 1, "name": "shelf", "supercategory": "shop"}, {"id": 300, "name": "price tag"}]
        for split in trees.IMAGES:
            path = root / "annotations" / f"instances_{split}.json"
            edited(path, lambda d: d.update(categories=own, annotations=[]))
        shelf, tag = CocoInstances().classes(Tree.of(str(root))).classes
        assert (shelf.label_id, shelf.name, shelf.supercategory, shelf.color, shelf.isthing) == (
            1,
            "shelf",
            "shop",
            None,
            True,
        )
        assert (tag.label_id, tag.name, tag.supercategory) == (300, "price tag", "")

    def test_files_without_categories_have_the_official_ones(self, root: Path) -> None:
        for split in trees.IMAGES:
            edited(root / "annotations" / f"instances_{split}.json", lambda d: d.pop("categories"))
        assert CocoInstances().classes(Tree.of(str(root))) == tables.load("coco-instances")
        assert len(sample(root, "9").instances or ()) == 4

    def test_files_whose_categories_disagree_are_refused(self, root: Path) -> None:
        edited(train(root), lambda d: d["categories"][0].update(name="someone"))
        with pytest.raises(ConfigError, match=r"category 1 is 'someone' in .*train2017.json and 'person' in"):
            CocoInstances().classes(Tree.of(str(root)))
        edited(train(root), lambda d: d["categories"].append({"id": 3, "name": "lorry"}))
        with pytest.raises(ConfigError, match=r"train2017.json lists the category 3 twice"):
            CocoInstances().classes(Tree.of(str(root)))

    def test_a_changed_annotation_changes_the_tag_of_its_image_alone(self, root: Path) -> None:
        before = items(root)
        edited(train(root), lambda d: d["annotations"][0].update(area=1.5))
        owner = str(json.loads(train(root).read_text())["annotations"][0]["image_id"])
        changed = {k for k, i in items(root).items() if i.etag != before[k].etag}
        assert changed == {owner}

    def test_what_the_file_says_of_an_image_is_part_of_its_tag(self, root: Path) -> None:
        before = items(root)
        edited(train(root), lambda d: d["images"][1].update(height=25))
        assert {k for k, i in items(root).items() if i.etag != before[k].etag} == {"25"}

    def test_the_downloaded_archives_in_one_folder_read_like_the_unpacked_ones(
        self, root: Path, tmp_path: Path
    ) -> None:
        packed = tmp_path / "packed"
        packed.mkdir()
        parts = {"train2017.zip": "train2017", "val2017.zip": "val2017", "annotations_trainval2017.zip": "annotations"}
        for name, folder in parts.items():
            with zipfile.ZipFile(packed / name, "w") as archive:
                for path in sorted((root / folder).rglob("*")):
                    archive.write(path, path.relative_to(root))
        found, tree = registry.find("auto", str(packed))
        assert found is registry.dataset("coco-instances") and tree.source == str(packed)
        for sample_id in items(root):
            assert sample(packed, sample_id).instances == sample(root, sample_id).instances
            assert sample(packed, sample_id).image == sample(root, sample_id).image

    def test_results_and_other_annotations_are_no_splits(self, root: Path) -> None:
        shutil.copy(train(root), root / "annotations" / "instances_val2017_fakesegm100_results.json")
        shutil.copy(train(root), root / "annotations" / "person_keypoints_train2017.json")
        assert CocoInstances().splits(Tree.of(str(root))) == ("train2017", "val2017")


class TestWherePhotosLie:
    def moved(self, root: Path, target: str) -> None:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / "train2017", root / target)

    @pytest.mark.parametrize("folder", ["images/train2017", "images", "photos/2017", "train"])
    def test_in_other_folders(self, root: Path, folder: str) -> None:
        self.moved(root, folder)
        assert sample(root, "9").image == (root / folder / trees.file_name(9)).read_bytes()

    def test_file_names_with_folders(self, root: Path) -> None:
        edited(train(root), lambda d: [i.update(file_name=f"train2017/{i['file_name']}") for i in d["images"]])
        assert items(root)["9"].uri == str(root / "train2017" / trees.file_name(9))
        self.moved(root, "deep/down/train2017")
        assert items(root)["9"].uri == str(root / "deep/down/train2017" / trees.file_name(9))

    def test_a_split_finds_the_folder_that_its_name_contains(self, root: Path) -> None:
        train(root).rename(root / "annotations" / "instances_minitrain2017_v2.json")
        assert items(root, "minitrain2017_v2")["9"].uri == str(root / "train2017" / trees.file_name(9))

    def test_the_annotation_file_may_lie_in_the_root(self, root: Path) -> None:
        shutil.move(train(root), root / "instances_train2017.json")
        assert len(sample(root, "9").instances or ()) == 4

    def test_a_name_that_several_files_have_is_not_guessed(self, root: Path) -> None:
        self.moved(root, "photos/a")
        shutil.copytree(root / "photos" / "a", root / "photos" / "b")
        (root / "photos" / "b" / trees.file_name(25)).unlink()
        assert problem(root, "9").code == "missing-image"
        assert sample(root, "25").image

    def test_without_any_photo_labels_are_read_alone(self, root: Path) -> None:
        whole = sample(root, "9")
        shutil.rmtree(root / "train2017")
        found = sample(root, "9")
        assert (found.image, found.image_format, found.channels) == (None, None, None)
        assert (found.height, found.width) == trees.SIZE
        assert found.instances == whole.instances and found.attributes == whole.attributes
        assert codes(found) == ["labels-only"]
        assert sample(root, "139").image
        assert len({i.uri for i in items(root).values()}) == 5

    def test_without_photo_and_size_there_is_nothing_to_go_by(self, root: Path) -> None:
        shutil.rmtree(root / "train2017")
        edited(train(root), lambda d: d["images"][0].pop("height"))
        error = problem(root, "9")
        assert error.code == "missing-size" and "instances_train2017.json" in error.problem

    def test_a_single_missing_photo_is_an_error(self, root: Path) -> None:
        (root / "train2017" / trees.file_name(25)).unlink()
        error = problem(root, "25")
        assert error.code == "missing-image" and trees.file_name(25) in error.problem
        assert codes(sample(root, "9")) == []

    def test_a_photo_that_comes_later_changes_the_tag(self, root: Path) -> None:
        path = root / "train2017" / trees.file_name(25)
        content = path.read_bytes()
        path.unlink()
        before = items(root)["25"]
        path.write_bytes(content)
        after = items(root)["25"]
        assert before.etag != after.etag and before.uri == after.uri


class TestImagesOfWhichNothingCanBeRead:
    def test_annotations_of_an_image_that_is_not_listed(self, root: Path) -> None:
        edited(train(root), lambda d: d["annotations"].append({**square(5), "image_id": 77}))
        error = problem(root, "instances_train2017#77")
        assert error.code == "unlisted-image" and "77" in error.problem

    def test_photos_that_are_not_listed(self, root: Path) -> None:
        generators.save(root / "train2017" / "extra.jpg", generators.photo(1))
        generators.save(root / "train2017" / "label_map_of_others.png", generators.photo(1))
        assert problem(root, "instances_train2017#train2017/extra.jpg").code == "missing-label"
        assert len(items(root)) == 6

    def test_an_image_id_that_is_listed_twice(self, root: Path) -> None:
        edited(train(root), lambda d: d["images"].append({**d["images"][1], "id": 9}))
        error = problem(root, "instances_train2017#images[3]")
        assert error.code == "duplicate-id" and "id 9" in error.problem
        assert len(sample(root, "9").instances or ()) == 4

    def test_a_number_and_its_text_are_one_sample_id(self, root: Path) -> None:
        edited(train(root), lambda d: d["images"].append({**d["images"][0], "id": "9", "file_name": "x.jpg"}))
        assert problem(root, "instances_train2017#images[3]").code == "duplicate-id"

    def test_a_photo_that_is_listed_twice(self, root: Path) -> None:
        edited(train(root), lambda d: d["images"].append({**d["images"][0], "id": 10}))
        error = problem(root, "instances_train2017#images[3]")
        assert error.code == "duplicate-photo" and trees.file_name(9) in error.problem

    @pytest.mark.parametrize(
        "name", ["../../secret.jpg", "/etc/secret.jpg", "a\\..\\secret.jpg", "http://h/secret.jpg", ""]
    )
    def test_file_names_that_lead_out_of_the_dataset(self, root: Path, name: str) -> None:
        generators.save(root.parent.parent / "secret.jpg", generators.photo(1))
        edited(train(root), lambda d: d["images"][0].update(file_name=name))
        assert problem(root, "instances_train2017#images[0]").code == "bad-path"

    def test_an_empty_id(self, root: Path) -> None:
        edited(train(root), lambda d: d["images"][0].update(id=""))
        assert problem(root, "instances_train2017#images[0]").code == "bad-annotation"

    def test_an_id_that_two_splits_have_is_refused_before_work(self, root: Path) -> None:
        edited(root / "annotations" / "instances_val2017.json", lambda d: d["images"][0].update(id=9))
        with pytest.raises(ConfigError, match=r"train2017.json and .*val2017.json both have an image 9"):
            items(root)
        assert next(iter(items(root, "val2017"))) == "9"


class TestAnnotations:
    @pytest.mark.parametrize("number", [0, -3, "a7", 2**63])
    def test_ids_that_are_no_numbers_above_0_become_free_ones(self, root: Path, number: Any) -> None:
        found = with_objects(root, square(12), square(number), square(3))
        assert [i.id for i in found.instances or ()] == [12, 13, 3]
        (issue,) = found.issues
        assert issue.code == "id-renumbered" and repr(number) in issue.message and "13" in issue.message
        assert issue.annotation_id == (number if number in (0, -3) else None)

    def test_an_id_that_an_image_has_twice_becomes_a_free_one(self, root: Path) -> None:
        found = with_objects(root, square(12), square(12, 3))
        assert [(i.id, i.category_id) for i in found.instances or ()] == [(12, 1), (13, 3)]
        assert [(i.code, i.annotation_id) for i in found.issues] == [("duplicate-id", 12)]

    def test_unknown_categories_are_left_out_and_said(self, root: Path) -> None:
        found = with_objects(root, square(1), square(2, 77), square(3))
        assert [i.id for i in found.instances or ()] == [1, 3]
        (issue,) = found.issues
        assert issue.code == "unknown-category" and "77" in issue.message and issue.annotation_id == 2

    @pytest.mark.parametrize(
        ("segmentation", "expected"),
        [
            ([], ["empty-mask"]),
            ([[1, 1, 5, 5]], ["empty-polygon"]),
            ([[1, 1, 5, 5, 3]], ["empty-polygon"]),
            ([[1, 1, 9, 9, 1, 1]], ["zero-area"]),
            ([[40, 30, 50, 30, 50, 50]], ["outside-image"]),
            ({"size": list(trees.SIZE), "counts": [24 * 32]}, ["empty-mask"]),
        ],
    )
    def test_objects_without_pixels_stay_and_are_said(self, root: Path, segmentation: Any, expected: list[str]) -> None:
        found = with_objects(root, square(5, 1, segmentation))
        (instance,) = found.instances or ()
        assert instance.id == 5 and instance.bbox_xywh == (1, 2, 3, 4)
        assert instance.area == rle.area(instance.counts) and (codes(found) == expected)
        assert all("instances_train2017.json" in i.message and i.annotation_id == 5 for i in found.issues)
        if expected != ["zero-area"]:
            assert instance.area == 0

    def test_polygons_outside_are_cut_off_as_pycocotools_does(self, root: Path) -> None:
        shape = [[-6, -4.5, 14, 3, 40, 30.5, 2, 12]]
        found = with_objects(root, square(5, 1, shape))
        (instance,) = found.instances or ()
        assert np.array_equal(rle.decode(instance.counts, *trees.SIZE), trees.drawn(shape))
        assert codes(found) == ["outside-image"]

    @pytest.mark.parametrize(
        ("change", "code", "words"),
        [
            ({"segmentation": {"size": [32, 24], "counts": [768]}}, "size-mismatch", "24 x 32.*32 x 24"),
            ({"segmentation": {"size": [24, 32], "counts": [700]}}, "bad-annotation", "annotation 5 .*700"),
            ({"segmentation": {"size": [24, 32], "counts": "zz~"}}, "bad-annotation", "annotation 5"),
            ({"segmentation": None}, "bad-annotation", "annotation 5"),
            ({"bbox": [1, 2, 3]}, "bad-annotation", "annotation 5"),
            ({"category_id": "person"}, "bad-annotation", "annotation 5"),
        ],
    )
    def test_what_cannot_be_understood_is_an_error(
        self, root: Path, change: dict[str, Any], code: str, words: str
    ) -> None:
        edited(train(root), lambda d: d.update(annotations=[{**square(5), **change}]))
        error = problem(root, "9")
        assert error.code == code and "instances_train2017.json" in error.problem
        assert re.search(words, error.problem)

    def test_the_size_in_the_file_must_be_the_photos(self, root: Path) -> None:
        edited(train(root), lambda d: d["images"][0].update(height=25))
        error = problem(root, "9")
        assert error.code == "size-mismatch" and "32 x 24" in error.problem and "32 x 25" in error.problem

    def test_annotations_of_a_turned_photo_are_named_as_such(self, root: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = root / "train2017" / trees.file_name(9)
        Image.fromarray(generators.photo(9, trees.SIZE)).save(path, exif=exif)
        edited(train(root), lambda d: d["images"][0].update(height=32, width=24))
        error = problem(root, "9")
        assert error.code == "size-mismatch" and "EXIF" in error.fix

    def test_a_broken_file_is_refused_before_work(self, root: Path) -> None:
        train(root).write_bytes(train(root).read_bytes()[:-100])
        with pytest.raises(ConfigError, match=r"instances_train2017.json is cut short"):
            items(root)
        with pytest.raises(ConfigError, match=r"instances_train2017.json is no COCO annotation file"):
            CocoInstances().classes(Tree.of(str(root)))

    @given(st.lists(st.one_of(st.integers(-3, 9), st.sampled_from(["", "x", 2**62, 2**63 - 1, 2**70])), max_size=12))
    @pytest.mark.long
    def test_ids_are_unique_and_above_0_and_kept_where_they_can_be(self, given_ids: list[int | str]) -> None:
        ids, issues = coco_form.unique_ids(given_ids, "a.json")
        assert len(set(ids)) == len(ids) == len(given_ids) and all(0 < i < 2**63 for i in ids)
        kept = [i for place, i in enumerate(given_ids) if ids[place] == i]
        good = {i for i in given_ids if isinstance(i, int) and 0 < i < 2**63}
        assert good - set(kept) <= set(ids) and len(issues) == len(ids) - len(kept)


class TestPanoptic:
    dataset = CocoPanoptic()

    def read(self, root: Path, sample_id: str) -> Sample:
        return sample(root, sample_id, self.dataset)

    def json(self, root: Path) -> Path:
        return train(root, "panoptic")

    def png(self, root: Path, image_id: int) -> Path:
        return root / "annotations" / "panoptic_train2017" / trees.file_name(image_id, ".png")

    def test_maps_and_segments_are_the_files(self, panoptic: Path) -> None:
        assert list(items(panoptic, dataset=self.dataset)) == [str(i) for i in (*TRAIN, *VAL)]
        for image_id in TRAIN:
            found = self.read(panoptic, str(image_id))
            ids, meaning = trees.segment_map(image_id)
            assert found.panoptic is not None and found.segments is not None
            numbers = np.array([0, *(s.id for s in found.segments)])
            assert np.array_equal(numbers[found.panoptic], ids) and (ids == 0).any()
            for mine, theirs in zip(found.segments, trees.segments_info(ids, meaning), strict=True):
                assert (mine.id, mine.category_id, mine.area) == (theirs["id"], theirs["category_id"], theirs["area"])
                assert mine.bbox_xywh == tuple(theirs["bbox"]) and mine.iscrowd == bool(theirs["iscrowd"])
            assert found.instances is None and found.semantic is None and found.issues == ()
            assert found.attributes["license"] == trees.LICENSES[0]

    def test_classes_are_the_files(self, panoptic: Path) -> None:
        classes = self.dataset.classes(Tree.of(str(panoptic))).classes
        official = {c.label_id: c for c in tables.load("coco-panoptic").classes}
        assert classes[0] == official[1] and [c.isthing for c in classes] == [True, True, False, False]
        assert [c.label_id for c in classes] == [1, 3, 187, 191]

    def test_maps_may_stay_packed_beside_the_file(self, panoptic: Path) -> None:
        whole = self.read(panoptic, "9")
        folder = panoptic / "annotations" / "panoptic_train2017"
        shutil.make_archive(str(folder), "zip", panoptic / "annotations", folder.name)
        shutil.rmtree(folder)
        packed = self.read(panoptic, "9")
        assert np.array_equal(np.asarray(packed.panoptic), np.asarray(whole.panoptic))
        assert packed.segments == whole.segments

    def test_an_archive_in_an_archive_is_refused_with_what_to_do(self, panoptic: Path, tmp_path: Path) -> None:
        for split in trees.IMAGES:
            folder = panoptic / "annotations" / f"panoptic_{split}"
            shutil.make_archive(str(folder), "zip", panoptic / "annotations", folder.name)
            shutil.rmtree(folder)
        (tmp_path / "download").mkdir()
        shutil.make_archive(
            str(tmp_path / "download" / "panoptic_annotations_trainval2017"), "zip", panoptic, "annotations"
        )
        assert self.dataset.recognises(Tree.of(str(tmp_path / "download")))
        with pytest.raises(ConfigError, match=r"panoptic_train2017.zip is an archive in an archive \(unpack the outer"):
            items(tmp_path / "download", dataset=self.dataset)

    def test_files_without_maps_are_no_splits(self, panoptic: Path) -> None:
        trees.write_json(panoptic / "annotations" / "panoptic_coco_categories.json", trees.PANOPTIC)
        trees.write_json(panoptic / "annotations" / "panoptic_val2014.json", trees.document([], [], []))
        assert self.dataset.splits(Tree.of(str(panoptic))) == ("train2017", "val2017")

    def test_a_changed_map_changes_the_tag_of_its_image_alone(self, panoptic: Path) -> None:
        before = items(panoptic, dataset=self.dataset)
        self.png(panoptic, 25).write_bytes(self.png(panoptic, 25).read_bytes() + b"\0")
        after = items(panoptic, dataset=self.dataset)
        assert {k for k in after if after[k].etag != before[k].etag} == {"25"}

    def test_without_any_photo_labels_are_read_alone(self, panoptic: Path) -> None:
        shutil.rmtree(panoptic / "train2017")
        found = self.read(panoptic, "9")
        assert found.image is None and found.panoptic is not None and codes(found) == ["labels-only"]

    def test_missing_parts_are_rows_with_a_reason(self, panoptic: Path) -> None:
        self.png(panoptic, 9).unlink()
        edited(self.json(panoptic), lambda d: d["annotations"].pop(1))
        error = problem(panoptic, "9", self.dataset)
        assert error.code == "missing-label" and trees.file_name(9, ".png") in error.problem
        error = problem(panoptic, "25", self.dataset)
        assert error.code == "missing-label" and "no annotation of the image 25" in error.problem
        name = f"panoptic_train2017#{trees.file_name(25, '.png')}"
        assert problem(panoptic, name, self.dataset).code == "unlisted-label"

    @pytest.mark.parametrize(
        ("edit", "code", "words"),
        [
            (lambda d: d["annotations"].append(d["annotations"][0]), "bad-annotation", "2 annotations of the image 9"),
            (lambda d: d["annotations"][0].update(file_name="../../x.png"), "bad-annotation", "../../x.png"),
            (lambda d: d["annotations"][0].pop("file_name"), "bad-annotation", "file_name"),
            (lambda d: d["annotations"][0].update(segments_info=None), "bad-annotation", "segments_info"),
            (lambda d: d["annotations"][0]["segments_info"].pop(), "unknown-segment", "70000"),
            (lambda d: d["annotations"][0]["segments_info"].append(SEGMENT), "duplicate-segment", "segment 2 "),
        ],
    )
    def test_wrong_annotations_are_named(self, panoptic: Path, edit: Edit, code: str, words: str) -> None:
        edited(self.json(panoptic), edit)
        error = problem(panoptic, "9", self.dataset)
        assert error.code == code and words in error.problem

    @pytest.mark.parametrize(
        ("pixels", "code"),
        [
            (np.zeros(trees.SIZE, np.uint8), "bad-label"),
            (np.zeros((24, 31, 3), np.uint8), "size-mismatch"),
        ],
    )
    def test_wrong_maps_are_named(self, panoptic: Path, pixels: np.ndarray[Any, Any], code: str) -> None:
        generators.save(self.png(panoptic, 9), pixels)
        error = problem(panoptic, "9", self.dataset)
        assert error.code == code and str(self.png(panoptic, 9)) in error.problem

    def test_unknown_categories_and_void_segments_are_left_out_and_said(self, panoptic: Path) -> None:
        def edit(content: dict[str, Any]) -> None:
            info = content["annotations"][0]["segments_info"]
            info[3]["category_id"] = 77
            info.append({**SEGMENT, "id": 0})

        ids, _ = trees.segment_map(9)
        edited(self.json(panoptic), edit)
        found = self.read(panoptic, "9")
        assert codes(found) == ["unknown-category", "void-segment"]
        assert [i.annotation_id for i in found.issues] == [2, 0]
        assert found.panoptic is not None and (found.panoptic[ids == 2] == 0).all()
        assert 2 not in [s.id for s in found.segments or ()]

    def test_segments_without_pixels_stay_and_are_said(self, panoptic: Path) -> None:
        edited(self.json(panoptic), lambda d: d["annotations"][0]["segments_info"].append({**SEGMENT, "id": 12345}))
        found = self.read(panoptic, "9")
        assert codes(found) == ["empty-segment"] and found.segments is not None and found.segments[-1].id == 12345

    def test_areas_and_boxes_that_the_file_lacks_are_those_of_the_pixels(self, panoptic: Path) -> None:
        def stripped(content: dict[str, Any]) -> None:
            for segment in content["annotations"][0]["segments_info"]:
                del segment["area"], segment["bbox"]

        whole = self.read(panoptic, "9")
        edited(self.json(panoptic), stripped)
        assert self.read(panoptic, "9").segments == whole.segments

    def test_a_root_without_maps_is_refused(self, root: Path) -> None:
        with pytest.raises(ConfigError, match="is not COCO panoptic"):
            items(root, dataset=self.dataset)


class TestStuff:
    dataset = CocoStuff()

    def read(self, root: Path, image_id: int) -> Sample:
        return sample(root, str(image_id), self.dataset)

    def map(self, root: Path, image_id: int) -> Path:
        return root / "annotations" / "train2017" / trees.file_name(image_id, ".png")

    def check(self, root: Path) -> None:
        assert list(items(root, dataset=self.dataset)) == [str(i) for i in (*TRAIN, *VAL)]
        for image_id in (*TRAIN, *VAL):
            found = self.read(root, image_id)
            assert np.array_equal(np.asarray(found.semantic), trees.stuff_map(image_id))
            assert found.issues == () and found.image

    def test_maps_are_the_files(self, stuff: Path) -> None:
        self.check(stuff)
        assert self.dataset.classes(Tree.of(str(stuff))) == tables.load("coco-stuff")

    def test_the_downloaded_archives_in_one_folder_read_the_same(self, stuff: Path, tmp_path: Path) -> None:
        packed = tmp_path / "packed"
        packed.mkdir()
        for split in trees.IMAGES:
            shutil.make_archive(str(packed / split), "zip", stuff / "images", split)
        shutil.make_archive(str(packed / "stuffthingmaps_trainval2017"), "zip", stuff / "annotations")
        assert registry.find("auto", str(packed))[0] is registry.dataset("coco-stuff")
        self.check(packed)

    def test_maps_among_the_photos_read_the_same(self, stuff: Path) -> None:
        for split in trees.IMAGES:
            shutil.move(stuff / "images" / split, stuff / split)
            for path in (stuff / "annotations" / split).iterdir():
                shutil.move(path, stuff / split / path.name)
        shutil.rmtree(stuff / "annotations")
        self.check(stuff)

    def test_photos_alone_are_not_taken_for_maps(self, tmp_path: Path) -> None:
        generators.save(tmp_path / "train2017" / "000000000009.png", generators.photo(9))
        assert not self.dataset.recognises(Tree.of(str(tmp_path)))

    def test_without_any_photo_labels_are_read_alone(self, stuff: Path) -> None:
        shutil.rmtree(stuff / "images" / "train2017")
        found = self.read(stuff, 9)
        assert found.image is None and codes(found) == ["labels-only"]
        assert (found.height, found.width) == trees.SIZE
        assert self.read(stuff, 139).image

    def test_what_is_missing_is_a_row_with_a_reason(self, stuff: Path) -> None:
        self.map(stuff, 9).unlink()
        (stuff / "images" / "train2017" / trees.file_name(25)).unlink()
        shutil.copy(
            stuff / "images" / "val2017" / trees.file_name(139),
            stuff / "images" / "val2017" / trees.file_name(139, ".jpeg"),
        )
        assert problem(stuff, "9", self.dataset).code == "missing-label"
        assert problem(stuff, "25", self.dataset).code == "missing-image"
        twins = [k for k in items(stuff, dataset=self.dataset) if "#" in k]
        assert len(twins) == 1 and problem(stuff, twins[0], self.dataset).code == "duplicate-id"

    @pytest.mark.parametrize(
        ("pixels", "code", "words"),
        [
            (np.full(trees.SIZE, 11, np.uint8), "unknown-label", "id 11"),
            (np.zeros((24, 31), np.uint8), "size-mismatch", "31 x 24"),
            (np.zeros((*trees.SIZE, 3), np.uint8), "label-type", "in colour"),
            (np.zeros(trees.SIZE, np.uint16), "label-type", "16 bit"),
        ],
    )
    def test_wrong_maps_are_named(self, stuff: Path, pixels: np.ndarray[Any, Any], code: str, words: str) -> None:
        generators.save(self.map(stuff, 9), pixels)
        error = problem(stuff, "9", self.dataset)
        assert error.code == code and words in error.problem and str(self.map(stuff, 9)) in error.problem

    def test_a_root_of_something_else_is_refused(self, root: Path) -> None:
        with pytest.raises(ConfigError, match="is not COCO-Stuff"):
            items(root, dataset=self.dataset)


def painted(path: Path, image_id: int) -> np.ndarray[Any, Any]:
    """cocoSegmentationToSegmentationMap, crowds among the rest."""
    api = COCO(str(path))
    found = np.zeros(trees.SIZE, int)
    for entry in api.loadAnns(api.getAnnIds(image_id)):
        found[api.annToMask(entry) == 1] = entry["category_id"]
    return found


class TestStuffJson:
    dataset = CocoStuff()

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        return trees.coco_stuff_json(tmp_path / "tree")

    def test_maps_are_painted_as_cocostuffeval_does(self, tree: Path) -> None:
        assert list(items(tree, dataset=self.dataset)) == [str(i) for i in (*TRAIN, *VAL)]
        for image_id in TRAIN:
            found = sample(tree, str(image_id), self.dataset)
            assert np.array_equal(np.asarray(found.semantic), painted(train(tree, "stuff"), image_id))
            assert found.issues == () and set(np.unique(np.asarray(found.semantic))) == {0, 149, 157, 183}

    def test_classes_are_the_files_and_unlabeled(self, tree: Path) -> None:
        classes = self.dataset.classes(Tree.of(str(tree))).classes
        assert [(c.label_id, c.name, c.ignore, c.supercategory) for c in classes] == [
            (0, "unlabeled", True, ""),
            (149, "road", False, "ground"),
            (157, "sky-other", False, "sky"),
            (183, "other", False, "other"),
        ]

    def test_label_maps_are_preferred(self, tree: Path) -> None:
        generators.save(tree / "annotations" / "train2017" / trees.file_name(9, ".png"), trees.stuff_map(9))
        assert self.dataset.splits(Tree.of(str(tree))) == ("train2017",)
        assert np.array_equal(np.asarray(sample(tree, "9", self.dataset).semantic), trees.stuff_map(9))

    def test_overlaps_crowds_and_unknown_categories_are_said(self, tree: Path) -> None:
        def edit(content: dict[str, Any]) -> None:
            mine = [a for a in content["annotations"] if a["image_id"] == 9]
            mine[0]["segmentation"] = mine[1]["segmentation"]
            mine[1]["iscrowd"] = 1
            mine[2]["category_id"] = 500

        edited(train(tree, "stuff"), edit)
        found = sample(tree, "9", self.dataset)
        assert sorted(codes(found)) == ["crowd-mask", "overlap", "unknown-category"]
        label = np.asarray(found.semantic)
        assert set(np.unique(label)) == {0, 157}
        assert f"in {(label == 157).sum()} pixels" in next(i.message for i in found.issues if i.code == "overlap")

    @pytest.mark.parametrize(
        ("categories", "words"),
        [([], "has no categories"), ([{"id": 0, "name": "a"}], "id 0"), ([{"id": 70000, "name": "a"}], "id 70000")],
    )
    def test_categories_that_cannot_be_label_ids_are_refused(
        self, tree: Path, categories: list[dict[str, Any]], words: str
    ) -> None:
        for split in trees.IMAGES:
            edited(tree / "annotations" / f"stuff_{split}.json", lambda d: d.update(categories=categories))
        with pytest.raises(ConfigError, match=words):
            items(tree, dataset=self.dataset)


class TestRealData:
    def check(self, path: Path, samples: Sequence[Sample]) -> None:
        """Every instance against pycocotools."""
        api = COCO(str(path))
        assert [s.sample_id for s in samples] == [str(i["id"]) for i in api.dataset["images"]]
        for found in samples:
            expected = api.imgToAnns[int(found.sample_id)]
            for mine, theirs in zip(found.instances or (), expected, strict=True):
                assert (mine.id, mine.category_id, mine.area) == (theirs["id"], theirs["category_id"], theirs["area"])
                assert (mine.bbox_xywh, mine.iscrowd) == (tuple(theirs["bbox"]), bool(theirs["iscrowd"]))
                assert mine.counts == reference(api, theirs)

    def test_coco_tiny(self, shared_data: SharedData) -> None:
        root = shared_data("data/coco_tiny")
        samples = [s for i in items(root).values() for s in CocoInstances().read(i)]
        self.check(root / "annotations" / "instances_train2017.json", samples)
        instances = [i for s in samples for i in s.instances or ()]
        assert (len(samples), len(instances), sum(i.iscrowd for i in instances)) == (50, 470, 5)
        assert all(s.image and not s.issues for s in samples)
        assert CocoInstances().classes(Tree.of(str(root))) == tables.load("coco-instances")

    def test_coco_val2014_100_has_no_photos(self, shared_data: SharedData) -> None:
        root = shared_data("data/coco_val2014_100")
        found = items(root)
        assert {i.split for i in found.values()} == {"val2014_100"}
        samples = [s for i in found.values() for s in CocoInstances().read(i)]
        self.check(root / "instances_val2014_100.json", samples)
        assert (len(samples), sum(len(s.instances or ()) for s in samples)) == (100, 839)
        assert all(codes(s) == ["labels-only"] and s.image is None for s in samples)

    def test_the_example_of_panopticapi(self, shared_data: SharedData) -> None:
        root = shared_data("data/coco_panoptic")
        (item,) = items(root, dataset=CocoPanoptic()).values()
        (found,) = CocoPanoptic().read(item)
        content = json.loads((root / "panoptic_examples.json").read_text())
        rgb = np.array(Image.open(root / "panoptic_examples" / "000000439180.png")).astype(int)
        ids = rgb @ [1, 256, 65536]
        listed = content["annotations"][0]["segments_info"]
        assert found.segments is not None and found.panoptic is not None and found.issues == ()
        assert [s.id for s in found.segments] == [s["id"] for s in listed] and len(listed) == 32
        assert np.array_equal(np.array([0, *(s.id for s in found.segments)])[found.panoptic], ids)
        assert (
            [s.area for s in found.segments] == [s["area"] for s in listed] == [(ids == s["id"]).sum() for s in listed]
        )
        assert found.image == (root / "input_images" / "000000439180.jpg").read_bytes()
        assert CocoPanoptic().classes(Tree.of(str(root))) == tables.load("coco-panoptic")

    def test_the_stuff_json_of_datumaro(self, shared_data: SharedData) -> None:
        root = shared_data("data/layouts/coco_stuff")
        found = {i.sample_id: next(iter(CocoStuff().read(i))) for i in items(root, dataset=CocoStuff()).values()}
        for split, sample_id, category in (("train", "5", 1), ("val", "40", 2)):
            (entry,) = json.loads((root / "annotations" / f"stuff_{split}.json").read_text())["annotations"]
            height, width = entry["segmentation"]["size"]
            mask = coco_mask.decode(coco_mask.frPyObjects(entry["segmentation"], height, width))
            assert np.array_equal(np.asarray(found[sample_id].semantic), category * mask.astype(int))
            assert codes(found[sample_id]) == ["crowd-mask"]
