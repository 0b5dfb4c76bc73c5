"""Cityscapes' own scripts, version 2.3.0, on exported files.

Of ground truth all scores are perfect, and panoptic files are equal; of wrong predictions segbatch's figures are
theirs, all bits. The evaluators find the files themselves, as they do on the server.
"""

import copy
import glob
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees_cityscapes as trees
from cityscapes_cases import row_of, value_of
from coco_cases import row_of as panoptic_row
from generators import photo, save
from PIL import Image

from segbatch.codecs import rle
from segbatch.datasets import tables
from segbatch.datasets.cityscapes import Cityscapes as CityscapesData
from segbatch.datasets.tree import Tree
from segbatch.formats.base import Labels
from segbatch.formats.cityscapes import Cityscapes, CityscapesInstances, CityscapesPanoptic
from segbatch.metrics import registry
from segbatch.metrics.base import Row
from segbatch.records import Instance

pytest.importorskip("cityscapesscripts", reason="cityscapesScripts is not installed")

SharedData = Callable[[str], Path]


@pytest.fixture(params=["drawn", "real"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, shared_data: SharedData, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A drawn tree and the real frame."""
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # gone from NumPy 2.4; the evaluators still call it
    if request.param == "real":
        return shared_data("data/cityscapes_mini")
    return trees.cityscapes(tmp_path / "tree")


def val(root: Path) -> list[Labels]:
    return trees.truth(CityscapesData(), root, "val")


def arguments(module: Any, root: Path, folder: Path, tmp_path: Path) -> tuple[Any, list[str]]:
    """The evaluator's arguments for these folders, and the ground truth files that it evaluates."""
    args = copy.copy(module.args)
    args.quiet, args.JSONOutput = True, False
    args.cityscapesPath, args.predictionPath, args.predictionWalk = str(root), str(folder), None
    args.gtInstancesFile = str(tmp_path / "gtInstances.json")
    pattern = Path(args.groundTruthSearch).name
    return args, sorted(glob.glob(str(root / "gtFine" / "val" / "*" / pattern)))


def test_pixel_level_scores_are_one(root: Path, tmp_path: Path) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

    rows = val(root)
    folder = trees.write(Cityscapes(), rows, tmp_path / "results")
    args, truth = arguments(official, root, folder, tmp_path)
    results = official.evaluateImgLists([official.getPrediction(args, t) for t in truth], truth, args)
    assert len(truth) == len(rows)
    for name in (
        "averageScoreClasses",
        "averageScoreInstClasses",
        "averageScoreCategories",
        "averageScoreInstCategories",
    ):
        assert results[name] == 1.0, name
    assert sum(map(sum, results["confMatrix"])) == sum(r.height * r.width for r in rows)


def test_instance_level_precision_is_one_for_every_class_that_counts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    monkeypatch.setattr(official, "writeDict2JSON", lambda content, file: None)  # its side files; fails with NumPy 2

    rows = val(root)
    folder = trees.write(CityscapesInstances(), rows, tmp_path / "results")
    args, truth = arguments(official, root, folder, tmp_path)
    results = official.evaluateImgLists([official.getPrediction(t, args) for t in truth], truth, args)
    there = {
        i.category_id for r in rows for i in r.instances or () if i.area >= args.minRegionSizes[0] and not i.iscrowd
    }
    found = {n: a["ap"] for n, a in results["averages"]["classes"].items() if not math.isnan(a["ap"])}
    scored = tables.load("cityscapes").scored
    assert found == {c.name: 1.0 for c in scored if c.label_id in there} and found
    assert results["averages"]["allAp"] == 1.0


def test_panoptic_files_are_the_official_ones_and_score_100(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalPanopticSemanticLabeling")
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    theirs = tmp_path / "official"
    theirs.mkdir()
    convert2panoptic(str(root / "gtFine"), str(theirs), setNames=["val"])
    mine = trees.write(CityscapesPanoptic(), val(root), tmp_path / "results")
    documents = [json.loads((f / "cityscapes_panoptic_val.json").read_text()) for f in (theirs, mine)]
    assert documents[0] == documents[1]
    folders = [f / "cityscapes_panoptic_val" for f in (theirs, mine)]
    for annotation in documents[0]["annotations"]:
        a, b = (np.array(Image.open(f / annotation["file_name"])) for f in folders)
        assert np.array_equal(a, b)
    pairs = list(zip(documents[0]["annotations"], documents[1]["annotations"], strict=True))
    categories = {c["id"]: c for c in documents[0]["categories"]}
    counts = official.pq_compute_single_core(0, copy.deepcopy(pairs), *map(str, folders), categories)
    results = official.average_pq(counts, categories)
    capsys.readouterr()
    assert [results["All"][name] for name in ("pq", "sq", "rq")] == [1.0, 1.0, 1.0]
    there = {s["category_id"] for d in documents[0]["annotations"] for s in d["segments_info"] if not s["iscrowd"]}
    assert results["All"]["n"] == len(there)


def test_label_files_are_those_that_the_official_script_draws(tmp_path: Path) -> None:
    """Polygons drawn by json2labelImg and json2instanceImg, a group and a licence plate among them."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    def box(label: str, left: int, top: int, side: int) -> dict[str, Any]:
        corners = [[left, top], [left + side, top], [left + side, top + side], [left, top + side]]
        return {"label": label, "polygon": corners, "deleted": 0}

    shapes = [box("road", 0, 0, 60), box("car", 4, 4, 12), box("car", 18, 4, 12), box("license plate", 20, 6, 4)]
    shapes += [
        box("cargroup", 32, 4, 12),
        box("person", 4, 22, 12),
        box("trailer", 20, 22, 12),
        box("static", 36, 22, 9),
    ]
    image_id = "aachen_000000_000019"
    polygons = Annotation()
    polygons.fromJsonText(json.dumps({"imgHeight": 40, "imgWidth": 48, "objects": shapes}))
    labels = f"gtFine/train/aachen/{image_id}_gtFine"
    save(tmp_path / "leftImg8bit" / "train" / "aachen" / f"{image_id}_leftImg8bit.png", photo(0, trees.SIZE))
    save(tmp_path / f"{labels}_labelIds.png", np.array(createLabelImage(polygons, "ids")))
    save(tmp_path / f"{labels}_instanceIds.png", np.array(createInstanceImage(polygons, "ids")).astype(np.uint16))
    dataset = CityscapesData()
    (sample,) = (s for i in dataset.items(Tree.of(str(tmp_path)), ()) for s in dataset.read(i))
    assert not sample.issues and sample.semantic is not None
    assert sorted(set(sample.semantic.ravel().tolist())) == [4, 7, 24, 26, 30]
    found = [(i.id, i.category_id, i.iscrowd) for i in sample.instances or ()]
    assert found == [(26, 26, True), (24000, 24, False), (26000, 26, False), (26001, 26, False), (30000, 30, False)]
    assert [s.id for s in sample.segments or ()] == [7, 26, 24000, 26000, 26001]


# -- wrong predictions -----------------------------------------------------------------------------------------------


def wrong(row: Labels, seed: int) -> Labels:
    """A prediction: everything some pixels to the right, with noise; two detections of each object."""
    assert row.semantic is not None and row.panoptic is not None
    rng = np.random.default_rng(seed)
    semantic = np.roll(row.semantic, 2, axis=1)
    semantic[rng.random(semantic.shape) < 0.1] = 11
    panoptic = np.roll(row.panoptic, 2, axis=1)
    found: list[Instance] = []
    for instance in (i for i in row.instances or () if not i.iscrowd):
        mask = rle.decode(instance.counts, row.height, row.width)
        for shift in (1, 3):
            moved = np.roll(mask, shift, axis=1)
            number, score = len(found) + 1, float(rng.choice([0.3, 0.6, rng.random()]))
            found.append(replace(instance, id=number, counts=rle.encode(moved), score=score))
    segments = tuple(replace(s, iscrowd=False) for s in row.segments or ())
    return replace(row, semantic=semantic, instances=tuple(found), panoptic=panoptic, segments=segments, is_truth=False)


def both(root: Path) -> tuple[list[Labels], list[Labels]]:
    rows = val(root)
    return rows, [wrong(row, seed) for seed, row in enumerate(rows)]


def figures(protocol: str, pairs: list[tuple[Row, Row]]) -> dict[tuple[str, str], float | None]:
    metric = registry.make(protocol, tables.load("cityscapes"))
    total = metric.merge([metric.update(*pair) for pair in pairs])
    return {(f.metric, f.class_name): f.value for f in metric.compute(total)}


def as_rows(truth: list[Labels], predicted: list[Labels]) -> list[tuple[Row, Row]]:
    sides = [
        [row_of(table, r.sample_id, r.semantic, [asdict(i) for i in r.instances or ()]) for r in rows]
        for table, rows in (("samples", truth), ("masks", predicted))
    ]
    return list(zip(*sides, strict=True))


def test_wrong_predictions_have_the_official_pixel_level_figures(root: Path, tmp_path: Path) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

    truth, predicted = both(root)
    folder = trees.write(Cityscapes(), predicted, tmp_path / "results")
    args, files = arguments(official, root, folder, tmp_path)
    results = official.evaluateImgLists([official.getPrediction(args, f) for f in files], files, args)
    found = figures("cityscapes", as_rows(truth, predicted))
    assert found["miou", ""] == results["averageScoreClasses"] < 1
    assert found["miiou", ""] == results["averageScoreInstClasses"] < 1
    assert found["category_miou", ""] == results["averageScoreCategories"] < 1
    assert found["category_miiou", ""] == results["averageScoreInstCategories"] < 1
    for name, theirs in (("iou", "classScores"), ("iiou", "classInstScores")):
        ours = {c: v for (metric, c), v in found.items() if metric == name}
        assert ours == {c: value_of(results[theirs][c]) for c in ours}


def test_wrong_predictions_have_the_official_instance_level_figures(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    monkeypatch.setattr(official, "writeDict2JSON", lambda content, file: None)  # its side files; fails with NumPy 2

    truth, predicted = both(root)
    folder = trees.write(CityscapesInstances(), predicted, tmp_path / "results")
    args, files = arguments(official, root, folder, tmp_path)
    averages = official.evaluateImgLists([official.getPrediction(f, args) for f in files], files, args)["averages"]
    found = figures("cityscapes-instance", as_rows(truth, predicted))
    assert 0 < averages["allAp"] < 1
    assert (found["ap", ""], found["ap50", ""]) == (averages["allAp"], averages["allAp50%"])
    for name, theirs in (("ap", "ap"), ("ap50", "ap50%")):
        ours = {c: v for (metric, c), v in found.items() if metric == name and c}
        assert ours == {c: value_of(a[theirs]) for c, a in averages["classes"].items()}


def test_wrong_predictions_have_the_official_panoptic_figures(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = importlib.import_module("cityscapesscripts.evaluation.evalPanopticSemanticLabeling")

    truth, predicted = both(root)
    folders = [trees.write(CityscapesPanoptic(), rows, tmp_path / n) for n, rows in (("t", truth), ("p", predicted))]
    documents = [json.loads((f / "cityscapes_panoptic_val.json").read_text()) for f in folders]
    pairs = list(zip(*(d["annotations"] for d in documents), strict=True))
    categories = {c["id"]: c for c in documents[0]["categories"]}
    maps = [str(f / "cityscapes_panoptic_val") for f in folders]
    results = official.average_pq(official.pq_compute_single_core(0, pairs, *maps, categories), categories)
    capsys.readouterr()
    rows = [
        tuple(
            panoptic_row(
                table,
                {
                    "sample_id": r.sample_id,
                    "height": r.height,
                    "width": r.width,
                    "panoptic": r.panoptic,
                    "segments": [asdict(s) for s in r.segments or ()],
                },
            )
            for table, r in (("samples", one), ("masks", other))
        )
        for one, other in zip(truth, predicted, strict=True)
    ]
    found = figures("cityscapes-panoptic", [(a, b) for a, b in rows])
    assert 0 < results["All"]["pq"] < 1
    for theirs, suffix in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        assert [found[f"{n}{suffix}", ""] for n in ("pq", "sq", "rq")] == [
            results[theirs][n] for n in ("pq", "sq", "rq")
        ]
    names = {c.label_id: c.name for c in tables.load("cityscapes").scored}
    for label, values in results["per_class"].items():
        assert [found[n, names[label]] or 0.0 for n in ("pq", "sq", "rq")] == [values[n] for n in ("pq", "sq", "rq")]
