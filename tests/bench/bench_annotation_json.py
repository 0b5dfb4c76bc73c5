"""What planning from COCO's annotation file costs: time and memory of the splitter, against ``json.load``.

The file is synthetic and as large as instances_train2017.json: its polygons are drawn once and used again and again,
which no parser can tell. Writer and readers run in processes of their own; memory is counted over what the interpreter
and the imports take. The file is deleted afterwards.

    python tests/bench/bench_annotation_json.py [--images 100000] [--annotations 900000] [--no-json]
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import numpy as np

from segbatch.datasets import annotation_json

POLYGONS = 20_000
JSON_FACTOR = 12  # free memory that json.load is given, in sizes of the file

Result = TypeVar("Result")


class Cost(NamedTuple):
    """Seconds by step, and the peak over the interpreter in bytes."""

    steps: dict[str, float]
    peak: int


def polygon(rng: np.random.Generator) -> str:
    """An outline of 4 to 60 corners around a centre, with two decimals as in COCO, and its box and area."""
    corners = int(np.clip(rng.gamma(2.0, 10.0), 4, 60))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(20, 90) * rng.uniform(0.7, 1.3, corners)
    x, y = 320 + radii * np.cos(angles), 240 + radii * np.sin(angles)
    numbers = np.round(np.stack([x, y], 1).ravel(), 2).tolist()
    box = np.round([x.min(), y.min(), np.ptp(x), np.ptp(y)], 2).tolist()
    area = round(float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2), 4)
    return f'"segmentation": [{json.dumps(numbers)}], "area": {area}, "iscrowd": 0, "bbox": {json.dumps(box)}'


def image(number: int) -> str:
    """One entry of ``images``, with COCO's fields."""
    record = {
        "license": number % 8 + 1,
        "file_name": f"{number:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
        "height": 480,
        "width": 640,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": f"http://farm9.staticflickr.com/8186/{number:010d}_4e622c8349_z.jpg",
        "id": number,
    }
    return json.dumps(record)


def write_file(path: Path, images: int, annotations: int) -> None:
    """An instances file whose annotations stand in no order of images, as in COCO."""
    rng = np.random.default_rng(0)
    shapes = [polygon(rng) for _ in range(POLYGONS)]
    owners, chosen = rng.integers(1, images + 1, annotations), rng.integers(0, POLYGONS, annotations)
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "categories": [{"id": 1, "name": "person"}], "images": [')
        file.write(", ".join(image(number) for number in range(1, images + 1)))
        file.write('], "annotations": [')
        for number, (owner, shape) in enumerate(zip(owners.tolist(), chosen.tolist(), strict=True)):
            write_annotation(file, number, owner, shapes[shape])
        file.write("]}")


def write_annotation(file: TextIO, number: int, owner: int, shape: str) -> None:
    """One entry of ``annotations``."""
    separator = ", " if number else ""
    file.write(f'{separator}{{{shape}, "image_id": {owner}, "category_id": 1, "id": {number + 900_000}}}')


def cost_of_split(path: Path) -> Cost:
    """Read, split, and take every image's text and digest, as a plan does."""
    before = peak()
    began = time.perf_counter()
    data = path.read_bytes()
    read = time.perf_counter()
    document = annotation_json.split_coco(data, str(path))
    split = time.perf_counter()
    peak_of_split = peak()
    characters = 0
    for _, raws in document.items():
        characters += len(annotation_json.annotations_text(raws)) + len(annotation_json.digest(raws))
    done = time.perf_counter()
    assert characters > len(data) // 2
    print(f"  after the split alone, the peak is {(peak_of_split - before) / 1e6:,.0f} MB")
    return Cost({"read": read - began, "split": split - read, "texts and digests": done - split}, peak() - before)


def cost_of_json(path: Path) -> Cost:
    """``json.load`` alone."""
    before = peak()
    began = time.perf_counter()
    with path.open("rb") as file:
        json.load(file)
    return Cost({"json.load": time.perf_counter() - began}, peak() - before)


def peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """Work in a fresh process; this one stays small, because a child's peak starts at its parent's size."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def show(name: str, cost: Cost, size: int) -> None:
    """One line."""
    steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in cost.steps.items())
    print(f"{name}: {steps}; peak {cost.peak / 1e6:,.0f} MB, {cost.peak / size:.2f} times the file")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--annotations", type=int, default=900_000)
    parser.add_argument("--no-json", action="store_true", help="leave out json.load, which takes much memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "instances.json"
        alone(write_file, path, arguments.images, arguments.annotations)
        size = path.stat().st_size
        print(f"{arguments.images:,} images, {arguments.annotations:,} annotations, {size / 1e6:,.0f} MB")
        show("segbatch", alone(cost_of_split, path), size)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if not arguments.no_json and free > JSON_FACTOR * size:
            show("json.load", alone(cost_of_json, path), size)
        else:
            print(f"json.load: left out ({free / 1e6:,.0f} MB of memory are free)")


if __name__ == "__main__":
    main()
