"""Small trees in COCO's official layouts: instances, panoptic, and COCO-Stuff 164K.

The masks are drawn here with pycocotools and NumPy alone, so that they say what they say independently of segbatch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

SIZE = (24, 32)
"""Height and width of every image."""

INFO = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017}
LICENSES = [
    {
        "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
        "id": 1,
        "name": "Attribution-NonCommercial-ShareAlike",
    },
    {"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"},
]
THINGS = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "vehicle", "id": 3, "name": "car"},
    {"supercategory": "indoor", "id": 90, "name": "toothbrush"},
]
PANOPTIC = [
    {"supercategory": "person", "color": [220, 20, 60], "isthing": 1, "id": 1, "name": "person"},
    {"supercategory": "vehicle", "color": [0, 0, 142], "isthing": 1, "id": 3, "name": "car"},
    {"supercategory": "sky", "color": [70, 130, 180], "isthing": 0, "id": 187, "name": "sky-other-merged"},
    {"supercategory": "ground", "color": [96, 96, 96], "isthing": 0, "id": 191, "name": "pavement-merged"},
]
STUFF = [
    {"supercategory": "ground", "id": 149, "name": "road"},
    {"supercategory": "sky", "id": 157, "name": "sky-other"},
    {"supercategory": "other", "id": 183, "name": "other"},
]
IMAGES = {"train2017": (9, 25, 581929), "val2017": (139, 285)}
"""Image ids by split; in every split the last image has no object."""

Entry = dict[str, Any]


def file_name(image_id: int, suffix: str = ".jpg") -> str:
    """``000000000139.jpg``."""
    return f"{image_id:012d}{suffix}"


def image_entry(image_id: int, split: str, size: tuple[int, int] = SIZE) -> Entry:
    """An entry of ``images`` with all of COCO's fields."""
    return {
        "license": 1 if image_id % 2 else 4,
        "file_name": file_name(image_id),
        "coco_url": f"http://images.cocodataset.org/{split}/{file_name(image_id)}",
        "height": size[0],
        "width": size[1],
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm1.staticflickr.com/1/{image_id}_z.jpg",
        "id": image_id,
    }


def document(images: Sequence[Entry], annotations: Sequence[Entry], categories: Sequence[Entry]) -> Entry:
    """The top level of an annotation file."""
    parts = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    return {"info": INFO, "licenses": LICENSES, **parts}


def write_json(path: Path, content: Any) -> Path:
    """Write a JSON file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def runs(mask: NDArray[np.generic]) -> list[int]:
    """Uncompressed run lengths of a mask: down the columns, background first."""
    flat = np.concatenate([[0], mask.astype(np.uint8).ravel(order="F"), [0]])
    edges = np.flatnonzero(np.diff(flat))
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return lengths


def compressed(mask: NDArray[np.generic]) -> Entry:
    """A mask as pycocotools' compressed runs, for JSON."""
    found = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(v) for v in found["size"]], "counts": found["counts"].decode()}


def disc(row: float, column: float, radius: float, size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    """A filled circle."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    found: NDArray[np.bool_] = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
    return found


def objects(image_id: int) -> list[Entry]:
    """The annotations of an image: polygons in one part and in two, compressed runs, and a crowd in plain runs."""
    x, y = 2 + image_id % 7, 3 + image_id % 5
    crowd, round_ = disc(18, 26, 5), disc(6, 24, 4)
    shapes: list[tuple[int, Any, int]] = [
        (1, [[x, y, x + 9.5, y + 0.25, x + 8.2, y + 11, x + 1.1, y + 9.9]], 0),
        (3, [[1, 14, 8, 14, 8, 20.5, 1, 22], [10.5, 15, 16, 15.5, 13, 21]], 0),
        (90, compressed(round_), 0),
        (1, {"size": list(SIZE), "counts": runs(crowd)}, 1),
    ]
    return [annotation(1000 * image_id + i, image_id, *shape) for i, shape in enumerate(shapes, 1)]


def annotation(number: int, image_id: int, category_id: int, segmentation: Any, iscrowd: int = 0) -> Entry:
    """An entry of ``annotations``; its area is not the mask's, as COCO's are not."""
    mask = drawn(segmentation)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0, 0, 0, 0]
    return {
        "segmentation": segmentation,
        "area": float(mask.sum()) + 0.125,
        "iscrowd": iscrowd,
        "image_id": image_id,
        "bbox": [float(v) for v in box],
        "category_id": category_id,
        "id": number,
    }


def drawn(segmentation: Any, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """What ``COCO.annToMask`` of pycocotools gives."""
    if isinstance(segmentation, list):
        if not segmentation:
            return np.zeros(size, np.uint8)
        found = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        found = coco_mask.frPyObjects(segmentation, *size)
    else:
        found = {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
    mask: NDArray[np.uint8] = coco_mask.decode(found)
    return mask


def photos(root: Path, split: str, image_ids: Sequence[int], size: tuple[int, int] = SIZE) -> None:
    """``SPLIT/NAME.jpg`` for each."""
    from generators import photo, save

    for image_id in image_ids:
        save(root / split / file_name(image_id), photo(image_id, size))


def coco_instances(root: Path) -> Path:
    """train2017.zip, val2017.zip and annotations_trainval2017.zip, unpacked."""
    for split, image_ids in IMAGES.items():
        photos(root, split, image_ids)
        images = [image_entry(i, split) for i in image_ids]
        annotations = [a for i in image_ids[:-1] for a in objects(i)]
        write_json(root / "annotations" / f"instances_{split}.json", document(images, annotations[::-1], THINGS))
        captions = [{"id": 1, "image_id": image_ids[0], "caption": "A scene."}]
        write_json(root / "annotations" / f"captions_{split}.json", document(images, captions, []))
    return root


def segment_map(image_id: int) -> tuple[NDArray[np.uint32], dict[int, tuple[int, int]]]:
    """Segment ids of an image, and category and crowd flag of each: stuff, two people, a group of cars, and void."""
    ids = np.zeros(SIZE, np.uint32)
    parts = {
        3226956: (187, 0, np.indices(SIZE)[0] < 10),
        9998: (191, 0, np.indices(SIZE)[0] >= 13),
        16711680 + image_id % 200: (1, 0, disc(12, 8, 5)),
        2: (1, 0, disc(12, 15, 4)),
        70000: (3, 1, disc(17, 25, 5)),
    }
    for number, (_, _, mask) in parts.items():
        ids[mask] = number
    return ids, {number: (category, crowd) for number, (category, crowd, _) in parts.items()}


def colors(ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """panopticapi's id2rgb."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def segments_info(ids: NDArray[np.uint32], meaning: Mapping[int, tuple[int, int]]) -> list[Entry]:
    """``segments_info`` with areas and boxes of the pixels."""
    found = []
    for number, (category, crowd) in meaning.items():
        mask = ids == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(v) for v in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]
        entry = {"id": number, "category_id": category, "iscrowd": crowd, "bbox": box, "area": int(mask.sum())}
        found.append(entry)
    return found


def coco_panoptic(root: Path) -> Path:
    """train2017.zip, val2017.zip and panoptic_annotations_trainval2017.zip, all unpacked."""
    from generators import save

    for split, image_ids in IMAGES.items():
        photos(root, split, image_ids)
        annotations = []
        for image_id in image_ids:
            ids, meaning = segment_map(image_id)
            name = file_name(image_id, ".png")
            save(root / "annotations" / f"panoptic_{split}" / name, colors(ids))
            info = segments_info(ids, meaning)
            annotations.append({"segments_info": info, "file_name": name, "image_id": image_id})
        images = [image_entry(i, split) for i in image_ids]
        write_json(root / "annotations" / f"panoptic_{split}.json", document(images, annotations, PANOPTIC))
    return root


def stuff_map(image_id: int) -> NDArray[np.uint8]:
    """A label map of stuffthingmaps: sky-other 156, road 148, person 0, car 2, and 255 for nothing."""
    labels = np.full(SIZE, 255, np.uint8)
    labels[:9], labels[12:] = 156, 148
    labels[disc(14, 6 + image_id % 9, 4)] = 0
    labels[disc(16, 25, 5)] = 2
    return labels


def coco_stuff(root: Path) -> Path:
    """The archives of the photos unpacked in images/, stuffthingmaps_trainval2017.zip in annotations/."""
    from generators import save

    for split, image_ids in IMAGES.items():
        photos(root / "images", split, image_ids)
        for image_id in image_ids:
            save(root / "annotations" / split / file_name(image_id, ".png"), stuff_map(image_id))
    save(root / "annotations" / "val2017" / "000000000139_labelTrainIds.png", stuff_map(139))
    return root


def coco_stuff_json(root: Path) -> Path:
    """stuff_annotations_trainval2017.zip: compressed runs by class, all things as 183, nothing where unlabelled."""
    number = 10_000_000
    for split, image_ids in IMAGES.items():
        photos(root, split, image_ids)
        annotations = []
        for image_id in image_ids:
            labels = stuff_map(image_id).astype(int)
            ids = np.where(labels == 255, 0, np.where(labels < 91, 183, labels + 1))
            for category in (149, 157, 183):
                entry = annotation(number, image_id, category, compressed(ids == category))
                annotations.append({**entry, "area": float((ids == category).sum())})
                number += 1
        images = [image_entry(i, split) for i in image_ids]
        write_json(root / "annotations" / f"stuff_{split}.json", document(images, annotations, STUFF))
    return root


TREES: dict[str, Callable[[Path], Path]] = {
    "coco-instances": coco_instances,
    "coco-panoptic": coco_panoptic,
    "coco-stuff": coco_stuff,
}
"""See ``generators.TREES``."""
