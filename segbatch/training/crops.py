"""Training crops: zoom, position, mirror, light and bending drawn anew for every crop from (seed, crop number) alone.

So the stream of crops needs no state: crop ``k`` is the same in every run, also in one that was interrupted. Light is
for photos; Hounsfield units are what they are.

A thing that a crop cuts down to less than ``SLIVER`` of its pixels, or that has fewer than ``FEWEST`` pixels in the
crop, is a crowd there: nobody could tell what it is, and it is no background either.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from segbatch.inference.pipeline import fed_size, normalisation, normalised, stretched, windowed
from segbatch.models.base import InputSpec, Target
from segbatch.training.bending import N, bent_labels, bent_photo, displaced
from segbatch.training.config import DataConfig
from segbatch.training.samples import VOID, Labelled, SampleSet
from segbatch.training.separation import separation_weights
from segbatch.training.truth import Thing

SLIVER = 0.2
FEWEST = 4

_ORDER, _LOOK = 0, 1
_RGB = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops as the network is fed, and their truth.

    Attributes:
        images: (n, h, w, channels) float32: red, green and blue, or neighbouring CT slices.
        classes: (n, h, w) int16; None where the task is instances.
        targets: one for each crop where the task is instance or panoptic, else none.
        borders: (n, h, w) float32, what pixels between things count for on top of their class's weight; None where
            ``data.border_weight`` is 0.
    """

    images: NDArray[np.float32]
    classes: NDArray[np.int16] | None
    targets: tuple[Target, ...] = ()
    borders: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class _Truth:
    """The truth of one crop; see ``Batch``."""

    classes: NDArray[np.int16] | None
    target: Target | None
    borders: NDArray[np.float32] | None


class CropStream:
    """An endless sequence of crops, every sample once per epoch.

    Args:
        samples: photos, or CT slices where ``spec.slices`` says so.
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
        self._table = normalisation(spec)
        self._things = [i for i, c in enumerate(samples.classes.classes) if c.isthing]

    def batch(self, first: int, count: int) -> Batch:
        """Crops ``first .. first + count - 1`` of the sequence."""
        images = np.empty((count, *self._size, self._spec.slices or _RGB), np.float32)
        truths = [self._draw(first + position, images[position]) for position in range(count)]
        targets = tuple(t.target for t in truths if t.target is not None)
        return Batch(images, _stacked([t.classes for t in truths]), targets, _stacked([t.borders for t in truths]))

    def _sample_of(self, number: int) -> int:
        epoch, position = divmod(number, len(self.samples))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, _ORDER, epoch])
            self._order = (epoch, rng.permutation(len(self.samples)))
        return int(self._order[1][position])

    def _draw(self, number: int, image: NDArray[np.float32]) -> _Truth:
        """Fill in one crop; returns its truth."""
        rng = np.random.default_rng([self._seed, _LOOK, number])
        found = self.samples.get(self._sample_of(number))
        zoom = float(np.exp(rng.uniform(*np.log(self._data.scale))))
        view = _View.draw(found, self._grid(found, zoom), self._size, rng, self._data.flip)
        view.put(self._look(view.part(found.image), view.shape, rng), image)
        if self._data.elastic:
            view.bend = displaced(self._size, self._data.elastic, rng)
            image[:] = bent_photo(image, view.bend)
        classes = None if found.classes is None else view.labels(found.classes, VOID)
        task = self.samples.task
        target = None if task == "semantic" else _target(view, classes, found.things or ())
        borders = self._borders(view, classes, found) if self._data.border_weight else None
        return _Truth(classes, target, borders)

    def _grid(self, found: Labelled, zoom: float) -> tuple[float, float]:
        """Network pixels per sample pixel, down and across."""
        size = found.image.shape[:2]
        fed = fed_size(self._spec, *size)
        down, across = (zoom if f == s else zoom * f / s for f, s in zip(fed, size, strict=True))
        return down, across

    def _look(self, part: NDArray[Any], shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
        """A part of a sample resized to (height, width), as the network is fed; that of a photo in another light."""
        resized = stretched(windowed(self._spec, part), *shape)
        table = self._table if self._spec.slices else self._light(rng)
        found: NDArray[np.float32] = normalised(self._spec, resized, table)
        return found

    def _light(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Table (1, 256, 3): brightness, contrast and colour changed, then normalised."""
        data = self._data
        gain = 1 + rng.uniform(-data.contrast, data.contrast)
        gains = gain * (1 + rng.uniform(-data.color, data.color, 3))
        shift = 255 * rng.uniform(-data.brightness, data.brightness)
        values = np.clip((np.arange(256)[:, None] - 127.5) * gains + 127.5 + shift, 0, 255)
        table: NDArray[np.float32] = np.empty((1, 256, 3), np.float32)
        for channel in range(3):
            table[0, :, channel] = np.interp(values[:, channel], np.arange(256), self._table[0, :, channel])
        return table

    def _borders(self, view: "_View", classes: NDArray[np.int16] | None, found: Labelled) -> NDArray[np.float32]:
        """The separation weights of a crop: of its things, else of the connected pieces of classes that are things."""
        assert classes is not None
        objects = np.zeros(self._size, np.int32)
        if found.things is not None:
            for number, thing in enumerate(found.things, 1):
                if not thing.iscrowd:
                    objects[view.mask(thing) > 0] = number
        else:
            for index in self._things:
                count, pieces = cv2.connectedComponents((classes == index).astype(np.uint8), connectivity=4)
                objects = np.where(pieces > 0, pieces + objects.max(), objects) if count > 1 else objects
        return separation_weights(objects, self._data.border_weight, self._data.border_sigma)


@dataclass(slots=True)
class _View:
    """Which part of a photo (or of CT slices, which lie above each other) lies where in a crop.

    Attributes:
        cuts: rows and columns of the photo.
        shape: (height, width) that they take up in the crop.
        corner: (top, left) of them in the crop, before it is mirrored.
        size: of the crop.
        mirrored: left and right change places.
        bend: source row and column of every pixel of the crop, applied last; None for none.
    """

    cuts: tuple[slice, slice]
    shape: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool
    bend: NDArray[np.float64] | None = None

    @classmethod
    def draw(
        cls,
        found: Labelled,
        grid: tuple[float, float],
        size: tuple[int, int],
        rng: np.random.Generator,
        flip: bool,
    ) -> "_View":
        """A random part of the photo, resized by ``grid``."""
        cuts, shape, corner = [], [], []
        for photo, factor, target in zip(found.image.shape[:2], grid, size, strict=True):
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
        mirrored = flip and bool(rng.random() < 0.5)
        return cls((cuts[0], cuts[1]), (shape[0], shape[1]), (corner[0], corner[1]), size, mirrored)

    def part(self, image: NDArray[Any]) -> NDArray[Any]:
        """The part of the photo."""
        return np.ascontiguousarray(image[self.cuts])

    def put(self, part: NDArray[np.float32], image: NDArray[np.float32]) -> None:
        """Fill in the crop of the part, resized to ``shape`` and normalised; the mean colour where there is none."""
        image[:] = 0.0  # the mean colour
        (image[:, ::-1] if self.mirrored else image)[self._inside] = part

    def labels(self, label_map: NDArray[np.int16], fill: int) -> NDArray[np.int16]:
        """The crop of a label map, ``fill`` where there is no photo."""
        crop = np.full(self.size, fill, np.int16)
        rows, columns = self._sources()
        crop[self._inside] = label_map[rows[:, None], columns]
        return self._turned(crop)

    def mask(self, thing: Thing) -> NDArray[np.uint8]:
        """The crop of a thing's mask, 0 or 1."""
        crop = np.zeros(self.size, np.uint8)
        at, inside = [], []
        for axis, (sources, first) in enumerate(zip(self._sources(), (thing.top, thing.left), strict=True)):
            low, high = np.searchsorted(sources, (first, first + thing.mask.shape[axis]))
            at.append(slice(self.corner[axis] + int(low), self.corner[axis] + int(high)))
            inside.append(sources[low:high] - first)
        crop[at[0], at[1]] = thing.mask[inside[0][:, None], inside[1]]
        return self._turned(crop)

    def visible(self, thing: Thing) -> float:
        """Which fraction of a thing's pixels lies in the crop."""
        rows, columns = (
            slice(max(cut.start - first, 0), max(cut.stop - first, 0))
            for cut, first in zip(self.cuts, (thing.top, thing.left), strict=True)
        )
        return int(np.count_nonzero(thing.mask[rows, columns])) / thing.area

    @property
    def _inside(self) -> tuple[slice, slice]:
        """Where the photo lies in the crop."""
        (top, left), (height, width) = self.corner, self.shape
        return np.s_[top : top + height, left : left + width]

    def _sources(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The photo's rows and columns that the crop shows, by the nearest neighbour."""
        rows, columns = (
            cut.start + _centres(n, cut.stop - cut.start) for cut, n in zip(self.cuts, self.shape, strict=True)
        )
        return rows, columns

    def _turned(self, crop: NDArray[N]) -> NDArray[N]:
        crop = np.ascontiguousarray(crop[:, ::-1]) if self.mirrored else crop
        return crop if self.bend is None else bent_labels(crop, self.bend)


def _target(view: _View, classes: NDArray[np.int16] | None, things: tuple[Thing, ...]) -> Target:
    """The things that the crop shows."""
    masks: list[NDArray[np.uint8]] = []
    boxes, labels, crowds = [], [], []
    for thing in things:
        mask = view.mask(thing)
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if len(rows):
            masks.append(mask)
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            labels.append(thing.label)
            crowds.append(thing.iscrowd or np.count_nonzero(mask) < FEWEST or view.visible(thing) < SLIVER)
    return Target(
        classes=classes,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        masks=np.stack(masks) if masks else np.zeros((0, *view.size), np.uint8),
        iscrowd=np.array(crowds, np.bool_),
    )


def _stacked(arrays: "list[Any]") -> Any:
    """One array of all of them; None where there are none."""
    return None if arrays[0] is None else np.stack(arrays)


def _centres(size: int, source: int) -> NDArray[np.intp]:
    """Nearest source pixel of each of ``size`` pixels."""
    return ((2 * np.arange(size) + 1) * source // (2 * size)).astype(np.intp)
