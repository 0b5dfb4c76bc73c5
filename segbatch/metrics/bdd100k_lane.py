"""BDD100K's F-scores of lane marks.

Source: ``bdd100k/eval/lane.py`` (see ``bdd100k``), after the boundary measure of F. Perazzi et al., "A Benchmark
Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import columns as run_columns
from segbatch.codecs.runlength import Runs
from segbatch.errors import DataError
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import ClassCount, Confusion, ImageScore, Row, same_size
from segbatch.metrics.bdd100k import compiled, official_classes
from segbatch.records import ClassTable, Figure

TOLERANCES = (1, 2, 5)
"""Pixels that a lane may be off."""

DIRECTION, STYLE = "direction", "style"
"""The label maps beside the categories."""

_DIRECTIONS, _STYLES = ("parallel", "vertical"), ("solid", "dashed")
_CATEGORIES = 8
_KINDS = len(_DIRECTIONS) + len(_STYLES) + _CATEGORIES
_COUNTS = 2 + 2 * len(TOLERANCES)
_CROSSWALK = 0
_WRONG = {-1: "category", -2: DIRECTION, -3: STYLE}


class Bdd100kLaneMetric(ArrayMetric):
    """Protocol ``bdd100k-lane``: F-scores of lane marks at 1, 2 and 5 pixels. A value is the official one / 100.

    ``f1_pix1`` ... is the mean of ``f1_pix1_direction``, ``f1_pix1_style`` and ``f1_pix1_category``; each of these is
    the mean over its kinds: parallel and vertical, solid and dashed, the eight categories, whose ``f1_pix1`` is the
    mean over the images of F = 2 P R / (P + R). P is the part of the predicted pixels of a kind that lie within so many
    pixels (Euclidean) of a true one, R the part of the true ones near a predicted one. An image with neither has F = 1,
    one with either alone 0. So a kind that is nowhere has 1. Images are added up in the order of their ids.

    Category 255 is the background. Lanes are compared as they are; BDD100K advises to thin them to one pixel. Where a
    row has no label map ``direction`` or ``style``, every lane of it is parallel or solid, as in to_mask.py. An image
    without a row of masks counts as the official code takes it: its byte is 0 everywhere, so all of it is a parallel,
    solid crosswalk, not background.

    State: 768 bytes per image, in integers: pixels, and pixels near the other map, by kind and distance.
    """

    name: ClassVar[str] = "bdd100k-lane"
    source: ClassVar[str] = "bdd100k 1.0.1, eval/lane.py on masks, float64 per cent / 100"
    headline: ClassVar[str] = "f1_pix1"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic", "label_maps")
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic", "label_maps")
    fields: ClassVar[Mapping[str, Field]] = {"counts": Field(_KINDS * _COUNTS)}
    """``counts``: for each kind true and predicted pixels, then true and then predicted ones within 1, 2, 5 pixels."""

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the scored classes are not the official ones.
        """
        self.scored = official_classes(self.name, classes, range(_CATEGORIES)).scored
        names = (_DIRECTIONS, _STYLES, tuple(c.name for c in self.scored))
        self._tasks = dict(zip((DIRECTION, STYLE, "category"), names, strict=True))

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Compare the lanes of one image; parts of rows are widened, no map is decoded.

        Raises:
            DataError: ``size-mismatch``; ``bad-runs`` where runs do not fill their image; ``unknown-class``: a category
                that is neither 0..7 nor 255, or a direction or style of a lane that is neither 0 nor 1.
        """
        same_size(truth, predicted)
        return self._compared(truth, _lanes(truth, truth, "ground truth"), _lanes(predicted, truth, "prediction"))

    def empty(self, truth: Row) -> Arrays:
        """The same for an image that no row of masks is there for; see above.

        Raises:
            DataError: as ``update``.
        """
        height, width = truth.number("height") or 0, truth.number("width") or 0
        everywhere = [np.arange(height), np.zeros(height), np.full(height, width), np.full(height, _CROSSWALK)]
        return self._compared(truth, _lanes(truth, truth, "ground truth"), np.stack(everywhere, 1).astype(np.int32))

    def _compared(self, truth: Row, left: NDArray[np.int32], right: NDArray[np.int32]) -> Arrays:
        counts = np.zeros((_KINDS, _COUNTS), np.int64)
        compiled("lane_counts")(left, right, truth.number("height") or 0, truth.number("width") or 0, counts)
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), {"counts": counts})

    def compute(self, total: Arrays) -> list[Figure]:
        """Distance by distance the mean, the means of direction, style, category; then ``f1_pix1`` ... by kind.

        Support is true pixels.
        """
        scores, pixels = self._scores(total), _counts(total)[:, :, 0].sum(axis=0).tolist()
        lanes = sum(pixels[: len(_DIRECTIONS)])
        figures, by_kind = [], []
        for place, distance in enumerate(TOLERANCES):
            name = f"f1_pix{distance}"
            means = None if scores is None else np.stack([s[-1] for s in scores.values()]).mean(axis=0)
            figures.append(Figure(name, _share(means, place), support=lanes))
            support = iter(pixels)
            for task, kinds in self._tasks.items():
                found = None if scores is None else scores[task][:, place]
                figures.append(Figure(f"{name}_{task}", _share(found, -1), support=lanes))
                by_kind += [Figure(name, _share(found, i), k, support=next(support)) for i, k in enumerate(kinds)]
        return [*figures, *by_kind]

    def image(self, state: Arrays) -> ImageScore:
        """The image's own ``f1_pix1``; counts are pixels of the eight categories at 1 pixel, near ones being right."""
        figures = self.compute(state)
        counts = _counts(state)[0, -_CATEGORIES:].tolist()
        classes = tuple(
            ClassCount(c.name, c.label_id, tp=near, fp=found - found_near, fn=there - near)
            for c, (there, found, near, _, _, found_near, *_) in zip(self.scored, counts, strict=True)
            if there or found
        )
        return ImageScore(figures[0].value, classes)

    def confusion(self, total: Arrays) -> Confusion | None:
        """None: lanes are compared kind by kind."""
        return None

    def _scores(self, total: Arrays) -> dict[str, NDArray[np.float64]] | None:
        """``merge_results``: per cent by task, of shape (kinds + 1, distances), the mean last; None without images."""
        if not total.images:
            return None
        scores, first, found = _f_scores(_counts(total.in_order())), 0, {}
        for task, kinds in self._tasks.items():
            by_kind = np.ascontiguousarray(scores[:, first : first + len(kinds)]).mean(axis=0) * 100
            found[task] = np.concatenate([by_kind, by_kind.mean(axis=0, keepdims=True)])
            first += len(kinds)
        return found


def _counts(state: Arrays) -> NDArray[np.int64]:
    """Of shape (images, kinds, counts)."""
    return state.values["counts"].reshape(-1, _KINDS, _COUNTS)


def _f_scores(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """``eval_lane_per_threshold`` of every image, kind and distance; shape (images, kinds, distances)."""
    there, found = counts[:, :, :1], counts[:, :, 1:2]
    near, found_near = counts[:, :, 2 : 2 + len(TOLERANCES)], counts[:, :, 2 + len(TOLERANCES) :]
    precision, recall = found_near / np.maximum(found, 1), near / np.maximum(there, 1)
    whole = precision + recall
    f_score = np.divide(2.0 * precision * recall, whole, out=np.zeros(whole.shape), where=whole > 0)
    return np.where((there == 0) & (found == 0), 1.0, f_score)


def _share(per_cent: NDArray[np.float64] | None, place: int) -> float | None:
    return None if per_cent is None else float(per_cent[place]) / 100


def _lanes(row: Row, truth: Row, what: str) -> NDArray[np.int32]:
    """The lanes of a row as parts of rows of pixels; see ``_bdd100k_kernels.spans``.

    Raises:
        DataError: see ``Bdd100kLaneMetric.update``.
    """
    height, width = row.number("height") or 0, row.number("width") or 0
    category = run_columns.runs_at(row.column("semantic"), row.index)
    maps = run_columns.label_maps_at(row.column("label_maps"), row.index)
    plain = Runs(np.zeros(1, np.uint16), np.array([height * width], np.uint32))
    runs = (category, maps.get(DIRECTION, plain), maps.get(STYLE, plain))
    for one in runs:
        if one is None or int(one.lengths.sum(dtype=np.uint64)) != height * width:
            problem = (
                f"sample {truth.text('sample_id')}: the runs of the {what} do not fill its {height * width} pixels"
            )
            raise DataError(problem, "write that table again", "bad-runs")
    arrays = [a for one in runs if one is not None for a in one]
    found = np.empty((sum(len(a) for a in arrays[::2]) + height + 1, 4), np.int32)
    count = compiled("spans")(*map(np.ascontiguousarray, arrays), width, found)
    if count < 0:
        raise _unknown(truth, what, _WRONG[count], found[0].tolist())
    return found[:count]


def _unknown(truth: Row, what: str, field: str, found: list[int]) -> DataError:
    row, column, value, *_ = found
    problem = f"sample {truth.text('sample_id')}: the {what} has the {field} {value} in row {row}, column {column}"
    fix = f"give lanes the {field} 0 or 1"
    if field == "category":
        fix = "give the categories 0 to 7, 255 elsewhere; import lane bytes with the format bdd100k-lane"
    return DataError(problem, fix, "unknown-class")
