"""One CT volume as LiTS's official evaluator sees it: lesions, what became of them, and surface distances.

Everything is counted on runs: no voxel is decoded but those of surfaces.

Source: github.com/PatrickChrist/lits-challenge-scoring, commit 090307d: ``program/evaluate.py``,
``program/helpers/calc_metric.py`` and ``program/helpers/surface.py`` (MedPy's). There axis 0 of a volume is the column
here, axis 1 the row, axis 2 the slice; a "label" is the number of a lesion, from 1, by its first voxel in that order.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]

LIVER, LESION = 1, 2
"""Least label of the liver's voxels (lesions lie in it), label of the lesions'."""

LARGE = 9001.0
"""The official penalty for what is undefined: distances to nothing, a liver that was not predicted."""

MINIMUM_IOU = 0.5
"""A lesion is detected above it."""

_UINT8 = 255
"""The official mask of detected lesions has no room for greater labels."""

CASE = (
    *("lesions_reference", "lesions_predicted", "found", "detected", "scored"),
    *("lesion_truth", "lesion_predicted", "lesion_shared"),
    *("liver_truth", "liver_predicted", "liver_shared", "liver_found"),
)
"""What is counted of a case. Lesions; those matched at any overlap (``found``) and above ``MINIMUM_IOU``; whether the
scores of its lesions count (0 or 1); voxels; whether anything is predicted to be liver proper, label 1 (0 or 1)."""

OBJECT = ("number", "truth", "predicted", "shared", "detected")
"""What is counted of a match of merged lesions: its number, voxels, whether it is detected (0 or 1)."""

LESION_OF_CASE = ("is_predicted", "label", "object", "voxels")
"""What is counted of a lesion: 0 for the reference's, label, number of its match (0 for none)."""


class Box(NamedTuple):
    """Columns, rows and slices of a volume or a part of one."""

    width: int
    height: int
    slices: int


class Segments(NamedTuple):
    """A mask as stretches of columns ``begins[s]`` to ``ends[s] - 1``; int64 of shape (segments,).

    Sorted by row and column, none touches the next. Row ``k * height + j`` is row j of slice k.
    """

    rows: Numbers
    begins: Numbers
    ends: Numbers

    @property
    def voxels(self) -> int:
        """Of the mask."""
        return int((self.ends - self.begins).sum())

    def firsts(self, box: Box) -> Numbers:
        """Where the segments of each row begin, and the last one's end; int64 of shape (rows + 1,)."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=box.height * box.slices))])

    def at(self, places: Numbers) -> "Segments":
        """Those at these places, in this order."""
        return Segments(self.rows[places], self.begins[places], self.ends[places])


@dataclass(frozen=True, slots=True)
class Volume:
    """Reference and prediction of a whole volume.

    Attributes:
        box: its size in voxels.
        spacing_mm: size of a voxel along columns, rows and slices (the file's axes), float64 of shape (3,).
        truth, predicted: runs of all slices one after the other, label and length, int64 of shape (runs, 2).
    """

    box: Box
    spacing_mm: Floats
    truth: Numbers
    predicted: Numbers


class Lesions(NamedTuple):
    """The 6-connected components of a mask.

    Attributes:
        segments: of the mask.
        labels: of each segment its lesion, from 1; int64 of shape (segments,).
        voxels: of each lesion, int64 of shape (lesions + 1,); the entry 0 is no lesion's.
    """

    segments: Segments
    labels: Numbers
    voxels: Numbers

    def __len__(self) -> int:
        return len(self.voxels) - 1


class Pairs(NamedTuple):
    """How many voxels lesions share: labels and voxels of every pair that shares any; int64 of shape (pairs,)."""

    truth: Numbers
    predicted: Numbers
    voxels: Numbers


@dataclass(frozen=True, slots=True)
class Matching:
    """Which lesions belong together.

    Attributes:
        truth, predicted: for each lesion the number of its match, 0 for none; int64 of shape (lesions + 1,).
        numbers: of the matches, ascending; int64 of shape (matches,).
        is_detected: whether they overlap enough; bool of shape (matches,).
        found, detected: true positives at any overlap and above ``MINIMUM_IOU``.
    """

    truth: Numbers
    predicted: Numbers
    numbers: Numbers
    is_detected: NDArray[np.bool_]
    found: int
    detected: int


def score(volume: Volume, upstream_bugs: bool) -> Mapping[str, NDArray[Any]]:
    """What is kept of a case; all figures follow from it.

    Returns:
        int64: ``case`` (1, len(CASE)), ``objects`` (matches, len(OBJECT)), ``lesions`` (lesions, len(LESION_OF_CASE));
        float64: ``distances`` (1, 3) of the liver, ``object_distances`` (matches, 3), both ASSD, RMSD and MSD in mm.
    """
    box = volume.box
    truth, predicted = (_lesions(segments(r, LESION, box), box) for r in (volume.truth, volume.predicted))
    shared = _shared(truth.segments, predicted.segments, box)
    pairs = _pairs(truth, predicted, shared)
    found = (_match_upstream if upstream_bugs else _match)(pairs, truth.voxels, predicted.voxels)
    objects, distances = _objects(volume, truth, predicted, pairs, found)
    liver, other = (segments(r, LIVER, box) for r in (volume.truth, volume.predicted))
    sizes = liver.voxels, other.voxels
    lesion_sizes = truth.segments.voxels, predicted.segments.voxels
    liver_found = sizes[1] > lesion_sizes[1]
    case = [
        *(len(truth), len(predicted), found.found, found.detected, found.detected > 0),
        *(*lesion_sizes, shared[:, 2].sum()),
        *(*sizes, _shared(liver, other, box)[:, 2].sum(), liver_found),
    ]
    liver_distances = surface_distances(liver, other, volume) if liver_found and sizes[0] else (LARGE,) * 3
    return {
        "case": np.array([case], np.int64),
        "distances": np.array([liver_distances], np.float64),
        "objects": objects,
        "object_distances": distances,
        "lesions": np.concatenate([_listed(0, truth, found.truth), _listed(1, predicted, found.predicted)]),
    }


def _listed(is_predicted: int, lesions: Lesions, objects: Numbers) -> Numbers:
    labels = np.arange(1, len(lesions) + 1)
    return np.stack([np.full_like(labels, is_predicted), labels, objects[1:], lesions.voxels[1:]], 1)


# -- masks -------------------------------------------------------------------------------------------------------------


def segments(runs: Numbers, least: int, box: Box) -> Segments:
    """The voxels whose label is at least ``least``.

    Args:
        runs: label and length, int64 of shape (runs, 2), row by row and slice by slice.
    """
    stops = np.cumsum(runs[:, 1])
    inside = (runs[:, 0] >= least) & (runs[:, 1] > 0)
    starts, stops = (stops - runs[:, 1])[inside], stops[inside]
    apart = starts[1:] != stops[:-1]
    first, last = (np.concatenate(parts)[: len(starts)] for parts in (([True], apart), (apart, [True])))
    starts, stops = starts[first], stops[last]
    row = starts // box.width
    pieces = (stops - 1) // box.width - row + 1
    rows = np.repeat(row - np.cumsum(pieces) + pieces, pieces) + np.arange(pieces.sum())
    begins = np.maximum(np.repeat(starts, pieces) - rows * box.width, 0)
    ends = np.minimum(np.repeat(stops, pieces) - rows * box.width, box.width)
    return Segments(rows, begins, ends)


def _lesions(mask: Segments, box: Box) -> Lesions:
    parents = np.arange(len(mask.rows))
    _compiled("components")(mask.firsts(box), mask.begins, mask.ends, box.height, parents)
    k, j = np.divmod(mask.rows, box.height)
    order = np.argsort((mask.begins * box.height + j) * box.slices + k)
    roots, first = np.unique(parents[order], return_index=True)
    label = np.empty(len(parents), np.int64)
    label[roots[np.argsort(first)]] = np.arange(1, len(roots) + 1)
    labels = label[parents]
    voxels = np.bincount(labels, mask.ends - mask.begins, len(roots) + 1).astype(np.int64)
    return Lesions(mask, labels, voxels)


def _shared(one: Segments, other: Segments, box: Box) -> Numbers:
    """Stretches that two masks share: places of the two segments and voxels, int64 of shape (n, 3)."""
    found = np.empty((len(one.rows) + len(other.rows), 3), np.int64)
    masks = (a for mask in (one, other) for a in (mask.firsts(box), mask.begins, mask.ends))
    count = _compiled("overlaps")(*masks, found)
    return found[:count]


def _pairs(truth: Lesions, predicted: Lesions, shared: Numbers) -> Pairs:
    return _summed(truth.labels[shared[:, 0]], predicted.labels[shared[:, 1]], shared[:, 2])


def _summed(truth: Numbers, predicted: Numbers, voxels: Numbers) -> Pairs:
    """Every pair once, by predicted and then by truth label."""
    labels = int(truth.max(initial=0)) + 1
    keys, places = np.unique(predicted * labels + truth, return_inverse=True)
    return Pairs(keys % labels, keys // labels, np.bincount(places, voxels, len(keys)).astype(np.int64))


# -- matching ----------------------------------------------------------------------------------------------------------


class _Merged(NamedTuple):
    """Lesions after merging.

    Attributes:
        truth: for each reference lesion the least label of those that it is merged with, int64 of shape (lesions + 1,).
        predicted: for each predicted lesion the label of the merged reference lesion that it belongs to, 0 for none.
        pairs: voxels that predicted and merged reference lesions share.
        labels: merged reference lesions with a match, ascending; int64 of shape (matches,).
        leaders: least label of the predicted lesions of each.
        shared: voxels that they share with these.
    """

    truth: Numbers
    predicted: Numbers
    pairs: Pairs
    labels: Numbers
    leaders: Numbers
    shared: Numbers


def _merge(pairs: Pairs, truths: int, predictions: int) -> _Merged:
    """Merge reference lesions that one predicted lesion covers best, then predicted lesions that one of those covers
    best; between equals the least label wins. ``truths`` and ``predictions`` are greater than the labels."""
    truth = np.arange(truths)
    covered, best = _best(pairs.truth, pairs.predicted, pairs.voxels)
    _, first, place = np.unique(best, return_index=True, return_inverse=True)
    truth[covered] = covered[first][place]
    merged = _summed(truth[pairs.truth], pairs.predicted, pairs.voxels)
    predicted = np.zeros(predictions, np.int64)
    matched, target = _best(merged.predicted, merged.truth, merged.voxels)
    predicted[matched] = target
    labels, first = np.unique(target, return_index=True)
    own = merged.truth == predicted[merged.predicted]
    shared = np.bincount(merged.truth[own], merged.voxels[own], truths).astype(np.int64)
    return _Merged(truth, predicted, merged, labels, matched[first], shared[labels])


def _best(one: Numbers, other: Numbers, voxels: Numbers) -> tuple[Numbers, Numbers]:
    """Every label of ``one``, ascending, and the label of ``other`` that it shares most with."""
    order = np.lexsort((other, -voxels, one))
    labels, first = np.unique(one[order], return_index=True)
    return labels, other[order][first]


def _match(pairs: Pairs, truth: Numbers, predicted: Numbers) -> Matching:
    """As the official evaluator means it: a match counts once, and its union is that of its own lesions.

    Args:
        truth, predicted: voxels of the lesions by label.
    """
    merged = _merge(pairs, len(truth), len(predicted))
    sizes = _sizes(merged.truth, truth, len(truth)) + _sizes(merged.predicted, predicted, len(truth))
    union = sizes[merged.labels] - merged.shared
    is_detected = merged.shared / union > MINIMUM_IOU
    truth_match = np.where(np.isin(merged.truth, merged.labels), merged.truth, 0)
    hits = int(is_detected.sum())
    return Matching(truth_match, merged.predicted, merged.labels, is_detected, len(merged.labels), hits)


def _match_upstream(pairs: Pairs, truth: Numbers, predicted: Numbers) -> Matching:
    """As the official evaluator does it.

    Its mask of detected lesions holds labels of the reference in 8 bits, but the union takes the prediction's label for
    one; what is trimmed is subtracted as often as reference lesions were merged.
    """
    merged = _merge(pairs, len(truth), len(predicted))
    mask = merged.predicted & _UINT8
    mask_sizes, truth_sizes = _sizes(mask, predicted, len(truth)), _sizes(merged.truth, truth, len(truth))
    counts = np.bincount(merged.truth, minlength=len(truth))
    both = dict[tuple[int, int], int]()
    for value, label, voxels in zip(mask[merged.pairs.predicted], merged.pairs.truth, merged.pairs.voxels, strict=True):
        both[int(value), int(label)] = both.get((int(value), int(label)), 0) + int(voxels)
    hits, trimmed = len(merged.labels), set[int]()
    for place in np.argsort(merged.leaders):
        label, leader, shared = int(merged.labels[place]), int(merged.leaders[place]), int(merged.shared[place])
        union = int(truth_sizes[label])
        if leader < len(mask_sizes) and leader not in trimmed:
            union += int(mask_sizes[leader]) - both.get((leader, label), 0)
        if shared / union <= MINIMUM_IOU:
            trimmed.add(label)
            hits -= int(counts[label])
    numbers = np.unique(mask[mask > 0])
    is_detected = ~np.isin(numbers, list(trimmed))
    truth_match = np.where(np.isin(merged.truth, numbers), merged.truth, 0)
    return Matching(truth_match, mask, numbers, is_detected, len(merged.labels), hits)


def _sizes(objects: Numbers, voxels: Numbers, count: int) -> Numbers:
    """Voxels of the lesions of each of the objects 0 .. count - 1."""
    return np.bincount(objects, voxels, count).astype(np.int64)


# -- surfaces ----------------------------------------------------------------------------------------------------------


def _objects(
    volume: Volume, truth: Lesions, predicted: Lesions, pairs: Pairs, matching: Matching
) -> tuple[Numbers, Floats]:
    """Rows of ``objects`` and of ``object_distances``."""
    same = matching.truth[pairs.truth] == matching.predicted[pairs.predicted]
    shared = np.bincount(
        matching.truth[pairs.truth][same], pairs.voxels[same], int(matching.numbers.max(initial=0)) + 1
    )
    parts = [
        _parts(lesions, m, matching.numbers)
        for lesions, m in ((truth, matching.truth), (predicted, matching.predicted))
    ]
    objects = np.zeros((len(matching.numbers), len(OBJECT)), np.int64)
    distances = np.full((len(matching.numbers), 3), LARGE)
    for n, (one, other) in enumerate(zip(*parts, strict=True)):
        number = matching.numbers[n]
        objects[n] = number, one.voxels, other.voxels, shared[number], matching.is_detected[n]
        if len(one.rows) and len(other.rows):
            distances[n] = surface_distances(one, other, volume)
    return objects, distances


def _parts(lesions: Lesions, matches: Numbers, numbers: Numbers) -> Iterator[Segments]:
    """The segments of each match."""
    found = matches[lesions.labels]
    order = np.argsort(found, kind="stable")
    bounds = np.searchsorted(found[order], numbers), np.searchsorted(found[order], numbers, "right")
    for start, stop in zip(*bounds, strict=True):
        yield lesions.segments.at(order[start:stop])


def surface_distances(truth: Segments, predicted: Segments, volume: Volume) -> tuple[float, float, float]:
    """Average, root mean square and maximum symmetric surface distance of two masks that are not empty, in mm.

    The surface is what an erosion with the 18 neighbours takes away; distances go from voxel centre to voxel centre.
    Coordinates count from the corner of the box around both masks: rounding depends on it.
    """
    from scipy.spatial import cKDTree

    (truth, predicted), box = _boxed((truth, predicted), volume.box.height)
    keys = [_surface(mask, box) for mask in (truth, predicted)]
    points = [_points(k, box, volume.spacing_mm) for k in keys]
    found = []
    for a, b in ((0, 1), (1, 0)):
        away = keys[a] != keys[b][np.minimum(np.searchsorted(keys[b], keys[a]), len(keys[b]) - 1)]
        distances = np.zeros(len(away))
        if away.any():
            distances[away] = cKDTree(points[b]).query(points[a][away])[0]
        found.append(distances)
    to_predicted, to_truth = found
    share = 1.0 / (len(to_predicted) + len(to_truth))
    assd = share * (to_predicted.sum() + to_truth.sum())
    rmsd = np.sqrt(share) * np.sqrt((to_predicted * to_predicted).sum() + (to_truth * to_truth).sum())
    return float(assd), float(rmsd), float(max(to_predicted.max(), to_truth.max()))


def _boxed(masks: tuple[Segments, Segments], height: int) -> tuple[list[Segments], Box]:
    """The masks within the box around both."""
    places = [np.divmod(m.rows, height) for m in masks]
    k0, j0 = (min(int(p[axis].min()) for p in places) for axis in (0, 1))
    i0 = min(int(m.begins.min()) for m in masks)
    slices, rows = (max(int(p[axis].max()) for p in places) + 1 - low for axis, low in ((0, k0), (1, j0)))
    box = Box(max(int(m.ends.max()) for m in masks) - i0, rows, slices)
    moved = [
        Segments((k - k0) * rows + j - j0, m.begins - i0, m.ends - i0) for (k, j), m in zip(places, masks, strict=True)
    ]
    return moved, box


def _surface(mask: Segments, box: Box) -> Numbers:
    """Keys of the voxels at the surface, ascending: ``(column * height + row) * slices + slice``."""
    firsts = mask.firsts(box)
    room = [np.empty((box.width // 2 + 1, 2), np.int64) for _ in range(2)]
    found = np.empty(mask.voxels, np.int64)
    count = _compiled("surface")(firsts, mask.begins, mask.ends, box.height, box.slices, *room, found)
    return np.sort(found[:count])


def _points(keys: Numbers, box: Box, spacing_mm: Floats) -> Floats:
    columns, rest = np.divmod(keys, box.height * box.slices)
    rows, slices = np.divmod(rest, box.slices)
    return np.stack([columns, rows, slices], 1).astype(np.float64) * spacing_mm


def _compiled(name: str) -> Callable[..., Any]:
    from segbatch.metrics import _lits_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(getattr(kernels, name))
