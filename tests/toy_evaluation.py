"""A tiny data set with predictions, evaluated end to end: what the tests of the report look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas, storage, tables
from segbatch.codecs import columns, runlength
from segbatch.config import PlanConfig
from segbatch.records import ClassInfo, ClassTable
from segbatch.report import overlay
from segbatch.runs import Run
from segbatch.stages import evaluate

Map = NDArray[np.uint16]

EVIL = '<script>alert("x")</script>'
CLASSES = ClassTable(
    (ClassInfo(0, "road", (128, 64, 128)), ClassInfo(1, EVIL), ClassInfo(2, "sky"), ClassInfo(9, "void", ignore=True))
)


@dataclass
class Shot:
    """One image of the tiny data set."""

    name: str
    truth: Map
    predicted: Map
    image: bytes | None = None
    image_uri: str = "/nowhere/photo.png"
    orientation: int = 1


class Silent:
    """A journal that keeps nothing."""

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        return

    def clear(self, slot: str) -> None:
        return


def write_rows(root: Path, table: str, rows: Sequence[dict[str, Any]]) -> None:
    schema = schemas.TABLES[table]
    runs = columns.runs_array([runlength.encode(r["semantic"]) for r in rows])
    arrays = [runs if f.name == "semantic" else pa.array([r.get(f.name) for r in rows], f.type) for f in schema]
    writer = tables.PartWriter(table)
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    storage.replace(f"{root}/{table}/part-00000000-{'a' * 12}.parquet", writer.finish({}))


def evaluated(tmp: Path, shots: Sequence[Shot], classes: ClassTable = CLASSES) -> Path:
    """Samples, masks and a finished evaluation; returns the metrics root."""
    same = {"split": "val", "status": "ok", "etag": "", "model_digest": "d1g35t"}
    facts = [
        same | {"sample_id": s.name, "image_uri": s.image_uri, "height": s.truth.shape[0], "width": s.truth.shape[1]}
        for s in shots
    ]
    photos = [{"image": s.image, "exif_orientation": s.orientation, "semantic": s.truth} for s in shots]
    write_rows(tmp / "samples", "samples", [f | p for f, p in zip(facts, photos, strict=True)])
    write_rows(tmp / "masks", "masks", [f | {"semantic": s.predicted} for f, s in zip(facts, shots, strict=True)])
    tables.write_dataset_info(str(tmp / "samples"), {"name": "toy", "classes": classes.to_json()})
    Run.open(str(tmp / "masks"), "masks", "predict", {"model": f"net@{EVIL}", "tiles": {"size": 512}, "where": ""})
    masks, samples, out = str(tmp / "masks"), str(tmp / "samples"), tmp / "metrics"
    run = Run.open(str(out), "state", "evaluate", {"masks": masks, "samples": samples, "protocol": "semantic"})
    run.plan(lambda: evaluate.items(masks, samples), PlanConfig())
    worker = evaluate.EvaluateTask(masks, samples, "semantic").open(1, Silent())
    for shard in run.missing():
        worker.run(shard, {})
    evaluate.finish(str(out), masks, samples, "semantic")
    return out


def png_of(height: int, width: int) -> bytes:
    ramp = np.linspace(0, 255, height * width * 3).astype(np.uint8).reshape(height, width, 3)
    return overlay.encode_png(ramp)


def shots_of(count: int, height: int = 20, width: int = 30) -> list[Shot]:
    """Image i is wrong in its first i columns."""
    found = []
    for i in range(count):
        truth = np.zeros((height, width), np.uint16)
        truth[:, width // 2 :] = 2
        predicted = truth.copy()
        predicted[:, :i] = 1
        found.append(Shot(f"s{i:02d}", truth, predicted, png_of(height, width)))
    return found
