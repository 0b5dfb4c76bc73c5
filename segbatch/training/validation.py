"""Mean IoU of validation photos, on their own grid, while a model is trained.

Counts are summed over all photos; void pixels of the ground truth are left out. The mean is over the classes that
truth or prediction show. ``segbatch evaluate`` gives the official figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segbatch.inference.pipeline import Predictor
from segbatch.models.base import Segmenter
from segbatch.training.samples import SampleSet


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean IoU and the IoU of each class by name; None where nothing of the class was seen."""

    miou: float | None
    iou: Mapping[str, float | None]


def validate(segmenter: Segmenter, samples: SampleSet) -> Validation:
    """Predict every photo and compare.

    Raises:
        DataError: a broken sample, or a model that gives unknown classes.
    """
    predictor = Predictor(segmenter, batch_size=1)
    ids = np.array([c.label_id for c in samples.classes.classes], np.int64)
    index = np.zeros(1 << 16, np.int64)
    index[ids] = np.arange(len(ids))
    confusion = np.zeros((len(ids), len(ids)), np.int64)
    for number in range(len(samples)):
        pair = samples.get(number)
        label_map, _ = predictor.finish(predictor.forward([predictor.prepare(pair.rgb)])[0])
        confusion += _confusion(pair.classes, index[label_map], len(ids))
    return _figures(confusion, [c.name for c in samples.classes.classes])


def _confusion(truth: NDArray[np.int16], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """(classes, classes) pixel counts, truth down, of the pixels that are not void."""
    seen = truth >= 0
    pairs = truth[seen].astype(np.int64) * classes + predicted[seen]
    counts: NDArray[np.int64] = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return counts


def _figures(confusion: NDArray[np.int64], names: list[str]) -> Validation:
    hits = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = {n: int(h) / int(u) if u else None for n, h, u in zip(names, hits, union, strict=True)}
    shown = [v for v in iou.values() if v is not None]
    return Validation(sum(shown) / len(shown) if shown else None, iou)
