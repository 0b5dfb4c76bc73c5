"""Detections of exported networks, against the plain definitions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch.codecs import rle
from segbatch.errors import ConfigError, DataError
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry
from segbatch.models.base import Choice, Detections
from segbatch.models.graph_outputs import Declared, best, over_boxes, reading

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_files as onnx

SIZE = (64, 96)
PROTOTYPES, CLASSES = 4, 3
NAMES = 'classes = ["a", "b", "c"]\n'
PLAIN = NAMES + "mean = [0, 0, 0]\nstd = [1, 1, 1]\n"


def put(folder: Path, data: bytes, side_car: str = "") -> str:
    (folder / "net.onnx").write_bytes(data)
    (folder / "net.onnx.toml").write_text(side_car)
    return f"onnx:{folder}/net.onnx"


def heads(seed: int = 0, anchors: int = 150) -> dict[str, NDArray[Any]]:
    """Boxes around a few centres, with scores and coefficients, and prototypes."""
    random = np.random.default_rng(seed)
    centres = random.uniform([10, 10], [SIZE[1] - 10, SIZE[0] - 10], (6, 2))[random.integers(0, 6, anchors)]
    boxes = np.concatenate([centres + random.normal(0, 1, (anchors, 2)), random.uniform(20, 50, (anchors, 2))], 1)
    scores = random.uniform(0, 1, (anchors, CLASSES)) ** 4
    weights = random.normal(0, 1, (anchors, PROTOTYPES))
    rows = np.concatenate([boxes, scores, weights], 1).T[None].astype(np.float32)
    maps = random.normal(0, 2, (1, PROTOTYPES, SIZE[0] // 4, SIZE[1] // 4)).astype(np.float32)
    return {"output0": rows, "output1": maps}


def overlap(a: NDArray[Any], b: NDArray[Any]) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0) * max(tall, 0)
    return float(both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both))


def naive_yolo(rows: NDArray[Any], min_score: float, iou: float, top_k: int) -> list[tuple[Any, float, int, Any]]:
    """(box, score, class, coefficients), the best first: one candidate after the other."""
    candidates = []
    for column in rows.T.astype(np.float64):
        x, y, wide, tall = column[:4]
        index = int(np.argmax(column[4 : 4 + CLASSES]))
        if column[4 + index] >= min_score:
            box = np.array([x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2])
            candidates.append((box, float(column[4 + index]), index, column[4 + CLASSES :]))
    kept: list[tuple[Any, float, int, Any]] = []
    for one in sorted(candidates, key=lambda c: -c[1]):
        if all(k[2] != one[2] or overlap(k[0], one[0]) <= iou for k in kept):
            kept.append(one)
    return kept[:top_k]


def bilinear(values: NDArray[Any], y: float, x: float) -> float:
    """At a position in pixels of the map, centres at half-integers, the border repeated."""
    y, x = min(max(y - 0.5, 0), values.shape[0] - 1), min(max(x - 0.5, 0), values.shape[1] - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
    upper = values[top, left] * (1 - (x - left)) + values[top, right] * (x - left)
    lower = values[bottom, left] * (1 - (x - left)) + values[bottom, right] * (x - left)
    return float(upper * (1 - (y - top)) + lower * (y - top))


def naive_mask(logits: NDArray[Any], box: NDArray[Any], size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    """On every pixel of the input: up-sampled, above 0, inside the box."""
    mask = np.zeros(size, bool)
    for y in range(size[0]):
        for x in range(size[1]):
            inside = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
            down, right = logits.shape[0] / size[0], logits.shape[1] / size[1]
            mask[y, x] = inside and bilinear(logits, (y + 0.5) * down, (x + 0.5) * right) > 0
    return mask


def decoded(counts: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    return rle.decode(counts, *size)


def forwarded(reference: str) -> Detections:
    model = registry.source(reference).load(1)
    [found] = model.forward(np.zeros((1, 3, *SIZE), np.float32))
    assert isinstance(found, Detections)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_yolo_gives_what_the_plain_definition_gives(tmp_path: Path, seed: int) -> None:
    outputs = heads(seed)
    reference = put(tmp_path, onnx.constant_outputs(outputs, SIZE), PLAIN)
    spec = registry.source(reference).describe()
    assert (spec.task, spec.output, spec.choice) == ("instance", "detections", Choice(nms_iou=0.7))
    assert (spec.input.resize, all(c.isthing for c in spec.classes.classes)) == ("letterbox", True)
    found, wanted = forwarded(reference), naive_yolo(outputs["output0"][0], 0.05, 0.7, 100)
    assert 10 < len(wanted) < 100
    np.testing.assert_allclose(found.boxes, [w[0] for w in wanted], atol=1e-4)
    np.testing.assert_allclose(found.scores, [w[1] for w in wanted], rtol=1e-6)
    assert found.classes.tolist() == [w[2] for w in wanted]
    side = found.masks.shape[-1]
    assert side == math.ceil(max((w[0][2:] - w[0][:2]).max() for w in wanted) / 4 - 1e-4)
    for mask, (box, _, _, weights) in zip(found.masks[:5], wanted, strict=False):
        logits = np.tensordot(weights, outputs["output1"][0].astype(np.float64), 1)
        for i, j in np.ndindex(side, side):
            y = box[1] + (i + 0.5) / side * (box[3] - box[1])
            x = box[0] + (j + 0.5) / side * (box[2] - box[0])
            assert mask[i, j] == pytest.approx(1 / (1 + math.exp(-bilinear(logits, y / 4, x / 4))), abs=1e-4)


def test_yolo_masks_on_the_photo(tmp_path: Path) -> None:
    """Smooth prototypes, as networks give them: up-sampled whole and cut, as ``process_mask_native`` does."""
    outputs = heads(1)
    y, x = np.mgrid[0 : SIZE[0] // 4, 0 : SIZE[1] // 4] / 8
    outputs["output1"] = np.stack([np.sin(y), np.cos(x), np.sin(x + y), np.ones_like(x)])[None].astype(np.float32)
    model = Predictor(registry.source(put(tmp_path, onnx.constant_outputs(outputs, SIZE), PLAIN)).load(1), 1)
    instances = model.predict(np.zeros((*SIZE, 3), np.uint8)).instances
    wanted = naive_yolo(outputs["output0"][0], 0.05, 0.7, 100)
    assert instances is not None and len(instances) == len(wanted)
    both = either = 0
    for instance, (box, score, index, weights) in zip(instances, wanted, strict=True):
        assert instance.category_id == index and instance.score == pytest.approx(score, rel=1e-6)
        mask = naive_mask(np.tensordot(weights, outputs["output1"][0], 1), box)
        ours = decoded(instance.counts, SIZE)
        both, either = both + int((mask & ours).sum()), either + int((mask | ours).sum())
    assert both / either > 0.93


def test_yolo_is_fed_as_ultralytics_does(tmp_path: Path) -> None:
    """Metadata alone: grey beside the photo, values 0..1, boxes back on the photo."""
    rows = np.zeros((1, 4 + CLASSES + PROTOTYPES, 2), np.float32)
    rows[0, :, 0] = [48, 16, 96, 32, 0, 0.9, 0, 0, 0, 0, 1]
    maps = np.ones((1, PROTOTYPES, 16, 24), np.float32)
    metadata = {
        "names": "{0: 'x', 1: 'y', 2: 'z'}",
        "imgsz": f"{list(SIZE)}",
        "stride": "32",
        "task": "segment",
        "author": "Ultralytics",
        "license": "AGPL-3.0",
    }
    reference = put(tmp_path, onnx.constant_outputs({"a": rows, "b": maps}, SIZE, metadata=metadata))
    spec = registry.source(reference).describe()
    assert ([c.name for c in spec.classes.classes], spec.licence) == (["x", "y", "z"], "AGPL-3.0")
    model = Predictor(registry.source(reference).load(1), 1)
    rgb = np.full((16, 48, 3), 200, np.uint8)
    grey = 114 / 255
    assert (spec.input.mean, spec.input.std) == ((grey,) * 3, (1, 1, 1))
    tensor = model.prepare(rgb).tensor + np.float32(grey)
    assert tensor.shape == (3, *SIZE)
    np.testing.assert_allclose(tensor[:, :32], 200 / 255, atol=1e-6)
    np.testing.assert_allclose(tensor[:, 32:], grey, atol=1e-6)
    [instance] = model.predict(rgb).instances or ()
    assert (instance.category_id, instance.bbox_xywh) == (1, (0, 0, 48, 16))
    assert decoded(instance.counts, (16, 48)).mean() > 0.9


def test_yolo_with_suppression_in_the_graph(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = np.zeros((1, 20, 6 + PROTOTYPES), np.float32)
    rows[0, :3] = [
        [4, 4, 44, 36, 0.6, 2, *random.normal(size=PROTOTYPES)],
        [5, 4, 44, 36, 0.9, 2, *random.normal(size=PROTOTYPES)],
        [50, 10, 60, 30, 0.3, 0, *random.normal(size=PROTOTYPES)],
    ]
    reference = put(tmp_path, onnx.constant_outputs({"a": rows, "b": heads()["output1"]}, SIZE), PLAIN)
    assert registry.source(reference).describe().choice.nms_iou is None
    found = forwarded(reference)
    np.testing.assert_array_equal(found.boxes, rows[0, [1, 0, 2], :4])
    assert (found.classes.tolist(), found.masks.shape) == ([2, 2, 0], (3, 10, 10))
    found = forwarded(
        put(tmp_path, onnx.constant_outputs({"a": rows, "b": heads()["output1"]}, SIZE), PLAIN + "top_k = 1")
    )
    assert found.scores.tolist() == [np.float32(0.9)]


@pytest.mark.parametrize("whole", [True, False])
def test_mmdeploys_detections(tmp_path: Path, whole: bool) -> None:
    random = np.random.default_rng(0)
    boxes = np.array([[[8, 8, 40, 40, 0.5], [10, 20, 90, 60, 0.9], [0, 0, 0, 0, 0]]], np.float32)
    labels = np.array([[2, 1, -1]])
    masks = random.uniform(0, 1, (1, 3, *(SIZE if whole else (14, 14)))).astype(np.float32)
    outputs = {"dets": boxes, "labels": labels, "masks": masks}
    reference = put(tmp_path, onnx.constant_outputs(outputs, SIZE), PLAIN)
    found = forwarded(reference)
    assert (found.scores.tolist(), found.classes.tolist()) == ([np.float32(0.9), 0.5], [1, 2])
    np.testing.assert_array_equal(found.boxes, boxes[0, [1, 0], :4])
    if not whole:
        np.testing.assert_array_equal(found.masks, masks[0, [1, 0]])
        return
    assert found.masks.shape == (2, 80, 80)
    for i, j in ((0, 0), (40, 13), (79, 79)):
        y, x = 20 + (i + 0.5) / 80 * 40, 10 + (j + 0.5) / 80 * 80
        assert found.masks[0, i, j] == pytest.approx(bilinear(masks[0, 1], y, x), abs=1e-5)


def test_masks_of_another_shape(tmp_path: Path) -> None:
    outputs = {
        "dets": np.array([[[8, 8, 40, 40, 0.5]]], np.float32),
        "labels": np.array([[2]]),
        "masks": np.ones((1, 1, 14, 20), np.float32),
    }
    with pytest.raises(DataError, match="masks of 14 x 20 for an input of 64 x 96"):
        forwarded(put(tmp_path, onnx.constant_outputs(outputs, SIZE), PLAIN))


def test_classes_must_be_named(tmp_path: Path) -> None:
    data = onnx.constant_outputs(heads(), SIZE)
    with pytest.raises(ConfigError, match=r"does not name its classes \(give 3 names with --classes"):
        registry.source(put(tmp_path, data, PLAIN.removeprefix(NAMES))).describe()
    with pytest.raises(ConfigError, match=r"names 2 classes, .* has 3 outputs"):
        registry.source(put(tmp_path, data, PLAIN.replace('"a", ', ""))).describe()
    data = onnx.constant_outputs(heads(), SIZE, metadata={"names": '["a", "b"]'})
    with pytest.raises(ConfigError, match=r"names 2 classes, .* has 3 outputs"):
        registry.source(put(tmp_path, data)).describe()


def test_the_side_car_chooses(tmp_path: Path) -> None:
    outputs, data = heads(2), onnx.constant_outputs(heads(2), SIZE)
    found = forwarded(put(tmp_path, data, PLAIN + "min_score = 0.4\nnms_iou = 0.3\ntop_k = 7"))
    wanted = naive_yolo(outputs["output0"][0], 0.4, 0.3, 7)
    np.testing.assert_allclose(found.scores, [w[1] for w in wanted], rtol=1e-6)
    digests = {
        registry.source(put(tmp_path, data, PLAIN + more)).describe().digest
        for more in ("", "min_score = 0.4", "nms_iou = 0.3", "top_k = 7", "mask_threshold = 0.4")
    }
    assert len(digests) == 5


def test_nothing_found(tmp_path: Path) -> None:
    found = forwarded(put(tmp_path, onnx.constant_outputs(heads(), SIZE), PLAIN + "min_score = 1"))
    assert (found.boxes.shape, found.masks.ndim, len(found.masks)) == ((0, 4), 3, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0, 1), st.integers(1, 12))
def test_suppression_is_the_greedy_one(seed: int, count: int, iou: float, top_k: int) -> None:
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 20, (count, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 20, (count, 2))], 1).astype(np.float32)
    scores, classes = random.uniform(0, 1, count).astype(np.float32), random.integers(0, 2, count)
    kept: list[int] = []
    for i in sorted(range(count), key=lambda k: -scores[k]):
        rivals = [overlap(boxes[k].astype(float), boxes[i].astype(float)) for k in kept if classes[k] == classes[i]]
        if any(abs(r - iou) < 1e-5 for r in rivals):
            return
        if scores[i] >= 0.3 and not any(r > iou for r in rivals):
            kept.append(i)
    found = best(boxes, scores, classes, Choice(min_score=0.3, nms_iou=iou, top_k=top_k))
    assert found.tolist() == kept[:top_k]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
def test_values_over_boxes_are_interpolated(seed: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(seed)
    maps = random.normal(size=(2, rows, columns)).astype(np.float32)
    corner = random.uniform(-5, 30, (2, 2))
    boxes = np.concatenate([corner, corner + random.uniform(0, 40, (2, 2))], 1).astype(np.float32)
    found = over_boxes(maps, boxes, (32, 48))
    side = found.shape[1]
    for k, (i, j) in ((k, at) for k in range(2) for at in ((0, 0), (side - 1, side // 2))):
        y = boxes[k, 1] + (i + 0.5) / side * (boxes[k, 3] - boxes[k, 1])
        x = boxes[k, 0] + (j + 0.5) / side * (boxes[k, 2] - boxes[k, 0])
        assert found[k, i, j] == pytest.approx(bilinear(maps[k], y * rows / 32, x * columns / 48), abs=1e-3)


@pytest.mark.parametrize(
    ("outputs", "layout", "wanted"),
    [
        ([("x", (None, 5, None, None), "f")], "nchw", ("semantic", "logits", 5)),
        ([("x", (None, None, None, 5), "f")], "nhwc", ("semantic", "logits", 5)),
        ([("x", (1, 1, 8, 8), "f")], "nchw", ("semantic", "logits", 2)),
        ([("x", (1, 8, 8), "i")], "nchw", ("semantic", "labels", None)),
        ([("aux", (1, 1, 8, 8), "f"), ("out", (1, 7, 8, 8), "f")], "nchw", ("semantic", "logits", 7)),
        ([("x", (1, 116, None), "f"), ("y", (1, 32, None, None), "f")], "nchw", ("instance", "detections", 80)),
        ([("y", (1, 32, 8, 8), "f"), ("x", (1, 300, 38), "f")], "nchw", ("instance", "detections", None)),
        (
            [("m", (1, None, 8, 8), "f"), ("d", (1, None, 5), "f"), ("l", (1, None), "i")],
            "nchw",
            ("instance", "detections", None),
        ),
        ([("x", (None, None, None, None), "f")], "nchw", None),
        ([("x", (1, 8, 8), "f")], "nchw", None),
        ([("x", (1, 5, 8, 8), "i")], "nchw", None),
        ([("x", (1, 5), "f")], "nchw", None),
        ([], "nchw", None),
    ],
)
def test_outputs_are_told_apart_by_their_shapes(
    outputs: list[tuple[str, tuple[int | None, ...], str]], layout: str, wanted: tuple[Any, ...] | None
) -> None:
    found = reading([Declared(*o) for o in outputs], layout, None)
    assert (found and (found.task, found.output, found.channels)) == wanted
