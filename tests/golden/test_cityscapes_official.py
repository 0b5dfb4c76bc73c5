"""Cityscapes' own scripts, version 2.3.0, on exported ground truth: all scores perfect, panoptic files equal.

The evaluators find the files themselves, as they do on the server.
"""

import copy
import glob
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees_cityscapes as trees
from generators import photo, save
from PIL import Image

from segbatch.datasets import tables
from segbatch.datasets.cityscapes import Cityscapes as CityscapesData
from segbatch.datasets.tree import Tree
from segbatch.formats.base import Labels
from segbatch.formats.cityscapes import Cityscapes, CityscapesInstances, CityscapesPanoptic

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
