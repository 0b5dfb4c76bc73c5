"""What it costs to ingest a dataset as large as COCO's train2017: seconds of planning, of everything, and memory.

The annotation file is that of ``bench_annotation_json``: 100,000 images, 900,000 polygons, 435 MB. The photos are grey
JPEGs of 640 x 480 and 1 kB, stored in one zip archive, so that what is measured is segbatch and not the disk. Planning
and the whole ingest (in one process, without Ray) each run in a fresh process; their memory is all that they take.
Everything is deleted afterwards.

    python tests/bench/bench_coco_ingest.py [--images 100000] [--annotations 900000]
"""

import argparse
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
from bench_annotation_json import alone, peak, write_file

import segbatch
from segbatch import planning
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.datasets import registry

LIMIT = 4e9
"""What the whole must stay below, in bytes."""


def write_photos(path: Path, images: int) -> None:
    """``train2017.zip``: the same photo under every name."""
    grey = np.full((480, 640), 128, np.uint8)
    options = [cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    data = cv2.imencode(".jpg", grey, options)[1].tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(1, images + 1):
            archive.writestr(f"train2017/{number:012d}.jpg", data)


def plan(source: str, root: str) -> tuple[float, int, int]:
    """Seconds, peak in bytes and items of a plan that is written and published."""
    began = time.perf_counter()
    found, tree = registry.find("coco-instances", source)
    found.classes(tree)
    info = planning.publish(root, "samples", lambda: found.items(tree, ()), PlanConfig())
    assert info is not None
    return time.perf_counter() - began, peak(), info.rows


def ingest(source: str, root: str) -> tuple[float, int, int, int]:
    """Seconds, peak in bytes, rows and bad rows of ``segbatch ingest coco-instances --engine inline``."""
    began = time.perf_counter()
    result = segbatch.ingest("coco-instances", source, root, options=RunOptions(engine=EngineConfig(kind="inline")))
    return time.perf_counter() - began, peak(), result.rows, result.state.bad


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--annotations", type=int, default=900_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "coco"
        (source / "annotations").mkdir(parents=True)
        document = source / "annotations" / "instances_train2017.json"
        alone(write_file, document, arguments.images, arguments.annotations)
        alone(write_photos, source / "train2017.zip", arguments.images)
        size = document.stat().st_size
        print(f"{arguments.images:,} images, {arguments.annotations:,} annotations, {size / 1e6:,.0f} MB", flush=True)
        seconds, most, rows = alone(plan, str(source), f"{scratch}/plan")
        print(f"plan: {seconds:.1f} s, {rows:,} items, peak {most / 1e6:,.0f} MB", flush=True)
        seconds, most, rows, bad = alone(ingest, str(source), f"{scratch}/out")
        print(f"ingest: {seconds:.1f} s, {rows / seconds:,.0f} images/s, {bad} bad rows, peak {most / 1e6:,.0f} MB")
    return int(most > LIMIT or bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
