"""BDD100K's figures for label maps: semantic segmentation and drivable areas.

Source: ``bdd100k/eval/seg.py`` (see ``bdd100k``); scalabel's ``scalabel/eval/sem_seg.py`` has the same formulas.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import columns as run_columns
from segbatch.codecs import runlength
from segbatch.errors import DataError
from segbatch.metrics.base import Row
from segbatch.metrics.bdd100k import official_classes
from segbatch.metrics.semantic import NOTHING, Joint, Rules, SemanticMetric, among
from segbatch.records import ClassTable, Figure

_UNLABELLED = 255


class Bdd100kSemanticMetric(SemanticMetric):
    """Protocol ``bdd100k-sem``: all pixels of the 19 classes together. 100 times a value is the official figure.

    ``miou`` is mIoU, ``mean_precision`` mAcc, ``fwiou`` fIoU, ``global_accuracy`` pAcc; by class ``iou`` is IoU and
    ``precision`` Acc: what is called accuracy there is right pixels / predicted pixels. Ground truth 255 is left out;
    a prediction that is none of the classes is wrong. Means run over the classes that the ground truth shows; one that
    it does not show has 0 by class, as it has there.

    Bits are those of the official code with two exceptions. It adds pixels in int32, which overflows where a pair of
    classes shares 2**31 pixels (2,330 whole images); here they are counted in int64. It sums a mean in the order of a
    Python set of class ids, which is theirs unless few classes are shown and ids are 8 apart: then that order depends
    on the order of the files, and it may move the last bit; here it is the order of the ids.

    Images without a row of masks count as images where nothing is predicted, as they do there.

    State: 12 bytes for each pair of classes that meets in an image.
    """

    name: ClassVar[str] = "bdd100k-sem"
    source: ClassVar[str] = "bdd100k 1.0.1, eval/seg.py on masks (sem_seg), float64 before it multiplies by 100"
    rules: ClassVar[Rules] = Rules(absent_is_zero=("iou", "precision"), unknown_truth="ignored")
    scored_ids: ClassVar[range] = range(19)

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the scored classes are not the official ones.
        """
        super().__init__(official_classes(self.name, classes, self.scored_ids))
        self._blank = next(iter(classes.ignore_ids), NOTHING)
        self._allowed = among([*self.scored_ids, len(self.scored_ids), _UNLABELLED, *classes.ignore_ids])

    def update(self, truth: Row, predicted: Row) -> Joint:
        """Joint histogram of one image, counted on the runs: no mask is decoded.

        Raises:
            DataError: ``size-mismatch``; ``bad-runs`` where runs do not fill their image; ``unknown-class`` where the
                ground truth has an id that is neither scored nor ignored, on which the official code breaks off.
        """
        return self._checked(super().update(truth, predicted), truth)

    def empty(self, truth: Row) -> Joint:
        """The same for an image that no row of masks is there for: every pixel is predicted void.

        Raises:
            DataError: as ``update``.
        """
        runs = run_columns.runs_at(truth.column("semantic"), truth.index)
        area = (truth.number("height") or 0) * (truth.number("width") or 0)
        ids, pixels = runlength.class_pixels(runs) if runs else (np.empty(0, np.uint16), np.empty(0, np.uint64))
        if int(pixels.sum()) != area:
            problem = f"sample {truth.text('sample_id')}: the runs of the ground truth do not fill its {area} pixels"
            raise DataError(problem, "write that table again", "bad-runs")
        return self._checked(Joint(ids, np.full(len(ids), self._blank, np.uint16), pixels), truth)

    def compute(self, total: Joint) -> list[Figure]:
        """``miou``, ``mean_precision``, ``fwiou``, ``global_accuracy``; then ``iou`` and ``precision`` by class.

        Support is pixels of the ground truth.
        """
        counts = self._counts(total, "error")
        support, pixels = counts.support, int(counts.support.sum())
        by_class = {
            "iou": _shares(counts.tp, support + counts.column - counts.tp),
            "precision": _shares(counts.tp, counts.column),
        }
        shown = support > 0
        whole: dict[str, float | None] = dict.fromkeys(("miou", "mean_precision", "fwiou", "global_accuracy"))
        if pixels:
            whole["miou"] = float(np.mean(by_class["iou"][shown]))
            whole["mean_precision"] = float(np.mean(by_class["precision"][shown]))
            whole["fwiou"] = float((by_class["iou"] * (support / pixels)).sum())
            whole["global_accuracy"] = int(counts.tp.sum()) / pixels
        figures = [Figure(name, value, support=pixels) for name, value in whole.items()]
        for name, values in by_class.items():
            for c, value, n in zip(self.scored, values.tolist(), support.tolist(), strict=True):
                figures.append(Figure(name, value, c.name, support=n))
        return figures

    def _checked(self, joint: Joint, truth: Row) -> Joint:
        strange = joint.truth[~self._allowed[joint.truth]]
        if len(strange):
            problem = f"sample {truth.text('sample_id')}: the ground truth has the id {strange[0]}, which no class has"
            raise DataError(problem, f"give the label ids of {self.name}", "unknown-class")
        return joint


class Bdd100kDrivableMetric(Bdd100kSemanticMetric):
    """Protocol ``bdd100k-drivable``: as ``bdd100k-sem`` for the classes direct (0) and alternative (1).

    Pixels whose ground truth is background (2) or 255 are left out; any other prediction counts as background, and is
    wrong where the ground truth is direct or alternative. Background itself has no figure.
    """

    name: ClassVar[str] = "bdd100k-drivable"
    source: ClassVar[str] = "bdd100k 1.0.1, eval/seg.py on masks (drivable), float64 before it multiplies by 100"
    scored_ids: ClassVar[range] = range(2)


def _shares(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Part / whole; 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
