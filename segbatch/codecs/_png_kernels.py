"""The compiled loop of ``png``; imported on first use, because importing numba takes long."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels


def unfilter(raw: NDArray[np.uint8], left: int, out: NDArray[np.uint8]) -> int:
    """Undo the row filters of PNG (ISO/IEC 15948, 9.2).

    Args:
        raw: one filter byte and the filtered bytes of every row, shape (height, 1 + row bytes).
        left: bytes of a pixel: how far the left neighbour is.
        out: shape (height, row bytes).

    Returns:
        -1, or the first row whose filter byte is none.
    """
    height, stride = out.shape
    above = np.zeros(stride, np.uint8)
    for y in range(height):
        kind, row, line = raw[y, 0], raw[y, 1:], out[y]
        if kind == 0:
            line[:] = row
        elif kind == 1:
            line[:left] = row[:left]
            for x in range(left, stride):
                line[x] = row[x] + line[x - left]
        elif kind == 2:
            for x in range(stride):
                line[x] = row[x] + above[x]
        elif kind == 3:
            for x in range(stride):
                before = line[x - left] if x >= left else np.uint8(0)
                line[x] = row[x] + ((int(before) + int(above[x])) >> 1)
        elif kind == 4:
            for x in range(min(left, stride)):
                line[x] = row[x] + above[x]
            for x in range(left, stride):
                a, b, c = np.int32(line[x - left]), np.int32(above[x]), np.int32(above[x - left])
                pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - c - c)
                line[x] = row[x] + np.uint8(a if pa <= pb and pa <= pc else b if pb <= pc else c)
        else:
            return y
        above = line
    return -1


def _signature(function: Callable[..., Any], item: Any) -> Any:
    filtered = types.Array(item, 2, "C", readonly=True)
    return types.int64(filtered, types.int64, types.Array(item, 2, "C"))


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
