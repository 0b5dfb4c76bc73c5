"""What comes out of somebody else's network, told by the shapes: maps, or detections of three kinds.

Maps (the output ``out`` where there is one, as torchvision names it, else the first):

- float (n, C, h, w), or (n, h, w, C) where the input has its channels last: logits, or what the side-car says;
- float (n, 1, h, w), (n, h, w, 1): the foreground's probability, or its logit: two classes;
- integers (n, h, w), (n, 1, h, w), (n, h, w, 1): labels.

Detections, with boxes in pixels of the network's input:

- YOLO with prototypes, as Ultralytics exports it (``Segment`` in ultralytics/nn/modules/head.py and
  ``process_mask_native`` in ultralytics/utils/ops.py): (n, 4 + C + p, anchors): centre, width and height of the box,
  probability of each class, coefficients; and prototypes (n, p, h, w). A mask is the sigmoid of coefficients times
  prototypes inside its box;
- the same with suppression in the graph (``nms=True``, ``end2end``): (n, k, 6 + p): left, top, right, bottom, score,
  class, coefficients; and prototypes;
- MMDeploy's (RTMDet-Ins and others: ``mmdeploy/codebase/mmdet``): float (n, k, 5): left, top, right, bottom, score;
  integers (n, k): class; float (n, k, h, w): probabilities, over the input where h and w are the input's, else a square
  grid over the box.

A mask is handed on as probabilities on a grid over its box, as fine as the finest box of the image is in prototypes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from segbatch.errors import DataError
from segbatch.models.base import Choice, Detections, Output
from segbatch.records import Task

Outputs = Mapping[str, NDArray[np.generic]]
"""What a run gives, by name, in the graph's order."""
Size = tuple[int, int]

UNDERSTOOD = (
    "understood are scores (n, C, h, w), labels (n, h, w), YOLO's (n, 4 + C + p, k) or (n, k, 6 + p) with prototypes "
    "(n, p, h, w), and MMDeploy's (n, k, 5) with labels (n, k) and masks (n, k, h, w)"
)
_USUAL = Choice()
_FINEST = 160
"""Cells along a side of a mask's grid, at most."""
_TINY = 1e-6
"""A probability is kept this far from 0 and 1 before its logarithm is taken."""


class Declared(NamedTuple):
    """An output.

    Attributes:
        name: as the graph calls it; its number where it does not.
        shape: None for what depends on the input.
        kind: numpy's letter: f, i, u, b.
    """

    name: str
    shape: tuple[int | None, ...]
    kind: str

    def __str__(self) -> str:
        sizes = ", ".join("?" if s is None else str(s) for s in self.shape)
        return f"{self.name} {_KINDS.get(self.kind, self.kind)} ({sizes})"


_KINDS = {"f": "float", "i": "integer", "u": "integer", "b": "boolean"}


class Reading(Protocol):
    """How outputs become what ``ModelSpec.output`` says."""

    @property
    def task(self) -> Task:
        """What is predicted."""
        ...

    @property
    def output(self) -> Output:
        """See ``ModelSpec.output``."""
        ...

    @property
    def channels(self) -> int | None:
        """How many classes there are; None where the shapes do not say."""
        ...

    @property
    def choice(self) -> Choice:
        """Usual for such outputs."""
        ...

    def read(self, outputs: Outputs, size: Size, choice: Choice) -> NDArray[np.generic] | list[Detections]:
        """One entry for each image.

        Args:
            outputs: of one run.
            size: (height, width) of the network's input.
            choice: which detections count.

        Raises:
            DataError: values that cannot be what they were taken for.
        """
        ...


def reading(outputs: Sequence[Declared], layout: str, said: Output | None) -> Reading | None:
    """How these outputs are read; None where they are not understood.

    Args:
        outputs: in the graph's order.
        layout: of the input, ``nchw`` or ``nhwc``.
        said: what the side-car calls them.
    """
    return _yolo(outputs) or _boxed(outputs) or _maps(outputs, layout, said)


def _maps(outputs: Sequence[Declared], layout: str, said: Output | None) -> Reading | None:
    first = next((o for o in outputs if o.name == "out"), outputs[0]) if outputs else None
    if first is None or len(first.shape) not in (3, 4):
        return None
    wide = len(first.shape) == 4
    axis = 1 if layout == "nchw" else 3
    channels = first.shape[axis] if wide else 1
    if first.kind in "iu" and channels == 1 and said in (None, "labels"):
        return Labels(first.name, axis if wide else None)
    if first.kind == "f" and wide and channels and said in (None, "logits", "probabilities"):
        usual: Literal["logits", "probabilities"] = "probabilities" if channels == 1 else "logits"
        return Scores(first.name, axis, channels, usual if said is None else said)
    return None


def _yolo(outputs: Sequence[Declared]) -> Reading | None:
    flat = [o for o in outputs if len(o.shape) == 3 and o.kind == "f"]
    wide = [o for o in outputs if len(o.shape) == 4 and o.kind == "f"]
    if len(outputs) != 2 or len(flat) != 1 or len(wide) != 1:
        return None
    prototypes, rows, columns = wide[0].shape[1], flat[0].shape[1], flat[0].shape[2]
    if prototypes is None:
        return None
    if columns == 6 + prototypes:
        return Prototypes(flat[0].name, wide[0].name, None)
    if rows is not None and rows > 4 + prototypes:
        return Prototypes(flat[0].name, wide[0].name, rows - 4 - prototypes)
    return None


def _boxed(outputs: Sequence[Declared]) -> Reading | None:
    boxes = [o.name for o in outputs if len(o.shape) == 3 and o.kind == "f" and o.shape[2] == 5]
    labels = [o.name for o in outputs if len(o.shape) == 2 and o.kind in "iu"]
    masks = [o.name for o in outputs if len(o.shape) == 4 and o.kind == "f"]
    if len(outputs) == 3 and boxes and labels and masks:
        return Boxed(boxes[0], labels[0], masks[0])
    return None


@dataclass(frozen=True, slots=True)
class Labels:
    """Label maps; ``axis`` is the one of length 1, or None."""

    name: str
    axis: int | None
    task: Task = "semantic"
    output: Output = "labels"
    channels: int | None = None
    choice: Choice = _USUAL

    def read(self, outputs: Outputs, size: Size, choice: Choice) -> NDArray[np.generic]:
        """(n, h, w) integers."""
        found = outputs[self.name]
        return found if self.axis is None else found.squeeze(self.axis)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of each class, or of the foreground alone.

    Attributes:
        name: of the output.
        axis: of its channels.
        outputs: how many there are.
        meaning: what they are.
    """

    name: str
    axis: int
    outputs: int
    meaning: Literal["logits", "probabilities"]
    task: Task = "semantic"
    choice: Choice = _USUAL

    @property
    def output(self) -> Output:
        """One probability becomes two logits, which can be interpolated."""
        return "logits" if self.outputs == 1 else self.meaning

    @property
    def channels(self) -> int:
        """Background and foreground for a single output."""
        return max(self.outputs, 2)

    def read(self, outputs: Outputs, size: Size, choice: Choice) -> NDArray[np.generic]:
        """(n, classes, h, w) float32."""
        scores = np.moveaxis(outputs[self.name], self.axis, 1).astype(np.float32, copy=False)
        if self.meaning == "probabilities":
            _check_probabilities(scores)
        if self.outputs > 1:
            return scores
        if self.meaning == "probabilities":
            scores = np.clip(scores, _TINY, 1 - _TINY)
            scores = np.log(scores / (1 - scores))
        return np.concatenate([np.zeros_like(scores), scores], 1)


def _check_probabilities(scores: NDArray[np.float32]) -> None:
    low, high = float(scores.min()), float(scores.max())
    if low < -0.01 or high > 1.01:
        raise DataError(
            f"the model's outputs reach from {low:.3g} to {high:.3g}, so they are no probabilities",
            'write output = "logits" into its side-car',
            "no-probabilities",
        )


@dataclass(frozen=True, slots=True)
class Prototypes:
    """YOLO: boxes with coefficients, and prototypes of masks.

    Attributes:
        boxes, prototypes: names of the outputs.
        channels: classes; None where suppression is in the graph.
    """

    boxes: str
    prototypes: str
    channels: int | None
    task: Task = "instance"
    output: Output = "detections"

    @property
    def choice(self) -> Choice:
        """Ultralytics suppresses at .7."""
        return Choice(nms_iou=None if self.channels is None else 0.7)

    def read(self, outputs: Outputs, size: Size, choice: Choice) -> list[Detections]:
        """See ``Reading``."""
        pairs = zip(outputs[self.boxes], outputs[self.prototypes], strict=True)
        return [self._one(rows, maps, size, choice) for rows, maps in pairs]

    def _one(self, rows: NDArray[np.generic], maps: NDArray[np.generic], size: Size, choice: Choice) -> Detections:
        found = rows.astype(np.float32, copy=False)
        if self.channels is None:
            boxes, scores, classes, weights = found[:, :4], found[:, 4], found[:, 5].astype(np.int64), found[:, 6:]
        else:
            found = found.T
            each = found[:, 4 : 4 + self.channels]
            boxes, weights = _corners(found[:, :4]), found[:, 4 + self.channels :]
            scores, classes = each.max(1), each.argmax(1)
        kept = best(boxes, scores, classes, choice)
        prototypes = maps.astype(np.float32, copy=False)
        logits = (weights[kept] @ prototypes.reshape(len(prototypes), -1)).reshape(-1, *prototypes.shape[1:])
        masks = np.float32(0.5) * (1 + np.tanh(over_boxes(logits, boxes[kept], size) / 2))
        return Detections(boxes[kept], scores[kept], classes[kept], masks)


@dataclass(frozen=True, slots=True)
class Boxed:
    """MMDeploy's detections; the attributes name the outputs."""

    boxes: str
    labels: str
    masks: str
    task: Task = "instance"
    output: Output = "detections"
    channels: int | None = None
    choice: Choice = _USUAL

    def read(self, outputs: Outputs, size: Size, choice: Choice) -> list[Detections]:
        """See ``Reading``."""
        images = zip(outputs[self.boxes], outputs[self.labels], outputs[self.masks], strict=True)
        return [self._one(boxes, labels, masks, size, choice) for boxes, labels, masks in images]

    def _one(
        self,
        rows: NDArray[np.generic],
        labels: NDArray[np.generic],
        masks: NDArray[np.generic],
        size: Size,
        choice: Choice,
    ) -> Detections:
        found, classes = rows.astype(np.float32, copy=False), labels.astype(np.int64)
        kept = best(found[:, :4], found[:, 4], classes, choice)
        boxes, probabilities = found[kept, :4], masks[kept].astype(np.float32, copy=False)
        if probabilities.shape[1:] == size:
            probabilities = over_boxes(probabilities, boxes, size)
        elif probabilities.shape[1] != probabilities.shape[2]:
            raise DataError(
                f"the model gave masks of {probabilities.shape[1]} x {probabilities.shape[2]} for an input of "
                f"{size[0]} x {size[1]}: neither its size nor a square",
                UNDERSTOOD,
                "wrong-masks",
            )
        return Detections(boxes, found[kept, 4], classes[kept], probabilities)


def _corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 4) left, top, right, bottom from centre, width and height."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)


def best(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], classes: NDArray[np.int64], choice: Choice
) -> NDArray[np.intp]:
    """Indices of the detections that count, the best first: masks are made for these alone.

    Scores that are not numbers are handed on, to be complained about.
    """
    kept = np.flatnonzero(~(scores < choice.min_score))
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    if choice.nms_iou is not None:
        kept = kept[_unsuppressed(boxes[kept], classes[kept], choice.nms_iou, choice.top_k)]
    return kept[: choice.top_k]


def _unsuppressed(boxes: NDArray[np.float32], classes: NDArray[np.int64], iou: float, top_k: int) -> NDArray[np.intp]:
    """Non-maximum suppression within each class, the best first, until ``top_k`` are found."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    stays: list[int] = []
    for i in range(len(boxes)):
        rivals = np.array([k for k in stays if classes[k] == classes[i]], np.intp)
        low, high = np.maximum(boxes[rivals, :2], boxes[i, :2]), np.minimum(boxes[rivals, 2:], boxes[i, 2:])
        both = np.clip(high - low, 0, None).prod(1)
        if not (both > iou * (areas[rivals] + areas[i] - both)).any():
            stays.append(i)
        if len(stays) == top_k:
            break
    return np.array(stays, np.intp)


def over_boxes(maps: NDArray[np.float32], boxes: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    """Values of maps at the cell centres of grids over boxes, interpolated bilinearly.

    Args:
        maps: (n, h, w), each laid over the whole input of the network.
        boxes: (n, 4) in pixels of that input.
        size: (height, width) of that input.

    Returns:
        (n, m, m), m being the longest side of all boxes in cells of the maps.
    """
    if not len(maps):
        return np.empty((0, 1, 1), np.float32)
    high, wide = maps.shape[1:]
    cells = boxes * np.array([wide / size[1], high / size[0]] * 2, np.float32)
    sides = np.nan_to_num(cells[:, 2:] - cells[:, :2])
    side = int(np.clip(np.ceil(sides.max()), 1, _FINEST))
    return np.stack([_sampled(m, c, side) for m, c in zip(maps, cells, strict=True)])


def _sampled(values: NDArray[np.float32], box: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(side, side) values at the cell centres of a box given in cells of the map."""
    left, top, right, bottom = np.nan_to_num(box)
    shares = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / side
    y0, y1, fy = _neighbours(top + shares * (bottom - top), values.shape[0])
    x0, x1, fx = _neighbours(left + shares * (right - left), values.shape[1])
    rows = values[y0] + (values[y1] - values[y0]) * fy[:, None]
    return rows[:, x0] + (rows[:, x1] - rows[:, x0]) * fx


def _neighbours(at: NDArray[np.float32], limit: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two cells around each position, and how far it lies towards the second."""
    at = np.clip(at - np.float32(0.5), 0, limit - 1)
    low = at.astype(np.intp)
    return low, np.minimum(low + 1, limit - 1), (at - low).astype(np.float32)
