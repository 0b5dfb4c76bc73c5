"""What the tests of every torch network ask of it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.models import checkpoint, registry
from segbatch.models.architectures import ARCHITECTURES
from segbatch.records import ClassInfo, ClassTable

ODD_SIZES = [(321, 513), (1, 1), (7, 200)]
CLASSES = ClassTable((ClassInfo(7, "sky"), ClassInfo(2, "road"), ClassInfo(900, "sign")))


def parameters(net: nn.Module) -> int:
    """All parameters, fixed ones too."""
    return sum(p.numel() for p in net.parameters())


def table(classes: int) -> ClassTable:
    """So many classes."""
    return ClassTable(tuple(ClassInfo(i, f"class {i}", isthing=i % 2 == 1) for i in range(classes)))


def fresh(kind: str, classes: int = 2, **options: Any) -> nn.Module:
    """A network as training begins with it."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[kind]
    return architecture.build(architecture.config(**options), table(classes))


def made(kind: str, classes: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    """A network in evaluation mode that tells places apart: no weight or running mean is zero."""
    architecture = ARCHITECTURES[kind]
    torch.manual_seed(seed)
    net = architecture.build(architecture.config(**options), table(classes)).eval()
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if not value.any() and value.is_floating_point():
            torch.nn.init.normal_(value.data, std=0.1 if "score" in name else 0.01)
    return net


def multiply_adds(net: nn.Module, size: tuple[int, int]) -> int:
    """Of all convolutions for one photo; the network lies on the device ``meta``."""
    counts: list[int] = []

    def convolution(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        counts.append(layer.get_parameter("weight")[0].numel() * output[0].numel())

    def transposed(layer: nn.Module, inputs: tuple[Tensor], _output: Any) -> None:
        counts.append(layer.get_parameter("weight")[0].numel() * inputs[0][0].numel())

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(convolution)
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(transposed)
    net(torch.zeros(1, 3, *size, device="meta"))
    return sum(counts)


def photos(count: int, size: tuple[int, int]) -> Tensor:
    """(count, 3, h, w) noise."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def takes_any_size(net: nn.Module, classes: int = 3) -> None:
    """Logits of the input's size, finite, and the same for an image alone as in a batch of three."""
    for size in ODD_SIZES:
        batch = photos(3, size)
        together = net(batch)
        assert together.shape == (3, classes, *size) and together.isfinite().all()
        assert together.std() > 0 or size == (1, 1)
        torch.testing.assert_close(net(batch[1:2]), together[1:2], atol=1e-4, rtol=0)


@torch.inference_mode()
def exports_for_any_size(net: nn.Module, size: tuple[int, int] = (64, 96)) -> None:
    """One trace with free batch, height and width gives the same logits at other sizes.

    Not at sizes where a feature map is one pixel high or wide: those ``torch.export`` tells apart.
    """
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (photos(2, size),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for other in ((51, 83), (65, 97), (64, 81)):
        batch = photos(3, other)
        torch.testing.assert_close(program.module()(batch), net(batch), atol=1e-4, rtol=1e-4)


def survives_its_folder(net: nn.Module, folder: Path, kind: str, **options: Any) -> None:
    """Written, read and run as a model gives the same logits."""
    config = ARCHITECTURES[kind].config(**options)
    checkpoint.write(str(folder), net, kind, config, CLASSES, {"steps": 1})
    batch = photos(2, (33, 50))
    with torch.inference_mode():
        wanted = net(batch).numpy()
    got = registry.source(f"{kind}@{folder}").load(1).forward(batch.permute(0, 2, 3, 1).contiguous().numpy())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def blocks(count: int, size: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Photos of dark and bright squares with noise, and their classes."""
    random = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 2, (count, size // block, size // block), generator=random)
    classes = cells.repeat_interleave(block, 1).repeat_interleave(block, 2)
    noise = torch.randn(count, 3, size, size, generator=random)
    return (2.0 * classes - 1)[:, None] + 0.3 * noise, classes


def accuracy_after(net: nn.Module, steps: int, lr: float, size: int = 64, block: int = 32) -> float:
    """Share of right pixels on new photos after so many steps of Adam."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    net.train()
    for step in range(steps):
        batch, classes = blocks(4, size, block, step)
        loss = F.cross_entropy(net(batch), classes)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    batch, classes = blocks(8, size, block, 10_000)
    with torch.inference_mode():
        right: Tensor = net.eval()(batch).argmax(1) == classes
    return float(right.float().mean())
