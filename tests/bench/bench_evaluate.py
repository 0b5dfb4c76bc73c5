"""``segbatch evaluate`` from Parquet to Parquet against its own kernel: ``python tests/bench/bench_evaluate.py``.

5,000 drawn images of 640x480 with 40,000 objects and 470,000 detections, masks and boxes. The kernel is ``update`` of
every row in memory, ``merge`` and ``compute``. The command's start-up is what it takes for the same data set of one
image; the rest is reading, counting, and writing state, ``images`` and figures. CPU seconds, one thread.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_coco_metrics import batches, drawn, ours, repeated, with_results

from segbatch import storage, tables
from segbatch.metrics.base import Row
from segbatch.metrics.coco_instance import CocoInstanceMetric
from segbatch.records import ClassTable

_SHARD_ROWS = 512
_DRAWN = 500


def write(root: Path, rows: Sequence[tuple[Row, Row]], classes: ClassTable) -> None:
    """Samples and masks as run roots."""
    for place, table in enumerate(("samples", "masks")):
        found = list({id(r[place].batch): r[place].batch for r in rows}.values())
        found = [found[0].slice(0, 1)] if len(rows) == 1 else found
        writer, part = tables.PartWriter(table), 0
        waiting = 0
        for batch in found:
            writer.write(batch)
            waiting += batch.num_rows
            if waiting >= _SHARD_ROWS or batch is found[-1]:
                uri = root / table / table / f"part-{part:08d}-{'0' * 12}.parquet"
                storage.replace(str(uri), writer.finish({}))
                writer, part, waiting = tables.PartWriter(table), part + 1, 0
        info = {"name": "coco-instances", "tasks": ["instance"], "classes": classes.to_json()}
        tables.write_dataset_info(str(root / table), info)


def command(root: Path, turn: int) -> tuple[float, float]:
    """CPU and wall seconds of the command, as a process of its own."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    arguments = ["evaluate", str(root / "masks"), str(root / "samples"), str(root / f"out-{turn}")]
    run = [sys.executable, "-m", "segbatch.cli", *arguments, "--protocol", "coco-instance", "--engine", "inline"]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, time.perf_counter() - began


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    case = repeated(with_results(drawn(rng, min(_DRAWN, arguments.images)), rng), -(-arguments.images // _DRAWN))
    rows = batches(case)
    with tempfile.TemporaryDirectory() as folder:
        whole, single = Path(folder, "whole"), Path(folder, "single")
        write(whole, rows, case.classes)
        write(single, rows[:1], case.classes)
        start = best(single, arguments.rounds)
        spent = best(whole, arguments.rounds)
    kernel, _ = ours(CocoInstanceMetric(case.classes), rows)
    print(f"{len(case.images)} images, {len(case.annotations)} objects, {len(case.results)} detections")
    print(f"kernel {kernel:.2f} s")
    for clock, begun, took in zip(("CPU", "wall"), start, spent, strict=True):
        print(f"{clock}: start-up {begun:.2f} s, then {took - begun:.2f} s: {(took - begun) / kernel:.2f} x the kernel")


def best(root: Path, rounds: int) -> tuple[float, float]:
    """Least CPU and wall seconds of the command."""
    spent = [command(root, turn) for turn in range(rounds)]
    return min(cpu for cpu, _ in spent), min(wall for _, wall in spent)


if __name__ == "__main__":
    main()
