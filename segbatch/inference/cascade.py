"""A detector, then a segmenter on what it found: ``cascade:DETECTOR,SEGMENTER``.

The detector finds objects: boxes of its instances, or of the connected regions of a semantic model (a liver). Each box
is enlarged by a quarter of its size, cut out of the photo and given to the segmenter. With a segmenter of two classes
(background, foreground) the result is the detector's instances with the segmenter's masks; with any other, a label map
of the segmenter's classes, its first class where nothing was found. Where boxes overlap, the better detection wins.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import rle
from segbatch.errors import ConfigError
from segbatch.inference.pipeline import Predictor
from segbatch.models.base import Geometry, InputSpec, ModelSpec
from segbatch.records import ClassTable, Instance, Prediction

CONTEXT = 0.25
"""A box is enlarged by this fraction of its size, half of it on each side."""


class CascadeSegmenter:
    """A ``Segmenter`` of whole photos with a prediction of its own.

    Args:
        detector: an instance or semantic model.
        segmenter: a semantic model.
        spec: see ``cascade_spec``.
    """

    def __init__(self, detector: Predictor, segmenter: Predictor, spec: ModelSpec) -> None:
        self.spec = spec
        self._detector = detector
        self._segmenter = segmenter
        self._background = segmenter.spec.classes.classes[0].label_id

    def forward(self, batch: NDArray[Any]) -> Sequence[Prediction]:
        """Predictions of photos (n, height, width, 3) uint8."""
        return [self._photo(rgb) for rgb in batch]

    def finish(self, raw: Prediction, geometry: Geometry) -> Prediction:
        """The prediction itself."""
        return raw

    def _photo(self, rgb: NDArray[np.uint8]) -> Prediction:
        found = self._found(rgb)
        crops = [(one, _crop(one.bbox_xywh, *rgb.shape[:2])) for one in found]
        if self.spec.task == "instance":
            return Prediction(instances=tuple(self._refined(rgb, one, crop) for one, crop in crops))
        label_map = np.full(rgb.shape[:2], self._background, np.uint16)
        for _, crop in reversed(crops):
            label_map[crop] = self._labels(rgb, crop)
        return Prediction(semantic=label_map)

    def _found(self, rgb: NDArray[np.uint8]) -> Sequence[Instance]:
        """What the detector found, the best first."""
        said = self._detector.predict(rgb)
        if said.instances is not None:
            return sorted(said.instances, key=lambda i: -(i.score or 0.0))
        assert said.semantic is not None
        background = self._detector.spec.classes.classes[0].label_id
        return regions(said.semantic, background)

    def _labels(self, rgb: NDArray[np.uint8], crop: tuple[slice, slice]) -> NDArray[np.uint16]:
        label_map = self._segmenter.predict(np.ascontiguousarray(rgb[crop])).semantic
        assert label_map is not None
        return label_map

    def _refined(self, rgb: NDArray[np.uint8], one: Instance, crop: tuple[slice, slice]) -> Instance:
        """The instance with the segmenter's mask."""
        mask = np.zeros(rgb.shape[:2], np.uint8)
        mask[crop] = self._labels(rgb, crop) != self._background
        counts = rle.encode(mask)
        return replace(one, counts=counts, area=float(rle.area(counts)))


def cascade_spec(name: str, detector: ModelSpec, segmenter: ModelSpec, digest: str) -> ModelSpec:
    """The spec of a cascade.

    Raises:
        ConfigError: models that cannot stand there, or name no classes.
    """
    if detector.task == "panoptic" or segmenter.task != "semantic":
        raise ConfigError(
            f"model {name}: a {detector.task} model before a {segmenter.task} model",
            "a cascade is cascade:DETECTOR,SEGMENTER: an instance or semantic model, then a semantic one",
        )
    for spec in (detector, segmenter):
        if not spec.classes.classes:
            raise ConfigError(f"model {name}: {spec.name} names no classes", "write them into a side-car .toml")
    refines = detector.task == "instance" and len(segmenter.classes.classes) == 2
    classes: ClassTable = detector.classes if refines else segmenter.classes
    return ModelSpec(
        name=name,
        task="instance" if refines else "semantic",
        classes=classes,
        input=InputSpec(layout="nhwc", dtype="uint8"),
        output="own",
        digest=digest,
        licence=" and ".join(dict.fromkeys(s.licence for s in (detector, segmenter) if s.licence)),
    )


def regions(label_map: NDArray[np.uint16], background: int) -> list[Instance]:
    """The connected regions (8 neighbours) of a label map that are not background, the largest first, as instances."""
    count, _, stats, _ = cv2.connectedComponentsWithStats((label_map != background).astype(np.uint8))
    made: list[Instance] = []
    for left, top, wide, tall, area in stats[1:count].tolist():
        box = (float(left), float(top), float(wide), float(tall))
        made.append(Instance(len(made) + 1, 1, box, float(area), False, b""))
    return sorted(made, key=lambda i: -i.area)


def _crop(box: tuple[float, float, float, float], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the enlarged box, at least one pixel each, inside the photo."""
    left, top, wide, tall = box
    cuts = []
    for start, size, limit in ((top, tall, height), (left, wide, width)):
        first = min(max(int(np.floor(start - size * CONTEXT / 2)), 0), limit - 1)
        last = min(max(int(np.ceil(start + size * (1 + CONTEXT / 2))), first + 1), limit)
        cuts.append(slice(first, last))
    return cuts[0], cuts[1]
