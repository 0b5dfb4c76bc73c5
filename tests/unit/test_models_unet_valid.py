"""The published U-Net: counts, sizes, mirrored borders, tiles."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import network_checks as check
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segbatch.models.borders import mirrored
from segbatch.models.config import UNetValidConfig
from segbatch.models.unet_valid import UNetValid, input_side, output_side

SMALL = {"width": 3, "depth": 4}


def unet(**options: Any) -> UNetValid:
    net = check.made("unet_valid", **{**SMALL, **options})
    assert isinstance(net, UNetValid)
    return net


def full(channels: int, classes: int) -> UNetValid:
    with torch.device("meta"):
        return UNetValid(UNetValidConfig(channels=channels), classes)


def counted(channels: int, classes: int) -> int:
    def conv(inputs: int, outputs: int, taps: int = 9) -> int:
        return (taps * inputs + 1) * outputs

    levels = [64, 128, 256, 512, 1024]
    down = sum(conv(i, o) + conv(o, o) for i, o in pairwise([channels, *levels]))
    up = sum(conv(deep, fine, 4) + conv(2 * fine, fine) + conv(fine, fine) for fine, deep in pairwise(levels))
    return down + up + conv(64, classes, 1)


def test_the_number_of_parameters_is_the_papers() -> None:
    assert check.parameters(full(1, 2)) == counted(1, 2) == 31_030_658
    assert check.parameters(full(3, 2)) == counted(3, 2) == 31_030_658 + 2 * 9 * 64
    layers = [type(m) for m in full(1, 2).modules()]
    assert layers.count(nn.Conv2d) + layers.count(nn.ConvTranspose2d) == 23  # "in total the network has 23 layers"


def test_the_work_of_a_tile() -> None:
    assert check.multiply_adds(full(1, 2), (388, 388)) / 1e9 == pytest.approx(150, rel=0.01)


def test_572_pixels_give_388() -> None:
    net = full(1, 2)
    assert net.valid(torch.zeros(1, 1, 572, 572, device="meta")).shape == (1, 2, 388, 388)
    assert (input_side(388, 5), output_side(388, 5)) == (572, 388)
    smaller = unet(depth=2, channels=1)
    assert smaller.valid(torch.zeros(1, 1, 20, 22)).shape == (1, 3, 4, 6)


@given(side=st.integers(1, 2000), depth=st.integers(2, 6))
def test_sizes_fit_together(side: int, depth: int) -> None:
    inside, out, step = input_side(side, depth), output_side(side, depth), 1 << (depth - 1)
    assert out >= side and (out - side < step or out == 4)
    for _ in range(depth - 1):
        assert (inside - 4) % 2 == 0
        inside = (inside - 4) // 2
    inside -= 4
    assert inside >= 4
    for _ in range(depth - 1):
        inside = 2 * inside - 4
    assert inside == out


@given(size=st.integers(1, 30), before=st.integers(0, 70), after=st.integers(0, 70))
def test_mirroring_is_numpys(size: int, before: int, after: int) -> None:
    wanted = np.pad(np.arange(size), (before, after), mode="reflect")
    np.testing.assert_array_equal(mirrored(size, before, before + size + after).numpy(), wanted)


def test_any_size_gives_logits_of_that_size() -> None:
    check.takes_any_size(unet())
    check.takes_any_size(unet(channels=1))


def test_borders_are_mirrored() -> None:
    net, photo = unet(depth=3), check.photos(1, (9, 14))
    before = (input_side(9, 3) - output_side(9, 3)) // 2
    after = [(input_side(s, 3) - s - before) for s in (9, 14)]
    padded = np.pad(photo.numpy(), ((0, 0), (0, 0), (before, after[0]), (before, after[1])), mode="reflect")
    with torch.inference_mode():
        wanted = net.valid(torch.from_numpy(padded))[:, :, :9, :14]
        torch.testing.assert_close(net(photo), wanted)


def test_one_pass_gives_what_overlapping_tiles_give() -> None:
    """A tile's output equals the same part of the whole, at any multiple of the coarsest stride."""
    net = unet(depth=3)
    side = input_side(60, 3)
    photo = check.photos(1, (side, side))
    with torch.inference_mode():
        whole = net.valid(photo)
        tile = input_side(20, 3)
        for top, left in ((0, 0), (20, 40), (36, 4)):
            part = net.valid(photo[:, :, top : top + tile, left : left + tile])
            torch.testing.assert_close(part, whole[:, :, top : top + 20, left : left + 20], atol=1e-5, rtol=1e-5)


def test_grey_is_the_mean_of_the_colours() -> None:
    net, photo = unet(channels=1), check.photos(1, (20, 20))
    with torch.inference_mode():
        torch.testing.assert_close(net(photo), net(photo.mean(1, keepdim=True).expand(-1, 3, -1, -1)))


def test_first_weights_and_dropout() -> None:
    net = check.fresh("unet_valid", width=32, depth=4)
    assert isinstance(net, UNetValid)
    for name, seen in (("down.3.conv2", 256 * 9), ("merge.0.conv1", 256 * 9), ("up.0", 256)):
        weight = net.get_parameter(f"{name}.weight").detach()
        assert float(weight.std()) == pytest.approx((2 / seen) ** 0.5, rel=0.02)
    used: list[tuple[int, ...]] = []
    net.dropout.register_forward_hook(lambda _m, _i, out: used.append(tuple(out.shape[1:])))
    net(torch.zeros(1, 3, 8, 8))
    assert [c for c, *_ in used] == [128, 256] and net.dropout.p == 0.5


@pytest.mark.long
def test_torch_export() -> None:
    check.exports_for_any_size(unet(depth=3))


def test_its_folder(tmp_path: Path) -> None:
    check.survives_its_folder(unet(), tmp_path, "unet_valid", **SMALL)


def test_it_learns() -> None:
    net = check.fresh("unet_valid", width=4, depth=3, dropout=0.1)
    assert check.accuracy_after(net, 30, 0.01, size=32, block=8) > 0.9
