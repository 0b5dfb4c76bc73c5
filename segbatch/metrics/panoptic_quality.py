"""Panoptic quality from sums of IoUs and numbers of segments.

Source: A. Kirillov et al., "Panoptic Segmentation", CVPR 2019, equation 1; panopticapi, ``evaluation.py``.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.base import ClassCount
from segbatch.records import ClassInfo, Figure


class Totals(NamedTuple):
    """Sum of IoUs and numbers of segments, of shape (classes,) in class order."""

    iou: NDArray[np.float64]
    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    fn: NDArray[np.int64]


class Quality(NamedTuple):
    """Panoptic, segmentation and recognition quality: shares times a scale."""

    pq: float
    sq: float
    rq: float


def figures(totals: Totals, scored: Sequence[ClassInfo], scale: float = 1.0) -> list[Figure]:
    """All classes, things, stuff; then ``pq``, ``sq``, ``rq`` by class, in class order. Support is TP + FN.

    Args:
        totals: of all images.
        scored: the classes.
        scale: what values are multiplied by while they are averaged: 100 for evaluators that work in per cent, whose
            last bits depend on it. Figures are shares, 0..1.
    """
    found = qualities(totals, scale)
    support = (totals.tp + totals.fn).tolist()
    chosen = {
        "": range(len(scored)),
        "_things": [i for i, c in enumerate(scored) if c.isthing],
        "_stuff": [i for i, c in enumerate(scored) if not c.isthing],
    }
    made = []
    for suffix, places in chosen.items():
        values = mean([found[i] for i in places])
        objects = sum(support[i] for i in places)
        for name in Quality._fields:
            made.append(Figure(f"{name}{suffix}", share(values, name, scale), support=objects))
    for name in Quality._fields:
        for c, quality, objects in zip(scored, found, support, strict=True):
            made.append(Figure(name, share(quality, name, scale), c.name, support=objects))
    return made


def image_quality(totals: Totals, scale: float = 1.0) -> float | None:
    """An image's own panoptic quality, 0..1: the mean over the classes that occur in it; None without any."""
    return share(mean(qualities(totals, scale)), "pq", scale)


def class_counts(totals: Totals, scored: Sequence[ClassInfo]) -> tuple[ClassCount, ...]:
    """Of the classes that occur, in class order."""
    rows = zip(scored, *(t.tolist() for t in totals[1:]), strict=True)
    return tuple(ClassCount(c.name, c.label_id, tp, fp, fn) for c, tp, fp, fn in rows if tp + fp + fn)


def qualities(totals: Totals, scale: float) -> list[Quality | None]:
    """By class; None for those that do not occur."""
    found: list[Quality | None] = []
    for iou, tp, fp, fn in zip(*(t.tolist() for t in totals), strict=True):
        segments = tp + 0.5 * fp + 0.5 * fn
        mean_iou = iou / tp if tp else 0.0
        values = (iou / segments * scale, mean_iou * scale, tp / segments * scale) if segments else None
        found.append(Quality(*values) if values else None)
    return found


def mean(found: Iterable[Quality | None]) -> Quality | None:
    """Mean of those that are there, in their order; None without any."""
    there = [q for q in found if q is not None]
    if not there:
        return None
    sums = [0.0, 0.0, 0.0]
    for quality in there:
        sums = [s + q for s, q in zip(sums, quality, strict=True)]
    return Quality(*(s / len(there) for s in sums))


def share(quality: Quality | None, name: str, scale: float) -> float | None:
    """One of the three, 0..1."""
    return None if quality is None else float(getattr(quality, name)) / scale
