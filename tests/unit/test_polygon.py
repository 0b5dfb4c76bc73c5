"""Polygons are drawn as by pycocotools, bit for bit; outlines of masks lead back to the masks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools._mask as coco
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch.codecs import polygon, rle

no_deadline = settings(deadline=None, max_examples=100)  # the first example compiles
sides = st.integers(1, 60)
coordinates = st.one_of(
    st.integers(-20, 80),
    st.integers(-200, 800).map(lambda v: v / 10),
    st.integers(0, 600).map(lambda v: v / 10 + 1e-9),
    st.floats(-30, 90),
    st.sampled_from([-3e3, -0.1, -0.05, 0.0, 0.3, 0.49999999, 0.5, 0.7, 3e3]),
)


@st.composite
def polygons(draw: st.DrawFn) -> list[float]:
    """One to fifteen points, some of them repeated, on one line, back and forth, or far outside."""
    points = draw(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=15))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(points) - 1))
        points.insert(at, draw(st.sampled_from([points[at], points[0], points[-1], (points[at][0], points[0][1])])))
    return [c for point in points for c in point]


@st.composite
def blobs(draw: st.DrawFn) -> NDArray[np.bool_]:
    """Masks from noise to single blocks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    block = draw(st.integers(1, 9))
    height, width = draw(sides), draw(sides)
    small = rng.random((height // block + 1, width // block + 1)) < draw(st.sampled_from([0.05, 0.5, 0.9, 1.0]))
    return np.kron(small, np.ones((block, block), np.bool_))[:height, :width]


def official(some: list[Any], height: int, width: int) -> bytes:
    """frPyObjects and merge; frPoly itself, because frPyObjects takes four numbers for a box."""
    counts: bytes = coco.merge(coco.frPoly(some, height, width))["counts"]
    return counts


def even_odd(outlines: list[NDArray[np.float64]], height: int, width: int) -> NDArray[np.bool_]:
    """Exclusive or of the outlines, each drawn by itself."""
    mask = np.zeros((height, width), np.bool_)
    for outline in outlines:
        mask ^= rle.decode(polygon.rasterize([outline], height, width), height, width)
    return mask


def filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without its holes: background that no way over sides and corners leads out of."""
    from scipy import ndimage

    full: NDArray[np.bool_] = ~ndimage.binary_propagation(
        np.pad(np.zeros_like(mask), 1, constant_values=True), np.ones((3, 3)), np.pad(~mask, 1, constant_values=True)
    )[1:-1, 1:-1]
    return full


# ------------------------------------------------------------------------------------------------ drawing


@no_deadline
@given(st.lists(polygons(), min_size=1, max_size=4), sides, sides)
@example([[3.0, 4.0]], 9, 9)
@example([[1.0, 1.0, 7.0, 7.5]], 9, 9)
@example([[0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0, 0.0]], 9, 9)
@example([[-5.0, -5.0, -5.0, 50.0, 50.0, 50.0, 50.0, -5.0]], 9, 9)
@example([[2.0, 2.0] * 4], 9, 9)
@example([[0.4, 0.4, 0.4, 8.4, 8.6, 8.4, 8.6, 0.4, 0.4, 0.4]], 9, 9)
def test_polygons_are_drawn_as_by_pycocotools(some: list[list[float]], height: int, width: int) -> None:
    string = polygon.rasterize(some, height, width)
    assert string == official(some, height, width)
    rle.check(string, height, width)


@no_deadline
@given(st.lists(st.lists(polygons(), max_size=3), max_size=6), sides, sides)
def test_all_masks_of_an_image_at_once(masks: list[list[list[float]]], height: int, width: int) -> None:
    drawn = polygon.rasterize_all(masks, height, width)
    assert drawn == [polygon.rasterize(mask, height, width) for mask in masks]


@pytest.mark.parametrize("seed", range(20))
def test_large_outlines_in_large_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 2000, 2))
    points = int(rng.integers(3, 300))
    angle = np.sort(rng.random(points)) * 2 * np.pi
    radius = rng.random(points) * rng.integers(1, 1500)
    star = np.stack([width / 2 + radius * np.cos(angle), height / 2 + radius * np.sin(angle)], axis=1)
    for points_xy in (star, star.round(2), star.round(), rng.random((points, 2)) * (2 * width, height)):
        flat = points_xy.ravel()
        assert polygon.rasterize([flat], height, width) == official([flat], height, width)


def test_every_polygon_of_coco(shared_data: Callable[[str], Path]) -> None:
    content = json.loads(shared_data("data/coco_tiny/annotations/instances_train2017.json").read_text())
    size_of = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    masks = [(a["segmentation"], *size_of[a["image_id"]]) for a in content["annotations"] if not a["iscrowd"]]
    assert len(masks) > 400
    for some, height, width in masks:
        string = polygon.rasterize(some, height, width)
        assert string == coco.merge(coco.frPyObjects(some, height, width))["counts"]
        found = polygon.contours(rle.decode(string, height, width))
        if not found.holes:
            assert polygon.rasterize(found.outers, height, width) == string


def test_coordinates_cost_nothing_outside_the_image() -> None:
    far = polygon.rasterize([[-2e8, -2e8, -2e8, 2e8, 2e8, 2e8, 2e8, -2e8]], 5, 4)
    assert far == rle.encode(np.ones((5, 4), np.bool_))
    assert polygon.rasterize([[-2e8, 1, 2e8, 1, 2e8, 2, -2e8, 2]], 5, 4) == official([[0, 1, 4, 1, 4, 2, 0, 2]], 5, 4)


def test_nothing_to_draw() -> None:
    empty = rle.encode(np.zeros((5, 4), np.bool_))
    for some in ([], [[]], [[1.0, 2.0]], [[1.0, 1.0, 3.0, 4.0]], [[], [1, 2]]):
        assert polygon.rasterize(some, 5, 4) == empty
    assert polygon.rasterize_all([], 5, 4) == []
    assert polygon.rasterize_all([[], [[]]], 5, 4) == [empty, empty]
    for size in ((0, 4), (4, 0), (0, 0)):
        assert polygon.rasterize([[0, 0, 0, 3, 3, 3]], *size) == b"0"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ([0, 0, 5, 5, np.nan, 1], "not finite or beyond 2e.08"),
        ([0, 0, 5, 5, np.inf, 1], "not finite or beyond 2e.08"),
        ([0, 0, 5, 5, -1e30, 1], "not finite or beyond 2e.08"),
        ([0, 0, 5, 5, 1], "5 coordinates"),
        ([[0, 0], [5, 5], [0, 5]], r"shape \(3, 2\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(bad: Any, named: str) -> None:
    good = [0, 0, 0, 3, 3, 3]
    with pytest.raises(ValueError, match=named):
        polygon.rasterize([good, bad], 9, 9)
    if "shape" not in named:
        with pytest.raises(ValueError, match="mask 1 "):
            polygon.rasterize_all([[good], [bad]], 9, 9)


def test_impossible_sizes_and_endless_outlines_are_refused() -> None:
    with pytest.raises(ValueError, match="-1 x 4"):
        polygon.rasterize([[0, 0, 0, 3, 3, 3]], -1, 4)
    with pytest.raises(ValueError, match="65536 x 65536"):
        polygon.rasterize([[0, 0, 0, 3, 3, 3]], 2**16, 2**16)
    with pytest.raises(ValueError, match="mask 1 cannot be drawn"):
        polygon.rasterize_all([[], [np.tile([0.0, 0, 2e6, 1], 9)]], 2, 2_000_000)


# ------------------------------------------------------------------------------------------------ figures, problems


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([0, 0, 4, 0, 4, 3], 6.0),
        ([4, 3, 4, 0, 0, 0], 6.0),
        ([1e6, 1e6, 1e6 + 0.5, 1e6, 1e6 + 0.5, 1e6 + 0.5, 1e6, 1e6 + 0.5], 0.25),
        ([0, 0, 2, 2, 2, 0, 0, 2], 0.0),
        ([0, 0, 1, 1], 0.0),
        ([], 0.0),
    ],
)
def test_areas(points: list[float], area: float) -> None:
    assert polygon.area_of(points) == area


def test_the_area_of_an_odd_list_is_refused() -> None:
    with pytest.raises(ValueError, match="5 coordinates"):
        polygon.area_of([0, 0, 1, 1, 2])


@pytest.mark.parametrize(
    ("points", "codes"),
    [
        ([0, 0, 20, 0, 20, 10], []),
        ([0, 0, 19.5, 0.25, 7, 10], []),
        ([], ["empty-polygon"]),
        ([0, 0, 5, 5], ["empty-polygon"]),
        ([0, 0, 5, 5, 5, 0, 1], ["empty-polygon"]),
        ([0, 0, 5, np.nan, 5, 0], ["empty-polygon"]),
        ([0, 0, 5, 5, 1e9, 0], ["empty-polygon"]),
        ([3, 3, 3, 3, 3, 3], ["zero-area"]),
        ([0.1, 0.1, 0.2, 0.2, 0.7, 0.7], ["zero-area"]),
        ([0, 0, 0.02, 0, 0, 0.01], []),
        ([0, 0, 20.5, 0, 7, 10], ["outside-image"]),
        ([0, 0, 20, 0, 7, 10.5], ["outside-image"]),
        ([-0.1, 0, 20, 0, 7, 10], ["outside-image"]),
        ([0, 0, 30, 0, 40, 0], ["zero-area", "outside-image"]),
    ],
)
def test_problems(points: list[float], codes: list[str]) -> None:
    assert polygon.problems(points, 10, 20) == codes


@no_deadline
@given(polygons())
def test_what_has_no_problem_can_be_drawn(points: list[float]) -> None:
    if "empty-polygon" not in polygon.problems(points, 30, 40):
        rle.check(polygon.rasterize([points], 30, 40), 30, 40)


# ------------------------------------------------------------------------------------------------ outlines


@no_deadline
@given(blobs())
def test_outlines_lead_back_to_the_mask(mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    found = polygon.contours(mask)
    without_holes = filled(mask)
    drawn = rle.decode(polygon.rasterize(found.outers, height, width), height, width)
    np.testing.assert_array_equal(drawn, without_holes)
    assert bool(found.holes) == bool((without_holes != mask).any())
    np.testing.assert_array_equal(even_odd([*found.outers, *found.holes], height, width), mask)


@no_deadline
@given(blobs())
def test_outlines_are_regions_of_whole_corners(mask: NDArray[np.bool_]) -> None:
    from scipy import ndimage

    found = polygon.contours(mask.view(np.uint8) * np.uint8(200))
    assert len(found.outers) == ndimage.label(mask)[1]
    outside = np.pad(~mask, 1, constant_values=True)
    assert len(found.holes) == ndimage.label(outside, np.ones((3, 3)))[1] - 1
    area = sum(map(polygon.area_of, found.outers)) - sum(map(polygon.area_of, found.holes))
    assert area == mask.sum()
    for outline in [*found.outers, *found.holes]:
        assert outline.dtype == np.float64
        assert (outline == outline.round()).all()
        steps = np.diff(np.append(outline, outline[:2]).reshape(-1, 2), axis=0) != 0
        assert (steps.sum(axis=1) == 1).all()  # along one axis
        assert (steps != np.roll(steps, 1, axis=0)).all()  # and then along the other


def test_a_ring_with_an_island_and_two_pixels_that_touch() -> None:
    mask = np.array(
        [
            [1, 1, 1, 1, 1, 0, 0],
            [1, 0, 0, 0, 1, 0, 0],
            [1, 0, 1, 0, 1, 0, 0],
            [1, 0, 0, 0, 1, 0, 1],
            [1, 1, 1, 1, 1, 1, 0],
        ],
        np.bool_,
    )
    found = polygon.contours(mask)
    assert [p.tolist() for p in found.outers] == [
        [5, 0, 5, 4, 6, 4, 6, 5, 0, 5, 0, 0],
        [3, 2, 3, 3, 2, 3, 2, 2],
        [7, 3, 7, 4, 6, 4, 6, 3],
    ]
    assert [p.tolist() for p in found.holes] == [[4, 4, 4, 1, 1, 1, 1, 4]]


def test_masks_without_outline_and_other_arrays() -> None:
    assert polygon.contours(np.zeros((4, 5), np.bool_)) == ([], [])
    assert polygon.contours(np.zeros((0, 5), np.bool_)) == ([], [])
    assert [p.tolist() for p in polygon.contours(np.ones((4, 5), np.bool_)).outers] == [[5, 0, 5, 4, 0, 4, 0, 0]]
    for bad in (np.zeros((2, 2)), np.zeros(4, np.bool_)):
        with pytest.raises(ValueError, match="a mask is bool or uint8 of two dimensions"):
            polygon.contours(bad)
