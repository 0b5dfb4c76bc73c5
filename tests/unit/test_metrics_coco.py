"""COCO's evaluators against pycocotools and panopticapi's rule, and by properties."""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from coco_cases import (
    PANOPTIC_CLASSES,
    Case,
    Scene,
    instance_rows,
    official_figures,
    random_case,
    random_scenes,
    reference_pq,
    row_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from segbatch.codecs import rle
from segbatch.errors import ConfigError, DataError
from segbatch.metrics.base import CountsMissing, Metric, image_order
from segbatch.metrics.coco_figures import Matches, Rules
from segbatch.metrics.coco_instance import CocoInstanceMetric
from segbatch.metrics.coco_panoptic import CocoPanopticMetric
from segbatch.records import ClassInfo, ClassTable, Figure

THINGS = ClassTable((ClassInfo(1, "cat"), ClassInfo(2, "dog"), ClassInfo(9, "none", ignore=True)))
SIZE = (8, 8)


def by_name(figures: Iterable[Figure]) -> dict[tuple[str, str], float | None]:
    return {(f.metric, f.class_name): f.value for f in figures}


def instance_states(case: Case) -> tuple[CocoInstanceMetric, list[Matches]]:
    metric = CocoInstanceMetric(case.classes)
    return metric, [metric.update(*pair) for pair in instance_rows(case)]


def panoptic_states(seed: int) -> tuple[CocoPanopticMetric, list[Any]]:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    scenes = random_scenes(seed)
    return metric, [metric.update(t.row("samples", i), p.row("masks", i)) for i, t, p in scenes]


def square(top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def thing(mask: np.ndarray, category: int = 1, number: int = 1, **more: Any) -> dict[str, Any]:
    """An entry of ``instances``; ground truth without a score."""
    counts = rle.encode(mask)
    known = {"id": number, "category_id": category, "bbox_xywh": rle.bbox(counts, *mask.shape), "iscrowd": False}
    return {**known, "area": float(mask.sum()), "counts": counts, **more}


def pair(
    objects: list[dict[str, Any]], found: list[dict[str, Any]], name: str = "1", size: tuple[int, int] = SIZE
) -> tuple[Any, Any]:
    same = {"sample_id": name, "height": SIZE[0], "width": SIZE[1]}
    other = {"sample_id": name, "height": size[0], "width": size[1]}
    return row_of("samples", same | {"instances": objects}), row_of("masks", other | {"instances": found})


# -- instances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, 45, 15))
def test_all_figures_are_those_of_pycocotools(start: int) -> None:
    for seed in range(start, start + 15):
        case = random_case(seed)
        metric, states = instance_states(case)
        assert by_name(metric.compute(metric.merge(states))) == official_figures(case), seed


def test_cases_cover_what_is_special() -> None:
    cases = [random_case(seed) for seed in range(45)]
    per_class = [
        sum(r["image_id"] == i["id"] and r["category_id"] == c for r in case.results)
        for case in cases
        for i in case.images
        for c in case.labels
    ]
    assert max(per_class) > 100
    assert 0 in per_class
    scores = [r["score"] for r in cases[0].results]
    assert len(set(scores)) < len(scores)
    areas = {a["area"] for case in cases for a in case.annotations}
    assert {0.0, 1.0, 1024.0, 9216.0} <= areas
    assert any(a["iscrowd"] for case in cases for a in case.annotations)
    assert any(not case.results for case in cases)
    assert any(not case.annotations for case in cases)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    make: Callable[[int], tuple[Metric[Any], list[Any]]] = data.draw(
        st.sampled_from([lambda s: instance_states(random_case(s)), panoptic_states])
    )
    metric, states = make(data.draw(st.integers(0, 400)))
    order = data.draw(st.permutations(states))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    again = metric.merge([metric.merge(piece) for piece in pieces])
    whole = metric.merge(states)
    assert [repr(f) for f in metric.compute(again)] == [repr(f) for f in metric.compute(whole)]
    kept = metric.columns([None, *order])
    names = ["-", *(s.images[0] for s in order)]
    batch = pa.RecordBatch.from_pydict({"sample_id": names, "group_id": names, **kept})
    read = metric.states(batch.slice(1))
    assert metric.compute(metric.merge(s for s in read if s is not None)) == metric.compute(whole)


def test_equal_scores_are_decided_by_the_ids_as_numbers() -> None:
    metric = CocoInstanceMetric(THINGS)
    mask = square(0, 0, 4)
    right = metric.update(*pair([thing(mask)], [thing(mask, score=0.5)], "9"))
    wrong = metric.update(*pair([thing(mask)], [thing(square(4, 4, 4), score=0.5)], "10"))
    for states in ([right, wrong], [wrong, right]):
        assert by_name(metric.compute(metric.merge(states)))["segm_ap50", ""] == pytest.approx(51 / 101)
    as_text = replace(right, images=("9a",))  # now 10 comes before 9a
    assert by_name(metric.compute(metric.merge([as_text, wrong])))["segm_ap50", ""] == pytest.approx(51 / 101 / 2)
    assert image_order(["b", "10", "9"]).tolist() == [1, 2, 0]
    assert image_order(["010", "-3", "9", "10"]).tolist() == [1, 2, 0, 3]
    assert image_order([]).tolist() == []


def test_an_image_has_counts_and_the_mean_ap_of_its_classes() -> None:
    metric = CocoInstanceMetric(THINGS)
    cat, dog, crowd = thing(square(0, 0, 4)), thing(square(4, 4, 4), 2, 2), thing(square(0, 4, 4), 1, 3, iscrowd=True)
    found = [
        thing(square(0, 0, 4), 1, 1, score=0.9),
        thing(square(0, 4, 2), 1, 2, score=0.8),  # on the crowd
        thing(square(5, 0, 2), 1, 3, score=0.7),
        thing(square(4, 4, 4), 9, 4, score=0.6),  # of an ignored class
    ]
    score = metric.image(metric.update(*pair([cat, dog, crowd], found)))
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in score.classes] == [("cat", 1, 1, 0), ("dog", 0, 0, 1)]
    assert score.score == pytest.approx(0.5)
    nothing = metric.image(metric.update(*pair([crowd], [])))
    assert (nothing.score, nothing.classes) == (None, ())
    only_wrong = metric.image(metric.update(*pair([], found[2:3])))
    assert only_wrong.score is None
    assert [(c.class_name, c.fp) for c in only_wrong.classes] == [("cat", 1)]


def test_a_missing_image_counts_as_one_without_detections() -> None:
    metric = CocoInstanceMetric(THINGS)
    assert isinstance(metric, CountsMissing)
    assert not isinstance(CocoPanopticMetric(PANOPTIC_CLASSES), CountsMissing)
    truth, nothing = pair([thing(square(0, 0, 4)), thing(square(4, 4, 4), 2, 2)], [])
    empty, same = metric.empty(truth), metric.update(truth, nothing)
    assert metric.compute(metric.merge([empty])) == metric.compute(metric.merge([same]))
    assert [(c.tp, c.fp, c.fn) for c in metric.image(empty).classes] == [(0, 0, 1)] * 2
    assert metric.image(empty).score == 0.0


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        ([{"score": float("nan")}], "bad-score", "detection 1 has the score nan"),
        ([{"score": 1.5}], "bad-score", "the score 1.5"),
        ([{"score": -0.1}], "bad-score", "the score -0.1"),
        ([{"score": 0.1}, {"score": 0.2}], "duplicate-id", "2 detections of id 1"),
        ([{"score": 0.1, "category_id": 5}], "unknown-class", "class 5"),
        ([{"score": 0.1, "counts": b"\xff"}], "bad-mask", "detection 1: COCO counts hold a character"),
        ([{"score": 0.1, "counts": b"3"}], "bad-mask", "detection 1: COCO counts cover 3 pixels, 8 x 8 needs 64"),
        ([{"score": 0.1, "counts": b"o" * 9}], "bad-mask", "detection 1: COCO counts hold a number of more than"),
        ([{"score": 0.1, "counts": b""}], "bad-mask", "cover 0 pixels"),
    ],
)
def test_detections_that_cannot_be_are_refused_by_name(found: list[dict[str, Any]], code: str, words: str) -> None:
    metric = CocoInstanceMetric(THINGS)
    with pytest.raises(DataError, match=words) as caught:
        metric.update(*pair([thing(square(0, 0, 4))], [thing(square(0, 0, 4), **f) for f in found], "street/7"))
    assert caught.value.code == code
    assert "street/7" in str(caught.value)


def test_objects_and_sizes_that_cannot_be_are_refused_by_name() -> None:
    metric = CocoInstanceMetric(THINGS)
    with pytest.raises(DataError, match="ground truth is 8 x 8 pixels, the prediction 9 x 8") as caught:
        metric.update(*pair([], [], size=(8, 9)))
    assert caught.value.code == "size-mismatch"
    with pytest.raises(DataError, match="the mask of object 4: COCO counts cover 3 pixels"):
        metric.update(*pair([thing(square(0, 0, 1)), thing(square(0, 0, 1), number=4, counts=b"3")], []))


def test_state_is_as_small_as_it_says() -> None:
    metric, states = instance_states(random_case(3))
    whole = metric.merge(states)
    per_detection: list[np.ndarray] = [whole.category, whole.score, *whole.matched.values(), *whole.ignored.values()]
    assert sum(a.itemsize for a in per_detection) == 44
    assert whole.object_category.itemsize + whole.object_ranges.itemsize == 12
    per_image = sum(a[0].nbytes for a in whole.proposals.values()) + 2 * 8
    assert per_image < 550


def test_other_thresholds_and_ranges_need_no_other_code() -> None:
    class Strict(CocoInstanceMetric):
        rules: ClassVar[Rules] = Rules(thresholds=(0.75,), detections=(1, 2), proposals=(1,), ranges={"all": (0, 1e10)})

    metric = Strict(THINGS)
    mask = square(0, 0, 4)
    found = [thing(mask, score=0.9), thing(square(4, 4, 4), number=2, score=0.8)]
    figures = by_name(metric.compute(metric.merge([metric.update(*pair([thing(mask)], found))])))
    wanted = {"ap", "ap75", "ar_1", "ar_2", "proposal_ar_1"}
    assert {name.removeprefix("segm_") for name, c in figures if name.startswith("segm_") and not c} == wanted
    assert figures["segm_ap", ""] == figures["segm_ap75", "cat"] == pytest.approx(1)

    class TooMany(CocoInstanceMetric):
        rules: ClassVar[Rules] = Rules(thresholds=tuple(np.linspace(0.5, 0.9, 17)))

    with pytest.raises(ConfigError, match="17 IoUs for 4 ranges of size are too many"):
        TooMany(THINGS)


@pytest.mark.parametrize("make", [CocoInstanceMetric, CocoPanopticMetric])
def test_samples_without_classes_are_refused(make: Callable[[ClassTable], object]) -> None:
    with pytest.raises(ConfigError, match="needs classes, the samples name none"):
        make(ClassTable(()))


# -- panoptic --------------------------------------------------------------------------------------------------------


def test_panoptic_quality_is_that_of_the_rule() -> None:
    crowded = void = unmatched = 0
    for seed in range(120):
        scenes = random_scenes(seed)
        metric, states = panoptic_states(seed)
        found = by_name(metric.compute(metric.merge(reversed(states))))
        assert found == reference_pq(scenes, PANOPTIC_CLASSES), seed
        crowded += any(s["iscrowd"] for _, t, _ in scenes for s in t.segments)
        void += any((t.ids == 0).any() for _, t, _ in scenes)
        unmatched += found["pq", ""] == 0
    assert min(crowded, void, unmatched) > 10


def whole(size: int, category: int, number: int = 5, **more: Any) -> Scene:
    entry = {"id": number, "category_id": category, "area": size, "iscrowd": 0, **more}
    return Scene(np.full((1, size), number), [entry])


def test_a_match_needs_more_than_half() -> None:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    half = Scene(np.array([[8] * 5 + [0] * 5]), [{"id": 8, "category_id": 1, "area": 5, "iscrowd": 0}])
    state = metric.update(whole(10, 1).row("samples", 1), half.row("masks", 1))
    assert [(c.tp, c.fp, c.fn) for c in metric.image(state).classes] == [(0, 1, 1)]
    assert metric.image(state).score == 0.0
    more = replace(half, ids=np.array([[8] * 6 + [0] * 4]))
    state = metric.update(whole(10, 1).row("samples", 1), more.row("masks", 1))
    assert by_name(metric.compute(state))["pq", "class1"] == by_name(metric.compute(state))["sq", "class1"] == 0.6


def test_segments_of_ignored_classes_are_void() -> None:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    state = metric.update(whole(10, 9).row("samples", 1), whole(10, 3).row("masks", 1))
    assert (metric.image(state).score, metric.image(state).classes) == (None, ())
    state = metric.update(whole(10, 3).row("samples", 1), whole(10, 9).row("masks", 1))
    assert [(c.tp, c.fp, c.fn) for c in metric.image(state).classes] == [(0, 0, 1)]


def test_predicted_segments_without_pixels_do_not_count() -> None:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    predicted = whole(10, 3)
    predicted.segments.append({"id": 77, "category_id": 1, "area": 4, "iscrowd": 0})
    state = metric.update(whole(10, 3).row("samples", 1), predicted.row("masks", 1))
    assert [f.value for f in metric.compute(state) if not f.class_name] == [1.0] * 3 + [None] * 3 + [1.0] * 3


def test_maps_that_cannot_be_are_refused_by_name() -> None:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    good = whole(10, 3)
    cases = {
        "size-mismatch": (good, whole(11, 3), "ground truth is 10 x 1 pixels, the prediction 11 x 1"),
        "unknown-class": (good, whole(10, 4), "the prediction has a segment of class 4"),
        "bad-annotation": (whole(10, 3, area=0), whole(10, 3), "segment 5 has more pixels than the area"),
    }
    for code, (truth, predicted, words) in cases.items():
        with pytest.raises(DataError, match=words) as caught:
            metric.update(truth.row("samples", 1), predicted.row("masks", 1))
        assert caught.value.code == code
    same = {"sample_id": "1", "height": 1, "width": 10, "segments": []}
    shown = row_of("masks", same | {"panoptic": np.ones((1, 10), np.uint16)})
    short = row_of("masks", same | {"panoptic": np.zeros((1, 9), np.uint16)})
    with pytest.raises(DataError, match="the prediction shows more than its 0 segments"):
        metric.update(good.row("samples", 1), shown)
    with pytest.raises(DataError, match="the runs of the prediction do not fill its 10 pixels"):
        metric.update(good.row("samples", 1), short)


def test_every_field_of_a_state_is_merged() -> None:
    for metric, states in (instance_states(random_case(3)), panoptic_states(3)):
        merged, first = metric.merge([*states, *states]), metric.merge(states)  # type: ignore[arg-type]
        for f in fields(first):
            one, two = getattr(first, f.name), getattr(merged, f.name)
            if f.name == "partners":
                assert (one, two) == (None, None)  # of one image alone
                continue
            sizes = [(len(one[k]), len(two[k])) for k in one] if isinstance(one, dict) else [(len(one), len(two))]
            assert all(b == 2 * a > 0 for a, b in sizes), f.name


def many_segments(seed: int) -> tuple[Scene, Scene]:
    """Forty segments of one class, their ids not in the order of their places, each found with an IoU of its own."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(rng.permutation(40) + 1, 97).reshape(40, 97)
    found = ids.copy()
    for row in found:
        row[: rng.integers(0, 48)] = 0
    segments = [{"id": i, "category_id": 1, "area": 97, "iscrowd": 0} for i in rng.permutation(40).tolist()]
    return Scene(ids, [s | {"id": s["id"] + 1} for s in segments]), Scene(
        found, [s | {"id": s["id"] + 1} for s in segments]
    )


def test_ious_are_summed_in_the_order_of_the_ids() -> None:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    scenes = [(number, *many_segments(number)) for number in (3, 9, 10, 11, 100)]
    states = [metric.update(t.row("samples", i), p.row("masks", i)) for i, t, p in scenes]
    wanted = reference_pq(scenes, PANOPTIC_CLASSES)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 1, 4, 0, 2]):
        assert by_name(metric.compute(metric.merge(states[i] for i in order))) == wanted
    others = {
        reference_pq([scenes[i] for i in order], PANOPTIC_CLASSES)["pq", ""]
        for order in ([4, 2, 0, 1, 3], [3, 1, 4, 0, 2])
    }
    assert others != {wanted["pq", ""]}  # so the order does matter
