"""Networks of segmentation_models_pytorch (smp): ``smp:FOLDER``, ``smp:OWNER/NAME``, ``smp:ARCHITECTURE/ENCODER@FILE``.

FOLDER is what ``save_pretrained`` wrote (config.json, model.safetensors), local or remote; OWNER/NAME an id of the
Hugging Face hub. FILE is a state dict alone, by ``torch.save`` or safetensors, of ``smp.create_model(ARCHITECTURE,
ENCODER)``: the number of classes follows from it and, of a U-Net, depth, widths and attention of the decoder; other
options must be smp's defaults, or be brought in a FOLDER. All architectures of smp 0.6 are known. Official code:
``qubvel-org/segmentation_models.pytorch``, segmentation_models_pytorch/base/hub_mixin.py, base/model.py.

Pre-processing: mean and deviation that go with the ``encoder_weights`` of config.json, as
``smp.encoders.get_preprocessing_params`` gives them (it asks the hub, so the table stands here). Where these are not
named, those of the encoder's ``imagenet`` weights, which are ``get_preprocessing_fn``'s default. Photos are fed at
their own size, padded with the mean colour at the bottom and right to the multiple that the architecture asks for (a
U-Net asks for none); to an encoder with an input of fixed size (ViT, Swin) they are stretched. A side-car may say
otherwise.

Output: ``activation`` of config.json decides: none or ``identity``, ``logsoftmax``: logits; ``sigmoid``, ``softmax``,
``softmax2d``: probabilities; ``argmax2d``: labels. One output is the foreground's, which makes two classes; of several
outputs the largest counts, also where they were trained not to exclude each other. A classification head is left out.

Classes: ``--classes``, else the side-car ``FOLDER.toml`` or ``FILE.toml``; else label maps are written as they come.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from segbatch import storage
from segbatch.config import digest_of, nearest
from segbatch.errors import ConfigError
from segbatch.models import state_file
from segbatch.models.base import InputSpec, ModelSpec, Output, Segmenter
from segbatch.models.classes import ClassesFile, class_table
from segbatch.models.hf_folder import CONFIG, opened
from segbatch.models.side_car import SideCar, check_keys, class_table_for, input_spec_of, read_side_car, side_car_uri
from segbatch.models.state_file import StateFile
from segbatch.models.waiting import wait_passively

if TYPE_CHECKING:
    import torch
    from torch import nn

_EXTRA = "pip install 'segbatch[smp]'"
_FILE = re.compile(r"(?P<architecture>\w+)/(?P<encoder>[\w.+-]+)@(?P<uri>.+)", re.DOTALL)
_ENCODER = re.compile(r"[\w.+-]+")
_INPUT_KEYS = ("height", "width", "resize", "longest", "divisor", "mean", "std", "channel_order", "align_corners")
_REFUSED = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained"}
"""Options that timm would pass on to code that reads files or the network."""

_OUTPUTS: Mapping[str | None, Output] = {
    None: "logits",
    "identity": "logits",
    "logsoftmax": "logits",
    "sigmoid": "probabilities",
    "softmax": "probabilities",
    "softmax2d": "probabilities",
    "argmax2d": "labels",
}

Channels = tuple[float, ...]
_IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_DPN: tuple[Channels, Channels] = ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3)
_NORMALISED = (
    (r"xception|inception(v4|resnetv2)|timm-tf_efficientnet_lite\d", _HALF),
    (r"dpn\d+b?", _DPN),
)
"""Encoders that do not have ImageNet's mean and deviation. Sources: ``pretrained_settings`` of smp v0.4.0
(segmentation_models_pytorch/encoders), of ``Cadene/pretrained-models.pytorch`` and of timm."""


@dataclass(frozen=True, slots=True)
class SmpSource:
    """A folder, an id, or an architecture and a file; and, optionally, a class list."""

    what: str
    classes_uri: str = ""
    has_parts: ClassVar[bool] = True

    @property
    def reference(self) -> str:
        """``smp:`` and what the user gave."""
        return f"smp:{self.what}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; an id is downloaded if it is not in the cache, and the weights must fit."""
        return described(self._blueprint())

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        return loaded(self._blueprint(), threads)

    def _blueprint(self) -> "Blueprint":
        match = _FILE.fullmatch(self.what)
        if match and not storage.is_folder(storage.resolve(self.what)):
            return of_file(self.reference, match["architecture"], match["encoder"], match["uri"], self.classes_uri)
        return of_folder(self.reference, self.what, self.classes_uri)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A network that is not built yet, and its weights.

    Attributes:
        reference: what the user gave.
        architecture: name of smp's class.
        options: its arguments, without ``encoder_weights``.
        encoder_weights: what the encoder was trained with before, None where that is not known.
        file: the weights.
        uri: what a side-car stands beside.
        side_car: it.
        classes_uri: a class list, or empty.
    """

    reference: str
    architecture: str
    options: Mapping[str, Any]
    encoder_weights: str | None
    file: StateFile
    uri: str
    side_car: SideCar
    classes_uri: str

    def build(self) -> "nn.Module":
        """The network with random weights; nothing is downloaded.

        Raises:
            ConfigError: there is no such network.
        """
        kind = architectures(self.reference)[self.architecture.lower()]
        try:
            net: nn.Module = kind(**self.options, encoder_weights=None)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError, RuntimeError) as error:
            problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"model {self.reference}: smp.{self.architecture} cannot be built: {problem}") from error
        return net


def architectures(reference: str) -> dict[str, Any]:
    """smp's classes by their names in lower case.

    Raises:
        ConfigError: smp is missing.
    """
    try:
        import segmentation_models_pytorch as library
    except ImportError as error:
        raise ConfigError(f"model {reference} needs the package segmentation-models-pytorch", _EXTRA) from error
    return dict(library.MODEL_ARCHITECTURES_MAPPING)


def of_folder(reference: str, what: str, classes_uri: str) -> Blueprint:
    """What ``save_pretrained`` wrote.

    Raises:
        ConfigError: there is no such folder or id, or it holds something else.
        StorageError: it cannot be read.
    """
    wait_passively()
    folder = opened(reference, what, "")
    where = storage.join(folder.root, CONFIG)
    config = folder.document(CONFIG)
    if config is None or "_model_class" not in config:
        problem = f"names no _model_class in {CONFIG}" if config else f"has no {CONFIG}"
        raise ConfigError(
            f"model {reference}: {folder.root} {problem}",
            "give a folder that smp's save_pretrained wrote, or smp:ARCHITECTURE/ENCODER@FILE",
        )
    kinds, name = architectures(reference), str(config["_model_class"])
    if name.lower() not in kinds:
        raise ConfigError(f"{where}: unknown _model_class {name}{nearest(name.lower(), kinds)}", _known(kinds))
    options = {k: v for k, v in config.items() if not k.startswith("_") and k != "encoder_weights"}
    file = state_file.read(storage.join(folder.root, folder.weights()[0]), reference)
    side_car = SideCar() if folder.repository else read_side_car(folder.root)
    uri = folder.repository or folder.root
    return _checked(
        Blueprint(reference, name, options, config.get("encoder_weights"), file, uri, side_car, classes_uri), where
    )


def of_file(reference: str, architecture: str, encoder: str, uri: str, classes_uri: str) -> Blueprint:
    """A state dict of ``smp.create_model(architecture, encoder)``.

    Raises:
        ConfigError: no such architecture or file, or a file of something else.
        StorageError: it cannot be read.
    """
    wait_passively()
    kinds = architectures(reference)
    if architecture.lower() not in kinds:
        raise ConfigError(
            f"model {reference}: unknown architecture {architecture}{nearest(architecture, kinds)}", _known(kinds)
        )
    name = str(kinds[architecture.lower()].__name__)
    file = state_file.read(uri, reference)
    last = f"segmentation_head.{'head.4' if name == 'DPT' else '0'}.weight"
    if last not in file.tensors:
        raise ConfigError(f"{file.uri} is no {name} of smp's: it lacks the tensor {last}", "check the architecture")
    options = {"encoder_name": encoder, "classes": int(file.tensors[last].shape[0])}
    if name == "Unet":
        options |= _decoder(file.tensors)
    side_car = read_side_car(file.uri)
    return _checked(Blueprint(reference, name, options, None, file, file.uri, side_car, classes_uri), reference)


def _known(kinds: Mapping[str, Any]) -> str:
    return f"known: {', '.join(k.__name__ for k in kinds.values())}"


def _decoder(tensors: "Mapping[str, torch.Tensor]") -> dict[str, Any]:
    """Depth, widths and attention of a U-Net's decoder."""
    widths: list[int] = []
    while (tensor := tensors.get(f"decoder.blocks.{len(widths)}.conv2.0.weight")) is not None:
        widths.append(int(tensor.shape[0]))
    if not widths:
        return {}
    attention = "scse" if any(".attention1.attention.cSE." in k for k in tensors) else None
    return {"encoder_depth": len(widths), "decoder_channels": widths, "decoder_attention_type": attention}


def _checked(plan: Blueprint, where: str) -> Blueprint:
    """The same, if it is a network for photos that needs nothing from elsewhere."""
    options = plan.options
    if options.get("in_channels", 3) != 3:
        raise ConfigError(f"{where}: the network reads {options['in_channels']} channels", "only RGB photos are fed")
    if not _ENCODER.fullmatch(str(options.get("encoder_name", "resnet34"))):
        raise ConfigError(f"{where}: encoder {options['encoder_name']} is no name of smp's or timm's")
    refused = sorted(_REFUSED & set(options))
    if refused:
        raise ConfigError(f"{where}: {', '.join(refused)} would make timm read other files", "take it out")
    activation = options.get("activation")
    if activation is not None and str(activation) not in _OUTPUTS:
        known = ", ".join(str(k) for k in _OUTPUTS)
        raise ConfigError(f'{where}: what comes out of activation "{activation}" is not known', f"known: {known}")
    check_keys(plan.side_car, plan.uri, _INPUT_KEYS)
    return plan


def described(plan: Blueprint) -> ModelSpec:
    """What the model is and wants.

    Raises:
        ConfigError: the network cannot be built, or the weights do not fit.
    """
    from segbatch.models.foreign import check_fit

    return _spec(plan, check_fit(plan.build, plan.file))


def loaded(plan: Blueprint, threads: int) -> Segmenter:
    """The network with its weights, for ``threads`` torch threads; see ``described``."""
    import torch

    from segbatch.models.foreign import ForeignSegmenter, put_in

    torch.set_num_threads(threads)
    net: Any = plan.build()
    put_in(net, plan.file)
    spec = _spec(plan, net)
    net.classification_head = None
    return ForeignSegmenter(net, spec, plan.side_car.channel_order or "rgb")


def _spec(plan: Blueprint, net: Any) -> ModelSpec:
    outputs = int(plan.options.get("classes", 1))
    both = class_table(ClassesFile(classes=("background", "foreground")), plan.uri) if outputs == 1 else None
    classes = class_table_for(plan.uri, max(outputs, 2), plan.classes_uri, plan.side_car, both)
    wants = _input_spec(plan, net)
    output = _OUTPUTS[plan.options.get("activation")]
    decides = {
        "architecture": plan.architecture,
        "options": dict(plan.options),
        "file": plan.file.sha256,
        "input": dataclasses.asdict(wants),
        "channel_order": plan.side_car.channel_order,
        "label_ids": [c.label_id for c in classes.classes],
    }
    return ModelSpec(
        name=plan.reference,
        task="semantic",
        classes=classes,
        input=wants,
        output=output,
        digest=digest_of(decides),
        licence=plan.side_car.licence,
        source=plan.side_car.source,
    )


def _input_spec(plan: Blueprint, net: Any) -> InputSpec:
    mean, std = normalisation(str(plan.options.get("encoder_name", "resnet34")), plan.encoder_weights)
    stride = int(net.encoder.output_stride) if net.requires_divisible_input_shape else 1
    height, width = fixed_size(net.encoder) or (None, None)
    own = InputSpec(
        height=height,
        width=width,
        resize="stretch" if height else "none",
        divisor=stride,
        layout="nhwc",
        mean=mean,
        std=std,
    )
    wants, where = input_spec_of(plan.side_car, own), side_car_uri(plan.uri)
    if wants.divisor % stride:
        raise ConfigError(f"{where}: divisor = {wants.divisor}, but the network needs a multiple of {stride}")
    if height and ((wants.height, wants.width) != (height, width) or wants.resize not in ("stretch", "letterbox")):
        raise ConfigError(f"{where}: the network's input is {width} x {height} and no other")
    return wants


def normalisation(encoder: str, weights: str | None) -> tuple[Channels, Channels]:
    """Mean and deviation, per channel, in units of 0..1, that photos had when an encoder was trained.

    Args:
        encoder: smp's name of it.
        weights: smp's name of what it was trained with; None for ``imagenet``.
    """
    if weights == "advprop":
        return _HALF
    timm_name = _timm_name(encoder)
    if timm_name:
        from timm.models import get_pretrained_cfg

        trained = get_pretrained_cfg(timm_name)
        return (trained.mean, trained.std) if trained else _IMAGENET
    return next((found for pattern, found in _NORMALISED if re.fullmatch(pattern, encoder)), _IMAGENET)


def _timm_name(encoder: str) -> str:
    """timm's name of an encoder that smp takes from timm as it is; empty for others.

    Source: get_encoder in segmentation_models_pytorch/encoders/__init__.py.
    """
    from segmentation_models_pytorch.encoders import is_equivalent_to_timm_universal

    if is_equivalent_to_timm_universal(encoder):
        renamed = encoder.removeprefix("timm-")
        return f"tf_{renamed}" if "mobilenetv3" in renamed else renamed
    return encoder.removeprefix("tu-") if encoder.startswith("tu-") else ""


def fixed_size(encoder: Any) -> tuple[int, int] | None:
    """(height, width) of the only input that an encoder takes; None if it takes any.

    timm's patch embeddings say it; where there are none, the size that the encoder was trained with.
    """
    for layer in encoder.modules():
        if hasattr(layer, "strict_img_size") and layer.img_size is not None:
            return tuple(layer.img_size) if layer.strict_img_size else None
    trained = getattr(getattr(encoder, "model", None), "pretrained_cfg", None) or {}
    return tuple(trained["input_size"][1:]) if trained.get("fixed_input_size") else None
