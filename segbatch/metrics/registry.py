"""Evaluators by name: those that come with segbatch, and those that other packages register.

A package adds one with an entry point in group ``segbatch.metrics``: name = protocol, value = a class that is made
with a ``ClassTable`` and obeys ``base.Metric``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.metrics.base import DEFAULTS, Metric, MetricOptions
from segbatch.records import ClassTable

MetricFactory = Callable[..., Metric[Any]]

BUILT_IN: Mapping[str, str] = {
    "ade20k": "ade20k:Ade20kMetric",
    "ade20k-present": "ade20k:Ade20kPresentMetric",
    "bdd100k-drivable": "bdd100k_semantic:Bdd100kDrivableMetric",
    "bdd100k-ins": "bdd100k_instance:Bdd100kInstanceMetric",
    "bdd100k-lane": "bdd100k_lane:Bdd100kLaneMetric",
    "bdd100k-pan": "bdd100k_panoptic:Bdd100kPanopticMetric",
    "bdd100k-sem": "bdd100k_semantic:Bdd100kSemanticMetric",
    "binary": "binary:BinaryMetric",
    "boundary-iou": "boundary_iou:BoundaryIouMetric",
    "calibration": "calibration:CalibrationMetric",
    "calibration-instance": "calibration:CalibrationInstanceMetric",
    "camvid": "camvid:CamVidMetric",
    "camvid-strict": "camvid:CamVidStrictMetric",
    "ccp": "ccp:CcpMetric",
    "cityscapes": "cityscapes:CityscapesMetric",
    "cityscapes-instance": "cityscapes_instance:CityscapesInstanceMetric",
    "cityscapes-panoptic": "cityscapes_panoptic:CityscapesPanopticMetric",
    "coco-boundary": "coco_instance:CocoBoundaryMetric",
    "coco-instance": "coco_instance:CocoInstanceMetric",
    "coco-panoptic": "coco_panoptic:CocoPanopticMetric",
    "coco-stuff": "coco_stuff:CocoStuffMetric",
    "coco-stuff-91": "coco_stuff:CocoStuff91Metric",
    "kitti": "kitti:KittiMetric",
    "kitti-instance": "kitti_instance:KittiInstanceMetric",
    "label-errors": "label_errors:LabelErrorsMetric",
    "label-errors-instance": "label_errors:LabelErrorsInstanceMetric",
    "lits": "lits:LitsMetric",
    "pascal-context": "pascal:PascalContextMetric",
    "pascal-context-59": "pascal:PascalContext59Metric",
    "pascal-context-60": "pascal:PascalContext60Metric",
    "pascal-voc": "pascal:PascalVocMetric",
    "pratheepan": "pratheepan:PratheepanMetric",
    "semantic": "semantic:SemanticMetric",
    "tide": "tide:TideMetric",
    "semantic-errors": "semantic_errors:SemanticErrorsMetric",
}
"""Module and class of every protocol that comes with segbatch."""

_DEFAULTS = {
    "ade20k": "ade20k",
    "bdd100k-drivable": "bdd100k-drivable",
    "bdd100k-ins": "bdd100k-ins",
    "bdd100k-lane": "bdd100k-lane",
    "bdd100k-pan": "bdd100k-pan",
    "bdd100k-sem": "bdd100k-sem",
    "camvid": "camvid",
    "ccp": "ccp",
    "cityscapes": "cityscapes",
    "coco-instances": "coco-instance",
    "coco-panoptic": "coco-panoptic",
    "coco-stuff": "coco-stuff",
    "kitti": "kitti",
    "lits": "lits",
    "pascal-context": "pascal-context",
    "pascal-voc": "pascal-voc",
    "pratheepan": "pratheepan",
}
"""The official protocol of every dataset that has one, by the dataset's name."""

_OF_ONE_TASK = {
    ("cityscapes", "instance"): "cityscapes-instance",
    ("cityscapes", "panoptic"): "cityscapes-panoptic",
    ("kitti", "instance"): "kitti-instance",
}
"""The same for samples that have a single task."""

_BY_TASK = {"instance": "coco-instance", "panoptic": "coco-panoptic"}

ENTRY_POINTS = "segbatch.metrics"


def names() -> list[str]:
    """Every known protocol, sorted."""
    return sorted({*BUILT_IN, *(e.name for e in entry_points(group=ENTRY_POINTS))})


def default_protocol(dataset_name: str, tasks: Sequence[str] = ()) -> str:
    """The dataset's official protocol; else COCO's where its only task has one, else ``semantic``."""
    if len(tasks) != 1:
        return _DEFAULTS.get(dataset_name, "semantic")
    usual = _DEFAULTS.get(dataset_name, _BY_TASK.get(tasks[0], "semantic"))
    return _OF_ONE_TASK.get((dataset_name, tasks[0]), usual)


@functools.cache
def metric(protocol: str) -> MetricFactory:
    """What makes the evaluator of a protocol: a class.

    Raises:
        ConfigError: an unknown protocol; names the known ones and the nearest.
    """
    if protocol in BUILT_IN:
        module, _, name = BUILT_IN[protocol].partition(":")
        found: MetricFactory = getattr(import_module(f"segbatch.metrics.{module}"), name)
        return found
    for entry in entry_points(group=ENTRY_POINTS, name=protocol):
        factory: MetricFactory = entry.load()
        return factory
    known = names()
    raise ConfigError(f"unknown protocol {protocol}{nearest(protocol, known)}", f"known: {', '.join(known)}")


def make(protocol: str, classes: ClassTable, options: MetricOptions = DEFAULTS) -> Metric[Any]:
    """The evaluator of a protocol for a class table.

    Raises:
        ConfigError: an unknown protocol, one that does not fit the classes, or an option that it does not heed.
    """
    factory = metric(protocol)
    accepted: frozenset[str] = getattr(factory, "accepts", frozenset())
    strange = sorted(set(options.chosen()) - accepted)
    if strange:
        heeds = f"it heeds {', '.join(sorted(accepted))}" if accepted else "it has no options"
        raise ConfigError(f"protocol {protocol} does not heed {', '.join(strange)}", heeds)
    return factory(classes, options) if accepted else factory(classes)
