"""The root of a dataset as one tree of files, wherever its parts lie."""

from collections.abc import Iterator
from dataclasses import dataclass

from segbatch import storage
from segbatch.errors import StorageError
from segbatch.storage import ObjectInfo


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder, a bucket's prefix, an archive, or a folder of archives that are laid over each other.

    COCO, Cityscapes and BDD100K come as several archives that are meant to be unpacked into one folder: such a folder
    of archives reads like the unpacked one. Paths are relative, with ``/``; the empty path is the root.

    Attributes:
        source: the address that the user gave.
        roots: addresses of the folders whose contents make the tree; where two have the same file, the first counts.
    """

    source: str
    roots: tuple[str, ...]

    @classmethod
    def of(cls, source: str) -> "Tree":
        """The tree at an address; nothing has to be there yet.

        Raises:
            StorageError: an archive that cannot be read.
        """
        source = storage.resolve(source)
        if storage.is_archive(source):
            return cls(source, (storage.archive_root(source),))
        archives = [i.uri for i in storage.list_files(source, recursive=False) if storage.is_archive(i.uri)]
        try:
            return cls(source, (source, *(storage.archive_root(a) for a in archives)))
        except StorageError as error:
            if error.retryable:
                raise
            raise StorageError(error.problem, f"{error.fix}, or move it out of {source}") from error

    def candidates(self) -> Iterator["Tree"]:
        """This tree, then what lies below while there is but one folder: archives often hold all in one."""
        tree = self
        yield tree
        while len(tree.folders()) == 1 and next(tree.files(recursive=False), None) is None:
            tree = Tree(self.source, tuple(storage.join(r, tree.folders()[0]) for r in tree.roots))
            yield tree

    def uri(self, path: str) -> str:
        """Address of a file or folder: in the root that has it; in the first one where none has."""
        if len(self.roots) > 1:
            for root in self.roots:
                if storage.exists(storage.join(root, path)):
                    return storage.join(root, path)
        return storage.join(self.roots[0], path)

    def stat(self, path: str) -> ObjectInfo | None:
        """Tag and size of a file, or None."""
        return next((i for r in self.roots if (i := storage.stat(storage.join(r, path)))), None)

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return any(storage.exists(storage.join(r, path)) for r in self.roots)

    def is_folder(self, path: str) -> bool:
        """Whether there is such a folder."""
        return any(storage.is_folder(storage.join(r, path) if path else r) for r in self.roots)

    def folders(self, path: str = "") -> list[str]:
        """Names of the folders directly below ``path``, sorted; none when it is not there."""
        return sorted({f for r in self.roots for f in storage.list_folders(storage.join(r, path) if path else r)})

    def files(
        self, path: str = "", suffixes: tuple[str, ...] = (), recursive: bool = True
    ) -> Iterator[tuple[str, ObjectInfo]]:
        """Files below ``path`` with their paths relative to it, root by root, each in listing order.

        Args:
            path: a folder; one that is not there has no files.
            suffixes: lower-case endings to keep; all when empty.
            recursive: also look into sub-folders.
        """
        seen: set[str] = set()
        for root in self.roots:
            folder = storage.join(root, path) if path else root
            for info in storage.list_files(folder, suffixes, recursive):
                below = storage.relative(info.uri, folder)
                if len(self.roots) == 1:
                    yield below, info
                elif below not in seen and not (not path and storage.is_archive(info.uri)):
                    seen.add(below)
                    yield below, info

    def read_bytes(self, path: str) -> bytes:
        """The whole file.

        Raises:
            ObjectMissing: it is not there.
        """
        return storage.read_bytes(self.uri(path))

    def read_lines(self, path: str) -> list[str]:
        """The lines of a text file, without line ends.

        Raises:
            ObjectMissing: it is not there.
        """
        return list(storage.read_lines(self.uri(path)))
