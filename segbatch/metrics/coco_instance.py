"""COCO's figures for instances: AP and AR of masks and of boxes, and recall whatever the class.

Source: pycocotools 2.0.11, ``cocoeval.py`` (github.com/ppwwyyxx/cocoapi).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.errors import ConfigError, DataError
from segbatch.metrics.base import ClassCount, Confusion, ImageScore, Row, same_size
from segbatch.metrics.coco_figures import (
    Curves,
    Matches,
    Part,
    Rules,
    Words,
    average_precision,
    compiled,
    counted,
    curves,
    parts,
    proposal_recall,
    ranking,
    ranks_of,
)
from segbatch.metrics.columns import NO_INSTANCES, Instances, Lists, instances_of, list_array, lists_of
from segbatch.records import ClassInfo, ClassTable, Figure

_WORD = 64
_FIRST = np.uint64(1)
"""The bit of the first range (all sizes) and the first threshold."""

_BELOW_ONE = 1 - 1e-10
"""The greatest IoU that is asked for: at a threshold of 1 rounding must not decide."""


class _Order(NamedTuple):
    """Detections or objects in the order in which they are matched: their places, and their classes, int64 (n,)."""

    places: NDArray[np.int64]
    classes: NDArray[np.int64]

    def regardless(self, by: NDArray[np.int64]) -> "_Order":
        """The same in the order ``by``, as if all were of one class."""
        return _Order(self.places[by], np.zeros(len(by), np.int64))


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

    State: 44 bytes per detection (the best 100 of each image and class), 12 per object and 550 per image. 118,000
    images with 94 detections each take 560 MB.
    """

    name: ClassVar[str] = "coco-instance"
    source: ClassVar[str] = "pycocotools 2.0.11, COCOeval with segm and bbox, float64"
    headline: ClassVar[str] = "segm_ap"
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances",)
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    state_columns: ClassVar[tuple[str, ...]] = ("detections", "matches_segm", "matches_bbox", "objects", "proposals")
    kinds: ClassVar[tuple[str, ...]] = ("segm", "bbox")
    """What overlaps are taken of: masks, boxes."""

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
        if self.rules.bits > _WORD:
            problem = f"{len(self.rules.thresholds)} IoUs for {len(self.rules.ranges)} ranges of size are too many"
            raise ConfigError(problem, f"a state holds {_WORD} combinations")
        self._ids = np.array(sorted(c.label_id for c in self.scored), np.int64)
        self._places: list[int] = np.searchsorted(self._ids, [c.label_id for c in self.scored]).tolist()
        self._known = np.array([c.label_id for c in classes.classes], np.int64)
        self._parts = parts(self.rules)
        self._thresholds = np.minimum(self.rules.thresholds, _BELOW_ONE)
        self._ranges = np.array(list(self.rules.ranges.values()), np.float64).ravel()
        self._proposals = np.array(self.rules.proposals, np.int64)

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Matches:
        """Match the detections of one image with its objects.

        Raises:
            DataError: ``size-mismatch``, ``bad-mask``, ``bad-score`` (outside 0..1), ``duplicate-id``,
                ``unknown-class``.
        """
        same_size(truth, predicted)
        found = instances_of(predicted)
        _check(found, truth)
        return self._matched(truth, found)

    def empty(self, truth: Row) -> Matches:
        """The same for an image that no row of masks is there for: nothing was found.

        Raises:
            DataError: ``unknown-class``, ``bad-mask``.
        """
        return self._matched(truth, NO_INSTANCES)

    def _matched(self, row: Row, found: Instances) -> Matches:
        objects = instances_of(row)
        classes, object_classes = self._classes(found, row), self._classes(objects, row)
        best = _scored(np.lexsort((-found.score, classes)), classes)
        targets = _scored(np.argsort(object_classes, kind="stable"), object_classes)
        best_of_all = best.regardless(np.argsort(-found.score[best.places], kind="stable"))
        all_targets = targets.regardless(np.arange(len(targets.places)))
        object_ranges = np.zeros(len(objects.area), np.uint64)
        compiled("ranges_of")(objects.area, objects.crowd, self._ranges, object_ranges)
        kept = _few(best.classes, self.rules.detections[-1])
        matched, ignored, proposals = {}, {}, {}
        for kind in self.kinds:
            ious, areas = self._overlaps(kind, row, objects, found)
            words = self._match(ious, areas, objects, (best, targets), self.rules.detections[-1])
            matched[kind], ignored[kind] = (w[kept] for w in words)
            hits, _ = self._match(ious, areas, objects, (best_of_all, all_targets), self.rules.proposals[-1])
            proposals[kind] = np.zeros((1, len(self._proposals), self.rules.bits), np.uint16)
            compiled("count_bits")(hits, self._proposals, proposals[kind][0])
        places = best.places[kept]
        return Matches(
            images=(row.text("sample_id") or "",),
            detections=np.array([len(places)]),
            objects=np.array([len(targets.places)]),
            category=found.category[places].astype(np.int32),
            score=found.score[places],
            matched=matched,
            ignored=ignored,
            object_category=objects.category[targets.places].astype(np.int32),
            object_ranges=object_ranges[targets.places],
            proposals=proposals,
        )

    def _classes(self, instances: Instances, row: Row) -> NDArray[np.int64]:
        """Place of each one's label id among the scored ones, -1 for ignored classes."""
        places = np.minimum(np.searchsorted(self._ids, instances.category), len(self._ids) - 1)
        scored = self._ids[places] == instances.category
        if scored.all():
            return places
        unknown = instances.category[~np.isin(instances.category, self._known)]
        if len(unknown):
            problem = f"sample {row.text('sample_id')} has an instance of class {unknown[0]}, which the samples lack"
            raise DataError(problem, "give instances the samples' own label ids", "unknown-class")
        return np.where(scored, places, -1)

    def _overlaps(
        self, kind: str, row: Row, objects: Instances, found: Instances
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """IoU of each detection with each object, and the detections' areas."""
        ious = np.zeros((len(found.category), len(objects.category)))
        if kind == "bbox":
            compiled("box_overlaps")(found.boxes, objects.boxes, objects.crowd, ious)
            return ious, found.boxes[2::4] * found.boxes[3::4]
        height, width = row.number("height") or 0, row.number("width") or 0
        areas = np.empty(len(found.category), np.int64)
        masks = (found.text, found.starts, objects.text, objects.starts)
        limits = (height, height * width, self._thresholds.min())
        bad = compiled("mask_overlaps")(*masks, objects.crowd, *limits, areas, ious)
        if bad >= 0:
            raise _bad_mask(row, objects, found, bad)
        return ious, areas.astype(np.float64)

    def _match(
        self,
        ious: NDArray[np.float64],
        areas: NDArray[np.float64],
        objects: Instances,
        orders: tuple[_Order, _Order],
        most: int,
    ) -> tuple[Words, Words]:
        """``matched`` and ``ignored`` of the detections in their order, of which the best ``most`` of a class count."""
        best, targets = orders
        words = np.zeros(len(best.places), np.uint64), np.zeros(len(best.places), np.uint64)
        sizes = (areas, objects.area, objects.crowd)
        compiled("match")(ious, *best, *targets, *sizes, self._thresholds, self._ranges, most, *words)
        return words

    # -- many images ---------------------------------------------------------------------------------------------------

    def columns(self, states: Sequence[Matches | None]) -> Mapping[str, pa.Array]:
        """See ``schemas.STATE``."""
        whole = self.merge(s for s in states if s is not None)
        detections = [None if s is None else len(s.category) for s in states]
        objects = [None if s is None else len(s.object_category) for s in states]
        proposals = [None if s is None else len(self.kinds) * len(self._proposals) * self.rules.bits for s in states]
        counts = np.concatenate([whole.proposals[kind] for kind in self.kinds], axis=1)
        found = {
            "detections": list_array("detections", [whole.category, whole.score], detections),
            "objects": list_array("objects", [whole.object_category, whole.object_ranges], objects),
            "proposals": list_array("proposals", [counts.ravel()], proposals),
        }
        for kind in self.kinds:
            name = f"matches_{kind}"
            found[name] = list_array(name, [whole.matched[kind], whole.ignored[kind]], detections)
        return found

    def states(self, batch: pa.RecordBatch) -> list[Matches | None]:
        """Views on the batch's buffers."""
        names = batch.column("sample_id").to_pylist()
        valid = batch.column("detections").is_valid().to_pylist()
        found = {name: lists_of(batch, name) for name in self.state_columns}
        return [self._state(names[i], found, i) if valid[i] else None for i in range(batch.num_rows)]

    def _state(self, name: str, found: Mapping[str, Lists], row: int) -> Matches:
        (category, score), (object_category, object_ranges) = found["detections"].row(row), found["objects"].row(row)
        words = {kind: found[f"matches_{kind}"].row(row) for kind in self.kinds}
        (counts,) = found["proposals"].row(row)
        by_kind = counts.reshape(len(self.kinds), 1, len(self._proposals), self.rules.bits)
        return Matches(
            images=(name,),
            detections=np.array([len(category)]),
            objects=np.array([len(object_category)]),
            category=category,
            score=score,
            matched={kind: words[kind][0] for kind in self.kinds},
            ignored={kind: words[kind][1] for kind in self.kinds},
            object_category=object_category,
            object_ranges=object_ranges,
            proposals=dict(zip(self.kinds, by_kind, strict=True)),
        )

    def merge(self, states: Iterable[Matches]) -> Matches:
        """One after the other: ``compute`` sorts the images."""
        found = [self._nothing(), *states]

        def joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(list(arrays))

        return Matches(
            images=tuple(name for s in found for name in s.images),
            detections=joined(s.detections for s in found),
            objects=joined(s.objects for s in found),
            category=joined(s.category for s in found),
            score=joined(s.score for s in found),
            matched={kind: joined(s.matched[kind] for s in found) for kind in self.kinds},
            ignored={kind: joined(s.ignored[kind] for s in found) for kind in self.kinds},
            object_category=joined(s.object_category for s in found),
            object_ranges=joined(s.object_ranges for s in found),
            proposals={kind: joined(s.proposals[kind] for s in found) for kind in self.kinds},
        )

    def _nothing(self) -> Matches:
        """State of no image."""
        none, words, categories = np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int32)
        by_kind = dict.fromkeys(self.kinds, words)
        counts = np.empty((0, len(self._proposals), self.rules.bits), np.uint16)
        proposals = dict.fromkeys(self.kinds, counts)
        return Matches((), none, none, categories, np.empty(0), by_kind, by_kind, categories, words, proposals)

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Matches) -> list[Figure]:
        """Over all classes those of masks, then of boxes, then recall whatever the class; then by class."""
        ranked, objects = ranking(total, self._ids), counted(total, self._ids, len(self.rules.ranges))
        found = {kind: curves(total, kind, ranked, objects, self.rules) for kind in self.kinds}
        whole = objects.sum(axis=0).tolist()
        figures = [
            Figure(f"{kind}_{name}", found[kind].mean(part), support=whole[part.range])
            for kind in self.kinds
            for name, part in self._parts.items()
        ]
        for kind in self.kinds:
            figures += self._of_proposals(kind, total, objects.sum(axis=0))
        return [*figures, *self._by_class(found, objects)]

    def _of_proposals(self, kind: str, total: Matches, objects: NDArray[np.int64]) -> list[Figure]:
        shape = (len(self._proposals), len(self.rules.ranges), len(self.rules.thresholds))
        hits = total.proposals[kind].sum(axis=0, dtype=np.int64).reshape(shape)
        most = len(self._proposals) - 1
        wanted = {str(n): Part(False, None, 0, place) for place, n in enumerate(self.rules.proposals)}
        wanted |= {name: Part(False, None, place, most) for place, name in enumerate(self.rules.ranges) if place}
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
        matched, ignored = state.matched[self.kinds[0]], state.ignored[self.kinds[0]]
        classes = np.searchsorted(self._ids, state.category)
        hit, wrong = (matched & _FIRST) != 0, ((matched | ignored) & _FIRST) == 0
        objects = counted(state, self._ids, 1)[:, 0].tolist()
        tp, fp = (np.bincount(classes[which], minlength=len(self._ids)).tolist() for which in (hit, wrong))
        found = tuple(
            ClassCount(c.name, c.label_id, tp[place], fp[place], objects[place] - tp[place])
            for c, place in zip(self.scored, self._places, strict=True)
            if objects[place] or fp[place]
        )
        precision = []
        for place in np.flatnonzero(objects):
            mine = slice(*np.searchsorted(classes, [place, place + 1]))
            precision.append(average_precision(matched[mine], ignored[mine], objects[place], self.rules))
        return ImageScore(float(np.mean(precision)) if precision else None, found)

    def confusion(self, total: Matches) -> Confusion | None:
        """None: objects are matched with detections of their own class only."""
        return None


def _scored(order: NDArray[np.int64], classes: NDArray[np.int64]) -> _Order:
    """An order by class without those of class -1, which stand in front."""
    first = int(np.count_nonzero(classes < 0))
    return _Order(order[first:], classes[order[first:]])


def _few(classes: NDArray[np.int64], most: int) -> NDArray[np.bool_] | slice:
    """The first ``most`` of each class; ``classes`` ascending."""
    return ranks_of(classes) < most if len(classes) > most else slice(None)


def _check(found: Instances, row: Row) -> None:
    wrong = np.flatnonzero(~((found.score >= 0) & (found.score <= 1)))
    if len(wrong):
        score, number = found.score[wrong[0]], found.ids[wrong[0]]
        problem = f"sample {row.text('sample_id')}: detection {number} has the score {score}"
        raise DataError(problem, "give scores from 0 to 1", "bad-score")
    if len(set(found.ids.tolist())) < len(found.ids):
        ids, times = np.unique(found.ids, return_counts=True)
        problem = f"sample {row.text('sample_id')} has {times.max()} detections of id {ids[times.argmax()]}"
        raise DataError(problem, "give each an id of its own", "duplicate-id")


def _bad_mask(row: Row, objects: Instances, found: Instances, place: int) -> DataError:
    """What is wrong with the mask of a detection, or of the object at ``place - len(found)``."""
    from segbatch.codecs import rle

    rest = place - len(found.ids)
    what, owner, at = ("object", objects, rest) if rest >= 0 else ("detection", found, place)
    try:
        rle.check(owner.counts(at), row.number("height") or 0, row.number("width") or 0)
        reason = "cannot be read"
    except ValueError as error:
        reason = str(error)
    problem = f"sample {row.text('sample_id')}: the mask of {what} {owner.ids[at]}: {reason}"
    return DataError(problem, "write that table again", "bad-mask")
