"""Compiled post-processing: up-sampling, argmax and confidence in one pass over the photo's pixels."""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True, error_model="numpy")
def upsample_argmax(
    logits: NDArray[np.float32],
    step_y: float,
    step_x: float,
    classes: NDArray[np.uint16],
    sums: NDArray[np.float64],
    pixels: NDArray[np.int64],
) -> bool:
    """Bilinear interpolation of logits at each output pixel, its winning class and that class's probability.

    Args:
        logits: (rows, columns, channels).
        step_y, step_x: logit rows and columns per output pixel; pixel ``y`` lies at ``(y + 0.5) * step_y - 0.5``.
        classes: (height, width), filled with the winning channel, the first of equals.
        sums: (channels,), added to: soft-max probability of the pixels that the channel won.
        pixels: (channels,), added to: how many those are.

    Returns:
        False when some pixel has no winner, because its logits are not numbers.
    """
    rows, columns, channels = logits.shape
    height, width = classes.shape
    row = np.empty((columns, channels), np.float32)
    here = np.empty(channels, np.float32)
    for y in range(height):
        at = min(max((y + 0.5) * step_y - 0.5, 0.0), rows - 1.0)
        top = int(at)
        bottom, weight = min(top + 1, rows - 1), np.float32(at - top)
        for x in range(columns):
            for c in range(channels):
                row[x, c] = logits[top, x, c] + (logits[bottom, x, c] - logits[top, x, c]) * weight
        for x in range(width):
            at = min(max((x + 0.5) * step_x - 0.5, 0.0), columns - 1.0)
            left = int(at)
            right, weight = min(left + 1, columns - 1), np.float32(at - left)
            best, winner = np.float32(-np.inf), -1
            for c in range(channels):
                here[c] = row[left, c] + (row[right, c] - row[left, c]) * weight
                if here[c] > best:
                    best, winner = here[c], c
            total = np.float32(0.0)
            for c in range(channels):
                total += np.exp(here[c] - best)
            if winner < 0 or not total >= 1.0:
                return False
            classes[y, x] = winner
            sums[winner] += 1.0 / total
            pixels[winner] += 1
    return True
