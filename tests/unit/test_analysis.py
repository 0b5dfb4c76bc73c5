"""Slices, class maps, intervals, comparisons, and evaluations of runs that are still going."""

import json
from pathlib import Path
from typing import Any

import coco_cases
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from segbatch import api, schemas, storage, tables
from segbatch.codecs import columns, runlength
from segbatch.config import EngineConfig, RunOptions
from segbatch.errors import ConfigError, IncompleteRunError
from segbatch.metrics import bootstrap, registry
from segbatch.metrics.coco_instance import CocoInstanceMetric
from segbatch.metrics.semantic import Joint
from segbatch.records import ClassInfo, ClassTable, Figure
from segbatch.runs import Run
from segbatch.stages import relabel, slices
from segbatch.stages.totals import Analysis

INLINE = RunOptions(engine=EngineConfig(kind="inline"))
IDS = (7, 8, 11)
CLASSES = ClassTable(
    (*(ClassInfo(i, n) for i, n in zip(IDS, ("road", "sky", "tree"), strict=True)), ClassInfo(0, "void", ignore=True))
)
IMAGES = 12
WEATHER = ("rain", "sun", None)

Map = NDArray[np.uint16]


def maps(seed: int, ids: tuple[int, ...] = IDS) -> list[Map]:
    generator = np.random.default_rng(seed)
    return [generator.choice(np.array(ids, np.uint16), (6, 8)) for _ in range(IMAGES)]


def write(root: Path, table: str, found: list[Map], classes: ClassTable, first: int = 0) -> Path:
    """A part with one row per map; image i has i objects of 100 (i + 1) pixels, in samples."""
    schema = schemas.TABLES[table]
    runs = columns.runs_array([runlength.encode(m) for m in found])
    rows: list[dict[str, Any]] = []
    for i in range(first, first + len(found)):
        thing = {
            "category_id": 7,
            "bbox_xywh": [0.0, 0, 1, 1],
            "area": 300.0 * (i + 1),
            "iscrowd": False,
            "counts": b"",
        }
        row: dict[str, Any] = {
            "sample_id": f"s{i}",
            "group_id": f"g{i // 3}",
            "image_uri": "",
            "etag": "",
            "status": "ok",
            "split": "val",
        }
        row |= {"height": 6, "width": 8, "model_digest": "", "attributes": json.dumps({"weather": WEATHER[i % 3]})}
        if table == "samples":
            row["instances"] = [thing | {"id": k} for k in range(i)]
        rows.append(row)
    arrays = [runs if f.name == "semantic" else pa.array([r.get(f.name) for r in rows], f.type) for f in schema]
    writer = tables.PartWriter(table)
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    storage.replace(f"{root}/{table}/part-{first:08d}-{'a' * 12}.parquet", writer.finish({}))
    tables.write_dataset_info(str(root), {"name": "toy", "tasks": ["semantic"], "classes": classes.to_json()})
    return root


def mixed(seed: int, share: float) -> list[Map]:
    """The truth with some other pixels."""
    generator = np.random.default_rng(seed + 50)
    return [np.where(generator.random(t.shape) < share, w, t) for t, w in zip(maps(0), maps(seed), strict=True)]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write(tmp_path / "samples", "samples", maps(0), CLASSES)


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    return write(tmp_path / "masks", "masks", mixed(1, 0.5), CLASSES)


def evaluate(masks: Path, samples: Path, out: Path, **more: Any) -> list[Figure]:
    result = api.evaluate(str(masks), str(samples), str(out), protocol="semantic", options=INLINE, **more)
    return list(result.figures)


def test_slices_are_the_figures_of_their_images(tmp_path: Path, samples: Path, masks: Path) -> None:
    found = evaluate(masks, samples, tmp_path / "out", analysis=Analysis(("weather", "objects", "height > 6")))
    miou = {f.slice: f.value for f in found if f.metric == "miou"}
    assert set(miou) == {
        "",
        *(f"weather={w}" for w in ("rain", "sun", "none")),
        *(f"objects={n}" for n in ("0", "1-5", "6-20")),
        "height > 6=false",
    }
    rainy = [i for i in range(IMAGES) if WEATHER[i % 3] == "rain"]
    truth, predicted = np.stack([maps(0)[i] for i in rainy]), np.stack([mixed(1, 0.5)[i] for i in rainy])
    ious = [((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum() for c in IDS]
    assert miou["weather=rain"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert miou["height > 6=false"] == miou[""]
    rows = api.query(str(tmp_path / "out"), "SELECT DISTINCT slice FROM summary").to_pylist()
    assert {r["slice"] for r in rows} == set(miou)


def test_a_slice_that_cannot_be_is_said_before_anything_is_counted(tmp_path: Path, samples: Path, masks: Path) -> None:
    with pytest.raises(ConfigError, match="--slice heigth > 6"):
        evaluate(masks, samples, tmp_path / "out", analysis=Analysis(("heigth > 6",)))
    assert not (tmp_path / "out").exists()


def test_objects_are_sliced_by_number_and_by_size(samples: Path) -> None:
    number, size = slices.slicings(str(samples), ("objects", "object-size"))
    assert [number.labels[f"s{i}"] for i in (0, 1, 5, 6, 11)] == ["0", "1-5", "1-5", "6-20", "6-20"]
    assert [size.labels[f"s{i}"] for i in (0, 1, 2, 3, 11)] == ["none", "small", "small", "medium", "medium"]


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("heigth >", "--slice heigth >: .*give an attribute, or SQL over objects"),
        ("wether", "says nothing of any sample"),
        ("sample_id || random()", None),
        ("(SELECT content FROM read_text('/etc/passwd'))", "--slice .*(disabled|Permission)"),
    ],
)
def test_a_wrong_slice_is_said(samples: Path, expression: str, words: str | None) -> None:
    if words is None:
        assert len(set(slices.slicings(str(samples), (expression,))[0].labels.values())) == IMAGES
        return
    with pytest.raises(ConfigError, match=words):
        slices.slicings(str(samples), (expression,))


def test_masks_of_other_ids_are_matched_by_name(tmp_path: Path, samples: Path, masks: Path) -> None:
    straight = evaluate(masks, samples, tmp_path / "straight")
    table = np.zeros(12, np.uint16)
    table[list(IDS)] = (2, 0, 1)
    theirs = ClassTable((ClassInfo(0, "Sky"), ClassInfo(1, "Tree"), ClassInfo(2, "ROAD")))
    other = write(tmp_path / "other", "masks", [table[m] for m in mixed(1, 0.5)], theirs)
    assert evaluate(other, samples, tmp_path / "out") == straight


@pytest.mark.long
def test_a_class_map_says_what_names_do_not(tmp_path: Path, samples: Path, masks: Path) -> None:
    straight = evaluate(masks, samples, tmp_path / "straight")
    theirs = ClassTable((ClassInfo(7, "street"), ClassInfo(8, "sky"), ClassInfo(11, "plant")))
    other = write(tmp_path / "other", "masks", mixed(1, 0.5), theirs)
    with pytest.raises(ConfigError, match="label 7 is 'street' in the masks, and 'road' in the samples"):
        evaluate(other, samples, tmp_path / "out")
    (tmp_path / "map.toml").write_text('[classes]\nstreet = "road"\nplant = "tree"\n')
    given = api.load_class_map(str(tmp_path / "map.toml"))
    assert evaluate(other, samples, tmp_path / "out", class_map=given) == straight
    nothing = evaluate(other, samples, tmp_path / "none", class_map=given | {"plant": ""})
    assert next(f.value for f in nothing if (f.metric, f.class_name) == ("iou", "tree")) == 0
    for wrong in ({"strasse": "road"}, {"street": "rode"}):
        with pytest.raises(ConfigError, match="the class map names"):
            evaluate(other, samples, tmp_path / "out", class_map=wrong)
    (tmp_path / "map.toml").write_text("street = 'road'\n")
    with pytest.raises(ConfigError, match="is no class map"):
        api.load_class_map(str(tmp_path / "map.toml"))


def test_instances_of_no_class_are_left_out() -> None:
    item = {"bbox_xywh": [0.0, 0, 1, 1], "area": 1.0, "iscrowd": False, "counts": b"x", "score": 0.5}
    cells = [[item | {"id": k, "category_id": k} for k in row] for row in ((1, 2, 3), (), (2,))] + [None]
    array = pa.array(cells, schemas.MASKS.field("instances").type)
    batch = pa.RecordBatch.from_arrays([array], names=["instances"])
    found = relabel.relabelled(batch.slice(0, 4), {1: 10, 2: relabel.VOID}).column(0).to_pylist()
    assert [None if r is None else [i["category_id"] for i in r] for r in found] == [[10, 3], [], [], None]


def test_what_is_there_so_far_can_be_scored(tmp_path: Path, samples: Path) -> None:
    part = write(tmp_path / "part", "masks", mixed(1, 0.5)[:4], CLASSES)
    with pytest.raises(IncompleteRunError, match=r"8 missing.*--partial"):
        evaluate(part, samples, tmp_path / "out")
    found = {f.metric: f.value for f in evaluate(part, samples, tmp_path / "out", missing="partial")}
    assert (found["images_scored"], found["images_missing"]) == (4, 8)
    write(tmp_path / "part", "masks", mixed(1, 0.5)[4:], CLASSES, first=4)
    found = {f.metric: f.value for f in evaluate(part, samples, tmp_path / "out")}
    assert found["images_scored"] == 12 and "images_missing" not in found


def joints(count: int) -> dict[str, Joint]:
    generator = np.random.default_rng(3)
    ids = np.array(IDS, np.uint16)
    return {
        f"u{i}": Joint(
            generator.choice(ids, 5), generator.choice(ids, 5), generator.integers(1, 99, 5).astype(np.uint64)
        )
        for i in range(count)
    }


def test_the_fast_way_resamples_as_the_plain_one() -> None:
    metric, units = registry.make("semantic", CLASSES), joints(9)
    times = next(bootstrap.draws(9, 20, 5))
    fast = bootstrap.of_pairs(metric, list(units.values()))(times)
    for row, drawn in enumerate(times):
        repeated = [u for u, n in zip(units.values(), drawn.tolist(), strict=True) for _ in range(n)]
        for f in metric.compute(metric.merge(repeated)):
            value = fast[f.metric, f.class_name][row]
            assert np.isnan(value) if f.value is None else value == f.value


@pytest.mark.parametrize("seed", range(6))
def test_the_fast_way_resamples_objects_as_the_plain_one(seed: int) -> None:
    case = coco_cases.random_case(seed)
    for number, entry in enumerate(case.results):
        entry["score"] = entry["score"] / 2 + number / 2 / len(case.results)  # no two are equal
    metric = CocoInstanceMetric(case.classes)
    states = [metric.update(*pair) for pair in coco_cases.instance_rows(case)]
    units = [metric.merge(states[:2]), *states[2:]]
    times = next(bootstrap.draws(len(units), 8, seed))
    fast = metric.resampler(units)(times)
    for row, drawn in enumerate(times.tolist()):
        repeated = [u for u, n in zip(units, drawn, strict=True) for _ in range(n)]
        plain = {(f.metric, f.class_name): f.value for f in metric.compute(metric.merge(repeated))}
        assert plain.keys() == fast.keys()
        for key, value in plain.items():
            found = fast[key][row]
            assert np.isnan(found) if value is None else found == pytest.approx(value, abs=1e-12), key


def test_intervals_depend_on_the_seed_alone() -> None:
    metric, units = registry.make("semantic", CLASSES), joints(9)
    first = bootstrap.values(metric, units, 120, 1)
    again = bootstrap.values(metric, dict(reversed(units.items())), 120, 1)
    assert all(np.array_equal(v, again[k], equal_nan=True) for k, v in first.items())
    assert not np.array_equal(first["miou", ""], bootstrap.values(metric, units, 120, 2)["miou", ""])
    assert len(first["miou", ""]) == 120


def test_an_interval_of_a_mean_is_the_known_one() -> None:
    """The share of right pixels over equal images is a mean, whose standard error is known."""
    metric, generator = registry.make("semantic", CLASSES), np.random.default_rng(0)
    right = generator.integers(0, 101, 400)
    ids = np.array([7, 7], np.uint16), np.array([7, 8], np.uint16)
    units = {f"{i}": Joint(*ids, np.array([n, 100 - n], np.uint64)) for i, n in enumerate(right)}
    span = bootstrap.interval(bootstrap.values(metric, units, 2000, 0)["global_accuracy", ""])
    assert span is not None
    error = right.std() / 100 / np.sqrt(len(right))
    assert span[0] == pytest.approx(right.mean() / 100 - 1.96 * error, abs=0.15 * error)
    assert span[1] == pytest.approx(right.mean() / 100 + 1.96 * error, abs=0.15 * error)


def test_summary_figures_have_intervals(tmp_path: Path, samples: Path, masks: Path) -> None:
    found = evaluate(masks, samples, tmp_path / "out", analysis=Analysis((), 200, 0, "image"))
    miou = next(f for f in found if f.metric == "miou")
    assert miou.ci_low is not None and miou.ci_high is not None and miou.value is not None
    assert miou.ci_low < miou.value < miou.ci_high
    wide = next(f for f in evaluate(masks, samples, tmp_path / "out", analysis=Analysis((), 200)) if f.metric == "miou")
    assert (wide.ci_low, wide.ci_high) != (miou.ci_low, miou.ci_high)  # four groups of three


def test_one_group_has_no_interval(tmp_path: Path) -> None:
    samples = write(tmp_path / "samples", "samples", maps(0)[:3], CLASSES)
    masks = write(tmp_path / "masks", "masks", mixed(1, 0.5)[:3], CLASSES)
    with pytest.raises(ConfigError, match=r"there is 1 .*--bootstrap-by image"):
        evaluate(masks, samples, tmp_path / "out", analysis=Analysis((), 10))


def test_two_evaluations_are_compared(tmp_path: Path, samples: Path, masks: Path) -> None:
    better = write(tmp_path / "better", "masks", mixed(1, 0.3), CLASSES)
    one, other = tmp_path / "one", tmp_path / "other"
    evaluate(masks, samples, one)
    evaluate(better, samples, other)
    found = {(d.metric, d.class_name): d for d in api.compare(str(one), str(other), resamples=300)}
    miou = found["miou", ""]
    assert miou.first is not None and miou.second is not None and miou.ci_low is not None and miou.ci_high is not None
    assert miou.difference == miou.second - miou.first > 0
    assert 0 < miou.ci_low < miou.difference < miou.ci_high
    assert miou.second_better == 1
    alone = {(d.metric, d.class_name): d for d in api.compare(str(one), str(other), resamples=300, paired=False)}
    loose = alone["miou", ""]
    assert loose.ci_low is not None and loose.ci_high is not None
    assert loose.ci_high - loose.ci_low > miou.ci_high - miou.ci_low
    same = {(d.metric, d.class_name): d for d in api.compare(str(one), str(one), resamples=50)}
    assert (same["miou", ""].difference, same["miou", ""].second_better) == (0, 0.5)


def test_what_cannot_be_compared_is_said(tmp_path: Path, samples: Path, masks: Path) -> None:
    evaluate(masks, samples, tmp_path / "one")
    few = write(tmp_path / "few", "masks", mixed(1, 0.5)[:4], CLASSES)
    evaluate(few, samples, tmp_path / "two", missing="partial")
    with pytest.raises(ConfigError, match=r"two lacks 2 images or groups of .*one, e.g. g2, g3 .*--unpaired"):
        api.compare(str(tmp_path / "one"), str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="is not the output of segbatch evaluate"):
        api.compare(str(tmp_path / "one"), str(masks))
    Run.open(str(tmp_path / "begun"), "state", "evaluate", {"protocol": "semantic"})
    with pytest.raises(ConfigError, match="not finished"):
        api.compare(str(tmp_path / "one"), str(tmp_path / "begun"))
