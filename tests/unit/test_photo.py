"""Photos: equal to Pillow where Pillow is right, upright and back exactly, and every failure a DataError."""

import contextlib
import io
import pickle
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from segbatch.codecs import photo
from segbatch.errors import DataError
from segbatch.inference.pipeline import Predictor, Prepared
from segbatch.models.base import Geometry, InputSpec, ModelSpec
from segbatch.records import ClassInfo, ClassTable
from segbatch.stages.inputs import Input, decoded, fed_of, on_the_photo

HEIGHT, WIDTH = 23, 37
THREE = ClassTable(tuple(ClassInfo(i, f"c{i}") for i in range(3)))


def picture(mode: str = "RGB") -> Image.Image:
    """A smooth picture with some noise, in any mode."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rgba = np.stack([6 * x, 10 * y, 3 * (x + y), 255 - 5 * x], axis=-1) + rng.integers(0, 9, (HEIGHT, WIDTH, 1))
    image = Image.fromarray(np.clip(rgba, 0, 255).astype(np.uint8))
    return image.convert("RGB").convert(mode) if mode in ("P", "1", "CMYK") else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """The reference."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def chunk(name: bytes, content: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, depth: int, kind: int, *chunks: bytes) -> bytes:
    """A PNG put together by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def code_of(data: bytes, **options: Any) -> str:
    """The code of the error that decoding must raise."""
    with pytest.raises(DataError) as caught:
        photo.decode(data, "s3://photos/1", **options)
    assert caught.value.uri == "s3://photos/1"
    assert caught.value.problem and caught.value.fix
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value.code


LOSSLESS = [
    *(("PNG", m, {}) for m in ("1", "L", "LA", "P", "RGB", "RGBA")),
    ("PNG", "P", {"transparency": b"\0\x80"}),
    ("PNG", "P", {"bits": 4}),
    ("PNG", "P", {"bits": 2}),
    *(("BMP", m, {}) for m in ("1", "L", "P", "RGB", "RGBA")),
    *(("TIFF", m, {}) for m in ("1", "L", "P", "RGB", "RGBA", "CMYK")),
    *(("TIFF", "RGB", {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    *(("WEBP", m, {"lossless": True}) for m in ("RGB", "RGBA")),
    ("WEBP", "RGB", {}),
    ("GIF", "P", {}),
    ("GIF", "RGB", {}),
]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # the reference's
@pytest.mark.parametrize(("kind", "mode", "options"), LOSSLESS)
def test_equal_to_pillow(kind: str, mode: str, options: dict[str, Any]) -> None:
    image = picture(mode)
    if options.get("bits"):
        image = picture("RGB").quantize(2 ** options["bits"])
    data = encoded(image, kind, **options)
    rgb, info = photo.decode(data)
    assert rgb.dtype == np.uint8
    assert rgb.shape == (HEIGHT, WIDTH, 3)
    assert rgb.flags.c_contiguous and rgb.flags.writeable
    np.testing.assert_array_equal(rgb, by_pillow(data))
    assert info == photo.probe(data) == photo.inspect(data)
    assert (info.format, info.height, info.width, info.exif_orientation) == (kind.lower(), HEIGHT, WIDTH, 1)
    if kind == "PNG":
        assert info.channels == len(image.getbands())


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_jpeg_is_within_two_levels_of_pillow(mode: str, options: dict[str, Any]) -> None:
    data = encoded(picture(mode), "JPEG", quality=90, **options)
    rgb, info = photo.decode(data)
    assert np.abs(rgb.astype(int) - by_pillow(data)).max() <= 2
    assert info == photo.PhotoInfo("jpeg", HEIGHT, WIDTH, len(mode), 8, 1)


def test_ycck_jpeg() -> None:
    # Pillow writes plain CMYK; with transform 2 in its Adobe segment the same samples mean YCCK.
    data = bytearray(encoded(picture("CMYK"), "JPEG", quality=95))
    adobe = data.index(b"Adobe")
    data[adobe + 11] = 2
    rgb, _ = photo.decode(bytes(data))
    assert np.abs(rgb.astype(int) - by_pillow(bytes(data))).max() <= 2


def test_16_bit_samples_are_rounded() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    wanted = np.round(samples / 257.0).astype(np.uint8)
    for channels, kind in ((1, 0), (2, 4), (3, 2), (4, 6)):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples[..., :channels])
        rgb, info = photo.decode(png_of(WIDTH, HEIGHT, 16, kind, chunk(b"IDAT", zlib.compress(rows))))
        np.testing.assert_array_equal(rgb, wanted[..., :3] if channels > 2 else wanted[..., [0, 0, 0]])
        assert (info.bit_depth, info.channels) == (16, channels)
    rgb, info = photo.decode(encoded(Image.fromarray(samples[..., 0]), "TIFF"))
    np.testing.assert_array_equal(rgb, wanted[..., [0, 0, 0]])
    assert info.bit_depth == 16


def test_odd_metadata_is_no_obstacle(capfd: pytest.CaptureFixture[str]) -> None:
    rows = chunk(b"IDAT", zlib.compress(b"\0\x11\x22\x33"))
    odd = chunk(b"zTXt", b"broken"), chunk(b"iCCP", b"not a profile"), chunk(b"eXIf", b"MM\0*nonsense")
    rgb, info = photo.decode(png_of(1, 1, 8, 2, *odd, rows))
    assert rgb.tolist() == [[[0x11, 0x22, 0x33]]]
    assert info.exif_orientation == 1
    jpeg = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert photo.decode(jpeg)[1].exif_orientation == 1
        broken_tag = bytearray(encoded(picture(), "TIFF", software="segbatch" * 9))
        tag = broken_tag.index(struct.pack("<HH", 305, 2))
        broken_tag[tag + 8 : tag + 12] = b"\xff\xff\xff\x7f"
        np.testing.assert_array_equal(photo.decode(bytes(broken_tag))[0], np.asarray(picture()))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_stored_grid_and_the_upright_view(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    rgb, info = photo.decode(data)
    assert info == photo.probe(data) == photo.inspect(data)
    assert (info.exif_orientation, info.height, info.width) == (orientation, HEIGHT, WIDTH)
    plain = encoded(picture(), "JPEG" if kind == "JPEG" else "PNG")
    np.testing.assert_array_equal(rgb, photo.decode(plain)[0])
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.abs(photo.upright(rgb, orientation).astype(int) - wanted).max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "i8", "?", "f4"])
def test_stored_is_the_inverse_of_upright(orientation: int, dtype: str) -> None:
    for shape in ((4, 7), (4, 7, 3), (4, 7, 2), (0, 3), (1, 1)):
        array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        turned = photo.upright(array, orientation)
        assert turned.flags.c_contiguous and turned.dtype == array.dtype
        assert turned.shape[:2] == (shape[:2] if orientation < 5 else shape[1::-1])
        np.testing.assert_array_equal(photo.stored(turned, orientation), array)
        np.testing.assert_array_equal(turned, photo.upright(array.astype("i8"), orientation))


def test_an_unknown_orientation_is_refused() -> None:
    for orientation in (0, 9):
        with pytest.raises(ValueError, match=r"outside 1\.\.8"):
            photo.upright(np.zeros((2, 2)), orientation)


def cut_points(data: bytes) -> Iterator[int]:
    """All near both ends, and many between."""
    ends = 80
    yield from range(1, min(ends, len(data)))
    yield from range(ends, len(data) - ends, max(1, len(data) // 150))
    yield from range(max(len(data) - ends, ends), len(data))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *(("JPEG", m, {"progressive": p}) for m in ("L", "RGB", "CMYK") for p in (False, True)),
        ("JPEG", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0" + b"thumbnail\xff\xd9" * 3}),
        *(("PNG", m, {}) for m in ("1", "P", "RGB")),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_a_cut_file_is_detected_wherever_it_is_cut(kind: str, mode: str, options: dict[str, Any]) -> None:
    data = encoded(picture(mode), kind, **options)
    photo.decode(data)
    wrong = {n: code for n in cut_points(data) if (code := code_of(data[:n])) != "truncated"}
    assert not wrong


@pytest.mark.parametrize(
    ("kind", "mode", "spare"), [("BMP", "P", 3), ("BMP", "RGB", 3), ("TIFF", "RGB", 0), ("GIF", "P", 2)]
)
def test_a_cut_bmp_gif_or_tiff_is_detected_while_pixels_are_missing(kind: str, mode: str, spare: int) -> None:
    data = encoded(picture(mode), kind)
    assert {code_of(data[:n]) for n in cut_points(data) if n < len(data) - spare} == {"truncated"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_garbage_behind_the_image_is_fine(kind: str) -> None:
    data = encoded(picture(), kind)
    for garbage in (b"\0" * 100, b"garbage" * 50, b"\xff\xd8\xff"):
        np.testing.assert_array_equal(photo.decode(data + garbage)[0], photo.decode(data)[0])


def test_padding_before_the_end_of_a_jpeg_is_fine_but_garbage_is_damage() -> None:
    data = encoded(picture(), "JPEG")
    padded = data[:-2] + bytes(9) + data[-2:]
    np.testing.assert_array_equal(photo.decode(padded)[0], photo.decode(data)[0])
    assert code_of(data[:-2] + b"something" + data[-2:]) == "corrupt"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_flipped_bytes_never_raise_anything_else(kind: str) -> None:
    data = encoded(picture(), kind)
    dice = random.Random(1)
    for _ in range(120):
        broken = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(data))] = dice.randrange(256)
        with contextlib.suppress(DataError):
            photo.probe(bytes(broken))
            photo.decode(bytes(broken), max_pixels=1_000_000)


def test_a_wrong_checksum_in_a_png_is_damage() -> None:
    data = bytearray(encoded(picture(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 1
    assert code_of(bytes(data)) == "corrupt"


@pytest.mark.parametrize("pixels", [b"", zlib.compress(b"\0" * 30), zlib.compress(bytes(7 * 8))[:-4], b"nonsense"])
def test_a_png_with_too_few_pixels_is_damage(pixels: bytes) -> None:
    assert code_of(png_of(2, 8, 8, 2, chunk(b"IDAT", pixels))) == "corrupt"


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "empty-file", "0 bytes"),
        (b"<html><body>404</body></html>", "not-an-image", "<html>"),
        (bytes(1000), "not-an-image", "00 00 00"),
        (b"BMW is a car maker, not a picture", "not-an-image", "BMW is"),
        (b"\0\0\0\x20ftypheic" + bytes(99), "unsupported", "HEIC"),
        (b"%PDF-1.7 ...", "unsupported", "PDF"),
        (png_of(0, 5, 8, 2, chunk(b"IDAT", b"")), "corrupt", "0 x 5"),
        (b"\xff\xd8\xff\xd9", "corrupt", "no pixels"),
    ],
)
def test_what_is_not_a_photo_says_so(data: bytes, code: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        photo.decode(data, "a.jpg")
    assert caught.value.code == code


def test_unsupported_pixels_say_so() -> None:
    floats = encoded(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF")
    assert code_of(floats) == "unsupported"
    twelve_bits = bytearray(encoded(picture(), "JPEG"))
    twelve_bits[twelve_bits.index(b"\xff\xc0") + 4] = 12
    assert code_of(bytes(twelve_bits)) == "unsupported"


def test_bombs_are_refused_before_decoding() -> None:
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"):
        data = encoded(picture(), kind)
        assert code_of(data, max_pixels=HEIGHT * WIDTH - 1) == "too-large"
        photo.decode(data, max_pixels=HEIGHT * WIDTH)
    assert code_of(png_of(60_000, 60_000, 8, 2, chunk(b"IDAT", b""))) == "too-large"
    gif = bytearray(encoded(picture("P"), "GIF"))
    frame = gif.index(b",\0\0\0\0", 13)
    gif[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # a frame of 65,535 x 65,535 in a small GIF
    assert code_of(bytes(gif)) == "too-large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_without_its_end_is_found_without_decoding_it(kind: str) -> None:
    data = encoded(Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)), kind)
    photo.inspect(data + b"\0" * 20)
    for stop in range(len(data) - 1, len(data) // 2, -7):
        with pytest.raises(DataError) as caught:
            photo.inspect(data[:stop], "u")
        assert caught.value.code == "truncated" and caught.value.uri == "u"


def large(mode: str = "RGB", height: int = 121, width: int = 203) -> Image.Image:
    """A smooth picture whose sides are no multiples of 8."""
    return picture("RGB").resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("least", "by"), [((16, 26), 8), ((17, 26), 4), ((31, 51), 4), ((31, 52), 2), ((61, 102), 2), ((61, 103), 1)]
)
def test_a_jpeg_is_reduced_as_far_as_enough_pixels_remain(mode: str, least: tuple[int, int], by: int) -> None:
    data = encoded(large(mode), "JPEG", quality=95)
    rgb, info = photo.decode(data, least=lambda _: least)
    whole, same = photo.decode(data)
    assert info == same and (info.height, info.width) == (121, 203)
    assert photo.reduction(data, info, least) == by
    assert rgb.shape == (-(-121 // by), -(-203 // by), 3) and rgb.flags.c_contiguous
    inner = slice(1, 121 // by - 1), slice(1, 203 // by - 1)
    means = whole[: 121 // by * by, : 203 // by * by].reshape(121 // by, by, 203 // by, by, 3).mean((1, 3))
    assert np.abs(rgb[inner] - means[inner]).mean() < 1.5


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {"progressive": True}),
        ("RGB", "PNG", {}),
        ("RGB", "BMP", {}),
        ("RGB", "WEBP", {}),
    ],
)
def test_other_photos_are_never_reduced(mode: str, kind: str, options: dict[str, Any]) -> None:
    data = encoded(large(mode), kind, **options)
    np.testing.assert_array_equal(photo.decode(data, least=lambda _: (1, 1))[0], photo.decode(data)[0])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_cut_jpeg_is_detected_though_it_would_be_reduced(options: dict[str, Any]) -> None:
    data = encoded(large(), "JPEG", **options)
    for stop in range(len(data) - 400, len(data)):
        assert code_of(data[:stop], least=lambda _: (1, 1)) == "truncated"
    assert code_of(data[:-2] + b"something" + data[-2:], least=lambda _: (1, 1)) == "corrupt"
    padded = photo.decode(data[:-2] + bytes(9) + data[-2:], least=lambda _: (16, 26))[0]
    np.testing.assert_array_equal(padded, photo.decode(data, least=lambda _: (16, 26))[0])
    assert code_of(data, least=lambda _: (1, 1), max_pixels=121 * 203 - 1) == "too-large"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_twice_the_fed_pixels_remain_in_any_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(large(), "JPEG", exif=exif)
    item = Input("a", None, "a.jpg", "")
    upright = (203, 121) if orientation >= 5 else (121, 203)
    for spec, by in (
        (InputSpec(resize="stretch", height=15, width=12), 4),
        (InputSpec(resize="stretch", height=30, width=12), 2),
        (InputSpec(resize="letterbox", height=10, width=10), 8),
        (InputSpec(resize="short-side", height=15), 4),
        (InputSpec(resize="short-side", height=121), 1),
    ):
        fed = fed_of(spec)
        assert fed is not None
        pixels, *stored = decoded(item, data, 10**6, fed)
        assert stored == [121, 203, orientation]
        assert all(got >= 2 * want for got, want in zip(pixels.shape[:2], fed(*upright), strict=True)) or by == 1
        assert pixels.shape[:2] == tuple(-(-side // by) for side in upright)
        tall, wide = pixels.shape[:2]
        reduced = Prepared(np.zeros(1), Geometry(tall, wide, 5, 6, 7, 8))
        assert on_the_photo(reduced, 121, 203, orientation).geometry == (*upright, 5, 6, 7, 8)


def test_networks_that_see_every_pixel_get_every_pixel() -> None:
    for spec in (InputSpec(), InputSpec(divisor=32), InputSpec(resize="own"), InputSpec(slices=3, resize="stretch")):
        assert fed_of(spec) is None


def test_a_reduced_photo_gives_the_labels_of_the_whole_one() -> None:
    y, x = np.mgrid[:480, :640]
    rgb = np.stack([(x + y) % 320, 255 - x / 3, y / 2], -1).clip(0, 255).astype(np.uint8)
    data = encoded(Image.fromarray(rgb), "JPEG", quality=95)
    spec = ModelSpec("m", "semantic", THREE, InputSpec(64, 64, "stretch", layout="nhwc"), "logits", "d")

    class Colours:
        spec: ModelSpec

        def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
            return np.ascontiguousarray(np.moveaxis(batch, -1, 1))

    network = Colours()
    network.spec = spec
    predictor = Predictor(network, 1)
    maps = []
    for fed in (None, fed_of(spec.input)):
        pixels, height, width, orientation = decoded(Input("a", None, "a.jpg", ""), data, 10**6, fed)
        assert pixels.shape[:2] == ((480, 640) if fed is None else (240, 320))
        prepared = on_the_photo(predictor.prepare(pixels), height, width, orientation)
        maps.append(predictor.finish(predictor.forward([prepared])[0]).semantic)
    assert maps[0] is not None and maps[1] is not None
    assert maps[0].shape == maps[1].shape == (480, 640) and len(np.unique(maps[0])) == 3
    assert (maps[0] == maps[1]).mean() > 0.99
