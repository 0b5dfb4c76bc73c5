"""Small trees in the official layout of BDD100K, one per task.

A scene is drawn once as a map of objects; masks, bitmasks, RLE and polygon JSON follow from it by the rules of
doc/source/format.rst and bdd100k/label/to_mask.py, written down here on their own.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

if TYPE_CHECKING:
    from segbatch.datasets.base import Dataset
    from segbatch.formats.base import Format, Labels
    from segbatch.records import PlanItem

SIZE = (24, 32)
"""Height and width of every image."""

IMAGES = {
    "train": ("0000f77c-6257be58", "0004a4c0-d4dff0ad", "00054602-3bf57337"),
    "val": ("7d06fefd-f7be05a6", "7d128593-0ccfea4c"),
    "test": ("ac517380-00000000",),
}
VIDEOS = {"train": ("00091078-875c1f73", "000d35d3-41990aa4"), "val": ("b1c81faa-3df17267",)}

WEATHER = ("clear", "rainy", "snowy")

Object = tuple[int, int, int, tuple[slice, slice]]
"""Instance id, category id, attribute bits, where it lies."""
Rgba = NDArray[np.uint8]


def grid(number: int) -> tuple[slice, slice]:
    """The ``number``-th of twelve fields of 8 x 8 pixels."""
    row, column = divmod(number % 12, 4)
    return slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)


def objects(seed: int, categories: range, first_id: int = 1) -> list[Object]:
    """Five objects: categories, attributes and places differ, one id needs two bytes."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(12)[:5].tolist()
    kinds = rng.integers(categories.start, categories.stop, 5).tolist()
    flags = (0, 8, 4, 2, 1)
    ids = [first_id, first_id + 1, first_id + 4, first_id + 6, 300 + first_id]
    return [(i, k, f, grid(p)) for i, k, f, p in zip(ids, kinds, flags, places, strict=True)]


def bitmask(found: list[Object], size: tuple[int, int] = SIZE) -> Rgba:
    """R category, G attributes, B and A the instance id."""
    pixels = np.zeros((*size, 4), np.uint8)
    for number, category, flags, where in found:
        pixels[where] = (category, flags, number // 256, number % 256)
    return pixels


def panoptic_objects(seed: int) -> list[Object]:
    """Road, sky and vegetation with the category as id; things from 31."""
    things = [(31 + n, *o[1:]) for n, o in enumerate(objects(seed, range(31, 41)))]
    stuff: list[Object] = [
        (7, 7, 0, (slice(12, 24), slice(0, 32))),
        (30, 30, 0, (slice(0, 6), slice(0, 32))),
        (29, 29, 0, (slice(6, 12), slice(0, 16))),
    ]
    return [*stuff, *things]


def lanes(seed: int) -> NDArray[np.uint8]:
    """Bytes of lane marks: every category, direction and style; 255 for the background."""
    rng = np.random.default_rng(seed)
    value = np.full(SIZE, 255, np.uint8)
    for n in range(12):
        rows, columns = grid(n)
        value[rows.start + 3 : rows.start + 5, columns] = rng.integers(0, 8) + 16 * rng.integers(0, 4)
    return value


def write(path: Path, content: Any) -> Path:
    """A JSON file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def frame(name: str, labels: list[dict[str, Any]] | None, **more: Any) -> dict[str, Any]:
    """A frame as in the official files."""
    seed = sum(name.encode())
    attributes = {"weather": WEATHER[seed % 3], "scene": "city street", "timeofday": "daytime"}
    return {"name": f"{name}.jpg", "attributes": attributes, "timestamp": 10000, "labels": labels, **more}


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The RLE of a mask, as in the official files."""
    found = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"counts": found["counts"].decode(), "size": list(found["size"])}


def rle_label(label_id: str, category: str, mask: NDArray[np.bool_], **more: Any) -> dict[str, Any]:
    """A label with an RLE."""
    return {"id": label_id, "category": category, "rle": rle(mask), **more}


def poly_label(
    label_id: str, category: str, corners: list[list[float]], types: str = "", **more: Any
) -> dict[str, Any]:
    """A label with one polygon."""
    poly = {"vertices": corners, "types": types or "L" * len(corners), "closed": True}
    return {"id": label_id, "category": category, "poly2d": [poly], **more}


def box_label(label_id: str, category: str, where: tuple[slice, slice], **more: Any) -> dict[str, Any]:
    """A label with a rectangular polygon."""
    rows, columns = where
    x, y, right, bottom = (float(v) for v in (columns.start, rows.start, columns.stop, rows.stop))
    return poly_label(label_id, category, [[x, y], [right, y], [right, bottom], [x, bottom]], **more)


def masks(root: Path, task: str, photos: str, draw: Callable[[int], NDArray[np.uint8]], folder: str = "masks") -> Path:
    """Photos of all splits, and PNGs and colour maps of train and val."""
    from generators import photo, save

    seed = 0
    for split, names in IMAGES.items():
        for name in names:
            seed += 1
            save(root / "images" / photos / split / f"{name}.jpg", photo(seed, SIZE))
            if split != "test":
                labels = root / "labels" / task
                save(labels / folder / split / f"{name}.png", draw(seed))
                save(labels / "colormaps" / split / f"{name}.png", photo(seed, SIZE))
    return root


def polygons_of(root: Path, task: str, split: str, labels: Mapping[str, list[dict[str, Any]] | None]) -> Path:
    """``polygons/TASK_SPLIT.json``."""
    content = [frame(name, found) for name, found in labels.items()]
    return write(root / "labels" / task / "polygons" / f"{task}_{split}.json", content)


def sem(root: Path) -> Path:
    """Label maps of trainIds and 255; frames of the polygons without any; train also has RLE, which count for less."""
    from generators import labels

    masks(root, "sem_seg", "10k", lambda seed: labels(seed, (*range(19), 255), SIZE).astype(np.uint8))
    for split in ("train", "val"):
        polygons_of(root, "sem_seg", split, dict.fromkeys(IMAGES[split], None))
    write(root / "labels/sem_seg/rles/sem_seg_train.json", [frame(IMAGES["train"][0], [])])
    return root


def drivable(root: Path) -> Path:
    """0, 1 and 2; the detection labels know the weather."""
    from generators import labels

    masks(root, "drivable", "100k", lambda seed: labels(seed, (0, 1, 2), SIZE).astype(np.uint8))
    for split in ("train", "val"):
        write(root / "labels/det_20" / f"det_{split}.json", [frame(name, []) for name in IMAGES[split]])
    return root


def lane(root: Path) -> Path:
    """Lane bytes."""
    return masks(root, "lane", "100k", lanes)


def pan(root: Path) -> Path:
    """Bitmasks of stuff and things."""
    return masks(root, "pan_seg", "10k", lambda seed: bitmask(panoptic_objects(seed)), "bitmasks")


def ins(root: Path) -> Path:
    """Bitmasks of objects, and videos of two frames each."""
    from generators import photo, save

    masks(root, "ins_seg", "10k", lambda seed: bitmask(objects(seed, range(1, 9))), "bitmasks")
    seed = 50
    for split, videos in VIDEOS.items():
        for video in videos:
            for number in (1, 2):
                seed += 1
                name = f"{video}/{video}-{number:07d}"
                save(root / "images/seg_track_20" / split / f"{name}.jpg", photo(seed, SIZE))
                pixels = bitmask(objects(seed, range(1, 9)))
                save(root / "labels/seg_track_20/bitmasks" / split / f"{name}.png", pixels)
            content = [frame(f"{video}-{n:07d}", None, videoName=video, frameIndex=n - 1) for n in (1, 2)]
            write(root / "labels/seg_track_20/polygons" / split / f"{video}.json", content)
    return root


def read_rgba(path: Path) -> Rgba:
    """The pixels of a bitmask."""
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        return np.array(image)


def truth(dataset: "Dataset", root: Path, *splits: str) -> list["Labels"]:
    """What the export makes of a tree's ground truth; bad images raise."""
    from segbatch.datasets.tree import Tree
    from segbatch.formats.base import Labels

    rows = []
    for item in dataset.items(Tree.of(str(root)), splits):
        for sample in dataset.read(item):
            rows.append(
                Labels(
                    sample_id=sample.sample_id,
                    image_uri=sample.image_uri,
                    height=sample.height,
                    width=sample.width,
                    group_id=item.group_id,
                    split=item.split,
                    attributes=sample.attributes,
                    semantic=None if sample.semantic is None else sample.semantic.astype(np.uint16),
                    instances=sample.instances,
                    panoptic=None if sample.panoptic is None else sample.panoptic.astype(np.uint16),
                    segments=sample.segments,
                    label_maps={name: m.astype(np.uint16) for name, m in sample.label_maps.items()},
                    is_truth=True,
                )
            )
    return rows


def exported(form: "Format", rows: list["Labels"], folder: Path) -> Path:
    """The folder with the rows, exported with the official classes."""
    from segbatch.datasets import tables
    from segbatch.stages.exporting import Folder

    form.write(iter(rows), tables.load(form.name), Folder(str(folder), 2))
    return folder


def planned(form: "Format", source: Path, rows: list["Labels"]) -> list["PlanItem"]:
    """The items of an import against the samples that the rows are of."""
    from segbatch.datasets import tables
    from segbatch.formats.base import SampleRef
    from segbatch.formats.files import tree_of

    samples = [SampleRef(r.sample_id, r.image_uri, "tag", r.height, r.width, r.group_id, r.split) for r in rows]
    return list(form.items(tree_of(str(source)), samples, tables.load(form.name)))


TREES: dict[str, Callable[[Path], Path]] = {
    "bdd100k-drivable": drivable,
    "bdd100k-ins": ins,
    "bdd100k-lane": lane,
    "bdd100k-pan": pan,
    "bdd100k-sem": sem,
}
"""See ``generators.TREES``."""
