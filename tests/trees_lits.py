"""A small LiTS: two training batches, one of them gzipped, and the test volumes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import volumes

SHAPES = {0: (12, 9, 5), 1: (10, 8, 3), 28: (11, 7, 4), 29: (8, 8, 1)}
"""Voxels along i, j and k of the training volumes; the last has a single slice."""

_AFFINES = ["LPS", "RAS", "LAS", "LPS oblique"]


def lits(root: Path) -> Path:
    """``Training Batch 1`` (.nii), ``Training Batch 2`` (.nii.gz) and ``LITS-Challenge-Test-Data``.

    The label types differ, as in the original.
    """
    for place, (number, shape) in enumerate(SHAPES.items()):
        batch, suffix = ("Training Batch 1", "nii") if number < 28 else ("Training Batch 2", "nii.gz")
        affine = volumes.AFFINES[_AFFINES[place]]
        ct = np.clip(volumes.ct(shape, seed=number), -1024, 3071)
        labels = volumes.labels(shape, ("uint8", "int16", "float32", "uint8")[place])
        volumes.save(root / batch / f"volume-{number}.{suffix}", ct, affine)
        volumes.save(root / batch / f"segmentation-{number}.{suffix}", labels, affine)
    for number in range(2):
        path = root / "LITS-Challenge-Test-Data" / f"test-volume-{number}.nii"
        volumes.save(path, volumes.ct((9, 7, 3), seed=100 + number))
    return root


TREES: dict[str, Callable[[Path], Path]] = {"lits": lits}
