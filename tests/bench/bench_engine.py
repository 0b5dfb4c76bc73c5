"""What the engine costs: segbatch with a model that costs nothing, against a bare loop without Ray.

The bare loop is a thread pool that reads, decodes, prepares, "predicts" and encodes each photo with the very functions
and as many threads as the actor, and throws the result away: no Parquet, no plan, no commit. Ray's start and the
model's load are excluded on both sides (the run prints them).

    python tests/bench/bench_engine.py [--images 10000] [--rounds 3] [--model litert:...]
"""

import argparse
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

import segbatch
from segbatch.codecs import photo, runlength
from segbatch.config import EngineConfig, ExecutionConfig, PlanConfig, RunOptions
from segbatch.inference.pipeline import Predictor, auto_batch_size
from segbatch.models import registry
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.registry import ModelSource
from segbatch.records import ClassTable


@dataclass(frozen=True)
class FreeModel:
    """A model that costs nothing: the same label map for every photo of a shape."""

    reference: str = "free"

    def describe(self) -> ModelSpec:
        return ModelSpec(
            "free", "semantic", ClassTable(()), InputSpec(dtype="uint8", layout="nhwc"), "labels", digest="free"
        )

    def load(self, threads: int) -> Segmenter:
        return _Free(self.describe())


class _Free:
    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def forward(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        labels = np.zeros(batch.shape[:3], np.uint8)
        labels[:, labels.shape[1] // 2 :] = 1
        return labels


def draw_photos(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs of 640x480 with texture, about 60 kB each (the size of a COCO photo)."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(32):
        coarse = cv2.resize(rng.integers(0, 256, (30, 40, 3), np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
        grain = rng.integers(-14, 15, (480, 640, 3))
        pixels = np.clip(coarse.astype(int) + grain, 0, 255).astype(np.uint8)
        encoded.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes())
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(encoded[i % len(encoded)])


def bare_loop(paths: Sequence[Path], segmenter: Segmenter, threads: int) -> float:
    """Images per second of a thread pool with segbatch's own decode and encode functions."""
    predictor = Predictor(segmenter, auto_batch_size(segmenter.spec))
    lock = threading.Lock()

    def one(path: Path) -> int:
        rgb, info = photo.decode(path.read_bytes(), str(path))
        prepared = predictor.prepare(photo.upright(rgb, info.exif_orientation))
        with lock:
            raw = predictor.forward([prepared])[0]
        labels = predictor.finish(raw).semantic
        assert labels is not None
        return len(runlength.encode(photo.stored(labels, info.exif_orientation)).values)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths[:64]))
        began = time.perf_counter()
        for _ in pool.map(one, paths):
            pass
        return len(paths) / (time.perf_counter() - began)


def through_segbatch(
    folder: Path, model: ModelSource, threads: int, batch_size: int, inference: ExecutionConfig | None = None
) -> tuple[float, float]:
    """Images per second of ``segbatch.predict`` on local Ray, and the seconds before work began."""
    options = RunOptions(
        engine=EngineConfig(kind="ray", threads=threads),
        plan=PlanConfig(shard_rows=512),
        inference=inference or ExecutionConfig(),
    )
    with tempfile.TemporaryDirectory() as out:
        result = segbatch.predict(model, str(folder), f"{out}/masks", options=options, batch_size=batch_size)
    return result.rows / result.seconds, result.start_seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="")
    parser.add_argument("--batch-size", type=int, default=0)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    source: ModelSource = registry.source(arguments.model) if arguments.model else FreeModel()
    segmenter = source.load(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw_photos(folder, arguments.images)
        paths = sorted(folder.iterdir())
        os.sync()  # or the kernel writes them back while we measure
        ratios = []
        for _ in range(arguments.rounds):
            bare = bare_loop(paths, segmenter, threads)
            ours, start = through_segbatch(folder, source, threads, arguments.batch_size)
            ratios.append(ours / bare)
            speeds = f"bare loop {bare:8.1f} images/s   segbatch {ours:8.1f} images/s"
            print(f"{speeds}   {ours / bare:.2f}   (start {start:.1f} s)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ratio = statistics.median(ratios)
    print(f"{arguments.images} photos of 640x480, {threads} threads: median ratio {ratio:.3f}; driver {peak:.0f} MB")


if __name__ == "__main__":
    main()
