"""Rows of a samples table as plan items: whole part files, or the ranges that an SQL condition selects."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.dataset as ds

from segbatch import schemas, storage, tables
from segbatch.errors import ConfigError
from segbatch.records import PlanItem
from segbatch.storage import ObjectInfo

_LARGE = {"image", "semantic", "instances", "panoptic", "segments", "class_pixels", "volume", "label_maps"}


def sample_ranges(root: str, where: str = "") -> Iterator[PlanItem]:
    """One item per part file, or per run of adjacent rows for which ``where`` holds.

    Raises:
        ConfigError: ``where`` is not SQL over the columns of the table.
    """
    for part in tables.parts(tables.find(root, "samples")):
        rows = tables.count_rows(part.uri, "samples")
        if not where:
            yield PlanItem("", part.uri, part.etag, part.size, rows)
            continue
        for start, stop in _ranges(part, where):
            share = part.size * (stop - start) // max(rows, 1)
            yield PlanItem("", part.uri, part.etag, share, stop - start, start)


def _ranges(part: ObjectInfo, where: str) -> Iterator[tuple[int, int]]:
    import duckdb

    columns = [f.name for f in schemas.SAMPLES if f.name not in _LARGE]
    filesystem, path = storage.arrow_filesystem(part.uri)
    rows = ds.dataset([path], filesystem=filesystem, format="parquet").to_table(columns=columns)
    rows = rows.append_column("row", pa.array(range(rows.num_rows), pa.int64()))
    with duckdb.connect(config={"enable_external_access": False, "python_enable_replacements": False}) as db:
        db.register("samples", rows)
        try:
            sql = f'SELECT "row" FROM samples WHERE ({where}\n) ORDER BY "row"'
            chosen = [row for (row,) in db.execute(sql).fetchall()]
        except duckdb.Error as error:
            raise ConfigError(
                f"--where {' '.join(where.split())}: {str(error).splitlines()[0]}", f"columns: {', '.join(columns)}"
            ) from error
    start = previous = None
    for row in chosen:
        if previous is None or row != previous + 1:
            if start is not None and previous is not None:
                yield start, previous + 1
            start = row
        previous = row
    if start is not None and previous is not None:
        yield start, previous + 1
