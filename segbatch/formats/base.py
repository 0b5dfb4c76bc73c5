"""What every format is to the rest of segbatch: write rows as its owner's server takes them, and read them back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from segbatch.datasets.tree import Tree
from segbatch.records import ClassTable, Instance, PlanItem, Prediction, Segment, Task, VolumeSlice

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Labels:
    """What a row says of its image: a prediction, or ground truth.

    Attributes:
        sample_id, group_id, split, image_uri, attributes: of the sample.
        height, width: of the stored pixel grid.
        semantic: label ids, uint16 of shape (height, width), or None.
        instances: None where the task was not run; ``score`` is None in ground truth.
        panoptic: n + 1 for ``segments[n]``, 0 for void; uint16 of shape (height, width), or None.
        label_maps: further label maps by name.
        volume: of a CT slice.
        is_truth: the row is ground truth.
    """

    sample_id: str
    image_uri: str
    height: int
    width: int
    group_id: str = ""
    split: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    semantic: NDArray[np.uint16] | None = None
    instances: tuple[Instance, ...] | None = None
    panoptic: NDArray[np.uint16] | None = None
    segments: tuple[Segment, ...] | None = None
    label_maps: Mapping[str, NDArray[np.uint16]] = field(default_factory=dict)
    volume: VolumeSlice | None = None
    is_truth: bool = False


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A row of the samples table without its pixels: what a prediction has to fit.

    Attributes:
        rows: 1, or the slices of the volume that it is the first slice of.
    """

    sample_id: str
    image_uri: str
    etag: str
    height: int
    width: int
    group_id: str = ""
    split: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 1


class Output(Protocol):
    """Where a format writes. Paths are relative to the output folder and cannot leave it."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            DataError: ``path`` is absolute, empty or leaves the folder, or was written before.
        """
        ...

    def map(self, function: Callable[[Labels], T], rows: Iterable[Labels]) -> Iterator[T]:
        """``function`` of every row, in order, several at a time in threads; few are held in memory."""
        ...


class Format(Protocol):
    """One file per format (or per owner) subclasses this; instances hold no state.

    Attributes:
        name: what stands as FORMAT on the command line.
        task: what a row must have to be written; rows without it are an error.
        can_import: whether ``items`` and ``read`` exist for it.
    """

    name: ClassVar[str]
    task: ClassVar[Task]
    can_import: ClassVar[bool] = True

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """Write all rows, which come in the order of the table, slices of a volume one after the other.

        Raises:
            ConfigError: the classes do not fit the format.
            DataError: a row that the format cannot hold, named.
        """
        ...

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """One item per sample, in order: what there is for it in ``files``.

        ``sample_id``, ``group_id``, ``split`` and ``rows`` are the sample's; ``uri`` is the file that holds its
        prediction (for documents that hold many: ``DOCUMENT#SAMPLE``), ``etag`` its tag, ``detail`` what ``read``
        needs. A prediction that is missing stays an item whose ``read`` raises ``missing-prediction``, unless the
        format says nothing of images where nothing was found.

        Raises:
            ConfigError: not this format, or predictions of images that are no samples, named.
        """
        ...

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The predictions of an item, ``item.rows`` of them, on the samples' own pixel grid.

        Raises:
            DataError: naming the file and the fix.
        """
        ...
