"""Panoptic FPN against its paper: count, shapes of the semantic branch, losses, class order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import network_checks as check
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.errors import ConfigError
from segbatch.models import checkpoint, registry
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.base import InputSpec, ModelSpec, PanopticParts, Target
from segbatch.models.config import MaskRCNNConfig, PanopticFPNConfig
from segbatch.records import ClassInfo, ClassTable

pytest.importorskip("torchvision")

from segbatch.models.maskrcnn import MaskRCNN, features_of
from segbatch.models.panoptic_fpn import PanopticFPN, PanopticFPNSegmenter

TABLE = ClassTable(
    (
        ClassInfo(7, "sky"),
        ClassInfo(9, "disc", isthing=True),
        ClassInfo(2, "ground"),
        ClassInfo(4, "sea"),
        ClassInfo(30, "square", isthing=True),
    )
)
THINGS, STUFF = (1, 4), (0, 2, 3)
SMALL = {"width": 0.03, "norm": "group", "regions": 16}


def panoptic(**options: Any) -> PanopticFPN:
    """With scores that differ from class to class, so that there are detections."""
    torch.manual_seed(0)
    net = PanopticFPN(PanopticFPNConfig.model_validate({**SMALL, **options}), TABLE)
    nn.init.normal_(net.instances.roi_heads.box_predictor.cls_score.weight, std=0.3)
    return net.eval()


def full(table: ClassTable) -> PanopticFPN:
    with torch.device("meta"):
        return PanopticFPN(PanopticFPNConfig(), table)


def segmenter(net: PanopticFPN, min_score: float = 0.05) -> PanopticFPNSegmenter:
    architecture = ARCHITECTURES["panoptic_fpn"]
    fed = InputSpec(height=32, resize="short-side", divisor=32, layout="nhwc")
    choice = type(architecture.choice)(min_score=min_score)
    return PanopticFPNSegmenter(net, ModelSpec("p", "panoptic", TABLE, fed, "panoptic", "d", choice=choice))


def fed(images: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = images.permute(0, 2, 3, 1).contiguous().numpy()
    return found


def target(classes: NDArray[np.int16], boxes: Sequence[Sequence[int]] = (), labels: Sequence[int] = ()) -> Target:
    """Objects that fill their boxes."""
    masks = np.zeros((len(boxes), *classes.shape), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return Target(classes, corners, np.array(labels, np.int64), masks, np.zeros(len(boxes), np.bool_))


def same(found: Sequence[PanopticParts], wanted: Sequence[PanopticParts]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert len(a.detections.scores) > 0
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
        np.testing.assert_array_equal(a.detections.classes, b.detections.classes)
        for field in ("boxes", "scores", "masks"):
            np.testing.assert_allclose(getattr(a.detections, field), getattr(b.detections, field), atol=1e-4)


def test_the_number_of_parameters_is_the_papers() -> None:
    """Mask R-CNN's, and a branch of 128 channels: one, one, two and three convolutions, normalised in groups; 1x1."""
    table = ClassTable(tuple(ClassInfo(i, str(i), isthing=i < 80) for i in range(133)))
    net = full(table)
    with torch.device("meta"):
        instances = check.parameters(MaskRCNN(MaskRCNNConfig(), 80))
    first, further = 9 * 256 * 128 + 2 * 128, 9 * 128 * 128 + 2 * 128
    branch = 4 * first + (0 + 0 + 1 + 2) * further + (128 + 1) * (1 + 53)
    assert branch == 1_630_774
    assert check.parameters(net.semantic) == branch
    assert check.parameters(net) == instances + branch == 46_031_467
    groups = {m.num_groups for m in net.semantic.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {32}


def test_each_level_is_enlarged_to_a_fourth() -> None:
    net = full(TABLE)
    strides, shapes = (4, 8, 16, 32), []
    for number, (stride, level) in enumerate(zip(strides, net.semantic.levels.values(), strict=True)):
        level.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape)))
        assert len(list(level.children())) == max(number, 1)
        assert sum(isinstance(m, nn.Upsample) for m in level.modules()) == number
        assert 4 * 2**number == stride
    maps = {str(n): torch.zeros(1, 256, 192 // s, 256 // s, device="meta") for n, s in enumerate(strides)}
    assert net.semantic(maps).shape == (1, 1 + len(STUFF), 48, 64)
    assert shapes == [(1, 128, 48, 64)] * 4


def test_the_branch_adds_up_its_levels() -> None:
    branch = panoptic(width=0.125).semantic
    maps = {str(n): torch.randn(1, 32, 16 >> n, 16 >> n) for n in range(4)}
    with torch.inference_mode():
        summed = sum(level(maps[name]) for name, level in branch.levels.items())
        torch.testing.assert_close(branch(maps), F.conv2d(summed, branch.head.weight, branch.head.bias))


@pytest.mark.parametrize("size", [(352, 544), (32, 32), (32, 2016)])
def test_any_padded_size(size: tuple[int, int]) -> None:
    (found,) = segmenter(panoptic()).forward(fed(check.photos(1, size)))
    assert found.logits.shape == (4, size[0] // 4, size[1] // 4)
    assert found.logits.dtype == np.float32
    assert np.isfinite(found.logits).all()
    count = len(found.detections.scores)
    assert 0 < count <= 100
    assert (found.detections.boxes.shape, found.detections.masks.shape) == ((count, 4), (count, 28, 28))


def test_an_image_alone_is_found_as_in_a_batch() -> None:
    model, batch = segmenter(panoptic()), fed(check.photos(3, (64, 96)))
    together = model.forward(batch)
    for position in range(3):
        same(model.forward(batch[position : position + 1]), together[position : position + 1])


def test_classes_count_the_whole_table() -> None:
    (found,) = segmenter(panoptic()).forward(fed(check.photos(1, (64, 96))))
    assert set(found.detections.classes) == set(THINGS)
    assert found.detections.classes.dtype == np.int64
    (sure,) = segmenter(panoptic(), min_score=2.0).forward(fed(check.photos(1, (64, 96))))
    assert len(sure.detections.scores) == 0
    assert ARCHITECTURES["panoptic_fpn"].choice.min_score == 0.5


def test_the_loss_is_the_papers_sum() -> None:
    """Channel 0 stands for all things; void pixels are not learned from; the semantic loss counts half."""
    net, size = panoptic(), (64, 96)
    images = check.photos(2, size)
    rng = np.random.default_rng(0)
    maps = rng.integers(-1, 5, (2, *size)).astype(np.int16)
    targets = [target(maps[0], [[5, 5, 40, 50], [50, 10, 80, 60]], [4, 1]), target(maps[1])]
    found = net.train().losses(images, targets, 3)
    with torch.no_grad():
        features = features_of(net.instances, images)
        logits = F.interpolate(net.semantic(features), size, mode="bilinear", align_corners=False)
        channels = {-1: -1, 0: 1, 1: 0, 2: 2, 3: 3, 4: 0}
        wanted = torch.tensor([[[channels[int(c)] for c in row] for row in m] for m in maps])
        semantic = F.cross_entropy(logits, wanted, ignore_index=-1)
        things = [
            Target(None, t.boxes, np.array([THINGS.index(k) for k in t.labels], np.int64), t.masks, t.iscrowd)
            for t in targets
        ]
        instances = net.instances.losses(images, features, things, 3)
    assert float(found.pop("semantic").detach()) == pytest.approx(0.5 * float(semantic), rel=1e-4)
    assert {k: float(v.detach()) for k, v in found.items()} == pytest.approx(
        {k: float(v) for k, v in instances.items()}, rel=1e-4
    )
    total = float(ARCHITECTURES["panoptic_fpn"].loss(net, images, targets, 3).detach())
    assert total == pytest.approx(sum(float(v) for v in instances.values()) + 0.5 * float(semantic), rel=1e-4)


def test_a_photo_that_is_all_void_has_a_loss_of_zero() -> None:
    net = panoptic().train()
    found = net.losses(check.photos(1, (64, 64)), [target(np.full((64, 64), -1, np.int16))], 0)
    assert found["semantic"] == 0
    torch.stack(list(found.values())).sum().backward()  # type: ignore[no-untyped-call]


def test_targets_that_do_not_fit_are_refused() -> None:
    net, images = panoptic().train(), check.photos(1, (64, 64))
    classes = np.zeros((64, 64), np.int16)
    with pytest.raises(ValueError, match=r"objects of classes \[1, 2\], things are \[1, 4\]"):
        net.losses(images, [target(classes, [[0, 0, 9, 9], [9, 9, 20, 20]], [1, 2])], 0)
    crowd = target(classes, [[0, 0, 9, 9], [9, 9, 20, 20]], [1, 2])
    crowd.iscrowd[1] = True  # whose label says nothing
    assert net.losses(images, [crowd], 0)["class"].isfinite()
    plain = target(classes)
    with pytest.raises(ValueError, match="has a class map"):
        net.losses(images, [Target(None, plain.boxes, plain.labels, plain.masks, plain.iscrowd)], 0)


@pytest.mark.parametrize(("things", "missing"), [(False, "things"), (True, "stuff")])
def test_it_needs_things_and_stuff(things: bool, missing: str) -> None:
    table = ClassTable(tuple(ClassInfo(i, str(i), isthing=things) for i in range(3)))
    with pytest.raises(ConfigError, match=f"of the 3 classes none is {missing}"):
        PanopticFPN(PanopticFPNConfig.model_validate(SMALL), table)


def test_options_reach_the_network() -> None:
    net = panoptic(anchor_sizes=(8, 12, 16, 20, 24), anchor_ratios=(1.0,), channels=1, min_box=3.0, semantic_weight=2.0)
    assert net.instances.rpn.anchor_generator.sizes == ((8,), (12,), (16,), (20,), (24,))
    assert net.instances.rpn.min_size == 3.0
    assert net.state_dict()["instances.backbone.body.conv1.weight"].shape[1] == 1
    assert net.instances.roi_heads.fg_bg_sampler.batch_size_per_image == 16
    with pytest.raises(ValidationError, match="the pyramid wants 5"):
        PanopticFPNConfig(anchor_sizes=(8,))


@pytest.mark.long
@torch.inference_mode()
def test_the_semantic_branch_can_be_exported() -> None:
    """For any number of images and any size."""
    branch, auto = panoptic().semantic, torch.export.Dim.AUTO

    def maps(count: int, height: int, width: int) -> dict[str, Tensor]:
        return {str(n): torch.randn(count, 8, height >> n, width >> n) for n in range(4)}

    free = ({str(n): {0: auto, 2: auto, 3: auto} for n in range(4)},)
    program = torch.export.export(branch, (maps(2, 16, 24),), dynamic_shapes=free).module()
    other = maps(3, 32, 40)
    torch.testing.assert_close(program(other), branch(other), atol=1e-4, rtol=1e-4)


def test_its_folder(tmp_path: Path) -> None:
    net = panoptic()
    checkpoint.write(str(tmp_path), net, "panoptic_fpn", PanopticFPNConfig.model_validate(SMALL), TABLE, {})
    loaded = registry.source(f"panoptic_fpn@{tmp_path}").load(1)
    assert (loaded.spec.output, loaded.spec.task) == ("panoptic", "panoptic")
    assert loaded.spec.choice.min_score == 0.5
    batch = fed(check.photos(2, (64, 96)))
    for found, wanted in zip(loaded.forward(batch), segmenter(net, 0.5).forward(batch), strict=True):
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)


def scene(rng: np.random.Generator, size: int = 64) -> tuple[NDArray[np.float32], Target]:
    """Sky over sea, and one bright square on it."""
    horizon, side = int(rng.integers(16, 48)), int(rng.integers(16, 28))
    left, top = (int(v) for v in rng.integers(2, size - side - 2, 2))
    image = rng.normal(0, 0.3, (3, size, size)).astype(np.float32)
    image[2, horizon:] += 1.5
    image[0, top : top + side, left : left + side] += 3
    classes = np.zeros((size, size), np.int16)
    classes[horizon:] = 3
    classes[top : top + side, left : left + side] = 4
    return image, target(classes, [[left, top, left + side, top + side]], [4])


def scenes(count: int, seed: int) -> tuple[Tensor, list[Target]]:
    rng = np.random.default_rng(seed)
    images, targets = zip(*(scene(rng) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)), list(targets)


def overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """IoU of two boxes."""
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


@pytest.mark.long
def test_it_learns() -> None:
    torch.manual_seed(0)
    options = {"width": 0.0625, "norm": "group", "anchor_sizes": (16, 24, 32, 64, 128), "regions": 16}
    net = PanopticFPN(PanopticFPNConfig.model_validate(options), TABLE)
    optimizer, seen = torch.optim.AdamW(net.parameters(), lr=0.003), []
    net.train()
    for step in range(40):
        loss = net.loss(*scenes(2, step), step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(float(loss.detach()))
    assert np.mean(seen[-10:]) < 0.6 * np.mean(seen[:3])
    images, targets = scenes(6, 10_000)
    right, found = [], []
    for parts, truth in zip(segmenter(net).forward(fed(images)), targets, strict=True):
        assert truth.classes is not None
        channel = parts.logits.argmax(0).repeat(4, 0).repeat(4, 1)
        right.append(np.array([1, -9, 2, 3, 0])[truth.classes] == channel)
        found.append(max(overlap(b, truth.boxes[0]) for b in parts.detections.boxes[:5]))
    assert np.mean(right) > 0.8
    assert np.mean(found) > 0.5
