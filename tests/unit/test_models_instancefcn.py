"""InstanceFCN against its paper: counts, geometry, windows, matching, search, learning."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import network_checks as check
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.codecs import rle
from segbatch.config import parse
from segbatch.errors import ConfigError
from segbatch.inference.instances import best_first, paste
from segbatch.models import checkpoint, registry
from segbatch.models import instancefcn_windows as windows
from segbatch.models.base import Choice, Detections, InputSpec, ModelSpec, Target
from segbatch.models.config import InstanceFCNConfig
from segbatch.models.instancefcn import NMS_IOU, SAMPLED, InstanceFCN, InstanceFCNSegmenter, draw
from segbatch.models.vgg import STAGES, conv_stages

SMALL: dict[str, Any] = {"width": 0.03, "window": 7, "parts": 3, "scales": (0.5, 1.0, 1.6), "proposals": 40}
VGG = 14_714_688
"""Weights and biases of the 13 convolutions."""


def instancefcn(classes: int = 3, **options: Any) -> InstanceFCN:
    net = check.made("instancefcn", classes, **{**SMALL, **options})
    assert isinstance(net, InstanceFCN)
    return net


def full(classes: int = 20) -> InstanceFCN:
    with torch.device("meta"):
        return InstanceFCN(InstanceFCNConfig(), classes)


def target(masks: NDArray[np.uint8], labels: list[int] | None = None, crowds: tuple[int, ...] = ()) -> Target:
    """The truth with these masks (n, h, w)."""
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return Target(
        classes=None,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels or [0] * len(masks), np.int64),
        masks=masks,
        iscrowd=np.isin(np.arange(len(masks)), crowds),
    )


def rectangles(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Masks (n, h, w) of boxes left, top, right, bottom."""
    masks = np.zeros((len(boxes), *size), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def test_the_number_of_parameters_is_the_papers() -> None:
    inputs = (3, *(c for stage in STAGES for c in stage))
    assert sum(9 * i * o + o for i, o in pairwise(inputs)) == VGG
    segments = (512 + 1) * 512 + (9 * 512 + 1) * 25
    objectness = (9 * 512 + 1) * 512 + (512 + 1)
    net = full()
    agnostic = check.parameters(net) - check.parameters(net.category)
    assert agnostic == VGG + segments + objectness == 17_452_890
    assert check.parameters(net.category) == (9 * 512 + 1) * 512 + (512 + 1) * 20


def test_the_maps_have_stride_8() -> None:
    maps, objectness, categories = full()(torch.zeros(2, 3, 600, 800, device="meta"))
    assert maps.shape == (2, 25, 76, 101)
    assert objectness.shape == (2, 1, 76, 101) and categories.shape == (2, 20, 76, 101)


@torch.inference_mode()
def test_every_other_cell_is_vggs() -> None:
    """What the paper calls the hole algorithm: the same features as at stride 16, and others between them."""
    net = instancefcn()
    plain = conv_stages(SMALL["width"], norm=False)
    plain.load_state_dict(net.stages.state_dict())
    x = photo = check.photos(2, (96, 64))
    for stage in plain[:4]:
        x = F.max_pool2d(stage(x), 2)
    wanted = plain[4](x)
    seen: list[Tensor] = []
    net.stages[4].register_forward_hook(lambda _m, _i, out: seen.append(out))
    net(photo)
    assert wanted.std() > 0
    torch.testing.assert_close(seen[0][:, :, 1::2, 1::2], wanted, atol=1e-6, rtol=1e-5)


def cells_that_see(row: int, output: int, height: int = 640) -> list[int]:
    """Rows of the fifth stage (0), the score maps (1), objectness (2), categories (3) that one row reaches."""
    net = instancefcn(1, width=0.001, parts=1).double()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    seen: list[Tensor] = []
    net.stages[4].register_forward_hook(lambda _m, _i, out: seen.append(out))
    image = torch.zeros(1, 3, height, 1, dtype=torch.float64)
    image[:, :, row] = 1
    with torch.inference_mode():
        outputs = net(image)
    found: list[int] = (seen[0], *outputs)[output].amax((0, 1, 3)).nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize(("output", "pixels"), [(0, 196), (1, 212), (2, 212), (3, 212)])
def test_a_cell_sees_the_pixels_around_its_edge_of_8(output: int, pixels: int) -> None:
    for cell in (39, 40):
        begin, end = 8 * cell - pixels // 2, 8 * cell + pixels // 2
        seen = [cell in cells_that_see(row, output) for row in (begin - 1, begin, end - 1, end)]
        assert seen == [False, True, True, False]


@given(
    parts=st.integers(1, 5),
    half=st.integers(2, 5),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_assembling_is_that_of_plain_loops(parts: int, half: int, rows: int, columns: int, seed: int) -> None:
    window = 2 * half + 1
    maps = torch.randn(parts**2, rows, columns, generator=torch.Generator().manual_seed(seed))
    centres = list(product(range(rows), range(columns)))
    wanted = torch.zeros(len(centres), window, window)
    for number, (y, x) in enumerate(centres):
        for i, j in product(range(window), range(window)):
            part = int(i / (window / parts)) * parts + int(j / (window / parts))
            at = min(max(y - half + i, 0), rows - 1), min(max(x - half + j, 0), columns - 1)
            wanted[number, i, j] = maps[part, at[0], at[1]]
    y, x = torch.tensor(centres).T
    assert torch.equal(windows.assemble(maps, y, x, window), wanted)


@pytest.mark.parametrize(
    ("off", "longer", "kind"),
    [
        (0, 96, "fits"),
        (12, 96, "fits"),
        (13, 96, "neither"),
        (23, 96, "neither"),
        (24, 96, "negative"),
        (0, 114, "fits"),
        (0, 116, "neither"),
        (0, 190, "neither"),
        (0, 192, "negative"),
        (0, 81, "fits"),
        (0, 80, "neither"),
        (0, 50, "neither"),
        (0, 48, "negative"),
    ],
)
def test_positive_and_negative_are_deepmasks(off: int, longer: int, kind: str) -> None:
    """16 and 32 of 224 pixels, an object of 128 and factors of 2^(1/4) and 2, for a window of 168."""
    for dx, dy, wide, tall in ((off, 0, longer, 30), (0, -off, 40, longer), (-off, off, longer, longer)):
        box = torch.tensor([[256 + dx - wide / 2, 256 + dy - tall / 2, 256 + dx + wide / 2, 256 + dy + tall / 2]])
        found = windows.match(box, (512, 512), 21)
        assert found.objects.shape == found.negative.shape == (65, 65)
        fits, negative = bool(found.objects[32, 32] == 0), bool(found.negative[32, 32])
        assert (fits, negative) == {"fits": (True, False), "neither": (False, False), "negative": (False, True)}[kind]


def test_the_nearest_object_counts() -> None:
    boxes = torch.tensor([[202.0, 202, 298, 298], [208.0, 206, 304, 302], [0.0, 0, 20, 20]])
    assert windows.match(boxes, (512, 512), 21).objects[32, 32] == 1
    assert windows.match(boxes.flip(0), (512, 512), 21).objects[32, 32] == 1
    assert windows.match(boxes[:0], (512, 512), 21).negative.all()


def test_objects_of_the_right_size_always_have_a_window() -> None:
    """However small the window and wherever they lie."""
    for window, off in product((3, 5, 7, 21), range(8)):
        side = 8 * window * 4 / 7
        box = torch.tensor([[100.0 + off, 120 - off, 100 + off + side, 120 - off + side / 2]])
        assert (windows.match(box, (256, 256), window).objects == 0).any()


@given(
    seed=st.integers(0, 999), height=st.integers(1, 40), width=st.integers(1, 40), scale=st.sampled_from([0.4, 1, 2])
)
@settings(max_examples=30, deadline=None)
def test_coverage_is_the_share_of_a_cell_inside_the_image(seed: int, height: int, width: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (1, height, width)).astype(np.uint8)
    size = max(round(height * scale / 8), 1) * 8, max(round(width * scale / 8), 1) * 8
    found = windows.coverage(torch.from_numpy(mask), size)[0]
    assert found.shape == (size[0] // 8 + 1, size[1] // 8 + 1)
    fine = mask[0].repeat(size[0], 0).repeat(size[1], 1)  # 1 pixel of the resized image is h x w of these
    for row, column in product(range(found.shape[0]), range(found.shape[1])):
        cut = fine[
            max(8 * row - 4, 0) * height : (8 * row + 4) * height,
            max(8 * column - 4, 0) * width : (8 * column + 4) * width,
        ]
        assert float(found[row, column]) == pytest.approx(cut.mean(), abs=1e-4)


@given(seed=st.integers(0, 999), threshold=st.sampled_from([0.3, 0.5, 0.8]))
@settings(max_examples=15, deadline=None)
def test_tight_boxes_enclose_what_is_above_the_threshold(seed: int, threshold: float) -> None:
    masks = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed)) ** 4
    fine = 6 * 15  # an odd number of points a cell, so that one is its centre
    at = (torch.arange(fine) + 0.5) / fine * 2 - 1
    grid = torch.stack([at.expand(fine, fine), at[:, None].expand(fine, fine)], -1).expand(3, fine, fine, 2)
    above = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] > threshold
    for mask, box in zip(above, windows.tight_boxes(masks, threshold), strict=True):
        if not mask.any():
            assert box.tolist() == [6, 6, 0, 0]
            continue
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        points = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]) + 0.5
        assert (points[:2] / 15 - box[:2] >= 0).all() and (box[2:] - points[2:] / 15 >= 0).all()
        assert ((points / 15 - box).abs() <= 1 / 15 + 1e-4).all()


def test_a_mask_within_its_whole_window_is_itself() -> None:
    masks = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[0.0, 0, 7, 7]]).expand(3, 4)
    torch.testing.assert_close(windows.within(masks, whole), masks)
    ramp = (torch.arange(7.0) + 0.5).expand(1, 7, 7)
    part = windows.within(ramp, torch.tensor([[1.0, 2, 4.5, 3]]))
    torch.testing.assert_close(part, (1 + (torch.arange(7) + 0.5) / 2).expand(1, 7, 7))


@given(seed=st.integers(0, 999), most=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_suppression_is_greedy(seed: int, most: int) -> None:
    corner, side = torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[[4.0]], [[9]]])
    boxes = torch.cat([corner, corner + side], 1)

    def overlap(a: Tensor, b: Tensor) -> float:
        both = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0).prod()
        return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))

    wanted: list[int] = []
    for number in range(30):
        if len(wanted) < most and all(overlap(boxes[number], boxes[k]) <= 0.4 for k in wanted):
            wanted.append(number)
    assert windows.suppress(boxes, 0.4, most).tolist() == wanted
    assert windows.suppress(boxes[:0], 0.4, most).tolist() == []


def test_windows_are_drawn_half_positive_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    config = InstanceFCNConfig()
    truth = target(rectangles((256, 256), (80, 100, 176, 150), (0, 0, 30, 30)), [1, 0])
    sample = draw(truth, (1, 3, 256, 256), (256, 256), config, torch.Generator().manual_seed(0))
    assert len(sample.rows) == SAMPLED == 256
    assert int(sample.positive.sum()) == len(sample.labels) == 9 and set(sample.labels.tolist()) == {1}
    assert sample.positive[:9].all() and not sample.positive[9:].any()
    centres = torch.stack([8 * sample.columns - 128, 8 * sample.rows - 125], 1).abs().amax(1)
    assert (centres[:9] <= 12).all() and (centres[9:] >= 24).all()
    monkeypatch.setattr("segbatch.models.instancefcn.SAMPLED", 8)
    sample = draw(truth, (1, 3, 256, 256), (256, 256), config, torch.Generator().manual_seed(0))
    assert sample.positive.tolist() == [1] * 4 + [0] * 4


def test_the_truth_of_a_window_is_its_object_alone() -> None:
    config = InstanceFCNConfig(window=7)
    masks = rectangles((64, 64), (0, 0, 32, 32), (32, 0, 64, 32))
    sample = draw(target(masks, [0, 1]), (3, 64, 64), (64, 64), config, torch.Generator().manual_seed(0))
    for label, truth, valid, row, column in zip(
        sample.labels, sample.truth, sample.valid, sample.rows, sample.columns, strict=False
    ):
        covered = windows.coverage(torch.from_numpy(masks[int(label)][None]), (64, 64))[0]
        for i, j in product(range(7), range(7)):
            at = int(row) - 3 + i, int(column) - 3 + j
            assert bool(valid[i, j]) == (0 <= at[0] < 9 and 0 <= at[1] < 9)
            assert not valid[i, j] or truth[i, j] == covered[at]
    assert {(2, 2), (2, 6)} == set(zip(sample.rows[:2].tolist(), sample.columns[:2].tolist(), strict=True))


def test_crowds_are_neither_found_nor_background() -> None:
    config = InstanceFCNConfig(window=7)
    masks = rectangles((128, 128), (0, 0, 128, 60), (20, 10, 52, 42), (70, 80, 102, 112))
    sample = draw(target(masks, crowds=(0,)), (3, 128, 128), (128, 128), config, torch.Generator().manual_seed(0))
    assert len(sample.rows) > 50 and int(sample.rows.min()) == 8
    assert len(sample.labels) > 0 and (8 * sample.rows[: len(sample.labels)] > 70).all()


def plain_loss(net: InstanceFCN, images: Tensor, truth: Target) -> float:
    """The loss of one image at scale 1 when every window is looked at."""
    maps, objectness, categories = (t[0].detach().double() for t in net(images))
    side, k = net.config.window, net.config.parts
    matching = windows.match(torch.from_numpy(truth.boxes), (images.shape[2], images.shape[3]), side)
    covered = windows.coverage(torch.from_numpy(truth.masks), (images.shape[2], images.shape[3]))
    sums: dict[str, list[float]] = {"objectness": [], "segments": [], "category": []}
    for y, x in product(range(maps.shape[1]), range(maps.shape[2])):
        owner = int(matching.objects[y, x])
        chance = float(objectness[0, y, x].sigmoid())
        if owner < 0:
            if matching.negative[y, x]:
                sums["objectness"].append(-np.log(1 - chance))
            continue
        sums["objectness"].append(-np.log(chance))
        sums["category"].append(-float(categories[:, y, x].log_softmax(0)[truth.labels[owner]]))
        for i, j in product(range(side), range(side)):
            at = y - side // 2 + i, x - side // 2 + j
            if 0 <= at[0] < maps.shape[1] and 0 <= at[1] < maps.shape[2]:
                p = float(maps[i * k // side * k + j * k // side][at].sigmoid())
                t = float(covered[owner][at])
                sums["segments"].append(-t * np.log(p) - (1 - t) * np.log(1 - p))
    assert all(sums.values())
    return sum(float(np.mean(values)) for values in sums.values())


def test_the_loss_is_three_means() -> None:
    net = instancefcn(scales=(1.0,))
    images = check.photos(1, (64, 72))
    truth = target(rectangles((64, 72), (4, 6, 36, 30), (40, 30, 70, 62)), [2, 0])
    assert float(net.loss(images, [truth], 5).detach()) == pytest.approx(plain_loss(net, images, truth), rel=1e-4)


def test_images_without_objects_train_the_objectness_alone() -> None:
    net = instancefcn().train()
    nothing = target(rectangles((40, 56)), [])
    loss = net.loss(check.photos(2, (40, 56)), [nothing, nothing], 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and loss > 0

    def moved(branch: nn.Module) -> bool:
        return any(bool(p.grad.any()) for p in branch.parameters() if p.grad is not None)

    assert moved(net.objectness) and moved(net.stages) and not moved(net.segments) and not moved(net.category)


def test_the_step_decides_the_draw() -> None:
    net = instancefcn()
    images = check.photos(2, (152, 160))
    truths = [target(rectangles((152, 160), (0, 0, 30, 30))), target(rectangles((152, 160)), [])]
    losses = [[float(net.loss(images, truths, step).detach()) for step in range(6)] for _ in range(2)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 3


class Seeing(InstanceFCN):
    """Finds what is red: its score maps are the share of red in a cell, objectness is the share in a window; green
    decides the category.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = F.avg_pool2d(images, 8, padding=4, count_include_pad=False)
        maps = torch.logit(share[:, :1], 0.01).expand(-1, self.config.parts**2, -1, -1)
        green = share[:, 1:2]
        side = self.config.window
        return maps, F.avg_pool2d(share[:, :1], side, 1, side // 2), torch.cat([-green, green], 1) * 9


def pasted(boxes: Tensor, masks: Tensor, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    """Masks on the pixels of the image."""
    nothing = np.zeros(len(boxes))
    found = Detections(boxes.numpy(), nothing.astype(np.float32), nothing.astype(np.int64), masks.numpy())
    return [rle.decode(rle.to_string(runs), *size) for runs in paste(found, *size, 0.5)]


def iou(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.logical_and(a, b).sum() / np.logical_or(a, b).sum())


@pytest.mark.parametrize(("scale", "window", "least"), [(0.7, 11, 0.8), (1.0, 11, 0.9), (2.3, 21, 0.95)])
def test_what_is_found_lies_where_it_is_in_the_image(scale: float, window: int, least: float) -> None:
    net = Seeing(InstanceFCNConfig(**{**SMALL, "window": window, "scales": (scale,), "proposals": 999}), 2)
    for box, green in (((40, 24, 76, 60), 1.0), ((0, 48, 30, 96), -1.0), ((96, 0, 136, 36), 1.0)):
        image = torch.stack([torch.from_numpy(rectangles((96, 136), box)[0]).float(), torch.full((96, 136), green)])
        found = net.propose(torch.cat([image, image[:1]]))
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([136, 96, 136, 96])).all()
        assert (found.categories.argmax(1) == int(green > 0)).all()
        masks = pasted(found.boxes, found.masks, (96, 136))
        assert max(iou(mask, image[0].numpy()) for mask in masks) > least
        assert windows.suppress(found.boxes, NMS_IOU, 999).tolist() == list(range(len(found.boxes)))


def test_all_scales_are_searched() -> None:
    """An object that is found small at one scale and large at another, and objects of one scale each."""
    net = Seeing(InstanceFCNConfig(**{**SMALL, "window": 7, "scales": (0.25, 1.0), "proposals": 999}), 2)
    large, small = (20, 30, 180, 150), (230, 40, 250, 64)
    masks = rectangles((192, 256), large, small)
    image = torch.from_numpy(masks.max(0)).float().expand(3, -1, -1)
    found = net.propose(image).boxes
    for box in (large, small):
        assert float((found - torch.tensor(box)).abs().amax(1).min()) < 8
    only = Seeing(InstanceFCNConfig(**{**SMALL, "window": 7, "scales": (1.0,), "proposals": 999}), 2)
    assert float((only.propose(image).boxes - torch.tensor(large)).abs().amax(1).min()) > 50


def segmenter(net: InstanceFCN) -> InstanceFCNSegmenter:
    spec = ModelSpec("it", "instance", check.CLASSES, InputSpec(layout="nhwc"), "detections", "", choice=Choice())
    return InstanceFCNSegmenter(net, spec)


def as_fed(batch: Tensor) -> NDArray[np.float32]:
    fed: NDArray[np.float32] = batch.permute(0, 2, 3, 1).contiguous().numpy()
    return fed


def assert_same(found: Detections, known: Detections) -> None:
    assert len(found.scores) == len(known.scores)
    for name in ("boxes", "scores", "classes", "masks"):
        np.testing.assert_allclose(getattr(found, name), getattr(known, name), atol=1e-4)


@pytest.mark.parametrize("size", [(64, 96), (1, 1), (7, 200), (93, 51)])
def test_any_size_and_any_place_in_a_batch(size: tuple[int, int]) -> None:
    model = segmenter(instancefcn())
    fed = as_fed(check.photos(3, size))
    together = model.forward(fed)
    for place in range(3):
        found = together[place]
        assert len(found.scores) <= 40 and found.masks.shape == (len(found.scores), 7, 7)
        assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == np.float32
        assert found.classes.dtype == np.int64 and set(found.classes.tolist()) <= {0, 1, 2}
        assert (found.boxes >= 0).all() and (found.boxes <= [size[1], size[0]] * 2).all()
        assert ((found.scores > 0) & (found.scores < 1)).all() and np.isfinite(found.masks).all()
        assert_same(model.forward(fed[place : place + 1])[0], found)
        assert_same(model.forward(np.ascontiguousarray(fed[::-1]))[2 - place], found)
    assert size == (1, 1) or len(together[0].scores) > 0


def test_threads_do_not_mix_up_images() -> None:
    model = segmenter(instancefcn())
    fed = as_fed(check.photos(6, (40, 56)))
    wanted = [model.forward(fed[i : i + 1])[0] for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.forward(fed[i : i + 1])[0], list(range(6)) * 2))
    for got, known in zip(found, wanted * 2, strict=True):
        assert_same(got, known)


def test_torch_export() -> None:
    check.exports_for_any_size(instancefcn())


def test_its_folder(tmp_path: Path) -> None:
    net = instancefcn()
    checkpoint.write(str(tmp_path), net, "instancefcn", InstanceFCNConfig(**SMALL), check.CLASSES, {"steps": 1})
    model = registry.source(f"instancefcn@{tmp_path}").load(1)
    assert model.spec.output == "detections" and model.spec.task == "instance"
    fed = as_fed(check.photos(1, (64, 96)))
    found = model.forward(fed)[0]
    assert len(found.scores) > 0
    assert_same(found, segmenter(net).forward(fed)[0])


def test_configurations_that_make_no_sense() -> None:
    for options, message in (
        ({"window": 8}, "window 8 has no cell in its middle: take 9"),
        ({"window": 3, "parts": 4}, "cannot be cut into 4 x 4 parts"),
        ({"scales": []}, "scales"),
        ({"scales": [0.0]}, "scales"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(InstanceFCNConfig, options, "here")
    np.testing.assert_allclose(
        np.array(InstanceFCNConfig().scales) * 600, [118.5, 177.8, 266.7, 400, 600, 900], atol=0.1
    )


def scene(seed: int) -> tuple[NDArray[np.float32], Target]:
    """A noisy image (3, 64, 64) with a rectangle (class 1), a disc (0) or nothing in each quarter."""
    random = np.random.default_rng(seed)
    image = random.normal(-1, 0.2, (3, 64, 64)).astype(np.float32)
    row, column = np.mgrid[:64, :64]
    masks, labels = [], []
    for corner in product((0, 32), (0, 32)):
        label, tall, wide = int(random.integers(2)), *random.integers(18, 26, 2).tolist()
        top, left = (c + int(random.integers(0, 33 - s)) for c, s in zip(corner, (tall, wide), strict=True))
        y, x = (row + 0.5 - top) / tall * 2 - 1, (column + 0.5 - left) / wide * 2 - 1
        mask = np.maximum(abs(x), abs(y)) <= 1 if label else x**2 + y**2 <= 1
        if random.random() < 0.7:
            image[:, mask] += random.uniform(1, 2, (3, 1)).astype(np.float32)
            masks.append(mask)
            labels.append(label)
    return image, target(np.array(masks, np.uint8).reshape(-1, 64, 64), labels)


@pytest.mark.long
def test_it_learns_to_find_discs_and_rectangles() -> None:
    config = {"width": 0.06, "norm": True, "window": 5, "parts": 3, "scales": (1.0,), "proposals": 50}
    net = check.fresh("instancefcn", classes=2, **config)
    assert isinstance(net, InstanceFCN)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for step in range(100):
        images, targets = zip(*(scene(4 * step + k) for k in range(4)), strict=True)
        loss = net.loss(torch.from_numpy(np.stack(images)), targets, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    model, right, found, there = segmenter(net), 0, 0, 0
    for seed in range(10_000, 10_012):
        image, truth = scene(seed)
        best = best_first(model.forward(image.transpose(1, 2, 0)[None])[0], Choice(min_score=0.4, nms_iou=0.5))
        masks = pasted(torch.from_numpy(best.boxes), torch.from_numpy(best.masks), (64, 64))
        for mask, label in zip(truth.masks, truth.labels, strict=True):
            right += any(iou(m, mask) > 0.5 and c == label for m, c in zip(masks, best.classes, strict=True))
        found, there = found + len(masks), there + len(truth.masks)
    assert there > 20 and right > 0.8 * there and right > 0.8 * found
