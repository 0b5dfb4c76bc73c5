"""Compiled post-processing: up-sampling, argmax and confidence in one pass over the photo's pixels; masks."""

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs._jit import kept


@kept
def _row_at(scores: NDArray[np.float32], at: float, row: NDArray[np.float32]) -> None:
    """Scores (columns, channels) at the row position ``at``, interpolated linearly."""
    rows, columns, channels = scores.shape
    at = min(max(at, 0.0), rows - 1.0)
    top = int(at)
    bottom, weight = min(top + 1, rows - 1), np.float32(at - top)
    for x in range(columns):
        for c in range(channels):
            row[x, c] = scores[top, x, c] + (scores[bottom, x, c] - scores[top, x, c]) * weight


@kept
def upsample_argmax(
    scores: NDArray[np.float32],
    grid_y: tuple[float, float],
    grid_x: tuple[float, float],
    soft: bool,
    classes: NDArray[np.uint16],
    sums: NDArray[np.float64],
    pixels: NDArray[np.int64],
    certainty: NDArray[np.uint8],
) -> bool:
    """Bilinear interpolation of scores at each output pixel, its winning class and that class's probability.

    It goes along rows of one channel at a time, so that the compiler can use vectors: for 19 channels of 128 x 256 to
    512 x 1024 that takes 17 ms, pixel by pixel 49.

    Args:
        scores: (channels, rows, columns).
        grid_y, grid_x: (step, shift): output pixel ``y`` lies at row ``(y + 0.5) * step - shift``.
        soft: the scores are logits, whose soft-max is the probabilities; else they are in proportion to them.
        classes: (height, width), filled with the winning channel, the first of equals.
        sums: (channels,), added to: probability of the pixels that the channel won.
        pixels: (channels,), added to: how many those are.
        certainty: (height, width), filled with that probability in steps of 1/255; or empty, and left so.

    Returns:
        False when some pixel has no winner, because its scores are not numbers.
    """
    channels, rows, columns = scores.shape
    height, width = classes.shape
    left, right = np.empty(width, np.int64), np.empty(width, np.int64)
    weight = np.empty(width, np.float32)
    for x in range(width):
        at = min(max((x + 0.5) * grid_x[0] - grid_x[1], 0.0), columns - 1.0)
        left[x] = int(at)
        right[x] = min(left[x] + 1, columns - 1)
        weight[x] = np.float32(at - left[x])
    column, lines = np.empty(columns, np.float32), np.empty((channels, width), np.float32)
    best, winner, total = np.empty(width, np.float32), np.empty(width, np.int32), np.empty(width, np.float32)
    power = np.empty(width, np.int32)
    for y in range(height):
        at = min(max((y + 0.5) * grid_y[0] - grid_y[1], 0.0), rows - 1.0)
        top = int(at)
        bottom, share_y = min(top + 1, rows - 1), np.float32(at - top)
        for c in range(channels):
            upper, lower, line = scores[c, top], scores[c, bottom], lines[c]
            for x in range(columns):
                column[x] = upper[x] + (lower[x] - upper[x]) * share_y
            for x in range(width):
                line[x] = column[left[x]] + (column[right[x]] - column[left[x]]) * weight[x]
        line = lines[0]
        for x in range(width):
            best[x], winner[x], total[x] = line[x], 0, 0.0
        for c in range(1, channels):
            line = lines[c]
            for x in range(width):
                larger = line[x] > best[x]
                best[x] = line[x] if larger else best[x]
                winner[x] = c if larger else winner[x]
        for c in range(channels):
            if soft:
                _add_exponentials(lines[c], best, power, total)
            else:
                line = lines[c]
                for x in range(width):
                    total[x] += line[x]
        for x in range(width):
            if soft:
                if not total[x] >= 1.0:
                    return False
                share = 1.0 / total[x]
            else:
                if not total[x] >= 0.0:
                    return False
                share = best[x] / total[x] if total[x] > 0.0 else 1.0 / channels
            classes[y, x] = winner[x]
            sums[winner[x]] += share
            pixels[winner[x]] += 1
            if certainty.size:
                certainty[y, x] = int(255 * share + 0.5)
    return True


@kept
def _add_exponentials(
    line: NDArray[np.float32], best: NDArray[np.float32], power: NDArray[np.int32], total: NDArray[np.float32]
) -> None:
    """Add ``exp(line - best)``, which are at most 1, to ``total``; differences below -87 count as -87.

    ``exp(x) = 2**n * exp(f)`` with ``|f| <= ln(2) / 2``, and a polynomial for the latter: Cephes' ``expf``, right to
    2e-7 of the value. numba would call the library's for one number at a time. Not-a-number stays that.

    Args:
        line: overwritten.
        best: the largest of the channels.
        power: space, as long as the others.
        total: added to.
    """
    scale = power.view(np.float32)
    for x in range(len(line)):
        below = line[x] - best[x]
        below = np.float32(-87.0) if below < np.float32(-87.0) else below
        n = np.floor(below * np.float32(1.4426950408889634) + np.float32(0.5))
        f = below - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4) * f + np.float32(1.3981999507e-3)
        p = p * f + np.float32(8.3334519073e-3)
        p = p * f + np.float32(4.1665795894e-2)
        p = p * f + np.float32(1.6666665459e-1)
        p = p * f + np.float32(5.0000001201e-1)
        line[x] = p * f * f + f + np.float32(1.0)
        power[x] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for x in range(len(line)):
        total[x] += line[x] * scale[x]


@kept
def add_probabilities(
    scores: NDArray[np.float32],
    grid_y: tuple[float, float],
    grid_x: tuple[float, float],
    soft: bool,
    mirrored: bool,
    weight: float,
    canvas: NDArray[np.float32],
) -> bool:
    """Add ``weight`` times the class probabilities at each output pixel; arguments as ``upsample_argmax``.

    Args:
        mirrored: the scores are those of the photo mirrored left to right.
        canvas: (height, width, channels), added to.

    Returns:
        False when some pixel's scores are not numbers.
    """
    _, columns, channels = scores.shape
    height, width, _ = canvas.shape
    row = np.empty((columns, channels), np.float32)
    here = np.empty(channels, np.float32)
    for y in range(height):
        _row_at(scores, (y + 0.5) * grid_y[0] - grid_y[1], row)
        for x in range(width):
            at = min(max((x + 0.5) * grid_x[0] - grid_x[1], 0.0), columns - 1.0)
            left = int(at)
            right, share = min(left + 1, columns - 1), np.float32(at - left)
            best, total = np.float32(-np.inf), np.float32(0.0)
            for c in range(channels):
                here[c] = row[left, c] + (row[right, c] - row[left, c]) * share
                best = max(best, here[c])
            for c in range(channels):
                if soft:
                    here[c] = np.exp(here[c] - best)
                total += here[c]
            if not (total > 0.0 and total < np.inf):
                return False
            factor = np.float32(weight) / total
            target = width - 1 - x if mirrored else x
            for c in range(channels):
                canvas[y, target, c] += here[c] * factor
    return True


@kept
def winners(
    canvas: NDArray[np.float32],
    classes: NDArray[np.uint16],
    sums: NDArray[np.float64],
    pixels: NDArray[np.int64],
    certainty: NDArray[np.uint8],
) -> None:
    """The best class of each pixel of a canvas of probabilities; the other arguments as above."""
    height, width, channels = canvas.shape
    for y in range(height):
        for x in range(width):
            best, winner, total = np.float32(-1.0), 0, np.float32(0.0)
            for c in range(channels):
                total += canvas[y, x, c]
                if canvas[y, x, c] > best:
                    best, winner = canvas[y, x, c], c
            classes[y, x] = winner
            sums[winner] += best / total
            pixels[winner] += 1
            if certainty.size:
                certainty[y, x] = int(255 * (best / total) + 0.5)


@kept
def suppress(boxes: NDArray[np.float32], classes: NDArray[np.int64], iou: float) -> NDArray[np.bool_]:
    """Non-maximum suppression within each class.

    Args:
        boxes: (n, 4) left, top, right, bottom; the best first.
        classes: (n,).
        iou: boxes that overlap a better one of their class by more than this are dropped.

    Returns:
        (n,) whether the box stays.
    """
    count = len(boxes)
    stays = np.ones(count, np.bool_)
    for i in range(count):
        if not stays[i]:
            continue
        own = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])
        for j in range(i + 1, count):
            if not stays[j] or classes[i] != classes[j]:
                continue
            wide = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            tall = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            if wide <= 0 or tall <= 0:
                continue
            both = wide * tall
            other = (boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1])
            if both > iou * (own + other - both):
                stays[j] = False
    return stays


@kept
def paste_runs(
    mask: NDArray[np.float32], box: NDArray[np.int64], height: int, width: int, threshold: float
) -> NDArray[np.uint32]:
    """Run lengths, down the columns, of a mask of m x m probabilities that is stretched over a box of the photo.

    No pixel outside the box is touched, and none is stored. The arithmetic is torchvision's ``paste_mask_in_image``.

    Args:
        mask: (m, m) probabilities.
        box: left, top, right, bottom, both ends included; may reach beyond the photo.
        height, width: of the photo.
        threshold: above it a pixel belongs to the object.

    Returns:
        Lengths of alternating runs, background first; they add up to ``height * width``.
    """
    side = mask.shape[0]
    wide, tall = max(box[2] - box[0] + 1, 1), max(box[3] - box[1] + 1, 1)
    left, right = max(box[0], 0), min(box[2] + 1, width)
    top, bottom = max(box[1], 0), min(box[3] + 1, height)
    step_x, step_y = np.float32(side) / np.float32(wide), np.float32(side) / np.float32(tall)
    upper = np.empty(max(bottom - top, 0), np.int64)
    share = np.empty(max(bottom - top, 0), np.float32)
    for y in range(top, bottom):
        at = max((np.float32(y - box[1]) + np.float32(0.5)) * step_y - np.float32(0.5), np.float32(0.0))
        upper[y - top] = min(int(at), side - 1)
        share[y - top] = at - np.float32(upper[y - top])
    whole_columns = top == 0 and bottom == height
    runs = np.empty(16, np.uint32)
    count, last, inside = 0, 0, False
    column = np.empty(side, np.float32)
    for x in range(left, right):
        at = max((np.float32(x - box[0]) + np.float32(0.5)) * step_x - np.float32(0.5), np.float32(0.0))
        near = min(int(at), side - 1)
        far, weight = min(near + 1, side - 1), at - np.float32(near)
        for j in range(side):
            column[j] = (np.float32(1.0) - weight) * mask[j, near] + weight * mask[j, far]
        if count + (bottom - top) + 3 > len(runs):
            runs = np.append(runs, np.empty(len(runs) + bottom - top + 3, np.uint32))
        for y in range(top, bottom):
            j, part = upper[y - top], share[y - top]
            value = (np.float32(1.0) - part) * column[j] + part * column[min(j + 1, side - 1)]
            if (value > threshold) != inside:
                runs[count] = x * height + y - last
                count, last, inside = count + 1, x * height + y, not inside
        if inside and not whole_columns:
            runs[count] = x * height + bottom - last
            count, last, inside = count + 1, x * height + bottom, False
    if last < height * width:
        runs[count] = height * width - last
        count += 1
    return runs[:count]


@kept
def claim(index_map: NDArray[np.uint16], runs: NDArray[np.uint32], value: int, most_taken: float) -> int:
    """Give the free pixels of an object to it, unless too many of its pixels are taken.

    Args:
        index_map: (width * height,) down the columns; 0 where a pixel is free.
        runs: of the object's mask, background first.
        value: what its pixels become.
        most_taken: the largest fraction of its pixels that may be taken already.

    Returns:
        How many pixels it got: 0 when it got none.
    """
    area, taken, at = 0, 0, 0
    for k in range(len(runs)):
        if k % 2:
            area += runs[k]
            for p in range(at, at + runs[k]):
                taken += index_map[p] != 0
        at += runs[k]
    if area == 0 or taken > most_taken * area:
        return 0
    at = 0
    for k in range(len(runs)):
        if k % 2:
            for p in range(at, at + runs[k]):
                if index_map[p] == 0:
                    index_map[p] = value
        at += runs[k]
    return area - taken
