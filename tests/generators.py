"""Small dataset trees for tests, drawn from a seed: every official layout without its data."""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = (12, 16)
"""Height and width of every drawn photo."""

CLASSES_TOML = """\
[[classes]]
id = 0
name = "floor"
color = [10, 20, 30]
[[classes]]
id = 3
name = "cart"
color = [200, 0, 0]
[[classes]]
id = 900
name = "person"
color = [0, 0, 255]
[[classes]]
id = 255
name = "void"
ignore = true
"""


def photo(seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Random RGB of shape (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def labels(seed: int, ids: tuple[int, ...], size: tuple[int, int] = SIZE) -> NDArray[np.uint16]:
    """Random blocks of label ids, uint16 of shape (height, width); sides are multiples of 4."""
    blocks = np.random.default_rng(seed).choice(np.array(ids, np.uint16), (size[0] // 4, size[1] // 4))
    return np.kron(blocks, np.ones((4, 4), np.uint16)).astype(np.uint16)


def save(path: Path, pixels: NDArray[np.generic]) -> None:
    """Write an image in the format of its suffix; folders are made. uint16 becomes a 16-bit grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def camvid(root: Path, frames: int = 3, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """CamVid as in the SegNet tutorial: ``frames`` a split from two videos, lists with foreign absolute paths."""
    for number, split in enumerate(splits):
        lines = []
        for i in range(frames):
            name = f"{('0016E5', 'Seq05VD_f')[i % 2]}_{1000 * number + 30 * i:05d}.png"
            save(root / split / name, photo(100 * number + i))
            save(root / f"{split}annot" / name, labels(100 * number + i, tuple(range(12))).astype(np.uint8))
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def image_masks(root: Path, count: int = 3, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """``images/SPLIT/*.png`` beside ``masks/SPLIT/*.png`` (16 bit) and ``classes.toml``."""
    for number, split in enumerate(splits):
        for i in range(count):
            save(root / "images" / split / f"item_{i}.png", photo(100 * number + i))
            save(root / "masks" / split / f"item_{i}.png", labels(100 * number + i, (0, 3, 255, 900)))
    (root / "classes.toml").write_text(CLASSES_TOML)
    return root


def numbered_masks(root: Path) -> Path:
    """``image_masks`` with ``instances/``: in each photo an object of the classes 3 and 900."""
    for path in sorted((image_masks(root) / "masks").rglob("*.png")):
        found = np.asarray(Image.open(path))
        save(
            root / "instances" / path.relative_to(root / "masks"), ((found == 3) + 2 * (found == 900)).astype(np.uint8)
        )
    return root


def images(root: Path, count: int = 3) -> Path:
    """A folder of photos in several formats, with a sub-folder, a hidden folder and a file that is no photo."""
    for i in range(count):
        save(root / f"photo_{i}{('.png', '.JPG', '.bmp')[i % 3]}", photo(i))
    save(root / "more" / "photo_0.png", photo(99))
    save(root / ".thumbnails" / "photo_0.png", photo(98))
    (root / "notes.txt").write_text("not a photo\n")
    return root


TREES: dict[str, Callable[[Path], Path]] = {"camvid": camvid, "image-masks": numbered_masks, "images": images}
"""A small tree of every dataset, by its name; those of ``trees_*.py`` beside this file join."""

for _file in sorted(Path(__file__).parent.glob("trees_*.py")):
    TREES.update(importlib.import_module(_file.stem).TREES)
"""A tree for every registered dataset; the contract tests ask for all of them."""
