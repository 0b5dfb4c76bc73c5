"""From detections to instances: choice, suppression, masks at the photo's size straight to run lengths.

A mask of m x m probabilities becomes run lengths without ever being an image: one column of its box at a time. The
arithmetic is that of torchvision's ``paste_masks_in_image`` (torchvision/models/detection/roi_heads.py), so that its
models give the same pixels.
"""

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import rle
from segbatch.errors import DataError
from segbatch.models.base import Choice, Detections, Geometry
from segbatch.records import Instance


def best_first(found: Detections, choice: Choice) -> Detections:
    """The detections that count, the best first; equal scores keep their order.

    Raises:
        DataError: scores or boxes that are not numbers.
    """
    if not (np.isfinite(found.scores).all() and np.isfinite(found.boxes).all()):
        raise DataError("the model's boxes or scores are not numbers", "check the model's weights", "not-a-number")
    from segbatch.inference.kernels import suppress

    kept = np.flatnonzero(found.scores >= choice.min_score)
    kept = kept[np.argsort(-found.scores[kept], kind="stable")]
    if choice.nms_iou is not None:
        boxes = np.ascontiguousarray(found.boxes[kept], np.float32)
        kept = kept[suppress(boxes, found.classes[kept].astype(np.int64), choice.nms_iou)]
    return chosen(found, kept[: choice.top_k])


def chosen(found: Detections, which: NDArray[np.intp] | NDArray[np.bool_]) -> Detections:
    """Some of the detections."""
    return Detections(found.boxes[which], found.scores[which], found.classes[which], found.masks[which])


def on_photo(found: Detections, at: Geometry) -> Detections:
    """The same detections with boxes in pixels of the photo, cut at its borders.

    Masks keep covering the boxes as they were, so boxes are only cut by ``paste``.
    """
    scale = np.array([at.width / at.fed_width, at.height / at.fed_height] * 2, np.float32)
    return Detections(found.boxes * scale, found.scores, found.classes, found.masks)


def paste(found: Detections, height: int, width: int, threshold: float) -> list[NDArray[np.uint32]]:
    """Run lengths (down the columns, background first) of every detection's mask on the photo's grid.

    Args:
        found: boxes in pixels of the photo.
        height, width: of the photo.
        threshold: pixels whose probability is above it belong to the object.
    """
    from segbatch.inference.kernels import paste_runs

    side = found.masks.shape[-1]
    masks = np.zeros((len(found.masks), side + 2, side + 2), np.float32)
    masks[:, 1:-1, 1:-1] = found.masks
    boxes = _enlarged(found.boxes, np.float32((side + 2) / side))
    return [paste_runs(m, b, height, width, threshold) for m, b in zip(masks, boxes, strict=True)]


def instances(
    found: Detections, height: int, width: int, label_ids: NDArray[np.uint16], threshold: float
) -> tuple[Instance, ...]:
    """Instances on the photo's grid.

    Args:
        found: the best first, boxes in pixels of the photo.
        height, width: of the photo.
        label_ids: of the classes.
        threshold: see ``paste``.

    Raises:
        DataError: a class that the class table lacks.
    """
    if len(found.classes) and not 0 <= int(found.classes.min()) <= int(found.classes.max()) < len(label_ids):
        raise DataError(
            f"the model gave classes {int(found.classes.min())}..{int(found.classes.max())}, its class table has "
            f"{len(label_ids)}",
            "give the right class list with --classes",
            "unknown-class",
        )
    made = []
    limits = np.array([width, height, width, height], np.float64)
    for number, runs in enumerate(paste(found, height, width, threshold)):
        left, top, right, bottom = np.clip(found.boxes[number].astype(np.float64), 0, limits).tolist()
        made.append(
            Instance(
                id=number + 1,
                category_id=int(label_ids[found.classes[number]]),
                bbox_xywh=(left, top, right - left, bottom - top),
                area=float(runs[1::2].sum()),
                iscrowd=False,
                counts=rle.to_string(runs),
                score=float(found.scores[number]),
            )
        )
    return tuple(made)


def _enlarged(boxes: NDArray[np.float32], scale: np.float32) -> NDArray[np.int64]:
    """Boxes around the same centres, ``scale`` times as large, as whole pixels (torchvision's ``expand_boxes``)."""
    half = np.float32(0.5)
    wide, tall = (boxes[:, 2] - boxes[:, 0]) * half * scale, (boxes[:, 3] - boxes[:, 1]) * half * scale
    x, y = (boxes[:, 2] + boxes[:, 0]) * half, (boxes[:, 3] + boxes[:, 1]) * half
    return np.stack([x - wide, y - tall, x + wide, y + tall], 1).astype(np.int64)
