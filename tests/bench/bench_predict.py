"""End to end against the model's own loop: how much of a real model's speed segbatch gives away.

Two loops to hold it against, both in this process with the same threads: the network alone, on inputs that lie
prepared in memory (no reading, decoding, encoding or writing; on a CPU nothing can reach that, because the rest takes
CPU time as well), and a plain script that does the same work photo by photo and throws the result away. Ray's start
and the model's load are excluded everywhere.

    python tests/bench/bench_predict.py MODEL FOLDER [--images 300] [--rounds 3]
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench_engine import through_segbatch

from segbatch.codecs import photo, runlength
from segbatch.inference.pipeline import Predictor, Prepared, auto_batch_size
from segbatch.models import registry


def network_alone(predictor: Predictor, paths: list[Path]) -> float:
    """Images per second of the network, in batches as segbatch makes them."""
    prepared = [_prepared(predictor, path)[0] for path in paths]
    predictor.forward(prepared[: predictor.batch_size])
    began = time.perf_counter()
    for start in range(0, len(prepared), predictor.batch_size):
        predictor.forward(prepared[start : start + predictor.batch_size])
    return len(prepared) / (time.perf_counter() - began)


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
        segmenter = registry.source(arguments.model).load(threads)
        predictor = Predictor(segmenter, auto_batch_size(segmenter.spec))
        plain_script(predictor, paths[:8])
        ratios = []
        for _ in range(arguments.rounds):
            alone, script = network_alone(predictor, paths), plain_script(predictor, paths)
            ours, start = through_segbatch(Path(scratch), registry.source(arguments.model), threads, 0)
            ratios.append((ours / alone, ours / script))
            print(f"network alone {alone:6.2f}   plain script {script:6.2f}   segbatch {ours:6.2f} images/s", end="   ")
            print(f"{ours / alone:.3f}   {ours / script:.3f}   (start {start:.1f} s)")
    medians = [statistics.median(r) for r in zip(*ratios, strict=True)]
    print(f"{arguments.images} photos, {threads} threads: median ratios {medians[0]:.3f} and {medians[1]:.3f}")


if __name__ == "__main__":
    main()
