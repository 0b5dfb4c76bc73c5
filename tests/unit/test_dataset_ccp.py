"""Clothing Co-Parsing: label maps and tags as scipy reads them, and every way in which a photo is bad."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from generators import save
from trees_ccp import PIXELS, TAGS, ccp, save_mat

from segbatch.datasets import registry
from segbatch.datasets.ccp import Ccp
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

SIZE = (24, 16)


def items(root: Path) -> list[PlanItem]:
    return list(Ccp().items(Tree.of(str(root)), ()))


def read(root: Path, sample_id: str) -> Sample:
    (sample,) = Ccp().read(next(i for i in items(root) if i.sample_id == sample_id))
    return sample


def error(root: Path, sample_id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read(root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def test_photos_come_by_number_with_labels_or_tags(tmp_path: Path) -> None:
    found = items(ccp(tmp_path))
    assert [i.sample_id for i in found] == [*PIXELS, *TAGS]
    assert all(not i.split and not i.group_id for i in found) and Ccp().splits(Tree.of(str(tmp_path))) == ()
    for stem in PIXELS:
        sample = read(tmp_path, stem)
        truth = scipy.io.loadmat(tmp_path / "annotations" / "pixel-level" / f"{stem}.mat")["groundtruth"]
        assert sample.semantic is not None and sample.semantic.dtype == np.uint16 and sample.attributes == {}
        np.testing.assert_array_equal(sample.semantic, truth)
        assert sample.image == (tmp_path / "photos" / f"{stem}.jpg").read_bytes()
    for stem, tags in TAGS.items():
        sample = read(tmp_path, stem)
        assert sample.semantic is None and sample.attributes == {"tags": tags} and sample.issues == ()


def test_suffixes_in_capitals_and_photos_with_both(tmp_path: Path) -> None:
    ccp(tmp_path)
    (tmp_path / "photos" / "0001.jpg").rename(tmp_path / "photos" / "0001.JPG")
    save_mat(tmp_path / "annotations" / "image-level" / "0001.MAT", tags=np.array([[3, 58, 59]], np.uint8))
    sample = read(tmp_path, "0001")
    assert sample.semantic is not None and sample.attributes == {"tags": [3, 58]}
    (issue,) = sample.issues
    assert issue.code == "unknown-tag" and "tag 59" in issue.message and "0001.MAT" in issue.message


def test_a_file_without_its_partner_stays_a_row(tmp_path: Path) -> None:
    ccp(tmp_path)
    (tmp_path / "annotations" / "pixel-level" / "0001.mat").unlink()
    (tmp_path / "photos" / "0002.jpg").unlink()
    (tmp_path / "photos" / "1006.jpg").unlink()
    assert [i.sample_id for i in items(tmp_path)] == ["0001", "0003", "1005", "0002", "1006"]
    missing = error(tmp_path, "0001")
    assert missing.code == "missing-label" and "pixel-level/0001.mat" in missing.problem
    for stem in ("0002", "1006"):
        gone = error(tmp_path, stem)
        assert gone.code == "missing-image" and f"photos/{stem}.jpg" in gone.problem


def test_two_photos_of_one_number(tmp_path: Path) -> None:
    ccp(tmp_path)
    save(tmp_path / "photos" / "0001.png", np.zeros((*SIZE, 3), np.uint8))
    assert [i.sample_id for i in items(tmp_path)][-1] == "0001.png"
    assert error(tmp_path, "0001.png").code == "duplicate-id"


@pytest.mark.parametrize(
    ("groundtruth", "code", "said"),
    [
        (np.zeros((16, 24), np.uint8), "size-mismatch", "24 x 16, its photo"),
        (np.full(SIZE, 59, np.uint8), "unknown-label", "the id 59 at row 0, column 0"),
        (np.full(SIZE, -1, np.int16), "bad-label", "from -1 to -1"),
        (np.full(SIZE, 0.5), "bad-label", "float64"),
        (np.zeros((*SIZE, 3), np.uint8), "bad-label", r"(24, 16, 3)"),
        ("labels", "bad-mat", "no array of real numbers"),
    ],
)
def test_labels_that_cannot_be_used_are_told(tmp_path: Path, groundtruth: Any, code: str, said: str) -> None:
    path = ccp(tmp_path) / "annotations" / "pixel-level" / "0002.mat"
    save_mat(path, groundtruth=groundtruth)
    found = error(tmp_path, "0002")
    assert found.code == code and said in found.problem and str(path) in found.problem


def test_damaged_files_are_told(tmp_path: Path) -> None:
    path = ccp(tmp_path) / "annotations" / "pixel-level" / "0002.mat"
    path.write_bytes(path.read_bytes()[:-9])
    assert error(tmp_path, "0002").code == "bad-mat"
    save_mat(path, other=np.zeros(SIZE, np.uint8))
    assert "no variable groundtruth, only other" in error(tmp_path, "0002").problem
    tags = tmp_path / "annotations" / "image-level" / "1005.mat"
    tags.write_bytes(b"")
    assert str(tags) in error(tmp_path, "1005").problem
    (tmp_path / "photos" / "0003.jpg").write_bytes(b"")
    assert error(tmp_path, "0003").code == "empty-file"


def test_labels_that_change_are_changed_items(tmp_path: Path) -> None:
    before = {i.sample_id: i.etag for i in items(ccp(tmp_path))}
    save_mat(tmp_path / "annotations" / "pixel-level" / "0002.mat", groundtruth=np.zeros((24, 16), np.int16))
    after = {i.sample_id: i.etag for i in items(tmp_path)}
    assert [stem for stem in before if before[stem] != after[stem]] == ["0002"]


def test_the_layout_is_named_where_it_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match="expected folders photos/, annotations/pixel-level/"):
        items(tmp_path)
    assert not Ccp().recognises(Tree.of(str(tmp_path)))


@pytest.mark.long
def test_real_photos(shared_data: Any) -> None:
    source = shared_data("data/ccp")
    found, tree = registry.find("ccp", str(source))
    assert found.recognises(tree)
    totals = np.zeros(59, np.int64)
    tagged = 0
    for item in found.items(tree, ()):
        (sample,) = found.read(item)
        if sample.semantic is None:
            tags = scipy.io.loadmat(source / "annotations" / "image-level" / f"{sample.sample_id}.mat")["tags"]
            assert sample.attributes == {"tags": tags.ravel().tolist()}
            tagged += 1
        else:
            truth = scipy.io.loadmat(source / "annotations" / "pixel-level" / f"{sample.sample_id}.mat")["groundtruth"]
            np.testing.assert_array_equal(sample.semantic, truth)
            totals += np.bincount(truth.ravel(), minlength=59)
    folder = source / "annotations" / "pixel-level"
    assert tagged == len(list((source / "annotations" / "image-level").glob("*.mat"))) and totals[0] > totals[1:].max()
    assert len(list(found.items(tree, ()))) == tagged + len(list(folder.glob("*.mat")))
    names = [str(cell[0]) for cell in scipy.io.loadmat(source / "label_list.mat")["label_list"][0]]
    assert names == [c.name for c in found.classes(tree).classes]
