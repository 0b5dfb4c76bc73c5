"""COCO strings against pycocotools: the same bytes, the same pixels; strings from strangers are refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from segbatch.codecs import _rle_kernels as kernels
from segbatch.codecs import rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
no_deadline = settings(deadline=None, max_examples=100)  # the first example compiles
shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)


def theirs(counts: bytes, height: int, width: int) -> dict[str, Any]:
    """A mask as pycocotools wants it."""
    return {"size": [height, width], "counts": counts}


def blobs(seed: int, shape: tuple[int, ...], ids: int) -> NDArray[np.int64]:
    """Ids 0..ids - 1 in blocks of random size, with some noise."""
    rng = np.random.default_rng(seed)
    block = int(rng.integers(1, 9))
    small = rng.integers(0, ids, (shape[0] // block + 1, shape[1] // block + 1))
    return np.kron(small, np.ones((block, block), np.int64))[: shape[0], : shape[1]]


def laid_out(image: NDArray[Any], layout: str) -> NDArray[Any]:
    """The same pixels in another memory order."""
    if layout == "F":
        return np.asfortranarray(image)
    if layout == "strided":
        return np.repeat(image, 2, axis=1)[:, ::2]
    if layout == "flipped":
        return image[::-1].copy()[::-1]
    image = image.copy()
    image.flags.writeable = False
    return image


layouts = st.sampled_from(["F", "strided", "flipped", "readonly"])


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> NDArray[np.bool_]:
    """Bool masks with runs of every length, often empty or full in part."""
    shape = shape or draw(shapes)
    mask = blobs(draw(st.integers(0, 2**32 - 1)), shape, draw(st.sampled_from([1, 2, 2, 2, 5]))) == 1
    return ~mask if draw(st.booleans()) else mask


@st.composite
def mask_lists(draw: st.DrawFn) -> list[NDArray[np.bool_]]:
    """One to four masks of one size."""
    shape = draw(shapes)
    return draw(st.lists(masks(shape), min_size=1, max_size=4))


@st.composite
def odd_counts(draw: st.DrawFn) -> tuple[bytes, int, int]:
    """Run lengths with many zeros among them, and a size that they fit."""
    height = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 7]), min_size=1, max_size=12))
    lengths[-1] += -sum(lengths) % height if sum(lengths) else height
    return rle.from_uncompressed(lengths), height, sum(lengths) // height


# ------------------------------------------------------------------------------------------------ strings


@no_deadline
@given(hnp.arrays(np.uint32, st.integers(0, 30), elements=st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))))
def test_every_run_length_survives_the_string(counts: NDArray[np.uint32]) -> None:
    string = rle.to_string(counts)
    back = rle.from_string(string)
    assert back.dtype == np.uint32
    np.testing.assert_array_equal(back, counts)
    assert rle.area(string) == int(counts[1::2].sum(dtype=np.uint64))


@no_deadline
@given(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**28)), min_size=1, max_size=30))
def test_strings_are_those_of_pycocotools(lengths: list[int]) -> None:
    official = coco.frPyObjects({"counts": lengths, "size": [1, sum(lengths)]}, 1, sum(lengths))["counts"]
    assert rle.from_uncompressed(lengths) == official
    assert rle.to_string(np.array(lengths, np.uint32)) == official
    assert rle.from_string(official).tolist() == lengths


@no_deadline
@given(st.one_of(st.binary(max_size=40), st.lists(st.integers(48, 111), max_size=40).map(bytes)))
def test_strings_from_strangers_are_read_or_refused(string: bytes) -> None:
    try:
        counts = rle.from_string(string)
    except ValueError as error:
        assert str(error).startswith("COCO counts ")  # noqa: PT017
        return
    pixels = int(counts.sum(dtype=np.uint64))
    np.testing.assert_array_equal(rle.from_string(rle.to_string(counts)), counts)
    if pixels < 2**32:
        rle.check(string, 1, pixels)


@pytest.mark.parametrize(
    ("string", "named"),
    [
        (b"5P", "end within a number"),
        (b"5\x00", "character outside '0'..'o'"),
        (b"5 3", "character outside '0'..'o'"),
        (b"5p", "character outside '0'..'o'"),
        (b"PPPPPPP0", "more than 7 characters"),
        (b"P" * 10**6, "more than 7 characters"),
        (b"o" * 50, "more than 7 characters"),
        (b"N", "outside 0..4294967295"),
        (b"513L", "outside 0..4294967295"),
        (b"oooooo?", "outside 0..4294967295"),
    ],
)
def test_malformed_strings_are_refused(string: bytes, named: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: rle.from_string(string),
        lambda: rle.check(string, 2, 3),
        lambda: rle.area(string),
        lambda: rle.bbox(string, 2, 3),
        lambda: rle.decode(string, 2, 3),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=named):
            call()
    together: list[Callable[[], object]] = [
        lambda: rle.merge([b"6", string]),
        lambda: rle.intersection_areas([b"6"], [string]),
        lambda: rle.paint([b"6", string], [1, 1], 2, 3, np.uint8),
    ]
    for call in together:
        with pytest.raises(ValueError, match=f"mask 1 .*{named}"):
            call()


def test_another_number_of_pixels_is_refused() -> None:
    rle.check(b"231N", 7, 1)
    with pytest.raises(ValueError, match="cover 7 pixels, 2 x 3 needs 6"):
        rle.check(b"231N", 2, 3)
    with pytest.raises(ValueError, match="cover 7 pixels, 2 x 4 needs 8"):
        rle.decode(b"231N", 2, 4)
    with pytest.raises(ValueError, match="cover 7 pixels"):
        rle.bbox(b"231N", 0, 0)
    with pytest.raises(ValueError, match="mask 1 covers 6"):
        rle.merge([b"231N", b"6"])
    with pytest.raises(ValueError, match="mask 2 covers 6"):
        rle.intersection_areas([b"231N", b"7"], [b"6"])
    with pytest.raises(ValueError, match="-1 x 3"):
        rle.check(b"231N", -1, 3)
    with pytest.raises(ValueError, match="cannot be"):
        rle.check(b"231N", 2**16, 2**16)
    with pytest.raises(ValueError, match="cannot be"):
        rle.check(b"231N", np.int32(2**16), np.int32(2**16))


@pytest.mark.parametrize("lengths", [[3, -1], [2**32], [0.5, 1], [[1, 2]], ["5"]])
def test_what_is_no_list_of_run_lengths_is_refused(lengths: list[Any]) -> None:
    with pytest.raises(ValueError, match="run length"):
        rle.from_uncompressed(lengths)


def test_lengths_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        rle.to_string(np.array([1, 2]))  # type: ignore[arg-type]
    assert rle.to_string(np.array([1, 9, 2, 9], np.uint32)[::2]) == b"12"


# ------------------------------------------------------------------------------------------------ one mask


@no_deadline
@given(masks(), layouts)
def test_a_mask_is_encoded_as_by_pycocotools(mask: NDArray[np.bool_], layout: str) -> None:
    height, width = mask.shape
    official = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    string = rle.encode(laid_out(mask, layout))
    assert string == official["counts"]
    assert rle.encode(laid_out(mask.view(np.uint8) * np.uint8(200), layout)) == string
    back = rle.decode(string, height, width)
    assert back.dtype == np.bool_
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, mask)
    assert rle.area(string) == coco.area(official) == mask.sum()
    assert rle.bbox(string, height, width) == tuple(coco.toBbox(official))
    rle.check(string, height, width)


@no_deadline
@given(odd_counts())
def test_runs_of_length_zero_are_read_as_by_pycocotools(odd: tuple[bytes, int, int]) -> None:
    string, height, width = odd
    rle.check(string, height, width)
    mask = rle.decode(string, height, width)
    np.testing.assert_array_equal(mask, coco.decode(theirs(string, height, width)))
    assert rle.area(string) == mask.sum()
    assert rle.merge([string]) == string
    expected = coco.toBbox(theirs(string, height, width)) if mask.any() else (0, 0, 0, 0)
    assert rle.bbox(string, height, width) == tuple(expected)


@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 66, 127, 128, 129, 4097])
def test_masks_around_the_vector_width(pixels: int) -> None:
    noise = np.random.default_rng(pixels).random((pixels, 1)) < 0.5
    for mask in (noise, noise.T, np.ones_like(noise), np.zeros_like(noise), np.arange(pixels)[:, None] == pixels - 1):
        string = rle.encode(mask)
        assert string == coco.encode(np.asfortranarray(mask.view(np.uint8)))["counts"]
        np.testing.assert_array_equal(rle.decode(string, *mask.shape), mask)


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0)])
def test_masks_without_pixels(shape: tuple[int, int]) -> None:
    string = rle.encode(np.empty(shape, np.bool_))
    assert string == b"0"
    assert rle.decode(string, *shape).shape == rle.decode(b"", *shape).shape == shape
    assert rle.bbox(string, *shape) == (0, 0, 0, 0)
    assert rle.merge([string, b""]) == b"0"
    assert rle.instances_of(np.empty(shape, np.uint16)).counts == []
    assert rle.from_string(b"").size == rle.area(b"") == 0


def test_what_is_no_mask_is_refused() -> None:
    for bad in (np.zeros((2, 2), np.int64), np.zeros((2, 2)), np.zeros(4, np.bool_), np.zeros((1, 2, 2), np.uint8)):
        with pytest.raises(ValueError, match="a mask is bool or uint8 of two dimensions"):
            rle.encode(bad)


# ------------------------------------------------------------------------------------------------ several masks


@no_deadline
@given(mask_lists(), st.booleans())
def test_masks_merge_as_in_pycocotools(some: list[NDArray[np.bool_]], intersect: bool) -> None:
    height, width = some[0].shape
    strings = [rle.encode(m) for m in some]
    merged = rle.merge(strings, intersect)
    assert merged == coco.merge([theirs(s, height, width) for s in strings], intersect)["counts"]
    expected = np.logical_and.reduce(some) if intersect else np.logical_or.reduce(some)
    np.testing.assert_array_equal(rle.decode(merged, height, width), expected)


@no_deadline
@given(odd_counts(), st.integers(0, 2**32 - 1), st.booleans())
def test_runs_of_length_zero_merge(odd: tuple[bytes, int, int], seed: int, intersect: bool) -> None:
    string, height, width = odd
    other = rle.from_uncompressed(
        [0, 0, *np.bincount(np.random.default_rng(seed).integers(0, 9, height * width)).tolist()]
    )
    merged = rle.merge([string, other], intersect)
    a, b = rle.decode(string, height, width), rle.decode(other, height, width)
    np.testing.assert_array_equal(rle.decode(merged, height, width), a & b if intersect else a | b)
    runs = rle.from_string(string).size + rle.from_string(other).size
    if runs <= height * width:  # else pycocotools may write behind its memory
        official = coco.merge([theirs(string, height, width), theirs(other, height, width)], intersect)["counts"]
        if rle.from_string(official).sum() == height * width:  # it has not broken off
            assert merged == official


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no masks"):
        rle.merge([])


@no_deadline
@given(mask_lists(), st.integers(0, 4))
def test_intersections_are_those_of_the_pixels(some: list[NDArray[np.bool_]], split: int) -> None:
    a, b = some[:split], some[split:]
    areas = rle.intersection_areas([rle.encode(m) for m in a], [rle.encode(m) for m in b])
    assert areas.dtype == np.int64
    assert areas.shape == (len(a), len(b))
    assert areas.tolist() == [[int((m & n).sum()) for n in b] for m in a]


# ------------------------------------------------------------------------------------------------ maps of ids


@no_deadline
@given(
    st.integers(0, 2**32 - 1),
    shapes,
    st.sampled_from(["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u2", ">i4"]),
    layouts,
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
)
def test_the_instances_of_a_map(seed: int, shape: tuple[int, int], dtype: str, layout: str, ids: list[int]) -> None:
    kind = np.dtype(dtype)
    greatest = 1 if kind.kind == "b" else min(int(np.iinfo(kind).max), 2**32 - 1)
    id_map = (np.array(ids) % (greatest + 1))[blobs(seed, shape, len(ids))].astype(kind)
    found = rle.instances_of(laid_out(id_map, layout))
    assert [a.dtype for a in found[:3]] == [np.uint32, np.int64, np.float64]
    present = np.unique(id_map)
    assert found.ids.tolist() == present.tolist()
    official = coco.encode(np.asfortranarray((id_map[:, :, None] == present).astype(np.uint8)))
    assert found.counts == [o["counts"] for o in official]
    assert found.areas.tolist() == coco.area(official).tolist()
    assert found.boxes_xywh.tolist() == coco.toBbox(official).tolist()
    some = rle.instances_of(id_map, {int(present[0]), 77, -1, 2**40})
    kept = (present != present[0]) & (present != 77)
    assert (some.ids.tolist(), some.areas.tolist()) == (present[kept].tolist(), found.areas[kept].tolist())
    assert some.counts == [c for c, k in zip(found.counts, kept, strict=True) if k]
    if kind.itemsize <= 4 and kind.isnative:
        np.testing.assert_array_equal(rle.paint(found.counts, present, *shape, kind), id_map)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_noise_of_many_ids(dtype: type) -> None:
    id_map = np.random.default_rng(0).integers(0, int(np.iinfo(dtype).max) + 1, (150, 70), dtype=dtype)
    found = rle.instances_of(id_map)
    ids, areas = np.unique(id_map, return_counts=True)
    assert (found.ids.tolist(), found.areas.tolist()) == (ids.tolist(), areas.tolist())
    np.testing.assert_array_equal(rle.paint(found.counts, ids, 150, 70, dtype), id_map)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (np.array([[3, -1]]), "id -1"),
        (np.array([[2**32]]), "id 4294967296"),
        (np.array([[0.5]]), "float64"),
        (np.array([1, 2]), "two dimensions"),
    ],
)
def test_what_is_no_map_of_ids_is_refused(bad: NDArray[Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rle.instances_of(bad)


def test_later_masks_are_painted_over_earlier_ones() -> None:
    a, b = np.zeros((2, 4, 5), np.bool_)
    a[:, 1:4], b[2:, 2:] = True, True
    strings = [rle.encode(a), rle.encode(b)]
    for dtype in (np.uint8, np.int16, np.uint32, np.int32):
        painted = rle.paint(strings, [7, 9], 4, 5, dtype)
        assert (painted.dtype, painted.flags.c_contiguous) == (dtype, True)
        np.testing.assert_array_equal(painted, np.where(b, 9, np.where(a, 7, 0)))
    np.testing.assert_array_equal(rle.paint(strings, [-3, 2], 4, 5, np.int8), np.where(b, 2, np.where(a, -3, 0)))
    np.testing.assert_array_equal(rle.paint(strings[::-1], [9, 7], 4, 5, np.uint8), np.where(a, 7, np.where(b, 9, 0)))
    np.testing.assert_array_equal(rle.paint([], [], 4, 5, np.uint8), np.zeros((4, 5)))


@pytest.mark.parametrize(
    ("values", "dtype", "named"),
    [
        ([256], np.uint8, "value 256 does not fit uint8"),
        ([-1], np.uint32, "value -1 does not fit uint32"),
        ([2], np.bool_, "value 2 does not fit bool"),
        ([1.5], np.uint8, "values are integers"),
        ([1, 2], np.uint8, "1 masks need as many values"),
        (1, np.uint8, "1 masks need as many values"),
        ([1], np.int64, "up to 4 bytes"),
        ([1], np.float32, "up to 4 bytes"),
    ],
)
def test_values_that_cannot_be_painted_are_refused(values: Any, dtype: type, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rle.paint([b"6"], values, 2, 3, dtype)


# ------------------------------------------------------------------------------------------------ real data, threads


def test_the_crowds_of_coco(shared_data: Callable[[str], Path]) -> None:
    file = shared_data("data/coco_tiny/annotations/instances_train2017.json")
    content = json.loads(file.read_text())
    crowds = [a["segmentation"] for a in content["annotations"] if a["iscrowd"]]
    assert crowds
    for crowd in crowds:
        height, width = crowd["size"]
        official = coco.frPyObjects(crowd, height, width)
        string = rle.from_uncompressed(crowd["counts"])
        assert string == official["counts"]
        mask = rle.decode(string, height, width)
        np.testing.assert_array_equal(mask, coco.decode(official))
        assert rle.encode(mask) == string
        assert rle.bbox(string, height, width) == tuple(coco.toBbox(official))


def test_first_calls_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.KERNELS, "_built", {})
    rle._compiled.cache_clear()
    maps = [blobs(seed, (30, 50), 9).astype(t) for seed, t in enumerate([np.uint8, np.uint16] * 8)]

    def there_and_back(id_map: NDArray[Any]) -> bool:
        found = rle.instances_of(id_map)
        return np.array_equal(rle.paint(found.counts, found.ids, 30, 50, id_map.dtype), id_map)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, maps * 4))
    rle._compiled.cache_clear()


def test_it_works_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(kernels.KERNELS, "_built", {})
    assert kernels.kernel(kernels.measure)(np.frombuffer(b"231N", np.uint8)) == (4, 7, 4)


def test_importing_does_not_load_numba() -> None:
    code = "import sys, segbatch.codecs.rle, segbatch.codecs.polygon; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
