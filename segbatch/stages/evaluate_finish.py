"""Finish an evaluation: check that every sample is there once, merge its state, write the tables that people query."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas, storage, tables
from segbatch.config import nearest
from segbatch.errors import ConfigError, IncompleteRunError
from segbatch.metrics import registry
from segbatch.metrics.base import (
    DEFAULTS,
    Confusion,
    CountsMissing,
    Detail,
    HasDetails,
    ImageScore,
    Match,
    Metric,
    MetricOptions,
    Row,
    ScoresBatches,
)
from segbatch.records import OK, Figure
from segbatch.stages import join, slices
from segbatch.stages.join import NO_LABEL, PREDICTION_FAILED, QUARANTINED, UNKNOWN_SAMPLE
from segbatch.stages.totals import Analysis, Totals

Missing = Literal["error", "skip", "partial"]
"""Images without a good prediction: an error, left out, or left out as far as the run that predicts has yet to come to
them."""

MISSING = "missing"
"""Stands among the statuses for samples that no masks row was found for."""

COUNTED_EMPTY = "counted-empty"
"""The same where the protocol takes them for images in which nothing was found; status of their ``images`` rows."""

NO_CONFIDENCE = "no-confidence"
"""Status of masks without the pixels' probabilities, of protocols that need them."""

_ABSENT, _SCORED, _UNLABELLED, _FAILED = range(4)
_FATES = {OK: _SCORED, NO_LABEL: _UNLABELLED}
_HARMLESS = (OK, NO_LABEL, UNKNOWN_SAMPLE, COUNTED_EMPTY)
_SHOWN = 3
_IMAGE_COLUMNS = ("sample_id", "group_id", "split", "image_uri", "attributes", "status", "error")
_TRUTH = ("sample_id", "group_id", "split", "image_uri", "attributes", "height", "width")
_TRUTH_ROWS = 256

Batches = Iterator[tuple[pa.RecordBatch, list[Any]]]
"""Rows with the columns that ``images`` has in common with the state table, and their states."""

_EMPTY_PART = f"{tables.PREFIX}empty{tables.SUFFIX}"


@dataclass(frozen=True, slots=True)
class Summary:
    """What an evaluation came to.

    Attributes:
        dataset, protocol, splits: what was evaluated, and how.
        figures: all figures; those over all classes first, counts of images last.
        images: how many samples of these splits have which status (``ok``, ``no-label``, ``missing`` ...);
            ``unknown-sample`` counts masks without a sample, ``counted-empty`` samples without masks that were taken
            for images where nothing was found.
    """

    dataset: str
    protocol: str
    splits: tuple[str, ...]
    figures: tuple[Figure, ...]
    images: dict[str, int]


def finish(
    out_root: str,
    masks: str,
    samples: str,
    protocol: str,
    missing: Missing = "error",
    splits: Sequence[str] = (),
    options: MetricOptions = DEFAULTS,
    analysis: Analysis | None = None,
) -> Summary:
    """Merge all state parts and write ``images``, ``confusion``, ``details`` and ``summary``, in this order.

    A sample that no masks row is there for counts as one where nothing was found if the protocol says so
    (``CountsMissing``) and ``missing`` is ``error``. A row that failed never does.

    Memory: one batch of state, 27 bytes per sample for the check that each is there once, and twice what the protocol
    keeps of all images.

    Args:
        out_root: the evaluation's run root.
        masks, samples: roots or table folders, for messages and classes.
        protocol: as it was evaluated.
        missing: whether a sample without a usable prediction is an error, or left out and counted; ``partial`` leaves
            out samples without a masks row only.
        splits: which splits count; empty: those that the masks cover.
        options: as it was evaluated.
        analysis: slices and intervals.

    Raises:
        IncompleteRunError: samples without prediction, or with several; or nothing could be scored.
        ConfigError: a split that the samples lack, or a slice that is no expression over samples.
    """
    analysis = analysis or Analysis()
    root = storage.resolve(out_root)
    info = tables.dataset_info(tables.root_of(samples, "samples"))
    metric = registry.make(protocol, tables.class_table(tables.root_of(samples, "samples")), options)
    census = Census(join.SampleIndex(tables.parts(tables.find(samples, "samples"))))
    for batch in tables.scan(root, "state", ("sample_id", "status")):
        census.add(batch)
    chosen = census.choose(splits)
    images = census.count(chosen)
    empty = Empty(metric, census, chosen) if isinstance(metric, CountsMissing) and missing == "error" else None
    if empty is not None:
        images[COUNTED_EMPTY] = images.pop(MISSING)
    _check(census, chosen, images, masks, missing)
    totals = Totals(
        metric,
        slices.slicings(samples, analysis.slices),
        analysis.by if analysis.resamples else None,
        missing != "error",
    )
    _write_images(root, metric, chosen, empty, totals)
    total = totals.whole()
    if empty is not None and empty.unlabelled:
        images[COUNTED_EMPTY] -= empty.unlabelled
        images[NO_LABEL] = images.get(NO_LABEL, 0) + empty.unlabelled
    summary = Summary(
        str(info.get("name", "")), protocol, chosen, (*totals.figures(total, analysis), *_image_figures(images)), images
    )
    _write_confusion(root, metric.confusion(total))
    _write_details(root, metric.details(total) if isinstance(metric, HasDetails) else ())
    _write_summary(root, summary)
    return summary


class Census:
    """What became of every sample, from one pass over the ids and statuses of the state."""

    def __init__(self, index: join.SampleIndex) -> None:
        self.index = index
        self.fate = np.where(index.good, _ABSENT, _UNLABELLED).astype(np.uint8)
        self._seen = np.zeros(len(index), bool)
        self._statuses: Counter[tuple[int, str]] = Counter()
        self._unknown = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Take note of state rows.

        Raises:
            IncompleteRunError: a sample that was there before.
        """
        found = self.index.positions(batch.column("sample_id").to_pylist())
        places, statuses = found[found >= 0], np.array(batch.column("status").to_pylist(), object)[found >= 0]
        self._unknown += batch.num_rows - len(places)
        unique, times = np.unique(places, return_counts=True)
        twice = unique[(times > 1) | self._seen[unique]]
        if len(twice):
            problem = f"sample {self.index.id_at(int(twice[0]))} has more than one row in the masks"
            raise IncompleteRunError(problem, "predict into one root once, or evaluate each root on its own")
        self._seen[places] = True
        self.fate[places] = [_FATES.get(s, _FAILED) for s in statuses]
        self._statuses.update(zip(self.index.split_code[places].tolist(), statuses.tolist(), strict=True))

    def choose(self, splits: Sequence[str]) -> tuple[str, ...]:
        """The splits to evaluate, checked; by default those that the masks cover, or all when they cover none."""
        known = self.index.splits
        for name in splits:
            if name not in known:
                raise ConfigError(
                    f"the samples have no split {name}{nearest(name, known)}", f"they have {', '.join(known)}"
                )
        covered = np.unique(self.index.split_code[self._seen])
        return tuple(splits) or tuple(known[c] for c in covered) or tuple(known)

    def inside(self, chosen: Sequence[str]) -> NDArray[np.bool_]:
        """Which positions belong to these splits; shape (samples,)."""
        return np.isin(self.index.split_code, [self.index.splits.index(name) for name in chosen])

    def count(self, chosen: Sequence[str]) -> dict[str, int]:
        """Samples by status within the splits; ok and missing are always there."""
        codes = {self.index.splits.index(name) for name in chosen}
        counts = Counter({OK: 0, MISSING: int((self.inside(chosen) & (self.fate == _ABSENT)).sum())})
        for (code, status), n in sorted(self._statuses.items()):
            if code in codes:
                counts[status] += n
        if self._unknown:
            counts[UNKNOWN_SAMPLE] = self._unknown
        return dict(counts)

    def absent(self, chosen: Sequence[str]) -> NDArray[np.int64]:
        """Positions of the good samples without a masks row."""
        return np.flatnonzero(self.inside(chosen) & (self.fate == _ABSENT))

    def examples(self, chosen: Sequence[str], fates: Sequence[int]) -> list[str]:
        """Up to three sample ids of these fates."""
        positions = np.flatnonzero(self.inside(chosen) & np.isin(self.fate, fates))[:_SHOWN]
        return [self.index.id_at(int(p)) for p in positions]


def _check(census: Census, chosen: Sequence[str], images: dict[str, int], masks: str, missing: Missing) -> None:
    """Refuse to print a figure over fewer images than the user believes."""
    harmless = (*_HARMLESS, MISSING) if missing == "partial" else _HARMLESS
    bad = {status: n for status, n in images.items() if n and status not in harmless}
    if bad and missing != "skip":
        words = ", ".join(f"{n} {status}" for status, n in bad.items())
        shown = ", ".join(census.examples(chosen, (_ABSENT, _FAILED) if MISSING in images else (_FAILED,)))
        total = int(census.inside(chosen).sum())
        problem = f"{sum(bad.values())} of {total} samples have no usable prediction ({words}), e.g. {shown}"
        raise IncompleteRunError(problem, _remedy(bad, masks))
    if not images[OK]:
        words = ", ".join(f"{n} {status}" for status, n in images.items() if n) or "no samples"
        raise IncompleteRunError(f"no image could be scored: {words}", "check that these masks belong to these samples")


def _remedy(bad: dict[str, int], masks: str) -> str:
    failed = [s for s in bad if s in (PREDICTION_FAILED, QUARANTINED)]
    steps = [f"run `segbatch retry {masks} --failed` and evaluate again"] if failed else []
    if bad.get(MISSING):
        steps.append("run the predict command again over all samples")
        steps.append("evaluate what is there so far with `--partial`")
    if bad.get(NO_CONFIDENCE):
        steps.append("predict into a new output with `--confidence`")
    if set(bad) - {*failed, MISSING, NO_CONFIDENCE}:
        steps.append("predict again on the photos that were ingested")
    return " or ".join([*steps, "leave them out with `--missing skip`"])


class Empty:
    """Samples without a masks row, which count as images where nothing was found.

    Attributes:
        samples: how many there are.
        unlabelled: how many of those read have no label.
    """

    def __init__(self, metric: Metric[Any], census: Census, chosen: Sequence[str]) -> None:
        self._metric, self._index, self._positions = metric, census.index, census.absent(chosen)
        self.samples = len(self._positions)
        self.unlabelled = 0

    def batches(self) -> Batches:
        """Rows with the columns that ``images`` has in common with the state table, and their states."""
        assert isinstance(self._metric, CountsMissing)
        for start in range(0, len(self._positions), _TRUTH_ROWS):
            positions = self._positions[start : start + _TRUTH_ROWS]
            found = self._index.rows(positions, (*_TRUTH, *self._metric.truth_columns))
            rows = [found[int(p)] for p in positions]
            states = [self._metric.empty(r) if _has_label(r, self._metric) else None for r in rows]
            self.unlabelled += states.count(None)
            columns: dict[str, list[str | None]] = {name: [r.text(name) for r in rows] for name in _TRUTH[:5]}
            columns["status"] = [NO_LABEL if s is None else COUNTED_EMPTY for s in states]
            arrays = [
                pa.array(columns.get(name, [None] * len(rows)), schemas.IMAGES.field(name).type)
                for name in _IMAGE_COLUMNS
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=list(_IMAGE_COLUMNS)), states


def _has_label(row: Row, metric: Metric[Any]) -> bool:
    found: bool = row.column(metric.task_column)[row.index].is_valid
    return found


def _write_images(
    root: str, metric: Metric[Any], chosen: Sequence[str], empty: Empty | None, totals: Totals[Any]
) -> None:
    """One ``images`` part per state part, and one of the ``empty`` samples, as a stream; all states into ``totals``."""
    written = set()
    for name, batches in walk(root, metric, chosen, empty):
        writer = tables.PartWriter("images")
        for batch, states in batches:
            totals.add(batch, states)
            writer.write(_image_rows(batch, metric, states))
        uri = storage.join(root, "images", name)
        storage.replace(uri, writer.finish({}))
        written.add(uri)
    for stale in tables.parts(storage.join(root, "images")):
        if stale.uri not in written:
            storage.delete(stale.uri)


def walk(root: str, metric: Metric[Any], chosen: Sequence[str], empty: Empty | None) -> Iterator[tuple[str, Batches]]:
    """All states of the chosen splits: the name of each part with its batches, those of ``empty`` at last."""
    for part in tables.parts(tables.find(root, "state")):
        yield storage.name_of(part.uri), _states(part.uri, metric, set(chosen))
    if empty is not None and empty.samples:
        yield _EMPTY_PART, empty.batches()


def _states(uri: str, metric: Metric[Any], chosen: set[str]) -> Batches:
    """The rows of a state part that belong to the chosen splits, and their states."""
    for batch in tables.batches(uri, "state", (*_IMAGE_COLUMNS, *metric.state_columns)):
        kept = batch.filter(pa.array(_inside(batch, chosen), pa.bool_()))
        yield kept, metric.states(kept)


def _inside(batch: pa.RecordBatch, chosen: set[str]) -> list[bool]:
    """Which state rows belong to the chosen splits; masks without a sample belong to all."""
    pairs = zip(batch.column("split").to_pylist(), batch.column("status").to_pylist(), strict=True)
    return [(split or "") in chosen or status == UNKNOWN_SAMPLE for split, status in pairs]


def _image_rows(batch: pa.RecordBatch, metric: Metric[Any], states: Sequence[Any]) -> pa.RecordBatch:
    """Rows of the images table for rows of state; score and classes are null where there is no state."""
    columns = {name: batch.column(name) for name in _IMAGE_COLUMNS}
    if isinstance(metric, ScoresBatches):
        there = [s is not None for s in states]
        columns |= metric.images([s for s in states if s is not None]).columns(there)
    else:
        columns |= _scored([metric.image(s) if s is not None else None for s in states])
    return pa.RecordBatch.from_arrays([columns[name] for name in schemas.IMAGES.names], schema=schemas.IMAGES)


def _scored(scores: Sequence[ImageScore | None]) -> dict[str, pa.Array]:
    """Columns ``score``, ``classes`` and ``matches``."""
    return {
        "score": pa.array([s.score if s else None for s in scores], pa.float64()),
        "classes": pa.array([_class_rows(s) if s else None for s in scores], schemas.IMAGES.field("classes").type),
        "matches": pa.array(
            [None if s is None or s.matches is None else list(map(_cells, s.matches)) for s in scores],
            schemas.IMAGES.field("matches").type,
        ),
    }


def _class_rows(score: ImageScore) -> list[dict[str, Any]]:
    return [
        {"class": c.class_name, "label_id": c.label_id, "tp": c.tp, "fp": c.fp, "fn": c.fn, "iou": c.iou}
        for c in score.classes
    ]


def _cells(match: Match) -> dict[str, Any]:
    names = ("label_id", "truth_id", "predicted_id", "iou", "score", "outcome")
    return {"class": match.class_name, **{name: getattr(match, name) for name in names}}


def _image_figures(images: dict[str, int]) -> list[Figure]:
    """How many images stand behind the figures, and how many do not."""
    others = {
        "images_scored": images[OK] + images.get(COUNTED_EMPTY, 0),
        "images_skipped": sum(n for s, n in images.items() if s not in _HARMLESS),
        "images_without_label": images.get(NO_LABEL, 0),
        "images_unknown": images.get(UNKNOWN_SAMPLE, 0),
    }
    if images.get(MISSING):
        others["images_missing"] = images[MISSING]
    if COUNTED_EMPTY in images:
        others["images_counted_empty"] = images[COUNTED_EMPTY]
    return [Figure(name, float(n)) for name, n in others.items()]


def _write_confusion(root: str, confusion: Confusion | None) -> None:
    """The pairs that occur, in class order."""
    rows: list[dict[str, Any]] = []
    if confusion is not None:
        for i, j in np.argwhere(confusion.pixels).tolist():
            rows.append(
                {
                    "truth": confusion.truth_names[i],
                    "predicted": confusion.predicted_names[j],
                    "truth_id": confusion.truth_ids[i],
                    "predicted_id": confusion.predicted_ids[j],
                    "pixels": int(confusion.pixels[i, j]),
                }
            )
    tables.write_table(root, "confusion", pa.Table.from_pylist(rows, schema=schemas.CONFUSION))


def _write_details(root: str, details: Iterable[Detail]) -> None:
    names = {"class": "class_name"}
    rows = [
        {f.name: getattr(d, names.get(f.name, f.name)) for f in schemas.DETAILS if f.name != "values"}
        | {"values": list(d.values.items())}
        for d in details
    ]
    tables.write_table(root, "details", pa.Table.from_pylist(rows, schema=schemas.DETAILS))


def _write_summary(root: str, summary: Summary) -> None:
    rows = [
        {
            "metric": f.metric,
            "protocol": summary.protocol,
            "dataset": summary.dataset,
            "split": "+".join(summary.splits),
            "slice": f.slice,
            "class": f.class_name,
            "value": f.value,
            "ci_low": f.ci_low,
            "ci_high": f.ci_high,
            "support": f.support,
        }
        for f in summary.figures
    ]
    tables.write_table(root, "summary", pa.Table.from_pylist(rows, schema=schemas.SUMMARY))
