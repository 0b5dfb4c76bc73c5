"""Label maps in the form of Clothing Co-Parsing: scipy reads them, and what is read back is what was written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from trees_ccp import PIXELS, ccp, save_mat

from segbatch import api, tables
from segbatch.config import EngineConfig, RunOptions
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Labels, SampleRef
from segbatch.formats.ccp import Ccp
from segbatch.stages.exporting import Folder

CLASSES = load("ccp")
INLINE = RunOptions(engine=EngineConfig(kind="inline", threads=2))


def row(sample_id: str, labels: Any) -> Labels:
    found = np.asarray(labels, np.uint16)
    return Labels(sample_id, f"/photos/{sample_id}.jpg", *found.shape, semantic=found)


def ref(sample_id: str, size: tuple[int, int] = (24, 16)) -> SampleRef:
    return SampleRef(sample_id, f"/photos/{sample_id}.jpg", "tag", *size)


def test_files_are_those_of_the_original(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 59, (7, 5))
    for out in ("a", "b"):
        Ccp().write(iter([row("0001", labels), row("0002.jpg", labels.T)]), CLASSES, Folder(str(tmp_path / out), 2))
    folder = tmp_path / "a" / "annotations" / "pixel-level"
    assert sorted(p.name for p in folder.iterdir()) == ["0001.mat", "0002.mat"]
    found = scipy.io.loadmat(folder / "0001.mat")
    assert [k for k in found if not k.startswith("__")] == ["groundtruth"] and found["__version__"] == "1.0"
    assert found["groundtruth"].dtype == np.uint8
    np.testing.assert_array_equal(found["groundtruth"], labels)
    np.testing.assert_array_equal(scipy.io.loadmat(folder / "0002.mat")["groundtruth"], labels.T)
    again = tmp_path / "b" / "annotations" / "pixel-level"
    assert (folder / "0001.mat").read_bytes() == (again / "0001.mat").read_bytes()


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0001 has the label id 256") as caught:
        Ccp().write(iter([row("0001", [[0, 256]])]), CLASSES, Folder(str(tmp_path), 1))
    assert caught.value.code == "value-range"


def test_missing_and_broken_predictions_are_rows(tmp_path: Path) -> None:
    save_mat(tmp_path / "mine" / "0001.mat", groundtruth=np.zeros((24, 16), np.uint8))
    save_mat(tmp_path / "mine" / "0003.mat", labels=np.zeros((24, 16), np.uint8))
    items = list(Ccp().items(Tree.of(str(tmp_path)), [ref("0001"), ref("0002"), ref("0003")], CLASSES))
    (good,) = Ccp().read(items[0])
    assert good.semantic is not None and good.semantic.dtype == np.uint16 and good.semantic.shape == (24, 16)
    for item, code, said in ((items[1], "missing-prediction", "0002.mat"), (items[2], "bad-mat", "0003.mat")):
        with pytest.raises(DataError, match=said) as caught:
            list(Ccp().read(item))
        assert caught.value.code == code
    with pytest.raises(ConfigError, match=r"0003\.mat"):
        list(Ccp().items(Tree.of(str(tmp_path)), [ref("0001"), ref("0002")], CLASSES))


def semantic(root: Path, table: str) -> dict[str, Any]:
    return {r["sample_id"]: r["semantic"] for b in tables.scan(str(root), table) for r in b.to_pylist()}


def round_trip(source: Path, tmp_path: Path) -> Path:
    """Ground truth out and in again; gives the folder of what was written."""
    out, written, again = (tmp_path / n for n in ("out", "written", "again"))
    api.ingest("ccp", str(source), str(out), options=INLINE)
    api.export("ccp", str(out), str(out), str(written))
    api.import_predictions("ccp", str(written), str(out), str(again), options=INLINE)
    assert semantic(again, "masks") == semantic(out, "samples")
    return written / "annotations" / "pixel-level"


def test_truth_goes_out_and_comes_back_the_same(tmp_path: Path) -> None:
    source = ccp(tmp_path / "ccp")
    for path in (source / "annotations" / "image-level", source / "photos"):  # photos with tags alone have no labels
        for file in path.glob("1*"):
            file.unlink()
    written = round_trip(source, tmp_path)
    assert sorted(p.stem for p in written.iterdir()) == sorted(PIXELS)


def test_real_labels_go_out_and_come_back_the_same(tmp_path: Path, shared_data: Any) -> None:
    real = shared_data("data/ccp")
    source = tmp_path / "ccp"
    (source / "photos").mkdir(parents=True)
    (source / "annotations" / "pixel-level").mkdir(parents=True)
    for stem in ("0001", "0002", "0057"):
        for path in (f"photos/{stem}.jpg", f"annotations/pixel-level/{stem}.mat"):
            (source / path).symlink_to(real / path)
    written = round_trip(source, tmp_path)
    for path in written.iterdir():
        original = real / "annotations" / "pixel-level" / path.name
        for in_matlab in (False, True):
            theirs, ours = (scipy.io.loadmat(p, mat_dtype=in_matlab)["groundtruth"] for p in (original, path))
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert len(list(written.iterdir())) == 3
