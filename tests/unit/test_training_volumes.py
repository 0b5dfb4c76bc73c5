"""Training on CT slices with their neighbours: what is read, crops, learning, refusing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_training as toy
import toy_volumes as ct
from numpy.typing import NDArray

from segbatch import tables
from segbatch.config import parse
from segbatch.errors import ConfigError, DataError, StoppedError
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.config import UNetConfig
from segbatch.records import PlanItem
from segbatch.stages.inputs import decoded, inputs
from segbatch.training import TrainConfig, TrainProgress, train
from segbatch.training.crops import CropStream
from segbatch.training.samples import SampleSet

SCALING = (2.0, -1024.0)


def config(root: str, out: Path, **changes: Any) -> TrainConfig:
    """A few seconds' training; ``a__b`` in ``changes`` is the key ``a.b``."""
    document: dict[str, Any] = {
        "out": str(out),
        "samples": root,
        "split": "train",
        "seed": 1,
        "threads": 1,
        "checkpoint_every_s": 1000.0,
        "model": {"kind": "unet", "width": 4, "depth": 2, "channels": 3, "hounsfield": ct.WINDOW},
        "data": {"crop": [16, 16], "scale": [1.0, 1.0]},
        "optim": {"epochs": 16, "batch_size": 4, "lr": 0.03, "dtype": "float32", "warmup_steps": 2, "ema": 0.9},
    }
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        (document[table] if table else document)[name] = value
    return parse(TrainConfig, document, "test")


def toy_set(root: Path) -> str:
    """Four volumes to train on, two to validate on."""
    return toy.write(root, [r for s in range(6) for r in ct.rows(s, "train" if s < 4 else "val")], ct.CLASSES)


def stored(root: str) -> list[dict[str, Any]]:
    """All rows, with where they lie."""
    found = []
    for part in tables.parts(tables.find(root, "samples")):
        for batch in tables.batches(part.uri, "samples", ["sample_id", "status"]):
            found += [{**row, "part": part.uri, "row": k} for k, row in enumerate(batch.to_pylist())]
    return found


def shown_to_prediction(root: str, slices: int) -> dict[str, NDArray[Any]]:
    """What ``predict`` shows a network, by sample."""
    items = []
    for part in tables.parts(tables.find(root, "samples")):
        rows = tables.count_rows(part.uri, "samples")
        items.append(PlanItem(sample_id="", uri=part.uri, etag="", bytes=0, row_start=0, rows=rows))
    return {i.sample_id: decoded(i, b"", 1 << 30)[0] for i in inputs(items, slices) if i.slices}


@pytest.mark.parametrize("cache_mb", [0, 100])
@pytest.mark.parametrize("slices", [1, 3, 7])
def test_training_sees_what_prediction_sees(tmp_path: Path, slices: int, cache_mb: int) -> None:
    """The second volume is cut over two parts, the third has a slice that cannot be used and real-valued scaling."""
    broken = {"status": "corrupt", "semantic": None, "image": None}
    third = ct.rows(3, slices=5, scaling=SCALING)
    third[2] |= broken
    root = toy.write(tmp_path, [*ct.rows(1), *ct.rows(2, slices=3), *third], ct.CLASSES)
    samples = SampleSet(root, "", cache_mb, slices=slices)
    samples.preload()
    wanted = shown_to_prediction(root, slices)
    assert len(samples) == len(wanted) == 11 and dict(samples.skipped) == {"corrupt": 1}
    for number in np.random.default_rng(0).permutation(len(samples)):
        for _ in range(2):
            found = samples.get(int(number))
            np.testing.assert_array_equal(found.image, wanted[samples.name(int(number))])
            assert found.image.dtype == np.float32 and found.image.shape == (*ct.SIZE, slices)


def test_neighbours_are_those_of_the_volume_within_its_part(tmp_path: Path) -> None:
    """Of the rows 0 1 2 3 | 4 5 of one volume, and its values against the drawing."""
    root = toy.write(tmp_path, [*ct.rows(1, slices=6, scaling=SCALING), *ct.rows(2, slices=2)], ct.CLASSES)
    pixels, labels = ct.draw(1, 6)
    units = pixels * np.float32(SCALING[0]) + np.float32(SCALING[1])
    samples = SampleSet(root, "", 0, slices=5)
    near = {0: (0, 0, 0, 1, 2), 2: (0, 1, 2, 3, 3), 3: (1, 2, 3, 3, 3), 4: (4, 4, 4, 5, 5)}
    for number, chosen in near.items():
        found = samples.get(number)
        assert samples.name(number) == f"volume-1/{number:04}"
        np.testing.assert_array_equal(found.image, units[list(chosen)].transpose(1, 2, 0))
        np.testing.assert_array_equal(found.classes, labels[number])


def test_slices_are_kept_once_and_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toy_set(tmp_path)
    reads: list[str] = []
    whole = tables.batches

    def counted(uri: str, *args: Any, **kwargs: Any) -> Any:
        reads.append(uri)
        return whole(uri, *args, **kwargs)

    kept, anew = SampleSet(root, "", 100, slices=3), SampleSet(root, "", 0, slices=3)
    monkeypatch.setattr(tables, "batches", counted)
    kept.preload()
    assert len(reads) == 2  # once through each part
    for index in range(len(kept)):
        kept.get(index)
    few = len(reads)
    for index in range(len(kept)):
        kept.get(index)
    assert few <= 4 and len(reads) == few  # where a part ends is looked up once
    anew.preload()
    reads.clear()
    for _ in range(2):
        anew.get(1)
    assert len(reads) == 2


def stream(root: str, slices: int = 3, **changes: Any) -> CropStream:
    found = config(root, Path("/nowhere"), **changes)
    low, high = ct.WINDOW
    spec = ARCHITECTURES["unet"].input_spec(
        UNetConfig(width=2, depth=2, channels=slices, hounsfield=(low, high)),
    )
    return CropStream(SampleSet(root, "train", 100, slices=slices), found.data, spec, (16, 24), found.seed)


def test_crops_are_windowed_and_keep_their_values(tmp_path: Path) -> None:
    root = toy_set(tmp_path)
    crops = stream(root, 5, data__flip=False).batch(0, 16)
    assert crops.images.shape == (16, *ct.SIZE, 5) and crops.classes is not None
    samples = SampleSet(root, "train", 0, slices=5)
    low, high = ct.WINDOW
    fed = [2 * np.clip((samples.get(k).image - low) / (high - low), 0, 1) - 1 for k in range(len(samples))]
    labels = [samples.get(k).classes for k in range(len(samples))]
    for image, classes in zip(crops.images, crops.classes, strict=True):
        at = int(np.argmin([np.abs(image - f).max() for f in fed]))
        np.testing.assert_allclose(image, fed[at], atol=1e-6)
        np.testing.assert_array_equal(classes, labels[at])


def test_zoom_mirror_and_bending_move_slices_and_labels_together(tmp_path: Path) -> None:
    """What is bright in the middle slice is no background, wherever it has gone."""
    root = toy_set(tmp_path)
    crops = stream(root, data__scale=[0.7, 1.5], data__elastic=1.0).batch(0, 48)
    assert crops.classes is not None
    known = crops.classes >= 0
    bright = crops.images[..., 1] > -0.1
    assert ((crops.classes > 0) == bright)[known].mean() > 0.93
    both = bright & (crops.images[..., 2] > -0.1)
    assert ((crops.classes == 2) == both)[known].mean() > 0.9
    assert 0.5 < known.mean() < 1


@pytest.mark.long
def test_what_no_single_slice_tells_is_learned_from_neighbours(tmp_path: Path) -> None:
    root = toy_set(tmp_path / "data")
    seen: list[TrainProgress] = []
    result = train(config(root, tmp_path / "near", val_split="val", val_every_epochs=8), seen.append)
    assert result.samples == 16 and result.val_miou is not None and result.val_miou > 0.9
    assert set(result.val_iou) == {"background", "liver", "lesion"}
    assert np.mean([p.loss for p in seen[-5:]]) < 0.4 * np.mean([p.loss for p in seen[:5]])
    alone = train(config(root, tmp_path / "alone", val_split="val", model__channels=1))
    assert alone.val_miou is not None and alone.val_miou < 0.7


def test_the_trained_model_says_what_it_is_fed(tmp_path: Path) -> None:
    """Its folder alone gives the figure that validation gave."""
    root = toy_set(tmp_path / "data")
    result = train(config(root, tmp_path / "out", val_split="val", model__channels=5))
    source = registry.source(result.reference)
    assert (source.describe().input.slices, source.describe().input.window) == (5, tuple(ct.WINDOW))
    predictor, samples = Predictor(source.load(1), 2), SampleSet(root, "val", 0, slices=5)
    hits, union = np.zeros(3), np.zeros(3)
    for number in range(len(samples)):
        found = samples.get(number)
        guess = predictor.predict(found.image).semantic
        for k in range(3):
            hits[k] += np.count_nonzero((guess == k) & (found.classes == k))
            union[k] += np.count_nonzero((guess == k) | (found.classes == k))
    assert result.val_miou == pytest.approx(float(np.mean(hits / union)))


def stop_after(steps: int) -> tuple[Callable[[TrainProgress], None], Callable[[], bool]]:
    seen: list[int] = []
    return lambda p: seen.append(p.step), lambda: seen[-1] >= steps


@pytest.mark.long
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    root = toy_set(tmp_path / "data")
    short = {"optim__epochs": 3, "data__elastic": 1.0, "data__scale": [0.8, 1.2]}
    train(config(root, tmp_path / "whole", **short))
    with pytest.raises(StoppedError):
        train(config(root, tmp_path / "cut", **short), *stop_after(5))
    resumed = train(config(root, tmp_path / "cut", data__cache_mb=0, **short))
    assert resumed.resumed_from == 5
    whole, cut = (torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("kind", ["fcn", "segnet", "unet_valid", "patch"])
def test_every_semantic_network_takes_slices(tmp_path: Path, kind: str) -> None:
    root = toy_set(tmp_path / "data")
    small: dict[str, dict[str, Any]] = {
        "fcn": {"width": 0.01},
        "segnet": {"variant": "basic", "width": 0.1},
        "unet_valid": {"width": 2, "depth": 2},
        "patch": {"window": 16, "kernels": [3, 2], "maps": 4, "hidden": 8},
    }
    model = {"kind": kind, "channels": 5, "hounsfield": ct.WINDOW, **small[kind]}
    changes = {"optim__epochs": 1, "data__crop": None, "val_split": "val"}
    result = train(config(root, tmp_path / "out", model=model, **changes))
    assert result.steps == 4 and result.val_miou is not None


def test_slices_that_are_all_background_are_samples(tmp_path: Path) -> None:
    empty = [ct.rows(7, split, semantic=np.zeros(ct.SIZE, np.uint16)) for split in ("train", "val")]
    root = toy.write(tmp_path / "data", [*empty[0], *empty[1]], ct.CLASSES)
    result = train(config(root, tmp_path / "out", val_split="val", optim__epochs=20))
    background = result.val_iou["background"]
    assert result.samples == 4 and background is not None and background > 0.95
    assert result.loss is not None and result.loss < 0.5


def test_networks_and_samples_must_be_of_one_kind(tmp_path: Path) -> None:
    slices, photos = toy_set(tmp_path / "ct"), toy.toy(tmp_path / "photos")
    out = tmp_path / "out"
    for model in ({"kind": "unet", "width": 4, "depth": 2}, {"kind": "color"}):
        with pytest.raises(ConfigError, match=r"holds slices of CT volumes \(volume-0/0000\).*model\.hounsfield"):
            train(config(slices, out, model=model))
    with pytest.raises(ConfigError, match=r"holds photos \(train/0\), and model\.hounsfield is for .*leave"):
        train(config(photos, out))
    with pytest.raises(ConfigError, match=r"holds photos \(val/100\)"):
        train(config(slices, out, val_samples=photos, val_split="val"))
    assert not out.exists()


def test_light_is_for_photos(tmp_path: Path) -> None:
    for name in ("brightness", "contrast", "color"):
        with pytest.raises(ConfigError, match=rf"data\.{name} is for photos; Hounsfield units stay as they are"):
            config("samples", tmp_path, **{f"data__{name}": 0.1})
        config("samples", tmp_path, **{f"data__{name}": 0.0})


def test_weights_of_photos_fit_three_channels(tmp_path: Path) -> None:
    model = {"kind": "unet", "encoder": "efficientnet_lite0", "hounsfield": ct.WINDOW}
    with pytest.raises(
        ConfigError, match=r"channels 5: the ImageNet weights .* are for 3; set model\.pretrained = false"
    ):
        config("samples", tmp_path, model={**model, "channels": 5})
    config("samples", tmp_path, model={**model, "channels": 5, "pretrained": False})
    config("samples", tmp_path, model={**model, "channels": 3})


@pytest.mark.parametrize("kind", ["maskrcnn", "panoptic_fpn"])
def test_networks_of_objects_see_photos_alone(tmp_path: Path, kind: str) -> None:
    root = toy.toy_things(tmp_path / "data")
    with pytest.raises(ConfigError, match=rf"{kind} sees photos, which have 3 channels: model\.channels = 5.*leave"):
        train(config(root, tmp_path / "out", model={"kind": kind, "channels": 5}))
    with pytest.raises(ConfigError, match="hounsfield"):
        config(root, tmp_path / "out", model={"kind": kind, "hounsfield": ct.WINDOW})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"image": b"\x89PNG not really"}, None, "sample volume-9/0000: a slice of .*volume-9"),
        ({"image": None}, "missing-image", "sample volume-9/0000 has no pixels"),
        ({"semantic": None}, "missing-label", "volume-9/0000 has no label map"),
        ({"semantic": np.full(ct.SIZE, 77, np.uint16)}, "unknown-id", r"label ids \[77\]"),
        ({"height": 8}, "size-mismatch", "sample volume-9/0000: .*sizes 24x8 and 24x16"),
    ],
)
def test_a_slice_that_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, Any], code: str | None, words: str
) -> None:
    bad = ct.rows(9)
    bad[0] |= changes
    root = toy.write(tmp_path, bad, ct.CLASSES)
    with pytest.raises(DataError, match=words) as caught:
        SampleSet(root, "", 0, slices=3).get(0)
    assert code is None or caught.value.code == code
