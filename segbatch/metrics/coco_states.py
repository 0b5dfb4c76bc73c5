"""States of COCO's evaluators for instances: merged, written to the state table, read from it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.metrics.arrays import Arrays, ArrayStates, Field
from segbatch.metrics.coco_figures import Matches
from segbatch.metrics.columns import Lists, list_array, lists_of

WORDS: Mapping[str, str] = {"segm": "matches_segm", "bbox": "matches_bbox", "boundary": "matches_segm"}
"""The column of the state table that holds the words of a kind of overlap."""


def state_columns(kinds: Sequence[str]) -> tuple[str, ...]:
    """The columns of the state table for these kinds of overlap."""
    return ("detections", *(WORDS[kind] for kind in kinds), "objects", "proposals", "arrays")


class Layout(NamedTuple):
    """What the arrays of ``Matches`` are: kinds of overlap, numbers in ``Rules.proposals``, and ``Rules.bits``."""

    kinds: tuple[str, ...]
    proposals: int
    bits: int

    def nothing(self) -> Matches:
        """State of no image."""
        none, words, categories = np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int32)
        by_kind = dict.fromkeys(self.kinds, words)
        proposals = dict.fromkeys(self.kinds, np.empty((0, self.proposals, self.bits), np.uint16))
        return Matches((), none, none, categories, np.empty(0), by_kind, by_kind, categories, words, proposals)


class _Partners(ArrayStates):
    """The entries of ``Matches.partners`` in the column ``arrays``."""

    fields: ClassVar[Mapping[str, Field]] = {
        "detection_ids": Field(merge="drop"),
        "partners": Field(merge="drop"),
        "ious": Field(real=True, merge="drop"),
        "object_ids": Field(merge="drop"),
    }


_PARTNERS = _Partners()


def partners(
    sample_id: str,
    detection_ids: NDArray[np.int64],
    places: NDArray[np.int64],
    ious: NDArray[np.float64],
    object_ids: NDArray[np.int64],
) -> Arrays:
    """``Matches.partners`` of an image; all of one dimension."""
    arrays = (detection_ids, places, ious, object_ids)
    values = {name: array.reshape(-1, 1) for name, array in zip(_PARTNERS.fields, arrays, strict=True)}
    return Arrays((sample_id,), ("",), values, {})


def merged(states: Iterable[Matches], layout: Layout) -> Matches:
    """One after the other: whoever makes figures of them sorts the images."""
    found = [layout.nothing(), *states]

    def joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(list(arrays))

    return Matches(
        images=tuple(name for s in found for name in s.images),
        detections=joined(s.detections for s in found),
        objects=joined(s.objects for s in found),
        category=joined(s.category for s in found),
        score=joined(s.score for s in found),
        matched={kind: joined(s.matched[kind] for s in found) for kind in layout.kinds},
        ignored={kind: joined(s.ignored[kind] for s in found) for kind in layout.kinds},
        object_category=joined(s.object_category for s in found),
        object_ranges=joined(s.object_ranges for s in found),
        proposals={kind: joined(s.proposals[kind] for s in found) for kind in layout.kinds},
    )


def columns(states: Sequence[Matches | None], layout: Layout) -> dict[str, pa.Array]:
    """Columns of the state table; None becomes null."""
    whole = merged((s for s in states if s is not None), layout)
    detections = [None if s is None else len(s.category) for s in states]
    objects = [None if s is None else len(s.object_category) for s in states]
    proposals = [None if s is None else len(layout.kinds) * layout.proposals * layout.bits for s in states]
    counts = np.concatenate([whole.proposals[kind] for kind in layout.kinds], axis=1)
    found = {
        "detections": list_array("detections", [whole.category, whole.score], detections),
        "objects": list_array("objects", [whole.object_category, whole.object_ranges], objects),
        "proposals": list_array("proposals", [counts.ravel()], proposals),
    }
    for kind in layout.kinds:
        name = WORDS[kind]
        found[name] = list_array(name, [whole.matched[kind], whole.ignored[kind]], detections)
    return {**found, **_PARTNERS.columns([None if s is None else s.partners for s in states])}


def states_of(batch: pa.RecordBatch, layout: Layout) -> list[Matches | None]:
    """Inverse of ``columns``: views on the batch's buffers."""
    names = batch.column("sample_id").to_pylist()
    valid = batch.column("detections").is_valid().to_pylist()
    found = {name: lists_of(batch, name) for name in state_columns(layout.kinds) if name != "arrays"}
    pairs = _PARTNERS.states(batch)
    return [_state(names[i], found, i, layout, pairs[i]) if valid[i] else None for i in range(batch.num_rows)]


def _state(name: str, found: Mapping[str, Lists], row: int, layout: Layout, pairs: Arrays | None) -> Matches:
    (category, score), (object_category, object_ranges) = found["detections"].row(row), found["objects"].row(row)
    words = {kind: found[WORDS[kind]].row(row) for kind in layout.kinds}
    (counts,) = found["proposals"].row(row)
    by_kind = counts.reshape(len(layout.kinds), 1, layout.proposals, layout.bits)
    return Matches(
        images=(name,),
        detections=np.array([len(category)]),
        objects=np.array([len(object_category)]),
        category=category,
        score=score,
        matched={kind: words[kind][0] for kind in layout.kinds},
        ignored={kind: words[kind][1] for kind in layout.kinds},
        object_category=object_category,
        object_ranges=object_ranges,
        proposals=dict(zip(layout.kinds, by_kind, strict=True)),
        partners=pairs,
    )
