"""Protocols on label maps against their official formulas, written down anew on decoded pixels.

Oracles see pixels, one by one or as NumPy arrays; float sums are made in the order of the official code, so figures
must be equal in every bit where the official code prints them all.
"""

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch.codecs import columns, runlength
from segbatch.datasets import tables
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.base import DEFAULTS, Metric, MetricOptions, Resamples, Row
from segbatch.metrics.boundaries import boundary_width
from segbatch.metrics.semantic import SemanticMetric
from segbatch.records import ClassInfo, ClassTable, Figure

Map = NDArray[np.uint16]
Matrix = NDArray[np.float64]
Pairs = Sequence[tuple[Map, Map]]
Values = dict[tuple[str, str], float | None]

CASES = 250
MANY = 4000

SKIN = tables.load("pratheepan")
STUFF = tables.load("coco-stuff")
STUFF_JSON = ClassTable(
    (
        ClassInfo(0, "unlabeled", ignore=True),
        ClassInfo(183, "other", supercategory="other"),
        *(ClassInfo(c.label_id + 1, c.name, supercategory=c.supercategory) for c in STUFF.scored if not c.isthing),
    )
)
"""Of a ``stuff_SPLIT.json``, its categories in an order of their own."""

TABLE: dict[str, ClassTable] = {
    **dict.fromkeys(("ade20k", "ade20k-present"), tables.load("ade20k")),
    **dict.fromkeys(("binary", "pratheepan"), SKIN),
    "ccp": tables.load("ccp"),
    **dict.fromkeys(("coco-stuff", "coco-stuff-91"), STUFF),
    **dict.fromkeys(("pascal-context", "pascal-context-60"), tables.load("pascal-context-60")),
    "pascal-context-59": tables.load("pascal-context-59"),
    "pascal-voc": tables.load("pascal-voc"),
}
FEW = ClassTable((ClassInfo(0, "none", ignore=True), ClassInfo(1, "a"), ClassInfo(5, "b"), ClassInfo(900, "c")))


def rows(maps: Sequence[Map]) -> list[Row]:
    """Rows with just what label map protocols read."""
    sizes = [m.shape for m in maps]
    made = {
        "sample_id": pa.array([str(i) for i in range(len(maps))]),
        "group_id": pa.nulls(len(maps), pa.string()),
        "height": pa.array([h for h, _ in sizes], pa.int32()),
        "width": pa.array([w for _, w in sizes], pa.int32()),
        "semantic": columns.runs_array([runlength.encode(m) for m in maps]),
    }
    batch = pa.RecordBatch.from_pydict(made)
    return [Row(batch, i) for i in range(len(maps))]


def states_of(metric: Metric[Any], pairs: Pairs) -> list[Any]:
    sides = [rows(side) for side in zip(*pairs, strict=True)]
    return [metric.update(t, p) for t, p in zip(*sides, strict=True)]


def by_name(figures: Sequence[Figure]) -> Values:
    return {(f.metric, f.class_name): f.value for f in figures}


def figures_of(metric: Metric[Any], pairs: Pairs) -> Values:
    return by_name(metric.compute(metric.merge(states_of(metric, pairs))))


def as_map(*lines: Sequence[int]) -> Map:
    return np.array(lines, np.uint16)


def random_pairs(generator: random.Random, truth: Sequence[int], predicted: Sequence[int]) -> list[tuple[Map, Map]]:
    """Tiny images of few classes, half of the pixels right where that is allowed: absent classes, classes in one image
    only, images all void or of one pixel all come up."""
    pairs = []
    few = generator.sample(truth, min(len(truth), generator.randint(1, 12)))
    more = [*(i for i in few if i in predicted), generator.choice(predicted)]
    for _ in range(generator.randint(1, 4)):
        height, width = generator.randint(1, 5), generator.randint(1, 6)
        t = np.array([generator.choice(few) for _ in range(height * width)], np.uint16)
        p = np.array([generator.choice(more) for _ in t], np.uint16)
        right = np.array([generator.random() < 0.5 and int(i) in predicted for i in t])
        pairs.append((t.reshape(height, width), np.where(right, t, p).reshape(height, width)))
    return pairs


def cases(seed: int, truth: Sequence[int], predicted: Sequence[int], count: int) -> list[list[tuple[Map, Map]]]:
    generator = random.Random(seed)
    return [random_pairs(generator, truth, predicted) for _ in range(count)]


def confusion(pairs: Pairs, shape: int) -> Matrix:
    """Pixel by pixel; -1 as an id is the last one, as in NumPy."""
    found = np.zeros((shape, shape))
    for truth, predicted in pairs:
        for t, p in zip(truth.astype(int).ravel(), predicted.astype(int).ravel(), strict=True):
            found[t, p] += 1
    return found


def only(pairs: Pairs, keep: Callable[[Map], NDArray[np.bool_]]) -> list[tuple[Map, Map]]:
    """The pixels whose ground truth is kept, as flat maps."""
    return [(t[keep(t)], p[keep(t)]) for t, p in pairs]


sizes = pytest.mark.parametrize("count", [CASES, pytest.param(MANY, marks=pytest.mark.slow)])


# -- COCO-Stuff ------------------------------------------------------------------------------------------------------

FOUR = ("miou", "fwiou", "mean_class_accuracy", "global_accuracy")


def coco_metrics(matrix: Matrix) -> tuple[list[float], Matrix, Matrix]:
    """_computeMetrics: its four figures in the order of ``FOUR``; IoU and accuracy by class, NaN without truth."""
    hit, truth, guess = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    seen = truth > 0
    iou, accuracy = np.full(len(hit), np.nan), np.full(len(hit), np.nan)
    iou[seen] = hit[seen] / (truth + guess - hit)[seen]
    accuracy[seen] = hit[seen] / truth[seen]
    share = truth / matrix.sum()
    means = [np.mean(iou[seen]), np.sum(iou[seen] * share[seen]), np.mean(accuracy[seen]), hit.sum() / matrix.sum()]
    return [float(m) for m in means], iou, accuracy


def merged(matrix: Matrix, parents: Mapping[int, str]) -> tuple[Matrix, list[str]]:
    """_getSupCatConfusion: rows and columns (label ids) of one supercategory added up."""
    names = sorted(set(parents.values()))
    member = np.array([[parents.get(i) == name for i in range(len(matrix))] for name in names], float)
    return member @ matrix @ member.T, names


def check_coco(found: Values, matrix: Matrix, classes: Sequence[ClassInfo]) -> None:
    """``matrix`` is by label id."""
    means, iou, accuracy = coco_metrics(matrix)
    assert [found[name, ""] for name in FOUR] == means
    above, names = merged(matrix, {c.label_id: c.supercategory for c in classes})
    means_above, iou_above, accuracy_above = coco_metrics(above)
    assert [found[f"{name}_supercategory", ""] for name in FOUR] == means_above
    for c in classes:
        assert found["iou", c.name] == value(iou[c.label_id])
        assert found["accuracy", c.name] == value(accuracy[c.label_id])
    for i, name in enumerate(names):
        assert found["iou_supercategory", name] == value(iou_above[i])
        assert found["accuracy_supercategory", name] == value(accuracy_above[i])


def value(number: float) -> float | None:
    return None if math.isnan(number) else float(number)


def sorted_by_id(classes: ClassTable) -> list[ClassInfo]:
    return sorted(classes.scored, key=lambda c: c.label_id)


@pytest.mark.long
@sizes
def test_coco_stuff_equals_the_official_formula(count: int) -> None:
    """evaluate_performance.py: a matrix of 182 values, pixels of other ground truth left out."""
    metric, ids = registry.make("coco-stuff", STUFF), [c.label_id for c in STUFF.scored]
    for pairs in cases(1, [*ids, 255], ids, count):
        inside = only(pairs, lambda t: t < 182)
        if sum(t.size for t, _ in inside):
            check_coco(figures_of(metric, pairs), confusion(inside, 182), STUFF.scored)


def test_coco_stuff_takes_removed_ids_for_misses() -> None:
    pairs = [(as_map([0, 0, 91, 5]), as_map([0, 11, 68, 5]))]
    found = figures_of(registry.make("coco-stuff", STUFF), pairs)
    means, _, _ = coco_metrics(confusion(pairs, 182))
    assert [found[name, ""] for name in FOUR] == means


@sizes
def test_coco_stuff_91_equals_cocostuffeval_on_its_own_ids(count: int) -> None:
    """Over a stuff_SPLIT.json: ground truth 0 is left out; an unlabeled prediction is row - 1, column -1."""
    metric, ids = registry.make("coco-stuff-91", STUFF_JSON), list(range(92, 184))
    for pairs in cases(2, [*ids, 0], [*ids, 0], count):
        inside = [(t - 1, p.astype(int) - 1) for t, p in only(pairs, lambda t: t >= 92)]
        if sum(t.size for t, _ in inside):
            down = [ClassInfo(c.label_id - 1, c.name, supercategory=c.supercategory) for c in sorted_by_id(STUFF_JSON)]
            check_coco(figures_of(metric, pairs), confusion(inside, 183), down)


@pytest.mark.parametrize(("classes", "ids"), [(STUFF_JSON, (183, 92, 0)), (STUFF, (3, 91, 255))])
def test_coco_stuff_91_takes_unlabeled_predictions_for_other(classes: ClassTable, ids: tuple[int, int, int]) -> None:
    other, banner, unlabeled = ids
    truth, predicted = (
        as_map([other, other, banner, banner, unlabeled]),
        as_map([unlabeled, other, banner, unlabeled, other]),
    )
    found = figures_of(registry.make("coco-stuff-91", classes), [(truth, predicted)])
    assert (found["iou", "other"], found["iou", "banner"], found["global_accuracy", ""]) == (2 / 3, 1 / 2, 3 / 4)


def test_coco_stuff_91_says_the_same_of_label_maps() -> None:
    """Label maps of things and stuff, and the same as ids of stuff_SPLIT.json."""
    ids = [c.label_id for c in STUFF.scored]
    maps, own = registry.make("coco-stuff-91", STUFF), registry.make("coco-stuff-91", STUFF_JSON)
    table = np.zeros(256, np.uint16)
    table[:91], table[91:182] = 183, np.arange(92, 183)
    for pairs in cases(3, [*ids, 255], [*ids, 255], 100):
        assert figures_of(maps, pairs) == figures_of(own, [(table[t], table[p]) for t, p in pairs])


def test_coco_stuff_sends_json_samples_to_the_other_protocol() -> None:
    with pytest.raises(ConfigError, match="use --protocol coco-stuff-91"):
        registry.make("coco-stuff", STUFF_JSON)


# -- PASCAL ----------------------------------------------------------------------------------------------------------


def fcn(pairs: Pairs, n: int) -> Values:
    """score.py: ids 0..n-1, other ground truth left out."""
    matrix = confusion(only(pairs, lambda t: t < n), n)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accuracy = np.diag(matrix) / matrix.sum(1)
        iou = np.diag(matrix) / (matrix.sum(1) + matrix.sum(0) - np.diag(matrix))
        share = matrix.sum(1) / matrix.sum()
        found: Values = {
            ("global_accuracy", ""): value(np.diag(matrix).sum() / matrix.sum()),
            ("mean_class_accuracy", ""): value(np.nanmean(accuracy)),
            ("miou", ""): value(np.nanmean(iou)),
            ("fwiou", ""): float((share[share > 0] * iou[share > 0]).sum()) if matrix.sum() else None,
        }
    return found


@sizes
def test_pascal_context_60_equals_the_fcn_formula(count: int) -> None:
    for protocol in ("pascal-context-60", "pascal-context"):
        metric, ids = registry.make(protocol, TABLE["pascal-context-60"]), list(range(60))
        for pairs in cases(4, ids, ids, count // 2):
            found, wanted = figures_of(metric, pairs), fcn(pairs, 60)
            assert {key: found[key] for key in wanted} == wanted


@sizes
def test_pascal_context_59_equals_the_fcn_formula(count: int) -> None:
    """The 59-class task: ground truth 0 becomes 255, the classes 0..58; whichever class table the samples have."""
    makers = (("pascal-context-59", "59"), ("pascal-context-59", "60"), ("pascal-context", "59"))
    made = [registry.make(protocol, tables.load(f"pascal-context-{n}")) for protocol, n in makers]
    for pairs in cases(5, list(range(60)), list(range(1, 60)), count // 2):
        wanted = fcn([(np.where(t == 0, 255, t - 1), p - 1) for t, p in pairs], 59)
        for metric in made:
            found = figures_of(metric, pairs)
            assert {key: found[key] for key in wanted} == wanted


def test_pascal_context_predicted_background_is_a_miss_without_background() -> None:
    found = figures_of(
        registry.make("pascal-context-59", TABLE["pascal-context-59"]), [(as_map([1, 1]), as_map([1, 0]))]
    )
    assert (found["miou", ""], found["global_accuracy", ""]) == (0.5, 0.5)


def test_pascal_context_60_wants_background() -> None:
    with pytest.raises(ConfigError, match=r"scores background.*use --protocol pascal-context-59"):
        registry.make("pascal-context-60", TABLE["pascal-context-59"])


def vocevalseg(pairs: Pairs) -> tuple[list[float], float]:
    """Accuracies in percent and their average; NaN as MATLAB has it."""
    counts = confusion(only(pairs, lambda t: t < 255), 21)
    accuracies = []
    for j in range(21):
        union = counts[j].sum() + counts[:, j].sum() - counts[j, j]
        accuracies.append(100 * counts[j, j] / union if union else math.nan)
    return accuracies, sum(accuracies) / 21


def test_pascal_voc_equals_vocevalseg_to_its_digits() -> None:
    table, generator = TABLE["pascal-voc"], np.random.default_rng(6)
    metric, whole = registry.make("pascal-voc", table), 0
    for turn in range(120):
        size = (30, 30) if turn % 2 else (3, 4)
        truth = [generator.choice([*range(21), 255], size).astype(np.uint16) for _ in range(2)]
        pairs = [(t, np.where(generator.random(size) < 0.5, t % 255, generator.integers(0, 21, size))) for t in truth]
        pairs = [(t, p.astype(np.uint16)) for t, p in pairs]
        found, (accuracies, average) = figures_of(metric, pairs), vocevalseg(pairs)
        for c, official in zip(table.scored, accuracies, strict=True):
            assert printed(found["iou", c.name], 100, 3) == printed(value(official), 1, 3)
        assert printed(found["miou", ""], 100, 3) == printed(value(average), 1, 3)
        there = [a for a in accuracies if not math.isnan(a)]
        assert found["miou_present", ""] == pytest.approx(sum(there) / len(there) / 100)
        whole += not math.isnan(average)
    assert 0 < whole < 120


def printed(number: float | None, factor: int, decimals: int) -> str:
    return "NaN" if number is None else f"{factor * number:.{decimals}f}"


def test_pascal_voc_void() -> None:
    metric = registry.make("pascal-voc", TABLE["pascal-voc"])
    found = figures_of(metric, [(as_map([255, 1, 1, 2]), as_map([1, 1, 255, 2]))])
    assert (found["iou", "aeroplane"], found["iou", "bicycle"], found["global_accuracy", ""]) == (0.5, 1.0, 2 / 3)
    assert found["miou", ""] is None
    assert found["miou_present", ""] == 0.75


# -- ADE20K ----------------------------------------------------------------------------------------------------------


def sceneparsing(pairs: Pairs) -> tuple[list[float], float, float]:
    """demoEvaluation.m: IoU of 150 classes, their mean, pixel accuracy."""
    eps, hit, union, right, labelled = 2.0**-52, [0.0] * 151, [0.0] * 151, 0, 0
    for truth, predicted in pairs:
        inside = only([(truth, predicted)], lambda t: t > 0)
        counts = confusion(inside, 151)
        for c in range(1, 151):
            hit[c] += counts[c, c]
            union[c] += eps + counts[:, c].sum() + counts[c].sum() - counts[c, c]
        right += int(np.trace(counts))
        labelled += int(counts.sum())
    iou = [hit[c] / union[c] for c in range(1, 151)]
    return iou, sum(iou) / 150, right / labelled if labelled else math.nan


def test_ade20k_equals_the_benchmark_to_its_digits() -> None:
    metric = registry.make("ade20k", TABLE["ade20k"])
    for pairs in cases(7, list(range(151)), list(range(151)), 120):
        found, (iou, mean, accuracy) = figures_of(metric, pairs), sceneparsing(pairs)
        for c, official in zip(TABLE["ade20k"].scored, iou, strict=True):
            assert printed(found["iou", c.name], 1, 4) == printed(official, 1, 4)
            assert found["iou", c.name] == pytest.approx(official, abs=1e-14)
        assert printed(found["miou", ""], 1, 4) == printed(mean, 1, 4)
        assert printed(found["global_accuracy", ""], 100, 2) == printed(value(accuracy), 100, 2)
        if not math.isnan(accuracy):
            assert found["final_score", ""] == pytest.approx((mean + accuracy) / 2)


def test_ade20k_present_leaves_absent_classes_out() -> None:
    pairs = [(as_map([1, 1, 2, 0]), as_map([1, 1, 3, 7]))]
    strict, present = (figures_of(registry.make(n, TABLE["ade20k"]), pairs) for n in ("ade20k", "ade20k-present"))
    assert strict["miou", ""] == 1 / 150
    assert present["miou", ""] == 1 / 3
    assert strict["iou", "flag"] == 0.0
    assert strict["accuracy", "flag"] is None
    assert present["iou", "flag"] is None
    assert strict["global_accuracy", ""] == present["global_accuracy", ""] == 2 / 3
    assert ("final_score", "") not in present


# -- CCP, skin, two classes ------------------------------------------------------------------------------------------


def test_ccp_is_semantic_with_background_named() -> None:
    metric, plain = registry.make("ccp", TABLE["ccp"]), SemanticMetric(TABLE["ccp"])
    for pairs in cases(8, list(range(59)), [*range(59), 200], 120):
        found, wanted = figures_of(metric, pairs), figures_of(plain, pairs)
        assert {key: v for key, v in found.items() if key in wanted} == wanted
        garments = [v for c in TABLE["ccp"].scored[1:] if (v := wanted["iou", c.name]) is not None]
        front = [(t, p) for a, b in pairs for t, p in zip(a.flat, b.flat, strict=True) if t]
        assert found["miou_foreground", ""] == (pytest.approx(sum(garments) / len(garments)) if garments else None)
        assert found["foreground_accuracy", ""] == (sum(t == p for t, p in front) / len(front) if front else None)


def four(pairs: Pairs) -> tuple[int, int, int, int]:
    pixels = [(int(t), int(p)) for a, b in pairs for t, p in zip(a.flat, b.flat, strict=True)]
    cells = ((1, 1), (0, 1), (1, 0), (0, 0))
    tp, fp, fn, tn = (sum(pixel == cell for pixel in pixels) for cell in cells)
    return tp, fp, fn, tn


def own_figures(tp: int, fp: int, fn: int, tn: int) -> dict[str, float | None]:
    parts = {
        "iou": (tp, tp + fp + fn),
        "dice": (2 * tp, 2 * tp + fp + fn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "accuracy": (tp + tn, tp + fp + fn + tn),
        "specificity": (tn, tn + fp),
    }
    return {name: a / b if b else None for name, (a, b) in parts.items()}


def mean_of(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return math.fsum(there) / len(there) if there else None


@sizes
def test_binary_equals_pixel_loops(count: int) -> None:
    metric = registry.make("binary", SKIN)
    for pairs in cases(9, [0, 1], [0, 1], count):
        found, whole = figures_of(metric, pairs), own_figures(*four(pairs))
        images = [own_figures(*four([pair])) for pair in pairs]
        for name in whole:
            assert found[f"pooled_{name}", ""] == whole[name]
            mean = mean_of([image[name] for image in images])
            assert found[f"image_mean_{name}", ""] == (None if mean is None else pytest.approx(mean, rel=1e-14))


def test_binary_leaves_void_out_and_takes_the_greater_id_for_the_foreground() -> None:
    classes = ClassTable((ClassInfo(7, "lane"), ClassInfo(3, "road"), ClassInfo(255, "void", ignore=True)))
    metric = registry.make("binary", classes)
    state = metric.update(rows([as_map([7, 7, 3, 3, 255])])[0], rows([as_map([7, 3, 7, 3, 7])])[0])
    assert state.values["counts"].tolist() == [[1, 1, 1, 1]]
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in metric.image(state).classes] == [
        ("road", 1, 1, 1),
        ("lane", 1, 1, 1),
    ]
    assert metric.image(state).score == 1 / 3
    found = metric.confusion(state)
    assert found is not None
    assert found.pixels.tolist() == [[1, 1], [1, 1]]
    assert found.truth_names == ("road", "lane")


@pytest.mark.parametrize(
    ("truth", "predicted", "defined"),
    [
        ([0, 0], [0, 0], {"accuracy", "specificity"}),
        ([1, 0], [0, 0], {"iou", "dice", "recall", "accuracy", "specificity"}),
    ],
)
def test_binary_images_without_foreground(truth: list[int], predicted: list[int], defined: set[str]) -> None:
    found = figures_of(registry.make("binary", SKIN), [(as_map(truth), as_map(predicted))])
    assert {
        name.removeprefix("pooled_") for (name, _), v in found.items() if v is not None and "pooled" in name
    } == defined


def test_pratheepan_s_three_f1s() -> None:
    metric, differ = registry.make("pratheepan", SKIN), 0
    for pairs in cases(10, [0, 1], [0, 1], CASES):
        found, whole = figures_of(metric, pairs), own_figures(*four(pairs))
        images = [own_figures(*four([pair])) for pair in pairs]
        precision, recall = mean_of([i["precision"] for i in images]), mean_of([i["recall"] for i in images])
        assert found["pooled_f1", ""] == whole["dice"]
        assert found["pooled_precision", ""] == whole["precision"]
        assert found["image_mean_f1", ""] == near(mean_of([i["dice"] for i in images]))
        of_means = None
        if precision is not None and recall is not None:
            of_means = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert found["f1_of_means", ""] == near(of_means)
        differ += len({found[name, ""] for name in ("pooled_f1", "image_mean_f1", "f1_of_means")}) == 3
    assert differ > CASES // 4


def near(number: float | None) -> Any:
    return None if number is None else pytest.approx(number, rel=1e-13)


# -- Boundary IoU ----------------------------------------------------------------------------------------------------


def mask_to_boundary(mask: NDArray[np.uint8], ratio: float) -> NDArray[np.bool_]:
    """The official way: erode the mask, with a border of zeros around it, as often as the boundary is wide."""
    height, width = mask.shape
    depth = max(1, round(ratio * np.sqrt(height**2 + width**2)))
    framed = np.pad(mask, 1)
    inside = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=depth)[1:-1, 1:-1]
    found: NDArray[np.bool_] = (mask - inside) > 0
    return found


def boundary_counts(truth: Map, predicted: Map, classes: ClassTable, ratio: float) -> list[list[int]]:
    counted = np.isin(truth, [c.label_id for c in classes.scored])
    found = []
    for c in classes.scored:
        ours, theirs = (mask_to_boundary((m == c.label_id).astype(np.uint8), ratio) for m in (truth, predicted))
        theirs &= counted
        found.append([int((ours & theirs).sum()), int(ours.sum()), int(theirs.sum())])
    return found


def blobs(generator: np.random.Generator, size: tuple[int, int], ids: Sequence[int]) -> Map:
    """Rectangles over each other, some of them of one pixel or as wide as the image."""
    found = np.full(size, generator.choice(ids), np.uint16)
    for _ in range(generator.integers(0, 7)):
        y, x = (int(generator.integers(0, side)) for side in size)
        height, width = (int(generator.integers(1, side + 1)) for side in size)
        found[y : y + height, x : x + width] = generator.choice(ids)
    return found


@pytest.mark.parametrize("count", [400, pytest.param(MANY, marks=pytest.mark.slow)])
def test_boundary_iou_counts_the_official_pixels(count: int) -> None:
    generator = np.random.default_rng(11)
    for _ in range(count):
        ratio = float(generator.choice([0.001, 0.02, 0.05, 0.1, 0.3, 1.0]))
        size = (int(generator.integers(1, 60)), int(generator.integers(1, 60)))
        metric = registry.make("boundary-iou", FEW, MetricOptions(boundary=ratio))
        pair = (blobs(generator, size, [0, 1, 5, 900]), blobs(generator, size, [0, 1, 5, 900, 65535]))
        (state,) = states_of(metric, [pair])
        counts = boundary_counts(*pair, FEW, ratio)
        assert state.values["counts"].tolist() == counts
        own = [both / (ours + theirs - both) for both, ours, theirs in counts if ours + theirs]
        assert metric.image(state).score == (pytest.approx(sum(own) / len(own)) if own else None)


def test_boundary_iou_sums_over_images_and_leaves_absent_classes_out() -> None:
    generator, metric = np.random.default_rng(12), registry.make("boundary-iou", FEW)
    pairs = [(blobs(generator, (40, 50), [0, 1, 5]), blobs(generator, (40, 50), [0, 1, 5])) for _ in range(3)]
    counts = np.sum([boundary_counts(t, p, FEW, 0.02) for t, p in pairs], axis=0)
    found = figures_of(metric, pairs)
    wanted = [both / (ours + theirs - both) for both, ours, theirs in counts[:2].tolist()]
    assert [found["boundary_iou", name] for name in ("a", "b")] == wanted
    assert found["boundary_iou", "c"] is None
    assert found["mean_boundary_iou", ""] == sum(wanted) / 2


def test_boundary_iou_reads_runs_as_they_come() -> None:
    """Runs of length zero and neighbours of one value."""
    metric, label_map = registry.make("boundary-iou", FEW), as_map([1, 1, 1, 1], [1, 1, 1, 5], [1, 1, 1, 5])
    split = runlength.Runs(
        np.array([900, 1, 1, 5, 1, 1, 5, 5, 1], np.uint16), np.array([0, 3, 4, 1, 2, 1, 0, 1, 0], np.uint32)
    )
    (plain,) = rows([label_map])
    column = columns.runs_array([split])
    names = plain.batch.schema.names
    other = pa.RecordBatch.from_arrays([column if n == "semantic" else plain.batch.column(n) for n in names], names)
    state = metric.update(Row(other, 0), plain)
    assert state.values["counts"].tolist() == boundary_counts(label_map, label_map, FEW, 0.02)


def test_boundary_width_rounds_halves_to_even() -> None:
    assert [boundary_width(*size) for size in ((1, 1), (480, 640), (75, 100), (1024, 2048))] == [1, 16, 2, 46]


@pytest.mark.parametrize("boundary", [-0.1, 1.5, math.nan])
def test_boundary_iou_refuses_widths_that_are_none(boundary: float) -> None:
    with pytest.raises(ConfigError, match="boundary is"):
        registry.make("boundary-iou", FEW, MetricOptions(boundary=boundary))


# -- what all have in common -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [*TABLE, "boundary-iou", "semantic"])
def test_any_partition_in_any_order_gives_the_same_bits(protocol: str) -> None:
    classes = TABLE.get(protocol, FEW)
    metric, generator = registry.make(protocol, classes), random.Random(13)
    ids = [c.label_id for c in classes.classes]
    for turn in range(8):
        pairs = [pair for case in cases(turn, ids, ids, 3) for pair in case]
        states = states_of(metric, pairs)
        whole = metric.compute(metric.merge(states))
        order = generator.sample(states, len(states))
        cut = generator.randint(0, len(order))
        assert metric.compute(metric.merge([metric.merge(order[:cut]), metric.merge(order[cut:])])) == whole


@pytest.mark.parametrize("protocol", ["semantic", "coco-stuff", "binary", "boundary-iou"])
def test_resampled_figures_are_those_of_the_repeated_images(protocol: str) -> None:
    classes = TABLE.get(protocol, FEW)
    metric, ids = registry.make(protocol, classes), [c.label_id for c in classes.scored]
    states = states_of(metric, [pair for case in cases(14, ids, ids, 4) for pair in case][:4])
    assert isinstance(metric, Resamples)
    times = np.array([[1, 1, 1, 1], [0, 3, 1, 0], [4, 0, 0, 0]])
    found = metric.resampler(states)(times)
    for place, row in enumerate(times.tolist()):
        drawn = [s for s, n in zip(states, row, strict=True) for _ in range(n)]
        wanted = by_name(metric.compute(metric.merge(drawn)))
        assert {key: value(numbers[place]) for key, numbers in found.items()} == wanted


@pytest.mark.parametrize("protocol", sorted(TABLE))
def test_other_classes_are_refused(protocol: str) -> None:
    with pytest.raises(ConfigError, match=f"protocol {protocol} wants"):
        registry.make(protocol, ClassTable((ClassInfo(0, "a"), ClassInfo(2, "b"), ClassInfo(3, "c"))))


@pytest.mark.parametrize(
    ("protocol", "label", "hint"),
    [
        ("ade20k", 151, "where a network counts from 0, add 1"),
        ("ade20k-present", 255, "1 .wall. to 150"),
        ("coco-stuff", 182, "labels.txt and the JSON files have them plus 1"),
        ("coco-stuff-91", 183, "183 for things over a stuff_SPLIT.json"),
        ("pascal-context", 459, "59_labels.txt"),
        ("pascal-context-59", 60, "59_labels.txt"),
        ("pascal-voc", 21, "0 .background. to 20"),
        ("binary", 255, "write 0 for non-skin and 1 for skin, not 0 and 255"),
        ("pratheepan", 65535, "write 0 for non-skin"),
    ],
)
def test_predictions_that_mean_nothing_are_refused_with_a_hint(protocol: str, label: int, hint: str) -> None:
    metric = registry.make(protocol, TABLE[protocol])
    first = metric.classes.scored[0].label_id if isinstance(metric, SemanticMetric) else 0
    truth = 0 if protocol.startswith("coco") else first
    with pytest.raises(
        DataError, match=rf"sample 0: the prediction holds label {label}, no class of {protocol}.*{hint}"
    ) as e:
        figures_of(metric, [(as_map([truth, truth]), as_map([truth, label]))])
    assert e.value.code == "unknown-class"


@pytest.mark.parametrize("protocol", [*sorted(set(TABLE) - {"binary", "pratheepan", "coco-stuff-91"}), "semantic"])
def test_what_a_class_map_leaves_out_is_a_miss(protocol: str) -> None:
    classes = TABLE.get(protocol, FEW)
    ids = [c.label_id for c in classes.scored]
    found = figures_of(registry.make(protocol, classes), [(as_map([ids[1], ids[1]]), as_map([ids[1], 65535]))])
    assert found["global_accuracy", ""] == found["iou", classes.scored[1].name] == 0.5


@pytest.mark.parametrize("protocol", ["semantic", "binary", "boundary-iou"])
def test_broken_rows_are_refused(protocol: str) -> None:
    metric = registry.make(protocol, SKIN)
    with pytest.raises(DataError, match=r"sample 0.*2 x 1 pixels.*1 x 2") as size:
        metric.update(*rows([as_map([0, 0])]), *rows([as_map([0], [0])]))
    assert size.value.code == "size-mismatch"
    (good,) = rows([as_map([0, 0])])
    names = good.batch.schema.names
    short = columns.runs_array([runlength.encode(as_map([0]))])
    bad = pa.RecordBatch.from_arrays([short if n == "semantic" else good.batch.column(n) for n in names], names)
    with pytest.raises(DataError, match="runs of the prediction do not fill its 2 pixels") as runs:
        metric.update(good, Row(bad, 0))
    assert runs.value.code == "bad-runs"


def test_only_boundary_iou_has_an_option() -> None:
    for protocol, classes in TABLE.items():
        with pytest.raises(ConfigError, match="does not heed boundary"):
            registry.make(protocol, classes, MetricOptions(boundary=0.1))
    assert registry.make("boundary-iou", FEW, DEFAULTS).name == "boundary-iou"
