"""CT volumes whose labels follow from neighbouring slices: what is bright is a lesion where it is bright in the next
slice too, else liver. No single slice tells them apart.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import volumes
from numpy.typing import NDArray

from segbatch.codecs import volume
from segbatch.records import ClassInfo, ClassTable, VolumeSlice

CLASSES = ClassTable((ClassInfo(0, "background"), ClassInfo(1, "liver"), ClassInfo(2, "lesion")))
WINDOW = [-150.0, 250.0]
SIZE = (16, 24)
_DARK, _BRIGHT, _NOISE, _BLOCK = -100, 150, 30, 4


def draw(seed: int, slices: int = 4, size: tuple[int, int] = SIZE) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Hounsfield units and labels, both (slices, height, width); the outermost slice stands for those beyond."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 2, (slices, size[0] // _BLOCK, size[1] // _BLOCK))
    bright = np.kron(blocks, np.ones((1, _BLOCK, _BLOCK), np.int64))
    after = np.concatenate([bright[1:], bright[-1:]])
    ct = np.where(bright, _BRIGHT, _DARK) + rng.normal(0, _NOISE, bright.shape)
    return ct.astype(np.int16), (bright * (1 + after)).astype(np.uint8)


def tree(root: Path, seeds: list[int], slices: int = 4) -> Path:
    """LiTS with these volumes, and one that shows nothing but background."""
    for seed in seeds:
        _save(root, seed, *draw(seed, slices))
    ct, labels = draw(0, slices)
    _save(root, max(seeds) + 1, np.minimum(ct, _DARK).astype(np.int16), labels * np.uint8(0))
    return root


def _save(root: Path, number: int, ct: NDArray[Any], labels: NDArray[Any]) -> None:
    """Files are indexed [i, j, k]: columns, rows, slices."""
    volumes.save(root / f"volume-{number}.nii", ct.transpose(2, 1, 0))
    volumes.save(root / f"segmentation-{number}.nii", labels.transpose(2, 1, 0))


def rows(
    seed: int, split: str = "train", slices: int = 4, scaling: tuple[float, float] = (1.0, 0.0), **changes: Any
) -> list[dict[str, Any]]:
    """A volume's rows of the samples table, as ``toy_training.write`` takes them."""
    ct, labels = draw(seed, slices)
    return [_row(seed, split, k, ct[k], labels[k], scaling) | changes for k in range(slices)]


def _row(
    seed: int, split: str, k: int, ct: NDArray[Any], labels: NDArray[Any], scaling: tuple[float, float]
) -> dict[str, Any]:
    image, image_format = volume.encode_slice(ct)
    at = VolumeSlice(k, 4, (1.0, 1.0, 1.0), (1.0,) * 16, *scaling, ct.dtype.name, b"")
    return {
        "sample_id": f"volume-{seed}/{k:04}",
        "group_id": f"volume-{seed}",
        "split": split,
        "image": image,
        "image_format": image_format,
        "image_uri": f"/ct/volume-{seed}.nii",
        "etag": f"e{seed}",
        "height": ct.shape[0],
        "width": ct.shape[1],
        "channels": 1,
        "exif_orientation": 1,
        "status": "ok",
        "semantic": labels.astype(np.uint16),
        "volume": asdict(at),
    }
