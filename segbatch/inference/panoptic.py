"""Things and stuff merged into one map: the rules of Panoptic FPN (Kirillov, Girshick, He, Dollar, CVPR 2019, section
4.1), with the thresholds and the order of detectron2's ``combine_semantic_and_instance_outputs``.

Things go first, by score: one that better ones cover by more than ``choice.overlap`` is dropped, else it gets the
pixels that are left. What remains goes to the stuff classes; a stuff class of fewer than ``choice.stuff_area`` pixels
is void.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import rle
from segbatch.models.base import Choice
from segbatch.records import ClassTable, Segment

SOME_THING = 0
"""Channel of the semantic branch that stands for all things."""


def merge(
    things: Sequence[tuple[int, NDArray[np.uint32]]], semantic: NDArray[np.uint16], classes: ClassTable, choice: Choice
) -> tuple[NDArray[np.uint16], tuple[Segment, ...]]:
    """The panoptic index map and its segments.

    Args:
        things: (class index, run lengths of the mask) of the objects, the best first.
        semantic: (height, width): ``SOME_THING``, or 1 + number of the stuff class in class order.
        classes: things and stuff.
        choice: ``overlap`` and ``stuff_area``.

    Returns:
        (height, width) uint16: n + 1 for the n-th segment, 0 for void; the segments.
    """
    from segbatch.inference.kernels import claim

    height, width = semantic.shape
    index_map = np.zeros(width * height, np.uint16)
    categories: list[int] = []
    for index, runs in things:
        if claim(index_map, runs, len(categories) + 1, choice.overlap):
            categories.append(classes.classes[index].label_id)
    merged = np.ascontiguousarray(index_map.reshape(width, height).T)
    stuff = [c for c in classes.classes if not c.isthing]
    free = merged == 0
    for number, info in enumerate(stuff, SOME_THING + 1):
        pixels = free & (semantic == number)
        if int(np.count_nonzero(pixels)) >= max(choice.stuff_area, 1):
            categories.append(info.label_id)
            merged[pixels] = len(categories)
    return merged, segments_of(merged, categories)


def segments_of(index_map: NDArray[np.uint16], categories: Sequence[int]) -> tuple[Segment, ...]:
    """The segments of an index map whose values 1..len(categories) all occur."""
    found = rle.instances_of(index_map, background=(0,))
    return tuple(
        Segment(n, category, float(area), (box[0], box[1], box[2], box[3]))
        for n, category, area, box in zip(
            found.ids.tolist(), categories, found.areas, found.boxes_xywh.tolist(), strict=True
        )
    )
