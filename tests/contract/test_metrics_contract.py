"""What every registered metric must keep; being registered enrols it."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, rle, runlength
from segbatch.metrics import registry
from segbatch.metrics.base import Metric, Row
from segbatch.records import ClassInfo, ClassTable

VOID = 11
CLASSES = ClassTable(
    (*(ClassInfo(i, f"class{i}", isthing=i < 6) for i in range(11)), ClassInfo(VOID, "void", ignore=True))
)
IMAGES = 7

Map = NDArray[np.uint16]


@pytest.fixture(params=registry.names())
def metric(request: pytest.FixtureRequest) -> Metric[Any]:
    return registry.make(request.param, CLASSES)


def random_maps(seed: int) -> list[Map]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 12, (6, 9)).astype(np.uint16) for _ in range(IMAGES)]


def objects_of(label_map: Map) -> list[dict[str, Any]]:
    """An object for every class that is no void; usable as entries of ``instances`` and of ``segments``."""
    found = rle.instances_of(label_map, background=[VOID])
    return [
        {
            "id": 100 + label_id,
            "category_id": label_id,
            "bbox_xywh": box,
            "area": float(area),
            "iscrowd": False,
            "counts": counts,
            "score": 1 - label_id / 20,
        }
        for label_id, area, box, counts in zip(
            found.ids.tolist(), found.areas.tolist(), found.boxes_xywh.tolist(), found.counts, strict=True
        )
    ]


def index_map(label_map: Map) -> Map:
    """n + 1 for the n-th object, 0 for void."""
    labels = [o["category_id"] for o in objects_of(label_map)]
    return np.where(label_map == VOID, 0, np.searchsorted(labels, label_map) + 1).astype(np.uint16)


def batch_of(maps: list[Map], schema: pa.Schema) -> pa.RecordBatch:
    """Rows with every task there is, all made of the label maps."""
    height, width = maps[0].shape
    same: dict[str, Any] = {"image_uri": "", "etag": "", "status": "ok", "model_digest": ""}
    same |= {"height": height, "width": width}
    objects = [objects_of(m) for m in maps]
    made = {
        "sample_id": pa.array([f"s{i}" for i in range(len(maps))]),
        "semantic": columns.runs_array([runlength.encode(m) for m in maps]),
        "panoptic": columns.panoptic_array([runlength.encode(index_map(m)) for m in maps]),
        **{name: pa.array(objects, schema.field(name).type) for name in ("instances", "segments")},
    }
    arrays = [made[f.name] if f.name in made else pa.array([same.get(f.name)] * len(maps), f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def states_of(metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch) -> list[Any]:
    return [metric.update(Row(truth, i), Row(predicted, i)) for i in range(truth.num_rows)]


@pytest.fixture
def truth() -> pa.RecordBatch:
    return batch_of(random_maps(0), schemas.SAMPLES)


@pytest.fixture
def predicted() -> pa.RecordBatch:
    """Like the truth, but for every third pixel."""
    wrong, generator = random_maps(1), np.random.default_rng(2)
    mixed = [np.where(generator.random(t.shape) < 0.3, w, t) for t, w in zip(random_maps(0), wrong, strict=True)]
    return batch_of(mixed, schemas.MASKS)


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
    names = [f"s{i}" for i in (0, 99, *range(1, IMAGES), 99)]
    batch = pa.RecordBatch.from_pydict({"sample_id": names, **kept})
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
    columns_of_nothing = {"sample_id": pa.array([], pa.string()), **metric.columns([])}
    assert len(metric.states(pa.RecordBatch.from_pydict(columns_of_nothing))) == 0


def test_the_truth_itself_is_perfect(metric: Metric[Any], truth: pa.RecordBatch) -> None:
    same = batch_of(random_maps(0), schemas.MASKS)
    figures = metric.compute(metric.merge(states_of(metric, truth, same)))
    headline = [f for f in figures if f.metric == metric.headline and not f.class_name]
    assert [f.value for f in headline] == [1.0]


def test_figures_are_unique_and_images_are_scored(
    metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch
) -> None:
    states = states_of(metric, truth, predicted)
    figures = metric.compute(metric.merge(states))
    keys = [(f.metric, f.class_name, f.slice) for f in figures]
    assert len(keys) == len(set(keys))
    assert all(f.value is None or (isinstance(f.value, float) and 0 <= f.value <= 1) for f in figures)
    assert all(f.value is not None for f in figures if f.metric == metric.headline)
    for state in states:
        score = metric.image(state).score
        assert score is not None
        assert 0 <= score <= 1
