"""Label maps as runs: exact for every dtype, shape and memory layout; joint counts against a plain histogram."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from segbatch.codecs import _runlength_kernels as kernels
from segbatch.codecs import runlength
from segbatch.codecs.runlength import Runs

DTYPES = [np.dtype(t) for t in ("?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u2", ">i4")]
no_deadline = settings(deadline=None, max_examples=60)  # the first example compiles


@st.composite
def label_maps(draw: st.DrawFn) -> NDArray[Any]:
    """Maps with runs of every length, in every dtype and memory layout."""
    dtype = draw(st.sampled_from(DTYPES))
    greatest = 1 if dtype.kind == "b" else min(65535, int(np.iinfo(dtype).max))
    ids = draw(st.lists(st.integers(0, greatest), min_size=1, max_size=6))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pixels = int(np.prod(shape))
    lengths = rng.integers(1, draw(st.sampled_from([2, 5, 70, 300])), pixels)
    flat = np.repeat(rng.choice(ids, pixels), lengths)[:pixels]
    label_map = flat.reshape(shape).astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "strided", "flipped", "readonly"]))
    if layout == "F":
        label_map = np.asfortranarray(label_map)
    elif layout == "strided" and label_map.ndim:
        label_map = np.repeat(label_map, 2, axis=-1)[..., ::2]
    elif layout == "flipped" and label_map.ndim:
        label_map = label_map[::-1]
    elif layout == "readonly":
        label_map.flags.writeable = False
    return label_map


def naive(label_map: NDArray[Any]) -> list[tuple[int, int]]:
    """The runs, by plain Python."""
    return [(int(v), len(list(g))) for v, g in itertools.groupby(label_map.ravel(order="C").tolist())]


def joint_oracle(truth: NDArray[Any], predicted: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Sorted (truth, predicted, pixels) from the pixels."""
    keys, pixels = np.unique(
        truth.ravel().astype(np.int64) << 16 | predicted.ravel().astype(np.int64), return_counts=True
    )
    return [(k >> 16, k & 65535, n) for k, n in zip(keys.tolist(), pixels.tolist(), strict=True)]


def joined(counts: tuple[NDArray[Any], ...]) -> list[tuple[int, ...]]:
    """Columns to rows."""
    return list(zip(*(c.tolist() for c in counts), strict=True))


@no_deadline
@given(label_maps())
def test_round_trip_is_exact_and_equals_plain_python(label_map: NDArray[Any]) -> None:
    runs = runlength.encode(label_map)
    assert runs.values.dtype == np.uint16
    assert runs.lengths.dtype == np.uint32
    assert joined(runs) == naive(label_map)
    back = runlength.decode(runs, label_map.shape, label_map.dtype)
    assert (back.dtype, back.shape) == (label_map.dtype, label_map.shape)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, label_map)
    np.testing.assert_array_equal(runlength.decode(runs, label_map.shape), label_map)


@no_deadline
@given(label_maps(), st.integers(0, 2**32 - 1))
def test_counts_equal_the_histograms(truth: NDArray[Any], seed: int) -> None:
    predicted = np.random.default_rng(seed).permutation(truth.ravel().copy())
    truth_runs, predicted_runs = runlength.encode(truth), runlength.encode(predicted)
    ids, pixels = np.unique(truth.astype(np.int64), return_counts=True)
    assert joined(runlength.class_pixels(truth_runs)) == list(zip(ids.tolist(), pixels.tolist(), strict=True))
    assert joined(runlength.joint_counts(truth_runs, predicted_runs)) == joint_oracle(truth, predicted)


@pytest.mark.parametrize("greatest", [11, 255, 511, 65535])
def test_joint_counts_of_small_and_huge_ids(greatest: int) -> None:
    rng = np.random.default_rng(greatest)
    truth, predicted = np.repeat(rng.integers(0, greatest + 1, (2, 300), dtype=np.uint16), 7, axis=1)
    predicted = np.roll(predicted, 3)
    counts = runlength.joint_counts(runlength.encode(truth), runlength.encode(predicted))
    assert [c.dtype for c in counts] == [np.uint16, np.uint16, np.uint64]
    assert joined(counts) == joint_oracle(truth, predicted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 66, 127, 128, 129, 4097])
def test_noise_around_the_vector_width(dtype: type, pixels: int) -> None:
    noise = np.random.default_rng(pixels).integers(0, np.iinfo(dtype).max + 1, pixels, dtype=dtype)
    for label_map in (noise, noise // np.array(64, dtype), np.full_like(noise, 7)):
        runs = runlength.encode(label_map)
        assert joined(runs) == naive(label_map)
        np.testing.assert_array_equal(runlength.decode(runs, label_map.shape, dtype), label_map)


def test_nothing_is_written_behind_the_map() -> None:
    for length in range(200):
        flat = np.full(300, 9, np.uint8)
        kernels.kernel(kernels.fill_pixels)(np.array([5], np.uint16), np.array([length], np.uint32), flat[:length])
        assert (flat[:length] == 5).all()
        assert (flat[length:] == 9).all()


def test_the_empty_map() -> None:
    runs = runlength.encode(np.empty((0, 7), np.uint8))
    assert len(runs.values) == len(runs.lengths) == 0
    assert runlength.decode(runs, (0, 7)).shape == (0, 7)
    assert [len(c) for c in runlength.class_pixels(runs)] == [0, 0]
    assert [len(c) for c in runlength.joint_counts(runs, runs)] == [0, 0, 0]


def test_runs_of_length_zero_and_equal_neighbours_are_read() -> None:
    odd = Runs(np.array([3, 5, 5, 9, 7], np.uint16), np.array([0, 2, 1, 0, 0], np.uint32))
    assert runlength.decode(odd, (3,)).tolist() == [5, 5, 5]
    assert joined(runlength.class_pixels(odd)) == [(5, 3)]
    plain = runlength.encode(np.array([1, 60000, 60000], np.uint16))
    assert joined(runlength.joint_counts(odd, plain)) == [(5, 1, 1), (5, 60000, 2)]
    assert joined(runlength.joint_counts(plain, odd)) == [(1, 5, 1), (60000, 5, 2)]
    nothing = Runs(np.array([3], np.uint16), np.array([0], np.uint32))
    assert joined(runlength.joint_counts(nothing, nothing)) == []


def test_strided_and_read_only_runs_are_read() -> None:
    table = np.array([(4, 2), (6, 3)], dtype=[("value", "<u2"), ("length", "<u4")])
    table.flags.writeable = False
    assert runlength.decode(Runs(table["value"], table["length"]), (5,)).tolist() == [4, 4, 6, 6, 6]


def test_runs_too_long_for_their_field_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlength, "LONGEST_RUN", 10)
    label_map = np.repeat(np.array([1, 2], np.uint8), [23, 4])
    runs = runlength.encode(label_map)
    assert runs.lengths.max() <= 10
    np.testing.assert_array_equal(runlength.decode(runs, label_map.shape), label_map)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (np.array([3, -1], np.int8), "-1"),
        (np.array([65536], np.int32), "65536"),
        (np.array([2**40], np.uint64), str(2**40)),
        (np.array([-7, 5], np.int64), "-7"),
        (np.array([0.5]), "float64"),
    ],
)
def test_what_is_no_label_id_is_refused(bad: NDArray[Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        runlength.encode(bad)


def test_decoding_refuses_what_does_not_fit() -> None:
    runs = runlength.encode(np.array([300, 300, 1], np.uint16))
    with pytest.raises(ValueError, match=r"runs cover 3 pixels, shape .* needs 4"):
        runlength.decode(runs, (2, 2))
    with pytest.raises(ValueError, match="3 pixels"):
        runlength.decode(runs, (-1, -3))
    with pytest.raises(ValueError, match="300 does not fit uint8"):
        runlength.decode(runs, (3,), np.uint8)
    with pytest.raises(ValueError, match="does not fit bool"):
        runlength.decode(runs, (3,), np.bool_)
    with pytest.raises(ValueError, match="float32"):
        runlength.decode(runs, (3,), np.float32)
    assert runlength.decode(runs, (3,), np.int16).tolist() == [300, 300, 1]


def test_malformed_runs_are_refused() -> None:
    ids, lengths = np.array([1, 2], np.uint16), np.array([1, 2], np.uint32)
    with pytest.raises(ValueError, match="do not match"):
        runlength.decode(Runs(ids, lengths[:1]), (1,))
    with pytest.raises(ValueError, match="int64"):
        runlength.class_pixels(Runs(ids.astype(np.int64), lengths))
    with pytest.raises(ValueError, match="3 pixels, prediction 1"):
        runlength.joint_counts(Runs(ids, lengths), Runs(ids[:1], lengths[:1]))


def test_first_calls_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.KERNELS, "_built", {})
    maps = [np.repeat(np.arange(50, dtype=t), 13 + i) for i, t in enumerate([np.uint8, np.uint16] * 8)]

    def there_and_back(label_map: NDArray[Any]) -> bool:
        return np.array_equal(
            runlength.decode(runlength.encode(label_map), label_map.shape, label_map.dtype), label_map
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, maps * 4))


def test_it_works_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(kernels.KERNELS, "_built", {})
    runs = Runs(np.array([1, 2, 1], np.uint16), np.array([1, 2, 3], np.uint32))
    assert joined(runlength.class_pixels(runs)) == [(1, 4), (2, 2)]


def test_importing_does_not_load_numba() -> None:
    code = "import sys, segbatch.codecs.runlength; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
