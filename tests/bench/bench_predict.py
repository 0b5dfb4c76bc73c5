"""End to end against the model's own loop: how much of a real model's speed segbatch gives away, or adds.

Two loops to hold it against, both in this process. The bare loop: the network alone, computing as ``segbatch predict``
decides (engine and number format), from as many threads as there are cores, on inputs that lie prepared in memory (no
reading, decoding, encoding or writing; on a CPU nothing can reach that, because the rest takes CPU time as well). The
plain script: torch in float32 with all threads, the same work photo by photo, the result thrown away. Ray's start, the
model's load and the calibration are excluded everywhere.

    python tests/bench/bench_predict.py MODEL FOLDER [--images 300] [--rounds 3]
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_engine import through_segbatch

from segbatch.codecs import photo, runlength
from segbatch.inference import execution
from segbatch.inference.pipeline import Predictor, Prepared
from segbatch.models import registry
from segbatch.models.registry import ModelSource


def network_alone(predictor: Predictor, paths: list[Path], threads: int) -> float:
    """Images per second of the network, in batches as segbatch makes them, from so many threads."""
    prepared = [_prepared(predictor, path)[0] for path in paths]
    size = predictor.batch_size
    batches = [prepared[start : start + size] for start in range(0, len(prepared), size)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(predictor.forward, batches[: 2 * threads]))
        began = time.perf_counter()
        list(pool.map(predictor.forward, batches))
        return len(prepared) / (time.perf_counter() - began)


def fastest(source: ModelSource, paths: list[Path], threads: int) -> Predictor:
    """The model computing as ``segbatch predict`` decides for a large run."""
    photos = [photo.decode(p.read_bytes(), str(p))[0] for p in paths[:8]]
    decided = execution.decide(source.load(1), photos, 10**6)
    print(decided.said)
    return Predictor(execution.apply(source.load(1), decided, threads), decided.batch_size)


def plain_script(predictor: Predictor, paths: list[Path]) -> float:
    """Images per second of read, decode, prepare, network, post-processing and encoding, one after the other."""
    began = time.perf_counter()
    for path in paths:
        prepared, orientation = _prepared(predictor, path)
        labels = predictor.finish(predictor.forward([prepared])[0]).semantic
        assert labels is not None
        runlength.encode(photo.stored(labels, orientation))
    return len(paths) / (time.perf_counter() - began)


def _prepared(predictor: Predictor, path: Path) -> tuple[Prepared, int]:
    rgb, info = photo.decode(path.read_bytes(), str(path))
    return predictor.prepare(photo.upright(rgb, info.exif_orientation)), info.exif_orientation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    originals = sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in (".jpg", ".png", ".bmp"))
    with tempfile.TemporaryDirectory() as scratch:
        paths = []
        for number, source in zip(range(arguments.images), itertools.cycle(originals), strict=False):
            paths.append(Path(scratch) / f"{number:05d}{source.suffix}")
            paths[-1].write_bytes(source.read_bytes())
        source = registry.source(arguments.model)
        fast = fastest(source, paths, threads)
        ratios = []
        for _ in range(arguments.rounds):
            alone = network_alone(fast, paths, threads)
            script = plain_script(Predictor(source.load(threads), 1), paths)
            ours, start = through_segbatch(Path(scratch), source, threads, 0)
            ratios.append((ours / alone, ours / script))
            print(f"network alone {alone:6.2f}   plain script {script:6.2f}   segbatch {ours:6.2f} images/s", end="   ")
            print(f"{ours / alone:.3f}   {ours / script:.3f}   (start {start:.1f} s)")
    medians = [statistics.median(r) for r in zip(*ratios, strict=True)]
    print(f"{arguments.images} photos, {threads} threads: median ratios {medians[0]:.3f} and {medians[1]:.3f}")


if __name__ == "__main__":
    main()
