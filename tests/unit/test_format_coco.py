"""COCO's formats: what the official tools read, scored against itself; round trips; wrong files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees_coco as trees
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trees_cityscapes import truth

from segbatch.codecs import rle
from segbatch.datasets import coco_form, tables
from segbatch.datasets.camvid import CLASSES as CAMVID
from segbatch.datasets.coco import CocoInstances, CocoPanoptic
from segbatch.datasets.coco_stuff import CocoStuff
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats import coco_panoptic, coco_stuff
from segbatch.formats.base import Format, Labels, SampleRef
from segbatch.formats.coco import CocoDataset, CocoResults
from segbatch.formats.files import tree_of
from segbatch.formats.registry import format_of
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Segment
from segbatch.stages.exporting import Folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

SharedData = Callable[[str], Path]
THINGS, STUFF = tables.load("coco-instances"), tables.load("coco-stuff")
PANOPTIC = tables.load("coco-panoptic")
PERFECT = pytest.approx([1, 1, 1], abs=1e-12)  # pycocotools divides by a little more than it should


def write(form: Format, rows: list[Labels], folder: Path, classes: ClassTable) -> Path:
    form.write(iter(rows), classes, Folder(str(folder), 2))
    return folder


def planned(form: Format, folder: Path, rows: list[Labels], classes: ClassTable) -> list[PlanItem]:
    samples = [SampleRef(r.sample_id, r.image_uri, "tag", r.height, r.width, r.group_id, r.split) for r in rows]
    return list(form.items(tree_of(str(folder)), samples, classes))


def read(form: Format, item: PlanItem) -> Prediction:
    (found,) = form.read(item)
    return found


def imported(form: Format, folder: Path, rows: list[Labels], classes: ClassTable) -> list[Prediction]:
    return [read(form, i) for i in planned(form, folder, rows, classes)]


def problem(form: Format, item: PlanItem) -> DataError:
    with pytest.raises(DataError) as caught:
        read(form, item)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def average_precision(truth_file: Path, results: Path) -> list[float]:
    """AP, AP50 and AP75 of segmentation by pycocotools."""
    api = COCO(str(truth_file))
    evaluation = COCOeval(api, api.loadRes(str(results)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(v) for v in evaluation.stats[:3]]


@pytest.mark.parametrize("name", ["coco", "coco-dataset", "coco-panoptic", "coco-stuff"])
def test_it_is_registered(name: str) -> None:
    assert format_of(name).name == name


class TestResults:
    form = CocoResults()

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.coco_instances(tmp_path / "tree")

    @pytest.fixture
    def rows(self, root: Path) -> list[Labels]:
        return truth(CocoInstances(), root, "val2017")

    def one(self, folder: Path, content: Any, rows: list[Labels]) -> list[PlanItem]:
        return planned(self.form, trees.write_json(folder / "a.json", content), rows, THINGS)

    def test_the_file_is_what_the_server_takes(self, rows: list[Labels], tmp_path: Path) -> None:
        predicted = [replace(i, score=0.25) for i in rows[0].instances or ()]
        rows[0] = replace(rows[0], instances=tuple(predicted), is_truth=False)
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        (file,) = folder.rglob("*.*")
        assert file.name == "detections_val2017_segbatch_results.json"
        entries = load(file)
        assert [list(e) for e in entries] == [["image_id", "category_id", "segmentation", "score"]] * 4
        for entry, instance in zip(entries, predicted, strict=True):
            assert (entry["image_id"], entry["category_id"]) == (139, instance.category_id) and entry["score"] == 0.25
            assert entry["segmentation"] == {"size": [24, 32], "counts": instance.counts.decode()}

    def test_ground_truth_comes_back_and_images_without_objects_are_not_missing(
        self, rows: list[Labels], tmp_path: Path
    ) -> None:
        again = imported(self.form, write(self.form, rows, tmp_path / "out", THINGS), rows, THINGS)
        for row, found in zip(rows, again, strict=True):
            assert [(i.category_id, i.counts) for i in found.instances or ()] == [
                (i.category_id, i.counts) for i in row.instances or ()
            ]
            assert [i.id for i in found.instances or ()] == list(range(1, len(row.instances or ()) + 1))
            assert all(i.score == 1.0 and i.area == rle.area(i.counts) for i in found.instances or ())
        assert again[1].instances == ()

    def test_ground_truth_against_itself_is_perfect(self, root: Path, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        results = folder / "detections_val2017_segbatch_results.json"
        assert average_precision(root / "annotations" / "instances_val2017.json", results) == PERFECT

    def test_splits_have_files_of_their_own_and_no_rows_an_empty_one(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoInstances(), root)
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        assert sorted(p.name for p in folder.iterdir()) == [
            "detections_train2017_segbatch_results.json",
            "detections_val2017_segbatch_results.json",
        ]
        assert len(imported(self.form, folder, rows, THINGS)) == 5
        empty = write(self.form, [], tmp_path / "empty", THINGS)
        assert load(empty / "detections_segbatch_results.json") == []
        assert [p.instances for p in imported(self.form, empty, rows, THINGS)] == [()] * 5

    def test_image_ids_are_numbers_where_the_sample_is_called_by_one(self) -> None:
        given = ["139", "0139", "test2017/000000000001.jpg", "COCO_val2014_000000000042", "a/frame_7", "139.5", "a#139"]
        expected = [139, "0139", 1, 42, "a/frame_7", "139.5", "a#139"]
        assert [coco_form.image_id_of(i) for i in given] == expected

    def test_two_samples_of_one_image_id_are_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        twins = [rows[0], replace(rows[0], sample_id="000000000139.jpg")]
        with pytest.raises(ConfigError, match=r"139 and 000000000139.jpg both have COCO's image id 139"):
            write(self.form, twins, tmp_path / "out", THINGS)
        folder = write(self.form, rows, tmp_path / "one", THINGS)
        with pytest.raises(ConfigError, match="both have COCO's image id"):
            planned(self.form, folder, twins, THINGS)

    def test_polygons_and_plain_runs_are_read_and_boxes_kept(self, rows: list[Labels], tmp_path: Path) -> None:
        shapes = [[[2, 3, 12.5, 3, 9, 14]], {"size": [24, 32], "counts": [48, 24, 696]}]
        entries = [{"image_id": 139, "category_id": 3, "segmentation": s, "score": 0.5} for s in shapes]
        entries[0]["bbox"] = [1, 2, 3, 4]
        first, second = read(self.form, self.one(tmp_path, entries, rows)[0]).instances or ()
        for found, shape in zip((first, second), shapes, strict=True):
            assert np.array_equal(rle.decode(found.counts, 24, 32), trees.drawn(shape)) and found.score == 0.5
        assert first.bbox_xywh == (1, 2, 3, 4) and first.area == rle.area(first.counts)
        assert second.bbox_xywh == (2, 0, 1, 24) and second.area == 24

    @pytest.mark.parametrize(
        ("change", "code", "words"),
        [
            ({"segmentation": {"size": [32, 24], "counts": [768]}}, "size-mismatch", "24 x 32"),
            ({"segmentation": {"size": [24, 32], "counts": "zz~"}}, "bad-annotation", "result 2 of image 139"),
            ({"segmentation": "mask"}, "bad-annotation", "segmentation"),
            ({"score": "high"}, "bad-annotation", "score"),
            ({"segmentation": None, "bbox": [0, 0, 1, 1]}, "bad-annotation", "box without a mask"),
        ],
    )
    def test_wrong_results_are_named(
        self, rows: list[Labels], tmp_path: Path, change: dict[str, Any], code: str, words: str
    ) -> None:
        good = {"image_id": 139, "category_id": 3, "segmentation": [[2, 3, 12, 3, 9, 14]], "score": 0.5}
        first, second = self.one(tmp_path, [good, {**good, **change}], rows)
        error = problem(self.form, first)
        assert error.code == code and words in error.problem and "a.json" in error.problem
        assert read(self.form, second).instances == ()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"category_id": 66}, "category 66 .*image 139"),
            ({"image_id": 7}, "1 predictions for images that are not among the samples: 7"),
            ({"image_id": "139"}, "not among the samples: 139"),
            ({"segmentation": "drop"}, "boxes without masks"),
            ({"score": "drop"}, r"no scores \(import a whole dataset as coco-dataset"),
        ],
    )
    def test_files_that_do_not_fit_are_refused_before_work(
        self, rows: list[Labels], tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        entry = {"image_id": 139, "category_id": 3, "segmentation": [[2, 3, 12, 3, 9, 14]], "score": 0.5, **change}
        with pytest.raises(ConfigError, match=words):
            self.one(tmp_path, [{k: v for k, v in entry.items() if v != "drop"}], rows)

    def test_two_files_for_one_image_are_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        shutil.copy(folder / "detections_val2017_segbatch_results.json", folder / "other_results.json")
        with pytest.raises(ConfigError, match=r"both say what is in image 139 \(give the one file"):
            planned(self.form, folder, rows, THINGS)
        assert imported(self.form, folder / "other_results.json", rows, THINGS)

    def test_a_folder_without_json_is_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="holds no JSON file"):
            planned(self.form, tmp_path / "empty", rows, THINGS)

    def test_only_changed_results_have_another_tag(self, rows: list[Labels], tmp_path: Path) -> None:
        rows = [rows[0], replace(rows[1], instances=rows[0].instances)]
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        before = planned(self.form, folder, rows, THINGS)
        (file,) = folder.iterdir()
        file.write_text(json.dumps(load(file)[:-1], separators=(",", ":")))
        after = planned(self.form, folder, rows, THINGS)
        assert [a.etag == b.etag for a, b in zip(before, after, strict=True)] == [True, False]

    def test_coco_tiny_against_itself_is_perfect(self, shared_data: SharedData, tmp_path: Path) -> None:
        root = shared_data("data/coco_tiny")
        folder = write(self.form, truth(CocoInstances(), root), tmp_path / "out", THINGS)
        results = folder / "detections_train2017_segbatch_results.json"
        assert average_precision(root / "annotations" / "instances_train2017.json", results) == PERFECT

    def test_the_official_example_results_keep_their_published_figures(
        self, shared_data: SharedData, tmp_path: Path
    ) -> None:
        root = shared_data("data/coco_val2014_100")
        rows = truth(CocoInstances(), root)
        given = root / "instances_val2014_fakesegm100_results.json"
        found = imported(self.form, given, rows, THINGS)
        by_image = {r.sample_id: p.instances or () for r, p in zip(rows, found, strict=True)}
        assert sum(map(len, by_image.values())) == len(load(given)) == 734
        for entry in load(given):
            mine, *rest = by_image[str(entry["image_id"])]
            by_image[str(entry["image_id"])] = tuple(rest)
            assert (mine.category_id, mine.score) == (entry["category_id"], entry["score"])
            assert mine.counts.decode() == entry["segmentation"]["counts"]
        predicted = [replace(r, instances=p.instances, is_truth=False) for r, p in zip(rows, found, strict=True)]
        folder = write(self.form, predicted, tmp_path / "out", THINGS)
        (again,) = folder.iterdir()
        figures = average_precision(root / "instances_val2014_100.json", again)
        assert [round(f, 3) for f in figures] == [0.320, 0.562, 0.299]
        with pytest.raises(ConfigError, match=r"fakebbox100_results.json holds boxes without masks"):
            planned(self.form, root / "instances_val2014_fakebbox100_results.json", rows, THINGS)


class TestDataset:
    form = CocoDataset()

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.coco_instances(tmp_path / "tree")

    def test_what_is_exported_is_ingested_as_it_was(self, root: Path, tmp_path: Path) -> None:
        classes = CocoInstances().classes(Tree.of(str(root)))
        rows = truth(CocoInstances(), root)
        folder = write(self.form, rows, tmp_path / "out", classes)
        for split in trees.IMAGES:
            shutil.copytree(root / split, folder / split)
        again = truth(CocoInstances(), folder)
        assert [replace(r, image_uri="") for r in again] == [replace(r, image_uri="") for r in rows]
        assert CocoInstances().classes(Tree.of(str(folder))) == classes
        for split in trees.IMAGES:
            mine, official = (load(f / "annotations" / f"instances_{split}.json") for f in (folder, root))
            assert list(mine) == ["info", "licenses", "categories", "images", "annotations"]
            assert mine["images"] == official["images"] and mine["info"] == official["info"]
            assert mine["categories"] == official["categories"]
            used = {image["license"] for image in official["images"]}
            assert mine["licenses"] == [entry for entry in official["licenses"] if entry["id"] in used]
            assert {a["id"] for a in mine["annotations"]} == {a["id"] for a in official["annotations"]}

    def test_pycocotools_finds_it_perfect(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoInstances(), root, "train2017")
        file = write(self.form, rows, tmp_path / "out", THINGS) / "annotations" / "instances_train2017.json"
        results = write(CocoResults(), rows, tmp_path / "results", THINGS)
        assert average_precision(file, results / "detections_train2017_segbatch_results.json") == PERFECT
        api = COCO(str(file))
        for annotation in api.dataset["annotations"]:
            assert type(annotation["id"]) is type(annotation["image_id"]) is type(annotation["iscrowd"]) is int
            assert api.annToMask(annotation).shape == trees.SIZE

    def test_coco_tiny_comes_back_as_it_was(self, shared_data: SharedData, tmp_path: Path) -> None:
        root = shared_data("data/coco_tiny")
        rows = truth(CocoInstances(), root)
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        (folder / "train2017").symlink_to(root / "train2017")
        assert [r.instances for r in truth(CocoInstances(), folder)] == [r.instances for r in rows]
        for row, found in zip(rows, imported(self.form, folder, rows, THINGS), strict=True):
            assert found.instances == row.instances

    def test_ids_that_several_images_have_become_unique(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoInstances(), root, "train2017")
        rows = [replace(r, instances=tuple(replace(i, id=i.id % 10) for i in r.instances or ())) for r in rows]
        file = write(self.form, rows, tmp_path / "out", THINGS) / "annotations" / "instances_train2017.json"
        assert [a["id"] for a in load(file)["annotations"]] == [4, 3, 2, 1, 5, 6, 7, 8]

    def test_predictions_keep_their_scores_and_rows_without_split_their_photos_path(self, tmp_path: Path) -> None:
        instance = Instance(7, 1, (0.0, 0.0, 2.0, 2.0), 4.0, False, rle.encode(np.eye(4, dtype=bool)), 0.75)
        row = Labels("shop/frame 1.png", "s3://bucket/shop/frame 1.png", 4, 4, instances=(instance,))
        folder = write(self.form, [row], tmp_path / "out", THINGS)
        content = load(folder / "annotations" / "instances_default.json")
        assert content["annotations"][0]["score"] == 0.75
        (image,) = content["images"]
        assert image == {"id": "shop/frame 1.png", "file_name": "shop/frame 1.png", "height": 4, "width": 4}
        (found,) = imported(self.form, folder, [row], THINGS)
        assert found.instances == (instance,)

    def test_images_that_no_file_lists_are_missing(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoInstances(), root, "val2017")
        folder = write(self.form, rows[1:], tmp_path / "out", THINGS)
        first, second = planned(self.form, folder, rows, THINGS)
        error = problem(self.form, first)
        assert error.code == "missing-prediction" and "139" in error.problem
        assert read(self.form, second).instances == ()

    def test_images_of_another_size_are_refused(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoInstances(), root, "val2017")
        folder = write(self.form, rows, tmp_path / "out", THINGS)
        larger = [replace(r, height=48, width=64) for r in rows]
        for item in planned(self.form, folder, larger, THINGS):
            error = problem(self.form, item)
            assert error.code == "size-mismatch" and "32 x 24" in error.problem and "64 x 48" in error.fix


def panoptic_quality(truth_json: Path, result_json: Path) -> tuple[float, int]:
    """PQ over classes and the number of them, by the formulas of panopticapi's evaluation.py."""
    said, results = load(truth_json), {a["image_id"]: a for a in load(result_json)["annotations"]}
    sums: dict[int, list[float]] = {}
    for annotation in said["annotations"]:
        result = results[annotation["image_id"]]
        maps = []
        for json_file, entry in ((truth_json, annotation), (result_json, result)):
            rgb = np.array(Image.open(json_file.with_suffix("") / entry["file_name"])).astype(np.int64)
            assert rgb.shape[2] == 3
            maps.append(rgb @ [1, 256, 65536])
        add_image(sums, annotation["segments_info"], result["segments_info"], *maps)
    found = [iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in sums.values() if tp + fp + fn]
    return float(np.mean(found)), len(found)


def add_image(
    sums: dict[int, list[float]], said: list[Any], results: list[Any], gt: NDArray[Any], predicted: NDArray[Any]
) -> None:
    """IoU, TP, FP and FN of one image."""
    assert {s["id"] for s in results} == set(np.unique(predicted).tolist()) - {0}, "panopticapi raises KeyError"
    matched: set[int] = set()
    for segment in said:
        mask, stats = gt == segment["id"], sums.setdefault(segment["category_id"], [0, 0, 0, 0])
        if segment["iscrowd"]:
            continue
        for other in (r for r in results if r["category_id"] == segment["category_id"]):
            theirs = predicted == other["id"]
            both = int((mask & theirs).sum())
            iou = both / (int(theirs.sum()) + segment["area"] - both - int((theirs & (gt == 0)).sum()))
            if iou > 0.5:
                stats[0], stats[1] = stats[0] + iou, stats[1] + 1
                matched.add(other["id"])
                break
        else:
            stats[3] += 1
    for other in results:
        theirs = predicted == other["id"]
        ignored = gt == 0
        for segment in said:
            if segment["iscrowd"] and segment["category_id"] == other["category_id"]:
                ignored = (gt == 0) | (gt == segment["id"])
        if other["id"] not in matched and (theirs & ignored).sum() / theirs.sum() <= 0.5:
            sums.setdefault(other["category_id"], [0, 0, 0, 0])[2] += 1


class TestPanoptic:
    form = coco_panoptic.CocoPanoptic()

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.coco_panoptic(tmp_path / "tree")

    @pytest.fixture
    def rows(self, root: Path) -> list[Labels]:
        return truth(CocoPanoptic(), root)

    def predicted(self, rows: list[Labels]) -> list[Labels]:
        return [replace(r, is_truth=False) for r in rows]

    def test_ground_truth_is_written_and_ingested_as_it_was(
        self, root: Path, rows: list[Labels], tmp_path: Path
    ) -> None:
        classes = CocoPanoptic().classes(Tree.of(str(root)))
        folder = write(self.form, rows, tmp_path / "out", classes)
        for split in trees.IMAGES:
            shutil.copytree(root / split, folder / split)
            mine, official = (load(f / "annotations" / f"panoptic_{split}.json") for f in (folder, root))
            assert mine["annotations"] == official["annotations"] and mine["categories"] == official["categories"]
            assert mine["images"] == official["images"]
            for path in (root / "annotations" / f"panoptic_{split}").iterdir():
                written = folder / "annotations" / f"panoptic_{split}" / path.name
                assert np.array_equal(np.array(Image.open(written)), np.array(Image.open(path)))
        for again, row in zip(truth(CocoPanoptic(), folder), rows, strict=True):
            assert np.array_equal(np.asarray(again.panoptic), np.asarray(row.panoptic))
            assert again.segments == row.segments and again.sample_id == row.sample_id
        assert CocoPanoptic().classes(Tree.of(str(folder))) == classes

    @pytest.mark.parametrize("is_truth", [True, False])
    def test_what_is_exported_is_imported_as_it_was(self, rows: list[Labels], tmp_path: Path, is_truth: bool) -> None:
        folder = write(self.form, rows if is_truth else self.predicted(rows), tmp_path / "out", PANOPTIC)
        for row, found in zip(rows, imported(self.form, folder, rows, PANOPTIC), strict=True):
            assert np.array_equal(np.asarray(found.panoptic), np.asarray(row.panoptic))
            assert found.segments == row.segments

    def test_ground_truth_against_itself_is_perfect(self, root: Path, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, self.predicted(rows), tmp_path / "out", PANOPTIC)
        for split in trees.IMAGES:
            results = folder / f"panoptic_{split}_segbatch_results.json"
            assert panoptic_quality(root / "annotations" / f"panoptic_{split}.json", results) == (1.0, 3)

    def test_a_wrong_prediction_is_not_perfect(self, root: Path, rows: list[Labels], tmp_path: Path) -> None:
        worse = [
            replace(r, panoptic=np.where(np.asarray(r.panoptic) == 4, 0, np.asarray(r.panoptic)))
            for r in self.predicted(rows)
        ]
        folder = write(self.form, worse, tmp_path / "out", PANOPTIC)
        results = folder / "panoptic_train2017_segbatch_results.json"
        quality, classes = panoptic_quality(root / "annotations" / "panoptic_train2017.json", results)
        assert classes == 3 and quality < 1

    def test_the_example_of_panopticapi(self, shared_data: SharedData, tmp_path: Path) -> None:
        root = shared_data("data/coco_panoptic")
        rows = truth(CocoPanoptic(), root)
        folder = write(self.form, self.predicted(rows), tmp_path / "out", PANOPTIC)
        results = folder / "panoptic_examples_segbatch_results.json"
        quality, _ = panoptic_quality(root / "panoptic_examples.json", results)
        assert quality == 1.0
        again = load(results)["annotations"][0]
        assert again == {"image_id": 439180, **load(root / "panoptic_examples.json")["annotations"][0]}
        (found,) = imported(self.form, root, rows, PANOPTIC)
        assert found.segments == rows[0].segments

    def test_segments_without_pixels_are_left_out_of_results_alone(self, rows: list[Labels], tmp_path: Path) -> None:
        empty = Segment(12345, 1, 3.5, (0.0, 0.0, 1.0, 1.0))
        row = replace(rows[0], segments=(*(rows[0].segments or ()), empty))
        listed = load(
            write(self.form, [row], tmp_path / "truth", PANOPTIC) / "annotations" / "panoptic_train2017.json"
        )["annotations"][0]["segments_info"]
        assert listed[-1] == {"id": 12345, "category_id": 1, "area": 3.5, "bbox": [0, 0, 1, 1], "iscrowd": 0}
        folder = write(self.form, self.predicted([row]), tmp_path / "results", PANOPTIC)
        results = load(folder / "panoptic_train2017_segbatch_results.json")
        assert len(results["annotations"][0]["segments_info"]) == len(listed) - 1

    @pytest.mark.parametrize("number", [0, 256**3, 2])
    def test_ids_that_are_no_colours_of_their_own_are_refused(
        self, rows: list[Labels], tmp_path: Path, number: int
    ) -> None:
        segments = [*(rows[0].segments or ()), Segment(number, 1, 1.0, (0.0, 0.0, 1.0, 1.0))]
        with pytest.raises(DataError, match=rf"{rows[0].sample_id} has a segment of id {number}"):
            write(self.form, [replace(rows[0], segments=tuple(segments))], tmp_path / "out", PANOPTIC)

    def test_what_is_missing_is_named(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, self.predicted(rows[:2]), tmp_path / "out", PANOPTIC)
        (folder / "panoptic_train2017_segbatch_results" / trees.file_name(9, ".png")).unlink()
        first, second, third, *_ = planned(self.form, folder, rows, PANOPTIC)
        assert problem(self.form, first).code == problem(self.form, third).code == "missing-prediction"
        assert read(self.form, second).segments

    def test_wrong_files_are_named(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, self.predicted(rows[:3]), tmp_path / "out", PANOPTIC)
        document = folder / "panoptic_train2017_segbatch_results.json"
        maps = document.with_suffix("")
        Image.new("RGB", (31, 24)).save(maps / trees.file_name(9, ".png"))
        Image.new("RGB", (32, 24), (5, 0, 0)).save(maps / trees.file_name(25, ".png"))
        first, second, third = planned(self.form, folder, rows[:3], PANOPTIC)
        assert problem(self.form, first).code == "size-mismatch"
        assert problem(self.form, second).code == "unknown-segment"
        assert read(self.form, third).segments
        with pytest.raises(ConfigError, match=r"explains PNG files \(give the folder"):
            planned(self.form, document, rows[:3], PANOPTIC)
        with pytest.raises(ConfigError, match=r"category 1 \(image 9\)"):
            planned(self.form, folder, rows[:3], STUFF_JSON)
        with pytest.raises(ConfigError, match="not among the samples: 581929"):
            planned(self.form, folder, rows[:2], PANOPTIC)
        content = load(document)
        document.write_text(json.dumps({**content, "annotations": content["annotations"] * 2}))
        with pytest.raises(ConfigError, match="two annotations of image 9"):
            planned(self.form, folder, rows[:3], PANOPTIC)


STUFF_JSON = ClassTable(tuple(c for c in STUFF.classes if c.label_id in (148, 156)))
"""Classes that lack most categories."""


def stuff_confusion(truth_file: Path, results: Path) -> NDArray[np.int64]:
    """COCOStuffeval._accumulateConfusion over all images: rows are the truth's categories, columns the results'."""
    api = COCO(str(truth_file))
    found = api.loadRes(str(results))
    assert {a["image_id"] for a in found.dataset["annotations"]} == set(api.getImgIds()), "cocostuffeval refuses that"
    confusion = np.zeros((184, 184), np.int64)
    for image_id in api.getImgIds():
        maps = []
        for source in (api, found):
            label = np.zeros(trees.SIZE, int)
            for annotation in source.loadAnns(source.getAnnIds(imgIds=image_id, iscrowd=False)):
                mask = source.annToMask(annotation) == 1
                assert not label[mask].any(), "cocostuffeval refuses pixels of two classes"
                label[mask] = annotation["category_id"]
            maps.append(label)
        valid = (maps[0] >= 92) & (maps[0] <= 183)
        np.add.at(confusion, (maps[0][valid], maps[1][valid]), 1)
    return confusion


class TestStuff:
    form = coco_stuff.CocoStuff()

    @pytest.fixture
    def rows(self, tmp_path: Path) -> list[Labels]:
        return truth(CocoStuff(), trees.coco_stuff(tmp_path / "tree"))

    def test_maps_are_the_official_ones_and_come_back(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, rows, tmp_path / "out", STUFF)
        for split, image_ids in trees.IMAGES.items():
            for image_id in image_ids:
                image = Image.open(folder / "annotations" / split / trees.file_name(image_id, ".png"))
                assert image.mode == "L" and np.array_equal(np.array(image), trees.stuff_map(image_id))
        for row, found in zip(rows, imported(self.form, folder, rows, STUFF), strict=True):
            assert np.array_equal(np.asarray(found.semantic), np.asarray(row.semantic))
        again = truth(CocoStuff(), folder)
        assert [r.sample_id for r in again] == [r.sample_id for r in rows]

    def test_results_are_what_cocostuffeval_finds_perfect(self, rows: list[Labels], tmp_path: Path) -> None:
        official = trees.coco_stuff_json(tmp_path / "json") / "annotations"
        folder = write(self.form, rows, tmp_path / "out", STUFF)
        for split in trees.IMAGES:
            results = folder / f"stuff_{split}_segbatch_results.json"
            assert {tuple(e) for e in load(results)} == {("image_id", "category_id", "segmentation")}
            confusion = stuff_confusion(official / f"stuff_{split}.json", results)
            assert confusion.sum() == np.trace(confusion) > 0
            assert set(np.flatnonzero(confusion.sum(0))) == {149, 157, 183}

    def test_values_that_no_class_has_are_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        for value in (11, 182, 300):
            bad = replace(rows[0], semantic=np.full(trees.SIZE, value, np.uint16))
            with pytest.raises(DataError, match=rf"{rows[0].sample_id} has the label id {value}"):
                write(self.form, [bad], tmp_path / "out", STUFF)

    def test_classes_of_another_dataset_are_refused(self, rows: list[Labels], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="class 0 is 'Sky'"):
            write(self.form, rows, tmp_path / "out", CAMVID)
        with pytest.raises(ConfigError, match="there are no classes"):
            planned(self.form, tmp_path, rows, ClassTable(()))

    def test_wrong_maps_are_named(self, rows: list[Labels], tmp_path: Path) -> None:
        folder = write(self.form, rows, tmp_path / "out", STUFF)
        maps = folder / "annotations" / "train2017"
        Image.new("RGB", (32, 24)).save(maps / trees.file_name(9, ".png"))
        Image.new("L", (32, 24), 200).save(maps / trees.file_name(25, ".png"))
        (maps / trees.file_name(581929, ".png")).unlink()
        first, second, third, *_ = planned(self.form, folder, rows, STUFF)
        found = [problem(self.form, i).code for i in (first, second, third)]
        assert found == ["label-type", "unknown-label", "missing-prediction"]


class TestStuffJson:
    form = coco_stuff.CocoStuff()

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return trees.coco_stuff_json(tmp_path / "tree")

    def test_results_come_back_and_are_perfect(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoStuff(), root)
        classes = CocoStuff().classes(Tree.of(str(root)))
        folder = write(self.form, rows, tmp_path / "out", classes)
        assert sorted(p.name for p in folder.rglob("*.*")) == [
            "stuff_train2017_segbatch_results.json",
            "stuff_val2017_segbatch_results.json",
        ]
        for row, found in zip(rows, imported(self.form, folder, rows, classes), strict=True):
            assert np.array_equal(np.asarray(found.semantic), np.asarray(row.semantic))
        confusion = stuff_confusion(
            root / "annotations" / "stuff_val2017.json", folder / "stuff_val2017_segbatch_results.json"
        )
        assert confusion.sum() == np.trace(confusion) > 0

    def test_wrong_results_are_named(self, root: Path, tmp_path: Path) -> None:
        rows = truth(CocoStuff(), root, "train2017")
        classes = CocoStuff().classes(Tree.of(str(root)))
        mask = trees.compressed(np.ones(trees.SIZE))
        entries = [
            {"image_id": 9, "category_id": 149, "segmentation": mask},
            {"image_id": 9, "category_id": 157, "segmentation": mask},
            {"image_id": 25, "category_id": 149},
        ]
        file = trees.write_json(tmp_path / "results.json", entries)
        first, second, third = planned(self.form, file, rows, classes)
        error = problem(self.form, first)
        assert error.code == "overlap" and "768 pixels of two classes" in error.problem
        assert problem(self.form, second).code == "bad-annotation"
        assert problem(self.form, third).code == "missing-prediction"
