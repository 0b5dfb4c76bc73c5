"""Import: other people's predictions as rows of the masks table, one for every sample, in the samples' order."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch import tables
from segbatch.codecs import rle, runlength
from segbatch.datasets.reading import detail_of
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats import registry
from segbatch.formats.base import Format, SampleRef
from segbatch.records import OK, PlanItem, Prediction
from segbatch.runs import Journal
from segbatch.stages.items import ItemWorker
from segbatch.stages.mask_rows import MaskRow, masks_batch

_COLUMNS = ("sample_id", "group_id", "split", "image_uri", "etag", "height", "width", "attributes", "volume", "status")


def sample_refs(samples: str) -> Iterator[SampleRef]:
    """Every good sample without its pixels, in the order of the table; a volume once, with the number of its slices."""
    for batch in tables.scan(samples, "samples", _COLUMNS):
        for row in batch.to_pylist():
            volume = row["volume"]
            if row["status"] != OK or (volume is not None and volume["index"]):
                continue
            yield SampleRef(
                sample_id=row["group_id"] if volume is not None and volume["slices"] > 1 else row["sample_id"],
                image_uri=row["image_uri"],
                etag=row["etag"],
                height=row["height"],
                width=row["width"],
                group_id=row["group_id"] or "",
                split=row["split"] or "",
                attributes=json.loads(row["attributes"] or "{}"),
                rows=volume["slices"] if volume is not None else 1,
            )


def items(form: str, files: str, samples: str) -> Iterator[PlanItem]:
    """One item per sample; see ``formats.base.Format.items``.

    Raises:
        ConfigError: an unknown format, one that cannot be imported, or files that are not of it.
    """
    found = registry.format_of(form)
    if not found.can_import:
        raise ConfigError(f"format {form} cannot be imported", "it says too little of the masks")
    tree = Tree.of(files)
    if not tree.exists(""):
        raise ConfigError(f"{files} does not exist", "give the file or folder of the predictions")
    return found.items(tree, sample_refs(samples), tables.class_table(tables.root_of(samples, "samples")))


@dataclass(frozen=True, slots=True)
class ImportTask:
    """The recipe for an import worker: the name of the format."""

    form: str

    def open(self, threads: int, journal: Journal) -> ItemWorker[MaskRow]:
        """See ``runs.Task``."""
        return ItemWorker(PredictionRows(registry.format_of(self.form)), threads, journal)


class PredictionRows:
    """See ``items.Rows``."""

    def __init__(self, form: Format) -> None:
        self._format = form
        self._digest = f"import:{form.name}"

    def read(self, item: PlanItem) -> Iterator[MaskRow]:
        """See ``items.Rows``."""
        for index, prediction in enumerate(self._format.read(item)):
            yield _row(item, index, prediction)

    def bad(self, item: PlanItem, error: DataError, index: int) -> MaskRow:
        """See ``items.Rows``."""
        return MaskRow(**_known(item, index), status=error.code, error=str(error))

    def batch(self, rows: Sequence[MaskRow]) -> pa.RecordBatch:
        """See ``items.Rows``."""
        return masks_batch(rows, self._digest)

    def weight(self, row: MaskRow) -> int:
        """See ``items.Rows``."""
        maps = sum(m.values.nbytes + m.lengths.nbytes for m in (row.semantic, row.panoptic) if m is not None)
        return maps + sum(len(i.counts) for i in row.instances or ())


def _known(item: PlanItem, index: int) -> dict[str, Any]:
    sample = detail_of(item)["sample"]
    return {
        "sample_id": item.row_id(index),
        "group_id": item.group_id or None,
        "image_uri": sample["image_uri"],
        "etag": sample["etag"],
        "height": sample["height"],
        "width": sample["width"],
    }


def _row(item: PlanItem, index: int, prediction: Prediction) -> MaskRow:
    known = _known(item, index)
    for found in (prediction.semantic, prediction.panoptic):
        _check_size(item, found, (known["height"], known["width"]))
    for instance in prediction.instances or ():
        try:
            rle.check(instance.counts, known["height"], known["width"])
        except ValueError as error:
            problem = f"instance {instance.id} of {item.sample_id} in {item.uri} is not of the image's size: {error}"
            raise DataError(problem, "write masks on the photo's own grid", "size-mismatch", item.uri) from error
    return MaskRow(
        **known,
        semantic=None if prediction.semantic is None else runlength.encode(prediction.semantic),
        instances=prediction.instances,
        panoptic=None if prediction.panoptic is None else runlength.encode(prediction.panoptic),
        segments=prediction.segments,
        class_confidence=prediction.class_confidence,
    )


def _check_size(item: PlanItem, found: NDArray[np.uint16] | None, size: tuple[int, int]) -> None:
    if found is not None and found.shape != size:
        raise DataError(
            f"the prediction {item.uri} is {found.shape[1]} x {found.shape[0]}, its photo is {size[1]} x {size[0]}",
            "write it on the photo's own grid",
            "size-mismatch",
            item.uri,
        )
