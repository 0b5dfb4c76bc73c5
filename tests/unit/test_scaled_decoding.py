"""Runs that decode large JPEGs at a fraction of their size: the same rows but for a few pixels; the config says it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import photos
import pytest
from numpy.typing import NDArray
from PIL import Image

from segbatch import api, tables
from segbatch.codecs import photo
from segbatch.config import EngineConfig, ExecutionConfig, RunOptions
from segbatch.errors import ConfigError
from segbatch.models.base import InputSpec

SIZES = ((480, 640), (640, 480), (30, 40))


@dataclass(frozen=True)
class Small(doubles.FreeModel):
    """Is fed 60 x 60; ``resize`` "none" feeds photos as they are."""

    resize: Any = "stretch"

    def describe(self) -> Any:
        return replace(doubles.SPEC, input=InputSpec(60, 60, self.resize, layout="nhwc", dtype="uint8"))

    def load(self, threads: int) -> Any:
        loaded = doubles.DoubleSegmenter(self)
        loaded.spec = self.describe()
        return loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Large photos, one of them turned, and a small one."""
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    for number, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        rgb = np.stack([255 * (x > width / 3), 0 * x, 255 * (y > height / 2)], -1).astype(np.uint8)
        exif[0x0112] = (1, 6, 1)[number]
        data = photos.encoded(Image.fromarray(rgb), "JPEG", quality=95, exif=exif)
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(data)
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of all decoded photos."""
    shapes: list[tuple[int, ...]] = []
    whole = photo.decode

    def noting(*arguments: Any, **named: Any) -> tuple[NDArray[np.uint8], photo.PhotoInfo]:
        pixels, info = whole(*arguments, **named)
        shapes.append(pixels.shape[:2])
        return pixels, info

    monkeypatch.setattr(photo, "decode", noting)
    return shapes


def predict(model: Any, folder: Path, out: Path, decode: Any = None) -> list[dict[str, Any]]:
    wanted = ExecutionConfig(decode=decode) if decode else ExecutionConfig()
    options = RunOptions(engine=EngineConfig(kind="inline", threads=1), inference=wanted)
    api.predict(model, str(folder), str(out), options=options)
    columns = ["sample_id", "status", "height", "width", "semantic"]
    return [row for b in tables.scan(str(out), "masks", columns) for row in b.to_pylist()]


def label_map(row: dict[str, Any]) -> NDArray[np.uint16]:
    values, lengths = zip(*((r["value"], r["length"]) for r in row["semantic"]), strict=True)
    return np.repeat(values, lengths).reshape(row["height"], row["width"])


def test_masks_lie_on_the_whole_photo(folder: Path, tmp_path: Path, decoded: list[tuple[int, ...]]) -> None:
    full = predict(Small(), folder, tmp_path / "full")
    assert decoded == list(SIZES)
    decoded.clear()
    scaled = predict(Small(), folder, tmp_path / "scaled", "scaled")
    assert decoded == [(120, 160), (160, 120), (30, 40)]
    for ours, theirs in zip(scaled, full, strict=True):
        assert [ours[k] for k in ("sample_id", "status", "height", "width")] == [
            theirs[k] for k in ("sample_id", "status", "height", "width")
        ]
        assert (label_map(ours) == label_map(theirs)).mean() > 0.98
    assert scaled[2] == full[2]


def test_a_model_fed_whole_photos_gets_them(folder: Path, tmp_path: Path, decoded: list[tuple[int, ...]]) -> None:
    predict(Small(resize="none"), folder, tmp_path / "out", "scaled")
    assert decoded == list(SIZES)


def test_it_decides_the_output(folder: Path, tmp_path: Path, decoded: list[tuple[int, ...]]) -> None:
    def config(out: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / out / ".segbatch/config.json").read_text())["config"]
        return found

    predict(Small(), folder, tmp_path / "full")
    predict(Small(), folder, tmp_path / "scaled", "scaled")
    assert config("scaled") == {**config("full"), "inference.decode": "scaled"}
    with pytest.raises(ConfigError, match="decode"):
        predict(Small(), folder, tmp_path / "full", "scaled")
    decoded.clear()
    (folder / "3.jpg").write_bytes((folder / "0.jpg").read_bytes())
    assert len(predict(Small(), folder, tmp_path / "scaled")) == 4  # who says nothing goes on as it was begun
    assert decoded == [(120, 160)]
