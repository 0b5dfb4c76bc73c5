"""Compiled loops of ``tide``; imported on first use, because importing numba takes long.

Source: ``TIDEExample``, ``TIDERun._eval_image`` and ``APDataObject.get_ap`` of tidecv 1.0.1
(github.com/dbolya/tide, commit 49a5d2a).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from segbatch.codecs._jit import Kernels, part
from segbatch.metrics._coco_kernels import Flags, Floats, Offsets, _read, _write

RIGHT, CLASS, BOX, OTHER, DUPLICATE, BACKGROUND = range(6)
"""What a detection is."""

FOUND, CORRECTABLE, MISSED = range(3)
"""What becomes of an object."""


@part
def _first_best(ious: Floats, row: Any, wanted: Flags) -> tuple[Any, Any]:
    """Place and IoU of the first object with the greatest IoU among those wanted; (-1, 0) where it is 0."""
    place, best = -1, 0.0
    for j in range(wanted.size):
        if wanted[j] and ious[row, j] > best:
            place, best = j, ious[row, j]
    return place, best


@part
def _matched(
    ious: Floats, classes: Offsets, object_classes: Offsets, crowd: Flags, least: Any, taken: Flags, used: Flags
) -> None:
    """Which objects are taken and which detections are used; those on a crowd of their class are 2."""
    wanted = np.empty(taken.size, np.uint8)
    for i in range(classes.size):
        for j in range(taken.size):
            wanted[j] = object_classes[j] == classes[i] and not crowd[j] and not taken[j]
        place, best = _first_best(ious, i, wanted)
        if place >= 0 and best >= least:
            taken[place] = used[i] = 1
    for i in range(classes.size):
        for j in range(taken.size):
            if not used[i] and crowd[j] and object_classes[j] == classes[i] and ious[i, j] > least:
                used[i] = 2


@part
def _error(ious: Floats, row: Any, same: Flags, counts: Flags, taken: Flags, least: Any, background: Any) -> Any:
    """What is wrong with a detection, and the object that it should have been; -1 for none."""
    place, best = _first_best(ious, row, counts & same)
    if background <= best <= least:
        return BOX, place
    place, best = _first_best(ious, row, counts & (1 - same))
    if best >= least:
        return CLASS, place
    if _first_best(ious, row, taken & same)[1] >= least:
        return DUPLICATE, -1
    if _first_best(ious, row, counts)[1] <= background:
        return BACKGROUND, -1
    return OTHER, -1


def classify(
    ious: Floats,
    classes: Offsets,
    object_classes: Offsets,
    crowd: Flags,
    least: Any,
    background: Any,
    errors: Offsets,
    ignored: Flags,
    fixed: Offsets,
    fates: Offsets,
) -> None:
    """Match the detections of one image with its objects, and say what is wrong.

    Args:
        ious: (detections, objects), the best detection first, objects in the order of the file.
        classes, object_classes: of both.
        crowd: 1 for objects that are regions to ignore.
        least: IoU from which on a detection is right.
        background: IoU up to which it lies on background.
        errors: for each detection ``RIGHT`` or its error.
        ignored: 1 for detections that are neither right nor wrong.
        fixed: for each detection the place of the object that it would have if its error were fixed, else -1.
        fates: for each object what becomes of it; any number for a crowd.
    """
    taken, used = np.zeros(object_classes.size, np.uint8), np.zeros(classes.size, np.uint8)
    _matched(ious, classes, object_classes, crowd, least, taken, used)
    counts = (crowd == 0).astype(np.uint8)
    best = np.full(object_classes.size, -1)  # the first detection that an object could be corrected with
    for i in range(classes.size):
        errors[i], ignored[i], fixed[i] = RIGHT, used[i] == 2, -1
        if used[i] != 1:
            same = (object_classes == classes[i]).astype(np.uint8)
            errors[i], place = _error(ious, i, same, counts, taken, least, background)
            if place >= 0 and not taken[place] and best[place] < 0:
                best[place] = i
                fixed[i] = place
    for j in range(object_classes.size):
        fates[j] = FOUND if taken[j] else CORRECTABLE if best[j] >= 0 else MISSED


def average_precisions(right: Flags, starts: Offsets, objects: Offsets, found: Floats) -> None:
    """AP of every class: the mean of the precision at 101 recalls.

    Args:
        right: 1 for detections that are right, by class, the best first.
        starts: where those of each class begin, and the last one's end.
        objects: of each class.
        found: the APs; 0 where there is no object.
    """
    precision = np.empty(right.size, np.float64)
    for place in range(objects.size):
        found[place] = 0.0
        if objects[place] == 0:
            continue
        hits = 0
        for i in range(starts[place], starts[place + 1]):
            if right[i]:
                precision[hits] = (hits + 1) / (i - starts[place] + 1)
                hits += 1
        for i in range(hits - 1, 0, -1):
            precision[i - 1] = max(precision[i - 1], precision[i])
        total = 0.0
        i = 0
        for percent in range(101):
            while i < hits and (i + 1) / objects[place] < percent / 100:
                i += 1
            total += precision[i] if i < hits else 0.0
        found[place] = total / 101


def _signature(function: Callable[..., Any], _: Any) -> Any:
    number, floats, flag = types.int64, types.float64, types.uint8
    signatures: dict[Callable[..., Any], Any] = {
        classify: types.void(
            _read(floats, 2),
            _read(number),
            _read(number),
            _read(flag),
            floats,
            floats,
            _write(number),
            _write(flag),
            _write(number),
            _write(number),
        ),
        average_precisions: types.void(_read(flag), _read(number), _read(number), _write(floats)),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
