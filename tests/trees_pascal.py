"""Small trees in the official layouts of PASCAL VOC segmentation and of PASCAL-Context."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

SIZE = (24, 32)
"""Height and width of every image."""

VOC = {
    "train": ("2007_000032", "2007_000039", "2008_000003"),
    "val": ("2007_000033", "2008_000007"),
    "test": ("2008_000006",),
}
CONTEXT = {"train": ("2008_000002", "2008_000003"), "val": ("2008_000001", "2008_000004")}

MAPPING = (
    *(2, 259, 260, 415, 324, 9, 258, 144, 18, 19, 22, 23, 397, 25, 284, 158, 159, 416, 33, 162, 420, 454, 295, 296),
    *(427, 44, 45, 46, 308, 59, 440, 445, 31, 232, 65, 354, 424, 68, 326, 72, 458, 34, 207, 80, 355, 85, 347, 220),
    *(349, 360, 98, 187, 104, 105, 366, 189, 368, 113, 115),
)
"""The 59 classes by their 459 ids, as pascal_context.py of mmsegmentation lists them."""

NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def palette() -> bytes:
    """VOClabelcolormap.m: bit j of a channel is bit 3 * (7 - j) + channel of the index."""
    colors = bytearray()
    for index in range(256):
        left, rgb = index, [0, 0, 0]
        for bit in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= (left >> channel & 1) << bit
            left >>= 3
        colors += bytes(rgb)
    return bytes(colors)


def save_palette(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an indexed PNG in VOC's colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    image.putpalette(palette())
    image.save(path)


def save_mat(path: Path, **variables: object) -> None:
    """Write a compressed MATLAB 5 file; its header's text, which holds the time, is always the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:])


def voc_maps(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[int]]:
    """Class map, object map and the classes of the objects: three objects with a border of void around each."""
    rng = np.random.default_rng(seed)
    classes, objects = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    found = [int(c) for c in rng.integers(1, 21, 3)]
    for number, class_id in enumerate(found, 1):
        row, column = int(rng.integers(0, 10)), 10 * (number - 1)
        for fill_class, fill_object, inset in ((255, 255, 0), (class_id, number, 1)):
            area = np.s_[row + inset : row + 12 - inset, column + inset : column + 10 - inset]
            classes[area], objects[area] = fill_class, fill_object
    return classes, objects, found


def annotation(image_id: str, classes: list[int]) -> str:
    """The XML of an image; the last object is difficult."""
    height, width = SIZE
    objects = "".join(
        f"<object><name>{NAMES[c - 1]}</name><pose>Left</pose><truncated>{n % 2}</truncated><difficult>"
        f"{int(n == len(classes) - 1)}</difficult><bndbox><xmin>{10 * n + 1}</xmin><ymin>1</ymin><xmax>{10 * n + 10}"
        f"</xmax><ymax>24</ymax></bndbox></object>"
        for n, c in enumerate(classes)
    )
    return (
        f"<annotation><folder>VOC2012</folder><filename>{image_id}.jpg</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size><segmented>1</segmented>{objects}</annotation>\n"
    )


def pascal_voc(root: Path) -> Path:
    """``VOCdevkit/VOC2012``: three images of train, two of val, one of test; a photo that no list of this task has."""
    from generators import photo, save

    year = root / "VOCdevkit" / "VOC2012"
    lists = year / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "VOCdevkit" / "VOCcode").mkdir()
    seed = 0
    for split, ids in VOC.items():
        (lists / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for image_id in ids:
            seed += 1
            save(year / "JPEGImages" / f"{image_id}.jpg", photo(seed, SIZE))
            if split == "test":
                continue
            class_map, object_map, classes = voc_maps(seed)
            save_palette(year / "SegmentationClass" / f"{image_id}.png", class_map)
            save_palette(year / "SegmentationObject" / f"{image_id}.png", object_map)
            if seed != 2:
                (year / "Annotations").mkdir(exist_ok=True)
                (year / "Annotations" / f"{image_id}.xml").write_text(annotation(image_id, classes))
    (lists / "trainval.txt").write_text("".join(f"{i}\n" for i in sorted((*VOC["train"], *VOC["val"]))))
    save(year / "JPEGImages" / "2009_000001.jpg", photo(99, SIZE))
    return root


def context_labels(seed: int) -> NDArray[np.uint16]:
    """A LabelMap: blocks of the 59 classes, of other classes, and of 0."""
    from generators import labels

    return labels(seed, (0, 1, 3, 431, 459, *MAPPING), SIZE)


def pascal_context(root: Path) -> Path:
    """``trainval/*.mat`` beside ``VOCdevkit/VOC2010`` with the lists of ``ImageSets/Main``."""
    from generators import photo, save

    year = root / "VOCdevkit" / "VOC2010"
    (year / "ImageSets" / "Main").mkdir(parents=True)
    for number, (split, ids) in enumerate(CONTEXT.items()):
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for n, image_id in enumerate(ids):
            seed = 10 * number + n
            save(year / "JPEGImages" / f"{image_id}.jpg", photo(seed, SIZE))
            save_mat(root / "trainval" / f"{image_id}.mat", LabelMap=context_labels(seed))
    both = sorted(i for ids in CONTEXT.values() for i in ids)
    (year / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{i}\n" for i in both))
    (root / "labels.txt").write_text("1: accordion\n2: aeroplane\n")
    return root


def pascal_context_png(root: Path) -> Path:
    """The same images as mmsegmentation converts them: ``SegmentationClassContext`` and ``SegmentationContext``."""
    from generators import photo, save

    year = root / "VOCdevkit" / "VOC2010"
    (year / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    order = np.array(sorted((0, *MAPPING)))
    for number, (split, ids) in enumerate(CONTEXT.items()):
        (year / "ImageSets" / "SegmentationContext" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for n, image_id in enumerate(ids):
            seed = 10 * number + n
            label = context_labels(seed)
            label = np.where(np.isin(label, order), label, 0)
            save(year / "JPEGImages" / f"{image_id}.jpg", photo(seed, SIZE))
            converted = np.digitize(label.ravel(), order, right=True).reshape(SIZE).astype(np.uint8)
            save(year / "SegmentationClassContext" / f"{image_id}.png", converted)
    return root


TREES: dict[str, Callable[[Path], Path]] = {"pascal-voc": pascal_voc, "pascal-context": pascal_context}
