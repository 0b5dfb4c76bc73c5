"""Drawn photos of retail shelves with exact masks: data for the demo, for tests and for a first training run.

Every facing of a product and every empty facing (gap) is an object of its own.

The classes cannot be told by colour. Walls, boards, price rails, products and the backs of empty facings take their
colours from one palette, and light, tint, blur and noise change from photo to photo; only shape, shading and place
tell them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

BACKGROUND, BOARD, RAIL, PRODUCT, GAP, VOID = range(6)

CLASSES_TOML = """\
# Drawn by segbatch. Background: wall, header, floor, and the back of the shelf above and beside products.
[[classes]]
id = 0
name = "background"
color = [70, 70, 70]

[[classes]]
id = 1
name = "shelf board"
color = [244, 164, 96]

[[classes]]
id = 2
name = "price rail"
color = [255, 215, 0]

[[classes]]
id = 3
name = "product"
color = [30, 144, 255]
isthing = true

[[classes]]
id = 4
name = "gap"
color = [220, 20, 60]
isthing = true

[[classes]]
id = 5
name = "void"
color = [0, 0, 0]
ignore = true
"""

_EVERY_VAL = 5
_OVERSAMPLING = 2
_MARGIN = 0.08

_PALETTE = np.array(
    [
        [236, 234, 228],
        [205, 203, 198],
        [150, 150, 152],
        [92, 92, 96],
        [44, 44, 50],
        [196, 160, 116],
        [138, 98, 66],
        [190, 44, 44],
        [40, 80, 160],
        [60, 130, 70],
        [232, 196, 60],
        [226, 128, 44],
        [120, 60, 120],
        [120, 180, 200],
    ],
    np.float32,
)

Photo = NDArray[np.uint8]
Mask = NDArray[np.uint8]
Objects = NDArray[np.uint16]


class Shelf(NamedTuple):
    """A drawn photo and its truth.

    Attributes:
        photo: RGB, uint8 of shape (height, width, 3).
        mask: label ids, uint8 of shape (height, width).
        objects: a number for every product and gap, 0 elsewhere, uint16 of shape (height, width).
        quality: of the JPEG file.
    """

    photo: Photo
    mask: Mask
    objects: Objects
    quality: int


def draw(out_dir: str, count: int = 300, seed: int = 0, height: int = 192, width: int = 256) -> None:
    """Write an ``image-masks`` tree: ``images/{train,val}/shelf_0001.jpg``, ``masks/...png``, ``instances/...png``,
    ``classes.toml``.

    Every fifth photo is of split ``val``. A photo depends on ``seed``, its number and the size alone, so that more of
    them leave the first ones as they are. The bytes are the same again on one machine.

    Args:
        out_dir: local folder; made when it is not there.
        count: photos, >= 1.
        seed: another seed draws other shops.
        height, width: of the photos in pixels, >= 64.

    Raises:
        ValueError: a count or size out of range.
    """
    if count < 1 or min(height, width) < 64:
        raise ValueError(f"cannot draw {count} shelves of {width} x {height}: at least 1, of at least 64 x 64")
    root = Path(out_dir)
    for folder in ("images", "masks", "instances"):
        for split in ("train", "val"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
    (root / "classes.toml").write_text(CLASSES_TOML, encoding="utf-8")
    for number in range(1, count + 1):
        drawn = shelf(np.random.default_rng([seed, number]), height, width)
        stem = f"{'train' if number % _EVERY_VAL else 'val'}/shelf_{number:04d}"
        jpeg = _encoded(".jpg", drawn.photo[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, drawn.quality)
        (root / f"images/{stem}.jpg").write_bytes(jpeg)
        for folder, pixels in (("masks", drawn.mask), ("instances", drawn.objects)):
            (root / f"{folder}/{stem}.png").write_bytes(_encoded(".png", pixels, cv2.IMWRITE_PNG_COMPRESSION, 6))


def shelf(rng: np.random.Generator, height: int, width: int) -> Shelf:
    """One photo of (height, width) pixels."""
    canvas = tuple(round(side * (1 + 2 * _MARGIN) * _OVERSAMPLING) for side in (height, width))
    scene = _Scene(rng, np.zeros((*canvas, 3), np.uint8), np.zeros(canvas, np.uint8), np.zeros(canvas, np.uint16))
    _furnish(scene)
    photo, mask, objects = _seen_from_aside(scene, height, width)
    if rng.random() < 0.2:
        _shopper(rng, photo, mask)
        objects[mask == VOID] = 0
    return Shelf(_developed(rng, photo), mask, objects, int(rng.integers(72, 93)))


def _encoded(suffix: str, pixels: NDArray[np.uint8] | NDArray[np.uint16], option: int, value: int) -> bytes:
    _, data = cv2.imencode(suffix, np.ascontiguousarray(pixels), [option, value])
    return data.tobytes()


@dataclass(frozen=True)
class _Scene:
    """A canvas, its labels and objects, and the dice. Boxes are (top, bottom, left, right) in canvas pixels."""

    rng: np.random.Generator
    photo: Photo
    mask: Mask
    objects: Objects

    @property
    def unit(self) -> float:
        """Pixels per 1/200 of the canvas height."""
        return float(self.photo.shape[0]) / 200

    def pixels(self, low: float, high: float) -> int:
        """A random length between ``low`` and ``high`` units, at least one pixel."""
        return max(1, round(self.rng.uniform(low, high) * self.unit))

    def color(self) -> NDArray[np.float32]:
        """A random colour of the one palette that everything shares."""
        base = _PALETTE[self.rng.integers(len(_PALETTE))]
        color: NDArray[np.float32] = np.clip(base + self.rng.normal(0, 12, 3), 8, 250).astype(np.float32)
        return color

    def paint(self, box: tuple[int, int, int, int], color: NDArray[np.float32], label: int) -> Photo:
        """Fill a box and label it; returns the pixels as a view to draw on."""
        top, bottom, left, right = box
        self.photo[top:bottom, left:right] = color.astype(np.uint8)
        self.mask[top:bottom, left:right] = label
        self.objects[top:bottom, left:right] = 0
        return self.photo[top:bottom, left:right]

    def new_object(self) -> int:
        """A number that no object has."""
        return int(self.objects.max()) + 1


def _furnish(scene: _Scene) -> None:
    """Header, two or three rows of bays with their boards and rails, floor."""
    tall, wide = scene.mask.shape
    rows = int(scene.rng.integers(2, 4))
    top, floor = scene.pixels(22, 36), tall - scene.pixels(18, 30)
    _header(scene, (0, top, 0, wide))
    back, board, rail = scene.color(), scene.color(), scene.color()
    depth, edge = scene.pixels(9, 13), scene.pixels(11, 15)
    for row in range(rows):
        low, high = (top + (floor - top) * i // rows for i in (row, row + 1))
        _bay(scene, (low, high - depth - edge, 0, wide), back)
        _board(scene, (high - depth - edge, high - edge, 0, wide), board)
        _rail(scene, (high - edge, high, 0, wide), rail)
    _floor(scene, (floor, tall, 0, wide))


def _header(scene: _Scene, box: tuple[int, int, int, int]) -> None:
    """A wall, often with a sign whose stripes, discs and lettering look like packaging."""
    area = scene.paint(box, scene.color(), BACKGROUND)
    _scale(area, np.linspace(scene.rng.uniform(0.6, 0.9), 1.1, area.shape[0])[:, None])
    if scene.rng.random() < 0.7:
        left = int(scene.rng.integers(0, area.shape[1] // 3))
        right = int(scene.rng.integers(area.shape[1] // 2, area.shape[1]))
        sign = area[area.shape[0] // 3 :, left:right]
        sign[:] = scene.color().astype(np.uint8)
        _lettering(scene, sign, scene.color())


def _floor(scene: _Scene, box: tuple[int, int, int, int]) -> None:
    """Tiles; the joints run like the edges of boards."""
    area = scene.paint(box, scene.color(), BACKGROUND)
    joint = area[0, 0] * scene.rng.uniform(0.6, 0.9)
    for y in range(scene.pixels(3, 9), area.shape[0], scene.pixels(8, 14)):
        area[y : y + 2] = joint
    step = scene.pixels(25, 60)
    for x in range(int(scene.rng.integers(step)), area.shape[1], step):
        area[:, x : x + 2] = joint
    shadow = scene.pixels(3, 8)
    _scale(area[:shadow], np.linspace(0.35, 1, min(shadow, area.shape[0]))[:, None])


def _board(scene: _Scene, box: tuple[int, int, int, int], color: NDArray[np.float32]) -> None:
    """The top of a board: smooth, darker towards the back where products throw their shadow; sometimes grained."""
    area = scene.paint(box, color, BOARD)
    if scene.rng.random() < 0.5:
        grain = cv2.GaussianBlur(scene.rng.normal(0, 1, area.shape[:2]).astype(np.float32), (0, 0), 12, sigmaY=0.8)
        _scale(area, 1 + 0.08 * grain / max(float(grain.std()), 1e-6))
    _scale(area, np.linspace(scene.rng.uniform(0.45, 0.6), 1.08, area.shape[0])[:, None])


def _rail(scene: _Scene, box: tuple[int, int, int, int], color: NDArray[np.float32]) -> None:
    """The front edge with a lit upper lip, a shadow below, and price tags in the colours of labels."""
    area = scene.paint(box, color, RAIL)
    lip = max(2, area.shape[0] // 8)
    _scale(area, np.linspace(1.1, 0.85, area.shape[0])[:, None])
    area[:lip] = np.minimum(area[:lip].astype(np.int32) + 70, 255)
    area[-lip:] = area[-lip:] // 2
    tag_color, x = scene.color(), scene.pixels(0, 12)
    while x < area.shape[1]:
        wide = scene.pixels(12, 18)
        tag = area[lip + 1 : -lip - 1, x : x + wide]
        if scene.rng.random() < 0.85 and tag.size:
            tag[:] = (scene.color() if scene.rng.random() < 0.2 else tag_color).astype(np.uint8)
            _lettering(scene, tag, _contrast(tag_color))
        x += wide + scene.pixels(3, 26)


def _bay(scene: _Scene, box: tuple[int, int, int, int], back: NDArray[np.float32]) -> None:
    """The space over a board: its back, facings of several products, and empty facings."""
    top, bottom, _, wide = box
    area = scene.paint(box, back * scene.rng.uniform(0.35, 0.75), BACKGROUND)
    _scale(area, np.linspace(0.45, 1.1, area.shape[0])[:, None])
    x = -scene.pixels(0, 15)
    while x < wide:
        if scene.rng.random() < 0.2:
            gap = scene.pixels(22, 48)
            _gap(scene, (top, bottom, max(x, 0), min(x + gap, wide)))
            x += gap
            continue
        product = _product(scene, bottom - top)
        for _ in range(int(scene.rng.integers(1, 5))):
            _stand(scene, product, bottom, x)
            x += product[0].shape[1]


def _gap(scene: _Scene, box: tuple[int, int, int, int]) -> None:
    """An empty facing: only the back is seen, darker where the neighbours shade it."""
    top, bottom, left, right = box
    if right <= left:
        return
    scene.mask[top:bottom, left:right] = GAP
    scene.objects[top:bottom, left:right] = scene.new_object()
    area = scene.photo[top:bottom, left:right]
    across = np.abs(np.linspace(-1, 1, right - left))
    _scale(area, (1 - 0.45 * across**4)[None, :])


Product = tuple[Photo, NDArray[np.bool_]]


def _product(scene: _Scene, room: int) -> Product:
    """A new product: its front (RGB) and silhouette."""
    high = round(room * scene.rng.uniform(0.76, 0.98))
    wide = min(scene.pixels(15, 30), max(4, round(high * 0.9)))
    front = np.empty((high, wide, 3), np.uint8)
    front[:] = scene.color().astype(np.uint8)
    kinds: tuple[Callable[[_Scene, Photo], NDArray[np.bool_]], ...] = (_box, _can, _bottle)
    silhouette = kinds[int(scene.rng.integers(len(kinds)))](scene, front)
    return front, silhouette


def _stand(scene: _Scene, product: Product, bottom: int, x: int) -> None:
    """Put one facing on the board, cropped to the canvas, its brightness slightly its own."""
    front, silhouette = product
    left, right = max(x, 0), min(x + front.shape[1], scene.mask.shape[1])
    if right <= left:
        return
    rows, part = slice(bottom - front.shape[0], bottom), slice(left - x, right - x)
    inside = silhouette[:, part]
    lit = np.clip(front[:, part] * scene.rng.uniform(0.85, 1.08), 0, 255).astype(np.uint8)
    scene.photo[rows, left:right][inside] = lit[inside]
    scene.mask[rows, left:right][inside] = PRODUCT
    scene.objects[rows, left:right][inside] = scene.new_object()


def _box(scene: _Scene, front: Photo) -> NDArray[np.bool_]:
    """A carton: flat, with bands, a label and dark edges."""
    high, wide = front.shape[:2]
    if scene.rng.random() < 0.5:
        step = scene.pixels(4, 9)
        for y in range(0, high, 2 * step):
            front[y : y + step] = front[0, 0] * np.float32(0.7)
    _label(scene, front, 0.12)
    _scale(front[:, : max(1, wide // 12)], np.full((1, 1), 1.25))
    _scale(front[:, -max(1, wide // 10) :], np.full((1, 1), 0.5))
    return np.ones((high, wide), np.bool_)


def _can(scene: _Scene, front: Photo) -> NDArray[np.bool_]:
    """A can: round, so bright in the middle and dark at the sides, with a lid."""
    high, wide = front.shape[:2]
    _label(scene, front, 0.0)
    lid = max(2, high // 12)
    front[:lid] = (190, 190, 190)
    front[-lid:] = (120, 120, 120)
    _round(front)
    return np.ones((high, wide), np.bool_)


def _bottle(scene: _Scene, front: Photo) -> NDArray[np.bool_]:
    """A bottle: as round as a can, with shoulders and a neck beside which the back is seen."""
    high, wide = front.shape[:2]
    neck, shoulder = round(high * scene.rng.uniform(0.14, 0.24)), round(high * 0.3)
    _label(scene, front[shoulder:], 0.0)
    front[: max(2, neck // 2)] = scene.color().astype(np.uint8)
    _round(front)
    half = np.full(high, wide / 2)
    half[:neck] = wide * 0.2
    half[neck:shoulder] = np.linspace(wide * 0.2, wide / 2, shoulder - neck)
    inside: NDArray[np.bool_] = np.abs(np.arange(wide) + 0.5 - wide / 2)[None, :] <= half[:, None]
    return inside


def _label(scene: _Scene, front: Photo, inset: float) -> None:
    """A label with a logo and lines of print, on any product."""
    high, wide = front.shape[:2]
    top, bottom = round(high * scene.rng.uniform(0.15, 0.35)), round(high * scene.rng.uniform(0.6, 0.9))
    label = front[top:bottom, round(wide * inset) : wide - round(wide * inset)]
    if not label.size:
        return
    label[:] = scene.color().astype(np.uint8)
    logo = tuple(float(c) for c in scene.color())
    middle = (label.shape[1] // 2, label.shape[0] // 3)
    size = (max(1, label.shape[1] // 3), max(1, label.shape[0] // 5))
    canvas = np.ascontiguousarray(label)
    cv2.ellipse(canvas, middle, size, float(scene.rng.uniform(-30, 30)), 0, 360, logo, -1, cv2.LINE_AA)
    label[:] = canvas
    _lettering(scene, label[label.shape[0] // 2 :], scene.color())


def _lettering(scene: _Scene, area: Photo, color: NDArray[np.float32]) -> None:
    """Lines of print: bars of random length, as text looks from afar."""
    high, wide = area.shape[:2]
    stroke = max(1, round(scene.unit))
    for y in range(stroke, high - stroke, 3 * stroke):
        x = stroke
        while x < wide - stroke:
            length = int(scene.rng.integers(stroke, 5 * stroke))
            area[y : y + stroke, x : min(x + length, wide - stroke)] = color.astype(np.uint8)
            x += length + stroke


def _contrast(color: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.full(3, 25 if color.mean() > 110 else 235, np.float32)


def _round(front: Photo) -> None:
    across = np.linspace(-1, 1, front.shape[1])
    _scale(front, (1.15 - 0.7 * np.abs(across - 0.15) ** 2.5)[None, :])


def _scale(area: Photo, factor: NDArray[np.floating]) -> None:
    """Multiply the brightness in place; ``factor`` broadcasts over (height, width)."""
    area[:] = np.clip(area * factor[..., None], 0, 255).astype(np.uint8)


def _seen_from_aside(scene: _Scene, height: int, width: int) -> tuple[Photo, Mask, Objects]:
    """Perspective: the corners of the photo lie somewhere in the canvas's margin."""
    tall, wide = scene.mask.shape
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    inset = scene.rng.uniform(0.1 * _MARGIN, _MARGIN / (1 + 2 * _MARGIN) * 1.6, (4, 2)).astype(np.float32)
    source = (corners + inset * (1 - 2 * corners)) * np.array([wide, tall], np.float32)
    size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    matrix = cv2.getPerspectiveTransform(source, corners * np.array(size, np.float32))
    photo = cv2.warpPerspective(scene.photo, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask, objects = (
        cv2.warpPerspective(m, matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
        for m in (scene.mask, scene.objects)
    )
    small = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    every = np.s_[::_OVERSAMPLING, ::_OVERSAMPLING]
    return small, np.ascontiguousarray(mask[every], np.uint8), np.ascontiguousarray(objects[every], np.uint16)


def _shopper(rng: np.random.Generator, photo: Photo, mask: Mask) -> None:
    """Somebody out of focus before the shelf; labelled void."""
    height, width = mask.shape
    x, head = rng.uniform(0.1, 0.9) * width, height * rng.uniform(0.06, 0.09)
    y = height * rng.uniform(0.55, 0.75)
    outline = np.zeros_like(mask)
    cv2.ellipse(outline, (round(x), round(y)), (round(head), round(head * 1.3)), 0, 0, 360, 255, -1)
    cv2.ellipse(outline, (round(x), round(y + 5 * head)), (round(2.4 * head), round(3.6 * head)), 0, 0, 360, 255, -1)
    soft = cv2.GaussianBlur(outline, (0, 0), height / 90)[..., None].astype(np.float32) / 255
    tone = _PALETTE[rng.integers(len(_PALETTE))] * rng.uniform(0.4, 1.0)
    photo[:] = (photo * (1 - soft) + tone * soft).astype(np.uint8)
    mask[soft[..., 0] > 0.05] = VOID


def _developed(rng: np.random.Generator, photo: Photo) -> Photo:
    """Light falling off to one side, a tint, blur and sensor noise."""
    height, width = photo.shape[:2]
    down, across = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    slope_y, slope_x = rng.uniform(-0.2, 0.2, 2)
    light = rng.uniform(0.75, 1.1) * (1 + slope_y * down + slope_x * across)
    tint = rng.uniform(0.85, 1.12, 3)
    lit = (photo * light[..., None] * tint).astype(np.float32)
    blurred = cv2.GaussianBlur(lit, (0, 0), float(rng.uniform(0.3, 0.8)))
    noise = rng.normal(0, rng.uniform(2, 7), photo.shape)
    developed: Photo = np.clip(blurred + noise, 0, 255).astype(np.uint8)
    return developed
