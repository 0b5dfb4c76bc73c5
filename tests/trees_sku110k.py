"""A small SKU-110K, as its owners distribute it and as a Supervisely project."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Boxes = list[tuple[float, float, float, float]]

SIZE = (24, 32)
"""Height and width of the photos."""

BOXES: dict[str, Boxes] = {
    "train_0": [(1, 2, 5, 9), (4, 2, 11, 9), (0, 0, 32, 24)],
    "train_10": [(30, 20, 31, 21)],
    "train_2": [(3, 1, 4, 23), (5, 0, 9, 24)],
    "val_0": [(10, 10, 20, 20)],
    "test_1": [(0, 5, 32, 6), (2, 2, 3, 3)],
}
"""Corners x1, y1, x2, y2 by photo, in the order of the CSV files."""


def csv_line(name: str, box: tuple[float, float, float, float], kind: str = "object") -> str:
    """A line of an annotation file."""
    return ",".join([name, *(f"{c:g}" for c in box), kind, str(SIZE[1]), str(SIZE[0])]) + "\n"


def supervisely(boxes: Boxes, first_id: int = 96269139) -> dict[str, Any]:
    """An annotation file of the Supervisely project; ids go down, as in the original."""
    objects = [
        {
            "id": first_id - i,
            "classId": 6509534,
            "geometryType": "rectangle",
            "classTitle": "retail item",
            "points": {"exterior": [[x1, y1], [x2, y2]], "interior": []},
            "tags": [],
        }
        for i, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    return {"description": "", "tags": [], "size": {"height": SIZE[0], "width": SIZE[1]}, "objects": objects}


def sku110k(root: Path) -> Path:
    """``images/`` and ``annotations/annotations_{train,val,test}.csv``."""
    from generators import photo, save

    lines: dict[str, str] = {}
    for seed, (stem, boxes) in enumerate(BOXES.items()):
        save(root / "images" / f"{stem}.jpg", photo(seed, SIZE))
        split = stem.split("_")[0]
        lines[split] = lines.get(split, "") + "".join(csv_line(f"{stem}.jpg", b) for b in boxes)
    (root / "annotations").mkdir()
    for split, text in lines.items():
        (root / "annotations" / f"annotations_{split}.csv").write_text(text)
    return root


def project(root: Path, folders: bool = False) -> Path:
    """``img/`` and ``ann/``, all together or by split."""
    from generators import photo, save

    for seed, (stem, boxes) in enumerate(BOXES.items()):
        place = root / stem.split("_")[0] if folders else root
        save(place / "img" / f"{stem}.jpg", photo(seed, SIZE))
        (place / "ann").mkdir(exist_ok=True)
        (place / "ann" / f"{stem}.jpg.json").write_text(json.dumps(supervisely(boxes)))
    return root


TREES: dict[str, Callable[[Path], Path]] = {"sku110k": sku110k}
