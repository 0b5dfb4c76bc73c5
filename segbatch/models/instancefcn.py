"""InstanceFCN (Dai, He, Li, Ren, Sun: Instance-sensitive Fully Convolutional Networks, ECCV 2016, sections 3 and 4).

VGG-16 whose fourth pooling has stride 1 and whose fifth stage is dilated by 2, so stride 8. Two branches of 512
channels: 1x1 and 3x3 convolution to 5 x 5 = 25 instance-sensitive score maps; 3x3 and 1x1 to the objectness of the
window of 21 x 21 cells around each cell. 17,452,890 parameters. A window is assembled from the score maps without
parameters, see ``instancefcn_windows.assemble``. Trained on 256 windows an image, positive and negative ones one to
one, with logistic losses for objectness and for every cell of positive windows; images are resized by a factor drawn
from ``config.scales``. Searched are all scales; suppression at .8 by the masks' tight boxes.

The paper's network knows no categories (its objects are classified by another network, that of MNC). The category head
is ours: a third branch like the objectness, 3x3 to 512 channels and 1x1 to one logit for each class, read at the
window's centre and trained with the cross-entropy of positive windows: 2,359,808 + 513 classes parameters. A detection
is a window with its likeliest class; its score is the objectness times the probability of that class.

What the paper leaves open: the 2x2 pooling of stride 1 is padded by one, so that score maps lie symmetrically (every
other cell of the fifth stage is exactly that of VGG-16); positive and negative are those of DeepMask, as the paper
says, with its lengths in proportion to the window; the truth of a cell is the fraction of it that the object covers;
where positive windows are too few, negative ones fill up the 256; each of the three losses is a mean; windows on
regions of crowds are left out; a window's cells outside the image have no loss.

Deviations: first weights are random (He initialisation; the last layer of each branch normal with deviation .01, as
in the paper; the objectness begins at ``PRIOR``), for which ``norm`` adds batch normalisation to VGG-16; with ``width
< 1`` all hidden layers have that fraction of their channels; only the best ``config.proposals`` windows of each scale
are assembled; images are made smaller with an antialiasing filter.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from segbatch.models import instancefcn_windows as windows
from segbatch.models.base import Detections, ModelSpec, Target
from segbatch.models.config import InstanceFCNConfig
from segbatch.models.parts import Part
from segbatch.models.vgg import STAGES, conv_stages, initialise, scaled

SAMPLED = 256
"""Windows of an image that a training step looks at."""
PRIOR = 0.05
"""Objectness of every window before training; without it a small network learns that nothing ever is an object."""
NMS_IOU = 0.8
"""Of two windows whose tight boxes overlap by more, only the better one stays."""


class Proposals(NamedTuple):
    """Segments of one image without regard to categories, the best first.

    Attributes:
        boxes: (n, 4) left, top, right, bottom in pixels of the image: tight around the mask.
        objectness: (n,) probabilities.
        categories: (n, classes) probabilities, for an object.
        masks: (n, window, window) probabilities on a grid laid over the box.
    """

    boxes: Tensor
    objectness: Tensor
    categories: Tensor
    masks: Tensor


class Sample(NamedTuple):
    """The windows of one image that a training step looks at, the positive ones first.

    Attributes:
        rows, columns: (n,) cells that they are centred on.
        positive: (n,) 1 or 0.
        labels: (p,) class index of the positive ones.
        truth: (p, window, window) 0..1, of the positive ones.
        valid: (p, window, window) bool: the cell lies in the image.
    """

    rows: Tensor
    columns: Tensor
    positive: Tensor
    labels: Tensor
    truth: Tensor
    valid: Tensor


class InstanceFCN(nn.Module):
    """The network.

    Args:
        config: its size.
        classes: of the category head.
    """

    def __init__(self, config: InstanceFCNConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        channels, hidden = (scaled(c, config.width) for c in (STAGES[-1][-1], 512))
        self.stages = conv_stages(config.width, config.norm)
        for layer in self.stages[-1].children():
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (2, 2)
        self.segments = _branch(nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, config.parts**2, 3, padding=1))
        self.objectness = _branch(nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, 1, 1))
        self.category = _branch(nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, classes, 1))
        self.apply(initialise)
        for last in (self.segments[-1], self.objectness[-1], self.category[-1]):
            assert isinstance(last, nn.Conv2d)
            nn.init.normal_(last.weight, std=0.01)
        assert isinstance(self.objectness[-1], nn.Conv2d) and self.objectness[-1].bias is not None
        nn.init.constant_(self.objectness[-1].bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolutions, at one scale.

        Args:
            images: (n, 3, h, w) float of any size.

        Returns:
            Score maps (n, parts^2, rows, columns), objectness (n, 1, rows, columns) and categories (n, classes, rows,
            columns), logits all, with ``instancefcn_windows.cells`` rows and columns.
        """
        x = images
        for stage in self.stages[:3]:
            x = F.max_pool2d(stage(x), 2, ceil_mode=True)
        x = F.max_pool2d(self.stages[3](x), 2, stride=1, padding=1)
        x = self.stages[4](x)
        return self.segments(x), self.objectness(x), self.category(x)

    def loss(self, images: Tensor, targets: Sequence[Target], step: int) -> Tensor:
        """Objectness of the sampled windows, cells and category of the positive ones: three means, added up.

        Args:
            images: (n, 3, h, w) float32, normalised.
            targets: one for each image, on its pixels.
            step: seed of the scale and of the sampling.
        """
        random = torch.Generator().manual_seed(step)
        scale = self.config.scales[int(torch.randint(len(self.config.scales), (), generator=random))]
        resized = _resized(images, scale)
        size = resized.shape[-2], resized.shape[-1]
        maps, objectness, categories = (t.float() for t in self(resized))
        terms: dict[str, list[Tensor]] = {"objectness": [], "segments": [], "category": []}
        for number, target in enumerate(targets):
            sample = Sample(*(t.to(images.device) for t in draw(target, images.shape, size, self.config, random)))
            terms["objectness"].append(
                F.binary_cross_entropy_with_logits(
                    objectness[number, 0, sample.rows, sample.columns], sample.positive, reduction="none"
                )
            )
            rows, columns = sample.rows[: len(sample.labels)], sample.columns[: len(sample.labels)]
            assembled = windows.assemble(maps[number], rows, columns, self.config.window)
            terms["segments"].append(
                F.binary_cross_entropy_with_logits(
                    assembled[sample.valid], sample.truth[sample.valid], reduction="none"
                )
            )
            chosen = categories[number, :, rows, columns].T
            terms["category"].append(F.cross_entropy(chosen, sample.labels, reduction="none"))
        return torch.stack([_mean(torch.cat(values)) for values in terms.values()]).sum()

    @torch.no_grad()
    def propose(self, image: Tensor, threshold: float = 0.5) -> Proposals:
        """Search one image at all scales.

        Args:
            image: (3, h, w) float32, normalised.
            threshold: of the masks, around which the boxes are tight.

        Returns:
            At most ``config.proposals`` segments.
        """
        found = [self._propose_at(image, scale, threshold) for scale in self.config.scales]
        boxes, tight, objectness, categories, masks = (torch.cat(each) for each in zip(*found, strict=True))
        order = objectness.argsort(descending=True, stable=True)
        order = order[windows.suppress(boxes[order], NMS_IOU, self.config.proposals)]
        return Proposals(boxes[order], objectness[order], categories[order], windows.within(masks[order], tight[order]))

    def _propose_at(self, image: Tensor, scale: float, threshold: float) -> tuple[Tensor, ...]:
        """At one scale: boxes in pixels of the image, the same in cells of the windows, objectness, categories,
        assembled windows; windows without a mask in the image are left out.
        """
        resized = _resized(image[None], scale)
        maps, objectness, categories = (t[0].float() for t in self(resized))
        flat = objectness.flatten()
        best = flat.topk(min(self.config.proposals, len(flat))).indices
        rows, columns = best // objectness.shape[2], best % objectness.shape[2]
        masks = windows.assemble(maps, rows, columns, self.config.window).sigmoid()
        tight = windows.tight_boxes(masks, threshold)
        corner = torch.stack([columns, rows, columns, rows], 1) - self.config.window / 2
        sides = torch.tensor([image.shape[2], image.shape[1]] * 2, device=image.device)
        factor = windows.STRIDE * sides / torch.tensor([resized.shape[3], resized.shape[2]] * 2, device=image.device)
        boxes = torch.minimum(((tight + corner) * factor).clamp_min(0), sides)
        there = (boxes[:, 2:] > boxes[:, :2]).all(1)
        tight = boxes / factor - corner
        chances = categories[:, rows, columns].T.softmax(1)
        return tuple(t[there] for t in (boxes, tight, flat[best].sigmoid(), chances, masks))


class InstanceFCNSegmenter:
    """Inference on the CPU, channels last, in evaluation mode; in fp32 unless its parts are replaced.

    Boxes are tight at ``choice.mask_threshold``.
    """

    def __init__(self, net: InstanceFCN, spec: ModelSpec) -> None:
        self.spec = spec
        self._net: InstanceFCN = net.eval().to(memory_format=torch.channels_last)

    def parts(self) -> list[Part]:
        """See ``parts.HasParts``: every stage, because what follows on the last one does so at every scale."""
        key = self.spec.digest
        stages = [Part(f"{key}-stage{n}", self._net.stages, str(n)) for n in range(len(self._net.stages))]
        heads = ("segments", "objectness", "category")
        return [*stages, *(Part(f"{key}-{head}", self._net, head) for head in heads)]

    def forward(self, batch: NDArray[Any]) -> list[Detections]:
        """What is found in each image of a float32 batch, (n, h, w, 3) or (n, 3, h, w) as the spec says.

        Images go through the network one at a time: the largest scale takes much memory, and so a result does not
        depend on what else is in the batch.
        """
        images = torch.from_numpy(np.ascontiguousarray(batch))
        if self.spec.input.layout == "nhwc":
            images = images.permute(0, 3, 1, 2)
        return [_detections(self._net.propose(i, self.spec.choice.mask_threshold)) for i in images]


def _detections(found: Proposals) -> Detections:
    """Every segment with its likeliest category."""
    chance, category = found.categories.max(1)
    return Detections(
        boxes=found.boxes.numpy(),
        scores=(found.objectness * chance).numpy(),
        classes=category.numpy(),
        masks=found.masks.numpy(),
    )


def draw(
    target: Target, shape: Sequence[int], size: tuple[int, int], config: InstanceFCNConfig, random: torch.Generator
) -> Sample:
    """Windows of one image: at most half of them positive, and no object of a crowd in the middle of any.

    Args:
        target: what is in the image.
        shape: of the images that ``target`` belongs to; ends in height and width.
        size: (height, width) that they were resized to.
        config: says how large a window is.
        random: of the draw.
    """
    crowds, single = target.masks[target.iscrowd], torch.from_numpy(np.flatnonzero(~target.iscrowd))
    factor = torch.tensor([size[1] / shape[-1], size[0] / shape[-2]] * 2)
    matching = windows.match(torch.from_numpy(target.boxes)[single] * factor, size, config.window)
    crowded = (windows.coverage(torch.from_numpy(crowds), size) > 0).any(0)
    positive = _some(((matching.objects >= 0) & ~crowded).nonzero(), SAMPLED // 2, random)
    negative = _some((matching.negative & ~crowded).nonzero(), SAMPLED - len(positive), random)
    rows, columns = torch.cat([positive, negative]).T
    return _with_truth(target, size, config, rows, columns, single[matching.objects[tuple(positive.T)]])


def _with_truth(
    target: Target, size: tuple[int, int], config: InstanceFCNConfig, rows: Tensor, columns: Tensor, objects: Tensor
) -> Sample:
    """The sample of these windows; the first ones fit those objects."""
    count = len(objects)
    seen, owner = np.unique(objects.numpy(), return_inverse=True)
    covered = windows.coverage(torch.from_numpy(target.masks[seen]), size)
    down, in_rows = windows.inside(rows[:count], config.window, covered.shape[1])
    across, in_columns = windows.inside(columns[:count], config.window, covered.shape[2])
    return Sample(
        rows=rows,
        columns=columns,
        positive=(torch.arange(len(rows)) < count).float(),
        labels=torch.from_numpy(target.labels)[objects],
        truth=covered[torch.from_numpy(owner)[:, None, None], down[:, :, None], across[:, None, :]],
        valid=in_rows[:, :, None] & in_columns[:, None, :],
    )


def _some(found: Tensor, most: int, random: torch.Generator) -> Tensor:
    """At most so many of them, drawn by chance."""
    return found[torch.randperm(len(found), generator=random)[:most]]


def _mean(values: Tensor) -> Tensor:
    """0 of nothing."""
    return values.sum() / max(len(values), 1)


def _branch(first: nn.Conv2d, last: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(inplace=True), last)


def _resized(images: Tensor, scale: float) -> Tensor:
    """So much larger, sides rounded to multiples of the stride."""
    size = [max(round(side * scale / windows.STRIDE), 1) * windows.STRIDE for side in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
