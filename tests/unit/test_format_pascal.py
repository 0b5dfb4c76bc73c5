"""VOC's result files: names, palette, round trips, VOCevalseg of ground truth against itself, what is refused."""

from dataclasses import replace
from pathlib import Path

import generators
import numpy as np
import pytest
import trees_pascal as trees
from numpy.typing import NDArray
from PIL import Image

from segbatch.datasets import registry, tables
from segbatch.datasets.camvid import CLASSES as CAMVID
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Labels, SampleRef
from segbatch.formats.pascal import Pascal
from segbatch.records import ClassTable, PlanItem
from segbatch.stages.exporting import Folder

VOC, CONTEXT = tables.load("pascal-voc"), tables.load("pascal-context-60")


def truth(name: str, root: Path) -> list[Labels]:
    """The ground truth of every image that has labels."""
    found, tree = registry.find(name, str(root))
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


def write(rows: list[Labels], folder: Path, classes: ClassTable = VOC) -> None:
    Pascal().write(iter(rows), classes, Folder(str(folder), 2))


def listed(folder: Path, rows: list[Labels], classes: ClassTable = VOC) -> list[PlanItem]:
    refs = [SampleRef(r.sample_id, r.image_uri, "tag", r.height, r.width, split=r.split) for r in rows]
    return list(Pascal().items(Tree.of(str(folder)), iter(refs), classes))


def read(item: PlanItem) -> NDArray[np.uint16]:
    (found,) = Pascal().read(item)
    assert found.semantic is not None
    return found.semantic


def path_of(row: Labels, folder: Path, year: str = "VOC2012") -> Path:
    return folder / "results" / year / "Segmentation" / f"comp6_{row.split}_cls" / f"{row.sample_id}.png"


@pytest.fixture
def rows(tmp_path: Path) -> list[Labels]:
    return truth("pascal-voc", trees.pascal_voc(tmp_path / "tree"))


def test_files_lie_as_vocinit_says_with_vocs_palette(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    assert set((tmp_path / "out").rglob("*.png")) == {path_of(r, tmp_path / "out") for r in rows}
    for row in rows:
        with Image.open(path_of(row, tmp_path / "out")) as image:
            assert image.mode == "P" and bytes(image.getpalette() or ()) == trees.palette()
            assert np.array_equal(np.array(image), row.semantic)


def test_ground_truth_is_read_again_bit_by_bit(rows: list[Labels], tmp_path: Path) -> None:
    write(rows, tmp_path / "out")
    for item, row in zip(listed(tmp_path / "out", rows), rows, strict=True):
        assert np.array_equal(read(item), row.semantic) and 255 in read(item)


def test_context_is_read_again_bit_by_bit(tmp_path: Path) -> None:
    rows = truth("pascal-context", trees.pascal_context(tmp_path / "tree"))
    write(rows, tmp_path / "out", CONTEXT)
    assert path_of(rows[0], tmp_path / "out", "VOC2010").exists()
    for item, row in zip(listed(tmp_path / "out", rows, CONTEXT), rows, strict=True):
        assert np.array_equal(read(item), row.semantic) and read(item).max() > 20


def evaluate(truth_folder: Path, results: Path, ids: list[str]) -> NDArray[np.float64]:
    """VOCevalseg.m: IoU of background and the 20 classes in percent; nan where a class is in neither."""
    confusion = np.zeros((21, 21))
    for image_id in ids:
        label, result = (np.array(Image.open(f / f"{image_id}.png")).astype(int) for f in (truth_folder, results))
        counted = label < 255
        assert label.shape == result.shape and result[counted].max() <= 20
        confusion += np.bincount(label[counted] + result[counted] * 21, minlength=441).reshape(21, 21).T
    diagonal = np.diag(confusion)
    with np.errstate(invalid="ignore"):
        return 100 * diagonal / (confusion.sum(0) + confusion.sum(1) - diagonal)


def test_ground_truth_is_perfect_in_the_official_evaluation(rows: list[Labels], tmp_path: Path) -> None:
    """Void becomes a class, as the evaluation refuses 255 in results."""
    predictions = [
        replace(r, semantic=np.where(r.semantic == 255, 15, r.semantic).astype(np.uint16), is_truth=False) for r in rows
    ]
    write(predictions, tmp_path / "out")
    truth_folder = tmp_path / "tree" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    results = path_of(rows[0], tmp_path / "out").parent
    accuracies = evaluate(truth_folder, results, [r.sample_id for r in rows if r.split == "train"])
    present = accuracies[~np.isnan(accuracies)]
    assert len(present) > 4 and set(present.tolist()) == {100.0}


def test_void_in_a_prediction_is_refused(rows: list[Labels], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the prediction of {rows[0].sample_id} has .* pixels of void") as caught:
        write([replace(rows[0], is_truth=False)], tmp_path / "out")
    assert caught.value.code == "void-prediction"


@pytest.mark.parametrize(("classes", "value"), [(VOC, 21), (CONTEXT, 60), (CONTEXT, 255)])
def test_ids_that_the_dataset_lacks_are_refused(
    rows: list[Labels], tmp_path: Path, classes: ClassTable, value: int
) -> None:
    row = replace(rows[0], semantic=np.full(trees.SIZE, value, np.uint16))
    with pytest.raises(DataError, match=f"{row.sample_id} has the id {value}"):
        write([row], tmp_path / "out", classes)
    generators.save(tmp_path / "in" / f"{row.sample_id}.png", np.full(trees.SIZE, value, np.uint8))
    with pytest.raises(DataError, match=f"id {value}"):
        read(listed(tmp_path / "in", [row], classes)[0])


def test_results_in_colour_and_in_any_folder_are_read(rows: list[Labels], tmp_path: Path) -> None:
    write(rows[:1], tmp_path / "out")
    (tmp_path / "flat").mkdir()
    Image.open(path_of(rows[0], tmp_path / "out")).convert("RGB").save(tmp_path / "flat" / f"{rows[0].sample_id}.png")
    (item,) = listed(tmp_path / "flat", rows[:1])
    assert np.array_equal(read(item), rows[0].semantic)


def test_a_missing_prediction(rows: list[Labels], tmp_path: Path) -> None:
    write(rows[1:], tmp_path / "out")
    with pytest.raises(DataError, match=f"no prediction at .*{rows[0].sample_id}.png") as caught:
        read(listed(tmp_path / "out", rows)[0])
    assert caught.value.code == "missing-prediction"


def test_without_year_and_split(rows: list[Labels], tmp_path: Path) -> None:
    write([replace(rows[0], image_uri="s3://bucket/a.jpg", split="")], tmp_path / "out")
    assert (tmp_path / "out" / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls" / "a.png").exists()


@pytest.mark.parametrize("classes", [CAMVID, ClassTable(()), tables.load("pascal-context-459")])
def test_classes_of_another_dataset_are_refused(rows: list[Labels], tmp_path: Path, classes: ClassTable) -> None:
    with pytest.raises(ConfigError, match="needs the classes of PASCAL VOC"):
        write(rows, tmp_path / "out", classes)
    with pytest.raises(ConfigError, match="needs the classes of PASCAL VOC"):
        listed(tmp_path, rows, classes)
