"""Confusion counts and boundaries: ``python tests/bench/bench_confusion.py [--camvid FOLDER]``.

Ours reads runs, as tables hold them, and includes all of ``update``; the others get decoded uint8 label maps. A
prediction is the label map of the frame before, or the map moved by some pixels. Both sides must count the same.
Figures are of CPU seconds in one thread; machines differ: the ratios are what to trust.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import columns, runlength
from segbatch.metrics.base import Row
from segbatch.metrics.boundaries import boundary_width
from segbatch.metrics.boundary_iou import BoundaryIouMetric
from segbatch.metrics.semantic import SemanticMetric
from segbatch.records import ClassInfo, ClassTable

Map = NDArray[np.uint8]

ROUNDS = 5


def drawn(size: tuple[int, int], classes: int, images: int) -> list[Map]:
    """Scenes of discs; the last id is void."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[: size[0], : size[1]]
    found = []
    for _ in range(images):
        scene = np.full(size, rng.integers(classes), np.uint8)
        for _ in range(60):
            row, column, radius = rng.integers(size[0]), rng.integers(size[1]), rng.integers(4, size[0] // 4)
            scene[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = rng.integers(classes + 1)
        found.append(scene)
    return found


def rows(maps: Sequence[Map]) -> list[Row]:
    """Rows in batches of 64, as they are read."""
    found: list[Row] = []
    for start in range(0, len(maps), 64):
        some = maps[start : start + 64]
        made = {
            "sample_id": pa.array([str(start + i) for i in range(len(some))]),
            "group_id": pa.nulls(len(some), pa.string()),
            "height": pa.array([m.shape[0] for m in some], pa.int32()),
            "width": pa.array([m.shape[1] for m in some], pa.int32()),
            "semantic": columns.runs_array([runlength.encode(m) for m in some]),
        }
        batch = pa.RecordBatch.from_pydict(made)
        found += [Row(batch, i) for i in range(len(some))]
    return found


def bincount(truth: Map, predicted: Map, n: int) -> NDArray[np.int64]:
    """fast_hist of the FCN code."""
    keep = truth < n
    found: NDArray[np.int64] = np.bincount(n * truth[keep].astype(int) + predicted[keep], minlength=n**2)
    return found[: n**2].reshape(n, n)


def boundaries(truth: Map, predicted: Map, n: int) -> NDArray[np.int64]:
    """mask_to_boundary of every class, and its pixels in both, in the ground truth, in the prediction."""
    depth, kernel = boundary_width(*truth.shape), np.ones((3, 3), np.uint8)
    found = np.zeros((n, 3), np.int64)
    for c in range(n):
        pair = []
        for label_map in (truth, predicted):
            mask = (label_map == c).astype(np.uint8)
            framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            pair.append((mask - cv2.erode(framed, kernel, iterations=depth)[1:-1, 1:-1]) > 0)
        pair[1] &= truth < n
        found[c] = (pair[0] & pair[1]).sum(), pair[0].sum(), pair[1].sum()
    return found


def seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """CPU seconds of the best round, and the result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def compare(what: str, truth: list[Map], predicted: list[Map], n: int) -> None:
    """Print both comparisons of maps whose ids are 0..n, n being void; void is predicted as the last class."""
    table = ClassTable(tuple(ClassInfo(i, str(i), ignore=i == n) for i in range(n + 1)))
    predicted = [np.minimum(p, n - 1) for p in predicted]
    maps, both = list(zip(truth, predicted, strict=True)), list(zip(rows(truth), rows(predicted), strict=True))
    runs = sum(len(runlength.encode(m).values) for m in (*truth, *predicted)) / 2 / len(truth)
    print(f"{what}: {len(truth)} images of {truth[0].shape[1]} x {truth[0].shape[0]}, {runs:.0f} runs each")
    area = sum(m.size for m in truth) / 1e6

    metric = SemanticMetric(table)
    spent, states = seconds(lambda: [metric.update(t, p) for t, p in both])
    their, counts = seconds(lambda: sum(bincount(t, p, n) for t, p in maps))
    if metric.confusion(metric.merge(states)).pixels.tolist() != counts.tolist():
        raise AssertionError("the counts differ")
    report("confusion, NumPy's bincount", their, spent, area)

    outline = BoundaryIouMetric(table)
    spent, found = seconds(lambda: [outline.update(t, p) for t, p in both])
    their, counts = seconds(lambda: sum(boundaries(t, p, n) for t, p in maps), 1)
    if outline.merge(found).values["counts"].tolist() != counts.tolist():
        raise AssertionError("the boundaries differ")
    report("boundary IoU, mask_to_boundary with OpenCV", their, spent, area)


def report(what: str, their: float, spent: float, area: float) -> None:
    """One line; area in millions of pixels."""
    rates = f"{area / their:.0f} Mpx/s, segbatch {area / spent:.0f} Mpx/s"
    print(f"  {what} {rates}: {their / spent:.1f} x")


def camvid(folder: Path) -> list[Map]:
    """Label maps of val."""
    return [np.asarray(Image.open(file)) for file in sorted((folder / "valannot").glob("*.png"))]


def moved(scene: Map) -> tuple[list[Map], list[Map]]:
    """A scene four times, and it moved in four ways."""
    shifts = ((3, 5), (-4, 2), (1, -6), (-2, -3))
    return [scene] * len(shifts), [np.ascontiguousarray(np.roll(scene, s, (0, 1))) for s in shifts]


def main() -> None:
    """Parse arguments, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--camvid", type=Path, help="folder with valannot/")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    frames = camvid(arguments.camvid) if arguments.camvid else drawn((360, 480), 11, 40)
    compare("CamVid" if arguments.camvid else "drawn", frames, [frames[-1], *frames[:-1]], 11)
    truth, predicted = moved(drawn((1024, 2048), 19, 1)[0])
    compare("drawn", truth, predicted, 19)


if __name__ == "__main__":
    main()
