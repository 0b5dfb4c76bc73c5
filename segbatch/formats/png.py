"""Plain PNG label maps: ``SAMPLE_ID.png`` of label ids, as the dataset ``image-masks`` reads them."""

import json
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np

from segbatch.codecs import png
from segbatch.datasets import reading
from segbatch.datasets.tree import Tree
from segbatch.errors import DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import label_path, match_files
from segbatch.records import ClassTable, PlanItem, Prediction, Task


class Png(Format):
    """Label maps of label ids: grey PNG of 8 bits, or 16 where an id needs it, and ``classes.json``."""

    name: ClassVar[str] = "png"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """``SAMPLE_ID.png`` for every row, without the photo's suffix."""
        for path, data in output.map(_file, rows):
            output.put(path, data)
        names = [{"id": c.label_id, "name": c.name, "color": c.color, "ignore": c.ignore} for c in classes.classes]
        output.put("classes.json", json.dumps(names, indent=1, ensure_ascii=False).encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; files are found by the sample's id."""
        return match_files(files, samples, lambda s: label_path(s.sample_id, ".png"), (".png",))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: missing, broken, or in colour.
        """
        found = reading.read_label(item.uri)
        if found.ndim != 2:
            raise DataError(f"{item.uri} is in colour", "write label ids", "label-type", item.uri)
        yield Prediction(semantic=found.astype(np.uint16))


def _file(row: Labels) -> tuple[str, bytes]:
    assert row.semantic is not None
    return label_path(row.sample_id, ".png"), png.encode_grey(row.semantic)
