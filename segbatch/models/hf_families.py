"""Which networks of transformers can be run, and how their results come out.

They are those of ``AutoModelForSemanticSegmentation``, ``AutoModelForInstanceSegmentation``,
``AutoModelForUniversalSegmentation`` and ``DetrForSegmentation`` in transformers 5.23 (models/auto/modeling_auto.py),
but for videos. Networks that are prompted (SAM, CLIPSeg, SegGPT) are none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.models.base import Output
from segbatch.records import Task

THRESHOLDS = {
    "min_score": "threshold",
    "mask_threshold": "mask_threshold",
    "overlap": "overlap_mask_area_threshold",
}
"""segbatch's name of a threshold -> transformers'."""


@dataclass(frozen=True, slots=True)
class Family:
    """The networks of one ``model_type``.

    Attributes:
        network: name of the class in transformers.
        tasks: what the image processor can make of their output.
        default: the task where nobody says; None: it depends on the checkpoint.
        semantic: what ``forward`` gives for the semantic task. ``logits`` and ``probabilities`` where label maps
            made of them are the library's own.
        thresholds: those of ``THRESHOLDS`` that the library knows, by task, where not all.
        text: the network reads the task as text.
        unread: patterns of names of tensors that files may lack, because nothing reads them.
    """

    network: str
    tasks: tuple[Task, ...] = ("semantic",)
    default: Task | None = "semantic"
    semantic: Output = "logits"
    thresholds: Mapping[Task, tuple[str, ...]] = field(default_factory=dict)
    text: bool = False
    unread: tuple[str, ...] = ()

    def known(self, task: Task) -> tuple[str, ...]:
        """The thresholds that the library knows for a task."""
        return () if task == "semantic" else self.thresholds.get(task, tuple(THRESHOLDS))


_ALL: tuple[Task, ...] = ("panoptic", "instance", "semantic")
_AUXILIARY = (r"(^|\.)auxiliary_head\.",)
_EOMT: Any = {"tasks": _ALL, "default": None, "semantic": "probabilities", "thresholds": {"instance": ("min_score",)}}

FAMILIES: Mapping[str, Family] = {
    "beit": Family("BeitForSemanticSegmentation", unread=_AUXILIARY),
    "data2vec-vision": Family("Data2VecVisionForSemanticSegmentation", unread=_AUXILIARY),
    # the first fusion layer gets one input, so its first residual unit is never run
    "dpt": Family(
        "DPTForSemanticSegmentation",
        unread=(*_AUXILIARY, r"^neck\.fusion_stage\.layers\.0\.residual_layer1\."),
    ),
    "mobilenet_v2": Family("MobileNetV2ForSemanticSegmentation"),
    "mobilevit": Family("MobileViTForSemanticSegmentation"),
    "mobilevitv2": Family("MobileViTV2ForSemanticSegmentation"),
    "sapiens2": Family("Sapiens2ForSemanticSegmentation"),
    "segformer": Family("SegformerForSemanticSegmentation"),
    "tipsv2_dpt": Family("Tipsv2DptForSemanticSegmentation"),
    "upernet": Family("UperNetForSemanticSegmentation", unread=_AUXILIARY),
    "detr": Family("DetrForSegmentation", _ALL, "panoptic", "probabilities"),
    "eomt": Family("EomtForUniversalSegmentation", **_EOMT),
    "eomt_dinov3": Family("EomtDinov3ForUniversalSegmentation", **_EOMT),
    "mask2former": Family("Mask2FormerForUniversalSegmentation", _ALL, None, "probabilities"),
    "maskformer": Family("MaskFormerForInstanceSegmentation", _ALL, None, "probabilities"),
    # its label maps are made with anti-aliasing where they shrink
    "oneformer": Family("OneFormerForUniversalSegmentation", _ALL, None, "own", text=True),
    "rf_detr": Family(
        "RfDetrForInstanceSegmentation",
        ("instance",),
        "instance",
        thresholds={"instance": ("min_score", "mask_threshold")},
    ),
}
"""Families by ``model_type`` of config.json."""


def family_of(config: Mapping[str, Any], reference: str) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: no such family, or another network of it (a classifier, a bare backbone).
    """
    kind, networks = str(config.get("model_type", "")), config.get("architectures") or []
    family = FAMILIES.get(kind)
    known = ", ".join(f.network for f in FAMILIES.values())
    if family is None:
        raise ConfigError(
            f"model {reference}: model_type {kind or 'none'} of config.json is no segmentation network known here"
            f"{nearest(kind, FAMILIES)}",
            f"known: {known}",
        )
    if networks and family.network not in networks:
        raise ConfigError(
            f"model {reference} holds a {', '.join(map(str, networks))}, not a {family.network}", f"known: {known}"
        )
    return family
