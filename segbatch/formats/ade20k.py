"""Results of ADE20K's scene parsing benchmark: a grey PNG per image, named like it.

Source: github.com/CSAILVision/sceneparsing, ``README.md`` ("Submission format to the evaluation server": a zip of
these files), ``demoEvaluation.m`` and ``evaluationCode/``. Values are 1..150. The evaluation takes 0 too: a 0 on a
labelled pixel counts as wrong and as no class. It does not look at pixels whose truth is 0.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import png
from segbatch.datasets import reading
from segbatch.datasets.ade20k import CLASSES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import file_name, match_files, read_prediction
from segbatch.records import ClassTable, PlanItem, Prediction, Task

_PREDICTIONS = "predictions"
_KNOWN = reading.known_ids(CLASSES)
_NAMES = {c.label_id: c.name for c in CLASSES.classes}


class Ade20k(Format):
    """``ADE_test_00000001.png`` for ``ADE_test_00000001.jpg``: 8-bit grey, label ids 0..150."""

    name: ClassVar[str] = "ade20k"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One PNG a row, all in one folder.

        Raises:
            ConfigError: classes that are not the benchmark's, named.
            DataError: a label id above 150, or two images of one name.
        """
        for found in classes.classes:
            if _NAMES.get(found.label_id) != found.name:
                problem = f"format {self.name} needs the 150 classes of ADE20K, but {found.label_id} is {found.name!r}"
                raise ConfigError(problem, "export masks of samples of ade20k, or choose the format png")
        for path, data in output.map(_file, rows):
            output.put(path, data)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; files are found by the image's name, in any folder.

        Where there is a folder ``predictions``, as in the benchmark's ``sampleData``, nothing else is looked at.
        """
        if files.is_folder(_PREDICTIONS):
            files = Tree(files.source, tuple(storage.join(root, _PREDICTIONS) for root in files.roots))
        return match_files(files, samples, lambda s: file_name(s, ".png"), (".png",))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: missing, broken, in colour, or with an id above 150.
        """
        label = read_prediction(item)
        _check(label, item.uri)
        yield Prediction(semantic=label.astype(np.uint16))


def _file(row: Labels) -> tuple[str, bytes]:
    assert row.semantic is not None
    _check(row.semantic, row.sample_id)
    return file_name(row, ".png"), png.encode_grey(row.semantic, 8)


def _check(label: NDArray[np.generic], uri: str) -> None:
    if label.ndim != 2:
        raise DataError(f"{uri} is in colour", "write a grey PNG of label ids", "label-type", uri)
    reading.check_ids(label, _KNOWN, uri)
