"""BDD100K's protocols against the official rules, written down anew in ``bdd100k_cases``, and by properties."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bdd100k_cases as cases
import numpy as np
import pyarrow as pa
import pytest
from coco_cases import TWELVE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segbatch.codecs import columns, rle, runlength
from segbatch.datasets import tables
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Labels
from segbatch.formats.bdd100k import InstanceSegmentation
from segbatch.metrics import registry
from segbatch.metrics.base import CountsMissing, Metric, Row
from segbatch.records import ClassInfo, ClassTable, Instance

PROTOCOLS = ("bdd100k-sem", "bdd100k-drivable", "bdd100k-lane", "bdd100k-pan", "bdd100k-ins")
CASES = 60
"""Random cases of each protocol; ``MANY`` in the slow test."""
MANY = 3000
PAN_CATEGORIES = (0, 7, 8, 30, 31, 35, 35, 38)


@dataclass
class Case:
    """A data set: states of its images, and the official figures."""

    metric: Metric[Any]
    states: list[Any]
    official: cases.Figures
    per_cent: bool = False
    """Whether the official figures are per cent; else shares."""

    def check(self, seed: int) -> None:
        found = by_name(self.metric, self.states)
        assert found.keys() == self.official.keys()
        for key, value in self.official.items():
            expected = value / 100 if self.per_cent and value is not None else value
            assert found[key] == expected, (seed, key)


def by_name(metric: Metric[Any], states: Sequence[Any]) -> dict[tuple[str, str], float | None]:
    figures = metric.compute(metric.merge(states))
    assert all(f.slice == "" and isinstance(f.support, int) for f in figures)
    return {(f.metric, f.class_name): f.value for f in figures}


def evaluator(protocol: str) -> Metric[Any]:
    return registry.make(protocol, tables.load(protocol))


def state_of(metric: Metric[Any], rows: tuple[Row, Row], is_missing: bool) -> Any:
    if not is_missing:
        return metric.update(*rows)
    assert isinstance(metric, CountsMissing)
    return metric.empty(rows[0])


def names_of(protocol: str) -> list[str]:
    return [c.name for c in tables.load(protocol).scored]


def random_case(protocol: str, seed: int) -> Case:
    """One to four images, some of them without a prediction where the official code takes that."""
    rng = np.random.default_rng(seed)
    images = [f"{i:02d}" for i in range(rng.integers(1, 5))]
    missing = [bool(m) for m in rng.random(len(images)) < 0.15]
    return _MAKERS[protocol](rng, evaluator(protocol), images, missing)


def _maps(rng: np.random.Generator, metric: Metric[Any], images: Sequence[str], missing: Sequence[bool]) -> Case:
    table = tables.load(metric.name)
    pairs = [cases.random_maps(rng, [c.label_id for c in table.classes], table.ignore_ids[0]) for _ in images]
    rows = [
        tuple(cases.semantic_row(*r) for r in zip(("samples", "masks"), (n, n), pair, strict=True))
        for n, pair in zip(images, pairs, strict=True)
    ]
    return Case(
        metric, _states(metric, rows, missing), cases.official_semantic(_seen(pairs, missing), names_of(metric.name))
    )


def _lanes(rng: np.random.Generator, metric: Metric[Any], images: Sequence[str], missing: Sequence[bool]) -> Case:
    pairs = [cases.random_lanes(rng) for _ in images]
    rows = [
        (cases.lane_row("samples", n, t), cases.lane_row("masks", n, p))
        for n, (t, p) in zip(images, pairs, strict=True)
    ]
    official = cases.official_lanes(_seen(pairs, missing), names_of(metric.name))
    return Case(metric, _states(metric, rows, missing), official, per_cent=True)


def _segments(rng: np.random.Generator, metric: Metric[Any], images: Sequence[str], missing: Sequence[bool]) -> Case:
    pairs = [cases.random_bitmasks(rng, PAN_CATEGORIES, 30) for _ in images]
    rows = [cases.panoptic_rows(n, *pair) for n, pair in zip(images, pairs, strict=True)]
    classes = {c.label_id: (c.name, c.isthing) for c in tables.load(metric.name).scored}
    official = cases.official_panoptic(_seen(pairs, missing), classes)
    return Case(metric, _states(metric, rows, missing), official, per_cent=True)


def _objects(rng: np.random.Generator, metric: Metric[Any], images: Sequence[str], missing: Sequence[bool]) -> Case:
    """Missing predictions are an error there."""
    found = []
    for _ in images:
        pair = cases.random_bitmasks(rng, (1, 2, 3, 3, 8), int(rng.choice([12, 130])))
        found.append((*pair, cases.random_scores(rng, pair[1])))
    rows = [cases.instance_rows(n, *case) for n, case in zip(images, found, strict=True)]
    return Case(metric, [metric.update(*r) for r in rows], cases.official_instances(found, names_of(metric.name)))


_MAKERS: dict[str, Callable[..., Case]] = {
    "bdd100k-sem": _maps,
    "bdd100k-drivable": _maps,
    "bdd100k-lane": _lanes,
    "bdd100k-pan": _segments,
    "bdd100k-ins": _objects,
}


def _states(metric: Metric[Any], rows: Sequence[Any], missing: Sequence[bool]) -> list[Any]:
    return [state_of(metric, r, m) for r, m in zip(rows, missing, strict=True)]


def _seen(pairs: Sequence[tuple[Any, Any]], missing: Sequence[bool]) -> list[tuple[Any, Any]]:
    return [(t, None if m else p) for (t, p), m in zip(pairs, missing, strict=True)]


# -- the official rules ----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_are_the_official_ones_to_the_last_bit(protocol: str) -> None:
    for seed in range(CASES // 3 if protocol == "bdd100k-ins" else CASES):
        random_case(protocol, seed).check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_of_thousands_of_cases_are_the_official_ones(protocol: str) -> None:
    for seed in range(CASES, CASES + MANY):
        random_case(protocol, seed).check(seed)


def test_cases_cover_what_is_special() -> None:
    rng = np.random.default_rng(0)
    bitmasks = [cases.random_bitmasks(rng, (1, 3), 130) for _ in range(60)]
    flags = {f & 3 for t, _ in bitmasks for _, _, f in cases.objects_of(t).values()}
    assert flags == {0, 1, 2, 3}
    assert 2 in {f for _, p in bitmasks for _, _, f in cases.objects_of(p).values()}
    sizes = {int(m.sum()) for t, _ in bitmasks for m, _, _ in cases.objects_of(t).values()}
    assert {1, 1024} <= sizes
    assert any(not cases.objects_of(t) for t, _ in bitmasks)
    lanes = [cases.random_lanes(rng) for _ in range(60)]
    assert any((t == 255).all() for t, _ in lanes)
    assert any((p == 0).all() for _, p in lanes)


# -- figures that the official tests state ---------------------------------------------------------------------------


def square(ids: Sequence[tuple[slice, slice, int]], fill: int, size: int = 10) -> cases.Map:
    found = np.full((size, size), fill, np.uint8)
    for rows, cols, value in ids:
        found[rows, cols] = value
    return found


def test_published_figures_of_two_label_maps() -> None:
    """tests/eval/seg_test.py: [[93, 1], [4, 2]], and the same with a second image that nothing was predicted for."""
    truth = np.repeat([0, 1], [94, 6]).astype(np.uint8).reshape(10, 10)
    predicted = np.repeat([0, 1, 0, 1], [93, 1, 4, 2]).astype(np.uint8).reshape(10, 10)
    metric = evaluator("bdd100k-sem")
    rows = [cases.semantic_row("samples", "a", truth), cases.semantic_row("masks", "a", predicted)]
    states = [metric.update(*rows), state_of(metric, (rows[0], rows[1]), True)]
    names = ("mean_precision", "miou", "fwiou", "global_accuracy")
    found = by_name(metric, states[:1])
    assert [100 * (found[n, ""] or 0) for n in names] == [81.27147766323024, 61.73469387755102, 90.91836734693878, 95.0]
    found = by_name(metric, states)
    assert [100 * (found[n, ""] or 0) for n in names] == [
        81.27147766323024,
        31.911057692307693,
        46.45432692307692,
        47.5,
    ]


def test_published_figures_of_six_objects() -> None:
    """tests/eval/ins_seg_test.py: create_test_file."""
    truth, found = np.zeros((2, 100, 100, 4), np.uint8)
    for (top, bottom, left, right), category, number in (
        ((0, 10, 0, 10), 1, 1),
        ((20, 40, 10, 20), 2, 2),
        ((20, 40, 20, 30), 3, 3),
        ((40, 60, 10, 30), 3, 4),
        ((40, 60, 30, 40), 3, 5),
        ((60, 70, 50, 60), 3, 6),
    ):
        truth[top:bottom, left:right] = (category, 0, 0, number)
    for (top, bottom, left, right), category, number in (
        ((0, 10, 0, 10), 1, 1),
        ((20, 40, 10, 19), 2, 2),
        ((20, 40, 20, 27), 3, 4),
        ((40, 60, 10, 22), 3, 6),
        ((40, 60, 30, 35), 3, 7),
        ((60, 70, 50, 54), 3, 8),
    ):
        found[top:bottom, left:right] = (category, 0, 0, number)
    scores = [(1, 0.4), (2, 0.9), (3, 0.7), (4, 0.8), (6, 0.9), (7, 0.9), (8, 0.9), (9, 0.9)]
    metric = evaluator("bdd100k-ins")
    figures = by_name(metric, [metric.update(*cases.instance_rows("a", truth, found, scores))])
    published = [68.60561056105611, 89.68646864686468, 66.66666666666666, 68.60561056105611, None, None]
    published += [65.83333333333333, 70.83333333333334, 70.83333333333334, 70.83333333333334, None, None]
    for name, value in zip(TWELVE, published, strict=True):
        figure = figures[f"segm_{name}", ""]
        assert figure == value if value is None else 100 * (figure or 0) == value, name
    by_class = {"pedestrian": 99.99999999999997, "rider": 89.99999999999999, "car": 15.816831683168317, "bus": None}
    for name, value in by_class.items():
        figure = figures["segm_ap", name]
        assert figure == value if value is None else 100 * (figure or 0) == value, name


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ((slice(3, 4), slice(3, 7)), (slice(7, 8), slice(3, 7)), (0.0, 0.0, 1.0)),
        ((slice(3, 4), slice(3, 6)), (slice(5, 8), slice(7, 8)), (0.0, 0.0, 1.0)),
    ],
)
def test_published_figures_of_two_lines(truth: Any, predicted: Any, expected: tuple[float, ...]) -> None:
    """tests/eval/lane_test.py: two parallel lines, and two at right angles; their radii 1, 2 and 5."""
    metric = evaluator("bdd100k-lane")
    maps = [square([(*where, 6)], 255) for where in (truth, predicted)]
    found = by_name(
        metric, [metric.update(cases.lane_row("samples", "a", maps[0]), cases.lane_row("masks", "a", maps[1]))]
    )
    assert tuple(found[f"f1_pix{d}", "single white"] for d in (1, 2, 5)) == expected
    assert found["f1_pix1", "crosswalk"] == 1.0  # neither has one


def test_published_quality_of_a_match_and_a_false_one() -> None:
    """tests/eval/pan_seg_test.py: an IoU of .9 and one false positive are PQ 60, SQ 90, RQ 66.67.

    The false one lies on a true segment of another class, for one on void would be left out.
    """
    truth, predicted = np.zeros((2, 4, 10, 4), np.uint8)
    truth[0], truth[1:3] = (7, 0, 0, 1), (8, 0, 0, 2)
    predicted[0, :9], predicted[1:3] = (7, 0, 0, 1), (7, 0, 0, 2)
    metric = evaluator("bdd100k-pan")
    figures = by_name(metric, [metric.update(*cases.panoptic_rows("a", truth, predicted))])
    assert [round(100 * (figures[name, "road"] or 0), 10) for name in ("pq", "sq", "rq")] == [60.0, 90.0, 66.6666666667]


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    case = random_case(data.draw(st.sampled_from(PROTOCOLS)), data.draw(st.integers(0, 60)))
    metric, states = case.metric, case.states
    order = data.draw(st.permutations(range(len(states))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    pieces = [[states[i] for i in order[a:b]] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    whole = metric.compute(metric.merge(states))
    assert metric.compute(metric.merge([metric.merge(piece) for piece in pieces])) == whole
    names = [f"{i:02d}" for i in order]
    kept = metric.columns([None, *(states[i] for i in order)])
    batch = pa.RecordBatch.from_pydict({"sample_id": ["-", *names], "group_id": ["", *names], **kept})
    read = metric.states(batch.slice(1))
    assert metric.compute(metric.merge(s for s in read if s is not None)) == whole
    assert [metric.image(s) for s in read if s is not None] == [metric.image(states[i]) for i in order]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_has_no_figures(protocol: str) -> None:
    metric = evaluator(protocol)
    assert {v for (_, name), v in by_name(metric, []).items() if not name} == {None}


# -- label maps ------------------------------------------------------------------------------------------------------


def maps_state(metric: Metric[Any], truth: Any, predicted: Any) -> Any:
    left, right = (np.array(m, np.uint16) for m in (truth, predicted))
    return metric.update(cases.semantic_row("samples", "a", left), cases.semantic_row("masks", "a", right))


def test_pixels_are_counted_beyond_int32() -> None:
    metric = evaluator("bdd100k-drivable")
    state = maps_state(metric, [[0, 0, 1]], [[0, 1, 1]])
    found = by_name(metric, [state] * 3)
    large = type(state)(state.truth, state.predicted, state.pixels * 2**40)
    assert by_name(metric, [large] * 3) == found
    assert found["miou", ""] == 0.5


def test_background_of_drivable_areas_is_left_out_and_wrong_elsewhere() -> None:
    metric = evaluator("bdd100k-drivable")
    found = by_name(metric, [maps_state(metric, [[0, 0, 2, 255]], [[0, 2, 0, 0]])])
    assert (found["iou", "direct"], found["precision", "direct"], found["miou", ""]) == (0.5, 1.0, 0.5)
    assert found["iou", "alternative"] == 0.0
    assert ("iou", "background") not in found


def test_ids_that_no_class_has_are_refused_in_the_ground_truth_and_wrong_in_a_prediction() -> None:
    metric = evaluator("bdd100k-sem")
    with pytest.raises(DataError, match="has the id 33") as caught:
        maps_state(metric, [[0, 33]], [[0, 0]])
    assert caught.value.code == "unknown-class"
    found = by_name(metric, [maps_state(metric, [[0, 0]], [[0, 33]])])
    assert found["miou", ""] == 0.5
    assert by_name(metric, [maps_state(metric, [[0, 19, 255]], [[0, 1, 1]])])["miou", ""] == 1.0


# -- lanes -----------------------------------------------------------------------------------------------------------


def test_lanes_without_label_maps_are_parallel_and_solid() -> None:
    metric, byte = evaluator("bdd100k-lane"), square([(slice(2, 3), slice(0, 9), 6)], 255)
    plain = [cases.semantic_row(table, "a", byte) for table in ("samples", "masks")]
    whole = [cases.lane_row(table, "a", byte) for table in ("samples", "masks")]
    assert by_name(metric, [metric.update(*plain)]) == by_name(metric, [metric.update(*whole)])
    vertical = cases.lane_row("masks", "a", np.where(byte == 255, byte, byte | 32))
    found = by_name(metric, [metric.update(plain[0], vertical)])
    assert (found["f1_pix1", "parallel"], found["f1_pix1", "vertical"], found["f1_pix1_style", ""]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("semantic", "direction", "words"),
    [(14, 0, "category 14 in row 1, column 2"), (6, 255, "direction 255 in row 1, column 2")],
)
def test_lanes_of_no_kind_are_refused(semantic: int, direction: int, words: str) -> None:
    metric = evaluator("bdd100k-lane")
    label_map, way = np.full((2, 4), 255, np.uint8), np.full((2, 4), 0, np.uint8)
    label_map[1, 2], way[1, 2] = semantic, direction
    good = cases.lane_row("samples", "a", np.full((2, 4), 255, np.uint8))
    with pytest.raises(DataError, match=words) as caught:
        metric.update(good, cases.semantic_row("masks", "a", label_map, direction=way))
    assert caught.value.code == "unknown-class"


def test_runs_that_do_not_fill_their_image_are_refused() -> None:
    row = cases.lane_row("samples", "a", np.full((2, 4), 6, np.uint8))
    place = row.batch.schema.get_field_index("semantic")
    short = columns.runs_array([runlength.encode(np.zeros((1, 4), np.uint8))])
    bad = Row(row.batch.set_column(place, row.batch.schema.field(place), short), 0)
    for protocol in ("bdd100k-lane", "bdd100k-sem"):
        metric = evaluator(protocol)
        for rows in ((row, bad), (bad, row)):
            with pytest.raises(DataError, match="do not fill its 8 pixels") as caught:
                metric.update(*rows)
            assert caught.value.code == "bad-runs"
        with pytest.raises(DataError, match="do not fill its 8 pixels"):
            state_of(metric, (bad, bad), True)


# -- objects and segments --------------------------------------------------------------------------------------------


def test_an_image_tells_what_became_of_its_segments() -> None:
    truth, predicted = np.zeros((2, 4, 10, 4), np.uint8)
    truth[0], truth[1], truth[2] = (7, 0, 0, 4), (35, 0, 0, 5), (35, 2, 0, 6)
    predicted[0, :8], predicted[1], predicted[2] = (7, 0, 0, 1), (31, 0, 0, 2), (35, 0, 0, 3)
    metric = evaluator("bdd100k-pan")
    score = metric.image(metric.update(*cases.panoptic_rows("a", truth, predicted)))
    assert [(m.class_name, m.truth_id, m.predicted_id, m.iou, m.outcome) for m in score.matches or ()] == [
        ("road", 4, 1, 0.8, "tp"),
        ("car", 5, None, None, "fn"),
        ("car", 6, None, None, "ignored"),
        ("person", None, 2, None, "fp"),
        ("car", None, 3, None, "ignored"),
    ]
    assert score.score == pytest.approx(0.8 / 3)
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in score.classes] == [
        ("road", 1, 0, 0),
        ("person", 0, 1, 0),
        ("car", 0, 0, 1),
    ]


def test_an_image_tells_what_became_of_its_objects() -> None:
    truth, predicted = np.zeros((2, 5, 10, 4), np.uint8)
    for n, flags in enumerate((0, 2, 1, 0), 1):
        truth[n - 1] = (3, flags, 0, n)
    predicted[0], predicted[1, :6], predicted[1, 6:], predicted[2] = ((3, 0, 0, n) for n in (1, 2, 3, 4))
    predicted[4] = (2, 0, 0, 5)
    scores = [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (5, 0.5)]
    metric = evaluator("bdd100k-ins")
    score = metric.image(metric.update(*cases.instance_rows("a", truth, predicted, scores)))
    assert [(m.class_name, m.truth_id, m.predicted_id, m.iou, m.score, m.outcome) for m in score.matches or ()] == [
        ("rider", None, 5, None, 0.5, "fp"),
        ("car", 1, 1, 1.0, 0.9, "tp"),
        ("car", 2, 2, 0.6, 0.8, "tp"),
        ("car", None, 3, None, 0.7, "fp"),
        ("car", 3, 4, 1.0, 0.6, "ignored"),
        ("car", 4, None, None, None, "fn"),
    ]
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in score.classes] == [("rider", 0, 1, 0), ("car", 2, 1, 1)]


def test_more_objects_and_segments_than_a_hundred_count() -> None:
    pixels = np.zeros((12, 20, 4), np.uint8)
    pixels.reshape(-1, 4)[:120] = [(3, 0, 0, n) for n in range(1, 121)]
    metric = evaluator("bdd100k-ins")
    scores = [(n, 1 - n / 1000) for n in range(1, 121)]
    found = by_name(metric, [metric.update(*cases.instance_rows("a", pixels, pixels, scores))])
    assert found["segm_ar_100", "car"] == pytest.approx(100 / 120)
    pixels[pixels[..., 0] == 3, 0] = 35
    metric = evaluator("bdd100k-pan")
    assert by_name(metric, [metric.update(*cases.panoptic_rows("a", pixels, pixels))])["pq", "car"] == 1.0


def test_two_halves_of_a_crowd_are_both_right() -> None:
    truth, predicted = np.zeros((2, 4, 10, 4), np.uint8)
    truth[0], predicted[0, :5], predicted[0, 5:] = (3, 2, 0, 1), (3, 0, 0, 1), (3, 0, 0, 2)
    scores = [(1, 0.9), (2, 0.8)]
    metric = evaluator("bdd100k-ins")
    found = by_name(metric, [metric.update(*cases.instance_rows("a", truth, predicted, scores))])
    assert found == cases.official_instances([(truth, predicted, scores)], names_of("bdd100k-ins"))
    assert (found["segm_ar_1", ""], found["segm_ar_100", ""], found["segm_ap50", ""]) == (0.1, 0.2, 1.0)


@pytest.mark.parametrize(("side", "sizes"), [(32, ("small", "medium")), (96, ("medium", "large")), (33, ("medium",))])
def test_a_size_on_the_border_of_two_ranges_counts_in_both(side: int, sizes: tuple[str, ...]) -> None:
    pixels = np.zeros((100, 100, 4), np.uint8)
    pixels[:side, :side] = (3, 0, 0, 1)
    metric = evaluator("bdd100k-ins")
    found = by_name(metric, [metric.update(*cases.instance_rows("a", pixels, pixels, [(1, 0.5)]))])
    assert tuple(n for n in ("small", "medium", "large") if found[f"segm_ar_{n}", ""] is not None) == sizes


def overlapping() -> list[dict[str, Any]]:
    """Detections that cover each other: the best in front, the later of two equal ones, one without a pixel left."""
    found = []
    for number, (top, left, side, score) in enumerate(
        ((0, 0, 6, 0.5), (2, 2, 6, 0.9), (4, 4, 6, 0.5), (3, 3, 2, 0.4), (0, 5, 4, 0.5)), 1
    ):
        mask = np.zeros((12, 12), bool)
        mask[top : top + side, left : left + side] = True
        counts = rle.encode(mask)
        known = {"id": number, "category_id": 3, "bbox_xywh": rle.bbox(counts, 12, 12), "area": float(mask.sum())}
        found.append({**known, "iscrowd": False, "counts": counts, "score": score})
    return found


def test_detections_that_overlap_count_as_they_are_exported() -> None:
    entries = overlapping()
    row = Labels("a", "", 12, 12, instances=tuple(Instance(**e) for e in entries))
    _, bitmask, entry = InstanceSegmentation()._scored_file(row)
    with Image.open(io.BytesIO(bitmask)) as image:
        painted = np.array(image)
    order = [(label["index"], label["score"]) for label in json.loads(entry)["labels"]]
    truth = np.zeros((12, 12, 4), np.uint8)
    truth[:6, :6], truth[6:, 6:] = (3, 0, 0, 1), (3, 0, 0, 2)
    samples, masks = cases.instance_rows("a", truth, painted, order)
    place = masks.batch.schema.get_field_index("instances")
    field = masks.batch.schema.field(place)
    raw = Row(masks.batch.set_column(place, field, pa.array([entries], field.type)), 0)
    metric = evaluator("bdd100k-ins")
    left, right = metric.update(samples, raw), metric.update(samples, masks)
    assert by_name(metric, [left]) == by_name(metric, [right])
    assert metric.image(left) == metric.image(right)
    assert [i for i, _ in order] == [1, 2, 3, 5]


def test_attributes_that_cannot_be_read_are_said() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    for protocol, kind, rows in (
        ("bdd100k-pan", "segments", cases.panoptic_rows("a", pixels, pixels)),
        ("bdd100k-ins", "instances", cases.instance_rows("a", pixels, pixels, [])),
    ):
        place = rows[0].batch.schema.get_field_index("attributes")
        field = rows[0].batch.schema.field(place)
        bad = Row(rows[0].batch.set_column(place, field, pa.array([f'{{"{kind}": [1]}}'])), 0)
        with pytest.raises(DataError, match=f"attributes of its {kind} cannot be read") as caught:
            evaluator(protocol).update(bad, rows[1])
        assert caught.value.code == "bad-annotation"


@pytest.mark.parametrize(("protocol", "category"), [("bdd100k-ins", 9), ("bdd100k-pan", 41)])
def test_objects_of_unknown_classes_are_refused(protocol: str, category: int) -> None:
    good, bad = np.zeros((2, 3, 3, 4), np.uint8)
    bad[:] = (category, 0, 0, 1)
    metric = evaluator(protocol)
    for pair in ((good, bad), (bad, good)):
        rows = cases.panoptic_rows("a", *pair) if category == 41 else cases.instance_rows("a", *pair, [(1, 0.5)])
        with pytest.raises(DataError, match=f"object of class {category}") as caught:
            metric.update(*rows)
        assert caught.value.code == "unknown-class"


def test_images_without_a_prediction_are_an_error_for_instances_alone() -> None:
    counted = {p for p in PROTOCOLS if isinstance(evaluator(p), CountsMissing)}
    assert counted == {*PROTOCOLS} - {"bdd100k-ins"}


# -- class tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_other_classes_are_refused(protocol: str) -> None:
    other = ClassTable((ClassInfo(3, "a"), ClassInfo(4, "b")))
    with pytest.raises(ConfigError, match=f"protocol {protocol} wants the classes .* the samples have 3, 4"):
        registry.make(protocol, other)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sizes_that_differ_are_refused(protocol: str) -> None:
    small, large = (np.zeros((n, n, 4), np.uint8) for n in (3, 4))
    rows = {
        "bdd100k-pan": (cases.panoptic_rows("a", small, small)[0], cases.panoptic_rows("a", large, large)[1]),
        "bdd100k-ins": (cases.instance_rows("a", small, small, [])[0], cases.instance_rows("a", large, large, [])[1]),
    }
    maps = cases.semantic_row("samples", "a", small[..., 0]), cases.semantic_row("masks", "a", large[..., 0])
    with pytest.raises(DataError, match="ground truth is 3 x 3 pixels, the prediction 4 x 4") as caught:
        evaluator(protocol).update(*rows.get(protocol, maps))
    assert caught.value.code == "size-mismatch"
