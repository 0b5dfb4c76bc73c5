"""Finish an evaluation: check that every sample is there once, merge its state, write the tables that people query."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import schemas, storage, tables
from segbatch.config import nearest
from segbatch.errors import ConfigError, IncompleteRunError
from segbatch.metrics import registry
from segbatch.metrics.base import Confusion, ImageScore, Metric
from segbatch.records import OK, Figure
from segbatch.stages import join
from segbatch.stages.join import NO_LABEL, PREDICTION_FAILED, QUARANTINED, UNKNOWN_SAMPLE

Missing = Literal["error", "skip"]

MISSING = "missing"
"""Stands among the statuses for samples that no masks row was found for."""

_ABSENT, _SCORED, _UNLABELLED, _FAILED = range(4)
_FATES = {OK: _SCORED, NO_LABEL: _UNLABELLED}
_SHOWN = 3
_IMAGE_COLUMNS = ("sample_id", "group_id", "split", "image_uri", "attributes", "status", "error")


@dataclass(frozen=True, slots=True)
class Summary:
    """What an evaluation came to.

    Attributes:
        dataset, protocol, splits: what was evaluated, and how.
        figures: all figures; those over all classes first, counts of images last.
        images: how many samples of these splits have which status (``ok``, ``no-label``, ``missing`` ...);
            ``unknown-sample`` counts masks without a sample.
    """

    dataset: str
    protocol: str
    splits: tuple[str, ...]
    figures: tuple[Figure, ...]
    images: dict[str, int]


def finish(
    out_root: str, masks: str, samples: str, protocol: str, missing: Missing = "error", splits: Sequence[str] = ()
) -> Summary:
    """Merge all state parts and write ``images``, ``confusion`` and ``summary``, in this order.

    Memory: one batch of state, and 27 bytes per sample for the check that each is there once.

    Args:
        out_root: the evaluation's run root.
        masks, samples: roots or table folders, for messages and classes.
        protocol: as it was evaluated.
        missing: whether a sample without a usable prediction is an error, or left out and counted.
        splits: which splits count; empty: those that the masks cover.

    Raises:
        IncompleteRunError: samples without prediction, or with several; or nothing could be scored.
        ConfigError: a split that the samples lack.
    """
    root = storage.resolve(out_root)
    info = tables.dataset_info(tables.root_of(samples, "samples"))
    metric = registry.make(protocol, tables.class_table(tables.root_of(samples, "samples")))
    census = Census(join.SampleIndex(tables.parts(tables.find(samples, "samples"))))
    for batch in tables.scan(root, "state", ("sample_id", "status")):
        census.add(batch)
    chosen = census.choose(splits)
    images = census.count(chosen)
    _check(census, chosen, images, masks, missing)
    total = _write_images(root, metric, set(chosen))
    summary = Summary(
        str(info.get("name", "")), protocol, chosen, (*metric.compute(total), *_image_figures(images)), images
    )
    _write_confusion(root, metric.confusion(total))
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

    def examples(self, chosen: Sequence[str], fates: Sequence[int]) -> list[str]:
        """Up to three sample ids of these fates."""
        positions = np.flatnonzero(self.inside(chosen) & np.isin(self.fate, fates))[:_SHOWN]
        return [self.index.id_at(int(p)) for p in positions]


def _check(census: Census, chosen: Sequence[str], images: dict[str, int], masks: str, missing: Missing) -> None:
    """Refuse to print a figure over fewer images than the user believes."""
    bad = {status: n for status, n in images.items() if n and status not in (OK, NO_LABEL, UNKNOWN_SAMPLE)}
    if bad and missing == "error":
        words = ", ".join(f"{n} {status}" for status, n in bad.items())
        shown = ", ".join(census.examples(chosen, (_ABSENT, _FAILED)))
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
    if set(bad) - {*failed, MISSING}:
        steps.append("predict again on the photos that were ingested")
    return " or ".join([*steps, "leave them out with `--missing skip`"])


def _write_images(root: str, metric: Metric[Any], chosen: set[str]) -> Any:
    """One ``images`` part per state part, as a stream; returns the merged state of the scored images."""
    total = metric.merge([])
    written = set()
    for part in tables.parts(tables.find(root, "state")):
        writer = tables.PartWriter("images")
        for batch in tables.batches(part.uri, "state", (*_IMAGE_COLUMNS, *metric.state_columns)):
            inside = _inside(batch, chosen)
            states = [s if keep else None for s, keep in zip(metric.states(batch), inside, strict=True)]
            total = metric.merge([total, *(s for s in states if s is not None)])
            writer.write(_image_rows(batch, metric, states).filter(pa.array(inside, pa.bool_())))
        uri = storage.join(root, "images", storage.name_of(part.uri))
        storage.replace(uri, writer.finish({}))
        written.add(uri)
    for stale in tables.parts(storage.join(root, "images")):
        if stale.uri not in written:
            storage.delete(stale.uri)
    return total


def _inside(batch: pa.RecordBatch, chosen: set[str]) -> list[bool]:
    """Which state rows belong to the chosen splits; masks without a sample belong to all."""
    pairs = zip(batch.column("split").to_pylist(), batch.column("status").to_pylist(), strict=True)
    return [(split or "") in chosen or status == UNKNOWN_SAMPLE for split, status in pairs]


def _image_rows(batch: pa.RecordBatch, metric: Metric[Any], states: Sequence[Any]) -> pa.RecordBatch:
    """Rows of the images table for rows of state; score and classes are null where there is no state."""
    scores = [metric.image(s) if s is not None else None for s in states]
    columns = {name: batch.column(name) for name in _IMAGE_COLUMNS}
    columns["score"] = pa.array([s.score if s else None for s in scores], pa.float64())
    columns["classes"] = pa.array([_class_rows(s) if s else None for s in scores], schemas.IMAGES.field("classes").type)
    return pa.RecordBatch.from_arrays([columns[name] for name in schemas.IMAGES.names], schema=schemas.IMAGES)


def _class_rows(score: ImageScore) -> list[dict[str, Any]]:
    return [
        {"class": c.class_name, "label_id": c.label_id, "tp": c.tp, "fp": c.fp, "fn": c.fn, "iou": c.iou}
        for c in score.classes
    ]


def _image_figures(images: dict[str, int]) -> list[Figure]:
    """How many images stand behind the figures, and how many do not."""
    others = {
        "images_scored": images[OK],
        "images_skipped": sum(n for s, n in images.items() if s not in (OK, NO_LABEL, UNKNOWN_SAMPLE)),
        "images_without_label": images.get(NO_LABEL, 0),
        "images_unknown": images.get(UNKNOWN_SAMPLE, 0),
    }
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
