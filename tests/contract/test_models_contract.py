"""What holds for every architecture: trained, saved, loaded, described, run on any size."""

import pickle
from typing import Any

import numpy as np
import pytest
import toy_training as toy

from segbatch.codecs import rle
from segbatch.config import parse
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry
from segbatch.models.base import Detections, PanopticParts
from segbatch.models.registry import ModelSource
from segbatch.records import Prediction
from segbatch.training import TrainConfig, train

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"width": 2, "depth": 2},
    "color": {"bits": 3},
    "fcn": {"width": 0.02},
    "segnet": {"width": 0.05},
    "deeplab": {"width": 0.02},
    "unet_valid": {"width": 2, "depth": 3},
    "patch": {"window": 15, "kernels": [4, 5], "maps": 4, "hidden": 8},
    "maskrcnn": {"width": 0.05, "short_side": 64, "longest": 96},
    "instancefcn": {"width": 0.05, "short_side": 64, "longest": 96},
    "panoptic_fpn": {"width": 0.05, "short_side": 64, "longest": 96},
}
"""A small configuration of each architecture; its defaults where it is not named."""

NEEDS = {"deeplab": "timm", "maskrcnn": "torchvision", "panoptic_fpn": "torchvision"}
"""Packages of extras."""


@pytest.fixture(scope="module", params=sorted(registry.ARCHITECTURES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    document = {
        "out": str(folder / "out"),
        "samples": toy.toy_things(folder / "data", train=4, val=0),
        "threads": 1,
        "model": {"kind": request.param, **SMALL.get(request.param, {})},
        "optim": {"epochs": 3, "batch_size": 2},
    }
    return registry.source(train(parse(TrainConfig, document, "test")).reference)


def test_it_has_a_name_a_summary_and_a_configuration(trained: ModelSource) -> None:
    name = trained.reference.split("@")[0]
    entry = registry.ARCHITECTURES[name]
    assert entry.summary and entry.config.model_fields["kind"].default == name


def test_describe_and_load_agree(trained: ModelSource) -> None:
    spec = trained.describe()
    assert spec == trained.load(1).spec == pickle.loads(pickle.dumps(trained)).describe()
    things = [toy.BRIGHT] if spec.task == "instance" else [toy.DARK, toy.BRIGHT]
    assert spec.digest and [c.label_id for c in spec.classes.classes] == things


@pytest.mark.long
@pytest.mark.parametrize("size", [(16, 24), (1, 1), (7, 50)])
def test_it_predicts_for_any_size(trained: ModelSource, size: tuple[int, int]) -> None:
    predictor = Predictor(trained.load(1), 2)
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for found in map(predictor.finish, predictor.forward([predictor.prepare(rgb)] * 3)):
        CHECKS[predictor.spec.task](found, size)


def semantic_is_sound(found: Prediction, size: tuple[int, int]) -> None:
    assert found.semantic is not None and found.semantic.shape == size and found.semantic.dtype == np.uint16
    shown = set(np.unique(found.semantic).tolist())
    assert shown <= {toy.DARK, toy.BRIGHT}
    assert found.class_confidence is None or set(found.class_confidence) == shown
    assert found.instances is None and found.panoptic is None


def instances_are_sound(found: Prediction, size: tuple[int, int]) -> None:
    assert found.instances is not None and found.semantic is None
    for one in found.instances:
        rle.check(one.counts, *size)
        assert one.category_id == toy.BRIGHT and one.score is not None and 0 <= one.score <= 1
        assert one.area == rle.area(one.counts)
    scores = [one.score for one in found.instances]
    assert scores == sorted(scores, key=lambda s: -(s or 0))


def panoptic_is_sound(found: Prediction, size: tuple[int, int]) -> None:
    assert found.panoptic is not None and found.segments is not None and found.semantic is None
    assert found.panoptic.shape == size and found.panoptic.dtype == np.uint16
    assert set(np.unique(found.panoptic).tolist()) - {0} == set(range(1, len(found.segments) + 1))
    areas = np.bincount(found.panoptic.ravel(), minlength=len(found.segments) + 1)[1:]
    assert [s.area for s in found.segments] == areas.tolist()


CHECKS = {"semantic": semantic_is_sound, "instance": instances_are_sound, "panoptic": panoptic_is_sound}


def parts_of(raw: Any) -> list[np.ndarray]:
    """The arrays of one image's raw result."""
    if isinstance(raw, Detections):
        return [raw.boxes, raw.scores, raw.classes, raw.masks]
    if isinstance(raw, PanopticParts):
        return [raw.logits, *parts_of(raw.detections)]
    return [raw]


def test_the_place_in_a_batch_does_not_matter(trained: ModelSource) -> None:
    segmenter = trained.load(1)
    photos = [toy.draw(i)[0] for i in range(4)]
    outputs = []
    for batch_size in (1, 4):
        predictor = Predictor(segmenter, batch_size)
        outputs.append([r.output for r in predictor.forward([predictor.prepare(p) for p in photos])])
    for alone, together in zip(*outputs, strict=True):
        for a, b in zip(parts_of(alone), parts_of(together), strict=True):
            largest = max(1.0, float(np.abs(a).max(initial=0)))  # boxes: pixels; logits of an untrained net: tens
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest)


def test_the_output_is_as_the_spec_says(trained: ModelSource) -> None:
    segmenter = trained.load(1)
    spec, predictor = segmenter.spec, Predictor(segmenter, 1)
    [out] = segmenter.forward(predictor.prepare(toy.draw(0)[0]).tensor[None])
    if spec.output == "labels":
        assert out.ndim == 2 and out.dtype.kind in "iu"
    elif spec.output == "logits":
        assert out.shape[0] == len(spec.classes.classes) and out.dtype == np.float32
    else:
        assert isinstance(out, {"detections": Detections, "panoptic": PanopticParts}[spec.output])
        found = out if isinstance(out, Detections) else out.detections
        count = len(found.scores)
        assert found.boxes.shape == (count, 4) and found.classes.shape == (count,) and found.masks.ndim == 3
        assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == np.float32
