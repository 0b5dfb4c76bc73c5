"""Evaluations on Ray, and ones whose driver was killed: the figures of one process that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import api, schemas, storage, tables
from segbatch.codecs import columns, rle, runlength
from segbatch.config import RunOptions
from segbatch.records import ClassInfo, ClassTable, Figure

CLASSES = ClassTable((*(ClassInfo(i, f"class{i}", isthing=True) for i in range(5)), ClassInfo(9, "void", ignore=True)))
IDS = np.array([0, 1, 2, 3, 4, 9], np.uint16)
SIZE = (12, 16)

Map = NDArray[np.uint16]


def label_map(seed: int) -> Map:
    blocks = np.random.default_rng(seed).choice(IDS, (SIZE[0] // 4, SIZE[1] // 4))
    return np.kron(blocks, np.ones((4, 4), np.uint16)).astype(np.uint16)


def write_part(root: Path, table: str, number: int, maps: dict[str, Map]) -> None:
    """A part of the samples or masks, its instances made of the label maps."""
    schema = schemas.TABLES[table]
    rows: list[dict[str, Any]] = []
    for place, (name, found) in enumerate(maps.items()):
        objects = rle.instances_of(found, background=[9])
        cells = [
            {"id": k + 1, "category_id": c, "bbox_xywh": b, "area": float(a), "iscrowd": False, "counts": counts}
            | {"score": 1 / (2 + c + place)}
            for k, (c, b, a, counts) in enumerate(
                zip(
                    objects.ids.tolist(),
                    objects.boxes_xywh.tolist(),
                    objects.areas.tolist(),
                    objects.counts,
                    strict=True,
                )
            )
        ]
        rows.append(
            {"sample_id": name, "image_uri": "", "etag": "", "status": "ok", "split": "val", "model_digest": ""}
        )
        rows[-1] |= {"height": SIZE[0], "width": SIZE[1], "instances": cells}
    runs = columns.runs_array([runlength.encode(m) for m in maps.values()])
    arrays = [runs if f.name == "semantic" else pa.array([r.get(f.name) for r in rows], f.type) for f in schema]
    writer = tables.PartWriter(table)
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    storage.replace(f"{root}/{table}/part-{number:08d}-{'a' * 12}.parquet", writer.finish({}))


def data_set(tmp: Path, parts: int, rows: int) -> tuple[Path, Path]:
    """Masks and samples; every third block is predicted wrong."""
    for number in range(parts):
        names = [f"s{number * rows + i}" for i in range(rows)]
        truth = {name: label_map(int(name[1:])) for name in names}
        wrong = {n: np.where(np.random.default_rng(7).random(SIZE) < 0.3, label_map(1), m) for n, m in truth.items()}
        write_part(tmp / "samples", "samples", number, truth)
        write_part(tmp / "masks", "masks", number, wrong)
    for root in ("samples", "masks"):
        tables.write_dataset_info(str(tmp / root), {"name": "toy", "tasks": ["semantic"], "classes": CLASSES.to_json()})
    return tmp / "masks", tmp / "samples"


def evaluate(masks: Path, samples: Path, out: Path, protocol: str, kind: str) -> list[Figure]:
    options = RunOptions.model_validate({"plan": {"shard_rows": 1}, "engine": {"kind": kind}})
    return list(api.evaluate(str(masks), str(samples), str(out), protocol=protocol, options=options).figures)


@pytest.mark.ray
def test_ray_gives_the_figures_of_one_process(tmp_path: Path, ray_session: Path) -> None:
    masks, samples = data_set(tmp_path, 6, 4)
    for protocol in ("semantic", "coco-instance"):
        alone = evaluate(masks, samples, tmp_path / f"{protocol}-inline", protocol, "inline")
        assert evaluate(masks, samples, tmp_path / f"{protocol}-ray", protocol, "ray") == alone
        assert next(f.value for f in alone if f.metric in ("miou", "segm_ap")) not in (None, 0, 1)


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    masks, samples = data_set(tmp_path, 300, 1)
    alone = evaluate(masks, samples, tmp_path / "alone", "coco-instance", "inline")
    state = tmp_path / "out" / "state"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + CHILD]
    arguments = json.dumps([str(masks), str(samples), str(tmp_path / "out")])
    process = subprocess.Popen([*command, arguments], env={**os.environ, "TMPDIR": str(tmp_path)})
    wait_for(lambda: state.is_dir() and len(list(state.glob("part-*"))) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {p.name: p.stat().st_mtime_ns for p in state.glob("part-*")}
    assert 3 <= len(times) < 300
    assert evaluate(masks, samples, tmp_path / "out", "coco-instance", "inline") == alone
    assert {name: (state / name).stat().st_mtime_ns for name in times} == times
    assert len(list(state.glob("part-*"))) == 300 and not list(state.glob("*.tmp"))


CHILD = """
import json
from pathlib import Path
from test_evaluation import evaluate
evaluate(*map(Path, json.loads(sys.argv[1])), "coco-instance", "inline")
"""
