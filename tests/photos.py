"""Good and bad photos, drawn from nothing, and what the masks table says of them."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segbatch import storage, tables

SIZE = (24, 32)
"""Height and width."""

MARKER = (255, 0, 255)


def jpeg(seed: int = 0, marker: tuple[int, int, int] | None = None) -> bytes:
    """A small colour JPEG; with a ``marker`` its first 16 x 16 pixels have that colour, otherwise they are dark."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    pixels[:16, :16] = marker or (10, 20, 30)
    return encoded(Image.fromarray(pixels), "JPEG", quality=95)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder(root: Path, count: int, first: int = 0) -> Path:
    """``count`` good photos ``photo-0000.jpg`` ..."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (root / f"photo-{i:04d}.jpg").write_bytes(jpeg(i))
    return root


def two_colors(width: int = 32, height: int = 24) -> Image.Image:
    """Red on the left half, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (250, 0, 0)
    pixels[:, width // 2 :] = (0, 0, 250)
    return Image.fromarray(pixels)


def odd_ones(root: Path) -> dict[str, str]:
    """Every kind of odd photo; returns the status that each must get, by path below ``root``."""
    grey16 = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn of 90 degrees clockwise
    files = {
        "truncated.jpg": (jpeg(1)[:-200], "truncated"),
        "empty.jpg": (b"", "empty-file"),
        "notes.jpg": (b"shopping list: milk, eggs, bread\n" * 20, "not-an-image"),
        "deep.png": (encoded(grey16, "PNG"), "ok"),
        "grey.jpg": (encoded(Image.fromarray(np.full(SIZE, 200, np.uint8)), "JPEG"), "ok"),
        "cmyk.jpg": (encoded(two_colors().convert("CMYK"), "JPEG"), "ok"),
        "turned.jpg": (encoded(two_colors(), "JPEG", quality=95, exif=exif), "ok"),
        "dot.png": (encoded(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG"), "ok"),
        "left/same.jpg": (jpeg(2), "ok"),
        "right/same.jpg": (jpeg(3), "ok"),
    }
    for name, (data, _) in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {name: status for name, (_, status) in files.items()}


def rows(out: Path, columns: tuple[str, ...] = ("sample_id", "status", "error", "etag")) -> dict[str, dict[str, Any]]:
    """The masks table by sample id; no id may be there twice."""
    found = [row for batch in tables.scan(str(out), "masks", columns) for row in batch.to_pylist()]
    twice = [i for i, n in Counter(r["sample_id"] for r in found).items() if n > 1]
    assert not twice, f"more than one row: {twice}"
    return {row["sample_id"]: row for row in found}


def sample_ids(root: Path) -> set[str]:
    """The ids of all photos below a folder."""
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".jpg", ".png")}


def part_times(out: Path) -> dict[str, int]:
    """When each part file was written, in ns, by name."""
    return {Path(p.uri).name: Path(p.uri).stat().st_mtime_ns for p in tables.parts(storage.join(str(out), "masks"))}


def assert_clean(out: Path) -> None:
    """Nothing in a run root but whole files: every part is readable and no temporary file is left."""
    assert [p for p in out.rglob("*") if p.name.endswith(".tmp")] == []
    for part in tables.parts(str(out / "masks")):
        assert tables.count_rows(part.uri, "masks") == int(tables.footer(part.uri)["segbatch.rows"])
