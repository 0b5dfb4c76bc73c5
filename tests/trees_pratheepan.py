"""A small Pratheepan dataset with the file names that occur in it: spaces, brackets, upper-case suffixes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PHOTOS = {
    "FacePhoto": ("06Apr03Face.jpg", "0520962400.JPG", "my face (1) [small].jpeg"),
    "FamilyPhoto": ("2007_family.jpg", "Family_1.png", "07-c140-12family-red-rr-398h.jpg"),
}


def skin(seed: int, size: tuple[int, int] = (12, 16)) -> NDArray[np.bool_]:
    """Where the skin is: random blocks of 4 x 4 pixels."""
    from generators import labels

    return labels(seed, (0, 1), size).astype(bool)


def pratheepan(root: Path) -> Path:
    """Six photos; ground truth in grey and in colour, with edges that are neither black nor white."""
    from generators import photo, save

    seed = 0
    for folder, names in PHOTOS.items():
        for number, name in enumerate(names):
            seed += 1
            save(root / "Pratheepan_Dataset" / folder / name, photo(seed))
            grey = np.where(skin(seed), 255, 0).astype(np.uint8)
            grey[0, :2] = (128, 129)
            mask = np.repeat(grey[..., None], 3, axis=2) if number % 2 else grey
            save(root / "Ground_Truth" / f"GroundT_{folder}" / f"{name.rsplit('.', 1)[0]}.png", mask)
    return root


TREES: dict[str, Callable[[Path], Path]] = {"pratheepan": pratheepan}
