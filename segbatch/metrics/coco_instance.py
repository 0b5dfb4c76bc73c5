"""COCO's figures for instances: AP and AR of masks, of boxes and of boundaries, and recall whatever the class.

Source: pycocotools 2.0.11, ``cocoeval.py`` (github.com/ppwwyyxx/cocoapi); github.com/bowenc0221/boundary-iou-api.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.metrics.arrays import Arrays
from segbatch.metrics.base import (
    DEFAULTS,
    Confusion,
    ImageScore,
    MetricOptions,
    Resampler,
    Row,
    same_size,
)
from segbatch.metrics.boundaries import boundary_part
from segbatch.metrics.coco_bootstrap import resampler
from segbatch.metrics.coco_figures import (
    Curves,
    Matches,
    Part,
    Rules,
    counted,
    curves,
    image_counts,
    image_precisions,
    parts,
    proposal_recall,
    ranking,
)
from segbatch.metrics.coco_matching import Matcher, check, rules_of, scored_classes
from segbatch.metrics.coco_states import Layout, columns, merged, state_columns, states_of
from segbatch.metrics.columns import NO_INSTANCES, instances_of
from segbatch.metrics.image_table import ImageTable, MatchTable
from segbatch.records import ClassInfo, ClassTable, Figure

_FIRST = np.uint64(1)
"""The bit of the first range (all sizes) and the first threshold."""


class CocoInstanceMetric:
    """Protocol ``coco-instance``: AP and AR of masks and boxes, all bits those of pycocotools 2.0.11.

    ``segm_ap`` (mean over the IoUs .50:.05:.95), ``_ap50``, ``_ap75``, ``_ap_small``, ``_ap_medium``, ``_ap_large``
    with 100 detections per image and class, ``segm_ar_1``, ``_ar_10``, ``_ar_100``, ``_ar_small``, ``_ar_medium``,
    ``_ar_large``, and the same as ``bbox_...``. Over all classes a value is the float64 of ``COCOeval.stats``; by class
    it is the mean over that class's part of ``eval["precision"]`` or ``eval["recall"]``. Where COCOeval says -1, there
    is no value.

    ``segm_proposal_ar_10``, ``_100``, ``_1000``, ``_small``, ``_medium``, ``_large`` (with 1000), and ``bbox_...``: the
    mean over the IoUs of the greatest recall with so many detections of an image whatever their class: COCOeval with
    ``useCats = 0`` and ``maxDets = [10, 100, 1000]``.

    What pycocotools leaves to its input is fixed here:

    - A detection's size is the area of its mask for ``segm``, and width times height of its box for ``bbox``: give
      pycocotools results without boxes for the one, and results without masks for the other.
    - An object's size and box are those of the samples: the annotation file's own.
    - Between equal scores the order of the image ids decides: as numbers where all of them are, else as text.
    - An object of id 0 can be found like any other. A mask is looked at in full also where its counts hold runs of 0.

    Detections of ignored classes are left out. Images without a row of masks count as images without detections, as
    images that COCO's results do not mention do.

    Options: ``ious`` are pycocotools' ``iouThrs``, 16 at most (``ap50`` and ``ap75`` are there where these are), and
    ``max_detections`` its ``maxDets``: ``ar_N`` for each, and the greatest for all other figures. Recall whatever the
    class keeps its numbers.

    ``ImageScore.matches`` tells of every detection that counts (the best 100 of a class) and of every object what
    became of it at the least IoU, all sizes, with the first kind of overlap: masks. A detection on a crowd is
    ``ignored``, and its ``iou`` is the part of it that the crowd covers; so is a crowd without a detection.

    State: 44 bytes per detection (the best 100 of each image and class), 12 per object and 550 per image. 118,000
    images with 94 detections each take 560 MB. What ``matches`` needs (24 bytes per detection, 8 per object) stands in
    the state table alone.
    """

    name: ClassVar[str] = "coco-instance"
    source: ClassVar[str] = "pycocotools 2.0.11, COCOeval with segm and bbox, float64"
    headline: ClassVar[str] = "segm_ap"
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    state_columns: ClassVar[tuple[str, ...]] = state_columns(("segm", "bbox"))
    accepts: ClassVar[frozenset[str]] = frozenset({"ious", "max_detections"})
    kinds: ClassVar[tuple[str, ...]] = ("segm", "bbox")
    """What overlaps are taken of: masks, boxes."""

    rules: ClassVar[Rules] = Rules()
    """The official ones."""

    def __init__(self, classes: ClassTable, options: MetricOptions = DEFAULTS) -> None:
        """
        Raises:
            ConfigError: no class is scored, or an option is out of range.
        """
        self.scored: tuple[ClassInfo, ...] = scored_classes(classes, self.name)
        self._rules = rules_of(self.rules, options)
        self._matcher = Matcher(classes, self._rules, self.kinds, boundary_part(options))
        self._layout = Layout(self.kinds, len(self._rules.proposals), self._rules.bits)
        self._ids = np.array(sorted(c.label_id for c in self.scored), np.int64)
        self._names = {c.label_id: c.name for c in self.scored}
        self._places: list[int] = np.searchsorted(self._ids, [c.label_id for c in self.scored]).tolist()
        self._parts = parts(self._rules)

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Matches:
        """Match the detections of one image with its objects.

        Raises:
            DataError: ``size-mismatch``, ``bad-mask``, ``bad-score`` (outside 0..1), ``duplicate-id``,
                ``unknown-class``.
        """
        same_size(truth, predicted)
        found = instances_of(predicted)
        check(found, truth)
        return self._matcher.match(truth, found)

    def empty(self, truth: Row) -> Matches:
        """The same for an image that no row of masks is there for: nothing was found.

        Raises:
            DataError: ``unknown-class``, ``bad-mask``.
        """
        return self._matcher.match(truth, NO_INSTANCES)

    # -- many images ---------------------------------------------------------------------------------------------------

    def columns(self, states: Sequence[Matches | None]) -> Mapping[str, pa.Array]:
        """See ``schemas.STATE``."""
        return columns(states, self._layout)

    def states(self, batch: pa.RecordBatch) -> list[Matches | None]:
        """Views on the batch's buffers."""
        return states_of(batch, self._layout)

    def merge(self, states: Iterable[Matches]) -> Matches:
        """One after the other: ``compute`` sorts the images."""
        return merged(states, self._layout)

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Matches) -> list[Figure]:
        """Over all classes those of masks, then of boxes, then recall whatever the class; then by class."""
        ranked, objects = ranking(total, self._ids), counted(total, self._ids, len(self._rules.ranges))
        found = {kind: curves(total, kind, ranked, objects, self._rules) for kind in self.kinds}
        whole = objects.sum(axis=0).tolist()
        figures = [
            Figure(f"{kind}_{name}", found[kind].mean(part), support=whole[part.range])
            for kind in self.kinds
            for name, part in self._parts.items()
        ]
        for kind in self.kinds:
            figures += self._of_proposals(kind, total, objects.sum(axis=0))
        return [*figures, *self._by_class(found, objects)]

    def resampler(self, units: Sequence[Matches]) -> Resampler:
        """See ``base.Resamples``."""
        owners = np.repeat(np.arange(len(units)), [len(u.images) for u in units])
        return resampler(self.merge(units), owners, self.kinds, self._rules, self._names)

    def _of_proposals(self, kind: str, total: Matches, objects: NDArray[np.int64]) -> list[Figure]:
        shape = (len(self._rules.proposals), len(self._rules.ranges), len(self._rules.thresholds))
        hits = total.proposals[kind].sum(axis=0, dtype=np.int64).reshape(shape)
        most = len(self._rules.proposals) - 1
        wanted = {str(n): Part(False, None, 0, place) for place, n in enumerate(self._rules.proposals)}
        wanted |= {name: Part(False, None, place, most) for place, name in enumerate(self._rules.ranges) if place}
        return [
            Figure(f"{kind}_proposal_ar_{name}", proposal_recall(hits, objects, part), support=int(objects[part.range]))
            for name, part in wanted.items()
        ]

    def _by_class(self, found: Mapping[str, Curves], objects: NDArray[np.int64]) -> Iterable[Figure]:
        """Figure by figure in class order; those that do not depend on size or number come first, of every kind."""
        plain = [name for name, part in self._parts.items() if part.is_precision and not part.range]
        for names in (plain, [name for name in self._parts if name not in plain]):
            for kind in self.kinds:
                for name in names:
                    part = self._parts[name]
                    for c, place in zip(self.scored, self._places, strict=True):
                        value = found[kind].mean(part, place)
                        yield Figure(f"{kind}_{name}", value, c.name, support=int(objects[place, part.range]))

    def image(self, state: Matches) -> ImageScore:
        """Mean AP over the classes that this image shows, as if it were the only image; of masks, in any size.

        The counts are those at the least IoU (.50); they leave crowds out.
        """
        return self.images([state]).image(0)

    def images(self, states: Sequence[Matches]) -> ImageTable:
        """See ``base.ScoresBatches``."""
        total, kind = self.merge(states), self.kinds[0]
        counts = image_counts(total, kind, self._ids)
        table = np.stack([np.broadcast_to(self._ids, counts.hits.shape), counts.hits, counts.misses], axis=-1)
        table = np.concatenate([table, (counts.objects - counts.hits)[..., None]], axis=-1)[:, self._places]
        shown = ((counts.objects > 0) | (counts.misses > 0))[:, self._places]
        partners = [s.partners for s in states if s.partners is not None]
        matches, sizes = (
            self._matches(total, partners) if len(partners) == len(states) else (None, np.zeros(len(states), np.int64))
        )
        return ImageTable(
            scores=image_precisions(total, kind, self._ids, counts.objects, self._rules),
            names=self._names,
            counts=table[shown],
            count_sizes=np.count_nonzero(shown, axis=1),
            matches=matches,
            match_sizes=sizes,
        )

    def _matches(self, total: Matches, partners: Sequence[Arrays]) -> tuple[MatchTable, NDArray[np.int64]]:
        """Image by image, of detections by class and the best first, then of the objects without any; and how many."""
        detection_ids, ids, ious, places = (
            np.concatenate([np.empty(0, dtype), *(p.flat(name) for p in partners)])
            for name, dtype in (
                ("detection_ids", np.int64),
                ("object_ids", np.int64),
                ("ious", np.float64),
                ("partners", np.int64),
            )
        )
        images = np.arange(len(partners))
        of_detections, of_objects = (np.repeat(images, n) for n in (total.detections, total.objects))
        has_truth = places >= 0
        object_places = places + (np.cumsum(total.objects) - total.objects)[of_detections]
        is_alone = np.ones(len(ids), bool)
        is_alone[object_places[has_truth]] = False
        alone = np.flatnonzero(is_alone)
        order = np.argsort(np.concatenate([of_detections, of_objects[alone]]), kind="stable")
        matched, ignored = total.matched[self.kinds[0]], total.ignored[self.kinds[0]]
        found = np.where((matched & _FIRST) != 0, 0, np.where(((matched | ignored) & _FIRST) == 0, 1, 3))
        missed = np.where((total.object_ranges[alone] & _FIRST) != 0, 2, 3)
        none, nothing = np.zeros(len(alone), np.int64), np.zeros(len(alone))
        truth_ids = np.zeros(len(places), np.int64)
        truth_ids[has_truth] = ids[object_places[has_truth]]
        table = MatchTable(
            names=self._names,
            labels=np.concatenate([total.category, total.object_category[alone]]).astype(np.int64)[order],
            truth_ids=np.concatenate([truth_ids, ids[alone]])[order],
            predicted_ids=np.concatenate([detection_ids, none])[order],
            has_truth=np.concatenate([has_truth, np.ones(len(alone), bool)])[order],
            has_prediction=order < len(places),
            ious=np.concatenate([ious, nothing])[order],
            scores=np.concatenate([total.score, nothing])[order],
            outcomes=np.concatenate([found, missed])[order],
        )
        return table, total.detections + np.bincount(of_objects[alone], minlength=len(partners))

    def confusion(self, total: Matches) -> Confusion | None:
        """None: objects are matched with detections of their own class only."""
        return None


class CocoBoundaryMetric(CocoInstanceMetric):
    """Protocol ``coco-boundary``: Boundary AP and AR, all bits those of boundary-iou-api (commit 37d2558).

    ``boundary_ap`` and all that ``coco-instance`` has for masks. An overlap is the lesser of the IoU of two masks and
    that of their boundaries: the pixels that erosion with a square of 3 x 3 takes away in d steps, where d is 2 % of
    the image's diagonal, rounded (half to even), 1 at least; what lies outside the image is background. A crowd's
    overlap is that of its mask. Everything else is ``COCOeval``'s: sizes are areas of masks.

    Options: those of ``coco-instance``, and ``boundary``, the official ``dilation_ratio`` of .02.

    What ``coco-instance`` says of its input, of ``matches`` and of the state holds here too; the words of boundaries
    stand in the state table's column for masks.
    """

    name: ClassVar[str] = "coco-boundary"
    source: ClassVar[str] = "boundary-iou-api 37d2558, COCOeval with boundary, float64"
    headline: ClassVar[str] = "boundary_ap"
    state_columns: ClassVar[tuple[str, ...]] = state_columns(("boundary",))
    accepts: ClassVar[frozenset[str]] = frozenset({"ious", "max_detections", "boundary"})
    kinds: ClassVar[tuple[str, ...]] = ("boundary",)
