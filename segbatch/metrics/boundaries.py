"""How wide the boundary of a mask is.

Source: ``mask_to_boundary`` of github.com/bowenc0221/boundary-iou-api.
"""

import math

from segbatch.errors import ConfigError
from segbatch.metrics.base import MetricOptions

BOUNDARY = 0.02
"""Width of the official boundary, as a part of the image's diagonal."""


def boundary_width(height: int, width: int, part: float = BOUNDARY) -> int:
    """Width in pixels of the boundaries of an image: ``part`` of its diagonal, halves rounded to even, 1 at least.

    >>> boundary_width(480, 640), boundary_width(10, 10)
    (16, 1)
    """
    return max(1, round(part * math.sqrt(height**2 + width**2)))


def boundary_part(options: MetricOptions, usual: float = BOUNDARY) -> float:
    """Width of the boundary as a part of the diagonal: what the caller has set, else the usual one.

    Raises:
        ConfigError: it is not above 0 and at most 1.
    """
    part = usual if options.boundary is None else options.boundary
    if not 0 < part <= 1:
        raise ConfigError(f"the boundary's width is {part}", "give a part of the diagonal, above 0 and at most 1")
    return part
