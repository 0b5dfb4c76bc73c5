"""States that are a few named arrays of numbers: one way to keep, write, read and merge them.

A metric that derives from ``ArrayMetric`` says in ``fields`` what its arrays are; the state table keeps them in the
column ``arrays``.
"""

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.errors import SchemaError
from segbatch.metrics.base import Key, Resampler, image_order
from segbatch.records import Figure

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a state.

    Attributes:
        width: numbers in a row of it.
        real: float64; else int64.
        merge: ``append`` puts the rows of images one after the other; ``add`` adds arrays of one shape, integers only;
            ``drop`` keeps them with their image, for ``Metric.image``, and leaves them out of merged states.
        rows: how many rows an array has that is added.
    """

    width: int = 1
    real: bool = False
    merge: Literal["append", "add", "drop"] = "append"
    rows: int = 1

    @property
    def dtype(self) -> type[Any]:
        """Of the array."""
        return np.float64 if self.real else np.int64

    def empty(self) -> Array:
        """The array of no image."""
        return np.zeros((self.rows if self.merge == "add" else 0, self.width), self.dtype)


@dataclass(frozen=True, slots=True)
class Arrays:
    """State of any number of images, in any order.

    Attributes:
        images: their sample ids.
        groups: their group ids; empty where they have none.
        values: by field, int64 or float64 of shape (rows, width).
        sizes: by field, how many rows each image has, int64 of shape (images,); for fields that are appended.
    """

    images: tuple[str, ...]
    groups: tuple[str, ...]
    values: Mapping[str, Array]
    sizes: Mapping[str, NDArray[np.int64]]

    def of_images(self, name: str) -> NDArray[np.int64]:
        """For each row of an appended field the place of its image; int64 of shape (rows,)."""
        return np.repeat(np.arange(len(self.images)), self.sizes[name])

    def flat(self, name: str) -> Array:
        """A field of width 1, of shape (rows,)."""
        found: Array = self.values[name][:, 0]
        return found

    def in_order(self) -> "Arrays":
        """The same with images, and the rows of appended fields, in ``image_order``."""
        order = image_order(self.images)
        values, sizes = dict(self.values), dict(self.sizes)
        for name, size in self.sizes.items():
            starts = np.concatenate([[0], np.cumsum(size)])
            values[name] = np.concatenate([self.values[name][:0], *(_span(self, name, starts, i) for i in order)])
            sizes[name] = size[order]
        return Arrays(tuple(self.images[i] for i in order), tuple(self.groups[i] for i in order), values, sizes)


def _span(state: Arrays, name: str, starts: NDArray[np.int64], place: int) -> Array:
    found: Array = state.values[name][starts[place] : starts[place + 1]]
    return found


class ArrayStates:
    """States that are ``Arrays``: to make, write, read and merge."""

    fields: ClassVar[Mapping[str, Field]]
    state_columns: ClassVar[tuple[str, ...]] = ("arrays",)

    def state(self, sample_id: str, group_id: str | None, values: Mapping[str, Array]) -> Arrays:
        """State of one image.

        Args:
            sample_id, group_id: of the image.
            values: an array for every field, of shape (rows, width), or (rows,) where the width is 1.
        """
        found = {n: np.asarray(values[n], f.dtype).reshape(-1, f.width) for n, f in self.fields.items()}
        sizes = {n: np.array([len(found[n])], np.int64) for n, f in self.fields.items() if f.merge == "append"}
        return Arrays((sample_id,), (group_id or "",), found, sizes)

    def columns(self, states: Sequence[Arrays | None]) -> Mapping[str, pa.Array]:
        """``arrays``; see ``schemas.STATE``. States are of one image (or folded) each."""
        there = [s for s in states if s is not None]
        entries = [s.values[name].ravel() for s in there for name in self.fields]
        real = np.tile([f.real for f in self.fields.values()], len(there)).astype(bool)
        kind = schemas.STATE.field("arrays").type
        names = pa.array(list(self.fields) * len(there), pa.string())
        parts = [names, _lists(entries, ~real, np.int64), _lists(entries, real, np.float64)]
        items = pa.StructArray.from_arrays(parts, fields=list(kind.value_type))
        missing = np.array([s is None for s in states], bool)
        offsets = np.concatenate([[0], np.cumsum(np.where(missing, 0, len(self.fields)))]).astype(np.int32)
        return {"arrays": pa.ListArray.from_arrays(pa.array(offsets), items, type=kind, mask=pa.array(missing))}

    def states(self, batch: pa.RecordBatch) -> list[Arrays | None]:
        """Views on the batch's buffers.

        Raises:
            SchemaError: another version of the protocol wrote them.
        """
        column = batch.column("arrays")
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        first = int(column.offsets[0].as_py())
        items = column.values.slice(first, int(column.offsets[-1].as_py()) - first)
        if items.field("name").to_pylist() != list(self.fields) * int(valid.sum()):
            raise SchemaError("the state was written by another version of the protocol", "evaluate into a new output")
        kinds = {real: items.field("reals" if real else "integers") for real in (False, True)}
        offsets = {real: a.offsets.to_numpy() for real, a in kinds.items()}
        numbers = {real: a.values.to_numpy() for real, a in kinds.items()}
        ids, groups = batch.column("sample_id").to_pylist(), batch.column("group_id").to_pylist()
        states: list[Arrays | None] = []
        entry = 0
        for row, there in enumerate(valid):
            if not there:
                states.append(None)
                continue
            values = {}
            for name, f in self.fields.items():
                start, stop = offsets[f.real][entry], offsets[f.real][entry + 1]
                values[name] = numbers[f.real][start:stop]
                entry += 1
            states.append(self.state(ids[row], groups[row], values))
        return states

    def merge(self, states: Iterable[Arrays]) -> Arrays:
        """Added, or one after the other; ``compute`` sorts the images."""
        found = list(states)
        values = {}
        for name, f in self.fields.items():
            parts = [s.values[name] for s in found]
            if f.merge == "add":
                values[name] = sum(parts, f.empty())
            elif f.merge == "drop":
                values[name] = f.empty()
            else:
                values[name] = np.concatenate([f.empty(), *parts])
        sizes = {
            name: np.concatenate([np.empty(0, np.int64), *(s.sizes[name] for s in found)])
            for name, f in self.fields.items()
            if f.merge == "append"
        }
        images = tuple(name for s in found for name in s.images)
        return Arrays(images, tuple(name for s in found for name in s.groups), values, sizes)


class ArrayMetric(ArrayStates, abc.ABC):
    """Base of metrics whose state is ``Arrays``: everything about states but what they mean."""

    def resampler(self, units: Sequence[Arrays]) -> Resampler:
        """See ``base.Resamples``."""
        return lambda times: collected(len(times), (self.compute(_repeated(self, units, row)) for row in times))

    @abc.abstractmethod
    def compute(self, total: Arrays) -> list[Figure]:
        """The figures of the metric that derives from this."""


def collected(resamples: int, results: Iterable[Sequence[Figure]]) -> dict[Key, NDArray[np.float64]]:
    """Figures of every resample by figure; NaN where one is undefined."""
    found: dict[Key, NDArray[np.float64]] = {}
    for place, figures in enumerate(results):
        for f in figures:
            values = found.setdefault((f.metric, f.class_name), np.full(resamples, np.nan))
            values[place] = np.nan if f.value is None else f.value
    return found


def _repeated(metric: ArrayMetric, units: Sequence[Arrays], times: NDArray[np.int64]) -> Arrays:
    """The units, each so many times, in their order."""
    drawn = [(units[i], int(times[i])) for i in np.flatnonzero(times).tolist()]
    values, sizes = {}, {}
    for name, f in metric.fields.items():
        if f.merge == "add":
            values[name] = sum((u.values[name] * n for u, n in drawn), f.empty())
        elif f.merge == "append":
            values[name] = np.concatenate([f.empty(), *(u.values[name] for u, n in drawn for _ in range(n))])
            none = np.empty(0, np.int64)
            sizes[name] = np.concatenate([none, *(u.sizes[name] for u, n in drawn for _ in range(n))])
        else:
            values[name] = f.empty()
    images = tuple(name for u, n in drawn for _ in range(n) for name in u.images)
    return Arrays(images, tuple(name for u, n in drawn for _ in range(n) for name in u.groups), values, sizes)


def _lists(entries: Sequence[Array], mine: NDArray[np.bool_], dtype: type[Any]) -> pa.ListArray:
    """The entries that are ``mine`` as lists, the others as null."""
    lengths = np.where(mine, [len(e) for e in entries], 0) if entries else np.empty(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate([np.empty(0, dtype), *(e for e, m in zip(entries, mine, strict=True) if m)])
    kind = pa.list_(pa.field("item", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind, mask=pa.array(~mine))
