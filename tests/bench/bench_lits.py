"""LiTS's figures of one CT volume against the official rule: ``python tests/bench/bench_lits.py [--slices N]``.

A liver of 512 x 512 x 100 voxels whose surface is wavy, with lesions, some of which the prediction misses, moves or
makes up. The official side is its rule re-derived (``lits_cases.official``), which takes its steps and its
boxes; both get labels in memory, ours as rows, and must say the same. ``--ours`` scores alone and prints the peak of
memory. Figures are CPU seconds in one thread; machines differ: the ratios are what to trust.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from lits_cases import Scan, official
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.metrics.base import MetricOptions, Row
from segbatch.metrics.lits import LitsMetric
from segbatch.records import ClassInfo, ClassTable

SIDE = 512
SPACING = (0.75, 0.75, 2.5)
CLASSES = ClassTable(tuple(ClassInfo(i, name) for i, name in enumerate(("background", "liver", "lesion"))))

Lesion = tuple[NDArray[np.float64], float]
"""Centre (parts of the volume) and radius (parts of its width)."""


def lesions(rng: np.random.Generator, count: int) -> list[Lesion]:
    """Some places in the liver."""
    return [(rng.uniform(0.35, 0.65, 3), float(rng.uniform(0.008, 0.05))) for _ in range(count)]


def changed(rng: np.random.Generator, truth: list[Lesion]) -> list[Lesion]:
    """Most of them, a little elsewhere, and others."""
    kept = [(centre + rng.normal(0, 0.005, 3), radius * rng.uniform(0.7, 1.2)) for centre, radius in truth[2:]]
    return [*kept, *lesions(rng, 4)]


def slice_of(k: int, slices: int, phase: float, places: list[Lesion]) -> NDArray[np.uint8]:
    """Labels of a slice, (rows, columns): a wavy ellipsoid and balls in it."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    z = (k + 0.5) / slices
    waves = 0.015 * (np.sin(40 * x + phase) * np.cos(33 * y - phase) + np.sin(25 * z + 17 * y + 2 * phase))
    distance = ((x - 0.5) / 0.3) ** 2 + ((y - 0.5) / 0.25) ** 2 + ((z - 0.5) / 0.42) ** 2
    labels = np.where(distance < 1 + 4 * waves, np.uint8(1), np.uint8(0))
    for (cx, cy, cz), radius in places:
        depth = (z - cz) * slices * SPACING[2] / (SIDE * SPACING[0])
        labels[((x - cx) ** 2 + (y - cy) ** 2 + depth**2 < radius**2) & (labels > 0)] = 2
    return labels


def rows_of(slices: int, phase: float, places: list[Lesion], schema: pa.Schema) -> pa.RecordBatch:
    """A table of one volume, made slice by slice."""
    same: dict[str, Any] = {"group_id": "volume-0", "image_uri": "", "etag": "", "status": "ok", "model_digest": ""}
    same |= {"height": SIDE, "width": SIDE}
    at = [{"index": k, "slices": slices, "spacing_mm": SPACING} for k in range(slices)]
    made = {
        "sample_id": pa.array([f"volume-0/{k:04d}" for k in range(slices)]),
        "semantic": columns.runs_array([runlength.encode(slice_of(k, slices, phase, places)) for k in range(slices)]),
        "volume": pa.array(at, schemas.VOLUME),
    }
    arrays = [made[f.name] if f.name in made else pa.array([same.get(f.name)] * slices, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def labels_of(rows: pa.RecordBatch) -> NDArray[np.uint8]:
    """Labels by column, row and slice."""
    maps = [columns.runs_at(rows.column("semantic"), k) for k in range(rows.num_rows)]
    return np.stack([runlength.decode(m, (SIDE, SIDE), np.uint8) for m in maps if m is not None]).transpose(2, 1, 0)


def ours(truth: pa.RecordBatch, predicted: pa.RecordBatch, upstream_bugs: bool) -> dict[str, float | None]:
    """From rows to figures."""
    metric = LitsMetric(CLASSES, MetricOptions(upstream_bugs=upstream_bugs))
    states = [metric.update(Row(truth, k), Row(predicted, k)) for k in range(truth.num_rows)]
    return {f.metric: f.value for f in metric.compute(metric.merge(states))}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the better of two rounds, and the result."""
    best, result = float("inf"), None
    for _ in range(2):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def main() -> None:
    """Parse arguments, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--lesions", type=int, default=12)
    parser.add_argument("--ours", action="store_true", help="leave the official rule away")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    places = lesions(rng, arguments.lesions)
    truth = rows_of(arguments.slices, 0.0, places, schemas.SAMPLES)
    predicted = rows_of(arguments.slices, 0.3, changed(rng, places), schemas.MASKS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent, figures = seconds(lambda: ours(truth, predicted, False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = f"peak {peak / 1024:.0f} MB ({before / 1024:.0f} before)"
    print(f"{SIDE} x {SIDE} x {arguments.slices}: segbatch {spent:.3f} s, {memory}")
    if arguments.ours:
        return
    scan = Scan("volume-0", labels_of(truth), labels_of(predicted), SPACING)
    for upstream_bugs in (False, True):
        their, expected = seconds(lambda bugs=upstream_bugs: official([scan], bugs))  # type: ignore[misc]
        spent, figures = seconds(lambda bugs=upstream_bugs: ours(truth, predicted, bugs))  # type: ignore[misc]
        if figures != expected:
            raise AssertionError("the figures differ")
        words = "with its bugs" if upstream_bugs else "without its bugs"
        print(f"{words}: official rule {their:.2f} s, segbatch {spent:.3f} s: {their / spent:.0f} x, the same figures")


if __name__ == "__main__":
    main()
