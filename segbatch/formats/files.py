"""What formats share: names that follow from sample ids, and finding them again."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Labels, SampleRef
from segbatch.records import ClassTable, Instance, PlanItem
from segbatch.storage import ObjectInfo

MISSING_PREDICTION = "missing-prediction"
_SHOWN = 3


def stem_of(sample_id: str) -> str:
    """A sample id without the suffix of a photo's file name."""
    return sample_id.rsplit(".", 1)[0] if sample_id.lower().endswith(IMAGE_SUFFIXES) else sample_id


def label_path(sample_id: str, suffix: str) -> str:
    """Relative path of a sample's own file: its id without the photo's suffix, and ``suffix``."""
    return f"{stem_of(sample_id)}{suffix}"


def file_name(row: Labels | SampleRef, suffix: str) -> str:
    """The photo's file name with another suffix."""
    return f"{stem_of(row.image_uri.rstrip('/').rsplit('/', 1)[-1])}{suffix}"


def photo_path(row: Labels | SampleRef) -> str:
    """Relative path of the photo: the end of its address, with as many folders as the sample id has.

    Tools that show photos know them by such paths; the ids of samples need not be names of files.
    """
    parts = row.image_uri.rstrip("/").split("/")
    return "/".join(parts[-(row.sample_id.count("/") + 1) :])


def item_of(sample: SampleRef, uri: str, etag: str, size: int, detail: Mapping[str, Any] | None = None) -> PlanItem:
    """The plan item of a sample's prediction; ``sample`` is kept in its detail for the row that comes of it."""
    kept = {"image_uri": sample.image_uri, "etag": sample.etag, "height": sample.height, "width": sample.width}
    return PlanItem(
        sample_id=sample.sample_id,
        uri=uri,
        etag=f"{sample.etag}+{etag}",
        bytes=size,
        rows=sample.rows,
        detail=json.dumps({**(detail or {}), "sample": kept}),
        group_id=sample.group_id,
        split=sample.split,
    )


def size_of(item: PlanItem) -> tuple[int, int]:
    """Height and width that the prediction has to have."""
    sample = reading.detail_of(item)["sample"]
    return int(sample["height"]), int(sample["width"])


def match_files(
    files: Tree, samples: Iterable[SampleRef], path_of: Callable[[SampleRef], str], suffixes: tuple[str, ...]
) -> Iterator[PlanItem]:
    """One item per sample: the file at ``path_of(sample)``, see ``match_paths``.

    Of the path, as many components belong to the sample as its id has; folders before them are the format's.

    Args:
        files: where to look.
        samples: in the order of the items.
        path_of: the path by the format's rules.
        suffixes: of the files that are predictions.

    Raises:
        ConfigError: no such file at all; files that belong to no sample, named.
    """
    wanted = [(sample, path_of(sample)) for sample in samples]
    own = {path: "/".join(path.split("/")[-(s.sample_id.count("/") + 1) :]) for s, path in wanted}
    found = match_paths(files, own, suffixes)
    for sample, path in wanted:
        info = found.get(path)
        uri = info.uri if info else files.uri(path)
        yield item_of(sample, uri, info.etag if info else reading.MISSING, info.size if info else 0)


def match_paths(files: Tree, paths: Mapping[str, str], suffixes: tuple[str, ...]) -> dict[str, ObjectInfo]:
    """The files that lie at these paths, by path.

    A file may also lie elsewhere if its path ends with the sample's own part of a path, or is the end of that, and if
    it is the only such file for the path, and the path the only one for it: ``item.png`` may stand for
    ``train/item.png`` where no other sample is called ``item``, but ``val/item.png`` never does.

    Args:
        files: where to look.
        paths: relative paths, and of each the end that is the sample's own.
        suffixes: of the files that count.

    Raises:
        ConfigError: there is no such file at all; files that belong to none of the paths, named.
    """
    listing = Listing(files, suffixes)
    found = {path: info for path in paths if (info := listing.pop(path))}
    claims: dict[str, list[str]] = {}
    for path, own in paths.items():
        near = None if path in found else listing.near(own)
        if near is not None:
            claims.setdefault(near, []).append(path)
    for near, claimants in claims.items():
        info = listing.pop(near) if len(claimants) == 1 else None
        if info is not None:
            found[claimants[0]] = info
    listing.refuse_rest()
    return found


class Listing:
    """The files of predictions that are there and have not been taken."""

    def __init__(self, files: Tree, suffixes: tuple[str, ...]) -> None:
        """List all files that end in one of ``suffixes``.

        Raises:
            ConfigError: there is none.
        """
        self._source = files.source
        self._there = dict(files.files("", suffixes))
        if not self._there:
            raise ConfigError(f"{files.source} holds no file that ends in {' '.join(suffixes)}", "check the format")
        self._by_name: dict[str, list[str]] = {}
        for path in self._there:
            self._by_name.setdefault(path.rsplit("/", 1)[-1], []).append(path)

    def pop(self, path: str) -> ObjectInfo | None:
        """Take the file at ``path``; None where there is none."""
        return self._there.pop(path, None)

    def near(self, own: str) -> str | None:
        """The only path that ends with ``own``, or is the end of it; None where there is none, or several."""
        named = self._by_name.get(own.rsplit("/", 1)[-1], ())
        near = [path for path in named if path in self._there and _is_tail(own, path)]
        return near[0] if len(near) == 1 else None

    def take(self, path: str) -> ObjectInfo | None:
        """Take the file at ``path``, or else the only one of that name in whatever folder."""
        return self.pop(path) or self.pop(self.near(path.rsplit("/", 1)[-1]) or "")

    def refuse_rest(self) -> None:
        """Refuse files that were never taken.

        Raises:
            ConfigError: naming the first ones.
        """
        refuse_unknown([info.uri for info in self._there.values()], self._source)


def _is_tail(path: str, other: str) -> bool:
    """Whether one of two paths is the end of the other, in whole components."""
    return f"/{path}".endswith(f"/{other}") or f"/{other}".endswith(f"/{path}")


class PhotoNames:
    """Finds the sample that a tool means by a photo's name.

    A name is the end of the photo's address, or ends like the photo's own path (``photo_path``) and begins otherwise.
    """

    def __init__(self, samples: Iterable[SampleRef]) -> None:
        """Hold the samples; they must all be there before the first is found."""
        self.samples = list(samples)
        self._addresses = [s.image_uri.rstrip("/").split("/") for s in self.samples]
        self._by_tail: dict[int, dict[str, list[int]]] = {}

    def find(self, name: str) -> int | None:
        """Place of the sample in ``samples``; None where no photo is called like that.

        Raises:
            ConfigError: several photos do.
        """
        name = name.strip("/")
        parts = name.split("/")
        found: list[int] = []
        for depth in range(1, len(parts) + 1):
            found = self._at(depth).get("/".join(parts[-depth:]), [])
            if len(found) == 1:
                return found[0] if self._is_called(found[0], name) else None
            if not found:
                return None
        first, second = (self.samples[i].image_uri for i in found[:2])
        raise ConfigError(f"{name!r} may be {first} or {second}", "name the photos with their folders")

    def _is_called(self, place: int, name: str) -> bool:
        sample = self.samples[place]
        return f"/{sample.image_uri}".endswith(f"/{name}") or f"/{name}".endswith(f"/{photo_path(sample)}")

    def _at(self, depth: int) -> dict[str, list[int]]:
        """Places of the samples by the last ``depth`` components of their addresses."""
        if depth not in self._by_tail:
            tails: dict[str, list[int]] = {}
            for place, parts in enumerate(self._addresses):
                tails.setdefault("/".join(parts[-depth:]), []).append(place)
            self._by_tail[depth] = tails
        return self._by_tail[depth]


def label_id_of(name: str, classes: ClassTable) -> int | None:
    """Label id of the class of that name, or None."""
    return next((c.label_id for c in classes.classes if c.name == name), None)


def refuse_unknown(names: list[str], source: str) -> None:
    """Refuse predictions that no sample is known for.

    Raises:
        ConfigError: naming the first ones.
    """
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise ConfigError(
            f"{source} has {len(names)} predictions for images that are not among the samples: {shown}",
            "import against the samples they were made for",
        )


def instance_of(number: int, category_id: int, counts: bytes, size: tuple[int, int], score: float | None) -> Instance:
    """The instance of a mask, with the mask's own box and area.

    Args:
        number: its id.
        category_id: its label id.
        counts: COCO compressed RLE of shape ``size``.
        size: height and width of the image.
        score: confidence 0..1; None where there is none.
    """
    from segbatch.codecs import rle

    return Instance(number, category_id, rle.bbox(counts, *size), float(rle.area(counts)), False, counts, score)


def missing(item: PlanItem) -> DataError:
    """The error of a sample without a prediction."""
    return DataError(f"no prediction at {item.uri}", "add the file", MISSING_PREDICTION, item.uri)


def read_prediction(item: PlanItem) -> NDArray[Any]:
    """The values of an item's PNG, as ``reading.read_label``.

    Raises:
        DataError: ``missing-prediction``; what ``reading.read_label`` finds wrong.
    """
    try:
        return reading.read_label(item.uri)
    except DataError as error:
        raise (missing(item) if error.code == "missing-label" else error) from error


def label_map(item: PlanItem) -> NDArray[np.uint16]:
    """The label ids of an item's PNG as they stand there; uint16 of shape (height, width).

    Raises:
        DataError: as ``read_prediction``; ``label-type``: in colour.
    """
    found = read_prediction(item)
    if found.ndim != 2:
        raise DataError(f"{item.uri} is in colour", "write label ids", "label-type", item.uri)
    return found.astype(np.uint16)


def safe_name(text: str) -> str:
    """``text`` as one component of a path: other characters than letters, digits and ``._-`` become ``_``."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"


def below(files: Tree, folder: str) -> Tree:
    """The tree of one of a tree's folders."""
    return Tree(files.source, tuple(storage.join(root, folder) for root in files.roots))


class OneFile(Tree):
    """A tree that holds a single file, whatever lies beside it."""

    def files(
        self, path: str = "", suffixes: tuple[str, ...] = (), recursive: bool = True
    ) -> Iterator[tuple[str, ObjectInfo]]:
        """See ``Tree.files``."""
        for name, info in super().files(path, suffixes, recursive=False):
            if info.uri == self.source:
                yield name, info

    def stat(self, path: str) -> ObjectInfo | None:
        """See ``Tree.stat``."""
        return super().stat(path) if path == storage.name_of(self.source) else None

    def exists(self, path: str) -> bool:
        """See ``Tree.exists``."""
        return self.is_folder(path) or self.stat(path) is not None

    def folders(self, path: str = "") -> list[str]:
        """See ``Tree.folders``: none."""
        return []

    def is_folder(self, path: str) -> bool:
        """See ``Tree.is_folder``: only the root."""
        return not path


def tree_of(source: str) -> Tree:
    """The tree at the address of predictions: as ``Tree.of``, and a single file is a tree that holds it.

    Raises:
        StorageError: an archive that cannot be read.
    """
    source = storage.resolve(source)
    if not storage.is_archive(source) and not storage.is_folder(source) and storage.stat(source):
        return OneFile(source, (source.rsplit("/", 1)[0],))
    return Tree.of(source)
