"""How far confidences can be believed: of pixels of label maps, and of detections.

Source: M. P. Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015 (ECE, MCE);
C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (15 equal bins, each with its upper end).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import png
from segbatch.errors import ConfigError, DataError
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import DEFAULTS, Detail, ImageScore, MetricOptions, Row, same_size
from segbatch.metrics.boundaries import BOUNDARY
from segbatch.metrics.coco_figures import Rules
from segbatch.metrics.coco_matching import Matcher, check, rules_of, scored_classes
from segbatch.metrics.columns import NO_INSTANCES, Instances, instances_of
from segbatch.metrics.semantic import IDS, plain_sum
from segbatch.metrics.semantic_errors import added, compiled, size_of, stretches_of, sums_of
from segbatch.records import ClassInfo, ClassTable, Figure

BINS = 15

TOP = 255
"""What a confidence of 1 is stored as."""

_STEP = TOP // BINS
"""Levels of a bin: 255 is a multiple of 15, so that no level stands between two bins."""

_EDGES = np.arange(1, BINS + 1) / BINS
_FIRST = np.uint64(1)


class Bin(NamedTuple):
    """Pixels or detections whose confidence is above k / 15 and at most (k + 1) / 15; the first holds 0, too.

    Attributes:
        number: how many.
        right: how many of them are right.
        total: sum of their confidences.
    """

    number: int
    right: int
    total: float

    @property
    def gap(self) -> float:
        """Difference of confidence and accuracy; 0 where there is nothing."""
        return abs(self.total - self.right) / self.number if self.number else 0.0


def figures_of(bins: Sequence[Bin], squares: float) -> list[Figure]:
    """The figures over all classes.

    Args:
        bins: all of them.
        squares: sum of (confidence - 1)^2 of the right ones and confidence^2 of the wrong ones.
    """
    number = sum(b.number for b in bins)
    values: dict[str, float | None] = dict.fromkeys(("ece", "mce", "mean_confidence", "accuracy", "brier"))
    if number:
        values = {
            "ece": plain_sum(abs(b.total - b.right) for b in bins) / number,
            "mce": max(b.gap for b in bins),
            "mean_confidence": plain_sum(b.total for b in bins) / number,
            "accuracy": sum(b.right for b in bins) / number,
            "brier": squares / number,
        }
    return [Figure(name, value, support=number) for name, value in values.items()]


def rows_of(bins: Sequence[Bin], what: str) -> Iterable[Detail]:
    """Rows of ``details``; ``what`` says what is counted."""
    for k, b in enumerate(bins):
        values: dict[str, float | None] = {
            "from": k / BINS,
            "to": (k + 1) / BINS,
            what: float(b.number),
            "right": float(b.right),
            "mean_confidence": b.total / b.number if b.number else None,
            "accuracy": b.right / b.number if b.number else None,
        }
        yield Detail("bin", values)


def image_score(bins: Sequence[Bin]) -> ImageScore:
    """1 - ECE of an image; None where it has nothing to count."""
    ece = figures_of(bins, 0.0)[0].value
    return ImageScore(None if ece is None else 1 - min(ece, 1.0), ())


# -- label maps --------------------------------------------------------------------------------------------------------


class CalibrationMetric(ArrayMetric):
    """Protocol ``calibration``: whether label maps are right as often as they say.

    Needs masks with a confidence map: `segbatch predict --confidence`. A pixel's confidence is the probability of its
    predicted class in steps of 1/255; right is a pixel whose prediction is its ground-truth label. Pixels whose ground
    truth is void, or a label that the class table lacks, are not counted; a prediction of such a label is wrong.

    In 15 equal bins, as Guo et al. have them: ``ece`` = sum over bins of (pixels / all pixels) * |accuracy - mean
    confidence|, ``mce`` the greatest of these differences of a bin that holds any pixel (Guo et al.'s, not weighted).
    ``accuracy``, ``mean_confidence``, and ``brier``, the mean of (confidence - right)^2 of the predicted class alone,
    right being 0 or 1. A confidence of 0 counts in the first bin. By class ``mean_confidence`` and ``precision`` of the
    pixels predicted so: a class is overconfident where the first is greater.

    ``ImageScore.score`` is 1 - ECE of the image. ``details`` has a row of kind ``bin`` for each bin: ``from``, ``to``,
    ``pixels``, ``right``, ``mean_confidence``, ``accuracy``.

    State: how many pixels, and how many right ones, have which of the 256 confidences, and three numbers per class:
    4096 bytes and 24 per class, of one image as of a million. So all sums are of integers.
    """

    name: ClassVar[str] = "calibration"
    source: ClassVar[str] = "Naeini et al. 2015, Guo et al. 2017: 15 equal bins; confidences in steps of 1/255"
    headline: ClassVar[str] = "accuracy"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic", "confidence")

    def __init__(self, classes: ClassTable) -> None:
        self._scored: tuple[ClassInfo, ...] = classes.scored
        levels = Field(2, merge="add", rows=TOP + 1)
        by_class = Field(3, merge="add", rows=len(self._scored))
        self.fields = {"levels": levels, "classes": by_class}  # type: ignore[misc]  # as many rows as there are classes
        self._place = np.full(IDS, len(self._scored), np.intp)
        self._place[[c.label_id for c in self._scored]] = np.arange(len(self._scored))

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Pixels of one image by confidence, and by predicted class: all, right ones, sum of their levels.

        Raises:
            DataError: ``size-mismatch``, ``bad-runs``, ``no-confidence`` (the masks have none), ``bad-confidence``.
        """
        every = stretches_of(truth, predicted)
        found = every.at(self._place[every.truth] < len(self._scored))
        confidence = confidence_of(truth, predicted)
        if confidence is None:
            problem = (
                f"sample {truth.text('sample_id')}: the masks hold no confidence map, which protocol {self.name} needs"
            )
            raise DataError(problem, "predict into a new output with --confidence", "no-confidence")
        right = (found.truth == found.predicted).astype(np.int64)
        levels = np.zeros((TOP + 1, 2), np.int64)
        compiled("tally")(found.begins, found.ends, right, confidence.reshape(-1), levels)
        place, n = self._place[found.predicted], len(self._scored)
        sums = (found.pixels, found.pixels * right, sums_of(found, confidence))
        classes = np.stack([added(place, values, n + 1)[:n] for values in sums], axis=1)
        values = {"levels": levels, "classes": classes}
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    def compute(self, total: Arrays) -> list[Figure]:
        """The figures over all classes, then by class."""
        levels = total.values["levels"].tolist()
        squares = sum(right * (TOP - k) ** 2 + (n - right) * k**2 for k, (n, right) in enumerate(levels))
        found = figures_of(_bins(total), squares / TOP**2)
        rows = total.values["classes"].tolist()
        for name, values in (
            ("mean_confidence", [s / (n * TOP) if n else None for n, _, s in rows]),
            ("precision", [right / n if n else None for n, right, _ in rows]),
        ):
            triples = zip(self._scored, values, rows, strict=True)
            found += [Figure(name, value, c.name, support=n) for c, value, (n, _, _) in triples]
        return found

    def image(self, state: Arrays) -> ImageScore:
        """1 - ECE."""
        return image_score(_bins(state))

    def confusion(self, total: Arrays) -> None:
        """None: see protocol ``semantic``."""

    def details(self, total: Arrays) -> Iterable[Detail]:
        """The bins."""
        return rows_of(_bins(total), "pixels")


def _bins(total: Arrays) -> list[Bin]:
    rows = total.values["levels"]
    found = []
    for k in range(BINS):
        levels = np.arange(_STEP * k + 1, _STEP * (k + 1) + 1)
        inside = rows[levels]
        extra = rows[0] if k == 0 else 0
        number, right = (inside.sum(axis=0) + extra).tolist()
        found.append(Bin(number, right, int((inside[:, 0] * levels).sum()) / TOP))
    return found


def confidence_of(truth: Row, predicted: Row) -> NDArray[np.uint8] | None:
    """The confidence map of a row of masks, uint8 of shape (height, width), 255 for 1; None where there is none.

    Args:
        truth: the sample's row, for its id and size.
        predicted: the row of masks.

    Raises:
        DataError: ``bad-confidence`` (no grey PNG of 8 bits), ``size-mismatch``.
    """
    cell = predicted.column("confidence")[predicted.index].as_py()
    if cell is None or cell["png"] is None:
        return None
    name, found = truth.text("sample_id"), png.decode_labels(cell["png"])
    if found is None or found.dtype != np.uint8:
        problem = f"sample {name}: the confidence map is no grey PNG of 8 bits"
        raise DataError(problem, "predict again with --confidence", "bad-confidence")
    size = size_of(truth)
    if found.shape != size:
        words = [f"{w} x {h}" for h, w in (found.shape, size)]
        problem = f"sample {name}: the confidence map is {words[0]} pixels, the image {words[1]}"
        raise DataError(problem, "predict on the photo that was ingested", "size-mismatch")
    return np.ascontiguousarray(found)


# -- detections --------------------------------------------------------------------------------------------------------


class CalibrationInstanceMetric(ArrayMetric):
    """Protocol ``calibration-instance``: whether detections are right as often as their scores say.

    A detection is right if COCO's matching finds an object for it at IoU .5 of the masks; the option ``ious`` sets
    another one. Those on crowds are neither right nor wrong and are not counted, nor are those of ignored classes. The
    best 100 of each image and class count.

    The figures and bins are those of protocol ``calibration``, with ``score`` for confidence: ``ece``, ``mce``,
    ``mean_confidence``, ``accuracy`` (the precision of all detections together), ``brier``; by class
    ``mean_confidence`` and ``precision``. Objects that were not found have no say in any of them, and all figures
    depend on the least score that ``predict`` keeps. Scores are float64; their sums are rounded once, so that no order
    of the images changes a bit.

    State: 24 bytes per detection.
    """

    name: ClassVar[str] = "calibration-instance"
    source: ClassVar[str] = "Naeini et al. 2015, Guo et al. 2017: 15 equal bins; matched as pycocotools 2.0.11 does"
    headline: ClassVar[str] = "accuracy"
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    accepts: ClassVar[frozenset[str]] = frozenset({"ious"})
    fields: ClassVar[Mapping[str, Field]] = {"scores": Field(real=True), "hits": Field(2)}

    def __init__(self, classes: ClassTable, options: MetricOptions = DEFAULTS) -> None:
        """
        Raises:
            ConfigError: no class is scored, or more than one IoU, or one that is not above 0 and at most 1.
        """
        self._scored = scored_classes(classes, self.name)
        if len(options.ious) > 1:
            raise ConfigError(f"protocol {self.name} matches at one IoU, not at {len(options.ious)}", "give one")
        rules = rules_of(Rules(thresholds=(0.5,)), options)
        self._matcher = Matcher(classes, rules, ("segm",), BOUNDARY)

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Score, whether it is right, and label id of every detection of one image that counts.

        Raises:
            DataError: ``size-mismatch``, ``bad-mask``, ``bad-score`` (outside 0..1), ``duplicate-id``,
                ``unknown-class``.
        """
        same_size(truth, predicted)
        found = instances_of(predicted)
        check(found, truth)
        return self._matched(truth, found)

    def empty(self, truth: Row) -> Arrays:
        """An image without a row of masks: nothing was found.

        Raises:
            DataError: ``unknown-class``, ``bad-mask``.
        """
        return self._matched(truth, NO_INSTANCES)

    def _matched(self, truth: Row, found: Instances) -> Arrays:
        matches = self._matcher.match(truth, found)
        counts = (matches.ignored["segm"] & _FIRST) == 0
        right = (matches.matched["segm"] & _FIRST) != 0
        hits = np.stack([right, matches.category], axis=1)[counts]
        values = {"scores": matches.score[counts], "hits": hits}
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    def compute(self, total: Arrays) -> list[Figure]:
        """The figures over all classes, then by class."""
        scores, (right, labels) = total.flat("scores"), total.values["hits"].T
        found = figures_of(_score_bins(total), math.fsum((scores - right) ** 2))
        mine = [labels == c.label_id for c in self._scored]
        triples = [(c.name, scores[m], right[m]) for c, m in zip(self._scored, mine, strict=True)]
        for name in ("mean_confidence", "precision"):
            for class_name, s, r in triples:
                whole = math.fsum(s) if name == "mean_confidence" else int(r.sum())
                found.append(Figure(name, whole / len(s) if len(s) else None, class_name, support=len(s)))
        return found

    def image(self, state: Arrays) -> ImageScore:
        """1 - ECE; None without detections."""
        return image_score(_score_bins(state))

    def confusion(self, total: Arrays) -> None:
        """None: objects are matched with detections of their own class only."""

    def details(self, total: Arrays) -> Iterable[Detail]:
        """The bins."""
        return rows_of(_score_bins(total), "detections")


def _score_bins(total: Arrays) -> list[Bin]:
    scores, right = total.flat("scores"), total.values["hits"][:, 0]
    places = np.searchsorted(_EDGES, scores, side="left")
    inside = [places == k for k in range(BINS)]
    return [Bin(int(m.sum()), int(right[m].sum()), math.fsum(scores[m])) for m in inside]
