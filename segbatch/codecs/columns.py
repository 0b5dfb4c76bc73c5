"""Label maps as Arrow columns: ``schemas.RUNS`` and ``schemas.CLASS_PIXELS``, without copying pixels."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from segbatch import schemas
from segbatch.codecs.runlength import Runs, class_pixels


def runs_array(rows: Sequence[Runs | None]) -> pa.ListArray:
    """One list of runs per row; None becomes null. Shape: len(rows)."""
    columns = [(r.values, r.lengths) if r is not None else None for r in rows]
    return _list_of_pairs(columns, schemas.RUNS)


def panoptic_array(rows: Sequence[Runs | None]) -> pa.ListArray:
    """Runs of panoptic index maps, one list per row; None becomes null. Shape: len(rows)."""
    columns = [(r.values, r.lengths) if r is not None else None for r in rows]
    return _list_of_pairs(columns, schemas.PANOPTIC_RUNS)


def label_maps_array(rows: Sequence[Mapping[str, Runs] | None]) -> pa.ListArray:
    """Named label maps, one list of (name, runs) per row; None or no map becomes null. Shape: len(rows)."""
    present = [list(r.items()) if r else [] for r in rows]
    names = pa.array([name for row in present for name, _ in row], pa.string())
    runs = runs_array([runs for row in present for _, runs in row])
    items = pa.StructArray.from_arrays([names, runs], fields=list(schemas.LABEL_MAPS.value_type))
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in present], out=offsets[1:])
    missing = pa.array([not row for row in present], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=schemas.LABEL_MAPS, mask=missing)


def label_maps_at(column: pa.ListArray, row: int) -> dict[str, Runs]:
    """The label maps of one row by name, as views on the Arrow buffers; empty where the column is null."""
    if not column.is_valid()[row].as_py():
        return {}
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    names, runs = column.values.field(0), column.values.field(1)
    found = {names[i].as_py(): runs_at(runs, i) for i in range(start, stop)}
    return {name: r for name, r in found.items() if r is not None}


def class_pixels_array(rows: Sequence[Runs | None]) -> pa.ListArray:
    """Pixels per label id of every row, by ascending id; None becomes null."""
    return _list_of_pairs([class_pixels(r) if r is not None else None for r in rows], schemas.CLASS_PIXELS)


def _list_of_pairs(rows: Sequence[tuple[np.ndarray, np.ndarray] | None], kind: pa.ListType) -> pa.ListArray:
    struct = kind.value_type
    present = [r for r in rows if r is not None]
    arrays = [
        pa.array(np.concatenate([r[i] for r in present]) if present else np.empty(0, np.uint16)).cast(struct[i].type)
        for i in range(2)
    ]
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([0 if r is None else len(r[0]) for r in rows], out=offsets[1:])
    items = pa.StructArray.from_arrays(arrays, fields=list(struct))
    missing = pa.array([r is None for r in rows], pa.bool_()) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind, mask=missing)


def runs_at(column: pa.ListArray, row: int) -> Runs | None:
    """The runs of one row (of a panoptic column too) as views on the Arrow buffers; None where it is null."""
    if not column.is_valid()[row].as_py() if column.null_count else False:
        return None
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    items = column.values
    values = items.field(0).to_numpy(zero_copy_only=True)[start:stop].astype(np.uint16, copy=False)
    return Runs(values, items.field(1).to_numpy(zero_copy_only=True)[start:stop])
