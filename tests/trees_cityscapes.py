"""Small trees in the official layouts of Cityscapes and of KITTI semantics 2015.

The scenes are drawn once: a map of instanceIds, from which the other label files follow by the rules of
cityscapesScripts and of KITTI's devkit, written down here on their own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from segbatch.datasets.base import Dataset
    from segbatch.formats.base import Format, Labels
    from segbatch.records import PlanItem

SIZE = (40, 48)
"""Height and width of every image: objects of 12 x 12 pixels are large enough to count in the official AP."""

THINGS = range(24, 34)
VOID = {0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30}
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids by trainId."""

IMAGES = {
    "train": ("aachen_000000_000019", "aachen_000000_000049", "bochum_000000_000313"),
    "val": ("frankfurt_000000_000294", "frankfurt_000001_000019"),
    "test": ("berlin_000000_000019", "berlin_000001_000019"),
    "train_extra": ("augsburg_000000_000003",),
    "demoVideo": ("stuttgart_00_000000_000001",),
}

Map = NDArray[np.uint16]


def scene(seed: int) -> Map:
    """A street as a map of instanceIds, uint16 of ``SIZE``: stuff, objects, a group, and classes that are ignored."""
    rng = np.random.default_rng(seed)
    ids = np.full(SIZE, 11, np.uint16)
    ids[:8] = 23
    ids[28:] = 7
    ids[24:28, rng.integers(0, 16) :] = 8
    objects = [24000, 24001, 26000, 26, 33000, 29000] if seed % 2 == 0 else [26000, 26001, 25000, 24, 32000, 31000]
    for number, (value, column) in enumerate(zip(objects, rng.permutation(6) * 6, strict=True)):
        row = 2 + 6 * number % 26
        ids[row : row + 12, column : column + 12] = value
    ids[38:] = 1
    ids[:, 0] = 2
    return ids


def label_ids(instance_ids: Map) -> NDArray[np.uint8]:
    """json2labelImg of what json2instanceImg drew."""
    ids = instance_ids.astype(np.int64)
    return np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)


def train_ids(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """createTrainIdLabelImgs: 255 for all void classes."""
    table = np.full(256, 255, np.uint8)
    table[list(TRAIN_IDS)] = np.arange(len(TRAIN_IDS))
    return table[labels]


def panoptic(instance_ids: Map) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """createPanopticImgs: the RGB map and ``segments_info``."""
    rgb, segments = np.zeros((*instance_ids.shape, 3), np.uint8), []
    for value in np.unique(instance_ids).tolist():
        category = value if value < 1000 else value // 1000
        if category in VOID:
            continue
        mask = instance_ids == value
        rgb[mask] = [value % 256, value // 256, 0]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        segments.append(
            {
                "id": value,
                "category_id": category,
                "area": int(mask.sum()),
                "bbox": [int(v) for v in box],
                "iscrowd": int(value < 1000 and category in THINGS),
            }
        )
    return rgb, segments


def cityscapes(root: Path) -> Path:
    """All five splits: fine labels of train and val, coarse ones of train_extra, dummies of one test image.

    val also has the panoptic files of createPanopticImgs; one image of train its vehicle and camera files.
    """
    from generators import photo, save

    for number, (split, image_ids) in enumerate(IMAGES.items()):
        for i, image_id in enumerate(image_ids):
            city = image_id.rsplit("_", 2)[0]
            save(root / "leftImg8bit" / split / city / f"{image_id}_leftImg8bit.png", photo(10 * number + i, SIZE))
            if split in ("train", "val"):
                labelled(root, "gtFine", split, image_id, scene(10 * number + i))
            elif split == "train_extra":
                labelled(root, "gtCoarse", split, image_id, scene(10 * number + i))
            elif image_id == IMAGES["test"][0]:
                labelled(root, "gtFine", split, image_id, np.where(scene(20) == 1, 1, 0).astype(np.uint16))
    labelled(root, "gtCoarse", "train", IMAGES["train"][0], np.zeros(SIZE, np.uint16))
    panoptic_files(root, "val", dict(zip(IMAGES["val"], map(scene, (10, 11)), strict=True)))
    for name, content in (("vehicle", {"speed": 7.5, "outsideTemperature": 18}), ("camera", {"extrinsic": {"z": 1.2}})):
        path = root / name / "train" / "aachen" / f"{IMAGES['train'][0]}_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def labelled(root: Path, kind: str, split: str, image_id: str, instance_ids: Map) -> None:
    """The label files of one image, as the archives hold them."""
    from generators import save

    folder = root / kind / split / image_id.rsplit("_", 2)[0]
    labels = label_ids(instance_ids)
    save(folder / f"{image_id}_{kind}_labelIds.png", labels)
    save(folder / f"{image_id}_{kind}_instanceIds.png", instance_ids)
    save(folder / f"{image_id}_{kind}_color.png", np.stack([labels * 7, labels * 5, labels * 3], axis=-1))
    size = {"imgHeight": instance_ids.shape[0], "imgWidth": instance_ids.shape[1], "objects": []}
    (folder / f"{image_id}_{kind}_polygons.json").write_text(json.dumps(size))


def panoptic_files(root: Path, split: str, scenes: dict[str, Map]) -> Path:
    """``gtFine/cityscapes_panoptic_SPLIT/`` and the JSON beside it; gives the JSON."""
    from generators import save

    images, annotations = [], []
    folder = root / "gtFine" / f"cityscapes_panoptic_{split}"
    for image_id, instance_ids in scenes.items():
        rgb, segments = panoptic(instance_ids)
        name = f"{image_id}_gtFine_panoptic.png"
        save(folder / name, rgb)
        height, width = instance_ids.shape
        images.append({"id": image_id, "height": height, "width": width, "file_name": f"{image_id}_leftImg8bit.png"})
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    document = folder.with_suffix(".json")
    document.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return document


def kitti(root: Path, training: int = 3, testing: int = 2) -> Path:
    """data_semantics.zip: ``training/{image_2,semantic,semantic_rgb,instance}`` and ``testing/image_2``."""
    from generators import photo, save

    for i in range(training):
        name = f"{i:06d}_10.png"
        instances = kitti_instances(scene(i))
        labels = (instances // 256).astype(np.uint8)
        save(root / "training" / "image_2" / name, photo(i, SIZE))
        save(root / "training" / "semantic" / name, labels)
        save(root / "training" / "semantic_rgb" / name, np.stack([labels * 7, labels * 5, labels * 3], axis=-1))
        save(root / "training" / "instance" / name, instances)
    for i in range(testing):
        save(root / "testing" / "image_2" / f"{i:06d}_10.png", photo(50 + i, SIZE))
    return root


def kitti_instances(instance_ids: Map) -> Map:
    """A scene as KITTI's instance map: 256 * label id + number, which starts at 1 and is 0 for groups and stuff."""
    numbers = np.where(instance_ids < 1000, 0, instance_ids % 1000 + 1)
    return (256 * label_ids(instance_ids).astype(np.uint16) + numbers).astype(np.uint16)


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
                    is_truth=True,
                )
            )
    return rows


def write(form: "Format", rows: list["Labels"], folder: Path) -> Path:
    """Export rows with the official classes."""
    from segbatch.datasets.cityscapes import CLASSES
    from segbatch.stages.exporting import Folder

    form.write(iter(rows), CLASSES, Folder(str(folder), 2))
    return folder


def planned(form: "Format", folder: Path, rows: list["Labels"]) -> list["PlanItem"]:
    """The items of an import against the samples that the rows are of."""
    from segbatch.datasets.cityscapes import CLASSES
    from segbatch.datasets.tree import Tree
    from segbatch.formats.base import SampleRef

    samples = [SampleRef(r.sample_id, r.image_uri, "tag", r.height, r.width, r.group_id, r.split) for r in rows]
    return list(form.items(Tree.of(str(folder)), samples, CLASSES))


TREES: dict[str, Callable[[Path], Path]] = {"cityscapes": cityscapes, "kitti": kitti}
"""See ``generators.TREES``."""
