"""Parts of Mask R-CNN on top of torchvision's detection package (``torchvision.models.detection``, BSD-3-Clause):
ResNet-50 of any width, proposals, heads, and their losses.

What is ours: ``width``, the choice of normalisation, regions that are left out of training because they lie in a crowd,
losses that are finite also when no region is left, and mask targets that lie exactly where the mask grid lies. Under
autocast, convolutions and fully connected layers compute in its number format, boxes and losses in float32.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.errors import ConfigError
from segbatch.models.base import Target
from segbatch.models.config import MaskRCNNConfig
from segbatch.models.vgg import scaled

try:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
    from torchvision.models.resnet import Bottleneck
    from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou, roi_align
    from torchvision.ops.poolers import LevelMapper
except ImportError as error:
    raise ConfigError("Mask R-CNN needs the package torchvision", "pip install 'segbatch[pretrained]'") from error

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Of ResNet-50: inner channels (a quarter of the outer ones) and blocks."""
PYRAMID_CHANNELS, HIDDEN_UNITS = 256, 1024
GROUPS = 32
"""Of group normalisation (Wu and He, ECCV 2018), scaled as the channels are."""
CROWD_OVERLAP = 0.5
SUPPRESSION = 0.5
"""Of two boxes of one class that overlap by more, only the better one is kept (torchvision's default)."""
_EXPANSION = 4
_SAMPLES, _AS_MANY_AS_NEEDED = 2, 0
"""Sampling points of RoIAlign along each side of a cell: torchvision's, detectron2's."""

Norm = Callable[[int], nn.Module]
Truth = dict[str, Tensor]
"""Of one photo: boxes, labels (0 is background), masks, crowds (boxes)."""


def normalisation(kind: str, width: float) -> Norm:
    """What makes the normalisation layer for so many channels."""
    if kind == "group":
        return partial(_group_norm, groups=scaled(GROUPS, width))
    return FrozenBatchNorm2d if kind == "frozen" else nn.BatchNorm2d


def _group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def stage(inputs: int, channels: int, blocks: int, stride: int, norm: Norm) -> nn.Sequential:
    """One stage of ResNet-50: (n, inputs, h, w) -> (n, 4 channels, h / stride, w / stride)."""
    outputs = _EXPANSION * channels
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
    first = Bottleneck(inputs, channels, stride, shortcut, norm_layer=norm)
    rest = (Bottleneck(outputs, channels, norm_layer=norm) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def resnet50(config: MaskRCNNConfig) -> nn.Sequential:
    """ResNet-50 without its head, layers named as in torchvision: (n, channels, h, w) -> (n, 2048, h / 32, w / 32)."""
    norm, inputs = normalisation(config.norm, config.width), scaled(STAGES[0][0], config.width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(config.channels, inputs, 7, 2, padding=3, bias=False)
    layers["bn1"] = norm(inputs)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
    for number, (channels, blocks) in enumerate(STAGES, 1):
        channels = scaled(channels, config.width)
        layers[f"layer{number}"] = stage(inputs, channels, blocks, 1 if number == 1 else 2, norm)
        inputs = _EXPANSION * channels
    net = nn.Sequential(layers)
    net.apply(he_initialise)
    return net


def he_initialise(layer: nn.Module) -> None:
    """He initialisation of a convolution by its fan-out, as torchvision's of ResNet; for ``nn.Module.apply``."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def pyramid(config: MaskRCNNConfig) -> nn.Module:
    """ResNet-50 with a feature pyramid: (n, channels, h, w) -> maps ``0`` .. ``3`` and ``pool``, strides 4 .. 64."""
    backbone: nn.Module = BackboneWithFPN(
        resnet50(config),
        {f"layer{n + 1}": str(n) for n in range(4)},
        [_EXPANSION * scaled(channels, config.width) for channels, _ in STAGES],
        scaled(PYRAMID_CHANNELS, config.width),
        norm_layer=_group_norm_or_none(config),
    )
    return backbone


def _group_norm_or_none(config: MaskRCNNConfig) -> Norm | None:
    """Of pyramid and mask head: only group normalisation goes there too (He, Girshick, Dollar, ICCV 2019)."""
    return normalisation(config.norm, config.width) if config.norm == "group" else None


def fourth_stage(body: nn.Sequential) -> nn.Module:
    """A ResNet as far as its fourth stage: (n, channels, h, w) -> map ``0`` of stride 16."""
    getter: nn.Module = IntermediateLayerGetter(body, {"layer3": "0"})
    return getter


def image_list(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Any:
    """Images (n, channels, h, w) and the (height, width) of each without its padding, as torchvision wants them."""
    return ImageList(images, list(sizes))


class ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's, results in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness (n, anchors, h, w) and box offsets (n, 4 anchors, h, w) of every map."""
        objectness, offsets = super().forward(x)
        return [o.float() for o in objectness], [o.float() for o in offsets]


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's, on vectors or on maps, which are averaged; results in float32.

    First weights as in Fast R-CNN, section 2.3: normal, deviation .01 for classes, .001 for boxes.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(regions, inputs) or (regions, inputs, h, w) -> class scores (regions, outputs), offsets (regions, 4 ..)."""
        scores, offsets = super().forward(x.mean((2, 3)) if x.ndim == 4 else x)
        return scores.float(), offsets.float()


class MaskPredictor(MaskRCNNPredictor):  # type: ignore[misc]
    """torchvision's, results in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(regions, inputs, m, m) -> logits (regions, outputs, 2 m, 2 m)."""
        logits: Tensor = super().forward(x)
        return logits.float()


class Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network; anchors in crowds are neither positive nor negative."""

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[Truth] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Boxes (p, 4) of each image, best first; losses where ``targets`` are given, in either mode."""
        maps = list(features.values())
        objectness, offsets = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        per_level = [o[0].numel() for o in objectness]
        objectness, offsets = concat_box_prediction_layers(objectness, offsets)
        boxes = self.box_coder.decode(offsets.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = self.filter_proposals(boxes, objectness, images.image_sizes, per_level)
        if targets is None:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        wanted = self.box_coder.encode(matched, anchors)
        objectness_loss, box_loss = self.compute_loss(objectness, offsets, labels, wanted)
        return proposals, {"objectness": objectness_loss, "proposal_box": box_loss}

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: Sequence[Truth]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """1 for objects, 0 for background, -1 for neither; and the box that each anchor is to become."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, boxes, truth in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & in_crowd(boxes, truth["crowds"])] = -1
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, offsets: Tensor, labels: list[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss of sampled anchors; zero where there is none to sample."""
        if not any((label >= 0).any() for label in labels):
            return 0 * objectness.sum(), 0 * offsets.sum()
        losses: tuple[Tensor, Tensor] = super().compute_loss(objectness, offsets, labels, wanted)
        return losses


class RegionHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's box and mask heads. Without a mask head of its own, the mask predictor sees what the box predictor
    sees (the C4 variant). Regions in crowds are not trained on.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Truth] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, or losses where ``targets`` are given, in either mode."""
        if targets is None:
            return self._detections(features, proposals, image_shapes), {}
        return [], self._losses(features, proposals, image_shapes, targets)

    def _detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, shapes)))
        boxes, scores, labels = self.postprocess_detections(logits, offsets, proposals, shapes)
        masks = maskrcnn_inference(self.mask_predictor(self._mask_features(features, boxes, shapes)), labels)
        return [
            {"boxes": b, "scores": s, "labels": k, "masks": m}
            for b, s, k, m in zip(boxes, scores, labels, masks, strict=True)
        ]

    def _mask_features(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        pool, head = (
            (self.box_roi_pool, self.box_head) if self.mask_head is None else (self.mask_roi_pool, self.mask_head)
        )
        found: Tensor = head(pool(features, boxes, shapes))
        return found

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: Sequence[Truth],
    ) -> dict[str, Tensor]:
        kept = [p[_countable(p, t)] for p, t in zip(proposals, targets, strict=True)]
        boxes, matched, labels, wanted = self.select_training_samples(kept, targets)
        seen = self.box_head(self.box_roi_pool(features, boxes, shapes))
        logits, offsets = self.box_predictor(seen)
        zero = 0 * (logits.sum() + offsets.sum())
        losses = {"class": zero, "box": zero, "mask": zero}
        if len(logits):
            losses["class"], losses["box"] = fastrcnn_loss(logits, offsets, labels, wanted)
        objects = [label > 0 for label in labels]
        if any(o.any() for o in objects):
            found = [b[o] for b, o in zip(boxes, objects, strict=True)]
            mask_features = (
                seen[torch.cat(objects)] if self.mask_head is None else self._mask_features(features, found, shapes)
            )
            truth = [m[o] for m, o in zip(matched, objects, strict=True)]
            losses["mask"] = mask_loss(self.mask_predictor(mask_features), found, truth, targets)
        return losses


def in_crowd(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Which of the boxes (n, 4) lie in one of the crowds (c, 4) with more than half of their area: bool (n,)."""
    if not len(crowds):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corner = torch.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    shared = (corner - torch.maximum(boxes[:, None, :2], crowds[None, :, :2])).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (shared > CROWD_OVERLAP * area[:, None]).any(1)


def _countable(proposals: Tensor, truth: Truth) -> Tensor:
    """Which proposals may be trained on: those of an object, and those outside of crowds."""
    ignored = in_crowd(proposals, truth["crowds"])
    if ignored.any() and len(truth["boxes"]):
        ignored &= box_iou(proposals, truth["boxes"]).amax(1) < 0.5
    return ~ignored


def mask_loss(logits: Tensor, boxes: list[Tensor], matched: list[Tensor], targets: Sequence[Truth]) -> Tensor:
    """Mean binary cross-entropy of the right class's masks.

    Args:
        logits: (regions, outputs, m, m), of all images.
        boxes, matched: of each image: (r, 4), and (r,) index of the object.
        targets: of each image.
    """
    labels = torch.cat([t["labels"][m] for t, m in zip(targets, matched, strict=True)])
    wanted = torch.cat(
        [mask_targets(t["masks"], b, m, logits.shape[-1]) for t, b, m in zip(targets, boxes, matched, strict=True)]
    )
    rows = torch.arange(len(labels), device=labels.device)
    return F.binary_cross_entropy_with_logits(logits[rows, labels], wanted)


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """What the mask head is to say: 1 in the cells that are at least half of the object, else 0.

    torchvision samples half a pixel too far right and down (``aligned=False``); here the cells of the grid lie exactly
    over the box, edges not centres, as in detectron2.

    Args:
        masks: (n, h, w) uint8 of one image.
        boxes: (r, 4).
        matched: (r,) index into ``masks``.
        side: cells along each side of the grid.

    Returns:
        (r, side, side) float32.
    """
    used, index = torch.unique(matched, return_inverse=True)
    places = torch.cat([index[:, None].to(boxes), boxes], 1)
    covered: Tensor = roi_align(masks[used, None].to(boxes), places, side, aligned=True)
    return (covered[:, 0] >= 0.5).float()


def proposals(config: MaskRCNNConfig, channels: int) -> Proposals:
    """The region proposal network on maps of so many channels."""
    sizes: tuple[tuple[int, ...], ...] = (config.anchor_sizes,)
    in_training, in_inference = 12000, 6000
    if config.head == "fpn":
        sizes = tuple((s,) for s in config.anchor_sizes)
        in_training, in_inference = 2000, 1000
    anchors = AnchorGenerator(sizes, (config.anchor_ratios,) * len(sizes))
    network = Proposals(
        anchors,
        ProposalHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={
            "training": config.candidates or in_training,
            "testing": config.candidates or in_inference,
        },
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    network.min_size = config.min_box
    return network


class RegionPooling(MultiScaleRoIAlign):  # type: ignore[misc]
    """torchvision's RoIAlign from several maps; five times as fast on a CPU where nothing is learnt, and equal.

    torchvision works the strides out at the first call and keeps them, for better or worse; here they are given.

    Args:
        maps: how many there are, named ``0`` and so on.
        side: cells along each side of what comes out.
        strides: of the first and of the last map, powers of 2.
        samples: sampling points along each side of a cell; 0: as many as needed.
    """

    def __init__(self, maps: int, side: int, strides: tuple[int, int], samples: int = _SAMPLES) -> None:
        super().__init__([str(n) for n in range(maps)], side, samples)
        first, last = (s.bit_length() - 1 for s in strides)
        self.scales = [2.0**-n for n in range(first, last + 1)]
        self.map_levels = LevelMapper(first, last)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(regions of all images, channels, side, side) of maps (n, channels, h, w)."""
        maps = [x[name] for name in self.featmap_names]
        if any(m.requires_grad or m.device.type != "cpu" or m.dtype != torch.float32 for m in (*maps, *boxes)):
            found: Tensor = super().forward(x, boxes, image_shapes)
            return found
        return self._pooled(maps, boxes)

    def _pooled(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        from segbatch.models._region_kernels import pool

        side = self.output_size[0]
        out = [torch.zeros(len(b), maps[0].shape[1], side * side) for b in boxes]
        levels = [self.map_levels([b]).numpy() for b in boxes]
        for number, (one, scale) in enumerate(zip(maps, self.scales, strict=True)):
            for image, (regions, level) in enumerate(zip(boxes, levels, strict=True)):
                which = np.flatnonzero(level == number)
                if which.size:
                    features = one[image].permute(1, 2, 0).contiguous().numpy()
                    filled, samples = out[image].numpy(), self.sampling_ratio
                    pool(features, regions.contiguous().numpy(), which, scale, samples, side, filled)
        return torch.cat(out).reshape(-1, maps[0].shape[1], side, side)


def heads(box: Sequence[Any], mask: Sequence[Any], regions: int) -> RegionHeads:
    """Box and mask heads: (pooling, head, predictor) each, trained on so many regions of each image."""
    return RegionHeads(
        *box,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=regions,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=SUPPRESSION,
        detections_per_img=100,
        mask_roi_pool=mask[0],
        mask_head=mask[1],
        mask_predictor=mask[2],
    )


def pyramid_heads(config: MaskRCNNConfig, outputs: int) -> RegionHeads:
    """Figure 4, right: 7x7 -> two fully connected layers; 14x14 -> four convolutions -> 28x28."""
    channels, hidden = scaled(PYRAMID_CHANNELS, config.width), scaled(HIDDEN_UNITS, config.width)
    box = RegionPooling(4, 7, (4, 32)), TwoMLPHead(channels * 7 * 7, hidden), BoxPredictor(hidden, outputs)
    convolutions = MaskRCNNHeads(channels, (channels,) * 4, 1, norm_layer=_group_norm_or_none(config))
    mask = RegionPooling(4, 14, (4, 32)), convolutions, MaskPredictor(channels, channels, outputs)
    return heads(box, mask, config.regions or 512)


def fifth_stage_heads(config: MaskRCNNConfig, body: nn.Sequential, outputs: int) -> RegionHeads:
    """Figure 4, left: 14x14 -> fifth stage -> 7x7, averaged for boxes, -> 14x14 for masks."""
    channels = _EXPANSION * scaled(STAGES[-1][0], config.width)
    box = (
        RegionPooling(1, 14, (16, 16), _AS_MANY_AS_NEEDED),
        body.get_submodule("layer4"),
        BoxPredictor(channels, outputs),
    )
    mask = None, None, MaskPredictor(channels, scaled(PYRAMID_CHANNELS, config.width), outputs)
    return heads(box, mask, config.regions or 64)


def truth_of(target: Target, device: torch.device) -> Truth:
    """The target as torchvision wants it: crowds apart, class k as label k + 1."""
    single = ~target.iscrowd
    arrays = {
        "boxes": target.boxes[single],
        "labels": target.labels[single] + 1,
        "masks": target.masks[single],
        "crowds": target.boxes[target.iscrowd],
    }
    return {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
