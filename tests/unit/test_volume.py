"""Volumes: nibabel is the oracle for geometry and voxels, files come back byte for byte, bad ones are DataErrors."""

import contextlib
import gzip
import io
import pickle
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import volumes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch.codecs import volume
from segbatch.codecs.volume import Header
from segbatch.errors import DataError

URI = "s3://ct/volume-0.nii"
SHAPE = volumes.SHAPE
no_deadline = settings(deadline=None, max_examples=60)  # the first example imports nibabel


class Trickle(io.RawIOBase):
    """A forward-only stream that gives a few bytes at a time and counts them."""

    def __init__(self, data: bytes, at_a_time: int = 1000) -> None:
        self._data = memoryview(data)
        self._at_a_time = at_a_time
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        part = self._data[self.given : self.given + min(len(target), self._at_a_time)]
        target[: len(part)] = part
        self.given += len(part)
        return len(part)


def header_of(data: bytes) -> Header:
    return volume.read_header(io.BytesIO(data), URI)


def slices_of(data: bytes) -> list[NDArray[Any]]:
    return list(volume.slices(io.BytesIO(data), header_of(data), URI))


def written(header: Header, slices: list[NDArray[Any]], dtype: str | None = None, zipped: bool = False) -> bytes:
    file = io.BytesIO()
    volume.write(file, header, slices, dtype, zipped)
    return file.getvalue()


def error_of(call: Callable[[], object]) -> DataError:
    """The error that the call must raise: one line, with the file and a fix, and good to be pickled."""
    with pytest.raises(DataError) as caught:
        call()
    error = caught.value
    assert error.problem and error.fix and "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def read_error(data: bytes) -> DataError:
    """The error that reading the whole file must raise."""
    error = error_of(lambda: slices_of(data))
    assert error.uri == URI and URI in error.problem
    return error


@st.composite
def files(draw: st.DrawFn, dtypes: tuple[str, ...] = volume.DTYPES) -> bytes:
    """Good files of every kind."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    comment = draw(st.sampled_from([b"", b"from a scanner", b"x" * 5000]))
    return volumes.nifti(
        volumes.ct(shape + (1,) * draw(st.integers(0, 2)), draw(st.sampled_from(dtypes)), draw(st.integers(0, 99))),
        draw(st.sampled_from(list(volumes.AFFINES.values()))),
        version=draw(st.sampled_from([1, 2])),
        byte_order=draw(st.sampled_from("<>")),
        transforms=draw(st.sampled_from(["sform qform", "sform", "qform", ""])),
        scaling=draw(st.sampled_from([(0, 0), (1, 0), (np.nan, np.nan), (0.5, -1024), (-2, 7.25), (0, 5)])),
        comment=comment,
        padding=0 if comment else draw(st.sampled_from([0, 16, 3])),  # nibabel takes both together for damage
        zipped=draw(st.booleans()),
    )


@no_deadline
@given(files())
def test_header_and_voxels_equal_nibabels(data: bytes) -> None:
    header, slices, image = header_of(data), slices_of(data), volumes.oracle(data)
    voxels = volumes.stored(data)
    assert header.shape == voxels.shape[:3]
    assert header.dtype == voxels.dtype.newbyteorder("=")
    assert header.byte_order == image.header.endianness
    assert header.version == (1 if len(image.header.binaryblock) == 348 else 2)
    np.testing.assert_array_equal(header.affine, image.affine)
    np.testing.assert_array_equal(header.spacing_mm, image.header.get_zooms()[:3])
    assert (header.slope, header.intercept) == (image.dataobj.slope, image.dataobj.inter)
    assert len(header.raw) == image.dataobj.offset
    assert len(slices) == header.shape[2]
    for k, pixels in enumerate(slices):
        assert pixels.dtype == header.dtype and pixels.dtype.isnative and pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, voxels.reshape(header.shape)[:, :, k].T)
    scaled = np.stack([volume.to_hounsfield(p, header.slope, header.intercept).T for p in slices], axis=-1)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, image.get_fdata().reshape(header.shape).astype(np.float32))


@no_deadline
@given(files(), st.booleans())
def test_files_are_rebuilt_byte_for_byte(data: bytes, zipped: bool) -> None:
    header = volume.parse_header(header_of(data).raw)
    again = written(header, slices_of(data), zipped=zipped)
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    assert (gzip.decompress(again) if zipped else again) == plain
    assert again == written(header, slices_of(data), zipped=zipped)


@no_deadline
@given(files())
def test_slices_are_encoded_without_loss(data: bytes) -> None:
    header = header_of(data)
    for pixels in slices_of(data):
        encoded, kind = volume.encode_slice(pixels)
        assert kind == ("png" if pixels.itemsize < 4 else f"zstd-{pixels.dtype}")
        back = volume.decode_slice(encoded, kind, *pixels.shape, header.dtype.name)
        assert back.dtype == pixels.dtype and back.flags.writeable and back.flags.c_contiguous
        assert back.tobytes() == pixels.tobytes()


@no_deadline
@given(files(("uint8", "int16", "float32")), st.sampled_from(["uint8", "uint16", "float64"]))
def test_a_segmentation_takes_the_geometry_of_its_ct(ct: bytes, dtype: str) -> None:
    header, image = header_of(ct), volumes.oracle(ct)
    labels = volumes.labels(header.shape, "uint16")
    data = written(header, list(labels.transpose(2, 1, 0)), dtype)
    ours = volumes.oracle(data)
    assert ours.get_data_dtype() == np.dtype(dtype).newbyteorder(header.byte_order)
    np.testing.assert_array_equal(ours.affine, image.affine)
    np.testing.assert_array_equal(ours.get_fdata().reshape(header.shape), labels)
    assert (ours.dataobj.slope, ours.dataobj.inter) == (1, 0)
    changed = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max"}
    for name in set(ours.header) - changed:
        np.testing.assert_array_equal(ours.header[name], image.header[name], err_msg=name)
    assert ours.header.extensions == image.header.extensions
    assert volume.geometry_differs(header_of(data), header) == ""


def test_a_segmentation_has_no_display_range() -> None:
    header = header_of(volumes.nifti(volumes.ct(), cal_min=-160, cal_max=240))
    data = written(header, [np.ones((5, 7), np.uint8)] * 4, "uint8")
    fields = volumes.oracle(data).header
    assert (fields["cal_min"], fields["cal_max"], fields["bitpix"]) == (0, 0, 8)


def test_rows_are_the_second_axis_and_columns_the_first() -> None:
    voxels = np.zeros(SHAPE, np.int16)
    voxels[6, 1, 2] = 55
    slices = slices_of(volumes.nifti(voxels))
    assert [p.shape for p in slices] == [(5, 7)] * 4
    assert slices[2][1, 6] == 55 and sum(int(p.sum()) for p in slices) == 55


@pytest.mark.parametrize("zipped", [False, True])
def test_only_the_first_kilobytes_are_read_for_the_header(zipped: bool) -> None:
    data = volumes.nifti(volumes.ct((100, 100, 10)), zipped=zipped)
    stream = Trickle(data)
    header = volume.read_header(stream, URI)  # type: ignore[arg-type]
    assert header == header_of(data)
    assert stream.given <= 4096 < len(data)


@no_deadline
@given(files(), st.integers(1, 700))
@example(gzip.compress(volumes.nifti(volumes.ct())[:400]) + gzip.compress(volumes.nifti(volumes.ct())[400:]), 1)
def test_streams_may_give_few_bytes_at_a_time(data: bytes, at_a_time: int) -> None:
    header = volume.read_header(Trickle(data, at_a_time), URI)  # type: ignore[arg-type]
    slices = list(volume.slices(Trickle(data, at_a_time), header, URI))  # type: ignore[arg-type]
    for ours, expected in zip(slices, slices_of(data), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_gzip_of_several_members_with_zeros_and_foreign_bytes_behind() -> None:
    data = volumes.nifti(volumes.ct())
    expected = slices_of(data)
    members = b"".join(gzip.compress(data[i : i + 100]) for i in range(0, len(data), 100))
    for tail in (b"", b"\0" * 1000, b"notes"):
        np.testing.assert_array_equal(slices_of(members + tail), expected)
    np.testing.assert_array_equal(slices_of(gzip.compress(data[:350]) + b"\0\0" + gzip.compress(data[350:])), expected)
    np.testing.assert_array_equal(slices_of(data + b"notes"), expected)


def test_slices_are_read_as_they_are_asked_for() -> None:
    data = volumes.nifti(volumes.ct((400, 400, 12)))
    stream = Trickle(data, 1 << 20)
    slices = volume.slices(stream, header_of(data), URI)  # type: ignore[arg-type]
    for k, _ in enumerate(slices):
        assert stream.given <= len(data) * (k + 1) / 12 + (1 << 18)


@pytest.mark.parametrize("zipped", [False, True])
def test_memory_holds_a_slice_however_well_the_file_is_compressed(zipped: bool) -> None:
    data = volumes.nifti(np.zeros((256, 256, 128), np.int16), zipped=zipped)
    stream, header = io.BytesIO(data), header_of(data)
    tracemalloc.start()
    for pixels in volume.slices(stream, header, URI):
        assert pixels.nbytes == 128 << 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20 < 16 << 20 <= header.dtype.itemsize * np.prod(header.shape)


@given(st.data())
@no_deadline
def test_a_file_cut_anywhere_says_what_is_missing(draw: st.DataObject) -> None:
    data = volumes.nifti(volumes.ct(), version=draw.draw(st.sampled_from([1, 2])))
    start, slice_bytes = len(header_of(data).raw), 5 * 7 * 2
    there = draw.draw(st.integers(0, len(data) - 1))
    error = read_error(data[:there])
    if not there:
        assert error.code == "empty-file"
    elif there < 4:
        assert error.code == "not-nifti"
    else:
        assert error.code == "truncated-volume"
    if there >= start:
        k = (there - start) // slice_bytes
        assert f"slice {k} of 4: {len(data) - there} bytes are missing" in error.problem


@given(st.data())
@no_deadline
def test_a_gzipped_file_cut_anywhere_is_truncated(draw: st.DataObject) -> None:
    data = volumes.nifti(volumes.ct((30, 30, 9)), zipped=True)
    there = draw.draw(st.integers(0, len(data) - 1))
    error = read_error(data[:there])
    if there >= 2:
        assert error.code == "truncated-volume"
        whole = len(gzip.decompress(data))
        plain = len(zlib.decompressobj(31).decompress(data[:there]))
        if 352 <= plain < whole:
            assert f"slice {(plain - 352) // 1800} of 9: {whole - plain:,} bytes are missing" in error.problem
        elif plain == whole:
            assert "checksum" in error.problem
    else:
        assert error.code == ("not-nifti" if there else "empty-file")


def test_damaged_gzip_is_found_by_its_checksum() -> None:
    data = bytearray(volumes.nifti(volumes.ct((50, 50, 9)), zipped=True))
    header = header_of(bytes(data))
    data[-6] ^= 1
    slices = volume.slices(io.BytesIO(data), header, URI)
    assert error_of(lambda: list(slices)).code == "corrupt-volume"
    assert read_error(b"\x1f\x8b" + b"nonsense" * 99).code == "corrupt-volume"


def without_offset() -> bytes:
    data = volumes.nifti(volumes.ct())
    return data[:108] + bytes(4) + data[112:]


REFUSED: list[tuple[str, str, Callable[[], bytes]]] = [
    ("not-nifti", "not a NIfTI file", lambda: b"shopping list: milk, eggs, bread\n" * 20),
    ("not-nifti", "not a NIfTI file", lambda: b"milk"),
    ("not-nifti", "a NIfTI pair", lambda: volumes.nifti(volumes.ct(), magic=b"ni1")),
    ("unsupported-volume", "7 x 5 x 4 x 2", lambda: volumes.nifti(volumes.ct((*SHAPE, 2)))),
    ("unsupported-volume", "7 x 5,", lambda: volumes.nifti(volumes.ct((7, 5)))),
    ("unsupported-volume", "colours", lambda: volumes.nifti(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    ("unsupported-volume", "complex64", lambda: volumes.nifti(np.zeros(SHAPE, np.complex64))),
    ("bad-volume-header", "data code 9999", lambda: volumes.nifti(volumes.ct(), datatype=9999)),
    ("bad-volume-header", "data code 1 not", lambda: volumes.nifti(volumes.ct(), datatype=1)),
    ("bad-volume-header", "byte 0", lambda: without_offset()),
    ("bad-volume-header", "byte 1e+09", lambda: volumes.nifti(volumes.ct(), vox_offset=10**9)),
    ("bad-volume-header", "byte nan", lambda: volumes.nifti(volumes.ct(), vox_offset=np.nan)),
    ("bad-volume-header", "dimensions", lambda: volumes.nifti(volumes.ct(), dim=[3, 7, 5, 0, 1, 1, 1, 1])),
    ("bad-volume-header", "dimensions", lambda: volumes.nifti(volumes.ct(), dim=[3, 7, -5, 4, 1, 1, 1, 1])),
    ("bad-volume-header", "voxels of (nan", lambda: volumes.nifti(volumes.ct(), pixdim=[1, np.nan, 1, 1, 0, 0, 0, 0])),
    ("bad-volume-header", "inf", lambda: volumes.nifti(volumes.ct(), srow_x=[np.inf, 0, 0, 0])),
    ("bad-volume-header", "invalid intercept", lambda: volumes.nifti(volumes.ct(), scaling=(2, np.inf))),
    ("bad-volume-header", "", lambda: volumes.nifti(volumes.ct(), transforms="qform", quatern_b=1, quatern_c=1)),
    ("too-large", "32767 x 32767", lambda: volumes.nifti(volumes.ct(), dim=[3, 32767, 32767, 4, 1, 1, 1, 1])),
]


@pytest.mark.parametrize(("code", "part", "make"), REFUSED, ids=[f"{c}-{p or 'quaternion'}" for c, p, _ in REFUSED])
def test_refused_files(code: str, part: str, make: Callable[[], bytes]) -> None:
    data = make()
    error = error_of(lambda: header_of(data))
    assert (error.code, error.uri) == (code, URI)
    assert part in error.problem


@settings(deadline=None, max_examples=300)
@given(files(("int16",)), st.integers(0, 600), st.binary(min_size=1, max_size=12))
@pytest.mark.long
def test_no_header_makes_another_error_than_ours(data: bytes, at: int, noise: bytes) -> None:
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    broken = plain[:at] + noise + plain[at + len(noise) :]
    with contextlib.suppress(DataError):
        header = header_of(broken)
        assert len(header.raw) >= 352 and min(header.shape) >= 1
        volume.orientation(header)
        assert volume.geometry_differs(header, header) == ""
        next(volume.slices(io.BytesIO(broken), header, URI))


def test_what_nibabel_repairs_is_repaired_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    data = volumes.nifti(volumes.ct(), transforms="", pixdim=[0, -0.5, 2, 0, 0, 0, 0, 0], sform_code=99)
    header = header_of(data)
    assert header.spacing_mm == (0.5, 2, 1)
    assert caplog.records == []
    np.testing.assert_array_equal(header.affine, volumes.oracle(data).affine)


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000), ("micron", 0.001), ("mm", 1), ("unknown", 1)])
def test_units_become_mm(unit: str, mm: float) -> None:
    from nibabel.nifti1 import unit_codes

    header = header_of(volumes.nifti(volumes.ct(), xyzt_units=unit_codes[unit]))
    np.testing.assert_allclose(header.spacing_mm, np.array([0.7, 0.8, 2.5]) * mm, rtol=1e-6)
    np.testing.assert_allclose(header.affine[:3], volumes.AFFINES["LPS"][:3] * mm, rtol=1e-6)
    assert header.affine[3].tolist() == [0, 0, 0, 1]


def test_a_file_that_changed_after_its_header_was_read() -> None:
    header = header_of(volumes.nifti(volumes.ct()))
    other = volumes.nifti(volumes.ct(), volumes.AFFINES["RAS"])
    assert error_of(lambda: list(volume.slices(io.BytesIO(other), header, URI))).code == "changed-volume"


def test_parse_header_wants_all_bytes_before_the_voxels() -> None:
    raw = header_of(volumes.nifti(volumes.ct(), comment=b"hello")).raw
    assert volume.parse_header(raw).raw == raw
    assert error_of(lambda: volume.parse_header(raw[:-1])).code == "bad-volume-header"
    assert error_of(lambda: volume.parse_header(raw[:300])).code == "truncated-volume"
    assert error_of(lambda: volume.parse_header(b"")).code == "empty-file"


def test_writing_refuses_slices_that_do_not_fit() -> None:
    header = header_of(volumes.nifti(volumes.ct()))
    good = [np.zeros((5, 7), np.int16)] * 4
    assert "3 slices" in error_of(lambda: written(header, good[:3])).problem
    assert "more slices" in error_of(lambda: written(header, [*good, good[0]])).problem
    turned = error_of(lambda: written(header, [*good[:3], good[0].T]))
    assert (turned.code, "slice 3 has the shape (7, 5)" in turned.problem) == ("size-mismatch", True)
    with pytest.raises(ValueError, match="not complex64"):
        written(header, good, "complex64")


LOSSY = [(300, "int16", "uint8"), (-1, "int16", "uint16"), (200, "uint8", "int8"), (0.5, "float32", "uint8")]
LOSSY += [(np.nan, "float64", "int16"), (1e30, "float64", "int64"), (0.1, "float64", "float32")]
LOSSY += [(2**53 + 1, "int64", "float64"), (2**63, "uint64", "int64"), (-1, "int64", "uint64")]


@pytest.mark.parametrize(("value", "source", "target"), LOSSY)
def test_values_that_a_type_cannot_hold_are_never_changed(value: float, source: str, target: str) -> None:
    header = header_of(volumes.nifti(volumes.ct()))
    pixels = np.zeros((5, 7), source)
    pixels[2, 3] = value
    error = error_of(lambda: written(header, [np.zeros((5, 7), source), pixels] * 2, target))
    assert error.code == "value-range"
    assert f"slice 1 has the value {pixels[2, 3]} at row 2, column 3, which {target} cannot hold" == error.problem


@pytest.mark.parametrize("dtype", volume.DTYPES)
def test_labels_of_every_type(dtype: str) -> None:
    labels = volumes.labels((5, 7), dtype, (0, 1, 2, 117))
    ids = volume.label_slice(labels)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, labels)


@pytest.mark.parametrize("bad", [1.5, -1.0, 65536.0, np.nan, np.inf])
def test_values_that_are_no_label(bad: float) -> None:
    labels = np.ones((5, 7), np.float64)
    labels[4, 6] = bad
    assert error_of(lambda: volume.label_slice(labels, 2.0, 0.25, URI)).code == "bad-label"
    error = error_of(lambda: volume.label_slice(labels, uri=URI))
    assert (error.code, error.uri) == ("bad-label", URI)
    assert f"{bad} at row 4, column 6" in error.problem


def test_scaled_labels_are_the_nearest_ids() -> None:
    slope = float(np.float32(1 / 255))
    np.testing.assert_array_equal(volume.label_slice(np.array([[0, 255], [510, 0]], np.int16), slope), [[0, 1], [2, 0]])
    np.testing.assert_array_equal(volume.label_slice(np.array([[-1024, -1023]], np.int16), 1.0, 1024.0), [[0, 1]])
    assert error_of(lambda: volume.label_slice(np.array([[3]], np.int16), 0.5)).code == "bad-label"


def test_png_holds_the_bits_and_other_viewers_agree() -> None:
    from PIL import Image

    pixels = np.array([[-1024, -1, 0], [1, 3071, 32767]], np.int16)
    data, _ = volume.encode_slice(pixels)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.array(image), pixels.view(np.uint16))
    data, _ = volume.encode_slice(np.array([[-128, -1, 127]], np.int8))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.array(image), [[128, 255, 127]])


def test_slices_in_any_memory_layout_are_encoded() -> None:
    pixels = volumes.ct((20, 30)).T
    expected = volume.encode_slice(np.ascontiguousarray(pixels))
    assert volume.encode_slice(pixels) == expected == volume.encode_slice(pixels.astype(">i2"))
    floats = volumes.ct((20, 30), "float32").T
    assert volume.encode_slice(floats) == volume.encode_slice(floats.astype(">f4"))


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_encoded_slices_that_cannot_be_decoded(dtype: str) -> None:
    data, kind = volume.encode_slice(volumes.ct((30, 40), dtype))
    bent = bytearray(data)
    bent[len(data) // 2] ^= 255

    def code(data: bytes, kind: str, height: int, width: int, dtype: str) -> str:
        error = error_of(lambda: volume.decode_slice(data, kind, height, width, dtype, URI))
        assert error.uri == URI and URI in error.problem
        return error.code

    assert code(data, "jpeg", 30, 40, dtype) == "unsupported"
    assert code(data, kind, 30, 40, "int32") == "unsupported"
    assert code(data, kind, 40, 30, "int16" if dtype == "float32" else "uint64") == "unsupported"
    assert code(data, kind, 31, 40, dtype) in ("size-mismatch", "corrupt")
    assert code(b"", kind, 30, 40, dtype) in ("truncated", "corrupt")
    assert code(data[:-20], kind, 30, 40, dtype) in ("truncated", "corrupt")
    if kind == "png":
        assert code(bytes(bent), kind, 30, 40, dtype) == "corrupt"
        assert code(b"X" + data[1:], kind, 30, 40, dtype) == "corrupt"
        assert code(data, kind, 40, 30, dtype) == code(data, kind, 30, 40, "uint8") == "size-mismatch"


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), bool), np.zeros((2, 2), complex), np.zeros(4), np.zeros((0, 4))])
def test_what_is_no_slice_is_not_encoded(pixels: NDArray[Any]) -> None:
    with pytest.raises(ValueError):
        volume.encode_slice(pixels)


@pytest.mark.parametrize("name", volumes.AFFINES)
@pytest.mark.parametrize("transforms", ["sform", "qform"])
def test_orientation_in_words(name: str, transforms: str) -> None:
    assert (
        volume.orientation(header_of(volumes.nifti(volumes.ct(), volumes.AFFINES[name], transforms=transforms))) == name
    )


def test_orientation_of_an_affine_without_three_directions() -> None:
    assert volume.orientation(header_of(volumes.nifti(volumes.ct(), srow_z=[0, 0, 0, 5]))) == "unknown"
    assert volume.orientation(header_of(volumes.nifti(volumes.ct(), srow_x=[0] * 4))) == "unknown"


def test_geometry_that_differs_is_named() -> None:
    ct = header_of(volumes.nifti(volumes.ct()))
    moved, flipped = volumes.AFFINES["LPS"].copy(), volumes.AFFINES["LPS"].copy()
    moved[0, 3] += 1.5
    flipped[1] *= -1
    little = volumes.AFFINES["LPS"] + 4e-4

    def differs(affine: NDArray[np.float64], shape: tuple[int, ...] = SHAPE, **options: Any) -> str:
        return volume.geometry_differs(ct, header_of(volumes.nifti(volumes.labels(shape), affine, **options)))

    assert differs(volumes.AFFINES["LPS"]) == differs(little) == differs(volumes.AFFINES["LPS"], version=2) == ""
    assert differs(moved) == "affine LPS against LPS, 120 against 121.5 in row 0, column 3"
    assert differs(flipped) == "affine LPS against LAS, 90 against -90 in row 1, column 3"
    assert differs(volumes.AFFINES["LPS"], (7, 5, 3)) == "shape 7 x 5 x 4 against 7 x 5 x 3"
    assert differs(volumes.AFFINES["LPS"], pixdim=[1, 0.7, 0.8, 5, 0, 0, 0, 0]) == (
        "voxels of 0.7 x 0.8 x 2.5 mm against 0.7 x 0.8 x 5 mm"
    )
    assert "\n" not in differs(flipped, (7, 5, 3)) and differs(flipped, (7, 5, 3)).count("; ") == 1


def test_record_of_a_slice_rebuilds_the_header() -> None:
    header = header_of(volumes.nifti(volumes.ct(), scaling=(2, -1024), comment=b"hello"))
    record = volume.slice_record(header, 3)
    assert (record.index, record.slices, record.dtype) == (3, 4, "int16")
    assert (record.slope, record.intercept, record.spacing_mm) == (2, -1024, header.spacing_mm)
    np.testing.assert_array_equal(np.reshape(record.affine, (4, 4)), header.affine)
    assert volume.parse_header(record.header) == header


def test_nibabel_is_not_imported_before_it_is_needed() -> None:
    check = "import sys, segbatch.codecs.volume; sys.exit(any(m in sys.modules for m in ('nibabel', 'cv2', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def opened(path: Path) -> IO[bytes]:
    return path.open("rb")


def test_a_real_ct_is_stored_and_rebuilt(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    import nibabel

    folder = shared_data("data/ct_liver")
    image = nibabel.load(folder / "example_ct_sm.nii.gz")
    with opened(folder / "example_ct_sm.nii.gz") as file:
        header = volume.read_header(file)
        file.seek(0)
        encoded = [volume.encode_slice(p) for p in volume.slices(file, header)]
    assert volume.orientation(header) == "RAS" and header.spacing_mm == (3, 3, 3)
    assert {kind for _, kind in encoded} == {"png"}
    assert sum(len(data) for data, _ in encoded) < 0.63 * np.asarray(image.dataobj).nbytes
    ni, nj, _ = header.shape
    back = [volume.decode_slice(data, kind, nj, ni, header.dtype) for data, kind in encoded]
    np.testing.assert_array_equal(np.stack(back).transpose(2, 1, 0), np.asarray(image.dataobj))
    with (tmp_path / "again.nii.gz").open("wb") as again:
        volume.write(again, header, back, gzipped=True)
    rebuilt = gzip.decompress((tmp_path / "again.nii.gz").read_bytes())
    assert rebuilt == gzip.decompress((folder / "example_ct_sm.nii.gz").read_bytes())


def test_real_liver_labels_lie_on_their_ct(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("data/ct_liver")
    voxels, total = 0, 0.0
    with opened(folder / "example_ct_sm.nii.gz") as ct_file, opened(folder / "liver.nii.gz") as label_file:
        ct, labels = volume.read_header(ct_file), volume.read_header(label_file)
        assert volume.geometry_differs(ct, labels) == ""
        ct_file.seek(0)
        label_file.seek(0)
        pairs = zip(volume.slices(ct_file, ct), volume.slices(label_file, labels), strict=True)
        for pixels, label in pairs:
            liver = volume.label_slice(label, labels.slope, labels.intercept) == 1
            voxels += int(liver.sum())
            total += float(volume.to_hounsfield(pixels, ct.slope, ct.intercept)[liver].sum(dtype=np.float64))
    assert voxels == 39350
    assert total / voxels == pytest.approx(44.8586, abs=1e-4)
