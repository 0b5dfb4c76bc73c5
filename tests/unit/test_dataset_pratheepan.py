"""Pratheepan: skin where the ground truth is bright, names of every kind, and every way in which a photo is bad."""

from pathlib import Path

import numpy as np
import pytest
from generators import photo, save
from PIL import Image
from trees_pratheepan import PHOTOS, pratheepan

from segbatch.datasets import registry
from segbatch.datasets.pratheepan import Pratheepan
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import PlanItem, Sample

SUBSETS = {"face": "FacePhoto", "family": "FamilyPhoto"}


def items(root: Path) -> list[PlanItem]:
    return list(Pratheepan().items(Tree.of(str(root)), ()))


def read(root: Path, sample_id: str) -> Sample:
    (sample,) = Pratheepan().read(next(i for i in items(root) if i.sample_id == sample_id))
    return sample


def error(root: Path, sample_id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read(root, sample_id)
    assert caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def test_photos_come_by_subset_and_name(tmp_path: Path) -> None:
    found = items(pratheepan(tmp_path))
    stems = [(s, n.rsplit(".", 1)[0]) for s, folder in SUBSETS.items() for n in sorted(PHOTOS[folder])]
    assert [i.sample_id for i in found] == [f"{s}/{stem}" for s, stem in stems]
    assert "face/my face (1) [small]" in [i.sample_id for i in found]
    assert all(not i.split and not i.group_id for i in found)


def test_skin_is_where_the_ground_truth_is_brighter_than_128(tmp_path: Path) -> None:
    pratheepan(tmp_path)
    seen = set()
    for item in items(tmp_path):
        (sample,) = Pratheepan().read(item)
        subset, stem = item.sample_id.split("/")
        truth = Image.open(tmp_path / "Ground_Truth" / f"GroundT_{SUBSETS[subset]}" / f"{stem}.png")
        seen.add(truth.mode)
        assert sample.semantic is not None and sample.semantic.dtype == np.uint16
        np.testing.assert_array_equal(sample.semantic, np.asarray(truth.convert("L")) > 128)
        assert sample.semantic[0, :2].tolist() == [0, 1] and sample.attributes == {"subset": subset}
        assert sample.image == Path(item.uri).read_bytes() and sample.issues == ()
    assert seen == {"L", "RGB"}


@pytest.mark.parametrize("mode", ["1", "P", "L", "LA", "RGB", "RGBA", "I;16"])
def test_ground_truth_of_every_kind_of_png(tmp_path: Path, mode: str) -> None:
    skin = np.kron([[0, 1], [1, 1]], np.ones((6, 8))).astype(bool)
    grey = Image.fromarray(np.where(skin, 255, 0).astype(np.uint8))
    path = pratheepan(tmp_path) / "Ground_Truth" / "GroundT_FacePhoto" / "06Apr03Face.png"
    if mode == "I;16":
        Image.fromarray(np.where(skin, 65535, 0).astype(np.uint16)).save(path)
    else:
        grey.convert(mode).save(path)
    assert Image.open(path).mode == mode
    np.testing.assert_array_equal(read(tmp_path, "face/06Apr03Face").semantic, skin)  # type: ignore[arg-type]


@pytest.mark.parametrize("above", ["Face_Dataset", "Face_Dataset/Pratheepan", ""])
def test_downloads_unpacked_in_other_ways(tmp_path: Path, above: str) -> None:
    pratheepan(tmp_path / above)
    found, tree = registry.find("pratheepan", str(tmp_path))
    assert found.recognises(tree) and len(list(found.items(tree, ()))) == 6


def test_all_folders_side_by_side(tmp_path: Path) -> None:
    pratheepan(tmp_path / "all")
    for folder in ("Pratheepan_Dataset", "Ground_Truth"):
        for path in (tmp_path / "all" / folder).iterdir():
            path.rename(tmp_path / path.name)
    assert len([s for i in items(tmp_path) for s in Pratheepan().read(i)]) == 6


def test_a_file_without_its_partner_stays_a_row(tmp_path: Path) -> None:
    pratheepan(tmp_path)
    (tmp_path / "Ground_Truth" / "GroundT_FacePhoto" / "06Apr03Face.png").unlink()
    (tmp_path / "Pratheepan_Dataset" / "FamilyPhoto" / "2007_family.jpg").unlink()
    assert [i.sample_id for i in items(tmp_path)][-1] == "family/2007_family" and len(items(tmp_path)) == 6
    label, image = error(tmp_path, "face/06Apr03Face"), error(tmp_path, "family/2007_family")
    assert label.code == "missing-label" and "Ground_Truth/GroundT_FacePhoto/06Apr03Face.png" in label.problem
    assert image.code == "missing-image" and "Pratheepan_Dataset/FamilyPhoto/2007_family.jpg" in image.problem


def test_a_subset_without_its_ground_truth_is_not_dropped(tmp_path: Path) -> None:
    pratheepan(tmp_path)
    folder = tmp_path / "Ground_Truth" / "GroundT_FamilyPhoto"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert len(items(tmp_path)) == 6 and error(tmp_path, "family/Family_1").code == "missing-label"


def test_files_of_one_stem_are_told(tmp_path: Path) -> None:
    pratheepan(tmp_path)
    save(tmp_path / "Pratheepan_Dataset" / "FacePhoto" / "06Apr03Face.png", photo(1))
    save(tmp_path / "Ground_Truth" / "GroundT_FacePhoto" / "06Apr03Face.bmp", photo(1))
    doubtful = [i.sample_id for i in items(tmp_path)][3:5]
    assert doubtful == ["face/06Apr03Face.png", "face/Ground_Truth/GroundT_FacePhoto/06Apr03Face.png"]
    for sample_id in doubtful:
        found = error(tmp_path, sample_id)
        assert found.code == "duplicate-id" and "06Apr03Face" in found.problem


def test_ground_truth_that_does_not_fit_is_told(tmp_path: Path) -> None:
    path = pratheepan(tmp_path) / "Ground_Truth" / "GroundT_FacePhoto" / "06Apr03Face.png"
    save(path, np.zeros((16, 12), np.uint8))
    found = error(tmp_path, "face/06Apr03Face")
    assert found.code == "size-mismatch" and "12 x 16, its photo" in found.problem and str(path) in found.problem
    for data in (b"", b"no image", path.read_bytes()[:40]):
        path.write_bytes(data)
        found = error(tmp_path, "face/06Apr03Face")
        assert found.code == "bad-label" and str(path) in found.problem


def test_the_layout_is_named_where_it_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "Pratheepan_Dataset" / "FacePhoto").mkdir(parents=True)
    with pytest.raises(ConfigError, match="Ground_Truth/GroundT_FacePhoto"):
        items(tmp_path)
    assert not Pratheepan().recognises(Tree.of(str(tmp_path)))
