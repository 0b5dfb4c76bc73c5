"""Label maps as Clothing Co-Parsing keeps them: ``annotations/pixel-level/NNNN.mat`` with ``groundtruth``.

MATLAB 5 files, compressed, of shape (height, width): ``double`` in MATLAB, stored as uint8, as the original's all are.
The owners run no server.

Source: github.com/bearpaw/clothing-co-parsing, ``annotations/pixel-level`` and ``show_pixel_anno.m``.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np

from segbatch.codecs import mat
from segbatch.datasets import ccp
from segbatch.datasets.tree import Tree
from segbatch.errors import DataError, ObjectMissing
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import label_path, match_files, missing
from segbatch.records import ClassTable, PlanItem, Prediction, Task


class Ccp(Format):
    """``annotations/pixel-level/SAMPLE_ID.mat`` with the variable ``groundtruth``."""

    name: ClassVar[str] = "ccp"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One file per row; the same labels always give the same bytes.

        Raises:
            DataError: ``value-range``: a label id above 255.
        """
        for path, data in output.map(_file, rows):
            output.put(path, data)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; files are found by the sample's id, also in a folder of their own."""
        return match_files(files, samples, _path, (".mat",))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: missing, broken, or not a matrix of label ids.
        """
        try:
            found = ccp.label_map(item.uri)
        except ObjectMissing as error:
            raise missing(item) from error
        yield Prediction(semantic=found)


def _path(sample: Labels | SampleRef) -> str:
    return f"{ccp.PIXELS}/{label_path(sample.sample_id, '.mat')}"


def _file(row: Labels) -> tuple[str, bytes]:
    assert row.semantic is not None
    highest = int(row.semantic.max(initial=0))
    if highest > np.iinfo(np.uint8).max:
        problem = f"{row.sample_id} has the label id {highest}, more than the 255 that a byte holds"
        raise DataError(problem, "export png", "value-range")
    return _path(row), mat.write(ccp.GROUNDTRUTH, row.semantic.astype(np.uint8), as_double=True)
