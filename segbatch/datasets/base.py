"""What every dataset is to the rest of segbatch: recognise a root, list its samples, read one."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

from segbatch.records import ClassTable, PlanItem, Sample, Task


class Dataset(Protocol):
    """One file per dataset implements this; instances hold no state and open nothing until asked.

    ``source`` is the URI of the dataset's root (local folder, ``s3://`` ...), read through ``segbatch.storage`` only.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[Task, ...]]

    def recognises(self, source: str) -> bool:
        """Whether ``source`` has this dataset's official layout; cheap, reads at most a listing or two."""
        ...

    def classes(self, source: str) -> ClassTable:
        """The class table with the official ids, names and colours."""
        ...

    def splits(self, source: str) -> tuple[str, ...]:
        """The splits that are there, in the official order; empty when the dataset has none."""
        ...

    def items(self, source: str, splits: Sequence[str]) -> Iterator[PlanItem]:
        """Every sample of ``splits`` (all when empty), in the official order, from listings and split files only.

        ``etag`` covers image and labels together, so that a changed label is a changed item; ``detail`` (JSON) holds
        what ``read`` needs.

        Raises:
            ConfigError: a split that is not there, or a root of another layout, naming what was expected.
        """
        ...

    def read(self, item: PlanItem) -> Sample:
        """Read and decode one sample, labels and all.

        Raises:
            DataError: naming the file and the fix: missing label, label map of another size, unknown id.
        """
        ...
