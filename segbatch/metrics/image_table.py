"""Scores, counts and matches of many images as arrays, and as columns of the ``images`` table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.metrics.base import OUTCOMES, ClassCount, ImageScore, Match

Numbers = NDArray[np.int64]


class MatchTable(Sequence[Match]):
    """Matches as arrays, for evaluators with many of them; each a ``Match`` to who asks for one.

    Args:
        names: of classes by label id.
        labels: label ids, int64 of shape (n,).
        truth_ids, predicted_ids: int64 of shape (n,); of any value where there is none.
        has_truth, has_prediction: whether there is one, bool of shape (n,).
        ious, scores: float64 of shape (n,); they count where both, or a detection, are there.
        outcomes: places in ``OUTCOMES``, int64 of shape (n,).
    """

    def __init__(
        self,
        names: Mapping[int, str],
        labels: NDArray[np.int64],
        truth_ids: NDArray[np.int64],
        predicted_ids: NDArray[np.int64],
        has_truth: NDArray[np.bool_],
        has_prediction: NDArray[np.bool_],
        ious: NDArray[np.float64],
        scores: NDArray[np.float64],
        outcomes: NDArray[np.int64],
    ) -> None:
        self._names, self._labels = names, labels
        self._has_truth, self._has_prediction, self._outcomes = has_truth, has_prediction, outcomes
        self._cells: dict[str, NDArray[Any]] = {
            "truth_id": truth_ids,
            "predicted_id": predicted_ids,
            "iou": ious,
            "score": scores,
        }

    def __len__(self) -> int:
        return len(self._labels)

    def part(self, first: int, past: int) -> "MatchTable":
        """Those from ``first`` to before ``past``."""
        mine = slice(first, past)
        return MatchTable(
            self._names,
            self._labels[mine],
            self._cells["truth_id"][mine],
            self._cells["predicted_id"][mine],
            self._has_truth[mine],
            self._has_prediction[mine],
            self._cells["iou"][mine],
            self._cells["score"][mine],
            self._outcomes[mine],
        )

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        label, cells = int(self._labels[place]), {}
        for name, values in self._cells.items():
            cells[name] = None if self._missing(name)[place] else values[place].item()
        return Match(self._names[label], label, **cells, outcome=OUTCOMES[self._outcomes[place]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _missing(self, name: str) -> NDArray[np.bool_]:
        """Where a column has no value."""
        if name == "truth_id":
            return ~self._has_truth
        return ~self._has_prediction if name != "iou" else ~(self._has_truth & self._has_prediction)

    def array(self, kind: pa.DataType) -> pa.StructArray:
        """As items of the column ``matches`` of the ``images`` table, whose type is ``kind``."""
        cells: dict[str, pa.Array] = {n: pa.array(v, mask=self._missing(n)) for n, v in self._cells.items()}
        cells |= {
            "class": names_of(self._labels, self._names),
            "label_id": pa.array(self._labels.astype(np.int32)),
            "outcome": pa.array(OUTCOMES, pa.string()).take(pa.array(self._outcomes)),
        }
        return pa.StructArray.from_arrays([cells[f.name] for f in kind], fields=list(kind))


@dataclass(frozen=True, slots=True)
class ImageTable:
    """What ``Metric.image`` says of each image of a batch.

    Attributes:
        scores: float64 of shape (images,); NaN where undefined.
        names: of classes by label id.
        counts: label id, hits, false alarms and misses of every class that an image shows or predicts, image by image
            in class order; int64 of shape (n, 4).
        count_sizes: how many of these each image has, int64 of shape (images,).
        matches: of all images, one after the other; None where the protocol matches none, or its states say none.
        match_sizes: how many of these each image has, int64 of shape (images,).
    """

    scores: NDArray[np.float64]
    names: Mapping[int, str]
    counts: Numbers
    count_sizes: Numbers
    matches: MatchTable | None
    match_sizes: Numbers

    def image(self, place: int) -> ImageScore:
        """One of the images."""
        first, past = _span(self.count_sizes, place)
        counts = tuple(ClassCount(self.names[label], label, *n) for label, *n in self.counts[first:past].tolist())
        score = None if np.isnan(self.scores[place]) else float(self.scores[place])
        begin, end = _span(self.match_sizes, place)
        return ImageScore(score, counts, None if self.matches is None else self.matches.part(begin, end))

    def columns(self, there: Sequence[bool]) -> dict[str, pa.Array]:
        """``score``, ``classes`` and ``matches`` of the ``images`` table; null for rows that have no image here.

        Args:
            there: of the rows, whether they have one.
        """
        has = np.array(there, bool)
        scores = np.full(len(has), np.nan)
        scores[has] = self.scores
        kinds = {name: schemas.IMAGES.field(name).type for name in ("classes", "matches")}
        matches = pa.nulls(len(has), kinds["matches"])
        if self.matches is not None:
            items = self.matches.array(kinds["matches"].value_type)
            matches = _lists(items, self.match_sizes, has, kinds["matches"])
        classes = _lists(self._classes(kinds["classes"].value_type), self.count_sizes, has, kinds["classes"])
        return {"score": pa.array(scores, mask=np.isnan(scores)), "classes": classes, "matches": matches}

    def _classes(self, kind: pa.DataType) -> pa.StructArray:
        """Items of the column ``classes``, whose type is ``kind``."""
        labels, *counts = self.counts.T
        union = np.sum(counts, axis=0)
        ious = np.divide(counts[0], union, out=np.zeros(len(union)), where=union > 0)
        cells = {
            "class": names_of(labels, self.names),
            "label_id": pa.array(labels.astype(np.int32)),
            "iou": pa.array(ious, mask=union == 0),
        }
        cells |= {name: pa.array(n.astype(np.uint64)) for name, n in zip(("tp", "fp", "fn"), counts, strict=True)}
        return pa.StructArray.from_arrays([cells[f.name] for f in kind], fields=list(kind))


def names_of(labels: Numbers, names: Mapping[int, str]) -> pa.Array:
    """The class name of each label id."""
    ids, places = np.unique(labels, return_inverse=True)
    return pa.array([names[i] for i in ids.tolist()], pa.string()).take(pa.array(places))


def _span(sizes: Numbers, place: int) -> tuple[int, int]:
    """Where the entries of an image begin, and where they end."""
    first = int(sizes[:place].sum())
    return first, first + int(sizes[place])


def _lists(items: pa.Array, sizes: Numbers, has: NDArray[np.bool_], kind: pa.DataType) -> pa.ListArray:
    """One list for each row that ``has`` one, null for the others."""
    lengths = np.zeros(len(has), np.int64)
    lengths[has] = sizes
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind, mask=pa.array(~has))
