"""Semantic metrics against naive pixel loops, and by properties."""

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.base import Row
from segbatch.metrics.camvid import CamVidMetric, CamVidStrictMetric
from segbatch.metrics.semantic import Joint, SemanticMetric
from segbatch.records import ClassInfo, ClassTable, Figure

Map = NDArray[np.uint16]

CAMVID = ClassTable((*(ClassInfo(i, f"class{i}") for i in range(11)), ClassInfo(11, "void", ignore=True)))
SPARSE = ClassTable(
    (ClassInfo(7, "road"), ClassInfo(0, "none", ignore=True), ClassInfo(300, "sky"), ClassInfo(2, "car"))
)


def row_of(label_map: Map, schema: pa.Schema, name: str = "a") -> Row:
    """A row with just what the metrics read."""
    height, width = label_map.shape
    values = {"sample_id": name, "height": height, "width": width}
    fields = [schema.field(n) for n in (*values, "semantic")]
    arrays = [pa.array([v], f.type) for v, f in zip(values.values(), fields, strict=False)]
    arrays.append(columns.runs_array([runlength.encode(label_map)]))
    return Row(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)), 0)


def state_of(metric: SemanticMetric, truth: Map, predicted: Map) -> Joint:
    return metric.update(row_of(truth, schemas.SAMPLES), row_of(predicted, schemas.MASKS))


def as_map(rows: Sequence[Sequence[int]]) -> Map:
    return np.array(rows, np.uint16)


def by_name(figures: Iterable[Figure]) -> dict[tuple[str, str], float | None]:
    return {(f.metric, f.class_name): f.value for f in figures}


def camvid_script(pairs: Sequence[tuple[Map, Map]]) -> tuple[float, float, float]:
    """compute_test_results.m pixel by pixel, ids counted from 1 as there: (global acc, class acc, mean IoU)."""
    n, unknown = 11, 12
    cf = [[0] * (n + 1) for _ in range(n + 1)]
    right = total = 0
    for truth, predicted in pairs:
        for annot, pred in zip((truth.ravel() + 1).tolist(), (predicted.ravel() + 1).tolist(), strict=True):
            if annot == unknown:
                continue
            total += 1
            if annot <= n and pred <= n:
                cf[annot][pred] += 1
                right += annot == pred
    accuracy = iou = 0.0
    for i in range(1, n + 1):
        row, column = sum(cf[i]), sum(line[i] for line in cf)
        if row > 0:
            accuracy += cf[i][i] / row
            iou += cf[i][i] / (row + column - cf[i][i])
    return (right / total if total else math.nan), accuracy / n, iou / n


def pixel_loop(
    pairs: Sequence[tuple[Map, Map]], scored: Sequence[int], ignored: Sequence[int]
) -> dict[tuple[str, int], float | None]:
    """Every figure of protocol ``semantic`` from sets of pixels, class by class."""
    pixels = [(int(t), int(p)) for a, b in pairs for t, p in zip(a.ravel(), b.ravel(), strict=True)]
    pixels = [(t, p) for t, p in pixels if t not in ignored]
    found: dict[tuple[str, int], float | None] = {}
    for c in scored:
        tp = sum(t == c and p == c for t, p in pixels)
        fn = sum(t == c and p != c for t, p in pixels)
        fp = sum(t != c and p == c and t in scored for t, p in pixels)
        found["iou", c] = tp / (tp + fp + fn) if tp + fp + fn else None
        found["dice", c] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
        found["recall", c] = found["accuracy", c] = tp / (tp + fn) if tp + fn else None
        found["precision", c] = tp / (tp + fp) if tp + fp else None
    support = {c: sum(t == c for t, _ in pixels) for c in scored}
    means = {"miou": "iou", "mean_class_accuracy": "accuracy"}
    means |= {f"mean_{name}": name for name in ("dice", "precision", "recall")}
    for name, of in means.items():
        values = [v for c in scored if (v := found[of, c]) is not None]
        found[name, -1] = math.fsum(values) / len(values) if values else None
    found["global_accuracy", -1] = sum(t == p and t in scored for t, p in pixels) / len(pixels) if pixels else None
    whole = sum(support.values())
    found["fwiou", -1] = math.fsum((found["iou", c] or 0) * support[c] / whole for c in scored) if whole else None
    return found


def random_pairs(generator: random.Random, ids: Sequence[int]) -> list[tuple[Map, Map]]:
    """A few tiny images of a few classes: absent classes, all void, one pixel all come up."""
    pairs = []
    for _ in range(generator.randint(1, 3)):
        height, width = generator.randint(1, 4), generator.randint(1, 4)
        few = generator.sample(ids, generator.randint(1, min(5, len(ids))))
        draw = [[generator.choice(few) for _ in range(width)] for _ in range(2 * height)]
        pairs.append((as_map(draw[:height]), as_map(draw[height:])))
    return pairs


def total_of(metric: SemanticMetric, pairs: Sequence[tuple[Map, Map]]) -> Joint:
    return metric.merge([state_of(metric, t, p) for t, p in pairs])


@pytest.mark.long
def test_camvid_equals_the_official_script_on_random_cases() -> None:
    generator, metric = random.Random(1), CamVidMetric(CAMVID)
    for _ in range(1500):
        pairs = random_pairs(generator, [*range(12), 12, 255])
        figures = by_name(metric.compute(total_of(metric, pairs)))
        accuracy, class_accuracy, iou = camvid_script(pairs)
        assert figures["miou", ""] == iou
        assert figures["mean_class_accuracy", ""] == class_accuracy
        assert figures["global_accuracy", ""] == (None if math.isnan(accuracy) else accuracy)


@pytest.mark.long
def test_semantic_equals_pixel_loops_on_random_cases() -> None:
    generator, metric = random.Random(2), SemanticMetric(SPARSE)
    scored = [c.label_id for c in SPARSE.scored]
    for _ in range(1200):
        pairs = random_pairs(generator, [0, 2, 7, 300, 9, 65535])
        figures = metric.compute(total_of(metric, pairs))
        wanted = pixel_loop(pairs, scored, SPARSE.ignore_ids)
        ids = {"": -1} | {c.name: c.label_id for c in SPARSE.scored}
        found = {(f.metric, ids[f.class_name]): f.value for f in figures}
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == (value if value is None else pytest.approx(value, rel=1e-14)), key


def test_strict_counts_void_predictions_as_misses() -> None:
    truth, predicted = as_map([[0, 0, 0, 1, 1, 11]]), as_map([[0, 11, 255, 1, 0, 0]])
    loose, strict = (
        by_name(m.compute(total_of(m, [(truth, predicted)])))
        for m in (CamVidMetric(CAMVID), CamVidStrictMetric(CAMVID))
    )
    assert loose["iou", "class0"] == 1 / 2  # TP 1, one pixel of class 1 predicted 0, two void pixels dropped
    assert strict["iou", "class0"] == 1 / 4
    assert loose["accuracy", "class0"] == 1.0
    assert strict["accuracy", "class0"] == 1 / 3 == loose["recall", "class0"] == strict["recall", "class0"]
    assert loose["global_accuracy", ""] == strict["global_accuracy", ""] == 2 / 5
    assert loose["miou", ""] == (1 / 2 + 1 / 2) / 11
    assert strict["miou", ""] == (1 / 4 + 1 / 2) / 11


def test_an_image_of_void_predictions_scores_zero_and_not_undefined() -> None:
    for metric in (SemanticMetric(CAMVID), CamVidMetric(CAMVID)):
        score = metric.image(state_of(metric, as_map([[3, 3]]), as_map([[11, 11]])))
        assert score.score == 0.0
        assert [(c.label_id, c.tp, c.fp, c.fn) for c in score.classes] == [(3, 0, 0, 2)]


def test_an_image_without_scored_pixels_has_no_score() -> None:
    metric = SemanticMetric(CAMVID)
    score = metric.image(state_of(metric, as_map([[11, 11]]), as_map([[0, 3]])))
    assert score.score is None
    assert score.classes == ()
    assert all(f.value is None for f in metric.compute(metric.merge([])))


def test_confusion_names_void_predictions_and_leaves_out_ignored_truth() -> None:
    metric = SemanticMetric(SPARSE)
    found = metric.confusion(state_of(metric, as_map([[7, 7, 0, 2]]), as_map([[7, 0, 7, 65535]])))
    assert found.truth_names == ("road", "sky", "car")
    assert found.predicted_names == ("road", "sky", "car", "none", "65535")
    assert found.predicted_ids == (7, 300, 2, 0, 65535)
    assert found.pixels.tolist() == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_sizes_that_differ_are_refused_by_name() -> None:
    metric = SemanticMetric(CAMVID)
    truth = row_of(as_map([[0, 0]]), schemas.SAMPLES, "street/7")
    with pytest.raises(DataError, match=r"street/7.*2 x 1 pixels.*1 x 2") as caught:
        metric.update(truth, row_of(as_map([[0], [0]]), schemas.MASKS))
    assert caught.value.code == "size-mismatch"


def test_counts_beyond_32_bits_stay_exact() -> None:
    metric = CamVidMetric(CAMVID)
    pixels = 2**40 + 1
    joint = Joint(np.array([0, 0], np.uint16), np.array([0, 1], np.uint16), np.array([pixels, 1], np.uint64))
    figures = by_name(metric.compute(metric.merge([joint] * 1000)))
    assert figures["global_accuracy", ""] == pixels / (pixels + 1)
    assert metric.merge([joint] * 1000).pixels.tolist() == [1000 * pixels, 1000]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    metric = SemanticMetric(SPARSE)
    generator = random.Random(data.draw(st.integers(0, 2**32)))
    states = [state_of(metric, t, p) for _ in range(4) for t, p in random_pairs(generator, [0, 2, 7, 300, 9])]
    whole = metric.merge(states)
    order = data.draw(st.permutations(states))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    again = metric.merge([metric.merge(piece) for piece in pieces])
    for name in ("truth", "predicted", "pixels"):
        left, right = getattr(whole, name), getattr(again, name)
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()
    assert metric.compute(whole) == metric.compute(again)


def test_camvid_refuses_other_classes() -> None:
    with pytest.raises(ConfigError, match="protocol camvid wants the classes 0 to 10"):
        registry.make("camvid", SPARSE)


def test_unknown_protocols_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean camvid.*known: ade20k,.* camvid, camvid-strict,.* semantic"):
        registry.make("camvit", CAMVID)


@pytest.mark.parametrize(
    "dataset", ["ade20k", "camvid", "ccp", "coco-stuff", "pascal-context", "pascal-voc", "pratheepan"]
)
def test_datasets_with_a_protocol_of_their_name_use_it(dataset: str) -> None:
    assert registry.default_protocol(dataset, ["semantic"]) == dataset


def test_default_protocols() -> None:
    assert registry.default_protocol("image-masks", ["semantic", "instance", "panoptic"]) == "semantic"
    assert registry.default_protocol("image-masks") == registry.default_protocol("image-masks", ["box"]) == "semantic"
    assert (
        registry.default_protocol("coco-instances") == registry.default_protocol("x", ["instance"]) == "coco-instance"
    )
    assert registry.default_protocol("coco-panoptic") == registry.default_protocol("x", ["panoptic"]) == "coco-panoptic"
