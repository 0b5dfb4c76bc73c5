"""Label maps as Arrow columns: ``schemas.RUNS`` and ``schemas.CLASS_PIXELS``, without copying pixels."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from segbatch import schemas
from segbatch.codecs.runlength import Runs, class_pixels


def runs_array(rows: Sequence[Runs | None]) -> pa.ListArray:
    """One list of runs per row; None becomes null. Shape: len(rows)."""
    columns = [(r.values, r.lengths) if r is not None else None for r in rows]
    return _list_of_pairs(columns, schemas.RUNS)


def class_pixels_array(rows: Sequence[Runs | None]) -> pa.ListArray:
    """Pixels per label id of every row, by ascending id; None becomes null."""
    return _list_of_pairs([class_pixels(r) if r is not None else None for r in rows], schemas.CLASS_PIXELS)


def _list_of_pairs(rows: Sequence[tuple[np.ndarray, np.ndarray] | None], kind: pa.ListType) -> pa.ListArray:
    struct = kind.value_type
    present = [r for r in rows if r is not None]
    arrays = [
        pa.array(np.concatenate([r[i] for r in present]) if present else np.empty(0, np.uint16), struct[i].type)
        for i in range(2)
    ]
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([0 if r is None else len(r[0]) for r in rows], out=offsets[1:])
    items = pa.StructArray.from_arrays(arrays, fields=list(struct))
    missing = pa.array([r is None for r in rows], pa.bool_()) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind, mask=missing)


def runs_at(column: pa.ListArray, row: int) -> Runs | None:
    """The runs of one row as views on the Arrow buffers; None where the column is null."""
    if not column.is_valid()[row].as_py() if column.null_count else False:
        return None
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    items = column.values
    values = items.field(0).to_numpy(zero_copy_only=True)[start:stop]
    return Runs(values, items.field(1).to_numpy(zero_copy_only=True)[start:stop])
