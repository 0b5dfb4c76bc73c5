"""The built-in architectures, one explicit entry each; nothing heavy is imported until a network is built."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Protocol

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.models.base import Choice, InputSpec, ModelSpec, Output, Segmenter, Target
from segbatch.models.config import (
    ColorConfig,
    DeepLabConfig,
    FCNConfig,
    InstanceFCNConfig,
    MaskRCNNConfig,
    NetworkConfig,
    PanopticFPNConfig,
    PatchConfig,
    SegNetConfig,
    UNetConfig,
    UNetValidConfig,
)
from segbatch.records import ClassTable, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

_IMAGENET_HALF = (0.5, 0.5, 0.5)


def _input(config: NetworkConfig) -> InputSpec:
    """Channels last, any size: RGB as ImageNet's networks see it; what becomes grey, and CT slices, in -1..1."""
    if config.hounsfield is not None:
        halves = (0.5,) * config.channels
        return InputSpec(layout="nhwc", mean=halves, std=halves, slices=config.channels, window=config.hounsfield)
    if config.channels == 1:
        return InputSpec(layout="nhwc", mean=_IMAGENET_HALF, std=_IMAGENET_HALF)
    return InputSpec(layout="nhwc")


class Architecture(Protocol):
    """A family of networks whose trained weights lie in a checkpoint folder (see ``segbatch.models.checkpoint``)."""

    @property
    def summary(self) -> str:
        """One line for ``segbatch models``."""
        ...

    @property
    def paper(self) -> str:
        """Authors, title, where it was published."""
        ...

    @property
    def config(self) -> type[Any]:
        """The pydantic model of its configuration, with a literal field ``kind`` equal to its name."""
        ...

    @property
    def task(self) -> Task:
        """What it predicts, and so what it is trained on."""
        ...

    @property
    def output(self) -> Output:
        """See ``ModelSpec.output``."""
        ...

    @property
    def choice(self) -> Choice:
        """See ``ModelSpec.choice``."""
        ...

    def input_spec(self, config: Any) -> InputSpec:
        """What a network of this configuration is fed."""
        ...

    def build(self, config: Any, classes: ClassTable) -> "torch.nn.Module":
        """A network with fresh weights; ``state_dict`` is what a checkpoint holds."""
        ...

    def begin(self, net: "torch.nn.Module", config: Any) -> None:
        """Put the weights that its training begins with into a fresh network, where the configuration names some.

        Raises:
            ConfigError: they are not there, or do not fit.
        """
        ...

    def loss(
        self, net: "torch.nn.Module", images: "torch.Tensor", targets: "Sequence[Target]", step: int
    ) -> "torch.Tensor":
        """What a training step makes smaller; asked of instance and panoptic networks only.

        Args:
            net: in training mode.
            images: (n, channels, h, w) float32, as ``input_spec`` says.
            targets: one for each image.
            step: number of the step, the seed of whatever is drawn by chance.
        """
        ...

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """The network ready for inference."""
        ...


class _Network:
    """What the torch networks have in common: float RGB of any size in, logits out, trained from scratch."""

    task: Task = "semantic"
    output: Output = "logits"
    choice = Choice()

    def input_spec(self, config: Any) -> InputSpec:
        """Float RGB or CT slices of any size, channels last."""
        return _input(config)

    def begin(self, net: "torch.nn.Module", config: Any) -> None:
        """Nothing: training begins with random weights."""

    def loss(
        self, net: "torch.nn.Module", images: "torch.Tensor", targets: "Sequence[Target]", step: int
    ) -> "torch.Tensor":
        """Semantic networks are trained with the loss of ``segbatch.training.losses``."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """Evaluation mode, channels last."""
        from segbatch.models.network import TorchSegmenter

        return TorchSegmenter(net, spec)


class UNetArchitecture(_Network):
    """See ``segbatch.models.unet``."""

    summary = "padded U-Net with batch normalisation; own encoder, or EfficientNet-Lite0 with ImageNet weights"
    paper = "Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, arXiv:1505.04597; padded and batch-normalised"
    config = UNetConfig

    def input_spec(self, config: UNetConfig) -> InputSpec:
        """Float RGB, channels last; any size unless ``config.input_size`` fixes it."""
        height, width = config.input_size or (None, None)
        spec = dataclasses.replace(
            _input(config),
            height=height,
            width=width,
            resize="stretch" if config.input_size else "none",
            divisor=32 if config.encoder else 1 << (config.depth - 1),
        )
        if config.encoder and config.hounsfield is None:  # Lite0 was trained on inputs in -1..1
            return dataclasses.replace(spec, mean=_IMAGENET_HALF, std=_IMAGENET_HALF)
        return spec

    def build(self, config: UNetConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``unet.UNet`` with He initialisation; a foreign encoder too has random weights."""
        from segbatch.models.unet import UNet

        return UNet(config, len(classes.classes))

    def begin(self, net: "torch.nn.Module", config: UNetConfig) -> None:
        """The encoder's ImageNet weights."""
        from segbatch.models.unet import UNet, load_pretrained

        assert isinstance(net, UNet)
        if config.encoder and config.pretrained:
            load_pretrained(net)


class FCNArchitecture(_Network):
    """See ``segbatch.models.fcn``."""

    summary = "FCN-32s, FCN-16s, FCN-8s on VGG-16: scores of three depths, up-sampled and added"
    paper = "Long, Shelhamer, Darrell: Fully Convolutional Networks, CVPR 2015, arXiv:1411.4038"
    config = FCNConfig

    def build(self, config: FCNConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``fcn.FCN``: He initialisation, zero scores, bilinear up-sampling."""
        from segbatch.models.fcn import FCN

        return FCN(config, len(classes.classes))

    def begin(self, net: "torch.nn.Module", config: FCNConfig) -> None:
        """The weights of the coarser FCN that ``config.warm_start`` names."""
        if not config.warm_start:
            return
        from segbatch.models import checkpoint
        from segbatch.models.fcn import FCN, warm_start

        assert isinstance(net, FCN)
        found = checkpoint.read(config.warm_start)
        warm_start(net, checkpoint.read_state(found.weights, found.uri), found.uri)


class SegNetArchitecture(_Network):
    """See ``segbatch.models.segnet``."""

    summary = "SegNet on VGG-16, and SegNet-Basic: the decoder unpools by the encoder's pooling indices"
    paper = "Badrinarayanan, Kendall, Cipolla: SegNet, TPAMI 2017, arXiv:1511.00561"
    config = SegNetConfig

    def build(self, config: SegNetConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``segnet.SegNet`` with He initialisation."""
        from segbatch.models.segnet import SegNet

        return SegNet(config, len(classes.classes))


class DeepLabArchitecture(_Network):
    """See ``segbatch.models.deeplab``."""

    summary = "DeepLab v3+ on Aligned Xception-65, ResNet-50 or ResNet-101: atrous pyramid and decoder"
    paper = "Chen et al.: Encoder-Decoder with Atrous Separable Convolution, ECCV 2018, arXiv:1802.02611"
    config = DeepLabConfig

    def build(self, config: DeepLabConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``deeplab.DeepLab`` with random weights."""
        from segbatch.models.deeplab import DeepLab

        return DeepLab(config, len(classes.classes))


class UNetValidArchitecture(_Network):
    """See ``segbatch.models.unet_valid``."""

    summary = "U-Net as published: convolutions that are not padded, mirrored borders, dropout"
    paper = "Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, arXiv:1505.04597"
    config = UNetValidConfig

    def build(self, config: UNetValidConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``unet_valid.UNetValid`` with He initialisation."""
        from segbatch.models.unet_valid import UNetValid

        return UNetValid(config, len(classes.classes))


class PatchArchitecture(_Network):
    """See ``segbatch.models.patch``."""

    summary = "classifier of the window around each pixel, run over the whole photo at once"
    paper = "Ciresan et al.: Deep Neural Networks Segment Neuronal Membranes, NIPS 2012, network N4"
    config = PatchConfig

    def build(self, config: PatchConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``patch.PatchNet`` with He initialisation."""
        from segbatch.models.patch import PatchNet

        return PatchNet(config, len(classes.classes))


class _Detecting(_Network):
    """Networks that find objects; photos are resized by their shorter side."""

    task: Task = "instance"
    output: Output = "detections"

    def input_spec(self, config: MaskRCNNConfig | InstanceFCNConfig | PanopticFPNConfig) -> InputSpec:
        """Float RGB, channels last, sides a multiple of 32.

        Raises:
            ConfigError: ``config.channels`` is not 3: the network alone can be built like that, but photos have 3.
        """
        channels = getattr(config, "channels", 3)
        if channels != 3:
            raise ConfigError(
                f"{config.kind} sees photos, which have 3 channels: model.channels = {channels}", "leave it out"
            )
        return InputSpec(
            height=config.short_side, resize="short-side", longest=config.longest, divisor=32, layout="nhwc"
        )


class MaskRCNNArchitecture(_Detecting):
    """See ``segbatch.models.maskrcnn``."""

    summary = "Mask R-CNN on ResNet-50, with a feature pyramid (FPN) or on the fourth stage (C4)"
    paper = "He, Gkioxari, Dollar, Girshick: Mask R-CNN, ICCV 2017, arXiv:1703.06870"
    config = MaskRCNNConfig

    def build(self, config: MaskRCNNConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``maskrcnn.MaskRCNN`` with random weights."""
        from segbatch.models.maskrcnn import MaskRCNN

        return MaskRCNN(config, len(classes.classes))

    def loss(
        self, net: "torch.nn.Module", images: "torch.Tensor", targets: "Sequence[Target]", step: int
    ) -> "torch.Tensor":
        """Sum of the five losses of the paper."""
        from segbatch.models.maskrcnn import MaskRCNN

        assert isinstance(net, MaskRCNN)
        return net.loss(images, targets, step)

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """Detections of a batch."""
        from segbatch.models.maskrcnn import MaskRCNN, MaskRCNNSegmenter

        assert isinstance(net, MaskRCNN)
        return MaskRCNNSegmenter(net, spec)


class InstanceFCNArchitecture(_Detecting):
    """See ``segbatch.models.instancefcn``."""

    summary = "InstanceFCN on VGG-16: instance-sensitive score maps, assembled in sliding windows; category head"
    paper = "Dai et al.: Instance-sensitive Fully Convolutional Networks, ECCV 2016, arXiv:1603.08678"
    config = InstanceFCNConfig

    def build(self, config: InstanceFCNConfig, classes: ClassTable) -> "torch.nn.Module":
        """An ``instancefcn.InstanceFCN`` with He initialisation."""
        from segbatch.models.instancefcn import InstanceFCN

        return InstanceFCN(config, len(classes.classes))

    def loss(
        self, net: "torch.nn.Module", images: "torch.Tensor", targets: "Sequence[Target]", step: int
    ) -> "torch.Tensor":
        """Objectness, parts and category of sampled windows."""
        from segbatch.models.instancefcn import InstanceFCN

        assert isinstance(net, InstanceFCN)
        return net.loss(images, targets, step)

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """Detections of a batch."""
        from segbatch.models.instancefcn import InstanceFCN, InstanceFCNSegmenter

        assert isinstance(net, InstanceFCN)
        return InstanceFCNSegmenter(net, spec)


class PanopticFPNArchitecture(_Detecting):
    """See ``segbatch.models.panoptic_fpn``."""

    summary = "Panoptic FPN on ResNet-50: Mask R-CNN with a semantic branch; things and stuff merged"
    paper = "Kirillov, Girshick, He, Dollar: Panoptic Feature Pyramid Networks, CVPR 2019, arXiv:1901.02446"
    config = PanopticFPNConfig
    task: Task = "panoptic"
    output: Output = "panoptic"
    choice = Choice(min_score=0.5)  # as in detectron2

    def build(self, config: PanopticFPNConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``panoptic_fpn.PanopticFPN`` with random weights."""
        from segbatch.models.panoptic_fpn import PanopticFPN

        return PanopticFPN(config, classes)

    def loss(
        self, net: "torch.nn.Module", images: "torch.Tensor", targets: "Sequence[Target]", step: int
    ) -> "torch.Tensor":
        """Mask R-CNN's losses and the semantic branch's."""
        from segbatch.models.panoptic_fpn import PanopticFPN

        assert isinstance(net, PanopticFPN)
        return net.loss(images, targets, step)

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """Things and stuff of a batch."""
        from segbatch.models.panoptic_fpn import PanopticFPN, PanopticFPNSegmenter

        assert isinstance(net, PanopticFPN)
        return PanopticFPNSegmenter(net, spec)


class ColorArchitecture(_Network):
    """See ``segbatch.models.color``."""

    summary = "per-pixel colour classifier: the most frequent class of each colour, a baseline"
    paper = "none: a baseline of its own"
    config = ColorConfig
    output: Output = "labels"

    def input_spec(self, config: ColorConfig) -> InputSpec:
        """Raw RGB of any size."""
        return InputSpec(layout="nhwc", dtype="uint8")

    def build(self, config: ColorConfig, classes: ClassTable) -> "torch.nn.Module":
        """A ``color.ColorTable`` that has seen nothing yet."""
        from segbatch.models.color import ColorTable

        return ColorTable(config, len(classes.classes))

    def segmenter(self, net: "torch.nn.Module", spec: ModelSpec) -> Segmenter:
        """A table look-up."""
        from segbatch.models.color import ColorSegmenter, ColorTable

        assert isinstance(net, ColorTable)
        return ColorSegmenter(net, spec)


ARCHITECTURES: "Mapping[str, Architecture]" = {
    "unet": UNetArchitecture(),
    "fcn": FCNArchitecture(),
    "segnet": SegNetArchitecture(),
    "unet_valid": UNetValidArchitecture(),
    "deeplab": DeepLabArchitecture(),
    "patch": PatchArchitecture(),
    "maskrcnn": MaskRCNNArchitecture(),
    "instancefcn": InstanceFCNArchitecture(),
    "panoptic_fpn": PanopticFPNArchitecture(),
    "color": ColorArchitecture(),
}
"""Built-in networks by the name in ``name@checkpoint``."""

ENTRY_POINTS = "segbatch.models"
"""Group through which other packages add architectures and loaders."""


@functools.cache
def entry_points() -> "Mapping[str, Any]":
    """Objects that other packages registered, by name."""
    from importlib import metadata

    return {e.name: e.load() for e in metadata.entry_points(group=ENTRY_POINTS)}


def architectures() -> dict[str, Architecture]:
    """All architectures by name, those of other packages included."""
    return {**{k: v for k, v in entry_points().items() if hasattr(v, "input_spec")}, **ARCHITECTURES}


def architecture_of(name: str, where: str) -> Architecture:
    """The architecture called ``name``.

    Raises:
        ConfigError: there is none; names the known ones and the nearest.
    """
    known = architectures()
    if name not in known:
        raise ConfigError(
            f"{where}: unknown architecture {name}{nearest(name, known)}", f"known: {', '.join(sorted(known))}"
        )
    return known[name]
