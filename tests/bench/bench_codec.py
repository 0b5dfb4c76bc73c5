"""Speed of the run-length codec against plain NumPy: ``python tests/bench/bench_codec.py [--camvid DIR]``.

Without real CamVid label maps, synthetic ones stand in. One thread; the API functions themselves, allocations included;
the best of several rounds. Machines differ: the ratios are what to trust.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import runlength
from segbatch.codecs.runlength import Runs

Map = NDArray[np.uint8]
ROUNDS = 9


def numpy_encode(label_map: Map) -> Runs:
    """The usual way: where neighbours differ."""
    flat = label_map.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)
    return Runs(flat[ends].astype(np.uint16), np.diff(ends, prepend=-1).astype(np.uint32))


def numpy_decode(runs: Runs, shape: tuple[int, ...]) -> Map:
    """The usual way back."""
    return np.repeat(runs.values.astype(np.uint8), runs.lengths).reshape(shape)


def numpy_joint(maps: tuple[Map, Map], classes: int) -> NDArray[np.intp]:
    """The usual confusion matrix, from pixels."""
    truth, predicted = maps
    return np.bincount(truth.ravel().astype(np.int64) * classes + predicted.ravel(), minlength=classes**2)


def street(height: int, width: int, seed: int) -> Map:
    """A map like a street scene: sky, buildings, road, and some boxes."""
    rng = np.random.default_rng(seed)
    skyline = height // 3 + np.cumsum(rng.integers(-2, 3, width))
    curb = 2 * height // 3 + np.cumsum(rng.integers(-1, 2, width))
    row = np.arange(height)[:, None]
    scene = np.where(row < skyline, 10, np.where(row < curb, 2, 0)).astype(np.uint8)
    for _ in range(60):
        y, x = rng.integers(0, height), rng.integers(0, width)
        scene[y : y + rng.integers(5, height // 4), x : x + rng.integers(2, width // 8)] = rng.integers(0, 19)
    return scene


def camvid(folder: Path) -> list[Map]:
    """All label maps of ``folder``; none where it is not there."""
    import cv2

    found = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted(folder.glob("*.png"))]
    return [m.astype(np.uint8, copy=False) for m in found if m is not None and m.dtype == np.uint8]


def inputs(folder: Path) -> dict[str, list[Map]]:
    """Every kind of map to measure."""
    rng = np.random.default_rng(0)
    scenes = [street(1024, 2048, seed) for seed in range(4)]
    salted = [np.where(rng.random(s.shape) < 0.1, rng.integers(0, 19, s.shape), s).astype(np.uint8) for s in scenes]
    noise = [rng.integers(0, 256, (1024, 2048), dtype=np.uint8) for _ in range(2)]
    small = camvid(folder)
    name = f"CamVid ({len(small)} maps)" if small else "synthetic 480x360"
    small = small or [street(360, 480, seed) for seed in range(40)]
    return {name: small, "street 2048x1024": scenes, "10 % salt": salted, "noise": noise}


def megapixels_per_second(work: Callable[[Any], object], items: Sequence[Any], pixels: int) -> float:
    """Best of several rounds over all items."""
    work(items[0])
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for item in items:
            work(item)
        best = min(best, time.perf_counter() - start)
    return pixels / best / 1e6


def measure(maps: list[Map]) -> list[tuple[str, float, float]]:
    """(what, ours, NumPy's) in Mpx/s, after checking that both agree."""
    pixels, shape = sum(m.size for m in maps), maps[0].shape
    classes = 1 + max(int(m.max()) for m in maps)
    runs = [runlength.encode(m) for m in maps]
    pairs = [(m, np.roll(m, 3, axis=1)) for m in maps]
    run_pairs = [(runlength.encode(a), runlength.encode(b)) for a, b in pairs]
    for label_map, encoded in zip(maps, runs, strict=True):
        baseline = numpy_encode(label_map)
        assert np.array_equal(encoded.values, baseline.values)
        assert np.array_equal(encoded.lengths, baseline.lengths)
        assert np.array_equal(runlength.decode(encoded, shape, np.uint8), label_map)
    table = numpy_joint(pairs[0], classes)
    assert np.array_equal(runlength.joint_counts(*run_pairs[0])[2], table[table > 0])

    def speed(work: Callable[[Any], object], items: Sequence[Any]) -> float:
        return megapixels_per_second(work, items, pixels)

    return [
        ("encode", speed(runlength.encode, maps), speed(numpy_encode, maps)),
        (
            "decode",
            speed(lambda r: runlength.decode(r, shape, np.uint8), runs),
            speed(lambda r: numpy_decode(r, shape), runs),
        ),
        (
            "joint_counts",
            speed(lambda p: runlength.joint_counts(*p), run_pairs),
            speed(lambda p: numpy_joint(p, classes), pairs),
        ),
    ]


def main() -> None:
    """Print the table."""
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("SEGBATCH_TEST_DATA") or root.parent / "shared")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", type=Path, default=data / "data" / "camvid" / "valannot", metavar="DIR")
    arguments = parser.parse_args()
    print(f"{'Mpixel/s, one thread':<22}{'':<14}{'segbatch':>9}{'numpy':>9}{'ratio':>8}{'px/run':>9}")
    for name, maps in inputs(arguments.camvid).items():
        density = sum(m.size for m in maps) / sum(len(runlength.encode(m).values) for m in maps)
        for what, ours, theirs in measure(maps):
            print(f"{name:<22}{what:<14}{ours:>9,.0f}{theirs:>9,.0f}{ours / theirs:>7.1f}x{density:>9.1f}")


if __name__ == "__main__":
    main()
