"""Weights of the pixels between objects, which a network has to learn to keep apart.

Source: Ronneberger, Fischer, Brox, U-Net, MICCAI 2015, section 3, equation 2.
"""

import numpy as np
from numpy.typing import NDArray

_REACH = 6
"""Sigmas; farther from an object its part in the weight is below 2e-8 of the greatest."""


def separation_weights(objects: NDArray[np.int32], weight: float, sigma: float) -> NDArray[np.float32]:
    """``weight * exp(-(d1 + d2)^2 / (2 sigma^2))``: what a pixel counts for on top of its class's weight.

    d1 and d2 are the distances, between pixel centres, to the nearest and the second nearest object; they are 0 inside
    an object. Where fewer than two objects are near, the result is 0.

    Args:
        objects: (height, width), another number for every object, 0 for none.
        weight: the greatest value (the paper: 10).
        sigma: in pixels (the paper: about 5).

    Returns:
        (height, width).
    """
    from scipy import ndimage  # OpenCV's distances differ in the last bit from one memory address to another

    first, second = (np.full(objects.shape, np.inf) for _ in range(2))
    reach = int(np.ceil(_REACH * sigma))
    for number, box in enumerate(ndimage.find_objects(objects), 1):
        if box is None:
            continue
        near = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
        away = ndimage.distance_transform_edt(objects[near] != number)
        second[near] = np.minimum(second[near], np.maximum(first[near], away))
        first[near] = np.minimum(first[near], away)
    weights: NDArray[np.float32] = (weight * np.exp(-((first + second) ** 2) / (2 * sigma**2))).astype(np.float32)
    return weights
