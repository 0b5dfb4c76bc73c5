"""Training crops: zoom, position, mirror and light drawn anew for every crop from (seed, crop number) alone.

So the stream of crops needs no state: crop ``k`` is the same in every run, also in one that was interrupted.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from segbatch.inference.pipeline import normalisation, stretched
from segbatch.models.base import InputSpec
from segbatch.training.config import DataConfig
from segbatch.training.samples import VOID, Pair, SampleSet

_ORDER, _LOOK = 0, 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops (n, h, w, 3) float32 as the network is fed, their classes (n, h, w) int16."""

    images: NDArray[np.float32]
    classes: NDArray[np.int16]


class CropStream:
    """An endless sequence of crops, every photo once per epoch.

    Args:
        samples: the photos.
        data: how crops are drawn; ``crop`` set.
        spec: what the network is fed: grid and normalisation.
        size: (height, width) of a crop.
        seed: of order and augmentation.
    """

    def __init__(self, samples: SampleSet, data: DataConfig, spec: InputSpec, size: tuple[int, int], seed: int) -> None:
        cv2.setNumThreads(1)
        self.samples = samples
        self._data = data
        self._spec = spec
        self._size = size
        self._seed = seed
        self._order: tuple[int, NDArray[np.intp]] = (-1, np.empty(0, np.intp))
        self._table = normalisation(spec)[0]

    def batch(self, first: int, count: int) -> Batch:
        """Crops ``first .. first + count - 1`` of the sequence."""
        height, width = self._size
        images = np.empty((count, height, width, 3), np.float32)
        classes = np.empty((count, height, width), np.int16)
        for position in range(count):
            self._draw(first + position, images[position], classes[position])
        return Batch(images, classes)

    def _photo_of(self, number: int) -> int:
        epoch, position = divmod(number, len(self.samples))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, _ORDER, epoch])
            self._order = (epoch, rng.permutation(len(self.samples)))
        return int(self._order[1][position])

    def _draw(self, number: int, image: NDArray[np.float32], classes: NDArray[np.int16]) -> None:
        """Fill one crop."""
        rng = np.random.default_rng([self._seed, _LOOK, number])
        pair = self.samples.get(self._photo_of(number))
        zoom = float(np.exp(rng.uniform(*np.log(self._data.scale))))
        rgb, labels, corner = _window(pair, self._grid(pair, zoom), self._size, rng)
        if self._data.flip and rng.random() < 0.5:
            rgb, labels = rgb[:, ::-1], labels[:, ::-1]
            corner = corner[0], self._size[1] - corner[1] - labels.shape[1]
        image[:] = 0.0  # the mean colour
        classes[:] = VOID
        inside = np.s_[corner[0] : corner[0] + labels.shape[0], corner[1] : corner[1] + labels.shape[1]]
        image[inside] = cv2.LUT(np.ascontiguousarray(rgb), self._light(rng))
        classes[inside] = labels

    def _grid(self, pair: Pair, zoom: float) -> tuple[float, float]:
        """Network pixels per photo pixel, down and across."""
        height, width = pair.classes.shape
        if self._spec.resize == "stretch" and self._spec.height and self._spec.width:
            return zoom * self._spec.height / height, zoom * self._spec.width / width
        return zoom, zoom

    def _light(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Table (1, 256, 3): brightness, contrast and colour changed, then normalised."""
        data = self._data
        gain = 1 + rng.uniform(-data.contrast, data.contrast)
        gains = gain * (1 + rng.uniform(-data.color, data.color, 3))
        shift = 255 * rng.uniform(-data.brightness, data.brightness)
        values = np.clip((np.arange(256)[:, None] - 127.5) * gains + 127.5 + shift, 0, 255)
        table: NDArray[np.float32] = np.empty((1, 256, 3), np.float32)
        for channel in range(3):
            table[0, :, channel] = np.interp(values[:, channel], np.arange(256), self._table[:, channel])
        return table


def _window(
    pair: Pair, grid: tuple[float, float], size: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int16], tuple[int, int]]:
    """A random part of the photo, resized by ``grid``, and the corner of the crop where it goes."""
    cuts, shape, corner = [], [], []
    for photo, factor, target in zip(pair.classes.shape, grid, size, strict=True):
        wanted = max(round(target / factor), 1)
        if wanted <= photo:
            start = int(rng.integers(0, photo - wanted + 1))
            cuts.append(slice(start, start + wanted))
            shape.append(target)
            corner.append(0)
        else:
            scaled = min(max(round(photo * factor), 1), target)
            cuts.append(slice(0, photo))
            shape.append(scaled)
            corner.append(int(rng.integers(0, target - scaled + 1)))
    rgb = stretched(np.ascontiguousarray(pair.rgb[cuts[0], cuts[1]]), shape[0], shape[1])
    labels = np.ascontiguousarray(pair.classes[cuts[0], cuts[1]])
    rows = _centres(shape[0], labels.shape[0])
    columns = _centres(shape[1], labels.shape[1])
    return rgb, labels[rows[:, None], columns], (corner[0], corner[1])


def _centres(size: int, source: int) -> NDArray[np.intp]:
    """Nearest source pixel of each of ``size`` pixels."""
    return ((2 * np.arange(size) + 1) * source // (2 * size)).astype(np.intp)
