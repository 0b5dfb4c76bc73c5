"""torchvision's FCN, DeepLab v3 and LR-ASPP; see ``torchvision_zoo`` for references and classes.

Official code: ``pytorch/vision``, torchvision/models/segmentation, torchvision/transforms/_presets.py.

Photos are resized with anti-aliasing as torchvision does it with tensors (with PIL images it comes to one grey level
more or less here and there), and normalised. A side-car may say otherwise: ``height`` (of the shorter side), ``height``
and ``width``, ``resize = "none"``, ``longest``, ``mean``, ``std``, ``channel_order``.

A file without class names gives label maps as they come, even one with PASCAL VOC's 21 outputs. One output is the
foreground's, which makes two classes. The auxiliary head, 7 % of the work, is left out: only training needs it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms import functional

from segbatch.config import digest_of
from segbatch.errors import DataError
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.models.classes import ClassesFile, class_table
from segbatch.models.foreign import ForeignSegmenter
from segbatch.models.side_car import check_keys, class_table_for
from segbatch.models.torchvision_files import INPUT_KEYS, Given
from segbatch.records import ClassTable

_MAX_PIXELS = 1 << 26
"""No photo is made larger than this: of a strip one pixel high the transform would make gigabytes."""


@dataclass(frozen=True, slots=True)
class SemanticNetwork:
    """FCN, DeepLab v3 or LR-ASPP.

    Attributes:
        given: its files.
        outputs: how many it has.
        spec: what it is and wants.
    """

    given: Given
    outputs: int
    spec: ModelSpec

    @classmethod
    def of(cls, given: Given) -> "SemanticNetwork":
        """Everything but the network itself.

        Raises:
            ConfigError: the file is of another network, or what stands beside it does not go with it.
        """
        check_keys(given.side_car, given.file.uri, INPUT_KEYS)
        given = dataclasses.replace(given, file=given.file.without("aux_classifier."))
        file, side_car = given.file, given.side_car
        last = "classifier.low_classifier.weight" if given.name.startswith("lraspp") else "classifier.4.weight"
        outputs = given.outputs(last)
        wants = given.input_spec(InputSpec(height=520), {"none", "stretch", "short-side"})
        own = _own_classes(given, outputs)
        classes = class_table_for(file.uri, max(outputs, 2), given.classes_uri, side_car, own)
        decides = {
            "name": given.name,
            "file": file.sha256,
            "input": dataclasses.asdict(wants),
            "channel_order": side_car.channel_order,
            "label_ids": [c.label_id for c in classes.classes],
        }
        spec = ModelSpec(
            name=given.reference,
            task="semantic",
            classes=classes,
            input=wants,
            output="logits",
            digest=digest_of(decides),
            licence=side_car.licence,
            source=given.source,
        )
        return cls(given, outputs, spec)

    def build(self) -> nn.Module:
        """See ``torchvision_zoo.Network``; without an auxiliary head."""
        net: nn.Module = get_model(self.given.name, weights=None, weights_backbone=None, num_classes=self.outputs)
        return net

    def segmenter(self, net: nn.Module) -> "SemanticSegmenter":
        """See ``torchvision_zoo.Network``."""
        return SemanticSegmenter(net, self.spec, self.given.side_car.channel_order or "rgb")


def _own_classes(given: Given, outputs: int) -> ClassTable | None:
    if given.trained:
        names = tuple(n.strip("_") for n in given.trained.meta["categories"])
        return class_table(ClassesFile(classes=names), given.trained.url)
    return class_table(ClassesFile(classes=("background", "foreground")), given.file.uri) if outputs == 1 else None


class SemanticSegmenter(ForeignSegmenter):
    """torchvision's transform, then the network: logits of the size that it is fed."""

    def prepare(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[Any], tuple[int, int]]:
        """See ``OwnInput``.

        Raises:
            DataError: a photo so narrow that it would be made gigabytes.
        """
        wants = self.spec.input
        image = torch.from_numpy(np.array(rgb.transpose(2, 0, 1), order="C"))
        if wants.height:
            size = [wants.height, wants.width] if wants.width else [wants.height]
            _check_pixels(rgb.shape[0], rgb.shape[1], wants)
            image = functional.resize(image, size, max_size=wants.longest, antialias=True)
        tensor: Tensor = functional.normalize(functional.convert_image_dtype(image), list(wants.mean), list(wants.std))
        return tensor.numpy(), (tensor.shape[1], tensor.shape[2])

    def scores(self, images: Tensor) -> Tensor:
        """Of the main head."""
        scores: Tensor = self.net(images)["out"]
        return scores


def _check_pixels(height: int, width: int, wants: InputSpec) -> None:
    short = wants.height or 0
    long = wants.width or min(short * max(height, width) // min(height, width), wants.longest or _MAX_PIXELS)
    if short * long > _MAX_PIXELS:
        raise DataError(f"a photo of {width} x {height} would be fed as {short} x {long}", "crop it", "too-large")
