"""Every format by name. Outsiders add theirs by an entry point of the group ``segbatch.formats``."""

from segbatch.formats.base import Format
from segbatch.plugins import Plugins

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
    "cvat-semantic": "cvat:CvatSemantic",
    "fiftyone": "fiftyone:FiftyOne",
    "kitti": "kitti:Kitti",
    "kitti-instances": "kitti:KittiInstances",
    "label-studio": "label_studio:LabelStudio",
    "label-studio-semantic": "label_studio:LabelStudioSemantic",
    "lits": "lits:Lits",
    "pascal": "pascal:Pascal",
    "png": "png:Png",
    "yolo-seg": "yolo_seg:YoloSeg",
}
"""Module below ``segbatch.formats`` and class of every built-in format."""

_FORMATS: Plugins[Format] = Plugins("format", "segbatch.formats", BUILT_IN, ENTRY_POINTS)
names = _FORMATS.names
format_of = _FORMATS.get
