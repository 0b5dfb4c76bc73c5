"""MATLAB 5 files: scipy is the oracle for good ones; damaged ones are errors with the file and the fix."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch.codecs import mat
from segbatch.errors import DataError

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
URI = "s3://ccp/0001.mat"


def drawn(shape: tuple[int, ...], kind: str, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(kind)


def by_scipy(compressed: bool = True, **variables: Any) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


shapes = st.lists(st.integers(0, 5), min_size=2, max_size=4).map(tuple)


@settings(deadline=None)
@given(shapes, st.sampled_from(TYPES), st.booleans())
def test_reads_what_scipy_writes(shape: tuple[int, ...], kind: str, compressed: bool) -> None:
    array = drawn(shape, kind)
    others = {"a": np.arange(3.0), "text": "words", "cells": np.array([["a", 2]], object), "z" * 20: 1j * np.ones(2)}
    data = by_scipy(compressed, **others, found=array, a_much_longer_name=array)
    for name in ("found", "a_much_longer_name"):
        read = mat.read(data, name)
        np.testing.assert_array_equal(read, array)
        assert read.shape == array.shape and read.dtype == array.dtype


@settings(deadline=None)
@given(shapes, st.sampled_from(TYPES), st.sampled_from(["x", "abcd", "abcde", "groundtruth"]))
def test_scipy_reads_what_is_written(shape: tuple[int, ...], kind: str, name: str) -> None:
    array = drawn(shape, kind)
    data = mat.write(name, array)
    read = scipy.io.loadmat(io.BytesIO(data), mat_dtype=True)[name]
    np.testing.assert_array_equal(read, array)
    assert read.shape == array.shape and read.dtype == array.dtype
    assert data == mat.write(name, np.asfortranarray(array))
    np.testing.assert_array_equal(mat.read(data, name), array)


def test_big_endian_and_narrowed_numbers() -> None:
    """As written on a PowerPC: a double array whose numbers are stored as uint8, in the small form."""

    def element(kind: int, data: bytes) -> bytes:
        return kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)

    small = (3).to_bytes(2, "big") + (2).to_bytes(2, "big") + bytes([7, 8, 9, 0])
    dims = (1).to_bytes(4, "big") + (3).to_bytes(4, "big")
    parts = element(6, bytes([0, 0, 0, 6, 0, 0, 0, 0])) + element(5, dims) + element(1, b"tags") + small
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
    data = header + element(14, parts)
    np.testing.assert_array_equal(mat.read(data, "tags"), [[7, 8, 9]])
    np.testing.assert_array_equal(scipy.io.loadmat(io.BytesIO(data))["tags"], [[7, 8, 9]])


def test_narrow_numbers_of_a_double_array() -> None:
    data = mat.write("tags", drawn((3, 4), "u1"), as_double=True)
    wide, narrow = (scipy.io.loadmat(io.BytesIO(data), mat_dtype=m)["tags"] for m in (True, False))
    assert wide.dtype == np.float64 and narrow.dtype == mat.read(data, "tags").dtype == np.uint8
    np.testing.assert_array_equal(wide, drawn((3, 4), "u1"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b"x" * 500, "not a MATLAB 5 file"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512), "HDF5"),
        (by_scipy(other=np.ones((2, 2))), "no variable found, only other"),
        (by_scipy()[:128], "only none at all"),
        (by_scipy(found="text"), "no array of real numbers"),
        (by_scipy(found=np.ones((2, 2)) * 1j), "no array of real numbers"),
        (by_scipy(found=np.array([["a", 2]], object)), "no array of real numbers"),
        (by_scipy(found=np.ones((9, 9)))[:-5], "cut short or damaged"),
        (by_scipy(False, found=np.ones((9, 9)))[:-5], "cut short or damaged"),
    ],
)
def test_what_is_no_such_array_is_told(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        mat.read(data, "found", URI)
    assert caught.value.code == "bad-mat" and URI in caught.value.problem and "found" in caught.value.fix


def test_a_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    data = by_scipy(found=np.zeros((1000, 1000), np.uint8))
    assert len(data) < 2000
    monkeypatch.setattr(mat, "MAX_BYTES", 100_000)
    with pytest.raises(DataError, match="more than 100,000 bytes"):
        mat.read(data, "found")


@settings(deadline=None, max_examples=400)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=4), st.integers(0, 700))
@pytest.mark.long
def test_damage_is_an_error_or_an_array(compressed: bool, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(by_scipy(compressed, found=drawn((20, 15), "u1")))
    for at, value in changes:
        data[at % len(data)] = value
    with contextlib.suppress(DataError):
        assert mat.read(bytes(data[: len(data) - cut % 60]), "found").ndim >= 2


@pytest.mark.parametrize("array", [np.ones(3), np.ones((2, 2), complex), np.ones((2, 2), bool)])
def test_only_arrays_of_real_numbers_are_written(array: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="real numbers"):
        mat.write("x", array)
