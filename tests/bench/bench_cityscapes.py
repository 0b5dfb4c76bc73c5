"""Cityscapes' evaluators against cityscapesScripts: ``python tests/bench/bench_cityscapes.py [--labels F] [--c F]``.

Images are 2048 x 1024: drawn streets, or a ``*_instanceIds.png`` that is enlarged with ragged edges. Both sides get the
same, in memory, and must say the same. Figures are CPU seconds in one thread from arrays (official) or rows to all
figures, without reading files, which takes the official code longer still. ``--c`` is the official
``addToConfusionMatrix_impl.c`` of a checkout, built with gcc -O3 and used wherever the official code would use its C
extension; without it the official confusion matrix is NumPy's. Machines differ: the ratios are what to trust.
"""

import argparse
import contextlib
import ctypes
import importlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cityscapes_cases as cases
import numpy as np
from cityscapes_cases import Found, Map, Scene
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import runlength
from segbatch.datasets import tables
from segbatch.metrics import registry
from segbatch.metrics.base import Row

SIZE = (1024, 2048)
CLASSES = tables.load("cityscapes")


def drawn(rng: np.random.Generator) -> Map:
    """A street: bands of stuff, poles, boxes of buildings, and discs for objects and groups."""
    ids = np.full(SIZE, 11, np.uint16)
    ids[:200], ids[600:] = 23, 7
    for _ in range(60):
        y, x = int(rng.integers(100, 700)), int(rng.integers(SIZE[1]))
        ids[y : y + rng.integers(20, 300), x : x + rng.integers(5, 200)] = rng.choice([8, 12, 13, 17, 19, 20, 21, 22])
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    for number in range(25):
        y, x, radius = int(rng.integers(400, 800)), int(rng.integers(SIZE[1])), int(rng.integers(8, 90))
        thing = int(rng.choice([24, 25, 26, 26, 26, 27, 33]))
        ids[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = thing if number % 9 == 0 else 1000 * thing + number
    ids[-20:] = 1
    return ids


def enlarged(file: Path) -> Map:
    """A small map of instances in full size."""
    ids = np.array(Image.open(file)).astype(np.uint16)
    rows, columns = (np.arange(n) * m // n for n, m in zip(SIZE, ids.shape, strict=True))
    return ids[rows][:, columns]


def ragged(ids: NDArray[Any], rng: np.random.Generator, most: int) -> NDArray[Any]:
    """Rows moved by a few pixels each, so that edges are no straight lines."""
    shifts = rng.integers(-most, most + 1, SIZE[0])
    columns = (np.arange(SIZE[1]) + shifts[:, None]) % SIZE[1]
    return np.take_along_axis(ids, columns, axis=1)


def scene(rng: np.random.Generator, number: int, file: Path | None) -> Scene:
    """An image, a label map that is about right, and three detections of every object."""
    ids = ragged(enlarged(file) if file else drawn(rng), rng, 1)
    made = Scene(f"ulm_{number:06d}_000019", ids, ids)
    made.predicted = np.roll(ragged(made.labels, rng, 2), 3, axis=0)
    for value in np.unique(ids[ids >= 24000]).tolist():
        for _ in range(3):
            shift = tuple(rng.integers(-12, 13, 2).tolist())
            made.found.append(Found(np.roll(ids == value, shift, (0, 1)), value // 1000, round(float(rng.random()), 3)))
    return made


def seconds(work: Callable[[], Any], rounds: int = 2) -> tuple[float, Any]:
    """CPU seconds of the best round, and the result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def confusion(scenes: Sequence[Scene], source: Path | None) -> None:
    """Print how fast joint counts are."""
    pairs = [(s.labels.astype(np.uint8), s.predicted.astype(np.uint8)) for s in scenes]
    runs = [tuple(runlength.encode(m) for m in pair) for pair in pairs]
    official = compiled(source) if source else by_numpy
    theirs, wanted = seconds(lambda: [official(*pair) for pair in pairs], 5)
    mine, found = seconds(lambda: [runlength.joint_counts(*pair) for pair in runs], 5)
    for matrix, (truth, predicted, pixels) in zip(wanted, found, strict=True):
        dense = np.zeros_like(matrix)
        dense[truth, predicted] = pixels
        if not np.array_equal(dense, matrix):
            raise AssertionError("the confusion matrices differ")
    number = sum(len(r.values) for pair in runs for r in pair) / len(runs) / 2
    name, ms = "its C loop" if source else "NumPy", [1000 * t / len(scenes) for t in (theirs, mine)]
    print(f"confusion, {number:.0f} runs a map: {name} {ms[0]:.2f} ms, runs {ms[1]:.3f} ms: {ms[0] / ms[1]:.1f} x")


def compiled(source: Path) -> Callable[..., Any]:
    """The official C function."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", "-o", folder / "c.so", source], check=True)
    function = ctypes.CDLL(str(folder / "c.so")).addToConfusionMatrix

    def counted(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.uint64]:
        matrix = np.zeros((34, 34), np.uint64)
        arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (predicted, truth, matrix)]
        function(*arrays[:2], *(ctypes.c_uint(n) for n in truth.shape[::-1]), arrays[2], ctypes.c_uint(34))
        return matrix

    return counted


@contextlib.contextmanager
def with_extension(source: Path) -> Iterator[None]:
    """The official script as it is with its C extension."""
    module = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    function, extension = compiled(source), mock.Mock()

    def add(predicted: NDArray[np.uint8], truth: NDArray[np.uint8], matrix: NDArray[np.uint64], labels: Any) -> Any:
        matrix += function(truth, predicted)
        return matrix

    extension.cEvaluatePair = add
    with mock.patch.multiple(module, create=True, CSUPPORT=True, addToConfusionMatrix=extension):
        yield


def by_numpy(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """What evaluatePair does without its C extension."""
    base = int(max(truth.max(), predicted.max())) + 1
    values, counts = np.unique(truth.astype(np.int32) * base + predicted, return_counts=True)
    matrix = np.zeros((34, 34), np.uint64)
    matrix[values // base, values % base] = counts
    return matrix


def level(name: str, protocol: str, official: Callable[[Sequence[Scene]], cases.Values], scenes: list[Scene]) -> None:
    """Print the comparison for a protocol."""
    rows = [cases.pair_of(s) for s in scenes]
    metric = registry.make(protocol, CLASSES)
    ours(metric, rows[:1])  # compile
    mine, found = seconds(lambda: ours(metric, rows))
    theirs, wanted = seconds(lambda: official(scenes), 1)
    if {k: wanted[k] for k in found} != found:
        raise AssertionError(f"{name}: the figures differ")
    ms = [1000 * t / len(scenes) for t in (theirs, mine)]
    print(f"{name}: official {ms[0]:.1f} ms an image, segbatch {ms[1]:.2f} ms: {ms[0] / ms[1]:.1f} x")


def ours(metric: Any, rows: Sequence[tuple[Row, Row]]) -> cases.Values:
    """Update, merge, compute."""
    figures = metric.compute(metric.merge([metric.update(*pair) for pair in rows]))
    return {(f.metric, f.class_name): f.value for f in figures}


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--labels", type=Path, help="an *_instanceIds.png instead of drawn streets")
    parser.add_argument("--c", type=Path, help="addToConfusionMatrix_impl.c of cityscapesScripts")
    parser.add_argument("--images", type=int, default=8)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    scenes = [scene(rng, i, arguments.labels) for i in range(arguments.images)]
    objects = sum(len(s.found) for s in scenes) // 3
    print(f"{len(scenes)} images of {SIZE[1]} x {SIZE[0]}, {objects} objects, {3 * objects} detections")
    confusion(scenes, arguments.c)
    with contextlib.ExitStack() as stack:
        if arguments.c:
            stack.enter_context(with_extension(arguments.c))
        level("pixel level", "cityscapes", cases.official_pixel_level, scenes)
    level("instance level", "cityscapes-instance", cases.official_instance_level, scenes)


if __name__ == "__main__":
    main()
