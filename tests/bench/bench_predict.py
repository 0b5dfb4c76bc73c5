"""End to end against the model's own loop: how much of a real model's speed segbatch gives away.

The model's own loop holds every prepared input in memory and calls the network on one after the other: no reading, no
decoding, no encoding, no writing. Ray's start and the model's load are excluded on both sides.

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

from segbatch.codecs import photo
from segbatch.inference.pipeline import Predictor, auto_batch_size
from segbatch.models import registry


def own_loop(reference: str, paths: list[Path], threads: int) -> float:
    """Images per second of the network alone, in batches as segbatch makes them."""
    segmenter = registry.source(reference).load(threads)
    size = auto_batch_size(segmenter.spec, threads)
    predictor = Predictor(segmenter, size)
    prepared = []
    for path in paths:
        rgb, info = photo.decode(path.read_bytes(), str(path))
        prepared.append(predictor.prepare(photo.upright(rgb, info.exif_orientation)))
    predictor.forward(prepared[:size])
    began = time.perf_counter()
    for start in range(0, len(prepared), size):
        predictor.forward(prepared[start : start + size])
    return len(prepared) / (time.perf_counter() - began)


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
        ratios = []
        for _ in range(arguments.rounds):
            alone = own_loop(arguments.model, paths, threads)
            ours, start = through_segbatch(Path(scratch), registry.source(arguments.model), threads, 0)
            ratios.append(ours / alone)
            speeds = f"model's own loop {alone:7.2f} images/s   segbatch {ours:7.2f} images/s"
            print(f"{speeds}   {ours / alone:.3f}   (start {start:.1f} s)")
    print(f"{arguments.images} photos, {threads} threads: median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
