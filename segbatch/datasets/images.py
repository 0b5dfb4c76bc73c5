"""Photos without labels: a folder, a glob, one file, or a list of URIs."""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from segbatch import storage
from segbatch.datasets import reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, StorageError
from segbatch.records import ClassTable, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

LIST_SUFFIXES = (".txt", ".lst")
"""Files that are read as a list of URIs, one a line."""

_MAGIC = re.compile(r"[*?\[]")
_STAT_THREADS = 16


class Images(Dataset):
    """Whatever holds photos: ``DIR``, ``DIR/**/*.jpg``, ``photo.jpg``, ``list.txt``."""

    name: ClassVar[str] = "images"
    tasks: ClassVar[tuple[Task, ...]] = ()

    def recognises(self, tree: Tree) -> bool:
        """Whether there is at least one photo."""
        try:
            return next(_of_tree(tree), None) is not None
        except ConfigError:
            return False

    def classes(self, tree: Tree) -> ClassTable:
        """Photos have no classes: the empty table."""
        return ClassTable(())

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """Photos have no splits."""
        return ()

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """See ``list_images``.

        Raises:
            ConfigError: a split was asked for, or see ``list_images``.
        """
        reading.choose_splits(self.name, tree.source, (), splits)
        yield from _of_tree(tree)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """One photo, without labels.

        Raises:
            DataError: it is not there, is empty or is not an image.
        """
        data, info = reading.read_photo(item.uri)
        yield reading.sample_of(item, data, info)


def list_images(source: str | Sequence[str]) -> Iterator[PlanItem]:
    """The photos that ``source`` means, as a stream in path order (by folder); a list keeps its own order.

    A folder is searched with its sub-folders, hidden ones left out. In a glob ``*`` and ``?`` stay within a path
    component and ``**`` spans any number of them. In a list file relative lines are meant from the list's folder.
    ``sample_id`` is the path below the folder, below the fixed part of the glob, or below the longest folder that a
    list has in common. A listed photo that is not there stays an item, so that it ends as a row with a reason.

    Raises:
        ConfigError: at once, not on first use: ``source`` is not there, holds no photo, or lists one twice.
    """
    if not isinstance(source, str):
        return _listed(list(source), "the list of images")
    source = storage.resolve(source)
    source = storage.archive_root(source) if storage.is_archive(source) else source
    if _MAGIC.search(source) and not source.startswith(("http://", "https://")) and not storage.exists(source):
        return _globbed(source)
    if source.lower().endswith(LIST_SUFFIXES) and storage.exists(source):
        folder = source.rsplit("/", 1)[0]
        lines = [line.strip() for line in storage.read_lines(source)]
        return _listed([_absolute(line, folder) for line in lines if line], source)
    if source.lower().endswith(IMAGE_SUFFIXES) and not storage.is_folder(source):
        return _single(source)
    if not storage.exists(source):
        raise ConfigError(f"{source} does not exist", "give a folder, a glob, an image or a text file of URIs")
    found = (_item(i, storage.relative(i.uri, source)) for i in storage.list_files(source, IMAGE_SUFFIXES))
    return _not_empty(found, f"{source} holds no image", f"file names that count end in {' '.join(IMAGE_SUFFIXES)}")


def _of_tree(tree: Tree) -> Iterator[PlanItem]:
    """Photos of a source; a folder of archives reads as if they had been unpacked into it."""
    if len(tree.roots) == 1:
        return list_images(tree.source)
    found = (_item(info, path) for path, info in tree.files("", IMAGE_SUFFIXES))
    return _not_empty(found, f"{tree.source} holds no image", f"endings that count: {' '.join(IMAGE_SUFFIXES)}")


def _item(found: ObjectInfo, sample_id: str) -> PlanItem:
    return PlanItem(sample_id=sample_id, uri=found.uri, etag=found.etag, bytes=found.size)


def _not_empty(items: Iterator[PlanItem], problem: str, fix: str) -> Iterator[PlanItem]:
    """The same stream; only its first item is looked at.

    Raises:
        ConfigError: there is none.
    """
    first = next(items, None)
    if first is None:
        raise ConfigError(problem, fix)
    return itertools.chain((first,), items)


def _single(uri: str) -> Iterator[PlanItem]:
    found = storage.stat(uri)
    if found is None:
        raise ConfigError(f"{uri} does not exist", "check the path or URL")
    return iter((_item(found, storage.name_of(uri)),))


def _globbed(pattern: str) -> Iterator[PlanItem]:
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    root, wanted = "/".join(parts[:first]) or "/", parts[first:]
    if not storage.is_folder(root):
        raise ConfigError(f"{root} does not exist", f"it is the fixed part of {pattern}")
    below = ((i, storage.relative(i.uri, root)) for i in _listing(root, wanted))
    found = (_item(i, path) for i, path in below if _matches(path.split("/"), wanted))
    return _not_empty(found, f"{pattern} matches no image", "check the pattern; ** spans sub-folders, * does not")


def _listing(root: str, wanted: Sequence[str]) -> Iterator[ObjectInfo]:
    return storage.list_files(root, IMAGE_SUFFIXES, recursive=len(wanted) > 1 or wanted[0] == "**")


def _matches(path: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the path components match the components of a glob."""
    if not wanted:
        return not path
    if wanted[0] == "**":
        rest = wanted[1:] or ["*"]
        return any(_matches(path[i:], rest) for i in range(len(path)))
    return bool(path) and fnmatch.fnmatchcase(path[0], wanted[0]) and _matches(path[1:], wanted[1:])


def _absolute(line: str, folder: str) -> str:
    return line if "://" in line or line.startswith(("/", "~")) else storage.join(folder, line)


def _listed(lines: list[str], name: str) -> Iterator[PlanItem]:
    uris = [storage.resolve(line) for line in lines]
    if not uris:
        raise ConfigError(f"{name} is empty", "give at least one image")
    seen: set[str] = set()
    for uri in uris:
        if uri in seen:
            raise ConfigError(f"{name} names {uri} twice", "remove one of the lines")
        seen.add(uri)
    return _stated(uris, _common_folder(uris))


def _common_folder(uris: Sequence[str]) -> str:
    """The longest folder that all URIs lie below, with its final slash."""
    low, high = min(uris).split("/")[:-1], max(uris).split("/")[:-1]
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return "".join(f"{part}/" for part, _ in common)


def _stat(uri: str) -> ObjectInfo | None:
    """None also for an address that cannot be one: it becomes a row with a reason, not the end of the run."""
    try:
        return storage.stat(uri)
    except StorageError as error:
        if error.retryable:
            raise
        return None


def _stated(uris: Sequence[str], folder: str) -> Iterator[PlanItem]:
    """Items of a list, in its order; the look-ups overlap, a few hundred ahead of the reader."""
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        for start in range(0, len(uris), 256):
            window = uris[start : start + 256]
            for uri, found in zip(window, pool.map(_stat, window), strict=True):
                yield _item(found or ObjectInfo(uri, reading.MISSING, 0), uri.removeprefix(folder))
