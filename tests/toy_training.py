"""A samples table that is learned in seconds: coloured blocks whose class follows from their colour."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from segbatch import schemas, storage, tables
from segbatch.codecs import columns, runlength
from segbatch.records import ClassInfo, ClassTable

CLASSES = ClassTable((ClassInfo(3, "dark"), ClassInfo(900, "bright"), ClassInfo(255, "void", ignore=True)))
SIZE = (16, 24)


def draw(seed: int, size: tuple[int, int] = SIZE) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Photo (h, w, 3) and label map (h, w) of 4-pixel blocks; the top row is void."""
    rng = np.random.default_rng(seed)
    bright = np.kron(rng.integers(0, 2, (size[0] // 4, size[1] // 4)), np.ones((4, 4), np.int64))
    rgb = np.clip(np.where(bright, 190, 60)[..., None] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    labels = np.where(bright, 900, 3).astype(np.uint16)
    labels[0] = 255
    return rgb, labels


def row(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    """A row of the samples table as column values; ``semantic`` is a label map or None."""
    rgb, labels = draw(number)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    plain = {
        "sample_id": f"{split}/{number}",
        "split": split,
        "image": buffer.getvalue(),
        "image_uri": f"/photos/{split}/{number}.png",
        "etag": f"e{number}",
        "height": rgb.shape[0],
        "width": rgb.shape[1],
        "channels": 3,
        "exif_orientation": 1,
        "status": "ok",
        "semantic": labels,
    }
    return {**plain, **changes}


def write(root: Path, rows: list[dict[str, Any]], classes: ClassTable = CLASSES) -> str:
    """Write the table in two parts; returns its root."""
    half = (len(rows) + 1) // 2
    for number, members in enumerate((rows[:half], rows[half:])):
        writer = tables.PartWriter("samples")
        if members:
            writer.write(_batch(members))
        storage.replace(f"{root}/samples/part-{number:08d}-{'0' * 12}.parquet", writer.finish({}))
    tables.write_dataset_info(str(root), {"name": "toy", "classes": classes.to_json()})
    return str(root)


def toy(root: Path, train: int = 8, val: int = 3) -> str:
    """A table of ``train`` and ``val`` ok rows."""
    return write(root, [*(row(i) for i in range(train)), *(row(100 + i, "val") for i in range(val))])


def _batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    runs = [runlength.encode(r["semantic"]) if r["semantic"] is not None else None for r in rows]
    made = {"semantic": columns.runs_array(runs), "class_pixels": columns.class_pixels_array(runs)}
    arrays = [made.get(f.name) for f in schemas.SAMPLES]
    filled = [
        a if a is not None else pa.array([r.get(f.name) for r in rows], f.type)
        for a, f in zip(arrays, schemas.SAMPLES, strict=True)
    ]
    return pa.RecordBatch.from_arrays(filled, schema=schemas.SAMPLES)
