"""What holds for every architecture: trained, saved, loaded, described, run on any size."""

import pickle
from typing import Any

import numpy as np
import pytest
import toy_training as toy

from segbatch.config import parse
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry
from segbatch.models.registry import ModelSource
from segbatch.training import TrainConfig, train

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"width": 2, "depth": 2},
    "color": {"bits": 3},
    "fcn": {"width": 0.02},
    "segnet": {"width": 0.05},
    "deeplab": {"width": 0.02},
    "unet_valid": {"width": 2, "depth": 3},
    "patch": {"window": 15, "kernels": [4, 5], "maps": 4, "hidden": 8},
}
"""A small configuration of each architecture; its defaults where it is not named."""

NEEDS = {"deeplab": "timm"}
"""Packages of extras."""


@pytest.fixture(scope="module", params=sorted(registry.ARCHITECTURES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    document = {
        "out": str(folder / "out"),
        "samples": toy.toy(folder / "data", train=4, val=0),
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
    assert spec.digest and [c.label_id for c in spec.classes.classes] == [3, 900]


@pytest.mark.parametrize("size", [(16, 24), (1, 1), (7, 50)])
def test_it_gives_label_ids_for_any_size(trained: ModelSource, size: tuple[int, int]) -> None:
    predictor = Predictor(trained.load(1), 2)
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for label_map, confidence in map(predictor.finish, predictor.forward([predictor.prepare(rgb)] * 3)):
        assert label_map.shape == size and label_map.dtype == np.uint16
        assert set(np.unique(label_map).tolist()) <= {3, 900}
        assert confidence is None or set(confidence) == set(np.unique(label_map).tolist())


def test_the_place_in_a_batch_does_not_matter(trained: ModelSource) -> None:
    segmenter = trained.load(1)
    photos = [toy.draw(i)[0] for i in range(4)]
    outputs = []
    for batch_size in (1, 4):
        predictor = Predictor(segmenter, batch_size)
        outputs.append([r.output for r in predictor.forward([predictor.prepare(p) for p in photos])])
    np.testing.assert_allclose(np.stack(outputs[0]), np.stack(outputs[1]), atol=1e-4)


def test_the_output_is_as_the_spec_says(trained: ModelSource) -> None:
    segmenter = trained.load(1)
    predictor = Predictor(segmenter, 1)
    tensor = predictor.prepare(toy.draw(0)[0]).tensor
    out = segmenter.forward(tensor[None])
    if segmenter.spec.output == "labels":
        assert out.ndim == 3 and out.dtype.kind in "iu"
    else:
        assert out.shape[:2] == (1, len(segmenter.spec.classes.classes)) and out.dtype == np.float32
