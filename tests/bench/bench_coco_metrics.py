"""COCO's evaluators against pycocotools and panopticapi: ``python tests/bench/bench_coco_metrics.py [--coco FILE]``.

Objects come from an annotation file of real images, else drawn discs stand in; detections are these objects, moved,
94 an image. Both sides get the same and must say the same. Figures are CPU seconds in one thread from rows (or
pycocotools' index) in memory to all figures; machines differ: the ratios are what to trust.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from coco_cases import TWELVE, Case, row_of
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segbatch.metrics.base import Metric, Row
from segbatch.metrics.coco_instance import CocoInstanceMetric
from segbatch.metrics.coco_panoptic import CocoPanopticMetric
from segbatch.records import ClassInfo, ClassTable

DETECTIONS = 94
"""Of an image, as a detector leaves them in val2017 (469,000 in 5,000 images)."""

SIZE = (480, 640)
OFFSET = 256**3

Mask = NDArray[np.uint8]


class OnlyMasks(CocoInstanceMetric):
    """Masks alone, with their proposals."""

    kinds: ClassVar[tuple[str, ...]] = ("segm",)


class OnlyBoxes(CocoInstanceMetric):
    """Boxes alone, with their proposals."""

    kinds: ClassVar[tuple[str, ...]] = ("bbox",)


def disc(rng: np.random.Generator, size: tuple[int, int]) -> Mask:
    """A filled circle somewhere."""
    y, x = np.ogrid[: size[0], : size[1]]
    row, column, radius = rng.integers(size[0]), rng.integers(size[1]), rng.integers(3, 90)
    return ((y - row) ** 2 + (x - column) ** 2 <= radius**2).astype(np.uint8)


def real(file: Path) -> Case:
    """Images and annotations of a file, all masks as runs."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(file))
    annotations = [{**a, "segmentation": ground.annToRLE(a)} for a in ground.dataset["annotations"]]
    return Case(sorted(ground.getCatIds()), ground.dataset["images"], annotations)


def drawn(rng: np.random.Generator, images: int) -> Case:
    """Eight discs an image."""
    case = Case(list(range(1, 81)))
    for number in range(1, images + 1):
        case.images.append({"id": number, "height": SIZE[0], "width": SIZE[1], "file_name": f"{number}.jpg"})
        for _ in range(8):
            entry = entry_of(number, int(rng.integers(1, 81)), disc(rng, SIZE))
            case.annotations.append({**entry, "id": len(case.annotations) + 1, "iscrowd": 0})
    return case


def entry_of(image_id: int, category: int, mask: Mask) -> dict[str, Any]:
    """What annotations and results have in common."""
    runs = coco_mask.encode(np.asfortranarray(mask))
    known = {"image_id": image_id, "category_id": category, "segmentation": runs}
    return known | {"area": float(mask.sum()), "bbox": coco_mask.toBbox(runs).tolist()}


def with_results(case: Case, rng: np.random.Generator) -> Case:
    """Objects moved by some pixels, most of them under their own class."""
    for image in case.images:
        objects = [a for a in case.annotations if a["image_id"] == image["id"]]
        masks = [coco_mask.decode(a["segmentation"]) for a in objects]
        for place in rng.integers(0, max(len(masks), 1), DETECTIONS if masks else 0).tolist():
            dy, dx = (int(v) for v in rng.normal(0, 12, 2))
            category = objects[place]["category_id"] if rng.random() < 0.7 else int(rng.choice(case.labels))
            moved = np.roll(masks[place], (dy, dx), (0, 1))
            case.results.append({**entry_of(image["id"], category, moved), "score": round(rng.random() ** 3, 3)})
    return case


def repeated(case: Case, times: int) -> Case:
    """The same images under other ids."""
    more = Case(case.labels)
    step = max(i["id"] for i in case.images)
    for turn in range(times):
        more.images += [{**i, "id": i["id"] + turn * step} for i in case.images]
        for old, new in ((case.annotations, more.annotations), (case.results, more.results)):
            new += [{**e, "image_id": e["image_id"] + turn * step, "id": len(new) + n} for n, e in enumerate(old, 1)]
    return more


def batches(case: Case) -> list[tuple[Row, Row]]:
    """Rows in batches of 64, as they are read."""
    by_image: list[dict[Any, list[Any]]] = [{}, {}]
    for found, entries in zip(by_image, (case.annotations, case.results), strict=True):
        for e in entries:
            known = {"id": e["id"], "category_id": e["category_id"], "bbox_xywh": e["bbox"], "area": e["area"]}
            known |= {"iscrowd": bool(e.get("iscrowd")), "counts": e["segmentation"]["counts"], "score": e.get("score")}
            found.setdefault(e["image_id"], []).append(known)
    rows: list[tuple[Row, Row]] = []
    for start in range(0, len(case.images), 64):
        pair = []
        for table, found in zip(("samples", "masks"), by_image, strict=True):
            parts = [
                row_of(table, {"sample_id": str(i["id"]), **sides(i), "instances": found.get(i["id"], [])}).batch
                for i in case.images[start : start + 64]
            ]
            pair.append(pa.concat_batches(parts))
        rows += [(Row(pair[0], i), Row(pair[1], i)) for i in range(pair[0].num_rows)]
    return rows


def sides(image: dict[str, Any]) -> dict[str, int]:
    """Height and width."""
    return {"height": image["height"], "width": image["width"]}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the better of two rounds, and the result."""
    best, result = float("inf"), None
    for _ in range(2):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def ours(metric: Metric[Any], rows: Sequence[tuple[Row, Row]]) -> tuple[float, dict[str, float | None]]:
    """Update, merge, compute."""
    spent, figures = seconds(lambda: metric.compute(metric.merge([metric.update(t, p) for t, p in rows])))
    return spent, {f.metric: f.value for f in figures if not f.class_name}


def theirs(case: Case, kind: str) -> tuple[float, Any]:
    """``COCOeval`` from its index on."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        categories = [{"id": i, "name": str(i)} for i in case.labels]
        ground.dataset = {"images": case.images, "annotations": case.annotations, "categories": categories}
        ground.createIndex()
        other = {"segm": "bbox", "bbox": "segmentation"}[kind]
        results = ground.loadRes([{k: v for k, v in r.items() if k != other} for r in case.results])
        evaluator = COCOeval(ground, results, kind)
        began = time.process_time()
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        return time.process_time() - began, evaluator.stats


def instances(file: Path | None, repeat: int) -> None:
    """Print the comparison for masks and boxes."""
    rng = np.random.default_rng(0)
    case = repeated(with_results(real(file) if file else drawn(rng, 50), rng), repeat)
    counts = len(case.images), len(case.annotations), len(case.results)
    print(f"{counts[0]} images, {counts[1]} objects, {counts[2]} detections")
    rows, classes = batches(case), ClassTable(tuple(ClassInfo(i, str(i)) for i in case.labels))
    both, figures = ours(CocoInstanceMetric(classes), rows)
    official = 0.0
    for kind, metric in (("segm", OnlyMasks), ("bbox", OnlyBoxes)):
        spent, _ = ours(metric(classes), rows)
        their, stats = theirs(case, kind)
        official += their
        if [figures[f"{kind}_{name}"] for name in TWELVE] != [None if v == -1 else v for v in stats.tolist()]:
            raise AssertionError(f"{kind}: the figures differ")
        print(f"{kind}: pycocotools {their:.2f} s, segbatch {spent:.2f} s with proposals: {their / spent:.1f} x")
    print(f"both: pycocotools {official:.2f} s, segbatch {both:.2f} s with proposals: {official / both:.1f} x")


# -- panoptic --------------------------------------------------------------------------------------------------------


def scene(rng: np.random.Generator) -> tuple[NDArray[np.uint32], NDArray[np.uint32], list[dict[str, Any]]]:
    """A map of 30 segments, one that is moved, and the segments; ids are 1 to 30."""
    ids = np.zeros(SIZE, np.uint32)
    for number in range(1, 31):
        ids[disc(rng, SIZE) > 0] = number
    moved = np.roll(ids, 3, 1)
    shown, areas = np.unique(ids[ids > 0], return_counts=True)
    bare = {"bbox_xywh": [0.0] * 4, "iscrowd": False}
    parts = [
        {**bare, "id": int(i), "category_id": int(i) % 7 + 1, "area": float(a)}
        for i, a in zip(shown, areas, strict=True)
    ]
    return ids, moved, parts


def panoptic_row(table: str, number: int, ids: NDArray[np.uint32], segments: list[dict[str, Any]]) -> Row:
    """A row with that map."""
    index = np.zeros(31, np.uint16)
    index[[s["id"] for s in segments]] = np.arange(1, len(segments) + 1)
    size = {"height": SIZE[0], "width": SIZE[1]}
    return row_of(table, {"sample_id": str(number), **size, "panoptic": index[ids], "segments": segments})


def panopticapi(ids: NDArray[np.uint32], moved: NDArray[np.uint32]) -> dict[tuple[int, int], int]:
    """What takes its time in pq_compute_single_core: areas, and pixels that pairs of segments share."""
    np.unique(moved, return_counts=True)
    pairs = ids.astype(np.uint64) * OFFSET + moved.astype(np.uint64)
    labels, counts = np.unique(pairs, return_counts=True)
    return {(int(v) // OFFSET, int(v) % OFFSET): int(n) for v, n in zip(labels, counts, strict=True)}


def panoptic(images: int) -> None:
    """Print the comparison for panoptic maps, their PNG files decoded already."""
    rng = np.random.default_rng(1)
    scenes = [scene(rng) for _ in range(images)]
    rows = [
        (panoptic_row("samples", n, ids, s), panoptic_row("masks", n, moved, s))
        for n, (ids, moved, s) in enumerate(scenes)
    ]
    classes = ClassTable(tuple(ClassInfo(i, str(i)) for i in range(1, 8)))
    spent, _ = ours(CocoPanopticMetric(classes), rows)
    their, _ = seconds(lambda: [panopticapi(ids, moved) for ids, moved, _ in scenes])
    each = 1000 * their / images, 1000 * spent / images
    print(f"panoptic: panopticapi's counts {each[0]:.2f} ms an image, segbatch {each[1]:.2f} ms: {their / spent:.1f} x")


def main() -> None:
    """Parse arguments, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coco", type=Path, help="annotation file of real images (instances_val2017.json)")
    parser.add_argument("--repeat", type=int, default=5, help="how often the images are there")
    arguments = parser.parse_args()
    instances(arguments.coco, arguments.repeat)
    panoptic(50)


if __name__ == "__main__":
    main()
