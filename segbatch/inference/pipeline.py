"""From an upright photo to a label map on the same grid: ``prepare`` -> ``forward`` -> ``finish``.

All three may run in any number of threads at once. No thread pool is used in here: the engine has its own threads.

Geometry: pixel centres lie at half-integers everywhere, so a photo pixel ``y`` of ``H`` is the logit row
``(y + 0.5) * rows / H - 0.5`` (align_corners=False), padding taken off exactly. A photo is stretched by bilinear
interpolation, by area averaging when that shrinks it by more than two: bilinear alone would then skip pixels.
Logits are interpolated bilinearly, label maps by the nearest neighbour.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError, DataError
from segbatch.models.base import InputSpec, ModelSpec, Segmenter

_FIXED_SMALL_PIXELS = 1 << 17
MAX_LABEL = 65535


class Geometry(NamedTuple):
    """How a photo lies in what the network is fed.

    Attributes:
        height, width: of the photo.
        fed_height, fed_width: of the photo inside the network's input, without the padding.
        padded_height, padded_width: of the network's input.
    """

    height: int
    width: int
    fed_height: int
    fed_width: int
    padded_height: int
    padded_width: int


class Prepared(NamedTuple):
    """A photo as the network wants it: (h, w, 3) or (3, h, w), as ``InputSpec.layout`` says, padding included."""

    tensor: NDArray[Any]
    geometry: Geometry


class Raw(NamedTuple):
    """What the network said of one photo: logits (classes, h, w) or labels (h, w), and the photo's geometry."""

    output: NDArray[Any]
    geometry: Geometry


def auto_batch_size(spec: ModelSpec) -> int:
    """The batch size that ``auto`` stands for on a CPU.

    A CPU gains little from batches: 4 for small inputs of a fixed size, 2 for any other fixed size, 1 for photos of
    any size, which seldom have equal shapes.
    """
    if spec.input.height is None or spec.input.width is None:
        return 1
    return 4 if spec.input.height * spec.input.width <= _FIXED_SMALL_PIXELS else 2


class Predictor:
    """Runs a ``Segmenter`` on upright RGB photos of any size.

    Args:
        segmenter: the loaded model.
        batch_size: images per call of the network at most.

    Raises:
        ConfigError: a batch size below 1, a stretch without a size, or label ids that do not fit.
    """

    def __init__(self, segmenter: Segmenter, batch_size: int) -> None:
        spec = segmenter.spec
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} is not positive", "give 1 or more, or auto")
        if spec.input.resize == "stretch" and not (spec.input.height and spec.input.width):
            raise ConfigError(f"model {spec.name} stretches its input but names no size")
        ids = [c.label_id for c in spec.classes.classes]
        if any(not 0 <= i <= MAX_LABEL for i in ids):
            raise ConfigError(f"model {spec.name}: label ids must lie in 0..{MAX_LABEL}, found {min(ids)}..{max(ids)}")
        cv2.setNumThreads(1)
        self.spec = spec
        self.batch_size = batch_size
        self._segmenter = segmenter
        self._normalised = normalisation(spec.input)
        self._fill = [round(255 * m) for m in spec.input.mean]
        self._label_ids = np.array(ids, np.uint16) if ids else None
        self._same_ids = ids == list(range(len(ids)))

    def prepare(self, rgb_upright: NDArray[np.uint8]) -> Prepared:
        """Resize, pad, normalise: (height, width, 3) uint8 -> what the network is fed. Copies only where it must."""
        height, width = rgb_upright.shape[:2]
        spec, image = self.spec.input, rgb_upright
        if spec.resize == "stretch" and spec.height and spec.width:
            image = stretched(image, spec.height, spec.width)
        fed_height, fed_width = image.shape[:2]
        down, right = -fed_height % spec.divisor, -fed_width % spec.divisor
        if spec.dtype == "float32":
            tensor: NDArray[Any] = cv2.LUT(image, self._normalised)
        else:
            tensor = image
        if down or right:
            fill = self._fill if spec.dtype == "uint8" else [0.0, 0.0, 0.0]
            tensor = cv2.copyMakeBorder(tensor, 0, down, 0, right, cv2.BORDER_CONSTANT, value=fill)
        if spec.layout == "nchw":
            tensor = np.ascontiguousarray(tensor.transpose(2, 0, 1))
        padded = (fed_height + down, fed_width + right)
        return Prepared(tensor, Geometry(height, width, fed_height, fed_width, *padded))

    def forward(self, prepared: Sequence[Prepared]) -> list[Raw]:
        """Run the network on photos of any mixture of shapes, equal ones together; the order is kept."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(prepared):
            groups.setdefault(item.tensor.shape, []).append(index)
        results: dict[int, Raw] = {}
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                chosen = indices[start : start + self.batch_size]
                results.update(zip(chosen, self._batch([prepared[i] for i in chosen]), strict=True))
        return [results[i] for i in range(len(prepared))]

    def _batch(self, items: Sequence[Prepared]) -> list[Raw]:
        single = len(items) == 1
        batch = items[0].tensor[None] if single else np.stack([i.tensor for i in items])
        output = self._segmenter.forward(batch)
        if len(output) != len(items):
            raise ConfigError(f"model {self.spec.name} gave {len(output)} results for a batch of {len(items)}")
        return [Raw(o, i.geometry) for o, i in zip(output, items, strict=True)]

    def finish(self, raw: Raw) -> tuple[NDArray[np.uint16], dict[int, float] | None]:
        """The label map on the photo's grid, and the mean probability of the winning class by label id.

        Returns:
            (height, width) uint16 of label ids; None in the second place for networks that give labels only.

        Raises:
            DataError: the network gave a class that the class table lacks, or not-a-number.
        """
        if self.spec.output == "labels":
            return self._named(self._labels(raw)), None
        classes, means = self._from_logits(raw)
        ids = {k: int(self._label_ids[k]) if self._label_ids is not None else k for k in means}
        return self._named(classes), {ids[k]: v for k, v in means.items()}

    def _from_logits(self, raw: Raw) -> tuple[NDArray[np.uint16], dict[int, float]]:
        from segbatch.inference.kernels import upsample_argmax

        at, output = raw.geometry, raw.output
        channels, rows, columns = output.shape
        if self._label_ids is not None and channels != len(self._label_ids):
            raise DataError(
                f"the model gave {channels} channels, its class table has {len(self._label_ids)} classes",
                code="unknown-class",
            )
        steps = (
            at.fed_height / at.height * rows / at.padded_height,
            at.fed_width / at.width * columns / at.padded_width,
        )
        logits = np.ascontiguousarray(np.moveaxis(output, 0, -1), np.float32)
        classes = np.empty((at.height, at.width), np.uint16)
        sums, pixels = np.zeros(channels), np.zeros(channels, np.int64)
        if not upsample_argmax(logits, steps[0], steps[1], classes, sums, pixels):
            raise DataError(
                "the model's output is not a number for some pixels", "check the model's weights", "not-a-number"
            )
        return classes, {int(k): float(sums[k] / pixels[k]) for k in np.flatnonzero(pixels)}

    def _labels(self, raw: Raw) -> NDArray[Any]:
        """Class indices (height, width) of a network that gives labels: padding off, nearest neighbour."""
        at, labels = raw.geometry, raw.output
        if labels.shape == (at.height, at.width):
            return labels
        rows = _nearest(at.height, at.fed_height / at.height * labels.shape[0] / at.padded_height, labels.shape[0])
        columns = _nearest(at.width, at.fed_width / at.width * labels.shape[1] / at.padded_width, labels.shape[1])
        picked: NDArray[Any] = labels[rows[:, None], columns]
        return picked

    def _named(self, classes: NDArray[Any]) -> NDArray[np.uint16]:
        """Label ids of class indices; without a class table the indices are the ids."""
        limit = MAX_LABEL + 1 if self._label_ids is None else len(self._label_ids)
        if classes.size and (int(classes.max()) >= limit or int(classes.min()) < 0):
            wrong = int(classes.max()) if int(classes.max()) >= limit else int(classes.min())
            raise DataError(
                f"the model gave class {wrong}, its class table has {limit} classes",
                "give the right class list with --classes",
                "unknown-class",
            )
        if self._label_ids is None or self._same_ids:
            return classes.astype(np.uint16, copy=False)
        label_map: NDArray[np.uint16] = self._label_ids[classes]
        return label_map


def stretched(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize (h, w, 3) to (height, width, 3): bilinear, by area averaging when it shrinks by more than two."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = math.sqrt(image.shape[0] * image.shape[1] / (height * width)) > 2
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized.astype(np.uint8, copy=False)


def _nearest(size: int, step: float, limit: int) -> NDArray[np.intp]:
    """For each of ``size`` pixels, the source pixel whose area holds its centre."""
    return np.minimum(((np.arange(size) + 0.5) * step).astype(np.intp), limit - 1)


def normalisation(spec: InputSpec) -> NDArray[np.float32]:
    """Table (1, 256, 3) of ``(value / 255 - mean) / std``."""
    values = np.arange(256)[None, :, None] / 255
    table: NDArray[np.float32] = ((values - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32)
    return table
