"""What a shard of ``predict`` reads: photos and CT slices, from files or from a samples table, and how they decode."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from segbatch import tables
from segbatch.codecs import photo
from segbatch.codecs.photo import PhotoInfo
from segbatch.inference import volumes
from segbatch.inference.pipeline import Prepared, fed_size
from segbatch.inference.volumes import Slice
from segbatch.models.base import InputSpec
from segbatch.records import OK, PlanItem

_COLUMNS = ("sample_id", "group_id", "image", "image_format", "image_uri", "etag", "status")


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its bytes, or (None) where to read them; with a ``status`` that is not ok there is none, ``why``.

    Attributes:
        slices: of a CT slice: itself in the middle, its neighbours around it.
    """

    sample_id: str
    group_id: str | None
    uri: str
    etag: str
    data: bytes | None = None
    status: str = OK
    why: str = "rejected at ingest; see the sample's issues"
    slices: tuple[Slice, ...] = ()


def inputs(items: Sequence[PlanItem], slices: int) -> Iterator[Input]:
    """The inputs of a shard in order; a samples table is streamed.

    Args:
        items: of the shard.
        slices: how many neighbouring CT slices the model sees; 0: it reads photos.
    """
    for item in items:
        if item.sample_id:
            found = Input(item.sample_id, None, item.uri, item.etag)
            yield replace(found, status="photo", why="a photo: the model reads CT slices") if slices else found
        elif slices:
            yield from _with_neighbours(item, slices)
        else:
            for batch in tables.batches(item.uri, "samples", (*_COLUMNS, "volume.index"), *_rows(item)):
                yield from map(_photo, batch.to_pylist())


def _rows(item: PlanItem) -> tuple[int, int]:
    return item.row_start, item.row_start + item.rows


def _input(row: Mapping[str, Any]) -> Input:
    return Input(row["sample_id"], row["group_id"], row["image_uri"], row["etag"], row["image"], row["status"])


def _photo(row: Mapping[str, Any]) -> Input:
    """The photo of a samples row."""
    found = _input(row)
    if found.status == OK and row["volume"] is not None:
        return replace(
            found, status="volume", why="a slice of a CT volume; models of CT slices have model.hounsfield set"
        )
    if found.status == OK and row["image_format"] is None:
        return replace(found, status="labels-only", why="its labels were ingested without their photo")
    return found


def _with_neighbours(item: PlanItem, count: int) -> Iterator[Input]:
    """The slices of a range of rows, each with its neighbours; those of other rows of the part are read as well.

    Where a volume ends (or its part), the outermost slice stands for those beyond.
    """
    first, last = _rows(item)
    half = count // 2
    window: deque[tuple[Input, Slice | None]] = deque(maxlen=count)
    start = max(first - half, 0)
    window.extend([(_NOTHING, None)] * (half - (first - start)))
    missing = last + half - start
    for entry in _slices(item.uri, start, last + half):
        missing -= 1
        window.append(entry)
        if len(window) == count:
            yield _middle(window, half)
    for _ in range(missing):
        window.append((_NOTHING, None))
        if len(window) == count:
            yield _middle(window, half)


_NOTHING = Input("", None, "", "")


def _slices(uri: str, start: int, stop: int) -> Iterator[tuple[Input, Slice | None]]:
    columns = tuple(dict.fromkeys((*_COLUMNS, *volumes.COLUMNS)))
    for batch in tables.batches(uri, "samples", columns, start, stop):
        for row in batch.to_pylist():
            yield _input(row), volumes.slice_of(row)


def _middle(window: Sequence[tuple[Input, Slice | None]], half: int) -> Input:
    """The middle slice with its neighbours."""
    found, own = window[half]
    if own is None:
        if found.status != OK:
            return found
        return replace(found, status="photo", why="a photo, or a slice without pixels: the model reads CT slices")
    return replace(found, slices=volumes.with_neighbours(own, [s for _, s in window]))


Fed = Callable[[int, int], tuple[int, int]]
"""(height, width) that an upright photo of (height, width) takes up in the network's input."""

_SPARE = 2  # pixels decoded for each one fed, along each side: the resize that follows still averages


def fed_of(spec: InputSpec) -> Fed | None:
    """How large photos are fed to a network that has them resized; None where every pixel may count."""
    if spec.slices or spec.resize not in ("stretch", "letterbox", "short-side"):
        return None
    return functools.partial(fed_size, spec)


def decoded(item: Input, data: bytes, max_pixels: int, fed: Fed | None = None) -> tuple[NDArray[Any], int, int, int]:
    """The upright photo (h, w, 3) uint8, or the slices (h, w, slices) float32, and stored height, width, orientation.

    Args:
        item: the input.
        data: its file.
        max_pixels: see ``photo.decode``.
        fed: allows a JPEG to come at 1/2, 1/4 or 1/8 of its size, as long as each side keeps at least twice as many
            pixels as are fed. Sides round up, so the last row and column may stand for up to 7 pixels that do not
            exist: the photo is shifted by less than half a fed pixel there, and by less elsewhere. None decodes every
            pixel.

    Raises:
        DataError: it is broken or too large.
    """
    if item.slices:
        stack = volumes.stack(item.slices, item.uri)
        return stack, stack.shape[0], stack.shape[1], 1
    rgb, info = photo.decode(data, item.uri, max_pixels, fed and functools.partial(_least, fed))
    return photo.upright(rgb, info.exif_orientation), info.height, info.width, info.exif_orientation


class Decoder(Protocol):
    """``decoded``, or what stands for it."""

    def __call__(
        self, item: Input, data: bytes, max_pixels: int, fed: Fed | None = None
    ) -> tuple[NDArray[Any], int, int, int]:
        """See ``decoded``."""
        ...


def on_the_photo(prepared: Prepared, height: int, width: int, orientation: int) -> Prepared:
    """What was prepared from a photo decoded at a reduced size, as lying on the whole photo.

    Args:
        prepared: of ``decoded``'s pixels.
        height, width: of the stored photo.
        orientation: EXIF orientation 1..8 of it.
    """
    tall, wide = (width, height) if orientation >= 5 else (height, width)
    return prepared._replace(geometry=prepared.geometry._replace(height=tall, width=wide))


def _least(fed: Fed, info: PhotoInfo) -> tuple[int, int]:
    """Sides on the stored grid that leave ``_SPARE`` pixels for each one that is fed."""
    if info.exif_orientation >= 5:
        wide, tall = fed(info.width, info.height)
    else:
        tall, wide = fed(info.height, info.width)
    return _SPARE * tall, _SPARE * wide
