"""PNG label maps: our decoder against Pillow on every filter and depth, broken files, and what is written."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import png


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def filtered(rows: NDArray[np.uint8], left: int, kinds: list[int]) -> bytes:
    """Rows with the filters of ISO/IEC 15948, 9.2, computed the slow and plain way."""
    out = bytearray()
    above = np.zeros(rows.shape[1], int)
    for row, kind in zip(rows.astype(int), kinds, strict=True):
        before = np.concatenate([np.zeros(left, int), row[:-left]])[: len(row)]
        corner = np.concatenate([np.zeros(left, int), above[:-left]])[: len(row)]
        estimate = before + above - corner
        distances = np.stack([abs(estimate - before), abs(estimate - above), abs(estimate - corner)])
        paeth = np.choose(distances.argmin(axis=0), [before, above, corner])
        guess = [np.zeros_like(row), before, above, (before + above) // 2, paeth][kind]
        out += bytes([kind]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    return bytes(out)


def written(label_map: NDArray[np.unsignedinteger], kinds: list[int], pieces: int = 1) -> bytes:
    height, width = label_map.shape
    bits = 8 * label_map.itemsize
    rows = label_map.astype(f">u{label_map.itemsize}").view(np.uint8).reshape(height, -1)
    packed = zlib.compress(filtered(rows, label_map.itemsize, kinds))
    step = -(-len(packed) // pieces)
    data = [chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step)]
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(data) + chunk(b"IEND", b"")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_filter_and_depth_gives_the_numbers_back(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 11))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16]))
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    seed = data.draw(st.integers(0, 2**32 - 1))
    label_map = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width), dtype, endpoint=True)
    file = written(label_map, kinds, data.draw(st.integers(1, 3)))
    found = png.decode_labels(file)
    assert found is not None and found.dtype == dtype and np.array_equal(found, label_map)
    assert np.array_equal(np.array(Image.open(io.BytesIO(file))), label_map)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_libraries_write_is_read(dtype: type[np.unsignedinteger]) -> None:
    label_map = np.kron(np.arange(12).reshape(3, 4), np.ones((5, 7))).astype(dtype) * (1 if dtype == np.uint8 else 900)
    buffer = io.BytesIO()
    Image.fromarray(label_map).save(buffer, "PNG")
    for file in (buffer.getvalue(), cv2.imencode(".png", label_map)[1].tobytes(), png.encode_grey(label_map)):
        found = png.decode_labels(file)
        assert found is not None and np.array_equal(found, label_map)


def test_palettes_give_their_indices() -> None:
    label_map = np.arange(24, dtype=np.uint8).reshape(4, 6)
    file = png.encode_palette(label_map, {1: (255, 0, 0), 23: (0, 0, 255)})
    found = png.decode_labels(file)
    assert found is not None and np.array_equal(found, label_map)
    assert Image.open(io.BytesIO(file)).convert("RGB").getpixel((5, 3)) == (0, 0, 255)


def test_other_kinds_are_left_to_a_library() -> None:
    for mode in ("1", "RGB", "RGBA", "LA"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, "PNG")
        assert png.decode_labels(buffer.getvalue()) is None
    assert (
        png.decode_labels(b"") is None and png.decode_labels(b"\xff\xd8 no PNG at all, but long enough for one") is None
    )


def test_a_damaged_file_is_never_taken_for_a_good_one() -> None:
    file = written(np.arange(600, dtype=np.uint16).reshape(20, 30), [4] * 20, pieces=2)
    for stop in range(len(file)):
        assert png.decode_labels(file[:stop]) is None
    for place in range(8, len(file)):
        broken = bytearray(file)
        broken[place] ^= 0x10
        assert png.decode_labels(bytes(broken)) is None
    bad_filter = written(np.zeros((2, 3), np.uint8), [0, 0])
    packed = zlib.compress(b"\x07\0\0\0\0\0\0\0")
    start = bad_filter.index(b"IDAT") - 4
    assert png.decode_labels(bad_filter[:start] + chunk(b"IDAT", packed) + chunk(b"IEND", b"")) is None


def test_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a PNG of 8 bits"):
        png.encode_grey(np.array([[256]]), bits=8)
    with pytest.raises(ValueError, match="palette"):
        png.encode_palette(np.array([[256]]), {})


SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_photos_of_every_filter_and_kind_are_equal_to_opencv(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 11))
    kind = data.draw(st.sampled_from(sorted(SAMPLES)))
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    seed = data.draw(st.integers(0, 2**32 - 1))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, SAMPLES[kind]), np.uint8)
    packed = zlib.compress(filtered(pixels.reshape(height, -1), SAMPLES[kind], kinds))
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    found = png.decode_rgb(file)
    assert found is not None and found.flags.c_contiguous and found.flags.writeable
    assert np.array_equal(found, pixels[..., :3] if kind in (2, 6) else pixels[..., [0, 0, 0]])
    theirs = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(found, theirs)


def test_photos_that_a_library_must_read() -> None:
    for mode in ("1", "P", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, "PNG")
        assert png.decode_rgb(buffer.getvalue()) is None
    whole = png.encode_rgb(np.zeros((3, 4, 3), np.uint8))
    interlaced = struct.pack(">IIBBBBB", 4, 3, 8, 2, 0, 0, 1)
    assert png.decode_rgb(whole[:8] + chunk(b"IHDR", interlaced) + whole[33:]) is None
    assert png.decode_rgb(b"") is None


def test_a_damaged_photo_is_never_taken_for_a_good_one() -> None:
    file = png.encode_rgb(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    assert png.decode_rgb(file) is not None
    for stop in range(len(file)):
        assert png.decode_rgb(file[:stop]) is None
    for place in range(8, len(file)):
        broken = bytearray(file)
        broken[place] ^= 0x10
        assert png.decode_rgb(bytes(broken)) is None


@pytest.mark.parametrize("spoilt", ["without its sum", "too long", "too short"])
def test_pixels_of_another_length_are_left_to_a_library(spoilt: str) -> None:
    rows = bytes(4 * 7)  # four rows of a filter byte and two RGB pixels
    packed = {
        "without its sum": zlib.compress(rows)[:-4],
        "too long": zlib.compress(rows + b"\0"),
        "too short": zlib.compress(rows[:-1]),
    }[spoilt]
    header = struct.pack(">IIBBBBB", 2, 4, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    assert png.decode_rgb(start + chunk(b"IDAT", packed) + chunk(b"IEND", b"")) is None
    assert png.decode_rgb(start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")) is not None


def test_real_label_maps(shared_data: Callable[[str], Path]) -> None:
    for path in sorted(shared_data("data/camvid/valannot").glob("*.png"))[:20]:
        found = png.decode_labels(path.read_bytes())
        assert found is not None and np.array_equal(found, np.array(Image.open(path)))
