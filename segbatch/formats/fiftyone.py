"""FiftyOne: label maps as an ``ImageSegmentationDirectory``, with the photos where they are.

``labels/PHOTO.png`` are grey PNG of label ids, of 8 bits or of 16 where an id needs it. ``data.json`` says for each
where its photo lies, if all photos are files of this machine; else put them into ``data/`` and leave ``data_path`` out.
``mask_targets.json`` names the label ids. FiftyOne loads the folder with::

    import json
    import fiftyone as fo

    kind = fo.types.ImageSegmentationDirectory
    dataset = fo.Dataset.from_dir(FOLDER, kind, label_field="predictions", data_path="data.json")
    names = json.load(open(f"{FOLDER}/mask_targets.json"))
    dataset.default_mask_targets = {int(label_id): name for label_id, name in names.items()}

Nothing is lost. Instances go to FiftyOne by the format ``coco-dataset`` (its ``COCODetectionDataset``).

Source: docs.voxel51.com/user_guide/import_datasets.html#ImageSegmentationDirectory; fiftyone 1.22.1,
``utils/data/importers.py`` (``ImageSegmentationDirectoryImporter``, ``_load_data_map``).
"""

import json
from collections.abc import Iterable, Iterator
from typing import ClassVar

from segbatch import storage
from segbatch.codecs import png
from segbatch.datasets.tree import Tree
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import below, label_map, match_files, photo_path, stem_of
from segbatch.records import ClassTable, PlanItem, Prediction, Task

_FOLDER = "labels"


class FiftyOne(Format):
    """An ``ImageSegmentationDirectory`` for FiftyOne: label maps as PNG, addresses of the photos, names of the ids."""

    name: ClassVar[str] = "fiftyone"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """``labels/PHOTO.png`` for every row, ``data.json`` and ``mask_targets.json``."""
        photos: dict[str, str] = {}
        for path, uri, data in output.map(_file, rows):
            output.put(f"{_FOLDER}/{stem_of(path)}.png", data)
            photos[path] = uri
        if all(storage.is_local(uri) for uri in photos.values()):
            output.put("data.json", json.dumps(photos, indent=1, ensure_ascii=False).encode())
        names = {c.label_id: c.name for c in classes.classes}
        output.put("mask_targets.json", json.dumps(names, indent=1, ensure_ascii=False).encode())

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; label maps are found in ``labels/`` by the photo's path, or by its name."""
        labels = below(files, _FOLDER) if files.is_folder(_FOLDER) else files
        return match_files(labels, samples, lambda s: f"{stem_of(photo_path(s))}.png", (".png",))

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: missing, broken, or in colour.
        """
        yield Prediction(semantic=label_map(item))


def _file(row: Labels) -> tuple[str, str, bytes]:
    assert row.semantic is not None
    return photo_path(row), row.image_uri, png.encode_grey(row.semantic)
