"""Segmentation results as PASCAL VOC's development kit and server take them, for PASCAL VOC and PASCAL-Context.

Source: ``devkit_doc.pdf`` of the development kit, 5.3 (indexed PNG with pixel indices 0 to 20 and the colour map of the
annotation), ``VOCcode/VOCinit.m`` (``VOCopts.seg.clsrespath``), ``VOCcode/VOCevalseg.m``;
host.robots.ox.ac.uk:8080 (a tar of the folder ``results``).
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import png
from segbatch.datasets import pascal_voc, reading, tables
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import file_name, match_files, read_prediction, safe_name
from segbatch.records import ClassTable, PlanItem, Prediction, Task

_TABLES = ("pascal-voc", "pascal-context-60")
_COMPETITION = "comp6"
"""Segmentation, trained on any data but the test images; comp5 is the one with VOC's own data only."""

_YEAR = re.compile(r"/(VOC20\d\d)/")
_LATEST = "VOC2012"


class Pascal(Format):
    """``results/VOC2012/Segmentation/comp6_test_cls/NAME.png``: palette PNG of label ids in VOC's colour map.

    The year is that in the photo's address (else VOC2012), the image set is the sample's split (else test). Ids are
    0..20 for PASCAL VOC; 0..59 of the class table ``pascal-context-60`` for PASCAL-Context, which has no server. Void
    (255) is written for ground truth only, as in ``SegmentationClass``: VOCevalseg refuses results that have it.
    """

    name: ClassVar[str] = "pascal"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One PNG a row.

        Raises:
            ConfigError: classes of neither dataset.
            DataError: an id that the dataset lacks, void in a prediction, two images of one name.
        """
        table = _table_of(classes)

        def file(row: Labels) -> tuple[str, bytes]:
            assert row.semantic is not None
            if not row.is_truth:
                _refuse_void(row.semantic, row.sample_id)
            reading.check_ids(row.semantic, _known(table), row.sample_id)
            return _path(row), png.encode_palette(row.semantic, _colors())

        for path, data in output.map(file, rows):
            output.put(path, data)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; files are found by the image's name, in any folder.

        Raises:
            ConfigError: classes of neither dataset.
        """
        table = _table_of(classes)
        for item in match_files(files, samples, _path, (".png",)):
            yield replace(item, detail=json.dumps({**reading.detail_of(item), "table": table}))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map; colours of VOC's colour map are taken for their indices, and void stays.

        Raises:
            DataError: missing, broken, with a colour that VOC's colour map lacks, or an id that the dataset lacks.
        """
        label = pascal_voc.indices(read_prediction(item), item.uri)
        reading.check_ids(label, _known(str(reading.detail_of(item)["table"])), item.uri)
        yield Prediction(semantic=label.astype(np.uint16))


def _table_of(classes: ClassTable) -> str:
    """Name of the class table that these classes are of."""
    found = {(c.label_id, c.name) for c in classes.classes}
    for name in _TABLES:
        if found and found <= {(c.label_id, c.name) for c in tables.load(name).classes}:
            return name
    problem = "format pascal needs the classes of PASCAL VOC or the 60 of PASCAL-Context"
    raise ConfigError(problem, "export masks of samples of pascal-voc or pascal-context, or choose the format png")


@cache
def _known(table: str) -> NDArray[np.bool_]:
    return reading.known_ids(tables.load(table))


@cache
def _colors() -> dict[int, tuple[int, int, int]]:
    return {i: (int(r), int(g), int(b)) for i, (r, g, b) in enumerate(pascal_voc.color_map())}


def _refuse_void(label: NDArray[Any], sample_id: str) -> None:
    void = int((label == pascal_voc.VOID).sum())
    if void:
        problem = f"the prediction of {sample_id} has {void} pixels of void (255), which the server refuses"
        raise DataError(problem, "predict a class for every pixel", "void-prediction")


def _path(row: Labels | SampleRef) -> str:
    year = _YEAR.search(row.image_uri)
    folder = f"results/{year[1] if year else _LATEST}/Segmentation/{_COMPETITION}_{safe_name(row.split or 'test')}_cls"
    return f"{folder}/{file_name(row, '.png')}"
