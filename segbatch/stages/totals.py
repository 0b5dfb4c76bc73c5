"""Merged states of an evaluation: of everything, of every slice, and of what the bootstrap draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import pyarrow as pa

from segbatch.errors import ConfigError
from segbatch.metrics import bootstrap
from segbatch.metrics.base import FoldsGroups, Metric
from segbatch.records import Figure
from segbatch.stages import slices

S = TypeVar("S")
By = Literal["group", "image"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is asked of an evaluation beside its figures.

    Attributes:
        slices: expressions; see ``slices.slicings``. Each value of each gives all figures once more.
        resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
        by: what it draws: ``group`` (images where there are none) or ``image``.
    """

    slices: tuple[str, ...] = ()
    resamples: int = 0
    seed: int = 0
    by: By = "group"


class Tally(Generic[S]):
    """Adds up states: those of about equally many images with each other, so that each is copied only log(n) times."""

    def __init__(self, metric: Metric[S]) -> None:
        self._metric = metric
        self._levels: list[S | None] = []

    def add(self, states: Iterable[S]) -> None:
        """Add the states of a batch."""
        carried = self._metric.merge(states)
        for level, waiting in enumerate(self._levels):
            if waiting is None:
                self._levels[level] = carried
                return
            carried, self._levels[level] = self._metric.merge([waiting, carried]), None
        self._levels.append(carried)

    def total(self) -> S:
        """The sum."""
        return self._metric.merge(s for s in self._levels if s is not None)


class Totals(Generic[S]):
    """Merged states: of everything, of every slice, and of what the bootstrap draws."""

    def __init__(
        self,
        metric: Metric[S],
        slicings: Sequence[slices.Slicing] = (),
        by: By | None = None,
        whole_groups: bool = False,
    ) -> None:
        """
        Args:
            metric: the evaluator.
            slicings: ways to cut the data.
            by: what to keep for a bootstrap; None: nothing.
            whole_groups: leave groups out of which images are missing, where the metric is one of groups.
        """
        self._metric, self._slicings, self._by = metric, slicings, by
        self._whole_groups = whole_groups
        self._tally = Tally(metric)
        self._slices: dict[tuple[str, str], Tally[S]] = {}
        self._units: dict[str, list[S]] = {}

    def add(self, batch: pa.RecordBatch, states: Sequence[S | None]) -> None:
        """Add rows with the columns that ``images`` has in common with the state table, and their states."""
        self._tally.add(s for s in states if s is not None)
        names, groups = batch.column("sample_id").to_pylist(), batch.column("group_id").to_pylist()
        for slicing in self._slicings:
            parts: dict[str, list[S]] = {}
            for name, state in zip(names, states, strict=True):
                if state is not None:
                    parts.setdefault(slicing.labels.get(name, slices.NONE), []).append(state)
            for label, found in parts.items():
                self._slices.setdefault((slicing.name, label), Tally(self._metric)).add(found)
        if self._by is not None:
            for name, group, state in zip(names, groups, states, strict=True):
                if state is not None:
                    self._units.setdefault(group or name if self._by == "group" else name, []).append(state)

    def whole(self) -> S:
        """The state of everything."""
        return self._settled(self._tally.total())

    def _settled(self, state: S) -> S:
        if self._whole_groups and isinstance(self._metric, FoldsGroups):
            settled: S = self._metric.complete(state)
            return settled
        return state

    def units(self) -> dict[str, S]:
        """State of everything that the bootstrap draws, by name.

        Raises:
            ConfigError: there is only one such thing.
        """
        if len(self._units) < 2:
            problem = f"intervals need two or more groups or images to draw from, there is {len(self._units)}"
            raise ConfigError(problem, "draw images with --bootstrap-by image, or leave --bootstrap out")
        return {name: self._settled(self._metric.merge(states)) for name, states in self._units.items()}

    def figures(self, total: S, analysis: Analysis) -> list[Figure]:
        """All figures: those of everything, with intervals if asked for, then slice by slice in order."""
        found = self._metric.compute(total)
        if self._by is not None:
            drawn = bootstrap.values(self._metric, self.units(), analysis.resamples, analysis.seed)
            spans = {key: bootstrap.interval(v) for key, v in drawn.items()}
            found = [_with_interval(f, spans.get((f.metric, f.class_name))) for f in found]
        order = {s.name: i for i, s in enumerate(self._slicings)}
        for (name, label), tally in sorted(self._slices.items(), key=lambda item: (order[item[0][0]], item[0][1])):
            found += [replace(f, slice=f"{name}={label}") for f in self._metric.compute(self._settled(tally.total()))]
        return found


def _with_interval(figure: Figure, span: tuple[float, float] | None) -> Figure:
    if span is None or figure.value is None:
        return figure
    return replace(figure, ci_low=span[0], ci_high=span[1])
