"""BDD100K's figures for instances: AP and AR of bitmasks.

Source: ``bdd100k/eval/ins_seg.py`` and ``bdd100k/common/bitmask.py`` (see ``bdd100k``); scalabel,
``scalabel/eval/detect.py`` (COCOevalV2), which sums up with pycocotools.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import OUTCOMES, ClassCount, Confusion, ImageScore, Match, Row, same_size
from segbatch.metrics.bdd100k import compiled, ignored_ids, official_classes, unknown_class
from segbatch.metrics.coco_figures import (
    Matches,
    Rules,
    counted,
    curves,
    image_counts,
    image_precisions,
    parts,
    ranking,
    ranks_of,
)
from segbatch.metrics.coco_matching import check, overlaps_of
from segbatch.metrics.columns import Instances, instances_of
from segbatch.records import ClassTable, Figure

_KIND = "segm"
_NONE = -1
_TP, _FP, _FN, _IGNORED = range(4)
_FIRST = np.uint64(1)
"""The bit of the first range (all sizes) and the first threshold."""


class Bdd100kInstanceMetric(ArrayMetric):
    """Protocol ``bdd100k-ins``: AP and AR of the 8 classes. 100 times a value is the official figure, all bits.

    ``segm_ap`` ... ``segm_ar_large`` are AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, over all
    classes and by class. Where the official figure is NaN, there is no value.

    Precision and recall are summed up as pycocotools does it, but the matching is another: every detection, the best
    first, takes the object of greatest IoU that is free, also one that does not count, and no other if that one's IoU
    is too small. A crowd's IoU is the plain one, and a crowd counts like any object unless it is marked ignored too;
    it stays free, so two detections that each are one half of it are both right at IoU .50. An object that is marked
    ignored does not count, nor does a detection that takes it. Sizes are pixels; an object's is the samples' area.

    Between equal scores the order of the image ids decides, then that of the detections in their row. A bitmask shows
    only one object in a pixel: where detections overlap, the higher score covers the lower (of equal scores the later
    the earlier), as the export does it; those of which nothing is left, and those without pixels, are left out.

    The official code breaks off where an image has more than 100 objects, or where objects, or detections, leave no
    pixel free; here such images count by the same rules. Images without a row of masks are an error, as they are there.

    ``ImageScore.matches`` tells of every detection that counts (the best 100 of a class) and of every object what
    became of it at IoU .50, all sizes.

    State: 32 bytes per detection and 16 per object; what ``matches`` needs stands in the state table alone.
    """

    name: ClassVar[str] = "bdd100k-ins"
    source: ClassVar[str] = "bdd100k 1.0.1, eval/ins_seg.py on bitmasks, pycocotools 2.0.11, float64 before * 100"
    headline: ClassVar[str] = "segm_ap"
    task_column: ClassVar[str] = "instances"
    truth_columns: ClassVar[tuple[str, ...]] = ("instances", "attributes")
    prediction_columns: ClassVar[tuple[str, ...]] = ("instances",)
    fields: ClassVar[Mapping[str, Field]] = {
        "detections": Field(3),
        "scores": Field(real=True),
        "objects": Field(2),
        "pairs": Field(4, merge="drop"),
        "overlaps": Field(2, real=True, merge="drop"),
    }
    """``detections``: label id and the words ``matched`` and ``ignored`` of ``coco_figures.Matches``, by label id and
    then the best first; ``scores`` of these; ``objects``: label id and ``object_ranges``. For ``matches``: ``pairs``:
    label id, ids of object and detection (-1 for none), outcome; ``overlaps``: IoU and score."""

    rules: ClassVar[Rules] = Rules()

    def __init__(self, classes: ClassTable) -> None:
        """
        Raises:
            ConfigError: the scored classes are not the official ones.
        """
        self.classes = official_classes(self.name, classes, range(1, 9))
        self.scored = self.classes.scored
        self._known = np.array([c.label_id for c in classes.classes], np.int64)
        self._ids = np.array([c.label_id for c in self.scored], np.int64)
        self._thresholds = np.array(self.rules.thresholds)
        self._ranges = np.array(list(self.rules.ranges.values()), np.float64)
        self._parts = parts(self.rules)

    # -- one image -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Match the detections of one image with its objects.

        Raises:
            DataError: ``size-mismatch``, ``bad-mask``, ``bad-score`` (outside 0..1), ``duplicate-id``,
                ``unknown-class``; ``bad-annotation`` where attributes cannot be read.
        """
        size = same_size(truth, predicted)
        found, objects = instances_of(predicted), instances_of(truth)
        check(found, truth)
        for what, one in (("ground truth", objects), ("prediction", found)):
            unknown = one.category[~np.isin(one.category, self._known)]
            if len(unknown):
                raise unknown_class(truth, what, unknown.tolist())
        plain = objects._replace(crowd=np.zeros_like(objects.crowd))
        overlaps = overlaps_of(_KIND, truth, plain, found, self._thresholds.min())
        uncovered = _uncovered(found, overlaps.areas, size)
        if uncovered is not None:
            overlaps = overlaps_of(_KIND, truth, plain, uncovered, self._thresholds.min())
        return self._matched(truth, objects, found, overlaps.ious, overlaps.areas)

    def _matched(
        self, truth: Row, objects: Instances, found: Instances, ious: NDArray[np.float64], areas: NDArray[np.float64]
    ) -> Arrays:
        order = np.lexsort((-found.score, found.category))
        order = order[(areas[order] > 0) & np.isin(found.category[order], self._ids)]
        targets = np.argsort(objects.ids, kind="stable")
        targets = targets[(objects.area[targets] > 0) & np.isin(objects.category[targets], self._ids)]
        ignored = np.isin(objects.ids[targets], list(ignored_ids(truth, "instances")))
        counts = self._inside(objects.area[targets]) & ~ignored[:, None]
        ious = np.ascontiguousarray(ious[np.ix_(order, targets)])
        words, partners = np.zeros((2, len(order)), np.uint64), np.full(len(order), _NONE)
        compiled("match")(
            ious,
            found.category[order],
            objects.category[targets],
            objects.crowd[targets],
            counts.view(np.uint8),
            self._inside(areas[order]).view(np.uint8),
            self._thresholds,
            *words,
            partners,
        )
        kept = ranks_of(found.category[order]) < self.rules.detections[-1]
        best, words, partners = order[kept], words[:, kept], partners[kept]
        pairs = [
            (found.category[i], objects.ids[targets[g]] if g != _NONE else _NONE, found.ids[i], _outcome(*w))
            for i, g, w in zip(best, partners, words.T, strict=True)
        ]
        overlaps = [
            (row[g] if g != _NONE else 0.0, score)
            for row, g, score in zip(ious[kept], partners, found.score[best], strict=True)
        ]
        alone = np.setdiff1d(np.arange(len(targets)), partners)
        pairs += [
            (objects.category[targets[g]], objects.ids[targets[g]], _NONE, _FN if counts[g, 0] else _IGNORED)
            for g in alone
        ]
        values = {
            "detections": np.column_stack([found.category[best], *words.view(np.int64)]),
            "scores": found.score[best],
            "objects": np.column_stack([objects.category[targets], counts @ (1 << np.arange(len(self._ranges)))]),
            "pairs": np.array(pairs, np.int64).reshape(-1, 4),
            "overlaps": np.array([*overlaps, *[(0.0, 0.0)] * len(alone)]).reshape(-1, 2),
        }
        return self.state(truth.text("sample_id") or "", truth.text("group_id"), values)

    def _inside(self, areas: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether sizes lie in the ranges; shape (areas, ranges)."""
        least, most = self._ranges.T
        inside: NDArray[np.bool_] = (least <= areas[:, None]) & (areas[:, None] <= most)
        return inside

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Arrays) -> list[Figure]:
        """The twelve figures over all classes, then each by class. Support is objects that count, of that size."""
        matches = _as_matches(total)
        objects = counted(matches, self._ids, len(self.rules.ranges))
        found = curves(matches, _KIND, ranking(matches, self._ids), objects, self.rules)
        whole = objects.sum(axis=0).tolist()
        figures = [
            Figure(f"{_KIND}_{name}", found.mean(part), support=whole[part.range]) for name, part in self._parts.items()
        ]
        for name, part in self._parts.items():
            for place, c in enumerate(self.scored):
                support = int(objects[place, part.range])
                figures.append(Figure(f"{_KIND}_{name}", found.mean(part, place), c.name, support=support))
        return figures

    def image(self, state: Arrays) -> ImageScore:
        """Mean AP over the classes that this image shows, as if it were the only image; counts are those at IoU .50."""
        matches = _as_matches(state)
        objects, hits, misses = image_counts(matches, _KIND, self._ids)
        rows = zip(self.scored, objects[0].tolist(), hits[0].tolist(), misses[0].tolist(), strict=True)
        counts = tuple(ClassCount(c.name, c.label_id, t, f, max(n - t, 0)) for c, n, t, f in rows if n or f)
        (score,) = image_precisions(matches, _KIND, self._ids, objects, self.rules).tolist()
        return ImageScore(None if np.isnan(score) else score, counts, tuple(self._matches(state)))

    def confusion(self, total: Arrays) -> Confusion | None:
        """None: objects are matched with detections of their own class only."""
        return None

    def _matches(self, state: Arrays) -> Iterable[Match]:
        """Of detections by class and the best first, then of the objects without any."""
        names = {c.label_id: c.name for c in self.scored}
        rows = zip(state.values["pairs"].tolist(), state.values["overlaps"].tolist(), strict=True)
        for (label_id, one, other, outcome), (iou, score) in rows:
            yield Match(
                class_name=names[label_id],
                label_id=label_id,
                truth_id=None if one == _NONE else one,
                predicted_id=None if other == _NONE else other,
                iou=None if _NONE in (one, other) else iou,
                score=None if other == _NONE else score,
                outcome=OUTCOMES[outcome],
            )


def _as_matches(state: Arrays) -> Matches:
    detections, objects = state.values["detections"], state.values["objects"]
    words = np.ascontiguousarray(detections.T[1:]).view(np.uint64)
    return Matches(
        images=state.images,
        detections=state.sizes["detections"],
        objects=state.sizes["objects"],
        category=detections[:, 0].astype(np.int32),
        score=np.ascontiguousarray(state.flat("scores")),
        matched={_KIND: words[0]},
        ignored={_KIND: words[1]},
        object_category=objects[:, 0].astype(np.int32),
        object_ranges=objects[:, 1].astype(np.uint64),
        proposals={},
    )


def _outcome(matched: np.uint64, ignored: np.uint64) -> int:
    """At the first threshold, all sizes."""
    if matched & _FIRST:
        return _TP
    return _IGNORED if ignored & _FIRST else _FP


def _uncovered(found: Instances, areas: NDArray[np.float64], size: tuple[int, int]) -> Instances | None:
    """The detections with what is to be seen of each once all are painted, the best last; None where none overlap."""
    from segbatch.codecs import rle

    masks = [found.counts(i) for i in range(len(areas))]
    if not masks or rle.area(rle.merge(masks)) == areas.sum():
        return None
    order = np.argsort(found.score, kind="stable")
    index = rle.paint([masks[i] for i in order], order + 1, *size, np.uint32)
    seen = rle.instances_of(index, background=(0,))
    shown = dict(zip(seen.ids.tolist(), seen.counts, strict=True))
    nothing = rle.from_uncompressed([size[0] * size[1]])
    text = [shown.get(i + 1, nothing) for i in range(len(masks))]
    starts = np.concatenate([[0], np.cumsum([len(t) for t in text])])
    return found._replace(text=np.frombuffer(b"".join(text), np.uint8), starts=starts)
