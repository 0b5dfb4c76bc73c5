"""Boundary AP against the official code: ``PYTHONPATH=tests python tests/bench/bench_boundary_ap.py [--coco FILE]``.

The official side is boundary-iou-api's: ``mask_to_boundary`` for every mask, by OpenCV in one thread, then its
``COCOeval``, which is pycocotools' with the lesser of two IoUs. Objects, detections and CPU seconds are as in
``bench_coco_metrics``. Both sides must say the same.
"""

import argparse
import contextlib
import io
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bench_coco_metrics import batches, drawn, ours, real, repeated, with_results
from coco_cases import TWELVE, Case
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segbatch.metrics.coco_instance import CocoBoundaryMetric, CocoInstanceMetric
from segbatch.records import ClassInfo, ClassTable

RATIO = 0.02


def mask_to_boundary(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As boundary_utils has it."""
    h, w = mask.shape
    dilation = max(round(RATIO * float(np.sqrt(h**2 + w**2))), 1)
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=dilation)
    shown: NDArray[np.uint8] = mask - inner[1 : h + 1, 1 : w + 1]
    return shown


class BoundaryEval(COCOeval):  # type: ignore[misc]
    """``computeBoundaryIoU``."""

    def augment(self) -> None:
        """``augment_annotations_with_boundary_single_core`` of both sides."""
        for coco in (self.cocoGt, self.cocoDt):
            for entry in coco.anns.values():
                shown = mask_to_boundary(coco.annToMask(entry))
                entry["boundary"] = coco_mask.encode(np.array(shown[:, :, None], order="F", dtype="uint8"))[0]

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        """For one image and class."""
        ious = super().computeIoU(imgId, catId)
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not truth or not found:
            return ious
        order = np.argsort([-d["score"] for d in found], kind="mergesort")[: self.params.maxDets[-1]]
        crowd = np.array([int(g["iscrowd"]) for g in truth])
        edges = [found[i]["boundary"] for i in order], [g["boundary"] for g in truth]
        lesser = coco_mask.iou(*edges, crowd.tolist())
        ious[:, crowd == 0] = np.minimum(ious[:, crowd == 0], lesser[:, crowd == 0])
        return ious


def official(case: Case) -> tuple[float, float, Any]:
    """CPU seconds for boundaries, and for the evaluation, from the index on; the figures."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        categories = [{"id": i, "name": str(i)} for i in case.labels]
        ground.dataset = {"images": case.images, "annotations": case.annotations, "categories": categories}
        ground.createIndex()
        results = ground.loadRes([{k: v for k, v in r.items() if k != "bbox"} for r in case.results])
        evaluator = BoundaryEval(ground, results, "segm")
        began = time.process_time()
        evaluator.augment()
        between = time.process_time()
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        return between - began, time.process_time() - between, evaluator.stats


def main() -> None:
    """Parse arguments, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coco", type=Path, help="annotation file of real images (instances_val2017.json)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    case = repeated(with_results(real(arguments.coco) if arguments.coco else drawn(rng, 50), rng), 1)
    print(f"{len(case.images)} images, {len(case.annotations)} objects, {len(case.results)} detections")
    rows, classes = batches(case), ClassTable(tuple(ClassInfo(i, str(i)) for i in case.labels))
    spent, figures = ours(CocoBoundaryMetric(classes), rows)
    plain, _ = ours(type("Masks", (CocoInstanceMetric,), {"kinds": ("segm",)})(classes), rows)
    boundaries, evaluation, stats = official(case)
    if [figures[f"boundary_{name}"] for name in TWELVE] != [None if v == -1 else v for v in stats.tolist()]:
        raise AssertionError("the figures differ")
    their = boundaries + evaluation
    print(f"boundary: official {boundaries:.2f} + {evaluation:.2f} s, segbatch {spent:.2f} s: {their / spent:.1f} x")
    print(f"of segbatch's time, masks alone would have taken {plain:.2f} s")


if __name__ == "__main__":
    main()
