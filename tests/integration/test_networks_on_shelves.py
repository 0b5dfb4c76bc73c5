"""Every architecture, small, learns the drawn shelves from random weights within a stated CPU time.

The classes cannot be told by colour, and some only by their place in the photo. So crops have the photo's full height:
smaller ones show header and floor too seldom, and SegNet and DeepLab then never learn them.
"""

from pathlib import Path
from typing import Any

import pytest

from segbatch import api
from segbatch.config import parse
from segbatch.datasets import drawn_shelves
from segbatch.training import TrainConfig, train

MIOU = 0.8
"""What every network must reach on the validation photos; the colour classifier reaches .16."""

CPU_S = 600
"""CPU seconds that a training may take, validation included; on an idle core half a minute to five minutes."""

NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"kind": "unet", "width": 8, "depth": 5},
    "unet_valid": {"kind": "unet_valid", "width": 8, "depth": 4, "dropout": 0.1},
    "fcn": {"kind": "fcn", "width": 0.1, "dropout": 0.1},
    "segnet": {"kind": "segnet", "width": 0.125},
    "segnet-basic": {"kind": "segnet", "variant": "basic", "width": 0.25},
    "deeplab": {"kind": "deeplab", "width": 0.125},
    "patch": {"kind": "patch", "window": 95, "maps": 12, "hidden": 32},
}

REGIONS = {"norm": "group", "anchor_sizes": [16, 32, 64, 96, 128], "regions": 64, "short_side": 192, "longest": 512}
"""For products of 10 to 60 pixels."""

DETECTORS: dict[str, dict[str, Any]] = {
    "maskrcnn": {"kind": "maskrcnn", "width": 0.25, **REGIONS},
    "panoptic_fpn": {"kind": "panoptic_fpn", "width": 0.25, **REGIONS},
    "maskrcnn-c4": {
        "kind": "maskrcnn",
        "head": "c4",
        "width": 0.125,
        **REGIONS,
        "anchor_sizes": [32, 48, 64, 96, 128],
        "candidates": 600,
        "short_side": 384,
        "longest": 1024,
    },
    "instancefcn": {
        "kind": "instancefcn",
        "width": 0.125,
        "norm": True,
        "window": 9,
        "parts": 3,
        "scales": [0.7, 1.05, 1.6, 2.4],
        "short_side": 192,
        "longest": 512,
    },
}

OPTIM: dict[str, dict[str, Any]] = {"maskrcnn-c4": {"batch_size": 2}, "instancefcn": {"ema": 0.0}}
"""What differs from the common recipe. C4 has features of stride 16, so it sees the photos twice as large, and learns
from two of them a step. InstanceFCN keeps the statistics of batch normalisation that it gathered at all its scales.
"""

EPOCHS = dict.fromkeys(NETWORKS, 16) | {
    "deeplab": 24,
    "maskrcnn": 3,
    "panoptic_fpn": 3,
    "maskrcnn-c4": 4,
    "instancefcn": 12,
}
"""60 steps of four photos each; of C4 120 steps of two."""

AP50 = PQ = 0.5
"""What an instance network's masks, and a panoptic network, must reach on the validation photos."""


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A samples table of 240 photos to learn from and 60 to validate on: those of the demo."""
    folder = tmp_path_factory.mktemp("shelves")
    drawn_shelves.draw(str(folder / "drawn"), 300)
    api.ingest("image-masks", str(folder / "drawn"), str(folder / "table"))
    return folder / "table"


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns_the_shelves(shelves: Path, tmp_path: Path, name: str) -> None:
    """One recipe for all of them: steps of four crops."""
    if name == "deeplab":
        pytest.importorskip("timm", reason="the extra pretrained is not installed")
    document = {
        "out": str(tmp_path / "model"),
        "samples": str(shelves),
        "split": "train",
        "val_split": "val",
        "model": NETWORKS[name],
        "data": {"crop": [192, 128], "scale": [0.8, 1.25]},
        "optim": {"lr": 3e-3, "epochs": EPOCHS[name], "batch_size": 4, "ema": 0.97},
        "threads": 1,
    }
    result = train(parse(TrainConfig, document, "test"))
    assert result.val_miou is not None
    print(f"{name}: mIoU {result.val_miou:.3f} after {result.steps} steps in {result.cpu_s:.0f} CPU seconds")
    assert result.val_miou > MIOU
    assert result.cpu_s < CPU_S


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_it_finds_the_products(shelves: Path, tmp_path: Path, name: str) -> None:
    """One recipe for all of them: whole photos."""
    if name != "instancefcn":
        pytest.importorskip("torchvision", reason="the extra pretrained is not installed")
    short = DETECTORS[name]["short_side"]
    document = {
        "out": str(tmp_path / "model"),
        "samples": str(shelves),
        "split": "train",
        "val_split": "val",
        "val_inference": {"stuff_area": 256, "nms_iou": 0.5},
        "model": DETECTORS[name],
        "data": {"crop": [short, short * 4 // 3], "scale": [0.8, 1.25]},
        "optim": {"lr": 2e-3, "epochs": EPOCHS[name], "batch_size": 4, "ema": 0.97, **OPTIM.get(name, {})},
        "threads": 1,
    }
    result = train(parse(TrainConfig, document, "test"))
    reached = result.val_pq if name == "panoptic_fpn" else result.val_ap50
    assert reached is not None
    print(f"{name}: {reached:.3f} after {result.steps} steps in {result.cpu_s:.0f} CPU seconds")
    assert reached > (PQ if name == "panoptic_fpn" else AP50)
    assert result.cpu_s < CPU_S
