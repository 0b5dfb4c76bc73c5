"""The window classifier: its dense form against the loop over windows, counts, configuration."""

from pathlib import Path
from typing import Any

import network_checks as check
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segbatch.config import parse
from segbatch.errors import ConfigError
from segbatch.models.config import PatchConfig
from segbatch.models.patch import PatchNet

SMALL: dict[str, Any] = {"window": 15, "kernels": (4, 5), "maps": 4, "hidden": 8}


def patch_net(seed: int = 0, **options: Any) -> PatchNet:
    net = check.made("patch", seed=seed, **{**SMALL, **options})
    assert isinstance(net, PatchNet)
    return net


@torch.inference_mode()
def window_loop(net: PatchNet, photo: Tensor) -> Tensor:
    """Logits (classes, h, w) of a photo (channels, h, w): one window for each pixel, borders mirrored."""
    before = net.window // 2
    around = (before, net.window - 1 - before)
    padded = np.pad(photo.numpy(), ((0, 0), around, around), mode="reflect")
    rows = []
    for y in range(photo.shape[1]):
        line = [padded[:, y : y + net.window, x : x + net.window] for x in range(photo.shape[2])]
        rows.append(net.classify(torch.from_numpy(np.stack(line))))
    return torch.stack(rows).permute(2, 0, 1)


def same_map(net: PatchNet, photo: Tensor) -> None:
    with torch.inference_mode():
        found = net(photo[None].expand(-1, 3, -1, -1))[0]
    wanted = window_loop(net, photo)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)
    assert torch.equal(found.argmax(0), wanted.argmax(0))


def test_the_papers_network_gives_the_loops_map() -> None:
    same_map(
        patch_net(window=95, kernels=(4, 5, 4, 4), maps=48, hidden=200, channels=1), check.photos(1, (7, 12))[0, :1]
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kernels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    last=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_any_network_gives_the_loops_map(kernels: list[int], last: int, size: tuple[int, int], seed: int) -> None:
    window = last
    for kernel in reversed(kernels):
        window = 2 * window + kernel - 1
    net = patch_net(seed, window=window, kernels=tuple(kernels))
    assert net.hidden.kernel_size == (last, last)
    same_map(net, torch.randn(3, *size, generator=torch.Generator().manual_seed(seed)))


def test_the_number_of_parameters_is_the_papers() -> None:
    with torch.device("meta"):
        net = PatchNet(PatchConfig(channels=1), 2)
        color = PatchNet(PatchConfig(), 2)
    convolutions = 48 * (16 + 1) + 48 * (48 * 25 + 1) + 2 * 48 * (48 * 16 + 1)
    assert check.parameters(net) == convolutions + 200 * (48 * 9 + 1) + 2 * (200 + 1) == 219_290
    assert check.parameters(color) == 219_290 + 2 * 48 * 16


def test_the_sizes_and_the_work_of_a_window_are_the_papers() -> None:
    with torch.device("meta"):
        net = PatchNet(PatchConfig(channels=1), 2)
    sides: list[int] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
    assert net.classify(torch.zeros(1, 1, 95, 95, device="meta")).shape == (1, 2)
    assert sides == [92, 42, 18, 6, 1, 1]
    works = [layer.weight[0].numel() * s * s * layer.out_channels for layer, s in zip(layers, sides, strict=True)]
    assert sum(works) / 1e9 == pytest.approx(0.12, abs=0.005)


def test_windows_that_do_not_fit_are_refused() -> None:
    assert [PatchConfig(window=w).last_side for w in (63, 79, 95, 111)] == [1, 2, 3, 4]
    for window, near in ((96, 95), (10, 63), (105, 111)):
        with pytest.raises(ConfigError, match=rf"window {window} does not fit the kernels \[4, 5, 4, 4\]: take {near}"):
            parse(PatchConfig, {"window": window}, "test")


def test_any_size_gives_logits_of_that_size() -> None:
    check.takes_any_size(patch_net())
    check.takes_any_size(patch_net(channels=1))


def test_training_over_a_photo_is_training_on_its_windows() -> None:
    net, photo = patch_net(), check.photos(1, (3, 4))
    padded = torch.from_numpy(np.pad(photo.numpy(), ((0, 0), (0, 0), (7, 7), (7, 7)), mode="reflect"))
    windows = padded.unfold(2, 15, 1).unfold(3, 15, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    gradients = []
    for logits in (net(photo).permute(0, 2, 3, 1).flatten(0, 2), net.classify(windows)):
        net.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.arange(12) % 3).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == 8
    for dense, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(dense, plain, atol=1e-5, rtol=1e-4)


def test_torch_export() -> None:
    check.exports_for_any_size(patch_net())


def test_its_folder(tmp_path: Path) -> None:
    check.survives_its_folder(patch_net(), tmp_path, "patch", **SMALL)


def test_it_learns() -> None:
    net = check.fresh("patch", **SMALL)
    assert check.accuracy_after(net, 40, 0.01, size=32, block=8) > 0.9
