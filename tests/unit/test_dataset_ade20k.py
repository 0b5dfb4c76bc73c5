"""ADE20K, the benchmark and the full releases: every label against an independent reading, and what can be wrong."""

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pytest
import trees_ade20k as trees
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from segbatch.datasets import ade20k_index, registry
from segbatch.datasets.ade20k import Ade20k
from segbatch.datasets.ade20k_full import Ade20kFull
from segbatch.datasets.ade20k_objects import class_codes, codes_by_number, parse_annotation, parse_lines
from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

SharedData = Callable[[str], Path]
FIRST = "ADE_train_00000001"
STREET = "ADE_train_00016869"


def located(found: Dataset, root: Path) -> Tree:
    return registry.find(found.name, str(root))[1]


def items(found: Dataset, root: Path, *splits: str) -> dict[str, PlanItem]:
    return {i.sample_id: i for i in found.items(located(found, root), splits)}


def sample(found: Dataset, root: Path, sample_id: str) -> Sample:
    (read,) = found.read(items(found, root)[sample_id])
    return read


def problem(found: Dataset, root: Path, sample_id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        sample(found, root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def pixels(path: Path) -> NDArray[Any]:
    return np.array(Image.open(path))


def mask_of(counts: bytes | str, size: tuple[int, int]) -> NDArray[np.bool_]:
    return np.asarray(coco_mask.decode({"size": list(size), "counts": counts})).astype(bool)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


class TestSceneParsing:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.ade20k(tmp_path / "tree")

    def annotation(self, root: Path, sample_id: str = FIRST) -> Path:
        return root / "ADEChallengeData2016" / "annotations" / "training" / f"{sample_id}.png"

    def test_ids_splits_and_order(self, root: Path) -> None:
        found = items(Ade20k(), root)
        assert {i.split: [j for j, k in found.items() if k.split == i.split] for i in found.values()} == {
            "training": ["ADE_train_00000001", "ADE_train_00000002", "ADE_train_00020210"],
            "validation": ["ADE_val_00000001", "ADE_val_00002000"],
            "testing": ["ADE_test_00000001"],
        }
        assert list(items(Ade20k(), root, "validation")) == ["ADE_val_00000001", "ADE_val_00002000"]

    def test_labels_and_scenes_are_those_of_the_files(self, root: Path) -> None:
        for sample_id, item in items(Ade20k(), root).items():
            (read,) = Ade20k().read(item)
            if item.split == "testing":
                assert read.semantic is None and read.attributes == {}
                continue
            path = root / "ADEChallengeData2016" / "annotations" / item.split / f"{sample_id}.png"
            assert np.array_equal(read.semantic, pixels(path)) and read.instances is None
            assert read.attributes == {"scene": trees.SCENES[int(sample_id[-8:])]}

    def test_classes_are_the_150_and_other(self, root: Path) -> None:
        classes = Ade20k().classes(Tree.of(str(root)))
        assert [c.label_id for c in classes.classes] == list(range(151)) and classes.ignore_ids == (0,)

    def test_testing_may_lie_with_the_other_images(self, root: Path) -> None:
        (root / "release_test" / "testing").rename(root / "ADEChallengeData2016" / "images" / "testing")
        (root / "release_test").rmdir()
        item = items(Ade20k(), root, "testing")["ADE_test_00000001"]
        assert "/images/testing/" in item.uri

    def test_a_changed_label_or_scene_changes_its_own_item_only(self, root: Path) -> None:
        before = items(Ade20k(), root)
        generators.save(self.annotation(root), np.ones(trees.SIZE, np.uint8))
        scenes = root / "ADEChallengeData2016" / "sceneCategories.txt"
        scenes.write_text(scenes.read_text().replace("street", "alley"))
        after = items(Ade20k(), root)
        assert [k for k in before if before[k].etag != after[k].etag] == [FIRST, "ADE_val_00002000"]

    def test_without_scene_categories(self, root: Path) -> None:
        (root / "ADEChallengeData2016" / "sceneCategories.txt").unlink()
        assert sample(Ade20k(), root, FIRST).attributes == {}

    def test_files_of_other_names_are_no_part(self, root: Path) -> None:
        before = list(items(Ade20k(), root))
        generators.save(root / "ADEChallengeData2016" / "images" / "training" / "preview.jpg", generators.photo(0))
        assert list(items(Ade20k(), root)) == before

    def test_an_image_without_label_map(self, root: Path) -> None:
        self.annotation(root).unlink()
        error = problem(Ade20k(), root, FIRST)
        assert error.code == "missing-label" and str(self.annotation(root)) in error.problem

    def test_a_label_map_without_image(self, root: Path) -> None:
        (root / "ADEChallengeData2016" / "images" / "training" / f"{FIRST}.jpg").unlink()
        error = problem(Ade20k(), root, FIRST)
        assert error.code == "missing-image" and f"images/training/{FIRST}.jpg" in error.problem

    def test_two_photos_of_one_id(self, root: Path) -> None:
        generators.save(root / "ADEChallengeData2016" / "images" / "training" / f"{FIRST}.png", generators.photo(0))
        assert problem(Ade20k(), root, f"{FIRST}.png").code == "duplicate-id"
        assert sample(Ade20k(), root, FIRST).semantic is not None

    @pytest.mark.parametrize(
        ("label", "code", "said"),
        [
            (np.zeros((24, 31), np.uint8), "size-mismatch", "31 x 24"),
            (np.full(trees.SIZE, 151, np.uint8), "unknown-label", "id 151 at row 0, column 0"),
            (np.zeros((*trees.SIZE, 3), np.uint8), "label-type", "in colour"),
        ],
    )
    def test_wrong_label_maps(self, root: Path, label: NDArray[Any], code: str, said: str) -> None:
        generators.save(self.annotation(root), label)
        error = problem(Ade20k(), root, FIRST)
        assert (error.code, error.uri) == (code, str(self.annotation(root))) and said in error.problem

    def test_a_truncated_label_map(self, root: Path) -> None:
        path = self.annotation(root)
        path.write_bytes(path.read_bytes()[:60])
        assert problem(Ade20k(), root, FIRST).code == "bad-label"

    def test_other_layouts_are_refused(self, tmp_path: Path) -> None:
        generators.save(tmp_path / "images" / "training" / "a.jpg", generators.photo(0))
        generators.save(tmp_path / "annotations" / "training" / "a.png", np.zeros(trees.SIZE, np.uint8))
        with pytest.raises(ConfigError, match="ADE_train_00000001"):
            items(Ade20k(), tmp_path)
        assert Ade20k().splits(Tree.of(str(tmp_path))) == ()

    def test_real_samples(self, shared_data: SharedData) -> None:
        root = shared_data("data/ade20k/sampleData")
        found = items(Ade20k(), root)
        assert [(k, i.split) for k, i in found.items()] == [(f"ADE_val_0000000{n}", "validation") for n in (1, 2, 3)]
        for sample_id, item in found.items():
            (read,) = Ade20k().read(item)
            label = pixels(root / "annotations" / f"{sample_id}.png")
            assert np.array_equal(read.semantic, label) and 0 < label.max() <= 150
            assert np.array_equal(label, pixels(root / "predictions" / f"{sample_id}.png"))


class TestFull2021:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.ade20k_2021(tmp_path / "tree")

    @pytest.fixture
    def street(self, root: Path) -> Path:
        return root / "ADE20K_2021_17_01" / "images" / "ADE" / "training" / "urban" / "street"

    def edit(self, street: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = street / f"{STREET}.json"
        document = json.loads(path.read_text())
        change(document["annotation"])
        path.write_text(json.dumps(document))

    def test_ids_splits_and_order(self, root: Path) -> None:
        found = items(Ade20kFull(), root)
        assert [(k, i.split) for k, i in found.items()] == [
            ("ADE_train_00000007", "training"),
            (STREET, "training"),
            ("ADE_train_00016900", "training"),
            ("ADE_val_00000003", "validation"),
        ]

    def test_label_maps_and_parts_are_those_of_the_files(self, root: Path, street: Path) -> None:
        read = sample(Ade20kFull(), root, STREET)
        maps = {"": read.semantic, **read.label_maps}
        assert list(read.label_maps) == ["parts_1", "parts_2"]
        for name, found in maps.items():
            rgb = pixels(street / f"{STREET}_{name or 'seg'}.png").astype(int)
            assert found is not None and found.dtype == np.uint16
            assert np.array_equal(found, rgb[..., 0] // 10 * 256 + rgb[..., 1])
        assert {0, 401, 2420, 2855} == set(np.unique(read.semantic).tolist())
        assert list(sample(Ade20kFull(), root, "ADE_train_00016900").label_maps) == ["parts_1"]

    def test_instances_are_the_visible_pixels_of_the_masks(self, root: Path, street: Path) -> None:
        read = sample(Ade20kFull(), root, STREET)
        described = json.loads((street / f"{STREET}.json").read_text())["annotation"]["object"]
        assert [i.id for i in read.instances or ()] == [o["id"] + 1 for o in described] == [1, 2, 3, 4, 5, 6]
        hidden = 0
        for instance, entry in zip(read.instances or (), described, strict=True):
            mask = pixels(street / entry["instance_mask"])
            assert np.array_equal(mask_of(instance.counts, trees.SIZE), mask == 255)
            assert instance.area == (mask == 255).sum() and instance.category_id == entry["name_ndx"]
            box = coco_mask.toBbox({"size": list(trees.SIZE), "counts": instance.counts})
            assert list(instance.bbox_xywh) == box.tolist() and not instance.iscrowd and instance.score is None
            kept = read.attributes["instances"][str(instance.id)]
            assert ("amodal" in kept) == (mask == 128).any()
            if "amodal" in kept:
                hidden += 1
                assert np.array_equal(mask_of(kept["amodal"], trees.SIZE), mask > 0)
        assert hidden == 2

    def test_attributes_and_hierarchy(self, root: Path) -> None:
        read = sample(Ade20kFull(), root, STREET)
        assert read.attributes["scene"] == "outdoor/urban/street"
        assert read.attributes["source"]["origin"] == "flickr"
        kept = read.attributes["instances"]
        assert (kept["3"]["hasparts"], kept["3"]["ispartof"], kept["3"]["part_level"]) == ([4, 5], None, 0)
        assert (kept["5"]["hasparts"], kept["5"]["ispartof"], kept["5"]["part_level"]) == ([6], 3, 1)
        assert (kept["6"]["hasparts"], kept["6"]["ispartof"], kept["6"]["part_level"]) == ([], 5, 2)
        assert [kept[str(i)]["occluded"] for i in (1, 2, 3)] == [False, True, None]
        assert [kept[str(i)]["crop"] for i in (1, 2)] == [False, True]
        assert (kept["3"]["name"], kept["3"]["raw_name"], kept["3"]["attributes"]) == ("car, auto", "raw 401", ["red"])
        assert kept["1"]["polygon"] == {"x": [0.0, 30.0], "y": [0.0, 8.0]} and kept["1"]["depth_ordering_rank"] == 1

    def test_names_come_from_the_annotations(self, root: Path) -> None:
        classes = Ade20kFull().classes(located(Ade20kFull(), root)).classes
        shown = {code: name for code, name in trees.CLASSES.items() if code != 1}
        assert {c.label_id: c.name for c in classes} == {0: "unlabeled", **shown} and classes[0].ignore

    def test_the_pickle_is_never_opened(self, root: Path, tmp_path: Path) -> None:
        """``objects.txt`` is not either: it names no numbers."""
        marker = tmp_path / "opened"
        (root / "ADE20K_2021_17_01" / "index_ade20k.pkl").write_bytes(pickle.dumps(_Touch(marker)))
        Ade20kFull().classes(located(Ade20kFull(), root))
        sample(Ade20kFull(), root, STREET)
        assert not marker.exists()
        pickle.loads((root / "ADE20K_2021_17_01" / "index_ade20k.pkl").read_bytes())
        assert marker.exists()

    def test_names_come_from_the_index_where_there_is_one(self, root: Path) -> None:
        (root / "ADE20K_2021_17_01" / "index_ade20k.mat").write_bytes(trees.index())
        classes = Ade20kFull().classes(located(Ade20kFull(), root))
        assert len(classes.classes) == max(trees.CLASSES) + 1 and classes.name_of(1) == "-"

    def test_an_index_of_version_7_3_is_passed_over(self, root: Path) -> None:
        (root / "ADE20K_2021_17_01" / "index_ade20k.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform".ljust(512))
        assert Ade20kFull().classes(located(Ade20kFull(), root)).name_of(774) == "door"

    def test_a_changed_mask_changes_its_own_item_only(self, root: Path, street: Path) -> None:
        before = items(Ade20kFull(), root)
        Image.fromarray(np.zeros(trees.SIZE, np.uint8)).save(street / STREET / f"instance_001_{STREET}.png")
        after = items(Ade20kFull(), root)
        assert [k for k in before if before[k].etag != after[k].etag] == [STREET]

    def test_one_object_that_matlab_wrote_without_a_list(self, root: Path, street: Path) -> None:
        self.edit(street, lambda a: a.update(object=a["object"][0]))
        assert [i.id for i in sample(Ade20kFull(), root, STREET).instances or ()] == [1]

    def test_an_image_without_objects(self, root: Path, street: Path) -> None:
        self.edit(street, lambda a: a.update(object=[]))
        read = sample(Ade20kFull(), root, STREET)
        assert read.instances == () and read.issues == ()

    def test_names_in_latin_1(self, root: Path, street: Path) -> None:
        self.edit(street, lambda a: a["object"][0].update(raw_name="caf_"))
        path = street / f"{STREET}.json"
        path.write_bytes(path.read_bytes().replace(b"caf_", b"caf\xe9"))
        assert sample(Ade20kFull(), root, STREET).attributes["instances"]["1"]["raw_name"] == "café"

    def test_an_empty_mask_is_kept_and_said(self, root: Path, street: Path) -> None:
        Image.fromarray(np.zeros(trees.SIZE, np.uint8)).save(street / STREET / f"instance_001_{STREET}.png")
        read = sample(Ade20kFull(), root, STREET)
        second = (read.instances or ())[1]
        assert (second.id, second.area, second.bbox_xywh) == (2, 0.0, (0.0, 0.0, 0.0, 0.0))
        assert [(i.code, i.annotation_id) for i in read.issues] == [("empty-instance", 2)]

    @pytest.mark.parametrize(
        ("change", "code", "left"),
        [
            (lambda o: o[1].pop("parts"), "bad-annotation", [1, 3, 4, 5, 6]),
            (lambda o: o[1].update(name_ndx="x"), "bad-annotation", [1, 3, 4, 5, 6]),
            (lambda o: o[1].update(name_ndx=0), "unknown-category", [1, 3, 4, 5, 6]),
            (lambda o: o[1]["polygon"].update(x=[1e999]), "bad-annotation", [1, 3, 4, 5, 6]),
            (lambda o: o[1].update(id=0), "duplicate-id", [1, 7, 3, 4, 5, 6]),
            (lambda o: o[1].update(id=None), "duplicate-id", [1, 7, 3, 4, 5, 6]),
            (lambda o: o[1].update(instance_mask="../../../../x.png"), "missing-mask", [1, 3, 4, 5, 6]),
        ],
    )
    def test_what_is_wrong_with_one_object_is_an_issue(
        self, root: Path, street: Path, change: Callable[[list[dict[str, Any]]], object], code: str, left: list[int]
    ) -> None:
        path = street / f"{STREET}.json"
        document = json.loads(path.read_text())
        change(document["annotation"]["object"])
        path.write_text(json.dumps(document).replace("Infinity", "1e999"))
        read = sample(Ade20kFull(), root, STREET)
        assert [i.id for i in read.instances or ()] == left
        assert [i.code for i in read.issues] == [code] and f"object 1 of {path}" in read.issues[0].message

    def test_a_broken_mask_is_an_issue(self, root: Path, street: Path) -> None:
        (street / STREET / f"instance_001_{STREET}.png").write_bytes(b"no image")
        read = sample(Ade20kFull(), root, STREET)
        assert [i.code for i in read.issues] == ["bad-label"] and len(read.instances or ()) == 5

    def test_a_missing_folder_of_masks_is_one_issue(self, root: Path, street: Path) -> None:
        for path in (street / STREET).iterdir():
            path.unlink()
        read = sample(Ade20kFull(), root, STREET)
        assert [i.code for i in read.issues] == ["missing-mask"] and read.instances == ()

    def test_a_missing_annotation_leaves_the_encoded_instances(self, root: Path, street: Path) -> None:
        (street / f"{STREET}.json").unlink()
        read = sample(Ade20kFull(), root, STREET)
        assert [i.code for i in read.issues] == ["missing-annotation"]
        assert [i.category_id for i in read.instances or ()] == [2420, 2855, 401, 3035, 774, 1180]

    @pytest.mark.parametrize(
        "text", ['{"annotation": ', "[]", '{"annotation": {"object": [1]}}', '{"annotation": NaN}']
    )
    def test_a_broken_annotation(self, root: Path, street: Path, text: str) -> None:
        (street / f"{STREET}.json").write_text(text)
        error = problem(Ade20kFull(), root, STREET)
        assert (error.code, error.uri) == ("bad-annotation", str(street / f"{STREET}.json"))
        assert Ade20kFull().classes(located(Ade20kFull(), root)).name_of(401) == "car, auto"

    def test_sizes_that_differ(self, root: Path, street: Path) -> None:
        self.edit(street, lambda a: a.update(imsize=[24, 33, 3]))
        assert "[24, 33]" in problem(Ade20kFull(), root, STREET).problem
        self.edit(street, lambda a: a.update(imsize=[24, 32, 3]))
        for name in (f"{STREET}_parts_1.png", f"{STREET}_seg.png"):
            generators.save(street / name, np.zeros((20, 32, 3), np.uint8))
            error = problem(Ade20kFull(), root, STREET)
            assert (error.code, error.uri) == ("size-mismatch", str(street / name))

    def test_a_mask_of_another_size(self, root: Path, street: Path) -> None:
        path = street / STREET / f"instance_002_{STREET}.png"
        generators.save(path, np.zeros((20, 32), np.uint8))
        assert (problem(Ade20kFull(), root, STREET).code, path.exists()) == ("size-mismatch", True)

    def test_missing_files(self, root: Path, street: Path) -> None:
        (street / f"{STREET}_seg.png").unlink()
        assert problem(Ade20kFull(), root, STREET).code == "missing-label"
        (street / f"{STREET}.jpg").unlink()
        assert problem(Ade20kFull(), root, STREET).code == "missing-image"

    def test_a_grey_label_map(self, root: Path, street: Path) -> None:
        generators.save(street / f"{STREET}_seg.png", np.zeros(trees.SIZE, np.uint8))
        assert problem(Ade20kFull(), root, STREET).code == "label-type"

    def test_an_id_in_two_scenes(self, root: Path, street: Path) -> None:
        other = street.parent / "road"
        generators.save(other / f"{STREET}.jpg", generators.photo(1, trees.SIZE))
        generators.save(other / f"{STREET}_seg.png", np.zeros((*trees.SIZE, 3), np.uint8))
        twin = f"training/urban/street/{STREET}"
        assert problem(Ade20kFull(), root, twin).code == "duplicate-id"
        assert f"road/{STREET}.jpg" in items(Ade20kFull(), root)[STREET].uri

    def test_official_samples(self, shared_data: SharedData) -> None:
        """The real layout in few pixels: names and classes by number, instances with the values 0 and 1."""
        root = shared_data("data/layouts/ade20k2020_dataset/dataset")
        read = sample(Ade20kFull(), root, "2")
        assert list(items(Ade20kFull(), root)) == ["1", "2"]
        assert np.unique(read.semantic).tolist() == [0, 401, 1831]
        assert [(i.id, i.category_id, i.area) for i in read.instances or ()] == [
            (1, 401, 15.0),
            (2, 1831, 5.0),
            (3, 774, 10.0),
            (4, 2122, 5.0),
        ]
        assert {n: np.unique(m).tolist() for n, m in read.label_maps.items()} == {
            "parts_1": [0, 774],
            "parts_2": [0, 2122],
        }
        classes = Ade20kFull().classes(located(Ade20kFull(), root))
        assert [c.label_id for c in classes.classes] == [0, 401, 774, 1831, 2122]


class TestFull2016:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.ade20k_2016(tmp_path / "tree")

    @pytest.fixture
    def street(self, root: Path) -> Path:
        return root / "ADE20K_2016_07_26" / "images" / "training" / "urban" / "street"

    def check(self, read: Sample, street: Path) -> None:
        """Instances are, level by level, the pixels of the values of B, in their order."""
        wanted = []
        for name in ("seg", "parts_1", "parts_2"):
            rgb = pixels(street / f"{STREET}_{name}.png").astype(int)
            for value in sorted(set(np.unique(rgb[..., 2]).tolist()) - {0}):
                shown = rgb[..., 2] == value
                (code,) = np.unique(rgb[..., 0][shown] // 10 * 256 + rgb[..., 1][shown]).tolist()
                wanted.append((code, shown))
        assert [i.id for i in read.instances or ()] == list(range(1, len(wanted) + 1))
        for instance, (code, shown) in zip(read.instances or (), wanted, strict=True):
            assert instance.category_id == code and instance.area == shown.sum()
            assert np.array_equal(mask_of(instance.counts, trees.SIZE), shown)

    def test_instances_and_attributes(self, root: Path, street: Path) -> None:
        read = sample(Ade20kFull(), root, STREET)
        self.check(read, street)
        assert read.attributes["instances"]["3"] == {
            "part_level": 0,
            "number": 3,
            "name": "car, auto",
            "raw_name": "raw 401",
            "occluded": True,
            "attributes": ["red", "old"],
        }
        assert {k: (v["part_level"], v["number"]) for k, v in read.attributes["instances"].items()} == {
            "1": (0, 1),
            "2": (0, 2),
            "3": (0, 3),
            "4": (1, 1),
            "5": (1, 2),
            "6": (2, 1),
        }
        assert read.attributes["scene"] == "urban/street" and read.issues == ()

    def test_both_releases_show_the_same_label_maps(self, root: Path, tmp_path: Path) -> None:
        newer = trees.ade20k_2021(tmp_path / "newer")
        for sample_id in items(Ade20kFull(), root):
            old, new = (sample(Ade20kFull(), r, sample_id) for r in (root, newer))
            assert np.array_equal(old.semantic, new.semantic) and old.image == new.image

    def test_the_letter_is_no_part_of_the_scene(self, root: Path, street: Path) -> None:
        street.rename(street.parents[1] / "s")
        assert sample(Ade20kFull(), root, STREET).attributes["scene"] == ""

    def test_classes_of_the_index(self, root: Path) -> None:
        classes = Ade20kFull().classes(located(Ade20kFull(), root))
        assert [c.label_id for c in classes.classes] == list(range(max(trees.CLASSES) + 1))
        assert {code: classes.name_of(code) for code in trees.CLASSES} == trees.CLASSES

    def test_names_from_lines_and_maps_without_the_index(self, root: Path) -> None:
        (root / "ADE20K_2016_07_26" / "index_ade20k.mat").unlink()
        classes = Ade20kFull().classes(located(Ade20kFull(), root))
        shown = {code: name for code, name in trees.CLASSES.items() if code != 1}
        assert {c.label_id: c.name for c in classes.classes} == {0: "unlabeled", **shown}

    def test_a_damaged_index_is_refused(self, root: Path) -> None:
        path = root / "ADE20K_2016_07_26" / "index_ade20k.mat"
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(ConfigError, match=r"index_ade20k\.mat cannot be read: it is cut short"):
            Ade20kFull().classes(located(Ade20kFull(), root))

    def test_lines_that_do_not_fit(self, root: Path, street: Path) -> None:
        path = street / f"{STREET}_atr.txt"
        lines = path.read_text().splitlines()
        path.write_text(
            "\n".join([*lines[1:], lines[1], "what", "", '004 # 0 # 0 # lake # lake # ""', '1 # 3 # 0 # a # a # ""'])
        )
        read = sample(Ade20kFull(), root, STREET)
        assert [(i.code, i.annotation_id) for i in read.issues] == [
            ("duplicate-id", None),
            ("bad-annotation", None),
            ("unlisted-instance", 1),
            ("empty-instance", 4),
            ("empty-instance", 8),
        ]
        assert [i.id for i in read.instances or ()] == [1, 2, 3, 5, 6, 7]
        assert f"line 7 of {path} is 'what'" in read.issues[1].message

    def test_a_missing_atr(self, root: Path, street: Path) -> None:
        (street / f"{STREET}_atr.txt").unlink()
        read = sample(Ade20kFull(), root, STREET)
        assert [i.code for i in read.issues] == ["missing-annotation"]
        self.check(read, street)

    def test_an_object_of_several_classes_and_one_of_none(self, root: Path, street: Path) -> None:
        rgb = pixels(street / f"{STREET}_seg.png").copy()
        rgb[0, :3, :2] = (0, 64)
        rgb[rgb[..., 2] == 10] = (0, 0, 10)
        generators.save(street / f"{STREET}_seg.png", rgb)
        read = sample(Ade20kFull(), root, STREET)
        assert [(i.code, i.annotation_id) for i in read.issues] == [("mixed-classes", 1), ("no-class", 2)]
        assert [(i.id, i.category_id) for i in read.instances or ()][:2] == [(1, 2420), (3, 401)]

    def test_it_reads_the_same_from_the_zip(self, root: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "ADE20K_2016_07_26.zip", "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(root))
        (packed,) = Ade20kFull().read(items(Ade20kFull(), tmp_path / "ADE20K_2016_07_26.zip")[STREET])
        plain = sample(Ade20kFull(), root, STREET)
        assert (packed.instances, packed.attributes, packed.image) == (plain.instances, plain.attributes, plain.image)

    def test_official_samples(self, shared_data: SharedData) -> None:
        """The real layout in few pixels; its person has R = 1 and G = 0, which is the class 0."""
        root = shared_data("data/layouts/ade20k2017_dataset/dataset")
        read = sample(Ade20kFull(), root, "2")
        assert [(i.id, i.category_id, i.area) for i in read.instances or ()] == [(1, 1, 6.0), (3, 2, 6.0), (4, 3, 3.0)]
        assert [(i.code, i.annotation_id) for i in read.issues] == [("no-class", 2)]
        assert [read.attributes["instances"][k]["name"] for k in "134"] == ["sky", "license plate", "rim"]
        classes = Ade20kFull().classes(located(Ade20kFull(), root))
        assert [(c.label_id, c.name) for c in classes.classes[1:]] == [(1, "sky"), (2, "license plate"), (3, "rim")]


class TestIndex:
    @pytest.mark.parametrize("compressed", [True, False])
    def test_names_by_place(self, compressed: bool) -> None:
        names = ade20k_index.class_names(trees.index(compressed), "index.mat")
        assert len(names) == max(trees.CLASSES) and {code: names[code] for code in trees.CLASSES} == trees.CLASSES

    @pytest.mark.parametrize("compressed", [True, False])
    def test_names_are_text_of_any_kind(self, compressed: bool) -> None:
        names = ["café", "", "a", "door, doors", "日本"]
        data = trees.mat_file(compressed, before=np.eye(3), index={"n": 1, "objectnames": np.array([names], object)})
        assert list(ade20k_index.class_names(data, "index.mat").values()) == names

    def test_blank_and_doubled_names_get_their_numbers(self, tmp_path: Path) -> None:
        trees.ade20k_2016(tmp_path / "tree")
        names = np.array([["door", " ", "door", ""]], object)
        path = tmp_path / "tree" / "ADE20K_2016_07_26" / "index_ade20k.mat"
        path.write_bytes(trees.mat_file(True, index={"objectnames": names}))
        classes = Ade20kFull().classes(located(Ade20kFull(), tmp_path / "tree"))
        assert [c.name for c in classes.classes] == ["unlabeled", "door", "(2)", "door (3)", "(4)"]

    @pytest.mark.parametrize(
        ("variables", "said"),
        [
            ({"other": {"objectnames": 1}}, "no struct called index"),
            ({"index": {"filename": 1}}, "no objectnames"),
            ({"index": {"objectnames": 1}}, "no cell array"),
        ],
    )
    def test_other_files_are_refused(self, variables: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            ade20k_index.class_names(trees.mat_file(True, **variables), "a.mat")
        with pytest.raises(ConfigError, match="not a MATLAB 5 file"):
            ade20k_index.class_names(b"", "a.mat")

    @settings(deadline=None)
    @given(st.data())
    def test_damage_is_an_error_or_harmless(self, data: st.DataObject) -> None:
        names = np.array([["door", "", "wall"]], object)
        content = bytearray(trees.mat_file(False, index={"counts": np.eye(2), "objectnames": names}))
        place = data.draw(st.integers(128, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
        with contextlib.suppress(ConfigError):  # anything else is a failure
            found = ade20k_index.class_names(bytes(content), "index.mat")
            assert all(isinstance(name, str) for name in found.values())


@settings(deadline=None)
@given(st.integers(0, 6655), st.integers(0, 255))
def test_class_codes_invert_the_encoding(code: int, blue: int) -> None:
    rgb = trees.encoded(np.full((1, 1), code, np.uint16), np.full((1, 1), blue, np.uint8))
    assert class_codes(rgb).tolist() == [[code]]
    assert codes_by_number(rgb) == ({1: code} if blue else {})


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_issues(data: bytes) -> None:
    lines, issues = parse_lines(data, "X_atr.txt")
    assert all(set(line) == {"name", "raw_name", "occluded", "attributes"} for line in lines.values())
    assert all("X_atr.txt" in i.message for i in issues)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.sampled_from([b"[" * 100_000, b"{}", b'{"annotation": 1}']))
def test_any_bytes_are_an_annotation_or_an_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"X\.json is no annotation"):
        parse_annotation(data, "X.json")
