"""What annotation tools hold of an image: regions, each a mask with the name of a class.

Instances are regions one by one; of a label map every class that it shows is a region, so that it can be corrected in
a tool that knows no label maps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from segbatch.datasets import reading
from segbatch.errors import DataError
from segbatch.formats.base import Labels
from segbatch.formats.files import instance_of, size_of
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Task


class Region(NamedTuple):
    """One region.

    Attributes:
        label: name of its class.
        counts: COCO compressed RLE.
        number: its id as an instance; 0 where it has none.
        score: confidence 0..1; None where there is none.
    """

    label: str
    counts: bytes
    number: int = 0
    score: float | None = None


def regions_of(row: Labels, classes: ClassTable, task: Task) -> Iterator[Region]:
    """The regions of a row that have a pixel: its instances, or the classes of its label map by ascending id.

    Raises:
        DataError: ``unknown-label``: a label id that no class has.
    """
    from segbatch.codecs import rle

    names = {c.label_id: c.name for c in classes.classes}
    if task == "instance":
        found = [(i.category_id, i.counts, i.id, i.score) for i in row.instances or ()]
    else:
        assert row.semantic is not None
        shown = rle.instances_of(row.semantic)
        found = [(label_id, counts, 0, None) for label_id, counts in zip(shown.ids.tolist(), shown.counts, strict=True)]
    for label_id, counts, number, score in found:
        if label_id not in names:
            problem = f"{row.sample_id} shows the id {label_id}, which no class has"
            raise DataError(problem, "correct it or add the class", "unknown-label")
        if rle.area(counts):
            yield Region(names[label_id], counts, number, score)


def detail_of(labels: Iterable[str], classes: ClassTable) -> dict[str, Any]:
    """What ``prediction_of`` needs in an item's detail, for regions with these labels."""
    ids = {c.name: c.label_id for c in classes.classes}
    void = classes.ignore_ids[0] if classes.ignore_ids else None
    return {"classes": {name: ids[name] for name in sorted(set(labels)) if name in ids}, "void": void}


def prediction_of(regions: Sequence[Region], item: PlanItem, task: Task) -> Prediction:
    """The instances that regions are, or the label map that they make: later ones lie over earlier ones, and pixels
    of no region are void.

    Raises:
        DataError: ``unknown-label``: a class that the samples lack; ``unlabelled``: pixels of no region, and the
            samples have no void class.
    """
    known = reading.detail_of(item)["classes"]
    for region in regions:
        if region.label not in known:
            problem = f"{item.uri} has a region of the class {region.label!r}, which the samples lack"
            raise DataError(problem, "rename it, or leave it out", "unknown-label", item.uri)
    label_ids = [int(known[r.label]) for r in regions]
    if task == "instance":
        return Prediction(instances=_instances(regions, label_ids, size_of(item)))
    return _label_map(regions, label_ids, item)


def _instances(regions: Sequence[Region], label_ids: Sequence[int], size: tuple[int, int]) -> tuple[Instance, ...]:
    """Instances with the numbers that they have, where all have one of their own; else numbered from 1."""
    numbers = [r.number for r in regions]
    if min(numbers, default=1) < 1 or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(regions) + 1))
    found = zip(numbers, label_ids, regions, strict=True)
    return tuple(instance_of(number, label_id, r.counts, size, r.score) for number, label_id, r in found)


def _label_map(regions: Sequence[Region], label_ids: Sequence[int], item: PlanItem) -> Prediction:
    from segbatch.codecs import rle

    height, width = size_of(item)
    void = reading.detail_of(item)["void"]
    places = rle.paint([r.counts for r in regions], range(1, len(regions) + 1), height, width, np.uint16)
    bare = int((places == 0).sum())
    if bare and void is None:
        problem = f"{bare} pixels of {item.sample_id} lie in no region of {item.uri}, and no class is void"
        raise DataError(problem, "give every pixel a region, or the samples a class to ignore", "unlabelled", item.uri)
    return Prediction(semantic=np.array([void or 0, *label_ids], np.uint16)[places])
