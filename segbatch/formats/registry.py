"""Every format by name. Outsiders add theirs by an entry point of the group ``segbatch.formats``."""

import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.formats.base import Format

ENTRY_POINTS = "segbatch.formats"

BUILT_IN = {
    "ade20k": "ade20k:Ade20k",
    "bdd100k-drivable": "bdd100k:Drivable",
    "bdd100k-ins": "bdd100k:InstanceSegmentation",
    "bdd100k-lane": "bdd100k:Lane",
    "bdd100k-pan": "bdd100k:PanopticSegmentation",
    "bdd100k-sem": "bdd100k:SemanticSegmentation",
    "ccp": "ccp:Ccp",
    "cityscapes": "cityscapes:Cityscapes",
    "cityscapes-instances": "cityscapes:CityscapesInstances",
    "cityscapes-panoptic": "cityscapes:CityscapesPanoptic",
    "coco": "coco:CocoResults",
    "coco-dataset": "coco:CocoDataset",
    "coco-panoptic": "coco_panoptic:CocoPanoptic",
    "coco-stuff": "coco_stuff:CocoStuff",
    "cvat": "cvat:Cvat",
    "fiftyone": "fiftyone:FiftyOne",
    "kitti": "kitti:Kitti",
    "kitti-instances": "kitti:KittiInstances",
    "label-studio": "label_studio:LabelStudio",
    "lits": "lits:Lits",
    "pascal": "pascal:Pascal",
    "png": "png:Png",
    "yolo-seg": "yolo_seg:YoloSeg",
}
"""Module below ``segbatch.formats`` and class of every built-in format."""


def names() -> tuple[str, ...]:
    """Built-in and installed formats, in alphabetical order."""
    return tuple(sorted({*BUILT_IN, *_plugins()}))


def format_of(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: an unknown name, with the known ones and the nearest.
    """
    if name in BUILT_IN:
        return _built_in(name)
    plugins = _plugins()
    if name not in plugins:
        raise ConfigError(f"unknown format {name!r}{nearest(name, names())}", f"known: {', '.join(names())}")
    found = plugins[name].load()
    return cast(Format, found() if isinstance(found, type) else found)


@functools.cache
def _built_in(name: str) -> Format:
    module, _, kind = BUILT_IN[name].partition(":")
    return cast(Format, getattr(importlib.import_module(f"segbatch.formats.{module}"), kind)())


def _plugins() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=ENTRY_POINTS) if e.name not in BUILT_IN}
