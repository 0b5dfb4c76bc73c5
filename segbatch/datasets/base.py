"""What every dataset is to the rest of segbatch: recognise a root, list its samples, read one."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

from segbatch.datasets.tree import Tree
from segbatch.records import ClassTable, PlanItem, Sample, Task


class Dataset(Protocol):
    """One file per dataset subclasses this; instances hold no state and open nothing until asked.

    A ``Tree`` is the dataset's root: a folder, a bucket's prefix, an archive, or a folder of archives.

    Attributes:
        name: what stands as DATASET on the command line.
        tasks: what its labels are for.
        official_splits: the splits that its owners name, in their order.
        formats: names of ``segbatch export`` in which its owners take results.
        grouped: rows of one ``group_id`` (a video, a volume) belong into one shard.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[Task, ...]]
    official_splits: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]] = ()
    grouped: ClassVar[bool] = False

    def recognises(self, tree: Tree) -> bool:
        """Whether the tree has this dataset's official layout; cheap: looks at a folder or two."""
        ...

    def classes(self, tree: Tree) -> ClassTable:
        """The class table with the official ids, names and colours."""
        ...

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """The splits that are there, in the official order; empty when the dataset has none."""
        ...

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Every sample of ``splits`` (all when empty), in the official order, from listings and split files only.

        ``etag`` covers image and labels together, so that a changed label is a changed item; ``detail`` (JSON) holds
        what ``read`` needs. Every item has a ``uri`` of its own.

        Raises:
            ConfigError: a split that is not there, or a root of another layout, naming what was expected.
        """
        ...

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """Read and decode the samples of an item, labels and all: one of an image, all slices of a volume.

        The n-th has the id ``item.row_id(n)``. What is wrong with single annotations becomes ``Sample.issues``.

        Raises:
            DataError: naming the file and the fix: missing label, label map of another size, unknown id.
        """
        ...
