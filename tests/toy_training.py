"""A samples table that is learned in seconds: coloured blocks whose class follows from their colour, bright ones being
things; and an architecture that finds things by their brightness.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch import schemas, storage, tables
from segbatch.codecs import columns, rle, runlength
from segbatch.models.base import Choice, Detections, InputSpec, ModelSpec, Output, PanopticParts, Segmenter, Target
from segbatch.models.config import MaskRCNNConfig, PanopticFPNConfig
from segbatch.records import ClassInfo, ClassTable, Task

DARK, BRIGHT, VOID = 3, 900, 255
CLASSES = ClassTable(
    (ClassInfo(DARK, "dark"), ClassInfo(BRIGHT, "bright", isthing=True), ClassInfo(VOID, "void", ignore=True))
)
SIZE = (16, 24)


def draw(seed: int, size: tuple[int, int] = SIZE) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Photo (h, w, 3) and label map (h, w) of 4-pixel blocks; the top row is void."""
    rng = np.random.default_rng(seed)
    bright = np.kron(rng.integers(0, 2, (size[0] // 4, size[1] // 4)), np.ones((4, 4), np.int64))
    rgb = np.clip(np.where(bright, 190, 60)[..., None] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    labels = np.where(bright, BRIGHT, DARK).astype(np.uint16)
    labels[0] = VOID
    return rgb, labels


def pieces(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The number of every connected piece (four neighbours), 0 elsewhere."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1].astype(np.int32)


def row(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    """A row of the samples table as column values; ``semantic`` and ``panoptic`` are label maps or None."""
    rgb, labels = draw(number)
    plain = {
        "sample_id": f"{split}/{number}",
        "split": split,
        "image": png(rgb),
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


def with_things(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    """The same with ``instances``, ``panoptic`` and ``segments``: every bright piece is a thing, the rest is stuff."""
    labels = draw(number)[1]
    things = pieces(labels == BRIGHT)
    index_map = np.where(labels == DARK, things.max() + 1, things).astype(np.uint16)
    found = rle.instances_of(index_map, background=(0,))
    segments = [
        {
            "id": int(i),
            "category_id": DARK if i > things.max() else BRIGHT,
            "area": float(area),
            "bbox_xywh": box.tolist(),
            "iscrowd": False,
        }
        for i, area, box in zip(found.ids, found.areas, found.boxes_xywh, strict=True)
    ]
    instances = [
        {**s, "counts": counts} for s, counts in zip(segments, found.counts, strict=True) if s["category_id"] == BRIGHT
    ]
    labelled = {"instances": instances, "panoptic": index_map, "segments": segments}
    return row(number, split, **{**labelled, **changes})


def png(rgb: NDArray[np.uint8]) -> bytes:
    """The photo as a file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


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
    """A table of ``train`` and ``val`` ok rows with label maps."""
    return write(root, [*(row(i) for i in range(train)), *(row(100 + i, "val") for i in range(val))])


def toy_things(root: Path, train: int = 8, val: int = 3) -> str:
    """The same with things."""
    return write(root, [*(with_things(i) for i in range(train)), *(with_things(100 + i, "val") for i in range(val))])


def _batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    runs, panoptic = ([_runs(r.get(name)) for r in rows] for name in ("semantic", "panoptic"))
    made = {
        "semantic": columns.runs_array(runs),
        "class_pixels": columns.class_pixels_array(runs),
        "panoptic": columns.panoptic_array(panoptic),
    }
    arrays = [made.get(f.name) for f in schemas.SAMPLES]
    filled = [
        a if a is not None else pa.array([r.get(f.name) for r in rows], f.type)
        for a, f in zip(arrays, schemas.SAMPLES, strict=True)
    ]
    return pa.RecordBatch.from_arrays(filled, schema=schemas.SAMPLES)


def _runs(label_map: NDArray[np.uint16] | None) -> runlength.Runs | None:
    return None if label_map is None else runlength.encode(label_map)


# -- an architecture -------------------------------------------------------------------------------------------------


class BlobNet(nn.Module):
    """One brightness score a pixel, from a 3 x 3 window, with batch normalisation."""

    def __init__(self, classes: ClassTable) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
        self.thing = next(i for i, c in enumerate(classes.classes) if c.isthing)

    def forward(self, images: Tensor) -> Tensor:
        """(n, h, w) logits of "part of a thing"."""
        scores: Tensor = self.layers(images)[:, 0].float()
        return scores


class BlobArchitecture:
    """Every connected bright piece is a thing; stands in for detection networks, which are slower."""

    summary = "bright pieces"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.output: Output = "detections" if task == "instance" else "panoptic"
        self.config = MaskRCNNConfig if task == "instance" else PanopticFPNConfig
        self.choice = Choice(stuff_area=1)
        self.steps: list[int] = []

    def input_spec(self, config: Any) -> InputSpec:
        """Short side, as for detection networks."""
        return InputSpec(height=config.short_side, resize="short-side", longest=config.longest, layout="nhwc")

    def build(self, config: Any, classes: ClassTable) -> nn.Module:
        """Fresh weights."""
        return BlobNet(classes)

    def begin(self, net: nn.Module, config: Any) -> None:
        """Random weights."""

    def loss(self, net: nn.Module, images: Tensor, targets: Sequence[Target], step: int) -> Tensor:
        """Of things against the rest, crowds left out; ``step`` decides which half of the pixels counts."""
        self.steps.append(step)
        logits = net(images)
        wanted, counted = torch.zeros_like(logits), torch.ones_like(logits)
        for number, target in enumerate(targets):
            for mask, iscrowd in zip(target.masks, target.iscrowd, strict=True):
                (counted if iscrowd else wanted)[number][torch.from_numpy(mask > 0)] = 0.0 if iscrowd else 1.0
        counted *= torch.rand(logits.shape, generator=torch.Generator().manual_seed(step)) < 0.5
        return F.binary_cross_entropy_with_logits(logits, wanted, counted)

    def segmenter(self, net: nn.Module, spec: ModelSpec) -> Segmenter:
        """Finds pieces."""
        assert isinstance(net, BlobNet)
        return _BlobSegmenter(net.eval(), spec)


class _BlobSegmenter:
    def __init__(self, net: BlobNet, spec: ModelSpec) -> None:
        self.spec = spec
        self._net = net

    def forward(self, batch: NDArray[Any]) -> Sequence[Any]:
        with torch.inference_mode():
            logits = self._net(torch.from_numpy(batch).permute(0, 3, 1, 2)).numpy()
        found = [self._detections(one > 0) for one in logits]
        if self.spec.output == "detections":
            return found
        return [PanopticParts(np.stack([one, -one]), f) for one, f in zip(logits, found, strict=True)]

    def _detections(self, bright: NDArray[np.bool_]) -> Detections:
        numbers = pieces(bright)
        found = rle.instances_of(numbers, background=(0,))
        boxes = found.boxes_xywh.astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = [
            cv2.resize((numbers[y0:y1, x0:x1] == i).astype(np.float32), (28, 28), interpolation=cv2.INTER_AREA)
            for i, (x0, y0, x1, y1) in zip(found.ids, boxes.astype(int), strict=True)
        ]
        return Detections(
            boxes=boxes,
            scores=np.full(len(boxes), 0.9, np.float32),
            classes=np.full(len(boxes), self._net.thing, np.int64),
            masks=np.array(masks, np.float32).reshape(-1, 28, 28),
        )
