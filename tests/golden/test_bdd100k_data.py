"""BDD100K on real label files of its toolkit and of scalabel: published figures, and what other tools make of them.

``shared_data`` data/bdd100k: bitmasks, masks with the RLE that ``bdd100k.label.to_rle`` made of them, lane masks, a
frame of ground truth with a prediction whose mIoU scalabel's own tests state, and seven photos. The protocols print
these figures, and what the official rules (``bdd100k_cases``) make of the files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bdd100k_cases as cases
import numpy as np
import pytest
import trees_bdd100k as trees
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from segbatch.codecs import rle
from segbatch.datasets import bdd100k, bdd100k_frames, bdd100k_masks, tables
from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.formats import bdd100k as formats
from segbatch.formats.base import Format
from segbatch.metrics import registry
from segbatch.records import Prediction, Sample

SharedData = Callable[[str], Path]
NAME = "7d06fefd-f7be05a6"
MEAN_IOU, PIXEL_ACCURACY = 77.69367702513847, 97.59265266143856
"""scalabel, tests/eval/sem_seg_test.py."""

LANE_SCORES = np.array(
    [
        *([70.53328267, 80.9831119, 100.0], [100.0, 100.0, 100.0]),
        *([70.53328267, 80.9831119, 100.0], [100.0, 100.0, 100.0]),
        *([99.82147748, 100.0, 100.0], [100.0, 100.0, 100.0], [100.0, 100.0, 100.0], [75.33066961, 79.34917317, 100.0]),
        *([71.02916505, 86.25984707, 100.0], [100.0, 100.0, 100.0], [96.43828133, 100.0, 100.0]),
        *([94.79621737, 100.0, 100.0], [85.26664133, 90.49155595, 100.0], [85.26664133, 90.49155595, 100.0]),
        *([92.17697636, 95.70112753, 100.0], [87.57008634, 92.22807981, 100.0]),
    ]
)
"""bdd100k, tests/eval/lane_test.py: per cent at 1, 2 and 5 pixels, by kind, by task, and their mean."""

CLASSES = tables.load("bdd100k-sem").scored


@pytest.fixture
def data(shared_data: SharedData) -> Path:
    return shared_data("data/bdd100k")


def place(source: Path, *targets: Path) -> None:
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def samples(dataset: Dataset, root: Path) -> dict[str, Sample]:
    return {s.sample_id: s for item in dataset.items(Tree.of(str(root)), ()) for s in dataset.read(item)}


def imported(form: Format, source: Path, dataset: Dataset, root: Path) -> list[Prediction]:
    rows = trees.truth(dataset, root)
    return [found for item in trees.planned(form, source, rows) for found in form.read(item)]


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


def official_map(frame: dict[str, Any]) -> NDArray[np.uint8]:
    """frame_to_mask of scalabel's evaluation with pycocotools: later labels over earlier ones, 255 elsewhere."""
    ids = {c.name: c.label_id for c in CLASSES}
    label_map = np.full((720, 1280), 255, np.uint8)
    for label in frame["labels"]:
        if label["category"] in ids and label["rle"]:
            label_map[coco_mask.decode(label["rle"]) > 0] = ids[label["category"]]
    return label_map


@pytest.fixture
def frame_tree(data: Path, tmp_path: Path) -> Path:
    place(data / "sem_seg_rle/sem_seg_sample.json", tmp_path / "tree/labels/sem_seg/rles/sem_seg_val.json")
    return tmp_path / "tree"


def test_the_published_miou_follows_from_what_is_read(data: Path, frame_tree: Path) -> None:
    truth = samples(bdd100k.SemanticSegmentation(), frame_tree)[NAME].semantic
    predictions = data / "sem_seg_rle/sem_seg_preds.json"
    (found,) = imported(formats.SemanticSegmentation(), predictions, bdd100k.SemanticSegmentation(), frame_tree)
    assert truth is not None and found.semantic is not None
    counted = truth != 255
    joint = np.zeros((20, 20), np.int64)
    np.add.at(joint, (truth[counted], np.minimum(found.semantic[counted], 19)), 1)
    hits = np.diag(joint)[:19]
    union = joint[:19].sum(axis=1) + joint[:, :19].sum(axis=0) - hits
    there = joint[:19].sum(axis=1) > 0
    assert abs(100 * (hits[there] / union[there]).mean() - MEAN_IOU) < 1e-9
    assert abs(100 * hits.sum() / joint.sum() - PIXEL_ACCURACY) < 1e-9


def figures(protocol: str, states: list[Any]) -> cases.Figures:
    metric = registry.make(protocol, tables.load(protocol))
    found = metric.compute(metric.merge([metric.update(*rows) for rows in states]))
    return {(f.metric, f.class_name): f.value for f in found}


@pytest.mark.parametrize(
    ("predictions", "miou", "accuracy"),
    [("sem_seg_preds", MEAN_IOU, PIXEL_ACCURACY), ("sem_seg_preds_empty", 0.0, 0.0)],
)
def test_the_protocol_prints_the_published_miou_in_all_digits(
    predictions: str, miou: float, accuracy: float, data: Path, frame_tree: Path
) -> None:
    dataset = bdd100k.SemanticSegmentation()
    truth = samples(dataset, frame_tree)[NAME].semantic
    (found,) = imported(formats.SemanticSegmentation(), data / f"sem_seg_rle/{predictions}.json", dataset, frame_tree)
    assert truth is not None and found.semantic is not None
    rows = [cases.semantic_row("samples", NAME, truth), cases.semantic_row("masks", NAME, found.semantic)]
    values = figures("bdd100k-sem", [rows])
    assert [100 * (values[name, ""] or 0) for name in ("miou", "global_accuracy")] == [miou, accuracy]


def test_the_protocol_prints_the_published_scores_of_lanes(data: Path) -> None:
    pairs = {p.stem: (pixels(p), pixels(data / "lane/res" / p.name)) for p in (data / "lane/gts").iterdir()}
    rows = [(cases.lane_row("samples", n, t), cases.lane_row("masks", n, p)) for n, (t, p) in pairs.items()]
    values = figures("bdd100k-lane", rows)
    kinds = [*cases.DIRECTIONS, *cases.STYLES, *(c.name for c in tables.load("bdd100k-lane").scored)]
    names = [*(("", kind) for kind in kinds), *((f"_{t}", "") for t in ("direction", "style", "category")), ("", "")]
    found = [[100 * (values[f"f1_pix{d}{suffix}", kind] or 0) for d in (1, 2, 5)] for suffix, kind in names]
    assert np.abs(np.array(found) - LANE_SCORES).max() < 5.1e-9  # as many digits as are printed there


@pytest.mark.long
def test_real_lanes_are_scored_by_the_official_rule_to_the_last_bit(data: Path) -> None:
    """Of the image with the most kinds of lanes, the columns that hold most of them."""
    name = "fe189115-9981a740"
    truth, found = (pixels(data / f"lane/{folder}/{name}.png")[:, 300:900] for folder in ("gts", "res"))
    found = np.roll(found, (2, 7), (0, 1))
    values = figures("bdd100k-lane", [(cases.lane_row("samples", name, truth), cases.lane_row("masks", name, found))])
    official = cases.official_lanes([(truth, found)], [c.name for c in tables.load("bdd100k-lane").scored])
    assert values == {key: (value or 0.0) / 100 for key, value in official.items()}
    assert 0 < (values["f1_pix1", ""] or 0) < (values["f1_pix5", ""] or 0) < 1


@pytest.mark.long
def test_real_objects_are_scored_by_the_official_rule_to_the_last_bit(data: Path) -> None:
    truth = pixels(data / "to_rle/ins_seg/masks/0.png")[::2, ::2]
    (entry,) = json.loads((data / "to_rle/ins_seg/scores.json").read_text())
    scores = [(s["index"], s["score"]) for s in entry["labels"]]
    found = np.roll(truth, (1, -2), (0, 1))
    states = [cases.instance_rows("0", truth, found, scores)]
    names = [c.name for c in tables.load("bdd100k-ins").scored]
    values = figures("bdd100k-ins", states)
    assert values == cases.official_instances([(truth, found, scores)], names)
    assert 0.2 < (values["segm_ap", ""] or 0) < 1


@pytest.mark.long
def test_real_segments_are_scored_by_the_official_rule_to_the_last_bit(data: Path) -> None:
    """The 60 labels of the frame as a bitmask, against themselves moved by some pixels."""
    (frame,) = json.loads((data / "sem_seg_rle/sem_seg_sample.json").read_text())
    found = bdd100k_frames.panoptic(bdd100k_frames.decode(json.dumps(frame), ""), (720, 1280), "")
    segments = found.segments or ()
    colors = np.array([(0, 0, 0, 0), *((s.category_id, 0, s.id // 256, s.id % 256) for s in segments)], np.uint8)
    truth = colors[np.asarray(found.panoptic)[::2, ::2]]
    moved = np.roll(truth, (3, 5), (0, 1))
    classes = {c.label_id: (c.name, c.isthing) for c in tables.load("bdd100k-pan").scored}
    official = cases.official_panoptic([(truth, moved)], classes)
    values = figures("bdd100k-pan", [cases.panoptic_rows(NAME, truth, moved)])
    assert values == {key: value if value is None else value / 100 for key, value in official.items()}
    assert 0.3 < (values["pq", ""] or 0) < 0.95 and len(segments) > 20


def test_the_frames_read_as_pycocotools_reads_them(data: Path, frame_tree: Path) -> None:
    sample = samples(bdd100k.SemanticSegmentation(), frame_tree)[NAME]
    (frame,) = json.loads((data / "sem_seg_rle/sem_seg_sample.json").read_text())
    assert sample.image is None and (sample.height, sample.width) == (720, 1280)
    assert [i.code for i in sample.issues] == ["labels-only"] and sample.attributes == {"timestamp": 10000}
    assert sample.semantic is not None and np.array_equal(sample.semantic, official_map(frame))
    for name in ("sem_seg_preds", "sem_seg_preds_empty"):
        source = data / f"sem_seg_rle/{name}.json"
        (found,) = imported(formats.SemanticSegmentation(), source, bdd100k.SemanticSegmentation(), frame_tree)
        expected = official_map(json.loads(source.read_text())[0])
        assert found.semantic is not None and np.array_equal(found.semantic, expected)
        assert (expected == 255).all() == (name == "sem_seg_preds_empty")


def test_polygons_are_drawn_as_the_owners_drew_their_rle(data: Path) -> None:
    """Every label of the frame has both; the RLE are what the toolkit made of the polygons."""
    (frame,) = json.loads((data / "sem_seg_rle/sem_seg_sample.json").read_text())
    names = {c.name for c in tables.load("bdd100k-pan").classes}
    assert len(frame["labels"]) == 60 and {label["category"] for label in frame["labels"]} <= names
    by_rle = bdd100k_frames.decode(json.dumps(frame), "rle")
    for label in frame["labels"]:
        del label["rle"]
    by_polygon = bdd100k_frames.decode(json.dumps(frame), "polygons")
    size = (720, 1280)
    segments = [bdd100k_frames.panoptic(frame, size, "") for frame in (by_rle, by_polygon)]
    assert np.array_equal(np.asarray(segments[0].panoptic), np.asarray(segments[1].panoptic))
    assert segments[0].segments == segments[1].segments
    maps = [np.asarray(bdd100k_frames.semantic(frame, size, "").semantic) for frame in (by_rle, by_polygon)]
    cut_out = maps[0] == 255  # by classes without trainId, which the toolkit draws for RLE but not for masks
    assert np.array_equal(maps[0][~cut_out], maps[1][~cut_out]) and 0.1 < cut_out.mean() < 0.2


@pytest.mark.parametrize("document", ["test-out-rle.json", "test-rle.json"])
def test_masks_are_the_rle_that_the_toolkit_made_of_them(document: str, data: Path, tmp_path: Path) -> None:
    place(data / "to_rle/test-mask.png", tmp_path / "labels/sem_seg/masks/val/test-mask.png")
    found = samples(bdd100k.SemanticSegmentation(), tmp_path)["test-mask"].semantic
    (frame,) = json.loads((data / "to_rle" / document).read_text())["frames"]
    assert found is not None and np.array_equal(found, official_map(frame))
    mine = {c.name: rle.encode(found == c.label_id) for c in CLASSES if (found == c.label_id).any()}
    assert mine == {label["category"]: label["rle"]["counts"].encode() for label in frame["labels"]}


@pytest.fixture
def object_tree(data: Path, tmp_path: Path) -> Path:
    for name in ("insseg_bitmask", "segtrack_bitmask"):
        place(data / f"bitmasks/{name}.png", tmp_path / f"tree/labels/ins_seg/bitmasks/val/{name}.png")
    place(data / "to_rle/ins_seg/masks/0.png", tmp_path / "tree/labels/ins_seg/bitmasks/val/0.png")
    for path in (data / "to_rle/seg_track/masks/0").iterdir():
        place(path, tmp_path / "tree/labels/seg_track_20/bitmasks/val/0" / path.name)
    return tmp_path / "tree"


def test_bitmasks_hold_the_objects_that_numpy_sees(object_tree: Path) -> None:
    found = samples(bdd100k.InstanceSegmentation(), object_tree)
    counts = {"0": 22, "insseg_bitmask": 4, "segtrack_bitmask": 3, "0-1": 10, "0-2": 10}
    assert {name: len(s.instances or ()) for name, s in found.items()} == counts
    for path in object_tree.rglob("*.png"):
        rgba = pixels(path).astype(int)
        ids = rgba[..., 2] * 256 + rgba[..., 3]
        sample = found[path.stem]
        for o in sample.instances or ():
            where = ids == o.id
            assert coco_mask.encode(np.asfortranarray(where, np.uint8))["counts"] == o.counts and o.area == where.sum()
            assert np.unique(rgba[where][:, 0]).tolist() == [o.category_id]
            assert sample.attributes["instances"][str(o.id)]["occluded"] == bool(rgba[where][0, 1] & 4)
        without_id = ((ids == 0) & (rgba[..., 0] > 0)).sum()
        said = [i.message.split()[0] for i in sample.issues if i.code == "no-object-id"]
        assert said == ([str(without_id)] if without_id else [])


def test_bitmasks_come_back_from_an_export(object_tree: Path, tmp_path: Path) -> None:
    form, dataset = formats.InstanceSegmentation(), bdd100k.InstanceSegmentation()
    rows = trees.truth(dataset, object_tree)
    out = trees.exported(form, rows, tmp_path / "out")
    for row, found in zip(rows, imported(form, out, dataset, object_tree), strict=True):
        expected = [(i.id, i.category_id, i.counts, i.iscrowd) for i in row.instances or ()]
        assert [(i.id, i.category_id, i.counts, i.iscrowd) for i in found.instances or ()] == expected
    for path in object_tree.rglob("ins_seg/bitmasks/val/*.png"):
        assert np.array_equal(pixels(path), pixels(out / "bitmasks" / path.name))


def test_scores_meet_the_objects_of_their_index(data: Path, tmp_path: Path) -> None:
    place(data / "to_rle/ins_seg/masks/0.png", tmp_path / "tree/labels/ins_seg/bitmasks/val/0.png")
    source = data / "to_rle/ins_seg"
    (found,) = imported(formats.InstanceSegmentation(), source, bdd100k.InstanceSegmentation(), tmp_path / "tree")
    (entry,) = json.loads((source / "scores.json").read_text())
    alpha = pixels(source / "masks/0.png")[..., 3]
    expected = [(s["index"], s["score"]) for s in entry["labels"] if (alpha == s["index"]).any()]
    assert [(i.id, i.score) for i in found.instances or ()] == expected and len(expected) == 22


@pytest.mark.parametrize("folder", ["gts", "res"])
def test_lane_bytes_come_back_from_an_export(folder: str, data: Path, tmp_path: Path) -> None:
    for path in (data / "lane" / folder).iterdir():
        place(path, tmp_path / "tree/labels/lane/masks/val" / path.name)
    rows = trees.truth(bdd100k.Lane(), tmp_path / "tree")
    out = trees.exported(formats.Lane(), rows, tmp_path / "out")
    assert len(rows) == 4
    for row in rows:
        byte = pixels(data / "lane" / folder / f"{row.sample_id}.png")
        assert np.array_equal(pixels(out / f"{row.sample_id}.png"), byte)
        lane = byte & 8 == 0
        assert np.array_equal(np.asarray(row.semantic), np.where(lane, byte & 7, 255)) and lane.any()
        assert {name: np.unique(m[lane]).tolist() for name, m in row.label_maps.items()} == {
            bdd100k_masks.DIRECTION: [0],
            bdd100k_masks.STYLE: [0],
        }


def test_photos_of_the_test_split_are_read_without_labels(data: Path, tmp_path: Path) -> None:
    place(data / "sem_seg_rle/sem_seg_sample.json", tmp_path / "labels/sem_seg/rles/sem_seg_val.json")
    for path in (data / "images").iterdir():
        place(path, tmp_path / "images/10k/test" / path.name)
    found = samples(bdd100k.SemanticSegmentation(), tmp_path)
    photos = {name: s for name, s in found.items() if name != NAME}
    assert sorted(photos) == sorted(p.stem for p in (data / "images").iterdir()) and len(photos) == 7
    assert all(s.semantic is None and (s.height, s.width) == (720, 1280) for s in photos.values())
