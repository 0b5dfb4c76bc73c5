"""Small random cases of instances and panoptic maps, and what the official evaluators say of them.

Masks are made with pycocotools and NumPy alone. ``reference_pq`` is panopticapi's rule written down anew, pixel by
pixel, because panopticapi itself cannot be installed from a registry.
"""

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.metrics.base import Row
from segbatch.records import ClassInfo, ClassTable

Entry = dict[str, Any]
Mask = NDArray[np.uint8]
Ids = NDArray[np.uint16]

TWELVE = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
"""``COCOeval.stats`` in its order."""

PROPOSALS = {"10": (0, 0), "100": (0, 1), "1000": (0, 2), "small": (1, 2), "medium": (2, 2), "large": (3, 2)}
"""Range of size and place in maxDets by figure."""

_LABELS = (1, 2, 3, 7, 90, 300)
_IMAGE_IDS = (1, 2, 5, 9, 10, 11, 23, 100)
_SCORES = (0.0, 0.1, 0.5, 0.5, 0.9, 1.0)
_AREAS = (0.0, 32.0**2, 32.0**2 + 1e-9, 96.0**2, 96.0**2 - 1e-9, 1e5**2)


# -- instances -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A data set in COCO's form: entries of ``images`` and ``annotations``, results with masks and boxes."""

    labels: list[int]
    images: list[Entry] = field(default_factory=list)
    annotations: list[Entry] = field(default_factory=list)
    results: list[Entry] = field(default_factory=list)

    @property
    def classes(self) -> ClassTable:
        """In another order than that of the ids."""
        return ClassTable(tuple(ClassInfo(i, f"class{i}") for i in reversed(self.labels)))


def random_case(seed: int) -> Case:
    """Few small images with ties in scores, crowds, empty and one-pixel masks, areas on the borders of the ranges,
    images and classes without objects or detections; in every tenth case more than 100 detections of one class."""
    rng = np.random.default_rng(seed)
    many, no_objects, no_results = (seed % 10 == digit for digit in (7, 8, 9))
    case = Case(sorted({int(i) for i in rng.choice(_LABELS, 1 if many else rng.integers(1, 5))}))
    for image_id in rng.permutation(_IMAGE_IDS)[: rng.integers(1, 6)].tolist():
        size = int(rng.integers(1, 60)), int(rng.integers(1, 60))
        case.images.append({"id": image_id, "height": size[0], "width": size[1], "file_name": f"{image_id}.jpg"})
        shapes = [_random_mask(rng, size) for _ in range(rng.integers(1, 5))]
        for _ in range(0 if no_objects else rng.integers(0, 7)):
            entry = _entry(rng, case, image_id, _one_of(rng, shapes, size))
            entry |= {"id": len(case.annotations) + 1, "iscrowd": int(rng.random() < 0.2)}
            if rng.random() < 0.2:
                entry["area"] = float(rng.choice(_AREAS))
            case.annotations.append(entry)
        for _ in range(0 if no_results else rng.integers(95, 130) if many else rng.integers(0, 12)):
            shape = _one_of(rng, shapes, size)
            if rng.random() < 0.3:
                shape = shape & (rng.random(size) < 0.8)
            score = float(rng.choice(_SCORES) if rng.random() < 0.6 else rng.random())
            case.results.append({**_entry(rng, case, image_id, shape), "score": score})
    case.annotations = [case.annotations[i] for i in rng.permutation(len(case.annotations))]
    case.results = [case.results[i] for i in rng.permutation(len(case.results))]
    return case


def _random_mask(rng: np.random.Generator, size: tuple[int, int]) -> Mask:
    mask = np.zeros(size, np.uint8)
    kind = int(rng.integers(0, 10))
    if kind == 0:
        return mask
    y, x = int(rng.integers(size[0])), int(rng.integers(size[1]))
    if kind == 1:
        mask[y, x] = 1
    elif kind == 2:
        mask[:32, :32] = 1
    else:
        mask[y : y + rng.integers(1, size[0] + 1), x : x + rng.integers(1, size[1] + 1)] = 1
    if kind > 6:
        mask &= rng.random(size) < 0.9
    return mask


def _one_of(rng: np.random.Generator, shapes: Sequence[Mask], size: tuple[int, int]) -> Mask:
    return shapes[int(rng.integers(len(shapes)))] if rng.random() < 0.65 else _random_mask(rng, size)


def _entry(rng: np.random.Generator, case: Case, image_id: int, mask: Mask) -> Entry:
    runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    x, y, width, height = coco_mask.toBbox(runs).tolist()
    if rng.random() < 0.3:
        x, width, height = x + float(rng.integers(-2, 3)) / 4, width + 0.5, height + 0.25
    return {
        "image_id": image_id,
        "category_id": int(rng.choice(case.labels)),
        "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode()},
        "area": float(mask.sum()),
        "bbox": [x, y, width, height],
    }


def official(case: Case, kind: str, by_class: bool = True, evaluator: Any = None) -> Any:
    """``COCOeval`` after ``accumulate`` (and ``summarize`` where classes count); proposals without classes.

    Results are fed without boxes for ``segm`` and without masks for ``bbox``.
    """
    ground, results = COCO(), COCO()
    categories = [{"id": i, "name": f"class{i}"} for i in case.labels]
    with contextlib.redirect_stdout(io.StringIO()):
        parts = {"images": case.images, "annotations": copy.deepcopy(case.annotations), "categories": categories}
        ground.dataset = {"info": {}, **parts}
        ground.createIndex()
        other = {"segm": "bbox", "bbox": "segmentation"}[kind]
        fed = [{k: v for k, v in r.items() if k not in (other, "area")} for r in case.results]
        if fed:
            results = ground.loadRes(copy.deepcopy(fed))
        else:
            results.dataset = {"images": case.images, "annotations": [], "categories": categories}
            results.createIndex()
        found = (evaluator or COCOeval)(ground, results, kind)
        if not by_class:
            found.params.useCats, found.params.maxDets = 0, [10, 100, 1000]
        found.evaluate()
        found.accumulate()
        if by_class:
            found.summarize()
    return found


def defined_mean(values: NDArray[np.float64]) -> float | None:
    """As ``summarize`` takes it."""
    there = values[values > -1]
    return float(np.mean(there)) if len(there) else None


def official_figures(case: Case) -> dict[tuple[str, str], float | None]:
    """All that pycocotools says, under segbatch's names: (metric, class) -> value."""
    found: dict[tuple[str, str], float | None] = {}
    for kind in ("segm", "bbox"):
        run = official(case, kind)
        for name, value in zip(TWELVE, run.stats.tolist(), strict=True):
            found[f"{kind}_{name}", ""] = None if value == -1 else value
        for k, label in enumerate(case.labels):
            precision, recall = run.eval["precision"][:, :, k], run.eval["recall"][:, k]
            parts = [precision[..., 0, 2], precision[0, :, 0, 2], precision[5, :, 0, 2]]
            parts += [precision[..., a, 2] for a in (1, 2, 3)]
            parts += [recall[:, 0, m] for m in range(3)] + [recall[:, a, 2] for a in (1, 2, 3)]
            for name, part in zip(TWELVE, parts, strict=True):
                found[f"{kind}_{name}", f"class{label}"] = defined_mean(part)
        recall = official(case, kind, by_class=False).eval["recall"]
        for name, (a, m) in PROPOSALS.items():
            found[f"{kind}_proposal_ar_{name}", ""] = defined_mean(recall[:, 0, a, m])
    return found


def instance_rows(case: Case) -> list[tuple[Row, Row]]:
    """The case as rows of samples and masks, in the order of its images."""
    pairs = []
    for image in case.images:
        same = {"sample_id": str(image["id"]), "height": image["height"], "width": image["width"]}
        objects = [_instance(a, a["id"]) for a in case.annotations if a["image_id"] == image["id"]]
        results = [_instance(r, i) for i, r in enumerate(case.results, 1) if r["image_id"] == image["id"]]
        pairs.append((row_of("samples", same | {"instances": objects}), row_of("masks", same | {"instances": results})))
    return pairs


def _instance(entry: Entry, number: int) -> Entry:
    return {
        "id": number,
        "category_id": entry["category_id"],
        "bbox_xywh": entry["bbox"],
        "area": entry["area"],
        "iscrowd": bool(entry.get("iscrowd", 0)),
        "counts": entry["segmentation"]["counts"].encode(),
        "score": entry.get("score"),
    }


def row_of(table: str, values: Mapping[str, Any]) -> Row:
    """A row of a table; what is required and not given is made up."""
    row: Entry = {"image_uri": "", "etag": "", "status": "ok", "model_digest": "", **values}
    schema = schemas.TABLES[table]
    arrays = [
        columns.panoptic_array([runlength.encode(row[f.name])])
        if f.name == "panoptic" and f.name in row
        else pa.array([row.get(f.name)], f.type)
        for f in schema
    ]
    return Row(pa.RecordBatch.from_arrays(arrays, schema=schema), 0)


# -- panoptic --------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A panoptic map and its segments: ids by pixel, 0 is void; entries of ``segments_info``."""

    ids: NDArray[np.int64]
    segments: list[Entry]

    def row(self, table: str, image_id: int) -> Row:
        """As a row of samples or masks."""
        numbers = [s["id"] for s in self.segments]
        index = np.zeros(self.ids.shape, np.uint16)
        for place, number in enumerate(numbers, 1):
            index[self.ids == number] = place
        entries = [{"bbox_xywh": [0.0] * 4, **s, "iscrowd": bool(s["iscrowd"])} for s in self.segments]
        height, width = self.ids.shape
        size = {"sample_id": str(image_id), "height": height, "width": width}
        return row_of(table, size | {"panoptic": index, "segments": entries})


PANOPTIC_CLASSES = ClassTable(
    (*(ClassInfo(i, f"class{i}", isthing=i in (1, 7)) for i in (7, 1, 200, 3)), ClassInfo(9, "none", ignore=True))
)
_SEGMENT_CLASSES = (1, 3, 7, 200)


def random_scenes(seed: int) -> list[tuple[int, Scene, Scene]]:
    """(image id, truth, prediction) of a few tiny images, with void, crowds, and areas that are not the pixels'."""
    rng = np.random.default_rng(seed)
    found = []
    for image_id in sorted(rng.permutation(_IMAGE_IDS)[: rng.integers(1, 6)].tolist()):
        size = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        truth = _random_scene(rng, size, True)
        found.append((image_id, truth, _random_scene(rng, size, False, truth if rng.random() < 0.8 else None)))
    return found


def _random_scene(rng: np.random.Generator, size: tuple[int, int], is_truth: bool, like: Scene | None = None) -> Scene:
    """Rectangles over void; or the segments of another scene under other ids, with holes and other classes.

    Only a true one has crowds, and segments without pixels, which panopticapi refuses in predictions.
    """
    ids = np.zeros(size, np.int64)
    classes: dict[int, int] = {}
    if like is not None:
        names = {s["id"]: int(rng.integers(1, 1 << 24)) for s in like.segments}
        for s in like.segments:
            ids[like.ids == s["id"]] = names[s["id"]]
            classes[names[s["id"]]] = int(rng.choice(_SEGMENT_CLASSES)) if rng.random() < 0.2 else s["category_id"]
        ids[rng.random(size) < 0.2] = 0
    for _ in range(rng.integers(0, 2 if like is not None else 8)):
        y, x = int(rng.integers(size[0])), int(rng.integers(size[1]))
        number = int(rng.integers(1, 1 << 24))
        ids[y : y + rng.integers(1, 7), x : x + rng.integers(1, 7)] = number
        classes[number] = int(rng.choice(_SEGMENT_CLASSES))
    segments = []
    for number in rng.permutation(list(classes)).tolist():
        area = int((ids == number).sum())
        crowd = int(is_truth and rng.random() < 0.25)
        if area or (is_truth and rng.random() < 0.5):
            area += int(rng.integers(0, 3)) if rng.random() < 0.2 else 0
            segments.append({"id": number, "category_id": classes[number], "area": max(area, 1), "iscrowd": crowd})
    return Scene(ids, segments)


def reference_pq(
    scenes: Sequence[tuple[int, Scene, Scene]], classes: ClassTable
) -> dict[tuple[str, str], float | None]:
    """panopticapi's rule with one process, images in the given order: (figure, class) -> value.

    A class that does not occur has None, as has a mean over no class.
    """
    stats = {c.label_id: [0.0, 0, 0, 0] for c in classes.scored}  # sum of IoU, TP, FP, FN
    for _, truth, predicted in scenes:
        _count(truth, predicted, stats)
    found: dict[tuple[str, str], float | None] = {}
    for suffix, wanted in (("", (True, False)), ("_things", (True,)), ("_stuff", (False,))):
        pq = sq = rq = 0.0
        n = 0
        for c in classes.scored:
            iou, tp, fp, fn = stats[c.label_id]
            if not suffix:
                for name in ("pq", "sq", "rq"):
                    found[name, c.name] = None
            if c.isthing not in wanted or tp + fp + fn == 0:
                continue
            n += 1
            one = iou / (tp + 0.5 * fp + 0.5 * fn), iou / tp if tp != 0 else 0.0, tp / (tp + 0.5 * fp + 0.5 * fn)
            pq, sq, rq = pq + one[0], sq + one[1], rq + one[2]
            if not suffix:
                found["pq", c.name], found["sq", c.name], found["rq", c.name] = one
        for name, total in (("pq", pq), ("sq", sq), ("rq", rq)):
            found[f"{name}{suffix}", ""] = total / n if n else None
    return found


def _count(truth: Scene, predicted: Scene, stats: dict[int, list[Any]]) -> None:
    """pq_compute_single_core for one image."""
    shared: dict[tuple[int, int], int] = {}
    area: dict[int, int] = {}
    for t, p in zip(truth.ids.ravel().tolist(), predicted.ids.ravel().tolist(), strict=True):
        shared[t, p] = shared.get((t, p), 0) + 1
        area[p] = area.get(p, 0) + 1
    left = {s["id"]: s for s in truth.segments}
    right = {s["id"]: s for s in predicted.segments}
    found_left, found_right = set(), set()
    for (t, p), both in sorted(shared.items()):
        if t not in left or p not in right or left[t]["iscrowd"]:
            continue
        if left[t]["category_id"] != right[p]["category_id"]:
            continue
        iou = both / (area[p] + left[t]["area"] - both - shared.get((0, p), 0))
        if iou > 0.5:
            stats[left[t]["category_id"]][0] += iou
            stats[left[t]["category_id"]][1] += 1
            found_left.add(t)
            found_right.add(p)
    crowds: dict[int, int] = {}
    for number, segment in left.items():
        if segment["iscrowd"]:
            crowds[segment["category_id"]] = number
        elif number not in found_left:
            stats[segment["category_id"]][3] += 1
    for number, segment in right.items():
        if number in found_right:
            continue
        ignored = shared.get((0, number), 0)
        ignored += shared.get((crowds.get(segment["category_id"], -1), number), 0)
        if not ignored / area[number] > 0.5:
            stats[segment["category_id"]][2] += 1
