"""What a user may ask of a model's use: tiles, views, and which detections count."""

import dataclasses
from typing import Any, Self

from pydantic import Field, model_validator

from segbatch.config import Config
from segbatch.models.base import Choice

_LIMITS = ("min_score", "nms_iou", "top_k", "mask_threshold", "stuff_area")


class InferenceOptions(Config):
    """Part of what decides a run's output.

    Attributes:
        tile: photos larger than this are cut into tiles of tile x tile pixels; 0 feeds them whole.
        overlap: pixels that neighbouring tiles share. The outer quarter of it is context alone, over the middle half
            one tile fades into the other: so a network that sees no further than ``overlap / 4`` pixels around a
            pixel gives what it gives for the whole photo.
        scales: sizes that the photo is fed in, relative to what the model wants; the results are averaged.
        flip: the photo is fed mirrored as well.
        min_score, nms_iou, top_k, mask_threshold, stuff_area: see ``Choice``; None leaves the model's own.
        confidence: keep the probability of the winning class at every pixel of a label map, in steps of 1/255.
    """

    tile: int = Field(default=0, ge=0)
    overlap: int = Field(default=128, ge=0)
    scales: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    flip: bool = False
    min_score: float | None = Field(default=None, ge=0, le=1)
    nms_iou: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    mask_threshold: float | None = Field(default=None, ge=0, le=1)
    stuff_area: int | None = Field(default=None, ge=0)
    confidence: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tile and self.tile < 2 * self.overlap:
            raise ValueError(f"tile {self.tile} is less than twice the overlap {self.overlap}")
        if any(not 0.1 <= s <= 10 for s in self.scales):
            raise ValueError(f"scales {self.scales} do not lie in 0.1..10")
        return self

    @property
    def several_views(self) -> bool:
        """Whether a photo is fed more than once, or in pieces, or not at its usual size."""
        return bool(self.tile) or self.flip or self.scales != (1.0,)

    @property
    def said(self) -> dict[str, Any]:
        """What is not as usual, as JSON."""
        usual = InferenceOptions().model_dump(mode="json")
        return {k: v for k, v in self.model_dump(mode="json").items() if v != usual[k]}

    @property
    def limits(self) -> dict[str, Any]:
        """What the user said of ``Choice``."""
        said = {name: getattr(self, name) for name in _LIMITS}
        return {name: value for name, value in said.items() if value is not None}

    def choice(self, own: Choice) -> Choice:
        """The model's own choice with what the user said in its place."""
        return dataclasses.replace(own, **self.limits, confidence=self.confidence)
