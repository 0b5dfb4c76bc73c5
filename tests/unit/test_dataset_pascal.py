"""PASCAL VOC and PASCAL-Context: every label against an independent reading, and what can be wrong."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pytest
import trees_pascal as trees
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from segbatch.datasets import registry, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.pascal_context import PascalContext
from segbatch.datasets.pascal_voc import PascalVoc, color_map
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

SharedData = Callable[[str], Path]
FIRST = "2007_000032"
CONTEXT_FIRST = "2008_000002"


def items(found: Dataset, root: Path, *splits: str) -> dict[str, PlanItem]:
    return {i.sample_id: i for i in found.items(registry.find(found.name, str(root))[1], splits)}


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


class TestVoc:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.pascal_voc(tmp_path / "tree")

    @pytest.fixture
    def year(self, root: Path) -> Path:
        return root / "VOCdevkit" / "VOC2012"

    def issues(self, root: Path, sample_id: str = FIRST) -> list[tuple[str, int | None]]:
        return [(i.code, i.annotation_id) for i in sample(PascalVoc(), root, sample_id).issues]

    def test_ids_splits_and_order(self, root: Path) -> None:
        found = items(PascalVoc(), root)
        assert [(i.split, k) for k, i in found.items()] == [(s, i) for s, ids in trees.VOC.items() for i in ids]
        assert list(items(PascalVoc(), root, "val")) == list(trees.VOC["val"])

    @pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
    def test_the_root_may_be_the_devkit_or_the_year(self, root: Path, below: str) -> None:
        assert list(items(PascalVoc(), root / below)) == [i for ids in trees.VOC.values() for i in ids]

    def test_maps_and_instances_are_those_of_the_files(self, root: Path, year: Path) -> None:
        for image_id in (*trees.VOC["train"], *trees.VOC["val"]):
            read = sample(PascalVoc(), root, image_id)
            classes, objects = (pixels(year / f"Segmentation{k}" / f"{image_id}.png") for k in ("Class", "Object"))
            assert np.array_equal(read.semantic, classes) and 255 in classes
            wanted = sorted(set(np.unique(objects).tolist()) - {0, 255})
            assert wanted and [i.id for i in read.instances or ()] == wanted and read.issues == ()
            for instance in read.instances or ():
                mask = objects == instance.id
                encoded = {"size": list(trees.SIZE), "counts": instance.counts}
                assert np.array_equal(coco_mask.decode(encoded), mask) and instance.area == mask.sum()
                assert [instance.category_id] == np.unique(classes[mask]).tolist() and not instance.iscrowd
                assert list(instance.bbox_xywh) == coco_mask.toBbox(encoded).tolist()

    def test_attributes_of_the_objects(self, root: Path) -> None:
        read = sample(PascalVoc(), root, FIRST)
        kept = read.attributes["instances"]
        assert list(kept) == ["1", "2", "3"] and [kept[k]["difficult"] for k in kept] == [False, False, True]
        assert kept["2"]["truncated"] and kept["2"]["pose"] == "Left"
        assert kept["2"]["bndbox"] == [11.0, 1.0, 20.0, 24.0] and "occluded" not in kept["2"]
        assert sample(PascalVoc(), root, "2007_000039").attributes == {}

    def test_images_of_test_need_no_labels(self, root: Path) -> None:
        read = sample(PascalVoc(), root, trees.VOC["test"][0])
        assert read.semantic is None and read.instances is None and read.issues == ()

    def test_trainval_alone_is_a_split(self, root: Path, year: Path) -> None:
        for split in ("train", "val"):
            (year / "ImageSets" / "Segmentation" / f"{split}.txt").unlink()
        found = items(PascalVoc(), root, "trainval")
        assert list(found) == sorted((*trees.VOC["train"], *trees.VOC["val"]))
        assert {i.split for i in found.values()} == {"trainval"}

    def test_trainval_holds_what_train_and_val_do_not(self, root: Path, year: Path) -> None:
        (year / "ImageSets" / "Segmentation" / "val.txt").unlink()
        assert [k for k, i in items(PascalVoc(), root).items() if i.split == "trainval"] == list(trees.VOC["val"])
        assert PascalVoc().splits(Tree.of(str(root))) == ("train", "trainval", "test")

    def test_an_image_in_two_lists(self, root: Path, year: Path) -> None:
        (year / "ImageSets" / "Segmentation" / "val.txt").write_text(f"{FIRST}\n")
        with pytest.raises(ConfigError, match=f"{FIRST} is listed twice, in train.txt and val.txt"):
            items(PascalVoc(), root)

    @pytest.mark.parametrize("line", ["../secret", "a\\b", ".hidden"])
    def test_a_line_that_is_no_image_id(self, root: Path, year: Path, line: str) -> None:
        (year / "ImageSets" / "Segmentation" / "val.txt").write_text(f"2007_000033 1\n\n{line}\n")
        with pytest.raises(ConfigError, match=r"line 3 of .*val\.txt"):
            items(PascalVoc(), root)

    def test_several_years_are_refused(self, root: Path) -> None:
        generators.save(root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000032.jpg", generators.photo(0))
        with pytest.raises(ConfigError, match="it holds VOC2007 and VOC2012, give the folder of one"):
            items(PascalVoc(), root)

    def test_other_layouts_are_refused(self, tmp_path: Path) -> None:
        generators.save(tmp_path / "JPEGImages" / "a.jpg", generators.photo(0))
        with pytest.raises(ConfigError, match="is not PASCAL VOC with segmentations"):
            items(PascalVoc(), tmp_path)

    def test_the_colour_map_is_vocs(self) -> None:
        assert color_map().tobytes() == trees.palette()
        assert [tuple(color_map()[c.label_id]) for c in tables.load("pascal-voc").classes] == [
            c.color for c in tables.load("pascal-voc").classes
        ]

    def test_maps_in_colour(self, root: Path, year: Path) -> None:
        plain = sample(PascalVoc(), root, FIRST)
        for folder in ("SegmentationClass", "SegmentationObject"):
            path = year / folder / f"{FIRST}.png"
            Image.open(path).convert("RGB").save(path)
        read = sample(PascalVoc(), root, FIRST)
        assert np.array_equal(read.semantic, plain.semantic) and read.instances == plain.instances

    def test_a_colour_that_voc_lacks(self, root: Path, year: Path) -> None:
        rgb = np.zeros((*trees.SIZE, 3), np.uint8)
        rgb[3, 4] = (1, 2, 3)
        path = year / "SegmentationClass" / f"{FIRST}.png"
        generators.save(path, rgb)
        error = problem(PascalVoc(), root, FIRST)
        assert (error.code, error.uri) == ("unknown-color", str(path))
        assert "(1, 2, 3) at row 3, column 4" in error.problem and "(1 such pixels)" in error.problem

    def test_missing_files(self, root: Path, year: Path) -> None:
        path = year / "SegmentationClass" / f"{FIRST}.png"
        path.unlink()
        error = problem(PascalVoc(), root, FIRST)
        assert (error.code, error.uri) == ("missing-label", str(path))
        (year / "JPEGImages" / f"{FIRST}.jpg").unlink()
        assert problem(PascalVoc(), root, FIRST).code == "missing-image"

    def test_an_object_map_that_is_missing(self, root: Path, year: Path) -> None:
        (year / "SegmentationObject" / f"{FIRST}.png").unlink()
        read = sample(PascalVoc(), root, FIRST)
        assert read.instances is None and read.semantic is not None
        assert [i.code for i in read.issues] == ["missing-instances"]

    def test_a_dataset_without_object_maps(self, root: Path, year: Path) -> None:
        for path in (year / "SegmentationObject").iterdir():
            path.unlink()
        read = sample(PascalVoc(), root, FIRST)
        assert read.instances is None and read.issues == ()

    def test_two_photos_of_one_id(self, root: Path, year: Path) -> None:
        generators.save(year / "JPEGImages" / f"{FIRST}.png", generators.photo(0))
        assert list(items(PascalVoc(), root))[:2] == [FIRST, f"{FIRST}.png"]
        assert problem(PascalVoc(), root, f"{FIRST}.png").code == "duplicate-id"
        assert items(PascalVoc(), root)[f"{FIRST}.png"].split == "train"

    @pytest.mark.parametrize("folder", ["SegmentationClass", "SegmentationObject"])
    def test_a_map_of_another_size(self, root: Path, year: Path, folder: str) -> None:
        trees.save_palette(year / folder / f"{FIRST}.png", np.zeros((24, 30), np.uint8))
        error = problem(PascalVoc(), root, FIRST)
        assert error.code == "size-mismatch" and "30 x 24" in error.problem and folder in error.uri

    def test_an_annotation_of_another_size(self, root: Path, year: Path) -> None:
        path = year / "Annotations" / f"{FIRST}.xml"
        path.write_text(path.read_text().replace("<width>32</width>", "<width>500</width>"))
        error = problem(PascalVoc(), root, FIRST)
        assert (error.code, error.uri) == ("size-mismatch", str(path)) and "500 x 24" in error.problem

    def test_an_unknown_id(self, root: Path, year: Path) -> None:
        trees.save_palette(year / "SegmentationClass" / f"{FIRST}.png", np.full(trees.SIZE, 21, np.uint8))
        error = problem(PascalVoc(), root, FIRST)
        assert error.code == "unknown-label" and "id 21 at row 0, column 0" in error.problem

    def test_an_object_map_of_16_bits(self, root: Path, year: Path) -> None:
        generators.save(year / "SegmentationObject" / f"{FIRST}.png", np.full(trees.SIZE, 256, np.uint16))
        assert "256, above 255" in problem(PascalVoc(), root, FIRST).problem

    def test_objects_without_a_class_or_with_several(self, root: Path, year: Path) -> None:
        classes, objects = np.zeros(trees.SIZE, np.uint8), np.zeros(trees.SIZE, np.uint8)
        objects[:4], objects[8:12] = 1, 2
        classes[8:12], classes[8, :2] = 15, 255
        classes[9, :3] = 7
        trees.save_palette(year / "SegmentationClass" / "2007_000039.png", classes)
        trees.save_palette(year / "SegmentationObject" / "2007_000039.png", objects)
        assert self.issues(root, "2007_000039") == [("no-class", 1), ("mixed-classes", 2)]
        (instance,) = sample(PascalVoc(), root, "2007_000039").instances or ()
        assert (instance.id, instance.category_id, instance.area) == (2, 15, 128.0)

    def test_an_annotation_that_says_another_class(self, root: Path, year: Path) -> None:
        path = year / "Annotations" / f"{FIRST}.xml"
        path.write_text(path.read_text().replace("<name>", "<name>un", 1))
        assert self.issues(root) == [("class-mismatch", 1)]

    @pytest.mark.parametrize(
        "text",
        [
            "<annotation><object>",
            "<annotation><size><width>wide</width></size></annotation>",
            "<annotation><object><difficult>x</difficult></object></annotation>",
            "<annotation><object><bndbox><xmin>nan</xmin></bndbox></object></annotation>",
            '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>',
            '<!DOCTYPE a SYSTEM "http://localhost/a.dtd"><annotation/>',
            "",
        ],
    )
    def test_a_broken_annotation_is_an_issue(self, root: Path, year: Path, text: str) -> None:
        path = year / "Annotations" / f"{FIRST}.xml"
        path.write_text(text)
        read = sample(PascalVoc(), root, FIRST)
        assert [i.code for i in read.issues] == ["bad-annotation"] and str(path) in read.issues[0].message
        assert len(read.instances or ()) == 3 and read.attributes == {}
        assert ("DOCTYPE" in read.issues[0].message) == ("DOCTYPE" in text)

    def test_official_sample(self, shared_data: SharedData) -> None:
        """The real layout in few pixels, with maps in colour, and a list of test without labels."""
        root = shared_data("data/layouts/voc_dataset/voc_dataset1")
        found = items(PascalVoc(), root)
        assert [(k, i.split) for k, i in found.items()] == [("2007_000001", "train"), ("2007_000002", "test")]
        read = sample(PascalVoc(), root, "2007_000001")
        assert np.array_equal(read.semantic, np.full((10, 20), 2))
        assert [(i.id, i.category_id, i.area) for i in read.instances or ()] == [(1, 2, 200.0)]
        assert read.attributes["instances"]["1"] == {
            "name": "cat",
            "pose": "Unspecified",
            "truncated": True,
            "difficult": False,
            "bndbox": [1.0, 2.0, 3.0, 4.0],
        }
        assert [i.code for i in read.issues] == ["class-mismatch"]


def to_60(label: NDArray[Any]) -> NDArray[np.int64]:
    """pascalcontext_layers.py: labels by name, in the order of 59_labels.txt, from 1."""
    full = {c.label_id: c.name.replace(" ", "") for c in tables.load("pascal-context-459").classes}
    renamed = {"table": "diningtable", "bedclothes": "bedcloth", "cloth": "clothes"}
    order = [c.name for c in tables.load("pascal-context-60").classes]
    names = {i: renamed.get(n, n) for i, n in full.items()}
    return np.vectorize(lambda v: order.index(names[v]) if v in trees.MAPPING else 0)(label)


class TestContext:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.pascal_context(tmp_path / "tree")

    def mat(self, root: Path) -> Path:
        return root / "trainval" / f"{CONTEXT_FIRST}.mat"

    def test_ids_splits_and_order(self, root: Path) -> None:
        found = items(PascalContext(), root)
        assert [(i.split, k) for k, i in found.items()] == [(s, i) for s, ids in trees.CONTEXT.items() for i in ids]

    def test_both_label_maps(self, root: Path) -> None:
        seeds = [0, 1, 10, 11]
        for seed, image_id in zip(seeds, (i for ids in trees.CONTEXT.values() for i in ids), strict=True):
            read = sample(PascalContext(), root, image_id)
            label = trees.context_labels(seed)
            assert np.array_equal(read.label_maps["pascal-context-459"], label)
            assert np.array_equal(read.semantic, to_60(label)) and read.semantic is not None
            assert read.semantic.dtype == np.uint8 and len(np.unique(read.semantic)) > 20

    def test_the_png_files_show_the_same(self, root: Path, tmp_path: Path) -> None:
        converted = trees.pascal_context_png(tmp_path / "converted")
        found = items(PascalContext(), converted)
        assert [(k, i.split) for k, i in found.items()] == [
            (k, i.split) for k, i in items(PascalContext(), root).items()
        ]
        for image_id in found:
            mine, theirs = (sample(PascalContext(), r, image_id) for r in (root, converted))
            assert np.array_equal(mine.semantic, theirs.semantic)
            path = converted / "VOCdevkit" / "VOC2010" / "SegmentationClassContext" / f"{image_id}.png"
            assert np.array_equal(theirs.label_maps["SegmentationClassContext"], pixels(path))

    @pytest.mark.parametrize("place", ["VOCdevkit", "VOCdevkit/VOC2010"])
    def test_the_matlab_files_may_lie_with_voc(self, root: Path, place: str) -> None:
        before = list(items(PascalContext(), root))
        (root / "trainval").rename(root / place / "trainval")
        assert list(items(PascalContext(), root)) == before
        assert sample(PascalContext(), root, CONTEXT_FIRST).semantic is not None

    def test_matlab_files_count_where_there_are_both(self, root: Path, tmp_path: Path) -> None:
        png = trees.pascal_context_png(tmp_path / "converted") / "VOCdevkit" / "VOC2010" / "SegmentationClassContext"
        png.rename(root / "VOCdevkit" / "VOC2010" / "SegmentationClassContext")
        assert list(sample(PascalContext(), root, CONTEXT_FIRST).label_maps) == ["pascal-context-459"]

    def test_without_lists(self, root: Path) -> None:
        for path in (root / "VOCdevkit" / "VOC2010" / "ImageSets" / "Main").iterdir():
            path.unlink()
        assert PascalContext().splits(Tree.of(str(root))) == ()
        found = items(PascalContext(), root)
        assert list(found) == sorted(i for ids in trees.CONTEXT.values() for i in ids)
        assert {i.split for i in found.values()} == {""}

    def test_missing_files(self, root: Path) -> None:
        self.mat(root).unlink()
        error = problem(PascalContext(), root, CONTEXT_FIRST)
        assert (error.code, error.uri) == ("missing-label", str(self.mat(root)))
        (root / "VOCdevkit" / "VOC2010" / "JPEGImages" / f"{CONTEXT_FIRST}.jpg").unlink()
        assert problem(PascalContext(), root, CONTEXT_FIRST).code == "missing-image"

    def test_a_matlab_file_without_label_map(self, root: Path) -> None:
        trees.save_mat(self.mat(root), Labels=np.zeros(trees.SIZE, np.uint16))
        error = problem(PascalContext(), root, CONTEXT_FIRST)
        assert error.uri == str(self.mat(root)) and "no variable LabelMap, only Labels" in error.problem

    def test_a_matlab_file_that_is_cut_short(self, root: Path) -> None:
        self.mat(root).write_bytes(self.mat(root).read_bytes()[:200])
        error = problem(PascalContext(), root, CONTEXT_FIRST)
        assert error.uri == str(self.mat(root)) and "cut short" in error.problem

    def test_a_matlab_file_of_version_7_3(self, root: Path) -> None:
        header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + struct.pack("<H", 0x0200) + b"IM"
        self.mat(root).write_bytes(header.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n")
        error = problem(PascalContext(), root, CONTEXT_FIRST)
        assert "7.3 (HDF5)" in error.problem and "save -v7" in error.fix

    @pytest.mark.parametrize(
        ("label", "code", "said"),
        [
            (np.zeros((24, 30), np.uint16), "size-mismatch", "30 x 24"),
            (np.full(trees.SIZE, 460, np.uint16), "unknown-label", "id 460 at row 0, column 0"),
            (np.full(trees.SIZE, -1, np.int16), "bad-label", "not a matrix of ids"),
            (np.full(trees.SIZE, 0.5), "bad-label", "float64"),
            (np.zeros((*trees.SIZE, 3), np.uint8), "bad-label", "(24, 32, 3)"),
            (np.zeros((0, 0), np.uint16), "bad-label", "(0, 0)"),
        ],
    )
    def test_wrong_label_maps(self, root: Path, label: NDArray[Any], code: str, said: str) -> None:
        trees.save_mat(self.mat(root), LabelMap=label)
        error = problem(PascalContext(), root, CONTEXT_FIRST)
        assert (error.code, error.uri) == (code, str(self.mat(root))) and said in error.problem

    def test_label_maps_of_another_integer_type(self, root: Path) -> None:
        trees.save_mat(self.mat(root), LabelMap=np.full(trees.SIZE, 415, np.int32))
        read = sample(PascalContext(), root, CONTEXT_FIRST)
        assert np.array_equal(read.label_maps["pascal-context-459"], np.full(trees.SIZE, 415))

    @pytest.mark.parametrize(
        ("label", "code"),
        [(np.full(trees.SIZE, 60, np.uint8), "unknown-label"), (np.zeros((*trees.SIZE, 3), np.uint8), "label-type")],
    )
    def test_wrong_png_files(self, tmp_path: Path, label: NDArray[Any], code: str) -> None:
        root = trees.pascal_context_png(tmp_path / "tree")
        path = root / "VOCdevkit" / "VOC2010" / "SegmentationClassContext" / f"{CONTEXT_FIRST}.png"
        generators.save(path, label)
        error = problem(PascalContext(), root, CONTEXT_FIRST)
        assert (error.code, error.uri) == (code, str(path))

    def test_voc_without_context_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not PASCAL-Context"):
            items(PascalContext(), trees.pascal_voc(tmp_path / "tree"))
