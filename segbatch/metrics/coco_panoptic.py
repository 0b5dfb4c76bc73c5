"""COCO's panoptic quality.

Source: github.com/cocodataset/panopticapi (commit 7bb4655), ``panopticapi/evaluation.py``:
``pq_compute_single_core`` and ``PQStat.pq_average``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.codecs import columns as run_columns
from segbatch.codecs import runlength
from segbatch.codecs.runlength import Runs
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import panoptic_quality as quality
from segbatch.metrics.base import Confusion, ImageScore, Row, image_order, same_size
from segbatch.metrics.columns import list_array, lists_of, segments_of
from segbatch.metrics.panoptic_quality import Totals
from segbatch.records import ClassInfo, ClassTable, Figure

_VOID = -1
"""In place of a class: pixels of no segment, or of one of an ignored class."""

_MATCH = 0.5
"""IoU above which two segments match, and share of a false segment above which it is left out."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What panoptic evaluators differ in.

    Attributes:
        ignored_predictions: a predicted segment of an ignored class is ``void``, or ``refused``.
        hint: what to do about a segment of a class that is refused.
    """

    ignored_predictions: Literal["void", "refused"] = "void"
    hint: str = "the samples lack that class: give segments their label ids"


@dataclass(frozen=True, slots=True)
class SegmentMatches:
    """Which segments of any number of images are found.

    One entry per image, the images in any order:
        images: sample ids.
        matches, errors: how many of the entries below are the image's, int64 of shape (images,).

    One entry per match, by id of the true segment:
        category: label id, int32.
        iou: float64, above .5.

    One entry per image and class with errors:
        error_category: label id, int32.
        fp, fn: predicted segments that are wrong, true ones that are not found, uint32.
    """

    images: tuple[str, ...]
    matches: NDArray[np.int64]
    errors: NDArray[np.int64]
    category: NDArray[np.int32]
    iou: NDArray[np.float64]
    error_category: NDArray[np.int32]
    fp: NDArray[np.uint32]
    fn: NDArray[np.uint32]


class _Map(NamedTuple):
    """A panoptic map and its segments; the arrays have shape (segments + 1,), and entry 0 is void.

    ``classes`` are places in ``scored``, or ``_VOID``.
    """

    runs: Runs
    ids: NDArray[np.int64]
    classes: NDArray[np.int64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]


class _Meetings(NamedTuple):
    """Pairs of a true and a predicted segment that share pixels; shape (pairs,)."""

    truth: NDArray[np.intp]
    predicted: NDArray[np.intp]
    pixels: NDArray[np.float64]


class CocoPanopticMetric:
    """Protocol ``coco-panoptic``: panoptic quality by the rule of panopticapi, all bits those of one process.

    ``pq``, ``sq``, ``rq`` are means over the classes that occur (TP + FP + FN > 0); ``pq_things`` ... are those over
    classes with ``isthing``, ``pq_stuff`` ... those over the others. A class that does not occur has no value; in
    panopticapi's list by class it has 0. Values are shares, 0..1; panopticapi prints per cent with one decimal.

    Segments of one class match where IoU > .5. A true segment's area is that of the samples (the annotation file's), a
    predicted one's its pixels; its pixels on void are no part of the union. A predicted segment without a match is left
    out where more than half of it lies on void or the last crowd of its class. IoUs are summed in the order of the
    image ids (as numbers where all of them are, else as text) and in an image by segment id, as panopticapi does with
    one process and a file in the order of its ids; more processes, or another order, move its last bits.

    Segments of ignored classes are void. Images without a row of masks are an error, as they are for panopticapi.

    State: 12 bytes per match, 12 per class with errors in an image, 100 per image.
    """

    name: ClassVar[str] = "coco-panoptic"
    source: ClassVar[str] = "panopticapi 7bb4655, evaluation.py in one process, float64 before it prints"
    headline: ClassVar[str] = "pq"
    task_column: ClassVar[str] = "panoptic"
    truth_columns: ClassVar[tuple[str, ...]] = ("panoptic", "segments")
    prediction_columns: ClassVar[tuple[str, ...]] = ("panoptic", "segments")
    state_columns: ClassVar[tuple[str, ...]] = ("segment_matches", "segment_errors")
    rules: ClassVar[Rules] = Rules()

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: no class is scored.
        """
        self.scored: tuple[ClassInfo, ...] = classes.scored
        if not self.scored:
            raise ConfigError(
                f"protocol {self.name} needs classes, the samples name none", "name them and ingest again"
            )
        self._label_ids = np.array([c.label_id for c in self.scored], np.int64)
        self._by_id = np.argsort(self._label_ids)
        self._ignored = np.array(classes.ignore_ids, np.int64)

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> SegmentMatches:
        """Match the segments of one image; counted on the runs, no map is decoded.

        Raises:
            DataError: ``size-mismatch``; ``unknown-class``; ``bad-runs`` where runs do not fill their image or name a
                segment that is not listed; ``bad-annotation`` where a true segment is smaller than what is found of it.
        """
        same_size(truth, predicted)
        refused = self._ignored if self.rules.ignored_predictions == "refused" else self._ignored[:0]
        left = self._map(truth, truth, "ground truth", self._ignored[:0])
        right = self._map(predicted, truth, "prediction", refused)
        *pair, pixels = runlength.joint_counts(left.runs, right.runs)
        meetings = _Meetings(pair[0].astype(np.intp), pair[1].astype(np.intp), pixels.astype(np.float64))
        hits, iou = _matches(left, right, meetings, truth)
        category = left.classes[meetings.truth[hits]]
        fp, fn = self._errors(left, right, meetings, hits)
        wrong = np.flatnonzero(fp + fn)
        return SegmentMatches(
            images=(truth.text("sample_id") or "",),
            matches=np.array([len(category)]),
            errors=np.array([len(wrong)]),
            category=self._label_ids[category].astype(np.int32),
            iou=iou,
            error_category=self._label_ids[wrong].astype(np.int32),
            fp=fp[wrong].astype(np.uint32),
            fn=fn[wrong].astype(np.uint32),
        )

    def _map(self, row: Row, truth: Row, what: str, refused: NDArray[np.int64]) -> _Map:
        """A row's map and segments; label ids that are ``refused`` are as unknown as those that the samples lack."""
        segments, area = segments_of(row), (row.number("height") or 0) * (row.number("width") or 0)
        runs = run_columns.runs_at(row.column("panoptic"), row.index)
        if runs is None or int(runs.lengths.sum(dtype=np.uint64)) != area:
            problem = f"sample {truth.text('sample_id')}: the runs of the {what} do not fill its {area} pixels"
            raise DataError(problem, "write that table again", "bad-runs")
        if int(runs.values.max(initial=0)) > len(segments.ids):
            problem = f"sample {truth.text('sample_id')}: the {what} shows more than its {len(segments.ids)} segments"
            raise DataError(problem, "write that table again", "bad-runs")
        return _Map(
            runs,
            np.concatenate([[0], segments.ids]),
            np.concatenate([[_VOID], self._classes(segments.category, truth, what, refused)]),
            np.concatenate([[0.0], segments.area]),
            np.concatenate([[False], segments.crowd]),
        )

    def _classes(
        self, category: NDArray[np.int64], truth: Row, what: str, refused: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Place of each label id in ``scored``, ``_VOID`` for ignored ones."""
        found = np.searchsorted(self._label_ids, category, sorter=self._by_id)
        places = self._by_id[np.minimum(found, len(self.scored) - 1)]
        scored = self._label_ids[places] == category
        unknown = category[~scored & (~np.isin(category, self._ignored) | np.isin(category, refused))]
        if len(unknown):
            problem = f"sample {truth.text('sample_id')}: the {what} has a segment of class {unknown[0]}"
            raise DataError(problem, self.rules.hint, "unknown-class")
        return np.where(scored, places, _VOID)

    def _errors(
        self, left: _Map, right: _Map, meetings: _Meetings, hits: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """False positives and false negatives by class."""
        missed = (left.classes >= 0) & ~left.crowd
        missed[meetings.truth[hits]] = False
        crowds = np.full(len(self.scored) + 1, -1)  # the last one of each class; none of void
        for place in np.flatnonzero(left.crowd & (left.classes >= 0)):
            crowds[left.classes[place]] = place
        skipped = left.classes[meetings.truth] < 0
        skipped |= meetings.truth == crowds[right.classes[meetings.predicted]]
        area = _pixels(meetings, right)
        wrong = (right.classes >= 0) & (area > 0)
        wrong &= ~(_pixels(meetings, right, skipped) / np.maximum(area, 1) > _MATCH)
        wrong[meetings.predicted[hits]] = False
        counts = (np.bincount(m.classes[w], minlength=len(self.scored)) for m, w in ((right, wrong), (left, missed)))
        fp, fn = counts
        return fp, fn

    # -- many images ---------------------------------------------------------------------------------------------------

    def columns(self, states: Sequence[SegmentMatches | None]) -> Mapping[str, pa.Array]:
        """See ``schemas.STATE``."""
        whole = self.merge(s for s in states if s is not None)
        matches = [None if s is None else len(s.iou) for s in states]
        errors = [None if s is None else len(s.fp) for s in states]
        return {
            "segment_matches": list_array("segment_matches", [whole.category, whole.iou], matches),
            "segment_errors": list_array("segment_errors", [whole.error_category, whole.fp, whole.fn], errors),
        }

    def states(self, batch: pa.RecordBatch) -> list[SegmentMatches | None]:
        """Views on the batch's buffers."""
        matches, errors = lists_of(batch, "segment_matches"), lists_of(batch, "segment_errors")
        valid = batch.column("segment_matches").is_valid().to_pylist()
        found: list[SegmentMatches | None] = []
        for row, (name, is_there) in enumerate(zip(batch.column("sample_id").to_pylist(), valid, strict=True)):
            (category, iou), (error_category, fp, fn) = matches.row(row), errors.row(row)
            sizes = np.array([len(iou)]), np.array([len(fp)])
            state = SegmentMatches((name,), *sizes, category, iou, error_category, fp, fn)
            found.append(state if is_there else None)
        return found

    def merge(self, states: Iterable[SegmentMatches]) -> SegmentMatches:
        """One after the other: ``compute`` sorts the images."""
        none, categories, counts = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint32)
        nothing = SegmentMatches((), none, none, categories, np.empty(0), categories, counts, counts)
        found = [nothing, *states]

        def joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(list(arrays))

        return SegmentMatches(
            images=tuple(name for s in found for name in s.images),
            matches=joined(s.matches for s in found),
            errors=joined(s.errors for s in found),
            category=joined(s.category for s in found),
            iou=joined(s.iou for s in found),
            error_category=joined(s.error_category for s in found),
            fp=joined(s.fp for s in found),
            fn=joined(s.fn for s in found),
        )

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: SegmentMatches) -> list[Figure]:
        """All classes, things, stuff; then ``pq``, ``sq``, ``rq`` by class. Support is true segments without crowds."""
        return quality.figures(self._totals(total), self.scored)

    def image(self, state: SegmentMatches) -> ImageScore:
        """The image's own panoptic quality: the mean over the classes that occur in it."""
        totals = self._totals(state)
        return ImageScore(quality.image_quality(totals), quality.class_counts(totals, self.scored))

    def confusion(self, total: SegmentMatches) -> Confusion | None:
        """None: segments match those of their own class only."""
        return None

    def _totals(self, total: SegmentMatches) -> Totals:
        """Sums by class; IoUs are added one by one, in the order of the image ids."""
        order = image_order(total.images)
        counts = total.matches[order]
        ends, firsts = np.cumsum(counts), np.cumsum(total.matches) - total.matches
        places = np.repeat(firsts[order] - (ends - counts), counts) + np.arange(len(total.iou))
        classes, error_classes = (self._places(c) for c in (total.category[places], total.error_category))
        n = len(self.scored)
        return Totals(
            _sums(classes, total.iou[places], n),
            np.bincount(classes, minlength=n),
            *(_sums(error_classes, e, n).astype(np.int64) for e in (total.fp, total.fn)),
        )

    def _places(self, category: NDArray[np.int32]) -> NDArray[np.intp]:
        """Places of label ids in ``scored``."""
        return self._by_id[np.searchsorted(self._label_ids, category, sorter=self._by_id)]


def _pixels(meetings: _Meetings, right: _Map, where: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Pixels of every predicted segment, of all meetings or of some."""
    pixels = meetings.pixels if where is None else np.where(where, meetings.pixels, 0.0)
    return _sums(meetings.predicted, pixels, len(right.ids))


def _sums(places: NDArray[np.intp], values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Sum of the values of each place, added one by one."""
    return np.bincount(places, values, count).astype(np.float64)  # integers where there is nothing to add


def _matches(left: _Map, right: _Map, meetings: _Meetings, truth: Row) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Places of the meetings that are matches, by id of the true and then of the predicted segment; and their IoUs."""
    classes = left.classes[meetings.truth]
    same = (classes >= 0) & (classes == right.classes[meetings.predicted]) & ~left.crowd[meetings.truth]
    void = _pixels(meetings, right, classes < 0)
    places = np.flatnonzero(same)
    one, other = meetings.truth[places], meetings.predicted[places]
    union = _pixels(meetings, right)[other] + left.area[one] - meetings.pixels[places] - void[other]
    if (union <= 0).any():
        number = left.ids[one[union <= 0][0]]
        problem = f"sample {truth.text('sample_id')}: segment {number} has more pixels than the area that it is given"
        raise DataError(problem, "correct its area", "bad-annotation")
    iou = meetings.pixels[places] / union
    order = np.lexsort((right.ids[other], left.ids[one]))
    order = order[iou[order] > _MATCH]
    return places[order], iou[order]
