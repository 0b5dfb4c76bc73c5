"""Evaluators by name: those that come with segbatch, and those that other packages register.

A package adds one with an entry point in group ``segbatch.metrics``: name = protocol, value = a class that is made
with a ``ClassTable`` and obeys ``base.Metric``.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.metrics.base import Metric
from segbatch.metrics.camvid import CamVidMetric, CamVidStrictMetric
from segbatch.metrics.coco_instance import CocoInstanceMetric
from segbatch.metrics.coco_panoptic import CocoPanopticMetric
from segbatch.metrics.semantic import SemanticMetric
from segbatch.records import ClassTable

MetricFactory = Callable[[ClassTable], Metric[Any]]

METRICS: dict[str, MetricFactory] = {
    SemanticMetric.name: SemanticMetric,
    CamVidMetric.name: CamVidMetric,
    CamVidStrictMetric.name: CamVidStrictMetric,
    CocoInstanceMetric.name: CocoInstanceMetric,
    CocoPanopticMetric.name: CocoPanopticMetric,
}

_DEFAULTS = {
    "camvid": CamVidMetric.name,
    "coco-instances": CocoInstanceMetric.name,
    "coco-panoptic": CocoPanopticMetric.name,
}
_BY_TASK = {"instance": CocoInstanceMetric.name, "panoptic": CocoPanopticMetric.name}

ENTRY_POINTS = "segbatch.metrics"


def names() -> list[str]:
    """Every known protocol, sorted."""
    return sorted({*METRICS, *(e.name for e in entry_points(group=ENTRY_POINTS))})


def default_protocol(dataset_name: str, tasks: Sequence[str] = ()) -> str:
    """The dataset's official protocol; else COCO's where its only task has one, else ``semantic``."""
    only = _BY_TASK.get(tasks[0], SemanticMetric.name) if len(tasks) == 1 else SemanticMetric.name
    return _DEFAULTS.get(dataset_name, only)


def metric(protocol: str) -> MetricFactory:
    """What makes the evaluator of a protocol.

    Raises:
        ConfigError: an unknown protocol; names the known ones and the nearest.
    """
    if protocol in METRICS:
        return METRICS[protocol]
    for entry in entry_points(group=ENTRY_POINTS, name=protocol):
        factory: MetricFactory = entry.load()
        return factory
    known = names()
    raise ConfigError(f"unknown protocol {protocol}{nearest(protocol, known)}", f"known: {', '.join(known)}")


def make(protocol: str, classes: ClassTable) -> Metric[Any]:
    """The evaluator of a protocol for a class table.

    Raises:
        ConfigError: an unknown protocol, or one that does not fit the classes.
    """
    return metric(protocol)(classes)
