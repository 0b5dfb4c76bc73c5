"""DeepLab v3+ against its paper: counts, work, strides and rates, geometry."""

import builtins
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import network_checks as check
import pytest
import torch
from torch import nn

from segbatch.errors import ConfigError
from segbatch.models.config import DeepLabConfig
from segbatch.models.deeplab import DeepLab, backbone, enlarged

timm = pytest.importorskip("timm")

SMALL = 0.03


def deeplab(**options: Any) -> DeepLab:
    net = check.made("deeplab", **{"width": SMALL, **options})
    assert isinstance(net, DeepLab)
    return net


def full(**options: Any) -> DeepLab:
    with torch.device("meta"):
        return DeepLab(DeepLabConfig(**options), 21)


def head(classes: int) -> int:
    """The parameters that are not the backbone's, with 2048 and 256 channels coming in."""

    def convolution(i: int, o: int) -> int:
        return i * o + 2 * o

    def separable(i: int, o: int) -> int:
        return 9 * i + 2 * i + convolution(i, o)

    pyramid = 2 * convolution(2048, 256) + 3 * separable(2048, 256) + convolution(5 * 256, 256)
    decoder = convolution(256, 48) + separable(256 + 48, 256) + separable(256, 256)
    return pyramid + decoder + 257 * classes


def test_the_number_of_parameters_is_the_papers() -> None:
    with torch.device("meta"):
        xception = timm.create_model("xception65", num_classes=0)
    assert check.parameters(full()) == check.parameters(xception) + head(21) == 41_055_413
    assert check.parameters(full(output_stride=8)) == 41_055_413
    for name, known in (("resnet50", 26_696_133), ("resnet101", 45_688_261)):
        net = full(backbone=name)
        assert check.parameters(net) == check.parameters(net.backbone) + head(21) == known


def test_the_full_backbone_is_timms_own() -> None:
    with torch.device("meta"):
        ours = backbone(DeepLabConfig()).state_dict()
        theirs = timm.create_model("xception65", num_classes=0).state_dict()
    assert {k.removeprefix("model."): v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.long
def test_the_work_is_as_published() -> None:
    assert check.multiply_adds(full(), (513, 513)) / 1e9 == pytest.approx(54.17, rel=0.01)
    assert check.multiply_adds(full(), (1025, 2049)) / 1e9 == pytest.approx(418.64, rel=0.01)
    assert check.multiply_adds(full(output_stride=8), (513, 513)) / 1e9 == pytest.approx(177, rel=0.01)


def depthwise(net: nn.Module) -> list[tuple[int, int]]:
    """(stride, rate) of the depthwise convolutions, in their order."""
    found = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert all(m.padding == m.dilation and m.kernel_size == (3, 3) for m in found)
    return [(m.stride[0], m.dilation[0]) for m in found]


@pytest.mark.parametrize("output_stride", [16, 8])
def test_strides_and_rates_are_the_papers(output_stride: int) -> None:
    """A stride that is left out becomes the rate of what follows it, not of its own block."""
    plain, once, twice = (1, 1), (1, 2), (1, 4)
    strided = [plain, plain, (2, 1)]
    entry = strided * 2 + (strided if output_stride == 16 else [plain] * 3)
    middle = ([plain] if output_stride == 16 else [once]) * 3 * 16
    exit_flow = [plain] * 3 + [once] * 3 if output_stride == 16 else [once] * 3 + [twice] * 3
    net = full(output_stride=output_stride)
    assert depthwise(net.backbone) == entry + middle + exit_flow
    rates = (6, 12, 18) if output_stride == 16 else (12, 24, 36)
    assert depthwise(net.pyramid) == [(1, r) for r in rates]
    assert depthwise(net.decoder) == [(1, 1)] * 2
    low, high = net.backbone(torch.zeros(1, 3, 513, 513, device="meta"))
    assert low.shape == (1, 256, 129, 129)
    assert high.shape == (1, 2048, 512 // output_stride + 1, 512 // output_stride + 1)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_a_resnet_keeps_its_stride_too(name: str) -> None:
    for output_stride, rates in ((16, {1, 2}), (8, {1, 2, 4})):
        net = full(backbone=name, output_stride=output_stride)
        low, high = net.backbone(torch.zeros(1, 3, 513, 513, device="meta"))
        assert low.shape[1:] == (256, 129, 129)
        assert high.shape[1:] == (2048, 512 // output_stride + 1, 512 // output_stride + 1)
        assert {m.dilation[0] for m in net.backbone.modules() if isinstance(m, nn.Conv2d)} == rates


def test_enlarging_a_side_of_16m_plus_1_is_exact() -> None:
    ramp = torch.arange(0.0, 33, 4).expand(1, 1, 9, 9)
    torch.testing.assert_close(enlarged(ramp, 33, 33)[0, 0, 5], torch.arange(33.0))


def test_features_lie_on_pixels() -> None:
    """A mirrored photo gives mirrored features of both strides: their first lies on the first pixel, last on last."""
    net = deeplab()
    for layer in net.backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = (layer.weight + layer.weight.flip(-1)) / 2
    photo = check.photos(1, (33, 65))
    with torch.inference_mode():
        for there, back in zip(net.backbone(photo), net.backbone(photo.flip(-1)), strict=True):
            torch.testing.assert_close(there, back.flip(-1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "stride"), [("xception65", 16), ("xception65", 8), ("resnet50", 16)])
def test_any_size_gives_logits_of_that_size(name: str, stride: int) -> None:
    check.takes_any_size(deeplab(backbone=name, output_stride=stride))


def test_threads_do_not_mix_up_features() -> None:
    net = deeplab()
    batch = check.photos(8, (49, 65))

    def logits(index: int) -> torch.Tensor:
        with torch.inference_mode():
            return net(batch[index : index + 1])  # type: ignore[no-any-return]

    wanted = [logits(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for found, known in zip(pool.map(logits, list(range(8)) * 3), wanted * 3, strict=True):
            torch.testing.assert_close(found, known)


def test_one_image_per_batch_can_be_trained() -> None:
    net = deeplab().train()
    before = net.pyramid.pooling.bn.running_mean.clone()  # type: ignore[union-attr, operator]
    loss = net(check.photos(1, (33, 33))).square().mean()
    loss.backward()
    assert torch.equal(net.pyramid.pooling.bn.running_mean, before)  # type: ignore[union-attr, arg-type]
    assert net.pyramid.pooling.conv.weight.grad.any()  # type: ignore[union-attr, operator]
    net(check.photos(2, (33, 33)))
    assert not torch.equal(net.pyramid.pooling.bn.running_mean, before)  # type: ignore[union-attr, arg-type]


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"xception65 needs the package timm.*segbatch\[pretrained\]"):
        DeepLab(DeepLabConfig(width=SMALL), 2)


@pytest.mark.long
def test_torch_export() -> None:
    check.exports_for_any_size(deeplab())


@pytest.mark.parametrize("name", ["xception65", "resnet50"])
def test_its_folder(tmp_path: Path, name: str) -> None:
    options = {"backbone": name, "width": SMALL}
    check.survives_its_folder(deeplab(**options), tmp_path, "deeplab", **options)


@pytest.mark.long
@pytest.mark.parametrize("name", ["xception65", "resnet50"])
def test_it_learns(name: str) -> None:
    assert check.accuracy_after(check.fresh("deeplab", backbone=name, width=0.1), 30, 0.01) > 0.9
