"""The evaluators of Cityscapes and KITTI against the official code, and by properties."""

from collections.abc import Callable, Sequence
from typing import Any

import cityscapes_cases as cases
import coco_cases
import numpy as np
import pyarrow as pa
import pytest
from cityscapes_cases import Found, Scene, pair_of, random_scenes, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from segbatch.codecs import rle, runlength
from segbatch.datasets import tables
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.base import Metric, Row
from segbatch.metrics.cityscapes import SCORED, CityscapesMetric, compiled
from segbatch.metrics.cityscapes_instance import CityscapesInstanceMetric
from segbatch.metrics.cityscapes_panoptic import CityscapesPanopticMetric
from segbatch.metrics.coco_panoptic import CocoPanopticMetric
from segbatch.metrics.semantic import NOTHING
from segbatch.records import ClassInfo, ClassTable

CLASSES = tables.load("cityscapes")
IMAGE = "ulm_000000_000019"
SEGMENT_CLASSES = {1: 24, 3: 26, 7: 7, 200: 21}
FEW, MANY = range(60), range(60, 3000)

official_code = pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
both = pytest.mark.parametrize("kitti", [False, True], ids=["cityscapes", "kitti"])


@pytest.fixture
def scripts() -> None:
    pytest.importorskip("cityscapesscripts", reason="cityscapesScripts is not installed")


def figures(metric: Metric[Any], states: Sequence[Any]) -> cases.Values:
    return {(f.metric, f.class_name): f.value for f in metric.compute(metric.merge(states))}


def of_scenes(protocol: str, scenes: Sequence[Scene]) -> tuple[Metric[Any], list[Any]]:
    metric = registry.make(protocol, CLASSES)
    return metric, [metric.update(*pair_of(s, protocol.startswith("kitti"))) for s in scenes]


def segments(seed: int) -> list[tuple[int, coco_cases.Scene, coco_cases.Scene]]:
    """The scenes of COCO's tests, with classes of Cityscapes."""
    scenes = coco_cases.random_scenes(seed)
    for _, *sides in scenes:
        for entry in (s for side in sides for s in side.segments):
            entry["category_id"] = SEGMENT_CLASSES[entry["category_id"]]
    return scenes


def of_segments(seed: int) -> tuple[Metric[Any], list[Any]]:
    metric = CityscapesPanopticMetric(CLASSES)
    return metric, [metric.update(t.row("samples", i), p.row("masks", i)) for i, t, p in segments(seed)]


def scene(ids: np.ndarray, predicted: np.ndarray | None = None, *found: Found) -> Scene:
    made = Scene(IMAGE, ids.astype(np.uint16), np.zeros_like(ids), list(found))
    made.predicted = made.labels if predicted is None else predicted.astype(np.uint16)
    return made


def box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


# -- the official code -----------------------------------------------------------------------------------------------


@official_code
@both
@pytest.mark.usefixtures("scripts")
@pytest.mark.long
def test_pixel_level_figures_are_the_official_ones(kitti: bool, seeds: range) -> None:
    defined = 0
    for seed in seeds:
        scenes = random_scenes(seed)
        wanted = cases.official_pixel_level(scenes, cases.KITTI_SIZES if kitti else None)
        found = figures(*of_scenes("kitti" if kitti else "cityscapes", scenes))
        assert {k: wanted[k] for k in found} == found, seed
        assert {wanted[k] for k in wanted.keys() - found.keys()} <= {None}  # ignored classes, void
        defined += found["miiou", ""] is not None and found["category_miiou", ""] is not None
    assert defined > len(seeds) / 2


@official_code
@both
@pytest.mark.usefixtures("scripts")
@pytest.mark.long
def test_instance_level_figures_are_the_official_ones(kitti: bool, seeds: range) -> None:
    telling = gave_up = 0
    for seed in seeds:
        scenes = random_scenes(seed)
        found = figures(*of_scenes("kitti-instance" if kitti else "cityscapes-instance", scenes))
        try:
            wanted = cases.official_instance_level(scenes, kitti)
        except IndexError:
            gave_up += 1
            continue
        assert wanted == found, seed
        telling += found["ap", ""] not in (None, 0.0, 1.0)
    assert telling > len(seeds) / 4
    assert gave_up < len(seeds) / 4


@official_code
@pytest.mark.usefixtures("scripts")
def test_panoptic_figures_are_the_official_ones(seeds: range) -> None:
    telling = 0
    for seed in seeds:
        found = figures(*of_segments(seed))
        assert cases.official_panoptic(segments(seed), CLASSES) == found, seed
        telling += found["pq", ""] not in (None, 0.0, 1.0)
    assert telling > len(seeds) / 2


@both
@pytest.mark.usefixtures("scripts")
def test_a_small_group_counts_twice_on_void_as_officially(kitti: bool) -> None:
    size = (20, 40)
    group, car = box(size, 0, 0, 6, 10), box(size, 8, 0, 10, 20)
    ids = np.where(group, 26, np.where(car, 26000, 7))
    found = [Found(box(size, 0, 0, 10, 10), 26, 0.9), Found(car, 26, 0.5)]  # 60 of 100 pixels are on the group
    scenes = [scene(ids, None, *found)]
    name = "kitti-instance" if kitti else "cityscapes-instance"
    result = figures(*of_scenes(name, scenes))
    assert result == cases.official_instance_level(scenes, kitti)
    assert result["ap50", "car"] == 1.0
    assert (result["ap", "car"] == 1.0) is (not kitti)  # for KITTI it is an object, which is small, and counts once


@pytest.mark.usefixtures("scripts")
def test_where_all_detections_are_ignored_the_official_code_gives_up_and_ap_is_0() -> None:
    size = (20, 40)
    ids = np.where(box(size, 0, 0, 10, 10), 26000, 0)
    scenes = [scene(ids, None, Found(box(size, 0, 20, 10, 10), 26, 0.9))]
    with pytest.raises(IndexError):
        cases.official_instance_level(scenes)
    found = figures(*of_scenes("cityscapes-instance", scenes))
    assert (found["ap", "car"], found["ap", ""], found["ap", "bus"]) == (0.0, 0.0, None)


def test_kitti_takes_number_0_for_an_object_and_only_label_0_for_void() -> None:
    size = (20, 40)
    ids = np.where(box(size, 0, 0, 10, 10), 26, np.where(box(size, 0, 20, 10, 10), 26001, 4))
    scenes = [scene(ids, None, Found(ids == 26001, 26, 0.5), Found(box(size, 12, 0, 8, 8), 26, 0.9))]
    assert figures(*of_scenes("cityscapes-instance", scenes))["ap", "car"] == 1.0
    assert figures(*of_scenes("kitti-instance", scenes))["ap", "car"] == 0.125


# -- states ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 400))
    name = data.draw(st.sampled_from(["cityscapes", "cityscapes-instance", "kitti", "kitti-instance", "panoptic"]))
    metric, states = of_segments(seed) if name == "panoptic" else of_scenes(name, random_scenes(seed, 20))
    order = data.draw(st.permutations(states))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    whole = metric.compute(metric.merge(states))
    assert metric.compute(metric.merge([metric.merge(piece) for piece in pieces])) == whole
    names = [s.images[0] for s in order]
    batch = pa.RecordBatch.from_pydict({"sample_id": names, "group_id": names, **metric.columns(order)})
    read = metric.states(batch)
    assert metric.compute(metric.merge(s for s in read if s is not None)) == whole
    assert [metric.image(s) for s in read if s is not None] == [metric.image(s) for s in order]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_labels_under_masks_are_counted_as_on_pixels(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    label_map = data.draw(arrays.arrays(np.uint16, size, elements=st.sampled_from([0, 1, 2, 5, 65535])))
    masks = data.draw(st.lists(arrays.arrays(np.bool_, size), max_size=3))
    texts = [rle.encode(m) for m in masks]
    starts = np.cumsum([0, *map(len, texts)])
    counts = np.zeros((len(masks), 4), np.int64)
    runs = runlength.encode(label_map)
    assert compiled("label_pixels")(np.frombuffer(b"".join(texts), np.uint8), starts, *size, *runs, counts) == -1
    for mask, row in zip(masks, counts.tolist(), strict=True):
        shown = np.minimum(label_map[mask], 3)
        assert row == [int((shown == label).sum()) for label in range(4)]


# -- images ----------------------------------------------------------------------------------------------------------


def test_matches_tell_what_became_of_detections_and_objects() -> None:
    size = (40, 60)
    first, second, small = box(size, 0, 0, 10, 20), box(size, 12, 0, 10, 20), box(size, 24, 0, 5, 5)
    group = box(size, 0, 30, 10, 20)
    ids = np.select([first, second, small, group], [26000, 26001, 26002, 26], 7)
    found = [
        Found(box(size, 0, 0, 10, 16), 26, 0.5),  # 1: the second best of the first car
        Found(first, 26, 0.9),  # 2
        Found(group, 26, 0.8),  # 3
        Found(box(size, 30, 30, 5, 5), 26, 0.7),  # 4: on the road
        Found(second, 24, 0.6),  # 5: a person
        Found(np.zeros(size, bool), 26, 1.0),  # 6: nothing
        Found(second, 7, 0.6),  # 7: no thing
    ]
    metric, (state,) = of_scenes("cityscapes-instance", [scene(ids, None, *found)])
    score = metric.image(state)
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in score.classes] == [("person", 0, 1, 0), ("car", 1, 2, 1)]
    assert score.score == 0.5
    told = sorted((m.predicted_id or 0, m.truth_id or 0, m.outcome, m.iou, m.score) for m in score.matches or ())
    assert told == [
        (0, 26, "ignored", None, None),
        (0, 26001, "fn", None, None),
        (0, 26002, "ignored", None, None),
        (1, 26000, "fp", 0.8, 0.5),
        (2, 26000, "tp", 1.0, 0.9),
        (3, 0, "ignored", None, 0.8),
        (4, 0, "fp", None, 0.7),
        (5, 0, "fp", None, 0.6),
    ]


def test_an_image_without_objects_that_count_has_no_ap() -> None:
    metric, (state,) = of_scenes("cityscapes-instance", [scene(np.full((20, 20), 7))])
    assert (metric.image(state).score, metric.image(state).classes, metric.image(state).matches) == (None, (), ())


def test_confusion_is_of_the_scored_classes_and_what_is_predicted() -> None:
    metric, (state,) = of_scenes("cityscapes", [scene(np.array([[7, 7, 8, 0]]), np.array([[7, 29, 7, 7]]))])
    matrix = metric.confusion(metric.merge([state]))
    assert matrix is not None
    assert (matrix.truth_ids, matrix.predicted_ids) == (SCORED, (*SCORED, 29))
    assert (matrix.pixels.sum(), matrix.pixels[0, 0], matrix.pixels[0, -1], matrix.pixels[1, 0]) == (3, 1, 1, 1)
    assert metric.image(state).score == pytest.approx((1 / 3 + 0) / 2)


# -- input that is not as it should be -------------------------------------------------------------------------------


def problem(update: Callable[..., Any], *rows: Row) -> DataError:
    with pytest.raises(DataError) as caught:
        update(*rows)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def test_what_a_class_map_leaves_out_is_a_miss() -> None:
    truth = np.array([[7, 7, 8]])
    found = figures(*of_scenes("cityscapes", [scene(truth, np.array([[7, NOTHING, 8]]))]))
    assert (found["iou", "road"], found["iou", "sidewalk"], found["category_iou", "flat"]) == (0.5, 1.0, 2 / 3)


def test_without_instances_there_is_no_iiou() -> None:
    metric = CityscapesMetric(CLASSES)
    ids = np.where(box((20, 20), 0, 0, 10, 10), 26000, 7)
    (whole,) = of_scenes("cityscapes", [scene(ids)])[1]
    bare = metric.update(row_of("samples", "x", scene(ids).labels, None), pair_of(scene(ids))[1])
    assert figures(metric, [whole])["miiou", ""] == 1.0
    found = figures(metric, [whole, bare])
    assert found["miou", ""] == 1.0
    assert {v for (name, _), v in found.items() if name.endswith("iiou")} == {None}
    instances = CityscapesInstanceMetric(CLASSES)
    no_map = row_of("samples", "x", None, [])
    assert problem(instances.update, no_map, row_of("masks", "x", None, [])).code == "no-semantic"


@pytest.mark.parametrize("void", [0, 255])
def test_train_ids_are_refused_with_a_hint(void: int) -> None:
    labels = np.repeat([7, 11, 21, 23, 26, 4], 10)[None]
    train_ids = np.full(1 << 8, void)
    train_ids[list(SCORED)] = np.arange(len(SCORED))
    error = problem(lambda: of_scenes("cityscapes", [scene(labels, train_ids[labels])]))
    assert error.code == "unknown-class" and "trainId" in str(error)


def test_maps_that_could_be_train_ids_but_say_nothing_as_such_pass() -> None:
    labels = np.repeat([7, 11, 8, 1], 10)[None]
    for predicted in (labels, np.zeros_like(labels), np.full_like(labels, 7), np.full_like(labels, 1)):
        assert ("miou", "") in figures(*of_scenes("cityscapes", [scene(labels, predicted)]))


@pytest.mark.parametrize(("label", "code"), [(34, "unknown-class"), (255, "unknown-class")])
def test_ids_that_are_no_label_ids_are_refused(label: int, code: str) -> None:
    good, bad = np.array([[7, 8, 8]]), np.array([[7, 8, label]])
    for truth, predicted in ((good, bad), (bad, good)):
        rows = (row_of("samples", IMAGE, truth, []), row_of("masks", IMAGE, predicted.astype(np.uint16), []))
        assert problem(CityscapesMetric(CLASSES).update, *rows).code == code


@pytest.mark.parametrize("protocol", ["cityscapes-instance", "kitti-instance"])
def test_bad_detections_are_refused(protocol: str) -> None:
    size = (12, 12)
    mask, ids = box(size, 0, 0, 10, 10), np.full(size, 7)

    def code(*found: Found) -> str:
        return problem(lambda: of_scenes(protocol, [scene(ids, None, *found)])).code

    assert code(Found(mask, 26, 1.5)) == "bad-score"
    assert code(Found(mask, 26, float("nan"))) == "bad-score"
    assert code(Found(mask, 34, 0.5)) == "unknown-class"
    assert code(Found(mask, 13, 0.5), Found(mask, 11, 0.5)) == "unknown-class"  # trainIds of car and person
    assert code(Found(mask[1:], 26, 0.5)) == "bad-mask"
    truth, _ = pair_of(scene(ids))
    other = row_of("masks", IMAGE, np.full((12, 13), 7, np.uint16), [])
    metric = registry.make(protocol, CLASSES)
    assert problem(metric.update, truth, other).code == "size-mismatch"
    twice = [cases.instance(mask, 3, 26, score=0.5)] * 2
    row = row_of("masks", IMAGE, np.full(size, 7, np.uint16), twice)
    assert problem(metric.update, truth, row).code == "duplicate-id"


def test_a_bad_object_is_refused() -> None:
    label_map = np.full((12, 12), 7, np.uint16)
    objects = [cases.instance(np.ones((3, 3), bool), 26000, 26)]
    pair = (row_of("samples", IMAGE, label_map, objects), row_of("masks", IMAGE, label_map, []))
    for protocol in ("cityscapes", "cityscapes-instance"):
        assert problem(registry.make(protocol, CLASSES).update, *pair).code == "bad-mask"
    strange = row_of("samples", IMAGE, label_map, [cases.instance(np.ones((12, 12), bool), 1, 99)])
    assert problem(CityscapesInstanceMetric(CLASSES).update, strange, pair[1]).code == "unknown-class"


def test_predicted_segments_of_ignored_classes_are_refused_but_void_for_coco() -> None:
    void = {"id": 5, "category_id": 4, "area": 4, "iscrowd": 0}
    truth = coco_cases.Scene(np.zeros((2, 2), np.int64), [])
    predicted = coco_cases.Scene(np.full((2, 2), 5), [void])
    rows = truth.row("samples", 1), predicted.row("masks", 1)
    error = problem(CityscapesPanopticMetric(CLASSES).update, *rows)
    assert error.code == "unknown-class" and "trainId" in str(error)
    assert CocoPanopticMetric(CLASSES).update(*rows).images == ("1",)
    as_truth = predicted.row("samples", 1), truth.row("masks", 1)
    assert CityscapesPanopticMetric(CLASSES).update(*as_truth).images == ("1",)


@pytest.mark.parametrize(
    "protocol", ["cityscapes", "cityscapes-instance", "cityscapes-panoptic", "kitti", "kitti-instance"]
)
def test_other_classes_are_refused(protocol: str) -> None:
    table = ClassTable((ClassInfo(0, "road"), ClassInfo(1, "sidewalk")))
    with pytest.raises(ConfigError, match=f"protocol {protocol} wants"):
        registry.make(protocol, table)
    backwards = ClassTable(CLASSES.classes[::-1])
    by_class = [
        f.class_name for f in registry.make(protocol, backwards).compute(registry.make(protocol, CLASSES).merge([]))
    ]
    assert by_class.index("bicycle") > by_class.index("person")
