"""Boundary IoU of label maps: how well the outlines of classes agree, whatever the size of what they enclose.

Source: B. Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021;
github.com/bowenc0221/boundary-iou-api (commit 37d2558), ``boundary_iou/utils/boundary_utils.py`` (mask_to_boundary),
``coco_panoptic_api/evaluation.py`` (void).
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import runlength
from segbatch.errors import ConfigError
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import DEFAULTS, ClassCount, ImageScore, MetricOptions, Row
from segbatch.metrics.boundaries import BOUNDARY, boundary_width
from segbatch.metrics.semantic import IDS, plain_mean, ratio, runs_of
from segbatch.records import ClassTable, Figure

_TRUTH = 1


class BoundaryIouMetric(ArrayMetric):
    """Protocol ``boundary-iou``: of each class, the boundary pixels in both maps / those in either one.

    Boundary of a class in a label map is what ``mask_to_boundary`` makes of its mask: the pixels within d of a pixel of
    another label or of the image's border, in a square, d = max(1, round(0.02 * diagonal)) for each image; the option
    ``boundary`` sets the 0.02. The pixels are equal to the official ones. How they are summed up is segbatch's, because
    the official code scores objects only: ``boundary_iou`` counts the pixels of all images together, as ``miou`` does,
    and ``mean_boundary_iou`` is the mean over the classes that have a boundary in either map. The smaller one of mask
    and boundary IoU, which the official code takes for objects, is not used.

    As there, pixels of void ground truth are taken out of the prediction's boundaries; void is a label like any other
    when boundaries are made. Ground truth that the class table lacks is treated alike. Predictions of void or of
    unknown ids are boundaries of no class.

    The state holds 24 bytes a class.
    """

    name: ClassVar[str] = "boundary-iou"
    source: ClassVar[str] = "bowenc0221/boundary-iou-api mask_to_boundary by class; pixels pooled over the data set"
    headline: ClassVar[str] = "mean_boundary_iou"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    accepts: ClassVar[frozenset[str]] = frozenset({"boundary"})

    def __init__(self, classes: ClassTable, options: MetricOptions = DEFAULTS) -> None:
        """
        Raises:
            ConfigError: a width that is not above 0 and at most 1.
        """
        self.ratio = BOUNDARY if options.boundary is None else options.boundary
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"boundary is {self.ratio}", "give a part of the diagonal, above 0 and at most 1")
        self.scored = classes.scored
        counts = Field(width=3, merge="add", rows=len(self.scored))
        self.fields = {"counts": counts}  # type: ignore[misc]  # as many rows as there are classes
        self._place = np.full(IDS, len(self.scored), np.intp)
        self._place[[c.label_id for c in self.scored]] = np.arange(len(self.scored))
        self._interior = int(np.argmax(self._place))  # no class has it; small ids are counted in a small table

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Boundary pixels of one image by class: of both maps, of the ground truth, of the prediction.

        Raises:
            DataError: ``size-mismatch``, or ``bad-runs`` where runs do not fill their image.
        """
        maps = runs_of(truth, predicted)
        height, width = truth.number("height") or 0, truth.number("width") or 0
        depth = boundary_width(height, width, self.ratio)
        ours, theirs = (_boundaries(runs, height, width, depth, self._interior) for runs in maps)
        both, of_prediction = self._matrix(ours, theirs), self._matrix(maps[0], theirs)
        n = len(self.scored)
        counts = np.stack([np.diagonal(both)[:n], both[:n].sum(axis=1), of_prediction[:n, :n].sum(axis=0)], axis=1)
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), {"counts": counts})

    def compute(self, total: Arrays) -> list[Figure]:
        """The mean, then ``boundary_iou`` by class; support is the ground truth's boundary pixels."""
        rows = total.values["counts"].tolist()
        values = [ratio(both, truth + predicted - both) for both, truth, predicted in rows]
        whole = Figure("mean_boundary_iou", plain_mean(values), support=sum(row[_TRUTH] for row in rows))
        by_class = zip(self.scored, values, rows, strict=True)
        return [whole, *(Figure("boundary_iou", v, c.name, support=row[_TRUTH]) for c, v, row in by_class)]

    def image(self, state: Arrays) -> ImageScore:
        """Mean over the classes that have a boundary in this image; counts are of boundary pixels."""
        rows = zip(self.scored, state.values["counts"].tolist(), strict=True)
        classes = tuple(
            ClassCount(c.name, c.label_id, both, predicted - both, truth - both)
            for c, (both, truth, predicted) in rows
            if truth or predicted
        )
        return ImageScore(plain_mean([c.iou for c in classes]), classes)

    def confusion(self, total: Arrays) -> None:
        """None: boundaries of different classes are not compared."""

    def _matrix(self, truth: runlength.Runs, predicted: runlength.Runs) -> NDArray[np.int64]:
        """Pixels by class of both, the last row and column being those of no class."""
        rows, columns, pixels = runlength.joint_counts(truth, predicted)
        matrix = np.zeros((len(self.scored) + 1,) * 2, np.int64)
        np.add.at(matrix, (self._place[rows], self._place[columns]), pixels.astype(np.int64))
        return matrix


def _boundaries(runs: runlength.Runs, height: int, width: int, depth: int, interior: int) -> runlength.Runs:
    """The label map with ``interior`` for what is no boundary."""
    labels = np.empty((height, width), np.uint16)
    if labels.size:
        _kernel()(runs.values, runs.lengths, depth, interior, labels, np.zeros(width, np.int32))
    return runlength.encode(labels)


@functools.cache
def _kernel() -> Callable[..., Any]:
    from segbatch.metrics import _boundary_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(kernels.boundary_labels)
