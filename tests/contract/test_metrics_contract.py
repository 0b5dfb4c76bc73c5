"""What every registered metric must keep; being registered enrols it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import schemas
from segbatch.codecs import columns, png, rle, runlength
from segbatch.datasets import tables
from segbatch.metrics import registry
from segbatch.metrics.base import Metric, Row, ScoresBatches
from segbatch.records import ClassInfo, ClassTable

VOID = 11
PLAIN = ClassTable(
    (*(ClassInfo(i, f"class{i}", isthing=i < 6) for i in range(11)), ClassInfo(VOID, "void", ignore=True))
)
TABLES: dict[str, ClassTable] = {
    **dict.fromkeys(("ade20k", "ade20k-present"), tables.load("ade20k")),
    **{name: tables.load(name) for name in (f"bdd100k-{task}" for task in ("sem", "drivable", "ins", "pan", "lane"))},
    **dict.fromkeys(("binary", "pratheepan"), tables.load("pratheepan")),
    "ccp": tables.load("ccp"),
    **{f"cityscapes{level}": tables.load("cityscapes") for level in ("", "-instance", "-panoptic")},
    **dict.fromkeys(("coco-stuff", "coco-stuff-91"), tables.load("coco-stuff")),
    **dict.fromkeys(("kitti", "kitti-instance"), tables.load("kitti")),
    "lits": tables.load("lits"),
    **dict.fromkeys(("pascal-context", "pascal-context-60"), tables.load("pascal-context-60")),
    "pascal-context-59": tables.load("pascal-context-59"),
    "pascal-voc": tables.load("pascal-voc"),
}
"""Class tables of the protocols that want their own dataset's."""

OF_ALL = {"ade20k", "bdd100k-pan", "cityscapes-panoptic", "pascal-voc"}
"""Protocols whose means want every class: an absent one makes them smaller, or undefined."""
OF_LARGE = {"cityscapes-instance", "kitti-instance"}
"""Protocols that count things of 100 pixels or more, alone."""

IMAGES = 7

Map = NDArray[np.uint16]


@dataclass(frozen=True)
class Case:
    """A metric and a class table it is made for.

    Attributes:
        ids: up to eleven of the scored label ids, and then an ignored one, or one more.
        size: height and width of the maps.
    """

    metric: Metric[Any]
    classes: ClassTable
    ids: tuple[int, ...]
    size: tuple[int, int]

    def maps(self, seed: int) -> list[Map]:
        generator = np.random.default_rng(seed)
        ids = np.array(self.ids, np.uint16)
        return [ids[generator.integers(0, len(ids), self.size)] for _ in range(IMAGES)]

    def rows(self, maps: list[Map], schema: pa.Schema) -> pa.RecordBatch:
        return batch_of(maps, schema, self.classes.ignore_ids)


@pytest.fixture(params=registry.names())
def case(request: pytest.FixtureRequest) -> Case:
    classes = TABLES.get(request.param, PLAIN)
    scored = [c.label_id for c in classes.scored]
    few, size = (len(scored), (24, 36)) if request.param in OF_ALL | OF_LARGE else (11, (6, 9))
    if request.param in OF_LARGE:
        size = (48, 72)
    ids = (*scored[:few], *[*classes.ignore_ids, *scored[few:]][:1])
    return Case(registry.make(request.param, classes), classes, ids, size)


@pytest.fixture
def metric(case: Case) -> Metric[Any]:
    return case.metric


def objects_of(label_map: Map, void: Sequence[int]) -> list[dict[str, Any]]:
    """An object for every class that is no void; usable as entries of ``instances`` and of ``segments``."""
    found = rle.instances_of(label_map, background=list(void))
    return [
        {
            "id": 100 + label_id,
            "category_id": label_id,
            "bbox_xywh": box,
            "area": float(area),
            "iscrowd": False,
            "counts": counts,
            "score": 1 / (1 + label_id),
        }
        for label_id, area, box, counts in zip(
            found.ids.tolist(), found.areas.tolist(), found.boxes_xywh.tolist(), found.counts, strict=True
        )
    ]


def index_map(label_map: Map, void: Sequence[int]) -> Map:
    """n + 1 for the n-th object, 0 for void."""
    labels = [o["category_id"] for o in objects_of(label_map, void)]
    return np.where(np.isin(label_map, void), 0, np.searchsorted(labels, label_map) + 1).astype(np.uint16)


def batch_of(maps: list[Map], schema: pa.Schema, void: Sequence[int]) -> pa.RecordBatch:
    """Rows with every task there is, all made of the label maps; together they are a volume."""
    height, width = maps[0].shape
    same: dict[str, Any] = {"image_uri": "", "etag": "", "status": "ok", "model_digest": "", "group_id": "v"}
    same |= {"height": height, "width": width}
    sure = png.encode_grey(np.full((height, width), 255))
    same["confidence"] = {"height": height, "width": width, "png": sure}
    objects = [objects_of(m, void) for m in maps]
    volume = {"slices": len(maps), "spacing_mm": [0.7, 0.7, 2.5], "slope": 1.0, "intercept": 0.0, "dtype": "int16"}
    made = {
        "sample_id": pa.array([f"s{i}" for i in range(len(maps))]),
        "semantic": columns.runs_array([runlength.encode(m) for m in maps]),
        "panoptic": columns.panoptic_array([runlength.encode(index_map(m, void)) for m in maps]),
        "volume": pa.array([{"index": i, **volume} for i in range(len(maps))], schemas.VOLUME),
        **{name: pa.array(objects, schema.field(name).type) for name in ("instances", "segments")},
    }
    arrays = [made[f.name] if f.name in made else pa.array([same.get(f.name)] * len(maps), f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def states_of(metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch) -> list[Any]:
    return [metric.update(Row(truth, i), Row(predicted, i)) for i in range(truth.num_rows)]


@pytest.fixture
def truth(case: Case) -> pa.RecordBatch:
    return case.rows(case.maps(0), schemas.SAMPLES)


@pytest.fixture
def predicted(case: Case) -> pa.RecordBatch:
    """Like the truth, but for every third pixel."""
    wrong, generator = case.maps(1), np.random.default_rng(2)
    mixed = [np.where(generator.random(t.shape) < 0.3, w, t) for t, w in zip(case.maps(0), wrong, strict=True)]
    return case.rows(mixed, schemas.MASKS)


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
    batch = pa.RecordBatch.from_pydict({"sample_id": names, "group_id": ["v"] * len(names), **kept})
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
    nothing = pa.array([], pa.string())
    columns_of_nothing = {"sample_id": nothing, "group_id": nothing, **metric.columns([])}
    assert len(metric.states(pa.RecordBatch.from_pydict(columns_of_nothing))) == 0


def test_the_truth_itself_is_perfect(case: Case, metric: Metric[Any], truth: pa.RecordBatch) -> None:
    same = case.rows(case.maps(0), schemas.MASKS)
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
    free = getattr(metric, "unbounded", frozenset())
    assert all(
        f.value is None or (isinstance(f.value, float) and 0 <= f.value <= 1) for f in figures if f.metric not in free
    )
    assert all(f.value is not None for f in figures if f.metric == metric.headline)
    for state in states:
        score = metric.image(state).score
        assert score is not None
        assert 0 <= score <= 1


def test_images_at_once_are_those_one_by_one(
    metric: Metric[Any], truth: pa.RecordBatch, predicted: pa.RecordBatch
) -> None:
    if not isinstance(metric, ScoresBatches):
        return
    states = states_of(metric, truth, predicted)
    table = metric.images(states)
    assert [table.image(i) for i in range(len(states))] == [metric.image(s) for s in states]
    there = [True] * len(states)
    columns = metric.images(states).columns([False, *there, False])
    for name in ("score", "classes", "matches"):
        assert columns[name].type == schemas.IMAGES.field(name).type
        assert [v is None for v in columns[name].to_pylist()][:: len(states) + 1] == [True, True]
    scores = [metric.image(s) for s in states]
    assert columns["score"].to_pylist()[1:-1] == [s.score for s in scores]
    rows = columns["classes"].to_pylist()[1:-1]
    assert [[(c["class"], c["tp"], c["fp"], c["fn"]) for c in row] for row in rows] == [
        [(c.class_name, c.tp, c.fp, c.fn) for c in s.classes] for s in scores
    ]
    empty = metric.images([]).columns([False])
    assert [column.to_pylist() for column in empty.values()] == [[None], [None], [None]]
