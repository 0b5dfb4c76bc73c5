"""Predictions under the label ids of the samples: classes are matched by name, or as the user says."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.records import ClassTable

VOID = 0xFFFF
"""Label id of predicted classes that the samples know no class for: a prediction of nothing."""

_IDS = 1 << 16

Ids = Mapping[int, int]


def class_ids(masks: ClassTable, samples: ClassTable, given: Mapping[str, str]) -> dict[int, int]:
    """Label ids of the samples by those of the masks, where they differ; empty where the masks use the samples' own.

    Names are compared without regard to case. ``given`` says for classes of the masks which class of the samples they
    are (empty: none); the others go by their names. Where every class of the masks has its namesake's id, or an id that
    the samples do not use, nothing is changed.

    Raises:
        ConfigError: a class without a namesake while ids have other meanings, or ``given`` names unknown classes.
    """
    ours = {c.name.casefold(): c.label_id for c in samples.classes}
    theirs = {c.name.casefold(): c for c in masks.classes}
    for name, target in given.items():
        _known(name, theirs, "masks")
        if target:
            _known(target, ours, "samples")
    chosen = {name.casefold(): target for name, target in given.items()}
    scored = {c.label_id: c.name.casefold() for c in samples.scored}
    strange = [c for c in masks.scored if scored.get(c.label_id) != c.name.casefold()]
    if not chosen and not any(c.label_id in scored or c.name.casefold() in ours for c in strange):
        return {}
    found: dict[int, int] = {}
    for c in masks.classes:
        name = c.name.casefold()
        if name in chosen:
            found[c.label_id] = ours[chosen[name].casefold()] if chosen[name] else VOID
        elif name in ours:
            found[c.label_id] = ours[name]
        elif c.ignore:
            found[c.label_id] = VOID
        else:
            at = scored.get(c.label_id)
            meaning = f", and {at!r} in the samples" if at else ""
            raise ConfigError(
                f"label {c.label_id} is {c.name!r} in the masks{meaning}: the samples have no class of that name"
                f"{nearest(c.name, [k.name for k in samples.classes])}",
                "give a --class-map, or predict with --classes so that the masks carry the dataset's label ids",
            )
    return found if any(old != new for old, new in found.items()) else {}


def _known(name: str, classes: Mapping[str, Any], what: str) -> None:
    if name.casefold() not in classes:
        raise ConfigError(
            f"the class map names {name!r}, which the {what} lack{nearest(name, list(classes))}",
            'write [classes] with lines "class of the masks" = "class of the samples"',
        )


def relabelled(masks: pa.RecordBatch, ids: Ids) -> pa.RecordBatch:
    """Rows of masks under other label ids; instances of no class are left out."""
    if not ids:
        return masks
    table = np.arange(_IDS, dtype=np.uint16)
    table[list(ids)] = list(ids.values())
    for name, leaf in (("semantic", "value"), ("instances", "category_id"), ("segments", "category_id")):
        place = masks.schema.get_field_index(name)
        if place >= 0:
            column = _changed(masks.column(place), leaf, table, drop=name == "instances")
            masks = masks.set_column(place, masks.schema.field(place), column)
    return masks


def _changed(column: pa.ListArray, leaf: str, table: NDArray[np.uint16], drop: bool) -> pa.ListArray:
    items, offsets = column.values, column.offsets.to_numpy()
    place = items.type.get_field_index(leaf)
    old = items.field(place).to_numpy()
    known = (old >= 0) & (old < _IDS)
    new = np.where(known, table[np.where(known, old, 0)], old).astype(old.dtype)
    parts = [items.field(i) if i != place else pa.array(new) for i in range(items.type.num_fields)]
    items = pa.StructArray.from_arrays(parts, fields=list(items.type))
    if drop:
        kept = new != VOID
        offsets = np.concatenate([[0], np.cumsum(kept)])[offsets].astype(offsets.dtype)
        items = items.filter(pa.array(kept))
    missing = pa.array(~column.is_valid().to_numpy(zero_copy_only=False))
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=column.type, mask=missing)
