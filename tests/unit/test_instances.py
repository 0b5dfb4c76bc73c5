"""Detections to instances, things and stuff to one map, and both back on the stored grid: against plain code."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from segbatch.codecs import photo, rle
from segbatch.errors import DataError
from segbatch.inference.instances import best_first, instances, on_photo, paste
from segbatch.inference.panoptic import merge
from segbatch.inference.pipeline import Predictor
from segbatch.inference.turning import turn_back
from segbatch.models.base import Choice, Detections, Geometry, InputSpec, ModelSpec, PanopticParts
from segbatch.records import ClassInfo, ClassTable, Instance, Prediction, Segment

IDS = np.array([3, 7, 900], np.uint16)


def detections(seed: int, count: int, height: int, width: int, side: int = 28) -> Detections:
    """Boxes of all sizes, some reaching beyond the photo, smooth masks."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-10, [width, height], (count, 2))
    size = rng.uniform(0.3, 0.6 * min(width, height), (count, 2))
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    coarse = torch.from_numpy(rng.random((count, 1, 5, 5), np.float32))
    masks = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[:, 0].numpy()
    scores = rng.choice(np.linspace(0, 1, 30), count).astype(np.float32)
    return Detections(boxes, scores, rng.integers(0, 3, count), masks)


def decoded(runs: NDArray[np.uint32], height: int, width: int) -> NDArray[np.bool_]:
    return rle.decode(rle.to_string(runs), height, width)


@pytest.mark.parametrize("side", [14, 28])
@pytest.mark.parametrize("size", [(97, 131), (1, 1), (40, 7)])
def test_pasted_masks_are_those_of_torchvision(size: tuple[int, int], side: int) -> None:
    heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    found = detections(1, 60, *size, side)
    found.boxes[:] = found.boxes.clip(0, [size[1], size[0]] * 2)  # as torchvision's detections are
    wanted = heads.paste_masks_in_image(
        torch.from_numpy(found.masks)[:, None], torch.from_numpy(found.boxes), size, padding=1
    )
    pasted = np.stack([decoded(r, *size) for r in paste(found, *size, 0.5)])
    unlike = pasted != (wanted[:, 0] > 0.5).numpy()
    assert unlike.sum() <= 1e-6 * unlike.size


def test_a_box_over_whole_columns_and_one_outside() -> None:
    masks = np.ones((3, 4, 4), np.float32)
    boxes = np.array([[-50, -50, 60, 60], [2, -50, 5, 60], [100, 100, 110, 110]], np.float32)
    found = Detections(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), masks)
    full, band, none = (decoded(r, 8, 9) for r in paste(found, 8, 9, 0.5))
    assert full.all() and not none.any()
    assert band.all(0).tolist() == band.any(0).tolist() and 1 <= band.any(0).sum() <= 5


def test_suppression_is_that_of_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    for seed in range(20):
        found = detections(seed, 80, 60, 60)
        kept = best_first(found, Choice(min_score=0.0, nms_iou=0.3, top_k=1000))
        order = np.argsort(-found.scores, kind="stable")
        boxes, scores, classes = (torch.from_numpy(a[order]) for a in (found.boxes, found.scores, found.classes))
        ranks = torch.arange(len(scores), 0, -1).float()  # torchvision's sort is not stable
        wanted = ops.batched_nms(boxes, ranks, classes, 0.3)
        np.testing.assert_array_equal(kept.boxes, boxes[wanted].numpy())
        assert (np.diff(kept.scores) <= 0).all() and scores[wanted].tolist() == kept.scores.tolist()


def test_score_and_number_limits() -> None:
    found = detections(0, 50, 60, 60)
    kept = best_first(found, Choice(min_score=0.5, top_k=7))
    assert len(kept.scores) == 7 and kept.scores.min() >= 0.5
    assert kept.scores.tolist() == sorted(found.scores.tolist())[:-8:-1]
    assert len(best_first(found, Choice(min_score=1.1)).boxes) == 0


def test_instances_carry_category_box_area_and_score() -> None:
    found = on_photo(detections(3, 20, 60, 80), Geometry(120, 240, 60, 80, 64, 96))
    made = instances(found, 120, 240, IDS, 0.5)
    assert [i.id for i in made] == list(range(1, 21))
    for number, one in enumerate(made):
        mask = rle.decode(one.counts, 120, 240)
        assert one.area == mask.sum() and one.category_id == IDS[found.classes[number]]
        left, top, wide, tall = one.bbox_xywh
        assert left >= 0 and left + wide <= 240 and top >= 0 and top + tall <= 120
        rows, columns = np.nonzero(mask)
        if len(rows):  # the mask of m x m covers its box and half a cell around it
            assert columns.min() >= left - wide / 28 - 2 and rows.max() <= top + tall + tall / 28 + 2
    with pytest.raises(DataError, match=r"classes 0\.\.2, its class table has 2"):
        instances(found, 120, 240, IDS[:2], 0.5)


@pytest.mark.parametrize("field", ["boxes", "scores"])
def test_what_is_not_a_number_is_an_error(field: str) -> None:
    found = detections(0, 5, 60, 60)
    getattr(found, field)[2] = np.nan
    with pytest.raises(DataError, match="not numbers"):
        best_first(found, Choice())


def test_500_instances_on_a_large_photo_in_little_memory() -> None:
    found = detections(4, 500, 2160, 3840)
    paste(detections(4, 2, 50, 50), 50, 50, 0.5)
    tracemalloc.start()
    runs = paste(found, 2160, 3840, 0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20
    assert all(int(r.sum()) == 2160 * 3840 for r in runs)


# -- panoptic -----------------------------------------------------------------------------------------------------

TABLE = ClassTable(
    (ClassInfo(3, "cat", isthing=True), ClassInfo(5, "sky"), ClassInfo(7, "dog", isthing=True), ClassInfo(9, "road"))
)


def naive_merge(
    things: list[tuple[int, NDArray[np.bool_]]], semantic: NDArray[np.uint16], choice: Choice
) -> tuple[NDArray[np.uint16], list[int]]:
    """detectron2's combine_semantic_and_instance_outputs, written out."""
    index_map, categories = np.zeros(semantic.shape, np.uint16), []
    for index, mask in things:
        if not mask.sum():
            continue
        taken = mask & (index_map > 0)
        if taken.sum() / mask.sum() > choice.overlap or not (mask & (index_map == 0)).any():
            continue
        categories.append(TABLE.classes[index].label_id)
        index_map[mask & (index_map == 0)] = len(categories)
    for number, label_id in ((1, 5), (2, 9)):
        mask = (semantic == number) & (index_map == 0)
        if mask.sum() >= choice.stuff_area:
            categories.append(label_id)
            index_map[mask] = len(categories)
    return index_map, categories


def test_things_and_stuff_are_merged_by_the_rule() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 40, 2)
        found = detections(seed, int(rng.integers(0, 8)), int(height), int(width), 7)
        runs = paste(found, int(height), int(width), 0.4)
        semantic = np.kron(rng.integers(0, 3, (8, 8)), np.ones((5, 5))).astype(np.uint16)[:height, :width]
        choice = Choice(stuff_area=int(rng.integers(1, 90)), overlap=float(rng.choice([0.1, 0.5, 1.0])))
        classes = (found.classes % 2 * 2).tolist()
        merged, segments = merge(list(zip(classes, runs, strict=True)), semantic, TABLE, choice)
        masks = [decoded(r, int(height), int(width)) for r in runs]
        wanted, categories = naive_merge(list(zip(classes, masks, strict=True)), semantic, choice)
        np.testing.assert_array_equal(merged, wanted)
        assert [s.category_id for s in segments] == categories
        for number, segment in enumerate(segments, 1):
            rows, columns = np.nonzero(wanted == number)
            assert segment.area == len(rows) and segment.id == number
            box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
            assert segment.bbox_xywh == pytest.approx(box)


class Fixed:
    """Says the same of every photo."""

    def __init__(self, spec: ModelSpec, answer: Any) -> None:
        self.spec = spec
        self.answer = answer

    def forward(self, batch: NDArray[Any]) -> list[Any]:
        return [self.answer] * len(batch)


def test_a_panoptic_network_runs_through_the_predictor() -> None:
    found = Detections(
        np.array([[4, 4, 12, 12]], np.float32), np.ones(1, np.float32), np.array([2]), np.ones((1, 7, 7), np.float32)
    )
    logits = np.zeros((3, 8, 8), np.float32)
    logits[1, :4] = logits[2, 4:] = 5
    spec = ModelSpec("m", "panoptic", TABLE, InputSpec(layout="nhwc"), "panoptic", "d", choice=Choice(stuff_area=1))
    answer = Predictor(Fixed(spec, PanopticParts(logits, found)), 1).predict(np.zeros((32, 32, 3), np.uint8))
    assert answer.segments is not None and [s.category_id for s in answer.segments] == [7, 5, 9]
    assert answer.panoptic is not None
    assert answer.panoptic[0, 0] == 2 and answer.panoptic[31, 31] == 3 and answer.panoptic[8, 8] == 1
    assert answer.semantic is None and answer.instances is None


def test_a_network_of_detections_runs_through_the_predictor() -> None:
    found = detections(2, 30, 48, 64)
    spec = ModelSpec(
        "m",
        "instance",
        TABLE,
        InputSpec(height=48, resize="short-side", longest=96, divisor=32, layout="nhwc"),
        "detections",
        "d",
        choice=Choice(min_score=0.3, top_k=9),
    )
    predictor = Predictor(Fixed(spec, found), 2)
    prepared = predictor.prepare(np.zeros((96, 128, 3), np.uint8))
    assert prepared.geometry == Geometry(96, 128, 48, 64, 64, 64)
    made = predictor.finish(predictor.forward([prepared] * 3)[1]).instances
    assert made is not None and len(made) == 9 and made[0].score == found.scores.max()
    nameless = ModelSpec("m", "instance", ClassTable(()), spec.input, "detections", "d")
    with pytest.raises(Exception, match="names no classes"):
        Predictor(Fixed(nameless, found), 2)


# -- orientation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_everything_is_turned_onto_the_stored_grid(orientation: int) -> None:
    stored = np.zeros((20, 30), np.uint8)
    stored[3:9, 5:26] = 1
    stored[3, 5] = 0
    upright = photo.upright(stored, orientation)
    rows, columns = np.nonzero(upright)
    box = tuple(float(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1))
    one = Instance(1, 3, box, float(stored.sum()), False, rle.encode(upright), 0.5)
    segment = Segment(1, 3, one.area, box)
    maps = upright.astype(np.uint16)
    turned = turn_back(Prediction(maps, (one,), maps, (segment,)), orientation, 20, 30)
    assert turned.semantic is not None and turned.instances and turned.panoptic is not None and turned.segments
    np.testing.assert_array_equal(turned.semantic, stored)
    np.testing.assert_array_equal(turned.panoptic, stored)
    np.testing.assert_array_equal(rle.decode(turned.instances[0].counts, 20, 30), stored)
    assert turned.instances[0].bbox_xywh == turned.segments[0].bbox_xywh == (5, 3, 21, 6)
