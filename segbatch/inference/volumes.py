"""CT slices as they stand in a samples table, each with its neighbours: what prediction and training show a network.

Where a volume ends, or the part of the table that it lies in, the outermost slice stands for those beyond.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import volume
from segbatch.errors import DataError
from segbatch.records import OK

COLUMNS = (
    *("group_id", "image", "image_format", "status", "height", "width"),
    *("volume.index", "volume.dtype", "volume.slope", "volume.intercept"),
)
"""What ``slice_of`` looks at in a row of the samples table."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice: encoded pixels, how to read them, and where they lie in their volume."""

    group_id: str | None
    data: bytes
    format: str
    height: int
    width: int
    index: int
    dtype: str
    slope: float
    intercept: float

    def hounsfield(self, uri: str) -> NDArray[np.float32]:
        """Its values (height, width).

        Raises:
            DataError: see ``volume.decode_slice``.
        """
        pixels = volume.decode_slice(self.data, self.format, self.height, self.width, self.dtype, uri)
        return volume.to_hounsfield(pixels, self.slope, self.intercept)


def slice_of(row: Mapping[str, Any]) -> Slice | None:
    """The slice of a row with ``COLUMNS``; None where it is not ok, a photo, or without pixels."""
    at = row["volume"]
    if at is None or row["image"] is None or row["status"] != OK:
        return None
    place = row["group_id"], row["image"], row["image_format"], row["height"], row["width"]
    return Slice(*place, at["index"], at["dtype"], at["slope"], at["intercept"])


def with_neighbours(own: Slice, window: Sequence[Slice | None]) -> tuple[Slice, ...]:
    """A slice and its neighbours, in the order of the volume.

    Args:
        own: the slice.
        window: the rows around it, an odd number, its own in the middle; None for a row that is no slice.
    """
    half = len(window) // 2
    near = [own]
    for step in (-1, 1):
        last = own
        for distance in range(1, half + 1):
            there = window[half + step * distance]
            if there and (there.group_id, there.index) == (own.group_id, own.index + step * distance):
                last = there
            near.insert(0, last) if step < 0 else near.append(last)
    return tuple(near)


def stack(slices: Sequence[Slice], uri: str) -> NDArray[np.float32]:
    """The slices as channels (height, width, slices), in Hounsfield units.

    Args:
        slices: see ``with_neighbours``.
        uri: of the volume, named in errors.

    Raises:
        DataError: one is broken, or of another size.
    """
    sizes = {(s.height, s.width) for s in slices}
    if len(sizes) > 1:
        problem = f"neighbouring slices have the sizes {' and '.join(f'{w}x{h}' for h, w in sorted(sizes))}"
        raise DataError(problem, "ingest the volume again", "size-mismatch", uri)
    return np.stack([s.hounsfield(uri) for s in slices], -1)
