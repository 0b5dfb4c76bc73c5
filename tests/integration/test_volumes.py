"""CT volumes through predict and train: slice by slice, with the neighbours as channels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generators
import nibabel
import numpy as np
import pytest
import toy_volumes
from numpy.typing import NDArray

import segbatch
from segbatch import api, tables
from segbatch.codecs.columns import runs_at
from segbatch.codecs.runlength import decode
from segbatch.config import EngineConfig, PlanConfig, RunOptions, parse
from segbatch.jobs import Limits
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.records import ClassInfo, ClassTable
from segbatch.training import TrainConfig, TrainProgress
from segbatch.training import train as train_on

INLINE = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=4))
LOW, HIGH = -200.0, 300.0


@dataclass(frozen=True)
class Neighbours:
    """Class 1 where the slice two further on is brighter than the slice itself, 2 where the one before is; 3: both."""

    slices: int = 5

    @property
    def reference(self) -> str:
        return "neighbours"

    def describe(self) -> ModelSpec:
        classes = ClassTable(tuple(ClassInfo(i, str(i)) for i in range(4)))
        zeros, ones = (0.0,) * self.slices, (1.0,) * self.slices
        spec = InputSpec(layout="nhwc", mean=zeros, std=ones, slices=self.slices, window=(LOW, HIGH), divisor=4)
        return ModelSpec("neighbours", "semantic", classes, spec, "labels", "d")

    def load(self, threads: int) -> Any:
        return Loaded(self.describe())


class Loaded:
    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        middle = batch.shape[-1] // 2
        return (batch[..., -1] > batch[..., middle]) + 2 * (batch[..., middle - 1] > batch[..., middle]).astype(int)


def expected(volume: Path, index: int) -> NDArray[Any]:
    """From nibabel: slices beyond the ends are the outermost."""
    voxels = np.clip((np.asarray(nibabel.load(volume).dataobj, np.float32) - LOW) / (HIGH - LOW), 0, 1)
    last = voxels.shape[2] - 1
    own, after, before = (voxels[:, :, k] for k in (index, min(index + 2, last), max(index - 1, 0)))
    found: NDArray[Any] = ((after > own) + 2 * (before > own)).T
    return found


def test_every_slice_is_seen_with_its_neighbours(tmp_path: Path) -> None:
    tree = generators.TREES["lits"](tmp_path / "tree")
    samples, masks = str(tmp_path / "samples"), str(tmp_path / "masks")
    api.ingest("lits", str(tree), samples, options=INLINE)
    result = segbatch.predict(Neighbours(), samples, masks, options=INLINE)
    rows = api.query(samples, "SELECT sample_id, image_uri, volume.index AS at FROM samples").to_pylist()
    place = {r["sample_id"]: (Path(r["image_uri"].removeprefix("file://")), r["at"]) for r in rows}
    assert result.state.bad == 0 and result.rows == len(rows) > 10
    seen = 0
    for part in tables.parts(tables.find(masks, "masks")):
        for batch in tables.batches(part.uri, "masks"):
            for number, row in enumerate(batch.drop_columns(["semantic"]).to_pylist()):
                runs = runs_at(batch.column("semantic"), number)
                assert runs is not None
                got = decode(runs, (row["height"], row["width"]))
                np.testing.assert_array_equal(got, expected(*place[row["sample_id"]]))
                seen += len(np.unique(got)) > 1
    assert seen > 5


def test_photos_are_no_slices(tmp_path: Path) -> None:
    tree = generators.TREES["camvid"](tmp_path / "tree")
    samples, masks = str(tmp_path / "samples"), str(tmp_path / "masks")
    api.ingest("camvid", str(tree), samples, options=INLINE, limits=Limits(1.0))
    segbatch.predict(Neighbours(), samples, masks, options=INLINE, limits=Limits(1.0))
    found = api.query(masks, "SELECT DISTINCT status, error FROM masks").to_pylist()
    assert [r["status"] for r in found] == ["photo"] and "CT slices" in found[0]["error"]


@pytest.mark.parametrize("slices", [1, 3])
def test_a_folder_of_photos_is_refused_as_well(tmp_path: Path, slices: int) -> None:
    import photos

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(photos.jpeg(1))
    segbatch.predict(
        Neighbours(slices), str(tmp_path / "photos"), str(tmp_path / "masks"), options=INLINE, limits=Limits(1.0)
    )
    assert api.query(str(tmp_path / "masks"), "SELECT status FROM masks").to_pylist() == [{"status": "photo"}]


def train_config(out: Path, samples: str, **changes: Any) -> TrainConfig:
    """A small U-Net that sees a slice and its two neighbours."""
    model = {"kind": "unet", "width": 8, "depth": 2, "channels": 3, "hounsfield": toy_volumes.WINDOW}
    optim = {"epochs": 16, "batch_size": 4, "lr": 0.03, "warmup_steps": 2, "ema": 0.9, "dtype": "float32"}
    document = {"out": str(out), "samples": samples, "seed": 1, "threads": 1, "model": model, "optim": optim}
    return parse(TrainConfig, {**document, **changes}, "test")


def test_a_network_is_trained_on_volumes_then_predicts_and_is_scored(tmp_path: Path) -> None:
    """Liver and lesion differ by the next slice alone."""
    roots = {}
    for name, seeds in (("train", [1, 2, 3, 4]), ("held-out", [11, 12])):
        roots[name] = str(tmp_path / name)
        api.ingest("lits", str(toy_volumes.tree(tmp_path / f"{name}-files", seeds)), roots[name], options=INLINE)
    seen: list[TrainProgress] = []
    data = {"scale": [1.0, 1.0], "crop": [16, 16]}
    config = train_config(tmp_path / "model", roots["train"], val_samples=roots["held-out"], data=data)
    result = train_on(config, seen.append)
    assert result.samples == 4 * 5 and np.mean([p.loss for p in seen[-5:]]) < 0.4 * np.mean([p.loss for p in seen[:5]])
    masks, metrics = str(tmp_path / "masks"), str(tmp_path / "metrics")
    assert segbatch.predict(result.reference, roots["held-out"], masks, options=INLINE).state.bad == 0
    api.evaluate(masks, roots["held-out"], metrics, protocol="semantic", options=INLINE)
    query = "SELECT value FROM summary WHERE metric = 'miou' AND class = '' AND slice = ''"
    scored = [r["value"] for r in api.query(metrics, query).to_pylist()]
    assert scored == [pytest.approx(result.val_miou)] and scored[0] > 0.9
    assert scored[0] > 0.6 + constant_background(roots["held-out"])


def constant_background(samples: str) -> float:
    """mIoU of a prediction that is background everywhere: its share of the pixels, and 0 for the two others."""
    counted = "SELECT c.value AS k, sum(c.pixels) AS n FROM samples, unnest(class_pixels) u(c) GROUP BY 1"
    pixels = {r["k"]: float(r["n"]) for r in api.query(samples, counted).to_pylist()}
    return pixels[0] / sum(pixels.values()) / 3


def test_volumes_of_all_sizes_are_trained_on(tmp_path: Path) -> None:
    """Of a single slice, gzipped, noise over the whole range: the drawn LiTS, whose test volumes have no labels."""
    samples = str(tmp_path / "samples")
    api.ingest("lits", str(generators.TREES["lits"](tmp_path / "tree")), samples, options=INLINE)
    model = {"kind": "unet", "width": 2, "depth": 2, "channels": 5, "hounsfield": [LOW, HIGH]}
    changes: dict[str, Any] = {"split": "train", "model": model, "optim": {"epochs": 2, "dtype": "float32"}}
    result = api.train(train_config(tmp_path / "model", samples, **changes))
    assert (result.samples, result.steps) == (13, 4)
    masks = segbatch.predict(result.reference, samples, str(tmp_path / "masks"), options=INLINE)
    assert masks.state.bad == 0 and masks.rows == 13 + 2 * 3
