"""Predictions of an upright photo, turned back onto its stored pixel grid."""

from dataclasses import replace

from segbatch.codecs import photo, rle
from segbatch.records import Instance, Prediction, Segment

Box = tuple[float, float, float, float]


def turn_back(prediction: Prediction, orientation: int, height: int, width: int) -> Prediction:
    """The prediction on the stored grid.

    Args:
        prediction: of the upright photo.
        orientation: EXIF orientation 1..8 of the stored photo.
        height, width: of the stored photo.
    """
    if orientation == 1:
        return prediction
    upright = (width, height) if orientation >= 5 else (height, width)
    semantic, panoptic, confidence = (
        m if m is None else photo.stored(m, orientation)
        for m in (prediction.semantic, prediction.panoptic, prediction.confidence)
    )
    instances, segments = prediction.instances, prediction.segments
    return replace(
        prediction,
        semantic=semantic,
        panoptic=panoptic,
        confidence=confidence,
        instances=instances and tuple(_instance(i, orientation, upright) for i in instances),
        segments=segments and tuple(_segment(s, orientation, upright) for s in segments),
    )


def _instance(instance: Instance, orientation: int, upright: tuple[int, int]) -> Instance:
    mask = photo.stored(rle.decode(instance.counts, *upright), orientation)
    return replace(instance, counts=rle.encode(mask), bbox_xywh=stored_box(instance.bbox_xywh, orientation, upright))


def _segment(segment: Segment, orientation: int, upright: tuple[int, int]) -> Segment:
    return replace(segment, bbox_xywh=stored_box(segment.bbox_xywh, orientation, upright))


def stored_box(box: Box, orientation: int, upright: tuple[int, int]) -> Box:
    """A box (left, top, width, height) of the upright photo on the stored grid.

    Args:
        box: on the upright photo.
        orientation: EXIF orientation 1..8.
        upright: (height, width) of the upright photo.
    """
    height, width = upright
    left, top, wide, tall = box
    from_right, from_bottom = width - left - wide, height - top - tall
    across = {1: left, 2: from_right, 3: from_right, 4: left, 5: top, 6: top, 7: from_bottom, 8: from_bottom}
    down = {1: top, 2: top, 3: from_bottom, 4: from_bottom, 5: left, 6: from_right, 7: from_right, 8: left}
    size = (tall, wide) if orientation >= 5 else (wide, tall)
    return across[orientation], down[orientation], *size
