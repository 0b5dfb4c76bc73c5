"""Small random cases of BDD100K's tasks, and what the official rules say of them.

The rules are those of bdd100k 1.0.1 (github.com/bdd100k/bdd100k, commit 9ac17c6), ``bdd100k/eval``, written down anew,
pixel by pixel, because the toolkit's dependencies cannot all be installed here. Instances are summed up by pycocotools
itself, as there. Bitmasks are RGBA: category, attributes (2 crowd, 1 ignored), and two bytes of the object's id.
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from coco_cases import TWELVE, row_of
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from segbatch.codecs import columns, rle, runlength
from segbatch.metrics.base import Row

Map = NDArray[np.uint8]
Rgba = NDArray[np.uint8]
Scores = list[tuple[int, float]]
"""Object id and score of every detection."""

Figures = dict[tuple[str, str], float | None]
"""Metric and class name; 100 times the value, or the official value, as the protocol has it."""

DIRECTIONS, STYLES = ("parallel", "vertical"), ("solid", "dashed")


# -- rows ------------------------------------------------------------------------------------------------------------


def semantic_row(table: str, name: str, label_map: NDArray[Any], **maps: NDArray[Any]) -> Row:
    """A row with a label map, and label maps by name."""
    row = row_of(table, {"sample_id": name, "height": label_map.shape[0], "width": label_map.shape[1]})
    batch = row.batch
    made = {
        "semantic": columns.runs_array([runlength.encode(label_map)]),
        "label_maps": columns.label_maps_array([{n: runlength.encode(m) for n, m in maps.items()}]),
    }
    for column, array in made.items():
        batch = batch.set_column(batch.schema.get_field_index(column), batch.schema.field(column), array)
    return Row(batch, 0)


def lane_row(table: str, name: str, byte: Map) -> Row:
    """Lane bytes as they are ingested; bit 3 is the background."""
    lane = (byte & 8) == 0
    parts = {"direction": byte >> 5 & 1, "style": byte >> 4 & 1}
    return semantic_row(
        table, name, np.where(lane, byte & 7, 255), **{n: np.where(lane, m, 255) for n, m in parts.items()}
    )


def ids_of(bitmask: Rgba) -> NDArray[np.int64]:
    """Object ids, 0 is void."""
    return bitmask[..., 2].astype(np.int64) * 256 + bitmask[..., 3]


def objects_of(bitmask: Rgba) -> dict[int, tuple[NDArray[np.bool_], int, int]]:
    """Mask, category and attributes by id, in ascending order."""
    ids = ids_of(bitmask)
    found = {}
    for number in np.unique(ids[ids > 0]).tolist():
        mask = ids == number
        ((category, flags),) = np.unique(bitmask[mask][:, :2], axis=0).tolist()
        found[number] = (mask, category, flags)
    return found


def _entry(number: int, mask: NDArray[np.bool_], category: int, flags: int) -> dict[str, Any]:
    counts = rle.encode(mask)
    known = {"id": number, "category_id": category, "area": float(mask.sum()), "iscrowd": bool(flags & 2)}
    return {**known, "counts": counts, "bbox_xywh": rle.bbox(counts, *mask.shape)}


def _attributes(kind: str, bitmask: Rgba) -> str:
    flags = {i: {"crowd": bool(f & 2), "ignored": bool(f & 1)} for i, (_, _, f) in objects_of(bitmask).items()}
    return json.dumps({kind: {str(i): f for i, f in flags.items()}, "weather": "clear"})


def instance_rows(name: str, truth: Rgba, predicted: Rgba, scores: Scores) -> tuple[Row, Row]:
    """A bitmask and one of detections as they are ingested and imported."""
    known = {"sample_id": name, "height": truth.shape[0], "width": truth.shape[1]}
    objects = [_entry(i, *o) for i, o in objects_of(truth).items()]
    shown = objects_of(predicted)
    found = [{**_entry(i, *shown[i]), "score": score} for i, score in scores if i in shown]
    return (
        row_of("samples", {**known, "instances": objects, "attributes": _attributes("instances", truth)}),
        row_of("masks", {**known, "instances": found}),
    )


def panoptic_rows(name: str, truth: Rgba, predicted: Rgba) -> tuple[Row, Row]:
    """Two bitmasks as they are ingested and imported; segments are listed in another order than that of their ids."""
    rows = []
    for table, bitmask in (("samples", truth), ("masks", predicted)):
        listed = list(reversed(objects_of(bitmask).items()))
        index = np.zeros(bitmask.shape[:2], np.uint16)
        for place, (_, (mask, _, _)) in enumerate(listed, 1):
            index[mask] = place
        values = {"sample_id": name, "height": bitmask.shape[0], "width": bitmask.shape[1], "panoptic": index}
        values |= {"segments": [_entry(i, *o) for i, o in listed], "attributes": _attributes("segments", bitmask)}
        rows.append(row_of(table, values))
    return rows[0], rows[1]


# -- random cases ----------------------------------------------------------------------------------------------------


def random_maps(rng: np.random.Generator, ids: Sequence[int], void: int) -> tuple[Map, Map]:
    """A label map and a prediction like it, of some of the ids; now and then all void, or one pixel."""
    size = tuple(rng.integers(1, 9, 2).tolist())
    some = rng.choice(ids, rng.integers(1, min(len(ids), 7) + 1))
    truth = rng.choice(some, size)
    predicted = np.where(rng.random(size) < 0.6, truth, rng.choice([*some, ids[0], void, 200], size))
    if rng.random() < 0.1:
        truth = np.full(size, void)
    return truth.astype(np.uint8), predicted.astype(np.uint8)


def random_lanes(rng: np.random.Generator) -> tuple[Map, Map]:
    """Lane bytes: lines and blocks in a small image, moved by some pixels; now and then empty, or full."""
    size = tuple(rng.integers(1, 24, 2).tolist())
    truth = np.full(size, 255, np.uint8)
    for _ in range(rng.integers(0, 5)):
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        high, wide = rng.permutation([rng.integers(1, 3), rng.integers(1, 12)])
        truth[top : top + high, left : left + wide] = rng.integers(0, 8) + 16 * rng.integers(0, 4)
    predicted = np.roll(truth, rng.integers(-3, 4, 2), (0, 1))
    drawn = rng.random(size) < 0.05
    predicted = np.where(drawn, rng.integers(0, 64, size).astype(np.uint8), predicted)
    if rng.random() < 0.1:
        predicted[:] = rng.choice([255, 0, 6])
    return truth, predicted


def random_bitmasks(rng: np.random.Generator, categories: Sequence[int], most: int) -> tuple[Rgba, Rgba]:
    """Rectangles of ground truth, and a prediction: the same, moved, renumbered, some of another category."""
    size = tuple(rng.integers(1, most + 1, 2).tolist())
    truth = np.zeros((*size, 4), np.uint8)
    for number in (rng.permutation(400)[: rng.integers(0, 12)] + 1).tolist():
        side = rng.choice([1, 2, 3, 5, 32, 33, 96, 97], 2)
        side = side if rng.random() < 0.5 else side[[0, 0]]
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        if rng.random() < 0.3:
            top, left = max(size[0] - side[0], 0), max(size[1] - side[1], 0)
        where = slice(top, top + side[0]), slice(left, left + side[1])
        flags = rng.choice([0, 0, 0, 1, 2, 3, 12])
        truth[where] = (rng.choice(categories), flags, number // 256, number % 256)
    predicted = np.roll(truth, rng.integers(-1, 2, 2), (0, 1))
    objects = objects_of(predicted)
    numbers = rng.permutation(len(objects)) + 1
    for number, (mask, category, _) in zip(numbers.tolist(), objects.values(), strict=True):
        if rng.random() < 0.2:
            category = rng.choice(categories)
        predicted[mask] = (category, rng.choice([0, 0, 0, 0, 2]), 0, number)
    noise = rng.random(size) < rng.choice([0.0, 0.05, 0.3])
    if len(objects):
        y, x = rng.integers(0, size[0], size), rng.integers(0, size[1], size)
        predicted = np.where(noise[..., None], predicted[y, x], predicted)
    return truth, predicted


def random_scores(rng: np.random.Generator, predicted: Rgba) -> Scores:
    """A score for every object, in any order, with ties; and for one that is not there."""
    ids = [*objects_of(predicted), 999]
    return [(int(i), float(rng.choice([0.1, 0.5, 0.5, 0.9, rng.random()]))) for i in rng.permutation(ids)]


# -- label maps: eval/seg.py -------------------------------------------------------------------------------------------


def official_semantic(pairs: Sequence[tuple[Map, Map | None]], names: Sequence[str]) -> Figures:
    """evaluate_segmentation with int64 totals, in shares; a missing prediction is void everywhere."""
    n = len(names)
    joint = np.zeros((n + 1, n + 1), np.int64)
    for truth, predicted in pairs:
        for y, x in np.ndindex(truth.shape):
            if truth[y, x] < n:
                joint[truth[y, x], n if predicted is None else min(int(predicted[y, x]), n)] += 1
    with np.errstate(invalid="ignore"):
        hits = np.diag(joint)
        iou = np.nan_to_num(hits / (joint.sum(1) + joint.sum(0) - hits))[:n]
        precision = np.nan_to_num(hits / joint.sum(0))[:n]
    shown = np.flatnonzero(joint.sum(1))
    figures: Figures = dict.fromkeys([(m, "") for m in ("miou", "mean_precision", "fwiou", "global_accuracy")])
    if len(shown):
        figures["miou", ""] = np.mean(iou[shown])
        figures["mean_precision", ""] = np.mean(precision[shown])
        figures["fwiou", ""] = (iou * (joint[:n].sum(1) / joint[:n].sum())).sum()
        figures["global_accuracy", ""] = np.diag(joint[:n]).sum() / joint[:n].sum()
    figures |= {("iou", name): value for name, value in zip(names, iou, strict=True)}
    return figures | {("precision", name): value for name, value in zip(names, precision, strict=True)}


# -- lanes: eval/lane.py -----------------------------------------------------------------------------------------------


def disk(radius: int) -> NDArray[np.bool_]:
    """The footprint of skimage."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    found: NDArray[np.bool_] = x**2 + y**2 <= radius**2
    return found


def lane_score(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], radius: int) -> float:
    """eval_lane_per_threshold; skimage's binary_dilation is SciPy's."""
    near_truth, near = (ndimage.binary_dilation(m, disk(radius)) for m in (truth, predicted))
    there, found = int(truth.sum()), int(predicted.sum())
    if not there or not found:
        return float(there == found)
    precision, recall = (predicted & near_truth).sum() / found, (truth & near).sum() / there
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


def lane_masks(byte: Map) -> list[NDArray[np.bool_]]:
    """Two directions, two styles, eight categories."""
    lane = (byte >> 3 & 1) == 0
    values = [byte >> 5 & 1] * 2 + [byte >> 4 & 1] * 2 + [byte & 7] * 8
    return [(part == kind) & lane for part, kind in zip(values, (0, 1, 0, 1, *range(8)), strict=True)]


def official_lanes(pairs: Sequence[tuple[Map, Map | None]], categories: Sequence[str]) -> Figures:
    """evaluate_lane_marking, in per cent; a missing prediction is 0 everywhere."""
    scores = []
    for truth, predicted in pairs:
        masks = zip(
            lane_masks(truth), lane_masks(np.zeros_like(truth) if predicted is None else predicted), strict=True
        )
        scores.append([[lane_score(t, p, radius) for radius in (1, 2, 5)] for t, p in masks])
    figures: Figures = {}
    tasks = {"direction": (0, DIRECTIONS), "style": (2, STYLES), "category": (4, categories)}
    means = []
    for task, (first, kinds) in tasks.items():
        by_kind = np.stack([np.array(s[first : first + len(kinds)]) for s in scores]).mean(axis=0) * 100
        means.append(by_kind.mean(axis=0))
        for place, distance in enumerate((1, 2, 5)):
            figures[f"f1_pix{distance}_{task}", ""] = means[-1][place]
            figures |= {(f"f1_pix{distance}", kind): by_kind[i, place] for i, kind in enumerate(kinds)}
    whole = np.stack(means).mean(axis=0)
    return figures | {(f"f1_pix{distance}", ""): whole[place] for place, distance in enumerate((1, 2, 5))}


# -- panoptic: eval/pan_seg.py -----------------------------------------------------------------------------------------


def official_pq(truth: Rgba, predicted: Rgba | None) -> dict[int, list[Any]]:
    """pq_per_image: sum of IoUs, TP, FP, FN by category."""
    left = list(objects_of(truth).values())
    right = [] if predicted is None else list(objects_of(predicted).values())
    found: dict[int, list[Any]] = {}
    counted = [not flags & 3 for _, _, flags in left]
    cover = np.array([[(t & p).sum() / p.sum() for p, _, _ in right] for t, _, _ in left])
    cover = cover.reshape(len(left), len(right))
    matched = set()
    for mask, category, flags in left:
        ious = [(mask & p).sum() / (mask | p).sum() * (c == category) for p, c, _ in right]
        best = int(np.argmax(ious)) if ious else 0
        if flags & 3:
            continue
        total = found.setdefault(category, [0.0, 0, 0, 0])
        if not ious or ious[best] <= 0.5 or right[best][2] & 3:
            total[3] += 1
        else:
            total[0] += ious[best]
            total[1] += 1
            matched.add(best)
    off = 1 - cover[np.array(counted, bool)].sum(axis=0)
    for place, (_, category, flags) in enumerate(right):
        if not flags & 3 and place not in matched and not off[place] > 0.5:
            found.setdefault(category, [0.0, 0, 0, 0])[2] += 1
    return found


def official_panoptic(pairs: Sequence[tuple[Rgba, Rgba | None]], classes: Mapping[int, tuple[str, bool]]) -> Figures:
    """evaluate_pan_seg, in per cent; ``classes``: name and isthing by id. None where no class occurs."""
    totals: dict[int, list[Any]] = {}
    for pair in pairs:
        for category, values in official_pq(*pair).items():
            totals[category] = [a + b for a, b in zip(totals.get(category, [0.0, 0, 0, 0]), values, strict=True)]

    def average(ids: Sequence[int]) -> list[float | None]:
        sums, n = [0.0, 0.0, 0.0], 0
        for iou, tp, fp, fn in (totals.get(i, [0.0, 0, 0, 0]) for i in ids):
            if tp + fp + fn:
                segments = tp + 0.5 * fp + 0.5 * fn
                values = [(iou / segments) * 100, (iou / tp if tp else 0) * 100, (tp / segments) * 100]
                sums, n = [a + b for a, b in zip(sums, values, strict=True)], n + 1
        return [s / n for s in sums] if n else [None] * 3

    things = [i for i, (_, isthing) in classes.items() if isthing]
    groups = {"": list(classes), "_things": things, "_stuff": [i for i in classes if i not in things]}
    figures: Figures = {}
    for suffix, ids in groups.items():
        figures |= {(f"{m}{suffix}", ""): v for m, v in zip(("pq", "sq", "rq"), average(ids), strict=True)}
    for i, (name, _) in classes.items():
        figures |= {(m, name): v for m, v in zip(("pq", "sq", "rq"), average([i]), strict=True)}
    return figures


# -- instances: eval/ins_seg.py ----------------------------------------------------------------------------------------


class _OneClass:
    """Objects by id and detections of one class in an image, the best first: masks, attributes, scores, IoUs."""

    def __init__(self, truth: Rgba, predicted: Rgba, scores: Scores, category: int) -> None:
        shown = objects_of(predicted)
        listed = [(*shown[i], s) for i, s in sorted(scores, key=lambda pair: pair[1], reverse=True) if i in shown]
        found = [(mask, score) for mask, c, _, score in listed if c == category]
        objects = [(mask, flags) for mask, c, flags in objects_of(truth).values() if c == category]
        self.flags, self.scores = [f for _, f in objects], [s for _, s in found]
        self.sizes, self.found_sizes = ([int(m.sum()) for m, _ in group] for group in (objects, found))
        self.ious = [[(m & o).sum() / (m | o).sum() for o, _ in objects] for m, _ in found]

    def matched(self, area: Sequence[float], thresholds: Any) -> dict[str, Any]:
        """compute_match of a range of sizes."""
        inside, found_inside = ([area[0] <= n <= area[1] for n in sizes] for sizes in (self.sizes, self.found_sizes))
        ignored = [bool(f & 1) or not fits for f, fits in zip(self.flags, inside, strict=True)]
        matches, ignores = np.zeros((2, len(thresholds), len(self.scores)))
        for t, threshold in enumerate(thresholds):
            free = [True] * len(self.flags)
            for d, row in enumerate(self.ious):
                ious = [iou if free[g] else 0.0 for g, iou in enumerate(row)]
                best = int(np.argmax(ious)) if ious else -1
                if best >= 0 and ious[best] >= threshold:
                    matches[t, d], ignores[t, d] = 1, ignored[best]
                    free[best] = bool(self.flags[best] & 2)
                else:
                    ignores[t, d] = not found_inside[d]
        return {
            "dtMatches": matches,
            "dtScores": np.array(self.scores),
            "gtIgnore": np.array(ignored, int),
            "dtIgnore": ignores.astype(bool),
        }


def official_instances(cases: Sequence[tuple[Rgba, Rgba, Scores]], names: Sequence[str]) -> Figures:
    """evaluate_ins_seg, in shares; None where it says NaN."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(iouType="segm")
        evaluator.params.catIds, evaluator.params.imgIds = list(range(1, len(names) + 1)), list(range(len(cases)))
        p = evaluator._paramsEval = evaluator.params
        evaluator.evalImgs = []
        for category in p.catIds:
            images = [_OneClass(*case, category) for case in cases]
            evaluator.evalImgs += [image.matched(area, p.iouThrs) for area in p.areaRng for image in images]
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    figures: Figures = {}
    for place in (slice(None), *range(len(names))):
        p_here, r_here = precision[:, :, place], recall[:, place]
        values = [p_here[..., 0, 2], p_here[[0]][..., 0, 2], p_here[[5]][..., 0, 2]]
        values += [p_here[..., size, 2] for size in (1, 2, 3)]
        values += [*(r_here[..., 0, most] for most in range(3)), *(r_here[..., size, 2] for size in (1, 2, 3))]
        name = "" if isinstance(place, slice) else names[place]
        for metric, v in zip(TWELVE, values, strict=True):
            figures[f"segm_{metric}", name] = float(np.mean(v[v > -1])) if (v > -1).any() else None
    return figures
