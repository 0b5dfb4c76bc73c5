"""LiTS submissions: nibabel finds labels and geometry as they were, and what is read back is what was written."""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
import pytest
import volumes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from trees_lits import SHAPES, lits

from segbatch import api, tables
from segbatch.codecs import volume
from segbatch.config import EngineConfig, RunOptions
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import BadItemsError, ConfigError, DataError, IncompleteRunError
from segbatch.formats.base import Labels, SampleRef
from segbatch.formats.lits import Lits
from segbatch.records import ClassInfo, ClassTable, PlanItem, Prediction
from segbatch.stages.exporting import Folder

T = TypeVar("T")
CLASSES = load("lits")
SHAPE = (7, 5, 4)
INLINE = RunOptions(engine=EngineConfig(kind="inline", threads=2))


class Memory:
    """An output that keeps what is put."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def map(self, function: Callable[[Labels], T], rows: Iterable[Labels]) -> Iterator[T]:
        return map(function, rows)


def rows(name: str, labels: NDArray[Any], ct: bytes) -> list[Labels]:
    """The rows of a volume whose CT has the bytes ``ct``; ``labels`` are indexed [i, j, k]."""
    header = volume.read_header(io.BytesIO(ct))
    width, height, count = labels.shape
    return [
        Labels(
            sample_id=f"{name}/{k:04d}",
            image_uri=f"/data/{name}.nii",
            height=height,
            width=width,
            group_id=name,
            semantic=np.ascontiguousarray(labels[:, :, k].T, np.uint16),
            volume=volume.slice_record(header, k),
        )
        for k in range(count)
    ]


def ref(name: str, shape: tuple[int, int, int] = SHAPE) -> SampleRef:
    return SampleRef(name, f"/data/{name}.nii", "tag", shape[1], shape[0], name, rows=shape[2])


def item_of(folder: Path, sample: SampleRef) -> PlanItem:
    (item,) = Lits().items(Tree.of(str(folder)), [sample], CLASSES)
    return item


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    affine=st.sampled_from(sorted(volumes.AFFINES)),
    version=st.sampled_from([1, 2]),
    byte_order=st.sampled_from("<>"),
    dtype=st.sampled_from(["int16", "float32"]),
    scaling=st.sampled_from([(0, 0), (0.5, -1024)]),
)
def test_nibabel_reads_the_labels_on_the_cts_geometry(
    shape: tuple[int, int, int], affine: str, version: int, byte_order: str, dtype: str, scaling: tuple[float, float]
) -> None:
    options: dict[str, Any] = {"version": version, "byte_order": byte_order, "scaling": scaling}
    ct = volumes.nifti(volumes.ct(shape, dtype), volumes.AFFINES[affine], **options)
    labels, output = volumes.labels(shape), Memory()
    Lits().write(iter(rows("test-volume-4", labels, ct)), CLASSES, output)
    (written,) = output.files.items()
    found, original = volumes.oracle(written[1]), volumes.oracle(ct)
    assert written[0] == "test-segmentation-4.nii" and found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(found.dataobj), labels)
    np.testing.assert_array_equal(found.affine, original.affine)
    assert found.header.get_zooms() == original.header.get_zooms()
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert found.header[code] == original.header[code]


def test_names_are_those_of_the_reference(tmp_path: Path) -> None:
    ct, output = volumes.nifti(volumes.ct(SHAPE)), Memory()
    both = [*rows("volume-0", volumes.labels(SHAPE), ct), *rows("test-volume-0", volumes.labels(SHAPE), ct)]
    Lits().write(iter(both), CLASSES, output)
    assert list(output.files) == ["segmentation-0.nii", "test-segmentation-0.nii"]


@pytest.mark.parametrize(("left_out", "said"), [([0], 0), ([2], 2), ([3], 3), ([1, 2], 1)])
def test_a_missing_slice_is_named_and_nothing_is_written(tmp_path: Path, left_out: list[int], said: int) -> None:
    given_rows = rows("volume-12", volumes.labels(SHAPE), volumes.nifti(volumes.ct(SHAPE)))
    kept = [row for k, row in enumerate(given_rows) if k not in left_out]
    with pytest.raises(DataError, match=f"volume-12 lacks slice {said} of its 4") as caught:
        Lits().write(iter(kept), CLASSES, Folder(str(tmp_path), 2))
    assert caught.value.code == "missing-slice" and list(tmp_path.iterdir()) == []


def test_rows_that_are_no_labels_of_lits_are_refused() -> None:
    good = rows("volume-1", volumes.labels(SHAPE), volumes.nifti(volumes.ct(SHAPE)))
    assert good[2].semantic is not None
    strange = replace(good[2], semantic=np.full_like(good[2].semantic, 7))
    for bad, code, said in (
        ([*good[:2], strange, good[3]], "unknown-label", "volume-1/0002"),
        ([replace(r, volume=None) for r in good], "not-a-volume", "volume-1/0000"),
        ([replace(r, group_id="case 1") for r in good], "bad-name", "case 1"),
        ([replace(r, group_id="../volume-1") for r in good], "bad-name", r"\.\./volume-1"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            Lits().write(iter(bad), CLASSES, Memory())
        assert caught.value.code == code
    with pytest.raises(ConfigError, match="not 3"):
        Lits().write(iter(good), ClassTable((*CLASSES.classes, ClassInfo(3, "kidney"))), Memory())


@pytest.mark.parametrize("name", ["segmentation-5.nii", "deep/er/SEGMENTATION-5.nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64"])
def test_files_are_read_back_by_name(tmp_path: Path, name: str, dtype: str) -> None:
    labels = volumes.labels(SHAPE, dtype)
    volumes.save(tmp_path / name, labels)
    volumes.save(tmp_path / "volume-5.nii", volumes.ct(SHAPE))  # a CT beside it is no prediction
    item = item_of(tmp_path, ref("volume-5"))
    assert (item.sample_id, item.group_id, item.rows, item.row_id(2)) == ("volume-5", "volume-5", 4, "volume-5/0002")
    found = [p.semantic for p in Lits().read(item)]
    assert all(m is not None and m.dtype == np.uint16 for m in found)
    np.testing.assert_array_equal(np.stack(found, 2).transpose(1, 0, 2), labels)  # type: ignore[arg-type]


def test_a_missing_prediction_is_a_row_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    volumes.save(tmp_path / "test-segmentation-0.nii", volumes.labels(SHAPE))
    tree, refs = Tree.of(str(tmp_path)), [ref("test-volume-0"), ref("test-volume-1"), ref("volume-0")]
    found = list(Lits().items(tree, refs, CLASSES))
    assert [i.sample_id for i in found] == [r.sample_id for r in refs]
    for item, name in zip(found[1:], ("test-segmentation-1.nii", "segmentation-0.nii"), strict=True):
        with pytest.raises(DataError, match=name) as caught:
            next(Lits().read(item))
        assert caught.value.code == "missing-prediction"
    with pytest.raises(ConfigError, match=r"test-segmentation-0\.nii"):
        list(Lits().items(tree, refs[1:], CLASSES))
    volumes.save(tmp_path / "again" / "test-segmentation-0.nii.gz", volumes.labels(SHAPE))
    with pytest.raises(ConfigError, match="of the same volume"):
        list(Lits().items(tree, refs, CLASSES))


def test_a_folder_without_segmentations_is_refused(tmp_path: Path) -> None:
    volumes.save(tmp_path / "volume-0.nii", volumes.ct(SHAPE))
    with pytest.raises(ConfigError, match=r"expected test-segmentation-N\.nii"):
        list(Lits().items(Tree.of(str(tmp_path)), [ref("volume-0")], CLASSES))


@pytest.mark.parametrize("shape", [(5, 7, 4), (7, 5, 3), (7, 5, 5)])
def test_a_prediction_of_another_shape_is_an_error_with_both(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    volumes.save(tmp_path / "segmentation-0.nii", volumes.labels(shape))
    with pytest.raises(DataError, match=f"{shape[0]} x {shape[1]} with {shape[2]} slices, its CT 7 x 5 with 4") as e:
        next(Lits().read(item_of(tmp_path, ref("volume-0"))))
    assert e.value.code == "size-mismatch"


def test_broken_predictions_are_told_with_their_slice(tmp_path: Path) -> None:
    labels = volumes.labels(SHAPE, "float32")
    labels[3, 1, 2] = 1.5
    path = volumes.save(tmp_path / "segmentation-0.nii", labels)
    done: list[Prediction] = []
    with pytest.raises(DataError, match=r"slice 2: .*segmentation-0\.nii.*1\.5 at row 1, column 3"):
        done.extend(Lits().read(item_of(tmp_path, ref("volume-0"))))
    assert len(done) == 2
    path.write_bytes(volumes.nifti(volumes.labels(SHAPE))[:-4])
    with pytest.raises(DataError, match="cut short in slice 3"):
        done.extend(Lits().read(item_of(tmp_path, ref("volume-0"))))
    assert len(done) == 5


def semantic(root: Path, table: str) -> dict[str, Any]:
    return {r["sample_id"]: r["semantic"] for b in tables.scan(str(root), table) for r in b.to_pylist()}


def test_truth_goes_out_and_comes_back_the_same(tmp_path: Path) -> None:
    source, out, written, again = (tmp_path / n for n in ("lits", "out", "written", "again"))
    api.ingest("lits", str(lits(source)), str(out), split=["train"], options=INLINE)
    done = api.export("lits", str(out), str(out), str(written))
    assert done.files == len(SHAPES) and done.rows == sum(shape[2] for shape in SHAPES.values())
    for number in SHAPES:
        (original,) = source.rglob(f"segmentation-{number}.*")
        theirs, ours = nibabel.load(original), nibabel.load(written / f"segmentation-{number}.nii")
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(ours.affine, theirs.affine)  # type: ignore[attr-defined]
    api.import_predictions("lits", str(written), str(out), str(again), options=INLINE)
    assert semantic(again, "masks") == semantic(out, "samples") and len(semantic(out, "samples")) == 13


def test_a_volume_with_bad_slices_is_not_exported(tmp_path: Path) -> None:
    path = lits(tmp_path / "lits") / "Training Batch 2" / "segmentation-28.nii.gz"
    labels = volumes.labels((11, 7, 4), "float32")
    labels[0, 0, 2] = 9
    volumes.save(path, labels, volumes.AFFINES["LAS"])
    out = str(tmp_path / "out")
    with pytest.raises(BadItemsError):
        api.ingest("lits", str(tmp_path / "lits"), out, split=["train"], options=INLINE)
    with pytest.raises(IncompleteRunError, match="volume-28/0002"):
        api.export("lits", out, out, str(tmp_path / "written"))
    with pytest.raises(DataError, match="volume-28 lacks slice 2 of its 4"):
        api.export("lits", out, out, str(tmp_path / "written"), missing="skip")


def test_real_liver_goes_out_and_comes_back_the_same(tmp_path: Path, shared_data: Any) -> None:
    source, out, written = tmp_path / "lits", tmp_path / "out", tmp_path / "written"
    source.mkdir()
    (source / "test-volume-3.nii.gz").symlink_to(shared_data("data/ct_liver/example_ct_sm.nii.gz"))
    (source / "test-segmentation-3.nii.gz").symlink_to(shared_data("data/ct_liver/liver.nii.gz"))
    api.ingest("lits", str(source), str(out), options=INLINE)
    api.export("lits", str(out), str(out), str(written))
    theirs = nibabel.load(source / "test-segmentation-3.nii.gz")
    ours = nibabel.load(written / "test-segmentation-3.nii")
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(ours.affine, theirs.affine)  # type: ignore[attr-defined]
    api.import_predictions("lits", str(written), str(out), str(tmp_path / "again"), options=INLINE)
    assert semantic(tmp_path / "again", "masks") == semantic(out, "samples")
