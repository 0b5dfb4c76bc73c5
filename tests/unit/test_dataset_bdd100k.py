"""BDD100K: ids and order, every label kind against an independent reading, JSON labels, and what can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees_bdd100k as trees
from generators import photo, save
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from segbatch.datasets import bdd100k, bdd100k_frames, bdd100k_masks
from segbatch.datasets import bdd100k_polygons as polygons
from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import Instance, PlanItem, Sample

SEM, INS, PAN = bdd100k.SemanticSegmentation(), bdd100k.InstanceSegmentation(), bdd100k.PanopticSegmentation()
DRIVABLE, LANE = bdd100k.Drivable(), bdd100k.Lane()
ALL = (SEM, INS, PAN, DRIVABLE, LANE)
TRAIN, VAL, TEST = trees.IMAGES.values()
FIRST = TRAIN[0]
H, W = trees.SIZE


def items(dataset: Dataset, root: Path, *splits: str) -> dict[str, PlanItem]:
    return {i.sample_id: i for i in dataset.items(Tree.of(str(root)), splits)}


def sample(dataset: Dataset, root: Path, sample_id: str) -> Sample:
    (found,) = dataset.read(items(dataset, root)[sample_id])
    return found


def problem(dataset: Dataset, root: Path, sample_id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        sample(dataset, root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def codes(found: Sample) -> list[str]:
    return [i.code for i in found.issues]


def grey(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


def mask_of(instance: Instance, size: tuple[int, int] = (H, W)) -> NDArray[np.bool_]:
    found = coco_mask.decode({"size": list(size), "counts": instance.counts})
    return np.asarray(found, bool)


def check_objects(found: Sample, pixels: trees.Rgba) -> None:
    """parse_bitmask, written down again: every id from 1 on is an object of one category and one set of attributes."""
    ids = pixels[..., 2].astype(int) * 256 + pixels[..., 3]
    assert [i.id for i in found.instances or ()] == [i for i in np.unique(ids).tolist() if i]
    for o in found.instances or ():
        where = ids == o.id
        assert np.array_equal(mask_of(o, where.shape), where) and o.area == where.sum()
        assert {o.category_id} == {*pixels[where][:, 0].tolist()}
        (bits,) = {*pixels[where][:, 1].tolist()}
        expected = {"truncated": bits >= 8, "occluded": bits & 4 > 0, "crowd": bits & 2 > 0, "ignored": bits & 1 > 0}
        assert found.attributes["instances"][str(o.id)] == expected and o.iscrowd == expected["crowd"]
        assert list(o.bbox_xywh) == coco_mask.toBbox(coco_mask.encode(np.asfortranarray(where, np.uint8))).tolist()


class TestLayout:
    @pytest.mark.parametrize("dataset", [SEM, PAN, DRIVABLE, LANE], ids=lambda d: d.name)
    def test_images_of_all_splits_in_order_each_its_own_group(self, dataset: Dataset, tmp_path: Path) -> None:
        found = items(dataset, trees.TREES[dataset.name](tmp_path))
        assert list(found) == [*TRAIN, *VAL, *TEST]
        assert [i.split for i in found.values()] == ["train"] * 3 + ["val"] * 2 + ["test"]
        assert all(i.group_id == i.sample_id and i.uri.endswith(f"/{i.sample_id}.jpg") for i in found.values())

    def test_frames_of_videos_are_splits_and_groups_of_their_own(self, tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        assert INS.splits(Tree.of(str(root))) == ("train", "val", "test", "seg_track_train", "seg_track_val")
        found = items(INS, root)
        frames = [f"{v}-000000{n}" for v in (*trees.VIDEOS["train"], *trees.VIDEOS["val"]) for n in (1, 2)]
        assert list(found) == [*TRAIN, *VAL, *TEST, *frames]
        assert [found[f].group_id for f in frames] == [f.rsplit("-", 1)[0] for f in frames]
        assert list(items(INS, root, "seg_track_val")) == frames[4:]

    def test_each_task_knows_its_own_labels(self, tmp_path: Path) -> None:
        for dataset in ALL:
            root = Tree.of(str(trees.TREES[dataset.name](tmp_path / dataset.name)))
            assert [d.name for d in ALL if d.recognises(root)] == [dataset.name]

    def test_color_maps_and_lane_polygons_are_no_labels(self, tmp_path: Path) -> None:
        save(tmp_path / "labels/lane/colormaps/train" / f"{FIRST}.png", photo(1, (H, W)))
        trees.polygons_of(tmp_path, "lane", "train", {FIRST: []})
        assert not LANE.recognises(Tree.of(str(tmp_path)))
        with pytest.raises(ConfigError, match="is not BDD100K with labels of lane") as caught:
            items(LANE, tmp_path)
        assert "labels/lane/masks/train/NAME.png and images/100k/train/NAME.jpg" in caught.value.fix

    @pytest.mark.parametrize("dataset", ALL, ids=lambda d: d.name)
    def test_test_images_have_no_labels(self, dataset: Dataset, tmp_path: Path) -> None:
        found = sample(dataset, trees.TREES[dataset.name](tmp_path), TEST[0])
        assert found.image and not found.issues and not found.label_maps
        assert [found.semantic, found.instances, found.panoptic, found.segments] == [None] * 4

    def test_a_split_without_any_labels_is_not_there(self, tmp_path: Path) -> None:
        root = trees.sem(tmp_path)
        save(root / "images/10k/train/extra.jpg", photo(9, (H, W)))
        for kind in ("masks", "polygons", "rles"):
            (root / "labels/sem_seg" / kind).rename(root / f"gone-{kind}")
        trees.write(root / "labels/sem_seg/rles/sem_seg_val.json", [trees.frame(n, []) for n in VAL])
        assert SEM.splits(Tree.of(str(root))) == ("val", "test")

    def test_what_is_known_of_an_image(self, tmp_path: Path) -> None:
        weather = trees.frame(FIRST, [])["attributes"]
        for dataset in (SEM, DRIVABLE):
            found = sample(dataset, trees.TREES[dataset.name](tmp_path / dataset.name), FIRST)
            assert found.attributes == {**weather, "timestamp": 10000}
        video = sample(INS, trees.ins(tmp_path / "ins"), "b1c81faa-3df17267-0000002").attributes
        assert (video["videoName"], video["frameIndex"], video["scene"]) == ("b1c81faa-3df17267", 1, "city street")
        assert sample(LANE, trees.lane(tmp_path / "lane"), FIRST).attributes == {}

    def test_a_changed_frame_changes_its_own_item(self, tmp_path: Path) -> None:
        root = trees.sem(tmp_path)
        before = items(SEM, root)
        path = root / "labels/sem_seg/polygons/sem_seg_val.json"
        frames = json.loads(path.read_text())
        frames[1]["attributes"]["weather"] = "foggy"
        trees.write(path, frames)
        after = items(SEM, root)
        assert [i for i in after if after[i].etag != before[i].etag] == [VAL[1]]

    def test_a_broken_json_file_is_refused_by_name(self, tmp_path: Path) -> None:
        root = trees.sem(tmp_path)
        (root / "labels/sem_seg/polygons/sem_seg_val.json").write_text('[{"name": "a.jpg"')
        with pytest.raises(ConfigError, match=r"sem_seg_val\.json is cut short"):
            items(SEM, root)

    def test_an_image_that_comes_twice_stays_with_its_reason(self, tmp_path: Path) -> None:
        root = trees.sem(tmp_path)
        save(root / "images/10k/train" / f"{FIRST}.png", photo(1, (H, W)))
        save(root / "images/10k/val" / f"{FIRST}.jpg", photo(2, (H, W)))
        assert len({i.uri for i in items(SEM, root).values()}) == 8
        for twin in (f"train/{FIRST}.png", f"val/{FIRST}"):
            error = problem(SEM, root, twin)
            assert error.code == "duplicate-id" and f"{FIRST}.jpg" in error.problem
        assert sample(SEM, root, FIRST).semantic is not None


class TestPngs:
    def test_semantic(self, tmp_path: Path) -> None:
        root = trees.sem(tmp_path)
        for split in ("train", "val"):
            for name in trees.IMAGES[split]:
                found = sample(SEM, root, name)
                assert found.semantic is not None and not found.issues
                assert np.array_equal(found.semantic, grey(root / f"labels/sem_seg/masks/{split}/{name}.png"))

    def test_drivable(self, tmp_path: Path) -> None:
        root = trees.drivable(tmp_path)
        found = sample(DRIVABLE, root, FIRST).semantic
        assert found is not None and np.array_equal(found, grey(root / f"labels/drivable/masks/train/{FIRST}.png"))

    def test_lanes(self, tmp_path: Path) -> None:
        root = trees.lane(tmp_path)
        found = sample(LANE, root, FIRST)
        value = grey(root / f"labels/lane/masks/train/{FIRST}.png").astype(int)
        lane = value != 255
        bits = {"direction": 32, "style": 16}
        assert lane.any() and found.semantic is not None and not found.issues
        assert np.array_equal(found.semantic, np.where(lane, value % 8, 255)) and {*found.label_maps} == {*bits}
        for name, bit in bits.items():
            assert np.array_equal(found.label_maps[name], np.where(lane, value // bit % 2, 255))

    @pytest.mark.parametrize(("byte", "strange"), [(7, 0), (63, 8), (64 + 7, 1), (8, 1), (254, 1), (255, 0)])
    def test_lane_bits_that_say_nothing_are_left_out_and_counted(self, byte: int, strange: int, tmp_path: Path) -> None:
        root = trees.lane(tmp_path)
        value = np.full((H, W), 255, np.uint8)
        value[5, 3] = byte
        if byte == 63:  # a lane of all bits but the background's, and background of all of them
            value[5, 3:11] = 63
        save(root / f"labels/lane/masks/train/{FIRST}.png", value)
        found = sample(LANE, root, FIRST)
        assert codes(found) == ["lane-bits"] * bool(strange)
        assert not strange or f"{strange} pixels of" in found.issues[0].message

    def test_instances(self, tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        for name in (*TRAIN, *VAL):
            (path,) = root.glob(f"labels/ins_seg/bitmasks/*/{name}.png")
            found = sample(INS, root, name)
            check_objects(found, trees.read_rgba(path))
            assert len(found.instances or ()) == 5 and any(i.id > 255 for i in found.instances or ())
        name = "b1c81faa-3df17267-0000001"
        video = root / "labels/seg_track_20/bitmasks/val/b1c81faa-3df17267"
        check_objects(sample(INS, root, name), trees.read_rgba(video / f"{name}.png"))

    def test_panoptic(self, tmp_path: Path) -> None:
        root = trees.pan(tmp_path)
        found = sample(PAN, root, FIRST)
        pixels = trees.read_rgba(root / f"labels/pan_seg/bitmasks/train/{FIRST}.png")
        ids = pixels[..., 2].astype(int) * 256 + pixels[..., 3]
        assert found.panoptic is not None and found.segments is not None
        assert [s.id for s in found.segments] == [i for i in np.unique(ids).tolist() if i]
        for n, s in enumerate(found.segments, 1):
            where = ids == s.id
            assert np.array_equal(found.panoptic == n, where) and s.area == where.sum()
            assert pixels[where].tolist() == [[s.category_id, pixels[where][0, 1], s.id // 256, s.id % 256]] * int(
                s.area
            )
            extra = found.attributes["segments"][str(s.id)]
            assert s.iscrowd == extra["crowd"] == bool(pixels[where][0, 1] & 2)
        assert np.array_equal(found.panoptic == 0, ids == 0)

    def test_pixels_without_an_object_id_are_background(self, tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        pixels = trees.bitmask([(0, 3, 0, trees.grid(1)), (7, 4, 0, trees.grid(2))])
        save(root / f"labels/ins_seg/bitmasks/train/{FIRST}.png", pixels)
        found = sample(INS, root, FIRST)
        assert [i.id for i in found.instances or ()] == [7] and codes(found) == ["no-object-id"]
        assert "64 pixels of category 3" in found.issues[0].message

    def test_objects_of_unknown_categories_are_left_out(self, tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        pixels = trees.bitmask([(5, 9, 0, trees.grid(1)), (7, 4, 0, trees.grid(2))])
        save(root / f"labels/ins_seg/bitmasks/train/{FIRST}.png", pixels)
        found = sample(INS, root, FIRST)
        assert [i.id for i in found.instances or ()] == [7]
        assert [(i.code, i.annotation_id) for i in found.issues] == [("unknown-category", 5)]

    @pytest.mark.parametrize("other", [(3, 5, 0), (3, 4, 2), (3, 9, 0)])
    def test_an_object_of_two_kinds_is_an_error(self, other: tuple[int, int, int], tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        pixels = trees.bitmask([(3, 4, 0, trees.grid(1)), (*other, trees.grid(2))])
        save(root / f"labels/ins_seg/bitmasks/train/{FIRST}.png", pixels)
        error = problem(INS, root, FIRST)
        assert error.code == "bad-label" and "object 3 of bitmask" in error.problem


class TestWrongFiles:
    """Of every task: ``path`` is the label of the first image."""

    @pytest.fixture(params=ALL, ids=lambda d: d.name)
    def case(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Dataset, Path, Path]:
        dataset: Dataset = request.param
        root = trees.TREES[dataset.name](tmp_path)
        task, folder = dataset.layout.folders[0][2], dataset.layout.png_folder  # type: ignore[attr-defined]
        return dataset, root, root / "labels" / task / folder / "train" / f"{FIRST}.png"

    def test_a_missing_label(self, case: tuple[Dataset, Path, Path]) -> None:
        dataset, root, path = case
        path.unlink()
        error = problem(dataset, root, FIRST)
        assert error.code == "missing-label" and error.uri == str(path)

    def test_a_missing_photo(self, case: tuple[Dataset, Path, Path]) -> None:
        dataset, root, _ = case
        before = items(dataset, root)[FIRST]
        Path(before.uri).unlink()
        error = problem(dataset, root, FIRST)
        assert error.code == "missing-image" and error.uri == before.uri

    def test_labels_without_any_photo_are_read_alone(self, case: tuple[Dataset, Path, Path]) -> None:
        dataset, root, _ = case
        before = sample(dataset, root, FIRST)
        (root / "images").rename(root / "gone")
        found = sample(dataset, root, FIRST)
        assert (found.image, found.image_format) == (None, None) and (found.height, found.width) == (H, W)
        assert codes(found) == ["labels-only"] and found.image_uri == before.image_uri
        assert found.instances == before.instances and found.attributes == before.attributes
        for a, b in ((found.semantic, before.semantic), (found.panoptic, before.panoptic)):
            assert (a is None and b is None) or np.array_equal(np.asarray(a), np.asarray(b))
        assert TEST[0] not in items(dataset, root)

    def test_another_size(self, case: tuple[Dataset, Path, Path]) -> None:
        dataset, root, path = case
        with Image.open(path) as image:
            image.crop((0, 0, W, H - 4)).save(path)
        error = problem(dataset, root, FIRST)
        assert error.code == "size-mismatch" and f"{W} x {H - 4}" in error.problem and f"{W} x {H}" in error.problem

    @pytest.mark.parametrize(("content", "code"), [(b"", "empty-label"), (b"no image", "bad-label")])
    def test_no_image(self, case: tuple[Dataset, Path, Path], content: bytes, code: str) -> None:
        dataset, root, path = case
        path.write_bytes(content)
        assert problem(dataset, root, FIRST).code == code

    def test_cut_off(self, case: tuple[Dataset, Path, Path]) -> None:
        dataset, root, path = case
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert problem(dataset, root, FIRST).code == "bad-label"

    def test_a_color_map(self, case: tuple[Dataset, Path, Path]) -> None:
        dataset, root, path = case
        save(path, photo(1, (H, W)))
        error = problem(dataset, root, FIRST)
        assert error.code == "label-type" and "masks/" in error.fix

    @pytest.mark.parametrize(("dataset", "value"), [(SEM, 19), (SEM, 254), (DRIVABLE, 3), (DRIVABLE, 255)])
    def test_an_unknown_id(self, dataset: Dataset, value: int, tmp_path: Path) -> None:
        root = trees.TREES[dataset.name](tmp_path)
        (path,) = root.glob(f"labels/*/masks/train/{FIRST}.png")
        label = grey(path)
        label[3, 4] = value
        save(path, label)
        error = problem(dataset, root, FIRST)
        assert error.code == "unknown-label" and f"id {value} at row 3, column 4" in error.problem


def half(left: bool) -> NDArray[np.bool_]:
    mask = np.zeros((H, W), bool)
    mask[:, slice(0, W // 2 + 4) if left else slice(W // 2 - 4, W)] = True
    return mask


def read(kind: str, labels: list[dict[str, Any]], size: tuple[int, int] | None = (H, W), **more: Any) -> Any:
    """``bdd100k_frames.KIND`` of a frame with these labels."""
    text = json.dumps({"name": "a.jpg", "labels": labels})
    return getattr(bdd100k_frames, kind)(bdd100k_frames.decode(text, "a.json"), size, "a.json", **more)


def refused(kind: str, labels: list[dict[str, Any]], size: tuple[int, int] | None = (H, W)) -> DataError:
    with pytest.raises(DataError) as caught:
        read(kind, labels, size)
    assert "a.json" in caught.value.problem and caught.value.fix
    return caught.value


class TestFrames:
    def test_later_labels_cover_earlier_ones_and_the_rest_is_void(self) -> None:
        found = read("semantic", [trees.rle_label("a", "car", half(True)), trees.rle_label("b", "sky", half(False))])
        assert np.array_equal(found.semantic[0], [13] * (W // 2 - 4) + [10] * (W // 2 + 4))
        found = read("drivable", [trees.rle_label("a", "direct", half(True))])
        assert np.array_equal(found.semantic[0], [0] * (W // 2 + 4) + [2] * (W // 2 - 4))

    def test_classes_without_a_train_id_are_void_and_unknown_ones_are_named(self) -> None:
        labels = [trees.rle_label(str(i), c, half(True)) for i, c in enumerate(("ego vehicle", "spaceship"))]
        found = read("semantic", labels)
        assert (found.semantic == 255).all()
        assert [(i.code, "'spaceship'" in i.message) for i in found.issues] == [("unknown-category", True)]

    def test_boxes_and_empty_predictions_are_no_masks(self) -> None:
        labels: list[dict[str, Any]] = [
            {"id": 1, "category": "car", "rle": None},
            {"id": "2", "category": "bus", "box2d": {"x1": 1}},
        ]
        assert (read("semantic", labels).semantic == 255).all() and read("instances", labels).instances == ()
        assert read("panoptic", labels).segments == () and not read("panoptic", labels).panoptic.any()

    def test_plain_run_lengths_are_read_too(self) -> None:
        rle = {"counts": [H * 2, H, H * (W - 3)], "size": [H, W]}
        found = read("semantic", [{"id": "1", "category": "road", "rle": rle}]).semantic
        assert np.array_equal(np.flatnonzero((found == 0).all(axis=0)), [2])

    def test_sizes_that_differ_are_errors(self) -> None:
        large = trees.rle_label("x", "car", np.zeros((H, W + 1), bool))
        small = trees.rle_label("y", "car", np.zeros((H, W), bool))
        assert refused("semantic", [large]).code == "size-mismatch"
        error = refused("instances", [small, large], None)
        assert error.code == "size-mismatch" and f"{W + 1} x {H}" in error.problem and f"{W} x {H}" in error.problem

    @pytest.mark.parametrize("counts", ["0", "!", [5]])
    def test_an_rle_that_is_no_mask_of_the_size_is_an_error(self, counts: object) -> None:
        error = refused("instances", [{"id": "q", "category": "car", "rle": {"counts": counts, "size": [H, W]}}])
        assert error.code == "bad-annotation" and "label q of a.jpg" in error.problem

    def test_fields_of_wrong_types_are_errors(self) -> None:
        assert refused("semantic", [{"id": "q", "category": "car", "poly2d": "?"}]).code == "bad-annotation"

    def test_sizes_without_a_photo(self) -> None:
        assert read("semantic", [trees.rle_label("x", "car", half(True))], None).size == (H, W)
        assert read("semantic", [trees.box_label("x", "car", trees.grid(1))], None).size == (720, 1280)
        text = json.dumps({"name": "a.jpg", "size": {"width": 9, "height": 4}})
        assert bdd100k_frames.semantic(bdd100k_frames.decode(text, ""), None, "").size == (4, 9)

    @pytest.mark.parametrize("size", [[0, 5], [-3, 5], [1 << 20, 1 << 20]])
    def test_a_size_that_no_image_has_is_an_error(self, size: list[int]) -> None:
        error = refused("semantic", [{"id": "1", "category": "ground", "rle": {"counts": "", "size": size}}], None)
        assert error.code == "bad-annotation" and f"{size[1]} x {size[0]}" in error.problem

    def test_rle_instances_stay_as_they_are(self) -> None:
        attributes = {"crowd": True, "occluded": 1, "trafficLightColor": "none"}
        labels = [
            trees.rle_label("7", "motor", half(True), score=0.25, attributes=attributes),
            trees.rle_label("3", "other person", half(False)),
            trees.rle_label("9", "car", np.zeros((H, W), bool)),
        ]
        found = read("instances", labels)
        assert [(i.id, i.category_id, i.iscrowd, i.score) for i in found.instances] == [
            (7, 7, True, 0.25),
            (3, 1, False, None),
            (9, 3, False, None),
        ]
        for i, mask in zip(found.instances, (half(True), half(False), np.zeros((H, W), bool)), strict=True):
            assert np.array_equal(mask_of(i), mask) and i.area == mask.sum()
        nothing = dict.fromkeys(("truncated", "occluded", "crowd", "ignored"), False)
        assert found.attributes["instances"] == {
            "7": {**nothing, "occluded": True, "crowd": True},
            "3": {**nothing, "ignored": True},
            "9": nothing,
        }
        assert [(i.code, i.annotation_id) for i in found.issues] == [("zero-area", 9)]

    @pytest.mark.parametrize("ids", [("a", "2"), ("01", "2"), ("2", "2"), ("0", "1"), ("1", "65536"), ("-1", "1")])
    def test_ids_that_no_bitmask_can_have_are_counted(self, ids: tuple[str, str]) -> None:
        found = read("instances", [trees.rle_label(i, "car", half(n == 0)) for n, i in enumerate(ids)])
        assert [i.id for i in found.instances] == [1, 2]
        assert [e.get("scalabel_id") for e in found.attributes["instances"].values()] == [
            None if i == str(n) else i for n, i in enumerate(ids, 1)
        ]

    def test_polygons_cover_each_other_and_a_hidden_object_is_named(self) -> None:
        left, right = (slice(0, H), slice(0, 20)), (slice(0, H), slice(12, W))
        labels = [trees.box_label(str(n + 5), "car", trees.grid(n)) for n in (0, 3)]
        labels += [trees.box_label("7", "truck", left), trees.box_label("8", "bus", right)]
        found = read("instances", labels)
        assert [(i.id, i.category_id, i.bbox_xywh) for i in found.instances] == [
            (3, 4, (0, 0, 12, H)),
            (4, 5, (12, 0, 20, H)),
        ]
        assert [(i.code, i.annotation_id) for i in found.issues] == [("zero-area", 1), ("zero-area", 2)]

    def test_panoptic_labels_of_a_stuff_class_are_one_segment(self) -> None:
        labels = [
            trees.box_label("a", "road", trees.grid(0), attributes={"occluded": True}),
            trees.box_label("b", "car", trees.grid(1)),
            trees.box_label("c", "road", trees.grid(2), attributes={"truncated": True}),
            trees.box_label("d", "person", trees.grid(5), attributes={"crowd": True}),
            trees.box_label("e", "unlabeled", trees.grid(5)),
        ]
        found = read("panoptic", labels)
        assert [(s.id, s.category_id, s.area, s.iscrowd) for s in found.segments] == [
            (7, 7, 128, False),
            (31, 35, 64, False),
            (32, 31, 64, True),
        ]
        assert [found.panoptic[trees.grid(n)].max() for n in (0, 1, 2, 5)] == [1, 2, 1, 3]
        road = found.attributes["segments"]["7"]
        assert road["occluded"] and road["truncated"] and not road["crowd"] and found.issues == ()

    def test_polygons_that_are_wrong_are_named(self) -> None:
        bad = [
            ([[0.0, 0.0], [9.0, 9.0]], "LL", "bad-polygon"),
            ([[0.0, 0.0], [9.0, 9.0], [9.0, 0.0]], "LL", "bad-polygon"),
            ([[0.0, 0.0], [9.0, 9.0], [9.0, 0.0]], "LAL", "bad-polygon"),
            ([[0.0, 0.0], [9.0, 9.0], [9.0, 0.0], [1.0, 1.0]], "LLLC", "bad-polygon"),
            ([[0.0, 0.0], [9.0, 9.0], [9e9, 0.0]], "LLL", "bad-polygon"),
            ([[-9.0, 0.0], [9.0, 9.0], [9.0, 0.0]], "LLL", "outside-image"),
            ([[0.0, 0.0], [9.0, H + 1.0], [9.0, 0.0]], "LLL", "outside-image"),
        ]
        for corners, types, code in bad:
            found = read("semantic", [trees.poly_label("p", "car", corners, types)])
            assert [i.code for i in found.issues] == [code] and "label p of a.jpg in a.json" in found.issues[0].message
            assert (found.semantic == 13).any() == (code == "outside-image")

    def test_a_video_counts_its_tracks(self) -> None:
        def labels(*ids: str, draw: Callable[..., Any]) -> list[dict[str, Any]]:
            shape: Any = trees.grid(1) if draw is trees.box_label else half(True)
            return [draw(i, "car", shape) for i in ids] + [{"id": "box", "category": "car"}]

        def numbers(*frames: list[dict[str, Any]]) -> list[list[int]]:
            texts = [json.dumps({"name": f"{n}.jpg", "labels": f}) for n, f in enumerate(frames)]
            return bdd100k_frames.numbers_of([bdd100k_frames.decode(t, "") for t in texts])

        box, rle = trees.box_label, trees.rle_label
        first, second = labels("00012", "-1", "00007", draw=box), labels("00007", "-1", "00012", "9", draw=box)
        assert numbers(first, [], second) == [[1, 2, 3], [], [3, 4, 1, 5]]
        assert numbers(labels("12", "7", draw=rle), labels("7", draw=rle)) == [[12, 7], [7]]
        assert numbers(labels("12", "7", draw=rle), labels("x", draw=rle)) == [[1, 2], [3]]


class TestJsonTrees:
    """Trees whose labels are JSON alone."""

    def rles(self, root: Path) -> Path:
        trees.sem(root)
        for kind in ("masks", "polygons", "rles"):
            (root / "labels/sem_seg" / kind).rename(root / f"gone-{kind}")
        frames = [trees.frame(n, [trees.rle_label("1", "car", half(n == FIRST))]) for n in TRAIN]
        trees.write(root / "labels/sem_seg/rles/sem_seg_train.json", {"frames": frames, "config": None})
        return root

    def test_frames_are_matched_by_name(self, tmp_path: Path) -> None:
        root = self.rles(tmp_path)
        for name in TRAIN:
            found = sample(SEM, root, name)
            assert found.semantic is not None and np.array_equal(found.semantic == 13, half(name == FIRST))
            assert found.attributes["scene"] == "city street" and not found.issues

    def test_a_photo_without_a_frame_and_a_frame_without_a_photo(self, tmp_path: Path) -> None:
        root = self.rles(tmp_path)
        path = root / "labels/sem_seg/rles/sem_seg_train.json"
        frames = json.loads(path.read_text())["frames"]
        trees.write(path, [*frames[1:], trees.frame("zzz", [])])
        error = problem(SEM, root, FIRST)
        assert (error.code, error.uri) == ("missing-label", str(path)) and FIRST in error.problem
        assert problem(SEM, root, "zzz").code == "missing-image"

    def test_a_frame_that_is_listed_twice(self, tmp_path: Path) -> None:
        root = self.rles(tmp_path)
        path = root / "labels/sem_seg/rles/sem_seg_train.json"
        frames = json.loads(path.read_text())["frames"]
        trees.write(path, [*frames, frames[0]])
        error = problem(SEM, root, FIRST)
        assert error.code == "duplicate-id" and f"{FIRST} is listed twice in {path}" in error.problem

    def test_a_changed_label_changes_its_own_item(self, tmp_path: Path) -> None:
        root = self.rles(tmp_path)
        before = items(SEM, root)
        path = root / "labels/sem_seg/rles/sem_seg_train.json"
        frames = json.loads(path.read_text())["frames"]
        frames[2]["labels"][0]["category"] = "bus"
        trees.write(path, frames)
        after = items(SEM, root)
        assert [i for i in after if after[i].etag != before[i].etag] == [TRAIN[2]]

    def test_only_labels_and_only_polygons(self, tmp_path: Path) -> None:
        labels = [trees.box_label("a", "person", trees.grid(0)), trees.box_label("b", "car", trees.grid(1))]
        trees.polygons_of(tmp_path, "pan_seg", "val", {VAL[0]: labels})
        found = sample(PAN, tmp_path, VAL[0])
        assert (found.height, found.width) == (720, 1280) and codes(found) == ["labels-only"]
        assert [(s.id, s.category_id) for s in found.segments or ()] == [(31, 31), (32, 35)]

    def test_videos_keep_their_ids_over_frames(self, tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        (root / "labels/seg_track_20/bitmasks").rename(root / "gone")
        video = trees.VIDEOS["val"][0]
        ids = (("50", "60"), ("60", "50", "70"))
        frames = [
            trees.frame(
                f"{video}-{n + 1:07d}",
                [trees.box_label(i, "car", trees.grid(k)) for k, i in enumerate(found)],
                videoName=video,
                frameIndex=n,
            )
            for n, found in enumerate(ids)
        ]
        trees.write(root / f"labels/seg_track_20/polygons/val/{video}.json", frames[::-1])
        found = [sample(INS, root, f"{video}-{n:07d}").instances or () for n in (1, 2)]
        assert [[i.id for i in f] for f in found] == [[1, 2], [2, 1, 3]]
        assert sample(INS, root, f"{trees.VIDEOS['train'][0]}-0000001").instances == ()

    def test_a_video_with_a_frame_that_cannot_be_read(self, tmp_path: Path) -> None:
        root = trees.ins(tmp_path)
        (root / "labels/seg_track_20/bitmasks").rename(root / "gone")
        video = trees.VIDEOS["val"][0]
        frames = [trees.frame(f"{video}-{n:07d}", [], videoName=video, frameIndex=n) for n in (1, 2)]
        frames[0]["labels"] = "?"
        trees.write(root / f"labels/seg_track_20/polygons/val/{video}.json", frames)
        assert problem(INS, root, f"{video}-0000001").code == "bad-annotation"
        assert sample(INS, root, f"{video}-0000002").instances == ()


def drawn_by_matplotlib(vertices: list[list[float]], types: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The official converter's drawing: scalabel's poly_to_patch on a figure of the image's size."""
    figure = pytest.importorskip("matplotlib.figure")
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    patches, path = pytest.importorskip("matplotlib.patches"), pytest.importorskip("matplotlib.path")
    height, width = size
    canvas = backend.FigureCanvasAgg(figure.Figure(facecolor="0", figsize=(width / 100, height / 100), dpi=100))
    axes = canvas.figure.add_axes([0, 0, 1, 1])
    axes.axis("off")
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.invert_yaxis()
    codes = [path.Path.LINETO if t == "L" else path.Path.CURVE4 for t in types]
    codes[0] = path.Path.MOVETO
    outline = path.Path([*vertices, vertices[0]], [*codes, path.Path.LINETO])
    axes.add_patch(patches.PathPatch(outline, color=(1, 1, 1), lw=0, antialiased=False, snap=True))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0] > 0


class TestPolygons:
    def draw(self, vertices: list[list[float]], types: str, size: tuple[int, int]) -> NDArray[np.bool_]:
        mask = np.zeros(size, np.uint8)
        polygons.fill(polygons.points_of([(x, y) for x, y in vertices], types), mask)
        return mask > 0

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.data())
    @pytest.mark.long
    def test_they_are_drawn_as_the_official_converter_draws_them(self, data: st.DataObject) -> None:
        width, height = data.draw(st.sampled_from([(1280, 720), (64, 40)]))
        pieces = data.draw(st.lists(st.sampled_from(["L", "CCC"]), min_size=2, max_size=6))
        types = "L" + "".join(pieces) + data.draw(st.sampled_from(["", "CC"]))
        coordinate = st.one_of(st.floats(-0.3, 1.3), st.sampled_from([0.0, 0.5, 1.0]))
        points = data.draw(st.lists(st.tuples(coordinate, coordinate), min_size=len(types), max_size=len(types)))
        vertices = [[x * width, y * height] for x, y in points]
        size = (height, width)
        if len(types) > 2:
            assert np.array_equal(self.draw(vertices, types, size), drawn_by_matplotlib(vertices, types, size))

    @pytest.mark.parametrize(
        ("vertices", "types"),
        [
            ([[2, 2], [2, 2], [20, 2], [20, 2]], "LCCC"),
            ([[2, 2], [30, 2], [-9, 2], [20, 2], [9, 30]], "LCCCL"),
            ([[2, 2], [2, 30], [2, 9], [2, 2], [9, 30]], "LCCCL"),
            ([[2, 2], [30, 30], [30, 30], [2, 2]], "LCCC"),
            ([[2, 2], [2, 30], [30, 16], [60, 2], [9, 30]], "LCCCL"),
            ([[2, 2], [9, 30], [60, 2]], "LCC"),
            ([[5, 5], [55, 5], [55, 35], [5, 35], [5, 5], [40, 20], [20, 10]], "LLLLLLL"),
        ],
    )
    def test_curves_whose_points_lie_on_a_line_or_on_each_other(self, vertices: list[list[float]], types: str) -> None:
        assert np.array_equal(self.draw(vertices, types, (40, 64)), drawn_by_matplotlib(vertices, types, (40, 64)))

    def test_a_rectangle_has_its_own_pixels_to_the_nearest_whole_one(self) -> None:
        found = self.draw([[3.4, 2.5], [9.5, 2.5], [9.5, 7.49], [3.4, 7.49]], "LLLL", (10, 12))
        rows, columns = np.nonzero(found)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 6, 3, 9) and found.sum() == 4 * 7

    def test_what_lies_outside_is_cut_off(self) -> None:
        square = [[-1e8, -1e8], [1e8, -1e8], [1e8, 1e8], [-1e8, 1e8]]
        assert self.draw(square, "LLLL", (10, 12)).all()
        assert not self.draw([[13, y] if x < 0 else [x, y] for x, y in square], "LLLL", (10, 12)).any()


def test_lane_bytes_are_written_as_they_were_read(tmp_path: Path) -> None:
    value = np.full((H, W), 255, np.uint8)
    value.ravel()[:32] = [c | s << 4 | d << 5 for c in range(8) for s in (0, 1) for d in (0, 1)]
    save(tmp_path / "a.png", value)
    found = bdd100k_masks.read_lanes(str(tmp_path / "a.png"))
    assert found.semantic is not None
    (tmp_path / "b.png").write_bytes(bdd100k_masks.write_lanes(found.semantic, found.label_maps))
    assert np.array_equal(grey(tmp_path / "b.png"), value)
