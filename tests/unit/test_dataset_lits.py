"""LiTS: slices and labels bit by bit as nibabel reads them, pairing by name, and every way in which a case is bad."""

import gzip
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import volumes
from numpy.typing import NDArray
from trees_lits import SHAPES, lits

from segbatch import api, storage, tables
from segbatch.codecs import volume
from segbatch.config import EngineConfig, RunOptions
from segbatch.datasets import registry
from segbatch.datasets.lits import Lits, header_of
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.jobs import Limits
from segbatch.records import PlanItem, Sample

SHAPE = (9, 6, 5)
INLINE = RunOptions(engine=EngineConfig(kind="inline", threads=2))


def items(root: Path, *splits: str) -> list[PlanItem]:
    return list(Lits().items(Tree.of(str(root)), splits))


def read(root: Path) -> list[Sample]:
    return [s for item in items(root) for s in Lits().read(item)]


def reason(root: Path) -> tuple[int, DataError]:
    """How many good slices the first volume gives, and the error that the next one is."""
    done: list[Sample] = []
    with pytest.raises(DataError) as caught:
        done.extend(Lits().read(items(root)[0]))
    assert caught.value.fix and "\n" not in str(caught.value)
    return len(done), caught.value


def pair(root: Path, labels: NDArray[Any] | None = None, suffix: str = "nii", **options: Any) -> Path:
    """One case; ``options`` are the labels'."""
    volumes.save(root / f"volume-7.{suffix}", volumes.ct(SHAPE))
    found = volumes.labels(SHAPE) if labels is None else labels
    volumes.save(root / f"segmentation-7.{suffix}", found, **{"affine": volumes.AFFINES["LPS"], **options})
    return root


def stored(path: Path) -> NDArray[Any]:
    """The voxels by nibabel, unscaled, indexed [i, j, k]."""
    return np.asarray(nibabel.load(path).dataobj.get_unscaled())  # type: ignore[attr-defined]


def test_volumes_come_by_number_with_their_slices_as_rows(tmp_path: Path) -> None:
    found = items(lits(tmp_path))
    assert [i.sample_id for i in found] == [
        *(f"volume-{n}" for n in SHAPES),
        *("test-volume-0", "test-volume-1"),
    ]
    assert [i.rows for i in found] == [*(shape[2] for shape in SHAPES.values()), 3, 3]
    assert [i.split for i in found] == ["train"] * 4 + ["test"] * 2
    assert all(i.group_id == i.sample_id for i in found)
    assert [i.sample_id for i in items(tmp_path, "test")] == ["test-volume-0", "test-volume-1"]
    assert (found[0].row_id(3), found[3].row_id(0)) == ("volume-0/0003", "volume-29")
    files = [p for p in tmp_path.rglob("*-0.nii") if "test" not in p.name]
    assert found[0].bytes == sum(p.stat().st_size for p in files) and len(files) == 2


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    for n in (10, 9, 100):
        volumes.save(tmp_path / f"volume-{n}.nii", volumes.ct((2, 2, 2)))
    assert [i.sample_id for i in items(tmp_path)] == ["volume-9", "volume-10", "volume-100"]


def test_slices_and_labels_equal_nibabels(tmp_path: Path) -> None:
    lits(tmp_path)
    found = {s.sample_id: s for s in read(tmp_path)}
    assert len(found) == sum(shape[2] for shape in SHAPES.values()) + 6
    for path in tmp_path.rglob("*volume*"):
        name = path.name.split(".")[0]
        ct, affine = stored(path), nibabel.load(path).affine  # type: ignore[attr-defined]
        label_path = path.with_name(path.name.replace("volume", "segmentation"))
        labels = stored(label_path) if label_path.exists() else None
        for k in range(ct.shape[2]):
            sample = found[name if ct.shape[2] == 1 else f"{name}/{k:04d}"]
            assert sample.image is not None and sample.image_format is not None and sample.volume is not None
            height, width = ct.shape[1], ct.shape[0]
            pixels = volume.decode_slice(sample.image, sample.image_format, height, width, sample.volume.dtype)
            np.testing.assert_array_equal(pixels, ct[:, :, k].T)
            assert (sample.height, sample.width, sample.channels) == (height, width, 1)
            assert (sample.volume.index, sample.volume.slices) == (k, ct.shape[2])
            np.testing.assert_array_equal(np.reshape(sample.volume.affine, (4, 4)), affine)
            assert sample.issues == () and sample.image_uri == str(path)
            if labels is None:
                assert sample.semantic is None and "test" in name
            else:
                assert sample.semantic is not None and sample.semantic.dtype == np.uint16
                np.testing.assert_array_equal(sample.semantic, labels[:, :, k].T)


def test_attributes_say_how_the_volume_lies(tmp_path: Path) -> None:
    lits(tmp_path)
    found = {s.sample_id: s.attributes for s in read(tmp_path)}
    assert found["volume-0/0000"]["orientation"] == "LPS" and found["volume-1/0002"]["orientation"] == "RAS"
    assert found["volume-29"]["orientation"] == "LPS oblique"
    np.testing.assert_allclose(found["volume-0/0000"]["zooms_mm"], (0.7, 0.8, 2.5), rtol=1e-6)


@pytest.mark.parametrize("folders", [("volume_pt1", "segmentations"), ("CT/LITS/Batch", "CT/LITS/Batch"), ("", "")])
def test_only_names_decide_what_belongs_together(tmp_path: Path, folders: tuple[str, str]) -> None:
    volumes.save(tmp_path / folders[0] / "volume-5.NII", volumes.ct(SHAPE))
    (tmp_path / folders[1]).mkdir(parents=True, exist_ok=True)
    (tmp_path / folders[1] / "Segmentation-5.nii.gz").write_bytes(volumes.nifti(volumes.labels(SHAPE), zipped=True))
    found, tree = registry.find("lits", str(tmp_path))
    assert found.recognises(tree)
    (item,) = found.items(tree, ())
    samples = list(found.read(item))
    assert item.sample_id == "volume-5" and len(samples) == SHAPE[2]
    maps = [s.semantic for s in samples if s.semantic is not None]
    np.testing.assert_array_equal(np.stack(maps, 2).transpose(1, 0, 2), volumes.labels(SHAPE))


def test_the_official_archives_laid_side_by_side(tmp_path: Path) -> None:
    inside = "media/nas/01_Datasets/CT/LITS/Training Batch"
    source = tmp_path / "download"
    source.mkdir()
    for batch in (1, 2):
        with zipfile.ZipFile(source / f"Training_Batch{batch}.zip", "w", zipfile.ZIP_DEFLATED) as out:
            for kind, voxels in (("volume", volumes.ct(SHAPE)), ("segmentation", volumes.labels(SHAPE))):
                out.writestr(f"{inside} {batch}/{kind}-{batch}.nii", volumes.nifti(voxels))
    found, tree = registry.find("lits", str(source))
    assert found.recognises(tree)
    listed = list(found.items(tree, ()))
    assert [(i.sample_id, i.rows) for i in listed] == [("volume-1", 5), ("volume-2", 5)]
    assert len([s for i in listed for s in found.read(i)]) == 10


def test_planning_reads_heads_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(40):
        volumes.save(tmp_path / f"volume-{n}.nii", volumes.ct((64, 64, 20), seed=n))
    asked: list[int] = []
    whole = storage.read_range

    def counted(uri: str, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return whole(uri, start, stop)

    def refused(uri: str) -> Iterator[bytes]:
        raise AssertionError(f"{uri} is opened")

    monkeypatch.setattr(storage, "read_range", counted)
    monkeypatch.setattr(storage, "open_stream", refused)
    monkeypatch.setattr(storage, "read_bytes", refused)
    assert [i.rows for i in items(tmp_path)] == [20] * 40
    assert len(asked) == 40 and max(asked) <= 1 << 16


def test_a_header_longer_than_the_head_is_read_all_the_same(tmp_path: Path) -> None:
    path = volumes.save(tmp_path / "volume-0.nii", volumes.ct(SHAPE), comment=b"x" * 100_000)
    assert len(header_of(str(path)).raw) > 100_000
    assert items(tmp_path)[0].rows == SHAPE[2]


def test_a_case_without_one_of_its_files_stays_a_row(tmp_path: Path) -> None:
    volumes.save(tmp_path / "a" / "volume-1.nii", volumes.ct(SHAPE))
    volumes.save(tmp_path / "a" / "segmentation-2.nii.gz", volumes.labels(SHAPE))
    without_labels, without_ct = items(tmp_path)
    assert (without_labels.rows, without_ct.rows) == (SHAPE[2], 1) and "missing" in without_labels.etag
    assert without_ct.uri == str(tmp_path / "a" / "volume-2.nii.gz")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a" / "segmentation-1.nii"))) as labels:
        next(Lits().read(without_labels))
    with pytest.raises(DataError, match=r"volume-2\.nii\.gz is not there") as ct:
        next(Lits().read(without_ct))
    assert (labels.value.code, ct.value.code) == ("missing-label", "missing-image")


def test_test_volumes_may_have_labels(tmp_path: Path) -> None:
    volumes.save(tmp_path / "test-volume-3.nii", volumes.ct(SHAPE))
    volumes.save(tmp_path / "test-segmentation-3.nii", volumes.labels(SHAPE))
    assert all(s.semantic is not None for s in read(tmp_path))


@pytest.mark.parametrize("shape", [(9, 6, 4), (6, 9, 5), (9, 6, 6)])
def test_labels_of_another_shape_make_every_row_bad(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    done, error = reason(pair(tmp_path, volumes.labels(shape)))
    assert (done, error.code) == (0, "size-mismatch")
    assert "9 x 6 x 5 against " + " x ".join(map(str, shape)) in error.problem and "segmentation-7" in error.problem


def test_labels_of_another_affine_pair_by_index_with_an_issue(tmp_path: Path) -> None:
    pair(tmp_path, affine=volumes.AFFINES["LAS"])
    found = read(tmp_path)
    assert len(found) == SHAPE[2]
    for k, sample in enumerate(found):
        (issue,) = sample.issues
        assert issue.code == "geometry-differs" and "LPS against LAS" in issue.message
        assert str(tmp_path / "segmentation-7.nii") in issue.message and sample.semantic is not None
        np.testing.assert_array_equal(sample.semantic, volumes.labels(SHAPE)[:, :, k].T)


@pytest.mark.parametrize("name", ["volume-7", "segmentation-7"])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_rows_from_the_cut_on_are_bad(tmp_path: Path, name: str, suffix: str) -> None:
    path = pair(tmp_path, suffix=suffix) / f"{name}.{suffix}"
    size = volumes.ct(SHAPE).nbytes if name == "volume-7" else volumes.labels(SHAPE).nbytes
    whole = gzip.decompress(path.read_bytes()) if suffix == "nii.gz" else path.read_bytes()
    cut = 352 + size * 3 // 5 + 10  # in slice 3
    if suffix == "nii":
        path.write_bytes(whole[:cut])
    else:
        file = io.BytesIO()
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=0) as out:
            out.write(whole)
        path.write_bytes(file.getvalue()[: cut + 15])  # behind the headers of gzip and of a stored block
    done, error = reason(tmp_path)
    assert error.code == "truncated-volume" and path.name in error.problem and done == 3


def test_a_wrong_checksum_behind_the_voxels_is_the_last_rows(tmp_path: Path) -> None:
    shape = (400, 400, 5)  # more than what is inflated at once
    volumes.save(tmp_path / "volume-7.nii", volumes.ct(shape))
    path = volumes.save(tmp_path / "segmentation-7.nii.gz", volumes.labels(shape))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    done, error = reason(tmp_path)
    assert (done, error.code) == (shape[2] - 1, "corrupt-volume")


def test_a_strange_label_names_its_slice(tmp_path: Path) -> None:
    labels = volumes.labels(SHAPE)
    labels[4, 2, 3] = 3
    done, error = reason(pair(tmp_path / "id", labels))
    assert (done, error.code) == (3, "unknown-label")
    assert "slice 3" in error.problem and "row 2, column 4" in error.problem and "segmentation-7.nii" in error.problem
    halves = volumes.labels(SHAPE, "float32") / 2
    done, error = reason(pair(tmp_path / "half", halves))
    assert (done, error.code) == (0, "bad-label") and "0.5" in error.problem


def test_scaled_labels_are_unscaled(tmp_path: Path) -> None:
    pair(tmp_path, volumes.labels(SHAPE, "int16", (0, 10, 20)), scaling=(0.1, 0.0))
    found = np.stack([s.semantic for s in read(tmp_path) if s.semantic is not None], 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(found * 10, volumes.labels(SHAPE, "int16", (0, 10, 20)))


@pytest.mark.parametrize(
    ("data", "code"), [(b"", "empty-file"), (b"no volume" * 99, "not-nifti"), (volumes.nifti(volumes.ct())[:200], "")]
)
def test_a_header_that_cannot_be_read_is_one_row_with_the_reason(tmp_path: Path, data: bytes, code: str) -> None:
    pair(tmp_path)
    (tmp_path / "volume-7.nii").write_bytes(data)
    assert [i.rows for i in items(tmp_path)] == [1]
    done, error = reason(tmp_path)
    assert (done, error.code) == (0, code or "truncated-volume") and "volume-7.nii" in error.problem


def test_a_volume_that_changed_after_planning_is_told(tmp_path: Path) -> None:
    (item,) = items(pair(tmp_path))
    pair(tmp_path).joinpath("volume-7.nii").write_bytes(volumes.nifti(volumes.ct((9, 6, 8))))
    with pytest.raises(DataError, match="8 slices now, 5 when it was planned"):
        next(Lits().read(item))


def test_a_second_file_of_a_case_is_a_row_with_the_reason(tmp_path: Path) -> None:
    pair(tmp_path / "a")
    pair(tmp_path / "b", suffix="nii.gz")
    first, *twins = items(tmp_path)
    assert first.sample_id == "volume-7"
    assert [t.sample_id for t in twins] == ["b/segmentation-7.nii.gz", "b/volume-7.nii.gz"]
    for twin in twins:
        with pytest.raises(DataError, match="has the sample id of") as caught:
            next(Lits().read(twin))
        assert caught.value.code == "duplicate-id" and f"{tmp_path}/a/" in caught.value.problem


def test_other_folders_are_not_lits(tmp_path: Path) -> None:
    volumes.save(tmp_path / "liver.nii.gz", volumes.ct())
    volumes.save(tmp_path / "SegmentationClass" / "volume.nii", volumes.ct())
    tree = Tree.of(str(tmp_path))
    assert not Lits().recognises(tree) and Lits().splits(tree) == ()
    with pytest.raises(ConfigError, match=r"expected volume-N\.nii"):
        list(Lits().items(tree, ()))


def test_a_broken_volume_ends_as_rows_with_reasons(tmp_path: Path) -> None:
    path = lits(tmp_path / "lits") / "Training Batch 1" / "segmentation-0.nii"
    path.write_bytes(path.read_bytes()[: 352 + 12 * 9 * 2 - 1])
    limits = Limits(max_bad_fraction=1.0)
    api.ingest("lits", str(tmp_path / "lits"), str(tmp_path / "out"), limits=limits, options=INLINE)
    rows = [r for batch in tables.scan(str(tmp_path / "out"), "samples") for r in batch.to_pylist()]
    first = [r for r in rows if r["group_id"] == "volume-0"]
    assert [r["sample_id"] for r in first] == [f"volume-0/{k:04d}" for k in range(5)]
    assert [r["status"] for r in first] == ["ok"] + ["truncated-volume"] * 4
    assert all("segmentation-0.nii" in r["issues"][0]["message"] for r in first[1:])
    assert {r["status"] for r in rows if r["group_id"] != "volume-0"} == {"ok"}
    assert all(r["volume"]["header"] for r in rows if r["status"] == "ok")


def test_real_ct_with_liver_labels_under_lits_names(tmp_path: Path, shared_data: Any) -> None:
    ct, liver = (shared_data(f"data/ct_liver/{name}.nii.gz") for name in ("example_ct_sm", "liver"))
    (tmp_path / "volume-0.nii.gz").symlink_to(ct)
    (tmp_path / "segmentation-0.nii.gz").symlink_to(liver)
    found = read(tmp_path)
    truth, voxels = stored(liver), stored(ct)
    assert len(found) == truth.shape[2] == 30 and int(truth.sum()) == 39350
    for k, sample in enumerate(found):
        assert sample.semantic is not None and sample.image is not None and sample.image_format is not None
        np.testing.assert_array_equal(sample.semantic, truth[:, :, k].T)
        pixels = volume.decode_slice(sample.image, sample.image_format, 101, 122, "int16")
        np.testing.assert_array_equal(pixels, voxels[:, :, k].T)
