"""SKU-110K: boxes as they stand in the CSV files or in Supervisely's, and every way in which one is wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from generators import photo, save
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from trees_sku110k import BOXES, SIZE, csv_line, project, sku110k, supervisely

from segbatch import storage
from segbatch.codecs import rle
from segbatch.datasets import registry
from segbatch.datasets.sku110k import Sku110k
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

BY_NAME = ["train_0", "train_10", "train_2", "val_0", "test_1"]


def items(root: Path, *splits: str) -> list[PlanItem]:
    return list(Sku110k().items(Tree.of(str(root)), splits))


def read(root: Path, sample_id: str) -> Sample:
    (sample,) = Sku110k().read(next(i for i in items(root) if i.sample_id == sample_id))
    return sample


def error(root: Path, sample_id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read(root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def mask(box: tuple[float, ...], size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    x1, y1, x2, y2 = (max(int(c), 0) for c in box)
    found = np.zeros(size, bool)
    found[y1:y2, x1:x2] = True
    return found


def check_boxes(sample: Sample, boxes: list[tuple[float, ...]], size: tuple[int, int] = SIZE) -> None:
    assert sample.instances is not None and len(sample.instances) == len(boxes)
    for instance, (x1, y1, x2, y2) in zip(sample.instances, boxes, strict=True):
        assert instance.bbox_xywh == (x1, y1, x2 - x1, y2 - y1) and instance.category_id == 1
        assert instance.area == max(x2 - x1, 0) * max(y2 - y1, 0) and not instance.iscrowd and instance.score is None
        np.testing.assert_array_equal(rle.decode(instance.counts, *size), mask((x1, y1, x2, y2), size))


def annotations(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"annotations_{split}.csv"


def write_boxes(root: Path, *lines: str) -> None:
    """Give ``val_0`` these lines."""
    annotations(sku110k(root), "val").write_text("".join(lines))


def test_photos_come_in_the_order_of_the_lists(tmp_path: Path) -> None:
    found = items(sku110k(tmp_path))
    assert [i.sample_id for i in found] == list(BOXES)
    assert [i.split for i in found] == ["train"] * 3 + ["val", "test"]
    assert Sku110k().splits(Tree.of(str(tmp_path))) == ("train", "val", "test")
    assert [i.sample_id for i in items(tmp_path, "test", "val")] == ["val_0", "test_1"]


def test_boxes_become_instances(tmp_path: Path) -> None:
    sku110k(tmp_path)
    for stem, boxes in BOXES.items():
        sample = read(tmp_path, stem)
        check_boxes(sample, list(boxes))
        assert [i.id for i in sample.instances or ()] == list(range(1, len(boxes) + 1))
        assert sample.attributes == {"boxes_only": True} and sample.issues == () and sample.semantic is None
        assert sample.image == (tmp_path / "images" / f"{stem}.jpg").read_bytes()


@given(st.lists(st.tuples(*[st.integers(0, n) for n in (32, 24, 32, 24)]), max_size=6))
def test_any_boxes(tmp_path_factory: pytest.TempPathFactory, boxes: list[tuple[int, int, int, int]]) -> None:
    root = tmp_path_factory.mktemp("sku")
    write_boxes(root, *(csv_line("val_0.jpg", b) for b in [(0, 0, 1, 1), *boxes]))
    sample = read(root, "val_0")
    check_boxes(sample, [(0, 0, 1, 1), *boxes])
    empty = [n for n, (x1, y1, x2, y2) in enumerate(boxes, 2) if x2 <= x1 or y2 <= y1]
    assert [(i.code, i.annotation_id) for i in sample.issues] == [("zero-area", n) for n in empty]


def test_lines_in_any_order_with_a_header_and_foreign_line_ends(tmp_path: Path) -> None:
    sku110k(tmp_path)
    first, second = ("\ufeffimage_name,x1,y1,x2,y2,class,image_width,image_height\r\n", "\r\n")
    lines = [
        csv_line("train_2.jpg", (1, 1, 3, 3)),
        csv_line('"images/train_0.jpg"', (2, 2, 4, 4)),
        csv_line("train_2.JPG", (5, 5, 9, 9)),
        csv_line(r"images\train_10.jpg", (1.0, 2.5, 3, 4)),
    ]
    annotations(tmp_path).write_bytes((first + second.join(line.strip() for line in lines)).encode())
    assert [i.sample_id for i in items(tmp_path, "train")] == ["train_2", "train_0", "train_10"]
    check_boxes(read(tmp_path, "train_2"), [(1, 1, 3, 3), (5, 5, 9, 9)])
    check_boxes(read(tmp_path, "train_0"), [(2, 2, 4, 4)])
    (half,) = read(tmp_path, "train_10").instances or ()
    assert half.bbox_xywh == (1, 2.5, 2, 1.5) and half.area == 3


def test_boxes_that_reach_out_of_the_image_are_clipped(tmp_path: Path) -> None:
    boxes = [(28, 20, 40, 30), (-5, -5, 3, 3), (100, 0, 200, 10), (0, 0, 32, 24), (-1e7, 3, 1e7, 4)]
    write_boxes(tmp_path, *(csv_line("val_0.jpg", b) for b in boxes))
    sample = read(tmp_path, "val_0")
    check_boxes(sample, boxes)
    assert [(i.code, i.annotation_id) for i in sample.issues] == [("outside-image", n) for n in (1, 2, 3, 5)]
    assert "box 1 of val_0" in sample.issues[0].message and "annotations_val.csv" in sample.issues[0].message


def test_boxes_without_area_are_kept_empty(tmp_path: Path) -> None:
    boxes = [(5, 5, 5, 9), (9, 9, 4, 12), (1, 1, 2, 2)]
    write_boxes(tmp_path, *(csv_line("val_0.jpg", b) for b in boxes))
    sample = read(tmp_path, "val_0")
    check_boxes(sample, boxes)
    assert [rle.area(i.counts) for i in sample.instances or ()] == [0, 0, 1]
    assert [i.code for i in sample.issues] == ["zero-area", "zero-area"]


def test_lines_that_are_no_boxes_are_left_out_and_told(tmp_path: Path) -> None:
    write_boxes(
        tmp_path,
        csv_line("val_0.jpg", (1, 1, 2, 2)),
        "val_0.jpg,1,2,3\n",
        "val_0.jpg,1,2,three,4,object,32,24\n",
        "val_0.jpg,1,2,nan,4,object,32,24\n",
        "val_0.jpg,1,2,1e300,4,object,32,24\n",
        "\n",
        csv_line("val_0.jpg", (1, 1, 2, 2), "shelf"),
        csv_line("val_0.jpg", (3, 3, 4, 4)),
    )
    sample = read(tmp_path, "val_0")
    check_boxes(sample, [(1, 1, 2, 2), (3, 3, 4, 4)])
    assert [(i.code, i.annotation_id) for i in sample.issues] == [
        *(("bad-annotation", n) for n in (2, 3, 4, 5)),
        ("unknown-category", 6),
    ]
    assert "(1,2,three,4,object,32,24)" in sample.issues[1].message and "'shelf'" in sample.issues[4].message


def test_a_size_other_than_the_photos_is_an_error(tmp_path: Path) -> None:
    write_boxes(tmp_path, csv_line("val_0.jpg", (1, 1, 2, 2)), "val_0.jpg,1,1,2,2,object,24,32\n")
    found = error(tmp_path, "val_0")
    assert found.code == "size-mismatch" and "24 x 32, the photo is 32 x 24" in found.problem
    assert "box 2 of val_0" in found.problem and str(annotations(tmp_path, "val")) in found.problem


def test_a_photo_without_boxes_and_boxes_without_a_photo_stay_rows(tmp_path: Path) -> None:
    sku110k(tmp_path)
    save(tmp_path / "images" / "train_7.jpg", photo(7, SIZE))
    save(tmp_path / "images" / "poster.jpg", photo(8, SIZE))
    (tmp_path / "images" / "train_10.jpg").unlink()
    assert [i.sample_id for i in items(tmp_path)] == [*BY_NAME[:3], "train_7", *BY_NAME[3:], "poster"]
    assert "poster" not in [i.sample_id for s in ("train", "val", "test") for i in items(tmp_path, s)]
    for sample_id in ("train_7", "poster"):
        found = error(tmp_path, sample_id)
        assert found.code == "missing-label" and f"images/{sample_id}.jpg" in found.problem
    found = error(tmp_path, "train_10")
    assert found.code == "missing-image" and "images/train_10.jpg" in found.problem


def test_a_photo_in_two_lists(tmp_path: Path) -> None:
    sku110k(tmp_path)
    annotations(tmp_path, "val").write_text(csv_line("train_0.jpg", (1, 1, 2, 2)) + csv_line("val_0.jpg", (1, 1, 2, 2)))
    assert [i.sample_id for i in items(tmp_path)] == [*BY_NAME[:3], "val/train_0", *BY_NAME[3:]]
    assert items(tmp_path, "val")[0].sample_id == "val/train_0"
    found = error(tmp_path, "val/train_0")
    assert found.code == "duplicate-id" and str(annotations(tmp_path)) in found.problem
    check_boxes(read(tmp_path, "train_0"), list(BOXES["train_0"]))


def test_lists_of_ones_own_decide_about_splits(tmp_path: Path) -> None:
    sku110k(tmp_path)
    annotations(tmp_path, "val").write_text(csv_line("train_2.jpg", (1, 1, 2, 2)))
    annotations(tmp_path).write_text(csv_line("train_0.jpg", (1, 1, 2, 2)))
    assert [i.sample_id for i in items(tmp_path, "val")] == ["train_2", "val_0"]
    assert [i.sample_id for i in items(tmp_path, "train")] == ["train_0", "train_10"]


def test_two_photos_of_one_name(tmp_path: Path) -> None:
    sku110k(tmp_path)
    save(tmp_path / "images" / "val_0.png", photo(1, SIZE))
    assert items(tmp_path, "val")[-1].sample_id == "val_0.png"
    assert error(tmp_path, "val_0.png").code == "duplicate-id"


def test_a_changed_list_changes_the_photos_whose_boxes_changed(tmp_path: Path) -> None:
    before = {i.sample_id: i.etag for i in items(sku110k(tmp_path))}
    text = annotations(tmp_path).read_text()
    annotations(tmp_path).write_text(text.replace("train_10.jpg,30,20,31,21", "train_10.jpg,30,20,31,22"))
    after = {i.sample_id: i.etag for i in items(tmp_path)}
    assert [s for s in before if before[s] != after[s]] == ["train_10"]


def test_every_list_is_read_once_and_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    whole = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: asked.append(uri) or whole(uri))
    items(sku110k(tmp_path))
    assert sorted(asked) == sorted(str(annotations(tmp_path, s)) for s in ("train", "val", "test"))


@pytest.mark.parametrize(("line", "said"), [(",1,2,3,4,object,32,24\n", "names no image"), ("\xff\xfe,1\n", "UTF-8")])
def test_lists_that_cannot_be_read_are_refused(tmp_path: Path, line: str, said: str) -> None:
    path = annotations(sku110k(tmp_path))
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"line 7 of {path}.*{said}"):
        items(tmp_path)


def test_names_in_lists_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret.jpg", photo(1, SIZE))
    sku110k(tmp_path / "sku")
    annotations(tmp_path / "sku", "val").write_text(csv_line("../../secret.jpg", (1, 1, 2, 2)))
    (item, _) = items(tmp_path / "sku", "val")
    assert item.uri == str(tmp_path / "sku" / "images" / "secret.jpg")
    assert error(tmp_path / "sku", "secret").code == "missing-image"


# -- Supervisely -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders", [False, True])
def test_supervisely_projects(tmp_path: Path, folders: bool) -> None:
    found, tree = registry.find("sku110k", str(project(tmp_path, folders)))
    assert found.recognises(tree) and found.splits(tree) == ("train", "val", "test")
    listed = list(found.items(tree, ()))
    assert [(i.sample_id, i.split) for i in listed] == [(s, s.split("_")[0]) for s in BY_NAME]
    for item in listed:
        (sample,) = found.read(item)
        check_boxes(sample, list(BOXES[item.sample_id]))
        assert [i.id for i in sample.instances or ()] == [96269139 - n for n in range(len(BOXES[item.sample_id]))]
        assert sample.attributes == {"boxes_only": True} and sample.issues == ()
    assert [i for s in found.splits(tree) for i in found.items(tree, (s,))] == listed


def annotate(root: Path, document: Any) -> Path:
    """Give ``val_0`` of a Supervisely project this annotation."""
    path = project(root) / "ann" / "val_0.jpg.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_supervisely_objects_that_are_no_boxes(tmp_path: Path) -> None:
    document = supervisely([(1, 1, 3, 3), (2, 2, 4, 4), (3, 3, 5, 5), (4, 4, 6, 6), (7, 7, 9, 9), (8, 8, 9, 9)], 6)
    objects = document["objects"]
    objects[0]["geometryType"] = "polygon"
    objects[1]["points"]["exterior"] = [[4, 4], [2, 2]]  # corners the other way round
    objects[2]["classTitle"] = "shelf"
    objects[3]["id"] = 0
    objects[4]["id"] = 5
    objects[5]["points"] = None
    path = annotate(tmp_path, document)
    sample = read(tmp_path, "val_0")
    check_boxes(sample, [(2, 2, 4, 4), (4, 4, 6, 6), (7, 7, 9, 9)])
    assert [i.id for i in sample.instances or ()] == [5, 6, 7]
    assert [(i.code, i.annotation_id) for i in sample.issues] == [
        ("bad-annotation", None),
        ("bad-annotation", None),
        ("id-renumbered", 6),
        ("duplicate-id", 7),
        ("unknown-category", 4),
    ]
    assert all(str(path) in i.message for i in sample.issues) and "object 6" in sample.issues[1].message


@pytest.mark.parametrize("document", ["", "[1, 2", "[]", "{}", {"size": {"width": 32, "height": 24}}, {"size": 3}])
def test_supervisely_documents_that_are_none(tmp_path: Path, document: Any) -> None:
    path = annotate(tmp_path, document)
    found = error(tmp_path, "val_0")
    assert found.code == "bad-annotation" and str(path) in found.problem


def test_supervisely_sizes_and_partners(tmp_path: Path) -> None:
    document = supervisely([(1, 1, 3, 3)])
    document["size"] = {"width": 24, "height": 32}
    annotate(tmp_path, document)
    found = error(tmp_path, "val_0")
    assert found.code == "size-mismatch" and "24 x 32, the photo is 32 x 24" in found.problem
    (tmp_path / "ann" / "train_0.jpg.json").unlink()
    (tmp_path / "img" / "test_1.jpg").unlink()
    assert [i.sample_id for i in items(tmp_path)] == BY_NAME
    assert error(tmp_path, "train_0").code == "missing-label"
    assert error(tmp_path, "test_1").code == "missing-image"


def test_other_supervisely_projects_are_not_sku110k(tmp_path: Path) -> None:
    save(tmp_path / "img" / "cat.jpg", photo(1, SIZE))
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "cat.jpg.json").write_text(json.dumps(supervisely([(1, 1, 3, 3)])))
    assert not Sku110k().recognises(Tree.of(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"expected images/ and annotations/annotations_train\.csv"):
        items(tmp_path)


def test_real_photos(shared_data: Any) -> None:
    source = shared_data("data/sku110k")
    found, tree = registry.find("sku110k", str(source))
    listed = list(found.items(tree, ()))
    assert found.recognises(tree) and [i.sample_id for i in listed] == sorted(p.stem for p in source.glob("img/*.jpg"))
    for item in listed:
        (sample,) = found.read(item)
        document = json.loads((source / "ann" / f"{item.sample_id}.jpg.json").read_text())
        boxes = [(*o["points"]["exterior"][0], *o["points"]["exterior"][1]) for o in document["objects"]]
        size = (document["size"]["height"], document["size"]["width"])
        assert (sample.height, sample.width) == size and len(boxes) > 100 and item.split == "val"
        assert sample.instances is not None
        assert [i.id for i in sample.instances] == [o["id"] for o in document["objects"]]
        assert [i.bbox_xywh for i in sample.instances] == [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]
        masks = [{"size": size, "counts": i.counts} for i in sample.instances]
        areas = pycocotools.mask.area(masks)  # a mask that fills its smallest box is that box
        np.testing.assert_array_equal(pycocotools.mask.toBbox(masks), [i.bbox_xywh for i in sample.instances])
        np.testing.assert_array_equal(areas, [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes])
        assert [i.area for i in sample.instances] == areas.tolist()


def test_real_boxes_as_csv_are_the_same(tmp_path: Path, shared_data: Any) -> None:
    source = shared_data("data/sku110k")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(source / "img")
    with (tmp_path / "annotations" / "annotations_val.csv").open("w", newline="") as file:
        for path in sorted(source.glob("ann/*.json")):
            document = json.loads(path.read_text())
            size = (document["size"]["width"], document["size"]["height"])
            for entry in document["objects"]:
                (x1, y1), (x2, y2) = entry["points"]["exterior"]
                csv.writer(file).writerow([path.stem, x1, y1, x2, y2, "object", *size])
    for item in items(tmp_path):
        (sample,) = Sku110k().read(item)
        theirs = read(source, item.sample_id)
        assert sample.instances is not None and theirs.instances is not None and sample.issues == theirs.issues == ()
        for mine, other in zip(sample.instances, theirs.instances, strict=True):
            assert (mine.bbox_xywh, mine.counts, mine.area) == (other.bbox_xywh, other.counts, other.area)
