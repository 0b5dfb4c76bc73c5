"""End to end against the model's own loop: how much of a real model's speed segbatch gives away, or adds.

Three loops to hold it against, all in this process. The network alone, computing as ``segbatch predict`` decides
(engine and number format), from as many threads as there are cores, on inputs that lie prepared in memory: on a CPU
nothing can reach that, because the rest takes CPU time as well. The bare loop: the same, with reading, decoding,
preparing, post-processing and encoding in the same threads, the result thrown away. The plain script: torch in float32
with all threads, the same work photo by photo. Ray's start, the model's load and the calibration are excluded.

    python tests/bench/bench_predict.py MODEL FOLDER [--images 300] [--rounds 3] [--min-agreement .99]
"""

import argparse
import functools
import itertools
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_engine import through_segbatch

from segbatch.codecs import photo, runlength
from segbatch.config import ExecutionConfig
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


def bare_loop(predictor: Predictor, paths: list[Path], threads: int) -> float:
    """Images per second of the whole work on a photo, the result thrown away, from so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(functools.partial(_worked, predictor), paths[: 4 * threads]))
        began = time.perf_counter()
        list(pool.map(functools.partial(_worked, predictor), paths))
        return len(paths) / (time.perf_counter() - began)


def fastest(source: ModelSource, paths: list[Path], threads: int, wanted: ExecutionConfig) -> Predictor:
    """The model computing as ``segbatch predict`` decides for a large run."""
    photos = [photo.decode(p.read_bytes(), str(p))[0] for p in paths[:8]]
    decided = execution.decide(source.load(1), photos, 10**6, wanted)
    print(decided.said)
    return Predictor(execution.apply(source.load(1), decided, threads), decided.batch_size)


def plain_script(predictor: Predictor, paths: list[Path]) -> float:
    """Images per second of read, decode, prepare, network, post-processing and encoding, one after the other."""
    began = time.perf_counter()
    for path in paths:
        _worked(predictor, path)
    return len(paths) / (time.perf_counter() - began)


def _worked(predictor: Predictor, path: Path) -> None:
    prepared, orientation = _prepared(predictor, path)
    found = predictor.finish(predictor.forward([prepared])[0])
    if found.semantic is not None:
        runlength.encode(photo.stored(found.semantic, orientation))


def _prepared(predictor: Predictor, path: Path) -> tuple[Prepared, int]:
    rgb, info = photo.decode(path.read_bytes(), str(path))
    return predictor.prepare(photo.upright(rgb, info.exif_orientation)), info.exif_orientation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--min-agreement", type=float, default=0.99, help="0 for a model of random weights")
    arguments = parser.parse_args()
    wanted = ExecutionConfig(min_agreement=arguments.min_agreement)
    threads = os.cpu_count() or 1
    originals = sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in (".jpg", ".png", ".bmp"))
    with tempfile.TemporaryDirectory() as scratch:
        paths = []
        for number, source in zip(range(arguments.images), itertools.cycle(originals), strict=False):
            paths.append(Path(scratch) / f"{number:05d}{source.suffix}")
            paths[-1].write_bytes(source.read_bytes())
        source = registry.source(arguments.model)
        fast = fastest(source, paths, threads, wanted)
        ratios = []
        for _ in range(arguments.rounds):
            alone = network_alone(fast, paths, threads)
            bare = bare_loop(fast, paths, threads)
            script = plain_script(Predictor(source.load(threads), 1), paths)
            ours, start = through_segbatch(Path(scratch), source, threads, 0, wanted)
            ratios.append((ours / alone, ours / bare, ours / script))
            print(f"network alone {alone:.2f}, bare loop {bare:.2f}, plain script {script:.2f}, ", end="")
            print(f"segbatch {ours:.2f} images/s: {' '.join(f'{r:.3f}' for r in ratios[-1])} (start {start:.1f} s)")
    medians = " ".join(f"{statistics.median(r):.3f}" for r in zip(*ratios, strict=True))
    print(f"{arguments.images} photos, {threads} threads: median ratios {medians}")


if __name__ == "__main__":
    main()
