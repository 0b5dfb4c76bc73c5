"""Pre- and post-processing against plain numpy and torch."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from segbatch.errors import ConfigError, DataError
from segbatch.inference.pipeline import Predictor, auto_batch_size
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.models.config import UNetConfig
from segbatch.models.network import TorchSegmenter
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable

THREE = ClassTable(tuple(ClassInfo(i, f"c{i}") for i in (4, 7, 900)))


def spec_of(output: Any = "logits", classes: ClassTable = THREE, **input_spec: Any) -> ModelSpec:
    base = InputSpec(layout="nhwc", dtype="float32", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return ModelSpec("m", "semantic", classes, replace(base, **input_spec), output, "d")


@dataclass
class Fake:
    """Answers with ``function`` of the batch, and remembers the shapes it was given."""

    spec: ModelSpec
    function: Any
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        self.shapes.append(batch.shape)
        result: NDArray[Any] = self.function(batch)
        return result


def colours(batch: NDArray[Any]) -> NDArray[Any]:
    """Logits: ten times the three colour channels."""
    return np.ascontiguousarray(np.moveaxis(batch, -1, 1) * 10)


def photo(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(predictor: Predictor, *photos: NDArray[np.uint8]) -> list[Any]:
    found = [predictor.finish(r) for r in predictor.forward([predictor.prepare(p) for p in photos])]
    return [(f.semantic, f.class_confidence) for f in found]


def test_a_raw_uint8_network_is_fed_the_photo_itself() -> None:
    predictor = Predictor(Fake(spec_of("labels", dtype="uint8"), lambda b: b[..., 0] % 3), 1)
    rgb = photo(0, 5, 7)
    prepared = predictor.prepare(rgb)
    assert np.shares_memory(prepared.tensor, rgb)
    [(label_map, confidence)] = run(predictor, rgb)
    assert confidence is None
    np.testing.assert_array_equal(label_map, np.array([4, 7, 900], np.uint16)[rgb[..., 0] % 3])


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_normalisation_and_padding_with_the_mean(layout: str) -> None:
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.25, 2.0)
    predictor = Predictor(Fake(spec_of(layout=layout, divisor=8, mean=mean, std=std), colours), 1)
    rgb = photo(1, 5, 9)
    tensor = predictor.prepare(rgb).tensor
    fed = tensor if layout == "nhwc" else np.moveaxis(tensor, 0, -1)
    assert fed.shape == (8, 16, 3) and fed.dtype == np.float32 and tensor.flags.c_contiguous
    np.testing.assert_allclose(fed[:5, :9], (rgb / 255 - mean) / std, atol=1e-6)
    assert not fed[5:].any() and not fed[:, 9:].any()


def test_padding_of_a_uint8_network_has_the_mean_colour() -> None:
    predictor = Predictor(Fake(spec_of("labels", dtype="uint8", divisor=4, mean=(1.0, 0.5, 0.0)), None), 1)
    assert predictor.prepare(photo(0, 3, 4)).tensor[3, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (33, 17)])
def test_labels_and_confidence_of_full_size_logits(size: tuple[int, int]) -> None:
    rgb = photo(2, *size)
    [(label_map, confidence)] = run(Predictor(Fake(spec_of(divisor=16), colours), 1), rgb)
    probability = torch.softmax(torch.from_numpy(rgb / 255 * 10), -1).numpy()
    winner = rgb.argmax(-1)
    assert label_map.dtype == np.uint16
    np.testing.assert_array_equal(label_map, np.array([4, 7, 900])[winner])
    wanted = {k: probability[winner == i, i].mean() for i, k in enumerate((4, 7, 900)) if (winner == i).any()}
    assert confidence == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("size", "divisor"), [((24, 32), 1), ((23, 30), 8)])
def test_logits_of_a_stride_are_interpolated_like_torch(size: tuple[int, int], divisor: int) -> None:
    def strided(batch: NDArray[Any]) -> NDArray[Any]:
        return F.avg_pool2d(torch.from_numpy(colours(batch)), 4, ceil_mode=True).numpy()

    predictor = Predictor(Fake(spec_of(divisor=divisor), strided), 1)
    rgb = photo(3, *size)
    [(label_map, _)] = run(predictor, rgb)
    prepared = predictor.prepare(rgb)
    logits = torch.from_numpy(strided(prepared.tensor[None]))
    full = F.interpolate(logits, size=prepared.tensor.shape[:2], mode="bilinear", align_corners=False)
    wanted = full[0, :, : size[0], : size[1]].argmax(0).numpy()
    np.testing.assert_array_equal(label_map, np.array([4, 7, 900])[wanted])


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_a_stretched_photo_comes_back_on_its_own_grid(output: str) -> None:
    def halves(batch: NDArray[Any]) -> NDArray[Any]:
        labels = (batch[..., 0] > 0.5).astype(np.int64)
        return labels if output == "labels" else np.stack([1.0 - labels, labels * 1.0, labels * 0.0], 1)

    predictor = Predictor(Fake(spec_of(output, resize="stretch", height=10, width=20), halves), 1)
    rgb = np.zeros((40, 50, 3), np.uint8)
    rgb[:, 25:] = 255
    [(label_map, _)] = run(predictor, rgb)
    assert label_map.shape == (40, 50)
    np.testing.assert_array_equal(label_map, np.where(np.arange(50) < 25, 4, 7)[None].repeat(40, 0))


def test_equal_shapes_share_a_batch_and_order_is_kept() -> None:
    fake = Fake(spec_of(), colours)
    sizes = [(4, 4), (2, 6), (4, 4), (4, 4), (2, 6)]
    photos = [photo(i, *s) for i, s in enumerate(sizes)]
    results = run(Predictor(fake, 2), *photos)
    assert sorted(fake.shapes) == [(1, 4, 4, 3), (2, 2, 6, 3), (2, 4, 4, 3)]
    for rgb, (label_map, _) in zip(photos, results, strict=True):
        np.testing.assert_array_equal(label_map, np.array([4, 7, 900])[rgb.argmax(-1)])


def test_without_a_class_table_indices_are_ids() -> None:
    predictor = Predictor(
        Fake(spec_of("labels", ClassTable(()), dtype="uint8"), lambda b: b[..., 1].astype(np.int64)), 1
    )
    rgb = photo(4, 3, 3)
    np.testing.assert_array_equal(run(predictor, rgb)[0][0], rgb[..., 1])


def test_classes_beyond_the_table_are_data_errors() -> None:
    for value in (3, -1):
        fake = Fake(spec_of("labels", dtype="uint8"), lambda b, v=value: np.full(b.shape[:3], v))
        with pytest.raises(DataError, match=f"class {value}, its class table has 3") as caught:
            run(Predictor(fake, 1), photo(0, 2, 2))
        assert caught.value.code == "unknown-class"
    two = Fake(spec_of(), lambda b: colours(b)[:, :2])
    with pytest.raises(DataError, match="2 channels"):
        run(Predictor(two, 1), photo(0, 2, 2))


def test_not_a_number_is_a_data_error() -> None:
    with pytest.raises(DataError) as caught:
        run(Predictor(Fake(spec_of(), lambda b: colours(b) * np.nan), 1), photo(0, 2, 2))
    assert caught.value.code == "not-a-number"


def test_wrong_settings_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="batch size 0"):
        Predictor(Fake(spec_of(), colours), 0)
    with pytest.raises(ConfigError, match="names no size"):
        Predictor(Fake(spec_of(resize="stretch"), colours), 1)
    with pytest.raises(ConfigError, match="65535"):
        Predictor(Fake(spec_of(classes=ClassTable((ClassInfo(70000, "x"),))), colours), 1)


def test_automatic_batch_sizes() -> None:
    assert auto_batch_size(spec_of()) == 1
    assert auto_batch_size(spec_of(resize="stretch", height=256, width=256)) == 4
    assert auto_batch_size(spec_of(resize="stretch", height=513, width=513)) == 2


@pytest.mark.parametrize("size", [(321, 513), (1, 1), (7, 200)])
@pytest.mark.parametrize("config", [UNetConfig(width=2, depth=5), UNetConfig(width=2, depth=2)])
@pytest.mark.long
def test_a_u_net_takes_any_size(config: UNetConfig, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    segmenter = TorchSegmenter(UNet(config, 3), spec_of(divisor=1 << (config.depth - 1)))
    [(label_map, confidence)] = run(Predictor(segmenter, 1), photo(5, *size))
    assert label_map.shape == size and set(np.unique(label_map)) <= {4, 7, 900}
    assert confidence and all(0.333 <= v <= 1.0001 for v in confidence.values())


def test_the_place_in_a_batch_does_not_matter() -> None:
    torch.manual_seed(0)
    segmenter = TorchSegmenter(UNet(UNetConfig(width=4, depth=3), 3), spec_of(divisor=4))
    photos = [photo(i, 36, 40) for i in range(5)]
    predictors = [Predictor(segmenter, n) for n in (1, 2, 5)]
    raws = [[r.output for r in p.forward([p.prepare(x) for x in photos])] for p in predictors]
    for other in raws[1:]:
        np.testing.assert_allclose(np.stack(other), np.stack(raws[0]), atol=1e-4)
