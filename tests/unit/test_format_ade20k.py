"""The challenge's PNG files: round trips, the official evaluation of ground truth against itself, what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import generators
import numpy as np
import pytest
import trees_ade20k as trees
from numpy.typing import NDArray
from PIL import Image

from segbatch.datasets import registry, tables
from segbatch.datasets.ade20k import Ade20k as Dataset
from segbatch.datasets.camvid import CLASSES as CAMVID
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.ade20k import Ade20k
from segbatch.formats.base import Labels, SampleRef
from segbatch.records import ClassTable, PlanItem
from segbatch.stages.exporting import Folder

SharedData = Callable[[str], Path]
CLASSES = tables.load("ade20k")


def truth(root: Path) -> list[Labels]:
    """The ground truth of every image that has labels."""
    found, tree = registry.find("ade20k", str(root))
    samples = [(item, next(found.read(item))) for item in found.items(tree, ())]
    return [
        Labels(
            s.sample_id,
            s.image_uri,
            s.height,
            s.width,
            split=i.split,
            semantic=s.semantic.astype(np.uint16),
            is_truth=True,
        )
        for i, s in samples
        if s.semantic is not None
    ]


def refs(rows: list[Labels]) -> list[SampleRef]:
    return [SampleRef(r.sample_id, r.image_uri, "tag", r.height, r.width, split=r.split) for r in rows]


def write(rows: list[Labels], folder: Path, classes: ClassTable = CLASSES) -> None:
    Ade20k().write(iter(rows), classes, Folder(str(folder), 2))


def listed(folder: Path, rows: list[Labels]) -> list[PlanItem]:
    return list(Ade20k().items(Tree.of(str(folder)), iter(refs(rows)), CLASSES))


def read(item: PlanItem) -> NDArray[np.uint16]:
    (found,) = Ade20k().read(item)
    assert found.semantic is not None
    return found.semantic


@pytest.fixture
def rows(tmp_path: Path) -> list[Labels]:
    return truth(trees.ade20k(tmp_path / "tree"))


def test_files_are_named_like_the_images_and_8_bit_grey(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"{r.sample_id}.png" for r in rows)
    for row in rows:
        with Image.open(tmp_path / "out" / f"{row.sample_id}.png") as image:
            assert image.mode == "L" and np.array_equal(np.array(image), row.semantic)


def test_what_is_written_is_read_again(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    found = listed(tmp_path / "out", rows)
    assert [i.sample_id for i in found] == [r.sample_id for r in rows]
    for item, row in zip(found, rows, strict=True):
        assert np.array_equal(read(item), row.semantic) and read(item).dtype == np.uint16


def evaluate(pairs: Iterator[tuple[NDArray[np.generic], NDArray[np.generic]]]) -> tuple[NDArray[np.float64], float]:
    """demoEvaluation.m with intersectionAndUnion.m and pixelAccuracy.m: IoU by class, and pixel accuracy."""
    intersection, union, correct, labeled = np.zeros(150), np.zeros(150), 0, 0
    for prediction, label in pairs:
        shown = np.where(label > 0, prediction, 0)
        both = np.where(shown == label, shown, 0)
        inside, mine, theirs = (np.bincount(m.ravel(), minlength=151)[1:] for m in (both, shown, label))
        intersection, union = intersection + inside, union + mine + theirs - inside
        correct, labeled = correct + int(((prediction == label) & (label > 0)).sum()), labeled + int((label > 0).sum())
    return intersection / (np.spacing(1) + union), correct / labeled


def test_ground_truth_is_perfect_in_the_official_evaluation(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    data = tmp_path / "tree" / "ADEChallengeData2016" / "annotations"
    labels = {r.sample_id: np.array(Image.open(data / r.split / f"{r.sample_id}.png")) for r in rows}
    pairs = ((np.array(Image.open(tmp_path / "out" / f"{k}.png")), label) for k, label in labels.items())
    iou, accuracy = evaluate(pairs)
    present = np.unique(np.concatenate([label.ravel() for label in labels.values()]))
    assert accuracy == 1.0 and len(present) > 50
    assert np.array_equal(iou[present[present > 0] - 1], np.ones((present > 0).sum()))


def test_a_predicted_0_is_allowed(rows: list[Labels], tmp_path: Path) -> None:
    row = replace(rows[0], semantic=np.zeros_like(rows[0].semantic), is_truth=False)
    write([row], tmp_path / "out")
    assert not read(listed(tmp_path / "out", [row])[0]).any()


def test_an_id_above_150_is_refused(rows: list[Labels], tmp_path: Path) -> None:
    row = replace(rows[0], semantic=np.full_like(rows[0].semantic, 151))
    with pytest.raises(DataError, match=f"{row.sample_id} has the id 151"):
        write([row], tmp_path / "out")
    generators.save(tmp_path / "in" / f"{row.sample_id}.png", np.full(trees.SIZE, 255, np.uint8))
    with pytest.raises(DataError, match="id 255"):
        read(listed(tmp_path / "in", [row])[0])


def test_classes_of_another_dataset_are_refused(rows: list[Labels], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the 150 classes of ADE20K, but 0 is 'Sky'"):
        write(rows, tmp_path / "out", CAMVID)


def test_a_missing_prediction_and_one_in_colour(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    (tmp_path / "out" / f"{rows[0].sample_id}.png").unlink()
    generators.save(tmp_path / "out" / f"{rows[1].sample_id}.png", np.zeros((*trees.SIZE, 3), np.uint8))
    found = listed(tmp_path / "out", rows)
    with pytest.raises(DataError, match=f"{rows[0].sample_id}.png") as caught:
        read(found[0])
    assert caught.value.code == "missing-prediction"
    with pytest.raises(DataError, match="is in colour"):
        read(found[1])


def test_predictions_of_unknown_images_are_refused(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"1 predictions .*{rows[0].sample_id}.png"):
        listed(tmp_path / "out", rows[1:])


def test_the_official_predictions_are_found_in_their_folder(shared_data: SharedData) -> None:
    root = shared_data("data/ade20k/sampleData")
    rows = truth(root)
    found = listed(root, rows)
    assert len(found) == 3 and all("/predictions/" in i.uri for i in found)
    iou, accuracy = evaluate((read(i), np.asarray(r.semantic)) for i, r in zip(found, rows, strict=True))
    assert accuracy == 1.0 and set(iou.tolist()) == {0.0, 1.0}
    assert Dataset.formats == (Ade20k.name,)
