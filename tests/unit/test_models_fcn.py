"""FCN against its paper: counts, geometry, bilinear up-sampling, the three networks in turn."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import network_checks as check
import pytest
import torch
import toy_training as toy
from torch import nn

from segbatch.config import parse
from segbatch.errors import ConfigError
from segbatch.models import checkpoint
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.config import FCNConfig
from segbatch.models.fcn import (
    CROPS,
    FCN,
    PADDING,
    POOL3_CROP,
    POOL4_CROP,
    bilinear_kernel,
    upsampling,
    warm_start,
)
from segbatch.models.vgg import STAGES
from segbatch.training import TrainConfig, train

SMALL = 0.03
VGG = 14_714_688
"""Weights and biases of the 13 convolutions."""


def fcn(stride: int, classes: int = 3, width: float = SMALL, **options: Any) -> FCN:
    net = check.made("fcn", classes, stride=stride, width=width, **options)
    assert isinstance(net, FCN)
    return net


def counted(stride: int, classes: int) -> int:
    trunk = VGG + (512 * 49 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * classes
    last = classes**2 * (2 * stride) ** 2
    if stride == 32:
        return trunk + last
    skips = (512 + 1) * classes + classes**2 * 4**2
    if stride == 8:
        skips += (256 + 1) * classes + classes**2 * 4**2
    return trunk + skips + last


@pytest.mark.parametrize(("stride", "known"), [(32, 136_152_917), (16, 134_815_994), (8, 134_489_759)])
def test_the_number_of_parameters_and_the_work_are_the_papers(stride: int, known: int) -> None:
    inputs = (3, *(c for stage in STAGES for c in stage))
    assert sum(9 * i * o + o for i, o in pairwise(inputs)) == VGG
    with torch.device("meta"):
        net = ARCHITECTURES["fcn"].build(FCNConfig(stride=stride), check.table(21))
    assert check.parameters(net) == counted(stride, 21) == known
    assert check.multiply_adds(net, (500, 500)) / 1e9 == pytest.approx(181, rel=0.01)


def scores_that_see(row: int, height: int) -> list[int]:
    """Rows of fc7's scores that one row of an image of that height reaches."""
    net = fcn(32, 1, 0.001)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    scores: list[torch.Tensor] = []
    net.score.register_forward_hook(lambda _m, _i, out: scores.append(out))
    image = torch.zeros(1, 3, height, 1)
    image[:, :, row] = 1
    with torch.inference_mode():
        net(image)
    return scores[0].amax((0, 1, 3)).nonzero().flatten().tolist()


def test_a_score_sees_404_pixels_at_a_stride_of_32_and_lies_in_their_middle() -> None:
    pads = sum(len(stage) << level for level, stage in enumerate(STAGES)) - 1  # all but the first convolution's
    first = -100 - pads  # row that the first score begins with
    assert first == -189
    for score in (6, 7):
        begin, end = first + 32 * score, first + 32 * score + 404
        seen = [score in scores_that_see(row, 480) for row in (begin - 1, begin, end - 1, end)]
        assert seen == [False, True, True, False]
    middle_of_the_first_kernel = (64 - 1) / 2 - CROPS[32]
    assert first + (404 - 1) / 2 == middle_of_the_first_kernel


def pooled_centre(level: int, unit: float) -> float:
    """Row of the image in the middle of a unit behind that pooling: stride 2^level, first convolution padded by 100."""
    stride = 1 << level
    return stride * unit + (stride - 1) / 2 - PADDING + 1


def up_sampled(unit: float, stride: int) -> float:
    """Where a unit of an up-sampling lies among the units that it is made from."""
    return (unit - (2 * stride - 1) / 2) / stride


def test_the_crops_put_scores_on_each_other_and_on_the_image() -> None:
    def score32(unit: float) -> float:
        return pooled_centre(5, unit + 3)  # the middle of fc6's seven

    def score16(unit: float) -> float:
        return score32(up_sampled(unit, 2))

    def score8(unit: float) -> float:
        return score16(up_sampled(unit, 2))

    assert pooled_centre(4, 0 + POOL4_CROP) == score16(0)
    assert pooled_centre(3, 0 + POOL3_CROP) == score8(0)
    for stride, score in ((32, score32), (16, score16), (8, score8)):
        assert score(up_sampled(CROPS[stride], stride)) == 0


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_any_size_gives_logits_of_that_size(stride: int) -> None:
    check.takes_any_size(fcn(stride))


@pytest.mark.parametrize("stride", [2, 8, 16, 32])
def test_up_sampling_is_bilinear(stride: int) -> None:
    layer = upsampling(2, stride)
    coarse = torch.rand(1, 2, 5, 6)
    with torch.inference_mode():
        fine = layer(coarse)[..., stride // 2 : -stride // 2, stride // 2 : -stride // 2]
    wanted = nn.functional.interpolate(coarse, scale_factor=stride, mode="bilinear", align_corners=False)
    inner = (..., slice(stride, -stride), slice(stride, -stride))
    torch.testing.assert_close(fine[inner], wanted[inner])


def test_the_bilinear_kernel() -> None:
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(bilinear_kernel(4), line[:, None] * line)


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_first_weights(stride: int) -> None:
    net = ARCHITECTURES["fcn"].build(FCNConfig(stride=stride, width=SMALL), check.table(3))
    zero = {n for n, p in net.named_parameters() if not p.any() and n.endswith("weight")}
    wanted = {32: set(), 16: {"score_pool4"}, 8: {"score_pool4", "score_pool3"}}[stride] | {"score"}
    assert zero == {f"{n}.weight" for n in wanted}
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["upscore.weight"]


def test_a_zero_skip_changes_nothing_but_the_interpolation() -> None:
    coarse, finer = fcn(32), fcn(16)
    fresh = warm_start(finer, coarse.state_dict(), "coarse")
    assert fresh == ["upscore2.weight", "score_pool4.weight", "score_pool4.bias"]
    for name in ("score_pool4.weight", "score_pool4.bias"):
        nn.init.zeros_(finer.get_parameter(name))
    with torch.no_grad():
        finer.upscore2.weight.copy_(upsampling(3, 2).weight)
        batch = check.photos(2, (130, 97))
        error = (finer(batch) - coarse(batch)).abs().mean() / coarse(batch).abs().mean()
    assert error < 0.1  # 2x then 16x bilinear against 32x bilinear


def test_training_goes_32s_16s_8s(tmp_path: Path) -> None:
    kept: dict[int, set[str]] = {}
    previous = ""
    for stride in (32, 16, 8):
        config = FCNConfig(stride=stride, width=SMALL, warm_start=previous)
        net = fcn(stride, seed=stride)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        ARCHITECTURES["fcn"].begin(net, config)
        kept[stride] = {k for k, v in net.state_dict().items() if torch.equal(v, before[k])}
        nn.init.uniform_(net.get_parameter("upscore2.weight" if stride == 16 else "score.weight"))
        previous = str(tmp_path / str(stride))
        checkpoint.write(previous, net, "fcn", config, check.CLASSES, {})
    assert kept[32] == set(fcn(32).state_dict())
    assert kept[16] == {"upscore2.weight", "score_pool4.weight", "score_pool4.bias", "upscore.weight"}
    assert kept[8] == {"upscore_pool4.weight", "score_pool3.weight", "score_pool3.bias", "upscore.weight"}


def test_a_training_begins_with_the_coarser_weights(tmp_path: Path) -> None:
    still = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0, "ema": 0.0, "dtype": "float32"}
    document: dict[str, Any] = {
        "out": str(tmp_path / "16"),
        "samples": toy.toy(tmp_path / "data", train=2, val=0),
        "threads": 1,
        "model": {"kind": "fcn", "stride": 16, "width": SMALL, "warm_start": str(tmp_path / "32")},
        "optim": {**still, "batch_size": 2},
    }
    coarse = fcn(32, classes=2)
    checkpoint.write(str(tmp_path / "32"), coarse, "fcn", FCNConfig(stride=32, width=SMALL), toy.CLASSES, {})
    train(parse(TrainConfig, document, "test"))
    trained = checkpoint.read(str(tmp_path / "16"))
    state = checkpoint.read_state(trained.weights, trained.uri)
    for name in ("stages.0.conv1.weight", "fc6.weight", "score.bias"):
        torch.testing.assert_close(state[name], coarse.state_dict()[name], atol=1e-9, rtol=0)
    document["model"]["warm_start"] = str(tmp_path / "none")
    with pytest.raises(ConfigError, match="none is not a trained model"):
        train(parse(TrainConfig, {**document, "out": str(tmp_path / "8")}, "test"))


def test_a_warm_start_from_something_else_is_refused() -> None:
    net = fcn(16)
    with pytest.raises(ConfigError, match=r"is no FCN: stages\.0\.conv1\.weight and 31 more"):
        warm_start(net, nn.Conv2d(1, 1, 1).state_dict(), "here")
    with pytest.raises(ConfigError, match=r"other classes: score\.weight is \(5, .* instead of \(3,"):
        warm_start(net, fcn(32, classes=5).state_dict(), "here")


@pytest.mark.long
def test_torch_export() -> None:
    check.exports_for_any_size(fcn(8))


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_its_folder(tmp_path: Path, stride: int) -> None:
    check.survives_its_folder(fcn(stride), tmp_path, "fcn", stride=stride, width=SMALL)


@pytest.mark.long
def test_it_learns() -> None:
    net = check.fresh("fcn", width=SMALL, dropout=0.1)
    assert check.accuracy_after(net, 40, 0.01) > 0.9
