"""torchvision's Mask R-CNN; see ``torchvision_zoo`` for references.

Official code: ``pytorch/vision``, torchvision/models/detection/mask_rcnn.py, transform.py, roi_heads.py.

Photos are resized, normalised and padded by torchvision's own transform: shorter side 800, longer one at most 1333,
sides a multiple of 32. A side-car may say otherwise: ``height`` (of the shorter side), ``longest``, ``height`` and
``width``, ``mean``, ``std``, ``channel_order``; and ``min_score``, ``nms_iou``, ``top_k``, ``mask_threshold``.

With torchvision's trained weights label ids are its labels: COCO's category ids. Any other file needs a class list. It
names all outputs in their order, the background before them or not (a list without label ids counts from 0: only with
the background in it are they torchvision's labels); or some of them: then label ids are the numbers of the outputs, the
background's being 0. Detections of outputs without a name are dropped: COCO has 80 for 91.

Deviations: the strides of RoIAlign are the pyramid's, 4 to 32; torchvision works them out from the first photo that it
sees and gets them wrong if that is a narrow strip. The epsilon of the frozen normalisation is 1e-5, which is that of
training from ImageNet weights; with ``COCO_V1`` itself torchvision makes it 0, and so do we, but a file that was
fine-tuned from ``COCO_V1`` does not tell.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from segbatch.config import digest_of
from segbatch.errors import ConfigError, DataError
from segbatch.models.base import Choice, Detections, InputSpec, ModelSpec
from segbatch.models.foreign import fed
from segbatch.models.maskrcnn import detect, detector_parts
from segbatch.models.parts import Part
from segbatch.models.rcnn_parts import RegionPooling
from segbatch.models.side_car import check_keys, choice_of, class_table_for
from segbatch.models.torchvision_files import INPUT_KEYS, Given
from segbatch.records import ClassInfo, ClassTable

_CHOICE_KEYS = ("min_score", "nms_iou", "top_k", "mask_threshold")
_COUNTER = "num_batches_tracked"
_STRIDES = (4, 32)

_RENAMED = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", r"\1.0.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    *((rf"roi_heads\.mask_head\.mask_fcn{n + 1}\.(weight|bias)", rf"roi_heads.mask_head.{n}.0.\1") for n in range(4)),
)
"""Tensors whose names torchvision has changed since it published ``COCO_V1``, and today's names."""


@dataclass(frozen=True, slots=True)
class MaskRCNNNetwork:
    """Mask R-CNN on ResNet-50 with a feature pyramid, version 1 or 2.

    Attributes:
        given: its files.
        outputs: how many classes it tells apart, the background included.
        named: index into the classes for each output behind the background; -1 where it has no name.
        spec: what it is and wants.
    """

    given: Given
    outputs: int
    named: tuple[int, ...]
    spec: ModelSpec

    @classmethod
    def of(cls, given: Given) -> "MaskRCNNNetwork":
        """Everything but the network itself.

        Raises:
            ConfigError: the file is of another network, has no classes, or what stands beside it does not go with it.
        """
        check_keys(given.side_car, given.file.uri, (*INPUT_KEYS, *_CHOICE_KEYS))
        given = _today(given)
        file, side_car = given.file, given.side_car
        outputs = given.outputs("roi_heads.box_predictor.cls_score.weight")
        wants = given.input_spec(InputSpec(height=800, longest=1333, divisor=32), {"stretch", "short-side"})
        classes, named = _arranged(given, outputs)
        choice = choice_of(side_car, Choice())
        decides = {
            "name": given.name,
            "file": file.sha256,
            "input": dataclasses.asdict(wants),
            "channel_order": side_car.channel_order,
            "named": named,
            "label_ids": [c.label_id for c in classes.classes],
            "choice": dataclasses.asdict(choice),
        }
        spec = ModelSpec(
            name=given.reference,
            task="instance",
            classes=classes,
            input=wants,
            output="detections",
            digest=digest_of(decides),
            licence=side_car.licence,
            source=given.source,
            choice=choice,
        )
        return cls(given, outputs, named, spec)

    def build(self) -> nn.Module:
        """See ``torchvision_zoo.Network``."""
        wants, choice = self.spec.input, self.spec.choice
        options = {
            "min_size": wants.height,
            "max_size": wants.longest or 0,
            "fixed_size": (wants.width, wants.height) if wants.width else None,
            "image_mean": list(wants.mean),
            "image_std": list(wants.std),
            "box_score_thresh": choice.min_score,
            "box_detections_per_img": choice.top_k,
            "box_nms_thresh": 0.5 if choice.nms_iou is None else choice.nms_iou,
        }
        net: nn.Module
        if _frozen(self.given):
            net = MaskRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), self.outputs, **options)
        else:
            name = self.given.name
            net = get_model(name, weights=None, weights_backbone=None, num_classes=self.outputs, **options)
        return net

    def segmenter(self, net: nn.Module) -> "MaskRCNNSegmenter":
        """See ``torchvision_zoo.Network``."""
        if self.given.trained:
            for layer in net.modules():
                if isinstance(layer, FrozenBatchNorm2d):
                    layer.eps = 0.0
        return MaskRCNNSegmenter(net, self)


def _today(given: Given) -> Given:
    """The same file with today's names, and without counters that the network does not have."""
    tensors = given.file.tensors
    for old, new in _RENAMED:
        tensors = {re.sub(f"^{old}$", new, k): v for k, v in tensors.items()}
    if _frozen(given):
        tensors = {k: v for k, v in tensors.items() if not (k.startswith("backbone.body.") and k.endswith(_COUNTER))}
    return dataclasses.replace(given, file=dataclasses.replace(given.file, tensors=tensors))


def _frozen(given: Given) -> bool:
    """Whether the backbone's normalisation is frozen: in version 1, unless it was trained from random weights."""
    counts = f"backbone.body.bn1.{_COUNTER}" in given.file.tensors
    return given.name == "maskrcnn_resnet50_fpn" and (given.trained is not None or not counts)


def _arranged(given: Given, outputs: int) -> tuple[ClassTable, tuple[int, ...]]:
    """The classes, and for each output behind the background the index of its class or -1."""
    uri, side_car = given.file.uri, given.side_car
    table = class_table_for(uri, None, given.classes_uri, side_car, _own_classes(given)).classes
    if not table:
        raise ConfigError(
            f"{uri} does not name its {outputs - 1} classes", f"give --classes FILE, or classes = [...] in {uri}.toml"
        )
    if len(table) == outputs:
        table = table[1:]
    ids = [c.label_id for c in table]
    numbers = list(range(1, outputs)) if len(table) == outputs - 1 else ids
    if not all(1 <= n < outputs for n in numbers):
        raise ConfigError(
            f"{len(table)} classes are named for {uri}, which has {outputs - 1} and the background",
            f"name them all, or give label ids in 1..{outputs - 1}",
        )
    if side_car.things is None:
        table = tuple(dataclasses.replace(c, isthing=True) for c in table)
    named = [-1] * (outputs - 1)
    for index, number in enumerate(numbers):
        named[number - 1] = index
    return ClassTable(table), tuple(named)


def _own_classes(given: Given) -> ClassTable:
    """COCO's classes under their category ids, or none."""
    names = given.trained.meta["categories"] if given.trained else []
    return ClassTable(tuple(ClassInfo(i, n, isthing=True) for i, n in enumerate(names) if i and n != "N/A"))


class MaskRCNNSegmenter:
    """torchvision's transform, then the network past it: boxes and unpasted masks."""

    def __init__(self, net: Any, network: MaskRCNNNetwork) -> None:
        self.spec = network.spec
        heads = net.roi_heads
        heads.box_roi_pool = RegionPooling(4, heads.box_roi_pool.output_size[0], _STRIDES)
        heads.mask_roi_pool = RegionPooling(4, heads.mask_roi_pool.output_size[0], _STRIDES)
        self._net = net.eval().to(memory_format=torch.channels_last)
        self._flip = network.given.side_car.channel_order == "bgr"
        self._named = np.array(network.named, np.int64)

    def parts(self) -> list[Part]:
        """See ``parts.HasParts``."""
        return detector_parts(self._net, self.spec.digest)

    def prepare(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """See ``OwnInput``: (4, h, w), the last channel 1 where the photo is and 0 where the padding is.

        Raises:
            DataError: a photo so narrow that nothing would be left of it.
        """
        wants, height, width = self.spec.input, *rgb.shape[:2]
        if wants.longest and wants.longest * min(height, width) < max(height, width):
            raise DataError(f"a photo of {width} x {height} is too narrow for the network", "crop it", "too-narrow")
        image = torch.from_numpy(np.array(rgb.transpose(2, 0, 1), order="C"))
        with torch.inference_mode():
            images, _ = self._net.transform([image.float() / 255])
        fed_height, fed_width = images.image_sizes[0]
        photo = images.tensors.new_zeros(1, *images.tensors.shape[2:])
        photo[:, :fed_height, :fed_width] = 1
        tensor: NDArray[np.float32] = torch.cat([images.tensors[0], photo]).numpy()
        return tensor, (fed_height, fed_width)

    def forward(self, batch: NDArray[np.float32]) -> list[Detections]:
        """(n, 4, h, w) of ``prepare`` -> what is found in each image."""
        sizes = [(int(photo[:, 0].sum()), int(photo[0].sum())) for photo in batch[:, 3]]
        return [self._by_class(d) for d in detect(self._net, fed(batch[:, :3], self.spec, self._flip), sizes)]

    def _by_class(self, found: Detections) -> Detections:
        classes = self._named[found.classes]
        kept = classes >= 0
        return Detections(found.boxes[kept], found.scores[kept], classes[kept], found.masks[kept])
