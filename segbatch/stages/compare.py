"""Compare two evaluations: the difference of every figure, and how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from segbatch import storage, tables
from segbatch.errors import ConfigError
from segbatch.metrics import bootstrap, registry
from segbatch.metrics.base import Metric, MetricOptions
from segbatch.runs import Run
from segbatch.stages import join
from segbatch.stages.evaluate_finish import Census, Empty, walk
from segbatch.stages.totals import By, Totals

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure of two evaluations.

    Attributes:
        metric, class_name: the figure; the class is empty for one over all classes.
        first, second: its values; None where undefined.
        difference: second - first.
        ci_low, ci_high: 95 % interval of the difference.
        second_better: share of the resamples in which the second is greater, equal ones counted half.
    """

    metric: str
    class_name: str
    first: float | None
    second: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    second_better: float | None


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """States of an evaluation that is done."""

    root: str
    config: Mapping[str, Any]
    metric: Metric[Any]
    figures: Mapping[tuple[str, str], float | None]
    units: Mapping[str, Any]


def compare(
    first: str, second: str, resamples: int = 1000, seed: int = 0, by: By = "group", paired: bool = True
) -> list[Difference]:
    """Figures of two evaluations by one protocol, side by side.

    Paired, both are drawn together: the interval is that of the difference on the same images. Unpaired, each is drawn
    on its own, for evaluations of different images.

    Args:
        first, second: roots that ``evaluate`` wrote.
        resamples: of the bootstrap over groups or images.
        seed: of the bootstrap.
        by: what is drawn.
        paired: whether both have the same images.

    Raises:
        ConfigError: no evaluations, two protocols, or (paired) other images.
    """
    if resamples < 1:
        raise ConfigError("a comparison needs resamples", "give --bootstrap 1000")
    one, other = _opened(first, by), _opened(second, by)
    names = [{k: e.config.get(k) for k in ("protocol", "options")} for e in (one, other)]
    if names[0] != names[1]:
        raise ConfigError(f"{first} was scored as {names[0]}, {second} as {names[1]}", "evaluate both by one protocol")
    if paired:
        _check_same(one, other)
    drawn = [
        bootstrap.values(e.metric, e.units, resamples, seed if paired else seed + place)
        for place, e in enumerate((one, other))
    ]
    found = []
    for key, value in one.figures.items():
        if key not in other.figures or key not in drawn[0] or key not in drawn[1]:
            continue
        gaps = drawn[1][key] - drawn[0][key]
        span = bootstrap.interval(gaps)
        defined = gaps[np.isfinite(gaps)]
        share = float(np.mean((defined > 0) + 0.5 * (defined == 0))) if len(defined) else None
        second_value = other.figures[key]
        gap = None if value is None or second_value is None else second_value - value
        low, high = span or (None, None)
        found.append(Difference(*key, value, second_value, gap, low, high, share))
    return found


def _opened(root: str, by: By) -> _Evaluation:
    root = storage.resolve(root)
    document = Run(root, "state").document() or {}
    config = document.get("config", {})
    if document.get("verb") != "evaluate" or not tables.has(root, "summary"):
        raise ConfigError(f"{root} is not the output of segbatch evaluate, or not finished", "evaluate first")
    classes = tables.class_table(tables.root_of(config["samples"], "samples"))
    metric = registry.make(config["protocol"], classes, MetricOptions.of(config.get("options", {})))
    rows = [r for b in tables.scan(root, "summary") for r in b.to_pylist() if not r["slice"]]
    chosen = tuple(rows[0]["split"].split("+")) if rows else ()
    census = Census(join.SampleIndex(tables.parts(tables.find(config["samples"], "samples"))))
    for batch in tables.scan(root, "state", ("sample_id", "status")):
        census.add(batch)
    counted = any(r["metric"] == "images_counted_empty" and r["value"] for r in rows)
    totals: Totals[Any] = Totals(metric, by=by)
    for _, batches in walk(root, metric, chosen, Empty(metric, census, chosen) if counted else None):
        for batch, states in batches:
            totals.add(batch, states)
    figures = {(r["metric"], r["class"]): r["value"] for r in rows}
    return _Evaluation(root, config, metric, figures, totals.units())


def _check_same(one: _Evaluation, other: _Evaluation) -> None:
    for left, right in ((one, other), (other, one)):
        lacking = sorted(left.units.keys() - right.units.keys())
        if lacking:
            shown = ", ".join(lacking[:_SHOWN])
            problem = f"{right.root} lacks {len(lacking)} images or groups of {left.root}, e.g. {shown}"
            raise ConfigError(problem, "evaluate both on the same samples, or compare with --unpaired")
