"""Boundary AP against the official rule, written down anew on top of pycocotools, and against faster-coco-eval."""

import contextlib
import copy
import io
from typing import Any

import cv2
import numpy as np
import pytest
from coco_cases import TWELVE, Case, defined_mean, instance_rows, official, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from segbatch.codecs import rle
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.base import MetricOptions
from segbatch.metrics.boundaries import boundary_width
from segbatch.metrics.coco_instance import CocoBoundaryMetric
from segbatch.metrics.coco_matching import overlaps_of
from segbatch.metrics.columns import instances_of
from segbatch.records import ClassInfo, ClassTable

Mask = NDArray[np.uint8]
CAT = ClassTable((ClassInfo(1, "cat"),))


def boundary(mask: Mask, width: int) -> Mask:
    """``mask_to_boundary`` pixel by pixel: each of ``width`` steps takes away what touches the background."""
    inner = np.pad(mask, 1)
    for _ in range(width):
        around = np.pad(inner, 1, constant_values=1)
        rows, columns = inner.shape
        inner = np.min([around[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0)
    shown: Mask = mask - inner[1:-1, 1:-1]
    return shown


def official_width(height: int, width: int, ratio: float) -> int:
    return max(int(round(ratio * np.sqrt(height**2 + width**2))), 1)  # noqa: RUF046 - as the official code has it


class Boundary(COCOeval):  # type: ignore[misc]
    """``computeBoundaryIoU`` of boundary-iou-api; all else is its copy of pycocotools."""

    ratio = 0.02

    def _boundary(self, entry: dict[str, Any]) -> Any:
        mask = coco_mask.decode(entry["segmentation"])
        return coco_mask.encode(np.asfortranarray(boundary(mask, official_width(*mask.shape, self.ratio))))

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        ious = super().computeIoU(imgId, catId)
        labels = [catId] if self.params.useCats else self.params.catIds
        truth, found = ([e for c in labels for e in side[imgId, c]] for side in (self._gts, self._dts))
        if not len(truth) or not len(found):
            return ious
        order = np.argsort([-d["score"] for d in found], kind="mergesort")[: self.params.maxDets[-1]]
        crowd = [int(g["iscrowd"]) for g in truth]
        edges = [self._boundary(found[i]) for i in order], [self._boundary(g) for g in truth]
        lesser = np.minimum(ious, coco_mask.iou(*edges, crowd))
        return np.where(np.array(crowd) == 0, lesser, ious)


def wanted(case: Case, ratio: float) -> dict[tuple[str, str], float | None]:
    """Everything by name, but proposals of one size or number."""
    evaluator = type("With", (Boundary,), {"ratio": ratio})
    run = official(case, "segm", evaluator=evaluator)
    found: dict[tuple[str, str], float | None] = {}
    for name, value in zip(TWELVE, run.stats.tolist(), strict=True):
        found[f"boundary_{name}", ""] = None if value == -1 else value
    for k, label in enumerate(case.labels):
        found["boundary_ap", f"class{label}"] = defined_mean(run.eval["precision"][:, :, k, 0, 2])
        found["boundary_ar_small", f"class{label}"] = defined_mean(run.eval["recall"][:, k, 1, 2])
    recall = official(case, "segm", by_class=False, evaluator=evaluator).eval["recall"]
    for m, most in enumerate((10, 100, 1000)):
        found[f"boundary_proposal_ar_{most}", ""] = defined_mean(recall[:, 0, 0, m])
    return found


def figures(case: Case, options: MetricOptions) -> dict[tuple[str, str], float | None]:
    metric = registry.make("coco-boundary", case.classes, options)
    total = metric.merge([metric.update(*pair) for pair in instance_rows(case)])
    return {(f.metric, f.class_name): f.value for f in metric.compute(total)}


def solid_case(seed: int) -> Case:
    """A random case, and beside it objects with an inside, found some pixels away, larger, smaller, or with a hole."""
    rng, case = np.random.default_rng(seed), random_case(seed)
    for image_id in (200, 201):
        height, width = (int(v) for v in rng.integers(30, 90, 2))
        case.images.append({"id": image_id, "height": height, "width": width, "file_name": f"{image_id}.jpg"})
        for _ in range(rng.integers(1, 6)):
            y, x, side = int(rng.integers(-9, height - 9)), int(rng.integers(-9, width - 9)), int(rng.integers(9, 60))
            label = int(rng.choice(case.labels))
            box = drawn(height, width, y, x, side)
            case.annotations.append(entry(box, image_id, label, id=len(case.annotations) + 1))
            case.annotations[-1]["iscrowd"] = int(rng.random() < 0.2)
            for _ in range(rng.integers(0, 4)):
                dy, dx, more = rng.integers(-2, 3, 3).tolist()
                mask = drawn(height, width, y + dy, x + dx, side + more)
                if rng.random() < 0.4:
                    mask[max(y + side // 2, 0) : y + side // 2 + 2, max(x + side // 2, 0) : x + side // 2 + 2] = 0
                case.results.append(entry(mask, image_id, label, score=float(rng.integers(0, 9)) / 8))
    return case


def drawn(height: int, width: int, y: int, x: int, side: int) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    mask[max(y, 0) : y + side, max(x, 0) : x + side] = 1
    return mask


def entry(mask: Mask, image_id: int, label: int, **more: Any) -> dict[str, Any]:
    segmentation = {"size": list(mask.shape), "counts": rle.encode(mask).decode()}
    known = {"image_id": image_id, "category_id": label, "area": float(mask.sum()), "bbox": [0.0] * 4}
    return {**known, "segmentation": segmentation, **more}


def check_case(seed: int) -> bool:
    """Whether boundaries made a difference."""
    case, ratio = solid_case(seed), (0.02, 0.04, 0.1)[seed % 3]
    found, expected = figures(case, MetricOptions(boundary=ratio)), wanted(case, ratio)
    assert {key: found[key] for key in expected} == expected, seed
    masks = official(case, "segm").stats.tolist()
    return [found[f"boundary_{name}", ""] for name in TWELVE] != [None if v == -1 else v for v in masks]


@pytest.mark.long
def test_all_figures_are_those_of_the_official_rule() -> None:
    different = sum(check_case(seed) for seed in range(30) if seed % 10 != 7)
    assert different >= 10


@pytest.mark.slow
def test_all_figures_are_those_of_the_official_rule_in_many_cases() -> None:
    assert sum(map(check_case, range(30, 600))) > 100


# -- the overlaps themselves -----------------------------------------------------------------------------------------


def blob(rng: np.random.Generator, size: tuple[int, int]) -> Mask:
    """Rectangles with holes, slits and single pixels, some of them at the border."""
    mask = np.zeros(size, np.uint8)
    for value in (1, 1, 0, 1, 0):
        y, x = rng.integers(-10, size[0]), rng.integers(-10, size[1])
        mask[max(y, 0) : y + rng.integers(1, 1 + size[0]), max(x, 0) : x + rng.integers(1, 1 + size[1])] = value
    for _ in range(rng.integers(0, 4)):
        mask[rng.integers(size[0]), rng.integers(size[1])] ^= 1
    return mask


def rows(objects: list[Mask], found: list[Mask], crowds: list[bool], texts: list[bytes] | None = None) -> Any:
    """An image with these masks; ``texts`` are the objects' counts where they are not those of the encoder."""
    height, width = objects[0].shape
    case = Case([1], [{"id": 1, "height": height, "width": width}])
    for masks, entries in ((objects, case.annotations), (found, case.results)):
        for number, mask in enumerate(masks, 1):
            crowd = int(masks is objects and crowds[number - 1])
            entries.append(entry(mask, 1, 1, id=number, score=0.5, iscrowd=crowd))
    for annotation, text in zip(case.annotations, texts or [], strict=False):
        annotation["segmentation"]["counts"] = text.decode()
    return instance_rows(case)[0]


def iou(a: Mask, b: Mask) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 70), st.sampled_from((0.001, 0.02, 0.05, 0.1, 0.3, 1)))
@pytest.mark.long
def test_every_overlap_is_that_of_the_pixels(seed: int, height: int, width: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    objects = [blob(rng, (height, width)) for _ in range(3)]
    found = [blob(rng, (height, width)) for _ in range(3)] + [objects[0], objects[1] & objects[2]]
    truth, predicted = rows(objects, found, [False, False, True])
    got = overlaps_of("boundary", truth, instances_of(truth), instances_of(predicted), 1e-9, part)
    wide = boundary_width(height, width, part)
    assert wide == official_width(height, width, part)
    edges = {id(m): boundary(m, wide) for m in (*objects, *found)}
    for i, mask in enumerate(found):
        assert got.areas[i] == mask.sum()
        for j in range(2):
            lesser = min(iou(mask, objects[j]), iou(edges[id(mask)], edges[id(objects[j])]))
            assert got.ious[i, j] == lesser
        covered = int((mask & objects[2]).sum()) / max(int(mask.sum()), 1)
        assert got.ious[i, 2] == covered


def test_the_rule_is_that_of_opencv() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask, wide = blob(rng, (40, 50)), int(rng.integers(1, 6))
        inner = cv2.erode(np.pad(mask, 1), np.ones((3, 3), np.uint8), iterations=wide)[1:-1, 1:-1]
        assert (boundary(mask, wide) == mask - inner).all()


def test_runs_of_no_pixels_do_not_make_boundaries() -> None:
    mask = np.zeros((30, 30), np.uint8)
    mask[5:25, 5:25] = 1
    lengths = rle.from_string(rle.encode(mask))
    split = np.concatenate([lengths[:1], [9, 0, lengths[1] - 9], lengths[2:]]).astype(np.uint32)
    truth, predicted = rows([mask], [mask], [False], [rle.to_string(split)])
    got = overlaps_of("boundary", truth, instances_of(truth), instances_of(predicted), 0.5, 0.05)
    assert got.ious.tolist() == [[1.0]]


def test_widths_are_rounded_half_to_even() -> None:
    assert boundary_width(30, 40, 0.05) == official_width(30, 40, 0.05) == 2  # 2.5
    assert boundary_width(30, 40, 0.07) == official_width(30, 40, 0.07) == 4  # 3.5
    assert boundary_width(1, 1) == 1


@pytest.mark.parametrize("part", [0.0, -0.1, 1.5, float("nan")])
def test_widths_out_of_range_are_refused(part: float) -> None:
    with pytest.raises(ConfigError, match="the boundary's width is"):
        CocoBoundaryMetric(CAT, MetricOptions(boundary=part))


def test_masks_that_cannot_be_are_refused_by_name() -> None:
    mask = np.ones((4, 4), np.uint8)
    truth, predicted = rows([mask], [mask], [False], [b"3"])
    with pytest.raises(DataError, match="the mask of object 1: COCO counts cover 3 pixels") as caught:
        CocoBoundaryMetric(CAT).update(truth, predicted)
    assert caught.value.code == "bad-mask"


# -- faster-coco-eval ------------------------------------------------------------------------------------------------


def faster_stats(case: Case) -> list[float | None]:
    """``COCOeval_faster`` with its own reader: pycocotools' has no boundaries."""
    faster = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    categories = [{"id": i, "name": str(i)} for i in case.labels]
    parts = {"images": case.images, "annotations": copy.deepcopy(case.annotations), "categories": categories}
    fed = [{k: v for k, v in r.items() if k not in ("bbox", "area")} for r in case.results]
    with contextlib.redirect_stdout(io.StringIO()):
        ground = faster.COCO({"info": {}, **parts})
        run = faster.COCOeval_faster(ground, ground.loadRes(copy.deepcopy(fed)), "boundary")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if v == -1 else float(v) for v in run.stats[:12]]


def is_agreed(height: int, width: int, part: float) -> bool:
    """Whether faster-coco-eval has the official boundaries for images of this size.

    It has not where a boundary is half as wide as a side or wider, and may not where the width ends in .5 before it is
    rounded: that goes down in its C++ code, to even in Python.
    """
    exact = part * float(np.sqrt(height**2 + width**2))
    return min(height, width) > 2 * official_width(height, width, part) and exact % 1 != 0.5


def agreed(case: Case) -> Case:
    kept = [i for i in case.images if is_agreed(i["height"], i["width"], 0.02)]
    ids = {i["id"] for i in kept}
    annotations, results = ([e for e in es if e["image_id"] in ids] for es in (case.annotations, case.results))
    return Case(case.labels, kept, annotations, results)


@pytest.mark.long
def test_faster_coco_eval_says_the_same() -> None:
    for seed in range(100, 140):
        case = agreed(solid_case(seed))
        found = figures(case, MetricOptions())
        for name, value in zip(TWELVE, faster_stats(case), strict=True):
            assert found[f"boundary_{name}", ""] == pytest.approx(value, abs=1e-12), (seed, name)


def test_faster_coco_eval_differs_in_flat_images_and_halves_alone() -> None:
    """Its other implementation, with OpenCV, is the official one: it never differs."""
    faster = pytest.importorskip("faster_coco_eval.core.mask", reason="faster-coco-eval is not installed")
    rng, different = np.random.default_rng(0), 0
    for _ in range(600):
        height, width = (int(v) for v in rng.integers(1, 60, 2))
        mask, part = blob(rng, (height, width)), float(rng.choice([0.02, 0.05, 0.1]))
        runs = {"size": [height, width], "counts": rle.encode(mask)}
        expected = boundary(mask, official_width(height, width, part))
        quick, slow = (faster.rleToBoundary(runs, part, backend)["counts"] for backend in ("mask_api", "opencv"))
        assert (coco_mask.decode({**runs, "counts": slow}) == expected).all()
        same = bool((coco_mask.decode({**runs, "counts": quick}) == expected).all())
        assert same or not is_agreed(height, width, part)
        different += not same
    assert different
