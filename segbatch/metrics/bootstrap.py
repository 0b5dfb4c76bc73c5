"""How sure a figure is: the bootstrap over what was drawn at random, images or groups of them, never pixels.

A resample draws as many units as there are, with replacement, and its figures come from the units' states: no mask is
read again. Intervals are percentiles. Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993),
chapters 6 and 13.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch.metrics.arrays import collected
from segbatch.metrics.base import Key, Metric, Resampler, Resamples, image_order
from segbatch.metrics.semantic import Joint

_AT_ONCE = 50
LEVELS = (2.5, 97.5)
"""Percentiles of a 95 % interval."""

Values = dict[Key, NDArray[np.float64]]


def draws(units: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each unit is drawn, int64 of shape (n, units), as a stream of ``resamples`` rows in all."""
    generator = np.random.default_rng(seed)
    share = np.full(units, 1 / units)
    for start in range(0, resamples, _AT_ONCE):
        yield generator.multinomial(units, share, size=min(_AT_ONCE, resamples - start)).astype(np.int64)


def values(metric: Metric[Any], units: Mapping[str, Any], resamples: int, seed: int) -> Values:
    """Figures of every resample, float64 of shape (resamples,) by figure; NaN where undefined.

    Args:
        metric: the evaluator.
        units: the state of each unit by its name; drawn in ``image_order`` of the names.
        resamples: how many.
        seed: of the generator: the same gives the same resamples for equally many units.
    """
    names = list(units)
    states = [units[names[i]] for i in image_order(names)]
    figures = _resampler(metric, states)
    parts = [figures(times) for times in draws(len(states), resamples, seed)]
    sizes = [min(_AT_ONCE, resamples - start) for start in range(0, resamples, _AT_ONCE)]
    keys = dict.fromkeys(key for part in parts for key in part)
    return {
        key: np.concatenate([p.get(key, np.full(n, np.nan)) for p, n in zip(parts, sizes, strict=True)]) for key in keys
    }


def interval(found: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of a figure from its values; None where fewer than two are defined."""
    defined = found[np.isfinite(found)]
    if len(defined) < 2:
        return None
    low, high = np.percentile(defined, LEVELS)
    return float(low), float(high)


def of_pairs(metric: Metric[Joint], units: Sequence[Joint]) -> Resampler:
    """``base.Resamples`` for metrics whose states are joint histograms, which can be multiplied."""
    from scipy import sparse

    sizes = [len(u.pixels) for u in units]
    whole = metric.merge(units)
    keys = np.concatenate([u.truth.astype(np.uint32) << 16 | u.predicted for u in units])
    columns = np.searchsorted(whole.truth.astype(np.uint32) << 16 | whole.predicted, keys)
    pixels = np.concatenate([u.pixels for u in units]).astype(np.int64)
    shape = (len(units), len(whole.pixels))
    counts = sparse.csr_array((pixels, (np.repeat(np.arange(len(units)), sizes), columns)), shape)

    def figures(times: NDArray[np.int64]) -> Values:
        drawn = sparse.csr_array(times) @ counts
        totals = (Joint(whole.truth, whole.predicted, row.astype(np.uint64)) for row in drawn.toarray())
        return collected(len(times), (metric.compute(total) for total in totals))

    return figures


def _resampler(metric: Metric[Any], states: Sequence[Any]) -> Resampler:
    if isinstance(metric, Resamples):
        return metric.resampler(states)

    def figures(times: NDArray[np.int64]) -> Values:
        repeated = ([s for s, n in zip(states, row, strict=True) for _ in range(n)] for row in times)
        return collected(len(times), (metric.compute(metric.merge(drawn)) for drawn in repeated))

    return figures
