"""From an upright photo to a prediction on the same grid: ``prepare`` -> ``forward`` -> ``finish``.

All three may run in any number of threads at once. No thread pool is used in here: the engine has its own threads.

Geometry: pixel centres lie at half-integers everywhere, so a photo pixel ``y`` of ``H`` is the score row
``(y + 0.5) * rows / H - 0.5``, padding taken off exactly; ``InputSpec.align_corners`` says otherwise. A photo is
stretched by bilinear interpolation, by area averaging when that shrinks it by more than two: bilinear alone would then
skip pixels. Scores are interpolated bilinearly, label maps by the nearest neighbour.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError, DataError
from segbatch.inference.instances import best_first, instances, on_photo, paste
from segbatch.models.base import (
    Choice,
    Detections,
    Geometry,
    InputSpec,
    ModelSpec,
    OwnInput,
    OwnOutput,
    PanopticParts,
    Segmenter,
)
from segbatch.models.parts import Part, parts_of
from segbatch.records import Instance, Prediction, Segment

Grid = tuple[float, float]
"""(step, shift): pixel ``y`` of the photo lies at row ``(y + 0.5) * step - shift`` of the scores."""

_FIXED_SMALL_PIXELS = 1 << 17
MAX_LABEL = 65535


class Prepared(NamedTuple):
    """A photo as the network wants it: (h, w, c) or (c, h, w), as ``InputSpec.layout`` says, padding included."""

    tensor: NDArray[Any]
    geometry: Geometry


class Raw(NamedTuple):
    """What the network said of one photo (see ``ModelSpec.output``), and the photo's geometry."""

    output: Any
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
        choice: which detections count, where not as the model says.

    Raises:
        ConfigError: a batch size below 1, a resize without a size, or label ids that do not fit.
    """

    def __init__(self, segmenter: Segmenter, batch_size: int, choice: Choice | None = None) -> None:
        spec = replace(segmenter.spec, choice=choice or segmenter.spec.choice)
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} is not positive", "give 1 or more, or auto")
        needed = {"stretch": (spec.input.height, spec.input.width), "short-side": (spec.input.height,)}
        needed["letterbox"] = needed["stretch"]
        if not all(needed.get(spec.input.resize, ())):
            raise ConfigError(f"model {spec.name} resizes its input ({spec.input.resize}) but names no size")
        ids = [c.label_id for c in spec.classes.classes]
        if any(not 0 <= i <= MAX_LABEL for i in ids):
            raise ConfigError(f"model {spec.name}: label ids must lie in 0..{MAX_LABEL}, found {min(ids)}..{max(ids)}")
        if not ids and spec.output in ("detections", "panoptic"):
            raise ConfigError(f"model {spec.name} names no classes", "give them with --classes")
        cv2.setNumThreads(1)
        self.spec = spec
        self.batch_size = batch_size
        self._segmenter = segmenter
        self._normalised = normalisation(spec.input)
        self._fill = [round(255 * m) for m in spec.input.mean]
        self._label_ids = np.array(ids, np.uint16) if ids else None
        self._same_ids = ids == list(range(len(ids)))

    def parts(self) -> Sequence[Part]:
        """What of the model an engine may run; see ``models.parts``."""
        return parts_of(self._segmenter)

    def predict(self, rgb_upright: NDArray[np.uint8]) -> Prediction:
        """The prediction for one upright photo (height, width, 3)."""
        return self.finish(self.forward([self.prepare(rgb_upright)])[0])

    def prepare(self, rgb_upright: NDArray[np.uint8] | NDArray[np.float32], scale: float = 1.0) -> Prepared:
        """Resize, pad, normalise: what the network is fed. Copies only where it must.

        Args:
            rgb_upright: the photo, (height, width, 3) uint8; or CT slices, (height, width, slices) float32 in
                Hounsfield units.
            scale: feed it so many times as large as the spec says.
        """
        height, width = rgb_upright.shape[:2]
        spec = self.spec.input
        if spec.resize == "own":
            own, fed = cast(OwnInput, self._segmenter).prepare(cast(NDArray[np.uint8], rgb_upright))
            padded_size = own.shape[1:3] if spec.layout == "nchw" else own.shape[:2]
            return Prepared(own, Geometry(height, width, *fed, *padded_size))
        fed_height, fed_width = fed_size(spec, height, width, scale)
        image = stretched(windowed(spec, rgb_upright), fed_height, fed_width)
        padded = padded_size_of(spec, fed_height, fed_width)
        down, right = padded[0] - fed_height, padded[1] - fed_width
        tensor = normalised(spec, image, self._normalised)
        if down or right:
            fill = self._fill if spec.dtype == "uint8" else [0.0] * len(spec.mean)
            tensor = _filled(tensor, down, right, fill)
        if spec.layout == "nchw":
            tensor = np.ascontiguousarray(tensor.transpose(2, 0, 1))
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

    def finish(self, raw: Raw) -> Prediction:
        """The prediction on the photo's grid.

        Raises:
            DataError: the network gave a class that the class table lacks, or not-a-number.
        """
        at, output = raw.geometry, self.spec.output
        if output == "own":
            return cast(OwnOutput, self._segmenter).finish(raw.output, at)
        if output == "labels":
            return Prediction(semantic=self.named(_labels(raw.output, at)))
        if output == "detections":
            return Prediction(instances=self._instances(raw.output, at))
        if output == "panoptic":
            index_map, segments = self._panoptic(raw.output, at)
            return Prediction(panoptic=index_map, segments=segments)
        classes, means, certainty = self._winners(self._maps(raw), at, output == "logits")
        return Prediction(semantic=self.named(classes), class_confidence=self.by_label_id(means), confidence=certainty)

    def detections(self, found: Detections, at: Geometry) -> Detections:
        """The detections that count, the best first, with boxes in pixels of the photo."""
        return on_photo(best_first(found, self.spec.choice), at)

    def _instances(self, found: Detections, at: Geometry) -> tuple[Instance, ...]:
        assert self._label_ids is not None
        kept = self.detections(found, at)
        return instances(kept, at.height, at.width, self._label_ids, self.spec.choice.mask_threshold)

    def _panoptic(self, parts: PanopticParts, at: Geometry) -> tuple[NDArray[np.uint16], tuple[Segment, ...]]:
        from segbatch.inference.panoptic import merge

        kept = self.detections(parts.detections, at)
        runs = paste(kept, at.height, at.width, self.spec.choice.mask_threshold)
        semantic, _, _ = self._winners(np.ascontiguousarray(parts.logits, np.float32), at, soft=True)
        things = list(zip(kept.classes.tolist(), runs, strict=True))
        return merge(things, semantic, self.spec.classes, self.spec.choice)

    def scores(self, raw: Raw) -> NDArray[np.float32]:
        """A semantic network's scores, channels last; labels as scores of 0 and 1.

        Raises:
            DataError: another number of channels than classes, or a class that the class table lacks.
        """
        if self.spec.output == "labels":
            self.named(raw.output)
            hits: NDArray[np.float32] = np.eye(len(self.spec.classes.classes), dtype=np.float32)[raw.output]
            return hits
        return np.ascontiguousarray(np.moveaxis(self._maps(raw), 0, -1))

    def _maps(self, raw: Raw) -> NDArray[np.float32]:
        """A semantic network's scores (channels, rows, columns).

        Raises:
            DataError: another number of channels than classes.
        """
        channels = raw.output.shape[0]
        if self._label_ids is not None and channels != len(self._label_ids):
            raise DataError(
                f"the model gave {channels} channels, its class table has {len(self._label_ids)} classes",
                code="unknown-class",
            )
        return np.ascontiguousarray(raw.output, np.float32)

    def grids(self, at: Geometry, rows: int, columns: int) -> tuple[Grid, Grid]:
        """Where the photo's pixels lie among rows and columns of scores; see ``kernels.upsample_argmax``."""
        return (
            self._grid(at.height, at.fed_height, at.padded_height, rows),
            self._grid(at.width, at.fed_width, at.padded_width, columns),
        )

    def _grid(self, photo: int, fed: int, padded: int, scores: int) -> Grid:
        if self.spec.input.align_corners:
            ratio = (scores - 1) / max(padded - 1, 1)
            return fed / photo * ratio, 0.5 * ratio
        return fed / photo * scores / padded, 0.5

    def _winners(
        self, scores: NDArray[np.float32], at: Geometry, soft: bool
    ) -> tuple[NDArray[np.uint16], dict[int, float], NDArray[np.uint8] | None]:
        """The winning channel of each pixel of the photo, its mean probability by channel, and by pixel if wanted.

        Args:
            scores: (channels, rows, columns).
            at: where the photo lies in them.
            soft: they are logits.
        """
        from segbatch.inference.kernels import upsample_argmax

        channels, rows, columns = scores.shape
        classes = np.empty((at.height, at.width), np.uint16)
        sums, pixels = np.zeros(channels), np.zeros(channels, np.int64)
        certainty = np.empty(classes.shape if self.spec.choice.confidence else (0, 0), np.uint8)
        if not upsample_argmax(scores, *self.grids(at, rows, columns), soft, classes, sums, pixels, certainty):
            raise not_a_number()
        means = {int(k): float(sums[k] / pixels[k]) for k in np.flatnonzero(pixels)}
        return classes, means, certainty if self.spec.choice.confidence else None

    def by_label_id(self, means: Mapping[int, float]) -> dict[int, float]:
        """Figures by class index as figures by label id."""
        return {k if self._label_ids is None else int(self._label_ids[k]): v for k, v in means.items()}

    def named(self, classes: NDArray[Any]) -> NDArray[np.uint16]:
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


def not_a_number() -> DataError:
    """The error of scores that are not numbers."""
    return DataError("the model's output is not a number for some pixels", "check the model's weights", "not-a-number")


def fed_size(spec: InputSpec, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) that a photo of this size takes up in the network's input; not for ``own``.

    ``short-side`` and ``letterbox`` round to the nearest pixel.
    """
    tall, wide = float(height), float(width)
    if spec.resize == "stretch" and spec.height and spec.width:
        tall, wide = float(spec.height), float(spec.width)
    if spec.resize == "letterbox" and spec.height and spec.width:
        factor = min(spec.height / height, spec.width / width)
        tall, wide = height * factor, width * factor
    if spec.resize == "short-side" and spec.height:
        factor = spec.height / min(height, width)
        if spec.longest:
            factor = min(factor, spec.longest / max(height, width))
        tall, wide = height * factor, width * factor
    return max(round(tall * scale), 1), max(round(wide * scale), 1)


def padded_size_of(spec: InputSpec, fed_height: int, fed_width: int) -> tuple[int, int]:
    """(height, width) of the network's input for a photo that takes up so much of it."""
    if spec.resize == "letterbox" and spec.height and spec.width:
        fed_height, fed_width = max(fed_height, spec.height), max(fed_width, spec.width)
    return fed_height + -fed_height % spec.divisor, fed_width + -fed_width % spec.divisor


def _labels(labels: NDArray[Any], at: Geometry) -> NDArray[Any]:
    """Class indices (height, width) of a network that gives labels: padding off, nearest neighbour."""
    if labels.shape == (at.height, at.width):
        return labels
    rows = _nearest(at.height, at.fed_height / at.height * labels.shape[0] / at.padded_height, labels.shape[0])
    columns = _nearest(at.width, at.fed_width / at.width * labels.shape[1] / at.padded_width, labels.shape[1])
    picked: NDArray[Any] = labels[rows[:, None], columns]
    return picked


def windowed(spec: InputSpec, image: NDArray[Any]) -> NDArray[Any]:
    """CT slices in Hounsfield units as 0..1 over the window, float32; photos as they are."""
    if spec.window is None:
        return image
    low, high = spec.window
    inside: NDArray[np.float32] = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)
    return inside


def normalised(spec: InputSpec, image: NDArray[Any], table: NDArray[np.float32]) -> NDArray[Any]:
    """The values that the network is fed: of a photo by ``table`` (see ``normalisation``), of CT slices of 0..1."""
    if spec.window is not None:
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        centred: NDArray[Any] = image - mean
        return centred / std
    if spec.dtype == "uint8":
        return image
    return np.asarray(cv2.LUT(image, table))


def _filled(image: NDArray[Any], down: int, right: int, fill: Sequence[float]) -> NDArray[Any]:
    """The image with rows and columns of one value per channel behind its last ones."""
    height, width, channels = image.shape
    larger = np.empty((height + down, width + right, channels), image.dtype)
    larger[:height, :width] = image
    larger[height:] = fill
    larger[:, width:] = fill
    return larger


def stretched(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Resize (h, w, c) to (height, width, c): bilinear, by area averaging when it shrinks by more than two."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = math.sqrt(image.shape[0] * image.shape[1] / (height * width)) > 2
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized.reshape(height, width, -1).astype(image.dtype, copy=False)


def _nearest(size: int, step: float, limit: int) -> NDArray[np.intp]:
    """For each of ``size`` pixels, the source pixel whose area holds its centre."""
    return np.minimum(((np.arange(size) + 0.5) * step).astype(np.intp), limit - 1)


def normalisation(spec: InputSpec) -> NDArray[np.float32]:
    """Table (1, 256, 3) of ``(value / 255 - mean) / std``."""
    values = np.arange(256)[None, :, None] / 255
    table: NDArray[np.float32] = ((values - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32)
    return table
