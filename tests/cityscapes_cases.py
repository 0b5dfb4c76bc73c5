"""Small random street scenes, and what cityscapesScripts 2.3.0 says of predictions of them.

The official functions run on arrays in memory: ``Image.open`` gives them by name. KITTI's devkit is the same code: its
``Instance.getLabelID`` divides by 256, its pixel-level script takes ``id % 256 > 0`` for ``id > 1000``, and has other
mean sizes. So its instance maps are given as they are to the one, and in Cityscapes' encoding to the other.
"""

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from coco_cases import Scene as Segments
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from segbatch import schemas
from segbatch.codecs import columns, runlength
from segbatch.metrics.base import Row
from segbatch.records import ClassTable

Map = NDArray[np.uint16]
Mask = NDArray[np.bool_]
Values = dict[tuple[str, str], float | None]

THINGS = range(24, 34)
SCORED_THINGS = (24, 25, 26, 27, 28, 31, 32, 33)
KITTI_SIZES = {
    **{"truck": 1801.103394, "person": 1234.262573, "train": 18448.460938, "bicycle": 1244.791260},
    **{"motorcycle": 695.617676, "bus": 2761.151611, "caravan": 1017.777771, "rider": 1318.393921},
    **{"trailer": 14457.615234, "car": 3669.255859},
}
"""``avgClassSize`` of the devkit."""

_SCORES = (0.0, 0.25, 0.5, 0.5, 0.9, 1.0)


@dataclass
class Found:
    """A detection."""

    mask: Mask
    label_id: int
    score: float


@dataclass
class Scene:
    """An image: values of instanceIds as in Cityscapes, predicted label ids, detections."""

    name: str
    ids: Map
    predicted: Map
    found: list[Found] = field(default_factory=list)

    @property
    def labels(self) -> Map:
        """True label ids."""
        return np.where(self.ids < 1000, self.ids, self.ids // 1000).astype(np.uint16)

    @property
    def kitti_ids(self) -> Map:
        """The instance map as KITTI has it: 256 * label id + number, 0 for groups and stuff."""
        numbers = np.where(self.ids < 1000, 0, self.ids % 1000 + 1)
        return (256 * self.labels + numbers).astype(np.uint16)


# -- random scenes ---------------------------------------------------------------------------------------------------


def random_scenes(seed: int, largest: int = 60) -> list[Scene]:
    """Few small images: groups, objects of 99 and 100 pixels and of one, numbered caravans, void alone, no objects;
    masks that share exactly half with an object, ties in scores, empty masks, two detections of an object."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(THINGS, 3, replace=False).tolist()
    names = [f"{city}_{n:06d}_000019" for city in ("ulm", "bonn") for n in range(3)]
    return [_scene(rng, name, labels, largest) for name in rng.permutation(names)[: rng.integers(1, 5)].tolist()]


def _scene(rng: np.random.Generator, name: str, things: Sequence[int], largest: int) -> Scene:
    size = (1, 1) if rng.random() < 0.03 else (int(rng.integers(9, largest)), int(rng.integers(9, largest)))
    ids = np.full(size, rng.choice([0, 3, 7, 11, 23]), np.uint16)
    if rng.random() < 0.9:
        for _ in range(rng.integers(0, 4)):
            ids[_box(rng, size)] = rng.choice([0, 4, 7, 8, 9, 11, 17, 21, 23, 29, 30])
        for number in range(rng.integers(0, 10)):
            thing = int(rng.choice(things))
            ids[_box(rng, size)] = thing if rng.random() < 0.2 else 1000 * thing + number
    scene = Scene(name, ids, ids)
    scene.predicted = scene.labels
    for _ in range(rng.integers(0, 4)):
        scene.predicted[_box(rng, size)] = rng.integers(0, 34)
    noisy = rng.random(size) < rng.choice([0.0, 0.1, 0.5])
    scene.predicted[noisy] = rng.integers(0, 34, size)[noisy]
    values = np.unique(ids)
    for _ in range(rng.integers(0, 14)):
        scene.found.append(_detection(rng, ids, values, things))
    return scene


def _box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[slice, slice]:
    y, x = int(rng.integers(size[0])), int(rng.integers(size[1]))
    height, width = ((10, 10), (9, 11), (1, 1), *[tuple(rng.integers(8, 40, 2).tolist())] * 4)[int(rng.integers(7))]
    return slice(y, y + height), slice(x, x + width)


def _detection(rng: np.random.Generator, ids: Map, values: Map, things: Sequence[int]) -> Found:
    value = int(rng.choice(values))
    mask = ids == value
    label = value if value < 1000 else value // 1000
    kind = int(rng.integers(8))
    if kind == 0:
        mask = np.zeros(ids.shape, bool)
        if rng.random() < 0.7:
            mask[_box(rng, (ids.shape[0], ids.shape[1]))] = True
    elif kind == 1:
        mask = mask & (np.cumsum(mask).reshape(mask.shape) * 2 <= mask.sum())  # half of it, or less
    elif kind == 2:
        mask = mask | (rng.random(ids.shape) < rng.random() ** 2)
    elif kind > 4:
        mask = mask & (rng.random(ids.shape) < rng.choice([0.55, 0.8, 0.95]))
    if label not in THINGS or rng.random() < 0.15:
        label = int(rng.choice([*things, 26, 7]))
    return Found(mask, label, float(rng.choice(_SCORES) if rng.random() < 0.6 else rng.random()))


# -- rows ------------------------------------------------------------------------------------------------------------


def pair_of(scene: Scene, kitti: bool = False) -> tuple[Row, Row]:
    """The rows of samples and of masks."""
    ids = scene.kitti_ids if kitti else scene.ids
    objects = []
    for value in np.unique(ids).tolist():
        label, number = divmod(value, 256) if kitti else (value // 1000, 1) if value >= 1000 else (value, 0)
        if label in THINGS:
            objects.append(instance(ids == value, value, label, iscrowd=number == 0))
    found = [instance(f.mask, i, f.label_id, score=f.score) for i, f in enumerate(scene.found, 1)]
    return (
        row_of("samples", scene.name, scene.labels, objects),
        row_of("masks", scene.name, scene.predicted, found),
    )


def instance(mask: Mask, number: int, label_id: int, **more: Any) -> dict[str, Any]:
    """An entry of ``instances``."""
    counts = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    known = {"id": number, "category_id": label_id, "bbox_xywh": [0.0] * 4, "area": float(mask.sum())}
    return {**known, "iscrowd": False, "counts": counts, **more}


def row_of(table: str, name: str, label_map: Map | None, instances: list[dict[str, Any]] | None) -> Row:
    """A row with these labels."""
    height, width = (1, 1) if label_map is None else label_map.shape
    runs = None if label_map is None else runlength.encode(label_map)
    known: dict[str, Any] = {"sample_id": name, "height": height, "width": width, "instances": instances}
    known |= {"image_uri": "", "etag": "", "status": "ok", "model_digest": "", "group_id": "g"}
    schema = schemas.TABLES[table]
    arrays = [
        columns.runs_array([runs]) if f.name == "semantic" else pa.array([known.get(f.name)], f.type) for f in schema
    ]
    return Row(pa.RecordBatch.from_arrays(arrays, schema=schema), 0)


# -- the official evaluators -----------------------------------------------------------------------------------------


class Picture:
    """What the official code needs of a Pillow image."""

    def __init__(self, pixels: NDArray[Any]) -> None:
        self.pixels = pixels
        self.size = pixels.shape[::-1]

    def convert(self, mode: str) -> "Picture":
        """Masks are grey already."""
        assert mode == "L"
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.pixels, dtype)


@contextlib.contextmanager
def official(module: str, pictures: Mapping[str, NDArray[Any]]) -> Iterator[Any]:
    """An official module, whose ``Image.open`` gives pictures by the end of their paths."""
    found = importlib.import_module(f"cityscapesscripts.evaluation.{module}")
    helpers = importlib.import_module("cityscapesscripts.evaluation.instances2dict")
    reader = mock.Mock()
    reader.open = lambda path: Picture(pictures[path.rsplit("/", 1)[-1]])
    with (
        mock.patch.object(found, "Image", reader),
        mock.patch.object(helpers, "Image", reader),
        mock.patch.object(np, "in1d", np.isin, create=True),  # gone from NumPy 2.4
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        yield found


def official_pixel_level(scenes: Sequence[Scene], sizes: Mapping[str, float] | None = None) -> Values:
    """What evaluateImgLists says of scenes sorted by name: (figure, class or category) -> value."""
    inputs = sorted(scenes, key=lambda s: s.name)
    pictures: dict[str, NDArray[Any]] = {}
    for s in inputs:
        pictures |= {f"{s.name}_labelIds": s.labels.astype(np.uint8), f"{s.name}_instanceIds": s.ids}
        pictures[f"{s.name}_pred"] = s.predicted.astype(np.uint8)
    with (
        official("evalPixelLevelSemanticLabeling", pictures) as module,
        mock.patch.multiple(module.args, quiet=True, JSONOutput=False, avgClassSize=sizes or module.args.avgClassSize),
    ):
        module.args.evalLabels = []
        names = [[f"{s.name}_{kind}" for s in inputs] for kind in ("pred", "labelIds")]
        results = module.evaluateImgLists(*names, module.args)
    found: Values = {}
    for theirs, ours in (("Classes", ""), ("Categories", "category_")):
        found[f"{ours}miou", ""] = value_of(results[f"averageScore{theirs}"])
        found[f"{ours}miiou", ""] = value_of(results[f"averageScoreInst{theirs}"])
    for theirs, ours in (("class", ""), ("category", "category_")):
        for kind, name in (("", "iou"), ("Inst", "iiou")):
            found |= {(f"{ours}{name}", c): value_of(v) for c, v in results[f"{theirs}{kind}Scores"].items()}
    return found


def official_instance_level(scenes: Sequence[Scene], kitti: bool = False) -> Values:
    """What evaluateMatches and computeAverages say: (figure, class) -> value.

    Raises:
        IndexError: the official code gives up where all detections of a class are ignored.
    """
    pictures: dict[str, NDArray[Any]] = {}
    for s in scenes:
        pictures[s.name] = s.kitti_ids if kitti else s.ids
        pictures |= {f"{s.name}_{i}": f.mask.astype(np.uint8) for i, f in enumerate(s.found)}
    with official("evalInstanceLevelSemanticLabeling", pictures) as module, contextlib.ExitStack() as stack:
        if kitti:
            helper = importlib.import_module("cityscapesscripts.evaluation.instances2dict").Instance
            stack.enter_context(mock.patch.object(helper, "getLabelID", lambda self, number: int(number // 256)))
        module.setInstanceLabels(module.args)
        objects = module.instances2dict([s.name for s in scenes])
        matches = {}
        for s, of_image in zip(scenes, objects.values(), strict=True):
            info = {f"{s.name}_{i}": {"labelID": f.label_id, "conf": f.score} for i, f in enumerate(s.found)}
            parts = module.assignGt2Preds(
                module.filterGtInstances(of_image, module.args), Picture(pictures[s.name]), info, module.args
            )
            matches[s.name] = dict(zip(("groundTruth", "prediction"), parts, strict=True))
        averages = module.computeAverages(module.evaluateMatches(matches, module.args), module.args)
    found = {("ap", ""): value_of(averages["allAp"]), ("ap50", ""): value_of(averages["allAp50%"])}
    for name, of_class in averages["classes"].items():
        found |= {("ap", name): value_of(of_class["ap"]), ("ap50", name): value_of(of_class["ap50%"])}
    return found


def official_panoptic(scenes: Sequence[tuple[int, Segments, Segments]], classes: ClassTable) -> Values:
    """What pq_compute_single_core and average_pq say of (image id, truth, prediction): (figure, class) -> value.

    Classes that do not occur have no value, nor have means over none, where the official code divides by zero.
    """
    categories = {c.label_id: {"id": c.label_id, "isthing": int(c.isthing)} for c in classes.scored}
    pictures: dict[str, NDArray[Any]] = {}
    pairs = []
    for number, *sides in scenes:
        names = [f"{kind}_{number}" for kind in ("truth", "pred")]
        pictures |= {name: _rgb(side.ids) for name, side in zip(names, sides, strict=True)}
        pairs.append(
            tuple(
                {"image_id": number, "file_name": name, "segments_info": [dict(s) for s in side.segments]}
                for name, side in zip(names, sides, strict=True)
            )
        )
    found: Values = {}
    with official("evalPanopticSemanticLabeling", pictures) as module, contextlib.redirect_stdout(io.StringIO()):
        counts = module.pq_compute_single_core(0, pairs, "truth", "pred", categories)
        for suffix, chosen in (("", None), ("_things", True), ("_stuff", False)):
            try:
                whole, by_class = counts.pq_average(categories, chosen)
            except ZeroDivisionError:
                whole, by_class = {}, {}
            found |= {(f"{name}{suffix}", ""): whole.get(name) for name in ("pq", "sq", "rq")}
            if chosen is None:
                occurs = {i for i, c in counts.pq_per_cat.items() if c.tp + c.fp + c.fn}
                for c in classes.scored:
                    values = by_class[c.label_id] if c.label_id in occurs else {}
                    found |= {(name, c.name): values.get(name) for name in ("pq", "sq", "rq")}
    return found


def _rgb(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def value_of(value: float) -> float | None:
    """NaN is no value."""
    return None if math.isnan(value) else float(value)
