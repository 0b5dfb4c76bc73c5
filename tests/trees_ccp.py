"""A small Clothing Co-Parsing: photos with label maps, photos with tags, the list of labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io

PIXELS = ("0001", "0002", "0003")
TAGS = {"1005": [0, 5, 9, 41], "1006": [0, 58]}


def save_mat(path: Path, **variables: object) -> Path:
    """Write a MATLAB 5 file as the owners did: compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables, do_compression=True)
    return path


def ccp(root: Path) -> Path:
    """Three photos with ``groundtruth``, two with ``tags``."""
    from generators import labels, photo, save

    annotations = root / "annotations"
    for number, stem in enumerate((*PIXELS, *TAGS)):
        save(root / "photos" / f"{stem}.jpg", photo(number, (24, 16)))
        if stem in TAGS:
            save_mat(annotations / "image-level" / f"{stem}.mat", tags=np.array([TAGS[stem]], np.uint8))
        else:
            found = labels(number, tuple(range(59)), (24, 16)).astype(np.uint8)
            save_mat(annotations / "pixel-level" / f"{stem}.mat", groundtruth=found)
    save_mat(root / "label_list.mat", label_list=np.array([["null", "accessories"]], object))
    return root


TREES: dict[str, Callable[[Path], Path]] = {"ccp": ccp}
