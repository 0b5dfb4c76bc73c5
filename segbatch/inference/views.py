"""Several views of one photo - tiles, sizes, mirrored, by several models - and one result.

Semantic networks: class probabilities of all views are averaged on the photo's grid, then the best class is taken.
Instance networks: the detections of all views are put together, and per-class suppression leaves the best of each
object. A detection that a tile's border has cut is dropped where another tile shows more than half of it whole.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch.errors import ConfigError
from segbatch.inference import tiles
from segbatch.inference.instances import best_first, chosen, instances
from segbatch.inference.options import InferenceOptions
from segbatch.inference.pipeline import Predictor, not_a_number
from segbatch.inference.tiles import Span
from segbatch.models.base import Choice, Detections, Geometry, ModelSpec
from segbatch.models.parts import Part
from segbatch.records import Prediction

_GRID = 64
"""Tiles begin at multiples of this: of the strides of all networks here."""
_MERGE_IOU = 0.5
_SOFT = ("logits", "probabilities", "labels")


class ViewsSegmenter:
    """A ``Segmenter`` of whole photos with a prediction of its own.

    Args:
        predictors: of the models, whose classes have the same label ids in any order.
        spec: takes raw photos of any size, gives ``own``.
        options: the views.

    Raises:
        ConfigError: models whose results cannot be put together, or that cannot be fed these views.
    """

    def __init__(self, predictors: Sequence[Predictor], spec: ModelSpec, options: InferenceOptions) -> None:
        self.spec = spec
        self._predictors = predictors
        self._options = options
        self._choice = spec.choice
        self._orders = [orders_of(p.spec, spec) for p in predictors]
        for predictor in predictors:
            check_views(predictor.spec, options)
        self._exact = any(p.spec.input.resize in ("stretch", "letterbox", "own") for p in predictors)

    def parts(self) -> list[Part]:
        """See ``models.parts.HasParts``: those of all models; none where some model has none."""
        found = [p.parts() for p in self._predictors]
        return [part for parts in found for part in parts] if all(found) else []

    def forward(self, batch: NDArray[Any]) -> Sequence[Prediction]:
        """Predictions of photos (n, height, width, 3) uint8."""
        one = self._semantic if self.spec.task == "semantic" else self._instances
        return [one(rgb) for rgb in batch]

    def finish(self, raw: Prediction, geometry: Geometry) -> Prediction:
        """The prediction itself."""
        return raw

    def _views(self, rgb: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8], float, bool]]:
        """(number of the model, photo, scale, mirrored) of each view of a photo or tile."""
        mirrored = np.ascontiguousarray(rgb[:, ::-1]) if self._options.flip else rgb
        for scale, flip in itertools.product(self._options.scales, (False, True)[: 1 + self._options.flip]):
            for number in range(len(self._predictors)):
                yield number, mirrored if flip else rgb, scale, flip

    def _tiles(self, rgb: NDArray[np.uint8]) -> tuple[list[Span], list[Span]]:
        height, width = rgb.shape[:2]
        tile = self._options.tile or max(height, width)
        along = [tiles.spans(n, tile, self._options.overlap, _GRID, self._exact) for n in (height, width)]
        return along[0], along[1]

    # -- semantic ------------------------------------------------------------------------------------------------

    def _semantic(self, rgb: NDArray[np.uint8]) -> Prediction:
        from segbatch.inference.kernels import winners

        channels = len(self.spec.classes.classes)
        classes = np.empty(rgb.shape[:2], np.uint16)
        sums, pixels = np.zeros(channels), np.zeros(channels, np.int64)
        wanted = self._choice.confidence
        confidence = np.empty(rgb.shape[:2] if wanted else (0, 0), np.uint8)

        def done(top: int, left: int, part: NDArray[np.float32]) -> None:
            best = np.empty(part.shape[:2], np.uint16)
            here = np.empty(best.shape if wanted else (0, 0), np.uint8)
            winners(np.ascontiguousarray(part), best, sums, pixels, here)
            place = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
            classes[place] = self._predictors[0].named(best)
            if wanted:
                confidence[place] = here

        def tile(row: Span, column: Span) -> NDArray[np.float32]:
            return self._probabilities(np.ascontiguousarray(rgb[row.start : row.stop, column.start : column.stop]))

        tiles.blend(*self._tiles(rgb), tile, done)
        means = {int(k): float(sums[k] / pixels[k]) for k in np.flatnonzero(pixels)}
        by_label = self._predictors[0].by_label_id(means)
        return Prediction(semantic=classes, class_confidence=by_label, confidence=confidence if wanted else None)

    def _probabilities(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean class probabilities (height, width, channels) of all views of a photo or tile."""
        from segbatch.inference.kernels import add_probabilities

        canvas = np.zeros((*rgb.shape[:2], len(self.spec.classes.classes)), np.float32)
        views = list(self._views(rgb))
        for number, photo, scale, mirrored in views:
            predictor = self._predictors[number]
            raw = predictor.forward([predictor.prepare(photo, scale)])[0]
            scores = predictor.scores(raw)[..., self._orders[number]]
            grids = predictor.grids(raw.geometry, *scores.shape[:2])
            soft = predictor.spec.output == "logits"
            if not add_probabilities(np.ascontiguousarray(scores), *grids, soft, mirrored, 1 / len(views), canvas):
                raise not_a_number()
        return canvas

    # -- instances -----------------------------------------------------------------------------------------------

    def _instances(self, rgb: NDArray[np.uint8]) -> Prediction:
        height, width = rgb.shape[:2]
        found: list[Detections] = []
        cut: list[NDArray[np.bool_]] = []
        for row, column in tiles.corners(*self._tiles(rgb)):
            piece = np.ascontiguousarray(rgb[row.start : row.stop, column.start : column.stop])
            for one in self._detections(piece):
                cut.append(_is_cut(one.boxes, row, column))
                shift = np.array([column.start, row.start] * 2, np.float32)
                found.append(Detections(one.boxes + shift, one.scores, one.classes, one.masks))
        together = joined(found)
        whole = chosen(together, ~_fragments(together, np.concatenate(cut)))
        choice = self._choice
        merged = Choice(choice.min_score, choice.nms_iou or _MERGE_IOU, choice.top_k, choice.mask_threshold)
        ids = np.array([c.label_id for c in self.spec.classes.classes], np.uint16)
        return Prediction(instances=instances(best_first(whole, merged), height, width, ids, choice.mask_threshold))

    def _detections(self, rgb: NDArray[np.uint8]) -> Iterator[Detections]:
        """Detections of every view of a photo or tile, in its pixels."""
        for number, photo, scale, mirrored in self._views(rgb):
            predictor = self._predictors[number]
            raw = predictor.forward([predictor.prepare(photo, scale)])[0]
            found = predictor.detections(raw.output, raw.geometry)
            boxes, masks = found.boxes, found.masks
            if mirrored:
                boxes = np.stack([rgb.shape[1] - boxes[:, 2], boxes[:, 1], rgb.shape[1] - boxes[:, 0], boxes[:, 3]], 1)
                masks = np.ascontiguousarray(masks[..., ::-1])
            places = np.argsort(self._orders[number])
            yield Detections(boxes, found.scores, places[found.classes], masks)


def orders_of(spec: ModelSpec, wanted: ModelSpec) -> NDArray[np.intp]:
    """For each class of ``wanted``, its place among the classes of ``spec``.

    Raises:
        ConfigError: other label ids, another task, or results that cannot be put together.
    """
    ours, theirs = ([c.label_id for c in s.classes.classes] for s in (spec, wanted))
    if spec.task != wanted.task or spec.output not in (_SOFT if wanted.task == "semantic" else ("detections",)):
        raise ConfigError(
            f"model {spec.name} gives {spec.task} {spec.output}, which cannot be put together from several views",
            "tiles, scales, flips and ensembles need class probabilities, or boxes with masks",
        )
    if not ours or sorted(ours) != sorted(theirs):
        raise ConfigError(
            f"the classes of {spec.name} (label ids {ours[:9]}) are not those of {wanted.name} ({theirs[:9]})",
            "give models of the same classes, with --classes where a model names none",
        )
    return np.array([ours.index(i) for i in theirs], np.intp)


def check_views(spec: ModelSpec, options: InferenceOptions) -> None:
    """Refuse views that a model cannot be fed.

    Raises:
        ConfigError: other scales for a model with an input of fixed size, or with a pre-processing of its own.
    """
    if options.scales != (1.0,) and spec.input.resize not in ("none", "short-side"):
        raise ConfigError(
            f"model {spec.name} cannot be fed other scales: it takes photos by {spec.input.resize}",
            "leave --scales out",
        )
    if options.several_views and spec.input.slices:
        raise ConfigError(f"model {spec.name} reads CT slices", "leave --tile, --scales and --flip out")


def joined(found: Sequence[Detections]) -> Detections:
    """All detections; masks of different sides are refused by numpy, and so only one network's sides may occur."""
    sides = {d.masks.shape[-1] for d in found if len(d.boxes)}
    if len(sides) > 1:
        raise ConfigError(f"the models' masks have sides {sorted(sides)}", "combine models of one kind of mask head")
    side = next(iter(sides), 1)
    masks = [d.masks if len(d.boxes) else np.zeros((0, side, side), np.float32) for d in found]
    return Detections(
        np.concatenate([d.boxes for d in found]),
        np.concatenate([d.scores for d in found]),
        np.concatenate([d.classes for d in found]),
        np.concatenate(masks),
    )


def _is_cut(boxes: NDArray[np.float32], row: Span, column: Span) -> NDArray[np.bool_]:
    """Which boxes (in pixels of the tile) reach a border of the tile that is not the photo's."""
    height, width = row.stop - row.start, column.stop - column.start
    near = np.array([column.before > 0, row.before > 0, column.after > 0, row.after > 0])
    reach = np.stack([boxes[:, 0] <= 2, boxes[:, 1] <= 2, boxes[:, 2] >= width - 2, boxes[:, 3] >= height - 2], 1)
    cut: NDArray[np.bool_] = (reach & near).any(1)
    return cut


def _fragments(found: Detections, cut: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which cut detections lie for more than half in a whole one of their class."""
    parts = np.zeros(len(cut), np.bool_)
    whole = np.flatnonzero(~cut)
    for number in np.flatnonzero(cut):
        box, others = found.boxes[number], found.boxes[whole]
        wide = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
        tall = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
        inside = np.maximum(wide, 0) * np.maximum(tall, 0)
        area = (box[2] - box[0]) * (box[3] - box[1])
        same = found.classes[whole] == found.classes[number]
        parts[number] = bool((same & (inside > 0.5 * area)).any())
    return parts
