"""The architectures, at a small width, learn to tell the drawn shelves' classes, which colour alone cannot.

SegNet on VGG-16 is not among them: from random weights it needs too long for a test.
"""

from pathlib import Path
from typing import Any

import pytest

from segbatch import api
from segbatch.config import parse
from segbatch.datasets import drawn_shelves
from segbatch.training import TrainConfig, train

COLOR_MIOU = 0.16
"""What the colour classifier reaches here."""

NETWORKS: dict[str, dict[str, Any]] = {
    "fcn": {"kind": "fcn", "width": 0.1, "dropout": 0.1},
    "segnet-basic": {"kind": "segnet", "variant": "basic", "width": 0.25},
    "deeplab": {"kind": "deeplab", "width": 0.15},
    "unet_valid": {"kind": "unet_valid", "width": 8, "depth": 3, "dropout": 0.1},
    "patch": {"kind": "patch", "window": 47, "kernels": [4, 5, 4], "maps": 12, "hidden": 32},
}


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A samples table of 120 photos to learn from and 30 to validate on."""
    folder = tmp_path_factory.mktemp("shelves")
    drawn_shelves.draw(str(folder / "drawn"), 150)
    api.ingest("image-masks", str(folder / "drawn"), str(folder / "table"))
    return folder / "table"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_it_learns_more_than_colours(shelves: Path, tmp_path: Path, name: str) -> None:
    """Half a CPU minute to two each; the same again on one machine."""
    if name == "deeplab":
        pytest.importorskip("timm", reason="the extra pretrained is not installed")
    document = {
        "out": str(tmp_path / "model"),
        "samples": str(shelves),
        "split": "train",
        "val_split": "val",
        "model": NETWORKS[name],
        "data": {"crop": [96, 128]},
        "optim": {"lr": 5e-3, "epochs": 30, "ema": 0.97},
        "threads": 1,
    }
    result = train(parse(TrainConfig, document, "test"))
    assert result.val_miou is not None and result.val_miou > 3 * COLOR_MIOU
    assert min(v for v in result.val_iou.values() if v is not None) > 0.2
