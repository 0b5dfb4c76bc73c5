"""COCO's evaluators from files to figures: pycocotools and faster-coco-eval run live, panopticapi's rule anew."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import trees_coco as trees
from coco_cases import (
    PANOPTIC_CLASSES,
    PROPOSALS,
    TWELVE,
    Case,
    Scene,
    defined_mean,
    instance_rows,
    official,
    official_figures,
    random_case,
    random_scenes,
    reference_pq,
)
from generators import save
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from segbatch import api, cli, storage, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import ConfigError, IncompleteRunError
from segbatch.jobs import Limits
from segbatch.metrics import registry
from segbatch.metrics.base import MetricOptions
from segbatch.metrics.coco_instance import CocoBoundaryMetric, CocoInstanceMetric
from segbatch.metrics.coco_panoptic import CocoPanopticMetric
from segbatch.records import ClassInfo, ClassTable, Figure
from segbatch.report import write_report

SharedData = Callable[[str], Path]
Found = dict[tuple[str, str], float | None]

INLINE = RunOptions(engine=EngineConfig(kind="inline", threads=2), plan=PlanConfig(shard_rows=2))
SPLIT = "train2017"

PUBLISHED = {
    "segm": (0.320, 0.562, 0.299, 0.387, 0.310, 0.327, 0.268, 0.415, 0.417, 0.469, 0.377, 0.381),
    "bbox": (0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564),
}
"""val2014_fake_eval_res.txt."""


def by_name(figures: Iterable[Figure]) -> Found:
    return {(f.metric, f.class_name): f.value for f in figures if not f.metric.startswith("images_")}


def counts_of(figures: Iterable[Figure]) -> dict[str, float | None]:
    return {f.metric: f.value for f in figures if f.metric.startswith("images_")}


def case_of(truth: Path, results: list[dict[str, Any]]) -> Case:
    """An annotation file as a case, its polygons drawn by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(truth))
    annotations = []
    for annotation in ground.dataset["annotations"]:
        runs = ground.annToRLE(annotation)
        counts = runs["counts"].decode() if isinstance(runs["counts"], bytes) else runs["counts"]
        annotations.append({**annotation, "segmentation": {**runs, "counts": counts}})
    labels = sorted(ground.getCatIds())
    with_area = [{"area": 0.0, **r} for r in results]
    return Case(labels, ground.dataset["images"], annotations, with_area)


def official_stats(case: Case, kinds: Iterable[str], evaluator: Any = None) -> Found:
    return {
        (f"{kind}_{name}", ""): None if value == -1 else float(value)
        for kind in kinds
        for name, value in zip(TWELVE, official(case, kind, evaluator=evaluator).stats, strict=False)
    }


def figures_of(case: Case, classes: ClassTable) -> Found:
    metric = CocoInstanceMetric(classes)
    return by_name(metric.compute(metric.merge(metric.update(*pair) for pair in instance_rows(case))))


# -- random cases ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("start", range(1000, 1240, 40))
def test_random_cases_equal_pycocotools(start: int) -> None:
    for seed in range(start, start + 40):
        case = random_case(seed)
        assert figures_of(case, case.classes) == official_figures(case), seed


@pytest.mark.long
def test_only_the_best_thousand_of_an_image_are_proposals() -> None:
    case, rng = Case([1, 2]), np.random.default_rng(0)
    case.images.append({"id": 1, "height": 12, "width": 9, "file_name": "1.jpg"})
    for number in range(1, 1151):
        mask = np.zeros((12, 9), np.uint8)
        mask[rng.integers(12) :, rng.integers(9) :] = 1
        runs = coco_mask.encode(np.asfortranarray(mask))
        entry: dict[str, Any] = {"image_id": 1, "category_id": int(rng.integers(1, 3)), "area": float(mask.sum())}
        entry["segmentation"] = {"size": [12, 9], "counts": runs["counts"].decode()}
        entry["bbox"] = coco_mask.toBbox(runs).tolist()
        if number <= 90:
            case.annotations.append({**entry, "id": number, "iscrowd": 0})
        case.results.append({**entry, "score": float(rng.integers(0, 40)) / 40})
    found = figures_of(case, case.classes)
    for kind in ("segm", "bbox"):
        recall = official(case, kind, by_class=False).eval["recall"]
        for name, (size, most) in PROPOSALS.items():
            assert found[f"{kind}_proposal_ar_{name}", ""] == defined_mean(recall[:, 0, size, most])


@pytest.mark.long
def test_random_scenes_equal_the_rule() -> None:
    metric = CocoPanopticMetric(PANOPTIC_CLASSES)
    for seed in range(1000, 1400):
        scenes = random_scenes(seed)
        states = [metric.update(t.row("samples", i), p.row("masks", i)) for i, t, p in scenes]
        assert by_name(metric.compute(metric.merge(states))) == reference_pq(scenes, PANOPTIC_CLASSES), seed


# -- drawn trees, through the verbs ----------------------------------------------------------------------------------


def results_for(truth: Path) -> list[dict[str, Any]]:
    """Results near the objects of a file: cut off, of other classes, doubled, with equal scores."""
    rng = np.random.default_rng(3)
    results = []
    for a in json.loads(truth.read_text())["annotations"]:
        for times in range(3):
            mask = trees.drawn(a["segmentation"])
            mask = mask & (rng.random(mask.shape) < (1, 0.9, 0.7)[times]) if times else mask
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            entry = {"image_id": a["image_id"], "category_id": (a["category_id"], 1)[times // 2]}
            entry["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
            results.append({**entry, "bbox": coco_mask.toBbox(runs).tolist(), "score": (0.9, 0.5, 0.5)[times]})
    return results


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Case]:
    """A folder with ``samples`` and ``masks`` of a drawn tree, and what they hold; nobody changes it."""
    root = tmp_path_factory.mktemp("instances")
    trees.coco_instances(root / "tree")
    truth = root / "tree" / "annotations" / f"instances_{SPLIT}.json"
    results = results_for(truth)
    trees.write_json(root / "detections_results.json", results)
    api.ingest("coco-instances", str(root / "tree"), str(root / "samples"), split=[SPLIT], options=INLINE)
    api.import_predictions(
        "coco", str(root / "detections_results.json"), str(root / "samples"), str(root / "masks"), options=INLINE
    )
    return root, case_of(truth, results)


def test_from_files_to_figures(
    instances: tuple[Path, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, case = instances
    out = str(tmp_path / "metrics")
    result = api.evaluate(str(root / "masks"), str(root / "samples"), out, options=INLINE)
    names = {f"class{c['id']}": c["name"] for c in trees.THINGS}
    wanted = {(m, names.get(c, "")): v for (m, c), v in official_figures(case).items()}
    assert by_name(result.figures) == wanted
    assert counts_of(result.figures)["images_scored"] == 3
    kept = api.query(out, "SELECT metric, class, value FROM summary WHERE metric NOT LIKE 'images_%'").to_pylist()
    assert {(r["metric"], r["class"]): r["value"] for r in kept} == wanted
    rows = api.query(
        out, "SELECT sample_id, score, unnest(classes, recursive := true) FROM images ORDER BY 1"
    ).to_pylist()
    people = [(r["sample_id"], r["tp"], r["fp"], r["fn"]) for r in rows if r["class"] == "person"]
    assert [(name, tp + fn) for name, tp, _, fn in people] == [("25", 1), ("9", 1)]
    cli.main(["evaluate", str(root / "masks"), str(root / "samples"), out, "--engine", "inline"])
    printed = capsys.readouterr().out
    assert "segm_ap50" in printed
    assert "toothbrush" in printed
    assert "18 more figures by class are in the summary table" in printed


def test_every_object_and_detection_has_a_match(instances: tuple[Path, Case], tmp_path: Path) -> None:
    root, case = instances
    out = str(tmp_path / "metrics")
    api.evaluate(str(root / "masks"), str(root / "samples"), out, options=INLINE)
    rows = api.query(out, "SELECT sample_id, unnest(matches, recursive := true) FROM images").to_pylist()
    assert len([r for r in rows if r["predicted_id"] is not None]) == len(case.results)
    for image in case.images:
        mine = [r for r in rows if r["sample_id"] == str(image["id"])]
        found = [r["truth_id"] for r in mine if r["outcome"] in ("tp", "fn")]
        crowds = {r["truth_id"] for r in mine if r["outcome"] == "ignored"} - {None}
        objects = [a for a in case.annotations if a["image_id"] == image["id"]]
        assert sorted(found) == sorted(a["id"] for a in objects if not a["iscrowd"])
        assert crowds == {a["id"] for a in objects if a["iscrowd"]}
    counted = "SELECT sum(c.tp), sum(c.fp), sum(c.fn) FROM (SELECT unnest(classes) c FROM images)"
    told = "SELECT count(*) FILTER (m.outcome = '{}') FROM (SELECT unnest(matches) m FROM images)"
    (counts,) = (tuple(r.values()) for r in api.query(out, counted).to_pylist())
    matches = (api.query(out, told.format(o)).to_pylist()[0] for o in ("tp", "fp", "fn"))
    assert tuple(next(iter(m.values())) for m in matches) == counts


def test_options_boundaries_and_errors_from_files(instances: tuple[Path, Case], tmp_path: Path) -> None:
    root, case = instances
    masks, samples = str(root / "masks"), str(root / "samples")
    chosen = MetricOptions(ious=(0.25, 0.5), max_detections=(2,))
    found = by_name(api.evaluate(masks, samples, str(tmp_path / "loose"), metric=chosen, options=INLINE).figures)
    assert {"segm_ap", "segm_ap50", "segm_ar_2"} <= {name for name, _ in found}
    assert not {"segm_ap75", "segm_ar_100"} & {name for name, _ in found}
    names = {"coco-boundary": "boundary_proposal_ar_10", "tide": "segm_ap50"}
    for protocol, name in names.items():
        out = str(tmp_path / protocol)
        found = by_name(api.evaluate(masks, samples, out, protocol=protocol, options=INLINE).figures)
        again = registry.make(protocol, case.classes)
        total = again.merge([again.update(*pair) for pair in instance_rows(case)])
        assert found[name, ""] == by_name(again.compute(total))[name, ""]
        assert 0 < (found[name, ""] or 0) <= 1
    with pytest.raises(ConfigError, match="tide does not heed ious"):
        api.evaluate(masks, samples, str(tmp_path / "no"), protocol="tide", metric=chosen, options=INLINE)


def test_shards_and_their_number_do_not_matter(instances: tuple[Path, Case], tmp_path: Path) -> None:
    root, _ = instances
    found = []
    for rows in (1, 3):
        options = RunOptions(engine=INLINE.engine, plan=PlanConfig(shard_rows=rows))
        out = str(tmp_path / f"metrics{rows}")
        found.append(api.evaluate(str(root / "masks"), str(root / "samples"), out, options=options).figures)
    assert found[0] == found[1]


def test_the_report_shows_figures_and_objects(instances: tuple[Path, Case], tmp_path: Path) -> None:
    root, _ = instances
    out = str(tmp_path / "metrics")
    result = api.evaluate(str(root / "masks"), str(root / "samples"), out, options=INLINE)
    page = Path(write_report(out, str(tmp_path / "report.html"))).read_text()
    value = by_name(result.figures)["segm_ap", ""]
    assert value is not None
    assert f"{100 * value:.2f}" in page
    for words in ("mask AP", "Box AP50", "segm_proposal_ar_100", "ground-truth objects", "the mean mask AP"):
        assert words in page
    assert page.count("<figure>") == 2 * 4  # the third image shows no object, so it has no score
    assert "Confusion" not in page


def without_rows(masks: Path, out: Path, gone: set[str], failed: set[str]) -> str:
    """A masks table without some rows, and with others that failed."""
    shutil.copytree(masks / ".segbatch", out / ".segbatch")
    for part in tables.parts(tables.find(str(masks), "masks")):
        writer = tables.PartWriter("masks")
        for batch in tables.batches(part.uri, "masks"):
            rows = [r for r in batch.to_pylist() if r["sample_id"] not in gone]
            for row in rows:
                if row["sample_id"] in failed:
                    row |= {"status": "out-of-memory", "instances": None}
            writer.write(pa.RecordBatch.from_pylist(rows, schema=batch.schema))
        storage.replace(str(out / "masks" / storage.name_of(part.uri)), writer.finish({}))
    return str(out)


def test_images_without_a_row_count_as_empty_and_failed_ones_do_not(
    instances: tuple[Path, Case], tmp_path: Path
) -> None:
    root, case = instances
    samples = str(root / "samples")
    gone = without_rows(root / "masks", tmp_path / "gone", {"25"}, set())
    result = api.evaluate(gone, samples, str(tmp_path / "metrics"), options=INLINE)
    fewer = Case(case.labels, case.images, case.annotations, [r for r in case.results if r["image_id"] != 25])
    overall = {(f.metric, ""): f.value for f in result.figures if not f.class_name}
    wanted = {key: value for key, value in official_figures(fewer).items() if not key[1]}
    assert {key: overall[key] for key in wanted} == wanted
    counts = counts_of(result.figures)
    assert (counts["images_scored"], counts["images_counted_empty"], counts["images_skipped"]) == (3, 1, 0)
    shown = api.query(str(tmp_path / "metrics"), "SELECT status, score FROM images WHERE sample_id = '25'").to_pylist()
    assert shown == [{"status": "counted-empty", "score": 0.0}]

    skipped = api.evaluate(gone, samples, str(tmp_path / "metrics"), missing="skip", options=INLINE)
    assert counts_of(skipped.figures) == {
        "images_scored": 2,
        "images_skipped": 1,
        "images_missing": 1,
        "images_without_label": 0,
        "images_unknown": 0,
    }
    ids = api.query(str(tmp_path / "metrics"), "SELECT sample_id FROM images ORDER BY 1").to_pylist()
    assert [r["sample_id"] for r in ids] == ["581929", "9"]

    failed = without_rows(root / "masks", tmp_path / "failed", {"581929"}, {"25"})
    with pytest.raises(IncompleteRunError, match=r"1 of 3 samples.*1 prediction-failed.*e\.g\. 25 .*retry"):
        api.evaluate(failed, samples, str(tmp_path / "metrics2"), options=INLINE)


def scene_of(ids: np.ndarray, segments: list[dict[str, Any]]) -> Scene:
    return Scene(ids.astype(np.int64), segments)


def classes_of(categories: Iterable[Any]) -> ClassTable:
    return ClassTable(tuple(ClassInfo(c["id"], c["name"], isthing=bool(c["isthing"])) for c in categories))


def panoptic_results(root: Path) -> list[tuple[int, Scene, Scene]]:
    """Write results near a drawn tree's maps, as COCO's server takes them; gives both sides."""
    truth = json.loads((root / "tree" / "annotations" / f"panoptic_{SPLIT}.json").read_text())
    rng, scenes, annotations = np.random.default_rng(5), [], []
    name = "panoptic_train2017_x_results"
    for annotation in truth["annotations"]:
        ids, _ = trees.segment_map(annotation["image_id"])
        changed = np.roll(ids, int(rng.integers(-3, 4)), axis=1)
        changed[rng.random(ids.shape) < 0.1] = 0
        meaning = {s["id"]: (s["category_id"], 0) for s in annotation["segments_info"]}
        meaning = {n: m for n, m in meaning.items() if (changed == n).any()}
        first = next(iter(meaning))
        meaning[first] = (191, 0) if annotation["image_id"] == 9 else meaning[first]
        segments = trees.segments_info(changed, meaning)
        file = trees.file_name(annotation["image_id"], ".png")
        save(root / "results" / name / file, trees.colors(changed))
        annotations.append({"image_id": annotation["image_id"], "file_name": file, "segments_info": segments})
        truth_scene = scene_of(ids, annotation["segments_info"])
        scenes.append((annotation["image_id"], truth_scene, scene_of(changed, segments)))
    trees.write_json(root / "results" / f"{name}.json", {"annotations": annotations})
    return scenes


def test_panoptic_from_files_to_figures(tmp_path: Path) -> None:
    trees.coco_panoptic(tmp_path / "tree")
    scenes = panoptic_results(tmp_path)
    samples, masks, out = (str(tmp_path / name) for name in ("samples", "masks", "metrics"))
    api.ingest("coco-panoptic", str(tmp_path / "tree"), samples, split=[SPLIT], options=INLINE)
    api.import_predictions("coco-panoptic", str(tmp_path / "results"), samples, masks, options=INLINE)
    found = by_name(api.evaluate(masks, samples, out, options=INLINE).figures)
    classes = classes_of(trees.PANOPTIC)
    assert found == reference_pq(scenes, classes)
    assert 0 < (found["pq", ""] or 0) < 1
    page = Path(write_report(out, str(tmp_path / "report.html"))).read_text()
    for words in ("panoptic quality", "PQ of things", "ground-truth segments"):
        assert words in page
    assert page.count("<figure>") == 3 * 4
    gone = without_rows(tmp_path / "masks", tmp_path / "gone", {"25"}, set())
    with pytest.raises(IncompleteRunError, match=r"1 of 3 samples.*1 missing"):
        api.evaluate(gone, samples, str(tmp_path / "metrics2"), options=INLINE)


# -- real data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def val2014(shared_data: SharedData) -> Path:
    return shared_data("data/coco_val2014_100")


def coco_results(folder: Path, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    return found


@pytest.mark.long
def test_published_figures_of_masks(val2014: Path, tmp_path: Path) -> None:
    truth = val2014 / "instances_val2014_100.json"
    (tmp_path / "tree" / "annotations").mkdir(parents=True)
    shutil.copy(truth, tmp_path / "tree" / "annotations" / "instances_val2014.json")
    samples, masks = str(tmp_path / "samples"), str(tmp_path / "masks")
    results = str(val2014 / "instances_val2014_fakesegm100_results.json")
    api.ingest("coco-instances", str(tmp_path / "tree"), samples, options=INLINE)
    api.import_predictions("coco", results, samples, masks, limits=Limits(), options=INLINE)
    found = by_name(api.evaluate(masks, samples, str(tmp_path / "metrics"), options=INLINE).figures)
    twelve = tuple(found[f"segm_{name}", ""] for name in TWELVE)
    assert tuple(round(v, 3) for v in twelve if v is not None) == PUBLISHED["segm"]
    wanted = official_stats(case_of(truth, coco_results(val2014, "segm")), ["segm"])
    assert {key: found[key] for key in wanted} == wanted


@pytest.fixture
def boxes(val2014: Path) -> Case:
    """The published results of boxes; their masks are the boxes' pixels."""
    case = case_of(val2014 / "instances_val2014_100.json", coco_results(val2014, "bbox"))
    sizes = {i["id"]: (i["height"], i["width"]) for i in case.images}
    for result in case.results:
        x, y, width, height = (round(v) for v in result["bbox"])
        mask = np.zeros(sizes[result["image_id"]], np.uint8)
        mask[max(y, 0) : y + height, max(x, 0) : x + width] = 1
        runs = coco_mask.encode(np.asfortranarray(mask))
        result["segmentation"] = {"size": list(mask.shape), "counts": runs["counts"].decode()}
    return case


@pytest.mark.long
def test_published_figures_of_boxes(boxes: Case) -> None:
    found = figures_of(boxes, boxes.classes)
    twelve = tuple(found[f"bbox_{name}", ""] for name in TWELVE)
    assert tuple(round(v, 3) for v in twelve if v is not None) == PUBLISHED["bbox"]
    wanted = official_figures(boxes)
    assert {key: found[key] for key in wanted} == wanted


def test_faster_coco_eval_says_the_same(boxes: Case) -> None:
    faster = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    found = figures_of(boxes, boxes.classes)
    wanted = official_stats(boxes, ["segm", "bbox"], faster.COCOeval_faster)
    assert len(wanted) == 24
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-12), key


@pytest.mark.long
def test_boundaries_of_real_masks_are_those_of_faster_coco_eval(val2014: Path) -> None:
    faster = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    case = case_of(val2014 / "instances_val2014_100.json", coco_results(val2014, "segm"))
    for result in case.results:
        result.setdefault("bbox", [0.0] * 4)
    metric = CocoBoundaryMetric(case.classes)
    found = by_name(metric.compute(metric.merge(metric.update(*pair) for pair in instance_rows(case))))
    with contextlib.redirect_stdout(io.StringIO()):
        ground = faster.COCO(str(val2014 / "instances_val2014_100.json"))
        run = faster.COCOeval_faster(ground, ground.loadRes(coco_results(val2014, "segm")), "boundary")
        run.evaluate()
        run.accumulate()
        run.summarize()
    for name, value in zip(TWELVE, run.stats, strict=False):
        assert found[f"boundary_{name}", ""] == pytest.approx(value, abs=1e-12), name
    assert 0 < (found["boundary_ap", ""] or 0) < PUBLISHED["segm"][0]


@pytest.fixture
def panoptic_example(shared_data: SharedData) -> tuple[int, Scene, ClassTable]:
    """A real image of val2017 with its segments."""
    folder = shared_data("data/coco_panoptic")
    categories = json.loads((folder / "panoptic_coco_categories.json").read_text())
    (path,) = sorted((folder / "panoptic_examples").glob("*.png"))
    entries = json.loads((folder / "panoptic_examples.json").read_text())["annotations"]
    (entry,) = (e for e in entries if e["file_name"] == path.name)
    ids = np.array(Image.open(path).convert("RGB")).astype(np.int64) @ [1, 256, 65536]
    return entry["image_id"], scene_of(ids, entry["segments_info"]), classes_of(categories)


def test_a_real_panoptic_map_against_itself_and_against_a_shifted_one(
    panoptic_example: tuple[int, Scene, ClassTable],
) -> None:
    number, truth, classes = panoptic_example
    metric = CocoPanopticMetric(classes)
    same = Scene(truth.ids, [{**s, "iscrowd": 0} for s in truth.segments])
    assert any(s["iscrowd"] for s in truth.segments)
    found = by_name(metric.compute(metric.update(truth.row("samples", number), same.row("masks", number))))
    assert found == reference_pq([(number, truth, same)], classes)
    assert [found[name, ""] for name in ("pq", "sq", "rq")] == [1.0, 1.0, 1.0]
    shifted = np.roll(truth.ids, 9, axis=0)
    moved = Scene(shifted, [s for s in same.segments if (shifted == s["id"]).any()])
    found = by_name(metric.compute(metric.update(truth.row("samples", number), moved.row("masks", number))))
    assert found == reference_pq([(number, truth, moved)], classes)
    assert 0.3 < (found["pq", ""] or 0) < 1


def test_a_real_street_against_itself(shared_data: SharedData, tmp_path: Path) -> None:
    samples, masks = str(tmp_path / "samples"), str(tmp_path / "masks")
    api.ingest("cityscapes", str(shared_data("data/cityscapes_mini")), samples, options=INLINE)
    api.export("coco-panoptic", samples, samples, str(tmp_path / "files"), options=INLINE)
    api.import_predictions("coco-panoptic", str(tmp_path / "files" / "annotations"), samples, masks, options=INLINE)
    out = str(tmp_path / "metrics")
    figures = api.evaluate(masks, samples, out, protocol="coco-panoptic", options=INLINE).figures
    assert [f.value for f in figures if f.metric == "pq" and not f.class_name] == [1.0]
