"""Training on a toy: learning, resuming, refusing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_training as toy

from segbatch.config import parse
from segbatch.errors import ConfigError, DataError, EngineError, StoppedError
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.config import UNetConfig
from segbatch.training import TrainConfig, TrainProgress, TrainResult, train
from segbatch.training.crops import CropStream
from segbatch.training.losses import cross_entropy, sqrt_median_weights
from segbatch.training.samples import VOID, SampleSet
from segbatch.training.state import SamplesChangedError


def config(root: str, out: Path, **changes: Any) -> TrainConfig:
    """A few seconds' training; ``a__b`` in ``changes`` is the key ``a.b``."""
    document: dict[str, Any] = {
        "out": str(out),
        "samples": root,
        "split": "train",
        "seed": 1,
        "threads": 1,
        "checkpoint_every_s": 1000.0,
        "model": {"kind": "unet", "width": 4, "depth": 2},
        "data": {"crop": [16, 16]},
        "optim": {"epochs": 10, "batch_size": 4, "lr": 0.02, "dtype": "float32", "warmup_steps": 2, "ema": 0.9},
    }
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        (document[table] if table else document)[name] = value
    return parse(TrainConfig, document, "test")


def stop_after(steps: int) -> tuple[Callable[[TrainProgress], None], Callable[[], bool]]:
    seen: list[int] = []
    return lambda p: seen.append(p.step), lambda: seen[-1] >= steps


def weights(out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / "weights.pt", weights_only=True)
    return state


@pytest.mark.long
def test_a_toy_task_is_learned(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    seen: list[TrainProgress] = []
    changes = {"val_split": "val", "val_every_epochs": 10, "optim__epochs": 20}
    result = train(config(root, tmp_path / "out", **changes), seen.append)
    assert result.val_miou is not None and result.val_miou > 0.95
    assert set(result.val_iou) == {"dark", "bright"}
    assert (result.steps, result.samples, seen[-1].step, seen[-1].fraction) == (40, 8, 40, 1.0)
    assert result.cpu_s > 0 and result.reference == f"unet@{tmp_path}/out"
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [10, 20, 30, 40]
    assert [e["step"] for e in log if "val_miou" in e] == [20, 40, 40]
    assert not (tmp_path / "out" / "checkpoints" / "last.pt").exists()


def test_the_trained_model_predicts_label_ids(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    result = train(config(root, tmp_path / "out"))
    predictor = Predictor(registry.source(result.reference).load(1), 2)
    rgb, labels = toy.draw(500, (20, 28))
    found = predictor.predict(rgb)
    assert found.semantic is not None and (found.semantic == labels)[1:].mean() > 0.95
    assert found.class_confidence is not None and set(found.class_confidence) == {3, 900}


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data", val=0)
    whole = train(config(root, tmp_path / "whole"))
    for steps in (3, 11):
        with pytest.raises(StoppedError, match=f"after {steps} steps"):
            train(config(root, tmp_path / "cut"), *stop_after(steps))
    resumed = train(config(root, tmp_path / "cut"))
    assert (resumed.resumed_from, resumed.steps, resumed.loss) == (11, whole.steps, whole.loss)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("whole", "cut")]
    without_time = [[{**json.loads(line), "cpu_s": 0} for line in log] for log in logs]
    assert without_time[0] == without_time[1]


def test_a_finished_training_returns_at_once(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    first = train(config(root, tmp_path / "out", optim__epochs=1, val_split="val"))
    again = train(config(root, tmp_path / "out", optim__epochs=1, val_split="val"), lambda _: pytest.fail("trained"))
    assert again == replace(first, resumed_from=first.steps)


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    train(config(root, tmp_path / "out", optim__epochs=1))
    with pytest.raises(ConfigError, match=r"another training: train\.optim\.lr: 0\.02 -> 0\.5"):
        train(config(root, tmp_path / "out", optim__epochs=1, optim__lr=0.5))
    train(config(root, tmp_path / "out", optim__epochs=1, threads=2))


def test_other_samples_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    train(config(root, tmp_path / "finished", optim__epochs=1))
    with pytest.raises(StoppedError):
        train(config(root, tmp_path / "cut"), *stop_after(2))
    toy.toy(tmp_path / "data", train=5)
    with pytest.raises(SamplesChangedError, match=r"holds a model, .*choose another OUT, or delete it to train anew"):
        train(config(root, tmp_path / "finished", optim__epochs=1))
    with pytest.raises(ConfigError, match=r"unfinished training, and its samples have changed since it began .*delete"):
        train(config(root, tmp_path / "cut"))
    with pytest.raises(ConfigError, match=r"another training: samples: .*; train\.optim\.lr"):
        train(config(root, tmp_path / "cut", optim__lr=0.5))
    toy.toy(tmp_path / "data")
    assert train(config(root, tmp_path / "cut")).resumed_from == 2


@pytest.mark.parametrize("damage", ["cut", "foreign", "keys"])
def test_a_broken_checkpoint_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    root = toy.toy(tmp_path / "data")
    with pytest.raises(StoppedError):
        train(config(root, tmp_path / "out"), *stop_after(2))
    file = tmp_path / "out" / "checkpoints" / "last.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        found = torch.load(file, weights_only=True)
        torch.save({**found, "digest": "0"} if damage == "foreign" else {"step": 1}, file)
    words = {"cut": "not a readable torch file", "foreign": "another training", "keys": "not a training checkpoint"}
    with pytest.raises(ConfigError, match=rf"last\.pt.*{words[damage]}.*delete it"):
        train(config(root, tmp_path / "out"))


def test_a_loss_that_is_not_a_number_ends_the_training(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    with pytest.raises(EngineError, match=r"the loss is (nan|inf) at step \d+.*lower optim\.lr"):
        train(config(root, tmp_path / "out", optim__lr=1e30, optim__warmup_steps=0))


def test_rows_that_are_not_ok_are_skipped_and_counted(tmp_path: Path) -> None:
    broken = toy.row(50, status="truncated", semantic=None, height=None, width=None)
    other = toy.row(51, "val", status="truncated", semantic=None)
    root = toy.write(tmp_path / "data", [toy.row(0), broken, toy.row(1), other])
    result = train(config(root, tmp_path / "out", optim__epochs=1))
    assert (result.samples, dict(result.skipped)) == (2, {"truncated": 1})


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"semantic": None}, "missing-label", "train/9 has no label map"),
        ({"semantic": toy.draw(9, (8, 24))[1]}, "size-mismatch", "label map of 192 pixels, table 24x16"),
        ({"height": 24, "width": 16}, "size-mismatch", "photo 24x16"),
        ({"semantic": np.full(toy.SIZE, 77, np.uint16)}, "unknown-id", r"label ids \[77\]"),
        ({"image": b"\x89PNG not really"}, None, "sample train/9: not an image"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], code: str, words: str) -> None:
    root = toy.write(tmp_path / "data", [toy.row(0), toy.row(9, **changes)])
    with pytest.raises(DataError, match=words) as caught:
        train(config(root, tmp_path / "out"))
    assert code is None or caught.value.code == code


def test_wrong_configurations_are_refused_before_any_work(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    in_training: list[tuple[dict[str, Any], str]] = [
        ({"split": "tran"}, "no split tran.*train, val"),
        ({"data__crop": [16, 15]}, "15 is no multiple of 2.*take"),
        ({"samples": str(tmp_path / "none")}, "no samples table"),
    ]
    for changes, words in in_training:
        with pytest.raises(ConfigError, match=words):
            train(config(root, tmp_path / "out", **changes))
    in_the_file: list[tuple[dict[str, Any], str]] = [
        ({"optim__epochs": 0}, "has no end"),
        ({"optim__lrr": 1}, "did you mean lr"),
        ({"model__kind": "unett"}, "unet"),
        ({"data__scale": [2.0, 1.0]}, "scale"),
    ]
    for changes, words in in_the_file:
        with pytest.raises(ConfigError, match=words):
            config(root, tmp_path / "out", **changes)


@pytest.mark.long
def test_time_limits_end_a_training(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    result = train(config(root, tmp_path / "out", optim__epochs=0, optim__max_minutes=0.5 / 60))
    assert result.steps >= 1 and result.cpu_s < 10


def test_the_colour_table_is_trained_by_the_same_verb(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    result = train(config(root, tmp_path / "out", model={"kind": "color", "bits": 4}, val_split="val"))
    assert result.reference.startswith("color@") and result.loss is None
    assert result.val_miou is not None and result.val_miou > 0.95


def test_bfloat16_learns_too(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    result = train(config(root, tmp_path / "out", val_split="val", optim__dtype="bfloat16"))
    assert result.val_miou is not None and result.val_miou > 0.9


def stream(root: str, **changes: Any) -> CropStream:
    found = config(root, Path("/nowhere"), **changes)
    spec = ARCHITECTURES["unet"].input_spec(UNetConfig(width=2, depth=2))
    return CropStream(SampleSet(root, "train", 100), found.data, spec, (16, 32), found.seed)


def test_crops_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    whole = stream(root).batch(0, 20)
    parts = [stream(root).batch(k, 5) for k in (15, 0, 10, 5)]
    for part, first in zip(parts, (15, 0, 10, 5), strict=True):
        np.testing.assert_array_equal(part.images, whole.images[first : first + 5])
        assert part.classes is not None and whole.classes is not None
        np.testing.assert_array_equal(part.classes, whole.classes[first : first + 5])
    assert not np.array_equal(whole.images[:8], whole.images[8:16])


def test_photo_and_labels_stay_together_in_a_crop(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    still = {"data__brightness": 0.0, "data__contrast": 0.0, "data__color": 0.0}
    crops = stream(root, data__scale=[0.5, 2.0], **still).batch(0, 32)
    assert crops.classes is not None
    bright = crops.images.mean(-1) > crops.images[crops.classes != VOID].mean()
    known = crops.classes != VOID
    assert ((crops.classes == 1) == bright)[known].mean() > 0.93
    assert 0.3 < known.mean() < 0.99
    assert not crops.images[0][(crops.classes[0] == VOID) & ~bright[0] & (crops.images[0].sum(-1) == 0)].any()


def test_a_cache_without_room_reads_anew(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    kept, anew = SampleSet(root, "val", 100), SampleSet(root, "val", 0)
    kept.preload()
    anew.preload()
    for index in (2, 0, 1):
        np.testing.assert_array_equal(kept.get(index).image, anew.get(index).image)
        np.testing.assert_array_equal(kept.get(index).classes, anew.get(index).classes)
        assert kept.get(index) is kept.get(index) and anew.get(index) is not anew.get(index)


def test_photos_are_turned_upright_with_their_labels(tmp_path: Path) -> None:
    root = toy.write(tmp_path / "data", [toy.row(0), toy.row(0, sample_id="turned", exif_orientation=6)])
    samples = SampleSet(root, "train", 100)
    assert samples.smallest == (16, 16)
    np.testing.assert_array_equal(samples.get(1).image, np.rot90(samples.get(0).image, -1))
    plain, turned = samples.get(0).classes, samples.get(1).classes
    assert plain is not None and turned is not None
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def test_median_frequency_weights() -> None:
    pixels, where = np.array([100, 10, 0, 50]), np.array([200, 100, 0, 100])
    np.testing.assert_allclose(sqrt_median_weights(pixels, where), np.sqrt([1, 5, 1, 1]))


def test_the_loss_leaves_void_out() -> None:
    torch.manual_seed(0)
    logits, weights_of = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 2.0, 0.5])
    classes = torch.randint(0, 3, (2, 4, 5))
    classes[0] = VOID
    wanted = torch.nn.functional.cross_entropy(logits[1:], classes[1:], weights_of)
    assert float(cross_entropy(logits, classes, weights_of)) == pytest.approx(float(wanted), rel=1e-5)
    nothing = cross_entropy(logits.requires_grad_(), torch.full((2, 4, 5), VOID), weights_of)
    nothing.backward()  # type: ignore[no-untyped-call]
    assert float(nothing.detach()) == 0.0 and not logits.grad.any()  # type: ignore[union-attr]


def test_results_survive_a_round_trip_through_the_folder(tmp_path: Path) -> None:
    root = toy.toy(tmp_path / "data")
    result: TrainResult = train(config(root, tmp_path / "out", optim__epochs=1))
    record = json.loads((tmp_path / "out" / "model.json").read_text())
    assert record["training"]["config"]["optim"]["epochs"] == 1
    assert record["training"]["steps"] == result.steps
    assert [c["label_id"] for c in record["classes"]] == [3, 900]
