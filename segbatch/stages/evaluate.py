"""Evaluate: masks x samples -> integer counts per image (state) -> figures, images, confusion.

Each masks part is planned as one item, counted in any order on any machine, and merged by ``finish``. No mask is
decoded: counts come straight from the runs.
"""

import hashlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from segbatch import runs, schemas, storage, tables
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.base import DEFAULTS, FoldsGroups, Metric, MetricOptions, Row, present, texts
from segbatch.records import OK, Outcome, PlanItem, ShardRef
from segbatch.stages import join, relabel
from segbatch.stages.evaluate_finish import Summary, finish
from segbatch.stages.join import NO_LABEL, PREDICTION_FAILED, QUARANTINED, UNKNOWN_SAMPLE
from segbatch.stages.stopwatch import Stopwatch
from segbatch.storage import ObjectInfo

__all__ = ["EvaluateTask", "EvaluateWorker", "Summary", "finish", "items"]

_TRUTH = ("sample_id", "group_id", "split", "image_uri", "attributes", "status", "height", "width")
_PREDICTION = ("sample_id", "group_id", "image_uri", "status", "error", "height", "width")


def items(masks: str, samples: str) -> Iterator[PlanItem]:
    """One item per masks part: its rows from the Parquet footer.

    The item's tag covers the masks part and the samples table, so that a retry of the masks or a new ingest of the
    labels makes its state anew.

    Raises:
        ConfigError: no such table. Raised at once, not on iteration.
    """
    samples_folder, masks_folder = tables.find(samples, "samples"), tables.find(masks, "masks")
    labels = _digest(tables.parts(samples_folder))
    return _items(tables.parts(masks_folder), labels)


def _items(parts: Sequence[ObjectInfo], labels: str) -> Iterator[PlanItem]:
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda p: tables.count_rows(p.uri, "masks"), parts)
        for part, count in zip(parts, rows, strict=True):
            yield PlanItem("", part.uri, f"{part.etag}+{labels}", part.size, rows=count)


def _digest(parts: Sequence[ObjectInfo]) -> str:
    text = "\n".join(f"{storage.name_of(p.uri)} {p.etag}" for p in parts)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def label_ids(masks_root: str, samples_root: str, class_map: Mapping[str, str]) -> dict[int, int]:
    """See ``relabel.class_ids``; roots of masks without a class table use the samples' ids.

    Raises:
        ConfigError: see there; or a class map for masks without a class table.
    """
    if storage.exists(tables.service(masks_root, "dataset.json")):
        return relabel.class_ids(tables.class_table(masks_root), tables.class_table(samples_root), class_map)
    if class_map:
        raise ConfigError(f"{masks_root} has no class table, so a class map says nothing", "leave it out")
    return {}


@dataclass(frozen=True, slots=True)
class EvaluateTask:
    """Picklable recipe: compare masks with samples by a protocol; ``ids`` as in ``relabel.class_ids``."""

    masks_root: str
    samples_root: str
    protocol: str
    options: MetricOptions = DEFAULTS
    ids: Mapping[int, int] = field(default_factory=dict)

    def open(self, threads: int, journal: runs.Journal) -> "EvaluateWorker":
        """See ``runs.Task``; counting is bound by reading, so ``threads`` is not needed.

        Raises:
            ConfigError: no samples table, no class table, or a protocol that does not fit.
        """
        return EvaluateWorker(self, journal)


@dataclass(frozen=True, slots=True)
class _Counted:
    """A row of the state table: what is known of it, and its state."""

    known: Mapping[str, str | None]
    state: Any

    @property
    def group(self) -> str | None:
        return self.known["group_id"]


class EvaluateWorker:
    """See ``runs.Worker``. Holds the metric and the join of masks with samples."""

    def __init__(self, task: EvaluateTask, journal: runs.Journal) -> None:
        classes = tables.class_table(tables.root_of(task.samples_root, "samples"))
        self._metric: Metric[Any] = registry.make(task.protocol, classes, task.options)
        self._join = join.Join(
            tables.parts(tables.find(task.samples_root, "samples")),
            (*_TRUTH, *self._metric.truth_columns),
            (*_PREDICTION, *self._metric.prediction_columns),
        )
        self._ids = task.ids
        self._journal = journal
        self._lock = threading.Lock()
        self._rows_done = 0

    @property
    def rows_done(self) -> int:
        """Rows counted so far."""
        return self._rows_done

    def close(self) -> None:
        """Nothing is held that would have to be released."""

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        """State rows of every mask in the shard's parts, in their order; then commit."""
        watch = Stopwatch()
        slot = f"evaluate-{threading.get_ident()}"
        writer = tables.PartWriter("state")
        for counted in self._counted(shard, slot, skip, watch):
            with watch.measured("encode"):
                writer.write(counted)
        self._journal.clear(slot)
        return runs.commit(shard, writer, watch.seconds())

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Count one sample of the shard, and write nothing."""
        for item in runs.items_of(shard):
            for masks, truth in self._join.matched(item):
                for i, name in enumerate(masks.column("sample_id").to_pylist()):
                    if name == sample_id:
                        self._rows(relabel.relabelled(masks.slice(i, 1), self._ids), [truth[i]], {})

    def _counted(
        self, shard: ShardRef, slot: str, skip: Mapping[str, str], watch: Stopwatch
    ) -> Iterator[pa.RecordBatch]:
        """State rows of the shard; those of a group together, where the metric folds groups."""
        for item in runs.items_of(shard):
            waiting: list[_Counted] = []
            for found, truth in watch.each("read", self._join.matched(item)):
                with watch.measured("count"):
                    masks = relabel.relabelled(found, self._ids)
                    self._journal.note(slot, shard.number, masks.column("sample_id").to_pylist())
                    rows = self._rows(masks, truth, skip)
                with self._lock:
                    self._rows_done += len(rows)
                if not isinstance(self._metric, FoldsGroups):
                    yield self._batch(rows)
                    continue
                waiting += rows
                last = next((i for i in range(len(waiting), 0, -1) if waiting[i - 1].group != waiting[-1].group), 0)
                if last:
                    yield self._batch(self._folded(waiting[:last]))
                    waiting = waiting[last:]
            if waiting:
                yield self._batch(self._folded(waiting))

    def _rows(self, masks: pa.RecordBatch, truth: Sequence[Row | None], skip: Mapping[str, str]) -> "list[_Counted]":
        """State rows of a batch of masks and the samples that belong to them."""
        known = {name: texts(truth, name) for name in ("group_id", "split", "attributes", "image_uri")}
        own = masks.column("image_uri").to_pylist()
        known["image_uri"] = [theirs or ours for theirs, ours in zip(known["image_uri"], own, strict=True)]
        known["sample_id"] = masks.column("sample_id").to_pylist()
        obstacles = self._obstacles(masks, truth, skip)
        rows = []
        for i, row in enumerate(truth):
            status, error, state = obstacles[i] or self._count(Row(masks, i), row)
            rows.append(_Counted({n: v[i] for n, v in known.items()} | {"status": status, "error": error}, state))
        return rows

    def _folded(self, rows: "Sequence[_Counted]") -> "list[_Counted]":
        """The rows with whole groups folded into their last rows."""
        assert isinstance(self._metric, FoldsGroups)
        done: list[_Counted] = []
        for _, members in itertools.groupby(rows, key=lambda r: r.group):
            group = list(members)
            states = [r.state for r in group]
            if group[0].group is None or any(s is None for s in states):
                done += group
                continue
            try:
                whole = self._metric.folded(states)
            except DataError as error:
                failed = {"status": error.code, "error": str(error)}
                done += [_Counted({**r.known, **failed}, None) for r in group]
                continue
            if whole is not None:
                group = [*(_Counted(r.known, None) for r in group[:-1]), _Counted(group[-1].known, whole)]
            done += group
        return done

    def _batch(self, rows: "Sequence[_Counted]") -> pa.RecordBatch:
        columns: dict[str, Any] = dict(self._metric.columns([r.state for r in rows]))
        arrays = [
            columns[f.name] if f.name in columns else pa.array([r.known.get(f.name) for r in rows], f.type)
            for f in schemas.STATE
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schemas.STATE)

    def _obstacles(
        self, masks: pa.RecordBatch, truth: Sequence[Row | None], skip: Mapping[str, str]
    ) -> list[tuple[str, str, None] | None]:
        """(status, error, no state) of rows that cannot be counted, None for the others."""
        column = self._metric.task_column
        labels, statuses = present(truth, column), texts(truth, "status")
        predicted = masks.column(column).is_valid().to_pylist()
        found: list[tuple[str, str, None] | None] = []
        own = (masks.column(name).to_pylist() for name in ("sample_id", "status", "error"))
        for i, (name, status, error) in enumerate(zip(*own, strict=True)):
            if name in skip:
                found.append((QUARANTINED, skip[name], None))
            elif truth[i] is None:
                found.append((UNKNOWN_SAMPLE, "the samples table has no such sample", None))
            elif statuses[i] != OK:
                found.append((NO_LABEL, f"sample is {statuses[i]}", None))
            elif not labels[i]:
                found.append((NO_LABEL, f"sample has no {column} label", None))
            elif status != OK:
                found.append((PREDICTION_FAILED, f"{status}: {error or ''}".rstrip(": "), None))
            elif not predicted[i]:
                found.append((PREDICTION_FAILED, f"the masks have no {column} prediction", None))
            else:
                found.append(None)
        return found

    def _count(self, predicted: Row, truth: Row | None) -> tuple[str, str | None, Any]:
        """(status, error, state) of an image that nothing stands against."""
        assert truth is not None
        try:
            return OK, None, self._metric.update(truth, predicted)
        except DataError as error:
            return error.code, str(error), None
