"""Small random CT volumes with liver and lesions, and what LiTS's official program says of them.

``official`` is the rule of github.com/PatrickChrist/lits-challenge-scoring (commit 090307d) written down anew with
SciPy on whole arrays of voxels, because that program runs with libraries of 2017 only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from segbatch import schemas
from segbatch.codecs import columns, runlength

Voxels = NDArray[np.uint8]

LARGE = 9001
SPACINGS = (
    (1.0, 1.0, 1.0),
    (float(np.float32(0.7)), 0.75, 2.5),
    (0.9765625, float(np.float32(0.6)), 5.0),
    (3.0, 1.0, 0.5),
)
DEFAULTS = {"dice": 0.0, "jaccard": 0.0, "voe": 1.0, "rvd": LARGE, "assd": LARGE, "rmsd": LARGE, "msd": LARGE}


@dataclass(frozen=True)
class Scan:
    """One volume.

    Attributes:
        name: without suffix.
        truth, predicted: labels by column, row and slice, as nibabel gives the axes of the file.
        spacing: mm.
    """

    name: str
    truth: Voxels
    predicted: Voxels
    spacing: tuple[float, float, float]

    def batches(self) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Rows of samples and masks, by slice."""
        return self._rows(schemas.SAMPLES, self.truth), self._rows(schemas.MASKS, self.predicted)

    def _rows(self, schema: pa.Schema, labels: Voxels) -> pa.RecordBatch:
        width, height, slices = labels.shape
        same: dict[str, Any] = {"group_id": self.name, "image_uri": "", "etag": "", "status": "ok", "model_digest": ""}
        same |= {"height": height, "width": width}
        at = {"slices": slices, "spacing_mm": self.spacing}
        made = {
            "sample_id": pa.array([f"{self.name}/{k:04d}" for k in range(slices)]),
            "semantic": columns.runs_array([runlength.encode(labels[:, :, k].T) for k in range(slices)]),
            "volume": pa.array([{"index": k, **at} for k in range(slices)], schemas.VOLUME),
        }
        arrays = [made[f.name] if f.name in made else pa.array([same.get(f.name)] * slices, f.type) for f in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


# -- volumes -----------------------------------------------------------------------------------------------------------


def random_scan(seed: int, name: str = "") -> Scan:
    """A few voxels: boxes of lesions and noise, often touching the border or each other; a prediction that copies,
    drops, moves, merges, splits and adds some. Every so often a side has no lesion, no liver, or nothing."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 11, 3))
    truth = _labels(rng, shape, lesions=int(rng.integers(0, 7)) if seed % 9 else 0)
    predicted = truth.copy()
    for _ in range(int(rng.integers(0, 6))):
        change = rng.integers(0, 5)
        if change == 0:
            predicted = np.roll(predicted, int(rng.integers(-2, 3)), int(rng.integers(0, 3)))
        elif change == 1:
            predicted[_box(rng, shape)] = rng.integers(0, 3)
        elif change == 2:
            predicted = np.where(rng.random(shape) < 0.1, rng.integers(0, 3, shape), predicted).astype(np.uint8)
        elif change == 3:
            predicted = np.where(ndimage.binary_dilation(predicted == 2), 2, predicted).astype(np.uint8)
        else:
            predicted[predicted == 2] = rng.choice([1, 2], int((predicted == 2).sum()), p=[0.2, 0.8])
    if seed % 13 == 5:
        predicted = _labels(rng, shape, lesions=3)
    if seed % 17 == 3:
        predicted[:] = 0
    if seed % 19 == 4:
        predicted[predicted == 1] = 0
    if seed % 23 == 6:
        truth[truth == 1] = 2
    return Scan(name or f"volume-{seed}", truth, predicted, SPACINGS[rng.integers(len(SPACINGS))])


def _labels(rng: np.random.Generator, shape: Sequence[int], lesions: int) -> Voxels:
    labels = np.zeros(shape, np.uint8)
    labels[_box(rng, shape) if rng.random() < 0.8 else ...] = 1
    if rng.random() < 0.5:
        labels[labels == 0] = rng.random(int((labels == 0).sum())) < 0.2
    for _ in range(lesions):
        labels[_box(rng, [min(n, 4) for n in shape], shape)] = 2
    if lesions and rng.random() < 0.4:
        labels[rng.random(shape) < 0.1] = 2
    return labels


def _box(rng: np.random.Generator, greatest: Sequence[int], shape: Sequence[int] = ()) -> tuple[slice, ...]:
    sizes = [int(rng.integers(1, n + 1)) for n in greatest]
    starts = [int(rng.integers(0, n - s + 1)) for n, s in zip(shape or greatest, sizes, strict=True)]
    return tuple(slice(a, a + s) for a, s in zip(starts, sizes, strict=True))


# -- the official rule -------------------------------------------------------------------------------------------------


class EndsProgramError(Exception):
    """The official program stops with an exception."""


def official(scans: Sequence[Scan], upstream_bugs: bool) -> dict[str, float | None]:
    """``scores.txt`` with all digits; without the bugs None stands for what is undefined there.

    Raises:
        EndsProgramError: the program ends without a file, with its bugs.
    """
    hits, wrong = {0: 0, 0.5: 0}, {0: 0, 0.5: 0}
    missed = {0: 0, 0.5: 0}
    lesion_scores: list[dict[str, float]] = []
    liver_scores: list[dict[str, float]] = []
    lesion_dices, liver_dices, burdens = [], [], []
    shared, sizes = {"lesion": 0, "liver": 0}, {"lesion": 0, "liver": 0}
    for scan in sorted(scans, key=lambda s: f"{s.name}.nii"):
        truth, predicted = scan.truth, scan.predicted
        truth_labels, truths = ndimage.label(truth == 2, output=np.int16)
        labels, predictions = ndimage.label(predicted == 2, output=np.int16)
        has_liver = bool(np.any(predicted == 1))
        if upstream_bugs and not truths:
            raise EndsProgramError(f"{scan.name} has no lesion")
        for iou in (0, 0.5):
            detected, merged, found = detect(labels, truth_labels, iou, upstream_bugs)
            hits[iou] += found
            wrong[iou] += predictions - found
            missed[iou] += truths - found
        if found > 0:
            lesion_scores += scores(detected, merged, scan.spacing)
        if has_liver:
            liver_scores += scores(predicted >= 1, truth >= 1, scan.spacing)
        else:
            liver_scores.append(DEFAULTS)
        either = np.any(predicted == 2) or np.any(truth == 2)
        lesion_dices.append(dice(predicted == 2, truth == 2) if either else 1.0)
        liver_dices.append(dice(predicted >= 1, truth >= 1) if has_liver else 0.0)
        for what, least in (("lesion", 2), ("liver", 1)):
            sizes[what] += int((truth >= least).sum())
            if what == "lesion" or has_liver:
                shared[what] += int(((truth >= least) & (predicted >= least)).sum())
                sizes[what] += int((predicted >= least).sum())
        if truth.any():
            burdens.append(burden(truth) - (burden(predicted) if has_liver else LARGE))
        elif upstream_bugs:
            raise EndsProgramError(f"{scan.name} has no liver")
    result: dict[str, float | None] = {}
    for iou, suffix in ((0.5, ""), (0, "_greater_zero")):
        every = {"precision": hits[iou] + wrong[iou], "recall": hits[iou] + missed[iou]}
        result |= {f"lesion_{name}{suffix}": hits[iou] / n if n else 0.0 for name, n in every.items()}
    for what, found_scores, dices in (("lesion", lesion_scores, lesion_dices), ("liver", liver_scores, liver_dices)):
        for name, default in DEFAULTS.items():
            values = [s[name] for s in found_scores]
            result[f"{what}_{name}"] = float(np.mean(values)) if values else default
        result[f"{what}_dice_per_case"] = float(np.mean(dices))
        result[f"{what}_dice_global"] = 2.0 * shared[what] / sizes[what] if sizes[what] else None
    result["tumor_burden_rmse"] = float(np.sqrt(np.mean(np.square(burdens)))) if burdens else None
    result["tumor_burden_max"] = float(np.max(burdens)) if burdens else None
    return result


def burden(labels: Voxels) -> float:
    """Part of the liver that is lesion."""
    return float((labels == 2).sum()) / float((labels >= 1).sum())


def dice(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Of two masks that are not both empty."""
    return float(2.0 * np.count_nonzero(one & other) / float(np.count_nonzero(one) + np.count_nonzero(other)))


def detect(
    labels: NDArray[Any], truth_labels: NDArray[Any], least: float, upstream_bugs: bool
) -> tuple[NDArray[Any], NDArray[Any], int]:
    """``detect_lesions``: masks of detected and of merged reference lesions, and how many count as detected."""
    wide = np.uint8 if upstream_bugs else np.int64
    detected, merged = np.zeros(labels.shape, wide), truth_labels.astype(np.int64)
    truths = [int(v) for v in np.unique(truth_labels) if v]
    predictions = [int(v) for v in np.unique(labels[truth_labels > 0]) if v]
    if not truths:
        return detected, merged, 0
    box = ndimage.find_objects(((truth_labels > 0) | np.isin(labels, predictions)).astype(np.int8))[0]
    p_box, t_box, d_box, m_box = labels[box], truth_labels[box], detected[box], merged[box]
    overlap = {(p, t): int(np.count_nonzero((p_box == p) & (t_box == t))) for p in predictions for t in truths}
    group = {t: [t] for t in truths}
    for p in predictions:
        mine = [t for t in truths if overlap[p, t] and all(_first(overlap, p, q, t) for q in predictions)]
        for t in mine:
            group[t] = mine
            m_box[t_box == t] = mine[0]
    matched: dict[int, list[int]] = {}
    for p in predictions:
        areas = {mine[0]: sum(overlap[p, t] for t in mine) for mine in group.values()}
        best = max(areas, key=lambda t: (areas[t], -t))
        matched.setdefault(best, []).append(p)
        d_box[p_box == p] = best & 255 if upstream_bugs else best
    hits = len(matched)
    for t, mine in sorted(matched.items(), key=lambda entry: entry[1][0]):
        area = sum(overlap[p, u] for p in mine for u in group[t])
        other = d_box == mine[0] if upstream_bugs else np.isin(p_box, mine)
        if area / np.count_nonzero(other | (m_box == t)) <= least:
            d_box[d_box == t] = 0
            hits -= len(group[t]) if upstream_bugs else 1
    return detected, merged, hits


def _first(overlap: dict[tuple[int, int], int], p: int, q: int, t: int) -> bool:
    """Whether p covers more of t than q does, or as much and comes first."""
    return (overlap[p, t], -p) >= (overlap[q, t], -q)


def scores(predicted: NDArray[Any], truth: NDArray[Any], spacing: tuple[float, float, float]) -> list[dict[str, float]]:
    """``compute_segmentation_scores``, by object."""
    found = []
    for number in np.unique(predicted):
        if not number:
            continue
        either = (truth == number) | (predicted == number)
        box = ndimage.find_objects(either.astype(np.int8))[0]
        p, t = (predicted == number)[box], (truth == number)[box]
        if not t.any():
            found.append(DEFAULTS)
            continue
        overlap = dice(p, t)
        jaccard = overlap / (2.0 - overlap)
        rvd = (int(t.sum()) - int(p.sum())) / float(p.sum())
        distances = dict(zip(("assd", "rmsd", "msd"), surface_distances(p, t, spacing), strict=True))
        found.append({"dice": overlap, "jaccard": jaccard, "voe": 1.0 - jaccard, "rvd": rvd, **distances})
    return found


def surface_distances(
    one: NDArray[np.bool_], other: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> tuple[float, float, float]:
    """``Surface``: average, root mean square and maximum symmetric surface distance."""
    cross = ndimage.generate_binary_structure(3, 2)
    points = [
        np.argwhere(m & ~ndimage.binary_erosion(m, cross)).astype(float) * np.array(spacing) for m in (one, other)
    ]
    there, back = cKDTree(points[0]).query(points[1])[0], cKDTree(points[1]).query(points[0])[0]
    count = len(there) + len(back)
    rmsd = math.sqrt(1.0 / count) * math.sqrt((there * there).sum() + (back * back).sum())
    return 1.0 / count * (there.sum() + back.sum()), rmsd, max(there.max(), back.max())
