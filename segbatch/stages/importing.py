"""Import: other people's predictions as rows of the masks table, one for every sample, in the samples' order."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.codecs import rle, runlength
from segbatch.datasets.reading import detail_of
from segbatch.errors import ConfigError, DataError
from segbatch.formats import registry
from segbatch.formats.base import Format, SampleRef
from segbatch.formats.files import MISSING_PREDICTION, tree_of
from segbatch.records import OK, PlanItem, Prediction
from segbatch.runs import Journal
from segbatch.stages.items import ItemWorker
from segbatch.stages.mask_rows import MaskRow, masks_batch

_FIRST_SLICE = "/0000"
_COLUMNS = ("sample_id", "group_id", "split", "image_uri", "etag", "height", "width", "attributes", "volume", "status")


def sample_refs(samples: str) -> Iterator[tuple[SampleRef, bool]]:
    """Every sample without its pixels, in the order of the table, and whether it is good.

    A volume comes once, with the number of its slices; it is good where its first slice is. Bad samples come too, so
    that predictions for them are not taken for those of other images; their sizes may be 0.
    """
    volume_id = ""
    for batch in tables.scan(samples, "samples", _COLUMNS):
        for row in batch.to_pylist():
            sample_id, volume = row["sample_id"], row["volume"]
            slices = volume["slices"] if volume is not None else 1
            if volume_id and sample_id.startswith(f"{volume_id}/"):
                continue  # a further slice
            volume_id = sample_id.removesuffix(_FIRST_SLICE) if _is_first_slice(row) else ""
            yield (
                SampleRef(
                    sample_id=volume_id or sample_id,
                    image_uri=row["image_uri"],
                    etag=row["etag"],
                    height=row["height"] or 0,
                    width=row["width"] or 0,
                    group_id=row["group_id"] or "",
                    split=row["split"] or "",
                    attributes=json.loads(row["attributes"] or "{}"),
                    rows=slices,
                ),
                row["status"] == OK,
            )


def _is_first_slice(row: Mapping[str, Any]) -> bool:
    """Whether a row begins a volume of several slices; a bad one is known by its id alone."""
    if row["volume"] is not None:
        return bool(row["volume"]["slices"] > 1)
    return bool(row["status"] != OK and row["sample_id"] == f"{row['group_id']}{_FIRST_SLICE}")


def items(form: str, files: str, samples: str) -> Iterator[PlanItem]:
    """One item per good sample; see ``formats.base.Format.items``.

    All items are made before the first is given, and wait in a temporary file: what is wrong with the predictions as
    a whole comes to light before a run is begun.

    Raises:
        ConfigError: an unknown format, one that cannot be imported, or files that are not of it.
    """
    found = registry.format_of(form)
    if not found.can_import:
        raise ConfigError(f"format {form} cannot be imported", "it says too little of the masks")
    tree = tree_of(files)
    if not tree.exists(""):
        raise ConfigError(f"{files} does not exist", "give the file or folder of the predictions")
    classes = tables.class_table(tables.root_of(samples, "samples"))
    bad: set[str] = set()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as waiting:
        with storage.on_scratch_disk():
            for item in found.items(tree, _noting_bad(samples, bad), classes):
                if item.sample_id not in bad:
                    waiting.write(f"{json.dumps(asdict(item))}\n")
            waiting.seek(0)
        yield from (PlanItem(**json.loads(line)) for line in waiting)


def _noting_bad(samples: str, bad: set[str]) -> Iterator[SampleRef]:
    """Every sample; the ids of the bad ones go into ``bad``."""
    for sample, is_good in sample_refs(samples):
        if not is_good:
            bad.add(sample.sample_id)
        yield sample


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
        done = 0
        for index, prediction in zip(range(item.rows), self._format.read(item), strict=False):
            yield _row(item, index, prediction)
            done = index + 1
        if done < item.rows:
            problem = f"{item.uri} has {done} of the {item.rows} slices of {item.sample_id}"
            raise DataError(problem, "predict every slice; png and lits hold volumes", MISSING_PREDICTION, item.uri)

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
    for found in (prediction.semantic, prediction.panoptic, *prediction.label_maps.values()):
        _check_size(item, found, (known["height"], known["width"]))
    for instance in prediction.instances or ():
        try:
            rle.check(instance.counts, known["height"], known["width"])
        except ValueError as error:
            problem = f"instance {instance.id} of {item.sample_id} in {item.uri} is not of the image's size: {error}"
            raise DataError(problem, "write masks on the photo's own grid", "size-mismatch", item.uri) from error
    if prediction.panoptic is not None and prediction.panoptic.max(initial=0) > len(prediction.segments or ()):
        problem = f"the panoptic map of {item.uri} shows more segments than are listed"
        raise DataError(problem, "list every segment", "bad-panoptic", item.uri)
    return MaskRow(
        **known,
        semantic=None if prediction.semantic is None else runlength.encode(prediction.semantic),
        instances=prediction.instances,
        panoptic=None if prediction.panoptic is None else runlength.encode(prediction.panoptic),
        segments=prediction.segments,
        class_confidence=prediction.class_confidence,
        label_maps={name: runlength.encode(m) for name, m in prediction.label_maps.items()},
    )


def _check_size(item: PlanItem, found: NDArray[Any] | None, size: tuple[int, int]) -> None:
    if found is not None and found.shape != size:
        raise DataError(
            f"the prediction {item.uri} is {found.shape[1]} x {found.shape[0]}, its photo is {size[1]} x {size[0]}",
            "write it on the photo's own grid",
            "size-mismatch",
            item.uri,
        )
