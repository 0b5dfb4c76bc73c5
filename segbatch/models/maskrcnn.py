"""Mask R-CNN (He, Gkioxari, Dollar, Girshick, ICCV 2017, sections 3 and 3.1, figure 4) on ResNet-50, in both of its
variants; official code: ``facebookresearch/Detectron``, today ``facebookresearch/detectron2``.

``fpn`` is torchvision's ``maskrcnn_resnet50_fpn``: the same tensors under the same names (44,401,393 parameters with
90 classes and the background), so its weights fit. ``c4`` (detectron2's ``R_50_C4``) is ours on torchvision's parts:
proposals on the fourth stage (stride 16) with 5 sizes x 3 ratios = 15 anchors; RoIAlign to 14x14; the fifth stage, with
stride 2, on every region; its average for classes and boxes; a transposed convolution of 256 channels to 14x14 masks.
With 80 classes it has 35,971,185 parameters. detectron2 has no background among boxes and masks, so 8,196 + 257 fewer,
and its normalisation is frozen, so 53,120 scales and shifts fewer: 35,909,612.

Losses: objectness and boxes of 256 anchors, classes, boxes and masks of sampled regions, added up. Regions of crowds:
an anchor or proposal that is no object's and lies in a crowd's box with more than half of its area is not trained on
(Detectron does so from .7 on; detectron2 leaves crowds out of the truth).

Deviations, all torchvision's: the stride of a stage lies in its 3x3 convolution; RoIAlign does not shift by half a
pixel and takes 2x2 samples a cell (``c4``: one for each pixel of the map, as detectron2); box losses are smooth L1 with
a bend at 1/9; up to 2000 proposals of an image are trained on; anchors of the last pyramid level lie as far apart as
the input's size divided by the map's. Random first weights.

The whole network cannot be exported with ``torch.export``: how many regions there are depends on the photo. Backbone,
``rpn.head`` and the heads on regions can.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch.models import rcnn_parts as parts
from segbatch.models.base import Detections, ModelSpec, Target
from segbatch.models.config import MaskRCNNConfig
from segbatch.models.parts import Part
from segbatch.models.vgg import scaled

Found = dict[str, Tensor]
"""Of one image, as torchvision gives it: boxes (n, 4), scores (n,), labels (n,) from 1 on, masks (n, 1, m, m)."""


class MaskRCNN(nn.Module):
    """The network. Sides of images are multiples of 32.

    Args:
        config: its variant and size.
        classes: classes without background; the network's label k + 1 is class k.
    """

    def __init__(self, config: MaskRCNNConfig, classes: int) -> None:
        super().__init__()
        outputs = classes + 1
        if config.head == "fpn":
            channels = scaled(parts.PYRAMID_CHANNELS, config.width)
            self.backbone = parts.pyramid(config)
            self.roi_heads = parts.pyramid_heads(config, outputs)
        else:
            channels = 4 * scaled(parts.STAGES[2][0], config.width)
            body = parts.resnet50(config)
            self.backbone = parts.fourth_stage(body)
            self.roi_heads = parts.fifth_stage_heads(config, body, outputs)
        self.rpn = parts.proposals(config, channels)

    def forward(self, images: Tensor) -> list[Found]:
        """What it finds in each of the images (n, channels, h, w), in either mode."""
        return regions_found(self, images, features_of(self, images), [_size(images)] * len(images))

    def loss(self, images: Tensor, targets: Sequence[Target], step: int) -> Tensor:
        """Sum of the five losses.

        Args:
            images: (n, channels, h, w) float32, normalised.
            targets: one for each image, on its pixels.
            step: seed of the sampling.
        """
        return torch.stack(list(self.losses(images, features_of(self, images), targets, step).values())).sum()

    def losses(
        self, images: Tensor, features: dict[str, Tensor], targets: Sequence[Target], step: int
    ) -> dict[str, Tensor]:
        """``objectness``, ``proposal_box``, ``class``, ``box``, ``mask``; see ``loss``."""
        sizes = [_size(images)] * len(images)
        truths = [parts.truth_of(t, images.device) for t in targets]
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(step)
            proposals, losses = self.rpn(parts.image_list(images, sizes), features, truths)
            _, more = self.roi_heads(features, proposals, sizes, truths)
        return {**losses, **more}


def features_of(net: Any, images: Tensor) -> dict[str, Tensor]:
    """The backbone's maps by name, float32, of a Mask R-CNN with torchvision's parts."""
    found = net.backbone(images)
    maps = {"0": found} if isinstance(found, Tensor) else found
    return {name: m.float() for name, m in maps.items()}


def regions_found(
    net: Any, images: Tensor, features: dict[str, Tensor], sizes: Sequence[tuple[int, int]]
) -> list[Found]:
    """What ``rpn`` and ``roi_heads`` find in the maps; see ``detect``."""
    shapes = list(sizes)
    proposals, _ = net.rpn(parts.image_list(images, shapes), features, None)
    # Pooled twice, and with the channels together
    together = {name: m.contiguous(memory_format=torch.channels_last) for name, m in features.items()}
    found: list[Found] = net.roi_heads(together, proposals, shapes, None)[0]
    return found


def detect(net: Any, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
    """Run a Mask R-CNN on images that are ready for its backbone, past torchvision's resizing and pasting of masks.

    Args:
        net: in evaluation mode, with the parts of torchvision's ``MaskRCNN``: ``backbone``, ``rpn``, ``roi_heads``.
            The thresholds are those of ``roi_heads`` (torchvision's defaults: scores above .05, suppression at .5 of
            each class, 100 detections).
        images: (n, channels, h, w) float32, normalised, h and w multiples of 32.
        sizes: (height, width) of each image without its padding; boxes are clipped to it.

    Returns:
        One entry for each image; label k + 1 has become class k.
    """
    with torch.inference_mode():
        return [detections(f) for f in regions_found(net, images, features_of(net, images), sizes)]


def detections(found: Found) -> Detections:
    """torchvision's detections of one image as ours."""
    return Detections(
        boxes=found["boxes"].numpy(),
        scores=found["scores"].numpy(),
        classes=found["labels"].numpy() - 1,
        masks=found["masks"][:, 0].numpy(),
    )


def detector_parts(net: Any, digest: str) -> list[Part]:
    """Backbone, head on proposals, and heads on regions of a Mask R-CNN with torchvision's parts.

    Between them lie anchors, suppression and RoIAlign, which depend on what is in the photo and stay torch's.

    Args:
        net: see ``detect``.
        digest: of the model.
    """
    holders = [(net, "backbone"), (net.rpn, "head")]
    holders += [(net.roi_heads, name) for name in ("box_head", "box_predictor", "mask_head", "mask_predictor")]
    return [Part(f"{digest}-{name}", holder, name) for holder, name in holders if getattr(holder, name) is not None]


class MaskRCNNSegmenter:
    """Inference on the CPU, channels last, in evaluation mode, with the thresholds of ``spec.choice``; in fp32 unless
    its parts are replaced.
    """

    def __init__(self, net: MaskRCNN, spec: ModelSpec) -> None:
        self.spec = spec
        self._net = ready(net, spec)

    def parts(self) -> list[Part]:
        """See ``parts.HasParts``."""
        return detector_parts(self._net, self.spec.digest)

    def forward(self, batch: NDArray[Any]) -> list[Detections]:
        """What is found in each image of a float32 batch, (n, h, w, channels) or (n, channels, h, w) as the spec says.

        Boxes are clipped to the batch's h and w: where a photo ends in it is not known here.
        """
        images = images_of(batch, self.spec)
        return detect(self._net, images, [_size(images)] * len(images))


def ready(net: nn.Module, spec: ModelSpec) -> nn.Module:
    """The network in evaluation mode, channels last, its ``RegionHeads`` with the thresholds of ``spec.choice``."""
    for heads in net.modules():
        if isinstance(heads, parts.RegionHeads):
            heads.score_thresh = spec.choice.min_score
            heads.detections_per_img = spec.choice.top_k
            heads.nms_thresh = parts.SUPPRESSION if spec.choice.nms_iou is None else spec.choice.nms_iou
    return net.eval().to(memory_format=torch.channels_last)


def images_of(batch: NDArray[Any], spec: ModelSpec) -> Tensor:
    """(n, channels, h, w), channels last in memory."""
    images = torch.from_numpy(np.ascontiguousarray(batch))
    if spec.input.layout == "nhwc":
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
