"""Figures of the validation photos while a model is trained.

Semantic networks: mean IoU on the upright photo. Counts are summed over all photos; void pixels of the ground truth are
left out; the mean is over the classes that truth or prediction show. Instance networks: mask AP and AP50; panoptic
networks: PQ; both by the evaluators of ``segbatch.metrics``, on the stored pixel grid, against the rows of the samples
table. ``segbatch evaluate`` gives the official figures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.inference.pipeline import Predictor
from segbatch.inference.turning import turn_back
from segbatch.metrics import registry
from segbatch.metrics.base import Row
from segbatch.models.base import Segmenter
from segbatch.records import Instance, Prediction, Segment, Task
from segbatch.training.samples import SampleSet

Figures = dict[str, Any]

_PROTOCOLS: Mapping[Task, str] = {"instance": "coco-instance", "panoptic": "coco-panoptic"}
_FIGURES: Mapping[Task, Mapping[str, str]] = {
    "instance": {"val_ap": "segm_ap", "val_ap50": "segm_ap50"},
    "panoptic": {"val_pq": "pq"},
}
"""What a figure of ours is called by the evaluator."""

_SIZE = ("sample_id", "height", "width", "exif_orientation", "status")


def validate(segmenter: Segmenter, samples: SampleSet) -> Figures:
    """Predict every photo and compare.

    Args:
        segmenter: the network; its spec says which detections count.
        samples: what it is compared with, of its task.

    Returns:
        ``val_miou`` and ``val_iou`` (by class name; None where nothing of the class was seen), or ``val_ap`` and
        ``val_ap50``, or ``val_pq``. A figure is None where it is undefined.

    Raises:
        DataError: a broken sample, or a model that gives unknown classes.
    """
    predictor = Predictor(segmenter, 1)
    if samples.task == "semantic":
        return _semantic(predictor, samples)
    return _official(predictor, samples)


def _official(predictor: Predictor, samples: SampleSet) -> Figures:
    """By the evaluator of the task."""
    task = samples.task
    metric = registry.make(_PROTOCOLS[task], samples.table)
    states = []
    for number in range(len(samples)):
        truth = samples.row(number, (*_SIZE, *metric.truth_columns))
        size = {name: truth.column(name)[0].as_py() for name in _SIZE}
        found = predictor.predict(samples.get(number).image)
        found = turn_back(found, size["exif_orientation"] or 1, size["height"], size["width"])
        states.append(metric.update(Row(truth, 0), Row(_masks_row(found, size), 0)))
    figures = {f.metric: f.value for f in metric.compute(metric.merge(states)) if not f.class_name and not f.slice}
    return {ours: figures[theirs] for ours, theirs in _FIGURES[task].items()}


def _masks_row(found: Prediction, size: Mapping[str, Any]) -> pa.RecordBatch:
    """A prediction as a row of the masks table, without what says where it comes from."""
    runs = None if found.panoptic is None else runlength.encode(found.panoptic)
    instances = None if found.instances is None else [_cell(i) | {"score": i.score or 0.0} for i in found.instances]
    segments = None if found.segments is None else [_cell(s) for s in found.segments]
    cells: dict[str, Any] = {
        **{name: [size[name]] for name in _SIZE if name in schemas.MASKS.names},
        "instances": [instances],
        "panoptic": columns.panoptic_array([runs]),
        "segments": [segments],
    }
    fields = [schemas.MASKS.field(name) for name in cells]
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(cells.values(), fields, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def _cell(found: Instance | Segment) -> dict[str, Any]:
    names = ("id", "category_id", "area", "bbox_xywh", "iscrowd")
    cell = {name: getattr(found, name) for name in names}
    return cell | {"counts": found.counts} if isinstance(found, Instance) else cell


def _semantic(predictor: Predictor, samples: SampleSet) -> Figures:
    ids = np.array([c.label_id for c in samples.classes.classes], np.int64)
    index = np.zeros(1 << 16, np.int64)
    index[ids] = np.arange(len(ids))
    confusion = np.zeros((len(ids), len(ids)), np.int64)
    for number in range(len(samples)):
        found = samples.get(number)
        label_map = predictor.predict(found.image).semantic
        assert label_map is not None and found.classes is not None
        confusion += _confusion(found.classes, index[label_map], len(ids))
    return _ious(confusion, [c.name for c in samples.classes.classes])


def _confusion(truth: NDArray[np.int16], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """(classes, classes) pixel counts, truth down, of the pixels that are not void."""
    seen = truth >= 0
    pairs = truth[seen].astype(np.int64) * classes + predicted[seen]
    counts: NDArray[np.int64] = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return counts


def _ious(confusion: NDArray[np.int64], names: list[str]) -> Figures:
    hits = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = {n: int(h) / int(u) if u else None for n, h, u in zip(names, hits, union, strict=True)}
    shown = [v for v in iou.values() if v is not None]
    return {"val_miou": sum(shown) / len(shown) if shown else None, "val_iou": iou}
