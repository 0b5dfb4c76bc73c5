"""What every registered metric must keep; being registered enrols it."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.metrics import registry
from segbatch.metrics.base import Metric, Row
from segbatch.records import ClassInfo, ClassTable

CLASSES = ClassTable((*(ClassInfo(i, f"class{i}") for i in range(11)), ClassInfo(11, "void", ignore=True)))
IMAGES = 7


@pytest.fixture(params=registry.names())
def metric(request: pytest.FixtureRequest) -> Metric[Any]:
    return registry.make(request.param, CLASSES)


def batch_of(maps: list[NDArray[np.uint16]], schema: pa.Schema) -> pa.RecordBatch:
    height, width = maps[0].shape
    same: dict[str, Any] = {"image_uri": "", "etag": "", "status": "ok", "model_digest": ""}
    same |= {"height": height, "width": width}
    arrays = []
    for f in schema:
        if f.name == "semantic":
            arrays.append(columns.runs_array([runlength.encode(m) for m in maps]))
        elif f.name == "sample_id":
            arrays.append(pa.array([f"s{i}" for i in range(len(maps))]))
        else:
            arrays.append(pa.array([same.get(f.name)] * len(maps), f.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def states_of(metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch) -> list[Any]:
    return [metric.update(Row(truth, i), Row(predicted, i)) for i in range(truth.num_rows)]


@pytest.fixture
def truth() -> pa.RecordBatch:
    generator = np.random.default_rng(0)
    return batch_of([generator.integers(0, 12, (6, 9)).astype(np.uint16) for _ in range(IMAGES)], schemas.SAMPLES)


@pytest.fixture
def predicted() -> pa.RecordBatch:
    generator = np.random.default_rng(1)
    return batch_of([generator.integers(0, 12, (6, 9)).astype(np.uint16) for _ in range(IMAGES)], schemas.MASKS)


def same_columns(left: pa.RecordBatch) -> pa.RecordBatch:
    """The masks that equal these samples."""
    arrays = [
        left.column(f.name) if f.name in ("sample_id", "semantic", "height", "width") else column
        for f, column in zip(
            schemas.MASKS, batch_of([np.zeros((1, 1), np.uint16)] * IMAGES, schemas.MASKS), strict=True
        )
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schemas.MASKS)


def test_it_says_what_it_is(metric: Metric[Any]) -> None:
    assert metric.name in registry.names()
    assert metric.source
    assert set(metric.truth_columns) <= set(schemas.SAMPLES.names)
    assert set(metric.prediction_columns) <= set(schemas.MASKS.names)
    assert set(metric.state_columns) <= set(schemas.STATE.names)
    assert metric.task_column in schemas.SAMPLES.names


def test_states_survive_the_state_table(metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch) -> None:
    states = states_of(metric, truth, predicted)
    with_gaps = [states[0], None, *states[1:], None]
    kept = metric.columns(with_gaps)
    assert set(kept) == set(metric.state_columns)
    for name, column in kept.items():
        assert column.type == schemas.STATE.field(name).type
    batch = pa.RecordBatch.from_pydict(dict(kept))
    again = metric.states(batch)
    assert [s is None for s in again] == [s is None for s in with_gaps]
    left, right = metric.merge(states), metric.merge([s for s in again if s is not None])
    assert metric.compute(left) == metric.compute(right)
    part = metric.states(batch.slice(2, 3))
    assert [metric.image(s) for s in part] == [metric.image(s) for s in states[1:4]]


def test_any_order_and_partition_computes_the_same(
    metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch
) -> None:
    states = states_of(metric, truth, predicted)
    whole = metric.compute(metric.merge(states))
    parts = [metric.merge(states[4:]), metric.merge([]), metric.merge(states[:1]), metric.merge(states[3:0:-1])]
    assert metric.compute(metric.merge(parts)) == whole


def test_nothing_at_all_has_figures_without_values_or_zero(metric: Metric[Any]) -> None:
    empty = metric.merge([])
    assert {f.value for f in metric.compute(empty)} <= {None, 0.0}
    metric.confusion(empty)
    assert len(metric.states(pa.RecordBatch.from_pydict(dict(metric.columns([]))))) == 0


def test_the_truth_itself_is_perfect(metric: Metric[Any], truth: pa.RecordBatch) -> None:
    figures = metric.compute(metric.merge(states_of(metric, truth, same_columns(truth))))
    headline = [f for f in figures if f.metric == metric.headline and not f.class_name]
    assert [f.value for f in headline] == [1.0]


def test_figures_are_unique_and_images_are_scored(
    metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch
) -> None:
    states = states_of(metric, truth, predicted)
    figures = metric.compute(metric.merge(states))
    keys = [(f.metric, f.class_name, f.slice) for f in figures]
    assert len(keys) == len(set(keys))
    assert all(isinstance(f.value, float) for f in figures)
    for state in states:
        score = metric.image(state).score
        assert score is not None
        assert 0 <= score <= 1
