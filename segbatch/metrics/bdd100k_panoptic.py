"""BDD100K's panoptic quality.

Source: ``bdd100k/eval/pan_seg.py`` and ``bdd100k/common/bitmask.py`` (see ``bdd100k``).
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import columns as run_columns
from segbatch.codecs import runlength
from segbatch.codecs.runlength import Runs
from segbatch.errors import DataError
from segbatch.metrics import panoptic_quality as quality
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import OUTCOMES, Confusion, ImageScore, Match, Row, same_size
from segbatch.metrics.bdd100k import ignored_ids, official_classes, unknown_class
from segbatch.metrics.columns import segments_of
from segbatch.metrics.panoptic_quality import Totals
from segbatch.records import ClassTable, Figure

_TP, _FP, _FN, _IGNORED = range(4)
_NONE = -1
_HALF = 0.5
_PER_CENT = 100


class _Map(NamedTuple):
    """A panoptic map: runs of indices, 0 is void; of each index from 1 on its id, label id, and whether it counts."""

    runs: Runs
    ids: NDArray[np.int64]
    category: NDArray[np.int64]
    valid: NDArray[np.bool_]

    def at(self, places: NDArray[np.intp]) -> "_Map":
        """Some of the segments, in that order."""
        return self._replace(ids=self.ids[places], category=self.category[places], valid=self.valid[places])


class Bdd100kPanopticMetric(ArrayMetric):
    """Protocol ``bdd100k-pan``: panoptic quality of the 40 classes. A value is the official figure / 100, all bits.

    ``pq``, ``sq``, ``rq`` are means over the classes that occur (TP + FP + FN > 0); ``pq_things`` ... over the ten with
    instances, ``pq_stuff`` ... over the others. A class that does not occur has no value; it has 0 and N = 0 there.

    This is not COCO's rule. A union holds all pixels of both segments, those on void too. A true segment that is marked
    crowd or ignored does not count, nor does a predicted one marked crowd; a true one whose best match is a predicted
    crowd is missed. A predicted segment without a match is left out where more than half of it lies off the true
    segments that count: on void, on crowds, on ignored ones. Segments of class 0 (unlabeled) take part and have no
    figure. IoUs are added image by image in the order of the image ids, and in an image by segment id.

    The official code breaks off where an image has more than 100 predicted segments, or none; here such images count by
    the same rules. Predicted segments that are marked ignored but not crowd count, for masks do not keep that mark.
    Images without a row of masks count as images where nothing is predicted, as they do there.

    State: 40 bytes per segment, true or predicted; half of it once merged.
    """

    name: ClassVar[str] = "bdd100k-pan"
    source: ClassVar[str] = "bdd100k 1.0.1, eval/pan_seg.py on bitmasks, float64 per cent / 100"
    headline: ClassVar[str] = "pq"
    task_column: ClassVar[str] = "panoptic"
    truth_columns: ClassVar[tuple[str, ...]] = ("panoptic", "segments", "attributes")
    prediction_columns: ClassVar[tuple[str, ...]] = ("panoptic", "segments")
    fields: ClassVar[Mapping[str, Field]] = {
        "outcomes": Field(2),
        "ious": Field(real=True),
        "ids": Field(2, merge="drop"),
    }
    """``outcomes``: label id and ``tp`` ... of each segment, true ones by id and then predicted ones by id, a pair that
    matches once; ``ious`` of these, 0 without a match; ``ids`` of the true and of the predicted one, -1 for none."""

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the scored classes are not the official ones.
        """
        self.classes = official_classes(self.name, classes, range(1, 41))
        self.scored = self.classes.scored
        self._known = np.array([c.label_id for c in classes.classes], np.int64)
        self._place = np.full(int(self._known.max()) + 1, _NONE)
        self._place[[c.label_id for c in self.scored]] = np.arange(len(self.scored))

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Match the segments of one image; counted on the runs, no map is decoded.

        Raises:
            DataError: ``size-mismatch``; ``unknown-class``; ``bad-runs`` where runs do not fill their image or name a
                segment that is not listed; ``bad-annotation`` where attributes cannot be read.
        """
        same_size(truth, predicted)
        return self._matched(truth, self._map(predicted, truth, "prediction", frozenset()))

    def empty(self, truth: Row) -> Arrays:
        """The same for an image that no row of masks is there for: nothing was found.

        Raises:
            DataError: as ``update``.
        """
        area = (truth.number("height") or 0) * (truth.number("width") or 0)
        nothing = np.empty(0, np.int64)
        runs = Runs(np.zeros(1, np.uint16), np.array([area], np.uint32))
        return self._matched(truth, _Map(runs, nothing, nothing, nothing.astype(bool)))

    def _map(self, row: Row, truth: Row, what: str, ignored: frozenset[int]) -> _Map:
        segments, area = segments_of(row), (row.number("height") or 0) * (row.number("width") or 0)
        runs = run_columns.runs_at(row.column("panoptic"), row.index)
        if runs is None or int(runs.lengths.sum(dtype=np.uint64)) != area:
            problem = f"sample {truth.text('sample_id')}: the runs of the {what} do not fill its {area} pixels"
            raise DataError(problem, "write that table again", "bad-runs")
        if int(runs.values.max(initial=0)) > len(segments.ids):
            problem = f"sample {truth.text('sample_id')}: the {what} shows more than its {len(segments.ids)} segments"
            raise DataError(problem, "write that table again", "bad-runs")
        unknown = segments.category[~np.isin(segments.category, self._known)]
        if len(unknown):
            raise unknown_class(truth, what, unknown.tolist())
        valid = ~segments.crowd & ~np.isin(segments.ids, list(ignored))
        return _Map(runs, segments.ids, segments.category, valid)

    def _matched(self, truth: Row, right: _Map) -> Arrays:
        left = self._map(truth, truth, "ground truth", ignored_ids(truth, "segments"))
        meetings = np.zeros((len(left.ids) + 1, len(right.ids) + 1), np.int64)
        one, other, pixels = runlength.joint_counts(left.runs, right.runs)
        meetings[one, other] = pixels
        areas, right_areas = meetings.sum(axis=1)[1:], meetings.sum(axis=0)[1:]
        rows, columns = _shown(left.ids, areas), _shown(right.ids, right_areas)
        shared = np.ascontiguousarray(meetings[1:, 1:][np.ix_(rows, columns)])
        outcomes, ious, ids = _outcomes(left.at(rows), right.at(columns), shared, areas[rows], right_areas[columns])
        values = {"outcomes": outcomes, "ious": ious, "ids": ids}
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Arrays) -> list[Figure]:
        """All classes, things, stuff; then ``pq``, ``sq``, ``rq`` by class. Support is true segments that count."""
        return quality.figures(self._totals(total), self.scored, _PER_CENT)

    def image(self, state: Arrays) -> ImageScore:
        """The image's own panoptic quality: the mean over the classes that occur in it; and every segment's match."""
        totals = self._totals(state)
        rows = zip(*(state.values[name].tolist() for name in ("outcomes", "ious", "ids")), strict=True)
        matches = tuple(
            Match(
                class_name=self.classes.name_of(label_id),
                label_id=label_id,
                truth_id=None if one == _NONE else one,
                predicted_id=None if other == _NONE else other,
                iou=iou if outcome == _TP else None,
                score=None,
                outcome=OUTCOMES[outcome],
            )
            for (label_id, outcome), (iou,), (one, other) in rows
        )
        classes = quality.class_counts(totals, self.scored)
        return ImageScore(quality.image_quality(totals, _PER_CENT), classes, matches)

    def confusion(self, total: Arrays) -> Confusion | None:
        """None: segments match those of their own class only."""
        return None

    def _totals(self, total: Arrays) -> Totals:
        """Sums by class: of IoUs first within each image, then over the images in their order."""
        state, n = total.in_order(), len(self.scored)
        places, outcomes = self._place[state.values["outcomes"][:, 0]], state.values["outcomes"][:, 1]
        hits = np.flatnonzero((places != _NONE) & (outcomes == _TP))
        keys, inverse = np.unique(state.of_images("outcomes")[hits] * n + places[hits], return_inverse=True)
        by_image = np.bincount(inverse, state.flat("ious")[hits], len(keys))
        counted = [np.bincount(places[(places != _NONE) & (outcomes == kind)], minlength=n) for kind in (_TP, _FP, _FN)]
        return Totals(np.bincount(keys % n, by_image, n).astype(np.float64), *counted)


def _shown(ids: NDArray[np.int64], areas: NDArray[np.int64]) -> NDArray[np.intp]:
    """Places of the segments that have pixels, by id."""
    order = np.argsort(ids, kind="stable")
    return order[areas[order] > 0]


def _outcomes(
    left: _Map,
    right: _Map,
    shared: NDArray[np.int64],
    areas: NDArray[np.int64],
    right_areas: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """``pq_per_image``: the arrays of a state. ``shared`` are pixels, of shape (true, predicted), C-contiguous: the
    order of sums follows from it."""
    matched = np.zeros(len(right.ids), bool)
    outcomes = np.where(left.valid, _FN, _IGNORED)
    ious, partners = np.zeros(len(left.ids)), np.full(len(left.ids), _NONE)
    if shared.size:
        every = shared / (areas[:, None] + right_areas[None] - shared)
        every *= left.category[:, None] == right.category[None]
        best = every.argmax(axis=1)
        greatest = every[np.arange(len(best)), best]
        hits = left.valid & (greatest > _HALF) & right.valid[best]
        outcomes[hits], ious[hits], partners[hits] = _TP, greatest[hits], right.ids[best[hits]]
        matched[best[hits]] = True
    off = 1 - (shared / right_areas)[left.valid].sum(axis=0)
    rest = np.flatnonzero(~matched)
    wrong = np.where(right.valid & ~(off > _HALF), _FP, _IGNORED)
    return (
        np.concatenate([np.stack([left.category, outcomes], 1), np.stack([right.category, wrong], 1)[rest]]),
        np.concatenate([ious, np.zeros(len(rest))]),
        np.concatenate([np.stack([left.ids, partners], 1), np.stack([np.full(len(rest), _NONE), right.ids[rest]], 1)]),
    )
