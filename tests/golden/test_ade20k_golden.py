"""ADE20K's sample data: its predictions are its annotations, and README.md says what the official code prints of them.

github.com/CSAILVision/sceneparsing, README.md, "Demo code": "Mean IoU over 150 classes: 0.1000", "Pixel-wise Accuracy:
100.00%", and (0.1 + 1.0) / 2 = 0.55 for the final score.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import columns, runlength
from segbatch.datasets.ade20k import CLASSES, Ade20k
from segbatch.datasets.tree import Tree
from segbatch.metrics import registry
from segbatch.metrics.base import Row

Map = NDArray[Any]


def rows(maps: list[Map]) -> list[Row]:
    """Rows with just what the metric reads."""
    made = {
        "sample_id": pa.array([str(i) for i in range(len(maps))]),
        "group_id": pa.nulls(len(maps), pa.string()),
        "height": pa.array([m.shape[0] for m in maps], pa.int32()),
        "width": pa.array([m.shape[1] for m in maps], pa.int32()),
        "semantic": columns.runs_array([runlength.encode(m) for m in maps]),
    }
    batch = pa.RecordBatch.from_pydict(made)
    return [Row(batch, i) for i in range(len(maps))]


def figures(protocol: str, truth: list[Map], predicted: list[Map]) -> dict[tuple[str, str], float | None]:
    metric = registry.make(protocol, CLASSES)
    total = metric.merge([metric.update(t, p) for t, p in zip(rows(truth), rows(predicted), strict=True)])
    return {(f.metric, f.class_name): f.value for f in metric.compute(total)}


@pytest.fixture
def truth(shared_data: Callable[[str], Path]) -> list[Map]:
    dataset, tree = Ade20k(), Tree.of(str(shared_data("data/ade20k/sampleData")))
    samples = (s for item in dataset.items(tree, ["validation"]) for s in dataset.read(item))
    return [s.semantic for s in samples if s.semantic is not None]


@pytest.fixture
def predicted(shared_data: Callable[[str], Path]) -> list[Map]:
    folder = shared_data("data/ade20k/sampleData/predictions")
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def test_the_sample_data_gives_the_published_figures(truth: list[Map], predicted: list[Map]) -> None:
    assert len(truth) == len(predicted) == 3
    found = figures("ade20k", truth, predicted)
    assert f"{found['miou', '']:.4f}" == "0.1000"
    assert f"{100 * (found['global_accuracy', ''] or 0):.2f}%" == "100.00%"
    assert found["final_score", ""] == 0.55
    assert sorted({v for (name, c), v in found.items() if name == "iou" and c}, key=str) == [0.0, 1.0]
    assert figures("ade20k-present", truth, predicted)["miou", ""] == 1.0


def test_one_image_for_another_gives_what_pixels_say(truth: list[Map]) -> None:
    """Predictions of a neighbour, cut to size; the formula on decoded pixels."""
    size = tuple(min(m.shape[axis] for m in truth) for axis in (0, 1))
    cut = [m[: size[0], : size[1]].astype(int) for m in truth]
    moved = [cut[-1], *cut[:-1]]
    pairs = np.zeros((151, 151))
    for t, p in zip(cut, moved, strict=True):
        np.add.at(pairs, (t[t > 0], p[t > 0]), 1)
    hit, union = np.diag(pairs)[1:], (pairs.sum(0) + pairs.sum(1) - np.diag(pairs))[1:]
    found = figures("ade20k", cut, moved)
    assert found["miou", ""] == pytest.approx(float(np.mean(hit / np.maximum(union, 1))), rel=1e-14)
    assert found["global_accuracy", ""] == np.trace(pairs) / pairs.sum()
    assert 0 < (found["miou", ""] or 0) < 0.1
