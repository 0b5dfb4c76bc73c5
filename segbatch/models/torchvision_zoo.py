"""torchvision's networks: ``torchvision:NAME=WEIGHTS`` and ``torchvision:NAME@FILE``.

NAME is one of torchvision's: FCN and DeepLab v3 on ResNet-50 and ResNet-101, DeepLab v3 and LR-ASPP on MobileNetV3
(``torchvision_semantic``), Mask R-CNN on ResNet-50 with a feature pyramid (``torchvision_maskrcnn``). WEIGHTS
names trained ones (``DEFAULT``, ``COCO_WITH_VOC_LABELS_V1``, ``COCO_V1``), taken from torch's download cache. FILE is a
state dict of that network, local or remote, by ``torch.save`` or safetensors; how many outputs it has follows from its
tensors. Random weights are never run. Official code: ``pytorch/vision``.

Classes: ``--classes``, else the side-car ``FILE.toml``, else those of the trained weights. A file whose SHA-256 is that
of trained weights is those. Of another file nothing is concluded from its number of outputs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from segbatch.models.base import ModelSpec, Segmenter
from segbatch.models.torchvision_files import Given, opened
from segbatch.models.waiting import wait_passively

if TYPE_CHECKING:
    from torch import nn


class Network(Protocol):
    """One of torchvision's networks; its weights are read but not yet in it."""

    @property
    def given(self) -> Given:
        """Its files."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """What it is and wants."""
        ...

    def build(self) -> "nn.Module":
        """The network with random weights."""
        ...

    def segmenter(self, net: "nn.Module") -> Segmenter:
        """The network, its weights in it, ready for inference."""
        ...


@dataclass(frozen=True, slots=True)
class TorchvisionSource:
    """``NAME=WEIGHTS`` or ``NAME@FILE`` and, optionally, a class list."""

    what: str
    classes_uri: str = ""
    has_parts: ClassVar[bool] = True

    @property
    def reference(self) -> str:
        """``torchvision:NAME=WEIGHTS`` or ``torchvision:NAME@FILE``."""
        return f"torchvision:{self.what}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; trained weights that are not there are downloaded, and a file must fit its network."""
        network = self._network()
        from segbatch.models.foreign import check_fit

        check_fit(network.build, network.given.file)
        return network.spec

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        network = self._network()
        import torch

        from segbatch.models.foreign import put_in

        torch.set_num_threads(threads)
        net = network.build()
        put_in(net, network.given.file)
        return network.segmenter(net)

    def _network(self) -> Network:
        wait_passively()
        given = opened(self.what, self.classes_uri)
        if given.name.startswith("maskrcnn"):
            from segbatch.models.torchvision_maskrcnn import MaskRCNNNetwork

            return MaskRCNNNetwork.of(given)
        from segbatch.models.torchvision_semantic import SemanticNetwork

        return SemanticNetwork.of(given)
