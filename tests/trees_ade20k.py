"""Small trees in the official layouts of ADE20K: the scene parsing benchmark, and the releases of 2016 and 2021."""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

SIZE = (24, 32)
"""Height and width of every image."""

IMAGES = {
    "training": ("ADE_train_", (1, 2, 20210)),
    "validation": ("ADE_val_", (1, 2000)),
    "testing": ("ADE_test_", (1,)),
}
SCENES = {1: "airport_terminal", 2: "art_gallery", 2000: "street", 20210: "misc"}

CLASSES = {1: "-", 401: "car, auto", 774: "door", 1180: "handle", 2420: "sky", 2855: "tree", 3035: "wheel"}
"""Some classes of the release of 2021 by their numbers."""

FULL = {
    "training": (
        ("urban/street", "ADE_train_00016869"),
        ("urban/street", "ADE_train_00016900"),
        ("home/attic", "ADE_train_00000007"),
    ),
    "validation": (("nature/forest", "ADE_val_00000003"),),
}


def ade20k(root: Path) -> Path:
    """``ADEChallengeData2016`` with three images of training, two of validation, and one of ``release_test``."""
    from generators import labels, photo, save

    data = root / "ADEChallengeData2016"
    scenes = []
    for number, (split, (prefix, numbers)) in enumerate(IMAGES.items()):
        for n in numbers:
            stem, seed = f"{prefix}{n:08d}", 100 * number + n % 100
            if split == "testing":
                save(root / "release_test" / "testing" / f"{stem}.jpg", photo(seed, SIZE))
                continue
            save(data / "images" / split / f"{stem}.jpg", photo(seed, SIZE))
            save(data / "annotations" / split / f"{stem}.png", labels(seed, tuple(range(151)), SIZE).astype(np.uint8))
            scenes.append(f"{stem} {SCENES[n]}\n")
    (data / "sceneCategories.txt").write_text("".join(scenes))
    (data / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n")
    return root


def encoded(codes: NDArray[np.uint16], blue: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of classes and instances: R = code // 256 * 10, G = code % 256, B as given."""
    return np.stack([codes // 256 * 10, codes % 256, blue], axis=2).astype(np.uint8)


def scene(seed: int) -> list[dict[str, Any]]:
    """Objects in depth order: sky, tree, a car with a wheel and a door, which has a handle; masks are full areas."""
    rng = np.random.default_rng(seed)
    row = int(rng.integers(6, 10))
    areas = [
        (2420, np.s_[0:8, 0:30], None),
        (2855, np.s_[2:20, 2:12], None),
        (401, np.s_[row : row + 12, 8:28], None),
        (3035, np.s_[row + 8 : row + 12, 10:14], 2),
        (774, np.s_[row + 2 : row + 9, 16:22], 2),
        (1180, np.s_[row + 4 : row + 6, 17:19], 4),
    ]
    return [{"code": code, "area": area, "parent": parent} for code, area, parent in areas]


def levels(objects: list[dict[str, Any]]) -> list[int]:
    """Part level of every object."""
    found: list[int] = []
    for entry in objects:
        found.append(0 if entry["parent"] is None else found[entry["parent"]] + 1)
    return found


def level_map(objects: list[dict[str, Any]], level: int, step: int) -> NDArray[np.uint8]:
    """The RGB map of a level; the n-th object that shows has B = ``step`` * n."""
    codes, blue = np.zeros(SIZE, np.uint16), np.zeros(SIZE, np.uint8)
    chosen = [o for o, at in zip(objects, levels(objects), strict=True) if at == level]
    for number, entry in enumerate(chosen, 1):
        codes[entry["area"]], blue[entry["area"]] = entry["code"], number * step
    return encoded(codes, blue)


def masks(objects: list[dict[str, Any]]) -> list[NDArray[np.uint8]]:
    """255 where an object shows, 128 where a later one of its level hides it."""
    at = levels(objects)
    found = []
    for n, entry in enumerate(objects):
        mask = np.zeros(SIZE, np.uint8)
        mask[entry["area"]] = 255
        for later in range(n + 1, len(objects)):
            if at[later] == at[n]:
                hidden = np.zeros(SIZE, bool)
                hidden[objects[later]["area"]] = True
                mask[hidden & (mask > 0)] = 128
        found.append(mask)
    return found


def described(stem: str, folder: str, objects: list[dict[str, Any]]) -> dict[str, Any]:
    """``STEM.json`` as MATLAB wrote it: a list of one element is that element."""
    entries = []
    for n, (entry, level) in enumerate(zip(objects, levels(objects), strict=True)):
        parts = [i for i, o in enumerate(objects) if o["parent"] == n]
        rows, columns = entry["area"]
        entries.append(
            {
                "id": n,
                "name": CLASSES[entry["code"]],
                "name_ndx": entry["code"],
                "hypernym": [CLASSES[entry["code"]], "entity"],
                "raw_name": f"raw {entry['code']}",
                "attributes": "red" if n == 2 else [],
                "depth_ordering_rank": n + 1,
                "occluded": ("no", "yes", [])[n % 3],
                "crop": str(n % 2),
                "parts": {
                    "hasparts": parts[0] if len(parts) == 1 else parts,
                    "ispartof": [] if entry["parent"] is None else entry["parent"],
                    "part_level": level,
                },
                "instance_mask": f"{stem}/instance_{n:03d}_{stem}.png",
                "polygon": {"x": [columns.start, columns.stop], "y": [rows.start, rows.stop], "click_date": []},
                "saved_date": "18-Dec-2005 06:56:48",
            }
        )
    return {
        "annotation": {
            "filename": f"{stem}.jpg",
            "folder": folder,
            "imsize": [*SIZE, 3],
            "source": {"folder": "static_sun_database", "filename": "labelme_a.jpg", "origin": "flickr"},
            "scene": ["outdoor", *folder.split("/")[-2:]],
            "object": entries,
        }
    }


@functools.cache
def index(compressed: bool = True) -> bytes:
    """``index_ade20k.mat``: the struct ``index`` with counts and the names of all classes up to the last."""
    names = np.empty((1, max(CLASSES)), object)
    names[0] = [CLASSES.get(code, f"class {code}") for code in range(1, max(CLASSES) + 1)]
    return mat_file(
        compressed,
        index={
            "filename": np.array([["ADE_train_00000007.jpg"]], object),
            "objectPresence": np.ones((max(CLASSES), 4)),
            "objectnames": names,
            "scene": np.array([["/attic"]], object),
        },
    )


def mat_file(compressed: bool, **variables: object) -> bytes:
    """A MATLAB 5 file as scipy writes it; its header's text, which holds the time, is always the same."""
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]


def _images(base: Path) -> list[tuple[Path, str, str, list[dict[str, Any]]]]:
    """Folder, path of the folder, stem and objects of every image, whose photo and maps are written."""
    from generators import photo, save

    found = []
    for number, (split, images) in enumerate(FULL.items()):
        for n, (folder, stem) in enumerate(images):
            place = base / split / folder
            objects = scene(10 * number + n)[: 4 if n == 1 else 6]
            save(place / f"{stem}.jpg", photo(10 * number + n, SIZE))
            for level in range(max(levels(objects)) + 1):
                name = f"{stem}_parts_{level}.png" if level else f"{stem}_seg.png"
                save(place / name, level_map(objects, level, 5 if level == 0 else 51))
            found.append((place, f"{split}/{folder}", stem, objects))
    return found


def ade20k_2021(root: Path) -> Path:
    """``ADE20K_2021_17_01``: JSON and a mask for every object, and no index but the pickle, which is no pickle."""
    release = root / "ADE20K_2021_17_01"
    for place, folder, stem, objects in _images(release / "images" / "ADE"):
        (place / f"{stem}.json").write_text(json.dumps(described(stem, folder, objects)))
        (place / stem).mkdir()
        for n, mask in enumerate(masks(objects)):
            Image.fromarray(mask).save(place / stem / f"instance_{n:03d}_{stem}.png")
    (release / "index_ade20k.pkl").write_bytes(b"never opened")
    (release / "objects.txt").write_text(" ADE names \t Wordnet name \ncar, auto\tcar\n")
    return root


def ade20k_2016(root: Path) -> Path:
    """``ADE20K_2016_07_26``: ``_atr.txt`` and ``index_ade20k.mat``."""
    release = root / "ADE20K_2016_07_26"
    for place, _, stem, objects in _images(release / "images"):
        at = levels(objects)
        lines = []
        for level in range(max(at) + 1):
            chosen = [o for o, found in zip(objects, at, strict=True) if found == level]
            for number, entry in enumerate(chosen, 1):
                name = CLASSES[entry["code"]]
                said = '"red, old"' if entry["code"] == 401 else '""'
                lines.append(f"{number:03d} # {level} # {number % 2} # {name} # raw {entry['code']} # {said}\n")
        (place / f"{stem}_atr.txt").write_text("".join(lines))
    (release / "index_ade20k.mat").write_bytes(index())
    return root


TREES: dict[str, Callable[[Path], Path]] = {"ade20k": ade20k, "ade20k-full": ade20k_2021}
