"""Panoptic FPN (Kirillov, Girshick, He, Dollar: Panoptic Feature Pyramid Networks, CVPR 2019, section 3, figures 1 and
3) on ResNet-50; official code: ``facebookresearch/detectron2`` (``PanopticFPN``, ``SemSegFPNHead``).

Mask R-CNN with a feature pyramid (``segbatch.models.maskrcnn``, its deviations too) and a semantic branch on the same
maps: 3x3 convolution of 128 channels, group normalisation, ReLU, twofold bilinear enlargement, three times for stride
32, twice for 16, once for 8, the convolution alone for 4; their sum; 1x1 convolution to "some thing" (all things
together) and the stuff classes; fourfold bilinear enlargement. With 80 things and 53 stuff classes 46,031,467
parameters, 1,630,774 of them in the semantic branch.

Loss (section 3.1): Mask R-CNN's five, and .5 (detectron2) times the mean cross-entropy of the pixels that are not void.
How things and stuff are merged: ``segbatch.inference.panoptic``.

What can be exported with ``torch.export``: as for Mask R-CNN, and the semantic branch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.errors import ConfigError
from segbatch.models import rcnn_parts as parts
from segbatch.models.base import Detections, ModelSpec, PanopticParts, Target
from segbatch.models.config import PanopticFPNConfig
from segbatch.models.maskrcnn import (
    MaskRCNN,
    detections,
    detector_parts,
    features_of,
    images_of,
    ready,
    regions_found,
)
from segbatch.models.parts import Part
from segbatch.models.vgg import scaled
from segbatch.records import ClassTable

SEMANTIC_CHANNELS = 128
VOID = -1
LEVELS = ("0", "1", "2", "3")
"""Maps of the semantic branch, strides 4, 8, 16, 32."""
_STRIDE = 4


class PanopticFPN(nn.Module):
    """The network. Sides of images are multiples of 32.

    Args:
        config: its size.
        classes: things and stuff, at least one of each.

    Raises:
        ConfigError: no things, or no stuff.
    """

    def __init__(self, config: PanopticFPNConfig, classes: ClassTable) -> None:
        super().__init__()
        self.things = [index for index, c in enumerate(classes.classes) if c.isthing]
        self.stuff = [index for index, c in enumerate(classes.classes) if not c.isthing]
        if not self.things or not self.stuff:
            missing, word = ("things", "true") if not self.things else ("stuff", "false")
            raise ConfigError(
                f"panoptic_fpn needs things and stuff; of the {len(classes.classes)} classes none is {missing}",
                f"say `isthing = {word}` of some in the class list, or take maskrcnn or a semantic network",
            )
        self.instances = MaskRCNN(config.instances, len(self.things))
        inputs, channels = (scaled(c, config.width) for c in (parts.PYRAMID_CHANNELS, SEMANTIC_CHANNELS))
        self.semantic = SemanticBranch(inputs, channels, 1 + len(self.stuff), config.width)
        self._semantic_weight = config.semantic_weight

    def forward(self, images: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Things as ``MaskRCNN`` gives them, with labels counting things only; logits (n, 1 + stuff, h / 4, w / 4)."""
        features = features_of(self.instances, images)
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        return regions_found(self.instances, images, features, sizes), self.semantic(features)

    def loss(self, images: Tensor, targets: Sequence[Target], step: int) -> Tensor:
        """Instance losses plus the weighted semantic one; see ``MaskRCNN.loss``."""
        return torch.stack(list(self.losses(images, targets, step).values())).sum()

    def losses(self, images: Tensor, targets: Sequence[Target], step: int) -> dict[str, Tensor]:
        """Those of ``MaskRCNN.losses``, and ``semantic``, its weight included.

        Raises:
            ValueError: a target without class map, or with an object that is not of a thing class.
        """
        features = features_of(self.instances, images)
        found = self.instances.losses(images, features, [self._things_of(t) for t in targets], step)
        wanted = torch.stack([self._channels_of(t) for t in targets]).to(images.device)
        logits = F.interpolate(self.semantic(features), scale_factor=_STRIDE, mode="bilinear")
        pixels = (wanted != VOID).sum().clamp(min=1)
        summed = F.cross_entropy(logits, wanted, ignore_index=VOID, reduction="sum")
        return {**found, "semantic": self._semantic_weight * summed / pixels}

    def _things_of(self, target: Target) -> Target:
        """The target with labels that count things only."""
        single = target.labels[~target.iscrowd]
        if not np.isin(single, self.things).all():
            raise ValueError(f"objects of classes {sorted({*single.tolist()})}, things are {self.things}")
        labels = np.searchsorted(self.things, target.labels).astype(np.int64)
        return Target(target.classes, target.boxes, labels, target.masks, target.iscrowd)

    def _channels_of(self, target: Target) -> Tensor:
        """(h, w) int64: channel of the semantic branch, void where the target is."""
        if target.classes is None:
            raise ValueError("a panoptic target has a class map")
        table = np.full(len(self.things) + len(self.stuff) + 1, VOID, np.int64)
        table[self.things] = 0
        table[self.stuff] = 1 + np.arange(len(self.stuff))
        return torch.from_numpy(table[target.classes])  # -1 is the last entry


class SemanticBranch(nn.Module):
    """Pyramid maps -> logits of stride 4.

    Args:
        inputs: channels of the maps.
        channels: of its own layers.
        outputs: classes.
        width: fraction of the paper's channels, for the groups of the normalisation.
    """

    def __init__(self, inputs: int, channels: int, outputs: int, width: float) -> None:
        super().__init__()
        norm = parts.normalisation("group", width)
        self.levels = nn.ModuleDict()
        for level, name in enumerate(LEVELS):
            stages = [_stage(inputs if n == 0 else channels, channels, level > 0, norm) for n in range(max(level, 1))]
            self.levels[name] = nn.Sequential(*stages)
        self.head = nn.Conv2d(channels, outputs, 1)
        self.apply(parts.he_initialise)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (n, outputs, h / 4, w / 4) float32."""
        summed = torch.stack([self.levels[name](features[name]) for name in LEVELS]).sum(0)
        logits: Tensor = self.head(summed)
        return logits.float()


def _stage(inputs: int, channels: int, enlarges: bool, norm: parts.Norm) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.Upsample(scale_factor=2, mode="bilinear")] if enlarges else []))


class PanopticFPNSegmenter:
    """Inference on the CPU, channels last, in evaluation mode, with the thresholds of ``spec.choice``; in fp32 unless
    its parts are replaced.
    """

    def __init__(self, net: PanopticFPN, spec: ModelSpec) -> None:
        self.spec = spec
        self._net: Any = ready(net, spec)
        self._things = np.array(net.things, np.int64)

    def parts(self) -> list[Part]:
        """See ``parts.HasParts``."""
        semantic = Part(f"{self.spec.digest}-semantic", self._net, "semantic")
        return [*detector_parts(self._net.instances, self.spec.digest), semantic]

    def forward(self, batch: NDArray[Any]) -> list[PanopticParts]:
        """Things, and logits of stride 4, of each image; see ``MaskRCNNSegmenter.forward``."""
        with torch.inference_mode():
            found, logits = self._net(images_of(batch, self.spec))
        return [
            PanopticParts(scores, self._named(detections(f))) for scores, f in zip(logits.numpy(), found, strict=True)
        ]

    def _named(self, found: Detections) -> Detections:
        """Classes that count things only as indices into the whole class table."""
        return Detections(found.boxes, found.scores, self._things[found.classes], found.masks)
