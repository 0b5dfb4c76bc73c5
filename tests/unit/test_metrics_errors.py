"""Error analysis against its rules written down anew with NumPy, SciPy and pycocotools, by properties, and where an
error was planted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from coco_cases import instance_rows, official, random_case, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from segbatch import schemas
from segbatch.codecs import columns, png, rle, runlength
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.base import Detail, Metric, MetricOptions, Row
from segbatch.metrics.calibration import CalibrationInstanceMetric, CalibrationMetric
from segbatch.metrics.label_errors import PER_IMAGE, LabelErrorsInstanceMetric, LabelErrorsMetric
from segbatch.metrics.semantic import SemanticMetric
from segbatch.metrics.semantic_errors import SemanticErrorsMetric
from segbatch.records import ClassInfo, ClassTable, Figure

Map = NDArray[np.uint16]
Levels = NDArray[np.uint8]

CLASSES = ClassTable(
    (ClassInfo(7, "road"), ClassInfo(0, "none", ignore=True), ClassInfo(300, "sky"), ClassInfo(2, "car"))
)
SCORED = {7: "road", 300: "sky", 2: "car"}
UNKNOWN = 9
THINGS = ClassTable((ClassInfo(2, "dog"), ClassInfo(1, "cat"), ClassInfo(9, "none", ignore=True)))
NAMES = {1: "cat", 2: "dog"}


@dataclass
class Image:
    """An image's label maps; confidences times 255."""

    truth: Map
    predicted: Map
    levels: Levels | None = None
    name: str = "a"

    def rows(self) -> tuple[Row, Row]:
        truth = label_row("samples", self.name, self.truth)
        return truth, label_row("masks", self.name, self.predicted, self.levels)


def label_row(table: str, name: str, label_map: Map, levels: Levels | None = None) -> Row:
    height, width = label_map.shape
    values: dict[str, Any] = {"sample_id": name, "image_uri": "", "etag": "", "status": "ok", "model_digest": ""}
    values |= {"height": height, "width": width}
    if levels is not None:
        values["confidence"] = {"height": height, "width": width, "png": png.encode_grey(levels, 8)}
    schema = schemas.TABLES[table]
    runs = columns.runs_array([runlength.encode(label_map)])
    arrays = [runs if f.name == "semantic" else pa.array([values.get(f.name)], f.type) for f in schema]
    return Row(pa.RecordBatch.from_arrays(arrays, schema=schema), 0)


def blocks(generator: np.random.Generator, size: tuple[int, int], ids: Sequence[int], many: int) -> Map:
    """Rectangles over each other."""
    label_map = np.full(size, generator.choice(ids), np.uint16)
    for _ in range(int(generator.integers(0, many))):
        y, x = int(generator.integers(size[0])), int(generator.integers(size[1]))
        high, wide = (int(generator.integers(1, n + 1)) for n in size)
        label_map[y : y + high, x : x + wide] = generator.choice(ids)
    return label_map


def random_image(generator: np.random.Generator, most: int = 14, name: str = "a") -> Image:
    size = int(generator.integers(1, most)), int(generator.integers(1, most))
    ids = [0, 2, 7, 300, UNKNOWN]
    truth = blocks(generator, size, ids, 6)
    predicted = truth.copy() if generator.random() < 0.7 else blocks(generator, size, ids, 6)
    noise = generator.random(size) < generator.choice([0.0, 0.1, 0.6])
    predicted[noise] = generator.choice(ids, int(noise.sum()))
    levels = generator.integers(0, 256, size).astype(np.uint8)
    levels[generator.random(size) < 0.3] = generator.choice([0, 17, 34, 255])
    return Image(truth, predicted, levels, name)


def state_of(metric: Metric[Any], image: Image) -> Any:
    return metric.update(*image.rows())


def total_of(metric: Metric[Any], images: Sequence[Image]) -> Any:
    return metric.merge([state_of(metric, i) for i in images])


def by_name(figures: Sequence[Figure]) -> dict[tuple[str, str], float | None]:
    return {(f.metric, f.class_name): f.value for f in figures}


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def near(values: Mapping[Any, float | None]) -> dict[Any, Any]:
    return {k: v if v is None else pytest.approx(v, rel=1e-12, abs=1e-14) for k, v in values.items()}


# -- semantic-errors -------------------------------------------------------------------------------------------------


def is_boundary(truth: Map, depth: int) -> NDArray[np.bool_]:
    """Whether another label lies within ``depth`` pixels, pixel by pixel."""
    found = np.zeros(truth.shape, bool)
    for y, x in np.ndindex(*truth.shape):
        window = truth[max(y - depth, 0) : y + depth + 1, max(x - depth, 0) : x + depth + 1]
        found[y, x] = (window != truth[y, x]).any()
    return found


def naive_losses(images: Sequence[Image], part: float) -> dict[tuple[str, str], float | None]:
    pixels: list[tuple[int, int, bool]] = []
    for image in images:
        depth = max(1, round(part * math.hypot(*image.truth.shape)))
        edge = is_boundary(image.truth, depth)
        flat = (image.truth.ravel().tolist(), image.predicted.ravel().tolist(), edge.ravel().tolist())
        pixels += [p for p in zip(*flat, strict=True) if p[0] != 0]
    scored = [p for p in pixels if p[0] in SCORED]
    found: dict[tuple[str, str], float | None] = {}
    by_loss: dict[str, list[float]] = {}
    for c, name in SCORED.items():
        right = sum(t == p == c for t, p, _ in scored)
        losses = {}
        for where in (True, False):
            word = "boundary" if where else "interior"
            losses[f"missed_{word}"] = sum(t == c and p != c and e == where for t, p, e in scored)
            losses[f"false_{word}"] = sum(t != c and p == c and e == where for t, p, e in scored)
            mine = [t == p for t, p, e in scored if t == c and e == where]
            found[f"{word}_accuracy", name] = share(sum(mine), len(mine))
        union = right + sum(losses.values())
        found["iou", name] = share(right, union)
        for loss, n in losses.items():
            found[loss, name] = share(n, union)
            if union:
                by_loss.setdefault(loss, []).append(n / union)
    for loss in ("missed_boundary", "missed_interior", "false_boundary", "false_interior"):
        values = by_loss.get(loss, [])
        found[f"mean_{loss}", ""] = share(math.fsum(values), len(values))
    for word, where in (("boundary", True), ("interior", False)):
        mine = [t == p and t in SCORED for t, p, e in pixels if e == where]
        found[f"{word}_accuracy", ""] = share(sum(mine), len(mine))
    wrong = [e for t, p, e in scored if t != p]
    found["boundary_share", ""] = share(sum(e for *_, e in scored), len(scored))
    found["boundary_error_share", ""] = share(sum(wrong), len(wrong))
    return found


@pytest.mark.parametrize("part", [None, 0.1, 0.25, 1.0])
def test_losses_are_those_of_pixel_loops(part: float | None) -> None:
    generator = np.random.default_rng(5)
    metric = SemanticErrorsMetric(CLASSES, MetricOptions(boundary=part))
    for _ in range(60):
        images = [random_image(generator, 12, str(i)) for i in range(int(generator.integers(1, 3)))]
        figures = by_name(metric.compute(total_of(metric, images)))
        wanted = naive_losses(images, part or 0.005)
        assert {k: figures[k] for k in wanted} == near(wanted)
        assert set(figures) - set(wanted) == {("miou", ""), ("global_accuracy", "")}


def test_what_semantic_says_stays_the_same_and_the_losses_are_the_rest() -> None:
    generator, metric, plain = np.random.default_rng(6), SemanticErrorsMetric(CLASSES), SemanticMetric(CLASSES)
    losses = ("missed_boundary", "missed_interior", "false_boundary", "false_interior")
    for _ in range(60):
        images = [random_image(generator, 20, str(i)) for i in range(3)]
        total, whole = total_of(metric, images), total_of(plain, images)
        figures, known = by_name(metric.compute(total)), by_name(plain.compute(whole))
        for key in (("miou", ""), ("global_accuracy", ""), *(("iou", c) for c in SCORED.values())):
            assert figures[key] == known[key]
        for iou, parts in [
            (figures["miou", ""], [figures[f"mean_{loss}", ""] for loss in losses]),
            *((figures["iou", c], [figures[loss, c] for loss in losses]) for c in SCORED.values()),
        ]:
            assert iou is None or math.fsum([iou, *(p or 0 for p in parts)]) == pytest.approx(1, abs=1e-14)
        assert repr(metric.confusion(total)) == repr(plain.confusion(whole))
        assert metric.image(state_of(metric, images[0])) == plain.image(state_of(plain, images[0]))


def test_a_shifted_outline_is_a_boundary_error_and_a_lost_object_is_not() -> None:
    truth = np.full((60, 80), 7, np.uint16)
    truth[20:40, 20:40] = 2
    truth[5:15, 60:75] = 300
    shifted, lost = truth.copy(), truth.copy()
    shifted[20:40, 20], lost[5:15, 60:75] = 7, 7
    metric = SemanticErrorsMetric(CLASSES)
    figures = by_name(metric.compute(state_of(metric, Image(truth, shifted))))
    assert figures["missed_boundary", "car"] == 20 / 400
    assert figures["missed_interior", "car"] == 0.0
    assert figures["boundary_error_share", ""] == 1.0
    figures = by_name(metric.compute(state_of(metric, Image(truth, lost))))
    assert figures["missed_interior", "sky"] == 8 * 13 / 150  # d is 1
    assert figures["missed_boundary", "sky"] == 46 / 150
    assert figures["iou", "sky"] == 0.0


def test_pairs_are_the_confusion_off_its_diagonal() -> None:
    generator, metric = np.random.default_rng(7), SemanticErrorsMetric(CLASSES)
    images = [random_image(generator, 30, str(i)) for i in range(6)]
    total = total_of(metric, images)
    rows, confusion = list(metric.details(total)), metric.confusion(total)
    names = dict(zip(confusion.truth_ids, confusion.truth_names, strict=True))
    sizes = [r.values["pixels"] for r in rows]
    assert sizes == sorted(sizes, key=lambda n: -(n or 0))
    truth = np.concatenate([i.truth.ravel() for i in images])
    predicted = np.concatenate([i.predicted.ravel() for i in images])
    edge = np.concatenate([is_boundary(i.truth, 1).ravel() for i in images])
    wanted = {}
    for t in SCORED:
        for p in (*SCORED, 0, UNKNOWN):
            mine = (truth == t) & (predicted == p)
            if p != t and mine.any():
                wanted[t, p] = (mine.sum(), mine.sum() / (truth == t).sum(), (mine & edge).sum() / mine.sum())
    found = {}
    for r in rows:
        assert (r.kind, r.class_name) == ("pair", names[int(r.values["truth_label"] or 0)])
        key = (int(r.values["truth_label"] or 0), int(r.values["predicted_label"] or 0))
        found[key] = tuple(r.values[name] for name in ("pixels", "share", "boundary_share"))
    assert found == wanted
    assert len(rows) == len(found) > 6


@pytest.mark.parametrize("name", ["semantic-errors", "label-errors"])
@pytest.mark.parametrize("part", [0.0, -0.1, 1.5, math.nan])
def test_a_boundary_is_a_part_of_the_diagonal(name: str, part: float) -> None:
    with pytest.raises(ConfigError, match="the boundary's width is"):
        registry.make(name, CLASSES, MetricOptions(boundary=part))


def test_runs_need_not_be_as_long_as_they_can_be() -> None:
    truth, predicted = Image(np.array([[7, 7, 2]], np.uint16), np.array([[7, 2, 2]], np.uint16)).rows()
    values, lengths = pa.array([7, 9, 7, 2, 2], pa.uint16()), pa.array([1, 0, 1, 0, 1], pa.uint32())
    items = pa.StructArray.from_arrays([values, lengths], fields=list(schemas.RUNS.value_type))
    place = truth.batch.schema.get_field_index("semantic")
    runs = pa.ListArray.from_arrays(pa.array([0, 5], pa.int32()), items, type=schemas.RUNS)
    split = Row(truth.batch.set_column(place, truth.batch.schema.field(place), runs), 0)
    metric = SemanticErrorsMetric(CLASSES)
    assert metric.compute(metric.update(split, predicted)) == metric.compute(metric.update(truth, predicted))


# -- calibration -----------------------------------------------------------------------------------------------------


def naive_calibration(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, float | None]:
    """Guo et al.'s loop over the bins."""
    if not len(confidence):
        return dict.fromkeys(("ece", "mce", "mean_confidence", "accuracy", "brier"))
    ece, gaps = 0.0, []
    for low, high in pairwise(np.arange(16) / 15):
        mine = (confidence > low) & (confidence <= high) | ((low == 0) & (confidence == 0))
        if mine.any():
            gaps.append(abs(right[mine].mean() - confidence[mine].mean()))
            ece += gaps[-1] * mine.mean()
    brier = float(((confidence - right) ** 2).mean())
    whole = {"ece": ece, "mce": max(gaps), "mean_confidence": confidence.mean(), "accuracy": right.mean()}
    return {**{k: float(v) for k, v in whole.items()}, "brier": brier}


def test_calibration_is_that_of_numpy() -> None:
    generator, metric = np.random.default_rng(8), CalibrationMetric(CLASSES)
    for _ in range(150):
        images = [random_image(generator, name=str(i)) for i in range(int(generator.integers(1, 4)))]
        truth, predicted, level = (
            np.concatenate([m.ravel() for m in maps])
            for maps in zip(*((i.truth, i.predicted, i.levels) for i in images), strict=True)
        )
        counted = np.isin(truth, list(SCORED))
        confidence, right, labels = level[counted] / 255, (truth == predicted)[counted], predicted[counted]
        wanted: dict[tuple[str, str], float | None] = {
            (k, ""): v for k, v in naive_calibration(confidence, right).items()
        }
        for c, name in SCORED.items():
            mine = labels == c
            wanted["mean_confidence", name] = share(confidence[mine].sum(), mine.sum())
            wanted["precision", name] = share(right[mine].sum(), mine.sum())
        total = total_of(metric, images)
        assert by_name(metric.compute(total)) == near(wanted)
        rows = list(metric.details(total))
        assert sum(r.values["pixels"] or 0 for r in rows) == len(right)
        assert sum(r.values["right"] or 0 for r in rows) == right.sum()


def test_bins_hold_their_upper_ends() -> None:
    levels = np.array([[0, 1, 17, 18, 34, 238, 239, 255]], np.uint8)
    truth = np.full(levels.shape, 7, np.uint16)
    predicted = np.array([[2, 7, 7, 7, 2, 7, 7, 7]], np.uint16)
    rows = list(
        CalibrationMetric(CLASSES).details(state_of(CalibrationMetric(CLASSES), Image(truth, predicted, levels)))
    )
    assert {k: (r.values["pixels"], r.values["right"]) for k, r in enumerate(rows) if r.values["pixels"]} == {
        0: (3.0, 2.0),
        1: (2.0, 1.0),
        13: (1.0, 1.0),
        14: (2.0, 2.0),
    }
    assert (rows[1].values["from"], rows[1].values["to"]) == (1 / 15, 2 / 15)
    assert rows[2].values["mean_confidence"] is None


def test_a_model_that_knows_itself_has_no_calibration_error() -> None:
    levels = np.repeat(np.array([51, 204], np.uint8), 100).reshape(2, 100)  # .2 and .8
    truth = np.full((2, 100), 7, np.uint16)
    predicted = np.where(np.arange(100) < [[20], [80]], 7, 2).astype(np.uint16)
    metric = CalibrationMetric(CLASSES)
    state = state_of(metric, Image(truth, predicted, levels))
    figures = by_name(metric.compute(state))
    assert (figures["ece", ""], figures["mce", ""]) == (0.0, 0.0)
    assert figures["brier", ""] == pytest.approx(0.16)
    assert metric.image(state).score == 1.0


def test_masks_without_good_confidence_are_refused_by_name() -> None:
    metric, label_map = CalibrationMetric(CLASSES), np.full((2, 3), 7, np.uint16)
    truth, without = Image(label_map, label_map, name="street/7").rows()
    with pytest.raises(DataError, match=r"street/7.*no confidence map.*--confidence") as caught:
        metric.update(truth, without)
    assert caught.value.code == "no-confidence"
    place = without.batch.schema.get_field_index("confidence")
    kind = without.batch.schema.field(place)

    def masks(data: bytes) -> Row:
        cell = pa.array([{"height": 2, "width": 3, "png": data}], kind.type)
        return Row(without.batch.set_column(place, kind, cell), 0)

    for data, code in (
        (b"no png", "bad-confidence"),
        (png.encode_grey(label_map, 16), "bad-confidence"),
        (png.encode_grey(label_map.T, 8), "size-mismatch"),
    ):
        for protocol in (metric, LabelErrorsMetric(CLASSES)):
            with pytest.raises(DataError, match=r"street/7.*confidence map is") as caught:
                protocol.update(truth, masks(data))
            assert caught.value.code == code


def test_detections_are_right_where_pycocotools_finds_an_object() -> None:
    for seed in range(30):
        case = random_case(seed)
        metric = CalibrationInstanceMetric(case.classes)
        states = [metric.update(*rows) for rows in instance_rows(case)]
        scores, right, labels = [], [], []
        for found in official(case, "segm").evalImgs:
            if found is not None and found["aRng"] == [0, 1e10]:
                kept = found["dtIgnore"][0] == 0
                scores += np.array(found["dtScores"])[kept].tolist()
                right += (found["dtMatches"][0] != 0)[kept].tolist()
                labels += [f"class{found['category_id']}"] * int(kept.sum())
        all_scores, all_right = np.array(scores), np.array(right, bool)
        wanted: dict[tuple[str, str], float | None] = {
            (k, ""): v for k, v in naive_calibration(all_scores, all_right).items()
        }
        for c in case.labels:
            mine = np.array(labels, object) == f"class{c}"
            wanted["mean_confidence", f"class{c}"] = share(all_scores[mine].sum(), mine.sum())
            wanted["precision", f"class{c}"] = share(all_right[mine].sum(), mine.sum())
        total = metric.merge(states)
        assert by_name(metric.compute(total)) == near(wanted), seed
        assert sum(r.values["detections"] or 0 for r in metric.details(total)) == len(scores)


def test_detections_are_matched_at_one_iou() -> None:
    with pytest.raises(ConfigError, match="at one IoU, not at 2"):
        registry.make("calibration-instance", THINGS, MetricOptions(ious=(0.5, 0.75)))
    objects, found = [Thing(box_mask(0, 0, 10, 10), 1)], [Thing(box_mask(0, 0, 10, 6), 1, 2, 0.8)]
    for iou, accuracy in ((0.5, 1.0), (0.6, 1.0), (0.7, 0.0)):
        metric = registry.make("calibration-instance", THINGS, MetricOptions(ious=(iou,)))
        figures = by_name(metric.compute(metric.update(*thing_rows(objects, found))))
        assert figures["accuracy", ""] == accuracy
        assert figures["ece", ""] == pytest.approx(abs(accuracy - 0.8))


# -- label-errors ----------------------------------------------------------------------------------------------------


def naive_regions(image: Image, depth: int) -> list[dict[str, Any]]:
    """Candidates with SciPy: one pair of labels after the other."""
    found = []
    least = max(100, 0.0005 * image.truth.size)
    for t in SCORED:
        for p in SCORED:
            wrong = (image.truth == t) & (image.predicted == p)
            if t == p or not wrong.any():
                continue
            regions, number = ndimage.label(wrong)
            core = ndimage.binary_erosion(wrong, np.ones((2 * depth + 1,) * 2), border_value=1)
            for k in range(1, number + 1):
                mine = regions == k
                sure = None if image.levels is None else image.levels[mine].mean() / 255
                if mine.sum() < least or not (core & mine).any() or (sure is not None and sure < 0.9):
                    continue
                (rows, columns), *_ = ndimage.find_objects(mine.astype(int))
                severity = int((core & mine).sum()) * (1 if sure is None else sure)
                box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
                found.append({"labels": (t, p), "pixels": int(mine.sum()), "box": box, "severity": severity})
    return found


def region_rows(details: Sequence[Detail]) -> list[tuple[Any, ...]]:
    rows = []
    for d in details:
        v = d.values
        box = tuple(v[name] for name in ("x", "y", "width", "height"))
        rows.append((v["truth_label"], v["predicted_label"], v["pixels"], box, v["severity"]))
    return rows


@pytest.mark.parametrize("part", [None, 0.03])
def test_regions_are_those_of_scipy(part: float | None) -> None:
    generator, metric = np.random.default_rng(9), LabelErrorsMetric(CLASSES, MetricOptions(boundary=part))
    seen = 0
    for number in range(120):
        size = int(generator.integers(12, 70)), int(generator.integers(12, 70))
        ids = [0, 2, 7, 300, UNKNOWN] if number % 3 == 2 else [2, 7, 300]
        truth, predicted = (blocks(generator, size, ids, 7) for _ in range(2))
        noise = generator.random(size) < generator.choice([0.0, 0.002, 0.02])
        predicted[noise] = generator.choice(ids, int(noise.sum()))
        levels = None
        if number % 3:
            levels = generator.integers(222, 256, size).astype(np.uint8)
            levels[blocks(generator, size, [0, 0, 1], 4) > 0] = 150
        image = Image(truth, predicted, levels)
        depth = max(1, round((part or 0.005) * math.hypot(*size)))
        wanted = naive_regions(image, depth)
        state = state_of(metric, image)
        rows = sorted((*w["labels"], w["pixels"], w["box"], pytest.approx(w["severity"])) for w in wanted)
        assert sorted(region_rows(list(metric.details(state)))) == rows
        figures = by_name(metric.compute(state))
        counted = int(np.isin(truth, list(SCORED)).sum())
        inside = sum(w["pixels"] for w in wanted)
        assert figures["label_errors", ""] == len(wanted)
        assert figures["label_error_pixels", ""] == share(inside, counted)
        assert figures["clean_images", ""] == float(not wanted)
        for c, name in SCORED.items():
            assert figures["label_errors", name] == sum(w["labels"][0] == c for w in wanted)
        assert metric.image(state).score == share(counted - inside, counted)
        seen += len(wanted)
    assert seen > 60


def street(generator: np.random.Generator, name: str) -> Image:
    """A scene whose prediction is shaky along all outlines and here and there, and unsure there."""
    truth = np.full((90, 120), 7, np.uint16)
    truth[:40] = 300
    for left in (10, 50, 90):
        truth[50:70, left : left + 20] = 2
    predicted = ndimage.shift(truth, generator.integers(-2, 3, 2), order=0, mode="nearest")
    noise = generator.random(truth.shape) < 0.02
    predicted[noise] = generator.choice([2, 7, 300], int(noise.sum()))
    levels = generator.integers(235, 256, truth.shape).astype(np.uint8)
    predicted[75:85, 5:35], levels[75:85, 5:35] = 300, 140  # a large mistake of which the model is not sure
    return Image(truth, predicted, levels, name)


def test_the_planted_label_is_found_first() -> None:
    generator, metric = np.random.default_rng(10), LabelErrorsMetric(CLASSES)
    images = [street(generator, f"street/{i}") for i in range(8)]
    planted = images[5]
    planted.truth[51:69, 51:69] = 7  # a car that was labelled road
    images[2].truth[:14, 50:64] = 2  # a smaller one: sky that was labelled car
    rows = list(metric.details(total_of(metric, images)))
    assert [(r.sample_id, r.class_name, r.values["rank"]) for r in rows] == [
        ("street/5", "road", 1.0),
        ("street/2", "car", 2.0),
    ]
    assert rows[0].kind == "label-error:region"
    assert rows[0].values["predicted_label"] == 2.0
    assert (rows[0].values["confidence"] or 0) > 0.9
    box = [rows[0].values[n] or 0 for n in ("x", "y", "width", "height")]
    assert all(abs(a - b) <= 4 for a, b in zip(box, (51, 51, 18, 18), strict=True))
    for image in images:
        image.levels = None
    doubtful = list(metric.details(total_of(metric, images)))
    assert len(doubtful) == 10  # now the mistakes that the model is not sure of count, too
    assert ("street/5", 2.0) in [(r.sample_id, r.values["predicted_label"]) for r in doubtful]
    assert {r.values["confidence"] for r in doubtful} == {None}


def test_a_band_along_an_outline_is_no_candidate() -> None:
    truth, predicted = np.full((400, 300), 7, np.uint16), np.full((400, 300), 7, np.uint16)
    truth[:, :150], predicted[:, :150] = 2, 2
    predicted[:, 150:154] = 2  # 1600 pixels, 4 wide: d is 2 for a diagonal of 500
    metric = LabelErrorsMetric(CLASSES)
    assert not list(metric.details(state_of(metric, Image(truth, predicted))))
    predicted[:, 154] = 2
    assert [r.values["severity"] for r in metric.details(state_of(metric, Image(truth, predicted)))] == [400.0]


def test_an_image_keeps_its_most_severe_candidates_and_counts_all() -> None:
    truth = np.full((130, 150), 7, np.uint16)
    predicted = truth.copy()
    for k in range(30):
        y, x = 20 * (k // 7), 21 * (k % 7)
        predicted[y : y + 10 + k // 10, x : x + 10 + k % 5] = 2
    metric = LabelErrorsMetric(CLASSES)
    state = state_of(metric, Image(truth, predicted))
    rows = list(metric.details(state))
    severity = [r.values["severity"] or 0 for r in rows]
    every = sorted((w["severity"] for w in naive_regions(Image(truth, predicted), 1)), reverse=True)
    assert by_name(metric.compute(state))["label_errors", ""] == 30.0
    assert severity == every[:PER_IMAGE]
    assert [r.values["rank"] for r in rows] == list(range(1, 21))


# -- label-errors-instance -------------------------------------------------------------------------------------------

SIZE = (40, 50)


@dataclass
class Thing:
    """An object or a detection."""

    mask: NDArray[np.bool_]
    label: int
    number: int = 1
    score: float = 1.0
    crowd: bool = False
    box: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.box = list(rle.bbox(rle.encode(self.mask), *self.mask.shape))

    def entry(self) -> dict[str, Any]:
        known = {"id": self.number, "category_id": self.label, "bbox_xywh": self.box, "iscrowd": self.crowd}
        return {**known, "area": float(self.mask.sum()), "counts": rle.encode(self.mask), "score": self.score}


def box_mask(top: int, left: int, high: int, wide: int) -> NDArray[np.bool_]:
    mask = np.zeros(SIZE, bool)
    mask[top : top + high, left : left + wide] = True
    return mask


def thing_rows(objects: Sequence[Thing], found: Sequence[Thing], name: str = "1") -> tuple[Row, Row]:
    same = {"sample_id": name, "height": SIZE[0], "width": SIZE[1]}
    truth = [{k: v for k, v in o.entry().items() if k != "score"} for o in objects]
    return row_of("samples", same | {"instances": truth}), row_of(
        "masks", same | {"instances": [d.entry() for d in found]}
    )


def random_things(generator: np.random.Generator) -> tuple[list[Thing], list[Thing]]:
    """Objects, some of them crowds or of an ignored class, and detections that are mostly like them."""

    def anywhere() -> NDArray[np.bool_]:
        y, x = int(generator.integers(0, SIZE[0] - 1)), int(generator.integers(0, SIZE[1] - 1))
        return box_mask(y, x, int(generator.integers(1, 20)), int(generator.integers(1, 20)))

    labels, scores = (1, 2, 1, 2, 9), (0.0, 0.5, 0.89, 0.9, 0.9, 0.95, 1.0)
    masks = [anywhere() for _ in range(int(generator.integers(0, 6)))]
    objects = []
    for number, mask in enumerate(masks, 1):
        objects.append(Thing(mask, int(generator.choice(labels)), number, crowd=bool(generator.random() < 0.2)))
        if generator.random() < 0.2:
            objects.append(Thing(mask, int(generator.choice(labels)), 100 + number))
    found = []
    for number in range(1, int(generator.integers(1, 9))):
        mask = masks[int(generator.integers(len(masks)))] if masks and generator.random() < 0.7 else anywhere()
        if generator.random() < 0.4:
            mask = mask & (generator.random(SIZE) < 0.85)
        found.append(Thing(mask, int(generator.choice(labels)), number, float(generator.choice(scores))))
    return objects, found


def naive_iou(detection: Thing, target: Thing) -> float:
    shared = int((detection.mask & target.mask).sum())
    union = int(detection.mask.sum()) if target.crowd else int((detection.mask | target.mask).sum())
    return shared / union if union else 0.0


def naive_candidates(objects: Sequence[Thing], found: Sequence[Thing]) -> set[tuple[str, int | None, int | None]]:
    """(kind, object, detection) by the rules as they are written."""
    found = [d for d in found if d.label != 9]
    sure = [d for d in found if d.score >= 0.9]
    real = [o for o in objects if not o.crowd]
    result: set[tuple[str, int | None, int | None]] = set()
    for d in sure:
        if all(naive_iou(d, o) < 0.1 for o in objects):
            result.add(("missing", None, d.number))
    for o in real:
        if o.label == 9:
            continue
        if all(naive_iou(d, o) < 0.1 for d in found):
            result.add(("spurious", o.number, None))
        accusers = []
        for d in sure:
            iou = naive_iou(d, o)
            greatest = max(naive_iou(d, other) for other in real)
            best = [other for other in real if naive_iou(d, other) == greatest]
            best = [other for other in best if other.label == d.label] or best
            if best[0] is o and iou >= 0.75 and d.label != o.label:
                backed = [e for e in found if e.label == o.label and naive_iou(e, o) >= 0.75 and e.score >= d.score]
                accusers += [] if backed else [d]
        if accusers:
            worst = max(accusers, key=lambda d: d.score)
            result.add(("class", o.number, worst.number))
    return result


def test_objects_are_suspected_by_the_rules_as_they_are_written() -> None:
    generator, metric = np.random.default_rng(11), LabelErrorsInstanceMetric(THINGS)
    kinds: dict[str, int] = {}
    for _ in range(300):
        objects, found = random_things(generator)
        state = metric.update(*thing_rows(objects, found))
        rows = list(metric.details(state))
        wanted = naive_candidates(objects, found)
        assert {(r.kind.partition(":")[2], r.truth_id, r.predicted_id) for r in rows} == wanted
        figures = by_name(metric.compute(state))
        for kind in ("class", "missing", "spurious"):
            number = sum(w[0] == kind for w in wanted)
            kinds[kind] = kinds.get(kind, 0) + number
            assert figures[f"label_errors_{kind}", ""] == number
            assert sum(figures[f"label_errors_{kind}", name] or 0 for name in NAMES.values()) == number
        assert figures["label_errors", ""] == len(wanted)
        assert figures["clean_images", ""] == float(not wanted)
        counted = sum(not o.crowd and o.label != 9 for o in objects)
        suspected = len({w[1] for w in wanted if w[1] is not None})
        missing = sum(w[0] == "missing" for w in wanted)
        assert metric.image(state).score == share(counted - suspected, counted + missing)
    assert min(kinds.values()) > 50


def test_planted_mistakes_come_first() -> None:
    metric = LabelErrorsInstanceMetric(THINGS)
    good = [Thing(box_mask(2, 2, 8, 8), 1, 1), Thing(box_mask(20, 20, 12, 12), 2, 2)]
    states = []
    for i in range(4):
        objects, found = list(good), [Thing(o.mask, o.label, o.number, 0.97) for o in good]
        if i == 1:
            objects = good[:1]  # the dog has no label
        if i == 2:
            objects = [good[0], Thing(good[1].mask, 1, 2)]  # it was labelled cat
        if i == 3:
            objects = [*good, Thing(box_mask(2, 30, 9, 9), 1, 3)]  # there is nothing
            found.append(Thing(box_mask(30, 2, 5, 5), 1, 4, 0.92))  # a sure mistake of the model
        states.append(metric.update(*thing_rows(objects, found, f"photo/{i}")))
    rows = list(metric.details(metric.merge(reversed(states))))
    assert [(r.kind, r.sample_id, r.class_name, r.truth_id, r.predicted_id, r.values["rank"]) for r in rows] == [
        ("label-error:class", "photo/2", "cat", 2, 2, 1.0),
        ("label-error:missing", "photo/1", "dog", None, 2, 1.0),
        ("label-error:missing", "photo/3", "cat", None, 4, 2.0),
        ("label-error:spurious", "photo/3", "cat", 3, None, 1.0),
    ]
    assert rows[0].values == {
        **{"rank": 1.0, "severity": 0.97, "pixels": 144.0, "x": 20.0, "y": 20.0, "width": 12.0, "height": 12.0},
        **{"score": 0.97, "iou": 1.0, "truth_label": 1.0, "predicted_label": 2.0},
    }
    assert rows[3].values == {
        **{"rank": 1.0, "severity": 81.0, "pixels": 81.0, "x": 30.0, "y": 2.0, "width": 9.0, "height": 9.0},
        **{"score": None, "iou": None, "truth_label": 1.0, "predicted_label": None},
    }
    nothing = metric.empty(thing_rows(good, [])[0])
    assert [r.kind for r in metric.details(nothing)] == ["label-error:spurious"] * 2


def test_each_kind_is_capped_by_itself() -> None:
    metric = LabelErrorsInstanceMetric(THINGS)
    places = [(y, x) for y in range(0, 39, 6) for x in range(0, 24, 6)]
    objects = [Thing(box_mask(y, x, 2 + i % 4, 3), 1, i) for i, (y, x) in enumerate(places, 1)]
    found = [Thing(box_mask(y, 26 + x, 3, 3), 2, i, 0.9 + i / 1000) for i, (y, x) in enumerate(places, 1)]
    state = metric.update(*thing_rows(objects, found))
    rows = list(metric.details(state))
    figures = by_name(metric.compute(state))
    assert figures["label_errors_missing", "dog"] == figures["label_errors_spurious", "cat"] == len(places) == 28
    scores = [r.values["score"] or 0 for r in rows if r.kind == "label-error:missing"]
    assert scores == sorted((d.score for d in found), reverse=True)[:PER_IMAGE]
    areas = [r.values["pixels"] for r in rows if r.kind == "label-error:spurious"]
    assert areas == sorted((float(o.mask.sum()) for o in objects), reverse=True)[:PER_IMAGE]


# -- all of them -----------------------------------------------------------------------------------------------------


def states_for(name: str, seed: int) -> tuple[Any, list[Any]]:
    generator = np.random.default_rng(seed)
    if name.endswith("-instance"):
        metric = registry.make(name, THINGS)
        pairs = [thing_rows(*random_things(generator), f"{i}") for i in range(6)]
        return metric, [metric.update(*p) for p in pairs]
    metric = registry.make(name, CLASSES)
    images = [street(generator, f"{i}") if i % 2 else random_image(generator, 30, f"{i}") for i in range(6)]
    return metric, [state_of(metric, i) for i in images]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    names = ("semantic-errors", "calibration", "calibration-instance", "label-errors", "label-errors-instance")
    metric, states = states_for(data.draw(st.sampled_from(names)), data.draw(st.integers(0, 1000)))
    order = data.draw(st.permutations(range(len(states))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
    shuffled = [states[i] for i in order]
    pieces = [metric.merge(shuffled[a:b]) for a, b in pairwise([0, *cuts, len(order)])]
    whole, again = metric.merge(states), metric.merge(pieces)
    assert [repr(f) for f in metric.compute(again)] == [repr(f) for f in metric.compute(whole)]
    assert list(metric.details(again)) == list(metric.details(whole))
    kept = metric.columns([None, *shuffled])
    ids = {"sample_id": ["-", *(str(i) for i in order)], "group_id": [None] * (1 + len(order))}
    kinds = {n: pa.array(v, pa.string()) for n, v in ids.items()}
    read = metric.states(pa.RecordBatch.from_pydict({**kinds, **kept}).slice(1))
    total = metric.merge(s for s in read if s is not None)
    assert metric.compute(total) == metric.compute(whole)
    assert list(metric.details(total)) == list(metric.details(whole))
    assert [metric.image(s) for s in read] == [metric.image(s) for s in shuffled]
