"""What ingest costs, against a bare loop that copies the same bytes and decodes the same PNG labels.

The bare loop is a thread pool with as many threads: read the photo, write a copy of it, read and decode its label map.
Ingest also checks every file's header and label ids, encodes runs, and commits Parquet files with fsync. Both begin
when the files are listed; ingest in this process (``--engine inline``), without its start.

    python tests/bench/bench_ingest.py [--camvid FOLDER] [--photos 2000] [--rounds 3]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import segbatch
from segbatch.config import EngineConfig, RunOptions

THREADS = len(os.sched_getaffinity(0))
Pairs = list[tuple[Path, Path | None]]


def photos(folder: Path, count: int) -> Pairs:
    """JPEGs of 640 x 480 with the size of COCO's, about 160 kB."""
    folder.mkdir(parents=True)
    made = []
    for i in range(min(count, 50)):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(smooth.astype(int) + rng.normal(0, 18, smooth.shape), 0, 255).astype(np.uint8)
        made.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes())
    for i in range(count):
        (folder / f"{i:012d}.jpg").write_bytes(made[i % len(made)])
    return [(p, None) for p in sorted(folder.iterdir())]


def bare(pairs: Pairs, out: Path) -> float:
    """Photos per second of the bare loop."""
    out.mkdir()

    def one(pair: tuple[Path, Path | None]) -> int:
        photo, label = pair
        (out / photo.name).write_bytes(photo.read_bytes())
        return int(np.array(Image.open(label)).max()) if label else 0

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, pairs))
    rate = len(pairs) / (time.perf_counter() - began)
    shutil.rmtree(out)
    return rate


def ours(dataset: str, source: Path, split: Iterable[str], out: Path) -> float:
    """Photos per second of ingest."""
    options = RunOptions(engine=EngineConfig(kind="inline"))
    result = segbatch.ingest(dataset, str(source), str(out), split=tuple(split), options=options)
    shutil.rmtree(out)
    return result.rows / result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = Path(os.environ.get("SEGBATCH_TEST_DATA", Path(__file__).resolve().parents[3] / "shared"))
    parser.add_argument("--camvid", type=Path, default=shared / "data" / "camvid")
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        cases: list[tuple[str, str, Path, tuple[str, ...], Pairs]] = []
        if arguments.camvid.is_dir():
            train = [(p, p.parents[1] / "trainannot" / p.name) for p in sorted((arguments.camvid / "train").iterdir())]
            cases.append(("CamVid train", "camvid", arguments.camvid, ("train",), [(a, b) for a, b in train]))
        else:
            print(f"CamVid is not at {arguments.camvid}: left out")
        drawn = photos(root / "photos", arguments.photos)
        cases.append((f"{len(drawn)} JPEGs", "images", root / "photos", (), drawn))
        for name, dataset, source, split, pairs in cases:
            ratios = []
            for i in range(arguments.rounds):
                loop = bare(pairs, root / f"bare{i}")
                mine = ours(dataset, source, split, root / f"out{i}")
                ratios.append(mine / loop)
                print(f"{name}: ingest {mine:.0f}/s, bare loop {loop:.0f}/s, ratio {mine / loop:.2f}", flush=True)
            print(f"{name}: median ratio {statistics.median(ratios):.2f} of {arguments.rounds} rounds")


if __name__ == "__main__":
    main()
