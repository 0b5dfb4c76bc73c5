"""Sliding windows of InstanceFCN: geometry, matching with objects, assembling, tight boxes, suppression.

Score cell ``j`` is centred on pixel edge ``8 j``: it covers pixels ``8 j - 4`` up to ``8 j + 4``, half a cell lies
outside at the borders, and an image of ``8 n`` pixels has ``n + 1`` cells. A window is as many cells to either side of
the cell that it is centred on; windows reach beyond the borders, where the cells of the border are repeated.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

STRIDE = 8
"""Pixels from one score cell to the next."""

OBJECT = 128 / 224
"""The longer side of the object that fits a window best, as a fraction of the window."""
SHIFT, FAR = 16 / 224, 32 / 224
"""How far off the centre an object still fits, and how far off a window has nothing to do with it; likewise."""
ZOOM, FAR_ZOOM = 2**0.25, 2.0
"""The same for its size, as factors either way."""


class Matching(NamedTuple):
    """What every score cell of an image is the centre of.

    Attributes:
        objects: (rows, columns) int64: the object that the window fits, -1 where there is none.
        negative: (rows, columns) bool: no object is near.
    """

    objects: Tensor
    negative: Tensor


def cells(pixels: int) -> int:
    """Score cells along a side."""
    return -(-pixels // STRIDE) + 1


def match(boxes: Tensor, size: tuple[int, int], window: int) -> Matching:
    """Which windows fit which objects: the definition of DeepMask (Pinheiro, Collobert, Dollar: Learning to Segment
    Object Candidates, NIPS 2015, section 3), whose input of 224 pixels is our window.

    A window fits an object whose box has its centre within 16/224 of the window's side of the window's centre (along
    either axis, and at least half a cell, so that some window can fit) and whose longer side is 128/224 of the
    window's within a factor 2^(1/4). Of several objects the nearest counts. A window is negative where every object is
    32/224 or further off, or a factor of 2 or more too large or small.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels, n >= 0.
        size: (height, width) of the image.
        window: side in cells.
    """
    side = STRIDE * window
    shape = cells(size[0]), cells(size[1])
    if not len(boxes):
        return Matching(torch.full(shape, -1), torch.ones(shape, dtype=torch.bool))
    rows, columns = (STRIDE * torch.arange(n) for n in shape)
    off_y = (rows - (boxes[:, 1, None] + boxes[:, 3, None]) / 2).abs()
    off_x = (columns - (boxes[:, 0, None] + boxes[:, 2, None]) / 2).abs()
    off = torch.maximum(off_y[:, :, None], off_x[:, None, :])
    longer = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    zoom = (longer / (OBJECT * side)).log().abs()[:, None, None]
    fits = (off <= max(SHIFT * side, STRIDE / 2)) & (zoom <= np.log(ZOOM))
    near = (off < max(FAR * side, STRIDE)) & (zoom < np.log(FAR_ZOOM))
    nearest = off.masked_fill(~fits, torch.inf).argmin(0)
    return Matching(torch.where(fits.any(0), nearest, -1), ~near.any(0))


def coverage(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Which fraction of each score cell, as far as it lies in the image, the objects cover.

    Args:
        masks: (n, h, w) 0 or 1, of the image before it was resized.
        size: (height, width) that it was resized to.

    Returns:
        (n, rows, columns) float32.
    """
    down, across = (_shares(p, s) for p, s in zip(masks.shape[1:], size, strict=True))
    return down @ masks.float() @ across.T


def _shares(pixels: int, resized: int) -> Tensor:
    """(cells, pixels): the share of each pixel in each cell; rows add up to 1."""
    centres = STRIDE * torch.arange(cells(resized)) * (pixels / resized)
    half = STRIDE / 2 * (pixels / resized)
    first, last = (centres - half).clamp(0, pixels)[:, None], (centres + half).clamp(0, pixels)[:, None]
    edges = torch.arange(pixels)
    return (torch.minimum(last, edges + 1) - torch.maximum(first, edges)).clamp_min(0) / (last - first)


def inside(centres: Tensor, window: int, cells_of_side: int) -> tuple[Tensor, Tensor]:
    """Cells of windows along one axis.

    Args:
        centres: (n,) cell in the middle.
        window: side in cells, odd.
        cells_of_side: of the image.

    Returns:
        (n, window) the cells, those outside replaced by the border's; (n, window) bool, False for those.
    """
    found = centres[:, None] + torch.arange(window, device=centres.device) - window // 2
    clamped = found.clamp(0, cells_of_side - 1)
    return clamped, clamped == found


def assemble(maps: Tensor, rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Cut windows out of the instance-sensitive score maps, each part out of the map of its position in the window.

    Cell (i, j) of a window belongs to part (i * k // window, j * k // window); there is nothing to be learned in it.

    Args:
        maps: (k * k, h, w) scores, one map for each of k x k parts, row by row.
        rows, columns: (n,) cells that the windows are centred on.
        window: side in cells, odd.

    Returns:
        (n, window, window) scores.
    """
    k = round(len(maps) ** 0.5)
    part = torch.arange(window, device=maps.device) * k // window
    down, _ = inside(rows, window, maps.shape[1])
    across, _ = inside(columns, window, maps.shape[2])
    return maps[part[:, None] * k + part, down[:, :, None], across[:, None, :]]


def tight_boxes(masks: Tensor, threshold: float) -> Tensor:
    """Where bilinearly interpolated masks lie above the threshold; exact, not to whole cells.

    Args:
        masks: (n, m, m) probabilities; beyond the grid they are 0.
        threshold: above 0.

    Returns:
        (n, 4) left, top, right, bottom in cells, edges 0..m; (m, m, 0, 0) where a mask is nowhere above the threshold.
    """
    m = masks.shape[-1]
    turned = masks.transpose(1, 2)
    begins = [_first_crossing(each, threshold) for each in (masks, turned)]
    ends = [m - _first_crossing(each.flip(-1), threshold) for each in (masks, turned)]
    return torch.stack(begins + ends, 1).clamp(0, m)


def _first_crossing(masks: Tensor, threshold: float) -> Tensor:
    """(n,) the least x at which a row rises above the threshold. Between rows the masks are never higher."""
    before = F.pad(masks, (1, 0))[..., :-1]
    at = torch.arange(masks.shape[-1], device=masks.device) + 0.5 - (masks - threshold) / (masks - before)
    return at.masked_fill((masks <= threshold) | (before > threshold), torch.inf).amin((1, 2))


def within(masks: Tensor, boxes: Tensor) -> Tensor:
    """Bilinearly interpolated masks on a grid of as many cells laid over boxes.

    Args:
        masks: (n, m, m) probabilities; beyond the grid they are 0.
        boxes: (n, 4) left, top, right, bottom in cells.

    Returns:
        (n, m, m).
    """
    m = masks.shape[-1]
    at = (torch.arange(m, device=masks.device) + 0.5) / m
    x, y = (boxes[:, i, None] + (boxes[:, i + 2, None] - boxes[:, i, None]) * at for i in (0, 1))
    grid = torch.stack([x[:, None, :].expand(-1, m, -1), y[:, :, None].expand(-1, -1, m)], -1) * (2 / m) - 1
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def suppress(boxes: Tensor, iou: float, most: int) -> Tensor:
    """Greedy suppression: a box that overlaps a better one which stays by more than ``iou`` goes.

    Args:
        boxes: (n, 4) left, top, right, bottom, the best first.
        iou: intersection over union.
        most: so many may stay.

    Returns:
        Indices of those that stay, in order.
    """
    edges = boxes.cpu().numpy()
    areas = (edges[:, 2:] - edges[:, :2]).prod(1)
    kept: list[int] = []
    left = np.arange(len(edges))
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        low, high = np.maximum(edges[best, :2], edges[left, :2]), np.minimum(edges[best, 2:], edges[left, 2:])
        both = (high - low).clip(0).prod(1)
        left = left[both <= iou * (areas[best] + areas[left] - both)]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)
