"""From what transformers' post-processing gives to predictions.

Its maps of segments hold ids that mean nothing outside; a pixel whose id is in no ``segments_info`` is void (some
processors write -1, some 0).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from segbatch.codecs import rle
from segbatch.errors import DataError
from segbatch.records import ClassTable, Instance, Segment

_MOST_SEGMENTS = 65535


def label_map(labels: Tensor, classes: ClassTable) -> NDArray[np.uint16]:
    """Label ids (height, width) of class indices; without a class table the indices are the ids.

    Raises:
        DataError: a class that the class table lacks.
    """
    found = labels.numpy()
    if not classes.classes:
        return found.astype(np.uint16)
    if found.size and int(found.max()) >= len(classes.classes):
        raise _unknown(int(found.max()), classes)
    ids = np.array([c.label_id for c in classes.classes], np.uint16)
    named: NDArray[np.uint16] = ids[found]
    return named


def instances(result: Mapping[str, Any], classes: ClassTable, size: tuple[int, int]) -> tuple[Instance, ...]:
    """The objects, the best first; those of which nothing is to be seen are left out.

    Args:
        result: of ``post_process_instance_segmentation``: ``segments_info``, and either a map (height, width) of their
            ids or masks (n, height, width) in their order.
        classes: the network's.
        size: (height, width).

    Raises:
        DataError: a class that the class table lacks.
    """
    infos: Sequence[Mapping[str, Any]] = result["segments_info"]
    masks = result["segmentation"].numpy()
    if masks.ndim == 3:
        counts = {int(info["id"]): rle.encode(mask != 0) for info, mask in zip(infos, masks, strict=True)}
    else:
        found = rle.instances_of(_shifted(masks), background=(0,))
        counts = {int(i) - 1: c for i, c in zip(found.ids, found.counts, strict=True)}
    seen = [i for i in infos if i["id"] in counts and rle.area(counts[i["id"]])]
    best = sorted(seen, key=lambda i: -float(i["score"]))
    return tuple(
        Instance(
            id=number,
            category_id=_label_id(info, classes),
            bbox_xywh=rle.bbox(counts[info["id"]], *size),
            area=float(rle.area(counts[info["id"]])),
            iscrowd=False,
            counts=counts[info["id"]],
            score=float(info["score"]),
        )
        for number, info in enumerate(best, 1)
    )


def panoptic(result: Mapping[str, Any], classes: ClassTable) -> tuple[NDArray[np.uint16], tuple[Segment, ...]]:
    """Index map (height, width) and segments.

    Segments of one stuff class become one, where the class table knows things: the same as with the library's
    ``label_ids_to_fuse`` (or ``stuff_classes``), without its giving an id twice.

    Args:
        result: of ``post_process_panoptic_segmentation``, nothing fused.
        classes: the network's.

    Raises:
        DataError: a class that the class table lacks, or more segments than an index map can hold.
    """
    infos: Sequence[Mapping[str, Any]] = result["segments_info"]
    shifted = _shifted(result["segmentation"].numpy())
    table = np.zeros(max([int(shifted.max(initial=0)), *(int(i["id"]) + 1 for i in infos)]) + 1, np.int64)
    joins = any(c.isthing for c in classes.classes)
    values: dict[tuple[int, int], int] = {}
    for number, info in enumerate(infos):
        label_id = _label_id(info, classes)
        stuff = joins and not classes.classes[int(info["label_id"])].isthing
        table[int(info["id"]) + 1] = values.setdefault((label_id, -1 if stuff else number), len(values) + 1)
    if len(values) > _MOST_SEGMENTS:
        raise DataError(f"{len(values)} segments in one photo", f"{_MOST_SEGMENTS} can be kept", "too-many-segments")
    index_map = table[shifted].astype(np.uint16)
    found = rle.instances_of(index_map, background=(0,))
    measured = {int(i): (float(a), b) for i, a, b in zip(found.ids, found.areas, found.boxes_xywh, strict=True)}
    return index_map, tuple(
        Segment(value, label_id, measured[value][0], tuple(measured[value][1].tolist()))
        for (label_id, _), value in values.items()
    )


def _shifted(ids: NDArray[Any]) -> NDArray[np.int64]:
    """Ids plus one: -1 becomes 0."""
    return ids.astype(np.int64) + 1


def _label_id(info: Mapping[str, Any], classes: ClassTable) -> int:
    index = int(info["label_id"])
    if index >= len(classes.classes):
        raise _unknown(index, classes)
    return classes.classes[index].label_id


def _unknown(index: int, classes: ClassTable) -> DataError:
    return DataError(
        f"the model gave class {index}, its class table has {len(classes.classes)} classes",
        "give the right class list with --classes",
        "unknown-class",
    )
