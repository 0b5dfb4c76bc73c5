"""Speed of the instance codecs against pycocotools: ``python tests/bench/bench_polygon.py [--coco FILE]``.

Without the annotations of real COCO images, drawn stars stand in. Both sides take turns, round by round, and get the
same arrays; a figure is the median over the rounds. Machines differ: the ratios are what to trust. How far two threads
can get on this machine at this moment is measured beside, with hashes that need no GIL.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coco
from numpy.typing import NDArray

from segbatch.codecs import polygon, rle

ROUNDS = 15
REPEATS = 8
"""How often a round draws all masks."""

Polygons = list[NDArray[np.float64]]


class Image(NamedTuple):
    """The polygons of every mask of one image."""

    masks: list[Polygons]
    height: int
    width: int


def from_coco(file: Path) -> list[Image]:
    """All images of an annotation file, crowds left out."""
    content = json.loads(file.read_text())
    masks: dict[int, list[Polygons]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            masks[annotation["image_id"]].append([np.array(p, np.float64) for p in annotation["segmentation"]])
    return [Image(masks[i["id"]], i["height"], i["width"]) for i in content["images"] if masks[i["id"]]]


def drawn_stars(images: int, masks: int) -> list[Image]:
    """Stars of about 20 points, each a mask of its own."""
    rng = np.random.default_rng(0)

    def star() -> NDArray[np.float64]:
        angle = np.sort(rng.random(rng.integers(8, 32))) * 2 * np.pi
        radius = rng.integers(10, 150) * (0.5 + rng.random(angle.size))
        x, y = rng.random(2) * (640, 480)
        return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1).round(2).ravel()

    return [Image([[star()] for _ in range(masks)], 480, 640) for _ in range(images)]


def theirs(images: list[Image]) -> list[bytes]:
    """pycocotools, mask by mask: its functions take the polygons of one mask."""
    return [coco.merge(coco.frPyObjects(m, i.height, i.width))["counts"] for i in images for m in i.masks]


def one_by_one(images: list[Image]) -> list[bytes]:
    """segbatch, mask by mask."""
    return [polygon.rasterize(m, i.height, i.width) for i in images for m in i.masks]


def image_by_image(images: list[Image]) -> list[bytes]:
    """segbatch, all masks of an image at once."""
    return [counts for i in images for counts in polygon.rasterize_all(*i)]


def hashes(_: list[Image]) -> None:
    """Work that never holds the GIL."""
    hashlib.sha256(bytes(4_000_000))


def seconds(work: Callable[[list[Image]], object], images: list[Image], threads: int) -> float:
    """Time in which every thread does all the work."""

    def repeated(_: int) -> None:
        for _ in range(REPEATS):
            work(images)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))
        start = time.perf_counter()
        list(pool.map(repeated, range(threads)))
        return time.perf_counter() - start


def in_turns(works: list[Callable[[list[Image]], object]], images: list[Image], threads: int) -> list[list[float]]:
    """The seconds of each, round by round."""
    rounds = [[seconds(work, images, threads) for work in works] for _ in range(ROUNDS)]
    return [list(column) for column in zip(*rounds, strict=True)]


def compare_drawing(images: list[Image]) -> None:
    """Print masks per second, with one thread and with two."""
    assert one_by_one(images) == image_by_image(images) == theirs(images)
    works = [theirs, one_by_one, image_by_image, hashes]
    masks = REPEATS * sum(len(m) for i in images for m in i.masks)
    single, double = in_turns(works, images, 1), in_turns(works, images, 2)
    names = ["pycocotools", "rasterize", "rasterize_all", "hashes (no GIL)"]
    print(f"{'masks/s':<18}{'1 thread':>12}{'ratio':>8}{'2 threads':>12}{'ratio':>8}{'2 : 1 threads':>15}")
    for name, one, two in zip(names, single, double, strict=True):
        gain = statistics.median(2 * a / b for a, b in zip(one, two, strict=True))
        cells = ""
        for threads, times, base in ((1, one, single[0]), (2, two, double[0])):
            ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
            speed = threads * masks / statistics.median(times)
            cells += f"{'':>20}" if name.startswith("hashes") else f"{speed:>12,.0f}{ratio:>7.2f}x"
        print(f"{name:<18}{cells}{gain:>14.2f}x")


def compare_outlines(images: list[Image]) -> None:
    """Print how many masks their outer outlines give back exactly, and how many have holes."""
    exact = holes = total = 0
    start = time.perf_counter()
    for image in images:
        size = (image.height, image.width)
        for counts in polygon.rasterize_all(*image):
            found = polygon.contours(rle.decode(counts, *size))
            exact += polygon.rasterize(found.outers, *size) == counts
            holes += bool(found.holes)
            total += 1
    spent = 1e3 * (time.perf_counter() - start) / total
    print(
        f"outlines: {exact} of {total} masks come back exactly, {holes} have holes; {spent:.2f} ms a mask, all in all"
    )


def id_map(height: int, width: int, ids: int, dtype: Any) -> NDArray[Any]:
    """Ellipses of ``ids`` ids on a background of 0, all of them visible."""
    import cv2

    rng = np.random.default_rng(0)
    drawn = np.zeros((height, width), np.int32)
    for i in range(ids, 0, -1):  # large ones first
        center, axes = rng.integers(0, (width, height)), 4 + rng.integers(i, 3 * i, 2)
        cv2.ellipse(drawn, center.tolist(), axes.tolist(), float(rng.integers(180)), 0, 360, i, -1)
    return drawn.astype(dtype)


def mask_by_mask(ids: NDArray[Any]) -> tuple[list[bytes], list[int], list[list[float]]]:
    """The usual way: NumPy finds the ids, pycocotools encodes one mask after the other."""
    present = np.unique(ids)
    masks = [coco.encode(np.asfortranarray(ids == i).view(np.uint8)) for i in present]
    return [m["counts"] for m in masks], coco.area(masks).tolist(), coco.toBbox(masks).tolist()


def compare_maps() -> None:
    """Print the time for all instances of a large map."""
    print(f"{'2048x1024 map':<18}{'ids':>6}{'numpy + pycocotools':>22}{'instances_of':>14}{'ratio':>8}{'paint':>10}")
    for dtype in (np.uint8, np.uint16, np.uint32):
        ids = id_map(1024, 2048, 100, dtype)
        found = rle.instances_of(ids)
        assert mask_by_mask(ids) == (found.counts, found.areas.tolist(), found.boxes_xywh.tolist())
        assert np.array_equal(rle.paint(found.counts, found.ids, 1024, 2048, dtype), ids)
        usual, ours, painting = [], [], []
        for _ in range(5):
            start = time.perf_counter()
            mask_by_mask(ids)
            between = time.perf_counter()
            rle.instances_of(ids)
            end = time.perf_counter()
            rle.paint(found.counts, found.ids, 1024, 2048, dtype)
            usual.append(between - start)
            ours.append(end - between)
            painting.append(time.perf_counter() - end)
        ratio = statistics.median(a / b for a, b in zip(usual, ours, strict=True))
        slow, fast, back = (1e3 * statistics.median(t) for t in (usual, ours, painting))
        name = np.dtype(dtype).name
        print(f"{name:<18}{len(found.ids):>6}{slow:>19,.0f} ms{fast:>11.2f} ms{ratio:>7.0f}x{back:>7.2f} ms")


def main() -> None:
    """Print all figures."""
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("SEGBATCH_TEST_DATA") or root.parent / "shared")
    file = data / "data" / "coco_tiny" / "annotations" / "instances_train2017.json"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coco", type=Path, default=file, metavar="FILE")
    arguments = parser.parse_args()
    real = arguments.coco.exists()
    images = from_coco(arguments.coco) if real else drawn_stars(50, 10)
    for some, kind in ((images, "real" if real else "drawn"), (drawn_stars(1, 500), "drawn")):
        masks = sum(len(i.masks) for i in some)
        print(f"{masks} masks in {len(some)} image(s), {kind}")
        compare_drawing(some)
    compare_outlines(images)
    compare_maps()


if __name__ == "__main__":
    main()
