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
    "camvid": "camvid:CamVidMetric",
    "camvid-strict": "camvid:CamVidStrictMetric",
    "coco-instance": "coco_instance:CocoInstanceMetric",
    "coco-panoptic": "coco_panoptic:CocoPanopticMetric",
    "semantic": "semantic:SemanticMetric",
}
"""Module and class of every protocol that comes with segbatch."""

_DEFAULTS = {
    "camvid": "camvid",
    "coco-instances": "coco-instance",
    "coco-panoptic": "coco-panoptic",
}
"""The official protocol of every dataset that has one, by the dataset's name."""

_BY_TASK = {"instance": "coco-instance", "panoptic": "coco-panoptic"}

ENTRY_POINTS = "segbatch.metrics"


def names() -> list[str]:
    """Every known protocol, sorted."""
    return sorted({*BUILT_IN, *(e.name for e in entry_points(group=ENTRY_POINTS))})


def default_protocol(dataset_name: str, tasks: Sequence[str] = ()) -> str:
    """The dataset's official protocol; else COCO's where its only task has one, else ``semantic``."""
    only = _BY_TASK.get(tasks[0], "semantic") if len(tasks) == 1 else "semantic"
    return _DEFAULTS.get(dataset_name, only)


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
