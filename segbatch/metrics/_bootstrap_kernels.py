"""The compiled loop of ``coco_bootstrap``; imported on first use, because importing numba takes long."""

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels

_EPSILON = 2.0**-52
"""np.spacing(1)"""


def accumulate(
    hit: NDArray[np.uint8],
    change: NDArray[np.int64],
    place: NDArray[np.int64],
    unit: NDArray[np.int64],
    rank: NDArray[np.int64],
    before: NDArray[np.int64],
    times: NDArray[np.int64],
    objects: NDArray[np.int64],
    most: NDArray[np.int64],
    recalls: NDArray[np.float64],
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
) -> None:
    """Mean precision and greatest recall of one class at one IoU in one range of sizes, for every resample.

    Copies of a unit stand beside each other. Where they are hits, precision rises over them, so the last one decides.
    Misses are counted for all IoUs together, in ``before``; only hits, and detections that are neither right nor wrong
    at some IoUs, are looked at here.

    Args:
        hit: 1 where a detection is right; the best first.
        change: 1 where it counts here and not in ``before``, -1 the other way round, else 0.
        place: in ``before``.
        unit: that it belongs to.
        rank: among those of its class in its image, from 0.
        before: detections that count up to a place, that one included, (resamples, places).
        times: how often a unit is drawn, (resamples, units).
        objects: that count, (resamples,).
        most: detections per image and class that count, ascending.
        recalls: at which the precision is sampled, ascending.
        precision: (resamples,), with the most detections; left as it is where no object counts.
        recall: (resamples, most), likewise.
    """
    levels = np.empty(hit.size, np.float64)
    found = np.empty(hit.size, np.int64)
    for b in range(times.shape[0]):
        if objects[b] == 0:
            continue
        hits = changed = events = 0
        for m in range(most.size):
            recall[b, m] = 0
        for i in range(hit.size):
            n = times[b, unit[i]]
            changed += n * change[i]
            if n == 0 or hit[i] == 0:
                continue
            hits += n
            levels[events] = hits / (np.float64(before[b, place[i]] + changed) + _EPSILON)
            found[events] = hits
            events += 1
            for m in range(most.size):
                if rank[i] < most[m]:
                    recall[b, m] += n
        for i in range(events - 1, 0, -1):
            levels[i - 1] = max(levels[i - 1], levels[i])
        total = 0.0
        i = 0
        for r in range(recalls.size):
            while i < events and found[i] / objects[b] < recalls[r]:
                i += 1
            if i == events:
                break
            total += levels[i]
        precision[b] = total / recalls.size
        for m in range(most.size):
            recall[b, m] /= objects[b]


def _signature(_: Any, __: Any) -> Any:
    def read(item: Any, dimensions: int = 1) -> Any:
        return types.Array(item, dimensions, "C", readonly=True)

    number, real = types.int64, types.float64
    return types.void(
        read(types.uint8),
        read(number),
        read(number),
        read(number),
        read(number),
        read(number, 2),
        read(number, 2),
        read(number),
        read(number),
        read(real),
        types.Array(real, 1, "C"),
        types.Array(real, 2, "C"),
    )


kernel = Kernels(_signature).kernel
