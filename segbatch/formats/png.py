"""Plain PNG label maps: ``SAMPLE_ID.png`` of label ids, as the dataset ``image-masks`` reads them.

Slices of a volume are files of its folder: ``VOLUME/0000.png`` and so on. ``classes.json`` is the class table in the
form of ``image-masks``, without the ids and colours that it cannot hold (negative ones, and colours of two classes).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from segbatch.codecs import png
from segbatch.datasets import reading
from segbatch.datasets.tree import Tree
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import item_of, label_map, label_path, match_paths
from segbatch.records import ClassTable, PlanItem, Prediction, Task

_GREATEST_ID = (1 << 16) - 1
_DIGEST_BYTES = 8


class Png(Format):
    """Label maps of label ids: grey PNG of 8 bits, or 16 where an id needs it, and ``classes.json``."""

    name: ClassVar[str] = "png"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """``SAMPLE_ID.png`` for every row, without the photo's suffix; ``classes.json`` where there are classes."""
        for path, data in output.map(_file, rows):
            output.put(path, data)
        if classes.classes:
            output.put("classes.json", json.dumps(_class_list(classes), indent=1, ensure_ascii=False).encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; files are found by the sample's id, see ``files.match_paths``."""
        wanted = [(sample, _paths(sample)) for sample in samples]
        there = match_paths(files, {path: path for _, paths in wanted for path in paths}, (".png",))
        for sample, paths in wanted:
            found = [there.get(path) for path in paths]
            uris = [info.uri if info else files.uri(path) for info, path in zip(found, paths, strict=True)]
            etag = reading.joint_etag(*found)
            if sample.rows > 1:
                etag = hashlib.blake2b(etag.encode(), digest_size=_DIGEST_BYTES).hexdigest()
            yield item_of(sample, uris[0], etag, sum(info.size for info in found if info), {"files": uris})

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The label map of an image, or those of a volume's slices.

        Raises:
            DataError: missing, broken, or in colour.
        """
        for uri in reading.detail_of(item)["files"]:
            yield Prediction(semantic=label_map(replace(item, uri=uri)))


def _paths(sample: SampleRef) -> list[str]:
    """The file of an image, or those of a volume's slices."""
    if sample.rows == 1:
        return [label_path(sample.sample_id, ".png")]
    return [f"{sample.sample_id}/{index:04d}.png" for index in range(sample.rows)]


def _file(row: Labels) -> tuple[str, bytes]:
    assert row.semantic is not None
    return label_path(row.sample_id, ".png"), png.encode_grey(row.semantic)


def _class_list(classes: ClassTable) -> list[dict[str, Any]]:
    """What ``class_file`` reads as the same classes."""
    colors = Counter(c.color for c in classes.classes)
    return [
        {
            "id": c.label_id,
            "name": c.name,
            "color": c.color if colors[c.color] == 1 else None,
            "ignore": c.ignore,
            "isthing": c.isthing,
            "train_id": c.train_id,
            "supercategory": c.supercategory,
        }
        for c in classes.classes
        if 0 <= c.label_id <= _GREATEST_ID
    ]
