"""BDD100K's evaluators against the official rules: ``python tests/bench/bench_bdd100k.py [--lanes FOLDER]``.

Images of 720 x 1280: lane masks of a folder with ``gts`` and ``res`` (else drawn lines), drawn objects for the others.
The toolkit cannot be installed beside segbatch's NumPy, so its time is that of what it does per image, written down
here with the same array operations: eval/seg.py, eval/lane.py (scikit-image's dilation is SciPy's), eval/pan_seg.py and
eval/ins_seg.py with common/bitmask.py, PNG files decoded already, one process. Both sides get the same pixels; the
figures must be those of the official rules, of the first image where these are slow. Times are CPU seconds in one
thread from rows (or pixels) in memory to all figures; machines differ: the ratios are what to trust.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bdd100k_cases as cases
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from segbatch.datasets import tables
from segbatch.metrics import registry
from segbatch.metrics.base import Row

SIZE = (720, 1280)
MOST = 100
ROUNDS = 3
Figures = dict[tuple[str, str], float | None]


def seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    """CPU seconds of the best of some rounds, and the result."""
    best, result = float("inf"), None
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def ours(protocol: str, rows: Sequence[tuple[Row, Row]]) -> tuple[float, Figures]:
    """Update, merge, compute; rows in one batch, as they are read."""
    metric = registry.make(protocol, tables.load(protocol))
    batches = [pa.concat_batches([pair[side].batch for pair in rows]) for side in (0, 1)]
    pairs = [(Row(batches[0], i), Row(batches[1], i)) for i in range(len(rows))]
    metric.update(*pairs[0])  # loops are compiled, or read from the disk
    spent, figures = seconds(lambda: metric.compute(metric.merge([metric.update(*p) for p in pairs])))
    return spent, {(f.metric, f.class_name): f.value for f in figures}


def said(protocol: str, images: int, theirs: float, spent: float) -> None:
    """One line."""
    each = 1000 * theirs / images, 1000 * spent / images
    print(f"{protocol}: official rule {each[0]:.1f} ms an image, segbatch {each[1]:.2f} ms: {theirs / spent:.0f} x")


def agree(protocol: str, official: Figures, figures: Figures) -> None:
    """Raise where figures differ."""
    wrong = [key for key, value in official.items() if figures[key] != value]
    if wrong:
        raise AssertionError(f"{protocol}: {wrong[0]} is {figures[wrong[0]]}, not {official[wrong[0]]}")


# -- label maps --------------------------------------------------------------------------------------------------------


def scene(rng: np.random.Generator, objects: int) -> NDArray[np.int64]:
    """A map of ids 1 to ``objects``: bands like road and sky, and ellipses on them."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    ids = 1 + (y + 40 * np.sin(x / 150)).astype(np.int64) // 150
    for number in range(7, objects + 1):
        row, column, high, wide = (
            rng.integers(SIZE[0]),
            rng.integers(SIZE[1]),
            rng.integers(8, 80),
            rng.integers(8, 120),
        )
        ids[((y - row) / high) ** 2 + ((x - column) / wide) ** 2 <= 1] = number
    return np.clip(ids, 1, objects)


def fast_hist(truth: cases.Map, predicted: cases.Map, n: int) -> NDArray[np.int64]:
    """per_image_hist and fast_hist."""
    truth = truth.copy()
    truth[truth == 255] = n - 1
    np.unique(truth)
    truth, predicted = truth.flatten(), predicted.flatten()
    predicted[predicted >= n] = n - 1
    k = np.logical_and(np.greater_equal(truth, 0), np.less(truth, n - 1))
    return np.bincount(n * truth[k].astype(int) + predicted[k], minlength=n**2).reshape(n, n)


def semantic(images: int) -> None:
    """Label maps of 19 classes."""
    rng = np.random.default_rng(0)
    maps = [(scene(rng, 40) % 20).astype(np.uint8) for _ in range(images)]
    pairs = [(np.where(m == 19, 255, m).astype(np.uint8), np.roll(m, (2, 3), (0, 1))) for m in maps]
    rows = [
        (cases.semantic_row("samples", f"{i:03d}", t), cases.semantic_row("masks", f"{i:03d}", p))
        for i, (t, p) in enumerate(pairs)
    ]
    theirs, joint = seconds(lambda: sum(fast_hist(t, p, 20) for t, p in pairs))
    spent, figures = ours("bdd100k-sem", rows)
    hits = np.diag(joint)[:19]
    iou = hits / (joint.sum(1)[:19] + joint.sum(0)[:19] - hits)
    agree("bdd100k-sem", {("miou", ""): np.mean(iou)}, figures)
    said("bdd100k-sem", images, theirs, spent)


# -- lanes -------------------------------------------------------------------------------------------------------------


def drawn_lanes(rng: np.random.Generator) -> cases.Map:
    """Six slanted lines, 3 pixels wide."""
    found = np.full(SIZE, 255, np.uint8)
    for _ in range(6):
        start, slope, kind = rng.integers(SIZE[1]), rng.normal(), rng.integers(0, 8) + 16 * rng.integers(0, 4)
        for y in range(300, SIZE[0]):
            x = int(start + slope * (y - 300))
            found[y, max(x, 0) : max(x + 3, 0)] = kind
    return found


def lanes(folder: Path | None) -> None:
    """Lane masks."""
    rng = np.random.default_rng(1)
    if folder:
        names = sorted(p.name for p in (folder / "gts").iterdir())
        pairs = [tuple(np.array(Image.open(folder / side / n)) for side in ("gts", "res")) for n in names]
    else:
        maps = [drawn_lanes(rng) for _ in range(4)]
        pairs = [(m, np.roll(m, 1, 1)) for m in maps]
    rows = [
        (cases.lane_row("samples", f"{i:03d}", t), cases.lane_row("masks", f"{i:03d}", p))
        for i, (t, p) in enumerate(pairs)
    ]
    categories = [c.name for c in tables.load("bdd100k-lane").scored]
    theirs, official = seconds(lambda: cases.official_lanes(pairs, categories), 1)
    spent, figures = ours("bdd100k-lane", rows)
    agree("bdd100k-lane", {key: (value or 0.0) / 100 for key, value in official.items()}, figures)
    said("bdd100k-lane", len(pairs), theirs, spent)


# -- bitmasks ----------------------------------------------------------------------------------------------------------


def parse_bitmask(bitmask: cases.Rgba) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """parse_bitmask: masks, attributes, categories."""
    pixels = bitmask.astype(np.int32)
    instances = (pixels[:, :, 2] << 8) + pixels[:, :, 3]
    ids = np.sort(np.unique(instances[instances >= 1]))
    masks = np.zeros(pixels.shape[:2], np.int32)
    attributes, categories = np.zeros((2, len(ids)), np.int32)
    for i, number in enumerate(ids):
        inside = instances == number
        masks[inside] = i + 1
        attributes[i], categories[i] = np.unique(pixels[:, :, 1][inside])[0], np.unique(pixels[:, :, 0][inside])[0]
    return masks, attributes, categories


def intersection_rate(one: NDArray[np.int32], other: NDArray[np.int32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """bitmask_intersection_rate."""
    m, n = int(np.max(one)), min(int(np.max(other)), MOST)
    bins = (1 + m) * (1 + n)
    joint = np.histogram(one.reshape(-1) * (1 + n) + other.reshape(-1), bins=bins, range=(0, bins))[0]
    joint = joint.reshape(1 + m, 1 + n)
    areas, other_areas = joint.sum(axis=1, keepdims=True)[1:], joint.sum(axis=0, keepdims=True)[:, 1:]
    shared = joint[1:, 1:]
    return shared / (areas + other_areas - shared), shared / other_areas


def pq_per_image(truth: cases.Rgba, predicted: cases.Rgba) -> Any:
    """What takes its time in pq_per_image."""
    masks, _, categories = parse_bitmask(truth)
    other, _, other_categories = parse_bitmask(predicted)
    ious, covers = intersection_rate(masks, other)
    ious *= categories.reshape(-1, 1) == other_categories.reshape(1, -1)
    return ious.max(axis=1), ious.argmax(axis=1), 1 - covers.sum(axis=0)


def bitmask(ids: NDArray[np.int64], categories: NDArray[np.int64]) -> cases.Rgba:
    """RGBA of a map of ids; ``categories`` by id."""
    return np.stack([categories[ids], np.zeros_like(ids), ids >> 8, ids & 255], 2).astype(np.uint8)


def panoptic(images: int) -> None:
    """30 segments an image, moved by some pixels."""
    rng = np.random.default_rng(2)
    categories = np.concatenate([[0], rng.integers(1, 41, 30)])
    pairs = [
        (bitmask(ids, categories), bitmask(np.roll(ids, 4, 1), categories))
        for ids in (scene(rng, 30) for _ in range(images))
    ]
    rows = [cases.panoptic_rows(f"{i:03d}", *pair) for i, pair in enumerate(pairs)]
    theirs, _ = seconds(lambda: [pq_per_image(*pair) for pair in pairs])
    spent, _ = ours("bdd100k-pan", rows)
    classes = {c.label_id: (c.name, c.isthing) for c in tables.load("bdd100k-pan").scored}
    official = cases.official_panoptic(pairs[:1], classes)
    _, figures = ours("bdd100k-pan", rows[:1])
    agree("bdd100k-pan", {key: v if v is None else v / 100 for key, v in official.items()}, figures)
    said("bdd100k-pan", images, theirs, spent)


def iou_of_image(truth: cases.Rgba, predicted: cases.Rgba, scores: cases.Scores) -> NDArray[Any]:
    """compute_iou: parse_bitmask, parse_res_bitmask, get_mask_areas, IoUs."""
    masks, _, _ = parse_bitmask(truth)
    pixels = predicted.astype(np.int32)
    numbers, found = (pixels[:, :, 2] << 8) + pixels[:, :, 3], np.zeros(pixels.shape[:2], np.int32)
    for place, (number, _) in enumerate(sorted(scores, key=lambda pair: pair[1], reverse=True), 1):
        inside = numbers == number
        np.count_nonzero(inside)
        found[inside] = place
        np.unique(pixels[:, :, 0][inside])
    for labels in (masks, found):
        for number in np.unique(labels)[1:]:
            np.count_nonzero(number == labels)
    return intersection_rate(found, masks)[0]


def instances(images: int) -> None:
    """24 objects an image, moved by some pixels; the official side is what it does before it matches."""
    rng = np.random.default_rng(3)
    categories = np.concatenate([[0], np.zeros(6, np.int64), rng.integers(1, 9, 24)])
    shift = np.concatenate([np.zeros(7, np.int64), np.arange(1, 25)])
    named = np.concatenate([[0], categories[7:]])
    maps = [shift[scene(rng, 30)] for _ in range(images)]
    items = []
    for ids in maps:
        truth, found = bitmask(ids, named), bitmask(np.roll(ids, 3, 1), named)
        items.append((truth, found, [(i, float(s)) for i, s in enumerate(rng.random(24), 1) if (ids == i).any()]))
    rows = [cases.instance_rows(f"{i:03d}", *item) for i, item in enumerate(items)]
    theirs, _ = seconds(lambda: [iou_of_image(*item) for item in items])
    spent, _ = ours("bdd100k-ins", rows)
    names = [c.name for c in tables.load("bdd100k-ins").scored]
    _, figures = ours("bdd100k-ins", rows[:1])
    agree("bdd100k-ins", cases.official_instances(items[:1], names), figures)
    said("bdd100k-ins", images, theirs, spent)


def main() -> None:
    """Parse arguments, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lanes", type=Path, help="folder with the lane masks gts/ and res/")
    parser.add_argument("--images", type=int, default=8)
    arguments = parser.parse_args()
    semantic(arguments.images)
    panoptic(arguments.images)
    instances(arguments.images)
    lanes(arguments.lanes)


if __name__ == "__main__":
    main()
